"""What the library reads from an annotation."""

from __future__ import annotations

from typing import Annotated, Any, NewType

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
