"""How a broker keeps groups: ``python -m benchmarks.stores URL``.

10,000 groups get 100 messages of 200 bytes each, in turn. That is the worst order for a store that
has one file for all of them. The broker is one that runs, with an empty store.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pachinko_cluster
from pachinko import Window

OUTSTANDING = 4_000  # messages that are not acknowledged yet
READS = 32  # as many as a process makes at a time
DATA = b"{%b}" % (b"x" * 198)
Call = Callable[[int], Awaitable[Any]]


async def run_all(call: Call, count: int, limit: int) -> float:
    """The seconds for *count* calls, *limit* at a time."""
    numbers, begun = iter(range(count)), time.perf_counter()

    async def work() -> None:
        for number in numbers:
            await call(number)

    await asyncio.gather(*(work() for _ in range(limit)))
    return time.perf_counter() - begun


async def latency(call: Call, count: int) -> str:
    """The median and the 99th percentile of *count* calls, one after the other."""
    times = [time.perf_counter()]
    for number in range(count):
        await call(number)
        times.append(time.perf_counter())
    seconds = [after - before for before, after in itertools.pairwise(times)]
    late = statistics.quantiles(seconds, n=100)[98]
    return f"{statistics.median(seconds) * 1000:.2f} ms, 99 %: {late * 1000:.1f} ms"


async def measure(url: str, groups: int, messages: int) -> None:
    window = Window(messages, 3600.0, 1_048_576)
    store: Any = pachinko_cluster.backplane_of(pachinko_cluster.read_broker(url))

    async def deliver(subject: str, data: bytes) -> None: ...

    async def keep(n: int) -> None:
        await store.keep(f"pachinko.g.{n % groups}", DATA, window)

    async def read(n: int, count: int = messages) -> None:
        await store.past(f"pachinko.g.{n * 37 % groups}", count)

    async def read_top(n: int) -> None:
        await read(n, 0)

    await store.start(deliver, lambda _: None)
    print("keep, one after the other:", await latency(keep, groups))
    count = groups * (messages - 1)
    rate = count / await run_all(keep, count, OUTSTANDING)
    print(f"keep, {OUTSTANDING} outstanding: {rate:,.0f} a second")
    print("the top of a group:", await latency(read_top, 1000))
    print(f"all of a group, {messages} messages:", await latency(read, 100))
    print(f"all tops at once: {await run_all(read_top, groups, READS):.2f} s")
    reads = asyncio.ensure_future(run_all(read, min(500, groups), READS))
    await asyncio.sleep(0.1)  # the reads have begun
    print("keep meanwhile:", await latency(keep, 20))
    print(f"all of 500 groups at once: {await reads:.2f} s")
    await store.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="such as nats://localhost:4222")
    parser.add_argument("--groups", type=int, default=10_000)
    parser.add_argument("--messages", type=int, default=100)
    given = parser.parse_args()
    asyncio.run(measure(given.url, given.groups, given.messages))
