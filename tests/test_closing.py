"""Closing clients by connection and by user, also those that are just connecting."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import struct
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from support import PATIENCE, Client, Stalled, connect, new_app, serving, simulated, turns, until

import pachinko
from pachinko import Close, Connection, Hub, Pachinko, PachinkoError

USERS = {"t-ada": "ada", "t-bob": "bob"}
OUT = (4401, "signed out")


class House:
    """An endpoint whose steps wait at gates, and what has happened there."""

    def __init__(self, *gates: str, **options: Any) -> None:
        self.hub = Hub()
        self.app = new_app()
        self.ws = Pachinko(self.app, "/ws", hub=self.hub, **options)
        self.seen: list[str] = []
        self.gates = {name: asyncio.Event() for name in gates}
        self.ws.disconnect(self.leave)

    async def wait(self, gate: str) -> None:
        self.seen.append(gate)
        if gate in self.gates:  # `wait_for` of Python 3.11 may swallow a cancellation.
            async with asyncio.timeout(PATIENCE):
                await self.gates[gate].wait()

    async def reached(self, gate: str, times: int = 1) -> None:
        await until(lambda: self.seen.count(gate) == times)

    async def leave(self, conn: Connection) -> None:
        self.seen.append(f"disconnect {conn.user} {conn.close_code}")

    def asks(self, optional: bool = False) -> None:
        """Register an `authenticate`, which has checked the token before it waits."""

        @self.ws.authenticate(optional=optional)
        async def who(conn: Connection, token: str | None) -> str | None:
            cookies = conn.req.get_cookie_values("session") or [None]
            user = USERS.get(token or cookies[0] or "")
            if user is not None:
                await self.wait("authenticate")
            return user

    def admits(self) -> None:
        """Register a connect handler that has an end."""

        @self.ws.connect
        async def arrive(conn: Connection) -> AsyncIterator[None]:
            self.seen.append("arrive")
            yield
            self.seen.append("end")

    def tabs(self) -> None:
        """Register a connect handler that takes the user from the query string."""

        @self.ws.connect
        async def name(conn: Connection) -> None:
            conn.user = conn.req.get_param("user")
            for group in conn.req.get_param_as_list("group") or ():
                await conn.join(group)

        @self.ws.on("where")
        async def where(conn: Connection) -> str:
            return conn.id

    async def empty(self) -> None:
        """Wait for the end of all connections; nothing is left of them."""
        await until(lambda: not self.hub.state.serving)
        registry = self.hub.state.registry
        assert not (registry.arriving or registry.users or registry.connections or registry.groups)


async def visit(url: str, token: str | None = None, **options: Any) -> Any:
    """Connect, perhaps authenticate by a message; return the types received, and the close."""
    async with connect(url, **options) as client:
        if token is not None:
            await client.send("authenticate", {"token": token}, id=1)
        return await ending(client)


async def ending(client: Client) -> tuple[list[str], tuple[int | None, str | None]]:
    types: list[str] = []
    with contextlib.suppress(Exception):  # the close, which is asked for below
        while True:
            types.append((await client.receive())["type"])
    return types, await client.closed()


# Those that are in


@pytest.mark.parametrize("by", ["id", "connection"])
async def test_one_connection_is_closed(by: str) -> None:
    """Behind what was sent before, with its code and reason; others stay."""
    house = House()
    house.tabs()
    async with simulated(house.app) as server:
        url = f"{server.url}/ws?user=ada"
        async with connect(url) as one, connect(url) as other:
            id = (await one.ask("where"))["payload"]
            conn = next(each for each in house.hub.connections if each.id == id)
            for n in range(3):
                await house.hub.send_to(id, f"n{n}")
            assert await house.hub.close(id if by == "id" else conn, 4000, "bye") is None
            assert await ending(one) == (["n0", "n1", "n2"], (4000, "bye"))
            assert (await other.ask("where"))["type"] == "where.reply"
            await until(lambda: house.hub.count == 1)
            await house.hub.close(id if by == "id" else conn)  # It has ended.
            assert (await other.ask("where"))["type"] == "where.reply"
        await house.empty()
    assert house.seen[0] == "disconnect ada 4000" and len(house.seen) == 2


async def test_all_connections_of_a_user_are_closed() -> None:
    """Whatever their groups; other users and guests stay; a second call finds nobody."""
    house = House()
    house.tabs()
    async with simulated(house.app) as server, contextlib.AsyncExitStack() as stack:
        ada, others = [
            [await stack.enter_async_context(connect(server.url + "/ws" + each)) for each in some]
            for some in (("?user=ada", "?user=ada&group=x"), ("?user=bob", "", "?user=Ada&group=x"))
        ]
        await house.hub.send_to_user("ada", "last")
        await house.hub.close_user("ada", *OUT)
        for client in ada:
            assert await ending(client) == (["last"], OUT)
        await until(lambda: house.hub.count == 3)
        assert await house.hub.presence(user="ada") == []
        await house.hub.close_user("ada", *OUT)
        for client in others:
            assert (await client.ask("where"))["type"] == "where.reply"
        async with connect(server.url + "/ws?user=ada") as later:
            assert (await later.ask("where"))["type"] == "where.reply"
    await house.empty()
    assert sorted(house.seen)[:2] == ["disconnect Ada 1000", "disconnect None 1000"]
    assert house.seen.count("disconnect ada 4401") == 2


@pytest.mark.parametrize("name", ["", "*", "a.b >", "ada\n", "\ud83d", "ü" * 10_000, "%41", "0"])
async def test_any_text_names_a_user(name: str) -> None:
    """Names are data."""
    house = House()

    @house.ws.connect
    async def arrive(conn: Connection) -> None:
        conn.user = conn.req.get_param("other") or name

    async with (
        simulated(house.app) as server,
        connect(f"{server.url}/ws") as one,
        connect(f"{server.url}/ws?other=A") as other,
    ):
        assert len(await house.hub.presence(user=name)) == 1
        await house.hub.close_user(name, 4000)
        assert await one.closed() == (4000, "")
        await house.hub.close_user("A")
        assert (await other.closed())[0] == 1000


async def test_what_the_defaults_are() -> None:
    """A normal closure without a reason; None is no reason; a long one is cut."""
    house = House()
    house.tabs()
    async with simulated(house.app) as server:
        for args, seen in (
            ((), (1000, "Normal Closure")),  # Falcon's
            ((4000, None), (4000, "")),
            ((4000, "\ud83d" + "x" * 200), (4000, "\ufffd" + "x" * 120)),
        ):
            async with connect(server.url + "/ws?user=ada") as client:
                await house.hub.close_user("ada", *args)
                assert await client.closed() == seen
            await until(lambda: not house.hub.count)
            async with connect(server.url + "/ws") as client:
                await until(lambda: house.hub.connections)
                (conn,) = house.hub.connections
                await house.hub.close(conn, *args)
                assert await client.closed() == seen
            await until(lambda: not house.hub.count)


@pytest.mark.parametrize("wrong", [999, 1004, 1005, 1006, 1015, 2999, 5000, 0, -1])
async def test_a_wrong_code_is_refused(wrong: int) -> None:
    """As `Close` refuses it, whether anybody is there or not; nobody is closed."""
    house = House()
    house.tabs()
    async with simulated(house.app) as server, connect(server.url + "/ws?user=ada") as client:
        id = (await client.ask("where"))["payload"]
        for call in (house.hub.close, house.hub.close_user):
            for name in (id, "ada", "nobody"):
                with pytest.raises(ValueError, match="is no close code to send"):
                    await call(name, wrong)
        assert (await client.ask("where"))["payload"] == id


async def test_wrong_types_are_type_errors() -> None:
    """Users and ids are `str`, codes `int`, reasons `str`."""
    hub: Any = Hub()
    for call in (
        lambda: hub.close(None),
        lambda: hub.close(5),
        lambda: hub.close(b"id"),
        lambda: hub.close_user(None),
        lambda: hub.close_user(["ada"]),
        lambda: hub.close_user(b"ada"),
        lambda: hub.close("id", "4000"),
        lambda: hub.close("id", 4000, 5),
        lambda: hub.close_user("ada", "bye"),
        lambda: hub.close_user("ada", 4000, b"bye"),
        lambda: hub.close_user("ada", None),
    ):
        with pytest.raises(TypeError):
            await call()


async def test_a_connection_of_another_hub_is_refused() -> None:
    """Open or ended; by its id it is nobody here."""
    house, other = House(), Hub()
    house.tabs()
    async with simulated(house.app) as server, connect(server.url + "/ws") as client:
        await client.ask("where")
        (conn,) = house.hub.connections
        with pytest.raises(PachinkoError, match=r"another hub; use conn\.hub"):
            await other.close(conn)
        await other.close(conn.id)
        await client.ask("where")
        await client.close()
        await house.empty()
        with pytest.raises(PachinkoError, match="another hub"):
            await other.close(conn)


async def test_before_an_app_runs_nobody_is_reached(caplog: pytest.LogCaptureFixture) -> None:
    """One line tells a script; a user who comes later is let in."""
    house = House()
    house.tabs()
    await house.hub.close_user("ada", 4000)
    await house.hub.close("some id", 4000)
    assert caplog.text.count("reaches nobody") == 1
    async with simulated(house.app) as server, connect(server.url + "/ws?user=ada") as client:
        assert (await client.ask("where"))["type"] == "where.reply"


@pytest.mark.parametrize("method", ["close", "close_user"])
async def test_a_thread_uses_call_threadsafe(method: str) -> None:
    """A direct call is told so, and the future tells what `Close` refuses."""
    house = House()
    house.tabs()
    async with simulated(house.app) as server, connect(server.url + "/ws?user=ada") as client:
        id = (await client.ask("where"))["payload"]
        call: Any = getattr(house.hub, method)
        name = id if method == "close" else "ada"
        with pytest.raises(PachinkoError, match=rf"hub\.call_threadsafe\(hub\.{method}, "):
            await asyncio.to_thread(asyncio.run, call(name))
        refused: list[BaseException | None] = []

        def work() -> None:
            refused.append(house.hub.call_threadsafe(call, name, 5).exception(PATIENCE))
            house.hub.call_threadsafe(call, name, 4000, "from afar").result(PATIENCE)

        await asyncio.to_thread(work)
        assert await client.closed() == (4000, "from afar")
        assert isinstance(refused[0], ValueError)


async def test_a_handler_may_close_its_own_user() -> None:
    """What it has sent goes out; its reply comes too late; it runs to its end."""
    house = House()
    house.tabs()

    @house.ws.on("sign-out")
    async def sign_out(conn: Connection) -> str:
        await conn.send("done")
        await house.hub.close_user(conn.user_id, *OUT)
        assert conn.closed
        await asyncio.sleep(0)
        house.seen.append("handled")
        return "a reply"

    async with simulated(house.app) as server:
        url = server.url + "/ws?user=ada"
        async with connect(url) as client, connect(url) as tab:
            await client.send("sign-out", id=1)
            assert await ending(client) == (["done"], OUT)
            assert await ending(tab) == ([], OUT)
    await house.empty()
    assert sorted(house.seen) == ["disconnect ada 4401"] * 2 + ["handled"]


async def test_a_disconnect_handler_may_close_its_user() -> None:
    """With one tab of a user all others go."""
    house = House()
    house.tabs()

    @house.ws.disconnect
    async def leave_all(conn: Connection) -> None:
        await house.hub.close_user(conn.user_id, *OUT)
        await house.hub.close(conn, *OUT)

    async with simulated(house.app) as server:
        url = server.url + "/ws?user=ada"
        async with connect(url) as one, connect(url) as two, connect(url) as three:
            await until(lambda: len(house.hub.connections) == 3)
            await one.close()
            assert await two.closed() == await three.closed() == OUT
        await house.empty()
    assert sorted(house.seen) == ["disconnect ada 1000"] + ["disconnect ada 4401"] * 2


async def test_an_accepted_handler_may_be_overtaken() -> None:
    """It has its linger, no message is handled, and disconnect handlers run."""
    house = House("accepted")
    house.tabs()

    @house.ws.accepted
    async def welcome(conn: Connection) -> None:
        await house.wait("accepted")
        house.seen.append("welcomed")

    async with serving(house.app) as server, connect(server.url + "/ws?user=ada") as client:
        await client.send("where", id=1)
        await house.reached("accepted")
        await house.hub.close_user("ada", *OUT)
        assert await ending(client) == ([], OUT)
        house.gates["accepted"].set()
        await house.empty()
    assert house.seen == ["accepted", "welcomed", "disconnect ada 4401"]


async def test_a_client_that_does_not_read_is_closed_in_time() -> None:
    """The rest waits for nobody; what it gets is in order, and ends with the close frame."""
    house = House(send_timeout=0.1)
    house.tabs()
    async with serving(house.app) as server, connect(server.url + "/ws?user=ada") as tab:
        async with Stalled(server.url + "/ws") as client:
            await until(lambda: len(house.hub.connections) == 2)
            (conn,) = (each for each in house.hub.connections if each.user is None)
            await house.hub.send_to(conn, "big", "x" * 10_000_000)
            await house.hub.close(conn, *OUT)
            await house.hub.close_user("ada", *OUT)
            assert await tab.closed() == OUT
            await house.empty()
        async with Stalled(server.url + "/ws") as client:
            await until(lambda: house.hub.connections)
            await house.hub.broadcast("small")
            await house.hub.close(next(iter(house.hub.connections)), 4401, "")
            assert (await client.read_all()).endswith(struct.pack(">BBH", 0x88, 2, 4401))


async def test_many_connections_of_a_user_do_not_hold_up_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some are closed in each turn, and all of them also if the caller is cancelled."""
    monkeypatch.setattr(pachinko, "_TURN", 3)
    house = House()
    house.tabs()
    async with simulated(house.app) as server, contextlib.AsyncExitStack() as stack:
        url = server.url + "/ws?user=ada"
        clients = [await stack.enter_async_context(connect(url)) for _ in range(11)]
        conns = house.hub.connections
        closing = asyncio.create_task(house.hub.close_user("ada", *OUT))
        await asyncio.sleep(0)  # one turn of the loop
        assert 0 < sum(conn.closed for conn in conns) < len(conns)
        closing.cancel()
        for client in clients:
            assert await client.closed() == OUT
        assert closing.cancelled()
        await house.empty()


# Those that are connecting

WAYS: dict[str, dict[str, Any]] = {
    "header": {"additional_headers": {"Authorization": "Bearer t-ada"}},
    "subprotocol": {"subprotocols": ["bearer", "t-ada"]},
    "cookie": {"additional_headers": {"Cookie": "session=t-ada"}},
    "first message": {"token": "t-ada"},
}


@pytest.mark.parametrize(
    ("way", "optional"),
    [*((way, False) for way in WAYS), *((way, True) for way in WAYS if way != "first message")],
)
async def test_a_user_who_is_being_authenticated_does_not_slip_through(
    way: str, optional: bool
) -> None:
    """The token has been checked already; somebody else is let in."""
    house = House("authenticate")
    house.asks(optional)
    house.admits()
    async with serving(house.app) as server:
        url = f"{server.url}/ws"
        visitor = asyncio.create_task(visit(url, **WAYS[way]))
        bob = asyncio.create_task(visit(url, additional_headers={"Authorization": "Bearer t-bob"}))
        await house.reached("authenticate", 2)
        await house.hub.close_user("eve", 4000)
        await house.hub.close_user("ada", *OUT)
        await house.hub.close_user("ada", 4999, "once more")
        house.gates["authenticate"].set()
        types, close = await visitor
        assert close == OUT and types == ["authenticate.reply"] * (way == "first message")
        await house.reached("arrive")
        await until(lambda: house.hub.connections)
        assert await house.hub.presence(user="ada") == []
        await house.hub.close_user("bob", 4002)
        assert (await bob)[1] == (4002, "")
        await house.empty()
    assert house.seen == ["authenticate"] * 2 + ["arrive", "disconnect bob 4002", "end"]


@pytest.mark.parametrize("way", WAYS)
async def test_a_user_who_comes_later_is_let_in(way: str) -> None:
    """To refuse it is the application's business."""
    house = House()
    house.asks()
    async with simulated(house.app) as server:
        await house.hub.close_user("ada", *OUT)
        visitor = asyncio.create_task(visit(f"{server.url}/ws", **WAYS[way]))
        await until(lambda: house.hub.connections)
        await house.hub.close_user("ada", 4002)
        assert (await visitor)[1] == (4002, "")


async def test_a_client_that_waits_with_its_first_message_does_not_slip_through() -> None:
    """Its handshake has begun before."""
    house = House()
    house.asks()
    async with simulated(house.app) as server:
        async with connect(f"{server.url}/ws") as client:
            await house.hub.close_user("ada", *OUT)
            await client.send("authenticate", {"token": "t-ada"})
            assert await client.closed() == OUT
        await house.empty()
    assert house.seen == ["authenticate"]


def late(house: House) -> None:
    @house.ws.connect
    async def name(conn: Connection) -> None:
        await conn.send("hello")
        await house.wait("connect")
        conn.user = "ada"
        house.seen.append("named")


def changed(house: House) -> None:
    @house.ws.connect
    async def name(conn: Connection) -> None:
        await conn.send("hello")
        conn.user = "bob"
        await house.wait("connect")
        conn.user = None
        conn.user = "ada"
        house.seen.append("named")


def changed_back(house: House) -> None:
    @house.ws.connect
    async def name(conn: Connection) -> None:
        await conn.send("hello")
        conn.user = "ada"
        conn.user = "bob"
        await house.wait("connect")
        conn.user = "ada"
        house.seen.append("named")


def from_a_task(house: House) -> None:
    @house.ws.connect
    async def name(conn: Connection) -> None:
        async def work() -> None:
            conn.user = "ada"

        await conn.send("hello")
        await house.wait("connect")
        await asyncio.create_task(work())
        house.seen.append("named")


def known(house: House) -> None:
    @house.ws.connect
    async def name(conn: Connection) -> None:
        await conn.send("hello")
        conn.user = "ada"
        await house.wait("connect")
        house.seen.append("named")


def known_before(house: House) -> None:
    @house.ws.connect
    async def name(conn: Connection) -> None:
        await conn.send("hello")
        conn.user = "ada"

    @house.ws.connect
    async def load(conn: Connection) -> AsyncIterator[None]:
        await house.wait("connect")
        house.seen.append("named")
        yield


def authenticated(house: House) -> None:
    @house.ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        return "ada"

    @house.ws.connect
    async def load(conn: Connection) -> None:
        await conn.send("hello")
        await house.wait("connect")
        house.seen.append("named")


HANDLERS = [late, changed, changed_back, from_a_task, known, known_before, authenticated]


@pytest.mark.parametrize("prepare", HANDLERS)
async def test_a_connect_handler_does_not_let_a_closed_user_in(
    prepare: Callable[[House], None],
) -> None:
    """It is over where the user becomes known, as by `Close`: ends run, disconnect handlers not.

    What it has sent before arrives.
    """
    house = House("connect")
    house.admits()
    prepare(house)
    async with simulated(house.app) as server:
        visitor = asyncio.create_task(visit(f"{server.url}/ws"))
        await house.reached("connect")
        await house.hub.close_user("ada", *OUT)
        house.gates["connect"].set()
        assert await visitor == (["hello"], OUT)
        await house.empty()
    assert house.seen == ["arrive", "connect", "end"]


async def test_a_user_who_was_changed_before_the_call_is_not_closed() -> None:
    """Only who it is counts, and who it becomes."""
    house = House("connect")

    @house.ws.connect
    async def name(conn: Connection) -> None:
        conn.user = "ada"
        conn.user = "bob"
        await house.wait("connect")

    async with simulated(house.app) as server:
        visitor = asyncio.create_task(visit(f"{server.url}/ws"))
        await house.reached("connect")
        await house.hub.close_user("ada", *OUT)
        house.gates["connect"].set()
        await until(lambda: house.hub.connections)
        await house.hub.close_user("bob", 4002)
        assert (await visitor)[1] == (4002, "")
        await house.empty()


async def test_a_handler_that_swallows_the_close_lets_nobody_in() -> None:
    """The connection is closed all the same. As all have returned, disconnect handlers run."""
    house = House("connect")
    house.admits()

    @house.ws.connect
    async def name(conn: Connection) -> None:
        await house.wait("connect")
        with contextlib.suppress(Close):
            conn.user = "ada"
        assert conn.closed and conn.user is None

    async with simulated(house.app) as server:
        visitor = asyncio.create_task(visit(f"{server.url}/ws"))
        await house.reached("connect")
        await house.hub.close_user("ada", *OUT)
        house.gates["connect"].set()
        assert (await visitor)[1] == OUT
        await house.empty()
    assert house.seen == ["arrive", "connect", "disconnect None 4401", "end"]


@pytest.mark.parametrize("how", ["by itself", "in time", "swallowed"])
async def test_no_connect_handler_begins_after_the_close(how: str) -> None:
    """Not even if the one before has returned."""
    house = House("connect")
    house.admits()

    @house.ws.connect
    async def name(conn: Connection) -> None:
        if how != "swallowed":
            conn.user = "ada"
        if how == "by itself":
            await house.hub.close_user("ada", *OUT)
        else:
            await house.wait("connect")
            with contextlib.suppress(Close):
                conn.user = "ada"

    @house.ws.connect
    async def load(conn: Connection) -> None:
        house.seen.append("begins")

    async with simulated(house.app) as server:
        visitor = asyncio.create_task(visit(f"{server.url}/ws"))
        if how != "by itself":
            await house.reached("connect")
            if how == "in time":
                house.gates["connect"].set()  # It has what it waits for before it is cancelled.
            await house.hub.close_user("ada", *OUT)
            house.gates["connect"].set()
        assert (await visitor)[1] == OUT
        await house.empty()
    assert [each for each in house.seen if each != "connect"] == ["arrive", "end"]


async def test_the_end_of_a_connect_handler_is_not_waited_for() -> None:
    """A handler that waits is cancelled at once, not after its linger, and may clean up."""
    house = House(linger=60.0)

    @house.ws.connect
    async def load(conn: Connection) -> None:
        conn.user = "ada"
        try:
            house.seen.append("waits")
            await asyncio.Event().wait()
        finally:
            house.seen.append("cleans up")

    async with simulated(house.app) as server:
        visitor = asyncio.create_task(visit(f"{server.url}/ws"))
        await house.reached("waits")
        await house.hub.close_user("ada", *OUT)
        assert (await visitor)[1] == OUT
        await house.empty()
    assert house.seen == ["waits", "cleans up"]


async def test_a_member_that_is_connecting_is_closed_with_its_group() -> None:
    """`close_group` closes it as the other two calls do."""
    house = House(linger=60.0)
    house.admits()

    @house.ws.connect
    async def load(conn: Connection) -> None:
        await conn.join("room")
        await house.wait("joined")
        await asyncio.Event().wait()

    async with simulated(house.app) as server:
        visitor = asyncio.create_task(visit(f"{server.url}/ws"))
        await house.reached("joined")
        await house.hub.send("room", "last")
        await house.hub.close_group("room", *OUT)
        assert await visitor == (["last"], OUT)
        await house.empty()
    assert house.seen == ["arrive", "joined", "end"]


class Slow:
    """An ASGI app around another, whose accept takes its time."""

    def __init__(self, app: Any) -> None:
        self.app, self.asked, self.gate = app, asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def slowly(event: Any) -> None:
            if event["type"] == "websocket.accept":
                self.asked.set()
                await asyncio.wait_for(self.gate.wait(), PATIENCE)
            await send(event)

        await self.app(scope, receive, slowly if scope["type"] == "websocket" else send)


@pytest.mark.parametrize("by", ["id", "user"])
async def test_a_client_between_connect_handlers_and_accept_is_closed(by: str) -> None:
    """All connect handlers have returned, so disconnect handlers run; accepted ones do not."""
    house = House()
    house.admits()
    house.tabs()

    @house.ws.accepted
    async def welcome(conn: Connection) -> None:
        house.seen.append("welcome")

    slow = Slow(house.app)
    async with simulated(slow) as server:
        visitor = asyncio.create_task(visit(f"{server.url}/ws?user=ada"))
        await asyncio.wait_for(slow.asked.wait(), PATIENCE)
        ((conn, _),) = house.hub.state.registry.arriving.values()
        if by == "user":
            await house.hub.close_user("ada", *OUT)
        else:
            await house.hub.close(conn.id, *OUT)
        slow.gate.set()
        assert (await visitor)[1] == OUT
        await house.empty()
    assert house.seen == ["arrive", "disconnect ada 4401", "end"]


@pytest.mark.parametrize("step", ["authenticate", "first message", "connect"])
async def test_a_handshake_is_closed_by_its_id(step: str) -> None:
    """Before it has authenticated and after."""
    house, ids = House(linger=60.0), list[str]()

    @house.ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        ids.append(conn.id)
        if step == "first message":
            return None
        if step == "authenticate":
            await asyncio.Event().wait()
        return "ada"

    house.admits()

    @house.ws.connect
    async def load(conn: Connection) -> None:
        await asyncio.Event().wait()

    async with simulated(house.app) as server:
        visitor = asyncio.create_task(visit(f"{server.url}/ws"))
        await until(lambda: ids and (step != "connect" or house.seen))
        await house.hub.close(ids[0], *OUT)
        assert (await visitor)[1] == OUT
        await house.empty()
    assert house.seen == (["arrive", "end"] if step == "connect" else [])


async def test_a_handshake_may_close_itself() -> None:
    """`hub.close` in `authenticate` is `conn.close`, and the function runs to its end."""
    house = House()

    @house.ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        await house.hub.close(conn, *OUT)
        await asyncio.sleep(0)
        house.seen.append("done")
        return "ada"

    async with simulated(house.app) as server:
        assert (await visit(f"{server.url}/ws"))[1] == OUT
    assert house.seen == ["done"]


@pytest.mark.parametrize("step", ["authenticate", "before", "behind"])
async def test_a_handshake_that_closes_its_own_user_is_closed_too(step: str) -> None:
    """The call knows no exception; by `presence` the others are closed alone."""
    house = House()

    @house.ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        if step == "authenticate":
            await house.hub.close_user("ada", *OUT)
        return "ada" if step == "authenticate" else "nobody"

    @house.ws.connect
    async def arrive(conn: Connection) -> None:
        if step == "behind":
            conn.user = "ada"
        await house.hub.close_user("ada", *OUT)
        conn.user = "ada"

    async with simulated(house.app) as server:
        assert (await visit(f"{server.url}/ws"))[1] == OUT
        await house.empty()


async def test_a_guest_whose_login_is_being_checked_does_not_slip_through() -> None:
    """It is closed when the login is known; it leaves as the guest that it was."""
    house = House("authenticate")
    house.asks(optional=True)
    house.admits()
    async with simulated(house.app) as server:
        url = f"{server.url}/ws"
        async with connect(url) as client, connect(url) as bob:
            await client.send("authenticate", {"token": "t-ada"}, id=1)
            await bob.send("authenticate", {"token": "t-bob"}, id=1)
            await house.reached("authenticate", 2)
            await house.hub.close_user("ada", *OUT)
            house.gates["authenticate"].set()
            assert await ending(client) == ([], OUT)
            assert (await bob.receive())["type"] == "authenticate.reply"
            assert [each.user for each in await house.hub.presence(user="bob")] == ["bob"]
            assert not house.hub.state.registry.arriving
        await house.empty()
    assert "disconnect None 4401" in house.seen and house.seen.count("end") == 2


async def test_a_guest_who_was_there_before_may_log_in_later() -> None:
    """A call before its login has begun does not count, however old the connection is."""
    house = House()
    house.asks(optional=True)
    async with simulated(house.app) as server, connect(f"{server.url}/ws") as client:
        await until(lambda: house.hub.connections)
        await house.hub.close_user("ada", *OUT)
        answer = await client.ask("authenticate", {"token": "t-ada"})
        assert answer == {"type": "authenticate.reply", "id": 1}
        await house.hub.close_user("ada", *OUT)
        assert await client.closed() == OUT


@pytest.mark.parametrize("ends", ["bad", "bug", "gone"])
async def test_a_login_that_fails_leaves_nothing_behind(ends: str) -> None:
    """No entry stays, whatever the function does."""
    house = House("authenticate")

    @house.ws.authenticate(optional=True)
    async def who(conn: Connection, token: str | None) -> str | None:
        if token is not None:
            await house.wait("authenticate")
        if token == "bug":
            raise KeyError
        return None

    async with simulated(house.app) as server, connect(f"{server.url}/ws") as client:
        await client.send("authenticate", {"token": ends}, id=1)
        await house.reached("authenticate")
        assert len(house.hub.state.registry.arriving) == 1
        if ends == "gone":
            client.cut()
        house.gates["authenticate"].set()
        await until(lambda: not house.hub.state.registry.arriving)
        if ends == "bug":
            assert (await client.receive())["payload"]["code"] == "internal_error"


async def test_a_user_whose_renewal_is_being_checked_is_closed() -> None:
    """At once; the answer to the renewal is lost."""
    house = House()
    house.asks()
    async with simulated(house.app) as server:
        headers = {"Authorization": "Bearer t-ada"}
        async with connect(f"{server.url}/ws", additional_headers=headers) as client:
            await house.reached("authenticate")
            house.gates["authenticate"] = asyncio.Event()
            await client.send("authenticate", {"token": "t-ada"}, id=1)
            await house.reached("authenticate", 2)
            await house.hub.close_user("ada", *OUT)
            assert await ending(client) == ([], OUT)
            house.gates["authenticate"].set()
        await house.empty()
    assert house.seen[2:] == ["disconnect ada 4401"]


async def test_the_function_may_set_the_user_by_itself() -> None:
    """A guest by what the function returns is still who it says."""
    house = House("authenticate")

    @house.ws.authenticate(optional=True)
    async def who(conn: Connection, token: str | None) -> str | None:
        conn.user = "ada"
        await house.wait("authenticate")
        return None

    house.admits()
    async with simulated(house.app) as server:
        visitor = asyncio.create_task(visit(f"{server.url}/ws"))
        await house.reached("authenticate")
        await house.hub.close_user("ada", *OUT)
        house.gates["authenticate"].set()
        assert (await visitor)[1] == OUT
        await house.empty()
    assert house.seen == ["authenticate"]


async def test_a_client_that_reconnects_in_a_loop_is_let_in_after_the_call_only() -> None:
    """With its token revoked first, it is refused from then on, whatever was in progress."""
    house, tokens = House(), {"t-ada": "ada"}

    @house.ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        user = tokens.get(token or "")
        await turns()  # a database
        return user

    codes: list[int | None] = []

    async def loop(url: str) -> None:
        while 3401 not in codes[-20:]:
            _, (code, _) = await visit(url, **WAYS["header"])
            codes.append(code)

    async with simulated(house.app) as server:
        loops = [asyncio.create_task(loop(f"{server.url}/ws")) for _ in range(5)]
        await until(lambda: len(house.hub.connections) == 5)
        await house.hub.close_user("ada", *OUT)
        await until(lambda: len(codes) >= 5)
        del tokens["t-ada"]
        await house.hub.close_user("ada", 4402)
        await asyncio.gather(*loops)
        assert await house.hub.presence(user="ada") == []
        await house.empty()
    assert set(codes) <= {4401, 4402, 3401} and codes.count(4401) >= 5


async def test_a_refused_handshake_is_freed_at_once() -> None:
    """Nothing refers to it, not even the call that has closed its user."""
    house, conns = House("connect"), weakref.WeakSet[Connection]()

    @house.ws.connect
    async def arrive(conn: Connection) -> None:
        conns.add(conn)
        await house.wait("connect")
        conn.user = "ada"

    gc.collect()
    gc.disable()
    try:
        async with serving(house.app) as server:
            visitor = asyncio.create_task(visit(f"{server.url}/ws"))
            await house.reached("connect")
            closed = weakref.ref(house.hub.state.registry._latest)
            await house.hub.close_user("ada", *OUT)
            await house.hub.close_user("bob", *OUT)
            house.gates["connect"].set()
            assert (await visitor)[1] == OUT
            await until(lambda: not (house.hub.count or conns))
            assert closed() is None
    finally:
        gc.enable()


async def test_calls_are_freed_with_the_handshake() -> None:
    """A chain of them ends without recursion; without a handshake none is kept."""
    first = last = pachinko.ClosedUser("", Close())
    for _ in range(200_000):
        last = last.add("bob", Close())
    kept = weakref.ref(first)
    assert first.later("ada") is None and first.later("bob") is not None
    del first
    assert kept() is None and last.later("bob") is None


# `user_id`


async def test_user_id_is_the_user_or_a_mistake() -> None:
    """A `str` where each client has a user; else an error that says what to write."""
    house, refused = House(), list[str]()

    @house.ws.authenticate(optional=True)
    async def who(conn: Connection, token: str | None) -> str | None:
        try:
            return conn.user_id
        except PachinkoError as exc:
            refused.append(str(exc))
        return USERS.get(token or "")

    @house.ws.on("whoami")
    async def whoami(conn: Connection) -> str:
        return conn.user_id

    @house.ws.error(PachinkoError)
    async def failed(conn: Connection, exc: PachinkoError) -> str:
        return str(exc)

    async with simulated(house.app) as server:
        async with connect(f"{server.url}/ws") as guest:
            text = (await guest.ask("whoami"))["payload"]
            assert "if conn.user is not None" in text and "@ws.authenticate without" in text
            assert refused == [text]
            await guest.ask("authenticate", {"token": "t-ada"})
            assert (await guest.ask("whoami"))["payload"] == "ada"
        async with connect(f"{server.url}/ws", **WAYS["header"]) as client:
            assert (await client.ask("whoami"))["payload"] == "ada"


async def test_an_empty_name_is_a_user() -> None:
    """A connect handler may set it, and `user_id` returns it."""
    house, seen = House(), list[Any]()

    @house.ws.connect
    async def arrive(conn: Connection) -> None:
        conn.user = ""
        seen.append(conn.user_id)

    async with simulated(house.app) as server, connect(f"{server.url}/ws"):
        pass
    assert seen == [""]
