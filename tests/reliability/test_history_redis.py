"""Redis fails over to a replica: what it has lost is announced, and never a silent hole."""

from __future__ import annotations

import asyncio
import collections
import os
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis.asyncio
from brokers import BrokerProcess, Proxy, running
from following import Follower
from rooms import QUIET, ROOM, Process, Rooms, Seat, reasons_of
from support import until

import pachinko_cluster
from pachinko import PachinkoError, Window
from pachinko_cluster import Redis, Stamp, read_broker, read_stamp


class Servers:
    """A primary, its replica, and a network that leads the apps to one of them."""

    def __init__(self, primary: BrokerProcess, replica: BrokerProcess, apps: Proxy) -> None:
        self.primary, self.replica, self.apps = primary, replica, apps

    async def synchronize(self) -> None:
        """Return when the replica has all that the primary has."""
        async with redis.asyncio.from_url(self.primary.url) as admin:
            assert await admin.wait(1, 10_000) == 1

    async def fail_over(self) -> None:
        """Kill the primary, and let the replica take its place."""
        self.primary.kill()
        async with redis.asyncio.from_url(self.replica.url) as admin:
            await admin.replicaof("NO", "ONE")
        self.apps.target = self.replica.port


class Scene(Rooms):
    """Processes, what was published, and who follows it."""

    def __init__(self, servers: Servers, replication: Proxy) -> None:
        super().__init__()
        self.servers, self.replication = servers, replication

    async def process(self) -> Process:
        process = Process(self.servers.apps.url("redis"))
        await self.serve(process)
        return process

    async def say(self, process: Process, count: int, *seats: Seat) -> None:
        """Send messages, and wait until they have come to *seats*."""
        for _ in range(count):
            sent = self.published.begin(ROOM, str(process.hub.process))
            await process.hub.send(ROOM, "said", sent.payload)
            sent.is_stored = True
            await until(lambda sent=sent: all(each.follower.has(sent) for each in seats))


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    at_once = ("--repl-diskless-sync-delay", "0")
    async with running("redis", *at_once) as primary, Proxy(primary.port) as replication:
        of_it = ("--replicaof", "127.0.0.1", str(replication.port))
        async with running("redis", *of_it) as replica, Proxy(primary.port) as apps:
            async with redis.asyncio.from_url(replica.url) as admin:
                while (await admin.info("replication"))["master_link_status"] != "up":
                    await asyncio.sleep(0.05)  # nobody tells when the replica is up
            scene = Scene(Servers(primary, replica, apps), replication)
            async with scene.stack:
                yield scene


@pytest.mark.parametrize("is_read", [True, False], ids=["read first", "sent first"])
@pytest.mark.parametrize("lost", [0, 5])
async def test_a_failover_is_announced(scene: Scene, lost: int, is_read: bool) -> None:
    """To those who are connected and to those who come back, whether or not it has lost something.

    The new primary gives the numbers of lost messages to others, so a position that counts for both
    would hide the hole.
    """
    one, two = await scene.process(), await scene.process()
    a = await scene.follow(one, Follower(scene.published, "a"))
    b = await scene.follow(two, Follower(scene.published, "b"))
    away = await scene.follow(two, Follower(scene.published, "away"))
    await scene.say(one, 3, a, b, away)
    await scene.servers.synchronize()
    scene.replication.silent = True
    await scene.say(two, lost, a, b, away)
    await scene.leave(away)
    await scene.servers.fail_over()
    await asyncio.gather(one.connected(), two.connected())
    if is_read:  # by a process that has known nothing before
        three = await scene.process()
        await scene.follow(three, away.follower)
        assert reasons_of(away.follower, ROOM) == reasons_of(away.follower, QUIET) == ["epoch"]
    await scene.say(one, lost + 3)
    if not is_read:
        await scene.follow(one, away.follower)
        assert reasons_of(away.follower, ROOM) == reasons_of(away.follower, QUIET) == ["epoch"]
    await scene.say(two, 1, a, b)
    for each in (a, b):
        assert reasons_of(each.follower, ROOM) == reasons_of(each.follower, QUIET) == ["epoch"]
    again = await scene.follow(two, b.follower.fork("again"))
    assert reasons_of(again.follower, ROOM) == ["epoch"]  # the one that it knows of
    for seat in (a, b, again):
        seat.follower.is_at_the_end = True
    scene.published.check(reasons=("epoch",))
    kept = [each async for each in one.hub.history(ROOM, last=100)]
    assert len(kept) == 3 + lost + 3 + 1  # The replica's own are not lost for those who look.


async def test_who_was_behind_at_a_failover_is_told(scene: Scene) -> None:
    """A position from before, good on the primary, is not taken for one of the replica."""
    one = await scene.process()
    a = await scene.follow(one, Follower(scene.published, "a"))
    await scene.say(one, 2, a)
    late = a.follower.fork("late")
    await scene.say(one, 3, a)
    await scene.servers.synchronize()
    await scene.servers.fail_over()
    await until(lambda: reasons_of(a.follower, ROOM))
    await scene.follow(one, late)
    assert reasons_of(late, ROOM) == ["epoch"]
    await scene.say(one, 2, a)
    scene.published.check(reasons=("epoch",))


async def test_a_replica_that_was_not_promoted_takes_nothing(scene: Scene) -> None:
    """The sender is told; clients get what is sent once it is promoted."""
    one = await scene.process()
    a = await scene.follow(one, Follower(scene.published, "a"))
    await scene.say(one, 1, a)
    await scene.servers.synchronize()
    scene.servers.primary.kill()
    scene.servers.apps.target = scene.servers.replica.port
    await one.connected()
    with pytest.raises(PachinkoError, match="this is a replica, give the address of the primary"):
        await one.hub.send(ROOM, "said", {"sender": "nobody", "n": 0})
    await scene.servers.fail_over()
    await scene.say(one, 2, a)
    scene.published.check(reasons=("epoch",))


class Lot:
    """What was kept in a Redis that loses keys by lot, and what its positions must be good for."""

    def __init__(self, url: str, seed: int) -> None:
        self.store, self.lot = Redis(read_broker(url)), random.Random(seed)
        self.admin = redis.asyncio.from_url(url)
        self.came: list[tuple[Stamp, bytes]] = []
        self.kept: dict[str, list[tuple[Stamp, bytes]]] = collections.defaultdict(list)
        self.places: dict[str, list[tuple[str, int, int]]] = collections.defaultdict(list)
        self.days = 0

    async def deliver(self, subject: str, data: bytes) -> None:
        stamp, data = read_stamp(data)
        assert stamp is not None
        self.came.append((stamp, data))

    async def keep(self, subject: str, n: int) -> None:
        """Each number is above all before, and names the last one, unless that is forgotten."""
        self.came.clear()
        window = Window(self.lot.choice([1, 2, 100]), self.lot.choice([0.03, 300.0]), 1)
        await self.store.keep(subject, b"{}%d" % n, window)
        await until(lambda: self.came)
        stamp, data = self.came.pop()
        assert data == b"{}%d" % n
        before = [each.number for each, _ in self.kept[subject] if each.epoch == stamp.epoch]
        assert stamp.previous in (0, *before[-1:]) and stamp.number > max(before, default=0)
        self.kept[subject].append((stamp, data))
        self.places[subject].append((stamp.epoch, stamp.number, self.days))

    async def read(self, subject: str, n: int) -> None:
        """What is missing is below the floor. A position of the last day has no gap for nothing."""
        count = self.lot.choice([1, 2, 100])
        past = await self.store.past(subject, count)
        numbers = [entry.number for entry in past.entries]
        mine = [stamp.number for stamp, _ in self.kept[subject] if stamp.epoch == past.epoch]
        texts = {(stamp.number, data) for stamp, data in self.kept[subject]}
        assert {(entry.number, entry.data) for entry in past.entries} <= texts
        assert numbers == sorted(numbers) and past.top >= max(mine, default=0)
        assert all(number <= past.floor for number in {*mine} - {*numbers})
        for epoch, number, day in self.places[subject]:
            is_all = all(each in numbers for each in mine if each > number)
            if epoch == past.epoch and is_all and count == 100 and self.days - day <= 1:
                assert past.floor <= number
        self.places[subject].append((past.epoch, past.top, self.days))

    async def forget(self, subject: str, n: int) -> None:
        """A day passes."""
        script, day = pachinko_cluster._KEEP, f"+ {pachinko_cluster._FORGET * 1000:.0f}"
        self.days += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pachinko_cluster, "_KEEP", script.replace(day, "- 1e12"))
            await self.store.agree("pachinko.history.rules", b"1", 60.0)

    async def lose(self, subject: str, n: int) -> None:
        patterns = ["*", "{pachinko}.kept", "{pachinko}.kept.tops", *[f"*.{subject}"] * 3]
        for key in await self.admin.keys(self.lot.choice(patterns)):
            await self.admin.delete(key)

    async def wait(self, subject: str, n: int) -> None:
        await asyncio.sleep(
            0.04
        )  # Redis, whose clock cannot be moved, lets the shorter windows end.


@pytest.mark.parametrize("seed", range(int(os.environ.get("PACHINKO_FAULT_EXAMPLES", "5"))))
async def test_no_message_is_missing_above_the_floor(seed: int) -> None:
    """Whatever Redis evicts, expires or forgets."""
    async with running("redis") as broker:
        lot = Lot(broker.url, seed)
        subjects = [f"pachinko.g.{n}" for n in range(3)]
        try:
            await lot.store.start(lot.deliver, lambda why: None)
            for subject in subjects:
                await lot.store.subscribe(subject)
            steps = [lot.keep] * 12 + [lot.read] * 8 + [lot.forget, lot.lose, lot.wait]
            for n in range(300):
                await lot.lot.choice(steps)(lot.lot.choice(subjects), n)
        finally:
            await lot.store.stop()
            await lot.admin.aclose()


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Any:
    """The log is full of what the test does to the broker."""
    caplog.set_level(100, "pachinko")
