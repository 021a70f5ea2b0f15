"""Faults of the broker between processes, with real servers that are started and killed here.

Every fault happens to a `Scene`: two processes of an app with members in the same groups, and
numbered messages from both, before, during and after. `Scene.check` holds what is promised for all
of them. ``PACHINKO_FAULT_SEED=…`` repeats a run of the test that draws its faults by lot.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import traceback
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import websockets.exceptions
from brokers import BrokerKind, BrokerProcess, Proxy
from cluster_app import cluster_app
from support import PATIENCE, Client, connect, serving, until

import pachinko_cluster
from pachinko import Hub, Kind, PachinkoError

PROMISED = 5.0  # seconds for a send, to succeed or to fail
RED = "red"
BLUE = "blue.*.> \N{SNOWMAN}"  # full of what means something to a broker, or to a URL
SIDES = ("left", "right")
LOGGERS = ("pachinko", "asyncio", "nats", "redis", "falcon", "uvicorn")
EXPECTED_LOG = re.compile(
    r"; trying again \(|: connected, with \d+ subscriptions|^refused a message from the broker"
    r"|^rules were not renewed: ConnectionError"
)


@pytest.fixture(autouse=True)
def only_expected_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A fault is logged as such, and as nothing else: no bug, no exception that nobody saw."""
    for name in LOGGERS:
        caplog.set_level(logging.DEBUG, logger=name)
    yield
    gc.collect()
    unexpected = [
        f"{record.name}: {logging.Formatter().format(record)}"
        for record in caplog.get_records("call")
        if record.levelno >= logging.WARNING and not EXPECTED_LOG.search(record.getMessage())
    ]
    assert not unexpected, "\n".join(unexpected)


# What is sent, and what arrives


@attrs.define(eq=False)
class Sending:
    """One numbered message to a group."""

    sender: str
    group: str
    n: int
    phase: str
    """``before``, ``during`` or ``after`` the fault."""
    begun: int
    """When, on the scene's clock; senders call in the order of their numbers."""
    took: float = 0.0
    error: Exception | None = None
    acknowledged: bool = False


@attrs.define
class Stay:
    """The time of a member in a group: after its join had been answered, and before it left."""

    since: int
    """On the scene's clock."""
    start: int
    """In the member's log."""
    end: int | None = None


class Member:
    """A client that writes down what it gets."""

    def __init__(self, client: Client, side: str, user: str | None) -> None:
        self.client, self.side, self.user = client, side, user
        self.id = ""
        self.log: list[dict[str, Any]] = []
        self.stays: dict[str, Stay] = {}
        self.has_left = False
        self.questions = itertools.count(1)
        self.reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        with contextlib.suppress(websockets.exceptions.ConnectionClosed):
            async for text in self.client.socket:
                self.log.append(json.loads(text))

    async def ask(self, type: str, **payload: Any) -> Any:
        """The payload of the answer to a request; other messages may come in between."""
        id = next(self.questions)
        await self.client.send(type, payload, id)
        await until(lambda: any(each.get("id") == id for each in self.log) or self.reader.done())
        answer = next((each for each in self.log if each.get("id") == id), None)
        if answer is None:
            raise ConnectionError("the connection has ended")
        assert answer["type"] == f"{type}.reply", answer
        return answer.get("payload")

    def received(
        self, group: str | None, start: int = 0, end: int | None = None
    ) -> list[dict[str, Any]]:
        """The numbers and gaps of *group* in a part of the log."""
        return [
            each
            for each in self.log[start:end]
            if (each["type"] == "number" and each["group"] == group)
            or (each["type"] == "gap" and each["payload"]["group"] == group)
        ]

    def gaps(self, group: str | None, start: int = 0) -> int:
        return sum(each["type"] == "gap" for each in self.received(group, start))


async def meet(
    stack: contextlib.AsyncExitStack,
    url: str,
    side: str,
    groups: Collection[str] = (),
    user: str | None = None,
) -> Member:
    """A new client, which is in *groups*."""
    query = [("group", group) for group in groups] + ([("user", user)] if user else [])
    client = await stack.enter_async_context(connect(f"{url}?{urllib.parse.urlencode(query)}"))
    member = Member(client, side, user)
    await until(lambda: member.log)
    member.id = next(each for each in member.log if each["type"] == "welcome")["payload"]["id"]
    return member


def check_stay(log: list[dict[str, Any]], stay: Stay, group: str, sent: list[Sending]) -> None:
    """Nothing came twice or out of order, and nothing acknowledged is missing without a gap.

    *log* is of the numbers and gaps of *group* alone, from the beginning of the stay; *sent* all
    that was sent to it. What is missing behind the last number counts as on its way.
    """
    for sender in {each.sender for each in sent}:
        owed = [
            each.n
            for each in sent
            if each.sender == sender and each.acknowledged and each.begun > stay.since
        ]
        numbers = [
            each["payload"]["n"] if each["type"] == "number" else None  # a gap
            for each in log
            if each["type"] == "gap" or each["payload"]["sender"] == sender
        ]
        known = [n for n in numbers if n is not None]
        assert known == sorted(set(known)), f"{sender} in {group!r}: {known}"
        was_gap = False
        for n in numbers:
            if n is None:
                was_gap = True
                continue
            missing = [each for each in owed if each < n]
            assert was_gap or not missing, f"{sender} in {group!r}: {missing} lost before {n}"
            owed = [each for each in owed if each > n]
            was_gap = False


# The scene


@attrs.frozen
class Side:
    """A process of the app, in the loop of the test."""

    hub: Hub
    url: str


@attrs.define(eq=False)
class Scene:
    """Two processes of an app, left and right, and what happens to them and their clients."""

    kind: BrokerKind
    stack: contextlib.AsyncExitStack
    sides: dict[str, Side] = attrs.Factory(dict)
    members: list[Member] = attrs.Factory(list)
    sent: list[Sending] = attrs.Factory(list)
    clock: itertools.count[int] = attrs.Factory(lambda: itertools.count(1))
    numbers: itertools.count[int] = attrs.Factory(lambda: itertools.count(1))
    marks: dict[Member, int] = attrs.Factory(dict)
    """How much was in the logs when the fault began."""

    @property
    def hubs(self) -> list[Hub]:
        return [side.hub for side in self.sides.values()]

    @property
    def present(self) -> list[Member]:
        return [member for member in self.members if not member.has_left]

    # Clients

    async def enter(self, side: str, *groups: str, user: str | None = None) -> Member:
        """A new client, which has joined *groups* when it is in."""
        member = await meet(self.stack, self.sides[side].url, side, groups, user)
        since = next(self.clock)
        self.members.append(member)
        member.stays = {group: Stay(since, 0) for group in groups}
        return member

    async def join(self, member: Member, *groups: str) -> None:
        await member.ask("join", groups=groups)
        since = next(self.clock)
        member.stays |= {group: Stay(since, len(member.log)) for group in groups}

    async def leave(self, member: Member, *groups: str) -> list[Stay]:
        """Returns the stays that it has ended."""
        stays = [member.stays.pop(group) for group in groups]
        for stay in stays:
            stay.end = len(member.log)
        await member.ask("leave", groups=groups)
        return stays

    async def quit(self, member: Member) -> None:
        """Returns when its process knows that it has gone."""
        member.has_left = True
        hub = self.sides[member.side].hub
        await member.client.close()
        await until(lambda: member.id not in {conn.id for conn in hub.connections})

    async def come_and_go(self) -> None:
        """While a fault lasts, clients may come and join, leave a group, and go."""

        async def come_and_go(side: str) -> None:
            here = [each for each in self.present if each.side == side]
            await self.enter(side, RED, BLUE)
            await self.leave([each for each in here if len(each.stays) == 2][-1], BLUE)
            guest = await self.enter(side)
            await self.join(guest, RED)
            await self.quit(next(each for each in here if set(each.stays) == {RED}))

        await asyncio.gather(*map(come_and_go, SIDES))

    # Messages

    async def send(
        self, side: str, group: str, phase: str, patience: float | None = None
    ) -> Sending:
        """Send a number; what comes of it is written down. It is given up after *patience*."""
        loop = asyncio.get_running_loop()
        sending = Sending(side, group, next(self.numbers), phase, next(self.clock))
        self.sent.append(sending)
        begun = loop.time()
        try:
            async with asyncio.timeout(patience):
                await self.sides[side].hub.send(group, "number", {"sender": side, "n": sending.n})
            sending.acknowledged = True
        except (PachinkoError, TimeoutError) as exc:
            sending.error = exc
        sending.took = loop.time() - begun
        return sending

    async def burst(self, phase: str, count: int = 10) -> list[Sending]:
        """Numbers from both sides to both groups, all at the same time."""
        sends = [self.send(*each, phase) for each in itertools.product(SIDES, (RED, BLUE))]
        sends += [
            self.send(*each, phase)
            for each in itertools.product(SIDES, (RED, BLUE))
            for _ in range(count - 1)
        ]
        return await asyncio.gather(*sends)

    @contextlib.asynccontextmanager
    async def traffic(self) -> AsyncIterator[None]:
        """Numbers from both sides to both groups, one after the other, all the time."""
        is_over = False

        async def go_on(side: str, group: str) -> None:
            while not is_over:
                await self.send(side, group, "during")
                await asyncio.sleep(0.02)  # the pace of the traffic

        sending = [
            asyncio.create_task(go_on(*each)) for each in itertools.product(SIDES, (RED, BLUE))
        ]
        try:
            yield
        finally:
            is_over = True
            await asyncio.gather(*sending)

    # Faults

    async def away(self, *sides: str) -> None:
        """Wait until the sides have noticed that the broker is."""
        hubs = [self.sides[side].hub for side in sides or SIDES]
        await until(lambda: all(hub.stats()["broker_down"] for hub in hubs))

    async def back(self) -> None:
        await until(lambda: not any(hub.stats()["broker_down"] for hub in self.hubs))

    @contextlib.asynccontextmanager
    async def fault(
        self,
        *,
        gaps: int | dict[str, int] | None = 1,
        is_connected: bool = True,
        is_near: bool = True,
    ) -> AsyncIterator[None]:
        """Around a fault, which the body makes and ends: sends before and meanwhile; checks.

        *gaps*: of each member and group, or by side; None for those that a test counts. Without
        *is_connected* the broker is away at first. Without *is_near* it takes so long to answer
        that `presence` may not wait for all.
        """
        for member in self.members:
            now = next(self.clock)
            member.stays = {group: Stay(now, len(member.log)) for group in member.stays}
        self.marks = {member: len(member.log) for member in self.members}
        self.sent.clear()
        await self.burst("before")
        # A broker that is killed right now may have acknowledged messages that it has not handed
        # to the other side yet. Those are announced as lost. Behind a round trip of that side's
        # own they have been handed over.
        for side in SIDES:
            await self.send(side, RED, "during")
        assert all(each.acknowledged is is_connected for each in self.sent)
        async with self.traffic():
            yield
            await self.back()
        assert all(each.acknowledged for each in await self.burst("after"))
        await self.check(gaps, is_near)

    async def check(self, gaps: int | dict[str, int] | None, is_near: bool) -> None:
        """What holds after any fault."""
        self.check_sends()
        await self.check_reach()
        expected = gaps if isinstance(gaps, dict) else dict.fromkeys(SIDES, gaps)
        for member in self.present:
            for group, stay in member.stays.items():
                self.check_log(member, group, stay, expected[member.side])
            found = member.gaps(None, self.marks.get(member, 0))
            assert expected[member.side] is None or (
                found == (0 if member.stays else expected[member.side])  # who is in no group
            )
        await asyncio.gather(*(self.check_presence(group, is_near) for group in (RED, BLUE)))
        self.check_nobody_is_disconnected()

    def check_nobody_is_disconnected(self) -> None:
        """Clients go only by themselves."""
        assert not [member for member in self.present if member.reader.done()]
        assert not any(hub.stats()["evicted"] or hub.stats()["dropped"] for hub in self.hubs)

    def check_sends(self) -> None:
        """`send` succeeds, or fails with an error that names the broker, within the time."""
        for each in self.sent:
            assert each.took <= PROMISED, each
            assert each.acknowledged or each.error is not None
            if isinstance(each.error, PachinkoError):
                assert str(each.error).startswith(f"{self.kind}://127.0.0.1:"), each.error

    async def check_reach(self) -> None:
        """Every kind of subscription is back: each message arrives, once, behind the numbers."""
        mark = {"mark": next(self.clock)}
        sends: list[Awaitable[None]] = []
        for (_, side), (name, _) in itertools.permutations(self.sides.items()):
            there = [member for member in self.present if member.side == name]
            sends += [side.hub.send_to(member.id, "to-one", mark) for member in there]
            sends.append(side.hub.send_to_user(f"user of {name}", "to-user", mark))
        await asyncio.gather(*sends)
        await asyncio.gather(*(hub.broadcast("to-all", mark) for hub in self.hubs))

        async def arrived(member: Member) -> None:
            await until(lambda: len(self.marked(member, mark, "to-all")) >= 2)

        await asyncio.gather(*map(arrived, self.present))
        for member in self.present:
            assert len(self.marked(member, mark, "to-all")) == 2
            assert len(self.marked(member, mark, "to-one")) == 1
            assert len(self.marked(member, mark, "to-user")) == (member.user is not None)

    @staticmethod
    def marked(member: Member, mark: dict[str, Any], type: str) -> list[dict[str, Any]]:
        return [
            each
            for each in member.log
            if each["type"] == type and each["payload"]["mark"] == mark["mark"]
        ]

    def check_log(self, member: Member, group: str, stay: Stay, gaps: int | None) -> None:
        """Exactly so many gaps, behind all from before the fault and before all from after it."""
        log = member.received(group, stay.start)
        sent = [each for each in self.sent if each.group == group]
        check_stay(log, stay, group, sent)
        at = [index for index, each in enumerate(log) if each["type"] == "gap"]
        assert gaps is None or len(at) == gaps, (member.side, group, log)
        indices = {
            (each["payload"]["sender"], each["payload"]["n"]): index
            for index, each in enumerate(log)
            if each["type"] == "number"
        }
        for each in sent:
            if each.begun > stay.since and each.acknowledged and each.phase != "during":
                index = indices[each.sender, each.n]  # else it is lost
                assert not (each.phase == "before" and at) or index < at[0], each
                assert not (each.phase == "after" and at) or index > at[-1], each

    async def check_presence(self, group: str, is_near: bool = True) -> None:
        """Those who are there, and nobody else, as all processes see it."""
        there = [member for member in self.present if group in member.stays]
        expected = {(each.id, each.user, self.sides[each.side].hub.process) for each in there}

        async def look(hub: Hub) -> None:
            while True:
                found = await hub.presence(group)
                seen = {(each.id, each.user, each.process) for each in found}
                assert len(found) == len(seen) and seen <= expected
                if seen == expected or not is_near:  # else a process was too slow to answer
                    break

        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*map(look, self.hubs))


@contextlib.asynccontextmanager
async def cluster(left: str, right: str | None = None) -> AsyncIterator[Scene]:
    """Two processes of an app on the brokers of those URLs, each with its cast of clients."""
    urls = dict(zip(SIDES, (left, right or left), strict=True))
    kind: Any = left.partition(":")[0]
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(gc.collect)  # so that what is left open is told as this test's fault
        scene = Scene(kind, stack)
        for side in SIDES:  # in this order
            scene.sides[side] = Side(Hub(), "")

        async def start(side: str) -> None:
            hub = scene.sides[side].hub
            hub.configure(urls[side])
            server = await stack.enter_async_context(serving(cluster_app(hub), log_config=None))
            scene.sides[side] = Side(hub, f"{server.url}/ws")

        async def fill(side: str) -> None:
            await scene.enter(side, RED, BLUE, user=f"user of {side}")
            await scene.enter(side, RED, BLUE)
            await scene.enter(side, RED)
            await scene.enter(side)

        await asyncio.gather(*map(start, SIDES))
        await asyncio.gather(*map(fill, SIDES))
        yield scene


class Program:
    """The app in a process of its own, where a test needs one that it can kill or stop."""

    def __init__(self, url: str, *options: str) -> None:
        path = Path(__file__).with_name("cluster_app.py")
        self.process = subprocess.Popen(
            [sys.executable, str(path), *options],
            env={**os.environ, "PACHINKO_BACKPLANE": url}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.url = ""

    async def __aenter__(self) -> Program:
        assert self.process.stdout is not None
        port = await asyncio.to_thread(self.process.stdout.readline)
        self.url = f"ws://127.0.0.1:{int(port)}/ws"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)


def stop(process: subprocess.Popen[Any] | None) -> None:
    """Pause *process*; returns when all its threads stand still."""
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)


# The broker is away


async def test_a_broker_that_is_killed_and_started_again(
    broker: BrokerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """While it is away sends fail, clients come and go; then all is as before, with one gap."""
    async with cluster(broker.url) as scene:
        async with scene.fault():
            broker.kill()
            await scene.away()
            await scene.come_and_go()
            failed = await scene.burst("during")
            assert all(isinstance(each.error, PachinkoError) for each in failed)
            for hub in scene.hubs:
                with pytest.raises(PachinkoError):
                    await hub.presence(RED)
                with pytest.raises(PachinkoError):
                    await hub.broadcast("lost")
                with pytest.raises(PachinkoError):
                    await hub.send_to_user("user of left", "lost")
                with pytest.raises(PachinkoError):
                    await hub.close_group(RED)
            await broker.start()
        assert [hub.stats()["outages"] for hub in scene.hubs] == [1, 1]
        check_noticed_at_once(caplog)


async def test_a_broker_that_is_restarted_at_once(
    broker: BrokerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """So that the first attempt to connect again succeeds, or nearly; and that twice."""
    async with cluster(broker.url) as scene:
        for _ in range(2):
            async with scene.fault():
                broker.kill()
                await scene.away()
                await broker.start()
        assert [hub.stats()["outages"] for hub in scene.hubs] == [2, 2]
        check_noticed_at_once(caplog)


def check_noticed_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """A connection that has ended is known as such, and not for want of signs of life."""
    assert "no sign of life" not in caplog.text


async def test_a_broker_that_is_paused(broker: BrokerProcess) -> None:
    """Five seconds without an answer are an outage: whoever waits is told in time."""
    async with cluster(broker.url) as scene:
        loop = asyncio.get_running_loop()
        async with scene.fault():
            stop(broker.process)
            end = loop.time() + 5
            waiting = asyncio.create_task(scene.burst("during"))
            await scene.enter("left", RED, BLUE)  # the broker is not known to be away yet
            await scene.away()
            await scene.come_and_go()
            assert all(each.error is not None for each in await waiting)
            await asyncio.sleep(max(0, end - loop.time()))  # the fault itself
            broker.resume()


async def test_an_app_that_stops_while_the_broker_is_paused(broker: BrokerProcess) -> None:
    """It waits for the broker no longer than for a client."""
    async with cluster(broker.url) as scene:
        stop(broker.process)
        waiting = asyncio.create_task(scene.burst("during"))
        await asyncio.sleep(0)  # so that they have begun
    assert all(each.error is not None for each in await waiting)
    scene.check_sends()


async def test_a_broker_that_is_paused_shortly(broker: BrokerProcess) -> None:
    """One second without an answer is none: sends take longer, and nothing is lost."""
    async with cluster(broker.url) as scene, scene.fault(gaps=0):
        stop(broker.process)
        waiting = asyncio.create_task(scene.burst("during"))
        await asyncio.sleep(1)  # the fault itself
        broker.resume()
        assert all(each.acknowledged for each in await waiting)


async def test_a_broker_that_is_started_after_the_app(kind: BrokerKind) -> None:
    """The app starts all the same; its clients join, and hear of it when the broker is there."""
    broker = BrokerProcess(kind)
    try:
        async with cluster(broker.url) as scene:
            with pytest.raises(PachinkoError, match=f"^{kind}://127.0.0.1:"):
                async with Hub().open(broker.url):
                    pass
            async with scene.fault(is_connected=False):
                await scene.come_and_go()
                await broker.start()
            assert [hub.stats()["outages"] for hub in scene.hubs] == [0, 0]
    finally:
        broker.kill()
        broker.folder.cleanup()


async def test_a_broker_that_flaps(broker: BrokerProcess) -> None:
    """Killed three times in a row, also while processes connect again: a gap an outage at most."""
    async with cluster(broker.url) as scene:
        async with scene.fault(gaps=None):
            for pause in (0.0, 0.1, 0.3):
                await broker.restart()
                await asyncio.sleep(pause)  # the fault itself
            broker.kill()
            await scene.away()
            await broker.start()
        for member in scene.present:
            outages = scene.sides[member.side].hub.stats()["outages"]
            for group in member.stays or (None,):
                assert 1 <= member.gaps(group) <= outages


async def test_a_thousand_groups_are_restored(broker: BrokerProcess) -> None:
    """One client in as many groups as it may be: it gets a gap in each, and then everything."""
    groups = [f"group {n}" for n in range(1000)]
    async with cluster(broker.url) as scene:
        crowd = [await scene.enter(side) for side in SIDES]
        await asyncio.gather(*(scene.join(member, *groups) for member in crowd))
        hub = scene.sides["left"].hub
        await asyncio.gather(*(hub.send(group, "first") for group in groups))
        await scene.send("right", RED, "before")  # by now the right has been handed those
        broker.kill()
        await scene.away()
        await broker.start()
        await scene.back()
        await asyncio.gather(*(hub.send(group, "last") for group in groups))
        for member in crowd:
            await until(
                lambda log=member.log: sum(each["type"] == "last" for each in log) == len(groups)
            )
            by_group: dict[str, list[str]] = {}
            for each in member.log:
                group = each["payload"]["group"] if each["type"] == "gap" else each.get("group")
                if group is not None:
                    by_group.setdefault(group, []).append(each["type"])
            assert by_group == {group: ["first", "gap", "last"] for group in groups}
        for group in groups[::250]:
            assert {each.id for each in await hub.presence(group)} == {each.id for each in crowd}
        scene.check_nobody_is_disconnected()


async def test_what_a_busy_process_has_not_read_is_not_lost(broker: BrokerProcess) -> None:
    """Acknowledged messages that have come to a process before the broker went reach its members.

    The process has no time to read them before it has ended, and then reads both at once.
    """
    numbers = list(range(400))  # 70 KB: more than one read of a socket, and less than it holds
    async with cluster(broker.url) as scene, Program(broker.url) as program:
        members = [await meet(scene.stack, program.url, "program", (RED,)) for _ in range(5)]
        hub = scene.sides["left"].hub
        stop(program.process)
        for n in numbers:
            await hub.send(RED, "number", {"sender": "left", "n": n})
        for _ in range(50):
            await hub.send(BLUE, "trip")  # by then the broker has handed over those before
        broker.kill()
        await scene.away("left")
        program.process.send_signal(signal.SIGCONT)
        await members[0].ask("stats")  # it is awake
        await broker.start()
        for member in members:
            await until(lambda member=member: member.gaps(RED))
            received = [each["payload"].get("n") for each in member.received(RED)]
            assert received == [*numbers, None]


# The network between


async def test_a_slow_link(kind: BrokerKind, broker: BrokerProcess) -> None:
    """With 200 ms each way everything works, slowly: joins, sends, their order, restoring."""
    async with Proxy(broker.port) as near, Proxy(broker.port) as far:
        near.delay = far.delay = 0.2
        async with cluster(near.url(kind), far.url(kind)) as scene, scene.fault(is_near=False):
            late = await scene.enter("left", BLUE)
            sending = await scene.send("right", BLUE, "during")  # join and send: it arrives
            assert sending.acknowledged
            await until(lambda: sending.n in [e["payload"].get("n") for e in late.received(BLUE)])
            assert all(each.acknowledged for each in await scene.burst("during"))
            near.refuses = far.refuses = True
            near.cut()
            far.cut()
            await scene.away()
            await scene.come_and_go()
            near.refuses = far.refuses = False


async def test_a_link_that_is_cut_in_mid_stream(kind: BrokerKind, broker: BrokerProcess) -> None:
    """Only the process whose connection it was has an outage; the other misses nothing."""
    async with Proxy(broker.port) as near, Proxy(broker.port) as far:
        near.delay = 0.01
        async with cluster(near.url(kind), far.url(kind)) as scene:
            async with scene.fault(gaps={"left": 1, "right": 0}):
                bursts = [asyncio.create_task(scene.burst("during", 50)) for _ in range(3)]
                await asyncio.sleep(0.015)  # so that there is something under way
                near.cut()
                await scene.away("left")
                await asyncio.gather(*bursts)
            async with scene.fault(gaps={"left": 1, "right": 0}):
                near.refuses = True
                near.cut()
                await scene.away("left")
                await scene.come_and_go()
                sending = await scene.send("right", RED, "during")
                assert sending.acknowledged
                sending = await scene.send("left", RED, "during")
                assert sending.error is not None
                near.refuses = False


async def test_a_link_that_falls_silent(kind: BrokerKind, broker: BrokerProcess) -> None:
    """Nothing comes, and nothing says so: it is noticed, and given up for new connections."""
    async with (
        Proxy(broker.port) as near,
        Proxy(broker.port) as far,
        cluster(near.url(kind), far.url(kind)) as scene,
        scene.fault(),
    ):
        near.silent = far.silent = True
        waiting = asyncio.create_task(scene.burst("during"))
        await scene.away()
        await scene.come_and_go()
        assert all(each.error is not None for each in await waiting)
        near.silent = far.silent = False


async def test_sends_that_wait_for_the_broker_keep_their_order(
    kind: BrokerKind, broker: BrokerProcess
) -> None:
    """What has waited goes out before what is sent in the turn of the loop when it is back."""
    async with Proxy(broker.port) as proxy, cluster(proxy.url(kind), broker.url) as scene:
        sends: list[asyncio.Task[Sending]] = []

        class Back(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if record.getMessage().startswith(f"{kind}://127.0.0.1:{proxy.port}: connected"):
                    send()

        def send() -> None:
            sends.append(asyncio.create_task(scene.send("left", RED, "during")))

        handler, log = Back(), logging.getLogger("pachinko")
        async with scene.fault(gaps={"left": 1, "right": 0}):
            proxy.cut()
            await scene.away("left")
            for _ in range(20):
                send()
            log.addHandler(handler)
            try:
                await scene.back()
            finally:
                log.removeHandler(handler)
            for _ in range(20):
                send()
            assert len(sends) == 41
            await asyncio.gather(*sends)


# Who else is there


def login(kind: BrokerKind, password: str) -> tuple[str, ...]:
    """Options of a server that asks for *password*."""
    options = ("--user", "app", "--pass") if kind == "nats" else ("--requirepass",)
    return (*options, password)


async def test_a_wrong_password(kind: BrokerKind, caplog: pytest.LogCaptureFixture) -> None:
    """It is an outage like any other, which says why; and nowhere says the password."""
    wrong = "s3cret/p@ss%word"
    user = "app" if kind == "nats" else ""
    broker = BrokerProcess(kind, *login(kind, "another"))
    where = f"127.0.0.1:{broker.port}"
    url = f"{kind}://{user}:{urllib.parse.quote(wrong, safe='')}@{where}"
    try:
        await broker.start()
        async with cluster(url) as scene:
            errors: list[BaseException] = []
            for _ in range(3):
                with pytest.raises(PachinkoError) as caught:
                    async with Hub().open(url):
                        pass
                errors.append(caught.value)
            async with scene.fault(is_connected=False):
                await scene.come_and_go()
                sending = await scene.send("left", RED, "during")
                assert re.search("(?i)auth|password", str(sending.error)), sending.error
                broker.options = login(kind, wrong)
                await broker.restart()
            errors += [each.error for each in scene.sent if each.error is not None]
            async with scene.fault():  # and once it was right
                broker.options = login(kind, "another")
                await broker.restart()
                await scene.away()
                await scene.come_and_go()
                broker.options = login(kind, wrong)
                await broker.restart()
            errors += [each.error for each in scene.sent if each.error is not None]
        texts = [text for error in errors for text in told_by(error)]
        for record in caplog.get_records("call"):
            texts += [logging.Formatter().format(record), repr(record.__dict__)]
            texts += told_by(record.exc_info[1]) if record.exc_info else ()
        assert len(texts) > 10
        for secret in (wrong, urllib.parse.quote(wrong, safe=""), "s3cret"):
            assert not [text for text in texts if secret in text]
    finally:
        broker.kill()
        broker.folder.cleanup()


def told_by(error: BaseException | None) -> Iterable[str]:
    """All that a log or a debugger would show of an exception and of those behind it."""
    while error is not None:
        yield from (str(error), repr(error), *traceback.format_exception(error))
        error = error.__cause__ or error.__context__


async def test_a_process_that_is_killed(broker: BrokerProcess) -> None:
    """Its members are gone from `presence` at once; what it had sent is all there, in order."""
    async with cluster(broker.url) as scene, Program(broker.url) as program:
        ghosts = [
            await meet(scene.stack, program.url, "program", (RED, BLUE), "ghost") for _ in range(5)
        ]
        ids = {ghost.id for ghost in ghosts}
        teller = await meet(scene.stack, program.url, "program")

        async def tell() -> None:
            while True:
                begun = next(scene.clock)
                sending = Sending("program", RED, next(scene.numbers), "during", begun)
                scene.sent.append(sending)
                try:
                    await teller.ask("say", group=RED, sender="program", n=sending.n)
                except (websockets.exceptions.ConnectionClosed, ConnectionError) as exc:
                    sending.error = exc
                    return
                sending.acknowledged = True

        async with scene.fault(gaps=0):
            await until_present(scene.hubs, RED, ids)
            telling = asyncio.create_task(tell())
            await until(lambda: sum(each.sender == "program" for each in scene.sent) > 50)
            program.kill()
            for hub in scene.hubs:
                assert not ids & {each.id for each in await hub.presence(RED)}
            await telling
            await scene.sides["left"].hub.send_to(min(ids), "lost")
            await scene.sides["left"].hub.send_to_user("ghost", "lost")
            await scene.come_and_go()
        assert not [each for each in scene.sent if isinstance(each.error, PachinkoError)]


async def until_present(hubs: Iterable[Hub], group: str, ids: Collection[str]) -> None:
    """Wait until each of *hubs* shows *ids* in *group*; a process may be too slow to answer."""
    async with asyncio.timeout(PATIENCE):
        for hub in hubs:
            while not set(ids) <= {each.id for each in await hub.presence(group)}:
                pass


# Strangers

Publish = Callable[[str, bytes], Awaitable[object]]


@contextlib.asynccontextmanager
async def stranger(broker: BrokerProcess) -> AsyncIterator[Publish]:
    """Somebody else who publishes on the broker; what is published is there when it is left."""
    if broker.kind == "nats":
        import nats

        client = await nats.connect(broker.url, max_reconnect_attempts=0)
        try:
            yield client.publish
            await client.flush()
        finally:
            await client.close()
    else:
        import redis.asyncio

        other = redis.asyncio.Redis.from_url(broker.url)
        try:
            yield other.publish
        finally:
            await other.aclose()


KINDS = {"g": Kind.GROUP, "u": Kind.USER, "p": Kind.CONNECTION, "a": Kind.EVERYBODY}


def subjects(scene: Scene) -> dict[str, tuple[str, int]]:
    """A subject of each kind, and how many of the two processes have subscribed to it."""
    processes = [hub.process for hub in scene.hubs]
    names = {"g": (RED, 2), "u": ("user of left", 1), "p": (processes[0], 1), "a": ("all", 2)}
    return {
        kind: (pachinko_cluster.subject_of("pachinko", KINDS[kind], name), count)
        for kind, (name, count) in names.items()
    }


def header(**fields: Any) -> bytes:
    return json.dumps({"v": 1, "op": "send", "from": "0123456789ab", **fields}).encode()


def frame(**fields: Any) -> bytes:
    return json.dumps({"type": "rubbish", **fields}).encode()


def rubbish(scene: Scene, size: int) -> list[bytes]:
    """What is refused on every subject; the largest has *size* bytes."""
    other = scene.sides["right"].hub.process
    random_bytes = random.Random(5).randbytes
    return [
        # No header
        b"", b"\n", b"\n\n", b"\0" * 100, b"\xff\xfe\xfd", b"hello\n{}", b"null\n", b"[]\n",
        b"1\n", b"{}\n{}", b'{"v":1}\n', b'{"v":"1"}\n', b'{"v":1,"op":"send"}\n{}',
        b'{"v":1,"op":null,"from":"x"}\n{}', b'{"v":1,"op":"\xff","from":"x"}\n{}',
        b'{"v":1,"op":"send","from":"\\ud800"}\n{}', b"\x80\x04K\x01.",  # a pickle
        *(random_bytes(n) for n in range(1, 200, 20)), random_bytes(size), b"x" * size,
        b'{"v":1,"op":"' + b"x" * (size - 100), b"[" * size, b'{"a":' * (size // 5),
        b'{"v":1,"op":"send","from":"x","members":' + b"[" * 100_000,
        header()[:-1], header(session="1"), header(n=1.5), header(exclude="x"), header(exclude=[1]),
        header(members=[["x"]]), header(members=[[1, 2]]), header(code="x"), header(more=1),
        header(v=None), header(v=2.5), header(to=1),
        # A body that is none
        header(), header() + b"\n", header() + b"\nhello", header() + b"\n\xff\xfe",
        header() + b"\nnull", header() + b"\n[]", header() + b'\n{"payload":1}',
        header() + b'\n{"type":1}', header() + b'\n{"type":"x","group":1}',
        header() + b'\n{"type":"x","group":"another"}', header() + b'\n{"type":"x","payload":NaN}',
        header() + b'\n{"type":"x","payload":' + b"[" * 100_000, header() + b"\n" + b"x" * size,
        # An operation that is none, or not there
        header(op="") + b"\n", header(op="nonsense") + b"\n" + frame(), header(op="x" * 100_000),
        # Another's name
        header(**{"from": other}) + b"\nhello", header(**{"from": other}, op="nonsense", n=2**60),
        header(**{"from": ""}, op="nonsense"), header(**{"from": "*.>"}, op="nonsense"),
    ]  # fmt: skip


async def test_rubbish_is_refused_and_counted(broker: BrokerProcess) -> None:
    """Whatever a stranger publishes on our subjects, nobody notices, except in `stats`."""
    async with cluster(broker.url) as scene:
        before = sum(hub.stats()["refused"] for hub in scene.hubs)
        assert before == 0
        expected = 0
        async with scene.fault(gaps=0):
            async with stranger(broker) as publish:
                for subject, count in subjects(scene).values():
                    for data in rubbish(scene, 900_000):
                        await publish(subject, data)
                        expected += count
            await until(lambda: sum(hub.stats()["refused"] for hub in scene.hubs) >= expected)
            await scene.come_and_go()
            assert all(each.acknowledged for each in await scene.burst("during"))
        assert sum(hub.stats()["refused"] for hub in scene.hubs) == expected
        assert all(each.acknowledged for each in scene.sent)
        assert not [m for m in scene.members if any(e["type"] == "rubbish" for e in m.log)]
        assert [hub.stats()["outages"] for hub in scene.hubs] == [0, 0]


async def test_an_operation_in_the_wrong_place_is_refused(broker: BrokerProcess) -> None:
    """Groups are closed and asked, processes answered; anything else is refused."""
    wrong = {
        "g": [header(op="here"), header(op="close", code=99_999),
              header(op="close", reason="x" * 1000), header(op="close", reason="\ud800")],
        "u": [header(op=op) for op in ("here", "who", "close")],
        "p": [header(op=op) for op in ("who", "close")],
        "a": [header(op=op) for op in ("here", "who", "close")],
    }  # fmt: skip
    async with cluster(broker.url) as scene:
        expected = 0
        async with scene.fault(gaps=0):
            async with stranger(broker) as publish:
                for kind, (subject, count) in subjects(scene).items():
                    for data in wrong[kind]:
                        await publish(subject, data + b"\n")
                        expected += count
            await until(lambda: sum(hub.stats()["refused"] for hub in scene.hubs) >= expected)
        assert sum(hub.stats()["refused"] for hub in scene.hubs) == expected


async def test_a_body_that_is_no_utf8_is_refused(broker: BrokerProcess) -> None:
    """Also where nothing of the body is looked at, since it is text for clients."""
    bodies = [b'"payload":"\xff"', b'"payload":{"\xff":1}', b'"payload":[{"a":"\xed\xa0\x80"}]',
              b'"unknown":"\xff"', b'"unknown":{"\xc0\xaf":[]}']  # fmt: skip
    async with cluster(broker.url) as scene:
        async with scene.fault(gaps=0), stranger(broker) as publish:
            subject, count = subjects(scene)["g"]
            for body in bodies:
                await publish(subject, header() + b'\n{"type":"rubbish","group":"red",%b}' % body)
        assert sum(hub.stats()["refused"] for hub in scene.hubs) == len(bodies) * count


async def test_a_forged_name_silences_nobody(broker: BrokerProcess) -> None:
    """A stranger may speak in our name, but not make others deaf to us, or us to ourselves."""
    async with cluster(broker.url) as scene, scene.fault(gaps=0):
        process = scene.sides["left"].hub.process
        subjects = [("p", process, frame()), ("g", RED, frame(group=RED)), ("a", "all", frame())]
        for (kind, name, body), op, (session, n) in itertools.product(
            subjects, ("beat", "nonsense", "send"), ((0, 0), (1, 1), (1, 2**40), (2**40, 1))
        ):
            if op == "send" and session > 1:
                continue  # who can send as we do can also close everybody: no news to be silenced
            head = header(**{"from": process}, op=op, session=session, n=n)
            async with stranger(broker) as publish:
                await publish(
                    pachinko_cluster.subject_of("pachinko", KINDS[kind], name), head + b"\n" + body
                )
            await publish_is_handled(broker, scene)
            sends = await scene.burst("during", 2)
            assert all(each.acknowledged for each in sends), (kind, op, session, n)


async def publish_is_handled(broker: BrokerProcess, scene: Scene) -> None:
    """Wait until both processes have handled what a stranger has published."""
    refused = [hub.stats()["refused"] for hub in scene.hubs]
    async with stranger(broker) as publish:
        await publish(pachinko_cluster.subject_of("pachinko", Kind.EVERYBODY, "all"), b"a mark")
    await until(
        lambda: all(
            hub.stats()["refused"] > known for hub, known in zip(scene.hubs, refused, strict=True)
        )
    )


# Two versions


def newer(body: bytes = b"") -> bytes:
    """A message of a format that is not known yet."""
    return b'{"v":3,"kind":{"send":[]},"by":[1,2]}\n\x93\x01\x02' + body


async def test_a_run_of_messages_of_another_format_is_one_gap(broker: BrokerProcess) -> None:
    """Members are told once that they have missed something, and again after they missed none."""
    async with cluster(broker.url) as scene, stranger(broker) as publish:
        red, user, process, all_ = (subject for subject, _ in subjects(scene).values())
        members = {each: dict.fromkeys((RED, BLUE, None), 0) for each in scene.members}

        async def expect(gaps: dict[Member, dict[str | None, int]]) -> None:
            await publish_is_handled(broker, scene)
            await scene.check_reach()
            for member, by_group in gaps.items():
                assert {group: member.gaps(group) for group in by_group} == by_group

        for _ in range(5):
            await publish(red, newer())
        for member in members:
            members[member][RED] += RED in member.stays
        await expect(members)
        await scene.sides["left"].hub.send(BLUE, "other")
        await publish(red, newer())
        await expect(members)  # the run goes on
        await scene.sides["left"].hub.send(RED, "end")
        for _ in range(3):
            await publish(red, newer())
        for member in members:
            members[member][RED] += RED in member.stays
        await expect(members)
        for _ in range(3):
            await publish(process, newer())
        await expect(members)  # nobody is known to be meant
        for _ in range(3):
            await publish(user, newer())
        for member in members:
            members[member][None] += member.user == "user of left"
        await expect(members)
        for _ in range(3):
            await publish(all_, newer())
        for member in members:
            members[member][None] += 1
        await expect(members)
        async with scene.fault(gaps=0):
            pass
        assert [hub.stats()["outages"] for hub in scene.hubs] == [0, 0]


async def test_who_comes_within_a_run_of_another_format_is_told_as_well(
    broker: BrokerProcess,
) -> None:
    """Somebody who joins later misses the rest of the run; those who know are not told again."""
    async with cluster(broker.url) as scene, stranger(broker) as publish:
        red, _ = subjects(scene)["g"]
        early = next(member for member in scene.members if RED in member.stays)
        await publish(red, newer())
        await publish_is_handled(broker, scene)
        await until(lambda: early.gaps(RED))
        late = await scene.enter("left", RED)
        await publish(red, newer())
        await publish_is_handled(broker, scene)
        await scene.check_reach()
        assert (early.gaps(RED), late.gaps(RED)) == (1, 1)


async def test_a_run_of_another_format_is_forgotten_with_its_group(broker: BrokerProcess) -> None:
    """When the last member has left, nothing stays of it."""
    async with cluster(broker.url) as scene, stranger(broker) as publish:
        subject = pachinko_cluster.subject_of("pachinko", Kind.GROUP, "short-lived")
        hub = scene.sides["left"].hub
        member = await scene.enter("left")
        for gaps in (1, 2):
            await scene.join(member, "short-lived")
            await publish(subject, newer())
            await publish_is_handled(broker, scene)
            await scene.check_reach()
            assert member.gaps("short-lived") == gaps
            await scene.leave(member, "short-lived")
        relay = hub.state.relay
        assert isinstance(relay, pachinko_cluster.Cluster)
        assert (Kind.GROUP, "short-lived") not in relay._unread


async def test_processes_of_two_formats_side_by_side(broker: BrokerProcess) -> None:
    """While an update is rolled out each version serves its own clients; others are told."""
    async with cluster(broker.url) as scene, Program(broker.url, "--format", "3") as program:
        new = [await meet(scene.stack, program.url, "program", (RED,)) for _ in range(2)]
        old = [member for member in scene.members if RED in member.stays]
        for n in range(10):
            await new[0].ask("say", group=RED, sender="program", n=n)
        sent = [await scene.send("left", RED, "during") for _ in range(10)]
        await until(lambda: all(len(member.received(RED)) >= 11 for member in new + old))
        for member in new:
            numbers = [each["payload"].get("n") for each in member.received(RED)]
            assert numbers == [*range(10), None]
        for member in old:
            numbers = [each["payload"].get("n") for each in member.received(RED)]
            assert numbers == [None, *(each.n for each in sent)]
        assert set(await new[0].ask("presence", group=RED)) == {each.id for each in new}
        await scene.check_presence(RED)
        await scene.check_reach()
        stats = await new[0].ask("stats")
        assert (stats["outages"], stats["broker_down"], stats["evicted"]) == (0, 0, 0)
        assert not any(member.reader.done() for member in new)
        scene.check_nobody_is_disconnected()


# By lot


async def test_faults_at_any_moment(broker: BrokerProcess) -> None:
    """Clients that come and go, and all that is sent, while the broker is killed over and over."""
    seed = int(os.environ.get("PACHINKO_FAULT_SEED") or random.randrange(2**32))
    print(f"PACHINKO_FAULT_SEED={seed}")  # noqa: T201 - to repeat a failure
    lot = random.Random(seed)
    groups = [RED, BLUE, "green", "grey"]
    async with cluster(broker.url) as scene:
        crowd = [await scene.enter(side) for side in SIDES for _ in range(4)]
        ended: list[tuple[Member, str, Stay]] = []
        patience = [None] * 9 + [0.001]  # seconds, until a caller gives up
        is_over = False

        async def wander(member: Member) -> None:
            while not is_over:
                group = lot.choice(groups)
                if group in member.stays:
                    ended.extend((member, group, stay) for stay in await scene.leave(member, group))
                else:
                    await scene.join(member, group)
                await asyncio.sleep(lot.uniform(0, 0.1))  # the chance of this run

        async def talk(side: str) -> None:
            while not is_over:
                sends = (
                    scene.send(side, lot.choice(groups), "during", lot.choice(patience))
                    for _ in range(lot.randint(1, 5))
                )
                await asyncio.gather(*sends)
                await asyncio.sleep(lot.uniform(0, 0.02))  # the chance of this run

        work = [asyncio.create_task(wander(member)) for member in crowd]
        work += [asyncio.create_task(talk(side)) for side in SIDES * 2]
        for _ in range(4):
            await asyncio.sleep(lot.uniform(0.05, 0.6))  # the chance of this run
            broker.kill()
            await asyncio.sleep(lot.choice((0, 0.05, 0.3)))  # the chance of this run
            await broker.start()
        is_over = True
        await asyncio.gather(*work)
        broker.kill()
        await scene.away()  # so that there is one at the end which is known to be over
        await broker.start()
        await scene.back()
        for member in crowd:
            await scene.join(member, *(group for group in groups if group not in member.stays))
        last = [await scene.send(*each, "after") for each in itertools.product(SIDES, groups)]
        assert all(each.acknowledged for each in last)
        await scene.check_reach()
        scene.check_sends()
        scene.check_nobody_is_disconnected()
        stays = [(member, *each) for member in scene.present for each in member.stays.items()]
        for member, group, stay in ended + stays:
            sent = [each for each in scene.sent if each.group == group]
            check_stay(member.received(group, stay.start, stay.end), stay, group, sent)
        for member, group, _ in stays:
            numbers = [each["payload"].get("n") for each in member.received(group)]
            assert {each.n for each in last if each.group == group} <= set(numbers)
            assert member.gaps(group) <= scene.sides[member.side].hub.stats()["outages"]
        for group in groups:
            await scene.check_presence(group)
