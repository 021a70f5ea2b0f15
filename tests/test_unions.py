"""The section "unions": the classes in a union, and what tells them apart."""

from __future__ import annotations

import dataclasses
import enum
from typing import Annotated, Any, Generic, Literal, NotRequired, TypedDict, TypeVar

import attrs
import cattrs
import msgspec
import pytest
from cattrs.gen import make_dict_structure_fn, override
from structured import STRICT, errors, read, refused, written
from support import connect, new_app, simulated

from pachinko import Codec, Connection, Hub, Pachinko, PachinkoError

T = TypeVar("T")
MISSING = "required, but missing"


class Species(enum.StrEnum):
    CAT = "cat"
    DOG = "dog"


@attrs.frozen
class Cat:
    kind: Literal["cat"] = attrs.field(alias="type")
    lives: int = 9


@attrs.frozen
class Dog:
    kind: Literal["dog", "puppy"] = attrs.field(alias="type")
    lives: int = 1


@attrs.frozen
class Bird:
    type: Literal["bird"] = "bird"
    wings: int = 2


@dataclasses.dataclass
class Fish:
    type: Literal[Species.CAT, "fish"]
    depth: float = 0.0


class Cow(TypedDict):
    type: Literal["cow"]
    milk: NotRequired[int]


class Hen(TypedDict):
    type: Annotated[Literal["hen"], "a tag"]
    eggs: int


class Ant(msgspec.Struct, tag_field="type", tag="ant"):
    legs: int = 6


class Bee(msgspec.Struct, tag_field="type", tag="bee", rename="camel"):
    honey_jars: int = 0


@attrs.frozen
class Ok(Generic[T]):
    value: T
    status: Literal["ok"] = "ok"


@attrs.frozen
class Bad:
    why: str
    status: Literal["bad"] = "bad"


@attrs.frozen
class Old:
    kind: Literal["a"]
    v: Literal[1]


@attrs.frozen
class New:
    kind: Literal["a"]
    v: Literal[2]


@attrs.frozen
class Other:
    kind: Literal["b"]


@attrs.frozen
class Point:
    x: int
    y: int = 0


@attrs.frozen
class Size:
    width: int
    height: int = 0


@attrs.frozen
class Area:
    x: int
    y: int
    width: int


@attrs.frozen
class Empty:
    note: str = ""


@attrs.define
class Branch:
    kind: Literal["branch"]
    left: Branch | Leaf
    right: Branch | Leaf | None = None


@attrs.define
class Leaf:
    kind: Literal["leaf"]


class Short(TypedDict):
    x: int


class Long(TypedDict):
    x: int
    y: int


TOLD: list[tuple[Any, Any, Any]] = [
    (Cat | Dog, {"type": "cat", "lives": 3}, Cat("cat", 3)),
    (Cat | Dog, {"type": "puppy", "lives": 1}, Dog("puppy", 1)),
    (Cat | Bird, {"type": "bird", "wings": 2}, Bird()),
    (Cat | Dog | Bird | None, {"type": "dog", "lives": 2}, Dog("dog", 2)),
    (Bird | Fish, {"type": "cat", "depth": 1.5}, Fish(Species.CAT, 1.5)),
    (Bird | Fish, {"type": "fish", "depth": 1.5}, Fish("fish", 1.5)),
    (Cow | Hen, {"type": "cow"}, {"type": "cow"}),
    (Cow | Hen, {"type": "hen", "eggs": 1}, {"type": "hen", "eggs": 1}),
    (Cow | Hen | None, {"type": "hen", "eggs": 1}, {"type": "hen", "eggs": 1}),
    (Ant | Bee, {"type": "ant", "legs": 6}, Ant()),
    (Ant | Bee, {"type": "bee", "honeyJars": 4}, Bee(4)),
    (Ant | Bird | Cow, {"type": "bird", "wings": 3}, Bird(wings=3)),
    (Ant | Bird | Cow, {"type": "cow", "milk": 3}, {"type": "cow", "milk": 3}),
    (Ok[int] | Bad, {"value": 5, "status": "ok"}, Ok(5)),
    (Ok[int] | Bad, {"why": "x", "status": "bad"}, Bad("x")),
    (Ok[Cat | Dog] | Bad, {"value": {"type": "cat", "lives": 1}, "status": "ok"},
     Ok(Cat("cat", 1))),
    (Old | New | Other, {"kind": "a", "v": 2}, New("a", 2)),
    (Old | New | Other, {"kind": "b"}, Other("b")),
    (Cat | Point, {"x": 1, "y": 2}, Point(1, 2)),
    (Cat | Empty, {"note": "a"}, Empty("a")),
    (Cat | Empty, {"type": "cat", "lives": 1}, Cat("cat", 1)),
    (Point | Size, {"width": 1, "height": 2}, Size(1, 2)),
    (Point | Area, {"x": 1, "y": 2}, Point(1, 2)),
    (Point | Area, {"x": 1, "y": 2, "width": 3}, Area(1, 2, 3)),
    (Area | Point | Empty, {"x": 1, "y": 2}, Point(1, 2)),
    (Area | Point | Empty, {"note": ""}, Empty()),
    (Short | Long, {"x": 1}, {"x": 1}),
    (Short | Long, {"x": 1, "y": 2}, {"x": 1, "y": 2}),
    (Branch | Leaf, {"kind": "branch", "left": {"kind": "leaf"}, "right": None},
     Branch("branch", Leaf("leaf"))),
]  # fmt: skip
AROUND: list[tuple[Any, Any]] = [
    (lambda t: t, lambda v: v),
    (lambda t: t | None, lambda v: v),
    (lambda t: list[t], lambda v: [v, v]),
    (lambda t: dict[str, t | None], lambda v: {"a": v, "b": None}),
    (lambda t: t | str | list[int], lambda v: v),
    (lambda t: Annotated[t, "some text"] | int, lambda v: v),
]


@pytest.mark.parametrize(("annotation", "payload", "value"), TOLD, ids=str)
def test_the_keys_on_the_wire_choose_the_class(annotation: Any, payload: Any, value: Any) -> None:
    """A tag first, then the required keys; at the top and at any depth, in both directions."""
    for wrap, hold in AROUND:
        found = read(hold(payload), wrap(annotation))
        assert found == hold(value)
        assert written(found, wrap(annotation)) == hold(payload)


@attrs.frozen
class Group:
    kind: Literal["group"]
    items: list["Group | Link"] = attrs.field(factory=list)  # noqa: UP037 - as it is written


@attrs.frozen
class Link:
    kind: Literal["link"]
    named: dict[str, "Group | Link | None"] = attrs.field(factory=dict)  # noqa: UP037 - as above


def test_the_classes_of_a_union_may_contain_each_other() -> None:
    """Each is resolved before the hook of the other is made."""
    inner = {"kind": "link", "named": {"a": {"kind": "group", "items": []}, "b": None}}
    payload = {"kind": "group", "items": [inner]}
    value = Group("group", [Link("link", {"a": Group("group"), "b": None})])
    assert read(payload, Group | Link) == value
    assert written(value, Group | Link) == payload
    inner["named"] = {"a": {"kind": "ring"}}
    assert errors(payload, Group | Link) == [
        ('.items[0].named["a"].kind', 'expected one of "group", "link"')
    ]


def test_what_a_typed_dict_does_not_declare_stays_here() -> None:
    """Going out, the keys choose as well."""
    assert written({"x": 1, "y": 2, "z": 3}, Short | Long) == {"x": 1, "y": 2}
    assert written([{"x": 1, "z": 3}], list[Short | Long]) == [{"x": 1}]
    assert written({"y": 1, "z": 3}, Short | Long) == {"y": 1}
    assert written({"type": Species.CAT}, Cow | Hen) == {"type": "cat"}


WRONG: list[tuple[Any, Any, list[tuple[str, str]]]] = [
    (Cat | Dog, {"type": "hexagon"}, [(".type", 'expected one of "cat", "dog", "puppy"')]),
    (Cat | Dog, {"type": None}, [(".type", 'expected one of "cat", "dog", "puppy"')]),
    (Cat | Dog, {"type": ["cat"]}, [(".type", 'expected one of "cat", "dog", "puppy"')]),
    (Cat | Dog, {"kind": "cat"}, [(".type", MISSING)]),
    (Cat | Dog, {}, [(".type", MISSING)]),
    (Cat | Dog, [], [("", "expected object, got array")]),
    (Cat | Dog | None, "cat", [("", "expected object, got str")]),
    (Cat | Dog, {"type": "cat", "lives": "x"}, [(".lives", "expected int, got str")]),
    (Ant | Bee, {"type": "wasp"}, [(".type", 'expected one of "ant", "bee"')]),
    (Ant | Bee, {}, [(".type", MISSING)]),
    (Ant | Bee, {"type": "bee", "honeyJars": "1"}, [(".honeyJars", "expected int, got str")]),
    (Cow | Hen, {"type": "pig"}, [(".type", 'expected one of "cow", "hen"')]),
    (Cow | Hen, {"type": "hen"}, [(".eggs", MISSING)]),
    (Bird | Fish, {"type": "crab"}, [(".type", 'expected one of "bird", "cat", "fish"')]),
    (Old | New | Other, {"kind": "a", "v": 3}, [(".v", "expected one of 1, 2")]),
    (Old | New | Other, {"kind": "c", "v": 1}, [(".kind", 'expected one of "a", "b"')]),
    (Old | New | Other, {"v": True}, [(".kind", MISSING)]),
    (Cat | Dog | Point, {"type": "x"}, [(".type", 'expected one of "cat", "dog", "puppy"')]),
    (Cat | Dog | Point, {"y": 1}, [(".x", MISSING)]),
    (Point | Size, {}, [("", 'expected an object with "x" or "width"')]),
    (Point | Size, {"y": 1}, [(".x", MISSING)]),
    (Point | Area, {"y": "a", "width": 1}, [(".x", MISSING), (".y", "expected int, got str")]),
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "payload", "found"), WRONG, ids=str)
def test_a_wrong_tag_is_named(annotation: Any, payload: Any, found: Any) -> None:
    """The path is that of the tag, and the text lists the tags there are."""
    assert errors(payload, annotation) == found
    assert errors([payload], list[annotation]) == [(f"[0]{path}", text) for path, text in found]


Same = attrs.make_class("Same", {"x": attrs.field(type=int)})


@pytest.mark.parametrize(
    ("annotation", "why"),
    [
        (Point | Same, 'tag them: `kind: Literal["Point"]` and `kind: Literal["Same"]`'),
        (list[Point | Same] | None, "Point | Same cannot be told apart"),
        (Cow | Cow | Bird | attrs.make_class("Sow", {"type": attrs.field(type=Literal["cow"])}),
         "cannot be told apart"),
        (Ok[int] | Ok[str], "Ok[int] | Ok[str] cannot be told apart"),
        (Point | dict[str, int], "write a class with fields instead of the dict"),
        (dict[str, int] | dict[str, str], "write a class with fields instead of the dict"),
        (list[int] | list[str], "two types for an array; write list[int | str]"),
        (TypedDict("One", {"x": int}) | TypedDict("Two", {"x": int}), "tag them"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_told_apart_is_refused(annotation: Any, why: str) -> None:
    """At registration, with what to write."""
    assert why in refused(annotation)


def test_typed_dicts_that_look_alike_do_not_go_out() -> None:
    """A reply is refused as well, when its handler is registered."""
    one, two = TypedDict("One", {"x": int}), TypedDict("Two", {"x": int})
    with pytest.raises(PachinkoError, match=r"tag them: .*, or write classes with @attrs\.frozen"):
        STRICT.check_reply(one | two, (globals(), {}))


def camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(map(str.title, rest))


@attrs.define
class Order:
    order_id: int
    line_items: list[int]
    secret: str = ""


@attrs.define
class Return:
    order_id: int
    return_reason: str


@dataclasses.dataclass
class Plain:
    some_field: int


class Named(TypedDict):
    some_key: int


def camel_codec(**options: Any) -> Codec:
    """A converter with other names on the wire."""
    converter = Hub().converter.copy(**options)

    def hook(cls: Any) -> Any:
        names = [f.name for f in (attrs.fields(cls) if attrs.has(cls) else dataclasses.fields(cls))]
        renamed = {name: override(rename=camel(name), omit=name == "secret") for name in names}
        return make_dict_structure_fn(cls, converter, **renamed)

    converter.register_structure_hook_factory(
        lambda t: attrs.has(t) or dataclasses.is_dataclass(t), hook
    )
    return Codec(converter)


def test_a_path_has_the_names_of_the_wire() -> None:
    """A converter may rename the fields: clients know nothing of Python's names."""
    codec = camel_codec()
    assert errors({"orderId": "1", "lineItems": [1, "2"]}, Order, codec) == [
        (".orderId", "expected int, got str"), (".lineItems[1]", "expected int, got str")
    ]  # fmt: skip
    assert errors({}, Plain, codec) == [(".someField", MISSING)]
    assert errors({}, list[Plain] | None, codec) == [("", "expected array, got object")]


def test_renamed_keys_choose_the_class() -> None:
    """By the names that the converter gives them."""
    codec = camel_codec()
    annotation = Order | Return
    assert read({"orderId": 1, "returnReason": "x"}, annotation, codec) == Return(1, "x")
    assert errors({"orderId": 1}, annotation, codec) == [
        ("", 'expected an object with "lineItems" and "orderId" or "orderId" and "returnReason"')
    ]


def test_a_name_beside_the_type_is_that_of_the_wire() -> None:
    """cattrs takes ``override(rename=…)`` as metadata too."""
    cls = attrs.make_class("C", {"my_x": attrs.field(type=Annotated[int, override(rename="myX")])})
    dict_: Any = TypedDict
    typed = dict_("D", {"my_x": Annotated[int, override(rename="myX")]})
    for annotation in (cls, typed):
        assert errors({"myX": "1"}, annotation) == [(".myX", "expected int, got str")]
        assert errors({"my_x": 1}, annotation) == [(".myX", MISSING)]
    assert read({"myX": 1}, cls) == cls(1)


def test_a_converter_without_aliases_names_the_fields() -> None:
    """A path has the keys that the converter reads."""
    codec = Codec(cattrs.Converter())
    assert errors({}, attrs.make_class("C", {"_x": attrs.field(type=int)}), codec) == [
        ("._x", MISSING)
    ]


async def test_a_tagged_union_through_a_server() -> None:
    """The example of the documentation, with a reply that is a union too."""
    ws = Pachinko(new_app(), "/ws", hub=Hub())

    @ws.on("pet")
    async def pet(conn: Connection, pet: Cat | Dog) -> Cat | Dog:
        return pet

    async with simulated(ws._app) as server, connect(f"{server.url}/ws") as client:
        assert (await client.ask("pet", {"type": "cat"}))["payload"] == {"type": "cat", "lives": 9}
        refusal = (await client.ask("pet", {"type": "hexagon"}))["payload"]
        assert refusal["errors"] == [
            {"path": "$.payload.type", "message": 'expected one of "cat", "dog", "puppy"'}
        ]
