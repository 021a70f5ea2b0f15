"""What the library reads from an annotation."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import sys
import textwrap
import types
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Literal, NewType, NotRequired, TypedDict

import attrs
import cattrs
import msgspec
import pytest
from structured import errors, like_annotated_types, read, refused
from typing_extensions import TypeAliasType

import pachinko
from pachinko import Codec, Hub

Name = NewType("Name", str)


@pytest.mark.parametrize(
    ("annotation", "inner"),
    [
        (int, int),
        (Name, str),
        (Annotated[Name, "of a room"], Name),
        (list[Name], list[Name]),
    ],
)
def test_a_name_or_metadata_stands_around_a_type(annotation: Any, inner: Any) -> None:
    """One of them is taken off; what has none is returned as it is."""
    assert pachinko.inner_type(annotation) == inner


def test_metadata_without_a_hash_is_left_out() -> None:
    """cattrs looks its hooks up by the type, and so by its hash."""
    assert pachinko.hashable(Annotated[int, []]) is int
    assert pachinko.hashable(Annotated[int, "x"]) == Annotated[int, "x"]


def module(name: str, source: str, monkeypatch: pytest.MonkeyPatch, **names: Any) -> Any:
    """A module with postponed annotations."""
    made = types.ModuleType(name)
    vars(made).update(names)
    monkeypatch.setitem(sys.modules, name, made)
    exec("from __future__ import annotations\n" + textwrap.dedent(source), vars(made))
    return made


BASE = """
    import attrs, dataclasses
    Item, Only = int, bytes
    @attrs.define
    class Attrs:
        first: Item
        only: Only
    @dataclasses.dataclass
    class Data:
        first: Item
        only: Only
    class Plain:
        pass
"""
SUB = """
    import attrs, dataclasses
    Item = str
    @attrs.define
    class Attrs(base.Attrs):
        second: Item
    @dataclasses.dataclass
    class Data(base.Data):
        second: Item
"""


@pytest.mark.parametrize("name", ["Attrs", "Data"])
def test_a_base_class_has_the_names_of_its_own_module(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two modules may call different types by one name, and the code that registers a third."""
    base = module("base_of_types", BASE, monkeypatch)
    cls = getattr(module("sub_of_types", SUB, monkeypatch, base=base), name)
    expected = {"first": int, "only": bytes, "second": str}
    assert pachinko.resolve_class(cls, {"Item": float, "Only": float}, {"Item": float}) == expected
    assert {f.name: f.type for f in pachinko.fields_of(cls)} == expected


def test_what_is_resolved_stays() -> None:
    """Other code that registers the class later may have other types by these names."""

    class Local:
        pass

    @attrs.define
    class Base:
        x: Unknown  # type: ignore[name-defined]  # noqa: F821 - given below

    @attrs.define
    class Sub(Base):
        y: int

    with pytest.raises(NameError) as caught:
        pachinko.resolve_class(Sub, {}, {})
    (note,) = caught.value.__notes__
    assert note.startswith("in an annotation of ") and note.endswith(".Base")
    first = pachinko.resolve_class(Sub, {}, {"Unknown": Local})
    assert first == {"x": Local, "y": int}
    assert pachinko.resolve_class(Sub, {}, {"Unknown": int}) == first


def test_a_class_body_names_types() -> None:
    """They come before those of the module; a method of that name is no type."""

    class Order:
        class Item(TypedDict):
            x: int

        Tags = list[str]

        def Name(self) -> None: ...  # noqa: N802 - the name of a type

        item: Item
        tags: Tags
        name: Name  # type: ignore[valid-type]  # a method, to a type checker
        shared: ClassVar[int] = 5

    expected = {"item": Order.Item, "tags": list[str], "name": Name}
    assert pachinko.resolve_class(attrs.define(Order), {}, {}) == expected


# Constraints


try:
    import annotated_types as at
except ImportError:
    at = like_annotated_types()

Positive = Annotated[int, msgspec.Meta(gt=0)]
ZONED = "2026-01-02T03:04:05+01:00"
NAIVE = "2026-01-02T03:04:05"


class Rank(enum.IntEnum):
    LOW = 1
    HIGH = 2


def even(value: int) -> bool:
    return value % 2 == 0


def lookup(value: str) -> bool:
    return {"known": True}[value]


@functools.total_ordering
class Money:
    def __init__(self, cents: int) -> None:
        self.cents = cents

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Money) and self.cents == other.cents

    def __lt__(self, other: Money) -> bool:
        return self.cents < other.cents

    def __hash__(self) -> int:
        return self.cents

    def __str__(self) -> str:
        return f"{self.cents} ct"


TENTHS = [(0.1, 0.3, 0.35), (0.01, 19.99, 0.355), (0.01, 1e300, 1e-3), (0.05, -0.15, -0.16)]
LIMITED: list[tuple[Any, Any, Any, str]] = [
    (Positive, 1, 0, "expected int >= 1"),
    (Annotated[int, msgspec.Meta(ge=2, lt=5)], 2, 5, "expected int <= 4"),
    (Annotated[int, msgspec.Meta(le=2)], 2, 3, "expected int <= 2"),
    (Annotated[int, msgspec.Meta(gt=0.5)], 1, 0, "expected int > 0.5"),
    (Annotated[float, msgspec.Meta(gt=1)], 1.5, 1, "expected float > 1.0"),
    (Annotated[int, msgspec.Meta(multiple_of=5)], 10, 7, "expected int that's a multiple of 5"),
    (Annotated[str, msgspec.Meta(min_length=1)], "a", "", "expected str of length >= 1"),
    (Annotated[str, msgspec.Meta(pattern="^a+$")], "aa", "b", "expected str matching regex '^a+$'"),
    (Annotated[bytes, msgspec.Meta(max_length=1)], "aA==", "aGk=", "expected bytes of length <= 1"),
    (Annotated[list[int], msgspec.Meta(min_length=1)], [1], [], "expected array of length >= 1"),
    (Annotated[dict[str, int], msgspec.Meta(max_length=0)], {}, {"a": 1},
     "expected object of length <= 0"),
    (Annotated[set[int], msgspec.Meta(min_length=2)], [1, 2], [1, 1],
     "expected array of length >= 2"),
    (Annotated[datetime, msgspec.Meta(tz=True)], ZONED, NAIVE,
     "expected datetime with a timezone component"),
    (Annotated[datetime, msgspec.Meta(tz=False)], NAIVE, ZONED,
     "expected datetime with no timezone component"),
    (Annotated[Decimal, msgspec.Meta(ge=1)], "1.0", "0.9", "expected Decimal >= 1"),
    (Annotated[Rank, msgspec.Meta(ge=2)], 2, 1, "expected Rank >= 2"),
    (Annotated[int, at.Gt(0)], 1, 0, "expected int >= 1"),
    (Annotated[int, at.Gt(0), at.Lt(9)], 1, 9, "expected int <= 8"),
    (Annotated[Annotated[int, at.Ge(1)], "x", at.Le(3)], 3, 0, "expected int >= 1"),
    (Annotated[Decimal, at.MultipleOf(0.5)], "1.5", "1.6",
     "expected Decimal that's a multiple of 0.5"),
    (Annotated[float, at.MultipleOf(2)], 4.0, 3, "expected float that's a multiple of 2.0"),
    *((Annotated[float, limit(multiple_of=by)], right, wrong,
       f"expected float that's a multiple of {by}")
      for by, right, wrong in TENTHS for limit in (msgspec.Meta, at.MultipleOf)),
    (Annotated[float, at.MultipleOf(Decimal("0.1"))], 0.3, 0.35,
     "expected float that's a multiple of 0.1"),
    (Annotated[float, at.MultipleOf(64)], 2.0**60, 65, "expected float that's a multiple of 64.0"),
    (Annotated[int, at.MultipleOf(0.1)], 3, "a", "expected int, got str"),
    (Annotated[int, at.MultipleOf(1.5)], 3, 4, "expected int that's a multiple of 1.5"),
    (Annotated[list[int], at.Len(1, 2)], [1], [1, 2, 3], "expected array of length <= 2"),
    (Annotated[str, at.Len(1)], "abc", "", "expected str of length >= 1"),
    (Annotated[str, at.Gt("m")], "n", "a", "expected str > m"),
    (Annotated[date, at.Gt(date(2026, 1, 1))], "2026-01-02", "2026-01-01",
     "expected date > 2026-01-01"),
    (Annotated[timedelta, at.Le(timedelta(hours=1))], "PT1H", "PT2H",
     "expected duration <= 1:00:00"),
    (Annotated[datetime, at.Timezone(...)], ZONED, NAIVE,
     "expected datetime with a timezone component"),
    (Annotated[datetime, at.Timezone(None)], NAIVE, ZONED,
     "expected datetime with no timezone component"),
    (Annotated[datetime, at.Timezone(UTC)], "2026-01-02T03:04:05Z", ZONED,
     "expected datetime with the offset of UTC"),
    (Annotated[int, at.Predicate(even)], 2, 3, "invalid value"),
    (Annotated[str, at.Predicate(str.islower)], "a", "A", "invalid value"),
    (Annotated[int | str, at.Predicate(even)], 2, "a", "invalid value"),
    (Annotated[datetime, at.Gt(datetime(2026, 1, 1, tzinfo=UTC))], ZONED, NAIVE,
     "expected datetime with a timezone component"),
    (Annotated[datetime | None, at.Le(datetime(2027, 1, 1))], None, ZONED,
     "expected datetime with no timezone component"),
    (Annotated[datetime, msgspec.Meta(tz=True), at.Gt(datetime(2026, 1, 1, tzinfo=UTC))], ZONED,
     "2025-01-01T00:00:00Z", "expected datetime > 2026-01-01 00:00:00+00:00"),
    (Annotated[time, at.Ge(time(1, tzinfo=UTC))], "01:00:00Z", "01:00:00",
     "expected time with a timezone component"),
    (Annotated[str, at.Predicate(lookup)], "known", "else", "invalid value"),
    (Annotated[int | None, at.Predicate(even)], None, 3, "invalid value"),
    (Annotated[int | None, msgspec.Meta(gt=0)], None, 0, "expected int >= 1"),
    (Annotated[int | str, msgspec.Meta(min_length=1)], 0, "", "expected str of length >= 1"),
    (Annotated[int | bool, at.Gt(0)], False, 0, "expected int >= 1"),
    (Annotated[int | str, at.MultipleOf(2)] | bool, True, 1, "expected int that's a multiple of 2"),
    (Positive | str, "a", 0, "expected int >= 1"),
    (Positive | Literal["all"] | None, "all", 0, "expected int >= 1"),
    (Annotated[list[int] | str, msgspec.Meta(min_length=1)] | None, None, [],
     "expected array of length >= 1"),
    (Annotated[NewType("Count", int), msgspec.Meta(gt=0)], 1, 0, "expected int >= 1"),
    (NewType("Count", Positive), 1, 0, "expected int >= 1"),
    (TypeAliasType("Count", Positive), 1, 0, "expected int >= 1"),
    (Annotated[int, msgspec.Meta(gt=0, examples=[1])], 1, 0, "expected int >= 1"),
    (Annotated[int, [], msgspec.Meta(gt=0)], 1, 0, "expected int >= 1"),
    (Annotated[int, at.Unit("m"), "text", msgspec.Meta(title="n", description="d")], 1, "a",
     "expected int, got str"),
]  # fmt: skip


def like_pydantic(name: str, *fields: str) -> Any:
    """A class of metadata as pydantic has them: its function makes a value of a value."""
    made = dataclasses.make_dataclass(name, ["func", *fields], frozen=True)
    made.__module__ = "pydantic.functional_validators"
    return made


After = like_pydantic("AfterValidator")
Before = like_pydantic("BeforeValidator", "json_schema_input_type")


class Unhashable:
    __hash__ = None  # type: ignore[assignment]  # what annotated_types.Not is

    def __call__(self, value: int) -> bool:
        return value > 0


class Berlin(tzinfo):
    """A zone without an offset that is always the same."""

    def utcoffset(self, when: datetime | None) -> timedelta | None:
        return None


class Wrapped(TypedDict):
    item: NotRequired[Positive]


class Held(msgspec.Struct):
    item: Positive


@attrs.define
class Kept:
    item: Positive


def in_item(value: Any) -> Any:
    return {"item": value}


dict_type: Any = TypedDict
PLACES: list[tuple[Any, Any, str]] = [
    (lambda t: t, lambda v: v, ""),
    (lambda t: list[t], lambda v: [v], "[0]"),
    (lambda t: dict[str, t], lambda v: {"a": v}, '["a"]'),
    (lambda t: tuple[int, t], lambda v: [1, v], "[1]"),
    (lambda t: t | None, lambda v: v, ""),
    (lambda t: list[list[t] | None], lambda v: [None, [v]], "[1][0]"),
    (lambda t: attrs.make_class("C", {"item": attrs.field(type=t)}), in_item, ".item"),
    (lambda t: msgspec.defstruct("S", [("item", t)]), in_item, ".item"),
    (lambda t: dict_type("D", {"item": t}), in_item, ".item"),
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "right", "wrong", "text"), LIMITED, ids=str)
def test_a_constraint_is_enforced(annotation: Any, right: Any, wrong: Any, text: str) -> None:
    """At the top and at any depth, with the path of the value, and in the words of msgspec."""
    for wrap, hold, path in PLACES:
        with contextlib.suppress(TypeError):  # before 3.13, one without a hash is in no union
            held = wrap(annotation)
            read(hold(right), held)
            assert errors(hold(wrong), held) == [(path, text)]


@pytest.mark.parametrize("cls", [Wrapped, Held, Kept])
def test_a_constraint_of_a_field_is_enforced(cls: Any) -> None:
    """In a typed dict, a Struct and an attrs class alike."""
    assert errors({"item": 0}, cls) == [(".item", "expected int >= 1")]
    assert errors([{"item": 1}, {"item": -1}], list[cls]) == [("[1].item", "expected int >= 1")]


def test_a_constraint_of_a_key_is_enforced() -> None:
    """Whether the key is a text or a number."""
    assert errors({"1": 1, "0": 1}, dict[Positive, int]) == [('["0"]', "expected int >= 1")]
    assert errors({"": 1}, dict[Annotated[str, at.MinLen(1)], int]) == [
        ('[""]', "expected str of length >= 1")
    ]


def test_a_predicate_may_have_no_hash() -> None:
    """annotated_types.Not has none."""
    assert errors(0, Annotated[int, at.Predicate(Unhashable())]) == [("", "invalid value")]
    assert read([1], list[Annotated[int, at.Predicate(Unhashable())]]) == [1]


def test_a_bound_may_be_of_a_class_with_a_hook() -> None:
    """What can be compared can be limited."""
    converter = Hub().converter.copy()
    converter.register_structure_hook(Money, lambda value, _: Money(value))
    codec = Codec(converter)
    annotation = Annotated[Money, at.Gt(Money(5))]
    assert read(6, annotation, codec) == Money(6)
    assert errors(5, annotation, codec) == [("", "expected Money > 5 ct")]


@pytest.mark.parametrize(
    ("annotation", "why"),
    [
        (Annotated[int, msgspec.Meta(min_length=1)], "min_length = 1 does not limit <class 'int'>"),
        (Annotated[str, at.Gt(5)], "gt = 5 does not limit <class 'str'>"),
        (Annotated[bool, at.Gt(0)], "does not limit <class 'bool'>"),
        (Annotated[Any, at.Gt(0)], "does not limit typing.Any"),
        (Annotated[Literal[1], at.Gt(0)], "does not limit"),
        (Annotated[Kept, at.MinLen(1)], "does not limit"),
        (Annotated[list[int], at.Gt(())], "does not limit"),
        (Annotated[int, msgspec.Meta(tz=True)], "does not limit"),
        (Annotated[int, msgspec.Meta(pattern="a")], "does not limit"),
        (Annotated[date, at.Timezone(...)], "does not limit"),
        (Annotated[datetime, at.Timezone("Europe/Berlin")], "does not limit"),
        (Annotated[datetime, at.Timezone(Berlin())], "has an offset, and no zone"),
        (Annotated[int, at.Gt], "is not enforced; write msgspec.Meta(gt=0), say"),
        (Annotated[str, After(str.strip)], "write msgspec.Meta(gt=0), say, annotated_types."),
        (list[Annotated[str, at.Gt("a"), After(str.strip)] | None], "is not enforced"),
        (Annotated[int, Before(int, Any)], "is not enforced"),
        (Annotated[str, at.Not(str.isdigit)], "annotated_types.Predicate(f) for a test"),
        (list[Annotated[int, attrs.validators.gt(0)]], "is not enforced; write msgspec.Meta(gt=0)"),
    ],
    ids=str,
)
def test_metadata_that_would_not_be_enforced_is_refused(annotation: Any, why: str) -> None:
    """No constraint is registered and then ignored."""
    assert why in refused(annotation)


def test_metadata_that_is_not_known_is_refused() -> None:
    """A piece of a newer annotated_types is no comment."""
    unheard = like_annotated_types().Unheard(1)
    assert "Unheard(of=1) in Annotated is not enforced" in refused(Annotated[int, unheard])


def test_a_constraint_is_enforced_in_one_pass() -> None:
    """Constraints of msgspec cost no more than the type, those of annotated_types need cattrs."""
    assert pachinko.is_read_in_one_pass(Kept) and pachinko.is_read_in_one_pass(Held)
    assert not pachinko.is_read_in_one_pass(Annotated[int, at.Gt(0)])
    assert pachinko.is_read_in_one_pass(Annotated[int, "x", at.Unit("m")])
    assert pachinko.is_read_in_one_pass(Annotated[float, msgspec.Meta(multiple_of=0.25)])
    assert not pachinko.is_read_in_one_pass(Annotated[float, msgspec.Meta(multiple_of=0.1)])


def test_a_type_without_arguments_may_have_no_hash() -> None:
    """Nothing can be taken out of it."""
    assert pachinko.hashable([]) == []


def test_a_converter_that_ignores_constraints_is_no_place_for_them() -> None:
    """A new converter of cattrs drops metadata; a copy of the hub's does not."""
    codec = Codec(cattrs.Converter())
    codec.check(Annotated[int, "text"], ({}, {}), [])
    with pytest.raises(TypeError, match=r"start from hub\.converter\.copy\(\)"):
        codec.check(list[Positive], ({}, {}), [])
    Codec(Hub().converter.copy()).check(list[Positive], ({}, {}), [])
