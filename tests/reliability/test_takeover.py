"""A worker with ``once=True`` in processes that are stopped, killed and paused.

Each process says when its worker runs, by a clock that all of them share. `Cluster.check` holds
what is promised: never two at a time, and never none for longer than the docs say.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import pytest
from brokers import BrokerKind, BrokerProcess, running
from support import PATIENCE, until

import pachinko_cluster

PROMISED = 8.0  # seconds until another process has taken over
SLOWNESS = 2.0  # seconds that this machine may take for what takes none
APP = Path(__file__).with_name("lease_app.py")


@attrs.define(eq=False)
class Member:
    """A process, and when its worker has run."""

    process: asyncio.subprocess.Process
    ticks: list[float] = attrs.Factory(list)
    ends: int = 0
    is_ready: bool = False
    log: list[str] = attrs.Factory(list)

    async def read(self) -> None:
        assert self.process.stdout is not None
        while line := (await self.process.stdout.readline()).decode():
            what, _, when = line.strip().partition(" ")
            if what == "tick":
                self.ticks.append(float(when))
            elif what in ("end", "ready"):
                self.ends += what == "end"
                self.is_ready = True
            else:
                self.log.append(line)

    @property
    def runs(self) -> bool:
        """Whether the worker has run in the last half second."""
        return bool(self.ticks) and time.monotonic() - self.ticks[-1] < 0.5

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


class Cluster:
    """The processes of one app."""

    def __init__(self, broker: BrokerProcess, loop: str = "asyncio") -> None:
        self.broker, self.loop = broker, loop
        self.members: list[Member] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def add(self) -> Member:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(APP), "--loop", self.loop,
            env={**os.environ, "PACHINKO_BACKPLANE": self.broker.url},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        member = Member(process)
        self.members.append(member)
        self.tasks.append(asyncio.create_task(member.read()))
        await until(lambda: member.is_ready)
        return member

    async def runner(self, *others: Member) -> Member:
        """Wait until the worker runs in another process than *others*, and return that."""
        await until(lambda: any(each.runs for each in self.members if each not in others))
        return next(each for each in self.members if each.runs and each not in others)

    async def stop(self) -> None:
        for member in self.members:
            with contextlib.suppress(ProcessLookupError):
                member.process.kill()
            await member.process.wait()
        await asyncio.gather(*self.tasks)

    def turns(self) -> list[tuple[float, float, Member]]:
        """The first and the last tick of each time that the worker ran in one process."""
        ticks = sorted((tick, n) for n, each in enumerate(self.members) for tick in each.ticks)
        found: list[tuple[float, float, Member]] = []
        for tick, n in ticks:
            if found and found[-1][2] is self.members[n]:
                found[-1] = (found[-1][0], tick, self.members[n])
            else:
                found.append((tick, tick, self.members[n]))
        return found

    def check(self, turns: int, longest: float = PROMISED) -> None:
        """The worker ran in so many turns, one process after the other, without a long pause."""
        found = self.turns()
        assert len(found) == turns, [(a, b, self.members.index(m)) for a, b, m in found]
        for (_, ended, _), (began, _, _) in itertools.pairwise(found):
            assert began - ended <= longest + SLOWNESS


@contextlib.asynccontextmanager
async def cluster(kind: BrokerKind, size: int, loop: str = "asyncio") -> AsyncIterator[Cluster]:
    options = ("-js", "-sd", "store") if kind == "nats" else ()
    async with running(kind, *options) as broker:
        made = Cluster(broker, loop)
        try:
            for _ in range(size):
                await made.add()
            yield made
        finally:
            await made.stop()


async def test_a_process_that_stops_hands_over_at_once(kind: BrokerKind) -> None:
    """It gives the lease up when its worker has ended, and another one asks each second."""
    async with cluster(kind, 3) as them:
        first = await them.runner()
        first.signal(signal.SIGTERM)
        await them.runner(first)
        assert first.ends == 1
        them.check(turns=2, longest=1.0)


async def test_a_process_that_is_killed_is_replaced(kind: BrokerKind) -> None:
    """Its lease ends by itself."""
    async with cluster(kind, 3) as them:
        first = await them.runner()
        first.signal(signal.SIGKILL)
        second = await them.runner(first)
        second.signal(signal.SIGKILL)
        await them.runner(first, second)
        them.check(turns=3)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_a_process_that_is_paused_is_replaced(kind: BrokerKind, loop: str) -> None:
    """When it wakes, its worker is cancelled before it goes on."""
    if loop == "uvloop":
        pytest.importorskip("uvloop", reason="uvicorn brings it, but not everywhere")
    async with cluster(kind, 2, loop) as them:
        first = await them.runner()
        first.signal(signal.SIGSTOP)
        await them.runner(first)
        before = len(first.ticks)
        first.signal(signal.SIGCONT)
        await until(lambda: first.ends == 1)
        assert len(first.ticks) == before
        assert any("is stopped here, its lease is lost" in line for line in first.log)
        them.check(turns=2)


async def test_a_short_pause_changes_nothing(kind: BrokerKind) -> None:
    """A process that wakes in time renews its lease."""
    async with cluster(kind, 2) as them:
        first = await them.runner()
        for _ in range(3):
            first.signal(signal.SIGSTOP)
            await asyncio.sleep(2.0)  # the pause
            first.signal(signal.SIGCONT)
            await until(lambda: first.runs)
        them.check(turns=1)


async def test_a_process_alone_comes_back(kind: BrokerKind) -> None:
    """After a kill, the next process of the app waits for the end of the lease, no longer."""
    async with cluster(kind, 1) as them:
        first = await them.runner()
        first.signal(signal.SIGKILL)
        await them.add()
        await them.runner(first)
        them.check(turns=2)


async def test_no_two_run_while_the_broker_is_away(kind: BrokerKind) -> None:
    """Where its keys are lost, too, and whichever process finds it first."""
    async with cluster(kind, 3) as them:
        await them.runner()
        for pause in (0.0, 1.0, 3.0, pachinko_cluster.LEASE + 1):
            them.broker.kill()
            await asyncio.sleep(pause)  # the outage
            await them.broker.start()
            began = time.monotonic()
            await until(lambda began=began: any(each.ticks[-1:] > [began] for each in them.members))
        await asyncio.sleep(pachinko_cluster.LEASE)  # Until then another one may take it.
        turns = them.turns()
        for (_, ended, _), (began, _, _) in itertools.pairwise(turns):
            assert began - ended > 0.3  # which ticks of two at a time would not leave


async def test_pauses_at_any_moment(kind: BrokerKind) -> None:
    """Pauses of random length, some of two processes at once."""
    seed = int(os.environ.get("PACHINKO_FAULT_SEED", random.randrange(10**6)))
    draw = random.Random(seed)
    async with cluster(kind, 3) as them:
        await them.runner()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            paused = draw.sample(them.members, draw.randint(1, 2))
            await asyncio.sleep(draw.uniform(0, 3))
            for each in paused:
                each.signal(signal.SIGSTOP)
            await asyncio.sleep(draw.uniform(0, 10))
            for each in paused:
                each.signal(signal.SIGCONT)
        await until(lambda: any(each.runs for each in them.members))
        turns = them.turns()
        for (_, ended, _), (began, _, _) in itertools.pairwise(turns):
            assert 0.3 < began - ended < 3 * PROMISED + PATIENCE, f"seed {seed}"
