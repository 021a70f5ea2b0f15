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
    MutableMapping,
    MutableSequence,
    MutableSet,
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
from cattrs import cols
from cattrs.disambiguators import create_default_dis_func
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
Errors = list[dict[str, str]]  # what is wrong: [{"path": "$.payload.n", "message": "…"}]
Hook = Callable[[Any, Any], Any]  # cattrs calls it with a value and the type to make of it
Members = Sequence[tuple[Any, Any]]  # the types in a union, each with the class of its values
HookFactory = Callable[[Any, cattrs.Converter], Callable[..., Any]]
Writer = tuple[str, Callable[[Any], Any]]  # the type to send a value as, and what makes JSON of it
Namespaces = tuple[dict[str, Any], dict[str, Any]]  # the globals and locals annotations see
Event = dict[str, Any]  # of ASGI, in both directions: {"type": "websocket.send", "text": "…"}

# ── errors ────────────────────────────────────────────────────────────────────────────────────
#
# Exceptions are split by whose fault they are. Here is also what a client is told about them.
#
#   Exception
#   ├── PachinkoError   the program's mistake, raised where it was made, mostly at registration
#   │   ├── Indistinct  a type that leaves open which fields of a value go out
#   │   └── BrokerAway  nobody's mistake: the broker between processes has not taken a message
#   ├── MessageError    the client's mistake: it is told, and the connection stays open
#   │   └── BadFrame    a text frame that is no message
#   └── Close           nobody's mistake: a handler ends the connection

_MAX_ERRORS = 100  # in one reply: a frame of max_size has room for hundreds of thousands
_OTHER = "invalid value"  # the text for an exception whose own text is not meant for clients
_KEY_SHOWN = 64  # characters of a client's own key in a path
_REASON_BYTES = 123  # RFC 6455, 5.5: a control frame carries 125 bytes, two of them the code


class PachinkoError(Exception):
    """A mistake in the program that uses Pachinko, with the corrected code in its text."""


class Indistinct(PachinkoError):
    """A union of two types that share values, but send different fields of them."""


class BrokerAway(PachinkoError):
    """The broker between processes has not taken a message.

    It is logged without a traceback, because the program has no bug.
    """


class MessageError(Exception):
    """An error of your own for the client: raise it in a message handler.

    The client gets ``{"type":"error","id":…,"payload":{"code":code,"message":message,…}}``, with
    *details* (JSON values) beside the two. The connection stays open.
    """

    def __init__(self, code: str, message: str = "", **details: Any) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.details = details


class Close(Exception):
    """The end of the connection, with *code* and *reason*: raise it in a handler.

    An application may send the codes 1000 to 1003, 1007 to 1014 and 3000 to 4999 (RFC 6455, 7.4).
    Raises `ValueError` for any other *code*, and for a *reason* of more than 123 bytes of UTF-8.
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


def bare(error: E) -> E:
    """Remove the traceback, cause and context of *error*, and return it.

    They refer to stack frames that refer back to it, a cycle that only the garbage collector
    would free.
    """
    for inner in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        bare(inner)
    with contextlib.suppress(Exception):  # an application's exception may be frozen
        error.__cause__ = error.__context__ = error.__traceback__ = None
    return error


def explain(exc: BaseException, path: str = "$.payload") -> Iterator[dict[str, str]]:
    """Yield each wrong field under *exc* as ``{"path", "message"}``, without server internals."""
    if isinstance(exc, cattrs.BaseValidationError):
        for inner in exc.exceptions:
            # cattrs adds a note to its own KeyError for a missing key; any other is a user's bug.
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
        text = exc.args[0]  # attrs' validators put the field and the value behind the text
    elif isinstance(exc, RecursionError):
        text = "nested too deeply"
    yield {"path": path, "message": text}


def _path_step(exc: BaseException, t: Any) -> str:
    """Return where under its parent *exc* happened: ``.field``, ``[3]``, ``["key"]``, or ``""``."""
    names = [arg.name for arg in exc.args if isinstance(arg, attrs.Attribute)]
    for note in getattr(exc, "__notes__", ()):
        if isinstance(note, cattrs.IterableValidationNote):
            index = note.index
            return f"[{index}]" if type(index) is int else f'["{str(index)[:_KEY_SHOWN]}"]'
        if isinstance(note, cattrs.AttributeValidationNote):
            names = [note.name]
    if not names:
        return ""
    cls = origin_of(t) or t
    fields = attrs.fields_dict(cls) if attrs.has(cls) else {}
    return f".{fields[names[0]].alias if names[0] in fields else names[0]}"


def errors_of(exc: BaseException) -> Errors:
    """Return what is wrong under *exc*, with one error more than `invalid_payload` shows."""
    errors = list(itertools.islice(explain(exc), _MAX_ERRORS + 1))
    bare(exc)
    return errors


def invalid_payload(type: str, errors: Errors) -> MessageError:
    """Return the error for a payload, with at most `_MAX_ERRORS` of what is wrong in it."""
    if len(errors) > _MAX_ERRORS:
        errors[_MAX_ERRORS:] = [{"path": "$.payload", "message": "and more"}]
    first = f"{errors[0]['path']}: {errors[0]['message']}"
    return MessageError("invalid_payload", f"{type}: {first}", errors=errors)


# ── envelope and message ──────────────────────────────────────────────────────────────────────
#
# An envelope is what a text frame holds: a type, an id and a payload. A message class gives a
# payload its type and its fields.
#
# msgspec can decode a frame straight into the payload, in one pass and several times as fast as
# cattrs could build it from plain JSON values. It makes an object by setting its fields: it calls
# no constructor and no converter, and knows no alias. `is_read_in_one_pass` tells for which types
# it builds the very value that the strict converter would (next section). It looks at each thing
# that the two treat differently; a type that nobody has compared is left to cattrs.

_MAX_DEPTH = 128  # levels of arrays and objects in a frame; recursive code can go far deeper
_NOT_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[^][{}"]+', re.DOTALL)  # linear in any text
_RESERVED = frozenset({"error", "complete", "gap", "resume", "authenticate"})
_JSON_NAMES: dict[Any, str] = {dict: "object", list: "array", types.NoneType: "null"}
_LEAVES: set[Any] = {str, int, float, bool, types.NoneType, bytes, UUID, Decimal}.union(
    (datetime, date, time_of_day, timedelta)
)
_UNIONS: tuple[Any, ...] = (Union, types.UnionType)
_QUALIFIERS = (typing.Annotated, typing.Required, typing.NotRequired)


@attrs.frozen
class Envelope:
    """A message as middleware sees it."""

    type: str
    payload: Any
    """The payload as the handler gets it; a dict by name for keyword-only parameters."""
    id: Id | None = None


class Frame(msgspec.Struct):
    """The content of a text frame. Keys that it does not know are ignored."""

    type: str
    id: Id | None = None
    payload: Any = UNSET


class Received(msgspec.Struct, gc=False):
    """A frame of a known type. Each type has a class of its own, made by `frame_class`."""

    is_built: typing.ClassVar[bool] = False
    """Whether the payload is what the handler takes, not plain JSON values."""
    handler: typing.ClassVar[Any] = None
    """The `Handler` of the type, or None."""
    id: Id | None = None
    payload: Any = UNSET


FrameClass = type[Received]


def frame_class(type: str, payload: Any, **members: Any) -> FrameClass:
    """Make the class of the frames of *type*, with *members* of its own.

    Decoding one also builds the *payload*. Raises `TypeError` for one that msgspec cannot build.
    """
    fields: list[tuple[str, Any, Any]] = [("payload", payload | UnsetType, UNSET)]
    cls = msgspec.defstruct(
        "Received", fields, bases=(Received,), namespace=members, tag_field="type", tag=type,
        gc=False,
    )  # fmt: skip
    msgspec.json.Decoder(cls)
    return cast(FrameClass, cls)


def decoder_of(frames: Iterable[FrameClass]) -> Callable[[str], Received]:
    """Return a function that decodes a text frame as the one of *frames* for its type."""
    # _no_frame belongs to no handler. A lone class would also take frames without a type.
    return msgspec.json.Decoder(Union[(_no_frame, *frames)]).decode


class Sent(msgspec.Struct, omit_defaults=True, gc=False):
    """The content of a text frame to send. Defaults are left out."""

    type: str
    id: Id | None = None
    payload: Any = UNSET
    group: str | None = None
    more: bool = False


class BadFrame(MessageError):
    """A text frame that is no envelope."""

    id: Id | None = None
    """The id to answer with, if the frame has one."""


_no_frame = frame_class("$none", Any)
_decode_frame = msgspec.json.Decoder(Frame).decode
_decode_none = decoder_of(())
_encode = msgspec.json.Encoder().encode


def gap_of(group: str | None) -> bytes:
    """Return the frame that tells of lost messages to *group*."""
    return _encode(Sent("gap", payload={"group": group}))


def decode(text: str) -> Frame:
    """Decode one text frame, or raise `BadFrame` (``invalid_json`` or ``invalid_envelope``)."""
    if is_too_deep(text):
        raise BadFrame("invalid_json", f"nested deeper than {_MAX_DEPTH} levels")
    try:
        return _decode_frame(text)
    except (msgspec.MsgspecError, UnicodeError):
        raise _bad_frame(text) from None


def decode_or_error(text: str) -> Frame | BadFrame:
    """Decode one text frame, or return the `BadFrame`.

    An error that is returned does not become the context of what is raised later.
    """
    try:
        return decode(text)
    except BadFrame as bad:
        return bare(bad)


def is_too_deep(text: str) -> bool:
    """Tell whether *text*, if it is JSON, nests deeper than `_MAX_DEPTH`."""
    if text.count("[") + text.count("{") <= _MAX_DEPTH:
        return False
    steps = (1 if bracket in "[{" else -1 for bracket in _NOT_BRACKETS.sub("", text))
    return max(itertools.accumulate(steps), default=0) > _MAX_DEPTH


def _bad_frame(text: str) -> BadFrame:
    """Return what is wrong with *text*, which msgspec has refused."""
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
    else:  # the last one is right, so msgspec has stopped at an earlier one
        text = '"type" or "id" is there twice'
    bad = BadFrame("invalid_envelope", text)
    bad.id = None if is_wrong else id
    return bad


def json_name(value: object) -> str:
    """Return what JSON calls the kind of *value*."""
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
    namespaces = caller_namespaces()

    def tag(cls: Any) -> Any:
        if not inspect.isclass(cls):
            raise PachinkoError(f'@message("{type}") goes above a class, not above {cls!r}')
        if "__attrs_attrs__" not in vars(cls) and "__dataclass_fields__" not in vars(cls):
            cls = _make_frozen(cls)
        setattr(cls, "__message_type__", type)  # noqa: B010 - it is declared on no class
        with contextlib.suppress(NameError):  # registration resolves the name of a later class
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
    made = attrs.frozen(cls)
    for name in attrs.fields_dict(made):
        if isinstance(default := vars(cls).get(name), (list, dict, set)):
            raise PachinkoError(
                f"all messages would share the default of {cls.__name__}.{name}; write "
                f"`{name}: ... = attrs.field(factory={type(default).__name__})`"
            )
    return made


def check_type(type: str) -> None:
    """Raise `PachinkoError` for a message type that is empty or reserved for the library."""
    if not type or type in _RESERVED or type.startswith("$") or type.endswith(".reply"):
        raise PachinkoError(
            f'{type!r} is reserved, as are "", {", ".join(sorted(_RESERVED))}, "$…" and "….reply"; '
            f'choose another message type, such as "chat.say"'
            f"{', or write @ws.authenticate' if type == 'authenticate' else ''}"
        )


def message_type(cls: Any) -> str | None:
    """Return the type that *cls* itself was tagged with; a subclass does not inherit it."""
    return cast("str | None", getattr(cls, "__dict__", {}).get("__message_type__"))


def split_message(message: object, payload: object) -> tuple[str, object]:
    """Return the type and payload of what a ``send`` was given. Raises `TypeError` with a hint."""
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


def caller_namespaces() -> Namespaces:
    """Return where to look up names in annotations: what the caller's caller sees."""
    frame = sys._getframe(2)
    return frame.f_globals, dict(frame.f_locals)


def resolve_class(cls: Any, globals_: dict[str, Any], locals_: dict[str, Any]) -> dict[str, Any]:
    """Turn the text annotations of *cls* into types, in place, and return them by field name.

    A name may be local to the function where *cls* is defined. Raises `NameError` for a name that
    is not found.
    """
    globals_ = {**globals_, **vars(sys.modules.get(cls.__module__, types))}
    if attrs.has(cls):
        attrs.resolve_types(cls, globals_, locals_, include_extras=True)
        for field in attrs.fields(cls):  # fields are frozen; attrs changes their types like this
            object.__setattr__(field, "type", hashable(field.type))
        hints = {field.name: field.type for field in attrs.fields(cls)}
    else:
        hints = typing.get_type_hints(cls, globals_, locals_, include_extras=True)
        hints = {name: hashable(t) for name, t in hints.items()}
    own = cls.__annotations__  # msgspec looks there
    own.update({name: hints[name] for name in own if name in hints})
    if not attrs.has(cls) and dataclasses.is_dataclass(cls):
        for field in dataclasses.fields(cls):
            field.type = hints[field.name]
        # Its ClassVar, InitVar and KW_ONLY have annotations, but are no fields.
        hints = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return hints


def hashable(t: Any) -> Any:
    """Return the type *t* without metadata of `Annotated` that has no hash.

    cattrs looks types up by their hash. The metadata is meant for other libraries.
    """
    try:
        hash(t)
    except TypeError:
        if origin_of(t) is typing.Annotated:
            return hashable(t.__origin__)
        args = tuple(map(hashable, get_args(t)))
        if origin_of(t) in _UNIONS:
            return Union[args]  # noqa: UP007 - of a tuple
        return origin_of(t)[args[0] if len(args) == 1 else args] if args else t
    return t


def class_of(t: Any) -> Any:
    """Return the class behind *t*, such as `list` for ``list[int]``, or None."""
    cls = origin_of(t) or t
    return cls if inspect.isclass(cls) and cls not in (Any, *_UNIONS) else None


def unnamed(t: Any) -> Any:
    """Return the type that a `NewType` or a ``type`` statement has named, else *t* itself."""
    return getattr(t, "__supertype__", None) or getattr(t, "__value__", t)


def bare_type(t: Any) -> Any:
    """Return *t* without names and without `Annotated`."""
    inner = t.__origin__ if origin_of(t) is typing.Annotated else unnamed(t)
    return t if inner is t else bare_type(inner)


def is_leaf(t: Any) -> bool:
    """Tell whether *t* is written as one JSON scalar."""
    if origin_of(t) in _UNIONS:
        return all(map(is_leaf, get_args(t)))
    is_enum = inspect.isclass(t) and issubclass(t, enum.Enum)
    return is_enum or origin_of(t) is Literal or t in _LEAVES


def has_fields(t: Any) -> bool:
    """Tell whether *t* is an attrs class or a dataclass."""
    cls = class_of(t)
    return cls is not None and (attrs.has(cls) or dataclasses.is_dataclass(cls))


def declares_fields(t: Any) -> bool:
    """Tell whether the items of *t* have names: of a typed dict and of a named tuple, too."""
    cls = class_of(t)
    return has_fields(t) or typing.is_typeddict(cls) or cols.is_namedtuple(cls)


def types_in(t: Any, namespaces: Namespaces, seen: list[Any]) -> Iterator[Any]:
    """Yield all types that *t* contains, *t* last, and resolve the annotations of classes."""
    if t in seen or isinstance(t, TypeVar) or origin_of(t) is Literal:
        return
    seen.append(t)
    cls, args = class_of(t), get_args(t)
    inner = [hashable(unnamed(t)), *(args[:1] if origin_of(t) in _QUALIFIERS else args)]
    if declares_fields(cls):
        inner += resolve_class(cls, *namespaces).values()
    for member in inner:
        yield from types_in(member, namespaces, seen)
    yield t


def is_read_in_one_pass(t: Any, seen: list[Any] | None = None) -> bool:
    """Tell whether msgspec makes the same of JSON for *t* as the strict converter.

    Types that nobody has compared are left to cattrs. *seen* has the classes looked at before.
    """
    seen = [] if seen is None else seen
    origin, args = origin_of(t) or t, get_args(t)
    if t is Any or t in seen:
        return True
    if t in _LEAVES:
        return t is not Decimal  # msgspec reads all its digits, but cattrs is given a float
    if origin is Literal:
        return all(type(choice) is str for choice in args)  # no comparison of 1, 1.0 and true
    if inspect.isclass(t) and issubclass(t, enum.Enum):
        return is_text_enum(t)  # msgspec calls _missing_, and cattrs does not
    if origin is dict:
        has_text_keys = args[:1] in ((), (str,))  # msgspec reads other keys by rules of its own
        return has_text_keys and all(is_read_in_one_pass(arg, seen) for arg in args)
    if origin in (list, set, frozenset, tuple, *_UNIONS):
        return all(arg is Ellipsis or is_read_in_one_pass(arg, seen) for arg in args)
    if not inspect.isclass(t):
        return False
    seen.append(t)
    types = _settable_fields(t)
    return types is not None and all(is_read_in_one_pass(u, seen) for u in types)


def is_text_enum(cls: Any) -> bool:
    """Tell whether *cls* is an enum of texts without code of its own to find a member."""
    if not issubclass(cls, enum.Enum):
        return False
    own, default = (
        [inspect.getattr_static(c, name) for name in ("_missing_", "__init__")]
        for c in (cls, enum.Enum)
    )
    return own == default and all(type(member.value) is str for member in cls)


def _settable_fields(cls: Any) -> Iterable[Any] | None:
    """Return the types of the fields of *cls*, or None if setting them is not all that it takes."""
    if typing.is_typeddict(cls):
        keys = {typing.Required: cls.__required_keys__, typing.NotRequired: cls.__optional_keys__}
        hints = cls.__annotations__
        if any(key not in keys.get(origin_of(t), hints) for key, t in hints.items()):
            return None  # Python and cattrs do not see Required in an annotation that was a text
        return [get_args(t)[0] if origin_of(t) in keys else t for t in hints.values()]
    if not _has_plain_constructor(cls):
        return None
    try:
        hints = typing.get_type_hints(cls, include_extras=True)  # msgspec sees the same
    except (NameError, TypeError, AttributeError):  # a base class has names of a function
        return None
    fields: Any = attrs.fields(cls) if attrs.has(cls) else dataclasses.fields(cls)
    is_plain = all(
        f.init and f.type == hints.get(f.name) and getattr(f, "alias", f.name) == f.name
        and not (getattr(f, "converter", None) or getattr(f.default, "takes_self", False))
        # msgspec takes any attribute of the class for the field's value, and sets no default then.
        and (not hasattr(cls, f.name) or inspect.ismemberdescriptor(getattr(cls, f.name)))
        for f in fields
    )  # fmt: skip
    return [f.type for f in fields] if is_plain else None


def _has_plain_constructor(cls: Any) -> bool:
    """Tell whether attrs or dataclasses alone have written what makes an object of *cls*."""
    init, kinds = vars(cls).get("__init__"), (attrs.has(cls), dataclasses.is_dataclass(cls))
    if all(kinds) or not any(kinds) or not inspect.isfunction(init):
        return False
    if not inspect.getfile(init).startswith("<"):  # code that is generated comes from no file
        return False
    if inspect.isabstract(cls) or type(cls).__call__ is not type.__call__:
        return False
    if cls.__new__ is not object.__new__ or hasattr(cls, "__attrs_pre_init__"):
        return False
    if cls.__getattribute__ is not object.__getattribute__ or hasattr(cls, "__getattr__"):
        return False
    has_plain_setattr = cls.__setattr__ is object.__setattr__
    if not kinds[0]:
        params = cls.__dataclass_params__
        return bool(params.init and (params.frozen or has_plain_setattr))
    made: Any = attrs.inspect(cls)
    if not made.added_init or made.hashability is made.Hashability.HASHABLE_CACHED:
        return False
    # attrs writes a __setattr__ that validates, and refuses to do so where a class has its own.
    has_validator = any(field.validator for field in attrs.fields(cls))
    validates = has_validator and made.on_setattr_hook is not None
    return bool(made.is_frozen or has_plain_setattr or validates)


# ── codec ─────────────────────────────────────────────────────────────────────────────────────
#
# The codec turns JSON values into what handlers take, and what handlers return into JSON.
#
# Its rules are those of a strict cattrs converter: each JSON kind stands for itself, and nothing
# is coerced. A scalar goes through `msgspec.convert`, which gives one rule and one wording for all
# of them. The kind of an array or object is checked before cattrs' own hook iterates over it.
# Where msgspec builds the same value while it decodes the frame (see above), it may do so.

_MAX_EXPLAINED = 16_384  # bytes of JSON: finding every error of 1 MiB would block for seconds
_TEXT_KEY = object()  # Annotated[int, _TEXT_KEY] is an int that is the key of a JSON object
_ARRAYS: dict[Any, Any] = {  # what an array is declared as, and what is then made of it
    list: list, MutableSequence: list, tuple: tuple, Sequence: tuple, set: set, MutableSet: set,
    frozenset: frozenset, Set: frozenset, collections.deque: collections.deque,
}  # fmt: skip


def strict_converter() -> cattrs.Converter:
    """Make a converter with the rules of the wire: aliases count, and no value changes its type."""
    converter = cattrs.Converter(use_alias=True)
    for leaf in _LEAVES:  # cattrs uses these hooks for subclasses too: class Color(str, Enum)
        converter.register_structure_hook(leaf, msgspec.convert)
    structure = converter.register_structure_hook_factory
    structure(lambda t: t is object, lambda _: lambda value, _: value)
    structure(is_leaf, _leaf_hook)
    structure(lambda t: len(_kinds_of(t)) > 1, _union_hook)
    structure(lambda t: _kind_of(t) is not None, _allow_recursion(_container_hook))
    structure(lambda t: _inner_type(t) is not t, _inner_hook)
    structure(lambda t: _TEXT_KEY in getattr(t, "__metadata__", ()), _key_hook)
    unstructure = converter.register_unstructure_hook_factory
    converter.register_unstructure_hook_func(
        lambda t: t is object, lambda v: v if type(v) is object else converter.unstructure(v)
    )
    unstructure(lambda t: origin_of(t) in _UNIONS, _union_unstructure_hook)
    unstructure(declares_fields, _allow_recursion(_fields_unstructure_hook))
    unstructure(
        lambda t: _inner_type(t) is not t,
        lambda t, converter: converter.get_unstructure_hook(_inner_type(t)),
    )
    return converter


def _allow_recursion(make: HookFactory) -> HookFactory:
    """Wrap *make* so that a recursive type gets its own hook inside of itself.

    While the hook of a type is being made, whoever asks for it gets a stand-in that calls it
    later. cattrs alone would go by the class of the value there, whatever was declared.
    """
    in_progress: dict[Any, Callable[..., Any]] = {}

    def factory(t: Any, converter: cattrs.Converter) -> Callable[..., Any]:
        key, hook = (id(converter), t), None

        def stand_in(*args: Any) -> Any:
            nonlocal hook
            hook = hook or make(t, converter)
            return hook(*args)

        if key in in_progress:
            return in_progress[key]
        in_progress[key] = stand_in
        try:
            hook = make(t, converter)
        except RecursionError:  # cattrs is busy with the same generic class, such as Box[Box[int]]
            return stand_in
        finally:
            in_progress.pop(key, None)
        return hook

    return factory


def _kind_of(t: Any) -> type | None:
    """Return list if *t* is written as a JSON array, dict for an object, None for anything else."""
    cls = class_of(t)
    if cls is None:
        return dict if origin_of(t) in _UNIONS and all(map(has_fields, get_args(t))) else None
    if has_fields(t) or typing.is_typeddict(cls) or issubclass(cls, Mapping):
        return dict
    is_array = issubclass(cls, (Sequence, Set)) and not issubclass(cls, (str, bytes))
    return list if is_array and not is_leaf(cls) else None


def _kinds_of(t: Any) -> dict[Any, Any]:
    """Return the members of the union *t* by JSON kind: NoneType, list, dict, None for the rest."""
    kinds: dict[Any, Any] = {}
    for member in get_args(t) if origin_of(t) in _UNIONS and not is_leaf(t) else ():
        kind = member if member is types.NoneType else _kind_of(bare_type(member))
        kinds[kind] = kinds.get(kind, member) | member
    return kinds


def _union_hook(t: Any, converter: cattrs.Converter) -> Hook:
    """Make the hook of a union that goes by the JSON kind of the value."""
    hooks = {kind: (converter.get_structure_hook(m), m) for kind, m in _kinds_of(t).items()}
    other = hooks.get(None) or next(iter(hooks.values()))

    def structure(value: Any, _: Any) -> Any:
        hook, member = hooks.get(type(value), other)
        return hook(value, member)

    return structure


def _leaf_hook(t: Any) -> Hook:
    """Make the hook of a scalar.

    `Literal` and `Enum` compare value *and* type, because ``1 == True`` and ``1 == 1.0``.
    """
    members = get_args(t) if origin_of(t) in _UNIONS else (t,)
    leaves = tuple(member for member in members if member in _LEAVES)
    leaf: Any = Union[leaves] if leaves else None  # noqa: UP007 - of a tuple
    msgspec.json.Decoder(leaf)  # TypeError for a union that JSON cannot tell apart: UUID | datetime
    if leaves == members:
        return msgspec.convert
    named = [c for m in members if m not in leaves for c in get_args(m) or m]  # Literal or Enum
    values = [getattr(choice, "value", choice) for choice in named]
    choices = {(type(value), value): c for value, c in zip(values, named, strict=True)}
    text_enums: list[Any] = [m for m in members if inspect.isclass(m) and is_text_enum(m)]
    names = [_encode(value).decode() for value in values]
    names += [_JSON_NAMES.get(leaf) or str(leaf.__name__) for leaf in leaves]

    def structure(value: Any, _: Any) -> Any:
        with contextlib.suppress(KeyError, TypeError):  # TypeError: *value* cannot be hashed
            return choices[type(value), value]
        for cls in text_enums if type(value) is str else ():
            with contextlib.suppress(ValueError):  # an enum may have further values for a member
                return cls(value)
        with contextlib.suppress(msgspec.ValidationError):
            if leaves:
                return msgspec.convert(value, leaf)
        raise msgspec.ValidationError(f"expected one of {', '.join(names)}")

    return structure


def _inner_type(t: Any) -> Any:
    """Return the type inside of *t* if cattrs would misread *t*, otherwise *t* itself."""
    if origin_of(t) is typing.Annotated:
        return t.__origin__  # cattrs takes Annotated[dict, "x"] for a dict of "x"
    inner = hashable(unnamed(t))
    return t if inner is unnamed(t) else inner


def _inner_hook(t: Any, converter: cattrs.Converter) -> Hook:
    """Make the hook of a type that cattrs misreads."""
    inner = _inner_type(t)
    hook = converter.get_structure_hook(inner)
    return lambda value, _: hook(value, inner)


def _key_hook(t: Any, converter: cattrs.Converter) -> Hook:
    """Make the hook of a key that is no text: it is read from the text that stands for it."""
    inner = t.__origin__
    hook = converter.get_structure_hook(inner)

    def structure(key: Any, _: Any) -> Any:
        try:
            return hook(key, inner)
        except msgspec.ValidationError:
            with contextlib.suppress(msgspec.DecodeError):
                return hook(msgspec.json.decode(key), inner)
            raise

    return structure


def _container_hook(t: Any, converter: cattrs.Converter) -> Hook:
    """Make the hook of an array or object, which checks the kind of the value first."""
    kind: Any = _kind_of(t)
    inner = (_array_hook if kind is list else _object_hook)(t, converter)

    def structure(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            text = f"expected {_JSON_NAMES[kind]}, got {json_name(value)}"
            raise msgspec.ValidationError(text)
        return inner(value, t)

    return structure


def _array_hook(t: Any, converter: cattrs.Converter) -> Hook:
    """Make the hook of *t* for JSON arrays, which builds a list of the items first."""
    cls, args = class_of(t), get_args(t)
    if cols.is_namedtuple(cls):
        return cols.namedtuple_structure_factory(cls, converter)
    if cls not in _ARRAYS:
        raise cattrs.StructureHandlerNotFoundError(f"register a structure hook for {t!r}", t)
    if origin_of(t) is tuple and Ellipsis not in args:
        return _fixed_tuple_hook(t, converter)
    make = _ARRAYS[cls]
    inner = cols.list_structure_factory(cast(Any, list)[args[0] if args else Any], converter)
    return inner if make is list else lambda value, t: make(inner(value, t))


def _fixed_tuple_hook(t: Any, converter: cattrs.Converter) -> Hook:
    """Make the hook of ``tuple[int, str]``. cattrs has a public factory for it only since 26.2."""
    hooks = [(converter.get_structure_hook(arg), arg) for arg in get_args(t)]

    def structure(value: Any, _: Any) -> Any:
        if len(value) != len(hooks):
            raise msgspec.ValidationError(f"expected {len(hooks)} items, got {len(value)}")
        items, errors = list[Any](), list[Exception]()
        for index, (hook, item_type) in enumerate(hooks):
            try:
                items.append(hook(value[index], item_type))
            except Exception as exc:
                exc.add_note(cast(Any, cattrs.IterableValidationNote)("", index, item_type))
                errors.append(exc)
        if errors:
            raise cast(Any, cattrs.IterableValidationError)("", errors, t)
        return tuple(items)

    return structure


def _object_hook(t: Any, converter: cattrs.Converter) -> Hook:
    """Make the hook of *t* for JSON objects."""
    cls = class_of(t)
    if cls is None:  # a union of classes: cattrs finds the one whose fields are there
        find = create_default_dis_func(converter, *get_args(t))
        return lambda value, _: converter.structure(value, cast(Any, find(value)))
    if attrs.has(cls):
        return _validating_hook(t, converter, converter.gen_structure_attrs_fromdict(t))
    if has_fields(t):
        return converter.gen_structure_attrs_fromdict(t)
    if typing.is_typeddict(cls):
        inner, declared = converter.gen_structure_typeddict(t), cls.__annotations__
        return lambda value, t: {k: v for k, v in inner(value, t).items() if k in declared}
    key, item = (*get_args(t), Any, Any)[:2]
    make: Any = dict if cls in (Mapping, MutableMapping) else cls
    if cls is collections.Counter:
        item = int
    elif cls is collections.defaultdict:
        make = functools.partial(make, item if get_args(t) else None)
    if key not in (str, Any):
        key = typing.Annotated[key, _TEXT_KEY]
    return cols.mapping_structure_factory(cast(Any, dict)[key, item], converter, make)


def _validating_hook(t: Any, converter: cattrs.Converter, inner: Hook) -> Hook:
    """Make a hook that reports every validator that fails; attrs stops at the first.

    Where *inner* fails, each validator is asked about its field, if that had no other error. A
    field is structured twice in all, however deep the value.
    """
    cls = class_of(t)
    fields = [f for f in attrs.fields(cls) if f.init and f.validator]
    # An attrs.Converter may need the instance, and there is none.
    fields = [f for f in fields if not isinstance(f.converter, attrs.Converter)]

    def refusal(field: Any, value: Any) -> Exception | None:
        try:
            item = converter.structure(value[field.alias], field.type)
            field.validator(None, field, field.converter(item) if field.converter else item)
        except (AttributeError, cattrs.StructureHandlerNotFoundError):
            return None  # it looks at the instance, or the type is generic: attrs' error remains
        except Exception as exc:  # the validator's own error is reported for this field
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
            known = exc.exceptions if wrong or not found else ()  # one of *found* repeats it
            raise exc.derive([*known, *found]) from None

    return structure if fields else inner


def _union_unstructure_hook(t: Any, converter: cattrs.Converter) -> Callable[[Any], Any]:
    """Make the hook of a union: a subclass goes out with the fields of the declared member only."""
    check_distinct(t, converter)
    members = members_of(t)
    return lambda value: converter.unstructure(value, declared_member(value, members))


def declared_member(value: object, members: Members) -> Any:
    """Return as which of *members* the *value* goes out: as its own class if none fits."""
    exact = [m for m, cls in members if cls is type(value)]
    bases = [m for m, cls in members if isinstance(value, cls)]
    return (exact or bases or [type(value)])[0]


def members_of(t: Any) -> Members:
    """Return the members of the union *t*, or *t* itself, with the classes of their values.

    A union may be named. A member whose values are of no class in particular is left out.
    """
    bare = bare_type(t)
    if origin_of(bare) in _UNIONS:
        return [pair for member in get_args(bare) for pair in members_of(member)]
    cls = _written_class(t)
    return [] if cls is None else [(t, cls)]


def _written_class(t: Any) -> Any:
    """Return the class of the values that go out as *t*, or None if it has none."""
    cls = class_of(bare_type(t))
    return dict if typing.is_typeddict(cls) else cls


def check_distinct(t: Any, converter: cattrs.Converter) -> None:
    """Raise `Indistinct` if the class of a value does not tell as which member of *t* it goes out.

    Members that are written alike need not be told apart, such as ``list[int]`` and ``list[str]``.
    """
    for (one, cls), (other, _) in itertools.combinations(members_of(t), 2):
        if _share_values(one, other) and not _are_written_alike(one, other, converter):
            raise Indistinct(
                f"{_shown(one)} | {_shown(other)} may lose fields: a {cls.__name__} does not tell "
                f"as which of the two it goes out; write {_told_apart(one, other)}"
            )


def _told_apart(one: Any, other: Any) -> str:
    """Return what to write instead of ``one | other``."""
    pairs = [*zip(get_args(one), get_args(other), strict=False)]
    is_nested = any(a != b and (_share_values(a, b) or Ellipsis in (a, b)) for a, b in pairs)
    if origin_of(one) is not origin_of(other) or not pairs or is_nested:
        return "classes with @attrs.frozen instead, which are told apart"
    items = ["..." if a is b is Ellipsis else _shown(a | b) for a, b in pairs]
    return f"{_shown(origin_of(one))}[{', '.join(items)}]"


def _shown(t: Any) -> str:
    """Return *t* as it is written in code."""
    name = t.__qualname__ if inspect.isclass(t) and not get_args(t) else repr(t)
    return re.sub(r"[\w.<>]+\.(?=\w)", "", name)


def _share_values(one: Any, other: Any) -> bool:
    """Tell whether a value may be meant for either: a list for ``Sequence[A] | list[B]``, say."""
    first, second = _written_class(one), _written_class(other)
    if first is second:
        return first is not None
    if any(_kind_of(cls) is None or declares_fields(cls) for cls in (first, second)):
        return False
    is_below = issubclass(first, second) or issubclass(second, first)
    return is_below and (inspect.isabstract(first) or inspect.isabstract(second))


def _are_written_alike(one: Any, other: Any, converter: cattrs.Converter) -> bool:
    """Tell whether a value becomes the same JSON, as whichever of the two types it goes out."""
    one, other = bare_type(one), bare_type(other)
    args, others = get_args(one), get_args(other)
    if args and len(args) == len(others) and class_of(one) is class_of(other):
        pairs = zip(args, others, strict=True)
        return all(_are_written_alike(a, b, converter) for a, b in pairs)
    if declares_fields(one) or declares_fields(other):
        return one is other
    return bool(converter.get_unstructure_hook(one) == converter.get_unstructure_hook(other))


def _fields_unstructure_hook(t: Any, converter: cattrs.Converter) -> Callable[[Any], Any]:
    """Make the hook of a type that declares fields; whatever else a value has stays here."""
    cls = class_of(t)
    with contextlib.suppress(NameError, TypeError, AttributeError):  # cattrs may still manage
        resolve_class(cls, {}, {})
    if has_fields(t):
        return converter.gen_unstructure_attrs_fromdict(t)
    if cols.is_namedtuple(cls):
        return cols.namedtuple_unstructure_factory(cls, converter)
    inner, declared = converter.gen_unstructure_typeddict(t), cls.__annotations__
    return lambda value: inner({key: value[key] for key in value if key in declared})


class Codec:
    """Turn JSON values into what handlers take, and what they return into the text of a frame."""

    def __init__(self, converter: cattrs.Converter | None = None) -> None:
        self.converter: cattrs.Converter = strict_converter() if converter is None else converter
        self._hasty = self.converter
        if converter is None:  # nearly all payloads are valid: stop at the first error at first
            self._hasty = self.converter.copy(detailed_validation=False)

    def frame_class(self, type: str, annotation: Any, handler: Any = None) -> FrameClass:
        """Make the class of the frames of *type*; where it can be, decoding builds the payload.

        Decoding with msgspec and then structuring with cattrs takes four times as long or more.
        """
        with contextlib.suppress(TypeError, NameError, NotImplementedError):
            if self._hasty is not self.converter and is_read_in_one_pass(annotation):
                return frame_class(type, annotation, is_built=True, handler=handler)
        return frame_class(type, Any, handler=handler)

    def check(self, annotation: Any, namespaces: Namespaces, seen: list[Any]) -> None:
        """Resolve *annotation* and all that it contains; raise whatever keeps it from working."""
        for t in types_in(hashable(annotation), namespaces, seen):
            is_generic = bool(getattr(t, "__parameters__", ()))
            if is_generic and t is class_of(t):
                raise TypeError(f"{t.__name__} is generic; write {t.__name__}[int], say")
            if t not in (Any, Ellipsis) and origin_of(t) not in _QUALIFIERS and not is_generic:
                self.converter.get_structure_hook(t)

    def check_reply(self, annotation: Any, namespaces: Namespaces) -> None:
        """Raise `Indistinct` if *annotation*, or a type in it, leaves open what goes out."""
        annotation = hashable(annotation)
        # A name that is not known yet may be known by the time of the first reply.
        with contextlib.suppress(NameError, TypeError, AttributeError):
            check_distinct(annotation, self.converter)
            for t in types_in(annotation, namespaces, []):
                self.converter.get_unstructure_hook(t)

    def structure(self, payload: Any, annotation: Any, type: str) -> Any:
        """Build what a handler takes, or raise `MessageError` (``invalid_payload``)."""
        if annotation is Any:
            return payload
        annotation = hashable(annotation)
        try:
            return self._hasty.structure(payload, annotation)
        except (Exception, SystemExit) as exc:  # a user's hook or validator may raise anything
            errors = errors_of(exc)
        try:
            if self._hasty is not self.converter and len(_encode(payload)) <= _MAX_EXPLAINED:
                # This may succeed: cattrs' hasty hook fails if a keyword-only field comes first.
                return self.converter.structure(payload, annotation)
        except (Exception, SystemExit) as exc:  # the same failure, with every wrong field
            errors = errors_of(exc)
        raise invalid_payload(type, errors)

    def writer_of(self, value: object, type: str, declared: Any = None) -> Writer:
        """Return how to answer with *value* and others of its class, as *declared* where given.

        They go out under the type of their message class if they have one, otherwise under *type*.
        """
        if value is None:
            return type, lambda _: UNSET
        shape = hashable(declared_member(value, members_of(declared)))
        own_type = message_type(class_of(shape))
        return own_type or type, self.converter.get_unstructure_hook(shape)

    def encode(self, type: str, payload: Any, group: str | None = None) -> bytes:
        """Return the frame for *payload*."""
        payload = UNSET if payload is None else self.converter.unstructure(payload)
        return _encode(Sent(type, group=group, payload=payload))


# ── handlers ──────────────────────────────────────────────────────────────────────────────────
#
# Everything about a function is settled when it is registered: what it takes, how its payload is
# structured, whether it streams. A message in flight only looks its handler up and calls it.

_VERBS = set(falcon.constants.COMBINED_METHODS) - {"CONNECT"}  # on_connect is a connect handler
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
    """Calls *function* with the payload: returns a coroutine, or an async generator."""
    annotation: Any
    """What the payload is structured to; for fields, a typed dict made of the parameters."""
    parameter: inspect.Parameter | None
    """The parameter that takes the whole payload."""
    defaults: dict[str, Any] | None
    """The defaults of the parameters that take the payload's fields, if there are any."""
    returns: Any
    """The declared type of a reply or of a stream's item, or None."""
    streams: bool
    is_concurrent: bool
    """Whether it runs beside others, in a task of its own; streams do."""
    writers: dict[Any, Writer] = attrs.Factory(dict)
    """How to write what the function has returned before, by class."""
    hints: set[str] = attrs.Factory(set)
    """The parameters about which a hint was logged; it is logged once."""

    @property
    def takes_payload(self) -> bool:
        """Whether *function* has a parameter for the payload, or several for its fields."""
        return self.parameter is not None or self.defaults is not None

    def structure(self, payload: Any, codec: Codec) -> Any:
        """Return the value to call *function* with, or raise `MessageError` (``invalid_payload``).

        *payload* is `UNSET` where the message had none.
        """
        if payload is not UNSET:
            self._hint(payload)
            return codec.structure(payload, self.annotation, self.type)
        if self.defaults is not None:
            return codec.structure({}, self.annotation, self.type)
        if self.parameter is None or self.parameter.default is not _EMPTY:
            return self.parameter and self.parameter.default
        try:  # a payload that may be null may also be missing
            return codec.structure(None, self.annotation, self.type)
        except MessageError:
            missing = [{"path": "$.payload", "message": "required, but missing"}]
            raise invalid_payload(self.type, missing) from None

    def refusal(self, payload: Any, codec: Codec, exc: Exception) -> MessageError:
        """Return the error for a payload that msgspec refuses with *exc*.

        cattrs lists every wrong field. Where it finds none, the error names the field of *exc*.
        """
        try:
            self.structure(payload, codec)
        except MessageError as error:
            return bare(error)
        text, _, path = str(exc).rpartition(" - at ")
        if path == "`$.type`":  # the decoder was chosen by a type that came before this one
            return MessageError("invalid_envelope", '"type" is there twice')
        found = explain(msgspec.ValidationError(text), path.strip("`")) if text else explain(exc)
        return invalid_payload(self.type, list(found))

    def _hint(self, payload: Any) -> None:
        """Log, once, that *function* seems to want a field of the payload, and gets all of it."""
        if self.parameter is None or type(payload) is not dict or self.annotation not in _LEAVES:
            return
        if (name := self.parameter.name) in payload and name not in self.hints:
            self.hints.add(name)
            logger.warning(
                "%s got an object with the key %r as its whole payload; "
                "(conn, *, %s) was probably meant", place_of(self.function), name, self.parameter,
                extra={"message_type": self.type},
            )  # fmt: skip


def place_of(function: Callable[..., Any]) -> str:
    """Return where *function* is, such as ``say() at chat.py:12``, for messages about it."""
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
        with contextlib.suppress(ValueError, TypeError):  # some callables have no signature
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
    parameter, fields = _split_parameters(function, name, path_params)
    try:
        hints = _hints_of(function, namespaces)
        _check_first(function, name, hints)
        annotation = _payload_type(name, parameter, fields, hints, message_class)
        codec.check(annotation, namespaces, [])
    except (NameError, TypeError, ValueError, cattrs.StructureHandlerNotFoundError) as exc:
        raise _unstructurable(function, exc) from exc
    if parameter and message_class and annotation is not message_class:
        write = f"async def {name}(conn, {parameter.name}: {message_class.__name__})"
        raise PachinkoError(f"{place_of(function)} handles {message_class.__name__}; write {write}")
    returns, streams = _reply_type(function, hints), inspect.isasyncgenfunction(function)
    try:
        codec.check_reply(returns, namespaces)
    except Indistinct as exc:
        raise PachinkoError(f"the reply of {place_of(function)} is ambiguous: {exc}") from exc
    defaults = {p.name: p.default for p in fields if p.default is not _EMPTY} if fields else None
    call = _caller(function, parameter, fields)
    return Handler(
        type, function, call, annotation, parameter, defaults, returns, streams,
        is_concurrent=streams or concurrent,
    )  # fmt: skip


def _hints_of(function: Callable[..., Any], namespaces: Namespaces) -> dict[str, Any]:
    """Return the annotations of *function*, resolved where it was registered."""
    inner: Any = inspect.unwrap(function)
    globals_ = {**namespaces[0], **getattr(inner, "__globals__", {})}
    inner = getattr(inner, "func", inner)
    hints = typing.get_type_hints(inner, globals_, namespaces[1], include_extras=True)
    return {name: hashable(t) for name, t in hints.items()}


def _payload_type(
    name: str,
    parameter: inspect.Parameter | None,
    fields: list[inspect.Parameter],
    hints: dict[str, Any],
    message_class: Any,
) -> Any:
    """Return what the payload is structured to: for *fields* a typed dict, called *name*."""
    if not fields:
        return hints.get(parameter.name, message_class or Any) if parameter else Any
    types = {p.name: hints.get(p.name, Any) for p in fields}
    optional = {p.name for p in fields if p.default is not _EMPTY}
    not_required = cast(Any, typing.NotRequired)
    members = {key: not_required[t] if key in optional else t for key, t in types.items()}
    return cast(Any, typing.TypedDict)(name, members)


def _reply_type(function: Callable[..., Any], hints: dict[str, Any]) -> Any:
    """Return the declared type of a reply or of a stream's item, or None if anything goes."""
    returns = hints.get("return")
    if inspect.isasyncgenfunction(function) and get_args(returns):
        returns = get_args(returns)[0]  # AsyncIterator[Item], AsyncGenerator[Item, None]
    return None if returns in (types.NoneType, Any, object) else returns


def _caller(
    function: Callable[..., Any],
    parameter: inspect.Parameter | None,
    fields: list[inspect.Parameter],
) -> Callable[[Connection, Any], Any]:
    """Return how to call *function* with a connection and a structured payload."""
    if fields:
        return lambda conn, value: function(conn, **value)
    return function if parameter else lambda conn, _: function(conn)


def _unstructurable(function: Callable[..., Any], exc: Exception) -> PachinkoError:
    """Return the error for a payload that cattrs cannot structure, because of *exc*."""
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


def _split_parameters(
    function: Callable[..., Any], name: str, path_params: Collection[str]
) -> tuple[inspect.Parameter | None, list[inspect.Parameter]]:
    """Return the parameter for the whole payload, or None, and those for its fields.

    A function with both is refused.
    """
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
    """Return the names in a Falcon URI template: room and n in ``/ws/{room}/{n:int}``."""
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


def check_disconnect(function: Callable[..., Any]) -> None:
    """Refuse what is no disconnect handler."""
    check_function(function, "@ws.disconnect\nasync def leave(conn): ...", 1)


def read_resource(prefix: str, resource: object) -> list[tuple[str, Callable[..., Any]]]:
    """Return the ``on_<name>`` methods of *resource*, each with the name behind ``on_``."""
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
    """The functions that are registered for one endpoint."""

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
    """Reads a text frame of a known type. A validator in a payload may raise anything."""
    frames: list[FrameClass] = attrs.Factory(list)
    """The classes of the frames that *decode* returns."""

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
        self.frames += frames
        self.decode = self.decode_first

    def decode_first(self, text: str) -> Received:
        """Make the decoder, once for all handlers that came together, and use it."""
        self.decode = decoder_of(self.frames)
        return self.decode(text)

    def error_handler(self, exc: BaseException) -> Callable[..., Awaitable[Any]] | None:
        """Return the handler for the class of *exc* or its nearest base class, or None.

        An exception with a meaning of its own, such as `Close`, is not looked up by its bases.
        """
        built_in = (MessageError, Close, falcon.HTTPError, falcon.WebSocketDisconnected)
        for cls in type(exc).__mro__:
            if cls in self.errors:
                return self.errors[cls]
            if cls in built_in:
                break
        return None


def refuse_second(first: Callable[..., Any] | None, second: Any, what: str) -> None:
    """Raise a `PachinkoError` that names both functions if there is a *first* one already."""
    if first is not None:
        raise PachinkoError(
            f"{what} has a handler: {place_of(first)}; and a second: {place_of(second)}. "
            f"Remove one, or let it handle another type"
        )


# ── handshake ─────────────────────────────────────────────────────────────────────────────────
#
# The headers of the handshake decide who may connect. A page of any site can open a WebSocket to
# any other site; the browser sends that site's cookies along, and leaves it to the server to check
# the `Origin` (RFC 6455, 10.2). A client that is no browser may send any origin, or none.

_NAME = r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?"
_AUTHORITY = rf"(?P<host>\[[0-9a-f:.]+\]|{_NAME})(?::(?P<port>[0-9]{{1,5}}))?"
_HOST = re.compile(_AUTHORITY, re.ASCII)
_ORIGIN = re.compile(rf"(?P<scheme>[a-z][a-z0-9+.-]*)://{_AUTHORITY}", re.ASCII)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_SHOWN = 200  # characters of a header in a log line; a header may have thousands
UNAUTHENTICATED = 3401  # the close code is 3000 and the HTTP status


@attrs.frozen
class Origin:
    """The origin of a page (RFC 6454), in lower case.

    The port is that of the scheme where none was named.
    """

    scheme: str
    host: str
    port: int | None

    def is_below(self, other: Origin) -> bool:
        """Tell whether its host is a subdomain of that of *other*; all else has to be equal."""
        is_alike = (self.scheme, self.port) == (other.scheme, other.port)
        return is_alike and self.host.endswith("." + other.host)


def parse_origin(text: str) -> Origin | None:
    """Read an ``Origin`` header. Returns None for ``null`` and for anything that is no origin."""
    match = _ORIGIN.fullmatch(text.lower()) if text.isascii() else None
    if match is None or int(match["port"] or 0) > 65_535:
        return None
    scheme, host, port = match.group("scheme", "host", "port")
    return Origin(scheme, host, int(port) if port else _DEFAULT_PORTS.get(scheme))


def is_same_host(origin: Origin, scheme: str, host: str) -> bool:
    """Tell whether a page of *origin* belongs to the *host* that it connects to.

    *host* is the header of that name. Where it names no port, the port is that of the origin's
    scheme. An ``https`` page may come by a *scheme* without encryption, because a proxy may have
    decrypted it. An ``http`` page may not come by an encrypted one, because anybody on the line
    could have written that page.
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
    """The origins that one endpoint lets in, beside the request's own host."""

    exact: frozenset[Origin]
    above: tuple[Origin, ...]
    """The origins of which all subdomains are let in, as ``https://*.example.com`` says."""
    takes_all: bool
    trust_forwarded: bool

    def refusal(self, req: falcon.asgi.Request) -> str | None:
        """Return why *req* is refused, with the setting that lets it in, or None if it may come in.

        Falcon joins two ``Origin`` headers with a comma; that is no origin.
        """
        text = req.get_header("Origin")
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
    """Return the scheme and host that the first proxy was asked for.

    Later proxies may have added theirs behind a comma.
    """
    hops = (req.forwarded_scheme, req.forwarded_host)
    scheme, host = (each.partition(",")[0].strip() for each in hops)
    return scheme, host


def read_origins(value: Iterable[str] | None, trust_forwarded: object) -> Origins:
    """Check the options *origins* (its *value*) and *trust_forwarded*, or raise `PachinkoError`."""
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


def token_of(payload: Any) -> str | None:
    """Return the token in the payload of an ``authenticate`` message, or None if it has none."""
    token = payload.get("token") if type(payload) is dict else None
    return token if isinstance(token, str) else None


# ── limits ────────────────────────────────────────────────────────────────────────────────────
#
# What bounds one connection: the time that code may take, the messages that a client may send, and
# the options of an endpoint. Nothing here knows a connection.

_MAX_CODES = 100  # error codes counted apart: an application may make them up as it goes
_CANCEL_AGAIN = 5.0  # seconds that cancelled code may clean up before it is cancelled once more
# Before Python 3.13 a `TaskGroup` leaves a cancellation counted that it has caught.
_COUNTS_CANCELLATIONS: bool = sys.version_info >= (3, 13)


class TimeLimit:
    """Cancel the task inside the ``with`` block when the time has come; raise `TimeoutError`.

    `asyncio.timeout` does this for code that ends when it is cancelled. An application's code may
    swallow a cancellation, and so does a `TaskGroup` of Python 3.11 that is just ending. This
    class therefore cancels the task again every 5 seconds, until the block ends.

    A cancellation that comes from elsewhere leaves the block as `CancelledError` and is never
    taken for the time-out. Before Python 3.13 this holds for those that come after the time-out
    only, since the count of a task may hold cancellations that a `TaskGroup` has caught.
    """

    __slots__ = ("_others", "_own", "_task", "_timer", "_when", "expired")

    def __init__(self, when: float | None = None) -> None:
        self._when = when
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.Handle | None = None
        self._own = self._others = 0  # cancellations of the task, by this limit and by others
        self.expired: bool = False

    def __enter__(self) -> TimeLimit:
        self._task = current_task()
        self._others = self._task.cancelling()
        if self._when is not None:
            self.end_at(self._when)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: object, traceback: object) -> None:
        task, self._task = cast("asyncio.Task[Any]", self._task), None
        if self._timer is not None:
            self._timer.cancel()
        # Code inside the block may have taken back some of this limit's cancellations by itself.
        still_counted = min(self._own, task.cancelling() - self._others)
        for _ in range(still_counted):
            task.uncancel()
        is_only_ours = task.cancelling() <= self._others
        if self.expired and kind is asyncio.CancelledError and is_only_ours:
            raise TimeoutError

    def end_at(self, when: float) -> None:
        """Expire at *when* on the loop's clock. Does nothing after the block or the expiry."""
        if self._task is None or self.expired:
            return
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        if when <= loop.time():  # A timer would let events of this turn of the loop go first.
            self._timer = loop.call_soon(self._expire)
        else:
            self._timer = loop.call_at(when, self._expire)

    def is_around(self, task: object) -> bool:
        """Return whether *task* is inside the block."""
        return self._task is task

    def _expire(self) -> None:
        task = cast("asyncio.Task[Any]", self._task)
        if not self.expired:
            self.expired = True
            self._others = self._others if _COUNTS_CANCELLATIONS else task.cancelling()
        self._own += 1
        task.cancel()
        self._timer = asyncio.get_running_loop().call_later(_CANCEL_AGAIN, self._expire)


current_task: Callable[[], asyncio.Task[Any]] = cast(Any, asyncio.current_task)
"""Returns the task that runs this code, which is always one here."""


class Rate:
    """Admit at most *count* messages at once, and *count* in *seconds* on average (GCRA)."""

    __slots__ = ("_due", "_refused", "_since", "count", "seconds")

    def __init__(self, count: int, seconds: float) -> None:
        self.count: int = count
        self.seconds: float = seconds
        self._due = self._since = 0.0
        self._refused = 0

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
        """Whether *seconds* have seen more than ten times as many refusals as messages fit in."""
        return self._refused > 10 * self.count


def _option(is_valid: Callable[[Any], bool], kind: str) -> Any:
    def check(_: Any, field: Any, value: Any) -> None:
        if not is_valid(value):
            raise PachinkoError(f"{field.name} is {kind}, got {value!r}")

    return attrs.field(validator=check)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def is_seconds(value: Any) -> bool:
    """Return whether *value* is a finite number of seconds, at least 0."""
    return type(value) in (int, float) and 0 <= value < math.inf


def _is_time_limit(value: Any) -> bool:
    return is_seconds(value) and value > 0


def _is_rate(value: Any) -> bool:
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2
    return value is None or (is_pair and _is_count(value[0]) and is_seconds(value[1]) and value[1])


@attrs.frozen(kw_only=True)
class Limits:
    """The options of an endpoint that bound what one connection may use."""

    max_size: int = _option(_is_count, "a number of bytes, at least 1")
    rate: tuple[int, float] | None = _option(_is_rate, "(messages, seconds), such as (20, 1.0)")
    outbox: int = _option(_is_count, "a number of messages, at least 1")
    outbox_bytes: int = _option(_is_count, "a number of bytes, at least 1")
    overflow: str = _option(("close", "drop_oldest").__contains__, '"close" or "drop_oldest"')
    send_timeout: float = _option(is_seconds, "a number of seconds, at least 0")
    linger: float = _option(is_seconds, "a number of seconds, at least 0")
    max_concurrent: int = _option(_is_count, "a number of tasks, at least 1")
    max_groups: int = _option(_is_count, "a number of groups, at least 1")
    handler_timeout: float | None = _option(
        lambda value: value is None or _is_time_limit(value), "a number of seconds above 0, or None"
    )
    auth_timeout: float = _option(_is_time_limit, "a number of seconds above 0")


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


# ── outbox ────────────────────────────────────────────────────────────────────────────────────
#
# What waits to be written to one client. A hub's messages are bounded in number and bytes; replies
# and what a handler sends wait for the client by themselves, so they are not counted.


def text_event(data: bytes) -> Event:
    """Return the ASGI event that sends *data* as a text frame (ASGI, WebSocket: Send)."""
    return {"type": "websocket.send", "text": data.decode()}


@attrs.frozen(eq=False)
class Waiting:
    """An event that waits for its turn to be written."""

    event: Event
    written: asyncio.Future[bool] | None = None
    """Whether it has been written, for the sender that waits for it."""
    size: int = 0
    """The bytes of a message that a hub sent, which may be dropped; 0 for all else."""
    group: str | None = None
    close: Close | None = None
    """For the close frame, which Falcon's socket writes."""

    def end(self, is_written: bool) -> None:
        """Tell the sender that waits for it, unless it knows or was cancelled."""
        if self.written is not None and not self.written.done():
            self.written.set_result(is_written)


@attrs.define(eq=False)
class Outbox:
    """The events that wait for a write in progress, in order; those of hubs are counted."""

    queue: collections.deque[Waiting] = attrs.Factory(collections.deque)
    pushed: int = 0
    """How many of them a hub sent."""
    size: int = 0
    """The bytes of these."""
    gaps: dict[str | None, None] = attrs.Factory(dict)
    """The groups of messages that were dropped, in order."""

    def put(self, waiting: Waiting) -> None:
        """Add *waiting* at the end."""
        self.queue.append(waiting)
        if waiting.size:
            self.pushed += 1
            self.size += waiting.size

    def exceeds(self, share: float, limits: Limits) -> bool:
        """Return whether a hub's messages fill more than *share* of what the outbox may hold."""
        return self.pushed > limits.outbox * share or self.size > limits.outbox_bytes * share

    def drop_oldest(self) -> None:
        """Drop the oldest of a hub's messages and remember the gap in its group."""
        index = next(i for i, waiting in enumerate(self.queue) if waiting.size)
        self.gaps[self.queue[index].group] = None
        self.pushed -= 1
        self.size -= self.queue[index].size
        del self.queue[index]

    def take(self) -> Waiting | None:
        """Remove and return the event to write next, or return None when there is none.

        The gaps follow the last message, one for each group, and precede the close frame.
        """
        while self.queue:
            if self.gaps and self.queue[0].close is not None:
                break
            waiting = self.queue.popleft()
            if waiting.size:
                self.pushed -= 1
                self.size -= waiting.size
            if waiting.written is None or not waiting.written.done():  # else its sender is gone
                return waiting
        for group in self.gaps:
            del self.gaps[group]
            return Waiting(text_event(gap_of(group)))
        return None

    def clear(self) -> None:
        """Forget everything; senders that wait learn that it was not written."""
        for waiting in self.queue:
            waiting.end(False)
        self.queue.clear()
        self.gaps.clear()
        self.pushed = self.size = 0


# ── outgoing ──────────────────────────────────────────────────────────────────────────────────
#
# The writing half of a connection. At most one write is in progress on a socket. Whatever is sent
# meanwhile waits in the outbox, so that messages leave in the order in which code sent them. The
# answer to the handshake is the first write: what connect handlers send waits for it. When a write
# ends while the outbox holds something, a writer task goes on with that. A client that keeps up
# needs neither an outbox nor a task.

_TURN = 256  # writes of one message at a stretch: a few milliseconds under uvicorn
_GOODBYE = 1.0  # seconds to wait where nobody should: for an evicted client's close frame, say


class Phase(enum.StrEnum):
    """What can be written to a connection."""

    CONNECTING = "connecting"
    """The handshake is not answered: what is sent waits for the answer."""
    OPEN = "open"
    """Messages flow."""
    CLOSING = "closing"
    """The server closes: what was sent before still goes out, and then the close frame."""
    GONE = "gone"
    """The client has gone or was given up: nothing can be written any more."""


_OPEN = Phase.OPEN  # PERF: each message asks for it, and a member of an enum costs three globals.

# The only transitions between phases, with the method of `Outgoing` that makes each.
TRANSITIONS: dict[tuple[Phase, Phase], str] = {
    (Phase.CONNECTING, Phase.OPEN): "open",  # The handshake has been answered.
    (Phase.CONNECTING, Phase.CLOSING): "open",  # The same, and `close` was called before.
    (Phase.CONNECTING, Phase.GONE): "lost",  # The client left, or the handshake failed.
    (Phase.OPEN, Phase.CLOSING): "close",  # Code, a limit, a shutdown or an eviction closes.
    (Phase.OPEN, Phase.GONE): "lost",  # The client left, or a write failed.
    (Phase.CLOSING, Phase.GONE): "lost",  # The close frame is out, or it takes too long.
}


class Suspended(Generator[Any, Any, Any]):
    """The rest of a coroutine whose first step has run and which waits for something.

    The task that ran the first step awaits the rest, so `asyncio.timeout`,
    `asyncio.current_task` and context variables inside behave as if the coroutine had been awaited.
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
    """Start a task and run it up to where it first waits; before Python 3.12, start it plainly."""
    if sys.version_info >= (3, 12):
        return asyncio.Task(coroutine, loop=asyncio.get_running_loop(), eager_start=True)
    else:
        return asyncio.get_running_loop().create_task(coroutine)


def mark_closed(ws: falcon.asgi.WebSocket, code: int | None) -> None:
    """Tell Falcon's socket that the connection is over.

    Pachinko calls the server's own `receive` and `send`, so Falcon does not see by itself that a
    client has gone. After the responder Falcon would close the socket once more, and for a client
    that does not read it would wait for ever.
    """
    ws._state = type(ws._state).CLOSED
    ws._close_code = code


class _Nobody:
    """Stands for the session of a connection that is over: a reference to it would be a cycle."""

    is_handling = False

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


_NOBODY: Any = _Nobody()


@attrs.define(eq=False, weakref_slot=False)
class Outgoing:
    """The writing half of one connection."""

    _id: str
    _ws: falcon.asgi.WebSocket
    limits: Limits
    _counters: Counters
    _session: Session
    phase: Phase = Phase.CONNECTING
    close_code: int | None = None  # the one sent, or the one that the server reported before that
    writing: Literal["", "handshake", "sender", "task", "writer"] = "handshake"
    """Who writes: nobody, the handshake, a sender by itself, a task that has not begun, or one
    that has."""
    sent: int = 0  # frames
    asgi_send: Callable[[Event], Awaitable[None]] = attrs.field(init=False)
    outbox: Outbox | None = None
    writer: asyncio.Task[Any] | None = None
    _goodbye: asyncio.Future[bool] | None = None  # whether the close frame was written
    _patience: asyncio.Timeout | None = None  # the time limit of the sender that writes by itself
    _is_slow: bool = False  # and the log says so

    def __attrs_post_init__(self) -> None:
        # The server's own `send`. Falcon's would cost 12 % of a message and 5 % of a delivery.
        self.asgi_send = self._ws._asgi_send

    @property
    def closed(self) -> bool:
        """Whether the client has gone or the server has begun to close."""
        return self.close_code is not None or self.phase is Phase.GONE

    @property
    def is_answered(self) -> bool:
        """Whether the handshake has been answered, so that the connection counts as a member."""
        return self.writing != "handshake"

    def disconnected(self) -> falcon.WebSocketDisconnected:
        """Return the error for code that sends to a connection that is closed."""
        return falcon.WebSocketDisconnected(self.close_code or 1006)

    # One sender

    async def send(self, event: Event) -> None:
        """Write *event* when its turn has come. Raises `falcon.WebSocketDisconnected`."""
        if (rest := self.start(event)) is not None:
            await rest

    def start(self, event: Event) -> Awaitable[None] | None:
        """Write *event* when its turn has come; return what is left to await, or None.

        PERF: the server's `send` usually finishes without suspending. Running its first step here
        avoids a coroutine and a time limit in the common case.
        """
        if self.phase is not _OPEN or self.writing:
            return self._send_later(event)
        try:
            for waits_for in (steps := self.asgi_send(event).__await__()):
                self.writing = "sender"
                return self._send_rest(Suspended(steps, waits_for))
        except Exception as exc:  # The server, or an ASGI middleware, may raise anything.
            self.write_failed(exc)
            raise self.disconnected() from None
        self.sent += 1
        return None

    async def _send_rest(self, rest: Suspended) -> None:
        """Finish a write whose first step has been run; evict a client that takes too long."""
        patience = asyncio.timeout(self.limits.send_timeout)
        try:
            async with patience:
                self._patience = patience
                try:
                    await rest
                finally:
                    self._patience = None
            self.sent += 1
        except Exception as exc:  # The server, or an ASGI middleware, may raise anything.
            if patience.expired():
                self.evict()
            else:
                self.write_failed(exc)
            raise self.disconnected() from None
        finally:
            self.write_next()

    async def _send_later(self, event: Event) -> None:
        """Write *event* behind the write in progress. Raises `falcon.WebSocketDisconnected`.

        During the handshake this returns at once: connect handlers wait for nobody. What they send
        after they have closed the connection is dropped.
        """
        if self.phase is Phase.CONNECTING:
            if self.close_code is None:
                self._put(Waiting(event))
            return
        if self.phase is not Phase.OPEN:
            raise self.disconnected()
        written: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._put(Waiting(event, written))
        try:
            async with asyncio.timeout(self.limits.send_timeout):
                is_written = await written
        except TimeoutError:
            self.evict()
            is_written = False
        if not is_written:
            raise self.disconnected()

    # Hubs

    @staticmethod
    async def fan_out(receivers: Iterable[Outgoing], data: bytes, group: str | None = None) -> None:
        """Start one write of *data* to each of *receivers*, and wait for no client.

        *group* is the one that a gap names where the message is dropped.
        """
        waiting, is_crowded = Waiting(text_event(data), None, len(data), group), False
        ready: list[Outgoing] = []
        try:
            for receiver in receivers:
                if receiver.phase is _OPEN and not receiver.writing:
                    receiver.writing = "task"
                    ready.append(receiver)
                else:
                    is_crowded |= receiver.push(waiting)
        finally:
            BatchWriter(ready, waiting.event).start()
        while ready:  # noqa: ASYNC110 - the batch writer empties it a turn at a time, even alone
            await asyncio.sleep(0)
        if is_crowded:  # The client may be behind only because this code kept the loop busy.
            await asyncio.sleep(0)

    @staticmethod
    async def write_each(batch: list[Outgoing], event: Event) -> None:
        """Write *event* to the connections of *batch*, which `fan_out` has claimed, and empty it.

        PERF: one ``finally`` around the loop instead of one for each receiver, and no call of ours
        for a receiver, save 8 % of a delivery.
        """
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
            if receiver is not None:  # This task was cancelled while it wrote to this one.
                receiver.writer = None
                receiver.write_next()

    def push(self, waiting: Waiting) -> bool:
        """Put a hub's message into the outbox; return whether it is more than half full.

        A client that exceeds its outbox is evicted, or loses its oldest messages, as `overflow`
        says. A write that has not begun is no sign of a slow client.
        """
        if self.closed:
            return False
        outbox = self._put(waiting)
        self._counters.peak(outbox.pushed)
        is_behind = self.writing != "task"
        if is_behind and outbox.exceeds(1, self.limits) and self.limits.overflow == "close":
            self.evict()
        while is_behind and outbox.exceeds(1, self.limits):
            outbox.drop_oldest()
            self._counters.add(dropped=1)
            self._log_slow("messages for it are dropped")
        return outbox.exceeds(0.5, self.limits)

    async def _write(self, waiting: Waiting) -> None:
        """Write *waiting* and then the outbox, until that is empty or the client has gone."""
        self.writing, self.writer = "writer", current_task()
        try:
            while self.phase is not Phase.GONE:
                if waiting.close is not None:
                    await self._ws.close(waiting.close.code, waiting.close.reason or None)
                else:
                    await self.asgi_send(waiting.event)
                    self.sent += 1
                waiting.end(True)
                following = self.outbox.take() if self.outbox is not None else None
                if following is None:
                    break
                waiting = following
        except Exception as exc:  # The server, or an ASGI middleware, may raise anything.
            self.write_failed(exc)
        finally:
            waiting.end(False)
            self.writer = None
            self.write_next()

    # The end

    def open(self) -> None:
        """Let what was sent during the handshake go out, now that it is answered."""
        if self.phase is Phase.CONNECTING:
            self._enter(Phase.OPEN if self.close_code is None else Phase.CLOSING)
        self.write_next()

    def close(self, close: Close, *, drops: bool = False) -> None:
        """Send a close frame behind what was sent before, unless that *drops*; twice is once."""
        self._session.on_close()
        if self.closed:
            return
        if drops and self.outbox is not None:
            self.outbox.clear()
        self.close_code = close.code
        self._goodbye = asyncio.get_running_loop().create_future()
        self._put(Waiting({}, self._goodbye, close=close))
        if self.phase is Phase.OPEN:
            self._enter(Phase.CLOSING)
        if not self.writing:
            self.write_next()

    def evict(self) -> None:
        """Give up on a client that is too slow."""
        if self.closed:
            return
        self._counters.add(evicted=1)
        self._log_slow("closed with 1013")
        self.close(Close(1013, "too slow"), drops=True)
        self._stop_writing()

    def lost(self, code: int | None = None) -> None:
        """Give up writing. *code* is the one that the server has reported, if it has."""
        if self.close_code is None:
            self.close_code = code
        if self.phase is Phase.GONE:
            return
        if self.outbox is not None:
            self.outbox.clear()
        self._stop_writing()
        self._enter(Phase.GONE)

    async def settle(self) -> None:
        """Give the close frame its time, then make sure that nothing waits for this client."""
        try:
            if self._goodbye is not None:
                is_urgent = self.close_code in (1012, 1013)  # of a shutdown, or a slow client
                patience = _GOODBYE if is_urgent else self.limits.send_timeout
                await asyncio.wait([self._goodbye], timeout=patience)
                if not self._ws.closed:
                    mark_closed(self._ws, self.close_code)
        finally:
            self.lost()

    def release(self) -> None:
        """Let go of the session, when the connection is over."""
        self.lost()
        self.writing = ""  # A handshake that an exception has ended is never answered.
        self._session = _NOBODY

    def _enter(self, phase: Phase) -> None:
        if (self.phase, phase) not in TRANSITIONS:
            raise RuntimeError(f"a connection does not go from {self.phase} to {phase}")
        self.phase = phase
        if phase is not Phase.OPEN:
            self._session.on_end()

    def _put(self, waiting: Waiting) -> Outbox:
        outbox = self.outbox
        if outbox is None:
            outbox = self.outbox = Outbox()
        outbox.put(waiting)
        return outbox

    def write_next(self) -> None:
        """Go on with the outbox after a write has ended, if it holds something."""
        following = self.outbox.take() if self.outbox is not None else None
        if following is None:
            self.writing, self.outbox = "", None
        else:
            self.writing = "task"
            start_task(self._write(following))

    def write_failed(self, exc: Exception) -> None:
        """Take a write that raised for the end of the socket."""
        logger.debug("write failed", exc_info=exc, extra={"connection_id": self._id})
        if isinstance(exc, OSError):  # The server's word for a client that has gone (ASGI 2.4).
            mark_closed(self._ws, self.close_code)
        self.lost()

    def _stop_writing(self) -> None:
        """End the wait of whoever writes, unless that is the caller."""
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(asyncio.get_running_loop().time())
        if self.writer is not None and self.writer is not asyncio.current_task():
            self.writer.cancel()

    def _log_slow(self, what: str) -> None:
        if not self._is_slow:
            self._is_slow = True
            logger.warning("client is too slow: %s", what, extra={"connection_id": self._id})


class BatchWriter:
    """Write one event to many connections, which have been claimed for it.

    One task writes to one after the other: a task for each receiver costs 2.2 (Python 3.11) to 3.3
    times (3.13) as much. When the server makes the task wait for a receiver, the task stays with
    it, because what an ASGI middleware does there is bound to the task and its context. A new task
    goes on with the others in the next turn of the loop.
    """

    def __init__(self, receivers: list[Outgoing], event: Event) -> None:
        self._receivers = receivers  # those to come; the caller sees the list become empty
        self._event = event
        self._batch: list[Outgoing] = []

    def start(self) -> None:
        """Write to a turn's worth of the receivers, and go on in the next turn of the loop."""
        if self._receivers:
            self._batch = self._receivers[-_TURN:]
            del self._receivers[-_TURN:]
            start_task(Outgoing.write_each(self._batch, self._event))
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        """Take over what a task that waits has left of its batch, and start the next one."""
        self._receivers += self._batch
        self._batch.clear()
        self.start()


# ── incoming ──────────────────────────────────────────────────────────────────────────────────
#
# The reading half of a connection. The connection's own task reads and runs the handlers. While
# one of these is suspended, a second task reads ahead, a few frames, so that a disconnect is
# noticed. A handler that does not suspend costs no such task.

_READ_AHEAD = 8  # frames: enough to notice a disconnect behind some messages, and bounded


def server_receive(ws: falcon.asgi.WebSocket) -> Callable[[], Awaitable[Event]]:
    """Return what reads the events of *ws*, without Falcon's receive queue where that is possible.

    The queue doubles the cost of a message, and what it holds is lost when the client leaves. It is
    turned off for this socket only. A socket that a middleware has accepted keeps its queue, which
    runs already.
    """
    queue = ws._buffered_receiver
    if queue._pump_task is not None:
        return cast("Callable[[], Awaitable[Event]]", ws._asgi_receive)
    queue._max_queue = 0
    receive = ws._asgi_receive = queue._asgi_receive
    return cast("Callable[[], Awaitable[Event]]", receive)


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

    receive: Callable[[], Awaitable[Event]]
    """The server's own `receive`, for whoever may read directly."""
    _max_size: int
    _session: Session
    is_direct: bool = True
    """Whether the next event comes from the server: nothing is read ahead, or has ended."""
    is_due: bool = False
    """Whether `_look` has been scheduled and will be called if the handler suspends."""
    received: int = 0  # frames
    _has_left: bool = False  # the server has reported the end
    _is_stopped: bool = False  # the server closes, and nothing more is handled
    _inbox: collections.deque[Event] | None = None  # what was read ahead
    _ahead: asyncio.Task[None] | None = None

    def accept(self, event: Event | None) -> typing.TypeGuard[Event]:
        """Return whether *event*, the next one, is a frame to handle; if not, no more will come.

        Frames that came before the client left are still handled, those behind the server's own
        close are not.
        """
        if event is None:
            return False
        if event["type"] != "websocket.receive":
            self._disconnected(event)
            return False
        if self._is_stopped:  # In the same turn of the loop.
            return False
        self.received += 1
        return True

    async def next(self) -> Event | None:
        """Return the next event that was read ahead, then those of the server, or None at the end.

        Only needed while not `is_direct`.
        """
        while not self._inbox:
            if self._has_left or self._is_stopped:
                return None
            if self._ahead is None:
                self.is_direct = True
                return await self.receive()
            await self._ahead
            if not self._inbox:
                self._ahead = None
        return self._inbox.popleft()

    async def first_token(self) -> Frame:
        """Return the first ``authenticate`` message; hold what comes before it.

        Raises `Close` when that is more than a few frames or `max_size` bytes, and
        `falcon.WebSocketDisconnected`.
        """
        held, size = collections.deque[Event](), 0
        while True:
            event = await self.receive()
            if event["type"] != "websocket.receive":
                raise falcon.WebSocketDisconnected(self._disconnected(event))
            text = event.get("text")
            size += size_of_event(event)
            if size > self._max_size:
                raise Close(1009, f"more than {self._max_size} bytes")
            frame = decode_or_error(text) if text is not None else None
            if isinstance(frame, Frame) and frame.type == "authenticate":
                self.received += 1
                if held:
                    self._inbox, self.is_direct = held, False
                return frame
            held.append(event)
            if len(held) > _READ_AHEAD:
                raise Close(UNAUTHENTICATED, "authenticate first")

    def watch(self) -> None:
        """Have the socket watched if the handler that starts now suspends.

        PERF: until the loop goes on this costs nothing for a backlog that is handled without
        waiting, and it needs no task for each message.
        """
        if not self.is_due:
            self.is_due = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        """Read ahead while a handler, or its reply, waits for something."""
        self.is_due = False
        is_over = self._has_left or self._is_stopped
        is_reading = self._ahead is not None and not self._ahead.done()
        if self._session.is_handling and not is_over and not is_reading:
            self.is_direct = False
            self._ahead = asyncio.get_running_loop().create_task(self._read_ahead())

    async def _read_ahead(self) -> None:
        if self._inbox is None:
            self._inbox = collections.deque()
        inbox, size = self._inbox, sum(map(size_of_event, self._inbox))
        while self._session.is_handling and len(inbox) < _READ_AHEAD and size <= self._max_size:
            event = await self.receive()
            if event["type"] != "websocket.receive":
                self._disconnected(event)
                return
            if self._is_stopped:
                return
            if not self._session.takes(event):
                inbox.append(event)
                size += size_of_event(event)

    def _disconnected(self, event: Event) -> int:
        """Take the server's report that the client has gone; return the close code."""
        self._has_left, self.is_direct = True, False
        code: int = event.get("code", 1005)  # The default is ASGI's (WebSocket: Disconnect).
        self._session.on_disconnect(code)
        return code

    def stop(self) -> None:
        """Handle nothing more, also of what was read ahead."""
        self._is_stopped, self.is_direct = True, False
        if self._inbox is not None:
            self._inbox.clear()
        if self._session.is_handling and self._ahead is not None:
            self._ahead.cancel()  # granian's send(close) waits while a receive is pending.

    def release(self) -> None:
        """Let go of the session, when the connection is over."""
        if self._ahead is not None:
            self._ahead.cancel()  # The server's receive may have no end of its own.
        self._session = _NOBODY


# ── connection ────────────────────────────────────────────────────────────────────────────────
#
# What a handler gets: who the client is, and what can be sent to it.

_BURST = 32  # messages that code may send in a row before others get a turn
_PROCESS_BYTES = _OWN_BYTES = 6  # of a connection's id: its process, and in that itself
_END_OF_TIME = 1e15  # UNIX seconds; beyond, floats and timers give up
_LOOK_AT_CLOCK = 600.0  # seconds between two looks at the time of day, which may be set anew


@attrs.define(eq=False, repr=False)
class Connection:
    """One client. Handlers get it; the hub's methods take it."""

    hub: Hub
    """The hub of its endpoint."""
    req: falcon.asgi.Request
    """The request of the handshake: headers, cookies, query string."""
    ws: falcon.asgi.WebSocket
    """Falcon's socket, for what Pachinko does not do. What it sends keeps no order with ours."""
    params: dict[str, Any]
    """The path parameters, converted as the path says."""
    id: str
    """Unique across processes, and public: other clients may see it. Never a credential."""
    outgoing: Outgoing
    """The library's own, not for applications."""
    _user: str | None = None
    _expires_at: float | None = None
    _expiry: asyncio.TimerHandle | None = None
    _sends: int = 0

    def __repr__(self) -> str:
        return f"<Connection {self.id} {self.outgoing.phase}>"

    @property
    def context(self) -> Any:
        """Falcon's ``req.context``: whatever the application keeps for this connection."""
        return self.req.context

    @property
    def close_code(self) -> int | None:
        """Why it was closed: the client's code (1005 or 1006 for none) or the server's; or None."""
        return self.outgoing.close_code

    @property
    def user(self) -> str | None:
        """Who it is, for `Hub.send_to_user`; set by `Pachinko.authenticate` or in connect."""
        return self._user

    @user.setter
    def user(self, user: str | None) -> None:
        if user is not None and not isinstance(user, str):
            raise TypeError(f"a user is a str or None, got {user!r}; write conn.user = str(...)")
        if self.outgoing.is_answered:
            raise PachinkoError("conn.user is set in a connect handler, before the client is in")
        self.hub.state.registry.set_user(self, user)
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
        self.stop_expiry()
        if at is not None and not self.closed:
            self._expire()

    def stop_expiry(self) -> None:
        """Cancel the timer of `expires_at`; the library does so when the connection is over."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def _expire(self) -> None:
        """Close if the time has come; else look again later, since clocks get set."""
        left = cast(float, self._expires_at) - time.time()
        if left <= 0:
            self.outgoing.close(Close(UNAUTHENTICATED, "the authentication has expired"))
        else:
            loop = asyncio.get_running_loop()
            self._expiry = loop.call_later(min(left, _LOOK_AT_CLOCK), self._expire)

    @property
    def groups(self) -> frozenset[str]:
        """The groups that it is in."""
        return frozenset(self.hub.state.registry.groups_of(self))

    @property
    def closed(self) -> bool:
        """Whether the client has gone or the server has begun to close."""
        return self.outgoing.closed

    async def send(self, message: object, payload: object = None) -> None:
        """Send a ``@message`` object, or a type and its payload, to this client.

        Waits while the client is behind. Raises `falcon.WebSocketDisconnected` when the client has
        gone, or stays behind for `send_timeout` seconds (and is then evicted with 1013). In a
        connect handler it returns at once, and the message goes out after the handshake.
        """
        type, payload = split_message(message, payload)
        await self.outgoing.send(text_event(self.hub.state.codec.encode(type, payload)))
        self._sends += 1
        if self._sends % _BURST == 0:
            await asyncio.sleep(0)  # While a client keeps up, nothing else lets the loop run.

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close after what was sent before. Does not wait for the client; twice is once.

        Raises `ValueError` for a *code* or *reason* that `Close` refuses.
        """
        self.outgoing.close(Close(code, reason))

    async def join(self, group: str) -> None:
        """Add the connection to *group*, as `Hub.join` does."""
        await self.hub.join(group, self)

    async def leave(self, group: str) -> None:
        """Remove the connection from *group*, as `Hub.leave` does."""
        await self.hub.leave(group, self)


# ── registry and relay ────────────────────────────────────────────────────────────────────────
#
# The registry knows the connections of this process. The relay reaches the other processes of the
# app, and tells the registry what they send. `LocalRelay` is the one of an app without a broker;
# `pachinko_cluster` has the other. A hub's state has both, from its start to its stop.

_FAREWELL = 5.0  # seconds for disconnect handlers at a shutdown, behind what lingers
ENVIRONMENT = "PACHINKO_BACKPLANE"  # the variable with the URL of the broker
_MEMORY = re.compile(r"memory://(?:\?([^#@&=]+=[^#@]*)?)?")  # the URL of an app with one process
_NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,64}")
Deliver = Callable[[str, bytes], Awaitable[None]]
Lost = Callable[["BaseException | None"], None]
Given = Union[str, "Backplane", None]  # what names a broker: a URL, or what carries the messages


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
        went to, or None if the broker does not say. Raises what is wrong with this message.
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
    """What the name of a receiver stands for. The value stands in subjects."""

    GROUP = "g"
    USER = "u"
    CONNECTION = "p"  # A process subscribes for all of its connections.
    EVERYBODY = "a"  # all connections, of any name


@attrs.frozen
class Presence:
    """A connection in a group, of whatever process."""

    id: str  # `Connection.id`
    user: str | None
    process: str  # `Hub.process` where it is connected


class Relay(typing.Protocol):
    """What a hub needs of all processes of its app, this one included.

    Receivers are given as a kind and a name. `send`, `close` and `ask` raise `PachinkoError` when
    the broker does not take a message within 5 seconds.
    """

    def start(self, registry: Registry, process: str) -> None:
        """Begin to deliver to *registry*, of the process with that id, and to connect."""

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
        return {"refused": 0, "outages": 0, "broker_down": 0}


class LocalRelay(Relay):
    """The relay of an app with one process: whatever is sent goes straight to the registry."""

    async def connected(self) -> None: ...
    async def stop(self) -> None: ...
    def subscribe(self, kind: Kind, name: str) -> None: ...
    def unsubscribe(self, kind: Kind, name: str) -> None: ...
    async def subscribed(self, kind: Kind, name: str) -> None: ...

    def start(self, registry: Registry, process: str) -> None:
        self._registry, self._process = registry, process

    async def send(self, kind: Kind, name: str, data: bytes, excluded: list[str]) -> None:
        await self._registry.deliver(kind, name, data, excluded)

    async def close(self, kind: Kind, name: str, close: Close) -> None:
        self._registry.close(kind, name, close)

    async def ask(self, group: str) -> list[Presence]:
        members = self._registry.accepted(Kind.GROUP, group)
        return [Presence(conn.id, conn.user, self._process) for conn in members]


def open_relay(given: Given, namespace: str | None) -> Relay:
    """Return the relay, not yet started. Raises the errors of `Hub.configure`."""
    local = _MEMORY.fullmatch(given) if isinstance(given, str) else None
    if local is not None and namespace is None:
        namespace = dict(urllib.parse.parse_qsl(local[1] or "", True)).get("namespace")
    check_namespace(namespace)
    if given is None or local is not None:
        return LocalRelay()
    try:
        companion = importlib.import_module("pachinko_cluster")
    except ImportError as exc:
        raise PachinkoError(
            "a broker needs pachinko_cluster.py of the same version: copy it to where pachinko.py "
            f'is, or install both with: pip install "falcon-pachinko" ({exc})'
        ) from exc
    return cast(Relay, companion.Cluster(given, namespace))


def check_namespace(name: object) -> None:
    """Raise `PachinkoError` for the *name* of a namespace that no subject can hold."""
    if name is not None and not (isinstance(name, str) and _NAMESPACE.fullmatch(name)):
        raise PachinkoError(f"a namespace has 1 to 64 letters, digits, _ and -, got {name!r}")


class Registry:
    """The connections of this process, and the groups and users that they belong to.

    It is the only owner of memberships, in both directions. It starts its *relay*, which learns of
    the first receiver of each group and user, and when the last one has left.
    """

    def __init__(self, relay: Relay, process: str) -> None:
        self.connections: dict[str, Connection] = {}  # by id, once they have authenticated
        self.groups: dict[str, dict[Connection, Outgoing]] = {}  # by name, what writes to whom
        self.users: dict[str, dict[Connection, Outgoing]] = {}
        self._tables = {Kind.GROUP: self.groups, Kind.USER: self.users}
        self._joined: dict[Connection, set[str]] = {}
        self._relay = relay
        relay.start(self, process)

    def add(self, conn: Connection) -> None:
        """Add *conn*, and let its user's messages reach it."""
        self.connections[conn.id] = conn
        if conn.user is not None:
            self._enter(Kind.USER, conn.user, conn)

    def remove(self, conn: Connection) -> None:
        """Remove *conn* from all tables."""
        for group in tuple(self.groups_of(conn)):
            self.leave(group, conn)
        self.set_user(conn, None)
        self.connections.pop(conn.id, None)

    def set_user(self, conn: Connection, user: str | None) -> None:
        """Let messages to *user* reach *conn*. Called before ``conn.user`` changes."""
        if conn.id in self.connections:
            if conn.user is not None:
                self._discard(Kind.USER, conn.user, conn)
            if user is not None:
                self._enter(Kind.USER, user, conn)

    def join(self, group: str, conn: Connection) -> None:
        """Add *conn*, a connection of this registry, to *group*."""
        self._joined.setdefault(conn, set()).add(group)
        self._enter(Kind.GROUP, group, conn)

    def leave(self, group: str, conn: Connection) -> None:
        """Remove *conn* from *group*, if it is a member."""
        if group in self.groups_of(conn):
            self._joined[conn].discard(group)
            if not self._joined[conn]:
                del self._joined[conn]
            self._discard(Kind.GROUP, group, conn)

    def _enter(self, kind: Kind, name: str, conn: Connection) -> None:
        table = self._tables[kind]
        if name not in table:
            table[name] = {}
            self._relay.subscribe(kind, name)
        table[name][conn] = conn.outgoing

    def _discard(self, kind: Kind, name: str, conn: Connection) -> None:
        table = self._tables[kind]
        del table[name][conn]
        if not table[name]:
            del table[name]
            self._relay.unsubscribe(kind, name)

    def groups_of(self, conn: Connection) -> Set[str]:
        """Return the groups that *conn* is in, not a copy."""
        return self._joined.get(conn, frozenset())

    def receivers(self, kind: Kind, name: str) -> Mapping[Connection, Outgoing]:
        """Return the connections here that a message to *name* is for; it may be a table itself."""
        if kind is Kind.CONNECTION:
            conn = self.connections.get(name)
            return {conn: conn.outgoing} if conn is not None else {}
        if kind is Kind.EVERYBODY:
            return {conn: conn.outgoing for conn in self.connections.values()}
        return self._tables[kind].get(name, {})

    def accepted(self, kind: Kind, name: str) -> frozenset[Connection]:
        """Return the receivers whose handshake has been answered."""
        found = self.receivers(kind, name).items()
        return frozenset(conn for conn, outgoing in found if outgoing.is_answered)

    async def deliver(self, kind: Kind, name: str, data: bytes, excluded: Collection[str]) -> None:
        """Begin one write of the frame *data* to each receiver whose id is not *excluded*."""
        found = self.receivers(kind, name)
        if excluded:
            ids = frozenset(excluded)
            found = {conn: outgoing for conn, outgoing in found.items() if conn.id not in ids}
        await Outgoing.fan_out(found.values(), data, name if kind is Kind.GROUP else None)

    def close(self, kind: Kind, name: str, close: Close) -> None:
        """Close the receivers, behind what was sent to them before."""
        for outgoing in tuple(self.receivers(kind, name).values()):
            outgoing.close(close)


@attrs.define(eq=False)
class HubState:
    """What a hub has from the start of its first app to the stop of the last one."""

    url: Given  # as `Hub.configure` has set it, like the next two
    namespace: str | None
    codec: Codec
    replace: Callable[[], HubState]  # gives the hub a new state with the same settings
    process: str = attrs.field(factory=lambda: secrets.token_hex(_PROCESS_BYTES))
    counters: Counters = attrs.Factory(Counters)
    calls: set[concurrent.futures.Future[Any]] = attrs.Factory(set)  # of threads, still to be done
    serving: dict[asyncio.Task[Any], Session] = attrs.Factory(dict)  # from the handshake on
    drains: list[asyncio.Task[None]] = attrs.Factory(list)  # one for each call of `Hub.drain`
    loop: asyncio.AbstractEventLoop | None = None  # that of the apps, while one runs
    broker: Given = None  # what the first app was started with
    relay: Relay = attrs.Factory(LocalRelay)
    registry: Registry = attrs.Factory(lambda self: Registry(self.relay, self.process), True)
    _apps: set[object] = attrs.Factory(set)

    def choose(self, url: Given = None) -> Given:
        """Return the broker to use: *url*, else the configured one, else the environment's."""
        return url if url is not None else self.url or os.environ.get(ENVIRONMENT) or None

    def start(self, app: object, url: Given = None) -> None:
        """Serve *app* in the running loop. Raises `PachinkoError` in a second loop."""
        loop = asyncio.get_running_loop()
        if self.loop is None:
            broker = self.choose(url)
            self.relay = open_relay(broker, self.namespace)
            self.registry = Registry(self.relay, self.process)
            self.loop, self.broker = loop, broker
        elif self.loop is not loop and self.loop.is_running():
            raise PachinkoError(
                "this hub serves an app in another event loop; give this app one of its own: "
                'Pachinko(app, "/ws", hub=Hub())'
            )
        elif self.loop is not loop:  # It has ended without a shutdown.
            return self._end().start(app, url)
        self._apps.add(app)

    async def stop(self, app: object) -> None:
        """Stop serving *app*; with the last one the hub gets a new state."""
        self._apps.discard(app)
        if not self._apps:
            self._end()
            await self.relay.stop()

    def _end(self) -> HubState:
        """Fail the calls that are not done, and return the state that comes next."""
        self.loop = None
        for call in tuple(self.calls):
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                call.set_exception(PachinkoError("the hub has stopped before it was done"))
        return self.replace()

    def submit(self, work: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        """Call *work* in the loop, and await what it returns. Raises `PachinkoError`.

        After `asyncio.run_coroutine_threadsafe` a thread would wait for ever when the loop ends
        before the call has begun. Here the end of the hub fails each call that is not done.
        """
        future = concurrent.futures.Future[Any]()

        async def call() -> Any:
            try:
                result = work()
                return await result if inspect.isawaitable(result) else result
            except SystemExit as exc:  # asyncio would end the server.
                raise RuntimeError("sys.exit() in a call from a thread") from exc

        def forget(_: object) -> None:
            self.calls.discard(future)
            if future.cancelled():  # `concurrent.futures.wait` has to learn of it.
                future.set_running_or_notify_cancel()

        def begin(loop: asyncio.AbstractEventLoop) -> None:
            if not future.done():  # The coroutine is made here: a loop that ends would leave it.
                task = loop.create_task(call())
                task.add_done_callback(functools.partial(_tell, future))
                future.add_done_callback(functools.partial(_cancel, loop, task))

        future.add_done_callback(forget)
        self.calls.add(future)  # This comes first: then `_end` fails each call that finds a loop.
        try:
            if (loop := self.loop) is None:
                raise RuntimeError("it starts with the app")
            loop.call_soon_threadsafe(begin, loop)
        except RuntimeError as exc:  # The loop may also have been closed.
            future.cancel()
            raise PachinkoError(f"the hub is not running: {exc}") from None
        return future

    async def connected(self) -> None:
        """Wait for the first attempt to connect to the broker, whether it succeeds or not."""
        with contextlib.suppress(PachinkoError):  # It has been logged, and is tried again.
            await self.relay.connected()

    def enter(self, session: Session) -> None:
        """Note that the current task serves *session*."""
        self.serving[current_task()] = session

    def leave(self, session: Session) -> None:
        """Note that the current task has ended its service."""
        self.serving.pop(current_task(), None)
        self.counters.frames(session.incoming.received, session.outgoing.sent)

    async def reachable(self, conn: Connection) -> None:
        """Wait until `Hub.send_to_user` in other processes reaches *conn*."""
        if conn.user is not None and conn.id in self.registry.connections:
            with contextlib.suppress(PachinkoError):  # It is not permitted, which has been logged.
                await self.relay.subscribed(Kind.USER, conn.user)

    async def close_all(self, seconds: float, caller: object) -> None:
        """Close all connections, as `Hub.drain` says, and do not wait for that of *caller*."""
        sessions = random.sample(list(self.serving.values()), len(self.serving))
        logger.info("draining %d connections in %g s", len(sessions), seconds)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        for n, session in enumerate(sessions):
            if session.outgoing.closed:
                continue  # It has left by itself, and needs no turn.
            early = begun + seconds * n / len(sessions) - loop.time()
            if early > 0 or n % _TURN == 0:
                await asyncio.sleep(early)
            session.outgoing.close(Close(1012, "the server restarts"))
        own = {s for task, s in self.serving.items() if caller in (task, *s.tasks)}
        await self.wait_for(set(sessions) - own)

    async def wait_for(self, sessions: Collection[Session], *others: asyncio.Task[Any]) -> None:
        """Wait for *others* and closed *sessions*, for their longest `linger` and 5 seconds."""
        ending = {*others, *(task for task, each in self.serving.items() if each in sessions)}
        if ending:
            linger = max((each.outgoing.limits.linger for each in sessions), default=0.0)
            _, stuck = await asyncio.wait(ending, timeout=linger + _FAREWELL)
            for task in stuck:
                logger.error("not waiting any longer for %r, which does not end", task)
                self.serving.pop(task, None)  # A shutdown after a drain does not wait once more.


def _cancel(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any], _: object) -> None:
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

    def __init__(self) -> None:
        self._has_warned = False
        self._set_state(None, None, Codec())
        _hubs.add(self)

    def _set_state(self, url: Given, namespace: str | None, codec: Codec) -> HubState:
        again = functools.partial(self._set_state, url, namespace, codec)
        self.state: HubState = HubState(url, namespace, codec, again)  # not for applications
        return self.state

    def configure(
        self, url: Given | UnsetType = UNSET, *,
        converter: cattrs.Converter | UnsetType | None = UNSET,
        namespace: str | UnsetType | None = UNSET,
    ) -> None:  # fmt: skip
        """Set up the hub before an app starts.

        Each call changes only what it names; None brings the default back.

        *url*: the broker between the processes, ``nats://host:4222``, ``tls://…``,
        ``redis://host:6379``, ``rediss://…``, or a `Backplane`. By default it is that of the
        environment variable ``PACHINKO_BACKPLANE``, or ``memory://``: this process alone.
        *namespace*: keeps the apps on one broker apart, also as ``?namespace=`` in the URL;
        letters, digits, ``_`` and ``-``; by default ``pachinko``.
        *converter*: of cattrs, for all payloads, in and out; set before handlers are registered.
        Start from ``hub.converter.copy()`` to keep the strict rules: a plain one coerces 5 to "5".

        Raises `PachinkoError` for a mistake in any of them, for a library that is not installed,
        and once an app has started; `TypeError` for a wrong object. Then nothing has changed.
        """
        if self.state.loop is not None:
            raise PachinkoError("call hub.configure() before the app starts, where it is imported")
        url = self.state.url if url is UNSET else url
        namespace = self.state.namespace if namespace is UNSET else namespace
        open_relay(url, namespace)
        if not (converter in (UNSET, None) or isinstance(converter, cattrs.BaseConverter)):
            raise TypeError(f"write hub.configure(converter=cattrs.Converter()), got {converter!r}")
        codec = self.state.codec if converter is UNSET else Codec(converter)
        self._set_state(url, namespace, codec)

    @property
    def process(self) -> str:
        """The id of this process, as in `Presence.process`; a new one with each start."""
        return self.state.process

    @property
    def converter(self) -> cattrs.Converter:
        """The converter in use; copy it, but do not change it."""
        return self.state.codec.converter

    @contextlib.asynccontextmanager
    async def open(self, url: Given = None) -> AsyncGenerator[Hub, None]:
        """Use the hub in a program without an app: ``async with hub.open("redis://…"):``.

        By default the *url* is that of `configure` or ``PACHINKO_BACKPLANE``. Raises
        `PachinkoError` when none is given, when the broker cannot be reached, and when the hub
        already runs on another one.
        """
        is_running = self.state.loop is not None and self.state.loop.is_running()
        if not is_running and self.state.choose(url) is None:
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

    def _check(self, name: object = "", what: str = "") -> None:
        """Refuse names that are not text, calls from elsewhere, and calls that reach nobody.

        Without a broker such a call may be the test of a handler: the log has one warning.
        """
        if not isinstance(name, str):
            raise TypeError(f"a {what} is named by a str, got {name!r}")
        loop = self.state.loop
        if loop is not None and loop is not asyncio.get_running_loop():
            raise PachinkoError(
                "the hub was called from another thread or event loop than its app's; "
                'use hub.call_threadsafe(hub.send, "room:1", ...)'
            )
        if loop is None and self.state.choose() not in (None, "memory://"):
            raise PachinkoError(
                "the hub is not connected: it starts with the app; a program without one writes "
                "`async with hub.open():` around its calls"
            )
        if loop is None and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the hub does not run and reaches nobody: it starts with the app; a program of its "
                'own writes `async with hub.open("nats://localhost:4222"):` around its calls, with '
                "the broker that the app uses"
            )

    def _check_own(self, conn: object, instead: str) -> None:
        if not isinstance(conn, Connection):
            raise TypeError(f'write hub.join("room:1", conn); got {conn!r} for the connection')
        if conn.hub is not self:
            raise PachinkoError(f"this connection's endpoint has another hub; {instead}")

    async def join(self, group: str, conn: Connection) -> None:
        """Add *conn* to *group*. A group exists from its first member on.

        When it returns, whatever any process sends to the group arrives; or, if the broker does not
        answer within 4 seconds, a ``gap`` comes once it does. Does nothing if the connection has
        ended.

        Raises `PachinkoError` for a connection of an endpoint with another hub, and when the broker
        does not permit the subscription. Raises `MessageError` (``too_many_groups``) for a
        connection that is in `max_groups` others; a message handler may let it pass to the client.
        """
        self._check(group, "group")
        self._check_own(conn, "use conn.join(group)")
        state = self.state
        if conn.id not in state.registry.connections:
            if conn.outgoing.is_answered:
                return  # It has ended.
            raise PachinkoError("nobody joins before it has authenticated; do it in @ws.connect")
        groups, most = state.registry.groups_of(conn), conn.outgoing.limits.max_groups
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
        return self.state.registry.accepted(Kind.GROUP, group)

    @property
    def connections(self) -> frozenset[Connection]:
        """The accepted connections of this process."""
        return self.state.registry.accepted(Kind.EVERYBODY, "all")

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
        self._check()
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
        self, kind: Kind, name: str, message: object, payload: object, exclude: Exclude = None
    ) -> None:
        """Encode once, and begin one write to each receiver, wherever it is."""
        type, payload = split_message(message, payload)
        data = self.state.codec.encode(type, payload, name if kind is Kind.GROUP else None)
        excluded: list[str] = []
        if exclude is not None:
            several = (exclude,) if isinstance(exclude, (Connection, str)) else exclude
            excluded = [self._id_of(item) for item in several]
            if not all(isinstance(id, str) for id in excluded):
                raise TypeError(f"exclude takes connections and their ids, got {exclude!r}")
        await self.state.relay.send(kind, name, data, excluded)

    def _id_of(self, item: Connection | str) -> str:
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
        return bool(self.state.drains)

    async def drain(self, seconds: float = 10.0) -> None:
        """Close all clients before a shutdown, with 1012, in random order, over *seconds*.

        So they do not all come back at once. New handshakes are refused from now on. Returns when
        the disconnect handlers have ended, or hang: `linger` and 5 seconds after the last close.
        Raises `ValueError` for *seconds* below 0.
        """
        if not is_seconds(seconds):
            raise ValueError(f"seconds is a number, at least 0, got {seconds!r}")
        self._check()
        # A task of its own does it: the caller may be a handler, and cancelled with its client.
        work = self.state.close_all(seconds, asyncio.current_task())
        self.state.drains.append(task := asyncio.get_running_loop().create_task(work))
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

        The future gives what the method returns or raises. Raises `PachinkoError` when no app
        is running.
        """
        if not callable(function):
            raise TypeError(f'write hub.call_threadsafe(hub.send, "room:1", ...), got {function!r}')
        return self.state.submit(functools.partial(function, *args, **kwargs))

    def stats(self) -> dict[str, int]:
        """Return counts since the start, of this process.

        ``connections``, ``groups`` (now); ``received``, ``sent`` (frames); ``dropped`` (messages),
        ``evicted`` (connections); ``outbox_high_water`` (messages); ``refused`` (messages from the
        broker that are not ours), ``outages`` (of it), ``broker_down`` (1 while it is away, or 0);
        ``errors`` in all, and ``errors.<code>`` for each code that was answered.
        """
        state = self.state
        counters, sessions = state.counters, state.serving.values()
        return {
            "connections": len(self.connections),
            "groups": len(state.registry.groups),
            "received": counters.received + sum(each.incoming.received for each in sessions),
            "sent": counters.sent + sum(each.outgoing.sent for each in sessions),
            "dropped": counters.dropped,
            "evicted": counters.evicted,
            "outbox_high_water": counters.outbox_high_water,
            **state.relay.stats(),
            "errors": sum(counters.errors.values()),
            **{f"errors.{code}": count for code, count in counters.errors.items()},
        }


def _forget_parent() -> None:
    for each in _hubs:
        each.state.replace()


# Without fork (on Windows) `os` has no such function.
getattr(os, "register_at_fork", lambda **_: None)(after_in_child=_forget_parent)

hub: Hub = Hub()
"""The hub of the process. It holds no event loop and no connection before an app starts."""


# ── outcomes ──────────────────────────────────────────────────────────────────────────────────
#
# What an exception means that code of the application has raised. Most become an answer or a close;
# a cancellation, and what ends the process, goes on up.


def outcome_of(exc: BaseException) -> MessageError | Close | None:
    """Return what *exc*, from a handler, means for the client; None for a bug."""
    if isinstance(exc, falcon.HTTPError):
        status, title = exc.status_code, exc.title or ""
        details = {"status": status, "title": title, "description": exc.description}
        return MessageError(f"http_{status}", exc.description or title, **details)
    return exc if isinstance(exc, (MessageError, Close)) else None


def internal_error() -> MessageError:
    """Return the answer to a message whose handler has a bug."""
    return MessageError("internal_error", "the server failed to handle this message")


def is_cancelled(exc: BaseException | None = None) -> bool:
    """Return whether the current task is being cancelled, and *exc* is what came of it.

    The error that code raises while it cleans up takes the place of its `CancelledError`. Before
    Python 3.13 a cancellation may be counted that a `TaskGroup` has caught; there the contexts of
    *exc* have to show one.
    """
    if not current_task().cancelling():
        return False
    is_plain = exc is None or isinstance(exc, asyncio.CancelledError)
    return is_plain or _COUNTS_CANCELLATIONS or _came_of_cancellation(exc)


def _came_of_cancellation(exc: BaseException | None) -> bool:
    """Return whether *exc* was raised while a `CancelledError` was handled.

    The cancellation behind a `TimeoutError` has done its work. Of a group each error has to come of
    a cancellation: the first to fail in a `TaskGroup` does not, and that cancels the others.
    """
    while exc is not None and not isinstance(exc, TimeoutError):
        if isinstance(exc, asyncio.CancelledError):
            return True
        if isinstance(exc, BaseExceptionGroup):
            return all(map(_came_of_cancellation, exc.exceptions))
        exc = exc.__context__
    return False


def pass_on(exc: BaseException, what: str, id: str | None = None, type: str | None = None) -> None:
    """Raise what goes on up after *what*, code of the application, has raised *exc*; or return.

    `KeyboardInterrupt` and `GeneratorExit` go on, and so does a cancellation of the task. An error
    that clean-up code raises meanwhile is logged, and the cancellation takes its place. All else is
    a bug or meant for the client, also where it is no `Exception`: the `SystemExit` of argparse,
    for which asyncio would end the server, a `CancelledError` that nobody asked for, the panic of a
    library in Rust.
    """
    try:
        if isinstance(exc, (KeyboardInterrupt, GeneratorExit)):
            raise exc
        if is_cancelled(exc):
            if isinstance(exc, asyncio.CancelledError):
                raise exc
            if outcome_of(exc) is None and not isinstance(exc, falcon.WebSocketDisconnected):
                log_failure(what, exc, id, type)
            raise asyncio.CancelledError
    finally:
        del exc  # It refers to this frame; a cycle would keep the connection until a collection.


def forget_cancellations() -> None:
    """Undo what a caught failure in a `TaskGroup` leaves behind on Python 3.11 and 3.12."""
    task = current_task()
    while task.cancelling():
        task.uncancel()


def log_failure(
    what: str, exc: BaseException, id: str | None = None, type: str | None = None
) -> None:
    """Log a bug in the application with its traceback; *id* is that of the connection."""
    extra = {"connection_id": id, "message_type": type}
    if isinstance(exc, BrokerAway):  # It hits every handler at once, and its reason is logged.
        logger.error("%s failed: %s", what, exc, extra=extra)
    else:
        logger.error("%s failed", what, exc_info=exc, extra=extra)


# ── stream ────────────────────────────────────────────────────────────────────────────────────
#
# A generator in progress, whose items go to the client one by one.

_NO_STREAMS: Mapping[Id, Stream] = types.MappingProxyType({})  # that of most connections


@attrs.define(eq=False)
class Stream:
    """A stream in progress."""

    is_stopped: bool = False
    """Whether nobody wants more of it: the client has said so, or has gone."""
    task: asyncio.Task[Any] | None = None
    """The task that runs it, from `begin` to `end`."""
    _is_cancellable: bool = False

    def begin(self) -> None:
        """Note that the current task runs it, which `stop` may cancel from now on."""
        self.task, self._is_cancellable = current_task(), True

    def stop(self) -> None:
        """Close the generator, once; one that has not begun will not begin."""
        if not self.is_stopped and self._is_cancellable and self.task is not None:
            self.task.cancel()
        self.is_stopped = True

    async def send_all(
        self, items: AsyncIterator[Any], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        """Give *items* to *send* one by one. The clean-up of the generator is not cancelled."""
        async with contextlib.aclosing(cast("AsyncGenerator[Any]", items)):
            try:
                async for item in items:
                    if self.is_stopped:  # The generator has caught its cancellation.
                        raise asyncio.CancelledError
                    await send(item)
                    await asyncio.sleep(0)  # A generator that never waits must starve nobody.
            finally:
                self._is_cancellable = False

    def end(self) -> None:
        """Let go of the task, which keeps its error and with that the frames."""
        self.task = None


# ── session ───────────────────────────────────────────────────────────────────────────────────
#
# One connection from its first message on. A message is decoded, its handler is found and called,
# and what that returns or raises is answered. Whatever goes wrong on the way becomes one outcome
# for the client, and the connection goes on.


def reply_event(writer: Writer, id: Id | None, value: object, more: bool = False) -> Event:
    """Return the event that answers a message with *value*."""
    type, unstructure = writer
    data = _encode(Sent(type, id, unstructure(value), None, more))
    return {"type": "websocket.send", "text": data.decode()}


class Session:
    """What one connection does: the handler in progress, its streams, tasks and limits.

    It is the `Listener` of the connection's two halves.
    """

    __slots__ = (
        "_ended", "_life", "_limits", "_rate", "_routes", "_state", "_streams", "conn",
        "incoming", "is_handling", "outgoing", "tasks",
    )  # fmt: skip

    def __init__(
        self, hub: Hub, routes: Routes, limits: Limits,
        req: falcon.asgi.Request, ws: falcon.asgi.WebSocket, params: dict[str, Any],
    ) -> None:  # fmt: skip
        self._state = hub.state
        self._routes, self._limits = routes, limits
        id = self._state.process + secrets.token_hex(_OWN_BYTES)
        self.outgoing: Outgoing = Outgoing(id, ws, limits, self._state.counters, self)
        self.incoming: Incoming = Incoming(server_receive(ws), limits.max_size, self)
        self.conn: Connection = Connection(hub, req, ws, params, id, self.outgoing)
        self.is_handling: bool = False
        self.tasks: frozenset[asyncio.Task[None]] = frozenset()  # concurrent handlers and streams
        self._streams: Mapping[Id, Stream] = _NO_STREAMS
        self._rate = Rate(*limits.rate) if limits.rate is not None else None
        self._life: TimeLimit | None = None  # of the code in progress
        self._ended: float | None = None  # when messages ceased to flow, on the loop's clock

    # The halves tell

    def on_close(self) -> None:
        """Read nothing more; end an authentication in progress, whose client is not in yet."""
        self.incoming.stop()
        is_connecting = self.outgoing.phase is Phase.CONNECTING
        if is_connecting and self._life and not self._life.is_around(asyncio.current_task()):
            self._life.end_at(asyncio.get_running_loop().time())

    def on_end(self) -> None:
        """Stop the streams; wake the reader, or give the handler in progress `linger` seconds."""
        self._ended = asyncio.get_running_loop().time()
        for stream in tuple(self._streams.values()):
            if stream.task is not current_task():
                stream.stop()
        if self._life is not None:
            # Without a close code the server may hold frames from before the end.
            may_go_on = self.is_handling or self.outgoing.close_code is None
            self._life.end_at(self._ended + (self._limits.linger if may_go_on else 0))

    def on_disconnect(self, code: int) -> None:
        """Give up writing, and tell Falcon's socket."""
        mark_closed(self.conn.ws, code)
        self.outgoing.lost(code)

    def takes(self, event: Event) -> bool:
        """Stop the stream that *event* is the ``complete`` of; return whether it was one."""
        text = event.get("text")
        if not self._streams or text is None or '"complete"' not in text:
            return False
        frame = decode_or_error(text) if size_of(text) <= self._limits.max_size else None
        return isinstance(frame, Frame) and frame.type == "complete" and self._complete(frame.id)

    def _complete(self, id: Id | None) -> bool:
        """Stop the stream *id*; return whether there is one."""
        stream = self._streams.get(cast(Id, id))
        if stream is not None:
            stream.stop()
        return stream is not None

    # From the first message to the end

    def limit(self, when: float | None = None) -> TimeLimit:
        """Return the time limit for the code that runs next; a close may bring it forward."""
        self._life = TimeLimit(when)
        return self._life

    def begin(self) -> None:
        """Note that code of the application runs, during which the client may leave."""
        self.is_handling = True
        if not self.incoming.is_due:
            self.incoming.watch()

    def end(self) -> None:
        """Note that this code has ended."""
        self.is_handling = False

    async def serve(self) -> None:
        """Handle messages until the connection is over, and then everything that follows."""
        try:
            with self.limit():
                await self._handle_messages()
        except TimeoutError:  # The connection is over, and what was in progress has had its time.
            forget_cancellations()
        finally:
            await self.finish()

    async def _handle_messages(self) -> None:
        """Handle frames, one after the other, until no more will come.

        PERF: a message takes less than 3 µs, and a coroutine or a call of its own adds 3 % to it.
        So reading is inlined for a connection that has nothing read ahead.
        """
        incoming, receive, routes = self.incoming, self.incoming.receive, self._routes
        is_cancelled = current_task().cancelling
        # Up to this length no text can be too deep or too large: brackets close, UTF-8 has 4 bytes.
        short = min(2 * _MAX_DEPTH, self._limits.max_size // 4)
        while True:
            event = text = message = None  # A frame may be large, and the next one may be late.
            event = await (receive() if incoming.is_direct else incoming.next())
            if not incoming.accept(event):
                return
            self.is_handling = True
            if not incoming.is_due:
                incoming.watch()
            text = event.get("text")
            if text is None or (len(text) > short and self._exceeds(text)):
                await self._handle_odd(event)
            else:
                try:
                    message = routes.decode(text)
                except (Exception, SystemExit) as exc:  # A validator may raise anything.
                    await self._refuse(text, exc)
                else:
                    handler = message.handler
                    if handler is None:
                        await self._refuse(text)
                    elif self._rate is not None and await self._is_limited(self._rate, message.id):
                        pass
                    elif handler.is_concurrent:
                        await self._start_task(handler, message)
                    else:
                        await self._perform(handler, message)
            self.is_handling = False
            if is_cancelled():
                forget_cancellations()

    def _exceeds(self, text: str) -> bool:
        """Return whether *text* is too large or too deep."""
        return size_of(text) > self._limits.max_size or is_too_deep(text)

    async def _handle_odd(self, event: Event) -> None:
        """Handle a frame that is too large, too deep, or binary."""
        text, binary = event.get("text"), self._routes.binary
        if size_of_event(event) > self._limits.max_size:
            self.outgoing.close(Close(1009, f"more than {self._limits.max_size} bytes"))
        elif text is not None:
            await self._refuse(text)
        elif binary is None:
            self.outgoing.close(Close(1003, "binary frames are not handled"))
        elif self._rate is None or not await self._is_limited(self._rate, None):
            await self._handle_raw(binary, event["bytes"])

    async def _perform(self, handler: Handler, message: Received) -> None:
        """Run a handler that answers once, and answer."""
        try:
            value = message.payload
            if self._limits.handler_timeout is not None:
                result = await self._in_time(handler.function, self._call(handler, message))
            elif (
                message.is_built and not self._routes.middleware
                and (value is not UNSET or not handler.takes_payload)
            ):  # fmt: skip
                result = await handler.call(self.conn, value)
            else:
                result = await self._call(handler, message)
            if result is not None or message.id is not None:
                writer = handler.writers.get(type(result)) or self._writer_of(handler, result)
                rest = self.outgoing.start(reply_event(writer, message.id, result))
                if rest is not None:
                    await rest
        except BaseException as exc:  # A bug is answered, not passed on.
            await self._fail(exc, handler.type, message.id)

    async def _call(self, handler: Handler, message: Received) -> Any:
        """Return what the handler returns, through the middleware; for a stream its generator."""
        value = message.payload
        if value is UNSET or not message.is_built:
            value = handler.structure(value, self._state.codec)

        async def innermost() -> Any:
            result = handler.call(self.conn, value)
            return result if handler.streams else await result

        call_next: Callable[[], Awaitable[Any]] = innermost
        # No middleware sees a renewal, for the token in it is nobody else's business.
        if self._routes.middleware and handler.type != "authenticate":
            payload = value if handler.defaults is None else {**handler.defaults, **value}
            envelope = Envelope(handler.type, payload, message.id)
            for middleware in reversed(self._routes.middleware):
                call_next = functools.partial(middleware, self.conn, envelope, call_next)
        return await call_next()

    async def _in_time(self, function: Callable[..., Any], call: Awaitable[T]) -> T:
        """Return what *call*, of *function*, returns within `handler_timeout`, if there is one."""
        if (seconds := self._limits.handler_timeout) is None:
            return await call
        limit = TimeLimit(asyncio.get_running_loop().time() + seconds)
        try:
            with limit:
                return await call
        except TimeoutError:
            if not limit.expired:  # It is one of the handler's own.
                raise
        logger.warning("%s was stopped after %g s", place_of(function), seconds)
        raise MessageError("handler_timeout", f"not done within {seconds:g} s")

    async def _handle_raw(self, function: Callable[..., Any], data: str | bytes) -> None:
        """Call the fallback or the binary handler, and send what it returns."""
        try:
            result = await self._in_time(function, function(self.conn, data))
            if result is not None:
                if message_type(type(result)) is None:
                    raise TypeError(f"{place_of(function)} may return a @message object or None")
                await self.conn.send(result)
        except BaseException as exc:  # A bug is answered, not passed on.
            await self._fail(exc, None, None)

    # Refusing

    async def _refuse(self, text: str, exc: Any = None) -> None:
        """Find out why *text* is no message for a handler, and say so.

        PERF: decoding it anew, step by step, costs only those who send such text.
        """
        frame = decode_or_error(text)
        is_complete = isinstance(frame, Frame) and frame.type == "complete"
        if is_complete and self._complete(frame.id):
            return  # It makes the load less, and is never refused.
        id = None if is_complete else frame.id  # A stream that has ended has had its final answer.
        if self._rate is not None and await self._is_limited(self._rate, id):
            return
        if isinstance(frame, BadFrame):
            await self._handle_unknown(text, frame, frame.id)
        elif (handler := self._routes.handlers.get(frame.type)) is not None:
            error = handler.refusal(frame.payload, self._state.codec, exc)
            await self._fail(error, frame.type, frame.id)
        elif not is_complete:
            error = MessageError("unknown_type", f"no handler for {frame.type[:80]!r}")
            await self._handle_unknown(text, error, frame.id)

    async def _is_limited(self, rate: Rate, id: Id | None) -> bool:
        """Apply the rate limit; return whether the message *id* is refused.

        The client has then been told, or closed.
        """
        retry_after = rate.take(time.monotonic())
        if rate.is_abused:
            self.outgoing.close(Close(1008, "too many messages"))
        elif retry_after:
            text = f"at most {rate.count} messages in {rate.seconds} s"
            error = MessageError("rate_limited", text, retry_after=round(retry_after, 3))
            await self._send_error(error, id)
        return retry_after > 0

    async def _handle_unknown(self, text: str, error: MessageError, id: Id | None) -> None:
        """Give *text* to the fallback, or answer *error*."""
        if self._routes.fallback is not None:
            await self._handle_raw(self._routes.fallback, text)
        else:
            await self._send_error(error, id)

    # Tasks beside the others

    async def _start_task(self, handler: Handler, message: Received) -> None:
        """Start a concurrent handler or a stream in a task of its own."""
        error, id = None, message.id
        if handler.streams and id is None:
            error = MessageError("id_required", f"{handler.type} is a stream, which needs an id")
        elif handler.streams and id in self._streams:
            error, id = MessageError("id_in_use", f"a stream with the id {id!r} goes on"), None
        elif len(self.tasks) >= self._limits.max_concurrent:
            most = f"at most {self._limits.max_concurrent} at a time"
            error = MessageError("too_busy", most)
        if error is not None:
            await self._send_error(error, id)
            return
        if handler.streams:
            stream = Stream(is_stopped=self.outgoing.closed)
            self._streams = {**self._streams, cast(Id, id): stream}
            work = self._stream(handler, message, stream)
        else:
            work = self._perform(handler, message)
        task = asyncio.get_running_loop().create_task(work)
        self.tasks |= {task}
        task.add_done_callback(self._forget_task)

    def _forget_task(self, task: asyncio.Task[None]) -> None:
        self.tasks -= {task}

    async def _stream(self, handler: Handler, message: Received, stream: Stream) -> None:
        """Run a stream to its end: exhausted, failed, stopped by the client, or disconnected."""
        stream.begin()

        async def send(item: Any) -> None:
            writer = self._writer_of(handler, item)
            await self.outgoing.send(reply_event(writer, message.id, item, more=True))

        is_answered = False
        try:
            try:
                items = None if stream.is_stopped else await self._call(handler, message)
                if isinstance(items, AsyncIterator):
                    await stream.send_all(items, send)
                elif not stream.is_stopped:  # A middleware has answered instead.
                    await self._answer(handler.type, message.id, items)
                    is_answered = True
            finally:  # The id is free before the final answer is on its way.
                self._streams = {i: s for i, s in self._streams.items() if s is not stream}
                stream.end()
        except BaseException as exc:  # A bug is answered, not passed on.
            was_stopped = stream.is_stopped and not self.outgoing.closed
            if was_stopped:
                forget_cancellations()
            if not (was_stopped and isinstance(exc, asyncio.CancelledError)):
                await self._fail(exc, handler.type, message.id)
                return
        if not is_answered:
            with contextlib.suppress(falcon.WebSocketDisconnected):
                await self.outgoing.send(text_event(_encode(Sent("complete", message.id))))

    # Answering

    def _writer_of(self, handler: Handler, result: object) -> Writer:
        """Return how what *handler* returns is written, which is found once for each class."""
        writer = handler.writers.get(type(result))
        if writer is None:
            writer = self._state.codec.writer_of(result, f"{handler.type}.reply", handler.returns)
            handler.writers[type(result)] = writer
        return writer

    async def _answer(self, type: str, id: Id | None, result: object) -> None:
        """Answer with what something else than the handler has returned."""
        if result is not None or id is not None:
            writer = self._state.codec.writer_of(result, f"{type}.reply")
            await self.outgoing.send(reply_event(writer, id, result))

    async def _fail(self, exc: BaseException, type: str | None, id: Id | None) -> None:
        """Answer the message *id* with what *exc* means: an error, a close, or a value.

        *type* is None for the fallback and for binary frames.
        """
        what = f"the handler of {type!r}" if type else "the fallback or the binary handler"
        try:
            pass_on(exc, what, self.conn.id, type)
        except BaseException:
            del exc  # It refers to this frame, and that would keep the connection in a cycle.
            raise
        # Falcon's socket knows first, where the handler has sent with that.
        is_over = self.conn.closed or self.conn.ws.closed
        if is_over and isinstance(exc, falcon.WebSocketDisconnected):
            return  # The client of this handler has gone, which ends a handler quietly.
        try:
            outcome = await self._outcome(exc, what, type)
            with contextlib.suppress(falcon.WebSocketDisconnected):
                if isinstance(outcome, Close):
                    self.outgoing.close(outcome)
                elif isinstance(outcome, MessageError):
                    await self._send_error(outcome, id)
                elif type is not None:
                    await self._answer(type, id, outcome)
        except Exception as second:  # The outcome cannot be encoded.
            log_failure("the answer to an error", second, self.conn.id, type)
            await self._send_error(internal_error(), id)

    async def _outcome(self, exc: BaseException, what: str, type: str | None) -> Any:
        """Return what an error handler of the application makes of *exc*, or the library does."""
        if (handler := self._routes.error_handler(exc)) is not None:
            try:
                return await handler(self.conn, exc)
            except BaseException as second:  # The error handler has a bug.
                pass_on(second, place_of(handler), self.conn.id, type)
                exc = second
        outcome = outcome_of(exc)
        if outcome is None:
            log_failure(what, exc, self.conn.id, type)
        return outcome or internal_error()

    async def _send_error(self, error: MessageError, id: Id | None) -> None:
        payload = {"code": error.code, "message": error.message, **error.details}
        data = _encode(Sent("error", id, payload=payload))
        self._state.counters.error(error.code)
        with contextlib.suppress(falcon.WebSocketDisconnected):
            await self.outgoing.send(text_event(data))

    # The end

    async def finish(self) -> None:
        """End the tasks, run the disconnect handlers, forget the connection."""
        if self.outgoing.close_code is None:  # The server has cancelled the task, for example.
            self.outgoing.lost(1006)
        is_ending = is_cancelled()
        steps: list[Callable[[], Awaitable[None]]] = [self._end_tasks] if self.tasks else []
        steps += [functools.partial(handler, self.conn) for handler in self._routes.disconnect]
        for step in steps:
            is_ending |= await self._finish_step(step)
            if not is_ending:
                forget_cancellations()
        self.forget()
        extra = {"connection_id": self.conn.id}
        logger.debug("disconnected: %s", self.outgoing.close_code, extra=extra)
        await self.outgoing.settle()
        if is_ending:
            raise asyncio.CancelledError

    async def _finish_step(self, step: Callable[[], Awaitable[None]]) -> bool:
        """Await *step*, whatever it raises. Return whether the task was cancelled meanwhile."""
        try:
            await step()
        except falcon.WebSocketDisconnected:
            text = "%s was left when it sent to the client, which has gone"
            logger.debug(text, place_of(step), extra={"connection_id": self.conn.id})
        except BaseException as exc:  # A bug ends its own handler only.
            try:
                pass_on(exc, place_of(step), self.conn.id)
            except asyncio.CancelledError:
                return True
            log_failure(place_of(step), exc, self.conn.id)
        return False

    async def _end_tasks(self) -> None:
        """Give concurrent handlers the rest of `linger`. Streams have been cancelled already."""
        tasks, ended = self.tasks, cast(float, self._ended)
        left = ended + self._limits.linger - asyncio.get_running_loop().time()
        try:
            await asyncio.wait(tasks, timeout=0 if is_cancelled() else max(0, left))
        finally:
            streams = {stream.task for stream in self._streams.values()}
            for task in tasks:
                # A stream may be cleaning up. Other handlers may have swallowed a time-out.
                if task not in streams or not task.cancelling():
                    task.cancel()
        patience = _GOODBYE if is_cancelled() else max(_GOODBYE, self._limits.linger)
        _, stuck = await asyncio.wait(tasks, timeout=patience)
        for task in stuck:
            extra = {"connection_id": self.conn.id}
            logger.error("a handler ignores its cancellation: %r", task, extra=extra)

    def forget(self) -> None:
        """Take the connection out of the hub."""
        self.conn.stop_expiry()
        self._state.registry.remove(self.conn)

    def release(self) -> None:
        """Let go of everything, however the connection has ended."""
        self.outgoing.release()
        self.incoming.release()
        self.forget()


# ── admission ─────────────────────────────────────────────────────────────────────────────────
#
# How a client gets in: it is authenticated, the connect handlers run, the handshake is answered.


async def user_of(
    function: Callable[..., Awaitable[str | None]], conn: Connection, token: str | None
) -> str | None:
    """Return whom *token* belongs to, as the application's *function* says.

    Lets `falcon.HTTPError`, `Close` and `MessageError` pass. Any other exception is logged and
    becomes a `MessageError` (``internal_error``). Its text, and that of its causes, may hold the
    token or a cookie; so the log gets its class and the lines of code only.
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
    except BaseException as exc:  # A bug is answered, whatever it is.
        is_ending = is_cancelled(exc)
        is_plain = is_ending and isinstance(exc, asyncio.CancelledError)
        if is_plain or isinstance(exc, (KeyboardInterrupt, GeneratorExit)):
            raise
        what = f": {exc}" if isinstance(exc, PachinkoError) else ""
        what = f"{type(exc).__qualname__}{what}\n{''.join(traceback.format_tb(exc.__traceback__))}"
        extra = {"connection_id": conn.id, "message_type": "authenticate"}
        logger.error("%s failed: %s", place_of(function), what, extra=extra)
        raise (asyncio.CancelledError if is_ending else internal_error()) from None


@attrs.define(eq=False)
class Admission:
    """Lets one client in, or refuses it."""

    _session: Session
    _routes: Routes
    _limits: Limits
    _subprotocols: Sequence[str]

    async def run(self) -> bool:
        """Return whether the client is in."""
        session, conn, outgoing = self._session, self._session.conn, self._session.outgoing
        offered: Iterable[str] = conn.ws.subprotocols
        is_in = False
        try:
            if self._routes.authenticate is not None:
                token, offered = credentials(conn.req, offered)
                await self._authenticate(self._routes.authenticate, token, offered)
            if not conn.closed:
                conn.hub.state.registry.add(conn)
                await self._run_connect_handlers()
                is_in = True
        except Close as close:
            session.forget()
            outgoing.close(close, drops=True)
        session.end()
        try:
            await conn.hub.state.reachable(conn)
            await self._accept(offered)
        except BaseException as exc:  # A client that was let in is seen out.
            outgoing.lost()
            if is_in:
                await session.finish()
            if not isinstance(exc, falcon.WebSocketDisconnected):
                raise
            return False
        outgoing.open()
        if is_in:
            logger.debug("connected: %r", conn.req.path, extra={"connection_id": conn.id})
        else:
            await outgoing.settle()
        return is_in

    async def _accept(self, offered: Iterable[str]) -> None:
        """Answer the handshake, unless a middleware has, or the wait for a token."""
        ws = self._session.conn.ws
        if ws.unaccepted:
            known = [name for name in self._subprotocols if name in offered]
            if self._routes.authenticate is not None and "bearer" in offered:
                known.append("bearer")  # Browsers give up where none of their own is chosen.
            await ws.accept(known[0] if known else None)

    async def _run_connect_handlers(self) -> None:
        for handler in self._routes.connect:
            try:
                await handler(self._session.conn)
            except BaseException as exc:  # Falcon's error handlers take an Exception only.
                pass_on(exc, "a connect handler", self._session.conn.id)
                if isinstance(exc, Exception):
                    raise
                raise RuntimeError(f"a connect handler has raised {exc!r}") from exc
            forget_cancellations()

    async def _authenticate(self, function: Any, token: str | None, offered: Iterable[str]) -> None:
        """Set the user, or raise `Close`; the connection may also be closed in the meantime."""
        conn, seconds = self._session.conn, self._limits.auth_timeout
        deadline = asyncio.get_running_loop().time() + seconds
        try:
            with self._session.limit(deadline):
                user = await user_of(function, conn, token)
            if user is None and token is None and not conn.closed:
                await self._accept(offered)  # Outside of the time limit: it cannot be done by half.
                with self._session.limit(deadline):
                    user = await self._ask_client(function)
        except TimeoutError:
            raise Close(UNAUTHENTICATED, f"not authenticated within {seconds:g} s") from None
        except MessageError as exc:
            if exc.code != "internal_error":  # That one has been logged.
                text = "%s raised a MessageError, when no message can be answered yet; raise Close"
                logger.error(text, place_of(function), extra={"connection_id": conn.id})
            raise falcon.HTTPInternalServerError from None
        forget_cancellations()
        if user is None:
            raise Close(UNAUTHENTICATED, "authentication failed")
        if not conn.closed:
            conn.user = user

    async def _ask_client(self, function: Any) -> str | None:
        """Return who the client is by its first message."""
        frame = await self._session.incoming.first_token()
        self._session.begin()  # The client may leave until the connect handlers have ended.
        token = token_of(frame.payload)
        user = None if token is None else await user_of(function, self._session.conn, token)
        if user is not None and frame.id is not None:
            event = reply_event(("authenticate.reply", lambda _: UNSET), frame.id, None)
            await self._session.outgoing.send(event)
        return user


# ── Pachinko ──────────────────────────────────────────────────────────────────────────────────

_NO_FUNCTION: Any = None  # what ws.connect() decorates, so that its parentheses can be refused
_attached: weakref.WeakSet[Pachinko] = weakref.WeakSet()  # to an app, each at a path of its own
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
        namespaces = caller_namespaces()

        def register(function: F) -> F:
            self._add_checked(self._read_handler(name, function, namespaces, cls, concurrent))
            return function

        return register

    def _read_handler(
        self, type: str, function: Any, namespaces: Namespaces, cls: Any, concurrent: bool
    ) -> Handler:
        """Check *function* as the handler of *type*, without adding it."""
        check_type(type)
        if (first := self._routes.handlers.get(type)) is not None:
            refuse_second(first.function, function, repr(type))
        params = path_parameters(self._path or "")
        codec = self._hub.state.codec
        return read_handler(type, function, codec, namespaces, cls, params, concurrent)

    def _add_checked(self, *handlers: Handler) -> None:
        """Add all *handlers*, also to an endpoint that has started."""
        self._routes.add(handlers, self._hub.state.codec if self._loop is not None else None)

    def disconnect(self, function: F = _NO_FUNCTION) -> F:
        """Run ``async def f(conn)`` once when a connection is over, whatever ended it.

        ``conn.close_code`` is set, its groups are still joined.
        """
        check_disconnect(function)
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
        """Route by class: ``on_send`` handles ``"<prefix>.send"``.

        ``on_connect`` and ``on_disconnect`` are a connect and a disconnect handler. One instance
        serves all connections. Where one method is refused, nothing of the resource is added.
        """
        namespaces = caller_namespaces()
        handlers, connect, disconnect = list[Handler](), list[Any](), list[Any]()
        for name, method in read_resource(prefix, resource):
            if name == "connect":
                connect.append(read_connect(method, self._path))
            elif name == "disconnect":
                check_disconnect(method)
                disconnect.append(method)
            else:
                type = f"{prefix}.{name}"
                handlers.append(self._read_handler(type, method, namespaces, None, False))
        self._add_checked(*handlers)
        self._routes.connect += connect
        self._routes.disconnect += disconnect

    async def on_websocket(
        self, req: falcon.asgi.Request, ws: falcon.asgi.WebSocket, /, **params: Any
    ) -> None:
        """Serve one connection (Falcon's responder)."""
        if ws.closed:
            return  # A middleware has refused it.
        self._start()
        if self._hub.draining:
            await ws.close(3503)  # Before accept this is HTTP 403, like all of Falcon's refusals.
            return
        if (refusal := self._origins.refusal(req)) is not None:
            logger.warning("refused origin %s", refusal)
            await ws.close(3403)
            return
        state = self._hub.state
        session = Session(self._hub, self._routes, self._limits, req, ws, params)
        state.enter(session)
        try:
            if await Admission(session, self._routes, self._limits, self._subprotocols).run():
                await session.serve()
        finally:
            session.release()
            state.leave(session)

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
        serving = self._hub.state.serving.values()
        sessions = [each for each in serving if each.outgoing.limits is self._limits]
        for session in sessions:
            session.outgoing.close(Close(1012, "the server shuts down"))
        await self._hub.state.wait_for(sessions, *self._workers)
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
    """Run a worker, and again when it fails, after ever longer pauses.

    Each attempt has a task of its own. Code of the application may swallow a cancellation or fail
    while it cleans up; this task then still knows that it was cancelled, on every Python.
    """
    backoffs, name = iter(_BACKOFFS), place_of(function)

    async def attempt() -> None:
        try:
            await function()
        except SystemExit as exc:  # In a task of its own it would end the event loop.
            raise RuntimeError(f"sys.exit() in worker {name}") from exc

    while True:
        started = time.monotonic()
        try:
            return await asyncio.get_running_loop().create_task(attempt())
        except BaseException as exc:  # A worker's bug is logged, whatever it is.
            if current_task().cancelling():
                if not isinstance(exc, asyncio.CancelledError):
                    log_failure(f"worker {name}, which was stopped,", exc)
                raise asyncio.CancelledError from None
            if isinstance(exc, (KeyboardInterrupt, GeneratorExit)):
                raise
            if time.monotonic() - started > _BACKOFFS[-1]:
                backoffs = iter(_BACKOFFS)
            backoff = next(backoffs, _BACKOFFS[-1])
            logger.exception("worker %s failed; again in %g s", name, backoff)
        await asyncio.sleep(backoff)
