"""The section "signatures": what is read from a function, and what is refused with which text."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, NewType, TypedDict
from uuid import UUID

import attrs
import falcon.asgi
import falcon.routing
import falcon.testing
import msgspec
import pytest
import typing_extensions
from support import new_app

import pachinko
from pachinko import Hub, Pachinko, PachinkoError, message, place_of

CONN: Any = object()
PATH = "/ws/{room}/{n:int}"


@message("said")
class Said:
    text: str


@attrs.frozen
class Point:
    x: int


class Db:
    """What a server holds, and no client sends."""

    def __repr__(self) -> str:
        return "<Db postgres://secret>"


DB = Db()


def endpoint(path: str = PATH) -> Pachinko:
    return Pachinko(falcon.asgi.App(), path, hub=Hub())


def registered(function: Any) -> Any:
    """The `Handler` made of *function*."""
    ws = endpoint()
    ws.on("t")(function)
    return ws._routes.handlers["t"]


async def call(handler: Any, payload: Any = msgspec.UNSET) -> Any:
    """What the function returns for *payload*."""
    return await handler.call(CONN, handler.structure(payload, Hub().state.codec))


def refusal(register: Callable[[], Any]) -> str:
    """The text of the `PachinkoError` that *register* raises. It shows no object."""
    with pytest.raises(PachinkoError) as caught:
        register()
    text = str(caught.value)
    assert not re.search(r" at 0x|<function|<class|secret", text), text
    return text


def corrected(text: str) -> str:
    """The code behind "write" in *text*, which compiles."""
    code = text.partition("write\n")[2]
    assert code, text
    compile(code, "<corrected>", "exec")
    return code


def build(source: str, future: bool = True, **names: Any) -> Any:
    """What *source* defines as `f`, in a module of its own that has *names*."""
    line = "from __future__ import annotations\n" if future else ""
    code = compile(line + textwrap.dedent(source), "built.py", "exec", dont_inherit=True)
    exec(code, names := {"__name__": "built", "Any": Any, **names})
    return names["f"]


# Only what is needed is resolved


DECORATORS: dict[str, tuple[Callable[[Pachinko], Any], str]] = {
    "on": (lambda ws: ws.on("t"), "conn: Connection"),
    "on with a payload": (lambda ws: ws.on("t"), "conn: Connection, text: str"),
    "on with fields": (lambda ws: ws.on("t"), "conn: Connection, *, text: str, m: int = 0"),
    "connect": (lambda ws: ws.connect, "conn: Connection, room: str, *, other: Thing = 5"),
    "authenticate": (lambda ws: ws.authenticate, "conn: Connection, token: str | None"),
    "disconnect": (lambda ws: ws.disconnect, "conn: Connection"),
    "fallback": (lambda ws: ws.fallback, "conn: Connection, frame: Thing"),
    "binary": (lambda ws: ws.binary, "conn: Connection, data: Thing | None"),
    "middleware": (
        lambda ws: ws.middleware,
        "conn: Connection, envelope: Envelope, call_next: Callable[[], Awaitable[Any]]",
    ),
    "error": (lambda ws: ws.error(ValueError), "conn: Connection, exc: Thing"),
    "worker": (lambda ws: ws.worker, ""),
}


@pytest.mark.parametrize("kind", DECORATORS)
def test_names_that_only_a_type_checker_imports(kind: str) -> None:
    """Of a handler only the payload's types count; of the others only what is compared."""
    decorator, parameters = DECORATORS[kind]
    function = build(f"async def f({parameters}) -> Thing: ...")
    assert decorator(endpoint())(function) is function


@pytest.mark.parametrize(
    ("returns", "expected"),
    [
        ("Thing", None), ("AsyncIterator[Thing]", None), ("AsyncIterator[int]", int),
        ("AsyncGenerator[int, None]", int), ("int", int), ("1/0", None), ("int |", None),
    ],
)  # fmt: skip
def test_a_return_annotation_counts_if_it_can_be_had(returns: str, expected: Any) -> None:
    """Else it counts as absent. What is around an item need not be imported."""
    body = "yield 1" if "Async" in returns else "..."
    handler = registered(build(f"async def f(conn) -> {returns!r}: {body}", future=False))
    assert handler.returns is expected


@pytest.mark.parametrize(
    ("annotation", "says"),
    [
        ("Thing", "name 'Thing' in the annotation of 'x' is not defined"),
        ("list[Thing] | None", "name 'Thing' in the annotation of 'x' is not defined"),
        ("int |", "in the annotation of 'x'"),
        ("datetime.nothing", "has no attribute 'nothing' in the annotation of 'x'"),
        ("1/0", "division by zero in the annotation of 'x'"),
        ("raising()", "RuntimeError in the annotation of 'x'"),
        ("missing()", "what? in the annotation of 'x'"),
        ("Annotated[int, Thing]", "name 'Thing' in the annotation of 'x' is not defined"),
    ],
)
@pytest.mark.parametrize("star", ["", "*, "])
def test_whatever_an_annotation_raises_is_a_mistake(star: str, annotation: str, says: str) -> None:
    """The text names the function and the parameter, and for a name what to do."""

    def raising(exc: Exception) -> Any:
        raise exc

    function = build(
        f"async def f(conn: Nowhere, {star}x: int): ...", datetime=datetime, Annotated=Annotated,
        raising=lambda: raising(RuntimeError()), missing=lambda: raising(NameError("what?")),
    )  # fmt: skip
    function.__annotations__["x"] = annotation
    text = refusal(lambda: registered(function))
    assert text.startswith(f"the payload of {place_of(function)} cannot be structured: ")
    assert says in text
    if "Thing" in annotation:
        assert "import it outside of `if TYPE_CHECKING:`, or define it above" in text


def test_a_class_with_such_a_name_is_named() -> None:
    """Which class it is in is said, also where the handler names another."""
    source = """
        import attrs
        from pachinko import message
        @attrs.frozen
        class Inner:
            price: Thing
        @message("cart")
        class Cart:
            items: list[Inner]
        async def f(conn, cart: Cart): ...
    """
    text = refusal(lambda: registered(build(source)))
    assert "name 'Thing' in an annotation of Inner is not defined when this is registered" in text


if sys.version_info >= (3, 14):  # before, these are evaluated when the function is defined

    @pytest.mark.parametrize("kind", DECORATORS)
    def test_names_that_are_never_defined(kind: str) -> None:
        """Without postponed annotations as with them."""
        decorator, parameters = DECORATORS[kind]
        function = build(f"async def f({parameters}) -> Thing: ...", future=False)
        assert decorator(endpoint())(function) is function

    @pytest.mark.parametrize("annotation", ["Thing", "list[Thing] | None", "dict[str, Thing]"])
    def test_a_payload_that_is_never_defined(annotation: str) -> None:
        """There is no bare `NameError`, and no text with an object."""
        function = build(f"async def f(conn: Nowhere, *, x: {annotation}): ...", future=False)
        text = refusal(lambda: registered(function))
        assert "name 'Thing' in the annotation of 'x' is not defined" in text
        function = build(f"async def f(conn: Nowhere, x: {annotation}, y: int): ...", future=False)
        text = refusal(lambda: registered(function))
        assert text.endswith(f"write `(conn, *, x: {annotation}, y: int)`")

    @pytest.mark.parametrize("kind", DECORATORS)
    def test_an_annotation_that_raises_is_a_mistake(kind: str) -> None:
        """A text cannot be in a union, and before Python 3.14 no such function can be defined."""
        source = "async def f(conn: 'Connection' | None): ..."
        text = refusal(lambda: DECORATORS[kind][0](endpoint())(build(source, future=False)))
        assert " has no signature: unsupported operand type(s) for |: 'str' and 'NoneType'" in text
        corrected(text)

    def test_a_class_whose_annotations_are_evaluated_late() -> None:
        """A mutable default of it is found, and a name that comes later is resolved."""
        source = """
            import attrs
            from pachinko import message
            @message("cart")
            class f:
                items: list[Item]
            class Item:
                pass
            """
        cls = build(source, future=False)
        assert attrs.fields(cls).items is not None
        with pytest.raises(PachinkoError, match=r"share the default of f\.tags"):
            build(source.replace("items: list[Item]", "tags: list[Item] = []"), future=False)


# Where names are looked up


async def test_a_closure() -> None:
    """What a function uses of the one around it, its annotations may name."""
    source = """
        from typing import TypedDict
        def factory():
            class Local(TypedDict):
                x: int
            async def f(conn, point: Local):
                return Local(**point)
            return f
        f = factory()
    """
    assert await call(registered(build(source)), {"x": 1, "y": 2}) == {"x": 1}


async def test_a_name_without_a_value_is_left_out() -> None:
    """A variable of the function around may come later."""

    def factory() -> Any:
        async def f(conn: Any, x: int) -> Any:
            return later

        registered(f)
        later = 5
        return f

    assert await call(registered(factory()), 1) == 5


class Room:
    class Msg(TypedDict):
        text: str

    Tags = list[str]

    def Point(self) -> None:  # noqa: N802 - the name of a type
        """No type, and so no reason to take it for one."""

    async def on_send(self, conn: Any, msg: Msg) -> Msg:
        return msg

    async def on_tag(self, conn: Any, *, tags: Tags) -> Tags:
        return tags

    async def on_go(self, conn: Any, to: Point) -> Point:  # type: ignore[valid-type]  # a class
        return to

    @classmethod
    async def on_make(cls, conn: Any, msg: Msg) -> Any:
        return cls, msg


class SubRoom(Room):
    pass


class Proxy:
    """Stands for an object that may be used in a request only."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("outside of a request")


async def test_an_object_that_cannot_be_asked_is_left_alone() -> None:
    """In the class of a method. As a default it is refused like any other object."""
    function = build("async def f(conn, *, cart: Any = D): ...", D=Proxy())
    assert "write `@ws.provide`" in refusal(lambda: registered(function))

    class Shop:
        cart = Proxy()

        async def on_buy(self, conn: Any, *, n: int) -> Any:
            return n

    ws = endpoint("/ws")
    ws.add_resource("shop", Shop())
    assert await call(ws._routes.handlers["shop.buy"], {"n": 5}) == 5


@pytest.mark.parametrize("room", [Room(), SubRoom()])
async def test_a_class_body(room: Room) -> None:
    """Types in the class of a method, also if it is inherited."""
    ws = endpoint()
    ws.add_resource("room", room)
    handlers = ws._routes.handlers
    assert await call(handlers["room.send"], {"text": "a", "b": 1}) == {"text": "a"}
    assert await call(handlers["room.tag"], {"tags": ["a"]}) == ["a"]
    assert await call(handlers["room.go"], {"x": 1}) == Point(1)
    assert await call(handlers["room.make"], {"text": "a"}) == (type(room), {"text": "a"})
    assert await call(registered(room.on_send), {"text": "a"}) == {"text": "a"}


async def test_the_module_of_the_function_comes_first() -> None:
    """What the registering code calls by the same name is something else."""
    function = build("async def f(conn, to: Point): return to", Point=str)
    Point = date  # noqa: F841, N806 - a local name that is the function's as well
    assert await call(registered(function), "a") == "a"
    elsewhere = build("async def f(conn, to: list): return to")
    list = date  # noqa: F841 - the same for a name of Python's
    ws = endpoint()
    ws.on("t")(elsewhere)
    assert await call(ws._routes.handlers["t"], [1]) == [1]


async def test_the_registering_code_comes_last() -> None:
    """A function that was made by `exec`, say, has its types there."""
    Local = Point  # noqa: F841, N806 - the annotation names it
    ws = endpoint()
    ws.on("t")(build("async def f(conn, to: Local): return to"))
    assert await call(ws._routes.handlers["t"], {"x": 1}) == Point(1)


if sys.version_info >= (3, 12):

    def test_a_parameter_of_a_generic_function() -> None:
        """Its name is known, though a payload cannot be of it."""
        function = build("async def f[T: int](conn, *, x: dict[str, int], y: T = 5): ...")
        hints = pachinko._hints_of(function, ({}, {}))
        assert hints["y"] is function.__type_params__[0]


# What is called


class Callable_:  # noqa: N801 - callable
    class Given(TypedDict):
        x: int

    async def __call__(self, conn: Any, given: Given) -> Any:
        return type(self).__name__, given


class Streaming:
    async def __call__(self, conn: Any, to: int) -> AsyncIterator[int]:
        for number in range(to):
            yield number


class Decorated:
    """A decorator that is a class."""

    def __init__(self, function: Any) -> None:
        functools.update_wrapper(self, function)
        self.function = function

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return "decorated", await self.function(*args, **kwargs)


async def go(conn: Any, to: Point) -> Any:
    return to


def sync(conn: Any, to: Point) -> Any:
    return to


def asynchronous(function: Any) -> Any:
    """A decorator that makes a coroutine function of any function."""

    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    return wrapper


class Methods:
    async def go(self, how: str, conn: Any, to: Point) -> Any:
        return how, to

    run = functools.partialmethod(go, "run")

    @staticmethod
    async def static(conn: Any, to: Point) -> Any:
        return to


CALLED: list[tuple[Any, Any]] = [
    (go, Point(1)), (Decorated(go), ("decorated", Point(1))), (asynchronous(go), Point(1)),
    (asynchronous(sync), Point(1)), (asynchronous(asynchronous(go)), Point(1)),
    (Methods().run, ("run", Point(1))), (Methods().static, Point(1)), (Methods.static, Point(1)),
    (functools.partial(Methods().go, "walk"), ("walk", Point(1))),
    (asynchronous(Methods().run), ("run", Point(1))),
    (Callable_(), ("Callable_", {"x": 1})),
    (functools.partial(Callable_()), ("Callable_", {"x": 1})),
    (Callable_().__call__, ("Callable_", {"x": 1})),
    (asynchronous(Callable_().__call__), ("Callable_", {"x": 1})),
]  # fmt: skip


@pytest.mark.parametrize(("function", "result"), CALLED)
async def test_what_is_called_is_async(function: Any, result: Any) -> None:
    """A method, a partial, a decorated function or an object: the payload is the inner one's."""
    assert await call(registered(function), {"x": 1, "y": 2}) == result


async def test_an_object_may_stream() -> None:
    """A `yield` in `__call__` makes a stream, as in a function."""
    handler = registered(Streaming())
    assert (handler.streams, handler.annotation, handler.returns) == (True, int, int)
    assert [item async for item in handler.call(CONN, 2)] == [0, 1]


if sys.version_info >= (3, 12):

    async def test_a_function_may_be_marked() -> None:
        """A plain function that returns a coroutine, if it says so."""

        @functools.wraps(go)
        def wrapper(*args: Any) -> Any:
            return go(*args)

        assert await call(registered(inspect.markcoroutinefunction(wrapper)), {"x": 1}) == Point(1)


async def stream(conn: Any) -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("inner", "cure"),
    [
        (go, "    return await function(*args, **kwargs)"),
        (Callable_(), "    return await function(*args, **kwargs)"),
        (stream, "    async for item in function(*args, **kwargs):\n        yield item"),
    ],
)
def test_a_plain_function_around_an_async_one_is_refused(inner: Any, cure: str) -> None:
    """It is the decorator that has to change, which the text shows."""

    def wrapper(*args: Any) -> Any:
        return inner(*args)

    functools.update_wrapper(wrapper, inner)
    text = refusal(lambda: registered(wrapper))
    assert text.startswith(f"{place_of(inner)} is called by a decorator that returns a plain")
    assert corrected(text) == f"async def wrapper(*args, **kwargs):\n{cure}"


# Partials


async def say(conn: Any, text: str, db: Any) -> Any:
    return text, db


async def say_fields(conn: Any, *, text: str, db: Any, loud: bool = False) -> Any:
    return text, db, loud


async def test_what_a_partial_has_bound_is_no_field() -> None:
    """No client can replace it, whatever it sends."""
    handler = registered(functools.partial(say, db=DB))
    assert (handler.annotation, handler.defaults) == (str, None)
    assert await call(handler, "hi") == ("hi", DB)
    for function in (
        functools.partial(say_fields, db=DB),
        functools.partial(functools.partial(say_fields, loud=True), db=DB, loud=False),
        asynchronous(functools.partial(say_fields, db=DB)),
    ):
        handler = registered(function)
        payload = {"text": "hi", "db": {"url": "evil"}, "loud": False}
        assert await call(handler, payload) == ("hi", DB, False)
        assert "db" not in handler.annotation.__annotations__


def test_what_a_partial_has_bound_is_not_shown() -> None:
    """Nor is any other default that is no literal."""

    async def f(
        conn: Any, a: int, b: Db = DB, *, c: Db = DB, d: str = "x", e: Any = ()
    ) -> None: ...

    text = refusal(lambda: registered(functools.partial(f, c=DB)))
    assert text.endswith(
        "takes more than one payload; for its fields write `(conn, *, a: int, b: Db = ...)`"
    )

    async def g(conn: Any, a: int, *, c: Db = DB, d: str = "x", e: Any = ()) -> None: ...

    text = refusal(lambda: registered(functools.partial(g, c=DB)))
    assert text.endswith("write `(conn, a: int)` or `(conn, *, d: str = 'x', e: Any = ...)`")

    def h(conn: Any, *, c: Db, d: Db = DB, e: Annotated[int, DB] = 5) -> dict[str, Db]: ...  # type: ignore[empty-body]  # is not called

    code = corrected(refusal(lambda: registered(functools.partial(h, c=DB))))
    assert code == (
        '@ws.on("t")\nasync def handler(conn: Any, *, d: Db = ..., e: Annotated[int, DB] = 5)'
        " -> dict[str, Db]: ..."
    )
    h.__annotations__ |= {"e": Annotated[int, DB], "return": dict[str, datetime]}
    code = corrected(refusal(lambda: registered(functools.partial(h, c=DB))))
    assert code.endswith("e: Annotated[int, ...] = 5) -> dict[str, datetime]: ...")


# What is no function


class Chat:
    def __init__(self, *args: Any) -> None: ...

    async def on_say(self, conn: Any) -> None: ...


class Plain:
    async def __call__(self, conn: Any) -> None: ...

    @staticmethod
    async def static(conn: Any) -> None: ...


@pytest.mark.parametrize(
    ("given", "what", "code"),
    [
        (5, "5", '@ws.on("t")\nasync def handler(conn): ...'),
        (None, "None", '@ws.on("t")\nasync def handler(conn): ...'),
        ("say", "'say'", '@ws.on("t")\nasync def handler(conn): ...'),
        (DB, "an object of the class Db", '@ws.on("t")\nasync def handler(conn): ...'),
        (Chat, "the class Chat", 'ws.add_resource("chat", Chat())'),
        (Chat(), "an object of the class Chat", 'ws.add_resource("chat", Chat())'),
        (Plain, "the class Plain", '@ws.on("t")\nasync def f(conn): ...'),
        (Said, "the class Said", '@ws.on("t")\nasync def f(conn): ...'),
        (
            vars(Plain)["static"], "an object of the class staticmethod",
            '@ws.on("t")\nasync def static(conn): ...',
        ),
    ],
)  # fmt: skip
def test_what_is_no_function_is_named(given: Any, what: str, code: str) -> None:
    """The text says what it is, and shows what to write."""
    text = refusal(lambda: registered(given))
    assert text.startswith(f"expected a function, got {what}; write\n")
    assert corrected(text) == code


@pytest.mark.parametrize("function", [go, stream])
def test_a_function_that_is_called_already_is_refused(function: Any) -> None:
    """The text has it without the parentheses. Nothing warns that it was never awaited."""
    name = function.__name__
    given = function(CONN, Point(1)) if function is go else function(CONN)
    text = refusal(lambda: registered(given))
    assert text.startswith(f"expected a function, got {name}(), which is called already; write\n")
    assert corrected(text) == f'ws.on("t")({name})'


@pytest.mark.parametrize("function", [lambda conn: None, functools.partial(sync), sync, print])
def test_what_is_not_async_is_shown_as_it_should_be(function: Any) -> None:
    """A name that is none is replaced."""
    text = refusal(lambda: registered(function))
    assert " is not async; write\n" in text
    assert corrected(text).startswith('@ws.on("t")\nasync def ')


@pytest.mark.parametrize(
    ("name", "parameters", "code"),
    [
        ("on_add", "self, conn, *, a: int", "async def on_add(self, conn, *, a: int): ..."),
        ("on_add", "self", "async def on_add(self): ..."),
        ("on_connect", "self, conn, room: str", "async def on_connect(self, conn, room: str): ..."),
        ("on_disconnect", "self, conn", "async def on_disconnect(self, conn): ..."),
    ],
)
def test_the_corrected_method_is_in_its_class(name: str, parameters: str, code: str) -> None:
    """With `self`, which its signature lacks."""
    todo = type("Todo", (), {name: build(f"def f({parameters}): ...")})
    vars(todo)[name].__name__ = name
    text = refusal(lambda: endpoint().add_resource("todo", todo()))
    assert corrected(text) == f"class Todo:\n    {code}"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("on_disconnect", "async def on_disconnect(self, conn): ..."),
        ("on_connect", "async def on_connect(self, conn, room, n): ..."),
    ],
)
def test_wrong_parameters_of_a_method_are_shown_in_its_class(name: str, code: str) -> None:
    """As those of a function are, with `self`."""
    function = build("async def f(self): yield")
    function.__name__ = name
    text = refusal(lambda: endpoint().add_resource("t", type("Todo", (), {name: function})()))
    assert corrected(text) == f"class Todo:\n    {code}"


def test_a_class_method_is_shown_in_its_class() -> None:
    """Its owner is the class itself."""

    class Todo:
        @classmethod
        def add(cls, conn: Any) -> None: ...

    text = refusal(lambda: registered(Todo.add))
    assert corrected(text).startswith("class Todo:\n    async def add(self, conn: Any)")


def test_a_method_that_is_decorated_in_its_class_is_refused() -> None:
    """There is no object that it could be called on."""
    ws = endpoint()
    with pytest.raises(
        PachinkoError, match=r"takes `self`.* `ws\.on\(\.\.\.\)\(Class\(\)\.say\)` below"
    ):

        class Chat:
            @ws.on("say")
            async def say(self, conn: Any) -> None: ...


# Defaults that another library replaces


def of(module: str, *bases: type) -> Any:
    """An object whose class is defined in *module*."""
    return type("Marker", bases, {"__module__": module})()


class MyDepends(type(of("fastapi.params"))):  # type: ignore[misc]  # a class that is made
    """A class of the application's own, with one of a library below it."""


INJECTED = {
    "dependency_injector": of("dependency_injector.wiring"),
    "fastapi": of("fastapi.params"),
    "fast_depends": of("fast_depends.dependencies.model"),
    "that_depends": of("that_depends.injection"),
    "litestar": of("litestar.params"),
    "lagom": of("lagom.markers"),
    "wireup": of("wireup.ioc.types"),
}


@pytest.mark.parametrize("package", INJECTED)
@pytest.mark.parametrize("annotation", ["Point", "Any", "int", "Db", "", "Point | None"])
@pytest.mark.parametrize("star", ["", "*, "])
def test_a_default_of_an_injecting_library_is_refused(
    package: str, annotation: str, star: str
) -> None:
    """A client that sends the field would get its own object in place of the server's."""
    name = f"db: {annotation}" if annotation else "db"
    default = INJECTED[package]
    if annotation == "Db":  # as payloads go, a class like any other
        annotation = "Point"
    function = build(f"async def f(conn, {star}{name} = D): ...", D=default, Point=Point, Db=Point)
    assert refusal(lambda: registered(function)) == (
        f"{place_of(function)} takes 'db' from {package}, but a client that sends 'db' would "
        f"replace it; write `@ws.provide` for what the server makes"
    )


@pytest.mark.parametrize(
    "annotation",
    [
        Annotated[Point, of("dishka.entities.depends_marker")],
        Annotated[Point, "doc", type(of("wireup.ioc.types"))],
        Annotated[Point, of("fastapi.params")] | None,
        Annotated[Point | None, MyDepends()],
    ],
    ids=repr,
)
def test_metadata_of_an_injecting_library_is_refused(annotation: Any) -> None:
    """``FromDishka[Db]`` is an `Annotated` with an object of dishka's."""
    function = build("async def f(conn, *, text: str, db: A): ...", A=annotation)
    text = refusal(lambda: registered(function))
    assert " takes 'db' from " in text and "write `@ws.provide`" in text


class Color(enum.Enum):
    RED = "red"


class Sub(Point):
    pass


class Own:
    """A class that no list can know, such as the marker of a library."""


class Movie(TypedDict):
    name: str


class Hard:
    """An object that has no hash, such as the marker of a library that is a dataclass."""

    __hash__ = None  # type: ignore[assignment]  # so it is said


GOOD_DEFAULTS: list[tuple[Any, Any]] = [
    (int, 5), (int | None, None), (str, "x"), (int, None), (float, 1), (Point, Point(1)),
    (Point, Sub(1)), (Point | None, Point(1)), (Point | str, Point(1)), (Any, "x"), (Any, 1),
    (object, True), (Any, 1.5), (Any, None), (Any, object()), (Movie, None), (Any, Color.RED),
    (Color, Color.RED), (int, Color.RED), (int | None, object()), (Literal["a", 1], "a"),
    (Annotated[Literal["a"], "doc"] | None, "a"), (Annotated[int, msgspec.Meta(gt=0)], 0),
    (Annotated[str, msgspec.Meta(min_length=1)] | None, ""), (frozenset[int], frozenset({1})),
    (msgspec.UnsetType, msgspec.UNSET), (int, msgspec.UNSET), (date, date(2026, 1, 1)),
    (date, datetime(2026, 1, 1)), (Sequence[int], (1,)), (tuple[int, ...], ()), (bytes, b""),
    (Decimal, Decimal(1)), (int, attrs.NOTHING), (NewType("Of", Point), Point(1)),
    (NewType("Name", str), "x"),
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "default"), GOOD_DEFAULTS, ids=str)
def test_other_defaults_are_as_they_were(annotation: Any, default: Any) -> None:
    """A value of the type, one of JSON, a member of an enum, `UNSET`, or a bare object."""
    for star in ("", "*, "):
        function = build(f"async def f(conn, {star}x: A = D): ...", A=annotation, D=default)
        if annotation is not msgspec.UnsetType:
            assert registered(function).function is function
        assert pachinko.default_refusal(
            inspect.Parameter("x", inspect.Parameter.KEYWORD_ONLY, default=default), annotation
        ) is None  # fmt: skip


def test_the_class_of_a_message_stands_for_an_annotation() -> None:
    """``@ws.on(Said)`` says what the payload is, and so what its default may be."""
    said = pachinko.message("said")(type("Said", (), {"__annotations__": {"text": str}}))
    for default in (said("a"), None):
        endpoint().on(said)(build("async def f(conn, msg=D): ...", D=default))
    text = refusal(lambda: endpoint().on(said)(build("async def f(conn, msg=D): ...", D=Own())))
    assert "write a default of the annotated type" in text


OTHERS: list[Any] = [
    Own(), Own, len, lambda: 1, functools.partial(int), ..., Point, Hard(), Decimal(1), int,
    datetime(2026, 1, 1), (1,), Literal, functools, NotImplemented, {1}, bytearray(),
]  # fmt: skip


@pytest.mark.parametrize("default", OTHERS, ids=lambda default: type(default).__name__)
@pytest.mark.parametrize("annotation", ["", ": Any", ": object", ": A"])
def test_a_default_that_is_no_json_may_not_be_replaced(annotation: str, default: Any) -> None:
    """It may be what the server makes, whatever class the application gives its markers."""
    for star in ("", "*, "):
        source = f"async def f(conn, {star}x{annotation} = D): ..."
        function = build(source, D=default, A=Annotated[Any, "doc"])
        text = refusal(lambda function=function: registered(function))
        assert f", whose default is a {type(default).__name__}; write `@ws.provide` for" in text


@pytest.mark.parametrize("annotation", [int, Point, list[int], Movie, Literal["a"], int | None])
def test_a_default_that_no_payload_could_be_is_refused(annotation: Any) -> None:
    """It may be the marker of a library that no list has."""
    function = build("async def f(conn, *, x: A = D): ...", A=annotation, D=Own())
    text = refusal(lambda: registered(function))
    assert "takes `x: " in text and "`, whose default is a Own; write a default of the " in text
    assert text.endswith("annotated type, or `@ws.provide` for what the server makes")


@pytest.mark.parametrize(
    ("annotation", "default"),
    [
        (dict, len), (dict, lambda: 1), (int, functools.partial(int)), (dict, Point), (int, "x"),
        (str, ...), (int, int), (str, datetime(2026, 1, 1)), (Literal["a"], "b"), (int | None, "x"),
        (Annotated[int, msgspec.Meta(gt=0)], "x"), (Movie, len), (list[int], {}), (int, 1.5),
        (NewType("Name", str), 5), (dict[str, int] | None, []), (list[int], Hard()), (Decimal, 0.5),
    ],
    ids=str,
)  # fmt: skip
def test_a_default_of_another_type_is_refused(annotation: Any, default: Any) -> None:
    """Whether its class is the application's or Python's: the handler would get it."""
    function = build("async def f(conn, *, x: A = D): ...", A=annotation, D=default)
    text = refusal(lambda: registered(function))
    assert text.endswith(
        "a default of the annotated type, or `@ws.provide` for what the server makes"
    )


@attrs.define
class Cart:
    items: list[str] = attrs.Factory(list)


@pytest.mark.parametrize("star", ["", "*, "])
@pytest.mark.parametrize(
    ("annotation", "default", "write"),
    [
        (": list[str]", [], "x: list[str] | None = None"),
        (": list[str] | None", ["a"], "x: list[str] | None = None"),
        (": dict", {}, "x: dict | None = None"), (": set[int]", {1}, "x: set[int] | None = None"),
        (": Movie", {"name": "M"}, "x: Movie | None = None"), (": Any", [], "x: Any = None"),
        (": object", {}, "x: object = None"), ("", [], "x=None"),
        (": Cart", Cart(), "x: Cart | None = None"), (": dict[str, int]", {"a": 1}, None),
        (": tuple", ([],), "x: tuple | None = None"), (": int | list[int]", [], None),
        (": Annotated[list[int], 'doc']", [], "x: Annotated[list[int], 'doc'] | None = None"),
    ],
)  # fmt: skip
def test_a_default_that_can_be_changed_is_refused(
    star: str, annotation: str, default: Any, write: str | None
) -> None:
    """It would be one object for all clients."""
    names = {"Movie": Movie, "Cart": Cart, "Annotated": Annotated}
    source = f"async def f(conn, {star}x{annotation} = D): ..."
    write = write or f"x{annotation} | None = None"
    for future in (False, True):
        function = build(source, future=future, D=default, **names)
        text = refusal(lambda function=function: registered(function))
        kind = type(default).__name__
        assert f"default is a {kind} that all clients would share; write `{write}`" in text
    corrected = build(f"async def f(conn, {star}{write}): ...", **names)
    assert registered(corrected).function is corrected


@pytest.mark.parametrize("star", ["", "*, "])
@pytest.mark.parametrize(
    ("annotation", "write"),
    [
        ("Required[int]", "int"), ("Final[str]", "str"), ("ClassVar[int]", "int"),
        ("InitVar[int]", "int"), ("ReadOnly[int]", "int"),
        ("NotRequired[int]", "int | None = None"), ("NotRequired[int] = 5", "int = 5"),
        ("NotRequired[str | None]", "str | None = None"), ("Required[ReadOnly[int]]", "int"),
        ("Annotated[NotRequired[int], 'doc']", "int | None = None"),
        ("Annotated[Final[int], 'doc'] = 1", "int = 1"),
    ],
)  # fmt: skip
def test_the_qualifier_of_a_field_is_refused_on_a_parameter(
    star: str, annotation: str, write: str
) -> None:
    """It says nothing of a value: ``NotRequired`` would leave a handler without an argument."""
    qualifiers: dict[str, Any] = {"InitVar": dataclasses.InitVar, "Annotated": Annotated}
    for name in ("ClassVar", "Final", "NotRequired", "ReadOnly", "Required"):
        qualifiers[name] = getattr(typing_extensions, name)
    for future in (False, True):
        source = f"async def f(conn, {star}x: {annotation}): ..."
        function = build(source, future=future, **qualifiers)
        text = refusal(lambda function=function: registered(function))
        assert text.endswith(f"fields of classes have such a qualifier; write `x: {write}`")
    corrected = build(f"async def f(conn, {star}x: {write}): ...")
    assert registered(corrected).function is corrected


# The second parameter of the others, and what they return


TAKEN: list[tuple[Any, bool, bool]] = [
    (str, True, False), (bytes, False, True), (str | bytes, True, True), (Any, True, True),
    (object, True, True), ("Thing", True, True), (dict, False, False), (int, False, False),
    (list[str], False, False), (Annotated[str, "x"], True, False), (str | None, True, False),
    (Annotated[str, msgspec.Meta(max_length=5)], False, False), (Literal["a"], False, False),
    (NewType("Text", str), True, False), (Movie, False, False), (bytearray, False, False),
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "text", "binary"), TAKEN, ids=str)
def test_the_fallback_takes_a_text_and_the_binary_handler_bytes(
    annotation: Any, text: bool, binary: bool
) -> None:
    """Nothing is structured for them, so another annotation would not be true."""
    function = build("async def f(conn, given: int): ...")
    function.__annotations__["given"] = annotation
    for decorator, fits, gets in (("fallback", text, "str"), ("binary", binary, "bytes")):
        register = getattr(endpoint(), decorator)
        if fits:
            assert register(function) is function
        else:
            said = refusal(lambda register=register: register(function))
            assert f"`, but gets {gets}; write\n@ws.{decorator}\n" in said
            corrected(said)


@pytest.mark.parametrize("parameters", ["conn, given", "*args", "conn, *args", "conn, x, y=5"])
def test_other_parameters_of_the_fallback_are_as_they_were(parameters: str) -> None:
    """What can be called with a text is right."""
    function = build(f"async def f({parameters}): ...")
    assert endpoint().fallback(function) is function


class TextColor(enum.StrEnum):
    """Texts with names."""

    RED = "red"


class Pong(str):
    """A text of the application's own."""

    __slots__ = ()


class Chunk(bytes):
    """Bytes of the application's own."""


RETURNED: list[tuple[Any, bool, bool]] = [
    (None, True, True), (Said, True, True), (Said | None, True, True), (Any, True, True),
    (object, True, True), ("Thing", True, True), (int, False, False), (float, False, False),
    (dict[str, int], False, False), (Point, False, False), (Literal[1], False, False),
    (list[Said], False, False), (Said | int, False, False), (Said | str | int, False, False),
    (Color, False, False), (Movie, False, False), (list[str], False, False),
    (tuple[bytes, ...], False, False), (bytes | str | int, False, False),
    (Literal["pong", 1], False, False),
    # A text from the fallback
    (str, True, False), (str | None, True, False), (Pong, True, False), (Literal["a"], True, False),
    (Literal["a", None], True, False), (Literal[None], True, True), (TextColor, True, False),
    (Annotated[str, "x"], True, False), (NewType("Text", str), True, False),
    (Said | str, True, True),
    # Bytes from the binary handler
    (bytes, False, True), (bytearray, False, True), (memoryview, False, True),
    (bytes | None, False, True), (bytes | bytearray | memoryview, False, True),
    (Chunk, False, True), (Literal[b"a"], False, True), (NewType("Data", bytes), False, True),
    (Annotated[bytearray | None, "x"], False, True), (Said | bytes | None, True, True),
    (Literal["a", b"b"], False, False),
    # Both of them, from a function that is both
    (bytes | str, True, True), (str | bytes | None, True, True), (Pong | Chunk, False, False),
    (Said | str | bytes, True, True), (str | bytearray, False, True),
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "text", "binary"), RETURNED, ids=str)
def test_they_return_a_message_or_nothing_or_what_they_take(
    annotation: Any, text: bool, binary: bool
) -> None:
    """Anything else would be an ``internal_error`` each time."""
    function = build("async def f(conn, given) -> int: ...")
    function.__annotations__["return"] = annotation
    for decorator, fits, raw in (("fallback", text, "a str"), ("binary", binary, "bytes")):
        register = getattr(endpoint(), decorator)
        if fits:
            assert register(function) is function
        else:
            said = refusal(lambda register=register: register(function))
            assert f", but may return {raw}, a @message object or None; write\n@ws." in said


@pytest.mark.parametrize(
    ("annotation", "fits"),
    [
        (ValueError, True), (Exception, True), (ValueError | KeyError, True), (Any, True),
        ("Thing", True), (KeyError, False), (UnicodeError, False), (str, False),
    ],
)  # fmt: skip
def test_an_error_handler_takes_the_error(annotation: Any, fits: bool) -> None:
    """An annotation of another class would not be true."""
    function = build("async def f(conn, exc: int): ...")
    function.__annotations__["exc"] = annotation
    register = endpoint().error(ValueError)
    if fits:
        assert register(function) is function
    else:
        text = refusal(lambda: register(function))
        assert ", but gets ValueError; write\n@ws.error(ValueError)\n" in text


# The types of path parameters


class Upper:
    """A converter of the application's own, with annotations."""

    def convert(self, value: str) -> Decimal | None:
        return Decimal(value)


class Bare:
    def convert(self, value):  # type: ignore[no-untyped-def]  # the case
        return Point(int(value))


def with_converters() -> falcon.asgi.App[Any, Any]:
    app = new_app()
    app.router_options.converters["money"] = Upper
    app.router_options.converters["point"] = Bare
    return app


CONVERTED: list[tuple[str, list[Any], list[Any]]] = [
    ("{p}", [str, Any, object, str | None, NewType("Name", str), Annotated[str, "doc"]],
     [int, float, bool, UUID, datetime, date, bytes, Literal["a"], Color, Decimal, list[str], Movie,
      Annotated[str, msgspec.Meta(max_length=5)], int | None]),
    ("{p:path}", [str], [int]),
    ("{p:int}", [int, float, int | None], [str, bool, UUID]),
    ("{p:int(min=1)}", [int], [str]),
    ("{p:float}", [float, Any], [int, str]),
    ("{p:uuid}", [UUID], [str]),
    ('{p:dt("%Y-%m-%d")}', [datetime, date], [str]),
    ("{p:money}", [Decimal, Decimal | None, Any], [str, int]),
    ("{p:point}", [Point, Any, str], []),
]  # fmt: skip


@pytest.mark.parametrize("prefix", ["*, ", ""])
@pytest.mark.parametrize(("parameter", "right", "wrong"), CONVERTED, ids=[c[0] for c in CONVERTED])
def test_a_path_parameter_is_what_its_converter_makes(
    parameter: str, right: list[Any], wrong: list[Any], prefix: str
) -> None:
    """Another annotation is refused; a parameter has to be converted in the path."""
    function = build(f"async def f(conn, {prefix}p: int): ...")
    for annotation in [*right, *wrong]:
        function.__annotations__["p"] = annotation
        ws = Pachinko(with_converters(), f"/ws/{parameter}", hub=Hub())
        if annotation in right:
            assert ws.connect(function) is function
        else:
            text = refusal(lambda ws=ws: ws.connect(function))
            assert f", but /ws/{parameter} gives `p: " in text


@pytest.mark.parametrize(
    ("annotation", "says"),
    [
        (int, "takes `room: int`, but /rooms/{room} gives `room: str`; write `{room:int}` in the"),
        (float, "write `{room:float}` in the path, or `room: str`, and check or convert it in the"),
        (UUID, "write `{room:uuid}` in the path, or `room: str`"),
        (datetime, "write `{room:dt}` in the path, or `room: str`"),
        (date | None, "write `{room:dt}` in the path, or `room: str`"),
        (Color, "write `room: str`, and check or convert it in the handler"),
        ("Thing", "takes `room: Thing`: name 'Thing' is not defined when this is registered; "),
    ],
)
def test_the_text_has_the_path_as_it_should_be(annotation: Any, says: str) -> None:
    """It shows the converter that makes the annotated type, if there is one."""
    function = build("async def f(conn, room: int): ...")
    function.__annotations__["room"] = annotation
    text = refusal(lambda: endpoint("/rooms/{room}").connect(function))
    assert text.startswith(f"{place_of(function)} takes `room: ")
    assert says in text


@pytest.mark.parametrize("parameters", ["conn, *, other: Thing = 5", "conn, room, n: Any = 5"])
def test_what_is_not_in_the_path_is_not_looked_at(parameters: str) -> None:
    """Nor is a parameter without an annotation."""
    function = build(f"async def f({parameters}): ...")
    assert endpoint().connect(function) is function


def test_a_resources_connect_handler_is_no_exception() -> None:
    """Its path parameters are checked alike."""
    function = build("async def f(self, conn, room: int): ...")
    text = refusal(lambda: endpoint().add_resource("t", type("T", (), {"on_connect": function})()))
    assert " takes `room: int`, but /ws/{room}/{n:int} gives `room: str`; write " in text


@pytest.mark.parametrize(
    ("annotation", "fits"),
    [(int, True), (Any, True), (str, False), (UUID, False), ("Thing", False)],
)
@pytest.mark.parametrize("prefix", ["", "*, "])
async def test_without_a_path_the_first_connection_tells(
    annotation: Any, fits: bool, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong one refuses every handshake, with the text in the log."""
    function = build(f"async def f(conn, {prefix}n: int): ...")
    function.__annotations__["n"] = annotation
    app, ws = new_app(), Pachinko(hub=Hub())
    ws.connect(function)
    app.add_route("/ws/{n:int}", ws)
    async with falcon.testing.ASGIConductor(app) as conductor:
        for _ in range(2):
            if fits:
                async with conductor.simulate_ws("/ws/5"):
                    pass
            else:
                with pytest.raises(falcon.WebSocketDisconnected):
                    async with conductor.simulate_ws("/ws/5"):
                        pass
    assert caplog.text.count(f"\npachinko.PachinkoError: {place_of(function)} takes `") == (
        0 if fits else 2
    )


def test_a_converter_may_replace_one_of_falcons() -> None:
    """The application's own counts, whatever its name. A subclass inherits the annotations."""

    class Even(falcon.routing.IntConverter):
        pass

    app = new_app()
    app.router_options.converters.update({"float": Upper, "even": Even})
    for converter, annotation in (("float", Decimal), ("even", int)):
        function = build("async def f(conn, p: int): ...")
        function.__annotations__["p"] = annotation
        Pachinko(app, f"/{converter}/{{p:{converter}}}", hub=Hub()).connect(function)
        function.__annotations__["p"] = str
        ws = Pachinko(app, f"/not/{converter}/{{p:{converter}}}", hub=Hub())
        refusal(lambda ws=ws, function=function: ws.connect(function))


async def test_a_converter_without_annotations_is_known_by_its_values() -> None:
    """Its first value is compared."""
    function = build("async def f(conn, p: int): ...")
    app = with_converters()
    Pachinko(app, "/ws/{p:point}", hub=Hub()).connect(function)
    async with falcon.testing.ASGIConductor(app) as conductor:
        with pytest.raises(falcon.WebSocketDisconnected):
            async with conductor.simulate_ws("/ws/5"):
                pass


# What a ``type`` statement names


def named(value: Any) -> Any:
    """A ``type`` statement whose value is what *value* returns."""
    names = {"__value__": property(lambda _: value()), "__repr__": lambda _: "Alias"}
    return type("Alias", (), names)()


def nothing() -> Any:
    raise NameError("name 'Missing' is not defined", name="Missing")


@pytest.mark.parametrize("alias", [named(nothing), named(lambda: LOOP)], ids=["missing", "itself"])
def test_a_type_statement_without_a_type_is_no_bare_error(alias: Any) -> None:
    """As a payload it is refused, as a return value it does not count."""
    payload = build("async def f(conn, x: int): ...")
    payload.__annotations__["x"] = alias
    assert " cannot be structured: " in refusal(lambda: registered(payload))
    reply = build("async def f(conn, x=5) -> int: ...")
    reply.__annotations__["return"] = alias
    assert registered(reply).function is reply
    assert endpoint().binary(reply) is reply
    path = build("async def f(conn, room: int): ...")
    path.__annotations__["room"] = alias
    assert " takes `room: " in refusal(lambda: endpoint().connect(path))
    default = build("async def f(conn, x: int = D): ...", D=Own())
    default.__annotations__["x"] = alias
    refusal(lambda: registered(default))


LOOP = named(lambda: LOOP)


if sys.version_info >= (3, 12):

    def test_type_statements_of_all_kinds() -> None:
        """One that contains itself in a list is a type; one that is itself is none."""
        source = """
            type Json = dict[str, Json] | list[Json] | str | int | float | bool | None
            type Tags = list[str]
            type Itself = Itself
            type Late = Missing
            async def f(conn, x: NAME) -> NAME: ...
            """
        for name in ("Json", "Tags", "Tags | str"):
            handler = registered(build(source.replace("NAME", name)))
            assert str(handler.annotation) == str(handler.returns) == name
        for name in ("Itself", "Late"):
            refusal(lambda name=name: registered(build(source.replace("NAME", name))))
            reply = source.replace("x: NAME", "x: int").replace("NAME", name)
            assert registered(build(reply)).annotation is int


@pytest.mark.parametrize("returns", ["AsyncIterator[int]", "AsyncGenerator[int]", "AsyncIterable"])
def test_a_stream_without_a_yield_is_refused(returns: str) -> None:
    """What a handler returns is one reply, and an iterator is none."""
    names = {"AsyncIterable": AsyncIterable, "AsyncGenerator": AsyncGenerator}
    function = build("async def f(conn) -> Any: return iter(())", **names)
    function.__annotations__["return"] = returns.replace(
        "[int]", "[int, None]" if "Gen" in returns else "[int]"
    )
    text = refusal(lambda: registered(function))
    assert text.startswith(f"{place_of(function)} declares a stream, but has no `yield`; write\n")


def test_a_reply_whose_converter_fails_counts_as_not_declared() -> None:
    """Its own class decides then, as where nothing is declared."""

    def raising(t: Any) -> Any:
        raise ZeroDivisionError

    own = Hub()
    converter = own.converter.copy()
    converter.register_unstructure_hook_factory(lambda t: t is Own, raising)
    own.configure(converter=converter)
    ws = Pachinko(hub=own)
    function = build("async def f(conn) -> Own: ...", Own=Own)
    ws.on("t")(function)
    assert ws._routes.handlers["t"].returns is None
