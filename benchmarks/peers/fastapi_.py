"""FastAPI's WebSocket routes and connection manager; pydantic's discriminated union for the types.

Frames go straight from text to models and back, which pydantic's page on performance recommends.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from benchmarks.workload import WIRE

__all__ = ["LABEL", "PACKAGES", "WIRE", "create_app"]

LABEL = "FastAPI + pydantic"
PACKAGES = ("fastapi", "starlette", "pydantic", "pydantic-core")


class Work(BaseModel):
    a: int
    b: str
    c: float


class Y(BaseModel):
    a: int
    b: str


class ShoutPayload(BaseModel):
    count: int
    text: str


class HeardPayload(BaseModel):
    text: str


class Request(BaseModel):
    id: int
    payload: Work


class T0(Request):
    type: Literal["t0"]


class T1(Request):
    type: Literal["t1"]


class T2(Request):
    type: Literal["t2"]


class T3(Request):
    type: Literal["t3"]


class T4(Request):
    type: Literal["t4"]


class T5(Request):
    type: Literal["t5"]


class T6(Request):
    type: Literal["t6"]


class T7(Request):
    type: Literal["t7"]


class T8(Request):
    type: Literal["t8"]


class T9(Request):
    type: Literal["t9"]


class Shout(BaseModel):
    type: Literal["shout"]
    id: int
    payload: ShoutPayload


class Reply(BaseModel):
    type: Literal["y"] = "y"
    id: int
    payload: Y


class Heard(BaseModel):
    type: Literal["heard"] = "heard"
    payload: HeardPayload


class Error(BaseModel):
    type: Literal["error"] = "error"
    payload: str


Message = Annotated[
    T0 | T1 | T2 | T3 | T4 | T5 | T6 | T7 | T8 | T9 | Shout, Field(discriminator="type")
]
messages: TypeAdapter[Message] = TypeAdapter(Message)


class ConnectionManager:
    def __init__(self) -> None:
        self.active_connections: list[WebSocket] = []

    async def connect(self, websocket: WebSocket) -> None:
        await websocket.accept()
        self.active_connections.append(websocket)

    def disconnect(self, websocket: WebSocket) -> None:
        self.active_connections.remove(websocket)

    async def broadcast(self, message: str) -> None:
        for connection in self.active_connections:
            await connection.send_text(message)


manager = ConnectionManager()


async def work(payload: Work) -> Y:
    return Y(a=payload.a, b=payload.b)


async def shout(payload: ShoutPayload) -> Y:
    for _ in range(payload.count):
        heard = Heard(payload=HeardPayload(text=payload.text))
        await manager.broadcast(heard.model_dump_json())
    return Y(a=payload.count, b="done")


handlers: dict[type[BaseModel], Callable[[Any], Awaitable[Y]]] = {
    **dict.fromkeys((T0, T1, T2, T3, T4, T5, T6, T7, T8, T9), work),
    Shout: shout,
}


async def answer(text: str) -> Reply | Error:
    try:
        message = messages.validate_json(text)
    except ValidationError as error:
        return Error(payload=str(error))
    y = await handlers[type(message)](message.payload)
    return Reply(id=message.id, payload=y)


def create_app() -> Any:
    app = FastAPI()

    @app.websocket("/ws")
    async def plain(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            while True:
                reply = await answer(await websocket.receive_text())
                await websocket.send_text(reply.model_dump_json())
        except WebSocketDisconnect:
            pass

    @app.websocket("/group")
    async def group(websocket: WebSocket) -> None:
        await manager.connect(websocket)
        try:
            while True:
                reply = await answer(await websocket.receive_text())
                await websocket.send_text(reply.model_dump_json())
        except WebSocketDisconnect:
            manager.disconnect(websocket)

    return app
