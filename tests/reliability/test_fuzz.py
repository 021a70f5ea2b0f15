"""Strange frames through a whole app, held against a small model of the wire format.

Each example is the life of one or two connections: an app, up to eighty frames each, how they
arrive, how fast the client reads, and how it ends. The app is a Falcon app with a Pachinko; what
drives it is the ASGI interface and nothing else. The model reads frames with the standard library's
json, and says for each which final answers are right.

Each frame is made from one number (0 is no frame), so that an example that fails shrinks by leaving
frames out. It is reported as a list of frames, to be put into `REGRESSIONS`.

``PACHINKO_FUZZ_FRAMES=1000000`` is the nightly form, with other frames each time; a round that
fails has its seed in its name, for ``PACHINKO_FUZZ_SEED``.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import enum
import gc
import itertools
import json
import logging
import math
import os
import random
import re
import sys
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from random import Random
from typing import Any, Literal, TypedDict
from uuid import UUID

import attrs
import falcon
import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import new_app, session_of

from pachinko import Close, Connection, Envelope, Hub, MessageError, Pachinko, message

AMOUNT = int(os.environ.get("PACHINKO_FUZZ_FRAMES", "20000"))
IS_NIGHTLY = "PACHINKO_FUZZ_FRAMES" in os.environ
SEED = int(os.environ.get("PACHINKO_FUZZ_SEED", random.getrandbits(32) if IS_NIGHTLY else 0))
ROUND = 20_000  # frames of one test, which pytest ends after two minutes
LONGEST = 80  # frames of a connection
SHOWN = 1_000  # characters of a frame, where an example has failed

Event = dict[str, Any]  # of ASGI
Json = Any

# ── the app ───────────────────────────────────────────────────────────────────────────────────

SECRET = "the secret"  # in the texts of bugs: no client may see it
TURNS = 5  # of the loop, at most, for which a handler waits
LAST = 3  # items of a stream that ends by itself
BURST = 20  # group messages of one handler


class Level(enum.IntEnum):
    LOW = 1


class Color(enum.Enum):
    RED = "red"


@attrs.frozen
class Item:
    sku: str
    count: int = 1


@message("order")
class Order:
    items: list[Item]
    note: str | None = None
    price: float = 0.0
    counts: dict[str, int] = attrs.field(factory=dict)


@attrs.frozen
class Point:
    x: int
    y: int = 0


@dataclass
class Size:
    width: int
    height: int | None = None


@attrs.frozen
class Tree:
    n: int
    kids: list[Tree] = attrs.field(factory=list)


@attrs.frozen
class Stamps:
    """Types that msgspec reads, of which the model knows no more than that they may be refused."""

    at: datetime | None = None
    day: date | None = None
    clock: time | None = None
    took: timedelta | None = None
    key: UUID | None = None
    raw: bytes | None = None
    color: Color | None = None
    pair: tuple[int, str] | None = None
    several: set[int] | None = None
    words: frozenset[str] | None = None


class Values(TypedDict, total=False):
    """The same for types that only cattrs structures."""

    price: Decimal
    level: Level
    pick: Literal["a", 1]
    by_number: dict[int, str]
    by_day: dict[date, list[Decimal]]
    stamp: datetime | int
    shapes: list[Point | Size] | str
    whatever: object


@message("odd")
class Odd:
    length: int


@attrs.frozen(eq=False)
class Endpoint:
    """An app with one Pachinko."""

    app: Any
    ws: Pachinko
    hub: Hub
    answers_errors: bool
    has_fallback: bool
    has_binary: bool
    waits_always: bool
    asks_who: bool
    limits: dict[str, Any]

    @property
    def max_size(self) -> int:
        return self.limits.get("max_size", 1_048_576)

    @property
    def drops(self) -> bool:
        return self.limits.get("overflow") == "drop_oldest"


def visit_of(conn: Connection) -> Visit:
    visit: Visit = conn.req.scope["state"]["visit"]
    return visit


def endpoint(*with_: str, **limits: Any) -> Endpoint:
    app, hub = new_app(), Hub()
    if "converter" in with_:
        hub.configure(converter=hub.converter.copy())
    ws = Pachinko(app, "/ws", hub=hub, **limits)
    add_life(ws)
    add_handlers(ws, hub)
    add_streams(ws)
    if "who" in with_:
        add_authentication(ws)
    if "middleware" in with_:
        add_middleware(ws)
    if "errors" in with_:
        add_errors(ws)
    if "fallback" in with_:
        add_fallback(ws)
    if "binary" in with_:
        add_binary(ws)
    return Endpoint(
        app, ws, hub, "errors" in with_, "fallback" in with_, "binary" in with_,
        "middleware" in with_, "who" in with_, limits,
    )  # fmt: skip


def add_life(ws: Pachinko) -> None:
    @ws.connect
    async def arrive(conn: Connection) -> None:
        visit = visit_of(conn)
        visit.conn = weakref.ref(conn)
        visit.connects += 1
        await conn.join(visit.group)
        await conn.send("welcome", {})

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        visit = visit_of(conn)
        visit.disconnects += 1
        if (
            conn.groups != {visit.group, *visit.joined}
            or not conn.closed
            or conn.close_code is None
        ):
            visit.wrong.append(f"disconnected with {conn.groups} and {conn.close_code}")


class Todo:
    async def on_add(self, conn: Connection, *, text: str) -> list[str]:
        visit_of(conn).handled["todo.add"] += 1
        return [text]


def add_handlers(ws: Pachinko, hub: Hub) -> None:
    @ws.on("sum")
    async def add(conn: Connection, *, a: int, b: int = 0) -> int:
        visit_of(conn).handled["sum"] += 1
        return a + b

    @ws.on(Order)
    async def order(conn: Connection, order: Order) -> Order:
        visit_of(conn).handled["order"] += 1
        return order

    @ws.on("size")
    async def size(conn: Connection, size: Size) -> Size:
        visit_of(conn).handled["size"] += 1
        return size

    @ws.on("shapes")
    async def shapes(conn: Connection, shapes: list[Point | Size] | str) -> Any:
        visit_of(conn).handled["shapes"] += 1
        return shapes

    @ws.on("tree")
    async def tree(conn: Connection, tree: Tree) -> Tree:
        visit_of(conn).handled["tree"] += 1
        return tree

    @ws.on("any")
    async def any_(conn: Connection, payload: Any) -> Any:
        visit_of(conn).handled["any"] += 1
        return payload

    @ws.on("text")
    async def text(conn: Connection, text: str = "nothing") -> str:
        visit_of(conn).handled["text"] += 1
        return text

    @ws.on("stamps")
    async def stamps(conn: Connection, stamps: Stamps) -> Stamps:
        visit_of(conn).handled["stamps"] += 1
        return stamps

    @ws.on("values")
    async def values(conn: Connection, values: Values) -> Values:
        visit_of(conn).handled["values"] += 1
        return values

    @ws.on("ping")
    async def ping(conn: Connection) -> None:
        visit_of(conn).handled["ping"] += 1

    @ws.on("tags")
    async def tags(conn: Connection, tags: tuple[int, ...] = ()) -> None:
        visit_of(conn).handled["tags"] += 1

    @ws.on("wait")
    async def wait(conn: Connection, *, turns: int = 1) -> int:
        visit_of(conn).handled["wait"] += 1
        for _ in range(turns % TURNS):
            await asyncio.sleep(0)
        return turns

    @ws.on("hold")
    async def hold(conn: Connection, payload: Any = None) -> Any:
        visit_of(conn).handled["hold"] += 1
        await visit_of(conn).hold()
        return payload

    @ws.on("group")
    async def group(conn: Connection, payload: Any = None) -> Any:
        """Leaves a count of cancellations behind in its task, before Python 3.13."""
        visit_of(conn).handled["group"] += 1

        async def fail() -> None:
            await asyncio.sleep(0)
            raise ValueError

        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(fail())
        except* ValueError:
            pass
        return payload

    @ws.on("cancel")
    async def cancel(conn: Connection, payload: Any = None) -> Any:
        """The same on every Python."""
        visit_of(conn).handled["cancel"] += 1
        task: Any = asyncio.current_task()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        return payload

    @ws.on("later", concurrent=True)
    async def later(conn: Connection, *, turns: int, n: Any = None) -> Any:
        for _ in range(turns % TURNS):
            await asyncio.sleep(0)
        return n

    @ws.on("gated", concurrent=True)
    async def gated(conn: Connection, payload: Any = None) -> Any:
        await visit_of(conn).gate.wait()
        return payload

    @ws.on("direct")
    async def direct(conn: Connection, payload: Any = None) -> Any:
        visit_of(conn).handled["direct"] += 1
        await conn.send("said", [payload])
        await conn.send("said", {"again": payload})
        return payload

    @ws.on("shout")
    async def shout(conn: Connection, payload: Any = None) -> Any:
        visit_of(conn).handled["shout"] += 1
        await hub.send(visit_of(conn).group, "shouted", [payload])
        return payload

    @ws.on("burst")
    async def burst(conn: Connection, n: int) -> int:
        visit_of(conn).handled["burst"] += 1
        for i in range(BURST):
            await hub.send(visit_of(conn).group, "shouted", [n, i])
        return n

    @ws.on("join")
    async def join(conn: Connection, *, group: str) -> str:
        visit_of(conn).handled["join"] += 1
        await conn.join(f"{visit_of(conn).group}/{group}")
        visit_of(conn).joined.add(f"{visit_of(conn).group}/{group}")
        return group

    @ws.on("quit")
    async def quit_(conn: Connection, payload: Any = None) -> None:
        visit_of(conn).handled["quit"] += 1
        for n in range(2):
            await hub.send(visit_of(conn).group, "shouted", [n, payload])
        raise Close(4001, "as you wish")

    @ws.on("close")
    async def close(conn: Connection) -> str:
        visit_of(conn).handled["close"] += 1
        await conn.close(4002)
        return "nobody reads this"

    for name, error in RAISED.items():
        add_raising(ws, name, error)
    ws.add_resource("todo", Todo())


class Panic(BaseException):
    """As a library in Rust raises it."""


RAISED: dict[str, Callable[[], BaseException]] = {
    "bug": lambda: RuntimeError(SECRET),
    "stray": lambda: asyncio.CancelledError(SECRET),
    "exit": lambda: SystemExit(SECRET),
    "panic": lambda: Panic(SECRET),
    "refuse": lambda: MessageError("refused", "not now", until=[1, None]),
    "http": lambda: falcon.HTTPForbidden(title="No", description="not yours"),
    "lookup": lambda: KeyError(SECRET),
    "os": lambda: OSError(SECRET),
    "zero": lambda: ZeroDivisionError(SECRET),
}


def add_raising(ws: Pachinko, name: str, error: Callable[[], BaseException]) -> None:
    @ws.on(name)
    async def fail(conn: Connection) -> None:
        visit_of(conn).handled[name] += 1
        raise error()


def add_streams(ws: Pachinko) -> None:
    @ws.on("count")
    async def count(conn: Connection, *, to: int) -> AsyncIterator[int]:
        for n in range(to % (LAST + 1)):
            yield n

    @ws.on("watch")
    async def watch(conn: Connection, payload: Any = None) -> AsyncIterator[int]:
        visit_of(conn).watches += 1
        try:
            yield 0
            await asyncio.Event().wait()
        finally:
            for _ in range(TURNS):
                await asyncio.sleep(0)
            visit_of(conn).watches -= 1

    @ws.on("stubborn")
    async def stubborn(conn: Connection) -> AsyncIterator[int]:
        yield 0
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            yield 1

    @ws.on("broken")
    async def broken(conn: Connection) -> AsyncIterator[int]:
        yield 0
        raise MessageError("broken")

    @ws.on("torn")
    async def torn(conn: Connection) -> AsyncIterator[int]:
        yield 0
        await asyncio.sleep(0)
        raise RuntimeError(SECRET)


USERS = {"good": "ada", "slow": "ada", "other": "bob"}  # by token


def add_authentication(ws: Pachinko) -> None:
    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        if token == "bug":
            raise RuntimeError(SECRET)
        if token == "forbidden":
            raise falcon.HTTPForbidden
        if token == "slow":
            await asyncio.sleep(0)
        return USERS.get(token or "")


def add_middleware(ws: Pachinko) -> None:
    @ws.middleware
    async def outer(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        await asyncio.sleep(0)
        return await call_next()

    @ws.middleware
    async def inner(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        result = await call_next()
        if not isinstance(result, AsyncIterator):
            return result

        async def items() -> AsyncIterator[Any]:
            async for item in result:
                yield item

        return items()


def add_errors(ws: Pachinko) -> None:
    @ws.error(LookupError)
    async def lookup(conn: Connection, exc: LookupError) -> MessageError:
        return MessageError("not_found")

    @ws.error(OSError)
    async def os_error(conn: Connection, exc: OSError) -> str:
        return "instead"

    @ws.error(ZeroDivisionError)
    async def zero(conn: Connection, exc: Exception) -> None:
        raise ValueError(SECRET)


def add_fallback(ws: Pachinko) -> None:
    @ws.fallback
    async def other(conn: Connection, frame: str) -> Odd:
        if len(frame) % 5 == 0:
            raise MessageError("odd_text")
        return Odd(len(frame))


def add_binary(ws: Pachinko) -> None:
    @ws.binary
    async def binary(conn: Connection, data: bytes) -> Odd | None:
        if len(data) % 5 == 0:
            raise RuntimeError(SECRET)
        return Odd(len(data)) if len(data) % 2 else None


RATE = 4  # messages, and then none for longer than any test takes


APPS: dict[str, Callable[[], Endpoint]] = {
    "plain": endpoint,
    "all": lambda: endpoint("middleware", "errors", "fallback", "binary", handler_timeout=3600.0),
    "errors": lambda: endpoint("errors", "binary"),
    "fallback": lambda: endpoint("fallback", "binary"),
    "converter": lambda: endpoint("converter", "binary", max_groups=2),
    "small": lambda: endpoint("binary", max_size=300, max_concurrent=2),
    "who": lambda: endpoint("who", "binary"),
    "drops": lambda: endpoint("binary", outbox=4, overflow="drop_oldest"),
    "evicts": lambda: endpoint("binary", outbox=4),
    "rate": lambda: endpoint("binary", rate=(RATE, 3600.0)),
}

# ── the model: payloads ───────────────────────────────────────────────────────────────────────
#
# For each message type: what its payload must be, and what comes of it. A check returns the value
# as it goes out again, or raises Refused.

MISSING: Any = object()
Check = Callable[[Json], Json]


class Refused(Exception):
    """A payload that does not fit."""


class Doubled(dict[str, Json]):
    """A JSON object that had a key twice."""

    earlier: Sequence[Json] = ()
    """The types in it but for the last."""


def integer(value: Json) -> int:
    if type(value) is not int:
        raise Refused
    return value


def number(value: Json) -> float:
    if type(value) not in (int, float):
        raise Refused
    try:
        return float(value)
    except OverflowError:
        raise Refused from None


def string(value: Json) -> str:
    if type(value) is not str:
        raise Refused
    return value


def null(value: Json) -> None:
    if value is not None:
        raise Refused


def anything(value: Json) -> Json:
    return value


def either(*checks: Check) -> Check:
    def check(value: Json) -> Json:
        for one in checks:
            try:
                return one(value)
            except Refused:
                pass
        raise Refused

    return check


def list_of(check: Check) -> Check:
    def check_list(value: Json) -> Json:
        if type(value) is not list:
            raise Refused
        return [check(item) for item in value]

    return check_list


def object_of(check: Check) -> Check:
    def check_object(value: Json) -> Json:
        if not isinstance(value, dict):
            raise Refused
        return {key: check(item) for key, item in value.items()}

    return check_object


def fields(**checks: Any) -> Check:
    """An object: of each field the check, or a check and the default."""

    def check_fields(value: Json) -> Json:
        if not isinstance(value, dict):
            raise Refused
        found = {}
        for name, wanted in checks.items():
            check, default = wanted if isinstance(wanted, tuple) else (wanted, MISSING)
            if name in value:
                found[name] = check(value[name])
            elif default is MISSING:
                raise Refused
            else:
                found[name] = default
        return found

    return check_fields


def tree(value: Json) -> Json:
    return fields(n=integer, kids=(list_of(tree), []))(value)


def keywords(**checks: Any) -> Check:
    """Keyword-only parameters, for which a missing payload is an empty object."""
    check = fields(**checks)
    return lambda value: check({} if value is MISSING else value)


def whole(check: Check, default: Json = MISSING) -> Check:
    """A payload parameter; where it has no default, a missing payload is a null."""

    def check_whole(value: Json) -> Json:
        if value is not MISSING:
            return check(value)
        return check(None) if default is MISSING else default

    return check_whole


POINT = fields(x=integer, y=(integer, 0))
SIZE = fields(width=integer, height=(either(null, integer), None))
ORDER = fields(
    items=list_of(fields(sku=string, count=(integer, 1))),
    note=(either(null, string), None),
    price=(number, 0.0),
    counts=(object_of(integer), {}),
)

# ── the model: message types ──────────────────────────────────────────────────────────────────


@attrs.frozen
class Route:
    """What comes of a message of one type."""

    payload: Callable[[Random, int], Json]
    """Makes one that fits, mostly with the number in it."""
    takes: Check = anything
    reply: Callable[[Json], Json] | None = None
    """The payload of the reply, from what was taken."""
    reply_type: str = ""
    """Instead of ``<type>.reply``."""
    error: str = ""
    """The code of the error that answers it."""
    is_bug: bool = False
    """And it is logged."""
    pushes: Callable[[Json], Iterable[tuple[str, Json]]] = lambda _: ()
    """What is sent before the answer: types and payloads."""
    to_group: bool = False
    """That goes by way of the hub."""
    is_burst: bool = False
    """And may be more than the outbox of a slow client holds."""
    closes: int = 0
    streams: bool = False
    items: Callable[[Json], Iterable[int]] = lambda _: ()
    is_endless: bool = False
    is_concurrent: bool = False
    waits: bool = False
    """The loop may get a turn before the answer is written."""
    is_known: bool = True
    """Whether the model knows what fits and how it goes out."""

    @property
    def is_spawned(self) -> bool:
        return self.streams or self.is_concurrent


def shapes_of(value: Json) -> Json:
    return either(string, list_of(either(POINT, SIZE)))(value)


def same(value: Json) -> Json:
    return value


def nothing(value: Json) -> None:
    return None


def _number(rng: Random, n: int) -> Json:
    return n


def _order(rng: Random, n: int) -> Json:
    order: dict[str, Json] = {"items": [{"sku": f"s{n}"}, {"sku": "é", "count": rng.randrange(9)}]}
    order["items"] *= rng.randrange(3)
    if rng.random() < 0.5:
        order["note"] = rng.choice([None, "", "a\nb", "\U0001f600"])
    if rng.random() < 0.5:
        order["price"] = rng.choice([0, 1.5, -2, 1e-9, 10**17])
    order["counts"] = {"n": n, "": rng.randrange(3)}
    return order


def _shapes(rng: Random, n: int) -> Json:
    return [{"x": n}, {"width": n}, {"x": 1, "y": -1}, {"width": 2, "height": None}][
        : rng.randrange(5)
    ]


def _tree(rng: Random, n: int) -> Json:
    tree: Json = {"n": n}
    for depth in range(rng.choice([0, 1, 3, 61, 62, 63])):  # 63: 128 levels with the envelope
        tree = {"n": depth, "kids": [tree]}
    return tree


def _any(rng: Random, n: int) -> Json:
    values = [n, {"n": n}, [n, None, True, 1.5], f"{n}é", {"n": [{"": [{}, []]}], "type": "any"}]
    return rng.choice(values)


TEXTS = [
    "", "2026-01-02T03:04:05Z", "2026-01-02T03:04:05.123456789+23:59", "0001-01-01T00:00:00Z",
    "9999-12-31T23:59:59+00:01", "2026-02-30", "2024-02-29", "23:59:60", "03:04:05", "24:00:00",
    "PT90S", "P1DT1H", "P999999999D", "-P1D", "P1W", "PT1e9S", "aGk=", "aGk", "=", "red", "RED",
    "12345678-1234-5678-1234-567812345678", "12345678123456781234567812345678", "1.10", "NaN",
    "-Infinity", "1E+999999", "1E1000000000", "sNaN123", "\uff11", "1_0", " 1", "0x1", "a",
]  # fmt: skip
OTHERS: list[Json] = [
    None, 0, 1, -1, 1.0, 1.5, 1e300, 10**30, True, [], {}, [1], [1, "a"], {"1": "a"}, {"x": 1},
    [{"x": 1}, {"width": 1}, {"x": 1, "width": 1}], {"2026-01-02": [1.5, "1.10", 1]}, {"": ""},
]  # fmt: skip


def _members_of(cls: Any) -> Callable[[Random, int], Json]:
    names = list(cls.__annotations__)

    def make(rng: Random, n: int) -> Json:
        chosen = rng.sample(names, rng.randrange(4))
        return {name: rng.choice(TEXTS if rng.random() < 0.7 else OTHERS) for name in chosen}

    return make


ROUTES: dict[str, Route] = {
    "sum": Route(
        lambda rng, n: {"a": n, "b": rng.choice([0, 1, -5, 2**63, 10**25])},
        keywords(a=integer, b=(integer, 0)),
        lambda value: value["a"] + value["b"],
    ),
    "order": Route(_order, whole(ORDER), same, "order"),
    "size": Route(lambda rng, n: {"width": n, "height": rng.choice([None, n])}, whole(SIZE), same),
    "shapes": Route(_shapes, whole(shapes_of), same),
    "tree": Route(_tree, whole(tree), same),
    "any": Route(_any, whole(anything), same),
    "text": Route(
        lambda rng, n: rng.choice(["", f"{n}", f"{n}\U0001f600"]), whole(string, "nothing"), same
    ),
    "stamps": Route(_members_of(Stamps), whole(fields()), same, is_known=False),
    "values": Route(_members_of(Values), whole(fields()), same, is_known=False),
    "ping": Route(lambda rng, n: rng.choice([n, None, MISSING]), reply=nothing),
    "tags": Route(lambda rng, n: rng.choice([[n, 2], []]), whole(list_of(integer), ()), nothing),
    "wait": Route(
        lambda rng, n: {"turns": n}, keywords(turns=(integer, 1)),
        lambda value: value["turns"], waits=True,
    ),
    "hold": Route(_any, whole(anything, None), same, waits=True),
    "group": Route(_any, whole(anything, None), same, waits=True),
    "cancel": Route(_any, whole(anything, None), same, waits=True),
    "later": Route(
        lambda rng, n: {"turns": rng.randrange(TURNS), "n": n},
        keywords(turns=integer, n=(anything, None)),
        lambda value: value["n"], is_concurrent=True,
    ),
    "gated": Route(_any, whole(anything, None), same, is_concurrent=True, is_endless=True),
    "direct": Route(
        _any, whole(anything, None), same, waits=True,
        pushes=lambda value: [("said", [value]), ("said", {"again": value})],
    ),
    "shout": Route(
        _any, whole(anything, None), same, waits=True,
        pushes=lambda value: [("shouted", [value])], to_group=True,
    ),
    "burst": Route(
        _number, whole(integer), same, waits=True, to_group=True, is_burst=True,
        pushes=lambda n: [("shouted", [n, i]) for i in range(BURST)],
    ),
    "join": Route(
        lambda rng, n: {"group": f"g{rng.randrange(6)}"}, keywords(group=string),
        lambda value: value["group"],
    ),
    "todo.add": Route(
        lambda rng, n: {"text": f"{n}"}, keywords(text=string), lambda value: [value["text"]]
    ),
    "bug": Route(_any, error="internal_error", is_bug=True),
    "stray": Route(_any, error="internal_error", is_bug=True),
    "exit": Route(_any, error="internal_error", is_bug=True),
    "panic": Route(_any, error="internal_error", is_bug=True),
    "refuse": Route(_any, error="refused"),
    "http": Route(_any, error="http_403"),
    "lookup": Route(_any, error="internal_error", is_bug=True),
    "os": Route(_any, error="internal_error", is_bug=True),
    "zero": Route(_any, error="internal_error", is_bug=True),
    "count": Route(
        lambda rng, n: {"to": rng.randrange(9)}, keywords(to=integer), streams=True,
        items=lambda value: range(value["to"] % (LAST + 1)),
    ),
    "watch": Route(_any, streams=True, is_endless=True, items=lambda _: [0]),
    "stubborn": Route(_any, streams=True, is_endless=True, items=lambda _: [0]),
    "broken": Route(_any, streams=True, error="broken", items=lambda _: [0]),
    "torn": Route(_any, streams=True, error="internal_error", is_bug=True, items=lambda _: [0]),
    "quit": Route(
        _any, whole(anything, None), closes=4001, to_group=True,
        pushes=lambda value: [("shouted", [0, value]), ("shouted", [1, value])],
    ),
    "close": Route(_any, closes=4002),
}  # fmt: skip
ANSWERED: dict[str, Route] = {  # where there are error handlers
    "lookup": attrs.evolve(ROUTES["lookup"], error="not_found", is_bug=False),
    "os": attrs.evolve(ROUTES["os"], error="", is_bug=False, reply=lambda _: "instead"),
}

# ── the model: frames ─────────────────────────────────────────────────────────────────────────
#
# What a client is sent is compared by labels, such as ("reply", "7", "sum.reply", "3"): ids and
# payloads as JSON, "" for none.

Label = tuple[str, str, str, str]
UNKNOWN = "?"  # for a payload that the model does not know
UNKNOWN_REPLIES = {f"{type}.reply" for type, route in ROUTES.items() if not route.is_known}
MAX_DEPTH = 128


def canonical(value: Json) -> str:
    return "" if value is None else json.dumps(value, sort_keys=True)


def error(id: str, code: str) -> Label:
    return ("error", id, code, "")


def pushed(type: str, payload: Json, group: str = "") -> Label:
    return ("push", group, type, canonical(payload))


@attrs.define
class Reading:
    """What the standard library makes of a text frame."""

    code: str = ""
    """Why it is no envelope."""
    type: Json = None
    id: str = ""
    payload: Json = MISSING
    is_doubled: bool = False
    """A key of an object in it was there twice, and the first may have to fit as well."""
    earlier: Sequence[Json] = ()
    """Types that were there before the last."""
    is_beyond: bool = False
    """A number in it is out of range, which may not be noticed where it is not read."""

    @property
    def is_vague(self) -> bool:
        return self.is_doubled or self.is_beyond


def answers(type: Json) -> bool:
    """Whether a message of this type answers the server, which has asked nothing."""
    return type == "error" or (isinstance(type, str) and type.endswith(".reply"))


class NotJson(ValueError):
    """What the standard library takes for JSON all the same."""


LONE = re.compile(r"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]")


def read(text: str) -> Reading:
    reading = Reading()

    def members(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        reading.is_doubled = True
        doubled = Doubled(found)
        doubled.earlier = [value for key, value in pairs if key == "type"][:-1]
        return doubled

    def number_of(digits: str) -> float | int:
        value: float | int = math.inf
        if digits.lstrip("-").isdigit():
            if len(digits) <= 4300:  # Python's own limit for the digits of an int
                return int(digits)
        else:
            value = float(digits)
        reading.is_beyond |= math.isinf(value)
        return value

    def refuse(constant: str) -> Json:
        raise NotJson(constant)

    try:
        if depth_of(text) > MAX_DEPTH or LONE.search(text.replace(r"\\", "--")):
            raise NotJson(text)
        text.encode()
        value = json.loads(
            text, object_pairs_hook=members, parse_int=number_of, parse_float=number_of,
            parse_constant=refuse,
        )  # fmt: skip
    except ValueError:
        return Reading("invalid_json", id=id_in(text))
    if not isinstance(value, dict):
        reading.code = "invalid_envelope"
        return reading
    id_ = value.get("id")
    is_usable = type(id_) in (str, int)
    reading.id = json.dumps(id_) if is_usable else ""
    reading.type = value.get("type")
    reading.payload = value.get("payload", MISSING)
    reading.earlier = value.earlier if isinstance(value, Doubled) else ()
    if type(reading.type) is not str or not (is_usable or id_ is None):
        reading.code = "invalid_envelope"
    return reading


def id_in(text: str) -> str:
    """The id of an object that is no JSON, character by character, as JSON; "" for none."""
    depth = at = 0
    found = ""
    while at < len(text) and text.lstrip().startswith("{"):
        end = at + 1
        if text[at] == '"':
            end = end_of_string(text, at)
            colon = re.match(r"\s*:\s*", text[end:])
            if depth == 1 and colon and text[at:end].replace(r"\u0069", "i") in ID_KEYS:
                start = stop = end + colon.end()
                if text[start : start + 1] == '"':
                    stop = end_of_string(text, start)
                elif number := re.match(r"-?[0-9]+", text[start:]):
                    stop = start + number.end()
                is_whole = stop > start and re.match(r"\s*[,}]", text[stop:])
                found, end = (text[start:stop], stop) if is_whole else ("", end)
        depth += (text[at] in "[{") - (text[at] in "]}")
        if depth <= 0 and text[at] in "]}":
            break
        at = end
    try:
        found.encode()
        value = json.loads(found)
        return json.dumps(value) if LONE.search(found.replace(r"\\", "--")) is None else ""
    except ValueError:
        return ""


ID_KEYS = {'"id"', r'"i\u0064"'}


def end_of_string(text: str, at: int) -> int:
    """The place behind the string that begins at *at*, or behind the text."""
    end = at + 1
    while text[end : end + 1] not in ('"', ""):
        end += 2 if text[end] == "\\" else 1
    return end + 1


def depth_of(text: str) -> int:
    """How deep arrays and objects nest in *text*, if it is JSON."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return 0
    depth = deepest = 0
    in_string = is_escaped = False
    for character in text:
        if in_string:
            in_string = is_escaped or character != '"'
            is_escaped = character == "\\" and not is_escaped
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


@attrs.define
class Expected:
    """What must come of one frame."""

    finals: set[Label | None] = attrs.Factory(set)
    """Each would be right; None is no answer."""
    pushes: list[Label] = attrs.Factory(list)
    """Sent before it."""
    may_drop: bool = False
    """Its pushes may be dropped, for a gap."""
    handled: str = ""
    """The type whose handler runs, or may run where there are several answers."""
    bugs: int = 0
    """Errors that are, or may be, logged."""
    closes: int = 0
    is_spawned: bool = False
    """Answered beside the others, and not at all once the connection is over."""
    waits: bool = False
    items: list[str] | None = None
    """Of a stream, as JSON."""
    is_uncertain: bool = False

    @property
    def is_certain(self) -> bool:
        return len(self.finals) == 1 and not self.is_uncertain


Frame = tuple[Event, Reading | None]


def size_of(event: Event) -> int:
    text = event.get("text")
    return len(event["bytes"] if text is None else text.encode("utf-8", "surrogatepass"))


class Model:
    """What must come of the frames of one connection, in order."""

    def __init__(
        self, app: Endpoint, events: Sequence[Event], group: str, scenario: Scenario
    ) -> None:
        self.app = app
        self.group = group
        self.may_evict = "outbox" in app.limits and not app.drops and any(scenario.reading)
        self.readings = [
            read(event["text"]) if event.get("text") is not None else None for event in events
        ]
        self.completed = {r.id for r in self.readings if r and not r.code and r.type == "complete"}
        self.spawned = 0
        self.streams: dict[str, list[Expected]] = {}  # by id
        self.stopped: set[str] = set()  # ids of streams that a later frame stops
        self.running: set[str] = set()  # ids of streams, and concurrent handlers, that go on
        # Whether all of these are known.
        self.is_exact = scenario.arrival == "lockstep" and not app.asks_who
        self.counted = 0  # by the rate limit
        self.may_be_over = False  # what follows may be handled, or not
        self.close_code: int = 0
        self.groups: set[str] = set()  # that it has joined
        self.knows_groups = True
        self.user: str | None = ""
        self.is_in: bool | None = True  # whether it is connected; None where that is not known
        self.greeting: list[Label] = []
        self.expected: list[Expected] = []
        self.by_event: dict[int, Expected] = {}
        frames = [*zip(events, self.readings, strict=True)]
        if app.asks_who:
            frames = self.enter(frames, scenario.end == "stay")
        if self.is_in:
            self.greeting.append(pushed("welcome", {}))
        for event, reading in frames:
            expected = self.expect(event, reading)
            self.by_event[id(event)] = expected
            if self.may_be_over:
                expected.is_uncertain = True
                ids = {"", reading.id if reading else ""}
                expected.finals |= {None, *(error(id, "rate_limited") for id in ids)}
            self.expected.append(expected)
            # What follows may overtake a handler that waits, or whose answer waits for the client.
            is_held = any(scenario.reading) or any(each.waits for each in self.expected)
            if expected.closes and expected.is_certain and not is_held:
                self.close_code = expected.closes
                break
            self.may_be_over |= bool(expected.closes)
            if expected.closes == 1008 and is_held:
                for each in self.expected:  # They were held, and are dropped.
                    each.finals.add(None)
        for several in self.streams.values():
            if "rate" in app.limits and len(several) > 1:  # see `to_stop`
                for expected in several:
                    expected.finals.add(None)
        if self.close_code or self.may_be_over:
            for expected in self.expected:
                if expected.is_spawned:
                    expected.finals.add(None)

    def to_stop(self, texts: Sequence[str]) -> list[str]:
        """The ids of streams that a client who was sent *texts* stops at the end."""
        if "rate" not in self.app.limits:
            return [*self.streams]
        ended = {id for kind, id, *_ in Transcript(texts).labels if kind != "push"}
        return [id for id, several in self.streams.items() if id not in ended and len(several) == 1]

    @property
    def close_codes(self) -> set[int]:
        return {expected.closes for expected in self.expected} - {0}

    def enter(self, frames: list[Frame], is_patient: bool) -> list[Frame]:
        """Say who the client is; return the frames that are handled then."""
        size = 0
        for index, (event, reading) in enumerate(frames):
            size += size_of(event)
            if size > self.app.max_size:
                return self.stay_out(1009)
            if reading is not None and not reading.code and reading.type == "authenticate":
                others = [*frames[:index], *frames[index + 1 :]]
                return others if self.enter_with(reading, is_patient) else self.stay_out()
            if index == READ_AHEAD:
                return self.stay_out(3401)
        return self.stay_out(0)

    def stay_out(self, code: int | None = None) -> list[Frame]:
        self.is_in = False
        self.close_code = self.close_code if code is None else code
        return []

    def enter_with(self, reading: Reading, is_patient: bool) -> bool:
        payload = reading.payload if isinstance(reading.payload, dict) else {}
        token = payload.get("token") if type(payload.get("token")) is str else ""
        reply = {("reply", reading.id, "authenticate.reply", "") if reading.id else None}
        if reading.is_vague or (token == "slow" and not is_patient):
            self.expected.append(Expected({None, *reply}, bugs=1, closes=3401, is_uncertain=True))
            self.may_be_over, self.is_in = True, None
            self.user = None if reading.is_vague else USERS[token]
            return True
        self.close_code = {"bug": 3500, "forbidden": 3403}.get(token, 3401)
        self.expected += [Expected({None}, bugs=1)] if token == "bug" else []
        self.user = USERS.get(token, "")
        if self.user:
            self.close_code = 0
            self.greeting += [label for label in reply if label is not None]
        return bool(self.user)

    def again(self, reading: Reading) -> Expected:
        """What comes of a later ``authenticate``."""
        try:
            token = keywords(token=string)(reading.payload)["token"]
        except Refused:
            return Expected({error(reading.id, "invalid_payload")})
        waits = token == "slow"
        if token == "bug":
            return Expected({error(reading.id, "internal_error")}, bugs=1)
        if token == "forbidden":
            return Expected({None}, closes=3403)
        reply = ("reply", reading.id, "authenticate.reply", "") if reading.id else None
        if self.user is None:
            return Expected({reply, None}, closes=3401, is_uncertain=True)
        if USERS.get(token) != self.user:
            return Expected({None}, closes=3401, waits=waits)
        return Expected({reply}, waits=waits)

    def expect(self, event: Event, reading: Reading | None) -> Expected:
        text = event.get("text")
        if size_of(event) > self.app.max_size:
            return Expected({None}, closes=1009)
        if reading is None:
            if not self.app.has_binary:
                return Expected({None}, closes=1003)
            return self.limited({""}) or self.binary(event["bytes"])
        if reading.type == "complete" and not reading.code and not reading.is_vague:
            return self.complete(reading.id)
        if answers(reading.type) and not reading.code and not reading.is_vague:
            return Expected({None})
        if reading.is_vague and any(map(answers, (reading.type, *reading.earlier))):
            self.may_be_over = True  # It may count for the rate, or not.
        is_vague = reading.is_beyond or reading.type == "complete"
        return self.limited({reading.id, ""} if is_vague else {reading.id}) or self.frame(
            text, reading
        )

    def limited(self, ids: set[str]) -> Expected | None:
        """What comes of a message that is one too many."""
        if "rate" not in self.app.limits:
            return None
        self.counted += 1
        if self.counted <= RATE:
            return None
        if self.counted > RATE + 10 * RATE:
            return Expected({None}, closes=1008)
        return Expected({error(id, "rate_limited") for id in ids}, is_spawned=True)

    def complete(self, id: str) -> Expected:
        """It is counted if it stops no stream; what is one too many is answered without an id."""
        expected = Expected({None})
        if id not in (self.running if self.is_exact else self.streams):
            expected = self.limited({""}) or expected
        elif not self.is_exact and "rate" in self.app.limits:  # it may have ended by itself
            self.may_be_over = True
            expected.finals.add(error("", "rate_limited"))
        if id in self.streams:
            self.stopped.add(id)
        self.running.discard(id)
        return expected

    def binary(self, data: bytes) -> Expected:
        if len(data) % 5 == 0:
            return Expected({error("", "internal_error")}, bugs=1)
        return Expected({None}, [pushed("odd", {"length": len(data)})] if len(data) % 2 else [])

    def unhandled(self, text: str, answer: Label) -> Expected:
        if not self.app.has_fallback:
            return Expected({answer})
        if len(text) % 5 == 0:
            return Expected({error("", "odd_text")})
        return Expected({pushed("odd", {"length": len(text)})})

    def frame(self, text: str, reading: Reading) -> Expected:
        if reading.code:
            expected = self.unhandled(text, error(reading.id, reading.code))
        else:
            expected = self.message(text, reading)
        if reading.is_vague:
            self.knows_groups &= reading.type != "join"
            self.is_exact &= not expected.is_spawned and reading.type != "complete"
            expected.is_uncertain = True
            if reading.is_beyond:
                bad = error(reading.id, "invalid_json")
                expected.finals |= self.unhandled(text, bad).finals
            if reading.is_doubled:
                bad = error(reading.id, "invalid_envelope")
                expected.finals |= {bad} | self.unhandled(text, bad).finals
            if not reading.code and (reading.type in ROUTES or reading.type == "authenticate"):
                expected.finals.add(error(reading.id, "invalid_payload"))
        return expected

    def message(self, text: str, reading: Reading) -> Expected:
        type, id = reading.type, reading.id
        if type == "complete" or answers(type):
            return Expected({None})
        if type == "$ping":
            return Expected({("reply", id, "$pong", "")}, is_spawned=True)
        if type == "resume":
            return Expected({("reply", id, "resume.reply", "") if id else None}, is_spawned=True)
        if type not in ROUTES and not (type == "authenticate" and self.app.asks_who):
            return self.unhandled(text, error(id, "unknown_type"))
        if any(other != type for other in reading.earlier):
            codes = ("invalid_envelope", "invalid_payload")
            return Expected({error(id, code) for code in codes})
        if type == "authenticate":
            return self.again(reading)
        route = ROUTES[type]
        if self.app.answers_errors:
            route = ANSWERED.get(type, route)
        expected = Expected(is_spawned=route.is_spawned, waits=route.waits or self.app.waits_always)
        try:
            value = route.takes(reading.payload)
        except Refused:
            expected.finals = {error(id, "invalid_payload")}
        else:
            self.handled(expected, type, route, id, value)
        if route.is_spawned:
            self.spawn(expected, route, id)
        return expected

    def handled(self, expected: Expected, type: str, route: Route, id: str, value: Json) -> None:
        expected.handled = "" if route.is_spawned else type
        expected.bugs = int(route.is_bug)
        expected.closes = route.closes
        group = self.group if route.to_group else ""
        expected.pushes = [pushed(*push, group=group) for push in route.pushes(value)]
        expected.may_drop = route.to_group and self.app.drops
        if route.is_burst and self.may_evict:
            expected.closes, expected.is_uncertain = 1013, True
        if route.error:
            expected.finals = {error(id, route.error)}
        elif route.streams:
            expected.finals = {("complete", id, "", "")}
        elif route.closes:
            expected.finals = {None}
        else:
            assert route.reply is not None
            payload = route.reply(value)
            reply = route.reply_type or f"{type}.reply"
            shown = canonical(payload) if route.is_known else UNKNOWN
            answered = bool(id) or payload is not None
            expected.finals = {("reply", id, reply, shown) if answered else None}
            if expected.closes:
                expected.finals.add(None)
        if type == "join":
            self.join(expected, id, value["group"])
        if not route.is_known:
            expected.finals.add(error(id, "invalid_payload"))
        if route.streams:
            expected.items = [canonical(item) for item in route.items(value)]

    def join(self, expected: Expected, id: str, group: str) -> None:
        refusal = error(id, "too_many_groups")
        if not self.knows_groups:
            expected.finals.add(refusal)
        elif len(self.groups - {group}) + 2 > self.app.limits.get("max_groups", 1000):
            expected.finals = {refusal} if group not in self.groups else expected.finals
        else:
            self.groups.add(group)

    def spawn(self, expected: Expected, route: Route, id: str) -> None:
        """What may come of streams and concurrent handlers besides."""
        limit = self.app.limits.get("max_concurrent", 16)
        refusals = set()
        if route.streams and not id:
            refusals.add(error("", "id_required"))
        elif self.is_exact:
            if route.streams and id in self.running:
                refusals.add(error("", "id_in_use"))
            elif len(self.running) >= limit:
                refusals.add(error(id, "too_busy"))
            elif route.is_endless:
                self.running.add(id if route.streams else f"handler {self.spawned}")
        else:
            if route.streams and id in self.streams:
                expected.finals.add(error("", "id_in_use"))
            if self.spawned >= limit:
                expected.finals.add(error(id, "too_busy"))
        if refusals and expected.items is None:  # the payload may be looked at first, or not
            expected.finals |= refusals
        elif refusals:
            expected.finals, expected.items, expected.bugs = refusals, None, 0
        elif route.streams and id in self.completed and (route.is_endless or not self.is_exact):
            expected.finals.add(("complete", id, "", ""))
        self.spawned += 1
        if id and route.streams:
            self.streams.setdefault(id, []).append(expected)


# ── the frames ────────────────────────────────────────────────────────────────────────────────

ODD = [  # JSON or nearly, in places where something else was expected
    "null", "true", "false", "0", "-0", "1.0", "-0.0", "1e2", "1E+2", "1e999", "-1E400", "1e-400",
    "9007199254740993", "18446744073709551616", "-9223372036854775809", "1" * 40, "1" * 5000,
    "NaN", "Infinity", "-Infinity", "01", "+1", ".5", "1.", "1e", "-", "0x10", "1_000", "undefined",
    '""', '"x"', r'"\u0000"', r'"\ud83d\ude00"', r'"\ud800"', r'"\udc00"', r'"\ud800\u0041"',
    r'"\\ud800"', r'"\q"', r'"\u12"', r'"\/"', '"é"', '"\U0010ffff"', '"\x7f"', '"\u2028"',
    '"\x00"', '"\t"', '"\ud800"', "'x'", '"x', "[]", "{}", "[[]]", '{"":null}', "[1,]", '{"a":1,}',
    '{"a":1,"a":2}', '{"type":"ping","id":1}', "[" * 40 + "]" * 40, "1 2", "/**/1", "",
]  # fmt: skip
ODD_IDS = ["null", "true", "1.0", "1e2", "[]", "{}", '""', "-0", '"\\u0000"', '"\U0001f600"', "NaN"]
RESERVED = [
    "error",
    "complete",
    "$ping",
    "gap",
    "resume",
    "authenticate",
    "$none",
    "$x",
    "sum.reply",
]
NAMES = ["", "nobody", "Sum", "sum ", "on_add", "add", "__class__", "todo", "todo.", "todo.on_add"]
RAW = [
    "", " ", "x", "{", "}", "{}", "[]", "null", "5", '"sum"', "\ufeff{}", '\ufeff{"type":"ping"}',
    '{"type"}', '{"type":}', '{"type":"ping"} x', '{"type":"ping"}{"type":"ping"}', "\x00",
    '{"type":"ping"}\x00', "{'type':'ping'}", '{"type":"ping",}', '["type","ping"]', "\ud800",
    '\n{ "type"\t:\r"ping" , "id" : 0 } \n', '{"type":"p\\u0069ng","\\u0069d":"p"}', '{"id":1}',
]  # fmt: skip
ALPHABET = '{}[]:,"\\ \n\t0123456789eE+-.truefalsn_$\x00\x7fé\u2028\U0001f600\ud800\ufeff'
SPACES = ["", "", "", " ", "\n", "\t \r"]
ODD_PLACE = "\ue000odd\ue000"  # stands for a text from ODD until the frame is written


class Frames:
    """Makes the events of one client, each from a number and what was made before."""

    def __init__(self, scenario: Scenario, first: int) -> None:
        self.base = scenario.base
        self.next = first
        self.has_own_ids = scenario.has_own_ids
        self.kinds = STREAMING if scenario.is_streaming else KINDS
        self.asks_who = scenario.app == "who"
        self.types = TYPES + (["burst"] * 8 if scenario.app in ("drops", "evicts") else [])
        self.ids: list[str] = ["0"]  # that a complete may name
        self.completed = "0"  # and the last that did
        self.texts: list[str] = ['{"type":"ping","id":0}']

    def make(self, number: int) -> Event:
        rng = Random(number << 32 | self.base)
        kind = self.kinds[number % len(self.kinds)]
        if self.asks_who and rng.random() < (0.15 if len(self.texts) < READ_AHEAD + 4 else 0.1):
            kind = Frames.authenticating
        made = kind(self, rng)
        self.next += 1
        if isinstance(made, bytes):
            return rng.choice([{"text": None, "bytes": made}, {"bytes": made}])
        self.texts.append(made)
        return rng.choice([{"text": made}, {"text": made, "bytes": None}])

    def id(self, rng: Random) -> str:
        """An id as JSON, its own or one of few."""
        if not self.has_own_ids and rng.random() < 0.8:
            self.ids.append(str(rng.randrange(4)))
            return self.ids[-1]
        n = self.next
        made = rng.choice([str(n), str(n), str(n), f"-{n + 1}", str(10**30 + n), f'"é{n}"'])
        self.ids.append(made)
        return made

    def message(self, rng: Random) -> str:
        """A message that is as it should be."""
        return self.envelope(rng, rng.choice(self.types))

    def stream(self, rng: Random) -> str:
        return self.envelope(rng, rng.choice(STREAMS))

    def no_id(self, rng: Random) -> str:
        return self.write(
            rng, [m for m in self.members(rng, rng.choice(self.types)) if m[0] != "id"]
        )

    def envelope(self, rng: Random, type: str) -> str:
        return self.write(rng, self.members(rng, type))

    def members(self, rng: Random, type: str) -> list[tuple[str, str]]:
        payload = ROUTES[type].payload(rng, self.next)
        members = [("type", json.dumps(type)), ("id", self.id(rng))]
        if payload is not MISSING:
            members.append(("payload", self.json(rng, payload)))
        return members

    def misfit(self, rng: Random) -> str:
        """A message with something odd in its payload."""
        type = rng.choice(self.types)
        payload = ROUTES[type].payload(rng, self.next)
        text = self.json(rng, self.with_odd_place(rng, payload))
        text = text.replace(json.dumps(ODD_PLACE), rng.choice(ODD)).replace(
            f'"{ODD_PLACE}"', rng.choice(ODD)
        )
        return self.write(
            rng, [("type", json.dumps(type)), ("id", self.id(rng)), ("payload", text)]
        )

    def with_odd_place(self, rng: Random, value: Json) -> Json:
        if isinstance(value, dict) and value and rng.random() < 0.8:
            key = rng.choice([*value])
            kept = {k: v for k, v in value.items() if k != key or rng.random() < 0.9}
            if rng.random() < 0.1:
                return {**kept, "more": ODD_PLACE}
            return {**kept, key: self.with_odd_place(rng, value[key])} if key in kept else kept
        if isinstance(value, list) and value and rng.random() < 0.8:
            index = rng.randrange(len(value))
            return [*value[:index], self.with_odd_place(rng, value[index]), *value[index + 1 :]]
        return ODD_PLACE

    def odd_envelope(self, rng: Random) -> str:
        """One whose type, id or keys are odd."""
        members = self.members(rng, rng.choice(self.types))
        for _ in range(rng.choice([1, 1, 1, 2])):
            index = rng.randrange(len(members))
            key = members[index][0]
            odd = rng.choice(ODD if key != "id" else ODD_IDS)
            if key == "type" and rng.random() < 0.7:
                odd = json.dumps(rng.choice([*RESERVED, *NAMES, *TYPES]))
            change = rng.randrange(5)
            if change == 0 and len(members) > 1:
                del members[index]
            elif change == 1:
                members.insert(rng.randrange(len(members) + 1), (key, odd))
            elif change == 2:
                members.insert(0, (rng.choice(["", "more", "Type", "é", "idd"]), rng.choice(ODD)))
            else:
                members[index] = (key, odd)
        return self.write(rng, members)

    def mutated(self, rng: Random) -> str:
        """A message in which characters have been changed, or half of another one."""
        text = rng.choice(self.texts) if rng.random() < 0.3 else self.message(rng)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            start = rng.randrange(len(text) + 1)
            end = min(len(text), start + rng.choice([1, 1, 2, 8]))
            piece, odd = text[start:end], rng.choice(ALPHABET)
            change = rng.randrange(7)
            if change == 0:
                piece = ""
            elif change == 1:
                piece *= 2
            elif change == 2:
                piece = piece[::-1]
            elif change == 3:
                piece += odd
            elif change == 4:
                piece = odd
            elif change == 5:
                other = rng.choice(self.texts)
                piece, end = other[rng.randrange(len(other) + 1) :], len(text)
            else:
                end = len(text)
            text = text[:start] + piece + text[end:]
        return text[:20_000]

    def raw(self, rng: Random) -> str:
        if rng.random() < 0.7:
            return rng.choice(RAW)
        return "".join(rng.choices(ALPHABET, k=rng.randrange(20)))

    def deep(self, rng: Random) -> str:
        """A payload whose depth, with the envelope's, is around the limit."""
        depth = rng.choice([1, 126, 127, 127, 128, 129, 200, 1000, 3000])
        opening, closing, inside = rng.choice(
            [("[", "]", ""), ('{"":', "}", "[]"), ('{"kids":[', '],"n":1}', ""), ("[[],", "]", "0")]
        )
        text = opening * depth + inside + closing * depth
        change = rng.randrange(8)
        if change == 0:
            text = json.dumps(text)  # brackets in a string are not deep
        elif change == 1:
            text = text[: rng.randrange(len(text))]
        elif change == 2:
            return text
        type = rng.choice(["any", "any", "tree", "ping", "nobody", "watch", "complete"])
        members = [("type", json.dumps(type)), ("id", self.id(rng))]
        members.append((rng.choice(["payload", "payload", "more"]), text))
        return self.write(rng, members)

    def long(self, rng: Random) -> str:
        """A frame of about as many bytes as the small app takes."""
        size = rng.choice([299, 300, 300, 301, 900])
        filling = rng.choice(["x", "é", "\U0001f600"])
        members = [("type", '"any"'), ("id", self.id(rng)), ("payload", '""')]
        if rng.random() < 0.5:
            members[:2] = [("type", '"complete"'), ("id", rng.choice(self.ids[-8:]))]
        text = self.write(rng, members)
        room = size - len(text.encode("utf-8", "surrogatepass"))
        filled = filling * (room // len(filling.encode()))
        filled += "." * (room - len(filled.encode()))
        return text.replace('""', f'"{filled}"', 1)

    def complete(self, rng: Random) -> str:
        if rng.random() < 0.7:  # else the same once more
            self.completed = rng.choice([*self.ids[-6:], rng.choice(ODD_IDS)])
        return self.write(rng, [("type", '"complete"'), ("id", self.completed)])

    def authenticating(self, rng: Random) -> str:
        token = rng.choice(
            ["good"] * 6 + ["slow", "other", "other", "bug", "forbidden", "bad", None]
        )
        members = [("type", '"authenticate"'), ("payload", self.json(rng, {"token": token}))]
        return self.write(rng, [*members, ("id", self.id(rng))] if rng.random() < 0.7 else members)

    def holding(self, rng: Random) -> str:
        return self.envelope(rng, rng.choice(["hold", "wait"]))

    def binary(self, rng: Random) -> bytes:
        return rng.randbytes(rng.choice([0, 1, 2, 3, 5, 301]))

    def closing(self, rng: Random) -> str:
        return self.envelope(rng, rng.choice(["quit", "close"]))

    def json(self, rng: Random, value: Json) -> str:
        if isinstance(value, dict) and len(value) > 1 and rng.random() < 0.2:
            value = dict(rng.sample([*value.items()], len(value)))
        separators = rng.choice([(",", ":"), (",", ":"), (", ", ": "), (" ,\n", " :\t")])
        return json.dumps(value, ensure_ascii=rng.random() < 0.5, separators=separators)

    def write(self, rng: Random, members: list[tuple[str, str]]) -> str:
        if rng.random() < 0.2:
            members = rng.sample(members, len(members))
        space = rng.choice(SPACES)
        return (
            space
            + "{"
            + f"{space},{space}".join(f'"{key}"{space}:{space}{text}' for key, text in members)
            + "}"
            + space
        )


STREAMS = [type for type, route in ROUTES.items() if route.streams]
TYPES = [type for type, route in ROUTES.items() if not route.closes] + ["hold"] * 3 + ["join"] * 2
Kind = Callable[[Frames, Random], str | bytes]
KINDS: list[Kind] = [
    *[Frames.message] * 40,
    *[Frames.no_id] * 8,
    *[Frames.misfit] * 40,
    *[Frames.odd_envelope] * 30,
    *[Frames.mutated] * 50,
    *[Frames.raw] * 8,
    *[Frames.deep] * 4,
    *[Frames.long] * 5,
    *[Frames.stream] * 14,
    *[Frames.complete] * 14,
    *[Frames.binary] * 2,
    Frames.closing,
]
STREAMING: list[Kind] = [
    *[Frames.stream] * 6,
    *[Frames.complete] * 6,
    *[Frames.holding] * 3,
    *[Frames.message] * 2,
]

# ── the client and its server ─────────────────────────────────────────────────────────────────

END = {"type": "websocket.disconnect"}
READ_AHEAD = 8  # frames


@attrs.frozen
class Scenario:
    """An example, as Hypothesis chooses it."""

    app: str
    numbers: tuple[int, ...]
    """Of which the frames are made."""
    others: tuple[int, ...] = ()
    """The same for a second client beside the first."""
    base: int = 0
    """Makes other frames of the same numbers."""
    has_own_ids: bool = True
    is_streaming: bool = False
    """Whether most of the frames start and stop streams, or hold up others."""
    arrival: str = "backlog"
    """At once; ``paced``: `receive` always waits; ``lockstep``: each frame behind all that came of
    the one before; or ``held``: the same, but that handlers which wait go on with every fourth."""
    reading: tuple[int, ...] = (0,)
    """For how many turns of the loop each send waits, over and over."""
    end: str = "stay"
    after: int = 0
    """Turns of the loop, or sends, before an end that comes from elsewhere."""
    is_silent: bool = False
    """Whether the server has no word for the app once that has closed."""


class Visit:
    """One connection, as the server has it."""

    def __init__(self, number: int, scenario: Scenario, events: list[Event]) -> None:
        self.group = f"room:{number}"
        self.scenario = scenario
        self.events = [{"type": "websocket.receive", **event} for event in events]
        self.scope = {
            "type": "websocket",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "path": "/ws",
            "query_string": b"",
            "headers": [(b"host", b"localhost")],
            "state": {"visit": self},
        }
        self.coming = collections.deque([{"type": "websocket.connect"}])
        self.arrival: asyncio.Future[None] | None = None
        self.waits = itertools.cycle(scenario.reading)
        self.is_receiving = self.is_sending = self.has_left = False
        self.taken = 0  # frames
        self.sent: list[str] = []
        self.before_end = 0  # messages
        self.close_code = 0  # that the app has closed with
        self.wrong: list[str] = []
        # For the handlers
        self.conn: Callable[[], object] = lambda: None
        self.handled: Counter[str] = Counter()
        self.connects = self.disconnects = 0
        self.joined: set[str] = set()
        self.watches = 0  # that have not come to the end of their cleaning up
        self.gate = asyncio.Event()
        self.held: asyncio.Future[None] | None = None

    async def receive(self) -> Event:
        if self.is_receiving or self.has_left:
            self.wrong.append("a receive during another one, or behind the disconnect")
        self.is_receiving = True
        try:
            if self.scenario.arrival == "paced":
                await asyncio.sleep(0)
            while not self.coming:
                self.arrival = asyncio.get_running_loop().create_future()
                await self.arrival
            event = self.coming.popleft()
        finally:
            self.is_receiving = False
        self.taken += event["type"] == "websocket.receive"
        self.has_left = event["type"] == "websocket.disconnect"
        return event

    async def send(self, event: Event) -> None:
        if self.is_sending or self.close_code:
            self.wrong.append(f"{event} during another send, or behind the close")
        self.is_sending = True
        try:
            for _ in range(next(self.waits)):
                await asyncio.sleep(0)
            if self.scenario.end == "lost" and len(self.sent) > self.scenario.after:
                raise ConnectionResetError
            if event["type"] == "websocket.send":
                self.sent.append(event["text"])
            elif event["type"] == "websocket.close":
                self.close_code = event["code"]
                if not self.scenario.is_silent:
                    self.arrive(END)
        finally:
            self.is_sending = False

    def arrive(self, *events: Event) -> None:
        self.coming.extend(events)
        if self.arrival is not None and not self.arrival.done():
            self.arrival.set_result(None)

    async def hold(self) -> None:
        """Wait until nothing else goes on."""
        self.held = asyncio.get_running_loop().create_future()
        await self.held

    def release(self) -> bool:
        """Let the handler that waits go on, if there is one."""
        if self.held is None or self.held.done():
            return False
        conn: Any = self.conn()
        ahead = 1 if self.scenario.app == "small" else READ_AHEAD  # where so many are too large
        if self.coming and not conn.closed and len(session_of(conn).incoming._inbox or ()) < ahead:
            self.wrong.append("nobody has read ahead")
        self.held.set_result(None)
        return True


async def settle() -> None:
    """Let everything go on until it waits for the client, or for a time-out."""
    loop: Any = asyncio.get_running_loop()  # Any: nothing public tells whether it has work
    for _ in range(100_000):
        timers = loop._scheduled
        if not loop._ready and (not timers or timers[0].when() > loop.time()):
            return
        await asyncio.sleep(0)
    raise AssertionError("it does not come to rest")


async def rest(visits: Sequence[Visit]) -> None:
    """The same, and let go of handlers that wait for just that."""
    await settle()
    while any(visit.release() for visit in visits):
        await settle()


async def shut_down(app: Endpoint) -> None:
    """The ASGI lifespan, from its start to its end."""
    events = [{"type": "lifespan.shutdown"}, {"type": "lifespan.startup"}]
    answers = []

    async def receive() -> Event:
        return events.pop()

    async def send(event: Event) -> None:
        answers.append(event["type"])

    await app.app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
    assert answers == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def play(app: Endpoint, visits: Sequence[Visit], models: Sequence[Model]) -> None:
    """Let the visits take place, to their end."""
    scenario, loop = visits[0].scenario, asyncio.get_running_loop()
    tasks = [loop.create_task(app.app(v.scope, v.receive, v.send)) for v in visits]
    ending = None
    if scenario.arrival in ("held", "lockstep"):
        for step in range(max(len(visit.events) for visit in visits)):
            for visit in visits:
                visit.arrive(*visit.events[step : step + 1])
            await (settle() if scenario.arrival == "held" and step % 4 else rest(visits))
    else:
        for visit in visits:
            visit.arrive(*visit.events)
    if scenario.end in ("leave", "lost"):
        for visit in visits:
            visit.arrive({**END, "code": 1001})
    elif scenario.end in ("cancel", "shutdown"):
        for _ in range(scenario.after):
            await asyncio.sleep(0)
        if scenario.end == "cancel":
            for task in tasks:
                task.cancel()
        else:
            ending = loop.create_task(shut_down(app))
    await rest(visits)
    for visit, model in zip(visits, models, strict=True):
        visit.before_end = len(visit.sent)
        visit.gate.set()
        if scenario.end == "stay":
            for id in model.to_stop(visit.sent):
                text = f'{{"type":"complete","id":{id}}}'
                visit.arrive({"type": "websocket.receive", "text": text})
    await rest(visits)
    for visit in visits:
        visit.arrive(END)
    await rest(visits)
    assert all(task.done() for task in tasks)
    outcomes: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
    if scenario.end == "cancel":
        outcomes = [None if isinstance(o, asyncio.CancelledError) else o for o in outcomes]
    assert outcomes == [None] * len(visits)
    if ending is not None:
        assert ending.done()
        await ending


# ── comparison ────────────────────────────────────────────────────────────────────────────────

KEYS = {"type", "id", "payload", "group", "more"}
UNSAFE = re.compile(rf" at 0x|Traceback|{SECRET}|<(class|function|\w+ object)")


class Transcript:
    """What a client was sent, checked against the wire format."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.labels: list[Label] = []
        self.items: dict[str, list[str]] = {}  # by id
        self.late: set[str] = set()  # ids of items that came behind a final answer
        self.gaps: Counter[str] = Counter()
        self.texts = texts
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        frame = json.loads(text, parse_constant=pytest.fail)
        assert text.encode() and not UNSAFE.search(text), text
        assert type(frame) is dict and KEYS.issuperset(frame) and type(frame["type"]) is str, text
        assert type(frame.get("id", "")) in (str, int), text
        type_, payload, group = frame["type"], frame.get("payload"), frame.get("group", "")
        id = json.dumps(frame["id"]) if "id" in frame else ""
        if type_ == "error":
            assert frame.keys() <= {"type", "id", "payload"}, text
            self.labels.append(("error", id, error_code(payload, text), ""))
        elif type_ == "complete":
            assert frame == {"type": "complete", "id": frame["id"]}, text
            self.labels.append(("complete", id, "", ""))
        elif type_ == "gap":
            assert frame == {"type": "gap", "payload": {"group": payload["group"]}}, text
            self.gaps[payload["group"]] += 1
        elif "more" in frame:
            assert frame["more"] is True and id and not group, text
            if any(kind != "push" and known == id for kind, known, *_ in self.labels):
                self.late.add(id)
            self.items.setdefault(id, []).append(canonical(payload))
        elif type_.endswith(".reply") or type_ in ("order", "$pong"):
            assert not group, text
            shown = UNKNOWN if type_ in UNKNOWN_REPLIES else canonical(payload)
            self.labels.append(("reply", id, type_, shown))
        else:
            assert not id, text
            self.labels.append(pushed(type_, payload, group))


def error_code(payload: Json, text: str) -> str:
    """The code of an error of the right shape."""
    assert type(payload) is dict and type(payload["message"]) is str, text
    code = payload["code"]
    assert type(code) is str and ("errors" in payload) == (code == "invalid_payload"), text
    errors = payload.get("errors", [{"path": "$", "message": ""}])
    assert 1 <= len(errors) <= 101, text
    for item in errors:
        assert item.keys() == {"path", "message"} and item["path"].startswith("$"), text
        assert type(item["message"]) is str, text
    return code


def unmatched(wanted: Sequence[Any], partners: Callable[[Any], Iterable[int]]) -> list[Any]:
    """Those of *wanted* that find no partner of their own, in a largest matching."""
    taken: dict[int, int] = {}

    def find(index: int, seen: set[int]) -> bool:
        for partner in partners(wanted[index]):
            if partner not in seen:
                seen.add(partner)
                if partner not in taken or find(taken[partner], seen):
                    taken[partner] = index
                    return True
        return False

    return [wanted[index] for index in range(len(wanted)) if not find(index, set())]


def verify(visit: Visit, model: Model, app: Endpoint) -> None:
    """Compare what a client was sent, and what was done for it, with what the model expects."""
    end = visit.scenario.end
    is_closed = bool(model.close_code or model.may_be_over)
    is_whole = end == "stay"  # everything must be answered
    assert visit.wrong == []
    assert visit.watches == 0
    assert visit.disconnects == visit.connects <= 1
    if model.is_in is not None and end not in ("cancel", "shutdown"):
        assert visit.connects == model.is_in
    expected = model.expected
    transcript = Transcript(visit.sent)
    labels = transcript.labels
    greeting = [label for label in {*model.greeting, pushed("welcome", {})} if label in labels]
    if model.is_in and not model.may_be_over:
        greeting = model.greeting if is_whole else model.greeting[: len(labels)]
        assert labels[: len(greeting)] == greeting
    for label in greeting:
        labels.remove(label)

    codes = {0, model.close_code} | (model.close_codes if model.may_be_over else set())
    if is_whole and model.close_code and not model.may_be_over:
        codes = {model.close_code}
    if end == "shutdown":
        codes.add(1012)
    if model.may_be_over and "rate" in app.limits:
        codes.add(1008)
    assert visit.close_code in codes

    verify_answers(labels, expected, transcript.gaps, is_whole)
    verify_order(labels, expected)
    if is_whole and not is_closed:
        verify_items(transcript, model)
        verify_stopped(Transcript(visit.sent[: visit.before_end]), model)
    if end == "leave" and visit.scenario.reading == (0,):
        verify_backlog(labels, expected)
    verify_handled(visit.handled, expected, end in ("stay", "leave", "lost"))


def verify_answers(
    labels: list[Label], expected: list[Expected], gaps: Counter[str], is_whole: bool
) -> None:
    """Each frame has one of its right answers, and nothing else was sent."""
    certain: Counter[Label] = Counter()
    choices: list[set[Label | None]] = []
    droppable: Counter[Label] = Counter()
    for frame in expected:
        if frame.is_certain:
            certain.update(frame.finals - {None})
        else:
            choices.append(frame.finals)
        if frame.may_drop and frame.is_certain:
            droppable.update(frame.pushes)
        if frame.may_drop or not frame.is_certain:
            choices.extend({label, None} for label in frame.pushes)
        else:
            certain.update(frame.pushes)
    received = Counter(labels)
    if is_whole:
        assert certain - received == Counter(), "lost"
        dropped = {group for _, group, _, _ in droppable - received}
        assert dropped <= gaps.keys(), "lost without a gap"
    more = [*(received - certain).elements()]
    by_label: dict[Label | None, list[int]] = {}
    for index, choice in enumerate(choices):
        for label in choice:
            by_label.setdefault(label, []).append(index)
    assert unmatched(more, lambda label: by_label.get(label, ())) == [], "sent without a reason"
    if is_whole:
        by_index: dict[Label, list[int]] = {}
        for index, label in enumerate(more):
            by_index.setdefault(label, []).append(index)
        needy = [choice for choice in choices if None not in choice]
        found = unmatched(
            needy, lambda choice: (i for label in choice for i in by_index.get(label, ()))
        )
        assert found == [], "lost"


def verify_order(labels: list[Label], expected: list[Expected]) -> None:
    """What only one frame can have led to comes in the order of the frames."""
    places: dict[Label | None, tuple[int, int] | None] = {}
    for number, frame in enumerate(expected):
        slots = [*enumerate(frame.pushes), *((BURST, final) for final in frame.finals)]
        for slot, label in slots:
            is_known = label not in places and not frame.is_spawned
            places[label] = (number, slot) if is_known else None
    in_order = [place for label in labels if (place := places.get(label)) is not None]
    assert in_order == sorted(in_order), "out of order"


def verify_items(transcript: Transcript, model: Model) -> None:
    """A stream's items come in order; all of them unless the client has stopped it."""
    assert transcript.items.keys() <= model.streams.keys(), "items of no stream"
    for id, (frame, *others) in model.streams.items():
        items, wanted = transcript.items.get(id, []), frame.items or []
        finals = [label for label in transcript.labels if label[0] != "push" and label[1] == id]
        assert len(finals) > 1 or id not in transcript.late, "an item behind the end"
        if not others and frame.is_certain and id not in model.completed:
            assert items == wanted
        elif not others:
            assert items == wanted[: len(items)]


def verify_stopped(transcript: Transcript, model: Model) -> None:
    """What the client has stopped has ended without more ado."""
    ended = {id for kind, id, *_ in transcript.labels if kind != "push"}
    for id in model.stopped - ended:
        first, *others = model.streams[id]
        assert others or any(final is None or final[1] != id for final in first.finals)


def verify_backlog(labels: list[Label], expected: list[Expected]) -> None:
    """What came before the client left is answered, if nothing had to wait."""
    prompt = itertools.takewhile(lambda frame: not frame.waits and not frame.closes, expected)
    answers = Counter(
        label
        for frame in prompt
        if frame.is_certain and not frame.is_spawned
        for label in (*frame.pushes, *frame.finals)
        if label is not None
    )
    assert answers - Counter(labels) == Counter(), "lost although it had come before"


def verify_handled(handled: Counter[str], expected: list[Expected], is_whole: bool) -> None:
    """The handlers of one message at a time ran once for each."""
    possible = Counter(frame.handled for frame in expected if frame.handled)
    certain = Counter(frame.handled for frame in expected if frame.handled and frame.is_certain)
    assert handled <= possible
    if is_whole:
        assert certain <= handled


def bugs_of(expected: Iterable[Expected], end: str) -> tuple[int, int]:
    """How many errors must be in the log, and how many may be."""
    frames = list(expected)
    certain = sum(
        frame.bugs
        for frame in frames
        if frame.is_certain and (end == "stay" or not frame.is_spawned)
    )
    if end in ("cancel", "shutdown"):
        certain = 0
    return certain, sum(frame.bugs for frame in frames)


# ── the stage ─────────────────────────────────────────────────────────────────────────────────


LOGGERS = ("pachinko", "falcon")


class Stage:
    """The apps, a loop that they all run in, and an eye on what nobody catches."""

    def __init__(self) -> None:
        self.apps = {name: make() for name, make in APPS.items()}
        self.errors: list[str] = []  # of the log
        self.uncaught: list[str] = []
        self.frames = 0
        self.runner = asyncio.Runner()
        loop = self.runner.get_loop()
        loop.set_exception_handler(lambda _, context: self.uncaught.append(repr(context)))

    def __enter__(self) -> Stage:
        self.hook, sys.unraisablehook = sys.unraisablehook, self.unraisable
        for name in LOGGERS:
            logging.getLogger(name).addFilter(self.logged)
        gc.disable()  # each example collects what it has left, and only that
        return self

    def __exit__(self, *_: object) -> None:
        gc.enable()
        for name in LOGGERS:
            logging.getLogger(name).removeFilter(self.logged)
        sys.unraisablehook = self.hook
        self.runner.close()

    def logged(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.name == "pachinko" and record.levelno >= logging.ERROR:
            self.errors.append(text)
        elif record.name == "falcon" and "HTTPError" not in text:
            self.uncaught.append(text)
        return False  # pytest would keep them all, and with their tracebacks the connections

    def unraisable(self, unraisable: Any) -> None:
        self.uncaught.append(f"{unraisable.exc_value!r} in {unraisable.object!r}")

    def run(self, scenario: Scenario) -> None:
        """Play one example and judge it."""
        first, second = Frames(scenario, 1), Frames(scenario, 1001)
        clients = [[first.make(number) for number in scenario.numbers if number]]
        if scenario.others:
            clients.append([second.make(number) for number in scenario.others if number])
        self.judge(scenario, clients)

    def judge(self, scenario: Scenario, clients: list[list[Event]]) -> None:
        app = self.apps[scenario.app]
        visits = [Visit(n, scenario, events) for n, events in enumerate(clients)]
        models = [Model(app, v.events, v.group, scenario) for v in visits]
        self.errors.clear()
        try:
            self.runner.run(self.watch(app, visits, models))
            for visit, model in zip(visits, models, strict=True):
                verify(visit, model, app)
            self.verify_end(app, visits)
            least, most = bugs_of((e for m in models for e in m.expected), scenario.end)
            assert least <= len(self.errors) <= most, self.errors
        except BaseException:
            tell = hypothesis.note if hypothesis.currently_in_test_context() else print
            for visit, model in zip(visits, models, strict=True):
                tell(describe(visit, model))
            self.apps[scenario.app] = APPS[
                scenario.app
            ]()  # nothing of it gets into another example
            raise
        finally:
            self.frames += sum(visit.taken for visit in visits)
            self.uncaught.clear()

    async def watch(self, app: Endpoint, visits: list[Visit], models: list[Model]) -> None:
        try:
            await play(app, visits, models)
            assert asyncio.all_tasks() == {asyncio.current_task()}, "a task is left"
        finally:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def verify_end(self, app: Endpoint, visits: list[Visit]) -> None:
        """Nothing is left of the connections."""
        hub = app.hub
        assert not (
            hub.state.registry.connections
            or hub.state.registry.groups
            or hub.state.registry.users
            or hub.state.serving
        )
        gc.collect(0)
        assert self.uncaught == []
        assert [visit.conn() for visit in visits] == [None] * len(visits)


def describe(visit: Visit, model: Model) -> str:
    lines = [f"{visit.group}:"]
    for event in visit.events:
        frame = event["bytes"] if event.get("text") is None else event["text"]
        expected = model.by_event.get(id(event))
        lines.append(f"{ascii(frame)[:SHOWN]},  # {str(expected and expected.finals)[:SHOWN]}")
    lines += [f"sent {ascii(text)[:SHOWN]}" for text in visit.sent]
    return "\n    ".join([*lines, f"closed with {visit.close_code}; handled {visit.handled}"])


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage() as stage:
        yield stage


# ── tests ─────────────────────────────────────────────────────────────────────────────────────

numbers = st.integers(0, 2**24 - 1)
many = st.tuples(*[numbers] * LONGEST)
scenarios = st.builds(
    Scenario,
    app=st.sampled_from([*APPS]),
    numbers=many,
    others=st.just(()) | st.just(()) | many,
    base=numbers,
    has_own_ids=st.sampled_from([True, True, False]),
    is_streaming=st.sampled_from([False, False, False, True]),
    arrival=st.sampled_from(["backlog", "paced", "held", "lockstep"]),
    reading=st.sampled_from([(0,), (0,), (1,), (0, 0, 3), (4,)]),
    end=st.sampled_from(["stay", "stay", "stay", "leave", "lost", "cancel", "shutdown"]),
    after=st.integers(0, 100),
    is_silent=st.booleans(),
)
ROUNDS = math.ceil(AMOUNT / ROUND)


@pytest.mark.parametrize("seed", range(SEED, SEED + ROUNDS))
def test_every_frame_has_its_outcome_and_nothing_is_left(stage: Stage, seed: int) -> None:
    """No frame raises, loses its answer or gets two, whatever arrives before and after it."""
    wanted = stage.frames + math.ceil(AMOUNT / ROUNDS)
    for part in itertools.count():
        if stage.frames >= wanted:
            break

        @hypothesis.seed(seed << 32 | part)
        @settings(
            max_examples=50,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=[HealthCheck.too_slow],  # an example is two hundred messages
        )
        @given(scenario=scenarios)
        def check(scenario: Scenario) -> None:
            stage.run(scenario)

        check()
        gc.collect()
    assert stage.frames >= wanted


REGRESSIONS: list[tuple[str, dict[str, Any], list[str | bytes]]] = [
    # Nested too deeply, and no object.
    ("plain", {}, ["[" * 200 + "]" * 200, '{"type":"ping","id":1.5,"x":' + "[" * 128 + "]" * 128]),
    # Of two keys the first does not fit, and the last is the id to answer with.
    ("plain", {}, ['{"type":"ping","id":1.5,"id":3}', '{"type":5,"type":"ping","id":4}']),
    # Behind a close of the app's, although the client has left before it.
    ("plain", {"end": "leave"}, ['{"type":"hold"}', b"binary", '{"type":"ping","id":1}']),
    ("plain", {"end": "leave"}, ['{"type":"hold"}', '{"type":"quit"}', '{"type":"any","id":1}']),
    # The same, when the close frame cannot be written any more.
    ("plain", {"end": "lost"}, ['{"type":"hold"}', '{"type":"quit"}', '{"type":"any","id":1}']),
    # Cleaning up because its item could not be written, when it is stopped.
    ("plain", {"end": "lost"}, ['{"type":"watch","id":0}', '{"type":"complete","id":0}']),
    # Too large, while a handler waits, and the stream is there.
    (
        "small",
        {},
        [
            '{"type":"watch","id":1}',
            '{"type":"hold","id":2}',
            '{"type":"complete","id":1,"x":"' + "x" * 300 + '"}',
            '{"type":"ping","id":3}',
        ],
    ),
]


@pytest.mark.parametrize("arrival", ["backlog", "paced", "held", "lockstep"])
@pytest.mark.parametrize(("app", "options", "frames"), REGRESSIONS)
def test_what_was_broken_once_has_its_outcome(
    stage: Stage, app: str, options: dict[str, Any], frames: list[str | bytes], arrival: str
) -> None:
    """Frames that an example has shrunk to are as the model expects."""
    events = [{"bytes" if isinstance(frame, bytes) else "text": frame} for frame in frames]
    stage.judge(Scenario(app, (), arrival=arrival, **options), [events])


def without_last(texts: list[str]) -> list[str]:
    return texts[:-1]


def doubled(texts: list[str]) -> list[str]:
    return [*texts, texts[-1]]


def swapped(texts: list[str]) -> list[str]:
    return [texts[0], texts[2], texts[1], *texts[3:]]


def replaced(old: str, new: str) -> Callable[[list[str]], list[str]]:
    return lambda texts: [text.replace(old, new) for text in texts]


@pytest.mark.parametrize(
    "tamper",
    [
        without_last,
        doubled,
        swapped,
        replaced('"id":1', '"id":4'),
        replaced('"id":1', '"id":"1"'),
        replaced('"payload":7', '"payload":7.0'),
        replaced('"payload":1', '"payload":2'),
        replaced("invalid_payload", "internal_error"),
        replaced("required", SECRET),
        replaced('"more":true', '"more":true,"extra":1'),
        replaced("complete", "completed"),
    ],
)
def test_the_model_notices_what_a_client_would(
    stage: Stage, tamper: Callable[[list[str]], list[str]]
) -> None:
    """An answer that is missing, too much, out of order or another one is a failure."""
    events = [
        {"text": '{"type":"any","id":1,"payload":7}'},
        {"text": '{"type":"sum","id":2}'},
        {"text": '{"type":"count","id":3,"payload":{"to":2}}'},
    ]
    app, scenario = stage.apps["plain"], Scenario("plain", ())
    visit = Visit(0, scenario, events)
    model = Model(app, visit.events, visit.group, scenario)
    stage.runner.run(play(app, [visit], [model]))
    verify(visit, model, app)
    visit.sent = tamper(visit.sent)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        verify(visit, model, app)
