"""The broker in memory: its connections, and several hubs on it in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from support import PATIENCE, serving, until
from test_cluster import Process, Said, text
from test_leases import Scene

import pachinko
import pachinko_cluster
from pachinko import Backplane, Hub, MovableClock, NoAnswer, PachinkoError, from_companion
from pachinko_cluster import SimulatedBroker, SimulatedConnection

Calls = Callable[[SimulatedConnection], Awaitable[object]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> MovableClock:
    """A clock that can be moved, in the place of the library's."""
    moved = MovableClock()
    monkeypatch.setattr(pachinko, "clock", moved)
    return moved


class Member:
    """A connection to a broker, and what has come by it."""

    def __init__(self, broker: SimulatedBroker) -> None:
        self.connection = broker.connection()
        self.came: list[tuple[str, bytes]] = []
        self.lost: list[BaseException | None] = []

    async def deliver(self, subject: str, data: bytes) -> None:
        self.came.append((subject, data))

    async def start(self, *subjects: str) -> Member:
        await self.connection.start(self.deliver, self.lost.append)
        for subject in subjects:
            await self.connection.subscribe(subject)
        return self

    async def publish(self, subject: str, data: bytes = b"") -> int:
        return await self.connection.publish(subject, data)


@contextlib.asynccontextmanager
async def members(broker: SimulatedBroker, count: int = 2) -> AsyncIterator[list[Member]]:
    """Connections that have subscribed to ``a``. At the end, none of their tasks is left."""
    before = asyncio.all_tasks()
    some = [await Member(broker).start("a") for _ in range(count)]
    try:
        yield some
    finally:
        for member in some:
            await member.connection.stop()
    assert asyncio.all_tasks() == before


async def turns(count: int = 5) -> None:
    """Let the loop run what is ready, and what that makes ready."""
    for _ in range(count):
        await asyncio.sleep(0)


async def nothing(subject: str, data: bytes) -> None: ...
def ignore(why: BaseException | None) -> None: ...


# Connections


def test_the_module_finds_it_in_its_companion() -> None:
    """`simulate` loads it by its name; a connection is a backplane."""
    assert from_companion("SimulatedBroker", "sim.broker") is SimulatedBroker
    backplane: Backplane = SimulatedBroker().connection()
    Hub().configure(backplane)


async def test_a_message_goes_to_who_has_subscribed() -> None:
    """The sender, too; the number of receivers is returned, and all of them get it in one turn."""
    async with members(SimulatedBroker()) as (one, two):
        await two.connection.subscribe("b")
        assert await one.publish("a", b"1") == 2
        assert await one.publish("b", b"2") == 1
        assert await one.publish("c", b"3") == 0
        assert one.came == two.came == []
        await asyncio.sleep(0)
        assert one.came == [("a", b"1")] and two.came == [("a", b"1"), ("b", b"2")]


async def test_a_subscription_counts_when_a_message_is_published() -> None:
    """A later one gets nothing of it, and one that ends later gets it; two are as good as one."""
    async with members(SimulatedBroker()) as (one, two):
        await one.connection.subscribe("a")
        await one.publish("a", b"1")
        await one.connection.unsubscribe("a")
        await one.connection.unsubscribe("a")
        assert await two.publish("a", b"2") == 1
        await one.connection.subscribe("a")
        await turns()
        assert one.came == [("a", b"1")]
        assert two.came == [("a", b"1"), ("a", b"2")]


async def test_messages_are_delivered_one_after_the_other() -> None:
    """In the order of their publishing, however long one takes; others do not wait for that."""
    broker = SimulatedBroker()
    async with members(broker, 1) as (one,):
        slow, goes_on, log = broker.connection(), asyncio.Event(), list[bytes]()

        async def deliver(subject: str, data: bytes) -> None:
            log.append(data)
            await goes_on.wait()
            log.append(data)

        await slow.start(deliver, one.lost.append)
        await slow.subscribe("a")
        for n in range(3):
            await (slow if n == 1 else one.connection).publish("a", b"%d" % n)
        await turns()
        assert log == [b"0"] and len(one.came) == 3
        goes_on.set()
        await turns()
        assert log == [b"0", b"0", b"1", b"1", b"2", b"2"]
        await slow.stop()


async def test_a_delivery_has_no_context_of_a_sender() -> None:
    """Nor that of whoever has connected."""
    var = contextvars.ContextVar[str]("var")
    seen: list[str] = []
    broker = SimulatedBroker()
    connection = broker.connection()

    async def deliver(subject: str, data: bytes) -> None:
        seen.append(var.get("none"))

    var.set("mine")
    await connection.start(deliver, ignore)
    await connection.subscribe("a")
    await connection.publish("a", b"")
    await turns()
    await connection.stop()
    assert seen == ["none"]


async def test_nothing_is_delivered_after_the_stop() -> None:
    """A delivery in progress is cancelled, and has ended; stopping again changes nothing."""
    broker, log = SimulatedBroker(), list[bytes]()
    connection = broker.connection()

    async def deliver(subject: str, data: bytes) -> None:
        try:
            log.append(data)
            await asyncio.Event().wait()
        finally:
            await turns()
            log.append(b"end")

    await connection.stop()
    await connection.start(deliver, ignore)
    await connection.subscribe("a")
    for data in (b"1", b"2"):
        await connection.publish("a", data)
    await turns()
    for _ in range(2):
        await connection.stop()
        assert log == [b"1", b"end"]
    assert not broker.connections


async def test_a_delivery_that_catches_its_cancellation_is_the_last() -> None:
    """The next connection has a queue of its own."""
    broker, log = SimulatedBroker(), list[bytes]()
    connection = broker.connection()

    async def deliver(subject: str, data: bytes) -> None:
        log.append(data)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    before = asyncio.all_tasks()
    for data in (b"1", b"2"):
        await connection.start(deliver, ignore)
        await connection.subscribe("a")
        await connection.publish("a", data)
        await connection.publish("a", b"late")
        await turns()
        await connection.stop()
    assert log == [b"1", b"2"] and asyncio.all_tasks() == before


@pytest.mark.parametrize("end", ["lose", "kill", "stop"])
async def test_a_delivery_may_end_its_own_connection(end: str) -> None:
    """It is the last one, and the task ends with it."""
    broker, log, before = SimulatedBroker(), list[bytes](), asyncio.all_tasks()
    connection = broker.connection()

    async def deliver(subject: str, data: bytes) -> None:
        log.append(data)
        if end == "lose":
            broker.lose()
        elif end == "kill":
            connection.kill()
        else:
            await connection.stop()

    await connection.start(deliver, ignore)
    await connection.subscribe("a")
    for data in (b"1", b"2"):
        await connection.publish("a", data)
    await turns()
    assert log == [b"1"] and not broker.connections and asyncio.all_tasks() == before


# Loss


CALLS: list[Calls] = [
    lambda connection: connection.publish("a", b""),
    lambda connection: connection.subscribe("a"),
    lambda connection: connection.lease("a", "b", 1.0),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("why", ["new", "lost", "restored", "killed", "stopped"])
async def test_a_call_without_a_connection_fails(call: Calls, why: str) -> None:
    """At once, with the error of the system that the link expects."""
    broker = SimulatedBroker()
    async with members(broker, 1) as (one,):
        connection = broker.connection() if why == "new" else one.connection
        if why == "killed":
            connection.kill()
        elif why == "stopped":
            await connection.stop()
        elif why != "new":
            broker.lose()
        if why == "restored":
            broker.restore()
        with pytest.raises(OSError, match="not connected"):
            await call(connection)
        await connection.unsubscribe("a")


async def test_a_loss_is_told_to_each_connection() -> None:
    """Once; what was not delivered is gone, with all subscriptions, and none is accepted."""
    broker = SimulatedBroker()
    assert broker.is_there.is_set()
    async with members(broker) as some:
        await some[0].publish("a", b"gone")
        for _ in range(2):
            broker.lose()
        assert not broker.is_there.is_set()
        await turns()
        for member in some:
            assert [type(exc) for exc in member.lost] == [ConnectionResetError]
            with pytest.raises(OSError, match="the simulated broker is lost"):
                await member.start()
        for _ in range(2):
            broker.restore()
        assert broker.is_there.is_set()
        for member in some:
            await member.start()
        assert await some[0].publish("a") == 0
        await some[1].connection.subscribe("a")
        assert await some[0].publish("a", b"new") == 1
        await turns()
        assert some[0].came == [] and some[1].came == [("a", b"new")]
        assert len(some[0].lost) == len(some[1].lost) == 1


async def test_who_is_told_may_do_anything() -> None:
    """Restore the broker, or kill another process."""
    broker = SimulatedBroker()
    async with members(broker, 3) as (one, two, three):
        await one.connection.stop()

        def lost(why: BaseException | None) -> None:
            two.connection.kill()
            broker.lose()
            broker.restore()

        await one.connection.start(nothing, lost)
        await two.connection.stop()
        await two.start()
        broker.lose()
        assert broker.is_there.is_set() and not broker.connections
        assert len(two.lost) == len(three.lost) == 1


def test_a_broker_may_be_lost_without_a_loop() -> None:
    """Also before anybody has connected."""
    broker = SimulatedBroker()
    broker.lose()
    broker.connection().kill()
    broker.restore()
    assert broker.is_there.is_set()


async def test_a_killed_process_is_gone_for_ever() -> None:
    """Nothing more goes to it or comes from it; the others notice nothing but the number."""
    broker = SimulatedBroker()
    async with members(broker) as (one, two):
        await two.publish("a", b"1")
        for _ in range(2):
            one.connection.kill()
        assert await two.publish("a", b"2") == 1
        await turns()
        assert [str(exc) for exc in one.lost] == ["the process has been killed"]
        assert one.came == [] and two.came == [("a", b"1"), ("a", b"2")] and two.lost == []
        broker.lose()
        broker.restore()
        with pytest.raises(OSError, match="the simulated broker is lost"):
            await one.start()
        assert len(one.lost) == 1


async def ends(task: asyncio.Task[Any]) -> bool:
    """Whether *task* has ended by itself; it is cancelled if not."""
    await turns()
    has_ended = task.done()
    task.cancel()
    await asyncio.wait([task])
    return has_ended


async def refused(member: Member) -> None:
    with pytest.raises(OSError, match="lost"):
        await member.start()


async def test_the_first_attempt_after_a_loss_comes_at_once() -> None:
    """The next one when the broker is there again, and after that again at once."""
    broker = SimulatedBroker()
    async with members(broker, 1) as (one,):
        pause = one.connection.pause
        for _ in range(2):
            broker.lose()
            assert await ends(asyncio.ensure_future(pause(60.0)))
            await refused(one)
            assert not await ends(asyncio.ensure_future(pause(60.0)))
            waiting = asyncio.ensure_future(pause(60.0))
            await turns()
            broker.restore()
            assert await ends(waiting)
            await one.start()


async def test_a_process_waits_again_when_the_broker_is_lost_again() -> None:
    """A restored broker that is lost before anybody connects refuses, and does not keep us busy."""
    broker = SimulatedBroker()
    async with members(broker, 1) as (one,):
        broker.lose()
        await refused(one)
        waiting = asyncio.ensure_future(one.connection.pause(60.0))
        await turns()
        broker.restore()
        broker.lose()
        await turns()
        await refused(one)
        assert not await ends(asyncio.ensure_future(one.connection.pause(60.0)))
        waiting.cancel()


async def test_a_killed_process_waits_for_ever() -> None:
    """Also if it waits already when it is killed: the broker that comes back refuses it."""
    broker = SimulatedBroker()
    async with members(broker, 1) as (one,):
        broker.lose()
        await refused(one)
        waiting = asyncio.ensure_future(one.connection.pause(60.0))
        await turns()
        one.connection.kill()
        broker.restore()
        assert await ends(waiting)
        await refused(one)
        assert not await ends(asyncio.ensure_future(one.connection.pause(60.0)))


# Leases


async def test_a_lease_has_one_holder_until_it_expires(clock: MovableClock) -> None:
    """Who holds it renews it; another gets it in the moment when it expires, and not before."""
    async with members(SimulatedBroker()) as (one, two):
        assert await one.connection.lease("k", "one", 6.0)
        assert not await two.connection.lease("k", "two", 6.0)
        assert await two.connection.lease("other", "two", 6.0)
        clock.advance(5.5)
        assert await one.connection.lease("k", "one", 6.0)
        clock.advance(5.5)
        assert not await two.connection.lease("k", "two", 6.0)
        clock.advance(0.5)
        assert await two.connection.lease("k", "two", 6.0)
        assert not await one.connection.lease("k", "one", 6.0)


async def test_a_lease_is_given_up_by_its_holder_only(clock: MovableClock) -> None:
    """Zero seconds end it, and are never a lease."""
    async with members(SimulatedBroker()) as (one, two):
        assert not await one.connection.lease("k", "one", 0)
        assert await one.connection.lease("k", "one", 6.0)
        assert not await two.connection.lease("k", "two", 0)
        assert not await two.connection.lease("k", "two", 6.0)
        assert not await one.connection.lease("k", "one", 0)
        assert await two.connection.lease("k", "two", 6.0)


@pytest.mark.parametrize("end", ["lose", "kill", "stop"])
async def test_a_lease_outlasts_the_connection_that_it_was_taken_by(
    clock: MovableClock, end: str
) -> None:
    """It expires; a token takes it from any connection."""
    broker = SimulatedBroker()
    async with members(broker) as (one, two):
        assert await one.connection.lease("k", "one", 6.0)
        if end == "lose":
            broker.lose()
            broker.restore()
            await two.start()
        elif end == "kill":
            one.connection.kill()
        else:
            await one.connection.stop()
        assert not await two.connection.lease("k", "two", 6.0)
        assert await two.connection.lease("k", "one", 6.0)
        clock.advance(6.0)
        assert await two.connection.lease("k", "two", 6.0)


# Hubs on it


@contextlib.asynccontextmanager
async def processes(broker: SimulatedBroker, count: int = 2) -> AsyncIterator[list[Process]]:
    """Apps with a server each, on connections of their own. No task of theirs is left."""
    before = asyncio.all_tasks()
    async with contextlib.AsyncExitStack() as stack:
        some = [Process(broker.connection()) for _ in range(count)]
        for process in some:
            server = await stack.enter_async_context(serving(process.app))
            process.url = f"{server.url}/ws"
        yield some
    assert not broker.connections
    await until(lambda: asyncio.all_tasks() <= before)


def connection_of(process: Process) -> SimulatedConnection:
    connection = process.hub.state.broker
    assert isinstance(connection, SimulatedConnection)
    return connection


def is_connected(process: Process) -> bool:
    return process.hub.stats()["broker_down"] == 0


def id_of(process: Process) -> str:
    (conn,) = process.hub.connections
    return conn.id


async def test_a_hub_reaches_the_clients_of_all_processes() -> None:
    """By group, by user, by id and all of them; text and bytes; each once, in order."""
    async with (
        processes(SimulatedBroker()) as (one, two),
        one.client(group="room", user="ada") as a,
        two.client(group="room", user="bob") as b,
    ):
        await a.ask("join", "room"), await b.ask("join", "room")
        await one.hub.send("room", Said("to the group"))
        await one.hub.send("room", b"\x00\xff")
        await two.hub.send_to_user("ada", Said("to ada"))
        await one.hub.send_to_user("bob", Said("to bob"))
        await one.hub.send_to(id_of(two), Said("to an id"))
        await two.hub.send("room", Said("not to b"), exclude=id_of(two))
        await two.hub.broadcast(Said("to all"))
        assert text(await a.receive()) == "to the group"
        assert await a.socket.recv() == b"\x00\xff"
        assert [text(await a.receive()) for _ in range(3)] == ["to ada", "not to b", "to all"]
        assert text(await b.receive()) == "to the group"
        assert await b.socket.recv() == b"\x00\xff"
        assert [text(await b.receive()) for _ in range(3)] == ["to bob", "to an id", "to all"]


@pytest.mark.parametrize("how", ["group", "user", "id"])
async def test_a_close_reaches_another_process(how: str) -> None:
    """With its code and reason."""
    async with (
        processes(SimulatedBroker()) as (one, two),
        two.client(group="room", user="bob") as b,
    ):
        await b.ask("join", "room")
        if how == "group":
            await one.hub.close_group("room", 4000, "bye")
        elif how == "user":
            await one.hub.close_user("bob", 4000, "bye")
        else:
            await one.hub.close(id_of(two), 4000, "bye")
        assert await b.closed() == (4000, "bye")


async def test_presence_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker says how many processes have to answer: two, one, none, and one was killed."""
    monkeypatch.setattr(pachinko_cluster, "_PRESENCE", 4 * PATIENCE)
    async with (
        processes(SimulatedBroker(), 3) as (one, two, three),
        one.client(group="room", user="ada"),
        two.client(group="room", user="bob") as b,
        asyncio.timeout(PATIENCE),
    ):
        await b.ask("join", "room")
        await until(lambda: one.hub.groups)
        for hub in (one.hub, two.hub, three.hub):
            assert {each.user for each in await hub.presence("room")} == {"ada", "bob"}
            assert [each.user for each in await hub.presence(user="bob")] == ["bob"]
            assert await hub.presence("nobody") == []
        connection_of(two).kill()
        assert [each.user for each in await three.hub.presence("room")] == ["ada"]


async def test_a_client_of_another_process_is_asked_and_joined_by_its_id() -> None:
    """One of a process that was killed does not answer."""
    async with processes(SimulatedBroker()) as (one, two), two.client() as b:
        await b.ask("join", "other")
        id = id_of(two)
        asking = asyncio.ensure_future(one.hub.ask(id, "unlock", {"door": 1}))
        question = await b.receive()
        await b.send("unlock.reply", "open", question["id"])
        assert await asking == "open"
        await one.hub.join("room", id)
        await one.hub.send("room", Said("in"))
        await one.hub.leave("room", id)
        await one.hub.send("room", Said("out"))
        await two.hub.send_to(id, Said("end"))
        assert [text(await b.receive()) for _ in range(2)] == ["in", "end"]
        connection_of(two).kill()
        with pytest.raises(NoAnswer):
            await one.hub.ask(id, "unlock", timeout=PATIENCE)


async def test_a_listener_gets_what_another_process_sends() -> None:
    """A hub without an app has a connection of its own."""
    broker = SimulatedBroker()
    async with (
        Hub().open(broker.connection()) as one,
        Hub().open(broker.connection()) as two,
        one.listen("room") as messages,
    ):
        await two.send("room", Said("hi"))
        envelope = await anext(messages)
        assert (envelope.type, envelope.payload) == ("said", {"text": "hi"})
    assert not broker.connections


async def test_a_lost_broker_is_told_to_callers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the first call nor later ones wait for a timer; who is not there cannot start."""
    for name in ("_BROKER_WAIT", "_CONNECT"):
        monkeypatch.setattr(pachinko_cluster, name, 4.0 * PATIENCE)
    monkeypatch.setattr(pachinko_cluster, "_RECONNECT", (4.0 * PATIENCE,))
    broker = SimulatedBroker()
    async with (
        processes(broker, 1) as (one,),
        one.client(group="room") as a,
        asyncio.timeout(PATIENCE),
    ):
        await a.ask("join", "room")
        for _ in range(2):
            waiting = asyncio.ensure_future(one.hub.send("room", Said("lost")))
            await asyncio.sleep(0)
            broker.lose()
            calls = [asyncio.ensure_future(one.hub.send("room", Said("lost"))) for _ in range(3)]
            for call in (*calls, asyncio.ensure_future(one.hub.presence("room"))):
                with pytest.raises(PachinkoError, match="SimulatedConnection"):
                    await call
            is_sent = asyncio.get_running_loop().get_task_factory() is not None  # by an eager task
            with contextlib.nullcontext() if is_sent else pytest.raises(PachinkoError):
                await waiting
            with pytest.raises(PachinkoError, match="the simulated broker is lost"):
                async with Hub().open(broker.connection()):
                    pass
            broker.restore()
            await until(lambda: is_connected(one))
            await one.hub.send("room", Said("found"))


async def test_members_get_a_gap_after_an_outage() -> None:
    """Only those that were there when it began; one that has come since has missed nothing."""
    broker = SimulatedBroker()
    async with processes(broker) as (one, two), one.client() as a, two.client() as b:
        await a.ask("join", "room")
        broker.lose()
        broker.restore()
        await until(lambda: is_connected(one) and is_connected(two))
        assert await a.receive() == {"type": "gap", "payload": {"group": "room"}}
        assert await b.receive() == {"type": "gap", "payload": {"group": None}}
        async with two.client(group="room") as c:
            assert (await c.ask("join", "room"))["type"] == "join.reply"
            await one.hub.send("room", Said("back"))
            assert text(await a.receive()) == text(await c.receive()) == "back"


async def test_a_process_that_is_killed_looks_like_one_without_a_broker() -> None:
    """Its callers fail at once, and it can be stopped; what it sends reaches nobody."""
    async with processes(SimulatedBroker()) as (one, two), two.client(group="room") as b:
        await b.ask("join", "room")
        connection_of(one).kill()
        with pytest.raises(PachinkoError, match="SimulatedConnection"):
            await one.hub.send("room", Said("from the dead"))
        await two.hub.send("room", Said("alive"))
        assert text(await b.receive()) == "alive"


@pytest.mark.parametrize("end", ["kill", "lose"])
async def test_a_worker_is_taken_over_when_time_moves_on(
    clock: MovableClock, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """After a kill, by another process, once the lease has expired; after an outage, by nobody."""
    monkeypatch.setattr(pachinko_cluster, "_TRY", 0.01)
    broker, first, second = SimulatedBroker(), Scene(None), Scene(None)
    first.url, second.url = broker.connection(), broker.connection()
    async with first.process("a"):
        await until(lambda: first.here)
        async with second.process("b"):
            if end == "kill":
                first.url.kill()
            else:
                broker.lose()
                broker.restore()
            await until(lambda: len(broker.connections) == (1 if end == "kill" else 2))
            await turns(20)
            assert second.began == []
            if end == "kill":
                clock.advance(pachinko_cluster.LEASE)
                await until(lambda: second.here)
            else:
                assert first.here == first.began == ["a"]
    assert (second.began == ["b"]) is (end == "kill")


async def test_nothing_is_logged_but_the_outage(caplog: pytest.LogCaptureFixture) -> None:
    """One error a process, and no trace of it: a simulated loss is no bug."""
    caplog.set_level(logging.ERROR, "pachinko")
    broker = SimulatedBroker()
    async with processes(broker) as some:
        broker.lose()
        await until(lambda: len(caplog.records) == 4)
        broker.restore()
        await until(lambda: all(map(is_connected, some)))
    assert all("the simulated broker is lost" in each.message for each in caplog.records)
    assert not any(each.exc_info for each in caplog.records)


async def test_a_process_that_is_stopped_as_it_is_killed_says_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A program that is killed writes no log."""
    connection = SimulatedBroker().connection()
    async with Hub().open(connection):
        connection.kill()
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


async def test_a_hub_may_be_opened_again_on_its_connection() -> None:
    """Also if it was closed during an outage."""
    broker = SimulatedBroker()
    connection = broker.connection()
    for is_lost in (False, True, False):
        async with Hub().open(connection) as hub, hub.listen("room") as messages:
            await hub.send("room", Said("hi"))
            assert (await anext(messages)).type == "said"
            if is_lost:
                broker.lose()
                await turns(20)
        broker.restore()
        assert not broker.connections
