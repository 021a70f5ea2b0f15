"""Starlette's WebSocketEndpoint with its JSON encoding, and a table of handlers.

Starlette has no payload types and no groups, so the payloads are checked by hand, and a group is a
set of connections.
"""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.endpoints import WebSocketEndpoint
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from benchmarks.peers.plain import Handler, Shout, Y, answer, work
from benchmarks.workload import TYPES, WIRE

__all__ = ["LABEL", "PACKAGES", "WIRE", "create_app"]

LABEL = "Starlette"
PACKAGES = ("starlette",)

group: set[WebSocket] = set()


async def shout(data: Any) -> Y:
    payload = Shout.parse(data)
    for _ in range(payload.count):
        for websocket in tuple(group):
            await websocket.send_json({"type": "heard", "payload": {"text": payload.text}})
    return Y(payload.count, "done")


handlers: dict[str, Handler] = {**dict.fromkeys(TYPES, work), "shout": shout}


class Messages(WebSocketEndpoint):
    encoding = "json"

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        await websocket.send_json(await answer(handlers, data))


class Group(Messages):
    async def on_connect(self, websocket: WebSocket) -> None:
        await websocket.accept()
        group.add(websocket)

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        group.discard(websocket)


def create_app() -> Any:
    return Starlette(routes=[WebSocketRoute("/ws", Messages), WebSocketRoute("/group", Group)])
