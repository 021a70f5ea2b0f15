"""The link: how a process stays on its engine, whatever that does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support import PATIENCE, until

import pachinko
from pachinko import BrokerAway, Link, PachinkoError, Post, Refused

# On an engine that does what no real one will on demand


class Broker:
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

    def __init__(self, broker: Broker | None = None) -> None:
        self.broker = broker or Broker()
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
        self.calls.append(f"{method} {subject}".strip())
        if method in self.hangs:
            await asyncio.Event().wait()
        if method in self.held:
            await self.held[method].wait()
        if method == "subscribe" and subject in self.denied:
            raise PachinkoError("not permitted")
        if method in self.fails:
            raise self.fails[method]
        await asyncio.sleep(0)

    def hold(self, method: str) -> asyncio.Event:
        """Let *method* wait until the event is set."""
        free = self.held[method] = asyncio.Event()
        return free

    async def start(self, deliver: Any, lost: Any) -> None:
        await self._do("start")
        self.deliver, self.lost = deliver, lost
        self.subjects.clear()
        self.broker.links.append(self)

    async def publish(self, subject: str, data: bytes) -> int | None:
        await self._do("publish", subject)
        return await self.broker.publish(subject, data)

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
        if self in self.broker.links:
            self.broker.links.remove(self)
        await self._do("stop")

    def count(self, call: str) -> int:
        return self.calls.count(call)


class Receiver:
    """Takes the place of a hub."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, str, str, bytes]] = []
        self.reasons: list[str] = []
        self.restores = 0
        self.only: list[tuple[str, str] | None] = []
        self.fails: Exception | None = None

    async def take(self, kind: str, name: str, post: Post, frame: bytes) -> None:
        if self.fails is not None:
            raise self.fails
        self.posts.append((kind, name, post.op, frame))

    async def refused(self, kind: str, name: str, why: Refused) -> None:
        self.reasons.append(str(why))

    def restored(self, only: tuple[str, str] | None = None) -> None:
        self.restores += 1
        self.only.append(only)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats and attempts follow each other fast, so that no test has to wait for them."""
    monkeypatch.setattr(pachinko, "_BEAT", 0.02)
    monkeypatch.setattr(pachinko, "_RECONNECT", (0.01,))


class Scene:
    """A link on a fake."""

    def __init__(self, fake: Fake, process: str = "me") -> None:
        self.fake, self.receiver = fake, Receiver()
        self.link = Link(fake, None, "ns", process, self.receiver)

    async def send(self, name: str = "room", text: str = "x") -> int | None:
        frame = json.dumps({"type": text, "group": name}).encode()
        return await self.link.publish("g", name, self.link.post("send"), frame)

    @property
    def texts(self) -> list[str]:
        return [json.loads(frame)["type"] for _, _, _, frame in self.receiver.posts]


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


async def test_what_is_wanted_is_subscribed_and_what_is_not_is_not() -> None:
    """Before and after the connection is made."""
    async with linked() as scene:
        scene.link.want("g", "early")
        await scene.link.live("g", "early")
        scene.link.want("g", "late")
        await scene.link.live("g", "late")
        assert {"ns.g.early", "ns.g.late"} <= scene.fake.subjects
        scene.link.unwant("g", "early")
        await until(lambda: "ns.g.early" not in scene.fake.subjects)
        scene.link.unwant("g", "early")
        scene.link.unwant("g", "never")


async def test_joining_and_leaving_in_a_row_ends_as_the_last_one_says() -> None:
    """However they fall into the subscriptions in progress."""
    async with linked() as scene:
        await scene.link.connected()
        for turns in range(8):
            scene.link.want("g", "room")
            for _ in range(turns):
                await asyncio.sleep(0)
            scene.link.unwant("g", "room")
            await asyncio.sleep(0)
            scene.link.want("g", "room")
            await scene.link.live("g", "room")
            assert "ns.g.room" in scene.fake.subjects
            assert await scene.send() == 1
            scene.link.unwant("g", "room")
            for _ in range(turns):
                await asyncio.sleep(0)
        await until(lambda: "ns.g.room" not in scene.fake.subjects)


async def test_one_who_no_longer_wants_does_not_wait() -> None:
    """Its last member may leave while it is being subscribed."""
    async with linked() as scene:
        await scene.link.connected()
        scene.fake.hangs.add("subscribe")
        scene.link.want("g", "room")
        waiting = asyncio.create_task(scene.link.live("g", "room"))
        await until(lambda: scene.fake.count("subscribe ns.g.room"))
        scene.link.unwant("g", "room")
        scene.fake.lost(None)
        await asyncio.wait_for(waiting, PATIENCE)


async def test_a_send_returns_when_the_own_copy_was_handed_on() -> None:
    """So a reply that follows is behind it."""
    async with linked() as scene:
        scene.link.want("g", "room")
        await scene.link.live("g", "room")
        held: list[bytes] = []
        publish, scene.fake.broker.publish = scene.fake.broker.publish, None

        async def hold(subject: str, data: bytes) -> int:
            if subject == "ns.g.room":
                held.append(data)
                return 1
            return await publish(subject, data)

        scene.fake.broker.publish = hold
        sending = asyncio.create_task(scene.send())
        await until(lambda: held)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not sending.done() and not scene.receiver.posts
        await scene.fake.deliver("ns.g.room", held[0])
        await asyncio.wait_for(sending, PATIENCE)
        assert scene.texts == ["x"]


async def test_a_send_does_not_wait_for_a_copy_once_nobody_is_left() -> None:
    """The last member here has left while it was on its way."""
    async with linked() as scene:
        for name in ("other", "room"):
            scene.link.want("g", name)
            await scene.link.live("g", name)
        scene.fake.broker.links.clear()
        other, sending = (asyncio.create_task(scene.send(name)) for name in ("other", "room"))
        await until(lambda: len(scene.link._copies) == 2)
        scene.link.unwant("g", "room")
        await asyncio.wait_for(sending, PATIENCE)
        assert not other.done()
        other.cancel()


async def test_a_copy_that_comes_while_nobody_wants_it_is_not_waited_for() -> None:
    """The last member leaves and another one joins, in one turn of the loop."""
    held: list[bytes] = []
    async with linked() as scene:
        scene.link.want("g", "room")
        await scene.link.live("g", "room")

        async def hold(subject: str, data: bytes) -> int:
            held.append(data)
            return 1

        scene.fake.broker.publish = hold  # type: ignore[method-assign]
        sending = asyncio.create_task(scene.send())
        await until(lambda: any(b"send" in data for data in held))
        (copy,) = (data for data in held if b"send" in data)
        scene.link.unwant("g", "room")
        await scene.fake.deliver("ns.g.room", copy)
        scene.link.want("g", "room")
        await asyncio.wait_for(sending, PATIENCE)


@pytest.mark.parametrize("call", ["start", "publish"])
async def test_a_bug_in_a_backplane_of_ones_own_is_traced(
    call: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it fails as engines do, one line is enough."""
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
    broker = Broker()
    async with linked(Fake(broker)) as one, linked(Fake(broker), "other") as other:
        for scene in (one, other):
            scene.link.want("g", "room")
            await scene.link.live("g", "room")
        assert await one.send() == 2 and await other.send(text="y") == 2
        assert one.texts == other.texts == ["x", "y"]
        assert await one.send("empty") == 0


async def test_what_is_not_ours_is_passed_as_refused() -> None:
    """And a receiver that refuses, and one with a bug, stop nothing."""
    async with linked() as scene:
        scene.link.want("g", "room")
        await scene.link.live("g", "room")
        await scene.fake.deliver("ns.g.room", b"rubbish")
        await scene.fake.deliver("ns.g.room", b'{"v":1,"op":"send","from":"p"}\n{"type":"x"}')
        scene.receiver.fails = Refused("not like that")
        await scene.fake.deliver("ns.g.room", b'{"v":1,"op":"odd","from":"p"}\n')
        assert [why.split(":")[0] for why in scene.receiver.reasons] == [
            "not a message of ours",
            "a message for clients that names another group",
            "not like that",
        ]


async def test_a_bug_in_the_receiver_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """nats-py would stop to read if it were raised."""
    async with linked() as scene:
        scene.link.want("g", "room")
        await scene.link.live("g", "room")
        scene.receiver.fails = ZeroDivisionError()
        await scene.fake.deliver("ns.g.room", b'{"v":1,"op":"odd","from":"p"}\n')
    assert "was not handled" in caplog.text and "ZeroDivisionError" in caplog.text


async def test_what_nobody_wants_any_more_is_thrown_away() -> None:
    """As is what comes from a connection that is over."""
    async with linked() as scene:
        scene.link.want("g", "room")
        await scene.link.live("g", "room")
        old, post = scene.fake.deliver, b'{"v":1,"op":"odd","from":"p"}\n'
        scene.fake.lost(None)
        await until(lambda: scene.link.outages == 1 and scene.link.is_up)
        await old("ns.g.room", post)
        await scene.fake.deliver("ns.g.other", post)
        assert not scene.receiver.posts
        await scene.fake.deliver("ns.g.room", post)
        assert len(scene.receiver.posts) == 1


async def test_a_late_message_does_not_overtake() -> None:
    """What a process sent on a connection before its present one is told there as lost."""
    async with linked() as scene:
        scene.link.want("g", "room")
        await scene.link.live("g", "room")
        for session, process in [(1, "p"), (2, "p"), (1, "p"), (2, "p"), (1, "q")]:
            text = json.dumps({"v": 1, "op": f"{session}", "from": process, "session": session})
            await scene.fake.deliver("ns.g.room", text.encode())
        assert [op for _, _, op, _ in scene.receiver.posts] == ["1", "2", "2", "1"]
        assert len(scene.receiver.reasons) == 1
        own = {"v": 1, "op": "own", "from": "me", "session": 0}
        await scene.fake.deliver("ns.g.room", json.dumps(own).encode())
        assert len(scene.receiver.reasons) == 2
        beat = {"v": 1, "op": "beat", "from": "p", "session": 9}  # as a stranger might
        await scene.fake.deliver("ns.g.room", json.dumps(beat).encode())
        text = json.dumps({"v": 1, "op": "last", "from": "p", "session": 2})
        await scene.fake.deliver("ns.g.room", text.encode())
        assert scene.receiver.posts[-1][2] == "last"


async def test_few_processes_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger may make up as many as it likes."""
    monkeypatch.setattr(pachinko, "_MAX_PROCESSES", 10)
    async with linked() as scene:
        scene.link.want("g", "room")
        await scene.link.live("g", "room")
        for n in range(50):
            text = json.dumps({"v": 1, "op": "x", "from": f"p{n}", "session": 1})
            await scene.fake.deliver("ns.g.room", text.encode())
        assert len(scene.receiver.posts) == 50
        assert list(scene.link._sessions) == [f"p{n}" for n in range(40, 50)]


async def test_a_loss_that_is_told_late_is_none() -> None:
    """That of a connection before the present one."""
    async with linked() as scene:
        await scene.link.connected()
        late = scene.fake.lost
        late(None)
        await until(lambda: scene.receiver.restores)
        late(OSError("late"))
        scene.link.want("g", "room")
        await scene.link.live("g", "room")
        assert scene.link.is_up and scene.link.outages == 1


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


async def test_a_lost_engine_is_found_again() -> None:
    """All is subscribed anew, and then it is said that something may be missing, once."""
    async with linked() as scene:
        scene.link.want("g", "room")
        await scene.link.live("g", "room")
        assert scene.receiver.restores == 0 and scene.link.outages == 0
        scene.fake.lost(ConnectionResetError("cut"))
        scene.fake.lost(None)
        await until(lambda: scene.receiver.restores)
        assert scene.fake.subjects == {"ns.p.me", "ns.a.all", "ns.g.room"}
        assert scene.receiver.restores == 1 and scene.link.outages == 1
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
        scene.link.want("g", "room")
        await scene.link.live("g", "room")
        assert "subscribe ns.g.room" not in scene.fake.calls
        del scene.fake.fails["start"]
        await until(lambda: "ns.g.room" in scene.fake.subjects and scene.receiver.restores)
    assert caplog.text.count("no route") == 1


async def test_an_engine_that_comes_after_the_process() -> None:
    """Whoever has joined before may have missed something."""
    fake = Fake()
    fake.fails["start"] = OSError("not yet")
    async with linked(fake) as scene:
        with pytest.raises(PachinkoError, match="not yet"):
            await scene.link.connected()
        scene.link.want("g", "room")
        await scene.link.live("g", "room")
        del fake.fails["start"]
        await until(lambda: scene.receiver.restores == 1)
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
        await until(lambda: not scene.link.is_up)
        assert await asyncio.wait_for(scene.send(), PATIENCE) == 0


async def test_those_who_have_waited_for_the_engine_go_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also before one that comes when it is there, and they have not got round to it."""
    fake = Fake()
    free = fake.hold("start")
    async with linked(fake) as scene:
        loop = asyncio.get_running_loop()
        arrival: asyncio.Future[None] = loop.create_future()
        up = scene.link._up

        def let_one_come_first() -> None:
            arrival.set_result(None)
            up()

        async def come() -> None:
            await arrival
            assert scene.link.is_up
            await scene.send(text="last")

        monkeypatch.setattr(scene.link, "_up", let_one_come_first)
        scene.link.want("g", "room")
        tasks = [asyncio.create_task(scene.send(text=str(n))) for n in range(3)]
        tasks += [asyncio.create_task(come()), asyncio.create_task(scene.send(text="given up"))]
        await until(lambda: len(scene.link._line) == 4)
        tasks[-1].cancel()
        free.set()
        await asyncio.wait(tasks)
        assert scene.texts == ["0", "1", "2", "last"] and not scene.link._line
        pachinko._let_go_on(arrival)  # nothing happens to one who has gone on


async def test_a_send_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the engine lives: its beats come back."""
    monkeypatch.setattr(pachinko, "_ENGINE_WAIT", 0.1)
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
    """A user of the hub need not know the engine's exceptions."""
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


async def test_an_engine_that_is_silent_is_lost() -> None:
    """Nothing comes back from it, nor does it end the connection."""
    async with linked() as scene:
        await scene.link.connected()
        scene.fake.broker.links.clear()
        await until(lambda: scene.receiver.restores)
        assert scene.link.outages == 1
        scene.fake.hangs.add("publish")
        await until(lambda: scene.link.outages == 2)
        scene.fake.hangs.clear()
        await until(lambda: scene.link.is_up and scene.receiver.restores == 2)


async def test_an_engine_is_not_lost_because_we_are_busy() -> None:
    """A sign of life may wait behind a message that takes its time to be delivered."""
    async with linked() as scene:
        scene.link.want("g", "room")
        await scene.link.live("g", "room")
        free, beats = asyncio.Event(), scene.fake.count("publish ns.p.me")

        async def receive(*_: object) -> None:
            await free.wait()

        scene.receiver.take = receive
        post = b'{"v":1,"op":"odd","from":"p"}\n'
        busy = asyncio.create_task(scene.fake.deliver("ns.g.room", post))
        scene.fake.broker.links.clear()  # so that no beat comes back
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
        scene.link.want("g", "room")
        joining = asyncio.create_task(scene.link.live("g", "room"))
        await until(lambda: scene.link.outages == 1)
        await asyncio.wait_for(joining, PATIENCE)
        del scene.fake.fails["subscribe"]
        await until(lambda: scene.receiver.restores)
        assert "ns.g.room" in scene.fake.subjects


async def test_a_join_waits_for_the_engine_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a gap is due, in that group, although the engine was never lost."""
    monkeypatch.setattr(pachinko, "_ENGINE_WAIT", 0.05)
    async with linked() as scene:
        await scene.link.connected()
        free = scene.fake.hold("subscribe")
        for name in ("room", "left"):
            scene.link.want("g", name)
            await scene.link.live("g", name)
        scene.link.unwant("g", "left")
        free.set()
        await until(lambda: scene.receiver.only == [("g", "room")])
        scene.link.want("g", "left")
        await scene.link.live("g", "left")
        assert scene.receiver.only == [("g", "room")]


async def test_a_join_that_is_cancelled_may_miss_messages() -> None:
    """By a time-out around it, say. Then its group gets a gap, if somebody is still in it."""
    async with linked() as scene:
        await scene.link.connected()
        free = scene.fake.hold("subscribe")
        joins = []
        for name in ("room", "left"):
            scene.link.want("g", name)
            joins.append(asyncio.create_task(scene.link.live("g", name)))
        await asyncio.sleep(0)  # so that they wait
        scene.link.unwant("g", "left")
        for join in joins:
            join.cancel()
        await asyncio.wait(joins)
        assert all(join.cancelled() for join in joins) and scene.link._late == {"ns.g.room"}
        free.set()
        await until(lambda: scene.receiver.only == [("g", "room")])
        assert not scene.link._late


async def test_one_who_gave_up_and_left_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the engine is away."""
    monkeypatch.setattr(pachinko, "_ENGINE_WAIT", 0.05)
    fake = Fake()
    fake.hangs.add("start")
    async with linked(fake) as scene:
        scene.link.want("g", "room")
        await scene.link.live("g", "room")
        assert scene.link._late == {"ns.g.room"}
        scene.link.unwant("g", "room")
        assert not scene.link._late


async def test_a_first_connection_that_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A join has given up to wait for it: all may have missed something."""
    monkeypatch.setattr(pachinko, "_ENGINE_WAIT", 0.05)
    fake = Fake()
    free = fake.hold("start")
    async with linked(fake) as scene:
        scene.link.want("g", "room")
        await scene.link.live("g", "room")
        free.set()
        await until(lambda: scene.receiver.only == [None])


async def test_a_refusal_that_comes_when_nobody_is_left() -> None:
    """Nothing of it stays."""
    async with linked() as scene:
        await scene.link.connected()
        free = scene.fake.hold("subscribe")
        scene.fake.denied.add("ns.g.room")
        scene.link.want("g", "room")
        task = scene.link._settling["ns.g.room"]
        await asyncio.sleep(0)  # so that it has begun
        scene.link.unwant("g", "room")
        free.set()
        await asyncio.wait([task])
        assert not scene.link._denied and not scene.link._settling


async def test_what_is_not_permitted_harms_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    """A join raises; the others go on, also after the engine has been away."""
    async with linked() as scene:
        scene.fake.denied.add("ns.g.denied")
        await scene.link.connected()
        scene.link.want("g", "denied")
        for _ in range(2):
            with pytest.raises(PachinkoError, match="not permitted"):
                await scene.link.live("g", "denied")
        scene.link.want("g", "room")
        await scene.link.live("g", "room")
        scene.fake.lost(None)
        await until(lambda: scene.receiver.restores)
        assert "ns.g.room" in scene.fake.subjects and scene.link.outages == 1
        with pytest.raises(PachinkoError, match="not permitted"):
            await scene.link.live("g", "denied")
        scene.link.unwant("g", "denied")
        await scene.link.live("g", "denied")
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
        await until(lambda: scene.link.is_up)


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
            scene.link.want("g", "room")
            await until(lambda held=held: held)
            late = scene.link._settling["ns.g.room"]
            next_one = scene.fake.hold("start")
            scene.fake.lost(None)
            await until(lambda scene=scene: scene.fake.count("start") == 2)
            free.set()
            await asyncio.wait([late])
            next_one.set()
            await until(lambda scene=scene: scene.receiver.restores)
            assert scene.link.is_up and scene.link.outages == 1
            assert "ns.g.room" in scene.fake.subjects
            assert not scene.link._denied


@pytest.mark.parametrize(("last", "expected"), [(3600.0, [1, 2, 3600, 3600]), (0.0, [1, 1, 1, 1])])
async def test_an_engine_that_drops_us_right_away_is_asked_ever_less_often(
    monkeypatch: pytest.MonkeyPatch, last: float, expected: list[float]
) -> None:
    """It has let us in, but only one that keeps us for a while is taken for well again."""
    monkeypatch.setattr(pachinko, "_RECONNECT", (1, 2, last))
    delays: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds / 0.75 in (1, 2, last) and seconds:
            delays.append(seconds / 0.75)
        await sleep(0)

    # All processes lose the engine at the same time, and should not come back at the same time.
    monkeypatch.setattr(random, "uniform", lambda low, high: (low + high) / 2)
    monkeypatch.setattr(asyncio, "sleep", note)
    async with linked() as scene:
        async with asyncio.timeout(PATIENCE):
            while len(delays) < 4:
                if scene.link.is_up:
                    scene.fake.lost(None)
                await sleep(0.001)
    assert delays[:4] == expected


async def test_a_backplane_that_hangs_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In `start`, in `subscribe`, in `stop`; each is tried again."""
    monkeypatch.setattr(pachinko, "_CONNECT", 0.05)
    monkeypatch.setattr(pachinko, "_RESTORE", 0.05)
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
        await until(lambda: scene.link.is_up)


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
        scene.link.want("g", "room")
        await scene.link.live("g", "room")
        free = scene.fake.hold("subscribe")
        scene.fake.lost(None)
        await until(lambda: scene.fake.count("start") == 2)
        await until(lambda: len(scene.fake.broker.links) == 1)
        scene.link.unwant("g", "room")
        free.set()
        await until(lambda: scene.link.is_up)
        await until(lambda: "ns.g.room" not in scene.fake.subjects | scene.link._live)


async def test_thousands_are_subscribed_again_in_parts() -> None:
    """An engine gets 500 at a time."""
    async with linked() as scene:
        for n in range(1200):
            scene.link.want("g", str(n))
        await scene.link.live("g", "1199")
        scene.fake.lost(None)
        await until(lambda: scene.receiver.restores)
        assert len(scene.fake.subjects) == 1202
    assert scene.fake.most_at_once == 500


async def test_stopping_ends_whatever_waits() -> None:
    """No task is left."""
    before = asyncio.all_tasks()
    async with linked() as scene:
        await scene.link.connected()
        scene.fake.hangs.update(("publish", "subscribe"))
        scene.link.want("g", "room")
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
