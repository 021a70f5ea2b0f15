"""Django Channels' AsyncJsonWebsocketConsumer, a table of handlers, the in-memory channel layer.

Channels has no payload types, so the payloads are checked by hand.
"""

from __future__ import annotations

from typing import Any

import django
from channels.generic.websocket import AsyncJsonWebsocketConsumer
from channels.layers import get_channel_layer
from channels.routing import ProtocolTypeRouter, URLRouter
from django.conf import settings
from django.urls import path

from benchmarks.peers.plain import Handler, Shout, Y, answer, work
from benchmarks.workload import TYPES, WIRE

__all__ = ["LABEL", "PACKAGES", "WIRE", "create_app"]

LABEL = "Django Channels"
PACKAGES = ("channels", "Django", "asgiref")


async def shout(data: Any) -> Y:
    payload = Shout.parse(data)
    layer = get_channel_layer()
    for _ in range(payload.count):
        await layer.group_send("all", {"type": "heard", "text": payload.text})
    return Y(payload.count, "done")


handlers: dict[str, Handler] = {**dict.fromkeys(TYPES, work), "shout": shout}


class Messages(AsyncJsonWebsocketConsumer):
    async def receive_json(self, content: Any, **kwargs: Any) -> None:
        await self.send_json(await answer(handlers, content))


class Group(Messages):
    groups = ["all"]  # noqa: RUF012 - as the documentation has it

    async def heard(self, event: dict[str, Any]) -> None:
        await self.send_json({"type": "heard", "payload": {"text": event["text"]}})


def create_app() -> Any:
    if not settings.configured:
        layer = {"BACKEND": "channels.layers.InMemoryChannelLayer"}
        settings.configure(INSTALLED_APPS=["channels"], CHANNEL_LAYERS={"default": layer})
        django.setup()
    routes = [path("ws", Messages.as_asgi()), path("group", Group.as_asgi())]
    return ProtocolTypeRouter({"websocket": URLRouter(routes)})
