"""What is registered on another Pachinko, and included: `ws.include`."""

from __future__ import annotations

import asyncio
import gc
import types
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import attrs
import cattrs
import falcon.asgi
import pytest
from support import connect, new_app, simulated, until
from test_session import Session, endpoint

import pachinko
from pachinko import (
    Close,
    Connection,
    Envelope,
    Hub,
    MessageError,
    Pachinko,
    PachinkoError,
    message,
)


@message("say")
class Say:
    text: str


class Db:
    """What a provider makes."""


@attrs.frozen
class Settings:
    """What a provider makes, and a client could also send."""

    name: str = "client's"


async def nothing(conn: Any) -> str:
    return "nothing"


async def two(conn: Any, other: Any) -> None: ...


async def three(conn: Any, envelope: Any, call_next: Any) -> None: ...


async def provide_db(conn: Connection) -> AsyncIterator[Db]:
    yield Db()


async def provide_settings(conn: Connection) -> Settings:
    return Settings("server's")


def refusal(register: Callable[[], Any]) -> str:
    """The text of the `PachinkoError` that *register* raises."""
    with pytest.raises(PachinkoError) as caught:
        register()
    return str(caught.value)


def contents(ws: Pachinko) -> Any:
    """All that is registered on *ws*, to compare."""
    routes = ws._routes
    fields = {f.name: getattr(routes, f.name) for f in attrs.fields(type(routes))}
    return {k: list(v) if isinstance(v, (dict, list)) else v for k, v in fields.items()} | {
        "decode": None
    }


def noting(ws: Pachinko, name: str, notes: list[Any]) -> None:
    """A middleware that notes what it gets and what comes of it."""

    @ws.middleware
    async def around(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        notes.append((name, envelope.type, envelope.payload))
        try:
            result = await call_next()
        except Exception as exc:  # it is noted, and raised again
            notes.append((name, type(exc).__name__))
            raise
        notes.append((name, result))
        return result


# What is received


@pytest.mark.parametrize("prefix", ["", "todo", "my.todo", "v1.to-do", "ämter"])
async def test_a_prefix_is_joined_by_a_dot(prefix: str) -> None:
    """Message types get it, and with them the types of their replies."""
    ws, other = endpoint(), Pachinko()

    @other.on("add")
    async def add(conn: Connection, *, a: int, b: int = 1) -> int:
        return a + b

    @other.on("count")
    async def count(conn: Connection, to: int) -> AsyncIterator[int]:
        for n in range(to):
            yield n

    @other.on("late", concurrent=True)
    async def late(conn: Connection) -> str:
        return "late"

    ws.include(other, prefix=prefix)
    dotted = prefix + "." if prefix else ""
    async with Session(ws) as client:
        answer = await client.ask(f"{dotted}add", {"a": 1})
        assert answer == {"type": f"{dotted}add.reply", "id": 1, "payload": 2}
        answer = await client.ask(f"{dotted}count", 1, id="c")
        assert answer == {"type": f"{dotted}count.reply", "id": "c", "payload": 0, "more": True}
        assert await client.receive() == {"type": "complete", "id": "c"}
        assert (await client.ask(f"{dotted}late"))["type"] == f"{dotted}late.reply"
        refused = await client.ask(f"{dotted}add", {"a": "1"})
        assert refused["payload"]["errors"] == [
            {"path": "$.payload.a", "message": "expected int, got str"}
        ]
        if prefix:
            assert (await client.ask("add", {"a": 1}))["payload"]["code"] == "unknown_type"


async def test_a_message_class_is_received_with_the_prefix_and_sent_without() -> None:
    """What is sent keeps its own type: the prefix is only for what comes."""
    ws, other = endpoint(), Pachinko()

    @other.on(Say)
    async def say(conn: Connection, msg: Say) -> Say:
        return msg

    ws.include(other, prefix="todo")
    async with Session(ws) as client:
        answer = await client.ask("todo.say", {"text": "a"})
        assert answer == {"type": "say", "id": 1, "payload": {"text": "a"}}
        assert (await client.ask("say", {"text": "a"}))["payload"]["code"] == "unknown_type"


async def test_a_resource_keeps_its_own_prefix_behind() -> None:
    """Its methods are bound to one object, whose ends come in pairs."""
    ws, other, notes = endpoint(), Pachinko(), list[Any]()

    class Room:
        async def on_connect(self, conn: Connection) -> None:
            notes.append("connect")

        async def on_accepted(self, conn: Connection) -> None:
            notes.append("accepted")

        async def on_disconnect(self, conn: Connection) -> None:
            notes.append("disconnect")

        async def on_send(self, conn: Connection, *, text: str) -> str:
            return text

    other.add_resource("room", Room())
    ws.include(other, prefix="chat")
    async with Session(ws) as client:
        answer = await client.ask("chat.room.send", {"text": "a"})
        assert answer == {"type": "chat.room.send.reply", "id": 1, "payload": "a"}
        await client.close()
        await until(lambda: "disconnect" in notes)
    assert notes == ["connect", "accepted", "disconnect"]


async def test_the_ends_of_a_resource_are_a_pair() -> None:
    """Its `on_disconnect` runs where a later connect handler refuses."""
    ws, other, notes = endpoint(), Pachinko(), list[Any]()

    class Room:
        async def on_connect(self, conn: Connection) -> None:
            notes.append("connect")

        async def on_disconnect(self, conn: Connection) -> None:
            notes.append("disconnect")

    other.add_resource("room", Room())

    @other.connect
    async def scope(conn: Connection) -> AsyncIterator[None]:
        notes.append("open")
        yield
        notes.append("close")

    ws.include(other)

    @ws.connect
    async def refuse(conn: Connection) -> None:
        raise Close(4000)

    async with Session(ws) as client:
        assert (await client.closed())[0] == 4000
    assert notes == ["connect", "open", "close", "disconnect"]


async def test_includes_nest() -> None:
    """Prefixes are joined; middleware and error handlers of each file are around its own."""
    root, outer, inner = endpoint(), Pachinko(), Pachinko()
    notes = list[Any]()

    @inner.on("c")
    async def c(conn: Connection, *, fails: bool = False) -> str:
        if fails:
            raise KeyError("c")
        return "c"

    @outer.on("b")
    async def b(conn: Connection) -> str:
        return "b"

    noting(inner, "inner", notes)
    outer.include(inner, prefix="in")
    noting(outer, "outer", notes)
    root.include(outer, prefix="out")
    noting(root, "root", notes)
    root.on("a")(nothing)

    async with Session(root) as client:
        assert (await client.ask("out.in.c"))["type"] == "out.in.c.reply"
        type, values = "out.in.c", {"fails": False}
        calls = [(name, type, values) for name in ("root", "outer", "inner")]
        assert notes == [*calls, ("inner", "c"), ("outer", "c"), ("root", "c")]
        notes.clear()
        assert (await client.ask("out.b"))["payload"] == "b"
        assert [name for name, *_ in notes] == ["root", "outer", "outer", "root"]
        notes.clear()
        assert (await client.ask("a"))["payload"] == "nothing"
        assert [name for name, *_ in notes] == ["root", "root"]
        notes.clear()
        answer = await client.ask("out.in.c", {"fails": True})
        assert answer["payload"]["code"] == "internal_error"
        assert notes[3:] == [(name, "KeyError") for name in ("inner", "outer", "root")]


async def test_one_file_serves_two_endpoints() -> None:
    """Each has a copy of its own."""
    other, seen = Pachinko(), list[str]()
    other.on("hi")(nothing)

    @other.connect
    async def arrive(conn: Connection, room: str = "none") -> None:
        seen.append(room)

    app, hub = new_app(), Hub()
    first, second = Pachinko(app, "/a/{room}", hub=hub), Pachinko(app, "/b", hub=hub)
    first.include(other)
    second.include(other, prefix="x")
    async with (
        simulated(app) as server,
        connect(server.url + "/a/lobby") as a,
        connect(server.url + "/b") as b,
    ):
        assert (await a.ask("hi"))["type"] == "hi.reply"
        assert (await b.ask("x.hi"))["type"] == "x.hi.reply"
    assert sorted(seen) == ["lobby", "none"]


async def test_two_prefixes_share_what_has_no_type() -> None:
    """Its handlers are there twice; a connection still arrives, and leaves, once."""
    ws, other, notes = endpoint(), Pachinko(), list[str]()
    other.on("hi")(nothing)

    for kind in ("connect", "accepted", "disconnect"):

        async def note(conn: Connection, kind: str = kind) -> None:
            notes.append(kind)

        getattr(other, kind)(note)

    @other.authenticate(optional=True)
    async def who(conn: Connection, token: str | None) -> None: ...

    @other.worker(once=True)
    async def leased() -> None:
        notes.append("leased")

    @other.worker
    async def work() -> None:
        notes.append("worker")

    ws.include(other, prefix="a")
    ws.include(other, prefix="b")
    async with Session(ws) as client:
        assert (await client.ask("a.hi"))["payload"] == (await client.ask("b.hi"))["payload"]
        await client.close()
        await until(lambda: "disconnect" in notes)
    assert sorted(notes) == ["accepted", "connect", "disconnect", "leased", "worker"]


async def test_two_files_may_include_a_third() -> None:
    """Nothing of it is there twice, and what is the same function does not clash."""
    ws, common, notes = endpoint(), Pachinko(), list[str]()
    common.provide(provide_db)
    common.on("hi")(nothing)

    @common.connect
    async def arrive(conn: Connection) -> None:
        notes.append("arrive")

    for name in ("a", "b"):
        file = Pachinko()
        file.include(common)

        async def take(conn: Connection, *, db: Db) -> str:
            return type(db).__name__

        file.on(name)(take)
        ws.include(file)
    async with Session(ws) as client:
        for name in ("a", "b"):
            assert (await client.ask(name))["payload"] == "Db"
        assert (await client.ask("hi"))["payload"] == "nothing"
    assert notes == ["arrive"]


async def test_ends_and_workers_are_added_in_order() -> None:
    """They stand where the include stands."""
    ws, other, notes = endpoint(), Pachinko(), list[str]()

    def arrive(on: Pachinko, name: str) -> None:
        @on.connect
        async def arrive(conn: Connection) -> None:
            notes.append(name)

    arrive(ws, "first")
    arrive(other, "second")
    ws.include(other)
    arrive(ws, "third")
    async with Session(ws) as client:
        await client.ask("x")
    assert notes == ["first", "second", "third"]


# Middleware and error handlers


@pytest.mark.parametrize("kind", ["plain", "concurrent", "stream", "fallback", "binary"])
async def test_its_middleware_is_inside_of_the_includers(kind: str) -> None:
    """Around handlers of each kind, and around no others."""
    ws, other, notes = endpoint(), Pachinko(), list[Any]()

    if kind == "stream":

        @other.on("hi")
        async def stream(conn: Connection) -> AsyncIterator[int]:
            yield 1

    elif kind in ("fallback", "binary"):

        async def raw(conn: Connection, data: Any) -> Say:
            return Say("raw")

        getattr(other, kind)(raw)
    else:
        other.on("hi", concurrent=kind == "concurrent")(nothing)
    noting(other, "in", notes)
    ws.include(other)
    noting(ws, "out", notes)
    ws.on("own")(nothing)
    async with Session(ws) as client:
        await (client.raw(b"hi") if kind == "binary" else client.send("hi", id=1))
        answer = await client.receive()
        if kind == "stream":
            assert answer["more"]
            assert await client.receive() == {"type": "complete", "id": 1}
        assert [name for name, *_ in notes] == ["out", "in", "in", "out"]
        is_raw = kind in ("fallback", "binary")
        assert {each[1] for each in notes[:2]} == {"" if is_raw else "hi"}
        notes.clear()
        assert (await client.ask("own"))["payload"] == "nothing"
        assert [name for name, *_ in notes] == ["out", "out"]


async def test_one_middleware_of_a_file_is_enough_for_contexts_of_their_own() -> None:
    """The includer has none; a message of the file passes it, and one of its own does not."""
    ws, other, notes = endpoint(), Pachinko(), list[Any]()
    other.on("hi")(nothing)
    noting(other, "in", notes)
    ws.include(other)
    ws.on("own")(nothing)
    assert ws._routes.is_scoped
    assert not ws._routes.middleware
    async with Session(ws) as client:
        await client.ask("own")
        assert notes == []
        await client.ask("hi")
        assert len(notes) == 2


def errors_of(ws: Pachinko, cls: type[Exception], what: Any) -> None:
    @ws.error(cls)
    async def failed(conn: Connection, exc: Any) -> Any:
        if isinstance(what, Exception):
            raise what
        return what


@pytest.mark.parametrize("kind", ["plain", "concurrent", "stream"])
@pytest.mark.parametrize(
    ("own", "includers", "found"),
    [
        ({KeyError: "own"}, {KeyError: "includer's"}, "own"),
        ({Exception: "own"}, {KeyError: "includer's"}, "own"),
        ({ValueError: "own"}, {LookupError: "includer's"}, "includer's"),
        ({}, {KeyError: "includer's"}, "includer's"),
        ({KeyError: ValueError("again")}, {ValueError: "includer's"}, "includer's"),
        ({KeyError: MessageError("code")}, {Exception: "includer's"}, "code"),
        ({KeyError: ValueError("again")}, {}, "internal_error"),
    ],
)
async def test_its_error_handlers_are_asked_first(
    own: Any, includers: Any, found: str, kind: str
) -> None:
    """What they raise, or do not take, goes to the includer's."""
    ws, other = endpoint(), Pachinko()

    if kind == "stream":

        @other.on("fail")
        async def stream(conn: Connection) -> AsyncIterator[int]:
            raise KeyError
            yield 1

    else:

        @other.on("fail", concurrent=kind == "concurrent")
        async def fail(conn: Connection) -> None:
            raise KeyError

    for cls, what in own.items():
        errors_of(other, cls, what)
    ws.include(other)
    for cls, what in includers.items():
        errors_of(ws, cls, what)
    async with Session(ws) as client:
        payload = (await client.ask("fail"))["payload"]
    assert (payload if isinstance(payload, str) else payload["code"]) == found


async def test_its_error_handlers_are_for_its_own_messages() -> None:
    """A message of the includer, or of another file, never meets them."""
    ws, first, second = endpoint(), Pachinko(), Pachinko()

    async def fail(conn: Connection) -> None:
        raise KeyError

    errors_of(first, KeyError, "first")
    errors_of(second, KeyError, "second")
    for on, prefix in ((first, "a"), (second, "b")):
        on.on("fail")(fail)
        ws.include(on, prefix=prefix)
    ws.on("fail")(fail)
    async with Session(ws) as client:
        assert (await client.ask("a.fail"))["payload"] == "first"
        assert (await client.ask("b.fail"))["payload"] == "second"
        assert (await client.ask("fail"))["payload"]["code"] == "internal_error"


@pytest.mark.parametrize("kind", ["fallback", "binary"])
async def test_frames_as_they_are_have_the_error_handlers_of_their_file(kind: str) -> None:
    """The fallback and the binary handler of a file are its own handlers, too."""
    ws, files = endpoint(), {"fallback": Pachinko(), "binary": Pachinko()}

    async def fail(conn: Connection, data: Any) -> None:
        raise KeyError

    for name, file in files.items():
        errors_of(file, KeyError, MessageError(name))
        getattr(file, name)(fail)
        ws.include(file)
    async with Session(ws) as client:
        await client.raw("?" if kind == "fallback" else b"?")
        assert (await client.receive())["payload"]["code"] == kind


@pytest.mark.parametrize("whose", ["includer", "file"])
async def test_an_error_of_middleware_goes_by_the_files_handlers(whose: str) -> None:
    """Whichever middleware around the message has raised it."""
    ws, other = endpoint(), Pachinko()
    other.on("hi")(nothing)
    ws.on("own")(nothing)
    errors_of(other, KeyError, "file's")
    ws.include(other)

    async def fail(conn: Any, envelope: Any, call_next: Any) -> Any:
        raise KeyError

    if whose == "includer":
        ws.middleware(fail)
    else:
        file = Pachinko()
        file.on("more")(nothing)
        file.middleware(fail)
        errors_of(file, KeyError, "file's")
        ws.include(file)
    async with Session(ws) as client:
        type = "hi" if whose == "includer" else "more"
        assert (await client.ask(type))["payload"] == "file's"
        answer = (await client.ask("own"))["payload"]
        assert answer == "nothing" or answer["code"] == "internal_error"


async def test_a_group_of_errors_goes_by_the_files_handlers() -> None:
    """Each error in it has a handler in the file, so that the first one counts."""
    ws, other = endpoint(), Pachinko()

    @other.on("fail")
    async def fail(conn: Connection) -> None:
        raise ExceptionGroup("several", [KeyError("a"), KeyError("b")])

    errors_of(other, KeyError, "own")
    ws.include(other)
    async with Session(ws) as client:
        assert (await client.ask("fail"))["payload"] == "own"


async def test_a_renewal_of_a_file_passes_no_middleware() -> None:
    """A later `authenticate` keeps its type, whatever the prefix."""
    ws, other, notes = endpoint(), Pachinko(), list[Any]()

    @other.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        return token

    noting(other, "in", notes)
    ws.include(other, prefix="x")
    headers = {"Authorization": "Bearer ada"}
    async with (
        simulated(ws._app) as server,
        connect(server.url + "/ws", additional_headers=headers) as client,
    ):
        answer = await client.ask("authenticate", {"token": "ada"})
        assert answer == {"type": "authenticate.reply", "id": 1}
        await client.send("authenticate", {"token": "bob"})
        assert (await client.closed())[0] == 3401
    assert notes == []


# Providers


async def test_providers_of_a_file_serve_its_handlers_and_later_ones() -> None:
    """They are the includer's from then on."""
    ws, other = endpoint(), Pachinko()
    other.provide(provide_db)

    async def take(conn: Connection, *, db: Db) -> str:
        return type(db).__name__

    @other.fallback
    async def raw(conn: Connection, frame: str, *, db: Db) -> Say:
        return Say(type(db).__name__)

    other.on("in")(take)
    ws.include(other)
    ws.on("out")(take)
    async with Session(ws) as client:
        assert (await client.ask("in"))["payload"] == "Db"
        assert (await client.ask("out"))["payload"] == "Db"
        await client.raw("?")
        assert (await client.receive())["payload"] == {"text": "Db"}


@pytest.mark.parametrize("order", ["before", "after", "both files"])
async def test_a_provider_may_be_shared(order: str) -> None:
    """The same function is no second provider."""
    ws, other, third = endpoint(), Pachinko(), Pachinko()

    async def take(conn: Connection, *, db: Db) -> str:
        return type(db).__name__

    other.provide(provide_db)
    other.on("in")(take)
    if order == "before":
        ws.provide(provide_db)
    ws.include(other)
    if order == "after":
        ws.provide(provide_db)
    if order == "both files":
        third.provide(provide_db)
        third.on("third")(take)
        ws.include(third)
    async with Session(ws) as client:
        assert (await client.ask("in"))["payload"] == "Db"


def test_an_include_does_not_read_again_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """An app of many files starts as fast as its handlers are read."""
    read, resolve = list[Any](), pachinko.resolve

    def note(function: Any, *args: Any) -> Any:
        read.append(function)
        return resolve(function, *args)

    ws, counts = endpoint(), list[int]()
    for number in range(3):
        file = Pachinko()
        file.provide(provide_db)

        async def own(conn: Connection) -> Any: ...

        own.__annotations__["return"] = type("Own", (), {})
        file.provide(own)
        for name in ("a", "b", "c"):

            async def take(conn: Connection, *, text: str, db: Db) -> None: ...

            file.on(name)(take)
        with monkeypatch.context() as patch:
            patch.setattr(pachinko, "resolve", note)
            ws.include(file, prefix=f"f{number}")
        counts.append(len(read))
        read.clear()
    assert counts[0] == counts[1] == counts[2]


class Repository:
    """What a provider makes of a `Db`."""

    def __init__(self, db: Db) -> None:
        self.db = db


@pytest.mark.parametrize("how", ["function", "method", "object"])
@pytest.mark.parametrize("order", ["a b", "b a"])
async def test_a_shared_provider_makes_one_value_a_call(order: str, how: str) -> None:
    """Also where a provider of another file takes it."""

    @attrs.define
    class Pool:
        async def db(self, conn: Connection) -> Db:
            return Db()

        async def __call__(self, conn: Connection) -> Db:
            return Db()

    pool, ws, a, b = Pool(), endpoint(), Pachinko(), Pachinko()
    for file in (a, b):
        file.provide(provide_db if how == "function" else pool.db if how == "method" else pool)

    @b.provide
    async def repository(conn: Connection, *, db: Db) -> Repository:
        return Repository(db)

    for name in order.split():
        ws.include({"a": a, "b": b}[name])

    @ws.on("same")
    async def same(conn: Connection, *, db: Db, repository: Repository) -> bool:
        return repository.db is db

    async with Session(ws) as client:
        assert (await client.ask("same"))["payload"] is True


def test_a_function_may_have_attributes_of_any_name() -> None:
    """Two functions are the same by what they are, and not by what they carry."""
    ws, other = endpoint(), Pachinko()

    async def first(conn: Any) -> None: ...

    async def second(conn: Any) -> None: ...

    for function in (first, second):
        vars(function).update(registered=True, __wrapped__=nothing)
    ws.on("hi")(first)
    other.on("hi")(second)
    assert "'hi' has a handler: " in refusal(lambda: ws.include(other))


@pytest.mark.parametrize("provided", [False, True])
async def test_a_resource_may_be_on_both(provided: bool) -> None:
    """Its methods are the same ones, also where they take a provided value."""
    ws, other = endpoint(), Pachinko()

    class Room:
        async def on_hi(self, conn: Connection) -> None: ...

        async def on_take(self, conn: Connection, *, db: Db) -> None: ...

    class Plain:
        async def on_hi(self, conn: Connection) -> None: ...

    room: Any = Room() if provided else Plain()
    for each in (ws, other):
        each.provide(provide_db)
        each.add_resource("room", room)
    ws.include(other)
    third = Pachinko()
    third.provide(provide_db)
    third.add_resource("room", type(room)())
    assert "'room.hi' has a handler: " in refusal(lambda: ws.include(third))


# What may be there once


def once(name: str) -> Callable[[Pachinko], Any]:
    """What registers a function of its own for *name*, which it returns."""

    def register(ws: Pachinko) -> Any:
        if name == "authenticate":

            @ws.authenticate
            async def who(conn: Connection, token: str | None) -> None: ...

            return who
        if name in ("fallback", "binary"):

            async def raw(conn: Connection, data: Any) -> None: ...

            return getattr(ws, name)(raw)
        if name == "type":

            @ws.on("hi")
            async def hi(conn: Connection) -> None: ...

            return hi
        if name == "lease":

            @ws.worker(once=True)
            async def work() -> None: ...

            return work

        @ws.provide
        async def db(conn: Connection) -> Db:
            return Db()

        return db

    return register


ONCE = ["authenticate", "fallback", "binary", "type", "lease", "provider"]


@pytest.mark.parametrize("where", ["includer", "earlier file"])
@pytest.mark.parametrize("name", ONCE)
def test_what_may_be_there_once_is_refused(name: str, where: str) -> None:
    """The error names both functions, and nothing is added."""
    ws, other = endpoint(), Pachinko()
    first = once(name)(ws if where == "includer" else (file := Pachinko()))
    if where != "includer":
        ws.include(file)
    second = once(name)(other)
    other.on("more")(nothing)
    other.connect(nothing)
    before = contents(ws)
    text = refusal(lambda: ws.include(other))
    assert pachinko.place_of(first) in text
    assert pachinko.place_of(second) in text
    assert contents(ws) == before
    other.on("still")(nothing)  # It has not been included.


@pytest.mark.parametrize("name", ONCE)
async def test_the_same_function_may_be_on_both(name: str) -> None:
    """It counts once, as the includer has it."""
    ws, other, register = endpoint(), Pachinko(), once(name)
    function = register(ws)
    if name == "authenticate":
        other.authenticate(function)
    elif name in ("fallback", "binary"):
        getattr(other, name)(function)
    elif name == "type":
        other.on("hi")(function)
    elif name == "lease":
        other.worker(once=True)(function)
    else:
        other.provide(function)
    before = contents(ws)
    ws.include(other)
    assert contents(ws) == before


@pytest.mark.parametrize("option", ["only", "concurrent", "optional"])
def test_the_same_function_with_other_options_is_refused(option: str) -> None:
    """No include takes a guard off, for example."""
    ws, other = endpoint(), Pachinko()

    def guard(conn: Connection) -> bool:
        return False

    async def who(conn: Connection, token: str | None) -> None: ...

    if option == "optional":
        ws.authenticate(who)
        other.authenticate(optional=True)(who)
    else:
        options: Any = {"only": guard} if option == "only" else {"concurrent": True}
        ws.on("hi", **options)(nothing)
        other.on("hi")(nothing)
    assert " has a handler: " in refusal(lambda: ws.include(other))


@pytest.mark.parametrize("around", ["middleware", "error"])
@pytest.mark.parametrize("kind", ["on", "fallback", "binary"])
def test_the_same_function_with_other_functions_around_it_is_refused(
    kind: str, around: str
) -> None:
    """A middleware may say who gets through; which file is included first does not matter."""

    def file(is_inside: bool) -> Pachinko:
        common, outer = Pachinko(), Pachinko()
        (common.on("hi")(nothing) if kind == "on" else getattr(common, kind)(two))
        outer.include(common)
        if is_inside and around == "middleware":
            outer.middleware(three)
        elif is_inside:
            outer.error(KeyError)(two)
        return outer

    for first in (True, False):
        ws = endpoint()
        ws.include(file(first))
        assert " has a handler: " in refusal(lambda ws=ws, is_=not first: ws.include(file(is_)))
        ws.include(file(first))


def test_an_error_handler_for_the_same_class_is_the_files_own() -> None:
    """Within one file there is one for each class."""
    ws, other = endpoint(), Pachinko()
    ws.error(KeyError)(two)
    other.error(KeyError)(two)
    ws.include(other)

    async def second(conn: Any, exc: Any) -> None: ...

    file = Pachinko()
    file.error(KeyError)(two)
    assert "KeyError has a handler: two()" in refusal(lambda: file.error(KeyError)(second))


def test_later_registrations_meet_what_was_included() -> None:
    """The includer's own second handler of a type is refused."""
    ws, other = endpoint(), Pachinko()
    other.on("add")(nothing)
    ws.include(other, prefix="todo")
    assert "'todo.add' has a handler: nothing()" in refusal(lambda: ws.on("todo.add")(two))


@pytest.mark.parametrize("who", ["includer", "included"])
def test_what_one_file_provides_no_other_takes_from_clients(who: str) -> None:
    """A client could send what the server means to make."""
    ws, other = endpoint(), Pachinko()

    async def take(conn: Connection, *, settings: Settings) -> None: ...

    taking, providing = (ws, other) if who == "includer" else (other, ws)
    taking.on("take")(take)
    providing.provide(provide_settings)
    text = refusal(lambda: ws.include(other))
    assert "takes Settings from its payload; register provide_settings() at" in text
    assert "on the same Pachinko" in text


# Mistakes


@pytest.mark.parametrize(
    "prefix",
    ["a..b", ".a", "a.", ".", " ", "a b", "/todo", "todo/", "$x", "error", "x.reply", "a\n", 5,
     None, b"a", ["a"]],
)  # fmt: skip
def test_a_prefix_is_a_name(prefix: Any) -> None:
    """It is told how to write one; a reserved one is told to be."""
    ws, other = endpoint(), Pachinko()
    text = refusal(lambda: ws.include(other, prefix=prefix))
    reserved = prefix in ("error", "x.reply")
    assert ("is reserved" if reserved else 'write ws.include(todos.ws, prefix="todo")') in text


def test_a_type_that_becomes_a_reply_is_refused() -> None:
    """`reply` is a type of its own, and `todo.reply` an answer."""
    ws, other = endpoint(), Pachinko()
    other.on("reply")(nothing)
    text = refusal(lambda: ws.include(other, prefix="todo"))
    assert text.startswith("nothing() at ")
    assert "'todo.reply', a reply; write another prefix" in text
    ws.include(other)


@pytest.mark.parametrize(
    "other", [types, Pachinko, None, "todos", nothing, new_app(), object()], ids=repr
)
def test_only_a_pachinko_is_included(other: Any) -> None:
    """A module is the likely mistake."""
    text = refusal(lambda: endpoint().include(other))
    assert text.startswith("write ws.include(todos.ws), a Pachinko; got ")


def test_a_pachinko_does_not_include_itself() -> None:
    """Neither at once, nor by way of others."""
    ws, a, b = Pachinko(), Pachinko(), Pachinko()
    text = "includes neither itself nor what includes it"
    assert text in refusal(lambda: ws.include(ws))
    a.include(b)
    ws.include(a)
    for inner in (a, b):
        assert text in refusal(lambda inner=inner: inner.include(ws))


def test_one_with_an_app_is_refused() -> None:
    """It is an endpoint already."""
    text = refusal(lambda: endpoint().include(Pachinko(new_app(), "/other")))
    assert "has an app and a path; write\nws = Pachinko()" in text


@pytest.mark.parametrize(
    "options",
    [
        {"origins": "*"}, {"origins": ["https://example.com"]}, {"subprotocols": ["a"]},
        {"max_size": 5}, {"rate": (1, 1.0)}, {"outbox": 5}, {"overflow": "drop_oldest"},
        {"linger": 1.0, "handler_timeout": 3.0}, {"trust_forwarded": True},
        {"connect_timeout": 5.0},
    ],
)  # fmt: skip
def test_options_belong_to_the_including_one(options: Any) -> None:
    """Each that differs from the default is named, and only these."""
    text = refusal(lambda: endpoint().include(Pachinko(**options)))
    named = ", ".join(f"{name}=" for name in options)
    assert text.startswith(f"the included Pachinko has {named}; write\n")


def test_a_hub_is_not_chosen_twice() -> None:
    """A file with no hub of its own goes with any; one with another hub does not."""
    hub = Hub()
    ws = Pachinko(new_app(), "/ws", hub=hub)
    ws.include(Pachinko())
    ws.include(Pachinko(hub=hub))
    for wrong in (Pachinko(new_app(), "/ws", hub=Hub()), Pachinko(new_app(), "/ws")):
        text = refusal(lambda wrong=wrong: wrong.include(Pachinko(hub=hub)))
        assert "has another hub than the including one; give both the same" in text


@pytest.mark.parametrize("prefix", ["", "todo"])
def test_twice_the_same_is_refused(prefix: str) -> None:
    """Even where nothing would clash."""
    ws, other = endpoint(), Pachinko()
    other.connect(nothing)
    ws.include(other, prefix=prefix)
    text = refusal(lambda: ws.include(other, prefix=prefix))
    assert f"prefix={prefix!r} already; write another" in text
    ws.include(other, prefix="other")


def test_the_same_below_another_file_is_not_twice_the_same() -> None:
    """Its types differ: `a.b.hi` and `b.hi`."""
    ws, a, b = endpoint(), Pachinko(), Pachinko()
    b.on("hi")(nothing)
    a.include(b, prefix="b")
    ws.include(a, prefix="a")
    ws.include(b, prefix="b")
    assert sorted(ws._routes.handlers) == ["a.b.hi", "b.hi"]


@pytest.mark.parametrize(
    "register",
    [
        lambda ws: ws.on("late")(nothing), lambda ws: ws.connect(nothing),
        lambda ws: ws.accepted(nothing), lambda ws: ws.disconnect(nothing),
        lambda ws: ws.fallback(two), lambda ws: ws.binary(two), lambda ws: ws.authenticate(two),
        lambda ws: ws.error(KeyError)(two), lambda ws: ws.provide(provide_db),
        lambda ws: ws.include(Pachinko()),
    ],
)  # fmt: skip
def test_what_comes_too_late_is_refused(register: Any) -> None:
    """A copy has been made: the error names the line that has."""
    ws, other = endpoint(), Pachinko()
    ws.include(other)
    text = refusal(lambda: register(other))
    assert "test_include.py:" in text.partition(" has included this Pachinko")[0]
    assert "register the rest above that line" in text


def test_path_parameters_are_checked_against_the_includers_path() -> None:
    """The file had no path, so that it was not checked before."""
    for register in ("connect", "accepted"):
        other, app = Pachinko(), new_app()

        async def arrive(conn: Connection, room: int) -> None: ...

        getattr(other, register)(arrive)
        text = refusal(lambda: Pachinko(app, "/a").include(other))  # noqa: B023 - called at once
        assert "takes room: int; /a has no parameters" in text
        text = refusal(lambda: Pachinko(app, "/b/{room}").include(other))  # noqa: B023 - as above
        assert "takes `room: int`, but /b/{room} gives `room: str`" in text
        Pachinko(app, "/c/{room:int}").include(other)


def test_a_handler_takes_no_path_parameter() -> None:
    """Only connect and accepted handlers get these, which is known now."""
    other = Pachinko()

    @other.on("say")
    async def say(conn: Connection, *, room: str) -> None: ...

    text = refusal(lambda: Pachinko(new_app(), "/ws/{room}").include(other))
    assert "takes 'room', a path parameter" in text


def test_a_resource_is_checked_in_the_same_way() -> None:
    """Nothing of it, or of the rest of its file, is added."""
    ws, other = endpoint(), Pachinko()

    class Room:
        async def on_connect(self, conn: Connection, room: str) -> None: ...

        async def on_send(self, conn: Connection) -> None: ...

    other.on("hi")(nothing)
    other.add_resource("room", Room())
    before = contents(ws)
    assert "/ws has no parameters" in refusal(lambda: ws.include(other))
    assert contents(ws) == before


def test_handlers_are_checked_with_the_converter_of_the_including_one() -> None:
    """Its hub reads the payloads."""

    class Point:
        def __init__(self, x: int) -> None: ...

    async def take(conn: Connection, p: Point) -> None: ...

    own = cattrs.Converter()
    own.register_structure_hook(Point, lambda value, _: Point(value))
    with_hook = Hub()
    with_hook.configure(converter=own)
    other = Pachinko(hub=with_hook)
    other.on("take")(take)
    Pachinko(new_app(), "/ws", hub=with_hook).include(other)
    with_hook.configure(converter=cattrs.Converter())
    text = refusal(lambda: Pachinko(new_app(), "/ws", hub=with_hook).include(other))
    assert "the payload of " in text


# While the app runs


async def test_an_include_after_the_start_counts_at_once() -> None:
    """As `@ws.on` does then: for connections that are there, too."""
    ws, other, notes = endpoint(), Pachinko(), list[str]()
    other.on("hi")(nothing)

    @other.worker
    async def work() -> None:
        notes.append("works")

    async with Session(ws) as client:
        assert (await client.ask("hi"))["payload"]["code"] == "unknown_type"
        ws.include(other)
        assert (await client.ask("hi"))["payload"] == "nothing"
        await until(lambda: notes == ["works"])


async def test_an_include_from_another_thread_adds_nothing() -> None:
    """Its worker could not start there."""
    ws, other = endpoint(), Pachinko()
    other.on("hi")(nothing)

    @other.worker
    async def work() -> None: ...

    async with Session(ws):
        before = contents(ws)
        with pytest.raises(PachinkoError, match=r"call_threadsafe\(ws\.include"):
            await asyncio.to_thread(ws.include, other)
        assert contents(ws) == before


def test_an_app_that_includes_a_file_can_go() -> None:
    """The file stays in its module, and keeps no app of a test alive."""
    other = Pachinko()
    other.on("hi")(nothing)

    def make() -> weakref.ref[Pachinko]:
        ws = endpoint()
        ws.include(other)
        return weakref.ref(ws)

    left = make()
    gc.collect()
    assert left() is None


async def test_one_without_a_path_may_include_and_be_added_by_hand() -> None:
    """Then the parameters are checked when the first client comes."""
    ws, other, app, rooms = Pachinko(hub=Hub()), Pachinko(), falcon.asgi.App(), list[str]()

    @other.connect
    async def arrive(conn: Connection, room: str) -> None:
        rooms.append(room)

    ws.include(other)
    app.add_route("/ws/{room}", ws)
    async with simulated(app) as server, connect(server.url + "/ws/lobby"):
        await until(lambda: rooms == ["lobby"])


async def test_a_worker_of_two_endpoints_has_two_leases() -> None:
    """The path is part of the name of each."""
    app, other, hub = new_app(), Pachinko(), Hub()

    @other.worker(once=True)
    async def work() -> None: ...

    names = list[str]()
    for path in ("/a", "/b"):
        ws = Pachinko(app, path, hub=hub)
        ws.include(other)
        names += [str(lease) for lease, _ in ws._routes.workers]
    assert [name.partition(" ")[0] for name in names] == ["/a", "/b"]
