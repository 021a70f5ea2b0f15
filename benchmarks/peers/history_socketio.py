"""python-socketio, by hand: a client that comes back asks for the 100 events that are kept.

Its server for Python has no connection state recovery, which that for Node.js has.
"""

from __future__ import annotations

import collections
from typing import Any

from benchmarks.peers import socketio_
from benchmarks.peers.socketio_ import PACKAGES, WIRE

__all__ = ["FRAMES", "LABEL", "OTHERS", "PACKAGES", "WIRE", "create_app", "target"]

LABEL = "python-socketio, by hand"
FRAMES = ("40", '42["history"]')
OTHERS = 2  # what opens the connection of Engine.IO, and that of Socket.IO


def target(heard: str) -> str:
    return WIRE.group_path


def create_app() -> Any:
    app = socketio_.create_app()
    sio, emit = app.engineio_server, app.engineio_server.emit
    kept = collections.deque[Any](maxlen=100)

    async def keep(event: str, data: Any = None, **options: Any) -> None:
        kept.append(data)
        await emit(event, data, **options)

    async def history(sid: str) -> None:
        for data in tuple(kept):
            await emit("heard", data, to=sid)

    sio.emit = keep
    sio.on("history", history)
    return app
