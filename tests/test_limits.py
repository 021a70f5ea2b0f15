"""What bounds one connection: time, messages, options."""

from __future__ import annotations

import asyncio
import collections

import pytest

import pachinko

# Rate


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
        with pachinko.TimeLimit() as limit:
            with pytest.raises(ExceptionGroup):
                async with asyncio.TaskGroup() as group:
                    group.create_task(fail())
            limit.end_at(in_ms(5))
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await asyncio.create_task(work())


# Counts


def test_errors_are_counted_up_to_a_number_of_codes() -> None:
    """An application may make codes up without end."""
    counts = collections.Counter[str](received=1)
    for n in range(200):
        pachinko.count_error(counts, str(n))
    pachinko.count_error(counts, "0")
    assert counts["errors.0"] == 2 and counts["errors.97"] == 1
    assert counts["errors.other"] == 101 and len(counts) == 101
