"""Messages to kept groups stay in rings for a while, in bounds, under positions."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pachinko
from pachinko import Clock, Envelope, Hub, PachinkoError, Position, Rings, Window, encode

FOREVER = Window(10**6, 1000.0, 10**9)


class Now(Clock):
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: dict[object, tuple[float, Any, tuple[Any, ...]]] = {}

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, function: Any, *args: Any) -> Any:
        timer = Timer(self)
        self.calls[timer] = when, function, args
        return timer

    def move(self, seconds: float) -> None:
        self.now += seconds
        for timer, (when, function, args) in [*self.calls.items()]:
            if when <= self.now and timer in self.calls:
                del self.calls[timer]
                function(*args)


class Timer:
    def __init__(self, clock: Now) -> None:
        self.clock = clock

    def cancel(self) -> None:
        self.clock.calls.pop(self, None)


@pytest.fixture
def now() -> Iterator[Now]:
    now = Now()
    with patch.object(pachinko, "clock", now):
        yield now


def rings_of(window: Window = FOREVER, limit: int = 10**9) -> Rings:
    return Rings({"": window}, limit)


def add(rings: Rings, group: str = "g", text: str = "", *excluded: str) -> int:
    """Keep a message; return its number."""
    window = rings.window_of(group)
    assert window is not None
    data = encode(pachinko.Sent("said", payload=text, group=group))
    return rings.add(group, window, data, excluded).number


def numbers(rings: Rings, group: str = "g") -> list[int]:
    return [kept.number for kept in rings.last(group, 10**6)]


def at(rings: Rings, number: int) -> Position:
    return Position(rings.epoch, number)


def is_empty(rings: Rings) -> bool:
    """Whether nothing is counted that is not there."""
    rings.clear()
    rings.close("no such group")
    return not (rings._size or rings._full or rings._timers or rings._rings)


# Positions


@pytest.mark.parametrize(
    "text", ["a.1", "a.0", "4f.10", "a.b.7", "ä☃.3", "\ud800.3", f"a.{'9' * 100}", ".5"]
)
def test_a_position_is_read(text: str) -> None:
    """A client sends back what it was given."""
    assert str(pachinko.read_position(text)) == text


@pytest.mark.parametrize(
    "value",
    [
        *("", ".", "a", "a.", "a.-1", "a.+1", "a. 1", "a.1 ", "a.1_0", "a.\u0663", "a.\u00b2"),
        *("a.1.5.", "a.1e3", "a." + "1" * 199, None, True, 5, 1.5, [], ["a.1"], {"a": 1}, b"a.1"),
    ],
)
def test_what_is_no_position_is_nowhere(value: object) -> None:
    """Anything else stands for a position that is none of ours."""
    assert pachinko.read_position(value) == pachinko.NOWHERE


def test_nowhere_is_no_position_of_a_ring() -> None:
    """Who was nowhere has a gap, whatever the epoch."""
    rings = rings_of()
    assert rings.gap("g", pachinko.NOWHERE) == "epoch"
    rings.epoch = ""
    assert rings.gap("g", pachinko.read_position(".1")) == "epoch"


@pytest.mark.parametrize("payload", [None, {}, {"a": 1}, [], "}", "ä☃", 1.5])
def test_the_position_is_spliced_into_the_frame(payload: object) -> None:
    """The frame is what it was, and has `at`."""
    frame = encode(pachinko.Sent("said", payload=payload, group="g"))
    both = pachinko.with_position(frame, Position("e", 7))
    assert pachinko.msgspec.json.decode(both) == {
        **pachinko.msgspec.json.decode(frame), "at": "e.7",
    }  # fmt: skip


# Rules


@pytest.mark.parametrize(
    ("group", "prefix"),
    [
        *(("room:1", "room:"), ("room:", "room:"), ("room:vip:1", "room:vip:"), ("room", "")),
        *(("", ""), ("ROOM:1", ""), ("\ud800", "")),
    ],
)
def test_the_longest_prefix_counts(group: str, prefix: str) -> None:
    """A rule is for the groups whose names begin with it."""
    rules = {each: Window(len(each) + 1, 1.0, 1) for each in ("", "room:", "room:vip:")}
    assert Rings(rules, 1).window_of(group) == rules[prefix]


def test_a_group_without_a_rule_is_not_kept() -> None:
    """It has no window."""
    assert Rings({"room:": FOREVER}, 1).window_of("chat:1") is None


# The window


def test_only_so_many_messages_are_kept(now: Now) -> None:
    """The oldest go first, and who misses one of them has a gap."""
    rings = rings_of(Window(3, 1000.0, 10**6))
    for _ in range(5):
        add(rings)
    assert numbers(rings) == [3, 4, 5]
    assert [rings.gap("g", at(rings, n)) for n in range(6)] == ["expired"] * 2 + [None] * 4
    assert is_empty(rings)


def test_a_window_of_one_message_has_the_latest(now: Now) -> None:
    """As a feed of prices wants it."""
    rings = rings_of(Window(1, 1000.0, 10**6))
    for _ in range(3):
        add(rings)
    assert numbers(rings) == [3]
    assert rings.gap("g", at(rings, 2)) is None


def test_messages_expire(now: Now) -> None:
    """Each after so many seconds, without another call."""
    rings = rings_of(Window(10, 10.0, 10**6))
    add(rings)
    now.move(6)
    add(rings)
    assert numbers(rings) == [1, 2]
    now.move(4)
    assert numbers(rings) == [2]
    assert rings.gap("g", at(rings, 0)) == "expired"
    now.move(6)
    assert numbers(rings) == [] and not now.calls
    assert [rings.gap("g", at(rings, n)) for n in range(4)] == [*["expired"] * 2, None, "epoch"]
    assert is_empty(rings)


def test_only_so_many_bytes_are_kept(now: Now) -> None:
    """What they push out is named so, also when the ring has been forgotten."""
    rings = rings_of(Window(10, 10.0, 2_000))
    for _ in range(4):
        add(rings, "g", "x" * 400)
    assert numbers(rings) == [3, 4]
    assert [rings.gap("g", at(rings, n)) for n in range(3)] == ["limit", "limit", None]
    now.move(10)
    assert [rings.gap("g", at(rings, n)) for n in range(5)] == [
        "limit", "limit", "expired", "expired", None,
    ]  # fmt: skip
    assert is_empty(rings)


def test_a_message_larger_than_the_window_is_not_kept(now: Now) -> None:
    """It is sent all the same, and who misses it has a gap."""
    rings = rings_of(Window(10, 10.0, 2_000))
    add(rings)
    assert add(rings, "g", "x" * 2_000) == 2
    assert numbers(rings) == [] and not now.calls
    assert [rings.gap("g", at(rings, n)) for n in (0, 1, 2)] == ["limit", "limit", None]
    assert add(rings) == 3
    assert numbers(rings) == [3] and rings.gap("g", at(rings, 1)) == "limit"
    assert is_empty(rings)


def test_all_groups_together_have_a_limit(now: Now) -> None:
    """The group that was quiet for the longest time loses its messages first."""
    rings = rings_of(limit=9_000)
    for group in "abc":
        add(rings, group, "x" * 400)
    add(rings, "a", "x" * 400)
    add(rings, "d", "x" * 400)
    assert {group: numbers(rings, group) for group in "abcd"} == {
        "a": [1, 4], "b": [], "c": [3], "d": [5],
    }  # fmt: skip
    assert rings.gap("b", at(rings, 1)) == "limit"
    assert rings.gap("b", at(rings, 2)) is None
    assert is_empty(rings) and not now.calls


def test_a_limit_may_be_too_small_for_any_message(now: Now) -> None:
    """Then nothing is kept, and everything is announced."""
    rings = rings_of(limit=1)
    for group in "ab":
        add(rings, group)
    assert numbers(rings, "a") == numbers(rings, "b") == []
    assert rings.gap("a", at(rings, 0)) == "limit" and rings.gap("a", at(rings, 1)) is None
    assert is_empty(rings)


def test_a_ring_without_messages_may_stay(now: Now) -> None:
    """A subclass may keep it; then a limit finds nothing to drop."""

    class Staying(Rings):
        def _end(self, ring: pachinko.Ring) -> None:
            pass

    rings = Staying({"": FOREVER}, 1)
    add(rings)
    assert numbers(rings) == [] and rings.gap("g", at(rings, 0)) == "limit"
    add(rings)
    assert is_empty(rings)


# Quiet groups


def test_a_quiet_group_gives_no_false_gap(now: Now) -> None:
    """A position stays good while nothing of its group was dropped behind it."""
    rings = rings_of(Window(10, 10.0, 10**6))
    before, after = add(rings, "quiet") - 1, add(rings, "busy")
    for _ in range(10):
        now.move(5)
        add(rings, "busy")
    assert numbers(rings, "quiet") == []
    assert rings.gap("quiet", at(rings, before)) == "expired"
    assert [rings.gap("quiet", at(rings, n)) for n in (1, after, 12)] == [None, None, None]
    add(rings, "quiet")
    assert rings.gap("quiet", at(rings, 1)) is None
    assert rings.gap("never", at(rings, 0)) is None


def test_very_many_rings_are_forgotten(now: Now) -> None:
    """Then only a position that is older than all of the forgotten ones is refused."""
    with patch.object(pachinko, "_FLOORS", 2):
        rings = rings_of(Window(10, 10.0, 10**6))
        for group in "abcd":
            add(rings, group)
        now.move(10)
    assert [rings.gap("a", at(rings, n)) for n in range(4)] == ["expired"] * 2 + [None] * 2
    assert [rings.gap("d", at(rings, n)) for n in (3, 4)] == ["expired", None]
    add(rings, "a")
    assert rings.gap("a", at(rings, 1)) == "expired" and rings.gap("a", at(rings, 2)) is None


@pytest.mark.parametrize("position", [Position("other", 1), Position("", 1)])
def test_another_epoch_is_a_gap(position: Position) -> None:
    """A position of another life, or of another broker, says nothing of this one."""
    assert rings_of().gap("g", position) == "epoch"


def test_each_life_has_another_epoch() -> None:
    """Positions of one process are none of the next one's."""
    assert len({rings_of().epoch for _ in range(100)}) == 100


# Reading


async def test_a_client_gets_some_messages_at_a_time() -> None:
    """At most 32, and no more than are asked for."""
    rings = rings_of()
    for _ in range(50):
        add(rings)
    assert [kept.number for kept in rings.after("g", 3)] == [*range(4, 36)]
    assert [kept.number for kept in rings.after("g", 3, 2)] == [4, 5]
    assert [kept.number for kept in rings.after("g", 48)] == [49, 50]
    assert rings.after("g", 50) == [] and rings.after("other", 0) == ()
    assert is_empty(rings)


async def test_a_client_gets_some_bytes_at_a_time() -> None:
    """At most 64 KiB, but one message in any case."""
    rings = rings_of()
    for size in (30_000, 30_000, 30_000, 100_000, 10):
        add(rings, "g", "x" * size)
    sizes = [len(rings.after("g", number)) for number in range(5)]
    assert sizes == [2, 2, 1, 1, 1]
    assert is_empty(rings)


def test_rings_that_are_always_ready_have_no_start() -> None:
    """Nobody has to wait for them."""
    rings = rings_of()
    assert rings.is_ready("g", None) and rings.start_of("g") is pachinko.NOWHERE


def test_excluded_ids_are_kept_once(now: Now) -> None:
    """Messages that exclude nobody share one set."""
    rings = rings_of()
    add(rings)
    add(rings)
    add(rings, "g", "", "a", "b")
    first, second, third = rings.last("g", 3)
    assert first.excluded is second.excluded and third.excluded == {"a", "b"}


# What it takes


@pytest.mark.parametrize("excluded", [0, 1, 3])
@pytest.mark.parametrize(("groups", "messages"), [(1, 400), (400, 1), (20, 20)])
@pytest.mark.parametrize("text", ["", "☃" * 100], ids=("empty", "snow"))
async def test_bytes_are_what_messages_really_take(
    groups: int, messages: int, excluded: int, text: str
) -> None:
    """What is counted is within a tenth of what is allocated."""
    rings = rings_of()
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(groups):
            for _ in range(messages):
                add(rings, f"room:{number:06}", text, *(f"{n:024}" for n in range(excluded)))
        real, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rings._size == pytest.approx(real, rel=0.1)
    assert is_empty(rings)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 900), st.sampled_from((0.0, 1.0, 11.0))),
        max_size=30,
    ),
    st.integers(1, 5), st.integers(500, 4_000), st.integers(500, 12_000),
)  # fmt: skip
def test_a_ring_has_what_a_list_has(
    steps: list[tuple[str, int, float]], messages: int, size: int, limit: int
) -> None:
    """Each group has the end of what was sent, in bounds, and gaps say what is missing."""
    now = Now()
    with patch.object(pachinko, "clock", now):
        rings = rings_of(Window(messages, 10.0, size), limit)
        sent: dict[str, list[tuple[int, float]]] = {group: [] for group in "abc"}
        for group, length, seconds in steps:
            sent[group].append((add(rings, group, "x" * length), now.now))
            now.move(seconds)
            assert rings._size <= max(limit, 1400)
            for each, all_ in sent.items():
                kept = numbers(rings, each)
                assert kept == [n for n, _ in all_][len(all_) - len(kept) :]
                assert len(kept) <= messages and sum(m.weight for m in rings.last(each, 99)) <= size
                assert all(time + 10 > now.now for n, time in all_ if n in kept)
                gone = max((n for n, _ in all_ if n not in kept), default=0)
                for number in range(len(steps) + 2):
                    reason = rings.gap(each, at(rings, number))
                    top = rings.top_of(each).number
                    assert (reason is None) == (gone <= number <= top)
        assert is_empty(rings) and not now.calls


# Setting up

WRONG: list[tuple[dict[str, Any], str]] = [
    *(({"messages": value}, "messages=100") for value in (0, -1, 1.5, True, "5", None)),
    *(({"bytes": value}, "bytes=1_048_576") for value in (0, -1, 1.5, True, "5", None)),
    *(
        ({"seconds": value}, "seconds=300.0")
        for value in (0, 0.0, -1, float("inf"), float("nan"), True, "5", None)
    ),
]


@pytest.mark.parametrize(("options", "cure"), WRONG)
def test_a_wrong_window_is_refused(options: dict[str, Any], cure: str) -> None:
    """The error shows the call as it should be, and what was given; nothing has changed."""
    hub = Hub()
    with pytest.raises(PachinkoError) as error:
        hub.keep("room:", **options)
    (given_,) = options.values()
    assert f'hub.keep("room:", {cure})' in str(error.value)
    assert str(error.value).endswith(f"got {given_!r}")
    assert hub.state.rules == {}


@pytest.mark.parametrize("prefix", [None, 5, b"room:", ["room:"], ("room:",)])
def test_a_wrong_prefix_is_refused(prefix: Any) -> None:
    """It is a text; the error shows one."""
    with pytest.raises(PachinkoError, match=r'hub\.keep\("room:"\)'):
        Hub().keep(prefix)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "5"])
def test_wrong_history_bytes_are_refused(value: Any) -> None:
    """The error shows the call; nothing has changed, not even what was right in it."""
    hub = Hub()
    with pytest.raises(PachinkoError, match=r"hub\.configure\(history_bytes=67_108_864\)"):
        hub.configure(namespace="other", history_bytes=value)
    assert hub.state.namespace is None


def test_a_mistake_beside_history_bytes_changes_nothing() -> None:
    """What is right in a call is not set if something else is wrong."""
    hub = Hub()
    with pytest.raises(TypeError):
        hub.configure(history_bytes=5, converter=object())  # type: ignore[arg-type]  # a mistake
    hub.configure(namespace="other")
    assert hub.state.history_bytes == 67_108_864


def test_settings_are_kept() -> None:
    """Each call changes what it names, and None resets it."""
    hub = Hub()
    hub.keep("a:", messages=5)
    hub.configure(history_bytes=1000)
    hub.keep("b:", seconds=1, bytes=10)
    hub.keep("a:", messages=6)
    hub.configure(namespace="other")
    assert hub.state.rules == {
        "a:": Window(6, 300.0, 1_048_576), "b:": Window(100, 1, 10),
    }  # fmt: skip
    assert hub.state.history_bytes == 1000 and hub.state.namespace == "other"
    hub.configure(history_bytes=None)
    assert hub.state.history_bytes == 67_108_864


@pytest.mark.parametrize("call", ["keep", "configure"])
async def test_a_hub_that_runs_is_set_up(call: str) -> None:
    """Afterwards it is too late, and the error says so."""
    hub = Hub()
    async with hub.open("memory://"):
        with pytest.raises(PachinkoError, match=rf"hub\.{call}\(\) before the app starts"):
            hub.keep("room:") if call == "keep" else hub.configure(history_bytes=5)


# Asking the hub


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    hub = Hub()
    hub.keep("room:", messages=5)
    async with hub.open("memory://"):
        yield hub


async def past(hub: Hub, *args: Any) -> list[Envelope]:
    return [envelope async for envelope in hub.history(*args)]


async def test_the_history_has_the_latest_messages(hub: Hub) -> None:
    """The oldest of them first, each with its position, and payloads as JSON."""
    for number in range(7):
        await hub.send("room:1", "said", {"n": number})
        await hub.send("room:2", "said")
    found = await past(hub, "room:1")
    assert [envelope.payload for envelope in found] == [{"n": n} for n in range(2, 7)]
    assert {(each.type, each.group, each.id) for each in found} == {("said", "room:1", None)}
    epoch = hub.state.relay.history.rings.epoch  # type: ignore[union-attr]  # groups are kept
    assert [each.at for each in found] == [f"{epoch}.{2 * n + 1}" for n in range(2, 7)]
    assert await past(hub, "room:1", 2) == found[-2:]
    assert await past(hub, "room:1", 0) == []
    assert await past(hub, "room:3") == []


async def test_a_position_is_behind_all_that_was_sent(hub: Hub) -> None:
    """Whatever the group has got."""
    first = await hub.position("room:1")
    await hub.send("room:1", "said")
    await hub.send("other", "said")
    second = await hub.position("room:1")
    assert first.endswith(".0") and second.endswith(".1") and await hub.position("room:") == second


@pytest.mark.parametrize("last", [-1, 1.0, True, None, "5"])
async def test_a_wrong_count_is_refused(hub: Hub, last: Any) -> None:
    """It is a number, at least 0."""
    with pytest.raises(ValueError, match="at least 0"):
        await past(hub, "room:1", last)


NAMES = [("chat:1", "'chat:'"), ("chat", "'chat'"), ("", "''"), ("a:b:c", "'a:'")]


@pytest.mark.parametrize(("group", "prefix"), NAMES)
@pytest.mark.parametrize("keeps", [True, False])
async def test_a_group_that_is_not_kept_is_refused(group: str, prefix: str, keeps: bool) -> None:
    """The error shows how to keep it, whether or not others are."""
    hub = Hub()
    if keeps:
        hub.keep("room:")
    async with hub.open("memory://"):
        for call in (hub.position(group), past(hub, group)):
            with pytest.raises(PachinkoError) as error:
                await call
            assert f"hub.keep({prefix}) before the app starts" in str(error.value)


@pytest.mark.parametrize("group", [None, 5, b"room:1"])
async def test_a_group_is_named_by_a_text(hub: Hub, group: Any) -> None:
    """As everywhere."""
    for call in (hub.position(group), past(hub, group)):
        with pytest.raises(TypeError, match="a group is named by a str"):
            await call


async def test_a_hub_that_does_not_run_has_no_history(caplog: pytest.LogCaptureFixture) -> None:
    """It warns, as where it sends, and its position is that of nothing."""
    hub = Hub()
    hub.keep("room:")
    await hub.send("room:1", "said")
    assert await past(hub, "room:1") == []
    assert pachinko.read_position(await hub.position("room:1")) == pachinko.NOWHERE
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("method", "cure"), [("position", r"use hub\.call_threadsafe\(hub\.position, "),
                         ("history", r"use `async def f\(\)`.* hub\.call_threadsafe\(f, ")],
)  # fmt: skip
async def test_another_loop_is_refused(hub: Hub, method: str, cure: str) -> None:
    """As everywhere: the error shows the call for threads, or what can be called so."""
    await hub.send("room:1", "said", 1)
    call = hub.position("room:1") if method == "position" else past(hub, "room:1")
    with pytest.raises(PachinkoError, match=cure):
        await asyncio.to_thread(asyncio.run, call)


async def test_a_thread_asks_for_a_position(hub: Hub) -> None:
    """By the call for threads."""
    await hub.send("room:1", "said")
    future = await asyncio.to_thread(hub.call_threadsafe, hub.position, "room:1")
    assert await asyncio.wrap_future(future) == await hub.position("room:1")


async def test_a_new_start_is_a_new_epoch() -> None:
    """What was kept is gone, with its timers."""
    hub, epochs = Hub(), set()
    hub.keep("")
    for _ in range(2):
        async with hub.open("memory://"):
            await hub.send("a", "said")
            rings = hub.state.relay.history.rings  # type: ignore[union-attr]  # groups are kept
            assert len(await past(hub, "a")) == 1
            epochs.add((await hub.position("a")).partition(".")[0])
        assert is_empty(rings)
    assert len(epochs) == 2


@pytest.mark.parametrize("group", ["room:1", "room:\ud800", "room:\udc80x", "room: /?#☃\0\n'\""])
async def test_a_group_may_have_any_name(hub: Hub, group: str) -> None:
    """Half a surrogate pair comes out as U+FFFD, as in each frame."""
    await hub.send(group, "said", 1)
    (envelope,) = await past(hub, group)
    assert envelope.group == group and envelope.payload == 1
    assert (await hub.position(group)) == envelope.at


@pytest.mark.parametrize("data", [b"x", bytearray(b"x"), memoryview(b"x"), b""])
async def test_a_binary_frame_is_refused(hub: Hub, data: Any) -> None:
    """It can have no position. To other groups, and to all, it is sent."""
    with pytest.raises(PachinkoError, match=r'hub\.send\(group, "file", \{"data": data\}\)'):
        await hub.send("room:1", data)
    await hub.send("chat:1", data)
    await hub.broadcast(data)
    await hub.send("room:1", "file", {"data": bytes(data)})
    assert len(await past(hub, "room:1")) == 1
