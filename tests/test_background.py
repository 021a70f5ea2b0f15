"""Tasks of the application that end with their connection."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
from collections.abc import AsyncIterator
from typing import Any

import falcon
import pytest
from support import PATIENCE, connect, new_app, serving, simulated, turns, until

import pachinko
from pachinko import Close, Connection, Hub, MessageError, Pachinko, PachinkoError


class Tick:
    """A coroutine function that notes what becomes of it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.task: asyncio.Task[Any]

    async def run(self, conn: Connection) -> int:
        self.log.append("begun")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.log.append("cancelled")
            raise
        return 5

    def start(self, conn: Connection) -> None:
        self.task = conn.create_task(self.run(conn))


def endpoint(**options: Any) -> Pachinko:
    return Pachinko(new_app(), "/ws", hub=Hub(), **options)


def has_no_tasks(ws: Pachinko) -> bool:
    return not ws._hub.state.background


def _starting(tick: Tick) -> Any:
    async def start(conn: Connection) -> None:
        tick.start(conn)

    return start


@pytest.mark.parametrize("where", ["authenticate", "connect", "accepted", "on", "worker"])
async def test_a_task_ends_before_the_disconnect_handlers(where: str) -> None:
    """Wherever it has been started."""
    ws, tick = endpoint(), Tick()
    if where == "authenticate":

        @ws.authenticate
        async def who(conn: Connection, token: str | None) -> str | None:
            tick.start(conn)
            return "ada"

    elif where == "on":
        ws.on("start")(_starting(tick))
    elif where == "worker":

        @ws.worker
        async def work() -> None:
            await until(lambda: ws._hub.connections)
            for conn in ws._hub.connections:
                tick.start(conn)

    else:
        getattr(ws, where)(_starting(tick))

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        tick.log.append("disconnect")

    async with simulated(ws._app) as server:
        async with connect(server.url + "/ws") as client:
            if where == "on":
                await client.send("start")
            await until(lambda: "begun" in tick.log)
            await server.sim.settle()  # An early cancellation would show.
            assert tick.log == ["begun"]
        await until(lambda: "disconnect" in tick.log)
    assert tick.log == ["begun", "cancelled", "disconnect"]
    assert tick.task.cancelled() and has_no_tasks(ws)


@pytest.mark.parametrize("way", ["cut", "close", "close_group", "drain", "shutdown", "Close"])
async def test_each_end_cancels_it_at_once(way: str) -> None:
    """Also while a handler goes on, which has `linger`."""
    ws, tick, goes_on = endpoint(), Tick(), asyncio.Event()

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.join("room")

    @ws.on("start")
    async def start(conn: Connection) -> None:
        tick.start(conn)
        if way == "Close":
            raise Close(4000)
        await goes_on.wait()

    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(ws._app))
        client = await stack.enter_async_context(connect(server.url + "/ws"))
        await client.send("start")
        if way != "Close":
            await until(lambda: tick.log)
            (conn,) = ws._hub.connections
        draining = None
        if way == "cut":
            client.cut()
        elif way == "close":
            await conn.close()
        elif way == "close_group":
            await ws._hub.close_group("room")
        elif way == "drain":
            draining = asyncio.create_task(ws._hub.drain(0))
        elif way == "shutdown":
            draining = asyncio.create_task(server.stop())
            await client.closed()
        await until(lambda: hasattr(tick, "task") and tick.task.done())
        goes_on.set()
        if draining is not None:
            await draining
        server.task = server.task if way != "shutdown" else asyncio.create_task(asyncio.sleep(0))
    assert tick.log in (["begun", "cancelled"], []) and has_no_tasks(ws)


@pytest.mark.parametrize("refusal", [falcon.HTTPForbidden(), Close(4000), KeyError("bug")])
async def test_a_refused_client_has_no_tasks(refusal: Exception) -> None:
    """What connect handlers have started is cancelled."""
    ws, tick = endpoint(), Tick()
    ws.connect(_starting(tick))

    @ws.connect
    async def refuse(conn: Connection) -> None:
        await until(lambda: tick.log)
        raise refusal

    async with simulated(ws._app) as server:
        with contextlib.suppress(Exception):  # a refusal or a close, each of its kind
            async with connect(server.url + "/ws") as client:
                await client.closed()
        await until(tick.task.done)
    assert tick.log == ["begun", "cancelled"] and has_no_tasks(ws)


async def test_a_coroutine_that_is_started_twice_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """The second task fails, and the first one is none the worse for it."""
    ws, may_end = endpoint(), asyncio.Event()

    async def work() -> int:
        await may_end.wait()
        return 5

    @ws.on("start")
    async def start(conn: Connection) -> int:
        once = work()
        first, second = conn.create_task(once), conn.create_task(once)
        await asyncio.wait([second])
        assert isinstance(second.exception(), RuntimeError)
        await until(lambda: len(*ws._hub.state.background.values()) == 1)
        may_end.set()
        return await first

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        assert (await client.ask("start"))["payload"] == 5
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert "already" in caplog.text and "work failed" in record.message


BUGS: list[Any] = [
    KeyError("bug"), MessageError("nobody"), falcon.HTTPNotFound(), SystemExit(3),
    asyncio.CancelledError(), ExceptionGroup("g", [KeyError("bug")]),
    falcon.WebSocketDisconnected(1001),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)
async def test_a_bug_is_logged(bug: Any, caplog: pytest.LogCaptureFixture) -> None:
    """With the connection's id, once; the connection stays, and whoever awaits the task sees it."""
    ws = endpoint()

    async def fail(conn: Connection) -> None:
        await conn.send("before")
        raise bug

    seen: list[Any] = []

    @ws.on("start")
    async def start(conn: Connection) -> None:
        task = conn.create_task(fail(conn))
        await asyncio.wait([task])
        seen.append(task)

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        assert (await client.ask("start"))["type"] == "before"
        assert (await client.receive())["type"] == "start.reply"
        (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
        (conn,) = ws._hub.connections
        assert vars(record)["connection_id"] == conn.id
        assert "fail failed" in record.message and has_no_tasks(ws)
    (task,) = seen
    if not isinstance(bug, asyncio.CancelledError):
        expected = RuntimeError if isinstance(bug, SystemExit) else type(bug)
        assert isinstance(task.exception(), expected)


@pytest.mark.parametrize("close", [Close(4001, "enough"), ExceptionGroup("g", [Close(4001)])])
async def test_close_closes(close: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """As in a handler, and nothing is logged."""
    ws = endpoint()

    async def end() -> None:
        raise close

    @ws.accepted
    async def start(conn: Connection) -> None:
        conn.create_task(end())

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        assert (await client.closed())[0] == 4001
    assert not caplog.records


async def test_a_task_may_close_its_connection_and_go_on() -> None:
    """It is cancelled when the connection is over."""
    ws, log = endpoint(), list[str]()

    async def end(conn: Connection) -> None:
        await conn.close(4001)
        log.append("closed")
        await asyncio.Event().wait()

    @ws.accepted
    async def start(conn: Connection) -> None:
        conn.create_task(end(conn))

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        assert (await client.closed())[0] == 4001
        await until(lambda: has_no_tasks(ws))
    assert log == ["closed"]


async def test_a_departure_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Of a task that sends, and cleans up by sending."""
    ws = endpoint()

    async def tick(conn: Connection) -> None:
        try:
            while True:
                await conn.send("tick")
                await asyncio.sleep(0)
        finally:
            await conn.send("bye")

    @ws.accepted
    async def start(conn: Connection) -> None:
        conn.create_task(tick(conn))

    async with simulated(ws._app) as server:
        async with connect(server.url + "/ws") as client:
            await client.receive()
            client.cut()
        await until(lambda: has_no_tasks(ws) and not ws._hub.count)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


async def test_a_bug_in_its_clean_up_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Also of a client that was refused."""
    ws = endpoint()

    async def tick() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise KeyError("bug")

    @ws.connect
    async def start(conn: Connection) -> None:
        conn.create_task(tick())
        await asyncio.sleep(0)
        raise falcon.HTTPForbidden

    async with simulated(ws._app) as server:
        with pytest.raises(Exception, match="403"):
            async with connect(server.url + "/ws"):
                pass
        await until(lambda: "tick failed" in caplog.text)
    assert has_no_tasks(ws)


async def test_its_clean_up_is_not_cut_short() -> None:
    """It may wait as long as `linger` says, and the disconnect handlers wait for it."""
    ws, log = endpoint(), list[str]()

    async def tick() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await turns()  # the clean-up takes its time
            log.append("clean")

    @ws.accepted
    async def start(conn: Connection) -> None:
        conn.create_task(tick())

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        log.append("disconnect")

    async with simulated(ws._app) as server:
        async with connect(server.url + "/ws") as client:
            (conn,) = await _connections(ws)
            await turns()  # so that the task has begun
            await conn.close(4000)
            await client.closed()  # a second reason to end
        await until(lambda: len(log) == 2)
    assert log == ["clean", "disconnect"]


async def _connections(ws: Pachinko) -> frozenset[Connection]:
    await until(lambda: ws._hub.connections and ws._hub.state.background)
    return ws._hub.connections


async def test_one_that_ignores_its_cancellation_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disconnect handlers run without it."""
    monkeypatch.setattr(pachinko, "_GOODBYE", 0.05)
    ws, left, end = endpoint(linger=0.01), asyncio.Event(), asyncio.Event()

    async def tick() -> None:
        while not end.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await end.wait()
            asyncio.current_task().uncancel()  # type: ignore[union-attr]  # it runs in a task

    @ws.accepted
    async def start(conn: Connection) -> None:
        conn.create_task(tick())

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        left.set()

    async with simulated(ws._app) as server:
        async with connect(server.url + "/ws"):
            await _connections(ws)
        await asyncio.wait_for(left.wait(), PATIENCE)
        assert "a task ignores its cancellation" in caplog.text
        end.set()
        await until(lambda: has_no_tasks(ws))


async def test_a_task_in_a_disconnect_handler_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Also behind a `yield`. Nothing is started, and there is no warning."""
    ws, tick, errors = endpoint(), Tick(), list[str]()

    def refused(conn: Connection) -> None:
        with pytest.raises(PachinkoError, match=r"in a disconnect handler") as raised:
            tick.start(conn)
        errors.append(str(raised.value))

    @ws.connect
    async def arrive(conn: Connection) -> AsyncIterator[None]:
        yield
        refused(conn)

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        refused(conn)

    async with simulated(ws._app) as server:
        async with connect(server.url + "/ws"):
            pass
        await until(lambda: len(errors) == 2)
    assert not tick.log and has_no_tasks(ws)


async def test_on_a_connection_that_is_over_it_is_cancelled() -> None:
    """In a handler that has overtaken the departure, and later from elsewhere."""
    ws, ticks, kept = endpoint(), [Tick(), Tick()], list[Connection]()

    @ws.on("start")
    async def start(conn: Connection) -> None:
        await conn.close(4000)
        ticks[0].start(conn)
        kept.append(conn)

    async with simulated(ws._app) as server:
        async with connect(server.url + "/ws") as client:
            await client.send("start")
            assert (await client.closed())[0] == 4000
        await until(lambda: not ws._hub.count)
        ticks[1].start(kept[0])
        await asyncio.wait([tick.task for tick in ticks], timeout=PATIENCE)
    for tick in ticks:
        assert tick.task.cancelled() and not tick.log
    assert has_no_tasks(ws)
    gc.collect()  # a coroutine that was never awaited would warn


async def test_elsewhere_while_disconnect_handlers_run_it_is_cancelled() -> None:
    """That is no mistake: the code cannot know."""
    ws, tick, leaving, goes_on = endpoint(), Tick(), list[Connection](), asyncio.Event()

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        leaving.append(conn)
        await goes_on.wait()

    async with simulated(ws._app) as server:
        async with connect(server.url + "/ws"):
            pass
        await until(lambda: leaving)
        tick.start(leaving[0])
        await asyncio.wait([tick.task], timeout=PATIENCE)
        assert tick.task.cancelled() and not tick.log
        goes_on.set()


async def _generator() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize("wrong", [Tick().run, _generator(), None, 5, asyncio.sleep], ids=repr)
async def test_what_is_no_coroutine_is_refused(wrong: Any) -> None:
    """With the cure."""
    ws = endpoint()
    async with simulated(ws._app) as server, connect(server.url + "/ws"):
        await until(lambda: ws._hub.connections)
        (conn,) = ws._hub.connections
        with pytest.raises(TypeError, match=r"write conn\.create_task\(tick\(conn\)\)"):
            conn.create_task(wrong)


async def test_another_thread_is_refused() -> None:
    """It calls `Hub.call_threadsafe`, which returns the task."""
    ws, tick = endpoint(), Tick()
    async with simulated(ws._app) as server, connect(server.url + "/ws"):
        await until(lambda: ws._hub.connections)
        (conn,) = ws._hub.connections
        with pytest.raises(PachinkoError, match=r"call_threadsafe\(conn\.create_task"):
            await asyncio.to_thread(tick.start, conn)
        gc.collect()
        await asyncio.to_thread(lambda: ws._hub.call_threadsafe(tick.start, conn).result(PATIENCE))
        await until(lambda: tick.log)


async def test_they_do_not_count_for_max_concurrent() -> None:
    """There may be many, and each gives its value."""
    ws = endpoint(max_concurrent=1)
    variable = contextvars.ContextVar[str]("variable")

    async def work(n: int) -> tuple[int, str]:
        await asyncio.sleep(0)
        return n, variable.get()

    @ws.on("sum", concurrent=True)
    async def add(conn: Connection) -> list[tuple[int, str]]:
        variable.set("of the caller")
        return [await task for task in [conn.create_task(work(n)) for n in range(20)]]

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        answer = await client.ask("sum")
        assert answer["payload"] == [[n, "of the caller"] for n in range(20)]
        assert has_no_tasks(ws)


async def test_it_begins_after_its_caller_goes_on() -> None:
    """On a loop with eager tasks too, where asyncio's own would begin at once."""
    loop = asyncio.get_running_loop()
    eager = getattr(asyncio, "eager_task_factory", None)
    ws, tick, order = endpoint(), Tick(), list[Any]()

    @ws.on("start")
    async def start(conn: Connection) -> None:
        tick.start(conn)
        order.append(list(tick.log))

    loop.set_task_factory(eager)
    try:
        async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
            await client.send("start")
            await until(lambda: tick.log)
    finally:
        loop.set_task_factory(None)
    assert order == [[]] and tick.log[0] == "begun"


async def test_a_handler_that_awaits_a_failed_task_fails_with_it() -> None:
    """The client is answered as for an error of the handler's own."""
    ws = endpoint()

    async def fail() -> int:
        raise MessageError("sold_out")

    @ws.on("buy")
    async def buy(conn: Connection) -> int:
        return await conn.create_task(fail())

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        assert (await client.ask("buy"))["payload"]["code"] == "sold_out"
