"""python-socketio's AsyncServer with its Redis client manager: a room of several processes."""

from __future__ import annotations

from typing import Any

import socketio

from benchmarks.peers import socketio_
from benchmarks.peers.socketio_ import WIRE

__all__ = ["LABEL", "PACKAGES", "WIRE", "create_app"]

LABEL = "python-socketio, AsyncRedisManager"
PACKAGES = (*socketio_.PACKAGES, "redis", "hiredis")


def create_app(url: str) -> Any:
    return socketio_.create_app(socketio.AsyncRedisManager(url))
