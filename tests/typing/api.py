"""What type checkers see of Pachinko. Never run: mypy and pyright check it, both strict.

The lines with an ignored error must be errors: both checkers complain of a needless ignore.
"""

import asyncio
import concurrent.futures
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, assert_type

import attrs
import falcon.asgi

import pachinko
from pachinko import (
    AnswerError,
    Backplane,
    Close,
    Connection,
    Envelope,
    Hub,
    MessageError,
    NoAnswer,
    Pachinko,
    PachinkoError,
    Refused,
    SyncHub,
    hub,
    message,
    simulate,
)

app = falcon.asgi.App()
ws = Pachinko(app, "/ws/{room}")
assert_type(ws, Pachinko)
assert_type(hub, Hub)


# Message classes have the constructor that their fields make.


@message("say")
class Say:
    text: str


@message("said")
class Said:
    who: str
    text: str
    at: float = 0.0


@message("chosen")
@attrs.define
class Chosen:
    numbers: list[int] = attrs.field(factory=list[int])


@message("order")
class Order:
    sku: str = attrs.field(converter=str.strip)
    ship_to: str = attrs.field(default="", alias="shipTo")
    _note: str = attrs.field(default="", alias="note")
    total: int = attrs.field(default=0, init=False)


@message("fixed")
@attrs.frozen
class Fixed:
    at: float


@message("noted")
@dataclasses.dataclass
class Noted:
    at: float


@message("louder")
class Louder(Say):
    volume: int = 11


assert_type(Say("hello"), Say)
assert_type(Say(text="hello").text, str)
assert_type(Said("a", "hello").at, float)
assert_type(Chosen([1]).numbers, list[int])
assert_type(Order("ab", shipTo="me", note="n").ship_to, str)
assert_type(Louder("hello", volume=5), Louder)


def messages_as_values() -> None:
    Chosen([1]).numbers = [2]  # a class that `attrs.define` has made is not frozen
    Noted(1.0).at = 2.0
    Fixed(1.0).at = 2.0  # type: ignore[misc]  # pyright goes by the outer of two decorators
    assert_type({Say("hello"): 1}, dict[Say, int])
    assert_type({Fixed(1.0)}, set[Fixed])
    assert_type(Say("hello") == Say("bye"), bool)


def wrong_messages() -> None:
    Say(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Say()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Say(txt="hello")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Said("a", "hello", "now")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Order("ab", ship_to="me")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Order("ab", total=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    message(Say)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# Decorators return the function unchanged, so that it can be called with its own types.


@ws.authenticate
async def who(conn: Connection, token: str | None) -> str | None:
    return {"s3cret": "ada"}.get(token or "")


@ws.connect
async def arrive(conn: Connection, room: str) -> None:
    await hub.join(f"room:{room}", conn)


@ws.connect
async def lend(conn: Connection) -> AsyncIterator[None]:
    yield


@ws.accepted
async def came(conn: Connection, room: str) -> None:
    await conn.send("welcome", room)


guests = Pachinko(app, "/guests", connect_timeout=5)


@guests.authenticate(optional=True)
async def perhaps(conn: Connection, token: str | None) -> str | None:
    return token


@ws.on(Say)
async def say(conn: Connection, msg: Say) -> None:
    await hub.send(f"room:{conn.params['room']}", Said(conn.id, msg.text))


@ws.on("sum", concurrent=True)
async def add(conn: Connection, *, a: int, b: int = 0) -> int:
    return a + b


@ws.on("count")
async def count(conn: Connection, *, to: int) -> AsyncIterator[int]:
    for number in range(to):
        yield number


@ws.fallback
async def other(conn: Connection, frame: str) -> Said:
    return Said(conn.id, frame)


@ws.binary
async def upload(conn: Connection, data: bytes) -> None:
    await conn.send("size", {"bytes": len(data)})


echo = Pachinko(app, "/echo")


@echo.fallback
async def echo_text(conn: Connection, frame: str) -> str:
    return frame


@echo.binary
async def echo_bytes(conn: Connection, data: bytes) -> bytes | bytearray | memoryview | None:
    return data or None


@ws.middleware
async def timed(
    conn: Connection, envelope: Envelope, call_next: Callable[[], Awaitable[Any]]
) -> Any:
    assert_type(envelope.type, str)
    assert_type(envelope.id, str | int | None)
    assert_type(envelope.group, str | None)
    assert_type(envelope.at, str | None)
    envelope.id = 5  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    return await call_next()


class Database: ...


@ws.provide
async def database(conn: Connection) -> AsyncIterator[Database]:
    yield Database()


unchanged: Callable[[Connection], AsyncIterator[Database]] = database


@ws.on("look")
async def look(conn: Connection, *, database: Database) -> None: ...


@ws.error(ZeroDivisionError)
async def infinite(conn: Connection, exc: ZeroDivisionError) -> MessageError:
    return MessageError("infinite", "no number is that large", status=400)


@ws.worker
async def clock() -> None:
    await hub.broadcast("tick")


@ws.worker(once=True)
async def once() -> None:
    await hub.broadcast("tick")


returned: Callable[[], Awaitable[None]] = once
ws.worker(clock, once=True)
ws.worker(once=True)(5)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]


# Kept groups, and streams that go on without their client.

hub.keep("room:")
hub.keep("", messages=1, seconds=0.5, bytes=1024)
hub.keep("room:", 100)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
hub.configure(history_bytes=1 << 20)
Pachinko(app, "/slow", overflow="replay")
Pachinko(app, "/bad", overflow="keep")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@ws.snapshot("room:")
async def state(conn: Connection, group: str) -> Said | None:
    assert_type(await hub.position(group), str)
    async for kept in hub.history(group, last=5):
        assert_type(kept, Envelope)
    return None


snapped: Callable[[Connection, str], Awaitable[Said | None]] = state
ws.snapshot(state)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@ws.on("tokens", resumable=60)
async def tokens(conn: Connection, *, prompt: str) -> AsyncIterator[str]:
    yield prompt


# Who may send a type, and what other files have registered.


def is_admin(conn: Connection) -> bool:
    return conn.user == "admin"


async def is_member(conn: Connection) -> bool:
    return conn.user is not None


async def clear(conn: Connection, *, room: str) -> int:
    return len(room)


todos = Pachinko()
clear = todos.on("clear", only=is_admin)(clear)
todos.on(Say, only=is_member, concurrent=True)
todos.on("clear", only=lambda conn: conn.user == "admin")
todos.on("clear", only=None)
todos.on("clear", only=True)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
todos.on("clear", only="admin")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
todos.on("clear", only=lambda: True)  # type: ignore[arg-type,misc]  # pyright: ignore[reportArgumentType]
todos.on("clear", only=lambda conn: conn.user)  # type: ignore[arg-type,return-value]  # pyright: ignore[reportArgumentType]
todos.on("clear", only=clear)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
todos.on("clear", is_admin)  # type: ignore[call-arg,arg-type]  # pyright: ignore[reportCallIssue]


def include(other: Pachinko) -> None:
    ws.include(todos)
    ws.include(todos, "todo")
    ws.client("/pachinko.js")
    ws.client(7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(other.include(todos, prefix="todo"), None)
    ws.include("todos")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    ws.include(todos, prefix=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@ws.disconnect
async def leave(conn: Connection) -> None:
    assert_type(conn.close_code, int | None)
    await hub.send(f"room:{conn.params['room']}", "left", {"who": conn.id}, exclude=conn)


async def call_handlers(conn: Connection) -> None:
    assert_type(await arrive(conn, "1"), None)
    assert_type(await arrive(conn, room="1"), None)
    assert_type(lend(conn), AsyncIterator[None])
    assert_type(await came(conn, "1"), None)
    assert_type(await perhaps(conn, None), str | None)
    assert_type(await say(conn, Say("hello")), None)
    assert_type(await add(conn, a=1), int)
    assert_type(count(conn, to=3), AsyncIterator[int])
    assert_type(await other(conn, "{"), Said)
    assert_type(await upload(conn, b""), None)
    assert_type(await infinite(conn, ZeroDivisionError()), MessageError)
    assert_type(await clock(), None)
    assert_type(await leave(conn), None)


async def call_handlers_wrongly(conn: Connection) -> None:
    await say(conn, "hello")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await add(conn, a="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await add(conn, 1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    count(conn, to="3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# The connection and the hub.


async def use_connection(conn: Connection) -> None:
    assert_type(conn.id, str)
    assert_type(conn.req, falcon.asgi.Request)
    assert_type(conn.ws, falcon.asgi.WebSocket)
    assert_type(conn.params, dict[str, Any])
    assert_type(conn.groups, frozenset[str])
    assert_type(conn.closed, bool)
    assert_type(conn.user, str | None)
    assert_type(conn.user_id, str)
    assert_type(conn.subprotocol, str | None)
    assert_type(conn.add_header("Set-Cookie", "a=1"), None)
    conn.add_header("X-A", 5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    conn.user = "ada"
    assert_type(conn.expires_at, float | None)
    conn.expires_at = 1_800_000_000
    assert_type(await conn.send(Say("hello")), None)
    assert_type(await conn.send(b"hello"), None)
    assert_type(await conn.close(4000, "bye"), None)
    assert_type(await conn.join("room:1"), None)
    assert_type(await conn.leave("room:1"), None)
    conn.user = 5  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    conn.user_id = "ada"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    conn.groups = frozenset()  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    await conn.close("bye")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def start_tasks(conn: Connection) -> None:
    task = conn.create_task(add(conn, a=1))
    assert_type(task, asyncio.Task[int])
    assert_type(await task, int)
    conn.create_task(add)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    conn.create_task(count(conn, to=3))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def read_history() -> None:
    assert_type(await hub.position("room:1"), str)
    async for kept in hub.history("room:1", last=5):
        assert_type(kept, Envelope)
        assert_type(kept.at, str | None)
    hub.history(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await hub.history("room:1")  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]


async def listen() -> None:
    async for envelope in hub.listen("room:1"):
        assert_type(envelope, Envelope)
    async for sign in hub.listen("room:1", heartbeat=5.0):
        assert_type(sign, Envelope | None)
    async with hub.listen("room:1") as messages:
        assert_type(await anext(messages), Envelope)
        assert_type(await messages.aclose(), None)
    listening: AsyncIterator[Envelope] = hub.listen("room:1")
    await anext(listening)
    hub.listen(1)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    hub.listen("room:1", 5.0)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    await hub.listen("room:1")  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]


async def use_hub(conn: Connection) -> None:
    await hub.send("room:1", Say("hello"), exclude=[conn, "an-id"])
    await hub.broadcast("news", {"title": "Pachinko"}, exclude=conn.id)
    await hub.send("room:1", b"hello", exclude=conn)
    await hub.broadcast(bytearray(b"hello"))
    await hub.send_to(conn.id, memoryview(b"hello"))
    await hub.send_to_user("ada", b"hello")
    await hub.send_to(conn, "note")
    await hub.send_to(conn.id, Say("hello"))
    await hub.send_to_user("ada", Say("hello"))
    await hub.close_group("room:1", 4000, "over")
    assert_type(await hub.close(conn), None)
    await hub.close(conn.id, 4000, "over")
    await hub.close("an-id", code=4000, reason=None)
    assert_type(await hub.close_user("ada", 4401, "signed out"), None)
    await hub.close_user(conn.user_id)
    await hub.send_to_user(conn.user_id, Say("hello"))
    await hub.presence(user=conn.user_id)
    await hub.send_to_user(conn.user, Say("hello"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await hub.close_user(conn.user)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await hub.close(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await hub.close(conn, "bye")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(hub.members("room:1"), frozenset[Connection])
    assert_type(hub.connections, frozenset[Connection])
    assert_type(hub.groups, frozenset[str])
    assert_type(hub.count, int)
    assert_type((await hub.presence(user="ada"))[0].id, str)
    await hub.presence()  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    await hub.presence("room:1", user="ada")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    assert_type(hub.stats(), dict[str, int])
    assert_type(hub.draining, bool)
    await hub.drain(20)
    await hub.send(1, Say("hello"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(await hub.join("room:1", conn.id), None)
    assert_type(await hub.leave("room:1", conn.id), None)
    await hub.join("room:1", 5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await hub.leave(5, conn)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def use_answers(conn: Connection) -> None:
    assert_type(await conn.ask("name"), Any)
    assert_type(await conn.ask("name", {"full": True}, timeout=5), Any)
    assert_type(await conn.ask(Say("hello"), returns=Said), Said)
    assert_type(await conn.ask("name", returns=str), str)
    assert_type(await conn.ask("numbers", None, returns=list[int], timeout=2.5), list[int])
    limited: int = await conn.ask("number", returns=Annotated[int, "a limit"])
    assert_type(await hub.ask(conn, Say("hello")), Any)
    assert_type(await hub.ask(conn.id, "name", returns=Said), Said)
    assert_type(
        await hub.ask(conn.id, "name", 5, timeout=limited, returns=dict[str, int]), dict[str, int]
    )
    asked = hub.call_threadsafe(hub.ask, conn.id, "name")
    assert_type(asked.result(), Any)
    await conn.ask()  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    await conn.ask("name", 5, 10.0)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    await conn.ask("name", timeout="10")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    await conn.ask("name", timeout=None)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    await hub.ask("name")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    await hub.ask(5, "name")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    number = await conn.ask("name", returns=int)
    len(number)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@ws.error(AnswerError)
async def refused(conn: Connection, exc: AnswerError) -> MessageError:
    assert_type(exc.code, str)
    assert_type(exc.message, str)
    assert_type(exc.details, dict[str, Any])
    return MessageError("refused")


def answers() -> None:
    late: TimeoutError = NoAnswer("not in time")
    AnswerError(late)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    AnswerError("locked", "no key", {"door": 4})


class Own:
    async def start(
        self,
        deliver: Callable[[str, bytes], Awaitable[None]],
        lost: Callable[[BaseException | None], None],
    ) -> None: ...

    async def publish(self, subject: str, data: bytes) -> int | None: ...

    async def subscribe(self, subject: str) -> None: ...

    async def unsubscribe(self, subject: str) -> None: ...

    async def stop(self) -> None: ...


async def several_processes() -> None:
    own: Backplane = Own()
    hub.configure("nats://localhost:4222", namespace="shop")
    hub.configure(history_bytes=10_000_000)
    hub.keep("room:")
    hub.keep("", messages=1, seconds=60, bytes=10_000)
    hub.keep()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    hub.keep("room:", 5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    hub.configure(own)
    hub.configure(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType] - is no broker
    async with hub.open("redis://localhost:6379") as opened:
        assert_type(opened, Hub)
        (present,) = await opened.presence("room:1")
        assert_type(present.id, str)
        assert_type(present.user, str | None)
        assert_type(present.process, str)
        assert_type(hub.process, str)
    asked = hub.call_threadsafe(hub.presence, "room:1")
    assert_type(asked.result()[0].process, str)


async def mounted_elsewhere() -> None:
    async with ws.running() as nothing:
        assert_type(nothing, None)
    async with ws.running(alone=True):
        pass
    ws.running(5)  # type: ignore[call-arg, arg-type]  # pyright: ignore[reportCallIssue]


def use_hub_from_a_thread(conn: Connection) -> None:
    sent = hub.call_threadsafe(hub.send, "room:1", Say("hello"), exclude=conn)
    assert_type(sent, concurrent.futures.Future[None])
    members = hub.call_threadsafe(hub.members, "room:1")
    assert_type(members.result(timeout=1), frozenset[Connection])
    assert_type(hub.call_threadsafe(conn.send, Say("hello")), concurrent.futures.Future[None])
    hub.call_threadsafe(setattr, conn, "expires_at", None)
    assert_type(hub.call_threadsafe(hub.close, conn, 4000), concurrent.futures.Future[None])
    assert_type(hub.call_threadsafe(hub.close_user, "ada"), concurrent.futures.Future[None])
    hub.call_threadsafe(hub.send)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    hub.call_threadsafe(hub.send, 1, "hello")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue,reportArgumentType]


def use_hub_without_an_event_loop(conn: Connection) -> None:
    assert_type(SyncHub(), SyncHub)
    assert_type(pachinko.SyncHub(Own(), namespace="shop", converter=hub.converter), SyncHub)
    with SyncHub("nats://localhost:4222") as sync_hub:
        assert_type(sync_hub, SyncHub)
        sync_hub.send("room:1", Say("hello"), exclude=["an-id", "another"])
        sync_hub.broadcast("news", {"title": "Pachinko"}, exclude=conn.id)
        sync_hub.send_to(conn.id, "note")
        sync_hub.send_to_user("ada", Say("hello"))
        sync_hub.close_group("room:1", 4000, "over")
        sync_hub.close(conn.id, 4000, "over")
        sync_hub.close_user("ada", 4000, "over")
        sync_hub.join("room:1", conn.id)
        sync_hub.leave("room:1", conn.id)
        assert_type(sync_hub.ask(conn.id, "sum", {"a": 1}, timeout=5, returns=int), int)
        assert_type(sync_hub.ask(conn.id, Say("hello")), Any)
        assert_type(sync_hub.presence("room:1")[0].user, str | None)
        assert_type(sync_hub.position("room:1"), str)
        assert_type(sync_hub.history("room:1", last=5)[0].at, str | None)
        assert_type(sync_hub.presence(user="ada")[0].id, str)
    sync_hub.stop()


def wrong_without_an_event_loop(sync_hub: SyncHub) -> None:
    SyncHub(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SyncHub("nats://localhost:4222", "shop")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    SyncHub(namespace=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    sync_hub.send(1, "hello")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    sync_hub.send("room:1")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    sync_hub.send("room:1", "hello", None, "id")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    sync_hub.close()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    sync_hub.join("room:1", 5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    sync_hub.presence()  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    sync_hub.presence("room:1", user="ada")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    sync_hub.members("room:1")  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue,reportUnknownMemberType]
    pachinko.SyncHubs()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue,reportUnknownMemberType]


# The test client, with and without async.


def make_app() -> falcon.asgi.App[Any, Any]:
    return falcon.asgi.App()


async def asgi(scope: Any, receive: Any, send: Any) -> None: ...


async def use_simulation() -> None:
    async with simulate(app) as sim:
        ada = await sim.connect("/ws/lobby", token="s3cret", headers={"X-One": "1"})
        bob = await sim.connect(
            "/ws/lobby",
            headers=[("X-One", "1")],
            cookies={"a": "b"},
            origin="https://example.com",
            query={"a": 1},
            subprotocols=["a"],
            timeout=1,
        )
        await ada.send(Say("hi"))
        await ada.send("sum", {"a": 1, "b": 2}, id=1)
        await ada.send(b"bytes")
        await ada.send_text("{")
        await ada.send_bytes(b"{")
        assert_type(await bob.receive(Chosen), Chosen)
        assert_type(await bob.receive("said", timeout=1), Any)
        assert_type(await bob.receive(), Envelope)
        assert_type(await ada.request("sum", {"a": 1, "b": 2}), Any)
        assert_type(await ada.request("sum", {"a": 1, "b": 2}, returns=int), int)
        async for n in ada.stream("count", {"to": 3}):
            assert_type(n, Any)
        bob.answer("unlock", lambda payload: {"ok": True})
        await sim.settle(timeout=1)
        assert_type(bob.received, list[Envelope])
        ada.cut()
        bob.stall()
        bob.resume()
        await bob.close(4000, "bye")
        assert_type(await ada.closed(), tuple[int, str])
        assert_type(ada.conn, Connection)
        assert_type(ada.subprotocol, str | None)
        assert_type(sim.hub, Hub)
        assert_type(sim.published("room:lobby"), list[Envelope])
        assert_type(sim.transcript(), str)
        sim.advance(1)
        await sim.advance(1.5)
        with sim.bugs(KeyError, ValueError) as bugs:
            assert_type(bugs, list[BaseException])
    async with simulate(make_app, timeout=1) as sim, sim.process() as other:
        assert_type(other.hub, Hub)
        third = await sim.process()
        await third.connect("/ws/lobby")
        third.kill()
        await other.stop()
        sim.broker.lose()
        sim.broker.restore()
    simulate(asgi)


def use_simulation_without_async() -> None:
    with simulate(app) as sim:
        ada = sim.connect("/ws/lobby")
        assert ada.request("sum", {"a": 1, "b": 2}) == 3
        for _ in ada.stream("count"):
            break
        with sim.process() as other:
            other.kill()


def refused_handshake(exc: Refused) -> None:
    assert_type(exc.status, int | None)
    assert_type(exc.code, int | None)
    assert_type(exc.reason, str)
    assert_type(exc.headers, dict[str, str])


async def wrong_simulation() -> None:
    simulate(app, 5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    async with simulate(app) as sim:
        sim.advance("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        sim.bugs(KeyError())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        await sim.connect("/ws", "s3cret")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
        await sim.connect("/ws", token=b"x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# Options and errors.


def options() -> None:
    Pachinko()
    Pachinko(app, "/a", origins="*", rate=(20, 1.0), hub=Hub())
    Pachinko(app, "/b", origins=["https://example.com"], overflow="drop_oldest")
    Pachinko(app, "/c", overflow="wait")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Pachinko(app, "/d", hub)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    app.add_route("/e/{room}", ws)
    app.add_middleware(ws)


def errors() -> None:
    assert_type(Close(4000, "bye").code, int)
    assert_type(MessageError("not_your_turn", "wait", turn="ada").code, str)
    raise PachinkoError("a mistake")
