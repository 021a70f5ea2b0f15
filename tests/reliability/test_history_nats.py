"""NATS and its stream fail: what is missing is announced, and the rest is delivered."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nats
import pytest
from brokers import BrokerProcess, Proxy, running
from following import Follower
from rooms import QUIET, ROOM, WINDOW, Process, Rooms, Seat, reasons_of
from support import until

from pachinko import PachinkoError


class NetworkedProcess(Process):
    """A process that has a network to the broker of its own."""

    def __init__(self, network: Proxy) -> None:
        super().__init__(network.url("nats"))
        self.network = network


class Scene(Rooms):
    """A server, processes, what was published, and who follows it."""

    def __init__(self, broker: BrokerProcess) -> None:
        super().__init__()
        self.broker = broker

    async def process(self) -> NetworkedProcess:
        network = await self.stack.enter_async_context(Proxy(self.broker.port))
        process = NetworkedProcess(network)
        await self.serve(process)
        return process

    async def say(self, process: Process, count: int, *seats: Seat) -> None:
        """Send messages at once, and wait until those that are stored have come to *seats*."""
        sends = [self.published.begin(ROOM, str(process.hub.process)) for _ in range(count)]

        async def send(n: int) -> None:
            with contextlib.suppress(PachinkoError):
                await process.hub.send(ROOM, "said", sends[n].payload)
                sends[n].is_stored = True

        await asyncio.gather(*map(send, range(count)))
        stored = [sent for sent in sends if sent.is_stored]
        await until(lambda: all(seat.follower.has(sent) for seat in seats for sent in stored))

    async def delete(self) -> None:
        client = await nats.connect(self.broker.url)
        await client.jetstream().delete_stream("pachinko-kept")
        await client.close()


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with running("nats", "-js", "-sd", "store") as broker:
        scene = Scene(broker)
        async with scene.stack:
            yield scene


async def test_a_client_goes_on_in_any_process(scene: Scene) -> None:
    """With all that it has missed, by a process that has known nothing of the group before."""
    one, two = await scene.process(), await scene.process()
    a, away = [await scene.follow(one, Follower(scene.published, name)) for name in ("a", "away")]
    await scene.say(one, 3, a, away)
    await scene.leave(away)
    await scene.say(two, 5, a)
    for process in (two, await scene.process(), one):
        away = await scene.follow(process, away.follower)
        await scene.say(two, 2, a, away)
        await scene.leave(away)
        await scene.say(one, 2, a)
    away = await scene.follow(two, away.follower)
    scene.published.check(reasons=())


async def test_a_process_may_know_better_how_far_the_whole_is(scene: Scene) -> None:
    """A position that it has given, behind messages to other groups, is good in any process."""
    one, two = await scene.process(), await scene.process()
    seat = await scene.follow(one, Follower(scene.published, "a"))
    witness = await scene.follow(two, Follower(scene.published, "b"))
    await scene.leave(seat)
    sent = scene.published.begin(QUIET, "ada")
    await two.hub.send(QUIET, "said", sent.payload)
    await scene.say(two, 3, witness)
    for process in (await scene.process(), two, await scene.process()):
        seat = await scene.follow(process, seat.follower)
        await scene.leave(seat)
    assert seat.follower.at[QUIET] != witness.follower.at[QUIET]
    scene.published.check(reasons=())


async def test_what_a_process_missed_is_delivered(scene: Scene) -> None:
    """Its clients hear nothing of an outage, unless more was sent than the window holds."""
    one, two = await scene.process(), await scene.process()
    a = await scene.follow(one, Follower(scene.published, "a"))
    b = await scene.follow(two, Follower(scene.published, "b"))
    await scene.say(one, 2, a, b)
    for outages, count in ((1, 7), (2, 0), (3, WINDOW - 1)):
        two.network.refuses = True
        two.network.cut()
        await scene.say(one, count, a)
        two.network.refuses = False
        await two.connected(outages)
        await scene.say(two, 1, a, b)
    assert not reasons_of(b.follower)
    two.network.refuses = True
    two.network.cut()
    await scene.say(one, WINDOW + 5, a)
    two.network.refuses = False
    await until(lambda: reasons_of(b.follower))
    await scene.say(two, 1, a, b)
    assert not reasons_of(b.follower, QUIET) and not reasons_of(a.follower)
    scene.published.check(reasons=("expired", "broker"))


@pytest.mark.parametrize("loss", ["nothing", "all", "latest"])
async def test_a_server_that_is_killed(scene: Scene, loss: str) -> None:
    """With its store, everything goes on. What has lost something has another epoch, for all."""
    one, two = await scene.process(), await scene.process()
    a = await scene.follow(one, Follower(scene.published, "a"))
    b = await scene.follow(two, Follower(scene.published, "b"))
    await scene.say(one, 3, a, b)
    store = Path(scene.broker.folder.name) / "store"
    outages = 1
    if loss == "latest":
        scene.broker.kill()
        shutil.copytree(store, store.with_name("backup"))
        await scene.broker.start()
        await asyncio.gather(one.connected(), two.connected())
        outages = 2
    await scene.say(two, 3, a, b)
    away = b.follower.fork("away")
    busy = asyncio.create_task(scene.say(one, 60))
    await until(lambda: len(a.follower.heard[ROOM]) > 20)
    scene.broker.kill()
    await busy
    if loss != "nothing":
        shutil.rmtree(store)
    if loss == "latest":
        shutil.move(store.with_name("backup"), store)
    await scene.broker.start()
    await asyncio.gather(one.connected(outages), two.connected(outages))
    await scene.say(one, 2, a, b)
    back = await scene.follow(two, away)
    for seat in (a, b, back):
        gaps = [*reasons_of(seat.follower), *reasons_of(seat.follower, QUIET)]
        assert bool(gaps) is (loss != "nothing")
        seat.follower.is_at_the_end = True
    scene.published.check(reasons=() if loss == "nothing" else ("epoch", "broker"))


async def test_a_stream_is_deleted_while_all_send(scene: Scene) -> None:
    """Each member gets one gap of the group, and everything that is sent after that."""
    one, two = await scene.process(), await scene.process()
    a = await scene.follow(one, Follower(scene.published, "a"))
    b = await scene.follow(two, Follower(scene.published, "b"))
    await scene.say(one, 3, a, b)
    away = b.follower.fork("away")
    for _ in range(2):
        busy = [asyncio.create_task(scene.say(process, 10)) for process in (one, two)]
        await scene.delete()
        await asyncio.gather(*busy)
        await scene.say(two, 2, a, b)
    back = await scene.follow(one, away)
    assert reasons_of(back.follower) == ["epoch"]
    await scene.say(one, 1, a, b, back)
    scene.published.check(reasons=("epoch", "broker"))


async def test_a_slow_network_between(scene: Scene) -> None:
    """All have one order, and nobody misses anything."""
    one, two = await scene.process(), await scene.process()
    a = await scene.follow(one, Follower(scene.published, "a"))
    b = await scene.follow(two, Follower(scene.published, "b"))
    one.network.delay, two.network.delay = 0.05, 0.01
    await asyncio.gather(*(scene.say(each, 30, a, b) for each in (one, two)))
    scene.published.check(reasons=())


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Any:
    """The log is full of what the test does to the broker."""
    caplog.set_level(100, "pachinko")
