"""Drive one peer's ASGI app, without a server and sockets."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import gc
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from benchmarks import peers
from benchmarks.processes import Pipe, answer_all
from benchmarks.server import versions
from benchmarks.workload import TYPES, Wire

App = Callable[..., Awaitable[None]]
Event = Mapping[str, Any]
LIMIT = 60.0  # seconds to wait for an app


def scope(target: str) -> dict[str, Any]:
    """What a server tells the app about a connection."""
    path, _, query = target.partition("?")
    return {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "scheme": "ws",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [
            (b"host", b"localhost"),
            (b"connection", b"upgrade"),
            (b"upgrade", b"websocket"),
        ],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8000),
        "subprotocols": [],
        "state": {},
        "extensions": {},
    }


class Call:
    """One call of the app, seen by its server. What is fed to it, `receive` returns at once."""

    __slots__ = ("awaited", "has_more", "has_sent", "inbox", "last", "sent", "task")

    def __init__(self, app: App, scope: dict[str, Any], first: str) -> None:
        self.inbox: collections.deque[Event] = collections.deque([{"type": first}])
        self.has_more = asyncio.Event()
        self.has_sent = asyncio.Event()
        self.sent = 0
        self.awaited = 0
        self.last: Event = {}
        self.task = asyncio.create_task(self.run(app, scope))

    async def run(self, app: App, scope: dict[str, Any]) -> None:
        try:
            await app(scope, self.receive, self.send)
        finally:
            self.has_sent.set()  # nobody waits for an app that has ended

    async def receive(self) -> Event:
        while not self.inbox:
            self.has_more.clear()
            await self.has_more.wait()
        return self.inbox.popleft()

    async def send(self, event: Event) -> None:
        self.sent += 1
        self.last = event
        if self.sent == self.awaited:
            self.has_sent.set()

    def feed(self, texts: Iterable[str]) -> None:
        self.inbox.extend({"type": "websocket.receive", "text": text} for text in texts)
        self.has_more.set()

    async def until(self, count: int) -> str:
        """Wait for *count* events in all; the text of the last one."""
        self.awaited = count
        if self.sent < count and not self.task.done():
            self.has_sent.clear()
            async with asyncio.timeout(LIMIT):
                await self.has_sent.wait()
        if self.task.done():
            self.task.result()
        if self.sent != count:
            raise ValueError(f"{self.sent} events instead of {count}: {self.last!r:.200}")
        return str(self.last.get("text"))

    async def ask(self, text: str, answers: int = 1) -> str:
        self.feed([text])
        return await self.until(self.sent + answers)

    async def turn(self, text: str) -> None:
        """Feed *text* to the app, which waits, and wait for one event. Has no time limit."""
        self.awaited = self.sent + 1
        self.has_sent.clear()
        self.feed((text,))
        await self.has_sent.wait()

    async def end(self) -> None:
        self.inbox.append({"type": "websocket.disconnect", "code": 1000, "reason": ""})
        self.has_more.set()
        async with asyncio.timeout(LIMIT):
            await self.task


async def connect(app: App, wire: Wire, target: str) -> Call:
    """A connection that has been accepted and is through the prelude."""
    call = Call(app, scope(target), "websocket.connect")
    await call.until(1)
    if call.last["type"] != "websocket.accept":
        raise ConnectionError(f"not accepted: {call.last!r}")
    for text, start in wire.prelude:
        if text is not None:
            call.feed([text])
        if start is not None and not (await call.until(call.sent + 1)).startswith(start):
            raise ConnectionError(f"expected {start!r}, got {call.last!r}")
    return call


async def drain(call: Call, texts: list[str]) -> float:
    """CPU seconds for each of *texts*, which have all arrived when the first is handled."""
    await asyncio.sleep(0)  # until it waits
    gc.collect()
    call.feed(texts)
    before = time.process_time()
    await call.until(call.sent + len(texts))
    return (time.process_time() - before) / len(texts)


async def take_turns(call: Call, texts: list[str]) -> float:
    """CPU seconds for each of *texts*, when the app and its client wait for each other."""
    await asyncio.sleep(0)  # until it waits
    gc.collect()
    answered = call.sent + len(texts)
    async with asyncio.timeout(LIMIT):
        before = time.process_time()
        for text in texts:
            await call.turn(text)
        cost = (time.process_time() - before) / len(texts)
    await call.until(answered)  # raises what has ended the app
    return cost


class Driver:
    """The commands. Each leaves no connection behind."""

    def __init__(self, name: str) -> None:
        self.peer: Any = peers.load(name)
        self.wire: Wire = self.peer.WIRE
        self.app: App = self.peer.create_app()

    async def about(self) -> dict[str, Any]:
        """Also starts the app, if it has a lifespan."""
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        self.lifespan = Call(self.app, scope, "lifespan.startup")
        with contextlib.suppress(Exception):
            await self.lifespan.until(1)
        return {"label": self.peer.LABEL, "versions": versions(*self.peer.PACKAGES)}

    async def dispatch(self, messages: int) -> float:
        """CPU seconds a message; all answers are counted, ten and the last one checked."""
        return await self.answered(messages, drain)

    async def alone(self, messages: int) -> float:
        """CPU seconds a message that comes when the one before has been answered."""
        return await self.answered(messages, take_turns)

    async def answered(
        self, messages: int, cost_of: Callable[[Call, list[str]], Awaitable[float]]
    ) -> float:
        call = await connect(self.app, self.wire, self.wire.path)
        for id in range(len(TYPES)):
            self.check(await call.ask(self.wire.request(id, id)), id)
        texts = [self.wire.request(id % len(TYPES), id) for id in range(messages)]
        cost = await cost_of(call, texts)
        self.check(str(call.last.get("text")), messages - 1)
        await call.end()
        return cost

    def check(self, text: str, id: int) -> None:
        if not self.wire.check(text, id % len(TYPES), id):
            raise ValueError(f"wrong answer: {text:.200}")

    async def come_and_go(self, count: int) -> float:
        """CPU seconds for a connection that comes and goes."""
        before = time.process_time()
        for _ in range(count):
            await (await connect(self.app, self.wire, self.wire.path)).end()
        return (time.process_time() - before) / count

    async def hold_group(self, count: int) -> list[Call]:
        return [await connect(self.app, self.wire, self.wire.group_path) for _ in range(count)]

    async def memory(self, count: int) -> float:
        """Bytes that Python has allocated for an idle connection in the group, ours included."""
        some = await self.hold_group(10)
        tracemalloc.start()
        more = await self.hold_group(count)
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        await asyncio.gather(*(call.end() for call in some + more))
        return size / count

    async def hold(self, receivers: int) -> dict[str, float]:
        """The longest time, in seconds, that the event loop stands still in one group send.

        Meanwhile another client asks something at every turn of the loop; its answers are counted.
        """
        loop, wire = asyncio.get_running_loop(), self.wire
        group = await self.hold_group(receivers)
        other = await connect(self.app, wire, wire.path)
        gc.collect()
        gc.freeze()  # else a pass over all connections may come in between
        longest, last, is_over = 0.0, time.perf_counter(), False

        def tick() -> None:
            nonlocal longest, last
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
            other.feed([wire.request(1, 1)])
            if not is_over:
                loop.call_soon(tick)

        before = other.sent
        tick()
        await group[0].ask(wire.shout(1, "x" * 100), answers=2)
        answers = other.sent - before
        await asyncio.sleep(0.05)  # for what the group send has left to do
        figures = {"longest": longest, "answers": answers}
        is_over = True
        gc.unfreeze()
        await asyncio.gather(*(call.end() for call in (*group, other)))
        return figures


def run(pipe: Pipe, name: str) -> None:
    """A child of the harness."""
    answer_all(pipe, functools.partial(Driver, name))


def run_on_asyncio(pipe: Pipe, name: str) -> None:
    """A child of the harness, on the event loop that comes with Python."""
    answer_all(pipe, functools.partial(Driver, name), asyncio.new_event_loop)
