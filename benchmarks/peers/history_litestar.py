"""Litestar's channels, whose history in memory has a number of messages and no positions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

from litestar import Litestar, WebSocket, websocket_listener
from litestar.channels import ChannelsPlugin
from litestar.channels.backends.memory import MemoryChannelsBackend
from litestar.di import NamedDependency
from litestar.exceptions import WebSocketDisconnect

from benchmarks.peers import litestar_
from benchmarks.peers.litestar_ import LABEL, PACKAGES, WIRE

__all__ = ["FRAMES", "LABEL", "OTHERS", "PACKAGES", "WIRE", "create_app", "target"]

FRAMES: tuple[str, ...] = ()
OTHERS = 0


@asynccontextmanager
async def catch_up(
    socket: WebSocket[Any, Any, Any], channels: NamedDependency[ChannelsPlugin]
) -> AsyncGenerator[None, None]:
    await socket.accept()
    async with channels.start_subscription("all", history=100) as subscriber:
        with suppress(WebSocketDisconnect):
            async with subscriber.run_in_background(socket.send_text):
                yield


@websocket_listener("/history", connection_lifespan=catch_up)
async def history(data: str) -> None:
    pass


def target(heard: str) -> str:
    return "/history"


def create_app() -> Any:
    plugin = ChannelsPlugin(backend=MemoryChannelsBackend(history=100), channels=["all"])
    return Litestar([litestar_.group, history], plugins=[plugin])
