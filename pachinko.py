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

The sections, each using only those above it: errors · envelope and message · codec · handlers
and routing · handshake · outbox and limits · connection · registry and relay · hub state · hub ·
dispatch · Pachinko. Brokers, and the shell command, are in the module `pachinko_cluster`.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import enum
import functools
import importlib
import inspect
import itertools
import logging
import math
import os
import random
import re
import secrets
import sys
import threading
import time
import traceback
import types
import typing
import urllib.parse
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Set,
)
from datetime import date, datetime, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from typing import Any, Literal, ParamSpec, TypeVar, Union, cast, get_args
from typing import get_origin as origin_of
from uuid import UUID

import attrs
import cattrs
import falcon
import falcon.asgi
import falcon.constants
import msgspec
from cattrs.gen import typeddicts
from msgspec import UNSET, UnsetType

__all__ = [
    "Backplane", "Close", "Connection", "Envelope", "Hub", "MessageError", "Pachinko",
    "PachinkoError", "hub", "message",
]  # fmt: skip
__version__ = "0.1.0"

logger: logging.Logger = logging.getLogger("pachinko")

T = TypeVar("T")
P = ParamSpec("P")
E = TypeVar("E", bound=BaseException)
F = TypeVar("F", bound=Callable[..., Any])
Id = str | int
Errors = list[dict[str, str]]  # of a payload: [{"path": "$.payload.n", "message": "…"}]
Hook = Callable[[Any, Any], Any]  # of cattrs: a value and the type to make of it
Writer = tuple[str, Callable[[Any], Any]]  # the type to send a value as, and what makes JSON of it
Namespaces = tuple[dict[str, Any], dict[str, Any]]  # the globals and locals annotations see
Event = dict[str, Any]  # to send, of ASGI: {"type": "websocket.send", "text": "…"}
Incoming = Mapping[str, Any]  # the same as it is received: {"type": "websocket.receive", …}

# ── errors ────────────────────────────────────────────────────────────────────────────────────
#
#   PachinkoError   the program's mistake: raised where it was made, mostly at registration
#   MessageError    the client's mistake: answered with an error, the connection stays open
#   Close           no mistake: a handler's way to end the connection

_REASON_BYTES = 123  # RFC 6455, 5.5: a control frame carries 125 bytes, two of them the code


class PachinkoError(Exception):
    """A mistake in the program that uses Pachinko, with the corrected code in its text."""


class BrokerAway(PachinkoError):
    """The broker between processes has not taken a message. It is no bug to be traced."""


class MessageError(Exception):
    """Raise it in a message handler to answer the client with an error of your own.

    The client gets ``{"type":"error","id":…,"payload":{"code":code,"message":message,…}}``, with
    *details* (JSON values) beside the two. The connection stays open.
    """

    def __init__(self, code: str, message: str = "", **details: Any) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.details = details


class Close(Exception):
    """Raise it in a handler to close this connection with *code* and *reason*.

    Raises `ValueError` for a *code* that an application may not send (RFC 6455, 7.4): it is 1000
    to 1003, 1007 to 1014, or 3000 to 4999; and for a *reason* of more than 123 bytes of UTF-8.
    """

    def __init__(self, code: int = 1000, reason: str = "") -> None:
        super().__init__(f"{code} {reason}")
        if not isinstance(code, int) or not isinstance(reason, str):
            raise TypeError(f'write Close(4000, "a reason"), got Close({code!r}, {reason!r})')
        if not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
            raise ValueError(f"{code} is no close code to send; use 1000, or 4000 to 4999")
        if len(reason.encode()) > _REASON_BYTES:
            raise ValueError(f"a close reason has at most {_REASON_BYTES} bytes, got {reason!r}")
        self.code = code
        self.reason = reason


# ── envelope and message ──────────────────────────────────────────────────────────────────────

_MAX_DEPTH = 128  # of arrays and objects in a frame; far below where recursive code gives up
_NOT_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[^][{}"]+', re.DOTALL)  # linear in any text
_RESERVED = frozenset({"error", "complete", "gap", "resume", "authenticate"})
_JSON_NAMES: dict[Any, str] = {dict: "object", list: "array", types.NoneType: "null"}


@attrs.frozen
class Envelope:
    """A message as middleware sees it."""

    type: str
    payload: Any
    """Structured to the handler's annotation; a dict by name for keyword-only parameters."""
    id: Id | None = None


class Frame(msgspec.Struct):
    """What a text frame holds. Keys that it does not know are ignored."""

    type: str
    id: Id | None = None
    payload: Any = UNSET


class Received(msgspec.Struct, gc=False):
    """A frame of a known type. Each type has a class of its own, made by `frame_class`."""

    is_built: typing.ClassVar[bool] = False
    """Whether the payload is what the handler takes, not plain JSON values."""
    quick: typing.ClassVar[Any] = None
    """The `Handler`, if it needs no more than to be called with such a payload."""
    id: Id | None = None
    payload: Any = UNSET


FrameClass = type[Received]


def frame_class(type: str, payload: Any) -> FrameClass:
    """The class of the frames of *type*; reading one builds the *payload* in the same pass.

    Raises `TypeError` for a *payload* that msgspec cannot read.
    """
    fields: list[tuple[str, Any, Any]] = [("payload", payload | UnsetType, UNSET)]
    bases = (Received,)
    cls = msgspec.defstruct("Received", fields, bases=bases, tag_field="type", tag=type, gc=False)
    msgspec.json.Decoder(cls)
    return cast(FrameClass, cls)


def decoder_of(frames: Iterable[FrameClass]) -> Callable[[str], Received]:
    """What reads a text frame as the one of *frames* that its type says."""
    # One is no handler's: msgspec lets a lone class do without its tag.
    return msgspec.json.Decoder(Union[(_no_frame, *frames)]).decode


class Sent(msgspec.Struct, omit_defaults=True, gc=False):
    """What goes out in a text frame. Defaults are left out."""

    type: str
    id: Id | None = None
    payload: Any = UNSET
    group: str | None = None
    more: bool = False


class BadFrame(MessageError):
    """A text frame that is no envelope; `id` is the one to answer with, where it had one."""

    id: Id | None = None


_no_frame = frame_class("$none", Any)
_decode_frame = msgspec.json.Decoder(Frame).decode
_decode_none = decoder_of(())
_encode = msgspec.json.Encoder().encode


def gap_of(group: str | None) -> bytes:
    """The frame that says that messages of *group* have been lost."""
    return _encode(Sent("gap", payload={"group": group}))


def decode(text: str) -> Frame:
    """Read one text frame, or raise `BadFrame` (``invalid_json`` or ``invalid_envelope``)."""
    if is_too_deep(text):
        raise BadFrame("invalid_json", f"nested deeper than {_MAX_DEPTH} levels")
    try:
        return _decode_frame(text)
    except (msgspec.MsgspecError, UnicodeError):
        raise _bad_frame(text) from None


def decode_or_error(text: str) -> Frame | BadFrame:
    """`decode`, with its error as a value: so it is not the context of what is raised later."""
    try:
        return decode(text)
    except BadFrame as bad:
        return bare(bad)


def bare(error: E) -> E:
    """*error* without where it comes from: that keeps frames, and these it, until a collection."""
    for inner in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        bare(inner)
    with contextlib.suppress(Exception):  # an application's exception may be frozen
        error.__cause__ = error.__context__ = error.__traceback__ = None
    return error


def is_too_deep(text: str) -> bool:
    """Whether *text*, if it is JSON, nests deeper than `_MAX_DEPTH`."""
    if text.count("[") + text.count("{") <= _MAX_DEPTH:
        return False
    steps = (1 if bracket in "[{" else -1 for bracket in _NOT_BRACKETS.sub("", text))
    return max(itertools.accumulate(steps), default=0) > _MAX_DEPTH


def _bad_frame(text: str) -> BadFrame:
    try:
        value = msgspec.json.decode(text)
    except UnicodeError:
        return BadFrame("invalid_json", "not valid UTF-8")
    except msgspec.MsgspecError as exc:
        return BadFrame("invalid_json", str(exc))
    if type(value) is not dict:
        text = f'a message is an object with a "type", got {json_name(value)}'
        return BadFrame("invalid_envelope", text)
    id = value.get("id")
    is_wrong = id is not None and type(id) not in (str, int)
    if not isinstance(value.get("type"), str):
        found = json_name(value["type"]) if "type" in value else "none"
        text = f'"type" is a string, got {found}'
    elif is_wrong:
        text = f'"id" is a string or an integer, got {json_name(id)}'
    else:  # the last of them would do
        text = '"type" or "id" is there twice'
    bad = BadFrame("invalid_envelope", text)
    bad.id = None if is_wrong else id
    return bad


def json_name(value: object) -> str:
    """What JSON calls the kind of *value*."""
    return _JSON_NAMES.get(type(value), type(value).__name__)


@typing.dataclass_transform(frozen_default=True, field_specifiers=(attrs.field,))
def message(type: str) -> Callable[[type[T]], type[T]]:
    """Tag a class as the message *type*, so that it can be received, returned and sent.

    A plain annotated class becomes `attrs.frozen`; an attrs class or a dataclass is only tagged.
    Raises `PachinkoError` for anything else.
    """
    if not isinstance(type, str):
        raise PachinkoError(f'@message takes a type; write @message("say") above {type!r}')
    check_type(type)
    namespaces = namespaces_at(sys._getframe(1))

    def tag(cls: Any) -> Any:
        if not inspect.isclass(cls):
            raise PachinkoError(f'@message("{type}") goes above a class, not above {cls!r}')
        if "__attrs_attrs__" not in vars(cls) and "__dataclass_fields__" not in vars(cls):
            cls = attrs.frozen(_check_plain(cls))
        setattr(cls, "__message_type__", type)  # noqa: B010 - it is declared on no class
        with contextlib.suppress(NameError):  # of a class further down: registration resolves it
            resolve_class(cls, *namespaces)
        return cls

    return tag


def _check_plain(cls: Any) -> Any:
    """Return *cls* if attrs can make a class of it; refuse what has its own idea of fields."""
    is_plain = type(cls).__module__ in ("builtins", "abc", "typing") and (
        "__init__" not in vars(cls)
        if attrs.has(cls)
        else cls.__init__ is object.__init__ and cls.__new__ is object.__new__
    )
    for name in vars(cls).get("__annotations__", {}):
        if isinstance(vars(cls).get(name), (list, dict, set)):
            raise PachinkoError(
                f"all messages would share the default of {cls.__name__}.{name}; write "
                f"`{name}: ... = attrs.field(factory={type(vars(cls)[name]).__name__})`"
            )
    if not is_plain:
        raise PachinkoError(
            f"@message cannot make an attrs class of {cls.__name__}, which has a constructor or "
            f"metaclass of its own; write a plain class, `class {cls.__name__}: text: str`, an "
            f"attrs class or a dataclass"
        )
    return cls


def check_type(type: str) -> None:
    """Raise `PachinkoError` for a message type that is empty or reserved for the library."""
    if not type or type in _RESERVED or type.startswith("$") or type.endswith(".reply"):
        raise PachinkoError(
            f'{type!r} is reserved, as are "", {", ".join(sorted(_RESERVED))}, "$…" and "….reply"; '
            f'choose another message type, such as "chat.say"'
            f"{', or write @ws.authenticate' if type == 'authenticate' else ''}"
        )


def message_type(cls: Any) -> str | None:
    """The type that *cls* itself was tagged with; a subclass does not inherit it."""
    return cast("str | None", getattr(cls, "__dict__", {}).get("__message_type__"))


def split_message(message: object, payload: object) -> tuple[str, object]:
    """The type and payload of what a ``send`` was given. Raises `TypeError` with a hint."""
    cls = type(message)
    tagged = message_type(cls)
    if tagged is not None and payload is None:
        return tagged, message
    if tagged is not None:
        raise TypeError(f"{cls.__name__} is a whole message; send it without a payload beside it")
    if not isinstance(message, str):
        raise TypeError(
            f'a message is an object of a class with @message("…"), or a type and its payload, as '
            f'in send("said", {{"text": "hi"}}); got {cls.__name__}'
        )
    if not message or (payload is None and any(map(str.isspace, message))):
        raise TypeError(f'{message!r} is no message type; write send("text", {message!r})')
    return message, payload


def namespaces_at(frame: types.FrameType) -> Namespaces:
    """Where the names in annotations are looked up for the code at *frame*."""
    return frame.f_globals, dict(frame.f_locals)


def resolve_class(cls: Any, globals_: dict[str, Any], locals_: dict[str, Any]) -> dict[str, Any]:
    """Turn a class's text annotations into types, in place, also with names local to a function.

    Returns the types by field name. Raises `NameError` for a name that is not found.
    """
    globals_ = {**globals_, **vars(sys.modules.get(cls.__module__, types))}
    if attrs.has(cls):
        attrs.resolve_types(cls, globals_, locals_, include_extras=True)
        hints = {field.name: field.type for field in attrs.fields(cls)}
        own = vars(cls).get("__annotations__", {})  # which is where msgspec looks
        own.update({name: hints[name] for name in own if name in hints})
        return hints
    hints = typing.get_type_hints(cls, globals_, locals_, include_extras=True)
    cls.__annotations__.update({name: hints[name] for name in cls.__annotations__})
    if dataclasses.is_dataclass(cls):  # which may have a ClassVar, an InitVar and a KW_ONLY
        fields = dataclasses.fields(cls)
        for field in fields:
            field.type = hints[field.name]
        hints = {field.name: hints[field.name] for field in fields}
    return hints


# ── codec ─────────────────────────────────────────────────────────────────────────────────────
#
# Payloads are structured by a cattrs converter that is strict: each JSON kind stands for itself,
# and nothing is coerced. A leaf goes through `msgspec.convert`, which gives one rule and one
# wording for all of them; what cattrs would iterate over whatever it is gets its kind checked.

_MAX_ERRORS = 100  # in one reply: a frame of max_size has room for hundreds of thousands
_MAX_EXPLAINED = 16_384  # bytes of JSON: to find all errors of 1 MiB blocks for seconds
_OTHER = "invalid value"  # also for a KeyError that is not cattrs' word for a missing key
_KEY_SHOWN = 64  # characters of a client's own key in a path
_LEAVES: set[Any] = {str, int, float, bool, types.NoneType, bytes, UUID, Decimal}.union(
    (datetime, date, time_of_day, timedelta)
)
_UNIONS: tuple[Any, ...] = (Union, types.UnionType)
_QUALIFIERS = (typing.Annotated, typing.Required, typing.NotRequired)


def strict_converter() -> cattrs.Converter:
    """A converter with the rules of the wire: aliases count, and no value changes its type."""
    converter = cattrs.Converter(use_alias=True)
    for leaf in _LEAVES:  # these hooks are also their subclasses': class Color(str, Enum)
        converter.register_structure_hook(leaf, msgspec.convert)
    converter.register_structure_hook_func(lambda t: t is object, lambda value, _: value)
    converter.register_structure_hook_factory(_is_leaf, _leaf_hook)
    converter.register_structure_hook_factory(lambda t: len(_kinds_of(t)) > 1, _union_hook)
    building: set[Any] = set()  # types whose hook cattrs is asked for just now, to be wrapped

    @converter.register_structure_hook_factory(lambda t: t not in building and bool(_kind_of(t)))
    def container_hook(t: Any, converter: cattrs.Converter) -> Hook:
        plain = _with_text_keys(t, converter)
        building.add(plain)
        try:
            inner = converter.get_structure_hook(plain, cache_result=False)
            return _container_hook(t, converter, inner)
        finally:
            building.discard(plain)

    converter.register_unstructure_hook_func(
        lambda t: t is object, lambda v: v if type(v) is object else converter.unstructure(v)
    )
    converter.register_unstructure_hook_factory(
        lambda t: origin_of(t) in _UNIONS, _union_unstructure_hook
    )
    converter.register_unstructure_hook_factory(typing.is_typeddict, _typeddict_unstructure_hook)
    return converter


def _class_of(t: Any) -> Any:
    """The class behind *t*, `list` for ``list[int]``, or None."""
    cls = origin_of(t) or t
    return cls if inspect.isclass(cls) and cls not in (Any, *_UNIONS) else None


def _is_leaf(t: Any) -> bool:
    """Whether *t* is written as one JSON scalar."""
    if origin_of(t) in _UNIONS:
        return all(map(_is_leaf, get_args(t)))
    is_enum = inspect.isclass(t) and issubclass(t, enum.Enum)
    return is_enum or origin_of(t) is Literal or t in _LEAVES


def _has_fields(t: Any) -> bool:
    cls = _class_of(t)
    return cls is not None and (attrs.has(cls) or dataclasses.is_dataclass(cls))


def _kind_of(t: Any) -> type | None:
    """Whether *t* is written as a JSON array (list), an object (dict), or as something else."""
    cls = _class_of(t)
    if cls is None:
        return dict if origin_of(t) in _UNIONS and all(map(_has_fields, get_args(t))) else None
    if _has_fields(t) or typing.is_typeddict(cls) or issubclass(cls, Mapping):
        return dict
    return list if issubclass(cls, (Sequence, Set)) and not _is_leaf(cls) else None


def _kinds_of(t: Any) -> dict[Any, Any]:
    """The members of the union *t* by what they are written as: null, array, object, or else."""
    kinds: dict[Any, Any] = {}
    for member in get_args(t) if origin_of(t) in _UNIONS and not _is_leaf(t) else ():
        kind = member if member is types.NoneType else _kind_of(member)
        kinds[kind] = kinds.get(kind, member) | member
    return kinds


def _union_hook(t: Any, converter: cattrs.Converter) -> Hook:
    """By the kind of the value. Of several classes, cattrs finds the one with its fields."""
    hooks = {kind: (converter.get_structure_hook(m), m) for kind, m in _kinds_of(t).items()}
    other = hooks.get(None) or next(iter(hooks.values()))

    def structure(value: Any, _: Any) -> Any:
        hook, member = hooks.get(type(value), other)
        return hook(value, member)

    return structure


def _leaf_hook(t: Any) -> Hook:
    """`Literal` and `Enum` go by value *and* type, for ``1 == True`` and ``1 == 1.0``."""
    members = get_args(t) if origin_of(t) in _UNIONS else (t,)
    leaves = tuple(member for member in members if member in _LEAVES)
    leaf: Any = Union[leaves] if leaves else None  # noqa: UP007 - of a tuple
    msgspec.json.Decoder(leaf)  # TypeError for a union that JSON cannot tell apart: UUID | datetime
    if leaves == members:
        return msgspec.convert
    named = [c for m in members if m not in leaves for c in get_args(m) or m]  # Literal or Enum
    values = [getattr(choice, "value", choice) for choice in named]
    choices = {(type(value), value): c for value, c in zip(values, named, strict=True)}
    names = [_encode(value).decode() for value in values]
    names += [_JSON_NAMES.get(leaf) or str(leaf.__name__) for leaf in leaves]

    def structure(value: Any, _: Any) -> Any:
        with contextlib.suppress(KeyError, TypeError):  # TypeError: not hashable
            return choices[type(value), value]
        with contextlib.suppress(msgspec.ValidationError):
            if leaves:
                return msgspec.convert(value, leaf)
        raise msgspec.ValidationError(f"expected one of {', '.join(names)}")

    return structure


def _with_text_keys(t: Any, converter: cattrs.Converter) -> Any:
    """``dict[int, …]`` with keys that are read from text: JSON has no others."""
    cls, args = _class_of(t), get_args(t)
    is_mapping = cls is not None and issubclass(cls, Mapping)
    if not is_mapping or len(args) != 2 or args[0] is str:
        return t
    hook = converter.get_structure_hook(args[0])

    def structure(key: Any, _: Any) -> Any:
        try:
            return hook(key, args[0])
        except msgspec.ValidationError:
            with contextlib.suppress(msgspec.DecodeError):
                return hook(msgspec.json.decode(key), args[0])
            raise

    key = cast(Any, typing.NewType)("key", args[0])
    converter.register_structure_hook(key, structure)
    return cast(Any, cls)[key, args[1]]


def _container_hook(t: Any, converter: cattrs.Converter, inner: Hook) -> Hook:
    """cattrs' hook for an array or object, behind a check that the value is one."""
    cls, args = _class_of(t), get_args(t)
    kind: Any = _kind_of(t)
    length = len(args) if origin_of(t) is tuple and Ellipsis not in args else None
    if cls is not None and attrs.has(cls):
        inner = _validating_hook(t, converter, inner)
    elif typing.is_typeddict(cls):
        inner = functools.partial(_structure_declared, cls.__annotations__, inner)

    def structure(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            text = f"expected {_JSON_NAMES[kind]}, got {json_name(value)}"
            raise msgspec.ValidationError(text)
        if length is not None and len(value) != length:
            raise msgspec.ValidationError(f"expected {length} items, got {len(value)}")
        return inner(value, t)

    return structure


def _structure_declared(declared: Collection[str], inner: Hook, value: Any, t: Any) -> Any:
    return {key: item for key, item in inner(value, t).items() if key in declared}


def _validating_hook(t: Any, converter: cattrs.Converter, inner: Hook) -> Hook:
    """attrs stops at the first validator that fails; so on failure, ask each about its field.

    Only fields without an error are structured again: however deep the value, twice in all.
    """
    cls = _class_of(t)
    fields = [f for f in attrs.fields(cls) if f.init and f.validator]
    fields = [f for f in fields if not isinstance(f.converter, attrs.Converter)]  # need an instance

    def refusal(field: Any, value: Any) -> Exception | None:
        try:
            item = converter.structure(value[field.alias], field.type)
            field.validator(None, field, field.converter(item) if field.converter else item)
        except (AttributeError, cattrs.StructureHandlerNotFoundError):
            return None  # it looks at the instance, or the type is generic: attrs' error remains
        except Exception as exc:  # a validator's own: reported as this field's
            error = ValueError(_OTHER) if isinstance(exc, KeyError) else exc
            note: Any = cattrs.AttributeValidationNote
            error.add_note(note("", field.name, field.type))
            return error
        return None

    def structure(value: Any, _: Any) -> Any:
        try:
            return inner(value, t)
        except cattrs.ClassValidationError as exc:
            notes = [n for e in exc.exceptions for n in getattr(e, "__notes__", ())]
            wrong = {n.name for n in notes if isinstance(n, cattrs.AttributeValidationNote)}
            asked = [f for f in fields if f.name not in wrong and f.alias in value]
            found = [error for f in asked if (error := refusal(f, value)) is not None]
            known = exc.exceptions if wrong or not found else ()  # else it is among those found
            raise exc.derive([*known, *found]) from None

    return structure if fields else inner


def _union_unstructure_hook(t: Any, converter: cattrs.Converter) -> Callable[[Any], Any]:
    """As the declared member: only its fields go out, also when the value is a subclass's."""
    return lambda value: converter.unstructure(value, declared_member(value, t))


def declared_member(value: object, t: Any) -> Any:
    """Which member of the union *t*, or *t* itself, *value* goes out as; else its own class."""
    members = [
        (m, dict if typing.is_typeddict(cls) else cls)
        for m in (get_args(t) if origin_of(t) in _UNIONS else (t,))
        if (cls := _class_of(getattr(m, "__origin__", m)))  # __origin__: list[int], Annotated
    ]
    exact = [m for m, cls in members if cls is type(value)]
    bases = [m for m, cls in members if isinstance(value, cls)]
    return (exact or bases or [type(value)])[0]


def _typeddict_unstructure_hook(t: Any, converter: cattrs.Converter) -> Callable[[Any], Any]:
    inner = typeddicts.make_dict_unstructure_fn(t, converter)
    declared = _class_of(t).__annotations__
    return lambda value: inner({key: value[key] for key in value if key in declared})


def explain(exc: BaseException, path: str = "$.payload") -> Iterator[dict[str, str]]:
    """Each wrong field under *exc* as ``{"path", "message"}``, without a word about the server."""
    if isinstance(exc, cattrs.BaseValidationError):
        for inner in exc.exceptions:
            is_other = isinstance(inner, KeyError) and not hasattr(inner, "__notes__")
            step = _path_step(inner, exc.cl)
            yield from explain(ValueError(_OTHER) if is_other else inner, path + step)
        return
    text = _OTHER
    if isinstance(exc, msgspec.ValidationError):
        text = str(exc).replace("`", "")
        text = text[:1].lower() + text[1:]
    elif isinstance(exc, KeyError):
        text = "required, but missing"
    elif isinstance(exc, cattrs.ForbiddenExtraKeysError):
        text = f"unknown: {', '.join(sorted(exc.extra_fields))}"
    elif isinstance(exc, (ValueError, TypeError)) and exc.args and isinstance(exc.args[0], str):
        text = exc.args[0]  # a validator's words; attrs puts its Attribute and the value behind
    elif isinstance(exc, RecursionError):
        text = "nested too deeply"
    yield {"path": path, "message": text}


def _explained(exc: BaseException) -> Errors:
    """What `invalid_payload` takes: one more than it shows tells that there are more."""
    errors = list(itertools.islice(explain(exc), _MAX_ERRORS + 1))
    bare(exc)
    return errors


def _path_step(exc: BaseException, cls: Any) -> str:
    """Where under its parent *exc* happened: ``.field``, ``[3]``, ``["key"]``, or not known."""
    names = [arg.name for arg in exc.args if isinstance(arg, attrs.Attribute)]
    for note in getattr(exc, "__notes__", ()):
        if isinstance(note, cattrs.IterableValidationNote):
            index = note.index
            return f"[{index}]" if type(index) is int else f'["{str(index)[:_KEY_SHOWN]}"]'
        if isinstance(note, cattrs.AttributeValidationNote):
            names = [note.name]
    if not names:
        return ""
    fields = attrs.fields_dict(_class_of(cls)) if attrs.has(_class_of(cls)) else {}
    return f".{fields[names[0]].alias if names[0] in fields else names[0]}"


# What makes an object of a class that has no code of its own for it: what Python has, and what
# attrs and dataclasses write, by the names of its code.
_GENERATED: set[Any] = {
    type.__call__, object.__new__, object.__setattr__, object.__getattribute__,
    "__init__", "_frozen_setattrs", "_ClassBuilder.add_setattr.<locals>.__setattr__",
    "__create_fn__.<locals>.__init__", "__create_fn__.<locals>.__setattr__",
}  # fmt: skip


def is_read_alike(t: Any, seen: list[Any] | None = None) -> bool:
    """Whether msgspec reads *t* from JSON as the strict converter structures it.

    Only what is known to be so; the rest is left to cattrs. *seen*: the classes looked at before.
    """
    seen = [] if seen is None else seen
    origin, args = origin_of(t) or t, get_args(t)
    if t is Any or t in seen or (t in _LEAVES and t is not Decimal):  # by way of a float
        return True
    if origin is Literal:
        return all(type(choice) is str for choice in args)
    if inspect.isclass(t) and issubclass(t, enum.Enum):
        own, default = (inspect.getattr_static(c, "_missing_") for c in (t, enum.Enum))
        if own is not default:
            return False
        values = [member.value for member in t]  # and some may have aliases
        return all(type(v) is str for v in values) and values == [*t._value2member_map_]
    if origin is dict:
        return args[:1] in ((), (str,)) and all(is_read_alike(arg, seen) for arg in args)
    if origin in (list, set, frozenset, tuple, *_UNIONS):
        return all(arg is Ellipsis or is_read_alike(arg, seen) for arg in args)
    if not inspect.isclass(t):
        return False
    seen.append(t)
    types = _types_of_fields(t)
    return types is not None and all(is_read_alike(u, seen) for u in types)


def _types_of_fields(cls: Any) -> Iterable[Any] | None:
    """The types of the fields of *cls*, or None if its own code has a say in what they get."""
    if typing.is_typeddict(cls):
        keys = {typing.Required: cls.__required_keys__, typing.NotRequired: cls.__optional_keys__}
        hints = cls.__annotations__
        if any(key not in keys.get(origin_of(t), hints) for key, t in hints.items()):
            return None  # Python has not seen it in an annotation that was text, nor does cattrs
        return [get_args(t)[0] if origin_of(t) in keys else t for t in hints.values()]
    if not _is_made_plainly(cls):
        return None
    try:
        hints = typing.get_type_hints(cls, include_extras=True)  # which is what msgspec sees
    except (NameError, TypeError, AttributeError):  # in a base class, names of a function
        return None
    fields: Any = attrs.fields(cls) if attrs.has(cls) else dataclasses.fields(cls)
    is_plain = all(
        f.init and f.type == hints.get(f.name) and getattr(f, "alias", f.name) == f.name
        and not (getattr(f, "converter", None) or getattr(f.default, "takes_self", False))
        # msgspec sets no default where the class has an attribute: of a base, or a dataclass's own.
        and (not hasattr(cls, f.name) or inspect.ismemberdescriptor(getattr(cls, f.name)))
        for f in fields
    )  # fmt: skip
    return [f.type for f in fields] if is_plain else None


def _is_made_plainly(cls: Any) -> bool:
    """Whether to make an object of *cls* is to set the fields of an attrs class or a dataclass."""
    kinds = [k for k in ("__attrs_attrs__", "__dataclass_fields__") if hasattr(cls, k)]
    if len(kinds) != 1 or inspect.isabstract(cls):
        return False
    init, others = vars(cls).get("__init__"), (cls.__new__, cls.__setattr__, cls.__getattribute__)
    makers = (type(cls).__call__, init, *others)
    names = {m.__code__.co_qualname if inspect.isfunction(m) else m for m in makers}
    if not names <= _GENERATED or hasattr(cls, "__getattr__"):
        return False
    used = {*init.__code__.co_names, *init.__code__.co_consts}
    return used.isdisjoint(("__attrs_pre_init__", "_attrs_cached_hash"))


class Codec:
    """From JSON values to what handlers take, and from what they return to the text of a frame."""

    def __init__(self, converter: cattrs.Converter | None = None) -> None:
        self.converter: cattrs.Converter = strict_converter() if converter is None else converter
        self._hasty = self.converter
        if converter is None:  # one that stops at the first error, for what is nearly always valid
            self._hasty = self.converter.copy(detailed_validation=False)

    def frame_class(self, type: str, annotation: Any) -> FrameClass:
        """The class of the frames of *type*, which if it can be builds the payload.

        That takes one pass; msgspec and then cattrs take four times as long or more.
        """
        with contextlib.suppress(TypeError, NameError, NotImplementedError):
            if self._hasty is not self.converter and is_read_alike(annotation):
                cls = frame_class(type, annotation)
                cls.is_built = True
                return cls
        return frame_class(type, Any)

    def check(self, annotation: Any, namespaces: Namespaces, seen: list[Any]) -> None:
        """Resolve *annotation* and all that it contains; raise whatever keeps it from working."""
        if (
            annotation in seen
            or isinstance(annotation, TypeVar)
            or origin_of(annotation) is Literal
        ):
            return
        seen.append(annotation)
        is_qualified = origin_of(annotation) in _QUALIFIERS
        for member in get_args(annotation)[:1] if is_qualified else get_args(annotation):
            self.check(member, namespaces, seen)
        cls = _class_of(annotation)
        if _has_fields(cls) or typing.is_typeddict(cls) or hasattr(cls, "_field_defaults"):
            for field_type in resolve_class(cls, *namespaces).values():
                self.check(field_type, namespaces, seen)
        is_generic = bool(getattr(annotation, "__parameters__", ()))
        if is_generic and annotation is cls:
            raise TypeError(f"{cls.__name__} is generic; write {cls.__name__}[int], say")
        if annotation not in (Any, Ellipsis) and not is_qualified and not is_generic:
            self.converter.get_structure_hook(annotation)

    def structure(self, payload: Any, annotation: Any, type: str) -> Any:
        """Build what a handler takes, or raise `MessageError` (``invalid_payload``)."""
        if annotation is Any:
            return payload
        try:
            return self._hasty.structure(payload, annotation)
        except (Exception, SystemExit) as exc:  # a user's hook or validator may raise anything
            errors = _explained(exc)
        try:
            if self._hasty is not self.converter and len(_encode(payload)) <= _MAX_EXPLAINED:
                # Which may succeed: cattrs' hasty way fails at a keyword-only field before others.
                return self.converter.structure(payload, annotation)
        except (Exception, SystemExit) as exc:  # the same, and with every wrong field
            errors = _explained(exc)
        raise invalid_payload(type, errors)

    def writer_of(self, value: object, type: str, declared: Any = None) -> Writer:
        """How to answer with *value* and others of its class, as *declared* where given.

        They go under their own type if they have one, else under *type*.
        """
        if value is None:
            return type, lambda _: UNSET
        shape = declared_member(value, declared)
        own_type = message_type(_class_of(shape))
        return own_type or type, self.converter.get_unstructure_hook(shape)

    def encode(self, type: str, payload: Any, group: str | None = None) -> bytes:
        """The frame for *payload*."""
        payload = UNSET if payload is None else self.converter.unstructure(payload)
        return _encode(Sent(type, group=group, payload=payload))


def invalid_payload(type: str, errors: Errors) -> MessageError:
    """The error for a payload, with at most `_MAX_ERRORS` of what is wrong in it."""
    if len(errors) > _MAX_ERRORS:
        errors[_MAX_ERRORS:] = [{"path": "$.payload", "message": "and more"}]
    first = f"{errors[0]['path']}: {errors[0]['message']}"
    return MessageError("invalid_payload", f"{type}: {first}", errors=errors)


# ── handlers and routing ──────────────────────────────────────────────────────────────────────
#
# Everything about a function is settled when it is registered: what it takes, how its payload is
# structured, whether it streams. A message in flight only looks its handler up and calls it.

_VERBS = set(falcon.constants.COMBINED_METHODS) - {"CONNECT"}  # which nobody routes
_ROUTED_BY_FALCON = {f"on_{verb.lower()}" for verb in _VERBS}
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_EMPTY = inspect.Parameter.empty


@attrs.frozen(eq=False)
class Handler:
    """A message handler as it was registered."""

    type: str
    function: Callable[..., Any]
    call: Callable[[Connection, Any], Any]
    """Calls it with the payload: a coroutine, or for a stream an async generator."""
    annotation: Any
    """What the payload is structured to; for fields, a typed dict made of the parameters."""
    parameter: inspect.Parameter | None
    """The one that takes the whole payload."""
    defaults: dict[str, Any] | None
    """Of the parameters that take the payload's fields, if there are any."""
    returns: Any
    """The declared type of a reply or of a stream's item, or None."""
    streams: bool
    concurrent: bool
    writers: dict[Any, Writer] = attrs.Factory(dict)
    """How what it has returned before is written, by class."""

    @property
    def takes_payload(self) -> bool:
        """Whether its function has a parameter for the payload, or several for its fields."""
        return self.parameter is not None or self.defaults is not None

    def structure(self, payload: Any, codec: Codec) -> Any:
        """The value to call it with, or `MessageError` (``invalid_payload``).

        *payload* is `UNSET` where the message had none.
        """
        if payload is not UNSET:
            self._hint(payload)
            return codec.structure(payload, self.annotation, self.type)
        if self.defaults is not None:
            return codec.structure({}, self.annotation, self.type)
        if self.parameter is None or self.parameter.default is not _EMPTY:
            return self.parameter and self.parameter.default
        try:  # a null stands in for it where the annotation admits one
            return codec.structure(None, self.annotation, self.type)
        except MessageError:
            missing = [{"path": "$.payload", "message": "required, but missing"}]
            raise invalid_payload(self.type, missing) from None

    def refusal(self, payload: Any, codec: Codec, exc: Exception) -> MessageError:
        """Why msgspec, with *exc*, has not built the payload: every wrong field, says cattrs.

        Where cattrs finds none, msgspec's word counts, which names the first.
        """
        try:
            self.structure(payload, codec)
        except MessageError as error:
            return bare(error)
        text, _, path = str(exc).rpartition(" - at ")
        if path == "`$.type`":  # which cannot be, unless another one came first
            return MessageError("invalid_envelope", '"type" is there twice')
        found = explain(msgspec.ValidationError(text), path.strip("`")) if text else explain(exc)
        return invalid_payload(self.type, list(found))

    def _hint(self, payload: Any) -> None:
        name = self.parameter.name if self.parameter is not None else None
        if type(payload) is dict and name in payload and self.annotation in _LEAVES:
            _log_star(self, name)


@functools.cache  # once a handler
def _log_star(handler: Handler, name: str) -> None:
    logger.warning(
        "%s got an object with the key %r as its whole payload; (conn, *, %s) was probably meant",
        place_of(handler.function), name, handler.parameter, extra={"message_type": handler.type},
    )  # fmt: skip


def place_of(function: Callable[..., Any]) -> str:
    """``say() at chat.py:12``, for messages about a function."""
    inner: Any = inspect.unwrap(function)
    while isinstance(inner, functools.partial):
        inner = inner.func
    code = getattr(inner, "__code__", None)
    where = f" at {code.co_filename}:{code.co_firstlineno}" if code else ""
    return f"{getattr(inner, '__qualname__', inner)}(){where}"


def check_function(
    function: Any, example: str, takes: int | None, *, streams: bool = False
) -> None:
    """Refuse what is not async or cannot take *takes* values, with *example* as the right code."""
    refused = None
    if not callable(function):
        raise PachinkoError(f"expected a function, got {function!r}; write\n{example}")
    if inspect.isasyncgenfunction(function):
        refused = None if streams else "has a `yield`, but only message handlers stream"
    elif not inspect.iscoroutinefunction(function):
        refused = "is not async"
        with contextlib.suppress(ValueError, TypeError):  # of what has no signature
            name = getattr(function, "__name__", "handler")
            first = example.partition("\n")[0]
            example = f"{first}\nasync def {name}{inspect.signature(function)}: ..."
    if refused is None and takes is not None:
        try:
            inspect.signature(function).bind(*range(takes))
        except TypeError as exc:
            refused = f"takes the wrong parameters: {exc}"
    if refused is not None:
        raise PachinkoError(f"{place_of(function)} {refused}; write\n{example}")


def read_handler(
    type: str,
    function: Callable[..., Any],
    codec: Codec,
    namespaces: Namespaces,
    message_class: Any,
    path_params: Collection[str],
    concurrent: bool,
) -> Handler:
    """Apply the signature rule to *function*, or raise `PachinkoError` with the corrected code."""
    name = getattr(function, "__name__", "handler")
    check_function(function, f'@ws.on("{type}")\nasync def {name}(conn): ...', None, streams=True)
    payload, fields = _split_parameters(function, name, path_params)
    inner: Any = inspect.unwrap(function)
    try:
        globals_, locals_ = namespaces
        globals_ = {**globals_, **getattr(inner, "__globals__", {})}
        hints = typing.get_type_hints(
            getattr(inner, "func", inner), globals_, locals_, include_extras=True
        )
        _check_first(function, name, hints)
        annotation = hints.get(payload.name, message_class or Any) if payload else Any
        if fields:
            members = {p.name: _field_of(p, hints.get(p.name, Any)) for p in fields}
            annotation = cast(Any, typing.TypedDict)(name, members)
        codec.check(annotation, namespaces, [])
    except (NameError, TypeError, ValueError, cattrs.StructureHandlerNotFoundError) as exc:
        raise _unstructurable(function, exc) from exc
    if payload and message_class and annotation is not message_class:
        write = f"async def {name}(conn, {payload.name}: {message_class.__name__})"
        raise PachinkoError(f"{place_of(function)} handles {message_class.__name__}; write {write}")
    streams, returns = inspect.isasyncgenfunction(function), hints.get("return")
    if streams and get_args(returns):  # AsyncIterator[Item], AsyncGenerator[Item, None]
        returns = get_args(returns)[0]
    call: Callable[[Connection, Any], Any] = function
    if fields:
        call = lambda conn, value: function(conn, **value)  # noqa: E731 - one of three
    elif payload is None:
        call = lambda conn, _: function(conn)  # noqa: E731 - the same
    defaults = {p.name: p.default for p in fields if p.default is not _EMPTY} if fields else None
    returns = None if returns in (types.NoneType, Any, object) else returns
    return Handler(
        type, function, call, annotation, payload, defaults, returns, streams, concurrent
    )


def _unstructurable(function: Callable[..., Any], exc: Exception) -> PachinkoError:
    why: Any = exc
    if isinstance(exc, cattrs.StructureHandlerNotFoundError):
        why = f"put @attrs.frozen above {getattr(exc.type_, '__qualname__', exc.type_)}"
    return PachinkoError(
        f"the payload of {place_of(function)} cannot be structured: {why}. Define or import names "
        f"above the handler; use attrs classes, dataclasses, TypedDict and the standard library's "
        f"types, or give hub.configure(converter=...) a hook before this handler"
    )


def _check_first(function: Callable[..., Any], name: str, hints: dict[str, Any]) -> None:
    """Refuse a first parameter that is annotated as a payload: the connection was forgotten."""
    first = next(iter(inspect.signature(function).parameters.values()))
    t = hints.get(first.name)
    if t in _LEAVES - {types.NoneType} or t in (dict, list) or message_type(t) is not None:
        raise PachinkoError(
            f"{place_of(function)} takes `{first}` first, where the connection comes; write "
            f"`async def {name}(conn, {first})`"
        )


def _field_of(parameter: inspect.Parameter, annotation: Any) -> Any:
    return annotation if parameter.default is _EMPTY else cast(Any, typing.NotRequired)[annotation]


def _split_parameters(
    function: Callable[..., Any], name: str, path_params: Collection[str]
) -> tuple[inspect.Parameter | None, list[inspect.Parameter]]:
    """The payload parameter and the keyword-only ones: at most one of the two kinds."""
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in _POSITIONAL]
    fields = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    variadic = [p for p in parameters if p.kind in _VARIADIC]
    from_path = [p.name for p in parameters[1:] if p.name in path_params]
    names = ", ".join(map(str, positional[1:]))
    refused = None
    if not positional:
        own = "self, " if inspect.ismethod(function) else ""
        refused = f"takes no connection; write `async def {name}({own}conn, ...)`"
    elif from_path:
        refused = (
            f"takes {from_path[0]!r}, a path parameter, which only connect handlers get; "
            f"use `conn.params['{from_path[0]}']`"
        )
    elif variadic:
        refused = f"takes {variadic[0]}; name it: `(conn, *, text: str)` or `(conn, payload: dict)`"
    elif len(positional) > 2:
        refused = f"takes more than one payload; for its fields write `(conn, *, {names})`"
    elif len(positional) == 2 and fields:
        refused = (
            f"takes the payload whole and by fields; write `(conn, {names})` or "
            f"`(conn, *, {', '.join(map(str, fields))})`"
        )
    if refused is not None:
        raise PachinkoError(f"{place_of(function)} {refused}")
    return (positional[1] if len(positional) == 2 else None), fields


def path_parameters(path: str) -> list[str]:
    """The names in a Falcon URI template: ``/ws/{room}/{n:int}`` gives room and n."""
    return re.findall(r"\{([a-zA-Z_]\w*)", path)


def read_connect(function: Callable[..., Any], path: str | None) -> Callable[..., Awaitable[None]]:
    """Check a connect handler against *path*; return how to call it with the path's parameters."""
    known = path_parameters(path or "")
    example = f"@ws.connect\nasync def arrive({', '.join(['conn', *known])}): ..."
    check_function(function, example, None)
    parameters = list(inspect.signature(function).parameters.values())
    takes_all = bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    first, named = parameters[:1], parameters[1 : -1 if takes_all else None]
    unknown = [p for p in named if path and p.name not in known and p.default is _EMPTY]
    bad = [p for p in named if p.kind in (p.POSITIONAL_ONLY, *_VARIADIC)] or unknown
    if not first or first[0].kind not in _POSITIONAL or bad:
        what = f"takes {', '.join(map(str, bad))}" if bad else "takes no connection"
        has = f"{path} has {', '.join(known) or 'no parameters'}; " if path else ""
        raise PachinkoError(f"{place_of(function)} {what}; {has}write\n{example}")
    names, own = {p.name for p in named}, first[0].name

    def call(conn: Connection) -> Awaitable[None]:
        params = conn.params.items()
        wanted = {k: v for k, v in params if k in names or (takes_all and k != own)}
        return cast(Awaitable[None], function(conn, **wanted))

    return call


def read_resource(prefix: str, resource: object) -> list[tuple[str, Callable[..., Any]]]:
    """The ``on_<name>`` methods of *resource*, each with the name that follows ``on_``."""
    cls = type(resource)
    names = [name for name in dir(resource) if name.startswith("on_")]
    refused = None
    if not isinstance(prefix, str) or not prefix:
        refused = f'a prefix is a text, got {prefix!r}; write ws.add_resource("chat", resource)'
    elif inspect.isclass(resource):
        name = resource.__name__
        refused = f'one instance serves all; write ws.add_resource("{prefix}", {name}())'
    elif not names:
        write = f"class {cls.__name__}:\n    async def on_send(self, conn, *, text: str): ..."
        refused = f"{cls.__name__} has no method to route; write\n{write}"
    for name in () if refused else names:
        if name in _ROUTED_BY_FALCON:
            refused = f"Falcon routes {cls.__name__}.{name} itself; call it {name}_message, say"
        elif isinstance(inspect.getattr_static(resource, name), property):
            refused = f"{cls.__name__}.{name} is a property; write async def {name}(self, conn)"
    if refused is not None:
        raise PachinkoError(refused)
    return [(name.removeprefix("on_"), getattr(resource, name)) for name in names]


@attrs.define(eq=False)
class Routes:
    """What one endpoint has registered."""

    authenticate: Callable[..., Awaitable[str | None]] | None = None
    connect: list[Callable[..., Awaitable[None]]] = attrs.Factory(list)
    handlers: dict[str, Handler] = attrs.Factory(dict)
    disconnect: list[Callable[..., Awaitable[None]]] = attrs.Factory(list)
    fallback: Callable[..., Awaitable[Any]] | None = None
    binary: Callable[..., Awaitable[Any]] | None = None
    middleware: list[Callable[..., Awaitable[Any]]] = attrs.Factory(list)
    errors: dict[type[Exception], Callable[..., Awaitable[Any]]] = attrs.Factory(dict)
    workers: list[Callable[[], Awaitable[None]]] = attrs.Factory(list)
    decode: Callable[[str], Received] = _decode_none
    """Reads a text frame of a known type. What it raises, a validator may have raised."""
    by_frame: dict[FrameClass, Handler] = attrs.Factory(dict)
    """The handlers of what it reads."""

    def start(self, codec: Codec) -> None:
        """Make the classes of all frames, now that the codec is settled."""
        self.by_frame = {}
        for handler in self.handlers.values():
            self.add_frame(handler, codec)

    def add_frame(self, handler: Handler, codec: Codec) -> None:
        """Make the class of the frames for *handler*."""
        handler.writers.clear()
        self.by_frame[codec.frame_class(handler.type, handler.annotation)] = handler
        self.decode = self._decode_first

    def _decode_first(self, text: str) -> Received:
        """Make the decoder, once for all handlers and middleware that have come together."""
        self.decode = decoder_of(self.by_frame)
        for frame, handler in self.by_frame.items():
            is_quick = not (self.middleware or handler.streams or handler.concurrent)
            frame.quick = handler if frame.is_built and is_quick else None
        return self.decode(text)

    def error_handler(self, exc: BaseException) -> Callable[..., Awaitable[Any]] | None:
        """The handler for the class nearest to *exc*'s own, unless the library's own is nearer."""
        built_in = (MessageError, Close, falcon.HTTPError, falcon.WebSocketDisconnected)
        for cls in type(exc).__mro__:
            if cls in self.errors:
                return self.errors[cls]
            if cls in built_in:
                break
        return None


def refuse_second(first: Callable[..., Any] | None, second: Any, what: str) -> None:
    """Raise `PachinkoError` that names both functions when there is a *first* one already."""
    if first is not None:
        raise PachinkoError(
            f"{what} has a handler: {place_of(first)}; and a second: {place_of(second)}. "
            f"Remove one, or let it handle another type"
        )


# ── handshake ─────────────────────────────────────────────────────────────────────────────────
#
# Who may connect, told from the headers of the handshake alone. A browser sends the cookies of a
# site with a handshake that any other site's page has begun, and leaves it to the server to look at
# the `Origin` (RFC 6455, 10.2). What is no browser may send any origin it likes, or none.

_NAME = r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?"
_AUTHORITY = rf"(?P<host>\[[0-9a-f:.]+\]|{_NAME})(?::(?P<port>[0-9]{{1,5}}))?"
_HOST = re.compile(_AUTHORITY, re.ASCII)
_ORIGIN = re.compile(rf"(?P<scheme>[a-z][a-z0-9+.-]*)://{_AUTHORITY}", re.ASCII)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_SHOWN = 200  # characters of a header in a log line; it may have thousands
UNAUTHENTICATED = 3401  # the close code: 3000 and the HTTP status


@attrs.frozen
class Origin:
    """Where a page comes from (RFC 6454), in lower case and with the port of its scheme."""

    scheme: str
    host: str
    port: int | None

    def is_below(self, other: Origin) -> bool:
        """Whether its host is a subdomain of the host of *other*, and all else is the same."""
        is_alike = (self.scheme, self.port) == (other.scheme, other.port)
        return is_alike and self.host.endswith("." + other.host)


def parse_origin(text: str) -> Origin | None:
    """Read an ``Origin`` header; None for ``null`` and for what is no origin."""
    match = _ORIGIN.fullmatch(text.lower()) if text.isascii() else None
    if match is None or int(match["port"] or 0) > 65_535:
        return None
    scheme, host, port = match.group("scheme", "host", "port")
    return Origin(scheme, host, int(port) if port else _DEFAULT_PORTS.get(scheme))


def is_same_host(origin: Origin, scheme: str, host: str) -> bool:
    """Whether a page of *origin* belongs to the *host* (as in that header) it connects to.

    Where one of the two names no port, it is that of the origin's scheme. An ``https`` page may
    come by a *scheme* that is not encrypted, since a proxy may have decrypted it; but no ``http``
    page by an encrypted one: whoever sits on the line could have written that page.
    """
    match = _HOST.fullmatch(host.lower())
    default = _DEFAULT_PORTS.get(origin.scheme)
    if match is None or default is None:
        return False
    if origin.scheme == "http" and scheme in ("https", "wss"):
        return False
    return (match["host"], int(match["port"] or default)) == (origin.host, origin.port)


@attrs.frozen
class Origins:
    """The browsers' origins that one endpoint lets in, beside the request's own host."""

    exact: frozenset[Origin]
    above: tuple[Origin, ...]
    """Of ``https://*.example.com``: those below them are meant."""
    takes_all: bool
    trust_forwarded: bool

    def refusal(self, req: falcon.asgi.Request) -> str | None:
        """Why *req* is refused, and the setting that would let it in; None if it is let in."""
        text = req.get_header("Origin")  # two of them are joined by a comma, which is no origin
        if self.takes_all or text is None:
            return None
        origin = parse_origin(text)
        shown = f"{text[:_SHOWN]!r} at {req.path[:_SHOWN]!r}"
        if origin is None:
            return f'{shown}: it names no site; only origins="*" would let it in'
        own = _forwarded(req) if self.trust_forwarded else (req.scheme, req.netloc)
        if is_same_host(origin, *own) or origin in self.exact:
            return None
        if any(map(origin.is_below, self.above)):
            return None
        setting = f"origins=[{text[:_SHOWN]!r}]"
        if not self.trust_forwarded and is_same_host(origin, *_forwarded(req)):
            setting += ", or trust_forwarded=True if it was a proxy of yours that named this host"
        return f"{shown} of the host {own[1][:_SHOWN]!r}; to allow it: {setting}"


def _forwarded(req: falcon.asgi.Request) -> tuple[str, str]:
    """Scheme and host that the first proxy has been asked for; later ones may have added theirs."""
    hops = (req.forwarded_scheme, req.forwarded_host)
    scheme, host = (each.partition(",")[0].strip() for each in hops)
    return scheme, host


def read_origins(value: Iterable[str] | None, trust_forwarded: object) -> Origins:
    """Check the two options, or raise `PachinkoError`."""
    if not isinstance(trust_forwarded, bool):
        raise PachinkoError(f"trust_forwarded is True or False, got {trust_forwarded!r}")
    names = () if value is None else ("*",) if value == "*" else texts(value, "origins")
    exact, above = list[Origin](), list[Origin]()
    for name in names:
        origin = parse_origin(name.replace("://*.", "://", 1))
        if name == "null":
            raise PachinkoError('any site can make a page of origin "null"; write origins="*"')
        if name != "*" and origin is None:
            raise PachinkoError(
                f'origins are like "https://example.com", "https://*.example.com" (every host '
                f'below it) or "*", in ASCII as browsers send them; got {name!r}'
            )
        if origin is not None:
            (above if "*" in name else exact).append(origin)
    return Origins(frozenset(exact), tuple(above), "*" in names, trust_forwarded)


def texts(value: Any, option: str) -> tuple[str, ...]:
    """Check an option that is several texts, or raise `PachinkoError`."""
    is_several = isinstance(value, Iterable) and not isinstance(value, str)
    several: tuple[Any, ...] = tuple(value) if is_several else (None,)
    if not all(isinstance(text, str) for text in several):
        raise PachinkoError(f"{option} is a list of str; write {option}=[{str(value)!r}]")
    return several


def credentials(req: falcon.asgi.Request, offered: Iterable[str]) -> tuple[str | None, list[str]]:
    """The token that a handshake carries, and the subprotocols *offered* without it.

    It stands behind ``Authorization: Bearer`` (RFC 6750, 2.1). A browser's page cannot set that
    header, and instead offers the subprotocols ``bearer`` and, right behind it, the token.
    """
    names, token = [*offered], None
    if "bearer" in names[:-1]:
        token = names.pop(names.index("bearer") + 1)
    scheme, _, value = (req.get_header("Authorization") or "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        token = value.strip()
    return token, names


def token_of(payload: Any) -> str | None:
    """The token of an ``authenticate`` message, if that is what its payload has."""
    token = payload.get("token") if type(payload) is dict else None
    return token if isinstance(token, str) else None


# ── outbox and limits ─────────────────────────────────────────────────────────────────────────
#
# What connections are made of, each with one job and without knowledge of the others.

_CANCEL_AGAIN = 5.0  # seconds that code may take to clean up before it is cancelled once more


class Suspended(Generator[Any, Any, Any]):
    """The rest of a coroutine whose first step has been run, and waits for something.

    Since the same task awaits the rest, `asyncio.timeout`, `asyncio.current_task` and context
    variables inside behave as if the coroutine had been awaited plainly.
    """

    __slots__ = ("_coroutine", "_waits_for")

    def __init__(self, coroutine: Generator[Any, Any, Any], waits_for: Any) -> None:
        self._coroutine = coroutine
        self._waits_for = [waits_for]

    def __await__(self) -> Generator[Any, Any, Any]:
        return self

    def send(self, value: Any) -> Any:
        """Hand up what the first step waits for, then go on with the coroutine."""
        return self._waits_for.pop() if self._waits_for else self._coroutine.send(value)

    def throw(self, *exc: Any) -> Any:
        """Pass on what the event loop throws in, such as a cancellation."""
        return self._coroutine.throw(*exc)


def start_task(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task that runs at once up to where it first waits; before Python 3.12, a plain one."""
    if sys.version_info >= (3, 12):
        return asyncio.Task(coroutine, loop=asyncio.get_running_loop(), eager_start=True)
    else:
        return asyncio.get_running_loop().create_task(coroutine)


def text_event(data: bytes) -> Event:
    """The ASGI event that sends *data* as a text frame (ASGI, WebSocket: Send)."""
    return {"type": "websocket.send", "text": data.decode()}


def size_of(frame: str | bytes) -> int:
    """Bytes of a frame's payload; text counts as UTF-8."""
    is_counted = isinstance(frame, bytes) or frame.isascii()
    return len(frame) if is_counted else len(cast(str, frame).encode(errors="surrogatepass"))


def size_of_event(event: Incoming) -> int:
    """The same for the frame in a ``websocket.receive``."""
    return size_of(event.get("text") or event.get("bytes") or "")


def abandon(ws: falcon.asgi.WebSocket) -> None:
    """Make Falcon take *ws* for closed although the server cannot write to it.

    After the responder Falcon awaits ``ws.close()``, which on a stalled client would wait for
    ever. It takes an `OSError` from the server's send for the end of the socket.
    """
    attempt = ws._send({"type": "websocket.close", "code": 1013})
    with contextlib.suppress(StopIteration, Exception):
        attempt.send(None)
        attempt.throw(ConnectionAbortedError())
    attempt.close()


@attrs.frozen(eq=False)
class Waiting:
    """An event that waits for its turn to be written."""

    event: Event
    sent: asyncio.Future[bool] | None = None
    """Becomes whether it has been written, for whoever waits for that."""
    size: int = 0
    """Bytes of a message that a hub pushed, which may be dropped; else 0."""
    group: str | None = None


@attrs.define(eq=False)
class Outbox:
    """What waits for a write in progress, in order; what hubs pushed is counted, to be bounded."""

    queue: collections.deque[Waiting] = attrs.Factory(collections.deque)
    pushed: int = 0
    size: int = 0
    """Bytes of the pushed ones."""
    gaps: dict[str | None, None] = attrs.Factory(dict)
    """The groups that messages were dropped of, in order."""

    def put(self, waiting: Waiting) -> None:
        """Add at the end."""
        self.queue.append(waiting)
        if waiting.size:
            self.pushed += 1
            self.size += waiting.size

    def exceeds(self, share: float, limits: Limits) -> bool:
        """Whether more than *share* of what it may hold is pushed messages."""
        return self.pushed > limits.outbox * share or self.size > limits.outbox_bytes * share

    def drop_oldest(self) -> None:
        """Drop the oldest pushed message and remember the gap in its group."""
        index = next(i for i, waiting in enumerate(self.queue) if waiting.size)
        self.gaps[self.queue[index].group] = None
        self.pushed -= 1
        self.size -= self.queue[index].size
        del self.queue[index]

    def take(self) -> Waiting | None:
        """The next to be written; behind all others, one gap for each group that has lost some."""
        while self.queue and not (self.gaps and self.queue[0].event["type"] == "websocket.close"):
            waiting = self.queue.popleft()
            if waiting.size:
                self.pushed -= 1
                self.size -= waiting.size
            if waiting.sent is None or not waiting.sent.done():  # else its sender was cancelled
                return waiting
        for group in self.gaps:
            del self.gaps[group]
            return Waiting(text_event(gap_of(group)))
        return None

    def clear(self) -> None:
        """Forget everything; whoever waits learns that it was not written."""
        for waiting in self.queue:
            if waiting.sent is not None and not waiting.sent.done():
                waiting.sent.set_result(False)
        self.queue.clear()
        self.gaps.clear()
        self.pushed = self.size = 0


@attrs.define(eq=False)
class Stream:
    """A stream in progress."""

    task: asyncio.Task[None] | None = None
    running: bool = False
    """Its items are being sent, so that it can be stopped."""
    stopped: bool = False
    """The client has said that it wants no more."""
    is_answered: bool = False
    """By something else than its items."""

    def check(self) -> None:
        """Cancel again, when an item comes from a generator that has caught its cancellation."""
        if self.stopped:
            raise asyncio.CancelledError

    def stop(self) -> None:
        """Close the generator, once; one that has not begun will not begin."""
        if not self.stopped and self.running and self.task is not None:
            self.task.cancel()
        self.stopped = True


class TimeLimit:
    """Cancels the task that is in its ``with`` block when the time has come: `TimeoutError`.

    What `asyncio.timeout` is for code that one knows. Around an application's code it cancels again
    every few seconds, since that may swallow a cancellation; so does a `TaskGroup` of Python 3.11
    that is just ending. That of 3.11 and 3.12 also leaves cancellations counted that it has caught:
    these do not hide the time-out, while one that has come from elsewhere since goes on up.
    """

    __slots__ = ("_before", "_cancels", "_task", "_timer", "_when", "expired")

    def __init__(self, when: float | None = None) -> None:
        self._when = when
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.Handle | None = None
        self._before = self._cancels = 0
        self.expired: bool = False

    def __enter__(self) -> TimeLimit:
        self._task = asyncio.current_task()
        if self._when is not None:
            self.end_at(self._when)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: object, traceback: object) -> None:
        task, self._task = cast("asyncio.Task[Any]", self._task), None
        if self._timer is not None:
            self._timer.cancel()
        while self._cancels and task.cancelling() > self._before:
            self._cancels -= 1
            task.uncancel()
        if self.expired and kind is asyncio.CancelledError and task.cancelling() <= self._before:
            raise TimeoutError

    def end_at(self, when: float) -> None:
        """Expire at *when* on the loop's clock, if it has not yet and its block goes on."""
        if self._task is not None and not self.expired:
            if self._timer is not None:
                self._timer.cancel()
            loop = asyncio.get_running_loop()
            is_due = when <= loop.time()  # then it comes before anything that has not happened yet
            self._timer = (
                loop.call_soon(self._expire) if is_due else loop.call_at(when, self._expire)
            )

    def is_around(self, task: object) -> bool:
        """Whether it is *task* that is in its block."""
        return self._task is task

    def _expire(self) -> None:
        task = cast("asyncio.Task[Any]", self._task)
        if not self.expired:
            self.expired, self._before = True, task.cancelling()
        self._cancels += 1
        task.cancel()
        self._timer = asyncio.get_running_loop().call_later(_CANCEL_AGAIN, self._expire)


class Rate:
    """At most *count* messages at once, and *count* in *seconds* on average (GCRA)."""

    __slots__ = ("_due", "_refused", "_since", "count", "seconds")

    def __init__(self, count: int, seconds: float) -> None:
        self.count: int = count
        self.seconds: float = seconds
        self._due = self._since = 0.0
        self._refused = 0

    def take(self, now: float) -> float:
        """Admit a message, for 0.0; or the seconds until the next one will be."""
        due = max(self._due, now) + self.seconds / self.count
        wait = due - now - self.seconds
        if wait <= 1e-9:  # rounding
            self._due = due
            return 0.0
        if now - self._since > self.seconds:
            self._refused, self._since = 0, now
        self._refused += 1
        return wait

    @property
    def is_abused(self) -> bool:
        """Whether more than ten times as many were refused, within *seconds*, as are admitted."""
        return self._refused > 10 * self.count


def _option(is_valid: Callable[[Any], bool], kind: str) -> Any:
    def check(_: Any, field: Any, value: Any) -> None:
        if not is_valid(value):
            raise PachinkoError(f"{field.name} is {kind}, got {value!r}")

    return attrs.field(validator=check)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _is_time_limit(value: Any) -> bool:
    return _is_seconds(value) and value > 0


def _is_rate(value: Any) -> bool:
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2
    return value is None or (is_pair and _is_count(value[0]) and _is_seconds(value[1]) and value[1])


@attrs.frozen(kw_only=True)
class Limits:
    """The options of an endpoint that bound what one connection may use."""

    max_size: int = _option(_is_count, "a number of bytes, at least 1")
    rate: tuple[int, float] | None = _option(_is_rate, "(messages, seconds), such as (20, 1.0)")
    outbox: int = _option(_is_count, "a number of messages, at least 1")
    outbox_bytes: int = _option(_is_count, "a number of bytes, at least 1")
    overflow: str = _option(("close", "drop_oldest").__contains__, '"close" or "drop_oldest"')
    send_timeout: float = _option(_is_seconds, "a number of seconds, at least 0")
    linger: float = _option(_is_seconds, "a number of seconds, at least 0")
    max_concurrent: int = _option(_is_count, "a number of tasks, at least 1")
    max_groups: int = _option(_is_count, "a number of groups, at least 1")
    handler_timeout: float | None = _option(
        lambda value: value is None or _is_time_limit(value), "a number of seconds above 0, or None"
    )
    auth_timeout: float = _option(_is_time_limit, "a number of seconds above 0")


_MAX_CODES = 100  # error codes counted apart: an application may make them up as it goes


@attrs.define
class Counters:
    """What has happened on a hub since its start."""

    received: int = 0
    """Frames of connections that have ended; an open connection counts its own."""
    sent: int = 0
    """Frames of connections that have ended."""
    dropped: int = 0
    """Messages that clients were too slow for."""
    evicted: int = 0
    """Clients closed because they were too slow."""
    outbox_high_water: int = 0
    """The most messages that have waited in one outbox."""
    errors: dict[str, int] = attrs.Factory(dict)
    """Errors answered, by code; those beyond `_MAX_CODES` codes count as ``other``."""

    def add(self, *, dropped: int = 0, evicted: int = 0) -> None:
        """Add messages dropped and clients evicted."""
        self.dropped += dropped
        self.evicted += evicted

    def frames(self, received: int, sent: int) -> None:
        """Add the frames of a connection that has ended."""
        self.received += received
        self.sent += sent

    def peak(self, waiting: int) -> None:
        """Note that *waiting* messages wait in an outbox."""
        self.outbox_high_water = max(self.outbox_high_water, waiting)

    def error(self, code: str) -> None:
        """Count an error answered with *code*."""
        if code not in self.errors and len(self.errors) >= _MAX_CODES:
            code = "other"
        self.errors[code] = self.errors.get(code, 0) + 1


# ── connection ────────────────────────────────────────────────────────────────────────────────
#
# Writing. At most one write is in progress on a socket, and whatever else is sent meanwhile waits
# in the outbox, so that messages leave in the order in which they were sent. The handshake's
# answer is the first write: what connect handlers send waits for it like anything else. When a
# write ends with the outbox not empty, a writer task goes on; for a client that keeps up there is
# neither outbox nor task.
#
# Reading. The connection's own task reads and runs the handlers. While one of them is suspended,
# a second task reads ahead, a few frames, so that a disconnect is noticed.

_READ_AHEAD = 8  # frames: enough to notice a disconnect behind some messages, and bounded
_BURST = 32  # messages that code may send in a row before others get a turn
_PROCESS_BYTES = _OWN_BYTES = 6  # of a connection's id: its process, and in that itself
_END_OF_TIME = 1e15  # UNIX seconds; beyond, floats and timers give up
_LOOK_AT_CLOCK = 600.0  # seconds: as often is an expiry compared with the time of day
_GOODBYE = 1.0  # seconds for what cannot be waited for: an evicted client's close frame, say


class Phase(enum.Enum):
    """Where a connection is in its life; it only ever goes down this list."""

    CONNECTING = "the handshake is not answered; everything sent is held"
    OPEN = "messages flow"
    CLOSING = "the server closes it: what was sent before still goes out, nothing new is taken"
    GONE = "the client is gone, or given up: nothing can be written any more"


_OPEN = Phase.OPEN  # asked for with each message, and a global costs a third of a member


@attrs.define(eq=False, repr=False)
class Connection:
    """One client. Handlers get it; the hub's methods take it."""

    _hub: Hub
    _limits: Limits
    req: falcon.asgi.Request
    """The request of the handshake: headers, cookies, query string."""
    ws: falcon.asgi.WebSocket
    """Falcon's socket, for what Pachinko does not do. What it sends keeps no order with ours."""
    params: dict[str, Any]
    """The path parameters, converted as the path says."""
    id: str = attrs.Factory(
        lambda self: self._hub.state.process + secrets.token_hex(_OWN_BYTES), takes_self=True
    )
    """Unique across processes, and public: other clients may see it. Never a credential."""
    close_code: int | None = None
    """Why it ended: the client's code (1005 or 1006 for none), or the one we closed with."""
    _user: str | None = None
    _phase: Phase = Phase.CONNECTING
    _ended: float | None = None  # when it left OPEN, on the loop's clock
    _is_slow: bool = False  # and that has been logged
    _received: int = 0  # frames, as are these
    _sent: int = 0
    _sends: int = 0  # by `send`
    _writing: Literal["", "handshake", "sender", "task", "writer"] = "handshake"  # who is
    _writer: asyncio.Task[None] | None = None
    _outbox: Outbox | None = None
    _goodbye: asyncio.Future[bool] | None = None  # whether the close frame was written
    _patience: asyncio.Timeout | None = None  # of the sender that writes by itself
    _life: TimeLimit | None = None  # of reading and of the handler in progress
    _expires_at: float | None = None
    _expiry: asyncio.TimerHandle | None = None
    _handling: bool = False  # a handler is in progress
    _is_deaf: bool = False  # closed by us, perhaps when it was gone: nothing more is handled
    _look_due: bool = False  # and `_look` comes if it suspends
    _inbox: collections.deque[Incoming] | None = None  # what was read ahead
    _ahead: asyncio.Task[None] | None = None
    _tasks: set[asyncio.Task[None]] | None = None  # concurrent handlers and streams
    _streams: dict[Id, Stream] | None = None
    _rate: Rate | None = None

    def __repr__(self) -> str:
        return f"<Connection {self.id} {self._phase.name.lower()}>"

    @property
    def context(self) -> Any:
        """Falcon's ``req.context``: whatever the application keeps for this connection."""
        return self.req.context

    @property
    def user(self) -> str | None:
        """Who it is, for `Hub.send_to_user`; set by `Pachinko.authenticate` or in connect."""
        return self._user

    @user.setter
    def user(self, user: str | None) -> None:
        if user is not None and not isinstance(user, str):
            raise TypeError(f"a user is a str or None, got {user!r}; write conn.user = str(...)")
        if self._writing != "handshake":
            raise PachinkoError("conn.user is set in a connect handler, before the client is in")
        self._hub.state.registry.set_user(self, user)
        self._user = user

    @property
    def expires_at(self) -> float | None:
        """When the client has to have authenticated again (UNIX seconds), or None for never.

        Set it in `Pachinko.authenticate`, which is asked again when the client sends a later
        ``authenticate`` message. When the time has passed the connection is closed with 3401.
        """
        return self._expires_at

    @expires_at.setter
    def expires_at(self, at: float | None) -> None:
        if at is not None and not (type(at) in (int, float) and abs(at) < _END_OF_TIME):
            raise TypeError(f"expires_at is UNIX seconds, such as time.time() + 3600; got {at!r}")
        self._expires_at = at
        self._stop_expiry()
        if at is not None and not self.closed:
            self._expire()

    def _expire(self) -> None:
        """Close if the time has come; else look again, since clocks get set."""
        left = cast(float, self._expires_at) - time.time()
        if left <= 0:
            self._close(Close(UNAUTHENTICATED, "the authentication has expired"))
        else:
            loop = asyncio.get_running_loop()
            self._expiry = loop.call_later(min(left, _LOOK_AT_CLOCK), self._expire)

    def _stop_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    @property
    def groups(self) -> frozenset[str]:
        """The groups that it is in."""
        return frozenset(self._hub.state.registry.groups_of(self))

    @property
    def closed(self) -> bool:
        """Whether it is over: the client is gone, or the server has begun to close."""
        return self._phase is Phase.CLOSING or self._phase is Phase.GONE

    async def send(self, message: object, payload: object = None) -> None:
        """Send a ``@message`` object, or a type and its payload, to this client.

        Waits while the client is behind. Raises `falcon.WebSocketDisconnected` when it is gone,
        or stays behind for `send_timeout` seconds (and is then evicted with 1013). In a connect
        handler it returns at once, and the message goes out after the handshake.
        """
        type, payload = split_message(message, payload)
        await self._post(text_event(self._hub.state.codec.encode(type, payload)))
        self._sends += 1
        if self._sends % _BURST == 0:
            await asyncio.sleep(0)  # while a client keeps up, nothing else lets the loop run

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close after what was sent before. Does not wait for the client; twice is once.

        Raises `ValueError` for a *code* or *reason* that `Close` refuses.
        """
        self._close(Close(code, reason))

    async def join(self, group: str) -> None:
        """`Hub.join` for this connection."""
        await self._hub.join(group, self)

    async def leave(self, group: str) -> None:
        """`Hub.leave` for this connection."""
        await self._hub.leave(group, self)

    # Writing

    async def _post(self, event: Event) -> None:
        """Write *event* when its turn has come."""
        if (rest := self._start_write(event)) is not None:
            await rest

    def _start_write(self, event: Event) -> Awaitable[None] | None:
        """Write *event* when its turn has come; return what is left to await, mostly nothing.

        The first step of the server's send nearly always is the last. Run from here it needs no
        coroutine of ours around it, and nothing that is there only in case that it waits.
        """
        if self._phase is not _OPEN or self._writing:
            return self._write_later(event)
        try:
            for waits_for in (steps := self.ws._send(event).__await__()):
                self._writing = "sender"
                return self._finish_write(Suspended(steps, waits_for))
        except Exception as exc:  # whatever the server raises
            self._write_failed(exc)
            raise self._disconnected() from None
        self._sent += 1
        return None

    async def _finish_write(self, rest: Suspended) -> None:
        try:
            async with self._waiting() as patience:
                self._patience = patience
                try:
                    await rest
                    self._sent += 1
                finally:
                    self._patience = None
        except Exception as exc:  # the same
            self._write_failed(exc)
            raise self._disconnected() from None
        finally:
            self._writing = ""
            self._write_next()

    async def _write_later(self, event: Event) -> None:
        """Behind what is being written, if anything can still be written."""
        if self._phase is Phase.CONNECTING:
            self._queue().put(Waiting(event))
        elif self._phase is not Phase.OPEN:
            if self._ended is not None:  # else a connect handler has closed it, and may go on
                raise self._disconnected()
        else:
            sent: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            self._queue().put(Waiting(event, sent))
            async with self._waiting():
                await sent
            if not sent.result():
                raise self._disconnected()

    @contextlib.asynccontextmanager
    async def _waiting(self) -> AsyncGenerator[asyncio.Timeout, None]:
        """Around a wait for a client that is behind; one that stays so for too long is evicted."""
        try:
            async with asyncio.timeout(self._limits.send_timeout) as patience:
                yield patience
        except TimeoutError:
            self._evict()
            raise self._disconnected() from None

    def _push(self, event: Event, size: int, group: str | None) -> bool:
        """Send behind what is being written; return whether the outbox is more than half full."""
        if self.closed:
            return False
        outbox, limits, counts = self._queue(), self._limits, self._hub.state.counters
        outbox.put(Waiting(event, None, size, group))
        counts.peak(outbox.pushed)
        is_behind = self._writing != "task"  # which has only not begun
        if is_behind and outbox.exceeds(1, limits) and limits.overflow == "close":
            self._evict()
        while is_behind and outbox.exceeds(1, limits):
            outbox.drop_oldest()
            counts.add(dropped=1)
            self._log_slow("messages for it are dropped")
        return outbox.exceeds(0.5, limits)

    def _evict(self) -> None:
        """Give up on a client that is too slow."""
        if not self.closed:
            self._hub.state.counters.add(evicted=1)
            self._log_slow("closed with 1013")
            if self._outbox is not None:
                self._outbox.clear()
            self._close(Close(1013, "too slow"))
            self._stop_writing()

    def _stop_writing(self) -> None:
        """End the wait of whoever writes, if it is not the caller."""
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(asyncio.get_running_loop().time())
        if self._writer is not None and self._writer is not asyncio.current_task():
            self._writer.cancel()

    def _log_slow(self, what: str) -> None:
        if not self._is_slow:
            self._is_slow = True
            logger.warning("client is too slow: %s", what, extra={"connection_id": self.id})

    def _queue(self) -> Outbox:
        if self._outbox is None:
            self._outbox = Outbox()
        return self._outbox

    def _start_writer(self, first: Waiting) -> None:
        self._writing = "task"
        start_task(self._write_all(first))

    def _write_next(self) -> None:
        """After a write that ended: go on with the outbox, if there is something in it."""
        following = self._outbox.take() if self._outbox is not None else None
        if following is None:
            self._outbox = None
        else:
            self._start_writer(following)

    async def _write_all(self, first: Waiting) -> None:
        """The writer: *first* and then the outbox, until it is empty or the client is gone."""
        waiting: Waiting | None = first
        self._writing, self._writer = "writer", asyncio.current_task()
        try:
            while waiting is not None and self._phase is not Phase.GONE:
                first = waiting
                if first.event["type"] == "websocket.close":
                    await self.ws.close(first.event["code"], first.event["reason"] or None)
                else:
                    await self.ws._send(first.event)
                    self._sent += 1
                if first.sent is not None and not first.sent.done():
                    first.sent.set_result(True)
                waiting = self._outbox.take() if self._outbox is not None else None
            self._outbox = None
        except Exception as exc:  # the same
            self._write_failed(exc)
        finally:
            self._writing, self._writer = "", None
            if first.sent is not None and not first.sent.done():
                first.sent.set_result(False)
            self._write_next()

    def _write_failed(self, exc: Exception) -> None:
        """The client is gone, or has been evicted; or the server has an error of its own."""
        if not isinstance(exc, falcon.WebSocketDisconnected):
            logger.debug("write failed", exc_info=exc, extra={"connection_id": self.id})
            self._lost()
        elif self._phase is Phase.OPEN or self.ws.closed:
            self._lost()

    # Ending

    def _disconnected(self) -> falcon.WebSocketDisconnected:
        return falcon.WebSocketDisconnected(self.close_code or 1006)

    def _end(self, state: Phase) -> None:
        """Leave OPEN: stop the streams; wake the reader, or give the handler `linger` seconds."""
        self._phase = state
        self._ended = asyncio.get_running_loop().time()
        for stream in tuple((self._streams or {}).values()):
            if stream.task is not asyncio.current_task():
                stream.stop()
        if self._life is not None:
            is_unread = self.close_code is None  # the server may hold frames from before the end
            linger = self._limits.linger if self._handling or is_unread else 0
            self._life.end_at(self._ended + linger)

    def _close(self, close: Close) -> None:
        """The server's wish: the close frame goes out behind what was sent before."""
        self._is_deaf = True
        if self.closed:
            return
        self.close_code = close.code
        event = {"type": "websocket.close", "code": close.code, "reason": close.reason}
        self._goodbye = asyncio.get_running_loop().create_future()
        last = Waiting(event, self._goodbye)
        if self._phase is not Phase.CONNECTING:
            self._end(Phase.CLOSING)
        elif self._life is not None and not self._life.is_around(asyncio.current_task()):
            self._life.end_at(asyncio.get_running_loop().time())  # it has not authenticated yet
        self._phase = Phase.CLOSING
        if self._handling and self._ahead is not None:
            self._ahead.cancel()  # granian's send(close) waits while a receive is pending
        if self._writing:
            self._queue().put(last)
        else:
            self._start_writer(last)

    def _gone(self, code: int) -> None:
        """The server has reported that the client is gone."""
        self.close_code = code if self.close_code is None else self.close_code
        self._lost()

    def _lost(self) -> None:
        """Nothing can be written any more. Why, the reader may still learn."""
        if self._phase is Phase.GONE:
            return
        if self._outbox is not None:
            self._outbox.clear()
        self._stop_writing()
        self._end(Phase.GONE)

    async def _settle(self) -> None:
        """Give the close frame its time, then make sure that nothing waits for this client."""
        try:
            if self._goodbye is not None:
                is_urgent = self.close_code in (1012, 1013)  # the shutdown's, or a slow client's
                patience = _GOODBYE if is_urgent else self._limits.send_timeout
                await asyncio.wait([self._goodbye], timeout=patience)
                if not self.ws.closed:
                    abandon(self.ws)
        finally:
            self._lost()

    def _opened(self) -> None:
        """The handshake is answered: what was sent until now goes out."""
        self._writing = ""
        if self._phase is Phase.CLOSING:  # by a connect handler, or evicted
            self._end(Phase.CLOSING)
        elif self._phase is Phase.CONNECTING:  # else it has gone while those ran
            self._phase = Phase.OPEN
        self._write_next()

    # Reading

    async def _next_event(self) -> Incoming | None:
        """The next frame, or None when the connection is over.

        Frames that came before the client left are still handled, those behind a close of ours
        are not.
        """
        while not self._is_deaf:
            if self._inbox:
                self._received += 1
                return self._inbox.popleft()
            if self._phase is Phase.GONE and self.close_code is not None:
                break
            if self._ahead is not None:
                await self._ahead
                if not self._inbox:
                    self._ahead = None
                continue
            try:
                event = await self.ws._receive()
            except falcon.WebSocketDisconnected as exc:
                self._gone(exc.code)
            else:
                self._received += 1
                return None if self._is_deaf else event  # we may have closed in the same turn
        return None

    async def _receive_token(self) -> Frame:
        """The first ``authenticate``; what comes before it is held, a few frames, to be read then.

        Raises `Close` when that is too much, and `falcon.WebSocketDisconnected`.
        """
        self._inbox, size = collections.deque(), 0
        while True:
            event = await self.ws._receive()
            text = event.get("text")
            size += size_of_event(event)
            if size > self._limits.max_size:
                raise Close(1009, f"more than {self._limits.max_size} bytes")
            frame = decode_or_error(text) if text is not None else None
            if isinstance(frame, Frame) and frame.type == "authenticate":
                self._received += 1
                return frame
            self._inbox.append(event)
            if len(self._inbox) > _READ_AHEAD:
                raise Close(UNAUTHENTICATED, "authenticate first")

    def _watch(self) -> None:
        """Have `_look` called when the loop goes on, which it does if the handler suspends.

        That costs nothing while a backlog is handled without waiting, and needs no task.
        """
        self._look_due = True
        asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        """Watch the socket if a handler, or its reply, waits for something."""
        self._look_due = False
        is_reading = self._ahead is not None and not self._ahead.done()
        if self._handling and not self.closed and not is_reading:
            self._ahead = asyncio.get_running_loop().create_task(self._read_ahead())

    async def _read_ahead(self) -> None:
        if self._inbox is None:
            self._inbox = collections.deque()
        size = sum(map(size_of_event, self._inbox))
        try:
            while (
                self._handling and len(self._inbox) < _READ_AHEAD and size <= self._limits.max_size
            ):
                event = await self.ws._receive()
                if not (self._streams and self._stops_stream(event)):
                    self._inbox.append(event)
                    size += size_of_event(event)
        except falcon.WebSocketDisconnected as exc:
            self._gone(exc.code)

    def _stops_stream(self, event: Incoming) -> bool:
        """Whether *event* is the ``complete`` for a stream in progress, which it then stops."""
        text = event.get("text")
        if text is not None and '"complete"' in text and size_of(text) <= self._limits.max_size:
            with contextlib.suppress(BadFrame):
                frame = decode(text)
                return frame.type == "complete" and self._complete(frame.id)
        return False

    def _complete(self, id: Id | None) -> bool:
        """Stop the stream *id*, if there is one."""
        stream = (self._streams or {}).get(cast(Id, id))
        if stream is not None:
            stream.stop()
        return stream is not None


# ── registry and relay ────────────────────────────────────────────────────────────────────────
#
# The registry knows the connections of this process. The relay reaches the other processes of the
# app, and tells the registry what they send. `LocalRelay` is the one of an app without a broker;
# `pachinko_cluster` has the other.

_TURN = 256  # writes of one message at a stretch: a few milliseconds under uvicorn
SCHEMES = ("memory", "nats", "tls", "redis", "rediss")  # of URLs; all but the first need a broker
_NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_CONNECTION_ID = re.compile(rf"[0-9a-f]{{{2 * (_PROCESS_BYTES + _OWN_BYTES)}}}")
_NO_GROUPS: Set[str] = frozenset()
Deliver = Callable[[str, bytes], Awaitable[None]]
Lost = Callable[["BaseException | None"], None]


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

        Several calls may be in progress, and their messages keep the order of the calls. Returns
        how many subscribers it went to, or None if the broker does not say. Raises what is wrong
        with this message.
        """

    async def subscribe(self, subject: str) -> None:
        """Return once what is published to *subject* will be delivered.

        Raises `PachinkoError` when the broker does not permit this one; whatever else it raises
        ends the connection.
        """

    async def unsubscribe(self, subject: str) -> None:
        """Undo `subscribe`. Messages on their way may still be delivered."""

    async def stop(self) -> None:
        """Disconnect, also when the connection has failed or was never made."""


class Kind(enum.StrEnum):
    """What the name of a receiver stands for."""

    GROUP = "group"
    USER = "user"
    CONNECTION = "connection"
    EVERYBODY = "everybody"
    """All connections, of any name."""


@attrs.frozen
class Presence:
    """A connection in a group, of whatever process."""

    id: str
    """`Connection.id`."""
    user: str | None
    process: str
    """`Hub.process` where it is connected."""


class Relay(typing.Protocol):
    """What a hub needs of all processes of its app, this one included.

    Receivers are given as a kind and a name. `send`, `close` and `ask` raise `PachinkoError` when
    the broker does not take a message within 5 seconds.
    """

    def start(self, registry: Registry, process: str) -> None:
        """Begin to deliver to *registry*, that of the process with the id *process*.

        Called once, before all other methods, in the loop of the app. Connects in the background.
        """

    async def connected(self) -> None:
        """Wait for the connection attempt in progress. Raises `PachinkoError` if it has failed."""

    async def stop(self) -> None:
        """Disconnect, for good."""

    async def send(self, kind: Kind, name: str, data: bytes, excluded: list[str]) -> None:
        """Send the frame *data* to the receivers, but to no connection with an *excluded* id.

        Returns when the writes to the receivers in this process have begun.
        """

    async def close(self, kind: Kind, name: str, close: Close) -> None:
        """Close the receivers, behind what was sent to them before."""

    async def ask(self, group: str) -> list[Presence]:
        """Ask all processes who is in *group*."""
        ...

    def subscribe(self, kind: Kind, name: str) -> None:
        """Note that the first receiver of that name is in the registry."""

    def unsubscribe(self, kind: Kind, name: str) -> None:
        """Note that the last receiver of that name has left the registry."""

    async def subscribed(self, kind: Kind, name: str) -> None:
        """Wait until what other processes send to that name arrives.

        Gives up after 4 seconds: the receivers get a gap when it does arrive. Raises
        `PachinkoError` when the broker does not permit the subscription.
        """

    def stats(self) -> dict[str, int]:
        """Return the counts of messages that were refused, and of what the broker does."""
        ...


class LocalRelay:
    """The relay of an app with one process: whatever is sent goes straight to the registry."""

    def start(self, registry: Registry, process: str) -> None:
        self._registry, self._process = registry, process

    async def connected(self) -> None: ...

    async def stop(self) -> None: ...

    async def send(self, kind: Kind, name: str, data: bytes, excluded: list[str]) -> None:
        await self._registry.deliver(kind, name, data, excluded)

    async def close(self, kind: Kind, name: str, close: Close) -> None:
        self._registry.close(kind, name, close)

    async def ask(self, group: str) -> list[Presence]:
        members = self._registry.members(group)
        return [Presence(conn.id, conn.user, self._process) for conn in members]

    def subscribe(self, kind: Kind, name: str) -> None: ...

    def unsubscribe(self, kind: Kind, name: str) -> None: ...

    async def subscribed(self, kind: Kind, name: str) -> None: ...

    def stats(self) -> dict[str, int]:
        return {}


def open_relay(given: str | Backplane | None, namespace: str | None) -> Relay:
    """Return the relay, not yet started, for what `Hub.configure` was given.

    Raises `PachinkoError` for a mistake in the URL or the namespace and for a missing library, and
    `TypeError` for what is no `Backplane`.
    """
    namespace = namespace_of(given, namespace)
    if given is None or (isinstance(given, str) and split_url(given)[0] == "memory"):
        return LocalRelay()
    if not isinstance(given, str):
        methods = ("start", "publish", "subscribe", "unsubscribe", "stop")
        found = (getattr(given, name, None) for name in methods)
        if inspect.isclass(given) or not all(map(inspect.iscoroutinefunction, found)):
            raise TypeError(
                f'write hub.configure("nats://localhost:4222"), or give it an object with '
                f"`async def` {', '.join(methods)}; got {type(given).__name__}"
            )
    try:
        companion = importlib.import_module("pachinko_cluster")
    except ImportError as exc:
        raise PachinkoError(
            "a broker needs pachinko_cluster.py of the same version: copy it to where pachinko.py "
            f'is, or install both with: pip install "falcon-pachinko" ({exc})'
        ) from exc
    return cast(Relay, companion.Cluster(given, namespace))


def split_url(url: str) -> tuple[str, str, dict[str, str]]:
    """Return the scheme of a broker's URL, what stands between it and the options, and the options.

    Raises `PachinkoError`, whose text does not show the URL.
    """
    scheme, _, rest = url.partition("://")
    where, _, query = rest.partition("?")
    is_right = scheme in SCHEMES and "#" not in url and "@" not in query
    options: dict[str, str] = {}
    try:
        options.update(urllib.parse.parse_qsl(query, True, True) if query else ())
    except ValueError:
        is_right = False
    if not is_right or (where != "") is (scheme == "memory"):
        raise wrong_url()
    return scheme, where, options


def wrong_url() -> PachinkoError:
    """Return the error for a URL of no broker."""
    known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
    return PachinkoError(
        'a backplane is a URL such as "nats://localhost:4222" or "redis://:secret@host:6379"; '
        f'known are {known}. "/", "@", "?", "#" and "%" in a password are written "%2F", '
        '"%40", "%3F", "%23", "%25". The one given is not shown, for it may hold a password'
    )


def namespace_of(given: object, namespace: str | None) -> str:
    """Return *namespace*, else that of the URL *given*, else the default.

    Raises `PachinkoError` for one that a subject cannot hold.
    """
    if isinstance(given, str):
        in_url = split_url(given)[2].get("namespace")
        namespace = in_url if namespace is None else namespace
    namespace = "pachinko" if namespace is None else namespace
    if not (isinstance(namespace, str) and _NAMESPACE.fullmatch(namespace)):
        raise PachinkoError(f"a namespace has 1 to 64 letters, digits, _ and -, got {namespace!r}")
    return namespace


def new_process() -> str:
    """Return an id for this process, which the ids of its connections begin with."""
    return secrets.token_hex(_PROCESS_BYTES)


def process_of(id: str) -> str | None:
    """Return the process of the connection *id*, or None for a text that is no such id."""
    return id[: 2 * _PROCESS_BYTES] if _CONNECTION_ID.fullmatch(id) else None


class Registry:
    """The connections of this process, and the groups and users that they belong to.

    It is the only owner of memberships, in both directions. Its *relay* learns of the first
    receiver of each group and user, and when the last one has left.
    """

    def __init__(self, relay: Relay) -> None:
        self.connections: dict[str, Connection] = {}
        """By id, without those that have not authenticated yet."""
        self.groups: dict[str, set[Connection]] = {}
        self.users: dict[str, set[Connection]] = {}
        self._tables = {Kind.GROUP: self.groups, Kind.USER: self.users}
        self._joined: dict[Connection, set[str]] = {}
        self._relay = relay

    def add(self, conn: Connection) -> None:
        """Add *conn*, and let its user's messages reach it."""
        self.connections[conn.id] = conn
        self.set_user(conn, conn.user)

    def remove(self, conn: Connection) -> None:
        """Remove *conn* from all tables."""
        if self.connections.pop(conn.id, None) is None:
            return
        for group in self._joined.pop(conn, ()):
            self._discard(Kind.GROUP, group, conn)
        self.set_user(conn, None)

    def set_user(self, conn: Connection, user: str | None) -> None:
        """Let messages to *user* reach *conn*. Called before ``conn.user`` changes."""
        if conn.user is not None:
            self._discard(Kind.USER, conn.user, conn)
        if user is not None and conn.id in self.connections:
            self._enter(Kind.USER, user, conn)

    def join(self, group: str, conn: Connection) -> None:
        """Add *conn*, a connection of this registry, to *group*."""
        self._joined.setdefault(conn, set()).add(group)
        self._enter(Kind.GROUP, group, conn)

    def leave(self, group: str, conn: Connection) -> None:
        """Remove *conn* from *group*, if it is a member."""
        groups = self._joined.get(conn)
        if groups is not None:
            groups.discard(group)
            if not groups:
                del self._joined[conn]
            self._discard(Kind.GROUP, group, conn)

    def _enter(self, kind: Kind, name: str, conn: Connection) -> None:
        table = self._tables[kind]
        if name not in table:
            table[name] = set()
            self._relay.subscribe(kind, name)
        table[name].add(conn)

    def _discard(self, kind: Kind, name: str, conn: Connection) -> None:
        table = self._tables[kind]
        members = table.get(name)
        if members is not None:
            members.discard(conn)
            if not members:
                del table[name]
                self._relay.unsubscribe(kind, name)

    def groups_of(self, conn: Connection) -> Set[str]:
        """Return the groups that *conn* is in, not a copy."""
        return self._joined.get(conn, _NO_GROUPS)

    def receivers(self, kind: Kind, name: str) -> Collection[Connection]:
        """Return the connections here that a message to *name* is for, not a copy."""
        if kind is Kind.CONNECTION:
            return (self.connections[name],) if name in self.connections else ()
        if kind is Kind.EVERYBODY:
            return self.connections.values()
        return self._tables[kind].get(name, ())

    def members(self, group: str) -> frozenset[Connection]:
        """Return the accepted connections in *group*."""
        return frozenset(filter(is_accepted, self.groups.get(group, ())))

    async def deliver(
        self, kind: Kind, name: str, data: bytes, excluded: Collection[str] = ()
    ) -> None:
        """Begin one write of the frame *data* to each receiver whose id is not *excluded*."""
        group = name if kind is Kind.GROUP else None
        await self.tell(self.receivers(kind, name), data, group, excluded)

    async def tell(
        self,
        receivers: Collection[Connection],
        data: bytes,
        group: str | None,
        excluded: Collection[str] = (),
    ) -> None:
        """Begin one write of the frame *data* to each of *receivers*, without waiting for any.

        *group* is the one that a gap names if the message is dropped.
        """
        if excluded:
            ids = frozenset(excluded)
            receivers = [conn for conn in receivers if conn.id not in ids]
        await spread(receivers, data, group)

    def close(self, kind: Kind, name: str, close: Close) -> None:
        """Close the receivers, behind what was sent to them before."""
        for conn in tuple(self.receivers(kind, name)):
            conn._close(close)


def is_accepted(conn: Connection) -> bool:
    """Whether the handshake of *conn* has been answered."""
    return conn._phase is Phase.OPEN or conn._ended is not None


async def spread(receivers: Collection[Connection], data: bytes, group: str | None = None) -> None:
    """Start one write to each of *receivers*, without waiting for any client.

    *group* is what the gap names if the message is dropped.
    """
    event, size, crowded = text_event(data), len(data), False
    ready: list[Connection] = []
    try:
        for conn in tuple(receivers):
            if conn._phase is _OPEN and not conn._writing:
                conn._writing = "task"
                ready.append(conn)
            else:
                crowded |= conn._push(event, size, group)
    finally:
        _deliver(ready, event)
    while ready:  # noqa: ASYNC110 - what empties it, a turn at a time, goes on without this
        await asyncio.sleep(0)
    if crowded:  # it may be behind only because this code has not let go of the loop
        await asyncio.sleep(0)


def _deliver(receivers: list[Connection], event: Event) -> None:
    """Write *event* to *receivers* and empty the list: some at once, the rest by and by.

    One task writes to one after the other; to start one for each takes twice as long. When the
    server lets it wait for one of them, it is left to that one, since what an ASGI middleware does
    there is bound to the task and to its context; a new task goes on with the others.
    """
    batch = receivers[-_TURN:]
    del receivers[-_TURN:]
    if batch:
        start_task(_write_each(batch, event))
    if batch or receivers:
        asyncio.get_running_loop().call_soon(_deliver_rest, batch, receivers, event)


def _deliver_rest(batch: list[Connection], receivers: list[Connection], event: Event) -> None:
    """Go on with the others; a task that waits finds its *batch* empty then, and ends."""
    receivers += batch
    batch.clear()
    if receivers:
        _deliver(receivers, event)


async def _write_each(receivers: list[Connection], event: Event) -> None:
    task = asyncio.current_task()
    while receivers:
        conn = receivers.pop()
        conn._writing, conn._writer = "writer", task
        try:
            if conn._phase is not Phase.GONE:
                await conn.ws._send(event)
                conn._sent += 1
        except Exception as exc:  # whatever the server raises
            conn._write_failed(exc)
        finally:
            conn._writing, conn._writer = "", None
            if conn._outbox is not None:
                conn._write_next()


# ── hub state ─────────────────────────────────────────────────────────────────────────────────
#
# What a hub has while it runs, and how it starts, drains and stops.

_FAREWELL = 5.0  # seconds for disconnect handlers at a shutdown, behind what lingers
ENVIRONMENT = "PACHINKO_BACKPLANE"  # the variable with the URL of the broker


class ThreadCalls:
    """Calls of a hub's methods from threads without its event loop.

    `asyncio.run_coroutine_threadsafe` would do but for one fault: a thread hangs for ever when the
    loop ends before its call has begun. Here `stop` fails every call that is not done.
    """

    def __init__(self) -> None:
        self.pending: set[concurrent.futures.Future[Any]] = set()
        self._lock = threading.Lock()  # so that `stop` sees every call that was submitted before it
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take calls, to be run in *loop*."""
        with self._lock:
            self._loop = loop

    def submit(self, work: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        """Call *work* in the loop, and await what it returns. Raises `PachinkoError`."""
        future = concurrent.futures.Future[Any]()

        async def call() -> Any:
            try:
                result = work()
                return await result if inspect.isawaitable(result) else result
            except SystemExit as exc:  # asyncio would end the server
                raise RuntimeError("sys.exit() in a call from a thread") from exc

        def begin(loop: asyncio.AbstractEventLoop) -> None:
            if not future.done():  # the coroutine is made here: a loop that ends would leave it
                task = loop.create_task(call())
                task.add_done_callback(functools.partial(_pass_on, future))
                future.add_done_callback(functools.partial(_cancel, loop, task))

        try:
            with self._lock:
                if self._loop is None:
                    raise RuntimeError("it starts with the app")
                self._loop.call_soon_threadsafe(begin, self._loop)
                self.pending.add(future)
        except RuntimeError as exc:  # the loop may also have been closed
            raise PachinkoError(f"the hub is not running: {exc}") from None
        future.add_done_callback(self.pending.discard)
        future.add_done_callback(_tell_cancelled)
        return future

    def stop(self) -> None:
        """Take no more calls, and fail those that are not done."""
        with self._lock:
            self._loop = None
        for call in tuple(self.pending):
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                call.set_exception(PachinkoError("the hub has stopped before it was done"))


def _tell_cancelled(future: concurrent.futures.Future[Any]) -> None:
    """Let `concurrent.futures.wait` know of a cancellation, as an executor would."""
    if future.cancelled():
        future.set_running_or_notify_cancel()


def _cancel(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any], _: object) -> None:
    """Cancel *task* from any thread, if it is not done."""
    if not task.done():
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            loop.call_soon_threadsafe(task.cancel)


def _pass_on(future: concurrent.futures.Future[Any], ended: asyncio.Task[Any]) -> None:
    """Give *future* the outcome of *ended*, unless the hub has stopped or a thread cancelled it."""
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        if ended.cancelled():
            future.cancel()
        elif (exc := ended.exception()) is not None:
            future.set_exception(exc)
        else:
            future.set_result(ended.result())


@attrs.frozen
class Settings:
    """What `Hub.configure` has set; it survives the hub's restarts."""

    url: str | Backplane | None = None
    namespace: str | None = None
    codec: Codec = attrs.Factory(Codec)

    def broker(self, url: str | Backplane | None = None) -> str | Backplane | None:
        """Return the broker to use: *url*, else the configured one, else the environment's."""
        return url if url is not None else self.url or os.environ.get(ENVIRONMENT) or None


class HubState:
    """What a hub has from the start of its first app to the stop of the last one.

    *replace* gives the hub a new state, and returns it. The hub does that when it has stopped, in
    a forked process, and when it is configured: no attribute is ever reset.
    """

    def __init__(self, settings: Settings, replace: Callable[[], HubState]) -> None:
        self.settings = settings
        self.codec: Codec = settings.codec
        self.process: str = new_process()
        self.counters: Counters = Counters()
        self.calls: ThreadCalls = ThreadCalls()
        self.serving: dict[asyncio.Task[Any], Connection] = {}
        """Connections by the task that serves them, from the handshake to their end."""
        self.draining: bool = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self.broker: str | Backplane | None = None
        """What the app was started with."""
        self._apps: set[object] = set()
        self._drains: set[asyncio.Task[None]] = set()
        self._replace = replace
        self._open(LocalRelay())

    def _open(self, relay: Relay) -> None:
        registry = Registry(relay)
        relay.start(registry, self.process)
        self.relay: Relay = relay
        self.registry: Registry = registry

    def start(self, app: object, url: str | Backplane | None = None) -> None:
        """Serve *app* in the running loop. Raises `PachinkoError` in a second loop."""
        loop = asyncio.get_running_loop()
        if self.loop is None:
            broker = self.settings.broker(url)
            self._open(open_relay(broker, self.settings.namespace))
            self.calls.start(loop)
            self.loop, self.broker = loop, broker
        elif self.loop is not loop:
            if self.loop.is_running():
                raise PachinkoError(
                    "this hub serves an app in another event loop; give this app one of its own: "
                    'Pachinko(app, "/ws", hub=Hub())'
                )
            self._end().start(app, url)  # the former loop has ended without a shutdown
            return
        self._apps.add(app)

    async def stop(self, app: object) -> None:
        """Stop serving *app*; with the last one the hub gets a new state."""
        self._apps.discard(app)
        if not self._apps:
            self._end()
            await self.relay.stop()

    def _end(self) -> HubState:
        successor = self._replace()
        self.calls.stop()
        return successor

    def abandon(self) -> None:
        """Replace this state and stop nothing: in a forked process all is the parent's."""
        self._replace()

    async def connected(self) -> None:
        """Wait for the first attempt to connect to the broker, whether it succeeds or not."""
        with contextlib.suppress(PachinkoError):  # it has been logged, and is tried again
            await self.relay.connected()

    def enter(self, conn: Connection) -> None:
        """Note that the current task serves *conn*."""
        self.serving[cast("asyncio.Task[Any]", asyncio.current_task())] = conn

    def leave(self) -> None:
        """Note that the current task has ended its service."""
        self.serving.pop(cast("asyncio.Task[Any]", asyncio.current_task()), None)

    def remove(self, conn: Connection) -> None:
        """Remove *conn* from the registry, and keep its counts."""
        self.counters.frames(conn._received, conn._sent)
        conn._received = conn._sent = 0  # frames sent from now on count at the next removal
        conn._stop_expiry()
        self.registry.remove(conn)

    async def reachable(self, conn: Connection) -> None:
        """Wait until `Hub.send_to_user` in other processes reaches *conn*."""
        if conn.user is not None and conn.id in self.registry.connections:
            with contextlib.suppress(PachinkoError):  # it is not permitted, which has been logged
                await self.relay.subscribed(Kind.USER, conn.user)

    async def drain(self, seconds: float) -> None:
        """Close all connections, as `Hub.drain` says."""
        self.draining = True
        # A task of its own does it: the caller may be a handler, and cancelled with its client.
        work = self._close_all(seconds, asyncio.current_task())
        task = asyncio.get_running_loop().create_task(work)
        self._drains.add(task)
        task.add_done_callback(self._drains.discard)
        await asyncio.shield(task)

    async def _close_all(self, seconds: float, caller: object) -> None:
        conns = random.sample(list(self.serving.values()), len(self.serving))
        logger.info("draining %d connections in %g s", len(conns), seconds)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        for n, conn in enumerate(conns):
            if conn.closed:
                continue  # it has left by itself, and needs no turn
            if (early := begun + seconds * n / len(conns) - loop.time()) > 0 or n % _TURN == 0:
                await asyncio.sleep(early)
            conn._close(Close(1012, "the server restarts"))
        own = {c for task, c in self.serving.items() if caller in (task, *(c._tasks or ()))}
        await self.wait_for(frozenset(conns) - own)

    async def wait_for(self, conns: Iterable[Connection], *others: asyncio.Task[Any]) -> None:
        """Wait until *others* and the disconnect handlers of *conns*, which are closed, have ended.

        Gives up after the longest `linger` of *conns* and 5 seconds.
        """
        closed = frozenset(conns)
        ending = {*others, *(task for task, conn in self.serving.items() if conn in closed)}
        if ending:
            linger = max((conn._limits.linger for conn in closed), default=0.0)
            _, stuck = await asyncio.wait(ending, timeout=linger + _FAREWELL)
            for task in stuck:
                logger.error("not waiting any longer for %r, which does not end", task)
                # The shutdown after a drain does not wait for it again.
                self.serving.pop(task, None)


# ── hub ───────────────────────────────────────────────────────────────────────────────────────
#
# What an application calls: groups, sending, the start and the end of it all.

_hubs: weakref.WeakSet[Hub] = weakref.WeakSet()
Exclude = Union["Connection", str, Iterable[Union["Connection", str]], None]


class Hub:
    """Groups of connections, and sending to them from any code, on one process or on many.

    The module's own `hub` serves most programs; a `Hub` of one's own keeps two apps apart:
    ``Pachinko(app, "/ws", hub=Hub())``. No method waits for a client: what a slow one has not
    read waits in its outbox. Names of groups and users are `str`, anything else is a `TypeError`.

    With a broker (`configure`), whatever is sent reaches the members in all processes, and this
    process's own by the same way, so that there is one order. Then the methods that reach other
    processes raise `PachinkoError` when the broker does not take a message within 5 seconds.
    """

    state: HubState
    """The library's own, not for applications: it changes without notice."""

    def __init__(self) -> None:
        self._settings = Settings()
        self._has_warned = False
        self._replace_state()
        _hubs.add(self)

    def _replace_state(self) -> HubState:
        self.state = HubState(self._settings, self._replace_state)
        return self.state

    def configure(
        self,
        url: str | Backplane | UnsetType | None = UNSET,
        *,
        converter: cattrs.Converter | UnsetType | None = UNSET,
        namespace: str | UnsetType | None = UNSET,
    ) -> None:
        """Set up the hub before an app starts.

        Each call changes only what it names; None brings the default back.

        *url*: the broker between the processes, ``nats://host:4222``, ``tls://…``,
        ``redis://host:6379``, ``rediss://…``, or a `Backplane`. By default it is that of the
        environment variable ``PACHINKO_BACKPLANE``, or ``memory://``: this process alone.

        *namespace*: keeps the apps on one broker apart, also as ``?namespace=`` in the URL;
        letters, digits, ``_`` and ``-``; by default ``pachinko``.

        *converter*: of cattrs, for all payloads, in and out. Start from ``hub.converter.copy()`` to
        keep the strict rules: a plain ``Converter`` coerces (5 becomes ``"5"``). Set it before
        handlers are registered.

        Raises `PachinkoError` for a mistake in any of them, for a library that is not installed,
        and once an app has started. Then nothing has changed.
        """
        if self.state.loop is not None:
            raise PachinkoError("call hub.configure() before the app starts, where it is imported")
        settings = self._settings
        if url is not UNSET:
            settings = attrs.evolve(settings, url=url)
        if namespace is not UNSET:
            settings = attrs.evolve(settings, namespace=namespace)
        open_relay(settings.url, settings.namespace)
        if converter is not UNSET:
            if converter is not None and not isinstance(converter, cattrs.BaseConverter):
                raise TypeError(
                    f"write hub.configure(converter=cattrs.Converter()), got {converter!r}"
                )
            settings = attrs.evolve(settings, codec=Codec(converter))
        self._settings = settings
        self._replace_state()

    @property
    def process(self) -> str:
        """The id of this process, as in `Presence.process`; a new one with each start."""
        return self.state.process

    @property
    def converter(self) -> cattrs.Converter:
        """The converter in use; copy it, but do not change it."""
        return self.state.codec.converter

    @contextlib.asynccontextmanager
    async def open(self, url: str | Backplane | None = None) -> AsyncGenerator[Hub, None]:
        """Use the hub in a program without an app: ``async with hub.open("redis://…"):``.

        By default the *url* is that of `configure` or ``PACHINKO_BACKPLANE``. Raises
        `PachinkoError` when none is given, when the broker cannot be reached, and when the hub
        already runs on another one.
        """
        is_running = self.state.loop is not None and self.state.loop.is_running()
        if not is_running and self._settings.broker(url) is None:
            raise PachinkoError(
                'hub.open() takes the broker that the app uses, hub.open("nats://localhost:4222"), '
                f"or finds it in {ENVIRONMENT}"
            )
        if is_running and url not in (None, self.state.broker):
            raise PachinkoError("this hub runs on another broker; write hub.open() to use that one")
        program = object()
        self.state.start(program, url)
        try:
            await self.state.relay.connected()
            yield self
        finally:
            await self.state.stop(program)

    def _check(self, name: object, what: str) -> None:
        """Refuse names that are not text, and calls from a thread or loop that is not the app's."""
        if not isinstance(name, str):
            raise TypeError(f"a {what} is named by a str, got {name!r}")
        loop = self.state.loop
        if loop is None:
            self._check_unused()
        elif loop is not asyncio.get_running_loop():
            raise PachinkoError(
                "the hub was called from another thread or event loop than its app's; "
                'use hub.call_threadsafe(hub.send, "room:1", ...)'
            )

    def _check_unused(self) -> None:
        """Refuse a call that would reach nobody, since the hub has not started; or warn, once.

        Without a broker it may be the test of a handler.
        """
        if self._settings.broker() not in (None, "memory://"):
            raise PachinkoError(
                "the hub is not connected: it starts with the app; a program without one writes "
                "`async with hub.open():` around its calls"
            )
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the hub does not run and reaches nobody: it starts with the app; a program of its "
                'own writes `async with hub.open("nats://localhost:4222"):` around its calls, with '
                "the broker that the app uses"
            )

    def _check_own(self, conn: object, instead: str) -> None:
        """Refuse what is no connection, and the connection of another hub."""
        if not isinstance(conn, Connection):
            raise TypeError(f'write hub.join("room:1", conn); got {conn!r} for the connection')
        if conn._hub is not self:
            raise PachinkoError(f"this connection's endpoint has another hub; {instead}")

    async def join(self, group: str, conn: Connection) -> None:
        """Add *conn* to *group*. A group exists from its first member on.

        When it returns, whatever any process sends to the group arrives; or, if the broker does not
        answer within 4 seconds, a ``gap`` comes once it does. Does nothing if the connection has
        ended.

        Raises `PachinkoError` for a connection of an endpoint with another hub, and when the broker
        does not permit the subscription. Raises `MessageError` (``too_many_groups``) for a
        connection that is in `max_groups` others: mostly a client has asked for it, and a message
        handler that lets the error pass answers the client. In a connect handler it is an error
        like any other.
        """
        self._check(group, "group")
        self._check_own(conn, "use conn.join(group)")
        state = self.state
        if conn.id not in state.registry.connections:
            if conn._phase is Phase.CONNECTING:
                raise PachinkoError(
                    "nobody joins before it has authenticated; do it in @ws.connect"
                )
            return
        groups, most = state.registry.groups_of(conn), conn._limits.max_groups
        if len(groups) >= most and group not in groups:
            raise MessageError("too_many_groups", f"at most {most} groups a connection")
        state.registry.join(group, conn)
        try:
            await state.relay.subscribed(Kind.GROUP, group)
        except PachinkoError:
            try:
                await asyncio.sleep(0)  # so that other joins that wait for this learn of it
            finally:
                state.registry.leave(group, conn)
            raise

    async def leave(self, group: str, conn: Connection) -> None:
        """Remove *conn* from *group*. Does nothing if it is not a member."""
        self._check(group, "group")
        self._check_own(conn, "use conn.leave(group)")
        self.state.registry.leave(group, conn)

    def members(self, group: str) -> frozenset[Connection]:
        """Return the accepted connections of this process in *group*."""
        if not isinstance(group, str):
            raise TypeError(f"a group is named by a str, got {group!r}")
        return self.state.registry.members(group)

    @property
    def connections(self) -> frozenset[Connection]:
        """The accepted connections of this process."""
        return frozenset(filter(is_accepted, self.state.registry.connections.values()))

    @property
    def groups(self) -> frozenset[str]:
        """The groups that have a member in this process."""
        return frozenset(self.state.registry.groups)

    async def send(
        self, group: str, message: object, payload: object = None, *, exclude: Exclude = None
    ) -> None:
        """Send a ``@message`` object, or a type and its payload, to the members of *group*.

        *exclude* leaves out a connection, an id, or several of them.
        """
        self._check(group, "group")
        await self._send(Kind.GROUP, group, message, payload, exclude)

    async def broadcast(
        self, message: object, payload: object = None, *, exclude: Exclude = None
    ) -> None:
        """Send to every connection of every process."""
        self._check("", "group")
        await self._send(Kind.EVERYBODY, "all", message, payload, exclude)

    async def send_to(
        self, conn: Connection | str, message: object, payload: object = None
    ) -> None:
        """Send to one connection, given itself or by its id. Does nothing if it has ended.

        Raises `PachinkoError` for a connection of an endpoint with another hub.
        """
        self._check(conn.id if isinstance(conn, Connection) else conn, "connection")
        await self._send(Kind.CONNECTION, self._id_of(conn), message, payload)

    async def send_to_user(self, user: str, message: object, payload: object = None) -> None:
        """Send to every connection of *user* (`Connection.user`)."""
        self._check(user, "user")
        await self._send(Kind.USER, user, message, payload)

    async def _send(
        self,
        kind: Kind,
        name: str,
        message: object,
        payload: object,
        exclude: Exclude = None,
    ) -> None:
        """Encode once, and begin one write to each receiver, wherever it is."""
        type, payload = split_message(message, payload)
        state = self.state
        data = state.codec.encode(type, payload, name if kind is Kind.GROUP else None)
        excluded: list[str] = []
        if exclude is not None:
            several = (exclude,) if isinstance(exclude, (Connection, str)) else exclude
            excluded = [self._id_of(item) for item in several]
            if not all(isinstance(id, str) for id in excluded):
                raise TypeError(f"exclude takes connections and their ids, got {exclude!r}")
        await state.relay.send(kind, name, data, excluded)

    def _id_of(self, item: Connection | str) -> str:
        """Return the id of a connection, or the id given. Raises `PachinkoError`, as `send_to`."""
        if not isinstance(item, Connection):
            return item
        self._check_own(item, "use its id, or the hub that it was given")
        return item.id

    async def close_group(self, group: str, code: int = 1000, reason: str = "") -> None:
        """Close every connection in *group*, behind what was sent to it before."""
        self._check(group, "group")
        await self.state.relay.close(Kind.GROUP, group, Close(code, reason))

    async def presence(self, group: str) -> list[Presence]:
        """Ask for the accepted connections in *group*, of all processes.

        Each process tells its own when it is asked, so that those of one that has crashed are gone
        at once. Waits 0.4 seconds for answers; for the rest of a long one up to 4 seconds.
        """
        self._check(group, "group")
        return await self.state.relay.ask(group)

    @property
    def draining(self) -> bool:
        """Whether `drain` has been called: a health check may tell a load balancer to go away."""
        return self.state.draining

    async def drain(self, seconds: float = 10.0) -> None:
        """Close all clients before a shutdown, spread over *seconds*.

        So they do not all come back at once. New handshakes are refused from now on. Connections
        are closed with 1012 in random order. Returns when the disconnect handlers have ended, or
        hang: `linger` and 5 seconds after the last close. Raises `ValueError` for *seconds* below
        0.
        """
        if not _is_seconds(seconds):
            raise ValueError(f"seconds is a number, at least 0, got {seconds!r}")
        self._check("", "group")
        await self.state.drain(seconds)

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

        The future gives what the method returns or raises. Raises `PachinkoError` when no app
        is running.
        """
        if not callable(function):
            raise TypeError(f'write hub.call_threadsafe(hub.send, "room:1", ...), got {function!r}')
        return self.state.calls.submit(functools.partial(function, *args, **kwargs))

    def stats(self) -> dict[str, int]:
        """Return counts since the start, of this process.

        ``connections``, ``groups`` (now); ``received``, ``sent`` (frames); ``dropped`` (messages),
        ``evicted`` (connections); ``outbox_high_water`` (messages); ``refused`` (messages from the
        broker that are not ours), ``outages`` (of it), ``broker_down`` (1 while it is away, or 0);
        ``errors`` in all, and ``errors.<code>`` for each code that was answered.
        """
        state = self.state
        counters, connections = state.counters, state.registry.connections.values()
        return {
            "connections": len(self.connections),
            "groups": len(state.registry.groups),
            "received": counters.received + sum(conn._received for conn in connections),
            "sent": counters.sent + sum(conn._sent for conn in connections),
            "dropped": counters.dropped,
            "evicted": counters.evicted,
            "outbox_high_water": counters.outbox_high_water,
            "refused": 0,
            "outages": 0,
            "broker_down": 0,
            **state.relay.stats(),
            "errors": sum(counters.errors.values()),
            **{f"errors.{code}": count for code, count in counters.errors.items()},
        }


def _forget_parent() -> None:
    """Replace the state of each hub in a forked process."""
    for each in _hubs:
        each.state.abandon()


# Without fork (on Windows) `os` has no such function.
getattr(os, "register_at_fork", lambda **_: None)(after_in_child=_forget_parent)

hub: Hub = Hub()
"""The hub of the process. It holds no event loop and no connection before an app starts."""


# ── dispatch ──────────────────────────────────────────────────────────────────────────────────
#
# One message: decode, find, bind, call, answer. Whatever goes wrong on the way becomes one
# outcome for the client, and the connection goes on.


def reply_event(writer: Writer, id: Id | None, value: object, more: bool = False) -> Event:
    """The event that answers a message with *value*."""
    type, unstructure = writer
    return text_event(_encode(Sent(type, id, unstructure(value), None, more)))


def outcome_of(exc: BaseException) -> MessageError | Close | None:
    """What an exception from a handler means for the client; None for a bug, which says nothing."""
    if isinstance(exc, falcon.HTTPError):
        status, title = exc.status_code, exc.title or ""
        details = {"status": status, "title": title, "description": exc.description}
        return MessageError(f"http_{status}", exc.description or title, **details)
    return exc if isinstance(exc, (MessageError, Close)) else None


def is_cancelled(exc: BaseException | None = None) -> bool:
    """Whether the current task is being cancelled, and *exc* is not some handler's stray error."""
    task = cast("asyncio.Task[Any]", asyncio.current_task())
    return (exc is None or isinstance(exc, asyncio.CancelledError)) and task.cancelling() > 0


def is_passed_on(exc: BaseException) -> bool:
    """Whether *exc* goes on up: the process ends, Python closes the coroutine, or it is cancelled.

    All else is some code's bug, also where it is no `Exception`: argparse's `SystemExit`, for which
    asyncio would end the whole server, a stray `CancelledError`, the panic of a library in Rust.
    """
    return isinstance(exc, (KeyboardInterrupt, GeneratorExit)) or is_cancelled(exc)


def forget_cancellations() -> None:
    """Undo what a caught failure in a `TaskGroup` leaves behind on Python 3.11 and 3.12."""
    task = cast("asyncio.Task[Any]", asyncio.current_task())
    while task.cancelling():
        task.uncancel()


def log_failure(what: str, exc: BaseException, conn: Connection, type: str | None = None) -> None:
    """Log a bug in the application with its traceback."""
    extra = {"connection_id": conn.id, "message_type": type}
    if isinstance(exc, BrokerAway):  # everybody's handlers fail then, and the reason is logged
        logger.error("%s failed: %s", what, exc, extra=extra)
    else:
        logger.error("%s failed", what, exc_info=exc, extra=extra)


@attrs.frozen(eq=False)
class Dispatcher:
    """Serves the accepted connections of one endpoint."""

    _routes: Routes
    _hub: Hub
    _limits: Limits

    async def serve(self, conn: Connection) -> None:
        """Handle what *conn* sends until it is over, and then everything that follows."""
        try:
            with TimeLimit() as conn._life:
                while (event := await self._read(conn)) is not None:
                    conn._handling = True
                    if not conn._look_due:
                        conn._watch()
                    await self._handle(conn, event)
                    conn._handling = False
                    del event  # which may be large, and the next one late
                    forget_cancellations()
        except TimeoutError:  # of `_life`: closed by other code while reading, or lingered enough
            forget_cancellations()
        finally:
            conn._life = None
            await self.finish(conn)

    def _read(self, conn: Connection) -> Awaitable[Incoming | None]:
        """The next frame that `_handle_plain` leaves to others."""
        is_plain = conn._rate is None and self._limits.handler_timeout is None and not conn._inbox
        return self._handle_plain(conn) if is_plain else conn._next_event()

    async def _handle_plain(self, conn: Connection) -> Incoming | None:
        """Handle messages for as long as nothing is special about them; then return the next frame.

        That is all in one coroutine: a message takes 2.7 µs, and each coroutine and call of its
        own would add 3 % to them. What is special, `_handle` does more slowly.
        """
        routes, receive = self._routes, conn.ws._receive
        # Up to this length no text can be too deep or too large: brackets close, UTF-8 has 4 bytes.
        short = min(2 * _MAX_DEPTH, self._limits.max_size // 4)
        while conn._phase is _OPEN and conn._ahead is None:
            event = text = message = result = None  # a connection that waits keeps nothing of them
            try:
                event = await receive()
            except falcon.WebSocketDisconnected as exc:
                conn._gone(exc.code)
                break
            conn._received += 1
            text = event.get("text")
            if text is None or conn._is_deaf or (len(text) > short and self._exceeds(text)):
                return None if conn._is_deaf else event  # we may have closed in the same turn
            try:
                message = routes.decode(text)
            except (Exception, SystemExit):  # a validator may raise anything
                return event
            handler = message.quick
            if handler is None or (message.payload is UNSET and handler.takes_payload):
                return event
            conn._handling = True
            if not conn._look_due:
                conn._watch()
            try:
                result = await handler.call(conn, message.payload)
                if result is not None or message.id is not None:
                    try:
                        reply_type, unstructure = handler.writers[type(result)]
                    except KeyError:
                        reply_type, unstructure = self._writer_of(handler, result)
                    text = _encode(Sent(reply_type, message.id, unstructure(result))).decode()
                    rest = conn._start_write({"type": "websocket.send", "text": text})
                    if rest is not None:
                        await rest
            except BaseException as exc:  # a bug is answered, not passed on
                await self._fail(conn, exc, handler.type, message.id)
            conn._handling = False
        forget_cancellations()
        return await conn._next_event()

    def _exceeds(self, text: str) -> bool:
        """Whether *text* is too large or too deep."""
        return size_of(text) > self._limits.max_size or is_too_deep(text)

    async def finish(self, conn: Connection) -> None:
        """End the tasks of *conn*, run its disconnect handlers, forget it."""
        if not conn.closed:
            conn._lost()  # the server has cancelled the task, and closes the socket itself
        if conn.close_code is None:
            conn.close_code = 1006
        cancelled = is_cancelled()
        for step in (self._end_tasks, *self._routes.disconnect):
            try:
                await step(conn)
            except BaseException as exc:  # a bug: the others still run
                if is_cancelled(exc):
                    cancelled = True  # the others still run
                elif is_passed_on(exc):
                    raise
                else:
                    log_failure(place_of(step), exc, conn)
            if not cancelled:
                forget_cancellations()
        self._hub.state.remove(conn)
        logger.debug("disconnected: %s", conn.close_code, extra={"connection_id": conn.id})
        await conn._settle()
        if cancelled:
            raise asyncio.CancelledError

    async def _end_tasks(self, conn: Connection) -> None:
        """Streams have been cancelled; give concurrent handlers the rest of `linger`."""
        if not conn._tasks or conn._ended is None:
            return
        tasks = frozenset(conn._tasks)
        left = conn._ended + self._limits.linger - asyncio.get_running_loop().time()
        try:
            await asyncio.wait(tasks, timeout=0 if is_cancelled() else max(0, left))
        finally:
            streams = {stream.task for stream in (conn._streams or {}).values()}
            for task in tasks:  # a stream may be cleaning up; others may have swallowed a time-out
                if task not in streams or not task.cancelling():
                    task.cancel()
        patience = _GOODBYE if is_cancelled() else max(_GOODBYE, self._limits.linger)
        _, stuck = await asyncio.wait(tasks, timeout=patience)
        for task in stuck:
            extra = {"connection_id": conn.id}
            logger.error("a handler ignores its cancellation: %r", task, extra=extra)

    async def _handle(self, conn: Connection, event: Incoming) -> None:
        """One frame: decode it, find its handler, call it."""
        text = event.get("text")
        frame: str | bytes = event["bytes"] if text is None else text
        if size_of(frame) > self._limits.max_size:
            conn._close(Close(1009, f"more than {self._limits.max_size} bytes"))
        elif text is None:
            await self._binary(conn, frame)
        elif is_too_deep(text):
            await self._refuse(conn, text)
        else:
            try:
                message = self._routes.decode(text)
            except (Exception, SystemExit) as exc:  # a validator may raise anything
                await self._refuse(conn, text, exc)
                return
            handler = self._routes.by_frame.get(type(message))
            if handler is None:
                await self._refuse(conn, text)
            elif conn._rate is not None and await self._limited(conn, conn._rate, message.id):
                return
            elif handler.streams or handler.concurrent:
                await self._spawn(conn, handler, message)
            else:
                await self._perform(conn, handler, message)

    async def _binary(self, conn: Connection, data: Any) -> None:
        if self._routes.binary is None:
            conn._close(Close(1003, "binary frames are not handled"))
        elif conn._rate is None or not await self._limited(conn, conn._rate, None):
            await self._raw(conn, self._routes.binary, data)

    async def _refuse(self, conn: Connection, text: str, exc: Any = None) -> None:
        """What is no message to a handler, each step by itself: find out why, and say so."""
        frame = decode_or_error(text)
        is_complete = isinstance(frame, Frame) and frame.type == "complete"
        if is_complete and conn._complete(frame.id):
            return  # never refused, for it makes the load less
        id = None if is_complete else frame.id  # that of a stream, which has had its final answer
        if conn._rate is not None and await self._limited(conn, conn._rate, id):
            return
        if isinstance(frame, BadFrame):
            await self._unhandled(conn, text, frame, frame.id)
        elif (handler := self._routes.handlers.get(frame.type)) is not None:
            error = handler.refusal(frame.payload, self._hub.state.codec, exc)
            await self._fail(conn, error, frame.type, frame.id)
        elif not is_complete:  # else of a stream that has just ended, say
            error = MessageError("unknown_type", f"no handler for {frame.type[:80]!r}")
            await self._unhandled(conn, text, error, frame.id)

    async def _limited(self, conn: Connection, rate: Rate, id: Id | None) -> bool:
        """Whether this message is one too many, which it is then told."""
        retry_after = rate.take(time.monotonic())
        if rate.is_abused:
            conn._close(Close(1008, "too many messages"))
        elif retry_after:
            text = f"at most {rate.count} messages in {rate.seconds} s"
            error = MessageError("rate_limited", text, retry_after=round(retry_after, 3))
            await self._send_error(conn, error, id)
        return retry_after > 0

    async def _unhandled(
        self, conn: Connection, text: str, error: MessageError, id: Id | None
    ) -> None:
        """Text for which there is no handler: the fallback's, or an error."""
        if self._routes.fallback is not None:
            await self._raw(conn, self._routes.fallback, text)
        else:
            await self._send_error(conn, error, id)

    async def _raw(self, conn: Connection, function: Callable[..., Any], data: str | bytes) -> None:
        """Call the fallback or the binary handler, and send what it returns."""
        try:
            result = await self._in_time(function, function(conn, data))
            if result is not None:
                if message_type(type(result)) is None:
                    raise TypeError(f"{place_of(function)} may return a @message object or None")
                await conn.send(result)
        except BaseException as exc:  # a bug is answered, not passed on
            await self._fail(conn, exc, None, None)

    async def _perform(self, conn: Connection, handler: Handler, message: Received) -> None:
        """Run a handler that answers once."""
        try:
            call = self._call(conn, handler, message)
            if self._limits.handler_timeout is not None:
                call = self._in_time(handler.function, call)
            result = await call
            if result is not None or message.id is not None:
                writer = self._writer_of(handler, result)
                await conn._post(reply_event(writer, message.id, result))
        except BaseException as exc:  # the same
            await self._fail(conn, exc, handler.type, message.id)

    async def _in_time(self, function: Callable[..., Any], call: Awaitable[T]) -> T:
        """What *call*, of *function*, returns within `handler_timeout`, where there is one."""
        if (seconds := self._limits.handler_timeout) is None:
            return await call
        limit = TimeLimit(asyncio.get_running_loop().time() + seconds)
        try:
            with limit:
                return await call
        except TimeoutError:
            if not limit.expired:  # the handler's own
                raise
        logger.warning("%s was stopped after %g s", place_of(function), seconds)
        raise MessageError("handler_timeout", f"not done within {seconds:g} s")

    def _writer_of(self, handler: Handler, result: object) -> Writer:
        """How what *handler* returns is written, found once for each class."""
        writer = handler.writers.get(type(result))
        if writer is None:
            writer = self._hub.state.codec.writer_of(
                result, f"{handler.type}.reply", handler.returns
            )
            handler.writers[type(result)] = writer
        return writer

    async def _answer(self, conn: Connection, type: str, id: Id | None, result: object) -> None:
        """Answer with what something else than the handler returned."""
        if result is not None or id is not None:
            writer = self._hub.state.codec.writer_of(result, f"{type}.reply")
            await conn._post(reply_event(writer, id, result))

    async def _call(self, conn: Connection, handler: Handler, message: Received) -> Any:
        """What the handler returns, through the middleware; for a stream its generator."""
        value = message.payload
        if value is UNSET or not message.is_built:
            value = handler.structure(value, self._hub.state.codec)
        if not self._routes.middleware or handler.type == "authenticate":  # whose token is secret
            result = handler.call(conn, value)
            return result if handler.streams else await result
        payload = value if handler.defaults is None else {**handler.defaults, **value}

        async def innermost() -> Any:
            result = handler.call(conn, value)
            return result if handler.streams else await result

        envelope = Envelope(handler.type, payload, message.id)
        call_next: Callable[[], Awaitable[Any]] = innermost
        for middleware in reversed(self._routes.middleware):
            call_next = functools.partial(middleware, conn, envelope, call_next)
        return await call_next()

    async def _spawn(self, conn: Connection, handler: Handler, message: Received) -> None:
        """Start a concurrent handler or a stream in a task of its own."""
        if conn._tasks is None or conn._streams is None:
            conn._tasks, conn._streams = set(), {}
        error, id = None, message.id
        if handler.streams and id is None:
            error = MessageError("id_required", f"{handler.type} is a stream, which needs an id")
        elif handler.streams and id in conn._streams:
            error, id = MessageError("id_in_use", f"a stream with the id {id!r} goes on"), None
        elif len(conn._tasks) >= self._limits.max_concurrent:
            most = f"at most {self._limits.max_concurrent} at a time"
            error = MessageError("too_busy", most)
        if error is not None:
            await self._send_error(conn, error, id)
            return
        if handler.streams:
            stream = conn._streams[cast(Id, id)] = Stream(stopped=conn.closed)
            work = self._stream(conn, handler, message, stream)
            task = stream.task = asyncio.get_running_loop().create_task(work)
        else:
            work = self._perform(conn, handler, message)
            task = asyncio.get_running_loop().create_task(work)
        conn._tasks.add(task)
        task.add_done_callback(conn._tasks.discard)

    async def _stream(
        self, conn: Connection, handler: Handler, message: Received, stream: Stream
    ) -> None:
        """Run a stream to its end: exhausted, failed, stopped by the client, or disconnected."""
        stream.running = True
        try:
            try:
                items = None if stream.stopped else await self._call(conn, handler, message)
                if isinstance(items, AsyncIterator):
                    await self._send_items(conn, handler, message, items, stream)
                elif not stream.stopped:  # a middleware has answered instead
                    await self._answer(conn, handler.type, message.id, items)
                    stream.is_answered = True
            finally:  # it is over, and its id is free once that is answered
                cast("dict[Id, Stream]", conn._streams).pop(cast(Id, message.id))
                stream.task = None  # which keeps its error, and that this frame
        except BaseException as exc:  # the same
            if conn.closed or not (stream.stopped and isinstance(exc, asyncio.CancelledError)):
                await self._fail(conn, exc, handler.type, message.id)
                return
            cast("asyncio.Task[None]", asyncio.current_task()).uncancel()
        if not stream.is_answered:
            with contextlib.suppress(falcon.WebSocketDisconnected):
                await conn._post(text_event(_encode(Sent("complete", message.id))))

    async def _send_items(
        self,
        conn: Connection,
        handler: Handler,
        message: Received,
        items: AsyncIterator[Any],
        stream: Stream,
    ) -> None:
        async with contextlib.aclosing(cast("AsyncGenerator[Any]", items)):
            try:
                async for item in items:
                    stream.check()
                    writer = self._writer_of(handler, item)
                    await conn._post(reply_event(writer, message.id, item, more=True))
                    await asyncio.sleep(0)  # one that never waits must starve nobody
            finally:
                stream.running = False  # its cleaning up is not cancelled

    async def _fail(
        self, conn: Connection, exc: BaseException, type: str | None, id: Id | None
    ) -> None:
        """Turn what a handler raised into its outcome: an error, a close, or an answer."""
        if is_passed_on(exc):
            try:
                raise exc
            finally:
                del exc  # else it keeps this frame, and that the connection, until a collection
        # Falcon's socket knows first, where the handler has sent with that.
        if isinstance(exc, falcon.WebSocketDisconnected) and (conn.closed or conn.ws.closed):
            return  # its own client is gone, which ends a handler quietly
        try:
            outcome = await self._outcome(conn, exc, type)
            with contextlib.suppress(falcon.WebSocketDisconnected):
                if isinstance(outcome, Close):
                    conn._close(outcome)
                elif isinstance(outcome, MessageError):
                    await self._send_error(conn, outcome, id)
                elif type is not None:
                    await self._answer(conn, type, id, outcome)
        except Exception as second:  # its outcome cannot be encoded
            log_failure("the answer to an error", second, conn, type)
            await self._send_error(conn, _internal_error(), id)

    async def _outcome(self, conn: Connection, exc: BaseException, type: str | None) -> Any:
        """What an error handler of the application makes of *exc*, else what the library does."""
        if (handler := self._routes.error_handler(exc)) is not None:
            try:
                return await handler(conn, exc)
            except BaseException as second:  # a bug in that one
                if is_passed_on(second):
                    raise
                exc = second
        outcome = outcome_of(exc)
        if outcome is None:
            what = f"the handler of {type!r}" if type else "the fallback or the binary handler"
            log_failure(what, exc, conn, type)
        return outcome or _internal_error()

    async def _send_error(self, conn: Connection, error: MessageError, id: Id | None) -> None:
        payload = {"code": error.code, "message": error.message, **error.details}
        data = _encode(Sent("error", id, payload=payload))
        self._hub.state.counters.error(error.code)
        with contextlib.suppress(falcon.WebSocketDisconnected):
            await conn._post(text_event(data))


async def user_of(
    function: Callable[..., Awaitable[str | None]], conn: Connection, token: str | None
) -> str | None:
    """Who the application says *token* belongs to.

    Lets `falcon.HTTPError`, `Close` and `MessageError` pass. Any other exception is logged and
    becomes a `MessageError` (``internal_error``). Of all of them only the kind and the place get
    into a log: the texts, also of what they were raised for, may hold the token or a cookie.
    """
    try:
        user = await function(conn, token)
        if user is not None and not (isinstance(user, str) and user):
            got = "an empty one" if user == "" else type(user).__name__
            raise PachinkoError(f"the user is a str, or None to refuse; got {got}")
        return user
    except (falcon.HTTPError, Close, MessageError) as exc:
        exc.__cause__ = exc.__context__ = None
        raise
    except BaseException as exc:  # a bug, whatever it is
        if is_passed_on(exc):
            raise
        what = f": {exc}" if isinstance(exc, PachinkoError) else ""
        what = f"{type(exc).__qualname__}{what}\n{''.join(traceback.format_tb(exc.__traceback__))}"
        extra = {"connection_id": conn.id, "message_type": "authenticate"}
        logger.error("%s failed: %s", place_of(function), what, extra=extra)
        raise _internal_error() from None


def _internal_error() -> MessageError:
    return MessageError("internal_error", "the server failed to handle this message")


# ── Pachinko ──────────────────────────────────────────────────────────────────────────────────

_NO_FUNCTION: Any = None  # what ws.connect() decorates, so that its parentheses can be refused
_attached: weakref.WeakSet[Pachinko] = weakref.WeakSet()  # to an app, each at a path of its own
_FALCONS_QUEUE = 4  # the default of falcon's ws_options.max_receive_queue
_BACKOFFS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)  # seconds before a failed worker's next start


class Pachinko:
    """A WebSocket endpoint: a Falcon resource that routes messages to handlers.

    ``ws = Pachinko(app, "/ws/{room}")`` adds itself to *app*. Without the two, write the lines
    yourself: ``app.add_route("/ws", ws)`` and, for the lifespan, ``app.add_middleware(ws)``; and
    turn Falcon's queue off, ``app.ws_options.max_receive_queue = 0``.

    *origins*: browsers' origins that may connect beside the request's own host, a list such as
    ``["https://example.com"]``, or ``"*"`` for all. *subprotocols*: in the order of preference.
    *max_size*: bytes of one frame. *rate*: ``(messages, seconds)`` of one connection.
    *outbox*, *outbox_bytes*: what hub methods may leave waiting for one slow client;
    *overflow*: ``"close"`` or ``"drop_oldest"`` beyond that. *send_timeout*: seconds that a send
    waits for one. *linger*: seconds that a handler may go on after its client has gone.
    *max_concurrent*: streams and concurrent handlers of one connection. *max_groups*: that one may
    be in. *handler_timeout*: seconds that the handler of a message may take, or None; a stream may
    go on for longer. *auth_timeout*: seconds within which the client has to be authenticated, where
    it has to be (see `authenticate`). *trust_forwarded*: whether a proxy of yours sets the headers
    that ``req.forwarded_host`` and ``req.forwarded_scheme`` read, which *origins* then goes by.

    Raises `PachinkoError` for a mistake in any of them.
    """

    def __init__(
        self,
        app: falcon.asgi.App[Any, Any] | None = None,
        path: str | None = None,
        *,
        hub: Hub = hub,
        origins: Iterable[str] | Literal["*"] | None = None,
        subprotocols: Sequence[str] = (),
        max_size: int = 1_048_576,
        rate: tuple[int, float] | None = None,
        outbox: int = 256,
        outbox_bytes: int = 1_048_576,
        overflow: Literal["close", "drop_oldest"] = "close",
        send_timeout: float = 20.0,
        linger: float = 10.0,
        max_concurrent: int = 16,
        max_groups: int = 1000,
        handler_timeout: float | None = None,
        auth_timeout: float = 10.0,
        trust_forwarded: bool = False,
    ) -> None:
        self._limits = Limits(
            max_size=max_size, rate=rate, outbox=outbox, outbox_bytes=outbox_bytes,
            overflow=overflow, send_timeout=send_timeout, linger=linger,
            max_concurrent=max_concurrent, max_groups=max_groups,
            handler_timeout=handler_timeout, auth_timeout=auth_timeout,
        )  # fmt: skip
        if not isinstance(hub, Hub):
            raise PachinkoError(f"write hub=Hub() for a hub of its own, got {hub!r}")
        self._hub = hub
        self._app: falcon.asgi.App[Any, Any] | None = None
        self._path: str | None = None
        self._origins = read_origins(origins, trust_forwarded)
        self._subprotocols = texts(subprotocols, "subprotocols")
        self._routes = Routes()
        self._dispatcher = Dispatcher(self._routes, hub, self._limits)
        self._loop: asyncio.AbstractEventLoop | None = None  # once started
        self._workers: set[asyncio.Task[None]] = set()
        if app is not None or path is not None:
            self._attach(app, path)

    def _attach(self, app: Any, path: Any) -> None:
        if not isinstance(app, falcon.asgi.App):
            raise PachinkoError(f"WebSockets need app = falcon.asgi.App(), got {app!r}")
        if not isinstance(path, str) or not path.startswith("/"):
            raise PachinkoError(f'a path has a leading slash: Pachinko(app, "/ws"), got {path!r}')
        if any(other._app is app and other._path == path for other in _attached):
            raise PachinkoError(f"{path} has a Pachinko already; use that one, or another path")
        app.add_route(path, self)
        app.add_middleware(self)
        self._app, self._path = app, path
        _attached.add(self)
        if app.ws_options.max_receive_queue == _FALCONS_QUEUE:
            # The queue doubles the cost of a message and loses a backlog when the client leaves.
            app.ws_options.max_receive_queue = 0
            logger.info(
                "%s turned Falcon's receive queue off for this app; to have it back, set "
                "app.ws_options.max_receive_queue after creating the Pachinko", path
            )  # fmt: skip

    def connect(self, function: F = _NO_FUNCTION) -> F:
        """Run ``async def f(conn, …)`` before the handshake is answered, with path parameters.

        `falcon.HTTPError` in it refuses the handshake, `Close` accepts and closes. Several run in
        the order of registration.
        """
        self._routes.connect.append(read_connect(function, self._path))
        return function

    def authenticate(self, function: F = _NO_FUNCTION) -> F:
        """Ask ``async def f(conn, token)`` who a client is: the user, or None to refuse it.

        It is asked before the handshake is answered and before connect handlers, with the token
        from ``Authorization: Bearer``, or from the subprotocols ``bearer`` and the token behind it;
        or with None, and may then look at ``conn.req``, at a cookie say. If it answers None to
        None, the handshake is accepted, the client has to send
        ``{"type":"authenticate","payload":{"token":…}}`` within *auth_timeout* seconds, and *f* is
        asked again. Until then nothing else is handled; at most 8 messages are held.

        Whoever is refused is closed with 3401, and no connect or disconnect handler runs. Otherwise
        ``conn.user`` is set. *f* may set ``conn.expires_at``; it is asked again when the client
        sends ``authenticate`` later on, and has to name the same user. No middleware sees that
        message, and its token is kept out of the log.
        """
        example = "@ws.authenticate\nasync def who(conn, token): ..."
        check_function(function, example, 2)
        refuse_second(self._routes.authenticate, function, "authenticate")
        self._routes.authenticate = function

        async def again(conn: Connection, payload: Any) -> None:
            if (token := token_of(payload)) is None:
                wrong = {"path": "$.payload.token", "message": "expected str"}
                raise invalid_payload("authenticate", [wrong])
            expires_at = conn.expires_at
            try:
                user = await user_of(function, conn, token)
            except BaseException as exc:  # raised again: what has failed renews nothing
                conn.expires_at = expires_at
                if isinstance(exc, falcon.HTTPError):
                    raise Close(3000 + exc.status_code) from None
                raise
            if user != conn.user:
                raise Close(UNAUTHENTICATED, "authentication failed")

        parameter = inspect.Parameter("payload", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._add_checked(
            Handler("authenticate", function, again, Any, parameter, None, None, False, False)
        )
        return function

    def on(self, type: str | type[Any], *, concurrent: bool = False) -> Callable[[F], F]:
        """Handle messages of *type*, a text or a class with ``@message``.

        ``(conn)``, ``(conn, payload)`` or ``(conn, *, field, …)``, each structured to its
        annotation. What it returns is the reply; an async generator is a stream.
        *concurrent* lets it run beside other handlers of the connection.
        """
        name = type if isinstance(type, str) else message_type(type)
        if name is None:
            raise PachinkoError(
                f'@ws.on takes a type or a class with @message: write @ws.on("say"); got {type!r}'
            )
        cls = None if isinstance(type, str) else type
        namespaces = namespaces_at(sys._getframe(1))

        def register(function: F) -> F:
            self._add_handler(name, function, namespaces, cls, concurrent)
            return function

        return register

    def _add_handler(
        self, type: str, function: Any, namespaces: Namespaces, cls: Any, concurrent: bool
    ) -> None:
        check_type(type)
        if (first := self._routes.handlers.get(type)) is not None:
            refuse_second(first.function, function, repr(type))
        params = path_parameters(self._path or "")
        codec = self._hub.state.codec
        handler = read_handler(type, function, codec, namespaces, cls, params, concurrent)
        self._add_checked(handler)

    def _add_checked(self, handler: Handler) -> None:
        self._routes.handlers[handler.type] = handler
        if self._loop is not None:
            self._routes.add_frame(handler, self._hub.state.codec)

    def disconnect(self, function: F = _NO_FUNCTION) -> F:
        """Run ``async def f(conn)`` once when a connection is over, whatever ended it.

        ``conn.close_code`` is set, its groups are still joined.
        """
        check_function(function, "@ws.disconnect\nasync def leave(conn): ...", 1)
        self._routes.disconnect.append(function)
        return function

    def fallback(self, function: F = _NO_FUNCTION) -> F:
        """Give ``async def f(conn, frame: str)`` the text that no handler takes."""
        check_function(function, "@ws.fallback\nasync def other(conn, frame: str): ...", 2)
        refuse_second(self._routes.fallback, function, "the fallback")
        self._routes.fallback = function
        return function

    def binary(self, function: F = _NO_FUNCTION) -> F:
        """Give ``async def f(conn, data: bytes)`` the binary frames."""
        check_function(function, "@ws.binary\nasync def upload(conn, data: bytes): ...", 2)
        refuse_second(self._routes.binary, function, "binary")
        self._routes.binary = function
        return function

    def middleware(self, function: F = _NO_FUNCTION) -> F:
        """Put ``async def f(conn, envelope, call_next)`` around message handlers.

        ``await call_next()`` gives what the handler returned; what *f* returns is the answer.
        The first registered is the outermost.
        """
        example = "async def timed(conn, envelope, call_next):\n    return await call_next()"
        check_function(function, f"@ws.middleware\n{example}", 3)
        self._routes.middleware.append(function)
        self._routes.decode = self._routes._decode_first
        return function

    def error(self, exception: type[Exception]) -> Callable[[F], F]:
        """Give ``async def f(conn, exc)`` what message handlers raise of this class.

        It returns a `MessageError`, a `Close`, or a value to answer with.
        """
        if not (inspect.isclass(exception) and issubclass(exception, Exception)):
            raise PachinkoError(f"write @ws.error(ValueError), a class; got {exception!r}")

        def register(function: F) -> F:
            name = exception.__name__
            check_function(function, f"@ws.error({name})\nasync def failed(conn, exc): ...", 2)
            refuse_second(self._routes.errors.get(exception), function, name)
            self._routes.errors[exception] = function
            return function

        return register

    def worker(self, function: F = _NO_FUNCTION) -> F:
        """Run ``async def f()`` in the background from the app's start to its shutdown.

        One that fails is logged and started again, after 1 second, then 2, up to 60.
        """
        check_function(function, "@ws.worker\nasync def clock(): ...", 0)
        self._routes.workers.append(function)
        if self._loop is not None:
            self._start_worker(function)
        return function

    def add_resource(self, prefix: str, resource: object) -> None:
        """Route by class: ``on_send`` handles ``"<prefix>.send"``, beside ``on_connect`` and
        ``on_disconnect``. One instance serves all connections."""
        namespaces = namespaces_at(sys._getframe(1))
        for name, method in read_resource(prefix, resource):
            if name in ("connect", "disconnect"):
                getattr(self, name)(method)
            else:
                self._add_handler(f"{prefix}.{name}", method, namespaces, None, False)

    async def on_websocket(
        self, req: falcon.asgi.Request, ws: falcon.asgi.WebSocket, /, **params: Any
    ) -> None:
        """Serve one connection (Falcon's responder)."""
        if ws.closed:
            return  # a middleware has refused it
        self._start()
        if self._hub.state.draining:
            await ws.close(3503)  # before accept: HTTP 403, as are all of Falcon's refusals
            return
        if (refusal := self._origins.refusal(req)) is not None:
            logger.warning("refused origin %s", refusal)
            await ws.close(3403)
            return
        conn = Connection(self._hub, self._limits, req, ws, params)
        if self._limits.rate is not None:
            conn._rate = Rate(*self._limits.rate)
        state = self._hub.state
        state.enter(conn)
        try:
            if await self._connect(conn):
                await self._dispatcher.serve(conn)
        finally:
            conn._lost()
            conn._writing = ""  # also of a handshake that an exception has ended
            if conn._ahead is not None:  # it may have no end of its own
                conn._ahead.cancel()
            state.remove(conn)
            state.leave()

    async def _connect(self, conn: Connection) -> bool:
        """Run what comes before the client is in; return whether it is."""
        offered: Iterable[str] = conn.ws.subprotocols
        is_in = False
        try:
            if self._routes.authenticate is not None:
                token, offered = credentials(conn.req, offered)
                await self._authenticate(conn, self._routes.authenticate, token, offered)
            if not conn.closed:
                self._hub.state.registry.add(conn)
                await self._run_connect_handlers(conn)
                is_in = True
        except Close as close:
            self._hub.state.remove(conn)
            if not conn.closed:
                conn._queue().clear()
                conn._close(close)
        conn._handling = False
        if conn._ahead is None and not conn._inbox:
            conn._inbox = None  # 760 bytes that few connections need
        try:
            await self._hub.state.reachable(conn)
            await self._accept(conn, offered)
        except BaseException as exc:  # let in, so it is seen out; raised again below
            conn._lost()
            if is_in:
                await self._dispatcher.finish(conn)
            if not isinstance(exc, falcon.WebSocketDisconnected):
                raise
            return False
        conn._opened()
        if is_in:
            logger.debug("connected: %r", conn.req.path, extra={"connection_id": conn.id})
        else:
            await conn._settle()
        return is_in

    async def _accept(self, conn: Connection, offered: Iterable[str]) -> None:
        """Answer the handshake, if nobody has: a middleware, or since a token was asked for."""
        if conn.ws.unaccepted:
            known = [name for name in self._subprotocols if name in offered]
            if self._routes.authenticate is not None and "bearer" in offered:
                known.append("bearer")  # browsers give up where none of their own is chosen
            await conn.ws.accept(known[0] if known else None)

    async def _run_connect_handlers(self, conn: Connection) -> None:
        for handler in self._routes.connect:
            try:
                await handler(conn)
            except BaseException as exc:  # Falcon's error handlers take no more than an Exception
                if isinstance(exc, Exception) or is_passed_on(exc):
                    raise
                raise RuntimeError(f"a connect handler has raised {exc!r}") from exc
            forget_cancellations()

    async def _authenticate(
        self, conn: Connection, function: Any, token: str | None, offered: Iterable[str]
    ) -> None:
        """Set the user, or raise `Close`; the connection may also be closed in the meantime."""
        seconds = self._limits.auth_timeout
        deadline = asyncio.get_running_loop().time() + seconds
        try:
            with TimeLimit(deadline) as conn._life:
                user = await user_of(function, conn, token)
            if user is None and token is None and not conn.closed:
                await self._accept(conn, offered)  # in its own time: it cannot be done by half
                with TimeLimit(deadline) as conn._life:
                    user = await self._ask_client(conn, function)
        except TimeoutError:
            raise Close(UNAUTHENTICATED, f"not authenticated within {seconds:g} s") from None
        except MessageError as exc:
            if exc.code != "internal_error":  # which has been logged
                text = "%s raised a MessageError, when no message can be answered yet; raise Close"
                logger.error(text, place_of(function), extra={"connection_id": conn.id})
            raise falcon.HTTPInternalServerError from None
        finally:
            conn._life = None
        forget_cancellations()
        if user is None:
            raise Close(UNAUTHENTICATED, "authentication failed")
        if not conn.closed:
            conn.user = user

    async def _ask_client(self, conn: Connection, function: Any) -> str | None:
        """Who the client is by its first message."""
        frame = await conn._receive_token()
        conn._handling = True  # up to the end of the connect handlers: it may leave meanwhile
        conn._watch()
        token = token_of(frame.payload)
        user = None if token is None else await user_of(function, conn, token)
        if user is not None and frame.id is not None:
            await conn._post(reply_event(("authenticate.reply", lambda _: UNSET), frame.id, None))
        return user

    async def process_startup(self, scope: Any, event: Any) -> None:
        """Start with the app (Falcon's middleware for the ASGI lifespan)."""
        self._start()
        await self._hub.state.connected()

    async def process_resource_ws(
        self, req: falcon.asgi.Request, ws: falcon.asgi.WebSocket, resource: Any, params: Any
    ) -> None:
        """Notice that a later ``add_route`` has taken the path (Falcon's middleware)."""
        if resource is not self and req.uri_template == self._path and self._path is not None:
            logger.warning("a later app.add_route has replaced the Pachinko at %s", self._path)

    async def process_shutdown(self, scope: Any, event: Any) -> None:
        """Stop with the app: close what is still open with 1012, and wait for its handlers."""
        for worker in self._workers:
            worker.cancel()
        conns = frozenset(c for c in self._hub.state.serving.values() if c._limits is self._limits)
        for conn in conns:
            conn._close(Close(1012, "the server shuts down"))
        await self._hub.state.wait_for(conns, *self._workers)
        self._loop = None
        await self._hub.state.stop(self)

    def _start(self) -> None:
        """Start, once a loop: with the lifespan, or with the first connection where it has none."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._hub.state.start(self)
            self._loop = loop
            self._routes.start(self._hub.state.codec)
            self._workers.clear()
            for function in self._routes.workers:
                self._start_worker(function)

    def _start_worker(self, function: Callable[[], Awaitable[None]]) -> None:
        task = cast(asyncio.AbstractEventLoop, self._loop).create_task(_keep_working(function))
        self._workers.add(task)
        task.add_done_callback(self._workers.discard)


async def _keep_working(function: Callable[[], Awaitable[None]]) -> None:
    """Run a worker, and again when it fails, ever more patiently."""
    backoffs = iter(_BACKOFFS)
    while True:
        started = time.monotonic()
        try:
            await function()
            return
        except BaseException as exc:  # a worker's bug is logged
            if is_passed_on(exc):
                raise
            forget_cancellations()
            if time.monotonic() - started > _BACKOFFS[-1]:
                backoffs = iter(_BACKOFFS)
            backoff = next(backoffs, _BACKOFFS[-1])
            logger.exception("worker %s failed; again in %g s", place_of(function), backoff)
        await asyncio.sleep(backoff)
