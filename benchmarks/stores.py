"""Measure how NATS and Redis keep groups: ``python -m benchmarks.stores nats`` (or ``redis``).

10,000 groups have 100 messages of 200 bytes each, sent in turn, which is the worst order for a store
that has one file for all of them. The numbers are those of the table in `docs/scaling.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import psutil
from brokers import running

import pachinko_cluster
from pachinko import Window

OUTSTANDING = 4_000  # messages that are not acknowledged yet
READS = 32  # as many as a process makes at a time
DATA = b"{%b}" % (b"x" * 198)


async def run_all(call: Callable[[int], Awaitable[Any]], count: int, limit: int) -> float:
    """Return the seconds for *count* calls, *limit* at a time."""
    numbers, begun = iter(range(count)), time.perf_counter()

    async def work() -> None:
        for number in numbers:
            await call(number)

    await asyncio.gather(*(work() for _ in range(limit)))
    return time.perf_counter() - begun


async def latency(call: Callable[[int], Awaitable[Any]], count: int) -> str:
    """Return the median and the 99th percentile of *count* calls, one after the other."""
    seconds = list[float]()
    for number in range(count):
        begun = time.perf_counter()
        await call(number)
        seconds.append(time.perf_counter() - begun)
    late = statistics.quantiles(seconds, n=100)[98]
    return f"{statistics.median(seconds) * 1000:.2f} ms, 99 %: {late * 1000:.1f}"


async def measure(kind: Literal["nats", "redis"], groups: int, messages: int) -> None:
    options = ("-js", "-sd", "store") if kind == "nats" else ()
    window = Window(messages, 300.0, 1_048_576)

    async def deliver(subject: str, data: bytes) -> None: ...

    async with running(kind, *options) as server:
        assert server.process is not None
        store: Any = pachinko_cluster.backplane_of(pachinko_cluster.read_broker(server.url))
        await store.start(deliver, lambda _: None)

        async def keep(n: int) -> None:
            await store.keep(f"pachinko.g.{n % groups}", DATA, window)

        async def read(n: int, count: int = messages) -> None:
            await store.past(f"pachinko.g.{n * 37 % groups}", count)

        async def read_top(n: int) -> None:
            await read(n, 0)

        print("keep, one after the other:", await latency(keep, groups))
        count = groups * (messages - 1)
        seconds = await run_all(keep, count, OUTSTANDING)
        print(f"keep, {OUTSTANDING} outstanding: {count / seconds:,.0f} a second")
        broker = psutil.Process(server.process.pid)
        size = sum(f.stat().st_size for f in Path(server.folder.name).rglob("*") if f.is_file())
        rss, cpu = broker.memory_info().rss / 1e6, sum(broker.cpu_times()[:2])
        print(f"the broker: {rss:,.0f} MB, {size / 1e6:,.0f} MB on disk, {cpu:.0f} s of CPU")
        print("the top of a group:", await latency(read_top, 1000))
        print("all of a group:", await latency(read, 100))
        print(f"all tops at once: {await run_all(read_top, groups, READS):.2f} s")
        reads = asyncio.ensure_future(run_all(read, min(500, groups), READS))
        await asyncio.sleep(0.1)  # the reads have begun
        print("keep meanwhile:", await latency(keep, 20))
        print(f"all of 500 groups at once: {await reads:.2f} s")
        await store.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("broker", choices=["nats", "redis"])
    parser.add_argument("--groups", type=int, default=10_000)
    parser.add_argument("--messages", type=int, default=100)
    given = parser.parse_args()
    asyncio.run(measure(given.broker, given.groups, given.messages))
