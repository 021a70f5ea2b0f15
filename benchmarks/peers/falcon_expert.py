"""Falcon by hand, as fast as it gets: no receive queue, msgspec decodes to attrs classes."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import falcon
import falcon.asgi
import msgspec

from benchmarks.workload import TYPES, WIRE

__all__ = ["LABEL", "PACKAGES", "WIRE", "create_app"]

LABEL = "Falcon by hand, tuned"
PACKAGES = ("falcon", "attrs", "msgspec")


@attrs.frozen
class Work:
    a: int
    b: str
    c: float


@attrs.frozen
class Shout:
    count: int
    text: str


@attrs.frozen
class Y:
    a: int
    b: str


def request(type: str, payload: type) -> type[msgspec.Struct]:
    fields: list[tuple[str, Any] | tuple[str, Any, Any]]
    fields = [("payload", payload), ("id", int | str | None, None)]
    return msgspec.defstruct(type.title(), fields, tag_field="type", tag=type)


async def work(payload: Work) -> Y:
    return Y(payload.a, payload.b)


async def shout(payload: Shout) -> Y:
    for _ in range(payload.count):
        text = encode({"type": "heard", "payload": {"text": payload.text}}).decode()
        for ws in tuple(group):
            with contextlib.suppress(falcon.WebSocketDisconnected):
                await ws.send_text(text)
    return Y(payload.count, "done")


handlers: dict[type[msgspec.Struct], Callable[[Any], Awaitable[Y]]] = {
    **{request(type, Work): work for type in TYPES},
    request("shout", Shout): shout,
}
decode = msgspec.json.Decoder(functools.reduce(operator.or_, handlers)).decode
encode = msgspec.json.Encoder().encode
group: set[falcon.asgi.WebSocket] = set()


class Messages:
    async def on_websocket(self, req: falcon.asgi.Request, ws: falcon.asgi.WebSocket) -> None:
        await ws.accept()
        await self.serve(ws)

    async def serve(self, ws: falcon.asgi.WebSocket) -> None:
        with contextlib.suppress(falcon.WebSocketDisconnected):
            while True:
                message: Any = decode(await ws.receive_text())
                y = await handlers[type(message)](message.payload)
                reply = {"type": "y", "id": message.id, "payload": {"a": y.a, "b": y.b}}
                await ws.send_text(encode(reply).decode())


class Group(Messages):
    async def on_websocket(self, req: falcon.asgi.Request, ws: falcon.asgi.WebSocket) -> None:
        await ws.accept()
        group.add(ws)
        try:
            await self.serve(ws)
        finally:
            group.discard(ws)


def create_app() -> Any:
    app = falcon.asgi.App()
    app.ws_options.max_receive_queue = 0
    app.add_route("/ws", Messages())
    app.add_route("/group", Group())
    return app
