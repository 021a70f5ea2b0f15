"""What a handler gets: who the client is, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from typing import Any

import cattrs
import falcon
import falcon.asgi
import falcon.testing
import pytest
from support import PATIENCE, connect, new_app, serving, simulated, until
from test_admission import Door, authenticate, bearer, endpoint

import pachinko
from pachinko import Close, Connection, Hub, MessageError, Pachinko, PachinkoError


async def test_it_expires() -> None:
    """With 3401, and the disconnect handlers run, since it was in."""
    door = Door()

    @door.ws.connect
    async def limit(conn: Connection) -> None:
        assert conn.expires_at is None
        conn.expires_at = time.time() + 0.05
        assert conn.expires_at

    async with simulated(door.ws._app) as server:
        async with door.visit(server.url, **bearer("t-ann")) as client:
            assert await client.closed() == (3401, "the authentication has expired")
        await until(lambda: not door.ws._hub.state.serving)
    assert door.seen[-1] == ("disconnect", 3401)


@pytest.mark.parametrize("options", [{}, bearer("t-ann")])
async def test_what_has_expired_is_not_let_in(options: Any) -> None:
    """No handler runs."""
    ws, called = endpoint(), []

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        conn.expires_at = None if token is None else time.time() - 1
        return token

    @ws.connect
    @ws.disconnect
    async def handler(conn: Connection) -> None:
        called.append("a handler")

    async with simulated(ws._app) as server, connect(f"{server.url}/ws", **options) as client:
        if not options:
            await authenticate(client)
        assert await client.closed() == (3401, "the authentication has expired")
    assert called == []


async def test_it_may_expire_while_the_token_is_waited_for() -> None:
    """Then the wait ends."""
    ws = endpoint()

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        conn.expires_at = time.time() + 0.05
        return None

    async with simulated(ws._app) as server, connect(f"{server.url}/ws") as client:
        assert await client.closed() == (3401, "the authentication has expired")


async def test_a_later_message_renews_it() -> None:
    """The function sets the new time; the message is answered like any other."""
    ws, seen = endpoint(), []

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        seen.append(token)
        conn.expires_at = time.time() + (PATIENCE * 10 if token == "long" else 0.3)
        return "ann"

    @ws.middleware
    async def see(conn: Connection, envelope: Any, call_next: Any) -> Any:
        seen.append(envelope.type)
        return await call_next()

    @ws.on("hello")
    async def hello(conn: Connection) -> None: ...

    async with serving(ws._app) as server, connect(f"{server.url}/ws", **bearer("a")) as client:
        (conn,) = ws._hub.connections
        first, timer = conn.expires_at, conn._expiry
        await client.send("authenticate", {"token": "long", "more": 1}, id=1)
        assert await client.receive() == {"type": "authenticate.reply", "id": 1}
        assert conn.expires_at and first and conn.expires_at > first
        assert timer and timer.cancelled()
        error = await client.ask("authenticate", {"token": 5}, id=2)
        assert error["payload"]["code"] == "invalid_payload"
        await authenticate(client, "long")  # without an id: no answer
        assert await client.ask("hello", id=3) == {"type": "hello.reply", "id": 3}
    await until(lambda: not ws._hub.state.serving)
    assert seen == ["a", "long", "long", "hello"]
    assert conn._expiry is None


@pytest.mark.parametrize("raised", ["internal_error", "later", "http", "status", "close"])
async def test_a_renewal_that_fails_renews_nothing(raised: str) -> None:
    """Whatever the function has set before it failed; a refusal closes."""
    ws = endpoint()
    exceptions = {
        "internal_error": ValueError(),
        "later": MessageError("later", "the login is down"),
        "http": falcon.HTTPForbidden(title="x" * 200),
        "status": falcon.HTTPFound("/login"),
        "close": Close(4003),
    }

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        conn.expires_at = time.time() + (60 if token == "first" else 3600)
        if token != "first":
            raise exceptions[raised]
        return "ann"

    async with (
        simulated(ws._app) as server,
        connect(f"{server.url}/ws", **bearer("first")) as client,
    ):
        (conn,) = ws._hub.connections
        before = conn.expires_at
        await authenticate(client, "second", id=1)
        if codes := {"http": [3403], "status": [3302], "close": [4003]}.get(raised):
            assert (await client.closed())[0] in codes
        else:
            assert (await client.receive())["payload"]["code"] == raised
            assert not conn.closed
        assert conn.expires_at == before


@pytest.mark.parametrize("token", ["bad", "t-bob"])
async def test_a_renewal_names_the_same_user(token: str) -> None:
    """Nobody and somebody else are closed with 3401, and the disconnect handlers run."""
    door = Door()
    async with simulated(door.ws._app) as server:
        async with door.visit(server.url, **bearer("t-ann")) as client:
            await client.receive()
            await authenticate(client, token, id=1)
            assert await client.closed() == (3401, "authentication failed")
        await until(lambda: not door.ws._hub.state.serving)
    assert door.seen == ["t-ann", ("connect", "ann"), token, ("disconnect", 3401)]


async def test_a_lenient_converter_makes_no_token() -> None:
    """What is no text is refused as it is for a first message."""
    hub = Hub()
    hub.configure(converter=cattrs.Converter())
    ws, seen = Pachinko(new_app(), "/ws", hub=hub), []

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        seen.append(token)
        return "ann"

    async with simulated(ws._app) as server, connect(f"{server.url}/ws", **bearer("a")) as client:
        for payload in ({"token": None}, {"token": {}}, {}, None, "text"):
            error = (await client.ask("authenticate", payload))["payload"]
            assert error["code"] == "invalid_payload"
            assert error["errors"] == [{"path": "$.payload.token", "message": "expected str"}]
    assert seen == ["a"]


async def test_without_a_function_the_message_is_unknown() -> None:
    """The type is reserved, whether or not the endpoint authenticates."""
    ws = endpoint()
    async with simulated(ws._app) as server, connect(f"{server.url}/ws") as client:
        await authenticate(client, id=1)
        assert (await client.receive())["payload"]["code"] == "unknown_type"


@pytest.mark.parametrize("at", ["soon", float("nan"), float("inf"), 10**400, True, b""])
async def test_an_expiry_is_a_time(at: Any) -> None:
    """Anything else is a `TypeError`; None takes it away."""
    ws = endpoint()
    async with simulated(ws._app) as server, connect(f"{server.url}/ws") as client:
        await client.ask("x")
        (conn,) = ws._hub.connections
        with pytest.raises(TypeError, match="expires_at is UNIX seconds, such as time"):
            conn.expires_at = at
        conn.expires_at = time.time() + 60
        conn.expires_at = None
        assert conn._expiry is None
    await until(lambda: not ws._hub.state.serving)
    conn.expires_at = time.time() - 60  # of one that is over
    assert conn._expiry is None


async def test_the_clock_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is set while a client is connected moves the end, both ways."""
    monkeypatch.setattr(pachinko, "_LOOK_AT_CLOCK", 0.01)
    ahead = 0.0
    monkeypatch.setattr(pachinko.time, "time", lambda: 1000.0 + ahead)
    ws = endpoint()
    async with simulated(ws._app) as server, connect(f"{server.url}/ws") as client:
        await client.ask("x")
        (conn,) = ws._hub.connections
        conn.expires_at = 2000.0
        first = conn._expiry
        await until(lambda: conn._expiry is not first)
        assert not conn.closed
        ahead = 1000.0
        assert (await client.closed())[0] == 3401


# Threads and event loops

CALLS: dict[str, Any] = {
    "send": lambda conn: conn.send("stray", {"n": 1}),
    "ask": lambda conn: conn.ask("stray"),
    "close": lambda conn: conn.close(4000),
    "join": lambda conn: conn.join("a"),
    "leave": lambda conn: conn.leave("room"),
    "add_header": lambda conn: conn.add_header("x-name", "ada"),
    "create_task": lambda conn: conn.create_task(conn.send("stray")),
}
SET = {"user": "eve", "expires_at": 0.0}
LIBRARYS_OWN = {"become", "choose", "stop_expiry"}
each_call = pytest.mark.parametrize("name", [*CALLS, *SET])


def test_each_public_name_that_changes_something_is_tried() -> None:
    """A method or a settable property that is added to a connection comes onto a list above."""
    public = {name: value for name, value in vars(Connection).items() if not name.startswith("_")}
    methods = {name for name, value in public.items() if inspect.isfunction(value)}
    settable = {name for name, value in public.items() if getattr(value, "fset", None)}
    assert methods - LIBRARYS_OWN == CALLS.keys() and settable == SET.keys()


def in_a_thread(call: Any) -> None:
    """Call it where no event loop runs."""
    result = call()
    if inspect.isawaitable(result):
        asyncio.run(_awaited(result))


def in_a_loop_of_a_thread(call: Any) -> None:
    async def main() -> None:
        result = call()
        if inspect.isawaitable(result):
            await result

    asyncio.run(main())


async def _awaited(result: Any) -> None:
    await result


@pytest.mark.parametrize("elsewhere", [in_a_thread, in_a_loop_of_a_thread])
@each_call
async def test_another_thread_is_refused_and_told_what_to_write(name: str, elsewhere: Any) -> None:
    """Before anything is written or changed; reading is allowed."""
    ws, conns = endpoint(), list[Connection]()

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.join("room")
        conns.append(conn)

    @ws.on("ping")
    async def ping(conn: Connection) -> str:
        return "pong"

    def call() -> Any:
        if name in CALLS:
            return CALLS[name](conns[0])
        setattr(conns[0], name, SET[name])
        return None

    def read() -> Any:
        conn = conns[0]
        names = conn.user, conn.groups, conn.closed, conn.close_code, conn.expires_at, repr(conn)
        return names, ws._hub.connections, ws._hub.members("room"), ws._hub.groups, ws._hub.stats()

    async with simulated(ws._app) as server, connect(f"{server.url}/ws") as client:
        await client.ask("ping")
        before = read()
        cure = rf'conn\.hub\.call_threadsafe\((conn\.{name}|setattr, conn, "{name}"), \.\.\.\)'
        with pytest.raises(PachinkoError, match=cure):
            await asyncio.to_thread(elsewhere, call)
        assert await asyncio.to_thread(read) == before
        assert (await client.ask("ping", id=2))["id"] == 2


def test_another_loop_of_the_same_thread_is_refused() -> None:
    """Its futures and timers would never wake who waits in the app's loop."""
    ws, conns = endpoint(), list[Connection]()

    @ws.connect
    async def arrive(conn: Connection) -> None:
        conns.append(conn)

    with asyncio.Runner() as apps, asyncio.Runner() as others:
        stack = contextlib.AsyncExitStack()

        async def start() -> Any:
            server = await stack.enter_async_context(simulated(ws._app))
            client = await stack.enter_async_context(connect(f"{server.url}/ws"))
            await until(lambda: ws._hub.connections)
            return client

        client = apps.run(start())
        for name, call in CALLS.items():
            with pytest.raises(PachinkoError, match=f"conn.{name}"):
                others.run(_awaited(call(conns[0])))
        conns[0].expires_at = None  # No loop runs at all: nobody is disturbed.
        apps.run(conns[0].send("said"))
        assert apps.run(client.receive()) == {"type": "said"}
        apps.run(stack.aclose())


async def test_call_threadsafe_takes_them() -> None:
    """As the error says; a property is set by ``setattr``."""
    ws, conns = endpoint(), list[Connection]()

    @ws.connect
    async def arrive(conn: Connection) -> None:
        conns.append(conn)

    def work() -> None:
        (conn,) = conns
        hub, at = conn.hub, time.time() + PATIENCE * 10
        hub.call_threadsafe(conn.join, "a").result(PATIENCE)
        hub.call_threadsafe(conn.send, "said", {"n": 1}).result(PATIENCE)
        hub.call_threadsafe(setattr, conn, "expires_at", at).result(PATIENCE)
        assert conn.groups == {"a"} and conn.expires_at == at
        hub.call_threadsafe(conn.leave, "a").result(PATIENCE)
        hub.call_threadsafe(conn.close, 4000, "bye").result(PATIENCE)

    async with simulated(ws._app) as server, connect(f"{server.url}/ws") as client:
        await until(lambda: ws._hub.connections)
        await asyncio.to_thread(work)
        assert await client.receive() == {"type": "said", "payload": {"n": 1}}
        assert await client.closed() == (4000, "bye")
