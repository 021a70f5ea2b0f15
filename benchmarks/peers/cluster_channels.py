"""Django Channels with channels-redis: the core layer, or the one of Redis pub/sub."""

from __future__ import annotations

from typing import Any

import django
from channels.routing import ProtocolTypeRouter, URLRouter
from django.conf import settings
from django.urls import path

from benchmarks.peers import channels_
from benchmarks.peers.channels_ import WIRE

__all__ = ["LABEL", "PACKAGES", "WIRE", "create_app"]

LABEL = "Django Channels"
PACKAGES = (*channels_.PACKAGES, "channels-redis", "redis", "hiredis")


def create_app(url: str, layer: str) -> Any:
    backend = {"BACKEND": f"channels_redis.{layer}", "CONFIG": {"hosts": [url]}}
    settings.configure(INSTALLED_APPS=["channels"], CHANNEL_LAYERS={"default": backend})
    django.setup()
    routes = [path("group", channels_.Group.as_asgi())]
    return ProtocolTypeRouter({"websocket": URLRouter(routes)})
