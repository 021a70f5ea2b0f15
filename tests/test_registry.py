"""Who is where; what a hub has while it runs: its start, draining, calls from threads, a fork."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import secrets
import subprocess
import sys
from typing import Any, cast

import pytest
import websockets.exceptions
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support import PATIENCE, connect, serving, until
from test_hub import endpoint

import pachinko
from pachinko import Connection, Hub, Kind, LocalRelay, Outgoing, Pachinko, PachinkoError

# The tables


class Socket:
    """As much of Falcon's socket as the tables need: it can always be written to."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    async def _asgi_send(self, event: dict[str, Any]) -> None:
        self.sent.append(event)

    async def close(self, code: int, reason: str | None) -> None:
        self.sent.append({"type": "websocket.close", "code": code})


class Noting(LocalRelay):
    """Notes what the registry has told it."""

    def __init__(self) -> None:
        self.subscriptions: set[tuple[Kind, str]] = set()

    def subscribe(self, kind: Kind, name: str) -> None:
        assert (kind, name) not in self.subscriptions
        self.subscriptions.add((kind, name))

    def unsubscribe(self, kind: Kind, name: str) -> None:
        self.subscriptions.remove((kind, name))


class Tables(RuleBasedStateMachine):
    """Random interleavings of connect, join, leave, send, close keep hub and model the same.

    The relay is told of the first one in each group and of the last, also for users.
    """

    groups = st.sampled_from("abc")
    indexes = st.integers(0, 5)

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.conns: list[Connection] = []
        self.alive: set[Connection] = set()
        self.joined: dict[Connection, set[str]] = {}
        self.expected: dict[Connection, int] = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pachinko, "LocalRelay", Noting)
            self.hub = Hub()
            self.runner.run(self.start())
        self.limits = Pachinko(hub=self.hub)._limits

    async def start(self) -> None:
        self.hub.state.start(self)

    def pick(self, index: int) -> Connection | None:
        return self.conns[index % len(self.conns)] if self.conns else None

    @rule(user=st.sampled_from(["ann", "bob", None]))
    def connect(self, user: str | None) -> None:
        request: Any = None
        socket: Any = Socket()
        state, id = self.hub.state, secrets.token_hex(12)
        outgoing = Outgoing(id, socket, self.limits, state.counters, pachinko._NOBODY)
        conn = Connection(self.hub, request, socket, {}, id, outgoing)
        state.registry.add(conn)
        conn.user = user
        outgoing.open()
        self.conns.append(conn)
        self.alive.add(conn)
        self.joined[conn], self.expected[conn] = set(), 0

    @rule(group=groups, index=indexes)
    def join(self, group: str, index: int) -> None:
        if (conn := self.pick(index)) is not None:
            self.runner.run(self.hub.join(group, conn))
            if conn in self.alive:
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
            conn.outgoing.lost()
            self.hub.state.registry.remove(conn)
            self.alive.discard(conn)
            self.joined[conn] = set()

    async def settled(self, call: Any) -> None:
        await call
        while any(conn.outgoing.writing for conn in self.conns):
            await asyncio.sleep(0)  # the turn of the next one

    @invariant()
    def tables_agree(self) -> None:
        assert self.hub.connections == self.alive
        for conn in self.conns:
            assert conn.groups == self.joined[conn]
            events = cast(Any, conn.ws).sent
            sent = [event for event in events if event["type"] == "websocket.send"]
            assert len(sent) == self.expected[conn]
        names = set().union(*self.joined.values()) if self.joined else set()
        assert self.hub.groups == names
        for name in names:
            assert self.hub.members(name) == {c for c, g in self.joined.items() if name in g}
        users = {conn.user for conn in self.alive if conn.user is not None}
        assert set(self.hub.state.registry.users) == users
        relay = cast(Noting, self.hub.state.relay)
        expected = {(Kind.GROUP, name) for name in names} | {(Kind.USER, user) for user in users}
        assert relay.subscriptions == expected

    def teardown(self) -> None:
        self.runner.close()


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# Draining


def leaving(**options: Any) -> tuple[Pachinko, list[int | None]]:
    """An endpoint, and the close codes of those whose disconnect handler has ended."""
    ws, codes = endpoint(**options), list[int | None]()

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        await asyncio.sleep(0.01)
        codes.append(conn.close_code)

    return ws, codes


async def refused(url: str) -> int:
    with pytest.raises(websockets.exceptions.InvalidStatus) as caught:
        async with connect(url):
            pass
    return int(caught.value.response.status_code)


@pytest.mark.parametrize("seconds", [0, 0.2])
async def test_draining_closes_everybody_within_the_time(seconds: float) -> None:
    """With 1012, one after the other; it ends after the disconnect handlers, and lets nobody in."""
    ws, codes = leaving()
    hub = ws._hub
    async with serving(ws._app) as server, contextlib.AsyncExitStack() as stack:
        url = server.url + "/ws/a"
        clients = [await stack.enter_async_context(connect(url)) for _ in range(10)]
        assert not hub.draining
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await hub.drain(seconds)
        assert codes == [1012] * 10 and not hub.connections
        assert loop.time() - begun >= seconds * 0.9
        assert hub.draining
        assert await refused(url) == 403
        for client in clients:
            assert await client.closed() == (1012, "the server restarts")
        await hub.drain()  # nobody is left
    assert not hub.draining
    async with serving(ws._app) as server, connect(server.url + "/ws/a"):
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

    async with serving(ws._app) as server, contextlib.AsyncExitStack() as stack:
        for name in "abcd":
            await stack.enter_async_context(connect(f"{server.url}/ws/{name}"))
        await ws._hub.drain(1.0)
    assert [name for name, _ in left] == ["d", "c", "b", "a"]
    still_open = [number for _, number in left]  # fewer than 3 only where the machine was slow
    assert still_open == sorted(still_open, reverse=True)
    assert still_open[0] > 0 and still_open[-1] == 0


async def test_draining_does_not_wait_for_the_turn_of_those_that_have_gone() -> None:
    """Clients that leave by themselves save their share of the time."""
    ws, codes = leaving()
    async with serving(ws._app) as server, contextlib.AsyncExitStack() as stack:
        url = server.url + "/ws/a"
        clients = [await stack.enter_async_context(connect(url)) for _ in range(100)]
        draining = asyncio.create_task(ws._hub.drain(100.0))  # a second for each
        for client in clients:
            await client.close()
        await until(draining.done)
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

    async with serving(ws._app) as server, connect(server.url + "/locked") as stranger:
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

    async with serving(ws._app) as server, connect(server.url + "/ws/a"):
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

    async with serving(ws._app) as server:
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
        await ws._hub.drain(0.5)

    async with serving(ws._app) as server, contextlib.AsyncExitStack() as stack:
        url = server.url + "/ws/a"
        clients = [await stack.enter_async_context(connect(url)) for _ in range(10)]
        await clients[0].send("drain")
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

    async with serving(ws._app) as server:
        visits = [asyncio.create_task(visit(server.url + path)) for path in ("/ws/a", "/locked")]
        await until(lambda: len(ws._hub.state.serving) == 2)
        ending = [asyncio.create_task(each.process_shutdown({}, {})) for each in (ws, locked)]
        await until(lambda: all(each.outgoing.closed for each in ws._hub.state.serving.values()))
        may_go_on.set()
        assert await asyncio.gather(*visits) == [1012, 1012]
        await asyncio.gather(*ending)
    assert codes == [1012]


@pytest.mark.parametrize("seconds", [-1, "10", None, float("inf")])
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

    async with serving(ws._app):
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

    async with serving(ws._app):
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

    async with serving(ws._app):
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
