"""Who is where, and sending to them."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import cattrs
import falcon
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support import PATIENCE, connect, new_app, serving, until

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
        serving(ws._app) as server,
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
        serving(ws._app) as server,
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
    async with serving(ws._app) as server, connect(server.url + "/ws/a") as client:
        (conn,) = ws._hub.connections
        await ws._hub.send_to(conn, "one")
        await ws._hub.send_to(conn.id, Said("two"))
        await ws._hub.send_to("unknown", "three")
        assert [(await client.receive())["type"] for _ in range(2)] == ["one", "said"]
        await client.close()
        await until(lambda: not ws._serving)
        await ws._hub.send_to(conn, "four")
        await ws._hub.join("late", conn)
        await ws._hub.leave("late", conn)
        assert not ws._hub.groups and not conn.groups


async def test_joining_and_leaving_twice_is_once() -> None:
    """Membership is a set; an empty group is no group."""
    ws = endpoint()
    async with serving(ws._app) as server, connect(server.url + "/ws/a") as client:
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
    async with serving(ws._app) as server, connect(server.url + "/ws/a") as client:
        (conn,) = ws._hub.connections
        for name in ("", "*", "a.b >", "\n", "ü" * 10_000):
            await conn.join(name)
            await ws._hub.send(name, "hi")
            assert (await client.receive())["group"] == name


async def test_names_that_are_no_text_are_type_errors() -> None:
    """Groups, users and ids are `str`, a member is a connection."""
    hub: Any = Hub()
    for call in (
        lambda: hub.join(1, None),
        lambda: hub.join("a", "conn"),
        lambda: hub.leave(None, None),
        lambda: hub.leave("a", "conn"),
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
    """Joining another hub's group is a mistake."""
    ws = endpoint()
    async with serving(ws._app) as server, connect(server.url + "/ws/a"):
        (conn,) = ws._hub.connections
        for method in (Hub().join, Hub().leave):
            with pytest.raises(PachinkoError, match="another hub"):
                await method("a", conn)
        assert conn.id in repr(conn) and "open" in repr(conn)


async def test_sending_without_an_app_reaches_nobody() -> None:
    """Before an app runs there are no members, which is no error."""
    hub = Hub()
    await hub.send("a", "x")
    await hub.broadcast("x")
    await hub.close_group("a")
    assert hub.stats()["sent"] == 0


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

    async with serving(ws._app) as server, connect(server.url + "/ws/a") as client:
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
    hub._start(object())


async def test_stats_count_what_happened() -> None:
    """Frames, errors by code, connections and groups; codes without end are put together."""
    ws = endpoint()

    @ws.on("one")
    async def one(conn: Connection) -> int:
        return 1

    async with serving(ws._app) as server, connect(server.url + "/ws/a") as client:
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
            "errors": 2,
            "errors.unknown_type": 2,
        }
        for n in range(200):
            ws._hub._count_error(str(n))
        stats = ws._hub.stats()
        assert stats["errors"] == 202 and stats["errors.other"] == 101 and len(stats) < 120


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

    async with serving(ws._app) as server, connect(server.url + "/ws") as client:
        assert (await client.ask("status", 404))["payload"] == 404
        assert (await client.receive())["payload"] == 404
        with pytest.raises(PachinkoError, match="before the app starts"):
            hub.configure(converter=cattrs.Converter())
    with pytest.raises(TypeError, match="converter"):
        hub.configure(converter="json")  # type: ignore[arg-type]
    hub.configure()
    assert hub.converter is not converter


class Socket:
    """As much of Falcon's socket as the tables need: it can always be written to."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    async def _send(self, event: dict[str, Any]) -> None:
        self.sent.append(event)

    async def close(self, code: int, reason: str | None) -> None:
        self.sent.append({"type": "websocket.close", "code": code})


class Tables(RuleBasedStateMachine):
    """Random interleavings of connect, join, leave, send, close keep hub and model the same."""

    groups = st.sampled_from("abc")
    indexes = st.integers(0, 5)

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.hub = Hub()
        self.limits = Pachinko(hub=self.hub)._limits
        self.conns: list[Connection] = []
        self.joined: dict[Connection, set[str]] = {}
        self.expected: dict[Connection, int] = {}
        self.runner.run(_start(self.hub))

    def pick(self, index: int) -> Connection | None:
        return self.conns[index % len(self.conns)] if self.conns else None

    @rule(user=st.sampled_from(["ann", "bob", None]))
    def connect(self, user: str | None) -> None:
        conn = Connection(self.hub, self.limits, None, Socket(), {})  # type: ignore[arg-type]
        self.hub._add(conn)
        conn.user = user
        conn._opened()
        self.conns.append(conn)
        self.joined[conn], self.expected[conn] = set(), 0

    @rule(group=groups, index=indexes)
    def join(self, group: str, index: int) -> None:
        if (conn := self.pick(index)) is not None:
            self.runner.run(self.hub.join(group, conn))
            if conn.id in self.hub._connections:
                self.joined[conn].add(group)

    @rule(group=groups, index=indexes)
    def leave(self, group: str, index: int) -> None:
        if (conn := self.pick(index)) is not None:
            self.runner.run(self.hub.leave(group, conn))
            self.joined[conn].discard(group)

    @rule(group=groups, index=st.none() | indexes)
    def send(self, group: str, index: int | None) -> None:
        exclude = None if index is None else self.pick(index)
        self.runner.run(self.settled(self.hub.send(group, "x", exclude=exclude)))
        for conn, groups in self.joined.items():
            self.expected[conn] += group in groups and not conn.closed and conn is not exclude

    @rule(group=groups)
    def close_group(self, group: str) -> None:
        self.runner.run(self.settled(self.hub.close_group(group)))
        for conn, groups in self.joined.items():
            assert conn.closed or group not in groups

    @rule(index=indexes)
    def remove(self, index: int) -> None:
        if (conn := self.pick(index)) is not None:
            conn._phase = type(conn._phase).GONE
            self.hub._remove(conn)
            self.joined[conn] = set()

    async def settled(self, call: Any) -> None:
        await call
        while any(conn._writing for conn in self.conns):
            await asyncio.sleep(0)

    @invariant()
    def tables_agree(self) -> None:
        alive = {conn for conn in self.conns if conn.id in self.hub._connections}
        assert self.hub.connections == alive
        for conn in self.conns:
            assert conn.groups == self.joined[conn]
            sent = [e for e in conn.ws.sent if e["type"] == "websocket.send"]  # type: ignore[attr-defined]
            assert len(sent) == self.expected[conn]
        names = set().union(*self.joined.values()) if self.joined else set()
        assert self.hub.groups == names
        for name in names:
            assert self.hub.members(name) == {c for c, g in self.joined.items() if name in g}
        users = {conn.user for conn in alive if conn.user is not None}
        assert set(self.hub._users) == users

    def teardown(self) -> None:
        self.runner.close()


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
