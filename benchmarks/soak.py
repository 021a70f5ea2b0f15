"""A soak test: hundreds of clients come and go for minutes, and at the end nothing is left of them.

A server of its own process (`benchmarks.soak_app`) has churning clients that use most of Pachinko
and leave in every way, some that do not read, and one that floods. Each checks all that it hears.
When all have left, the server's connections, groups, tasks, threads and file descriptors must be as
before the first client, and its memory as after the warm-up.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import base64
import collections
import contextlib
import dataclasses
import datetime
import faulthandler
import functools
import itertools
import json
import os
import platform
import random
import socket
import statistics
import sys
import time
import traceback
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import uvloop
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from benchmarks import soak_app
from benchmarks.load import masked
from benchmarks.processes import Child, ChildFailed, allow_open_files, text_of

sys.path.append(str(Path(__file__).parents[1] / "tests" / "reliability"))

from following import (  # type: ignore[import-not-found]  # mypy does not know the path
    Follower,
    Published,
    Send,
    query_of,
)

MIB = 1024 * 1024
GROWTH = 2 * MIB  # that is taken for noise
WARM_UP = 180.0  # seconds; or a quarter of the time, if that is less
SAMPLES = 30  # of which each is printed
PATIENCE = 30.0  # seconds for what takes milliseconds, on a slow and noisy machine
ROOM_SECONDS = 5.0  # then all new rooms have new names
ROOM_SIZE = 20
RECEIVE_BUFFER = 4096  # bytes that the system keeps for a client that stalls
FAILURES = 50  # then the load ends, since more would tell nothing new

Frame = dict[str, Any]

# ── what is found out ─────────────────────────────────────────────────────────────────────────


class Findings:
    """Counts, latencies and failures of all clients."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.failures: dict[str, list[str]] = {}  # what is told of each, by kind
        self.latencies = array.array("d")  # seconds from a request to its reply
        self.reported = 0  # of them, in samples

    def fail(self, what: str, detail: object = "") -> None:
        self.failures.setdefault(what, []).append(str(detail)[:600])

    @property
    def is_hopeless(self) -> bool:
        return sum(map(len, self.failures.values())) > FAILURES

    def recent_latencies(self) -> Sequence[float]:
        """Those since the last call."""
        recent = self.latencies[self.reported :]
        self.reported = len(self.latencies)
        return recent


def milliseconds(latencies: Sequence[float]) -> tuple[float, float]:
    """The median, and what one in a hundred is longer than."""
    if len(latencies) < 2:
        return 0.0, 0.0
    percentiles = statistics.quantiles(latencies, n=100)
    return round(percentiles[49] * 1000, 1), round(percentiles[98] * 1000, 1)


class Gate:
    """Open while there is load. Clients wait here, for time to pass or for something to happen."""

    def __init__(self) -> None:
        self._closed = asyncio.Event()
        self._news = asyncio.Event()

    @property
    def is_open(self) -> bool:
        return not self._closed.is_set()

    def open(self) -> None:
        self._closed.clear()

    def close(self) -> None:
        self._closed.set()
        self.tell()

    def tell(self) -> None:
        """Something has changed that somebody may wait for."""
        self._news.set()
        self._news.clear()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for *condition*, or for the end of the load."""
        while self.is_open and not condition():
            await self._news.wait()

    async def pause(self, shortest: float, longest: float) -> bool:
        """Let some time pass; return whether there is still load."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(random.uniform(shortest, longest)):
                await self._closed.wait()
        return self.is_open


# ── a client ──────────────────────────────────────────────────────────────────────────────────


class Client:
    """One connection, and the rules for what comes on it."""

    def __init__(self, soak: Soak, socket: ClientConnection, name: str, lossy: bool) -> None:
        self.soak, self.socket, self.name, self.is_lossy = soak, socket, name, lossy
        self.findings = soak.findings
        self.ids = itertools.count(1)
        self.waiting: dict[int | str, asyncio.Future[Frame]] = {}
        self.in_order: collections.deque[int | str] = collections.deque()  # of waiting ones
        self.unnamed: collections.deque[asyncio.Future[Frame]] = collections.deque()
        self.items: dict[int | str, asyncio.Queue[int]] = collections.defaultdict(asyncio.Queue)
        self.you = ""  # as the server calls this connection
        self.rooms: dict[str, dict[str, int]] = {}  # how much has been heard of each in them
        self.room: str | None = None
        self.said = 0
        self.told = 0
        self.last: dict[str, int] = {}  # number of the last tick and feed
        self.jumped: set[str | None] = set()  # groups of which some is lost, as no gap has told yet
        # Groups of which a gap has told; true if that is to be seen in the next message to them.
        self.told_of: dict[str | None, bool] = {}
        self.reader = asyncio.create_task(self.read())

    # Asking

    async def start(
        self, type: str, payload: Any = None, in_order: bool = True
    ) -> tuple[int | str, asyncio.Future[Frame]]:
        """Send a request; return its id, and the answer to come."""
        number = next(self.ids)
        id = number if number % 4 else f"id {number}"
        answer = self.waiting[id] = asyncio.get_running_loop().create_future()
        if in_order:
            self.in_order.append(id)
        frame = {"type": type, "id": id}
        await self.socket.send(
            json.dumps(frame if payload is None else {**frame, "payload": payload})
        )
        return id, answer

    async def wait(self, answer: Awaitable[Frame]) -> Frame:
        async with asyncio.timeout(PATIENCE):
            return await answer

    async def ask(self, type: str, payload: Any = None) -> Frame:
        """One request and its answer, without the id."""
        begun = time.perf_counter()
        _, answer = await self.start(type, payload)
        frame = await self.wait(answer)
        self.findings.latencies.append(time.perf_counter() - begun)
        return {key: value for key, value in frame.items() if key != "id"}

    async def expect(self, type: str, payload: Any, reply: Any, as_type: str = "") -> None:
        """Ask for something of which the answer is known."""
        expected = {"type": as_type or f"{type}.reply"}
        if reply is not None:
            expected["payload"] = reply
        self.check(await self.ask(type, payload), expected)

    async def refused(self, type: str, payload: Any, code: str) -> None:
        """Ask for something that is answered with an error."""
        frame = await self.ask(type, payload)
        self.check((frame["type"], frame.get("payload", {}).get("code")), ("error", code))

    async def send_raw(self, data: str | bytes) -> Frame:
        """Send what has no id; the answer to it."""
        answer: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self.unnamed.append(answer)
        await self.socket.send(data)
        return await self.wait(answer)

    def check(self, got: object, expected: object) -> None:
        if got != expected:
            self.fail("an answer is wrong", f"{got!r} instead of {expected!r}")

    def fail(self, what: str, detail: object = "") -> None:
        self.findings.fail(what, f"{self.name} {self.you}: {detail}")

    # Hearing

    async def read(self) -> None:
        """Take what comes until the end; then nobody waits for answers any more."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                data = await self.socket.recv()
                try:
                    self.take(json.loads(data))
                except Exception as exc:  # of whatever form it is, it is not as it should be
                    self.fail(f"a frame is not understood, {exc!r}", data)
        for answer in (*self.waiting.values(), *self.unnamed):
            if not answer.done():
                answer.set_exception(ConnectionError(f"closed with {self.socket.close_code}"))
                answer.exception()  # which some do not want to know

    def take(self, frame: Frame) -> None:
        type, id = frame["type"], frame.get("id")
        if id is not None:
            self.answered(id, frame)
        elif type in self.IN_ROOMS:
            self.heard_in_room(frame)
        elif type in self.HEARD:
            self.HEARD[type](self, frame["payload"])
        elif self.unnamed:
            self.unnamed.popleft().set_result(frame)
        else:
            self.fail("nobody waits for a message", frame)

    def answered(self, id: int | str, frame: Frame) -> None:
        answer = self.waiting.get(id)
        if answer is None:
            self.fail("an answer comes to no request, or a second one", frame)
        elif frame.get("more"):
            self.items[id].put_nowait(frame["payload"])
        else:
            del self.waiting[id]
            if id in self.in_order:
                if self.in_order[0] != id:
                    self.fail("answers are not in the order of the requests", frame)
                self.in_order.remove(id)
            answer.set_result(frame)
            self.findings.counts["answers"] += 1

    def on_welcome(self, payload: Any) -> None:
        self.you = payload["you"]

    def on_tick(self, payload: Any) -> None:
        self.follow("tick", payload["n"], None)

    def on_feed(self, payload: Any) -> None:
        self.follow("feed", payload["n"], soak_app.FEED)
        self.soak.gate.tell()

    def follow(self, what: str, n: int, group: str | None) -> None:
        """The next of a series: none may be missing, unless a gap will tell."""
        last = self.last.get(what)
        is_owed = self.told_of.pop(group, None)
        if last is None:
            pass  # What came before the first one may have been lost.
        elif n == last + 1:
            if is_owed:
                self.fail("there is a gap where nothing is lost", f"{what} {n}")
        elif not self.is_lossy or n <= last:
            self.fail(f"a {what} is lost, or not in order", f"{n} after {last}")
        elif is_owed is None:
            self.jumped.add(group)
        self.last[what] = n
        self.findings.counts[f"{what} messages"] += 1

    def on_gap(self, payload: Any) -> None:
        """Gaps come behind what has waited: some has been missed already, or comes no more."""
        group = payload["group"]
        if not self.is_lossy or group not in (None, soak_app.FEED):
            self.fail("there is a gap where nothing is lost", payload)
        self.told_of[group] = group not in self.jumped
        self.jumped.discard(group)
        self.findings.counts["gaps"] += 1
        self.soak.gate.tell()

    def heard_in_room(self, frame: Frame) -> None:
        who, members = frame["payload"]["who"], self.rooms.get(frame["group"])
        if members is None:
            self.fail("it hears a group that it is not in", frame)
        else:
            self.IN_ROOMS[frame["type"]](self, frame["payload"], members, who)

    def on_joined(self, payload: Any, members: dict[str, int], who: str) -> None:
        if who in members:
            self.fail("somebody joins who is there already", payload)
        members[who] = 0

    def on_said(self, payload: Any, members: dict[str, int], who: str) -> None:
        n = payload["n"]  # of those who were there before, the first one may be any
        if n != members.get(who, n - 1) + 1:
            self.fail("a group message is lost, or not in order", f"{members[who]} {payload}")
        members[who] = n
        self.findings.counts["group messages"] += 1

    def on_left(self, payload: Any, members: dict[str, int], who: str) -> None:
        if members.pop(who, payload["said"]) != payload["said"]:
            self.fail("the last group messages of one who left are lost", payload)

    def on_told(self, payload: Any) -> None:
        if payload["user"] != self.name:
            self.fail("it came to another user", payload)
        if payload["by"] == self.you:
            self.told = payload["n"]

    def on_gone(self, payload: Any) -> None:
        self.soak.gone[payload["who"]] = payload["code"]
        self.soak.gate.tell()

    HEARD: dict[str, Callable[[Client, Any], None]] = {  # noqa: RUF012 - nobody changes it
        "welcome": on_welcome, "tick": on_tick, "feed": on_feed, "gap": on_gap, "told": on_told,
        "gone": on_gone,
    }  # fmt: skip
    IN_ROOMS: dict[str, Callable[[Client, Any, dict[str, int], str], None]] = {  # noqa: RUF012 - the same
        "joined": on_joined, "said": on_said, "left": on_left,
    }  # fmt: skip

    # Leaving

    async def ended(self, *codes: int) -> int | None:
        """Wait until it is over, with one of *codes*."""
        async with asyncio.timeout(PATIENCE):
            await self.reader
            await self.socket.wait_closed()
        if codes and self.socket.close_code not in codes:
            exc = self.socket.close_exc  # It tells who has closed, and how.
            what = f"{self.socket.close_code}, not one of {codes}"
            self.fail("the close code is wrong", f"{what}: {exc!r} from {exc.__cause__!r}")
        return self.socket.close_code

    def abort(self) -> None:
        self.socket.transport.abort()


# ── what churning clients do ──────────────────────────────────────────────────────────────────


async def add(client: Client) -> None:
    a, b = random.randrange(1000), random.randrange(1000)
    await client.expect("sum", {"a": a, "b": b}, a + b)


async def add_at_once(client: Client) -> None:
    """Several requests on their way; the answers keep their order."""
    answers = [(n, await client.start("sum", {"a": n, "b": 1})) for n in range(5)]
    for n, (id, answer) in answers:
        reply = {"type": "sum.reply", "id": id, "payload": n + 1}
        client.check(await client.wait(answer), reply)


async def place(client: Client) -> None:
    tags = [f"tag {n}" for n in range(random.randrange(4))]
    day = random.choice([None, "2026-02-28"])
    place = {"name": "Zürich", "at": [47, 8], "tags": tags, "since": day}
    await client.expect("place", place, {"place": place, "tags": len(tags)}, "placed")


async def price(client: Client) -> None:
    await client.expect("price", {"each": "1.25", "times": 3}, "3.75")


async def echo(client: Client) -> None:
    value = [{"text": "é" * random.randrange(2000), "n": n} for n in range(random.randrange(5))]
    await client.expect("echo", value, value)


async def note(client: Client) -> None:
    reply = await client.ask("notes.add", {"text": client.name})
    client.check((reply["type"], reply["payload"][-1]), ("notes.add.reply", client.name))


async def upload(client: Client) -> None:
    data = os.urandom(random.choice([0, 10, 5000]))
    answer = {"type": "stored", "payload": {"size": len(data), "crc": zlib.crc32(data)}}
    client.check(await client.send_raw(data), answer)


async def enter(client: Client) -> None:
    """Go from one room to another, or out."""
    room = random.choice([client.soak.some_room(), client.soak.some_room(), None])
    if room is not None:
        client.rooms.setdefault(room, {})
    await client.expect("enter", room, None)
    client.rooms = {} if room is None else {room: client.rooms[room]}
    client.room, client.said = room, 0
    if room is not None:  # what it hears of itself comes before the reply
        client.check(client.rooms[room].get(client.you), 0)


async def say(client: Client) -> None:
    """Say something in the room: those in it hear it, and the speaker before the reply."""
    if client.room is None:
        await enter(client)
    if client.room is not None:
        client.said += 1
        await client.expect("say", {"text": "hello " * 10}, client.said)
        client.check(client.rooms[client.room].get(client.you), client.said)


async def tell(client: Client) -> None:
    """To all connections of a user, who may be oneself; then it is there before the reply."""
    n = random.randrange(1, 1_000_000)
    user = random.choice([client.name, client.soak.some_name()])
    await client.expect("tell", {"user": user, "n": n}, None)
    if user == client.name:
        client.check(client.told, n)


async def wait_beside(client: Client) -> None:
    """A concurrent handler takes its time, and is no hindrance to another request."""
    id, later = await client.start("later", {"seconds": 0.2}, in_order=False)
    await add(client)
    client.check(await client.wait(later), {"type": "later.reply", "id": id, "payload": 0.2})


async def count(client: Client) -> None:
    """A stream to its end."""
    id, end = await stream(client, to=20)
    client.check(await client.wait(end), {"type": "complete", "id": id})
    client.check(items_of(client, id), list(range(20)))


async def stop_counting(client: Client) -> None:
    """A stream that the client stops after its third item."""
    id, end = await stream(client, to=1_000_000, pause=0.01)
    async with asyncio.timeout(PATIENCE):
        first = [await client.items[id].get() for _ in range(3)]
    await client.socket.send(json.dumps({"type": "complete", "id": id}))
    client.check(await client.wait(end), {"type": "complete", "id": id})
    items = first + items_of(client, id)
    client.check(items, list(range(len(items))))
    client.findings.counts["streams stopped"] += 1


async def stream(client: Client, **payload: Any) -> tuple[int | str, asyncio.Future[Frame]]:
    return await client.start("count", payload, in_order=False)


def items_of(client: Client, id: int | str) -> list[int]:
    """All that have come, of a stream that is over."""
    items = client.items.pop(id)
    return [items.get_nowait() for _ in range(items.qsize())]


async def err(client: Client) -> None:
    """Make a mistake, or find one in the server."""
    requests: list[tuple[str, Any, str]] = [
        ("no such type", {}, "unknown_type"),
        ("sum", {"a": "1"}, "invalid_payload"),
        ("place", {"name": "here", "at": [1], "tags": [None]}, "invalid_payload"),
        ("fail", {"how": "code"}, "off_board"),
        ("fail", {"how": "translated"}, "nothing_there"),
        ("fail", {"how": "http"}, "http_404"),
        ("fail", {"how": "bug"}, "internal_error"),
        ("count", {"to": None}, "invalid_payload"),
    ]
    await client.refused(*random.choice(requests))


async def talk_nonsense(client: Client) -> None:
    text, code = random.choice([("{", "invalid_json"), ("[1]", "invalid_envelope")])
    frame = await client.send_raw(text)
    client.check((frame["type"], frame.get("payload", {}).get("code")), ("error", code))


async def subscribe(client: Client) -> None:
    """Hear the group that stalled clients are in. It is for a few."""
    if random.random() < 0.2:
        await client.expect("subscribe", None, None)


ACTIONS: dict[Callable[[Client], Awaitable[None]], int] = {
    add: 20, add_at_once: 5, place: 10, price: 5, echo: 5, note: 5, upload: 5, enter: 5, say: 25,
    tell: 8, wait_beside: 5, count: 4, stop_counting: 4, err: 8, talk_nonsense: 3, subscribe: 3,
}  # fmt: skip


# How they leave


async def close(client: Client) -> None:
    code = random.choice((1000, 1001, 4001))
    await client.socket.close(code, "bye")
    await client.ended(code)


async def abort(client: Client) -> None:
    client.abort()
    await client.ended()


async def be_closed(client: Client) -> None:
    await client.start("bye")
    await client.ended(4000)


async def leave_a_stream(client: Client) -> None:
    id, _ = await stream(client, to=1_000_000, pause=0.01)
    async with asyncio.timeout(PATIENCE):
        await client.items[id].get()
    await random.choice((close, abort))(client)


async def leave_requests(client: Client) -> None:
    """Go without waiting for answers."""
    await client.start("later", {"seconds": 0.3}, in_order=False)
    for n in range(5):
        await client.start("sum", {"a": n})
    await random.choice((close, abort))(client)


async def break_off(client: Client) -> None:
    """The end comes in the middle of a frame."""
    frame = masked(json.dumps({"type": "echo", "id": 0, "payload": "x" * 1000}))
    client.socket.transport.write(frame[: random.randrange(1, len(frame))])
    random.choice((client.socket.transport.close, client.abort))()
    await client.ended()


async def hang_up(client: Client) -> None:
    """Only this direction of the socket is closed; the server closes the other."""
    client.socket.transport.write_eof()
    await client.ended()


WAYS_OUT: dict[Callable[[Client], Awaitable[None]], int] = {
    close: 6, abort: 4, be_closed: 2, leave_a_stream: 3, leave_requests: 2, break_off: 3,
    hang_up: 1,
}  # fmt: skip


# ── the clients ───────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Options:
    seconds: float
    connections: int
    stalled: int
    flooding: int
    returning: int


class Soak:
    """All clients, and what they have in common."""

    def __init__(self, options: Options, child: Child, port: int) -> None:
        self.options, self.child, self.port = options, child, port
        self.findings = Findings()
        self.samples: list[dict[str, Any]] = []
        self.gate = Gate()
        self.gone: dict[str, int] = {}  # the close codes of clients that stalled, by name
        self.begun = time.monotonic()

    async def ask(self, do: str) -> Any:
        """Of the server's process."""
        return await asyncio.to_thread(self.child.ask, do, timeout=PATIENCE)

    def some_name(self) -> str:
        return f"churner-{random.randrange(self.options.connections)}"

    def some_room(self) -> str:
        """One of a few at a time, of which the names are ever new."""
        time_of_names = int((time.monotonic() - self.begun) / ROOM_SECONDS)
        return f"room-{time_of_names}-{random.randrange(1 + self.options.connections // ROOM_SIZE)}"

    @contextlib.asynccontextmanager
    async def connected(
        self, path: str, *, lossy: bool = False, **options: Any
    ) -> AsyncIterator[Client]:
        """A client that is let in; it is closed at the end, if it is not yet."""
        options = {
            "compression": None, "open_timeout": PATIENCE, "close_timeout": PATIENCE,
            "proxy": None, **options,
        }  # fmt: skip
        name = path.rpartition("/")[2]
        async with connect(f"ws://127.0.0.1:{self.port}{path}", **options) as socket:
            self.findings.counts["connections made"] += 1
            client = Client(self, socket, name, lossy)
            try:
                yield client
            except BaseException:
                client.abort()
                raise
        await client.ended()

    async def repeat(self, visit: Callable[[], Awaitable[None]]) -> None:
        """Come again and again, until the end of the load."""
        while await self.gate.pause(0, 2):
            try:
                await visit()
            except Exception as exc:  # it ends one visit, and the soak test in failure
                last = traceback.format_exception(exc)[-3:]
                self.findings.fail(f"a visit ends with {text_of(exc)}", "".join(last))

    # Those that churn

    async def churn(self, name: str) -> None:
        entrances: dict[Callable[[str], Awaitable[None]], int] = {
            self.stay: 90, self.give_up: 6, self.be_refused: 2, self.be_sent_away: 2
        }  # fmt: skip
        await self.repeat(lambda: choose(entrances)(name))

    async def stay(self, name: str) -> None:
        compression = random.choice(("deflate", None, None, None))
        async with self.connected(f"/ws/{name}", compression=compression) as client:
            for _ in range(random.randrange(2, 30)):
                await choose(ACTIONS)(client)
                if not await self.gate.pause(0.1, 0.9):
                    break
            leave = choose(WAYS_OUT)
            self.findings.counts[f"left by {leave.__name__}"] += 1
            await leave(client)

    async def give_up(self, name: str) -> None:
        """Leave during the handshake: in the middle of the request, or before the answer."""
        key = base64.b64encode(os.urandom(16)).decode()
        request = (
            f"GET /ws/{name} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
        ).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request[: random.choice((len(request), random.randrange(len(request))))])
        await self.gate.pause(0, 0.003)  # about as long as the connect handler takes
        random.choice((writer.close, writer.transport.abort))()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        self.findings.counts["left during the handshake"] += 1

    async def be_refused(self, name: str) -> None:
        try:
            async with self.connected(f"/ws/{name}?how=refused"):
                self.findings.fail("a client is let in that is to be refused", name)
        except InvalidStatus as exc:
            if exc.response.status_code != 403:
                self.findings.fail("it is refused otherwise", exc)
            self.findings.counts["refused"] += 1

    async def be_sent_away(self, name: str) -> None:
        async with self.connected(f"/ws/{name}?how=closed") as client:
            await client.ended(4401)
        self.findings.counts["closed at once"] += 1

    # Those that stall

    async def stall(self, name: str) -> None:
        """In turn: do not read a group, not even replies, or lose some messages of a group."""
        ways = itertools.cycle((self.neglect, self.ask_and_neglect, self.miss_some))
        for _ in range(random.randrange(3)):
            next(ways)
        await self.repeat(lambda: next(ways)(name))

    @contextlib.asynccontextmanager
    async def slow(self, path: str, **options: Any) -> AsyncIterator[Client]:
        """A client with a small buffer, which is in the group of the feed."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        async with self.connected(path, sock=sock, **options) as client:
            await self.gate.until(lambda: "feed" in client.last or client.reader.done())
            yield client

    async def neglect(self, name: str) -> None:
        async with self.slow(f"/feed/{name}") as client:
            await self.be_evicted(client)

    async def ask_and_neglect(self, name: str) -> None:
        async with self.slow(f"/feed/{name}") as client:
            for _ in range(3):
                await client.start("big")
            await self.be_evicted(client)

    async def be_evicted(self, client: Client) -> None:
        """Read nothing until the server has given up; then all that is left, or nothing."""
        client.socket.transport.pause_reading()
        self.gone.pop(client.name, None)
        await self.gate.until(lambda: client.name in self.gone)
        code = self.gone.pop(client.name, None)
        if code is not None:
            self.findings.counts["evictions that were waited for"] += 1
            if code != 1013:
                client.fail("it is not evicted, but closed", code)
        if code is None or random.random() < 0.3:
            return client.abort()
        await self.gate.pause(0, 2)  # with more than a second, there is no close frame any more
        client.socket.transport.resume_reading()
        if await client.ended(1013, 1006) == 1013:
            self.findings.counts["close frames of evictions"] += 1

    async def miss_some(self, name: str) -> None:
        """Stall for longer than the buffers last; a gap tells what is lost then, but no answer."""
        async with self.slow(f"/lossy/{name}", lossy=True) as client:
            client.socket.transport.pause_reading()
            target = client.last.get("feed", 0) + 150
            await self.gate.until(lambda: self.watcher.last.get("feed", 0) > target - 50)
            answers = [await client.start("sum", {"a": n}) for n in range(3)]
            await self.gate.until(lambda: self.watcher.last.get("feed", 0) > target)
            client.socket.transport.resume_reading()
            for n, (_, answer) in enumerate(answers):
                client.check((await client.wait(answer)).get("payload"), n)
            async with asyncio.timeout(PATIENCE):
                await self.gate.until(lambda: client.last["feed"] > target and not client.jumped)
            if self.gate.is_open:
                self.findings.counts["clients that lost some, and caught up"] += 1
                await close(client)

    # Those that flood

    async def flood(self, name: str) -> None:
        await self.repeat(lambda: self.flood_once(name))

    async def flood_once(self, name: str) -> None:
        """Far too many messages at once: refused one by one, and then closed with 1008."""
        async with self.connected(f"/limited/{name}") as client:
            answers: list[asyncio.Future[Frame]] = []
            with contextlib.suppress(ConnectionClosed):
                for n in range(random.choice((10, 100, 600))):
                    answers.append((await client.start("sum", {"a": n}))[1])
            with contextlib.suppress(ConnectionError):
                for n, answer in enumerate(answers):
                    self.check_limited(client, n, await client.wait(answer))
            if client.reader.done():
                await client.ended(1008)
                self.findings.counts["floods closed with 1008"] += 1
            else:
                await close(client)

    def check_limited(self, client: Client, n: int, frame: Frame) -> None:
        if frame["type"] == "error":
            client.check(frame["payload"]["code"], "rate_limited")
            self.findings.counts["messages over the limit"] += 1
        else:
            client.check(frame.get("payload"), n)

    # All of them

    # Those that come back with positions

    async def follow(self, team: str) -> None:
        """Three clients follow a new room, cut and closed; check what they have heard of it."""
        published, room = Published(), f"kept-{team}-{time.monotonic_ns()}"
        followers = [Follower(published, f"{team}.{n}") for n in range(3)]
        await asyncio.gather(*(self.come_and_go(each, room) for each in followers))
        async with contextlib.AsyncExitStack() as stack:
            lines = [await stack.enter_async_context(self.line(each, room)) for each in followers]
            last = await self.say_kept(lines[0], followers[0], room, False)
            async with asyncio.timeout(PATIENCE):
                while not all(each.has(last) and each.verdicts for each in followers):  # noqa: ASYNC110 - nobody tells when it has come
                    await asyncio.sleep(0.02)
            for each in followers:
                each.is_at_the_end = True
        try:
            published.check(reasons=("expired", "overflow"))
        except AssertionError as exc:
            self.findings.fail("a kept group is not whole", "\n".join([str(exc), *exc.__notes__]))
        heard = [each for follower in followers for each in follower.heard[room]]
        counts = self.findings.counts
        counts["messages to kept groups"] += sum(each.kind == "message" for each in heard)
        counts["kept messages that were missed, and came"] += sum(each.replayed for each in heard)
        counts["gaps in kept groups"] += sum(each.kind == "gap" for each in heard)

    async def come_and_go(self, follower: Follower, room: str) -> None:
        for _ in range(random.randrange(2, 8)):
            async with self.line(follower, room) as socket:
                for _ in range(random.randrange(6)):
                    others = bool(follower.verdicts) and random.random() < 0.3
                    await self.say_kept(socket, follower, room, others)
                    if not await self.gate.pause(0.05, 0.5):
                        break
                if random.random() < 0.6:
                    socket.transport.abort()

    @contextlib.asynccontextmanager
    async def line(self, follower: Follower, room: str) -> AsyncIterator[ClientConnection]:
        """A connection of *follower*, with what it knows; it takes what comes."""
        url = f"ws://127.0.0.1:{self.port}/kept/{room}?resume={quote(query_of(follower.resume))}"
        follower.joins(room)

        async def read(socket: ClientConnection) -> None:
            with contextlib.suppress(ConnectionClosed):
                while True:
                    frame = json.loads(await socket.recv())
                    follower.take(frame)

        async with connect(url, compression=None, open_timeout=PATIENCE, proxy=None) as socket:
            self.findings.counts["connections with positions"] += 1
            reader = asyncio.create_task(read(socket))
            try:
                yield socket
            finally:
                reader.cancel()
                await asyncio.wait([reader])

    async def say_kept(
        self, socket: ClientConnection, follower: Follower, room: str, others: bool
    ) -> Send:
        """Send to the room, or to the others in it. Without an answer it may be lost."""
        excluded = follower.ids[-1] if others else None
        sent = follower.published.begin(room, follower.name, excluded)
        payload = {**sent.payload, "others": others}
        await socket.send(json.dumps({"type": "say", "payload": payload}))
        return sent

    async def load(self, seconds: float) -> None:
        """All clients come and go, for *seconds*; and then they leave."""
        self.gate.open()
        async with self.connected("/ws/supervisor") as self.watcher, asyncio.TaskGroup() as tasks:
            await self.watcher.expect("subscribe", None, None)
            for number in range(self.options.connections):
                tasks.create_task(self.churn(f"churner-{number}"))
            for number in range(self.options.stalled):
                tasks.create_task(self.stall(f"stalled-{number}"))
            for number in range(self.options.flooding):
                tasks.create_task(self.flood(f"flooding-{number}"))
            for number in range(self.options.returning):
                tasks.create_task(self.repeat(functools.partial(self.follow, str(number))))
            await self.watch(seconds)
            self.gate.close()
        await self.watcher.ended(1000)  # and was there all the time

    async def watch(self, seconds: float) -> None:
        """Take a sample now and then."""
        ends, interval = time.monotonic() + seconds, self.options.seconds / SAMPLES
        previous = await self.ask("sample")
        while time.monotonic() < ends and not self.findings.is_hopeless:
            await asyncio.sleep(min(interval, max(0, ends - time.monotonic())))
            sample = await self.ask("sample")
            self.report(sample, previous)
            previous = sample

    def report(self, sample: dict[str, Any], previous: dict[str, Any]) -> None:
        now, before = sample["stats"], previous["stats"]
        elapsed = sample["at"] - previous["at"]
        codes = (key for key in now if key.startswith("errors."))
        errors = {key[7:]: now[key] - before.get(key, 0) for key in codes}
        p50, p99 = milliseconds(self.findings.recent_latencies())
        figures = {
            "seconds": round(time.monotonic() - self.begun, 1),
            "rss": sample["rss"],
            **{key: sample[key] for key in ("connections", "tasks", "file descriptors")},
            "groups": now["groups"],
            "p50": p50,
            "p99": p99,
            "messages": round((now["received"] - before["received"]) / elapsed),
            "deliveries": round((now["sent"] - before["sent"]) / elapsed),
            "cpu": round((sample["cpu"] - previous["cpu"]) / elapsed, 2),
            "evicted": now["evicted"] - before["evicted"],
            "dropped": now["dropped"] - before["dropped"],
            "errors": {code: number for code, number in sorted(errors.items()) if number},
        }
        self.samples.append(figures)
        print(
            f"{figures['seconds']:>6.1f} s {figures['rss'] / MIB:>6.1f} {figures['connections']:>5}"
            f" {figures['groups']:>6} {figures['tasks']:>5} {figures['file descriptors']:>5}"
            f" {p50:>6.1f} {p99:>6.1f} {figures['messages']:>6} {figures['deliveries']:>6}"
            f" {figures['cpu']:>4.0%} {figures['evicted']:>4} {figures['dropped']:>4}"
            f"  {' '.join(f'{code} {number}' for code, number in figures['errors'].items())}",
            flush=True,
        )

    def look_for_more(self) -> None:
        """Nothing may be without failures only because it has not happened."""
        wanted = [f"left by {way.__name__}" for way in WAYS_OUT]
        if self.options.stalled:
            wanted += ["evictions that were waited for", "gaps"]
        if self.options.returning:
            wanted += ["connections with positions", "messages to kept groups"]
            wanted += ["kept messages that were missed, and came"]
        if self.options.flooding:
            wanted += ["floods closed with 1008", "messages over the limit"]
        for what in wanted:
            if not self.findings.counts[what]:
                self.findings.fail("something has not happened", what)

    async def settle(self) -> dict[str, int]:
        """Wait until nothing is left of the clients; what memory is taken then."""
        left, ends = await self.ask("left"), time.monotonic() + PATIENCE
        while left and time.monotonic() < ends:
            await asyncio.sleep(0.2)  # until handlers that linger and the last sockets have ended
            left = await self.ask("left")
        for what, number in left.items():
            self.findings.fail(f"{what} after all clients have left", f"{number:+}")
        memory: dict[str, int] = await self.ask("memory")
        for _ in range(20):
            last, memory = memory, await self.ask("memory")
            if abs(memory["rss"] - last["rss"]) < MIB / 16:
                break
        return memory


def choose(weights: dict[Any, int]) -> Any:
    return random.choices(list(weights), list(weights.values()))[0]


# ── the test ──────────────────────────────────────────────────────────────────────────────────

HEADINGS = (
    "    time     MiB conns groups tasks files    p50    p99  msg/s  out/s  cpu evic drop  errors"
)


async def run(options: Options, child: Child) -> dict[str, Any]:
    """Warm up, and then the rest; all figures, and what failed."""
    soak = Soak(options, child, child.about["port"])
    findings = soak.findings
    figures: dict[str, Any] = {}
    deadline = asyncio.timeout(options.seconds + 4 * PATIENCE)
    try:
        async with deadline:
            figures = await warm_up_and_soak(soak)
    except Exception as exc:  # the server is gone, say
        what = "it is not over in time" if deadline.expired() else "it ends before its time"
        findings.fail(what, text_of(exc))
    p50, p99 = milliseconds(findings.latencies)
    figures |= {"p50, ms": p50, "p99, ms": p99, **dict(sorted(findings.counts.items()))}
    return {
        "about": versions(child.about),
        "figures": figures,
        "samples": soak.samples,
        "failures": findings.failures,
    }


async def warm_up_and_soak(soak: Soak) -> dict[str, Any]:
    """The figures that it takes a whole run to have."""
    findings, seconds = soak.findings, soak.options.seconds
    begun, warm_up = time.process_time(), min(seconds / 4, WARM_UP)
    print(HEADINGS, flush=True)
    await soak.load(warm_up)
    before = await soak.settle()
    print(f"  warm, and all have left: {before['rss'] / MIB:.1f} MiB", flush=True)
    await soak.load(seconds - warm_up)
    after = await soak.settle()
    print(f"  all have left: {after['rss'] / MIB:.1f} MiB", flush=True)
    if (growth := after["rss"] - before["rss"]) > GROWTH:
        findings.fail("memory has grown", f"by {growth / MIB:.2f} MiB")
    server = await soak.ask("findings")
    for wrong in server["wrong"]:
        findings.fail("the server has something to tell", wrong)
    if seconds >= 60 and soak.options.connections >= 100:
        soak.look_for_more()
    return {
        "MiB after the warm-up": round(before["rss"] / MIB, 2),
        "MiB at the end": round(after["rss"] / MIB, 2),
        "MiB grown": round(growth / MIB, 2),
        "Python's blocks grown": after["blocks"] - before["blocks"],
        "clients' share of a core": f"{(time.process_time() - begun) / seconds:.0%}",
        "let in": server["let in"],
        **server["stats"],
    }


def versions(about: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{datetime.date.today()}, Python {platform.python_version()}, {packages}"


def conclude(result: dict[str, Any]) -> int:
    """Print a table, and what failed; the exit status."""
    print()
    for name, figure in result["figures"].items():
        print(f"{name:<40}{figure}")
    for what, details in result["failures"].items():
        print(f"\nFAILED {len(details)} times: {what}")
        for detail in details[:3]:
            print(f"    {detail}")
    print(f"\n{'FAILED' if result['failures'] else 'passed'}")
    return 1 if result["failures"] else 0


def main() -> int:
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=description, epilog=details
    )
    parser.add_argument("--seconds", type=float, default=900, help="of load in all (%(default)s)")
    parser.add_argument(
        "--connections", type=int, default=300, metavar="N", help="that churn (%(default)s)"
    )
    parser.add_argument(
        "--stalled", type=int, default=3, metavar="N", help="that do not read (%(default)s)"
    )
    parser.add_argument(
        "--flooding", type=int, default=1, metavar="N", help="that send too much (%(default)s)"
    )
    parser.add_argument(
        "--returning", type=int, default=20, metavar="N",
        help="teams that follow a kept group over many connections (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to FILE")
    arguments = vars(parser.parse_args())
    file, options = arguments.pop("json"), Options(**arguments)
    # Should the event loop itself hang, this ends the process, and its pipe the server's.
    faulthandler.dump_traceback_later(options.seconds + 6 * PATIENCE, exit=True)
    allow_open_files()
    child = Child(soak_app.run)
    try:
        print(versions(child.about), flush=True)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            try:
                result = runner.run(run(options, child))
            finally:
                child.close()  # before the runner waits for a thread that waits for an answer
    except KeyboardInterrupt:
        print("interrupted")
        return 130
    except ChildFailed as exc:
        print(f"the server does not start: {exc}")
        return 1
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")
    return conclude(result)


if __name__ == "__main__":
    sys.exit(main())
