"""When a simulation is at rest, and what it says of an application that waits for the outside."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import falcon.asgi
import pytest
from support import PATIENCE

from pachinko import Hub, Pachinko, simulate
import contextlib

Handler = Callable[[Any], Coroutine[Any, Any, None]]
SHORT = 0.15  # seconds that a test waits for what does not come
LONG = 60.0  # seconds that the outside takes where a test does not wait for it


def app_of(*handlers: Callable[..., Any], **options: Any) -> tuple[falcon.asgi.App, Pachinko]:
    """Return an application with *handlers*, each for the type of its name."""
    app = falcon.asgi.App()
    ws = Pachinko(app, "/ws", hub=Hub(), **options)
    for handler in handlers:
        ws.on(handler.__name__)(handler)
    return app, ws


class Gate:
    """What handlers wait for, and only a test or another handler opens."""

    def __init__(self) -> None:
        self.event, self.lock, self.queue = asyncio.Event(), asyncio.Lock(), asyncio.Queue[int]()
        self.condition, self.semaphore = asyncio.Condition(), asyncio.Semaphore(0)
        self.future = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(self.event.wait())

    def open(self) -> None:
        self.event.set()
        self.semaphore.release()
        self.queue.put_nowait(1)
        self.future.done() or self.future.set_result(None)


async def by_event(gate: Gate) -> None:
    await gate.event.wait()


async def by_semaphore(gate: Gate) -> None:
    await gate.semaphore.acquire()


async def by_queue(gate: Gate) -> None:
    await gate.queue.get()


async def by_future(gate: Gate) -> None:
    await gate.future


async def by_task(gate: Gate) -> None:
    await gate.task


async def by_gather(gate: Gate) -> None:
    await asyncio.gather(gate.event.wait(), by_event(gate))


async def by_gather_of_futures(gate: Gate) -> None:
    await asyncio.gather(gate.future, gate.task)


async def by_shield(gate: Gate) -> None:
    await asyncio.shield(gate.event.wait())


async def by_shielded_future(gate: Gate) -> None:
    await asyncio.shield(gate.future)


async def by_group(gate: Gate) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(by_event(gate))


async def by_wait(gate: Gate) -> None:
    await asyncio.wait([gate.task, gate.future])


async def by_wait_for_none(gate: Gate) -> None:
    await asyncio.wait_for(gate.event.wait(), None)


async def by_iteration(gate: Gate) -> None:
    async def items() -> AsyncIterator[int]:
        await gate.event.wait()
        yield 1

    async for _ in items():
        pass


INSIDE: list[Callable[[Gate], Coroutine[Any, Any, None]]] = [
    by_event, by_semaphore, by_queue, by_future, by_task, by_gather, by_gather_of_futures,
    by_shield, by_shielded_future, by_group, by_wait, by_wait_for_none, by_iteration,
]  # fmt: skip


@pytest.mark.parametrize("wait", INSIDE)
@pytest.mark.parametrize("concurrent", [False, True])
async def test_a_handler_that_only_the_application_can_wake_is_at_rest(
    wait: Callable[[Gate], Coroutine[Any, Any, None]], concurrent: bool
) -> None:
    """`settle` does not wait for it, and sees what it does once it is woken."""
    gate = Gate()
    app, ws = app_of()

    @ws.on("go", concurrent=concurrent)
    async def go(conn: Any) -> str:
        await wait(gate)
        return "done"

    async with simulate(app, timeout=PATIENCE) as sim:
        ada = await sim.connect("/ws")
        await ada.send("go", id=7)
        begun = time.monotonic()
        await sim.settle()
        assert ada.received == []
        with pytest.raises(AssertionError, match="nothing more can come"):
            await ada.receive()
        assert time.monotonic() - begun < PATIENCE / 2
        gate.open()
        await sim.settle()
        assert (await ada.receive()).payload == "done"


# What takes a while outside of the loop. Each gets the seconds that it takes.


async def sleep(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def deadline(seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await asyncio.Event().wait()
    except TimeoutError:
        pass


async def wait_for(seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.Event().wait(), seconds)


async def wait(seconds: float) -> None:
    event = asyncio.create_task(asyncio.Event().wait())
    await asyncio.wait([event], timeout=seconds)
    event.cancel()


async def subtask(seconds: float) -> None:
    await asyncio.create_task(asyncio.sleep(seconds))


async def gather(seconds: float) -> None:
    await asyncio.gather(asyncio.sleep(seconds), asyncio.sleep(0))


async def shield(seconds: float) -> None:
    await asyncio.shield(asyncio.sleep(seconds))


async def group(seconds: float) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.sleep(seconds))


async def call_later(seconds: float) -> None:
    event = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, event.set)
    await event.wait()


async def generator(seconds: float) -> None:
    async def items() -> AsyncIterator[int]:
        await asyncio.sleep(seconds)
        yield 1

    async for _ in items():
        pass


async def next_with_default(seconds: float) -> None:
    async def items() -> AsyncIterator[int]:
        await asyncio.sleep(seconds)
        yield 1

    await anext(items(), None)


class Awaitable:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __await__(self) -> Any:
        return asyncio.sleep(self.seconds).__await__()


async def awaitable(seconds: float) -> None:
    await Awaitable(seconds)


TIMERS = [
    sleep, deadline, wait_for, wait, subtask, gather, shield, group, call_later, generator,
    next_with_default, awaitable,
]  # fmt: skip


async def to_thread(seconds: float) -> None:
    await asyncio.to_thread(time.sleep, seconds)


def in_executor(seconds: float) -> asyncio.Future[None]:
    return asyncio.get_running_loop().run_in_executor(None, time.sleep, seconds)


async def executor(seconds: float) -> None:
    await in_executor(seconds)


async def pool(seconds: float) -> None:
    with ThreadPoolExecutor(1) as own:
        await asyncio.get_running_loop().run_in_executor(own, time.sleep, seconds)


async def gathered_threads(seconds: float) -> None:
    await asyncio.gather(in_executor(seconds), in_executor(seconds))


async def gathered_twice(seconds: float) -> None:
    await asyncio.gather(asyncio.gather(asyncio.shield(in_executor(seconds))))


async def shielded_thread(seconds: float) -> None:
    await asyncio.shield(in_executor(seconds))


async def waited_threads(seconds: float) -> None:
    await asyncio.wait([in_executor(seconds)])


async def grouped_threads(seconds: float) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.to_thread(time.sleep, seconds))


async def future_of_a_thread(seconds: float) -> None:
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def work() -> None:
        time.sleep(seconds)
        loop.call_soon_threadsafe(future.set_result, None)

    threading.Thread(target=work, daemon=True).start()
    await future


async def shielded_future_of_a_thread(seconds: float) -> None:
    await asyncio.shield(asyncio.ensure_future(asyncio.gather(future_of_a_thread(seconds))))


async def submitted(seconds: float) -> None:
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    with ThreadPoolExecutor(1) as own:
        done = own.submit(time.sleep, seconds)
        done.add_done_callback(lambda _: loop.call_soon_threadsafe(future.set_result, None))
        await future


async def wrapped(seconds: float) -> None:
    with ThreadPoolExecutor(1) as own:
        await asyncio.wrap_future(own.submit(time.sleep, seconds))


THREADS = [
    to_thread, executor, pool, gathered_threads, gathered_twice, shielded_thread, waited_threads,
    grouped_threads, future_of_a_thread, shielded_future_of_a_thread, submitted, wrapped,
]  # fmt: skip


async def subprocess(seconds: float) -> None:
    code = f"import time; time.sleep({seconds})"
    process = await asyncio.create_subprocess_exec(sys.executable, "-S", "-c", code)
    try:
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def pipe(seconds: float) -> None:
    code = f"import time; time.sleep({seconds}); print('x')"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-S", "-c", code, stdout=asyncio.subprocess.PIPE
    )
    await process.communicate()


async def socket(seconds: float) -> None:
    writers: list[asyncio.StreamWriter] = []

    async def answer(reader: Any, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await reader.readexactly(1)
        asyncio.get_running_loop().call_later(seconds, writer.close)

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            writer.write(b"x")
            await reader.read()
        finally:
            for each in [writer, *writers]:
                each.close()


OTHERS = [subprocess, pipe, socket]
OUTSIDE = [*TIMERS, *THREADS, *OTHERS]


@pytest.mark.parametrize("work", OUTSIDE)
async def test_what_comes_from_the_outside_is_waited_for(
    work: Callable[[float], Coroutine[Any, Any, None]],
) -> None:
    """A handler that waits for the outside can still send, and `settle` waits for it."""
    app, ws = app_of()

    @ws.on("go")
    async def go(conn: Any) -> str:
        await work(SHORT)
        return "done"

    async with simulate(app, timeout=PATIENCE) as sim:
        ada, bob = await sim.connect("/ws"), await sim.connect("/ws")
        assert await ada.request("go") == "done"
        await ada.send("go", id=1)
        await bob.send("go", id=1)
        await sim.settle()
        assert [each.payload for each in ada.received + bob.received] == ["done", "done"]
        begun = time.monotonic()
        await sim.settle()
        assert time.monotonic() - begun < SHORT


@pytest.mark.parametrize("work", [*TIMERS, subprocess, socket])
async def test_what_does_not_come_from_the_outside_is_named(
    work: Callable[[float], Coroutine[Any, Any, None]],
) -> None:
    """After the time-out the error has the handler's name, its file and the line."""
    app, ws = app_of()

    @ws.on("go")
    async def go(conn: Any) -> str:
        await work(LONG)
        return "done"

    line = go.__code__.co_firstlineno + 2
    async with simulate(app, timeout=SHORT) as sim:
        ada = await sim.connect("/ws")
        await ada.send("go")
        with pytest.raises(AssertionError) as settled:
            await sim.settle()
        with pytest.raises(AssertionError) as received:
            await ada.receive(timeout=SHORT)
        for error in (settled, received):
            assert f"go ({__file__}:{line})" in str(error.value)
            assert f"within {SHORT:g} s" in str(error.value)
        ada.cut()
