"""The decorators of an endpoint, as an application writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import falcon.asgi
import pytest

from pachinko import Hub, Pachinko, PachinkoError


async def none() -> None: ...


async def one(conn: Any) -> None: ...


async def two(conn: Any, other: Any) -> None: ...


async def three(conn: Any, envelope: Any, call_next: Any) -> Any: ...


async def text(conn: Any, frame: str) -> None: ...


async def data(conn: Any, data: bytes) -> None: ...


class Database: ...


async def database(conn: Any) -> Database:
    return Database()


# Each decorator, with a function that it takes.
BARE: dict[str, Callable[..., Any]] = {
    "connect": one, "accepted": one, "disconnect": one, "authenticate": two, "fallback": text,
    "binary": data, "middleware": three, "provide": database, "worker": none,
}  # fmt: skip
CALLED: dict[str, tuple[Any, Callable[..., Any]]] = {
    "on": ("say", one), "error": (ValueError, two), "snapshot": ("room:", two),
}  # fmt: skip


def endpoint() -> Pachinko:
    return Pachinko(falcon.asgi.App(), "/ws", hub=Hub())


@pytest.mark.parametrize("name", BARE)
@pytest.mark.parametrize("make", [endpoint, Pachinko])
def test_a_decorator_returns_its_function(name: str, make: Callable[[], Pachinko]) -> None:
    """So that it can be called, tested and decorated again; also of a Pachinko without an app."""
    assert getattr(make(), name)(BARE[name]) is BARE[name]


@pytest.mark.parametrize("name", CALLED)
@pytest.mark.parametrize("make", [endpoint, Pachinko])
def test_a_decorator_with_an_argument_does_so_too(name: str, make: Callable[[], Pachinko]) -> None:
    """Each of them is called first."""
    argument, function = CALLED[name]
    assert getattr(make(), name)(argument)(function) is function


@pytest.mark.parametrize("name", BARE)
def test_empty_parentheses_are_refused(name: str) -> None:
    """Where there is nothing to put into them, or not all that is needed."""
    with pytest.raises(PachinkoError, match=f"@ws.{name}"):
        getattr(endpoint(), name)()(BARE[name])


@pytest.mark.parametrize("name", CALLED)
def test_an_argument_is_not_left_out(name: str) -> None:
    """The error shows where it goes."""
    with pytest.raises(PachinkoError, match=rf"@ws.{name}\("):
        getattr(endpoint(), name)(CALLED[name][1])


@pytest.mark.parametrize("name", {**BARE, **CALLED})
def test_a_plain_function_is_refused(name: str) -> None:
    """Handlers are async."""

    def plain(conn: Any) -> None: ...

    decorate = getattr(endpoint(), name)
    with pytest.raises(PachinkoError, match="async def"):
        (decorate(CALLED[name][0]) if name in CALLED else decorate)(plain)
