"""The section "handlers": what a registration accepts, refuses and says."""

import contextlib
import dataclasses
import enum
import functools
import gc
import re
import textwrap
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Annotated, Any, Generic, Literal, TypeVar

import attrs
import falcon
import falcon.asgi
import falcon.testing
import msgspec
import pytest
from support import connect, new_app, simulated

import pachinko
from pachinko import Close, Hub, MessageError, Pachinko, PachinkoError, Routes, message, place_of

CONN: Any = object()
T = TypeVar("T")


@message("say")
class Say:
    text: str
    loud: bool = False


@attrs.frozen
class Point:
    x: int
    y: int = 0


def endpoint(path: str | None = None, **options: Any) -> Pachinko:
    """A Pachinko with a hub of its own; with *path* in an app."""
    app = falcon.asgi.App() if path else None
    return Pachinko(app, path, hub=Hub(), **options)


def registered(function: Any, type: Any = "t", path: str | None = None, **options: Any) -> Any:
    """The `Handler` made of *function*."""
    ws = endpoint(path)
    assert ws.on(type, **options)(function) is function
    (handler,) = ws._routes.handlers.values()
    return handler


async def call(handler: Any, payload: Any = msgspec.UNSET) -> Any:
    """What the function returns for *payload*."""
    codec = Hub().state.codec
    value = handler.structure(payload, codec)
    return await handler.call(CONN, value)


def refusal(register: Callable[[], Any]) -> str:
    """The text of the `PachinkoError` that *register* raises."""
    with pytest.raises(PachinkoError) as caught:
        register()
    return str(caught.value)


# The signature rule


async def test_the_connection_alone() -> None:
    """A handler that takes only the connection is called without the payload."""

    async def ping(conn: Any) -> bool:
        return conn is CONN

    handler = registered(ping)
    assert await call(handler)
    assert await call(handler, {"a": 1})


async def test_a_second_parameter_takes_the_payload() -> None:
    """The whole payload is structured to the annotation."""

    async def move(conn: Any, to: Point) -> Point:
        return to

    assert await call(registered(move), {"x": 1}) == Point(1)


async def test_no_annotation_takes_plain_json() -> None:
    """Without an annotation a handler gets the JSON value."""

    async def any(conn, payload):  # type: ignore[no-untyped-def]
        return payload

    assert await call(registered(any), {"a": [1]}) == {"a": [1]}


async def test_keyword_only_parameters_take_fields() -> None:
    """Each is structured to its annotation, with Python's defaults; others are ignored."""

    async def add(conn: Any, *, a: int, b: int = 2, to: Point | None = None, any=None) -> Any:  # type: ignore[no-untyped-def]
        return a, b, to, any

    handler = registered(add)
    assert await call(handler, {"a": 1, "x": 1}) == (1, 2, None, None)
    payload = {"a": 1, "b": 5, "to": {"x": 1}, "any": [1]}
    assert await call(handler, payload) == (1, 5, Point(1), [1])


async def test_every_wrong_field_is_reported() -> None:
    """The path of a field is its name."""

    async def add(conn: Any, *, a: int, b: int = 2, to: Point | None = None) -> None: ...

    with pytest.raises(MessageError) as caught:
        await call(registered(add), {"b": "x", "to": {"x": None}})
    assert [error["path"] for error in caught.value.details["errors"]] == [
        "$.payload.a", "$.payload.b", "$.payload.to.x"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["_x", "type", "cls", "id", "__x", "inst", "hash", "eq"])
async def test_a_field_may_have_any_name(name: str) -> None:
    """The name of a field is the name on the wire, underscores included."""
    function = build(f"async def f(conn, *, {name}: int): return {name}")
    assert await call(registered(function), {name: 7}) == 7


async def test_a_default_is_not_structured() -> None:
    """It is passed as Python would."""
    default = (Point(1),)

    async def f(conn: Any, *, to: tuple[Point, ...] = default, n: int | None = None) -> Any:
        return to, n

    to, n = await call(registered(f), {})
    assert to is default
    assert n is None


def build(source: str, name: str = "f", **names: Any) -> Any:
    """What *source* defines as *name*."""
    names.setdefault("__name__", __name__)
    exec(textwrap.dedent(source), names)
    return names[name]


async def test_text_annotations_are_resolved() -> None:
    """``from __future__ import annotations`` makes no difference."""
    function = build(
        """
        from __future__ import annotations
        async def f(conn: Connection, to: Point | None, /) -> Point: return to
        """,
        Point=Point, Connection=pachinko.Connection,
    )  # fmt: skip
    handler = registered(function)
    assert (handler.annotation, handler.returns) == (Point | None, Point)
    assert await call(handler, {"x": 1}) == Point(1)


FACTORY = """
from __future__ import annotations
import attrs
from dataclasses import dataclass
from typing import TypedDict
from pachinko import Connection, Pachinko, message

def make(hub):
    ws = Pachinko(hub=hub)

    @attrs.define
    class Inner:
        n: int

    @dataclass
    class Data:
        inner: Inner

    class Keys(TypedDict):
        inner: Inner

    @message("local")
    class Local:
        inner: Inner
        data: list[Data]

    @ws.on(Local)
    async def local(conn: Connection, msg: Local) -> Inner:
        return msg.inner

    @ws.on("fields")
    async def fields(conn: Connection, *, data: Data, keys: Keys | None = None) -> list[Data]:
        return [data]

    class Room:
        async def on_send(self, conn: Connection, data: dict[str, Data]) -> Data:
            return data["a"]

    ws.add_resource("room", Room())
    return ws, Inner, Data
"""


@pytest.mark.parametrize(
    "source", [FACTORY, FACTORY.replace("from __future__ import annotations", "")]
)
async def test_classes_may_be_local_to_a_factory(source: str) -> None:
    """An app factory may hold messages, handlers and resources, with text annotations too."""
    ws, inner, data = build(source, "make")(Hub())
    handlers = ws._routes.handlers
    assert list(handlers) == ["local", "fields", "room.send"]
    payload = {"inner": {"n": 1}, "data": [{"inner": {"n": 2}}]}
    assert await call(handlers["local"], payload) == inner(1)
    payload = {"data": {"inner": {"n": 1}}, "keys": {"inner": {"n": 2}}}
    assert await call(handlers["fields"], payload) == [data(inner(1))]
    assert await call(handlers["room.send"], {"a": {"inner": {"n": 1}}}) == data(inner(1))
    with pytest.raises(MessageError, match=r"\$\.payload\.keys\.inner\.n: expected int, got str"):
        await call(handlers["fields"], {"data": {"inner": {"n": 1}}, "keys": {"inner": {"n": ""}}})


# The payload that is absent


async def nothing(conn: Any) -> Any:
    return "called"


async def fields(conn: Any, *, a: int = 1) -> Any:
    return a


async def required(conn: Any, *, a: int) -> Any:
    return a


async def default(conn: Any, to: Point | None = Point(9)) -> Any:
    return to


async def nullable(conn: Any, to: Point | None) -> Any:
    return to


async def strict(conn: Any, to: Point) -> Any:
    return to


async def plain(conn: Any, payload) -> Any:  # type: ignore[no-untyped-def]
    return payload


REFUSED = object()


@pytest.mark.parametrize(
    ("function", "absent", "null"),
    [
        (nothing, "called", "called"),
        (fields, 1, REFUSED),
        (required, REFUSED, REFUSED),
        (default, Point(9), None),
        (nullable, None, None),
        (strict, REFUSED, REFUSED),
        (plain, None, None),
    ],
)
async def test_no_payload_and_null(function: Any, absent: Any, null: Any) -> None:
    """No payload is {} for fields, else the default, else null where one is admitted."""
    handler = registered(function)
    for payload, expected in ((msgspec.UNSET, absent), (None, null)):
        if expected is REFUSED:
            with pytest.raises(MessageError) as caught:
                await call(handler, payload)
            assert caught.value.code == "invalid_payload"
        else:
            assert await call(handler, payload) == expected


async def test_an_absent_payload_is_called_missing() -> None:
    """The client reads what it left out."""
    with pytest.raises(MessageError) as caught:
        await call(registered(strict))
    missing = [{"path": "$.payload", "message": "required, but missing"}]
    assert caught.value.details == {"errors": missing}


async def test_an_absent_field_is_called_missing() -> None:
    """The same for a field."""
    with pytest.raises(MessageError) as caught:
        await call(registered(required))
    missing = [{"path": "$.payload.a", "message": "required, but missing"}]
    assert caught.value.details == {"errors": missing}


async def test_an_object_for_a_text_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """``(conn, text: str)`` and ``{"text": …}``: the log says what was probably meant."""

    async def say(conn: Any, text: str) -> None: ...

    handler = registered(say)
    for _ in range(3):
        with pytest.raises(MessageError):
            await call(handler, {"text": "hi"})
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "(conn, *, text: str) was probably meant" in record.getMessage()
    assert place_of(say) in record.getMessage()


@pytest.mark.parametrize("payload", ["hi", {"other": 1}, 5, None, [1]])
async def test_other_payloads_give_no_hint(payload: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The hint is for the one mistake."""

    async def say(conn: Any, text: str) -> None: ...

    handler = registered(say)
    with contextlib.suppress(MessageError):
        await call(handler, payload)
    assert caplog.records == []


# Functions of all kinds


async def test_a_bound_method_is_a_handler() -> None:
    """``self`` is not the connection."""

    class Room:
        async def send(self, conn: Any, *, a: int) -> Any:
            return self, conn, a

    room = Room()
    assert await call(registered(room.send), {"a": 1}) == (room, CONN, 1)


async def test_a_partial_is_a_handler() -> None:
    """What a partial has bound is no parameter."""

    async def send(room: str, conn: Any, to: Point) -> Any:
        return room, to

    handler = registered(functools.partial(send, "lobby"))
    assert await call(handler, {"x": 1}) == ("lobby", Point(1))


async def test_a_wrapped_function_is_a_handler() -> None:
    """Decorators with `functools.wraps` keep the signature and the annotations."""

    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            return "wrapped", await function(*args, **kwargs)

        return wrapper

    @decorate
    async def move(conn: Any, *, to: Point) -> Any:
        return to

    assert await call(registered(move), {"to": {"x": 1}}) == ("wrapped", Point(1))


async def test_a_stream_is_an_async_generator() -> None:
    """What a stream declares is the type of its items."""

    async def count(conn: Any, to: int) -> AsyncIterator[Point]:
        for x in range(to):
            yield Point(x)

    async def bare(conn: Any):  # type: ignore[no-untyped-def]
        yield 1

    async def full(conn: Any) -> AsyncGenerator[int, None]:
        yield 1

    handler = registered(count)
    assert (handler.streams, handler.returns) == (True, Point)
    assert [item async for item in handler.call(CONN, 2)] == [Point(0), Point(1)]
    assert (registered(bare).streams, registered(bare).returns) == (True, None)
    assert registered(full).returns is int


@pytest.mark.parametrize(
    ("annotation", "returns"),
    [(None, None), (Any, None), (object, None), (Point, Point), (list[Point], list[Point])],
)
def test_the_return_annotation_is_the_shape_of_the_reply(annotation: Any, returns: Any) -> None:
    """A reply goes out as what was declared; nothing declared is its own class."""

    async def f(conn: Any) -> Any: ...

    f.__annotations__["return"] = annotation
    handler = registered(f)
    assert (handler.returns, handler.streams) == (returns, False)


@pytest.mark.parametrize("concurrent", [True, False])
def test_a_handler_may_run_beside_others(concurrent: bool) -> None:
    """``concurrent=True`` is kept with the handler."""
    assert registered(nothing, concurrent=concurrent).is_concurrent is concurrent


async def test_a_message_class_gives_type_and_payload() -> None:
    """``@ws.on(Say)`` structures to the class, with or without the annotation."""

    async def annotated(conn: Any, msg: Say) -> Any:
        return msg

    async def bare(conn, msg):  # type: ignore[no-untyped-def]
        return msg

    async def alone(conn: Any) -> Any:
        return "called"

    payload = {"text": "hi"}
    said = Say("hi")  # type: ignore[call-arg]
    assert registered(annotated, Say).type == "say"
    assert await call(registered(annotated, Say), payload) == said
    assert await call(registered(bare, Say), payload) == said
    assert await call(registered(alone, Say), payload) == "called"


# Every decorator returns the function unchanged


async def one(conn: Any) -> None: ...


async def two(conn: Any, other: Any) -> None: ...


async def three(conn: Any, envelope: Any, call_next: Any) -> None: ...


async def none() -> None: ...


DECORATORS: list[tuple[str, Callable[[Pachinko], Any], Any]] = [
    ("connect", lambda ws: ws.connect, one),
    ("accepted", lambda ws: ws.accepted, one),
    ("on", lambda ws: ws.on("t"), two),
    ("disconnect", lambda ws: ws.disconnect, one),
    ("fallback", lambda ws: ws.fallback, two),
    ("binary", lambda ws: ws.binary, two),
    ("middleware", lambda ws: ws.middleware, three),
    ("error", lambda ws: ws.error(ValueError), two),
    ("worker", lambda ws: ws.worker, none),
]
each_decorator = pytest.mark.parametrize(
    ("name", "decorator", "function"), DECORATORS, ids=[row[0] for row in DECORATORS]
)


@each_decorator
def test_a_decorator_returns_the_function(name: str, decorator: Any, function: Any) -> None:
    """So that a test can call it directly."""
    assert decorator(endpoint())(function) is function


@each_decorator
def test_what_is_not_async_is_refused(name: str, decorator: Any, function: Any) -> None:
    """A plain function is refused, with the right first line."""

    def plain(*args: Any) -> None: ...

    text = refusal(lambda: decorator(endpoint("/ws"))(plain))
    assert text.startswith(f"{place_of(plain)} is not async; write\n@ws.{name}")
    assert "\nasync def " in text


@each_decorator
def test_what_is_no_function_is_refused(name: str, decorator: Any, function: Any) -> None:
    """A value, or a coroutine that was called already, is refused."""
    text = refusal(lambda: decorator(endpoint("/ws"))(5))
    assert text.startswith(f"expected a function, got 5; write\n@ws.{name}")


@pytest.mark.parametrize(
    ("name", "decorator", "function"),
    [row for row in DECORATORS if row[0] not in ("on", "connect")],
    ids=[row[0] for row in DECORATORS if row[0] not in ("on", "connect")],
)
def test_only_message_handlers_stream(name: str, decorator: Any, function: Any) -> None:
    """A ``yield`` anywhere else is refused."""

    async def stream(*args: Any) -> Any:
        yield 1

    text = refusal(lambda: decorator(endpoint("/ws"))(stream))
    assert "has a `yield`, but only message handlers stream; write\n@ws." in text


@pytest.mark.parametrize(
    ("name", "arguments", "example"),
    [
        ("disconnect", ["", "conn, x"], "@ws.disconnect\nasync def leave(conn): ..."),
        ("fallback", ["", "conn", "conn, a, b"], "async def other(conn, frame: str): ..."),
        ("binary", ["conn", "conn, a, b"], "async def upload(conn, data: bytes): ..."),
        (
            "middleware",
            ["conn, call_next", "conn, envelope, call_next, x", "conn, *, envelope, call_next"],
            "async def timed(conn, envelope, call_next):\n    return await call_next()",
        ),
        ("worker", ["conn", "*, a"], "@ws.worker\nasync def clock(): ..."),
    ],
)
def test_wrong_parameters_are_refused(name: str, arguments: list[str], example: str) -> None:
    """The parameters of each kind of function are fixed, and shown."""
    for parameters in arguments:
        function = build(f"async def f({parameters}): ...")
        text = refusal(lambda function=function: getattr(endpoint(), name)(function))
        assert text.startswith(f"{place_of(function)} takes the wrong parameters: ")
        assert text.endswith(example)


@pytest.mark.parametrize("parameters", ["conn", "conn, exc, more", "conn, *, exc"])
def test_wrong_parameters_of_an_error_handler_are_refused(parameters: str) -> None:
    """The example names the class."""
    function = build(f"async def f({parameters}): ...")
    text = refusal(lambda: endpoint().error(KeyError)(function))
    assert text.endswith("@ws.error(KeyError)\nasync def failed(conn, exc): ...")


@pytest.mark.parametrize("name", ["disconnect", "fallback", "middleware", "worker"])
def test_defaults_and_variadic_parameters_fit(name: str) -> None:
    """What can be called in the right way is right."""
    function = build("async def f(*args, extra=1, **kwargs): ...")
    assert getattr(endpoint(), name)(function) is function


# Registration mistakes: message handlers


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ("", "takes no connection; write `async def f(conn, ...)`"),
        ("*, a", "takes no connection; write `async def f(conn, ...)`"),
        ("*args", "takes no connection; write `async def f(conn, ...)`"),
        (
            "conn, *args",
            "takes *args; name it: `(conn, *, text: str)` or `(conn, payload: dict)`",
        ),
        (
            "conn, **kwargs",
            "takes **kwargs; name it: `(conn, *, text: str)` or `(conn, payload: dict)`",
        ),
        (
            "conn, a: int, b: str = 'x'",
            "takes more than one payload; for its fields write `(conn, *, a: int, b: str = 'x')`",
        ),
        (
            "conn, a: int, *, b: int",
            "takes the payload whole and by fields; write `(conn, a: int)` or `(conn, *, b: int)`",
        ),
        (
            "conn, room: str",
            "takes 'room', a path parameter, which only connect handlers get; "
            "use `conn.params['room']`",
        ),
        (
            "conn, *, text: str, n: int",
            "takes 'n', a path parameter, which only connect handlers get; use `conn.params['n']`",
        ),
        ("conn, room, text", "takes 'room', a path parameter, .*`conn.params\\['room'\\]`"),
    ],
)
def test_a_wrong_signature_is_refused(parameters: str, says: str) -> None:
    """The text names the function, with file and line, and the corrected signature."""
    function = build(f"async def f({parameters}): ...")
    text = refusal(lambda: registered(function, path="/ws/{room}/{n:int}"))
    pattern = says if "\\" in says else re.escape(says)
    assert re.fullmatch(re.escape(place_of(function)) + " " + pattern, text)


def test_a_path_parameter_is_free_without_a_path() -> None:
    """Without a path there is nothing to mistake it for."""

    async def f(conn: Any, *, room: str) -> None: ...

    assert registered(f).defaults is not None


def test_a_second_handler_of_a_type_is_refused() -> None:
    """Both functions are named, with file and line."""
    ws = endpoint()

    @ws.on("say")
    async def first(conn: Any) -> None: ...

    async def second(conn: Any) -> None: ...

    for type in ("say", Say):
        text = refusal(lambda type=type: ws.on(type)(second))
        assert text.startswith("'say' has a handler: ")
        assert place_of(first) in text
        assert place_of(second) in text
        assert re.search(r"second\(\) at .*test_handlers.py:\d+\. Remove one", text)
    assert ws._routes.handlers["say"].function is first


def test_the_same_type_on_two_endpoints_is_fine() -> None:
    """Each endpoint has handlers of its own."""
    for ws in (endpoint(), endpoint()):
        ws.on("say")(nothing)


def test_a_partial_is_named_by_its_function() -> None:
    """Where a partial comes from says nothing; what it calls does."""

    async def send(room: str, conn: Any) -> None: ...

    assert place_of(functools.partial(functools.partial(send, "lobby"))) == place_of(send)


@pytest.mark.parametrize("name", ["fallback", "binary"])
def test_a_second_one_is_refused(name: str) -> None:
    """There is one fallback and one handler for binary frames."""
    ws = endpoint()
    getattr(ws, name)(two)

    async def second(conn: Any, x: Any) -> None: ...

    text = refusal(lambda: getattr(ws, name)(second))
    assert name in text
    assert place_of(two) in text
    assert place_of(second) in text


def test_a_second_handler_of_an_error_is_refused() -> None:
    """One handler a class of errors; a subclass may have another."""
    ws = endpoint()
    ws.error(LookupError)(two)
    ws.error(KeyError)(two)
    text = refusal(lambda: ws.error(LookupError)(two))
    assert text.startswith("LookupError has a handler: ")


@pytest.mark.parametrize("type", ["", "error", "complete", "gap", "resume", "$x", "say.reply"])
def test_a_reserved_type_is_refused(type: str) -> None:
    """The library's own types have no handlers."""
    text = refusal(lambda: endpoint().on(type)(nothing))
    assert text.startswith(f"{type!r} is reserved")
    assert 'such as "chat.say"' in text


class Types(str, enum.Enum):  # noqa: UP042 - its members are formatted as their names
    ROOM, SAY = "room", "room.say"


class Names(enum.StrEnum):
    ROOM, SAY = "room", "room.say"


class Text(str):
    def __format__(self, spec: str) -> str:
        return "another text"


@pytest.mark.parametrize("kind", [Types, Names, Text])
@pytest.mark.parametrize("how", ["on", "message", "stream", "resource", "include"])
async def test_a_type_may_be_a_member_of_an_enum(kind: Any, how: str) -> None:
    """It is what it is on the wire, for whatever registers it."""
    ws, inner = endpoint("/ws"), Pachinko()
    if how == "on":
        ws.on(kind("room.say"))(nothing)
    elif how == "message":
        cls: Any = message(kind("room.say"))(type("Said", (), {}))
        ws.on(cls)(nothing)
    elif how == "stream":

        @ws.on(kind("room.say"))
        async def count(conn: Any) -> AsyncIterator[int]:
            yield 1

    elif how == "resource":

        class Room:
            async def on_say(self, conn: Any) -> None: ...

        ws.add_resource(kind("room"), Room())
    else:
        inner.on("say")(nothing)
        ws.include(inner, prefix=kind("room"))
    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        answer = await client.ask("room.say")
        assert answer["type"] == "room.say.reply" and answer["id"] == 1


@pytest.mark.parametrize("type", [Types("room"), Names("room")])
def test_two_handlers_of_one_type_are_told_by_the_type_on_the_wire(type: Any) -> None:
    """However it is written."""
    ws = endpoint()
    ws.on("room")(nothing)
    assert refusal(lambda: ws.on(type)(nothing)).startswith("'room' has a handler")


def test_an_unknown_name_in_an_annotation_is_refused() -> None:
    """The name and the function are named, and what to do."""
    function = build("from __future__ import annotations\nasync def f(conn, to: Missing): ...")
    text = refusal(lambda: registered(function))
    assert f"the payload of {place_of(function)} cannot be structured: name 'Missing'" in text
    assert "Define or import names above the handler" in text


class Plain:
    def __init__(self, x: int) -> None:
        self.x = x


@attrs.define
class HasPlain:
    inner: Plain


@dataclasses.dataclass
class DataPlain:
    inner: HasPlain


PLAIN: list[Any] = [
    Plain, list[Plain], dict[str, Plain], dict[Plain, int], tuple[int, Plain], Plain | None,
    Plain | str, HasPlain, DataPlain, list[HasPlain], HasPlain | None, Callable[[], int],
    set[Plain], list["Missing"], type, print,  # type: ignore[name-defined]  # noqa: F821 - missing
]  # fmt: skip


@pytest.mark.parametrize("annotation", PLAIN, ids=str)
@pytest.mark.parametrize("kind", ["payload", "field"])
def test_what_cannot_be_structured_is_refused(annotation: Any, kind: str) -> None:
    """A class that is no message is refused at any depth, with what may be used instead."""
    star = "*, " if kind == "field" else ""
    function = build(f"async def f(conn, {star}x: A): ...", A=annotation)
    text = refusal(lambda: registered(function))
    assert f"the payload of {place_of(function)} cannot be structured" in text
    assert "use attrs classes, dataclasses, TypedDict" in text
    assert "hub.configure(converter=...)" in text


def test_a_plain_class_is_told_what_it_lacks() -> None:
    """The text names the class, also when it is inside another."""
    function = build("async def f(conn, x: A): ...", A=HasPlain)
    assert "put @attrs.frozen above Plain" in refusal(lambda: registered(function))


@pytest.mark.parametrize(
    "source",
    [
        "f(msg: str)", "f(text: dict, conn)", "f(n: int, *, a: int)", "f(n: list[int])",
        "f(at: int | None)", "f(a: Say)", "f(a: Point)", "f(a: DataPlain)", "f(a: set[str])",
    ],
)  # fmt: skip
def test_a_forgotten_connection_is_noticed(source: str) -> None:
    """A first parameter that is annotated as a payload stands where the connection belongs."""
    names = {each.__name__: each for each in (Say, Point, DataPlain)}
    text = refusal(lambda: registered(build(f"async def {source}: ...", **names)))
    first = source[2:].partition(",")[0].rstrip(")")
    assert text.endswith(
        f"takes `{first}` first, where the connection comes; write `async def f(conn, {first})`"
    )


def test_a_method_without_self_is_told_so() -> None:
    """The corrected code has both."""

    class Resource:
        async def on_a(conn) -> None: ...  # type: ignore[no-untyped-def]  # noqa: N805 - the mistake

    assert "write `async def on_a(self, conn, ...)`" in refusal(
        lambda: endpoint().add_resource("x", Resource())
    )


def test_the_corrected_code_has_the_functions_own_parameters() -> None:
    """What is not async is shown as it should be."""

    def add(conn: Any, *, a: int, b: int = 0) -> int:
        return a + b

    text = refusal(lambda: endpoint().on("sum")(add))
    assert text.endswith(
        '@ws.on("sum")\nasync def add(conn: Any, *, a: int, b: int = 0) -> int: ...'
    )


def test_a_generic_class_without_its_parameter_is_refused() -> None:
    """What its fields are is not known."""

    @attrs.define
    class Box(Generic[T]):
        item: T

    async def f(conn: Any, box: Box) -> None: ...  # type: ignore[type-arg]

    assert "Box is generic; write Box[int], say" in refusal(lambda: registered(f))


@pytest.mark.parametrize("annotation", [Point, str, "Point"])
def test_another_class_than_that_of_the_message_is_refused(annotation: Any) -> None:
    """``@ws.on(Say)`` wants ``msg: Say``."""

    async def move(conn: Any, msg: Any) -> None: ...

    move.__annotations__["msg"] = annotation
    text = refusal(lambda: registered(move, Say))
    assert text == f"{place_of(move)} handles Say; write async def move(conn, msg: Say)"


def test_fields_for_a_message_class_are_taken_or_refused() -> None:
    """Keyword-only fields beside a class are taken as they are written."""

    async def say(conn: Any, *, text: str) -> None: ...

    assert registered(say, Say).defaults is not None


def test_on_without_parentheses_is_refused() -> None:
    """``@ws.on`` above a function shows what it lacks."""
    text = refusal(lambda: endpoint().on(nothing))  # type: ignore[arg-type]
    assert text.startswith('@ws.on takes a type or a class with @message: write @ws.on("say")')


@pytest.mark.parametrize("other", [Point, Plain, None, 5, b"say"])
def test_on_with_what_has_no_type_is_refused(other: Any) -> None:
    """A class without ``@message`` has no type, and is told to take one."""
    cure = f'@message("say") above {other.__name__}' if isinstance(other, type) else '@ws.on("say")'
    assert f"write {cure};" in refusal(lambda: endpoint().on(other))


def test_on_with_a_subclass_of_a_message_is_refused() -> None:
    """A subclass does not inherit the type."""

    class Shout(Say):
        pass

    assert "@message" in refusal(lambda: endpoint().on(Shout))


# Registration mistakes: connect


@pytest.mark.parametrize(
    ("parameters", "params"),
    [
        ("conn", {}), ("conn, room", {"room": "a"}), ("conn, n, room", {"room": "a", "n": 1}),
        ("conn, *, n", {"n": 1}), ("conn, **params", {"room": "a", "n": 1}),
        ("conn, n, **rest", {"room": "a", "n": 1}), ("conn, /, room='x'", {"room": "a"}),
        ("conn, other=1", {}), ("room", {}),
    ],
)  # fmt: skip
async def test_connect_takes_any_path_parameters(parameters: str, params: Any) -> None:
    """Any subset by name, or all of them; the first parameter is the connection."""
    function = build(f"async def f({parameters}): return locals()")
    ws = endpoint("/ws/{room}/{n:int}")
    assert ws.connect(function) is function
    conn = Conn({"room": "a", "n": 1})
    found = await ws._routes.connect[0](conn)  # type: ignore[arg-type]
    (first, *_) = found
    assert found.pop(first) is conn
    found = {**found, **found.pop("params", {}), **found.pop("rest", {})}
    assert {name: found[name] for name in params} == params


class Conn:
    def __init__(self, params: dict[str, Any]) -> None:
        self.params = params


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ("conn, rom", "takes rom; /ws/{room}/{n:int} has room, n; write\n"),
        ("conn, rom: str, x", "takes rom: str, x; /ws/{room}/{n:int} has room, n; write\n"),
        ("conn, *, rom", "takes rom; "),
        ("conn, room, /", "takes room; "),
        ("conn, *args", "takes *args; "),
        ("", "takes no connection; /ws/{room}/{n:int} has room, n; write\n"),
        ("room: str, n: int", "takes no connection; "),
        ("name: str", "takes no connection; "),
        ("*, room", "takes no connection; "),
        ("**params", "takes no connection; "),
        ("*args", "takes no connection; "),
    ],
)
def test_a_wrong_connect_handler_is_refused(parameters: str, says: str) -> None:
    """The text shows the parameters that the path has."""
    function = build(f"async def f({parameters}): ...")
    text = refusal(lambda: endpoint("/ws/{room}/{n:int}").connect(function))
    assert text.startswith(f"{place_of(function)} {says}")
    assert text.endswith("@ws.connect\nasync def arrive(conn, room, n): ...")


def test_a_path_without_parameters_says_so() -> None:
    """There is nothing to take."""
    function = build("async def f(conn, room): ...")
    assert "/ws has no parameters" in refusal(lambda: endpoint("/ws").connect(function))


def test_without_a_path_any_name_may_be_a_parameter() -> None:
    """A resource that is routed by hand learns its parameters from Falcon."""
    function = build("async def f(conn, room, *, n): ...")
    assert endpoint().connect(function) is function


@pytest.mark.parametrize(
    "decorator",
    ["authenticate", "connect", "disconnect", "fallback", "binary", "middleware", "worker"],
)
def test_decorators_with_parentheses_are_refused(decorator: str) -> None:
    """The corrected code has none."""
    text = refusal(getattr(endpoint(), decorator))
    assert text.startswith(f"expected a function, got None; write\n@ws.{decorator}\nasync def ")


# Registration mistakes: error handlers


@pytest.mark.parametrize("other", [two, ValueError("x"), "ValueError", 5, int, BaseException, None])
def test_error_takes_a_class_of_exceptions(other: Any) -> None:
    """``@ws.error`` without its class is refused, with an example."""
    text = refusal(lambda: endpoint().error(other))
    assert text.startswith("write @ws.error(ValueError), a class; got ")


def test_error_without_a_class_is_refused() -> None:
    """``@ws.error()`` lacks the class."""
    with pytest.raises((PachinkoError, TypeError)):
        endpoint().error()  # type: ignore[call-arg]


class Own(LookupError):
    pass


class OwnMessageError(MessageError):
    pass


async def handler_a(conn: Any, exc: Any) -> None: ...


async def handler_b(conn: Any, exc: Any) -> None: ...


@pytest.mark.parametrize(
    ("errors", "exc", "found"),
    [
        ({}, ValueError(), None),
        ({ValueError: handler_a}, ValueError(), handler_a),
        ({ValueError: handler_a}, KeyError(), None),
        ({LookupError: handler_a, KeyError: handler_b}, KeyError(), handler_b),
        ({LookupError: handler_a, KeyError: handler_b}, Own(), handler_a),
        ({Exception: handler_a}, Own(), handler_a),
        ({Exception: handler_a}, MessageError("x"), None),
        ({Exception: handler_a}, Close(), None),
        ({Exception: handler_a}, falcon.HTTPNotFound(), None),
        ({Exception: handler_a}, falcon.WebSocketDisconnected(1000), None),
        ({MessageError: handler_a}, OwnMessageError("x"), handler_a),
        ({falcon.HTTPError: handler_a}, falcon.HTTPNotFound(), handler_a),
        ({OwnMessageError: handler_a}, MessageError("x"), None),
    ],
)
def test_the_nearest_error_handler_is_found(errors: Any, exc: Any, found: Any) -> None:
    """By the order of the classes of the exception; the library's own count as handled."""
    assert Routes(errors=errors).error_handler(exc) is found


# Resources


class Room:
    """A resource with all kinds of methods."""

    on_this_day = None

    async def on_connect(self, conn: Any, room: str) -> None: ...

    async def on_disconnect(self, conn: Any) -> None: ...

    async def on_send(self, conn: Any, *, text: str) -> Any:
        return self, text

    async def on_count_up(self, conn: Any) -> AsyncIterator[int]:
        yield 1

    async def helper(self) -> None: ...


del Room.on_this_day


async def test_a_resource_is_routed_by_its_methods() -> None:
    """``on_send`` handles ``"<prefix>.send"`` on the one instance."""
    ws, room = endpoint("/ws/{room}"), Room()
    ws.add_resource("chat", room)
    handlers = ws._routes.handlers
    assert sorted(handlers) == ["chat.count_up", "chat.send"]
    assert await call(handlers["chat.send"], {"text": "hi"}) == (room, "hi")
    assert handlers["chat.count_up"].streams
    assert len(ws._routes.connect) == 1
    assert ws._routes.disconnect == [room.on_disconnect]


def test_methods_of_a_base_class_are_routed() -> None:
    """Inherited methods count."""

    class Sub(Room):
        pass

    ws = endpoint("/ws/{room}")
    ws.add_resource("chat", Sub())
    assert "chat.send" in ws._routes.handlers


def test_two_resources_share_an_endpoint() -> None:
    """By their prefixes; the same prefix twice is a duplicate type."""
    ws = endpoint("/ws/{room}")
    ws.add_resource("a", Room())
    ws.add_resource("b", Room())
    assert "'a.count_up' has a handler: " in refusal(lambda: ws.add_resource("a", Room()))


def resource(**methods: Any) -> Any:
    return type("Chat", (), methods)()


VERBS = ["get", "post", "put", "delete", "patch", "head", "options", "move", "report"]


@pytest.mark.parametrize("name", VERBS)
async def test_the_name_of_an_http_method_may_be_a_messages(name: str) -> None:
    """``todo.delete`` is a message like any other."""

    async def method(self: Any, conn: Any, *, id: int) -> int:
        return id

    ws = endpoint()
    ws.add_resource("todo", resource(**{f"on_{name}": method}))
    assert await call(ws._routes.handlers[f"todo.{name}"], {"id": 5}) == 5


async def responder_by_name(self: Any, req: Any, resp: Any) -> None: ...


async def responder_by_its_name(self: Any, request: Any, response: Any) -> None: ...


async def responder_by_type(self: Any, r: falcon.asgi.Request, _: Any) -> None: ...


async def responder_by_base(self: Any, r: "falcon.Request", *_: Any) -> None: ...


class OwnRequest(falcon.asgi.Request):
    pass


async def responder_by_own(self: Any, r: OwnRequest, _: Any, id: int) -> None: ...


RESPONDERS = [
    responder_by_name, responder_by_its_name, responder_by_type, responder_by_base, responder_by_own
]  # fmt: skip


@pytest.mark.parametrize("responder", RESPONDERS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("name", [*VERBS, "websocket", "get_all", "delete_one"])
def test_a_responder_of_falcons_is_no_message_handler(name: str, responder: Any) -> None:
    """A request comes first. So one class may be both."""
    ws = endpoint()
    ws.add_resource("todo", resource(**{f"on_{name}": responder}, on_say=on_say))
    assert [*ws._routes.handlers] == ["todo.say"]


def test_only_responders_are_nothing_to_route() -> None:
    """A class for HTTP alone has no messages."""
    text = refusal(lambda: endpoint().add_resource("todo", resource(on_get=responder_by_name)))
    assert text.startswith("Chat has no method to route; write\n")


@pytest.mark.parametrize("name", ["say", "getting", "get2", "connect"])
def test_other_methods_do_not_go_by_a_name(name: str) -> None:
    """What takes a parameter called `req` is Falcon's only for the names of HTTP methods."""

    async def method(self: Any, req: Any) -> None: ...

    ws = endpoint()
    ws.add_resource("todo", resource(**{f"on_{name}": method}))
    assert len(ws._routes.handlers) + len(ws._routes.connect) == 1


async def test_one_class_may_serve_http_and_messages() -> None:
    """The same instance is a resource of Falcon's and of Pachinko's."""

    class Todo:
        def __init__(self) -> None:
            self.items: list[str] = ["a"]

        async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
            resp.media = self.items

        async def on_get_first(self, req: Any, resp: Any) -> None:
            resp.media = self.items[0]

        async def on_delete(self, conn: Any) -> list[str]:
            self.items.clear()
            return self.items

    app, todo = new_app(), Todo()
    ws = Pachinko(app, "/ws", hub=Hub())
    ws.add_resource("todo", todo)
    app.add_route("/todo", todo)
    app.add_route("/first", todo, suffix="first")
    assert [*ws._routes.handlers] == ["todo.delete"]
    async with falcon.testing.ASGIConductor(app) as http:
        assert (await http.simulate_get("/todo")).json == ["a"]
        assert (await http.simulate_get("/first")).json == "a"
    async with simulated(app) as server, connect(server.url + "/ws") as client:
        assert (await client.ask("todo.delete"))["payload"] == []


def test_on_websocket_is_never_a_message_handler() -> None:
    """``on_websocket`` means a handshake to Falcon, and so to the reader."""

    async def method(self: Any, conn: Any) -> None: ...

    text = refusal(lambda: endpoint().add_resource("chat", resource(on_websocket=method)))
    assert text.startswith("Falcon routes Chat.on_websocket itself")
    assert "on_websocket_message" in text


def test_a_property_with_the_name_of_an_http_method_is_refused() -> None:
    """It is not run to find out what it takes."""
    on_get = property(lambda self: pytest.fail("the property was run"))
    text = refusal(lambda: endpoint().add_resource("chat", resource(on_get=on_get)))
    assert text.startswith("Chat.on_get is a property")


def test_a_resource_without_methods_is_refused() -> None:
    """The example shows one."""
    text = refusal(lambda: endpoint().add_resource("chat", resource()))
    assert "async def on_send(self, conn, *, text: str): ..." in text


def test_a_class_as_resource_is_refused() -> None:
    """The hint has the parentheses."""
    text = refusal(lambda: endpoint().add_resource("chat", Room))
    assert text.endswith('write ws.add_resource("chat", Room())')


@pytest.mark.parametrize("prefix", ["", None, 5, b"chat", Room()])
def test_a_prefix_is_a_text(prefix: Any) -> None:
    """An empty prefix would give types that start with a dot."""
    text = refusal(lambda: endpoint().add_resource(prefix, Room()))
    assert 'write ws.add_resource("chat", resource)' in text


def test_a_property_of_a_resource_is_refused() -> None:
    """A property is no method, and is not run to find out."""
    on_send = property(lambda self: pytest.fail("the property was run"))
    text = refusal(lambda: endpoint().add_resource("chat", resource(on_send=on_send)))
    assert text.startswith("Chat.on_send is a property; write async def on_send(self, conn)")


def test_a_method_that_is_not_async_is_refused() -> None:
    """As in the function form."""

    def on_send(self: Any, conn: Any) -> None: ...

    text = refusal(lambda: endpoint().add_resource("chat", resource(on_send=on_send)))
    assert "is not async; write\n" in text


@pytest.mark.parametrize("prefix", ["$chat", "$"])
def test_a_reserved_prefix_is_refused(prefix: str) -> None:
    """The types that it makes are checked like any other."""
    assert "is reserved" in refusal(lambda: endpoint("/{room}").add_resource(prefix, Room()))


def test_a_method_called_reply_is_refused() -> None:
    """``<prefix>.reply`` is a reply's type."""

    async def on_reply(self: Any, conn: Any) -> None: ...

    text = refusal(lambda: endpoint().add_resource("chat", resource(on_reply=on_reply)))
    assert text.startswith("'chat.reply' is reserved")


# The endpoint


def test_a_wsgi_app_is_refused() -> None:
    """WebSockets need ASGI."""
    text = refusal(lambda: Pachinko(falcon.App(), "/ws", hub=Hub()))  # type: ignore[arg-type]
    assert text.startswith("WebSockets need app = falcon.asgi.App()")


@pytest.mark.parametrize("path", ["ws", "", None, 5])
def test_a_path_has_a_leading_slash(path: Any) -> None:
    """An app needs a path, and the path a slash."""
    text = refusal(lambda: Pachinko(new_app(), path, hub=Hub()))
    assert text.startswith('a path has a leading slash: Pachinko(app, "/ws")')


def test_a_path_needs_an_app() -> None:
    """A path alone is half of it."""
    assert "falcon.asgi.App()" in refusal(lambda: Pachinko(None, "/ws", hub=Hub()))


@pytest.mark.parametrize("path", ["/ws", "/ws/{room}"])
def test_a_second_pachinko_on_a_path_is_refused(path: str) -> None:
    """Falcon would silently replace the first."""
    app = new_app()
    Pachinko(app, path, hub=Hub())
    text = refusal(lambda: Pachinko(app, path, hub=Hub()))
    assert text == f"{path} has a Pachinko already; use that one, or another path"
    Pachinko(app, "/other", hub=Hub())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"overflow": "block"}, 'overflow is "close", "drop_oldest" or "replay", got \'block\''),
        ({"overflow": None}, 'overflow is "close", "drop_oldest" or "replay", got None'),
        ({"rate": 5}, "rate is (messages, seconds), such as (20, 1.0), got 5"),
        ({"rate": (0, 1)}, "rate is (messages, seconds)"),
        ({"rate": (1, 0)}, "rate is (messages, seconds)"),
        ({"rate": (1,)}, "rate is (messages, seconds)"),
        ({"rate": (1, 2, 3)}, "rate is (messages, seconds)"),
        ({"rate": ("1", "s")}, "rate is (messages, seconds)"),
        ({"outbox": 0}, "outbox is a number of messages, at least 1, got 0"),
        ({"outbox": "9"}, "outbox is a number of messages, at least 1, got '9'"),
        ({"outbox": True}, "outbox is a number"),
        ({"origins": 5}, "origins is a list of str"),
        ({"outbox_bytes": 0}, "outbox_bytes is a number of bytes, at least 1"),
        ({"max_size": 0}, "max_size is a number of bytes, at least 1"),
        ({"max_concurrent": 0}, "max_concurrent is a number of tasks, at least 1"),
        ({"max_groups": 0}, "max_groups is a number of groups, at least 1"),
        ({"handler_timeout": 0}, "handler_timeout is a number of seconds above 0, or None, got 0"),
        ({"handler_timeout": "5"}, "handler_timeout is a number of seconds above 0, or None"),
        ({"auth_timeout": 0}, "auth_timeout is a number of seconds above 0, got 0"),
        ({"send_timeout": float("inf")}, "send_timeout is a number of seconds"),
        ({"send_timeout": -1}, "send_timeout is a number of seconds, at least 0, got -1"),
        ({"send_timeout": None}, "send_timeout is a number of seconds, at least 0"),
        ({"linger": -0.5}, "linger is a number of seconds, at least 0"),
        ({"linger": float("nan")}, "linger is a number of seconds, at least 0"),
        (
            {"origins": "https://example.com"},
            "origins is a list of str; write origins=['https://example.com']",
        ),
        ({"origins": [5]}, "origins is a list of str"),
        (
            {"origins": ["https://example.com/chat"]},
            'origins are like "https://example.com", "https://*.example.com" (every host below it) '
            "or \"*\", in ASCII as browsers send them; got 'https://example.com/chat'",
        ),
        ({"origins": ["example.com"]}, "origins are like"),
        ({"origins": ["https://example.com?x=1"]}, "origins are like"),
        ({"subprotocols": "v1"}, "subprotocols is a list of str; write subprotocols=['v1']"),
        ({"subprotocols": [1]}, "subprotocols is a list of str"),
    ],
)
def test_a_wrong_option_is_refused(options: Any, says: str) -> None:
    """The text names the option, what it takes, and what it got."""
    assert refusal(lambda: endpoint(**options)).startswith(says)


@pytest.mark.parametrize(
    "options",
    [
        {"overflow": "drop_oldest"}, {"rate": (20, 1)}, {"rate": (1, 0.5)}, {"rate": None},
        {"max_groups": 1}, {"handler_timeout": None}, {"handler_timeout": 0.1},
        {"auth_timeout": 0.1}, {"trust_forwarded": True}, {"outbox": 1}, {"send_timeout": 0.0},
        {"send_timeout": 5}, {"linger": 0},
        {"origins": "*"}, {"origins": []},
        {"origins": ("https://example.com", "http://localhost:5173")},
        {"subprotocols": ["v1", "v2"]},
    ],
)  # fmt: skip
def test_a_right_option_is_taken(options: Any) -> None:
    """The bounds are inclusive."""
    assert endpoint(**options)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/ws", []), ("/ws/{room}", ["room"]), ("/{a}/x/{b:int}", ["a", "b"]),
        ("/{a:int(min=1)}.{b}", ["a", "b"]), ("/{path:path}", ["path"]),
    ],
)  # fmt: skip
def test_the_parameters_of_a_path(path: str, names: list[str]) -> None:
    """A Falcon template's names, without their converters."""
    assert [*pachinko.path_types(path, None)] == names


# In an app


async def test_the_parts_work_together() -> None:
    """Fields, a message class, a stream and a resource, from a client's side."""
    app = new_app()
    ws = Pachinko(app, "/ws/{room}", hub=Hub())

    @ws.on("sum")
    async def add(conn: Any, *, a: int, b: int = 0) -> int:
        return a + b

    @ws.on(Say)
    async def say(conn: Any, msg: Say) -> Say:
        return Say(msg.text.upper())  # type: ignore[call-arg]

    @ws.on("level")
    async def level(conn: Any, level: Literal[1, 2]) -> str:
        return f"{conn.params['room']} {level}"

    ws.add_resource("room", Room())
    async with simulated(app) as server, connect(server.url + "/ws/lobby") as client:
        answer = await client.ask("sum", {"a": 1, "b": 2}, 7)
        assert answer == {"type": "sum.reply", "id": 7, "payload": 3}
        answer = await client.ask("say", {"text": "hi"}, "x")
        assert answer == {"type": "say", "id": "x", "payload": {"text": "HI", "loud": False}}
        assert (await client.ask("level", 2))["payload"] == "lobby 2"
        answer = await client.ask("sum", {"a": "1", "b": None})
        assert answer["payload"]["errors"] == [
            {"path": "$.payload.a", "message": "expected int, got str"},
            {"path": "$.payload.b", "message": "expected int, got null"},
        ]
        assert (await client.ask("room.count_up"))["more"] is True


def test_a_hub_that_is_none_is_refused() -> None:
    """`hub=` takes a `Hub`."""
    hub: Any = 5
    assert refusal(lambda: Pachinko(hub=hub)) == "write hub=Hub() for a hub of its own, got 5"


# A resource is added all or nothing


def snapshot(ws: Pachinko) -> list[Any]:
    """What an endpoint has registered."""
    routes = ws._routes
    return [
        dict(routes.handlers), list(routes.connect), list(routes.disconnect),
        list(routes.middleware), dict(routes.errors), list(routes.workers), routes.authenticate,
        routes.fallback, routes.binary, {frame.handler for frame in routes.frames},
    ]  # fmt: skip


async def on_say(self: Any, conn: Any, *, text: str) -> str:
    return text


async def on_walk(self: Any, conn: Any, to: Point) -> Point:
    return to


async def on_connect(self: Any, conn: Any) -> None: ...


async def on_disconnect(self: Any, conn: Any) -> None: ...


async def too_many(self: Any, conn: Any, *parts: Any) -> None: ...


async def unknown(self: Any, conn: Any, payload: complex) -> None: ...


async def ambiguous(self: Any, conn: Any) -> list[Say] | list[Point]: ...  # type: ignore[empty-body]  # is not called


async def no_connection(self: Any) -> None: ...


def not_async(self: Any, conn: Any) -> None: ...


BAD_METHODS: list[dict[str, Any]] = [
    {"on_zoom": too_many}, {"on_zoom": unknown}, {"on_zoom": ambiguous}, {"on_zoom": not_async},
    {"on_zoom": no_connection}, {"on_zoom": 5}, {"on_reply": on_say},
    {"on_websocket": on_say}, {"on_delete": not_async}, {"on_get": 5},
    {"on_taken": on_say}, {"on_connect": not_async}, {"on_connect": no_connection},
    {"on_disconnect": on_say}, {"on_disconnect": not_async},
    {"on_disconnect": no_connection},
]  # fmt: skip


@pytest.mark.parametrize("has_started", [False, True])
@pytest.mark.parametrize("methods", BAD_METHODS, ids=str)
async def test_nothing_of_a_refused_resource_stays(methods: Any, has_started: bool) -> None:
    """The corrected resource is no second one."""
    ws = endpoint()

    @ws.on("room.taken")
    async def taken(conn: Any) -> None: ...

    if has_started:
        await ws.process_startup({}, {})
    good = {
        "on_say": on_say, "on_walk": on_walk, "on_connect": on_connect,
        "on_disconnect": on_disconnect,
    }  # fmt: skip
    before = snapshot(ws)
    refusal(lambda: ws.add_resource("room", resource(**{**good, **methods})))
    assert snapshot(ws) == before
    ws.add_resource("room", resource(**good))
    assert set(ws._routes.handlers) == {"room.taken", "room.say", "room.walk"}
    assert len(ws._routes.connect) == len(ws._routes.disconnect) == 1
    if has_started:
        assert len(ws._routes.frames) == 3
        await ws.process_shutdown({}, {})


@pytest.mark.parametrize(
    "register",
    [
        lambda ws: ws.on("zoom")(too_many),
        lambda ws: ws.on("zoom")(not_async),
        lambda ws: ws.on("taken")(ambiguous),
        lambda ws: ws.connect(not_async),
        lambda ws: ws.disconnect(not_async),
        lambda ws: ws.authenticate(not_async),
        lambda ws: ws.fallback(not_async),
        lambda ws: ws.binary(not_async),
        lambda ws: ws.middleware(not_async),
        lambda ws: ws.worker(not_async),
        lambda ws: ws.error(ValueError)(not_async),
    ],
)
@pytest.mark.parametrize("has_started", [False, True])
async def test_nothing_of_a_refused_function_stays(register: Any, has_started: bool) -> None:
    """A registration that raises has no effect."""
    ws = endpoint()

    @ws.on("taken")
    async def taken(conn: Any) -> None: ...

    if has_started:
        await ws.process_startup({}, {})
    before = snapshot(ws)
    refusal(lambda: register(ws))
    assert snapshot(ws) == before
    if has_started:
        await ws.process_shutdown({}, {})


async def test_nothing_of_a_resource_stays_whose_frames_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also an error that nobody has foreseen leaves a started endpoint as it was."""
    ws = endpoint()
    await ws.process_startup({}, {})
    before = snapshot(ws)
    made: list[str] = []

    def frame_class(codec: Any, type: str, annotation: Any, handler: Any) -> Any:
        made.append(type)
        if len(made) == 2:
            raise ZeroDivisionError
        return pachinko.frame_class(type, annotation)

    monkeypatch.setattr(pachinko.Codec, "frame_class", frame_class)
    with pytest.raises(ZeroDivisionError):
        ws.add_resource("room", resource(on_say=on_say, on_walk=on_walk, on_connect=on_connect))
    assert snapshot(ws) == before
    await ws.process_shutdown({}, {})


# What a reply may be


@attrs.define
class Wrapped:
    points: list[Point] | list[Say] | None = None


@pytest.mark.parametrize(
    "returns",
    [
        list[Say] | list[Point], dict[str, Say] | dict[str, Point] | None, Wrapped,
        list[Wrapped], tuple[int, list[Say] | list[Point]],
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("streams", [False, True])
def test_a_reply_that_may_lose_fields_is_refused(returns: Any, streams: bool) -> None:
    """What was refused, why, and what to write; for the items of a stream as well."""

    async def get(conn: Any): ...  # type: ignore[no-untyped-def]  # no annotation is the case

    async def each(conn: Any):  # type: ignore[no-untyped-def]  # no annotation is the case
        yield 1

    function: Any = each if streams else get
    function.__annotations__["return"] = AsyncIterator[returns] if streams else returns
    text = refusal(lambda: registered(function))
    assert text.startswith(f"the reply of {place_of(function)} is ambiguous: ")
    assert re.search(r"write (list|dict)\[(str, )?(Say \| Point|Point \| Say)\]$", text)


async def test_metadata_without_a_hash_makes_no_difference() -> None:
    """Alone, in fields and in a reply, `Annotated` may say anything."""
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())

    @ws.on("one")
    async def one(conn: Any, n: Annotated[int, {"a": 1}]) -> Annotated[int, []]:
        return n + 1

    @ws.on("two")
    async def two(conn: Any, *, n: Annotated[int, {"a": 1}], m: Annotated[int, []] = 2) -> int:
        return n + m

    async with simulated(app) as server, connect(server.url + "/ws") as client:
        assert (await client.ask("one", 5))["payload"] == 6
        assert (await client.ask("two", {"n": 5}))["payload"] == 7
        assert (await client.ask("one", "5"))["payload"]["errors"] == [
            {"path": "$.payload", "message": "expected int, got str"}
        ]


async def test_a_hint_keeps_no_handler_alive(caplog: pytest.LogCaptureFixture) -> None:
    """A handler to which the hint was given goes with its endpoint."""

    async def say(conn: Any, text: str) -> None: ...

    handler = registered(say)
    with pytest.raises(MessageError):
        await call(handler, {"text": "hi"})
    assert len(caplog.records) == 1
    caplog.clear()
    dead = [weakref.ref(handler), weakref.ref(say)]
    del handler, say
    gc.collect()
    assert [ref() for ref in dead] == [None, None]
