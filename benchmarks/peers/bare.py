"""The least that does the work: an ASGI callable, with msgspec from frame to typed object."""

from __future__ import annotations

import functools
import operator
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from benchmarks.workload import TYPES, WIRE

__all__ = ["LABEL", "PACKAGES", "WIRE", "create_app"]

LABEL = "bare ASGI + msgspec"
PACKAGES = ("msgspec",)

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


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


class Reply(msgspec.Struct, tag_field="type", tag="y"):
    id: int | str | None
    payload: Y


class Heard(msgspec.Struct, tag_field="type", tag="heard"):
    payload: HeardPayload


def request(type: str, payload: type[msgspec.Struct]) -> type[msgspec.Struct]:
    fields: list[tuple[str, Any] | tuple[str, Any, Any]]
    fields = [("payload", payload), ("id", int | str | None, None)]
    return msgspec.defstruct(type.title(), fields, tag_field="type", tag=type)


async def work(payload: Work) -> Y:
    return Y(payload.a, payload.b)


async def shout(payload: ShoutPayload) -> Y:
    for _ in range(payload.count):
        text = encode(Heard(HeardPayload(payload.text))).decode()
        event = {"type": "websocket.send", "text": text}
        for send in tuple(group):
            await send(event)
    return Y(payload.count, "done")


handlers: dict[type[msgspec.Struct], Callable[[Any], Awaitable[Y]]] = {
    **{request(type, Work): work for type in TYPES},
    request("shout", ShoutPayload): shout,
}
decode = msgspec.json.Decoder(functools.reduce(operator.or_, handlers)).decode
encode = msgspec.json.Encoder().encode
group: set[Send] = set()


async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        while True:
            event = await receive()
            await send({"type": f"{event['type']}.complete"})
            if event["type"] == "lifespan.shutdown":
                return
    await receive()
    await send({"type": "websocket.accept"})
    if scope["path"] == "/group":
        group.add(send)
    try:
        while (event := await receive())["type"] == "websocket.receive":
            message: Any = decode(event["text"])
            reply = Reply(message.id, await handlers[type(message)](message.payload))
            await send({"type": "websocket.send", "text": encode(reply).decode()})
    finally:
        group.discard(send)


def create_app() -> Any:
    return app
