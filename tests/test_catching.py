"""A member of a kept group that has missed messages gets them, in order, or is told that it cannot.

`tests/reliability` does the same over sockets, with brokers and with processes that are killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar
from unittest.mock import patch

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from support import let_clients_join, new_app

import pachinko
from pachinko import Client, Connection, Envelope, Hub, Pachinko, Position, simulate

T = TypeVar("T")
GROUPS = ("r:1", "r:2")


def new_hub() -> Hub:
    """A hub without a broker, which `simulate` would give it."""
    hub = Hub()
    hub.configure("memory://")
    return hub


# A model of clients that come and go


@attrs.define
class Sent:
    """A message to a kept group."""

    number: int
    time: float
    ids: frozenset[str]  # whom it excludes


@attrs.define
class Person:
    """Who has connection after connection, and counts what comes."""

    client: Client | None = None
    resumes: bool = False
    is_announced: bool = False  # It has still to send its ``resume``.
    since: float = 0.0
    is_stalled: bool = False
    taken: int = 0  # events of the connection
    ids: list[str] = attrs.Factory(list)
    has: dict[str, str] = attrs.Factory(dict)  # the latest position in each group
    offered: dict[str, str] = attrs.Factory(dict)  # to the connection, for the next join
    last: dict[str, int] = attrs.Factory(dict)  # the number from which on nothing may be missing
    joined: dict[str, str] = attrs.Factory(dict)  # "", or for what verdict it waits


class Coming(RuleBasedStateMachine):
    """Clients join, leave, are cut, come back, do not read; nothing is lost, doubled or mixed up.

    Whatever a member has not got was announced by a gap, and a gap has its reason. A join by who
    resumes has exactly one verdict.
    """

    people = st.integers(0, 2)
    groups = st.sampled_from(GROUPS)

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.people_: list[Person] = [Person(), Person(), Person()]
        self.sent: dict[str, list[Sent]] = {group: [] for group in GROUPS}
        self.number, self.time = 0, 0.0

    def run(self, work: Awaitable[T] | Callable[[], T]) -> T:
        """Await, or call, something in the loop of the application."""

        async def wait() -> T:
            return work() if callable(work) else await work

        return self.runner.run(wait())

    @initialize(
        overflow=st.sampled_from(("replay", "replay", "drop_oldest", "close")),
        messages=st.sampled_from((1, 3, 50)), size=st.sampled_from((1_500, 10**6)),
        outbox=st.sampled_from((1, 4)),
    )  # fmt: skip
    def start(self, overflow: str, messages: int, size: int, outbox: int) -> None:
        hub, self.window = new_hub(), pachinko.Window(messages, 30.0, size)
        hub.keep("r:", messages=messages, seconds=30.0, bytes=size)
        self.hub, app = hub, new_app()
        Pachinko(app, "/ws", hub=hub, overflow=overflow, outbox=outbox, auth_timeout=5.0)
        self.is_closing = overflow == "close"
        self.sim = simulate(app)
        self.run(self.sim.__aenter__())
        self.epoch = self.run(hub.position("r:")).partition(".")[0]

    # What people do

    @precondition(lambda self: not all(each.client for each in self.people_))
    @rule(mode=st.sampled_from(("", "query", "query", "message")), keeps=st.booleans())
    def come(self, mode: str, keeps: bool) -> None:
        """Connect, and perhaps say what was there before."""
        person = next(each for each in self.people_ if not each.client)
        has = person.has if keeps else {}
        said = json.dumps({"groups": has, "ids": person.ids[-16:]})
        query = {"": {}, "query": {"resume": said}, "message": {"resume": "message"}}[mode]
        person.client = self.run(self.sim.connect("/ws", query=query))
        person.taken, person.is_stalled, person.joined = 0, False, {}
        person.resumes, person.is_announced = bool(mode), mode == "message"
        person.since = self.time
        person.offered = dict(has) if mode == "query" else {}
        person.ids.append(person.client.conn.id)

    @rule(who=people, group=groups)
    def join(self, who: int, group: str) -> None:
        person = self.people_[who]
        if person.client is None or group in person.joined:
            return
        if person.is_stalled and not person.resumes:
            return  # Nothing would tell it apart from what comes late.
        self.run(self.hub.join(group, person.client.conn))
        if not person.resumes:
            person.last[group] = self.number
            person.joined[group] = ""
        elif person.is_announced:
            person.joined[group] = f"{self.number}"
        else:
            person.joined[group] = "resumed" if group in person.offered else "first"
            self.offer(person, group)

    def offer(self, person: Person, group: str) -> None:
        """Use a position for a join."""
        at = person.offered.pop(group, None)
        if at is not None:
            person.last[group] = int(at.rpartition(".")[2])

    @rule(who=people, group=groups)
    def leave(self, who: int, group: str) -> None:
        person = self.people_[who]
        is_settled = not (person.is_stalled or person.is_announced)
        if person.client and is_settled and group in person.joined:
            self.run(self.hub.leave(group, person.client.conn))
            del person.joined[group]

    @rule(who=people, keeps=st.booleans())
    def say(self, who: int, keeps: bool) -> None:
        """Send a ``resume`` message."""
        person = self.people_[who]
        if person.client is None or person.is_stalled:
            return
        has = person.has if keeps else {}
        payload = {"groups": has, "ids": person.ids[-16:]}
        self.run(person.client.send("resume", payload))
        person.resumes = True
        self.settle(person, dict(has))

    def settle(self, person: Person, offered: dict[str, str]) -> None:
        """Those that wait for a ``resume`` message join now."""
        person.offered, is_announced, person.is_announced = offered, person.is_announced, False
        for group, kind in person.joined.items() if is_announced else ():
            person.joined[group] = "resumed"
            person.last[group] = int(kind)
            self.offer(person, group)

    @rule(who=people)
    def cut(self, who: int) -> None:
        person = self.people_[who]
        if person.client is not None:
            self.run(person.client.cut)
            self.go(person)

    def go(self, person: Person) -> None:
        self.take(person)
        person.client, person.joined = None, {}

    @rule(who=people)
    def stall(self, who: int) -> None:
        person = self.people_[who]
        if person.client is not None and not person.is_announced:
            self.run(person.client.stall)
            person.is_stalled = True

    @rule(who=people)
    def read_on(self, who: int) -> None:
        person = self.people_[who]
        if person.client is not None:
            self.run(person.client.resume)
            person.is_stalled = False

    # What happens

    @rule(group=groups, count=st.sampled_from((1, 1, 2, 5, 40)), who=st.none() | people)
    def send(self, group: str, count: int, who: int | None) -> None:
        """Send some messages, perhaps to all but one person."""
        excluded = self.people_[who].ids[-1:] if who is not None else []
        for _ in range(count):
            self.number += 1
            self.sent[group].append(Sent(self.number, self.time, frozenset(excluded)))
            self.run(self.hub.send(group, "said", self.number, exclude=excluded))

    @rule(seconds=st.sampled_from((1.0, 6.0, 29.0, 31.0)))
    def advance(self, seconds: float) -> None:
        async def move() -> None:
            await self.sim.settle()
            await self.sim.advance(seconds)

        self.run(move())
        self.time += seconds
        for person in self.people_:
            is_late = person.is_announced and self.time >= person.since + 5
            if person.client is not None and is_late:
                self.settle(person, {})

    # What has to hold

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "sim"):
            return
        self.run(self.settled())
        for person in self.people_:
            self.take(person)
            if person.client is not None and person.client.conn.closed:
                assert self.is_closing
                self.go(person)

    async def settled(self) -> None:
        await self.sim.settle()

    def take(self, person: Person) -> None:
        """Look at what has come."""
        assert person.client is not None or not person.joined
        if person.client is None:
            return
        for envelope in person.client.received[person.taken :]:
            person.taken += 1
            if envelope.group is not None:
                self.look(person, envelope.group, envelope)
        if person.is_stalled or person.client.conn.closed:
            return
        for group, kind in person.joined.items():
            if person.is_announced:
                continue
            assert kind == "", "there was no verdict"
            self.complete(person, group, self.number)

    def look(self, person: Person, group: str, envelope: Envelope) -> None:
        """Look at a message or a verdict."""
        assert envelope.at is not None
        epoch, _, number = envelope.at.rpartition(".")
        assert epoch == self.epoch
        kind, person.has[group] = person.joined.get(group, ""), envelope.at
        assert not person.is_announced
        if envelope.type == "said":
            assert kind != "first"
            assert envelope.payload == int(number) > person.last[group]
            sent = next(each for each in self.sent[group] if each.number == int(number))
            assert not sent.ids & {*person.ids}
            self.complete(person, group, int(number) - 1)
        elif envelope.type == "resume":
            assert kind != ""
            if kind == "resumed":
                self.complete(person, group, int(number))
            person.joined[group] = ""
        else:
            assert envelope.type == "gap" and kind != "first"
            assert envelope.payload["reason"] in ("expired", "limit", "overflow")
            assert kind != "" or envelope.payload["reason"] == "overflow"
            assert self.is_gone(group, person.last[group], int(number))
            if group in person.joined:
                person.joined[group] = ""
        person.last[group] = int(number)

    def complete(self, person: Person, group: str, number: int) -> None:
        """Nothing is missing up to *number* but what was not for that person."""
        for sent in self.sent[group]:
            if person.last[group] < sent.number <= number:
                assert sent.ids & {*person.ids}, f"{sent} is missing"

    def is_gone(self, group: str, last: int, top: int) -> bool:
        """Whether some of what was sent behind *last* has left the window."""
        sent = self.sent[group]
        kept = [each for each in sent if each.time + self.window.seconds > self.time]
        kept = kept[-self.window.messages :]
        ids = {each.number for each in kept} if self.window.bytes > 10**5 else {0}
        return any(last < each.number <= top and each.number not in ids for each in sent)

    def teardown(self) -> None:
        if hasattr(self, "sim"):
            for who in range(len(self.people_)):
                self.read_on(who)
                self.holds()
                self.cut(who)
            self.holds()
            self.run(self.sim.__aexit__(None, None, None))
        self.runner.close()


Coming.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestComing = Coming.TestCase


# What a client says that it has

EMPTY: list[Any] = [
    None, 1, "x", [], [{}], True, {"groups": None}, {"groups": []}, {"groups": "r:1", "ids": 5},
    {"ids": None}, {"ids": {}}, {"ids": "abc"}, {"other": 1}, {"groups": {}, "ids": []},
]  # fmt: skip


@pytest.mark.parametrize("value", [*EMPTY, pachinko.UNSET], ids=repr)
def test_what_is_no_such_object_is_empty(value: Any) -> None:
    """It says that there is nothing."""
    resume = pachinko.read_resume(value, 9)
    assert resume.groups == {} and resume.ids == frozenset()


def test_what_is_said_is_read() -> None:
    """Positions by group; what is none of ours stands for a gap."""
    resume = pachinko.read_resume(
        {"groups": {"a": "e.1", "b": "?", "c": None, "d": {"x": 1}}, "ids": ["x", 5, None, "y"]}, 4
    )
    nowhere = dict.fromkeys("bcd", pachinko.NOWHERE)
    assert resume.groups == {"a": Position("e", 1), **nowhere}
    assert resume.ids == {"x", "y"} and resume.rest is None


def test_the_latest_sixteen_ids_count() -> None:
    """However many a client sends."""
    ids = [f"{number}" for number in range(40)]
    assert pachinko.read_resume({"ids": ids}, 9).ids == {*ids[-16:]}


# In the handshake


class World:
    """An app with a simulation, whose clients are put into groups by the test."""

    def __init__(self, sim: Any, hub: Hub) -> None:
        self.sim, self.hub, self.number = sim, hub, 0

    async def come(self, *groups: str, query: Any = None, **options: Any) -> Client:
        """Connect and join *groups*; *query* is that of the handshake, or what ``resume`` has."""
        if isinstance(query, dict) and "resume" not in query:
            query = {"resume": json.dumps(query)}
        client: Client = await self.sim.connect("/ws", query=query, **options)
        for group in groups:
            await self.hub.join(group, client.conn)
        await self.sim.settle()
        return client

    async def behind(self, count: int = 90) -> Client:
        """Return a client that has missed so many messages, and does not read what it missed."""
        at = await self.hub.position("r:1")
        await self.say("r:1", count)
        client = await self.come(query={"groups": {"r:1": at}})
        client.stall()
        await self.hub.join("r:1", client.conn)
        return client

    async def say(self, group: str = "r:1", count: int = 1, **options: Any) -> None:
        """Send messages with the next numbers."""
        for _ in range(count):
            self.number += 1
            await self.hub.send(group, "said", self.number, **options)

    async def spend(self, seconds: float) -> None:
        await self.sim.settle()
        await self.sim.advance(seconds)
        await self.sim.settle()


@contextlib.asynccontextmanager
async def world(messages: int = 100, size: int = 10**6, **options: Any) -> AsyncIterator[World]:
    """Groups that begin with ``r:`` are kept, for 30 seconds; others are not."""
    hub, app = new_hub(), new_app()
    hub.keep("r:", messages=messages, seconds=30.0, bytes=size)
    ws = Pachinko(app, "/ws", hub=hub, **options)

    let_clients_join(ws)

    async with simulate(app) as sim:
        yield World(sim, hub)


def seen(client: Client) -> list[Any]:
    """What has come and was not looked at: numbers; verdicts as their type and what they say."""
    found: list[Any] = []
    for each in client.received:
        if each.type == "said":
            found.append(each.payload)
        elif each.type == "resume":
            found.append(("resume", each.payload["replayed"]))
        elif each.type == "gap":
            found.append(("gap", each.payload["reason"]))
        else:
            found.append(each.type)
    return found


def last_at(client: Client) -> str:
    at = client.received[-1].at
    assert at is not None
    return at


def has(client: Client, group: str = "r:1") -> dict[str, Any]:
    """What a client of that history says when it comes back."""
    return {"groups": {group: last_at(client)}, "ids": [client.conn.id]}


async def test_a_first_join_has_a_verdict_at_once() -> None:
    """It has the position and the connection's id; what comes then is live."""
    async with world() as it:
        await it.say()
        client = await it.come("r:1", query={})
        await it.say()
        await it.sim.settle()
        verdict, said = client.received
        top = await it.hub.position("r:1")
        assert verdict == Envelope(
            "resume", {"replayed": 0, "id": client.conn.id}, None, "r:1", verdict.at
        )
        assert said.payload == 2 and said.at == top and verdict.at == top[:-1] + "1"


async def test_who_does_not_resume_gets_no_verdict() -> None:
    """But positions on messages to kept groups, and on no others."""
    async with world() as it:
        client = await it.come("r:1", "other")
        await it.say()
        await it.say("other")
        await it.sim.settle()
        assert [(e.type, e.at is None) for e in client.received] == [
            ("said", False), ("said", True),
        ]  # fmt: skip


async def test_who_comes_back_gets_what_was_missed() -> None:
    """As it was, in order, and then the verdict; nothing else, and nothing twice."""
    async with world() as it:
        first = await it.come("r:1", "r:2", query={})
        await it.say()
        await it.sim.settle()
        first.cut()
        await it.say("r:1", 3)
        await it.say("r:2")
        await it.say("other")
        second = await it.come("r:1", query=has(first))
        await it.say()
        await it.sim.settle()
        assert seen(second) == [2, 3, 4, ("resume", 3), 7]
        await it.hub.join("r:2", second.conn)
        await it.sim.settle()
        assert seen(second)[-1] == ("resume", 0)


async def test_nothing_missed_is_a_verdict_too() -> None:
    """With the group's top, which is as good as the position that the client had."""
    async with world() as it:
        first = await it.come("r:1", query={})
        await it.say("r:2", 5)
        second = await it.come("r:1", query=has(first))
        assert seen(second) == [("resume", 0)]
        assert last_at(second) == await it.hub.position("r:1") != last_at(first)


def escaped(text: str, character: str) -> str:
    return text.replace(character, urllib.parse.quote(character))


def spelled(text: str) -> list[str]:
    """Queries that mean the same."""
    once, form = urllib.parse.quote(text), urllib.parse.urlencode({"resume": text})
    return [
        f"resume={once}", form, f"a=1&resume={once}&b=2", f"resume={once}&resume=%7B%7D",
        "resume=" + functools.reduce(escaped, "%+& ", text),
        f"%72esume={once}", "resume=" + "".join(f"%{byte:02x}" for byte in text.encode()),
    ]  # fmt: skip


@pytest.mark.parametrize("group", ["r:1", "r:a,b", "r:a+b", "r:a b&c=d;e%20", "r:ä☃😀", 'r:"\\'])
@pytest.mark.parametrize("way", range(7))
async def test_the_query_may_be_written_in_any_way(group: str, way: int) -> None:
    """Commas, signs and escapes are none of Falcon's; the first of several counts."""
    async with world() as it:
        at = await it.hub.position(group)
        await it.say(group, 2)
        text = json.dumps({"groups": {group: at}, "ids": ["a", "b"]}, ensure_ascii=bool(way % 2))
        client = await it.come(group, query=spelled(text)[way])
        assert seen(client) == [1, 2, ("resume", 2)]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "null", "[]", "5", '"x"', "{}{}", "[" * 2000, "1e400", "messages", " message"),
        *("%ff", '{"a":1', "\0", '{"groups":{"r:1":"e.1"}'),
    ],
)
async def test_what_cannot_be_read_is_a_first_join(text: str) -> None:
    """The client wants to resume, and has nothing."""
    async with world() as it:
        await it.say()
        client = await it.come("r:1", query={"resume": text})
        assert seen(client) == [("resume", 0)]


@pytest.mark.parametrize(("length", "reads"), [(2_000, True), (2_001, False)])
async def test_the_query_has_a_limit(length: int, reads: bool) -> None:
    """Of so many characters, not octets."""
    async with world() as it:
        at = await it.hub.position("r:1")
        await it.say()
        text = json.dumps({"groups": {"r:1": at}, "x": ""}, ensure_ascii=False)
        text = text[:-2] + "☃" * (length - len(text)) + text[-2:]
        client = await it.come("r:1", query={"resume": text})
        assert seen(client) == ([1, ("resume", 1)] if reads else [("resume", 0)])


@pytest.mark.parametrize(
    "at",
    [
        *("", "x", "x.1", "{epoch}.", "{epoch}.x", "{epoch}.-1", "{epoch}.2", None, 5, [], {}),
        "{epoch}." + "9" * 150,
    ],
)
async def test_a_position_of_nobody_is_a_gap(at: Any) -> None:
    """Its reason is the epoch; it has the top, where the client goes on from."""
    async with world() as it:
        await it.say()
        top = await it.hub.position("r:1")
        if isinstance(at, str):
            at = at.replace("{epoch}", top.partition(".")[0])
        client = await it.come("r:1", query={"groups": {"r:1": at}})
        await it.say()
        await it.sim.settle()
        assert seen(client) == [("gap", "epoch"), 2]
        gap = client.received[0]
        assert gap == Envelope(
            "gap", {"group": "r:1", "reason": "epoch", "id": client.conn.id}, None, "r:1", top
        )


async def test_positions_that_are_too_many_are_gaps() -> None:
    """In as many groups as one may be in they count, the last ones; in others nothing is silent."""
    async with world(max_groups=2) as it:
        at = await it.hub.position("r:1")
        client = await it.come(query={"resume": "message"})
        await client.send("resume", {"groups": {f"r:{number}": at for number in range(9)}})
        for group in ("r:8", "r:7", "r:6", "r:none"):
            await it.sim.settle()
            await it.hub.join(group, client.conn)
            await it.sim.settle()
            await it.hub.leave(group, client.conn)
        assert seen(client) == [("resume", 0), ("resume", 0), ("gap", "epoch"), ("gap", "epoch")]


async def test_a_position_in_the_page_is_where_a_client_begins() -> None:
    """`Hub.position` gives it to who renders the page."""
    async with world() as it:
        await it.say()
        at = await it.hub.position("r:1")
        await it.say("r:2")
        await it.say()
        client = await it.come("r:1", query={"groups": {"r:1": at}})
        assert seen(client) == [3, ("resume", 1)]


async def test_each_reason_of_a_gap() -> None:
    """By count and by time, by bytes, and by another life."""
    async with world(messages=2) as it:
        start = await it.hub.position("r:1")
        await it.say("r:1", 3)
        query = {"groups": {"r:1": start}}
        assert seen(await it.come("r:1", query=query)) == [("gap", "expired")]
        later = await it.hub.position("r:1")
        await it.say("r:1")
        await it.spend(31)
        query = {"groups": {"r:1": later}}
        assert seen(await it.come("r:1", query=query)) == [("gap", "expired")]
        await it.say("r:1")
        at = f"{start.partition('.')[0]}.4"
        query = {"groups": {"r:1": at}}
        assert seen(await it.come("r:1", query=query)) == [5, ("resume", 1)]
    async with world(size=1_500) as it:
        query = {"groups": {"r:1": await it.hub.position("r:1")}}
        await it.say("r:1", 5)
        assert seen(await it.come("r:1", query=query)) == [("gap", "limit")]
        query = {"groups": {"r:1": start}}
        assert seen(await it.come("r:1", query=query)) == [("gap", "epoch")]


async def test_a_position_serves_one_join() -> None:
    """Who leaves and joins is new, unless there was another ``resume`` message."""
    async with world() as it:
        at = await it.hub.position("r:1")
        await it.say()
        client = await it.come("r:1", query={"groups": {"r:1": at}})
        await it.hub.join("r:1", client.conn)
        await it.hub.leave("r:1", client.conn)
        await it.say()
        await it.hub.join("r:1", client.conn)
        await it.sim.settle()
        assert seen(client) == [1, ("resume", 1), ("resume", 0)]
        await it.hub.leave("r:1", client.conn)
        await it.say()
        await client.send("resume", {"groups": {"r:1": last_at(client)}})
        await it.sim.settle()
        await it.hub.join("r:1", client.conn)
        await it.sim.settle()
        assert seen(client)[3:] == [3, ("resume", 1)]


async def test_joining_a_group_again_gives_no_verdict() -> None:
    """Nor does it use a position up."""
    async with world() as it:
        client = await it.come("r:1", "r:1", query={})
        await client.send("resume", {"groups": {"r:1": "x.1"}})
        await it.sim.settle()
        await it.hub.join("r:1", client.conn)
        assert seen(client) == [("resume", 0)]
        await it.hub.leave("r:1", client.conn)
        await it.hub.join("r:1", client.conn)
        await it.sim.settle()
        assert seen(client) == [("resume", 0), ("gap", "epoch")]


async def test_a_refused_join_uses_nothing_up() -> None:
    """Somebody in too many groups gets an error, and no verdict."""
    async with world(max_groups=1) as it:
        at = await it.hub.position("r:1")
        await it.say()
        client = await it.come("r:2", query={"groups": {"r:1": at}})
        await client.send("join", "r:1", id=1)
        await it.sim.settle()
        assert seen(client) == [("resume", 0), "error"]
        await it.hub.leave("r:2", client.conn)
        await it.hub.join("r:1", client.conn)
        await it.sim.settle()
        assert seen(client)[2:] == [1, ("resume", 1)]


# By a message


async def test_a_message_may_say_it_after_the_handshake() -> None:
    """What was joined before stays behind until then."""
    async with world() as it:
        at = await it.hub.position("r:1")
        await it.say()
        client = await it.come("r:1", "r:2", query={"resume": "message"})
        assert client.conn in it.hub.members("r:1")
        await it.say()
        await it.say("r:2")
        await it.sim.settle()
        assert seen(client) == []
        await client.send("resume", {"groups": {"r:1": at}}, id=7)
        await it.sim.settle()
        assert [e.id for e in client.received if e.type == "resume.reply"] == [7]
        for group, types in (("r:1", ["said", "said", "resume"]), ("r:2", ["said", "resume"])):
            assert [each.type for each in client.received if each.group == group] == types
        await it.say()
        await it.sim.settle()
        assert seen(client)[-1] == 4


async def test_a_message_does_not_move_who_catches_up_already() -> None:
    """It is for the joins that come."""
    async with world() as it:
        client = await it.behind()
        await client.send("resume", {"groups": {"r:1": "x.1", "r:2": "x.1"}})
        await it.sim.settle()
        await it.hub.join("r:2", client.conn)
        client.resume()
        await it.sim.settle()
        assert seen(client) == [*range(1, 33), ("gap", "epoch"), *range(33, 91), ("resume", 90)]


@pytest.mark.parametrize("payload", [pachinko.UNSET, *EMPTY], ids=repr)
async def test_a_message_may_say_nothing(payload: Any) -> None:
    """Then all that waits is a first join, from when it was made."""
    async with world() as it:
        await it.say()
        client = await it.come("r:1", query={"resume": "message"})
        frame = {"type": "resume"} if payload is pachinko.UNSET else {
            "type": "resume", "payload": payload,
        }  # fmt: skip
        await client.send_text(json.dumps(frame))
        await it.sim.settle()
        assert seen(client) == [("resume", 0)]


async def test_the_wait_for_the_message_has_an_end() -> None:
    """After `auth_timeout`, counted from the accept, they are first joins; it comes too late."""
    async with world(auth_timeout=5.0) as it:
        at = await it.hub.position("r:1")
        await it.say()
        client = await it.come("r:1", query={"resume": "message"})
        await it.say()
        await it.spend(4)
        assert seen(client) == []
        await it.spend(1)
        assert seen(client) == [2, ("resume", 1)]
        await client.send("resume", {"groups": {"r:1": at}})
        await it.sim.settle()
        await it.hub.join("r:1", client.conn)
        assert seen(client) == [2, ("resume", 1)]


async def test_what_is_lost_while_it_waits_is_announced() -> None:
    """A first join that had to wait may have missed what came after it."""
    async with world(messages=1, auth_timeout=100.0) as it:
        first = await it.come("r:1", query={"resume": "message"})
        second = await it.come("r:1", query={"resume": "message"})
        await it.say("r:1", 2)
        await first.send("resume", {})
        await it.sim.settle()
        assert seen(first) == [("gap", "overflow")]
        await it.spend(40)
        await second.send("resume", {})
        await it.sim.settle()
        assert seen(second) == [("gap", "overflow")]


async def test_a_resume_message_overtakes_a_handler_that_waits() -> None:
    """It is read as soon as it arrives."""
    hub, app, event = new_hub(), new_app(), asyncio.Event()
    hub.keep("r:")
    ws = Pachinko(app, "/ws", hub=hub)

    @ws.on("wait")
    async def wait(conn: Connection) -> None:
        await event.wait()

    @ws.middleware
    async def refuse(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        assert envelope.type == "wait"
        return await call_next()

    async with simulate(app) as sim:
        client = await sim.connect("/ws", query={"resume": "message"})
        await hub.join("r:1", client.conn)
        await client.send("wait")
        await client.send("resume", id="x")
        await sim.settle()
        assert seen(client) == [("resume", 0), "resume.reply"]
        event.set()


@pytest.mark.parametrize("times", [1, 300])
async def test_a_resume_message_overtakes_the_handlers_of_a_handshake(times: int) -> None:
    """They may take longer than it may; so many of them are answered that memory has a bound."""
    hub, app, hold = new_hub(), new_app(), asyncio.Semaphore(0)
    hub.keep("r:")
    ws = Pachinko(app, "/ws", hub=hub)

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        return token

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.join("r:1")
        await hold.acquire()

    @ws.accepted
    async def greet(conn: Connection) -> None:
        await hold.acquire()

    async with simulate(app) as sim:
        payload = {"groups": {"r:1": await hub.position("r:1")}}
        await hub.send("r:1", "said", 1)
        client = await sim.connect("/ws", query={"resume": "message"})
        await client.send("authenticate", {"token": "ada"})
        for number in range(times):
            await client.send("resume", payload, id=number)
        await sim.settle()
        (session,) = hub.state.serving.values()
        assert session.incoming.received == min(times + 1, 256)
        hold.release()
        await sim.settle()
        await sim.advance(11)
        hold.release()
        await sim.settle()
        assert sorted(seen(client), key=repr) == [*["resume.reply"] * times, ("resume", 1), 1]


def guarded(optional: bool = False, **options: Any) -> tuple[Hub, Any]:
    """An endpoint that asks for a token, and puts who has one into a group."""
    hub, app = new_hub(), new_app()
    hub.keep("r:")
    ws = Pachinko(app, "/ws", hub=hub, **options)

    @ws.authenticate(optional=optional)
    async def who(conn: Connection, token: str | None) -> str | None:
        return token

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.join("r:1")

    return hub, app


@pytest.mark.parametrize("mode", ["before", "inside", "after"])
async def test_a_client_that_authenticates_by_message_resumes(mode: str) -> None:
    """By a message before its token, in the same one, or behind it."""
    hub, app = guarded()
    async with simulate(app) as sim:
        payload = {"groups": {"r:1": await hub.position("r:1")}}
        await hub.send("r:1", "said", 1)
        client = await sim.connect("/ws", query={"resume": "message"})
        if mode == "before":
            await client.send("resume", payload, id=1)
        inside = {"resume": payload} if mode == "inside" else {}
        await client.send("authenticate", {"token": "ada", **inside})
        if mode == "after":
            await sim.settle()
            assert client.received == []
            await client.send("resume", payload)
        await sim.settle()
        # A reply waits for the end of the handshake, as all that is sent before that.
        assert seen(client) == ["resume.reply"] * (mode == "before") + [1, ("resume", 1)]


@pytest.mark.parametrize("payload", ["x", None, [], {"token": 5}, {"token": "ada", "resume": None}])
async def test_an_odd_authenticate_says_nothing_odd(payload: Any) -> None:
    """What it does for the token is as ever."""
    _hub, app = guarded()
    async with simulate(app) as sim:
        client = await sim.connect("/ws", query={"resume": "message"})
        await client.send("authenticate", payload)
        await sim.settle()
        if isinstance(payload, dict) and payload["token"] == "ada":
            assert seen(client) == [("resume", 0)]
        else:
            assert (await client.closed())[0] == 3401


async def test_resume_messages_before_the_token_are_counted() -> None:
    """As others that come before it."""
    _hub, app = guarded()
    async with simulate(app) as sim:
        client = await sim.connect("/ws")
        for _ in range(9):
            await client.send("resume", {})
        assert (await client.closed())[0] == 3401


async def test_a_later_login_resumes() -> None:
    """A guest's ``authenticate`` may have it, too."""
    hub, app = guarded(optional=True)
    async with simulate(app) as sim:
        client = await sim.connect("/ws")
        at = await hub.position("r:2")
        await hub.send("r:2", "said", 1)
        inside = {"groups": {"r:2": at}}
        await client.send("authenticate", {"token": "ada", "resume": inside}, id=2)
        await sim.settle()
        await hub.join("r:2", client.conn)
        await sim.settle()
        assert seen(client) == ["authenticate.reply", 1, ("resume", 1)]


@pytest.mark.parametrize("keeps", [True, False])
async def test_resume_is_read_where_nothing_is_kept(keeps: bool) -> None:
    """It is answered if it has an id, in the handshake it does nothing, and tokens work."""
    app, hub = new_app(), new_hub()
    if keeps:
        hub.keep("other")
    ws = Pachinko(app, "/ws", hub=hub)

    @ws.authenticate(optional=True)
    async def who(conn: Connection, token: str | None) -> str | None:
        return token

    async with simulate(app) as sim:
        client = await sim.connect("/ws", query={"resume": "{}"})
        await client.send("resume", {"groups": {}})
        await client.send("resume", id=3)
        assert (await client.receive()).id == 3
        await client.send("authenticate", {"token": "ada", "resume": {}}, id=4)
        assert (await client.receive()).id == 4
        await hub.join("r:1", client.conn)
        await hub.send("r:1", "said")
        assert (await client.receive()).at is None


# In a connect handler


@pytest.mark.parametrize("count", [1, 100])
async def test_a_connect_handler_joins(count: int) -> None:
    """What was missed goes out when the handshake is answered."""
    hub, app = new_hub(), new_app()
    hub.keep("r:", messages=200)
    ws = Pachinko(app, "/ws", hub=hub)

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.join("r:1")
        await hub.send("r:1", "said", count + 1)
        await conn.send("hello")

    async with simulate(app) as sim:
        at = await hub.position("r:1")
        for number in range(count):
            await hub.send("r:1", "said", number + 1)
        client = await sim.connect("/ws", query={"resume": json.dumps({"groups": {"r:1": at}})})
        await sim.settle()
        found = [each for each in seen(client) if each != "hello"]
        assert found == [*range(1, count + 2), ("resume", count + 1)]


async def test_a_refused_handshake_leaves_nothing() -> None:
    """What a client has said is forgotten."""
    hub, app = new_hub(), new_app()
    hub.keep("r:")
    ws = Pachinko(app, "/ws", hub=hub)

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.join("r:1")
        raise pachinko.Close(4000)

    async with simulate(app) as sim:
        for query in ("message", "{}"):
            with pytest.raises(pachinko.Refused):
                await sim.connect("/ws", query={"resume": query})
        history = hub.state.history
        assert history is not None
        assert not (history._resumes or history._timers or hub.groups)


async def test_a_client_that_ends_leaves_nothing() -> None:
    """Neither what it has said, nor a timer, nor a cursor."""
    async with world() as it:
        clients = [await it.come("r:1", query={"resume": "message"}) for _ in range(3)]
        history = it.hub.state.history
        assert history is not None and len(history._resumes) == len(history._timers) == 3
        clients[0].cut()
        await clients[1].close()
        await it.hub.close(clients[2].conn)
        await it.sim.settle()
        assert not (history._resumes or history._timers or it.hub.groups)
        await it.spend(20)


# What `exclude` has left out


async def test_what_was_excluded_stays_excluded() -> None:
    """A client names the ids that it had, and gets nothing of its own again."""
    async with world() as it:
        first = await it.come("r:1", query={})
        await it.say(exclude=first.conn)
        await it.say()
        await it.sim.settle()
        assert seen(first) == [("resume", 0), 2]
        at = first.received[0].at
        first.cut()
        await it.say(exclude=[first.conn.id, "other"])
        mine = await it.come("r:1", query={"groups": {"r:1": at}, "ids": ["x", first.conn.id]})
        assert seen(mine) == [2, ("resume", 1)]
        others = await it.come("r:1", query={"groups": {"r:1": at}})
        assert seen(others) == [1, 2, 3, ("resume", 3)]


async def test_all_that_was_missed_may_be_excluded() -> None:
    """More than is looked at in a step."""
    async with world() as it:
        at = await it.hub.position("r:1")
        await it.say("r:1", 70, exclude="me")
        client = await it.come("r:1", query={"groups": {"r:1": at}, "ids": ["me"]})
        assert seen(client) == [("resume", 0)]


async def test_a_sender_that_catches_up_is_excluded() -> None:
    """Its message is not replayed to itself."""
    async with world() as it:
        client = await it.come("r:1", query={"resume": "message"})
        await it.say(exclude=client.conn)
        await it.say()
        await client.send("resume", {})
        await it.sim.settle()
        assert seen(client) == [2, ("resume", 1)]


# The end of catching up


@pytest.mark.parametrize("how", ["leave", "close_group", "close", "cut", "drain"])
async def test_catching_up_ends(how: str) -> None:
    """With the membership and with the connection; no verdict follows, and nothing is left."""
    async with world() as it:
        client = await it.behind()
        await it.sim.settle()
        if how == "leave":
            await it.hub.leave("r:1", client.conn)
        elif how == "close_group":
            await it.hub.close_group("r:1")
        elif how == "close":
            await it.hub.close(client.conn)
        elif how == "drain":
            draining = asyncio.create_task(it.hub.drain(0.0))
            await asyncio.sleep(0)  # The client reads again once the draining has begun.
        else:
            client.cut()
        if how != "cut":
            client.resume()
        await it.sim.settle()
        if how == "drain":
            await draining
        assert [each for each in seen(client) if not isinstance(each, int)] == []
        assert seen(client) == [*range(1, len(seen(client)) + 1)]
        assert how == "cut" or len(seen(client)) >= 32


async def test_a_member_that_leaves_and_joins_is_new() -> None:
    """What the cursor before has put in line comes first; then there is one verdict."""
    async with world() as it:
        client = await it.behind()
        await it.sim.settle()
        await it.hub.leave("r:1", client.conn)
        await it.hub.join("r:1", client.conn)
        await it.say()
        client.resume()
        await it.sim.settle()
        assert seen(client)[-2:] == [("resume", 0), 91]
        assert len([each for each in seen(client) if isinstance(each, tuple)]) == 1


async def test_a_hub_that_stops_forgets_all() -> None:
    """Its next life is another epoch."""
    hub = new_hub()
    hub.keep("r:")
    found = []
    for _ in range(2):
        app = new_app()
        Pachinko(app, "/ws", hub=hub)
        async with simulate(app) as sim:
            query = {"groups": {"r:1": found[-1]}} if found else {}
            client = await sim.connect("/ws", query={"resume": json.dumps(query)})
            await hub.join("r:1", client.conn)
            await sim.settle()
            found.append(client.received[-1].at)
            history = hub.state.history
            await sim.connect("/ws", query={"resume": "message"})
        assert history is not None and not (history._resumes or history._timers)
    assert seen(client) == [("gap", "epoch")]


async def test_endpoints_share_what_is_kept() -> None:
    """A position of one is good at another one of the same hub."""
    hub, app = new_hub(), new_app()
    hub.keep("r:")
    Pachinko(app, "/a", hub=hub)
    Pachinko(app, "/b", hub=hub)
    async with simulate(app) as sim:
        first = await sim.connect("/a", query={"resume": "{}"})
        await hub.join("r:1", first.conn)
        await sim.settle()
        first.cut()
        await sim.settle()
        await hub.send("r:1", "said", 1)
        query = {"resume": json.dumps({"groups": {"r:1": first.received[0].at}})}
        second = await sim.connect("/b", query=query)
        await hub.join("r:1", second.conn)
        await sim.settle()
        assert seen(second) == [1, ("resume", 1)]


async def test_a_listener_has_positions() -> None:
    """It is always live."""
    async with world() as it, it.hub.listen("r:1") as listener:
        await it.say()
        envelope = await anext(listener)
        assert envelope.at == await it.hub.position("r:1")


@pytest.mark.parametrize("group", ["r:\ud800", "r:\udfff☃", "r:\0", "r: /?&#%"])
async def test_a_group_may_have_any_name(group: str) -> None:
    """The client sends it back as it came: with U+FFFD for half a surrogate pair."""
    async with world() as it:
        first = await it.come(group, query={})
        (verdict,) = first.received
        first.cut()
        await it.say(group)
        assert verdict.group is not None
        second = await it.come(group, query={"groups": {verdict.group: verdict.at}})
        assert seen(second) == [1, ("resume", 1)]


async def test_a_frame_is_encoded_once() -> None:
    """For who is live, who comes back and who asks for the history; and `at` is spliced in once."""
    encode, splice = pachinko.Codec.encode, pachinko.with_position
    with (
        patch.object(pachinko.Codec, "encode", autospec=True, side_effect=encode) as encoded,
        patch.object(pachinko, "with_position", side_effect=splice) as spliced,
    ):
        async with world() as it:
            at = await it.hub.position("r:1")
            live = [await it.come("r:1") for _ in range(3)]
            await it.say()
            late = [await it.come("r:1", query={"groups": {"r:1": at}}) for _ in range(3)]
            assert [each.payload async for each in it.hub.history("r:1")] == [1]
            assert [*map(seen, live + late)] == [[1]] * 3 + [[1, ("resume", 1)]] * 3
    assert encoded.call_count == 1 and spliced.call_count == 1 + len(late)


@pytest.mark.parametrize(("size", "most"), [(1, 32), (30_000, 2), (70_000, 1)])
async def test_little_is_on_its_way_to_who_does_not_read(size: int, most: int) -> None:
    """At most 32 messages or 64 KiB; the client is a member like any other meanwhile."""
    async with world(size=10**8) as it:
        at = await it.hub.position("r:1")
        for _ in range(40):
            await it.hub.send("r:1", "text", "x" * size)
        client = await it.come(query={"groups": {"r:1": at}})
        client.stall()
        await it.hub.join("r:1", client.conn)
        await it.sim.settle()
        outbox = client.conn.outgoing.outbox
        assert outbox is not None and sum(bool(each.event) for each in outbox.queue) == most - 1
        assert [each.id for each in await it.hub.presence("r:1")] == [client.conn.id]


# Slow clients


@pytest.mark.parametrize("overflow", ["replay", "drop_oldest"])
async def test_a_slow_client_reads_on_from_the_ring(overflow: str) -> None:
    """It is not evicted, nothing is dropped, and it gets no verdict."""
    async with world(overflow=overflow, outbox=3) as it:
        client = await it.come("r:1")
        client.stall()
        await it.say("r:1", 80)
        await it.sim.settle()
        assert it.hub.stats()["dropped"] == it.hub.stats()["evicted"] == 0
        client.resume()
        await it.sim.settle()
        await it.say()
        await it.sim.settle()
        assert seen(client) == [*range(1, 82)]


@pytest.mark.parametrize("query", [None, {}])
async def test_a_ring_overtakes_a_slow_client(query: Any) -> None:
    """Whoever it is learns of it, and where to go on."""
    async with world(messages=10, overflow="replay", outbox=3) as it:
        client = await it.come("r:1", query=query)
        client.stall()
        await it.say("r:1", 80)
        await it.sim.settle()
        client.resume()
        await it.sim.settle()
        await it.say()
        await it.sim.settle()
        found = seen(client)[query is not None :]
        assert found[-2:] == [("gap", "overflow"), 81]
        assert found[:-2] == [*range(1, len(found) - 1)]


async def test_a_client_that_catches_up_may_be_overtaken() -> None:
    """That gap is its verdict."""
    async with world(messages=60) as it:
        client = await it.behind(60)
        await it.sim.settle()
        await it.say("r:1", 60)
        client.resume()
        await it.sim.settle()
        assert seen(client) == [*range(1, 33), ("gap", "overflow")]


async def test_a_client_that_does_not_read_is_told_once() -> None:
    """However much is sent, what waits for it is bounded."""
    async with world(messages=1, overflow="replay", outbox=2) as it:
        client = await it.come("r:1", query={})
        client.stall()
        for _ in range(50):
            await it.say("r:1", 10)
            await it.sim.settle()
        outbox = client.conn.outgoing.outbox
        assert outbox is not None and len(outbox.queue) < 10
        client.resume()
        await it.sim.settle()
        assert seen(client).count(("gap", "overflow")) <= 2


async def test_a_client_that_joins_and_leaves_and_does_not_read_is_evicted() -> None:
    """Nothing else would bound its verdicts."""
    async with world(outbox=5) as it:
        client = await it.come(query={})
        client.stall()
        for _ in range(60):
            await client.send("join", "r:1")
            await client.send("leave", "r:1")
        await it.sim.settle()
        assert client.conn.close_code == 1013 and it.hub.stats()["evicted"] == 1


async def test_many_joins_in_a_row_are_no_offence() -> None:
    """Nor that all of them have something to replay."""
    async with world(outbox=5) as it:
        at = await it.hub.position("r:1")
        groups = [f"r:{number}" for number in range(40)]
        for group in groups:
            await it.say(group)
        client = await it.come(query={"groups": dict.fromkeys(groups[:20], at)})
        client.stall()
        for group in groups:
            await it.hub.join(group, client.conn)
        client.resume()
        await it.sim.settle()
        assert len(client.received) == 60 and not client.conn.closed


async def test_a_slow_client_of_other_groups_is_as_before() -> None:
    """What is not kept is dropped, or the client is evicted, when the rest has gone to the ring."""
    for overflow in ("replay", "drop_oldest", "close"):
        async with world(overflow=overflow, outbox=3) as it:
            client = await it.come("r:1", "other", query={})
            client.stall()
            await it.say("r:1", 2)
            await it.say("other", 3)
            await it.sim.settle()
            assert client.conn.closed is (overflow == "close")
            await it.say("other", 8)
            await it.sim.settle()
            assert client.conn.closed is (overflow != "drop_oldest")
            if overflow == "drop_oldest":
                client.resume()
                await it.sim.settle()
                assert {"group": "other"} in [e.payload for e in client.received]
                assert [e.payload for e in client.received if e.group == "r:1"][1:] == [1, 2]


async def test_what_came_before_a_join_stays_in_line() -> None:
    """A client that left, and is in again, does not read what it was not to get."""
    async with world(overflow="replay", outbox=4) as it:
        client = await it.come("r:1", query={})
        client.stall()
        await it.say("r:1", 3)
        await it.hub.leave("r:1", client.conn)
        await it.say("r:1", 3)
        await it.hub.join("r:1", client.conn)
        await it.say("r:1", 8)
        await it.sim.settle()
        client.resume()
        await it.sim.settle()
        assert seen(client) == [("resume", 0), 1, 2, 3, ("resume", 0), *range(7, 15)]


async def test_who_has_left_gets_what_came_before() -> None:
    """What waits of a group that a client has left is no longer read from its ring."""
    async with world(overflow="drop_oldest", outbox=3) as it:
        client = await it.come("r:1", "r:2")
        client.stall()
        await it.say("r:1", 2)
        await it.hub.leave("r:1", client.conn)
        await it.say("r:2", 6)
        await it.sim.settle()
        client.resume()
        await it.sim.settle()
        assert seen(client) == [*range(1, 9)]


# What a broker has lost


async def test_members_are_told_what_was_lost() -> None:
    """Each once, where it is; a listener as ever, and a new member by its verdict alone."""
    async with world(overflow="replay", outbox=2) as it:
        live, slow = await it.come("r:1", query={}), await it.come("r:1")
        late = await it.come("r:1", query={"resume": "message"})
        behind, history = await it.come("r:1"), it.hub.state.history
        assert history is not None
        async with it.hub.listen("r:1") as listener:
            for client in (slow, behind):
                client.stall()
            await it.say("r:1", 2)
            await it.sim.settle()
            history.lose("r:1", "broker")
            history.lose("r:1", "broker")
            history.lose("r:none", "broker")
            await it.say()
            for client in (slow, behind):
                client.resume()
            await it.sim.settle()
            assert seen(live)[:4] == [("resume", 0), 1, 2, ("gap", "broker")]
            assert seen(slow)[:3] == [1, 2, ("gap", "broker")]
            assert [(await anext(listener)).type for _ in range(5)] == [
                "said", "said", "gap", "gap", "said",
            ]  # fmt: skip
        await late.send("resume")
        await it.sim.settle()
        assert seen(late) == [1, 2, 3, ("resume", 3)]


async def test_very_many_members_are_told_in_turns() -> None:
    """The loss itself takes no write to any of them; all that comes then is behind the gap."""
    async with world() as it:
        clients = [await it.come("r:1") for _ in range(3)]
        history = it.hub.state.history
        assert history is not None
        history.lose("r:1", "broker")
        assert len(history._waiting) == 3 and not clients[0].conn.outgoing.outbox
        await it.say()
        await it.sim.settle()
        await it.say()
        await it.sim.settle()
        assert all(seen(client) == [("gap", "broker"), 2] for client in clients)


async def test_a_slow_member_is_told_what_was_lost() -> None:
    """Although it reads from the ring already."""
    async with world(overflow="replay", outbox=2) as it:
        client = await it.come("r:1")
        client.stall()
        await it.say("r:1", 50)
        await it.sim.settle()
        history = it.hub.state.history
        assert history is not None
        history.lose("r:1", "broker")
        client.resume()
        await it.sim.settle()
        await it.say()
        await it.sim.settle()
        assert seen(client)[-2:] == [("gap", "broker"), 51]


# What a ring does not know yet


async def test_a_client_waits_for_its_ring() -> None:
    """Where a broker has what is before it; whoever has left meanwhile gets nothing."""
    is_ready, asked = False, list[tuple[pachinko.Cursor, Position | None]]()
    async with world() as it:
        history = it.hub.state.history
        assert history is not None
        history.start(it.hub.state.registry, lambda *args: asked.append(args))
        start = await it.hub.position("r:1")
        await it.say()
        begin = pachinko.read_position(await it.hub.position("r:1"))
        with (
            patch.object(pachinko.Rings, "is_ready", lambda *_: is_ready),
            patch.object(pachinko.Rings, "start_of", lambda *_: begin),
        ):
            old = await it.come("r:1", query={"groups": {"r:1": start}})
            new, gone = await it.come("r:1", query={}), await it.come("r:1", query={})
            late = await it.come("r:1", query={"resume": "message"})
            await it.hub.leave("r:1", gone.conn)
            await it.say()
            assert len(asked) == 3
            is_ready = True
            await late.send("resume")
            for cursor, position in asked:
                cursor.begin(position)
            await it.sim.settle()
        assert seen(old) == [1, 2, ("resume", 2)]
        assert seen(new) == seen(late) == [2, ("resume", 1)]
        assert seen(gone) == []


@pytest.mark.parametrize("is_none", [True, False])
async def test_a_first_join_that_had_to_wait_gets_the_state(is_none: bool) -> None:
    """And not what was sent before that, which the state has; without one, all of it."""
    hub, app = new_hub(), new_app()
    hub.keep("r:")
    ws = Pachinko(app, "/ws", hub=hub)

    @pachinko.message("state")
    class State:
        at: str

    @ws.snapshot("r:")
    async def state(conn: Connection, group: str) -> State | None:
        return None if is_none else State(await hub.position(group))

    async with simulate(app) as sim:
        client = await sim.connect("/ws", query={"resume": "message"})
        await hub.join("r:1", client.conn)
        await hub.send("r:1", "said", 1)
        await client.send("resume")
        await sim.settle()
        await hub.send("r:1", "said", 2)
        await sim.settle()
        verdict, first, said = client.received
        assert (verdict.type, verdict.payload["replayed"], verdict.at) == ("resume", 0, None)
        if is_none:
            assert (first.type, first.payload) == ("said", 1)
        else:
            assert (first.type, first.payload) == ("state", {"at": first.at})
        assert said.payload == 2


# A storm


async def test_a_storm_holds_nobody_up() -> None:
    """At most 256 messages are passed in a turn of the loop, whatever steps they come in."""
    turns: list[int] = []
    step, turn = pachinko.Cursor.step, pachinko.History._turn

    def counted(self: pachinko.Cursor, most: int) -> int:
        passed = step(self, most)
        turns[-1] += passed
        return passed

    def counting(self: pachinko.History) -> None:
        turns.append(0)
        turn(self)

    async with world() as it:
        at = await it.hub.position("r:1")
        await it.say("r:1", 31)
        with (
            patch.object(pachinko.Cursor, "step", counted),
            patch.object(pachinko.History, "_turn", counting),
        ):
            clients = [await it.come(query={"groups": {"r:1": at}}) for _ in range(40)]
            for client in clients:
                await it.hub.join("r:1", client.conn)
            await it.sim.settle()
        assert max(turns) == 256 and sum(turns) == 40 * 32
        assert all(seen(client) == [*range(1, 32), ("resume", 31)] for client in clients)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
async def test_a_forked_process_begins_anew() -> None:
    """It has rules, and none of what the parent keeps."""
    hub = new_hub()
    hub.keep("r:")
    async with hub.open("memory://"):
        await hub.send("r:1", "said")
        before = hub.state
        pachinko._forget_parent()
        assert hub.state is not before and hub.state.rules == before.rules
        assert hub.state.history is None
        hub.state = before
