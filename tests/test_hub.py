"""Groups, sending to them, draining, calls from threads; the start and the end of a hub."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import cattrs
import falcon
import pytest
import websockets.exceptions
from support import PATIENCE, connect, new_app, simulated, turns, until

import pachinko
from pachinko import Connection, Hub, Pachinko, PachinkoError, message


@message("said")
class Said:
    text: str


def endpoint(**options: Any) -> Pachinko:
    ws = Pachinko(new_app(), "/ws/{group}", hub=Hub(), **options)

    @ws.connect
    async def arrive(conn: Connection, group: str) -> None:
        await conn.join(group)

    return ws


async def test_a_group_message_reaches_the_members_with_its_group() -> None:
    """Members get one encoding, which names the group; others get nothing."""
    ws = endpoint()
    async with (
        simulated(ws._app) as server,
        connect(server.url + "/ws/a") as one,
        connect(server.url + "/ws/a") as two,
        connect(server.url + "/ws/b") as other,
    ):
        await ws._hub.send("a", Said("hi"))
        await ws._hub.send("nobody", Said("hi"))
        await ws._hub.broadcast("end")
        for client in (one, two):
            assert await client.receive() == {
                "type": "said",
                "group": "a",
                "payload": {"text": "hi"},
            }
            assert await client.receive() == {"type": "end"}
        assert await other.receive() == {"type": "end"}
        assert ws._hub.groups == {"a", "b"}
        assert len(ws._hub.members("a")) == 2 and not ws._hub.members("nobody")


async def test_exclude_leaves_out_connections_and_ids() -> None:
    """`exclude` takes a connection, an id, or several of both."""
    ws = endpoint()
    async with (
        simulated(ws._app) as server,
        connect(server.url + "/ws/a") as one,
        connect(server.url + "/ws/a") as two,
    ):
        conns = list(ws._hub.connections)
        for exclude in (conns[0], conns[0].id, [conns[0]], {conns[0].id, "unknown"}):
            await ws._hub.send("a", "some", exclude=exclude)
        await ws._hub.send("a", "none", exclude=[conns[0], conns[1].id])
        await ws._hub.broadcast("some", exclude=conns[1])
        await ws._hub.broadcast("end")
        counts = []
        for client in (one, two):
            types = []
            while (type := (await client.receive())["type"]) != "end":
                types.append(type)
            assert set(types) == {"some"}
            counts.append(len(types))
        assert sorted(counts) == [1, 4]


async def test_send_to_finds_a_connection_by_itself_or_its_id() -> None:
    """One that is unknown or gone gets nothing, and nothing happens."""
    ws = endpoint()
    async with simulated(ws._app) as server, connect(server.url + "/ws/a") as client:
        (conn,) = ws._hub.connections
        await ws._hub.send_to(conn, "one")
        await ws._hub.send_to(conn.id, Said("two"))
        await ws._hub.send_to("unknown", "three")
        assert [(await client.receive())["type"] for _ in range(2)] == ["one", "said"]
        await client.close()
        await until(lambda: not ws._hub.state.serving)
        await ws._hub.send_to(conn, "four")
        await ws._hub.join("late", conn)
        await ws._hub.leave("late", conn)
        assert not ws._hub.groups and not conn.groups


async def test_joining_and_leaving_twice_is_once() -> None:
    """Membership is a set; an empty group is no group."""
    ws = endpoint()
    async with simulated(ws._app) as server, connect(server.url + "/ws/a") as client:
        (conn,) = ws._hub.connections
        for _ in range(2):
            await conn.join("b")
        assert conn.groups == {"a", "b"}
        await ws._hub.send("b", "once")
        for _ in range(2):
            await conn.leave("b")
        await conn.leave("never")
        await ws._hub.send("b", "not")
        await ws._hub.send("a", "end")
        assert [(await client.receive())["type"] for _ in range(2)] == ["once", "end"]
        assert conn.groups == {"a"} and ws._hub.groups == {"a"}


async def test_any_text_names_a_group() -> None:
    """Names are data: dots, stars, newlines and the empty text are as good as any."""
    ws = endpoint()
    async with simulated(ws._app) as server, connect(server.url + "/ws/a") as client:
        (conn,) = ws._hub.connections
        for name in ("", "*", "a.b >", "\n", "ü" * 10_000):
            await conn.join(name)
            await ws._hub.send(name, "hi")
            assert (await client.receive())["group"] == name


async def test_names_that_are_no_text_are_type_errors() -> None:
    """Groups, users and ids are `str`, a member is a connection or an id."""
    hub: Any = Hub()
    for call in (
        lambda: hub.join(1, None),
        lambda: hub.join("a", 5),
        lambda: hub.leave(None, None),
        lambda: hub.leave("a", 5),
        lambda: hub.send(b"a", "x"),
        lambda: hub.send_to(7, "x"),
        lambda: hub.send_to_user(7, "x"),
        lambda: hub.close_group(7),
        lambda: hub.send("a", 5),
        lambda: hub.send("a", "hello world"),
        lambda: hub.send("a", {"type": "x"}),
        lambda: hub.send("a", Said("x"), {}),
    ):
        with pytest.raises(TypeError):
            await call()
    with pytest.raises(TypeError):
        hub.members(7)
    with pytest.raises(ValueError, match="4000"):
        await hub.close_group("a", 5)


async def test_a_connection_belongs_to_one_hub() -> None:
    """To give it to another hub is a mistake, whatever the method, and whether it is open."""
    ws, other = endpoint(), endpoint()
    async with (
        simulated(ws._app) as server, connect(server.url + "/ws/a") as client,
        simulated(other._app) as elsewhere, connect(elsewhere.url + "/ws/a") as member,
    ):  # fmt: skip
        (conn,) = ws._hub.connections
        for hub in (Hub(), other._hub):
            calls: list[Callable[[], Awaitable[None]]] = [
                lambda hub=hub: hub.join("a", conn),
                lambda hub=hub: hub.leave("a", conn),
                lambda hub=hub: hub.send_to(conn, "x"),
                lambda hub=hub: hub.send("a", "x", exclude=conn),
                lambda hub=hub: hub.send("a", "x", exclude=["id", conn]),
                lambda hub=hub: hub.broadcast("x", exclude={conn}),
            ]
            for _ in range(2):
                for call in calls:
                    with pytest.raises(PachinkoError, match="another hub"):
                        await call()
                await client.close()
                await until(lambda: not ws._hub.state.serving)
        await other._hub.send("a", "end", exclude=conn.id)  # an id may be of any process
        assert (await member.receive())["type"] == "end"
        assert not other._hub.stats()["dropped"]
        assert conn.id in repr(conn) and "gone" in repr(conn)


async def test_sending_without_an_app_reaches_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Before an app runs there are no members, which is no error; one log line tells a script."""
    hub = Hub()
    await hub.send("a", "x")
    await hub.broadcast("x")
    await hub.close_group("a")
    assert hub.stats()["sent"] == 0
    (record,) = caplog.records
    assert "reaches nobody" in record.message and "hub.open(" in record.message


async def test_other_threads_use_call_threadsafe() -> None:
    """Any method of the hub can be called from a thread; calling it directly is refused."""
    ws = endpoint()
    results: list[Any] = []

    def work() -> None:
        hub = ws._hub
        hub.call_threadsafe(hub.send, "a", "from a thread", {"n": 1}).result(PATIENCE)
        results.append(hub.call_threadsafe(hub.members, "a").result(PATIENCE))
        failing = hub.call_threadsafe(hub.send, "a", 5)
        results.append(type(failing.exception(PATIENCE)))
        try:
            asyncio.run(hub.send("a", "directly"))
        except PachinkoError as exc:
            results.append(str(exc))

    async with simulated(ws._app) as server, connect(server.url + "/ws/a") as client:
        thread = threading.Thread(target=work)
        thread.start()
        assert await client.receive() == {
            "type": "from a thread",
            "group": "a",
            "payload": {"n": 1},
        }
        await asyncio.to_thread(thread.join)
        assert results[0] == ws._hub.connections and results[1] is TypeError
        assert "call_threadsafe" in results[2]


HUB_CALLS: dict[str, Any] = {
    "join": lambda hub, conn: hub.join("a", conn),
    "leave": lambda hub, conn: hub.leave("a", conn),
    "send": lambda hub, conn: hub.send("a", "x"),
    "broadcast": lambda hub, conn: hub.broadcast("x"),
    "send_to": lambda hub, conn: hub.send_to(conn, "x"),
    "send_to_user": lambda hub, conn: hub.send_to_user("ann", "x"),
    "close_group": lambda hub, conn: hub.close_group("a"),
    "presence": lambda hub, conn: hub.presence("a"),
    "drain": lambda hub, conn: hub.drain(0),
}


@pytest.mark.parametrize("method", HUB_CALLS)
async def test_a_call_from_another_thread_is_told_what_to_write(method: str) -> None:
    """The advice has the method that was called."""
    ws = endpoint()
    async with simulated(ws._app) as server, connect(server.url + "/ws/a"):
        await until(lambda: ws._hub.connections)
        (conn,) = ws._hub.connections
        call = HUB_CALLS[method](ws._hub, conn)
        with pytest.raises(PachinkoError, match=rf"hub\.call_threadsafe\(hub\.{method}, "):
            await asyncio.to_thread(asyncio.run, call)


def test_call_threadsafe_needs_a_running_app() -> None:
    """Without one, and after its loop has closed, it says so."""
    hub: Any = Hub()
    with pytest.raises(PachinkoError, match="not running"):
        hub.call_threadsafe(hub.send, "a", "x")
    with pytest.raises(TypeError, match=r"call_threadsafe\(hub\.send"):
        hub.call_threadsafe(None)
    asyncio.run(_start(hub))
    with pytest.raises(PachinkoError, match="not running"):
        hub.call_threadsafe(hub.send, "a", "x")


async def _start(hub: Hub) -> None:
    hub.state.start(object())


async def test_stats_count_what_happened() -> None:
    """Frames, errors by code, connections and groups; codes without end are put together."""
    ws = endpoint()

    @ws.on("one")
    async def one(conn: Connection) -> int:
        return 1

    async with simulated(ws._app) as server, connect(server.url + "/ws/a") as client:
        await client.ask("one")
        await client.ask("no")
        await client.ask("no")
        await ws._hub.send("a", "x")
        await client.receive()
        assert ws._hub.stats() == {
            "connections": 1,
            "groups": 1,
            "received": 3,
            "sent": 4,
            "dropped": 0,
            "evicted": 0,
            "outbox_high_water": 0,
            "late": 0,
            "refused": 0,
            "outages": 0,
            "broker_down": 0,
            "errors": 2,
            "errors.unknown_type": 2,
        }


async def test_the_converter_is_the_hubs_in_and_out() -> None:
    """`configure` sets it before the start; one encoding serves replies and groups."""
    hub = Hub()
    converter = hub.converter.copy()
    converter.register_structure_hook(falcon.HTTPStatus, lambda v, _: falcon.HTTPStatus(v))
    converter.register_unstructure_hook(falcon.HTTPStatus, lambda v: v.status_code)
    hub.configure(converter=converter)
    ws = Pachinko(new_app(), "/ws", hub=hub)

    @ws.on("status")
    async def status(conn: Connection, value: falcon.HTTPStatus) -> falcon.HTTPStatus:
        await hub.broadcast("status", value)
        return value

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        assert (await client.ask("status", 404))["payload"] == 404
        assert (await client.receive())["payload"] == 404
        with pytest.raises(PachinkoError, match="before the app starts"):
            hub.configure(converter=cattrs.Converter())
    with pytest.raises(TypeError, match="converter"):
        hub.configure(converter="json")  # type: ignore[arg-type]
    hub.configure(converter=None)
    assert hub.converter is not converter


# Settings

OTHERS: dict[str, Any] = {
    "url": "memory://",
    "namespace": "shop",
    "converter": cattrs.Converter(),
}


def settings_of(hub: Hub) -> dict[str, Any]:
    """What an application sees of them, or a process of its namespace."""
    state = hub.state
    return {"url": state.url, "namespace": state.namespace, "converter": state.codec.converter}


@pytest.mark.parametrize("names", list(itertools.permutations(OTHERS, 3)))
def test_each_configure_changes_only_what_it_names(names: tuple[str, ...]) -> None:
    """In any order; None brings the default back, again of that one alone."""
    hub = Hub()
    expected = settings_of(hub)
    for name in names:
        hub.configure(**{name: OTHERS[name]})
        expected[name] = OTHERS[name]
        assert settings_of(hub) == expected
        hub.configure()
        assert settings_of(hub) == expected
    for name in names:
        hub.configure(**{name: None})
        if name == "converter":
            assert hub.converter is not OTHERS["converter"]
            expected["converter"] = hub.converter
        else:
            expected[name] = None
        assert settings_of(hub) == expected


def test_configure_takes_several_at_once() -> None:
    """Any combination; the URL also by its place."""
    hub = Hub()
    hub.configure("memory://", namespace="a", converter=OTHERS["converter"])
    hub.configure(None, namespace="b")
    assert settings_of(hub) == {
        "url": None, "namespace": "b", "converter": OTHERS["converter"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"url": "kafka://host"}, PachinkoError),
        ({"url": 5}, TypeError),
        ({"url": "memory://", "namespace": "a b"}, PachinkoError),
        ({"namespace": "x" * 65}, PachinkoError),
        ({"url": None, "namespace": "b", "converter": "json"}, TypeError),
        ({"url": "nats://host?odd=1", "converter": None}, PachinkoError),
    ],
)
async def test_a_configure_that_fails_changes_nothing(
    wrong: dict[str, Any], error: type[Exception]
) -> None:
    """None of what it names, right or wrong; and it comes before the start."""
    hub = Hub()
    hub.configure("memory://", namespace="a", converter=OTHERS["converter"])
    before, state = settings_of(hub), hub.state
    with pytest.raises(error):
        hub.configure(**wrong)
    assert settings_of(hub) == before and hub.state is state
    async with hub.open():
        with pytest.raises(PachinkoError, match="before the app starts"):
            hub.configure("memory://")
    assert settings_of(hub) == before


def test_a_missing_companion_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is there and cannot be loaded; once it is there, it is found."""
    hub = Hub()
    monkeypatch.setitem(sys.modules, "pachinko_cluster", None)
    with pytest.raises(PachinkoError, match=r"copy it to where pachinko\.py is.*pip install"):
        hub.configure("nats://localhost:4222")
    assert hub.state.url is None
    monkeypatch.undo()
    hub.configure("nats://localhost:4222")
    assert hub.state.url == "nats://localhost:4222"


ALONE = """
import asyncio, sys
sys.modules["pachinko_cluster"] = None  # as where the file is missing
from pachinko import Hub, PachinkoError

class Own:
    async def start(self, deliver, lost): ...
    async def publish(self, subject, data): ...
    async def subscribe(self, subject): ...
    async def unsubscribe(self, subject): ...
    async def stop(self): ...

def refusal(given):
    hub = Hub()
    try:
        hub.configure(given)
    except PachinkoError as exc:
        assert hub.state.url is None
        return str(exc)

for given in ("nats://host", "tls://host", "redis://host", "rediss://host", Own()):
    assert "pachinko_cluster.py" in refusal(given), given
    assert "pip install" in refusal(given)
assert "pachinko_cluster.py" in refusal("natz://host")  # which knows the others
hub = Hub()
hub.configure("memory://?namespace=shop")

async def main():
    async with hub.open():
        await hub.send("room", "x")
        assert await hub.presence("room") == []

asyncio.run(main())
"""


def test_without_its_companion_it_serves_one_process() -> None:
    """Whatever else is refused with what to do."""
    script = [sys.executable, "-W", "error", "-c", ALONE]
    assert subprocess.run(script, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("url", ["memory://", "memory://?namespace=a", "memory://?other=b"])
def test_memory_needs_no_more(url: str) -> None:
    """The companion is not even loaded."""
    code = f"import sys, pachinko; pachinko.hub.configure({url!r}); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pachinko" in out.stdout.split() and "pachinko_cluster" not in out.stdout.split()


# Draining


def leaving(**options: Any) -> tuple[Pachinko, list[int | None]]:
    """An endpoint, and the close codes of those whose disconnect handler has ended."""
    ws, codes = endpoint(**options), list[int | None]()

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        await turns()
        codes.append(conn.close_code)

    return ws, codes


async def refused(url: str) -> int:
    with pytest.raises(websockets.exceptions.InvalidStatus) as caught:
        async with connect(url):
            pass
    return int(caught.value.response.status_code)


@pytest.mark.parametrize("seconds", [0, 200.0])
async def test_draining_closes_everybody_within_the_time(seconds: float) -> None:
    """With 1012, one after the other; it ends after the disconnect handlers, and lets nobody in."""
    ws, codes = leaving()
    hub = ws._hub
    async with simulated(ws._app) as server, contextlib.AsyncExitStack() as stack:
        url = server.url + "/ws/a"
        clients = [await stack.enter_async_context(connect(url)) for _ in range(10)]
        assert not hub.draining
        draining = asyncio.create_task(hub.drain(seconds))
        await server.spend(seconds * 0.8)
        assert draining.done() == (seconds == 0)
        await server.spend(seconds * 0.2)
        await draining
        assert codes == [1012] * 10 and not hub.connections
        assert hub.draining
        assert await refused(url) == 503
        for client in clients:
            assert await client.closed() == (1012, "the server restarts")
        await hub.drain()  # nobody is left
    assert not hub.draining
    async with simulated(ws._app) as server, connect(server.url + "/ws/a"):
        pass  # the same hub serves again


async def test_draining_takes_them_in_random_order_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each at its own time, here those that came last first."""
    monkeypatch.setattr(pachinko.random, "sample", lambda population, k: population[::-1])
    ws = endpoint()
    left: list[tuple[str, int]] = []

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        left.append((conn.params["group"], sum(not c.closed for c in ws._hub.connections)))

    async with simulated(ws._app) as server, contextlib.AsyncExitStack() as stack:
        for name in "abcd":
            await stack.enter_async_context(connect(f"{server.url}/ws/{name}"))
        draining = asyncio.create_task(ws._hub.drain(100.0))
        for _ in range(3):
            await server.spend(25.0)
        await draining
    assert left == [("d", 3), ("c", 2), ("b", 1), ("a", 0)]  # each with those still open


async def test_draining_does_not_wait_for_the_turn_of_those_that_have_gone() -> None:
    """Clients that leave by themselves save their share of the time."""
    ws, codes = leaving()
    async with simulated(ws._app) as server, contextlib.AsyncExitStack() as stack:
        url = server.url + "/ws/a"
        clients = [await stack.enter_async_context(connect(url)) for _ in range(100)]
        draining = asyncio.create_task(ws._hub.drain(100.0))  # a second for each
        await asyncio.gather(*(client.close() for client in clients))
        await server.spend(1.0)
        assert draining.done()
        assert len(codes) == 100 and set(codes) <= {1000, 1012}


async def test_draining_includes_those_that_are_not_in_yet() -> None:
    """Whoever connects is let in and closed; whoever has not authenticated is closed at once."""
    ws, codes = leaving()
    may_go_on = asyncio.Event()
    locked = Pachinko(ws._app, "/locked", hub=ws._hub, auth_timeout=PATIENCE)

    @locked.authenticate
    async def who(conn: Connection, token: str | None) -> None: ...

    @ws.connect
    async def load(conn: Connection) -> None:
        if "slow" in conn.req.params:
            await may_go_on.wait()

    async def slow(url: str) -> tuple[int | None, str | None]:
        async with connect(url) as client:
            return await client.closed()

    async with simulated(ws._app) as server, connect(server.url + "/locked") as stranger:
        connecting = asyncio.create_task(slow(server.url + "/ws/a?slow=1"))
        await until(lambda: len(ws._hub.state.serving) == 2)
        draining = asyncio.create_task(ws._hub.drain(0))
        assert await stranger.closed() == (1012, "the server restarts")
        may_go_on.set()
        assert await connecting == (1012, "the server restarts")
        await draining
        assert codes == [1012] and not ws._hub.state.serving


async def test_a_disconnect_handler_that_hangs_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After the linger and five seconds, here fewer; the log says which task it was."""
    monkeypatch.setattr(pachinko, "_FAREWELL", 0.05)
    ws, may_go_on = endpoint(linger=0.0), asyncio.Event()

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        await may_go_on.wait()

    async with simulated(ws._app) as server, connect(server.url + "/ws/a"):
        await until(lambda: ws._hub.connections)
        await ws._hub.drain(0)
        assert "not waiting any longer for <Task" in caplog.text
        await ws._hub.drain(0)  # does not wait for it once more
        assert caplog.text.count("not waiting any longer") == 1 and not ws._hub.state.serving
        may_go_on.set()


@pytest.mark.parametrize("concurrent", [False, True])
async def test_a_handler_may_drain(concurrent: bool) -> None:
    """It does not wait for its own connection."""
    ws, codes = leaving()
    done: list[str] = []

    @ws.on("drain", concurrent=concurrent)
    async def drain(conn: Connection) -> None:
        await ws._hub.drain(0)
        done.append("drained")

    async with simulated(ws._app) as server:
        async with connect(server.url + "/ws/a") as client, connect(server.url + "/ws/a"):
            await client.send("drain")
            assert (await client.closed())[0] == 1012
        await until(lambda: not ws._hub.state.serving)
    assert done == ["drained"] and codes == [1012, 1012]


async def test_a_drain_goes_on_without_the_handler_that_began_it() -> None:
    """That one is closed as well, and has its *linger*; the others are closed all the same."""
    ws, codes = leaving(linger=0.0)

    @ws.on("drain")
    async def drain(conn: Connection) -> None:
        await ws._hub.drain(50.0)

    async with simulated(ws._app) as server, contextlib.AsyncExitStack() as stack:
        url = server.url + "/ws/a"
        clients = [await stack.enter_async_context(connect(url)) for _ in range(10)]
        await clients[0].send("drain")
        await server.spend(50.0)
        for client in clients:
            assert (await client.closed())[0] == 1012
        await until(lambda: not ws._hub.state.serving)
    assert codes == [1012] * 10


async def test_the_lifespan_closes_those_that_are_not_in_yet() -> None:
    """A shutdown that comes while clients authenticate or connect waits for neither."""
    ws, codes = leaving()
    locked = Pachinko(ws._app, "/locked", hub=ws._hub, auth_timeout=10 * PATIENCE)
    may_go_on = asyncio.Event()

    @locked.authenticate
    async def who(conn: Connection, token: str | None) -> None: ...

    @ws.connect
    async def load(conn: Connection) -> None:
        await may_go_on.wait()

    async def visit(url: str) -> int | None:
        async with connect(url) as client:
            return (await client.closed())[0]

    async with simulated(ws._app) as server:
        visits = [asyncio.create_task(visit(server.url + path)) for path in ("/ws/a", "/locked")]
        await until(lambda: len(ws._hub.state.serving) == 2)
        ending = [asyncio.create_task(each.process_shutdown({}, {})) for each in (ws, locked)]
        await until(lambda: all(each.outgoing.closed for each in ws._hub.state.serving.values()))
        may_go_on.set()
        assert await asyncio.gather(*visits) == [1012, 1012]
        await asyncio.gather(*ending)
    assert codes == [1012]


@pytest.mark.parametrize("seconds", [-1, "10", None, float("inf"), 10**400])
async def test_draining_takes_seconds(seconds: Any) -> None:
    """Anything else is a `ValueError`, and nothing is drained."""
    hub = Hub()
    with pytest.raises(ValueError, match="seconds is a number, at least 0"):
        await hub.drain(seconds)
    assert not hub.draining


# Threads, when the hub stops


async def test_calls_from_threads_end_with_the_hub() -> None:
    """What is still in progress when the last app stops fails, and its task is cancelled."""
    ws, ended = endpoint(), list[str]()
    futures: list[concurrent.futures.Future[Any]] = []

    async def for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    async with simulated(ws._app):
        futures.append(ws._hub.call_threadsafe(for_ever))
        await asyncio.sleep(0)
        futures.append(
            ws._hub.call_threadsafe(ws._hub.send, "a", "x")
        )  # its turn may come too late
        done = ws._hub.call_threadsafe(ws._hub.stats)
        await until(done.done)
        assert done not in ws._hub.state.calls
    with pytest.raises(PachinkoError, match="the hub has stopped before it was done"):
        futures[0].result(0)
    assert futures[1].done()
    await until(lambda: ended)


async def test_a_thread_may_cancel_its_call() -> None:
    """Then the task in the loop is cancelled, and its outcome goes nowhere."""
    ws, begun, ended = endpoint(), asyncio.Event(), list[str]()

    async def slow() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")

    async def cancelled() -> None:
        raise asyncio.CancelledError

    async with simulated(ws._app):
        future = ws._hub.call_threadsafe(slow)
        await asyncio.wait_for(begun.wait(), PATIENCE)
        assert future.cancel()
        await until(lambda: ended)
        assert not ws._hub.state.calls
        stray = ws._hub.call_threadsafe(cancelled)
        await until(stray.done)
        assert stray.cancelled()
        early = ws._hub.call_threadsafe(slow)
        assert early.cancel()  # before its turn
        begun.clear()
        await ws._hub.send("a", "x")
        await asyncio.sleep(0)
        assert not begun.is_set()
        done, _ = concurrent.futures.wait([future, stray, early], timeout=0)
        assert done == {future, stray, early}


async def test_sys_exit_in_a_call_from_a_thread_is_its_error() -> None:
    """asyncio would end the loop, and with it the server."""
    ws = endpoint()

    async def leave() -> None:
        raise SystemExit(3)

    async with simulated(ws._app):
        future = ws._hub.call_threadsafe(leave)
        await until(future.done)
        with pytest.raises(RuntimeError, match=r"sys.exit\(\) in a call from a thread"):
            future.result()


FORKS = """
import asyncio, os, sys
import falcon.asgi
from pachinko import Hub, Pachinko, PachinkoError, hub

app = falcon.asgi.App()
ws = Pachinko(app, "/ws")


async def main():
    await ws.process_startup({}, {})
    child = os.fork()
    if child == 0:
        try:
            hub.call_threadsafe(hub.send, "a", "x")
        except PachinkoError as exc:
            os._exit(0 if "not running" in str(exc) and not hub.state.serving else 1)
        os._exit(2)
    _, status = os.waitpid(child, 0)
    future = hub.call_threadsafe(hub.stats)
    while not future.done():
        await asyncio.sleep(0)
    assert future.result()["connections"] == 0
    return os.waitstatus_to_exitcode(status)


sys.exit(asyncio.run(main()))
"""


def test_a_forked_process_has_a_clean_hub() -> None:
    """A call there says that nothing runs, instead of waiting for the parent's loop."""
    script = [sys.executable, "-W", "error", "-c", FORKS]
    assert subprocess.run(script, timeout=60, check=False).returncode == 0


async def test_what_a_fork_leaves_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loop, connections and calls of each hub are the parent's."""
    hub = Hub()
    monkeypatch.setattr(pachinko, "_hubs", [hub])
    hub.state.start(object())
    state, call = hub.state, hub.call_threadsafe(hub.stats)
    pachinko._forget_parent()
    assert hub.state is not state and hub.state.loop is None
    assert not hub.state.calls and state.loop is not None and state.calls == {call}


# Starts


def test_a_loop_that_has_ended_without_a_shutdown_is_forgotten() -> None:
    """Nothing of it stays, also where the next start fails."""
    hub = Hub()

    async def start(url: str | None = None) -> None:
        hub.state.start(object(), url)

    asyncio.run(start())
    first = hub.state
    with pytest.raises(PachinkoError, match="a backplane is a URL"):
        asyncio.run(start("kafka://host"))
    assert hub.state is not first and hub.state.loop is None
    with pytest.raises(PachinkoError, match="not running"):
        hub.call_threadsafe(hub.stats)
    asyncio.run(start())
    assert hub.state.loop is not None and hub.process != first.process


# In several threads at once


def in_threads(work: Callable[[int], Any], count: int = 5) -> list[Any]:
    """What *work* returns or raises in each of *count* threads that begin together."""
    together = threading.Barrier(count)

    def one(n: int) -> Any:
        together.wait(PATIENCE)
        try:
            return work(n)
        except Exception as exc:
            return exc

    with concurrent.futures.ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))


async def _send_in(hub: Hub, url: str | None, wait: Callable[[], Any] = lambda: None) -> str:
    async with hub.open(url) as opened:
        await asyncio.to_thread(wait)
        await opened.send("room", "notice")
    return "sent"


def test_threads_open_hubs_of_their_own() -> None:
    """As parallel requests of a WSGI server do, each with an event loop of its own."""
    both = threading.Barrier(5)

    def work(_: int) -> str:
        return asyncio.run(_send_in(Hub(), "memory://", lambda: both.wait(PATIENCE)))

    assert in_threads(work) == ["sent"] * 5


@pytest.mark.parametrize("url", ["memory://", "memory://?namespace=b", None])
def test_a_hub_that_is_open_in_another_thread_says_what_to_write(url: str | None) -> None:
    """A call to that thread, or a hub of one's own; the one that is open goes on."""
    hub, is_open, may_end = Hub(), threading.Event(), threading.Event()

    def wait() -> None:
        is_open.set()
        may_end.wait(PATIENCE)

    with concurrent.futures.ThreadPoolExecutor(1) as first:
        sent = first.submit(asyncio.run, _send_in(hub, "memory://", wait))
        is_open.wait(PATIENCE)
        with pytest.raises(PachinkoError) as caught:
            asyncio.run(_send_in(hub, url))
        may_end.set()
        assert sent.result(PATIENCE) == "sent"
    for advice in ("hub.call_threadsafe(hub.send, ...)", "async with Hub().open(...) as hub:"):
        assert advice in str(caught.value)
    assert asyncio.run(_send_in(hub, "memory://")) == "sent"


def test_threads_that_open_one_hub_never_share_it_by_mistake() -> None:
    """At any moment it is open in one thread; the others are refused, and nothing is left over."""
    hub, switch = Hub(), sys.getswitchinterval()
    open_in: set[int] = set()

    async def use(n: int) -> None:
        async with hub.open("memory://"):
            open_in.add(n)
            assert open_in == {n}
            state = hub.state
            assert state.loop is asyncio.get_running_loop()
            await hub.send("room", "notice")
            assert hub.state is state
            open_in.discard(n)

    def work(n: int) -> list[str]:
        outcomes = list[str]()
        for _ in range(60):
            try:
                asyncio.run(use(n))
                outcomes.append("sent")
            except PachinkoError as exc:
                outcomes.append("refused" if "Hub().open(" in str(exc) else repr(exc))
        return outcomes

    sys.setswitchinterval(1e-6)
    try:
        outcomes = [each for some in in_threads(work) for each in some]
    finally:
        sys.setswitchinterval(switch)
    assert set(outcomes) <= {"sent", "refused"} and "sent" in outcomes
    assert hub.state.loop is None


async def test_a_start_just_after_the_end_is_one_of_what_comes_next() -> None:
    """A thread may have looked the state up before another one has ended it."""
    hub, program = Hub(), object()
    found = hub.state
    await found.stop(object())
    found.start(program, "memory://")
    assert found.loop is None and hub.state.loop is asyncio.get_running_loop()
    await hub.state.stop(program)
    assert hub.state.loop is None


async def test_any_thread_may_read() -> None:
    """While connections, groups and counts change in the loop's thread."""
    ws, is_over, results = endpoint(), threading.Event(), list[Any]()
    hub, switch = ws._hub, sys.getswitchinterval()

    def read() -> None:
        try:
            while not is_over.is_set():
                results[:] = hub.connections, hub.members("a"), hub.groups, hub.stats()
                assert not hub.draining and hub.process and hub.converter
        except Exception as exc:
            results[:] = [exc]

    async with simulated(ws._app) as server:
        thread = threading.Thread(target=read)
        sys.setswitchinterval(1e-6)
        try:
            thread.start()
            for n in range(20):
                async with contextlib.AsyncExitStack() as stack:
                    for _ in range(5):
                        client = await stack.enter_async_context(connect(server.url + "/ws/a"))
                    for _ in range(5):
                        await client.error(json.dumps({"type": f"unknown {n}"}))
        finally:
            is_over.set()
            await asyncio.to_thread(thread.join)
            sys.setswitchinterval(switch)
    connections, members, groups, stats = results
    assert len(connections) <= 5 and len(members) <= 5 and groups <= {"a"}
    assert stats["errors"] >= 1


# Private owners


# The limit of groups


async def test_a_connection_may_be_in_max_groups() -> None:
    """One more is answered `too_many_groups`; joining again and leaving are always allowed."""
    ws = endpoint(max_groups=2)

    @ws.on("join")
    async def join(conn: Connection, *, name: str) -> None:
        await conn.join(name)

    @ws.on("leave")
    async def leave(conn: Connection, *, name: str) -> None:
        await conn.leave(name)

    async with simulated(ws._app) as server, connect(server.url + "/ws/a") as client:
        for name in ("b", "b", "a"):
            assert (await client.ask("join", {"name": name}))["type"] == "join.reply"
        assert (await client.ask("join", {"name": "c"}))["payload"] == {
            "code": "too_many_groups",
            "message": "at most 2 groups a connection",
        }
        assert ws._hub.groups == {"a", "b"}
        await client.ask("leave", {"name": "a"})
        assert (await client.ask("join", {"name": "c"}))["type"] == "join.reply"
        (conn,) = ws._hub.connections
        assert conn.groups == {"b", "c"}
