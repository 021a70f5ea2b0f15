"""The way of a message out and in: order, slow clients, and what stands around a server's send."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import datetime
import enum
import itertools
import json
import math
import random
import secrets
import socket
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from decimal import Decimal
from typing import Any, Generic, NamedTuple, NotRequired, TypedDict, TypeVar, cast
from uuid import UUID

import attrs
import falcon
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET, UnsetType
from support import PATIENCE, Client, Server, Stalled, connect, new_app, serving, session_of, until

import pachinko
from pachinko import Connection, Envelope, Hub, MessageError, Outgoing, Pachinko, simulate

BIG = "x" * 300_000  # more than the buffers on the way to a client of `served` hold
LONG = 60.0  # seconds that no test waits for

Event = dict[str, Any]
Send = Callable[[Event], Awaitable[None]]
Wrap = Callable[[Send, str], Send]  # an ASGI middleware's: of a server's send and the client's name


def endpoint(**options: Any) -> tuple[Pachinko, list[tuple[str, int | None]]]:
    """An endpoint whose clients join the group "all"; who has left it, and with which code."""
    options = {"send_timeout": LONG, "linger": LONG, **options}
    ws = Pachinko(new_app(), "/{name}", hub=Hub(), **options)
    left: list[tuple[str, int | None]] = []

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.join("all")

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        left.append((conn.params["name"], conn.close_code))

    @ws.on("echo")
    async def echo(conn: Connection, payload: Any) -> Any:
        return payload

    @ws.on("big")
    async def big(conn: Connection) -> str:
        return BIG

    @ws.on("late big")
    async def late_big(conn: Connection) -> str:
        await asyncio.sleep(0)
        return BIG

    @ws.on("spread")
    async def spread(conn: Connection, payload: Any) -> Any:
        await ws._hub.send("all", "n", payload)
        return payload

    @ws.on("say")
    async def say(conn: Connection, payload: Any) -> None:
        await conn.send("n", payload)

    @ws.on("count")
    async def count(conn: Connection, *, to: int) -> AsyncIterator[int]:
        for n in range(to):
            yield n

    return ws, left


def around(app: Any, wrap: Wrap) -> Any:
    """*app* behind an ASGI middleware."""

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            send = wrap(send, scope["path"].strip("/"))
        await app(scope, receive, send)

    return middleware


@contextlib.asynccontextmanager
async def served(ws: Pachinko, wrap: Wrap | None = None) -> AsyncIterator[Server]:
    """A server with small buffers; at the end no connection may still be marked as written to."""
    app = ws._app if wrap is None else around(ws._app, wrap)
    async with serving(app) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        yield server
        await written(ws)


def named(ws: Pachinko, name: str) -> Connection:
    (conn,) = (conn for conn in ws._hub.connections if conn.params["name"] == name)
    return conn


class Fake:
    """A client and its server in one, for what no real one does on demand."""

    def __init__(self, ws: Pachinko, name: str = "fake") -> None:
        self.ws, self.name = ws, name
        self.incoming: asyncio.Queue[Event] = asyncio.Queue()
        self.sent: list[Event] = []
        self.before: Callable[[], Awaitable[None]] | None = None  # what each send waits for
        self.incoming.put_nowait({"type": "websocket.connect"})

    async def send(self, event: Event) -> None:
        if event["type"] == "websocket.send" and self.before is not None:
            await self.before()
        self.sent.append(event)

    async def __aenter__(self) -> Fake:
        scope = {
            "type": "websocket",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "scheme": "ws",
            "path": f"/{self.name}",
            "query_string": b"",
            "headers": [],
            "subprotocols": [],
        }
        app: Any = self.ws._app
        self.task = asyncio.create_task(app(scope, self.incoming.get, self.send))
        while not self.sent:
            await asyncio.sleep(0)
        self.sent.clear()
        self.conn = named(self.ws, self.name)
        return self

    async def __aexit__(self, *failure: object) -> None:
        if failure[0] is None and not self.conn.closed:
            await until(lambda: not self.conn.outgoing.writing)
        self.gone()
        await asyncio.wait_for(self.task, PATIENCE)

    def ask(self, type: str, payload: Any = None, id: Any = 1) -> None:
        text = json.dumps({"type": type, "id": id, "payload": payload})
        self.incoming.put_nowait({"type": "websocket.receive", "text": text})

    def gone(self) -> None:
        self.incoming.put_nowait({"type": "websocket.disconnect", "code": 1001})

    def payloads(self) -> list[Any]:
        texts = (event["text"] for event in self.sent if "text" in event)
        return [json.loads(text).get("payload") for text in texts]


async def fakes(stack: contextlib.AsyncExitStack, ws: Pachinko, count: int) -> list[Fake]:
    return [await stack.enter_async_context(Fake(ws, str(n))) for n in range(count)]


async def a_turn() -> None:
    """Suspend for one turn of the loop."""
    await asyncio.sleep(0)


def frames_in(data: bytes) -> list[Any]:
    """The text frames at the beginning of *data*."""
    frames = []
    while data and data[0] == 0x81:
        size, start = data[1], 2
        if size == 126:
            size, start = int.from_bytes(data[2:4], "big"), 4
        elif size == 127:
            size, start = int.from_bytes(data[2:10], "big"), 10
        frames.append(json.loads(data[start : start + size]))
        data = data[start + size :]
    return frames


# What stands around a server's send


def bounded(send: Send, name: str) -> Send:
    async def wrapped(event: Event) -> None:
        async with asyncio.timeout(LONG):
            await asyncio.sleep(0)
            await send(event)

    return wrapped


traced: contextvars.ContextVar[str] = contextvars.ContextVar("traced")


def tracing(send: Send, name: str) -> Send:
    async def wrapped(event: Event) -> None:
        token = traced.set(name)
        await asyncio.sleep(0)
        assert traced.get() == name
        await send(event)
        traced.reset(token)  # ValueError in another context than it was set in

    return wrapped


def checking(send: Send, name: str) -> Send:
    async def wrapped(event: Event) -> None:
        task = asyncio.current_task()
        assert task is not None
        await asyncio.sleep(0)
        assert asyncio.current_task() is task
        await send(event)
        assert asyncio.current_task() is task

    return wrapped


def yielding(send: Send, name: str) -> Send:
    async def wrapped(event: Event) -> None:
        await asyncio.sleep(0)
        await send(event)
        await asyncio.sleep(0)

    return wrapped


def future(send: Send, name: str) -> Send:
    def wrapped(event: Event) -> Awaitable[None]:
        return asyncio.ensure_future(send(event))

    return wrapped


def awaitable(send: Send, name: str) -> Send:
    class Sending:
        def __init__(self, event: Event) -> None:
            self.event = event

        def __await__(self) -> Any:
            return send(self.event).__await__()

    return Sending


WRAPS = (bounded, tracing, checking, yielding, future, awaitable)


@pytest.mark.parametrize("how", ["group", "handler", "reply", "conn.send", "stream"])
@pytest.mark.parametrize("wrap", WRAPS)
async def test_every_send_works_behind_an_asgi_middleware(wrap: Wrap, how: str) -> None:
    """Whatever is around the server's send, and whether it suspends: all arrives, in order."""
    ws, left = endpoint()
    failures: list[BaseException] = []

    def watched(send: Send, name: str) -> Send:
        inner = wrap(send, name)

        def wrapped(event: Event) -> Awaitable[None]:
            return inner(event) if wrap in (future, awaitable) else noting(inner(event))

        async def noting(sending: Awaitable[None]) -> None:
            try:
                await sending
            except BaseException as exc:  # noted whatever it is, and raised again
                failures.append(exc)
                raise

        return wrapped

    async with (
        served(ws, watched) as server,
        connect(f"{server.url}/one") as one,
        connect(f"{server.url}/two") as two,
    ):
        expected: list[Any] = list(range(40))
        others = expected
        await until(lambda: len(ws._hub.connections) == 2)
        match how:
            case "group":
                for n in range(40):
                    await ws._hub.send("all", "n", n)
            case "conn.send":
                others = []
                for n in range(40):
                    await named(ws, "one").send("n", n)
            case "stream":
                others = []
                await one.send("count", {"to": 40}, id=1)
            case _:
                others = expected if how == "handler" else []
                for n in range(40):
                    await one.send("spread" if how == "handler" else "echo", n, id=n)
        if how == "handler":
            expected = [n for n in range(40) for _ in "ab"]
        assert [(await one.receive())["payload"] for _ in expected] == expected
        if how == "stream":
            assert (await one.receive())["type"] == "complete"
        assert [(await two.receive())["payload"] for _ in others] == others
        for client in (one, two):
            assert (await client.ask("echo", "end"))["payload"] == "end"
        assert not failures and not left


@pytest.mark.parametrize("count", [1, 300, 1000])
async def test_a_send_that_always_suspends_reaches_a_group_in_order(count: int) -> None:
    """Each receiver of two messages gets both, though the server never takes one at once."""
    ws, _ = endpoint()
    async with contextlib.AsyncExitStack() as stack:
        clients = await fakes(stack, ws, count)
        for client in clients:
            client.before = a_turn
        for n in range(2):
            await ws._hub.send("all", "n", n)
        await until(lambda: all(len(client.sent) == 2 for client in clients))
        assert all(client.payloads() == [0, 1] for client in clients)


async def send_to_all(ws: Pachinko, how: str, clients: list[Client], payload: Any) -> None:
    """Send *payload* to the client called "bad", and to those that are well."""
    if how == "group":
        await ws._hub.send("all", "n", payload)
    elif how == "handler":
        await clients[0].send("spread", payload)
    else:
        for name in ("bad", "0", "1"):
            if name != "bad" or "bad" in {c.params["name"] for c in ws._hub.connections}:
                with contextlib.suppress(falcon.WebSocketDisconnected):
                    await named(ws, name).send("n", payload)


@pytest.mark.parametrize("how", ["group", "handler", "conn.send"])
async def test_a_middlewares_timeout_costs_the_stalled_client_alone(how: str) -> None:
    """The sender's own task is not cancelled, and the others get everything."""
    ws, left = endpoint(linger=0.1)
    me = asyncio.current_task()
    assert me is not None

    def wrap(send: Send, name: str) -> Send:
        async def wrapped(event: Event) -> None:
            async with asyncio.timeout(0.05 if name == "bad" else LONG):
                await send(event)

        return wrapped

    async with (
        served(ws, wrap) as server,
        connect(f"{server.url}/0", max_queue=None) as one,
        connect(f"{server.url}/1", max_queue=None) as two,
        Stalled(f"{server.url}/bad"),
    ):
        await until(lambda: len(ws._hub.connections) == 3)
        for n in range(4):
            await send_to_all(ws, how, [one, two], [n, BIG])
            answers = [await client.receive() for client in (one, two)]
            assert [answer["payload"][0] for answer in answers] == [n, n]
            if how == "handler":
                assert (await one.receive())["type"] == "spread.reply"
        await until(lambda: left)
        assert left == [("bad", 1006)] and me.cancelling() == 0
        await send_to_all(ws, how, [one, two], ["end"])
        assert [(await client.receive())["payload"] for client in (one, two)] == [["end"]] * 2


@pytest.mark.parametrize("how", ["big", "late big"])
async def test_a_middlewares_timeout_on_a_reply_ends_the_connection(how: str) -> None:
    """A reply that a middleware gives up is the end of its client, which is seen out."""
    ws, left = endpoint(linger=0.1)

    def wrap(send: Send, name: str) -> Send:
        async def wrapped(event: Event) -> None:
            async with asyncio.timeout(0.05 if name == "bad" else LONG):
                await send(event)

        return wrapped

    async with (
        served(ws, wrap) as server,
        connect(f"{server.url}/one") as one,
        Stalled(f"{server.url}/bad") as bad,
    ):
        for n in range(2):
            await bad.send({"type": how, "id": n})
        await until(lambda: left)
        assert left == [("bad", 1006)]
        assert (await one.ask("echo", 1))["payload"] == 1


async def test_a_middlewares_timeout_tells_the_sender_that_the_client_is_gone() -> None:
    """`conn.send` raises `WebSocketDisconnected`, in a task that is not cancelled."""
    ws, left = endpoint(linger=0.1)
    me = asyncio.current_task()
    assert me is not None

    def wrap(send: Send, name: str) -> Send:
        async def wrapped(event: Event) -> None:
            async with asyncio.timeout(0.05):
                await send(event)

        return wrapped

    async with served(ws, wrap) as server, Stalled(f"{server.url}/bad"):
        conn = named(ws, "bad")
        await conn.send("fill", BIG)
        with pytest.raises(falcon.WebSocketDisconnected):
            await conn.send("fill", BIG)
        assert conn.closed and me.cancelling() == 0
        await until(lambda: left)


@pytest.mark.parametrize("how", ["group", "handler", "conn.send"])
@pytest.mark.parametrize("pause", [False, True], ids=["at once", "later"])
async def test_a_send_that_fails_costs_its_client_alone(pause: bool, how: str) -> None:
    """Whatever a server or a middleware raises for one client, the others get everything."""
    ws, left = endpoint(linger=0.1)

    def wrap(send: Send, name: str) -> Send:
        async def wrapped(event: Event) -> None:
            if pause:
                await asyncio.sleep(0)
            if name == "bad" and event["type"] == "websocket.send":
                raise RuntimeError("no")
            await send(event)

        return wrapped

    async with (
        served(ws, wrap) as server,
        connect(f"{server.url}/0") as one,
        connect(f"{server.url}/1") as two,
        connect(f"{server.url}/bad") as bad,
    ):
        await until(lambda: len(ws._hub.connections) == 3)
        for n in range(3):
            await send_to_all(ws, how, [one, two], n)
            assert [(await client.receive())["payload"] for client in (one, two)] == [n, n]
            if how == "handler":
                assert (await one.receive())["type"] == "spread.reply"
        await until(lambda: left)
        assert [name for name, _ in left] == ["bad"]
        await bad.closed()


@pytest.mark.parametrize("pause", [False, True], ids=["at once", "later"])
async def test_a_reply_that_fails_ends_its_connection(pause: bool) -> None:
    """The client that still is there is closed, and its disconnect handlers run once."""
    ws, left = endpoint(linger=0.1)

    def wrap(send: Send, name: str) -> Send:
        async def wrapped(event: Event) -> None:
            if event["type"] == "websocket.send":
                for _ in range(3 * pause):
                    await asyncio.sleep(0)
                raise RuntimeError("no")
            await send(event)

        return wrapped

    async with served(ws, wrap) as server, connect(f"{server.url}/bad") as client:
        await client.send("echo", 1)
        await client.closed()
        await until(lambda: not ws._hub.state.serving)
        assert [name for name, _ in left] == ["bad"]


async def test_a_middlewares_timeout_around_receive_closes_the_connection() -> None:
    """A client that a middleware finds idle is closed and seen out, without an error."""
    ws, left = endpoint()

    failures: list[BaseException] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def impatient() -> Any:
            async with asyncio.timeout(0.05):
                return await receive()

        inner: Any = ws._app
        try:
            await inner(scope, impatient if scope["type"] == "websocket" else receive, send)
        except Exception as exc:  # noted whatever it is: the test expects none
            failures.append(exc)

    async with serving(app) as server, connect(f"{server.url}/idle") as client:
        await client.closed()
        await until(lambda: not ws._hub.state.serving)
    assert len(left) == 1 and failures == []


# Order


@given(seed=st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_messages_leave_in_the_order_in_which_code_sent_them(seed: int) -> None:
    """Replies, group messages and `conn.send` by many tasks, over sends that suspend at random."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pachinko, "_TURN", 2)
        asyncio.run(asyncio.wait_for(_send_at_random(random.Random(seed)), PATIENCE))


async def _send_at_random(chance: random.Random) -> None:
    ws, left = endpoint(outbox=10_000)
    hub, numbers = ws._hub, itertools.count()
    expected: dict[Connection, list[int]] = {}

    async def pause() -> None:
        for _ in range(chance.choice((0, 0, 0, 1, 2, 5))):
            await asyncio.sleep(0)

    async def send(conn: Connection) -> None:
        n = next(numbers)
        match chance.choice(("conn", "conn", "send_to", "group", "group")):
            case "conn":
                expected[conn].append(n)
                await conn.send("n", n)
            case "send_to":
                expected[conn].append(n)
                await hub.send_to(conn, "n", n)
            case "group":
                for member in expected:
                    expected[member].append(n)
                await hub.send("all", "n", n)

    @ws.on("script")
    async def script(conn: Connection) -> int:
        for _ in range(chance.randrange(3)):
            await send(conn)
            await pause()
        if chance.random() < 0.2:
            asyncio.Task(hub.send("all", "late", -1)).cancel()  # not begun, it sends nothing
        expected[conn].append(n := next(numbers))
        return n

    async def task(conn: Connection) -> None:
        for _ in range(8):
            await send(conn)
            await pause()

    async with contextlib.AsyncExitStack() as stack:
        clients = await fakes(stack, ws, 7)
        for client in clients:
            expected[client.conn] = []
            client.before = pause
        tasks = [asyncio.create_task(task(client.conn)) for client in clients[:4]]
        for _ in range(4):
            for client in clients[2:]:
                client.ask("script")
            await pause()
        await asyncio.gather(*tasks)
        while any(
            client.incoming.qsize() or session_of(client.conn).is_handling for client in clients
        ):
            await asyncio.sleep(0)
        while any(client.conn.outgoing.writing for client in clients):
            await asyncio.sleep(0)
        for client in clients:
            assert client.payloads() == expected[client.conn]
        assert not left


@pytest.mark.parametrize("suspends", [False, True], ids=["at once", "suspending"])
@pytest.mark.parametrize("how", ["in a row", "gather", "tasks"])
async def test_two_sends_to_a_large_group_keep_their_order(how: str, suspends: bool) -> None:
    """The second overtakes the first at no receiver, however they were started."""
    ws, _ = endpoint()
    hub = ws._hub
    async with contextlib.AsyncExitStack() as stack:
        clients = await fakes(stack, ws, 2 * pachinko._TURN + 50)
        if suspends:
            for client in clients[::7]:
                client.before = a_turn
        if how == "in a row":
            for n in range(3):
                await hub.send("all", "n", n)
        elif how == "gather":
            await asyncio.gather(*(hub.send("all", "n", n) for n in range(3)))
        else:
            tasks = [asyncio.create_task(hub.send("all", "n", n)) for n in range(3)]
            await asyncio.wait(tasks)
        await until(lambda: all(len(client.sent) == 3 for client in clients))
        assert all(client.payloads() == [0, 1, 2] for client in clients)


async def test_what_is_sent_behind_a_group_send_comes_behind_it() -> None:
    """So do a `conn.send` and the reply of the handler, with every member."""
    ws, _ = endpoint()

    @ws.on("both")
    async def both(conn: Connection) -> str:
        await ws._hub.send("all", "n", "group")
        await conn.send("n", "own")
        return "reply"

    async with contextlib.AsyncExitStack() as stack:
        clients = await fakes(stack, ws, pachinko._TURN + 50)
        for client in (clients[0], clients[-1]):
            client.ask("both")
        await until(lambda: all(len(c.sent) >= 2 for c in clients))
        for client in (clients[0], clients[-1]):
            await until(lambda client=client: len(client.sent) == 4)
            mine = [payload for payload in client.payloads() if payload != "group"]
            assert mine == ["own", "reply"] and client.payloads()[0] == "group"
        await ws._hub.send("all", "n", "group")
        for client in clients:
            await client.conn.send("n", "behind")
            assert client.payloads()[-2:] == ["group", "behind"]


async def test_a_close_behind_a_group_send_comes_behind_it() -> None:
    """The message first, then the close frame."""
    ws, _ = endpoint()
    async with served(ws) as server, connect(f"{server.url}/one") as client:
        await until(lambda: ws._hub.connections)
        await ws._hub.send("all", "n", "last")
        await named(ws, "one").close(4000)
        assert (await client.receive())["payload"] == "last"
        assert (await client.closed())[0] == 4000


# Large groups


class Socket:
    """As much of Falcon's socket as a group send needs."""

    def __init__(self, wait: Callable[[], Awaitable[None]] | None = None) -> None:
        self.taken: list[Any] = []
        self.wait = wait

    async def _asgi_send(self, event: Event) -> None:
        if self.wait is not None:
            await self.wait()
        self.taken.append(json.loads(event["text"])["payload"])


async def member(ws: Pachinko, socket: Any) -> Connection:
    """A connection in the group "all" that nobody reads from."""
    req: Any = None
    state, id = ws._hub.state, secrets.token_hex(12)
    send = socket._asgi_send
    outgoing = Outgoing(id, socket, send, ws._limits, state.counts, pachinko._NOBODY)
    conn = Connection(ws._hub, req, socket, {"name": ""}, id, outgoing)
    state.registry.add(conn)
    outgoing.open()
    await conn.join("all")
    return conn


async def written(ws: Pachinko) -> None:
    """Wait until no connection is marked as being written to."""
    await until(
        lambda: (
            not any(conn.outgoing.writing for conn in ws._hub.state.registry.connections.values())
        )
    )


async def test_who_leaves_during_a_large_send_is_passed_over() -> None:
    """A client that is gone when its turn comes is not written to, and holds up nobody."""
    ws, _ = endpoint()
    sockets = [Socket() for _ in range(pachinko._TURN + 10)]
    conns = [await member(ws, socket) for socket in sockets]
    sending = asyncio.Task(ws._hub.send("all", "n", 1))
    await asyncio.sleep(0)  # it has begun, and the loop has its turn
    late = [conn for conn in conns if conn.outgoing.writing == "task"]
    for conn in late[:5]:
        conn.outgoing.lost()
    await sending
    await written(ws)
    gone = {conn.id for conn in late[:5]}
    assert len(gone) == 5
    assert all(bool(conn.ws.taken) is (conn.id not in gone) for conn in conns)  # type: ignore[attr-defined]
    await ws._hub.send("nobody", "n", 1)


async def test_a_send_to_a_large_group_lets_others_run() -> None:
    """The loop gets its turns between, and another connection its reply."""
    ws, _ = endpoint()
    loop, turns, log, seen = asyncio.get_running_loop(), [0], [], []
    count = 10_000

    def turn() -> None:
        turns[0] += 1
        nonlocal handle
        handle = loop.call_soon(turn)

    handle = loop.call_soon(turn)

    async with Fake(ws) as asking:
        await asking.conn.leave("all")

        class Noting(Socket):
            async def _asgi_send(self, event: Event) -> None:
                if not seen:
                    asking.ask("echo", 1)
                seen.append(turns[0])
                log.append("group")

        async def note() -> None:
            log.append("reply")

        for _ in range(count):
            await member(ws, Noting())
        asking.before = note
        await ws._hub.send("all", "n", 1)
        await until(lambda: log.count("group") == count)
        handle.cancel()
        assert seen[-1] - seen[0] >= 20  # at 0.01 ms a write, each takes 5 ms at most
        assert 0 < log.index("reply") < count - 1


async def test_a_thousand_clients_that_stall_at_once_are_no_recursion() -> None:
    """Each waits by itself; when they read again, all get what was sent meanwhile."""
    ws, _ = endpoint()
    gate = asyncio.Event()

    async def wait() -> None:
        await gate.wait()

    slow, well = [Socket(wait) for _ in range(1500)], Socket()
    conns = [await member(ws, socket) for socket in slow]
    await member(ws, well)
    for n in range(2):
        await ws._hub.send("all", "n", n)
    await until(lambda: well.taken == [0, 1])
    assert all(conn.outgoing.writing for conn in conns)
    gate.set()
    await written(ws)
    assert all(socket.taken == [0, 1] for socket in slow)


async def test_a_cancelled_group_send_still_reaches_the_rest() -> None:
    """Nobody stays marked as being written to: the next message reaches all as well."""
    ws, _ = endpoint()
    sockets = [Socket() for _ in range(1000)]
    conns = [await member(ws, socket) for socket in sockets]
    sending = asyncio.Task(ws._hub.send("all", "n", 1))
    await asyncio.sleep(0)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert any(conn.outgoing.writing for conn in conns)
    await written(ws)
    await ws._hub.send("all", "n", 2)
    await written(ws)
    assert all(socket.taken == [1, 2] for socket in sockets)


@pytest.mark.parametrize("pause", [False, True], ids=["at once", "later"])
async def test_a_send_that_raises_cancelled_error_costs_the_others_nothing(pause: bool) -> None:
    """It ends neither the sender nor the rest of the group, and its receiver can be written to."""
    ws, _ = endpoint()

    async def cancel() -> None:
        if pause:
            await asyncio.sleep(0)
        if len(odd.taken) == 1:
            odd.taken.append("cancelled")
            raise asyncio.CancelledError

    odd, others = Socket(cancel), [Socket() for _ in range(20)]
    for receiver in (*others[:10], odd, *others[10:]):
        await member(ws, receiver)
    for n in range(3):
        await ws._hub.send("all", "n", n)
    await written(ws)
    assert odd.taken == [0, "cancelled", 2]
    assert all(other.taken == [0, 1, 2] for other in others)


# Stalled clients


async def test_one_stalled_client_delays_none_of_twenty() -> None:
    """The others have every message before it is given up; it is closed with 1013."""
    ws, left = endpoint(outbox=4)
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(served(ws))
        bad = await stack.enter_async_context(Stalled(f"{server.url}/bad"))
        clients = [
            await stack.enter_async_context(connect(f"{server.url}/{n}", max_queue=None))
            for n in range(19)
        ]
        await until(lambda: len(ws._hub.connections) == 20)
        conn = named(ws, "bad")
        await conn.send("fill", BIG)
        for n in range(5):
            await ws._hub.send("all", "n", n)
            assert {(await client.receive())["payload"] for client in clients} == {n}
            assert conn.outgoing.writing and not left
        await ws._hub.send("all", "n", 5)
        assert {(await client.receive())["payload"] for client in clients} == {5}
        await until(lambda: left)
        assert (await bad.read_all()).endswith(b"\x88\x0a\x03\xf5too slow")
        assert left == [("bad", 1013)] and ws._hub.stats()["evicted"] == 1


async def test_many_clients_that_stall_in_one_send_are_all_evicted() -> None:
    """Fifty of them hold up neither each other nor those that read."""
    ws, left = endpoint(outbox=4)
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(served(ws))
        for n in range(50):
            await stack.enter_async_context(Stalled(f"{server.url}/bad{n}"))
        clients = [
            await stack.enter_async_context(connect(f"{server.url}/{n}", max_queue=None))
            for n in range(3)
        ]
        await until(lambda: len(ws._hub.connections) == 53)
        bad = [conn for conn in ws._hub.connections if conn.params["name"].startswith("bad")]
        for n in range(7):
            await ws._hub.send("all", "n", [n, BIG if n == 0 else ""])
            for client in clients:
                assert (await client.receive())["payload"][0] == n
            if n == 1:
                await until(lambda: all(conn.outgoing.writing == "writer" for conn in bad))
        await until(lambda: len(left) == 50)
        assert {code for _, code in left} == {1013} and ws._hub.stats()["evicted"] == 50


def is_ours(task: asyncio.Task[Any]) -> bool:
    coroutine: Any = task.get_coro()
    return coroutine.cr_code.co_filename == pachinko.__file__


async def test_nothing_waits_for_a_client_that_was_evicted_in_a_group_send() -> None:
    """The task that was writing to it ends, although the client never reads again."""
    ws, left = endpoint(outbox=4)
    async with served(ws) as server, Stalled(f"{server.url}/bad"):
        conn = named(ws, "bad")
        await conn.send("fill", BIG)
        while not conn.closed:
            await ws._hub.send("all", "n", 1)
            await asyncio.sleep(0)
        await until(lambda: not ws._hub.state.serving)
        assert left == [("bad", 1013)]
        await until(lambda: not any(is_ours(task) for task in asyncio.all_tasks()))


# A reply that waits


replies = pytest.mark.parametrize("how", ["big", "late big"], ids=["at once", "after a pause"])


async def waiting(ws: Pachinko, client: Stalled, how: str) -> Connection:
    """Ask until a reply waits for *client*, which is watched meanwhile."""
    conn = named(ws, "slow")
    await client.send({"type": how, "id": 1})
    await client.send({"type": how, "id": 2})
    await until(lambda: conn.outgoing.writing and session_of(conn).incoming._ahead is not None)
    return conn


@replies
async def test_a_reply_waits_at_most_send_timeout(how: str) -> None:
    """Then the client is evicted; it sees 1013 if it reads again at once."""
    ws, left = endpoint(send_timeout=0.1)
    async with served(ws) as server, Stalled(f"{server.url}/slow") as client:
        conn = await waiting(ws, client, how)
        await until(lambda: conn.closed)
        data = await client.read_all()
        assert data.endswith(b"\x88\x0a\x03\xf5too slow")
        await until(lambda: not ws._hub.state.serving)
        assert left == [("slow", 1013)] and ws._hub.stats()["evicted"] == 1


@replies
async def test_a_client_that_vanishes_while_its_reply_waits_is_noticed(how: str) -> None:
    """Its disconnect handlers run at once."""
    ws, left = endpoint()
    async with served(ws) as server, Stalled(f"{server.url}/slow") as client:
        await waiting(ws, client, how)
        client.socket.close()
        await until(lambda: not ws._hub.state.serving)
        assert len(left) == 1


@replies
async def test_a_backlog_behind_a_reply_that_waited_lingers(how: str) -> None:
    """A handler that goes on after its client has gone is bounded, whatever waited before it."""
    ws, left = endpoint(linger=0.1)
    began = asyncio.Event()

    @ws.on("nap")
    async def nap(conn: Connection) -> None:
        began.set()
        await asyncio.Event().wait()

    async with served(ws) as server, Stalled(f"{server.url}/slow") as client:
        conn = await waiting(ws, client, how)
        await client.send({"type": "nap"})
        await until(lambda: session_of(conn).incoming._inbox)
        client.socket.close()
        await until(lambda: not ws._hub.state.serving)
        assert len(left) == 1 and began.is_set()


@replies
@pytest.mark.parametrize("end", ["conn.close", "close_group", "shutdown"])
async def test_a_close_comes_behind_a_reply_that_waits(end: str, how: str) -> None:
    """Once the client reads again it sees the reply, and then the close frame."""
    ws, left = endpoint()
    async with served(ws) as server, Stalled(f"{server.url}/slow") as client:
        conn = await waiting(ws, client, how)
        stopping = None
        if end == "conn.close":
            await conn.close(4001)
        elif end == "close_group":
            await ws._hub.close_group("all", 4001)
        else:
            stopping = asyncio.create_task(server.stop())
            await until(lambda: server.uvicorn.should_exit)
        data = await client.read_all()
        if stopping is None:
            assert [frame["id"] for frame in frames_in(data)] == [1, 2]
            assert data.endswith(struct.pack(">BBH", 0x88, 2, 4001))
        else:
            await stopping
        await until(lambda: not ws._hub.state.serving)
        assert left == [("slow", 1012 if stopping else 4001)]


@replies
async def test_a_close_behind_a_reply_that_waits_is_bounded(how: str) -> None:
    """A client that does not read again is given up all the same."""
    ws, left = endpoint(linger=0.1, send_timeout=0.1)
    async with served(ws) as server, Stalled(f"{server.url}/slow") as client:
        conn = await waiting(ws, client, how)
        await conn.close(4001)
        await until(lambda: not ws._hub.state.serving)
        assert left == [("slow", 4001)]


@replies
async def test_a_connection_outlives_a_reply_that_waited(how: str) -> None:
    """When the client reads again in time, nothing bounds what follows, and order is kept."""
    ws, left = endpoint()
    async with served(ws) as server, Stalled(f"{server.url}/slow") as client:
        conn = await waiting(ws, client, how)
        await ws._hub.send("all", "n", "pushed")
        sending = asyncio.create_task(conn.send("n", "sent"))
        await until(
            lambda: conn.outgoing.outbox is not None and len(conn.outgoing.outbox.queue) == 2
        )
        reading = asyncio.create_task(client.read_all())
        await sending
        await until(lambda: not conn.outgoing.writing)
        assert (
            session_of(conn)._life is not None
            and session_of(conn)._life._timer is None
            and conn.outgoing._patience is None
        )
        await client.send({"type": "echo", "id": 3, "payload": "again"})
        await until(
            lambda: session_of(conn).incoming.received == 3 and not session_of(conn).is_handling
        )
        await conn.close(4001)
        payloads = [frame["payload"] for frame in frames_in(await reading)]
        assert payloads == [BIG, BIG, "pushed", "sent", "again"]
        await until(lambda: left)
        assert left == [("slow", 4001)]


@replies
async def test_messages_pushed_behind_a_reply_that_waits_are_bounded(how: str) -> None:
    """Over the bound the client is evicted at once, without waiting for the reply."""
    ws, left = endpoint(outbox=4)
    async with served(ws) as server, Stalled(f"{server.url}/slow") as client:
        conn = await waiting(ws, client, how)
        for n in range(4):
            await ws._hub.send("all", "n", n)
        assert not conn.closed
        await ws._hub.send("all", "n", 4)
        assert conn.closed
        await until(lambda: left)
        assert left == [("slow", 1013)]


@replies
async def test_messages_dropped_behind_a_reply_that_waits_are_announced(how: str) -> None:
    """With `overflow="drop_oldest"` the reply arrives, then the newest, then the gap."""
    ws, _ = endpoint(outbox=2, overflow="drop_oldest")
    async with served(ws) as server, Stalled(f"{server.url}/slow") as client:
        conn = await waiting(ws, client, how)
        for n in range(5):
            await ws._hub.send("all", "n", n)
        reading = asyncio.create_task(client.read_all())
        await until(lambda: not conn.outgoing.writing)
        await conn.close(4001)
        payloads = [frame["payload"] for frame in frames_in(await reading)]
        assert payloads == [BIG, BIG, 3, 4, {"group": "all"}]


async def test_an_eviction_in_the_turn_in_which_a_reply_begins_to_wait_acts_at_once() -> None:
    """The reply is given up before the loop has had a turn to bound it."""
    ws, left = endpoint(outbox_bytes=1000)
    gate = asyncio.Event()

    async def wait() -> None:
        await gate.wait()

    async with Fake(ws, "slow") as slow, Fake(ws, "other") as other:
        slow.before = wait
        slow.ask("echo", 1)
        other.ask("spread", "x" * 2000)  # read in the same turn, behind it
        await until(lambda: left)
        assert left == [("slow", 1013)]


# Cancellation


async def test_a_sender_cancelled_while_it_waits_hands_over_to_the_next() -> None:
    """The connection can be written to as before, by whoever was behind it and anybody else."""
    ws, left = endpoint()
    async with served(ws) as server, Stalled(f"{server.url}/slow") as client:
        conn = named(ws, "slow")
        await conn.send("n", BIG)
        first = asyncio.create_task(conn.send("n", "first"))
        await until(lambda: conn.outgoing.writing)
        second = asyncio.create_task(conn.send("n", "second"))
        await until(lambda: conn.outgoing.outbox is not None)
        first.cancel()
        reading = asyncio.create_task(client.read_all())
        await second
        with pytest.raises(asyncio.CancelledError):
            await first
        await conn.send("n", "third")
        await ws._hub.send("all", "n", "fourth")
        await conn.close(4001)
        payloads = [frame["payload"] for frame in frames_in(await reading)]
        assert payloads == [BIG, "second", "third", "fourth"]
        await until(lambda: left)


async def test_a_handler_that_cancels_a_group_send_leaves_nobody_marked() -> None:
    """A time limit around `hub.send` costs the sender its wait, and no receiver its message."""
    ws, _ = endpoint()

    @ws.on("hurry")
    async def hurry(conn: Connection) -> str:
        sending = asyncio.create_task(ws._hub.send("all", "n", "sent"))
        await asyncio.sleep(0)
        sending.cancel()
        return "hurried"

    async with contextlib.AsyncExitStack() as stack:
        clients = await fakes(stack, ws, 2 * pachinko._TURN)
        clients[0].ask("hurry")
        await until(lambda: all(client.sent for client in clients[1:]))
        await until(lambda: len(clients[0].sent) == 2)
        await ws._hub.send("all", "n", "again")
        await until(lambda: not any(client.conn.outgoing.writing for client in clients))
        assert sorted(clients[0].payloads()) == ["again", "hurried", "sent"]
        assert all(client.payloads() == ["sent", "again"] for client in clients[1:])


async def test_a_sender_behind_the_librarys_own_writer_waits_at_most_send_timeout() -> None:
    """What a hub sends has no time limit of its own; whoever waits behind it evicts the client."""
    ws, left = endpoint(send_timeout=0.1)
    async with served(ws) as server, Stalled(f"{server.url}/slow"):
        conn = named(ws, "slow")
        while not conn.outgoing.writer:
            await ws._hub.send_to(conn, "fill", BIG)
            await asyncio.sleep(0)
        with pytest.raises(falcon.WebSocketDisconnected):
            await conn.send("late", {})
        await until(lambda: left)
        assert left == [("slow", 1013)] and ws._hub.stats()["evicted"] == 1


# What goes out, by every way


class Text(str):
    """A text of another library, such as `markupsafe.Markup`."""

    def __str__(self) -> str:
        return "not what it is"


class Count(int):
    """An integer of another library, such as `bson.Int64`."""

    def __repr__(self) -> str:
        return "not what it is"


class Mean(float):
    """A number of another library, such as `numpy.float64`."""

    def __repr__(self) -> str:
        return "not what it is"


class Level(enum.IntEnum):
    LOW = 1


class Colour(enum.StrEnum):
    RED = "red"


class Size(str, enum.Enum):  # noqa: UP042 - it is not the same
    BIG = "big"


class Right(enum.IntFlag):
    READ = 1
    WRITE = 2


class Pair(NamedTuple):
    first: Any
    second: Any


class Rows(list[Any]):
    pass


class Row(dict[str, Any]):
    pass


class Columns(tuple[Any, ...]):
    pass


class Moment(datetime.datetime):
    """A time of another library, such as `pandas.Timestamp`."""


class Day(datetime.date):
    pass


class Clock(datetime.time):
    pass


class Span(datetime.timedelta):
    pass


class Amount(Decimal):
    pass


class Key(UUID):
    pass


class Blob(bytes):
    pass


class Buffer(bytearray):
    pass


@attrs.frozen
class Item:
    name: str
    price: Any = attrs.field(default=0.0, alias="unitPrice")
    _note: str = ""


@dataclasses.dataclass
class Box:
    items: list[Item]
    tags: Any = None


class Movie(TypedDict):
    name: str
    stars: NotRequired[Any]


LIKE_JSON: list[Any] = [  # json.dumps takes these
    Text("<b>"), Count(7), Count(2**70), Mean(1.5), Level.LOW, Colour.RED, Size.BIG,
    Right.READ | Right.WRITE, Pair(Count(1), Text("a")), Rows([Mean(2.5)]), Columns((Text("x"),)),
    Row(a=Text("b")), OrderedDict(a=Count(1)), defaultdict(list, {"a": [Text("b")]}),
    Counter("aab"), {Text("k"): Count(1)}, {Count(1): "a"}, {Mean(1.5): "a"}, {1: "a", "b": 2},
    {1.5: 1}, {True: 1, False: 2}, {Level.LOW: Level.LOW}, {Colour.RED: Colour.RED},
    {Size.BIG: 1}, {"a": [{"b": (Text("c"), {Text("d"): [Mean(0.1)]})}]}, 2**80, [], {}, "",
    "\ud83d\ude00", ["é", "😀", "\x00", "\u2028"],
]  # fmt: skip
OTHERS: list[tuple[Any, Any]] = [
    ("\ud83d", "\ufffd"), ("a\ud83db", "a\ufffdb"), ({"\ud83d": "\ude00"}, {"\ufffd": "\ufffd"}),
    ([{"a": ("\udcff", Count(1), {"b": Text("\ud83d!")})}],
     [{"a": ["\ufffd", 1, {"b": "\ufffd!"}]}]),
    ({"\ud83d": Text("a"), "n": [1.5, None]}, {"\ufffd": "a", "n": [1.5, None]}),
    ({"a": msgspec.Raw(b"[1]"), "b": "\ud83d", Level.LOW: True},
     {"a": [1], "b": "\ufffd", "1": True}),
    (Item("\ud83d", Text("x")), {"name": "\ufffd", "unitPrice": "x", "note": ""}),
    (["\ud83d", b"hi", UUID(int=1), {1, }], ["\ufffd", "aGk=", str(UUID(int=1)), [1]]),
    (["\ud83d", math.nan], ["\ufffd", None]), (Mean("nan"), None), ([Mean("-inf")], [None]),
    (Item("a", Mean(2.5), Text("n")), {"name": "a", "unitPrice": 2.5, "note": "n"}),
    (Box([Item(Text("a"))], {Count(1): Text("x")}),
     {"items": [{"name": "a", "unitPrice": 0.0, "note": ""}], "tags": {"1": "x"}}),
    (Moment(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC), "2026-01-02T03:04:05Z"),
    (Moment(2026, 1, 2, 3, 4, 5, 6), "2026-01-02T03:04:05.000006"), (Day(2026, 1, 2), "2026-01-02"),
    (Clock(3, 4, 5), "03:04:05"), (Span(seconds=90), "PT90S"), (Amount("1.10"), "1.10"),
    (Key(int=1), str(UUID(int=1))), (Blob(b"hi"), "aGk="), (Buffer(b"hi"), "aGk="),
    ({Key(int=1): 1, Day(2026, 1, 2): 2}, {str(UUID(int=1)): 1, "2026-01-02": 2}),
    (msgspec.Raw(b'{"a":[1]}'), {"a": [1]}), ({"a": [msgspec.Raw(b"1")]}, {"a": [1]}),
]  # fmt: skip
SENT = [*((value, json.loads(json.dumps(value))) for value in LIKE_JSON), *OTHERS]


WAYS = ["reply", "item", "push", "group", "one", "everybody", "refused", "mended"]
Ask = Callable[[str], Awaitable[Envelope]]  # a way, to the first message that comes back


@contextlib.asynccontextmanager
async def sending(
    value: Any, *bugs: type[BaseException]
) -> AsyncIterator[tuple[Ask, Callable[[], Awaitable[Envelope]]]]:
    """An endpoint with a message type for each way to send *value*: its client's ask and receive.

    A handler that sends it may fail with one of *bugs*.
    """
    ws, _ = endpoint()
    hub = ws._hub

    @ws.on("reply")
    async def reply(conn: Connection) -> Any:
        return value

    @ws.on("item")
    async def item(conn: Connection) -> AsyncIterator[Any]:
        yield value

    @ws.on("push")
    async def push(conn: Connection) -> None:
        await conn.send("got", value)

    @ws.on("group")
    async def group(conn: Connection) -> None:
        await hub.send("all", "got", value)

    @ws.on("one")
    async def one(conn: Connection) -> None:
        await hub.send_to(conn.id, "got", value)

    @ws.on("everybody")
    async def everybody(conn: Connection) -> None:
        await hub.broadcast("got", value)

    @ws.on("refused")
    async def refused(conn: Connection) -> None:
        raise MessageError("refused", "no", value=value)

    @ws.on("mended")
    async def mended(conn: Connection) -> None:
        raise KeyError

    @ws.error(KeyError)
    async def mend(conn: Connection, exc: KeyError) -> Any:
        return value

    async with simulate(ws._app) as sim:
        client = await sim.connect("/ada")

        async def ask(way: str) -> Envelope:
            with sim.bugs(*bugs) if bugs else contextlib.nullcontext():
                await client.send(way, id=7)
                return await client.receive()

        yield ask, client.receive


@pytest.mark.parametrize(("value", "sent"), SENT)
async def test_what_json_can_say_goes_out_by_every_way(value: Any, sent: Any) -> None:
    """Replies, items, messages, group messages and errors go out alike, as `json.dumps` has it."""
    async with sending(value) as (ask, receive):
        for way in WAYS:
            answer = await ask(way)
            payload = answer.payload
            assert (payload["value"] if way == "refused" else payload) == sent, answer
            rest = {"push": 1, "group": 1, "one": 1, "everybody": 1, "item": 1}.get(way, 0)
            for _ in range(rest):
                assert (await receive()).id == 7


class Odd:
    """What cannot be sent."""


V = TypeVar("V")


@attrs.frozen
class Holey:
    x: int | UnsetType = UNSET
    y: Any = None


class Holed(msgspec.Struct, rename="camel"):
    x: int | UnsetType = UNSET
    last_part: Any = None


class Cell(msgspec.Struct, Generic[V]):
    value: V


UNSENDABLE: list[tuple[Any, str]] = [
    ([type("bool", (), {"__module__": "numpy"})()], "$.payload[0]: cannot send a numpy.bool"),
    (Odd(), "$.payload: cannot send a Odd"),
    ({"items": [1, 2, 3, {"when": Odd()}]}, "$.payload.items[3].when: cannot send a Odd"),
    ({"a b": (1, {"": Odd()})}, '$.payload["a b"][1][""]: cannot send a Odd'),
    ({1: Odd()}, '$.payload["1"]: cannot send a Odd'),
    ([range(2)], "$.payload[0]: cannot send a range"),
    ({"x" * 100: Odd()}, f"$.payload.{'x' * 64}: cannot send a Odd"),
    ({"a": {(1, 2): 3}}, "$.payload.a: cannot send a tuple as a key"),
    ({"a": {None: 3}}, "$.payload.a: cannot send a NoneType as a key"),
    ({Odd(): 3}, "$.payload: cannot send a Odd as a key"),
    (Item("a", Odd()), "$.payload.unitPrice: cannot send a Odd"),
    (Box([Item("a"), Item("b", {"c": 1j})]),
     "$.payload.items[1].unitPrice.c: cannot send a complex"),
    (Box([cast(Any, 5)]), "$.payload.items[0]: cannot send a int"),
    (Box(cast(Any, 5)), "$.payload.items: cannot send a int"),
    (Holey(y=Odd()), "$.payload.y: cannot send a Odd"),
    (Holed(last_part=[Holed(last_part=Odd())]),
     "$.payload.lastPart[0].lastPart: cannot send a Odd"),
    ([Holed(x=cast(Any, Odd()))], "$.payload[0].x: cannot send a Odd"),
    (Cell(Odd()), "$.payload.value: cannot send a Odd"),
    ([1, UNSET], "$.payload[1]: cannot send a UnsetType"),
    (deque([[Odd()]]), "$.payload[0][0]: cannot send a Odd"),
    ([Pair(1, Odd())], "$.payload[0][1]: cannot send a Odd"),
    ({"a": {Odd}}, "$.payload.a[0]: cannot send a type"),
    (["\ud83d", 1j], "$.payload[1]: cannot send a complex"),
    ((x for x in ()), "$.payload: cannot send a generator"),
    ({"a": [b"", ValueError("x")]}, "$.payload.a[1]: cannot send a ValueError"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "text"), UNSENDABLE)
async def test_what_cannot_go_out_is_named_with_its_path(
    value: Any, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever sends gets it as an exception. In a handler it is a bug, and the log has it."""
    async with sending(value, TypeError) as (ask, _):
        for way in WAYS:
            answer = await ask(way)
            assert (answer.payload["code"], answer.id) == ("internal_error", 7)
            path = text.replace("$.payload", "$.payload.value") if way == "refused" else text
            assert f"TypeError: {path}\n" in caplog.text
            caplog.clear()


Node = dict[str, Any]


def loops() -> list[Any]:
    """Values that contain themselves, and one that is too deep for any encoder."""
    items: list[Any] = []
    items.append(items)
    pairs: Node = {}
    pairs["again"] = {"a": pairs}
    box = Box([])
    box.tags = box
    boxes = Box([])
    boxes.tags = [boxes]
    deep: list[Any] = []
    for _ in range(20_000):
        deep = [deep]
    return [items, pairs, box, boxes, deep]


@pytest.mark.parametrize("value", loops(), ids=["list", "dict", "object", "in a list", "deep"])
async def test_what_contains_itself_is_an_error(
    value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A circle, or an abyss, ends in a clear error, and the connection goes on."""
    text = "TypeError: $.payload: nested too deeply, or a part of itself\n"
    async with sending(value, TypeError) as (ask, _):
        for way in WAYS:
            assert (await ask(way)).payload["code"] == "internal_error"
            assert text in caplog.text
            caplog.clear()


DECLARED: list[tuple[Any, Any, str]] = [
    (list[Item], [Item("a"), {"name": "b"}], "$.payload[1]: cannot send a dict"),
    (Movie, {"name": "a", "stars": [Odd()]}, "$.payload.stars[0]: cannot send a Odd"),
    (dict[str, Item], {"a": Item("a", Odd())}, "$.payload.a.unitPrice: cannot send a Odd"),
    (tuple[int, Item], (1, Item("a", [Odd()])), "$.payload[1].unitPrice[0]: cannot send a Odd"),
    (tuple[Item, ...], (Item("a"), Item("b", Odd())), "$.payload[1].unitPrice: cannot send a Odd"),
    (Item | Movie, Item("a", Odd()), "$.payload.unitPrice: cannot send a Odd"),
    (list[Item] | None, [Item("a", Odd())], "$.payload[0].unitPrice: cannot send a Odd"),
    (int, Odd(), "$.payload: cannot send a Odd"),
    (list[Item | None], [None, Item("a", Odd())], "$.payload[1].unitPrice: cannot send a Odd"),
    (
        list[list[Item] | str],
        ["", [Item("a", Odd())]],
        "$.payload[1][0].unitPrice: cannot send a Odd",
    ),
]


@pytest.mark.parametrize(("declared", "value", "text"), DECLARED)
async def test_a_declared_reply_is_looked_into_by_its_declaration(
    declared: Any, value: Any, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The path leads to the part that its declared type does not send."""
    ws, _ = endpoint()

    async def reply(conn: Connection) -> Any:
        return value

    reply.__annotations__["return"] = declared
    ws.on("reply")(reply)
    async with simulate(ws._app) as sim:
        client = await sim.connect("/ada")
        for id in (1, 2):
            with sim.bugs(TypeError):
                await client.send("reply", id=id)
                answer = await client.receive()
            assert (answer.payload["code"], answer.id) == ("internal_error", id)
    assert f"TypeError: {text}\n" in caplog.text


async def test_the_error_of_a_hook_is_the_cause() -> None:
    """A hook of the application that fails is seen beside the path of the value."""

    hub = Hub()
    converter = hub.converter.copy()

    @converter.register_unstructure_hook
    def write(item: Item) -> str:
        raise KeyError("no such item")

    hub.configure(converter=converter)
    async with hub.open("memory://"):
        with pytest.raises(TypeError, match=r"^\$\.payload\.at: cannot send a Item$") as raised:
            await hub.send("all", "n", {"at": Item("a")})
    assert repr(raised.value.__cause__) == "KeyError('no such item')"


async def test_a_group_whose_name_is_no_utf8_is_sent_to() -> None:
    """Its messages and gaps go out, with U+FFFD for what is wrong in the name."""
    ws, _ = endpoint()

    @ws.on("join")
    async def join(conn: Connection) -> None:
        await conn.join("\ud83d")

    async with served(ws) as server, connect(f"{server.url}/ada") as client:
        await client.ask("join")
        await ws._hub.send("\ud83d", "n\ud83d", "\ud83d")
        assert await client.receive() == {"type": "n\ufffd", "group": "\ufffd", "payload": "\ufffd"}
    assert json.loads(pachinko.gap_of("\ud83d"))["payload"] == {"group": "\ufffd"}


async def test_a_worker_sends_half_a_surrogate_pair() -> None:
    """It does not fail, and so needs no further start."""
    ws, _ = endpoint()
    begun = list[int]()

    @ws.worker
    async def clock() -> None:
        begun.append(1)
        await until(lambda: ws._hub.members("all"))
        await ws._hub.send("all", "n", {"text": "\ud83d"})

    async with served(ws) as server, connect(f"{server.url}/ada") as client:
        assert (await client.receive())["payload"] == {"text": "\ufffd"}
    assert begun == [1]
