"""Bare ASGI that keeps 100 texts, and sends all of them to whoever comes back: the least there is.

There are no positions, no bound in bytes or seconds, and nobody is told what is missing.
"""

from __future__ import annotations

import collections
from collections.abc import MutableMapping
from typing import Any

from benchmarks.peers import bare
from benchmarks.peers.bare import LABEL, PACKAGES, WIRE

__all__ = ["FRAMES", "LABEL", "OTHERS", "PACKAGES", "WIRE", "create_app", "target"]

FRAMES: tuple[str, ...] = ()
OTHERS = 0
kept = collections.deque[MutableMapping[str, Any]](maxlen=100)


async def keep(event: MutableMapping[str, Any]) -> None:
    kept.append(event)


async def app(scope: MutableMapping[str, Any], receive: bare.Receive, send: bare.Send) -> None:
    async def send_kept(event: MutableMapping[str, Any]) -> None:
        await send(event)
        if event["type"] == "websocket.accept":
            for each in kept:
                await send(each)

    if scope.get("query_string"):
        await bare.app(scope, receive, send_kept)
    else:
        await bare.app(scope, receive, send)


def target(heard: str) -> str:
    return "/group?history=100"


def create_app() -> Any:
    bare.group.add(keep)
    return app
