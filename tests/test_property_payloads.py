"""Of every annotation: what registers round-trips, and what does not fit is refused by its path."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal, NewType, NotRequired, TypedDict, Union
from uuid import UUID

import attrs
import cattrs
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import UNSET, UnsetType
from structured import STRICT
from typing_extensions import TypeAliasType

import pachinko
from pachinko import Codec, MessageError

BY_CATTRS = Codec(pachinko.strict_converter())  # a converter of one's own has no quick way
WRONG: Any = [["\0"], 0.5, {}]  # fits no type that is made here


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


typed_dict: Any = TypedDict
alias: Any = TypeAliasType
UserId = NewType("UserId", int)
Tag = tuple[Any, st.SearchStrategy[Any]]  # an annotation, and its values


def text(**bounds: int) -> st.SearchStrategy[str]:
    return st.text(st.characters(codec="utf-8"), max_size=5, **bounds)


LEAVES: list[Tag] = [
    (str, text()),
    (int, st.integers()),
    (float, st.floats(allow_nan=False, allow_infinity=False)),
    (bool, st.booleans()),
    (type(None), st.none()),
    (bytes, st.binary(max_size=5)),
    (UUID, st.uuids()),
    (date, st.dates()),
    (datetime, st.datetimes(timezones=st.sampled_from([None, UTC]))),
    (timedelta, st.timedeltas(timedelta(-1000), timedelta(1000))),
    (Decimal, st.decimals(allow_nan=False, allow_infinity=False)),
    (Color, st.sampled_from(Color)),
    (Level, st.sampled_from(Level)),
    (Rights, st.integers(0, 3).map(Rights)),
    (Literal["a", 1, True, b"x"], st.sampled_from(["a", 1, True, b"x"])),
    (UserId, st.integers()),
    (alias("Number", int), st.integers()),
    (Annotated[int, msgspec.Meta(gt=0, multiple_of=2)], st.integers(1).map(lambda n: 2 * n)),
    (Annotated[str, msgspec.Meta(min_length=1)], text(min_size=1)),
    (Annotated[float, msgspec.Meta(le=1)], st.floats(-9, 1)),
    (Annotated[int | str, msgspec.Meta(ge=0)], st.integers(0) | text()),
    (Annotated[datetime, msgspec.Meta(tz=True)], st.datetimes(timezones=st.just(UTC))),
]


def either(*members: Any) -> Any:
    return Union[members]  # noqa: UP007 - of a tuple


def hold(name: str, fields: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Classes of each kind with these fields, as functions that make an object."""
    optional = {key for key in fields if key.startswith("o")}
    kinds = []
    attributes = {
        key: attrs.field(type=either(t, UnsetType) if key in optional else t, kw_only=True,
                         **{"default": UNSET} if key in optional else {}, alias=f"{key}Alias")
        for key, t in fields.items()
    }  # fmt: skip
    cls = attrs.make_class(name, attributes)
    kinds.append((cls, lambda v, cls=cls: cls(**{f"{key}Alias": x for key, x in v.items()})))
    made = dataclasses.make_dataclass(
        name,
        [(key, either(t, None), dataclasses.field(default=None)) if key in optional else (key, t)
         for key, t in fields.items()],
        kw_only=True,
    )  # fmt: skip
    kinds.append((made, lambda v, made=made: made(**v)))
    items = {key: NotRequired[t] if key in optional else t for key, t in fields.items()}
    kinds.append((typed_dict(name, items), dict))
    struct = msgspec.defstruct(
        name,
        [
            (key, either(t, UnsetType), UNSET) if key in optional else (key, t)
            for key, t in fields.items()
        ],
        kw_only=True,
        rename="upper",
        tag=name,
    )
    kinds.append((struct, lambda v, struct=struct: struct(**v)))
    return st.sampled_from(kinds)


@st.composite
def classes(draw: Any, inner: st.SearchStrategy[Tag]) -> Tag:
    """A class with fields, of which those that begin with an o may be absent."""
    names = draw(st.lists(st.sampled_from(["a", "b", "o", "oo"]), min_size=1, unique=True))
    parts = {name: draw(inner) for name in names}
    cls, make = draw(hold("Drawn", {name: t for name, (t, _) in parts.items()}))
    needed = {name: values for name, (_, values) in parts.items() if not name.startswith("o")}
    optional = {name: values for name, (_, values) in parts.items() if name.startswith("o")}
    return cls, st.fixed_dictionaries(needed, optional=optional).map(make)


@st.composite
def tagged(draw: Any, inner: st.SearchStrategy[Tag]) -> Tag:
    """A union of two classes of any kinds, told apart by a tag."""
    members, values = [], []
    for tag in ("one", "two"):
        t, inside = draw(inner)
        kind: Any = Literal[tag]  # type: ignore[valid-type]  # made at run time
        fields = {"kind": kind, "item": t}
        cls = draw(st.sampled_from([
            attrs.make_class(tag, {key: attrs.field(type=u) for key, u in fields.items()}),
            dataclasses.make_dataclass(tag, list(fields.items())),
            typed_dict(tag, fields),
            msgspec.defstruct(tag, [("item", t)], tag=tag, tag_field="kind"),
        ]))  # fmt: skip
        members.append(cls)
        is_struct = isinstance(cls, type(msgspec.Struct))
        values.append(inside.map(
            lambda v, cls=cls, tag=tag, is_struct=is_struct:
            cls(item=v) if is_struct else cls(kind=tag, item=v)
        ))  # fmt: skip
    return either(*members), st.one_of(values)


def keep(make: Any) -> Any:
    return lambda tag: make(*tag)


ANNOTATIONS: st.SearchStrategy[Tag] = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(
        inner.map(keep(lambda t, v: (list[t], st.lists(v, max_size=3)))),
        inner.map(keep(lambda t, v: (dict[str, t], st.dictionaries(text(), v, max_size=3)))),
        inner.map(keep(lambda t, v: (dict[int, t], st.dictionaries(st.integers(), v, max_size=2)))),
        inner.map(keep(lambda t, v: (tuple[t, int], st.tuples(v, st.integers())))),
        inner.map(keep(lambda t, v: (Sequence[t], st.lists(v, max_size=3).map(tuple)))),
        inner.map(keep(lambda t, v: (Mapping[str, t], st.dictionaries(text(), v, max_size=2)))),
        inner.map(keep(lambda t, v: (either(t, None), v | st.none()))),
        inner.map(keep(lambda t, v: (Annotated[t, "text"], v))),
        inner.map(keep(lambda t, v: (Annotated[list[t], msgspec.Meta(max_length=1)],
                                     st.lists(v, max_size=1)))),
        classes(inner),
        tagged(inner),
    ),
    max_leaves=4,
)  # fmt: skip


def structured(codec: Codec, payload: Any, annotation: Any) -> Any:
    """What a handler takes, or the errors."""
    try:
        return codec.structure(payload, annotation, "t")
    except MessageError as exc:
        return [(error["path"], error["message"]) for error in exc.details["errors"]]


def in_one_pass(annotation: Any, frame: bytes) -> Any:
    """What an endpoint makes of a frame, or None if it is refused or read by cattrs."""
    made = STRICT.frame_class("t", annotation)
    try:
        return pachinko.decoder_of([made])(frame.decode()) if made.is_built else None
    except Exception:  # the frame is refused
        return None


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where there are values in a JSON value."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value if isinstance(value, list) else ())
    )
    return [path, *(inner for key, item in items for inner in paths_in(item, (*path, key)))]


def spoilt(value: Any, path: tuple[Any, ...]) -> Any:
    """*value* with something that fits nowhere at *path*."""
    if not path:
        return WRONG
    made = dict(value) if isinstance(value, dict) else list(value)
    made[path[0]] = spoilt(value[path[0]], path[1:])
    return made


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(tag=ANNOTATIONS, data=st.data())
def test_what_registers_round_trips_and_what_does_not_fit_is_refused(tag: Tag, data: Any) -> None:
    """In one pass and by cattrs alike, with the same paths and words."""
    annotation, values = tag
    try:
        for codec in (STRICT, BY_CATTRS):
            codec.check(annotation, (globals(), {}), [])
            codec.check_reply(annotation, (globals(), {}))
    except (TypeError, pachinko.PachinkoError, cattrs.StructureHandlerNotFoundError):
        return  # it is refused at registration: UUID | datetime, say
    value = data.draw(values)
    type_, unstructure = STRICT.writer_of(value, "t", annotation)
    frame = pachinko._encode(pachinko.Sent(type_, payload=unstructure(value)))
    payload = json.loads(frame).get("payload")
    for codec in (STRICT, BY_CATTRS):
        assert structured(codec, payload, annotation) == value
    quick = in_one_pass(annotation, frame)
    assert quick is None or quick.payload in (value, UNSET)

    path = data.draw(st.sampled_from(paths_in(payload)))
    wrong = spoilt(payload, path)
    found = [structured(codec, wrong, annotation) for codec in (STRICT, BY_CATTRS)]
    assert found[0] == found[1]
    whole = "$.payload" + "".join(
        f"[{step}]" if isinstance(step, int) else f".{step}" for step in path
    )
    for place, _ in found[0]:  # above it, if it was a key that tells classes apart; or in it
        plain = re.sub(r'\["(.*?)"\](?=[.\[]|$)', r".\1", place, flags=re.DOTALL)
        assert whole.startswith(plain) or plain.startswith(whole), (place, whole)
    spoilt_frame = pachinko._encode(pachinko.Sent("t", payload=wrong))
    assert in_one_pass(annotation, spoilt_frame) is None


@pytest.mark.parametrize("annotation", [t for t, _ in LEAVES], ids=str)
def test_nothing_else_fits_a_scalar(annotation: Any) -> None:
    """The wrong value is wrong everywhere."""
    STRICT.check(annotation, (globals(), {}), [])
    assert structured(STRICT, WRONG, annotation)[0][0] == "$.payload"
