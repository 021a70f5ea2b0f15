"""What a client of a simulation sends and gets, how it ends, and what its failures say."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import attrs
import falcon.asgi
import pytest
from support import PATIENCE

from pachinko import (
    Close,
    Envelope,
    Hub,
    MessageError,
    Pachinko,
    PachinkoError,
    Refused,
    message,
    simulate,
)  # fmt: skip

SHORT = 0.1  # seconds that a test waits for what does not come


@message("said")
@attrs.frozen
class Said:
    text: str


@message("other")
@attrs.frozen
class Other:
    number: int = 0


class Room:
    """An application, and what its handlers have seen."""

    def __init__(self, **options: Any) -> None:
        self.app = falcon.asgi.App()
        self.hub = Hub()
        self.ws = ws = Pachinko(self.app, "/ws", hub=self.hub, **options)
        self.seen: list[Any] = []
        self.ended: list[tuple[int, str]] = []
        self.gate = asyncio.Event()
        self.stopped = 0

        @ws.connect
        async def connect(conn: Any) -> None:
            await conn.join("all")

        @ws.disconnect
        async def disconnect(conn: Any) -> None:
            self.ended.append((conn.close_code, conn.id))

        @ws.on("say")
        async def say(conn: Any, *, text: str) -> None:
            await conn.send(Said(text))

        @ws.on("echo")
        async def echo(conn: Any, payload: Any) -> Any:
            return payload

        @ws.on("fail")
        async def fail(conn: Any, *, code: str) -> None:
            error = MessageError(code, "no", at=[2])
            error.details["self"] = 1
            raise error

        @ws.on("bug")
        async def bug(conn: Any) -> None:
            raise KeyError("lost")

        @ws.on("park")
        async def park(conn: Any) -> str:
            await self.gate.wait()
            return "late"

        @ws.on("count")
        async def count(conn: Any, *, to: int = 1_000_000) -> AsyncIterator[int]:
            try:
                for n in range(to):
                    yield n
            finally:
                self.stopped += 1

        @ws.on("broken")
        async def broken(conn: Any) -> AsyncIterator[int]:
            yield 1
            raise MessageError("broken", "in the middle")

        @ws.on("ask")
        async def ask(conn: Any, *, type: str, payload: Any = None) -> Any:
            return await conn.ask(type, payload)

        @ws.on("shut")
        async def shut(conn: Any) -> None:
            raise Close(4321, "enough")

        @ws.fallback
        async def fallback(conn: Any, frame: str) -> None:
            self.seen.append(frame)


@pytest.fixture
async def room() -> Room:
    return Room()


@contextlib.asynccontextmanager
async def entered(room: Room, timeout: float = PATIENCE) -> AsyncIterator[Any]:
    async with simulate(room.app, timeout=timeout) as sim:
        yield sim


# ── sending and receiving


async def test_a_class_a_type_and_nothing_say_what_is_received(room: Room) -> None:
    """They give the object, the payload and the envelope."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        for _ in range(3):
            await ada.send("say", {"text": "hi"})
        assert await ada.receive(Said) == Said("hi")
        assert await ada.receive("said") == {"text": "hi"}
        assert await ada.receive() == Envelope("said", {"text": "hi"})
        assert ada.received == []


@pytest.mark.parametrize("expected", [5, int, b"x", object()])
async def test_what_is_no_message_cannot_be_expected(room: Room, expected: Any) -> None:
    """The error says what to write."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        with pytest.raises(TypeError, match=r"receive\(Said\)"):
            await ada.receive(expected)


@pytest.mark.parametrize(
    "payload", [None, 0, "", [], {}, {"a": None}, "é\U0001f600", "x" * 1_000_000, 2**53, [[[1]]]]
)
async def test_a_payload_comes_back_as_it_was(room: Room, payload: Any) -> None:
    """So do None and one of nearly 1 MiB."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        assert await ada.request("echo", payload) == payload


@pytest.mark.parametrize("id", [0, "", 1, "1", "request-0", -1, "é"])
async def test_an_id_of_the_test_is_its_own(room: Room, id: Any) -> None:
    """The reply is received, and takes nothing from requests."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        await ada.send("echo", "mine", id=id)
        assert await ada.request("echo", "other") == "other"
        assert await ada.receive() == Envelope("echo.reply", "mine", id)
        await ada.send("echo", "again", id=id)
        assert await ada.receive("echo.reply") == "again"


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "1", '{"type":1}', '"\ud800"', "\udfff"])
async def test_any_text_can_be_sent(room: Room, text: str) -> None:
    """The application gets it as it is, and the client stays in."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        await ada.send_text(text)
        await sim.settle()
        assert await ada.request("echo", 1) == 1
        assert text.encode(errors="backslashreplace").decode() in sim.transcript()
        sim.transcript().encode()


async def test_what_is_no_frame_cannot_be_sent(room: Room) -> None:
    """A number is no frame of so many zero bytes."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        for wrong in (5, b"x", None):
            with pytest.raises(TypeError, match="send_text"):
                await ada.send_text(wrong)
        for wrong in (5, "x", None):
            with pytest.raises(TypeError):
                await ada.send_bytes(wrong)
        with pytest.raises(TypeError, match="message"):
            await ada.send(5)


async def test_bytes_cross_in_binary_frames() -> None:
    """They are envelopes without a type."""
    app = falcon.asgi.App()
    ws = Pachinko(app, "/ws", hub=Hub())

    @ws.binary
    async def back(conn: Any, data: bytes) -> bytes:
        return data + b"!"

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send(bytearray(b"a"))
        await ada.send_bytes(memoryview(b"b"))
        assert await ada.receive() == Envelope("", b"a!")
        assert await ada.receive("") == b"b!"
        assert "b'a!'" in sim.transcript()


# ── failures


async def test_a_receive_that_fails_takes_nothing(room: Room) -> None:
    """What has come instead is shown, and still there."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        await ada.send("say", {"text": "hi"})
        await ada.send("echo", 1, id=9)
        for expected in (Other, "other"):
            with pytest.raises(AssertionError, match=r"'other' was expected, but 'said'"):
                await ada.receive(expected)
        with pytest.raises(AssertionError, match=r"'echo.reply' 1 comes later"):
            await ada.receive("echo.reply")
        assert await ada.receive(Said) == Said("hi")
        assert await ada.receive("echo.reply") == 1


async def test_a_similar_type_is_shown(room: Room) -> None:
    """Whether it comes later or another client has got it."""
    async with entered(room) as sim:
        ada, bob = await sim.connect("/ws"), await sim.connect("/ws")
        await ada.send("say", {"text": "hi"})
        await sim.settle()
        with pytest.raises(AssertionError, match=f"{ada.name} has got 'said'"):
            await bob.receive(Said)
        with pytest.raises(AssertionError, match=f"{ada.name} has got 'said'"):
            await bob.receive("sayd")
        with pytest.raises(AssertionError, match=r"but 'said' .* came; 'said' .* comes later"):
            await ada.receive("saidd")
        with pytest.raises(AssertionError) as failure:
            await bob.receive("unlike")
        assert "has got" not in str(failure.value)


async def test_a_payload_that_does_not_fit_is_explained(room: Room) -> None:
    """The field is named, and the message stays."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        await sim.hub.send("all", "said", {"text": 5})
        with pytest.raises(AssertionError, match=r"is no Said: .*text"):
            await ada.receive(Said)
        assert (await ada.receive()).payload == {"text": 5}
        with pytest.raises(AssertionError, match="is no int"):
            await ada.request("echo", "x", returns=int)


async def test_a_failure_shows_the_transcript_and_the_bug(room: Room) -> None:
    """The bug of the handler is the cause, and at the end it fails the test."""
    with pytest.raises(AssertionError, match="'bug' has failed: KeyError"):  # noqa: PT012 - it comes at the end of the block
        async with entered(room) as sim:
            ada = await sim.connect("/ws")
            await ada.send("bug")
            with pytest.raises(
                AssertionError, match=r"(?s)Transcript.*→ .*bug.*← .*error"
            ) as failure:
                await ada.receive(Said)
            assert isinstance(failure.value.__cause__, KeyError)
            with pytest.raises(MessageError) as error:
                await ada.request("bug")
            assert isinstance(error.value.__cause__, KeyError)


async def test_a_failure_after_the_end_says_how_it_ended(room: Room) -> None:
    """What has come before is received first."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        await ada.send("say", {"text": "hi"})
        await ada.send("shut")
        assert await ada.closed() == (4321, "enough")
        assert await ada.receive(Said) == Said("hi")
        for call in (ada.receive, lambda: ada.send("say"), lambda: ada.request("say")):
            with pytest.raises(AssertionError, match="ended with 4321 enough"):
                await call()
        with pytest.raises(AssertionError, match="ended with 4321 enough"):
            ada.stream("count")


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "1", True, 10**400])
async def test_a_timeout_is_seconds_above_0(room: Room, timeout: Any) -> None:
    """Nothing is sent with a wrong one."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        calls: list[Callable[[], Any]] = [
            lambda: ada.receive(timeout=timeout), lambda: ada.closed(timeout=timeout),
            lambda: ada.request("echo", 1, timeout=timeout),
            lambda: sim.settle(timeout=timeout), lambda: sim.connect("/ws", timeout=timeout),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(ValueError, match="timeout is a number of seconds above 0"):
                await call()
        with pytest.raises(ValueError, match="timeout is"):
            ada.stream("count", timeout=timeout)
        assert "echo" not in sim.transcript()


# ── requests


async def test_an_error_is_raised_with_its_details(room: Room) -> None:
    """Details may have any name."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        with pytest.raises(MessageError) as error:
            await ada.request("fail", {"code": "nope"})
        assert (error.value.code, error.value.message) == ("nope", "no")
        assert error.value.details == {"at": [2], "self": 1}
        with sim.bugs(KeyError), pytest.raises(MessageError, match="internal_error"):
            await ada.request("bug")


async def test_requests_at_once_get_their_own_answers(room: Room) -> None:
    """So do receives that wait at the same time, in their order."""
    async with entered(room) as sim:
        ada, bob = await sim.connect("/ws"), await sim.connect("/ws")
        numbers = range(20)
        got = await asyncio.gather(
            *(c.request("echo", n) for n in numbers for c in (ada, bob)), sim.settle()
        )
        assert got[:-1] == [n for n in numbers for _ in range(2)]
        waiting = [asyncio.create_task(ada.receive("said")) for _ in numbers]
        for n in numbers:
            await ada.send("say", {"text": str(n)})
        assert [each["text"] for each in await asyncio.gather(*waiting)] == [
            str(n) for n in numbers
        ]


async def test_a_cancelled_wait_loses_nothing(room: Room) -> None:
    """A receive takes nothing, and the late answer to a request does not turn up."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        waits = [asyncio.create_task(each) for each in (ada.receive(), ada.request("park"))]
        await asyncio.sleep(0)
        for each in waits:
            each.cancel()
        assert [type(each) for each in await asyncio.gather(*waits, return_exceptions=True)] == [
            asyncio.CancelledError
        ] * 2
        room.gate.set()
        await ada.send("say", {"text": "hi"})
        assert await ada.receive(Said) == Said("hi")
        await sim.settle()
        assert ada.received == []


async def test_a_request_that_is_not_answered_fails_at_once(room: Room) -> None:
    """Its answer is not received later."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        with pytest.raises(AssertionError, match="an answer to 'park' was expected"):
            await ada.request("park")
        room.gate.set()
        await sim.settle()
        assert ada.received == []


async def test_requests_and_streams_are_not_confused(room: Room) -> None:
    """The failure names the other one, and what the stream sends is not received."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        with pytest.raises(AssertionError, match=r"use stream\('count'"):
            await ada.request("count")
        with pytest.raises(AssertionError, match=r"use stream\('count'"):
            await ada.request("count", {"to": 0})
        with pytest.raises(AssertionError, match=r"use request\('echo'"):
            [n async for n in ada.stream("echo", 1)]
        await sim.settle()
        assert (ada.received, room.stopped) == ([], 2)


# ── streams


async def leave_by_break(items: Any) -> None:
    async for n in items:
        if n == 2:
            break


async def leave_by_return(items: Any) -> int:
    async for n in items:
        return int(n)
    return -1


async def leave_by_exception(items: Any) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async for n in items:
            1 / n


async def leave_by_aclose(items: Any) -> None:
    assert await anext(items) == 0
    await items.aclose()
    await items.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(items)


async def leave_by_aclosing(items: Any) -> None:
    async with contextlib.aclosing(items):
        await leave_by_break(items)


async def leave_by_cancellation(items: Any) -> None:
    async def consume() -> None:
        async for _ in items:
            await asyncio.Event().wait()

    task = asyncio.create_task(consume())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])


LEAVING = [
    leave_by_break, leave_by_return, leave_by_exception, leave_by_aclose, leave_by_aclosing,
    leave_by_cancellation,
]  # fmt: skip


@pytest.mark.parametrize("leave", LEAVING)
@pytest.mark.parametrize("is_kept", [False, True])
async def test_leaving_a_stream_sends_complete_at_once(
    room: Room, leave: Callable[[Any], Any], is_kept: bool
) -> None:
    """It is sent once, also if the test keeps the stream, and nothing in flight is received."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        kept = [ada.stream("count")] if is_kept else []
        await leave(kept[0] if is_kept else ada.stream("count"))
        await ada.send("say", {"text": "behind it"})
        await sim.settle()
        sent = sim.transcript()
        assert sent.count('→ {"type":"complete"') == 1
        assert sent.index('"complete"') < sent.index("behind it")
        assert room.stopped == 1
        assert [each.type for each in ada.received] == ["said"]


async def test_a_stream_that_has_ended_sends_nothing(room: Room) -> None:
    """Neither does one that fails, or one whose connection has ended."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        assert [n async for n in ada.stream("count", {"to": 3})] == [0, 1, 2]
        with pytest.raises(MessageError, match="broken: in the middle"):
            [n async for n in ada.stream("broken")]
        items = ada.stream("count")
        assert await anext(items) == 0
        ada.cut()
        await items.aclose()
        await sim.settle()
        assert sim.transcript().count(' → {"type":"complete"') == 0
        assert room.stopped == 2


async def test_two_may_take_from_one_stream(room: Room) -> None:
    """Each item is taken once."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        items = ada.stream("count")
        assert sorted(await asyncio.gather(anext(items), anext(items))) == [0, 1]


def test_a_stream_that_outlives_its_loop_is_dropped_quietly() -> None:
    """Nothing can be sent any more."""

    async def run() -> Any:
        room = Room()
        async with simulate(room.app) as sim:
            ada = await sim.connect("/ws")
            return ada.stream("count"), ada

    items, ada = asyncio.run(run())
    ada._calls[next(iter(ada._calls))] = []  # as if the connection had not ended
    del items


# ── answers


async def test_questions_are_answered(room: Room) -> None:
    """By plain and async functions, with what they return, or the error that they raise."""

    async def slow(payload: Any) -> Any:
        await asyncio.sleep(SHORT)
        return payload

    def refuse(payload: Any) -> Any:
        raise MessageError("busy", "not now", left=3)

    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        ada.answer("plain", lambda payload: [payload])
        ada.answer("slow", slow)
        ada.answer("refused", refuse)
        assert await ada.request("ask", {"type": "plain", "payload": 1}) == [1]
        assert await ada.request("ask", {"type": "slow", "payload": 2}) == 2
        await ada.send("ask", {"type": "slow"})
        await sim.settle()
        with pytest.raises(MessageError, match="no_answer"):
            await ada.request("ask", {"type": "refused"})
        assert "busy" in sim.transcript()


async def test_a_question_without_an_answerer_is_received(room: Room) -> None:
    """The test answers it with its id."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        await ada.send("ask", {"type": "name"}, id=1)
        question = await ada.receive()
        await ada.send("name.reply", "ada", id=question.id)
        assert await ada.receive("ask.reply") == "ada"


@pytest.mark.parametrize(
    "answer", [lambda _: 1 / 0, lambda _: object()], ids=["raises", "unencodable"]
)
async def test_a_bug_in_an_answer_fails_the_test(room: Room, answer: Any) -> None:
    """It is the cause of the failure that follows."""
    with pytest.raises(AssertionError, match="the answer to 'x' has failed"):  # noqa: PT012 - it comes at the end of the block
        async with entered(room) as sim:
            ada = await sim.connect("/ws")
            ada.answer("x", answer)
            await ada.send("ask", {"type": "x"})
            with pytest.raises(AssertionError) as failure:
                await ada.receive()
            assert isinstance(failure.value.__cause__, Exception)


async def test_an_answer_in_progress_ends_with_the_connection(room: Room) -> None:
    """Its function is cancelled, unless it ends the connection itself."""
    cancelled: list[str] = []
    async with entered(room) as sim:
        ada, bob = await sim.connect("/ws"), await sim.connect("/ws")

        async def park(payload: Any) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append("park")
                raise

        async def close(payload: Any) -> None:
            await bob.close(4000)
            cancelled.append("closed")

        ada.answer("x", park)
        bob.answer("x", close)
        await ada.send("ask", {"type": "x"})
        await sim.settle()
        ada.cut()
        await sim.settle()
        assert cancelled == ["park"]
        await bob.send("ask", {"type": "x"})
        await sim.settle()
        assert cancelled == ["park", "closed"]


# ── ends


async def test_an_end_has_the_code_of_who_ends_it(room: Room) -> None:
    """A handler's, the client's, the hub's, or 1006 for a lost line."""
    async with entered(room) as sim:
        ada, bob, cem, dan = [await sim.connect("/ws") for _ in range(4)]
        await ada.send("shut")
        assert await ada.closed() == (4321, "enough")
        await bob.close(4001, "bye")
        assert await bob.closed() == (4001, "bye")
        cem.cut()
        assert await cem.closed() == (1006, "")
        await sim.hub.close(dan.conn, 4002, "out")
        assert await dan.closed() == (4002, "out")
        await sim.settle()
        assert sorted(code for code, _ in room.ended) == [1006, 4001, 4002, 4321]
        for each in (ada, bob, cem, dan):
            each.cut()
            await each.close()


async def test_closed_fails_at_once_while_the_client_is_in(room: Room) -> None:
    """Nothing can end it then."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        with pytest.raises(AssertionError, match="the end of the connection was expected"):
            await ada.closed()


async def test_a_close_does_not_wait_for_a_handler_that_is_parked(room: Room) -> None:
    """It returns when nothing more can run."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        await ada.send("park")
        await ada.close()
        assert await ada.closed() == (1000, "")


@pytest.mark.parametrize("phase", ["idle", "park", "count", "stalled", "ask"])
async def test_a_cut_is_noticed_in_each_phase(room: Room, phase: str) -> None:
    """The disconnect handlers get 1006 once, and the client is no member any more."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        if phase == "stalled":
            ada.stall()
            await ada.send("say", {"text": "x" * 1000})
        elif phase == "ask":
            await ada.send("ask", {"type": "x"})
        elif phase == "count":
            items = ada.stream("count")
            await anext(items)
        elif phase == "park":
            await ada.send("park")
        await sim.settle() if phase != "count" else None
        ada.cut()
        await sim.settle()
        await sim.advance(60)
        assert [code for code, _ in room.ended] == [1006]
        assert await ada.closed() == (1006, "")
        assert room.hub.count == 0


async def test_a_cut_handshake_is_no_client(room: Room) -> None:
    """The wait for it is cancelled, or takes too long."""
    gate = asyncio.Event()

    @room.ws.connect
    async def slow(conn: Any) -> None:
        await gate.wait()

    async with entered(room) as sim:
        connecting = asyncio.create_task(sim.connect("/ws"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        connecting.cancel()
        await asyncio.wait([connecting])
        await sim.advance(60)
        assert room.hub.count == 0
        with pytest.raises(AssertionError, match=r"nobody answers the handshake.*slow"):
            await sim.connect("/ws")
        gate.set()


# ── stalls


async def test_a_stalled_client_gets_nothing_until_it_reads_on(room: Room) -> None:
    """Then it gets all, in order."""
    async with entered(room) as sim:
        ada, bob = await sim.connect("/ws"), await sim.connect("/ws")
        bob.stall()
        for n in range(5):
            await sim.hub.send("all", "said", {"text": str(n)})
        await sim.settle()
        assert bob.received == []
        assert len(ada.received) == 5
        bob.resume()
        bob.stall()
        await sim.settle()
        assert bob.received == []
        bob.resume()
        await sim.settle()
        assert [each.payload["text"] for each in bob.received] == list("01234")


async def test_a_stalled_client_is_evicted_by_its_outbox() -> None:
    """It gets 1013, and the others stay in."""
    room = Room(outbox=3)
    async with entered(room) as sim:
        ada, bob = await sim.connect("/ws"), await sim.connect("/ws")
        bob.stall()
        for n in range(10):
            await sim.hub.send("all", "said", {"text": str(n)})
            await sim.settle()
        assert (await bob.closed())[0] == 1013
        assert len(ada.received) == 10
        assert room.hub.count == 1


async def test_a_stalled_client_is_evicted_by_time(room: Room) -> None:
    """`advance` moves the time limit of a write."""
    async with entered(room) as sim:
        bob = await sim.connect("/ws")
        bob.stall()
        await bob.send("say", {"text": "x"})
        await sim.settle()
        with pytest.raises(AssertionError, match="was expected"):
            await bob.closed()
        await sim.advance(3600)
        assert (await bob.closed())[0] == 1013


async def test_a_close_frame_arrives_at_a_stalled_client(room: Room) -> None:
    """`closed` gives what the server closed with."""
    async with entered(room) as sim:
        bob = await sim.connect("/ws")
        bob.stall()
        await bob.send("shut")
        assert await bob.closed() == (4321, "enough")


async def test_a_stalled_client_has_gaps() -> None:
    """With ``drop_oldest`` it stays in."""
    room = Room(outbox=2, overflow="drop_oldest")
    async with entered(room) as sim:
        bob = await sim.connect("/ws")
        bob.stall()
        for n in range(10):
            await sim.hub.send("all", "said", {"text": str(n)})
        await sim.settle()
        bob.resume()
        await sim.settle()
        types = [each.type for each in bob.received]
        assert "gap" in types
        assert {"text": "9"} in [each.payload for each in bob.received]


# ── handshakes, and applications that are no Pachinko


async def test_the_conn_is_the_servers_side(room: Room) -> None:
    """A Falcon responder has none."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        assert "all" in ada.conn.groups
        assert repr(ada) == f"<Client {ada.name} /ws>"


class Responder:
    """Falcon's own way, for an application that is not a Pachinko's."""

    async def on_websocket(self, req: Any, ws: Any) -> None:
        if (status := req.get_param("refuse")) is not None:
            raise falcon.HTTPError(status, title="Full", description=req.get_param("why"))
        if req.get_param("close") is not None:
            return
        await ws.accept(subprotocol="b", headers={"X-Seen": "yes"})
        if req.get_param("bug") is not None:
            raise KeyError("lost")
        for text in ("no JSON", "\ud800", "[1]"):
            await ws.send_text(text)
        await ws.send_data(b"\x00")
        await ws.receive_text()


async def test_a_falcon_responder_has_a_client_too() -> None:
    """What it sends are envelopes without a type, and it has no `conn`."""
    app = falcon.asgi.App()
    app.add_route("/plain", Responder())
    async with simulate(app) as sim:
        ada = await sim.connect("/plain", subprotocols=["a", "b"])
        assert (ada.subprotocol, ada.headers["x-seen"]) == ("b", "yes")
        await sim.settle()
        assert [each.payload for each in ada.received] == ["no JSON", "\ud800", "[1]", b"\x00"]
        with pytest.raises(PachinkoError, match="no Pachinko serves /plain"):
            _ = ada.conn
        await ada.send_text("enough")
        assert (await ada.closed())[0] == 1000


async def test_a_bug_of_a_responder_closes_and_fails_the_test() -> None:
    """The bug is the cause."""
    app = falcon.asgi.App()
    app.add_route("/plain", Responder())
    async with simulate(app) as sim:
        with sim.bugs(KeyError):
            ada = await sim.connect("/plain?bug")
            assert (await ada.closed())[0] == 1011


@pytest.mark.parametrize(
    ("query", "reason"), [("refuse=418&why=tea", "tea"), ("refuse=503", "Full")]
)
async def test_a_refusal_has_a_status_and_a_reason(query: str, reason: str, room: Room) -> None:
    """They are those of `falcon.HTTPError`."""

    @room.ws.connect
    async def refuse(conn: Any) -> None:
        get = conn.req.get_param
        raise falcon.HTTPError(get("refuse"), title="Full", description=get("why"))

    async with entered(room) as sim:
        with pytest.raises(Refused) as refused:
            await sim.connect("/ws?" + query)
        assert refused.value.status == int(query[7:10])
        assert refused.value.reason == reason


def raw(*events: dict[str, Any]) -> Any:
    """Return an ASGI application that answers a handshake with *events*."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            for event in events:
                await send({**event, "type": f"websocket.{event['type']}"})
            await receive()

    return app


@pytest.mark.parametrize(
    "body", [b"", b"plain", b"[1]", b"5", b"null", b'{"title":null}', b'{"title":5}', b"\xff"]
)
async def test_a_refusal_may_have_any_body(body: bytes) -> None:
    """It is the reason, if it is no JSON of `falcon.HTTPError`."""
    app = raw(
        {"type": "http.response.start", "status": 404, "headers": [(b"X-A", b"1")]},
        {"type": "http.response.body", "body": body},
    )
    async with simulate(app) as sim:
        with pytest.raises(Refused) as refused:
            await sim.connect("/")
        assert (refused.value.status, refused.value.headers) == (404, {"x-a": "1"})
        expected = "5" if b'title":5' in body else body.decode(errors="replace")
        assert refused.value.reason == expected


@pytest.mark.parametrize("accept", [{"type": "accept"}, {"type": "accept", "subprotocol": None}])
async def test_an_application_that_returns_has_lost_its_client(accept: dict[str, Any]) -> None:
    """It has not closed, and its client gets 1006."""
    async with simulate(raw(accept, {"type": "send", "text": "bye", "bytes": None})) as sim:
        ada = await sim.connect("/")
        await ada.send_text("bye")
        assert await ada.closed() == (1006, "")
        assert (await ada.receive()).payload == "bye"


async def test_a_handshake_that_is_closed_is_refused_with_403() -> None:
    """Servers answer so."""
    app = falcon.asgi.App()
    app.add_route("/plain", Responder())
    async with simulate(app) as sim:
        with pytest.raises(Refused, match="HTTP 403: the application has closed with"):
            await sim.connect("/plain?close")


async def test_an_application_that_fails_has_lost_its_client() -> None:
    """Its bug fails the test."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await receive()
            raise KeyError("lost")

    async with simulate(app) as sim:
        with sim.bugs(KeyError):
            ada = await sim.connect("/")
            await ada.send_text("go")
            assert await ada.closed() == (1006, "")


@pytest.mark.parametrize("value", [True, None, {"ok": True}, "yes"])
async def test_an_answerer_is_a_function(room: Room, value: Any) -> None:
    """The error has the corrected code."""
    async with entered(room) as sim:
        ada = await sim.connect("/ws")
        with pytest.raises(TypeError, match=r'write answer\("sure", lambda payload: True\), got '):
            ada.answer("sure", value)
