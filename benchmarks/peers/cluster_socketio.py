"""python-socketio's AsyncServer with its Redis client manager: a room of several processes."""

from __future__ import annotations

from typing import Any

import socketio

from benchmarks.peers import socketio_
from benchmarks.peers.plain import Shout
from benchmarks.peers.socketio_ import WIRE

__all__ = ["LABEL", "PACKAGES", "WIRE", "create_app"]

LABEL = "python-socketio, AsyncRedisManager"
PACKAGES = (*socketio_.PACKAGES, "redis", "hiredis")


def create_app(url: str) -> Any:
    manager = socketio.AsyncRedisManager(url)
    sio = socketio.AsyncServer(async_mode="asgi", ping_interval=3600, client_manager=manager)

    @sio.event
    async def connect(sid: str, environ: dict[str, Any]) -> None:
        await sio.enter_room(sid, "all")

    @sio.event
    async def shout(sid: str, data: Any) -> dict[str, Any]:
        payload = Shout.parse(data)
        for _ in range(payload.count):
            await sio.emit("heard", {"text": payload.text}, room="all")
        return {"a": payload.count, "b": "done"}

    return socketio.ASGIApp(sio)
