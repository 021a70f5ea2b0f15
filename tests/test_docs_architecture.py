"""What docs/architecture.md says of the code, and its drawing, are held against the two modules."""

from __future__ import annotations

import inspect
import re
import sys
import xml.etree.ElementTree as ElementTree
from typing import Any

import house
import pytest
from test_docs import ROOT, prose, spans, tables

import pachinko
import pachinko_cluster
from pachinko import Connection, Hub, Outgoing, Pachinko

PAGE = ROOT / "docs" / "architecture.md"
DRAWING = ROOT / "docs" / "architecture.svg"
SVG = "{http://www.w3.org/2000/svg}"

NAMES: dict[str, Any] = {
    **vars(pachinko_cluster), **vars(pachinko), "hub": Hub, "conn": Connection,
}  # fmt: skip
# What the page calls by a name that is not one of the modules': the server's own two callables, the
# type of a frame, options, phases, and the private names of others.
WORDS = {
    "receive", "send", "gap", "resume", "at", *inspect.signature(Pachinko).parameters,
    *map(str, pachinko.Phase), *house.FALCON, *house.NATS,
}  # fmt: skip


def is_known(name: str) -> bool:
    """Whether *name*, such as ``Session.serve``, is in one of the modules, or imported there."""
    first, *rest = name.split(".")
    value = NAMES.get(first)
    for part in rest:
        value = getattr(value, part, None)
    return value is not None


def unknown(text: str) -> list[str]:
    """The names in backticks that do not exist; a path or a command is no name."""
    names = {span for span in spans(text) if re.fullmatch(r"[A-Za-z_][\w.]*", span)}
    files = {name for name in names if name.endswith(".py")}
    modules = {f"{module.__name__}.py" for module in (pachinko, pachinko_cluster)}
    missing = {name for name in files - modules if not (ROOT / name).is_file()}
    return sorted(missing | {n for n in names - files - WORDS if not is_known(n)})


def test_each_name_exists() -> None:
    """Each class, method and function that the page names is in one of the modules."""
    assert unknown(prose(PAGE)) == []
    walk = prose(PAGE).partition("## The walk of a message")[2].partition("\n## ")[0]
    assert len({span for span in spans(walk) if is_known(span)}) > 50


@pytest.mark.parametrize("name", ["Session.served", "no_such_function", "Sessions", "conn.say"])
def test_a_name_that_does_not_exist_is_found(name: str) -> None:
    """A renamed method, function or class, and one that a connection does not have."""
    assert unknown(f"Then `{name}` calls `Session.serve` of `pachinko.py`.") == [name]


def test_the_phases() -> None:
    """The table has the transitions of the code, each once, with the method that makes it."""
    rows = tables(PAGE, "From", "To", "Method", "When")
    shown = {(cells[0].strip("`"), cells[1].strip("`")): cells[2].strip("`") for cells in rows}
    made = {(*map(str, phases),): f"Outgoing.{by}" for phases, by in pachinko.TRANSITIONS.items()}
    assert shown == made and len(rows) == len(made)
    assert all(cells[3] for cells in rows)
    assert all(hasattr(Outgoing, by) for by in pachinko.TRANSITIONS.values())


def test_the_owners() -> None:
    """The table has a line for each of the four classes."""
    rows = tables(PAGE, "Class", "Owns", "What others call")
    assert [cells[0].strip("`") for cells in rows] == [*house.OWNERS]


def test_the_private_names() -> None:
    """The tables have the private names that the modules may use, and no other."""
    rows = tables(PAGE, "Name", "What it is for", "What breaks without it")
    assert [cells[0].strip("`") for cells in rows] == [*house.FALCON, *house.NATS]


def test_the_drawing() -> None:
    """It is well-formed, its texts are text, and its classes have the methods that it names."""
    root = ElementTree.parse(DRAWING).getroot()
    assert root.tag == f"{SVG}svg" and root.find(f"{SVG}title") is not None
    assert DRAWING.stat().st_size < 10_000
    named, drawn = set(root.iter(f"{SVG}text")), set()
    for part in root.iter():
        if (name := part.get("data-class")) is None:
            continue
        assert inspect.isclass(NAMES.get(name)), name
        drawn.add(name)
        for text in [part] if part.tag == f"{SVG}tspan" else part.iter(f"{SVG}text"):
            named.discard(text)
            if "members" in (text.get("class") or ""):
                assert all(hasattr(NAMES[name], word) for word in (text.text or "").split()), name
            else:
                assert text.text == name
    others = " ".join("".join(text.itertext()) for text in named)
    capitals = set(re.findall(r"\b[A-Z][a-z]\w*", others))
    assert all(inspect.isclass(NAMES.get(word)) for word in capitals), capitals
    assert all(is_known(word) for word in re.findall(r"\b(?:hub|conn)\.\w+", others))
    walk = {"Incoming", "Session", "Outgoing", "Hub", "Relay", "Registry", "Cluster", "Link"}
    assert drawn >= walk | {"Backplane", "Nats", "Redis"}


def test_the_drawing_needs_nothing_else() -> None:
    """It loads no font, picture or script, and has colours for a dark page."""
    text = DRAWING.read_text()
    assert not re.search(r"<script|<image|@import|href=|url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text


def test_the_modules_are_those_of_the_page() -> None:
    """The page and the drawing name the two files."""
    for module in (pachinko, pachinko_cluster):
        assert f"`{module.__name__}.py`" in prose(PAGE)
        assert f">{module.__name__}.py<" in DRAWING.read_text()
        assert module.__name__ in sys.modules
