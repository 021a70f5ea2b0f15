"""Falcon as its WebSocket tutorial shows it: media in and out, one if after the other.

Falcon has no payload types and no groups, so the payloads are checked by hand, and a group is a set
of connections. The receive queue is the default one.
"""

from __future__ import annotations

import contextlib
from typing import Any

import falcon
import falcon.asgi

from benchmarks.peers.plain import Shout, Y, work
from benchmarks.workload import WIRE

__all__ = ["LABEL", "PACKAGES", "WIRE", "create_app"]

LABEL = "Falcon by hand, as usual"
PACKAGES = ("falcon",)

group: set[falcon.asgi.WebSocket] = set()

t0 = t1 = t2 = t3 = t4 = t5 = t6 = t7 = t8 = t9 = work


async def shout(data: Any) -> Y:
    payload = Shout.parse(data)
    for _ in range(payload.count):
        for ws in tuple(group):
            with contextlib.suppress(falcon.WebSocketDisconnected):
                await ws.send_media({"type": "heard", "payload": {"text": payload.text}})
    return Y(payload.count, "done")


async def handle(type: str, payload: Any) -> Y:
    if type == "t0":
        return await t0(payload)
    elif type == "t1":
        return await t1(payload)
    elif type == "t2":
        return await t2(payload)
    elif type == "t3":
        return await t3(payload)
    elif type == "t4":
        return await t4(payload)
    elif type == "t5":
        return await t5(payload)
    elif type == "t6":
        return await t6(payload)
    elif type == "t7":
        return await t7(payload)
    elif type == "t8":
        return await t8(payload)
    elif type == "t9":
        return await t9(payload)
    elif type == "shout":
        return await shout(payload)
    raise ValueError("there is no such type")


class Messages:
    async def on_websocket(self, req: falcon.asgi.Request, ws: falcon.asgi.WebSocket) -> None:
        try:
            await ws.accept()
            await self.serve(ws)
        except falcon.WebSocketDisconnected:
            return

    async def serve(self, ws: falcon.asgi.WebSocket) -> None:
        while True:
            message: Any = await ws.receive_media()
            try:
                y = await handle(message["type"], message["payload"])
            except ValueError as error:
                await ws.send_media({"type": "error", "payload": str(error)})
            else:
                reply = {"type": "y", "id": message["id"], "payload": {"a": y.a, "b": y.b}}
                await ws.send_media(reply)


class Group(Messages):
    async def serve(self, ws: falcon.asgi.WebSocket) -> None:
        group.add(ws)
        try:
            await super().serve(ws)
        finally:
            group.discard(ws)


def create_app() -> Any:
    app = falcon.asgi.App()
    app.add_route("/ws", Messages())
    app.add_route("/group", Group())
    return app
