"""What a broker that keeps messages has to do, whichever it is: the protocol `Store`."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import attrs
import pytest
import redis.asyncio
from brokers import connect_to_nats, shared
from support import PATIENCE

import pachinko
import pachinko_cluster
from pachinko import Backplane, Kind, MovableClock, Window
from pachinko_cluster import Past, SimulatedBroker, Stamp, Store, read_stamp, stamped, subject_of

LONG = Window(100, 300.0, 1_048_576)
SHORT = Window(100, 0.05, 1_048_576)


@attrs.frozen
class Broker:
    """A running broker. A test uses names of its own, so that several may share one."""

    new: Callable[[], Backplane]  # makes a backplane, not yet started
    wait: Callable[[float], Awaitable[None]]  # until so many seconds have passed for the broker
    flush: Callable[[], Awaitable[None]]  # lets it forget all that it keeps


@contextlib.contextmanager
def simulated() -> Iterator[Broker]:
    broker, clock = SimulatedBroker(), MovableClock()

    async def wait(seconds: float) -> None:
        clock.ahead += seconds

    async def flush() -> None:
        broker.flush()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pachinko, "clock", clock)
        yield Broker(broker.connection, wait, flush)


@contextlib.contextmanager
def on_redis() -> Iterator[Broker]:
    with shared("redis") as server:

        async def flush() -> None:
            async with redis.asyncio.from_url(server.url, socket_timeout=PATIENCE) as admin:
                await admin.flushall()

        url = pachinko_cluster.read_broker(server.url)
        yield Broker(lambda: pachinko_cluster.Redis(url), asyncio.sleep, flush)


@contextlib.contextmanager
def on_nats() -> Iterator[Broker]:
    with shared("nats", "-js", "-sd", "store") as server:

        def new() -> Backplane:
            return pachinko_cluster.Nats(pachinko_cluster.read_broker(server.url))

        async def flush() -> None:
            client = await connect_to_nats(server.url)
            await client.jetstream(timeout=PATIENCE).delete_stream("pachinko-kept")
            await client.close()

        yield Broker(new, asyncio.sleep, flush)


# Each is what makes a broker. Its name is the parameter of all tests below.
STORES: dict[str, Callable[[], AbstractContextManager[Broker]]] = {
    "simulated": simulated,
    "redis": on_redis,
    "nats": on_nats,
}


class Process:
    """A connection to the broker, and what has come by it."""

    def __init__(self, broker: Broker) -> None:
        self.backplane = broker.new()
        self.store = cast(Store, self.backplane)
        self.came: list[tuple[str, Stamp | None, bytes]] = []
        self.lost: list[BaseException | None] = []

    async def deliver(self, subject: str, data: bytes) -> None:
        self.came.append((subject, *read_stamp(bytes(data))))

    async def start(self, *subjects: str) -> Process:
        await self.backplane.start(self.deliver, self.lost.append)
        for subject in subjects:
            await self.backplane.subscribe(subject)
        return self

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while len(self.came) < count:
                await asyncio.sleep(0.001)  # nobody tells when one comes

    def stamps(self, subject: str) -> list[Stamp]:
        return [stamp for name, stamp, _ in self.came if name == subject and stamp is not None]


class Scene:
    """A broker, and processes on it."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.processes: list[Process] = []

    def subject(self) -> str:
        """A new one of a group, as a cluster makes them."""
        return subject_of("pachinko", Kind.GROUP, f"room:{secrets.token_hex(8)}")

    async def process(self, *subjects: str) -> Process:
        self.processes.append(process := Process(self.broker))
        return await process.start(*subjects)


@pytest.fixture(scope="module", params=STORES)
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    with STORES[request.param]() as broker:
        yield broker


@pytest.fixture
async def scene(broker: Broker) -> AsyncIterator[Scene]:
    scene = Scene(broker)
    try:
        yield scene
    finally:
        for process in scene.processes:
            await process.backplane.stop()


def message(text: object) -> bytes:
    """A peer message begins with a brace, and is unlike all others."""
    return b'{"n":"%b"}\n%b' % (secrets.token_hex(8).encode(), str(text).encode())


async def keep(
    process: Process, subject: str, *texts: object, window: Window = LONG
) -> list[bytes]:
    """Keep messages with these texts, one after the other, and return them."""
    data = [message(text) for text in texts]
    for each in data:
        await process.store.keep(subject, each, window)
    return data


def check(past: Past, stamps: Sequence[Stamp], data: Sequence[bytes]) -> None:
    """Check what a *past* says, given all that was ever sent to its subject."""
    numbers = [stamp.number for stamp in stamps]
    found = [(entry.number, bytes(entry.data)) for entry in past.entries]
    assert found == list(zip(numbers, data, strict=True))[len(numbers) - len(found) :]
    assert past.top >= max(numbers, default=0)
    assert [number for number in numbers if number > past.floor] == [n for n, _ in found]
    assert all(stamp.epoch == past.epoch for stamp in stamps)
    assert all(0 <= entry.age < PATIENCE + 60 for entry in past.entries)
    ages = [entry.age for entry in past.entries]
    assert ages == sorted(ages, reverse=True)


# Keeping


async def test_a_message_is_delivered_behind_its_stamp(scene: Scene) -> None:
    """To all who have subscribed, its sender too, and by ``keep`` alone."""
    subject = scene.subject()
    sender, other = await scene.process(subject), await scene.process(subject)
    stranger = await scene.process(scene.subject())
    sent = await keep(sender, subject, "a", "b", "c")
    for process in (sender, other):
        await process.wait_for(3)
        assert [data for _, _, data in process.came] == sent
    assert sender.came == other.came and not stranger.came


async def test_numbers_rise_and_each_stamp_has_the_one_before(scene: Scene) -> None:
    """Of its own subject: those of others between them do not count. The first has 0, or more."""
    one, two = scene.subject(), scene.subject()
    process = await scene.process(one, two)
    for n in range(4):
        await keep(process, one, n)
        await keep(process, two, n)
    await process.wait_for(8)
    for subject in (one, two):
        stamps = process.stamps(subject)
        numbers = [stamp.number for stamp in stamps]
        assert numbers == sorted(set(numbers)) and numbers[0] > 0
        assert [stamp.previous for stamp in stamps[1:]] == numbers[:-1]
        assert 0 <= stamps[0].previous < numbers[0]
        assert len({stamp.epoch for stamp in stamps}) == 1


async def test_all_processes_have_one_order(scene: Scene) -> None:
    """However many of them send at a time. Those of one sender keep the order of its calls."""
    subject = scene.subject()
    processes = [await scene.process(subject) for _ in range(3)]
    sent = {process: [message(n) for n in range(20)] for process in processes}
    await asyncio.gather(*(
        process.store.keep(subject, data, LONG) for n in range(20)
        for process, data in [(each, sent[each][n]) for each in processes]
    ))  # fmt: skip
    for process in processes:
        await process.wait_for(60)
    first, *others = processes
    assert all(each.came == first.came for each in others)
    came = [data for _, _, data in first.came]
    assert all([data for data in came if data in mine] == mine for mine in sent.values())
    check(await first.store.past(subject, 100), first.stamps(subject), came)


@pytest.mark.parametrize("text", ["", "a\nb\r\n\0", "ä☃", "{", "1 2 3\n{}", "x" * 100_000])
async def test_any_text_comes_back_as_it_was(scene: Scene, text: str) -> None:
    """From the feed, and from the past."""
    subject = scene.subject()
    process = await scene.process(subject)
    sent = await keep(process, subject, text)
    await process.wait_for(1)
    assert process.came[0][2] == sent[0]
    assert [bytes(entry.data) for entry in (await process.store.past(subject, 5)).entries] == sent


async def test_a_sender_need_not_subscribe(scene: Scene) -> None:
    """What was sent while nobody has subscribed is kept as well."""
    subject = scene.subject()
    sender = await scene.process()
    sent = await keep(sender, subject, "a", "b")
    late = await scene.process(subject)
    past = await late.store.past(subject, 10)
    assert [bytes(entry.data) for entry in past.entries] == sent
    await keep(sender, subject, "c")
    await late.wait_for(1)
    assert late.stamps(subject)[0].previous == past.entries[-1].number


async def test_what_is_only_published_has_no_stamp_and_is_not_kept(scene: Scene) -> None:
    """It comes behind what its sender has kept before."""
    subject = scene.subject()
    process, sender = await scene.process(subject), await scene.process()
    for n in range(10):
        await keep(sender, subject, f"{n} kept")
        await sender.backplane.publish(subject, message(f"{n} only"))
    await process.wait_for(20)
    texts = [data.partition(b"\n")[2].decode() for _, _, data in process.came]
    assert texts == [f"{n} {how}" for n in range(10) for how in ("kept", "only")]
    assert [stamp is None for _, stamp, _ in process.came] == [False, True] * 10
    assert len((await process.store.past(subject, 100)).entries) == 10


@pytest.mark.parametrize("call", ["keep", "past", "agree"])
async def test_without_a_connection_each_call_raises(scene: Scene, call: str) -> None:
    """Before the start, and after the stop."""
    process, subject = Process(scene.broker), scene.subject()
    given: dict[str, tuple[Any, ...]] = {
        "keep": (subject, message("x"), LONG), "past": (subject, 1), "agree": (subject, b"x", 5.0),
    }  # fmt: skip
    for _ in range(2):
        with pytest.raises(Exception):  # noqa: B017, PT011 - each library has errors of its own
            async with asyncio.timeout(PATIENCE):
                await getattr(process.backplane, call)(*given[call])
        await process.start()
        await process.backplane.stop()


# The past


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 100])
async def test_the_past_has_the_last_messages(scene: Scene, count: int) -> None:
    """As many as are asked for, or more of them, and says what may be missing before."""
    subject = scene.subject()
    process = await scene.process(subject)
    sent = await keep(process, subject, *range(4))
    await process.wait_for(4)
    past = await process.store.past(subject, count)
    check(past, process.stamps(subject), sent)
    assert len(past.entries) >= min(count, 4)
    if count >= 5:  # there was nothing before
        assert past.floor < process.stamps(subject)[0].number


async def test_nothing_is_known_of_a_subject_without_messages(scene: Scene) -> None:
    """Its top is a position that stays good, whatever is sent to others."""
    subject, other = scene.subject(), scene.subject()
    process = await scene.process(subject)
    before = await process.store.past(subject, 10)
    assert not before.entries and before.floor <= before.top and before.epoch
    await keep(process, other, "x")
    await keep(process, subject, "a")
    await process.wait_for(1)
    [stamp] = process.stamps(subject)
    assert stamp.previous <= before.top < stamp.number and stamp.epoch == before.epoch
    assert (await process.store.past(subject, 10)).floor <= before.top


async def test_a_top_stays_good_while_others_get_messages(scene: Scene) -> None:
    """What is behind it is then exactly what was sent since."""
    subject, other = scene.subject(), scene.subject()
    process = await scene.process(subject)
    await keep(process, subject, "old")
    before = await process.store.past(subject, 1)
    await keep(process, other, *range(5))
    sent = await keep(process, subject, "a", "b")
    past = await process.store.past(subject, 10)
    assert past.floor <= before.top
    assert [bytes(e.data) for e in past.entries if e.number > before.top] == sent


@pytest.mark.parametrize("messages", [1, 3])
async def test_a_window_has_so_many_messages(scene: Scene, messages: int) -> None:
    """Or more; what is gone is above no floor, and stamps are as without a bound."""
    subject = scene.subject()
    process = await scene.process(subject)
    sent = await keep(process, subject, *range(6), window=Window(messages, 300.0, 1_000_000))
    await process.wait_for(6)
    stamps = process.stamps(subject)
    assert [s.previous for s in stamps[1:]] == [s.number for s in stamps[:-1]]
    past = await process.store.past(subject, 10)
    check(past, stamps, sent)
    assert messages <= len(past.entries)


async def test_a_window_has_so_many_seconds(scene: Scene) -> None:
    """What is older is gone, or has its age. The top stays, and so does the number before."""
    subject = scene.subject()
    process = await scene.process(subject)
    sent = await keep(process, subject, "a", "b", window=SHORT)
    await process.wait_for(2)
    await scene.broker.wait(0.1)
    async with asyncio.timeout(PATIENCE):  # A broker may take its time.
        past = await process.store.past(subject, 10)
        while any(entry.age < 0.05 for entry in past.entries):
            await asyncio.sleep(0.01)  # nobody tells when a broker drops it
            past = await process.store.past(subject, 10)
    check(past, process.stamps(subject), sent)
    sent += await keep(process, subject, "c")
    await process.wait_for(3)
    late = process.stamps(subject)[2]
    assert late.previous in (past.top, process.stamps(subject)[1].number)
    past = await process.store.past(subject, 10)
    check(past, process.stamps(subject), sent)
    assert past.entries


async def test_a_forgotten_message_leaves_its_position(scene: Scene) -> None:
    """A client that had all of a group that is quiet for longer than the window has all of it."""
    subject = scene.subject()
    process = await scene.process(subject)
    await keep(process, subject, "a", window=SHORT)
    await process.wait_for(1)
    await scene.broker.wait(0.2)
    [stamp] = process.stamps(subject)
    past = await process.store.past(subject, 10)
    assert past.epoch == stamp.epoch
    assert past.floor <= stamp.number <= past.top


async def test_ages_are_seconds(scene: Scene) -> None:
    """Of the broker, whatever the time of day is here."""
    subject = scene.subject()
    process = await scene.process(subject)
    await keep(process, subject, "a")
    await scene.broker.wait(0.1)
    await keep(process, subject, "b")
    first, second = (await process.store.past(subject, 2)).entries
    assert 0.09 <= first.age - second.age < 0.1 + PATIENCE and second.age >= 0.0


# Epochs


async def test_all_connections_have_one_epoch(scene: Scene) -> None:
    """A process that comes later, too; it has no character that a stamp could not hold."""
    subject = scene.subject()
    one = await scene.process(subject)
    await keep(one, subject, "a")
    await one.wait_for(1)
    await one.backplane.stop()
    two = await scene.process()
    past = await two.store.past(subject, 1)
    assert past.epoch == one.stamps(subject)[0].epoch
    assert read_stamp(stamped(Stamp(past.epoch, 1, 0), b"{}")) == (Stamp(past.epoch, 1, 0), b"{}")
    assert past.epoch.isascii() and '"' not in past.epoch and "\\" not in past.epoch


async def test_a_broker_that_has_forgotten_all_has_another_epoch(scene: Scene) -> None:
    """For readers, even before anything is sent, and for what is sent then."""
    subject = scene.subject()
    process = await scene.process(subject)
    await keep(process, subject, "a")
    before = await process.store.past(subject, 5)
    await scene.broker.flush()
    reader = await scene.process()  # one that was connected may have lost its connection
    past = await reader.store.past(subject, 5)
    assert past.epoch != before.epoch and not past.entries
    late = await scene.process(subject)
    sent = await keep(late, subject, "b")
    await late.wait_for(1)
    past = await reader.store.past(subject, 5)
    check(past, late.stamps(subject), sent)
    assert past.epoch != before.epoch


# Agreeing


async def test_who_comes_first_sets_a_value(scene: Scene) -> None:
    """The others get it, whatever they want it to be."""
    one, two, key = await scene.process(), await scene.process(), scene.subject()
    assert await one.store.agree(key, b"", 60.0) == b""
    assert await one.store.agree(key, b'{"a":1}', 60.0) == b'{"a":1}'
    for wanted in (b'{"a":2}', b"", b'{"a":1}'):
        assert await two.store.agree(key, wanted, 60.0) == b'{"a":1}'
    assert await two.store.agree(scene.subject(), b"other", 60.0) == b"other"


async def test_a_value_expires(scene: Scene) -> None:
    """After its seconds; then another one may be set."""
    one, two, key = await scene.process(), await scene.process(), scene.subject()
    await one.store.agree(key, b"1", 0.05)
    await scene.broker.wait(0.1)
    async with asyncio.timeout(PATIENCE):  # A broker may take its time.
        while await two.store.agree(key, b"2", 60.0) == b"1":
            await asyncio.sleep(0.01)  # nobody tells when the first is over
    assert await one.store.agree(key, b"1", 60.0) == b"2"


async def test_a_value_that_has_expired_is_there_for_who_only_asks(scene: Scene) -> None:
    """Until another one is set."""
    one, two, key = await scene.process(), await scene.process(), scene.subject()
    await one.store.agree(key, b"1", 0.02)
    await scene.broker.wait(0.05)
    assert await two.store.agree(key, b"", 60.0) == b"1"


async def test_the_same_value_lasts_longer(scene: Scene) -> None:
    """Each time that it is set; another one, and a question, change nothing."""
    one, two, key = await scene.process(), await scene.process(), scene.subject()
    await one.store.agree(key, b"1", 0.1)
    assert await two.store.agree(key, b"1", 60.0) == b"1"
    assert await two.store.agree(key, b"2", 0.1) == b"1"
    assert await two.store.agree(key, b"", 0.1) == b"1"
    await scene.broker.wait(0.15)
    assert await two.store.agree(key, b"", 0.1) == b"1"


async def test_only_one_of_several_at_a_time_sets_a_value(scene: Scene) -> None:
    """All of them get the same."""
    processes = [await scene.process() for _ in range(4)]
    key = scene.subject()
    values = await asyncio.gather(*(
        process.store.agree(key, b"%d" % n, 60.0) for n, process in enumerate(processes)
    ))  # fmt: skip
    assert len({*values}) == 1 and values[0] in (b"0", b"1", b"2", b"3")


# Stamps


@pytest.mark.parametrize("data", [
    b"{}", b"", b"\n", b"a b\n{}", b"a 1 2 3\n{}", b"a -1 0\n{}", b"a 1 x\n{}", b"{ 1 2\n{}",
    b'{"v":1}\n1 2 3',
])  # fmt: skip
def test_what_has_no_stamp_is_left_as_it_is(data: bytes) -> None:
    """A peer message begins with a brace, and other bytes are refused later."""
    assert read_stamp(data) == (None, data)


def test_a_stamp_is_read_as_it_was_written() -> None:
    """Whatever is behind it."""
    stamp = Stamp("Qx3k", 2**63, 0)
    for data in (b"{}", b"", b"\n", b"a 1 2\n{}"):
        assert read_stamp(stamped(stamp, data)) == (stamp, data)


def test_the_broker_in_memory_is_a_store() -> None:
    """To a type checker as well."""
    store: Store = SimulatedBroker().connection()
    assert isinstance(store, pachinko_cluster.SimulatedConnection)
