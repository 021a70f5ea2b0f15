"""A simulation: time, bugs, the transcript, the blocking form, and the tests that it is used in."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import falcon.asgi
import pytest
from support import until

import pachinko
from pachinko import (
    Connection,
    Hub,
    MessageError,
    NoAnswer,
    Pachinko,
    PachinkoError,
    Refused,
    message,
    simulate,
)

ROOT = Path(__file__).parent.parent


@message("said")
@attrs.frozen
class Said:
    text: str


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """After each test the library has its own clock, and no simulation or thread."""
    threads = threading.active_count()
    yield
    assert pachinko.bug_hooks == []
    assert type(pachinko.clock) is pachinko.Clock
    assert threading.active_count() <= threads


def endpoint(**options: Any) -> tuple[Any, Pachinko]:
    """An app with a hub of its own, and its endpoint at ``/ws``."""
    app = falcon.asgi.App()
    return app, Pachinko(app, "/ws", hub=Hub(), **options)


def talking(**options: Any) -> Any:
    """An app with a handler of each kind."""
    app, ws = endpoint(**options)

    @ws.connect
    async def enter(conn: Connection) -> None:
        await conn.join("room")

    @ws.on("say")
    async def say(conn: Connection, said: str) -> None:
        await conn.hub.send("room", Said(said))

    @ws.on("double")
    async def double(conn: Connection, n: int) -> int:
        return 2 * n

    @ws.on("count")
    async def count(conn: Connection, to: int) -> AsyncIterator[int]:
        for n in range(to):
            yield n

    @ws.on("ask")
    async def ask(conn: Connection) -> Any:
        return await conn.ask("unlock", {"door": 1})

    @ws.on("fail")
    async def fail(conn: Connection, name: str) -> None:
        raise {"key": KeyError, "zero": ZeroDivisionError}[name](name)

    @ws.on("fail_twice")
    async def fail_twice(conn: Connection) -> None:
        raise ExceptionGroup("both", [KeyError("one"), IndexError("two")])

    @ws.on("leave_task")
    async def leave_task(conn: Connection) -> None:
        async def fail() -> None:
            raise KeyError("task")

        conn.create_task(fail())

    return app


async def never(*_: object) -> None:
    await asyncio.Event().wait()


# Time


async def test_advance_moves_the_rate() -> None:
    """A client that was limited may send again."""
    app, ws = endpoint(rate=(1, 60.0))
    ws.on("hi")(answer := _answer())
    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.request("hi")
        with pytest.raises(MessageError, match="rate_limited"):
            await ada.request("hi")
        sim.advance(60)
        await ada.request("hi")
    assert answer.__name__ == "answer"


def _answer() -> Callable[[Connection], Awaitable[int]]:
    async def answer(conn: Connection) -> int:
        return 1

    return answer


async def test_advance_moves_the_expiry() -> None:
    """The time of day is that of the simulation."""
    async with simulate(talking()) as sim:
        ada = await sim.connect("/ws")
        ada.conn.expires_at = time.time() + 100
        await sim.advance(50)
        assert ada.end is None
        await sim.advance(51)
        assert await ada.closed() == (3401, "the authentication has expired")


@pytest.mark.parametrize("is_awaited", [True, False])
async def test_advance_moves_the_handler_timeout(is_awaited: bool) -> None:
    """A handler that waits is ended, whether the move is awaited or not."""
    app, ws = endpoint(handler_timeout=30)
    ws.on("wait")(_waiting())
    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("wait", id=1)
        await sim.settle()
        moved = sim.advance(31)
        if is_awaited:
            await moved
            assert len(ada.received) == 1
        error = await ada.receive()
        assert error.payload["code"] == "handler_timeout"


def _waiting() -> Callable[[Connection], Awaitable[None]]:
    async def wait(conn: Connection) -> None:
        await never()

    return wait


async def test_advance_moves_the_auth_timeout() -> None:
    """A client that says nothing is closed."""
    app, ws = endpoint(auth_timeout=10)

    @ws.authenticate
    async def authenticate(conn: Connection, token: str | None) -> str | None:
        return token

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await sim.advance(11)
        assert (await ada.closed())[0] == 3401


async def test_advance_moves_the_connect_timeout() -> None:
    """A handshake in progress is refused."""
    app, ws = endpoint(connect_timeout=10)
    entered = asyncio.Event()

    @ws.connect
    async def wait(conn: Connection) -> None:
        entered.set()
        await never()

    async with simulate(app) as sim:
        connecting = asyncio.create_task(sim.connect("/ws"))
        await entered.wait()
        sim.advance(11)
        with pytest.raises(Refused, match="HTTP 503"):
            await connecting


async def test_advance_moves_the_send_timeout() -> None:
    """A stalled client is given up."""
    async with simulate(talking(send_timeout=20)) as sim:
        ada = await sim.connect("/ws")
        ada.stall()
        await ada.send("double", 2, id=1)
        await sim.settle()
        await sim.advance(19)
        assert sim.hub.members("room") == {ada.conn}
        await sim.advance(2)
        assert sim.hub.members("room") == frozenset()


async def test_advance_moves_the_linger() -> None:
    """A handler whose client has left goes on for as long."""
    app, ws = endpoint(linger=10)
    ends: list[str] = []

    @ws.on("wait")
    async def wait(conn: Connection) -> None:
        try:
            await never()
        finally:
            ends.append("over")

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("wait")
        await sim.settle()
        ada.cut()
        await sim.settle()
        await sim.advance(9)
        assert ends == []
        await sim.advance(2)
        assert ends == ["over"]


async def test_advance_moves_the_time_of_a_question() -> None:
    """A client that does not answer in time has not answered."""
    app, ws = endpoint()
    found: list[str] = []

    @ws.on("ask")
    async def ask(conn: Connection) -> None:
        try:
            await conn.ask("unlock", timeout=10)
        except NoAnswer:
            found.append("none")

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("ask")
        await ada.receive("unlock")
        await sim.advance(11)
        assert found == ["none"]


async def test_advance_moves_the_back_off_of_a_worker() -> None:
    """It starts again after 1 second, then 2, then 4."""
    app, ws = endpoint()
    starts: list[int] = []

    @ws.worker
    async def work() -> None:
        starts.append(1)
        raise KeyError("worker")

    async with simulate(app) as sim:
        with sim.bugs(KeyError) as bugs:
            await sim.settle()
            assert len(starts) == 1
            for seconds, count in ((0.1, 1), (1.0, 2), (1.0, 2), (1.1, 3), (4.1, 4)):
                await sim.advance(seconds)
                assert len(starts) == count
        assert len(bugs) == 4


async def test_advance_moves_leases() -> None:
    """Another process takes a worker over, when that of a killed one has expired."""
    runs: list[int] = []
    numbers = iter(range(9))

    def make() -> Any:
        app, ws = endpoint()
        number = next(numbers)

        @ws.worker(once=True)
        async def work() -> None:
            runs.append(number)
            await never()

        return app

    async with simulate(make) as sim:
        await sim.settle()
        other = await sim.process()
        await sim.settle()
        assert runs == [0]
        sim.kill()
        await sim.advance(1)
        await sim.advance(1)
        assert runs == [0]
        for _ in range(8):
            await sim.advance(1)
        assert runs == [0, 1]
        await other.stop()


async def test_advance_moves_the_heartbeat_of_a_listener() -> None:
    """Nothing comes so long, and then a sign of life."""
    async with simulate(talking()) as sim:
        listener = sim.hub.listen("news", heartbeat=30)
        waiting = asyncio.create_task(anext(listener))
        await sim.settle()
        await sim.advance(29)
        assert not waiting.done()
        await sim.advance(2)
        assert waiting.result() is None


async def test_advance_leaves_the_loop_alone() -> None:
    """A real timer of the application stays real."""
    app, ws = endpoint()

    @ws.on("nap")
    async def nap(conn: Connection) -> float:
        begun = asyncio.get_running_loop().time()
        await asyncio.sleep(0.05)
        return asyncio.get_running_loop().time() - begun

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("nap", id="x")
        sim.advance(1000)
        assert 0.04 < (await ada.receive()).payload < 100


@pytest.mark.parametrize(
    "seconds",
    [-1, -0.001, math.nan, math.inf, -math.inf, 10**400, "5", None, True, 1j, [1], b"1"],
)
async def test_advance_takes_seconds(seconds: Any) -> None:
    """The error says what was given, and nothing is moved."""
    async with simulate(talking()) as sim:
        with pytest.raises(ValueError, match="seconds is a finite number, at least 0; got") as bad:
            sim.advance(seconds)
        await sim.settle()
        assert repr(seconds) in str(bad.value) and pachinko.clock.ahead == 0.0


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "5", None, True])
def test_the_timeout_is_seconds(timeout: Any) -> None:
    """Above 0, and not without a bound."""
    with pytest.raises(ValueError, match="timeout is a number of seconds above 0"):
        simulate(talking(), timeout=timeout)


# Bugs


async def bug_of(*frames: tuple[str, Any], expected: Any = ()) -> list[BaseException]:
    """Send the *frames*, with the bugs *expected*; return those that came."""
    async with simulate(talking()) as sim:
        ada = await sim.connect("/ws")
        with sim.bugs(*expected) if expected else contextlib.nullcontext([]) as bugs:
            for type, payload in frames:
                await ada.send(type, payload)
            await sim.settle()
    return bugs


async def test_a_bug_fails_the_test_at_its_end() -> None:
    """It is the cause, with its traceback, and the transcript is there once."""
    with pytest.raises(AssertionError, match="the handler of 'fail' has failed: KeyError") as info:
        await bug_of(("fail", "key"))
    cause = info.value.__cause__
    assert isinstance(cause, KeyError)
    assert cause.__traceback__ is not None
    assert transcripts_in(info.value) == 1


def transcripts_in(exc: BaseException) -> int:
    texts = [str(exc), *getattr(exc, "__notes__", ())]
    return sum(text.count("Transcript") for text in texts)


async def test_several_bugs_are_a_group() -> None:
    """The text has all of them."""
    with pytest.raises(AssertionError, match=r"KeyError\('key'\).*ZeroDivisionError") as info:
        await bug_of(("fail", "key"), ("fail", "zero"))
    cause = info.value.__cause__
    assert isinstance(cause, ExceptionGroup)
    assert [type(each) for each in cause.exceptions] == [KeyError, ZeroDivisionError]


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ([("fail", "key")], [KeyError]),
        ([("fail", "key")], [LookupError]),
        ([("fail", "key")], [ValueError, KeyError]),
        ([("fail", "key"), ("fail", "key")], [KeyError]),
        ([("fail", "key"), ("fail", "zero")], [KeyError, ZeroDivisionError]),
        ([("fail_twice", None)], [LookupError]),
        ([("fail_twice", None)], [KeyError, IndexError]),
        ([("fail_twice", None)], [ExceptionGroup]),
        ([("leave_task", None)], [KeyError]),
    ],
)
async def test_a_bug_may_be_expected(frames: Any, expected: Any) -> None:
    """One of a group is expected if all that is in it is, or the group."""
    bugs = await bug_of(*frames, expected=expected)
    assert len(bugs) == len(frames)


async def test_any_bug_may_be_expected() -> None:
    """Without a class, each one is."""
    async with simulate(talking()) as sim:
        ada = await sim.connect("/ws")
        with sim.bugs() as bugs, pytest.raises(MessageError):
            await ada.request("fail", "key")
        assert [type(each) for each in bugs] == [KeyError]


@pytest.mark.parametrize(
    ("frame", "expected"),
    [(("fail", "key"), [ZeroDivisionError]), (("fail_twice", None), [KeyError])],
)
async def test_another_bug_is_not_expected(frame: Any, expected: Any) -> None:
    """It fails the test."""
    with pytest.raises(AssertionError, match="KeyError"):
        await bug_of(frame, expected=expected)


async def test_a_bug_that_does_not_come_fails_the_test() -> None:
    """The text has the classes."""
    with pytest.raises(AssertionError, match="KeyError or IndexError is expected, but none has"):
        await bug_of(expected=[KeyError, IndexError])


async def test_a_bug_may_come_after_the_block() -> None:
    """One that was expected and has not come yet; the next one fails the test."""
    async with simulate(talking()) as sim:
        ada = await sim.connect("/ws")
        with sim.bugs(KeyError) as bugs:
            pass
        await ada.send("fail", "key")
        await sim.settle()
        assert len(bugs) == 1
    with pytest.raises(AssertionError, match="KeyError"):
        await two_after_the_block()


async def two_after_the_block() -> None:
    async with simulate(talking()) as sim:
        ada = await sim.connect("/ws")
        with sim.bugs(KeyError):
            pass
        await ada.send("fail", "key")
        await ada.send("fail", "key")
        await sim.settle()


@pytest.mark.parametrize("classes", [("KeyError",), (KeyError(),), (KeyError, 5), (int,)])
async def test_only_classes_of_errors_are_expected(classes: Any) -> None:
    """The error has the corrected code."""
    async with simulate(talking()) as sim:
        with pytest.raises(PachinkoError, match=r"with sim.bugs\(KeyError\)"):
            sim.bugs(*classes)


async def test_the_error_of_the_test_is_not_masked() -> None:
    """It has a note of each bug that came meanwhile, and of the transcript."""

    async def test() -> None:
        async with simulate(talking()) as sim:
            ada = await sim.connect("/ws")
            await ada.send("fail", "zero")
            await sim.settle()
            raise LookupError("of the test")

    with pytest.raises(LookupError, match="of the test") as caught:
        await test()
    assert "ZeroDivisionError: zero" in "".join(caught.value.__notes__)


async def test_the_error_of_the_test_has_a_word_on_the_end() -> None:
    """What goes wrong at the end does not mask it either."""
    app, ws = endpoint()
    ws.disconnect(never)

    async def test() -> None:
        async with simulate(app) as sim:
            await sim.connect("/ws")
            raise LookupError("of the test")

    with pytest.raises(LookupError, match="of the test") as caught:
        await test()
    assert "the application does not end" in "".join(caught.value.__notes__)


async def test_the_bug_of_a_request_is_its_cause() -> None:
    """An answer `internal_error` leads to it."""

    async def test() -> None:
        async with simulate(talking()) as sim:
            ada = await sim.connect("/ws")
            await ada.request("fail", "key")

    with pytest.raises(MessageError, match="internal_error") as caught:
        await test()
    assert isinstance(caught.value.__cause__, KeyError)


async def test_bugs_are_known_without_logging() -> None:
    """A program that has switched logging off has its bugs all the same."""
    logging.disable()
    try:
        with pytest.raises(AssertionError, match="KeyError"):
            await bug_of(("fail", "key"))
    finally:
        logging.disable(logging.NOTSET)


def failing_worker() -> Any:
    app, ws = endpoint()

    @ws.worker
    async def work() -> None:
        raise KeyError("worker")

    return app


async def test_the_bug_of_a_worker_fails_the_test() -> None:
    """As any other."""
    with pytest.raises(AssertionError, match=r"worker .*work.* has failed: KeyError"):
        async with simulate(failing_worker()) as sim:
            await sim.settle()


@pytest.mark.parametrize("where", ["handler", "worker"])
async def test_each_simulation_has_its_own_bugs(where: str) -> None:
    """Of two at once, one fails."""
    outer = simulate(failing_worker() if where == "worker" else talking())
    await outer.__aenter__()
    async with simulate(talking()) as inner:
        await inner.connect("/ws")
        if where == "handler":
            await (await outer.connect("/ws")).send("fail", "key")
        await outer.settle()
        await inner.settle()
    with pytest.raises(AssertionError, match="KeyError"):
        await outer.__aexit__(None, None, None)


def test_simulations_in_other_threads_have_their_own_bugs() -> None:
    """One fails, and the other does not."""
    results: dict[str, Any] = {}
    both = threading.Barrier(2)

    def run(name: str) -> None:
        try:
            with simulate(talking()) as sim:
                ada = sim.connect("/ws")
                both.wait(15)
                if name == "bad":
                    ada.send("fail", "key")
                sim.settle()
                both.wait(15)
        except AssertionError as exc:
            results[name] = exc

    threads = [threading.Thread(target=run, args=[name]) for name in ("bad", "good")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(results) == ["bad"]


# The transcript


async def test_each_assertion_shows_the_transcript_once() -> None:
    """Those of the test, of the library, and those in groups."""
    for what in ("test", "library", "group"):
        with pytest.raises((AssertionError, ExceptionGroup)) as caught:
            await failing_by(what)
        exc = caught.value
        if isinstance(exc, ExceptionGroup):
            exc = exc.exceptions[0]
        assert transcripts_in(exc) == 1, what


async def failing_by(what: str) -> None:
    async with simulate(talking()) as sim:
        ada = await sim.connect("/ws")
        if what == "library":
            await ada.receive()
        elif what == "group":
            async with asyncio.TaskGroup() as group:
                group.create_task(_fail())
        else:
            await _fail()


async def _fail() -> None:
    raise AssertionError("of a test")


async def test_other_errors_show_no_transcript() -> None:
    """They are of something else."""
    with pytest.raises(LookupError) as caught:
        async with simulate(talking()):
            raise LookupError
    assert transcripts_in(caught.value) == 0


async def test_the_transcript_has_all_that_crosses_a_line() -> None:
    """And the end of each connection."""
    async with simulate(talking()) as sim:
        ada = await sim.connect("/ws")
        assert await ada.request("double", 2) == 4
        await ada.close(4000, "bye")
        lines = [line.split(maxsplit=1)[1] for line in sim.transcript().splitlines()[1:]]
    assert lines[:2] == ["#1 → GET /ws", "#1 ← accepted"]
    assert lines[-1] == "#1 ✕ left with 4000 bye"
    assert '"double"' in lines[2]
    assert '"double.reply"' in lines[3]


# Where a simulation may be used


async def test_a_simulation_runs_once() -> None:
    """The error has the corrected code."""
    sim = simulate(talking())
    async with sim:
        with pytest.raises(PachinkoError, match=r"async with simulate\(app\) as sim"):
            await sim.__aenter__()
    with pytest.raises(PachinkoError, match="runs once"):
        await sim.__aenter__()


def test_the_blocking_form_runs_once_too() -> None:
    """A second entry leaves the first one in use."""
    with simulate(talking()) as sim:
        with pytest.raises(PachinkoError, match="runs once"), sim.target:
            pytest.fail("it was entered again")
        assert sim.connect("/ws").request("double", 2) == 4


async def test_a_simulation_is_used_in_its_block() -> None:
    """Before and after it, and in other loops, calls say so."""
    sim = simulate(talking())
    with pytest.raises(PachinkoError, match="inside of its block"):
        sim.advance(1)
    async with sim:
        with pytest.raises(PachinkoError, match="the event loop that it was entered in"):
            await asyncio.to_thread(asyncio.run, _settle(sim))
    with pytest.raises(PachinkoError, match="inside of its block"):
        await sim.settle()
    with pytest.raises(PachinkoError, match="has ended"):
        await sim.connect("/ws")


async def _settle(sim: Any) -> None:
    await sim.settle()


async def app_with_any_arguments(*args: Any) -> None:
    """An application, though it could be called with nothing."""


class Callables:
    def app(self, scope: Any, receive: Any, send: Any) -> Any:
        return app_with_any_arguments()

    def make(self, debug: bool = False) -> Any:
        return talking()


@pytest.mark.parametrize("app", [app_with_any_arguments, Callables().app])
async def test_an_application_is_told_from_a_function_that_makes_one(app: Any) -> None:
    """By what it takes."""
    async with simulate(app, timeout=1) as sim:
        with pytest.raises(PachinkoError, match="needs a function"):
            sim.process()
    async with simulate(Callables().make) as sim:
        await sim.process()


async def make_async() -> Any:
    """A function that makes no application."""


@pytest.mark.parametrize("app", [None, 5, "app:app", make_async, lambda one: None, {}])
def test_anything_else_is_refused(app: Any) -> None:
    """The error has the corrected code."""
    with pytest.raises(PachinkoError, match=r"write simulate\(app\)"):
        simulate(app)


async def test_two_applications_are_simulated_at_once() -> None:
    """Each has its own hub, and they have one clock."""
    async with simulate(talking()) as one, simulate(talking()) as two:
        ada, bob = await one.connect("/ws"), await two.connect("/ws")
        await ada.send("say", "hi")
        await one.settle()
        assert bob.received == []
        assert await ada.receive(Said) == Said("hi")
        bob.conn.expires_at = time.time() + 10
        await one.advance(11)
        assert (await bob.closed())[0] == 3401


async def test_a_cancelled_test_leaves_nothing() -> None:
    """Also where the cancellation comes at the end."""

    async def work(entered: asyncio.Event, ends: bool) -> None:
        async with simulate(talking()) as sim:
            ada = await sim.connect("/ws")
            await ada.send("say", "hi")
            entered.set()
            if not ends:
                await never()

    for ends in (False, True):
        entered = asyncio.Event()
        task = asyncio.create_task(work(entered, ends))
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: len(asyncio.all_tasks()) == 1)
        assert type(pachinko.clock) is pachinko.Clock


async def test_the_end_leaves_no_task_and_no_timer() -> None:
    """The loop of the test is as it was."""
    async with simulate(talking) as sim:
        other = await sim.process()
        ada, bob = await sim.connect("/ws"), await other.connect("/ws")
        await ada.send("say", "hi")
        await bob.receive(Said)
        bob.stall()
        ada.conn.expires_at = time.time() + 1000
        other.kill()
    assert len(asyncio.all_tasks()) == 1
    loop: Any = asyncio.get_running_loop()
    assert [each for each in loop._scheduled if not each.cancelled()] == []


async def test_nothing_keeps_the_application() -> None:
    """A collection frees it, and the simulation."""

    async def use() -> list[weakref.ref[Any]]:
        app = talking()
        async with simulate(app) as sim:
            ada = await sim.connect("/ws")
            assert await ada.request("double", 2) == 4
            return [weakref.ref(sim.hub), weakref.ref(sim), weakref.ref(ada)]

    refs = await use()
    await asyncio.sleep(0)
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3


def test_nothing_keeps_the_loop_of_a_simulation() -> None:
    """Nor does the blocking form."""
    refs: list[weakref.ref[Any]] = []

    async def use() -> None:
        async with simulate(talking()) as sim:
            await sim.connect("/ws")
        refs.append(weakref.ref(asyncio.get_running_loop()))

    asyncio.run(use())
    with simulate(talking()) as sim:
        refs.append(weakref.ref(sim))
    del sim
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


async def test_the_module_s_hub_serves_many_simulations() -> None:
    """One after the other, in one loop."""
    for _ in range(3):
        app = falcon.asgi.App()
        ws = Pachinko(app, "/ws")
        ws.connect(_join)
        async with simulate(app) as sim:
            ada = await sim.connect("/ws")
            await pachinko.hub.send("room", "hi")
            await ada.receive("hi")
            assert sim.hub is pachinko.hub
            assert len(sim.published("room")) == 1


async def _join(conn: Connection) -> None:
    await conn.join("room")


# Without async


def test_the_blocking_form_has_the_same_names() -> None:
    """Each call returns when it is done."""
    with simulate(talking) as sim:
        ada, bob = sim.connect("/ws"), sim.connect("/ws")
        ada.send(Said("a"))
        ada.send("say", "hi")
        assert bob.receive(Said) == Said("hi")
        assert ada.received[-1].payload == {"text": "hi"}
        assert ada.request("double", 2) == 4
        assert list(ada.stream("count", 3)) == [0, 1, 2]
        for n in ada.stream("count", 1000):
            if n == 2:
                break
        bob.answer("unlock", lambda payload: {"door": payload["door"]})
        assert bob.request("ask") == {"door": 1}
        with pytest.raises(MessageError, match="internal_error"), sim.bugs(KeyError) as bugs:
            ada.request("fail", "key")
        assert len(bugs) == 1
        sim.hub.send("room", "news", exclude=ada.conn)
        sim.settle()
        assert bob.receive("news") is None
        assert {"news"} & {each.type for each in ada.received} == set()
        assert sim.hub.members("room") == {ada.conn, bob.conn}
        assert repr(ada) == "<Client #1 /ws>"
        for each in sim.hub.members("room"):
            each.send("direct")
        assert bob.receive("direct") is None
        with sim.process() as other:
            eve = other.connect("/ws")
            eve.send("say", "ho")
            assert bob.receive(Said) == Said("ho")
            other.kill()
            assert eve.closed() == (1006, "")
        sim.broker.lose()
        sim.broker.restore()
        sim.settle()
        assert bob.receive("gap") == {"group": "room"}
        assert len(sim.published("room")) == 3
        ada.conn.expires_at = time.time() + 100
        sim.advance(101)
        assert ada.closed() == (3401, "the authentication has expired")
        bob.close(4000, "bye")
        assert bob.closed() == (4000, "bye")
        with pytest.raises(AssertionError, match="nothing more can come"):
            bob.receive()


def test_a_listener_is_iterated_without_async() -> None:
    """As streams are."""
    with simulate(talking()) as sim:
        listener = sim.hub.listen("news")
        sim.hub.send("news", "hi")
        assert next(listener).type == "hi"


def test_a_bug_fails_a_test_without_async() -> None:
    """With the same text and cause."""

    def test() -> None:
        with simulate(talking()) as sim:
            sim.connect("/ws").send("fail", "key")
            sim.settle()

    with pytest.raises(AssertionError, match="the handler of 'fail' has failed") as caught:
        test()
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_failed_start_leaves_no_thread() -> None:
    """It raises what the async form does."""
    with pytest.raises(PachinkoError, match="returned None"), simulate(lambda: None):
        pytest.fail("it has not started")


async def test_the_blocking_form_works_beside_a_running_loop() -> None:
    """Its loop is another one."""

    def use() -> int:
        with simulate(talking()) as sim:
            doubled: int = sim.connect("/ws").request("double", 4)
            return doubled

    assert use() == 8
    assert await asyncio.to_thread(use) == 8


# Under test runners


PRELUDE = """
import asyncio, unittest
import attrs, falcon.asgi, pytest
from pachinko import Connection, Hub, Pachinko, message, simulate

@message("said")
@attrs.frozen
class Said:
    text: str

def app():
    app = falcon.asgi.App()
    ws = Pachinko(app, "/ws")
    @ws.on("say")
    async def say(conn: Connection, said: str) -> Said:
        await conn.send(Said(said))
    return app
"""

BODY = """
        ada = await sim.connect("/ws")
        await ada.send("say", "hi")
        assert await ada.receive(Said) == Said("hi")
"""

RUNNERS = {
    "pytest-asyncio, auto": (
        "-p asyncio -o asyncio_mode=auto",
        f"""
@pytest.fixture
async def sim():
    async with simulate(app()) as sim:
        yield sim

async def test_one():
    async with simulate(app()) as sim:{BODY}
async def test_two(sim):
    if True:{BODY}
""",
    ),
    "pytest-asyncio, strict": (
        "-p asyncio -o asyncio_mode=strict",
        f"""
import pytest_asyncio
pytestmark = pytest.mark.asyncio

@pytest_asyncio.fixture
async def sim():
    async with simulate(app()) as sim:
        yield sim

async def test_one(sim):
    if True:{BODY}
async def test_two(sim):
    if True:{BODY}
""",
    ),
    "anyio": (
        "-p anyio -p no:asyncio",
        f"""
pytestmark = pytest.mark.anyio

@pytest.fixture
def anyio_backend():
    return "asyncio"

@pytest.fixture
async def sim(anyio_backend):
    async with simulate(app()) as sim:
        yield sim

async def test_one(sim):
    if True:{BODY}
async def test_two():
    async with simulate(app()) as sim:{BODY}
""",
    ),
    "unittest": (
        "-p no:asyncio",
        f"""
class Tests(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self):
        self.sim = await self.enterAsyncContext(simulate(app()))

    async def test_one(self):
        sim = self.sim
        if True:{textwrap.indent(BODY, "    ")}
    async def test_two(self):
        async with simulate(app()) as sim:{textwrap.indent(BODY, "    ")}
""",
    ),
    "plain": (
        "-p no:asyncio",
        f"""
@pytest.fixture
def sim():
    with simulate(app()) as sim:
        yield sim

def test_one(sim):
    ada = sim.connect("/ws")
    ada.send("say", "hi")
    assert ada.receive(Said) == Said("hi")

def test_two():
    async def main():
        async with simulate(app()) as sim:{textwrap.indent(BODY, "    ")}
    asyncio.run(main())
""",
    ),
}


def run_pytest(folder: Path, options: str, text: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_app.py").write_text(PRELUDE + text)
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options.split()]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": ""},
    )  # fmt: skip


@pytest.mark.parametrize("runner", RUNNERS)
def test_it_works_under(runner: str, tmp_path: Path) -> None:
    """Tests and fixtures of each runner may use it, without a warning."""
    options, text = RUNNERS[runner]
    plugin = "-p pytest_asyncio.plugin -o asyncio_default_fixture_loop_scope=function"
    options = options.replace("-p asyncio", plugin)
    options = options.replace("-p anyio", "-p anyio.pytest_plugin").replace("-p no:asyncio", "")
    result = run_pytest(tmp_path, options, text)
    assert "2 passed" in result.stdout, result.stdout + result.stderr


def test_a_failed_assertion_shows_fields_and_transcript(tmp_path: Path) -> None:
    """pytest explains what differs in two messages."""
    text = """
def test_one():
    with simulate(app()) as sim:
        ada = sim.connect("/ws")
        ada.send("say", "hi")
        assert ada.receive(Said) == Said("ho")
"""
    output = run_pytest(tmp_path, "-vv", text).stdout
    assert "text: 'hi' != 'ho'" in output
    assert output.count("Transcript (seconds") == 1


async def test_a_bug_of_the_start_may_be_expected_in_the_block() -> None:
    """A worker may fail before the test can say so, but what comes later is not excused by it."""

    class Failing:
        async def process_startup(self, scope: object, event: object) -> None:
            for hook in pachinko.bug_hooks:
                hook("the start", KeyError("early"))

    app, ws = endpoint()
    app.add_middleware(Failing())  # type: ignore[arg-type]  # Falcon wants a protocol of more

    @ws.on("bug")
    async def bug(conn: Connection) -> None:
        raise KeyError("late")

    async with simulate(app) as sim:
        with sim.bugs(KeyError) as bugs:
            pass
        assert [str(each) for each in bugs] == ["'early'"]
    with pytest.raises(AssertionError, match="KeyError"):  # noqa: PT012 - the failure comes at its end
        async with simulate(app) as sim:
            with sim.bugs(KeyError):
                pass
            await (await sim.connect("/ws")).send("bug")
