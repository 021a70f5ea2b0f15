"""chanx as in its README: pydantic messages, a consumer, and the in-memory channel layer.

A frame's type is called "action" there, and a reply carries the "ref" of its request. The README
adds the route to a FastAPI app, by a method that FastAPI no longer has; here it is a Starlette app.
"""

from __future__ import annotations

import abc
import json
import logging
from typing import Any, Literal

import structlog
from chanx.core.decorators import channel, ws_handler
from chanx.fast_channels.websocket import AsyncJsonWebsocketConsumer
from chanx.messages.base import BaseMessage
from fast_channels.layers import InMemoryChannelLayer, register_channel_layer
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from benchmarks.workload import TYPES, Wire

LABEL = "chanx"
PACKAGES = ("chanx", "fast-channels", "pydantic", "starlette")


class Chanx(Wire):
    """JSON with other keys."""

    def request(self, number: int, id: int) -> str:
        payload = '{"a":1,"b":"text","c":1.5}'
        return f'{{"action":"{TYPES[number]}","ref":"{id}","payload":{payload}}}'

    def reply(self, number: int, id: int) -> str:
        payload = '{"a":1,"b":"text"}'
        return f'{{"action":"y","payload":{payload},"version":1,"ref":"{id}"}}'

    def shout(self, count: int, text: str) -> str:
        payload = {"count": count, "text": text}
        return json.dumps({"action": "shout", "ref": "1", "payload": payload})

    def is_group_message(self, text: str) -> bool:
        return bool(json.loads(text).get("action") == "heard")


WIRE: Wire = Chanx()


class Work(BaseModel):
    a: int
    b: str
    c: float


class YPayload(BaseModel):
    a: int
    b: str


class ShoutPayload(BaseModel):
    count: int
    text: str


class HeardPayload(BaseModel):
    text: str


class Request(BaseMessage, abc.ABC):
    payload: Work


class T0(Request):
    action: Literal["t0"] = "t0"


class T1(Request):
    action: Literal["t1"] = "t1"


class T2(Request):
    action: Literal["t2"] = "t2"


class T3(Request):
    action: Literal["t3"] = "t3"


class T4(Request):
    action: Literal["t4"] = "t4"


class T5(Request):
    action: Literal["t5"] = "t5"


class T6(Request):
    action: Literal["t6"] = "t6"


class T7(Request):
    action: Literal["t7"] = "t7"


class T8(Request):
    action: Literal["t8"] = "t8"


class T9(Request):
    action: Literal["t9"] = "t9"


class Shout(BaseMessage):
    action: Literal["shout"] = "shout"
    payload: ShoutPayload


class Y(BaseMessage):
    action: Literal["y"] = "y"
    payload: YPayload


class Heard(BaseMessage):
    action: Literal["heard"] = "heard"
    payload: HeardPayload


async def work(payload: Work) -> Y:
    return Y(payload=YPayload(a=payload.a, b=payload.b))


@channel(name="work")
class Messages(AsyncJsonWebsocketConsumer):
    channel_layer_alias = "default"

    @ws_handler
    async def handle_t0(self, message: T0) -> Y:
        return await work(message.payload)

    @ws_handler
    async def handle_t1(self, message: T1) -> Y:
        return await work(message.payload)

    @ws_handler
    async def handle_t2(self, message: T2) -> Y:
        return await work(message.payload)

    @ws_handler
    async def handle_t3(self, message: T3) -> Y:
        return await work(message.payload)

    @ws_handler
    async def handle_t4(self, message: T4) -> Y:
        return await work(message.payload)

    @ws_handler
    async def handle_t5(self, message: T5) -> Y:
        return await work(message.payload)

    @ws_handler
    async def handle_t6(self, message: T6) -> Y:
        return await work(message.payload)

    @ws_handler
    async def handle_t7(self, message: T7) -> Y:
        return await work(message.payload)

    @ws_handler
    async def handle_t8(self, message: T8) -> Y:
        return await work(message.payload)

    @ws_handler
    async def handle_t9(self, message: T9) -> Y:
        return await work(message.payload)


@channel(name="group")
class Group(AsyncJsonWebsocketConsumer):
    channel_layer_alias = "default"
    groups = ["all"]  # noqa: RUF012 - as the README has it

    @ws_handler(output_type=Heard)
    async def handle_shout(self, message: Shout) -> Y:
        for _ in range(message.payload.count):
            await self.broadcast_message(Heard(payload=HeardPayload(text=message.payload.text)))
        return Y(payload=YPayload(a=message.payload.count, b="done"))


def create_app() -> Any:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    register_channel_layer("default", InMemoryChannelLayer())
    routes = [
        WebSocketRoute("/ws", Messages.as_asgi()),
        WebSocketRoute("/group", Group.as_asgi()),
    ]
    return Starlette(routes=routes)
