"""Clients of kept groups, what they have heard, and the check that nothing of it is missing.

The invariant, for one client and one kept group: **what it has received, and what it was told that
it will not receive, is what was published, in order, with no double.** In detail:

1. Each message was published, comes once, and is at the same position for everybody. Positions only
   grow, and none of another life of the broker comes without a gap before it.
2. Between two messages, or a message and a verdict, nothing is missing of what anybody else has
   received there, and nothing of what a sender was told is stored. A gap ends what is owed: what
   was published before its position counts for nothing, and what comes behind it is owed again.
3. A join has one verdict; ``replayed`` counts what came before it.
4. What was sent with ``exclude`` for one of the client's connections is not sent to it, and is left
   out of what is replayed to a client that has named it. It never counts as lost.
5. At the end a connected client has everything. A gap has one of the reasons that the faults of the
   test explain; one by the window has so many messages behind it as the window holds.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import json
from collections.abc import Collection, Iterable
from typing import Any, Literal

import attrs

Key = tuple[str, int]  # a sender, and the number of its message to a group
Place = tuple[str, int]  # an epoch, and a number in it
NEVER: Place = ("", -1)
IDS = 16  # of former connections, that a client may send
MEMORIES = ("expired", "limit", "overflow")  # reasons that the window gives


def place_of(at: str) -> Place:
    """Take a position apart. A client would not: for it, it is opaque."""
    epoch, _, number = at.rpartition(".")
    return (epoch, int(number)) if number.isascii() and number.isdecimal() else ("?", 0)


@attrs.define(eq=False)
class Send:
    """A message to a kept group, which may be on its way."""

    group: str
    sender: str
    n: int
    begun: int  # when
    excluded: str | None = None  # the id of a connection
    is_stored: bool = False  # The sender was told so.

    @property
    def payload(self) -> dict[str, Any]:
        return {"sender": self.sender, "n": self.n}


@attrs.define(eq=False)
class Published:
    """All that was sent to kept groups, as far as the test knows."""

    sends: dict[tuple[str, str], list[Send]] = attrs.Factory(dict)  # by group and sender
    places: dict[str, dict[Key, Place]] = attrs.Factory(lambda: collections.defaultdict(dict))
    ticks: Iterable[int] = attrs.Factory(itertools.count)
    followers: list[Follower] = attrs.Factory(list)
    _sorted: dict[str, dict[str, list[tuple[int, Key]]]] | None = None

    def tick(self) -> int:
        """The next number of those that put in order what happens in the test."""
        return next(iter(self.ticks))

    def begin(self, group: str, sender: str, excluded: str | None = None) -> Send:
        """Note that *sender* begins to send its next message to *group*."""
        sent = self.sends.setdefault((group, sender), [])
        sent.append(Send(group, sender, len(sent), self.tick(), excluded))
        return sent[-1]

    def find(self, group: str, key: Key) -> Send | None:
        sent = self.sends.get((group, key[0]), ())
        return sent[key[1]] if 0 <= key[1] < len(sent) else None

    def between(self, group: str, after: Place, before: int) -> list[Key]:
        """What somebody has received behind *after*, and before a number of the same epoch."""
        if self._sorted is None:
            self._sorted = {}
        if group not in self._sorted:
            by_epoch = self._sorted[group] = dict[str, list[tuple[int, Key]]]()
            for key, (epoch, number) in self.places[group].items():
                by_epoch.setdefault(epoch, []).append((number, key))
            for each in by_epoch.values():
                each.sort()
        known = self._sorted[group].get(after[0], [])
        start = bisect.bisect_left(known, (after[1] + 1, ("", 0)))
        return [key for number, key in known[start:] if number < before]

    def check(self, **options: Any) -> None:
        """Check what all followers have heard, once nothing more comes."""
        self.note_places()
        for follower in self.followers:
            follower.check(**options)

    def note_places(self) -> None:
        """Learn from all followers where messages are; all have to agree."""
        self.places.clear()
        self._sorted = None
        for follower in self.followers:
            for group, heard in follower.heard.items():
                for each in heard:
                    if each.kind == "message":
                        assert each.key is not None
                        place = place_of(each.at)
                        known = self.places[group].setdefault(each.key, place)
                        assert known == place, f"{each.key} is at {known} and at {place}"
        for group, places in self.places.items():
            assert len({*places.values()}) == len(places), f"two messages to {group} at one place"


@attrs.frozen
class Heard:
    """What happened to a follower, of one group."""

    kind: Literal["joined", "message", "resume", "gap"]
    at: str = ""  # the position that it came with, or of the frame
    tick: int = 0
    key: Key | None = None
    replayed: int = 0
    reason: str = ""
    ids: frozenset[str] = frozenset()  # that the client has named; in a verdict, its own


@attrs.define(eq=False)
class Follower:
    """A client of kept groups, over many connections.

    It stores the position of each message and verdict, and goes on from there.
    """

    published: Published
    name: str
    at: dict[str, str] = attrs.Factory(dict)  # by group
    ids: list[str] = attrs.Factory(list)  # of its connections
    heard: dict[str, list[Heard]] = attrs.Factory(lambda: collections.defaultdict(list))
    verdicts: set[str] = attrs.Factory(set)  # groups with a verdict on this connection
    is_at_the_end: bool = False  # It is connected when nothing more comes.
    excuses: tuple[str, ...] = ()  # reasons that its gaps may have, beside those of all
    other: list[dict[str, Any]] = attrs.Factory(list)  # frames of no kept group

    def __attrs_post_init__(self) -> None:
        self.published.followers.append(self)

    def fork(self, name: str) -> Follower:
        """Another client with the same past, such as a second tab, or one from a backup."""
        heard = collections.defaultdict(list, {g: [*each] for g, each in self.heard.items()})
        return Follower(self.published, name, {**self.at}, [*self.ids], heard)

    @property
    def resume(self) -> dict[str, Any]:
        """What it resumes with."""
        return {"groups": {**self.at}, "ids": self.ids[-IDS:]} if self.at else {}

    def joins(self, *groups: str, is_first: bool = False) -> None:
        """Note that it connects, or joins again, and what it then knows."""
        ids = frozenset(self.ids[-IDS:])
        for group in groups:
            self.verdicts.discard(group)
            if is_first:
                self.at.pop(group, None)
            at = self.at.get(group, "")
            self.heard[group].append(Heard("joined", at, self.published.tick(), ids=ids))

    def take(self, frame: dict[str, Any]) -> None:
        """Take a frame that has come."""
        group, at, type, payload = (frame.get(k) for k in ("group", "at", "type", "payload"))
        if type == "gap" and payload == {"group": None}:
            return  # An outage may have lost what is sent to all.
        if group is None or at is None:
            self.other.append(frame)
            return
        tick, log = self.published.tick(), self.heard[group]
        if type == "said":
            log.append(Heard("message", at, tick, (payload["sender"], payload["n"])))
        else:
            assert type in ("resume", "gap"), frame
            self.verdicts.add(group)
            if payload["id"] not in self.ids:
                self.ids.append(payload["id"])
            replayed, reason = payload.get("replayed", 0), payload.get("reason", "")
            ids = frozenset([payload["id"]])
            log.append(Heard(type, at, tick, replayed=replayed, reason=reason, ids=ids))
        self.at[group] = at

    def has(self, sent: Send) -> bool:
        """Whether it has heard a message, or what says that it will not."""
        key = (sent.sender, sent.n)
        return any(
            each.key == key or (each.kind == "gap" and each.tick > sent.begun)
            for each in reversed(self.heard.get(sent.group, ()))
        )

    def check(self, *, reasons: Collection[str] = (), window: int | None = None) -> None:
        """Check what it has heard of each group: see the top of this file."""
        for group, heard in self.heard.items():
            try:
                check(
                    heard, self.published, group, own=frozenset(self.ids),
                    reasons=(*reasons, *self.excuses), window=window,
                    is_at_the_end=self.is_at_the_end,
                )  # fmt: skip
            except AssertionError as exc:
                exc.add_note(f"{self.name} in {group}, which has heard:")
                for each in heard[-60:]:
                    exc.add_note(f"    {each}")
                raise


class Hole(AssertionError):
    """A client has missed a message, and was not told so."""


def check(
    heard: Iterable[Heard], published: Published, group: str, *, own: frozenset[str],
    reasons: Collection[str] = (), window: int | None = None, is_at_the_end: bool = True,
) -> None:  # fmt: skip
    """Hold what a client has *heard* of *group* against what was published.

    *own*: the ids of all its connections. *reasons*: those that gaps may have, and "first" if a
    first join may have any, since it came while the broker was away. *window*: how many messages of
    the group are kept, where that is why some are lost.
    """
    walk = Walk(published, group, own)
    for each in heard:
        if each.kind == "joined":
            walk.join(each)
        elif each.kind == "message":
            walk.receive(each)
        elif each.kind == "resume":
            walk.resume(each)
        else:
            is_first = "first" in reasons and walk.place == NEVER
            assert is_first or each.reason in reasons, f"a gap for no reason: {each}"
            walk.lose(each, window)
    if is_at_the_end:
        walk.end()


@attrs.define(eq=False)
class Walk:
    """How far `check` has come."""

    published: Published
    group: str
    own: frozenset[str]
    got: set[Key] = attrs.Factory(set)
    place: Place = NEVER  # up to which everything is accounted for
    since: int = 0  # What was sent later is owed. Of what was sent before it is not known.
    first: dict[str, int] = attrs.Factory(dict)  # the first message of each sender since then
    checked: dict[str, int] = attrs.Factory(dict)  # senders' messages up to here are had
    named: frozenset[str] = frozenset()  # ids of former connections that the server was told
    current: frozenset[str] = frozenset()  # the id of this connection
    is_due: bool = False  # a verdict
    replayed: int = 0
    is_live: bool = False

    def join(self, heard: Heard) -> None:
        self.is_due, self.replayed, self.named = True, 0, heard.ids
        self.current = frozenset()
        if not heard.at:
            self.begin(NEVER, heard.tick, is_known=False)
        else:
            place = place_of(heard.at)
            assert self.place in (NEVER, place), f"it was at {self.place}: {heard}"
            self.place = place

    def begin(self, place: Place, since: int, is_known: bool = True) -> None:
        """Begin anew at *place*, when the client knows of it."""
        self.place, self.since, self.is_live = place, since, is_known
        self.first.clear()
        self.checked.clear()

    def receive(self, heard: Heard) -> None:
        key, place = heard.key, place_of(heard.at)
        assert key is not None
        sent = self.published.find(self.group, key)
        assert sent is not None, f"nobody has sent {heard}"
        assert key not in self.got, f"a double: {heard}"
        hidden = self.named if self.is_due else self.current
        assert sent.excluded not in hidden, f"it was to leave this out: {heard}"
        self.got.add(key)
        self.advance(place, heard)
        self.check_sender(key[0], key[1])
        self.replayed += 1

    def advance(self, place: Place, heard: Heard) -> None:
        """Go on to *place*, up to which nothing may be missing."""
        if self.place != NEVER:
            assert place[0] == self.place[0], f"another life, without a gap: {heard}"
            is_next = place[1] > self.place[1] or (heard.kind == "resume" and place == self.place)
            assert is_next, f"not in order: {heard} behind {self.place}"
            for key in self.published.between(self.group, self.place, place[1]):
                self.check_missing(key, heard)
        self.place = place

    def check_missing(self, key: Key, heard: object) -> None:
        sent = self.published.find(self.group, key)
        if key not in self.got and sent is not None and sent.excluded not in self.own:
            raise Hole(f"{key} is missing before {heard}")

    def check_sender(self, sender: str, n: int) -> None:
        """Check the messages of *sender* before its message *n*, of those that are owed."""
        first = self.first.setdefault(sender, n)
        sends = self.published.sends[self.group, sender]
        for sent in sends[self.checked.get(sender, 0) : n]:
            if sent.is_stored and (sent.n > first or (self.is_live and sent.begun > self.since)):
                self.check_missing((sender, sent.n), (sender, n))
        self.checked[sender] = max(n, self.checked.get(sender, 0))

    def resume(self, heard: Heard) -> None:
        self.current = heard.ids
        assert self.is_due, f"a second verdict: {heard}"
        assert heard.replayed == self.replayed, f"{self.replayed} were replayed: {heard}"
        self.is_due = False
        place = place_of(heard.at)
        if self.place == NEVER:
            self.begin(place, heard.tick)
        else:
            self.advance(place, heard)
            if not self.is_live:
                self.is_live, self.since = True, heard.tick

    def lose(self, heard: Heard, window: int | None) -> None:
        self.current = heard.ids
        place = place_of(heard.at)
        is_same = place[0] == self.place[0] and self.place != NEVER
        if is_same and heard.reason != "epoch":
            assert place[1] >= self.place[1], f"a gap leads back: {heard} from {self.place}"
        if is_same and window is not None and heard.reason in MEMORIES:
            lost = self.published.between(self.group, self.place, place[1] + 1)
            assert len(lost) >= window, f"only {len(lost)} behind {self.place}: {heard}"
        self.is_due = False
        self.begin(place, heard.tick)

    def end(self) -> None:
        """Check that nothing is missing behind what came last."""
        assert not self.is_due, "a join has no verdict"
        for key in self.published.between(self.group, self.place, 2**63):
            self.check_missing(key, "the end")
        for (group, sender), sends in self.published.sends.items():
            if group == self.group:
                n = self.checked.get(sender, 0)
                self.first.setdefault(sender, len(sends))
                for sent in sends[n:]:
                    if sent.is_stored and (sent.begun > self.since or sent.n > self.first[sender]):
                        self.check_missing((sender, sent.n), "the end")


def query_of(resume: dict[str, Any]) -> str:
    return json.dumps(resume, separators=(",", ":"))
