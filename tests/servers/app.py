"""What every server serves: a handler for each thing that a server could spoil."""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import falcon
import falcon.asgi

from pachinko import Close, Connection, MessageError, Pachinko, hub, message

MAX_SIZE = 2000
LINGER = 1.0
CONNECT_TIMEOUT = 4.0

api = falcon.asgi.App()
ws = Pachinko(
    api,
    "/ws/{room}",
    subprotocols=["chat.v2", "chat.v1"],
    max_size=MAX_SIZE,
    linger=LINGER,
    connect_timeout=CONNECT_TIMEOUT,
    max_concurrent=2,
)
uploads = Pachinko(api, "/uploads", max_size=32 * 2**20)
released: dict[str, asyncio.Event] = {}
beats = 0


def log(event: str, room: str | None = None, **details: Any) -> None:
    """Append a line to the file that the tests read, also after the server has ended."""
    with open(os.environ["PACHINKO_TEST_LOG"], "a") as file:
        file.write(json.dumps({"event": event, "room": room, **details}) + "\n")


def group_of(conn: Connection) -> str:
    return f"room:{conn.params['room']}"


class Alive:
    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        resp.media = {"alive": True}


api.add_route("/alive", Alive())


@message("say")
class Say:
    text: str


@message("said")
class Said:
    who: str
    text: str


@message("received")
class Received:
    size: int


class Chunk(bytes):
    """A subclass, as an application may have."""


@ws.worker
async def clock() -> None:
    global beats  # noqa: PLW0603 - a worker's count
    log("worker started")
    try:
        while True:
            await asyncio.sleep(0.01)
            beats += 1
    finally:
        log("worker ended")


@ws.connect
async def arrive(conn: Connection, room: str) -> None:
    log("connect", room)
    match conn.req.get_param("refuse"):
        case "http":
            raise falcon.HTTPForbidden(description="not you")
        case "bug":
            raise RuntimeError("a secret")
        case "close":
            raise Close(4403, "not you")
        case "limit":
            conn.add_header("X-Added", "1")
            raise falcon.HTTPTooManyRequests(description="not now", retry_after=7)
        case "hang":
            log("hangs", room)
            try:
                await asyncio.Event().wait()
            finally:
                log("hang ends", room)
    if conn.req.get_param("slow"):
        await asyncio.sleep(0.1)  # reads ahead
    if conn.req.get_param("cookies"):
        conn.add_header("Set-Cookie", "a=1")
        conn.add_header("Set-Cookie", "b=2")
        conn.add_header("X-Added", "1")
    released.setdefault(room, asyncio.Event())
    await hub.join(f"room:{room}", conn)
    await conn.send("welcome", {"room": room, "id": conn.id})


@ws.disconnect
async def leave(conn: Connection) -> None:
    await asyncio.sleep(0.02)  # as a database takes
    log("disconnect", conn.params["room"], code=conn.close_code, groups=sorted(conn.groups))


@ws.on("echo")
async def echo(conn: Connection, payload: Any) -> Any:
    return payload


@ws.on("nothing")
async def nothing(conn: Connection) -> None:
    pass


@ws.on("sum")
async def add(conn: Connection, *, a: int, b: int = 0) -> int:
    return a + b


@ws.on("whisper")
async def whisper(conn: Connection, msg: Say) -> Said:
    return Said(conn.id, msg.text)


@ws.on(Say)
async def say(conn: Connection, msg: Say) -> str:
    await hub.send(group_of(conn), Said(conn.id, msg.text))
    return "sent"


@ws.on("say_others")
async def say_others(conn: Connection, *, text: str) -> None:
    await hub.send(group_of(conn), Said(conn.id, text), exclude=conn)


@ws.on("shout")
async def shout(conn: Connection, *, text: str, others: bool = False) -> None:
    await hub.broadcast("shouted", {"text": text}, exclude=conn if others else None)


@ws.on("close_group")
async def close_group(conn: Connection) -> None:
    await hub.close_group(group_of(conn), 4007, "the room is closed")


@ws.on("fail")
async def fail(conn: Connection, *, how: str) -> None:
    match how:
        case "http":
            raise falcon.HTTPForbidden(title="No", description="not you")
        case "own":
            raise MessageError("not_your_turn", "wait")
        case "close":
            raise Close(4002, "enough")
        case "late close":
            await asyncio.sleep(0.02)
            raise Close(4002, "enough")
        case _:
            raise RuntimeError("a secret")


@ws.on("close_me")
async def close_me(conn: Connection) -> None:
    await conn.send("last")
    await conn.close(4003, "as you wish")


@ws.on("wait", concurrent=True)
async def wait(conn: Connection) -> str:
    await released[conn.params["room"]].wait()
    return "released"


@ws.on("release")
async def release(conn: Connection) -> None:
    released[conn.params["room"]].set()


@ws.on("nap")
async def nap(conn: Connection, *, seconds: float) -> None:
    room = conn.params["room"]
    log("nap begins", room)
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        log("nap is cancelled", room)
        raise
    log("nap ends", room)


@ws.on("count")
async def count(conn: Connection, *, to: int) -> AsyncIterator[int]:
    for number in range(to):
        yield number


@ws.on("ticks")
async def ticks(conn: Connection, *, pause: float = 0.0) -> AsyncIterator[int]:
    """A stream without an end; without *pause* it never waits by itself."""
    number = 0
    try:
        while True:
            yield number
            number += 1
            if pause:
                await asyncio.sleep(pause)
    finally:
        log("stream closed", conn.params["room"])


@ws.on("bytes")
async def send_bytes(conn: Connection, *, size: int) -> None:
    """Send *size* bytes, of each kind and by each call, with a text in between."""
    data = bytes(number % 256 for number in range(size))
    await conn.send(data)
    await hub.send(group_of(conn), "between")
    await hub.send(group_of(conn), Chunk(data))
    await hub.send_to(conn, bytearray(data))
    await conn.send(memoryview(data)[::-1])


@ws.on("drop")
async def drop(conn: Connection, *, number: int, size: int) -> None:
    await hub.send(group_of(conn), "drop", {"number": number, "text": "x" * size})


@ws.on("drop_to_me")
async def drop_to_me(conn: Connection, *, number: int, size: int) -> None:
    await hub.send_to(conn, "drop", {"number": number, "text": "x" * size})


@ws.on("beats")
async def get_beats(conn: Connection) -> int:
    return beats


@uploads.binary
async def upload(conn: Connection, data: bytes) -> Received:
    return Received(len(data))


sending: contextvars.ContextVar[str] = contextvars.ContextVar("sending")


async def app(scope: Any, receive: Any, send: Any) -> None:
    """The app; in some rooms with a ``send`` as other people's ASGI middleware wraps it."""

    async def timed(event: Any) -> None:
        async with asyncio.timeout(30):
            await send(event)

    async def traced(event: Any) -> None:
        token = sending.set(event["type"])
        try:
            await send(event)
        finally:
            sending.reset(token)  # ValueError in another context than it was set in

    path = scope.get("path", "")
    wrapped = timed if "/timeout-" in path else traced if "/contextvar-" in path else send
    await api(scope, receive, wrapped)
