"""How a payload is read: in one pass by msgspec, or by cattrs, with the same result."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import enum
import functools
import inspect
import json
import sys
import typing
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from types import NoneType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    NotRequired,
    Protocol,
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
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import UNSET, UnsetType
from support import Client, connect, new_app, simulated

import pachinko
from pachinko import Close, Codec, Connection, Hub, MessageError, Pachinko, PachinkoError, message

T = TypeVar("T")
STRICT = Codec()
REFUSED: Any = enum.Enum("Outcome", "REFUSED").REFUSED


# What is read


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"
    ROUGE = "red"  # noqa: PIE796 - it is meant to be an alias


class Word(enum.StrEnum):
    A = "a"
    ESCAPED = 'é"\n'


class Code(enum.Enum):
    """Its values are not what it was written with."""

    ONE = ("1", 1)

    def __new__(cls, text: str, number: int) -> Code:
        self = object.__new__(cls)
        self._value_ = text
        return self


class Level(enum.IntEnum):
    LOW = 1


class Lenient(enum.Enum):
    OTHER = "other"

    @classmethod
    def _missing_(cls, value: object) -> Lenient:
        return cls.OTHER


class Static(enum.Enum):
    OTHER = "other"

    @staticmethod
    def _missing_(value: object) -> Static:
        return Static.OTHER


class Text(str):
    pass


UserId = NewType("UserId", int)


def picky(_: Any, __: Any, value: Any) -> None:
    if len(repr(value)) % 4 == 0:
        raise ValueError("not this one")


def clumsy(_: Any, __: Any, value: Any) -> None:
    if len(repr(value)) % 5 == 0:
        raise ZeroDivisionError


@attrs.frozen
class Point:
    x: int
    y: int = 0


@attrs.frozen
class Frozen:
    at: date | None = None
    points: list[Point] = attrs.Factory(list)


@attrs.define(slots=False, kw_only=True)
class Loose:
    optional: str = ""
    needed: float


@attrs.define
class Checked:
    x: int = attrs.field(validator=[picky, clumsy])
    color: Color = attrs.field(default=Color.RED, validator=attrs.validators.in_([Color.RED]))
    seen: list[str] = attrs.Factory(list)

    def __attrs_post_init__(self) -> None:
        if self.x < 0:
            raise LookupError
        self.seen = [*self.seen, "after"]


@attrs.define
class Child(Point):
    z: int = 0


@attrs.define
class Narrowed(Frozen):
    at: date = date(2026, 1, 2)


@attrs.define
class Tree:
    value: int = 0
    children: list[Tree] = attrs.Factory(list)
    next: Tree | None = None
    named: dict[str, Tree] = attrs.Factory(dict)


@attrs.define
class Abstract(abc.ABC):
    x: int

    @abc.abstractmethod
    def method(self) -> None: ...


@attrs.define
class Concrete(Abstract):
    y: int = 0

    def method(self) -> None: ...


@attrs.define
class Counted:
    x: int
    made: ClassVar[int] = 0


@attrs.define
class SharedDefault:
    x: int = 0
    items: list[int] = attrs.field(default=[])


@attrs.define
class FailingDefault:
    x: int = attrs.field(factory=lambda: 1 // 0)


@message("said")
class Said:
    text: str
    to: str | None = None


@dataclasses.dataclass
class Data:
    a: int
    b: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Strict:
    point: Point | None = None
    note: Literal["a", "b"]


@dataclasses.dataclass(slots=True)
class DataChild(Data):
    c: Word = Word.A

    def __post_init__(self) -> None:
        if self.a == 1:
            raise TypeError("not 1")
        self.b.append(0.5)


@dataclasses.dataclass
class Underscored:
    _x: int


class Movie(TypedDict):
    name: str
    year: int


class Sparse(TypedDict, total=False):
    name: str
    point: Point


Optioned = TypedDict("Optioned", {"a b": int, "class": NotRequired[str]})
Needy = TypedDict("Needy", {"a b": Required[int], "b": list[str]}, total=False)


async def fields(conn: Connection, *, a: int, b: list[Point] | None = None, type: str = "") -> None:
    """A handler whose fields are what is read."""


FIELDS = pachinko.read_handler("t", fields, STRICT, (globals(), {}), None, (), False).annotation


# What cattrs alone reads


class Base:
    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value * 2)


class Meta(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


@attrs.define
class PlainBase(Base):
    x: int


@dataclasses.dataclass
class DataBase(Base):
    x: int


@attrs.define
class OwnSetattr:
    x: int

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value * 2)


@dataclasses.dataclass
class DataSetattr:
    x: int

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value * 2)


@attrs.define
class Counting(metaclass=Meta):
    x: int


@attrs.define
class OwnInit:
    x: int

    def __init__(self, x: int) -> None:
        self.x = x * 2


@dataclasses.dataclass
class DataInit:
    x: int

    def __init__(self, x: int) -> None:
        self.x = x * 2


@dataclasses.dataclass
class DataNew:
    x: int

    def __new__(cls, x: int) -> DataNew:
        return super().__new__(cls)


@dataclasses.dataclass(init=False)
class DataNoInit:
    x: int = 1


@dataclasses.dataclass(init=False)
class InheritedInit(Data):
    c: int = 1


class UndecoratedInit(Point):
    def __init__(self, x: int) -> None:
        super().__init__(x * 2)


class Undecorated(Point):
    pass


class UndecoratedData(Data):
    pass


def wrapped(cls: Any) -> Any:
    """Put a function of one's own around the constructor."""
    init = cls.__init__

    @functools.wraps(init)
    def around(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)

    cls.__init__ = around
    return cls


@wrapped
@attrs.define
class Wrapped:
    x: int


@wrapped
@dataclasses.dataclass
class WrappedData:
    x: int


@attrs.define
class PreInit:
    x: int

    def __attrs_pre_init__(self) -> None: ...


@attrs.define(unsafe_hash=True, cache_hash=True)
class HashCached:
    x: int = 1


@attrs.frozen(cache_hash=True, slots=False)
class FrozenHashCached:
    x: int = 1


@attrs.define
class Private:
    _x: int


@attrs.define
class Aliased:
    x: int = attrs.field(alias="y")


@attrs.define
class Converted:
    x: str = attrs.field(converter=str.strip)


@attrs.define
class Computed:
    x: int
    y: int = attrs.field(init=False, default=0)


@dataclasses.dataclass
class DataComputed:
    x: int
    y: int = dataclasses.field(init=False, default=0)


@attrs.define
class Following:
    x: int
    y: int = attrs.Factory(lambda self: self.x, takes_self=True)


@attrs.define(these={"x": attrs.field(type=int)})
class These:
    """A class whose annotations do not have its fields."""


@attrs.define
class Failure(Exception):
    x: int


@attrs.define
class Both(Data):
    """A dataclass to msgspec, an attrs class to cattrs."""

    x: int = 0


@attrs.define
class Box(Generic[T]):
    item: T


@attrs.define
class IntBox(Box[int]):
    more: int = 0


@attrs.define
class Limited:
    x: Annotated[int, msgspec.Meta(gt=3)]


@attrs.define
class Either:
    one: Frozen | Data | None = None


@attrs.define
class Absent:
    x: int | UnsetType = UNSET
    y: int | UnsetType | None = UNSET


class Plot(msgspec.Struct, tag="plot", rename={"y": "x"}, omit_defaults=True):
    y: Annotated[int, msgspec.Meta(lt=5)]
    items: list[int] = []

    def __post_init__(self) -> None:
        if self.y == -1:
            raise ValueError("not -1")


class Closed(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    x: int | UnsetType = UNSET
    at: date | None = None
    point: Point | None = None


class Row(msgspec.Struct, array_like=True):
    a: int
    b: str | int = ""
    c: Plot | None = None


class Tagged(msgspec.Struct, array_like=True, tag="a", forbid_unknown_fields=True):
    a: int


class Record(msgspec.Struct, Generic[T]):
    x: T


class Rounded(msgspec.Struct):
    x: Decimal


class Pair(NamedTuple):
    first: int
    second: int = 0


class Timeouts:
    connect = 10


@attrs.define(slots=False)
class HiddenDefault(Timeouts):
    connect: int = 5


@attrs.define(slots=False)
class HiddenField(Timeouts):
    connect: int


@dataclasses.dataclass
class DataDefault:
    """Its default is an attribute of the class, and msgspec leaves it there."""

    x: int = 0


@dataclasses.dataclass
class DataFactory(DataDefault):
    x: list[int] = dataclasses.field(default_factory=list)


@attrs.define
class Lazy:
    x: int

    @functools.cached_property
    def double(self) -> int:
        return 2 * self.x


@attrs.define
class Generous:
    x: int

    def __getattr__(self, name: str) -> int:
        return 7


@attrs.define
class Observant:
    x: int

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, name)


@attrs.define
class Interface(Protocol):
    x: int


# Reading it in both ways


class Reader:
    """What an endpoint makes of a payload with *annotation*, and what cattrs makes of it."""

    def __init__(self, annotation: Any) -> None:
        STRICT.check(annotation, (globals(), {}), [])
        self.annotation = annotation
        frame = STRICT.frame_class("t", annotation)
        self.is_fast: bool = frame.is_built
        self.decode = pachinko.decoder_of([frame])

    def in_one_pass(self, frame: str) -> Any:
        """What the decoder of the endpoint builds, or `REFUSED`."""
        try:
            return self.decode(frame).payload
        except Exception:  # a validator may raise anything
            return REFUSED

    def by_cattrs(self, frame: str) -> Any:
        """What the strict converter makes of the plain JSON value, or `REFUSED`."""
        found = pachinko.decode_or_error(frame)
        if isinstance(found, MessageError):
            return REFUSED
        try:
            return STRICT.structure(found.payload, self.annotation, "t")
        except MessageError:
            return REFUSED


def frame_of(payload: str) -> str:
    return f'{{"type":"t","payload":{payload}}}'


def parts(value: object) -> dict[str, Any]:
    """The attributes of an object, whether in slots or not."""
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    names = {*slots, *getattr(value, "__dict__", ())} - {"__weakref__", "__dict__"}
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def hash_of(value: object) -> int | None:
    try:
        return hash(value)
    except TypeError:
        return None


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are equal and of the same types, down to each part of them."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(is_same, one.values(), other.values()))
    if isinstance(one, (set, frozenset)):
        return sorted(map(repr, one)) == sorted(map(repr, other))
    if attrs.has(type(one)) or dataclasses.is_dataclass(one):
        mine, its = parts(one), parts(other)
        if type(one).__eq__ is not object.__eq__ and hash_of(one) != hash_of(other):
            return False
        return mine.keys() == its.keys() and all(is_same(mine[name], its[name]) for name in mine)
    return bool(one == other) and repr(one) == repr(other)  # 0.0 == -0.0


# JSON texts

HUGE = ["1e400", "-2e999", "9" * 400 + ".5", "1" * 5000]  # beyond what Python or a float takes
NUMBERS = [
    "0", "-0", "1", "-1", "5", "13", "1.0", "-0.0", "0.0", "1.5", "5e-1", "10e-1", "1e3", "1E2",
    "1e-400", "1e18", "1e19", "1e22", "9007199254740993", "9007199254740993.0",
    "9223372036854775807", "9223372036854775808", "-9223372036854775809", "18446744073709551615",
    "18446744073709551616", "9223372036854775808.0", "18446744073709551616.0", "1" * 40, "1" * 308,
    "1" * 310, "1" * 4300, "1e308", *HUGE,
]  # fmt: skip
TIMES = [
    "2026-01-02", "20260102", "2026-02-30", "0000-01-01", "9999-12-31", "2026-01-02T03:04:05Z",
    "2026-01-02t03:04:05z", "2026-01-02 03:04:05", "2026-01-02T03:04:05", "20260102T030405",
    "2026-01-02T24:00:00", "2026-01-02T23:59:60Z", "2026-01-02T03:04:05+02:00",
    "2026-01-02T03:04:05-00:00", "2026-01-02T03:04:05+24:00", "2026-01-02T03:04:05+0200",
    "2026-01-02T03:04:05.1Z", "2026-01-02T03:04:05.123456789Z", "2026-01-02T23:59:59.9999999Z",
    "9999-12-31T23:59:59.9999999Z", "0001-01-01T00:00:00+01:00", "2026-01-02T03:04Z",
    "03:04:05", "03:04", "24:00:00", "23:59:60", "03:04:05Z", "03:04:05z", "03:04:05.5",
    "03:04:05+01:00", "23:59:59.9999999", "PT1S", "P1D", "pt1s", "P1W", "-PT1S", "+PT1S",
    "PT1.5S", "P1Y", "P1M", "PT", "P", "PT1.0000001S", "P99999999999D", "PT1H1H", "1",
]  # fmt: skip
CODED = [
    "12345678-1234-5678-1234-567812345678", "12345678123456781234567812345678",
    "12345678-1234-5678-1234-56781234567", "{12345678-1234-5678-1234-567812345678}",
    "urn:uuid:12345678-1234-5678-1234-567812345678", "ABCDEFab-1234-5678-1234-567812345678",
    "1234567812345678-1234-567812345678", "aGk=", "aGk", "aG k=", "aGk=\n", "a-_=", "+/+/", "====",
    "aGk==", "aG==", "YQ==", "YR==", "A===",
]  # fmt: skip
WORDS = [
    "", "a", "b", "red", "blue", "RED", "rouge", 'é"\n', "1", "1.0", "1e3", "true", "null", "NaN",
    "Infinity", "\x7f", "\0", "🂡", "x" * 64, "other",
]  # fmt: skip
ESCAPED = [
    '"é"', r'"r\u0065d"', r'"2026\u002d01\u002d02"', r'"\ud800"', r'"\udc00\ud800"',
    r'"\ud83c\udca1"', r'"a\/b"', r'"aGk\u003d"',
]  # fmt: skip
STRINGS = [*map(json.dumps, [*WORDS, *TIMES, *CODED]), *ESCAPED]
MALFORMED = [
    "NaN", "Infinity", "-Infinity", "01", "1.", ".5", "+1", "--1", "-", "1e", "nul", "True", "'a'",
    '"a', '"\t"', r'"\x"', r'"\u00"', "[1,", "[1,]", '{"a"', '{"a":1,}', "{a:1}", "[1]x", "1 2", "",
]  # fmt: skip
SCALARS = [*NUMBERS, *STRINGS, "true", "false", "null"]
ARRAYS = [
    "[]", "[1]", "[1,2]", "[1,1]", "[1,1.0]", "[1.0]", "[1e2,2.0]", '["a"]', '[1,"a"]', '["1"]',
    "[null]", "[true]", "[true,1]", "[[1]]", "[[]]", "[{}]", "[1,2,3]", "[0,-0.0,0.0]", "[-0.0,0]",
    '["2026-01-02"]', "[[1,2],[1,2]]", '[["a",1],["a",1.0]]', '[{"x":1},{"x":1}]', '[{"x":1},5]',
    '[{"a":2},{"a":"2"}]', '[{"name":"M","year":1}]', '[{"at":null},{}]', "[{},1]", "[1,null]",
]  # fmt: skip
OBJECTS = [
    "{}", '{"x":1}', '{"x":5}', '{"x":-1}', '{"x":13}', '{"x":1.0}', '{"x":null}', '{"x":"a"}',
    '{"x":true}', '{"y":1}', '{"x":1,"y":2}', '{"y":2,"x":1}', '{"x":1,"y":null}', '{"x":1,"z":2}',
    '{"x":9223372036854775808}', '{"x":1,"new":1}', *(f'{{"x":1,"new":{n}}}' for n in HUGE),
    *(f'{{"x":1,"new":{text}}}' for text in MALFORMED), r'{"x":1,"new":"\ud800"}',
    r'{"x":1,"\ud800":1}', '{"x":"a","x":1}', '{"x":1,"x":"a"}', '{"x":1,"x":2}',
    r'{"x":"a","\u0078":1}', r'{"\u0078":1}', '{"__class__":1,"x":1}', '{"__dict__":{},"x":1}',
    '{"x":1,"made":5}', '{"x":1,"double":5}', '{"x":1,"items":[1]}', '{"_x":1}', '{"x":1,"_x":1}',
    '{"at":"2026-01-02"}', '{"at":null}', '{"at":"x"}', '{"at":"x","at":null}',
    '{"points":[{"x":1},{"x":1,"y":1}]}', '{"points":[{"x":1},{"x":"1"}]}', '{"points":null}',
    '{"needed":1}', '{"needed":1.5,"optional":"a"}', '{"needed":1,"optional":null}',
    '{"x":13,"color":"blue"}', '{"x":13,"color":"red","seen":["a"]}', '{"x":13,"seen":[1]}',
    '{"text":"a"}', '{"text":"a","to":null}', '{"text":null}', '{"text":"a","to":1}',
    '{"a":1}', '{"a":2,"b":[1,1.5]}', '{"a":2,"b":[],"c":"a"}', '{"a":2,"c":"b"}', '{"a":null}',
    '{"note":"a","point":{"x":1}}', '{"note":"c"}', '{"note":"b"}', '{"note":"a","point":{}}',
    '{"name":"M","year":1,"new":1}', '{"name":"M"}', '{"name":1,"year":1}', '{"year":1,"name":""}',
    '{"name":"M","year":1,"new":1e400}', '{"point":{"x":1,"z":1}}', '{"point":{"x":null}}',
    '{"a b":1}', '{"a b":1,"class":"x"}', '{"a b":1,"class":1}', '{"a":1,"b":["x"]}', '{"b":["x"]}',
    '{"a":1,"b":[{"x":1}],"type":"t"}', '{"a":1,"b":null}', '{"a":1,"type":1}',
    '{"value":1,"children":[{"value":2},{}],"named":{"a":{}},"next":{"next":{}}}',
    '{"next":{"next":{"next":{"value":"a"}}}}', '{"children":[{"children":[{"value":null}]}]}',
    '{"red":1}', '{"":1}', '{"1":1}', '{"a":"x","a":2}', '{"a":2,"a":"x"}', '{"a":[1]}', '{"a":{}}',
    '{"a":{"x":1}}', '{"a":[{"value":1}]}', '{"a":{"at":null},"b":null}', '{"one":{"a":1}}',
]  # fmt: skip
TEXTS = [*SCALARS, *MALFORMED, *ARRAYS, *OBJECTS]


class Number(str):
    """A number as it is written."""


def in_range(text: str) -> str:
    """*text* with a 0 for each number that is out of range."""
    return functools.reduce(lambda text, number: text.replace(number, "0"), HUGE, text)


def last_ones(text: str) -> str:
    """*text* with the last of equal keys alone."""
    try:
        return written(json.loads(text, parse_int=Number, parse_float=Number))
    except ValueError:
        return text  # it is not JSON


def written(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}:{written(item)}" for key, item in value.items()]
        return f"{{{','.join(items)}}}"
    return value if isinstance(value, Number) else json.dumps(value)


def check_alike(reader: Reader, text: str) -> None:
    """Both ways accept *text* or refuse it, and build the same, but for two exceptions.

    They are the rows of the table in docs/payloads.md.
    """
    fast, slow = reader.in_one_pass(frame_of(text)), reader.by_cattrs(frame_of(text))
    if fast is REFUSED and slow is not REFUSED:  # of two equal keys, the first does not fit
        fast = reader.in_one_pass(frame_of(last_ones(text)))
    elif slow is REFUSED and fast is not REFUSED:  # what is ignored may be out of range
        slow = reader.by_cattrs(frame_of(in_range(text)))
    assert fast is slow or is_same(fast, slow), (text, fast, slow)


# Fixed types, each with every text

LEAVES: list[Any] = [
    str, int, float, bool, NoneType, bytes, UUID, datetime, date, time, timedelta, Any,
]  # fmt: skip
FAST: list[Any] = [
    *LEAVES, Color, Word, Code, Literal["a"], Literal["a", "b"],
    int | None, str | None, int | str, int | float, float | str | None, bool | int, date | float,
    Literal["a"] | None, Color | int, Color | None, Any | None, UUID | None, Literal["a"] | int,
    list, dict, set, frozenset, tuple, typing.List, typing.Dict, typing.Tuple[int, ...],  # noqa: UP006
    list[int], list[float], list[Any], list[int | None], set[int], set[float | int], set[Any],
    set[Frozen], set[date], frozenset[str], frozenset[tuple[str, float]], tuple[int, str],
    tuple[int, ...], tuple[()], tuple[Any, ...], dict[str, int], dict[str, Any],
    dict[str, list[float]], list[list[int]],
    list[int] | None, list[int] | str, dict[str, int] | list[int], tuple[int, ...] | int,
    set[int] | dict[str, int] | None, bool | int | float | str | None | list | dict,
    Point, Frozen, Loose, Checked, Child, Narrowed, Tree, Counted,
    SharedDefault, FailingDefault, Said, Data, Strict, DataChild, Underscored,
    Movie, Sparse, Optioned, Needy, FIELDS,
    Point | None, Data | None, Movie | None, Frozen | str, list[Frozen] | Frozen | None,
    list[Point], dict[str, Point], dict[str, Frozen | None], tuple[Frozen, int],
    list[Data], list[Movie], dict[str, list[Tree]],
    Annotated[int, "x"], Limited, list[Limited], Absent, list[Absent], Plot, Closed, Row, Tagged,
    list[Plot], dict[str, Row], Plot | None,
    Annotated[int, msgspec.Meta(gt=3)], Annotated[int, msgspec.Meta(ge=0, lt=5)] | None,
    Annotated[int, msgspec.Meta(multiple_of=5)], Annotated[float, msgspec.Meta(ge=-1, le=2**60)],
    Annotated[float, msgspec.Meta(multiple_of=0.5)], Annotated[str, msgspec.Meta(max_length=1)],
    Annotated[str, msgspec.Meta(min_length=2, pattern="[a-z]")] | int,
    Annotated[bytes, msgspec.Meta(min_length=2)], Annotated[set[int], msgspec.Meta(max_length=1)],
    Annotated[list[Any], msgspec.Meta(min_length=1)], Annotated[dict, msgspec.Meta(max_length=1)],
    Annotated[tuple[int, ...], msgspec.Meta(max_length=2)],
    Annotated[datetime, msgspec.Meta(tz=True)], Annotated[time, msgspec.Meta(tz=False)],
    dict[str, Annotated[int, msgspec.Meta(title="a number", examples=[1], le=1)]],
]  # fmt: skip


@pytest.mark.parametrize("annotation", FAST, ids=str)
def test_the_quick_way_builds_what_cattrs_does(annotation: Any) -> None:
    """A type that is read in one pass takes the same JSON as cattrs, and becomes the same."""
    annotation = pachinko.hashable(annotation)
    reader = Reader(annotation)
    assert reader.is_fast and pachinko.is_read_in_one_pass(annotation)
    for text in TEXTS:
        check_alike(reader, text)


def local_classes() -> list[Any]:
    """Classes whose annotations name others that only this function knows."""

    @attrs.define
    class Item:
        tags: list[str]

    @message("bought")
    class Bought:
        items: list[Item]
        after: After | None = None

    @dataclasses.dataclass
    class Shelf:
        items: dict[str, Item]
        above: Shelf | None

    @attrs.define
    class After:
        bought: Bought

    class Box(TypedDict):
        item: Item

    async def handler(conn: Connection, *, item: Item, shelf: Shelf | None = None) -> None: ...

    namespaces = globals(), dict(locals())
    read = pachinko.read_handler("t", handler, STRICT, namespaces, None, (), False)
    classes: list[Any] = [Item, Bought, Shelf, After, Box, read.annotation]
    for cls in classes:
        STRICT.check(cls, namespaces, [])
    return classes


@pytest.mark.parametrize("cls", local_classes(), ids=str)
def test_local_classes_are_read_in_one_pass(cls: Any) -> None:
    """Text annotations with names of a function do not make a payload slow."""
    assert Reader(cls).is_fast
    texts = [
        '{"tags":["a"]}', '{"tags":[1]}', '{"item":{"tags":[]}}', '{"item":{"tags":0}}',
        '{"item":{"tags":[]},"shelf":{"items":{},"above":null}}', '{"items":{"a":{"tags":["b"]}}}',
        '{"items":[{"tags":[]}]}', '{"items":[{}]}', '{"items":{"a":{"tags":[]}},"above":null}',
        '{"items":[],"after":{"bought":{"items":[{"tags":["a"]}],"new":1}}}', '{"bought":{}}',
        '{"bought":{"items":[]}}', '{"items":{},"above":{"items":{},"above":{"items":{}}}}',
    ]  # fmt: skip
    for text in texts:
        check_alike(Reader(cls), text)


class TextOptions(TypedDict):
    """To Python, which has not read the annotations, both keys are required."""

    a: int
    b: NotRequired[int]


def test_a_qualifier_in_a_text_annotation_means_the_same_in_both_ways() -> None:
    """Either such a typed dict is not read in one pass, or it makes no difference."""
    reader = Reader(TextOptions)
    for text in ('{"a":1}', '{"a":1,"b":2}', '{"a":1,"b":"2"}') if reader.is_fast else ():
        check_alike(reader, text)


def test_a_name_in_a_base_class_means_the_same_in_both_ways() -> None:
    """Also one that msgspec finds in the module, and Pachinko in the function."""

    @attrs.define
    class Point:
        x: str

    @attrs.define
    class Unheard:
        x: int

    @attrs.define
    class One:
        item: Point

    @attrs.define
    class Other:
        item: Unheard

    for base in (One, Other):
        cls = attrs.define(type("Sub", (base,), {"__annotations__": {"more": "int"}, "more": 0}))
        STRICT.check(cls, (globals(), locals()), [])
        reader = Reader(cls)
        for text in ('{"item":{"x":1}}', '{"item":{"x":"a"}}') if reader.is_fast else ():
            check_alike(reader, text)


def test_defaults_are_as_attrs_makes_them() -> None:
    """A factory is asked anew for each object; a mutable default is shared, as attrs shares it."""
    made = [Reader(Frozen).in_one_pass(frame_of("{}")) for _ in range(2)]
    assert made[0].points == [] and made[0].points is not made[1].points
    shared = Reader(SharedDefault).in_one_pass(frame_of("{}"))
    assert shared.items is SharedDefault().items


def test_the_place_of_the_type_does_not_matter() -> None:
    """A payload that comes before the type is read in one pass as well."""
    for annotation in (Frozen, FIELDS, Checked):
        reader = Reader(annotation)
        for text in OBJECTS:
            usual = reader.in_one_pass(frame_of(text))
            again = reader.in_one_pass(f'{{"payload":{text},"type":"t"}}')
            assert usual is again or is_same(usual, again), text


BY_CATTRS: list[tuple[Any, str]] = [
    (Decimal, "msgspec reads its digits, cattrs the nearest float"),
    (object, "msgspec takes it for a class of its own"),
    (Literal[1], "only texts are known to be alike"),
    (Literal["a", None], "the same"),
    (Literal[Text("a")], "the value would be a plain text"),
    (Literal[Color.RED], "msgspec has no literal of an enum"),
    (Level, "only texts are known to be alike"),
    (Lenient, "msgspec asks _missing_"),
    (Static, "the same"),
    (UserId, "not looked into"),
    (Annotated[int | None, msgspec.Meta(gt=3)], "msgspec has no bound of a union"),
    (Annotated[Decimal, msgspec.Meta(gt=3)], "nor of a decimal"),
    (Record[int], "not looked into"),
    (Rounded, "it has a Decimal"),
    (Sequence[int], "msgspec builds a list, cattrs a tuple"),
    (Mapping[str, int], "not looked into"),
    (deque[int], "msgspec does not know the class"),
    (dict[int, str], "the keys are to be read from text"),
    (dict[UUID, int], "the same"),
    (dict[Any, int], "the same"),
    (Pair, "msgspec needs only the items without a default"),
    (Point | Data, "msgspec does not tell two classes apart, and says so"),
    (Either, "the same, in a field"),
    (Box[int], "not looked into"),
    (IntBox, "its field has a type variable"),
    (list[Decimal], "of what is in it"),
    (Decimal | None, "the same"),
    (Converted, "msgspec does not convert"),
    (Aliased, "msgspec does not know aliases"),
    (Private, "nor that private names lose their underscore"),
    (Computed, "msgspec takes a field that is none of the constructor's"),
    (DataComputed, "the same"),
    (Following, "msgspec does not make such a default"),
    (These, "msgspec finds no annotation"),
    (OwnInit, "msgspec calls no constructor"),
    (DataInit, "the same"),
    (DataNoInit, "the same"),
    (InheritedInit, "the same"),
    (Undecorated, "the same"),
    (UndecoratedInit, "the same"),
    (UndecoratedData, "the same"),
    (Wrapped, "the same"),
    (WrappedData, "the same"),
    (DataNew, "the same"),
    (Counting, "the same, of a metaclass"),
    (Concrete, "any metaclass but type is left to cattrs"),
    (Failure, "the same, of an exception"),
    (Interface, "the same, of a protocol"),
    (Abstract, "msgspec makes an object of it"),
    (PreInit, "a constructor of one's own"),
    (OwnSetattr, "msgspec goes around __setattr__"),
    (DataSetattr, "the same"),
    (PlainBase, "the same, of a base class"),
    (DataBase, "the same"),
    (HashCached, "msgspec leaves the place of the hash empty"),
    (FrozenHashCached, "the same"),
    (Both, "a dataclass to msgspec, an attrs class to cattrs"),
    (HiddenDefault, "msgspec sets no default where the class has an attribute"),
    (HiddenField, "nor does it miss a field there"),
    (DataDefault, "the same; vars() would lack it"),
    (DataFactory, "the same, of a base class"),
    (Generous, "the same, of any name"),
    (Lazy, "the same: attrs writes a __getattr__"),
    (Observant, "the same"),
]
if sys.version_info >= (3, 13):

    class Renamed(enum.Enum):
        NEW = "new"

        def __init__(self, *_: Any) -> None:
            self._add_value_alias_("old")

    BY_CATTRS.append((Renamed, "msgspec takes the alias"))


@pytest.mark.parametrize(("annotation", "why"), BY_CATTRS, ids=str)
def test_other_types_are_left_to_cattrs(annotation: Any, why: str) -> None:
    """A type that msgspec would read differently, or that nobody has looked at, is not quick."""
    assert not Reader(annotation).is_fast
    unlike: Any = (Point | Data, Either, Annotated[int | None, msgspec.Meta(gt=3)])
    is_refused_by_msgspec = annotation in unlike
    assert is_refused_by_msgspec or not pachinko.is_read_in_one_pass(annotation)


# Random types and values

LEAF = st.sampled_from(
    [
        *LEAVES, *LEAVES, Color, Word, Code, Literal["a", "b"], Point, Frozen, Checked, Data, Movie,
        Decimal, object, Level, Lenient, Literal[1, "a"], UserId, Annotated[int, "x"], Converted,
        Limited, Absent, Plot, Closed, Row, Annotated[int, msgspec.Meta(ge=0)],
    ]
)  # fmt: skip
TEXT_LIKE = st.sampled_from([str, bytes, UUID, datetime, date, Color, Literal["a", "b"]])
NAMES = st.lists(
    st.sampled_from(["a", "b", "x", "type", "_y"]), min_size=1, max_size=4, unique=True
)


@st.composite
def unions(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> Any:
    """Members that JSON tells apart, mostly."""
    item = draw(inner)
    choices = [None, int, float, bool, draw(TEXT_LIKE), list[item], dict[str, item], item]
    members = draw(st.lists(st.sampled_from(choices), min_size=2, max_size=4, unique=True))
    return Union[tuple(members)]  # noqa: UP007 - of a tuple


@st.composite
def typed_dicts(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> Any:
    qualify = st.sampled_from([lambda t: t, lambda t: NotRequired[t], lambda t: Required[t]])
    members = {name: draw(qualify)(draw(inner)) for name in draw(NAMES)}
    return TypedDict("Drawn", members, total=draw(st.booleans()))


@st.composite
def handlers(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> Any:
    """What is read for a handler with keyword-only parameters."""

    async def handler(conn: Connection, **fields: Any) -> None: ...

    parameter, defaults = inspect.Parameter, st.sampled_from([None, inspect.Parameter.empty])
    handler.__annotations__ = {name: draw(inner) for name in draw(NAMES)}
    parameters = [parameter("conn", parameter.POSITIONAL_ONLY)]
    for name in handler.__annotations__:
        parameters.append(parameter(name, parameter.KEYWORD_ONLY, default=draw(defaults)))
    handler.__signature__ = inspect.Signature(parameters)
    try:
        read = pachinko.read_handler("t", handler, STRICT, (globals(), {}), None, (), False)
    except PachinkoError:  # of a union that JSON cannot tell apart, say
        return int
    return read.annotation


def refuse_some(self: Any) -> None:
    if len(repr(self)) % 4 == 0:
        raise (ValueError if len(repr(self)) % 8 else ArithmeticError)


def set_twice(self: Any, name: str, value: Any) -> None:
    object.__setattr__(self, name, (value, value))


def look_up(self: Any, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return name


PLAIN: dict[str, Any] = {}
OWN_CODE: list[dict[str, Any]] = [
    PLAIN, PLAIN, PLAIN, PLAIN,
    {"__attrs_post_init__": refuse_some, "__post_init__": refuse_some},
    {"__attrs_pre_init__": lambda self: None},
    {"__setattr__": set_twice},
    {"__getattr__": look_up},
    {"__slots__": ()},
    {"a": 5},
]  # fmt: skip
ATTRS_FIELDS: list[dict[str, Any]] = [
    {}, {}, {"default": None}, {"factory": list}, {"validator": picky}, {"default": 1},
    {"validator": clumsy}, {"validator": [picky, clumsy], "default": "a"}, {"alias": "other"},
    {"converter": repr}, {"init": False, "default": 0}, {"kw_only": True}, {"eq": False},
    {"default": attrs.Factory(type, takes_self=True)},
]  # fmt: skip
DATA_FIELDS: list[dict[str, Any]] = [
    {}, {}, {"default": None}, {"default_factory": list}, {"init": False, "default": 0},
    {"kw_only": True}, {"compare": False},
]  # fmt: skip
ATTRS_OPTIONS = st.fixed_dictionaries(
    {"slots": st.booleans(), "frozen": st.booleans(), "kw_only": st.booleans()},
    optional={"unsafe_hash": st.just(True), "cache_hash": st.just(True), "eq": st.just(False)},
)
DATA_OPTIONS = st.fixed_dictionaries(
    {"slots": st.booleans(), "frozen": st.booleans(), "kw_only": st.booleans()},
    optional={"unsafe_hash": st.just(True), "eq": st.just(False)},
)


@st.composite
def classes(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> Any:
    """An attrs class or a dataclass; one that cannot be made is a plain one."""
    make, field, kinds, options, bases = draw(
        st.sampled_from(
            [
                (attrs.define, attrs.field, ATTRS_FIELDS, ATTRS_OPTIONS, [Point, Checked, Base]),
                (dataclasses.dataclass, dataclasses.field, DATA_FIELDS, DATA_OPTIONS, [Data, Base]),
            ]
        )
    )
    base = draw(st.sampled_from([object, object, *bases, Timeouts]))
    names = [name for name in draw(NAMES) if name not in inspect.get_annotations(base)]
    chosen = [draw(st.sampled_from(kinds)) for _ in names]
    chosen.sort(key=lambda kind: "kw_only" in kind)  # cattrs cannot have them first
    hints = {name: draw(inner) for name in names}
    fields = {name: field(**kind) for name, kind in zip(names, chosen, strict=True)}
    body = {"__annotations__": hints, **draw(st.sampled_from(OWN_CODE)), **fields}
    try:
        return make(**draw(options))(type("Drawn", (base,), body))
    except (TypeError, ValueError, SyntaxError):  # two fields have one alias, say
        return attrs.make_class("Drawn", {name: attrs.field(type=t) for name, t in hints.items()})


ANNOTATIONS = st.recursive(
    LEAF,
    lambda inner: st.one_of(
        st.builds(lambda t: list[t], inner),
        st.builds(lambda t: set[t], inner),
        st.builds(lambda t: frozenset[t], inner),
        st.builds(lambda t: tuple[t, ...], inner),
        st.builds(lambda t, u: tuple[t, u], inner, inner),
        st.builds(lambda t: dict[str, t], inner),
        st.builds(lambda t: Sequence[t], inner),
        st.builds(lambda t: t | None, inner),
        unions(inner),
        classes(inner),
        classes(inner),
        typed_dicts(inner),
        handlers(inner),
    ),
    max_leaves=5,
)
ANY = [*SCALARS, *ARRAYS, *OBJECTS]
JUNK = st.integers(0, len(ANY) - 1).map(ANY.__getitem__)


def object_of(pairs: list[tuple[str, str]]) -> str:
    return f"{{{','.join(f'{key}:{value}' for key, value in pairs)}}}"


def fields_of(cls: Any) -> dict[str, Any]:
    """The types of what an object has on the wire, by key."""
    if typing.is_typeddict(cls):
        qualified = (Required, NotRequired)
        hints = cls.__annotations__.items()
        return {key: get_args(t)[0] if get_origin(t) in qualified else t for key, t in hints}
    if issubclass(cls, msgspec.Struct):
        return {field.encode_name: field.type for field in msgspec.structs.fields(cls)}
    fields = attrs.fields(cls) if attrs.has(cls) else dataclasses.fields(cls)
    return {getattr(field, "alias", field.name): field.type for field in fields}


@st.composite
def payloads(draw: st.DrawFn, annotation: Any) -> str:
    """JSON for *annotation*, half of it with something in it that does not fit."""
    is_spoilt = draw(st.booleans())
    more = st.tuples(st.sampled_from(['"a"', r'"\u0078"'] if is_spoilt else ['"new"', '"é"']), JUNK)

    def fit(t: Any) -> str:
        origin, args = get_origin(t), get_args(t)
        args = tuple(arg for arg in args if arg is not UnsetType)
        if t in (Any, object) or (is_spoilt and draw(st.integers(0, 7)) == 0):
            return draw(JUNK)
        if origin is Annotated or hasattr(t, "__supertype__"):
            return fit(args[0] if args else t.__supertype__)
        if origin in (Union, type(int | None)):
            return fit(draw(st.sampled_from(args)))
        if origin is Literal or (inspect.isclass(t) and issubclass(t, enum.Enum)):
            return json.dumps(draw(st.sampled_from(args or [member.value for member in t])))
        if origin in (list, set, frozenset, Sequence) or args[-1:] == (Ellipsis,):
            return f"[{','.join(fit(args[0]) for _ in range(draw(st.integers(0, 2))))}]"
        if origin is tuple:
            return f"[{','.join(map(fit, args))}]"
        if origin is dict:
            keys = draw(st.lists(st.sampled_from(["a", "b", ""]), max_size=3))
            return object_of([(json.dumps(key), fit(args[1])) for key in keys])
        if t in BY_TYPE:
            return draw(BY_TYPE[t])
        if not hasattr(t, "__annotations__"):
            return draw(JUNK)
        pairs = [(f'"{key}"', fit(u)) for key, u in fields_of(t).items() if draw(MOSTLY)]
        return object_of(draw(st.permutations([*pairs, *draw(st.lists(more, max_size=2))])))

    return fit(annotation)


MOSTLY = st.sampled_from([True] * 7 + [False])
STRING = st.sampled_from(STRINGS)
BY_TYPE: dict[Any, st.SearchStrategy[str]] = {
    str: STRING,
    int: st.integers(-3, 2**66).map(str),
    float: st.floats(allow_nan=False, allow_infinity=False).map(json.dumps),
    bool: st.sampled_from(["true", "false"]),
    NoneType: st.just("null"),
    Decimal: st.sampled_from(['"1.10"', "1.5", "5"]),
    bytes: st.binary(max_size=6).map(lambda data: msgspec.json.encode(data).decode()),
    UUID: st.uuids().map(lambda uuid: f'"{uuid}"'),
    datetime: st.datetimes().map(lambda when: f'"{when.isoformat()}"'),
    date: st.dates().map(lambda when: f'"{when}"'),
    time: st.times().map(lambda when: f'"{when}"'),
    timedelta: st.timedeltas().map(lambda delta: msgspec.json.encode(delta).decode()),
}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(annotation=ANNOTATIONS | classes(LEAF), data=st.data())
def test_whatever_is_read_in_one_pass_is_what_cattrs_builds(annotation: Any, data: Any) -> None:
    """Of all types and values: both ways are one, but for what the documentation lists."""
    try:
        STRICT.check(annotation, (globals(), {}), [])
    except (TypeError, cattrs.StructureHandlerNotFoundError):  # refused at registration
        return
    reader = Reader(annotation)
    for _ in range(8 if reader.is_fast else 0):
        check_alike(reader, data.draw(payloads(annotation)))


# Through a server


def endpoint(**options: Any) -> Pachinko:
    return Pachinko(new_app(), "/ws", hub=Hub(), **options)


@contextlib.asynccontextmanager
async def talking(ws: Pachinko) -> AsyncIterator[Client]:
    async with simulated(ws._app) as server, connect(f"{server.url}/ws") as client:
        yield client


def echo(ws: Pachinko, type: str, annotation: Any, **options: Any) -> None:
    """Answer messages of *type* with the representation of what the handler gets."""

    async def handler(conn: Connection, payload: Any) -> str:
        return repr(payload)

    handler.__annotations__["payload"] = annotation
    ws.on(type, **options)(handler)


async def refusal(client: Client, payload: str) -> Any:
    """The errors with which a payload of type ``t`` is refused, by path."""
    await client.raw(frame_of(payload))
    answer = (await client.receive())["payload"]
    assert answer["code"] == "invalid_payload"
    return [(error["path"], error["message"]) for error in answer["errors"]]


@pytest.mark.parametrize("annotation", [Point, Aliased, int], ids=str)
@pytest.mark.parametrize("has_talked", [False, True])
async def test_a_handler_may_come_after_the_first_connection(
    annotation: Any, has_talked: bool
) -> None:
    """What is registered while a client is connected handles that client's next message."""
    ws = endpoint()
    echo(ws, "first", Point)
    payload = 1 if annotation is int else {"x": 1, "y": 2}
    async with talking(ws) as client:
        if has_talked:
            assert (await client.ask("first", {"x": 1}))["payload"] == "Point(x=1, y=0)"
            assert (await client.ask("later", payload))["payload"]["code"] == "unknown_type"
        echo(ws, "later", annotation)
        assert (await client.ask("later", payload))["type"] == "later.reply"
        assert (await client.ask("first", {"x": 1}))["payload"] == "Point(x=1, y=0)"


async def test_a_handler_may_register_another() -> None:
    """A message can bring the handler of the next one."""
    ws = endpoint()

    @ws.on("learn")
    async def learn(conn: Connection, type: str) -> None:
        echo(ws, type, Point)

    async with talking(ws) as client:
        for type in ("a", "b"):
            await client.send("learn", type)
            assert (await client.ask(type, {"x": 1}))["payload"] == "Point(x=1, y=0)"
        assert (await client.ask("a", {"x": 2}))["payload"] == "Point(x=2, y=0)"


async def test_middleware_may_come_after_the_first_message() -> None:
    """It is around the next message of every type, and sees the payload that was built."""
    ws, seen = endpoint(), []
    for type, annotation in (("quick", Point), ("slow", Aliased), ("plain", Any)):
        echo(ws, type, annotation)
    messages = [("quick", {"x": 1}), ("slow", {"y": 1}), ("plain", [1])]
    async with talking(ws) as client:
        before = [(await client.ask(*message))["payload"] for message in messages]

        @ws.middleware
        async def watch(conn: Connection, envelope: Any, call_next: Any) -> Any:
            seen.append(envelope.payload)
            return [await call_next()]

        after = [(await client.ask(*message))["payload"] for message in messages]
    assert before == ["Point(x=1, y=0)", "Aliased(x=1)", "[1]"]
    assert after == [[text] for text in before]
    assert seen == [Point(1), Aliased(1), [1]]


async def test_an_endpoint_may_have_a_thousand_types() -> None:
    """Each of many types is found, and its payload read as its own handler's."""
    ws = endpoint()

    def register(number: int) -> None:
        @message(f"type.{number}")
        class Numbered:
            n: int
            text: str = ""

        @ws.on(Numbered)
        async def handler(conn: Connection, msg: Numbered) -> int:
            assert type(msg) is Numbered
            return number + msg.n

    for number in range(1000):
        register(number)
    async with talking(ws) as client:
        for number in range(0, 1000, 7):
            assert (await client.ask(f"type.{number}", {"n": 1}))["payload"] == number + 1
        assert (await client.ask("type.1000", {"n": 1}))["payload"]["code"] == "unknown_type"


async def test_every_wrong_field_is_listed() -> None:
    """msgspec stops at the first; the client is told of all, each with its path."""
    ws = endpoint()
    echo(ws, "t", list[Frozen])
    payload = '[{"at":"x","points":[{"x":1},{"x":"1","y":null},{}]},5,{"points":{}}]'
    async with talking(ws) as client:
        assert await refusal(client, payload) == [
            ("$.payload[0].at", "invalid RFC3339 encoded date"),
            ("$.payload[0].points[1].x", "expected int, got str"),
            ("$.payload[0].points[1].y", "expected int, got null"),
            ("$.payload[0].points[2].x", "required, but missing"),
            ("$.payload[1]", "expected object, got int"),
            ("$.payload[2].points", "expected array, got object"),
        ]


async def test_every_wrong_parameter_is_listed() -> None:
    """The same for keyword-only parameters."""
    ws = endpoint()

    @ws.on("t")
    async def handler(conn: Connection, *, a: int, b: list[int], c: str = "") -> None: ...

    async with talking(ws) as client:
        assert await refusal(client, '{"b":[1,"2",null],"c":5}') == [
            ("$.payload.a", "required, but missing"),
            ("$.payload.b[1]", "expected int, got str"),
            ("$.payload.b[2]", "expected int, got null"),
            ("$.payload.c", "expected str, got int"),
        ]


UNEXPECTED = [
    ZeroDivisionError("s3cret"),
    Close(4000),
    MessageError("mine"),
    KeyError("s3cret"),
]


@pytest.mark.parametrize("exc", UNEXPECTED, ids=repr)
@pytest.mark.parametrize("decorate", [attrs.define, dataclasses.dataclass])
async def test_whatever_a_class_raises_is_an_invalid_payload(decorate: Any, exc: Any) -> None:
    """A validator decides about the payload, never about the connection or the answer."""

    def refuse(self: Any, *_: Any) -> None:
        if self.x == 13:
            raise exc

    body = {"__annotations__": {"x": int}, "__post_init__": refuse}
    if decorate is attrs.define:
        body = {"__annotations__": {"x": int}, "x": attrs.field(validator=refuse)}
    cls = decorate(type("Refusing", (), body))
    ws = endpoint()
    echo(ws, "t", cls)
    assert Reader(cls).is_fast
    async with talking(ws) as client:
        ((_, text),) = await refusal(client, '{"x":13}')
        assert text == "invalid value"
        assert (await client.ask("t", {"x": 1}))["payload"].endswith("Refusing(x=1)")


async def test_what_only_msgspec_refuses_is_told_in_its_words() -> None:
    """Of two equal keys, cattrs sees only the last; the client is told about the first."""
    ws = endpoint()
    echo(ws, "t", Point)
    async with talking(ws) as client:
        errors = await refusal(client, '{"x":"a","x":1}')
        assert errors == [("$.payload.x", "expected int, got str")]


async def test_two_types_in_a_frame_are_refused() -> None:
    """Wherever they stand, and whether or not there is a handler for the first."""
    ws = endpoint()
    echo(ws, "t", Point)
    echo(ws, "u", Point)
    async with talking(ws) as client:
        for first, second in (("t", "u"), ("u", "t"), ("no", "t"), ("complete", "t")):
            types = f'"type":"{first}","type":"{second}"'
            for keys in (f'{types},"payload":{{"x":1}}', f'"payload":{{"x":1}},{types}'):
                assert await client.error(f'{{"id":1,{keys}}}') == ("invalid_envelope", 1), keys


@pytest.mark.parametrize("annotation", [Point, Movie, list[Point], Private], ids=str)
async def test_depth_counts_in_a_key_that_is_ignored(annotation: Any) -> None:
    """A frame may nest 128 levels deep, also where nobody looks, and however long it is."""
    ws = endpoint()
    echo(ws, "t", annotation)
    known = '"x":1,"name":"M","year":1'
    before, after = ("[{", "}]") if annotation == list[Point] else ("{", "}")
    async with talking(ws) as client:
        for padding in ("", " " * 300):
            for levels in (128, 129):
                inner = levels - len("{" + before)
                nested = "[" * inner + "]" * inner + padding
                payload = f'{before}{known},"new":{nested}{after}'
                await client.raw(f'{{"type":"t","id":1,"payload":{payload}}}')
                answer = await client.receive()
                assert (answer["type"] == "t.reply") == (levels == 128)
            assert answer["payload"]["code"] == "invalid_json"
            frame = f'{{"type":"t","payload":{before}{known}{after},"new":{"[" * 128}{"]" * 128}}}'
            assert await client.error(frame + padding) == ("invalid_json", None)


NO_PAYLOAD: list[tuple[str, str | None]] = [
    ("(conn)", "called"),
    ("(conn, p)", "called: None"),
    ("(conn, p: Any)", "called: None"),
    ("(conn, p: int | None)", "called: None"),
    ("(conn, p: Point | None)", "called: None"),
    ("(conn, p: Private | None)", "called: None"),
    ("(conn, p: Point | None = Point(5))", "called: Point(x=5, y=0)"),
    ("(conn, p: int = 5)", "called: 5"),
    ("(conn, p: Aliased | str = 'any')", "called: any"),
    ("(conn, p: int)", "$.payload"),
    ("(conn, p: Point)", "$.payload"),
    ("(conn, p: SharedDefault)", "$.payload"),
    ("(conn, p: Private)", "$.payload"),
    ("(conn, p: dict)", "$.payload"),
    ("(conn, *, p: int = 5)", "called: 5"),
    ("(conn, *, p: Decimal = 5)", "called: 5"),
    ("(conn, *, p: int)", "$.payload.p"),
    ("(conn, *, p: int | None)", "$.payload.p"),
]


@pytest.mark.parametrize("kind", ["reply", "concurrent", "stream", "behind middleware"])
async def test_no_payload_is_the_default_or_null_or_no_fields(kind: str) -> None:
    """What is called without a payload, and what is refused, for each kind of handler."""
    ws, answers = endpoint(), []
    for number, (signature, _) in enumerate(NO_PAYLOAD):
        text = "called" if signature == "(conn)" else "called: {p}"
        statement = "yield" if kind == "stream" else "return"
        code = f"async def handler{signature}:\n    {statement} f'{text}'"
        exec(code, globals(), made := {})
        ws.on(f"t{number}", concurrent=kind == "concurrent")(made["handler"])

    async def around(conn: Connection, envelope: Any, call_next: Any) -> Any:
        return await call_next()

    if kind == "behind middleware":
        ws.middleware(around)
    async with talking(ws) as client:
        for number in range(len(NO_PAYLOAD)):
            answer = await client.ask(f"t{number}", id=number + 1)
            if answer["type"] == "error":
                assert answer["payload"]["code"] == "invalid_payload"
                (error,) = answer["payload"]["errors"]
                assert error["message"] == "required, but missing"
                answers.append(error["path"])
            else:
                answers.append(answer["payload"])
                assert kind != "stream" or (await client.receive())["type"] == "complete"
    assert answers == [answer for _, answer in NO_PAYLOAD]


@pytest.mark.parametrize("size", [100, 2000])
@pytest.mark.parametrize("annotation", [Said, Converted], ids=["quick", "slow"])
async def test_a_frame_may_have_as_many_bytes_as_the_limit(annotation: Any, size: int) -> None:
    """`max_size` counts the bytes of the text, whatever its characters."""
    ws = endpoint(max_size=size)
    echo(ws, "t", annotation)
    start = (
        '{"type":"t","payload":{"text":"' if annotation is Said else '{"type":"t","payload":{"x":"'
    )
    async with simulated(ws._app) as server:
        for character in ("x", "é", "€", "🂡"):
            room, width = size - len(start + '"}}'), len(character.encode())
            text = character * (room // width) + "." * (room % width)
            async with connect(f"{server.url}/ws") as client:
                await client.raw(frame := start + text + '"}}')
                assert len(frame.encode()) == size
                assert repr(text) in (await client.receive())["payload"]
                await client.raw(start + text + '" }}')
                assert (await client.closed())[0] == 1009
