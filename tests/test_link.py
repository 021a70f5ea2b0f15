"""The link: how a process stays on its broker, whatever that does."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support import PATIENCE, until

import pachinko_cluster
from pachinko import BrokerAway, PachinkoError
from pachinko_cluster import Link

# On a broker that does what no real one will on demand


class Exchange:
    """What connects the fakes of one test: in memory, in order, at once."""

    def __init__(self) -> None:
        self.links: list[Fake] = []

    async def publish(self, subject: str, data: bytes) -> int:
        reached = [fake for fake in self.links if subject in fake.subjects]
        for fake in reached:
            await fake.deliver(subject, data)
        return len(reached)


class Fake:
    """A backplane to be told what goes wrong."""

    def __init__(self, exchange: Exchange | None = None) -> None:
        self.exchange = exchange or Exchange()
        self.subjects: set[str] = set()
        self.calls: list[str] = []
        self.fails: dict[str, Exception] = {}  # by method
        self.hangs: set[str] = set()
        self.held: dict[str, asyncio.Event] = {}  # the same, until it is set
        self.denied: set[str] = set()  # subjects
        self.at_once = self.most_at_once = 0  # subscriptions in progress
        self.deliver: Any = None
        self.lost: Any = None

    async def _do(self, method: str, subject: str = "") -> None:
        self.calls.append(whole := f"{method} {subject}".strip())
        if method in self.hangs:
            await asyncio.Event().wait()
        for call in (method, whole):
            if call in self.held:
                await self.held[call].wait()
        if method == "subscribe" and subject in self.denied:
            raise PachinkoError("not permitted")
        if method in self.fails:
            raise self.fails[method]
        await asyncio.sleep(0)

    def hold(self, call: str) -> asyncio.Event:
        """Let *call*, a method or one with its subject, wait until the event is set."""
        free = self.held[call] = asyncio.Event()
        return free

    async def start(self, deliver: Any, lost: Any) -> None:
        await self._do("start")
        self.deliver, self.lost = deliver, lost
        self.subjects.clear()
        self.exchange.links.append(self)

    async def publish(self, subject: str, data: bytes) -> int | None:
        await self._do("publish", subject)
        return await self.exchange.publish(subject, data)

    async def subscribe(self, subject: str) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self._do("subscribe", subject)
        finally:
            self.at_once -= 1
        self.subjects.add(subject)

    async def unsubscribe(self, subject: str) -> None:
        await self._do("unsubscribe", subject)
        self.subjects.discard(subject)

    async def stop(self) -> None:
        if self in self.exchange.links:
            self.exchange.links.remove(self)
        await self._do("stop")

    def count(self, call: str) -> int:
        return self.calls.count(call)


class Receiver:
    """Takes the place of a cluster."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.restores: list[str | None] = []
        self.fails: Exception | None = None

    async def receive(self, subject: str, data: bytes) -> None:
        if self.fails is not None:
            raise self.fails
        self.messages.append((subject, data))

    def restored(self, subject: str | None) -> None:
        self.restores.append(subject)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats and attempts follow each other fast, so that no test has to wait for them."""
    monkeypatch.setattr(pachinko_cluster, "_BEAT", 0.02)
    monkeypatch.setattr(pachinko_cluster, "_RECONNECT", (0.01,))


class Scene:
    """A link on a fake. Its messages are words, of which the last is the text."""

    def __init__(self, fake: Fake, process: str = "me") -> None:
        self.fake, self.receiver, self.process = fake, Receiver(), process
        self.sent = 0
        self.link = Link(
            fake, None, self.receive, self.receiver.restored,
            [f"ns.p.{process}", "ns.a.all"], functools.partial(self.pack, "beat"), process,
        )  # fmt: skip

    async def receive(self, subject: str, data: bytes) -> None:
        await self.receiver.receive(subject, data)

    def pack(self, text: str, session: int) -> bytes:
        self.sent += 1
        return f"{self.process} {session} {self.sent} {text}".encode()

    async def send(self, name: str = "room", text: str = "x") -> int | None:
        return await self.link.publish(f"ns.g.{name}", functools.partial(self.pack, text))

    async def join(self, *names: str) -> None:
        for name in names:
            self.link.subscribe(f"ns.g.{name}")
            await self.link.subscribed(f"ns.g.{name}")

    @property
    def texts(self) -> list[str]:
        return [data.decode().rpartition(" ")[2] for _, data in self.receiver.messages]


@contextlib.asynccontextmanager
async def linked(fake: Fake | None = None, process: str = "me") -> AsyncIterator[Scene]:
    scene = Scene(fake or Fake(), process)
    try:
        yield scene
    finally:
        await scene.link.stop()


async def test_a_process_is_subscribed_to_itself_and_to_all() -> None:
    """From the start, and to nothing else."""
    async with linked() as scene:
        await scene.link.connected()
        assert scene.fake.subjects == {"ns.p.me", "ns.a.all"}
    assert scene.fake.calls[-1] == "stop"


@pytest.mark.parametrize("kind", [bytes, bytearray])
async def test_a_message_may_come_in_any_bytes(kind: type[bytes | bytearray]) -> None:
    """A driver may hand over its own buffer. The copy of what was sent is known all the same."""
    async with linked() as scene:
        await scene.join("room")
        deliver = scene.fake.deliver
        scene.fake.deliver = lambda subject, data: deliver(subject, kind(data))
        async with asyncio.timeout(PATIENCE):
            assert await scene.send("room", "hello") == 1
        assert scene.texts == ["hello"]


async def test_what_is_wanted_is_subscribed_and_what_is_not_is_not() -> None:
    """Before and after the connection is made."""
    async with linked() as scene:
        await scene.join("early")
        await scene.join("late")
        assert {"ns.g.early", "ns.g.late"} <= scene.fake.subjects
        scene.link.unsubscribe("ns.g.early")
        await until(lambda: "ns.g.early" not in scene.fake.subjects)
        scene.link.unsubscribe("ns.g.early")
        scene.link.unsubscribe("ns.g.never")


async def test_joining_and_leaving_in_a_row_ends_as_the_last_one_says() -> None:
    """However they fall into the subscriptions in progress."""
    async with linked() as scene:
        await scene.link.connected()
        for turns in range(8):
            scene.link.subscribe("ns.g.room")
            for _ in range(turns):
                await asyncio.sleep(0)
            scene.link.unsubscribe("ns.g.room")
            await asyncio.sleep(0)
            await scene.join("room")
            assert "ns.g.room" in scene.fake.subjects
            assert await scene.send() == 1
            scene.link.unsubscribe("ns.g.room")
            for _ in range(turns):
                await asyncio.sleep(0)
        await until(lambda: "ns.g.room" not in scene.fake.subjects)


async def test_one_who_no_longer_wants_does_not_wait() -> None:
    """Its last member may leave while it is being subscribed."""
    async with linked() as scene:
        await scene.link.connected()
        scene.fake.hangs.add("subscribe")
        scene.link.subscribe("ns.g.room")
        waiting = asyncio.create_task(scene.link.subscribed("ns.g.room"))
        await until(lambda: scene.fake.count("subscribe ns.g.room"))
        scene.link.unsubscribe("ns.g.room")
        scene.fake.lost(None)
        await asyncio.wait_for(waiting, PATIENCE)


async def test_a_send_returns_when_the_own_copy_was_handed_on() -> None:
    """So a reply that follows is behind it."""
    async with linked() as scene:
        await scene.join("room")
        held: list[bytes] = []
        publish, scene.fake.exchange.publish = scene.fake.exchange.publish, None

        async def hold(subject: str, data: bytes) -> int:
            if subject == "ns.g.room":
                held.append(data)
                return 1
            return await publish(subject, data)

        scene.fake.exchange.publish = hold
        sending = asyncio.create_task(scene.send())
        await until(lambda: held)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not sending.done() and not scene.receiver.messages
        await scene.fake.deliver("ns.g.room", held[0])
        await asyncio.wait_for(sending, PATIENCE)
        assert scene.texts == ["x"]


async def test_a_send_does_not_wait_for_a_copy_once_nobody_is_left() -> None:
    """The last member here has left while it was on its way."""
    async with linked() as scene:
        for name in ("other", "room"):
            await scene.join(name)
        scene.fake.exchange.links.clear()
        other, sending = (asyncio.create_task(scene.send(name)) for name in ("other", "room"))
        await until(lambda: len(scene.link._copies) == 2)
        scene.link.unsubscribe("ns.g.room")
        await asyncio.wait_for(sending, PATIENCE)
        assert not other.done()
        other.cancel()


async def test_a_copy_that_comes_while_nobody_wants_it_is_not_waited_for() -> None:
    """The last member leaves and another one joins, in one turn of the loop."""
    held: list[bytes] = []
    async with linked() as scene:
        await scene.join("room")

        async def hold(subject: str, data: bytes) -> int:
            held.append(data)
            return 1

        scene.fake.exchange.publish = hold  # type: ignore[method-assign]  # a fault on demand
        sending = asyncio.create_task(scene.send())
        await until(lambda: any(data.endswith(b" x") for data in held))
        (copy,) = (data for data in held if data.endswith(b" x"))
        scene.link.unsubscribe("ns.g.room")
        await scene.fake.deliver("ns.g.room", copy)
        scene.link.subscribe("ns.g.room")
        await asyncio.wait_for(sending, PATIENCE)


@pytest.mark.parametrize("call", ["start", "publish"])
async def test_a_bug_in_a_backplane_of_ones_own_is_traced(
    call: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it fails as brokers do, one line is enough."""
    for failure in (KeyError("nope"), ConnectionError("away")):
        fake = Fake()
        fake.fails[call] = failure
        caplog.clear()
        async with linked(fake) as scene:
            with pytest.raises(PachinkoError, match=r"nope|away") as caught:
                await scene.send()
        logged = [record.exc_info for record in caplog.records if record.exc_info]
        if isinstance(failure, OSError):
            assert not logged and isinstance(caught.value, BrokerAway)
        elif call == "start":
            assert logged and logged[0][1] is failure
        else:
            assert caught.value.__cause__ is failure and not isinstance(caught.value, BrokerAway)


async def test_a_message_goes_to_every_process_that_wants_it() -> None:
    """Two processes, one of them the sender."""
    exchange = Exchange()
    async with linked(Fake(exchange)) as one, linked(Fake(exchange), "other") as other:
        for scene in (one, other):
            await scene.join("room")
        assert await one.send() == 2 and await other.send(text="y") == 2
        assert one.texts == other.texts == ["x", "y"]
        assert await one.send("empty") == 0


async def test_a_bug_in_the_receiver_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """nats-py would stop to read if it were raised."""
    async with linked() as scene:
        await scene.join("room")
        scene.receiver.fails = ZeroDivisionError()
        await scene.fake.deliver("ns.g.room", b"p 1 1 odd")
    assert "was not handled" in caplog.text and "ZeroDivisionError" in caplog.text


async def test_what_nobody_wants_any_more_is_thrown_away() -> None:
    """As is what comes from a connection that is over."""
    async with linked() as scene:
        await scene.join("room")
        old, data = scene.fake.deliver, b"p 1 1 odd"
        scene.fake.lost(None)
        await until(lambda: scene.link.outages == 1 and scene.link.is_connected)
        await old("ns.g.room", data)
        await scene.fake.deliver("ns.g.other", data)
        assert not scene.receiver.messages
        await scene.fake.deliver("ns.g.room", data)
        assert len(scene.receiver.messages) == 1


async def test_a_loss_that_is_told_late_is_none() -> None:
    """That of a connection before the present one."""
    async with linked() as scene:
        await scene.link.connected()
        late = scene.fake.lost
        late(None)
        await until(lambda: scene.receiver.restores)
        late(OSError("late"))
        await scene.join("room")
        assert scene.link.is_connected and scene.link.outages == 1


async def test_one_who_has_just_given_up_needs_no_news_of_a_loss() -> None:
    """Its time is over, but it has not got round to saying so."""
    async with linked() as scene:
        await scene.link.connected()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0) as patience:
                await asyncio.Event().wait()
        scene.link._waits.add(patience)
        scene.fake.lost(None)
        await until(lambda: scene.receiver.restores)


async def test_a_lost_broker_is_found_again() -> None:
    """All is subscribed anew, and then it is said that something may be missing, once."""
    async with linked() as scene:
        await scene.join("room")
        assert len(scene.receiver.restores) == 0 and scene.link.outages == 0
        scene.fake.lost(ConnectionResetError("cut"))
        scene.fake.lost(None)
        await until(lambda: scene.receiver.restores)
        assert scene.fake.subjects == {"ns.p.me", "ns.a.all", "ns.g.room"}
        assert len(scene.receiver.restores) == 1 and scene.link.outages == 1
        await scene.send()
        assert scene.texts == ["x"]


async def test_while_it_is_away_everything_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    """A send raises at once, a join comes later, one reason is logged once."""
    async with linked() as scene:
        await scene.link.connected()
        scene.fake.fails["start"] = OSError("no route")
        scene.fake.lost(None)
        await until(lambda: scene.fake.count("start") > 3)
        with pytest.raises(PachinkoError, match="Fake cannot be reached: OSError: no route"):
            await scene.send()
        await scene.join("room")
        assert "subscribe ns.g.room" not in scene.fake.calls
        del scene.fake.fails["start"]
        await until(lambda: "ns.g.room" in scene.fake.subjects and scene.receiver.restores)
    assert caplog.text.count("no route") == 1


async def test_a_broker_that_comes_after_the_process() -> None:
    """Whoever has joined before may have missed something."""
    fake = Fake()
    fake.fails["start"] = OSError("not yet")
    async with linked(fake) as scene:
        with pytest.raises(PachinkoError, match="not yet"):
            await scene.link.connected()
        await scene.join("room")
        del fake.fails["start"]
        await until(lambda: len(scene.receiver.restores) == 1)
        assert "ns.g.room" in fake.subjects and scene.link.outages == 0


async def test_a_send_in_progress_learns_of_the_loss() -> None:
    """And does not wait for more."""
    async with linked() as scene:
        await scene.link.connected()
        scene.fake.hangs.add("publish")
        sending = asyncio.create_task(scene.send())
        await until(lambda: scene.fake.count("publish ns.g.room"))
        scene.fake.lost(ConnectionResetError("cut"))
        with pytest.raises(PachinkoError, match="not taken a message: ConnectionResetError: cut"):
            await asyncio.wait_for(sending, PATIENCE)


async def test_a_send_that_comes_while_it_connects_waits_for_that() -> None:
    """A moment's loss is not told at all."""
    async with linked() as scene:
        sending = asyncio.create_task(scene.send())
        assert await asyncio.wait_for(sending, PATIENCE) == 0
        scene.fake.lost(None)
        await until(lambda: not scene.link.is_connected)
        assert await asyncio.wait_for(scene.send(), PATIENCE) == 0


async def test_those_who_have_waited_for_the_broker_go_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also before one that comes when it is there, and they have not got round to it."""
    fake = Fake()
    free = fake.hold("start")
    async with linked(fake) as scene:
        loop = asyncio.get_running_loop()
        arrival: asyncio.Future[None] = loop.create_future()
        up = scene.link._begin

        def let_one_come_first() -> None:
            arrival.set_result(None)
            up()

        async def come() -> None:
            await arrival
            assert scene.link.is_connected
            await scene.send(text="last")

        monkeypatch.setattr(scene.link, "_begin", let_one_come_first)
        scene.link.subscribe("ns.g.room")
        tasks = [asyncio.create_task(scene.send(text=str(n))) for n in range(3)]
        tasks += [asyncio.create_task(come()), asyncio.create_task(scene.send(text="given up"))]
        await until(lambda: fake.count("start"))
        tasks[-1].cancel()
        free.set()
        await asyncio.wait(tasks)
        assert scene.texts == ["0", "1", "2", "last"]


async def test_a_send_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the broker lives: its beats come back."""
    monkeypatch.setattr(pachinko_cluster, "_BROKER_WAIT", 0.1)
    async with linked() as scene:
        await scene.link.connected()
        publish = scene.fake.publish

        async def hang(subject: str, data: bytes) -> int | None:
            if subject == "ns.g.room":
                await asyncio.Event().wait()
            return await publish(subject, data)

        scene.fake.publish = hang
        with pytest.raises(PachinkoError, match=r"no answer within 0\.1 s"):
            await scene.send()
        assert not scene.link._copies and not scene.link._waits


async def test_what_a_backplane_raises_becomes_ours() -> None:
    """A user of the hub need not know the broker's exceptions."""
    async with linked() as scene:
        await scene.link.connected()
        scene.fake.fails["publish"] = KeyError("odd")
        with pytest.raises(PachinkoError, match="Fake: KeyError: 'odd'"):
            await scene.send()
        scene.fake.fails["publish"] = PachinkoError("too large")
        with pytest.raises(PachinkoError, match=r"^too large$"):
            await scene.send()
        del scene.fake.fails["publish"]
        await scene.send()


async def test_a_broker_that_is_silent_is_lost() -> None:
    """Nothing comes back from it, nor does it end the connection."""
    async with linked() as scene:
        await scene.link.connected()
        scene.fake.exchange.links.clear()
        await until(lambda: scene.receiver.restores)
        assert scene.link.outages == 1
        scene.fake.hangs.add("publish")
        await until(lambda: scene.link.outages == 2)
        scene.fake.hangs.clear()
        await until(lambda: scene.link.is_connected and len(scene.receiver.restores) == 2)


async def test_a_broker_is_not_lost_because_we_are_busy() -> None:
    """A sign of life may wait behind a message that takes its time to be delivered."""
    async with linked() as scene:
        await scene.join("room")
        free, beats = asyncio.Event(), scene.fake.count("publish ns.p.me")

        async def receive(*_: object) -> None:
            await free.wait()

        scene.receiver.receive = receive  # type: ignore[assignment]  # a fault on demand
        data = b"p 1 1 odd"
        busy = asyncio.create_task(scene.fake.deliver("ns.g.room", data))
        scene.fake.exchange.links.clear()  # so that no beat comes back
        await until(lambda: scene.fake.count("publish ns.p.me") > beats + 20)
        assert scene.link.outages == 0
        free.set()
        await busy
        await until(lambda: scene.link.outages == 1)


async def test_a_subscription_that_fails_ends_the_connection() -> None:
    """The next one subscribes everything again; a join waits for that."""
    async with linked() as scene:
        await scene.link.connected()
        scene.fake.fails["subscribe"] = OSError("no more")
        scene.link.subscribe("ns.g.room")
        joining = asyncio.create_task(scene.link.subscribed("ns.g.room"))
        await until(lambda: scene.link.outages == 1)
        await asyncio.wait_for(joining, PATIENCE)
        del scene.fake.fails["subscribe"]
        await until(lambda: scene.receiver.restores)
        assert "ns.g.room" in scene.fake.subjects


async def test_a_join_waits_for_the_broker_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a gap is due, in that group, although the broker was never lost."""
    monkeypatch.setattr(pachinko_cluster, "_BROKER_WAIT", 0.05)
    async with linked() as scene:
        await scene.link.connected()
        free = scene.fake.hold("subscribe")
        for name in ("room", "left"):
            await scene.join(name)
        scene.link.unsubscribe("ns.g.left")
        free.set()
        await until(lambda: scene.receiver.restores == ["ns.g.room"])
        await scene.join("left")
        assert scene.receiver.restores == ["ns.g.room"]


async def test_a_join_that_is_cancelled_may_miss_messages() -> None:
    """By a time-out around it, say. Then its group gets a gap, if somebody is still in it."""
    async with linked() as scene:
        await scene.link.connected()
        free = scene.fake.hold("subscribe")
        joins = []
        for name in ("room", "left"):
            scene.link.subscribe(f"ns.g.{name}")
            joins.append(asyncio.create_task(scene.link.subscribed(f"ns.g.{name}")))
        await asyncio.sleep(0)  # so that they wait
        scene.link.unsubscribe("ns.g.left")
        for join in joins:
            join.cancel()
        await asyncio.wait(joins)
        assert all(join.cancelled() for join in joins) and scene.link._late == {"ns.g.room"}
        free.set()
        await until(lambda: scene.receiver.restores == ["ns.g.room"])
        assert not scene.link._late


async def test_one_who_gave_up_and_left_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the broker is away."""
    monkeypatch.setattr(pachinko_cluster, "_BROKER_WAIT", 0.05)
    fake = Fake()
    fake.hangs.add("start")
    async with linked(fake) as scene:
        await scene.join("room")
        assert scene.link._late == {"ns.g.room"}
        scene.link.unsubscribe("ns.g.room")
        assert not scene.link._late


async def test_a_first_connection_that_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A join has given up to wait for it: all may have missed something."""
    monkeypatch.setattr(pachinko_cluster, "_BROKER_WAIT", 0.05)
    fake = Fake()
    free = fake.hold("start")
    async with linked(fake) as scene:
        await scene.join("room")
        free.set()
        await until(lambda: scene.receiver.restores == [None])


async def test_a_refusal_that_comes_when_nobody_is_left() -> None:
    """Nothing of it stays."""
    async with linked() as scene:
        await scene.link.connected()
        free = scene.fake.hold("subscribe")
        scene.fake.denied.add("ns.g.room")
        scene.link.subscribe("ns.g.room")
        task = scene.link._changes["ns.g.room"]
        await asyncio.sleep(0)  # so that it has begun
        scene.link.unsubscribe("ns.g.room")
        free.set()
        await asyncio.wait([task])
        assert not scene.link._denied and not scene.link._changes


async def test_what_is_not_permitted_harms_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    """A join raises; the others go on, also after the broker has been away."""
    async with linked() as scene:
        scene.fake.denied.add("ns.g.denied")
        await scene.link.connected()
        scene.link.subscribe("ns.g.denied")
        for _ in range(2):
            with pytest.raises(PachinkoError, match="not permitted"):
                await scene.link.subscribed("ns.g.denied")
        await scene.join("room")
        scene.fake.lost(None)
        await until(lambda: scene.receiver.restores)
        assert "ns.g.room" in scene.fake.subjects and scene.link.outages == 1
        with pytest.raises(PachinkoError, match="not permitted"):
            await scene.link.subscribed("ns.g.denied")
        scene.link.unsubscribe("ns.g.denied")
        await scene.link.subscribed("ns.g.denied")
        assert await scene.send() == 1
    assert caplog.text.count("not permitted") == 2  # once a connection


async def test_a_process_that_may_not_hear_for_itself_is_not_connected() -> None:
    """Without that it would be deaf."""
    fake = Fake()
    fake.fails["subscribe"] = PachinkoError("not permitted")
    async with linked(fake) as scene:
        with pytest.raises(PachinkoError, match="cannot be reached: PachinkoError: not permitted"):
            await scene.link.connected()


async def test_a_cancellation_out_of_a_library_is_a_failure_like_any_other() -> None:
    """It would end the link without a word."""
    async with linked() as scene:
        start, left = scene.fake.start, [1, 1]

        async def cancelled(deliver: Any, lost: Any) -> None:
            if left:
                left.pop()
                raise asyncio.CancelledError
            await start(deliver, lost)

        scene.fake.start = cancelled
        await until(lambda: scene.link.is_connected)


async def test_a_subscription_of_a_connection_that_is_over_changes_nothing() -> None:
    """One that takes no cancellation, and then succeeds or fails."""
    for failure in (None, OSError("late"), PachinkoError("late")):
        async with linked() as scene:
            await scene.link.connected()
            free, subscribe = asyncio.Event(), scene.fake.subscribe
            held: list[str] = []

            async def stubborn(
                subject: str, free: Any = free, subscribe: Any = subscribe, failure: Any = failure,
                held: list[str] = held,
            ) -> None:  # fmt: skip
                if subject == "ns.g.room" and not held:
                    held.append(subject)
                    while not free.is_set():
                        with contextlib.suppress(asyncio.CancelledError):
                            await free.wait()
                    if failure is not None:
                        raise failure
                    return
                await subscribe(subject)

            scene.fake.subscribe = stubborn
            scene.link.subscribe("ns.g.room")
            await until(lambda held=held: held)
            late = scene.link._changes["ns.g.room"]
            next_one = scene.fake.hold("start")
            scene.fake.lost(None)
            await until(lambda scene=scene: scene.fake.count("start") == 2)
            free.set()
            await asyncio.wait([late])
            next_one.set()
            await until(lambda scene=scene: scene.receiver.restores)
            assert scene.link.is_connected and scene.link.outages == 1
            assert "ns.g.room" in scene.fake.subjects
            assert not scene.link._denied


@pytest.mark.parametrize(("last", "expected"), [(3600.0, [1, 2, 3600, 3600]), (0.0, [1, 1, 1, 1])])
async def test_a_broker_that_drops_us_right_away_is_asked_ever_less_often(
    monkeypatch: pytest.MonkeyPatch, last: float, expected: list[float]
) -> None:
    """It has let us in, but only one that keeps us for a while is taken for well again."""
    monkeypatch.setattr(pachinko_cluster, "_RECONNECT", (1, 2, last))
    delays: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds / 0.75 in (1, 2, last) and seconds:
            delays.append(seconds / 0.75)
        await sleep(0)

    # All processes lose the broker at the same time, and should not come back at the same time.
    monkeypatch.setattr(random, "uniform", lambda low, high: (low + high) / 2)
    monkeypatch.setattr(asyncio, "sleep", note)
    async with linked() as scene:
        async with asyncio.timeout(PATIENCE):
            while len(delays) < 4:
                if scene.link.is_connected:
                    scene.fake.lost(None)
                await sleep(0.001)
    assert delays[:4] == expected


async def test_a_backplane_may_say_when_it_is_tried_again() -> None:
    """It is told how long the pause would be, and returns when it likes."""
    pauses: list[float] = []
    may_go_on = asyncio.Event()

    class Patient(Fake):
        async def pause(self, seconds: float) -> None:
            pauses.append(seconds)
            await may_go_on.wait()

    async with linked(Patient()) as scene:
        await scene.link.connected()
        scene.fake.lost(None)
        await until(lambda: pauses)
        assert 0 < pauses[0] <= pachinko_cluster._RECONNECT[-1]
        assert scene.fake.count("start") == 1
        may_go_on.set()
        await scene.link.connected()
        assert scene.fake.count("start") == 2


async def test_a_backplane_that_hangs_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In `start`, in `subscribe`, in `stop`; each is tried again."""
    monkeypatch.setattr(pachinko_cluster, "_CONNECT", 0.05)
    monkeypatch.setattr(pachinko_cluster, "_RESTORE", 0.05)
    fake = Fake()
    fake.hangs.update(("start", "stop"))
    async with linked(fake) as scene:
        with pytest.raises(PachinkoError, match="no answer"):
            await scene.link.connected()
        fake.hangs.discard("start")
        fake.hangs.add("subscribe")
        started = fake.count("start")
        await until(lambda: fake.count("start") > started + 2)
        fake.hangs.clear()
        await until(lambda: scene.link.is_connected)


async def test_one_that_fails_to_stop_is_started_again() -> None:
    """What `stop` raises is of no interest."""
    async with linked() as scene:
        await scene.link.connected()
        scene.fake.fails["stop"] = RuntimeError("odd")
        scene.fake.lost(None)
        await until(lambda: scene.receiver.restores)


async def test_what_was_left_while_it_was_subscribed_again_is_unsubscribed() -> None:
    """A group may lose its last member at any time."""
    async with linked() as scene:
        await scene.join("room")
        free = scene.fake.hold("subscribe")
        scene.fake.lost(None)
        await until(lambda: scene.fake.count("start") == 2)
        await until(lambda: len(scene.fake.exchange.links) == 1)
        scene.link.unsubscribe("ns.g.room")
        free.set()
        await until(lambda: scene.link.is_connected)
        await until(lambda: "ns.g.room" not in scene.fake.subjects | scene.link._subscribed)


async def test_thousands_are_subscribed_again_in_parts() -> None:
    """A broker gets 500 at a time."""
    async with linked() as scene:
        for n in range(1200):
            scene.link.subscribe(f"ns.g.{n}")
        await scene.link.subscribed("ns.g.1199")
        scene.fake.lost(None)
        await until(lambda: scene.receiver.restores)
        assert len(scene.fake.subjects) == 1202
    assert scene.fake.most_at_once == 500


@pytest.mark.parametrize("is_first", [True, False])
async def test_nothing_comes_before_the_gap_for_what_was_missed(is_first: bool) -> None:
    """While the rest is being subscribed, a message counts as missed as well."""
    fake = Fake()
    may_start = fake.hold("start")
    async with linked(fake) as scene:
        if not is_first:
            may_start.set()
            await scene.join("room")
            may_start.clear()
            fake.lost(ConnectionError("gone"))
            await until(lambda: fake.count("start") == 2)
        scene.link.subscribe("ns.g.room")
        room, new = (fake.hold(f"subscribe ns.g.{name}") for name in ("room", "new"))
        may_start.set()
        await until(lambda: fake.calls[-1:] == ["subscribe ns.g.room"])
        scene.link.subscribe("ns.g.new")  # It needs another turn of subscriptions.
        room.set()
        await until(lambda: fake.calls[-1] == "subscribe ns.g.new")
        await fake.exchange.publish("ns.g.room", b"early")
        new.set()
        await scene.link.subscribed("ns.g.new")
        assert scene.receiver.restores == [None] and scene.texts == []
        await scene.send(text="late")
        assert scene.texts == ["late"]


async def test_who_leaves_while_all_is_subscribed_again_is_unsubscribed() -> None:
    """As soon as the session has begun."""
    async with linked() as scene:
        await scene.join("room", "other")
        other = scene.fake.hold("subscribe ns.g.other")
        scene.fake.lost(None)
        await until(lambda: {"ns.p.me", "ns.g.room"} <= scene.fake.subjects)
        await until(lambda: scene.fake.at_once == 1)
        scene.link.unsubscribe("ns.g.room")
        other.set()
        await until(lambda: "ns.g.room" not in scene.fake.subjects)
        assert "ns.g.other" in scene.fake.subjects


async def test_stopping_ends_whatever_waits() -> None:
    """No task is left."""
    before = asyncio.all_tasks()
    async with linked() as scene:
        await scene.link.connected()
        scene.fake.hangs.update(("publish", "subscribe"))
        scene.link.subscribe("ns.g.room")
        waiting = [asyncio.create_task(scene.send()), asyncio.create_task(scene.send())]
        await until(lambda: scene.fake.count("publish ns.g.room") == 2)
    for task in waiting:
        with pytest.raises(PachinkoError, match="disconnected"):
            await asyncio.wait_for(task, PATIENCE)
    await until(lambda: asyncio.all_tasks() <= before)
    with pytest.raises(PachinkoError):
        await scene.send()


async def test_stopping_before_it_has_started() -> None:
    """At once, or in the middle of the attempt."""
    for turns in range(6):
        async with linked():
            for _ in range(turns):
                await asyncio.sleep(0)


async def test_it_is_logged_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    """With the number of subscriptions."""
    caplog.set_level(logging.INFO, "pachinko")
    async with linked() as scene:
        await scene.link.connected()
        scene.fake.lost(None)
        await until(lambda: scene.receiver.restores)
    lines = [(r.levelname, r.message) for r in caplog.records if "connected, with" in r.message]
    text = "Fake: connected, with 2 subscriptions (process me)"
    assert lines == [("INFO", text), ("WARNING", text)]
