"""Pachinko: message-level WebSockets for Falcon.

    app = falcon.asgi.App()
    ws = Pachinko(app, "/ws/{room}")

    @message("say")
    class Say:
        text: str

    @ws.connect
    async def arrive(conn: Connection, room: str) -> None:
        await hub.join(f"room:{room}", conn)

    @ws.on(Say)
    async def say(conn: Connection, msg: Say) -> None:
        await hub.send(f"room:{conn.params['room']}", "said", {"who": conn.id, "text": msg.text})

    @ws.on("sum")
    async def add(conn: Connection, *, a: int, b: int = 0) -> int:
        return a + b

One JSON object a text frame, ``{"type": str, "id"?: str | int, "payload"?: any}``. What a handler
returns goes to the sender with the request's ``id``; what ``hub.send`` gets goes to a group.

Glossary

    frame — One unit that crosses a WebSocket: a text, or some bytes.
    envelope — The JSON object in a text frame: a type, and perhaps an id and a payload.
    message — What a client or the server says with an envelope.
    payload — The part of a message that a handler takes or returns.
    group — The connections that get the messages sent to one name; it exists while it has a member.
    hub — What an application calls to reach connections, users and groups.
    relay — What carries a message from the hub to its receivers, in this process and in all others.
    outbox — The events that wait while an earlier write to a client is in progress.
    fan out — To write one event to many connections, without waiting for any client.
    broker — The server between the processes: NATS or Redis.
    peer message — What one process sends to others by the broker, mostly with a frame in it.
    kept group — A group whose messages stay for a while, for clients that come back (`Hub.keep`).
    position — Where a client is in what was sent to kept groups; the ``at`` of a message.
    ring — The messages of one kept group, the oldest of which go first.
    cursor — Where a member of a kept group is that has not got all of its ring yet.

Map: each section, what it is for, and those above it that it uses.

    errors — whose fault something is, and what a client is told
    types — the types in annotations (uses: errors)
    envelope and message — frames and their JSON, `message` (uses: errors, types)
    unions — the classes in a union, and what tells them apart (uses: errors, types, envelope and
        message)
    sending — which part of a payload cannot be sent (uses: errors, types, envelope and message,
        unions)
    structuring — the hooks that make what handlers take of JSON (uses: errors, types, envelope and
        message, unions)
    codec — JSON to what a handler takes, and back (uses: errors, types, envelope and message,
        unions, sending, structuring)
    signatures — what a function takes, and of which types (uses: errors, types, envelope and
        message, unions)
    handlers — what a registered function takes, and finding it (uses: errors, types, envelope and
        message, codec, signatures)
    scope — a context for each message, and what providers make for one call (uses: errors, types,
        unions, signatures, handlers)
    include — what another Pachinko has, added to an endpoint (uses: errors, envelope and message,
        signatures, scope)
    handshake — who may connect: origins and tokens (uses: errors)
    clock — the time that the library goes by
    limits — time, rate and the options that bound a connection (uses: errors, clock)
    outbox — what waits to be written to one client (uses: envelope and message)
    history — what was sent to kept groups (uses: clock, outbox)
    outgoing — writes to one connection, or one event to many (uses: errors, scope, handshake,
        clock, limits, outbox)
    incoming — the reading half (uses: errors, envelope and message, handshake, outgoing)
    connection — what a handler gets (uses: errors, envelope and message, handshake, clock, outbox)
    asking — the questions of the server to its clients (uses: errors, types, unions, signatures,
        handlers, clock, limits, outbox, outgoing, connection)
    registry and relay — this process and all others (uses: errors, outbox, history, outgoing,
        connection, asking)
    catching up — members of kept groups that have missed messages (uses: errors, envelope and
        message, clock, outbox, history, outgoing, connection, registry and relay)
    hub state — what a hub has while it runs (uses: errors, clock, limits, outgoing, connection,
        registry and relay, catching up)
    listening — the messages to a group, without a connection (uses: errors, envelope and message,
        clock, limits, outbox, outgoing, connection, registry and relay)
    hub setup — what an application says before a hub starts (uses: errors, codec, clock, limits,
        history, connection, catching up, hub state)
    hub — reaches clients from any code (uses: errors, envelope and message, scope, clock,
        connection, asking, registry and relay, catching up, listening, hub setup)
    outcomes — what an exception means (uses: errors, envelope and message, signatures, clock,
        limits)
    guard — who may send a message type (uses: errors, types, unions, signatures, handlers,
        outcomes)
    stream — a generator in progress (uses: errors, scope, clock, limits, outgoing)
    background — tasks of the application that end with a connection (uses: errors, scope, limits,
        outcomes)
    snapshots — the state of a group, for those who have missed messages (uses: errors, types,
        envelope and message, signatures, limits, outcomes)
    answering — what a client is told of its messages (uses: errors, envelope and message, scope,
        clock, limits, outbox, outcomes, guard, stream)
    resumable streams — streams that go on for a while without their client (uses: errors, envelope
        and message, clock, limits, outbox, history, connection, registry and relay, catching up,
        outcomes, stream, answering)
    session — decode a message, call its handler, answer (uses: errors, envelope and message, scope,
        handshake, clock, limits, outbox, outgoing, incoming, connection, asking, catching up,
        outcomes, stream, background, answering, resumable streams)
    admission — authenticate, connect handlers, accept (uses: errors, envelope and message,
        signatures, handshake, clock, limits, outbox, outgoing, outcomes)
    running — the start and the stop of an endpoint, and its workers (uses: errors, signatures,
        scope, clock, limits, connection, hub state, outcomes, snapshots)
    assets — the files of client/, as routes (uses: errors)
    registration — the decorators (uses: errors, envelope and message, signatures, handlers, scope,
        include, handshake, clock, limits, guard, snapshots, admission, running)
    Pachinko — the façade: what an application makes, and what Falcon calls (uses: errors, envelope
        and message, handlers, include, handshake, limits, hub, session, admission, running, assets,
        registration)
    settling — what an event loop can still do by itself (uses: clock, outgoing, stream)
    client — a client of a simulated application (uses: errors, envelope and message, unions, scope,
        clock, asking, listening, outcomes, settling)
    process — a process of a simulated application (uses: errors, scope, handshake, hub, running,
        settling, client)
    simulate — the test client (uses: errors, envelope and message, clock, connection, registry and
        relay, listening, hub, outcomes, settling, client, process)
"""

from __future__ import annotations

import abc
import asyncio
import bisect
import builtins
import collections
import concurrent.futures
import contextlib
import contextvars
import dataclasses
import difflib
import enum
import functools
import gc
import hashlib
import importlib
import inspect
import itertools
import logging
import math
import operator
import os
import random
import re
import secrets
import sys
import textwrap
import threading
import time
import traceback
import types
import typing
import urllib.parse
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Container,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    MutableSet,
    Sequence,
    Set,
)
from datetime import date, datetime, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Union, cast, get_args
from typing import get_origin as origin_of
from uuid import UUID

import attrs
import cattrs
import falcon
import falcon.asgi
import falcon.constants
import msgspec
from cattrs import cols
from cattrs.gen import make_dict_structure_fn, override
from cattrs.gen.typeddicts import make_dict_structure_fn as make_typeddict_structure_fn
from msgspec import UNSET, UnsetType

__all__ = [
    "AnswerError", "Backplane", "Client", "Close", "Connection", "Envelope", "Hub", "MessageError",
    "NoAnswer", "Pachinko", "PachinkoError", "Refused", "Simulation", "hub", "message", "simulate",
]  # fmt: skip
__version__ = "0.1.0"

logger: logging.Logger = logging.getLogger("pachinko")

T = TypeVar("T")
P = ParamSpec("P")
E = TypeVar("E", bound=BaseException)
F = TypeVar("F", bound=Callable[..., Any])
Id = str | int
Hook = Callable[[Any, Any], Any]  # cattrs calls it with a value and the type to make of it
Members = Sequence[tuple[Any, Any]]  # the types in a union, each with the class of its values
KeyOf = Callable[[Any, str], str]  # the key on the wire for a class and the name of its field
Check = tuple[Any, Callable[[Any], bool], str]  # a class, a test of its values, what fails it
Item = tuple[str, str, Any, bool]  # a field: name, key on the wire, type, is it required?
HookFactory = Callable[[Any, cattrs.Converter], Callable[..., Any]]
Writer = tuple[str, Callable[[Any], Any]]  # a message type, and what makes JSON of a value
FrameClass = type["Received"]  # the class of the frames of one message type
Namespaces = tuple[dict[str, Any], dict[str, Any]]  # the globals and locals for annotations
Event = dict[str, Any]  # an ASGI event: {"type": "websocket.send", "text": "…"}

# ── errors ────────────────────────────────────────────────────────────────────────────────────
#
# Exceptions are split by whose fault they are. `explain` makes the texts that a client is told.
#
#   Exception
#   ├── PachinkoError   the program's mistake, raised where it was made, mostly at registration
#   │   └── BrokerAway  nobody's mistake: the broker between processes has not taken a message
#   ├── MessageError    the client's mistake: it is told, and the connection stays open
#   │   └── BadFrame    a text frame that is no message
#   ├── AnswerError     a client's: it has answered a question of the server with an error
#   ├── NoAnswer        nobody's mistake: a question that no client has answered
#   ├── Close           nobody's mistake: a handler ends the connection
#   └── Refused         nobody's mistake: a handshake that did not succeed, in a test

_MAX_ERRORS = 100  # errors in one reply; a frame of max_size has room for 100,000s
_MISSING = "required, but missing"
_OTHER = "invalid value"  # the text for an exception whose own text is not meant for clients
_KEY_SHOWN = 64  # characters of a client's own key in a path
_REASON_BYTES = 123  # RFC 6455, 5.5: a control frame carries 125 bytes, two of them the code


class PachinkoError(Exception):
    """A mistake in the program that uses Pachinko, with the corrected code in its text."""


class BrokerAway(PachinkoError):
    """The broker has not taken a message. The log has no traceback, as the program has no bug."""


class MessageError(Exception):
    """An error of your own for the client: raise it in a message handler.

    The client gets ``{"type":"error","id":…,"payload":{"code":code,"message":message,…}}``, with
    *details* (JSON values) beside the two. The connection stays open.
    """

    def __init__(self, code: str, message: str = "", **details: Any) -> None:
        super().__init__(f"{code}: {message}")
        self.code: str = code
        self.message: str = message
        self.details: dict[str, Any] = details


class AnswerError(Exception):
    """An error that a client has sent in place of an answer, or an answer of a wrong type.

    *code*, *message* and *details* are the client's words, "" and {} where it has none; ``str()``
    shows nothing of them. For an answer that does not fit *returns* the code is
    ``invalid_payload``, and the details have the wrong fields. A message handler that lets it pass
    answers its own client with the code ``no_answer``.
    """

    def __init__(self, code: str, message: str = "", details: Mapping[str, Any] = {}) -> None:
        super().__init__("a client has answered with an error: see its code, message and details")
        self.code: str = code
        self.message: str = message
        self.details: dict[str, Any] = dict(details)


class NoAnswer(TimeoutError):
    """No answer to a question: in time, from a client that has gone, or for lack of such an id.

    A message handler that lets it pass answers its own client with the code ``no_answer``.
    """


class Close(Exception):
    """The end of the connection, with *code* and *reason*: raise it in a handler.

    An application may send the codes 1000 to 1003, 1007 to 1014 and 3000 to 4999 (RFC 6455, 7.4).
    Raises `ValueError` for any other *code*. A *reason* is cut to 123 bytes of UTF-8; None is none.
    """

    def __init__(self, code: int = 1000, reason: str | None = "") -> None:
        if not isinstance(code, int) or not (reason is None or isinstance(reason, str)):
            raise TypeError(f'write Close(4000, "a reason"), got Close({code!r}, {reason!r})')
        if not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
            raise ValueError(
                f"{code} is no close code to send; use 1000, or 4000 to 4999 for meanings of your "
                f"own; 1000 to 1003, 1007 to 1014 and 3000 to 4999 may be sent"
            )
        self.code: int = int(code)
        # A goodbye never fails because of its text: the connection has to end.
        cut = whole(reason or "").encode()[:_REASON_BYTES]
        self.reason: str = cut.decode(errors="ignore")
        super().__init__(f"{self.code} {self.reason}")


class Refused(Exception):
    """A handshake that was refused, or accepted and closed before the client was in.

    *status* is that of HTTP, and *headers* are those of the refusal; or *code* is that of the close
    frame. The other one is None. *reason* is the text that came with it.
    """

    def __init__(
        self, status: int | None, code: int | None, reason: str, headers: Mapping[str, str] = {}
    ) -> None:
        what = f"HTTP {status}" if status is not None else f"closed with {code}"
        super().__init__(f"{what}: {reason}" if reason else what)
        self.status: int | None = status
        self.code: int | None = code
        self.reason: str = reason
        self.headers: dict[str, str] = dict(headers)


def whole(text: str) -> str:
    """Return *text* with U+FFFD for each half of a surrogate pair, which UTF-8 cannot carry."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def bare(error: E) -> E:
    """Return *error* without traceback, cause and context: their stack frames refer back to it."""
    for inner in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        bare(inner)
    with contextlib.suppress(Exception):  # an application's exception may be frozen
        error.__cause__ = error.__context__ = error.__traceback__ = None
    return error


def explain(
    exc: BaseException, path: str = "$.payload", key_of: KeyOf = lambda _, name: name
) -> Iterator[dict[str, str]]:
    """Yield each wrong field under *exc* as ``{"path", "message"}``, without server internals.

    *key_of* returns the key on the wire for a class and the name of a field.
    """
    if isinstance(exc, cattrs.BaseValidationError):
        for inner in exc.exceptions:
            # cattrs adds a note to its own KeyError for a missing key; any other is a user's bug.
            is_other = isinstance(inner, KeyError) and not hasattr(inner, "__notes__")
            step = _path_step(inner, exc.cl, key_of)
            yield from explain(ValueError(_OTHER) if is_other else inner, path + step, key_of)
        return
    text = _OTHER
    if isinstance(exc, msgspec.ValidationError):
        text = str(exc).replace("`", "")
        text = text[:1].lower() + text[1:]
    elif isinstance(exc, KeyError):
        text = _MISSING
    elif isinstance(exc, cattrs.ForbiddenExtraKeysError):
        text = f"unknown: {', '.join(sorted(exc.extra_fields))}"
    elif isinstance(exc, (ValueError, TypeError)) and exc.args and isinstance(exc.args[0], str):
        text = exc.args[0]  # attrs' validators put the field and the value behind the text
    elif isinstance(exc, RecursionError):
        text = "nested too deeply"
    yield {"path": path, "message": text}


def _path_step(exc: BaseException, t: Any, key_of: KeyOf) -> str:
    """Return the place of *exc* in its parent: ``.field``, ``[3]``, ``["key"]``, or ``""``."""
    names = [arg.name for arg in exc.args if isinstance(arg, attrs.Attribute)]
    for note in getattr(exc, "__notes__", ()):
        if isinstance(note, cattrs.IterableValidationNote):
            index = note.index
            return f"[{index}]" if type(index) is int else f'["{str(index)[:_KEY_SHOWN]}"]'
        if isinstance(note, cattrs.AttributeValidationNote):
            names = [note.name]
    return f".{key_of(t, names[0])}" if names else ""


def enforce(value: T, checks: Iterable[Check]) -> T:
    """Return *value*, or raise `msgspec.ValidationError` for the first check that it fails."""
    for cls, test, text in checks:
        is_right = False
        with contextlib.suppress(KeyError, TypeError):  # Python's own words are not for clients.
            is_right = not isinstance(value, cls) or bool(test(value))
        if not is_right:
            raise msgspec.ValidationError(text)
    return value


def invalid_payload(type: str, errors: Iterable[dict[str, str]]) -> MessageError:
    """Return the error for a payload, with at most `_MAX_ERRORS` of what is wrong in it."""
    shown = list(itertools.islice(errors, _MAX_ERRORS + 1))
    if len(shown) > _MAX_ERRORS:
        shown[-1] = {"path": "$.payload", "message": "and more"}
    first = f"{shown[0]['path']}: {shown[0]['message']}"
    return MessageError("invalid_payload", f"{type}: {first}", errors=shown)


# ── types ─────────────────────────────────────────────────────────────────────────────────────
#
# A payload is described by the types in annotations. Here they are resolved and looked into.
#
# msgspec can decode a frame straight into the payload, in one pass and several times as fast as
# cattrs builds it from JSON values. It sets the fields of an object: it calls no constructor and no
# converter, and knows no alias. `is_read_in_one_pass` accepts the types with the same result. Every
# other type is left to cattrs ("structuring", below).

_TIMES: set[Any] = {datetime, date, time_of_day, timedelta}
_LEAVES: set[Any] = {str, int, float, bool, types.NoneType, bytes, UUID, Decimal, *_TIMES}
_UNIONS: tuple[Any, ...] = (Union, types.UnionType)
_QUALIFIERS = ("Final", "NotRequired", "ReadOnly", "Required")  # two modules have each of them
# The packages with metadata that is meant to be enforced: attrs has validators, for one.
_ENFORCERS = frozenset({"annotated_types", "attr", "beartype", "msgspec", "pydantic"})
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_LENGTHS = {"min_length": operator.ge, "max_length": operator.le}
_LIMITS = frozenset({*_SIGNS, *_LENGTHS, "multiple_of", "pattern", "tz", "func"})
_DESCRIPTIONS = frozenset({
    "title", "description", "examples", "extra_json_schema", "extra", "unit", "documentation",
})  # fmt: skip
_MAKING = ("__new__", "__getattribute__", "__getattr__", "__attrs_pre_init__")
_ATTRS_FILE = inspect.getfile(attrs.make_class)


def resolve_class(cls: Any, globals_: dict[str, Any], locals_: dict[str, Any]) -> dict[str, Any]:
    """Turn the text annotations of *cls* into types, in place, and return them by field name."""
    scope, hints = {**globals_, **locals_}, dict[str, Any]()
    is_resolved = getattr(cls, "__attrs_types_resolved__", None) is cls  # attrs' own sign
    for base in () if is_resolved else reversed(cls.__mro__):  # each names types as its module does
        scope |= vars(sys.modules.get(base.__module__, types))
        inner = {**(locals_ if "<locals>" in base.__qualname__ else {}), **types_named_in(base)}
        try:
            found = typing.get_type_hints(base, scope, inner, include_extras=True)
        except Exception as exc:
            exc.add_note(f"in an annotation of {base.__qualname__}")
            raise
        hints |= {name: found[name] for name in inspect.get_annotations(base) if name in found}
    if (fields := fields_of(cls)) is not None:  # ClassVar and InitVar annotate no field
        hints = {field.name: hints.get(field.name, field.type) for field in fields}
    hints = {name: hashable(t, is_field=True) for name, t in hints.items()}
    for name, t in hints.items() if fields or is_typed_dict(cls) else ():
        if free_variables(t) and origin_of(t) is typing.Annotated:
            hints[name] = cast(Any, typing.Final)[t]  # cattrs substitutes nothing in Annotated
    for field in fields or ():  # attrs freezes its own, and changes them like this itself
        object.__setattr__(field, "type", hints[field.name])
    if attrs.has(cls):
        setattr(cls, "__attrs_types_resolved__", cls)  # noqa: B010 - it is declared on no class
    own = cls.__annotations__  # msgspec looks there
    own.update({name: hints[name] for name in own if name in hints})
    return hints


def types_named_in(cls: type) -> dict[str, Any]:
    """Return the types that the body of *cls* has given a name, by name."""
    found = dict[str, Any]()
    for name, t in vars(cls).items():
        with contextlib.suppress(Exception):  # A proxy may raise anything.
            if inspect.isclass(t) or origin_of(t) or hasattr(t, "__value__"):
                found[name] = t
    return found


def hashable(t: Any, is_field: bool = False) -> Any:
    """Return *t* without metadata that has no hash. cattrs looks types up by hash.

    Of the unions in a field, it substitutes the type variables of `typing.Union` only.
    """
    if _has_hash(t) and not (is_field and free_variables(t)):
        return t
    args = tuple(hashable(arg, is_field) for arg in get_args(t))
    if origin_of(t) is typing.Annotated:
        pieces = [piece for each in t.__metadata__ for piece in _hashable_pieces(each)]
        return typing.Annotated[(args[0], *pieces)] if pieces else args[0]
    if origin_of(t) in _UNIONS:
        return Union[args]  # noqa: UP007 - of a tuple
    if not args:
        return t
    return t.copy_with(args) if hasattr(t, "copy_with") else t.__origin__[args]


def _has_hash(value: object) -> bool:
    """Tell whether *value* has a hash."""
    with contextlib.suppress(TypeError):
        hash(value)
        return True
    return False


def _hashable_pieces(piece: Any) -> list[Any]:
    """Return *piece* in a list, or what it limits if it has no hash: Meta(gt=0, examples=[1])."""
    limits = {} if _has_hash(piece) else dict(_limits_in(piece))
    if "func" in limits:
        return [dataclasses.replace(piece, func=functools.partial(limits["func"]))]
    return [msgspec.Meta(**limits)] if limits else [piece] if _has_hash(piece) else []


def class_of(t: Any) -> Any:
    """Return the class behind *t*, such as `list` for ``list[int]``, or None."""
    cls = origin_of(t) or t
    return cls if inspect.isclass(cls) and cls not in (Any, *_UNIONS) else None


def inner_type(t: Any) -> Any:
    """Return the type inside of `Annotated`, a `NewType` or a ``type`` statement, or *t* itself."""
    if origin_of(t) is typing.Annotated:
        return t.__origin__  # cattrs takes Annotated[dict, "x"] for a dict of "x"
    if is_qualified(t):
        return get_args(t)[0]
    if hasattr(origin_of(t), "__value__"):  # type Many[X] = list[X]
        value = _value_of(t.__origin__)
        given = dict(zip(t.__origin__.__type_params__, get_args(t), strict=True))
        return hashable(value[tuple(given[each] for each in value.__parameters__)])
    return hashable(_value_of(t) if hasattr(t, "__value__") else getattr(t, "__supertype__", t))


def _value_of(alias: Any) -> Any:
    """Return the type that *alias* stands for. It may be a text with its own name in it."""
    names = {**vars(sys.modules.get(alias.__module__, types)), alias.__name__: alias}
    holder = types.SimpleNamespace(__annotations__={"t": alias.__value__})
    return typing.get_type_hints(holder, names, include_extras=True)["t"]


def is_qualified(t: Any) -> bool:
    """Tell whether *t* is a type with a qualifier around it, such as `Final` or `NotRequired`."""
    return str(origin_of(t)).rpartition(".")[2] in _QUALIFIERS


def bare_type(t: Any) -> Any:
    """Return *t* without names and without `Annotated`."""
    inner = inner_type(t)
    return t if inner is t else bare_type(inner)


def union_members(t: Any, outer: tuple[Any, ...] = ()) -> list[Any]:
    """Return the members of the union *t*, also of unions with a name in it, or *t* alone."""
    if t in outer:
        raise TypeError(f"{t} is a union that contains itself")
    if origin_of(t) in _UNIONS:
        return [inner for member in get_args(t) for inner in union_members(member, outer)]
    inner = inner_type(t)
    if inner is t or origin_of(bare_type(t)) not in _UNIONS or limits_of(t):
        return [t]
    return union_members(inner, (*outer, t))


def is_leaf(t: Any) -> bool:
    """Tell whether *t* is written as one JSON scalar."""
    if origin_of(t) in _UNIONS:
        members = union_members(t)
        scalars = [member for member in members if member is not types.NoneType]
        # A converter may have a hook for a type with a name, so it is not looked into if alone.
        has_name = len(scalars) == 1 and bare_type(scalars[0]) is not scalars[0]
        return not has_name and all(is_leaf(bare_type(member)) for member in members)
    is_enum = inspect.isclass(t) and issubclass(t, enum.Enum)
    return is_enum or origin_of(t) is Literal or t in _LEAVES


def fields_of(t: Any) -> Any:
    """Return the fields of an attrs class or a dataclass, or None for any other type."""
    cls = class_of(t)
    if attrs.has(cls):
        return attrs.fields(cls)
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else None


def declares_fields(t: Any) -> bool:
    """Tell whether *t* has named items: an attrs class, dataclass, typed dict or named tuple."""
    cls = class_of(t)
    is_dict = is_typed_dict(cls) or is_struct(cls)
    return fields_of(t) is not None or is_dict or cols.is_namedtuple(cls)


def is_typed_dict(t: Any) -> bool:
    """Tell whether *t* is a typed dict, of `typing` or of typing_extensions."""
    return type(t).__name__ == "_TypedDictMeta"


def is_closed(cls: Any) -> bool:
    """Tell whether the typed dict *cls* has no other items (PEP 728), or refuse those it has."""
    extra = str(getattr(cls, "__extra_items__", None)).rpartition(".")[2]
    if extra not in ("", "None", "Never", "NoExtraItems"):
        raise TypeError(f"{cls.__name__} has extra_items, which are not read; write a dict")
    return bool(getattr(cls, "__closed__", False))


def is_struct(t: Any) -> bool:
    """Tell whether *t* is a `msgspec.Struct`."""
    return isinstance(class_of(t), type(msgspec.Struct))


def types_in(t: Any, namespaces: Namespaces, seen: list[Any]) -> Iterator[Any]:
    """Yield all types that *t* contains, *t* last, and resolve the annotations of classes."""
    if t in seen or isinstance(t, TypeVar) or origin_of(t) is Literal:
        return
    seen.append(t)
    has_types = origin_of(t) not in (typing.Annotated, Callable, type)
    members = [inner_type(t), *(get_args(t) if has_types else ())]
    if declares_fields(t):
        hints, cls = resolve_class(class_of(t), *namespaces), class_of(t)
        if is_struct(cls):
            hints = {name: hints[name] for name in cls.__struct_fields__}
        elif is_typed_dict(cls):
            _correct_keys(cls, hints)
        members += _checked_fields(cls, hints)
    elif has_types and origin_of(t) not in _UNIONS and not is_qualified(t):
        refuse_unset(get_args(t))
    for member in members:
        yield from types_in(member, namespaces, seen)
    yield t


def _correct_keys(cls: Any, hints: dict[str, Any]) -> None:
    """Let the typed dict *cls* know of the qualifiers that were text when it was made."""
    required = set(cls.__required_keys__)
    for key, hint in hints.items():
        t = hint
        while is_qualified(t):
            if origin_of(t) is typing.Required:
                required.add(key)
            elif origin_of(t) is typing.NotRequired:
                required.discard(key)
            t = get_args(t)[0]
    cls.__required_keys__ = frozenset(required)
    cls.__optional_keys__ = frozenset(hints.keys() - required)


def _checked_fields(cls: Any, hints: dict[str, Any]) -> Iterable[Any]:
    """Return the types of the fields of *cls*. Raises `TypeError` for a type of no value."""
    bases = (*cls.__mro__, *map(class_of, getattr(cls, "__orig_bases__", ())))
    known = {p for base in bases for p in getattr(base, "__parameters__", ())}
    fields = msgspec.structs.fields(cls) if is_struct(cls) else fields_of(cls) or ()
    may_be_absent = {field.name for field in fields if field.default is UNSET}
    for name, t in hints.items():
        if free := {*free_variables(t)} - known:
            write = f"write a type, or class {cls.__name__}(Generic[T])"
            raise TypeError(f"{cls.__name__}.{name} has no type for {free.pop()}; {write}")
        if origin_of(t) is not typing.NotRequired and name not in may_be_absent:
            refuse_unset([t], name)
    return hints.values()


def free_variables(t: Any) -> tuple[Any, ...]:
    """Return the type variables in *t*."""
    return (t,) if isinstance(t, TypeVar) else getattr(t, "__parameters__", ())


def refuse_unset(annotations: Iterable[Any], name: str = "x") -> None:
    """Raise `TypeError` if `UnsetType` stands where nothing can be absent."""
    for t in annotations:
        members = union_members(bare_type(t))
        if UnsetType in members:
            others = [m for m in members if m is not UnsetType]
            names = [str(m) if get_args(m) else getattr(m, "__name__", str(m)) for m in others]
            write = " | ".join(names) or "int"
            raise TypeError(
                f"UnsetType is for a field that may be absent; write {name}: {write} | UnsetType "
                f"= UNSET in a class, NotRequired[{write}] in a typed dict"
            )


def limits_of(t: Any) -> list[tuple[str, Any]]:
    """Return the constraints in the metadata of *t*: their names and bounds."""
    pieces = t.__metadata__ if origin_of(t) is typing.Annotated else ()
    return [limit for piece in pieces for limit in _limits_in(piece)]


def _limits_in(piece: Any) -> Iterator[tuple[str, Any]]:
    """Yield the constraints in one piece of metadata. Raises `TypeError` if it is not known."""
    limits = [("", None)]
    if isinstance(piece, msgspec.Meta):
        limits = [*cast(Any, piece).__rich_repr__()]
    elif hasattr(type(piece), "__is_annotated_types_grouped_metadata__"):
        for each in piece:
            yield from _limits_in(each)
        return
    elif dataclasses.is_dataclass(type(piece)):
        limits = [(f.name, getattr(piece, f.name)) for f in dataclasses.fields(piece)]
    for name, bound in limits if (packages := packages_of(piece)) & _ENFORCERS else ():
        # The function of pydantic's AfterValidator is no test, and Not(f) says the contrary of f.
        is_other = name == "func" and ("annotated_types" not in packages or callable(piece))
        if is_other or (name not in _LIMITS and name not in _DESCRIPTIONS):
            raise TypeError(
                f"{piece!r} in Annotated is not enforced; write msgspec.Meta(gt=0), say, "
                f"annotated_types.Predicate(f) for a test, or an attrs class with a validator"
            )
        if name in _LIMITS:
            yield name, bound


def packages_of(value: Any) -> set[str]:
    """Return the packages of *value*, or of its class, and of all base classes."""
    mro = (value if issubclass(type(value), type) else type(value)).__mro__
    return {str(cls.__module__).partition(".")[0] for cls in mro}


def checks_of(t: Any) -> list[Check]:
    """Return the checks for the metadata of *t*. Raises `TypeError` for those of other types."""
    checks: list[Check] = []
    members = [m for m in union_members(bare_type(t)) if m is not types.NoneType]
    limits = limits_of(t)
    times = [bound for name, bound in limits if name in _SIGNS and hasattr(bound, "tzinfo")]
    for name, bound in [*(("tz", each.tzinfo is not None) for each in times), *limits]:
        found = [_check_of(name, bound, class_of(bare_type(m)), m) for m in members]
        if not any(found):
            raise TypeError(f"{name} = {bound!r} does not limit {bare_type(t)}, in {t}")
        checks += filter(None, found)
    return checks


def _check_of(name: str, bound: Any, cls: Any, t: Any) -> Check | None:
    """Return the check of one constraint for the values of *t*, or None if it is for others."""
    if name == "func":
        return (cls if cls in _LEAVES else object), lambda v: v is None or bound(v), _OTHER
    if cls is None:
        return None
    own = "duration" if cls is timedelta else cls.__name__
    what = {list: "array", dict: "object"}.get(cast(Any, kind_of(t)), own)
    text, is_number = f"expected {what}", _is_number(cls)
    is_pair = is_number and _is_number(type(bound))  # 1 is below 1.5
    shown = float(bound) if cls is float and is_pair else bound
    if name in _SIGNS and (is_pair or (isinstance(bound, cls) and kind_of(t) is None)):
        compare, sign = getattr(operator, name), _SIGNS[name]
        if cls is int and type(bound) is int and name in ("gt", "lt"):  # msgspec says it like this
            sign, shown = f"{sign}=", bound + (1 if name == "gt" else -1)
        return cls, lambda v: type(v) is bool or compare(v, bound), f"{text} {sign} {shown}"
    if name == "multiple_of" and is_pair:
        exact: Any = Decimal if issubclass(cls, Decimal) else Fraction
        by = bound if type(bound) is int else exact(str(bound))  # 0.1 is no tenth as a float
        text = f"{text} that's a multiple of {shown}"
        return cls, lambda v: (
            type(v) is bool or v % by == 0
            or (isinstance(v, float) and Fraction(float.__repr__(v)) % by == 0)
        ), text  # fmt: skip
    if name == "pattern" and cls is str:
        search = re.compile(bound).search
        return cls, lambda v: search(v) is not None, f"{text} matching regex {bound!r}"
    if name in _LENGTHS and hasattr(cls, "__len__") and not declares_fields(t):
        compare = _LENGTHS[name]
        text = f"{text} of length {_SIGNS[compare.__name__]} {bound}"
        return cls, lambda v: bound is None or compare(len(v), bound), text
    if name == "tz" and cls in (datetime, time_of_day) and not isinstance(bound, str):
        return cls, *_zone_check(bound, text)
    return None


def _zone_check(zone: Any, text: str) -> tuple[Callable[[Any], bool], str]:
    """Return the test and the text for a time with *zone*, of msgspec or of annotated_types."""
    if zone is None or zone is False:
        return lambda value: value.tzinfo is None, f"{text} with no timezone component"
    if zone is ... or zone is True:
        return lambda value: value.tzinfo is not None, f"{text} with a timezone component"
    if (offset := zone.utcoffset(None)) is None:
        raise TypeError(f"a time in JSON has an offset, and no zone such as {zone}")
    return lambda value: value.utcoffset() == offset, f"{text} with the offset of {zone}"


def _is_number(cls: Any) -> bool:
    """Tell whether *cls* is a class of numbers."""
    return issubclass(cls, (int, float, Decimal)) and not issubclass(cls, bool)


def kind_of(t: Any) -> type | None:
    """Return list if *t* is written as a JSON array, dict for an object, None for anything else."""
    cls = class_of(t)
    if cls is None:
        return None
    if is_struct(t):
        return list if cls.__struct_config__.array_like else dict
    if fields_of(t) is not None or is_typed_dict(cls) or issubclass(cls, Mapping):
        return dict
    is_array = issubclass(cls, (Sequence, Set)) and not issubclass(cls, (str, bytes))
    return list if is_array and not is_leaf(cls) else None


def is_read_in_one_pass(t: Any, seen: list[Any] | None = None) -> bool:
    """Tell whether msgspec reads *t* as cattrs does. *seen* has the classes looked at before."""
    seen = [] if seen is None else seen
    origin, args = origin_of(t) or t, get_args(t)
    if t is Any or t in seen:
        return True
    if t in _LEAVES:
        return t is not Decimal  # msgspec reads all its digits, but cattrs is given a float
    if origin is Literal:
        return all(type(choice) is str for choice in args)  # 1, 1.0 and true would be equal
    if origin_of(t) is typing.Annotated:
        others = [each for each in t.__metadata__ if not isinstance(each, msgspec.Meta)
                  or Fraction(str(by := each.multiple_of or 0)) != by]  # fmt: skip
        is_limited_alike = not any([*_limits_in(each)] for each in others)
        return is_limited_alike and is_read_in_one_pass(t.__origin__, seen)
    if origin is dict and args[:1] not in ((), (str,)):
        return False  # msgspec reads keys by rules of its own
    if origin in (dict, list, set, frozenset, tuple, *_UNIONS):
        args = tuple(arg for arg in args if arg not in (Ellipsis, UnsetType))
        return all(is_read_in_one_pass(arg, seen) for arg in args)
    if not inspect.isclass(t):
        return False
    if is_text_enum(t):
        return True
    seen.append(t)
    if is_typed_dict(t):
        if is_closed(t):
            return False  # msgspec ignores other keys
        hints = t.__annotations__.values()
        inner: list[Any] | None = [get_args(u)[0] if is_qualified(u) else u for u in hints]
    elif is_struct(t):
        inner = [field.type for field in msgspec.structs.fields(cast(Any, t))]
    else:
        inner = _types_of_fields(t)
    return inner is not None and all(is_read_in_one_pass(u, seen) for u in inner)


def is_text_enum(cls: Any) -> bool:
    """Tell whether *cls* is an enum of texts without code of its own to find a member."""
    if not issubclass(cls, enum.Enum):
        return False
    get = inspect.getattr_static  # msgspec calls _missing_, and cattrs does not
    is_plain = all(get(cls, name) == get(enum.Enum, name) for name in ("_missing_", "__init__"))
    return is_plain and all(type(member.value) is str for member in cls)


def _types_of_fields(cls: Any) -> list[Any] | None:
    """Return the types of the fields, or None if the constructor of *cls* has more to do."""
    fields, is_attrs = fields_of(cls), attrs.has(cls)
    functions = {vars(cls).get("__init__"), cls.__setattr__} - {object.__setattr__}
    codes = [getattr(function, "__code__", None) for function in functions]
    made_in = ("<attrs generated ", _ATTRS_FILE) if is_attrs else ("<string>",)
    if (
        fields is None or type(cls) is not type or (is_attrs and dataclasses.is_dataclass(cls))
        # What dataclasses make is in no file, and so is all the code of a console.
        or not all(code and code.co_filename.startswith(made_in) for code in codes)
        or not (is_attrs or hasattr(sys.modules.get(cls.__module__), "__file__"))
        # A constructor sets such a hash; a method of the class itself runs when an object is made.
        or (is_attrs and attrs.inspect(cls).hashability.name == "HASHABLE_CACHED")
        or any(getattr(cls, name, None) is not getattr(object, name, None) for name in _MAKING)
    ):  # fmt: skip
        return None
    hints = typing.get_type_hints(cls, include_extras=True)  # msgspec goes by these
    is_plain = all(
        f.init and f.type == hints.get(f.name) and getattr(f, "alias", f.name) == f.name
        and not (getattr(f, "converter", None) or getattr(f.default, "takes_self", False))
        # msgspec takes an attribute of the class for a value that is set, and sets no default.
        and (not hasattr(cls, f.name) or inspect.ismemberdescriptor(getattr(cls, f.name)))
        for f in fields
    )  # fmt: skip
    return [f.type for f in fields] if is_plain else None


# ── envelope and message ──────────────────────────────────────────────────────────────────────
#
# An envelope is a text frame's type, id and payload. A message class is a payload with a type.

_MAX_DEPTH = 128  # levels of arrays and objects in a frame; recursive code can go far deeper
_NOT_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[^][{}"]+', re.DOTALL)  # linear in any text
# A frame's brackets and members named "id", with their values if these may be ids. Linear as well.
_STRING, _ID = r'"(?:[^"\\]++|\\.)*+"', r'"(?:i|\\u0069)(?:d|\\u0064)"'
_BRACKETS_AND_IDS = re.compile(
    rf"([\[{{]++|[\]}}]++)|{_ID}\s*+:(?:\s*+({_STRING}|-?[0-9]++)(?=\s*+[,}}]))?()"
    rf'|(?:(?!{_ID}\s*+:){_STRING}?|[^][{{}}"]++)++',
    re.DOTALL,
)
_MAX_STEPS = 20_000  # brackets passed on the search for an id: some 20 milliseconds
_RESERVED = frozenset({"error", "complete", "gap", "resume", "authenticate"})
_EXACT: dict[Any, Callable[[Any], Any]] = {  # classes, and what makes one of a subclass's value
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
    bytes: lambda value: bytes(memoryview(value)),
    bytearray: lambda value: bytes(memoryview(value)),
    datetime: lambda value: datetime.fromisoformat(datetime.isoformat(value)),
    date: lambda value: date.fromisoformat(date.isoformat(value)),
    time_of_day: lambda value: time_of_day.fromisoformat(time_of_day.isoformat(value)),
    timedelta: lambda value: timedelta(value.days, value.seconds, value.microseconds),
    UUID: lambda value: UUID(int=value.int),
    Decimal: Decimal,
    msgspec.Raw: msgspec.json.decode,  # only `msgspec.to_builtins` asks for this
}
_JSON_NAMES: dict[Any, str] = {dict: "object", list: "array", types.NoneType: "null"}
# What goes out as it is: in a text frame if a fallback returns it, or in a binary frame.
AS_THEY_ARE: dict[type, tuple[type, ...]] = {str: (str,), bytes: (bytes, bytearray, memoryview)}


class Envelope(msgspec.Struct, frozen=True):  # PERF: attrs' takes three times as long to make.
    """A message as middleware sees it, and as `Hub.listen` and `Hub.history` yield it."""

    type: str  # "" for what the fallback or the binary handler takes
    payload: Any  # the handler gets this; a dict by name for keyword-only parameters
    id: Id | None = None
    group: str | None = None  # the one that it was sent to
    at: str | None = None  # its position, if the group is kept


def _refuse_change(*_: object) -> typing.NoReturn:
    raise attrs.exceptions.FrozenInstanceError


# msgspec would raise a plain `AttributeError`, and takes no method of this name from the class.
setattr(Envelope, "__setattr__", _refuse_change)  # noqa: B010 - type checkers refuse to assign it


class Frame(msgspec.Struct):
    """The content of a text frame. Unknown keys are ignored."""

    type: str
    id: Id | None = None
    payload: Any = UNSET


class Received(msgspec.Struct, gc=False):
    """A frame of a known type. Each type has a class of its own, made by `frame_class`."""

    is_built: typing.ClassVar[bool] = False  # whether the payload is what the handler takes
    handler: typing.ClassVar[Any] = None  # the `Handler` of the type, or None
    id: Id | None = None
    payload: Any = UNSET


def frame_class(type: str, payload: Any, **members: Any) -> FrameClass:
    """Make the class of the frames of *type*, or raise `TypeError` if msgspec cannot build it."""
    cls = msgspec.defstruct(
        "Received", [("payload", payload | UnsetType, UNSET)], bases=(Received,),
        namespace=members, tag_field="type", tag=type, gc=False,
    )  # fmt: skip
    msgspec.json.Decoder(cls)
    return cast(FrameClass, cls)


def decoder_of(frames: Iterable[FrameClass]) -> Callable[[str], Received]:
    """Return a function that decodes a text frame as the one of *frames* for its type."""
    # `_no_frame` belongs to no handler. For a single class, msgspec would need no type in a frame.
    return msgspec.json.Decoder(Union[(_no_frame, *frames)]).decode


class Sent(msgspec.Struct, omit_defaults=True, gc=False):
    """The content of a text frame to send. Defaults are left out."""

    type: str
    id: Id | None = None
    payload: Any = UNSET
    group: str | None = None
    more: bool = False


class Binary(bytes):
    """The content of a binary frame. That of a text frame is plain `bytes`."""


class BadFrame(MessageError):
    """A text frame that is no envelope. The answer has its *id*, if there is one."""

    def __init__(self, code: str, message: str, id: Id | None = None) -> None:
        super().__init__(code, message)
        self.id = id


_no_frame = frame_class("$none", Any)
_decode_frame = msgspec.json.Decoder(Frame).decode


def exact(value: Any) -> Any:
    """Return what to encode for a *value* that msgspec does not know. Raises `TypeError`.

    msgspec wants exact types. A subclass of a scalar, such as `markupsafe.Markup` or
    `numpy.float64`, goes out as the scalar that it is. A `bool` comes here as a key only.
    """
    if isinstance(value, bool):
        return str(value).lower()
    for scalar, make in _EXACT.items():
        if isinstance(value, scalar):
            return make(value)
    raise TypeError(f"Encoding objects of type {type(value).__name__} is unsupported")


_encode = msgspec.json.Encoder(enc_hook=exact).encode


def encode(value: Any) -> bytes:
    """Return *value* as JSON, with U+FFFD for each half of a surrogate pair in its texts."""
    try:
        return _encode(value)
    except UnicodeEncodeError:
        return _encode(_whole_in(msgspec.to_builtins(value, enc_hook=exact)))


def _whole_in(value: Any) -> Any:
    """Return the JSON value *value* with `whole` texts."""
    if isinstance(value, dict):
        return {_whole_in(key): _whole_in(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_whole_in(item) for item in value]
    return whole(value) if isinstance(value, str) else value


def gap_of(group: str | None) -> bytes:
    """Return the ``gap`` frame: messages to *group*, or to no group if it is None, were lost."""
    return encode(Sent("gap", payload={"group": group}))


def is_too_deep(text: str) -> bool:
    """Tell whether *text*, if it is JSON, nests deeper than `_MAX_DEPTH`."""
    if text.count("[") + text.count("{") <= _MAX_DEPTH:
        return False
    steps = (1 if bracket in "[{" else -1 for bracket in _NOT_BRACKETS.sub("", text))
    return max(itertools.accumulate(steps), default=0) > _MAX_DEPTH


def id_in(text: str) -> Id | None:
    """Return the id in *text*, an object that is not read as JSON; None if there is none."""
    depth, found = 0, None
    for match in itertools.islice(_BRACKETS_AND_IDS.finditer(text), _MAX_STEPS):
        if match[1]:
            depth += len(match[1]) * (1 if match[1][0] in "[{" else -1)
            if depth <= 0:
                break
        elif depth == 1 and match[3] is not None:
            found = match[2]  # Of several members, the last one counts.
    with contextlib.suppress(ValueError, msgspec.MsgspecError):
        if found is not None and text.lstrip().startswith("{"):
            return msgspec.json.decode(found, type=Id)
    return None


def decode_or_error(text: str) -> Frame | BadFrame:
    """Decode one text frame, or return the error. Raised, it would be the context of later ones."""
    if is_too_deep(text):
        return BadFrame("invalid_json", f"nested deeper than {_MAX_DEPTH} levels", id_in(text))
    with contextlib.suppress(msgspec.MsgspecError, UnicodeError):
        return _decode_frame(text)
    try:
        value = msgspec.json.decode(text)
    except UnicodeError:
        return BadFrame("invalid_json", "half of a surrogate pair is no text", id_in(text))
    except msgspec.MsgspecError as exc:
        what, _, _ = str(exc).partition(" - at ")  # The path is the decoder's: `$[...]`
        return BadFrame("invalid_json", what, id_in(text))
    id = value.get("id") if type(value) is dict else None
    is_wrong = id is not None and type(id) not in (str, int)
    if type(value) is not dict:
        text = f'a message is an object with a "type", got {json_name(value)}'
    elif not isinstance(value.get("type"), str):
        text = f'"type" is a string, got {json_name(value["type"]) if "type" in value else "none"}'
    elif is_wrong:
        text = f'"id" is a string or an integer, got {json_name(id)}'
    else:  # msgspec has refused an earlier "type" or "id"; the last one is right
        text = '"type" or "id" is there twice'
    return BadFrame("invalid_envelope", text, None if is_wrong else id)


def is_answer(type: str) -> bool:
    """Tell whether a message of *type* from a client answers the server and gets no answer."""
    return type == "error" or type.endswith(".reply")


def json_name(value: object) -> str:
    """Return what JSON calls the kind of *value*."""
    return _JSON_NAMES.get(type(value), type(value).__name__)


# For type checkers this comes on top of `attrs.define` and `attrs.frozen`: what it says of freezing
# and comparing would count for their classes as well, so it says neither.
@typing.dataclass_transform(eq_default=False, field_specifiers=(attrs.field,))
def message(type: str) -> Callable[[type[T]], type[T]]:
    """Tag a class as the message *type*, so that it can be received, returned and sent.

    A plain annotated class becomes `attrs.frozen`; an attrs class, a dataclass or a
    `msgspec.Struct` is only tagged. Raises `PachinkoError` for anything else, and for a default
    that all messages would share.
    """
    if not isinstance(type, str):
        raise PachinkoError(f'@message takes a type; write @message("say") above {type!r}')
    type = check_type(type)
    namespaces = caller_namespaces()

    def tag(cls: Any) -> Any:
        if not inspect.isclass(cls):
            raise PachinkoError(f'@message("{type}") goes above a class, not above {cls!r}')
        own = {"__attrs_attrs__", "__dataclass_fields__"} & vars(cls).keys()
        if not own and not is_struct(cls):
            cls = _make_frozen(cls)
        _check_defaults(cls)
        setattr(cls, "__message_type__", type)  # noqa: B010 - it is declared on no class
        with contextlib.suppress(Exception):  # registration resolves it again, and says what fails
            resolve_class(cls, *namespaces)
        return cls

    return tag


def _make_frozen(cls: Any) -> Any:
    """Make a frozen attrs class of the plain class *cls*, or raise `PachinkoError`."""
    is_plain = type(cls).__module__ in ("builtins", "abc", "typing") and (
        "__init__" not in vars(cls)
        if attrs.has(cls)
        else cls.__init__ is object.__init__ and cls.__new__ is object.__new__
    )
    if not is_plain:
        raise PachinkoError(
            f"@message cannot make an attrs class of {cls.__name__}, which has a constructor or "
            f"metaclass of its own; write a plain class, `class {cls.__name__}: text: str`, an "
            f"attrs class or a dataclass"
        )
    return attrs.frozen(cls)


def _check_defaults(cls: Any) -> None:
    """Raise `PachinkoError` for a default that all objects of *cls* share and one may change."""
    for field in attrs.fields(cls) if attrs.has(cls) else ():  # dataclasses do this themselves
        default, name = field.default, field.name
        if type(default).__hash__ is None:  # Dataclasses tell a mutable one like this.
            kind = type(default).__name__
            is_empty = type(default) in (list, dict, set) and not default
            factory = kind if is_empty else f"lambda: {kind}(...)"
            raise PachinkoError(
                f"all messages would share the default of {cls.__name__}.{name}; write "
                f"`{name}: ... = attrs.field(factory={factory})`"
            )


def check_type(type: str) -> str:
    """Return *type*, perhaps a member of an enum, as it is on the wire.

    Raises `PachinkoError` for a message type that is empty or reserved for the library.
    """
    if not type or type in _RESERVED or type.startswith("$") or type.endswith(".reply"):
        raise PachinkoError(
            f'{type!r} is reserved, as are "", {", ".join(sorted(_RESERVED))}, "$…" and "….reply"; '
            f'choose another message type, such as "chat.say"'
            f"{', or write @ws.authenticate' if type == 'authenticate' else ''}"
        )
    return whole(type)


def message_type(cls: Any) -> str | None:
    """Return the type that *cls* itself was tagged with; a subclass does not inherit it."""
    return cast("str | None", getattr(cls, "__dict__", {}).get("__message_type__"))


def split_message(
    message: object, payload: object, *, takes_bytes: bool = False
) -> tuple[str, object]:
    """Return the type and payload of what a ``send`` was given. Raises `TypeError` with a hint.

    If it *takes_bytes*, these have the type ``""``, and the payload is a copy of what may change.
    """
    cls = type(message)
    if (tagged := message_type(cls)) is not None:
        if payload is None:
            return tagged, message
        raise TypeError(f"{cls.__name__} is a whole message; send it without a payload beside it")
    if not isinstance(message, str):
        if takes_bytes and isinstance(message, AS_THEY_ARE[bytes]):
            if payload is not None:
                raise TypeError(
                    "bytes go out alone, as a binary frame; write send(data), or, as base64 in a "
                    'message, send("file", {"data": data})'
                )
            # Servers take no subclass, whose own `__bytes__` could return anything.
            return "", message if cls is bytes else bytes(memoryview(cast(bytes, message)))
        raise TypeError(
            f'a message is an object of a class with @message("…"), or a type and its payload, as '
            f'in send("said", {{"text": "hi"}}); got {message if cls is type else cls.__name__}'
        )
    if not message or (payload is None and any(map(str.isspace, message))):
        raise TypeError(f'{message!r} is no message type; write send("text", {message!r})')
    return message, payload


def caller_namespaces() -> Namespaces:
    """Return where to look up names in annotations: what the caller's caller sees."""
    frame = cast(Any, inspect.currentframe()).f_back.f_back
    return frame.f_globals, dict(frame.f_locals)


# ── unions ────────────────────────────────────────────────────────────────────────────────────
#
# The classes in a union are told apart by the keys of the JSON object: first by a tag, which is a
# key with a `Literal` value, then by the keys that are required. Going out, the class of a value
# names its member; only typed dicts are told apart by their keys again.


@attrs.frozen
class Shape:
    """The keys of the JSON objects that are made of, or go out as, *type*."""

    type: Any
    keys: set[str]
    required: set[str]
    literals: dict[str, list[Any]]  # the values of the keys with a `Literal`
    tags: set[str] = attrs.Factory(set)  # the keys that tell this type from another

    def takes(self, value: Mapping[str, Any], key: str) -> bool:
        """Tell whether *value* has one of the right values under *key*."""
        found = value.get(key, UNSET)
        return any(map(functools.partial(_is_same, found), self.literals[key]))

    def is_of(self, value: Mapping[str, Any]) -> bool:
        """Tell whether *value* has the tags and the required keys of this type."""
        has_keys = value.keys() >= self.required
        return has_keys and all(map(functools.partial(self.takes, value), self.tags))

    def known(self, value: Mapping[str, Any]) -> int:
        """Return how many keys of *value* this type has."""
        return sum(key in value for key in self.keys)

    def is_told_from(self, other: Shape) -> bool:
        """Tell whether the keys decide between this type and *other*. Note the tags that do."""
        for key in self.literals.keys() & other.literals.keys():
            pairs = itertools.product(self.literals[key], other.literals[key])
            if not any(itertools.starmap(_is_same, pairs)):
                self.tags.add(key)
                other.tags.add(key)
        has_own = not (self.required <= other.keys and other.required <= self.keys)
        return has_own or bool(self.tags & other.tags)


def _is_same(one: Any, other: Any) -> bool:
    """Tell whether two JSON values are one: ``1 == True == 1.0``, but not in JSON."""
    one = one.value if isinstance(one, enum.Enum) else one
    return type(one) is type(other) and bool(one == other)


def items_of(t: Any, converter: cattrs.Converter) -> list[Item]:
    """Return the fields of a class or a typed dict, as *converter* reads them."""
    if is_struct(t):
        return [(f.name, f.encode_name, f.type, f.required) for f in msgspec.structs.fields(t)]
    if (fields := fields_of(t)) is not None:
        use_alias = getattr(converter, "use_alias", False)
        found: list[Item] = [
            (f.name, getattr(f, "alias", f.name) if use_alias else f.name, f.type, is_required(f))
            for f in fields if f.init
        ]  # fmt: skip
    else:
        hints, required = class_of(t).__annotations__, class_of(t).__required_keys__
        found = [(key, key, hint, key in required) for key, hint in hints.items()]
    overrides: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # A type that only goes out may have no hook.
        overrides = getattr(converter.get_structure_hook(t), "overrides", {})
    keys = {name: each.rename for name, each in overrides.items()}
    omitted = {name for name, each in overrides.items() if each.omit}
    return [(item[0], keys.get(item[0]) or item[1], *item[2:])
            for item in found if item[0] not in omitted]  # fmt: skip


def is_required(field: Any) -> bool:
    """Tell whether a field of an attrs class or a dataclass has no default."""
    defaults = field.default, getattr(field, "default_factory", attrs.NOTHING)
    return all(each is attrs.NOTHING or each is dataclasses.MISSING for each in defaults)


def key_of(t: Any, name: str, converter: cattrs.Converter) -> str:
    """Return the key on the wire of the field *name* of *t*."""
    with contextlib.suppress(Exception):  # *t* may be of any kind, and a user's hook may raise
        return next(key for each, key, *_ in items_of(t, converter) if each == name)
    return name


def shapes_of(members: Iterable[Any], converter: cattrs.Converter) -> list[Shape]:
    """Return the shapes of *members*. Raises `TypeError` if two of them cannot be told apart."""
    shapes = [_shape_of(member, converter) for member in members]
    for pair in itertools.combinations(shapes, 2):
        have_fields = all(declares_fields(bare_type(shape.type)) for shape in pair)
        if have_fields and pair[0].is_told_from(pair[1]):
            continue
        why = "each is an object; write a class with fields instead of the dict"
        if have_fields:
            tags = [f'`kind: Literal["{class_of(bare_type(s.type)).__name__}"]`' for s in pair]
            why = f"neither has a required key that the other lacks; tag them: {' and '.join(tags)}"
        names = " | ".join(shown(shape.type) for shape in pair)
        raise TypeError(f"{names} cannot be told apart: {why}")
    return shapes


def _shape_of(t: Any, converter: cattrs.Converter) -> Shape:
    """Return the shape of a type with fields; that of a mapping has no keys."""
    bare = bare_type(t)
    items = items_of(bare, converter) if declares_fields(bare) else []
    literals = {
        key: [msgspec.to_builtins(each) for each in get_args(bare_type(u))]
        for _, key, u, _ in items if origin_of(bare_type(u)) is Literal
    }  # fmt: skip
    if is_struct(bare) and (config := class_of(bare).__struct_config__).tag is not None:
        literals[config.tag_field] = [config.tag]
    required = {key for _, key, _, is_needed in items if is_needed}
    return Shape(t, {key for _, key, *_ in items} | literals.keys(), required, literals)


def best_of(value: Mapping[str, Any], shapes: Iterable[Shape]) -> Shape | None:
    """Return the shape that fits *value* and knows most of its keys, or None."""
    fits = [shape for shape in shapes if shape.is_of(value)]
    if len(fits) == 1:
        return fits[0]
    return max(fits, key=lambda shape: shape.known(value), default=None)


def nearest_to(value: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    """Return the shape that *value* was meant for. Raises an error for its tag, or for all."""
    right = [s for s in shapes if s.tags and all(s.takes(value, key) for key in s.tags)]
    counts = collections.Counter(key for shape in shapes for key in sorted(shape.tags))
    for key, count in counts.most_common() if not right else ():
        if key not in value and count == len(shapes):
            raise _error_at(key, KeyError(key))
        tagged = [shape for shape in shapes if key in shape.tags]
        if key in value and not any(shape.takes(value, key) for shape in tagged):
            found = [_encode(each).decode() for shape in tagged for each in shape.literals[key]]
            text = f"expected one of {', '.join(dict.fromkeys(found))}"
            raise _error_at(key, msgspec.ValidationError(text))
    rest = right or [shape for shape in shapes if not shape.tags] or shapes
    rest = sorted(rest, key=lambda shape: shape.known(value), reverse=True)
    if len(rest) > 1 and rest[0].known(value) == rest[1].known(value):
        keys = [" and ".join(f'"{key}"' for key in sorted(each.required)) for each in rest]
        raise msgspec.ValidationError(f"expected an object with {' or '.join(filter(None, keys))}")
    return rest[0]


def _error_at(key: str, error: Exception) -> Exception:
    """Return *error* as that of one field of an object."""
    error.add_note(cast(Any, cattrs.AttributeValidationNote)("", key, Any))
    group: Any = cattrs.ClassValidationError
    return cast(Exception, group("no member of a union", [error], dict))


def declared_member(value: object, members: Members) -> Any:
    """Return the member whose fields *value* is sent with, or its own class if no member fits."""
    exact = [m for m, cls in members if cls is type(value)]
    bases = [m for m, cls in members if isinstance(value, cls)]
    return (exact or bases or [type(value)])[0]


def members_of(t: Any) -> Members:
    """Return the members of the union *t*, or *t* itself, with the classes of their values."""
    if origin_of(bare_type(t)) in _UNIONS:
        pairs = [pair for member in get_args(bare_type(t)) for pair in members_of(member)]
        dicts = [member for member, _ in pairs if is_typed_dict(class_of(bare_type(member)))]
        # They have one class, and are told apart by their keys.
        one: Any = Union[tuple(dicts)] if dicts else None  # noqa: UP007 - of a tuple
        others = [pair for pair in pairs if pair[0] not in dicts]
        return [*others, (one, dict)] if len(dicts) > 1 else pairs
    cls = _written_class(t)
    return [] if cls is None else [(t, cls)]


def _written_class(t: Any) -> Any:
    """Return the class of the values that are sent as *t*, or None if it has none."""
    cls = class_of(bare_type(t))
    return dict if is_typed_dict(cls) else cls


def union_unstructure_hook(t: Any, converter: cattrs.Converter) -> Callable[[Any], Any]:
    """Make the hook of a union. Raises `PachinkoError` if values do not tell their member."""
    members, own = members_of(t), union_members(t)
    if len(own) > 1 and all(is_typed_dict(class_of(bare_type(member))) for member in own):
        return _dicts_unstructure_hook(own, converter)
    for (one, cls), (other, _) in itertools.combinations(members, 2):
        is_ambiguous = _share_values(one, other) and not _are_written_alike(one, other, converter)
        if is_ambiguous and (_has_fields(one) or _has_fields(other)):
            raise PachinkoError(
                f"{shown(one)} | {shown(other)} may lose fields: a {cls.__name__} does not tell "
                f"as which of the two it goes out; write {advice_for(one, other)}"
            )
    return lambda value: converter.unstructure(value, declared_member(value, members))


def _dicts_unstructure_hook(
    members: Iterable[Any], converter: cattrs.Converter
) -> Callable[[Any], Any]:
    """Make the hook of a union of typed dicts. Raises `PachinkoError` if it is ambiguous."""
    try:
        shapes = shapes_of(members, converter)
    except TypeError as exc:
        raise PachinkoError(f"{exc}, or write classes with @attrs.frozen instead") from None

    def unstructure(value: Any) -> Any:
        shape = best_of(value, shapes) or max(shapes, key=lambda shape: shape.known(value))
        return converter.unstructure(value, shape.type)

    return unstructure


def advice_for(one: Any, other: Any) -> str:
    """Return what to write instead of the ambiguous ``one | other``, such as ``list[A | B]``."""
    pairs = [*zip(get_args(one), get_args(other), strict=False)]
    is_nested = any(a != b and (_share_values(a, b) or Ellipsis in (a, b)) for a, b in pairs)
    if origin_of(one) is not origin_of(other) or not pairs or is_nested:
        return "classes with @attrs.frozen instead, which are told apart"
    items = [shown(a if a is b else a | b) for a, b in pairs]
    return f"{shown(origin_of(one))}[{', '.join(items)}]"


def shown(t: Any) -> str:
    """Return *t* as it is written in code."""
    return re.sub(r"[\w.<>]+\.(?=\w)", "", repr(cast(Any, list)[t]).removeprefix("list[")[:-1])


def _has_fields(t: Any, outer: tuple[Any, ...] = ()) -> bool:
    """Tell whether a type with fields is in *t*. A ``type`` statement may contain itself."""
    t, inner = bare_type(t), (*outer, t)
    return declares_fields(t) or any(_has_fields(a, inner) for a in get_args(t) if a not in outer)


def _share_values(one: Any, other: Any) -> bool:
    """Tell whether a value may be of either type: a list, of ``Sequence[A]`` and ``list[B]``."""
    first, second = _written_class(one), _written_class(other)
    if first is second:
        return first is not None
    if any(kind_of(cls) is None or declares_fields(cls) for cls in (first, second)):
        return False
    is_below = issubclass(first, second) or issubclass(second, first)
    return is_below and (inspect.isabstract(first) or inspect.isabstract(second))


def _are_written_alike(one: Any, other: Any, converter: cattrs.Converter) -> bool:
    """Tell whether a value becomes the same JSON by either of the two types."""
    one, other = bare_type(one), bare_type(other)
    args, others = get_args(one), get_args(other)
    if args and args == others:
        return True
    if args and len(args) == len(others) and class_of(one) is class_of(other):
        pairs = zip(args, others, strict=True)
        return all(_are_written_alike(a, b, converter) for a, b in pairs)
    if declares_fields(one) or declares_fields(other):
        return one is other
    return bool(converter.get_unstructure_hook(one) == converter.get_unstructure_hook(other))


# ── sending ───────────────────────────────────────────────────────────────────────────────────
#
# A payload that cannot be sent is looked into, to tell a developer which part of it is why.


def unsendable(
    value: Any, t: Any, reason: Exception, converter: cattrs.Converter, path: str = "$.payload"
) -> tuple[str, str, Exception]:
    """Return path, class and error of the innermost part of *value*, a *t*, that cannot be sent."""
    for key in value if isinstance(value, Mapping) else ():
        try:
            encode(converter.unstructure({key: None}))
        except Exception as exc:  # A hook may raise anything.
            return path, f"{_class_name(key)} as a key", exc
    for step, part, inner in _parts_of(value, t, converter):
        try:
            encode(converter.unstructure(part, inner))
        except Exception as exc:  # A hook may raise anything.
            return unsendable(part, inner, exc, converter, path + step)
    return path, _class_name(value), reason


def _class_name(value: object) -> str:
    """Return the name of the class of *value*, such as ``numpy.bool`` where Python has another."""
    cls = type(value)
    is_known = getattr(builtins, cls.__name__, cls) is cls
    return cls.__name__ if is_known else f"{cls.__module__}.{cls.__name__}"


def _parts_of(value: Any, t: Any, converter: cattrs.Converter) -> Iterator[tuple[str, Any, Any]]:
    """Yield step, value and declared type of each part of *value*, which is declared as *t*."""
    t = bare_type(t)
    args = [None if isinstance(arg, TypeVar) else arg for arg in get_args(t)]
    if origin_of(t) in _UNIONS:
        args = []
    if isinstance(value, Mapping):
        hints = typing.get_type_hints(t) if typing.is_typeddict(t) else {}
        for key, part in value.items():
            yield _step(key), part, hints.get(key, args[1] if len(args) == 2 else None)
    elif declares_fields(type(value)) and not isinstance(value, tuple):
        is_declared = declares_fields(t) and class_of(t) in type(value).__mro__
        for name, key, inner, _ in items_of(t if is_declared else type(value), converter):
            part = getattr(value, name, None)
            if part is not UNSET:
                yield _step(key), part, None if free_variables(inner) else inner
    elif isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes)):
        is_fixed = class_of(t) is tuple and Ellipsis not in args
        inner = args if is_fixed else args[:1] * len(value)
        for index, pair in enumerate(itertools.zip_longest(value, inner)):
            yield f"[{index}]", *pair


def _step(key: Any) -> str:
    """Return the step to *key* in a path."""
    name = str(key)[:_KEY_SHOWN]
    return f".{name}" if name.isidentifier() else f'["{name}"]'


# ── structuring ───────────────────────────────────────────────────────────────────────────────
#
# The hooks by which cattrs makes what handlers take of JSON values. Each JSON kind stands for
# itself, and nothing is coerced. A scalar goes through `msgspec.convert`, which gives one rule and
# one wording for all of them. The kind of an array or object is checked before its items are read.

_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?").fullmatch
_TEXT_KEY = object()  # Annotated[int, _TEXT_KEY] is an int that is the key of a JSON object
_ITEM = object()  # list[_ITEM] has items that come with their own hook and type
_ARRAYS: dict[Any, Any] = {  # the declared class of an array, and the class that is made of it
    list: list, MutableSequence: list, tuple: tuple, Sequence: tuple, set: set, MutableSet: set,
    frozenset: frozenset, Set: frozenset, collections.deque: collections.deque,
}  # fmt: skip


def _allow_recursion(make: HookFactory) -> HookFactory:
    """Wrap *make*, which makes the hook of a type, so that a type may contain itself."""
    # Whoever needs a hook that is being made gets a stand-in, which calls the finished hook later.
    # Without one, cattrs would treat an inner value by its class instead of the declared type.
    in_progress: dict[Any, Callable[..., Any]] = {}

    def factory(t: Any, converter: cattrs.Converter) -> Callable[..., Any]:
        key = (id(converter), t)
        made = functools.cache(lambda: make(t, converter))

        def stand_in(*args: Any) -> Any:
            return made()(*args)

        if key in in_progress:
            return in_progress[key]
        in_progress[key] = stand_in
        try:
            return made()
        except RecursionError:  # cattrs is busy with the same generic class, such as Box[Box[int]]
            return stand_in
        finally:
            del in_progress[key]

    return factory


class _OfLeaf(abc.ABC):  # noqa: B024 - it has no methods, because no object is one
    """A class below one of `_LEAVES`, such as ``Color(str, Enum)``.

    cattrs goes by base classes, and would give such a class the hook of the leaf.
    """

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return other not in _LEAVES and any(issubclass(other, leaf) for leaf in _LEAVES)


def _structure_of_leaf(value: Any, t: Any) -> Any:
    return leaf_hook_of(t)(value, t)


@functools.cache
def leaf_hook_of(t: Any) -> Hook:
    """Return the hook of a class below a scalar's. Raises for any but an enum."""
    if not issubclass(t, enum.Enum):
        raise cattrs.StructureHandlerNotFoundError(f"register a structure hook for {t!r}", t)
    return _leaf_hook(t)


def _union_hook(t: Any, converter: cattrs.Converter) -> Hook:
    """Make the hook of a union that goes by the JSON kind of the value."""
    groups: dict[Any, list[Any]] = {}  # The kinds are NoneType, list, dict and None.
    for member in union_members(t):
        kinds = {u if u is types.NoneType else kind_of(bare_type(u))
                 for u in union_members(bare_type(member))}  # fmt: skip
        for kind in kinds if member is not UnsetType else ():
            groups.setdefault(kind, []).append(member)
    hooks = {kind: _group_hook(kind, members, t, converter) for kind, members in groups.items()}
    # `other` takes scalars, and refuses a value of a kind that is not in the union.
    other = hooks.get(None) or next(iter(hooks.values()))

    def structure(value: Any, _: Any) -> Any:
        hook, member = hooks.get(type(value), other)
        return hook(value, member)

    return structure


def _group_hook(
    kind: Any, members: list[Any], t: Any, converter: cattrs.Converter
) -> tuple[Hook, Any]:
    """Return the hook, and the type that it takes, of the members of *t* with one JSON kind."""
    if len(members) == 1 or kind is types.NoneType:
        member = members[0] if len(members) == 1 else kind
        return converter.get_structure_hook(member), member
    union: Any = Union[tuple(members)]  # noqa: UP007 - of a tuple
    if kind is dict:
        return _classes_hook(members, converter), union
    if kind is list:
        one, other = members[:2]
        raise TypeError(f"{shown(t)} has two types for an array; write {advice_for(one, other)}")
    if not is_leaf(union):
        raise cattrs.StructureHandlerNotFoundError(f"register a structure hook for {union}", union)
    return _leaf_hook(union), union


def _classes_hook(members: list[Any], converter: cattrs.Converter) -> Hook:
    """Make the hook of a union of types with fields, which goes by the keys of the value."""
    shapes = shapes_of(members, converter)
    hooks = {id(shape): converter.get_structure_hook(shape.type) for shape in shapes}

    def structure(value: Any, _: Any) -> Any:
        if type(value) is not dict:
            raise msgspec.ValidationError(f"expected object, got {json_name(value)}")
        shape = best_of(value, shapes) or nearest_to(value, shapes)
        return hooks[id(shape)](value, shape.type)

    return structure


def _decimal(value: Any, t: Any) -> Any:
    """Structure a type that may be a `Decimal`, whose text is written as a JSON number is."""
    made = msgspec.convert(value, t)
    if type(made) is Decimal and type(value) is str and not _NUMBER(value):
        raise msgspec.ValidationError("invalid decimal string")
    return made


def _leaf_hook(t: Any) -> Hook:
    """Make the hook of a scalar. It compares value *and* type, because ``1 == True == 1.0``."""
    named = union_members(t)
    members = tuple(m for each in named for m in union_members(bare_type(each)))
    hook = _scalar_hook(members, t)
    checks = [check for each in named for check in checks_of(each)]
    return (lambda value, t: enforce(hook(value, t), checks)) if checks else hook


def _scalar_hook(members: tuple[Any, ...], t: Any) -> Hook:
    """Make the hook of the scalar types *members*, which *t* stands for."""
    leaves = tuple(member for member in members if member in _LEAVES)
    leaf: Any = Union[leaves] if leaves else None  # noqa: UP007 - of a tuple
    msgspec.json.Decoder(leaf)  # It raises TypeError if JSON is ambiguous: UUID | datetime
    convert: Hook = _decimal if Decimal in leaves else msgspec.convert
    if leaves == members:
        return convert if leaf == t else lambda value, _: convert(value, leaf)
    named = [c for m in members if m not in leaves for c in get_args(m) or m]  # Literal or Enum
    values = [msgspec.to_builtins(getattr(choice, "value", choice)) for choice in named]
    if odd := [c for c, v in zip(named, values, strict=True) if kind_of(type(v)) or type(v) is set]:
        raise TypeError(f"{odd[0]!r} is no JSON scalar; give it a text or a number as its value")
    choices = {(type(value), value): c for value, c in zip(values, named, strict=True)}
    text_enums: list[Any] = [m for m in members if inspect.isclass(m) and is_text_enum(m)]
    flags: list[Any] = [m for m in members if inspect.isclass(m) and issubclass(m, enum.Flag)]
    names = [_encode(value).decode() for value in values]
    names += [_JSON_NAMES.get(leaf) or str(leaf.__name__) for leaf in leaves]
    text = f"expected one of {', '.join(names)}{', or a sum of them' if flags else ''}"

    def structure(value: Any, _: Any) -> Any:
        with contextlib.suppress(KeyError, TypeError):  # TypeError: *value* cannot be hashed
            return choices[type(value), value]
        for cls in text_enums if type(value) is str else ():
            with contextlib.suppress(ValueError):  # an enum may have further values for a member
                return cls(value)
        for cls in flags if type(value) is int else ():
            mask = functools.reduce(operator.or_, (member.value for member in cls), 0)
            if cast(int, value) & ~mask == 0:  # a number below 0 has all bits beyond the mask
                return cls(value)
        with contextlib.suppress(msgspec.ValidationError):
            if leaves:
                return convert(value, leaf)
        raise msgspec.ValidationError(text)

    return structure


def _inner_hook(t: Any, converter: cattrs.Converter) -> Hook:
    """Make the hook of a type that has a name or metadata."""
    inner, checks = inner_type(t), checks_of(t)
    hook = converter.get_structure_hook(inner)
    if not checks:
        return lambda value, _: hook(value, inner)
    return lambda value, _: enforce(hook(value, inner), checks)


def _key_hook(t: Any, converter: cattrs.Converter) -> Hook:
    """Make the hook of an object's key that is no text. It reads the text, or the JSON in it."""
    inner, checks = inner_type(t), checks_of(t)
    hook = converter.get_structure_hook(inner)

    def structure(key: Any, _: Any) -> Any:
        try:
            return enforce(hook(key, inner), checks)
        except msgspec.ValidationError:
            value: Any = UNSET
            with contextlib.suppress(msgspec.MsgspecError):
                if key == key.strip():  # JSON may have blanks around it, a key may not
                    value = hook(msgspec.json.decode(key), inner)
            if value is UNSET:
                raise
        return enforce(value, checks)

    return structure


class ErrorBudget(threading.local):
    """How many errors are still to be found: finding all in 1 MiB would block for seconds."""

    left: float = math.inf

    @contextlib.contextmanager
    def limited(self) -> Generator[None]:
        """Find hardly more errors than are told."""
        before, self.left = self.left, _MAX_ERRORS + 1
        try:
            yield
        finally:
            self.left = before

    def take(self, exc: BaseException) -> bool:
        """Count *exc*, which may be a group that is counted, and tell whether there may be more."""
        self.left -= not isinstance(exc, cattrs.BaseValidationError)
        return self.left > 0


budget: ErrorBudget = ErrorBudget()


def _container_hook(t: Any, converter: cattrs.Converter) -> Hook:
    """Make the hook of an array or object, which checks the kind of the value first."""
    kind: Any = kind_of(t)
    inner = (_array_hook if kind is list else _object_hook)(t, converter)
    is_detailed, has_fields = converter.detailed_validation, kind is dict and declares_fields(t)

    @functools.wraps(inner, assigned=("overrides",), updated=())
    def structure(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            text = f"expected {_JSON_NAMES[kind]}, got {json_name(value)}"
            raise msgspec.ValidationError(text)
        if is_detailed and budget.left <= 0:
            raise msgspec.ValidationError("not looked at, after so many errors")
        try:
            return inner(value, t)
        except cattrs.BaseValidationError as exc:
            for each in exc.exceptions if has_fields else ():
                budget.take(each)
            raise

    return structure


def _items_hook(item: Any, converter: cattrs.Converter) -> Hook:
    """Make the hook of a list, which stops when enough errors were found."""
    if item is Any or not converter.detailed_validation:
        return cols.list_structure_factory(cast(Any, list)[item], converter)
    hook = converter.get_structure_hook(item)
    return lambda value, t: _collect(enumerate(value), lambda each: hook(each, item), t)


def _mapping_hook(key: Any, item: Any, converter: cattrs.Converter, make: Any) -> Hook:
    """Make the hook of a mapping, which stops when enough errors were found."""
    if not converter.detailed_validation:
        return cols.mapping_structure_factory(cast(Any, dict)[key, item], converter, make)
    key_hook, hook = converter.get_structure_hook(key), converter.get_structure_hook(item)

    def structure(value: Any, t: Any) -> Any:
        pairs = ((pair[0], pair) for pair in value.items())
        return make(_collect(pairs, lambda p: (key_hook(p[0], key), hook(p[1], item)), t))

    return structure


def _collect(places: Iterable[tuple[Any, Any]], make: Callable[[Any], Any], t: Any) -> list[Any]:
    """Return what *make* makes of the values in *places*, or raise all errors in one group."""
    made: list[Any] = []
    errors: list[Exception] = []
    for place, value in places:
        try:
            made.append(make(value))
        except Exception as exc:  # a user's hook may raise anything
            # A KeyError of a user's hook would be explained as a missing key.
            errors.append(ValueError(_OTHER) if isinstance(exc, KeyError) else exc)
            errors[-1].add_note(cast(Any, cattrs.IterableValidationNote)("", place, t))
            if not budget.take(exc):
                break
    if errors:
        raise cast(Any, cattrs.IterableValidationError)("in a container", errors, t)
    return made


def _array_hook(t: Any, converter: cattrs.Converter) -> Hook:
    """Make the hook of *t* for JSON arrays, which builds a list of the items first."""
    cls, args = class_of(t), get_args(t)
    if is_struct(t):
        return _array_struct_hook(t, converter)
    if cols.is_namedtuple(cls):
        given = dict(zip(getattr(cls, "__parameters__", ()), args, strict=False))
        owner = next(base for base in cls.__mro__ if "_fields" in vars(base))
        items = [given.get(u) or (u[tuple(map(given.get, p))] if (p := free_variables(u)) else u)
                 for u in owner.__annotations__.values()]  # fmt: skip
        least = len(items) - len(cls._field_defaults)
        return _tuple_hook(lambda made: cls(*made), items, least, converter)
    if cls not in _ARRAYS:
        raise cattrs.StructureHandlerNotFoundError(f"register a structure hook for {t!r}", t)
    if origin_of(t) is tuple and Ellipsis not in args:
        return _tuple_hook(tuple, args, len(args), converter)
    make, item = _ARRAYS[cls], (args or (Any,))[0]
    inner = _items_hook(item, converter)
    classes = [class_of(bare_type(m)) for m in union_members(bare_type(item))]
    if issubclass(cls, Set) and all(_ARRAYS.get(c, c).__hash__ is None for c in classes):
        raise TypeError(f"{shown(item)} has no hash to be in a set; write list[{shown(item)}]")

    def structure(value: Any, t: Any) -> Any:
        items = inner(value, t)
        with contextlib.suppress(TypeError):
            return make(items)
        checks = [(object, _has_hash, "expected no array or object in a set")]
        return _collect(enumerate(items), lambda item: enforce(item, checks), t)

    return inner if make is list else structure


def _tuple_hook(make: Any, args: Sequence[Any], least: int, converter: cattrs.Converter) -> Hook:
    """Make the hook of an array with items of the types *args*, of which *least* are needed."""
    hooks = [(converter.get_structure_hook(arg), arg) for arg in args]
    inner = _items_hook(_ITEM, converter)

    def structure(value: Any, t: Any) -> Any:
        if not least <= len(value) <= len(hooks):
            text = f"array of at least length {least}" if least < len(hooks) else f"{least} items"
            text = text if len(value) < least else f"{len(hooks)} items"
            raise msgspec.ValidationError(f"expected {text}, got {len(value)}")
        return make(inner(zip(value, hooks, strict=False), t))

    return structure


def _object_hook(t: Any, converter: cattrs.Converter) -> Hook:
    cls = class_of(t)
    if is_struct(t):
        return _struct_hook(t, converter)
    if (fields := fields_of(t)) is not None:
        _check_constructor(cls, fields)
        validated = [f for f in fields if getattr(f, "validator", None)]
        checks: dict[str, Any] = {f.name: _checked(f, converter) for f in validated}
        if not converter.detailed_validation and any(f.kw_only for f in fields):
            # cattrs' other code fails if a keyword-only field comes before another one.
            return make_dict_structure_fn(t, converter, _cattrs_detailed_validation=True)
        if not checks or not converter.detailed_validation:
            return converter.gen_structure_attrs_fromdict(t)
        return make_dict_structure_fn(t, converter, **checks)
    if is_typed_dict(cls):
        inner, declared = converter.gen_structure_typeddict(t), cls.__annotations__
        if is_closed(cls):
            inner = make_typeddict_structure_fn(t, converter, _cattrs_forbid_extra_keys=True)

        @functools.wraps(inner, assigned=("overrides",), updated=())
        def structure(value: Any, t: Any) -> Any:
            return {k: v for k, v in inner(value, t).items() if k in declared}

        return structure
    key, item = (*get_args(t), Any, Any)[:2]
    make: Any = dict if cls in (Mapping, MutableMapping) else cls
    if cls is collections.Counter:
        make, item = (lambda pairs: collections.Counter(dict(pairs))), int
    elif cls is collections.defaultdict:
        make = functools.partial(make, item if get_args(t) else None)
    if any(kind_of(bare_type(m)) for m in union_members(key)):
        raise TypeError(f"{shown(key)} is no key of a JSON object; write list[tuple[key, item]]")
    if key not in (str, Any):
        key = typing.Annotated[key, _TEXT_KEY]
    return _mapping_hook(key, item, converter, make)


def _check_constructor(cls: Any, fields: Iterable[Any]) -> None:
    """Raise unless *cls* can be made of its fields."""
    if "pydantic" in packages_of(cls):  # With @attrs.frozen on it, a model would not validate.
        raise cattrs.StructureHandlerNotFoundError(f"register a structure hook for {cls!r}", cls)
    needed = [getattr(f, "alias", f.name) for f in fields if f.init and is_required(f)]
    others = getattr(cls, "__dataclass_fields__", {}).keys() - {f.name for f in fields}
    try:
        with contextlib.suppress(ValueError):  # some callables have no signature
            inspect.signature(cls).bind(**dict.fromkeys(needed))
            if dropped := others & inspect.signature(cls).parameters.keys():  # A ClassVar is none
                raise TypeError(f"what a client sends for {dropped.pop()!r} would be dropped")
    except TypeError as exc:
        why = f"{exc}; write a field in the place of an InitVar, and give the others a default"
        raise TypeError(f"{cls.__name__} cannot be made of its fields: {why}") from None


def _struct_hook(t: Any, converter: cattrs.Converter) -> Hook:
    """Make the hook of a `msgspec.Struct`. Its fields are structured as a typed dict's items."""
    cls, config, fields = class_of(t), class_of(t).__struct_config__, items_of(t, converter)
    optional = cast(Any, typing.NotRequired)
    items = {key: u if is_needed else optional[u] for _, key, u, is_needed in fields}
    if config.tag is not None:
        items[config.tag_field] = optional[cast(Any, Literal)[config.tag]]
    inner = make_typeddict_structure_fn(
        cast(Any, typing.TypedDict)(cls.__name__, items), converter,
        _cattrs_forbid_extra_keys=config.forbid_unknown_fields or converter.forbid_extra_keys,
    )  # fmt: skip

    def structure(value: Any, t: Any) -> Any:
        made = inner(value, t)
        return _make(cls, {name: made[key] for name, key, *_ in fields if key in made})

    return structure


def _array_struct_hook(t: Any, converter: cattrs.Converter) -> Hook:
    """Make the hook of a `msgspec.Struct` that is written as an array, after its tag if any."""
    cls, config, fields = class_of(t), class_of(t).__struct_config__, items_of(t, converter)
    if config.tag is not None:
        fields.insert(0, ("", "", cast(Any, Literal)[config.tag], True))
    hooks = [(converter.get_structure_hook(item), item) for _, _, item, _ in fields]
    least = sum(is_needed for *_, is_needed in fields)
    inner = _items_hook(_ITEM, converter)

    def structure(value: Any, t: Any) -> Any:
        if len(value) < least:
            text = f"expected array of at least length {least}, got {len(value)}"
            raise msgspec.ValidationError(text)
        if config.forbid_unknown_fields and len(value) > len(fields):
            raise msgspec.ValidationError(f"expected {len(fields)} items, got {len(value)}")
        pairs = zip(fields, inner(zip(value, hooks, strict=False), t), strict=False)
        return _make(cls, {name: item for (name, *_), item in pairs if name})

    return structure


def _make(cls: Any, values: dict[str, Any]) -> Any:
    """Make an object of *cls*; what its constructor raises is told of the object as a whole."""
    try:
        return cls(**values)
    except Exception as exc:
        raise cast(Any, cattrs.ClassValidationError)("in a constructor", [exc], cls) from None


def _checked(field: Any, converter: cattrs.Converter) -> Any:
    """Return cattrs' settings for *field*: a hook that runs its validator before attrs does."""
    # attrs would stop at the first validator that fails. A validator or converter that needs the
    # instance is left to attrs, because there is no instance yet.

    def structure(value: Any, t: Any) -> Any:
        item = converter.structure(value, t)
        if isinstance(field.converter, attrs.Converter):
            return item
        with contextlib.suppress(AttributeError):
            try:
                field.validator(None, field, field.converter(item) if field.converter else item)
            except KeyError:
                raise ValueError(_OTHER) from None  # a KeyError would be explained as a missing key
        return item

    return override(struct_hook=structure)


# ── codec ─────────────────────────────────────────────────────────────────────────────────────
#
# The codec turns JSON values into what handlers take, and what handlers return into JSON.

_FORMS = {  # names, because typing_extensions has the same forms
    "Callable": "take a name, and look the function up",
    "Collection": "write list[int], say", "Iterable": "write list[int], say",
    "Iterator": "write list[int], say", "LiteralString": "write str",
    "Never": "leave the parameter out", "NoReturn": "leave the parameter out",
    "Self": "write the name of the class", "Type": "take a name, and look the class up",
    "UnsetType": "write `x: int | UnsetType = UNSET`", "bytearray": "write bytes",
    "complex": "write float, or tuple[float, float]", "memoryview": "write bytes",
    "type": "take a name, and look the class up",
}  # fmt: skip
_FORM_MODULES = ("builtins", "collections.abc", "msgspec", "typing", "typing_extensions")


def strict_converter() -> cattrs.Converter:
    """Make a converter with the rules of the wire: aliases count, and no value changes its type."""
    converter = cattrs.Converter(use_alias=True)
    for leaf in _LEAVES:
        converter.register_structure_hook(leaf, _decimal if leaf is Decimal else msgspec.convert)
    converter.register_structure_hook(_OfLeaf, _structure_of_leaf)
    converter.register_structure_hook(Path, lambda value, t: t(msgspec.convert(value, str)))
    structure = converter.register_structure_hook_factory
    structure(lambda t: t is object, lambda _: lambda value, _: value)
    structure(lambda t: t is _ITEM, lambda _: lambda item, _: item[1][0](item[0], item[1][1]))
    structure(is_leaf, _leaf_hook)
    structure(lambda t: origin_of(t) in _UNIONS and not is_leaf(t), _allow_recursion(_union_hook))
    structure(lambda t: kind_of(t) is not None, _allow_recursion(_container_hook))
    structure(lambda t: inner_type(t) is not t, _allow_recursion(_inner_hook))
    structure(lambda t: _TEXT_KEY in getattr(t, "__metadata__", ()), _key_hook)
    unstructure = converter.register_unstructure_hook_factory
    # CPython 3.13.0 overlooks the recursion limit if cattrs calls `unstructure` for `Any` itself.
    converter.register_unstructure_hook_func(
        lambda t: t is object or t is Any,
        lambda v: v if type(v) is object else converter.unstructure(v),
    )
    unstructure(lambda t: origin_of(t) in _UNIONS, union_unstructure_hook)
    unstructure(declares_fields, _allow_recursion(_fields_unstructure_hook))
    unstructure(
        lambda t: inner_type(t) is not t,
        _allow_recursion(lambda t, converter: converter.get_unstructure_hook(inner_type(t))),
    )
    return converter


def _fields_unstructure_hook(t: Any, converter: cattrs.Converter) -> Callable[[Any], Any]:
    """Make the hook of a type that declares fields. It sends these fields only."""
    cls = class_of(t)
    with contextlib.suppress(NameError, TypeError, AttributeError):  # cattrs may still manage
        resolve_class(cls, {}, {})
    if is_struct(t):
        return _struct_unstructure_hook(t, converter)
    if (fields := fields_of(t)) is not None:
        write = converter.gen_unstructure_attrs_fromdict(t)
        if not any(f.default is UNSET or UnsetType in get_args(f.type) for f in fields):
            return write
        return lambda value: {k: item for k, item in write(value).items() if item is not UNSET}
    if cols.is_namedtuple(cls):
        return cols.namedtuple_unstructure_factory(cls, converter)
    inner, declared = converter.gen_unstructure_typeddict(t), cls.__annotations__
    return lambda value: inner({key: value[key] for key in value if key in declared})


def _struct_unstructure_hook(t: Any, converter: cattrs.Converter) -> Callable[[Any], Any]:
    """Make the hook of a `msgspec.Struct`. msgspec itself would write the fields of a subclass."""
    config, fields = class_of(t).__struct_config__, msgspec.structs.fields(t)
    writers = {
        f.name: converter.unstructure if free_variables(f.type)
        else converter.get_unstructure_hook(f.type)
        for f in fields
    }  # fmt: skip
    first = {} if config.tag is None else {config.tag_field: config.tag}

    def is_sent(field: Any, item: Any) -> bool:
        default = field.default_factory() if callable(field.default_factory) else field.default
        is_default = config.omit_defaults and type(item) is type(default) and item == default
        return item is not UNSET and not is_default

    def unstructure(value: Any) -> Any:
        items = [(field, getattr(value, field.name)) for field in fields]
        if config.array_like:
            return [*first.values(), *(writers[field.name](item) for field, item in items)]
        sent = [(field, item) for field, item in items if is_sent(field, item)]
        return {**first, **{f.encode_name: writers[f.name](item) for f, item in sent}}

    return unstructure


def advise(t: Any) -> str:
    """Return what to do about *t*, a type without a hook."""
    cls, name = class_of(t), shown(t)
    form = getattr(cls or t, "__name__", "")
    annotations: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # a name in them may not be known yet
        annotations = inspect.get_annotations(cls)
    below = next((leaf for leaf in _LEAVES if cls and issubclass(cls, leaf)), None)
    if type(t).__module__ == "builtins" and not isinstance(t, type):
        return f"{name} is no type; write a class such as bool, or list[int]"
    if isinstance(t, TypeVar):
        return f"{name} has no type; write the class that has it with its argument, as Box[int]"
    if form in _FORMS and getattr(cls, "__module__", "typing") in _FORM_MODULES:
        return f"{name} is no JSON value; {_FORMS[form]}"
    if cls is None and {Any, object} & {*get_args(t)}:
        return f"{name} takes all that Any does; write Any"
    if "pydantic" in packages_of(cls):
        return f"{name} is a pydantic model; register the hook for models in docs/payloads.md"
    if getattr(cls, "_is_protocol", False):
        return f"{name} is a protocol, of which no object is made; write a class for its fields"
    if below is not None:
        return f"{name} is below {below.__name__}; write NewType({name!r}, {below.__name__})"
    if annotations and cls.__init__ is object.__init__ and cls.__new__ is object.__new__:
        return f"put @attrs.frozen above {name}"
    return (
        f"{name} has no JSON of its own; register a hook that makes one, as docs/payloads.md shows;"
        f" or, if it is a class of yours, declare its fields and put @attrs.frozen above {name}"
    )


class Codec:
    """Turn JSON values into what handlers take, and what they return into the text of a frame."""

    def __init__(self, converter: cattrs.Converter | None = None) -> None:
        self.converter: cattrs.Converter = strict_converter() if converter is None else converter
        self.answers: set[Any] = set()  # the types of answers that have passed `check`
        self._hasty = self.converter
        if converter is None:  # PERF: most payloads are valid. `_hasty` stops at an error
            self._hasty = self.converter.copy(detailed_validation=False)

    def frame_class(self, type: str, annotation: Any, handler: Any = None) -> FrameClass:
        """Make the class of the frames of *type*. If msgspec can, decoding builds the payload."""
        is_open = getattr(handler, "only", None) is None  # A guard is asked before it is read.
        # msgspec may refuse the type, or a base class may use names that are local to a function.
        with contextlib.suppress(TypeError, NameError, AttributeError, NotImplementedError):
            if is_open and self._hasty is not self.converter and is_read_in_one_pass(annotation):
                return frame_class(type, annotation, is_built=True, handler=handler)
        return frame_class(type, Any, handler=handler)

    def check(self, annotation: Any, namespaces: Namespaces, seen: list[Any]) -> None:
        """Resolve *annotation* and the types in it. Raises for a type that cannot be structured."""
        try:
            self._check(annotation, namespaces, seen)
        except RecursionError:
            raise TypeError(f"{annotation} contains ever more types") from None

    def _check(self, annotation: Any, namespaces: Namespaces, seen: list[Any]) -> None:
        if annotation is UnsetType:
            refuse_unset([annotation])
        free = free_variables(annotation)
        if free and annotation is not class_of(annotation):  # such a class is refused below
            raise TypeError(f"{annotation} is generic; write int in the place of {free[0]}, say")
        # All classes are resolved before the first hook is made, which may need any of them.
        for t in [*types_in(annotation, namespaces, seen)]:
            is_generic = bool(getattr(t, "__parameters__", ()))
            if is_generic and t is class_of(t):
                raise TypeError(f"{t.__name__} is generic; write {t.__name__}[int], say")
            if t is typing.Final:
                raise TypeError("Final alone has no type; write Final[int], say")
            union_members(t)  # It raises TypeError for one that contains itself.
            if limits_of(t) and not self._enforces_limits():
                raise TypeError(f"the converter ignores {t}; start from hub.converter.copy()")
            if t in (Any, Ellipsis, UnsetType) or is_qualified(t) or is_generic:
                continue
            if self.converter.get_structure_hook(t) is _structure_of_leaf:
                leaf_hook_of(t)

    def _enforces_limits(self) -> bool:
        """Tell whether the converter, which may be a user's, enforces constraints."""
        with contextlib.suppress(msgspec.ValidationError):
            self.converter.structure(0, cast(Any, typing.Annotated)[int, msgspec.Meta(gt=0)])
            return False
        return True

    def check_reply(self, annotation: Any, namespaces: Namespaces) -> None:
        """Raise `PachinkoError` if *annotation*, or a type in it, leaves open what is sent."""
        # A name that is not known yet may be known by the time of the first reply.
        with contextlib.suppress(NameError, TypeError, AttributeError):
            union_unstructure_hook(annotation, self.converter)
            for t in types_in(annotation, namespaces, []):
                self.converter.get_unstructure_hook(t)

    def structure(self, payload: Any, annotation: Any, type: str) -> Any:
        """Build what a handler takes, or raise `MessageError` (``invalid_payload``)."""
        if self._hasty is not self.converter:
            try:
                return self._hasty.structure(payload, annotation)
            except (Exception, SystemExit) as exc:  # a user's hook or validator may raise anything
                bare(exc)
        try:  # This may succeed: cattrs' hasty hook fails if a keyword-only field comes first.
            with budget.limited():
                return self.converter.structure(payload, annotation)
        except (Exception, SystemExit) as exc:  # It has failed again, and lists every wrong field.
            key = functools.partial(key_of, converter=self.converter)
            refused = invalid_payload(type, explain(bare(exc), key_of=key))
        raise refused

    def writer_of(self, value: object, type: str, declared: Any = None) -> Writer:
        """Return the writer for the class of *value*. *declared* is the annotated type, if any."""
        if value is None:
            return type, lambda _: UNSET
        shape = declared_member(value, members_of(declared))
        own_type = message_type(class_of(shape))
        return own_type or type, self.converter.get_unstructure_hook(shape)

    def encode(
        self, type: str, payload: Any, group: str | None = None, id: Id | None = None
    ) -> bytes:
        """Return the frame for *payload*. Raises `TypeError` with the path of what has no JSON."""
        try:
            value = UNSET if payload is None else self.converter.unstructure(payload)
            return _encode(Sent(type, id, value, group))
        except Exception:  # A hook may raise anything.
            return self.encode_again(Sent(type, id, group=group), payload)

    def encode_again(self, sent: Sent, payload: Any, declared: Any = None) -> bytes:
        """Encode *sent* with *payload* after a failure: replace half pairs, or raise."""
        shape = declared_member(payload, members_of(declared))
        try:
            value = UNSET if payload is None else self.converter.unstructure(payload, shape)
            return encode(msgspec.structs.replace(sent, payload=value))
        except PachinkoError:
            raise
        except RecursionError:
            raise TypeError("$.payload: nested too deeply, or a part of itself") from None
        except Exception as exc:  # A hook may raise anything.
            path, what, reason = unsendable(payload, shape, exc, self.converter)
        cure = "; raise it instead" if isinstance(payload, BaseException) else ""
        cure = "; write `await` in front of it" if isinstance(payload, Awaitable) else cure
        raise TypeError(f"{path}: cannot send a {what}{cure}") from reason


# ── signatures ────────────────────────────────────────────────────────────────────────────────
#
# A function is read as it will be called: as partials, decorators and methods have left it. Its
# annotations are resolved one by one, because those that do not matter here may have names that
# only a type checker imports.

_EMPTY = inspect.Parameter.empty
_LITERALS = (str, int, float, bool, types.NoneType)
_NOWHERE: Namespaces = ({}, {})
_QUALIFIER = re.compile(r"[a-z_]+\.(ClassVar|Final|InitVar|(Not)?Required|ReadOnly)\[")
# From Python 3.14 on annotations are evaluated when they are asked for. This leaves a name alone
# that is not defined.
_FORMAT: Any = getattr(inspect, "Format", None)  # annotationlib's
_LAZILY: dict[str, Any] = {"annotation_format": _FORMAT.FORWARDREF} if _FORMAT else {}
# Often imported for type checkers only. Around an item they tell nothing that is not known.
_STREAMS: dict[str, Any] = {"AsyncIterator": AsyncIterator, "AsyncGenerator": AsyncGenerator}
_CONVERTERS = {"float": float, "int": int, "uuid": UUID, "dt": datetime}  # Falcon's, in a path
_INJECTING = {  # packages with defaults or metadata that a decorator of theirs replaces
    "aioinject", "anydi", "dependency_injector", "dishka", "fast_depends", "fastapi", "faststream",
    "injector", "kink", "lagom", "litestar", "magic_di", "modern_di", "picobox", "punq", "rodi",
    "starlite", "svcs", "taskiq", "taskiq_dependencies", "that_depends", "wireup",
}  # fmt: skip


def layers(function: Any) -> list[Any]:
    """Return *function*, and what is called inside of its partials, decorators and methods."""
    inner = getattr(function, "__wrapped__", None) or getattr(function, "__func__", None)
    if isinstance(function, functools.partial):
        inner = function.func
    inner = inner or _call_method(function)
    return [function] if inner is None else [function, *layers(inner)]


def _call_method(function: Any) -> Any:
    """Return the method `__call__` of an object, or None for a function or a class."""
    method = inspect.getattr_static(type(function), "__call__", None)
    return method if inspect.isfunction(method) else None


def is_called_as(function: Any, test: Callable[[Any], bool]) -> bool:
    """Tell whether *test* holds for what is called, which may be an object with `__call__`."""
    outer = function
    while isinstance(outer, functools.partial):
        outer = outer.func
    return test(function) or test(_call_method(outer))


def is_stream(function: Any) -> bool:
    """Tell whether *function* is an async generator when it is called."""
    return is_called_as(function, inspect.isasyncgenfunction)


def signature_of(function: Any) -> inspect.Signature:
    """Return the signature of *function*, whatever its annotations name. May raise anything."""
    return inspect.signature(function, **_LAZILY)


def parameters_of(function: Any) -> list[inspect.Parameter]:
    """Return the parameters of *function* to which no partial has given a value by name."""
    partials = [layer for layer in layers(function) if isinstance(layer, functools.partial)]
    bound = {name for partial in partials for name in partial.keywords}
    return [p for p in signature_of(function).parameters.values() if p.name not in bound]


class _Code(str):
    """A text that stands for itself in the text of a signature."""

    __slots__ = ()
    __repr__ = str.__str__


def type_as_code(annotation: Any) -> Any:
    """Return the text of *annotation*, which is a text already if it is postponed."""
    if annotation is _EMPTY:
        return annotation
    if not isinstance(annotation, str):
        text = re.sub(r"ForwardRef\('(.*?)'.*?\)", r"\1", shown(annotation))  # is not known yet
        annotation = re.sub(r"<[^<>]*>", "...", text)
    return _Code(annotation)


def as_code(parameter: inspect.Parameter) -> inspect.Parameter:
    """Return *parameter* such that its text is code: any default but a literal becomes ``...``."""
    default = parameter.default
    is_code = default is _EMPTY or type(default) in _LITERALS
    default = default if is_code else _Code("...")
    return parameter.replace(annotation=type_as_code(parameter.annotation), default=default)


def listed(parameters: Iterable[inspect.Parameter]) -> str:
    """Return *parameters* as code."""
    return ", ".join(str(as_code(parameter)) for parameter in parameters)


def code_of(function: Any) -> str:
    """Return the parameters and the return type of *function* as code."""
    returns = type_as_code(signature_of(function).return_annotation)
    parameters = map(as_code, parameters_of(function))
    return str(inspect.Signature([*parameters], return_annotation=returns))


def resolve(function: Any, annotation: Any, namespaces: Namespaces) -> Any:
    """Return the type that *annotation* of *function* stands for. May raise anything.

    *namespaces* are those of the code that registers it. They count first if it is defined there,
    and last if it is not.
    """
    found = layers(function)
    inner, given = found[-1], {**namespaces[0], **namespaces[1]}
    own, name = getattr(inner, "__globals__", {}), getattr(inner, "__qualname__", "")
    locals_ = dict(namespaces[1]) if own is namespaces[0] and "<locals>" in name else {}
    names = getattr(getattr(inner, "__code__", None), "co_freevars", ())
    for variable, cell in zip(names, getattr(inner, "__closure__", None) or (), strict=False):
        with contextlib.suppress(ValueError):  # The variable has no value yet.
            locals_[variable] = cell.cell_contents
    for layer in found:
        owner = getattr(layer, "__self__", layer)
        for cls in (owner if inspect.isclass(owner) else type(owner)).__mro__:
            if cls.__qualname__ == name.rpartition(".")[0]:
                locals_ |= types_named_in(cls)
    locals_ |= {each.__name__: each for each in getattr(inner, "__type_params__", ())}
    globals_ = {**_STREAMS, **given, **vars(builtins), **own}
    holder = type("", (), {"__annotations__": {"t": annotation}})  # a class may have qualifiers
    return hashable(typing.get_type_hints(holder, globals_, locals_, include_extras=True)["t"])


def unqualified(t: Any) -> Any:
    """Return the type in the qualifiers of a field, such as `Required` or `InitVar`, or *t*."""
    if origin_of(t) is typing.Annotated:
        inner = unqualified(t.__origin__)
        return t if inner is t.__origin__ else inner
    inner = [getattr(t, "type", Any), *get_args(t)][-1]
    return unqualified(inner) if _QUALIFIER.match(str(t)) else t


def known_type(function: Any, annotation: Any, namespaces: Namespaces) -> Any:
    """Return the type that *annotation* stands for, or `Any` if there is none to be had."""
    with contextlib.suppress(Exception):  # A name that only a type checker imports, say.
        if annotation is not _EMPTY:
            return resolve(function, annotation, namespaces)
    return Any


def why(exc: BaseException) -> str:
    """Return what *exc* says of a type, and what to do."""
    place = "".join(f" {note}" for note in getattr(exc, "__notes__", ()))
    if isinstance(exc, NameError) and exc.name:
        cure = "import it outside of `if TYPE_CHECKING:`, or define it above"
        return f"name {exc.name!r}{place} is not defined when this is registered; {cure}"
    return f"{exc}{place}" if str(exc) else f"{type(exc).__name__}{place}"


def admits(annotation: Any, cls: Any) -> bool:
    """Tell whether *annotation* allows every object of the class *cls*."""
    try:
        if limits_of(annotation):
            return False
        t = bare_type(annotation)
        if origin_of(t) in _UNIONS:
            return any(admits(member, cls) for member in get_args(t))
        is_any = cls is Any or t in (Any, object) or (cls, t) == (int, float)
        return is_any or issubclass(cast(type, cls), class_of(t))
    except Exception:  # A typed dict, a literal, a protocol, or a ``type`` that names nothing.
        return False


def default_refusal(parameter: inspect.Parameter, annotation: Any) -> str | None:
    """Return why no client may set *parameter*, or None: another library injects its value."""
    name, default = parameter.name, parameter.default
    default = None if default is _EMPTY else default
    annotated = [getattr(t, "__metadata__", ()) for t in (annotation, *get_args(annotation))]
    for each in (default, *itertools.chain(*annotated)):
        if package := packages_of(each) & _INJECTING:
            return (
                f"takes {name!r} from {package.pop()}, but a client that sends {name!r} would "
                f"replace it; write `@ws.provide` for what the server makes"
            )
    cls = type(default)
    if default is UNSET or cls in (types.NoneType, object) or issubclass(cls, enum.Enum):
        return None
    refused = f"takes `{as_code(parameter)}`, whose default is a {cls.__name__}"
    if not _could_be(annotation, default):
        is_open = bare_type(annotation) in (Any, object)
        write = "" if is_open else "a default of the annotated type, or "
        return f"{refused}; write {write}`@ws.provide` for what the server makes"
    if _has_hash(default):
        return None
    code = type_as_code(parameter.annotation)
    code = code if admits(annotation, types.NoneType) else _Code(f"{code} | None")
    optional = as_code(parameter.replace(annotation=code, default=None))
    return f"{refused} that all clients would share; write `{optional}`"


def _could_be(annotation: Any, default: Any) -> bool:
    """Tell whether *default* could be a value of the type *annotation*, whatever its limits."""
    t: Any = None
    with contextlib.suppress(Exception):  # A ``type`` that names nothing is refused later.
        t = bare_type(annotation)
    if origin_of(t) in _UNIONS:
        return any(_could_be(member, default) for member in get_args(t))
    if origin_of(t) is Literal:
        return default in get_args(t)
    if t in (Any, object):
        return type(default) in (*_LITERALS, list, dict)
    if t is Decimal and type(default) is int:
        return True  # It is as good as one.
    return class_of(t) is None or admits(dict if is_typed_dict(t) else t, type(default))


def place_of(function: Callable[..., Any]) -> str:
    """Return where *function* is, such as ``say() at chat.py:12``, for messages about it."""
    inner = layers(function)[-1]
    code = getattr(inner, "__code__", None)
    where = f" at {code.co_filename}:{code.co_firstlineno}" if code else ""
    return f"{getattr(inner, '__qualname__', type(inner).__name__)}(){where}"


def mistake(function: Any, refused: str, example: str) -> PachinkoError:
    """Return the error for *function*, with *example* as code: if it is a method, in its class."""
    if inspect.ismethod(function) and example.startswith("@"):
        owner = function.__self__
        name = (owner if inspect.isclass(owner) else type(owner)).__name__
        code = example.partition("\n")[2]
        code = re.sub(r"async def \w+\(", f"async def {function.__name__}(self, ", code)
        example = f"class {name}:\n{textwrap.indent(code.replace('self, )', 'self)'), '    ')}"
    return PachinkoError(f"{place_of(function)} {refused}; write\n{example}")


def check_function(function: Any, example: str, takes: int | None, streams: bool = False) -> None:
    """Raise `PachinkoError` with *example* unless *function* is async and takes *takes* values."""
    if not callable(function) or isinstance(function, (type, staticmethod)):
        what, write = _other_than_a_function(function, example)
        raise PachinkoError(f"expected a function, got {what}; write\n{write}")
    inner = layers(function)[-1]
    first, name = example.partition("\n")[0], getattr(function, "__name__", "handler")
    name = name if name.isidentifier() else "handler"
    if is_stream(function):
        if not streams:
            raise mistake(function, "has a `yield`, but only message handlers stream", example)
    elif is_called_as(function, inspect.iscoroutinefunction):
        pass
    elif is_stream(inner) or is_called_as(inner, inspect.iscoroutinefunction):
        code = "return await function(*args, **kwargs)"
        if is_stream(inner):
            code = "async for item in function(*args, **kwargs):\n        yield item"
        example = f"async def wrapper(*args, **kwargs):\n    {code}"
        raise mistake(function, "is called by a decorator that returns a plain function", example)
    else:
        with contextlib.suppress(Exception):  # some callables have no signature
            example = f"{first}\nasync def {name}{code_of(function)}: ..."
        raise mistake(function, "is not async", example)
    what = "has no signature"  # From Python 3.14 on an annotation may raise here.
    try:
        signature = signature_of(function)
        what = "takes the wrong parameters"
        if takes is not None:
            signature.bind(*range(takes))
    except Exception as exc:
        raise mistake(function, f"{what}: {re.sub('<.*>', '...', str(exc))}", example) from exc


def _other_than_a_function(given: Any, example: str) -> tuple[str, str]:
    """Return what *given* is, which is registered as a function, and the corrected code."""
    name, cls = getattr(given, "__name__", ""), given if inspect.isclass(given) else type(given)
    if inspect.iscoroutine(given):
        given.close()  # It would warn that nobody awaits it.
    if inspect.iscoroutine(given) or inspect.isasyncgen(given):
        decorator = example.partition("\n")[0][1:]
        return f"{name}(), which is called already", f"{decorator}({name})"
    if any(each.startswith("on_") for each in dir(cls)):
        example = f'ws.add_resource("{cls.__name__.lower()}", {cls.__name__}())'
    if inspect.isclass(given):
        return f"the class {name}", example.replace(f"def {name}(", "def f(")
    is_literal = type(given) in _LITERALS
    return repr(given) if is_literal else f"an object of the class {cls.__name__}", example


def check_taken(
    function: Any, cls: type, namespaces: Namespaces, example: str, *, replies: bool = True
) -> None:
    """Raise `PachinkoError` if *function* takes no *cls* second, or may not return what it says.

    With *replies* it may return anything, else what `may_return` says.
    """
    signature = signature_of(function)
    for second in [*signature.parameters.values()][1:2]:
        if not admits(known_type(function, second.annotation, namespaces), cls):
            raise mistake(function, f"takes `{as_code(second)}`, but gets {cls.__name__}", example)
    returns = signature.return_annotation
    if not (replies or is_sendable(known_type(function, returns, namespaces), AS_THEY_ARE[cls])):
        refused = f"but {may_return(cls)}"
        raise mistake(function, f"returns {type_as_code(returns)}, {refused}", example)


def may_return(cls: type) -> str:
    """Return what the fallback or the binary handler may return, which takes a *cls*."""
    return f"may return {'a str' if cls is str else 'bytes'}, a @message object or None"


def is_sendable(t: Any, raw: tuple[type, ...]) -> bool:
    """Tell whether *t* is one of *raw*, None or a class with ``@message``, or may be one."""
    with contextlib.suppress(Exception):  # A ``type`` statement may name what is not there.
        members = [*map(bare_type, union_members(t))]
        taken = [each for each in members if _is_one_of(raw, each)]
        # A function may be both, or return the other one in a subclass, say.
        left = [each for each in members if each not in (str, bytes, *taken)]
        return (bool(taken) or left == members or left not in ([], [types.NoneType])) and all(
            each in (types.NoneType, object) or message_type(class_of(each)) is not None
            or (class_of(each) is None and not is_leaf(each))
            for each in left
        )  # fmt: skip
    return True


def _is_one_of(classes: tuple[type, ...], t: Any) -> bool:
    """Tell whether *t*, a class or a literal, has objects of *classes* only, and perhaps None."""
    if origin_of(t) is Literal:
        return all(isinstance(value, (*classes, types.NoneType)) for value in get_args(t))
    return inspect.isclass(cls := class_of(t)) and issubclass(cls, classes)


def path_types(path: str, app: Any) -> dict[str, Any]:
    """Return by name what Falcon makes of the parameters of *path*: a type, or `Any` if unknown."""
    found = dict[str, Any]()
    for name, converter in re.findall(r"\{([a-zA-Z_]\w*)(?::(\w+))?", path):
        found[name] = Any if converter else str
        with contextlib.suppress(Exception):  # a converter need not have annotations
            convert = app.router_options.converters[converter].convert
            made = union_members(typing.get_type_hints(convert)["return"])  # or None for no match
            known = tuple(t for t in made if t is not types.NoneType)
            found[name] = Union[known]  # noqa: UP007 - of a tuple
    return found


def check_path_types(
    function: Any, parameters: Iterable[inspect.Parameter], made: Mapping[str, Any],
    path: str | None, namespaces: Namespaces,
) -> None:  # fmt: skip
    """Raise `PachinkoError` if the annotation of a path parameter is not that of its values.

    *made* has their types, or `Any`.
    """
    for each in [each for each in parameters if each.name in made]:
        gets, t = made[each.name], Any
        try:
            if each.annotation is not _EMPTY:
                t = resolve(function, each.annotation, namespaces)
        except Exception as exc:  # An annotation may raise anything.
            raise PachinkoError(
                f"{place_of(function)} takes `{as_code(each)}`: {why(exc)}"
            ) from exc
        if all(admits(t, cls) for cls in union_members(gets)):
            continue
        given = f"`{each.name}: {type_as_code(gets)}`"
        write = f"{given}, and check or convert it in the handler"
        for converter in [name for name, cls in _CONVERTERS.items() if admits(t, cls)][:1]:
            write = f"`{{{each.name}:{converter}}}` in the path, or {write}"
        raise PachinkoError(
            f"{place_of(function)} takes `{as_code(each)}`, but {path or 'the path'} gives "
            f"{given}; write {write}"
        )


def refuse_second(
    first: Any, second: Any, what: str, cure: str = "let it handle another type"
) -> None:
    """Raise a `PachinkoError` that names both functions if there is a *first* one already."""
    if first is not None:
        both = f"{place_of(first)}; and a second: {place_of(second)}"
        raise PachinkoError(f"{what}: {both}. Remove one, or {cure}")


# ── handlers ──────────────────────────────────────────────────────────────────────────────────
#
# Everything about a function is settled when it is registered: what it takes, how its payload is
# structured, whether it streams. A message in flight only looks its handler up and calls it.

_VERBS = "|".join(map(re.escape, falcon.constants.COMBINED_METHODS))
_RESPONDER = re.compile(rf"on_({_VERBS})(_.+)?", re.IGNORECASE)  # with a suffix of `add_route`, too
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
End = Callable[["Connection"], Awaitable[None]]
AddEnd = Callable[[End], None]  # takes what has to run when the connection is over


@attrs.frozen(eq=False)
class Handler:
    """A message handler as it was registered."""

    type: str
    function: Callable[..., Any]
    call: Callable[[Connection, Any], Any]  # returns a coroutine, or an async generator
    annotation: Any  # the payload's type; for fields, a typed dict of the parameters
    parameter: inspect.Parameter | None  # takes the whole payload
    defaults: dict[str, Any] | None  # the fields' defaults, if the function takes fields
    returns: Any  # the declared type of a reply or of a stream's item, or None
    streams: bool
    is_concurrent: bool  # runs in a task of its own, as all streams do
    types: Collection[Any] = ()  # of all parameters, as far as they are known
    only: Callable[[Connection], bool | Awaitable[bool]] | None = None  # who may send the type
    resumable: float | None = None  # seconds that a stream goes on without its client
    writers: dict[Any, Writer] = attrs.Factory(dict)  # a key is the class of a returned value
    hints: set[str] = attrs.Factory(set)  # the parameters about which a hint was logged

    @property
    def takes_payload(self) -> bool:
        """Whether *function* has a parameter for the payload, or several for its fields."""
        return self.parameter is not None or self.defaults is not None

    def structure(self, payload: Any, codec: Codec) -> Any:
        """Return what *function* is called with for *payload*, which may be `UNSET`."""
        if payload is UNSET and self.defaults is not None:
            payload = {}
        if payload is not UNSET:
            self._hint(payload)
            return codec.structure(payload, self.annotation, self.type)
        if self.parameter is None or self.parameter.default is not _EMPTY:
            return self.parameter and self.parameter.default
        try:  # a payload that may be null may also be missing
            return codec.structure(None, self.annotation, self.type)
        except MessageError:
            missing = {"path": "$.payload", "message": _MISSING}
            raise invalid_payload(self.type, [missing]) from None

    def reply(self, id: Id | None, codec: Codec, value: object, *, more: bool = False) -> Event:
        """Return the event that answers with *value*. The writer for its class is found once."""
        try:
            name, unstructure = self.writers[type(value)]
        except KeyError:
            writer = codec.writer_of(value, f"{self.type}.reply", self.returns)
            name, unstructure = self.writers[type(value)] = writer
        try:
            data = _encode(Sent(name, id, unstructure(value), None, more))
        except Exception:  # A hook may raise anything.
            data = codec.encode_again(Sent(name, id, UNSET, None, more), value, self.returns)
        return {"type": "websocket.send", "text": data.decode()}

    def refusal(self, payload: Any, codec: Codec, exc: Exception) -> MessageError:
        """Return the error for a payload that msgspec refuses with *exc*."""
        try:  # cattrs lists every wrong field
            if self.only is None:  # A guard would have to be asked whether the client may know.
                self.structure(payload, codec)
        except MessageError as error:
            return bare(error)
        text, _, path = str(exc).rpartition(" - at ")
        if path == "`$.type`":  # msgspec has gone by an earlier "type"
            return MessageError("invalid_envelope", '"type" is there twice')
        found = explain(msgspec.ValidationError(text), path.strip("`")) if text else explain(exc)
        return invalid_payload(self.type, found)

    def _hint(self, payload: Any) -> None:
        """Log once that *function* gets the whole payload, but seems to expect one field of it."""
        if self.parameter is None or type(payload) is not dict or self.annotation not in _LEAVES:
            return
        if (name := self.parameter.name) in payload and name not in self.hints:
            self.hints.add(name)
            logger.warning(
                "%s got an object with the key %r as its whole payload; "
                "(conn, *, %s) was probably meant", place_of(self.function), name, self.parameter,
                extra={"message_type": self.type},
            )  # fmt: skip


def read_handler(
    type: str, function: Callable[..., Any], codec: Codec, namespaces: Namespaces,
    message_class: Any, path_params: Collection[str], concurrent: bool,
) -> Handler:  # fmt: skip
    """Make a handler by the signature of *function*. Raises `PachinkoError` with corrected code."""
    name, place = getattr(function, "__name__", "handler"), place_of(function)
    check_function(function, f'@ws.on("{type}")\nasync def {name}(conn): ...', None, streams=True)
    parameter, fields = _split_parameters(function, name, path_params, namespaces)
    defaults = {p.name: p.default for p in fields if p.default is not _EMPTY}
    hints = _hints_of(function, namespaces)
    if parameter and message_class:
        hints.setdefault(parameter.name, message_class)
    for each in filter(None, (parameter, *fields)):
        if (refused := default_refusal(each, hints.get(each.name, Any))) is not None:
            raise PachinkoError(f"{place} {refused}")
    try:
        annotation: Any = hints.get(parameter.name, Any) if parameter else Any
        if fields:
            items = {p.name: hints.get(p.name, Any) for p in fields}
            items |= {key: cast(Any, typing.NotRequired)[items[key]] for key in defaults}
            annotation = cast(Any, typing.TypedDict)(name, items)
        codec.check(annotation, namespaces, [])
    except Exception as exc:  # A class, a hook or a converter of the application's may raise any.
        raise _payload_error(place, exc) from exc
    if parameter and message_class and annotation is not message_class:
        write = f"async def {name}(conn, {parameter.name}: {message_class.__name__})"
        raise PachinkoError(f"{place} handles {message_class.__name__}; write {write}")
    streams = is_stream(function)
    returns = _reply_type(function, codec, namespaces)
    return Handler(
        type, function,
        (lambda conn, value: function(conn, **value)) if fields
        else function if parameter else (lambda conn, _: function(conn)),
        annotation, parameter, defaults if fields else None, returns, streams,
        is_concurrent=streams or concurrent, types=hints.values(),
    )  # fmt: skip


def _reply_type(function: Any, codec: Codec, namespaces: Namespaces) -> Any:
    """Return the type of a reply or of a stream's item, or None if it is not declared."""
    place, streams = place_of(function), is_stream(function)
    declared = known_type(function, signature_of(function).return_annotation, namespaces)
    if not streams and class_of(declared) in (AsyncIterator, AsyncGenerator, AsyncIterable):
        code = "async for item in items:\n    yield item"
        raise PachinkoError(f"{place} declares a stream, but has no `yield`; write\n{code}")
    if streams and get_args(declared):  # AsyncIterator[Item], AsyncGenerator[Item, None]
        declared = get_args(declared)[0]
    if declared in (types.NoneType, Any, object):
        return None
    try:
        codec.check_reply(declared, namespaces)
    except PachinkoError as exc:
        raise PachinkoError(f"the reply of {place} is ambiguous: {exc}") from exc
    except Exception:  # It cannot be had, such as a type that contains nothing but itself.
        return None
    return declared


def _payload_error(place: str, exc: Exception) -> PachinkoError:
    """Return the error for a payload whose type raises *exc*."""
    reason = why(exc)
    if isinstance(exc, cattrs.StructureHandlerNotFoundError):
        provide = "; or, if the server makes it, register its `@ws.provide` above"
        reason = advise(exc.type_) + (provide if is_own(exc.type_) else "")
    return PachinkoError(
        f"the payload of {place} cannot be structured: {reason}. Define or import names above the "
        f"handler; use attrs classes, dataclasses, TypedDict and the standard library's types, "
        f"or give hub.configure(converter=...) a hook before this handler"
    )


def _hints_of(function: Any, namespaces: Namespaces) -> dict[str, Any]:
    """Return the types of the parameters of *function*, but of its first one only if it is known.

    Raises `PachinkoError` if another annotation cannot be resolved.
    """
    hints = dict[str, Any]()
    for number, p in enumerate(parameters_of(function)):
        try:
            if p.annotation is not _EMPTY:
                hints[p.name] = resolve(function, p.annotation, namespaces)
        except Exception as exc:
            if number > 0:
                exc.add_note(f"in the annotation of {p.name!r}")
                raise _payload_error(place_of(function), exc) from exc
        t = hints.get(p.name)
        if number > 0 and (inner := unqualified(t)) is not t:
            code, default = type_as_code(inner), p.default
            if "NotRequired" in str(t) and default is _EMPTY:
                code, default = _Code(f"{code.removesuffix(' | None')} | None"), None
            write = as_code(p.replace(annotation=code, default=default))
            refused = f"takes `{as_code(p)}`, but only fields of classes have such a qualifier"
            raise PachinkoError(f"{place_of(function)} {refused}; write `{write}`")
    return hints


def _split_parameters(
    function: Callable[..., Any], name: str, path_params: Collection[str], namespaces: Namespaces
) -> tuple[inspect.Parameter | None, list[inspect.Parameter]]:
    """Return the parameter for the whole payload, or None, and those for its fields."""
    parameters = parameters_of(function)
    positional = [p for p in parameters if p.kind in _POSITIONAL]
    fields = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    variadic = [p for p in parameters if p.kind in _VARIADIC]
    from_path = [p.name for p in parameters[1:] if p.name in path_params]
    first = known_type(function, positional[0].annotation, namespaces) if positional else Any
    refused = None
    if not positional:
        own = "self, " if inspect.ismethod(function) else ""
        refused = f"takes no connection; write `async def {name}({own}conn, ...)`"
    elif positional[0].name == "self":
        refused = (
            f"takes `self`, but is of no object yet; write `ws.on(...)(Class().{name})` below the "
            f"class, or ws.add_resource"
        )
    elif from_path:
        refused = (
            f"takes {from_path[0]!r}, a path parameter, which only connect handlers get; "
            f"use `conn.params['{from_path[0]}']`"
        )
    elif variadic:
        named = "`(conn, *, text: str)` or `(conn, payload: dict)`"
        refused = f"takes {listed(variadic[:1])}; name it: {named}"
    elif len(positional) > 2:
        names = listed(positional[1:])
        refused = f"takes more than one payload; for its fields write `(conn, *, {names})`"
    elif len(positional) == 2 and fields:
        types_ = [known_type(function, p.annotation, namespaces) for p in parameters[1:]]
        above = "register the `@ws.provide` of a value above, or "
        refused = (
            f"takes the payload whole and by fields; {above if any(map(is_own, types_)) else ''}"
            f"write `(conn, {listed(positional[1:])})` or `(conn, *, {listed(fields)})`"
        )
    elif is_payload(first):
        own = str(as_code(positional[0]))
        refused = f"takes `{own}` first, where the connection comes; "
        refused += f"write `async def {name}(conn, {own})`"
    if refused is not None:
        raise PachinkoError(f"{place_of(function)} {refused}")
    return (positional[1] if len(positional) == 2 else None), fields


def is_own(t: Any) -> bool:
    """Tell whether *t* is no type that any payload may have, so that it can be provided."""
    if origin_of(t) in _UNIONS:
        return any(map(is_own, get_args(t)))
    is_plain = getattr(class_of(t), "__module__", None) in ("builtins", "collections.abc")
    return not (is_plain or t in (Any, object) or is_leaf(t))


def is_payload(t: Any) -> bool:
    """Tell whether *t* is a type of payloads, so that no connection is annotated with it."""
    if is_leaf(t) or class_of(t) in (dict, list, set, tuple):
        return t is not types.NoneType
    return declares_fields(t) and not hasattr(class_of(t), "send")  # as a connection has


def read_connect(
    function: Callable[..., Any], path: str | None, kind: str = "connect", *,
    namespaces: Namespaces = _NOWHERE, app: Any = None,
) -> Callable[..., Awaitable[None]]:  # fmt: skip
    """Check a connect handler, or one of another *kind* with path parameters, against *path*.

    Returns a function that passes it the parameters. Of a generator it runs the part before the
    ``yield``, and gives the part behind it to *add_end*, its second argument.
    """
    # What an `app.add_route` or some converters give is known when a client connects.
    made = path_types(path or "", app)
    example = f"@ws.{kind}\nasync def arrive({', '.join(['conn', *made])}): ..."
    check_function(function, example, None, streams=kind == "connect")
    parameters = list(signature_of(function).parameters.values())
    takes_all = bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    first, named = parameters[:1], parameters[1 : -1 if takes_all else None]
    unknown = [p for p in named if path and p.name not in made and p.default is _EMPTY]
    bad = [p for p in named if p.kind in (p.POSITIONAL_ONLY, *_VARIADIC)] or unknown
    takes_conn = bool(first) and first[0].kind in _POSITIONAL
    if takes_conn:
        takes_conn = not is_payload(known_type(function, first[0].annotation, namespaces))
    if not takes_conn or bad:
        what = f"takes {listed(bad)}" if bad else "takes no connection"
        has = f"; {path} has {', '.join(made) or 'no parameters'}" if path else ""
        raise mistake(function, what + has, example)
    names, own = {p.name for p in named}, first[0].name
    check_path_types(function, named, made, path, namespaces)
    is_checked = path is not None and Any not in made.values()
    yields = is_stream(function)

    def call(conn: Connection, add_end: Any = None) -> Awaitable[None]:
        nonlocal is_checked
        params = conn.params.items()
        if not is_checked:
            came = {name: type(value) for name, value in params}
            check_path_types(function, named, came, None, namespaces)
            is_checked = True
        wanted = {k: v for k, v in params if k in names or (takes_all and k != own)}
        begun: Any = function(conn, **wanted)
        return _begin(function, begun, add_end) if yields else begun

    return functools.update_wrapper(call, function)


async def _begin(function: Any, generator: AsyncGenerator[Any], add_end: AddEnd) -> None:
    """Run *generator*, of a connect handler, up to its ``yield``; give *add_end* the rest."""

    async def end(conn: Connection) -> None:
        async for _ in generator:
            await generator.aclose()
            raise PachinkoError(
                f"{place_of(function)} yields more than once; a connect handler has one `yield`"
            )

    async for _ in generator:
        add_end(functools.update_wrapper(end, function))
        break


def with_end(call: Callable[..., Awaitable[None]], leave: End) -> Callable[..., Awaitable[None]]:
    """Return *call*, a resource's connect handler, with its *leave* in case of a refusal."""

    async def both(conn: Connection, add_end: AddEnd) -> None:
        await call(conn, add_end)
        add_end(leave)

    return functools.update_wrapper(both, call)


def read_resource(prefix: str, resource: object) -> list[tuple[str, Callable[..., Any]]]:
    """Return ``(name, method)`` for each ``on_<name>`` of *resource*, or raise `PachinkoError`."""
    if not isinstance(prefix, str) or not prefix:
        write = 'write ws.add_resource("chat", resource)'
        raise PachinkoError(f"a prefix is a text, got {prefix!r}; {write}")
    if inspect.isclass(resource):
        write = f'write ws.add_resource("{prefix}", {resource.__name__}())'
        raise PachinkoError(f"one instance serves all; {write}")
    cls, found = type(resource).__name__, list[tuple[str, Callable[..., Any]]]()
    for name in [each for each in dir(resource) if each.startswith("on_")]:
        is_property = isinstance(inspect.getattr_static(resource, name), property)
        if not is_property and _is_responder(resource, name):
            continue
        if name == "on_websocket":
            raise PachinkoError(f"Falcon routes {cls}.{name} itself; call it {name}_message, say")
        if is_property:
            raise PachinkoError(f"{cls}.{name} is a property; write async def {name}(self, conn)")
        found.append((name.removeprefix("on_"), getattr(resource, name)))
    if not found:
        write = f"class {cls}:\n    async def on_send(self, conn, *, text: str): ..."
        raise PachinkoError(f"{cls} has no method to route; write\n{write}")
    return found


def _is_responder(resource: object, name: str) -> bool:
    """Tell whether a method is Falcon's: it has the name of an HTTP method and takes a request."""
    if name == "on_connect" or _RESPONDER.fullmatch(name) is None:  # No app routes HTTP CONNECT.
        return False
    with contextlib.suppress(Exception):  # What has no signature is refused later.
        first, *_ = signature_of(method := getattr(resource, name)).parameters.values()
        t = known_type(method, first.annotation, _NOWHERE)
        return first.name in ("req", "request") or issubclass(t, falcon.Request)
    return False


@attrs.define(eq=False)
class Routes:
    """The functions that are registered for one endpoint."""

    authenticate: Callable[..., Awaitable[str | None]] | None = None
    takes_guests: bool = False  # `authenticate` is optional
    connect: list[Callable[..., Awaitable[None]]] = attrs.Factory(list)
    accepted: list[Callable[..., Awaitable[None]]] = attrs.Factory(list)
    handlers: dict[str, Handler] = attrs.Factory(dict)
    disconnect: list[Callable[..., Awaitable[None]]] = attrs.Factory(list)
    fallback: Callable[..., Awaitable[Any]] | None = None
    binary: Callable[..., Awaitable[Any]] | None = None
    middleware: list[Callable[..., Awaitable[Any]]] = attrs.Factory(list)
    errors: dict[type[Exception], Callable[..., Awaitable[Any]]] = attrs.Factory(dict)
    # Each with the name of its lease, or None if every process runs it.
    workers: list[tuple[str | None, Callable[[], Awaitable[None]]]] = attrs.Factory(list)
    providers: dict[Any, Provider] = attrs.Factory(dict)  # a key is the type that is provided
    snapshots: dict[str, Callable[..., Awaitable[Any]]] = attrs.Factory(dict)  # by prefix
    has_resumable: bool = False  # there is a stream that goes on without its client
    is_scoped: bool = False  # there is a middleware or a provider: each message has a context
    # The included routes around a message type, the fallback (`str`) and the binary handler
    # (`bytes`), the outermost first; only those that have middleware or error handlers.
    scopes: dict[Any, tuple[Routes, ...]] = attrs.Factory(dict)
    frames: list[FrameClass] = attrs.Factory(list)  # the classes of what `decode` returns
    # `decode` reads a text frame of a known type. A validator in a payload may raise anything.
    decode: Callable[[str], Received] = attrs.Factory(lambda: decoder_of(()))

    def start(self, codec: Codec) -> None:
        """Make the classes of all frames. From now on *codec* does not change."""
        self.frames = []
        self.add(self.handlers.values(), codec)

    def add(self, handlers: Iterable[Handler], codec: Codec | None) -> None:
        """Add all *handlers*, or none if one is refused; *codec* is None before the start."""
        handlers = [*handlers]
        frames = [codec.frame_class(h.type, h.annotation, h) for h in handlers] if codec else []
        for handler in handlers:
            handler.writers.clear()
            self.handlers[handler.type] = handler
            self.has_resumable |= handler.resumable is not None
        self.frames += frames
        self.decode = self.decode_first

    def decode_first(self, text: str) -> Received:
        """Decode the first frame after handlers were added: make the decoder, and keep it."""
        self.decode = decoder_of(self.frames)
        return self.decode(text)

    def add_middleware(self, function: Callable[..., Awaitable[Any]]) -> None:
        """Put *function* around messages, inside of the others."""
        self.middleware.append(function)
        self.is_scoped = True

    def add_error(self, cls: type[Exception], function: Callable[..., Awaitable[Any]]) -> None:
        """Call *function* with errors of *cls*, or refuse a second one."""
        refuse_second(self.errors.get(cls), function, f"{cls.__name__} has a handler")
        self.errors[cls] = function

    def add_snapshot(self, prefix: str, function: Callable[..., Awaitable[Any]]) -> None:
        """Take snapshots of the groups that begin with *prefix*, or refuse a second function."""
        what, cure = f"{prefix!r} has a snapshot", "give it a longer prefix"
        refuse_second(self.snapshots.get(prefix), function, what, cure)
        self.snapshots[prefix] = function

    def add_provider(self, provider: Provider) -> None:
        """Pass what *provider* makes to the handlers that take its type."""
        self.providers[provider.type] = provider
        self.is_scoped = True

    def set(self, name: str, function: Any, what: str, *, takes_guests: bool = False) -> None:
        """Set the one function for *name*, or refuse a second one."""
        refuse_second(getattr(self, name), function, f"{what} has a handler")
        setattr(self, name, function)
        self.takes_guests = self.takes_guests or takes_guests

    def add_scope(self, key: Any, inner: tuple[Routes, ...]) -> None:
        """Put the middleware and the error handlers of *inner* around what has this *key*."""
        if inner:
            self.scopes[key] = inner
            self.is_scoped = self.is_scoped or any(each.middleware for each in inner)

    def error_handler(self, exc: BaseException) -> Callable[..., Awaitable[Any]] | None:
        """Return the handler for the class of *exc* or its nearest base class, or None."""
        return self.errors.get(self._class_handled(exc))

    def is_handled(self, exc: BaseException) -> bool:
        """Tell whether an error handler is for *exc* in particular, and not for any `Exception`."""
        return self._class_handled(exc) not in (None, Exception)

    def _class_handled(self, exc: BaseException) -> Any:
        # Pachinko knows what these mean: a handler of a base class does not get them.
        built_in = (MessageError, Close, falcon.HTTPError, falcon.WebSocketDisconnected)
        for cls in type(exc).__mro__:
            if cls in self.errors or cls in built_in:
                return cls if cls in self.errors else None
        return None


# ── scope ─────────────────────────────────────────────────────────────────────────────────────
#
# A message has a context of its own where it has middleware or provided values. What belongs to no
# client has an empty one. A provided value is made for one call of a handler, and closed after it.

_PROVIDE = "@ws.provide\nasync def session(conn) -> AsyncIterator[Session]:\n    yield ..."
_ITERATORS = (AsyncIterator, AsyncIterable, AsyncGenerator)
_ENDED = object()  # no coroutine yields it
_AROUND = (*_ITERATORS, Iterator, Iterable, Generator)  # they stand around the provided type
# The functions that `with_provided` has made, and those that they call.
_inside: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class Contexts:
    """Runs coroutines one after the other in the current task, each in a context of its own.

    PERF: a coroutine stepped from Python ends by a `StopIteration`, which costs three times what
    the context does. So one generator, which does not end, steps all coroutines of a connection.
    """

    __slots__ = ("_send", "_throw")

    def __init__(self) -> None:
        steps: Any = _steps_of_many()
        next(steps)
        self._send, self._throw = steps.send, steps.throw

    @types.coroutine
    def run(self, work: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
        """Await *work* in a copy of the current context."""
        step = contextvars.copy_context().run
        waits_for = step(self._send, work)
        value, thrown = None, None
        try:
            while waits_for is not _ENDED:
                try:
                    value = yield waits_for
                except BaseException as exc:  # The loop throws in a cancellation, for example.
                    thrown = exc
                # In the ``except`` block, *exc* would become the context of any error.
                waits_for = step(self._send, value) if thrown is None else step(self._throw, thrown)
                thrown = None
        finally:
            del thrown  # It refers to this frame, in a cycle.


@types.coroutine
def _steps_of_many() -> Generator[Any, Any, None]:
    """Await each coroutine that is sent, and then yield `_ENDED`."""
    while True:
        work = yield _ENDED
        yield from work


def call_through(
    middleware: list[Callable[..., Awaitable[Any]]], conn: Connection, envelope: Envelope,
    innermost: Callable[[], Any],
) -> Awaitable[Any]:  # fmt: skip
    """Call the outermost *middleware*, with *innermost* inside of all."""
    for each in middleware[:0:-1]:
        innermost = functools.partial(each, conn, envelope, innermost)
    return middleware[0](conn, envelope, innermost)


def around(routes: Routes, key: Any) -> tuple[Routes, ...]:
    """Return all routes around what has this *key* in `Routes.scopes`, the outermost first."""
    return (routes, *routes.scopes.get(key, ()))


def middleware_of(routes: Iterable[Routes]) -> list[Callable[..., Awaitable[Any]]]:
    """Return the middleware of all *routes*, the outermost first."""
    return [function for each in routes for function in each.middleware]


@contextlib.asynccontextmanager
async def closing(items: AsyncGenerator[Any]) -> AsyncGenerator[AsyncGenerator[Any]]:
    """Close *items* at the end of the block, whose own error counts."""
    try:
        yield items
    finally:
        try:
            await items.aclose()
        except BaseExceptionGroup as group:
            # A `TaskGroup` around a `yield` takes the end of its generator for one of its errors.
            rest = group.split(GeneratorExit)[1]
            if rest is not None:
                raise rest from None


def create_task(work: Coroutine[Any, Any, T], *, is_detached: bool = False) -> asyncio.Task[T]:
    """Create a task whose code runs after the caller has stored it.

    Work that is not only the calling client's *is_detached*: its context is empty. The task factory
    of the loop is not asked: with `asyncio.eager_task_factory`, a task may have ended before its
    creator knows it.
    """
    context = contextvars.Context() if is_detached else None
    return asyncio.Task(work, loop=asyncio.get_running_loop(), context=context)


@attrs.frozen(eq=False)
class Provider:
    """A function that makes the value of a type, for each call that takes it."""

    type: Any
    function: Callable[..., Any]  # where files share it, each has a `Provider` for it
    takes: dict[str, Provider]  # providers of its own parameters, by name
    # For a generator it returns a context manager. Otherwise it is None.
    manage: Callable[..., contextlib.AbstractAsyncContextManager[Any]] | None


async def _provide(
    takes: dict[str, Provider], conn: Connection, stack: contextlib.AsyncExitStack,
    made: dict[Any, Any],
) -> dict[str, Any]:  # fmt: skip
    """Return the values that *takes* names; *stack* closes them. One of each type is *made*."""
    for each in takes.values():
        if each.type not in made:
            values = await _provide(each.takes, conn, stack, made)
            if each.manage is not None:
                made[each.type] = await stack.enter_async_context(each.manage(conn, **values))
            else:
                made[each.type] = await each.function(conn, **values)
    return {name: made[each.type] for name, each in takes.items()}


def with_provided(
    function: Callable[..., Any], providers: dict[Any, Provider], namespaces: Namespaces
) -> Callable[..., Any]:
    """Return *function*, or one that gives it what it takes of *providers*.

    The signature of the one returned has the other parameters. Raises `PachinkoError`.
    """
    takes = _taken(function, providers, namespaces)
    if not takes:
        return function

    async def call(conn: Connection, /, *args: Any, **fields: Any) -> Any:
        async with contextlib.AsyncExitStack() as stack:
            fields |= await _provide(takes, conn, stack, {})
            return await function(conn, *args, **fields)

    async def stream(conn: Connection, /, *args: Any, **fields: Any) -> AsyncIterator[Any]:
        async with contextlib.AsyncExitStack() as stack:
            fields |= await _provide(takes, conn, stack, {})
            async with closing(function(conn, *args, **fields)) as items:
                async for item in items:
                    yield item

    outer: Any = functools.update_wrapper(stream if is_stream(function) else call, function)
    signature = signature_of(function)
    left = [p for p in signature.parameters.values() if p.name not in takes]
    outer.__signature__ = signature.replace(parameters=left)
    _inside[outer] = function
    return cast("Callable[..., Any]", outer)


def registered(function: Any) -> Any:
    """Return what was registered as *function*, around which `with_provided` may have put more."""
    return _inside.get(function, function) if inspect.isfunction(function) else function


def _taken(
    function: Callable[..., Any], providers: dict[Any, Provider], namespaces: Namespaces
) -> dict[str, Provider]:
    """Return what makes keyword-only parameters of *function*, by name."""
    takes: dict[str, Provider] = {}
    is_async = is_stream(function) or is_called_as(function, inspect.iscoroutinefunction)
    if not providers or not is_async:  # Whatever is not async is refused later.
        return takes
    hints = _hints_of(function, namespaces)
    for p in parameters_of(function):
        t = hints.get(p.name)
        inner = get_args(t) if origin_of(t) in (typing.Annotated, *_UNIONS) else ()
        for wanted in [each for each in (t, *inner) if each in providers]:
            if wanted is not t or p.kind is not p.KEYWORD_ONLY:
                raise PachinkoError(
                    f"{place_of(function)} takes `{as_code(p)}`. A provided value is passed to a "
                    f"keyword-only parameter of exactly its type; write `(conn, *, {p.name}: "
                    f"{shown(wanted)})`"
                )
            takes[p.name] = providers[t]
    return takes


def read_provider(function: Any, routes: Routes, namespaces: Namespaces) -> Provider:
    """Return what provides by *function*, or raise `PachinkoError`."""
    place = place_of(function)
    if not is_stream(function) and is_stream(inspect.unwrap(function)):
        raise PachinkoError(f"{place} is decorated; write it without @asynccontextmanager")
    check_function(with_provided(function, routes.providers, namespaces), _PROVIDE, 1, streams=True)
    try:
        declared = resolve(function, signature_of(function).return_annotation, namespaces)
    except Exception as exc:  # The annotation of an application may raise anything.
        raise PachinkoError(f"{place} provides an unknown type: {why(exc)}") from exc
    t = _provided_type(function, declared)
    check_provider(t, function, routes, namespaces)
    manage = contextlib.asynccontextmanager(function) if is_stream(function) else None
    return Provider(t, function, _taken(function, routes.providers, namespaces), manage)


def check_provider(t: Any, function: Any, routes: Routes, namespaces: Namespaces) -> None:
    """Raise `PachinkoError` if another function provides *t*, or a handler takes it from clients.

    Several files may share a provider, so *function* itself may be there already.
    """
    if (first := routes.providers.get(t)) is not None:
        cure = "give each a type of its own, by typing.NewType for example"
        if first.function != function:
            refuse_second(first.function, function, f"{shown(t)} has a provider", cure)
        return  # What takes it has been compared with the first one.
    taken = [(each.function, each.types, " from its payload") for each in routes.handlers.values()]
    for end in (*routes.connect, *routes.accepted, *routes.disconnect):
        annotations = [p.annotation for p in parameters_of(end)]
        taken.append((end, [known_type(end, each, namespaces) for each in annotations], ""))
    for earlier, found, source in taken:
        if t in found:
            raise PachinkoError(
                f"{place_of(earlier)} takes {shown(t)}{source}; register {place_of(function)} "
                f"above the handlers that take what it provides, on the same Pachinko"
            )


def _provided_type(function: Any, t: Any) -> Any:
    """Return what *function*, whose return annotation is *t*, provides, or raise."""
    is_around = origin_of(t) in _AROUND and bool(get_args(t))
    inner, written = get_args(t)[0] if is_around else t, "Session"
    if inner in (_EMPTY, types.NoneType) or class_of(inner) in _AROUND:
        refused = "does not say what it provides"
    elif not is_own(inner):
        refused = f"provides {shown(inner)}, as payloads have it, and not a type of its own"
    elif (origin_of(t) in _ITERATORS) is is_around is is_stream(function):
        return inner
    else:
        written = shown(inner)
        refused = f"{'has a' if is_stream(function) else 'has no'} `yield`"
    written = f"AsyncIterator[{written}]" if is_stream(function) else written
    name = getattr(function, "__name__", "provider")
    raise PachinkoError(
        f"{place_of(function)} {refused}; write `async def {name}(conn) -> {written}`"
    )


# ── include ───────────────────────────────────────────────────────────────────────────────────
#
# Whoever includes another Pachinko registers anew what was registered there, for its own path and
# codec, and under a prefix. The result is compared with what is there before anything is added.

Step = Callable[[Any], None]  # It registers something on a Pachinko.
Parts = dict["Lifecycle", tuple[str, ...]]  # the included, with their prefixes
_PREFIX = re.compile(r"[\w-]+(\.[\w-]+)*")
ONCE = {"authenticate": "authenticate", "fallback": "the fallback", "binary": "binary"}
RAW: dict[str, type] = {"fallback": str, "binary": bytes}  # the keys in `Routes.scopes`


def check_prefix(prefix: Any) -> str:
    """Return *prefix* as on the wire; `PachinkoError` unless it is one of types, or empty."""
    if prefix != "" and not (isinstance(prefix, str) and _PREFIX.fullmatch(prefix)):
        raise PachinkoError(
            f"a prefix is a name, or several with dots between, and is joined by a dot; write "
            f'ws.include(todos.ws, prefix="todo"), got prefix={prefix!r}'
        )
    return check_type(prefix) if prefix else ""


def read_included(
    routes: Routes, own: Routes, prefix: str, namespaces: Namespaces
) -> dict[str, Handler]:
    """Return the handlers of *own* that *routes* has not, under *prefix*, by their former types.

    Raises `PachinkoError` if *routes* has another function for what may be there once.
    """
    dotted = prefix and f"{prefix}."
    types = {former: dotted + former for former in own.handlers} | {"authenticate": "authenticate"}
    for former, handler in own.handlers.items():
        if types[former].endswith(".reply"):
            place, reply = place_of(handler.function), f"{types[former]!r}, a reply"
            raise PachinkoError(f"{place} would handle {reply}; write another prefix")
    there = _once(routes, (), {})
    for what, second in _once(own, (own,), types).items():
        if what in there and there[what] != second:
            refuse_second(there[what][0], second[0], f"{what} has a handler")
    for providing, taking in ((own, routes), (routes, own)):
        for t, provider in providing.providers.items():
            check_provider(t, provider.function, taking, namespaces)
    new = [former for former in own.handlers if types[former] not in routes.handlers]
    return {former: attrs.evolve(own.handlers[former], type=types[former]) for former in new}


def _once(
    routes: Routes, outer: tuple[Routes, ...], types: Mapping[str, str]
) -> dict[str, tuple[Any, ...]]:
    """Return by name what may be there once: the function, and what else has to be the same."""

    def inner(key: Any) -> list[Any]:
        around = [*outer, *routes.scopes.get(key, ())]
        return [(each.middleware, each.errors) for each in around if each.middleware or each.errors]

    found: dict[str, tuple[Any, ...]] = {name.strip(): (f,) for name, f in routes.workers if name}
    for name, key in RAW.items():
        if (function := getattr(routes, name)) is not None:
            found[ONCE[name]] = registered(function), inner(key)
    for prefix, function in routes.snapshots.items():
        found[f"the snapshot of {prefix!r}"] = (function,)
    for type, handler in routes.handlers.items():
        options: Any = handler.only, handler.is_concurrent, handler.resumable, inner(type)
        if type == "authenticate":  # No middleware sees it.
            options = routes.takes_guests
        found[repr(types.get(type, type))] = registered(handler.function), options
    return found


def add_included(routes: Routes, own: Routes, found: Mapping[str, Handler]) -> None:
    """Add to *routes* what *own* has around its handlers *found*, and what may be there once."""

    def inner(key: Any) -> tuple[Routes, ...]:
        return tuple(each for each in around(own, key) if each.middleware or each.errors)

    for former, handler in found.items():
        routes.add_scope(handler.type, inner(former))
    for name, what in ONCE.items():
        if getattr(routes, name) is None and getattr(own, name) is not None:
            routes.set(name, getattr(own, name), what, takes_guests=own.takes_guests)
            routes.add_scope(RAW.get(name), inner(RAW.get(name)))
    for provider in own.providers.values():
        routes.add_provider(provider)
    routes.snapshots.update(own.snapshots)


# ── handshake ─────────────────────────────────────────────────────────────────────────────────
#
# The headers of the handshake decide who may connect. A page of any site can open a WebSocket to
# any other site; the browser sends that site's cookies along, and leaves it to the server to check
# the `Origin` (RFC 6455, 10.2). A client that is no browser may send any origin, or none.

_HOST = r"\[[0-9a-f:.]+\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?"
_ORIGIN = re.compile(
    rf"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>{_HOST})(?::(?P<port>[0-9]{{1,5}}))?", re.ASCII
)
_DEFAULT_PORTS = {"http": 80, "https": 443}
# The name of a header (RFC 9110, 5.1), but of none that makes the handshake or a body.
_HEADER_NAME = re.compile(
    r"(?!(?:sec-websocket-.*|connection|upgrade|content-length|transfer-encoding)$)"
    r"[!#$%&'*+.^_`|~0-9a-z-]+", re.ASCII | re.IGNORECASE
)  # fmt: skip
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e]*")
Header = tuple[str, str]
_OPAQUE = frozenset(["null", "file://"])  # origins that many pages have, and name no site
_SHOWN = 200  # characters of a header in a log line; a header may have thousands
UNAUTHENTICATED = 3401  # the close code is 3000 and the HTTP status


@attrs.frozen
class Origin:
    """The origin of a page (RFC 6454), in lower case."""

    scheme: str
    host: str
    port: int | str | None  # the default of the scheme if none was named; ``*`` allows all


def parse_origin(text: str) -> Origin | None:
    """Read an ``Origin`` header. Returns None for ``null`` and for anything that is no origin."""
    match = _ORIGIN.fullmatch(text.lower()) if text.isascii() else None
    if match is None or int(match["port"] or 0) > 65_535:
        return None
    scheme, host, port = match.group("scheme", "host", "port")
    return Origin(scheme, host, int(port) if port else _DEFAULT_PORTS.get(scheme))


def is_same_host(origin: Origin, scheme: str, host: str) -> bool:
    """Tell whether a page of *origin* belongs to the *host* that it connects to.

    An ``https`` page may come by any *scheme*: a proxy may have decrypted its request. An ``http``
    page may not come by an encrypted one, because anybody on the line could have written it.
    """
    is_forged = origin.scheme == "http" and scheme in ("https", "wss")
    if origin.scheme not in _DEFAULT_PORTS or is_forged:
        return False
    return parse_origin(f"{origin.scheme}://{host}") == origin


@attrs.frozen
class Origins:
    """The origins that one endpoint lets in, beside the request's own host."""

    allowed: frozenset[Origin]  # the host ``*.example.com`` stands for all subdomains
    opaque: frozenset[str]  # the origins of `_OPAQUE` that are let in
    takes_all: bool
    trust_forwarded: bool

    def refusal(self, req: falcon.asgi.Request) -> str | None:
        """Return why *req* is refused, with the setting that lets it in, or None if it may come."""
        text = req.get_header("Origin")
        if self.takes_all or text is None or text.lower() in self.opaque:
            return None
        origin = parse_origin(text)
        shown = f"{text[:_SHOWN]!r} at {req.path[:_SHOWN]!r}"
        if origin is None:
            if text.lower() in _OPAQUE:
                return f"{shown}: it names no site; to allow all such pages: origins=[{text!r}]"
            return f'{shown}: it names no site; only origins="*" would let it in'
        own = _forwarded(req) if self.trust_forwarded else (req.scheme, req.netloc)
        labels = origin.host.split(".")
        above = [".".join(["*", *labels[n:]]) for n in range(1, len(labels))]
        names = {
            Origin(origin.scheme, host, port)
            for host in (origin.host, *above) for port in (origin.port, "*")
        }  # fmt: skip
        if is_same_host(origin, *own) or names & self.allowed:
            return None
        setting = f"origins=[{text[:_SHOWN]!r}]"
        if not self.trust_forwarded and is_same_host(origin, *_forwarded(req)):
            setting += ", or trust_forwarded=True if it was a proxy of yours that named this host"
        return f"{shown} of the host {own[1][:_SHOWN]!r}; to allow it: {setting}"


def _forwarded(req: falcon.asgi.Request) -> tuple[str, str]:
    """Return the scheme and host that the first proxy was asked for, before a comma."""
    hops = (req.forwarded_scheme, req.forwarded_host)
    scheme, host = (each.partition(",")[0].strip() for each in hops)
    return scheme, host


def read_origins(value: Iterable[str] | None, trust_forwarded: object) -> Origins:
    """Check the options *origins* (its *value*) and *trust_forwarded*, or raise `PachinkoError`."""
    if not isinstance(trust_forwarded, bool):
        raise PachinkoError(f"trust_forwarded is True or False, got {trust_forwarded!r}")
    names = () if value is None else ("*",) if value == "*" else texts(value, "origins")
    allowed = set[Origin]()
    for name in names:
        origin = parse_origin(name.replace("://*.", "://", 1).removesuffix(":*"))
        if name != "*" and name not in _OPAQUE and origin is None:
            raise PachinkoError(
                f'origins are like "https://example.com", "https://*.example.com" (every host '
                f'below it) or "*", in ASCII as browsers send them; got {name!r}. '
                f'"http://localhost:*" takes every port, "null" and "file://" pages of no site'
            )
        if origin is not None:
            host = f"*.{origin.host}" if "://*." in name else origin.host
            allowed.add(Origin(origin.scheme, host, "*" if name.endswith(":*") else origin.port))
    return Origins(frozenset(allowed), _OPAQUE & {*names}, "*" in names, trust_forwarded)


def texts(value: Any, option: str) -> tuple[str, ...]:
    """Check the *value* of an option that takes several texts, or raise `PachinkoError`."""
    is_several = isinstance(value, Iterable) and not isinstance(value, str)
    several: tuple[Any, ...] = tuple(value) if is_several else (None,)
    if not all(isinstance(text, str) for text in several):
        raise PachinkoError(f"{option} is a list of str; write {option}=[{str(value)!r}]")
    return several


def credentials(req: falcon.asgi.Request, offered: Iterable[str]) -> tuple[str | None, list[str]]:
    """Return the token of a handshake, and the subprotocols *offered* without it.

    The token stands in ``Authorization: Bearer …`` (RFC 6750, 2.1). A page in a browser cannot set
    that header; it offers the subprotocol ``bearer``, and the token as the next one.
    """
    names, token = [*offered], None
    if "bearer" in names[:-1]:
        token = names.pop(names.index("bearer") + 1)
    scheme, _, value = (req.get_header("Authorization") or "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        token = value.strip()
    return token, names


def is_header(name: Any, value: Any) -> bool:
    """Return whether an application may add this header to the answer to a handshake."""
    is_text = isinstance(name, str) and isinstance(value, str)
    return is_text and bool(_HEADER_NAME.fullmatch(name) and _HEADER_VALUE.fullmatch(value))


def token_of(payload: Any) -> str | None:
    """Return the token in the payload of an ``authenticate`` message, or None if it has none."""
    token = payload.get("token") if type(payload) is dict else None
    return token if isinstance(token, str) else None


# Only these three functions have Falcon's private names, which `tests/test_falcon_names.py` pins.


def server_calls(ws: Any) -> tuple[Callable[[], Awaitable[Event]], Callable[[Event], Any]]:
    """Return the server's own `receive` and `send` for Falcon's socket *ws*.

    Falcon's coroutines around them cost 12 % of a message. Its receive queue doubles the cost, and
    loses what it holds when the client leaves. So it is turned off, for this socket only. If a
    middleware has accepted the socket, the queue runs already, and frames are read from it.
    """
    queue = ws._buffered_receiver
    if queue._pump_task is None:
        queue._max_queue = 0
        ws._asgi_receive = queue._asgi_receive
    return ws._asgi_receive, ws._asgi_send


def mark_closed(ws: Any, code: int | None) -> None:
    """Tell Falcon's socket that the connection is over: its own close may wait for ever."""
    ws._state = type(ws._state).CLOSED
    ws._close_code = code


def refuse_by_status(ws: Any, scope: Mapping[str, Any], headers: Iterable[Header]) -> None:
    """Let Falcon's refusal of the handshake have an HTTP status, where the server offers that.

    Falcon asks the app's error handlers, and then closes with 3000 and the status. Before accept,
    servers make HTTP 403 of any close. The extension ``websocket.http.response`` of ASGI has the
    status, the headers and the body of the error that Falcon handles, and *headers*.
    """
    send = ws._asgi_send

    async def refuse(event: Event) -> None:
        status = event.get("code", 0) - 3000
        if not (ws.unaccepted and event["type"] == "websocket.close" and 300 <= status < 600):
            await send(event)
            return
        exc = sys.exc_info()[1]  # Falcon closes while it handles the error.
        if not isinstance(exc, (falcon.HTTPError, falcon.HTTPStatus)) or exc.status_code != status:
            exc = falcon.HTTPError(status)  # An error handler has closed by itself.
        given: Any = exc.headers or ()
        own: list[Header] = [*(given.items() if isinstance(given, Mapping) else given)]
        if isinstance(exc, falcon.HTTPError):
            kind, body = "application/json", exc.to_json()
        else:
            kind, body = "text/plain; charset=utf-8", (exc.text or "").encode()
        replaced = {str(name).lower() for name, _ in own}
        rest = [h for h in (("Content-Type", kind), *headers) if h[0].lower() not in replaced]
        texts = [(str(n), str(v)) for n, v in (*rest, *own)]  # Falcon takes numbers, too
        sent = [(n.lower().encode(), v.encode()) for n, v in texts if is_header(n, v)]
        await send({"type": "websocket.http.response.start", "status": status, "headers": sent})
        await send({"type": "websocket.http.response.body", "body": body})

    if ws.unaccepted and "websocket.http.response" in (scope.get("extensions") or ()):
        ws._asgi_send = refuse


# ── clock ─────────────────────────────────────────────────────────────────────────────────────
#
# All that waits for time, or measures it, goes through one object. `simulate` puts a clock that can
# be moved in its place, so the object is always read as the global `clock`.

W = TypeVar("W", bound=asyncio.Future[Any])
# PERF: each connection asks for the time, and a global costs less than an attribute.
running_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.get_running_loop
_ROUNDING = 1e-6  # seconds; a timer that is no later than that is due


class Timer(typing.Protocol):
    """What `Clock.call_at` returns."""

    def cancel(self) -> object:
        """Do not call the function, if that has not happened yet."""


class Clock:
    """The clock of the event loop. A subclass needs nothing but its own `time` and `call_at`."""

    ahead: float = 0.0  # seconds that it was moved; the time of day is `time.time() + clock.ahead`

    def time(self) -> float:
        """Return the seconds on the clock of the running loop."""
        return running_loop().time()

    def call_at(self, when: float, function: Callable[..., object], *args: Any) -> Timer:
        """Call *function* when `time` has reached *when*, in the present context."""
        return running_loop().call_at(when, function, *args)

    async def sleep(self, seconds: float) -> None:
        """Wait for so many seconds; for one turn of the loop if that is not above 0."""
        if seconds > 0:
            await self.wait([running_loop().create_future()], seconds)
        else:
            await asyncio.sleep(0)

    async def wait(self, futures: Iterable[W], seconds: float) -> set[W]:
        """Wait until all *futures* are done; return those that are not after so many seconds.

        It raises nothing of theirs, and cancels none, as `asyncio.wait`.
        """
        if not (left := set(futures)):
            return left
        over = running_loop().create_future()

        def note(*done: W) -> None:
            left.difference_update(done)
            if not (over.done() or (done and left)):  # The timer calls it with nothing done.
                over.set_result(None)

        timer = self.call_at(self.time() + max(0.0, seconds), note)
        for future in left:
            future.add_done_callback(note)
        try:
            await over
        finally:
            timer.cancel()
            for future in left:
                future.remove_done_callback(note)
        return {future for future in left if not future.done()}


class MovableTimer:
    """A call of a `MovableClock` that has not been made yet."""

    def __init__(self, clock: MovableClock, at: float, call: Callable[[], object]) -> None:
        """Make the *call* in the present context, *at* a time on the loop's own clock."""
        self.at: float = at
        self.loop: asyncio.AbstractEventLoop = running_loop()
        self.origin: contextvars.Context = contextvars.copy_context()
        self._call: Callable[[], object] = call
        self._pending = clock.pending
        self._pending[self] = None
        self._schedule()

    def _schedule(self) -> None:
        if self.at <= self.loop.time() + _ROUNDING:
            self._handle: asyncio.Handle = self.loop.call_soon(self._run, context=self.origin)
        else:
            self._handle = self.loop.call_at(self.at, self._run, context=self.origin)

    def move(self, seconds: float) -> None:
        """Make the call so many seconds earlier. Calls that are due then keep this order."""
        self._handle.cancel()
        self.at -= seconds
        self._schedule()

    def cancel(self) -> None:
        """Do what `Timer.cancel` says."""
        self._pending.pop(self, None)
        self._handle.cancel()
        self._call = int  # The function may refer to this timer.

    def _run(self) -> None:
        call = self._call
        self.cancel()
        call()


class MovableClock(Clock):
    """A clock that `simulate` moves. Several loops may use it, each in a thread of its own."""

    def __init__(self) -> None:
        self.ahead: float = 0.0
        # Nothing but its loop keeps a pending timer.
        self.pending: weakref.WeakKeyDictionary[MovableTimer, None] = weakref.WeakKeyDictionary()

    def time(self) -> float:
        """Return the seconds on the clock of the running loop, and those that it was moved."""
        return super().time() + self.ahead

    def call_at(self, when: float, function: Callable[..., object], *args: Any) -> Timer:
        """Do what `Clock.call_at` says."""
        return MovableTimer(self, when - self.ahead, functools.partial(function, *args))

    @property
    def timers(self) -> list[MovableTimer]:
        """The pending timers of the running loop, the earliest one first."""
        loop = running_loop()
        every = [timer() for timer in self.pending.keyrefs()]  # Other threads may add some.
        own = [timer for timer in every if timer is not None and timer.loop is loop]
        return sorted(own, key=lambda timer: timer.at)

    def next_due(self) -> float | None:
        """Return the seconds until the first of `timers`, at least 0; None if there is none."""
        return max(0.0, timers[0].at - super().time()) if (timers := self.timers) else None

    def is_own(self, handle: Any) -> bool:
        """Return whether *handle*, which a loop has scheduled, is that of a `MovableTimer`."""
        return isinstance(getattr(handle._callback, "__self__", None), MovableTimer)

    def advance(self, seconds: float) -> None:
        """Move the clock. What is then due in the running loop is called in its next turn."""
        timers = self.timers  # This raises outside of a loop, before anything is moved.
        self.ahead += seconds
        for timer in timers:
            timer.move(seconds)


clock: Clock = Clock()


def is_seconds(value: Any) -> bool:
    """Return whether *value* is a finite number of seconds, at least 0."""
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max


# ── limits ────────────────────────────────────────────────────────────────────────────────────
#
# One connection is bounded by time, by the rate of messages, and by the options of its endpoint.

_MAX_COUNTS = 100  # names in the counts of a hub: an application may make error codes up as it goes
_CANCEL_AGAIN = 5.0  # seconds that cancelled code may clean up before it is cancelled once more
# Whether `Task.cancelling` is right: before 3.13 a `TaskGroup` leaves in it what it has caught.
_COUNTS_CANCELLATIONS: bool = sys.version_info >= (3, 13)
current_task: Callable[[], asyncio.Task[Any]] = cast(Any, asyncio.current_task)  # not None here


@attrs.define(eq=False, weakref_slot=False)
class TimeLimit:
    """Cancel the task inside the ``with`` block at a given time; then raise `TimeoutError`.

    `asyncio.timeout` cancels once. Code may swallow that, and so may a `TaskGroup` of Python 3.11
    that is just ending. A limit cancels again every 5 seconds. If other code cancels the task too,
    `CancelledError` leaves the block; before Python 3.13 only if that is after the expiry.
    """

    _is_exact: typing.ClassVar[bool] = _COUNTS_CANCELLATIONS
    _when: float | None = None
    expired: bool = False
    _guarded: asyncio.Task[Any] | None = None
    _timer: Timer | None = None
    _own: int = 0  # how often this limit has cancelled the task
    _others: int = 0  # cancellations that the task counted before these

    def __enter__(self) -> TimeLimit:
        self._guarded = current_task()
        self._others = self._guarded.cancelling()
        if self._when is not None:
            self.end_at(self._when)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: object, traceback: object) -> None:
        task, self._guarded = cast("asyncio.Task[Any]", self._guarded), None
        if self._timer is None:  # Nothing has ended the block.
            return
        self._timer.cancel()
        # Undo the limit's own cancellations; code inside the block may have undone some already.
        for _ in range(min(self._own, task.cancelling() - self._others)):
            task.uncancel()
        # If more are left than there were before, other code has cancelled the task.
        if self.expired and kind is asyncio.CancelledError and task.cancelling() <= self._others:
            raise TimeoutError

    def end_at(self, when: float) -> None:
        """Expire at *when* on the loop's clock, or before if an earlier call has said so.

        Does nothing after the block or the expiry.
        """
        if self._guarded is None or self.expired:
            return
        if self._timer is not None:
            if cast(float, self._when) <= when:
                return
            self._timer.cancel()
        self._when = when
        if when <= clock.time():  # A timer would let other events of this turn go first.
            self._timer = asyncio.get_running_loop().call_soon(self._expire)
        else:
            self._timer = clock.call_at(when, self._expire)

    def is_around(self, task: object) -> bool:
        """Return whether *task* is inside the block."""
        return self._guarded is task

    def _expire(self) -> None:
        task = cast("asyncio.Task[Any]", self._guarded)
        if not self.expired:
            self.expired = True
            # Otherwise some of the cancellations counted now may have been caught.
            self._others = self._others if self._is_exact else task.cancelling()
        self._own += 1
        task.cancel()
        self._timer = clock.call_at(clock.time() + _CANCEL_AGAIN, self._expire)


class WaitLimit(TimeLimit):
    """A `TimeLimit` around code that leaves none of its own cancellations in the task's count.

    Before Python 3.13, too, `CancelledError` leaves the block if other code cancels the task.
    """

    __slots__ = ()
    _is_exact: typing.ClassVar[bool] = True


@attrs.define(eq=False, weakref_slot=False)
class Rate:
    """Admit at most *count* messages at once, and *count* in *seconds* on average (GCRA)."""

    count: int
    seconds: float
    _due: float = 0.0  # when the messages so far would be admitted at the average rate
    _since: float = 0.0  # when refusals began to be counted
    _refused: int = 0

    def take(self, now: float) -> float:
        """Admit a message and return 0.0, or return the seconds until one will be admitted."""
        due = max(self._due, now) + self.seconds / self.count
        wait = due - now - self.seconds
        if wait <= 1e-9:  # Anything smaller comes from rounding.
            self._due = due
            return 0.0
        if now - self._since > self.seconds:
            self._refused, self._since = 0, now
        self._refused += 1
        return wait

    @property
    def is_abused(self) -> bool:
        """Whether more than ten times *count* messages were refused within *seconds*."""
        return self._refused > 10 * self.count

    def refusal(self, wait: float) -> MessageError:
        """Return the answer to a message that may be sent again in *wait* seconds."""
        text = f"at most {self.count} messages in {self.seconds} s"
        return MessageError("rate_limited", text, retry_after=round(wait, 3))


def _option(is_valid: Callable[[Any], bool], kind: str) -> Any:
    def check(_: Any, field: Any, value: Any) -> None:
        if not is_valid(value):
            raise PachinkoError(f"{field.name} is {kind}, got {value!r}")

    return attrs.field(validator=check)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_period(value: Any) -> bool:
    return is_seconds(value) and value > 0


def _is_rate(value: Any) -> bool:
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2
    return value is None or (is_pair and _is_count(value[0]) and _is_period(value[1]))


_OVERFLOWS = ("close", "drop_oldest", "replay")


@attrs.frozen(kw_only=True)
class Limits:
    """The options of an endpoint that bound what one connection may use."""

    max_size: int = _option(_is_count, "a number of bytes, at least 1")
    rate: tuple[int, float] | None = _option(_is_rate, "(messages, seconds), such as (20, 1.0)")
    outbox: int = _option(_is_count, "a number of messages, at least 1")
    outbox_bytes: int = _option(_is_count, "a number of bytes, at least 1")
    overflow: str = _option(_OVERFLOWS.__contains__, '"close", "drop_oldest" or "replay"')
    send_timeout: float = _option(is_seconds, "a number of seconds, at least 0")
    linger: float = _option(is_seconds, "a number of seconds, at least 0")
    max_concurrent: int = _option(_is_count, "a number of tasks, at least 1")
    max_groups: int = _option(_is_count, "a number of groups, at least 1")
    handler_timeout: float | None = _option(
        lambda value: value is None or _is_period(value), "a number of seconds above 0, or None"
    )
    auth_timeout: float = _option(_is_period, "a number of seconds above 0")
    connect_timeout: float = _option(_is_period, "a number of seconds above 0")


def count_error(counts: collections.Counter[str], code: str) -> None:
    """Count an error answered with *code*; as ``other`` if *counts* has many names already."""
    name = f"errors.{code}"
    if name not in counts and len(counts) >= _MAX_COUNTS:
        name = "errors.other"
    counts[name] += 1


# ── outbox ────────────────────────────────────────────────────────────────────────────────────
#
# The outbox holds what waits to be written to one client. Only a hub's messages are counted and
# bounded, because a handler that sends or replies waits for its client.


def text_event(data: bytes) -> Event:
    """Return the ASGI event that sends *data* as a text frame (ASGI, WebSocket: Send)."""
    return {"type": "websocket.send", "text": data.decode()}


def event_of(data: bytes) -> Event:
    """Return the ASGI event that sends *data* as a text frame, or `Binary` as a binary one."""
    if type(data) is Binary:
        return {"type": "websocket.send", "bytes": bytes(data)}  # Servers take no subclass.
    return text_event(data)


@attrs.define(eq=False)  # PERF: a frozen one takes twice the time to make. It is never changed.
class Waiting:
    """An event that waits for its turn to be written."""

    event: Event  # An empty one only tells that all before it was written.
    written: asyncio.Future[bool] | None = None  # tells a sender that waits whether it was
    size: int = 0  # the bytes of a hub's message, at least 1; 0 for all else, never dropped
    group: str | None = None
    close: Close | None = None  # Falcon's socket writes it instead of *event*

    def end(self, is_written: bool) -> None:
        """Tell the sender whether the event was written, if it still waits to know."""
        if self.written is not None and not self.written.done():
            self.written.set_result(is_written)


def waiting_for(data: bytes, group: str | None = None) -> Waiting:
    """Return what waits of a hub's message, the frame *data*, to *group* or to no group."""
    return Waiting(event_of(data), None, len(data) or 1, group)


@attrs.define(eq=False)
class Outbox:
    """The events that wait until a write in progress has ended, in order."""

    queue: collections.deque[Waiting] = attrs.Factory(collections.deque)
    pushed: int = 0  # how many of the events are a hub's messages
    size: int = 0  # the bytes of a hub's messages
    gaps: dict[str | None, None] = attrs.Factory(dict)  # groups of dropped messages, in order

    def put(self, waiting: Waiting) -> None:
        """Add *waiting* at the end."""
        self.queue.append(waiting)
        if waiting.size:
            self.pushed += 1
            self.size += waiting.size

    def exceeds(self, share: float, limits: Limits) -> bool:
        """Return whether a hub's messages fill more than *share* of what the outbox may hold."""
        return self.pushed > limits.outbox * share or self.size > limits.outbox_bytes * share

    def extract(self, is_wanted: Callable[[Waiting], bool]) -> list[Waiting]:
        """Remove and return those of a hub's messages that are wanted."""
        found, kept = list[Waiting](), collections.deque[Waiting]()
        for waiting in self.queue:
            (found if waiting.size and is_wanted(waiting) else kept).append(waiting)
        self.queue = kept
        self.pushed -= len(found)
        self.size -= sum(waiting.size for waiting in found)
        return found

    def pin(self, group: str) -> None:
        """Make the messages to *group* ordinary ones, which no longer come from its ring again."""
        self.queue = collections.deque(
            Waiting(each.event, None, each.size, group)
            if each.size and each.group == group else each
            for each in self.queue
        )  # fmt: skip

    def drop_oldest(self) -> None:
        """Drop the oldest of a hub's messages and remember the gap in its group."""
        waiting = next(waiting for waiting in self.queue if waiting.size)
        self.queue.remove(waiting)
        self.pushed -= 1
        self.size -= waiting.size
        self.gaps[waiting.group] = None

    def take(self) -> Waiting | None:
        """Remove and return what to write next, or None. Gaps come last, before the close frame."""
        while self.queue and not (self.gaps and self.queue[0].close is not None):
            waiting = self.queue.popleft()
            if waiting.size:
                self.pushed -= 1
                self.size -= waiting.size
            if not (waiting.event or waiting.close):
                waiting.end(True)
            elif waiting.written is None or not waiting.written.done():  # The sender still waits.
                return waiting
        if not self.gaps:
            return None
        group = next(iter(self.gaps))
        del self.gaps[group]
        return Waiting(text_event(gap_of(group)))

    def clear(self) -> None:
        """Forget everything. A sender that waits learns that its event was not written."""
        for waiting in self.queue:
            waiting.end(False)
        self.queue.clear()
        self.gaps.clear()
        self.pushed = self.size = 0


# ── history ───────────────────────────────────────────────────────────────────────────────────
#
# A message to a kept group stays in a ring for a while, for clients that come back. All groups of a
# process share one count: a position stays good while nothing of its group was dropped behind it.

_FLOORS = 20_000  # forgotten rings (5 MB) of which it is known how far they were dropped
_ENTRY_BYTES = 400  # what a message takes beside its text and the ids that it excludes
_RING_BYTES = 1400  # what a ring takes, with its timer (all on CPython 3.13, 64 bits)
_NO_IDS = frozenset[str]()  # all rings share it: each empty one takes 216 bytes
_POSITION_CHARACTERS = 200  # of a position that a client sends
_BATCH, _BATCH_BYTES = 32, 65_536  # messages to one client at a time that are on their way
Reason = Literal["expired", "epoch", "limit", "broker", "overflow", "snapshot"]


@attrs.frozen
class Window:
    """How much of a group is kept: what exceeds one of these bounds is dropped."""

    messages: int
    seconds: float
    bytes: int


@attrs.frozen
class Position:
    """A point in what was sent to kept groups; texts of it are opaque to clients."""

    epoch: str  # A broker, or a process without one, has another in each of its lives.
    number: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.number}"


NOWHERE = Position("", -1)  # no position of ours


def read_position(value: object) -> Position:
    """Return the position that a client has sent, or `NOWHERE`."""
    if isinstance(value, str) and len(value) <= _POSITION_CHARACTERS:
        epoch, _, number = value.rpartition(".")
        if number.isascii() and number.isdecimal():
            return Position(epoch, int(number))
    return NOWHERE


def with_position(data: bytes, position: Position | str) -> bytes:
    """Return the frame *data* with ``at``. It is spliced in, so that no frame is encoded twice."""
    return b'%b,"at":"%b"}' % (data[:-1], str(position).encode())


@attrs.define(eq=False, kw_only=True)
class Kept(Waiting):
    """A message to a kept group. Its ring shares it with the outboxes of slow clients."""

    number: int
    weight: int  # bytes that it takes
    time: float  # when it was sent, on `clock`
    excluded: frozenset[str]  # ids of connections


@attrs.define(eq=False)
class Ring:
    """The messages to one kept group, in order."""

    group: str
    window: Window
    floor: int  # No message with a higher number was dropped.
    limited: int = -1  # the highest number that was dropped for its bytes
    size: int = 0  # bytes
    messages: collections.deque[Kept] = attrs.Factory(collections.deque)

    def put(self, kept: Kept) -> None:
        """Add a message at the end."""
        self.messages.append(kept)
        self.size += kept.weight

    def drop(self, is_limit: bool) -> None:
        """Drop the oldest message."""
        kept = self.messages.popleft()
        self.size -= kept.weight
        self.floor = kept.number
        if is_limit:
            self.limited = kept.number

    def trim(self, now: float) -> None:
        """Drop what the window does not hold at the time *now*."""
        messages, window = self.messages, self.window
        while messages and (
            len(messages) > window.messages or messages[0].time + window.seconds <= now
        ):
            self.drop(is_limit=False)
        while messages and self.size > window.bytes:
            self.drop(is_limit=True)

    def after(self, number: int, count: int) -> Sequence[Kept]:
        """Return the first *count* messages behind *number*, or as many as a client may get."""
        start = bisect.bisect_right(self.messages, number, key=lambda kept: kept.number)
        batch, size = list[Kept](), 0
        for index in range(start, min(start + min(count, _BATCH), len(self.messages))):
            kept = self.messages[index]  # PERF: `itertools.islice` would pass all before *start*.
            size += kept.size
            if batch and size > _BATCH_BYTES:
                break
            batch.append(kept)
        return batch


class Rings:
    """The kept groups of a process."""

    def __init__(self, rules: Mapping[str, Window], limit: int) -> None:
        """Keep groups by *rules*, windows by the prefix of a name, in *limit* bytes."""
        self.epoch: str = secrets.token_hex(4)
        self.rules: Mapping[str, Window] = rules
        self._limit = limit
        self._number = 0  # of the latest message
        self._size = 0
        self._rings = dict[str, Ring]()
        self._full = collections.OrderedDict[str, Ring]()  # with messages; the latest is last
        self._timers = dict[str, Timer]()  # of those
        # `Ring.floor` and `Ring.limited` of forgotten rings, and of those that are not even there.
        # By the hashes of their names, since a name may be long.
        self._floors = collections.OrderedDict[int, tuple[int, int]]()
        self._floor = 0, -1

    def window_of(self, group: str) -> Window | None:
        """Return how much of *group* is kept, or None."""
        longest = None  # PERF: each send asks, and `max` with `len` takes three times as long.
        for prefix in self.rules:
            if group.startswith(prefix) and (longest is None or len(prefix) > len(longest)):
                longest = prefix
        return None if longest is None else self.rules[longest]

    def is_ready(self, group: str, position: Position | None) -> bool:
        """Tell whether it is known what a client at *position* has missed."""
        return True

    def epoch_of(self, group: str) -> str:
        """Return the epoch of the positions in *group*."""
        return self.epoch

    def top_of(self, group: str) -> Position:
        """Return the position behind all that was sent to *group*."""
        return Position(self.epoch, self._number)

    def start_of(self, group: str) -> Position:
        """Return the position of those who joined *group* before it was ready."""
        return NOWHERE

    def add(self, group: str, window: Window, data: bytes, excluded: Collection[str]) -> Kept:
        """Keep the frame *data* to *group*, under the next number."""
        self._number += 1
        if group not in self._rings:
            self.open(group, window, *self._floors.pop(hash(group), self._floor))
        return self.put(group, data, self._number, clock.time(), excluded)

    def open(self, group: str, window: Window, floor: int, limited: int = -1) -> None:
        """Begin a ring, of the messages behind the number *floor*."""
        self._rings[group] = Ring(group, window, floor, limited)
        self._size += _RING_BYTES

    def put(
        self, group: str, data: bytes, number: int, time: float, excluded: Collection[str]
    ) -> Kept:
        """Keep the frame *data* in the ring of *group*; return what is to be sent of it."""
        at = f"{self.epoch_of(group)}.{number}"  # PERF: no `Position`
        event = text_event(with_position(data, at))
        ids, weight = _NO_IDS, _ENTRY_BYTES + sys.getsizeof(event["text"])
        if excluded:
            ids = frozenset(excluded)
            weight += sum(map(sys.getsizeof, (ids, *ids)))
        kept = Kept(
            event, None, len(data), group, number=number, weight=weight, time=time, excluded=ids
        )
        self.append(group, kept)
        return kept

    def append(self, group: str, kept: Kept) -> None:
        """Put *kept* at the end of the ring of *group*."""
        ring = self._rings[group]
        ring.put(kept)
        self._size += kept.weight
        self._full[group] = ring
        self._full.move_to_end(group)
        self._trim(ring)
        while self._size > self._limit and self._full:
            self._drop_one()

    def _trim(self, ring: Ring) -> None:
        """Drop what the window does not hold, now and when the oldest message is too old."""
        group, before = ring.group, ring.size
        ring.trim(clock.time())
        self._size += ring.size - before
        if not ring.messages:
            self._leave(group)
            self._end(ring)
        elif group not in self._timers:
            when = ring.messages[0].time + ring.window.seconds
            self._timers[group] = clock.call_at(when, self._expire, ring)

    def _drop_one(self) -> None:
        """Drop the oldest message of the group that was quiet for the longest time."""
        ring = next(iter(self._full.values()))
        self._size -= ring.messages[0].weight
        ring.drop(is_limit=True)
        self._trim(ring)

    def _expire(self, ring: Ring) -> None:
        del self._timers[ring.group]
        self._trim(ring)

    def _leave(self, group: str) -> None:
        """Note that the ring of *group* has no messages any more."""
        self._full.pop(group, None)
        if (timer := self._timers.pop(group, None)) is not None:
            timer.cancel()

    def _end(self, ring: Ring) -> None:
        """Forget a ring that is empty. How far it was dropped is known for much longer."""
        self.close(ring.group)
        self._floors[hash(ring.group)] = ring.floor, ring.limited
        if len(self._floors) > _FLOORS:
            self._floor = max(self._floor, self._floors.popitem(last=False)[1])

    def close(self, group: str) -> None:
        """Forget a ring, if there is one."""
        if (ring := self._rings.pop(group, None)) is not None:
            self._size -= ring.size + _RING_BYTES
            self._leave(group)

    def gap(self, group: str, position: Position) -> Reason | None:
        """Return why a client that was at *position* cannot go on, or None if it can."""
        top = self.top_of(group)
        if position.epoch != top.epoch or position.number > top.number:
            return "epoch"
        ring = self._rings.get(group)
        known = (ring.floor, ring.limited) if ring is not None else self._floors.get(hash(group))
        floor, limited = known or self._floor
        if position.number >= floor:
            return None
        return "limit" if position.number < limited else "expired"

    def after(self, group: str, number: int, count: int = _BATCH) -> Sequence[Kept]:
        """Return what `Ring.after` does, or nothing if there is no ring of *group*."""
        ring = self._rings.get(group)
        return ring.after(number, count) if ring is not None else ()

    def last(self, group: str, count: int) -> Sequence[Kept]:
        """Return the last *count* messages to *group*."""
        ring = self._rings.get(group)
        return [*itertools.islice(reversed(ring.messages), count)][::-1] if ring is not None else ()

    def clear(self) -> None:
        """Forget everything."""
        for group in tuple(self._rings):
            self.close(group)


# ── outgoing ──────────────────────────────────────────────────────────────────────────────────
#
# At most one write is in progress on a socket; the answer to the handshake is the first. What is
# sent meanwhile waits in the outbox, so that messages leave in the order in which code sent them.
# When the write ends, a task goes on with the outbox. A client that keeps up needs no outbox.

_TURN = 256  # writes of one message at a stretch: a few milliseconds under uvicorn
_GOODBYE = 1.0  # seconds to wait for what should take no time, such as an evicted client's close


class Phase(enum.StrEnum):
    """What can be written to a connection."""

    CONNECTING = "connecting"  # What is sent waits for the answer to the handshake.
    OPEN = "open"  # Messages flow.
    CLOSING = "closing"  # What was sent before still goes out, and then the close frame.
    GONE = "gone"  # Nothing is written: the client has gone or was given up.


_OPEN = Phase.OPEN  # PERF: it is read for each message; the attribute costs as much as 3 globals.

# The only transitions between phases, with the method of `Outgoing` that makes each.
TRANSITIONS: dict[tuple[Phase, Phase], str] = {
    (Phase.CONNECTING, Phase.OPEN): "open",  # The handshake has been answered.
    (Phase.CONNECTING, Phase.CLOSING): "open",  # The handshake was answered after a `close`.
    (Phase.CONNECTING, Phase.GONE): "lost",  # The client left, or the handshake failed.
    (Phase.OPEN, Phase.CLOSING): "close",  # Code, a limit, a shutdown or an eviction closes.
    (Phase.OPEN, Phase.GONE): "lost",  # The client left, or a write failed.
    (Phase.CLOSING, Phase.GONE): "lost",  # The close frame is out, or it takes too long.
}


@types.coroutine
def rest_of(steps: Generator[Any, Any, Any], waits_for: Any) -> Generator[Any, Any, Any]:
    """Await the rest of a coroutine whose first step has run and which waits for *waits_for*."""
    # The task that ran the first step goes on, as time limits and context variables require.
    if not hasattr(steps, "throw"):  # What granian's send returns has nothing but `__next__`.
        yield waits_for
        return (yield from steps)
    given: Any = None
    try:
        while True:
            step = steps.send
            try:
                given = yield waits_for
            except BaseException as exc:  # The event loop throws in a cancellation, for example.
                step, given = steps.throw, exc
            waits_for = step(given)  # Above, *exc* would become the context of a later error.
    except StopIteration as end:
        return end.value
    finally:
        del given  # An exception refers to this frame; a cycle would keep the connection.


def start_task(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Start a detached task. From Python 3.12 on, run it up to where it first waits."""
    loop, context = asyncio.get_running_loop(), contextvars.Context()
    if sys.version_info >= (3, 12):
        return asyncio.Task(coroutine, loop=loop, eager_start=True, context=context)
    else:
        return asyncio.Task(coroutine, loop=loop, context=context)


class _Nobody:
    """A stand-in for the session of a closed connection, where the session would make a cycle."""

    is_handling = False

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None

    def create_task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = create_task(work)
        task.cancel()
        return task


_NOBODY: Any = _Nobody()


@attrs.define(eq=False, weakref_slot=False)
class Outgoing:
    """The writing half of one connection."""

    _id: str
    _ws: falcon.asgi.WebSocket
    asgi_send: Callable[[Event], Any]
    limits: Limits
    _counts: collections.Counter[str]
    _session: Session
    phase: Phase = Phase.CONNECTING
    close_code: int | None = None  # the first one that was sent or reported by the server
    # Who writes: nobody, the handshake, a task that has not begun yet, or code that has begun.
    writing: Literal["", "handshake", "task", "writer"] = "handshake"
    sent: int = 0  # frames
    outbox: Outbox | None = None
    writer: asyncio.Task[Any] | None = None  # the library's own task that writes
    goodbye: asyncio.Future[bool] | None = None  # whether the close frame was written
    _patience: TimeLimit | None = None  # the time limit of a sender that writes by itself
    _is_slow: bool = False  # the log says that the client is slow

    @property
    def closed(self) -> bool:
        """Whether the client has gone or the server has begun to close."""
        return self.close_code is not None or self.phase is Phase.GONE

    @property
    def is_answered(self) -> bool:
        """Whether the handshake has been answered, so that the connection counts as a member."""
        return self.writing != "handshake"

    async def send(self, event: Event) -> None:
        """Write *event* when its turn has come. Raises `falcon.WebSocketDisconnected`."""
        if (rest := self.start(event)) is not None:
            await rest

    def start(self, event: Event) -> Awaitable[None] | None:
        """Begin to write *event*; return what is left to await, or None. Raises as `send` does."""
        if self.phase is not _OPEN or self.writing:
            return self._send_later(event)
        try:
            # PERF: the server's `send` mostly ends in its first step, and that takes 0.3 µs here.
            # A coroutine with `asyncio.timeout` takes 3.4 µs (CPython 3.13) or 6.0 µs (3.11).
            for waits_for in (steps := self.asgi_send(event).__await__()):  # only if it waits
                self.writing = "writer"
                return self._send_rest(rest_of(steps, waits_for))
        except Exception as exc:  # The server, or an ASGI middleware, may raise anything.
            self.write_failed(exc)
            raise self._disconnected() from None
        self.sent += 1
        return None

    async def _send_rest(self, rest: Awaitable[Any]) -> None:
        """Finish a write whose first step has been run; evict a client that takes too long."""
        patience = WaitLimit(clock.time() + self.limits.send_timeout)
        try:
            with patience:
                self._patience = patience
                await rest
            self.sent += 1
        except Exception as exc:  # The server, or an ASGI middleware, may raise anything.
            self._patience = None
            if patience.expired:
                self.evict()
            else:
                self.write_failed(exc)
            raise self._disconnected() from None
        finally:
            self._patience = None
            self.write_next()

    async def _send_later(self, event: Event) -> None:
        """Write *event* after the write in progress. Evicts a client that takes too long."""
        if self.phase is Phase.CONNECTING:  # A connect handler cannot wait for the handshake.
            if self.close_code is None:
                self._put(Waiting(event))
            return
        is_written = False
        if self.phase is Phase.OPEN:
            written: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            self._put(Waiting(event, written))
            try:
                with WaitLimit(clock.time() + self.limits.send_timeout):
                    is_written = await written
            except TimeoutError:
                self.evict()
        if not is_written:
            raise self._disconnected()

    def _disconnected(self) -> falcon.WebSocketDisconnected:
        return falcon.WebSocketDisconnected(self.close_code or 1006)

    @staticmethod
    async def fan_out(receivers: Iterable[Receiver], waiting: Waiting) -> None:
        """Start one write of *waiting* to each of *receivers*; wait for no client."""
        is_crowded = False
        ready: list[Any] = []  # A listener is never among them.
        try:
            for receiver in receivers:
                if receiver.phase is _OPEN and not receiver.writing:
                    receiver.writing = "task"
                    ready.append(receiver)
                else:
                    is_crowded |= receiver.push(waiting)
        finally:
            write_batches(ready, waiting.event, [])
        while ready:  # noqa: ASYNC110 - each turn of the loop takes some of them, even without us
            await asyncio.sleep(0)
        if is_crowded:  # The client may be behind only because this code kept the loop busy.
            await asyncio.sleep(0)

    @staticmethod
    async def write_each(batch: list[Outgoing], event: Event) -> None:
        """Write *event* to each of *batch*, which `fan_out` has claimed, and empty it."""
        # PERF: one ``finally`` around the loop, and no method call for each receiver, save 8 %.
        task, receiver = current_task(), None
        try:
            while batch:
                receiver = batch.pop()
                if receiver.phase is not Phase.GONE:
                    receiver.writing, receiver.writer = "writer", task
                    try:
                        await receiver.asgi_send(event)
                    except Exception as exc:  # The server, or a middleware, may raise anything.
                        receiver.write_failed(exc)
                    else:
                        receiver.sent += 1
                    receiver.writer = None
                if receiver.outbox is None:
                    receiver.writing = ""
                else:
                    receiver.write_next()
            receiver = None
        finally:
            if receiver is not None:  # The task was cancelled while it wrote to this receiver.
                receiver.writer = None
                receiver.write_next()

    def push(self, waiting: Waiting) -> bool:
        """Put a hub's message into the outbox; return whether it is more than half full.

        A client that exceeds its outbox is evicted, or loses its oldest messages, as `overflow`
        says. A write that has not begun is no sign of a slow client.
        """
        if self.closed:
            return False
        outbox, counts = self._put(waiting), self._counts
        counts["outbox_high_water"] = max(counts["outbox_high_water"], outbox.pushed)
        while self.writing != "task" and outbox.exceeds(1, self.limits):
            overflow = self.limits.overflow
            if overflow != "close" and self._session.fall_behind(outbox):
                self._log_slow("it reads on from what is kept")
            elif overflow == "drop_oldest":
                outbox.drop_oldest()
                counts["dropped"] += 1
                self._log_slow("messages for it are dropped")
            else:
                self.evict()
        return outbox.exceeds(0.5, self.limits)

    def put(self, *several: Waiting) -> None:
        """Put events in line that no option bounds, unless the connection ends."""
        if not self.closed:
            self.outbox = self.outbox or Outbox()
            self.outbox.queue.extend(several)  # None of them has a size to be counted.
        if not self.writing:
            self.write_next()

    async def drained(self) -> None:
        """Wait until what is in line now is written, or given up."""
        if self.phase is _OPEN and self.outbox is not None:
            written: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            self.put(Waiting({}, written))
            await written

    async def _write(self, outbox: Outbox) -> None:
        """Write all that waits in *outbox*, in a task of the library's own."""
        self.writing, self.writer = "writer", current_task()
        try:
            while (waiting := outbox.take()) is not None:
                try:
                    if waiting.close is not None:
                        await self._ws.close(waiting.close.code, waiting.close.reason or None)
                    else:
                        await self.asgi_send(waiting.event)
                        self.sent += 1
                    waiting.end(True)
                finally:
                    waiting.end(False)  # This does nothing after `end(True)`.
            self.outbox = None
        except Exception as exc:  # The server, or an ASGI middleware, may raise anything.
            self.write_failed(exc)
        finally:
            self.writer = None
            self.write_next()

    def write_next(self) -> None:
        """Start a task for the outbox, if there is one. Called when a write has ended."""
        if self.outbox is None:
            self.writing = ""
        else:
            self.writing = "task"
            start_task(self._write(self.outbox))

    def write_failed(self, exc: Exception) -> None:
        """Give up writing, because a write has raised *exc*."""
        logger.debug("write failed", exc_info=exc, extra={"connection_id": self._id})
        if isinstance(exc, OSError):  # A server raises it for a client that has gone (ASGI 2.4).
            mark_closed(self._ws, self.close_code)
        self.lost()

    def _put(self, waiting: Waiting) -> Outbox:
        self.outbox = outbox = self.outbox or Outbox()
        outbox.put(waiting)
        return outbox

    def open(self) -> None:
        """Let what was sent during the handshake go out, now that it is answered."""
        if self.phase is Phase.CONNECTING:
            self._enter(_OPEN if self.close_code is None else Phase.CLOSING)
        self.write_next()

    def close(self, close: Close, *, drops: bool = False) -> None:
        """Send a close frame, once, after what was sent before, or instead if it *drops* that."""
        self._session.on_close()
        if self.closed:
            return
        if drops:
            self._drop()
        self.close_code = close.code
        self.goodbye = asyncio.get_running_loop().create_future()
        self._put(Waiting({}, self.goodbye, close=close))
        if self.phase is Phase.OPEN:
            self._enter(Phase.CLOSING)
        if not self.writing:
            self.write_next()

    def snapshot_of(self, group: str) -> Take | None:
        """Return what takes the snapshot of *group* for this client, if there is one."""
        return self._session.snapshot_of(group)

    def create_task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do what `Connection.create_task` says. The session knows what an error means."""
        return self._session.create_task(work)

    def evict(self) -> None:
        """Give up on a client that is too slow."""
        if not self.closed:
            self._counts["evicted"] += 1
            self._log_slow("closed with 1013")
            self.close(Close(1013, "too slow"), drops=True)

    def lost(self, code: int | None = None) -> None:
        """Give up writing. *code* is the one that the server has reported, if it has."""
        self.leave(code)
        if self.phase is not Phase.GONE:
            self._drop()
            self._enter(Phase.GONE)

    def leave(self, code: int | None) -> None:
        """Note that the client has left; what is being written is not given up, as `lost` does."""
        if self.close_code is None:
            self.close_code = code

    async def settle(self) -> None:
        """Wait until the close frame is written, or until that takes too long."""
        if self.goodbye is not None:
            is_urgent = self.close_code in (1012, 1013)  # a shutdown, or a slow client
            patience = _GOODBYE if is_urgent else self.limits.send_timeout
            if await clock.wait([self.goodbye], patience):
                # If the server has refused the frame, Falcon closes after the responder.
                mark_closed(self._ws, self.close_code)

    def release(self) -> None:
        """End all writing and let go of the session, when the connection is over."""
        if self.phase is not Phase.GONE:
            self.lost()
        self.writing = ""  # A handshake that an exception has ended is never answered.
        self._session = _NOBODY

    def _enter(self, phase: Phase) -> None:
        if (self.phase, phase) not in TRANSITIONS:
            raise RuntimeError(f"a connection does not go from {self.phase} to {phase}")
        self.phase = phase
        if phase is not _OPEN:
            self._session.on_end()

    def _drop(self) -> None:
        """Empty the outbox, and stop the write in progress, unless the caller is writing."""
        if self.outbox is not None:
            self.outbox.clear()
        if self._patience is not None:  # A sender writes.
            self._patience.end_at(clock.time())
        if self.writer is not None and self.writer is not asyncio.current_task():
            self.writer.cancel()

    def _log_slow(self, what: str) -> None:
        if not self._is_slow:
            self._is_slow = True
            logger.warning("client is too slow: %s", what, extra={"connection_id": self._id})


def write_batches(receivers: list[Outgoing], event: Event, left: list[Outgoing]) -> None:
    """Write *event* to *receivers*: to some at once, to others in the next turns of the loop.

    PERF: one task writes to one receiver after the other. A task for each receiver costs 2.2 times
    as much (Python 3.11) or 3.3 times (3.13). If the server makes the task wait, it stays with its
    receiver, as an ASGI middleware may depend on the task. The next turn takes what that task has
    *left* of its batch, and goes on with a new task.
    """
    receivers += left
    left.clear()
    if receivers:
        batch = receivers[-_TURN:]
        del receivers[-_TURN:]
        start_task(Outgoing.write_each(batch, event))
        if batch or receivers:  # An eager task may have written all.
            soon, context = asyncio.get_running_loop().call_soon, contextvars.Context()
            soon(write_batches, receivers, event, batch, context=context)


# ── incoming ──────────────────────────────────────────────────────────────────────────────────
#
# `Incoming` is the reading half of a connection, whose own task reads and runs the handlers. While
# one of these is suspended, a second task reads ahead. It notices a disconnect, and lets some
# messages overtake those that wait for the handler.

_HELD = 256  # frames that wait for a handler; the client's TCP connection holds the rest back
_HELD_BEFORE_TOKEN = 8  # frames of a client that is not known yet


def size_of(frame: str | bytes) -> int:
    """Return the bytes of a frame's payload; text counts as UTF-8."""
    is_counted = isinstance(frame, bytes) or frame.isascii()
    return len(frame) if is_counted else len(cast(str, frame).encode(errors="surrogatepass"))


def size_of_event(event: Event) -> int:
    """Return the bytes of the frame in a ``websocket.receive``."""
    return size_of(event.get("text") or event.get("bytes") or "")


@attrs.define(eq=False, weakref_slot=False)
class Incoming:
    """The reading half of one connection."""

    receive: Callable[[], Awaitable[Event]]  # the server's own
    _max_size: int
    _session: Session
    is_direct: bool = True  # nothing is read ahead and more may come: `receive` has the next event
    is_due: bool = False  # `look` has been scheduled
    received: int = 0  # frames
    has_left: bool = False  # the client has gone; the frames before that are still handled
    _is_stopped: bool = False  # the server closes, and no frame is handled any more
    _inbox: list[Event] = attrs.Factory(list)  # frames that were read ahead, and wait
    _size: int = 0  # bytes in the inbox
    _ahead: asyncio.Task[None] | None = None

    def accept(self, event: Event | None) -> typing.TypeGuard[Event]:
        """Return whether *event*, the next one, is a frame to handle; if not, no more will come."""
        if event is None:
            return False
        if event["type"] != "websocket.receive":
            self._disconnected(event)
            return False
        if self._is_stopped:  # `stop` was called in the same turn of the loop.
            return False
        self.received += 1
        return True

    async def next(self) -> Event | None:
        """Return the next event, or None if no more will come. Called while not `is_direct`."""
        while not self._inbox:
            if self.has_left or self._is_stopped:
                return None
            if self._ahead is None:
                self.is_direct = True
                return await self.receive()
            await self._ahead
            self._ahead = None
        event = self._inbox.pop(0)
        self._size -= size_of_event(event)
        return event

    @property
    def holds_frames(self) -> bool:
        """Whether frames that were read ahead are still to be handled."""
        return bool(self._inbox)

    async def first_token(self) -> Frame:
        """Return the first ``authenticate`` message. Raises `Close` and `WebSocketDisconnected`."""
        held = list[Event]()
        while True:
            event = await (self.receive() if self.is_direct else self.next())
            if event is None or event["type"] != "websocket.receive":
                raise falcon.WebSocketDisconnected(self._disconnected(event) if event else None)
            text = event.get("text")
            if self._size + size_of_event(event) > self._max_size:
                raise Close(1009, f"more than {self._max_size} bytes")
            frame = decode_or_error(text) if text is not None else None
            if isinstance(frame, Frame) and frame.type == "authenticate":
                self.received += 1
                self._inbox[:0] = held  # They are handled once the client is in.
                self.is_direct = self.is_direct and not held
                return frame
            if isinstance(frame, Frame) and frame.type == "resume":
                self.received += 1
                await self._session.resume(frame)
            else:
                held.append(event)
                self._size += size_of_event(event)
            if len(held) + self.received > _HELD_BEFORE_TOKEN:
                raise Close(UNAUTHENTICATED, "authenticate first")

    def watch(self) -> None:
        """Read ahead from the next turn of the loop on, if the handler still runs then."""
        self.is_due = True
        asyncio.get_running_loop().call_soon(self.look)

    def look(self) -> None:
        """Read ahead while a handler, or its reply, waits for something."""
        self.is_due = False
        is_reading = self._ahead is not None and not self._ahead.done()
        if self._session.is_handling and not (is_reading or self.has_left or self._is_stopped):
            self.is_direct = False
            self._ahead = asyncio.get_running_loop().create_task(self._read_ahead())

    async def _read_ahead(self) -> None:
        while (
            self._session.is_handling and len(self._inbox) < _HELD and self._size <= self._max_size
        ):
            event = await self.receive()
            if event["type"] != "websocket.receive":
                self._disconnected(event)
                return
            work = self._session.overtakes(event) if self._session.is_handling else None
            if work is None:
                self._inbox.append(event)
                self._size += size_of_event(event)
            else:
                self.received += 1
                await work  # A client that does not read its answers is read no further either.

    def _disconnected(self, event: Event) -> int:
        """Take the server's report that the client has gone; return the close code."""
        self.has_left, self.is_direct = True, False
        code: int = event.get("code", 1005)  # The default is ASGI's (WebSocket: Disconnect).
        self._session.on_disconnect(code)
        return code

    def stop(self) -> None:
        """Handle no more frames, not even those that were read ahead."""
        self._is_stopped, self.is_direct = True, False
        self._inbox.clear()
        self._size = 0
        if self._session.is_handling and self._ahead is not None:
            self._ahead.cancel()  # granian's send(close) waits while a receive is pending.

    def release(self) -> None:
        """Let go of the session, when the connection is over."""
        if self._ahead is not None:
            self._ahead.cancel()  # The server's receive may have no end of its own.
        self._session = _NOBODY


# ── connection ────────────────────────────────────────────────────────────────────────────────
#
# A handler gets a `Connection`: it says who the client is, and sends to it.

_BURST = 32  # messages that code may send in a row before others get a turn
_PROCESS_BYTES = _OWN_BYTES = 6  # bytes of a process's id, and of a connection's own
_CONNECTION_ID = re.compile(r"[0-9a-f]{24}")
_END_OF_TIME = 1e15  # UNIX seconds; beyond, floats and timers give up
_LOOK_AT_CLOCK = 600.0  # seconds between two looks at the time of day, which may be set anew


def is_elsewhere(loop: asyncio.AbstractEventLoop | None) -> bool:
    """Return whether *loop* runs in another thread, or another loop runs in this one."""
    try:
        return loop is not None and loop is not asyncio.get_running_loop()
    except RuntimeError:  # No loop runs in this thread.
        return loop is not None and loop.is_running()


def refuse_elsewhere(loop: asyncio.AbstractEventLoop | None, what: str, call: str) -> None:
    """Raise `PachinkoError` if *loop* is elsewhere; *call* is what to write instead."""
    if is_elsewhere(loop):
        raise PachinkoError(
            f"{what} from another thread or event loop than its app's; use {call}, ...)"
        )


@attrs.define(eq=False, repr=False)
class Connection:
    """One client. Handlers get it; the hub's methods take it.

    Any thread may read its properties. Its methods, and what sets a property, raise `PachinkoError`
    in another thread or event loop than the app's: use `Hub.call_threadsafe` there.
    """

    hub: Hub  # the hub of its endpoint
    req: falcon.asgi.Request  # the request of the handshake: headers, cookies, query string
    ws: falcon.asgi.WebSocket  # Falcon's own; what it sends may overtake other messages
    params: dict[str, Any]  # the path parameters, converted as the path says
    id: str  # unique across processes, and public: never a credential
    outgoing: Outgoing  # the library's own, not for applications
    subprotocol: str | None = None  # the one that was chosen of those that the client offers
    headers: Sequence[Header] = ()  # added by `add_header`, for the handshake's answer
    _user: str | None = None
    _expires_at: float | None = None
    _expiry: Timer | None = None
    _sends: int = 0

    def __repr__(self) -> str:
        return f"<Connection {self.id} {self.outgoing.phase}>"

    def _check(self, call: str) -> None:
        """Refuse a *call* from another thread or event loop, as the hub's methods do."""
        what = "a connection was used"
        refuse_elsewhere(self.hub.state.loop, what, f"conn.hub.call_threadsafe({call}")

    @property
    def context(self) -> Any:
        """Falcon's ``req.context``: whatever the application keeps for this connection."""
        return self.req.context

    @property
    def close_code(self) -> int | None:
        """Why it was closed: the client's code (1005 or 1006 for none) or the server's; or None."""
        return self.outgoing.close_code

    @property
    def closed(self) -> bool:
        """Whether the client has gone or the server has begun to close."""
        return self.outgoing.closed

    @property
    def groups(self) -> frozenset[str]:
        """The groups that it is in."""
        return frozenset(self.hub.state.registry.groups_of(self))

    @property
    def user(self) -> str | None:
        """Who it is, for `Hub.send_to_user`; set in authenticate or connect handlers.

        Setting it raises `Close` if `Hub.close_user` has closed that user during the handshake.
        """
        return self._user

    @user.setter
    def user(self, user: str | None) -> None:
        self._check('setattr, conn, "user"')
        if user is not None and not isinstance(user, str):
            raise TypeError(f"a user is a str or None, got {user!r}; write conn.user = str(...)")
        if self.outgoing.is_answered:
            raise PachinkoError("conn.user is set in a connect handler, before the client is in")
        self.become(user)

    @property
    def user_id(self) -> str:
        """`user` as a `str`, where no guests are let in. Raises `PachinkoError` if it is None."""
        if self._user is None:
            raise PachinkoError(
                "this client has no user: it has one after @ws.authenticate without optional=True, "
                "or conn.user = ...; where there are guests, write: if conn.user is not None"
            )
        return self._user

    def become(self, user: str | None) -> None:
        """Let messages to *user* reach the connection; the library does so for a late login.

        Raises `Close` as setting `user` does.
        """
        self.hub.state.registry.set_user(self, user)
        self._user = user

    def add_header(self, name: str, value: str) -> None:
        """Add a header, such as ``Set-Cookie``, to the answer to the handshake, or to a refusal.

        A name may be added several times. Raises `ValueError` for what is no header in ASCII, and
        for those that the server writes; `PachinkoError` once the handshake has been answered.
        """
        self._check("conn.add_header")
        if not self.ws.unaccepted:
            raise PachinkoError(
                "conn.add_header comes before the answer to the handshake, in a connect handler or "
                "in @ws.authenticate; a client that has authenticated by its first message has it"
            )
        if not is_header(name, value):
            raise ValueError(
                "write conn.add_header(name, value) with texts in ASCII, without line breaks; the "
                f"server itself writes Connection, Upgrade, Sec-WebSocket-*; got {name!r}"
            )
        self.headers = [*self.headers, (name, value)]

    def choose(self, subprotocol: str | None) -> None:
        """Note the subprotocol for the answer to the handshake; the library does so."""
        self.subprotocol = subprotocol

    @property
    def expires_at(self) -> float | None:
        """When the client has to have authenticated again (UNIX seconds), or None for never.

        Set it in `Pachinko.authenticate`, which is asked again when the client sends a later
        ``authenticate`` message. When the time has passed the connection is closed with 3401.
        """
        return self._expires_at

    @expires_at.setter
    def expires_at(self, at: float | None) -> None:
        self._check('setattr, conn, "expires_at"')
        if at is not None and not (type(at) in (int, float) and abs(at) < _END_OF_TIME):
            raise TypeError(f"expires_at is UNIX seconds, such as time.time() + 3600; got {at!r}")
        self._expires_at = at
        self.stop_expiry()
        if at is not None and not self.closed:
            self._expire()

    def stop_expiry(self) -> None:
        """Cancel the timer of `expires_at`; the library does so when the connection is over."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def _expire(self) -> None:
        """Close if the time has come. Otherwise look again later: the clock may be set anew."""
        left = cast(float, self._expires_at) - (time.time() + clock.ahead)
        if left <= 0:
            self.outgoing.close(Close(UNAUTHENTICATED, "the authentication has expired"))
        else:
            self._expiry = clock.call_at(clock.time() + min(left, _LOOK_AT_CLOCK), self._expire)

    async def send(self, message: object, payload: object = None) -> None:
        """Send a ``@message`` object, a type and its payload, or a binary frame, to this client.

        Bytes alone, a `bytearray` or a `memoryview` are a binary frame. Waits while the client is
        behind. Raises `falcon.WebSocketDisconnected` when the client has gone, or stays behind for
        `send_timeout` seconds (and is then evicted with 1013). In a connect handler it returns at
        once, and the message goes out after the handshake.
        """
        if asyncio.get_running_loop() is not self.hub.state.loop:  # PERF: it mostly is.
            self._check("conn.send")
        type, payload = split_message(message, payload, takes_bytes=True)
        if type:
            event = text_event(self.hub.state.codec.encode(type, payload))
        else:
            event = {"type": "websocket.send", "bytes": payload}
        await self.outgoing.send(event)
        self._sends += 1
        if self._sends % _BURST == 0:
            await asyncio.sleep(0)  # Nothing above lets the loop run while a client keeps up.

    @typing.overload
    async def ask(
        self, message: object, payload: object = None, *, timeout: float = ..., returns: type[T]
    ) -> T: ...
    @typing.overload
    async def ask(
        self, message: object, payload: object = None, *, timeout: float = ..., returns: Any = ...
    ) -> Any: ...
    async def ask(
        self, message: object, payload: object = None, *, timeout: float = 10.0, returns: Any = Any
    ) -> Any:
        """Ask this client, and return its answer, as `Hub.ask` does."""
        self._check("conn.ask")
        return await self.hub.ask(self, message, payload, timeout=timeout, returns=returns)

    async def close(self, code: int = 1000, reason: str | None = "") -> None:
        """Begin to close, once, after what was sent before. Raises what `Close` does."""
        self._check("conn.close")
        self.outgoing.close(Close(code, reason))

    def create_task(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run *coroutine* in a task of the connection: ``conn.create_task(tick(conn))``.

        The task is cancelled as soon as the client has gone or the server closes; disconnect
        handlers begin when it has ended, or after `linger`. An error is logged, `Close` closes the
        connection, and `falcon.WebSocketDisconnected` is quiet once that is over. If it is over
        already, the task is cancelled at once. Raises `PachinkoError` in a disconnect handler,
        `TypeError` for what is no coroutine.
        """
        if not isinstance(coroutine, Coroutine):
            raise TypeError(
                "conn.create_task takes a coroutine, the call of an `async def` without `yield`: "
                f"write conn.create_task(tick(conn)), got {coroutine!r}"
            )
        try:
            self._check("conn.create_task")
            asyncio.get_running_loop()  # This raises if the app's loop does not run now.
            return self.outgoing.create_task(coroutine)
        except (PachinkoError, RuntimeError) as exc:
            coroutine.close()
            call = "conn.hub.call_threadsafe(conn.create_task, ...)"
            error = PachinkoError(f"{exc}; write {call} where the app runs")
            raise (exc if isinstance(exc, PachinkoError) else error) from None

    async def join(self, group: str) -> None:
        """Add the connection to *group*, as `Hub.join` does."""
        self._check("conn.join")
        await self.hub.join(group, self)

    async def leave(self, group: str) -> None:
        """Remove the connection from *group*, as `Hub.leave` does."""
        self._check("conn.leave")
        await self.hub.leave(group, self)


# ── asking ────────────────────────────────────────────────────────────────────────────────────
#
# The server asks a client under an id of its own, and waits for the answer with that id. Answers
# go by a handler that waits, so that it may be the one who asks.

_MOST_QUESTIONS = 64  # to one client that wait at a time


class Questions:
    """The questions to one client that wait for an answer. No id is used again."""

    __slots__ = ("_count", "_open")

    def __init__(self) -> None:
        self._count = 0
        # By id: the type of the answer, and what gets it, or None when the connection ends.
        self._open: dict[object, tuple[str, asyncio.Future[Frame | None]]] = {}

    def add(self, type: str) -> tuple[str, asyncio.Future[Frame | None]]:
        """Return the id of a new question of *type*, and what its answer goes to."""
        if len(self._open) >= _MOST_QUESTIONS:
            raise PachinkoError(
                f"at most {_MOST_QUESTIONS} questions to one client wait at a time; await the "
                f"answer to one before the next, or ask with a shorter timeout"
            )
        self._count += 1
        id, waiting = f"${self._count}", asyncio.get_running_loop().create_future()
        self._open[id] = f"{type}.reply", waiting
        return id, waiting

    def forget(self, id: str) -> None:
        """Forget a question, so that an answer to it is late."""
        del self._open[id]

    def answer(self, frame: Frame) -> bool:
        """Give *frame* to who waits for it; return whether anybody does."""
        type, waiting = self._open.get(frame.id, ("", None))
        if waiting is None or waiting.done() or frame.type not in ("error", type):
            return False
        waiting.set_result(frame)
        return True

    def end(self) -> None:
        """Tell all who wait that the connection has ended."""
        for _, waiting in self._open.values():
            if not waiting.done():
                waiting.set_result(None)


def is_awaited(answer: Frame, conn: Connection) -> bool:
    """Give *answer*, from *conn*, to who waits for it; return whether anybody does."""
    questions = conn.hub.state.questions.get(conn.id)
    return questions is not None and questions.answer(answer)


async def put_question(
    conn: Connection, type: str, frame: msgspec.Raw, seconds: float, is_by_id: bool = True
) -> Any:
    """Send *frame*, of *type* and without an id; return the payload of the answer to it.

    Raises `AnswerError` and `NoAnswer`, and `PachinkoError` where *conn* can never answer.
    """
    state = conn.hub.state
    if conn.outgoing.phase is not Phase.OPEN:
        raise _no_question(conn, state, is_by_id)
    if (questions := state.questions.get(conn.id)) is None:
        questions = state.questions[conn.id] = Questions()
    id, answer = questions.add(type)
    try:
        with WaitLimit(clock.time() + seconds):
            event = text_event(b'%b,"id":"%b"}' % (bytes(frame)[:-1], id.encode()))
            await conn.outgoing.send(event)
            await answer
    except (TimeoutError, falcon.WebSocketDisconnected):
        pass  # If it is answered all the same, the answer counts.
    finally:
        questions.forget(id)
    if not answer.done() or answer.cancelled():
        raise NoAnswer(f"a client has not answered {type!r} within {seconds:g} s")
    if (found := answer.result()) is None:
        raise NoAnswer(f"the connection has ended before an answer to {type!r}")
    return _payload_of(found)


def _no_question(conn: Connection, state: HubState, is_by_id: bool) -> Exception:
    """Return why *conn*, which is not open, is not asked. Its own handlers should have known."""
    session = state.serving.get(current_task())
    is_own = session is not None and session.conn is conn
    is_early = conn.outgoing.phase is Phase.CONNECTING
    # A task of a connect handler has the connection. Whoever has the id only may be too early.
    is_over = is_own and conn.id not in state.registry.connections
    if is_over or (is_early and (is_own or not is_by_id)):
        return PachinkoError(
            "no client answers in its own connect and disconnect handlers; ask it in a message "
            "handler, or write\n@ws.accepted\nasync def greet(conn): answer = await conn.ask(...)"
        )
    return NoAnswer(f"the client is {'not in yet' if is_early else 'gone'}, and was not asked")


def _payload_of(answer: Frame) -> Any:
    """Return the payload of *answer*, null if it has none, or raise the `AnswerError` in it."""
    payload = None if answer.payload is UNSET else answer.payload
    if answer.type != "error":
        return payload
    said: dict[str, Any] = payload if isinstance(payload, dict) else {}
    texts = {key: said[key] for key in ("code", "message") if isinstance(said.get(key), str)}
    details = {key: value for key, value in said.items() if key not in texts}
    raise AnswerError(texts.get("code", ""), texts.get("message", ""), details)


def answer_type(returns: Any, codec: Codec) -> Any:
    """Return the type of an answer that *returns* stands for. Raises `PachinkoError` for none."""
    t = types.NoneType if returns is None else hashable(returns)
    try:
        if t not in codec.answers:
            codec.check(t, _NOWHERE, [])
            codec.answers.add(t)
    except Exception as exc:  # A class, a hook or a converter of the application's may raise any.
        raise _payload_error(f"the answer, returns={shown(returns)[:80]},", exc) from exc
    return t


# What `Relay.call` can do with a connection: a function of it and of arguments that JSON can carry.
CALLS: dict[str, Callable[..., Awaitable[Any]]] = {
    "join": Connection.join, "leave": Connection.leave, "ask": put_question,
}  # fmt: skip


# ── registry and relay ────────────────────────────────────────────────────────────────────────
#
# The registry knows the connections of this process. The relay reaches the other processes of the
# app, and tells the registry what they send; that of an app with a broker is in `pachinko_cluster`.

_MEMORY = re.compile(r"memory://(?:\?([^#@&=]+=[^#@]*)?)?")  # the URL of an app with one process
_NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,64}")
Deliver = Callable[[str, bytes], Awaitable[None]]
Lost = Callable[["BaseException | None"], None]
Sending = Coroutine[Any, Any, None]  # PERF: it is passed on, not awaited by each function
Given = Union[str, "Backplane", None]  # a broker's URL, or a transport
# What `Relay.call` can do in another process: a function of its registry and of such arguments.
PROCESS_CALLS: dict[str, Callable[..., Awaitable[Any]]] = {}
Member = Union["Connection", "Mailbox"]  # who gets the messages to a group
Receiver = Union["Outgoing", "Mailbox", "Cursor"]  # where each of them gets these


class Backplane(typing.Protocol):
    """What carries messages between processes; one of your own goes into ``hub.configure(…)``.

    It knows no groups, only subjects: texts of at most 200 characters of ``A-Z a-z 0-9 . _ - % =
    ~``. It need not reconnect: when a connection has ended, its subscriptions are forgotten, and
    `stop` and `start` are called again until that works.
    """

    async def start(self, deliver: Deliver, lost: Lost) -> None:
        """Connect, or raise.

        From then on, ``deliver(subject, data)`` is awaited for each message of a subscribed
        subject, one after the other in their order; ``lost(why)`` is called, in the loop's thread,
        when the connection has failed. Neither raises.
        """

    async def publish(self, subject: str, data: bytes) -> int | None:
        """Send to every process that has subscribed, this one too; return once the broker has it.

        Calls may overlap, and messages keep the order of the calls. Returns how many subscribers it
        went to, or None if the broker does not say. Raises if this message cannot be sent.
        """

    async def subscribe(self, subject: str) -> None:
        """Return once what is published to *subject* will be delivered.

        Raises `PachinkoError` if the broker does not permit it. Another error ends the connection.
        """

    async def unsubscribe(self, subject: str) -> None:
        """Undo `subscribe`. Messages on their way may still be delivered."""

    async def stop(self) -> None:
        """Disconnect, also when the connection has failed or was never made."""


class Kind(enum.StrEnum):
    """What the name of a receiver stands for. The value is a part of subjects."""

    GROUP = "g"
    USER = "u"
    CONNECTION = "p"  # A process subscribes for all of its connections.
    EVERYBODY = "a"  # all connections, of any name


@attrs.frozen
class Presence:
    """A connection in a group, of any process."""

    id: str  # `Connection.id`
    user: str | None
    process: str  # `Hub.process` where it is connected


class Relay:
    """What carries a hub's messages to all processes of its app, this one included.

    Receivers are given as a kind and a name. This class is for an app with one process: whatever is
    sent goes straight to the registry. With a broker, `send`, `close` and `ask` raise
    `PachinkoError` when it does not take a message within 5 seconds.
    """

    history: History | None = None  # of kept groups
    has_others: bool = False  # Other processes can be reached.

    def start(self, registry: Registry, process: str) -> None:
        """Begin to connect, and to deliver to *registry*. *process* is the id of this process."""
        self._registry, self._process = registry, process

    async def connected(self) -> None:
        """Wait for the connection attempt in progress. Raises `PachinkoError` if it has failed."""

    async def stop(self) -> None:
        """Disconnect, for good."""

    def send(self, kind: Kind, name: str, data: bytes, excluded: list[str]) -> Sending:
        """Begin to send the frame *data*, of text or `Binary`, to all but the *excluded* ids."""
        return self._registry.deliver(kind, name, data, excluded)

    async def close(self, kind: Kind, name: str, close: Close) -> None:
        """Close the receivers, behind what was sent to them before, and handshakes of theirs."""
        await self._registry.close(kind, name, close)

    async def ask(self, kind: Kind, name: str) -> list[Presence]:
        """Ask all processes which connections the group or the user of that *name* has."""
        members = self._registry.accepted(kind, name)
        return [Presence(conn.id, conn.user, self._process) for conn in members]

    async def call(self, id: str, method: str, *args: Any) -> Any:
        """Do one of `CALLS` with the connection *id*, wherever it is; return or raise what it does.

        Or do one of `PROCESS_CALLS` in the process of that connection, which may have ended.

        Raises `NoAnswer` if no connection has the id, and if its process does not answer: within 4
        seconds, or for a question its own. From there come `MessageError`, `AnswerError`,
        `NoAnswer` and `PachinkoError`; the last one also stands for a bug, which that process logs.
        """
        if (function := PROCESS_CALLS.get(method)) is not None:
            return await function(self._registry, *args)
        if (conn := self._registry.connections.get(id)) is None:
            raise NoAnswer(f"there is no connection with the id {id!r}")
        return await CALLS[method](conn, *args)

    async def past(self, group: str, count: int) -> tuple[Position, Sequence[str]]:
        """Return the position of *group*, a kept one, and its last *count* frames."""
        return NOWHERE, ()

    async def check_history(self) -> None:
        """Raise `PachinkoError` if groups cannot be kept. A broker that is away is no reason."""

    def subscribe(self, kind: Kind, name: str) -> None:
        """Note that the first receiver of that name is in the registry."""

    def unsubscribe(self, kind: Kind, name: str) -> None:
        """Note that the last receiver of that name has left the registry."""

    async def subscribed(self, kind: Kind, name: str) -> None:
        """Wait until messages of other processes to that name arrive.

        Gives up after 4 seconds: receivers get a gap later. Raises `PachinkoError` when denied.
        """

    async def check_leases(self) -> None:
        """Raise `PachinkoError` if `lease` cannot work. A broker that is away is no reason."""

    async def lease(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run *work* once no other process of the app runs its own under this *name*.

        Returns or raises as *work* does. If the broker may give the lease to another process,
        *work* is cancelled, and runs again when the lease is back.
        """
        await work()

    def stats(self) -> dict[str, int]:
        """Return the counts of messages that were refused, and of what the broker does."""
        return {"refused": 0, "outages": 0, "broker_down": 0}


def from_companion(name: str, what: str) -> Any:
    """Return what the companion calls *name*. Raises `PachinkoError` if *what* lacks the file."""
    try:
        return getattr(importlib.import_module("pachinko_cluster"), name)
    except (ImportError, AttributeError) as exc:  # It is missing, or of another version.
        raise PachinkoError(
            f"{what} needs pachinko_cluster.py of the same version: copy it to where pachinko.py "
            f"is, or install both, in a checkout: python3 -m pip install . ({exc})"
        ) from exc


if typing.TYPE_CHECKING:
    from pachinko_cluster import SyncHub as SyncHub
else:  # To a type checker, such a function would give the module every name.

    def __getattr__(name: str) -> Any:
        """Return ``pachinko.SyncHub``, which the companion defines."""
        if name != "SyncHub":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return from_companion(name, name)


def check_namespace(name: object) -> None:
    """Raise `PachinkoError` for the *name* of a namespace that no subject can hold."""
    if name is not None and not (isinstance(name, str) and _NAMESPACE.fullmatch(name)):
        raise PachinkoError(f"a namespace has 1 to 64 letters, digits, _ and -, got {name!r}")


@attrs.define(eq=False)
class ClosedUser:
    """A call of `Hub.close_user`, and the next one. A handshake has the latest call before it.

    So calls last as long as handshakes before them, and cost the same with any number of these.
    """

    name: str
    close: Close
    next: ClosedUser | None = None

    def add(self, name: str, close: Close) -> ClosedUser:
        """Note and return the next call."""
        self.next = ClosedUser(name, close)
        return self.next

    def later(self, name: str) -> ClosedUser | None:
        """Return the next call for the user *name*, if there is one."""
        call = self.next
        while call is not None and call.name != name:
            call = call.next
        return call


class Registry:
    """The connections of this process, and the groups and users that they belong to.

    It is the only owner of memberships, in both directions. It starts its *relay*, which learns of
    the first receiver of each group and user, and when the last one has left.
    """

    def __init__(self, relay: Relay, process: str) -> None:
        self.connections: dict[str, Connection] = {}  # authenticated ones, by id
        self.groups: dict[str, dict[Member, Receiver]] = {}  # members, by the group's name
        self.users: dict[str, dict[Member, Receiver]] = {}
        self._tables = {Kind.GROUP: self.groups, Kind.USER: self.users}
        self.resumable: dict[str, Resumable] = {}  # streams, by their tokens
        # Those of them without a client. The one that was left first is the first.
        self.alone: collections.OrderedDict[str, Resumable] = collections.OrderedDict()
        # Handshakes and late logins in progress, by id, with the latest closed user before them.
        self.arriving: dict[str, tuple[Connection, ClosedUser]] = {}
        self._latest = ClosedUser("", Close())
        self._joined: dict[Member, set[str]] = {}
        self._relay = relay
        relay.start(self, process)

    def expect(self, conn: Connection) -> None:
        """Note that *conn* begins to say who it is, so that no closed user slips through."""
        self.arriving[conn.id] = conn, self._latest

    def add(self, conn: Connection) -> None:
        """Add *conn*, and let its user's messages reach it. Raises `Close` for a closed user."""
        if conn.user is not None:
            self._refuse_closed(conn, conn.user)
            self._enter(Kind.USER, conn.user, conn)
        self.connections[conn.id] = conn

    def retire(self, conn: Connection) -> None:
        """Note that *conn* has ended. Only its groups are known from now on."""
        if self.connections.pop(conn.id, None) is not None and conn.user is not None:
            self._discard(Kind.USER, conn.user, conn)

    def remove(self, conn: Connection) -> None:
        """Remove *conn* from all tables."""
        for group in tuple(self._joined.get(conn, ())):
            self.leave(group, conn)
        if conn.id in self.arriving:
            del self.arriving[conn.id]
        self.retire(conn)

    def set_user(self, conn: Connection, user: str | None) -> None:
        """Let messages to *user* reach *conn*, or raise `Close`, before ``conn.user`` changes."""
        if conn.id in self.connections:
            if user is not None:
                self._refuse_closed(conn, user)
            if conn.user is not None:
                self._discard(Kind.USER, conn.user, conn)
            if user is not None:
                self._enter(Kind.USER, user, conn)

    def join(self, group: str, conn: Member) -> None:
        """Add *conn*, a connection of this registry or a listener, to *group*."""
        self._joined.setdefault(conn, set()).add(group)
        self._enter(Kind.GROUP, group, conn)

    def replace(self, group: str, conn: Member, receiver: Receiver) -> None:
        """Let messages to *group* go to *receiver* for *conn*, which is a member."""
        self.groups[group][conn] = receiver

    def leave(self, group: str, conn: Member) -> None:
        """Remove *conn* from *group*, if it is a member."""
        if group in self.groups_of(conn):
            self._joined[conn].discard(group)
            if not self._joined[conn]:
                del self._joined[conn]
            self._discard(Kind.GROUP, group, conn)

    def _refuse_closed(self, conn: Connection, user: str) -> None:
        """Close *conn*, and raise that `Close`, if *user* was closed since it was expected."""
        _, before = self.arriving.get(conn.id, (conn, self._latest))
        if (closed := before.later(user)) is not None:
            self._close_one(conn, closed.close)
            raise Close(closed.close.code, closed.close.reason)

    def _enter(self, kind: Kind, name: str, conn: Member) -> None:
        table = self._tables[kind]
        if name not in table:
            table[name] = {}
            self._relay.subscribe(kind, name)
        table[name][conn] = conn.outgoing

    def _discard(self, kind: Kind, name: str, conn: Member) -> None:
        table = self._tables[kind]
        del table[name][conn]
        if not table[name]:
            del table[name]
            self._relay.unsubscribe(kind, name)

    def groups_of(self, conn: Member) -> Set[str]:
        """Return the groups that *conn* is in. It is not a copy."""
        return self._joined.get(conn, frozenset())

    def receivers(self, kind: Kind, name: str) -> Mapping[Member, Receiver]:
        """Return those here that a message to *name* is for. It may not be a copy."""
        if kind is Kind.CONNECTION:
            conn = self.connections.get(name)
            return {conn: conn.outgoing} if conn is not None else {}
        if kind is Kind.EVERYBODY:
            return {conn: conn.outgoing for conn in tuple(self.connections.values())}
        return self._tables[kind].get(name, {})

    def accepted(self, kind: Kind, name: str) -> frozenset[Connection]:
        """Return the receivers that are in, and have not ended. Any thread may call it."""
        found = tuple(self.receivers(kind, name))  # A loop over it could see a change.
        return frozenset(
            conn for conn in found
            if isinstance(conn, Connection)
            and conn.outgoing.is_answered and conn.id in self.connections
        )  # fmt: skip

    def deliver(
        self, kind: Kind, name: str, data: bytes | Waiting, excluded: Collection[str]
    ) -> Sending:
        """Begin one write of the frame *data* to each receiver whose id is not *excluded*."""
        found = self.receivers(kind, name)
        if excluded:
            ids = frozenset(excluded)
            found = {conn: outgoing for conn, outgoing in found.items() if conn.id not in ids}
        group = name if kind is Kind.GROUP else None
        waiting = data if isinstance(data, Waiting) else waiting_for(data, group)
        return Outgoing.fan_out(found.values(), waiting)

    async def close(self, kind: Kind, name: str, close: Close) -> None:
        """Close connections, behind what was sent to them before, some in each turn of the loop.

        Listeners go on. A handshake may be the connection of that *name*, or turn out to be of the
        user.
        """
        left = [conn for conn in self.receivers(kind, name) if isinstance(conn, Connection)]
        if kind is Kind.USER:
            self._latest = self._latest.add(name, close)
        elif kind is Kind.CONNECTION and name in self.arriving:
            left = [self.arriving[name][0]]
        self._close_some(left, close)
        while left:  # noqa: ASYNC110 - each turn closes some of them, even without us
            await asyncio.sleep(0)

    def _close_some(self, left: list[Connection], close: Close) -> None:
        batch = left[-_TURN:]
        del left[-_TURN:]
        if left:
            soon, context = asyncio.get_running_loop().call_soon, contextvars.Context()
            soon(self._close_some, left, close, context=context)
        for conn in batch:
            self._close_one(conn, close)

    def _close_one(self, conn: Connection, close: Close) -> None:
        self.arriving.pop(conn.id, None)  # `Session.on_close` does not let it go on.
        conn.outgoing.close(close)


# ── catching up ───────────────────────────────────────────────────────────────────────────────
#
# A member of a kept group that is behind has a cursor in its place in the registry. What is sent
# passes it by: it reads from the ring, as its socket drains, and the step that finds nothing more
# there makes it live. A client counts for nothing in what another one is to get.

_REPLAYED = 256  # messages in one turn of the loop, to all clients together
_RESUME_CHARACTERS = 2_000  # of the handshake's query
_RESUME_IDS = 16
_SNAPSHOTS = 16  # that are taken at a time in a process
_TRIES = 3  # to take one before its ring has dropped what follows it
# Takes a snapshot: returns its frame, or that of an error or None, and whether it has failed.
Take = Callable[[], Awaitable[tuple["bytes | None", bool]]]


@attrs.frozen(eq=False)
class Resume:
    """What a client says that it has: positions by group, and the ids of former connections."""

    groups: dict[str, Position]
    ids: frozenset[str]
    is_announced: bool = False  # The message that says so is still to come.
    rest: Position | None = None  # in other groups

    def take(self, group: str) -> Position | None:
        """Return the position in *group* for a join, once. The client knows the name from JSON."""
        return self.groups.pop(whole(group), self.rest)


def resume_in(query: str) -> str | None:
    """Return the value of ``resume`` in the raw *query* of a handshake (RFC 3986, 3.4), or None.

    Falcon may split it at its commas.
    """
    pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
    return next((value for name, value in pairs if name == "resume"), None)


def read_json(text: str) -> Any:
    """Return the value of *text*; None if it is no JSON, or too long."""
    with contextlib.suppress(msgspec.MsgspecError, UnicodeError, RecursionError):
        return msgspec.json.decode(text) if len(text) <= _RESUME_CHARACTERS else None
    return None


def read_resume(value: Any, most: int, is_announced: bool = False) -> Resume:
    """Return what is in the payload of a ``resume`` message: in what is none, nothing.

    Of more than *most* positions, the last ones count, and in all other groups there is a gap.
    """
    given: dict[str, Any] = value if type(value) is dict else {}
    groups = given.get("groups")
    positions = [*groups.items()] if type(groups) is dict else []
    found = {group: read_position(at) for group, at in positions[-most:]}
    rest = NOWHERE if len(positions) > most else None
    return Resume(found, frozenset(read_ids(given.get("ids"))), is_announced, rest)


def read_ids(value: Any) -> list[str]:
    """Return the ids of former connections that count: the last texts in *value*, an array."""
    every = value if type(value) is list else []
    return [each for each in every if type(each) is str][-_RESUME_IDS:]


class Cursor:
    """Where a member of a kept group is that has not got all of it."""

    phase: Phase = Phase.OPEN
    # Nothing is written to it, so `Outgoing.fan_out` always calls `push`.
    writing: Literal["", "handshake", "task", "writer"] = "writer"

    def __init__(
        self, history: History, conn: Connection, group: str, position: Position | None,
        lost: Reason | None = None,
    ) -> None:  # fmt: skip
        """Begin with a member that was live until *position*; None if nobody knows yet."""
        self.conn: Connection = conn
        self.group: str = group
        self.is_waiting: bool = False  # for a ``resume`` message, which may still move it
        self.is_joining: bool = False  # It has not had its verdict, or its state, yet.
        self._history, self._position, self._replayed = history, position or NOWHERE, 0
        self._is_behind = True  # It has got something, so that another gap is one of its own.
        self._lost: Reason | None = lost  # why it is to be told of a gap in any case
        self._ids = frozenset([conn.id])
        self._take: Take | None = None  # takes the snapshot that comes next
        self._untold: Reason | None = None  # of a gap that this stands for
        self._since = NOWHERE  # what is missing if there is none

    def join(self, position: Position | None, resume: Resume | None) -> None:
        """Begin with a new member at *position*; without one, with what is sent from now on."""
        self.is_joining = True
        if resume is not None:
            self.is_waiting = resume.is_announced
            self._ids |= resume.ids
        if not self.is_waiting:
            is_ready = self._history.rings.is_ready(self.group, position)
            (Cursor.begin if is_ready else self._history.fetch)(self, position)

    def begin(self, position: Position | None) -> None:
        """Do what `join` says, now that it is known what was sent."""
        rings = self._history.rings
        if position is not None:
            self._position, self._is_behind = position, False
            return self._history.go_on(self)
        if self._position is NOWHERE:
            self._position = rings.start_of(self.group)
        has_missed = rings.gap(self.group, self._position) or self._next(1)
        if has_missed and self.conn.outgoing.snapshot_of(self.group) is None:
            self._history.go_on(self)
        else:
            self._arrive()  # A state has all that it has missed.

    def lose(self, reason: Reason) -> None:
        """Tell the member of a gap, in any case, when it has got what waits to be written."""
        self._lost = reason

    def follow(self, *events: Event) -> None:
        """Put *events* in line, and go on when they, and all before them, are written.

        So a client that does not read has no more than these in its outbox, however often it gets
        live and falls behind again.
        """
        drained: asyncio.Future[bool] = running_loop().create_future()
        drained.add_done_callback(lambda _: self._history.go_on(self))
        self.conn.outgoing.put(*map(Waiting, events), Waiting({}, drained))

    def push(self, waiting: Waiting) -> bool:
        """Leave a hub's message to the ring."""
        return False

    def _next(self, count: int) -> Sequence[Kept]:
        return self._history.rings.after(self.group, self._position.number, count)

    def step(self, most: int) -> int:
        """Put messages in line, or make the member live; return how many of *most* it has passed.

        There is no ``await`` between the look at the ring, that nothing more is there, and the
        change in the registry, so that no message is in neither of them, or in both.
        """
        if not self._history.is_current(self):
            return 0
        rings = self._history.rings
        if (reason := self._lost or rings.gap(self.group, self._position)) is not None:
            is_slow = self._is_behind and reason in ("expired", "limit")
            self._arrive("overflow" if is_slow else reason)
        elif batch := self._next(most):
            epoch = rings.epoch_of(self.group)
            self._position, self._is_behind = Position(epoch, batch[-1].number), True
            own = [kept.event for kept in batch if not kept.excluded & self._ids]
            self._replayed += len(own)
            self.follow(*own)
            return len(batch)
        else:
            self._arrive()
        return 1

    def _arrive(self, reason: Reason | None = None) -> None:
        """Tell the verdict, and make the member live: if nothing was replayed, behind its state."""
        is_new, self.is_joining, self._lost = self.is_joining, False, None
        top = self._history.rings.top_of(self.group)
        self._since, self._position = self._position if reason is None else top, top
        take: Take | None = None
        if reason is not None or (is_new and not self._replayed):
            take = self.conn.outgoing.snapshot_of(self.group)
        is_told = self._history.resumes(self.conn)
        self._untold = None if is_told else reason
        if (is_told and is_new) or (reason is not None and (is_told or take is None)):
            self._tell(reason, take is None)
        if take is None:
            self._history.make_live(self)
        else:
            self._take = take
            self.load()

    def _tell(self, reason: Reason | None, is_whole: bool = True) -> None:
        """Put a verdict in line. It has a position if it *is_whole*, that is without a state."""
        said = {"group": self.group, "reason": reason} if reason else {"replayed": self._replayed}
        type, payload = "gap" if reason else "resume", {**said, "id": self.conn.id}
        frame = encode(Sent(type, payload=payload, group=self.group))
        self._put(with_position(frame, self._position) if is_whole else frame)

    def _put(self, frame: bytes) -> None:
        self.conn.outgoing.put(Waiting(text_event(frame)))

    def load(self) -> None:
        """Get in line for the snapshot, if one comes next, and the client is in."""
        if (take := self._take) is not None and self.conn.outgoing.is_answered:
            self._take = None
            self._history.line_up(self, take)

    async def take(self, take: Take) -> None:
        """Send the state, and go on from the position before it was taken."""
        frame: bytes | None = None
        has_failed = is_overtaken = True
        for _ in range(_TRIES):
            self._position = self._history.rings.top_of(self.group)
            frame, has_failed = await take()
            if not self._history.is_current(self):
                return
            if self._lost is not None:  # A state of the time before may lack what was lost.
                return self._history.go_on(self)
            is_overtaken = self._history.rings.gap(self.group, self._position) is not None
            if has_failed or not is_overtaken:
                break
        if has_failed and frame is not None:
            self._put(frame)
        if has_failed or is_overtaken:
            if is_overtaken:
                self._position = self._history.rings.top_of(self.group)
            self._tell("snapshot")
        elif frame is not None:
            self._put(with_position(frame, self._position))
        else:  # No state has what came while this waited for its turn.
            self._position = self._since
            if self._untold is not None:
                self._tell(self._untold)
        self._history.go_on(self)


class History:
    """The kept groups of a process, the clients that resume, and the members that catch up."""

    def __init__(self, rings: Rings) -> None:
        self.rings: Rings = rings
        self._registry: Registry = cast(Any, None)  # until `start`
        self._resumes: dict[str, Resume] = {}  # by the ids of connections
        self._timers: dict[str, Timer] = {}  # of those who have to send a message with it
        # Cursors in line for their snapshots. Those of members that have left are not there.
        self._loads = weakref.WeakKeyDictionary[Cursor, Take]()
        self._loading = set[asyncio.Task[None]]()
        self._contexts: dict[str, contextvars.Context] = {}  # of those who may get snapshots
        self._waiting = collections.deque[Cursor]()  # for their turn
        self._is_due = False

    def start(
        self, registry: Registry,
        fetch: Callable[[Cursor, Position | None], None] = Cursor.begin,
    ) -> None:  # fmt: skip
        """Begin, for the members in *registry*. *fetch* lets one begin when its ring is ready."""
        self._registry = registry
        self.fetch: Callable[[Cursor, Position | None], None] = fetch

    def greet(self, conn: Connection, value: Any, is_announced: bool) -> None:
        """Take the *value* in the handshake, or that a message with another *is_announced*."""
        most = conn.outgoing.limits.max_groups
        self._resumes[conn.id] = read_resume(value, most, is_announced)

    def welcome(self, conn: Connection, gets_snapshots: bool) -> None:
        """Begin what waits until a client is in: its snapshots, and the time for its ``resume``."""
        if (resume := self._resumes.get(conn.id)) is not None and resume.is_announced:
            when = clock.time() + conn.outgoing.limits.auth_timeout
            self._timers[conn.id] = clock.call_at(when, self.note, conn, None)
        if gets_snapshots:
            self._contexts[conn.id] = contextvars.copy_context()
        for cursor in self._cursors(conn):
            cursor.load()

    def note(self, conn: Connection, value: Any) -> None:
        """Take the payload of a ``resume`` message, which cursors may wait for."""
        self._unsay(conn)
        self.greet(conn, value, is_announced=False)
        resume = self._resumes[conn.id]
        for cursor in self._cursors(conn):
            if cursor.is_waiting:
                cursor.join(resume.take(cursor.group), resume)

    def forget(self, conn: Connection) -> None:
        """Forget a client that has ended."""
        self._contexts.pop(conn.id, None)
        self._unsay(conn)

    def _unsay(self, conn: Connection) -> None:
        """Forget what a client has said that it has."""
        self._resumes.pop(conn.id, None)
        if (timer := self._timers.pop(conn.id, None)) is not None:
            timer.cancel()

    def _cursors(self, conn: Connection) -> list[Cursor]:
        """Return the cursors of *conn*."""
        groups = self._registry.groups
        found = (groups[group][conn] for group in self._registry.groups_of(conn))
        return [receiver for receiver in found if isinstance(receiver, Cursor)]

    def enter(self, conn: Connection, group: str) -> None:
        """Let a new member begin: at its position, or with what is sent from now on."""
        if self.rings.window_of(group) is None:
            return
        self._pin(conn, group)
        resume = self._resumes.get(conn.id)
        if resume is not None or conn.outgoing.snapshot_of(group) is not None:
            is_ready = self.rings.is_ready(group, None)
            cursor = Cursor(self, conn, group, self.rings.top_of(group) if is_ready else None)
            self._registry.replace(group, conn, cursor)
            cursor.join(resume.take(group) if resume else None, resume)

    def _pin(self, conn: Connection, group: str) -> None:
        """Leave what waits for *conn* where it is: what follows does not continue it.

        A client that joins and leaves, and does not read the verdicts, is evicted.
        """
        if (outbox := conn.outgoing.outbox) is not None:
            outbox.pin(group)
            free = len(outbox.queue) - outbox.pushed - conn.outgoing.limits.outbox
            most = len(self._registry.groups_of(conn))
            if free > most and free > most + (_BATCH + 1) * len(self._cursors(conn)):
                conn.outgoing.evict()

    def lose(self, group: str, reason: Reason) -> None:
        """Tell all members of *group* that messages were lost; new ones find that out."""
        top = self.rings.top_of(group)
        for member, receiver in tuple(self._registry.groups.get(group, {}).items()):
            if not isinstance(member, Connection):
                member.push(waiting_for(gap_of(group), group))
            elif not isinstance(receiver, Cursor):
                self._pin(member, group)
                self._fall(member, group, top, reason)
            elif not receiver.is_joining:
                receiver.lose(reason)

    def _fall(
        self, conn: Connection, group: str, position: Position, reason: Reason | None = None
    ) -> None:
        """Let a live member read on from *position*, when its outbox has been written."""
        cursor = Cursor(self, conn, group, position, reason)
        self._registry.replace(group, conn, cursor)
        if conn.outgoing.outbox is None:  # PERF: it may be one of very many members.
            self.go_on(cursor)
        else:
            cursor.follow()

    def line_up(self, cursor: Cursor, take: Take) -> None:
        """Let *cursor* take its snapshot when it is its turn, in the context of its client."""
        self._loads[cursor] = take
        self._load()

    def _load(self, done: asyncio.Task[None] | None = None) -> None:
        """Let cursors take their snapshots, up to so many, now that one is *done*."""
        self._loading.difference_update([done])
        while self._loads and len(self._loading) < _SNAPSHOTS:
            cursor, take = next(iter(self._loads.items()))
            del self._loads[cursor]
            context = self._contexts.get(cursor.conn.id, contextvars.Context()).copy()
            task = context.run(cursor.conn.outgoing.create_task, cursor.take(take))
            self._loading.add(task)
            task.add_done_callback(self._load)

    def resumes(self, conn: Connection) -> bool:
        """Tell whether the client wants to resume, and so gets verdicts."""
        return conn.id in self._resumes

    def fall_behind(self, conn: Connection, outbox: Outbox) -> bool:
        """Let a slow client read from the rings what waits in *outbox*; return whether any does."""
        groups, live = self._registry.groups, conn.outgoing
        found = dict[str, int]()
        for kept in outbox.extract(
            lambda waiting: (
                isinstance(waiting, Kept)
                and groups.get(cast(str, waiting.group), {}).get(conn) is live
            )
        ):
            found.setdefault(cast(str, kept.group), cast(Kept, kept).number)
        for group, number in found.items():
            self._fall(conn, group, Position(self.rings.epoch_of(group), number - 1))
        return bool(found)

    def is_current(self, cursor: Cursor) -> bool:
        """Tell whether the member of *cursor* is still that: it may have left, and joined again."""
        return self._registry.groups.get(cursor.group, {}).get(cursor.conn) is cursor

    def make_live(self, cursor: Cursor) -> None:
        """Let what is sent from now on go straight to the member."""
        self._registry.replace(cursor.group, cursor.conn, cursor.conn.outgoing)

    def go_on(self, cursor: Cursor) -> None:
        """Let *cursor* take its next step when it is its turn."""
        self._waiting.append(cursor)
        if not self._is_due:
            self._is_due = True
            running_loop().call_soon(self._turn, context=contextvars.Context())

    def _turn(self) -> None:
        """Let cursors take a step each, up to so many messages."""
        left = _REPLAYED
        try:
            while self._waiting and left > 0:
                left -= self._waiting.popleft().step(left)
        finally:  # What fails keeps nobody else.
            self._is_due = bool(self._waiting)
            if self._is_due:
                running_loop().call_soon(self._turn, context=contextvars.Context())


def not_kept(group: str) -> PachinkoError:
    """Return the error for a call that needs *group* to be kept."""
    prefix, colon, _ = group.partition(":")
    write = f"hub.keep({prefix + colon!r})"
    return PachinkoError(f"the group {group!r} is not kept; write {write} before the app starts")


class Keeper(Relay):
    """The relay of an app with one process that keeps what is sent to some groups."""

    def __init__(self, history: History) -> None:
        self.history: History | None = history
        self._history = history

    def start(self, registry: Registry, process: str) -> None:
        """Do what `Relay.start` says."""
        super().start(registry, process)
        self._history.start(registry)

    async def stop(self) -> None:
        """Do what `Relay.stop` says."""
        self._history.rings.clear()

    async def past(self, group: str, count: int) -> tuple[Position, Sequence[str]]:
        """Do what `Relay.past` says."""
        rings = self._history.rings
        if rings.window_of(group) is None:
            raise not_kept(group)
        return rings.top_of(group), [kept.event["text"] for kept in rings.last(group, count)]

    def send(self, kind: Kind, name: str, data: bytes, excluded: list[str]) -> Sending:
        """Do what `Relay.send` says, and keep what is sent to a kept group."""
        rings, frame = self._history.rings, cast("bytes | Kept", data)
        if kind is Kind.GROUP and (window := rings.window_of(name)) is not None:
            frame = rings.add(name, window, data, excluded)
        return self._registry.deliver(kind, name, frame, excluded)


def open_relay(
    given: Given, namespace: str | None, rules: Mapping[str, Window], history_bytes: int
) -> Relay:
    """Return the relay, not yet started. Raises the errors of `Hub.configure`."""
    local = _MEMORY.fullmatch(given) if isinstance(given, str) else None
    if local is not None and namespace is None:
        namespace = dict(urllib.parse.parse_qsl(local[1] or "", True)).get("namespace")
    check_namespace(namespace)
    if given is None or local is not None:
        return Keeper(History(Rings(rules, history_bytes))) if rules else Relay()
    cluster = from_companion("Cluster", "a broker")
    return cast(Relay, cluster(given, namespace, rules, history_bytes))


# ── hub state ─────────────────────────────────────────────────────────────────────────────────
#
# A running hub has a registry and a relay, the calls of threads, and the connections in progress.

_FAREWELL = 5.0  # seconds for disconnect handlers at a shutdown, after `linger`
ENVIRONMENT = "PACHINKO_BACKPLANE"  # the variable with the URL of the broker
_turn = threading.RLock()  # Only one thread at a time starts or ends a hub.
_OWN_HUB = 'give this app one of its own: Pachinko(app, "/ws", hub=Hub())'


@attrs.define(eq=False)
class HubState:
    """What a hub has from the start of its first app to the stop of the last one."""

    url: Given  # `Hub.configure` has set these, and `Hub.keep` the rules
    namespace: str | None
    codec: Codec
    rules: Mapping[str, Window]
    history_bytes: int
    replace: Callable[[], HubState]  # gives the hub a new state with the same settings
    process: str = attrs.field(factory=lambda: secrets.token_hex(_PROCESS_BYTES))
    counts: collections.Counter[str] = attrs.Factory(collections.Counter)
    calls: set[concurrent.futures.Future[Any]] = attrs.Factory(set)  # calls of threads, until done
    serving: dict[asyncio.Task[Any], Session] = attrs.Factory(dict)  # since the handshake, by task
    drains: list[asyncio.Task[None]] = attrs.Factory(list)  # one for each call of `Hub.drain`
    questions: dict[str, Questions] = attrs.Factory(dict)  # by connection id, from its first one
    listeners: set[Mailbox] = attrs.Factory(set)
    returning: dict[str, Any] = attrs.Factory(dict)  # what clients have that are not in yet, by id
    # Tasks of connections, by the connection's id: whether each has been cancelled.
    background: dict[str, dict[asyncio.Task[Any], bool]] = attrs.Factory(dict)
    loop: asyncio.AbstractEventLoop | None = None  # the loop of the apps, while one runs
    broker: Given = None  # the broker that the first app was started with
    relay: Relay = attrs.Factory(Relay)
    registry: Registry = attrs.Factory(lambda self: Registry(self.relay, self.process), True)
    _apps: set[object] = attrs.Factory(set)
    _next: HubState | None = None  # the state of the hub after the end of this one

    @property
    def history(self) -> History | None:
        """The kept groups, if there are any."""
        return self.relay.history

    def choose(self, url: Given = None) -> Given:
        """Return the broker to use: *url*, else the configured one, else the environment's."""
        return url if url is not None else self.url or os.environ.get(ENVIRONMENT) or None

    def start(self, app: object, url: Given = None, own: str = _OWN_HUB) -> None:
        """Serve *app* in the running loop. In a second loop, raise `PachinkoError` with *own*."""
        loop = asyncio.get_running_loop()
        with _turn:
            if self._next is not None:  # Another thread has stopped the hub just now.
                return self._next.start(app, url, own)
            if self.loop is None:
                broker = self.choose(url)
                self.relay = open_relay(broker, self.namespace, self.rules, self.history_bytes)
                self.registry = Registry(self.relay, self.process)
                self.loop, self.broker = loop, broker
                self.drains.clear()  # A call before the start has drained nobody.
            elif self.loop is not loop and self.loop.is_running():
                raise PachinkoError(f"this hub runs in another thread or event loop; {own}")
            elif self.loop is not loop:  # The earlier loop has ended without a shutdown.
                return self._end().start(app, url, own)
            self._apps.add(app)

    async def stop(self, app: object) -> None:
        """Stop serving *app*; with the last one the hub gets a new state."""
        with _turn:
            self._apps.discard(app)
            is_over = not self._apps
            if is_over:
                self._end()
        if is_over:
            await self.relay.stop()

    def _end(self) -> HubState:
        """Fail the calls that are not done, and return the state that comes next."""
        self.loop = None
        for call in tuple(self.calls):
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                call.set_exception(PachinkoError("the hub has stopped before it was done"))
        for listener in tuple(self.listeners):
            with contextlib.suppress(RuntimeError):  # The loop has been closed.
                listener.close()
        self._next = self.replace()
        return self._next

    def submit(self, work: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        """Call *work* in the loop, and await its result. Raises `PachinkoError` without a loop.

        With `asyncio.run_coroutine_threadsafe`, a thread waits for ever if the loop ends before the
        call has begun. Here the end of the hub fails each call that is not done.
        """
        future = concurrent.futures.Future[Any]()

        async def call() -> Any:
            try:
                result = work()
                return await result if inspect.isawaitable(result) else result
            except SystemExit as exc:  # asyncio would end the loop, and with it the server.
                raise RuntimeError("sys.exit() in a call from a thread") from exc

        def forget(_: object) -> None:
            self.calls.discard(future)
            if future.cancelled():  # Tell `concurrent.futures.wait`.
                future.set_running_or_notify_cancel()

        def begin(loop: asyncio.AbstractEventLoop) -> None:
            if not future.done():  # Only a loop that runs gets a coroutine.
                task = loop.create_task(call())
                task.add_done_callback(functools.partial(_tell, future))
                future.add_done_callback(functools.partial(_cancel, loop, task))

        future.add_done_callback(forget)
        self.calls.add(future)  # Add it before a loop is found, so that `_end` fails it.
        try:
            if (loop := self.loop) is None:
                raise RuntimeError("it starts with the app")
            loop.call_soon_threadsafe(begin, loop)
        except RuntimeError as exc:  # The loop may also have been closed.
            future.cancel()
            raise PachinkoError(f"the hub is not running: {exc}") from None
        return future

    def enter(self, session: Session) -> None:
        """Note that the current task serves *session*."""
        self.serving[current_task()] = session
        self.registry.expect(session.conn)

    def leave(self, session: Session) -> None:
        """Note that the current task has ended its service."""
        self.serving.pop(current_task(), None)
        self.counts["received"] += session.incoming.received
        self.counts["sent"] += session.outgoing.sent

    async def reachable(self, conn: Connection) -> None:
        """Wait until `Hub.send_to_user` in other processes reaches *conn*."""
        if conn.user is not None and conn.id in self.registry.connections:
            with contextlib.suppress(PachinkoError):  # The broker forbids it; that is logged.
                await self.relay.subscribed(Kind.USER, conn.user)

    async def close_all(self, seconds: float, caller: object) -> None:
        """Close all connections, as `Hub.drain` says, and do not wait for that of *caller*."""
        sessions = random.sample(list(self.serving.values()), len(self.serving))
        ends: list[Outgoing | Mailbox] = [session.outgoing for session in sessions]
        for listener in self.listeners:
            ends.insert(random.randint(0, len(ends)), listener)
        logger.info("draining %d connections in %g s", len(sessions), seconds)
        begun = clock.time()
        for n, each in enumerate(ends):
            if each.closed:
                continue  # It has left by itself, and needs no turn.
            early = begun + seconds * n / len(ends) - clock.time()
            if early > 0 or n % _TURN == 0:
                await clock.sleep(early)
            each.close(Close(1012, "the server restarts"))
        own = {s for task, s in self.serving.items() if caller in (task, *s.tasks)}
        await self.wait_for(set(sessions) - own)

    async def wait_for(self, sessions: Collection[Session], *others: asyncio.Task[Any]) -> None:
        """Wait until *others* and *sessions* end, at most for their longest `linger` and 5 s."""
        ending = {*others, *(task for task, each in self.serving.items() if each in sessions)}
        if ending:
            linger = max((each.outgoing.limits.linger for each in sessions), default=0.0)
            for task in await clock.wait(ending, linger + _FAREWELL):
                logger.error("not waiting any longer for %r, which does not end", task)
                self.serving.pop(task, None)  # A shutdown after a drain does not wait once more.

    def end_work(self, id: str) -> Set[asyncio.Task[Any]]:
        """End the questions and the tasks of the connection *id*; return its tasks.

        Each is cancelled once, and the current one never.
        """
        if id in self.questions:  # PERF: most connections have neither.
            self.questions.pop(id).end()
        if id not in self.background:
            return frozenset()
        tasks = self.background[id]
        for task in [task for task, is_cancelled in tasks.items() if not is_cancelled]:
            if task is not asyncio.current_task():
                tasks[task] = task.cancel()
        return frozenset(tasks)


def _cancel(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any], _: object) -> None:
    """Cancel *task*, from any thread, when its future has been cancelled or failed."""
    if not task.done():
        with contextlib.suppress(RuntimeError):  # The loop has been closed.
            loop.call_soon_threadsafe(task.cancel)


def _tell(future: concurrent.futures.Future[Any], ended: asyncio.Task[Any]) -> None:
    """Give *future* the outcome of *ended*, unless the hub has stopped or a thread cancelled it."""
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        if ended.cancelled():
            future.cancel()
        elif (exc := ended.exception()) is not None:
            future.set_exception(exc)
        else:
            future.set_result(ended.result())


# ── listening ─────────────────────────────────────────────────────────────────────────────────
#
# A listener gets the messages to a group, without a connection. Its mailbox takes the place of a
# member in the registry, and does not refer to the listener: an application may just drop that.

_MAILBOX, _MAILBOX_BYTES = 256, 1_048_576  # what may wait, as in an outbox by default


class _Arrived(Sent):
    at: str | None = None


_decode_sent = msgspec.json.Decoder(_Arrived).decode


def read_frame(content: str | bytes, group: str | None = None) -> tuple[Envelope, bool]:
    """Return the message in a frame of the server, and whether it is an item of a stream.

    A binary frame has the type "", and so has a text that is no message: a fallback sends any.
    """
    with contextlib.suppress(msgspec.MsgspecError, UnicodeError, RecursionError):
        if isinstance(content, str):
            sent = _decode_sent(content)
            payload = None if sent.payload is UNSET else sent.payload
            envelope = Envelope(sent.type, payload, sent.id, group or sent.group, sent.at)
            return envelope, sent.more
    return Envelope("", content, group=group), False


class Mailbox:
    """The messages to a group that a listener has not taken yet."""

    phase: Phase = Phase.OPEN
    # Nothing is written to a listener, so `Outgoing.fan_out` always calls `push`.
    writing: Literal["", "handshake", "task", "writer"] = "writer"

    def __init__(self, group: str, state: HubState) -> None:
        """Begin to take messages. A hub that drains, or does not run, has none to take."""
        self.group: str = group
        self.loop: asyncio.AbstractEventLoop | None = state.loop
        self.id: str = secrets.token_hex()  # Nobody knows it, so that no `exclude` has it.
        self.closed: bool = state.loop is None or bool(state.drains)
        self._hub_state = state
        self._queue = collections.deque[Waiting]()
        self._size = 0  # bytes in the queue
        self._has_gap = False  # in front of the queue
        self._arrived = asyncio.Event()  # Something can be taken, or nothing more will come.
        if not self.closed:
            asyncio.get_running_loop()  # This raises before there is anything to undo.
            state.listeners.add(self)
            state.registry.join(group, self)

    @property
    def outgoing(self) -> Mailbox:
        """Where the messages go, as for a connection."""
        return self

    async def subscribed(self) -> None:
        """Wait until messages of other processes arrive. Raises what `Hub.join` does."""
        try:
            await self._hub_state.relay.subscribed(Kind.GROUP, self.group)
        except PachinkoError:
            try:
                await asyncio.sleep(0)  # Joins that wait read the reason before the leave.
            finally:
                self.close()
            raise

    def push(self, waiting: Waiting) -> bool:
        """Add a message, and drop the oldest of too many; return whether it is half full."""
        if self.closed:
            return False
        queue = self._queue
        queue.append(waiting)
        self._size += waiting.size
        # A single message may be larger than that. A member gets it, too.
        while len(queue) > _MAILBOX or (self._size > _MAILBOX_BYTES and len(queue) > 1):
            self._size -= queue.popleft().size
            self._has_gap = True
        self._arrived.set()
        return len(queue) > _MAILBOX / 2 or self._size > _MAILBOX_BYTES / 2

    async def take(self, seconds: float | None) -> Envelope | None:
        """Return the next message, or None when no more will come. Raises `TimeoutError`."""
        while not (self._queue or self._has_gap):
            if self.closed:
                return None
            self._arrived.clear()
            with WaitLimit(None if seconds is None else clock.time() + seconds):
                await self._arrived.wait()
        if not self._has_gap:
            waiting = self._queue.popleft()
            self._size -= waiting.size
            data = waiting.event.get("bytes")
            content = waiting.event["text"] if data is None else data
            envelope, _ = read_frame(content, self.group)
            # What a stranger has sent to the broker may be no value in Python.
            if envelope.type or data is not None:
                return envelope
        self._has_gap = False
        return Envelope("gap", {"group": self.group}, group=self.group)

    def close(self, close: Close | None = None) -> None:
        """End. What has arrived can still be taken."""
        self.closed = True
        self._hub_state.listeners.discard(self)
        if self._hub_state.loop is not None:  # Otherwise the relay has ended, too.
            self._hub_state.registry.leave(self.group, self)
        self._arrived.set()

    def empty(self) -> None:
        """Forget what has arrived."""
        self._queue.clear()
        self._has_gap = False


def refuse_iterating_elsewhere(loop: asyncio.AbstractEventLoop | None, what: str) -> None:
    """Raise `PachinkoError` if *loop* is elsewhere, since the hub was *what*."""
    call = "`async def f()` with all of the `async for` in it, and hub.call_threadsafe(f"
    refuse_elsewhere(loop, f"the hub was {what}", call)


class Listener(AsyncIterator[T]):
    """What `Hub.listen` returns: the messages to a group, one after the other."""

    def __init__(self, mailbox: Mailbox, heartbeat: float | None) -> None:
        self._mailbox, self._heartbeat = mailbox, heartbeat
        self._is_subscribed = False

    async def __aenter__(self) -> Listener[T]:
        """Wait until messages of all processes arrive. Raises `PachinkoError`."""
        refuse_iterating_elsewhere(self._mailbox.loop, "listened to")
        if not (self._is_subscribed or self._mailbox.closed):
            await self._mailbox.subscribed()
            self._is_subscribed = True
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def __anext__(self) -> T:
        await self.__aenter__()
        try:
            envelope = await self._mailbox.take(self._heartbeat)
        except TimeoutError:
            return cast(T, None)
        if envelope is None:
            raise StopAsyncIteration
        return cast(T, envelope)

    async def aclose(self) -> None:
        """Stop listening. What has arrived is forgotten."""
        refuse_iterating_elsewhere(self._mailbox.loop, "listened to")
        self._mailbox.close()
        self._mailbox.empty()

    def __del__(self) -> None:
        # The garbage collector runs anywhere: in another thread, or in a loop over the registry.
        if (loop := self._mailbox.loop) is not None and not self._mailbox.closed:
            with contextlib.suppress(RuntimeError):  # The loop has been closed.
                loop.call_soon_threadsafe(self._mailbox.close)


# ── hub setup ─────────────────────────────────────────────────────────────────────────────────
#
# An application sets the hub up before it starts.

_HISTORY_BYTES = 67_108_864  # 64 MiB
_EXAMPLES = {"messages": "100", "bytes": "1_048_576", "history_bytes": "67_108_864"}
_hubs: weakref.WeakSet[HubSetup] = weakref.WeakSet()


class HubSetup:
    """The settings of a hub, and its start and stop in a program without an app."""

    def __init__(self) -> None:
        self._has_warned = False
        self._settings: dict[str, Any] = {
            "url": None, "namespace": None, "codec": Codec(), "rules": {},
            "history_bytes": _HISTORY_BYTES,
        }  # fmt: skip
        self._set_state()
        _hubs.add(self)

    def _set_state(self) -> HubState:
        replace = self._set_state
        self.state: HubState = HubState(**self._settings, replace=replace)  # not for applications
        return self.state

    def configure(
        self, url: Given | UnsetType = UNSET, *,
        converter: cattrs.Converter | UnsetType | None = UNSET,
        namespace: str | UnsetType | None = UNSET, history_bytes: int | UnsetType | None = UNSET,
    ) -> None:  # fmt: skip
        """Set up the hub before an app starts. Options left out are kept; None resets one.

        *url*: the broker between the processes, ``nats://host:4222``, ``tls://…``,
        ``redis://host:6379``, ``rediss://…``, or a `Backplane`. By default it is that of the
        environment variable ``PACHINKO_BACKPLANE``, or ``memory://``: this process alone.
        *namespace*: keeps the apps on one broker apart, also as ``?namespace=`` in the URL;
        letters, digits, ``_`` and ``-``; by default ``pachinko``.
        *converter*: of cattrs, for all payloads, in and out; set before handlers are registered.
        Start from ``hub.converter.copy()`` to keep the strict rules: a plain one coerces 5 to "5".
        *history_bytes*: bytes that all kept groups (`keep`) of a process take; by default 64 MiB.

        Raises `PachinkoError` for a mistake in any of them, for a library that is not installed,
        and once an app has started; `TypeError` for a wrong object. Then nothing has changed.
        """
        self._check_stopped("configure")
        url = self.state.url if url is UNSET else url
        namespace = self.state.namespace if namespace is UNSET else namespace
        most = self.state.history_bytes if history_bytes is UNSET else history_bytes
        most = check_count("configure", "history_bytes", _HISTORY_BYTES if most is None else most)
        open_relay(url, namespace, self.state.rules, most)
        if not (converter in (UNSET, None) or isinstance(converter, cattrs.BaseConverter)):
            raise TypeError(f"write hub.configure(converter=cattrs.Converter()), got {converter!r}")
        codec = self.state.codec if converter is UNSET else Codec(converter)
        self._settings.update(url=url, namespace=namespace, codec=codec, history_bytes=most)
        self._set_state()

    def keep(
        self, prefix: str, *, messages: int = 100, seconds: float = 300.0, bytes: int = 1_048_576
    ) -> None:  # fmt: skip
        """Keep what is sent to groups whose name begins with *prefix*, for clients that come back.

        Of each group, the last *messages* are kept, each for *seconds*, in at most *bytes* of a
        process's memory; `configure` bounds all groups together. ``""`` is the prefix of all
        groups, and the longest prefix of a name counts. See docs/history.md.

        Raises `PachinkoError` for a mistake in any of them, and once an app has started.
        """
        self._check_stopped("keep")
        if not isinstance(prefix, str):
            raise PachinkoError(f'write hub.keep("room:"), the beginning of names; got {prefix!r}')
        if not (is_seconds(seconds) and seconds > 0):
            write = 'write hub.keep("room:", seconds=300.0), a finite number above 0'
            raise PachinkoError(f"{write}; got {seconds!r}")
        counts = check_count("keep", "messages", messages), check_count("keep", "bytes", bytes)
        window = Window(counts[0], seconds, counts[1])
        self._settings["rules"] = {**self._settings["rules"], whole(prefix): window}
        self._set_state()

    def _check_stopped(self, method: str) -> None:
        if self.state.loop is not None:
            raise PachinkoError(f"call hub.{method}() before the app starts, where it is imported")

    @property
    def process(self) -> str:
        """The id of this process, as in `Presence.process`; a new one with each start."""
        return self.state.process

    @property
    def converter(self) -> cattrs.Converter:
        """The converter in use; copy it, but do not change it."""
        return self.state.codec.converter

    @contextlib.asynccontextmanager
    async def open(self, url: Given = None) -> AsyncGenerator[typing.Self, None]:
        """Use the hub in a program without an app: ``async with hub.open("redis://…"):``.

        By default, *url* is that of `configure` or ``PACHINKO_BACKPLANE``. Raises `PachinkoError`
        if none is given, if the broker cannot be reached, and if the hub runs on another one or in
        another event loop: there ``Hub().open(…)`` opens a hub of its own.
        """
        loop = self.state.loop
        is_running = loop is not None and loop.is_running()
        if not is_running and self.state.choose(url) is None:
            raise PachinkoError(
                'hub.open() takes the broker that the app uses, hub.open("nats://localhost:4222"), '
                f"or finds it in {ENVIRONMENT}"
            )
        if is_running and url not in (None, self.state.broker) and not is_elsewhere(loop):
            raise PachinkoError("this hub runs on another broker; write hub.open() to use that one")
        program = object()
        own = "write hub.call_threadsafe(hub.send, ...), or async with Hub().open(...) as hub:"
        self.state.start(program, url, own)
        try:
            await self.state.relay.connected()
            await self.state.relay.check_history()
            yield self
        finally:
            await self.state.stop(program)

    def _check(self, method: str, name: object = "", what: str = "") -> None:
        """Refuse a *name* that is no text, a call in another loop, and one that reaches nobody."""
        if not isinstance(name, str):
            raise TypeError(f"a {what} is named by a str, got {name!r}")
        loop = self.state.loop
        refuse_elsewhere(loop, "the hub was called", f"hub.call_threadsafe(hub.{method}")
        if loop is None and self.state.choose() not in (None, "memory://"):
            raise PachinkoError(
                "the hub is not connected: it starts with the app; a program without one writes "
                "`async with hub.open():` around its calls"
            )
        if loop is None and not self._has_warned:  # A test of a handler may do this.
            self._has_warned = True
            logger.warning(
                "the hub does not run and reaches nobody: it starts with the app; a program of its "
                'own writes `async with hub.open("nats://localhost:4222"):` around its calls'
            )


def check_count(method: str, name: str, value: object) -> int:
    """Return *value*, of an option of `Hub`. Raises `PachinkoError` unless it is at least 1."""
    if not (isinstance(value, int) and _is_count(value)):
        example = 'hub.keep("room:", ' if method == "keep" else f"hub.{method}("
        write = f"write {example}{name}={_EXAMPLES[name]}), a whole number, at least 1"
        raise PachinkoError(f"{write}; got {value!r}")
    return value


def _forget_parent() -> None:
    """Give each hub a new state in a forked process: loop and connections are the parent's."""
    for each in _hubs:
        each.state.replace()


# Without fork (on Windows) `os` has no such function. A lock that another thread holds would stay
# locked in the child for ever.
_at_fork = getattr(os, "register_at_fork", lambda **_: None)
_at_fork(before=_turn.acquire, after_in_parent=_turn.release, after_in_child=_turn.release)
_at_fork(after_in_child=_forget_parent)


# ── hub ───────────────────────────────────────────────────────────────────────────────────────
#
# An application calls the hub to make groups, to send, and to close connections.

Exclude = Union["Connection", str, Iterable[Union["Connection", str]], None]


class Hub(HubSetup):
    """Groups of connections, and sending to them from any code, on one process or on many.

    The module's own `hub` serves most programs; a `Hub` of one's own keeps two apps apart:
    ``Pachinko(app, "/ws", hub=Hub())``. No method waits for a client: what a slow one has not
    read waits in its outbox. Names of groups and users are `str`, anything else is a `TypeError`.

    With a broker (`configure`), messages reach the members in all processes. Those in this process
    get them from the broker too, so that there is one order. Methods that reach other processes
    then raise `PachinkoError` when the broker does not take a message within 5 seconds.
    """

    def _check_own(self, conn: object, instead: str) -> str:
        """Return the id of *conn*. Refuse what is no connection of this hub."""
        if not isinstance(conn, Connection):
            raise TypeError(f'write hub.join("room:1", conn), or its id; got {conn!r}')
        if conn.hub is not self:
            raise PachinkoError(f"this connection's endpoint has another hub; {instead}")
        return conn.id

    async def join(self, group: str, conn: Connection | str) -> None:
        """Add *conn*, or the connection of any process with that id, to *group*.

        A group exists from its first member on. When it returns, messages of all processes to it
        arrive. If the broker does not answer in 4 seconds, it returns; a ``gap`` comes later. Does
        nothing if *conn* has ended. A process that does not answer in 4 seconds counts as ended.

        Raises `PachinkoError` for a connection of an endpoint with another hub, and if the broker
        does not permit the subscription. Raises `MessageError` (``too_many_groups``), which a
        handler may let pass to the client, for a connection that is in `max_groups` others.
        """
        self._check("join", group, "group")
        if isinstance(conn, str):
            return await self._call(conn, "join", group)
        self._check_own(conn, "use conn.join(group)")
        state = self.state
        if conn.id not in state.registry.connections:
            if conn.outgoing.is_answered:
                return  # It has ended.
            raise PachinkoError("nobody joins before it has authenticated; do it in @ws.connect")
        groups, most = state.registry.groups_of(conn), conn.outgoing.limits.max_groups
        is_new = group not in groups
        if len(groups) >= most and is_new:
            raise MessageError("too_many_groups", f"at most {most} groups a connection")
        state.registry.join(group, conn)
        if state.relay.history is not None and is_new:
            state.relay.history.enter(conn, group)
        try:
            await state.relay.subscribed(Kind.GROUP, group)
        except PachinkoError:
            try:
                await asyncio.sleep(0)  # Other joins that wait read the reason before the leave.
            finally:
                state.registry.leave(group, conn)
            raise

    async def leave(self, group: str, conn: Connection | str) -> None:
        """Remove *conn*, given as in `join`, from *group*. Does nothing if it is no member."""
        self._check("leave", group, "group")
        if isinstance(conn, str):
            return await self._call(conn, "leave", group)
        self._check_own(conn, "use conn.leave(group)")
        self.state.registry.leave(group, conn)

    async def _call(self, id: str, method: str, group: str) -> None:
        with contextlib.suppress(NoAnswer):  # The connection, or its process, has ended.
            await self.state.relay.call(id, method, group)

    def members(self, group: str) -> frozenset[Connection]:
        """Return the accepted connections of this process in *group*. Any thread may ask."""
        if not isinstance(group, str):
            raise TypeError(f"a group is named by a str, got {group!r}")
        return self.state.registry.accepted(Kind.GROUP, group)

    @property
    def connections(self) -> frozenset[Connection]:
        """The accepted connections of this process. Any thread may ask."""
        return self.state.registry.accepted(Kind.EVERYBODY, "all")

    @property
    def count(self) -> int:
        """How many connections this process has, with handshakes in progress.

        In a connect handler it includes the connection itself. It costs the same at any number.
        """
        return len(self.state.serving)

    @property
    def groups(self) -> frozenset[str]:
        """The groups with a member or a listener in this process. Any thread may ask."""
        return frozenset(self.state.registry.groups)

    async def send(
        self, group: str, message: object, payload: object = None, *, exclude: Exclude = None
    ) -> None:
        """Send a ``@message`` object, or a type and its payload, to the members of *group*.

        Bytes alone are a binary frame, here and wherever the hub sends; to a kept group (`keep`)
        they are a `PachinkoError`. *exclude* leaves out a connection, an id, or several of them.
        """
        self._check("send", group, "group")
        await self._send(Kind.GROUP, group, message, payload, exclude)

    async def position(self, group: str) -> str:
        """Return where a kept *group* is, such as ``"9f3a.41"``: who resumes there misses nothing.

        Raises `PachinkoError` for a group that is not kept (`keep`), and if the broker is away.
        """
        return str((await self._past("position", group, 0))[0])

    async def history(self, group: str, last: int = 20) -> AsyncGenerator[Envelope, None]:
        """Yield the *last* messages to a kept *group*, or as many as there are, the oldest first.

        Each is an `Envelope` with its payload as JSON values and its position, ``at``. Raises what
        `position` raises, and `ValueError` for a *last* that is no whole number or below 0.
        """
        refuse_iterating_elsewhere(self.state.loop, "asked for its history")
        if not (type(last) is int and last >= 0):
            raise ValueError(f"last is a number of messages, at least 0, got {last!r}")
        for text in (await self._past("history", group, last))[1]:
            yield read_frame(text, group)[0]

    async def _past(self, method: str, group: str, count: int) -> tuple[Position, Sequence[str]]:
        self._check(method, group, "group")
        if not any(map(group.startswith, self.state.rules)) and self.state.history is None:
            raise not_kept(group)
        return await self.state.relay.past(group, count)

    async def broadcast(
        self, message: object, payload: object = None, *, exclude: Exclude = None
    ) -> None:
        """Send to every connection of every process."""
        self._check("broadcast")
        await self._send(Kind.EVERYBODY, "all", message, payload, exclude)

    async def send_to(
        self, conn: Connection | str, message: object, payload: object = None
    ) -> None:
        """Send to one connection, given itself or by its id. Does nothing if it has ended.

        Raises `PachinkoError` for a connection of an endpoint with another hub.
        """
        self._check("send_to", id := self._id_of(conn), "connection")
        await self._send(Kind.CONNECTION, id, message, payload)

    @typing.overload
    async def ask(
        self, conn: Connection | str, message: object, payload: object = None, *,
        timeout: float = ..., returns: type[T],
    ) -> T: ...  # fmt: skip
    @typing.overload
    async def ask(
        self, conn: Connection | str, message: object, payload: object = None, *,
        timeout: float = ..., returns: Any = ...,
    ) -> Any: ...  # fmt: skip
    async def ask(
        self, conn: Connection | str, message: object, payload: object = None, *,
        timeout: float = 10.0, returns: Any = Any,
    ) -> Any:  # fmt: skip
        """Ask one client, given itself or by its id in any process; return its answer's payload.

        The client gets the message with an id that begins with ``$``, and answers with
        ``{"type":"<type>.reply","id":…,"payload":…}`` or an ``error``. *returns*: what the payload
        has to be, any type that a handler may take. *timeout*: seconds, with the time for sending.

        Raises `AnswerError` for an ``error`` and for a payload that is no *returns*; `NoAnswer`
        after *timeout*, when the client has gone, and at once for an id of nobody; `PachinkoError`
        in a connect or disconnect handler of that client, for its 65th question at a time, a
        reserved type, and *returns* that no payload can be; `ValueError` for a wrong *timeout*.
        """
        self._check("ask", id := self._id_of(conn), "connection")
        if not (is_seconds(timeout) and timeout > 0):
            raise ValueError(f"timeout is a number of seconds above 0, got {timeout!r}")
        state, t = self.state, answer_type(returns, self.state.codec)
        type, payload = split_message(message, payload)
        type = check_type(type)
        question = type, msgspec.Raw(state.codec.encode(type, payload)), timeout
        if isinstance(conn, Connection):
            answer = await put_question(conn, *question, is_by_id=False)
        else:
            answer = await state.relay.call(id, "ask", *question)
        try:
            return answer if t is Any else state.codec.structure(answer, t, f"{type}.reply")
        except MessageError as exc:
            raise AnswerError(bare(exc).code, exc.message, exc.details) from None

    async def send_to_user(self, user: str, message: object, payload: object = None) -> None:
        """Send to every connection of *user* (`Connection.user`)."""
        self._check("send_to_user", user, "user")
        await self._send(Kind.USER, user, message, payload)

    async def _send(
        self, kind: Kind, name: str, message: object, payload: object, exclude: Exclude = None
    ) -> None:
        """Encode once, and begin one write to each receiver, wherever it is."""
        type, payload = split_message(message, payload, takes_bytes=True)
        group = name if kind is Kind.GROUP else None
        codec = self.state.codec
        data = codec.encode(type, payload, group) if type else Binary(cast(bytes, payload))
        excluded: list[str] = []
        if exclude is not None:
            several = (exclude,) if isinstance(exclude, (Connection, str)) else exclude
            excluded = [self._id_of(item) for item in several]
            if not all(isinstance(id, str) for id in excluded):
                raise TypeError(f"exclude takes connections and their ids, got {exclude!r}")
        if not type and group is not None and self.state.history is not None:
            self._refuse_bytes(self.state.history, group)
        await self.state.relay.send(kind, name, data, excluded)

    def _refuse_bytes(self, history: History, group: str) -> None:
        if history.rings.window_of(group) is not None:
            raise PachinkoError(
                f"the group {group!r} is kept, and a binary frame can have no position; send the "
                'bytes in a message, as base64: hub.send(group, "file", {"data": data})'
            )

    def _id_of(self, item: Connection | str) -> str:
        return self._check_own(item, "use conn.hub") if isinstance(item, Connection) else item

    async def close_group(self, group: str, code: int = 1000, reason: str | None = "") -> None:
        """Close every connection in *group*, behind what was sent to it before."""
        self._check("close_group", group, "group")
        await self.state.relay.close(Kind.GROUP, group, Close(code, reason))

    async def close(
        self, conn: Connection | str, code: int = 1000, reason: str | None = ""
    ) -> None:
        """Close one connection, given itself or by its id, behind what was sent to it before.

        A handshake in progress is closed, too. Does nothing if the connection has ended. Raises
        what `Close` does, and `PachinkoError` for a connection of an endpoint with another hub.
        """
        self._check("close", id := self._id_of(conn), "connection")
        await self.state.relay.close(Kind.CONNECTION, id, Close(code, reason))

    async def close_user(self, user: str, code: int = 1000, reason: str | None = "") -> None:
        """Close every connection of *user*, behind what was sent to it before.

        A handshake or a login in progress that turns out to be *user* is closed as soon as that is
        known. Clients that come later are let in: revoke what they come in with first.
        """
        self._check("close_user", user, "user")
        await self.state.relay.close(Kind.USER, user, Close(code, reason))

    @typing.overload
    async def presence(self, group: str) -> list[Presence]: ...
    @typing.overload
    async def presence(self, *, user: str) -> list[Presence]: ...
    async def presence(
        self, group: str | None = None, *, user: str | None = None
    ) -> list[Presence]:
        """Ask for the accepted connections in *group*, or of *user*, of all processes.

        Each process answers for its own, so that those of a crashed process are gone at once. Waits
        0.4 seconds for answers, and up to 4 seconds for the rest of a long one.
        """
        if group is not None and user is not None:
            raise TypeError("write hub.presence(group) or hub.presence(user=...), not both")
        kind = Kind.GROUP if user is None else Kind.USER
        name: Any = group if user is None else user
        self._check("presence", name, "group" if user is None else "user")
        return await self.state.relay.ask(kind, name)

    @typing.overload
    def listen(self, group: str, *, heartbeat: None = None) -> Listener[Envelope]: ...
    @typing.overload
    def listen(self, group: str, *, heartbeat: float) -> Listener[Envelope | None]: ...
    def listen(self, group: str, *, heartbeat: float | None = None) -> Listener[Any]:
        """Get the messages to *group*: ``async for envelope in hub.listen("room:1"):``.

        It listens from the call on; with a broker once that has subscribed, for which the first
        step waits, and so does ``async with hub.listen("room:1") as messages:``. An `Envelope` has
        the type (``""`` for bytes), the payload as JSON and the group. Broadcasts do not come. Of
        more than 256 messages or 1 MiB that wait, the oldest are dropped; a ``gap`` comes in their
        place, and after an outage of the broker. With *heartbeat*, None comes after so many seconds
        of silence. It ends when the hub drains or stops, and goes on after `close_group`. `aclose`,
        the end of the block, or dropping what is returned unsubscribes.

        Raises `PachinkoError` in another thread or event loop; at the first step, if the broker
        does not permit the subscription. Raises `ValueError` for a *heartbeat* that is not above 0.
        """
        if isinstance(group, str):
            refuse_iterating_elsewhere(self.state.loop, "listened to")
        self._check("listen", group, "group")
        if heartbeat is not None and not (is_seconds(heartbeat) and heartbeat > 0):
            raise ValueError(f"heartbeat is a number of seconds above 0, got {heartbeat!r}")
        return Listener[Any](Mailbox(group, self.state), heartbeat)

    @property
    def draining(self) -> bool:
        """Whether `drain` has been called: a health check may tell a load balancer to go away."""
        return bool(self.state.drains)

    async def drain(self, seconds: float = 10.0) -> None:
        """Close all clients before a shutdown, with 1012, in random order, over *seconds*.

        Listeners (`listen`) end likewise. The pauses keep clients from coming back all at once. New
        handshakes are refused from now on.
        Returns when the disconnect handlers have ended, or hang: `linger` and 5 seconds after the
        last close. Raises `ValueError` for *seconds* below 0.
        """
        if not is_seconds(seconds):
            raise ValueError(f"seconds is a number, at least 0, got {seconds!r}")
        self._check("drain")
        # A task of its own does it: the caller may be a handler, and cancelled with its client.
        work = self.state.close_all(seconds, asyncio.current_task())
        self.state.drains.append(task := create_task(work, is_detached=True))
        await asyncio.shield(task)

    @typing.overload
    def call_threadsafe(
        self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> concurrent.futures.Future[T]: ...
    @typing.overload
    def call_threadsafe(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> concurrent.futures.Future[T]: ...
    def call_threadsafe(
        self, function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> concurrent.futures.Future[Any]:
        """Call a method of the hub from any thread: ``hub.call_threadsafe(hub.send, "room:1", …)``.

        The future gives what the method returns or raises. Raises `PachinkoError` if no app runs.
        """
        if not callable(function):
            raise TypeError(f'write hub.call_threadsafe(hub.send, "room:1", ...), got {function!r}')
        return self.state.submit(functools.partial(function, *args, **kwargs))

    def stats(self) -> dict[str, int]:
        """Return counts since the start, of this process. Any thread may ask.

        ``connections``, ``groups`` (now); ``received``, ``sent`` (frames); ``dropped`` (messages),
        ``evicted`` (connections); ``outbox_high_water`` (messages); ``late`` (answers of clients
        that nobody waited for); ``refused`` (messages from the broker that are not ours),
        ``outages`` (of it), ``broker_down`` (1 while it is away, or 0); ``errors`` in all, and
        ``errors.<code>`` for each code that was answered.
        """
        state = self.state
        counts, sessions = state.counts.copy(), tuple(state.serving.values())
        errors = {name: count for name, count in counts.items() if name.startswith("errors.")}
        return {
            "connections": len(self.connections),
            "groups": len(state.registry.groups),
            "received": counts["received"] + sum(each.incoming.received for each in sessions),
            "sent": counts["sent"] + sum(each.outgoing.sent for each in sessions),
            "dropped": counts["dropped"],
            "evicted": counts["evicted"],
            "outbox_high_water": counts["outbox_high_water"],
            "late": counts["late"],
            **state.relay.stats(),
            "errors": sum(errors.values()),
            **errors,
        }


hub: Hub = Hub()
"""The hub of the process. It holds no event loop and no connection before an app starts."""


# ── outcomes ──────────────────────────────────────────────────────────────────────────────────
#
# An exception of the application's code becomes an answer or a close, or is raised again.

TYPE_SHOWN = 80  # characters of a type in an answer or a log: a client may send one of max_size
# What a stop or a departure raises. A `TaskGroup` groups the `GeneratorExit` of its generator.
_QUIET = (asyncio.CancelledError, GeneratorExit, falcon.WebSocketDisconnected)
_UNANSWERED = (AnswerError, NoAnswer)
bug_hooks: list[Callable[[str, BaseException], None]] = []  # what simulations do with a bug


def single(
    exc: BaseException, is_handled: Callable[[BaseException], bool] = lambda _: False
) -> BaseException:
    """Return what *exc*, from code of the application, means if it is a group; else *exc* itself.

    Errors that a stop or a departure causes count only if there are no others. Of the others, the
    first one counts if each means an outcome, or *is_handled* by an error handler for its class.
    Otherwise the whole group is a bug. *is_handled* may also take the group as it is.
    """
    if not isinstance(exc, BaseExceptionGroup):
        return exc
    errors = sorted(
        _errors_in(exc), key=lambda each: isinstance(each, falcon.WebSocketDisconnected)
    )
    left = [each for each in errors if not isinstance(each, _QUIET)]
    if not left:  # A `GeneratorExit` has to end its own generator only.
        return asyncio.CancelledError() if isinstance(errors[0], GeneratorExit) else errors[0]
    ends = [each for each in left if isinstance(each, KeyboardInterrupt)]
    is_meant = all(outcome_of(each) is not None or is_handled(each) for each in left)
    return ends[0] if ends else left[0] if is_meant and not is_handled(exc) else exc


def _errors_in(exc: BaseException) -> Iterator[BaseException]:
    """Yield the errors in *exc*, which may be a group of groups."""
    if isinstance(exc, BaseExceptionGroup):
        for each in cast("BaseExceptionGroup[BaseException]", exc).exceptions:
            yield from _errors_in(each)
    else:
        yield exc


def is_departure(exc: BaseException) -> bool:
    """Tell whether *exc* may come of the client's departure alone."""
    is_group = isinstance(exc, BaseExceptionGroup)
    quiet = _QUIET if is_group else (falcon.WebSocketDisconnected,)
    return all(isinstance(each, (*quiet, NoAnswer)) for each in _errors_in(exc))


def outcome_of(exc: BaseException) -> MessageError | Close | None:
    """Return what *exc*, from a handler, means for the client; None for a bug."""
    if isinstance(exc, falcon.HTTPError):
        status, title = exc.status_code, exc.title or ""
        details = {"status": status, "title": title, "description": exc.description}
        return MessageError(f"http_{status}", exc.description or title, **details)
    if isinstance(exc, _UNANSWERED):
        return MessageError("no_answer", "a client that was asked has not answered")
    return exc if isinstance(exc, (MessageError, Close)) else None


def is_status(exc: BaseException) -> bool:
    """Tell whether *exc* is a status of HTTP that is no error, such as a redirection."""
    return isinstance(exc, falcon.HTTPStatus)


def as_status(exc: BaseException) -> BaseException:
    """Return *exc*, or 408 if a client has not answered: where no message is there to answer."""
    return falcon.HTTPError(408) if isinstance(exc, _UNANSWERED) else exc


def close_for(exc: BaseException, what: str, id: str | None) -> Close:
    """Return how *exc* from *what*, code around a connection, closes it. A bug is logged."""
    exc = as_status(exc)
    if isinstance(exc, Close):
        return exc
    if isinstance(exc, (falcon.HTTPError, falcon.HTTPStatus)):
        return Close(3000 + exc.status_code)
    log_failure(what, exc, id)
    return Close(1011, "the server failed")


def error_frame(
    error: MessageError, id: Id | None, codec: Codec, group: str | None = None
) -> bytes:
    """Return the frame that answers the message *id*, or tells of *group*, with *error*."""
    payload = {"code": error.code, "message": error.message}
    try:
        if error.details:
            payload |= codec.converter.unstructure(error.details)
        return _encode(Sent("error", id, payload, group))
    except Exception:  # A hook may raise anything.
        return codec.encode_again(Sent("error", id, group=group), {**payload, **error.details})


def log_refusal(error: MessageError, id: str, type: str | None) -> None:
    """Log at DEBUG that a message of *type* was answered with *error*. The payload is not shown."""
    if logger.isEnabledFor(logging.DEBUG):
        type = type[:TYPE_SHOWN] if type else None
        extra = {"connection_id": id, "message_type": type, "code": error.code}
        logger.debug("answered %r with the error %r", type, error.code, extra=extra)


def internal_error() -> MessageError:
    """Return the answer to a message whose handler has a bug."""
    return MessageError("internal_error", "the server failed to handle this message")


def _is_from_cancellation(exc: BaseException | None, groups: Sequence[object] = ()) -> bool:
    """Return whether *exc* is a `CancelledError`, or was raised while one was handled.

    A `TimeoutError` does not count: the cancellation that caused it is over. A group counts if all
    its errors do. In a `TaskGroup` that fails, the first error does not, and it cancels the others.
    """
    while exc is not None and not isinstance(exc, TimeoutError):
        if isinstance(exc, asyncio.CancelledError):
            return True
        if isinstance(exc, BaseExceptionGroup):
            inner = (*groups, exc)  # An error in a group may have been raised again because of it.
            is_new = all(exc is not each for each in groups)
            return is_new and all(_is_from_cancellation(each, inner) for each in exc.exceptions)
        exc = exc.__context__
    return False


def pass_on(exc: BaseException, what: str, id: str | None, type: str | None = None) -> None:
    """Raise *exc* again if it has to end the task. *what*, code of the application, raised it.

    A `KeyboardInterrupt`, a `GeneratorExit` and a cancellation of the task have to. An error of
    clean-up code during a cancellation is logged, and `CancelledError` is raised. Returns for all
    else, such as argparse's `SystemExit`, or a `CancelledError` that nobody asked for.
    """
    try:
        if isinstance(exc, (KeyboardInterrupt, GeneratorExit)):  # There may be no task any more.
            raise exc
        # The count may include a cancellation that code has caught, so *exc* has to come from one.
        if current_task().cancelling() and _is_from_cancellation(exc):
            quiet = (asyncio.CancelledError, falcon.WebSocketDisconnected)
            if outcome_of(exc) is None and not isinstance(exc, quiet):
                log_failure(what, exc, id, type)
            raise (exc if isinstance(exc, quiet[0]) else asyncio.CancelledError()) from None
    finally:
        del exc  # It refers to this frame; a cycle would keep the connection until a collection.


async def take_leave(
    steps: Iterable[End], conn: Connection, close: Callable[[Close], None] | None = None
) -> bool:
    """Await each of *steps* of the connection's end, such as disconnect handlers.

    An error ends its step only. It is logged, or *close* is called with what it means. Returns
    whether the task has been cancelled, and not by a scope that a step has left, such as a group.
    """
    is_ending = bool(current_task().cancelling())
    for step in steps:
        try:
            await step(conn)
        except BaseException as exc:  # A handler may raise anything.
            exc = single(exc)
            try:
                pass_on(exc, place_of(step), conn.id)
            except asyncio.CancelledError:
                is_ending = True
            else:
                if isinstance(exc, falcon.WebSocketDisconnected):
                    text = "%s was left when it sent to the client, which has gone"
                    logger.debug(text, place_of(step), extra={"connection_id": conn.id})
                elif close is not None:
                    close(close_for(exc, place_of(step), conn.id))
                else:
                    log_failure(place_of(step), exc, conn.id)
        if not is_ending:
            forget_cancellations()
    return is_ending and bool(current_task().cancelling())


async def leave_scopes(session: Session, ends: Sequence[End]) -> None:
    """Run *ends*, what is behind the ``yield`` of connect handlers, once the task was cancelled.

    A scope around a ``yield`` may have done that: a time-out, or a group of which a task has
    failed. Then the connection is closed. Raises `asyncio.CancelledError` if it was the server.
    """
    outgoing, conn = session.outgoing, session.conn
    steps = [end for end in reversed(ends) if end not in session.routes.disconnect]
    if not ends or await take_leave(steps, conn, outgoing.close):
        raise asyncio.CancelledError
    if not conn.closed:
        outgoing.close(Close(1011, "the server has ended the connection"))
        text = "a scope around the `yield` of a connect handler has ended the connection"
        logger.warning(text, extra={"connection_id": conn.id})


def forget_cancellations() -> None:
    """Reset the count of cancellations: Python 3.11 and 3.12 count some that were caught."""
    task = current_task()
    while task.cancelling():
        task.uncancel()


def log_failure(what: str, exc: BaseException, id: str | None, type: str | None = None) -> None:
    """Log a bug in the application with its traceback; *id* is that of the connection."""
    tell_of_bug(what, exc)
    extra = {"connection_id": id, "message_type": type}
    if type == "authenticate":  # The text may hold a token. The log gets the class and the place.
        for each in _errors_in(exc):
            reason = f": {each}" if isinstance(each, PachinkoError) else ""
            reason += "\n" + "".join(traceback.format_tb(each.__traceback__))
            logger.error("%s failed: %s%s", what, each.__class__.__qualname__, reason, extra=extra)
    elif is_away(exc):
        logger.error("%s failed: %s", what, exc, extra=extra)
    else:
        logger.error("%s failed", what, exc_info=exc, extra=extra)


def tell_of_bug(what: str, exc: BaseException) -> None:
    """Tell the simulations of *exc*, if it is a bug; *what* has raised it."""
    if not is_away(exc):
        for hook in bug_hooks:
            hook(what, exc)


def is_away(exc: BaseException) -> bool:
    """Tell whether *exc* needs no traceback: the program has no bug, and it may come often."""
    return all(isinstance(each, (BrokerAway, *_UNANSWERED)) for each in _errors_in(exc))


async def meaning_of(
    exc: BaseException, routes: Iterable[Routes], conn: Connection, what: str, type: str | None
) -> Any:
    """Return what *exc* means to an error handler of the application, or to the library.

    The error handlers of the first *routes* are asked first. What one raises goes to the next.
    """
    for each in routes:
        if (handler := each.error_handler(exc)) is None:
            continue
        try:
            return await handler(conn, exc)
        except BaseException as second:  # The error handler has a bug.
            exc = single(second)
            pass_on(exc, place_of(handler), conn.id, type)
    if (outcome := outcome_of(exc)) is None:
        log_failure(what, exc, conn.id, type)
    return outcome or internal_error()


async def send_raw(result: object, function: Any, cls: type, conn: Connection) -> None:
    """Send what *function*, which takes frames of the type *cls*, has returned."""
    if cls is str and isinstance(result, str):
        text = whole(str.__str__(result))  # Servers take no subclass.
        await conn.outgoing.send({"type": "websocket.send", "text": text})
    elif message_type(type(result)) or isinstance(result, AS_THEY_ARE[cls]):
        await conn.send(result)
    elif result is not None:
        raise TypeError(f"{place_of(function)} {may_return(cls)}; got {type(result).__name__}")


async def in_time(seconds: float | None, function: Callable[..., Any], call: Awaitable[T]) -> T:
    """Return what *call*, of *function*, returns within so many seconds, or whenever it does."""
    if seconds is None:
        return await call
    limit = TimeLimit(clock.time() + seconds)
    try:
        with limit:
            return await call
    except TimeoutError:
        if not limit.expired:  # The error is the handler's own.
            raise
    logger.warning("%s was stopped after %g s", place_of(function), seconds)
    raise MessageError("handler_timeout", f"not done within {seconds:g} s")


# ── guard ─────────────────────────────────────────────────────────────────────────────────────
#
# A guard says whether a client may send a message type. It is asked before the payload is read.


def check_guard(only: Any, name: str, namespaces: Namespaces) -> None:
    """Raise `PachinkoError` unless *only*, of the message type *name*, can be asked."""
    wrong = None
    if not callable(only) or isinstance(only, (type, staticmethod)):
        wrong = f"got {_other_than_a_function(only, '@ws')[0]}"
    elif is_stream(only) or is_called_as(only, inspect.isgeneratorfunction):
        wrong = f"{place_of(only)} has a `yield`"
    else:
        try:
            signature = signature_of(only)
            signature.bind(None)
            positional = [p for p in parameters_of(only) if p.kind in _POSITIONAL]
            returns = known_type(only, signature.return_annotation, namespaces)
            t = known_type(only, positional[0].annotation, namespaces) if positional else Any
            if len(positional) > 1 or is_payload(t) or any(p.name == "self" for p in positional):
                wrong = f"{place_of(only)} takes `{listed(positional)}`, but gets the connection"
            elif is_leaf(returns) and not admits(returns, bool):
                wrong = f"{place_of(only)} returns {shown(returns)}"
        except Exception as exc:  # Some callables have no signature; an annotation may raise.
            wrong = f"{place_of(only)} takes the wrong parameters: {exc}"
    if wrong is not None:
        raise PachinkoError(
            f"only= takes a function of one connection that returns a bool, but {wrong}; write\n"
            f'def is_admin(conn: Connection) -> bool: ...\n\n@ws.on("{name}", only=is_admin)'
        )


async def call_if_allowed(
    handler: Handler, conn: Connection, call: Callable[[], Awaitable[Any]]
) -> Any:
    """Return what *call* returns if the guard of *handler* allows it.

    Raises `MessageError` if *conn* may not send the type, and what the guard itself raises.
    """
    only: Any = handler.only
    try:
        allowed = only(conn)
        if not isinstance(allowed, bool) and inspect.isawaitable(allowed):
            allowed = await allowed
        if not isinstance(allowed, bool):
            raise PachinkoError(f"a guard returns True or False, and not {allowed!r}")
    except Exception as exc:  # A guard may raise anything; it is raised again.
        note = f"It was raised by {place_of(only)}, which guards {handler.type!r} by only=."
        if outcome_of(exc) is None and note not in getattr(exc, "__notes__", ()):
            exc.add_note(note)
        raise
    if not allowed:
        raise MessageError("forbidden", f"this client may not send {handler.type[:TYPE_SHOWN]!r}")
    return await call()


# ── stream ────────────────────────────────────────────────────────────────────────────────────
#
# A handler that yields is a stream. It runs in a task of its own, and the client may stop it.

_NONE: Any = types.MappingProxyType({})  # the tables of most connections, which have no tasks


@attrs.define(eq=False)
class Stream:
    """A generator in progress, whose items go to the client one by one."""

    is_stopped: bool = False  # the client wants no more of it, or has gone
    has_begun: bool = False  # its handler was called, and not only middleware
    task: asyncio.Task[Any] | None = None  # the task that runs it
    _is_cancellable: bool = False

    def stop(self) -> None:
        """Cancel the generator, once. A generator that has not begun will not begin."""
        if not self.is_stopped and self._is_cancellable and self.task is not None:
            self.task.cancel()
        self.is_stopped = True

    def leave(self) -> None:
        """Stop, as the client has gone. A write of its own that has noticed that raises."""
        if self.task is None or self.task is not asyncio.current_task():  # A timer has no task.
            self.stop()

    async def run(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Return what *call* returns, which is the stream with the middleware around it."""
        if self.is_stopped:
            return None
        self.task, self._is_cancellable = current_task(), True
        try:
            return await call()
        finally:
            self.task = None  # A task keeps its error, and with it stack frames.

    async def send_all(
        self, call: Callable[[], AsyncGenerator[Any]], reply: Callable[[Any], Event],
        send: Callable[[Event], Awaitable[None]],
    ) -> None:  # fmt: skip
        """Give *send* a *reply* for each item of the generator of *call*. It runs once."""
        if self.has_begun:
            raise PachinkoError("a stream cannot be repeated; await call_next() once")
        if self.is_stopped:  # The middleware has caught its cancellation.
            raise asyncio.CancelledError
        self.has_begun = True
        async with closing(call()) as items:
            try:
                async for item in items:
                    if self.is_stopped:  # The generator has caught its cancellation.
                        raise asyncio.CancelledError
                    await send(reply(item))
                    await asyncio.sleep(0)  # Some generators never wait.
            finally:  # The clean-up of the generator, and of the middleware, is not cancelled.
                self._is_cancellable = False


async def end_tasks(
    tasks: Set[asyncio.Task[Any]], own: Set[asyncio.Task[Any]], streams: Mapping[Id, Stream],
    end: float, linger: float, conn: Connection,
) -> None:  # fmt: skip
    """Give *tasks* up to *end* on the loop's clock. *own* and *streams* have been cancelled."""
    try:
        await clock.wait(tasks, 0 if current_task().cancelling() else end - clock.time())
        await asyncio.sleep(0)  # Two cancellations in one turn would be one, which may be caught.
    finally:
        stopped = {*own, *(stream.task for stream in streams.values())}
        for task in tasks:
            # A cancelled stream may clean up. A handler may have caught a time-out.
            if task not in stopped or not task.cancelling():
                task.cancel()
    patience = _GOODBYE if current_task().cancelling() else max(_GOODBYE, linger)
    for task in await clock.wait(tasks, patience):
        extra = {"connection_id": conn.id}
        what = "a task" if task in own else "a handler"
        logger.error("%s ignores its cancellation: %r", what, task, extra=extra)


# ── background ────────────────────────────────────────────────────────────────────────────────
#
# A task that the application starts for a connection (`Connection.create_task`) ends with it.


def create_task_of(session: Session, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start *work* in a task that the end of the connection cancels."""
    conn, state = session.conn, session.conn.hub.state
    has_ended = conn.id not in state.registry.connections and conn.outgoing.is_answered
    if has_ended and state.serving.get(current_task()) is session:
        raise PachinkoError(
            "conn.create_task in a disconnect handler, where the tasks of the connection have "
            "ended; await the coroutine there, or use a @ws.worker"
        )
    task = create_task(_report(work, conn))
    tasks = state.background.setdefault(conn.id, {})
    tasks[task] = (has_ended or conn.closed) and task.cancel()

    def forget(task: asyncio.Task[T]) -> None:
        del tasks[task]
        if not tasks:
            del state.background[conn.id]
        if task.cancelled():
            work.close()  # It may not have begun.
        else:
            task.exception()  # It has been logged. Otherwise asyncio logs it, too.

    task.add_done_callback(forget)
    return task


async def _report(work: Coroutine[Any, Any, T], conn: Connection) -> T:
    """Await *work*, log its bug, close the connection if it says so, and raise what it raises."""
    error: BaseException | None = None
    try:
        return await work
    except BaseException as exc:  # The application's code may raise anything.
        error, what = single(exc), f"the task {getattr(work, '__qualname__', work)}"
        pass_on(error, what, conn.id)
        if isinstance(error, Close):
            conn.outgoing.close(error)
        elif not ((conn.closed or conn.ws.closed) and is_departure(exc)):
            log_failure(what, error, conn.id)
        if isinstance(exc, SystemExit):  # asyncio would end the loop, and with it the server.
            raise RuntimeError("sys.exit() in a task of a connection") from exc
        raise
    finally:
        del error  # It refers to this frame; a cycle would keep the connection.


# ── snapshots ─────────────────────────────────────────────────────────────────────────────────
#
# A member that has missed messages, or is new, may get the state of its group (`@ws.snapshot`).

_SNAPSHOT_SECONDS = 10.0  # for one, if the endpoint has no `handler_timeout`
_MAY_RETURN = "may return a @message object or None"


def check_snapshot(function: Any, prefix: str, namespaces: Namespaces) -> None:
    """Raise `PachinkoError` unless *function* takes snapshots of the groups with *prefix*."""
    example = f"@ws.snapshot({prefix!r})\nasync def state(conn, group): ..."
    check_function(function, example, 2)
    check_taken(function, str, namespaces, example)
    returns = signature_of(function).return_annotation
    members: Iterable[Any] = (known := known_type(function, returns, namespaces),)
    with contextlib.suppress(Exception):  # A ``type`` statement may name what is not there.
        members = union_members(known)
    if not all(is_sendable(each, ()) for each in members):
        what = f"returns {type_as_code(returns)}, but {_MAY_RETURN}"
        raise mistake(function, what, example)


def check_kept(snapshots: Mapping[str, Any], rules: Mapping[str, Window]) -> None:
    """Raise `PachinkoError` if one of *snapshots* is of groups of which *rules* keep none."""
    for prefix, function in snapshots.items():
        if not any(rule.startswith(prefix) or prefix.startswith(rule) for rule in rules):
            refused = "is the snapshot of groups that are not kept"
            raise mistake(function, refused, f"hub.keep({prefix!r})  # before the app starts")


def snapshot_of(session: Session, group: str) -> Take | None:
    """Return what takes the snapshot of *group* for the client, if there is one."""
    snapshots = session.routes.snapshots
    prefix = max(filter(group.startswith, snapshots), key=len, default=None)
    if prefix is None:
        return None
    return functools.partial(_take_snapshot, session.conn, snapshots[prefix], group)


async def _take_snapshot(
    conn: Connection, function: Callable[..., Awaitable[Any]], group: str
) -> tuple[bytes | None, bool]:
    """Return what `Take` says. Raises `Close`, and what comes of the end of the connection."""
    codec, what = conn.hub.state.codec, place_of(function)
    seconds = conn.outgoing.limits.handler_timeout or _SNAPSHOT_SECONDS
    try:
        state = await in_time(seconds, function, function(conn, group))
        if state is None:
            return None, False
        if message_type(type(state)) is None:
            raise TypeError(f"{what} {_MAY_RETURN}; got {type(state).__name__}")
        return codec.encode(*split_message(state, None), group), False
    except BaseException as exc:  # Code of the application may raise anything.
        error = await _meaning(exc, conn, what)
    count_error(conn.hub.state.counts, error.code)
    log_refusal(error, conn.id, None)
    return error_frame(error, None, codec, group), True


async def _meaning(exc: BaseException, conn: Connection, what: str) -> MessageError:
    """Return what a client is told of *exc*. Raises what `create_task_of` knows the meaning of."""
    error, is_over = single(exc), conn.closed or conn.ws.closed
    try:
        pass_on(error, what, conn.id)
        if isinstance(error, Close) or (is_over and is_departure(exc)):
            raise error
        return cast(MessageError, await meaning_of(error, (), conn, what, None))
    finally:
        del error, exc  # They refer to this frame; a cycle would keep the connection.


# ── answering ─────────────────────────────────────────────────────────────────────────────────
#
# Whatever goes wrong with a message becomes one outcome for the client; the connection goes on.


class Answering:
    """What one connection is told: answers, errors, and that it sends too much."""

    __slots__ = (
        "_hub_state", "_limits", "_rate", "conn", "outgoing", "routes", "streams", "tasks",
    )  # fmt: skip

    def __init__(self, conn: Connection, routes: Routes) -> None:
        limits = conn.outgoing.limits
        self.conn: Connection = conn
        self.routes: Routes = routes
        self.outgoing: Outgoing = conn.outgoing
        self.tasks: set[asyncio.Task[None]] = _NONE  # concurrent handlers and streams
        self.streams: dict[Id, Stream] = _NONE
        self._hub_state, self._limits = conn.hub.state, limits
        self._rate = Rate(*limits.rate) if limits.rate is not None else None

    def open_tables(self) -> None:
        """Make the tables of tasks and streams, which most connections do not need."""
        if not self.tasks and not self.streams:
            self.tasks, self.streams = set(), {}

    def add_task(self, work: Coroutine[Any, Any, None], *, is_detached: bool = False) -> None:
        """Run *work* in a task that is among `tasks`."""
        task = create_task(work, is_detached=is_detached)
        self.open_tables()
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _exceed_rate(
        self, event: Event, id: Id | None, type: str | None = None
    ) -> Awaitable[None] | None:
        """Count the frame, once; return what refuses it, or None if the rate admits it."""
        if self._rate is None or event.get("is_counted"):
            return None
        event["is_counted"] = True
        wait = self._rate.take(time.monotonic() + clock.ahead)
        return self._refuse_rate(self._rate, wait, id, type) if wait > 0 else None

    async def _refuse_rate(self, rate: Rate, wait: float, id: Id | None, type: str | None) -> None:
        """Tell the client to wait for some seconds; close if it has sent far too much."""
        if rate.is_abused:
            self.outgoing.close(Close(1008, "too many messages"))
        else:
            await self._send_error(rate.refusal(wait), id, type)

    def _call(
        self, handler: Handler, message: Received, stream: Stream | None = None, asks: bool = True
    ) -> Awaitable[Any]:
        """Call the handler, through the middleware. The items of a *stream* are sent."""
        value = message.payload
        if value is UNSET or not message.is_built:
            if asks and handler.only is not None:
                call = functools.partial(self._call, handler, message, stream, False)
                return call_if_allowed(handler, self.conn, call)
            value = handler.structure(value, self._hub_state.codec)
        innermost: Callable[[], Any] = functools.partial(handler.call, self.conn, value)
        if stream is not None:
            reply = functools.partial(handler.reply, message.id, self._hub_state.codec, more=True)
            innermost = functools.partial(stream.send_all, innermost, reply, self._send_item)
        middleware = self.routes.middleware
        if self.routes.scopes:
            middleware = middleware_of(around(self.routes, handler.type))
        # No middleware sees a renewal, because its token is nobody else's business.
        if not middleware or handler.type == "authenticate":
            return cast("Awaitable[Any]", innermost())
        payload = value if handler.defaults is None else {**handler.defaults, **value}
        envelope = Envelope(handler.type, payload, message.id)
        return call_through(middleware, self.conn, envelope, innermost)

    async def run_stream(self, handler: Handler, message: Received, stream: Stream) -> None:
        """Run a stream to its end: exhausted, failed, stopped by the client, or disconnected."""
        id = cast(Id, message.id)
        try:
            try:
                result = await stream.run(lambda: self._call(handler, message, stream))
            finally:  # The id is free before the final answer is on its way.
                self.drop_stream(id)
            if not (stream.is_stopped or stream.has_begun):
                await self._answer(handler.type, id, result)  # A middleware has returned it.
                return
        except BaseException as exc:  # A bug is answered, not passed on.
            was_stopped = stream.is_stopped and not self.outgoing.closed
            if was_stopped:
                forget_cancellations()
            if not (was_stopped and isinstance(single(exc), asyncio.CancelledError)):
                await self._fail(exc, handler.type, id)
                return
        await self._send(_encode(Sent("complete", id)))

    async def _answer(self, type: str, id: Id | None, result: object) -> None:
        """Answer with *result*, which a middleware or an error handler has returned."""
        if result is not None or id is not None:
            codec = self._hub_state.codec
            type, _ = codec.writer_of(result, f"{type}.reply")
            await self._send(codec.encode(type, result, id=id))

    async def _fail(
        self, raised: BaseException, type: str | None, id: Id | None, routes: Any = None
    ) -> None:
        """Answer *id* with what *raised* means. A frame without a *type* comes with *routes*."""
        routes = (routes or around(self.routes, type))[::-1]
        exc = single(raised, lambda exc: any(each.is_handled(exc) for each in routes))
        what = f"the handler of {type!r}" if type else "the fallback or the binary handler"
        # If code of the application has cancelled a task beside the reader, its error is answered.
        is_beside = current_task() in self.tasks and not self.outgoing.closed
        try:
            if not (is_beside and isinstance(exc, Exception)):
                pass_on(exc, what, self.conn.id, type)
        except BaseException:  # It is raised again.
            del exc, raised  # They refer to this frame; a cycle would keep the connection.
            raise
        # A handler that sends by Falcon's own socket learns of the end before `Outgoing` does.
        is_over = self.conn.closed or self.conn.ws.closed
        if is_over and is_departure(raised):
            return  # A handler may end like this when its client has gone.
        if isinstance(exc, asyncio.CancelledError):
            exc = raised  # Nobody has asked for it: a bug, and the log gets all of a group.
        try:
            outcome = await meaning_of(exc, routes, self.conn, what, type)
            if isinstance(outcome, Close):
                self.outgoing.close(outcome)
            elif isinstance(outcome, MessageError):
                await self._send_error(outcome, id, type)
            elif type is not None:
                await self._answer(type, id, outcome)
        except Exception as second:  # The outcome cannot be encoded.
            log_failure("the answer to an error", second, self.conn.id, type)
            await self._send_error(internal_error(), id, type)

    async def _send_error(self, error: MessageError, id: Id | None, type: Any = None) -> None:
        """Answer the message *id*, of *type* if that is known, with *error*."""
        data = error_frame(error, id, self._hub_state.codec)
        count_error(self._hub_state.counts, error.code)
        log_refusal(error, self.conn.id, type)
        await self._send(data)

    async def _send(self, data: bytes) -> None:
        """Send a frame, unless the client has gone."""
        with contextlib.suppress(falcon.WebSocketDisconnected):
            await self.outgoing.send(text_event(data))

    async def _send_item(self, event: Event) -> None:
        """Send an item of a stream. Raises `falcon.WebSocketDisconnected`."""
        await self.outgoing.send(event)

    def drop_stream(self, id: Id) -> None:
        """Note that the client has no stream with this id any more."""
        del self.streams[id]


# ── resumable streams ─────────────────────────────────────────────────────────────────────────
#
# A stream may go on for a while without its client (``@ws.on("ask", resumable=60)``). Its items are
# kept, for a client that comes back with the position of the latest one that it has got.

_ITEMS, _ITEM_BYTES = 256, 1_048_576  # of one stream that are kept, and as many without a client
_MOST_ALONE = 1_000  # streams of a process without a client, also if they have ended
_ALL_BYTES = 67_108_864  # of all items that a process keeps
_TOKEN_BYTES = 12
_MOST_RESUMED = 100  # that one client may go on with at a time
_PULL = 2.5  # seconds that another process waits for further items, less than `Relay.call` does
_PULL_TRIES, _PULL_AGAIN = 4, 1.0  # how often it is asked in vain, and seconds between


class ResumableStream(Stream):
    """The generator of a `Resumable`."""

    def __init__(self, owner: Resumable) -> None:
        super().__init__(is_stopped=owner.outgoing.closed)
        self._owner = owner

    def leave(self) -> None:
        """Go on for a while."""
        self._owner.leave()


class Resumable(Answering):
    """A stream that goes on for some seconds without its client."""

    __slots__ = (
        "_alone", "_came", "_carrier", "_carriers", "_count", "_final", "_id", "_items", "_news",
        "_puller", "_seconds", "_size", "_stream", "_timer", "_token",
    )  # fmt: skip

    def __init__(self, session: Session, id: Id, seconds: float) -> None:
        conn = session.conn
        super().__init__(conn, session.routes)
        self._id, self._seconds = id, seconds
        # Only its client knows the 96 bits. The rest tells another process which one to ask.
        self._token = secrets.token_hex(_TOKEN_BYTES) + self._hub_state.process
        self._stream = ResumableStream(self)
        self._carrier: Session | None = session  # Its client gets the items.
        self._carriers = {session.conn.id}  # of all that have been it, the ids
        self._items = collections.deque[tuple[int, Event]]()
        self._size = 0  # characters in them
        self._count = 0  # items so far
        self._alone = 0  # what the items take that have come without a client
        self._came = asyncio.Event()  # A client is there again.
        self._news = asyncio.Event()  # There are more items, or the final answer.
        self._final: bytes | None = None  # the frame after the last item
        self._timer: Timer | None = None
        self._puller: str | None = None  # its client in another process: a connection's id
        self._hub_state.registry.resumable[self._token] = self

    def start(self, handler: Handler, message: Received) -> None:
        """Run the generator in a task of its own."""
        cast("Session", self._carrier).take_stream(self._id, self._stream)
        self.add_task(self._run(handler, message))

    async def _run(self, handler: Handler, message: Received) -> None:
        await self.run_stream(handler, message, self._stream)
        if self._final is None:  # It has closed a connection that was over.
            await self._send_error(stream_lost(), self._id, handler.type)

    async def _send_item(self, event: Event) -> None:
        """Send an item with its position, or keep it until a client comes back."""
        self._count += 1
        text = f'{event["text"][:-1]},"at":"{self._token}.{self._count}"}}'
        event = {"type": "websocket.send", "text": text}
        self._items.append((self._count, event))
        self._resize(len(text))
        self._make_room()
        self._news.set()
        if self._carrier is not None:
            self._trim(self._count)
            with contextlib.suppress(falcon.WebSocketDisconnected):
                await self.outgoing.send(event)
            return
        self._alone += max(len(text), _ITEM_BYTES // _ITEMS)
        while self._carrier is None and self._alone > _ITEM_BYTES:
            self._came.clear()
            await self._came.wait()

    def _resize(self, change: int) -> None:
        """Count characters of items, here and for the process."""
        self._size += change
        self._hub_state.counts["stream_bytes"] += change

    def _make_room(self) -> None:
        """End the streams without a client that are too many, the first that were left first."""
        alone, counts = self._hub_state.registry.alone, self._hub_state.counts
        while alone and (len(alone) > _MOST_ALONE or counts["stream_bytes"] > _ALL_BYTES):
            next(iter(alone.values())).end()

    def _trim(self, number: int) -> None:
        """Drop old items that are too many, up to *number*."""
        counts = self._hub_state.counts
        while (
            self._items
            and self._items[0][0] <= number
            and (
                len(self._items) > _ITEMS
                or self._size > _ITEM_BYTES
                or counts["stream_bytes"] > _ALL_BYTES
            )
        ):
            self._resize(-len(self._items.popleft()[1]["text"]))

    async def _send(self, data: bytes) -> None:
        """Send the final answer. It is kept, too, since the client may not have got it."""
        self._final, carrier, self._carrier = data, self._carrier, None
        if carrier is not None:
            carrier.drop_stream(self._id)
        self._news.set()
        if self._token in self._hub_state.registry.resumable:
            self._stay()
            self._make_room()
        if carrier is not None:
            await super()._send(data)

    async def _fail(
        self, raised: BaseException, type: str | None, id: Id | None, routes: Any = None
    ) -> None:
        """Do what `Answering` does. A generator fails if it uses a connection that has gone."""
        if is_departure(raised):
            await self._send_error(stream_lost(), id, type)
        else:
            await super()._fail(raised, type, id, routes)

    def drop_stream(self, id: Id) -> None:
        """Leave that to the final answer: an error handler may take a while to find it."""

    def leave(self) -> None:
        """Go on for a while without the client, which has gone."""
        cast("Session", self._carrier).drop_stream(self._id)
        self._stay()
        self._make_room()

    def _stay(self) -> None:
        """Wait some seconds for a client."""
        self._carrier, self._alone = None, 0
        if self._timer is not None:
            self._timer.cancel()
        self._timer = clock.call_at(clock.time() + self._seconds, self.end)
        alone = self._hub_state.registry.alone
        alone[self._token] = self
        alone.move_to_end(self._token)

    def end(self) -> None:
        """Stop, and forget what was kept."""
        if self._timer is not None:
            self._timer.cancel()
        for table in (self._hub_state.registry.resumable, self._hub_state.registry.alone):
            table.pop(self._token, None)
        self._items.clear()
        self._resize(-self._size)
        self._set_puller(None)
        self._stream.stop()

    def is_for(self, wanted: Wanted) -> bool:
        """Tell whether its user, who has been found out, can mean it by *wanted*."""
        is_named = not self._carriers.isdisjoint(wanted.ids)
        return self._has_id(wanted.id) and (is_named if wanted.ids else self._carrier is None)

    def _has_id(self, id: Id) -> bool:
        return (type(id), id) == (type(self._id), self._id)

    def go_on(self, session: Session, id: Id, number: int) -> bool:
        """Go on with the client of *session*, behind the item *number*; return whether it can."""
        if not self._take_over(id, number):
            return False
        self._set_puller(None)
        self._carriers.add(session.conn.id)
        waiting = [Waiting(event) for n, event in self._items if n > number]
        if self._final is None:
            cast(Timer, self._timer).cancel()
            del self._hub_state.registry.alone[self._token]
            self._carrier = session
            self.outgoing: Outgoing = session.outgoing
            session.take_stream(self._id, self._stream)
        else:
            waiting.append(Waiting(text_event(self._final)))
        session.outgoing.put(*waiting)
        return True

    def _take_over(self, id: Id, number: int) -> bool:
        """Tell who has had the stream that it is lost; return whether another client may go on."""
        first = self._items[0][0] if self._items else self._count + 1
        if not self._has_id(id) or not first - 1 <= number <= self._count:
            return False
        if self._carrier is not None:
            self._carrier.drop_stream(self._id)
            self._carrier.lose_stream(self._id)
        self._stay()
        self._came.set()
        return True

    def _set_puller(self, by: str | None) -> None:
        """Let *by* go on in another process; a `pull` for who has had it returns None."""
        self._puller = by
        self._news.set()

    async def pull(self, by: str, id: Id, number: int, seconds: float) -> dict[str, Any] | None:
        """Return items behind *number*, and the final answer, as texts, or None if it is lost.

        The client is in another process, and *by* the id of its connection there. Waits for some,
        at most for so many *seconds*.
        """
        is_over = by != self._puller and by in self._carriers  # Another client has taken it.
        if is_over or not self._take_over(id, number):
            return None
        self._set_puller(by)
        self._carriers.add(by)
        self._trim(number)
        if number == self._count and self._final is None:
            self._news.clear()
            with contextlib.suppress(TimeoutError), WaitLimit(clock.time() + seconds):
                await self._news.wait()
            if self._puller != by:
                return None
        texts, size = list[str](), 0
        for n, event in self._items:
            size += len(event["text"]) if n > number else 0
            if n > number and (not texts or size <= _BATCH_BYTES):
                texts.append(event["text"])
        is_last = self._final is not None and number + len(texts) == self._count
        final = self._final.decode() if is_last and self._final else None
        return {"items": texts, "final": final, "token": self._token}


def stream_lost() -> MessageError:
    """Return the final answer of a stream that cannot go on."""
    return MessageError("stream_lost", "what is missing of the stream is not kept any more")


@attrs.frozen
class Wanted:
    """A stream that a client wants to go on with."""

    id: Id
    token: str | None  # None if it has got no item
    number: int  # of the latest item that it has got
    ids: Sequence[str]  # of its former connections


def wanted_streams(value: Any) -> list[Wanted]:
    """Return the streams that the payload of a ``resume`` message names."""
    said: dict[str, Any] = value if type(value) is dict else {}
    streams, known = said.get("streams"), read_ids(said.get("ids"))
    found = dict[Id, Wanted]()  # of several with one id the last, so that it has one final answer
    for each in (streams if type(streams) is list else [])[:_MOST_RESUMED]:
        id: Any = each.get("id") if type(each) is dict else None
        if type(id) in (str, int):
            position = read_position(each.get("at"))
            token = None if each.get("at", "") is None else position.epoch
            found[id] = Wanted(id, token, max(0, position.number), known)
    return [*found.values()]


def _own(registry: Registry, user: str | None) -> list[Resumable]:
    """Return the streams of *user*. Guests cannot be told apart."""
    every = registry.resumable.values() if user is not None else ()
    return [each for each in every if each.conn.user == user]


def _find(registry: Registry, wanted: Wanted, own: Iterable[Resumable]) -> Resumable | None:
    """Return the stream that is *wanted*, without a token one of the client's *own*."""
    if wanted.token is not None:
        return registry.resumable.get(wanted.token)
    found = [each for each in own if each.is_for(wanted)]
    return found[0] if len(found) == 1 else None  # Of two, either may be another tab's.


def go_on_streams(session: Session, value: Any) -> None:
    """Go on with the streams that a ``resume`` message names; tell the client of lost ones."""
    if session.outgoing.closed:
        return
    registry, every = session.conn.hub.state.registry, wanted_streams(value)
    own = _own(registry, session.conn.user) if any(one.token is None for one in every) else []
    for wanted in every:
        if wanted.id in session.streams:
            continue  # It has begun another one under that id.
        found = _find(registry, wanted, own)
        if len(session.streams) >= _MOST_RESUMED:
            session.lose_stream(wanted.id)
        elif found is None and (others := _others(session, wanted)):
            session.take_stream(wanted.id, stream := Stream())
            session.add_task(_relay_stream(session, wanted, stream, others), is_detached=True)
        elif found is None or not found.go_on(session, wanted.id, wanted.number):
            session.lose_stream(wanted.id)


def _others(session: Session, wanted: Wanted) -> list[str]:
    """Return connections, one of each other process that may have the stream."""
    state, size = session.conn.hub.state, 2 * _PROCESS_BYTES
    if not state.relay.has_others:
        return []
    known = wanted.ids
    if wanted.token is not None:  # Any id stands for its process.
        known = [wanted.token[_TOKEN_BYTES * 2 :] + "0" * size]
    latest = {id[:size]: id for id in known if _CONNECTION_ID.fullmatch(id)}
    return [id for process, id in latest.items() if process != state.process]


async def _relay_stream(
    session: Session, wanted: Wanted, stream: Stream, others: list[str]
) -> None:
    """Send the client of *session* a stream that one of the other processes has."""
    final: str | None = None
    try:
        try:
            final = await stream.run(lambda: _pull(session, wanted, others))
        finally:
            session.drop_stream(wanted.id)
    except falcon.WebSocketDisconnected:
        return
    except asyncio.CancelledError:
        if session.outgoing.closed or not stream.is_stopped:
            raise
        forget_cancellations()  # The client has stopped it.
        for other in others:
            with contextlib.suppress(PachinkoError, NoAnswer):
                await _call(session, wanted, other, 0)
        final = _encode(Sent("complete", wanted.id)).decode()
    if final is None:
        session.lose_stream(wanted.id)
    else:
        session.outgoing.put(Waiting({"type": "websocket.send", "text": final}))


async def _pull(session: Session, wanted: Wanted, others: list[str]) -> str | None:
    """Send items as the other process has them; return the final answer, or None if it is lost."""
    failures = 0
    while others:
        try:
            found = await _call(session, wanted, others[0], _PULL)
        except (PachinkoError, NoAnswer):  # The broker is away there, or the process has gone.
            failures += 1
            if failures == _PULL_TRIES:
                return None
            await clock.sleep(_PULL_AGAIN)
            continue
        failures = 0
        if found is None:
            del others[0]
            continue
        for text in found["items"]:
            await session.outgoing.send({"type": "websocket.send", "text": text})
        number = wanted.number + len(found["items"])
        wanted = attrs.evolve(wanted, number=number, token=found["token"])
        if found["final"] is not None:
            return cast(str, found["final"])
    return None


async def _call(session: Session, wanted: Wanted, other: str, seconds: float) -> Any:
    state, conn = session.conn.hub.state, session.conn
    said = msgspec.Raw(encode((wanted, conn.user, conn.id)))
    return await state.relay.call(other, "stream", "", said, seconds)


def read_wanted(said: msgspec.Raw) -> tuple[Wanted, str | None, str]:
    """Return what `_call` has said, for which user and by which connection.

    Raises `msgspec.MsgspecError`.
    """
    return msgspec.json.decode(said, type=tuple[Wanted, str | None, str])


async def _stream_call(
    registry: Registry, _: str, said: msgspec.Raw, seconds: float
) -> dict[str, Any] | None:
    """Answer `_call` in the process that has the stream. It ends if *seconds* are 0."""
    wanted, user, by = read_wanted(said)
    own = _own(registry, user) if wanted.token is None else []
    if (found := _find(registry, wanted, own)) is None:
        return None
    if seconds == 0:
        found.end()
        return None
    return await found.pull(by, wanted.id, wanted.number, seconds)


PROCESS_CALLS["stream"] = _stream_call


# ── session ───────────────────────────────────────────────────────────────────────────────────
#
# The session of a connection reads its messages, and runs what is to be done for each.

_OWN = ("complete", "resume", "$ping")  # types of messages that the library handles itself


class Session(Answering):
    """What one connection does: the handler in progress, its streams, tasks and limits."""

    __slots__ = (
        "_contexts", "_ended", "_life", "ends", "incoming", "is_handling", "is_serving",
    )  # fmt: skip

    def __init__(
        self, hub: Hub, routes: Routes, limits: Limits,
        req: falcon.asgi.Request, ws: falcon.asgi.WebSocket, params: dict[str, Any],
    ) -> None:  # fmt: skip
        state = hub.state
        id = state.process + os.urandom(_OWN_BYTES).hex()
        receive, send = server_calls(ws)
        outgoing = Outgoing(id, ws, send, limits, state.counts, self)
        super().__init__(Connection(hub, req, ws, params, id, outgoing), routes)
        self.incoming: Incoming = Incoming(receive, limits.max_size, self)
        self.is_handling: bool = True  # code of the application runs, at first `authenticate`
        self.is_serving: bool = False  # messages are handled
        self.ends: tuple[End, ...] = ()  # ends of connect handlers, in order
        self._contexts: Contexts | None = None  # None if messages have no context of their own
        self._life: TimeLimit | None = None  # bounds the code in progress
        self._ended: float = 0.0  # when messages ceased to flow, on the loop's clock

    def on_close(self) -> None:
        """Read nothing more. End an authentication, or connect handlers that may `linger`."""
        self.incoming.stop()
        is_connecting = self.outgoing.phase is Phase.CONNECTING
        if is_connecting and self._life and not self._life.is_around(asyncio.current_task()):
            registry, id = self._hub_state.registry, self.conn.id
            may_go_on = id in registry.connections and id in registry.arriving
            linger = self._limits.linger if may_go_on else 0
            self._life.end_at(clock.time() + linger)

    def on_end(self) -> None:
        """Stop the streams; wake the reader, or give the handler in progress `linger` seconds."""
        task, self._ended = asyncio.current_task(), clock.time()
        if self.streams:  # PERF: most connections have none.
            for stream in tuple(self.streams.values()):
                stream.leave()
        self._hub_state.end_work(self.conn.id)
        # Without a close code the server may hold frames from before the end.
        may_go_on = self.is_handling or self.outgoing.close_code is None
        # A reader that has seen the end by itself needs no timer.
        if self._life is not None and (may_go_on or not self._life.is_around(task)):
            self._life.end_at(self._ended + (self._limits.linger if may_go_on else 0))

    def on_disconnect(self, code: int) -> None:
        """Give up writing, because the client has gone, and tell Falcon's socket."""
        is_answered = not self.conn.ws.unaccepted
        mark_closed(self.conn.ws, code)
        if is_answered:
            self.outgoing.lost(code)
        else:
            self.outgoing.leave(code)  # Nobody reads as early as this but for code that waits.
            cast(TimeLimit, self._life).end_at(clock.time() + self._limits.linger)

    def overtakes(self, event: Event) -> Awaitable[None] | None:
        """Return what handles the frame at once, while a handler waits, or None if it is held.

        A concurrent handler, a stream, its end, ``resume``, a ``$ping`` and an answer wait for
        nobody, but no handler of a message begins before the accepted ones have ended. A frame
        counts for the rate when it has come: its handler may be called much later, with many.
        Before the client is in, only ``resume`` overtakes.
        """
        text, frame = event.get("text"), None
        if text is not None and size_of(text) <= self._limits.max_size:
            frame = decode_or_error(text)
        if self.outgoing.phase is Phase.CONNECTING:  # Answers wait; `_HELD` bounds them.
            is_resume = isinstance(frame, Frame) and frame.type == "resume"
            return self._refuse(event) if is_resume and self.incoming.received < _HELD else None
        if isinstance(frame, Frame):
            if frame.type in _OWN or is_answer(frame.type):
                return self._refuse(event)
            handler = self.routes.handlers.get(frame.type)
            if handler is not None and handler.is_concurrent and self.is_serving:
                with contextlib.suppress(Exception, SystemExit):  # It is refused in its turn.
                    return self._handle(event, handler, self.routes.decode(event["text"]))
        type = frame.type if isinstance(frame, Frame) else None
        return self._exceed_rate(event, None if frame is None else frame.id, type)

    def limit(self, when: float | None = None) -> TimeLimit:
        """Return the time limit for the code that runs next; a close may bring it forward."""
        self._life = TimeLimit(when)
        return self._life

    def greet(self) -> None:
        """Read what the client has in ``?resume=`` of the handshake."""
        if (text := resume_in(self.conn.req.query_string)) is not None:
            value = read_json(text)
            if (history := self._hub_state.history) is not None:
                history.greet(self.conn, value, text == "message")
            self._hub_state.returning[self.conn.id] = value

    async def resume(self, frame: Frame) -> None:
        """Note what the client says that it has. One that does not read is read no further."""
        self._note(frame.payload)
        if frame.id is not None:
            await self._send(_encode(Sent("resume.reply", frame.id)))
        else:
            await self.outgoing.drained()

    def note_within(self, payload: Any) -> None:
        """Note what the payload of ``authenticate`` has beside the token."""
        if type(payload) is dict and "resume" in payload:
            self._note(payload["resume"])

    def _note(self, value: Any) -> None:
        if (history := self._hub_state.history) is not None:
            history.note(self.conn, value)
        if self.outgoing.is_answered:
            go_on_streams(self, value)
        else:
            self._hub_state.returning[self.conn.id] = value

    def welcome(self) -> None:
        """Begin to resume, now that the client is in."""
        if (history := self._hub_state.relay.history) is not None:
            history.welcome(self.conn, bool(self.routes.snapshots))
        if self.conn.id in self._hub_state.returning:
            go_on_streams(self, self._hub_state.returning.pop(self.conn.id))

    def take_stream(self, id: Id, stream: Stream) -> None:
        """Note that the client has a stream with this id."""
        self.open_tables()
        self.streams[id] = stream

    def lose_stream(self, id: Id) -> None:
        """Tell the client that a stream does not go on for it."""
        frame = error_frame(stream_lost(), id, self._hub_state.codec)
        self.outgoing.put(Waiting(text_event(frame)))

    def fall_behind(self, outbox: Outbox) -> bool:
        """Do what `History.fall_behind` does, if anything is kept."""
        history = self._hub_state.history
        return history is not None and history.fall_behind(self.conn, outbox)

    async def first_token(self) -> Frame:
        """Return what `Incoming.first_token` does; no code of the application runs meanwhile."""
        self.is_handling = False
        try:
            return await self.incoming.first_token()
        finally:
            self.is_handling = True

    create_task = create_task_of
    snapshot_of = snapshot_of

    def add_end(self, end: End) -> None:
        """Note what has to run when the connection is over."""
        self.ends = (*self.ends, end)

    @property
    def is_late(self) -> bool:
        """Whether the latest `limit` has expired."""
        return self._life is not None and self._life.expired

    async def serve(self, begin: Callable[[Session], Awaitable[None]] | None = None) -> None:
        """Await *begin*, handle messages until the connection is over, and `finish`."""
        try:
            # A client that has gone during the handshake may have left messages.
            with self.limit(self._ended + self._limits.linger if self._ended else None):
                if begin is not None:
                    await begin(self)
                await self._handle_messages()
        except TimeoutError:  # The connection is over, and what was in progress has had its time.
            forget_cancellations()
        except asyncio.CancelledError:
            ends, self.ends = self.ends, ()
            await leave_scopes(self, ends)
        finally:
            await self.finish()

    async def _handle_messages(self) -> None:
        # PERF: reading is inlined. A coroutine or a call of its own would add 3 % to a message.
        incoming, receive, routes = self.incoming, self.incoming.receive, self.routes
        is_cancelled, rate, self.is_handling = current_task().cancelling, self._rate, False
        self.is_serving = True
        # No text of at most this length is too deep or too large: a character has up to 4 bytes.
        max_size, is_timed = self._limits.max_size, self._limits.handler_timeout is not None
        short = min(2 * _MAX_DEPTH, max_size // 4)
        while True:
            event = text = message = None  # A frame may be large, and the next one may be late.
            event = await (receive() if incoming.is_direct else incoming.next())
            if not incoming.accept(event):
                return
            self.is_handling = True
            if not incoming.is_due:
                incoming.watch()
            text = event.get("text")
            if text is None or (
                len(text) > short and (size_of(text) > max_size or is_too_deep(text))
            ):
                await self._handle_odd(event)
            else:
                try:
                    message = routes.decode(text)
                except (Exception, SystemExit) as exc:  # A validator may raise anything.
                    await self._refuse(event, exc)
                else:
                    handler = message.handler
                    if handler is None:
                        await self._refuse(event)
                    elif rate is not None or handler.is_concurrent:
                        await self._handle(event, handler, message)
                    elif is_timed or routes.is_scoped:
                        await self._perform_apart(handler, message)
                    else:
                        await self._perform(handler, message)
            self.is_handling = False
            if is_cancelled():
                forget_cancellations()

    def _handle(self, event: Event, handler: Handler, message: Received) -> Awaitable[None]:
        """Return what calls the handler, or starts it in a task, or refuses because of the rate."""
        if (refusal := self._exceed_rate(event, message.id, handler.type)) is not None:
            return refusal
        if handler.is_concurrent:
            return self._start_task(handler, message)
        if self.routes.is_scoped or self._limits.handler_timeout is not None:
            return self._perform_apart(handler, message)
        return self._perform(handler, message)

    async def _handle_odd(self, event: Event) -> None:
        """Handle a frame that is too large, too deep, or binary."""
        text, binary = event.get("text"), self.routes.binary
        if size_of_event(event) > self._limits.max_size:
            self.outgoing.close(Close(1009, f"more than {self._limits.max_size} bytes"))
        elif text is not None:
            await self._refuse(event)
        elif binary is None:
            self.outgoing.close(Close(1003, "binary frames are not handled"))
        elif (refusal := self._exceed_rate(event, None)) is not None:
            await refusal
        else:
            await self._in_scope(self._perform_raw(binary, event["bytes"]))

    async def _perform(self, handler: Handler, message: Received, is_plain: bool = True) -> None:
        """Run a handler that answers once, and answer; *is_plain* if nothing is around it."""
        try:
            value = message.payload
            if (
                is_plain and message.is_built
                and (value is not UNSET or not handler.takes_payload)
            ):  # fmt: skip
                result = await handler.call(self.conn, value)
            else:
                work = self._call(handler, message)
                if (seconds := self._limits.handler_timeout) is not None:
                    work = in_time(seconds, handler.function, work)
                result = await work
            if result is not None or message.id is not None:
                rest = self.outgoing.start(handler.reply(message.id, self._hub_state.codec, result))
                if rest is not None:
                    await rest
        except BaseException as exc:  # A bug is answered, not passed on.
            await self._fail(exc, handler.type, message.id)

    def _perform_apart(self, handler: Handler, message: Received) -> Awaitable[None]:
        """Perform with a time limit, with middleware, or with provided values."""
        work = self._perform(handler, message, False)
        # A renewal may set variables for the messages behind it.
        return work if handler.type == "authenticate" else self._in_scope(work)

    def _in_scope(self, work: Coroutine[Any, Any, None]) -> Awaitable[None]:
        """Return *work*, to be run in a context of its own if messages have one."""
        if not self.routes.is_scoped:
            return work
        self._contexts = contexts = self._contexts or Contexts()
        return contexts.run(work)

    async def _perform_raw(self, function: Callable[..., Any], data: str | bytes) -> None:
        """Call the fallback or the binary handler, and send what it returns."""
        cls = str if isinstance(data, str) else bytes
        routes = around(self.routes, cls)
        try:
            work: Any = functools.partial(function, self.conn, data)
            if middleware := middleware_of(routes):
                envelope = Envelope("", data)
                work = functools.partial(call_through, middleware, self.conn, envelope, work)
            result = await in_time(self._limits.handler_timeout, function, work())
            await send_raw(result, function, cls, self.conn)
        except BaseException as exc:  # A bug is answered, not passed on.
            await self._fail(exc, None, None, routes)

    async def _refuse(self, event: Event, exc: Any = None) -> None:
        """Find out why the text is no message for a handler, and answer that."""
        text = event["text"]
        frame = decode_or_error(text)  # PERF: decoding anew costs only those who send such text.
        type, id = (frame.type if isinstance(frame, Frame) else ""), frame.id
        if type == "complete":
            if (stream := self.streams.get(cast(Id, id))) is not None:
                stream.stop()
                return  # The rate limit never refuses this, because it lessens the load.
            id = None  # The stream that it meant has had its final answer.
        if is_answer(type):
            if not is_awaited(cast(Frame, frame), self.conn):
                self._hub_state.counts["late"] += 1
            return
        if (refusal := self._exceed_rate(event, id, type)) is not None:
            await refusal
        elif type not in _OWN:
            await self._explain(text, frame, exc)
        elif type == "$ping":
            await self._send(_encode(Sent("$pong", id)))
        elif type == "resume":
            await self.resume(cast(Frame, frame))

    async def _explain(self, text: str, frame: Frame | BadFrame, exc: Any) -> None:
        """Give the text to the fallback, or tell the client what is wrong with it."""
        handler = self.routes.handlers.get(frame.type) if isinstance(frame, Frame) else None
        if isinstance(frame, Frame) and handler is not None:
            error = handler.refusal(frame.payload, self._hub_state.codec, exc)
            await self._fail(error, frame.type, frame.id)
        elif self.routes.fallback is not None:
            await self._in_scope(self._perform_raw(self.routes.fallback, text))
        elif isinstance(frame, BadFrame):
            await self._send_error(frame, frame.id)
        else:
            hint = "; answers end in '.reply'" if str(frame.id).startswith("$") else ""
            text = f"no handler for {frame.type[:TYPE_SHOWN]!r}{hint}"
            await self._send_error(MessageError("unknown_type", text), frame.id, frame.type)

    async def _start_task(self, handler: Handler, message: Received) -> None:
        """Start a concurrent handler or a stream in a task of its own."""
        error, id = None, message.id
        resumable = sum(isinstance(each, ResumableStream) for each in self.streams.values())
        if handler.streams and id is None:
            error = MessageError("id_required", f"{handler.type} is a stream, which needs an id")
        elif handler.streams and id in self.streams:
            error, id = MessageError("id_in_use", f"a stream with the id {id!r} goes on"), None
        elif len(self.tasks) + resumable >= self._limits.max_concurrent:
            error = MessageError("too_busy", f"at most {self._limits.max_concurrent} at a time")
        if error is not None:
            await self._send_error(error, id, handler.type)
            return
        if handler.resumable is not None:
            Resumable(self, cast(Id, id), handler.resumable).start(handler, message)
            return
        if handler.streams:
            stream = Stream(is_stopped=self.outgoing.closed)
            self.take_stream(cast(Id, id), stream)
            work = self.run_stream(handler, message, stream)
        else:
            work = self._perform(handler, message, is_plain=False)
        self.add_task(work)

    async def finish(self) -> None:
        """End the tasks, run the disconnect handlers, forget the connection."""
        if self.outgoing.close_code is None:  # The server has cancelled the task, for example.
            self.outgoing.lost(1006)
        self._hub_state.registry.retire(self.conn)
        steps = [*self.routes.disconnect]
        if self.ends:  # The `on_disconnect` of a resource is also the end of its `on_connect`.
            steps += [end for end in reversed(self.ends) if end not in steps]
        own = self._hub_state.end_work(self.conn.id)
        if self.tasks or own:
            end, linger = self._ended + self._limits.linger, self._limits.linger
            tasks = {*own, *self.tasks}
            steps.insert(0, functools.partial(end_tasks, tasks, own, self.streams, end, linger))
        is_ending = await take_leave(steps, self.conn) if steps else current_task().cancelling()
        extra = {"connection_id": self.conn.id}
        logger.debug("disconnected: %s", self.outgoing.close_code, extra=extra)
        if self.outgoing.goodbye is not None:
            self.forget()
            await self.outgoing.settle()
        if is_ending:
            raise asyncio.CancelledError

    def forget(self) -> None:
        """Take the connection out of the hub."""
        self.conn.stop_expiry()
        self._hub_state.registry.remove(self.conn)
        if (history := self._hub_state.relay.history) is not None:
            history.forget(self.conn)
        if self._hub_state.returning:
            self._hub_state.returning.pop(self.conn.id, None)

    def release(self) -> None:
        """Let go of everything, however the connection has ended."""
        self.outgoing.release()
        self.incoming.release()
        self.forget()


# ── admission ─────────────────────────────────────────────────────────────────────────────────
#
# A client is in when `authenticate` knows it, each connect handler has returned, and the handshake
# has been accepted. Until then it may be refused, may leave, or may be kept waiting for too long.

_RETRY_AFTER = 5  # seconds after which a client that is refused with 503 may try again


async def user_of(
    function: Callable[..., Awaitable[str | None]], conn: Connection, token: str | None
) -> str | None:
    """Return whom *token* belongs to, as *function* says; a bug in it is ``internal_error``."""
    try:
        user = await function(conn, token)
        if user is not None and not (isinstance(user, str) and user):
            got = "an empty one" if user == "" else type(user).__name__
            raise PachinkoError(f"the user is a str, or None to refuse; got {got}")
        return user
    except BaseException as exc:  # A bug is answered, whatever it is.
        exc = single(exc, is_status)
        pass_on(exc, place_of(function), conn.id, "authenticate")
        is_outcome = outcome_of(exc) is not None or is_status(exc)
        if not is_outcome:
            log_failure(place_of(function), exc, conn.id, "authenticate")
        outcome = exc if is_outcome else internal_error()
    outcome.__cause__ = outcome.__context__ = None
    try:
        raise outcome  # Above, the group that it is from would become its context, in a cycle.
    finally:
        del outcome


async def admit(session: Session, subprotocols: Sequence[str]) -> bool:
    """Authenticate, run connect handlers, answer the handshake; return whether the client is in."""
    conn, outgoing, routes = session.conn, session.outgoing, session.routes
    offered: Iterable[str] = conn.ws.subprotocols
    is_in, token, refused = False, None, None
    if routes.authenticate is not None:
        token, offered = credentials(conn.req, offered)
        subprotocols = [*subprotocols, "bearer"]  # Browsers give up if none is chosen.
    if subprotocols and conn.ws.unaccepted:
        conn.choose(next((name for name in subprotocols if name in offered), None))
    try:
        is_in = await _run_handlers(session, token)
    except BaseException as exc:  # A handler may raise anything.
        refused = as_status(single(exc, is_status))
    try:
        if refused is not None:  # Above, the group that it is from would become its context.
            await _refuse(session, refused)
    finally:
        del refused
    try:
        if conn.user is not None:
            await conn.hub.state.reachable(conn)
        await _accept(session)
    except BaseException as exc:  # A client that was let in gets its disconnect handlers.
        outgoing.lost()
        if is_in:
            await session.finish()
        if not isinstance(exc, falcon.WebSocketDisconnected):
            raise
        return False
    outgoing.open()
    conn.hub.state.registry.arriving.pop(conn.id, None)
    if is_in:
        logger.debug("connected: %r", conn.req.path, extra={"connection_id": conn.id})
    else:
        await outgoing.settle()
    return is_in


async def _run_handlers(session: Session, token: str | None) -> bool:
    """Run `authenticate` and the connect handlers; return False if the connection is over.

    Raises what they raise; `Close` or `falcon.HTTPServiceUnavailable` if they take more than
    `connect_timeout`; `falcon.WebSocketDisconnected` if they were stopped after its end.
    """
    conn, routes, seconds = session.conn, session.routes, session.outgoing.limits.connect_timeout
    deadline = clock.time() + seconds
    running: Any = None
    try:
        if routes.authenticate is not None:
            running = routes.authenticate
            deadline = await _authenticate(session, running, token, deadline)
            if conn.closed:
                return False
        registry = conn.hub.state.registry
        registry.add(conn)
        for running in routes.connect:
            if conn.id not in registry.arriving:  # A method of the hub has closed it.
                raise falcon.WebSocketDisconnected(conn.close_code)
            await _attend(session, running(conn, session.add_end), deadline)
            forget_cancellations()
        return True
    except TimeoutError:
        if not session.is_late:  # The error is the handler's own.
            raise
        forget_cancellations()
    if conn.closed:
        raise falcon.WebSocketDisconnected(conn.close_code)
    extra = {"connection_id": conn.id}
    logger.warning("%s was stopped after %g s", place_of(running), seconds, extra=extra)
    if conn.ws.unaccepted:
        raise unavailable("the server takes too long")
    raise Close(1013, "the server takes too long")


@types.coroutine
def _attend(session: Session, work: Awaitable[T], deadline: float) -> Generator[Any, Any, T]:
    """Await *work*, code of the application; return what it returns.

    It is stopped at *deadline*, or `linger` seconds after the client has left. Then `TimeoutError`
    is raised. PERF: only code that waits needs a timer, and a reader that notices a departure. The
    task that runs the first step here goes on, as in `rest_of`.
    """
    steps = work.__await__()
    try:
        waits_for = next(steps)
    except StopIteration as end:
        return cast(T, end.value)
    session.incoming.watch()
    with session.limit(deadline) as limit:
        if session.conn.closed:  # An earlier handler has been overtaken by the end.
            linger = session.outgoing.limits.linger
            limit.end_at(clock.time() + linger)
        result: T = yield from cast(Any, rest_of(steps, waits_for))
    if limit.expired:  # The code has swallowed its cancellation.
        raise TimeoutError
    return result


async def _refuse(session: Session, exc: BaseException) -> None:
    """Undo what connect handlers have done for a client that *exc* keeps out.

    Raises what Falcon has to see. Returns if the connection is over, or is to be closed.
    """
    conn, is_cancelled = session.conn, False
    if isinstance(exc, Close):
        session.outgoing.close(exc, drops=True)
    if session.ends and not isinstance(exc, (KeyboardInterrupt, GeneratorExit)):
        is_cancelled = await take_leave(reversed(session.ends), conn)
    try:
        pass_on(exc, "a connect handler", conn.id)
        if is_cancelled:
            raise asyncio.CancelledError
        if not isinstance(exc, Exception):  # Falcon's error handlers take `Exception` only.
            raise RuntimeError(f"a connect handler has raised {exc!r}") from exc
        is_falcons = conn.ws.unaccepted or isinstance(exc, (falcon.HTTPError, falcon.HTTPStatus))
        is_over = conn.closed and isinstance(exc, (Close, falcon.WebSocketDisconnected))
        if not (is_falcons or is_over):  # An error handler of the app may do nothing but log it.
            session.outgoing.close(close_for(exc, "a connect handler", conn.id), drops=True)
        elif not is_over:
            raise exc
    finally:
        del exc  # It refers to this frame; a cycle would keep the connection until a collection.
    session.forget()


async def _accept(session: Session) -> None:
    """Accept the handshake, unless that has been done before.

    Raises `falcon.WebSocketDisconnected` if the client has left.
    """
    ws, outgoing, headers = session.conn.ws, session.outgoing, session.conn.headers
    if ws.unaccepted:
        if headers and not ws.supports_accept_headers:
            _warn_of_headers("refuses")
            headers = ()
        elif headers:
            server = type(getattr(outgoing.asgi_send, "__self__", None)).__module__
            if server.startswith("granian"):
                _warn_of_headers("drops")
        await ws.accept(session.conn.subprotocol, headers)
    if session.incoming.has_left and outgoing.phase is Phase.CONNECTING:
        mark_closed(ws, outgoing.close_code)  # It may have left while the accept took its time.
        raise falcon.WebSocketDisconnected(outgoing.close_code)


@functools.cache  # One line is enough for a process.
def _warn_of_headers(does: str) -> None:
    logger.warning("this server %s what conn.add_header adds to the answer to a handshake", does)


def unavailable(why: str) -> falcon.HTTPError:
    """Return the refusal of a handshake that may succeed a little later."""
    return falcon.HTTPServiceUnavailable(description=why, retry_after=_RETRY_AFTER)


class Bug(falcon.HTTPInternalServerError):
    """`authenticate` has failed: HTTP 403 as after any bug, or a close with 3500."""


async def _authenticate(
    session: Session, function: Callable[..., Any], token: str | None, deadline: float
) -> float:
    """Set the user, or raise `Close`; the connection may also be closed in the meantime.

    Returns the *deadline*, put off by the time that the client took to send its first message.
    """
    conn, is_asked = session.conn, token is not None
    seconds = session.outgoing.limits.auth_timeout
    until = clock.time() + seconds
    try:
        with TimeLimit(until):
            user = await _attend(session, user_of(function, conn, token), deadline)
        if user is None and not (is_asked or session.routes.takes_guests or conn.closed):
            await _accept(session)  # No time limit cuts it short.
            is_asked, begun = True, clock.time()
            with session.limit(), TimeLimit(until):
                frame = await session.first_token()
            deadline += clock.time() - begun
            token = token_of(frame.payload)
            session.note_within(frame.payload)
            if token is not None:
                with TimeLimit(until):
                    user = await _attend(session, user_of(function, conn, token), deadline)
            if user is not None and frame.id is not None:
                reply = Sent("authenticate.reply", frame.id)
                await session.outgoing.send(text_event(_encode(reply)))
    except TimeoutError as exc:
        if session.is_late or isinstance(exc, NoAnswer):
            raise
        raise Close(UNAUTHENTICATED, f"not authenticated within {seconds:g} s") from None
    except MessageError as exc:
        if exc.code != "internal_error":  # That one has been logged.
            text = "%s raised a MessageError, when no message can be answered yet; raise Close"
            logger.error(text, place_of(function), extra={"connection_id": conn.id})
        raise Bug from None
    forget_cancellations()
    if user is None and (is_asked or not session.routes.takes_guests):
        raise Close(UNAUTHENTICATED, "authentication failed")
    if user is not None and not conn.closed:
        conn.user = user
    return deadline


async def welcome(session: Session) -> None:
    """Run the accepted handlers, up to one that fails. Begins what `Session.serve` does."""
    conn, incoming = session.conn, session.incoming
    if session.outgoing.phase is not Phase.OPEN and not incoming.holds_frames:
        return  # It is over, and no message of it will be handled.
    incoming.watch()
    for handler in session.routes.accepted:
        try:
            await handler(conn, session.add_end)
            forget_cancellations()
        except BaseException as exc:  # A handler may raise anything.
            exc = single(exc, is_status)
            pass_on(exc, place_of(handler), conn.id)
            if not (isinstance(exc, falcon.WebSocketDisconnected) and conn.closed):
                session.outgoing.close(close_for(exc, place_of(handler), conn.id))
            return


# ── running ───────────────────────────────────────────────────────────────────────────────────
#
# An endpoint runs from the start of its app, or of a `running` block, to the end of the last one.
# Without both it starts with its first connection. It starts the hub, and then its workers.

_NO_FUNCTION: Any = None  # `ws.connect()` decorates it, and is refused for its parentheses
# A key is the id of an app, and a path. A Pachinko holds its app, so that no id is used again.
_attached: weakref.WeakValueDictionary[tuple[int, str], Lifecycle] = weakref.WeakValueDictionary()
# The lines that have included others. Nothing more can be registered on these.
_included_at: weakref.WeakKeyDictionary[Lifecycle, str] = weakref.WeakKeyDictionary()
_SERVER = re.compile(r"(?:^|[\\/])(gunicorn|granian)(?:[\\/]__main__\.py|\.exe)?$")
_WORKERS = re.compile(r"(?:^| )(?:--workers[ =]|-w[ =]?)(\d+)")
_BACKOFFS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)  # seconds before a failed worker's next start
# Starts the hub of an endpoint. In the code of a simulated process it is the simulation's.
hub_starter: contextvars.ContextVar[Callable[[Lifecycle], None]] = contextvars.ContextVar(
    "hub_starter", default=lambda each: each.hub.state.start(each)
)


class Lifecycle:
    """Starts and stops the hub, the workers and the connections of an endpoint."""

    def __init__(
        self, app: Any, path: str | None, hub: Hub, limits: Limits, routes: Routes, parts: Parts
    ) -> None:
        self._app, self._path, self._hub, self._limits = app, path, hub, limits
        self._routes, self._parts = routes, parts
        self._loop: asyncio.AbstractEventLoop | None = None  # once started
        self._runs = 0  # lifespans and `running` blocks in progress
        self._is_working = False  # workers have been started
        self._workers: set[asyncio.Task[None]] = set()
        self._starts = 0  # lifespans that have begun
        self._steps: list[Step] = []  # for whoever includes this, unless it has an app

    def _register(self, function: T, add: Step) -> T:
        """Call *add* with this; return *function*. Whoever includes this calls it with a copy."""
        if self in _included_at:
            raise PachinkoError(
                f"{_included_at[self]} has included this Pachinko, by a copy of what was "
                f"registered till then; register the rest above that line, or import its file above"
            )
        add(self)
        if self._app is None:
            self._steps.append(add)
        return function

    @typing.overload
    def worker(self, function: F, *, once: bool = ...) -> F: ...
    @typing.overload
    def worker(self, *, once: bool) -> Callable[[F], F]: ...
    def worker(self, function: Any = _NO_FUNCTION, *, once: bool | None = None) -> Any:
        """Run ``async def f()`` in the background, once the app has started, until its shutdown.

        A worker that fails is logged and started again, after 1 second, then 2, up to 60.

        Each process of the app runs it. With ``@ws.worker(once=True)`` one process does at a time,
        and when that ends another takes over, within a second, or 8 if it was killed or hangs. The
        lease for it needs NATS with JetStream, or Redis; without a broker it is a worker as others.
        Raises `PachinkoError` for a second one of the same module and ``__qualname__``.
        """
        if once is not None and not isinstance(once, bool):
            raise PachinkoError(f"write @ws.worker(once=True), got once={once!r}")
        if function is _NO_FUNCTION and once is not None:
            return functools.partial(self.worker, once=once)
        decorator = "@ws.worker(once=True)" if once else "@ws.worker"
        check_function(function, f"{decorator}\nasync def clock(): ...", 0)

        def add(self: Any) -> None:
            self._add_workers([(self._lease_of(function) if once else None, function)])

        return self._register(function, add)

    def _add_workers(self, workers: list[Any], method: str = "worker") -> None:
        """Add *workers*, also to an app that has started. Raises `PachinkoError` elsewhere."""
        is_late = self._is_working and self._loop is not None and self._loop.is_running()
        if is_late and workers:
            refuse_elsewhere(self._loop, "a worker was added", f"hub.call_threadsafe(ws.{method}")
        self._routes.workers.extend(workers)
        for each in workers if is_late else ():
            self._start_worker(*each)

    def _lease_of(self, function: Callable[[], Awaitable[None]]) -> str:
        """Return the name of the lease for *function*, or raise `PachinkoError` for a second."""
        inner = layers(function)[-1]
        qualname = getattr(inner, "__qualname__", type(inner).__qualname__)
        name = f"{self._path or ''} {inner.__module__}.{qualname}"
        if (first := dict(self._routes.workers).get(name)) is not None:
            raise PachinkoError(
                f"{name.strip()} is the name of two workers with once=True, and of their lease: "
                f"{place_of(first)} and {place_of(function)}; write\n@ws.worker(once=True)\n"
                "async def another_name(): ..."
            )
        return name

    @contextlib.asynccontextmanager
    async def running(self, *, alone: bool = False) -> AsyncGenerator[None, None]:
        """Run hub and workers where the app's lifespan does not run: ``async with ws.running():``.

        An app that is mounted in another one gets no lifespan; the block goes into that of the
        other. It is for all endpoints of the app, or for this one *alone*. Inside another block, or
        beside the lifespan, nothing is started twice, and the last of them to end stops: clients
        are closed with 1012, and their handlers have `linger`. Raises `PachinkoError` if the hub
        runs in another thread or event loop.
        """
        async with contextlib.AsyncExitStack() as stack:
            for key, each in tuple(_attached.items()):
                if not alone and key[0] == id(self._app) and each is not self:
                    await stack.enter_async_context(each.running(alone=True))
            self._start()
            self._runs += 1
            stack.push_async_callback(self.process_shutdown, None, None)
            await self._connected()
            self._start_workers()
            yield

    async def process_startup(self, scope: Any, event: Any) -> None:
        """Start the hub with the app (Falcon's middleware for the ASGI lifespan)."""
        self._start()
        self._starts += 1
        begin = functools.partial(self._start_last, self._starts)
        app = self._app if event.get("type") == "lifespan.startup" else None
        if app is not None:  # Falcon starts middleware that is added now last, and stops it first.
            last = types.SimpleNamespace(process_startup=begin, process_shutdown=self._stop_first)
            app.add_middleware(cast(Any, last))
        try:
            await self._connected()
        except PachinkoError:
            self._runs += 1  # `process_shutdown` takes it off.
            await self.process_shutdown(scope, event)
            raise
        if app is None:  # Whoever has added it, or calls this by hand, has chosen the moment.
            await begin(scope, event)

    async def _connected(self) -> None:
        """Wait for the hub. Raises `PachinkoError` if a worker needs what its broker has not."""
        relay = self._hub.state.relay
        with contextlib.suppress(PachinkoError):  # The relay has logged it, and tries again.
            await relay.connected()
        if any(lease for lease, _ in self._routes.workers):
            await relay.check_leases()
        await relay.check_history()

    async def _start_last(self, starts: int, scope: Any, event: Any) -> None:
        """Start the workers, when all middleware of the app has started."""
        if starts == self._starts:  # Falcon still has the middleware of earlier starts, too.
            self._start()
            self._runs += 1
            self._start_workers()

    async def _stop_first(self, scope: Any, event: Any) -> None:
        """End workers and connections before other middleware closes what they use."""
        if self._runs == 1:
            await self._close_all()

    async def process_shutdown(self, scope: Any, event: Any) -> None:
        """Stop with the app: close what is still open with 1012, and wait for its handlers."""
        self._runs = max(0, self._runs - 1)
        try:
            if not self._runs:
                await self._close_all()
        finally:
            if not self._runs:  # No `running` block has begun meanwhile.
                self._loop = None
                await self._hub.state.stop(self)

    @property
    def hub(self) -> Hub:
        """The hub of the endpoint."""
        return self._hub

    @property
    def is_running(self) -> bool:
        """Whether it has started, and not stopped."""
        return self._loop is not None

    def has_worker(self, task: object) -> bool:
        """Tell whether *task* is one of the workers."""
        return task in self._workers

    def end_workers(self) -> Sequence[asyncio.Task[None]]:
        """Cancel the workers; return their tasks."""
        workers, self._is_working = tuple(self._workers), False
        self._workers.clear()
        for worker in workers:
            worker.cancel()
        return workers

    async def _close_all(self) -> None:
        workers = self.end_workers()
        serving = self._hub.state.serving.values()
        sessions = [each for each in serving if each.outgoing.limits is self._limits]
        for session in sessions:
            session.outgoing.close(Close(1012, "the server shuts down"))
        streams = set[asyncio.Task[None]]()
        for stream in tuple(self._hub.state.registry.resumable.values()):
            if stream.outgoing.limits is self._limits:
                streams |= stream.tasks
                stream.end()
        await self._hub.state.wait_for(sessions, *workers, *streams)

    def _start(self) -> None:
        """Start once in each loop: with the lifespan, or else with the first connection."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            check_kept(self._routes.snapshots, self._hub.state.rules)
            contextvars.Context().run(hub_starter.get(), self)
            if self._hub.state.broker is None:
                _warn_of_workers()
            self._loop, self._runs, self._is_working = loop, 0, False
            self._routes.start(self._hub.state.codec)
            self._workers.clear()

    def _start_workers(self) -> None:
        if not self._is_working:
            self._is_working = True
            for each in self._routes.workers:
                self._start_worker(*each)

    def _start_worker(self, lease: str | None, function: Callable[[], Awaitable[None]]) -> None:
        """Start *function*, to run while this process has the *lease* for it, if it needs one."""
        run = (lambda: self._hub.state.relay.lease(lease, function)) if lease else function
        task = create_task(_keep_working(run, place_of(function)), is_detached=True)
        self._workers.add(task)
        task.add_done_callback(self._workers.discard)


def count_workers() -> int:
    """Return how many worker processes the server has, as far as it tells the first of them; or 1.

    uvicorn and hypercorn hand their configuration to each process that they start, whatever the
    number comes from. For gunicorn and granian, the command line and a variable are read.
    """
    multiprocessing = sys.modules.get("multiprocessing.process")  # PERF: an import takes 26 ms.
    process: Any = multiprocessing.current_process() if multiprocessing is not None else None
    if (config := getattr(process, "_kwargs", {}).get("config")) is not None:
        workers = getattr(config, "workers", None)
        is_first = process.name.endswith("-1") and not getattr(config, "reload", False)
        return workers if is_first and isinstance(workers, int) else 1
    if (server := _SERVER.search("".join(sys.argv[:1]))) is None:
        return 1
    found = _WORKERS.search(" ".join(sys.argv[1:]))
    variable = "WEB_CONCURRENCY" if server[1] == "gunicorn" else "GRANIAN_WORKERS"
    text = found[1] if found else os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 1


@functools.cache  # once in a process
def _warn_of_workers() -> None:
    """Log a warning if the server has several worker processes, which have no broker."""
    if (workers := count_workers()) > 1:
        text = (
            "%d worker processes without a broker: each group is split, and a message reaches the "
            "clients of one process only. Set %s to nats://localhost:4222 or "
            "redis://localhost:6379, or to memory:// if that is meant"
        )
        logger.warning(text, workers, ENVIRONMENT)


async def _keep_working(function: Callable[[], Awaitable[None]], name: str) -> None:
    """Run a worker, and run it again when it fails, after ever longer pauses."""
    # Each attempt has a task of its own. If it swallows a cancellation, this task still knows.
    backoffs = iter(_BACKOFFS)

    async def attempt() -> None:
        try:
            await function()
        except SystemExit as exc:  # In a task of its own it would end the event loop.
            raise RuntimeError(f"sys.exit() in worker {name}") from exc

    while True:
        started = clock.time()
        task = asyncio.get_running_loop().create_task(attempt())
        try:
            return await task
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as exc:  # A worker's bug is logged, whatever it is.
            is_cancelled = isinstance(exc, asyncio.CancelledError)
            if current_task().cancelling() or (is_cancelled and task.cancelling()):
                if not is_cancelled:
                    log_failure(f"worker {name}, which was stopped,", exc, None)
                raise asyncio.CancelledError from None
            if clock.time() - started > _BACKOFFS[-1]:
                backoffs = iter(_BACKOFFS)
            backoff = next(backoffs, _BACKOFFS[-1])
            tell_of_bug(f"worker {name}", exc)
            what, info = ("failed", exc) if not is_away(exc) else (f"failed: {exc}", None)
            logger.error("worker %s %s; again in %g s", name, what, backoff, exc_info=info)
        await clock.sleep(backoff)


# ── assets ────────────────────────────────────────────────────────────────────────────────────
#
# The files of the folder client/, which stands beside the module in a checkout and in a wheel.

_ASSETS = Path(__file__).with_name("client")


class Asset:
    """A file of ``client/`` as a Falcon resource, which has read it once."""

    def __init__(self, name: str, media_type: str) -> None:
        try:
            self._data = (_ASSETS / name).read_bytes()
        except OSError:
            raise PachinkoError(
                f"there is no {_ASSETS / name}: copy the folder client/ beside the module, or "
                "install the package"
            ) from None
        self._etag = hashlib.sha256(self._data).hexdigest()[:32]
        # Browsers ask each time whether it has changed, as its address has no version.
        about = {"Cache-Control": "no-cache", "Content-Type": media_type}
        self._headers = {**about, "ETag": f'"{self._etag}"'}

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Send the file, or 304 to whoever has it (RFC 9110, 13.1.2)."""
        resp.set_headers(self._headers)
        if {"*", self._etag}.intersection(req.if_none_match or ()):
            resp.status = falcon.HTTP_304
        else:
            resp.data = self._data

    on_head = on_get  # Falcon leaves out the body.


# ── registration ──────────────────────────────────────────────────────────────────────────────


class Registration(Lifecycle):
    """What an application registers on an endpoint: handlers, and what is around them."""

    def connect(self, function: F = _NO_FUNCTION) -> F:
        """Run ``async def f(conn, …)`` before the handshake is answered, with path parameters.

        `falcon.HTTPError` refuses the handshake, `Close` accepts and closes. Several run in order,
        within *connect_timeout* seconds. *f* may have one ``yield``: what stands behind it runs
        after the disconnect handlers, the last handler's first, or when a later one refuses.
        """
        return self._add_end("connect", function, caller_namespaces())

    def accepted(self, function: F = _NO_FUNCTION) -> F:
        """Run ``async def f(conn, …)`` once the client is in, before its first message is handled.

        It takes path parameters as connect handlers do. `Close` closes; `falcon.HTTPError` closes
        with 3000 and its status, a bug with 1011. Disconnect handlers run in each case.
        """
        return self._add_end("accepted", function, caller_namespaces())

    @typing.overload
    def authenticate(self, function: F) -> F: ...
    @typing.overload
    def authenticate(self, *, optional: bool) -> Callable[[F], F]: ...
    def authenticate(
        self, function: Any = _NO_FUNCTION, *, optional: Any = None
    ) -> Callable[..., Any]:
        """Ask ``async def f(conn, token)`` who a client is: the user, or None to refuse it.

        It is asked before connect handlers, with the token from ``Authorization: Bearer``, or from
        the subprotocols ``bearer`` and the token behind it; or with None, and may then look at
        ``conn.req``, at a cookie say. If it then returns None, the handshake is accepted, the
        client has to send ``{"type":"authenticate","payload":{"token":…}}`` within *auth_timeout*
        seconds, and *f* is asked again. Until then at most 8 messages are held, and none handled.

        Whoever is refused is closed with 3401; no connect or disconnect handler runs. Otherwise
        ``conn.user`` is set. *f* may set ``conn.expires_at``. A later ``authenticate`` of the
        client asks *f* again, for the same user. No middleware sees it, no log has its token.

        With ``@ws.authenticate(optional=True)``, None for a client without a token lets it in as a
        guest, whose ``conn.user`` is None until a later ``authenticate`` says who it is.
        """
        if optional is not None:
            if not isinstance(optional, bool) or function is not None:
                raise PachinkoError(
                    "write @ws.authenticate, or @ws.authenticate(optional=True), above the function"
                )
            return functools.partial(self._read_authenticate, optional=optional)
        return cast(Callable[..., Any], self._read_authenticate(function, False))

    def _read_authenticate(self, function: F, optional: bool) -> F:
        example = "@ws.authenticate\nasync def who(conn, token): ..."
        check_function(function, example, 2)
        return self._register(function, lambda self: self._set_authenticate(function, optional))

    def _set_authenticate(self, function: Any, optional: bool) -> None:
        self._routes.set("authenticate", function, "authenticate", takes_guests=optional)

        async def again(conn: Connection, payload: Any) -> None:
            if (token := token_of(payload)) is None:
                wrong = {"path": "$.payload.token", "message": "expected str"}
                raise invalid_payload("authenticate", [wrong])
            expires_at, registry = conn.expires_at, self._hub.state.registry
            registry.expect(conn)
            try:
                user = await user_of(function, conn, token)
                is_guest = self._routes.takes_guests and conn.user is None
                if is_guest and user is not None:
                    conn.become(user)
            except BaseException as exc:  # A renewal that fails changes nothing.
                conn.expires_at = expires_at
                if isinstance(exc, (falcon.HTTPError, falcon.HTTPStatus)):
                    raise Close(3000 + exc.status_code) from None
                raise
            finally:
                registry.arriving.pop(conn.id, None)
            if user is None or user != conn.user:
                raise Close(UNAUTHENTICATED, "authentication failed")
            if is_guest:
                await self._hub.state.reachable(conn)
            self._hub.state.serving[current_task()].note_within(payload)

        parameter = inspect.Parameter("payload", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        renewal = Handler("authenticate", function, again, Any, parameter, None, None, False, False)
        self._add_checked(renewal)

    def on(
        self, type: str | type[Any], *, concurrent: bool = False,
        only: Callable[[Connection], bool | Awaitable[bool]] | None = None,
        resumable: float | None = None,
    ) -> Callable[[F], F]:  # fmt: skip
        """Handle messages of *type*, a text or a class with ``@message``.

        ``(conn)``, ``(conn, payload)`` or ``(conn, *, field, …)``, each structured to its
        annotation. What it returns is the reply; an async generator is a stream. *concurrent* lets
        it run beside other handlers of the connection. *only*, ``def f(conn) -> bool``, async or
        not, says whether the client may send it. It is asked before anything is said about the
        payload, and False is answered with the error ``forbidden``. *resumable*: seconds for which
        a stream goes on without its client, which may come back for the rest (docs/history.md);
        *conn* stays the connection that it was begun in. Raises `PachinkoError`.
        """
        if resumable is not None and not (is_seconds(resumable) and resumable > 0):
            raise PachinkoError(f"resumable is a number of seconds above 0, got {resumable!r}")
        name, cls = (type, None) if isinstance(type, str) else (message_type(type), type)
        if name is None:
            cure = (
                f'@message("say") above {cls.__name__}' if inspect.isclass(cls) else '@ws.on("say")'
            )
            expected = "@ws.on takes a type or a class with @message: write"
            raise PachinkoError(f"{expected} {cure}; got {type!r}")
        namespaces = caller_namespaces()
        if only is not None:
            check_guard(only, name, namespaces)

        def register(function: F) -> F:
            def add(self: Any) -> None:
                handler = self._read_handler(name, function, namespaces, cls, concurrent)
                if resumable is not None and not handler.streams:
                    raise PachinkoError(
                        f"{place_of(function)} is no stream, and only a stream can be resumable: "
                        "write `yield` instead of `return`"
                    )
                self._add_checked(attrs.evolve(handler, only=only, resumable=resumable))

            return self._register(function, add)

        return register

    def _read_handler(
        self, type: str, function: Any, namespaces: Namespaces, cls: Any, concurrent: bool
    ) -> Handler:
        """Check *function* as the handler of *type*, without adding it."""
        type = check_type(type)
        function = with_provided(function, self._routes.providers, namespaces)
        if (first := self._routes.handlers.get(type)) is not None:
            refuse_second(first.function, function, f"{type!r} has a handler")
        params, codec = path_types(self._path or "", self._app), self._hub.state.codec
        return read_handler(type, function, codec, namespaces, cls, params, concurrent)

    def _add_checked(self, *handlers: Handler) -> None:
        """Add all *handlers*, also to an endpoint that has started."""
        self._routes.add(handlers, self._hub.state.codec if self._loop is not None else None)

    def disconnect(self, function: F = _NO_FUNCTION) -> F:
        """Run ``async def f(conn)`` once at the end, with ``conn.close_code`` and its groups."""
        return self._add_end("disconnect", function, caller_namespaces())

    def _add_end(self, kind: str, function: F, namespaces: Namespaces) -> F:
        """Add a connect, an accepted or a disconnect handler."""

        def add(self: Any) -> None:
            getattr(self._routes, kind).append(self._read_end(kind, function, namespaces))

        return self._register(function, add)

    def _read_end(self, kind: str, function: Any, namespaces: Namespaces) -> Any:
        """Check *function* as a handler of one end of a connection, without adding it."""
        outer = with_provided(function, self._routes.providers, namespaces)
        if kind == "disconnect":
            check_function(outer, "@ws.disconnect\nasync def leave(conn): ...", 1)
            return outer
        return read_connect(outer, self._path, kind, namespaces=namespaces, app=self._app)

    def fallback(self, function: F = _NO_FUNCTION) -> F:
        """Give ``async def f(conn, frame: str)`` the text that no handler takes.

        It returns a text, which is sent as it is, a ``@message`` object, or None.
        """
        example = "@ws.fallback\nasync def other(conn, frame: str): ..."
        return self._set_raw("fallback", function, caller_namespaces(), example)

    def binary(self, function: F = _NO_FUNCTION) -> F:
        """Give ``async def f(conn, data: bytes)`` the binary frames.

        It returns bytes, which are sent as a binary frame, a ``@message`` object, or None.
        """
        example = "@ws.binary\nasync def upload(conn, data: bytes): ..."
        return self._set_raw("binary", function, caller_namespaces(), example)

    def _set_raw(self, name: str, function: F, namespaces: Namespaces, example: str) -> F:
        """Set the one handler of frames as they are: texts for the fallback, or bytes."""

        def add(self: Any) -> None:
            outer = with_provided(function, self._routes.providers, namespaces)
            check_function(outer, example, 2)
            check_taken(outer, RAW[name], namespaces, example, replies=False)
            self._routes.set(name, outer, ONCE[name])

        return self._register(function, add)

    def middleware(self, function: F = _NO_FUNCTION) -> F:
        """Put ``async def f(conn, envelope, call_next)`` around each message, in its own context.

        ``await call_next()`` gives what the handler returned; what *f* returns is the answer. For
        a stream it sends the items and gives None; what *f* returns counts if it was not called.
        The fallback and the binary handler take a message of the type ``""``. The first registered
        is the outermost.
        """
        example = "async def timed(conn, envelope, call_next):\n    return await call_next()"
        check_function(function, f"@ws.middleware\n{example}", 3)
        return self._register(function, lambda self: self._routes.add_middleware(function))

    def provide(self, function: F = _NO_FUNCTION) -> F:
        """Provide the values of a type T, by ``async def f(conn) -> AsyncIterator[T]: yield …``.

        A keyword-only parameter annotated with exactly T gets one, and never a client's: in
        message, connect, disconnect, fallback and binary handlers and in providers that are
        registered later. It is made once a call. What stands behind the ``yield`` runs after the
        call or the last item of a stream, and an error is raised at the ``yield``. ``async def
        f(conn) -> T`` has nothing to close. Raises `PachinkoError`.
        """
        namespaces = caller_namespaces()

        def add(self: Any) -> None:
            self._routes.add_provider(read_provider(function, self._routes, namespaces))

        return self._register(function, add)

    def snapshot(self, prefix: str) -> Callable[[F], F]:
        """Send the state of a kept group to each client that has missed messages, or is new.

        ``@ws.snapshot("room:") async def state(conn, group) -> RoomState`` is for the groups whose
        names begin with the prefix; the longest one counts. It returns a ``@message`` object, or
        None to send nothing. What is sent to the group meanwhile comes behind the state. It is
        called after the accept, and may take `handler_timeout`, or 10 seconds. If it fails, the
        client gets an ``error`` with the group, and a ``gap``. Raises `PachinkoError`, at the start
        of the app for groups that `Hub.keep` does not keep.
        """
        if not isinstance(prefix, str):
            raise PachinkoError(f'write @ws.snapshot("room:"), the prefix of names; got {prefix!r}')
        namespaces = caller_namespaces()

        def register(function: F) -> F:
            def add(self: Any) -> None:
                check_snapshot(function, prefix, namespaces)
                self._routes.add_snapshot(whole(prefix), function)

            if self._loop is not None:  # Else the start does it.
                check_kept({whole(prefix): function}, self._hub.state.rules)
            return self._register(function, add)

        return register

    def error(self, exception: type[Exception]) -> Callable[[F], F]:
        """Call ``async def f(conn, exc)`` with an error of this class from a message handler.

        It returns a `MessageError`, a `Close`, or a value to answer with.
        """
        if not (inspect.isclass(exception) and issubclass(exception, Exception)):
            raise PachinkoError(f"write @ws.error(ValueError), a class; got {exception!r}")

        def register(function: F) -> F:
            name = exception.__name__
            example = f"@ws.error({name})\nasync def failed(conn, exc): ..."
            check_function(function, example, 2)
            check_taken(function, exception, caller_namespaces(), example)
            return self._register(
                function, lambda self: self._routes.add_error(exception, function)
            )

        return register

    def add_resource(self, prefix: str, resource: object) -> None:
        """Route by class: ``on_send`` handles ``"<prefix>.send"``.

        ``on_connect``, ``on_accepted`` and ``on_disconnect`` are a connect, an accepted and a
        disconnect handler; the last one also runs if `on_connect` has returned and a later connect
        handler refuses. Where one method is refused, nothing of the resource is added.
        """
        namespaces = caller_namespaces()
        self._register(None, lambda self: self._add_resource(prefix, resource, namespaces))

    def _add_resource(self, prefix: str, resource: object, namespaces: Namespaces) -> None:
        handlers = list[Handler]()
        ends: dict[str, list[Any]] = {"connect": [], "accepted": [], "disconnect": []}
        for name, method in read_resource(prefix, resource):
            if name in ends:
                ends[name].append(self._read_end(name, method, namespaces))
            else:
                type = f"{whole(prefix)}.{name}"
                handlers.append(self._read_handler(type, method, namespaces, None, False))
        self._add_checked(*handlers)
        # The resource's own `on_disconnect`, if there is one, is the end of its `on_connect`.
        leave = ends["disconnect"]
        self._routes.connect.extend(with_end(c, *leave) if leave else c for c in ends["connect"])
        self._routes.accepted.extend(ends["accepted"])
        self._routes.disconnect.extend(leave)


# ── Pachinko ──────────────────────────────────────────────────────────────────────────────────

_WIRE_FORMAT = "pachinko.1"  # a client may offer it as a subprotocol


class Pachinko(Registration):
    """A WebSocket endpoint: a Falcon resource that routes messages to handlers.

    ``ws = Pachinko(app, "/ws/{room}")`` adds itself to *app*. Without the two, write the lines
    yourself: ``app.add_route("/ws", ws)`` and, for the lifespan, ``app.add_middleware(ws)``.

    *origins*: browsers' origins that may connect beside the request's own host, a list such as
    ``["https://example.com"]``, or ``"*"`` for all. *subprotocols*: in the order of preference.
    *max_size*: bytes of one frame. *rate*: ``(messages, seconds)`` of one connection.
    *outbox*, *outbox_bytes*: what hub methods may leave waiting for one slow client; *overflow*:
    ``"close"``, ``"drop_oldest"`` or, for kept groups, ``"replay"`` beyond that. *send_timeout*:
    seconds that a send waits for one. *linger*: those of a handler after its client has gone.
    *max_concurrent*: streams and concurrent handlers of one connection. *max_groups*: that one may
    be in. *handler_timeout*: seconds for the handler of a message, but not for a stream, or None.
    *auth_timeout*: seconds within which `authenticate` has to know the client. *connect_timeout*:
    seconds for `authenticate` and connect handlers together, without the wait for the client's
    first message; beyond, it is refused with 503, or closed with 1013. *trust_forwarded*: whether
    a proxy of yours sets the headers that ``req.forwarded_host`` and ``req.forwarded_scheme`` read;
    *origins* then goes by these. Raises `PachinkoError`.
    """

    def __init__(
        self, app: falcon.asgi.App[Any, Any] | None = None, path: str | None = None, *,
        hub: Hub = hub, origins: Iterable[str] | Literal["*"] | None = None,
        subprotocols: Sequence[str] = (),
        max_size: int = 1_048_576, rate: tuple[int, float] | None = None,
        outbox: int = 256, outbox_bytes: int = 1_048_576,
        overflow: Literal["close", "drop_oldest", "replay"] = "close",
        send_timeout: float = 20.0, linger: float = 10.0,
        max_concurrent: int = 16, max_groups: int = 1000,
        handler_timeout: float | None = None, auth_timeout: float = 10.0,
        connect_timeout: float = 10.0, trust_forwarded: bool = False,
    ) -> None:  # fmt: skip
        limits = Limits(
            max_size=max_size, rate=rate, outbox=outbox, overflow=overflow, linger=linger,
            outbox_bytes=outbox_bytes, send_timeout=send_timeout, max_concurrent=max_concurrent,
            max_groups=max_groups, handler_timeout=handler_timeout, auth_timeout=auth_timeout,
            connect_timeout=connect_timeout,
        )  # fmt: skip
        if not isinstance(hub, Hub):
            raise PachinkoError(f"write hub=Hub() for a hub of its own, got {hub!r}")
        super().__init__(app, path, hub, limits, Routes(), {})
        self._origins = read_origins(origins, trust_forwarded)
        self._subprotocols = (*texts(subprotocols, "subprotocols"), _WIRE_FORMAT)
        if app is not None or path is not None:
            self._attach(app, path)

    def _attach(self, app: Any, path: Any) -> None:
        if not isinstance(app, falcon.asgi.App):
            raise PachinkoError(f"WebSockets need app = falcon.asgi.App(), got {app!r}")
        if not isinstance(path, str) or not path.startswith("/"):
            raise PachinkoError(f'a path has a leading slash: Pachinko(app, "/ws"), got {path!r}')
        if (id(app), path) in _attached:
            raise PachinkoError(f"{path} has a Pachinko already; use that one, or another path")
        app.add_route(path, self)
        app.add_middleware(self)
        _attached[id(app), path] = self

    def include(self, other: Pachinko, prefix: str = "") -> None:
        """Add a copy of all that is registered on *other*, a ``Pachinko()`` of another file.

        It receives the message types of *other* with *prefix* and a dot before them. Middleware and
        error handlers of *other* apply to its own handlers: middleware inside of this one's, error
        handlers before this one's. Connect, accepted and disconnect handlers, providers and workers
        are added in order, and once if *other* is included under several prefixes.

        Nothing can be registered on *other* afterwards. Raises `PachinkoError`, and adds nothing,
        if *other* has an app or options, if both have functions for what may be there once, or if
        a handler does not suit the path or the hub's converter.
        """
        prefix = check_prefix(prefix)
        if not isinstance(other, Pachinko):
            raise PachinkoError(f"write ws.include(todos.ws), a Pachinko; got {other!r}")
        if prefix in self._parts.get(other, ()):
            raise PachinkoError(f"it is included with prefix={prefix!r} already; write another one")
        cls, namespaces = Pachinko, caller_namespaces()
        steps = cls._steps_for(other, self, self._hub)
        self._register(None, lambda self: self._include(other, steps, prefix, namespaces))
        line = traceback.extract_stack(limit=2)[0]
        _included_at[other] = f"{line.filename}:{line.lineno}"

    def _steps_for(self, including: Pachinko, its_hub: Hub) -> list[Step]:
        """Return what is registered here. Raises `PachinkoError` if it cannot be included."""
        cls = Pachinko
        given, usual = self._options(), cls._options(cls())
        wrong = [f"{name}=" for name in given if given[name] != usual[name]]
        if self._app is not None:
            wrong = ["an app and a path"]
        elif self._hub not in (hub, its_hub):  # The hub of the module has not been chosen.
            wrong = ["another hub than the including one; give both the same"]
        if including is self or including in self._parts:
            raise PachinkoError("a Pachinko includes neither itself nor what includes it")
        if wrong:
            write = "ws = Pachinko()  # in todos.py: the including one has the path and the options"
            raise PachinkoError(f"the included Pachinko has {', '.join(wrong)}; write\n{write}")
        return self._steps

    def _options(self) -> dict[str, Any]:
        """Return the options by name."""
        origins, trust = attrs.evolve(self._origins, trust_forwarded=False), self._origins
        given = {"origins": origins, "trust_forwarded": trust.trust_forwarded}
        return {**given, "subprotocols": self._subprotocols, **attrs.asdict(self._limits)}

    def _include(
        self, other: Pachinko, steps: list[Step], prefix: str, namespaces: Namespaces
    ) -> None:
        """Do the *steps* of *other* on a stand-in for this one, compare, and add the result."""
        routes, own, parts, stand_in = self._routes, Routes(), {**self._parts}, Pachinko()
        Lifecycle.__init__(stand_in, self._app, self._path, self._hub, self._limits, own, parts)
        for add in steps:
            add(stand_in)
        found = read_included(routes, own, prefix, namespaces)
        if other not in self._parts:
            leased = [worker for worker in routes.workers if worker[0]]
            self._add_workers([each for each in own.workers if each not in leased], "include")
            for kind in ("connect", "accepted", "disconnect"):
                getattr(routes, kind).extend(getattr(own, kind))
        self._add_checked(*found.values())
        add_included(routes, own, found)
        for each in (*parts, other):
            self._parts.setdefault(each, ())
        self._parts[other] += (prefix,)

    def client(self, path: str) -> None:
        """Serve the browsers' client, a JavaScript module, at *path*: ``"/pachinko.js"``.

        Raises `PachinkoError` without an app, or without the folder ``client/`` beside the module.
        """
        if self._app is None or not (isinstance(path, str) and path.startswith("/")):
            example = 'ws = Pachinko(app, "/ws")\nws.client("/pachinko.js")'
            raise PachinkoError(f"a client needs an app and a path; got {path!r}; write\n{example}")
        self._app.add_route(path, Asset("pachinko.js", falcon.MEDIA_JS))

    async def on_websocket(
        self, req: falcon.asgi.Request, ws: falcon.asgi.WebSocket, /, **params: Any
    ) -> None:
        """Serve one connection (Falcon's responder)."""
        if ws.closed:
            return  # A middleware has refused it.
        self._start()
        self._start_workers()  # if the server has no lifespan
        session, state = None, self._hub.state
        try:
            if self._hub.draining:
                raise unavailable("the server restarts")
            if (refusal := self._origins.refusal(req)) is not None:
                logger.warning("refused origin %s", refusal)
                raise falcon.HTTPForbidden(description="pages of this origin may not connect")
            session = Session(self._hub, self._routes, self._limits, req, ws, params)
            state.enter(session)
            # PERF: most handshakes have no query.
            if req.query_string and (state.relay.history or self._routes.has_resumable):
                session.greet()
            try:
                if await admit(session, self._subprotocols):
                    if state.relay.history is not None or state.returning:
                        session.welcome()
                    await session.serve(welcome if self._routes.accepted else None)
            finally:
                session.release()
                state.leave(session)
        except Exception as exc:  # Falcon refuses the handshake.
            if not isinstance(exc, Bug):
                refuse_by_status(ws, req.scope, session.conn.headers if session else ())
            raise

    async def process_resource_ws(
        self, req: falcon.asgi.Request, ws: falcon.asgi.WebSocket, resource: Any, params: Any
    ) -> None:
        """Notice that a later ``add_route`` has taken the path (Falcon's middleware)."""
        if resource is not self and req.uri_template == self._path and self._path is not None:
            logger.warning("a later app.add_route has replaced the Pachinko at %s", self._path)


# ── settling ──────────────────────────────────────────────────────────────────────────────────
#
# A test can know that nothing more will come: nothing in the event loop can run, and nothing of the
# application waits for the outside, that is for a timer, a thread or a socket.

# The simulation that the code in progress belongs to. Workers have an empty context, and so none.
_simulation: contextvars.ContextVar[object] = contextvars.ContextVar("simulation", default=None)
_LOOKS = 2  # in a row that find nothing to run: the loop polls sockets and timers between the two
_BLIND_LOOKS = 10  # on a loop that does not say what it will run, such as uvloop's
_LOUD_LOOKS = 1000  # after which time limits come early for what never rests, at its end
_PAUSE = 0.001  # seconds between two looks while an application waits for the outside
# Code of asyncio in which a task waits for what other code of the loop will do.
_INSIDE = frozenset({"asyncio.locks", "asyncio.queues", "asyncio.tasks", "asyncio.taskgroups"})
_LIBRARIES = frozenset({"asyncio", "contextlib", "falcon", "pachinko", "pachinko_cluster"})


def _clock() -> MovableClock:
    """Return the library's clock, which can be moved while there is a simulation."""
    return cast(MovableClock, clock)


def check_timeout(timeout: float | None) -> None:
    """Raise `ValueError` unless *timeout* is None, or seconds above 0."""
    if timeout is not None and not (is_seconds(timeout) and timeout > 0):
        raise ValueError(f"timeout is a number of seconds above 0, got {timeout!r}")


def never() -> bool:
    """Return False: what `Watcher.wait` waits for where a rest is meant."""
    return False


@attrs.define(eq=False)
class Wait:
    """A wait of a test until *is_over*, or until nothing can make it so."""

    is_over: Callable[[], object]
    owner: object  # the simulation
    until: float  # on the loop's clock
    hurries: Callable[[object], bool] | None  # whose time limits come early, and need no time
    ended: asyncio.Future[bool]


class Watcher:
    """Watches an event loop for all tests in it: two of them would keep each other awake."""

    def __init__(self) -> None:
        self._waits: list[Wait] = []
        self._quiet = 0  # looks in a row that have found nothing to run
        self._loud = 0  # looks since it was last at rest
        self._busy: list[object] = []  # the simulations that waited for the outside then
        self._next: asyncio.Handle | None = None
        self._threads = weakref.WeakSet(threading.enumerate())  # No application has started these.
        # Seconds that a clock is still to be moved. One of a simulation that has ended never is.
        self._left = weakref.WeakKeyDictionary[Clock, float]()
        self._held = collections.deque[Callable[[], None]]()  # Each waits for that.

    async def wait(
        self, is_over: Callable[[], object], owner: object, seconds: float,
        hurries: Callable[[object], bool] | None = None,
    ) -> bool:  # fmt: skip
        """Return True once *is_over*, or False at rest. Raises `TimeoutError` with what goes on.

        At rest nothing can run by itself, and nothing of the application of *owner* waits for the
        outside. Time limits of the library whose owner *hurries* takes come early instead.
        """
        loop = running_loop()
        wait = Wait(is_over, owner, loop.time() + seconds, hurries, loop.create_future())
        self._waits.append(wait)
        self._look_soon()
        try:
            return await wait.ended
        finally:
            self._waits.remove(wait)

    def advance(self, seconds: float) -> None:
        """Move the clock of the library, once at rest: from timer to timer, as time does."""
        self._left[clock] = self._left.get(clock, 0.0) + seconds
        self._look_soon()

    def call(self, function: Callable[[], None]) -> None:
        """Call *function* now, or once the clock has been moved."""
        self._held.append(function)
        self._release()

    def _release(self) -> None:
        while self._held and not self._left.get(clock):
            self._held.popleft()()

    def _move(self) -> None:
        due, left = _clock().next_due(), self._left[clock]
        seconds = left if due is None else min(left, due)
        self._left[clock] = left - seconds
        _clock().advance(seconds)
        self._release()

    def _hurry(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Let the first time limit come early that a wait *hurries*; return whether one has."""
        tests = [wait.hurries for wait in self._open if wait.hurries is not None]
        for timer in _clock().timers if tests else ():
            if any(test(timer.origin.get(_simulation)) for test in tests):
                timer.move(max(0.0, timer.at - loop.time()))
                return True
        return False

    def _look_soon(self) -> None:
        """Begin to look anew."""
        self._quiet = 0
        if self._next is not None:
            self._next.cancel()
        self._next = running_loop().call_soon(self._look, running_loop())

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """End the waits that are over, and all of them at rest."""
        self._next = None
        self._end_if(lambda wait: wait.is_over(), True)
        ready: Any = getattr(loop, "_ready", None)
        self._quiet = 0 if (_running(loop) if ready is None else ready) else self._quiet + 1
        is_resting = self._quiet >= (_BLIND_LOOKS if ready is None else _LOOKS)
        self._loud = 0 if is_resting else self._loud + 1
        outside: list[tuple[object, str]] = []
        until = max((wait.until for wait in self._open), default=0.0)
        if is_resting:
            self._quiet = 0
        if is_resting and self._left.get(clock):
            self._move()
        elif (is_resting or self._loud > _LOUD_LOOKS) and self._hurry(loop):
            pass  # What was limited runs next.
        elif is_resting:
            outside = outside_of(loop, until, self._threads)
            # What has come from the outside takes some turns of a loop, which a blind one hides.
            before, self._busy = self._busy, [owner for owner, _ in outside]
            ending = [wait for wait in self._open if wait.owner not in before + self._busy]
            # A task of the test that settles goes on before those that wait for something.
            first = [wait for wait in ending if wait.is_over is never] or ending
            self._end_if(first.__contains__, False)
        if late := [wait for wait in self._open if wait.until <= loop.time()]:
            going_on = outside or outside_of(loop, until, self._threads)
            frames = [Parked(task).frames for task in _running(loop)]
            places = [place_in(each) for each in frames if any(map(_is_own, each))] or ["something"]
            running = [f"{place} runs all the time" for place in places]
            for wait in late:
                texts = [text for owner, text in going_on if owner is wait.owner] or running
                wait.ended.set_exception(TimeoutError("; ".join(texts)))
        if self._open or self._left.get(clock):
            later = functools.partial(loop.call_later, _PAUSE) if outside else loop.call_soon
            self._next = later(self._look, loop)

    @property
    def _open(self) -> list[Wait]:
        return [wait for wait in self._waits if not wait.ended.done()]

    def _end_if(self, condition: Callable[[Wait], object], result: bool) -> None:
        for wait in self._open:
            if condition(wait):
                wait.ended.set_result(result)


_watchers = weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Watcher]()


def watcher() -> Watcher:
    """Return the watcher of the running loop."""
    return _watchers.get(running_loop()) or _watchers.setdefault(running_loop(), Watcher())


def _running(loop: asyncio.AbstractEventLoop) -> list[asyncio.Task[Any]]:
    """Return the tasks that are about to run."""
    waits = {task: getattr(task, "_fut_waiter", None) for task in asyncio.all_tasks(loop)}
    return [task for task, future in waits.items() if future is None or future.done()]


class Silence(asyncio.Future[None]):
    """What an application waits for until its client sends something: nothing of the outside."""


class Parked:
    """A *task* that waits: whose it is, in which code, and for what."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.future: Any = getattr(task, "_fut_waiter", None)
        self.frames: list[types.FrameType] = [*frames_of(task.get_coro())]
        self.leaves: list[Any] = _leaves_of(
            self.future, self.frames
        )  # the futures that it stands for
        # The context of a task is that of the callback that wakes it.
        owners = (context.get(_simulation) for _, context in _callbacks_of(self.future))
        self.owner: object = next(filter(None, owners), None)  # the simulation

    def waits_for(self, is_open: bool) -> str:
        """Return what of the outside it waits for, if no timer shows it, or ""."""
        inner = self.frames[-1] if self.frames else None
        if inner is not None and inner.f_code is asyncio.sleep.__code__:
            return "a timer"  # The loop does not show it.
        callbacks = [each for leaf in self.leaves for each, _ in _callbacks_of(leaf)]
        if any(getattr(each, "__name__", "") == "_call_check_cancel" for each in callbacks):
            return "a thread"
        module = _module_of(inner)
        is_inside = module in _INSIDE or module.split(".")[0] in _LIBRARIES - {"asyncio"}
        bare = [each for each in self.leaves if type(each) is asyncio.Future]
        is_bare = bare and not (is_inside and bare == [self.future])
        return "a socket or a thread, it seems" if is_open and is_bare else ""


def _callbacks_of(future: Any) -> list[tuple[Any, contextvars.Context]]:
    return getattr(future, "_callbacks", None) or []


def _leaves_of(future: Any, frames: Sequence[types.FrameType]) -> list[Any]:
    """Return *future*, or those that `gather`, `shield`, `wait` or a group wait for instead."""
    inner: list[Any] = []
    for frame in frames:
        if _module_of(frame) in ("asyncio.tasks", "asyncio.taskgroups"):
            for value in frame.f_locals.values():
                several: Any = getattr(value, "_tasks", getattr(value, "_todo", value))
                inner += several if isinstance(several, set) else [several]
    inner += getattr(future, "_children", ())
    for callback, _ in _callbacks_of(future):
        if getattr(callback, "__name__", "") == "_outer_done_callback":  # `shield` adds it.
            inner += [cell.cell_contents for cell in callback.__closure__]
    awaited = [each for each in inner if asyncio.isfuture(each) and not each.done()]
    others = [each for each in awaited if each is not future]
    return [leaf for each in others for leaf in _leaves_of(each, ())] or [future]


def outside_of(
    loop: asyncio.AbstractEventLoop, until: float, known: Container[threading.Thread]
) -> list[tuple[object, str]]:
    """Return what waits for the outside: of which simulation, and a text that says where.

    A task shows it by what it waits for. A future that is anybody's counts, if no code of asyncio
    has made it, and if the loop has sockets or the application threads that are not *known*. A
    timer that no task waits for counts if it is due *until* then: a library may keep some.
    """
    timers: dict[int, Any] = {
        id(timer): timer for timer in getattr(loop, "_scheduled", ())
        if not timer.cancelled() and not _clock().is_own(timer)
    }  # fmt: skip
    ends = {id(each): key for key, timer in timers.items() for each in _ended_by(timer)}
    tasks = {
        task: Parked(task) for task in asyncio.all_tasks(loop)
        if not isinstance(getattr(task, "_fut_waiter", None), Silence)
    }  # fmt: skip
    # Where several tasks wait for one future, that of a simulation is the one that counts.
    ordered = sorted(tasks, key=lambda task: tasks[task].owner is not None)
    waiters = {id(leaf): task for task in ordered for leaf in tasks[task].leaves}
    selector: Any = getattr(loop, "_selector", None)
    # One socket is the loop's own. A loop that does not show its sockets may have some.
    is_open = selector is None or len(selector.get_map()) > 1 or _has_threads(known)
    found: list[tuple[object, str]] = []
    used = set[int | None]()
    for task, parked in tasks.items():
        own = {ends.get(id(each)) for each in (task, parked.future, *parked.leaves)} - {None}
        used |= own
        if what := "a timer" if own else parked.waits_for(is_open):
            chain = [task]
            while (waiter := waiters.get(id(chain[0]), task)) not in chain:
                chain.insert(0, waiter)
            owner = next(filter(None, (tasks[each].owner for each in chain)), None)
            places = " → ".join(place_in(tasks[each].frames) for each in chain)
            found.append((owner, f"{places} waits for {what}"))
    found += [
        (timer._context.get(_simulation), f"a timer will call {timer._callback!r}")
        for key, timer in timers.items() if key not in used and timer.when() <= until
    ]  # fmt: skip
    return [each for each in found if each[0] is not None]


def _ended_by(timer: Any) -> list[object]:
    """Return what *timer* may end: a future that it resolves, or a task that it cancels."""
    of = getattr(timer._callback, "__self__", timer)
    return [*filter(asyncio.isfuture, timer._args or ()), of, getattr(of, "_task", of)]


def _has_threads(known: Container[threading.Thread]) -> bool:
    """Tell whether a thread runs that is not *known*, and is not an idle one of an executor."""
    frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage]  # documented by CPython
    others = {each.ident for each in threading.enumerate() if each not in known} & {*frames}
    inner = [f"{_module_of(frames[id])}.{frames[id].f_code.co_name}" for id in others if id]
    return any(each != "concurrent.futures.thread._worker" for each in inner)


def _module_of(frame: types.FrameType | None) -> str:
    return "" if frame is None else cast(str, frame.f_globals.get("__name__", ""))


def frames_of(waiting: Any) -> Iterator[types.FrameType]:
    """Yield the frames of a suspended coroutine, from the outermost to where it waits."""
    while waiting is not None:
        kind = next((kind for kind in ("cr", "gi", "ag") if hasattr(waiting, f"{kind}_frame")), "")
        if not kind:  # What `__await__` or `__anext__` returns hides whose it is.
            hidden = gc.get_referents(waiting)
            found = (x for x in hidden if hasattr(x, "cr_frame") or inspect.isasyncgen(x))
            waiting = next(found, None)
            continue
        frame: types.FrameType | None = getattr(waiting, f"{kind}_frame")
        if frame is None:  # A coroutine in C has none.
            return
        yield frame
        waiting = getattr(waiting, "gi_yieldfrom" if kind == "gi" else f"{kind}_await")
        if waiting is None and frame.f_code is rest_of.__code__:  # It steps a coroutine by hand.
            waiting = frame.f_locals["steps"]
        if frame.f_code is Stream.send_all.__code__ and "items" in frame.f_locals:
            yield from frames_of(frame.f_locals["items"])  # The generator waits for its reader.


def handled_by_falcon() -> BaseException | None:
    """Return the error that Falcon's `App._handle_exception` handles while it closes a socket."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "_handle_exception":
        frame = frame.f_back
    return None if frame is None else cast("BaseException | None", frame.f_locals.get("ex"))


def place_in(frames: Sequence[types.FrameType]) -> str:
    """Return where code of the application waits, from its outermost function to the inner ones."""
    own = [*filter(_is_own, frames)] or frames[:1]
    places = (f"{f.f_code.co_qualname} ({f.f_code.co_filename}:{f.f_lineno})" for f in own)
    return " → ".join(places) or "a task"


def _is_own(frame: types.FrameType) -> bool:
    """Tell whether *frame* is of the application's code."""
    return _module_of(frame).split(".")[0] not in _LIBRARIES


# ── client ────────────────────────────────────────────────────────────────────────────────────
#
# A client of a simulated application stands on both sides of the line: a test calls it, and the
# application gets its `receive` and `send` as those of a server (ASGI, WebSocket).

# A failing test shows its own lines, and not those of its client (pytest's name for that).
__tracebackhide__: Any = lambda info: info.errisinstance((AssertionError, MessageError, Refused))  # noqa: E731 - it is short
_FRAME_SHOWN = 200  # characters of a frame in a transcript


App = Callable[[Any, Any, Any], Coroutine[Any, Any, None]]  # ASGI's
Answer = tuple[Envelope, bool]  # with whether more will come


class Client:
    """A client of a simulated application.

    Methods that wait fail with an `AssertionError` as soon as nothing can come any more, or after
    *timeout* seconds. They take nothing then.
    """

    def __init__(self, process: Process, scope: Event, name: str) -> None:
        self.scope: Event = scope
        self.name: str = name
        self.subprotocol: str | None = None  # the one that the server has chosen
        self.headers: dict[str, str] = {}  # The server's answer has them, in lower case.
        self.is_accepted: bool = False
        self.refusal: Refused | None = None
        self.end: tuple[int, str] | None = None  # code and reason of whoever closed first
        self.task: asyncio.Task[None]  # the application's, from `begin` on
        self._conn: Connection | None = None
        self.is_orphaned: bool = False  # Its process was killed, and does nothing more.
        self._process = process
        process.sim.clients.append(self)
        self._inbox = collections.deque[Envelope]()
        self._calls: dict[object, collections.deque[Answer] | None] = {}  # None: they are ignored
        self._answerers: dict[str, Callable[[Any], Any]] = {}
        self._answering = set[asyncio.Task[None]]()
        self._ids = map("request-{}".format, itertools.count(1))
        self._events = collections.deque[Event]([{"type": "websocket.connect"}])  # for the server
        self._reader = Silence()
        self._flows = asyncio.Event()  # The client reads.
        self._flows.set()

    def __repr__(self) -> str:
        return f"<Client {self.name} {self.scope['path']}>"

    @property
    def received(self) -> list[Envelope]:
        """What has come and was not taken. A frame that is no message has the type ``""``."""
        return [*self._inbox]

    @property
    def conn(self) -> Connection:
        """The server's side of it. Raises `PachinkoError` if a Falcon responder serves it."""
        if self._conn is None:
            raise PachinkoError(f"no Pachinko serves {self.scope['path']}")
        return self._conn

    async def send(self, message: object, payload: object = None, *, id: Id | None = None) -> None:
        """Send a ``@message`` object, a type and its payload, or bytes, as `Connection.send` does.

        This and all that sends raises `AssertionError` once the connection has ended.
        """
        type, payload = split_message(message, payload, takes_bytes=True)
        if type:
            self._send_message(type, payload, id)
        else:
            await self.send_bytes(cast(bytes, payload))

    async def send_text(self, text: str) -> None:
        """Send *text* in a frame, as it is."""
        if not isinstance(text, str):
            raise TypeError(f"send_text takes a str, got {text!r}; write send_bytes, or send")
        self._send_frame("text", text)

    async def send_bytes(self, data: bytes | bytearray | memoryview) -> None:
        """Send *data* in a binary frame."""
        self._send_frame("bytes", bytes(memoryview(data)))

    def _send_message(self, type: str, payload: object, id: Id | None) -> None:
        self._send_frame("text", self._process.codec.encode(type, payload, id=id).decode())

    def _send_frame(self, kind: str, content: str | bytes) -> None:
        if self.end is not None:
            raise self.failure("nothing can be sent")
        self._process.sim.note(self.name, "→", content)
        event = {"type": "websocket.receive", kind: content}
        watcher().call(functools.partial(self._deliver, event))

    @typing.overload
    async def receive(self, expected: type[T], *, timeout: float | None = None) -> T: ...
    @typing.overload
    async def receive(self, expected: str, *, timeout: float | None = None) -> Any: ...
    @typing.overload
    async def receive(self, *, timeout: float | None = None) -> Envelope: ...
    async def receive(self, expected: Any = None, *, timeout: float | None = None) -> Any:
        """Take the next message, which has to be of the *expected* type.

        A class with ``@message`` gives an object of it, a type the payload as JSON, and nothing the
        whole `Envelope`. Answers to `request`, `stream` and `answer` do not come here.
        """
        name = expected if isinstance(expected, str) else message_type(expected)
        if name is None and expected is not None:
            raise TypeError(f'write receive(Said), receive("said") or receive(); got {expected!r}')
        what = "a message" if name is None else repr(name)
        check_timeout(timeout)
        while not self._inbox:
            await self._wait(lambda: self._inbox, timeout, what, name or "")
        envelope = self._inbox[0]
        if name is not None and name != envelope.type:
            text = f"{what} was expected, but {shorten(envelope)} came{self._near(name)}"
            raise self.failure(text)
        t = Any if isinstance(expected, str) else expected
        taken = envelope if name is None else self._structured(envelope, t)
        self._inbox.popleft()
        return taken

    def _near(self, name: str) -> str:
        """Say where a message *name* is, or else one with a similar type, if there is one."""
        came: dict[str, str] = {}
        for of in self._process.sim.clients:
            came |= {each.type: f"{of.name} has got {shorten(each)}" for each in of.received}
        came |= {each.type: f"{shorten(each)} comes later" for each in reversed(self._inbox)}
        nearest = difflib.get_close_matches(name, came, 1) if name else ()
        return "".join(f"; {came[each]}" for each in nearest)

    def _structured(self, envelope: Envelope, returns: Any) -> Any:
        codec = self._process.codec
        t = answer_type(returns, codec)
        try:
            return envelope.payload if t is Any else codec.structure(envelope.payload, t, "")
        except MessageError as exc:
            wrong = "; ".join(f"{e['path']}: {e['message']}" for e in exc.details["errors"])
        raise self.failure(f"{shorten(envelope)} is no {shown(t)}: {wrong}")

    @typing.overload
    async def request(
        self, message: object, payload: object = None, *, returns: type[T],
        timeout: float | None = None,
    ) -> T: ...  # fmt: skip
    @typing.overload
    async def request(
        self, message: object, payload: object = None, *, returns: Any = ...,
        timeout: float | None = None,
    ) -> Any: ...  # fmt: skip
    async def request(
        self, message: object, payload: object = None, *, returns: Any = Any,
        timeout: float | None = None,
    ) -> Any:  # fmt: skip
        """Send a message with an id; return the payload of its answer, as *returns*.

        Raises `MessageError` for an answer that is an error.
        """
        call = self.stream(message, payload, timeout=timeout)
        try:
            answer, more = await self.next_answer(call)
            if more or answer.type == "complete":
                raise self.failure(f"{call.type!r} is a stream: use stream({call.type!r}, …)")
            return self._structured(answer, returns)
        finally:
            self.leave(call.id)

    def stream(
        self, message: object, payload: object = None, *, timeout: float | None = None
    ) -> Items:
        """Send a message with an id; return the items of its answer, for ``async for``.

        Leaving the loop sends ``complete``. Raises `MessageError` where the stream fails.
        """
        check_timeout(timeout)
        type, payload = split_message(message, payload)
        id = next(self._ids)  # A test may send its own ids.
        self._send_message(type, payload, id)
        self._calls[id] = collections.deque()
        return Items(self, type, id, timeout)

    async def next_answer(self, call: Items) -> Answer:
        """Return the next answer to *call*. Raises `StopAsyncIteration` after the last."""
        if (answers := self._calls.get(call.id)) is None:
            raise StopAsyncIteration
        while not answers:
            await self._wait(lambda: answers, call.timeout, f"an answer to {call.type!r}")
        answer, more = answers.popleft()
        if not more:
            del self._calls[call.id]
        if answer.type == "error":
            said = {**answer.payload} if isinstance(answer.payload, dict) else {}
            error = MessageError(said.pop("code", ""), said.pop("message", ""))
            error.details.update(said)
            is_bug = error.code == internal_error().code
            raise error from (self._process.sim.latest_bug() if is_bug else None)
        return answer, more

    def leave(self, id: str) -> None:
        """Ignore what is still to come in answer to the message *id*, and say so."""
        if self._calls.get(id) is not None:
            self._calls[id] = None
            if self.end is None:
                self._send_message("complete", None, id)

    def answer(self, type: str, function: Callable[[Any], Any]) -> None:
        """Answer each question of *type* (`Connection.ask`) with what *function* returns.

        It gets the payload as JSON, and may be async. A `MessageError` that it raises is sent. Any
        other question is received, and answered by ``send("<type>.reply", …, id=question.id)``.
        """
        if not callable(function):
            raise TypeError(f'write answer("{type}", lambda payload: True), got {function!r}')
        self._answerers[check_type(type)] = function

    async def _answer(self, question: Envelope) -> None:
        _simulation.set(self._process.sim)  # `settle` waits for it.
        type, payload = f"{question.type}.reply", None
        try:
            try:
                payload = self._answerers[question.type](question.payload)
                if inspect.isawaitable(payload):
                    payload = await payload
            except MessageError as exc:
                type, payload = "error", {**exc.details, "code": exc.code, "message": exc.message}
            if self.end is None:
                self._send_message(type, payload, question.id)
        except Exception as exc:  # The test has a bug.
            self._process.sim.note_bug(f"the answer to {question.type!r}", exc)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close, and wait until the disconnect handlers have ended, or nothing more can run."""
        self._end(code, reason, f"left with {code} {reason}".rstrip())
        await self._process.sim.wait(self.task.done, None, "its end")

    def cut(self) -> None:
        """Lose the connection without a word. The server gets the close code 1006."""
        self._end(1006, "", "cut")

    def stall(self) -> None:
        """Read nothing more, so that the server's writes wait."""
        self._process.sim.note(self.name, "…", "stalled")
        self._flows.clear()

    def resume(self) -> None:
        """Read on after `stall`."""
        self._process.sim.note(self.name, "…", "resumed")
        self._flows.set()

    async def closed(self, *, timeout: float | None = None) -> tuple[int, str]:
        """Wait for the end of the connection; return its close code and reason.

        Once the server closes, a stalled client reads on, up to the close frame.
        """
        what = "the end of the connection"
        if not self._flows.is_set():
            await self._process.sim.wait(lambda: self.end, timeout, what)
            if self._conn is not None and self._conn.closed:
                self._flows.set()
        await self._wait(lambda: self.end, timeout, what)
        return cast("tuple[int, str]", self.end)

    async def _wait(
        self, is_over: Callable[[], object], timeout: float | None, what: str, near: str = ""
    ) -> None:
        """Wait until *is_over*. Raises `AssertionError` if *what* cannot come any more."""
        await self._process.sim.wait(lambda: is_over() or self.end, timeout, what)
        if not is_over():
            own = [*filter(_is_own, frames_of(self.task.get_coro()))]
            why = "" if self._flows.is_set() else ", as the client is stalled"
            why += (f"; {place_in(own)} waits" if own else "") + self._near(near)
            raise self.failure(f"{what} was expected, and nothing more can come{why}")

    def failure(self, text: str) -> AssertionError:
        """Return the error of a test that cannot go on, with the transcript."""
        if self.end is not None:
            text += f", since the connection has ended with {self.end[0]} {self.end[1]}".rstrip()
        return self._process.sim.failure(f"{self.name}: {text}")

    # What the application calls, as it calls a server, and what happens to the line

    def begin(self, app: App, context: contextvars.Context) -> None:
        """Let *app* serve the client, in *context*."""
        work: Any = app(self.scope, self.asgi_receive, self.asgi_send)
        self.task = running_loop().create_task(work, context=context)
        self.task.add_done_callback(self._note_end)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (exc := task.exception()) is not None:
            self._process.sim.note_bug(f"the application, for {self.name},", exc)
        if self.is_accepted:
            code = getattr(self._conn, "close_code", None) or 1006
            self._end(code, "", "the application has returned, without a close frame")

    def meet(self, conn: Connection) -> None:
        """Note the server's side."""
        self._conn = conn

    def _deliver(self, *events: Event) -> None:
        self._events += events
        if not self._reader.done():
            self._reader.set_result(None)

    def _end(self, code: int, reason: str, text: str) -> None:
        """End the connection, if it has not ended."""
        if self.end is not None:
            return
        self.end = code, reason
        self._process.sim.note(self.name, "✕", text)
        event = {"type": "websocket.disconnect", "code": code, "reason": reason}
        watcher().call(functools.partial(self._deliver, event))
        self._flows.set()
        for task in self._answering - {asyncio.current_task()}:
            task.cancel()

    def orphan(self) -> None:
        """Lose the server, whose process was killed: it neither reads nor writes any more."""
        self._end(1006, "", "its process was killed")
        self.is_orphaned = True

    def shut(self) -> None:
        """End the connection from the server's side, as a server does when it stops."""
        self._end(1012, "", "closed with 1012, as the server stops")
        self.is_orphaned = False
        self._deliver()

    def is_unread(self) -> bool:
        """Tell whether the application has not taken all that was sent, and still may."""
        return self.end is None and bool(self._events)

    async def asgi_receive(self) -> Event:
        """Return the next event for the application (ASGI, WebSocket: Receive)."""
        while not self._events or self.is_orphaned:
            self._reader = Silence()
            await self._reader
        is_last = self._events[0]["type"] == "websocket.disconnect"
        return self._events[0] if is_last else self._events.popleft()  # for whoever asks again

    async def asgi_send(self, event: Event) -> None:
        """Take an event of the application (ASGI, WebSocket: Send)."""
        kind = event["type"]
        if kind == "websocket.send":
            while not self._flows.is_set():
                await self._flows.wait()
            if self.end is not None:
                raise ConnectionResetError("the client has gone")  # ASGI 2.4 wants an `OSError`.
            self._take(event)
        elif kind == "websocket.accept":
            self.is_accepted, self.subprotocol = True, event.get("subprotocol")
            self.headers = _texts(event.get("headers"))
            self._process.sim.note(self.name, "←", "accepted")
        elif kind == "websocket.close":
            self._take_close(event.get("code", 1000), event.get("reason") or "")
        elif kind == "websocket.http.response.start":
            self.refusal = Refused(event["status"], None, "", _texts(event.get("headers")))
        else:  # The only other event is the body of the refusal.
            self._take_body(event.get("body", b""))

    def _take(self, event: Event) -> None:
        """Take a frame from the server."""
        content = event["bytes"] if event.get("text") is None else event["text"]
        self._process.sim.note(self.name, "←", content)
        envelope, more = read_frame(content)
        if envelope.id in self._calls:
            if (answers := self._calls[envelope.id]) is not None:
                answers.append((envelope, more))
        elif envelope.type in self._answerers and str(envelope.id).startswith("$"):
            self._answering.add(create_task(self._answer(envelope), is_detached=True))
        else:
            self._inbox.append(envelope)

    def _take_close(self, code: int, reason: str) -> None:
        """Take the close frame, or the refusal of the handshake, which servers make HTTP 403."""
        # The code 1011 is Falcon's for an error that nobody handles.
        if (bug := handled_by_falcon() if code == 1011 else None) is not None:
            tell_of_bug(f"the handshake of {self.name}", bug)
        if not self.is_accepted:
            self.refusal = Refused(403, None, f"the application has closed with {code} {reason}")
            self.refusal.__cause__ = bug
        self._end(code, reason, f"closed with {code} {reason}".rstrip())

    def _take_body(self, body: bytes) -> None:
        refusal, text = cast(Refused, self.refusal), body.decode(errors="replace")
        with contextlib.suppress(msgspec.MsgspecError):
            said = msgspec.json.decode(body, type=dict[str, Any])  # `falcon.HTTPError` has one.
            text = str(said.get("description") or said.get("title") or text)
        self.refusal = Refused(refusal.status, None, refusal.reason + text, refusal.headers)
        self._end(1006, "", f"refused with HTTP {refusal.status} {text}")


@attrs.define(eq=False)
class Items(AsyncIterator[Any]):
    """What `Client.stream` returns: the payloads of its items, one after the other."""

    _client: Client
    type: str
    id: str
    timeout: float | None
    _whole: Items | None = None  # It is kept with its part.
    _loop: asyncio.AbstractEventLoop = attrs.field(factory=running_loop)
    _thread: int = attrs.field(factory=threading.get_ident)

    def __aiter__(self) -> Items:
        # Nothing but the loop has this one. The interpreter drops it where the loop is left.
        return attrs.evolve(self, whole=self)

    async def __anext__(self) -> Any:
        answer, more = await self._client.next_answer(self)
        if more:
            return answer.payload
        if answer.type == "complete":
            raise StopAsyncIteration
        raise self._client.failure(f"{self.type!r} is no stream: use request({self.type!r}, …)")

    async def aclose(self) -> None:
        """Send ``complete``, unless the stream has ended."""
        self._client.leave(self.id)

    def __del__(self) -> None:
        is_here = threading.get_ident() == self._thread
        call = contextvars.Context().run if is_here else self._loop.call_soon_threadsafe
        with contextlib.suppress(RuntimeError):  # The loop has been closed.
            call(self._client.leave, self.id)


def _texts(headers: Iterable[tuple[bytes, bytes]] | None) -> dict[str, str]:
    """Return *headers* by their names in lower case. A comma joins those of one name."""
    found: dict[str, str] = {}
    for name, value in headers or ():
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        found[key] = f"{found[key]}, {text}" if key in found else text
    return found


def shorten(content: object) -> str:
    """Return *content*, a frame or an envelope, for people, and not more than they read."""
    if isinstance(content, Envelope):
        payload = "" if content.payload is None else " " + encode(content.payload).decode()
        content = f"{content.type!r}{payload}" if content.type else repr(content.payload)
    text = content if isinstance(content, str) else repr(content)
    short = text[:_FRAME_SHOWN].encode(errors="backslashreplace").decode()  # for half pairs
    return short if len(text) <= _FRAME_SHOWN else f"{short}… ({len(text)} characters)"


# ── process ───────────────────────────────────────────────────────────────────────────────────
#
# A process of a simulated application calls it for its lifespan and for each connection, as a
# server does, but without a socket.


class Process:
    """A process of a simulated application: ``async with sim.process() as other``, or ``await``."""

    def __init__(self, sim: Simulation, make: Callable[[], App]) -> None:
        self.sim: Simulation = sim
        self.endpoints: list[Lifecycle] = []  # They have started, in this order.
        self._make = make
        self._app: Any = None  # from the beginning of the start on, until the stop
        self._starting = asyncio.Lock()
        self._is_up = False  # It has started.
        self._is_over = False  # It was killed or stopped.
        self._links: dict[Relay, Any] = {}  # its connections to the broker
        self._clients: list[Client] = []
        self._lifespan: asyncio.Task[None] | None = None
        self._events = asyncio.Queue[Event]()  # for the lifespan
        self._answers = asyncio.Queue[Event]()  # The lifespan gives them.
        self._shared: dict[str, Any] = {}  # Connections get it (ASGI, Lifespan).
        # Whose the lifespan's tasks are. They may wait for ever, as workers may.
        self.life: object = object()

    @property
    def hubs(self) -> list[Hub]:
        """The hubs that have started, in order."""
        return [*dict.fromkeys(each.hub for each in self.endpoints)]

    @property
    def hub(self) -> Hub:
        """The hub of the application's first `Pachinko`."""
        return self.endpoints[0].hub if self.endpoints else hub

    @property
    def codec(self) -> Codec:
        """What encodes its messages."""
        return self.hub.state.codec

    def __await__(self) -> Generator[Any, Any, Process]:
        return self.begin().__await__()

    async def __aenter__(self) -> Process:
        return await self.begin()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def begin(self) -> Process:
        """Start, if it has not begun. Raises `PachinkoError` if the application does not start."""
        async with self._starting:
            if self._app is None and not self._is_over:
                self.sim.check_in_use()
                app = self._make()
                if not callable(app):
                    raise PachinkoError(f"the function that makes the application returned {app!r}")
                self.sim.claim(self, app)
                self.sim.processes.append(self)
                self._app = app
                await self._tell("startup")
                self._is_up = True
            if self._is_over or not self._is_up:
                raise PachinkoError("this process has ended; await sim.process() starts another")
            return self

    def _start_hub(self, endpoint: Lifecycle) -> None:
        """Start the hub of *endpoint* with the simulation's broker, and note what it sends."""
        hub = endpoint.hub
        self.sim.claim(self, hub)
        if endpoint not in self.endpoints:
            self.endpoints.append(endpoint)
        link = self.sim.new_link(hub.state, self.hubs.index(hub))
        hub.state.start(endpoint, link)
        relay = hub.state.relay
        if relay not in self._links:
            self._links[relay] = link
            vars(relay)["send"] = functools.partial(self.sim.send, relay.send)

    async def _tell(self, what: Literal["startup", "shutdown"]) -> None:
        """Tell the application *what* happens. Raises `PachinkoError` if it answers that it failed.

        A server goes on if an application does not take the event (ASGI, Lifespan).
        """
        if self._lifespan is None:
            scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": self._shared}
            self._lifespan = asyncio.get_running_loop().create_task(
                self._app(scope, self._events.get, self._answers.put),
                context=self._context_of(self.life),
            )
        lifespan = self._lifespan
        self._events.put_nowait({"type": f"lifespan.{what}"})
        await self.sim.wait(
            lambda: not self._answers.empty() or lifespan.done(), None, f"the {what}",
            owner=self.life, hurries=self.sim.owns if what == "shutdown" else None,
        )  # fmt: skip
        exc = lifespan.exception() if lifespan.done() and not lifespan.cancelled() else None
        if not self._answers.empty():
            answer = self._answers.get_nowait()
            if answer["type"] == f"lifespan.{what}.failed":
                text = f"the {what} of the application has failed: {answer.get('message')}"
                raise PachinkoError(text) from exc
        elif not lifespan.done():
            raise self.sim.failure(f"the {what} does not end: {where(lifespan)}")
        elif exc is not None and self._events.empty():
            raise PachinkoError(f"the {what} of the application has failed: {exc!r}") from exc

    def _context_of(self, owner: object) -> contextvars.Context:
        """Return a context for code of the application, which says whose it is."""
        context = contextvars.copy_context()
        context.run(_simulation.set, owner)
        context.run(hub_starter.set, self._start_hub)
        return context

    async def connect(
        self, path: str, *, token: str | None = None,
        headers: Mapping[str, str] | Iterable[Header] | None = None,
        cookies: Mapping[str, str] | None = None, origin: str | None = None,
        query: str | Mapping[str, Any] | None = None, subprotocols: Iterable[str] = (),
        timeout: float | None = None,
    ) -> Client:  # fmt: skip
        """Connect a client to *path*; return it once it is in, behind its accepted handlers.

        *token* goes into ``Authorization: Bearer``. *query*: of the URL, also as a dict. Where the
        server waits for the client first, for a message ``authenticate`` say, it is returned, too.
        Raises `Refused`.
        """
        await self.begin()
        pairs: Any = headers.items() if isinstance(headers, Mapping) else headers or ()
        given: list[Header] = [*pairs]
        given += [("Authorization", f"Bearer {token}")] if token is not None else []
        given += [("Cookie", "; ".join(f"{k}={v}" for k, v in cookies.items()))] if cookies else []
        given += [("Origin", origin)] if origin is not None else []
        scope = {**scope_of(path, query, given, subprotocols), "state": {**self._shared}}
        client = Client(self, scope, f"#{next(self.sim.numbers)}")
        bugs = len(self.sim.known)
        self.sim.note(client.name, "→", f"GET {path}")
        client.begin(self._app, self._context_of(self.sim))
        self._clients.append(client)
        try:
            is_decided = functools.partial(self._is_decided, client)
            await self.sim.wait(is_decided, timeout, f"{client.name}'s handshake")
            self._check_in(client)
        except BaseException as exc:  # It is raised again.
            client.cut()
            if isinstance(exc, Refused) and self.sim.known[bugs:]:
                raise exc from self.sim.known[bugs]
            raise
        return client

    def _is_decided(self, client: Client) -> bool:
        """Tell whether *client* is in, or will never be."""
        found = (each.state.serving.get(client.task) for each in self.hubs)
        if (session := next(filter(None, found), None)) is not None:
            client.meet(session.conn)
            # Code that awaits the client's first message, a token, does not handle anything.
            is_in = client.is_accepted and (session.is_serving or not session.is_handling)
        else:  # With a hub, a middleware may have accepted what a Pachinko will serve.
            is_in = client.is_accepted and not self.endpoints
        return is_in or client.end is not None or client.task.done()

    def _check_in(self, client: Client) -> None:
        """Raise `Refused` if *client* is not in, and `AssertionError` if nobody answers it."""
        if client.refusal is not None:
            raise client.refusal
        if client.end is not None:
            raise Refused(None, *client.end)
        if client.task.done() and not client.is_accepted:
            exc = None if client.task.cancelled() else client.task.exception()
            raise Refused(500, None, "the application has not answered") from exc
        if not client.is_accepted:
            raise client.failure(f"nobody answers the handshake: {where(client.task)}")

    def kill(self) -> None:
        """End the process at once. None of its code learns of it; its clients get 1006."""
        self._is_over = True
        for link in filter(None, self._links.values()):
            link.kill()
        for client in self._clients:
            client.orphan()
        for each in self.endpoints:
            each.end_workers()

    async def stop(self) -> None:
        """Shut the process down, as a server does. The library's time limits come at once."""
        if self._app is None:
            return
        self._is_over, self._app = True, None
        tasks = [client.task for client in self._clients]
        try:
            for client in self._clients:
                if client.is_orphaned:
                    client.shut()
            if self._is_up:
                await self._tell("shutdown")
            for client in self._clients:
                client.shut()
            if not await self._wait_for(tasks):
                raise self.sim.failure("the application does not end")
        except AssertionError as exc:
            for task in tasks:
                if not task.done():
                    exc.add_note(f"does not end: {where(task)}")
            raise
        finally:
            tasks += [self._lifespan] if self._lifespan is not None else []
            for task in tasks:
                task.cancel()
            # An application without a lifespan, or one that has failed, has not stopped its hubs.
            ends = (each.process_shutdown(None, None) for each in self.endpoints if each.is_running)
            with contextlib.suppress(AssertionError):  # The test has been told.
                await self._wait_for([*tasks, *map(create_task, ends)])

    async def _wait_for(self, tasks: list[asyncio.Task[None]]) -> bool:
        are_done = lambda: all(task.done() for task in tasks)  # noqa: E731 - it is short
        return await self.sim.wait(are_done, None, "the end", hurries=self.sim.owns)


def where(task: asyncio.Task[Any]) -> str:
    """Return where *task* waits."""
    return place_in([*frames_of(task.get_coro())])


def scope_of(
    path: str, query: str | Mapping[str, Any] | None, headers: Sequence[Header],
    subprotocols: Iterable[str],
) -> Event:  # fmt: skip
    """Return the scope of a handshake (ASGI, WebSocket: Connection Scope)."""
    if not isinstance(path, str) or not path.startswith("/"):
        raise PachinkoError(f'a path has a leading slash: sim.connect("/ws"), got {path!r}')
    path, _, in_path = path.partition("?")
    if isinstance(query, Mapping):
        query = urllib.parse.urlencode(query, doseq=True)
    usual = [("Host", "localhost"), ("User-Agent", "pachinko")]
    if offered := texts(subprotocols, "subprotocols"):
        usual.append(("Sec-WebSocket-Protocol", ", ".join(offered)))
    try:
        names = {name.lower() for name, _ in headers}
        sent = [*(each for each in usual if each[0].lower() not in names), *headers]
        raw = [(n.lower().encode("latin-1"), v.encode("latin-1")) for n, v in sent]
    except (AttributeError, TypeError, ValueError):
        raise PachinkoError('a header is text: write headers={"X-Name": "value"}') from None
    return {
        "type": "websocket", "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1", "scheme": "ws",
        "server": ("localhost", 80), "client": ("127.0.0.1", 50_000),
        "root_path": "", "path": urllib.parse.unquote(path), "raw_path": path.encode(),
        "query_string": "&".join(filter(None, (in_path, query))).encode(), "headers": raw,
        "subprotocols": [*offered], "extensions": {"websocket.http.response": {}},
    }  # fmt: skip


# ── simulate ──────────────────────────────────────────────────────────────────────────────────
#
# A simulation is what a test has of an application: its processes, the broker between them, the
# time, a transcript, and the bugs.

_TRANSCRIPT = 100  # lines of a transcript that are kept
_END_LOOKS = 30_000  # looks at what goes on after the last frame was taken, as it may never rest
_TITLE = "Transcript (seconds, client, → to the server, ← from it, ✕ the end):"
_simulations: set[Simulation] = set()  # They are in use, in any thread.
_using = threading.Lock()


class Expected(contextlib.AbstractContextManager[list[BaseException]]):
    """The bugs that a test expects: of any of *classes*. `Simulation.bugs` returns it."""

    def __init__(self, classes: tuple[type[BaseException], ...]) -> None:
        self.classes: tuple[type[BaseException], ...] = classes
        self.found: list[BaseException] = []
        self._is_over = False  # The block has ended.

    def __enter__(self) -> list[BaseException]:
        return self.found

    def __exit__(self, *_: object) -> None:
        self._is_over = True

    def take(self, exc: BaseException) -> bool:
        """Note *exc* if it is expected. After the block, one is if none came before."""
        is_one = isinstance(exc, self.classes)  # a class may be that of a group
        is_one = is_one or all(isinstance(each, self.classes) for each in _errors_in(exc))
        is_taken = is_one and not (self._is_over and self.found)
        self.found += [exc] if is_taken else []
        return is_taken


@attrs.frozen
class Moved:
    """What `Simulation.advance` returns. Awaiting it settles."""

    _sim: Simulation

    def __await__(self) -> Generator[Any, Any, None]:
        return self._sim.settle().__await__()


class Simulation(Process):
    """A simulated application: its first process, and what all of them share. See `simulate`."""

    def __init__(self, app: Any, timeout: float) -> None:
        self.timeout: float = timeout
        self._factory = _factory_of(app)
        super().__init__(self, self._factory or (lambda: app))
        self.processes: list[Process] = []  # itself first
        self._owners: list[tuple[object, Process]] = []  # each part, an application or a hub
        self._broker: Any = None
        self.clients: list[Client] = []  # All processes add theirs.
        self.numbers: Iterator[int] = itertools.count(1)  # Clients get them, for transcripts.
        self._sent: list[tuple[str, bytes]] = []  # the groups and the frames
        self._lines = collections.deque[tuple[float, str, str, object]](maxlen=_TRANSCRIPT)
        self.known: list[BaseException] = []  # all bugs of the application
        self._bugs: list[tuple[str, BaseException]] = []  # Nobody expects these.
        self._early = 0  # how many of them came before the block began, as a worker's may
        self._expected: list[Expected] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._begun = time.monotonic()

    async def __aenter__(self) -> Simulation:
        if self._loop is not None:
            raise PachinkoError("a simulation runs once: write async with simulate(app) as sim")
        self._loop = asyncio.get_running_loop()
        _use_clock(self, True)
        bug_hooks.append(self.note_bug)
        try:
            await self.begin()
        except BaseException:  # It is raised again.
            await self._end()
            raise
        self._early = len(self._bugs)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        first, last = cast("BaseException | None", exc_info[1]), None
        transcript = self.transcript()  # without the lines of the end
        try:
            await self._end(settles=first is None)
        except Exception as exc:  # The test is told of it.
            last = exc
        if (failure := first or last) is not None:
            self._explain(failure, transcript)
        else:
            failure = self._verdict()
        if first is not None and last is not None:
            first.add_note(f"The end has failed, too: {last}".partition("\n")[0])
        if first is None and failure is not None:
            raise failure

    async def _end(self, settles: bool = False) -> None:
        """Stop all processes, whatever goes wrong with one of them, and let go of everything."""
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(bug_hooks.remove, self.note_bug)
            stack.callback(_use_clock, self, False)
            for process in self.processes:
                stack.push_async_callback(process.stop)
            if settles:  # What was sent last is handled. Nothing of the outside is waited for.
                looks = iter(range(_END_LOOKS, 0, -1))
                with contextlib.suppress(TimeoutError):
                    await watcher().wait(
                        lambda: not (any(map(Client.is_unread, self.clients)) or next(looks, 0)),
                        None, self.timeout,
                    )  # fmt: skip

    def _verdict(self) -> AssertionError | None:
        """Return the error of a test that has found no fault by itself, if there is a bug."""
        texts = [f"{what} has failed: {bug!r}" for what, bug in self._bugs] or [
            f"{' or '.join(cls.__name__ for cls in each.classes)} is expected, but none has come"
            for each in self._expected if not each.found
        ]  # fmt: skip
        if not texts:
            return None
        failure = self.failure("; ".join(texts))
        if len(self._bugs) > 1:
            failure.__cause__ = BaseExceptionGroup("bugs", [bug for _, bug in self._bugs])
        return failure

    def _explain(self, failure: BaseException, transcript: str) -> None:
        """Add to *failure*, with which the test fails, what it does not say."""
        for exc in _errors_in(failure):
            is_ours = isinstance(exc, (AssertionError, MessageError, Refused))
            if is_ours and _TITLE not in str(exc):
                exc.add_note(transcript)
        for what, bug in self._bugs:
            if bug is not failure.__cause__:
                text = "".join(traceback.format_exception(bug))
                failure.add_note(f"{what} has failed meanwhile:\n{text}")

    def __enter__(self) -> Any:
        with contextlib.ExitStack() as stack:
            thread = LoopThread()
            stack.callback(thread.stop)
            sim = stack.enter_context(thread.blocking(self))
            self._end_thread = stack.pop_all().__exit__
        return sim

    def __exit__(self, *exc: Any) -> None:
        self._end_thread(*exc)

    @property
    def broker(self) -> Any:
        """The broker between the processes. Its `lose` and `restore` are an outage of it."""
        if self._broker is None:
            self._broker = from_companion("SimulatedBroker", "sim.broker")()
        return self._broker

    def process(self) -> Process:
        """Start another process of the application, which `simulate` has a function for.

        Raises `PachinkoError` where it has none, and if the application has no hub of its own.
        """
        if self._factory is None:
            raise PachinkoError(
                "a second process needs a function that makes the application, with a hub of its "
                'own: write simulate(make_app), and in it Pachinko(app, "/ws", hub=Hub())'
            )
        return Process(self, self._factory)

    async def settle(self, *, timeout: float | None = None) -> None:
        """Wait until every frame is handled, every outbox is empty, and nothing can run.

        A stalled client's outbox, and workers that sleep, do not count. Raises `AssertionError`
        after *timeout* seconds, and names what waits for a timer, a thread or a socket.
        """
        await self.wait(never, timeout, "an end of all that runs")

    def advance(self, seconds: float) -> Moved:
        """Move the clock of the library: rates, time limits, `expires_at`, back-offs.

        What is in progress comes to rest first; then the clock goes from timer to timer; what
        clients send meanwhile waits for it. ``await`` settles, too. The clocks of the event loop
        and of the application stay. All simulations at a time have one clock.

        Raises `ValueError` unless *seconds* is a finite number, at least 0.
        """
        self.check_in_use()
        if not is_seconds(seconds):
            raise ValueError(f"seconds is a finite number, at least 0; got {seconds!r}")
        self.note("", "…", f"{seconds:g} s pass on the clock of the library")
        watcher().advance(seconds)
        return Moved(self)

    def published(self, group: str) -> list[Envelope]:
        """Return what was sent to *group* by hubs, of any process, in order."""
        frames = [frame for name, frame in self._sent if name == group]
        contents = [bytes(each) if type(each) is Binary else each.decode() for each in frames]
        return [read_frame(content, group)[0] for content in contents]

    def bugs(self, *classes: type[BaseException]) -> Expected:
        """Expect a bug of one of *classes* in the application: ``with sim.bugs(KeyError):``.

        Other bugs fail the test at the end of the simulation, and so does the lack of this one.
        It may come in the block, or later. Gives the list of those that have come.
        """
        if not all(isinstance(cls, type) and issubclass(cls, BaseException) for cls in classes):
            raise PachinkoError(f"write with sim.bugs(KeyError), classes of errors; got {classes}")
        expected = Expected(classes or (Exception,))
        self._expected.append(expected)
        early = [each for each in self._bugs[: self._early] if expected.take(each[1])]
        self._bugs = [each for each in self._bugs if each not in early]
        self._early -= len(early)
        return expected

    def transcript(self) -> str:
        """Return what has crossed the lines, with the seconds since the start."""
        lines = [
            f"{at:9.3f} {name} {arrow} {shorten(what)}" for at, name, arrow, what in self._lines
        ]
        return "\n".join([_TITLE, *lines])

    # What its clients and processes use

    async def wait(
        self, is_over: Callable[[], object], timeout: float | None, what: str, *,
        owner: object = None, hurries: Callable[[object], bool] | None = None,
    ) -> bool:  # fmt: skip
        """Return True once *is_over*, or False if nothing can make it so."""
        check_timeout(timeout)
        if is_over():  # What a client has got outlasts the simulation.
            return True
        self.check_in_use()
        seconds = self.timeout if timeout is None else timeout
        try:
            return await watcher().wait(is_over, owner or self, seconds, hurries)
        except TimeoutError as exc:
            late = str(exc)
        raise self.failure(f"{what} has not come within {seconds:g} s: {late}")

    def check_in_use(self) -> None:
        """Raise `PachinkoError` outside of the block."""
        if self not in _simulations or asyncio.get_running_loop() is not self._loop:
            raise PachinkoError(
                "a simulation is used inside of its block, async with simulate(app) as sim, and in "
                "the event loop that it was entered in"
            )

    def failure(self, text: str) -> AssertionError:
        """Return the error of a test that cannot go on."""
        error = AssertionError(f"{text}\n{self.transcript()}")
        error.__cause__ = self.latest_bug()
        return error

    def note(self, name: str, arrow: str, what: object) -> None:
        """Add a line to the transcript."""
        self._lines.append((time.monotonic() - self._begun, name, arrow, what))

    def send(
        self, send: Callable[..., Sending], kind: Kind, name: str, data: bytes, excluded: list[str]
    ) -> Sending:
        """Note a frame, and send it by a relay."""
        self._sent += [(name, data)] if kind is Kind.GROUP else []
        return send(kind, name, data, excluded)

    def note_bug(self, what: str, exc: BaseException) -> None:
        """Note a bug of the application, if it is this one's, unless the test expects it."""
        if not self._is_own() or any(exc is bug for bug in self.known):
            return  # Several parts of the library may tell of one.
        self.known.append(exc)
        if not any(expected.take(exc) for expected in self._expected):
            self._bugs.append((what, exc))

    def _is_own(self) -> bool:
        """Tell whether the code in progress is that of the application, or of no simulation."""
        if asyncio.get_running_loop() is not self._loop:
            return False
        owner, task = _simulation.get(), asyncio.current_task()
        if owner is None:  # Workers have an empty context.
            every = (each for sim in (*_simulations,) for each in sim.processes)
            has_it = (p for p in every if any(each.has_worker(task) for each in p.endpoints))
            owner = next((each.life for each in has_it), self)
        return self.owns(owner)

    def owns(self, owner: object) -> bool:
        """Tell whether code of *owner* is that of the application."""
        return owner in (self, *(each.life for each in self.processes))

    def latest_bug(self) -> BaseException | None:
        """Return the latest bug that nobody expects."""
        return self._bugs[-1][1] if self._bugs else None

    def claim(self, process: Process, part: object) -> None:
        """Raise `PachinkoError` if *part*, an application or a hub, is another process's."""
        if any(part is each and process is not owner for each, owner in self._owners):
            raise PachinkoError(
                "two processes never share an application or a hub, so that the function that "
                'makes the application makes a hub, too: Pachinko(app, "/ws", hub=Hub())'
            )
        self._owners.append((part, process))

    def new_link(self, state: HubState, number: int) -> Any:
        """Return the connection to the broker for the hub *number* of a process, or None.

        The hubs of one process are as far apart as they are without a broker.
        """
        given = state.choose()
        if isinstance(given, str) and _MEMORY.fullmatch(given):
            return None
        try:
            return self.broker.connection(str(number))
        except PachinkoError:
            if given is not None or self._factory is not None:
                raise
            return None  # The module is used alone.


def _factory_of(app: Any) -> Callable[[], App] | None:
    """Return *app* if it makes an application, or None if it is one."""
    if not inspect.iscoroutinefunction(app) and _takes(app):
        return cast(Callable[[], App], app)
    if _takes(app, "scope", "receive", "send"):
        return None
    raise PachinkoError(
        "write simulate(app), an ASGI application, or simulate(make_app), a function that returns "
        f"one and is not async; got {app!r}"
    )


def _takes(function: Any, *args: str) -> bool:
    try:
        inspect.signature(function).bind(*args)
    except (TypeError, ValueError):
        return False
    return True


def _use_clock(sim: Simulation, is_used: bool) -> None:
    """Let the library go by a clock that can be moved, while there is a simulation."""
    global clock  # noqa: PLW0603 - a program has one
    with _using:
        if is_used and not _simulations:
            clock = MovableClock()
        (_simulations.add if is_used else _simulations.discard)(sim)
        if not _simulations:
            clock = Clock()


class LoopThread:
    """An event loop in a thread of its own, for a test that has none."""

    def __init__(self) -> None:
        self._end, runner = asyncio.Event(), asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = runner.get_loop()
        self._thread = threading.Thread(target=self._run, args=[runner], daemon=True)
        self._thread.start()

    def _run(self, runner: asyncio.Runner) -> None:
        with runner:
            runner.run(self._end.wait())

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call *function* in the loop, and return what it returns, once that has been awaited."""

        async def work() -> Any:
            named = {name: target_of(value) for name, value in kwargs.items()}
            result = function(*map(target_of, args), **named)
            return await result if inspect.isawaitable(result) else result

        return self.blocking(asyncio.run_coroutine_threadsafe(work(), self._loop).result())

    def blocking(self, value: Any) -> Any:
        """Return *value*, or what calls its methods in the loop and waits for them."""
        if isinstance(value, (list, frozenset)):
            return type(value)(map(self.blocking, value))
        is_ours = isinstance(value, (Process, Client, Items, Listener, Hub, Connection))
        is_broker = type(value).__module__ == "pachinko_cluster"
        return Blocking(value, self) if is_ours or is_broker else value

    def stop(self) -> None:
        """End the loop, and the thread."""
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()


class Blocking:
    """Stands for an object of a simulation, in a test without an event loop."""

    def __init__(self, target: Any, thread: LoopThread) -> None:
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "thread", thread)

    def __repr__(self) -> str:
        return repr(self.target)

    def __eq__(self, other: object) -> bool:
        return self.target is target_of(other)

    def __hash__(self) -> int:
        return hash(self.target)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.target, name)
        if not inspect.isroutine(value):
            return self.thread.blocking(value)
        return functools.partial(self.thread.call, value)

    def __setattr__(self, name: str, value: object) -> None:
        self.thread.call(setattr, self.target, name, value)

    def __enter__(self) -> Any:
        return self.thread.call(self.target.__aenter__)

    def __exit__(self, *exc: object) -> None:
        self.thread.call(self.target.__aexit__, *exc)

    def __iter__(self) -> Blocking:
        return self

    def __next__(self) -> Any:
        try:
            return self.thread.call(self.target.__anext__)
        except StopAsyncIteration:
            raise StopIteration from None


def target_of(value: Any) -> Any:
    """Return what *value* stands for, or itself."""
    return value.target if isinstance(value, Blocking) else value


def simulate(app: Any, *, timeout: float = 5.0) -> Simulation:
    """Run an application in a test: ``async with simulate(app) as sim:``, without a socket.

    *app*: an ASGI application, or a function that makes one; `Simulation.process` calls it again.
    *timeout*: seconds that each wait may take; only an application that waits for the outside takes
    any. ``with simulate(app) as sim:`` has the same names, blocking.

    At the end the application is shut down. A bug in it fails the test then, unless
    `Simulation.bugs` expects it. Raises `PachinkoError` if the application does not start.
    """
    if not (is_seconds(timeout) and timeout > 0):
        raise ValueError(f"timeout is a number of seconds above 0, got {timeout!r}")
    return Simulation(app, timeout)
