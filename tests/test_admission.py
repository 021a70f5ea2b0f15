"""How a client gets in: authentication, connect handlers, the answer to the handshake."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import logging
import math
import weakref
from collections.abc import AsyncIterator
from typing import Any

import falcon
import falcon.asgi
import falcon.testing
import pytest
import websockets.exceptions
from support import (
    PATIENCE,
    Client,
    Stalled,
    connect,
    new_app,
    serving,
    session_of,
    simulated,
    turns,
    until,
)
from test_handshake import endpoint

import pachinko
from pachinko import Close, Connection, Hub, MessageError, Pachinko, PachinkoError

USERS = {"t-ann": "ann", "t-bob": "bob"}


class Door:
    """An endpoint that asks who comes in, and what has happened there."""

    def __init__(self, **options: Any) -> None:
        self.ws = endpoint(**options)
        self.seen: list[Any] = []
        self.ws.authenticate(self.who)
        self.ws.connect(self.arrive)
        self.ws.disconnect(self.leave)
        self.ws.on("whoami")(self.whoami)

    async def who(self, conn: Connection, token: str | None) -> str | None:
        self.seen.append(token)
        return USERS.get(token or "")

    async def arrive(self, conn: Connection) -> None:
        self.seen.append(("connect", conn.user))
        await conn.join("all")
        await conn.send("welcome")

    async def leave(self, conn: Connection) -> None:
        self.seen.append(("disconnect", conn.close_code))

    async def whoami(self, conn: Connection) -> str | None:
        return conn.user

    def visit(self, url: str, **options: Any) -> Any:
        return connect(f"{url}/ws", **options)


def bearer(token: str) -> Any:
    return {"additional_headers": {"Authorization": f"Bearer {token}"}}


async def authenticate(client: Client, token: Any = "t-ann", id: Any = None) -> None:
    await client.send("authenticate", {"token": token}, id=id)


@pytest.mark.parametrize(
    ("options", "subprotocol"),
    [
        (bearer("t-ann"), None),
        ({"subprotocols": ["bearer", "t-ann"]}, "bearer"),
        ({"subprotocols": ["bearer", "t-ann", "v1"]}, "v1"),
        ({"subprotocols": ["v1", "bearer", "t-ann"]}, "v1"),
        ({**bearer("t-ann"), "subprotocols": ["bearer", "t-bob"]}, "bearer"),
    ],
)
async def test_a_token_in_the_handshake(options: Any, subprotocol: str | None) -> None:
    """The function is asked once, before connect; the token is never chosen as subprotocol."""
    door = Door(subprotocols=["v1", "t-ann"])
    async with simulated(door.ws._app) as server:
        async with door.visit(server.url, **options) as client:
            assert client.socket.subprotocol == subprotocol
            assert (await client.receive())["type"] == "welcome"
            assert (await client.ask("whoami"))["payload"] == "ann"
            await door.ws._hub.send_to_user("ann", "mail", {})
            assert (await client.receive())["type"] == "mail"
        await until(lambda: not door.ws._hub.state.serving)
    assert door.seen == ["t-ann", ("connect", "ann"), ("disconnect", 1000)]


async def test_a_cookie_is_the_functions_own_business() -> None:
    """Without a token it gets None, and may tell the user from the request."""
    ws = endpoint()

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        assert token is None
        return conn.req.get_cookie_values("session")[0]

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.send("hello", conn.user)

    async with simulated(ws._app) as server:
        options = {"additional_headers": {"Cookie": "session=ann"}}
        async with connect(f"{server.url}/ws", **options) as client:
            assert (await client.receive())["payload"] == "ann"


@pytest.mark.parametrize("options", [bearer("bad"), {"subprotocols": ["bearer", "bad"]}])
async def test_a_refused_token_closes_with_3401(options: Any) -> None:
    """After an accept, so that a browser can tell; no connect or disconnect handler runs."""
    door = Door()
    async with simulated(door.ws._app) as server:
        async with door.visit(server.url, **options) as client:
            assert await client.closed() == (3401, "authentication failed")
        await until(lambda: not door.ws._hub.state.serving)
    assert door.seen == ["bad"]
    assert not door.ws._hub.state.registry.connections and not door.ws._hub.state.registry.users


async def test_the_first_message_may_bring_the_token() -> None:
    """It is accepted first, asked again, and told; then connect handlers run."""
    door = Door()
    async with simulated(door.ws._app) as server:
        async with door.visit(server.url) as client:
            await until(lambda: door.seen == [None])
            assert not door.ws._hub.connections
            await door.ws._hub.broadcast("not for strangers", {})
            await authenticate(client, id=7)
            assert await client.receive() == {"type": "authenticate.reply", "id": 7}
            assert (await client.receive())["type"] == "welcome"
            assert (await client.ask("whoami"))["payload"] == "ann"
            assert len(door.ws._hub.members("all")) == 1
            assert door.ws._hub.stats()["received"] == 2
            assert session_of(next(iter(door.ws._hub.connections))).incoming._inbox == []
        await until(lambda: not door.ws._hub.state.serving)
    assert door.seen == [None, "t-ann", ("connect", "ann"), ("disconnect", 1000)]


@pytest.mark.parametrize("is_behind", [True, False])
async def test_messages_before_it_are_held(is_behind: bool) -> None:
    """In their order, up to eight; nothing is handled before the connect handlers."""
    door = Door()

    @door.ws.on("n")
    async def n(conn: Connection, number: int) -> int:
        door.seen.append(number)
        await asyncio.sleep(0)  # reads ahead
        return number

    async with simulated(door.ws._app) as server, door.visit(server.url) as client:
        for number in range(8):
            await client.send("n", number, id=number)
        if is_behind:
            await until(lambda: door.seen == [None])
        await authenticate(client)
        for number in range(8, 30):
            await client.send("n", number, id=number)
        assert (await client.receive())["type"] == "welcome"
        assert [(await client.receive())["payload"] for _ in range(30)] == list(range(30))
    assert door.seen[:30] == [None, "t-ann", ("connect", "ann"), *range(27)]


async def test_a_ninth_message_before_it_is_one_too_many() -> None:
    """Whoever talks on without a token is closed with 3401."""
    door = Door()
    async with simulated(door.ws._app) as server, door.visit(server.url) as client:
        for number in range(9):
            await client.send("whoami", id=number)
        assert await client.closed() == (3401, "authenticate first")
    assert door.seen == [None]


@pytest.mark.parametrize("data", ["x" * 600, b"x" * 600])
async def test_what_is_held_is_bounded_in_bytes(data: Any) -> None:
    """All together are at most *max_size* bytes."""
    door = Door(max_size=1000)
    async with simulated(door.ws._app) as server, door.visit(server.url) as client:
        await client.raw(data)
        await client.raw(data)
        assert (await client.closed())[0] == 1009


@pytest.mark.parametrize("first", ["no json", "[]", '{"id":1}', b"\x00", '{"type":"complete"}'])
async def test_rubbish_before_it_is_held_as_well(first: Any) -> None:
    """It is answered when its turn has come, and not while the client may be anybody."""
    door = Door()

    @door.ws.binary
    async def binary(conn: Connection, data: bytes) -> None:
        door.seen.append(data)
        raise MessageError("binary")

    async with simulated(door.ws._app) as server, door.visit(server.url) as client:
        await client.raw(first)
        await authenticate(client, id=1)
        assert (await client.receive())["type"] == "authenticate.reply"
        assert (await client.receive())["type"] == "welcome"
        if first != '{"type":"complete"}':  # of no stream
            assert (await client.receive())["type"] == "error"
        assert (await client.ask("whoami", id=2))["payload"] == "ann"


@pytest.mark.parametrize(
    "payload", [{"token": "bad"}, {"token": 5}, {"token": None}, {}, [], "t-ann", None]
)
async def test_a_first_message_without_a_good_token_is_refused(payload: Any) -> None:
    """The function sees only texts; no handler runs."""
    door = Door()
    async with simulated(door.ws._app) as server, door.visit(server.url) as client:
        await client.send("authenticate", payload, id=1)
        assert await client.closed() == (3401, "authentication failed")
    assert door.seen in ([None], [None, "bad"])


async def test_the_client_has_to_authenticate_in_time() -> None:
    """Else it is closed with 3401."""
    door = Door(auth_timeout=0.05)
    async with simulated(door.ws._app) as server, door.visit(server.url) as client:
        await client.send("whoami", id=1)
        assert await client.closed() == (3401, "not authenticated within 0.05 s")
    assert door.seen == [None]


@pytest.mark.parametrize("options", [{}, bearer("t-ann")])
async def test_the_function_has_to_answer_in_time(options: Any) -> None:
    """A lookup that hangs holds nobody up for longer, and is cancelled."""
    ws, seen = endpoint(auth_timeout=0.05), []

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        try:
            return await asyncio.Event().wait() and None
        finally:
            seen.append("cancelled")

    async with serving(ws._app) as server, connect(f"{server.url}/ws", **options) as client:
        assert await client.closed() == (3401, "not authenticated within 0.05 s")
    assert seen == ["cancelled"]


async def test_a_client_may_leave_before_it_authenticates() -> None:
    """Nothing of it stays, and no handler runs."""
    door = Door()
    async with simulated(door.ws._app) as server:
        for leave in (Client.cut, Client.close):
            async with door.visit(server.url) as client:
                await client.send("whoami")
                if (left := leave(client)) is not None:
                    await left
            await until(lambda: not door.ws._hub.state.serving)
    assert door.seen == [None, None]


async def test_a_client_may_leave_while_the_function_is_asked() -> None:
    """That is noticed; the function has *linger* seconds, and no connect handler runs."""
    ws, seen = endpoint(linger=0.05, auth_timeout=30), []

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        if token is None:
            return None
        try:
            await asyncio.Event().wait()
        finally:
            seen.append("cancelled")
        return "ann"

    @ws.connect
    async def arrive(conn: Connection) -> None:
        seen.append("connect")

    async with simulated(ws._app) as server:
        async with connect(f"{server.url}/ws") as client:
            await authenticate(client)
            await until(lambda: next(iter(ws._hub.state.serving.values())).incoming._ahead)
            client.cut()
        await until(lambda: not ws._hub.state.serving)
    assert seen == ["cancelled"]


@pytest.mark.parametrize("how", ["hangs", "sends"])
async def test_a_client_that_leaves_connect_handlers_is_no_bug(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One that has authenticated by its first message, too: nothing is logged as a failure."""
    door, begun = Door(linger=0.05), asyncio.Event()

    @door.ws.connect
    async def load(conn: Connection) -> None:
        begun.set()
        if how == "hangs":
            await asyncio.Event().wait()
        await until(lambda: conn.closed)
        await conn.send("late")

    async with simulated(door.ws._app) as server:
        async with door.visit(server.url) as client:
            await authenticate(client)
            await begun.wait()
            client.cut()
        await until(lambda: not door.ws._hub.state.serving)
    assert door.seen == [None, "t-ann", ("connect", "ann")]
    assert "failed" not in caplog.text


async def test_a_client_may_leave_during_connect_handlers() -> None:
    """They end undisturbed, what was sent is handled, and the disconnect handler runs."""
    door = Door()
    may_go_on = asyncio.Event()

    @door.ws.connect
    async def load(conn: Connection) -> None:
        await may_go_on.wait()
        door.seen.append(("gone", conn.closed, conn.close_code))

    @door.ws.on("save")
    async def save(conn: Connection) -> None:
        door.seen.append(("saved", conn.closed))

    async with simulated(door.ws._app) as server:
        async with door.visit(server.url) as client:
            await authenticate(client)
            await client.send("save")
            await client.close(4000)
        (session,) = door.ws._hub.state.serving.values()
        await until(lambda: session.outgoing.closed)
        may_go_on.set()
        await until(lambda: not door.ws._hub.state.serving)
    assert door.seen == [
        None, "t-ann", ("connect", "ann"), ("gone", True, 4000), ("saved", True),
        ("disconnect", 4000),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("exception", "closed_with"),
    [
        (falcon.HTTPForbidden(), 3403),
        (falcon.HTTPNotFound(), 3404),
        (Close(4000, "full"), 4000),
        (KeyError("bug"), 1011),
        (SystemExit(1), 1011),
    ],
)
@pytest.mark.parametrize("logs", [False, True])
async def test_a_connect_handler_may_refuse_after_the_first_message(
    exception: BaseException, closed_with: int, logs: bool
) -> None:
    """An HTTP error closes with 3000 and its status; what was sent stays untold.

    An error handler of the app that only *logs* makes no difference to a bug.
    """
    door = Door()

    async def log(req: Any, resp: Any, exc: Exception, params: Any, ws: Any = None) -> None: ...

    if logs:
        door.ws._app.add_error_handler(KeyError, log)

    @door.ws.connect
    async def check(conn: Connection) -> None:
        await turns()  # reads ahead meanwhile
        raise exception

    async with simulated(door.ws._app) as server:
        async with door.visit(server.url) as client:
            await authenticate(client, id=1)
            with pytest.raises(websockets.exceptions.ConnectionClosed):
                await client.receive()
            assert (await client.closed())[0] == closed_with
        await until(lambda: not door.ws._hub.state.serving)
    assert door.seen == [None, "t-ann", ("connect", "ann")]
    assert (
        not door.ws._hub.state.registry.connections
        and not door.ws._hub.state.registry.users
        and not door.ws._hub.groups
    )


async def test_a_refused_client_that_does_not_answer_leaves_no_task() -> None:
    """What was read ahead for the connect handlers is no longer read."""
    door = Door()

    @door.ws.connect
    async def check(conn: Connection) -> None:
        await until(lambda: session_of(conn).incoming._ahead)
        raise falcon.HTTPForbidden

    async with serving(door.ws._app) as server, Stalled(f"{server.url}/ws") as client:
        await client.send({"type": "authenticate", "payload": {"token": "t-ann"}})
        await until(lambda: door.seen[-1] == ("connect", "ann"))
        await until(lambda: not door.ws._hub.state.serving)
        await until(lambda: not [t for t in asyncio.all_tasks() if "_read_ahead" in repr(t)])


# What the function may do


def failing(exceptions: dict[str, BaseException]) -> tuple[Pachinko, list[str]]:
    """An endpoint that knows ann, and fails for other tokens in a way of their own."""
    ws, called = endpoint(), []

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        if token in exceptions:
            raise exceptions[token]
        return USERS.get(token or "")

    @ws.connect
    @ws.disconnect
    async def handler(conn: Connection) -> None:
        called.append("a handler")

    return ws, called


async def test_the_function_may_refuse_with_an_http_error() -> None:
    """Before accept that is HTTP 403, through Falcon's error handlers; after it 3000 + status."""
    ws, called = failing({"t": falcon.HTTPTooManyRequests()})
    seen: list[Any] = []

    async def handle(req: Any, resp: Any, ex: Any, params: Any, ws: Any = None) -> None:
        seen.append(ws.unaccepted)
        raise ex

    ws._app.add_error_handler(falcon.HTTPTooManyRequests, handle)
    async with simulated(ws._app) as server:
        with pytest.raises(websockets.exceptions.InvalidStatus):
            async with connect(f"{server.url}/ws", **bearer("t")):
                pass
        async with connect(f"{server.url}/ws") as client:
            await authenticate(client, "t")
            assert (await client.closed())[0] == 3429
    assert seen == [True, False]
    assert called == []


async def test_the_function_may_close() -> None:
    """`Close`, raised or called, is what the client sees."""
    ws, called = failing({"t": Close(4010, "banned")})
    async with simulated(ws._app) as server:
        async with connect(f"{server.url}/ws", **bearer("t")) as client:
            assert await client.closed() == (4010, "banned")
        async with connect(f"{server.url}/ws") as client:
            await authenticate(client, "t")
            assert await client.closed() == (4010, "banned")
    assert called == []

    ws = endpoint()

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        await conn.close(4011, "closed")
        if conn.req.params:
            raise Close(4012, "too late")
        return "ann"

    async with simulated(ws._app) as server:
        for query in ("", "?raise=1"):
            async with connect(f"{server.url}/ws{query}", **bearer("t")) as client:
                assert await client.closed() == (4011, "closed")


SECRET = "s3cret-'token'"
BUGS: dict[str, BaseException] = {
    SECRET: KeyError(SECRET),
    "t-exit": SystemExit("t-exit"),
    "t-early": MessageError("not_yet", "no message has been handled"),
    "t-cancelled": asyncio.CancelledError(),
}


@pytest.mark.parametrize("token", BUGS)
async def test_a_bug_in_the_function_refuses(token: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged with its traceback, and the server goes on."""
    ws, called = failing(BUGS)
    async with simulated(ws._app) as server:
        with pytest.raises(websockets.exceptions.InvalidStatus):
            async with connect(f"{server.url}/ws", **bearer(token)):
                pass
        async with connect(f"{server.url}/ws") as client:
            await authenticate(client, token)
            assert (await client.closed())[0] == 3500
    assert called == []
    logged = [r.getMessage() for r in caplog.records if r.name == "pachinko"]
    assert len(logged) == 2
    assert all("who() at" in text and token not in text for text in logged)
    if token == "t-early":
        assert all("when no message can be answered yet; raise Close" in text for text in logged)
    else:
        kind = type(BUGS[token]).__name__
        assert all(f"failed: {kind}\n  File " in text for text in logged)


@pytest.mark.parametrize("user", [5, True, b"ann", ["ann"], ""])
async def test_a_user_is_a_text(user: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Anything else is a bug, and nobody is let in."""
    ws = endpoint()

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> Any:
        return user

    async with simulated(ws._app) as server:
        with pytest.raises(websockets.exceptions.InvalidStatus):
            async with connect(f"{server.url}/ws"):
                pass
    got = type(user).__name__ if user != "" else "an empty one"
    assert f"PachinkoError: the user is a str, or None to refuse; got {got}" in caplog.text


async def test_the_function_cannot_join_a_group(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody is in a group, or reached as a user, before the answer."""
    ws = endpoint()

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        conn.user = "ann"
        if token == "join":
            await conn.join("secrets")
        return None

    async with simulated(ws._app) as server:
        async with connect(f"{server.url}/ws", **bearer("bad")) as client:
            await client.closed()
            assert not ws._hub.state.registry.users
        with pytest.raises(websockets.exceptions.InvalidStatus):
            async with connect(f"{server.url}/ws", **bearer("join")):
                pass
    assert not ws._hub.groups and not ws._hub.state.registry.users
    assert "nobody joins before it has authenticated; do it in @ws.connect" in caplog.text


async def test_the_function_may_go_on_after_it_has_closed() -> None:
    """Its own `conn.close` does not cancel it."""
    ws, seen = endpoint(), []

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        await conn.close(4001, "banned")
        await turns()
        seen.append("noted")
        return None

    async with simulated(ws._app) as server, connect(f"{server.url}/ws") as client:
        assert await client.closed() == (4001, "banned")
    assert seen == ["noted"]


async def fail() -> None:
    raise ValueError


async def leave_a_cancellation() -> None:
    """On Python 3.11 and 3.12 a caught failure leaves the task's count of cancellations at one."""
    with contextlib.suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())


class Busy(falcon.HTTPServiceUnavailable):
    """A refusal that can be waited for."""


@pytest.mark.parametrize("where", ["authenticate", "connect"])
async def test_what_a_task_group_refuses_with_is_freed_at_once(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The refusal is not in a cycle with the group that it is from."""
    ws, seen = endpoint(), weakref.WeakSet[BaseException]()

    async def refuse(conn: Connection, *_: Any) -> None:
        refusal = Busy()
        seen.add(refusal)
        raise ExceptionGroup("of tasks", [refusal])

    async def arrive(conn: Connection) -> None:
        await refuse(conn)

    async def who(conn: Connection, token: str | None) -> str | None:
        await refuse(conn)
        return None

    if where == "connect":
        ws.connect(arrive)
    else:
        ws.authenticate(who)
    caplog.set_level(logging.CRITICAL, "falcon")  # A record of the log would hold it.
    gc.collect()
    gc.disable()
    try:
        async with simulated(ws._app) as server:
            with pytest.raises(websockets.exceptions.InvalidStatus):
                async with connect(f"{server.url}/ws"):
                    pass
            await until(lambda: not (ws._hub.state.serving or seen))
    finally:
        gc.enable()


@pytest.mark.parametrize("ends", ["ann", "hangs", "drained"])
async def test_a_caught_failure_of_a_task_group_is_no_cancellation(ends: str) -> None:
    """It hides neither the user, nor the end of the time, nor a close."""
    ws = endpoint(auth_timeout=5.0)
    asked = asyncio.Event()

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        await leave_a_cancellation()
        if token is None:
            return None
        asked.set()
        if ends != "ann":
            await asyncio.Event().wait()
        return "ann"

    @ws.on("whoami")
    async def whoami(conn: Connection) -> str | None:
        return conn.user

    async with simulated(ws._app) as server, connect(f"{server.url}/ws") as client:
        await authenticate(client)
        if ends == "ann":
            assert (await client.ask("whoami"))["payload"] == "ann"
            return
        await asyncio.wait_for(asked.wait(), PATIENCE)
        if ends == "drained":
            await ws._hub.drain(0)
        else:
            await server.spend(5.0)
        assert (await client.closed())[0] == (1012 if ends == "drained" else 3401)


async def test_a_function_that_cleans_up_holds_up_no_drain() -> None:
    """Its client may be closed though its time is over and it still gives something back."""
    ws, cleaning, may_end = endpoint(auth_timeout=0.02), asyncio.Event(), asyncio.Event()

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        try:
            return await asyncio.Event().wait() and None
        finally:
            cleaning.set()
            await may_end.wait()

    async with serving(ws._app) as server:
        stranger = asyncio.create_task(closed(f"{server.url}/ws"))
        await asyncio.wait_for(cleaning.wait(), PATIENCE)
        draining = asyncio.create_task(ws._hub.drain(0))
        await until(lambda: all(each.outgoing.closed for each in ws._hub.state.serving.values()))
        may_end.set()
        await draining
        assert await stranger == (1012, "the server restarts")


async def closed(url: str) -> tuple[int | None, str | None]:
    async with connect(url) as client:
        return await client.closed()


async def test_the_user_may_be_changed_while_it_is_being_closed() -> None:
    """A connect handler that is overtaken by a drain ends as if it had not been."""
    ws, may_go_on, codes = endpoint(), asyncio.Event(), list[int | None]()

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await may_go_on.wait()
        conn.user = "ann"

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        codes.append(conn.close_code)

    async with simulated(ws._app) as server:
        visitor = asyncio.create_task(closed(f"{server.url}/ws"))
        await until(lambda: ws._hub.state.serving)
        draining = asyncio.create_task(ws._hub.drain(0))
        await until(lambda: next(iter(ws._hub.state.serving.values())).outgoing.closed)
        may_go_on.set()
        await draining
        assert await visitor == (1012, "the server restarts")
    assert codes == [1012] and not ws._hub.state.registry.users


async def test_an_accept_that_takes_its_time_is_not_cancelled() -> None:
    """Else it would be done twice."""
    ws = endpoint(auth_timeout=0.02)

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None: ...

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        async def slowly(event: Any) -> None:
            await send(event)
            if event["type"] == "websocket.accept":
                server.sim.advance(0.1)
                await turns()

        await ws._app(scope, receive, slowly if scope["type"] == "websocket" else send)  # type: ignore[misc]  # Falcon's types differ

    async with simulated(slow) as server:
        assert await closed(f"{server.url}/ws") == (3401, "not authenticated within 0.02 s")


async def test_what_is_read_ahead_of_a_stranger_is_bounded_in_bytes() -> None:
    """While the token is looked up, about *max_size* bytes are read, and not eight frames."""
    ws, may_go_on = endpoint(max_size=1000), asyncio.Event()

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        if token is not None:
            await may_go_on.wait()
        return token

    @ws.on("x")
    async def x(conn: Connection, payload: str) -> int:
        return len(payload)

    async with simulated(ws._app) as server, connect(f"{server.url}/ws") as client:
        await authenticate(client)
        (session,) = ws._hub.state.serving.values()
        for id in range(6):
            await client.send("x", "x" * 400, id=id)
        incoming = session.incoming
        await until(lambda: incoming._ahead is not None and incoming._ahead.done())
        assert len(incoming._inbox) == 3
        may_go_on.set()
        assert [(await client.receive())["id"] for _ in range(6)] == list(range(6))


# No token in the log


async def test_no_token_reaches_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever way it comes, and whether it is taken, refused, or the function fails with it."""
    caplog.set_level(logging.DEBUG)
    for name in ("websockets", "uvicorn.error"):  # the client, and the server's list of headers
        logging.getLogger(name).setLevel(logging.INFO)
    asyncio.get_running_loop().set_debug(True)
    asyncio.get_running_loop().slow_callback_duration = 0.0
    ws = endpoint()
    users: dict[Any, str | None] = {None: None, "s3cret-bad": None, "s3cret-ok": "ann"}

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        return users[token]

    async with serving(ws._app, log_level="info") as server:
        for token in ("s3cret-ok", "s3cret-bad", "s3cret-bug"):
            for options in (bearer(token), {"subprotocols": ["bearer", token]}, {}):
                try:
                    async with connect(f"{server.url}/ws", **options) as client:
                        if not options:
                            await authenticate(client, token, id=1)
                        if token == "s3cret-ok":
                            await authenticate(client, 5, id=2)
                            await authenticate(client, token, id=3)
                            while (await client.receive()).get("id") != 3:
                                pass
                            await authenticate(client, "s3cret-bug", id=4)
                            await client.receive()
                        else:
                            await client.closed()
                except websockets.exceptions.InvalidStatus:
                    assert token == "s3cret-bug"
    lines = [json.dumps(r.getMessage()) + str(r.exc_text) for r in caplog.records]
    assert sum("who() at" in line and "KeyError" in line for line in lines) == 6
    assert "s3cret" not in "".join(lines)


# Registration


def test_a_wrong_function_is_refused() -> None:
    """The text has the right code."""
    ws = endpoint()
    with pytest.raises(
        PachinkoError, match=r"expected a function, .*\n@ws.authenticate\nasync def who"
    ):
        ws.authenticate()

    with pytest.raises(PachinkoError, match=r"'authenticate' is reserved.*, or write @ws\.auth"):
        ws.on("authenticate")(test_a_wrong_function_is_refused)
    with pytest.raises(PachinkoError, match="takes the wrong parameters"):

        @ws.authenticate
        async def who(conn: Connection) -> str | None: ...

    @ws.authenticate
    async def first(conn: Connection, token: str | None) -> str | None: ...

    with pytest.raises(PachinkoError, match=r"authenticate has a handler: .*first.*second\(\)"):

        @ws.authenticate
        async def second(conn: Connection, token: str | None) -> str | None: ...


async def test_it_may_be_registered_while_the_app_runs() -> None:
    """As other handlers may."""
    door_less = endpoint()
    async with simulated(door_less._app) as server:

        @door_less.authenticate
        async def who(conn: Connection, token: str | None) -> str | None:
            return token

        async with connect(f"{server.url}/ws", **bearer("ann")) as client:
            await authenticate(client, "ann", id=1)
            assert (await client.receive())["type"] == "authenticate.reply"


async def test_a_browser_like_token_round_trips() -> None:
    """A token in unpadded base64url is a valid subprotocol (RFC 6455, 4.1; RFC 7230, 3.2.6)."""
    token = base64.urlsafe_b64encode(bytes(range(256))).decode().rstrip("=")
    ws = endpoint()

    @ws.authenticate
    async def who(conn: Connection, sent: str | None) -> str | None:
        return "ann" if sent == token else None

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.send("hello", conn.user)

    async with (
        simulated(ws._app) as server,
        connect(f"{server.url}/ws", subprotocols=["bearer", token]) as client,
    ):
        assert (await client.receive())["payload"] == "ann"


async def test_the_first_message_may_follow_what_a_middleware_has_accepted() -> None:
    """The handshake is then not answered once more."""
    app = new_app()

    class Accepting:
        async def process_request_ws(self, req: Any, ws: Any) -> None:
            await ws.accept()

    app.add_middleware(Accepting())
    ws = Pachinko(app, "/ws", hub=Hub())

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        return token

    @ws.on("who")
    async def name(conn: Connection) -> str | None:
        return conn.user

    async with simulated(app) as server, connect(server.url + "/ws") as client:
        await client.send("authenticate", {"token": "ada"})
        assert (await client.ask("who"))["payload"] == "ada"


# Accepted handlers


async def test_an_accepted_handler_runs_once_the_client_is_in() -> None:
    """Members and presence hold it from then on; what it sends comes before the first reply."""
    ws, seen = endpoint("/ws/{room}/{n:int}"), list[Any]()
    hub = ws._hub

    def here() -> list[int]:
        return [len(hub.members("all")), len(hub.connections)]

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.join("all")
        seen.append(("connect", here(), len(await hub.presence("all"))))

    @ws.accepted
    async def welcome(conn: Connection, n: int) -> None:
        seen.append(("accepted", here(), len(await hub.presence("all"))))
        await turns()
        await conn.send("welcome", n)
        await hub.send("all", "came", conn.id)

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        present = await hub.presence("all")
        seen.append(("disconnect", here(), len(present), sorted(conn.groups)))

    @ws.on("echo")
    async def echo(conn: Connection, payload: Any) -> Any:
        return payload

    async with simulated(ws._app) as server:
        async with connect(f"{server.url}/ws/a/5") as client:
            await client.send("echo", 1, id=1)
            assert (await client.receive())["payload"] == 5
            assert (await client.receive())["type"] == "came"
            assert (await client.receive())["type"] == "echo.reply"
            async with connect(f"{server.url}/ws/b/6") as other:
                assert (await other.receive())["payload"] == 6
            await until(lambda: len(seen) == 5)
        await until(lambda: not hub.state.serving)
    assert seen == [
        ("connect", [0, 0], 0), ("accepted", [1, 1], 1),
        ("connect", [1, 1], 1), ("accepted", [2, 2], 2),
        ("disconnect", [1, 1], 1, ["all"]), ("disconnect", [0, 0], 0, ["all"]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("exception", "closed_with", "is_logged"),
    [
        (Close(4001, "full"), (4001, "full"), False),
        (falcon.HTTPTooManyRequests(), (3429, "Too Many Requests"), False),
        (KeyError("bug"), (1011, "the server failed"), True),
        (MessageError("no"), (1011, "the server failed"), True),
        (SystemExit(1), (1011, "the server failed"), True),
        (ExceptionGroup("of tasks", [Close(4001, "full")]), (4001, "full"), False),
        (
            BaseExceptionGroup("", [asyncio.CancelledError(), falcon.HTTPTooManyRequests()]),
            (3429, "Too Many Requests"), False,
        ),
        (
            ExceptionGroup("", [ExceptionGroup("", [falcon.HTTPNotFound()])]),
            (3404, "Not Found"), False,
        ),
        (
            ExceptionGroup("", [KeyError("bug"), Close(4001)]),
            (1011, "the server failed"), True,
        ),
    ],
)  # fmt: skip
async def test_what_an_accepted_handler_raises_ends_the_connection(
    exception: BaseException, closed_with: Any, is_logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """No later one runs, and no message is handled; disconnect handlers run."""
    ws, seen = endpoint(), list[Any]()

    @ws.accepted
    async def welcome(conn: Connection) -> None:
        await conn.send("hello")
        raise exception

    @ws.accepted
    async def second(conn: Connection) -> None:
        seen.append("second")

    @ws.on("x")
    async def x(conn: Connection) -> None:
        seen.append("x")

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        seen.append(conn.close_code)

    async with simulated(ws._app) as server, connect(f"{server.url}/ws") as client:
        with contextlib.suppress(websockets.exceptions.ConnectionClosed):
            await client.send("x")
        assert (await client.receive())["type"] == "hello"
        assert await client.closed() == closed_with
        await until(lambda: not ws._hub.state.serving)
    assert seen == [closed_with[0]]
    assert ("welcome() at" in caplog.text) is is_logged


async def in_a_group(conn: Connection, exc: Exception | None, is_due: asyncio.Event) -> Any:
    """A connect handler with a group around its ``yield``, of which a task raises *exc*."""

    async def fail() -> None:
        await is_due.wait()
        assert exc is not None
        raise exc

    async with asyncio.TaskGroup() as group:
        group.create_task(fail())
        yield


async def in_a_timeout(conn: Connection, exc: Exception | None, is_due: asyncio.Event) -> Any:
    """A connect handler with a time limit around its ``yield``."""
    async with asyncio.timeout(None) as limit:
        watch = asyncio.create_task(is_due.wait())
        watch.add_done_callback(lambda _: limit.reschedule(0))
        yield


@pytest.mark.parametrize("is_busy", [False, True])
@pytest.mark.parametrize(
    ("scope", "exc", "closed_with", "logged"),
    [
        (in_a_group, Close(4003, "pushed"), (4003, "pushed"), ""),
        (in_a_group, falcon.HTTPGone(), (3410, "Gone"), ""),
        (in_a_group, KeyError("bug"), (1011, "the server failed"), "KeyError"),
        (in_a_timeout, None, (1011, "the server has ended the connection"), "a scope around"),
    ],
)
async def test_a_scope_around_a_yield_may_end_the_connection(
    scope: Any,
    exc: Any,
    closed_with: Any,
    logged: str,
    is_busy: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client gets its close, and the disconnect handlers run, whatever was in progress."""
    ws, is_due, seen = endpoint(), asyncio.Event(), list[Any]()

    @ws.connect
    async def outer(conn: Connection) -> AsyncIterator[None]:
        yield
        seen.append("outer")

    @ws.connect
    async def arrive(conn: Connection) -> AsyncIterator[None]:
        async for _ in scope(conn, exc, is_due):
            yield

    @ws.on("wait")
    async def wait(conn: Connection) -> None:
        is_due.set()
        await asyncio.Event().wait()

    @ws.on("idle", concurrent=True)
    async def idle(conn: Connection) -> None:
        is_due.set()

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        seen.append(conn.close_code)

    async with simulated(ws._app) as server, connect(f"{server.url}/ws") as client:
        await client.send("wait" if is_busy else "idle")
        assert await client.closed() == closed_with
        await until(lambda: not ws._hub.state.serving)
    assert seen == ["outer", closed_with[0]]
    assert logged in caplog.text and ("failed" in caplog.text) is (logged == "KeyError")


async def test_a_scope_that_only_a_cancelled_server_ends_is_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The server's cancellation goes on; what is behind the ``yield`` has run once."""
    ws, seen = endpoint(), list[Any]()

    @ws.connect
    async def arrive(conn: Connection) -> AsyncIterator[None]:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_later(0.01, task.cancel)
        yield
        seen.append("left")

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        seen.append(conn.close_code)

    async with serving(ws._app) as server:
        with contextlib.suppress(websockets.exceptions.ConnectionClosed):
            async with connect(f"{server.url}/ws") as client:
                await client.closed()
        await until(lambda: not ws._hub.state.serving)
    assert seen == ["left", 1006] and "failed" not in caplog.text


@pytest.mark.parametrize("how", ["hangs", "sends", "sends in a group", "swallows"])
async def test_a_client_may_leave_while_an_accepted_handler_runs(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is noticed; the handler has *linger* seconds, and disconnect handlers run."""
    ws, seen = endpoint(linger=0.05), list[Any]()
    begun = asyncio.Event()

    @ws.accepted
    async def welcome(conn: Connection) -> None:
        begun.set()
        if how == "hangs":
            await asyncio.Event().wait()
        await until(lambda: conn.closed)
        if how == "sends":
            await conn.send("late")
        if how == "sends in a group":
            async with asyncio.TaskGroup() as group:
                group.create_task(conn.send("late"))
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        seen.append("left")

    async with serving(ws._app) as server:
        async with connect(f"{server.url}/ws") as client:
            await begun.wait()
            client.cut()
        await until(lambda: not ws._hub.state.serving)
    assert seen == ["left"]
    assert "failed" not in caplog.text


@pytest.mark.parametrize("leaves_message", [True, False])
async def test_accepted_handlers_run_for_messages_that_a_client_has_left(
    leaves_message: bool,
) -> None:
    """Before these are handled; a client that left nothing behind has never been in."""
    door, may_go_on = Door(linger=5.0), asyncio.Event()

    @door.ws.connect
    async def load(conn: Connection) -> None:
        await may_go_on.wait()

    @door.ws.accepted
    async def welcome(conn: Connection) -> None:
        door.seen.append("accepted")

    @door.ws.on("save")
    async def save(conn: Connection) -> None:
        door.seen.append("saved")
        await asyncio.Event().wait()  # It is cancelled, as its client has gone.

    async with simulated(door.ws._app) as server:
        async with door.visit(server.url) as client:
            await authenticate(client)
            if leaves_message:
                await client.send("save")
            await client.close(4000)
        (session,) = door.ws._hub.state.serving.values()
        await until(lambda: session.outgoing.closed)
        may_go_on.set()
        await server.spend(5.0)
        await until(lambda: not door.ws._hub.state.serving)
    handled = ["accepted", "saved"] if leaves_message else []
    assert door.seen[3:] == [*handled, ("disconnect", 4000)]


def test_an_accepted_handler_may_not_yield_and_has_only_path_parameters() -> None:
    """The text has the right code."""
    ws = endpoint("/ws/{room}")
    with pytest.raises(PachinkoError, match=r"but only message handlers stream; write\n@ws\.acc"):

        @ws.accepted
        async def stream(conn: Connection) -> Any:
            yield

    with pytest.raises(PachinkoError, match=r"@ws\.accepted\nasync def arrive\(conn, room\)"):

        @ws.accepted
        async def other(conn: Connection, rom: str) -> None: ...


# What comes behind a `yield`


def lived(**options: Any) -> tuple[Pachinko, list[Any]]:
    """An endpoint with a connect handler that yields, a resource, and a second handler."""
    ws, seen = endpoint("/ws/{room}", **options), list[Any]()

    @ws.connect
    async def first(conn: Connection, room: str) -> AsyncIterator[None]:
        seen.append(f"first of {room}")
        yield
        await asyncio.sleep(0)
        seen.append(f"end of first, {conn.close_code}")

    class Counter:
        async def on_connect(self, conn: Connection) -> None:
            seen.append("up")

        async def on_accepted(self, conn: Connection, room: str) -> None:
            seen.append(f"in {room}")

        async def on_disconnect(self, conn: Connection) -> None:
            seen.append("down")

    ws.add_resource("counter", Counter())

    @ws.connect
    async def second(conn: Connection) -> AsyncIterator[None]:
        match conn.req.get_param("how"):
            case "http":
                raise falcon.HTTPForbidden
            case "close":
                raise Close(4003)
            case "bug":
                raise KeyError
            case "cancelled":
                raise asyncio.CancelledError
            case "return":
                return
            case "hang":
                seen.append("hangs")
                await asyncio.Event().wait()
        yield
        seen.append("end of second")

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        seen.append("disconnect")

    return ws, seen


async def test_the_rest_of_a_connect_handler_runs_after_the_disconnect_handlers() -> None:
    """The last one that was begun ends first."""
    ws, seen = lived()
    async with simulated(ws._app) as server:
        for query in ("", "?how=return"):
            seen.clear()
            async with connect(f"{server.url}/ws/a{query}"):
                await until(lambda: "in a" in seen)
            await until(lambda: not ws._hub.state.serving)
            ends = [] if query else ["end of second"]
            assert seen == [
                "first of a", "up", "in a", "down", "disconnect", *ends, "end of first, 1000",
            ]  # fmt: skip


@pytest.mark.parametrize("how", ["http", "close", "bug", "cancelled"])
async def test_a_later_refusal_undoes_what_has_been_done(how: str) -> None:
    """Also by the resource's `on_disconnect`; other disconnect handlers do not run."""
    ws, seen = lived()
    async with simulated(ws._app) as server:
        if how == "close":
            assert await closed(f"{server.url}/ws/a?how={how}") == (4003, "")
        else:
            assert (await status(f"{server.url}/ws/a?how={how}"))[0] == 403
        await until(lambda: not ws._hub.state.serving)
    code = 4003 if how == "close" else None
    assert seen == ["first of a", "up", "down", f"end of first, {code}"]


@pytest.mark.parametrize("how", ["cut", "late", "drained", "stopped", "cancelled"])
async def test_a_handshake_that_ends_early_is_undone(how: str) -> None:
    """The client leaves, the time is over, or the server stops."""
    ws, seen = lived(linger=0.05, connect_timeout=0.2 if how == "late" else 60)
    async with simulated(ws._app) as server:
        visitor = asyncio.create_task(abandoned(f"{server.url}/ws/a?how=hang"))
        await until(lambda: "hangs" in seen)
        if how == "cut":
            visitor.cancel()
        elif how == "drained":
            await ws._hub.drain(0)
        elif how == "cancelled":
            (task,) = ws._hub.state.serving
            task.cancel()
        elif how == "stopped":
            await server.stop()
        await until(lambda: not ws._hub.state.serving)
        await asyncio.wait([visitor])
        if how == "stopped":
            server.task = asyncio.create_task(asyncio.sleep(0))  # It has stopped already.
    assert [line.partition(",")[0] for line in seen] == [
        "first of a", "up", "hangs", "down", "end of first",
    ]  # fmt: skip


async def test_a_task_that_is_cancelled_while_it_undoes_ends() -> None:
    """Every end still runs, and the client is not answered."""
    ws, seen = endpoint(), list[str]()

    @ws.connect
    async def outer(conn: Connection) -> AsyncIterator[None]:
        yield
        await asyncio.sleep(0)  # An end may wait after the cancellation.
        seen.append("outer")

    @ws.connect
    async def inner(conn: Connection) -> AsyncIterator[None]:
        yield
        seen.append("inner")
        await asyncio.Event().wait()

    @ws.connect
    async def refuse(conn: Connection) -> None:
        raise falcon.HTTPForbidden

    async with simulated(ws._app) as server:
        visitor = asyncio.create_task(abandoned(f"{server.url}/ws"))
        await until(lambda: seen)
        (task,) = ws._hub.state.serving
        task.cancel()
        await until(lambda: not ws._hub.state.serving)
        await asyncio.wait([visitor])
    assert seen == ["inner", "outer"]


async def test_a_failed_accept_runs_everything_behind() -> None:
    """A client that was let in by all handlers has its disconnect handlers, too."""
    ws, seen = lived()

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        async def fail(event: Any) -> None:
            if event["type"] == "websocket.accept":
                raise OSError
            await send(event)

        await ws._app(scope, receive, fail if scope["type"] == "websocket" else send)  # type: ignore[misc]  # Falcon's types differ

    async with simulated(failing) as server:
        await abandoned(f"{server.url}/ws/a")
        await until(lambda: not ws._hub.state.serving)
    assert seen[-4:] == ["down", "disconnect", "end of second", "end of first, 1006"]


async def test_a_bug_behind_the_yield_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """So is a second `yield`; the others still run, and the function is named."""
    ws, seen = endpoint(), list[str]()

    @ws.connect
    async def outer(conn: Connection) -> AsyncIterator[None]:
        yield
        seen.append("outer")

    @ws.connect
    async def failing(conn: Connection) -> AsyncIterator[None]:
        yield
        raise KeyError

    @ws.connect
    async def twice(conn: Connection) -> AsyncIterator[None]:
        yield
        try:
            yield
        finally:
            seen.append("twice")

    async with simulated(ws._app) as server:
        async with connect(f"{server.url}/ws"):
            pass
        await until(lambda: not ws._hub.state.serving)
    assert seen == ["twice", "outer"]
    texts = [record.getMessage() for record in caplog.records if record.name == "pachinko"]
    assert len(texts) == 2
    assert "twice() at" in texts[0] and "failing() at" in texts[1]
    assert "yields more than once; a connect handler has one `yield`" in caplog.text


# The time of a handshake


@pytest.mark.parametrize("seconds", [0, -1, math.inf, 10**400, math.nan, None, "10", True])
def test_the_time_of_a_handshake_is_a_number_above_0(seconds: Any) -> None:
    """Anything else is refused where it is written."""
    with pytest.raises(
        PachinkoError, match=r"^connect_timeout is a number of seconds above 0, got"
    ):
        Pachinko(connect_timeout=seconds)


@pytest.mark.parametrize("where", ["authenticate", "connect", "swallowing", "second"])
async def test_a_handshake_that_takes_too_long_is_refused_with_503(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With a time to come back after; the log names the handler, which was cancelled."""
    ws, seen, hangs = endpoint(connect_timeout=5.0), list[str](), asyncio.Event()

    async def hang() -> None:
        hangs.set()
        try:
            await asyncio.Event().wait()
        finally:
            seen.append("cancelled")

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        if where == "authenticate":
            await hang()
        return token

    @ws.connect
    async def arrive(conn: Connection) -> None:
        if where == "connect":
            await hang()
        if where == "swallowing":
            with contextlib.suppress(asyncio.CancelledError):
                await hang()
            await asyncio.sleep(0)  # Code that has caught its cancellation may wait again.
        if where == "second":
            await asyncio.sleep(0.01)

    @ws.connect
    async def second(conn: Connection) -> None:
        if where == "swallowing":
            seen.append("second")
        await hang()

    async with simulated(ws._app) as server:
        visit = asyncio.create_task(status(f"{server.url}/ws", **bearer("ann")))
        await asyncio.wait_for(hangs.wait(), PATIENCE)
        await server.spend(5.0)
        code, headers, body = await visit
        assert (code, headers["Retry-After"]) == (503, "5")
        assert body["title"] == "503 Service Unavailable"
        await until(lambda: not ws._hub.state.serving)
    assert seen == ["cancelled"]
    name = {"authenticate": "who", "second": "second"}.get(where, "arrive")
    assert f"{name}() at" in caplog.text and "was stopped after 5 s" in caplog.text


async def test_a_handshake_that_takes_too_long_after_the_accept_is_closed() -> None:
    """With 1013; the wait for the first message does not count."""
    door = Door(connect_timeout=0.3)
    may_go_on = asyncio.Event()

    @door.ws.connect
    async def load(conn: Connection) -> None:
        await may_go_on.wait()

    async with simulated(door.ws._app) as server:
        async with door.visit(server.url) as client:
            await server.spend(0.4)  # longer than the time that connect handlers have
            await authenticate(client)
            await server.spend(0.3)
            assert await client.closed() == (1013, "the server takes too long")
        may_go_on.set()
        async with door.visit(server.url) as client:
            await server.spend(0.4)  # longer than the time that connect handlers have
            await authenticate(client)
            assert (await client.receive())["type"] == "welcome"


async def test_a_time_out_of_the_handlers_own_is_a_bug() -> None:
    """It does not look like the end of *connect_timeout*."""
    ws = endpoint()

    @ws.connect
    async def arrive(conn: Connection) -> None:
        async with asyncio.timeout(0.01):
            await asyncio.Event().wait()

    async with simulated(ws._app) as server:
        assert (await status(f"{server.url}/ws"))[0] == 403  # as any bug


async def test_clients_that_leave_during_the_handshake_are_noticed() -> None:
    """All their handlers end within *linger*, however many there are."""
    ws = endpoint(linger=0.1, connect_timeout=60)
    running = 0

    @ws.connect
    async def arrive(conn: Connection) -> None:
        nonlocal running
        running += 1
        try:
            await asyncio.Event().wait()
        finally:
            running -= 1

    async with simulated(ws._app) as server:
        visitors = [asyncio.create_task(abandoned(f"{server.url}/ws")) for _ in range(100)]
        await until(lambda: running == 100)
        assert ws._hub.count == 100
        for visitor in visitors:
            visitor.cancel()
        await until(lambda: running == 0)
        await until(lambda: ws._hub.count == 0)
        await asyncio.wait(visitors)
        await until(lambda: not [t for t in asyncio.all_tasks() if "_read_ahead" in repr(t)])


async def test_a_handler_after_the_departure_has_linger_as_well() -> None:
    """One that has been overtaken by it may end, and so may the next one."""
    ws, seen = endpoint(linger=0.05, connect_timeout=60), list[str]()

    @ws.connect
    async def first(conn: Connection) -> None:
        seen.append("first")
        await until(lambda: conn.closed)
        await conn.send("late")  # Nobody reads it.

    @ws.connect
    async def second(conn: Connection) -> None:
        seen.append("second")
        await asyncio.Event().wait()

    async with simulated(ws._app) as server:
        visitor = asyncio.create_task(abandoned(f"{server.url}/ws"))
        await until(lambda: seen)
        visitor.cancel()
        await until(lambda: not ws._hub.state.serving)
    assert seen == ["first", "second"]


async def test_a_client_that_leaves_during_a_slow_accept_is_not_closed_once_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Falcon's socket knows that it has gone."""
    ws, is_waiting, may_go_on = endpoint(), asyncio.Event(), asyncio.Event()

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await asyncio.sleep(0)  # reads ahead

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        async def slowly(event: Any) -> None:
            await send(event)
            if event["type"] == "websocket.accept":
                is_waiting.set()
                await may_go_on.wait()

        await ws._app(scope, receive, slowly if scope["type"] == "websocket" else send)  # type: ignore[misc]  # Falcon's types differ

    async with simulated(slow) as server:
        async with connect(f"{server.url}/ws") as client:
            await is_waiting.wait()
            client.cut()
            (session,) = ws._hub.state.serving.values()
            await until(lambda: session.outgoing.closed)
            may_go_on.set()
        await until(lambda: not ws._hub.state.serving)
    assert "ERROR" not in caplog.text


# The status of a refusal


async def status(url: str, **options: Any) -> tuple[int, Any, Any]:
    """The status with which a handshake is refused, its headers, and the JSON of its body."""
    with pytest.raises(websockets.exceptions.InvalidStatus) as caught:
        async with connect(url, **options):
            pass
    response = caught.value.response
    body = bytes(response.body or b"")
    is_json = response.headers.get("Content-Type") == "application/json"
    return response.status_code, response.headers, json.loads(body) if is_json else body


async def abandoned(url: str) -> None:
    """Try to connect; whether that works does not matter."""
    with contextlib.suppress(OSError, websockets.exceptions.WebSocketException):
        async with connect(url):
            pass


def refusing(exception: Any, where: str = "connect") -> Pachinko:
    """An endpoint that refuses everybody with *exception*."""
    ws = endpoint()

    async def refuse(conn: Connection, token: str | None = None) -> None:
        raise exception

    getattr(ws, where)(refuse)
    return ws


@pytest.mark.parametrize("where", ["connect", "authenticate"])
@pytest.mark.parametrize(
    ("exception", "code", "headers", "body"),
    [
        (falcon.HTTPForbidden(description="no"), 403, {}, "no"),
        (falcon.HTTPUnauthorized(challenges=["Bearer"]), 401, {"WWW-Authenticate": "Bearer"}, None),
        (falcon.HTTPTooManyRequests(retry_after=7), 429, {"Retry-After": "7"}, None),
        (falcon.HTTPNotFound(headers=[("X-A", "1"), ("x-b", "2")]), 404, {"X-A": "1"}, None),
        # As over HTTP, Falcon takes what is no text, too.
        (falcon.HTTPError(429, headers={"Retry-After": 60}), 429, {"Retry-After": "60"}, None),
        (falcon.HTTPStatus(399, [("X-A", 1.5)]), 399, {"X-A": "1.5"}, None),  # type: ignore[list-item]  # that is the test
        (ExceptionGroup("", [falcon.HTTPStatus(399, {"X-A": "1"})]), 399, {"X-A": "1"}, None),
        (falcon.HTTPError(418, title="teapot", headers={"Content-Type": "x/y"}), 418, {}, None),
        (falcon.HTTPError("599 Odd"), 599, {}, None),
        (falcon.HTTPStatus(399, {"Location": "/login"}), 399, {"Location": "/login"}, None),
        (falcon.HTTPStatus(451, text="not here"), 451, {}, None),
        # What no server would send as the answer to a handshake is Falcon's refusal.
        (falcon.HTTPStatus(200, text="fine"), 403, {}, None),
        (falcon.HTTPError("748 Confounded by Ponies"), 403, {}, None),
    ],
)
async def test_an_http_error_has_its_status(
    exception: Any, code: int, headers: Any, body: Any, where: str
) -> None:
    """Its headers and its body as well, where the server can send them."""
    async with simulated(refusing(exception, where)._app) as server:
        got, sent, payload = await status(f"{server.url}/ws")
        assert got == code
        assert {name: sent[name] for name in headers} == headers
        if body is not None:
            assert payload["description"] == body
        if isinstance(exception, falcon.HTTPStatus) and code == 451:
            assert payload == b"not here"


async def test_a_header_that_is_none_is_left_out() -> None:
    """A line break in one would begin another."""
    bad = {"X-Bad": "a\r\nSet-Cookie: x=1", "X-Odd": "\u20ac", "a b": "c", "X-Good": "yes"}
    async with simulated(refusing(falcon.HTTPForbidden(headers=bad))._app) as server:
        code, headers, _ = await status(f"{server.url}/ws")
        assert code == 403 and headers["X-Good"] == "yes"
        assert not {"x-bad", "set-cookie", "x-odd", "a b"} & {name.lower() for name in headers}


async def test_without_the_extension_every_refusal_is_403() -> None:
    """The ASGI server then knows no other answer."""
    ws = refusing(falcon.HTTPTooManyRequests())

    async def without_extension(scope: Any, receive: Any, send: Any) -> None:
        await ws._app({**scope, "extensions": None}, receive, send)

    async with simulated(without_extension) as server:
        assert (await status(f"{server.url}/ws"))[0] == 403


@pytest.mark.parametrize(
    ("how", "code"), [("raise", 404), ("close", 410), ("other", 403), ("accept", None)]
)
async def test_an_error_handler_of_the_app_is_asked_first(how: str, code: int | None) -> None:
    """What it raises, or closes with, counts; also for the origin."""
    ws = refusing(falcon.HTTPForbidden())

    async def handle(req: Any, resp: Any, ex: Any, params: Any, ws: Any = None) -> None:
        match how:
            case "raise":
                raise falcon.HTTPNotFound(description="there is none", headers={"X-Own": "1"})
            case "close":
                await ws.close(3410)
            case "other":
                await ws.close(4000)
            case "accept":
                await ws.accept()
                await ws.close(3404)

    ws._app.add_error_handler(falcon.HTTPForbidden, handle)
    async with simulated(ws._app) as server:
        for options in ({}, {"origin": "https://evil.example"}):
            if code is None:
                async with connect(f"{server.url}/ws", **options) as client:
                    assert (await client.closed())[0] == 3404
                continue
            got, headers, body = await status(f"{server.url}/ws", **options)
            assert got == code
            if how == "raise":
                assert headers["X-Own"] == "1" and body["description"] == "there is none"


async def test_origin_and_drain_have_a_status() -> None:
    """403, and 503 with a time to come back after."""
    ws = endpoint()
    async with simulated(ws._app) as server:
        code, _, body = await status(f"{server.url}/ws", origin="https://evil.example")
        assert (code, body["description"]) == (403, "pages of this origin may not connect")
        await ws._hub.drain(0)
        code, headers, body = await status(f"{server.url}/ws")
        assert (code, headers["Retry-After"]) == (503, "5")
        assert body["description"] == "the server restarts"


# Headers and subprotocols


async def test_headers_go_with_the_answer() -> None:
    """Also with a refusal, whose own headers replace those of the same name."""
    ws = endpoint()

    @ws.connect
    async def arrive(conn: Connection) -> None:
        conn.add_header("Set-Cookie", "a=1; HttpOnly")
        conn.add_header("set-cookie", "b=2")
        conn.add_header("X-Room", "lobby")
        assert [name for name, _ in conn.headers] == ["Set-Cookie", "set-cookie", "X-Room"]
        if conn.req.params:
            raise falcon.HTTPForbidden(headers={"x-room": "none"})

    @ws.on("late")
    async def late(conn: Connection) -> None:
        conn.add_header("X-Late", "1")

    async with simulated(ws._app) as server:
        async with connect(f"{server.url}/ws") as client:
            assert client.socket.response is not None
            headers = client.socket.response.headers
            assert headers.get_all("Set-Cookie") == ["a=1; HttpOnly", "b=2"]
            assert headers["X-Room"] == "lobby"
            assert (await client.ask("late"))["payload"]["code"] == "internal_error"
        _, headers, _ = await status(f"{server.url}/ws?refuse=1")
        assert headers.get_all("Set-Cookie") == ["a=1; HttpOnly", "b=2"]
        assert headers.get_all("X-Room") == ["none"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-A", "a\r\nb"), ("X-A", "a\nb"), ("X-A", "a\0"), ("X-A", "\u20ac"), ("", "a"),
        ("X A", "a"), ("X-A:", "a"), ("X-\xe4", "a"), ("X-A", 5), (b"X-A", "a"), ("X-A", None),
        ("Sec-WebSocket-Protocol", "a"), ("sec-websocket-accept", "a"), ("Connection", "close"),
        ("Upgrade", "h2c"), ("Content-Length", "0"), ("Transfer-Encoding", "chunked"),
    ],
)  # fmt: skip
async def test_what_is_no_header_is_refused(name: Any, value: Any) -> None:
    """And what the server writes by itself."""
    ws, seen = endpoint(), list[str]()

    @ws.connect
    async def arrive(conn: Connection) -> None:
        with pytest.raises(ValueError, match=r"write conn\.add_header\(name, value\)") as caught:
            conn.add_header(name, value)
        seen.append(str(caught.value))

    async with simulated(ws._app) as server, connect(f"{server.url}/ws"):
        assert len(seen) == 1 and repr(name) in seen[0]


async def test_a_header_comes_before_the_accept() -> None:
    """A client that authenticates by its first message has been accepted."""
    door, texts = Door(), list[str]()

    @door.ws.connect
    async def late(conn: Connection) -> None:
        with pytest.raises(PachinkoError) as caught:
            conn.add_header("X-A", "1")
        texts.append(str(caught.value))

    async with simulated(door.ws._app) as server, door.visit(server.url) as client:
        await authenticate(client)
        assert (await client.receive())["type"] == "welcome"
    assert texts[0].startswith("conn.add_header comes before the answer to the handshake")


class Granian:
    """As granian's socket: a bound method of a class of that module."""

    def __init__(self, send: Any) -> None:
        self.send_event = send

    async def send(self, event: Any) -> None:
        await self.send_event({k: v for k, v in event.items() if k != "headers"})


Granian.__module__ = "granian._granian"


@pytest.mark.parametrize("server", ["granian", "daphne"])
async def test_a_server_without_headers_lets_the_client_in(
    server: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One line in the log says that they are lost."""
    pachinko._warn_of_headers.cache_clear()
    ws = endpoint()

    @ws.connect
    async def arrive(conn: Connection) -> None:
        conn.add_header("Set-Cookie", "a=1")

    async def served(scope: Any, receive: Any, send: Any) -> None:
        if server == "daphne":
            scope = {**scope, "asgi": {"version": "3.0"}}
        elif scope["type"] == "websocket":
            send = Granian(send).send
        await ws._app(scope, receive, send)

    async with simulated(served) as running:
        for _ in range(2):
            async with connect(f"{running.url}/ws") as client:
                assert client.socket.response is not None
                assert "Set-Cookie" not in client.socket.response.headers
    does = "drops" if server == "granian" else "refuses"
    assert caplog.text.count(f"this server {does} what conn.add_header adds") == 1


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (["pachinko.1"], "pachinko.1"),
        (["pachinko.1", "v1"], "v1"),
        (["bearer", "ann", "pachinko.1"], "pachinko.1"),
        (["bearer", "ann"], "bearer"),
        (["pachinko.2", "bearer", "pachinko.1"], "bearer"),
        (["other", "bearer", "ann"], "bearer"),
    ],
)
async def test_the_subprotocol_that_was_chosen(offered: Any, chosen: str) -> None:
    """The app's own first, then the wire format, then that of the token."""
    ws, seen = endpoint(subprotocols=["v1"]), list[Any]()

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        seen.append(conn.subprotocol)
        return "ann"

    async with (
        simulated(ws._app) as server,
        connect(f"{server.url}/ws", subprotocols=offered) as client,
    ):
        assert client.socket.subprotocol == chosen
        (conn,) = ws._hub.connections
        assert seen == [chosen] == [conn.subprotocol]


async def test_no_subprotocol_is_none() -> None:
    """Whether none was offered, none fits, or a middleware has answered the handshake."""
    ws = endpoint(subprotocols=["v1"])

    class Accepting:
        async def process_request_ws(self, req: Any, ws: Any) -> None:
            if req.params:
                await ws.accept("theirs")

    ws._app.add_middleware(Accepting())

    @ws.on("which")
    async def which(conn: Connection) -> str | None:
        return conn.subprotocol

    async with simulated(ws._app) as server:
        for offered, query in ((None, ""), (["v2"], ""), (["v1", "theirs"], "?accept=1")):
            async with connect(f"{server.url}/ws{query}", subprotocols=offered) as client:
                assert "payload" not in await client.ask("which")


# Guests


def inn() -> tuple[Pachinko, list[Any]]:
    """An endpoint that lets guests in."""
    ws, seen = endpoint(), list[Any]()

    @ws.authenticate(optional=True)
    async def who(conn: Connection, token: str | None) -> str | None:
        if token == "http":
            raise falcon.HTTPTooManyRequests
        if token == "bug":
            raise KeyError
        return USERS.get(token or "")

    @ws.connect
    async def arrive(conn: Connection) -> None:
        seen.append(conn.user)

    @ws.on("whoami")
    async def whoami(conn: Connection) -> str | None:
        return conn.user

    return ws, seen


async def test_a_guest_is_let_in_at_once_and_may_log_in_later() -> None:
    """`send_to_user` and presence reach it before the reply, and it stays who it is."""
    ws, seen = inn()
    hub = ws._hub
    async with simulated(ws._app) as server, connect(f"{server.url}/ws") as client:
        assert "payload" not in await client.ask("whoami")
        assert await hub.presence(user="ann") == []
        await authenticate(client, "bug", id=2)
        assert (await client.receive())["payload"]["code"] == "internal_error"
        assert "payload" not in await client.ask("whoami")
        await authenticate(client, "t-ann", id=3)
        assert await client.receive() == {"type": "authenticate.reply", "id": 3}
        await hub.send_to_user("ann", "mail")
        assert (await client.receive())["type"] == "mail"
        assert [(each.user) for each in await hub.presence(user="ann")] == ["ann"]
        assert (await client.ask("whoami"))["payload"] == "ann"
        await authenticate(client, "t-ann", id=4)
        assert (await client.receive())["id"] == 4
        await authenticate(client, "t-bob", id=5)
        assert await client.closed() == (3401, "authentication failed")
        await until(lambda: not hub.state.serving)
        assert not hub.state.registry.users
    assert seen == [None]


@pytest.mark.parametrize(("token", "code"), [("bad", 3401), ("http", 3429)])
async def test_a_guest_with_a_bad_token_is_refused(token: str, code: int) -> None:
    """In the handshake, and in a later message."""
    ws, seen = inn()
    async with simulated(ws._app) as server:
        if token == "bad":
            async with connect(f"{server.url}/ws", **bearer(token)) as client:
                assert (await client.closed())[0] == code
        async with connect(f"{server.url}/ws") as client:
            await authenticate(client, token)
            assert (await client.closed())[0] == code
        async with connect(f"{server.url}/ws", **bearer("t-bob")) as client:
            assert (await client.ask("whoami"))["payload"] == "bob"
    assert seen == [None, "bob"]


async def test_a_guest_whom_a_connect_handler_has_named_stays_that() -> None:
    """Nobody becomes somebody else."""
    ws, _ = inn()

    @ws.connect
    async def name(conn: Connection) -> None:
        conn.user = "guest 7"

    async with simulated(ws._app) as server, connect(f"{server.url}/ws") as client:
        assert (await client.ask("whoami"))["payload"] == "guest 7"
        await authenticate(client, "t-ann")
        assert (await client.closed())[0] == 3401


@pytest.mark.parametrize("write", ["5", "None, optional='x'", "who, optional=True"])
def test_optional_is_true_or_false(write: str) -> None:
    """Anything else is refused with the right form."""

    async def who(conn: Connection, token: str | None) -> str | None: ...

    ws = endpoint()
    with pytest.raises(PachinkoError, match=r"@ws\.authenticate"):
        eval(f"ws.authenticate({write})", {"ws": ws, "who": who})
    assert ws.authenticate(optional=False)(who) is who
    assert not ws._routes.takes_guests


# How many, and who


async def test_the_count_has_handshakes_in_it() -> None:
    """So that 60 that come at once do not get in at a limit of 10."""
    ws = endpoint()

    @ws.connect
    async def arrive(conn: Connection) -> None:
        if ws._hub.count > 10:
            raise falcon.HTTPServiceUnavailable
        await turns()

    async def visit(url: str, is_over: asyncio.Event) -> bool:
        try:
            async with connect(url):
                await is_over.wait()
                return True
        except websockets.exceptions.InvalidStatus:
            return False

    is_over = asyncio.Event()
    async with simulated(ws._app) as server:
        tasks = [asyncio.create_task(visit(f"{server.url}/ws", is_over)) for _ in range(60)]
        await until(lambda: len(ws._hub.connections) == 10)
        await until(lambda: ws._hub.count == 10)
        is_over.set()
        assert sum(await asyncio.gather(*tasks)) == 10
        await until(lambda: ws._hub.count == 0)


async def test_presence_of_a_user() -> None:
    """All of a user's connections; one that has ended is not among them."""
    ws, left = endpoint(), list[int]()

    @ws.connect
    async def arrive(conn: Connection) -> None:
        conn.user = conn.req.params["user"]

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        assert conn.user is not None
        left.append(len(await ws._hub.presence(user=conn.user)))

    async with simulated(ws._app) as server:
        url = f"{server.url}/ws?user="
        async with connect(f"{url}ann") as one, connect(f"{url}ann"), connect(f"{url}bob"):
            await until(lambda: len(ws._hub.connections) == 3)
            found = await ws._hub.presence(user="ann")
            assert {each.user for each in found} == {"ann"} and len(found) == 2
            assert await ws._hub.presence(user="eve") == []
            await one.close()
            await until(lambda: left)
        await until(lambda: not ws._hub.state.serving)
    assert left[0] == 1 and sorted(left) == [0, 0, 1]


@pytest.mark.parametrize("write", ["", "'g', user='u'", "5", "user=5", "b'g'"])
async def test_presence_takes_a_group_or_a_user(write: str) -> None:
    """One of both, by a text."""
    with pytest.raises(TypeError, match=r"is named by a str, got|not both"):
        await eval(f"hub.presence({write})", {"hub": Hub()})


@pytest.mark.parametrize(
    "comes_as", [{}, {"Authorization": "Bearer ada"}], ids=["a guest", "somebody"]
)
async def test_a_later_authenticate_says_where_to_go_on(comes_as: dict[str, str]) -> None:
    """A client that is in already sends ``resume`` inside it as well, and misses nothing."""
    hub = Hub()
    hub.keep("room")
    ws = Pachinko(falcon.asgi.App(), "/ws", hub=hub)

    @ws.authenticate(optional=True)
    async def who(conn: Connection, token: str | None) -> str | None:
        return token

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.join("room")

    async with pachinko.simulate(ws._app) as sim:
        await hub.send("room", "said", 1)
        at = await hub.position("room")
        await hub.send("room", "said", 2)
        client = await sim.connect("/ws", headers=comes_as, query={"resume": "message"})
        resume = {"groups": {"room": at}}
        await client.send_text(
            json.dumps({"type": "authenticate", "payload": {"token": "ada", "resume": resume}})
        )
        await sim.settle()
        assert [each.payload for each in client.received if each.type == "said"] == [2]
        assert client.received[-1].type == "resume"
