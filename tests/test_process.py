"""A process of a simulated application: its start and stop, handshakes, and processes together."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import attrs
import falcon
import falcon.asgi
import pytest
from support import PATIENCE, until

import pachinko
import pachinko_cluster
from pachinko import (
    Close,
    Connection,
    Hub,
    Pachinko,
    PachinkoError,
    Refused,
    message,
    simulate,
)

App = Callable[[Any, Any, Any], Awaitable[None]]


@message("said")
@attrs.frozen
class Said:
    text: str


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """After each test the library has its own clock, and no simulation."""
    yield
    assert pachinko.bug_hooks == []
    assert type(pachinko.clock) is pachinko.Clock


def room(app: Any = None, path: str | None = None, **options: Any) -> Pachinko:
    """An endpoint whose clients are in a group, and may speak to it."""
    ws = Pachinko(app, path, **options)

    @ws.connect
    async def enter(conn: Connection) -> None:
        await conn.join("room")

    @ws.on("say")
    async def say(conn: Connection, said: str) -> None:
        await conn.hub.send("room", Said(said))

    return ws


def falcon_app(hub: Hub | None = None) -> App:
    app = falcon.asgi.App()
    room(app, "/ws", hub=hub or Hub())
    return app


def added_by_hand() -> App:
    app, ws = falcon.asgi.App(), room(hub=Hub())
    app.add_route("/ws", ws)
    app.add_middleware(ws)
    return app


def added_without_middleware() -> App:
    app = falcon.asgi.App()
    app.add_route("/ws", room(hub=Hub()))
    return app


def wrapped() -> App:
    inner = falcon_app()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await inner(scope, receive, send)

    return app


def wrapped_in_a_class() -> App:
    class Wrapper:
        def __init__(self) -> None:
            self.inner = falcon_app()

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await self.inner(scope, receive, send)

    return Wrapper()


def without_a_lifespan() -> App:
    inner = falcon_app()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket"
        await inner(scope, receive, send)

    return app


def with_a_lifespan_that_returns() -> App:
    inner = falcon_app()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await inner(scope, receive, send)

    return app


def mounted() -> App:
    """An app below a path of another one, which has the lifespan for itself."""
    inner = falcon_app()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for what in ("startup", "shutdown"):
                assert (await receive())["type"] == f"lifespan.{what}"
                await send({"type": f"lifespan.{what}.complete"})
        else:
            path = scope["path"].removeprefix("/api")
            await inner({**scope, "path": path, "root_path": "/api"}, receive, send)

    return app


def run_by_its_mount() -> App:
    """An app whose hub runs in the lifespan of the app that it is mounted in."""
    inner = falcon.asgi.App()
    ws = room(inner, "/ws", hub=Hub())

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            async with ws.running():
                pass  # It may run more than once.
            async with ws.running():
                await send({"type": "lifespan.startup.complete"})
                await receive()
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await inner(scope, receive, send)

    return app


each_shape = pytest.mark.parametrize(
    "make",
    [
        falcon_app, added_by_hand, added_without_middleware, wrapped, wrapped_in_a_class,
        without_a_lifespan, with_a_lifespan_that_returns, mounted, run_by_its_mount,
    ],
)  # fmt: skip


@each_shape
async def test_an_application_of_any_shape_is_simulated(make: Callable[[], App]) -> None:
    """The library finds its endpoints wherever they are, and stops them at the end."""
    app = make()
    for _ in range(2):  # The second one shows that nothing of the first is left.
        async with simulate(app) as sim:
            ada = await sim.connect("/ws")
            await ada.send("say", "hi")
            assert await ada.receive(Said) == Said("hi")
            assert sim.hub.members("room") == {ada.conn}
            assert [each.payload for each in sim.published("room")] == [{"text": "hi"}]
            hub = sim.hub
        assert hub.state.loop is None
        assert (await ada.closed())[0] == 1012


@each_shape
async def test_an_application_of_any_shape_has_several_processes(make: Callable[[], App]) -> None:
    """The simulated broker carries messages between them, until it is lost."""
    async with simulate(make) as sim, sim.process() as other:
        ada, bob = await sim.connect("/ws"), await other.connect("/ws")
        await ada.send("say", "hi")
        assert await bob.receive(Said) == Said("hi")
        assert other.hub is bob.conn.hub is not ada.conn.hub is sim.hub
        assert len(sim.published("room")) == 1
        await bob.send("say", "ho")
        await sim.settle()
        assert [each.payload["text"] for each in sim.published("room")] == ["hi", "ho"]


async def test_processes_that_an_outage_divides_come_together_again() -> None:
    """A group has a gap after an outage, and goes on."""
    async with simulate(wrapped) as sim:
        other = await sim.process()
        ada, bob = await sim.connect("/ws"), await other.connect("/ws")
        sim.broker.lose()
        await sim.settle()
        sim.broker.restore()
        await sim.settle()
        assert await bob.receive("gap") == {"group": "room"}
        await ada.send("say", "hi")
        assert await bob.receive(Said) == Said("hi")


async def test_an_environment_with_a_broker_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A simulation connects to no broker, whatever a hub is configured for."""
    monkeypatch.setenv("PACHINKO_BACKPLANE", "nats://127.0.0.1:1")
    async with simulate(without_a_lifespan) as sim:
        await sim.connect("/ws")


async def test_a_backplane_of_one_s_own_is_replaced() -> None:
    """The broker of the simulation stands between the processes instead."""
    own = pachinko_cluster.SimulatedBroker()

    def make() -> App:
        app = falcon.asgi.App()
        hub = Hub()
        hub.configure(own.connection())
        room(app, "/ws", hub=hub)
        return app

    async with simulate(make) as sim, sim.process() as other:
        ada, bob = await sim.connect("/ws"), await other.connect("/ws")
        await ada.send("say", "hi")
        assert await bob.receive(Said) == Said("hi")
        assert not own.connections and len(sim.broker.connections) == 2


# Start and stop


def lifespan_app(script: Callable[[Any, Any], Awaitable[None]]) -> App:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await script(receive, send)

    return app


class Middleware:
    """Middleware of an app, whose startup and shutdown are functions of a test."""

    def __init__(self, startup: Any = None, shutdown: Any = None) -> None:
        self.startup, self.shutdown = startup, shutdown

    async def process_startup(self, scope: Any, event: Any) -> None:
        if self.startup is not None:
            await self.startup()

    async def process_shutdown(self, scope: Any, event: Any) -> None:
        if self.shutdown is not None:
            await self.shutdown()


async def never() -> None:
    await asyncio.Event().wait()


async def fail() -> None:
    raise OSError("no database")


async def test_a_startup_may_take_real_time() -> None:
    """A simulation waits for a real timer of the startup."""
    app, times = falcon.asgi.App(), []

    async def startup() -> None:
        await asyncio.sleep(0.02)
        times.append("up")

    app.add_middleware(Middleware(startup))
    async with simulate(app):
        assert times == ["up"]


async def test_a_startup_that_fails_is_told() -> None:
    """Its text has what the application says."""
    app = falcon.asgi.App(middleware=[Middleware(fail)])
    with pytest.raises(PachinkoError, match=r"startup of the application has failed(.|\n)*no data"):
        async with simulate(app):
            pytest.fail("it has not started")


async def test_a_startup_that_hangs_is_named() -> None:
    """It fails at once if nothing can end it."""
    app = falcon.asgi.App(middleware=[Middleware(never)])
    with pytest.raises(AssertionError, match=r"startup does not end: .*never .*test_process.py"):
        async with simulate(app):
            pytest.fail("it has not started")


async def test_a_startup_that_takes_too_long_is_named() -> None:
    """It has the simulation's timeout, once."""

    async def startup() -> None:
        await asyncio.sleep(100)

    app = falcon.asgi.App(middleware=[Middleware(startup)])
    with pytest.raises(AssertionError, match=r"the startup has not come within 1 s: .*startup"):
        async with simulate(app, timeout=1.0):
            pytest.fail("it has not started")


@pytest.mark.parametrize("what", ["raises", "returns"])
async def test_a_lifespan_that_ends_in_the_startup(what: str) -> None:
    """A bug in it fails the start; one that answers nothing is not there."""

    async def script(receive: Any, send: Any) -> None:
        await receive()
        if what == "raises":
            raise OSError("no database")

    if what == "returns":
        async with simulate(lifespan_app(script)):
            return
    with pytest.raises(PachinkoError, match=r"startup .* failed: OSError\('no database'\)"):
        async with simulate(lifespan_app(script)):
            pytest.fail("it has not started")


async def test_a_shutdown_that_fails_fails_the_test() -> None:
    """The error has what the application says."""
    app = falcon.asgi.App(middleware=[Middleware(shutdown=fail)])
    with pytest.raises(
        PachinkoError, match=r"shutdown of the application has failed(.|\n)*no data"
    ):
        async with simulate(app):
            pass


async def test_a_shutdown_that_hangs_is_named() -> None:
    """It is cancelled, and hubs are stopped all the same."""
    app = falcon.asgi.App(middleware=[Middleware(shutdown=never)])
    room(app, "/ws")
    with pytest.raises(AssertionError, match=r"shutdown does not end: .*never .*test_process.py"):
        async with simulate(app) as sim:
            await sim.connect("/ws")
    assert len(asyncio.all_tasks()) == 1
    assert pachinko.hub.state.loop is None


async def test_a_lifespan_that_has_ended_early_is_told_nothing() -> None:
    """One that returns after its startup needs no shutdown."""

    async def script(receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})

    async with simulate(lifespan_app(script)) as sim:
        await sim.settle()


async def test_the_lifespan_hands_a_state_to_connections() -> None:
    """Each connection has a copy of it (ASGI, Lifespan State)."""
    states: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            scope["state"]["db"] = "a database"
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
        else:
            states.append(scope["state"])
            scope["state"]["own"] = True
            await send({"type": "websocket.close"})

    async with simulate(app) as sim:
        for _ in range(2):
            with pytest.raises(Refused):
                await sim.connect("/")
    assert states == [{"db": "a database", "own": True}] * 2
    assert states[0] is not states[1]


@pytest.mark.parametrize("how", ["await", "async with", "both", "connect", "kill", "stop"])
async def test_a_process_starts_once(how: str) -> None:
    """It may be awaited, entered, or used, and ends with the simulation."""
    starts: list[str] = []

    def make() -> App:
        starts.append("")
        return falcon_app()

    async with simulate(make) as sim:
        assert starts == [""]
        other = sim.process()
        assert starts == [""]
        if how in ("await", "both", "kill", "stop"):
            assert await other is other
            await other
        if how in ("async with", "both"):
            async with other as entered:
                assert entered is other
        if how == "connect":
            await other.connect("/ws")
        if how == "kill":
            other.kill()
            other.kill()
        if how == "stop":
            await other.stop()
            await other.stop()
    assert starts == ["", ""]
    assert other.hub.state.loop is None


@pytest.mark.parametrize("end", ["kill", "stop"])
async def test_a_process_that_has_ended_takes_nobody(end: str) -> None:
    """A connect says what to do."""
    async with simulate(falcon_app) as sim:
        other = await sim.process()
        await other.stop() if end == "stop" else other.kill()
        with pytest.raises(PachinkoError, match=r"has ended; await sim.process\(\) starts another"):
            await other.connect("/ws")


async def test_a_process_that_has_not_started_takes_nobody() -> None:
    """Its application is not ready for anybody."""

    async def fail() -> None:
        raise OSError("no database")

    apps = iter([falcon_app(), falcon.asgi.App(middleware=[Middleware(fail)])])
    async with simulate(lambda: next(apps)) as sim:
        other = sim.process()
        for match in ("no database", "has ended"):
            with pytest.raises(PachinkoError, match=match):
                await other.connect("/ws")


@pytest.mark.parametrize("use", [lambda sim: sim.begin(), lambda sim: sim.connect("/ws")])
async def test_outside_of_its_block_nothing_starts(use: Any) -> None:
    """The error says so before the application is called."""
    calls = list[Any]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        calls.append(scope)

    with pytest.raises(PachinkoError, match="inside of its block"):
        await use(simulate(app))
    await asyncio.sleep(0)
    assert calls == []


async def test_clients_that_come_at_once_start_a_process_once() -> None:
    """All of them wait until the startup is over."""
    seen = list[str]()

    async def start() -> None:
        await asyncio.sleep(0.01)
        seen.append("up")

    def make() -> App:
        app = falcon.asgi.App(middleware=[Middleware(start)])
        ws = Pachinko(app, "/ws", hub=Hub())

        @ws.connect
        async def arrive(conn: Connection) -> None:
            seen.append("in")

        return app

    async with simulate(make) as sim:
        seen.clear()
        other = sim.process()
        await asyncio.gather(*(other.connect("/ws") for _ in range(3)))
    assert seen == ["up", "in", "in", "in"]


async def test_a_process_that_is_killed_as_it_starts_takes_nobody() -> None:
    """Who connects meanwhile is told."""
    others = list[Any]()

    async def kill() -> None:
        for other in others:
            other.kill()

    async with simulate(lambda: falcon.asgi.App(middleware=[Middleware(kill)])) as sim:
        others.append(sim.process())
        with pytest.raises(PachinkoError, match="has ended"):
            await others[0].connect("/ws")


async def test_processes_may_come_one_after_the_other() -> None:
    """The memory of one that has ended may be that of the application of another."""

    class Around:
        def __init__(self) -> None:
            self.app = falcon_app()

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await self.app(scope, receive, send)

    async with simulate(Around) as sim:
        for _ in range(10):
            async with sim.process():
                pass


async def test_a_process_that_was_never_started_needs_no_end() -> None:
    """Both of its ends do nothing."""
    async with simulate(falcon_app) as sim:
        await sim.process().stop()
        sim.process().kill()


async def test_clients_of_a_killed_process_are_cut() -> None:
    """They get 1006, at once, and the application learns of it when all is over."""
    ends: list[int | None] = []

    def make() -> App:
        app = falcon.asgi.App()
        ws = room(app, "/ws", hub=Hub())

        @ws.disconnect
        async def leave(conn: Connection) -> None:
            ends.append(conn.close_code)

        return app

    async with simulate(make) as sim:
        other = await sim.process()
        ada, bob = await sim.connect("/ws"), await other.connect("/ws")
        other.kill()
        assert await bob.closed() == (1006, "")
        await ada.send("say", "hi")
        assert await ada.receive(Said) == Said("hi")
        await sim.settle()
        assert ends == []
        with pytest.raises(AssertionError):
            await bob.send("say", "hi")
    assert len(ends) == 2


async def test_clients_of_a_process_that_stops_are_closed() -> None:
    """They get 1012, as from a server that stops, and others stay."""
    async with simulate(falcon_app) as sim:
        async with sim.process() as other:
            ada, bob = await sim.connect("/ws"), await other.connect("/ws")
        assert await bob.closed() == (1012, "the server shuts down")
        await ada.send("say", "hi")
        assert await ada.receive(Said) == Said("hi")


async def test_workers_of_a_killed_process_run_no_more() -> None:
    """Another process has the lease of a worker when it has expired."""
    runs: list[int] = []
    processes = iter(range(9))

    def make() -> App:
        app, process = falcon.asgi.App(), next(processes)
        ws = room(app, "/ws", hub=Hub())

        @ws.worker(once=True)
        async def work() -> None:
            runs.append(process)
            await never()

        return app

    async with simulate(make) as sim:
        first = await sim.process()
        await sim.settle()
        assert runs == [0]
        first.kill()
        await sim.settle()
        assert runs == [0]


@pytest.mark.parametrize("part", ["the module's hub", "one hub", "one app", "one app by hand"])
async def test_two_processes_share_nothing(part: str) -> None:
    """The error has the corrected code, and the first process goes on."""
    hub = Hub() if part == "one hub" else pachinko.hub
    app = falcon.asgi.App()
    if part == "one app":
        room(app, "/ws")
    elif part == "one app by hand":
        app.add_route("/ws", room())

    def make() -> App:
        return app if "app" in part else falcon_app(hub)

    async with simulate(make) as sim:
        ada = await sim.connect("/ws")
        with pytest.raises(PachinkoError, match=r'Pachinko\(app, "/ws", hub=Hub\(\)\)'):
            await sim.process()
        await ada.send("say", "hi")
        assert await ada.receive(Said) == Said("hi")


async def test_a_second_process_needs_a_function() -> None:
    """The error has the corrected code."""
    async with simulate(falcon_app()) as sim:
        with pytest.raises(PachinkoError, match=r"write simulate\(make_app\)"):
            sim.process()


@pytest.mark.parametrize("made", [None, 5])
async def test_the_function_returns_an_application(made: Any) -> None:
    """Anything else is refused by name."""
    with pytest.raises(PachinkoError, match=f"returned {made}"):
        async with simulate(lambda: made):
            pytest.fail("it has not started")


async def test_the_hub_is_that_of_the_first_pachinko() -> None:
    """Hubs of an app are apart from one another, and reach those of the same place elsewhere."""

    def make() -> App:
        app = falcon.asgi.App()
        room(app, "/a", hub=Hub())
        room(app, "/b", hub=Hub())
        return app

    async with simulate(make) as sim:
        other = await sim.process()
        one, two = await sim.connect("/a"), await sim.connect("/b")
        three, four = await other.connect("/a"), await other.connect("/b")
        assert sim.hub is one.conn.hub
        assert sim.hubs == [one.conn.hub, two.conn.hub]
        await one.send("say", "hi")
        await sim.settle()
        assert [len(each.received) for each in (one, two, three, four)] == [1, 0, 1, 0]
        assert four.conn.hub in other.hubs


async def test_several_pachinkos_may_have_one_hub() -> None:
    """What it sends is noted once."""
    app = falcon.asgi.App()
    hub = Hub()
    room(app, "/a", hub=hub)
    room(app, "/b", hub=hub)
    async with simulate(app) as sim:
        ada, bob = await sim.connect("/a"), await sim.connect("/b")
        await ada.send("say", "hi")
        assert await bob.receive(Said) == Said("hi")
        assert len(sim.published("room")) == 1


async def test_processes_without_a_broker_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``memory://`` says."""
    monkeypatch.setenv("PACHINKO_BACKPLANE", "memory://")
    async with simulate(falcon_app) as sim, sim.process() as other:
        ada, bob = await sim.connect("/ws"), await other.connect("/ws")
        await ada.send("say", "hi")
        await sim.settle()
        assert bob.received == []


async def test_one_process_needs_no_companion(monkeypatch: pytest.MonkeyPatch) -> None:
    """An app is simulated where the module is used alone; several processes are not."""
    monkeypatch.setitem(sys.modules, "pachinko_cluster", None)
    async with simulate(falcon_app()) as sim:
        await sim.connect("/ws")
        with pytest.raises(PachinkoError, match="pachinko_cluster"):
            sim.broker.lose()
    with pytest.raises(PachinkoError, match="pachinko_cluster"):
        async with simulate(falcon_app):
            pytest.fail("it has not started")


async def test_a_responder_of_falcon_is_simulated() -> None:
    """An app needs no Pachinko. Its hub is the module's, which is not running."""

    class Echo:
        async def on_websocket(self, req: Any, ws: falcon.asgi.WebSocket) -> None:
            await ws.accept()
            await ws.send_text(f"hello {req.get_param('name')}")
            with contextlib.suppress(falcon.WebSocketDisconnected):
                while True:
                    await ws.send_text(await ws.receive_text())
                    await asyncio.sleep(0)

    app = falcon.asgi.App()
    app.add_route("/echo", Echo())
    async with simulate(app) as sim:
        ada = await sim.connect("/echo?name=ada")
        assert (await ada.receive()).payload == "hello ada"
        await ada.send_text("x")
        assert (await ada.receive()).payload == "x"
        assert sim.hub is pachinko.hub
        with pytest.raises(PachinkoError, match="no Pachinko serves /echo"):
            _ = ada.conn
        await ada.close()


async def test_a_responder_that_never_rests_is_connected_to() -> None:
    """Without a Pachinko, a client is in once it is accepted."""

    class Ticker:
        async def on_websocket(self, req: Any, ws: falcon.asgi.WebSocket) -> None:
            await ws.accept()
            with contextlib.suppress(falcon.WebSocketDisconnected):
                while True:
                    await ws.send_text("tick")
                    await asyncio.sleep(0.001)

    app = falcon.asgi.App()
    app.add_route("/ticks", Ticker())
    async with simulate(app) as sim:
        ada = await sim.connect("/ticks")
        assert (await ada.receive()).payload == "tick"


# What hubs send


async def test_what_a_worker_sends_at_first_is_published() -> None:
    """A hub's messages are noted from its start."""
    app = falcon.asgi.App()
    ws = room(app, "/ws")

    @ws.worker
    async def work() -> None:
        await pachinko.hub.send("news", "first")
        await never()

    async with simulate(app) as sim:
        await sim.settle()
        assert [each.type for each in sim.published("news")] == ["first"]


async def test_published_holds_all_that_goes_to_a_group() -> None:
    """Frames of bytes are there; other groups, users, connections and broadcasts are not."""
    async with simulate(falcon_app()) as sim:
        ada = await sim.connect("/ws")
        await sim.hub.send("room", "one", {"n": 1})
        await sim.hub.send("room", b"\x00\x01")
        await sim.hub.send("other", "two")
        await sim.hub.send_to(ada.conn, "three")
        await sim.hub.send_to_user("ada", "four")
        await sim.hub.broadcast("five")
        published = sim.published("room")
        assert [(each.type, each.payload, each.group) for each in published] == [
            ("one", {"n": 1}, "room"),
            ("", b"\x00\x01", "room"),
        ]
        assert sim.published("nobody's") == []


# Handshakes


async def seen(path: str = "/ws", **options: Any) -> Any:
    """The request that an application sees."""
    app, requests = falcon.asgi.App(), []
    ws = Pachinko(app, "/ws", origins="*", subprotocols=["a", "b"])

    @ws.connect
    async def note(conn: Connection) -> None:
        requests.append(conn.req)

    async with simulate(app) as sim:
        client = await sim.connect(path, **options)
        return requests[0], client


@pytest.mark.parametrize(
    ("headers", "host"),
    [
        (None, "localhost"),
        ({"X-One": "1"}, "localhost"),
        ([("X-One", "1"), ("x-one", "2")], "localhost"),
        ({"host": "example.com", "x-one": "1"}, "example.com"),
        (iter([("HOST", "example.com")]), "example.com"),
    ],
)
async def test_headers_are_a_mapping_or_pairs(headers: Any, host: str) -> None:
    """One that a client always sends may be replaced."""
    req, _ = await seen(headers=headers)
    assert req.host == host
    assert req.get_header("X-One") in (None, "1", "1,2")


@pytest.mark.parametrize("headers", [{"X-One": 1}, {b"X-One": "1"}, ["X-One"], {"X-One": "€"}])
async def test_a_header_is_text(headers: Any) -> None:
    """Anything else is refused, with the corrected code."""
    with pytest.raises(PachinkoError, match=r'headers=\{"X-Name": "value"\}'):
        await seen(headers=headers)


async def test_a_token_goes_into_a_header() -> None:
    """It is that of RFC 6750."""
    req, _ = await seen(token="s3cret", cookies={"a": "1", "b": "2"}, origin="https://example.com")
    assert req.auth == "Bearer s3cret"
    assert req.cookies == {"a": "1", "b": "2"}
    assert req.get_header("Origin") == "https://example.com"


@pytest.mark.parametrize(
    ("path", "query", "text"),
    [
        ("/ws", None, ""),
        ("/ws?a=1", None, "a=1"),
        ("/ws", "a=1&b=%20", "a=1&b=%20"),
        ("/ws", {"a": 1, "b": " "}, "a=1&b=+"),
        ("/ws", {"a": [1, 2]}, "a=1&a=2"),
        ("/ws?a=1", {"b": 2}, "a=1&b=2"),
        ("/ws?a=1", "b=2", "a=1&b=2"),
        ("/%77s", "", ""),
    ],
)
async def test_a_query_is_text_or_a_mapping_or_in_the_path(
    path: str, query: Any, text: str
) -> None:
    """The application gets one text of them."""
    req, _ = await seen(path, query=query)
    assert req.query_string == text
    assert req.path == "/ws"


@pytest.mark.parametrize("path", ["ws", "", "ws://localhost/ws", None, 5])
async def test_a_path_has_a_leading_slash(path: Any) -> None:
    """The error has the corrected code."""
    with pytest.raises(PachinkoError, match=r'sim.connect\("/ws"\)'):
        await seen(path)


@pytest.mark.parametrize(
    ("offered", "chosen"), [((), None), (["b"], "b"), (["c", "b", "a"], "a"), (("c",), None)]
)
async def test_subprotocols_are_offered(offered: Any, chosen: str | None) -> None:
    """The client knows the one that was chosen."""
    _, client = await seen(subprotocols=offered)
    assert client.subprotocol == chosen


async def test_subprotocols_are_several() -> None:
    """One text is refused."""
    with pytest.raises(PachinkoError, match=r"subprotocols=\['a'\]"):
        await seen(subprotocols="a")


def refusing(where: str, error: Callable[[], BaseException], **options: Any) -> App:
    """An app in which a part of the handshake raises an error."""
    app = falcon.asgi.App()
    ws = Pachinko(app, "/ws", **options)

    async def refuse(conn: Connection) -> None:
        raise error()

    async def authenticate(conn: Connection, token: str | None) -> str:
        raise error()

    if where == "authenticate":
        ws.authenticate(authenticate)
    else:
        (ws.connect if where == "connect" else ws.accepted)(refuse)

    return app


each_part = pytest.mark.parametrize("where", ["authenticate", "connect", "accepted"])


@each_part
async def test_an_http_error_refuses(where: str) -> None:
    """The status, the reason and the headers are those of the error."""

    def error() -> falcon.HTTPError:
        return falcon.HTTPTooManyRequests(description="later", headers={"Retry-After": "7"})

    async with simulate(refusing(where, error)) as sim:
        with pytest.raises(Refused) as caught:
            await sim.connect("/ws", token="x")
    refused = caught.value
    if where == "accepted":
        assert (refused.status, refused.code) == (None, 3429)
    else:
        assert (refused.status, refused.code, refused.reason) == (429, None, "later")
        assert refused.headers["retry-after"] == "7"
        assert str(refused) == "HTTP 429: later"


@each_part
async def test_a_close_refuses(where: str) -> None:
    """A close before the accept is HTTP 403, as servers make of it, or a close frame."""
    async with simulate(refusing(where, lambda: Close(4001, "full"))) as sim:
        with pytest.raises(Refused) as caught:
            await sim.connect("/ws", token="x")
    refused = caught.value
    assert (refused.status == 403) is (refused.code is None)
    assert refused.code in (None, 4001)
    assert "full" in refused.reason


@each_part
async def test_a_bug_refuses_and_fails_the_test(where: str) -> None:
    """The bug is the cause of both errors."""
    bug = ZeroDivisionError("bug")
    sim = simulate(refusing(where, lambda: bug))
    await sim.__aenter__()
    with pytest.raises(Refused) as refused:
        await sim.connect("/ws", token="x")
    with pytest.raises(AssertionError, match="ZeroDivisionError") as caught:
        await sim.__aexit__(None, None, None)
    assert caught.value.__cause__ is refused.value.__cause__ is bug


@each_part
async def test_a_bug_in_the_handshake_may_be_expected(where: str) -> None:
    """It is found once, though several parts tell of it."""
    bug = ZeroDivisionError("bug")
    async with simulate(refusing(where, lambda: bug)) as sim:
        with sim.bugs(ZeroDivisionError) as bugs, pytest.raises(Refused):
            await sim.connect("/ws", token="x")
        assert bugs == [bug]


async def test_a_wrong_token_refuses() -> None:
    """A client that comes again with the right one is in."""
    app = falcon.asgi.App()
    ws = Pachinko(app, "/ws")

    @ws.authenticate
    async def authenticate(conn: Connection, token: str | None) -> str | None:
        return "ada" if token == "s3cret" else None

    async with simulate(app) as sim:
        with pytest.raises(Refused) as caught:
            await sim.connect("/ws", token="wrong")
        assert caught.value.code == 3401
        ada = await sim.connect("/ws", token="s3cret")
        assert ada.conn.user == "ada"


async def test_a_client_may_authenticate_by_a_message() -> None:
    """The client is returned before the server knows it, also while others keep the app busy."""
    app = falcon.asgi.App()
    ws = Pachinko(app, "/ws")

    @ws.authenticate
    async def authenticate(conn: Connection, token: str | None) -> str | None:
        return token or None

    @ws.on("nap")
    async def nap(conn: Connection) -> None:
        await asyncio.sleep(PATIENCE)  # It outlasts the test, and no wait in it may last so long.

    async with simulate(app) as sim:
        bob = await sim.connect("/ws", token="bob")
        await bob.send("nap")
        ada = await sim.connect("/ws")
        assert ada.conn.user is None
        await ada.send("authenticate", {"token": "ada"}, id=1)
        await ada.receive()
        assert ada.conn.user == "ada"


async def test_a_guest_is_let_in() -> None:
    """With an optional authentication no token is needed."""
    app = falcon.asgi.App()
    ws = Pachinko(app, "/ws")

    @ws.authenticate(optional=True)
    async def authenticate(conn: Connection, token: str | None) -> str | None:
        return None

    async with simulate(app) as sim:
        assert (await sim.connect("/ws")).conn.user is None


async def test_an_origin_is_checked() -> None:
    """That of a foreign page is refused with 403."""
    async with simulate(falcon_app()) as sim:
        await sim.connect("/ws", origin="http://localhost")
        with pytest.raises(Refused, match="HTTP 403: pages of this origin may not connect"):
            await sim.connect("/ws", origin="https://example.com")


async def test_a_path_without_a_route_refuses() -> None:
    """As with any server, Falcon answers."""
    async with simulate(falcon_app()) as sim:
        with pytest.raises(Refused) as caught:
            await sim.connect("/nowhere")
        assert caught.value.status in (403, 404)


async def test_a_hub_that_drains_refuses() -> None:
    """The status is 503."""
    async with simulate(falcon_app()) as sim:
        ada = await sim.connect("/ws")
        await sim.hub.drain(0)
        assert (await ada.closed())[0] == 1012
        with pytest.raises(Refused, match="HTTP 503"):
            await sim.connect("/ws")


@pytest.mark.parametrize("error", [falcon.HTTPForbidden(description="no"), None])
async def test_middleware_of_falcon_refuses(error: falcon.HTTPError | None) -> None:
    """It may raise, or close."""

    class Guard:
        async def process_request_ws(self, req: Any, ws: falcon.asgi.WebSocket) -> None:
            if error is not None:
                raise error
            await ws.close(4000)

    app = falcon.asgi.App(middleware=[Guard()])
    room(app, "/ws")
    async with simulate(app) as sim:
        with pytest.raises(Refused) as caught:
            await sim.connect("/ws")
        assert caught.value.status == 403


async def test_an_error_handler_of_the_app_refuses() -> None:
    """It is asked first."""
    app = refusing("connect", falcon.HTTPConflict)

    async def handle(req: Any, resp: Any, error: Any, params: Any, ws: Any) -> None:
        await ws.close(4009)

    app.add_error_handler(falcon.HTTPConflict, handle)  # type: ignore[attr-defined]  # a Falcon app
    async with simulate(app) as sim:
        with pytest.raises(Refused, match="4009"):
            await sim.connect("/ws")


async def test_a_handshake_without_an_answer_is_named() -> None:
    """It fails at once, and the client leaves."""
    app = falcon.asgi.App()
    ws = Pachinko(app, "/ws")

    @ws.connect
    async def wait(conn: Connection) -> None:
        await never()

    async with simulate(app) as sim:
        with pytest.raises(AssertionError, match=r"nobody answers the handshake: .*never .*py:"):
            await sim.connect("/ws")


async def test_an_application_that_answers_nothing_refuses() -> None:
    """One that raises is refused with 500, and the error is the cause."""

    async def silent(scope: Any, receive: Any, send: Any) -> None:
        return None

    async with simulate(silent) as sim:
        with pytest.raises(Refused, match="HTTP 500: the application has not answered"):
            await sim.connect("/ws")


async def test_a_bug_of_an_application_fails_the_test() -> None:
    """Also outside of Falcon."""
    bug = ZeroDivisionError("bug")

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            raise bug

    sim = simulate(broken)
    await sim.__aenter__()
    with pytest.raises(Refused) as refused:
        await sim.connect("/ws")
    with pytest.raises(AssertionError, match="the application, for #1, has failed") as caught:
        await sim.__aexit__(None, None, None)
    assert caught.value.__cause__ is refused.value.__cause__ is bug


async def test_a_connect_that_is_cancelled_leaves() -> None:
    """Its client is gone."""
    app = falcon.asgi.App()
    ws = Pachinko(app, "/ws", connect_timeout=100)

    @ws.connect
    async def wait(conn: Connection) -> None:
        await asyncio.sleep(100)

    async with simulate(app) as sim:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await sim.connect("/ws")
        sim.advance(100)  # `connect_timeout`
        await sim.settle()
        assert sim.hub.count == 0


# The end


def lasting(work: Callable[[Connection], Awaitable[Any]], **options: Any) -> App:
    """An app whose handler of ``last`` does *work*."""
    app = falcon.asgi.App()
    ws = Pachinko(app, "/ws", **options)

    @ws.on("last")
    async def last(conn: Connection) -> None:
        await work(conn)

    return app


async def tick(conn: Connection) -> None:
    while True:
        await asyncio.sleep(0.001)


async def spin(conn: Connection) -> None:
    while True:
        await asyncio.sleep(0)


@pytest.mark.parametrize("work", [lambda conn: never(), tick, spin])
async def test_the_end_takes_no_real_linger(work: Any) -> None:
    """Handlers in progress are cancelled at once, whatever they wait for."""
    begun = asyncio.get_running_loop().time()
    async with simulate(lasting(work, linger=100)) as sim:
        ada = await sim.connect("/ws")
        await ada.send("last")
        await asyncio.sleep(0.01)
    assert asyncio.get_running_loop().time() - begun < 50
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize(("count", "turns"), [(3000, 20), (400, 50)])
async def test_what_was_sent_last_is_handled(count: int, turns: int) -> None:
    """However much it is."""
    app, done = falcon.asgi.App(), list[int]()
    ws = Pachinko(app, "/ws", hub=Hub(), rate=None)

    @ws.on("work")
    async def work(conn: Connection) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        done.append(turns)

    async with simulate(app, timeout=PATIENCE) as sim:
        ada = await sim.connect("/ws")
        for _ in range(count):
            await ada.send("work")
    assert len(done) == count


async def test_the_end_names_what_does_not_end() -> None:
    """It cancels it once more, and goes on."""
    release = asyncio.Event()

    async def ignore(conn: Connection) -> None:
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()

    sim = simulate(lasting(ignore), timeout=1.0)
    await sim.__aenter__()
    try:
        ada = await sim.connect("/ws")
        await ada.send("last")
        with pytest.raises(AssertionError, match=r"does not end: .*ignore .*py:"):
            await sim.__aexit__(None, None, None)
    finally:
        release.set()
    await until(lambda: len(asyncio.all_tasks()) == 1)


async def test_a_disconnect_handler_that_hangs_is_named() -> None:
    """It is ended at once."""
    app = falcon.asgi.App()
    ws = Pachinko(app, "/ws")

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        await never()

    begun = asyncio.get_running_loop().time()
    with pytest.raises(AssertionError, match=r"does not end: .*leave .*never .*py:"):
        async with simulate(app) as sim:
            await sim.connect("/ws")
    assert asyncio.get_running_loop().time() - begun < 50
    assert len(asyncio.all_tasks()) == 1


async def test_streams_end_with_the_simulation() -> None:
    """What stands in their `finally` runs."""
    app, ends = falcon.asgi.App(), []
    ws = Pachinko(app, "/ws")

    @ws.on("count")
    async def count(conn: Connection) -> AsyncIterator[int]:
        try:
            yield 1
            await never()
        finally:
            ends.append("over")

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        assert await anext(ada.stream("count")) == 1
    assert ends == ["over"]


async def test_a_process_that_does_not_end_stops_no_other() -> None:
    """The rest of the simulation is stopped, and the error told."""

    def make() -> App:
        app = falcon.asgi.App(middleware=[Middleware(shutdown=fail)])
        room(app, "/ws", hub=Hub())
        return app

    with pytest.raises(PachinkoError, match="shutdown of the application has failed"):
        async with simulate(make) as sim:
            other = await sim.process()
    assert sim.hub.state.loop is other.hub.state.loop is None
