"""The websockets library's asyncio server, its broadcast(), and a table of handlers.

It has no payload types, so the payloads are checked by hand. Compression and pings, which it has by
default, are off, as they are for the others.
"""

from __future__ import annotations

import json
import socket
from typing import Any

from websockets.asyncio.server import ServerConnection, broadcast
from websockets.asyncio.server import serve as start

from benchmarks.peers.plain import Handler, Shout, Y, answer, work
from benchmarks.workload import TYPES, WIRE

__all__ = ["LABEL", "PACKAGES", "WIRE", "serve"]

LABEL = "websockets, its own server"
PACKAGES = ("websockets",)

group: set[ServerConnection] = set()


async def shout(data: Any) -> Y:
    payload = Shout.parse(data)
    for _ in range(payload.count):
        broadcast(group, json.dumps({"type": "heard", "payload": {"text": payload.text}}))
    return Y(payload.count, "done")


handlers: dict[str, Handler] = {**dict.fromkeys(TYPES, work), "shout": shout}


async def handler(websocket: ServerConnection) -> None:
    if websocket.request is not None and websocket.request.path == "/group":
        group.add(websocket)
    try:
        async for text in websocket:
            await websocket.send(json.dumps(await answer(handlers, json.loads(text))))
    finally:
        group.discard(websocket)


async def serve(sock: socket.socket) -> None:
    async with start(handler, sock=sock, compression=None, ping_interval=None) as server:
        await server.serve_forever()
