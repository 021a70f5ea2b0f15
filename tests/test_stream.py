"""Generators whose items go to the client one by one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable

import anyio
import pytest
from support import PATIENCE, session_of, turns, until
from test_session import Session, clean, endpoint, recording

from pachinko import Close, Connection, MessageError, Pachinko, Stream


async def test_a_stream_sends_items_and_completes() -> None:
    """Each item is a reply with ``more``; the end is a ``complete`` with the id."""
    ws = endpoint()

    @ws.on("count")
    async def count(conn: Connection, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    async with Session(ws) as client:
        for id in (1, 1, "x"):
            await client.send("count", 2, id=id)
            for i in range(2):
                assert await client.receive() == {
                    "type": "count.reply",
                    "id": id,
                    "more": True,
                    "payload": i,
                }
            assert await client.receive() == {"type": "complete", "id": id}


async def test_streams_run_side_by_side_under_ids_of_their_own() -> None:
    """An id in use is refused without that id; one without an id is refused."""
    ws = endpoint()

    @ws.on("ticks")
    async def ticks(conn: Connection) -> AsyncIterator[None]:
        await asyncio.Event().wait()
        yield

    @ws.on("count")
    async def count(conn: Connection) -> AsyncIterator[int]:
        yield 1

    async with Session(ws) as client:
        assert (await client.ask("ticks", id=None))["payload"]["code"] == "id_required"
        await client.send("ticks", id=1)
        answer = await client.ask("ticks", id=1)
        assert answer["payload"]["code"] == "id_in_use" and "id" not in answer
        assert "1" in answer["payload"]["message"]
        assert (await client.ask("count", id=2))["payload"] == 1
        assert await client.receive() == {"type": "complete", "id": 2}
        assert await client.ask("complete", id=1) == {"type": "complete", "id": 1}
        assert (await client.ask("count", id=1))["payload"] == 1


async def test_a_client_stops_a_stream_that_never_waits() -> None:
    """A generator without an await of its own starves nobody, and ends on ``complete``."""
    ws = endpoint()
    ended: list[str] = []

    @ws.on("flood")
    async def flood(conn: Connection) -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            await asyncio.sleep(0)
            ended.append("cleaned up")

    async with Session(ws) as client:
        await client.send("flood", id=1)
        await client.receive()
        await client.send("complete", id=1)
        while (await client.receive())["type"] != "complete":
            pass
        assert ended == ["cleaned up"]


async def test_a_complete_behind_a_busy_handler_acts_at_once() -> None:
    """The read-ahead sees the ``complete`` while another handler is suspended."""
    ws = endpoint()
    gate, ended = asyncio.Event(), asyncio.Event()

    @ws.on("forever")
    async def forever(conn: Connection) -> AsyncIterator[int]:
        try:
            yield 0
            await asyncio.Event().wait()
        finally:
            ended.set()

    @ws.on("busy")
    async def busy(conn: Connection) -> None:
        await gate.wait()

    @ws.on("note")
    async def note(conn: Connection, text: str) -> str:
        return text

    async with Session(ws) as client:
        assert (await client.ask("forever", id=1))["payload"] == 0
        await client.send("busy", id=2)
        await client.send("note", 'says "complete"', id=3)
        await client.raw('no json, but "complete"')
        await client.send("complete", id=8)
        assert await client.ask("complete", id=1) == {"type": "complete", "id": 1}
        assert ended.is_set()
        gate.set()
        assert (await client.receive())["id"] == 2
        assert (await client.receive())["payload"] == 'says "complete"'
        assert (await client.receive())["payload"]["code"] == "invalid_json"


async def test_a_stream_that_is_stopped_before_it_began_completes() -> None:
    """A request and its ``complete`` in one go are answered with one ``complete``."""
    ws = endpoint()

    @ws.on("count")
    async def count(conn: Connection) -> AsyncIterator[int]:
        yield 1

    @ws.on("both")
    async def both(conn: Connection) -> None:
        await turns()  # lets both frames arrive while this one is busy

    async with Session(ws) as client:
        await client.send("both")
        await client.send("count", id=1)
        await client.send("complete", id=1)
        answers = [await client.receive()]
        while answers[-1]["type"] != "complete":
            answers.append(await client.receive())
        assert len(answers) <= 2


async def test_the_read_ahead_goes_on_after_a_long_queue() -> None:
    """Once a handler has taken a frame of a full queue, the next ``complete`` acts at once."""
    ws = endpoint()
    gates, ended = [asyncio.Event() for _ in range(260)], asyncio.Event()
    running: list[int] = []

    @ws.on("forever")
    async def forever(conn: Connection) -> AsyncIterator[int]:
        try:
            yield 0
            await asyncio.Event().wait()
        finally:
            ended.set()

    @ws.on("slow")
    async def slow(conn: Connection, n: int) -> None:
        running.append(n)
        await gates[n].wait()

    async with Session(ws) as client:
        await client.ask("forever", id="f")
        (conn,) = ws._hub.connections
        for n in range(260):
            await client.send("slow", n)
        await client.send("complete", id="f")
        await until(lambda: len(session_of(conn).incoming._inbox) == 256)
        for n in range(4):
            gates[n].set()
        await asyncio.wait_for(ended.wait(), PATIENCE)
        assert max(running) == 4
        for gate in gates:
            gate.set()


async def test_the_cleanup_of_a_stream_is_cancelled_once() -> None:
    """A ``complete`` and then a disconnect do not interrupt what the generator does at its end."""
    ws = endpoint()
    codes, events = recording(ws), list[str]()
    cleaning, gate = asyncio.Event(), asyncio.Event()

    @ws.on("subscribe")
    async def subscribe(conn: Connection) -> AsyncIterator[int]:
        try:
            yield 0
            await asyncio.Event().wait()
        finally:
            cleaning.set()
            await gate.wait()
            events.append("unsubscribed")

    async with Session(ws) as client:
        await client.ask("subscribe", id=1)
        await client.send("complete", id=1)
        await asyncio.wait_for(cleaning.wait(), PATIENCE)
        (conn,) = ws._hub.connections
        await client.close()
        await until(lambda: conn.closed)
        gate.set()
        await clean(ws, codes)
    assert events == ["unsubscribed"]


async def test_a_linger_of_zero_leaves_streams_their_cleanup() -> None:
    """Without a linger, handlers are cancelled at once, and still awaited."""
    ws = endpoint(linger=0)
    codes, events = recording(ws), list[str]()

    @ws.on("subscribe")
    async def subscribe(conn: Connection) -> AsyncIterator[int]:
        try:
            yield 0
            await asyncio.Event().wait()
        finally:
            await turns()
            events.append(f"unsubscribed before {len(codes)} disconnects")

    async with Session(ws) as client:
        await client.ask("subscribe", id=1)
        await client.close()
        await clean(ws, codes)
    assert events == ["unsubscribed before 0 disconnects"]


async def test_no_stream_begins_for_a_client_that_has_gone() -> None:
    """A request for one in the backlog of a lost client is dropped."""
    ws = endpoint(linger=60)
    codes, events = recording(ws), list[str]()
    gate = asyncio.Event()

    @ws.on("slow")
    async def slow(conn: Connection) -> None:
        await gate.wait()

    @ws.on("subscribe")
    async def subscribe(conn: Connection) -> AsyncIterator[int]:
        events.append("began")
        await asyncio.Event().wait()
        yield 0

    async with Session(ws) as client:
        (conn,) = ws._hub.connections
        await client.send("slow")
        await client.send("subscribe", id=1)
        await client.close()
        await until(lambda: conn.closed)
        gate.set()
        await clean(ws, codes)
    assert events == []


async def test_a_generator_that_swallows_its_cancellation_is_stopped_all_the_same() -> None:
    """It ends at its next item."""
    ws = endpoint()

    @ws.on("stubborn")
    async def stubborn(conn: Connection) -> AsyncIterator[int]:
        yield 0
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            await asyncio.sleep(0)  # so that coverage on Python 3.11 sees what runs after a throw
            yield 1

    async with Session(ws) as client:
        await client.ask("stubborn", id=1)
        await client.send("complete", id=1)
        while (await client.receive())["type"] != "complete":
            pass


async def test_a_complete_for_an_unknown_id_is_ignored() -> None:
    """It is no error, with or without an id, and twice is once."""
    ws = endpoint()

    @ws.on("one")
    async def one(conn: Connection) -> int:
        return 1

    async with Session(ws) as client:
        await client.send("complete", id=99)
        await client.send("complete")
        assert (await client.ask("one"))["payload"] == 1


@pytest.mark.parametrize("when", ["before", "between"])
async def test_a_failing_stream_ends_with_an_error(when: str) -> None:
    """The error with the stream's id is its one final answer."""
    ws = endpoint()

    @ws.on("count")
    async def count(conn: Connection, when: str) -> AsyncIterator[int]:
        if when == "between":
            yield 1
        raise MessageError("broken")

    async with Session(ws) as client:
        await client.send("count", when, id=1)
        if when == "between":
            assert (await client.receive())["more"] is True
        answer = await client.receive()
        assert (answer["payload"]["code"], answer["id"]) == ("broken", 1)
        answer = await client.ask("count", 5, id=1)
        assert (answer["payload"]["code"], answer["id"]) == ("invalid_payload", 1)


async def test_close_in_a_stream_closes() -> None:
    """A stream may end the connection."""
    ws = endpoint()

    @ws.on("count")
    async def count(conn: Connection) -> AsyncIterator[int]:
        yield 1
        raise Close(4002)

    async with Session(ws) as client:
        await client.ask("count")
        assert (await client.closed())[0] == 4002


async def test_a_stream_that_closes_the_connection_goes_on_by_itself() -> None:
    """`conn.close` in a stream does not cancel that stream, only the others."""
    ws = endpoint()
    seen: list[str] = []

    @ws.on("quit")
    async def quit(conn: Connection) -> AsyncIterator[int]:
        await conn.close(4003)
        await asyncio.sleep(0)
        seen.append("went on")
        yield 1

    async with Session(ws) as client:
        await client.send("quit", id=1)
        assert (await client.closed())[0] == 4003
        await until(lambda: not ws._hub.state.serving)
    assert seen == ["went on"]


async def test_an_answer_to_a_client_that_has_gone_is_dropped() -> None:
    """An error handler's answer finds nobody, which is no error."""
    ws = endpoint()
    seen: list[str] = []

    @ws.error(KeyError)
    async def failed(conn: Connection, exc: KeyError) -> str:
        await conn.close()
        seen.append("answered")
        return "an answer"

    @ws.on("fail")
    async def fail(conn: Connection) -> None:
        raise KeyError

    async with Session(ws) as client:
        await client.send("fail", id=1)
        await client.closed()
    assert seen == ["answered"]


async def test_a_generator_that_catches_its_cancellation_is_closed_all_the_same() -> None:
    """What it yields then is not sent, and its clean-up may wait."""
    ws, ended = endpoint(), list[str]()

    @ws.on("count")
    async def count(conn: Connection) -> AsyncIterator[int]:
        yield 1
        try:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                yield 2
        finally:
            await asyncio.sleep(0)
            ended.append("ended")

    async with Session(ws) as client:
        for _ in range(2):
            assert (await client.ask("count", id=7))["payload"] == 1
            assert await client.ask("complete", id=7) == {"type": "complete", "id": 7}
    assert ended == ["ended"] * 2


async def test_a_stream_that_has_not_begun_does_not_begin_when_a_timer_closes() -> None:
    """A timer has no task, like a stream that has not begun; the two are not the same."""
    ws, began, left = endpoint(), list[str](), list[int | None]()

    @ws.on("count")
    async def count(conn: Connection) -> AsyncIterator[int]:
        began.append("began")
        yield 1

    @ws.on("expire")
    async def expire(conn: Connection) -> None:
        stream = Stream()
        session = session_of(conn)
        session.tasks, session.streams = {asyncio.ensure_future(asyncio.sleep(0))}, {7: stream}
        asyncio.get_running_loop().call_soon(conn.outgoing.close, Close(4000))
        await turns()
        began.extend([] if stream.is_stopped else ["not stopped"])

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        left.append(conn.close_code)

    async with Session(ws) as client:
        await client.send("expire")
        assert (await client.closed())[0] == 4000
        await until(lambda: left)
    assert began == [] and left == [4000]


# Generators that need a group of tasks


async def merged(*queues: asyncio.Queue[str]) -> AsyncGenerator[str]:
    """Yield what comes from several queues, as the README of many a library has it."""
    both = asyncio.Queue[str]()

    async def pump(queue: asyncio.Queue[str]) -> None:
        while True:
            await both.put(await queue.get())

    async with asyncio.TaskGroup() as group:
        for queue in queues:
            group.create_task(pump(queue))
        while True:
            yield await both.get()


async def merged_by_anyio(*queues: asyncio.Queue[str]) -> AsyncGenerator[str]:
    """The same with anyio's group and stream."""
    send, receive = anyio.create_memory_object_stream[str](10)

    async def pump(queue: asyncio.Queue[str]) -> None:
        while True:
            await send.send(await queue.get())

    async with send, receive, anyio.create_task_group() as group:
        for queue in queues:
            group.start_soon(pump, queue)
        async for item in receive:
            yield item


async def merged_in_another(*queues: asyncio.Queue[str]) -> AsyncGenerator[str]:
    """A generator around one, which waits as well."""
    async with contextlib.aclosing(merged(*queues)) as items:
        async for item in items:
            await asyncio.sleep(0)
            yield item


async def merged_with_clean_up(*queues: asyncio.Queue[str]) -> AsyncGenerator[str]:
    """One whose tasks wait once more when they are stopped."""

    async def linger() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        group.create_task(linger())
        async with asyncio.TaskGroup() as inner:
            inner.create_task(linger())
            while True:
                for queue in queues:
                    yield await queue.get()


MERGES = [merged, merged_by_anyio, merged_in_another, merged_with_clean_up]
merges = pytest.mark.parametrize("merge", MERGES, ids=lambda merge: merge.__name__)
Queues = list[asyncio.Queue[str]]


def merging(merge: Callable[..., AsyncGenerator[str]]) -> tuple[Pachinko, Queues, list[str]]:
    """An endpoint with a stream of two queues; the queues; a list of what has ended."""
    ws, queues, ended = endpoint(), [asyncio.Queue[str](), asyncio.Queue[str]()], list[str]()

    @ws.on("both")
    async def both(conn: Connection) -> AsyncGenerator[str]:
        try:
            async with contextlib.aclosing(merge(*queues)) as items:
                async for item in items:
                    yield item
        finally:
            ended.append("both")

    return ws, queues, ended


@merges
@pytest.mark.parametrize("when", ["waiting", "flowing", "stalled"])
async def test_a_stream_with_a_group_of_tasks_is_stopped_quietly(
    merge: Callable[..., AsyncGenerator[str]], when: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The client's ``complete`` is answered with one, wherever the generator is."""
    ws, queues, ended = merging(merge)
    async with Session(ws) as client:
        for id in (1, 2):
            await client.send("both", id=id)
            for n in range(4):
                queues[n % 2].put_nowait("x" * (300_000 if when == "stalled" else 1))
            for _ in range(4 if when == "waiting" else 1):
                assert (await client.receive())["id"] == id
            await client.send("complete", id=id)
            answer = await client.receive()
            while "more" in answer:
                answer = await client.receive()
            assert answer == {"type": "complete", "id": id}
            await until(lambda id=id: len(ended) == id)
            for queue in queues:
                while not queue.empty():
                    queue.get_nowait()
    assert not [record for record in caplog.records if record.name == "pachinko"]


@merges
@pytest.mark.parametrize("flowing", [True, False])
async def test_a_client_may_leave_a_stream_with_a_group_of_tasks(
    merge: Callable[..., AsyncGenerator[str]], flowing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A departure is no bug: nothing is logged, and the generator has ended."""
    ws, queues, ended = merging(merge)
    async with Session(ws) as client:
        await client.send("both", id=1)
        queues[0].put_nowait("first")
        assert (await client.receive())["payload"] == "first"
        for _ in range(100 if flowing else 0):
            queues[0].put_nowait("x")
            queues[1].put_nowait("x")
        client.cut()
        await until(lambda: ended and not ws._hub.state.serving)
    assert not [record for record in caplog.records if record.name == "pachinko"]


@merges
async def test_an_item_that_cannot_be_sent_is_the_error_of_its_stream(
    merge: Callable[..., AsyncGenerator[str]], caplog: pytest.LogCaptureFixture
) -> None:
    """Closing the generator does not hide what was wrong."""
    ws, queues, ended = merging(merge)
    async with Session(ws) as client:
        queues[0].put_nowait(object())  # type: ignore[arg-type]  # it is wrong
        answer = await client.ask("both", id=1)
        assert (answer["id"], answer["payload"]["code"]) == (1, "internal_error")
    assert "TypeError: $.payload: cannot send a object" in caplog.text and ended


async def test_what_fails_while_a_stream_is_closed_counts(caplog: pytest.LogCaptureFixture) -> None:
    """The end of the generator is no error of its group, but an error of its clean-up is one."""
    ws = endpoint()

    async def clean_up(exc: Exception) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise exc

    @ws.on("fails")
    async def fails(conn: Connection, *, bug: bool) -> AsyncIterator[int]:
        exc = KeyError("clean-up") if bug else MessageError("unsaved")
        async with asyncio.TaskGroup() as group:
            group.create_task(clean_up(exc))
            while True:
                yield 1

    async with Session(ws) as client:
        for bug, code in ((False, "unsaved"), (True, "internal_error")):
            assert (await client.ask("fails", {"bug": bug}, id=1))["payload"] == 1
            await client.send("complete", id=1)
            answer = await client.receive()
            while "more" in answer:
                answer = await client.receive()
            assert (answer["id"], answer["payload"]["code"]) == (1, code)
            assert ("KeyError: 'clean-up'" in caplog.text) is bug
