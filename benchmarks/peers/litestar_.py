"""Litestar's websocket_listener, and its channels plugin in memory for the group.

A listener parses JSON but does not validate it, so the frame comes as text, and a msgspec decoder
finds the type and checks the payload. What is returned, a struct, Litestar encodes.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
from litestar import Litestar, WebSocket, websocket_listener
from litestar.channels import ChannelsPlugin
from litestar.channels.backends.memory import MemoryChannelsBackend
from litestar.di import NamedDependency
from litestar.exceptions import WebSocketDisconnect

from benchmarks.workload import TYPES, WIRE

__all__ = ["LABEL", "PACKAGES", "WIRE", "create_app"]

LABEL = "Litestar + msgspec"
PACKAGES = ("litestar", "msgspec")


class Work(msgspec.Struct):
    a: int
    b: str
    c: float


class Y(msgspec.Struct):
    a: int
    b: str


class ShoutPayload(msgspec.Struct):
    count: int
    text: str


class HeardPayload(msgspec.Struct):
    text: str


class Shout(msgspec.Struct, tag_field="type", tag="shout"):
    id: int
    payload: ShoutPayload


class Reply(msgspec.Struct, tag_field="type", tag="y"):
    id: int
    payload: Y


class Heard(msgspec.Struct, tag_field="type", tag="heard"):
    payload: HeardPayload


class Error(msgspec.Struct, tag_field="type", tag="error"):
    payload: str


async def work(payload: Work) -> Y:
    return Y(payload.a, payload.b)


def request(type: str) -> type[msgspec.Struct]:
    fields = [("id", int), ("payload", Work)]
    return msgspec.defstruct(type.title(), fields, tag_field="type", tag=type)


handlers: dict[type[msgspec.Struct], Callable[[Work], Awaitable[Y]]] = {
    request(type): work for type in TYPES
}
decoder = msgspec.json.Decoder(functools.reduce(operator.or_, handlers))
shouts = msgspec.json.Decoder(Shout)


@websocket_listener("/ws")
async def plain(data: str) -> Reply | Error:
    try:
        message: Any = decoder.decode(data)
    except msgspec.MsgspecError as error:
        return Error(str(error))
    return Reply(message.id, await handlers[type(message)](message.payload))


@asynccontextmanager
async def join(
    socket: WebSocket[Any, Any, Any], channels: NamedDependency[ChannelsPlugin]
) -> AsyncGenerator[None, None]:
    await socket.accept()
    async with channels.start_subscription("all") as subscriber:
        with suppress(WebSocketDisconnect):
            async with subscriber.run_in_background(socket.send_text):
                yield


@websocket_listener("/group", connection_lifespan=join)
async def group(data: str, channels: NamedDependency[ChannelsPlugin]) -> Reply:
    message = shouts.decode(data)
    for _ in range(message.payload.count):
        await channels.wait_published(Heard(HeardPayload(message.payload.text)), "all")
    return Reply(message.id, Y(message.payload.count, "done"))


def create_app() -> Any:
    plugin = ChannelsPlugin(backend=MemoryChannelsBackend(), channels=["all"])
    return Litestar([plain, group], plugins=[plugin])
