"""Litestar's channels plugin with Redis pub/sub."""

from __future__ import annotations

from typing import Any

from litestar import Litestar
from litestar.channels import ChannelsPlugin
from litestar.channels.backends.redis import RedisChannelsPubSubBackend
from redis.asyncio import Redis

from benchmarks.peers import litestar_
from benchmarks.peers.litestar_ import WIRE

__all__ = ["LABEL", "PACKAGES", "WIRE", "create_app"]

LABEL = "Litestar, RedisChannelsPubSubBackend"
PACKAGES = (*litestar_.PACKAGES, "redis", "hiredis")


def create_app(url: str) -> Any:
    redis: Any = Redis.from_url(url)
    backend = RedisChannelsPubSubBackend(redis=redis)
    return Litestar([litestar_.group], plugins=[ChannelsPlugin(backend, channels=["all"])])
