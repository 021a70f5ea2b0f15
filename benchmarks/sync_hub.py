"""What a call of `SyncHub` costs beside ``await hub.send``: ``python -m benchmarks.sync_hub URL``.

The broker is one that runs; nobody is in the group. CPU time is that of this process, both threads.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from pachinko import Hub, SyncHub

PAYLOAD = {"text": "the report is ready"}


def report(name: str, calls: int, seconds: float, cpu: float) -> None:
    print(f"{name:28} {calls / seconds:8,.0f} calls/s {cpu / calls * 1e6:6.0f} µs CPU a call")


def in_threads(url: str, threads: int, calls: int) -> None:
    with SyncHub(url) as hub, ThreadPoolExecutor(threads) as pool:

        def work(_: int) -> None:
            for _ in range(calls // threads):
                hub.send("bench", "notice", PAYLOAD)

        list(pool.map(work, range(threads)))  # the connection, and each thread
        begun, cpu = time.perf_counter(), time.process_time()
        list(pool.map(work, range(threads)))
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    report(f"SyncHub.send, {threads} threads", calls, seconds, cpu)


async def in_tasks(url: str, tasks: int, calls: int) -> None:
    async with Hub().open(url) as hub:

        async def work() -> None:
            for _ in range(calls // tasks):
                await hub.send("bench", "notice", PAYLOAD)

        await asyncio.gather(*(work() for _ in range(tasks)))
        begun, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(work() for _ in range(tasks)))
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    report(f"await hub.send, {tasks} tasks", calls, seconds, cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="such as redis://localhost:6379")
    parser.add_argument("--calls", type=int, default=6400)
    given = parser.parse_args()
    for count in (1, 32):
        in_threads(given.url, count, given.calls)
        asyncio.run(in_tasks(given.url, count, given.calls))


if __name__ == "__main__":
    main()
