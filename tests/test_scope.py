"""A message's scope: middleware around all of it, its context, and values that are provided."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import weakref
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterator
from contextvars import ContextVar
from typing import Annotated, Any, Generic, NewType, Protocol, TypeVar

import attrs
import falcon
import falcon.asgi
import pytest
from support import PATIENCE, connect, new_app, serving, simulated, turns, until
from test_session import Said, Session, clean, endpoint, no_collection, recording

import pachinko
from pachinko import Close, Connection, Envelope, Hub, MessageError, Pachinko, PachinkoError

__all__ = ["no_collection"]  # a fixture, here too

NAME: ContextVar[str] = ContextVar("NAME", default="nobody")
T = TypeVar("T")


class Db:
    """What a provider makes: it notes how it ends."""

    def __init__(self, notes: list[Any]) -> None:
        self.notes = notes

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[Db]:
        self.notes.append("open")
        try:
            yield self
        except BaseException as exc:
            self.notes.append(type(exc).__name__)
            raise
        else:
            self.notes.append("commit")
        finally:
            self.notes.append("close")


def with_db(**options: Any) -> tuple[Pachinko, list[Any]]:
    """An endpoint that provides a `Db`, and what becomes of it."""
    ws, notes = endpoint(**options), list[Any]()

    @ws.provide
    async def db(conn: Connection) -> AsyncIterator[Db]:
        async with Db(notes).opened() as db:
            yield db

    return ws, notes


def noting(ws: Pachinko) -> list[Any]:
    """A middleware that notes how each message ends."""
    notes: list[Any] = []

    @ws.middleware
    async def around(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        notes.append(envelope.type)
        try:
            result = await call_next()
        except BaseException as exc:
            notes.append(type(exc).__name__)
            raise
        notes.append(result)
        return result

    return notes


# Middleware is around all of a message


async def test_middleware_ends_after_the_last_item_and_before_the_final_frame() -> None:
    """What it opens for a stream is open for every item, and closed before ``complete``."""
    ws, open_, order = endpoint(), set[str](), list[Any]()

    @ws.middleware
    async def session(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        open_.add("db")
        result = await call_next()
        open_.remove("db")
        order.append(result)
        await conn.send("closed")
        return ["ignored"]

    @ws.on("count")
    async def count(conn: Connection, n: int) -> AsyncIterator[int]:
        for i in range(n):
            order.append(bool(open_))
            yield i
        order.append(bool(open_))

    async with Session(ws) as client:
        await client.send("count", 2, id=1)
        got = [await client.receive() for _ in range(4)]
    assert [each["type"] for each in got] == ["count.reply", "count.reply", "closed", "complete"]
    assert order == [True, True, True, None]


async def test_an_error_between_two_items_passes_through_middleware() -> None:
    """The one final frame is the error; a middleware may make another of it, or none."""
    ws = endpoint()

    @ws.middleware
    async def translate(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        try:
            await call_next()
        except KeyError:
            raise MessageError("missing") from None
        except ValueError:
            return "swallowed"

    @ws.on("fail")
    async def fail(conn: Connection, key: bool) -> AsyncIterator[int]:
        yield 1
        raise KeyError if key else ValueError

    async with Session(ws) as client:
        assert (await client.ask("fail", True))["payload"] == 1
        assert (await client.receive())["payload"]["code"] == "missing"
        assert (await client.ask("fail", False))["payload"] == 1
        assert await client.receive() == {"type": "complete", "id": 1}


async def test_an_item_that_cannot_be_sent_passes_through_middleware() -> None:
    """The error of an item is that of its stream."""
    ws = endpoint()
    notes = noting(ws)

    @ws.on("odd")
    async def odd(conn: Connection) -> AsyncIterator[Any]:
        yield object()

    async with Session(ws) as client:
        assert (await client.ask("odd"))["payload"]["code"] == "internal_error"
    assert len(notes) == 2 and notes[1] not in ("CancelledError", None)


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_stop_passes_through_middleware(leaves: bool) -> None:
    """``complete`` and a departure cancel the stream, and the middleware sees it."""
    ws = endpoint()
    notes = noting(ws)

    @ws.on("ticks")
    async def ticks(conn: Connection) -> AsyncIterator[int]:
        yield 1
        await asyncio.Event().wait()

    async with Session(ws) as client:
        await client.ask("ticks", id=3)
        if leaves:
            await client.close()
        else:
            assert await client.ask("complete", id=3) == {"type": "complete", "id": 3}
        await until(lambda: len(notes) > 1)
    assert notes == ["ticks", "CancelledError"]


async def test_the_clean_up_of_middleware_is_not_cancelled() -> None:
    """A ``complete`` that comes after the last item does not interrupt a commit."""
    ws, is_last, may_go_on = endpoint(), asyncio.Event(), asyncio.Event()
    notes: list[str] = []

    @ws.middleware
    async def commit(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        await call_next()
        is_last.set()
        await may_go_on.wait()
        notes.append("committed")

    @ws.on("count")
    async def count(conn: Connection) -> AsyncIterator[int]:
        yield 1

    async with Session(ws) as client:
        await client.ask("count", id=1)
        await asyncio.wait_for(is_last.wait(), PATIENCE)
        (session,) = ws._hub.state.serving.values()
        await client.send("complete", id=1)
        await until(lambda: session.incoming.received == 2)
        may_go_on.set()
        assert await client.receive() == {"type": "complete", "id": 1}
    assert notes == ["committed"]


async def test_a_stop_that_middleware_catches_lets_no_stream_begin() -> None:
    """Stopped while a middleware waits, a stream stays stopped."""
    ws, waits, notes = endpoint(), asyncio.Event(), list[str]()

    @ws.middleware
    async def stubborn(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        waits.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return await call_next()

    @ws.on("count")
    async def count(conn: Connection) -> AsyncIterator[int]:
        notes.append("begun")
        yield 1

    async with Session(ws) as client:
        await client.send("count", id=1)
        await asyncio.wait_for(waits.wait(), PATIENCE)
        assert await client.ask("complete", id=1) == {"type": "complete", "id": 1}
    assert notes == []


async def test_a_stream_runs_once(caplog: pytest.LogCaptureFixture) -> None:
    """Its items are out; to call it again is a bug, and says so in the log."""
    ws = endpoint()

    @ws.middleware
    async def twice(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        await call_next()
        return await call_next()

    @ws.on("count")
    async def count(conn: Connection) -> AsyncIterator[int]:
        yield 1

    async with Session(ws) as client:
        assert (await client.ask("count"))["payload"] == 1
        assert (await client.receive())["payload"]["code"] == "internal_error"
    assert "await call_next() once" in caplog.text


async def test_a_plain_handler_may_be_tried_again() -> None:
    """A middleware that retries calls the handler anew, with the same payload."""
    ws, tries = endpoint(), list[int]()

    @ws.middleware
    async def retry(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        with contextlib.suppress(ConnectionError):
            return await call_next()
        return await call_next()

    @ws.on("save")
    async def save(conn: Connection, *, n: int) -> int:
        tries.append(n)
        if len(tries) == 1:
            raise ConnectionError
        return n

    async with Session(ws) as client:
        assert (await client.ask("save", {"n": 4}))["payload"] == 4
    assert tries == [4, 4]


async def test_text_and_bytes_pass_through_middleware() -> None:
    """The fallback's and the binary handler's messages have no type."""
    ws, seen = endpoint(), list[Envelope]()

    @ws.middleware
    async def around(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        seen.append(envelope)
        if envelope.payload == b"no":
            return Said("refused")
        return await call_next()

    @ws.middleware
    async def inner(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        said = await call_next()
        return Said(said.text + "!")

    @ws.fallback
    async def text(conn: Connection, frame: str) -> Said:
        return Said(frame)

    @ws.binary
    async def data(conn: Connection, data: bytes) -> Said:
        return Said(data.decode())

    async with Session(ws) as client:
        for frame, answer in (("a", "a!"), (b"b", "b!"), (b"no", "refused")):
            await client.raw(frame)
            assert (await client.receive())["payload"] == {"text": answer}
    assert seen == [Envelope("", "a"), Envelope("", b"b"), Envelope("", b"no")]
    assert (seen[0].id, seen[0].group, seen[0].at) == (None, None, None)


# Contexts


def register(ws: Pachinko, f: Any) -> None:
    """*f* notes and sets `NAME` as a handler of each kind."""

    @ws.on("plain")
    async def plain(conn: Connection, name: str) -> str:
        return await f(name)

    @ws.on("concurrent", concurrent=True)
    async def concurrent(conn: Connection, name: str) -> str:
        return await f(name)

    @ws.on("stream")
    async def stream(conn: Connection, name: str) -> AsyncIterator[str]:
        yield await f(name)
        assert NAME.get() == name

    @ws.fallback
    async def fallback(conn: Connection, frame: str) -> Said:
        return Said(await f(frame))

    @ws.binary
    async def binary(conn: Connection, data: bytes) -> Said:
        return Said(await f(data.decode()))


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("by", ["middleware", "provider"])
async def test_each_message_has_a_context_of_its_own(by: str, waits: bool) -> None:
    """What a connect handler sets is seen by all messages; what a message sets, by none."""
    ws = endpoint()
    if by == "middleware":

        @ws.middleware
        async def around(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
            return await call_next()
    else:

        @ws.provide
        async def unused(conn: Connection) -> Db:
            raise AssertionError

    @ws.connect
    async def arrive(conn: Connection) -> None:
        NAME.set("connected")

    async def f(name: str) -> str:
        before, task = NAME.get(), asyncio.current_task()
        NAME.set(name)
        if waits:
            await asyncio.sleep(0)
            async with asyncio.timeout(PATIENCE):
                await asyncio.wait_for(turns(), PATIENCE)
        assert NAME.get() == name and asyncio.current_task() is task
        return before

    left: list[str] = []

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        left.append(NAME.get())

    register(ws, f)
    async with Session(ws) as client:
        for type in ("plain", "concurrent", "stream") * 2:
            assert (await client.ask(type, type))["payload"] == "connected", type
            if type == "stream":
                assert (await client.receive())["type"] == "complete"
        for frame in ("text", b"bytes") * 2:
            await client.raw(frame)
            assert (await client.receive())["payload"] == {"text": "connected"}
    await until(lambda: left)
    assert left == ["connected"]


async def test_without_middleware_plain_handlers_share_the_connections_context() -> None:
    """A plain handler costs nothing more, and sees what the one before has set."""
    ws = endpoint()

    async def f(name: str) -> str:
        before = NAME.get()
        NAME.set(name)
        return before

    register(ws, f)
    async with Session(ws) as client:
        assert (await client.ask("plain", "a"))["payload"] == "nobody"
        assert (await client.ask("concurrent", "b"))["payload"] == "a"
        assert (await client.ask("plain", "c"))["payload"] == "a"
        await client.raw("d")
        assert (await client.receive())["payload"] == {"text": "c"}


async def test_messages_side_by_side_never_share_a_context() -> None:
    """A variable that a middleware sets belongs to its message, whatever runs beside it."""
    ws, all_in = endpoint(), asyncio.Barrier(4)

    @ws.middleware
    async def around(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        token = NAME.set(f"{envelope.type} {envelope.id}")
        try:
            return await call_next()
        finally:
            NAME.reset(token)

    @ws.on("get", concurrent=True)
    async def get(conn: Connection) -> str:
        await all_in.wait()
        return NAME.get()

    @ws.on("plain")
    async def plain(conn: Connection) -> str:
        await all_in.wait()
        return NAME.get()

    @ws.on("stream")
    async def stream(conn: Connection) -> AsyncIterator[str]:
        await all_in.wait()
        yield NAME.get()

    async with Session(ws) as client:
        await client.send("get", id=1)
        await client.send("get", id=2)
        await client.send("plain", id=3)
        await client.send("stream", id=4)  # begins while the plain handler waits
        got = [await client.receive() for _ in range(5)]
    answers = {each["payload"] for each in got if "payload" in each}
    assert answers == {"get 1", "get 2", "plain 3", "stream 4"}


async def test_the_log_of_a_bug_is_written_in_the_messages_context() -> None:
    """A request id that middleware binds, and does not reset, is in the traceback's record."""
    ws, seen = endpoint(), list[str]()

    @ws.middleware
    async def around(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        NAME.set(str(envelope.id))
        return await call_next()

    @ws.on("fail")
    async def fail(conn: Connection) -> None:
        raise KeyError

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(NAME.get())

    handler = Handler(logging.ERROR)
    pachinko.logger.addHandler(handler)
    try:
        async with Session(ws) as client:
            assert (await client.ask("fail", id="r1"))["payload"]["code"] == "internal_error"
    finally:
        pachinko.logger.removeHandler(handler)
    assert seen == ["r1"]


async def test_a_time_limit_and_a_cancellation_reach_into_a_context() -> None:
    """`handler_timeout`, and the end of `linger`, cancel what runs in a context of its own."""
    ws = endpoint(handler_timeout=0.05, linger=0.05)
    notes = noting(ws)

    @ws.on("hang")
    async def hang(conn: Connection) -> None:
        await asyncio.Event().wait()

    @ws.fallback
    async def fallback(conn: Connection, frame: str) -> None:
        await asyncio.Event().wait()

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        for frame in ('{"type":"hang"}', "x", '{"type":"hang"}'):
            await client.raw(frame)
            await server.spend(0.05)
            assert (await client.receive())["payload"]["code"] == "handler_timeout"
    ws = endpoint(linger=0.05)
    notes = noting(ws)
    ws.on("hang")(hang)
    async with Session(ws) as client:
        await client.send("hang")
        await until(lambda: notes)
    await until(lambda: len(notes) == 2)
    assert notes == ["hang", "CancelledError"]


async def test_a_renewal_runs_in_the_connections_context() -> None:
    """No middleware sees it, and what it sets is seen by the messages behind it."""
    ws = endpoint()
    notes = noting(ws)

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        NAME.set(token or "")
        return token and "ada"

    @ws.on("get")
    async def get(conn: Connection) -> str:
        return NAME.get()

    async with Session(ws) as client:
        await client.ask("authenticate", {"token": "one"})
        assert (await client.ask("get"))["payload"] == "one"
        assert (await client.ask("authenticate", {"token": "two"}))["type"] == "authenticate.reply"
        assert (await client.ask("get"))["payload"] == "two"
    assert notes == ["get", "one", "get", "two"]


@pytest.mark.parametrize("how", ["plain", "concurrent", "stream", "fail"])
@pytest.mark.usefixtures("no_collection")
async def test_a_connection_with_a_scope_is_freed_at_its_end(how: str) -> None:
    """Neither contexts nor provided values hold it in a cycle, cancelled or failed."""
    ws, _ = with_db(linger=0)
    noting(ws)
    codes, seen = recording(ws), weakref.WeakSet[Connection]()

    @ws.on("plain")
    async def plain(conn: Connection, *, db: Db) -> None:
        seen.add(conn)
        await conn.send("waits")
        await asyncio.Event().wait()

    @ws.on("concurrent", concurrent=True)
    async def concurrent(conn: Connection, *, db: Db) -> None:
        await plain(conn, db=db)

    @ws.on("stream")
    async def stream(conn: Connection, *, db: Db) -> AsyncIterator[int]:
        seen.add(conn)
        yield 1
        await asyncio.Event().wait()

    @ws.on("fail")
    async def fail(conn: Connection, *, db: Db) -> None:
        seen.add(conn)
        raise MessageError("no")

    async with serving(ws._app) as server:
        async with connect(server.url + "/ws") as client:
            await client.ask(how)
            assert len(seen) == 1
        await clean(ws, codes)
        await until(lambda: not seen)


# What belongs to no client


async def test_workers_do_not_live_in_the_first_clients_context() -> None:
    """Without lifespan the first connection starts them, but none of its variables are theirs."""
    app, seen, tell = new_app(), list[str](), asyncio.Event()

    class Middleware:
        async def process_request_ws(self, req: Any, ws: Any) -> None:
            NAME.set("middleware")

    app.add_middleware(Middleware())
    ws = Pachinko(app, "/ws", hub=Hub())

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str:
        assert NAME.get() == "middleware"
        NAME.set("authenticate")
        return "ada"

    @ws.worker
    async def work() -> None:
        seen.append(NAME.get())
        await tell.wait()
        tell.clear()
        raise KeyError  # It is started again.

    async with serving(app, lifespan="off") as server, connect(f"{server.url}/ws") as client:
        await client.ask("x")
        tell.set()
        await until(lambda: len(seen) == 2)
    assert seen == ["nobody"] * 2


class Loopback:
    """A backplane that gives each message back to its process, from a task of its own."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()

    def note(self, what: str) -> None:
        self.seen.append((what, NAME.get()))

    async def start(self, deliver: Any, lost: Any) -> None:
        self.note("start")

        async def read() -> None:
            while True:
                await deliver(*await self.queue.get())

        self.task = asyncio.get_running_loop().create_task(read())

    async def stop(self) -> None:
        self.task.cancel()

    async def publish(self, subject: str, data: bytes) -> None:
        await self.queue.put((subject, data))

    async def subscribe(self, subject: str) -> None:
        self.note("subscribe")

    async def unsubscribe(self, subject: str) -> None:
        self.note("unsubscribe")


async def test_a_broker_is_not_read_in_a_clients_context() -> None:
    """Its connection, subscriptions and messages are those of all clients."""
    app, backplane = new_app(), Loopback()
    own = Hub()
    own.configure(backplane)
    ws, seen = Pachinko(app, "/ws", hub=own), list[str]()

    @ws.connect
    async def arrive(conn: Connection) -> None:
        NAME.set("client")
        await own.join("all", conn)

    @ws.on("say")
    async def say(conn: Connection) -> None:
        assert NAME.get() == "client"
        await own.send("all", "said")

    def noted(send: Any) -> Any:
        async def noting(event: Any) -> None:
            if "said" in event.get("text", ""):
                seen.append(NAME.get())
            await send(event)

        return noting

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            NAME.set("task")
        await app(scope, receive, noted(send))

    async with serving(outer, lifespan="off") as server, connect(f"{server.url}/ws") as client:
        await client.send("say")
        assert (await client.receive())["type"] == "said"
        await client.send("say")
        assert (await client.receive())["type"] == "said"
    assert seen == ["nobody"] * 2
    assert {what for what, _ in backplane.seen} >= {"start", "subscribe"}
    assert {name for _, name in backplane.seen} == {"nobody"}


async def test_a_drain_is_not_the_callers() -> None:
    """It outlives the handler that asks for it, and so it has nothing of its context."""
    app, seen = new_app(), list[str]()
    ws = Pachinko(app, "/ws", hub=Hub())

    @ws.on("drain", concurrent=True)
    async def drain(conn: Connection) -> None:
        NAME.set("operator")
        await ws._hub.drain()

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        async def noting(event: Any) -> None:
            if event["type"] == "websocket.close":
                seen.append(NAME.get())
            await send(event)

        await app(scope, receive, noting)

    async with simulated(outer) as server, connect(f"{server.url}/ws") as client:
        await client.send("drain")
        assert (await client.closed())[0] == 1012
    assert seen == ["nobody"]


# Values that are provided


async def test_a_handler_of_each_kind_gets_a_value_and_closes_it() -> None:
    """It is made for one call, and closed when that has ended."""
    ws, notes = with_db()

    @ws.connect
    async def arrive(conn: Connection, *, db: Db) -> None:
        notes.append("connect")

    @ws.disconnect
    async def leave(conn: Connection, *, db: Db) -> None:
        notes.append("disconnect")

    @ws.on("none")
    async def none(conn: Connection, *, db: Db) -> None:
        notes.append("none")

    @ws.on("whole")
    async def whole(conn: Connection, payload: int, *, db: Db) -> int:
        notes.append("whole")
        return payload

    @ws.on("fields", concurrent=True)
    async def fields(conn: Connection, *, a: int, db: Db, b: int = 2) -> int:
        notes.append("fields")
        return a + b

    @ws.on("stream")
    async def stream(conn: Connection, n: int, *, db: Db) -> AsyncIterator[int]:
        for i in range(n):
            notes.append(i)
            yield i

    @ws.fallback
    async def text(conn: Connection, frame: str, *, db: Db) -> None:
        notes.append(frame)
        await conn.send("text")

    @ws.binary
    async def data(conn: Connection, data: bytes, *, db: Db) -> None:
        notes.append(data)
        await conn.send("data")

    def taken() -> list[Any]:
        found = notes[:]
        notes.clear()
        return found

    async with Session(ws) as client:
        assert (await client.ask("none"))["type"] == "none.reply"
        assert taken() == [
            "open", "connect", "commit", "close", "open", "none", "commit", "close"
        ]  # fmt: skip
        assert (await client.ask("whole", 4))["payload"] == 4
        assert taken() == ["open", "whole", "commit", "close"]
        assert (await client.ask("fields", {"a": 1, "db": {}}))["payload"] == 3
        assert taken() == ["open", "fields", "commit", "close"]
        assert (await client.ask("stream", 2))["payload"] == 0
        assert (await client.receive())["payload"] == 1
        assert (await client.receive())["type"] == "complete"
        assert taken() == ["open", 0, 1, "commit", "close"]
        for frame in ("text", b"data"):
            await client.raw(frame)
            await client.receive()
            await until(lambda: "close" in notes)
            assert taken() == ["open", frame, "commit", "close"]
    await until(lambda: "close" in notes)
    assert taken() == ["open", "disconnect", "commit", "close"]


async def test_a_resources_methods_get_values() -> None:
    """Each of its methods may take one."""
    ws, notes = with_db()

    class Todo:
        async def on_connect(self, conn: Connection, *, db: Db) -> None:
            notes.append("connect")

        async def on_add(self, conn: Connection, *, text: str, db: Db) -> str:
            return f"{text} {type(db).__name__}"

        async def on_disconnect(self, conn: Connection, *, db: Db) -> None:
            notes.append("disconnect")

    ws.add_resource("todo", Todo())
    async with Session(ws) as client:
        assert (await client.ask("todo.add", {"text": "a"}))["payload"] == "a Db"
    await until(lambda: notes.count("close") == 3)
    assert "connect" in notes and "disconnect" in notes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MessageError("no"), "no"),
        (falcon.HTTPNotFound(), "http_404"),
        (KeyError("a bug"), "internal_error"),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "stream"])
async def test_a_provider_sees_the_error(kind: str, error: Exception, code: str) -> None:
    """It is raised at the ``yield``, and then answered as without a provider."""
    ws, notes = with_db()

    @ws.on("plain")
    async def plain(conn: Connection, *, db: Db) -> None:
        raise error

    @ws.on("stream")
    async def stream(conn: Connection, *, db: Db) -> AsyncIterator[int]:
        yield 1
        raise error

    async with Session(ws) as client:
        answer = await client.ask(kind)
        if kind == "stream":
            answer = await client.receive()
        assert answer["payload"]["code"] == code
    assert notes == ["open", type(error).__name__, "close"]


async def test_a_value_is_closed_when_a_stream_is_stopped() -> None:
    """Also where the item that waits is not the generator's own."""
    ws, notes = with_db()

    @ws.on("ticks")
    async def ticks(conn: Connection, *, db: Db) -> AsyncIterator[int]:
        yield 1
        await asyncio.Event().wait()

    @ws.on("odd")
    async def odd(conn: Connection, *, db: Db) -> AsyncIterator[Any]:
        yield object()

    async with Session(ws) as client:
        await client.ask("ticks")
        assert (await client.ask("complete"))["type"] == "complete"
        assert notes == ["open", "CancelledError", "close"]
        assert (await client.ask("odd"))["payload"]["code"] == "internal_error"
        assert notes[3:] == ["open", "GeneratorExit", "close"]


async def test_a_value_is_closed_when_its_client_has_gone() -> None:
    """A handler that `linger` ends is cancelled, and the clean-up runs."""
    ws, notes = with_db(linger=0.05)

    @ws.on("hang")
    async def hang(conn: Connection, *, db: Db) -> None:
        await asyncio.Event().wait()

    async with Session(ws) as client:
        await client.send("hang")
        await until(lambda: notes)
    await until(lambda: len(notes) == 3)
    assert notes == ["open", "CancelledError", "close"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MessageError("no"), "no"),
        (falcon.HTTPServiceUnavailable(), "http_503"),
        (OSError("a bug"), "internal_error"),
    ],
)
async def test_an_error_of_a_provider_is_as_if_the_handlers(
    when: str, error: Exception, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Raised while it makes the value or cleans up, it is the answer, and a bug is logged."""
    ws = endpoint()

    @ws.provide
    async def db(conn: Connection) -> AsyncIterator[Db]:
        if when == "before":
            raise error
        yield Db([])
        raise error

    @ws.on("get")
    async def get(conn: Connection, *, db: Db) -> str:
        return "never sent"

    async with Session(ws) as client:
        assert (await client.ask("get"))["payload"]["code"] == code
    assert ("a bug" in caplog.text) == (code == "internal_error")


async def test_a_provider_may_refuse_a_client() -> None:
    """`Close` and `falcon.HTTPError` mean in a connect handler what they always mean there."""
    ws = endpoint()

    @ws.provide
    async def db(conn: Connection) -> Db:
        raise Close(4000, "no database")

    @ws.connect
    async def arrive(conn: Connection, *, db: Db) -> None:
        raise AssertionError

    async with Session(ws) as client:
        assert await client.closed() == (4000, "no database")


async def test_a_bug_in_clean_up_of_a_disconnect_handler_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log names the application's function, and later handlers run."""
    ws, left = endpoint(), list[bool]()

    @ws.provide
    async def db(conn: Connection) -> AsyncIterator[Db]:
        yield Db([])
        raise OSError("disk")

    @ws.disconnect
    async def leave(conn: Connection, *, db: Db) -> None:
        pass

    @ws.disconnect
    async def last(conn: Connection) -> None:
        left.append(True)

    async with Session(ws):
        pass
    await until(lambda: left)
    (record,) = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert "leave() at " in record.getMessage() and __file__ in record.getMessage()


async def test_a_provider_may_suppress_an_error() -> None:
    """As a context manager may: a handler then has no result, and a stream is at its end."""
    ws = endpoint()

    @ws.provide
    async def db(conn: Connection) -> AsyncIterator[Db]:
        with contextlib.suppress(KeyError):
            yield Db([])

    @ws.on("get")
    async def get(conn: Connection, *, db: Db) -> int:
        raise KeyError

    @ws.on("stream")
    async def stream(conn: Connection, *, db: Db) -> AsyncIterator[int]:
        raise KeyError
        yield 1

    async with Session(ws) as client:
        assert await client.ask("get") == {"type": "get.reply", "id": 1}
        assert await client.ask("stream") == {"type": "complete", "id": 1}


async def test_providers_take_what_earlier_ones_provide() -> None:
    """Each value is made once a call, whoever takes it, and the last made is closed first."""
    ws, notes = with_db()

    class Repo:
        def __init__(self, db: Db) -> None:
            self.db = db

    @ws.provide
    async def repo(conn: Connection, *, db: Db) -> AsyncIterator[Repo]:
        yield Repo(db)
        notes.append("repo closed")

    class Service:
        def __init__(self, repo: Repo, db: Db) -> None:
            assert repo.db is db

    @ws.provide
    async def service(conn: Connection, *, db: Db, repo: Repo) -> Service:
        return Service(repo, db)

    @ws.on("get")
    async def get(conn: Connection, *, service: Service, db: Db, same: Db, repo: Repo) -> None:
        assert db is same is repo.db

    async with Session(ws) as client:
        for _ in range(2):
            assert (await client.ask("get"))["type"] == "get.reply"
    assert notes == ["open", "repo closed", "commit", "close"] * 2


async def test_a_value_is_made_after_the_check_and_inside_middleware() -> None:
    """A payload that does not fit opens nothing; a middleware that answers opens nothing."""
    ws, notes = with_db()

    @ws.middleware
    async def around(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        notes.append("middleware")
        assert envelope.payload == {"a": 1}
        return await call_next()

    @ws.on("get")
    async def get(conn: Connection, *, a: int, db: Db) -> int:
        return a

    async with Session(ws) as client:
        assert (await client.ask("get", {"a": "x"}))["payload"]["code"] == "invalid_payload"
        assert notes == []
        assert (await client.ask("get", {"a": 1}))["payload"] == 1
    assert notes == ["middleware", "open", "commit", "close"]


@pytest.mark.parametrize("value", [{"notes": []}, None, "evil"])
async def test_no_client_can_replace_a_value(value: Any) -> None:
    """A field of its name is no field of the payload."""
    ws, _ = with_db()

    @ws.connect
    async def arrive(conn: Connection, *, db: Db) -> None:
        assert type(db) is Db

    @ws.on("get")
    async def get(conn: Connection, *, a: int = 0, db: Db = None) -> str:  # type: ignore[assignment]  # a default that counts for nothing
        return type(db).__name__

    async with Session(ws) as client:
        assert (await client.ask("get", {"a": 1, "db": value}))["payload"] == "Db"
        assert (await client.ask("get", {"db": value}))["payload"] == "Db"


async def test_one_provider_may_be_registered_on_several_endpoints() -> None:
    """The decorator returns the function as it was."""
    one, other = endpoint(), endpoint()

    @one.provide
    @other.provide
    async def db(conn: Connection) -> Db:
        return Db([])

    for ws in (one, other):

        @ws.on("get")
        async def get(conn: Connection, *, db: Db) -> str:
            return type(db).__name__

        async with Session(ws) as client:
            assert (await client.ask("get"))["payload"] == "Db"


class Store(Protocol):
    def get(self) -> str: ...


class Memory:
    def get(self) -> str:
        return "memory"


async def test_a_provider_may_stand_below_other_handlers() -> None:
    """From then on each message has a context of its own, also on an endpoint in use."""
    ws = endpoint()

    @ws.on("get")
    async def get(conn: Connection, *, name: str, again: bool = False) -> str:
        before = NAME.get()
        NAME.set(name)
        return before

    async with Session(ws) as client:
        assert (await client.ask("get", {"name": "a"}))["payload"] == "nobody"

        @ws.provide
        async def db(conn: Connection) -> Db:
            raise AssertionError

        assert (await client.ask("get", {"name": "b"}))["payload"] == "a"
        assert (await client.ask("get", {"name": "c"}))["payload"] == "a"


@attrs.frozen
class Settings:
    name: str


class Row(Generic[T]):
    def __init__(self, name: str) -> None:
        self.name = name

    def get(self) -> str:
        return self.name


Tenant = NewType("Tenant", str)
Locale = Annotated[str, "locale"]


async def test_a_type_is_exactly_what_is_written() -> None:
    """Two of one generic class, a protocol, a `NewType`, `Annotated`, an optional: each is one."""
    ws = endpoint()

    @ws.provide
    async def store(conn: Connection) -> Store:
        return Memory()

    @ws.provide
    async def ints(conn: Connection) -> AsyncGenerator[Row[int], None]:
        yield Row("ints")

    @ws.provide
    async def strs(conn: Connection) -> AsyncIterable[Row[str]]:
        yield Row("strs")

    @ws.provide
    async def tenant(conn: Connection) -> Tenant:
        return Tenant("acme")

    @ws.provide
    async def locale(conn: Connection) -> Locale:
        return "de"

    @ws.provide
    async def maybe(conn: Connection) -> Settings | None:
        return Settings("maybe")

    @ws.provide
    async def quoted(conn: Connection) -> "AsyncIterator[Memory]":  # noqa: UP037 - as some write it
        yield Memory()

    @ws.on("get")
    async def get(
        conn: Connection, *, a: Store, b: Row[int], c: Row[str], d: Tenant, e: Locale,
        f: Settings | None, g: Memory, h: str,
    ) -> list[str]:  # fmt: skip
        assert f is not None
        return [a.get(), b.get(), c.get(), d, e, f.name, g.get(), h]

    async with Session(ws) as client:
        answer = await client.ask("get", {"h": "sent", "d": "evil", "e": "evil"})
        expected = ["memory", "ints", "strs", "acme", "de", "maybe", "memory", "sent"]
        assert answer["payload"] == expected


# What is refused


async def no_annotation(conn: Connection):  # type: ignore[no-untyped-def]  # that is what is wrong
    yield Db([])


async def no_item(conn: Connection) -> AsyncIterator:  # type: ignore[type-arg]  # as above
    yield Db([])


async def to_none(conn: Connection) -> None: ...


async def to_any(conn: Connection) -> Any: ...


async def to_text(conn: Connection) -> str:
    return ""


async def to_list(conn: Connection) -> AsyncIterator[list[Db]]:
    yield []


async def not_yielding(conn: Connection) -> AsyncIterator[Db]:
    raise NotImplementedError


async def yielding(conn: Connection) -> Db:  # type: ignore[misc]  # as above
    yield Db([])


async def by_sync_iterator(conn: Connection) -> Iterator[Db]:  # type: ignore[misc]  # as above
    yield Db([])


def not_async(conn: Connection) -> Iterator[Db]:
    yield Db([])


@contextlib.asynccontextmanager
async def decorated(conn: Connection) -> AsyncIterator[Db]:
    yield Db([])


async def no_connection() -> Db:
    return Db([])


async def too_much(conn: Connection, room: str) -> Db:
    return Db([])


async def unknown(conn: Connection) -> Missing:  # type: ignore[name-defined]  # noqa: F821 - as above
    ...


@pytest.mark.parametrize(
    ("function", "write"),
    [
        (no_annotation, "async def no_annotation(conn) -> AsyncIterator[Session]"),
        (no_item, "async def no_item(conn) -> AsyncIterator[Session]"),
        (to_none, "does not say what it provides; write `async def to_none(conn) -> Session`"),
        (to_any, "async def to_any(conn) -> Session"),
        (to_text, "provides str, as payloads have it, and not a type of its own"),
        (to_list, "async def to_list(conn) -> AsyncIterator[Session]"),
        (not_yielding, "has no `yield`; write `async def not_yielding(conn) -> Db`"),
        (yielding, "has a `yield`; write `async def yielding(conn) -> AsyncIterator[Db]`"),
        (by_sync_iterator, "async def by_sync_iterator(conn) -> AsyncIterator[Db]"),
        (not_async, "is not async; write\n@ws.provide\nasync def not_async("),
        (decorated, "write it without @asynccontextmanager"),
        (no_connection, "write\n@ws.provide\nasync def session(conn) ->"),
        (too_much, "write\n@ws.provide\nasync def session(conn) ->"),
        (unknown, "'Missing' is not defined"),
        (None, "write\n@ws.provide\nasync def session(conn) ->"),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_a_wrong_provider_is_refused_with_the_right_one(function: Any, write: str) -> None:
    """The error names the function, and shows what to write."""
    ws = endpoint()
    with pytest.raises(PachinkoError) as caught:
        ws.provide(function)
    assert write in str(caught.value)
    assert function is None or function.__name__ in str(caught.value)
    assert not ws._routes.providers and not ws._routes.is_scoped


def test_a_second_provider_of_a_type_is_refused() -> None:
    """The error names both."""
    ws, _ = with_db()

    async def second(conn: Connection) -> Db:
        return Db([])

    with pytest.raises(PachinkoError, match=r"Db has a provider: .*db\(\) at .*second\(\) at"):
        ws.provide(second)


@pytest.mark.parametrize("kind", ["field", "with default", "whole"])
def test_a_provider_is_registered_above_the_handlers(kind: str) -> None:
    """A handler that takes the type from its payload would go on to do so."""
    ws = endpoint()

    async def field(conn: Connection, *, settings: Settings) -> None: ...

    async def default(conn: Connection, *, settings: Settings = Settings("")) -> None: ...

    async def whole(conn: Connection, settings: Settings) -> None: ...

    ws.on("get")({"field": field, "with default": default, "whole": whole}[kind])

    async def provider(conn: Connection) -> Settings:
        return Settings("")

    with pytest.raises(PachinkoError, match=r"takes Settings from its payload; register .*prov"):
        ws.provide(provider)


@pytest.mark.parametrize("how", ["connect", "accepted"])
async def test_what_starts_a_connection_takes_provided_values(how: str) -> None:
    """A value for a coroutine is closed when it has returned."""
    ws, notes = with_db()

    @getattr(ws, how)
    async def arrive(conn: Connection, *, db: Db) -> None:
        notes.append(how)

    @ws.on("get")
    async def get(conn: Connection) -> list[Any]:
        return list(notes)

    async with Session(ws) as client:
        got = await client.ask("get")
    assert got["payload"] == notes == ["open", how, "commit", "close"]


async def test_a_value_of_a_generator_is_closed_after_the_generators_end() -> None:
    """A connect handler with a `yield` has it until the connection is over."""
    ws, notes = with_db()

    @ws.connect
    async def arrive(conn: Connection, *, db: Db) -> AsyncIterator[None]:
        notes.append("begun")
        yield
        notes.append("ended")

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        notes.append("leave")

    async with Session(ws) as client:
        await client.ask("nothing")
        assert notes == ["open", "begun"]
    assert notes == ["open", "begun", "leave", "ended", "commit", "close"]


@pytest.mark.parametrize("exc", [Close(4000), falcon.HTTPForbidden(), KeyError("a bug")])
async def test_a_value_of_a_generator_is_closed_after_a_refusal(exc: Exception) -> None:
    """A later connect handler refuses: the generator ends, and then its value."""
    ws, notes = with_db()

    @ws.connect
    async def arrive(conn: Connection, *, db: Db) -> AsyncIterator[None]:
        yield
        notes.append("ended")

    @ws.connect
    async def refuse(conn: Connection) -> None:
        raise exc

    async with simulated(ws._app) as server:
        with contextlib.suppress(Exception):  # the handshake is refused, or accepted and closed
            async with connect(f"{server.url}/ws") as client:
                await client.closed()
        await until(lambda: "close" in notes)
    assert notes == ["open", "ended", "commit", "close"]


@pytest.mark.parametrize("star", ["", "*, "])
def test_a_type_without_a_provider_is_told_of_provide(star: str) -> None:
    """What the server makes has no JSON; its provider is missing, or stands below."""
    function = scoped(f"async def f(conn, {star}db: Db): ...")
    with pytest.raises(PachinkoError) as caught:
        endpoint().on("get")(function)
    assert "; or, if the server makes it, register its `@ws.provide` above. " in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "is_told"),
    [
        ("db: Db", True), ("n: int, db: Db = None", True), ("db: Db | None", True),
        ("n: int", False), ("n: int | None", False), ("tags: list[str]", False), ("x", False),
    ],
)  # fmt: skip
def test_a_value_beside_a_payload_is_told_of_provide(fields: str, is_told: bool) -> None:
    """It may be one of those for which the provider is missing, or stands below."""
    with pytest.raises(PachinkoError, match="takes the payload whole and by fields; ") as caught:
        endpoint().on("say")(scoped(f"async def f(conn, text: str, *, {fields}): ..."))
    assert ("; register the `@ws.provide` of a value above, or write" in str(caught.value)) == (
        is_told
    )


def test_a_value_in_the_place_of_a_payload_is_told_of_provide() -> None:
    """It may be the one whose provider is missing."""
    with pytest.raises(PachinkoError, match=r"; register the `@ws.provide` of a value above, or"):
        endpoint().on("say")(scoped("async def f(conn, db: Db, *, text: str): ..."))


@pytest.mark.parametrize("parameters", ["db: Db", "db: Db, text: str", "db: Db, *, text: str"])
@pytest.mark.parametrize("how", ["on", "connect", "accepted", "disconnect", "fallback", "provide"])
def test_a_provided_value_is_not_taken_for_the_connection(how: str, parameters: str) -> None:
    """The first parameter gets the connection, whatever its annotation says."""
    function = scoped(f"async def f({parameters}): ...")
    ws, _ = with_db()
    with pytest.raises(PachinkoError, match=r"takes `db: Db`.* write `\(conn, \*, db: Db\)`"):
        (ws.on("get") if how == "on" else getattr(ws, how))(function)


def test_a_provided_value_that_was_taken_for_the_connection() -> None:
    """The provider comes below the handler, and finds it."""
    ws = endpoint()
    ws.on("get")(scoped("async def f(db: Db): ..."))

    async def provider(conn: Connection) -> Db:
        return Db([])

    with pytest.raises(PachinkoError, match=r"f\(\).* takes Db from its payload; register .*prov"):
        ws.provide(provider)


@pytest.mark.parametrize(
    ("how", "source"),
    [
        ("connect", "f(conn, *, db: Db)"), ("accepted", "f(conn, *, db: Db)"),
        ("connect", "f(conn, db: Db)"), ("disconnect", "f(conn, *, db: Db = None)"),
    ],
)  # fmt: skip
def test_a_provider_below_a_handler_of_connections(how: str, source: str) -> None:
    """Each handshake would fail, or the handler would get its default."""
    ws = Pachinko(hub=Hub())  # whose paths are known to the app alone
    getattr(ws, how)(scoped(f"async def {source}: ..."))

    async def provider(conn: Connection) -> Db:
        return Db([])

    with pytest.raises(PachinkoError, match=r"f\(\) .* takes Db; register .* above the handlers"):
        ws.provide(provider)


def scoped(source: str) -> Any:
    """The function `f` that *source* defines, with the types of this module."""
    exec(source, names := {"Db": Db, "Connection": Connection, "__name__": __name__})
    return names["f"]


async def positional(conn: Connection, db: Db) -> None: ...


async def optional(conn: Connection, *, db: Db | None = None) -> None: ...


async def annotated(conn: Connection, *, db: Annotated[Db, "x"]) -> None: ...


@pytest.mark.parametrize("function", [positional, optional, annotated])
@pytest.mark.parametrize("how", ["on", "connect", "disconnect", "fallback", "binary"])
def test_a_value_is_taken_by_a_keyword_and_exactly_its_type(how: str, function: Any) -> None:
    """Anything near to it would be a field of the payload, and is refused with what to write."""
    ws, _ = with_db()
    decorate = ws.on("get") if how == "on" else getattr(ws, how)
    with pytest.raises(PachinkoError, match=r"write `\(conn, \*, db: Db\)`"):
        decorate(function)


@pytest.mark.parametrize("how", ["connect", "disconnect", "fallback", "binary"])
def test_an_unknown_name_is_refused(how: str) -> None:
    """Whether it is a provided type cannot be known."""
    ws, _ = with_db()

    async def f(conn: Connection, *, db: Nothing) -> None: ...  # type: ignore[name-defined]  # noqa: F821 - it is unknown

    with pytest.raises(PachinkoError, match=r"f\(\) at .*: name 'Nothing'"):
        getattr(ws, how)(f)


def test_what_is_not_provided_is_refused_as_before() -> None:
    """The texts for the parameters that are left name the application's function."""
    ws, _ = with_db()

    @ws.on("get")
    async def get(conn: Connection, *, db: Db) -> None: ...

    handler = ws._routes.handlers["get"]
    assert pachinko.place_of(handler.function).startswith("test_what_is_not_provided")
    assert not handler.takes_payload

    async def second(conn: Connection, *, db: Db) -> None: ...

    with pytest.raises(PachinkoError, match=r"get\(\) at .*second\(\) at"):
        ws.on("get")(second)

    def sync(conn: Connection, *, db: Db) -> None: ...

    with pytest.raises(PachinkoError, match=r"sync\(\) at .* is not async"):
        ws.on("sync")(sync)


# With other packages


async def test_anyios_scopes_work_inside() -> None:
    """A cancel scope and a task group of anyio belong to the message's task."""
    anyio = pytest.importorskip("anyio", reason="comes with uvicorn's extra, if at all")
    ws = endpoint()
    noting(ws)

    @ws.on("get")
    async def get(conn: Connection) -> list[bool]:
        with anyio.move_on_after(0.01) as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.sleep, 60)
        with anyio.fail_after(PATIENCE):
            await anyio.sleep(0)
        return [scope.cancelled_caught]

    async with Session(ws) as client:
        for _ in range(2):
            assert (await client.ask("get"))["payload"] == [True]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.11 has no eager tasks")
async def test_contexts_work_with_eager_tasks() -> None:
    """Tasks that begin at once see the context of the message that starts them."""
    ws = endpoint()
    noting(ws)

    @ws.on("get")
    async def get(conn: Connection, name: str) -> str:
        NAME.set(name)

        async def inner() -> str:
            await asyncio.sleep(0)
            return NAME.get()

        return await asyncio.get_running_loop().create_task(inner())

    async with Session(ws) as client:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        try:
            assert (await client.ask("get", "a"))["payload"] == "a"
            assert (await client.ask("get", "b"))["payload"] == "b"
        finally:
            asyncio.get_running_loop().set_task_factory(None)
