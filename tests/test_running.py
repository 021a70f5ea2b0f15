"""When hub, workers and connections start and end: with the app's lifespan, or with `running`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import falcon.asgi
import pytest
from falcon.testing import ASGIConductor
from support import PATIENCE, connect, new_app, serving, until

from pachinko import Connection, Hub, Pachinko, PachinkoError


class Pool:
    """A middleware of the app that opens and closes, and notes when."""

    def __init__(self, events: list[str], name: str = "pool") -> None:
        self.events, self.name = events, name
        self.is_open = False

    async def process_startup(self, scope: Any, event: Any) -> None:
        self.events.append(f"{self.name} opens")
        await asyncio.sleep(0.01)  # A worker that had been started would run meanwhile.
        self.is_open = True

    async def process_shutdown(self, scope: Any, event: Any) -> None:
        self.is_open = False
        self.events.append(f"{self.name} closes")


def working(ws: Pachinko, events: list[str], name: str = "worker") -> None:
    """Give *ws* a worker and a disconnect handler that note when they run and end."""

    @ws.worker
    async def work() -> None:
        events.append(f"{name} starts")
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            events.append(f"{name} ends")

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        await asyncio.sleep(0.01)
        events.append(f"a client of {name} leaves with {conn.close_code}")


def with_pool_before(events: list[str], hub: Hub) -> falcon.asgi.App[Any, Any]:
    app = falcon.asgi.App(middleware=[Pool(events)])
    working(Pachinko(app, "/ws", hub=hub), events)
    return app


def with_pool_behind(events: list[str], hub: Hub) -> falcon.asgi.App[Any, Any]:
    app = new_app()
    working(Pachinko(app, "/ws", hub=hub), events)
    app.add_middleware(Pool(events))
    return app


def with_middleware_added_twice(events: list[str], hub: Hub) -> falcon.asgi.App[Any, Any]:
    app = new_app()
    ws = Pachinko(app, "/ws", hub=hub)
    working(ws, events)
    app.add_middleware([Pool(events), ws])
    return app


def without_path(events: list[str], hub: Hub) -> falcon.asgi.App[Any, Any]:
    """Added by hand, it has the place among the middleware where it was added."""
    app, ws = new_app(), Pachinko(hub=hub)
    working(ws, events)
    app.add_route("/ws", ws)
    app.add_middleware([Pool(events), ws])
    return app


Make = Callable[[list[str], Hub], Any]
each_order = pytest.mark.parametrize(
    "make", [with_pool_before, with_pool_behind, with_middleware_added_twice, without_path]
)


@each_order
async def test_workers_run_while_all_middleware_of_the_app_has_started(make: Make) -> None:
    """They start after all other startup code, and end before all other shutdown code."""
    events: list[str] = []
    app = make(events, Hub())
    for _ in range(2):  # An app may be started again.
        async with serving(app):
            await until(lambda: "worker starts" in events)
        assert events == ["pool opens", "worker starts", "worker ends", "pool closes"]
        events.clear()


async def test_an_app_may_get_more_middleware_between_two_starts() -> None:
    """The workers start last at each start."""
    events: list[str] = []
    app = with_pool_behind(events, Hub())
    async with serving(app):
        await until(lambda: "worker starts" in events)
    events.clear()
    app.add_middleware(Pool(events, "late"))
    async with serving(app):
        await until(lambda: "worker starts" in events)
    assert events == [
        "pool opens", "late opens", "worker starts", "worker ends", "late closes", "pool closes",
    ]  # fmt: skip


async def test_a_start_by_hand_starts_the_workers() -> None:
    """A test, or a wrapper, may call what Falcon calls; nothing of the app is changed."""
    events, hub, app = list[str](), Hub(), new_app()
    ws = Pachinko(app, "/ws", hub=hub)
    working(ws, events)
    await ws.process_startup({}, {})
    await until(lambda: events)
    await ws.process_shutdown({}, {})
    assert events == ["worker starts", "worker ends"] and hub.state.loop is None


async def test_several_endpoints_and_several_pools() -> None:
    """All workers start behind the last pool, and end before the first one is closed."""
    events, hub, app = list[str](), Hub(), new_app()
    for name in ("a", "b"):
        working(Pachinko(app, f"/{name}", hub=hub), events, name)
        app.add_middleware(Pool(events, f"pool {name}"))
    async with serving(app):
        await until(lambda: {"a starts", "b starts"} <= set(events))
    assert events[:2] == ["pool a opens", "pool b opens"]
    assert set(events[2:4]) == {"a starts", "b starts"}
    assert set(events[4:6]) == {"a ends", "b ends"}
    assert events[6:] == ["pool b closes", "pool a closes"]


async def test_clients_are_closed_before_the_pool() -> None:
    """A disconnect handler at a shutdown may still use what other middleware has opened."""
    events: list[str] = []
    app = with_pool_behind(events, Hub())
    async with ASGIConductor(app) as conductor, conductor.simulate_ws("/ws"):
        events.append("a client is in")
    end = events[events.index("a client is in") + 1 :]
    assert "pool closes" in end[-1] and "a client of worker leaves with" in "".join(end[:-1])


async def test_other_middleware_may_send_when_it_starts_and_stops() -> None:
    """Behind the endpoint, the hub runs in all of its startup and shutdown code."""
    app, hub, sent = new_app(), Hub(), list[bool]()
    Pachinko(app, "/ws", hub=hub)

    class Greeter:
        async def process_startup(self, scope: Any, event: Any) -> None:
            await hub.send("a", "hello")
            sent.append(hub.state.loop is not None)

        process_shutdown = process_startup

    app.add_middleware(Greeter())
    async with ASGIConductor(app):
        pass
    assert sent == [True, True]
    assert hub.state.loop is None


async def test_a_start_that_fails_does_not_count() -> None:
    """No worker has run, and the next start and its shutdown are complete."""
    events, hub = list[str](), Hub()
    app = with_pool_behind(events, hub)
    fails = [True]

    class Fragile:
        async def process_startup(self, scope: Any, event: Any) -> None:
            if fails.pop():
                raise OSError("no database")

    app.add_middleware(Fragile())
    with pytest.raises(Exception, match="no database"):
        async with ASGIConductor(app):
            raise AssertionError("it has started")
    assert events == ["pool opens"]
    fails.append(False)
    async with ASGIConductor(app):
        await until(lambda: "worker starts" in events)
    assert events[-2:] == ["worker ends", "pool closes"] and hub.state.loop is None


async def test_a_worker_that_does_not_end_is_waited_for_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shutdown then goes on, and the log names the worker."""
    monkeypatch.setattr("pachinko._FAREWELL", 0.05)
    app, may_end, began = new_app(), asyncio.Event(), asyncio.Event()
    ws = Pachinko(app, "/ws", hub=Hub())

    @ws.worker
    async def stubborn() -> None:
        began.set()
        while not may_end.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await may_end.wait()

    async with ASGIConductor(app):
        await asyncio.wait_for(began.wait(), PATIENCE)
        (worker,) = ws._workers
    assert [record.message[:25] for record in caplog.records] == ["not waiting any longer fo"]
    may_end.set()
    await asyncio.wait([worker], timeout=PATIENCE)


async def test_a_worker_is_added_late_in_the_apps_thread_only() -> None:
    """Another thread is told how, and nothing is added; after the end it may be added anywhere."""
    ws, runs = Pachinko(new_app(), "/ws", hub=Hub()), list[Any]()

    async def late() -> None:
        runs.append(asyncio.get_running_loop())

    async def add() -> None:
        ws.worker(late)

    async with ASGIConductor(ws._app):
        for elsewhere in (lambda: ws.worker(late), lambda: asyncio.run(add())):
            with pytest.raises(PachinkoError, match=r"hub\.call_threadsafe\(ws\.worker, \.\.\."):
                await asyncio.to_thread(elsewhere)
        await asyncio.to_thread(lambda: ws._hub.call_threadsafe(ws.worker, late).result(PATIENCE))
        await until(lambda: runs)
        assert runs == [asyncio.get_running_loop()]
    await asyncio.to_thread(lambda: asyncio.run(add()))
    async with ASGIConductor(ws._app):
        await until(lambda: len(runs) == 3)


# Without a lifespan of its own


async def test_it_runs_without_a_lifespan() -> None:
    """Hub and workers run before the first client, and until the end of the block."""
    app, events, hub = new_app(), list[str](), Hub()
    ws = Pachinko(app, "/ws", hub=hub)
    working(ws, events)
    async with ws.running():
        await hub.send("a", "hello")
        assert hub.state.loop is asyncio.get_running_loop()
        async with serving(app, lifespan="off") as server, connect(server.url + "/ws") as client:
            await until(lambda: events == ["worker starts"] and hub.connections)
            await ws._close_all()
            assert (await client.closed())[0] == 1012
    assert events == ["worker starts", "worker ends", "a client of worker leaves with 1012"]
    assert hub.state.loop is None


async def test_the_end_closes_clients_and_waits_for_their_handlers() -> None:
    """With 1012, as at the shutdown of an app."""
    app, events = new_app(), list[str]()
    ws = Pachinko(app, "/ws", hub=Hub())
    working(ws, events)
    async with serving(app, lifespan="off") as server:
        async with ws.running(), contextlib.AsyncExitStack() as stack:
            client = await stack.enter_async_context(connect(server.url + "/ws"))
            await until(lambda: ws._hub.connections)
            stack.pop_all()
        assert "a client of worker leaves with 1012" in events and events[0] == "worker starts"
        assert (await client.closed())[0] == 1012


async def test_one_block_is_for_all_endpoints_of_the_app() -> None:
    """Not for those of another app, and for one without an app it is for that one."""
    events, app, other = list[str](), new_app(), new_app()
    hubs = Hub(), Hub()
    first, second = (Pachinko(app, f"/{n}", hub=hub) for n, hub in enumerate(hubs))
    alone, foreign = Pachinko(hub=Hub()), Pachinko(other, "/ws", hub=Hub())
    for ws, name in ((first, "first"), (second, "second"), (alone, "alone"), (foreign, "foreign")):
        working(ws, events, name)
    async with second.running():
        await until(lambda: len(events) == 2)
        assert set(events) == {"first starts", "second starts"}
        assert all(hub.state.loop for hub in hubs)
    assert set(events[2:]) == {"first ends", "second ends"}
    assert not any(hub.state.loop for hub in hubs)
    events.clear()
    async with alone.running():
        await until(lambda: events)
    assert events == ["alone starts", "alone ends"]


@pytest.mark.parametrize("outer", ["running", "lifespan"])
@pytest.mark.parametrize("inner", ["running", "lifespan"])
async def test_blocks_and_lifespans_are_counted(outer: str, inner: str) -> None:
    """Nothing is started twice, and the last one to end stops it."""
    events, hub, app = list[str](), Hub(), new_app()
    ws = Pachinko(app, "/ws", hub=hub)
    working(ws, events)

    def run(how: str) -> Any:
        return ws.running() if how == "running" else ASGIConductor(app)

    async with run(outer):
        await until(lambda: events)
        async with run(inner):
            pass
        assert events == ["worker starts"] and hub.state.loop is not None
    assert events == ["worker starts", "worker ends"] and hub.state.loop is None


async def test_blocks_may_end_in_any_order() -> None:
    """The one that was entered first may end first."""
    events, hub = list[str](), Hub()
    ws = Pachinko(new_app(), "/ws", hub=hub)
    working(ws, events)
    first, second = ws.running(), ws.running()
    await first.__aenter__()
    await second.__aenter__()
    await until(lambda: events)
    await first.__aexit__(None, None, None)
    assert events == ["worker starts"] and hub.state.loop is not None
    await second.__aexit__(None, None, None)
    assert events == ["worker starts", "worker ends"] and hub.state.loop is None
    async with ws.running():
        await until(lambda: events[2:])
    assert events[2:] == ["worker starts", "worker ends"]


async def test_a_block_may_begin_while_another_ends() -> None:
    """The hub goes on, and the workers start anew."""
    events, hub = list[str](), Hub()
    ws = Pachinko(new_app(), "/ws", hub=hub)
    working(ws, events)
    first, second = ws.running(), ws.running()
    await first.__aenter__()
    await until(lambda: events)
    ending = asyncio.create_task(first.__aexit__(None, None, None))
    await asyncio.sleep(0)
    await second.__aenter__()
    assert not ending.done()
    await ending
    assert hub.state.loop is not None and ws._workers
    await second.__aexit__(None, None, None)
    assert events.count("worker starts") == events.count("worker ends") == 2
    assert hub.state.loop is None


async def test_a_client_that_came_first_changes_nothing() -> None:
    """Its handshake has started the hub and the workers; the end of the block stops them."""
    events, app = list[str](), new_app()
    ws = Pachinko(app, "/ws", hub=Hub())
    working(ws, events)
    async with serving(app, lifespan="off") as server, connect(server.url + "/ws") as client:
        await until(lambda: events)
        async with ws.running():
            pass
        assert (await client.closed())[0] == 1012
    assert events.count("worker starts") == events.count("worker ends") == 1


@pytest.mark.parametrize("error", [ValueError("mine"), asyncio.CancelledError()])
async def test_an_error_in_the_block_ends_it(error: BaseException) -> None:
    """It is raised once all has been stopped."""
    events, hub = list[str](), Hub()
    ws = Pachinko(new_app(), "/ws", hub=hub)
    working(ws, events)

    async def run() -> None:
        async with ws.running():
            await until(lambda: events)
            raise error

    with pytest.raises(type(error)) as caught:
        await run()
    assert caught.value is error
    assert events == ["worker starts", "worker ends"] and hub.state.loop is None


async def test_a_second_cancellation_still_stops_the_hub() -> None:
    """One that comes while a worker ends cuts the wait for it short."""
    hub, is_stuck, may_end = Hub(), asyncio.Event(), asyncio.Event()
    ws, workers = Pachinko(new_app(), "/ws", hub=hub), list[Any]()

    @ws.worker
    async def work() -> None:
        workers.append(asyncio.current_task())
        try:
            await asyncio.Event().wait()
        finally:
            is_stuck.set()
            await may_end.wait()

    async def main() -> None:
        async with ws.running():
            await asyncio.sleep(0.01)
            raise asyncio.CancelledError

    task = asyncio.create_task(main())
    await asyncio.wait_for(is_stuck.wait(), PATIENCE)
    task.cancel()
    await asyncio.wait([task], timeout=PATIENCE)
    assert task.cancelled() and hub.state.loop is None
    may_end.set()
    await asyncio.wait(workers, timeout=PATIENCE)


async def test_a_block_that_cannot_start_starts_nothing() -> None:
    """What other endpoints had begun is stopped; the hub in the other loop goes on."""
    app, free, taken = new_app(), Hub(), Hub()
    events: list[str] = []
    working(Pachinko(app, "/a", hub=free), events)
    ws = Pachinko(app, "/b", hub=taken)
    working(ws, events)

    async def enter() -> None:
        async with ws.running():
            raise AssertionError("it has started")

    taken.state.start(self := object())
    with pytest.raises(PachinkoError, match="another thread or event loop"):
        await asyncio.to_thread(asyncio.run, enter())
    assert events == [] and free.state.loop is None
    assert taken.state.loop is asyncio.get_running_loop()
    await taken.state.stop(self)
    async with ws.running():
        await until(lambda: len(events) == 2)
    assert free.state.loop is taken.state.loop is None


async def test_two_servers_of_one_app_are_counted() -> None:
    """Each has a lifespan; the first that ends stops nothing."""
    events, hub = list[str](), Hub()
    app = with_pool_behind(events, hub)
    async with serving(app) as first:
        async with serving(app):
            await until(lambda: "worker starts" in events)
            await first.stop()
            assert "worker ends" not in events and hub.state.loop is not None
        assert events.count("worker starts") == events.count("worker ends") == 1
        assert hub.state.loop is None


async def test_one_endpoint_alone() -> None:
    """The others of its app start with a block of their own, or with their first client."""
    events, app = list[str](), new_app()
    first, second = (Pachinko(app, f"/{name}", hub=Hub()) for name in ("first", "second"))
    for ws, name in ((first, "first"), (second, "second")):
        working(ws, events, name)
    async with second.running(alone=True):
        await until(lambda: events)
        assert first._hub.state.loop is None
    assert events == ["second starts", "second ends"]
