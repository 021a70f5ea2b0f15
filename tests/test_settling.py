"""When a simulation is at rest, and what it says of an application that waits for the outside."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import falcon.asgi
import pytest
from support import PATIENCE

import pachinko
from pachinko import Hub, Pachinko, simulate

Handler = Callable[[Any], Coroutine[Any, Any, None]]
SHORT = 0.1  # seconds that a test waits for what does not come
LONG = 60.0  # seconds that the outside takes where a test does not wait for it


async def failure(wait: Callable[..., Coroutine[Any, Any, object]]) -> tuple[float, str]:
    """What a *wait* for what does not come fails with, and after how many seconds.

    One that had no time to look says that something runs, and gets more.
    """
    seconds, error = SHORT, "runs all the time"
    while "runs all the time" in error and seconds < PATIENCE:
        seconds *= 2
        with pytest.raises(AssertionError) as raised:
            await wait(timeout=seconds)
        error = str(raised.value)
    return seconds, error


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
        if not self.future.done():
            self.future.set_result(None)


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
            await asyncio.shield(process.wait())  # It may be cancelled twice.


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
        assert time.monotonic() - begun < PATIENCE / 2


# A timer that nobody waits for may be one that a library keeps. It counts where it comes in time.
NAMED = [each for each in [*TIMERS, subprocess, socket] if each is not call_later]


@pytest.mark.parametrize("work", NAMED)
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
    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("go")
        for wait in (sim.settle, ada.receive):
            seconds, error = await failure(wait)
            assert f"go ({__file__}:{line})" in error
            assert f"within {seconds:g} s" in error
        ada.cut()
    if work is subprocess:  # A process that is killed takes its time.
        left = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*left, return_exceptions=True)


async def test_what_runs_all_the_time_is_named() -> None:
    """A handler that gives way and goes on is not at rest."""
    app, ws = app_of()
    running = True

    @ws.on("go")
    async def go(conn: Any) -> None:
        while running:
            await asyncio.sleep(0)

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("go")
        with pytest.raises(AssertionError, match=r"go \(.*\) runs all the time"):
            await sim.settle(timeout=SHORT)
        running = False
        await sim.settle()


async def test_calls_without_a_task_that_go_on_are_no_rest() -> None:
    """Nothing says whose they are."""
    app, ws = app_of()
    calls: list[asyncio.Handle] = []

    @ws.on("go")
    async def go(conn: Any) -> None:
        again()

    def again() -> None:
        calls[:] = [asyncio.get_running_loop().call_soon(again)]

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("go")
        with pytest.raises(AssertionError, match="something runs all the time"):
            await sim.settle(timeout=SHORT)
        calls[0].cancel()
        await sim.settle()


async def test_a_long_way_that_never_waits_is_gone_to_its_end() -> None:
    """`settle` is not early, however many turns of the loop it takes."""
    app, ws = app_of()
    done: list[int] = []

    @ws.on("go")
    async def go(conn: Any) -> None:
        loop = asyncio.get_running_loop()

        def step(left: int) -> None:
            if left:
                loop.call_soon(step, left - 1)
            else:
                done.append(1)

        for _ in range(1000):
            await asyncio.sleep(0)
        step(1000)

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("go")
        await sim.settle()
        assert done == [1]


class Frameless(Coroutine[Any, Any, None]):
    """A coroutine like one of Cython: it shows no frames."""

    cr_frame = None
    cr_await = None

    def __init__(self, inner: Coroutine[Any, Any, None]) -> None:
        self.send, self.throw, self.close = inner.send, inner.throw, inner.close  # type: ignore[method-assign]  # all of it is the other one's

    def __await__(self) -> Any:
        return self

    def send(self, value: Any) -> Any: ...
    def throw(self, *args: Any) -> Any: ...
    def close(self) -> None: ...


async def test_a_coroutine_that_shows_no_frames_is_waited_for() -> None:
    """Its waiter is named."""
    app, ws = app_of()

    @ws.on("go")
    async def go(conn: Any, *, seconds: float) -> None:
        await asyncio.create_task(Frameless(asyncio.sleep(seconds)))

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        assert await ada.request("go", {"seconds": SHORT}) is None
        await ada.send("go", {"seconds": LONG})
        _, error = await failure(sim.settle)
        assert re.search(r"go \(.*\) → a task waits for a timer", error)
        ada.cut()


async def test_an_idle_thread_of_an_executor_is_none_that_a_handler_waits_for() -> None:
    """A future of the application's own is at rest then, and with a thread at work it is not."""
    app, ws = app_of()
    future = asyncio.get_running_loop().create_future()
    stop = threading.Event()

    @ws.on("go")
    async def go(conn: Any) -> None:
        await asyncio.to_thread(int)
        await future

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("go")
        await sim.settle()
        thread = threading.Thread(target=stop.wait)
        thread.start()
        _, error = await failure(sim.settle)
        assert re.search(r"go \(.* waits for a socket or a thread, it seems", error)
        stop.set()
        thread.join()
        await sim.settle()
        future.set_result(None)


async def test_workers_do_not_count_unless_a_handler_waits_for_them() -> None:
    """So it is with the tasks of a lifespan."""
    app, ws = app_of()
    tasks: dict[str, asyncio.Task[None]] = {}

    class Startup:
        async def process_startup(self, scope: Any, event: Any) -> None:
            await asyncio.sleep(SHORT)
            tasks["lifespan"] = asyncio.create_task(asyncio.sleep(LONG))

        async def process_shutdown(self, scope: Any, event: Any) -> None:
            tasks["lifespan"].cancel()

    app.add_middleware(Startup())

    @ws.worker
    async def work() -> None:
        tasks["worker"] = asyncio.create_task(asyncio.sleep(LONG))
        await asyncio.to_thread(time.sleep, SHORT)
        await tasks["worker"]

    @ws.on("go")
    async def go(conn: Any, *, task: str) -> None:
        await asyncio.wait([tasks[task]])

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        begun = time.monotonic()
        await sim.settle()
        assert time.monotonic() - begun < LONG / 2
        for task in tasks:
            client = await sim.connect("/ws")
            await client.send("go", {"task": task})
            _, error = await failure(sim.settle)
            assert re.search(r"go \(.*\) → sleep .*waits for a timer", error)
        assert ada.received == []


async def test_what_a_handler_leaves_behind_is_waited_for() -> None:
    """Tasks, tasks of the connection, timers and threads of its own."""
    app, ws = app_of()
    done: list[str] = []
    kept: list[Any] = []

    @ws.on("go")
    async def go(conn: Any) -> None:
        async def later(name: str) -> None:
            await asyncio.sleep(SHORT)
            done.append(name)
            await conn.send("done", name)

        def from_a_thread() -> None:
            time.sleep(SHORT)
            conn.hub.call_threadsafe(later, "thread").result()

        kept.append(asyncio.create_task(later("task")))
        conn.create_task(later("own"))
        conn.create_task(asyncio.to_thread(from_a_thread))
        asyncio.get_running_loop().call_later(SHORT, done.append, "timer")

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("go")
        await sim.settle()
        assert sorted(done) == ["own", "task", "thread", "timer"]
        assert len(ada.received) == 3


async def test_a_handler_that_is_stopped_by_the_librarys_clock_is_at_rest() -> None:
    """Only `advance` ends it."""
    app, ws = app_of(handler_timeout=30)

    @ws.on("go")
    async def go(conn: Any) -> None:
        await asyncio.Event().wait()

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("go", id=1)
        await sim.settle()
        assert ada.received == []
        await sim.advance(31)
        assert (await ada.receive("error"))["code"] == "handler_timeout"


async def test_simulations_of_one_loop_do_not_wait_for_each_other() -> None:
    """One is at rest while a handler of the other one waits for a timer."""
    (one, ws), (other, _) = app_of(), app_of()

    @ws.on("go")
    async def go(conn: Any) -> str:
        await asyncio.sleep(SHORT)
        return "done"

    async with simulate(one) as first, simulate(other) as second:
        ada, bob = await first.connect("/ws"), await second.connect("/ws")
        await ada.send("go", id=1)
        answer = asyncio.create_task(ada.receive())
        await second.settle()
        with pytest.raises(AssertionError, match="nothing more can come"):
            await bob.receive()
        assert not answer.done()
        await asyncio.gather(first.settle(), second.settle(), first.settle())
        assert (await answer).payload == "done"


async def test_the_end_of_a_simulation_hurries_no_other_one() -> None:
    """Its time limits come at once, and an earlier one of the other simulation does not."""
    (one, ws), (other, late) = app_of(handler_timeout=PATIENCE), app_of(linger=LONG)
    ended: list[bool] = []

    @ws.on("go")
    async def go(conn: Any) -> None:
        await asyncio.Event().wait()

    @late.on("go")
    async def stay(conn: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(conn.closed)

    async with simulate(one) as first:
        ada = await first.connect("/ws")
        await ada.send("go", id=1)
        await first.settle()
        async with simulate(other) as second:
            bob = await second.connect("/ws")
            await bob.send("go")
        assert ended == [True]
        assert ada.received == []
        await first.advance(PATIENCE)
        assert (await ada.receive("error"))["code"] == "handler_timeout"


async def test_a_group_of_a_thousand_settles() -> None:
    """Each has its message, and a burst of more than can be held is handled."""
    app, ws = app_of()
    gate = asyncio.Event()

    @ws.connect
    async def enter(conn: Any) -> None:
        await conn.join("all")

    @ws.on("wait")
    async def wait(conn: Any) -> None:
        await gate.wait()

    @ws.on("count")
    async def count(conn: Any, payload: int) -> int:
        return payload

    async with simulate(app) as sim:
        clients = [await sim.connect("/ws") for _ in range(1000)]
        await sim.hub.send("all", "hi", 1)
        await sim.settle()
        assert all([each.payload for each in client.received] == [1] for client in clients)
        ada = clients[0]
        await ada.send("wait")
        for n in range(600):
            await ada.send("count", n, id=n)
        await sim.settle()
        assert len(ada.received) == 1
        gate.set()
        await sim.settle()
        assert [each.payload for each in ada.received[1:]] == [*range(600)]


async def test_contexts_of_messages_count() -> None:
    """With middleware and providers each message has one of its own."""
    app, ws = app_of()

    @ws.provide
    async def session(conn: Any) -> AsyncIterator[Gate]:
        await asyncio.sleep(SHORT)
        yield Gate()
        await asyncio.sleep(SHORT)

    @ws.middleware
    async def around(conn: Any, envelope: Any, call_next: Any) -> Any:
        await asyncio.sleep(SHORT)
        return await call_next()

    @ws.on("go")
    async def go(conn: Any, *, gate: Gate) -> str:
        gate.open()
        await gate.task
        return "done"

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("go", id=1)
        await sim.settle()
        assert [each.payload for each in ada.received] == ["done"]


HIDDEN = {"_ready", "_scheduled", "_selector"}


@pytest.mark.parametrize("work", [sleep, to_thread, socket, subtask, gathered_threads])
async def test_a_loop_that_does_not_say_what_it_will_run_is_watched_by_its_tasks(
    work: Callable[[float], Coroutine[Any, Any, None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is with uvloop's."""

    def hide(of: Any, name: str, *default: Any) -> Any:
        is_hidden = name in HIDDEN and isinstance(of, asyncio.AbstractEventLoop)
        return default[0] if is_hidden else getattr(of, name, *default)

    monkeypatch.setattr(pachinko, "getattr", hide, raising=False)
    app, ws = app_of()
    event = asyncio.Event()

    @ws.on("go")
    async def go(conn: Any) -> str:
        await work(SHORT)
        return "done"

    @ws.on("park")
    async def park(conn: Any) -> None:
        await event.wait()

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("park")
        await sim.settle()
        assert await (await sim.connect("/ws")).request("go") == "done"
        event.set()
        await sim.settle()


@pytest.mark.parametrize("pause", [0.0, SHORT])
@pytest.mark.parametrize("has_client", [False, True])
async def test_time_that_a_failed_simulation_has_not_moved_is_forgotten(
    pause: float, has_client: bool
) -> None:
    """The clock of the next one in the event loop stays, and nothing fails meanwhile."""
    failures: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await receive()

    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - it comes in the middle of the block
        async with simulate(app) as sim:
            if has_client:
                await sim.connect("/")
            sim.advance(100)
            raise ZeroDivisionError
    await asyncio.sleep(pause)
    async with simulate(app) as sim:
        ada = await sim.connect("/")
        await sim.settle()
        assert pachinko.clock.ahead == 0
        await sim.advance(5)
        assert pachinko.clock.ahead == 5
        await ada.close()
    assert failures == []


@pytest.mark.parametrize("name", ["_worker", "work"])
async def test_a_thread_of_the_application_may_have_any_name(name: str) -> None:
    """Only the idle thread of an executor is known by where it is."""
    app, ws = app_of()
    stop = threading.Lock()
    stop.acquire()
    future = asyncio.get_running_loop().create_future()
    names: dict[str, Any] = {"stop": stop}
    exec(f"def {name}():\n    stop.acquire()", names)

    @ws.on("go")
    async def go(conn: Any) -> None:
        await future

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        thread = threading.Thread(target=names[name])
        thread.start()
        await ada.send("go")
        assert "waits for a socket or a thread, it seems" in (await failure(sim.settle))[1]
        stop.release()
        thread.join()
        await sim.settle()
        future.set_result(None)


async def test_a_cancelled_wait_is_watched_no_more() -> None:
    """The others go on."""
    app, _ = app_of()
    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        waits = [asyncio.create_task(ada.receive()) for _ in range(3)]
        await asyncio.sleep(0)
        waits[0].cancel()
        await asyncio.wait(waits)
        assert waits[0].cancelled()
        assert [type(each.exception()) for each in waits[1:]] == [AssertionError] * 2
