"""The time that the library goes by: the event loop's, and one that can be moved."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import math
import re
import socket
import threading
import time
import types
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import falcon
import house
import pytest
import websockets.exceptions
from support import PATIENCE, Stalled, connect, new_app, serving, session_of, until

import pachinko
import pachinko_cluster
from pachinko import Clock, Connection, Hub, MovableClock, NoAnswer, Pachinko, WaitLimit

HOUR = 3600.0
each_clock = pytest.mark.parametrize("clock", [Clock(), MovableClock()], ids=["real", "movable"])


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> MovableClock:
    """A clock that can be moved, in the place of the library's."""
    clock = MovableClock()
    monkeypatch.setattr(pachinko, "clock", clock)
    return clock


def endpoint(**options: Any) -> Pachinko:
    ws = Pachinko(new_app(), "/ws", hub=Hub(), **options)

    @ws.on("hello")
    async def hello(conn: Connection) -> str:
        return "world"

    return ws


async def asleep(clock: MovableClock, task: asyncio.Future[Any]) -> None:
    """Let *task* run up to where it waits for *clock*."""
    while not clock.timers:
        assert not task.done()
        await asyncio.sleep(0)


# Either clock


@each_clock
async def test_it_is_the_clock_of_the_loop(clock: Clock) -> None:
    """Until it is moved; `ahead` says by how much it was."""
    before = asyncio.get_running_loop().time()
    assert before <= clock.time() <= asyncio.get_running_loop().time() and clock.ahead == 0.0


@each_clock
async def test_a_function_is_called_at_its_time(clock: Clock) -> None:
    """With its arguments, and not before."""
    called = asyncio.get_running_loop().create_future()
    when = clock.time() + 0.01
    clock.call_at(when, lambda *args: called.set_result((*args, clock.time())), 1, "a")
    *args, at = await called
    assert args == [1, "a"] and at >= when - 1e-5


@each_clock
async def test_the_calls_are_made_in_the_order_of_their_times(clock: Clock) -> None:
    """Whatever the order in which they were asked for; one in the past is made at once."""
    called, now = list[float](), clock.time()
    for seconds in (0.6, 0.2, -1.0, 0.4):
        clock.call_at(now + seconds, called.append, seconds)
    await until(lambda: len(called) == 4)
    assert called == [-1.0, 0.2, 0.4, 0.6]


@each_clock
@pytest.mark.parametrize("left", [-1, 0, 0.001, HOUR])
async def test_a_call_that_is_cancelled_is_never_made(clock: Clock, left: float) -> None:
    """Also one that is due already, and more than once."""
    timer = clock.call_at(clock.time() + left, pytest.fail)
    timer.cancel()
    timer.cancel()
    await asyncio.sleep(0.005)


@each_clock
async def test_a_call_is_made_in_the_context_that_asked_for_it(clock: Clock) -> None:
    """Not in that of another one."""
    variable, seen = contextvars.ContextVar[str]("variable"), list[str]()
    variable.set("asked")
    clock.call_at(clock.time() + 0.002, lambda: seen.append(variable.get()))
    variable.set("later")
    if isinstance(clock, MovableClock):
        clock.advance(0.001)
    await until(lambda: seen)
    assert seen == ["asked"]


@each_clock
async def test_a_call_may_fail(clock: Clock) -> None:
    """The event loop reports it, and goes on."""
    loop, told = asyncio.get_running_loop(), list[Any]()
    loop.set_exception_handler(lambda _, what: told.append(what["exception"]))
    clock.call_at(clock.time(), lambda: 1 / 0)
    await until(lambda: told)
    assert type(told[0]) is ZeroDivisionError


@each_clock
async def test_sleep_takes_its_time(clock: Clock) -> None:
    """Not less."""
    begun = clock.time()
    await clock.sleep(0.01)
    assert clock.time() - begun >= 0.01 - 1e-5


@each_clock
@pytest.mark.parametrize("seconds", [0, 0.0, -0.0, -1, -math.inf])
async def test_a_sleep_of_no_time_is_one_turn_of_the_loop(clock: Clock, seconds: float) -> None:
    """As `asyncio.sleep(0)`."""
    turns = list[int]()
    asyncio.get_running_loop().call_soon(turns.append, 1)
    await clock.sleep(seconds)
    assert turns == [1]


@each_clock
async def test_a_sleep_that_is_cancelled_leaves_no_timer(clock: Clock) -> None:
    """The cancellation goes on up."""
    task = asyncio.create_task(clock.sleep(HOUR))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    if isinstance(clock, MovableClock):
        assert not clock.timers


# Waiting for futures


@each_clock
async def test_wait_returns_what_is_not_done_in_time(clock: Clock) -> None:
    """Nothing is cancelled; an error is raised to nobody."""
    loop = asyncio.get_running_loop()
    done, failed, late = (loop.create_future() for _ in range(3))
    loop.call_soon(done.set_result, 1)
    loop.call_soon(failed.set_exception, KeyError())
    assert await clock.wait([done, failed, late], 0.005) == {late}
    assert not late.done() and type(failed.exception()) is KeyError
    assert await clock.wait([done, failed], HOUR) == set()


@each_clock
async def test_wait_ends_with_the_last_of_them(clock: Clock) -> None:
    """Each may be a task, may be cancelled, and may be named twice."""
    loop, never = asyncio.get_running_loop(), asyncio.Event()
    task, cancelled = asyncio.create_task(asyncio.sleep(0.001)), asyncio.create_task(never.wait())
    loop.call_soon(cancelled.cancel)
    futures: list[asyncio.Task[Any]] = [task, cancelled, task]
    assert await clock.wait(iter(futures), HOUR) == set()
    assert task.done() and cancelled.cancelled()


@each_clock
async def test_wait_for_nothing_returns(clock: Clock) -> None:
    """`asyncio.wait` raises an error there."""
    nothing: list[asyncio.Future[None]] = []
    assert await clock.wait(nothing, HOUR) == set()


@each_clock
@pytest.mark.parametrize("seconds", [0, -1, -math.inf])
async def test_wait_for_no_time_lets_the_tasks_make_a_step(clock: Clock, seconds: float) -> None:
    """One that ends with it is not among those that are late."""

    async def step() -> None: ...

    quick, late = asyncio.create_task(step()), asyncio.create_task(asyncio.Event().wait())
    left: list[asyncio.Task[Any]] = [quick, late]
    assert await clock.wait(left, seconds) == {late}
    late.cancel()


@each_clock
async def test_wait_leaves_nothing_behind(clock: Clock) -> None:
    """No callback on a future that is not done, and no timer, however it ends."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    await clock.wait([future], 0.001)
    task = asyncio.create_task(clock.wait([future], HOUR))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    future.remove_done_callback(print)
    assert not future._callbacks
    if isinstance(clock, MovableClock):
        assert not clock.timers


@each_clock
async def test_a_wait_that_is_over_twice_ends_once(clock: Clock) -> None:
    """The time is up in the very turn in which the last future is done."""
    loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(clock.wait([future], 0.002))
    await asyncio.sleep(0)
    loop.call_soon(future.set_result, None)
    time.sleep(0.005)  # noqa: ASYNC251 - the timer is to be due as well
    assert await waiting == set()


# Nothing passes it by

PASSES_BY = re.compile(
    r"asyncio\.(timeout|timeout_at|wait|wait_for)\(|asyncio\.sleep\((?!0\))|call_later|"
    r"(?<!clock)\.call_at\(|loop(\(\))?\.time\b|time\.(time|monotonic)\(\)(?! \+ (clock|3600))"
)


def passing_by(module: types.ModuleType, is_free: Callable[[str], bool]) -> list[str]:
    """Each line that waits for time or measures it by itself, in a section that is not free."""
    text = Path(str(module.__file__)).read_text("utf-8")
    starts = house.banners(text)
    found = [(n, line) for n, line in enumerate(text.splitlines(), 1) if PASSES_BY.search(line)]
    homes = [(next((s for n, s in reversed(starts) if n <= at), ""), line) for at, line in found]
    return [line for name, line in homes if not is_free(name)]


def test_all_of_the_library_goes_by_it() -> None:
    """Only the clock itself asks the event loop, and the test client, which knows both."""
    is_free = {"clock", "settling", "simulate"}.__contains__
    assert passing_by(pachinko, is_free) == []
    assert passing_by(pachinko_cluster, lambda name: name != "leases") == []


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ("async with asyncio.timeout(5):", True),
        ("await asyncio.sleep(seconds)", True),
        ("await asyncio.sleep(0)", False),
        ("await asyncio.wait(tasks, timeout=5)", True),
        ("await clock.wait(tasks, 5)", False),
        ("loop.call_later(5, f)", True),
        ("loop.call_at(when, f)", True),
        ("clock.call_at(when, f)", False),
        ("asyncio.get_running_loop().time()", True),
        ("now = loop.time", True),
        ("time.monotonic()", True),
        ("time.monotonic() + clock.ahead", False),
        ("time.time()", True),
    ],
)
def test_what_passes_it_by_is_found(line: str, is_found: bool) -> None:
    """In each way that asyncio and the standard library have."""
    assert bool(PASSES_BY.search(line)) is is_found


# A time limit around code of the library


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("times", [1, 2])
async def test_a_cancellation_at_the_same_moment_is_not_lost(is_late: bool, times: int) -> None:
    """On each Python: whether other code cancels the task just before the limit, or just after."""
    limit = WaitLimit()

    async def work() -> None:
        with limit:
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    if is_late:
        asyncio.get_running_loop().call_soon(task.cancel)
    limit.end_at(asyncio.get_running_loop().time())
    for _ in range(0 if is_late else times):
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_task_that_was_cancelled_before_has_its_time_limit() -> None:
    """What it has counted before the block is not the limit's."""

    async def work() -> int:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(0)
        with pytest.raises(TimeoutError), WaitLimit(pachinko.clock.time() + 0.001):
            await asyncio.Event().wait()
        return task.cancelling()

    assert await asyncio.create_task(work()) == 1


# A clock that is moved


async def test_what_is_due_is_called_in_the_next_turn() -> None:
    """In the order of their times, and then of the calls; the rest stays pending."""
    clock, called = MovableClock(), list[str]()
    now = clock.time()
    for seconds, name in ((30, "c"), (10, "a"), (20, "b"), (20, "b2"), (40, "d"), (20, "b3")):
        clock.call_at(now + seconds, called.append, name)
    clock.advance(30)
    assert called == [] and len(clock.timers) == 6 and clock.next_due() == 0.0
    await asyncio.sleep(0)
    assert called == ["a", "b", "b2", "b3", "c"] and len(clock.timers) == 1
    clock.advance(10)
    await asyncio.sleep(0)
    assert called[5:] == ["d"] and clock.timers == [] and clock.next_due() is None


async def test_moves_add_up() -> None:
    """Also several in one turn: what was due before still comes before what is due now."""
    clock, called = MovableClock(), list[str]()
    now = clock.time()
    clock.call_at(now + 50, called.append, "late")
    clock.call_at(now + 30, called.append, "early")
    for seconds in (30, 0, 0.5, 19.5):
        clock.advance(seconds)
    assert clock.ahead == 50.0 and 50.0 <= clock.time() - now < 50 + PATIENCE
    await asyncio.sleep(0)
    assert called == ["early", "late"]


async def test_a_move_by_nothing_calls_nothing() -> None:
    """But what is due all the same."""
    clock, called = MovableClock(), list[str]()
    clock.call_at(clock.time() + HOUR, called.append, "late")
    clock.call_at(clock.time(), called.append, "due")
    clock.advance(0)
    await asyncio.sleep(0)
    assert called == ["due"] and clock.ahead == 0.0
    assert HOUR - PATIENCE < (clock.next_due() or 0.0) <= HOUR


async def test_a_call_that_is_due_may_cancel_another_one() -> None:
    """The other one is not made."""
    clock, called = MovableClock(), list[str]()
    second = clock.call_at(clock.time() + 20, called.append, "second")
    clock.call_at(clock.time() + 10, second.cancel)
    clock.call_at(clock.time() + 30, called.append, "third")
    clock.advance(HOUR)
    await asyncio.sleep(0)
    assert called == ["third"] and clock.timers == []


async def test_a_call_may_ask_for_another_one() -> None:
    """Its time counts from the moved clock. One that repeats is made once a move."""
    clock, called = MovableClock(), list[float]()
    begun = clock.time()

    def tick() -> None:
        called.append(clock.time() - begun)
        clock.call_at(clock.time() + 60, tick)

    clock.call_at(begun + 60, tick)
    for _ in range(3):
        clock.advance(600)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert [round(seconds / 600) for seconds in called] == [1, 2, 3] and len(clock.timers) == 1


async def test_time_goes_on_between_the_moves() -> None:
    """What a move has not reached is called when its time has really come."""
    clock, called = MovableClock(), asyncio.Event()
    when = clock.time() + HOUR + 0.01
    clock.call_at(when, called.set)
    clock.advance(HOUR)
    await asyncio.wait_for(called.wait(), PATIENCE)
    assert clock.time() >= when - 1e-5 and clock.timers == []


async def test_a_call_that_is_made_or_cancelled_is_forgotten() -> None:
    """Its function is free at once, without the garbage collector, as is one's of the loop."""
    clock = MovableClock()

    class Owner:
        def call(self) -> None: ...

    gc.disable()
    try:
        owners = [Owner(), Owner()]
        for owner in owners:
            owner.timer = clock.call_at(clock.time() + 10, owner.call)  # type: ignore[attr-defined]  # a cycle
        owners[0].timer.cancel()  # type: ignore[attr-defined]  # as above
        clock.advance(10)
        await asyncio.sleep(0)
        left = [weakref.ref(owner) for owner in owners]
        del owner, owners
        assert clock.timers == [] and [ref() for ref in left] == [None, None]
    finally:
        gc.enable()


def test_it_is_moved_in_a_loop_only() -> None:
    """Elsewhere there is nothing that could be called."""
    clock = MovableClock()
    with pytest.raises(RuntimeError):
        clock.advance(5)
    assert clock.ahead == 0.0


async def test_its_own_handles_are_known_among_those_of_the_loop() -> None:
    """Of the pending calls; the others are the application's."""
    clock, loop = MovableClock(), asyncio.get_running_loop()
    others = [loop.call_later(HOUR, each) for each in (print, "".join)]
    first, second = (clock.call_at(clock.time() + n * HOUR, int) for n in (1, 2))

    def own() -> int:
        return sum(clock.is_own(h) for h in loop._scheduled if not h.cancelled())  # type: ignore[attr-defined]  # no public name

    assert own() == 2 and not any(map(clock.is_own, others))
    clock.advance(10)
    assert own() == 2
    first.cancel()
    assert own() == 1
    clock.advance(2 * HOUR)
    await asyncio.sleep(0)
    assert own() == 0
    second.cancel()
    for other in others:
        other.cancel()


async def test_sleep_and_wait_are_moved() -> None:
    """Each returns when the clock has reached its end."""
    clock, never = MovableClock(), asyncio.get_running_loop().create_future()
    sleeping = asyncio.create_task(clock.sleep(HOUR))
    waiting = asyncio.create_task(clock.wait([never], 2 * HOUR))
    await asyncio.sleep(0)
    clock.advance(HOUR - 60)
    await asyncio.sleep(0.001)
    assert not sleeping.done() and not waiting.done()
    clock.advance(60)
    await sleeping
    assert not waiting.done() and HOUR - PATIENCE < (clock.next_due() or 0.0) <= HOUR
    clock.advance(HOUR)
    assert await waiting == {never}


@pytest.mark.parametrize("kind", [pachinko.TimeLimit, WaitLimit])
async def test_time_limits_are_moved(moved: MovableClock, kind: type[pachinko.TimeLimit]) -> None:
    """Also the repetition, for code that swallows its cancellation."""
    swallowed = list[int]()

    async def work() -> None:
        with kind(moved.time() + 60):
            while len(swallowed) < 3:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    swallowed.append(1)
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    for seconds in (60, 5, 5, 5):
        await asleep(moved, task)
        moved.advance(seconds)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        await task
    assert len(swallowed) == 3 and moved.timers == []


def in_thread(work: Callable[[], Awaitable[None]]) -> threading.Thread:
    async def run() -> None:
        await work()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    return thread


def test_a_move_calls_what_is_due_in_its_own_loop() -> None:
    """Another thread's loop keeps its calls, and may ask for and cancel some meanwhile."""
    clock, called = MovableClock(), list[str]()
    ready, has_moved = threading.Barrier(2, timeout=PATIENCE), threading.Event()
    busy = threading.Event()

    async def mover() -> None:
        clock.call_at(clock.time() + 60, called.append, "own")
        ready.wait()
        busy.wait(PATIENCE)
        for _ in range(200):
            clock.advance(0.5)
        await asyncio.sleep(0)
        has_moved.set()

    async def other() -> None:
        kept = clock.call_at(clock.time() + 60, called.append, "other")
        ready.wait()
        while not has_moved.is_set():
            for timer in [clock.call_at(clock.time() + HOUR, pytest.fail) for _ in range(50)]:
                timer.cancel()
            busy.set()
        assert [timer.at for timer in clock.timers] == [kept.at]  # type: ignore[attr-defined]  # it is a `MovableTimer`
        assert 60 - PATIENCE < (clock.next_due() or 0.0) <= 60
        clock.advance(60)
        await asyncio.sleep(0)

    threads = [in_thread(mover), in_thread(other)]
    for thread in threads:
        thread.join(PATIENCE)
    assert called == ["own", "other"] and clock.ahead == 160.0


def test_a_loop_that_is_closed_takes_its_timers_with_it() -> None:
    """Whatever was pending there is never called; neither it nor the loop stays in memory."""
    clock = MovableClock()
    loops = list[weakref.ref[asyncio.AbstractEventLoop]]()

    async def leave() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        for seconds in (0.0, 1.0, HOUR):
            clock.call_at(clock.time() + seconds, print)
        clock.advance(1.0)

    for _ in range(3):
        asyncio.run(leave())
    gc.collect()
    assert len(clock.pending) == 0 and [ref() for ref in loops] == [None] * 3


def test_it_goes_with_uvloop() -> None:
    """Whose timers count whole milliseconds."""
    uvloop = pytest.importorskip("uvloop", reason="not for this Python or platform")

    async def work() -> list[str]:
        clock, called = MovableClock(), list[str]()
        for seconds, name in ((20.0, "b"), (10.0, "a"), (30.0, "c")):
            clock.call_at(clock.time() + seconds, called.append, name)
        clock.advance(20)
        await asyncio.sleep(0)
        sleeping = asyncio.create_task(clock.sleep(5))
        await asyncio.sleep(0)
        clock.advance(5)
        await sleeping
        await clock.sleep(0.005)
        return called

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(work()) == ["a", "b"]


# The library goes by it


BIG = "x" * 300_000  # more than the small buffers on the way to a client hold


@pytest.mark.parametrize("is_behind", [False, True])
async def test_a_slow_client_is_evicted(moved: MovableClock, is_behind: bool) -> None:
    """After `send_timeout`, whether its sender writes or waits for another one's write."""
    ws = endpoint(send_timeout=HOUR, linger=HOUR)

    @ws.on("big")
    async def big(conn: Connection) -> str:
        return BIG

    async with serving(ws._app) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        async with Stalled(f"{server.url}/ws") as client:
            for id in (1, 2):  # uvicorn waits if there is something left of an earlier message
                await client.send({"type": "big", "id": id})
            await until(lambda: ws._hub.connections and moved.timers)
            (conn,) = ws._hub.connections
            limit = conn.outgoing._patience
            assert type(limit) is WaitLimit
            if is_behind:
                moved.advance(HOUR / 2)
                behind = asyncio.create_task(conn.send("behind"))
                await asyncio.sleep(0)
            moved.advance(HOUR / 2)
            assert not conn.closed
            if not is_behind:
                moved.advance(HOUR / 2)
            await until(lambda: conn.closed)
            assert (await client.read_all()).endswith(b"\x88\x0a\x03\xf5too slow")
            if is_behind:
                with pytest.raises(falcon.WebSocketDisconnected):
                    await behind
            await until(lambda: not ws._hub.state.serving)
        assert limit.expired and ws._hub.stats()["evicted"] == 1


async def test_a_question_times_out(moved: MovableClock) -> None:
    """And is answered in time up to then."""
    ws = endpoint()

    @ws.on("go")
    async def go(conn: Connection) -> Any:
        try:
            return await conn.ask("unlock", timeout=HOUR)
        except NoAnswer as exc:
            return str(exc)

    async with serving(ws._app) as server, connect(f"{server.url}/ws") as client:
        await client.send("go", id=1)
        question = await client.receive()
        moved.advance(HOUR - 60)
        await client.send("unlock.reply", "open", question["id"])
        assert (await client.receive())["payload"] == "open"
        await client.send("go", id=2)
        await client.receive()
        moved.advance(HOUR)
        answer = await client.receive()
        assert answer["payload"] == "a client has not answered 'unlock' within 3600 s"


async def test_a_heartbeat_comes() -> None:
    """In real time."""
    ws = endpoint()
    async with ws.running(), ws._hub.listen("room", heartbeat=0.01) as listener:
        assert [await anext(listener), await anext(listener)] == [None, None]


async def test_a_heartbeat_is_moved(moved: MovableClock) -> None:
    """One a move. A cancellation of the same moment is not lost to it."""
    ws = endpoint()
    async with ws.running(), ws._hub.listen("room", heartbeat=60.0) as listener:
        for _ in range(2):
            task = asyncio.ensure_future(anext(listener))
            await asleep(moved, task)
            moved.advance(60)
            assert await task is None
        task = asyncio.ensure_future(anext(listener))
        await asleep(moved, task)
        moved.advance(60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_an_authentication_expires(moved: MovableClock) -> None:
    """At a time of day that the application has counted from the real one."""
    ws = endpoint()

    @ws.connect
    async def arrive(conn: Connection) -> None:
        conn.expires_at = time.time() + HOUR

    async with serving(ws._app) as server, connect(f"{server.url}/ws") as client:
        await client.ask("hello")
        moved.advance(HOUR - 60)
        assert (await client.ask("hello"))["payload"] == "world"
        moved.advance(60)
        assert (await client.closed())[0] == 3401


async def test_the_rate_is_moved(moved: MovableClock) -> None:
    """What has to wait for so long is admitted after a move."""
    ws = endpoint(rate=(1, HOUR))
    async with serving(ws._app) as server, connect(f"{server.url}/ws") as client:
        assert (await client.ask("hello"))["type"] == "hello.reply"
        refused = (await client.ask("hello"))["payload"]
        assert refused["code"] == "rate_limited" and refused["retry_after"] > HOUR - 60
        moved.advance(HOUR)
        assert (await client.ask("hello"))["type"] == "hello.reply"


async def test_a_handler_is_stopped(moved: MovableClock) -> None:
    """After `handler_timeout`; its own sleep is a real one."""
    ws = endpoint(handler_timeout=HOUR)

    @ws.on("stuck")
    async def stuck(conn: Connection) -> None:
        await asyncio.sleep(HOUR)

    async with serving(ws._app) as server, connect(f"{server.url}/ws") as client:
        await client.send("stuck", id=1)
        await until(lambda: moved.timers)
        moved.advance(HOUR)
        assert (await client.receive())["payload"]["code"] == "handler_timeout"


async def test_a_client_without_a_token_is_closed(moved: MovableClock) -> None:
    """After `auth_timeout`."""
    ws = endpoint(auth_timeout=HOUR)

    @ws.authenticate
    async def who(conn: Connection, token: str) -> str | None:
        return token

    async with serving(ws._app) as server, connect(f"{server.url}/ws") as client:
        await until(lambda: moved.timers)
        moved.advance(HOUR)
        assert (await client.closed())[0] == 3401


async def test_a_connect_handler_is_stopped(moved: MovableClock) -> None:
    """After `connect_timeout`."""
    ws = endpoint(connect_timeout=HOUR)

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await asyncio.Event().wait()

    async def move() -> None:
        await until(lambda: moved.timers)
        moved.advance(HOUR)

    async with serving(ws._app) as server:
        moving = asyncio.create_task(move())
        with pytest.raises(websockets.exceptions.InvalidStatus):
            async with connect(f"{server.url}/ws"):
                raise AssertionError("let in")
        await moving


async def test_what_lingers_is_stopped(moved: MovableClock) -> None:
    """A handler whose client has gone has `linger` seconds."""
    ws, stopped = endpoint(linger=HOUR), asyncio.Event()

    @ws.on("stuck", concurrent=True)
    async def stuck(conn: Connection) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    async with serving(ws._app) as server:
        async with connect(f"{server.url}/ws") as client:
            await client.send("stuck", id=1)
            await until(lambda: ws._hub.connections)
            (conn,) = ws._hub.connections
            await until(lambda: session_of(conn).tasks)
        await until(lambda: moved.timers)
        assert not stopped.is_set()
        moved.advance(HOUR)
        await until(lambda: not ws._hub.state.serving)
        assert stopped.is_set()


async def test_a_worker_begins_again(moved: MovableClock) -> None:
    """After its pause; a worker that has run for long has short pauses again."""
    ws, starts = endpoint(), list[float]()
    may_fail = asyncio.Event()

    @ws.worker
    async def work() -> None:
        starts.append(moved.time())
        await may_fail.wait()
        raise ValueError

    async with serving(ws._app):
        await until(lambda: starts)
        may_fail.set()
        for n in range(1, 4):
            await until(lambda: moved.timers)
            pause = moved.next_due() or 0.0
            moved.advance(pause + 0.001)
            await until(lambda n=n: len(starts) == n + 1)
        pauses = [b - a for a, b in itertools.pairwise(starts)]
        assert pauses == sorted(pauses) and pauses[-1] > pauses[0]


async def test_a_drain_is_moved(moved: MovableClock) -> None:
    """Clients are told one after the other, over the time that it is given."""
    ws = endpoint()
    async with (
        serving(ws._app) as server,
        connect(f"{server.url}/ws") as one,
        connect(f"{server.url}/ws") as two,
    ):
        await one.ask("hello")
        await two.ask("hello")
        drain = asyncio.create_task(ws._hub.drain(seconds=HOUR))
        await until(lambda: len(ws._hub.connections) == 1 and moved.timers)
        moved.advance(HOUR / 2)
        await drain
        assert [(await client.closed())[0] for client in (one, two)] == [1012, 1012]


class Broker:
    """Gives a lease, as long as it answers; and is the link to itself."""

    is_connected, session = True, 1

    def __init__(self) -> None:
        self.asked = list[float]()
        self.answers = asyncio.Event()
        self.answers.set()

    async def connected(self) -> None: ...

    async def lease(self, key: str, token: str, seconds: float) -> bool:
        self.asked.append(seconds)
        await self.answers.wait()
        return True


async def test_a_lease_is_moved(moved: MovableClock) -> None:
    """It is renewed in time; without an answer its worker is stopped, and begins again."""
    broker, began, ended = Broker(), list[str](), list[str]()
    lease = pachinko_cluster.Lease(cast(Any, broker), cast(Any, broker), "key", "process")

    async def work() -> None:
        began.append("")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("")

    holding = asyncio.create_task(lease.run(work))
    await until(lambda: began)
    for n in (2, 3, 4):
        moved.advance(pachinko_cluster._RENEW)
        await until(lambda n=n: len(broker.asked) == n)
    assert not ended and broker.asked == [pachinko_cluster.LEASE] * 4
    broker.answers.clear()
    moved.advance(pachinko_cluster._RENEW)
    await until(lambda: len(broker.asked) == 5)
    moved.advance(pachinko_cluster._HOLD)
    await until(lambda: ended)
    broker.answers.set()
    await until(lambda: len(began) == 2)
    holding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holding
    assert len(ended) == 2 and broker.asked[-1] == 0 and moved.timers == []


async def test_it_is_looked_up_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another clock may take its place at any time; the library keeps no reference."""
    used = list[str]()

    class Noted(Clock):
        def time(self) -> float:
            used.append("time")
            return super().time()

        def call_at(self, when: float, function: Callable[..., object], *args: Any) -> Any:
            used.append("call_at")
            return super().call_at(when, function, *args)

    ws = endpoint(handler_timeout=HOUR)
    async with serving(ws._app) as server, connect(f"{server.url}/ws") as client:
        await client.ask("hello")
        monkeypatch.setattr(pachinko, "clock", Noted())
        await client.ask("hello")
        assert used == ["time", "time", "call_at"]
