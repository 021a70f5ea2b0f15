"""How a client gets in: authentication, connect handlers, the answer to the handshake."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
from typing import Any

import falcon
import falcon.asgi
import falcon.testing
import pytest
import websockets.exceptions
from support import PATIENCE, Client, Stalled, connect, new_app, serving, session_of, until
from test_handshake import endpoint

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
    async with serving(door.ws._app) as server:
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

    async with serving(ws._app) as server:
        options = {"additional_headers": {"Cookie": "session=ann"}}
        async with connect(f"{server.url}/ws", **options) as client:
            assert (await client.receive())["payload"] == "ann"


@pytest.mark.parametrize("options", [bearer("bad"), {"subprotocols": ["bearer", "bad"]}])
async def test_a_refused_token_closes_with_3401(options: Any) -> None:
    """After an accept, so that a browser can tell; no connect or disconnect handler runs."""
    door = Door()
    async with serving(door.ws._app) as server:
        async with door.visit(server.url, **options) as client:
            assert await client.closed() == (3401, "authentication failed")
        await until(lambda: not door.ws._hub.state.serving)
    assert door.seen == ["bad"]
    assert not door.ws._hub.state.registry.connections and not door.ws._hub.state.registry.users


async def test_the_first_message_may_bring_the_token() -> None:
    """It is accepted first, asked again, and told; then connect handlers run."""
    door = Door()
    async with serving(door.ws._app) as server:
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

    async with serving(door.ws._app) as server, door.visit(server.url) as client:
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
    async with serving(door.ws._app) as server, door.visit(server.url) as client:
        for number in range(9):
            await client.send("whoami", id=number)
        assert await client.closed() == (3401, "authenticate first")
    assert door.seen == [None]


@pytest.mark.parametrize("data", ["x" * 600, b"x" * 600])
async def test_what_is_held_is_bounded_in_bytes(data: Any) -> None:
    """All together are at most *max_size* bytes."""
    door = Door(max_size=1000)
    async with serving(door.ws._app) as server, door.visit(server.url) as client:
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

    async with serving(door.ws._app) as server, door.visit(server.url) as client:
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
    async with serving(door.ws._app) as server, door.visit(server.url) as client:
        await client.send("authenticate", payload, id=1)
        assert await client.closed() == (3401, "authentication failed")
    assert door.seen in ([None], [None, "bad"])


async def test_the_client_has_to_authenticate_in_time() -> None:
    """Else it is closed with 3401."""
    door = Door(auth_timeout=0.05)
    async with serving(door.ws._app) as server, door.visit(server.url) as client:
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
    async with serving(door.ws._app) as server:
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

    async with serving(ws._app) as server:
        async with connect(f"{server.url}/ws") as client:
            await authenticate(client)
            await until(lambda: next(iter(ws._hub.state.serving.values())).incoming._ahead)
            client.cut()
        await until(lambda: not ws._hub.state.serving)
    assert seen == ["cancelled"]


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

    async with serving(door.ws._app) as server:
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
async def test_a_connect_handler_may_refuse_after_the_first_message(
    exception: BaseException, closed_with: int
) -> None:
    """An HTTP error closes with 3000 and its status; what was sent stays untold."""
    door = Door()

    @door.ws.connect
    async def check(conn: Connection) -> None:
        await asyncio.sleep(0.01)  # reads ahead meanwhile
        raise exception

    async with serving(door.ws._app) as server:
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
    async with serving(ws._app) as server:
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
    async with serving(ws._app) as server:
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

    async with serving(ws._app) as server:
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
    async with serving(ws._app) as server:
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

    async with serving(ws._app) as server:
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

    async with serving(ws._app) as server:
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
        await asyncio.sleep(0.01)
        seen.append("noted")
        return None

    async with serving(ws._app) as server, connect(f"{server.url}/ws") as client:
        assert await client.closed() == (4001, "banned")
    assert seen == ["noted"]


async def fail() -> None:
    raise ValueError


async def leave_a_cancellation() -> None:
    """On Python 3.11 and 3.12 a caught failure leaves the task's count of cancellations at one."""
    with contextlib.suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())


@pytest.mark.parametrize("ends", ["ann", "hangs", "drained"])
async def test_a_caught_failure_of_a_task_group_is_no_cancellation(ends: str) -> None:
    """It hides neither the user, nor the end of the time, nor a close."""
    ws = endpoint(auth_timeout=0.05 if ends == "hangs" else PATIENCE)
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

    async with serving(ws._app) as server, connect(f"{server.url}/ws") as client:
        await authenticate(client)
        if ends == "ann":
            assert (await client.ask("whoami"))["payload"] == "ann"
            return
        await asyncio.wait_for(asked.wait(), PATIENCE)
        if ends == "drained":
            await ws._hub.drain(0)
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

    async with serving(ws._app) as server:
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
                await asyncio.sleep(0.1)

        await ws._app(scope, receive, slowly if scope["type"] == "websocket" else send)  # type: ignore[misc]  # Falcon's types differ

    async with serving(slow) as server:
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

    async with serving(ws._app) as server, connect(f"{server.url}/ws") as client:
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
    async with serving(door_less._app) as server:

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
        serving(ws._app) as server,
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

    async with serving(app) as server, connect(server.url + "/ws") as client:
        await client.send("authenticate", {"token": "ada"})
        assert (await client.ask("who"))["payload"] == "ada"
