"""What the soak test serves: an app that uses most of Pachinko, and what its process holds."""

from __future__ import annotations

import asyncio
import collections
import ctypes
import gc
import itertools
import logging
import os
import socket
import sys
import threading
import time
import warnings
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import date
from decimal import Decimal
from typing import Any

import falcon
import falcon.asgi
import psutil
import uvicorn
import uvloop

import pachinko
from benchmarks.processes import Pipe, allow_open_files, answer, explained
from benchmarks.server import BACKLOG, versions
from pachinko import Close, Connection, Envelope, MessageError, Pachinko, hub, message

FEED = "feed"  # a group; those who do not read it are too slow
FEED_SECONDS, FEED_TEXT = 0.05, "x" * 4096  # so that some seconds of it fill every buffer
OUTBOX = 32
RATE = (20, 1.0)
BIG = "x" * 300_000  # more than the buffers on the way to a client hold
SEND_BUFFER = 16_384  # of the system, for each connection; Linux makes it twice as much
GARBAGE_SECONDS = 5.0  # between full collections, see `Desk.tidy`
EXPECTED = (  # in the log; uvicorn writes the last one after a client that left its handshake
    "client is too slow", "[FALCON] HTTPError <HTTPForbidden",
    "ASGI callable returned without completing handshake",
)  # fmt: skip

# ── the app ───────────────────────────────────────────────────────────────────────────────────

app = falcon.asgi.App()
ws = Pachinko(app, "/ws/{name}")
feed = Pachinko(app, "/feed/{name}", outbox=OUTBOX, send_timeout=1.0)
lossy = Pachinko(app, "/lossy/{name}", outbox=OUTBOX, overflow="drop_oldest", send_timeout=60.0)
limited = Pachinko(app, "/limited/{name}", rate=RATE)
kept = Pachinko(app, "/kept/{room}", outbox=OUTBOX, overflow="replay")
hub.keep("kept-", messages=200, seconds=10.0)  # the rings of a run are over when it is looked at


class ProvokedError(Exception):
    """A bug that a client asks for."""


class Attendance:
    """Who has been let in and must be seen out, once."""

    def __init__(self) -> None:
        self.total = 0
        self.present: set[str] = set()
        self.wrong: list[str] = []

    async def arrive(self, conn: Connection) -> None:
        """Goes last: who comes through the connect handlers is let in."""
        self.total += 1
        self.present.add(conn.id)

    async def leave(self, conn: Connection) -> None:
        if conn.id not in self.present:
            self.wrong.append(f"a disconnect handler ran once more: {conn!r}, {conn.req.path}")
        elif conn.close_code is None:
            self.wrong.append(f"no close code at the end: {conn!r}, {conn.req.path}")
        self.present.discard(conn.id)


attendance = Attendance()
for endpoint in (ws, feed, lossy, limited):
    endpoint.disconnect(attendance.leave)


@message("welcome")
class Welcome:
    you: str


@message("place")
class Place:
    name: str
    at: tuple[int, int]
    tags: list[str]
    since: date | None = None


@message("placed")
class Placed:
    place: Place
    tags: int


@message("said")
class Said:
    who: str
    n: int
    text: str


@message("stored")
class Stored:
    size: int
    crc: int


@kept.connect
async def enter_kept(conn: Connection, room: str) -> None:
    await conn.join(room)


@kept.on("say")
async def say_kept(conn: Connection, *, sender: str, n: int, others: bool) -> None:
    room = next(iter(conn.groups))
    await hub.send(room, "said", {"sender": sender, "n": n}, exclude=conn if others else None)


@ws.connect
async def arrive(conn: Connection, name: str) -> None:
    how = conn.req.get_param("how")
    conn.user = name
    conn.context.room = None
    await asyncio.sleep(0.002)  # as for a look at a database; clients leave meanwhile
    if how == "refused":
        raise falcon.HTTPForbidden
    if how == "closed":
        raise Close(4401, "log in first")
    await conn.send(Welcome(conn.id))


@ws.disconnect
async def leave(conn: Connection) -> None:
    await move(conn, None)


@ws.on("sum")
@limited.on("sum")
@lossy.on("sum")
async def add(conn: Connection, *, a: int, b: int = 0) -> int:
    return a + b


@ws.on(Place)
async def place(conn: Connection, msg: Place) -> Placed:
    return Placed(msg, len(msg.tags))


@ws.on("price")
async def price(conn: Connection, *, each: Decimal, times: int = 1) -> Decimal:
    return each * times  # which is for cattrs


@ws.on("echo")
async def echo(conn: Connection, payload: Any) -> Any:
    return payload


@ws.on("later", concurrent=True)
async def later(conn: Connection, *, seconds: float) -> float:
    await asyncio.sleep(seconds)
    return seconds


@ws.on("count")
async def count(conn: Connection, *, to: int, pause: float = 0.0) -> AsyncIterator[int]:
    for n in range(to):
        yield n
        await asyncio.sleep(pause)


@ws.on("fail")
async def fail(conn: Connection, *, how: str) -> None:
    if how == "code":
        raise MessageError("off_board", "the board has 8 columns", columns=8)
    if how == "translated":
        raise KeyError(how)
    if how == "http":
        raise falcon.HTTPNotFound
    raise ProvokedError(how)


@ws.error(KeyError)
async def nothing_there(conn: Connection, exc: KeyError) -> MessageError:
    return MessageError("nothing_there", f"no {exc}")


@ws.on("bye")
async def bye(conn: Connection) -> None:
    raise Close(4000, "bye")


@ws.on("tell")
async def tell(conn: Connection, *, user: str, n: int) -> None:
    await hub.send_to_user(user, "told", {"user": user, "by": conn.id, "n": n})


@ws.binary
async def store(conn: Connection, data: bytes) -> Stored:
    return Stored(len(data), zlib.crc32(data))


@ws.on("enter")
async def enter(conn: Connection, room: str | None) -> None:
    await move(conn, room)


@ws.on("say")
async def say(conn: Connection, *, text: str) -> int:
    context = conn.context
    context.said += 1
    await hub.send(context.room, Said(conn.id, context.said, text))
    return int(context.said)


async def move(conn: Connection, room: str | None) -> None:
    """Into *room*. Those in a room can tell whether they have heard everything in it."""
    context = conn.context
    if context.room is not None:
        await hub.send(context.room, "left", {"who": conn.id, "said": context.said})
        await conn.leave(context.room)
    context.room, context.said = room, 0
    if room is not None:
        await conn.join(room)
        await hub.send(room, "joined", {"who": conn.id})


class Notes:
    async def on_connect(self, conn: Connection) -> None:
        conn.context.notes = []

    async def on_add(self, conn: Connection, *, text: str) -> list[str]:
        conn.context.notes = [*conn.context.notes[-9:], text]
        return list(conn.context.notes)


ws.add_resource("notes", Notes())


@feed.connect
@lossy.connect
@ws.on("subscribe")
async def subscribe(conn: Connection) -> None:
    await conn.join(FEED)


@feed.on("big")
async def big(conn: Connection) -> str:
    return BIG


@feed.disconnect
async def lose(conn: Connection) -> None:
    gone = {"who": conn.params["name"], "code": conn.close_code}
    await hub.send_to_user("supervisor", "gone", gone)


@limited.middleware
async def pass_on(
    conn: Connection, envelope: Envelope, call_next: Callable[[], Awaitable[Any]]
) -> Any:
    return await call_next()


@ws.worker
async def tick() -> None:
    for n in itertools.count():
        await hub.broadcast("tick", {"n": n})
        await asyncio.sleep(1)


@ws.worker
async def publish() -> None:
    for n in itertools.count():
        await hub.send(FEED, "feed", {"n": n, "text": FEED_TEXT})
        await asyncio.sleep(FEED_SECONDS)


for endpoint in (ws, feed, lossy, limited):
    endpoint.connect(attendance.arrive)

# ── its process ───────────────────────────────────────────────────────────────────────────────


class Log(logging.Handler):
    """Takes what is logged, and keeps what nobody has provoked."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.provoked = 0
        self.others: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        exc = record.exc_info[1] if record.exc_info else None
        if isinstance(exc, ProvokedError):
            self.provoked += 1
        elif not record.getMessage().startswith(EXPECTED) and len(self.others) < 20:
            self.others.append(f"{record.name}: {text}")


class Desk:
    """Answers what the driver asks about this process."""

    def __init__(self, listener: socket.socket, log: Log) -> None:
        self.listener = listener
        self.log = log
        self.process = psutil.Process()
        self.before: dict[str, int] = {}

    def about(self) -> dict[str, Any]:
        """Comes first, when the server is up and has had no client."""
        self.before = self.held()
        self.tidy()
        packages = ("falcon-pachinko", "falcon", "msgspec", "uvicorn", "uvloop", "websockets")
        return {"port": self.listener.getsockname()[1], "versions": versions(*packages)}

    def tidy(self) -> None:
        """Collect all garbage, again and again.

        Left alone, a full collection comes once a minute or less, and up to then uvicorn leaves
        10 KiB of cycles for each connection. Since the allocators keep much of what they have ever
        had in use, memory would tell by how many connections it has been delayed so far.
        """
        gc.collect()
        asyncio.get_running_loop().call_later(GARBAGE_SECONDS, self.tidy)

    def held(self) -> dict[str, int]:
        """How much there is of everything that goes with the clients."""
        gc.collect()
        classes: tuple[type, ...] = (
            pachinko.Connection, pachinko.Session, pachinko.Outgoing, pachinko.Incoming,
            pachinko.Outbox, pachinko.Waiting, pachinko.Stream, pachinko.Rate, pachinko.Cursor,
            falcon.asgi.WebSocket, falcon.asgi.Request,
        )  # fmt: skip
        counts = collections.Counter(map(type, gc.get_objects()))
        return {
            **self.counts(),
            "groups": len(hub.groups),
            "rows of the hub's connections": len(hub.state.registry.connections),
            "rows of the hub's groups": len(hub.state.registry.groups),
            "rows of the hub's users": len(hub.state.registry.users),
            "kept groups": len(hub.state.history.rings._rings) if hub.state.history else 0,
            "clients to be seen out": len(attendance.present),
            "threads": threading.active_count(),
            **{f"objects of {cls.__name__}": counts[cls] for cls in classes},
        }

    def counts(self) -> dict[str, int]:
        return {
            "connections": len(hub.connections),
            "tasks": len(asyncio.all_tasks()),
            "file descriptors": self.process.num_fds(),
        }

    def left(self) -> dict[str, int]:
        """What has not gone with the clients."""
        differences = {name: count - self.before[name] for name, count in self.held().items()}
        return {name: difference for name, difference in differences.items() if difference}

    def sample(self) -> dict[str, Any]:
        return {
            "at": time.monotonic(),
            "cpu": time.process_time(),
            "rss": self.process.memory_info().rss,
            "stats": hub.stats(),
            **self.counts(),
        }

    def memory(self) -> dict[str, int]:
        """Resident bytes, without garbage and what the allocator keeps; and blocks of Python's."""
        gc.collect()
        trim()
        return {"rss": self.process.memory_info().rss, "blocks": sys.getallocatedblocks()}

    def findings(self) -> dict[str, Any]:
        """What only this process can tell to be wrong; and how many came."""
        wrong = [*attendance.wrong[:20], *self.log.others]
        answered = hub.stats().get("errors.internal_error", 0)
        if self.log.provoked != answered:
            wrong.append(f"{answered} internal errors, of which {self.log.provoked} are logged")
        return {"wrong": wrong, "let in": attendance.total, "stats": hub.stats()}


def trim() -> None:
    """Give the system back what is free, where the C library can."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)


class Server(uvicorn.Server):
    """A uvicorn that answers questions, from when it is up."""

    def __init__(self, config: uvicorn.Config, pipe: Pipe, desk: Desk) -> None:
        super().__init__(config)
        self.pipe, self.desk = pipe, desk

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        await super().startup(list(sockets or ()))
        asyncio.get_running_loop().add_reader(self.pipe.fileno(), self.read)
        os.set_blocking(self.pipe.fileno(), True)  # uvloop has just turned that off

    def read(self) -> None:
        try:
            answer(self.pipe, self.desk)
        except (EOFError, OSError):
            os._exit(0)  # connections that are open would hold up anything gentler


def watch() -> Log:
    """Have all that Python complains about logged, and collect the log."""
    log = Log()
    logging.getLogger().addHandler(log)
    logging.captureWarnings(True)
    for category in (ResourceWarning, RuntimeWarning):  # what is not closed, or not awaited
        warnings.simplefilter("always", category)
    sys.unraisablehook = lambda hooked: logging.error(
        "ignored in %r", hooked.object, exc_info=hooked.exc_value
    )
    return log


def run(pipe: Pipe) -> None:
    """The child of the soak test."""
    with explained(pipe):
        allow_open_files()
        listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        # A slow client that leaves may still have to read a ping of uvicorn, which websockets would
        # answer. The system then resets the connection, and the answer to the close is lost.
        config = uvicorn.Config(
            app, backlog=BACKLOG, ws="websockets-sansio", ws_ping_interval=None, log_config=None,
            log_level="warning",
        )  # fmt: skip
        uvloop.run(Server(config, pipe, Desk(listener, watch())).serve(sockets=[listener]))
