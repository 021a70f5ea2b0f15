"""The outbox, and what else a connection is made of."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any

import pytest

import pachinko


def waiting(name: str, size: int = 0, group: str | None = None) -> pachinko.Waiting:
    return pachinko.Waiting({"type": "websocket.send", "text": name}, None, size, group)


def texts(outbox: pachinko.Outbox) -> list[str]:
    """Everything that is taken out, in order."""
    taken = []
    while (item := outbox.take()) is not None:
        taken.append(item.event.get("text", item.event["type"]))
    return taken


def test_an_outbox_keeps_the_order() -> None:
    """Answers and pushed messages leave as they came; only pushed ones count."""
    outbox = pachinko.Outbox()
    for item in (waiting("a"), waiting("b", 5, "g"), waiting("c"), waiting("d", 7)):
        outbox.put(item)
    assert (outbox.pushed, outbox.size) == (2, 12)
    assert texts(outbox) == ["a", "b", "c", "d"]
    assert (outbox.pushed, outbox.size) == (0, 0)


def test_the_oldest_pushed_message_is_dropped_and_never_an_answer() -> None:
    """Its group is remembered, once, and announced behind all that waits."""
    outbox = pachinko.Outbox()
    for item in (waiting("a"), waiting("b", 5, "g"), waiting("c", 7), waiting("d", 9, "g")):
        outbox.put(item)
    for _ in range(3):
        outbox.drop_oldest()
    assert (outbox.pushed, outbox.size) == (0, 0)
    gap = '{"type":"gap","payload":{"group":%s}}'
    assert texts(outbox) == ["a", gap % '"g"', gap % "null"]
    assert texts(outbox) == []


def test_gaps_are_announced_before_a_close() -> None:
    """Behind the close frame nobody would read them."""
    outbox = pachinko.Outbox()
    outbox.put(waiting("a", 1, "g"))
    outbox.drop_oldest()
    outbox.put(pachinko.Waiting({"type": "close"}, close=pachinko.Close()))
    assert texts(outbox) == ['{"type":"gap","payload":{"group":"g"}}', "close"]


async def test_whoever_waits_learns_that_the_outbox_was_cleared() -> None:
    """Cancelled senders are passed over, the others get False."""
    outbox = pachinko.Outbox()
    loop = asyncio.get_running_loop()
    sent, cancelled = loop.create_future(), loop.create_future()
    for future in (cancelled, sent):
        outbox.put(pachinko.Waiting({"type": "websocket.send"}, future))
    outbox.put(waiting("pushed", 3))
    cancelled.cancel()
    outbox.clear()
    assert sent.result() is False and texts(outbox) == []
    outbox.put(pachinko.Waiting({"type": "websocket.send"}, cancelled))
    assert outbox.take() is None


def begun(coroutine: Coroutine[Any, Any, Any]) -> pachinko.Suspended:
    """The rest of *coroutine*, which waits for something."""
    steps = coroutine.__await__()
    return pachinko.Suspended(steps, next(steps))


async def test_suspended_is_awaited_to_the_end() -> None:
    """The rest goes on when what it waits for is there, and gives or raises its outcome."""

    async def wait(gate: asyncio.Future[int]) -> int:
        return await gate

    for outcome in (5, KeyError("x")):
        gate: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        rest = begun(wait(gate))
        if isinstance(outcome, int):
            asyncio.get_running_loop().call_soon(gate.set_result, outcome)
            assert await rest == outcome
        else:
            asyncio.get_running_loop().call_soon(gate.set_exception, outcome)
            with pytest.raises(KeyError):
                await rest


async def test_suspended_is_one_task_for_the_coroutine() -> None:
    """Timeouts, `current_task` and context variables inside see the awaiting task throughout."""
    variable = contextvars.ContextVar("variable", default=0)
    seen: list[Any] = []

    async def coroutine() -> None:
        seen.append(asyncio.current_task())
        variable.set(1)
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            seen.append("timed out")
        seen.append(asyncio.current_task())
        seen.append(variable.get())

    await begun(coroutine())
    task = asyncio.current_task()
    assert seen == [task, "timed out", task, 1]


async def test_suspended_passes_a_cancellation_on() -> None:
    """Cancelling the awaiting task cancels the coroutine inside, which may clean up."""
    seen: list[str] = []

    async def coroutine() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            seen.append("cleaned up")

    async def outer() -> None:
        await begun(coroutine())

    task = asyncio.create_task(outer())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["cleaned up"]


def test_the_rate_admits_a_burst_and_then_the_average() -> None:
    """Five at once, then one each two seconds; a pause does not pile up more than the burst."""
    rate = pachinko.Rate(5, 10.0)
    assert [rate.take(100.0) for _ in range(5)] == [0.0] * 5
    assert rate.take(100.0) == pytest.approx(2.0)
    assert rate.take(101.0) == pytest.approx(1.0)
    assert rate.take(102.0) == 0.0
    assert [rate.take(1000.0) for _ in range(5)] == [0.0] * 5
    assert rate.take(1000.0) > 0


def test_a_rate_is_abused_by_ten_times_as_many() -> None:
    """Refusals are counted within the period; older ones are forgiven."""
    rate = pachinko.Rate(1, 1.0)
    for _ in range(11):
        rate.take(100.0)
    assert not rate.is_abused
    rate.take(100.0)
    assert rate.is_abused
    rate.take(200.0)
    rate.take(200.0)
    assert not rate.is_abused


# Time limits


def in_ms(number: float) -> float:
    return asyncio.get_running_loop().time() + number / 1000


async def test_a_time_limit_ends_what_takes_longer() -> None:
    """With a `TimeoutError`, and nothing of it is left in the task."""
    limit = pachinko.TimeLimit(in_ms(5))
    with pytest.raises(TimeoutError), limit:
        await asyncio.Event().wait()
    assert limit.expired
    task = asyncio.current_task()
    assert task is not None and not task.cancelling()
    limit.end_at(in_ms(-1))
    await asyncio.sleep(0.01)  # too late: it is not cancelled


async def test_a_time_limit_leaves_alone_what_is_in_time() -> None:
    """Also what raises; and one without a time waits until it is given one, or another."""
    with pachinko.TimeLimit(in_ms(60_000)) as limit:
        pass
    with pytest.raises(KeyError), pachinko.TimeLimit(in_ms(60_000)):
        raise KeyError
    assert not limit.expired


async def test_a_time_limit_may_be_moved() -> None:
    """One without a time waits until it is given one, and then another."""

    async def work() -> None:
        with pachinko.TimeLimit() as limit:
            limit.end_at(in_ms(60_000))
            limit.end_at(in_ms(5))
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await work()


async def test_a_time_limit_that_has_expired_stays_so() -> None:
    """What catches its cancellation may return; another time changes nothing any more."""
    with pachinko.TimeLimit(in_ms(1)) as limit:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.Event().wait()
        limit.end_at(in_ms(-1))
        await asyncio.sleep(0.01)
    assert limit.expired


async def test_a_time_limit_cancels_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that swallows a cancellation and goes on is cancelled until it ends."""
    monkeypatch.setattr(pachinko, "_CANCEL_AGAIN", 0.005)
    swallowed: list[int] = []

    async def work() -> None:
        with pachinko.TimeLimit(in_ms(1)):
            while len(swallowed) < 3:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    swallowed.append(1)
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await work()
    assert len(swallowed) == 3


@pytest.mark.parametrize("late", [False, True])
async def test_a_time_limit_takes_no_other_cancellation_for_its_own(late: bool) -> None:
    """One from elsewhere goes on up, also while what has expired cleans up."""
    begun = asyncio.Event()

    async def work() -> None:
        with pachinko.TimeLimit(in_ms(1) if late else None):
            try:
                if not late:
                    begun.set()
                await asyncio.Event().wait()
            finally:
                if late:
                    begun.set()
                    await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancellations_left_behind_do_not_hide_a_time_limit() -> None:
    """On Python 3.11 and 3.12 a `TaskGroup` whose failure was caught leaves one."""

    async def fail() -> None:
        raise ValueError

    async def work() -> None:
        with pachinko.TimeLimit(in_ms(5)):
            with pytest.raises(ExceptionGroup):
                async with asyncio.TaskGroup() as group:
                    group.create_task(fail())
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await asyncio.create_task(work())
