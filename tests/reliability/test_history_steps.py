"""Nothing of a kept group is lost: whatever happens, in a simulation, step by step.

Each example is a list of steps: clients of two processes come, go, stall, come back with positions
that are theirs, old or invented, while messages are sent, time passes, and the broker, a link or a
process is lost. At the end all is checked (`following`). An example that fails shrinks.

``PACHINKO_FAULT_EXAMPLES=20000`` is the nightly form, with other examples each time.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import logging
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import falcon.asgi
import pytest
from following import Follower, Published, query_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import let_clients_join, turns

import pachinko
from pachinko import Connection, Hub, Pachinko, PachinkoError, simulate

EXAMPLES = int(os.environ.get("PACHINKO_FAULT_EXAMPLES", "40"))
IS_NIGHTLY = "PACHINKO_FAULT_EXAMPLES" in os.environ
ROUND = 500  # examples of one test, which pytest ends after two minutes
GROUPS = ("room:a", "room:b")
WINDOW = 6  # messages
SECONDS = 60.0
PROCESSES = 2

Step = tuple[Any, ...]


def make_app(url: str | None = None, messages: int = WINDOW) -> falcon.asgi.App[Any, Any]:
    """An app whose clients are in the groups of their query, and come and go in them."""
    hub = Hub()
    hub.configure(url)
    hub.keep("room:", messages=messages, seconds=SECONDS)
    app = falcon.asgi.App()
    ws = Pachinko(app, "/ws", hub=hub, overflow="replay", outbox=4, auth_timeout=1000.0)

    @ws.connect
    async def arrive(conn: Connection) -> None:
        for group in conn.req.get_param_as_list("group") or ():
            await conn.join(group)

    let_clients_join(ws)

    return app


@attrs.define(eq=False)
class Seat:
    """A client, which may be connected."""

    follower: Follower
    client: pachinko.Client | None = None
    taken: int = 0  # frames of *client*
    ids: Iterator[int] = attrs.Factory(itertools.count)
    # Groups that it leaves and joins again, by the ids of its requests; and whether it forgets its
    # position.
    rejoins: dict[Any, tuple[str, bool]] = attrs.Factory(dict)

    def read(self) -> None:
        """Take what has come."""
        if self.client is not None:
            for each in self.client.received[self.taken :]:
                self.taken += 1
                if each.id in self.rejoins:  # What comes of the group now is of the next join.
                    group, is_first = self.rejoins.pop(each.id)
                    self.follower.joins(group, is_first=is_first)
                    continue
                frame = {"type": each.type, "payload": each.payload, "group": each.group}
                self.follower.take({**frame, "at": each.at})


class Scene:
    """A simulation, and who follows the groups of it."""

    def __init__(self, sim: pachinko.Simulation, is_alone: bool) -> None:
        self.sim, self.is_alone = sim, is_alone
        self.processes: list[Any] = [sim]
        self.published = Published()
        self.seats = [Seat(Follower(self.published, f"client {n}")) for n in range(3)]
        self.forks: list[Seat] = []
        self.old: list[Follower] = []
        self.tasks: list[asyncio.Task[None]] = []

    def process(self, n: int) -> Any:
        return self.processes[n % len(self.processes)]

    # Steps

    async def send(self, process: int, group: str, count: int, by: int | None = None) -> None:
        """Begin to send; one message waits for the one before it."""
        client = None if by is None else self.seats[by].client
        excluded = client.conn.id if client is not None and client.end is None else None
        hub = self.process(process).hub
        sender = f"sender {len(self.tasks)}"

        async def work() -> None:
            for _ in range(count):
                sent = self.published.begin(group, sender, excluded)
                with contextlib.suppress(PachinkoError):
                    await hub.send(group, "said", sent.payload, exclude=excluded)
                    sent.is_stored = True

        self.tasks.append(asyncio.create_task(work()))

    async def connect(self, n: int, process: int, how: str) -> None:
        await self.cut(n)
        await self.enter(self.seats[n], process, how)

    async def enter(self, seat: Seat, process: int, how: str, *groups: str) -> None:
        """Connect, with what the client knows, in the query or in a message."""
        groups = groups or GROUPS
        query: Any = [("group", group) for group in groups]
        resume = seat.follower.resume
        query.append(("resume", "message" if how == "message" else query_of(resume)))
        seat.follower.joins(*groups)
        from urllib.parse import urlencode

        seat.taken = 0
        seat.rejoins.clear()
        seat.client = await self.process(process).connect("/ws", query=urlencode(query))
        if how == "message":
            await seat.client.send_text(json.dumps({"type": "resume", "payload": resume}))

    async def cut(self, n: int) -> None:
        seat = self.seats[n]
        if seat.client is not None:
            seat.read()
            if seat.client.end is None:
                seat.client.cut()
            seat.client = None

    async def stall(self, n: int) -> None:
        if (client := self.seats[n].client) is not None:
            client.stall()

    async def go(self, n: int) -> None:
        if (client := self.seats[n].client) is not None:
            client.resume()

    async def rejoin(self, n: int, group: str, resumes: bool) -> None:
        """Leave a group, and join it again, with or without a position."""
        seat = self.seats[n]
        if seat.client is None or seat.client.end is not None:
            return
        if resumes:  # It reads everything, or a position would be older than what it gets.
            seat.client.resume()
            await self.settle()
        id = next(seat.ids)
        seat.rejoins[id] = group, not resumes
        await seat.client.send("leave", group, id=id)
        await self.settle()
        if seat.client.end is None and resumes:
            resume = seat.follower.resume
            await seat.client.send_text(json.dumps({"type": "resume", "payload": resume}))
        if seat.client.end is None:
            await seat.client.send("join", group)

    async def twice(self, n: int, first: int, second: int) -> None:
        """Two clients come with the same position."""
        await self.cut(n)
        fork = Seat(self.seats[n].follower.fork(f"fork {len(self.forks)} of client {n}"))
        self.forks.append(fork)
        await asyncio.gather(
            self.enter(self.seats[n], first, "query"), self.enter(fork, second, "query")
        )

    async def save(self, n: int) -> None:
        """Keep what a client knows, for somebody who comes later."""
        self.seats[n].read()
        self.old.append(self.seats[n].follower.fork(f"old {len(self.old)} of client {n}"))

    async def restore(self, process: int) -> None:
        """Come with old positions."""
        if self.old:
            fork = Seat(self.old.pop(0))
            self.forks.append(fork)
            await self.enter(fork, process, "query")

    async def invent(self, process: int, what: str, group: str) -> None:
        """Come with a position that was never given to anybody."""
        at = what
        if what.startswith(("+", "-")):
            try:
                top = await self.process(process).hub.position(group)
            except PachinkoError:  # The broker is away.
                return
            epoch, _, number = top.rpartition(".")
            at = f"{epoch}.{int(number) + int(what)}"
        seat = Seat(Follower(self.published, f"inventor {len(self.forks)}", {group: at}))
        self.forks.append(seat)
        await self.enter(seat, process, "query", group)

    async def turns(self, count: int) -> None:
        await turns(count)

    async def settle(self) -> None:
        await self.sim.settle()
        for seat in self.seats + self.forks:
            seat.read()

    async def advance(self, seconds: float) -> None:
        await self.sim.advance(seconds)

    async def lose(self) -> None:
        if not self.is_alone:
            self.sim.broker.lose()

    async def find(self) -> None:
        if not self.is_alone:
            self.sim.broker.restore()

    async def unlink(self, process: int) -> None:
        """One process loses its connection to the broker."""
        if not self.is_alone:
            connections = [*self.sim.broker.connections]
            if connections:
                connections[process % len(connections)].cut("a test wants it")

    async def end(self) -> None:
        """Let everybody come back, and have all; check it."""
        await self.find()
        await self.settle()
        for n, seat in enumerate(self.seats):
            if seat.client is None or seat.client.end is not None:
                await self.connect(n, n, "query")
            elif seat.client is not None:
                seat.client.resume()
        await self.settle()
        for n in range(len(self.processes)):
            for group in GROUPS:
                await self.send(n, group, 1)
        await asyncio.gather(*self.tasks)
        await self.settle()
        for seat in self.seats + self.forks:
            assert seat.client is None or seat.client.end is None, seat.client.end
            seat.follower.is_at_the_end = seat.client is not None
            assert not seat.follower.other, seat.follower.other


async def test_nothing_is_lost_while_a_thousand_others_resume() -> None:
    """All come at once, with positions of any age, and invented ones; some are cut at once."""
    async with simulate(functools.partial(make_app, messages=100)) as sim:
        scene = Scene(sim, is_alone=False)
        scene.processes.append(await sim.process())
        known, lot = list[tuple[str, str]](), random.Random(0)
        for n in range(20):
            group = GROUPS[n % 2]
            known.append((group, await sim.hub.position(group)))
            await scene.send(n, group, 1)
            await scene.settle()
        for n in range(1000):
            group, at = lot.choice(known)
            crowd = Follower(scene.published, f"other {n}", {group: at})
            if n % 10 == 0:
                crowd.at[group], crowd.excuses = lot.choice(["x.1", f"{at}000000", "?"]), ("epoch",)
            scene.forks.append(Seat(crowd))
        entering = [
            asyncio.create_task(scene.enter(seat, n, "query", *seat.follower.at))
            for n, seat in enumerate(scene.forks)
        ]
        for n in range(3):
            await scene.connect(n, n, "query")
            await scene.send(n, GROUPS[n % 2], 20)
            await scene.cut(n)
        await scene.lose()
        await asyncio.gather(*entering)
        for seat in scene.forks[::7]:
            if seat.client is not None:
                seat.client.cut()
                seat.read()
                seat.client = None
        await scene.end()
        scene.published.check(reasons=())


clients = st.integers(0, 2)
processes = st.integers(0, PROCESSES - 1)
groups = st.sampled_from(GROUPS)
ALONE = (
    st.tuples(st.just("send"), processes, groups, st.integers(1, WINDOW + 2), st.none() | clients),
    st.tuples(st.just("send"), processes, groups, st.integers(1, 3), st.none() | clients),
    st.tuples(st.just("connect"), clients, processes, st.sampled_from(["query", "message"])),
    st.tuples(st.just("connect"), clients, processes, st.sampled_from(["query", "message"])),
    st.tuples(st.just("cut"), clients),
    st.tuples(st.just("stall"), clients),
    st.tuples(st.just("go"), clients),
    st.tuples(st.just("rejoin"), clients, groups, st.booleans()),
    st.tuples(st.just("twice"), clients, processes, processes),
    st.tuples(st.just("save"), clients),
    st.tuples(st.just("restore"), processes),
    st.tuples(
        st.just("invent"), processes, st.sampled_from(["?", "x", "x.1", "+1", "-1", "-4", "+99"]),
        groups,
    ),
    st.tuples(st.just("turns"), st.integers(1, 30)),
    st.tuples(st.just("settle")),
    st.tuples(st.just("advance"), st.sampled_from([1.0, SECONDS / 2, SECONDS + 1])),
)  # fmt: skip
A, B = GROUPS
LIVES: list[list[Step]] = [  # which examples by chance seldom have
    [  # A slow client reads on from the ring.
        ("connect", 0, 0, "query"), ("settle",), ("stall", 0), ("send", 0, A, 6, None),
        ("settle",), ("go", 0), ("settle",), ("send", 0, A, 1, None),
    ],
    [  # A position is good for one join.
        ("connect", 0, 0, "query"), ("send", 0, A, 2, None), ("settle",), ("cut", 0),
        ("send", 0, A, 1, None), ("settle",), ("connect", 0, 0, "query"), ("settle",),
        ("send", 0, A, 2, None), ("settle",), ("rejoin", 0, A, False), ("settle",),
    ],
    [  # What was dropped before a pause is told behind it.
        ("connect", 0, 0, "query"), ("send", 0, A, 1, None), ("settle",), ("save", 0),
        ("send", 0, A, 2, None), ("settle",), ("advance", SECONDS + 1), ("send", 0, A, 1, None),
        ("settle",), ("restore", 0),
    ],
    [  # Who leaves while it catches up, and joins again, gets nothing by its first join.
        ("connect", 0, 0, "query"), ("settle",), ("stall", 0), ("send", 0, A, 6, None),
        ("settle",), ("rejoin", 0, A, False), ("send", 0, A, 2, None), ("settle",), ("go", 0),
        ("settle",), ("send", 0, A, 2, None),
    ],
    [  # The same before its verdict.
        ("connect", 0, 0, "query"), ("settle",), ("cut", 0), ("send", 0, A, 4, None),
        ("settle",), ("connect", 0, 0, "query"), ("stall", 0), ("settle",),
        ("rejoin", 0, A, False), ("send", 0, A, 2, None), ("settle",), ("go", 0), ("settle",),
    ],
]  # fmt: skip
BROKEN = (
    st.tuples(st.just("lose")),
    st.tuples(st.just("find")),
    st.tuples(st.just("unlink"), processes),
    st.tuples(st.just("unlink"), processes),
)


async def play(steps: list[Step], is_alone: bool) -> None:
    """Do *steps* in a simulation, and check what everybody has heard."""
    make: Callable[[], Any] = (lambda: make_app("memory://")) if is_alone else make_app
    async with simulate(make) as sim:
        scene = Scene(sim, is_alone)
        if not is_alone:
            scene.processes.append(await sim.process())
        for name, *args in steps:
            await getattr(scene, name)(*args)
        await scene.end()
        outage = () if is_alone else ("broker",)
        scene.published.check(reasons=("expired", "overflow", "epoch", *outage))


def lives(test: Any) -> Any:
    """Play `LIVES` as well."""
    for steps in LIVES:
        test = example(steps)(test)
    return test


def options(count: int) -> Any:
    return settings(
        max_examples=min(count, ROUND), deadline=None, derandomize=not IS_NIGHTLY, database=None,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip


@pytest.mark.parametrize("round", range(-(-EXAMPLES // ROUND)))
def test_nothing_is_lost_in_one_process(round: int) -> None:
    """Whatever clients do, each has what was published, or is told what not."""

    @options(EXAMPLES)
    @lives
    @given(st.lists(st.one_of(*ALONE), max_size=25))
    def run(steps: list[Step]) -> None:
        asyncio.run(play(steps, is_alone=True))

    run()


@pytest.mark.parametrize("round", range(-(-EXAMPLES // ROUND)))
def test_nothing_is_lost_in_two_processes(round: int, caplog: pytest.LogCaptureFixture) -> None:
    """The same holds beside another process, over outages of the broker."""
    caplog.set_level(logging.CRITICAL, "pachinko")

    @options(EXAMPLES)
    @lives
    @given(st.lists(st.one_of(*ALONE, *BROKEN), max_size=25))
    def run(steps: list[Step]) -> None:
        asyncio.run(play(steps, is_alone=False))

    run()
