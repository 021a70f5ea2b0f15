"""What the library reads from an annotation."""

from __future__ import annotations

import sys
import textwrap
import types
from typing import Annotated, Any, ClassVar, NewType, TypedDict

import attrs
import pytest

import pachinko

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
