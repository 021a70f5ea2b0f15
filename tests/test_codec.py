"""The section "codec": JSON to what handlers take, and what they return to JSON."""

import collections
import dataclasses
import enum
import functools
import json
import sys
import typing
from collections.abc import Mapping, MutableSequence, Sequence
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from time import perf_counter
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    NotRequired,
    Optional,
    Required,
    TypedDict,
    TypeVar,
    Union,
    get_args,
    get_origin,
)
from uuid import UUID

import attrs
import cattrs
import pytest
import typing_extensions
from hypothesis import given, settings
from hypothesis import strategies as st

import pachinko
from pachinko import Codec, Hub, MessageError, Pachinko, PachinkoError

T = TypeVar("T")
HERE = (globals(), {})
STRICT = Codec()


def check(annotation: Any, codec: Codec = STRICT) -> Any:
    """Prepare *annotation* as registration does, and return it."""
    annotation = pachinko.hashable(annotation)
    codec.check(annotation, HERE, [])
    return annotation


def read(payload: Any, annotation: Any, codec: Codec = STRICT) -> Any:
    """What a handler takes."""
    return codec.structure(payload, check(annotation, codec), "t")


def errors(payload: Any, annotation: Any, codec: Codec = STRICT) -> list[tuple[str, str]]:
    """What is wrong with *payload*: paths after ``$.payload``, and messages."""
    with pytest.raises(MessageError) as caught:
        read(payload, annotation, codec)
    assert caught.value.code == "invalid_payload"
    found = caught.value.details["errors"]
    assert found
    assert all(list(error) == ["path", "message"] for error in found)
    assert all(error["path"].startswith("$.payload") for error in found)
    first = f"t: {found[0]['path']}: {found[0]['message']}"
    assert caught.value.message == first
    return [(error["path"].removeprefix("$.payload"), error["message"]) for error in found]


def written(value: Any, annotation: Any = None, codec: Codec = STRICT) -> Any:
    """The payload on the wire."""
    type, unstructure = codec.writer_of(value, "t", pachinko.hashable(annotation))
    frame = pachinko._encode(pachinko.Sent(type, payload=unstructure(value)))
    return json.loads(frame).get("payload")


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Size(enum.IntEnum):
    S = 1
    L = 2


class OldColor(str, enum.Enum):  # noqa: UP042 - how it was written before StrEnum
    RED = "red"


class NewColor(enum.StrEnum):
    RED = "red"


class Level(enum.Enum):
    NONE = None
    HALF = 0.5
    ONE = "1"
    TWO = 2
    YES = True


UserId = NewType("UserId", int)


@attrs.define
class Point:
    x: int
    y: int = 0


@attrs.frozen
class Text:
    text: str


@dataclasses.dataclass
class Data:
    a: int
    b: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Strict:
    point: Point
    note: str | None = None


class Pair(NamedTuple):
    point: Point
    name: str


class Options(TypedDict):
    a: int
    b: NotRequired[str]


class Loose(TypedDict, total=False):
    a: Required[int]
    p: Point


@attrs.define
class Node:
    value: int
    children: "list[Node]" = attrs.Factory(list)
    named: "dict[str, Node]" = attrs.Factory(dict)
    next: "Node | None" = None


@attrs.define
class Box(Generic[T]):
    item: T
    more: list[T] = attrs.Factory(list)


@dataclasses.dataclass
class Two(Generic[T]):
    one: T


def positive(_: Any, __: Any, value: Any) -> None:
    if value <= 0:
        raise ValueError("must be positive")


def after_low(self: Any, _: Any, value: Any) -> None:
    if value < self.low:
        raise ValueError("high is below low")


@attrs.define
class Range:
    low: int = attrs.field(validator=positive)
    high: int = attrs.field(validator=[positive, after_low])
    color: str = attrs.field(default="red", validator=attrs.validators.in_(["red", "blue"]))
    name: str = attrs.field(default="a", validator=attrs.validators.matches_re("[a-z]+"))
    any: Any = attrs.field(default=1, validator=attrs.validators.instance_of(int))


@attrs.define
class Odd:
    """One of each that a field of attrs may be."""

    _private: int
    aliased: int = attrs.field(alias="alias", validator=positive)
    computed: int = attrs.field(init=False, default=4)
    following: int = attrs.Factory(lambda self: self.aliased + 1, takes_self=True)
    stripped: str = attrs.field(default="", converter=str.strip)
    only_key: int = attrs.field(default=0, kw_only=True)


# The rules of the wire


@pytest.mark.parametrize(
    ("payload", "annotation", "message"),
    [
        (5, str, "expected str, got int"),
        ("5", int, "expected int, got str"),
        (True, int, "expected int, got bool"),
        (None, str, "expected str, got null"),
        ("abc", list[str], "expected array, got str"),
        (1.0, int, "expected int, got float"),
        (1, bool, "expected bool, got int"),
        (True, float, "expected float, got bool"),
        ("1.5", float, "expected float, got str"),
        ({}, str, "expected str, got object"),
        ([], int, "expected int, got array"),
        ({"a": 1}, list[str], "expected array, got object"),
        ([["a", 1]], dict[str, int], "expected object, got array"),
        ("ab", tuple[str, str], "expected array, got str"),
        ("ab", set[str], "expected array, got str"),
        ("ab", Sequence[str], "expected array, got str"),
        ("ab", collections.deque[str], "expected array, got str"),
        ("ab", list, "expected array, got str"),
        ([], dict, "expected object, got array"),
        ([], Point, "expected object, got array"),
        ("x", Point, "expected object, got str"),
        (None, Point, "expected object, got null"),
        (None, Data, "expected object, got null"),
        ([], Options, "expected object, got array"),
        ({}, Pair, "expected array, got object"),
        ([1], tuple[int, str], "expected 2 items, got 1"),
        ([1, "a", 2], tuple[int, str], "expected 2 items, got 3"),
        ([1], tuple[()], "expected 0 items, got 1"),
        ([], Pair, "expected 2 items, got 0"),
        (1, None | str, "expected str | null, got int"),
        (True, int | str, "expected int | str, got bool"),
        (None, int | str, "expected int | str, got null"),
        (True, Literal[1, "a"], 'expected one of 1, "a"'),
        (1.0, Literal[1], "expected one of 1"),
        (1, Literal[True], "expected one of true"),
        ([], Literal["a"], 'expected one of "a"'),
        ({}, Color, 'expected one of "red", "blue"'),
        ("green", Color, 'expected one of "red", "blue"'),
        ("RED", Color, 'expected one of "red", "blue"'),
        (1, Level, 'expected one of null, 0.5, "1", 2, true'),
        (True, Size, "expected one of 1, 2"),
        ("green", OldColor, 'expected one of "red"'),
        ("green", NewColor, 'expected one of "red"'),
        (7, Size | None, "expected one of 1, 2, null"),
        ("x", Color | int, 'expected one of "red", "blue", int'),
        (True, Literal[1] | None, "expected one of 1, null"),
        ("x", UUID, "invalid UUID"),
        ("x", Decimal, "invalid decimal string"),
        ("?", bytes, "invalid base64 encoded string"),
        (5, datetime, "expected datetime, got int"),
        ("2024-02-30", date, "invalid RFC3339 encoded date"),
        (60, timedelta, "expected duration, got int"),
        (10**400, float, "number out of range"),
        (5, Point | Text, "expected object, got int"),
        (5, Point | Text | None, "expected object, got int"),
        (5, Point | None, "expected object, got int"),
        (5, Point | str, "expected str, got int"),
        (5, list[int] | None, "expected array, got int"),
        ("5", UserId, "expected int, got str"),
        ("5", Annotated[int, "x"], "expected int, got str"),
    ],
)  # fmt: skip
def test_nothing_is_coerced(payload: Any, annotation: Any, message: str) -> None:
    """Each JSON kind stands for itself; another one is refused, in the words of the wire."""
    assert errors(payload, annotation) == [("", message)]


def test_an_integer_is_a_number() -> None:
    """JSON tells 5 and 5.0 apart no better than JavaScript does: an int is a valid float."""
    assert type(read(5, float)) is float
    assert type(read({"item": 5}, Box[float]).item) is float
    assert type(read(5, float | str)) is float


@pytest.mark.parametrize("annotation", [Point, Data, Odd, Options, Loose])
def test_unknown_keys_are_ignored(annotation: Any) -> None:
    """A newer client may send more than a handler takes."""
    known = {"x": 1, "a": 1, "private": 1, "alias": 1}
    assert read({**known, "new": [1]}, annotation) == read(known, annotation)


@pytest.mark.parametrize("payload", [None, 1, "a", [1, {"a": None}], {"a": [1.5]}])
@pytest.mark.parametrize("annotation", [Any, object])
def test_any_and_object_take_plain_json(payload: Any, annotation: Any) -> None:
    """Without a shape, a handler gets the JSON value, and what it returns goes out as it is."""
    assert read(payload, annotation) == payload
    assert written(payload, annotation) == payload


# Both ways


ZONE = timezone(timedelta(hours=2))
UID = UUID("12345678-1234-5678-1234-567812345678")
TREE = {
    "value": 1,
    "children": [{"value": 2, "children": [], "named": {}, "next": None}],
    "named": {"a": {"value": 3, "children": [], "named": {}, "next": None}},
    "next": {"value": 4, "children": [], "named": {}, "next": None},
}
BOTH_WAYS: list[tuple[Any, Any, Any]] = [
    (str, "é\n🂡", "é\n🂡"),
    (int, 2**70, 2**70),
    (float, 1.5, 1.5),
    (bool, True, True),
    (bytes, "aGk=", b"hi"),
    (datetime, "2024-01-02T03:04:05Z", datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)),
    (datetime, "2024-01-02T03:04:05+02:00", datetime(2024, 1, 2, 3, 4, 5, tzinfo=ZONE)),
    (datetime, "2024-01-02T03:04:05.000006", datetime(2024, 1, 2, 3, 4, 5, 6)),
    (date, "2024-01-02", date(2024, 1, 2)),
    (time, "03:04:05", time(3, 4, 5)),
    (timedelta, "P1DT2S", timedelta(days=1, seconds=2)),
    (UUID, str(UID), UID),
    (Decimal, "1.50", Decimal("1.50")),
    (Color, "red", Color.RED),
    (Size, 2, Size.L),
    (OldColor, "red", OldColor.RED),
    (NewColor, "red", NewColor.RED),
    (Level, 0.5, Level.HALF),
    (Level, "1", Level.ONE),
    (Level, 2, Level.TWO),
    (Level, True, Level.YES),
    (Literal[1, "a"], 1, 1),
    (Literal[True], True, True),
    (Literal[Color.RED], "red", Color.RED),
    (Literal["a", 1] | int, 5, 5),
    (list, [1, "a"], [1, "a"]),
    (list[int], [1, 2], [1, 2]),
    (list[Color], ["red"], [Color.RED]),
    (tuple, [1], (1,)),
    (tuple[()], [], ()),
    (tuple[int, ...], [1, 2, 3], (1, 2, 3)),
    (tuple[int, Point], [1, {"x": 1, "y": 2}], (1, Point(1, 2))),
    (set[int], [1], {1}),
    (frozenset[str], ["a"], frozenset({"a"})),
    (collections.deque[int], [1, 2], collections.deque([1, 2])),
    (MutableSequence[int], [1], [1]),
    (dict, {"a": [1]}, {"a": [1]}),
    (dict[str, Point], {"a": {"x": 1, "y": 2}}, {"a": Point(1, 2)}),
    (dict[int, int], {"1": 1, "-2": 2}, {1: 1, -2: 2}),
    (dict[float, int], {"1.5": 1}, {1.5: 1}),
    (dict[UUID, int], {str(UID): 1}, {UID: 1}),
    (dict[date, int], {"2024-01-02": 1}, {date(2024, 1, 2): 1}),
    (dict[Decimal, int], {"1.5": 1}, {Decimal("1.5"): 1}),
    (dict[Color, int], {"red": 1}, {Color.RED: 1}),
    (dict[Size, int], {"2": 1}, {Size.L: 1}),
    (dict[UserId, int], {"1": 1}, {1: 1}),
    (dict[Literal[1, 2], int], {"1": 1}, {1: 1}),
    (dict[int, list[Point]], {"1": [{"x": 1, "y": 2}]}, {1: [Point(1, 2)]}),
    (Mapping[str, int], {"a": 1}, {"a": 1}),
    (Mapping[int, int], {"1": 1}, {1: 1}),
    (collections.OrderedDict[str, int], {"a": 1}, collections.OrderedDict(a=1)),
    (collections.defaultdict[str, int], {"a": 1}, collections.defaultdict(int, a=1)),
    (int | str, 1, 1),
    (int | str, "1", "1"),
    (float | str, 1.5, 1.5),
    (int | float, 1, 1),
    (UUID | int, 1, 1),
    (UUID | int, str(UID), UID),
    (Color | int, "blue", Color.BLUE),
    (Color | int, 3, 3),
    (Size | None, 1, Size.S),
    (list[int] | None, [1], [1]),
    (Optional[dict[str, int]], {"a": 1}, {"a": 1}),  # noqa: UP045 - as it may be written
    (Union[int, list[int]], [1], [1]),  # noqa: UP007 - as it may be written
    (list[int] | dict[str, int], [1], [1]),
    (list[int] | dict[str, int], {"a": 1}, {"a": 1}),
    (Point | None, {"x": 1, "y": 2}, Point(1, 2)),
    (Point | str, "a", "a"),
    (Point | str, {"x": 1, "y": 2}, Point(1, 2)),
    (Point | datetime, "2024-01-02T03:04:05Z", datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)),
    (Point | Color, "red", Color.RED),
    (Point | list[Point], {"x": 1, "y": 2}, Point(1, 2)),
    (Point | list[Point], [{"x": 1, "y": 2}], [Point(1, 2)]),
    (Point | Text, {"x": 1, "y": 2}, Point(1, 2)),
    (Point | Text, {"text": "a"}, Text("a")),
    (Point | Text | None, {"text": "a"}, Text("a")),
    (Point | Text | str | list[int], {"text": "a"}, Text("a")),
    (Point | Text | str | list[int], "a", "a"),
    (list[Point | Text], [{"x": 1, "y": 2}, {"text": "a"}], [Point(1, 2), Text("a")]),
    (Point, {"x": 1, "y": 2}, Point(1, 2)),
    (Data, {"a": 1, "b": [1]}, Data(1, [1])),
    (Strict, {"point": {"x": 1, "y": 2}, "note": None}, Strict(point=Point(1, 2))),
    (Pair, [{"x": 1, "y": 2}, "a"], Pair(Point(1, 2), "a")),
    (Options, {"a": 1}, {"a": 1}),
    (Options, {"a": 1, "b": "x"}, {"a": 1, "b": "x"}),
    (Loose, {"a": 1, "p": {"x": 1, "y": 2}}, {"a": 1, "p": Point(1, 2)}),
    (Options | None, {"a": 1}, {"a": 1}),
    (list[Options], [{"a": 1}], [{"a": 1}]),
    (Node, TREE, Node(1, [Node(2)], {"a": Node(3)}, Node(4))),
    (Box[int], {"item": 1, "more": [2]}, Box(1, [2])),
    (Box[Point], {"item": {"x": 1, "y": 2}, "more": []}, Box(Point(1, 2))),
    (Box[Box[int] | None], {"item": None, "more": []}, Box(None)),
    (Two[Point], {"one": {"x": 1, "y": 2}}, Two(Point(1, 2))),
    (UserId, 5, 5),
    (UserId | None, 5, 5),
    (Annotated[Point, "x"], {"x": 1, "y": 2}, Point(1, 2)),
    (Annotated[Point, "x"] | None, {"x": 1, "y": 2}, Point(1, 2)),
    (list[Annotated[int, "x"]], [1], [1]),
]


@pytest.mark.parametrize(
    ("annotation", "payload", "value"), BOTH_WAYS, ids=[str(row[0]) for row in BOTH_WAYS]
)
def test_a_type_comes_in_and_goes_out(annotation: Any, payload: Any, value: Any) -> None:
    """A value is structured to the declared type, and goes out as it came."""
    found = read(payload, annotation)
    assert found == value
    assert type(found) is type(value)
    assert written(value, annotation) == payload


@pytest.mark.parametrize("annotation", [int | None, Point | None, list[int] | None, Level])
def test_null_comes_in_and_goes_out(annotation: Any) -> None:
    """A type that admits null takes it, and None in a field goes out as null."""
    assert read(None, annotation) in (None, Level.NONE)
    assert written([read(None, annotation)], list[annotation]) == [None]


def test_a_sequence_takes_an_array() -> None:
    """`Sequence` gives a sequence of the items, whichever it is."""
    assert list(read([{"x": 1}], Sequence[Point])) == [Point(1)]


def test_each_attrs_feature_counts_on_the_way_in() -> None:
    """Private names, aliases, computed defaults, converters and keyword-only fields work."""
    found = read({"private": 1, "alias": 2, "stripped": " a ", "only_key": 5}, Odd)
    assert found == Odd(1, alias=2, stripped="a", only_key=5)
    assert (found.computed, found.following) == (4, 3)


def test_a_field_without_init_is_not_set_from_the_wire() -> None:
    """``init=False`` belongs to the server."""
    assert read({"private": 1, "alias": 2, "computed": 9}, Odd).computed == 4


def test_the_names_of_the_wire_are_the_names_of_the_constructor() -> None:
    """Out as in: aliases, and private names without their underscore."""
    assert written(Odd(1, 2)) == {
        "private": 1, "alias": 2, "following": 3, "stripped": "", "only_key": 0
    }  # fmt: skip


def test_defaults_are_made_anew() -> None:
    """A mutable default is not shared between messages."""
    first, second = read({"item": 1}, Box[int]), read({"item": 1}, Box[int])
    first.more.append(1)
    assert second.more == []


def test_a_typeddict_drops_what_it_does_not_declare() -> None:
    """Extra keys of a TypedDict neither come in nor go out."""
    extra = {"a": 1, "secret": 2}
    assert read(extra, Options) == {"a": 1}
    assert written(extra, Options) == {"a": 1}
    assert written([extra], list[Options]) == [{"a": 1}]
    assert written(extra, Options | None) == {"a": 1}
    assert extra == {"a": 1, "secret": 2}


def test_a_key_that_spells_no_member_is_named() -> None:
    """A dict's key is checked like a value."""
    assert errors({"x": 1}, dict[int, int]) == [('["x"]', "expected int, got str")]
    assert errors({"1.5": 1}, dict[int, int]) == [('["1.5"]', "expected int, got str")]
    assert errors({"green": 1}, dict[Color, int]) == [
        ('["green"]', 'expected one of "red", "blue"')
    ]
    assert errors({"[[": 1}, dict[UserId, int]) == [('["[["]', "expected int, got str")]


def test_a_dict_of_another_kind_of_mapping_keeps_its_kind() -> None:
    """The keys of any mapping are read from text, and the mapping is the declared one."""
    found = read({"1": 2}, collections.OrderedDict[int, int])
    assert found == collections.OrderedDict({1: 2})
    assert type(found) is collections.OrderedDict
    counts = read({"1": 2}, collections.defaultdict[int, int])
    assert type(counts) is collections.defaultdict
    assert counts[1] == 2


ALIASES = """
type Ids = list[int]
type Tree = dict[str, Tree | int]
class Gen[X]:
    item: X
Gen = attrs.define(Gen)
"""

if sys.version_info >= (3, 12):

    def test_a_type_alias_is_its_value() -> None:
        """PEP 695: ``type Ids = list[int]``, recursive aliases and generic classes work."""
        names: dict[str, Any] = {"attrs": attrs, "__name__": __name__}
        exec(ALIASES, names)
        assert read([1], names["Ids"]) == [1]
        assert errors(["x"], names["Ids"]) == [("[0]", "expected int, got str")]
        assert read({"item": [1]}, names["Gen"][names["Ids"]]).item == [1]
        assert written([1], names["Ids"]) == [1]


# What goes out


class CachedOut:
    a: int

    @functools.cached_property
    def hidden(self) -> str:
        return "server"


CachedSlots = attrs.define(type("CachedSlots", (), dict(vars(CachedOut))))


@attrs.define(slots=False)
class CachedDict:
    a: int

    @functools.cached_property
    def hidden(self) -> str:
        return "server"


@dataclasses.dataclass
class CachedData:
    a: int

    @functools.cached_property
    def hidden(self) -> str:
        return "server"


@pytest.mark.parametrize("cls", [CachedSlots, CachedDict, CachedData])
def test_cached_properties_stay_here(cls: Any) -> None:
    """A cached property is no field, also after it was computed."""
    value = cls(1)
    assert value.hidden == "server"
    assert written(value) == {"a": 1}
    assert written([value], list[cls]) == [{"a": 1}]


@pytest.mark.parametrize("cls", [CachedDict, CachedData])
def test_other_attributes_stay_here(cls: Any) -> None:
    """What the server hangs on an object is no field."""
    value = cls(1)
    value.session = "secret"
    assert written(value) == {"a": 1}


@attrs.define
class SecretPoint(Point):
    secret: str = "s"


@dataclasses.dataclass
class SecretData(Data):
    secret: str = "s"


class Placed(TypedDict):
    point: Point


class Named(NamedTuple):
    point: Point


SECRET = SecretPoint(1, 2)
OPEN = {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("value", "declared", "payload"),
    [
        (SECRET, Point, OPEN),
        (SECRET, Point | None, OPEN),
        (SECRET, Point | Text, OPEN),
        (SECRET, Point | str, OPEN),
        (SECRET, Annotated[Point, "x"], OPEN),
        (SECRET, Annotated[Point, "x"] | None, OPEN),
        ([SECRET], list[Point], [OPEN]),
        ([SECRET], Sequence[Point], [OPEN]),
        ([SECRET], list[Point] | None, [OPEN]),
        ([SECRET], Sequence[Point] | None, [OPEN]),
        ([SECRET], list[Point] | Point, [OPEN]),
        ([SECRET], list[Point | Text], [OPEN]),
        ([SECRET], list[Point | None], [OPEN]),
        (collections.deque([SECRET]), collections.deque[Point], [OPEN]),
        ((SECRET,), tuple[Point, ...], [OPEN]),
        ((SECRET, 1), tuple[Point, int], [OPEN, 1]),
        ({"k": SECRET}, dict[str, Point], {"k": OPEN}),
        ({"k": SECRET}, Mapping[str, Point], {"k": OPEN}),
        ({"k": [SECRET]}, dict[str, list[Point]] | None, {"k": [OPEN]}),
        (Box(SECRET), Box[Point], {"item": OPEN, "more": []}),
        ([Box(SECRET)], list[Box[Point]], [{"item": OPEN, "more": []}]),
        (Strict(point=SECRET), None, {"point": OPEN, "note": None}),
        (Named(SECRET), Named, [OPEN]),
        ({"point": SECRET}, Placed, {"point": OPEN}),
        ([{"point": SECRET, "x": 1}], list[Placed], [{"point": OPEN}]),
        ({"point": SECRET, "x": 1}, Placed | None, {"point": OPEN}),
        (SecretData(1), Data, {"a": 1, "b": []}),
        ([SecretData(1)], list[Data | Point], [{"a": 1, "b": []}]),
    ],
    ids=str,
)  # fmt: skip
def test_a_subclass_goes_out_as_what_was_declared(value: Any, declared: Any, payload: Any) -> None:
    """Where a base class was declared, the fields of a subclass stay here."""
    assert written(value, check(declared) if declared else None) == payload


def test_the_exact_member_of_a_union_is_preferred() -> None:
    """A union that names the subclass as well shows all its fields."""
    assert written(SECRET, Point | SecretPoint) == {**OPEN, "secret": "s"}


def test_a_value_beside_its_declaration_goes_out_by_its_own_class() -> None:
    """Nothing is lost when a union does not name what was returned."""
    assert written(Text("a"), Point | None) == {"text": "a"}


def test_undeclared_objects_go_out_by_their_class() -> None:
    """Without a declaration, an object's own class is its declaration, at any depth."""
    assert written([{"a": Point(1)}, (Text("b"),), {1}]) == [
        {"a": {"x": 1, "y": 0}}, [{"text": "b"}], [1]
    ]  # fmt: skip


@pytest.mark.parametrize(
    "value", [object(), print, (x for x in ()), Exception("x"), Point, {(1, 2): 3}, {None: 1}]
)
def test_what_is_no_message_cannot_go_out(value: Any) -> None:
    """Encoding raises for what has no JSON; it is never sent as its repr."""
    with pytest.raises((TypeError, ValueError)):
        STRICT.encode("t", value)


def test_no_payload_is_no_key() -> None:
    """A None as the whole payload is left out."""
    assert json.loads(STRICT.encode("t", None)) == {"type": "t"}


# What is wrong


def test_every_wrong_field_is_reported_at_once() -> None:
    """Nested fields, items and values of dicts, each by its path."""
    payload = {
        "value": "x",
        "children": [{"value": 1}, {"value": None, "children": [5]}],
        "named": {"a b": {}, 'say "hi"': []},
        "next": {"next": {"value": []}},
    }
    assert errors(payload, Node) == [
        (".value", "expected int, got str"),
        (".children[1].value", "expected int, got null"),
        (".children[1].children[0]", "expected object, got int"),
        ('.named["a b"].value', "required, but missing"),
        ('.named["say "hi""]', "expected object, got array"),
        (".next.value", "required, but missing"),
        (".next.next.value", "expected int, got array"),
    ]


@pytest.mark.parametrize(
    ("payload", "annotation", "path"),
    [
        ([1, "x"], list[int], "[1]"),
        ([1, "x"], tuple[int, ...], "[1]"),
        (["x", "x"], tuple[str, int], "[1]"),
        ([[1], ["x"]], list[list[int]], "[1][0]"),
        (["x"], set[int], "[0]"),
        (["x"], collections.deque[int], "[0]"),
        ({"k": "x"}, dict[str, int], '["k"]'),
        ({"k" * 100: "x"}, dict[str, int], f'["{"k" * 64}"]'),
        ({"point": {"x": "x"}}, Strict, ".point.x"),
        ([{"x": "x"}, "a"], Pair, "[0].x"),
        ({"a": "x"}, Options, ".a"),
        ({"a": 1, "p": {"x": "x"}}, Loose, ".p.x"),
        ({"item": {"item": "x"}}, Box[Box[int]], ".item.item"),
        ({"one": "x"}, Two[int], ".one"),
        ({"x": "x"}, Point | Text, ".x"),
        ({"text": 5}, Point | Text | None, ".text"),
        ({"x": "x"}, Point | str, ".x"),
        ([{"x": "x"}], list[Point] | None, "[0].x"),
        ({"private": "x", "alias": 1}, Odd, ".private"),
        ({"private": 1, "alias": "x"}, Odd, ".alias"),
        ({"private": 1, "alias": -1}, Odd, ".alias"),
    ],
)  # fmt: skip
def test_a_path_leads_to_the_wrong_field(payload: Any, annotation: Any, path: str) -> None:
    """A path is written as in JavaScript, with the names of the wire."""
    assert [found for found, _ in errors(payload, annotation)] == [path]


def test_missing_fields_are_reported() -> None:
    """What is required and missing is named as the wire names it."""
    missing = "required, but missing"
    assert errors({}, Odd) == [(".private", missing), (".alias", missing)]
    assert errors({"b": 1}, Options) == [(".a", missing), (".b", "expected str, got int")]
    assert errors({}, Loose) == [(".a", missing)]


def test_neither_class_of_a_union_fits() -> None:
    """An object with the fields of no member is refused."""
    assert [path for path, _ in errors({}, Point | Text)] == [""]


def test_several_failing_validators_are_reported_at_once() -> None:
    """attrs stops at the first one; we report each in its own words, beside wrong types."""
    payload = {"low": -1, "high": -2, "color": "green", "name": 5, "any": "x"}
    assert errors(payload, Range) == [
        (".low", "must be positive"),
        (".high", "must be positive"),
        (".color", "'color' must be in ['red', 'blue'] (got 'green')"),
        (".name", "expected str, got int"),
        (".any", "'any' must be <class 'int'> (got 'x' that is a <class 'str'>)."),
    ]


def test_a_validator_of_attrs_speaks_for_itself() -> None:
    """Only the text of attrs' validators goes out; they attach the field and the options."""
    assert errors({"low": 1, "high": 2, "name": "A"}, Range) == [
        (".name", "'name' must match regex '[a-z]+' ('A' doesn't)")
    ]


def test_a_validator_may_look_at_the_instance() -> None:
    """A rule between fields is reported for the object."""
    assert errors({"low": 5, "high": 1}, Range) == [("", "high is below low")]
    assert errors([{"low": 5, "high": 1}], list[Range]) == [("[0]", "high is below low")]


def test_validators_of_nested_classes_are_reported() -> None:
    """The path of a validator's error leads through lists and dicts."""
    payload = [{"low": 1, "high": 1}, {"low": 0, "high": 0}]
    assert errors({"k": payload}, dict[str, list[Range]]) == [
        ('["k"][1].low', "must be positive"),
        ('["k"][1].high', "must be positive"),
    ]


@attrs.define
class Chain:
    count: int = attrs.field(default=1, validator=positive)
    links: "list[Chain]" = attrs.Factory(list)
    more: "list[Chain]" = attrs.field(factory=list, validator=attrs.validators.max_len(3))


def test_validators_of_a_deep_value_are_asked_once() -> None:
    """The time to explain does not explode with the depth of a recursive class."""
    payload: Any = {"count": 0, "more": [{}] * 4}
    for _ in range(30):
        payload = {"count": 0, "links": [payload], "more": [{"more": [{}]}]}
    assert len(errors(payload, Chain)) == 30 + 2


@attrs.define
class Validated(Generic[T]):
    item: T
    count: int = attrs.field(validator=positive)


def test_a_generic_class_may_have_validators() -> None:
    """Type errors and validators of a generic class are reported together."""
    assert errors({"item": "x", "count": 0}, Validated[int]) == [
        (".item", "expected int, got str"),
        (".count", "must be positive"),
    ]


def add_low(value: int, self: Any) -> int:
    return value + int(self.low)


@attrs.define
class Converted:
    low: int
    high: int = attrs.field(converter=attrs.Converter(add_low, takes_self=True), validator=positive)
    text: str = attrs.field(default="x", converter=str.strip, validator=attrs.validators.min_len(1))


def test_validators_see_what_converters_made() -> None:
    """As in attrs, a converter comes before the validator."""
    assert read({"low": 2, "high": -1}, Converted) == Converted(2, -1)
    found = errors({"low": 2, "high": -1, "text": "  "}, Converted)
    assert found == [(".text", "Length of 'text' must be >= 1: 0")]


def test_a_converter_that_takes_the_instance_does_not_confuse() -> None:
    """Only the validator's own words are shown for a field with an `attrs.Converter`."""
    assert errors({"low": 2, "high": -9}, Converted) == [("", "must be positive")]
    assert errors({"low": "x", "high": -9}, Converted) == [(".low", "expected int, got str")]


class Unspeakable(Exception):
    pass


def leak(_: Any, __: Any, value: Any) -> None:
    raise Unspeakable("postgres://user:password@host")


@attrs.define
class Leaky:
    a: int = attrs.field(validator=leak)


def test_an_unexpected_exception_is_not_told() -> None:
    """Only a ValueError or a TypeError is meant for the client."""
    assert errors({"a": 1}, Leaky) == [(".a", "invalid value")]


def unknown(_: Any, __: Any, value: Any) -> None:
    raise KeyError(value)


@attrs.define
class Unknown:
    a: int = attrs.field(validator=unknown)


def test_a_validator_that_lacks_a_key_is_no_missing_field() -> None:
    """Its `KeyError` is not that of a payload without the field."""
    assert errors({"a": 1}, Unknown) == [(".a", "invalid value")]


def noted(_: Any, __: Any, value: Any) -> None:
    error = ValueError("too odd")
    error.add_note("for the log")
    raise error


@attrs.define
class Noted:
    a: int = attrs.field(validator=noted)


def test_notes_of_an_exception_are_not_told() -> None:
    """A note that the application adds is for its log."""
    assert errors({"a": 1}, Noted) == [(".a", "too odd")]


class Silent(ValueError):
    def __init__(self, value: Any) -> None:
        super().__init__(object(), value)


def silent(_: Any, __: Any, value: Any) -> None:
    raise Silent(value)


@attrs.define
class Mute:
    a: int = attrs.field(validator=silent)


def test_arguments_that_are_no_text_are_not_told() -> None:
    """No repr of the server's objects reaches a client."""
    assert errors({"a": 1}, Mute) == [(".a", "invalid value")]


def test_the_number_of_errors_is_bounded() -> None:
    """An answer names a hundred errors, and says that there are more."""
    found = errors(["x"] * 1_000, list[int])
    assert len(found) == pachinko._MAX_ERRORS + 1
    assert found[-2:] == [("[99]", "expected int, got str"), ("", "and more")]


@pytest.mark.parametrize("annotation", [list[int], list[Point], list[Range], dict[str, int]])
def test_of_a_large_payload_the_first_errors_are_told(annotation: Any) -> None:
    """To find each of its errors would hold up every other client for seconds."""
    texts = {f"{n}": "" for n in range(99_999)}
    payload: Any = texts if annotation == dict[str, int] else [{}] * 300_000
    before = perf_counter()
    found = errors(payload, annotation)
    assert perf_counter() - before < 1
    assert len(found) == pachinko._MAX_ERRORS + 1
    assert found[0][0].startswith("[") and found[-1] == ("", "and more")


@attrs.define
class Twig:
    value: int
    left: "Twig | None" = None
    right: "Twig | None" = None


def test_the_errors_of_a_large_tree_are_not_all_looked_for() -> None:
    """A class with several fields of itself has many errors with few in each object."""
    payload: Any = None
    for _ in range(16):
        payload = {"value": "x", "left": payload, "right": payload}
    before = perf_counter()
    assert len(errors(payload, Twig)) == pachinko._MAX_ERRORS + 1
    assert perf_counter() - before < 1


@pytest.mark.parametrize("size", [10, 20_000, 900_000])
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_path_does_not_depend_on_the_size(size: int, place: str) -> None:
    """A body of many letters and a missing title are answered as with ten letters."""
    note = {"body": "a" * size, "tags": ["x"] * (size // 10)}
    assert errors(note, Note) == [(".title", "required, but missing")]
    whole = {"title": "t", **note}
    payload = [{"body": ""}, *[whole] * 3] if place == "first" else [*[whole] * 3, {"body": ""}]
    index = 0 if place == "first" else 3
    assert errors(payload, list[Note]) == [(f"[{index}].title", "required, but missing")]


@attrs.define
class Note:
    title: str
    body: str
    tags: list[str] = attrs.Factory(list)


def test_a_large_payload_comes_in() -> None:
    """The rules for a large payload are the same."""
    payload = [{"x": 1, "y": 2}] * 2_000
    assert read(payload, list[Point]) == [Point(1, 2)] * 2_000
    assert read([1] * 10_000, list[float])[-1] == 1.0


def test_exactly_as_many_errors_as_fit_are_all_there_are() -> None:
    """At the bound nothing is added."""
    found = errors(["x"] * pachinko._MAX_ERRORS, list[int])
    assert found[-1] == ("[99]", "expected int, got str")


def nested(depth: int, inner: Any = None) -> Any:
    for _ in range(depth):
        inner = {"value": 1, "next": inner}
    return inner


def test_a_recursive_class_may_nest_as_deep_as_a_frame() -> None:
    """What `decode` lets through can be structured."""
    found, depth = read(nested(pachinko._MAX_DEPTH - 1), Node), 0
    while found is not None:
        found, depth = found.next, depth + 1
    assert depth == pachinko._MAX_DEPTH - 1


def test_a_value_that_nests_too_deeply_is_refused() -> None:
    """Whatever the depth, the answer is `invalid_payload`."""
    ((_, message),) = errors(nested(50_000), Node)
    assert message == "nested too deeply"


# A converter of the user's


class Money:
    def __init__(self, cents: int) -> None:
        self.cents = cents


def with_money() -> cattrs.Converter:
    converter = Hub().converter.copy()
    converter.register_structure_hook(Money, lambda value, _: Money(round(float(value) * 100)))
    converter.register_unstructure_hook(Money, lambda money: f"{money.cents / 100:.2f}")
    return converter


@attrs.define
class Price:
    amount: Money
    tip: Money | None = None


def test_a_copy_of_the_strict_converter_takes_hooks() -> None:
    """A hook for a class of one's own counts in and out; the rest stays strict."""
    codec = Codec(with_money())
    found = read({"amount": "1.5", "tip": None}, Price, codec)
    assert (found.amount.cents, found.tip) == (150, None)
    assert written(found, Price, codec) == {"amount": "1.50", "tip": None}
    assert errors({"x": "1"}, Point, codec) == [(".x", "expected int, got str")]
    assert errors({"amount": "x"}, Price, codec) == [
        (".amount", "could not convert string to float: 'x'")
    ]


def test_without_the_hook_the_class_is_refused() -> None:
    """The copy has not changed the original."""
    with pytest.raises(cattrs.StructureHandlerNotFoundError):
        check(Price)


def test_a_converter_may_forbid_extra_keys() -> None:
    """Then unknown keys are named."""
    codec = Codec(cattrs.Converter(forbid_extra_keys=True))
    assert errors({"x": 1, "b": 1, "a": 2}, Point, codec) == [("", "unknown: a, b")]


def test_a_plain_converter_coerces_as_it_does() -> None:
    """With a converter of the user's, cattrs decides alone."""
    codec = Codec(cattrs.Converter())
    assert read({"x": "5"}, Point, codec) == Point(5)
    assert errors({"x": "abc"}, Point, codec) == [
        (".x", "invalid literal for int() with base 10: 'abc'")
    ]


def test_the_hub_of_an_endpoint_brings_the_converter() -> None:
    """``hub.configure(converter=…)`` counts for the handlers registered after it."""
    hub = Hub()
    hub.configure(converter=with_money())
    ws = Pachinko(hub=hub)

    @ws.on("pay")
    async def pay(conn: Any, price: Price) -> None: ...

    handler = ws._routes.handlers["pay"]
    assert handler.structure({"amount": "2"}, hub.state.codec).amount.cents == 200


def test_configure_without_a_converter_is_strict_again() -> None:
    """None is the default."""
    hub = Hub()
    hub.configure(converter=with_money())
    hub.configure(converter=None)
    with pytest.raises(cattrs.StructureHandlerNotFoundError):
        check(Price, hub.state.codec)


@pytest.mark.parametrize("converter", ["strict", cattrs.Converter, object(), 5])
def test_what_is_no_converter_is_refused(converter: Any) -> None:
    """The hint shows an instance."""
    with pytest.raises(TypeError, match=r"hub.configure\(converter=cattrs.Converter\(\)\)"):
        Hub().configure(converter=converter)


async def test_a_hub_that_serves_is_not_reconfigured() -> None:
    """All messages of a running app have one encoding."""
    hub = Hub()
    ws = Pachinko(hub=hub)
    await ws.process_startup({}, {})
    with pytest.raises(PachinkoError, match="before the app starts"):
        hub.configure(converter=cattrs.Converter())
    await ws.process_shutdown({}, {})
    hub.configure(converter=cattrs.Converter())


# Properties


FINITE = st.floats(allow_nan=False, allow_infinity=False)
ZONES = st.sampled_from([None, UTC, timezone(timedelta(hours=-3, minutes=-30))])


@attrs.define
class Everything:
    """A class whose values hypothesis makes."""

    i: int
    f: float
    s: str
    b: bool
    raw: bytes
    when: datetime
    day: date
    lasting: timedelta
    uid: UUID
    amount: Decimal
    color: Color
    size: Size | None
    literal: Literal[1, True, "a", None]
    numbers: list[int | None]
    pairs: tuple[int, str]
    many: tuple[float, ...]
    chosen: frozenset[int]
    points: dict[str, Point]
    by_id: dict[int, Text]
    either: Point | Text | str | None
    data: Data
    box: Box[int | str]
    options: Options
    named: Pair


TEXTS = st.text()
POINTS = st.builds(Point, st.integers(), st.integers())
EVERYTHING = st.builds(
    Everything,
    i=st.integers(),
    f=FINITE,
    s=TEXTS,
    b=st.booleans(),
    raw=st.binary(),
    when=st.datetimes(timezones=ZONES),
    day=st.dates(),
    lasting=st.timedeltas(timedelta(-10_000), timedelta(10_000)),
    uid=st.uuids(),
    amount=st.decimals(allow_nan=False, allow_infinity=False),
    color=st.sampled_from(Color),
    size=st.none() | st.sampled_from(Size),
    literal=st.sampled_from([1, True, "a", None]),
    numbers=st.lists(st.none() | st.integers(), max_size=3),
    pairs=st.tuples(st.integers(), TEXTS),
    many=st.lists(FINITE, max_size=3).map(tuple),
    chosen=st.frozensets(st.integers(), max_size=3),
    points=st.dictionaries(TEXTS, POINTS, max_size=2),
    by_id=st.dictionaries(st.integers(), st.builds(Text, TEXTS), max_size=2),
    either=st.none() | POINTS | st.builds(Text, TEXTS) | TEXTS,
    data=st.builds(Data, st.integers(), st.lists(st.integers(), max_size=3)),
    box=st.builds(Box, st.integers() | TEXTS),
    options=st.fixed_dictionaries({"a": st.integers()}, optional={"b": TEXTS}),
    named=st.builds(Pair, POINTS, TEXTS),
)


@given(EVERYTHING)
@settings(deadline=None, max_examples=50)
def test_what_goes_out_comes_in_again(value: Everything) -> None:
    """Encoding and decoding is the identity."""
    frame = pachinko.decode_or_error(STRICT.encode("t", value).decode())
    found = read(frame.payload, Everything)
    assert found == value
    assert conforms(found, Everything)


NODES = st.recursive(
    st.builds(Node, st.integers()),
    lambda inner: st.builds(
        Node, st.integers(), st.lists(inner, max_size=2),
        st.dictionaries(TEXTS, inner, max_size=2), st.none() | inner,
    ),
    max_leaves=8,
)  # fmt: skip


@given(NODES)
@settings(deadline=None)
def test_trees_come_in_again(node: Node) -> None:
    """The same for a recursive class."""
    frame = pachinko.decode_or_error(STRICT.encode("t", node).decode())
    assert read(frame.payload, Node) == node


def conforms(value: Any, annotation: Any, bound: Mapping[Any, Any] | None = None) -> bool:
    """Whether *value* is inside *annotation*: an oracle that shares nothing with the codec."""
    annotation = (bound or {}).get(annotation, annotation)
    inside = functools.partial(conforms, bound=bound)
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in (Any, object):
        return True
    if origin in (Annotated, Required, NotRequired):
        return inside(value, args[0])
    if origin in (Union, UnionType):
        return any(inside(value, member) for member in args)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in args)
    if isinstance(annotation, NewType):
        return inside(value, annotation.__supertype__)
    cls = origin or annotation
    if typing.is_typeddict(cls):
        hints = typing.get_type_hints(cls, include_extras=True)
        return (
            type(value) is dict
            and cls.__required_keys__ <= value.keys() <= hints.keys()
            and all(inside(item, hints[key]) for key, item in value.items())
        )
    if type(value) is not {Sequence: tuple, Mapping: dict}.get(cls, cls):
        return False
    if attrs.has(cls) or dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls, include_extras=True)
        params = dict(zip(getattr(cls, "__parameters__", ()), args, strict=False))
        names = [name for name in hints if not name.startswith("__")]
        return all(
            conforms(getattr(value, name), substitute(hints[name], params)) for name in names
        )
    if hasattr(cls, "_fields"):
        hints = typing.get_type_hints(cls)
        return all(inside(item, hints[name]) for name, item in value._asdict().items())
    if not args:
        return True
    if issubclass(cls, Mapping):
        return all(inside(key, args[0]) and inside(item, args[1]) for key, item in value.items())
    if cls is tuple and Ellipsis not in args:
        return len(value) == len(args) and all(map(inside, value, args))
    return all(inside(item, args[0]) for item in value)


def substitute(annotation: Any, params: dict[Any, Any]) -> Any:
    """*annotation* with its type variables replaced."""
    if annotation in params:
        return params[annotation]
    free = getattr(annotation, "__parameters__", ())
    return annotation[tuple(params[name] for name in free)] if free else annotation


ANNOTATIONS: list[Any] = [
    str, int, float, bool, NoneType, bytes, datetime, date, time, timedelta, UUID, Decimal, list,
    dict, set, Color, Size, OldColor, Level, Literal[1, "a"], Literal[True, None], int | str,
    float | None, int | float, bool | str, Color | int, Size | None, Level | None,
    Literal[1] | None, list[int], list[str | None], list[Any], tuple[int, str], tuple[float, ...],
    set[int], frozenset[str], collections.deque[int], Sequence[str], Mapping[str, int],
    dict[str, bool], dict[int, str], dict[float, int], dict[Color, int], dict[Size, Any],
    dict[UserId, int], collections.OrderedDict[int, int], collections.defaultdict[int, int],
    list[int] | dict[str, int], list[int] | None, Point, Text, Data, Strict, Pair, Options, Loose,
    Node, Box[int], Box[list[float]], Two[str], Range, Odd, Converted, Point | Text,
    Point | Text | None, Point | str | int, Point | list[Point], list[Point | Text], UserId,
    UserId | None, Annotated[int, "x"], Annotated[Point, "x"] | None, list[Options], object,
    dict[str, Point | None], Everything,
]  # fmt: skip

SCALARS = (
    st.none() | st.booleans() | st.integers() | FINITE | TEXTS
    | st.sampled_from([0, 1, 2, 1.0, "a", "1", "red", "2024-01-02", "aGk=", str(UID), "PT1S"])
)  # fmt: skip
KEYS = TEXTS | st.sampled_from([
    "a", "b", "p", "x", "y", "1", "1.5", "red", "item", "more", "one", "text", "point", "value",
    "children", "named", "next", "low", "high", "private", "alias", "true", "null",
])  # fmt: skip
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.parametrize("annotation", ANNOTATIONS, ids=str)
@given(payload=JSON)
@settings(deadline=None, max_examples=25)
def test_no_payload_breaks_out_of_its_annotation(annotation: Any, payload: Any) -> None:
    """Whatever comes, a handler sees what its annotation says, or the client gets errors."""
    try:
        value = read(payload, annotation)
    except MessageError:
        errors(payload, annotation)
    else:
        assert conforms(value, annotation)


@given(EVERYTHING, st.data())
@settings(deadline=None, max_examples=50)
def test_one_wrong_field_among_many_is_found(value: Everything, data: st.DataObject) -> None:
    """Of a valid payload with one field replaced, only that field is ever reported."""
    payload = written(value, Everything)
    name = data.draw(st.sampled_from(sorted(payload)))
    payload[name] = data.draw(JSON)
    try:
        found = read(payload, Everything)
    except MessageError:
        for path, _ in errors(payload, Everything):
            assert path.startswith(f".{name}")
    else:
        assert conforms(found, Everything)


@dataclasses.dataclass
class Annotating:
    _: dataclasses.KW_ONLY
    kind: typing.ClassVar[str] = "odd"
    amount: Decimal = Decimal(1)


def test_what_a_dataclass_annotates_beside_its_fields_is_left_alone() -> None:
    """``ClassVar`` and ``KW_ONLY`` are no fields of the payload."""
    codec = Codec()
    codec.check(Annotating, (globals(), locals()), [])
    assert codec.structure({"amount": "3", "kind": "x"}, Annotating, "t") == Annotating(
        amount=Decimal(3)
    )


@attrs.define
class KeywordFirst:
    a: int = attrs.field(kw_only=True)
    b: Decimal


def test_a_keyword_only_field_may_stand_before_others() -> None:
    """cattrs' way that stops at the first error cannot, so the other one is taken."""
    assert read({"a": 1, "b": "2"}, KeywordFirst) == KeywordFirst(a=1, b=Decimal(2))
    assert errors({"a": "1"}, KeywordFirst) == [
        (".a", "expected int, got str"),
        (".b", "required, but missing"),
    ]


# A class that contains itself


@attrs.define
class Branch:
    name: str = ""
    children: "list[Branch]" = attrs.Factory(list)
    price: Decimal = Decimal(0)


@attrs.define
class ByName:
    children: "dict[str, ByName]" = attrs.Factory(dict)
    price: Decimal = Decimal(0)


@attrs.define
class Linked:
    children: "Linked | None" = None
    price: Decimal = Decimal(0)


@attrs.define
class Twins:
    children: "tuple[Twins, Twins] | None" = None
    more: "tuple[Twins, ...]" = ()
    name: str = attrs.field(default="", converter=str.strip)


@attrs.define
class Mutual:
    children: "list[Other]" = attrs.Factory(list)
    name: str = attrs.field(default="", alias="title")


@dataclasses.dataclass
class Other:
    children: "dict[str, list[Mutual]]" = dataclasses.field(default_factory=dict)
    price: Decimal = Decimal(0)


class Folder(TypedDict, total=False):
    children: "list[Folder]"
    price: Decimal


class Layer(NamedTuple):
    children: "list[Layer]"
    price: Decimal


@attrs.define
class Grid:
    children: "list[list[Grid]]" = attrs.Factory(list)
    queue: "collections.deque[Grid]" = attrs.Factory(collections.deque)
    either: "Sequence[Grid] | str" = ""
    price: Decimal = Decimal(0)


@attrs.define
class Cell(Generic[T]):
    children: "list[Cell[T]]" = attrs.Factory(list)
    item: T | None = None
    price: Decimal = Decimal(0)


NOT_ARRAYS = ["", "ab", 5, None, True, {}, {"a": 1}]
NOT_OBJECTS = ["", "ab", 5, None, True, [], [1]]


@pytest.mark.parametrize(
    ("annotation", "wrap", "kind"),
    [
        (Branch, lambda v: {"children": v}, "array"),
        (Branch, lambda v: {"children": [{"children": [{"children": v}]}]}, "array"),
        (list[Branch], lambda v: [{"children": v}], "array"),
        (dict[str, Branch] | None, lambda v: {"k": {"children": v}}, "array"),
        (ByName, lambda v: {"children": v}, "object"),
        (ByName, lambda v: {"children": {"k": v}}, "object"),
        (ByName, lambda v: {"children": {"k": {"children": v}}}, "object"),
        (Linked, lambda v: {"children": {"children": {"children": v}}}, "object"),
        (Twins, lambda v: {"children": [{}, v]}, "object"),
        (Twins, lambda v: {"children": [{}, {"children": v}]}, "array"),
        (Twins, lambda v: {"more": [{"more": v}]}, "array"),
        (Mutual, lambda v: {"children": v}, "array"),
        (Mutual, lambda v: {"children": [{"children": v}]}, "object"),
        (Mutual, lambda v: {"children": [{"children": {"k": v}}]}, "array"),
        (Other, lambda v: {"children": {"k": [{"children": v}]}}, "array"),
        (Folder, lambda v: {"children": v}, "array"),
        (Folder, lambda v: {"children": [{"children": v}]}, "array"),
        (Layer, lambda v: [v, "1"], "array"),
        (Layer, lambda v: [[[v, "1"]], "1"], "array"),
        (Grid, lambda v: {"children": v}, "array"),
        (Grid, lambda v: {"children": [v]}, "array"),
        (Grid, lambda v: {"children": [[{"queue": v}]]}, "array"),
        (Cell[int], lambda v: {"children": v}, "array"),
        (Cell[int], lambda v: {"children": [{"children": v}]}, "array"),
    ],
    ids=str,
)
def test_a_recursive_class_is_strict(annotation: Any, wrap: Any, kind: str) -> None:
    """What refers to itself, in whatever way, gets no value of another JSON kind."""
    for wrong in NOT_ARRAYS if kind == "array" else NOT_OBJECTS:
        if wrong is not None or annotation not in (Linked, Twins):  # null is right there
            found = [message for _, message in errors(wrap(wrong), annotation)]
            assert found == [f"expected {kind}, got {pachinko.json_name(wrong)}"]


def test_null_is_no_object_where_it_is_not_declared() -> None:
    """The optional member of a recursive class takes null, and nothing else does."""
    assert read({"children": {"children": None}}, Linked) == Linked(Linked())
    assert read({"children": None}, Twins) == Twins()
    assert errors({"children": None}, ByName) == [(".children", "expected object, got null")]


@attrs.define
class SecretBranch(Branch):
    secret: str = "s"


@attrs.define
class SecretCell(Cell[int]):
    secret: str = "s"


@pytest.mark.parametrize(
    ("value", "declared"),
    [
        (Branch("a", [SecretBranch("b", [SecretBranch("c")])]), None),
        (Branch("a", [SecretBranch("b")]), Branch),
        ([Branch("a", [SecretBranch("b")])], list[Branch]),
        (Cell([SecretCell([SecretCell()])]), Cell[int]),
        (Box(Box(SECRET)), Box[Box[Point]]),
        (Box([Box(Box(SECRET))]), Box[list[Box[Box[Point]]]]),
    ],
    ids=str,
)
def test_a_recursive_class_goes_out_as_declared(value: Any, declared: Any) -> None:
    """The fields of a subclass stay here at every depth."""
    assert "secret" not in json.dumps(written(value, check(declared) if declared else None))


def test_a_hook_that_could_not_be_made_is_made_later() -> None:
    """A recursive class that lacks a hook works once it has one."""

    @attrs.define
    class Basket:
        price: Money
        more: "list[Basket]" = attrs.Factory(list)

    codec, here = Codec(Hub().converter.copy()), ({**globals(), "Basket": Basket}, {})
    with pytest.raises(cattrs.StructureHandlerNotFoundError):
        codec.check(Basket, here, [])
    codec.converter.register_structure_hook(Money, lambda value, _: Money(value))
    codec.check(Basket, here, [])
    found = codec.structure({"price": 1, "more": [{"price": 2}]}, Basket, "t")
    assert found.more[0].price.cents == 2


def test_a_stand_in_makes_the_hook_itself_if_need_be() -> None:
    """Whoever was given one while another call was at work, and failed, can still use it."""
    stand_ins: list[Any] = []

    def make(t: Any, converter: Any) -> Any:
        if not stand_ins:
            stand_ins.append(factory(t, converter))
            raise ValueError("not now")
        return lambda value, _: (t, value)

    factory = pachinko._allow_recursion(make)
    with pytest.raises(ValueError, match="not now"):
        factory(int, STRICT.converter)
    assert stand_ins[0](5, None) == (int, 5)


# The kind of a container, wherever it stands


def kept(cls: Any) -> Any:
    """A class of each kind with a field of type *cls*, and the payload that has a value there."""
    made = attrs.make_class("Kept", {"a": attrs.field(type=cls)})
    data = dataclasses.make_dataclass("KeptData", [("a", cls)])
    typed: Any = TypedDict("KeptDict", {"a": cls})

    class Named(NamedTuple):
        a: cls

    return [
        (made, lambda v: {"a": v}, ".a"), (data, lambda v: {"a": v}, ".a"),
        (typed, lambda v: {"a": v}, ".a"), (Named, lambda v: [v], "[0]"),
        (cls, lambda v: v, ""), (list[cls], lambda v: [v], "[0]"),
        (dict[str, cls], lambda v: {"k": v}, '["k"]'), (tuple[cls, int], lambda v: [v, 1], "[0]"),
        (tuple[cls, ...], lambda v: [v], "[0]"), (Box[cls], lambda v: {"item": v}, ".item"),
        (Annotated[cls, "x"], lambda v: v, ""), (NewType("Named", cls), lambda v: v, ""),
        (Sequence[list[cls]], lambda v: [[v]], "[0][0]"), (typing.Final[cls], lambda v: v, ""),
    ]  # fmt: skip


ARRAYS = [
    list, tuple, set, frozenset, collections.deque, list[Any], list[int], set[str], tuple[Any, ...],
    tuple[int, ...], tuple[int, str], Sequence[int], MutableSequence[int], typing.AbstractSet[int],
    collections.deque[int], typing.List[int], Pair,  # noqa: UP006 - as it may be written
]  # fmt: skip
OBJECTS = [
    dict, Mapping, dict[str, Any], dict[Any, Any], dict[str, int], dict[int, int], typing.Dict,  # noqa: UP006 - as it may be written
    Mapping[str, int], typing.MutableMapping[str, int], collections.OrderedDict,
    collections.OrderedDict[str, int], collections.defaultdict, collections.defaultdict[str, int],
    collections.Counter, collections.Counter[str], collections.ChainMap, Point, Data, Options,
    Branch, Box[int], Point | Text,
]  # fmt: skip


@pytest.mark.parametrize("cls", [*ARRAYS, *OBJECTS], ids=str)
def test_a_container_of_another_kind_is_named(cls: Any) -> None:
    """In each place a wrong kind is told as ``expected object, got array``, and never iterated."""
    kind, values = ("array", NOT_ARRAYS) if cls in ARRAYS else ("object", NOT_OBJECTS)
    for annotation, wrap, path in kept(cls):
        for wrong in values:
            expected = f"expected {kind}, got {pachinko.json_name(wrong)}"
            assert errors(wrap(wrong), annotation) == [(path, expected)], annotation


@pytest.mark.parametrize("cls", [list, dict, list[int], dict[str, int], Point, Options], ids=str)
def test_an_optional_container_is_no_less_strict(cls: Any) -> None:
    """``dict | None`` takes an object or null."""
    kind = "object" if cls in (dict, dict[str, int], Point, Options) else "array"
    for annotation, wrap, path in kept(Optional[cls]):  # noqa: UP045 - also of a typed dict
        for wrong in ("", "ab", 5, True):
            expected = f"expected {kind}, got {pachinko.json_name(wrong)}"
            assert errors(wrap(wrong), annotation) == [(path, expected)], annotation
        read(wrap(None), annotation)


def test_the_values_of_a_counter_are_counts() -> None:
    """A counter is read like a dict of integers, whatever its keys are."""
    assert read({"a": 2}, collections.Counter) == collections.Counter(a=2)
    assert read({"1": 2}, collections.Counter[int]) == collections.Counter({1: 2})
    assert errors({"a": "2"}, collections.Counter[str]) == [('["a"]', "expected int, got str")]


def test_a_defaultdict_without_types_has_no_default() -> None:
    """There is nothing that it could make."""
    assert read({"a": [1]}, collections.defaultdict) == {"a": [1]}


class Tags(list[int]):
    pass


@pytest.mark.parametrize("annotation", [Tags, bytearray, range, Box[Tags], tuple[int, Tags]])
def test_a_container_without_a_hook_is_refused(annotation: Any) -> None:
    """How to make one of an array is not known."""
    with pytest.raises(cattrs.StructureHandlerNotFoundError, match="register a structure hook"):
        check(annotation)


# What cannot be told apart going out


@attrs.define
class Summary:
    x: int


@attrs.define
class Full:
    x: int
    y: int = 2


class ShortDict(TypedDict):
    x: int


class LongDict(TypedDict):
    x: int
    y: int


@attrs.define
class InField:
    a: list[Summary] | list[Full]


@dataclasses.dataclass
class InData:
    a: dict[str, Summary] | dict[str, Full] | None = None


class InDict(TypedDict):
    a: tuple[Summary, ...] | tuple[Full, ...]


@attrs.define
class InItself:
    more: "list[InItself]" = attrs.Factory(list)
    a: "set[Summary] | set[Full] | None" = None


Summaries = NewType("Summaries", list[Summary])
EITHER = list[Summary] | list[Full]


@pytest.mark.parametrize(
    ("declared", "write"),
    [
        (EITHER, "list[Summary | Full]"),
        (EITHER | None, "list[Summary | Full]"),
        (EITHER | str, "list[Summary | Full]"),
        (list[EITHER], "list[Summary | Full]"),
        (dict[str, EITHER], "list[Summary | Full]"),
        (tuple[int, EITHER], "list[Summary | Full]"),
        (Optional[list[list[EITHER]]], "list[Summary | Full]"),  # noqa: UP045 - as it may be written
        (Box[EITHER], "list[Summary | Full]"),
        (InField, "list[Summary | Full]"),
        (InField | None, "list[Summary | Full]"),
        (list[InField], "list[Summary | Full]"),
        (InData, "dict[str, Summary | Full]"),
        (InDict, "tuple[Summary | Full, ...]"),
        (InItself, "set[Summary | Full]"),
        (dict[str, Summary] | dict[str, Full], "dict[str, Summary | Full]"),
        (set[Summary] | set[Full], "set[Summary | Full]"),
        (tuple[Summary, int] | tuple[Full, int], "tuple[Summary | Full, int]"),
        (tuple[Summary, int] | tuple[Full, ...], "@attrs.frozen"),
        (collections.deque[Summary] | collections.deque[Full], "deque[Summary | Full]"),
        (list[Summary | None] | list[Full | None], "list[Summary | None | Full]"),
        (Box[Summary] | Box[Full], "Box[Summary | Full]"),
        (list[Box[Summary]] | list[Box[Full]], "@attrs.frozen"),
        (list[ShortDict] | list[LongDict], "@attrs.frozen"),
        (ShortDict | dict[str, int], "@attrs.frozen"),
        (ShortDict | Mapping[str, int], "@attrs.frozen"),
        (list[Summary] | Sequence[Full], "@attrs.frozen"),
        (list[Summary] | list, "@attrs.frozen"),
        (list[Summary] | list[Summary | Full], "list[Summary | Full]"),
        (list[Any] | list[Summary], "list["),
        (Summaries | list[Full], "@attrs.frozen"),
        (Annotated[list[Summary], "x"] | list[Full], "@attrs.frozen"),
    ],
    ids=str,
)
def test_what_cannot_be_told_apart_going_out_is_refused(declared: Any, write: str) -> None:
    """Where fields would be lost, the error shows what to write instead."""
    with pytest.raises(PachinkoError) as caught:
        STRICT.check_reply(declared, HERE)
    why, _, correct = str(caught.value).partition("; write ")
    assert "does not tell as which of the two it goes out" in why
    assert write in correct


@pytest.mark.parametrize(
    ("declared", "value", "payload"),
    [
        (Summary | Full, Full(1), {"x": 1, "y": 2}),
        (Full | Summary | None, Summary(1), {"x": 1}),
        (list[Summary | Full], [Summary(1), Full(1)], [{"x": 1}, {"x": 1, "y": 2}]),
        (list[Summary] | str, [Summary(1)], [{"x": 1}]),
        (Sequence[Summary] | str, "a", "a"),
        (list[Summary] | dict[str, Full], {"a": Full(1)}, {"a": {"x": 1, "y": 2}}),
        (list[Summary] | Full | None, Full(1), {"x": 1, "y": 2}),
        (list[Summary] | tuple[Full, ...], (Full(1),), [{"x": 1, "y": 2}]),
        (ShortDict | Full, {"x": 1, "z": 2}, {"x": 1}),
        (ShortDict | LongDict, {"x": 1, "z": 2}, {"x": 1}),
        (ShortDict | LongDict, {"x": 1, "y": 2, "z": 3}, {"x": 1, "y": 2}),
        (list[ShortDict | LongDict | None], [{"x": 1, "y": 2}, None], [{"x": 1, "y": 2}, None]),
        (ShortDict | LongDict | Full, {"x": 1, "z": 2}, {"x": 1}),
        (ShortDict | LongDict | Full, Full(1), {"x": 1, "y": 2}),
        (Pair | Sequence[Summary], Pair(Point(1), "a"), [{"x": 1, "y": 0}, "a"]),
        (list[int] | list[str], ["a"], ["a"]),
        (list[int | None] | list[str | None], ["a", None], ["a", None]),
        (dict[str, int] | dict[str, bool], {"a": True}, {"a": True}),
        (dict[str, int] | dict[str, str | None], {"a": None}, {"a": None}),
        (list[int] | list[int | str], ["a"], ["a"]),
        (list[list[int] | None] | list[list[str] | None], [["a"], None], [["a"], None]),
        (Sequence[int] | list[int], [1], [1]),
        (Box[int] | Box[str], Box("a"), {"item": "a", "more": []}),
        (Summaries | str, [Full(1)], [{"x": 1}]),
        (Color | str, "a", "a"),
        (collections.OrderedDict[str, Summary] | dict[str, Full], {"a": Full(1)},
         {"a": {"x": 1, "y": 2}}),
    ],
    ids=str,
)  # fmt: skip
def test_what_can_be_told_apart_stays_allowed(declared: Any, value: Any, payload: Any) -> None:
    """The class of a value tells what was meant, or nothing depends on it."""
    STRICT.check_reply(declared, HERE)
    assert written(value, declared) == payload


def test_nothing_is_cut_off_what_is_sent() -> None:
    """Also outside of replies, such a field is refused instead of guessed at."""
    with pytest.raises(PachinkoError, match=r"write list\[Summary \| Full\]"):
        STRICT.encode("t", InField([Full(1)]))


def test_a_name_of_a_later_class_does_not_keep_a_reply_from_being_declared() -> None:
    """It is looked up again with the first reply."""

    @attrs.define
    class Early:
        later: "list[Later]"  # type: ignore[name-defined] # noqa: F821 - it is defined later on

    STRICT.check_reply(Early, HERE)
    STRICT.check_reply(list[Early] | None, HERE)


# Metadata that has no hash


Bare = Annotated[int, {"a": 1}]
BareName = NewType("BareName", Annotated[int, []])  # type: ignore[valid-newtype]  # it works at run time


@attrs.define
class BareField:
    x: Bare
    more: "list[Annotated[str, []]]" = attrs.Factory(list)


@attrs.define
class BareChild(BareField):
    y: Bare = 1


@dataclasses.dataclass
class BareData:
    x: Bare
    named: "dict[str, Bare]" = dataclasses.field(default_factory=dict)


class BareDict(TypedDict):
    x: Bare
    y: NotRequired[Annotated[int, {1}]]


class BareTuple(NamedTuple):
    x: Bare


BARE: list[tuple[Any, Any, Any]] = [
    (Bare, 5, 5),
    (Annotated[int, "x", {1}, bytearray()], 5, 5),
    (Annotated[Point, {}], {"x": 1, "y": 2}, Point(1, 2)),
    (list[Bare], [1], [1]),
    (list[Bare] | None, [1], [1]),
    (Annotated[list[Bare], []], [1], [1]),
    (dict[str, Bare], {"a": 1}, {"a": 1}),
    (dict[Bare, str], {"1": "a"}, {1: "a"}),
    (tuple[Bare, str], [1, "a"], (1, "a")),
    (tuple[Bare, ...], [1], (1,)),
    (set[Bare], [1], {1}),
    (list[list[Bare]], [[1]], [[1]]),
    (Sequence[Bare], [1], (1,)),
    (BareName, 5, 5),
    (list[BareName], [5], [5]),
    (BareField, {"x": 1, "more": ["a"]}, BareField(1, ["a"])),
    (BareChild, {"x": 1, "more": [], "y": 2}, BareChild(1, [], 2)),
    (BareData, {"x": 1, "named": {"a": 2}}, BareData(1, {"a": 2})),
    (BareDict, {"x": 1, "y": 2}, {"x": 1, "y": 2}),
    (BareTuple, [1], BareTuple(1)),
    (Box[Bare], {"item": 1, "more": [2]}, Box(1, [2])),
    (list[BareField] | None, [{"x": 1, "more": []}], [BareField(1)]),
]
if sys.version_info >= (3, 13):  # before, such a union is a TypeError
    BARE += [(Bare | None, 5, 5), (Bare | str, "a", "a"), (Optional[list[Bare]], [1], [1])]  # noqa: UP045 - as it may be written


@pytest.mark.parametrize(("annotation", "payload", "value"), BARE, ids=str)
def test_metadata_without_a_hash_makes_no_difference(
    annotation: Any, payload: Any, value: Any
) -> None:
    """`Annotated` is for other libraries, and what they put there need not be hashable."""
    found = read(payload, annotation)
    assert found == value
    assert type(found) is type(value)
    assert written(value, annotation) == payload


def test_metadata_without_a_hash_hides_nothing_wrong() -> None:
    """The annotation counts as ever."""
    assert errors("5", Bare) == [("", "expected int, got str")]
    assert errors({"x": "5", "more": [1]}, BareField) == [
        (".x", "expected int, got str"), (".more[0]", "expected str, got int")
    ]  # fmt: skip
    assert errors(["5"], list[BareName]) == [("[0]", "expected int, got str")]


def test_metadata_without_a_hash_in_a_class_that_only_goes_out() -> None:
    """Such a class was never registered."""

    @dataclasses.dataclass
    class Inner:
        x: Annotated[int, {}]

    @attrs.define
    class Outer:
        inner: Inner
        y: Annotated[int, {}] = 2

    assert written([Outer(Inner(1))]) == [{"inner": {"x": 1}, "y": 2}]


class Nicknamed(enum.Enum):
    """Its members have other values than their own, as Python code often has it."""

    RED = ("red", "rouge")
    BLUE = ("blue", "bleu")

    def __new__(cls, value: str, other: str) -> "Nicknamed":
        self = object.__new__(cls)
        self._value_ = value
        cls._value2member_map_[other] = self
        return self


def test_another_value_of_a_member_is_its_value_too() -> None:
    """Whether msgspec reads an enum or cattrs does, Python says which values it has."""
    assert read("rouge", Nicknamed) is Nicknamed.RED
    assert read(["bleu"], list[Nicknamed | int]) == [Nicknamed.BLUE]
    assert errors("vert", Nicknamed) == [("", 'expected one of "red", "blue"')]
    decode = pachinko.decoder_of([STRICT.frame_class("t", Nicknamed)])
    assert decode('{"type":"t","payload":"rouge"}').payload is Nicknamed.RED


# What is read and written as before


@attrs.define(init=False)
class OwnInit:
    amount: int

    def __init__(self, amount: int) -> None:
        if amount <= 0:
            raise ValueError("amount is positive")
        self.amount = amount


def test_a_constructor_from_a_console_runs() -> None:
    """Code without a file is not taken for what dataclasses have generated."""
    source = """
import attrs, dataclasses
@dataclasses.dataclass(init=False)
class Data:
    amount: int
    def __init__(self, amount: int) -> None:
        if amount <= 0:
            raise ValueError("amount is positive")
        self.amount = amount
@attrs.define(init=False)
class Attrs:
    amount: int
    def __init__(self, amount: int) -> None:
        if amount <= 0:
            raise ValueError("amount is positive")
        self.amount = amount
"""
    for name in ("<string>", "<stdin>", "<ipython-input-1-0123456789ab>"):
        names: dict[str, Any] = {"__name__": "__console__"}
        exec(compile(source, name, "exec"), names)
        for cls in (names["Data"], names["Attrs"], OwnInit):
            assert not pachinko.is_read_in_one_pass(cls)
            assert errors({"amount": -5}, cls) == [("", "amount is positive")]


@attrs.define
class Bounded:
    high: int = attrs.field(kw_only=True)
    low: Decimal

    @high.validator
    def check(self, field: Any, value: int) -> None:
        if value > {Bounded: 10}[type(self)]:
            raise ValueError("too high")


def test_a_validator_may_need_the_instance_whatever_the_order_of_the_fields() -> None:
    """It decides about the whole object, and is asked without one only to explain."""
    assert read({"high": 5, "low": 1}, Bounded) == Bounded(Decimal(1), high=5)
    assert errors({"high": 11, "low": 1}, Bounded)


@pytest.mark.parametrize(
    "annotation",
    [
        Sequence[Summary] | list[Summary],
        list[float] | list[int | None],
        list[int] | list[Any],
        list | list[int],
        tuple[int, str] | tuple[int, str, int],
        list[Color] | list[str],
    ],
    ids=str,
)
def test_unions_that_lose_nothing_going_out_are_not_refused(annotation: Any) -> None:
    """Only fields can be cut off, and only by a type that has others."""
    STRICT.check_reply(annotation, HERE)


def test_a_member_of_a_union_may_have_metadata() -> None:
    """It is a class like the others."""
    annotation = Text | Annotated[Point, "metadata"]
    assert read({"x": 1}, annotation) == Point(1)
    assert read({"text": "a"}, annotation) == Text("a")


def test_a_generic_alias_stands_for_its_type() -> None:
    """Its arguments go where its parameters stand, in whatever order."""
    one, other = TypeVar("one"), TypeVar("other")
    alias: Any = typing_extensions.TypeAliasType  # a ``type`` statement before Python 3.12
    many = alias("many", list[one], type_params=(one,))
    pairs = alias("pairs", dict[other, list[one]], type_params=(one, other))
    assert read([1], many[int]) == [1] and errors(["1"], many[int])
    assert read({"a": [1]}, pairs[int, str]) == {"a": [1]}
    assert errors({"a": ["1"]}, pairs[int, str])
