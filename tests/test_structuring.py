"""The section "structuring": the hooks that make what handlers take of JSON."""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import enum
import json
import pathlib
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable
from datetime import date
from decimal import Decimal
from ipaddress import IPv4Address
from typing import (
    Annotated,
    Any,
    AnyStr,
    ClassVar,
    Final,
    Generic,
    Literal,
    LiteralString,
    NamedTuple,
    Never,
    NewType,
    NoReturn,
    NotRequired,
    Protocol,
    Required,
    Self,
    TypedDict,
    TypeVar,
)

import attrs
import msgspec
import pytest
from msgspec import UNSET, UnsetType
from structured import STRICT, errors, read, refused, written
from support import connect, new_app, simulated
from typing_extensions import ReadOnly, TypeAliasType
from typing_extensions import TypedDict as NewerTypedDict

import pachinko
from pachinko import Connection, Hub, Pachinko, PachinkoError, message

T = TypeVar("T")
Bound = TypeVar("Bound", bound=int)
MISSING = "required, but missing"


# Structs


@attrs.define
class Named:
    name: str = attrs.field(alias="title", converter=str.strip)


class Basket(msgspec.Struct, rename="camel", kw_only=True):
    """Its fields have types that msgspec alone would read in its own way."""

    item_count: int = 0
    price_paid: Decimal
    owner: Named | None = None
    tags: list[str] = []


class Closed(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    x: int = 0
    items: list[int] = msgspec.field(default_factory=list)


class Row(msgspec.Struct, array_like=True):
    key: str
    price: Decimal = Decimal(0)
    more: tuple[int, ...] = ()


class Entry(msgspec.Struct, array_like=True, tag="e", forbid_unknown_fields=True):
    price: Decimal


class Wrapper(msgspec.Struct, Generic[T]):
    item: T
    made: ClassVar[int] = 0


class Checked(msgspec.Struct):
    x: int
    price: Decimal = Decimal(0)

    def __post_init__(self) -> None:
        if self.x == 0:
            raise ValueError("x is not 0")
        if self.x == 1:
            raise KeyError("s3cret")


class Sub(Checked, kw_only=True):
    secret: str = "s"


class Node(msgspec.Struct):
    price: Decimal
    next: Node | None = None
    rows: list[Row] = []


STRUCTS: list[tuple[Any, Any, Any]] = [
    (Basket, {"itemCount": 1, "pricePaid": "1.5", "owner": {"title": "a"}, "tags": ["b"]},
     Basket(item_count=1, price_paid=Decimal("1.5"), owner=Named("a"), tags=["b"])),
    (Closed, {"x": 1}, Closed(1)),
    (Closed, {"items": [1]}, Closed(items=[1])),
    (Row, ["a", "1.5", [1]], Row("a", Decimal("1.5"), (1,))),
    (Entry, ["e", "1"], Entry(Decimal(1))),
    (Wrapper[Row], {"item": ["a", "1", []]}, Wrapper(Row("a", Decimal(1)))),
    (Wrapper[Named] | str, {"item": {"title": "a"}}, Wrapper(Named("a"))),
    (Checked | None, {"x": 2, "price": "1"}, Checked(2, Decimal(1))),
    (Node, {"price": "1", "next": {"price": "2", "next": None, "rows": [["a", "1", []]]},
            "rows": []}, Node(Decimal(1), Node(Decimal(2), rows=[Row("a", Decimal(1))]))),
    (dict[str, Row], {"a": ["b", "0", []]}, {"a": Row("b")}),
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "payload", "value"), STRUCTS, ids=str)
def test_a_struct_comes_in_and_goes_out(annotation: Any, payload: Any, value: Any) -> None:
    """Also one with fields that msgspec does not read as cattrs does."""
    assert read(payload, annotation) == value
    assert written(value, annotation) == payload


WRONG: list[tuple[Any, Any, list[tuple[str, str]]]] = [
    (Basket, {}, [(".pricePaid", MISSING)]),
    (Basket, {"itemCount": "1", "pricePaid": "x"},
     [(".itemCount", "expected int, got str"), (".pricePaid", "invalid decimal string")]),
    (Basket, {"pricePaid": 1, "owner": {"name": 1}}, [(".owner.title", MISSING)]),
    (Closed, {"x": "1", "b": 1, "a": 1}, [(".x", "expected int, got str"), ("", "unknown: a, b")]),
    (Closed, [], [("", "expected object, got array")]),
    (Row, [], [("", "expected array of at least length 1, got 0")]),
    (Row, {}, [("", "expected array, got object")]),
    (Row, [1, "x"], [("[0]", "expected str, got int"), ("[1]", "invalid decimal string")]),
    (Entry, ["f", "1"], [("[0]", 'expected one of "e"')]),
    (Entry, ["e", "1", 2], [("", "expected 2 items, got 3")]),
    (Checked, {"x": 0}, [("", "x is not 0")]),
    (list[Checked], [{"x": 1}], [("[0]", "invalid value")]),
    (Node, {"price": 1, "next": {"next": {}}},
     [(".next.price", MISSING), (".next.next.price", MISSING)]),
    (Wrapper[int], {"item": "a"}, [(".item", "expected int, got str")]),
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "payload", "found"), WRONG, ids=str)
def test_a_struct_is_strict(annotation: Any, payload: Any, found: Any) -> None:
    """Every wrong field is told, with the path on the wire."""
    assert errors(payload, annotation) == found


def test_an_array_may_be_longer_or_shorter_than_its_struct() -> None:
    """Newer clients may send more; what has a default may be left out."""
    assert read(["a"], Row) == Row("a")
    assert read(["a", "1", [], "new"], Row) == Row("a", Decimal(1))


def test_a_struct_goes_out_as_what_was_declared() -> None:
    """The fields of a subclass stay here."""
    assert written(Sub(2, secret="s"), Checked) == {"x": 2, "price": "0"}
    assert written([Sub(2)], list[Checked]) == [{"x": 2, "price": "0"}]
    assert written([Sub(2)]) == [{"x": 2, "price": "0", "secret": "s"}]
    assert written(Wrapper(Named("a"))) == {"item": {"title": "a"}}


def test_a_generic_struct_needs_its_parameter() -> None:
    """As a generic attrs class does."""
    assert "Wrapper is generic; write Wrapper[int], say" in refused(Wrapper)


def test_a_struct_may_be_a_message() -> None:
    """It is tagged, received, and sent as a whole."""

    @message("moved")
    class Moved(msgspec.Struct, frozen=True):
        x: int

    assert pachinko.message_type(Moved) == "moved"
    assert pachinko.split_message(Moved(1), None) == ("moved", Moved(1))
    assert STRICT.encode("moved", Moved(1)) == b'{"type":"moved","payload":{"x":1}}'


async def test_a_struct_through_a_server() -> None:
    """In one pass or by cattrs, alone or as a field, with the same words."""
    ws = Pachinko(new_app(), "/ws", hub=Hub())

    class Point(msgspec.Struct):
        x: Annotated[int, msgspec.Meta(gt=0)]

    @ws.on("quick")
    async def quick(conn: Connection, point: Point) -> Point:
        return point

    @ws.on("slow")
    async def slow(conn: Connection, *, point: Point, price: Decimal = Decimal(1)) -> Point:
        return point

    async with simulated(ws._app) as server, connect(f"{server.url}/ws") as client:
        assert (await client.ask("quick", {"x": 1}))["payload"] == {"x": 1}
        assert (await client.ask("slow", {"point": {"x": 1}}))["payload"] == {"x": 1}
        for type, payload, path in (
            ("quick", {"x": 0}, "x"),
            ("slow", {"point": {"x": 0}}, "point.x"),
        ):
            (error,) = (await client.ask(type, payload))["payload"]["errors"]
            assert error == {"path": f"$.payload.{path}", "message": "expected int >= 1"}


# Absent fields


@attrs.frozen
class Patch:
    name: str | UnsetType = UNSET
    age: int | UnsetType | None = UNSET
    inner: Patch | UnsetType = UNSET
    price: Decimal | UnsetType = UNSET


@dataclasses.dataclass
class DataPatch:
    name: str | UnsetType = UNSET
    inner: Patch | None = None


class StructPatch(msgspec.Struct):
    name: str | UnsetType = UNSET
    price: Decimal | UnsetType = UNSET


@attrs.define
class Quick:
    name: str | UnsetType = UNSET


Maybe = TypeAliasType("Maybe", int | UnsetType)


@attrs.frozen
class OddPatch(Generic[T]):
    e: T = attrs.field(default=UNSET)
    a: Annotated[int | UnsetType, msgspec.Meta(gt=0)] = UNSET
    b: Maybe = UNSET
    c: Any = UNSET
    d: Final[int | UnsetType] = UNSET


@dataclasses.dataclass
class OddDataPatch:
    a: Annotated[int | UnsetType, msgspec.Meta(gt=0)] = UNSET
    b: Maybe = UNSET


class OddStructPatch(msgspec.Struct):
    a: Annotated[int | UnsetType, msgspec.Meta(gt=0)] = UNSET
    b: Maybe = UNSET


@pytest.mark.parametrize("payload", [{}, {"a": 1}, {"b": 1}])
@pytest.mark.parametrize("cls", [OddPatch[int | UnsetType], OddDataPatch, OddStructPatch])
def test_a_field_may_be_absent_however_its_type_is_written(cls: Any, payload: Any) -> None:
    """It is neither null nor an error on the way out; its constraints count."""
    value = read(payload, cls)
    assert written(value, cls) == written(value) == payload
    assert errors({"a": 0}, cls) == [(".a", "expected int >= 1")]


@pytest.mark.parametrize(
    ("annotation", "payload", "value"),
    [
        (Patch, {}, Patch()),
        (Patch, {"age": None}, Patch(age=None)),
        (Patch, {"name": "a", "inner": {}}, Patch("a", inner=Patch())),
        (list[Patch | None], [{}, None], [Patch(), None]),
        (DataPatch, {"inner": {"price": "1"}}, DataPatch(inner=Patch(price=Decimal(1)))),
        (StructPatch, {}, StructPatch()),
        (StructPatch, {"price": "1"}, StructPatch(price=Decimal(1))),
        (Quick, {}, Quick()),
    ],
    ids=str,
)
def test_an_absent_field_is_absent_both_ways(annotation: Any, payload: Any, value: Any) -> None:
    """UNSET is never null, and never sent."""
    assert read(payload, annotation) == value
    assert written(value, annotation) == payload
    assert written([value]) == [payload]


@pytest.mark.parametrize("cls", [Patch, DataPatch, StructPatch, Quick])
def test_absent_is_not_null(cls: Any) -> None:
    """Null is refused unless the field says None."""
    assert errors({"name": None}, cls) == [(".name", "expected str, got null")]


def test_a_parameter_may_be_absent() -> None:
    """A keyword-only parameter with the default UNSET is a field that may be absent."""

    async def f(conn: Connection, *, a: int | UnsetType = UNSET) -> None: ...

    handler = pachinko.read_handler("t", f, STRICT, (globals(), {}), None, (), False)
    assert handler.structure(UNSET, STRICT) == {}
    assert handler.structure({"a": 1}, STRICT) == {"a": 1}


dict_type: Any = TypedDict
WRITE_UNSET = "write x: int | UnsetType = UNSET in a class, NotRequired[int] in a typed dict"


@pytest.mark.parametrize(
    "annotation",
    [
        UnsetType,
        list[int | UnsetType],
        dict[str, int | UnsetType],
        attrs.make_class("A", {"x": attrs.field(type=int | UnsetType)}),
        attrs.make_class("A", {"x": attrs.field(type=int | UnsetType, default=None)}),
        attrs.make_class(
            "A", {"x": attrs.field(type=Annotated[int | UnsetType, msgspec.Meta(gt=0)])}
        ),
        attrs.make_class("A", {"x": attrs.field(type=Maybe)}),
        msgspec.defstruct("S", [("x", int | UnsetType)]),
        dict_type("D", {"x": int | UnsetType}),
    ],
    ids=str,
)
def test_unset_elsewhere_is_refused(annotation: Any) -> None:
    """What can never be absent says so at registration."""
    assert WRITE_UNSET in refused(annotation)


# Scalars


@pytest.mark.parametrize("text", ["1", "-1", "0", "-0", "1.50", "0.0", "1e5", "1E+5", "12.5e-7"])
def test_a_decimal_is_written_as_a_json_number(text: str) -> None:
    """With all its digits."""
    for annotation in (Decimal, Decimal | None, Annotated[Decimal, "x"]):
        assert str(read(text, annotation)) == str(Decimal(text))


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "1 ", " 1", "1_000", "Infinity", "-inf", "NaN", "sNaN", "nan1", "+1", "01", "1.",
        ".5", "1e", "0x1", "1,5", "\u0661", "\uff11", "1\n", "1e9999999999999999999",
    ],
)  # fmt: skip
def test_any_other_text_is_no_decimal(text: str) -> None:
    """Of what Python takes, only finite numbers without blanks and underscores come in."""
    assert errors(text, Decimal) == [("", "invalid decimal string")]
    assert errors([text], list[Decimal | None]) == [("[0]", "invalid decimal string")]
    assert errors({text: 1}, dict[Decimal, int])


@pytest.mark.parametrize("key", [" 1", "1 ", "\n1", "1.0", "true", "null", ""])
def test_a_key_is_a_number_as_json_writes_it(key: str) -> None:
    """Two keys never become one."""
    ((path, _),) = errors({key: 1}, dict[int, int])
    assert path == f'["{key}"]'


class Rights(enum.Flag):
    READ = 1
    WRITE = 2
    ALL = 3
    OWN = 8


class Bits(enum.IntFlag):
    A = 1
    B = 4


class Raw(enum.Enum):
    A = b"a"
    B = date(2026, 1, 2)


class Nested(enum.Enum):
    A = (1, 2)


class Word(str, enum.Enum):  # noqa: UP042 - how it was written before StrEnum
    A = "a"
    B = "b"


class Number(enum.IntEnum):
    ONE = 1
    TWO = 2


CHOICES: list[tuple[Any, Any, Any, str]] = [
    (Rights, 3, Rights.ALL, "1, 2, 8, or a sum of them"),
    (Rights, 9, Rights.READ | Rights.OWN, "1, 2, 8, or a sum of them"),
    (Rights, 0, Rights(0), "1, 2, 8, or a sum of them"),
    (Rights | None, 8, Rights.OWN, "1, 2, 8, null, or a sum of them"),
    (Bits, 5, Bits.A | Bits.B, "1, 4, or a sum of them"),
    (Raw, "YQ==", Raw.A, '"YQ==", "2026-01-02"'),
    (Word, "a", Word.A, '"a", "b"'),
    (Word | int, "b", Word.B, '"a", "b", int'),
    (Number, 2, Number.TWO, "1, 2"),
    (Number | Word, 1, Number.ONE, '1, 2, "a", "b"'),
    (Literal[Word.A], "a", Word.A, '"a"'),
    (Literal[b"a"], "YQ==", b"a", '"YQ=="'),
    (Literal[True], True, True, "true"),
    (Literal["a", Number.TWO, None], 2, Number.TWO, '"a", 2, null'),
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "payload", "value", "names"), CHOICES, ids=str)
def test_what_an_enum_or_a_literal_admits(
    annotation: Any, payload: Any, value: Any, names: str
) -> None:
    """Each value comes in and goes out, and any other is answered with the list of them."""
    found = read(payload, annotation)
    assert found == value and type(found) is type(value)
    assert written(value, annotation) == payload
    for wrong in (16, -1, 1.0, "Q", [], {"a": 1}):
        if type(wrong) is not int or annotation != Word | int:
            assert errors(wrong, annotation) == [("", f"expected one of {names}")]


async def test_the_words_for_an_enum_are_the_same_in_one_pass() -> None:
    """What msgspec refuses is explained by cattrs."""
    ws = Pachinko(new_app(), "/ws", hub=Hub())

    class Color(enum.StrEnum):
        RED = "red"

    @attrs.define
    class Paint:
        color: Color

    @ws.on("t")
    async def handler(conn: Connection, paint: Paint) -> None: ...

    assert pachinko.is_read_in_one_pass(Paint)
    async with simulated(ws._app) as server, connect(f"{server.url}/ws") as client:
        (error,) = (await client.ask("t", {"color": "Q"}))["payload"]["errors"]
        assert error == {"path": "$.payload.color", "message": 'expected one of "red"'}


# Names for types


alias: Any = TypeAliasType
Tags = alias("Tags", list[str])
Either = alias("Either", int | list[str])
One, Other = TypeVar("One"), TypeVar("Other")
BadText = alias("BadText", "BadText | int")
LoopText = alias("LoopText", "LoopText")
Endless = alias("Endless", "list[Endless[list[One]]] | One", type_params=(One,))


@pytest.mark.parametrize(
    ("annotation", "payload"),
    [
        (Tags | str, ["a"]), (Tags | str, "a"), (Tags | None, None), (Either | None, 5),
        (Either | None, ["a"]), (Either | str, "a"), (list[Either | None], [5, ["a"], None]),
        (Final[int], 5), (attrs.make_class("A", {"x": attrs.field(type=Final[int])}), {"x": 1}),
        (dict_type("D", {"x": ReadOnly[int]}), {"x": 1}),
        (dict_type("D", {"x": NotRequired[ReadOnly[int]]}), {}),
        (NewType("Maybe", int | None), None),  # type: ignore[valid-newtype]  # it works at run time
    ],
    ids=str,
)  # fmt: skip
def test_a_name_stands_for_its_type(annotation: Any, payload: Any) -> None:
    """Also in a union, and for one."""
    value = read(payload, annotation)
    assert written(value, annotation) == payload
    assert errors(1.5, annotation)


TextJson = alias("TextJson", "dict[str, TextJson] | list[TextJson] | str | None")
PartJson = alias("PartJson", dict[str, "PartJson"] | list["PartJson"] | int)  # type: ignore[operator]
TextTree = alias("TextTree", "dict[str, TextTree[One]] | One", type_params=(One,))


@pytest.mark.parametrize(
    ("annotation", "why"),
    [
        (BadText, "a union that contains itself"),
        (LoopText, "LoopText has no JSON of its own"),
        (Endless[int], "contains ever more types"),
    ],
    ids=str,
)
def test_an_alias_that_is_a_text_may_not_be_endless(annotation: Any, why: str) -> None:
    """It is refused at registration, and not with a RecursionError."""
    assert why in refused(annotation)


def test_an_alias_may_be_a_text() -> None:
    """As it has to be for one that contains itself before Python 3.12."""
    for tree, leaf in ((TextJson, "x"), (PartJson, 1), (TextTree[int], 1)):
        value = {"a": {"b": leaf}}
        assert read(value, tree) == value
        assert written(value, tree) == value
        assert errors({"a": {"b": 1.5}}, tree)[0][0] == '["a"]["b"]'
    assert errors({"a": [{"b": 1}]}, TextTree[int])[0] == ('["a"]', "expected int, got array")


RECURSIVE = """
type Json = dict[str, Json] | list[Json] | str | int | float | bool | None
type Tree[T] = dict[str, Tree[T]] | T
type Bad = Bad | int
type Loop = Loop
type Endless[T] = list[Endless[list[T]]] | T
"""

if sys.version_info >= (3, 12):
    names: dict[str, Any] = {"__name__": __name__}
    exec(RECURSIVE, names)

    def test_an_alias_may_contain_itself() -> None:
        """JSON itself is the example, and it is strict to its depth."""
        value = {"a": [1, 1.5, None, True, "x", {"b": []}]}
        assert read(value, names["Json"]) == value
        assert written(value, names["Json"]) == value
        ((path, _),) = errors({"a": [{"b": {1}}]}, names["Json"])
        assert path == '["a"][0]["b"]'
        assert read({"a": {"b": 1}}, names["Tree"][int]) == {"a": {"b": 1}}
        assert errors({"a": {"b": "1"}}, names["Tree"][int]) == [
            ('["a"]["b"]', "expected int, got str")
        ]

    @pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: {"a": v}])
    def test_an_alias_may_nest_as_deep_as_a_frame(wrap: Any) -> None:
        """What a frame may hold is read, and anything deeper is refused."""
        json: Any = names["Json"]
        for depth, is_right in ((127, True), (50_000, False)):
            value: Any = 1
            for _ in range(depth):
                value = wrap(value)
            if is_right:
                assert read(value, json) == value
                assert read(value, list[json] | dict[str, json]) == value
            else:
                assert errors(value, json)[-1][1] == "nested too deeply"

    @pytest.mark.parametrize(
        ("name", "why"),
        [("Bad", "a union that contains itself"), ("Loop", "contains ever more types"),
         ("Endless", "contains ever more types")],
    )  # fmt: skip
    def test_an_alias_without_an_end_is_refused(name: str, why: str) -> None:
        """At registration, and not with a RecursionError."""
        t = names[name]
        assert why in refused(t[int] if name == "Endless" else t)


# What is refused, and the advice


class Plain:
    text: str


class Built:
    def __init__(self, text: str) -> None:
        self.text = text


class Bare:
    pass


class Below(str):
    pass


class Shape(Protocol):
    x: int


@attrs.define
class Selfish:
    next: Self | None = None


@attrs.define
class Free:
    item: T  # type: ignore[valid-type]  # the mistake


@dataclasses.dataclass
class Initial:
    x: int
    factor: dataclasses.InitVar[int]


@dataclasses.dataclass
class Seeded:
    x: int
    seed: dataclasses.InitVar[int] = 0


@dataclasses.dataclass
class Planted(Seeded):
    y: int = 0


@attrs.define(init=False)
class OwnInit:
    x: int

    def __init__(self, x: int, more: int) -> None: ...


class Model:
    """Like a model of pydantic, which need not be installed."""

    x: int


Model.__module__ = "pydantic.main"


@attrs.frozen
class Frozen(Model):
    x: int


ADVICE: list[tuple[Any, str]] = [
    (Plain, "put @attrs.frozen above Plain"),
    (list[Plain] | None, "put @attrs.frozen above Plain"),
    (Built, "Built has no JSON of its own; register a hook that makes one, as docs/payloads.md"),
    (Bare, "if it is a class of yours, declare its fields and put @attrs.frozen above Bare"),
    (IPv4Address, "register a hook that makes one, as docs/payloads.md shows"),
    (re.Pattern, "register a hook that makes one"),
    (msgspec.Raw, "register a hook that makes one"),
    (collections.namedtuple("Untyped", "x y"), "Untyped has no JSON of its own"),
    (IPv4Address | int, "IPv4Address has no JSON of its own"),
    (complex, "complex is no JSON value; write float, or tuple[float, float]"),
    (bytearray, "bytearray is no JSON value; write bytes"),
    (memoryview, "write bytes"),
    (Below, "Below is below str; write NewType('Below', str)"),
    (Shape, "Shape is a protocol, of which no object is made; write a class for its fields"),
    (Model, "Model is a pydantic model; register the hook for models in docs/payloads.md"),
    (Frozen, "Frozen is a pydantic model"),
    (list[Model], "Model is a pydantic model"),
    (LiteralString, "write str"),
    (Never, "leave the parameter out"),
    (NoReturn, "leave the parameter out"),
    (Self, "write the name of the class"),
    (Selfish, "write the name of the class"),
    (Callable[[int], str], "look the function up"),
    (collections.abc.Callable, "look the function up"),
    (typing.Callable, "look the function up"),
    (type[int], "look the class up"),
    (type, "look the class up"),
    (Iterable[int], "write list[int], say"),
    (AnyStr, "is generic; write int in the place of ~AnyStr, say"),
    (T, "is generic; write int in the place of ~T, say"),
    (Bound, "is generic"),
    (list[T], "is generic"),
    (dict[str, T] | None, "is generic"),
    (Wrapper, "Wrapper is generic; write Wrapper[int], say"),
    (list[Wrapper], "Wrapper is generic; write Wrapper[int], say"),
    (Free, "Free.item has no type for ~T; write a type, or class Free(Generic[T])"),
    (Final, "write Final[int], say"),
    (Any | int, "takes all that Any does; write Any"),
    (object | int, "takes all that Any does; write Any"),
    (Initial, "Initial cannot be made of its fields: missing a required argument: 'factor'"),
    (Seeded, "what a client sends for 'seed' would be dropped; write a field in the place of"),
    (Planted, "what a client sends for 'seed' would be dropped; write a field in the place of"),
    (OwnInit, "OwnInit cannot be made of its fields: missing a required argument: 'more'"),
    (Nested, "<Nested.A: (1, 2)> is no JSON scalar; give it a text or a number as its value"),
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "advice"), ADVICE, ids=str)
def test_what_has_no_json_is_refused_with_advice(annotation: Any, advice: str) -> None:
    """Each kind of thing with what helps for it."""
    text = refused(annotation)
    assert advice in text
    assert ("put @attrs.frozen above" in text) == ("@attrs.frozen" in advice or "a hook" in advice
                                                   or "no JSON of its own" in advice)  # fmt: skip


@pytest.mark.parametrize("default", [[], {}, set(), [1], bytearray(), collections.deque()])
@pytest.mark.parametrize("decorate", [None, attrs.define, attrs.frozen(slots=False)])
def test_a_shared_default_of_a_message_is_refused(default: Any, decorate: Any) -> None:
    """One client's data would show up in another's message."""
    body = {"__annotations__": {"tags": Any}, "tags": default}
    cls = type("Tagged", (), body)
    with pytest.raises(PachinkoError, match=r"all messages would share .*attrs\.field\(factory="):
        message("tagged")(decorate(cls) if decorate else cls)


def test_a_default_of_a_field_is_looked_at_too() -> None:
    """The corrected code makes the same default, anew for each message."""
    with pytest.raises(PachinkoError, match=r"attrs\.field\(factory=list\)"):

        @message("a")
        class A:
            tags: list[int] = attrs.field(default=[])

    with pytest.raises(PachinkoError, match=r"attrs\.field\(factory=lambda: list\(\.\.\.\)\)"):

        @message("b")
        class B:
            tags: list[int] = [1]  # noqa: RUF012 - the mistake


class Sparse(TypedDict, total=False):
    a: Required[int]
    b: int


def test_qualifiers_in_text_annotations_count() -> None:
    """A module with postponed annotations has typed dicts that do not know them."""
    assert read({"a": 1}, Sparse) == {"a": 1}
    assert errors({"b": 1}, Sparse) == [(".a", MISSING)]


async def test_a_frame_of_any_size_has_its_path() -> None:
    """A body of 20,000 letters and a missing title are answered as with ten."""
    ws = Pachinko(new_app(), "/ws", hub=Hub())

    @ws.on("note")
    async def note(conn: Connection, *, title: str, body: str) -> None: ...

    async with simulated(ws._app) as server, connect(f"{server.url}/ws") as client:
        for size in (10, 20_000, 500_000):
            payload = (await client.ask("note", {"body": "a" * size}))["payload"]
            assert payload["errors"] == [{"path": "$.payload.title", "message": MISSING}]
            assert json.dumps(payload).count("aaaa") == 0


def test_a_hook_that_lacks_a_key_is_no_missing_item() -> None:
    """Its `KeyError` is a bug of the program's."""
    converter = Hub().converter.copy()
    converter.register_structure_hook(IPv4Address, lambda value, _: {}[value])
    codec = pachinko.Codec(converter)
    assert errors(["1.2.3.4"], list[IPv4Address], codec) == [("[0]", "invalid value")]
    assert errors({"a": "b"}, dict[str, IPv4Address], codec) == [('["a"]', "invalid value")]


newer: Any = NewerTypedDict


def test_a_typed_dict_may_be_of_typing_extensions() -> None:
    """It has what newer Pythons have, and older ones need."""
    open_, closed = newer("Open", {"x": int}), newer("Closed", {"x": int}, closed=True)
    assert read({"x": 1, "new": 1}, open_) == {"x": 1}
    assert written({"x": 1, "new": 1}, open_) == {"x": 1}
    assert errors({"x": "1", "new": 1}, open_) == [(".x", "expected int, got str")]
    assert read({"x": 1}, closed) == {"x": 1}
    assert errors({"x": 1, "new": 1}, closed) == [("", "unknown: new")]
    assert not pachinko.is_read_in_one_pass(closed)
    assert "extra_items, which are not read; write a dict" in refused(
        newer("More", {"x": int}, extra_items=int)
    )


class Incomparable:
    def __eq__(self, other: object) -> bool:
        raise ValueError("ambiguous, as an array of numpy is")

    __hash__ = object.__hash__


def test_a_default_need_not_be_comparable() -> None:
    """Whether a field has one is not asked by comparing it."""
    odd = Incomparable()
    fields = {"x": attrs.field(type=int), "y": attrs.field(type=Any, default=odd)}
    parts: Any = [("x", int), ("y", Any, dataclasses.field(default=odd))]
    for cls in (attrs.make_class("C", fields), dataclasses.make_dataclass("D", parts)):
        assert read({"x": 1}, cls | Named).x == 1


# Type variables: a field, a value for T = str in it, and one for T = int
FIELDS_OF_T: list[tuple[Any, Any, Any]] = [
    (T, "a", 1),
    (T | None, "a", 1),
    (list[T] | None, ["a"], [1]),
    (typing.Optional[list[T]], ["a"], [1]),  # noqa: UP045 - cattrs takes it for another type
    (dict[str, list[T] | None], {"a": ["a"]}, {"a": [1]}),
    (list[dict[str, T | None]] | bool, [{"a": "b"}], [{"a": 1}]),
    (Annotated[T, "text"], "a", 1),
    (Annotated[list[T] | None, msgspec.Meta(max_length=1)], ["a"], [1]),
    (list[Annotated[T, "text"]], ["a"], [1]),
    (tuple[T, ...] | None, ["a"], [1]),
]


def generic(field: Any, base: Any = object, **config: Any) -> Any:
    """A generic class with one field."""
    bases = (base, Generic[T]) if base is not object else (Generic[T],)
    space = {"__annotations__": {"x": field}, "__module__": __name__}
    return types.new_class("Box", bases, config, lambda names: names.update(space))


def deriving(box: Any) -> Any:
    """A class below ``Box[int]``."""
    return types.new_class("Derived", (box[int],))


MAKERS: list[tuple[Callable[[Any], Any], Callable[[Any], Any]]] = [
    (lambda t: attrs.frozen(generic(t))[int], dict),
    (lambda t: dataclasses.dataclass(generic(t))[int], dict),
    (lambda t: generic(t, TypedDict)[int], dict),
    (lambda t: generic(t, msgspec.Struct)[int], dict),
    (lambda t: attrs.frozen(deriving(attrs.frozen(generic(t)))), dict),
    (lambda t: dataclasses.dataclass(deriving(dataclasses.dataclass(generic(t)))), dict),
    (lambda t: deriving(generic(t, TypedDict)), dict),
    (lambda t: deriving(generic(t, msgspec.Struct)), dict),
    (lambda t: generic(t, NamedTuple)[int], lambda fields: [*fields.values()]),
    (lambda t: generic(t, msgspec.Struct, array_like=True)[int],
     lambda fields: [*fields.values()]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "wrong", "right"), FIELDS_OF_T, ids=str)
def test_a_type_variable_is_substituted(field: Any, wrong: Any, right: Any) -> None:
    """Wherever it stands in a field, and in every kind of class, below a generic one too."""
    for make, form in MAKERS:
        cls = make(field)
        assert written(read(form({"x": right}), cls), cls) == form({"x": right})
        ((path, text),) = errors(form({"x": wrong}), cls)
        assert path.startswith((".x", "[0]")) and text.startswith("expected ")


def test_a_type_variable_without_a_type_is_told() -> None:
    """No one is told to decorate it."""
    assert "write the class that has it with its argument" in pachinko.advise(T)


class Ranked(NamedTuple):
    rank: int
    name: str = "a"
    score: float = 0.5


class Shown(Ranked):
    def text(self) -> str:
        return f"{self.name}: {self.rank}"


@pytest.mark.parametrize("payload", [[1], [1, "b"], [1, "b", 1.5]], ids=str)
def test_items_of_a_named_tuple_with_defaults_may_be_missing(payload: list[Any]) -> None:
    """As fields of a class may."""
    assert read(payload, Ranked) == Ranked(*payload)
    assert read([payload], list[Ranked] | None) == [Ranked(*payload)]
    assert type(read(payload, Shown)) is Shown and read(payload, Shown) == Ranked(*payload)


@pytest.mark.parametrize(
    ("payload", "path", "text"),
    [
        ([], "", "expected array of at least length 1, got 0"),
        ([1, "a", 1, 1], "", "expected 3 items, got 4"),
        (["a"], "[0]", "expected int, got str"),
        ([1, 2], "[1]", "expected str, got int"),
    ],
)
def test_a_named_tuple_has_a_least_number_of_items(payload: Any, path: str, text: str) -> None:
    """Those without a default, and no more than all."""
    assert errors(payload, Ranked) == [(path, text)]


@pytest.mark.parametrize("wrong", [5, None, [], {}, True], ids=str)
def test_a_path_is_a_text(wrong: Any) -> None:
    """A client is told so, and not in the words of pathlib."""
    assert read(["/a"], list[pathlib.Path]) == [pathlib.Path("/a")]
    text = f"expected str, got {pachinko.json_name(wrong)}"
    assert errors([wrong], list[pathlib.Path]) == [("[0]", text)]


@dataclasses.dataclass
class Unhashed:
    width: int


@pytest.mark.parametrize("item", [Unhashed, dict, list[int], dict[str, int], set[int], list | dict])
def test_no_set_of_what_has_no_hash(item: Any) -> None:
    """No payload would fit it; at any depth, and for each class of sets."""
    for annotation in (set[item], frozenset[item], list[collections.abc.Set[item] | None]):
        assert "has no hash to be in a set; write list[" in refused(annotation)


@pytest.mark.parametrize("key", [Unhashed, tuple[int, int], frozenset[int], int | tuple[int, ...]])
def test_no_key_is_an_array_or_object(key: Any) -> None:
    """A key of JSON is a text."""
    assert "is no key of a JSON object; write list[tuple[" in refused(dict[key, int])


@pytest.mark.parametrize("annotation", [set, set[Any], frozenset[object], set[int | list[int]]])
def test_an_item_without_a_hash_is_told_with_its_place(annotation: Any) -> None:
    """Where it depends on the payload whether a set can be made of it."""
    assert len(read([1, 2, 1], annotation)) == 2
    assert errors([1, [2]], annotation) == [("[1]", "expected no array or object in a set")]
