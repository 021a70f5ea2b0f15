"""The companion of Pachinko for apps of several processes, and the shell command ``pachinko``.

No program imports it: `pachinko` loads it for a URL such as ``nats://host:4222``, for a `Backplane`
and for ``pachinko.SyncHub``, and the installed command starts `main`. An app that runs as one
process does not need this file.

`Cluster` gives a message to a group a head and a subject, `Link` hands both to the broker as soon
as it is connected, and `Nats` or `Redis` carries them. In each process that has subscribed to
the subject, the message passes the same layers upwards, to the registry of `pachinko`.

Map: what each section does, and which of those above it each one uses.

    broker URLs — reads a URL, and keeps its password out of errors (uses: pachinko)
    store — what a broker does that keeps messages
    JetStream — keeps the messages to kept groups in NATS (uses: store, pachinko)
    NATS — a backplane by nats-py (uses: broker URLs, store, JetStream, pachinko)
    Redis — a backplane by redis-py (uses: broker URLs, store, pachinko)
    simulated broker — a broker in memory, for tests (uses: store, pachinko)
    link — keeps a process connected and subscribed, whatever the broker does
        (uses: broker URLs, store, pachinko)
    leases — run a worker in one process at a time (uses: broker URLs, pachinko)
    peer messages — what processes send to one another, as bytes (uses: pachinko)
    rules — by which of them the processes of a namespace keep groups (uses: store, pachinko)
    archive — the kept groups of a process that has a broker
        (uses: store, link, peer messages, pachinko)
    cluster relay — the `Relay` of an app with a broker
        (uses: broker URLs, store, NATS, Redis, link, leases, peer messages, rules, archive,
        pachinko)
    sync hub — the sending half of a hub for code without an event loop
        (uses: broker URLs, link, pachinko)
    shell command — ``pachinko send``, ``listen``, ``history`` and ``presence``
        (uses: archive, cluster relay, pachinko)
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import collections
import concurrent.futures
import contextlib
import datetime
import functools
import hashlib
import importlib.util
import inspect
import itertools
import logging
import math
import os
import random
import re
import secrets
import ssl
import sys
import threading
import typing
import urllib.parse
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Annotated, Any, Concatenate, Literal, NamedTuple, ParamSpec, TypeVar, cast

import attrs
import cattrs
import msgspec
from msgspec import UNSET, UnsetType

import pachinko
from pachinko import (
    NOWHERE,
    AnswerError,
    Backplane,
    Binary,
    Deliver,
    History,
    Hub,
    Kept,
    Kind,
    Lost,
    MessageError,
    NoAnswer,
    PachinkoError,
    Position,
    Reason,
    Registry,
    Rings,
    Window,
    create_task,
    encode,
    gap_of,
    logger,
    waiting_for,
)

__all__ = ["SyncHub", "main"]

T = TypeVar("T")
P = ParamSpec("P")


# ── broker URLs ───────────────────────────────────────────────────────────────────────────────

_CONNECT = 3.0  # seconds for a connection to the broker
_DISCONNECT = 1.0  # seconds for the end of one
LEASE = 6.0  # seconds until the broker forgets a lease that is not renewed
SCHEMES = ("memory", "nats", "tls", "redis", "rediss")  # all but the first have a broker
_WRONG_URL = (
    'a backplane is a URL such as "nats://localhost:4222" or "redis://:secret@host:6379"; known '
    f'are {", ".join(f"{scheme}://" for scheme in SCHEMES)}. "/", "@", "?", "#" and "%" in a '
    'password are written "%2F", "%40", "%3F", "%23", "%25". The one given, in PACHINKO_BACKPLANE '
    "or in code, is not shown, for it may hold a password"
)
_URL = re.compile(rf"({'|'.join(SCHEMES[1:])})://([^?#]+)(?:\?([^#@]*))?")
_REASON_SHOWN = 200  # characters of an error: a server of another protocol may say anything
_ADDRESS = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")
_LOGIN = re.compile(r"[!-.0-?A-~]*")  # ASCII without blanks, "/" and "@"


@attrs.frozen
class Broker:
    """The parts of a broker's URL."""

    scheme: str
    hosts: str  # the URL's hosts, without the credentials
    credentials: tuple[str, str | None] | None = attrs.field(repr=False)  # or a token and None
    options: dict[str, str] = attrs.field(repr=False)  # all but the namespace
    namespace: str | None
    url: str = attrs.field(repr=False)  # without the options

    def __str__(self) -> str:
        return f"{self.scheme}://{self.hosts}"


def read_broker(url: str) -> Broker:
    """Read the URL of a broker. Raises `PachinkoError`, whose text shows no credentials."""
    if (found := _URL.fullmatch(url)) is None:
        raise PachinkoError(_WRONG_URL)
    scheme, where, query = found.groups("")
    try:
        options = dict(urllib.parse.parse_qsl(query, True, True) if query else ())
    except ValueError:
        raise PachinkoError(_WRONG_URL) from None
    namespace = options.pop("namespace", None)
    netloc, _, path = where.partition("/")
    parts = [netloc]
    if scheme in ("nats", "tls"):  # NATS clients also take "nats://a:4222,nats://b:4222"
        parts, path = re.split(rf",(?:{scheme}://)?", where.removesuffix("/")), ""
    logins = {part.rpartition("@")[0] for part in parts if "@" in part}
    login = logins.pop() if logins else ""
    hosts = [part.rpartition("@")[2] for part in parts]
    # No library can quote a login of such characters in a form that `without_secrets` misses.
    is_right = not logins and _LOGIN.fullmatch(login) is not None and "@" not in path
    if not (is_right and all(map(_is_address, hosts))):
        raise PachinkoError(_WRONG_URL)
    user, has_password, password = map(urllib.parse.unquote, login.partition(":"))
    credentials = (user, password if has_password else None) if login else None
    return Broker(scheme, ",".join(hosts), credentials, options, namespace, f"{scheme}://{where}")


def _is_address(text: str) -> bool:
    found = _ADDRESS.fullmatch(text)
    return found is not None and 0 < int(found[1] or 1) < 65536


def without_secrets(exc: BaseException, broker: Broker | None) -> str:
    """Return the text of *exc* without the credentials of a URL that a library may quote."""
    text = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
    if type(exc) is TimeoutError:
        text = str(exc) or f"no answer within {_CONNECT:g} s"
    user, password = (broker and broker.credentials) or ("", None)
    secret = user if password is None else password
    for form in (secret, urllib.parse.quote(secret, safe="")):
        text = text.replace(form, "***") if form else text
    return text if len(text) <= _REASON_SHOWN else f"{text[:_REASON_SHOWN]}…"


def look_at_result(task: asyncio.Task[Any]) -> None:
    """Retrieve the exception of *task*, because asyncio logs an exception that nobody retrieves."""
    if not task.cancelled():
        task.exception()


def resolve(
    future: asyncio.Future[Any] | concurrent.futures.Future[Any],
    result: Any = None, failure: BaseException | None = None,
) -> None:  # fmt: skip
    """Give *future* its result, or its *failure*, if it has neither."""
    if future.done():
        return
    if failure is None:
        future.set_result(result)
    else:
        future.set_exception(failure)


# ── store ─────────────────────────────────────────────────────────────────────────────────────
#
# A broker that keeps what is sent to kept groups numbers a message, stores it and publishes it in
# one step, so that all processes have the same order, and each of them can tell what was missed.

_FORGET = 86_400.0  # seconds that the position of a quiet group outlasts its messages, at least
# An epoch becomes a part of JSON texts as it is. A peer message, which begins with a brace, has no
# stamp.
_STAMP = re.compile(rb"([\w.:-]{1,100}) (\d{1,19}) (\d{1,19})\n")


def decode_rules(data: bytes | str) -> dict[str, tuple[int, float, int]]:
    """Return what processes agree on: messages, seconds and bytes, by the prefix of a group."""
    return msgspec.json.decode(data, type=dict[str, tuple[int, float, int]])


class Stamp(NamedTuple):
    """What stands before a kept message that is delivered."""

    epoch: str
    number: int
    previous: int  # the number of the message to the same subject before it, or 0


class Entry(NamedTuple):
    """A kept message."""

    number: int
    age: float  # seconds
    data: bytes


class Past(NamedTuple):
    """What a broker knows of one subject."""

    epoch: str  # of all its numbers; another one if they may have begun anew
    top: int  # the number of its latest message, or a later one
    floor: int  # None of its messages with a higher number is missing in *entries*.
    entries: Sequence[Entry]


class Store(typing.Protocol):
    """What a `Backplane` has beside its methods, so that groups can be kept.

    It raises `PachinkoError` where it cannot keep anything, with what is to be done about it.
    """

    async def keep(self, subject: str, data: bytes, window: Window) -> None:
        """Do what `Backplane.publish` does, and keep *data*. It is delivered behind its stamp."""

    async def past(self, subject: str, count: int, after: Position | None = None) -> Past:
        """Return the last *count* messages to *subject*, and perhaps more, in their order.

        In the epoch of *after*, those up to there are not needed, and the floor may be as high.
        """
        ...

    async def agree(self, key: str, value: bytes, seconds: float) -> bytes:
        """Set *key* to *value*, unless another one was set within its seconds; return what it has.

        An empty *value* sets nothing. An empty result stands for none. What was not set again for
        so many seconds can be replaced, but is returned for another day to those who only ask.
        """
        ...


def stamped(stamp: Stamp, data: bytes) -> bytes:
    """Return *data*, a peer message, behind its stamp. A peer message begins with a brace."""
    return b"%b %d %d\n%b" % (stamp.epoch.encode(), stamp.number, stamp.previous, data)


def read_stamp(data: bytes) -> tuple[Stamp | None, bytes]:
    """Return the stamp, if there is one, and what is behind it."""
    if (found := _STAMP.match(data)) is None:
        return None, data
    epoch, number, previous = found.groups()
    return Stamp(epoch.decode(), int(number), int(previous)), data[found.end() :]


# ── JetStream ─────────────────────────────────────────────────────────────────────────────────
#
# One stream of NATS has the kept messages of a namespace. It numbers and stores a message, and then
# publishes it to the subject of its group, so that both have one order. The epoch is a part of the
# stored subjects: a process that does not know that the stream was made anew cannot store anything.

_JS_PATIENCE = 10.0  # seconds for one answer, since reads wait for each other
_JS_READS = 4  # at a time: while the server reads, it takes nothing else from this connection
_BATCH_SIZE = 1_048_576  # bytes of messages in the answer to one read
_BEGINS = 0.01  # seconds until a stream that was made is perhaps active
_RAISING = 2**53  # a mark above all numbers
_NO_JETSTREAM = (None, 10039, 10076)  # codes: nobody answers, or it is off for this account
_NOT_NOW = 10008  # the code of a cluster that has no leader
_NO_STREAM, _NAME_TAKEN, _OVERLAP, _NOT_THE_LAST = 10059, 10058, 10065, 10071
_EXPECTED = "Nats-Expected-Last-Subject-Sequence"
_FULL = re.compile(r"resource|bytes exceeded")
_NOBODY = "503"  # the status of the reply if nobody takes what was published


class Reply(NamedTuple):
    """A message of NATS, to an inbox of ours."""

    status: str  # "" if there is none
    headers: Mapping[str, str]
    data: bytes

    @property
    def number(self) -> int:
        return int(self.headers["Nats-Sequence"])

    @property
    def time(self) -> float:
        return _time(self.headers["Nats-Time-Stamp"])


class StreamGone(ConnectionError):
    """The stream is not there any more, or another one is, and nothing was stored or read."""


def read_headers(data: bytes) -> tuple[str, dict[str, str]]:
    """Return the status, or "", and the headers of a message."""
    first, *lines = data.decode(errors="replace").split("\r\n")
    return first[9:12], dict(line.split(": ", 1) for line in lines if ": " in line)


def stamp_of(headers: Mapping[str, str]) -> Stamp | None:
    """Return the stamp of a message that our stream has published, or None for another one."""
    with contextlib.suppress(KeyError, ValueError):
        _, _, epoch, _ = headers["Nats-Subject"].split(".")
        return Stamp(epoch, int(headers["Nats-Sequence"]), int(headers["Nats-Last-Sequence"]))
    return None


def _time(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()


def _max_age(seconds: float) -> int:
    """Return nanoseconds. A position outlasts the messages, so that quiet groups keep theirs."""
    return min(int((seconds + _FORGET) * 1e9), 2**62)


def _settings_of(namespace: str, epoch: str) -> dict[str, Any]:
    """Return the part of a stream's configuration that has to be as it is.

    Messages go in the order of their age only, since nobody may delete one: that tells what is
    missing.
    """
    kept = f"{namespace}.h.{epoch}.*"
    return {
        "subjects": [kept, f"{namespace}.k.>"], "retention": "limits", "allow_direct": True,
        "deny_delete": True, "deny_purge": True,
        "republish": {"src": kept, "dest": f"{namespace}.g.{{{{wildcard(1)}}}}"},
    }  # fmt: skip


class Stream:
    """A stream, as the server has described it."""

    def __init__(self, namespace: str, described: dict[str, Any]) -> None:
        """Read what the server says. Raises `PachinkoError` if the stream is not like ours."""
        self.config: dict[str, Any] = described["config"]
        self.name: str = self.config["name"]
        self.epoch: str = [*"".join(self.config.get("subjects", [])[:1]).split("."), "", ""][2]
        for key, value in _settings_of(namespace, self.epoch).items():
            if self.config.get(key) != value:
                raise PachinkoError(
                    f"the stream {self.name} of NATS has {key} = {self.config.get(key)!r}, and not "
                    f"{value!r}: delete it (nats stream rm {self.name}), and it is made as it has "
                    "to be"
                )
        self.messages: float = self.config["max_msgs_per_subject"] - 1
        if self.messages < 0:  # It has no limit.
            self.messages = math.inf
        # Messages up to this number were perhaps dropped when fewer of a subject were kept.
        self.mark: int = int(self.config.get("metadata", {}).get("pachinko-mark", 0))
        state = described["state"]
        self.first: int = state["first_seq"]
        self.top: int = state["last_seq"]
        self.count: int = sum(state.get("subjects", {}).values())  # of the subject asked for
        self.ahead: float = _time(described["ts"]) - pachinko.clock.time()

    def subject(self, subject: str) -> str:
        """Return the subject that has the messages to a group's *subject*."""
        namespace, _, token = subject.split(".")
        return f"{namespace}.h.{self.epoch}.{token}"

    def has_room(self, messages: int, seconds: float) -> bool:
        """Tell whether it keeps so much of each subject."""
        age = self.config["max_age"] or math.inf
        return self.messages >= messages and age >= _max_age(seconds) and self.mark < _RAISING

    def changed(self, messages: int, seconds: float) -> dict[str, Any]:
        """Return the configuration that is the next step to have room.

        While more messages begin to be kept, and the mark is above all numbers, some are dropped.
        Later the mark is what was the top after that.
        """
        mark, limit = self.mark, self.config["max_msgs_per_subject"]
        if mark == _RAISING:
            mark = self.top
        elif messages > self.messages:
            mark, limit = _RAISING, messages + 1
        age = self.config["max_age"] and max(self.config["max_age"], _max_age(seconds))
        metadata = {**self.config.get("metadata", {}), "pachinko-mark": str(mark)}
        return {
            **self.config, "max_msgs_per_subject": limit, "max_age": age, "metadata": metadata,
        }  # fmt: skip


class JetStream:
    """The `Store` of a `Nats`. It outlasts the connections by which it can *ask*."""

    def __init__(self, ask: Callable[..., Awaitable[list[Reply]]]) -> None:
        """*ask* publishes a question. It raises `PachinkoError` without the rights."""
        self._ask = ask
        self._stream: Stream | None = None  # as this connection has seen it
        self._most = 0, 0.0  # messages and seconds to be kept of a subject
        self._hour = 0  # the latest one that is marked
        self._latest = "", 0  # the epoch and number of the latest message
        self._turn = asyncio.Lock()
        self._reads = asyncio.Semaphore(_JS_READS)

    def forget(self) -> None:
        """Look at the stream before it is used again."""
        self._stream = None

    def note(self, epoch: str, number: int) -> None:
        """Note a message that was stored."""
        if epoch != self._latest[0] or number > self._latest[1]:
            self._latest = epoch, number

    async def keep(self, subject: str, data: bytes, window: Window) -> None:
        self._need(window.messages, window.seconds)
        await self._try(self._store, subject, data)

    async def past(self, subject: str, count: int, after: Position | None = None) -> Past:
        return await self._try(self._read, subject, count, after)

    async def _try(
        self, work: Callable[Concatenate[Stream, str, P], Awaitable[T]], subject: str,
        *args: P.args, **kwargs: P.kwargs,
    ) -> T:  # fmt: skip
        """Do *work* with a stream; with a new one if the stream turns out to be gone."""
        tries = 0
        while True:
            stream = await self._open(subject.partition(".")[0])
            try:
                return await work(stream, subject, *args, **kwargs)
            except BaseException as exc:
                # After a time-out: a listener hides that nobody stores the messages.
                self._stream = None if self._stream is stream else self._stream
                tries += 1
                if tries > 1 or not isinstance(exc, StreamGone):
                    raise

    async def _store(self, stream: Stream, subject: str, data: bytes) -> None:
        [reply] = await self._ask(stream.subject(subject), data)
        self.note(stream.epoch, _number_of(reply))

    async def _read(
        self, stream: Stream, subject: str, count: int, needed: Position | None
    ) -> Past:
        kept, epoch = stream.subject(subject), stream.epoch
        after = needed.number if needed is not None and needed.epoch == epoch else 0
        [last] = await self._ask(f"$JS.API.DIRECT.GET.{stream.name}.{kept}")
        top = 0 if last.status else last.number
        if top and (not count or top == after):
            return Past(epoch, top, top, [])
        async with self._reads:
            # The order counts: what is described is not newer than the messages that are read.
            now = await self._describe(subject.partition(".")[0], kept)
            if now is None or now.epoch != epoch:
                raise StreamGone("the stream was made anew")
            found = await self._messages(now, kept, after + 1, top) if top or now.count else []
        last_found = found[-1].number if found else 0
        if last_found < top and after < top:
            raise StreamGone("the stream has changed, or a replica is late")
        # What was described is whole. What was read is not, if the replica that was asked is late.
        is_late = now.count and now.config["num_replicas"] > 1
        latest = max(last_found, min(after, now.top) if is_late else now.top)
        floor = now.first - 1
        if found:
            is_full = max(now.count, len(found)) > now.messages
            floor = found[0].number if is_full else max(floor, min(found[0].number, now.mark))
        if len(found) < now.count:  # There are older ones, which are dropped before those found.
            oldest = encode({"seq": 1, "next_by_subj": kept})
            [first] = await self._ask(f"$JS.API.DIRECT.GET.{stream.name}", oldest)
            if first.status or first.number > after:
                raise StreamGone("messages were dropped while they were read")
            floor = min(after, latest)
        age = now.ahead + pachinko.clock.time()
        entries = [
            Entry(each.number, max(0.0, age - each.time), each.data)
            for each in found if each.number > floor
        ]  # fmt: skip
        return Past(epoch, latest, max(floor, min(after, latest)), entries)

    async def _messages(self, stream: Stream, kept: str, start: int, top: int) -> list[Reply]:
        """Return the messages from number *start* on, up to *top* at least."""
        found = list[Reply]()
        while True:
            wanted = {
                "seq": start, "next_by_subj": kept, "batch": 1000, "max_bytes": _BATCH_SIZE,
            }  # fmt: skip
            name = f"$JS.API.DIRECT.GET.{stream.name}"
            *some, end = await self._ask(name, encode(wanted), is_batch=True)
            if end.status == _NOBODY:
                raise StreamGone("the stream is gone")
            if not end.status:  # NATS before 2.11 sends one message at a time.
                some.append(end)
            found += some
            if not some or some[-1].number >= top:
                return found
            start = some[-1].number + 1

    async def agree(self, key: str, value: bytes, seconds: float) -> bytes:
        """Do what `Store.agree` says. The values are rules, which tell how much is to be kept."""
        namespace, _, rest = key.partition(".")
        subject = f"{namespace}.k.{rest}"
        if not value:  # Who keeps nothing asks one question, whatever the server is.
            [reply] = await self._ask(f"$JS.API.DIRECT.GET.{namespace}-kept.{subject}")
            if reply.status:
                return b""
        self._learn(value)
        has = await self._try(self._agree, subject, value, seconds)
        self._learn(has)
        await self._open(namespace)
        return has

    async def _agree(self, stream: Stream, subject: str, value: bytes, seconds: float) -> bytes:
        while True:
            [reply] = await self._ask(f"$JS.API.DIRECT.GET.{stream.name}.{subject}")
            has, number, end = b"", 0, 0.0
            if not reply.status:
                lasts, _, has = reply.data.partition(b" ")
                number, end = reply.number, reply.time + float(lasts)
            is_valid = stream.ahead + pachinko.clock.time() < end
            if not value or (is_valid and has != value):
                return has
            replacing = {_EXPECTED: str(number)}
            [reply] = await self._ask(subject, b"%f %b" % (seconds, value), replacing)
            if _number_of(reply):
                return value

    def _learn(self, rules: bytes) -> None:
        with contextlib.suppress(msgspec.MsgspecError):
            for messages, seconds, _ in decode_rules(rules).values():
                self._need(messages, seconds)

    def _need(self, messages: int, seconds: float) -> None:
        self._most = max(messages, self._most[0]), max(seconds, self._most[1])

    async def _open(self, namespace: str) -> Stream:
        """Return the stream. Makes it, or lets it keep more, if that is needed."""
        async with self._turn:
            while self._stream is None or not self._stream.has_room(*self._most):
                self._stream = None
                name = f"{namespace}-kept"
                latest = self._latest  # The feed goes on while the answer is on its way.
                stream = await self._describe(namespace)
                if stream is None:
                    config = {
                        **_settings_of(namespace, secrets.token_hex(4)), "name": name,
                        "storage": "file", "max_msgs_per_subject": self._most[0] + 1,
                        "max_age": _max_age(self._most[1]), "num_replicas": 1,
                    }  # fmt: skip
                    made = await self._call(f"STREAM.CREATE.{name}", config, _NAME_TAKEN)
                    # NATS may give it the files of a deleted stream, which it removes too late.
                    if made.get("state", {}).get("messages"):
                        await self._call(f"STREAM.DELETE.{name}", None, _NO_STREAM)
                elif self._has_lost_some(stream, latest):
                    await self._call(f"STREAM.DELETE.{name}", None, _NO_STREAM)
                elif not stream.has_room(*self._most):
                    changed = stream.changed(*self._most)
                    await self._call(f"STREAM.UPDATE.{name}", changed, _NO_STREAM)
                elif await self._is_active(stream, namespace):
                    self._stream, self._hour = stream, 0
                else:
                    await asyncio.sleep(_BEGINS)
            hour = int((self._stream.ahead + pachinko.clock.time()) // 3600)
            if hour != self._hour:
                self._hour = hour
                await self._mark(f"{namespace}.k.hour.{hour}")
            return self._stream

    async def _mark(self, subject: str) -> None:
        """Store a message that stays for a day, unless there is one.

        The first message of the stream then tells which others may have been forgotten. Otherwise,
        a busy group would push it on, and an old position in a quiet group would look forgotten.
        """
        with contextlib.suppress(PachinkoError):  # The storage may be full.
            [reply] = await self._ask(subject, headers={_EXPECTED: "0"})
            _number_of(reply)

    async def _is_active(self, stream: Stream, namespace: str) -> bool:
        """Tell whether *stream* takes messages and reads: it is described before it does."""
        subject = f"{namespace}.k.nothing"
        replies = await asyncio.gather(
            self._ask(subject, headers={"Nats-Expected-Stream": "none"}),  # It is not stored.
            self._ask(f"$JS.API.DIRECT.GET.{stream.name}.{subject}"),
        )
        return all(reply.status != _NOBODY for [reply] in replies)

    def _has_lost_some(self, stream: Stream, latest: tuple[str, int]) -> bool:
        """Tell whether the numbers of *stream* go back: after a power cut, or from a backup."""
        epoch, number = latest
        is_alone = stream.config["num_replicas"] == 1  # A new leader may take a while to know all.
        return is_alone and stream.epoch == epoch and stream.top < number

    async def _describe(self, namespace: str, subject: str = "") -> Stream | None:
        """Return the stream as it is now, with the number of messages to *subject*."""
        wanted = {"subjects_filter": subject} if subject else None
        described = await self._call(f"STREAM.INFO.{namespace}-kept", wanted, _NO_STREAM)
        return None if "error" in described else Stream(namespace, described)

    async def _call(self, call: str, wanted: object, expected: int) -> dict[str, Any]:
        """Call the API of JetStream. Raises `PachinkoError` but for the *expected* error."""
        [reply] = await self._ask(f"$JS.API.{call}", encode(wanted) if wanted else b"")
        answer: dict[str, Any] = {"error": {"err_code": None}}
        if reply.status != _NOBODY:
            answer = msgspec.json.decode(reply.data)
        if "error" in answer and answer["error"].get("err_code") != expected:
            raise _refusal(answer["error"], "made a stream")
        return answer


def _number_of(reply: Reply) -> int:
    """Return the number of a message that was stored; 0 if another one was before it."""
    if reply.status == _NOBODY:
        raise StreamGone("the stream is gone")
    answer = msgspec.json.decode(reply.data)
    if "error" not in answer:
        return int(answer["seq"])
    if answer["error"].get("err_code") == _NOT_THE_LAST:
        return 0
    raise _refusal(answer["error"], "stored a message")


def _refusal(error: dict[str, Any], what: str) -> Exception:
    """Return what to raise for an *error* of JetStream."""
    code, why = error.get("err_code"), error.get("description", "")
    if code in _NO_JETSTREAM:
        return PachinkoError(
            "groups are kept by JetStream, which this NATS server does not have: start it as "
            "nats-server -js -sd /var/lib/nats"
        )
    if code == _NOT_NOW:
        return ConnectionError(why)
    if code == _OVERLAP:
        why += ": another stream has subjects of this namespace, see nats stream ls --subject"
    if _FULL.search(why):
        why += ": the storage is full; give max_file_store more, or keep less (hub.keep)"
    return PachinkoError(f"NATS has not {what}: {why}")


# ── NATS ──────────────────────────────────────────────────────────────────────────────────────
#
# A `Nats` has one connection at a time; the link asks for the next one. `tests/test_nats_names.py`
# pins the private names of nats-py.


_BUCKET = "pachinko-leases"
_REQUEST = 1.2  # seconds for the answer of JetStream, less than the caller waits
_NO_RIGHTS = re.compile(r'"(\$js\.api|\$kv|_inbox)\.')
_numbers = itertools.count(1)  # of questions


def _client_class() -> Any:
    """Return the client's class. Only a program that uses NATS imports nats-py."""
    import nats.aio.client

    class OrderedClient(nats.aio.client.Client):
        """A client that awaits *take* for one message after the other, or leaves it to nats-py.

        Without this subclass, nats-py fails 3 of 24 fault tests. Its task and queue for each
        subscription cost 3 KiB, mix up the order between groups, and drop messages when a queue is
        full. Here a slow *take* makes the broker wait, and it disconnects a client that is slow.
        """

        def __init__(self, take: Callable[..., Awaitable[bool]], lost: Lost) -> None:
            super().__init__()
            self.take, self.lost = take, lost

        async def _process_msg(
            self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
        ) -> None:
            if not await self.take(subject.decode(), bytes(data), headers):
                await super()._process_msg(sid, subject, reply, data, headers)

        async def _process_op_err(self, e: Exception) -> None:
            self.lost(e)  # nats-py calls its callbacks only if it closes without an error
            await super()._process_op_err(e)

        async def _close(self, status: int, do_cbs: bool = True) -> None:
            # With uvloop it is an error to write to a socket that has been closed already.
            self._pending, self._pending_data_size = [], 0
            await super()._close(status, do_cbs)

        def _connect_command(self) -> bytes:
            # The command holds the password; nats-py encrypts only if the server asks for it.
            if "tls" in self.options and not self._server_info.get("tls_required"):
                raise ConnectionError("the server does not offer TLS")
            return super()._connect_command()

        def abort(self) -> None:
            """Close the socket: nats-py leaves it open if it is cancelled or closes by itself."""
            writer = getattr(self._transport, "_io_writer", None)
            if writer is not None:
                writer.transport.abort()

    return OrderedClient


@attrs.define(eq=False)
class Question:
    """What was published to get replies."""

    subject: str  # in lower case, as in the refusals
    is_batch: bool  # whether there may be several
    replies: list[Reply] = attrs.Factory(list)
    answer: asyncio.Future[list[Reply]] = attrs.Factory(
        lambda: asyncio.get_running_loop().create_future()
    )

    def end(self, failure: Exception | None = None) -> None:
        """Let the asker go on, if it still waits."""
        resolve(self.answer, self.replies, failure)


class Nats:
    """A `Backplane` on NATS, by nats-py."""

    def __init__(self, broker: Broker) -> None:
        self._class = _client_class()
        self._servers = [f"{broker.scheme}://{host}" for host in broker.hosts.split(",")]
        self._settings: dict[str, Any] = {
            "name": "pachinko",
            "allow_reconnect": False,  # the link reconnects
            "max_reconnect_attempts": 1,  # with more, a server that refuses us is tried for ever
            "reconnect_time_wait": 0,
            "connect_timeout": _CONNECT / (len(self._servers) + 1),  # one may be unreachable
            # A publish never waits for the socket: nats-py would swallow the caller's cancellation.
            # Memory is bounded all the same, since each caller waits for a round trip.
            "pending_size": sys.maxsize,
            "flusher_queue_size": 0,
        }
        self._settings.update(_nats_settings(broker))
        self._client: Any = None
        self._subscriptions: dict[str, Any] = {}
        self._bucket: Any = None  # It holds the leases, once it was opened.
        self._jetstream = JetStream(self._ask)
        self._inbox = ""  # the prefix of the subjects for replies; "" if not subscribed yet
        self._inbox_turn = asyncio.Lock()
        self._questions: dict[str, Question] = {}  # by the subject for their replies
        self._refusals: list[str] = []  # permission errors, each for one message
        self._round_trip: asyncio.Task[None] | None = None  # the next one, shared by new calls
        self._round_trips: set[asyncio.Task[None]] = set()

    async def start(self, deliver: Deliver, lost: Lost) -> None:
        *others, last = random.sample(self._servers, len(self._servers))
        for server in others:
            with contextlib.suppress(Exception):  # the next server may work, whatever failed
                return await self._connect(server, deliver, lost)
            await self.stop()
        await self._connect(last, deliver, lost)

    async def _connect(self, server: str, deliver: Deliver, lost: Lost) -> None:
        """Connect to *server*, or raise the last error that nats-py has reported."""
        errors: list[BaseException | None] = [None]

        def tell(exc: BaseException | None) -> None:
            if client is self._client:  # this client is neither stopped nor replaced
                lost(exc)

        async def failed(exc: Exception) -> None:
            text = str(exc).lower()
            if "permissions violation" not in text:
                errors.append(exc)
            elif '(sid "' in text:  # a subscription that was permitted until now
                tell(exc)
            elif not self._refuse(text):
                self._refusals.append(text)  # the connection goes on

        async def closed() -> None:
            tell(errors[-1] or client.last_error)

        self._subscriptions, self._round_trip, self._bucket, self._inbox = {}, None, None, ""
        self._refusals.clear()
        self._jetstream.forget()
        self._client = client = self._class(functools.partial(self._take, deliver), tell)
        try:
            await client.connect(server, error_cb=failed, closed_cb=closed, **self._settings)
        except Exception as exc:  # whatever nats-py raises
            raise errors[-1] or exc  # noqa: B904 - its "no servers available" hides why

    async def publish(self, subject: str, data: bytes) -> None:
        await self._client_for(data).publish(subject, data)
        await self._processed()
        self._check_permitted("publish", subject)

    def _client_for(self, data: bytes) -> Any:
        """Return the client. Raises `PachinkoError` if *data* is too long for the server."""
        client = self._connected()
        if len(data) > client.max_payload:
            raise PachinkoError(
                f"the NATS server takes messages of at most {client.max_payload} bytes "
                f"(max_payload), this one has {len(data)}"
            )
        return client

    async def keep(self, subject: str, data: bytes, window: Window) -> None:
        await self._jetstream.keep(subject, data, window)

    async def past(self, subject: str, count: int, after: Position | None = None) -> Past:
        return await self._jetstream.past(subject, count, after)

    async def agree(self, key: str, value: bytes, seconds: float) -> bytes:
        return await self._jetstream.agree(key, value, seconds)

    async def _ask(
        self, subject: str, data: bytes = b"", headers: dict[str, str] | None = None,
        is_batch: bool = False,
    ) -> list[Reply]:  # fmt: skip
        """Publish a question and return the replies, in one order with messages to groups."""
        client = self._client_for(data)
        async with self._inbox_turn:
            self._inbox = self._inbox or await self._open_inbox()
        name = f"{self._inbox}.{next(_numbers)}"
        question = Question(subject.lower(), is_batch)
        self._questions[name] = question
        try:
            await client.publish(subject, data, name, headers)
            async with asyncio.timeout(_JS_PATIENCE):
                return await question.answer
        finally:
            del self._questions[name]

    async def _open_inbox(self) -> str:
        """Subscribe to replies, and return what their subjects begin with."""
        inbox = f"_INBOX.{secrets.token_hex(8)}"
        try:
            await self.subscribe(f"{inbox}.*")
        except PachinkoError as exc:
            raise _no_rights_to_keep(exc) from None
        return inbox

    async def _take(self, deliver: Deliver, name: str, data: bytes, headers: bytes | None) -> bool:
        """Take a message. Returns False if it answers nats-py, which has asked for a lease."""
        if name.startswith("_INBOX."):
            return self._answer(name, data, headers or b"")
        if headers and (stamp := stamp_of(read_headers(headers)[1])) is not None:
            self._jetstream.note(stamp.epoch, stamp.number)
            data = stamped(stamp, data)
        await deliver(name, data)
        return True

    def _answer(self, name: str, data: bytes, headers: bytes) -> bool:
        """Take a reply. Returns False if it is not for us."""
        if not self._inbox or not name.startswith(self._inbox):
            return False
        if (question := self._questions.get(name)) is not None:
            reply = Reply(*read_headers(headers), data)
            question.replies.append(reply)
            if not question.is_batch or reply.status or "Nats-Num-Pending" not in reply.headers:
                question.end()
        return True

    def _refuse(self, refusal: str) -> bool:
        """Fail the questions that the server does not permit. Returns whether there were some."""
        asked = [each for each in self._questions.values() if f'"{each.subject}"' in refusal]
        for each in asked:
            each.end(_no_rights_to_keep(refusal))
        return bool(asked)

    async def subscribe(self, subject: str) -> None:
        self._subscriptions[subject] = subscription = await self._connected().subscribe(subject)
        subscription._pending_queue = None
        await self._processed()
        try:
            self._check_permitted("subscription", subject)
        except PachinkoError:
            await self.unsubscribe(subject)  # nats-py keeps a refused subscription
            raise

    async def unsubscribe(self, subject: str) -> None:
        await self._subscriptions.pop(subject).unsubscribe()

    async def lease(self, key: str, token: str, seconds: float) -> bool:
        """Take or renew the lease *key* for *token*, or give it up, as `Lease.request` says."""
        from nats.errors import TimeoutError as Unanswered
        from nats.js import errors

        try:
            return await self._replace(await self._open_bucket(), key, token.encode(), seconds)
        except errors.KeyWrongLastSequenceError:
            return False  # Another process has been faster.
        except Unanswered:
            if any(map(_NO_RIGHTS.search, self._refusals)):
                raise PachinkoError(
                    "a worker with once=True needs further rights in NATS: to publish to $JS.API.> "
                    f"and $KV.{_BUCKET}.>, and to subscribe to _INBOX.> ({self._refusals[-1]})"
                ) from None
            raise

    async def _replace(self, bucket: Any, key: str, value: bytes, seconds: float) -> bool:
        """Write *value*, or delete it, naming the revision that it has to replace."""
        from nats.js.errors import KeyNotFoundError

        entry: Any = None
        with contextlib.suppress(KeyNotFoundError):  # It was never there, or deleted or forgotten.
            entry = await bucket.get(key, validate_keys=False)
        if entry is None:
            if seconds:
                await bucket.create(key, value, validate_keys=False)
        elif entry.value != value:
            return False
        elif seconds:
            await bucket.update(key, value, entry.revision, validate_keys=False)
        else:
            await bucket.delete(key, entry.revision, validate_keys=False)
        return bool(seconds)

    async def _open_bucket(self) -> Any:
        """Return the bucket of the leases. Raises `PachinkoError` if the server cannot have it."""
        from nats.js import errors

        if self._bucket is None:
            stream = self._connected().jetstream(timeout=_REQUEST)
            try:
                try:
                    bucket = await stream.key_value(_BUCKET)
                except errors.BucketNotFoundError:
                    bucket = await stream.create_key_value(bucket=_BUCKET, ttl=LEASE)
                ttl = (await bucket.status()).ttl
            except errors.ServiceUnavailableError as exc:
                if exc.err_code not in _NO_JETSTREAM:
                    raise
                raise PachinkoError(
                    "a worker with once=True needs JetStream, which this NATS server does not "
                    "have: start it as nats-server -js -sd /var/lib/nats"
                ) from None
            if ttl != LEASE:
                raise PachinkoError(
                    f"the bucket {_BUCKET} of NATS keeps its values for {ttl or 0:g} s, and leases "
                    f"need {LEASE:g} s: nats kv del {_BUCKET}"
                )
            self._bucket = bucket
        return self._bucket

    async def stop(self) -> None:
        client, self._client = self._client, None
        for question in self._questions.values():
            question.end(ConnectionError("the connection has been lost"))
        if client is None:
            return
        try:
            with contextlib.suppress(TimeoutError):  # a failed TLS handshake, a full socket
                async with asyncio.timeout(_DISCONNECT):
                    await client.close()
        finally:
            client.abort()
            for task in tuple(self._round_trips):
                task.cancel()

    def _check_permitted(self, what: str, subject: str) -> None:
        """Raise `PachinkoError` if the server has refused; its refusal precedes the round trip."""
        refusal = f'nats: permissions violation for {what} to "{subject.lower()}"'
        if refusal in self._refusals:
            self._refusals.remove(refusal)
            raise PachinkoError(f"the NATS server does not permit the {what} to {subject}")

    def _connected(self) -> Any:
        if self._client is None or not self._client.is_connected:
            raise ConnectionError("not connected")
        return self._client

    async def _processed(self) -> None:
        """Wait until the server has processed everything that was sent before.

        One round trip serves all calls that were made before it begins.
        """
        if self._round_trip is None:
            self._round_trip = create_task(self._make_round_trip(), is_detached=True)
            self._round_trips.add(self._round_trip)
            self._round_trip.add_done_callback(self._round_trips.discard)
            self._round_trip.add_done_callback(look_at_result)
        await asyncio.wait([trip := self._round_trip])
        if trip.cancelled():  # by `stop`: nobody has cancelled the caller
            raise ConnectionError("the connection has been lost")
        trip.result()

    async def _make_round_trip(self) -> None:
        client, pause = self._connected(), 0.0
        # The PING of nats-py would overtake what nats-py has not written yet.
        while client.is_connected and client.pending_data_size:
            await asyncio.sleep(pause)
            pause = min(pause + 0.001, 0.02)
        self._round_trip = None
        await client.flush(timeout=60)  # the callers give up earlier


def _no_rights_to_keep(refusal: object) -> PachinkoError:
    return PachinkoError(
        "keeping groups needs further rights in NATS: to publish to $JS.API.>, and to subscribe to "
        f"_INBOX.> ({refusal})"
    )


def _nats_settings(broker: Broker) -> dict[str, Any]:
    """Return the settings for nats-py that the URL has. Raises `PachinkoError`."""
    settings: dict[str, Any] = {}
    options = dict(broker.options)
    if broker.credentials is not None:
        user, password = broker.credentials
        settings = {"token": user} if password is None else {"user": user, "password": password}
    if (file := options.pop("credentials", None)) is not None:
        if importlib.util.find_spec("nkeys") is None:
            raise PachinkoError('?credentials= needs: python3 -m pip install "nats-py[nkeys]"')
        if not os.access(file, os.R_OK):
            raise PachinkoError("?credentials= names no file that can be read")
        settings["user_credentials"] = file
    ca = options.pop("ca", None)
    if broker.scheme == "tls" or ca is not None:
        try:
            settings["tls"] = ssl.create_default_context(cafile=ca)
        except OSError as exc:
            raise PachinkoError(f"?ca= names no file of certificates: {exc}") from None
    if options:
        raise PachinkoError(
            f"{broker.scheme}:// knows the options namespace, ca (a file of certificates) and "
            f"credentials (a file of NATS), not {', '.join(options)}"
        )
    return settings


# ── Redis ─────────────────────────────────────────────────────────────────────────────────────
#
# A `Redis` has two connections: it publishes on one, and subscribes on the other. The public API of
# redis-py, `PubSub` and pipelines, takes 1.4 to 2 times the CPU time for a message.


_TIDY = 100  # messages between two times to forget quiet subjects, ten times as many at most
# A lease has its holder's token as value. To give it up is to keep it for a millisecond.
_TAKE = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_NO_RIGHT = re.compile(r"ACL failure|can't (run this command|access|publish)")
# Three kinds of keys hold what is kept, all in one slot by their hash tag, the namespace:
# - `{namespace}.kept`, a hash, has *n*, the number of the latest message, and what `_LIFE` reads.
# - `….tops`, a sorted set, has the number of the latest message to each subject. A subject that has
#   been quiet for a day may be missing; it then has no message with a number above *floor*. A day
#   later *mark* becomes the floor. The member "" shows that the set was not evicted.
# - `….<life>.<subject>`, a stream, expires with its messages. An id is a number and a time, and the
#   only field of an entry is named by the number of the message before it.
# A *life* ends when the hash or the set is lost. An epoch also ends with the server's history of
# replication, by a failover or a restart, because messages that had numbers may be missing then.
_LIFE = """
local replid = string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
if not replid then return redis.error_reply('ERR no master_replid') end
local tops, subject, time = KEYS[1] .. '.tops', ARGV[1], redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local top = redis.call('ZSCORE', tops, subject)
local has = redis.call('HMGET', KEYS[1], 'replid', 'epoch', 'life', 'floor', 'mark', 'since', 'n')
local was, epoch, life, floor, mark, since, n = unpack(has)
local is_lost = not life or not (top or redis.call('ZSCORE', tops, ''))
if is_lost or was ~= replid then
  epoch = string.sub(redis.sha1hex(replid .. time[1] .. '.' .. time[2]), 1, 8)
  redis.call('HSET', KEYS[1], 'replid', replid, 'epoch', epoch)
end
if is_lost then
  life, floor, mark, since, n, top = epoch, 0, 0, now, 0, false
  redis.call('ZREMRANGEBYRANK', tops, 0, -1)
  redis.call('ZADD', tops, '-inf', '')
  redis.call('HSET', KEYS[1], 'life', life, 'floor', floor, 'mark', mark, 'since', since, 'n', 0)
end
local stream = KEYS[1] .. '.' .. life .. '.' .. subject
"""
_KEEP = f"""{_LIFE}
n = redis.call('HINCRBY', KEYS[1], 'n', 1)
if n % (ARGV[5] or {_TIDY}) == 0 then
  if now - since > ARGV[4] + {_FORGET * 1000:.0f} then
    floor = mark
    redis.call('HSET', KEYS[1], 'floor', mark, 'mark', n - 1, 'since', now)
  end
  local quiet = math.min(redis.call('ZCOUNT', tops, '-inf', floor), {_TIDY * 10})
  redis.call('ZREMRANGEBYRANK', tops, 1, quiet - 1)
end
redis.call('ZADD', tops, n, subject)
redis.call('XADD', stream, 'MAXLEN', ARGV[3], n .. '-' .. now, top or floor, ARGV[2])
redis.call('PEXPIRE', stream, ARGV[4])
redis.call('PUBLISH', subject, epoch .. ' ' .. n .. ' ' .. (top or 0) .. '\\n' .. ARGV[2])
"""
_PAST = f"""{_LIFE}
local last = {{}}
if ARGV[2] ~= '0' then last = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', ARGV[2]) end
return {{epoch, tonumber(n), tonumber(top or floor), now, last}}
"""
_AGREE = f"""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local till, has = string.match(redis.call('GET', KEYS[1]) or '', '^(%d+) (.*)$')
if ARGV[1] == '' then return has or '' end
if has and has ~= ARGV[1] and now < tonumber(till) then return has end
local value = string.format('%.0f ', now + ARGV[2]) .. ARGV[1]
redis.call('SET', KEYS[1], value, 'PX', string.format('%.0f', ARGV[2] + {_FORGET * 1000:.0f}))
return ARGV[1]
"""
_STORE_RIGHTS = (
    "+eval +evalsha +info +time +get +set +hmget +hset +hincrby +zscore +zadd +zcount "
    "+zremrangebyrank +xadd +xrevrange +pexpire +publish"
)
_ADVICE = {  # by what the error says
    "nknown": "they need Redis 5.0 or later, or Valkey, with all its commands",
    "read only replica": "this is a replica, give the address of the primary",
    "master_replid": "this server does not say when another one takes its place",
    "maxmemory": "its memory is full, raise maxmemory",
}
_CANCEL_AGAIN = 0.5  # seconds that a task may clean up before it is cancelled once more


@functools.cache
def _digest(script: str) -> str:
    """Return the name of *script* in the server's cache."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


def _slot_of(subject: str) -> str:
    """Return the beginning of all keys for the namespace of *subject*."""
    return f"{{{subject.partition('.')[0]}}}."


def _milliseconds(seconds: float) -> str:
    """Return *seconds* as Redis takes them: at least a millisecond, at most 30,000 years."""
    return str(max(1, int(min(seconds, 1e12) * 1000)))


class RedisConnection:
    """A connection to Redis. A command does not wait for the replies to earlier commands."""

    def __init__(self, connection: Any, deliver: Deliver, lost: Lost) -> None:
        self._connection = connection
        self._deliver, self._lost = deliver, lost
        self._commands: list[tuple[str | bytes, ...]] = []
        self._replies: collections.deque[asyncio.Future[Any]] = collections.deque()
        self._called = asyncio.Event()
        self._failure: Exception | None = None
        self.failed: asyncio.Event = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        await self._connection.connect()
        self._tasks = [create_task(self._run(work)) for work in (self._read, self._write)]

    async def call(self, *command: str | bytes) -> Any:
        """Return the reply to *command*. Raises the error that Redis answers with."""
        if self._failure is not None:
            raise self._failure
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._replies.append(reply)
        self._commands.append(command)
        self._called.set()
        return await reply

    def cancel(self) -> None:
        self._fail(ConnectionResetError("not connected"))
        for task in self._tasks:
            task.cancel()

    def _fail(self, exc: Exception) -> None:
        """Let all calls fail that have no reply, and later ones."""
        self._failure = self._failure or exc
        for reply in self._replies:
            resolve(reply, failure=self._failure)

    async def close(self) -> None:
        while self._tasks and (await asyncio.wait(self._tasks, timeout=_CANCEL_AGAIN))[1]:
            self.cancel()  # `asyncio.wait_for` of Python 3.11, in redis-py, may have swallowed one.
        await self._connection.disconnect(nowait=True)

    async def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception as exc:  # the library or the socket has failed
            self.failed.set()
            self._lost(exc)
            self._fail(exc)

    async def _write(self) -> None:
        # This is a task of its own: redis-py disconnects when it is cancelled while it writes.
        while await self._called.wait():
            self._called.clear()
            commands, self._commands = self._commands, []
            packed = self._connection.pack_commands(commands)
            await self._connection.send_packed_command(packed, check_health=False)

    async def _read(self) -> None:
        from redis.exceptions import ResponseError

        while True:
            error = reply = None
            try:
                reply = await self._connection.read_response(timeout=math.inf)
            except ResponseError as exc:
                error = exc
            if type(reply) is list and reply[0] == b"message":
                await self._deliver(reply[1].decode(), reply[2])
                continue
            resolve(self._replies.popleft(), reply, error)


class Redis:
    """A `Backplane` on Redis, by redis-py."""

    def __init__(self, broker: Broker) -> None:
        import redis.exceptions
        from redis.asyncio.connection import ConnectionPool
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        # A URL may be shared with programs that want their replies in another form.
        ours = ("protocol", "decode_responses", "encoding")
        options = {name: value for name, value in broker.options.items() if name not in ours}
        never = Retry(NoBackoff(), 0)  # the link retries; redis-py might send a message twice
        try:
            pool: Any = ConnectionPool.from_url(
                f"{broker.url.partition('?')[0]}?{urllib.parse.urlencode(options)}",
                retry=never, protocol=2, client_name="pachinko",
            )  # fmt: skip
            pool.make_connection()
        except Exception as exc:  # redis-py raises several for a URL, Python one for a keyword
            raise PachinkoError(
                f"redis-py takes another option in a {broker.scheme}:// URL: "
                f"{without_secrets(exc, broker)}"
            ) from None
        self._pool, self._errors = pool, redis.exceptions
        self._connections: list[RedisConnection] = []
        self._counts_all = True
        self._ending: asyncio.Task[None] | None = None

    async def start(self, deliver: Deliver, lost: Lost) -> None:
        from redis.exceptions import ResponseError

        make: Callable[[], Any] = self._pool.make_connection
        end_later = functools.partial(self._end_later, lost)
        self._publishing = RedisConnection(make(), deliver, end_later)
        self._subscribed = RedisConnection(make(), deliver, lost)
        self._connections = [self._publishing, self._subscribed]
        opens = (connection.open() for connection in self._connections)
        for failure in await asyncio.gather(*opens, return_exceptions=True):
            if failure is not None:  # Neither is still being opened now.
                raise failure
        mode = b""
        with contextlib.suppress(ResponseError):  # a server before 6.0 has no HELLO
            about = await self._publishing.call("HELLO", "2")
            mode = dict(zip(about[::2], about[1::2], strict=True)).get(b"mode", b"")
        if mode == b"sentinel":
            raise PachinkoError("this is a Redis Sentinel: give the address of the primary instead")
        self._counts_all = mode != b"cluster"  # a node of a cluster counts its own subscribers

    def _end_later(self, lost: Lost, why: BaseException | None) -> None:
        """Report that `_publishing` has failed, once all has been read from `_subscribed`."""

        async def end() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DISCONNECT):
                    await self._subscribed.failed.wait()
            lost(why)

        self._ending = create_task(end())

    async def publish(self, subject: str, data: bytes) -> int | None:
        reached: int = await self._publishing.call("PUBLISH", subject, data)
        return reached if self._counts_all else None

    async def subscribe(self, subject: str) -> None:
        from redis.exceptions import ResponseError

        try:
            await self._subscribed.call("SUBSCRIBE", subject)
        except ResponseError as exc:
            raise PachinkoError(f"Redis does not permit to subscribe to {subject}: {exc}") from None

    async def unsubscribe(self, subject: str) -> None:
        await self._subscribed.call("UNSUBSCRIBE", subject)

    async def lease(self, key: str, token: str, seconds: float) -> bool:
        """Take or renew the lease *key* for *token*, or give it up, as `Lease.request` says."""
        what, rights = "a worker with once=True", f"~{key.rpartition('.')[0]}.* +eval +get +set"
        run = self._run(what, rights, "EVAL", _TAKE, "1", key, token, _milliseconds(seconds))
        return bool(await run and seconds)

    async def keep(self, subject: str, data: bytes, window: Window, *tidy: str) -> None:
        bounds = str(window.messages), _milliseconds(window.seconds)
        await self._store(_KEEP, _slot_of(subject), "kept", subject, data, *bounds, *tidy)

    async def past(self, subject: str, count: int, after: Position | None = None) -> Past:
        found = await self._store(_PAST, _slot_of(subject), "kept", subject, str(count))
        epoch, top, floor, now, last = found
        entries = list[Entry]()
        for id, (previous, data) in reversed(last):
            number, sent = map(int, id.split(b"-"))
            floor = floor if entries else int(previous)
            entries.append(Entry(number, (now - sent) / 1000, data))
        return Past(epoch.decode(), top, floor if count else top, entries)

    async def agree(self, key: str, value: bytes, seconds: float) -> bytes:
        if value:  # This tells now what would otherwise be told at the first message.
            await self.keep(key, b"", Window(1, 1.0, 1), "1")
            await self.past(key, 1)
        name, bounds = key.partition(".")[2], (value, _milliseconds(seconds))
        has: bytes = await self._store(_AGREE, _slot_of(key), name, *bounds)
        return has

    async def _store(self, script: str, slot: str, name: str, *args: str | bytes) -> Any:
        """Run *script* for the key *name*. Raises `BrokerAway` if Redis does not do that."""
        run = functools.partial(self._run, "hub.keep()", f"~{slot}* {_STORE_RIGHTS}")
        try:
            try:
                return await run("EVALSHA", _digest(script), "1", slot + name, *args)
            except self._errors.NoScriptError:
                return await run("EVAL", script, "1", slot + name, *args)
        except self._errors.ResponseError as exc:
            found = (advice for sign, advice in _ADVICE.items() if sign in str(exc))
            advice = next(found, "it says")
            text = f"Redis keeps no messages: {advice} ({exc})"
            raise pachinko.BrokerAway(text) from None  # The program has no bug.

    async def _run(self, what: str, rights: str, *command: str | bytes) -> Any:
        """Run a script. Raises `PachinkoError` if *what* is done without having the *rights*."""
        if not self._counts_all:
            raise PachinkoError(
                f"{what} needs a single Redis server, or NATS: this is a Redis Cluster, whose "
                "nodes do not share their keys"
            )
        try:
            return await self._publishing.call(*command)
        except self._errors.ResponseError as exc:
            is_refused = isinstance(exc, self._errors.NoPermissionError)
            if is_refused or _NO_RIGHT.search(str(exc)):
                raise PachinkoError(
                    f"{what} needs further rights in Redis: ACL SETUSER app {rights} ({exc})"
                ) from None
            raise

    async def stop(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
        for connection in self._connections:  # All end, even if the first one takes too long.
            connection.cancel()
        for connection in self._connections:
            await connection.close()


# ── simulated broker ──────────────────────────────────────────────────────────────────────────
#
# `pachinko.simulate` runs several processes in one event loop, and this is their broker.


class SimulatedBroker:
    """A broker in memory. An outage loses what is not yet delivered, and leases outlast it."""

    def __init__(self) -> None:
        self.connections: dict[SimulatedConnection, Lost] = {}  # the open ones, in order
        self.is_there: asyncio.Event = asyncio.Event()
        self.is_there.set()
        self.leases: dict[str, tuple[str, float]] = {}  # the holder's token, and when it expires
        self.epoch: str = secrets.token_hex(4)
        self.numbers: Iterator[int] = itertools.count(1)  # of kept messages
        # Kept messages by channel and subject, each with its time.
        self.kept: dict[tuple[str, str], list[tuple[Stamp, float, bytes]]] = {}
        self.values: dict[str, tuple[bytes, float]] = {}  # and when they expire

    def connection(self, channel: str = "") -> SimulatedConnection:
        """Return a `Backplane`, not yet started, for one hub of a process.

        It reaches those with the same *channel* only.
        """
        return SimulatedConnection(self, channel)

    def lose(self) -> None:
        """End all connections, and refuse new ones until `restore` is called."""
        self.is_there.clear()
        for each in tuple(self.connections):
            each.cut("the simulated broker is lost")

    def restore(self) -> None:
        """Accept connections again. Those who wait for that connect at once."""
        self.is_there.set()

    def flush(self) -> None:
        """Forget what is kept, and begin another epoch. Connections stay."""
        self.epoch, self.numbers = secrets.token_hex(4), itertools.count(1)
        self.kept.clear()
        self.values.clear()


class SimulatedConnection:
    """A `Backplane` on a `SimulatedBroker`, for one process."""

    def __init__(self, broker: SimulatedBroker, channel: str) -> None:
        self._broker = broker
        self.channel: str = channel
        self._is_refused = False  # The latest attempt to connect was.
        self.subjects: set[str] = set()
        self.messages: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()  # to be delivered
        self._pump: asyncio.Task[None] | None = None

    async def start(self, deliver: Deliver, lost: Lost) -> None:
        self._is_refused = not self._broker.is_there.is_set()
        if self._is_refused:
            raise ConnectionRefusedError("the simulated broker is lost")
        self._pump = create_task(self._deliver(deliver), is_detached=True)
        self._broker.connections[self] = lost

    async def publish(self, subject: str, data: bytes) -> int:
        connections = self._connected().connections
        others = [each for each in connections if each.channel == self.channel]
        receivers = [each for each in others if subject in each.subjects]
        for each in receivers:
            each.messages.put_nowait((subject, data))
        return len(receivers)

    async def keep(self, subject: str, data: bytes, window: Window) -> None:
        broker, key = self._connected(), (self.channel, subject)
        kept = broker.kept.setdefault(key, [])
        number = next(broker.numbers)
        stamp = Stamp(broker.epoch, number, kept[-1][0].number if kept else 0)
        kept.append((stamp, pachinko.clock.time(), data))
        del kept[: -window.messages]
        await self.publish(subject, stamped(stamp, data))

    async def past(self, subject: str, count: int, after: Position | None = None) -> Past:
        broker, now = self._connected(), pachinko.clock.time()
        kept = broker.kept.get((self.channel, subject), [])
        top = kept[-1][0].number if kept else 0
        last = kept[-count:] if count else []
        if after is not None and after.epoch == broker.epoch:
            last = [each for each in last if each[0].number > after.number]
        entries = [Entry(stamp.number, now - at, data) for stamp, at, data in last]
        return Past(broker.epoch, top, last[0][0].previous if last else top, entries)

    async def agree(self, key: str, value: bytes, seconds: float) -> bytes:
        values, now = self._connected().values, pachinko.clock.time()
        key = f"{self.channel}.{key}"
        has, end = values.get(key, (b"", now))
        if value and (has == value or end <= now):
            values[key] = has, _ = value, now + seconds
        return has

    async def subscribe(self, subject: str) -> None:
        self._connected()
        self.subjects.add(subject)

    async def unsubscribe(self, subject: str) -> None:
        self.subjects.discard(subject)

    async def lease(self, key: str, token: str, seconds: float) -> bool:
        leases, now = self._connected().leases, pachinko.clock.time()
        key = f"{self.channel}.{key}"
        holder, end = leases.get(key, (token, now))
        if holder != token and now < end:
            return False
        leases[key] = token, now + seconds
        return seconds > 0

    async def pause(self, seconds: float) -> None:
        """Wait between two attempts to connect: after a refusal, until the broker is restored."""
        if self._is_refused:  # The attempt after a loss comes at once, since callers wait for it.
            await self._broker.is_there.wait()

    async def stop(self) -> None:
        self.cut()
        if self._pump is not None:
            await asyncio.wait([self._pump])

    def cut(self, why: str | None = None) -> None:
        """End the connection. The process is told *why* if that is not what it has asked for."""
        lost = self._broker.connections.pop(self, None)
        self.subjects.clear()
        self.messages = asyncio.Queue()
        if self._pump is not None:
            self._pump.cancel()
        if lost is not None and why is not None:
            lost(ConnectionResetError(why))

    def kill(self) -> None:
        """End the connection, for good, as if the process had been killed. Its leases expire."""
        self.cut("the process has been killed")
        self._broker = SimulatedBroker()
        self._broker.lose()  # It is never restored.

    def _connected(self) -> SimulatedBroker:
        if self not in self._broker.connections:
            raise ConnectionResetError("not connected to the simulated broker")
        return self._broker

    async def _deliver(self, deliver: Deliver) -> None:
        messages = self.messages
        while messages is self.messages:  # A `deliver` may have caught its cancellation.
            await deliver(*await messages.get())


# ── link ──────────────────────────────────────────────────────────────────────────────────────
#
# The link keeps the process connected. It knows subjects and bytes, but not what they mean.

_BROKER_WAIT = 4.0  # seconds that the broker may take for a message; callers are promised 5
_BEAT = 0.5  # seconds between two signs of life
_RESTORE = 10.0  # seconds for 500 subscriptions at once, when all processes come back together
_MISSED = 5  # signs of life in a row that fail to come before the broker counts as lost
_RECONNECT = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between attempts; then always the last
Pack = Callable[[int], bytes]  # makes a message, given the number of the session


class Link:
    """Keeps a process connected to its broker, and subscribed to its subjects.

    A *session* is one connection to the broker; sessions are numbered from 1. *restored* is called
    when messages of a subject, or of all (None), may have been missed. *essential* are the subjects
    without which a session is of no use; *opened* is awaited once it has these. The link sends
    itself signs of life, which *beat* makes, on the first of them. *process* is for the log.
    """

    def __init__(
        self, backplane: Backplane, broker: Broker | None,
        deliver: Deliver, restored: Callable[[str | None], None],
        essential: Sequence[str], beat: Pack, process: str,
        opened: Callable[[], Awaitable[None]] | None = None,
    ) -> None:  # fmt: skip
        self._backplane, self._broker, self._opened = backplane, broker, opened
        self._name = str(broker) if broker is not None else type(backplane).__name__
        self._deliver, self._restored = deliver, restored
        self._essential, self._make_beat, self._process = essential, beat, process
        self.session: int = 0
        self.outages: int = 0
        self.is_connected: bool = False
        self._subjects: dict[str, None] = dict.fromkeys(essential)  # to be subscribed, in order
        self._subscribed: set[str] = set()  # confirmed by the broker
        self._denied: dict[str, str] = {}  # not permitted, with the reason
        self._late: set[str] = set()  # a caller of `subscribed` has given up waiting
        self._changes: dict[str, asyncio.Task[None]] = {}  # tasks that subscribe or unsubscribe
        self._copies: dict[bytes, tuple[str, asyncio.Future[None]]] = {}  # our own, to come back
        self._waits: set[asyncio.Timeout] = set()  # messages that are not confirmed yet
        self._beat = b""
        self._has_heard = False  # a message of our own has come since the last beat
        self._is_receiving = False
        self._why = "not connected yet"
        self._has_missed = False  # messages may have been missed
        self._lost: asyncio.Future[BaseException | None]
        self._attempted = asyncio.Event()  # not set while callers wait for an attempt to connect
        self._turn = asyncio.Lock()  # keeps the callers of `connected` in order
        # Wait before the next attempt to connect. A backplane may know better when it is due.
        self._pause: Callable[[float], Awaitable[None]] = getattr(backplane, "pause", asyncio.sleep)
        self._task: asyncio.Task[None] = create_task(self._run(), is_detached=True)

    async def stop(self) -> None:
        """Disconnect, for good."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def connected(self) -> None:
        """Wait for the connection attempt in progress, if there is one.

        Callers go on in the order in which they came. Raises `BrokerAway` if the broker is not
        connected afterwards.
        """
        async with self._turn:
            await self._attempted.wait()
        if not self.is_connected:
            raise pachinko.BrokerAway(f"{self._name} cannot be reached: {self._why}")

    async def publish(self, subject: str, pack: Pack, window: Window | None = None) -> int | None:
        """Publish what *pack* makes; no two messages are equal. The broker keeps a *window*.

        Returns once the broker has the message and, if this process is subscribed, once the message
        has come back. The result is the number of processes that it went to, or None if the broker
        does not say. Raises `PachinkoError` within 5 seconds; the message may have arrived anyway.
        """
        try:
            async with asyncio.timeout(_BROKER_WAIT) as patience:
                await self.connected()
                try:
                    self._waits.add(patience)
                    return await self._publish(subject, pack(self.session), window)
                finally:
                    self._waits.discard(patience)
        except PachinkoError:
            raise
        except TimeoutError:
            why = self._why or f"no answer within {_BROKER_WAIT:g} s"
            raise pachinko.BrokerAway(f"{self._name} has not taken a message: {why}") from None
        except Exception as exc:  # the library has failed
            text = f"{self._name}: {without_secrets(exc, self._broker)}"
            if self._is_bug(exc):
                raise PachinkoError(text) from exc
            raise pachinko.BrokerAway(text) from None

    async def _publish(self, subject: str, data: bytes, window: Window | None) -> int | None:
        """Publish *data*. If this process is subscribed, wait until the message has come back."""
        copy: asyncio.Future[None] | None = None
        if subject in self._subscribed and subject in self._subjects:
            copy = asyncio.get_running_loop().create_future()
            self._copies[data] = subject, copy
        try:
            reached: int | None = None
            if window is None:
                reached = await self._backplane.publish(subject, data)
            else:
                await cast(Store, self._backplane).keep(subject, data, window)
            if copy is not None:
                await copy
            return reached
        finally:
            self._copies.pop(data, None)

    async def _receive(self, session: int, subject: str, data: bytes) -> None:
        """Deliver a message that has come in *session*. Called by the backplane."""
        is_ours = subject in self._subscribed and subject in self._subjects
        if session != self.session or not is_ours:
            return
        if not self.is_connected:  # The members learn in `_begin` what they have missed before.
            self._has_missed = True
            return
        if data == self._beat:
            self._has_heard = True
            return
        try:
            self._is_receiving = True
            await self._deliver(subject, data)
        except Exception:  # a bug in this library; nats-py would stop reading
            logger.exception("a message from %s was not handled", self._name)
        else:
            _, copy = self._copies.get(bytes(read_stamp(data)[1]), (None, None))
            if copy is not None:
                self._has_heard = True
                resolve(copy)
        finally:
            self._is_receiving = False

    def subscribe(self, subject: str) -> None:
        """Subscribe to *subject*, now and in each later session."""
        self._subjects[subject] = None
        self._start_change(subject)

    def unsubscribe(self, subject: str) -> None:
        """Undo `subscribe`."""
        self._subjects.pop(subject, None)
        self._denied.pop(subject, None)
        self._late.discard(subject)
        for about, copy in self._copies.values():
            if about == subject:
                resolve(copy)  # no member is left that has to get it first
        self._start_change(subject)

    async def subscribed(self, subject: str) -> None:
        """Wait until the broker has confirmed *subject*, as `Relay.subscribed` says."""
        try:
            with contextlib.suppress(PachinkoError, TimeoutError):
                async with asyncio.timeout(_BROKER_WAIT):
                    while subject in self._subjects and self._is_pending(subject):
                        if self.is_connected:
                            await asyncio.wait([self._changes.get(subject, self._lost)])
                        else:
                            await self.connected()
        finally:
            if subject in self._subjects and self._is_pending(subject):
                self._late.add(subject)
        if subject in self._denied:
            raise PachinkoError(self._denied[subject])

    def _is_pending(self, subject: str) -> bool:
        """Return whether the broker has yet to subscribe us to *subject*, or to unsubscribe us."""
        is_settled = subject in self._subscribed or subject in self._denied
        return (subject in self._subjects) != is_settled

    def _start_change(self, subject: str) -> None:
        """Subscribe or unsubscribe in the background, unless that is in progress."""
        if self.is_connected and subject not in self._changes and self._is_pending(subject):
            self._changes[subject] = create_task(self._change(subject), is_detached=True)

    async def _change(self, subject: str) -> None:
        """Subscribe and unsubscribe until the broker agrees with `_subjects`.

        Members come and go meanwhile, so that one call to the broker may not be enough. The end of
        the session cancels the task, and the next session takes over. A backplane may catch that
        cancellation; the task is then no longer in `_changes`, and its result does not count.
        """
        me = asyncio.current_task()
        try:
            while self._is_pending(subject):
                if subject in self._subjects:
                    await self._backplane.subscribe(subject)
                    if self._changes.get(subject) is not me:
                        return
                    self._note_subscribed(subject)
                else:
                    self._subscribed.discard(subject)
                    await self._backplane.unsubscribe(subject)
        except Exception as exc:  # the library has failed
            if self._changes.get(subject) is not me:
                pass  # the session has ended
            elif isinstance(exc, PachinkoError):
                self._note_denied(subject, exc)
            else:
                resolve(self._lost, exc)
        finally:
            if self._changes.get(subject) is me:
                del self._changes[subject]

    def _note_subscribed(self, subject: str) -> None:
        """Note that the broker has confirmed *subject*, perhaps too late for a caller."""
        self._subscribed.add(subject)
        if subject in self._late and subject in self._subjects:
            if self.is_connected:
                self._restored(subject)
            else:  # the session has not begun; `_begin` then restores all subjects
                self._has_missed = True
        self._late.discard(subject)

    def _note_denied(self, subject: str, exc: PachinkoError) -> None:
        """Log that the broker does not permit *subject*; `subscribed` raises the reason."""
        logger.error("%s: %s", self._name, exc)
        if subject in self._subjects:
            self._denied[subject] = str(exc)

    async def _run(self) -> None:
        """Connect, wait for the end of the session, and connect again."""
        loop, delays = asyncio.get_running_loop(), iter(_RECONNECT)
        try:
            while True:
                self._lost = loop.create_future()
                self.session += 1
                begun = math.inf
                try:
                    await self._open()
                    self._begin()
                    begun = loop.time()
                    await self._listen_for_beats()
                except (Exception, asyncio.CancelledError) as exc:  # any library has failed
                    if cast("asyncio.Task[None]", asyncio.current_task()).cancelling():
                        raise
                    self._end(exc)
                await self._close()
                if loop.time() - begun > _RECONNECT[-1]:  # a broker may let us in, then drop us
                    delays = iter(_RECONNECT)
                await self._pause(random.uniform(0.5, 1.0) * next(delays, _RECONNECT[-1]))
        finally:
            self._end(None)
            await self._close()

    async def _open(self) -> None:
        """Connect, and subscribe to all subjects."""
        receive = functools.partial(self._receive, self.session)
        lose = functools.partial(resolve, self._lost)
        async with asyncio.timeout(_CONNECT):
            await self._backplane.start(receive, lose)
        await self._subscribe_all(self._essential)
        # Before the others: what comes to them now belongs behind the gaps that `_begin` announces.
        if self._opened is not None:
            async with asyncio.timeout(_CONNECT):
                await self._opened()
        while missing := list(itertools.islice(filter(self._is_pending, self._subjects), 500)):
            await self._subscribe_all(missing)

    async def _subscribe_all(self, subjects: Sequence[str]) -> None:
        """Subscribe to *subjects* at once. Raises the error of one that is essential."""
        async with asyncio.timeout(_RESTORE):
            calls = map(self._backplane.subscribe, subjects)
            results = await asyncio.gather(*calls, return_exceptions=True)
        for subject, result in zip(subjects, results, strict=True):
            if isinstance(result, PachinkoError) and subject not in self._essential:
                self._note_denied(subject, result)
            elif isinstance(result, BaseException):
                raise result
            else:
                self._note_subscribed(subject)

    def _begin(self) -> None:
        """Let everybody go on who has waited for a session."""
        level = logging.WARNING if self._has_missed else logging.INFO
        text = "%s: connected, with %d subscriptions (process %s)"
        logger.log(level, text, self._name, len(self._subscribed), self._process)
        self.is_connected, self._why = True, ""
        self._attempted.set()
        for subject in self._subscribed - self._subjects.keys():  # all members have left meanwhile
            self._start_change(subject)
        if self._has_missed:
            self._has_missed = False
            self._restored(None)

    async def _listen_for_beats(self) -> None:
        """Send signs of life to ourselves. Never returns; raises when the broker is lost."""
        missed = 0
        self._beat = self._make_beat(self.session)
        while missed < _MISSED:
            self._has_heard = False
            task = asyncio.ensure_future(self._backplane.publish(self._essential[0], self._beat))
            task.add_done_callback(look_at_result)  # a beat that fails is missed anyway
            try:
                # Beats are counted, not seconds: a loop that was blocked has not read either.
                await asyncio.wait([self._lost], timeout=_BEAT)
                # The loop reads before the next write: a write to a broker that has gone would
                # throw away what that has sent.
                await asyncio.wait([self._lost], timeout=_BEAT / 10)
            finally:
                task.cancel()
            if self._lost.done():
                raise self._lost.result() or ConnectionError("the connection has been closed")
            if self._has_heard:
                missed = 0
            elif not self._is_receiving:  # the beat may wait behind a message in progress
                missed += 1
        raise TimeoutError(f"no sign of life for {_BEAT * _MISSED:g} s, or too much to do here")

    def _end(self, exc: BaseException | None) -> None:
        """Forget the session, and fail the messages in progress. *exc* is None for a stop."""
        why = without_secrets(exc, self._broker) if exc is not None else "disconnected"
        if exc is not None and why != self._why:
            what = "is lost" if self.is_connected else "cannot be reached"
            text = "%s %s: %s; trying again (process %s)"
            bug = exc if self._is_bug(exc) else None
            logger.error(text, self._name, what, why, self._process, exc_info=bug)
        self._why, self._has_missed = why, True
        was_connected, self.is_connected = self.is_connected, False
        if was_connected and exc is not None:
            self.outages += 1
            self._attempted.clear()  # callers wait, since a broker mostly comes back at once
        else:
            self._attempted.set()
        self._subscribed.clear()
        self._denied.clear()
        for task in self._changes.values():
            task.cancel()
        self._changes.clear()
        for patience in self._waits:
            if not patience.expired():
                patience.reschedule(asyncio.get_running_loop().time())

    def reason(self, exc: BaseException) -> str:
        """Return the text of *exc*, without the credentials of the broker."""
        return without_secrets(exc, self._broker)

    def _is_bug(self, exc: BaseException) -> bool:
        """Return whether *exc* is a bug in the program's own backplane. The log gets its trace."""
        return self._broker is None and not isinstance(exc, (OSError, PachinkoError))

    async def _close(self) -> None:
        """Disconnect the backplane, so that it can start again."""
        with contextlib.suppress(Exception):  # the session has ended, whatever the library raises
            async with asyncio.timeout(_CONNECT):
                await self._backplane.stop()


# ── leases ────────────────────────────────────────────────────────────────────────────────────
#
# The broker gives a lease to one process at a time, and forgets it when it is not renewed. Its
# holder goes by its own clock: it stops the worker before the broker may forget the lease, and the
# time between is for the worker's clean-up.

_HOLD = 4.5  # seconds from a renewal to when the holder stops its worker
_RENEW = 1.5  # seconds between two renewals, and for one of them
_TRY = 1.0  # seconds between the attempts of a process that waits
_FAILURES = 3  # in a row, until one is logged: the first may only tell that the broker is lost
_tokens = itertools.count(1)


class Leasing(typing.Protocol):
    """A `Backplane` whose broker has leases."""

    async def lease(self, key: str, token: str, seconds: float) -> bool:
        """Take or renew the lease *key* for *token*, or give it up, as `Lease.request` says.

        Raises `PachinkoError` if the broker cannot have leases, or does not permit this one.
        """
        ...


class Lease:
    """The right to run one worker, which *process* wants by the name *key*."""

    def __init__(self, broker: Leasing, link: Link, key: str, process: str) -> None:
        self._broker, self._link, self._key, self._process = broker, link, key, process
        self._token = self._new_token()
        self._session, self._answered = 0, -math.inf  # the broker's latest answer: session and time
        self._failures = 0  # requests in a row that have failed with a connection
        self._is_lost, self._is_kept = False, False
        self._turn = asyncio.Lock()  # for workers of one name on endpoints without a path

    def _new_token(self) -> str:
        return f"{self._process}.{next(_tokens)}"

    async def request(self, seconds: float, waits: bool = False) -> bool | None:
        """Take or renew the lease, or give it up if *seconds* is 0. Returns whether it is ours.

        With *waits*, it returns None, without asking, while a broker that was lost and found may
        have forgotten a lease whose holder goes on. Raises `TimeoutError`, and what the broker's
        `lease` raises.
        """
        now = pachinko.clock.time
        with pachinko.WaitLimit(now() + _RENEW):
            await self._link.connected()
            session, begun = self._link.session, now()
            if waits and session != self._session and begun < self._answered + LEASE:
                return None
            is_ours = await self._broker.lease(self._key, self._token, seconds)
        self._session, self._answered, self._failures = session, begun, 0
        return is_ours

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run *work* as `Relay.lease` says."""
        async with self._turn:
            self._place = pachinko.place_of(work)
            while not await self._run_once(work):
                pass

    async def _run_once(self, work: Callable[[], Awaitable[None]]) -> bool:
        """Wait for the lease, and run *work*. Returns whether *work* has ended by itself."""

        async def call() -> None:
            try:
                await work()
            except SystemExit as exc:  # In a task of its own it would end the event loop.
                raise RuntimeError(f"sys.exit() in worker {self._place}") from exc

        deadline = await self._acquire()
        logger.info("worker %s runs here now (process %s)", self._place, self._process)
        loop = asyncio.get_running_loop()
        self._task, self._is_lost = loop.create_task(call()), False
        self._set_deadline(deadline)
        self._renewals = loop.create_task(self._renew())
        try:
            await self._task
        except asyncio.CancelledError:
            if not self._is_lost or pachinko.current_task().cancelling():
                raise
        finally:
            self._timer.cancel()
            self._renewals.cancel()
            self._is_kept = not self._link.is_connected  # It is ours again if that is back soon.
            if not self._is_kept:
                await self._try(0)
                self._token = self._new_token()  # A late request must not end the next lease.
        return not self._is_lost

    async def _acquire(self) -> float:
        """Wait for the lease. Returns when to stop if no renewal succeeds, in the loop's time."""
        while True:
            deadline = pachinko.clock.time() + _HOLD
            is_ours = await self._try(LEASE, waits=not self._is_kept)
            if is_ours and pachinko.clock.time() < deadline:
                return deadline
            await pachinko.clock.sleep(_TRY)

    async def _renew(self) -> None:
        """Renew the lease, until it is given up or lost."""
        pause = _RENEW
        while True:
            await pachinko.clock.sleep(pause)
            deadline = pachinko.clock.time() + _HOLD
            is_ours = await self._try(LEASE)
            if is_ours:
                self._timer.cancel()
                self._set_deadline(deadline)
            elif is_ours is not None:
                self._lose("another process has it")
            pause = _RENEW if is_ours else _RENEW / 5

    async def _try(self, seconds: float, waits: bool = False) -> bool | None:
        """Make a `request`, and log if it fails again. Returns None if there is no answer."""
        try:
            return await self.request(seconds, waits)
        except pachinko.BrokerAway:
            return None  # The link has logged it.
        except Exception as exc:  # whatever the library raises
            self._failures += 1
            if self._failures == _FAILURES:
                is_late = type(exc) is TimeoutError
                why = f"no answer within {_RENEW:g} s" if is_late else self._link.reason(exc)
                logger.error("no lease for worker %s: %s; trying again", self._place, why)
            return None

    def _set_deadline(self, deadline: float) -> None:
        # In a process that was paused, the loop calls the timers that are due before it runs the
        # tasks that wake. So the worker is cancelled first.
        why = f"it was not renewed for {_HOLD:g} s"
        self._timer = pachinko.clock.call_at(deadline, self._lose, why)

    def _lose(self, why: str) -> None:
        """Stop the worker, because another process may run it soon."""
        text = "worker %s is stopped here, its lease is lost: %s (process %s)"
        logger.warning(text, self._place, why, self._process)
        self._is_lost = True
        self._task.cancel()
        self._renewals.cancel()
        self._timer.cancel()
        text = "worker %s goes on without its lease: it ignores its cancellation"
        when = pachinko.clock.time() + LEASE - _HOLD
        self._timer = pachinko.clock.call_at(when, logger.error, text, self._place)


# ── peer messages ─────────────────────────────────────────────────────────────────────────────
#
# A peer message is its head, a line of JSON, and after that the frame for the clients. A
# subject, such as "pachinko.g.room%3A1", is the namespace, the letter of a `Kind`, and a name.

_QUESTIONS = {Kind.GROUP: "who", Kind.USER: "whose"}  # older processes know the first one only
_FORMAT = 1  # the number of their format; older processes read no other, and send a gap instead
_BINARY = 2  # the format if the frame is a binary one
_LONGEST_NAME = 120  # characters in a subject, which is part of a line of at most 4 KiB in NATS
Address = tuple[Kind, str]  # the receivers of a subject; a connection has its process as a name


class PeerMessage(msgspec.Struct, omit_defaults=True):
    """The head of a peer message."""

    v: int  # the format
    op: str
    """``send`` or ``close``: to the receivers, or the one in ``to``; ``who``: to the processes
    with members of a group, ``whose``: to those with connections of a user, both answered with
    ``here``; ``call``: to the process of a connection, answered with ``done``; ``beat``: to the
    sender itself, as a sign of life; ``rules``: to all, with those of kept groups. Older processes
    refuse these, and a ``call``."""
    source: str = msgspec.field(name="from")  # the process that sends
    session: int = 0  # the number of the sender's session with the broker
    n: int = 0  # the message's number in its process
    exclude: list[str] = []  # the ids of connections that do not get it
    to: str | None = None  # the only connection that gets it, or is called; or a user, quoted
    code: int = 1000
    reason: str = ""
    ask: int = 0  # the number of the question that this asks or answers
    members: list[tuple[str, str | None]] = []  # ids and users
    more: bool = False  # whether further answers of this process follow


class Carried(msgspec.Struct):
    """The parts of a text frame in a peer message that are checked."""

    type: str
    payload: msgspec.Raw | UnsetType = UNSET
    group: str | None = None


_CROSSING: dict[str, type[Exception]] = {
    each.__name__: each for each in (AnswerError, MessageError, NoAnswer, PachinkoError)
}


class Call(msgspec.Struct, array_like=True):
    """The frame of a ``call``: one of `pachinko.CALLS`, and its arguments."""

    method: Literal["join", "leave", "ask", "stream"]
    name: bytes  # the group, or the type of the question; JSON could not carry any text
    frame: msgspec.Raw = msgspec.Raw()  # the question, for clients; or what stream is wanted
    seconds: Annotated[float, msgspec.Meta(ge=0)] = 10.0  # to wait for its answer, or for items


class Done(msgspec.Struct, omit_defaults=True):
    """The frame of a ``done``: what a call has returned, or which error it has raised."""

    result: Any = None
    error: str | None = None  # one of `_CROSSING`
    message: str = ""
    code: str = ""
    details: dict[str, Any] = {}

    def outcome(self) -> Any:
        """Return or raise what the call has returned or raised."""
        if self.error is None:
            return self.result
        if self.error == "MessageError":
            raise MessageError(self.code, self.message, **self.details)
        if self.error == "AnswerError":
            raise AnswerError(self.code, self.message, self.details)
        raise _CROSSING[self.error](self.message)


class Refused(Exception):
    """The message is no peer message that we know. *format* is its format, if that is another."""

    def __init__(self, why: str, format: int | None = None) -> None:
        super().__init__(why)
        self.format = format


class Late(Refused):
    """A valid message from a session that its sender has since lost.

    The sender was told that the send failed. Delivered now, it could overtake newer messages.
    """


_decode_head = msgspec.json.Decoder(PeerMessage).decode
_decode_carried = msgspec.json.Decoder(Carried).decode
_decode_call = msgspec.json.Decoder(Call).decode
_decode_done = msgspec.json.Decoder(Done).decode


def quoted(name: str) -> str:
    """Return *name*, any text, in ASCII. JSON could not have half of a surrogate pair."""
    return urllib.parse.quote(name, safe="", errors="surrogatepass").replace(".", "%2E")


def subject_of(namespace: str, kind: str, name: str) -> str:
    """Return the subject for *name*, any text. The subject has no wildcards of a broker."""
    token = quoted(name)
    if not 0 < len(token) <= _LONGEST_NAME:
        # No quoted name has an equals sign, so no digest is the token of another name.
        digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=20)
        token = f"={digest.hexdigest()}"
    return f"{namespace}.{kind}.{token}"


def pack(message: PeerMessage, frame: bytes = b"") -> bytes:
    """Return the bytes of *message*, with the *frame* that it carries."""
    return b"%b\n%b" % (encode(message), frame)


def unpack(data: bytes) -> tuple[PeerMessage, bytes]:
    """Return the peer message and the frame in *data*. Raises `Refused`."""
    head, _, frame = data.partition(b"\n")
    why = "only what is sent to clients is binary"
    try:
        message = _decode_head(head)
        if message.v == _FORMAT:
            return message, frame
        if message.v == _BINARY and message.op == "send":
            return message, Binary(frame)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as exc:
        why = str(exc)
    with contextlib.suppress(msgspec.MsgspecError, UnicodeError, RecursionError):
        version = msgspec.json.decode(head, type=dict[str, Any]).get("v")
        if type(version) is int and version not in (_FORMAT, _BINARY):
            raise Refused(f"it has format {version}, not {_FORMAT} or {_BINARY}", version)
    raise Refused(f"not a message of ours: {why}")


def check_carried(frame: bytes, group: str | None) -> None:
    """Raise `Refused` for a *frame* that no client should get as a message of *group*."""
    if type(frame) is Binary:
        return  # Any bytes are right, and those of a group look like all others.
    try:
        carried = _decode_carried(frame)
        frame.decode()
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as exc:
        raise Refused(f"not a message for clients: {exc}") from None
    if carried.group != (group and pachinko.whole(group)):
        raise Refused("a message for clients that names another group")


def pack_call(method: str, name: str, *rest: object) -> bytes:
    """Return the frame of a call of *method* with the arguments *name* and *rest*."""
    return encode([method, name.encode(errors="surrogatepass"), *rest])


def read_call(frame: bytes) -> tuple[Any, ...]:
    """Return the method in *frame*, and its arguments. Raises `Refused`."""
    try:
        call = _decode_call(frame)
        name = call.name.decode(errors="surrogatepass")
        if call.method == "stream":
            pachinko.read_wanted(call.frame)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as exc:
        raise Refused(f"not a call of ours: {exc}") from None
    if call.method in ("join", "leave"):
        return call.method, name
    if call.method == "ask":
        check_carried(bytes(call.frame), None)
        if not call.seconds:
            raise Refused("a question that nobody can answer in time")
    return call.method, name, call.frame, call.seconds


def read_done(frame: bytes) -> Done:
    """Return what *frame* says of the end of a call. Raises `Refused`."""
    try:
        done = _decode_done(frame)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as exc:
        raise Refused(f"not the end of a call: {exc}") from None
    is_twice = not done.details.keys().isdisjoint(("self", "code", "message"))
    if done.error not in (None, *_CROSSING) or (done.error == "MessageError" and is_twice):
        raise Refused("not an error that crosses")
    return done


def done_with(exc: Exception, process: str) -> Done:
    """Return what to answer to a call that has raised *exc* in *process*. A bug is logged."""
    kind = next((name for name, cls in _CROSSING.items() if isinstance(exc, cls)), None)
    if isinstance(exc, (AnswerError, MessageError)):
        return Done(None, kind, exc.message, exc.code, exc.details)
    if kind is None:
        logger.error("a call from another process failed", exc_info=exc)
        text = f"it has failed in the process {process}, whose log has the reason"
        return Done(None, "PachinkoError", text)
    return Done(None, kind, str(exc))


# ── rules ─────────────────────────────────────────────────────────────────────────────────────
#
# The processes of a namespace keep groups by the rules of the one that came first. The broker has
# them, so that all who send number and store.

_RULES = 60.0  # seconds after the last process that has them until others may replace the rules


def write_rules(rules: Mapping[str, Window]) -> bytes:
    """Return *rules* as all processes write them, so that equal ones are equal bytes."""
    return encode({
        prefix: (rule.messages, float(rule.seconds), rule.bytes)
        for prefix, rule in sorted(rules.items())
    })  # fmt: skip


def read_rules(data: bytes) -> Mapping[str, Window]:
    """Return the rules in *data*, none in an empty one. Raises `PachinkoError`."""
    try:
        return {key: Window(*rule) for key, rule in decode_rules(data or b"{}").items()}
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as exc:
        raise PachinkoError(
            f"the broker keeps groups by rules of another version of Pachinko ({exc}): update this "
            "process, or give it a namespace of its own: hub.configure(namespace=...)"
        ) from None


class Agreement:
    """What a process and its broker have agreed upon."""

    def __init__(
        self, store: Store | None, key: str, own: Mapping[str, Window],
        use: Callable[[Mapping[str, Window]], None], tell: Callable[[bytes], None],
    ) -> None:  # fmt: skip
        """*use* gets the broker's rules when they change. *tell* lets the others know of them."""
        self._store, self._key, self._use, self._tell = store, key, use, tell
        self._own = write_rules(own) if own else b""
        self._refusal = ""  # why nothing can be kept
        self.rules: bytes = b""  # what the broker has

    def check(self) -> None:
        """Raise `PachinkoError` if this process wants to keep groups, and cannot."""
        if self._own and self._refusal:
            raise PachinkoError(self._refusal)

    async def make(self) -> None:
        """Learn the rules that the broker has; give it those of this process if it has none."""
        if self._store is None:
            return
        try:
            rules = await self._store.agree(self._key, self._own, _RULES)
            windows = read_rules(rules)
        except PachinkoError as exc:
            if self._own and str(exc) != self._refusal:
                logger.error("%s", exc)
            self._refusal = str(exc)
            return
        self._refusal = ""
        if rules and rules != self.rules:
            self.rules = rules
            self._use(windows)
            if self._own and rules != self._own:
                text = "the broker keeps groups by other rules, %s, which count, and not these: %s"
                logger.error(text, rules.decode(), self._own.decode())
        if self._own and rules == self._own:  # Who has found none has to learn of them.
            self._tell(rules)

    async def make_again(self, link: Link) -> None:
        """Do what `make` does, unless the broker is away: then it is done when it is back."""
        if link.is_connected:
            try:
                await self.make()
            except Exception as exc:  # whatever the library raises
                logger.warning("rules were not renewed: %s", link.reason(exc))

    async def keep(self, link: Link) -> None:
        """Renew the rules of this process, or see when others have ended. Never returns."""
        while True:
            await pachinko.clock.sleep(_RULES / 3)
            await self.make_again(link)


# ── archive ───────────────────────────────────────────────────────────────────────────────────
#
# The archive has the rings of the kept groups with members in this process. The feed fills them,
# which comes anyway. The broker is asked for what is before that, and for what was missed.

_READS = 32  # groups whose past is read at a time
_AGAIN = 1.0  # seconds before a read that has failed is tried again
_BEGUN_A_TURN = 256  # members that begin in one turn of the loop, when they have waited
_LEFT = 1_000  # members that may have left a group while they waited, beside as many as have not


class Arrived(NamedTuple):
    """A kept message that has come by the feed, or was read."""

    stamp: Stamp
    frame: bytes
    excluded: Sequence[str]
    age: float = 0.0  # seconds


class BrokerRings(Rings):
    """The rings of a process. A group has numbers, and an epoch, once one of the broker's is known.

    A group whose broker has begun anew keeps its old epoch until something tells so.
    """

    def __init__(self, rules: Mapping[str, Window], limit: int) -> None:
        super().__init__(rules, limit)
        self.tops: dict[str, Position] = {}  # All messages up to here have come.
        # Where those began to listen who joined before the top was known.
        self._starts: dict[str, Position] = {}
        self._whole: set[str] = set()  # groups whose ring has all that the broker has

    def is_ready(self, group: str, position: Position | None) -> bool:
        top = self.tops.get(group)
        if top is None or position is None or position == NOWHERE:
            return top is not None
        is_past = position.epoch == top.epoch and position.number <= top.number
        floor = self._rings[group].floor
        return is_past and (position.number >= floor or group in self._whole)

    def epoch_of(self, group: str) -> str:
        return self.tops[group].epoch

    def top_of(self, group: str) -> Position:
        return self.tops.get(group, NOWHERE)

    def start_of(self, group: str) -> Position:
        return self._starts[group]

    def begin(self, group: str, window: Window, top: Position, is_lost: bool) -> None:
        """Begin the ring of *group* anew, behind *top*; what was before *is_lost*, or is not."""
        self.close(group)
        self.tops[group] = top
        self.open(group, window, top.number)
        self._starts.setdefault(group, NOWHERE if is_lost else top)

    def take(self, group: str, message: Arrived) -> Kept:
        """Keep the next message to *group*."""
        self.tops[group] = Position(message.stamp.epoch, message.stamp.number)
        return self._put(group, message)

    def _put(self, group: str, message: Arrived) -> Kept:
        when = pachinko.clock.time() - message.age
        return self.put(group, message.frame, message.stamp.number, when, message.excluded)

    def fill(self, group: str, floor: int, older: Iterable[Arrived], is_whole: bool) -> None:
        """Put *older* messages, all behind the number *floor*, before those in the ring.

        The ring *is_whole* if the broker has no others.
        """
        ring = self._rings[group]
        self._open_again(ring, ring.window, min(floor, ring.floor), older)
        if is_whole:
            self._whole.add(group)

    def _open_again(
        self, ring: pachinko.Ring, window: Window, floor: int, older: Iterable[Arrived] = ()
    ) -> None:
        super().close(ring.group)
        self.open(ring.group, window, floor, ring.limited)
        for message in older:
            if message.stamp.number <= ring.floor:
                self._put(ring.group, message)
        for kept in ring.messages:
            self.append(ring.group, kept)

    def use(self, rules: Mapping[str, Window]) -> None:
        """Keep groups by *rules* from now on."""
        self.rules = rules

    def resize(self, group: str, window: Window) -> None:
        """Let *group* have another window, as the rules have changed."""
        if (ring := self._rings.get(group)) is not None:
            self._open_again(ring, window, ring.floor)
            self._whole.discard(group)

    def _end(self, ring: pachinko.Ring) -> None:
        """Keep the ring, although it is empty, while the group has a member."""

    def close(self, group: str) -> None:
        super().close(group)
        self.tops.pop(group, None)
        self._whole.discard(group)

    def forget(self, group: str) -> None:
        """Forget *group*, as its last member has left."""
        self.close(group)
        self._starts.pop(group, None)


class Feed:
    """What comes to one kept group with members in this process."""

    def __init__(self, archive: Archive, group: str, window: Window) -> None:
        self._archive, self._rings, self._group = archive, archive.rings, group
        self._window = window
        # Members that wait for a read, with the number of reads that were begun before they came.
        self._waiting = collections.deque[tuple[int, pachinko.Cursor, Position | None]]()
        self._reads = 0
        self._most = _LEFT  # members that may wait until those are forgotten that have left
        self._is_reading = False
        self._is_due = False  # The past is to be read, once more.
        self._is_quiet = False  # It is to be read although nobody has missed anything.
        self._checked = NOWHERE  # the top when that was last considered
        # Something is missing between the top and what comes. What comes now is in the next past.
        self._is_behind = False
        # What has come since a read began that is behind.
        self._held: collections.deque[Arrived] | None = None
        self._lost: Reason | None = None  # why members have missed something for good
        self._is_over = False  # The last member has left.

    def end(self) -> None:
        """Forget the group, as its last member has left."""
        self._is_over = True
        self._rings.forget(self._group)

    def resize(self, window: Window) -> None:
        """Keep another window, as the rules have changed."""
        self._window = window
        self._rings.resize(self._group, window)

    def wait(self, cursor: pachinko.Cursor, position: Position | None) -> None:
        """Let *cursor* begin at *position* when the past was read."""
        if len(self._waiting) > self._most:  # Clients may come and go while the broker is away.
            is_current = self._archive.history.is_current
            self._waiting = collections.deque(each for each in self._waiting if is_current(each[1]))
            self._most = 2 * len(self._waiting) + _LEFT
        self._waiting.append((self._reads, cursor, position))
        self.read()

    def restore(self) -> None:
        """Read what members have missed while the broker was away."""
        self._is_behind, self._held = True, None
        if self._group not in self._rings.tops:  # Nobody knows where its members have been.
            self._lost = "broker"
        self.read()

    def check(self) -> None:
        """Ask how far the broker is, if nothing has come for long: it forgets that of the group."""
        top, self._checked = self._checked, self._rings.top_of(self._group)
        self._is_quiet = top == self._checked
        if self._is_quiet:
            self.read()

    async def take(self, message: Arrived) -> None:
        """Take a message that has come; deliver it now, or behind what is missing before it."""
        if self._held is not None:
            self._held.append(message)
        elif not self._is_behind:
            await self._take(message, is_read=False)

    async def _take(self, message: Arrived, is_read: bool) -> None:
        """Deliver the next message. The past before it *is_read* already, or is not."""
        if self._is_over:
            return
        stamp, top = message.stamp, self._rings.top_of(self._group)
        if stamp.epoch != top.epoch:
            self._begin(Position(stamp.epoch, stamp.previous), "epoch")
        elif stamp.previous > top.number:
            if not is_read:
                self._is_behind = True
                self.read()
                return
            self._begin(Position(stamp.epoch, stamp.previous), "broker")
        elif stamp.number <= top.number:
            return
        await self._archive.deliver(
            self._group, self._rings.take(self._group, message), message.excluded
        )

    def _begin(self, top: Position, reason: Reason) -> None:
        """Begin the ring anew behind *top*. What was known before ends for that *reason*."""
        is_known = self._group in self._rings.tops
        lost, self._lost = (reason if is_known else self._lost), None
        self._rings.begin(self._group, self._window, top, lost is not None)
        if lost is not None:
            self._archive.history.lose(self._group, lost)

    def read(self) -> None:
        """Begin to read what the ring lacks."""
        self._is_due = True
        if not self._is_reading:
            self._is_reading = True
            self._archive.start_work(self._keep_reading())

    async def _keep_reading(self) -> None:
        try:
            while self._is_due and not self._is_over:
                self._is_due = False
                async with self._archive.turns:
                    await self._read()
                self._archive.note(self._group)
        except Exception as exc:  # whatever the library raises
            self._archive.note(self._group, exc)
            pachinko.clock.call_at(pachinko.clock.time() + _AGAIN, self._read_again)
        finally:
            self._is_reading, self._held = False, None

    def _read_again(self) -> None:
        if not self._is_over and self._archive.link.is_connected:  # `restore` comes otherwise.
            self.read()

    async def _read(self) -> None:
        """Read the past, deliver what was missed, and let those go on who wait."""
        rings, subject = self._rings, self._archive.subject(self._group)
        await self._archive.link.subscribed(subject)  # What comes after the past is in the feed.
        before = rings.top_of(self._group)
        self._reads += 1
        is_whole = self._is_behind or self._is_quiet or any(at for _, _, at in self._waiting)
        self._held = collections.deque() if self._is_behind else None
        after = None if self._is_quiet else self._needed_after(before)
        with pachinko.WaitLimit(pachinko.clock.time() + _BROKER_WAIT):
            past = await self._archive.store.past(subject, self._window.messages * is_whole, after)
            await self._archive.sync()
        epoch, held = rings.top_of(self._group).epoch, self._held or ()
        has_missed = self._is_behind and self._held is None  # what came during the read
        has_other = any(each.stamp.epoch != past.epoch for each in held)  # of another life
        if has_missed or has_other or epoch not in (past.epoch, before.epoch):
            self._is_due = True  # What was read is out of date.
        elif not self._is_over:
            if epoch != past.epoch:
                self._begin(Position(past.epoch, past.top), "epoch")
            if is_whole:
                await self._use(past, after)
            if after is not None and self._is_ahead(rings.top_of(self._group)):
                self._is_due = True
            else:
                await self._let_begin()

    def _is_ahead(self, top: Position) -> bool:
        """Tell whether a member that waits knows of more than *top*, which a full read shows."""
        known = (at for _, _, at in self._waiting if at is not None)
        return any(at.epoch == top.epoch and at.number > top.number for at in known)

    def _needed_after(self, top: Position) -> Position | None:
        """Return what a read has to go back to, if the group is at *top*; None for all of it.

        A store that has all groups in one file reads the end of it much faster. Twice as far as
        members are behind is enough for most of those that come later.
        """
        known = [at for _, _, at in [*self._waiting, (0, None, top)] if at and at != NOWHERE]
        if len({at.epoch for at in known}) != 1 or self._is_ahead(top):
            return None
        oldest = min(at.number for at in known)
        behind = max(0, top.number - oldest)
        return Position(known[0].epoch, max(0, oldest - behind))

    async def _use(self, past: Past, after: Position | None) -> None:
        """Fill the ring, and deliver what was missed, and what came meanwhile."""
        group, rings, last = self._group, self._rings, Position(past.epoch, past.top)
        floor, found = read_past(group, past)
        found = [each for each in found if each.stamp.number > floor]
        if floor > rings.top_of(group).number:
            self._begin(last, "broker")
        is_part = after is not None and after.epoch == past.epoch and floor <= after.number
        rings.fill(group, floor, found, is_whole=not is_part)
        self._held = held = self._held or collections.deque()
        for message in found:
            await self._take(message, is_read=True)
        if not self._is_over and rings.top_of(group).number < past.top:
            rings.tops[group] = last
        while held and self._held is held:
            await self._take(held.popleft(), is_read=True)
        self._is_behind, self._is_quiet, self._held = self._is_due, False, None

    async def _let_begin(self) -> None:
        """Let those begin who have waited since before the read, some in each turn of the loop."""
        begun = 0
        while self._waiting and self._waiting[0][0] < self._reads:
            _, cursor, position = self._waiting.popleft()
            if self._archive.history.is_current(cursor):
                cursor.begin(position)
            begun += 1
            if begun % _BEGUN_A_TURN == 0:
                await asyncio.sleep(0)


class Archive:
    """The kept groups of an app with a broker, as one process sees them."""

    def __init__(
        self, store: Store, link: Link, history: History, registry: Registry,
        subject: Callable[[str], str], sync: Callable[[], Awaitable[object]],
        start_work: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:  # fmt: skip
        """*sync* returns when what the broker has sent to this process until now has come."""
        self.store: Store = store
        self.link: Link = link
        self.history: History = history
        self.subject: Callable[[str], str] = subject
        self.sync: Callable[[], Awaitable[object]] = sync
        self.start_work: Callable[[Coroutine[Any, Any, None]], None] = start_work
        self.rings: BrokerRings = cast(BrokerRings, history.rings)
        self.turns: asyncio.Semaphore = asyncio.Semaphore(_READS)
        self._registry = registry
        self._feeds: dict[str, Feed] = {}
        self._is_failing = False  # The log says so.
        history.start(registry, lambda cursor, at: self._feeds[cursor.group].wait(cursor, at))
        self.use(self.rings.rules)
        start_work(self._check())

    async def _check(self) -> None:
        """Ask now and then about groups that are quiet. Never returns."""
        while True:
            await pachinko.clock.sleep(_FORGET / 4)
            for feed in tuple(self._feeds.values()):
                feed.check()

    def use(self, rules: Mapping[str, Window]) -> None:
        """Keep groups by *rules* from now on. One that is no longer kept has a ring to its end."""
        self.rings.use(rules)
        for group in self._registry.groups:
            window = self.rings.window_of(group)
            if group not in self._feeds:
                self.add(group)
            elif window is not None:
                self._feeds[group].resize(window)

    def add(self, group: str) -> None:
        """Note the first member of *group*."""
        if (window := self.rings.window_of(group)) is not None:
            self._feeds[group] = feed = Feed(self, group, window)
            feed.read()

    def remove(self, group: str) -> None:
        """Note that the last member of *group* has left."""
        if group in self._feeds:
            self._feeds.pop(group).end()

    def keeps(self, group: str) -> bool:
        """Return whether *group* is kept, and has members here."""
        return group in self._feeds

    def restore(self, group: str) -> bool:
        """Read what members of *group* have missed; return whether it is kept."""
        if self.keeps(group):
            self._feeds[group].restore()
        return self.keeps(group)

    async def take(self, group: str, message: Arrived) -> None:
        """Take a message that has come to *group*."""
        if group in self._feeds:
            await self._feeds[group].take(message)
        else:
            await self.deliver(group, framed(message), message.excluded)

    async def deliver(
        self, group: str, frame: bytes | pachinko.Waiting, excluded: Collection[str]
    ) -> None:
        """Deliver a message to the live members of *group*."""
        await self._registry.deliver(Kind.GROUP, group, frame, excluded)

    def note(self, group: str, exc: Exception | None = None) -> None:
        """Note that a read has failed, or has not. The first failure in a row is logged."""
        if exc is None:
            self._is_failing = False
        elif self.link.is_connected and not self._is_failing:
            self._is_failing = True
            text = "%r was not read: %s; trying again"
            logger.warning(text, group, self.link.reason(exc))

    async def past(self, group: str, count: int) -> tuple[Position, Sequence[str]]:
        """Do what `Relay.past` says."""
        if (window := self.rings.window_of(group)) is None:
            raise pachinko.not_kept(group)
        try:
            async with asyncio.timeout(_BROKER_WAIT):
                await self.link.connected()
                past = await self.store.past(self.subject(group), min(count, window.messages))
        except PachinkoError:
            raise
        except Exception as exc:  # whatever the library raises
            text = f"the history of {group!r} was not read: {self.link.reason(exc)}"
            raise pachinko.BrokerAway(text) from None
        _, found = read_past(group, past)
        texts = [framed(each).decode() for each in found if each.age < window.seconds]
        return Position(past.epoch, past.top), texts[-count:] if count else []


def read_past(group: str, past: Past) -> tuple[int, list[Arrived]]:
    """Return the floor of *past*, and those messages in it that are ours.

    The floor is not below a message of another format, which is missing here.
    """
    floor, found = past.floor, list[Arrived]()
    for number, age, data in past.entries:
        try:
            message, frame = unpack(data)
            check_carried(frame, group)
        except Refused as why:
            floor = number if why.format is not None else floor
        else:
            found.append(Arrived(Stamp(past.epoch, number, 0), frame, message.exclude, age))
    return floor, found


def framed(message: Arrived) -> bytes:
    """Return the frame of *message* with its position."""
    at = Position(message.stamp.epoch, message.stamp.number)
    return pachinko.with_position(message.frame, at)


# ── cluster relay ─────────────────────────────────────────────────────────────────────────────
#
# The relay sends peer messages by the link, and takes those of other processes: messages to
# clients, who is in a group, and gaps for members that have missed something.

_PRESENCE = 0.4  # seconds for the other processes to say who is there
_ANSWER_BYTES = 200_000  # bytes of members in one part of an answer
_MAX_SUSPECTS = 100  # kinds of refused messages that are logged, once each
_MAX_PROCESSES = 10_000  # processes whose sessions are remembered
_GAPS_A_TURN = 256  # groups that get their gap in one turn of the loop
_CONNECTION_ID = re.compile(r"[0-9a-f]{24}")  # `Hub.process`, and 12 more digits
_questions = itertools.count(1)


class Cluster(pachinko.Relay):
    """The `Relay` of an app with a broker."""

    history: History | None
    has_others: bool = True

    def __init__(
        self, given: str | Backplane, namespace: str | None,
        rules: Mapping[str, Window] = {}, history_bytes: int = 0,
    ) -> None:  # fmt: skip
        """Take what `Hub.configure` was given. Raises `PachinkoError` and `TypeError`."""
        self._broker: Broker | None = None
        if isinstance(given, str):
            self._broker = read_broker(given)
            namespace = self._broker.namespace if namespace is None else namespace
            pachinko.check_namespace(namespace)
            given = backplane_of(self._broker)
        methods = ("start", "publish", "subscribe", "unsubscribe", "stop")
        found = (getattr(given, name, None) for name in methods)
        if rules and not all(hasattr(given, name) for name in ("keep", "past", "agree")):
            raise PachinkoError(
                f"groups cannot be kept by {type(given).__name__}: use nats:// with JetStream, "
                "redis:// or memory://, or leave out hub.keep()"
            )
        if inspect.isclass(given) or not all(map(inspect.iscoroutinefunction, found)):
            raise TypeError(
                'write hub.configure("nats://localhost:4222"), SyncHub("nats://localhost:4222"), '
                f"or give an object with `async def` {', '.join(methods)}; got "
                f"{type(given).__name__}"
            )
        self._backplane: Backplane = given
        self._namespace = "pachinko" if namespace is None else namespace
        self._own_rules, self._history_bytes = rules, history_bytes
        self._agreement = Agreement(
            cast(Store, given) if hasattr(given, "agree") else None,
            subject_of(self._namespace, "history", "rules"), rules, self._use, self._tell_rules,
        )  # fmt: skip
        self._archive: Archive | None = None
        self.history = None
        self._addresses: dict[str, Address] = {}  # the address of each subject
        self._sent = 0
        self._sessions: dict[str, int] = {}  # the latest of each process that has sent a message
        self._refused = 0
        self._suspects: set[object] = set()  # the kinds of messages that have been logged
        self._work: set[asyncio.Task[None]] = set()  # sends that no caller waits for
        # Answers, by their op and the number of the question.
        self._asks: dict[tuple[str, int], asyncio.Queue[Any]] = {}
        self._gaps: dict[str, dict[pachinko.Member, pachinko.Receiver]] = {}  # to get one
        self._leases: dict[str, Lease] = {}  # a key is the name of a worker
        self._unread: dict[Address, frozenset[str]] = {}  # ids that got a gap for unread messages

    def start(self, registry: Registry, process: str) -> None:
        self.process: str = process
        self._registry = registry
        own = (Kind.CONNECTION, process), (Kind.EVERYBODY, "all")
        self._link = Link(
            self._backplane, self._broker, self.receive, self.restored,
            [self._add_address(*address) for address in own],
            functools.partial(self._pack, op="beat"), process, self._agreement.make,
        )  # fmt: skip
        if self._own_rules:
            self._use(self._own_rules)
            self._start_work(self._agreement.keep(self._link))

    def _add_address(self, kind: Kind, name: str) -> str:
        subject = subject_of(self._namespace, kind, name)
        self._addresses[subject] = kind, name
        return subject

    async def connected(self) -> None:
        await self._link.connected()

    async def stop(self) -> None:
        for task in tuple(self._work):
            task.cancel()
        await self._link.stop()

    async def past(self, group: str, count: int) -> tuple[Position, Sequence[str]]:
        if self._archive is None:
            raise pachinko.not_kept(group)
        return await self._archive.past(group, count)

    async def check_history(self) -> None:
        self._agreement.check()

    def _tell_rules(self, rules: bytes) -> None:
        async def tell() -> None:
            with contextlib.suppress(PachinkoError):  # Others ask when they connect.
                await self._publish(Kind.EVERYBODY, "all", "rules", frame=rules)

        self._start_work(tell())

    def _use(self, rules: Mapping[str, Window]) -> None:
        """Keep groups by *rules* from now on."""
        if self._archive is not None:
            self._archive.use(rules)
            return
        self.history = History(BrokerRings(rules, self._history_bytes))
        self._archive = Archive(
            cast(Store, self._backplane), self._link, self.history, self._registry,
            functools.partial(subject_of, self._namespace, Kind.GROUP),
            functools.partial(self._publish, Kind.CONNECTION, self.process, "beat"),
            self._start_work,
        )  # fmt: skip

    def subscribe(self, kind: Kind, name: str) -> None:
        self._link.subscribe(self._add_address(kind, name))
        if kind is Kind.GROUP and self._archive is not None:
            self._archive.add(name)

    def unsubscribe(self, kind: Kind, name: str) -> None:
        if kind is Kind.GROUP and self._archive is not None:
            self._archive.remove(name)
        subject = subject_of(self._namespace, kind, name)
        self._unread.pop((kind, name), None)
        self._addresses.pop(subject, None)
        self._link.unsubscribe(subject)

    async def subscribed(self, kind: Kind, name: str) -> None:
        await self._link.subscribed(subject_of(self._namespace, kind, name))

    async def check_leases(self) -> None:
        try:
            lease = self._new_lease(self.process)
            await lease.request(LEASE)
            await lease.request(0)
        except pachinko.BrokerAway:
            pass
        except PachinkoError:
            raise
        except Exception as exc:  # whatever the library raises
            logger.warning("leases were not checked: %s", self._link.reason(exc))

    async def lease(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        if name not in self._leases:
            self._leases[name] = self._new_lease(name)
        await self._leases[name].run(work)

    def _new_lease(self, name: str) -> Lease:
        """Return the lease for the worker *name*. Raises `PachinkoError` if there are no leases."""
        if not inspect.iscoroutinefunction(getattr(self._backplane, "lease", None)):
            raise PachinkoError(
                f"a worker with once=True needs leases, and {type(self._backplane).__name__} has "
                "none: use nats:// (with JetStream) or redis://, or write @ws.worker, which runs "
                "in each process"
            )
        key = subject_of(self._namespace, "lease", name)
        return Lease(cast(Leasing, self._backplane), self._link, key, self.process)

    def stats(self) -> dict[str, int]:
        down = int(not self._link.is_connected)
        return {"refused": self._refused, "outages": self._link.outages, "broker_down": down}

    def _pack(self, session: int, op: str, frame: bytes = b"", **fields: Any) -> bytes:
        self._sent += 1
        format = _BINARY if type(frame) is Binary else _FORMAT
        return pack(PeerMessage(format, op, self.process, session, self._sent, **fields), frame)

    async def _publish(
        self, kind: Kind, name: str, op: str, window: Window | None = None, **fields: Any
    ) -> int | None:
        subject = subject_of(self._namespace, kind, name)
        pack = functools.partial(self._pack, op=op, **fields)
        return await self._link.publish(subject, pack, window)

    def _process_of(self, id: str) -> str:
        """Return the process of the connection *id*; this one for what is no id."""
        return id[: len(self.process)] if _CONNECTION_ID.fullmatch(id) else self.process

    async def send(self, kind: Kind, name: str, data: bytes, excluded: list[str]) -> None:
        to = window = None
        if kind is Kind.CONNECTION:
            name, to = self._process_of(name), name
            if name == self.process:
                return await self._registry.deliver(kind, to, data, excluded)
        if kind is Kind.GROUP and self.history is not None:
            window = self.history.rings.window_of(name)
        await self._publish(kind, name, "send", window, frame=data, exclude=excluded, to=to)

    async def close(self, kind: Kind, name: str, close: pachinko.Close) -> None:
        to = None
        if kind is Kind.CONNECTION:
            name, to = self._process_of(name), name
            if name == self.process:
                return await self._registry.close(kind, to, close)
        elif kind is Kind.USER:  # A process may have nothing but a handshake of that user.
            kind, name, to = Kind.EVERYBODY, "all", quoted(name)
        await self._publish(kind, name, "close", to=to, code=close.code, reason=close.reason)

    async def ask(self, kind: Kind, name: str) -> list[pachinko.Presence]:
        found: dict[str, pachinko.Presence] = {}
        unfinished: dict[str, bool] = {}  # whether more of a process's answer follows
        with self._question("here") as (number, answers):
            reached = await self._publish(kind, name, _QUESTIONS[kind], ask=number)
            loop = asyncio.get_running_loop()
            end, latest = (loop.time() + seconds for seconds in (_PRESENCE, _BROKER_WAIT))
            with contextlib.suppress(TimeoutError):
                while reached is None or any(unfinished.values()) or len(unfinished) < reached:
                    async with asyncio.timeout_at(latest if any(unfinished.values()) else end):
                        answer = await answers.get()
                    unfinished[answer.source] = answer.more
                    for id, user in answer.members:
                        found[id] = pachinko.Presence(id, user, answer.source)
        return list(found.values())

    @contextlib.contextmanager
    def _question(self, op: str) -> Generator[tuple[int, asyncio.Queue[Any]]]:
        """Give a question a number, and a queue, which its answers of the kind *op* go to."""
        key = op, next(_questions)
        self._asks[key] = asyncio.Queue()
        try:
            yield key[1], self._asks[key]
        finally:
            del self._asks[key]

    async def call(self, id: str, method: str, *args: Any) -> Any:
        process = self._process_of(id)
        if process == self.process:
            return await super().call(id, method, *args)
        seconds, done = (args[-1] if method == "ask" else None), None
        with self._question("done") as (number, answers), contextlib.suppress(TimeoutError):
            fields: dict[str, Any] = {"frame": pack_call(method, *args), "to": id, "ask": number}
            async with asyncio.timeout(seconds) as limit:
                reached = await self._publish(Kind.CONNECTION, process, "call", **fields)
                if seconds is None:
                    limit.reschedule(asyncio.get_running_loop().time() + _BROKER_WAIT)
                done = await answers.get() if reached != 0 else None
        if done is None:
            raise NoAnswer(f"no answer from the connection {id}, or from its process")
        return done.outcome()

    async def _perform(self, call: PeerMessage, *work: Any) -> None:
        """Call what another process has asked for, and tell it what comes of it."""
        try:
            done = Done(await super().call(call.to or "", *work))
        except Exception as exc:  # The other process raises it, or learns of a bug.
            done = done_with(exc, self.process)
        too_large = Done(error="PachinkoError", message="the broker has not taken the answer")
        for each in (done, too_large):
            with contextlib.suppress(PachinkoError):
                fields: dict[str, Any] = {"frame": encode(each), "ask": call.ask}
                await self._publish(Kind.CONNECTION, call.source, "done", **fields)
                return

    async def receive(self, subject: str, data: bytes) -> None:
        """Read a message from the link, and refuse it or do what it says."""
        address = self._addresses[subject]
        stamp, data = read_stamp(data)
        try:
            message, frame = unpack(data)
            if message.op == "beat":
                return
            if message.op == "send":
                check_carried(frame, address[1] if address[0] is Kind.GROUP else None)
            if stamp is not None and message.op == "send":
                self._unread.pop(address, None)
                await self._take_kept(address[1], Arrived(stamp, frame, message.exclude))
                return
            is_ours = message.source == self.process
            latest = self._link.session if is_ours else self._sessions.get(message.source, 0)
            if message.session < latest:
                raise Late("its process has lost the connection that it came by")
            await self._take(*address, message, frame)
            self._sessions[message.source] = message.session
            if len(self._sessions) > _MAX_PROCESSES:
                del self._sessions[next(iter(self._sessions))]
        except Refused as why:
            await self._refuse(address, why)

    async def _take_kept(self, group: str, message: Arrived) -> None:
        """Deliver a message to a kept group. It is in order, even if its sender has given it up."""
        if self._archive is not None:
            await self._archive.take(group, message)
        else:  # The rules are still to be learned.
            await self._registry.deliver(Kind.GROUP, group, framed(message), message.excluded)

    async def _take(self, kind: Kind, name: str, message: PeerMessage, frame: bytes) -> None:
        """Do what *message* says. Raises `Refused`."""
        self._unread.pop((kind, name), None)
        if kind is Kind.GROUP and name in self._gaps:
            await self._announce(name)  # the gap is older than this message
        if message.op == "send":
            receiver = message.to or "" if kind is Kind.CONNECTION else name
            is_kept = kind is Kind.GROUP and self._archive is not None and self._archive.keeps(name)
            if is_kept and self._is_new_suspect("not kept"):
                text = "%s sends to %r, which is kept, without keeping it: may it read the rules?"
                logger.warning(text, message.source, name)
            await self._registry.deliver(kind, receiver, frame, message.exclude)
        elif message.op == "close" and (
            kind is Kind.GROUP or (kind is not Kind.USER and message.to is not None)
        ):
            await self._close(kind, name if kind is Kind.GROUP else cast(str, message.to), message)
        elif message.op == _QUESTIONS.get(kind):
            self._start_work(self._answer(kind, name, message))
        elif message.op == "here" and kind is Kind.CONNECTION:
            self._note_answer(message, message)
        elif message.op == "call" and kind is Kind.CONNECTION:
            self._start_work(self._perform(message, *read_call(frame)))
        elif message.op == "done" and kind is Kind.CONNECTION:
            self._note_answer(message, read_done(frame))
        elif message.op == "rules" and kind is Kind.EVERYBODY:
            if frame != self._agreement.rules:
                self._start_work(self._agreement.make_again(self._link))
        else:
            raise Refused(f"{message.op!r} makes no sense here")

    async def _close(self, kind: Kind, name: str, message: PeerMessage) -> None:
        """Close what *message* names, a group, a connection or a user. Raises `Refused`."""
        try:
            if kind is Kind.EVERYBODY:
                kind, name = Kind.USER, urllib.parse.unquote(name, errors="surrogatepass")
            close = pachinko.Close(message.code, message.reason)
        except ValueError as exc:  # also for a name that is no UTF-8
            raise Refused(str(exc)) from None
        if close.reason != message.reason:  # Our processes send what `Close` has cut.
            raise Refused("a close reason that no close frame can have")
        await self._registry.close(kind, name, close)

    async def _answer(self, kind: Kind, name: str, question: PeerMessage) -> None:
        """Answer who of a group or a user is in this process, in parts of a bounded size."""
        found = self._registry.accepted(kind, name)
        # JSON must not have halves of surrogate pairs: they become question marks.
        users = {c.id: c.user and c.user.encode(errors="replace").decode() for c in found}
        members = list(users.items())
        is_last = False
        while not is_last:
            part: list[tuple[str, str | None]] = []
            size = 0
            while members and size < _ANSWER_BYTES:
                part.append(members.pop())
                size += 50 + len(part[-1][1] or "") * 4
            is_last = not members
            answer: dict[str, Any] = {"ask": question.ask, "members": part, "more": not is_last}
            if question.source == self.process:
                message = PeerMessage(_FORMAT, "here", self.process, **answer)
                self._note_answer(message, message)
            else:
                with contextlib.suppress(PachinkoError):  # the asking process then goes without
                    await self._publish(Kind.CONNECTION, question.source, "here", **answer)

    def _note_answer(self, message: PeerMessage, answer: PeerMessage | Done) -> None:
        if (asked := self._asks.get((message.op, message.ask))) is not None:
            asked.put_nowait(answer)

    def _start_work(self, work: Coroutine[Any, Any, None]) -> None:
        task = create_task(work, is_detached=True)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    def _is_new_suspect(self, kind: object) -> bool:
        """Return whether messages of that *kind* are still to be logged, which is done once."""
        if kind in self._suspects or len(self._suspects) >= _MAX_SUSPECTS:
            return False
        self._suspects.add(kind)
        return True

    async def _refuse(self, address: Address, why: Refused) -> None:
        """Count a message that is refused. The receivers get a gap if it has another format."""
        self._refused += 1
        if self._is_new_suspect((type(why), why.format)):
            logger.warning(
                "refused a message from the broker (more like it are counted, not logged): %s", why
            )
        if why.format is not None and address[0] is not Kind.CONNECTION:
            await self._miss(*address)

    async def _miss(self, kind: Kind, name: str) -> None:
        """Send the receivers a gap, once for several messages in a row that cannot be read."""
        told = self._unread.get((kind, name), frozenset())
        receivers = self._registry.receivers(kind, name)
        self._unread[kind, name] = frozenset(conn.id for conn in receivers)
        gap = gap_of(name if kind is Kind.GROUP else None)
        await self._registry.deliver(kind, name, gap, told)

    def restored(self, subject: str | None) -> None:
        """Begin to send each member a gap for each group. Called by the link after an outage."""
        registry = self._registry
        alone: list[pachinko.Receiver] = []  # connections in no group
        if subject is None:
            self._gaps = {
                group: dict(members) for group, members in registry.groups.items()
                if not self._restore(group)
            }  # fmt: skip
            alone = [  # They get none, or no other: messages to a user or to all may be missing.
                conn.outgoing for conn in registry.connections.values()
                if self._gaps.keys().isdisjoint(registry.groups_of(conn))
            ]  # fmt: skip
        else:
            kind, name = self._addresses[subject]
            receivers = dict(registry.receivers(kind, name))
            if kind is not Kind.GROUP:
                alone = list(receivers.values())
            elif not self._restore(name):
                self._gaps[name] = receivers
        self._start_work(self._announce_all(alone))

    def _restore(self, group: str) -> bool:
        return self._archive is not None and self._archive.restore(group)

    async def _announce_all(self, alone: list[pachinko.Receiver]) -> None:
        await pachinko.Outgoing.fan_out(alone, waiting_for(gap_of(None)))
        announced = 0
        while self._gaps:
            await self._announce(next(iter(self._gaps)))
            announced += 1
            if announced % _GAPS_A_TURN == 0:  # nothing else may let the loop run
                await asyncio.sleep(0)
        if not self._own_rules:  # It may have missed those that another process has.
            await self._agreement.make_again(self._link)

    async def _announce(self, group: str) -> None:
        """Send a gap to those who have been in *group* since the outage."""
        members = self._gaps.pop(group).items()
        groups_of = self._registry.groups_of
        present = [outgoing for conn, outgoing in members if group in groups_of(conn)]
        await pachinko.Outgoing.fan_out(present, waiting_for(gap_of(group), group))


def backplane_of(broker: Broker) -> Backplane:
    """Return a backplane, not yet started. Raises `PachinkoError`."""
    library = "nats-py" if broker.scheme in ("nats", "tls") else "redis"
    try:
        return Nats(broker) if library == "nats-py" else Redis(broker)
    except ImportError:
        raise PachinkoError(
            f"{broker.scheme}:// needs a library that is not installed: "
            f"python3 -m pip install {library}"
        ) from None


# ── sync hub ──────────────────────────────────────────────────────────────────────────────────
#
# The loop of a `SyncHub` has a thread of its own. A fork copies no other thread than the one that
# forks, so a child process starts a thread, and with it a connection, when it first needs one.

_starting = threading.RLock()  # Only one thread at a time starts a `HubThread`.
# A lock that another thread holds would stay locked in the child for ever. Windows has no fork.
_at_fork = getattr(os, "register_at_fork", lambda **_: None)
_at_fork(before=_starting.acquire, after_in_parent=_starting.release)
_at_fork(after_in_child=_starting.release)
# An import that another thread is in at the fork would never end in the child. The event loop needs
# these two when it resolves names.
_IMPORTED = concurrent.futures.ThreadPoolExecutor, "".encode("idna")


class HubThread(threading.Thread):
    """A thread with an event loop, in which *hub* is open until `end` is called."""

    loop: asyncio.AbstractEventLoop | None = None

    def __init__(self, hub: Hub) -> None:
        super().__init__(name="pachinko", daemon=True)
        self.hub: Hub = hub
        self.opened: concurrent.futures.Future[str] = concurrent.futures.Future()
        """Done when the attempt to open the hub has ended: empty, or why it has failed."""
        self._over = concurrent.futures.Future[None]()
        self._process = os.getpid()

    @property
    def is_ours(self) -> bool:
        """Whether it runs in this process. uWSGI forks so that Python does not notice."""
        return self._process == os.getpid() and self.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether the hub could not be opened."""
        return self.opened.done() and bool(self.opened.result())

    def end(self) -> None:
        """Begin to disconnect. Does nothing in another process than that of the thread."""
        if self._process == os.getpid():
            self._over.cancel()

    def run(self) -> None:
        try:
            with asyncio.Runner() as runner:
                runner.run(self._serve())
        except asyncio.CancelledError:
            resolve(self.opened, "the SyncHub was stopped before it was connected")
        except Exception as exc:  # The callers that wait have to learn of it.
            # Without files left there is no event loop. At exit, the loop's own threads, which
            # resolve names, have ended, but asyncio cannot start the thread that waits for that.
            resolve(self.opened, f"the event loop has failed: {exc!r}")

    async def _serve(self) -> None:
        self.loop = loop = asyncio.get_running_loop()
        task = pachinko.current_task()

        def cancel(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # The loop has been closed.
                loop.call_soon_threadsafe(task.cancel)

        self._over.add_done_callback(cancel)
        try:
            async with self.hub.open():
                self.opened.set_result("")
                await loop.create_future()  # The hub reconnects by itself meanwhile.
        except PachinkoError as exc:
            self.opened.set_result(str(exc))


@atexit.register
def stop_threads() -> None:
    """Disconnect at the end of the program. Threads that are killed would leave sockets open."""
    alive = threading.enumerate()
    threads = [each for each in alive if isinstance(each, HubThread) and each.is_ours]
    for thread in threads:
        thread.end()
    for thread in threads:
        thread.join(_BROKER_WAIT)


def is_in_loop() -> bool:
    """Return whether an event loop runs in this thread, which a call would block."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return False
    # All threads of gevent are one of the system's, so each sees the loop of a `HubThread` there.
    threads = [each for each in threading.enumerate() if isinstance(each, HubThread)]
    return threading.current_thread() in threads or all(each.loop is not loop for each in threads)


class SyncHub:
    """The sending half of a `Hub` for code without an event loop: Flask, Django, Celery, a script.

        hub = SyncHub()  # the broker that PACHINKO_BACKPLANE names
        hub.send("room:1", "notice", {"text": "the report is ready"})

    Each method does what that of `Hub` does, and returns when that is done. Any thread may call it;
    all of them share one connection to the broker, which is made at the first call. So is that of a
    process that has been forked. In the thread of a running event loop it is a `PachinkoError`.

    *url*, *namespace* and *converter* are those of `Hub.configure`. Raises `PachinkoError` for a
    mistake in them, and without a broker, since ``memory://`` reaches no other process. The methods
    raise `PachinkoError` within 5 seconds when the broker is away; the next call tries again.
    """

    _thread: HubThread | None = None

    def __init__(
        self, url: str | Backplane | None = None, *,
        namespace: str | None = None, converter: cattrs.Converter | None = None,
    ) -> None:  # fmt: skip
        url = Hub().state.choose(url)
        if url is None or (isinstance(url, str) and url.startswith("memory://")):
            raise PachinkoError(
                'SyncHub() takes the broker that the app uses, SyncHub("nats://localhost:4222"), '
                f"or finds it in {pachinko.ENVIRONMENT}; memory:// reaches no other process"
            )
        self._settings: dict[str, Any] = {
            "url": url, "namespace": namespace, "converter": converter,
        }  # fmt: skip
        self._new_hub()

    def __enter__(self) -> SyncHub:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __del__(self) -> None:
        if self._thread is not None:
            self._thread.end()

    def stop(self) -> None:
        """Disconnect. Calls in progress raise `PachinkoError`; a later one connects again."""
        with _starting:
            thread, self._thread = self._thread, None
        if thread is not None and thread.is_ours:
            thread.end()
            thread.join(_BROKER_WAIT)

    def send(
        self, group: str, message: object, payload: object = None, *,
        exclude: str | Iterable[str] | None = None,
    ) -> None:  # fmt: skip
        """Send a ``@message`` object, or a type and its payload, to the members of *group*.

        *exclude* leaves out the connection with an id, or several of them.
        """
        self._call(Hub.send, group, message, payload, exclude=exclude)

    def broadcast(
        self, message: object, payload: object = None, *,
        exclude: str | Iterable[str] | None = None,
    ) -> None:  # fmt: skip
        """Send to every connection of every process."""
        self._call(Hub.broadcast, message, payload, exclude=exclude)

    def send_to(self, id: str, message: object, payload: object = None) -> None:
        """Send to the connection with that *id*. Does nothing if it has ended."""
        self._call(Hub.send_to, id, message, payload)

    def send_to_user(self, user: str, message: object, payload: object = None) -> None:
        """Send to every connection of *user*."""
        self._call(Hub.send_to_user, user, message, payload)

    def close_group(self, group: str, code: int = 1000, reason: str | None = "") -> None:
        """Close every connection in *group*, behind what was sent to it before."""
        self._call(Hub.close_group, group, code, reason)

    def close(self, id: str, code: int = 1000, reason: str | None = "") -> None:
        """Close the connection with that *id*. `stop` ends the `SyncHub` itself."""
        self._call(Hub.close, id, code, reason)

    def close_user(self, user: str, code: int = 1000, reason: str | None = "") -> None:
        """Close every connection of *user*."""
        self._call(Hub.close_user, user, code, reason)

    def join(self, group: str, id: str) -> None:
        """Add the connection with that *id* to *group*, in whichever process it is."""
        self._call(Hub.join, group, id)

    def leave(self, group: str, id: str) -> None:
        """Remove the connection with that *id* from *group*."""
        self._call(Hub.leave, group, id)

    @typing.overload
    def ask(
        self, id: str, message: object, payload: object = None, *,
        timeout: float = ..., returns: type[T],
    ) -> T: ...  # fmt: skip
    @typing.overload
    def ask(
        self, id: str, message: object, payload: object = None, *,
        timeout: float = ..., returns: Any = ...,
    ) -> Any: ...  # fmt: skip
    def ask(
        self, id: str, message: object, payload: object = None, *,
        timeout: float = 10.0, returns: Any = Any,
    ) -> Any:  # fmt: skip
        """Ask the client with that connection *id*, and return the payload of its answer.

        Waits *timeout* seconds for it. Raises what `Hub.ask` raises.
        """
        ask: Any = Hub.ask
        return self._call(ask, id, message, payload, timeout=timeout, returns=returns)

    @typing.overload
    def presence(self, group: str) -> list[pachinko.Presence]: ...
    @typing.overload
    def presence(self, *, user: str) -> list[pachinko.Presence]: ...
    def presence(
        self, group: str | None = None, *, user: str | None = None
    ) -> list[pachinko.Presence]:
        """Ask for the accepted connections in *group*, or of *user*, of all processes."""
        ask: Any = Hub.presence  # It refuses none and both.
        found: list[pachinko.Presence] = self._call(ask, group, user=user)
        return found

    def position(self, group: str) -> str:
        """Return the position of a kept *group*, as `Hub.position` does, and raise the same."""
        return self._call(Hub.position, group)

    def history(self, group: str, last: int = 20) -> list[pachinko.Envelope]:
        """Return the *last* messages to a kept *group*, the oldest first.

        Each is what `Hub.history` yields. Raises the same.
        """

        async def history(hub: Hub) -> list[pachinko.Envelope]:
            return [envelope async for envelope in hub.history(group, last)]

        return self._call(history)

    def _new_hub(self) -> Hub:
        hub = Hub()
        hub.configure(**self._settings)
        return hub

    def _call(
        self, method: Callable[Concatenate[Hub, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call *method* in the thread of the hub, and return what it returns or raises."""
        if is_in_loop():
            how = "async for envelope in" if method.__name__ == "history" else "await"
            raise PachinkoError(
                f"a SyncHub would block the event loop that runs in this thread: write `{how} "
                f"hub.{method.__name__}(...)`, with `from pachinko import hub`"
            )
        hub = self._open()
        future = hub.call_threadsafe(method, hub, *args, **kwargs)
        try:
            return future.result()
        finally:
            future.cancel()  # An exception here, such as a KeyboardInterrupt, gives the call up.
            del future  # An error has this frame in its traceback, and would refer to itself.

    def _open(self) -> Hub:
        """Return a hub that is open. Raises `PachinkoError` within 4 seconds."""
        with _starting:
            thread = self._thread
            if thread is None or not thread.is_ours or thread.has_failed:
                self._thread = thread = HubThread(self._new_hub())
                try:
                    thread.start()
                except RuntimeError as exc:  # Since Python 3.12, there is no new one at exit.
                    raise PachinkoError(f"a SyncHub needs a thread: {exc}") from None
        concurrent.futures.wait([thread.opened], _BROKER_WAIT)
        if not thread.opened.done():
            raise pachinko.BrokerAway(f"the broker has not answered within {_BROKER_WAIT:g} s")
        if thread.has_failed:
            raise pachinko.BrokerAway(thread.opened.result())
        return thread.hub


# ── shell command ─────────────────────────────────────────────────────────────────────────────
#
# The command sends to groups and looks into them, from a shell or a cron job, without an app.


class Eavesdropper(Cluster):
    """A process without connections that prints what a member of one group would get."""

    def __init__(self, given: str | Backplane, namespace: str | None, group: str) -> None:
        super().__init__(given, namespace)
        self._group = group
        self._lines: asyncio.Queue[str] = asyncio.Queue()

    async def run(self, count: int | None = None) -> None:
        """Print *count* messages, or all. Raises `PachinkoError`, and what `print` raises."""
        Registry(self, pachinko.hub.process)
        try:
            await self.connected()
            self.subscribe(Kind.GROUP, self._group)
            await self.subscribed(Kind.GROUP, self._group)
            _tell(f"listening to {self._group!r}")
            for _ in itertools.count() if count is None else range(count):
                _print(await self._lines.get())
        finally:
            await self.stop()

    async def _take(self, kind: Kind, name: str, message: PeerMessage, frame: bytes) -> None:
        self._unread.pop((kind, name), None)
        if message.op == "send":
            if kind is not Kind.CONNECTION:
                is_text = type(frame) is not Binary
                self._lines.put_nowait((frame if is_text else encode({"bytes": frame})).decode())
        elif message.op == "close" and kind is Kind.GROUP:
            _tell(f"its members were closed with {message.code} {message.reason}".rstrip())
        else:
            await super()._take(kind, name, message, frame)

    def _use(self, rules: Mapping[str, Window]) -> None:
        """Do nothing: what comes says what is kept."""

    async def _take_kept(self, group: str, message: Arrived) -> None:
        self._lines.put_nowait(framed(message).decode())

    async def _miss(self, kind: Kind, name: str) -> None:
        if (kind, name) not in self._unread:
            self._unread[kind, name] = frozenset()
            self._lines.put_nowait(gap_of(name if kind is Kind.GROUP else None).decode())

    def restored(self, subject: str | None) -> None:
        self._lines.put_nowait(gap_of(self._group).decode())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pachinko",
        description="Talk to the clients of a Falcon app with WebSockets, through its broker.",
        epilog="URL is what the app has in PACHINKO_BACKPLANE, such as nats://localhost:4222 or "
        'redis://localhost:6379; "-" takes it from there, which keeps a password off the list of '
        "processes.",
    )
    parser.add_argument("--version", action="version", version=f"pachinko {pachinko.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("url", metavar="URL", help='the broker, or "-" for $PACHINKO_BACKPLANE')
    common.add_argument("group", metavar="GROUP", help="the group, as in hub.join")
    common.add_argument("--namespace", help="as in hub.configure, by default pachinko")
    send = commands.add_parser(
        "send", parents=[common], help="send a message to a group",
        epilog="""pachinko send nats://localhost:4222 room:1 said '{"text": "hi"}'""",
    )  # fmt: skip
    send.add_argument("type", metavar="TYPE", help="the message's type")
    send.add_argument(
        "json", metavar="JSON", nargs="?", help='the payload; "-" reads it from stdin'
    )
    listen = commands.add_parser(
        "listen", parents=[common], help="print what a member of a group would see, a line each",
        epilog="pachinko listen nats://localhost:4222 room:1",
    )  # fmt: skip
    listen.add_argument("--count", type=_count, metavar="N", help="end after N messages")
    history = commands.add_parser(
        "history", parents=[common], help="print the last messages to a kept group, a line each",
        epilog="pachinko history nats://localhost:4222 room:1 --last 5",
    )  # fmt: skip
    history.add_argument("--last", type=_count, metavar="N", default=20, help="by default 20")
    commands.add_parser(
        "presence", parents=[common], help="print who is in a group, a line of JSON each",
        epilog="pachinko presence nats://localhost:4222 room:1",
    )  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status: 1 if the broker has failed, 2 for a mistake."""
    given = _parser().parse_args(arguments)
    level = logging.WARNING if given.command == "listen" else logging.CRITICAL
    logging.basicConfig(format="%(message)s", level=level)
    try:
        asyncio.run(_run(given))
    except (TypeError, ValueError, PachinkoError) as exc:
        _tell(f"pachinko: {exc}")
        return 1 if isinstance(exc, PachinkoError) else 2
    except OSError as exc:
        _silence_stdout()
        if not isinstance(exc, BrokenPipeError):  # `head` closes the pipe, for example
            _tell(f"pachinko: cannot print: {exc}")
            return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _print(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - it is the program's output


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - it is what the program says beside that


def _silence_stdout() -> None:
    """Discard what Python flushes to stdout at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _count(text: str) -> int:
    """Return a number of messages, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of messages, at least 1, got {text!r}")
    return int(text)


async def _run(given: argparse.Namespace) -> None:
    """Do what the command line says. Raises `ValueError` or `TypeError` for what is wrong in it."""
    url = os.environ.get(pachinko.ENVIRONMENT, "") if given.url == "-" else given.url
    if not url:
        raise ValueError("PACHINKO_BACKPLANE is not set" if given.url else "the URL is empty")
    given.group.encode()  # raises a UnicodeError for an argument that was no UTF-8
    hub = pachinko.Hub()
    try:
        hub.configure(url, namespace=given.namespace)
    except PachinkoError as exc:
        raise ValueError(str(exc)) from None
    if url.startswith("memory://"):
        raise ValueError("memory:// reaches no other process; give the broker of the app")
    if given.command == "listen":
        await Eavesdropper(url, given.namespace, given.group).run(given.count)
        return
    payload = None
    if given.command == "send" and given.json is not None:
        text = sys.stdin.read() if given.json == "-" else given.json
        try:
            payload = msgspec.json.decode(text)
        except (msgspec.MsgspecError, RecursionError) as exc:
            raise ValueError(
                f"""the payload is JSON, such as '{{"text": "hi"}}' or '"hi"': {exc}"""
            ) from None
    async with hub.open():
        if given.command == "send":
            await hub.send(given.group, given.type, payload)
        elif given.command == "history":
            for line in (await hub.state.relay.past(given.group, given.last))[1]:
                _print(line)
        else:
            for each in sorted(await hub.presence(given.group), key=lambda each: each.id):
                _print(encode(attrs.asdict(each)).decode())


if __name__ == "__main__":  # A file that was copied has no installed command.
    sys.exit(main())
