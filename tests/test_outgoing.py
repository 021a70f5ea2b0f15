"""One client: what is written to it, and when it is given up."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import contextvars
import itertools
import json
import logging
import sys
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import falcon
import pytest
from support import PATIENCE, Stalled, connect, new_app, serving, simulated, until

import pachinko
from pachinko import Connection, Hub, Pachinko

BIG = "x" * 50_000


def endpoint(**options: Any) -> tuple[Pachinko, list[int | None]]:
    """An endpoint whose clients join the group "all", and the close codes it has seen."""
    ws = Pachinko(new_app(), "/ws", hub=Hub(), **{"send_timeout": 60.0, "linger": 0.1, **options})
    codes: list[int | None] = []

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.join("all")

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        codes.append(conn.close_code)

    return ws, codes


async def stall(ws: Pachinko) -> Connection:
    """Send to the one connection until the server cannot write to it any more."""
    (conn,) = ws._hub.connections
    while not conn.outgoing.writing:
        await ws._hub.send_to(conn, "fill", BIG)
        await asyncio.sleep(0)
    return conn


# Slow clients


@pytest.mark.parametrize("bound", ["outbox", "outbox_bytes"])
async def test_a_stalled_client_is_evicted_over_its_bound(
    bound: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With `overflow="close"` it is closed with 1013, counted and logged once."""
    limits = {"outbox": 4} if bound == "outbox" else {"outbox_bytes": 4 * len(BIG)}
    ws, codes = endpoint(**limits)
    async with serving(ws._app) as server, Stalled(server.url + "/ws"):
        conn = await stall(ws)
        for n in range(4 if bound == "outbox" else 3):
            await ws._hub.send("all", "n", BIG)
            assert not conn.closed, n
        for _ in range(3):
            await ws._hub.send("all", "n", BIG)
        assert conn.closed
        await until(lambda: codes and not ws._hub.state.serving)
        stats = ws._hub.stats()
    assert codes == [1013]
    assert (stats["evicted"], stats["dropped"], stats["connections"]) == (1, 0, 0)
    assert stats["outbox_high_water"] in (4, 5)
    records = [r for r in caplog.records if r.name == "pachinko" and r.levelno >= logging.WARNING]
    assert len(records) == 1 and records[0].connection_id == conn.id  # type: ignore[attr-defined]  # from `extra`


async def test_an_evicted_client_that_reads_again_sees_1013() -> None:
    """The close frame is tried for a second, behind the write in progress."""
    ws, codes = endpoint(outbox=1)
    async with serving(ws._app) as server, Stalled(server.url + "/ws") as client:
        await stall(ws)
        for _ in range(3):
            await ws._hub.send("all", "n", BIG)
        data = await client.read_all()
        assert data.endswith(b"\x88\x0a\x03\xf5too slow")
        await until(lambda: codes)
    assert codes == [1013]


async def test_a_stalled_client_delays_nobody() -> None:
    """Others get every message while one of the group does not read."""
    ws, codes = endpoint(outbox=8)
    async with (
        serving(ws._app) as server,
        connect(server.url + "/ws", max_queue=None) as client,
        Stalled(server.url + "/ws"),
    ):
        await until(lambda: len(ws._hub.members("all")) == 2)
        for n in range(150):
            await ws._hub.send("all", "n", [n, BIG])
            assert (await client.receive())["payload"][0] == n
        await until(lambda: codes)
    assert codes[0] == 1013


async def test_drop_oldest_drops_pushed_messages_and_announces_the_gap() -> None:
    """The newest messages and all answers arrive, then one gap for each group."""
    ws, codes = endpoint(outbox=2, overflow="drop_oldest")
    answered: list[int] = []

    @ws.on("ask")
    async def ask(conn: Connection, n: int) -> int:
        await conn.join("more")
        answered.append(n)
        return n

    async with serving(ws._app) as server, Stalled(server.url + "/ws") as client:
        conn = await stall(ws)
        await client.send({"type": "ask", "id": 1, "payload": 1})
        await until(lambda: answered)
        for n in range(5):
            await ws._hub.send("all", "kept", n)
        await ws._hub.broadcast("kept", "broadcast")
        for n in range(5):
            await ws._hub.send("more", "kept", n)
        assert not conn.closed and ws._hub.stats()["dropped"] == 9
        reading = asyncio.create_task(client.read_all())
        await until(lambda: not conn.outgoing.writing)
        await conn.close(4000)
        data = await reading
        await until(lambda: codes)
    frames = [json.loads(b"{" + part) for part in split(data)]
    tail = [f for f in frames if f["type"] != "fill"]
    assert tail == [
        {"type": "ask.reply", "id": 1, "payload": 1},
        {"type": "kept", "group": "more", "payload": 3},
        {"type": "kept", "group": "more", "payload": 4},
        {"type": "gap", "payload": {"group": "all"}},
        {"type": "gap", "payload": {"group": None}},
        {"type": "gap", "payload": {"group": "more"}},
    ]
    assert codes == [4000]


def split(data: bytes) -> list[bytes]:
    """The text frames in *data*, each without its opening brace."""
    frames = []
    while data and data[0] == 0x81:
        size, start = data[1], 2
        if size == 126:
            size, start = int.from_bytes(data[2:4], "big"), 4
        assert size != 127
        frames.append(data[start + 1 : start + size])
        data = data[start + size :]
    return frames


async def test_a_client_that_never_reads_its_replies_is_evicted() -> None:
    """Replies wait for the client, at most `send_timeout` seconds."""
    ws, codes = endpoint(send_timeout=0.2)

    @ws.on("big")
    async def big(conn: Connection) -> str:
        return BIG

    async with serving(ws._app) as server, Stalled(server.url + "/ws") as client:

        async def ask() -> None:
            while True:
                await client.send({"type": "big", "id": 1})

        asking = asyncio.create_task(ask())
        await until(lambda: codes and not ws._hub.state.serving)
        asking.cancel()
        await asyncio.wait([asking])
        stats = ws._hub.stats()
    assert codes == [1013] and stats["evicted"] == 1


async def test_senders_behind_a_stalled_client_learn_that_it_is_gone() -> None:
    """Both the one that writes and those in the outbox raise `WebSocketDisconnected`."""
    ws, codes = endpoint()
    async with serving(ws._app) as server, Stalled(server.url + "/ws") as client:
        (conn,) = ws._hub.connections

        async def flood() -> None:
            while True:
                await conn.send("fill", BIG)

        first = asyncio.create_task(flood())
        await until(lambda: conn.outgoing.writing)
        second = asyncio.create_task(conn.send("second", {}))
        third = asyncio.create_task(conn.send("third", {}))
        await until(
            lambda: conn.outgoing.outbox is not None and len(conn.outgoing.outbox.queue) == 2
        )
        third.cancel()
        client.socket.close()
        for task in (first, second):
            with pytest.raises(falcon.WebSocketDisconnected):
                await asyncio.wait_for(task, PATIENCE)
        with pytest.raises(asyncio.CancelledError):
            await third
        with pytest.raises(falcon.WebSocketDisconnected):
            await conn.send("late", {})
        await until(lambda: codes)


async def test_an_eviction_wakes_the_sender_that_writes() -> None:
    """Whoever waits for the evicted client learns it at once, not after `send_timeout`."""
    ws, codes = endpoint(outbox=1)
    async with serving(ws._app) as server, Stalled(server.url + "/ws"):
        (conn,) = ws._hub.connections

        async def flood() -> None:
            while True:
                await conn.send("fill", BIG)

        sender = asyncio.create_task(flood())
        await until(lambda: conn.outgoing.writing)
        for _ in range(3):
            await ws._hub.send("all", "n", BIG)
        with pytest.raises(falcon.WebSocketDisconnected):
            await asyncio.wait_for(sender, PATIENCE)
        await until(lambda: codes)
    assert codes == [1013]


async def test_an_eviction_wakes_a_sender_whose_message_the_writer_holds() -> None:
    """The handler in progress and the disconnect handlers do not wait for the linger."""
    ws, codes = endpoint(outbox=1, linger=60.0)

    @ws.on("ask")
    async def ask(conn: Connection) -> str:
        return BIG

    async with serving(ws._app) as server, Stalled(server.url + "/ws") as client:
        conn = await stall(ws)
        await client.send({"type": "ask", "id": 1})
        await until(lambda: conn.outgoing.outbox is not None and conn.outgoing.outbox.queue)
        for _ in range(3):
            await ws._hub.send("all", "n", BIG)
        await until(lambda: codes and not ws._hub.state.serving)
    assert codes == [1013]


async def test_senders_at_once_do_not_evict_a_healthy_client() -> None:
    """A writer that has not begun yet is no sign of a slow client."""
    ws, codes = endpoint()
    async with serving(ws._app) as server, connect(server.url + "/ws", max_queue=None) as client:
        await until(lambda: ws._hub.connections)
        await asyncio.gather(*(ws._hub.send("all", "n", n) for n in range(400)))
        for n in range(400):
            assert (await client.receive())["payload"] == n
    assert codes == [1000]


async def test_what_an_eager_task_has_written_needs_no_further_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From Python 3.12 on tasks can be eager; before, this test runs their first step by hand."""
    begin, turns = pachinko.write_batches, list[int]()

    def step(coroutine: Coroutine[Any, Any, None]) -> None:
        with pytest.raises(StopIteration):
            coroutine.send(None)

    def counted(receivers: list[Any], event: Any, left: list[Any]) -> None:
        turns.append(len(receivers))
        begin(receivers, event, left)

    if sys.version_info < (3, 12):
        monkeypatch.setattr(pachinko, "start_task", step)
    monkeypatch.setattr(pachinko, "write_batches", counted)
    ws, _ = endpoint()
    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        await until(lambda: ws._hub.connections)
        await ws._hub.send("all", "n", 1)
        assert (await client.receive())["payload"] == 1
        await ws._hub.send("all", "n", 2)
        assert (await client.receive())["payload"] == 2
    assert turns == [1, 1]


async def test_a_close_announces_the_gaps_before_it() -> None:
    """Loss is never silent, also when the connection ends."""
    ws, codes = endpoint(outbox=2, overflow="drop_oldest")
    async with serving(ws._app) as server, Stalled(server.url + "/ws") as client:
        conn = await stall(ws)
        for n in range(5):
            await ws._hub.send("all", "n", n)
        await conn.close(4000)
        data = await client.read_all()
        await until(lambda: codes)
    types = [json.loads(b"{" + part)["type"] for part in split(data)]
    assert [t for t in types if t != "fill"] == ["n", "n", "gap"] and data.endswith(b"\x0f\xa0")


async def test_a_writer_cancelled_before_it_began_holds_nobody_up() -> None:
    """A close and the client's own in one round of the loop end the connection at once."""
    ws, codes = endpoint()
    async with simulated(ws._app) as server, connect(server.url + "/ws"):
        (conn,) = ws._hub.connections
        conn.outgoing.close(pachinko.Close(4000))
        conn.outgoing.lost(1000)
        await until(lambda: codes and not ws._hub.state.serving)
    assert codes == [4000]


async def test_a_servers_own_error_ends_the_sender_too(caplog: pytest.LogCaptureFixture) -> None:
    """`conn.send` raises `WebSocketDisconnected`, whatever the server raised."""
    caplog.set_level(logging.DEBUG, "pachinko")
    ws, codes = endpoint()

    @ws.on("ask")
    async def ask(conn: Connection) -> str:
        return "reply"

    async def breaking(scope: Any, receive: Any, send: Any) -> None:
        async def broken(event: Any) -> None:
            if event["type"] == "websocket.send":
                raise RuntimeError("the server's own")
            await send(event)

        await ws._app(scope, receive, broken if scope["type"] == "websocket" else send)

    async with simulated(breaking) as server, connect(server.url + "/ws") as client:
        await client.send("ask", id=1)
        await client.closed()
        await until(lambda: codes)
    assert "the server's own" in caplog.text


async def test_a_cancelled_sender_leaves_the_others_in_order() -> None:
    """Cancelling the write in progress hands the outbox over to a writer."""
    ws, _ = endpoint()
    async with serving(ws._app) as server, Stalled(server.url + "/ws") as client:
        (conn,) = ws._hub.connections

        async def flood() -> None:
            while True:
                await conn.send("fill", BIG)

        first = asyncio.create_task(flood())
        await until(lambda: conn.outgoing.writing)
        second = asyncio.create_task(conn.send("second", {}))
        third = asyncio.create_task(conn.send("third", {}))
        fourth = asyncio.create_task(conn.send("fourth", {}))
        await until(
            lambda: conn.outgoing.outbox is not None and len(conn.outgoing.outbox.queue) == 3
        )
        second.cancel()
        first.cancel()
        reading = asyncio.create_task(client.read_all())
        await asyncio.wait_for(asyncio.gather(third, fourth), PATIENCE)
        assert first.cancelled() and second.cancelled()
        await conn.close()
        data = await reading
    types = [json.loads(b"{" + part)["type"] for part in split(data)]
    assert [t for t in types if t != "fill"] == ["third", "fourth"]


async def test_a_burst_does_not_evict_a_healthy_client() -> None:
    """`hub.send` lets the loop run when a receiver is past half its bound."""
    ws, codes = endpoint()
    async with serving(ws._app) as server, connect(server.url + "/ws", max_queue=None) as client:
        await until(lambda: ws._hub.connections)
        for n in range(5000):
            await ws._hub.send("all", "n", n)
        for n in range(5000):
            assert (await client.receive())["payload"] == n
        assert ws._hub.stats()["evicted"] == 0 and codes == []


async def test_closing_a_stalled_client_ends_in_bounded_time() -> None:
    """A close waits for the client at most `send_timeout` seconds; nothing stays behind."""
    ws, codes = endpoint(send_timeout=0.2)
    async with serving(ws._app) as server, Stalled(server.url + "/ws"):
        conn = await stall(ws)
        await conn.close(4000)
        await until(lambda: codes and not ws._hub.state.serving)
        assert not ws._hub.state.registry.connections
    assert codes == [4000]


async def test_a_connect_handler_that_dawdles_in_a_busy_group_is_bounded() -> None:
    """What a group sends during the handshake counts against the outbox, unlike a history."""
    ws, codes = endpoint(outbox=3)

    @ws.connect
    async def slow(conn: Connection) -> None:
        for n in range(10):
            await conn.send("history", n)
        for n in range(5):
            await ws._hub.send("all", "n", n)

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        assert (await client.closed())[0] == 1013
        await until(lambda: codes)
    assert codes == [1013]


async def test_a_servers_own_error_ends_the_connection_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An exception from `send` that is no disconnect is the end of the socket all the same."""
    caplog.set_level(logging.DEBUG, "pachinko")
    ws, codes = endpoint()

    async def breaking(scope: Any, receive: Any, send: Any) -> None:
        async def broken(event: Any) -> None:
            if event["type"] == "websocket.send":
                raise RuntimeError("the server's own")
            await send(event)

        await ws._app(scope, receive, broken if scope["type"] == "websocket" else send)

    async with simulated(breaking) as server, connect(server.url + "/ws") as client:
        await until(lambda: ws._hub.connections)
        await ws._hub.send("all", "x")
        await client.closed()
        await until(lambda: codes)
    assert len(codes) == 1 and "the server's own" in caplog.text


async def test_sigterm_ends_with_a_stalled_client_in_the_grace_period() -> None:
    """A stalled client is seen out at shutdown like any other."""
    ws, codes = endpoint()
    async with (
        serving(ws._app, timeout_graceful_shutdown=1) as server,
        Stalled(server.url + "/ws"),
    ):
        await stall(ws)
        await server.stop()
        assert codes == [1012] and not ws._hub.state.serving


def test_a_transition_that_is_not_in_the_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The phase then stays what it was."""
    parts: Any = None
    counts = collections.Counter[str]()
    outgoing = pachinko.Outgoing("1", parts, parts, parts, counts, pachinko._NOBODY)
    monkeypatch.delitem(pachinko.TRANSITIONS, (pachinko.Phase.CONNECTING, pachinko.Phase.GONE))
    with pytest.raises(RuntimeError, match="does not go from connecting to gone"):
        outgoing.lost()
    assert outgoing.phase is pachinko.Phase.CONNECTING


# A write whose first step was run by hand


def begun(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The rest of *coroutine*, which waits for something."""
    steps = coroutine.__await__()
    return pachinko.rest_of(steps, next(steps))


async def test_suspended_is_awaited_to_the_end() -> None:
    """The rest goes on when what it waits for is there, and gives or raises its outcome."""

    async def wait(gate: asyncio.Future[int]) -> int:
        return await gate

    for outcome in (5, KeyError("x")):
        gate: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        rest = begun(wait(gate))
        if isinstance(outcome, int):
            asyncio.get_running_loop().call_soon(gate.set_result, outcome)
            assert await rest == outcome
        else:
            asyncio.get_running_loop().call_soon(gate.set_exception, outcome)
            with pytest.raises(KeyError):
                await rest


async def test_suspended_is_one_task_for_the_coroutine() -> None:
    """Timeouts, `current_task` and context variables inside see the awaiting task throughout."""
    variable = contextvars.ContextVar("variable", default=0)
    seen: list[Any] = []

    async def coroutine() -> None:
        seen.append(asyncio.current_task())
        variable.set(1)
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            seen.append("timed out")
        seen.append(asyncio.current_task())
        seen.append(variable.get())

    await begun(coroutine())
    task = asyncio.current_task()
    assert seen == [task, "timed out", task, 1]


async def test_suspended_passes_a_cancellation_on() -> None:
    """Cancelling the awaiting task cancels the coroutine inside, which may clean up."""
    seen: list[str] = []

    async def coroutine() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            seen.append("cleaned up")

    async def outer() -> None:
        await begun(coroutine())

    task = asyncio.create_task(outer())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["cleaned up"]


# Phases


class Quiet:
    """The session of a connection that nobody serves; it notes the ends of the flow."""

    is_handling = False

    def __init__(self) -> None:
        self.ends: list[str] = []

    def on_close(self) -> None: ...

    def on_end(self) -> None:
        self.ends.append("ended")


class Silent:
    """As much of Falcon's socket as the writing half needs; its client takes everything."""

    closed = False

    async def send(self, event: Any) -> None: ...

    async def close(self, code: int, reason: str | None) -> None:
        self.closed = True


def writing_half() -> tuple[pachinko.Outgoing, Quiet]:
    ws, session = Silent(), Quiet()
    limits = Pachinko(hub=Hub())._limits
    counters = Hub().state.counts
    return pachinko.Outgoing("id", ws, ws.send, limits, counters, session), session  # type: ignore[arg-type]  # both are fakes


STEPS = {
    "open": lambda outgoing: outgoing.open(),
    "close": lambda outgoing: outgoing.close(pachinko.Close(4000)),
    "evict": lambda outgoing: outgoing.evict(),
    "lost": lambda outgoing: outgoing.lost(1001),
    "release": lambda outgoing: outgoing.release(),
}


async def test_the_table_of_phases_has_every_transition_and_no_other() -> None:
    """Whatever methods are called, in whatever order, a connection only goes down the list."""
    seen: set[tuple[pachinko.Phase, pachinko.Phase]] = set()
    for names in itertools.product(STEPS, repeat=4):
        outgoing, session = writing_half()
        phases = [outgoing.phase]
        for name in names:
            STEPS[name](outgoing)
            await asyncio.sleep(0)
            phases.append(outgoing.phase)
        moves = [pair for pair in itertools.pairwise(phases) if pair[0] is not pair[1]]
        seen |= set(moves)
        is_over = outgoing.phase in (pachinko.Phase.CLOSING, pachinko.Phase.GONE)
        assert bool(session.ends) is is_over
    assert seen == set(pachinko.TRANSITIONS)


@pytest.mark.parametrize("start", list(pachinko.Phase))
@pytest.mark.parametrize("end", list(pachinko.Phase))
def test_a_transition_that_is_not_in_the_table_is_a_bug(
    start: pachinko.Phase, end: pachinko.Phase
) -> None:
    """It is refused where it is made."""
    outgoing, _ = writing_half()
    outgoing.phase = start
    if (start, end) in pachinko.TRANSITIONS:
        outgoing._enter(end)
        assert outgoing.phase is end
    else:
        with pytest.raises(RuntimeError, match=f"from {start} to {end}"):
            outgoing._enter(end)


# Servers that differ


class Server:
    """A server in process, with a send of its own; its client sends *frames* and stays."""

    def __init__(self, ws: Pachinko, send: Any, *frames: str) -> None:
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self.events.put_nowait({"type": "websocket.connect"})
        for frame in frames:
            self.events.put_nowait({"type": "websocket.receive", "text": frame})
        scope = {
            "type": "websocket",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "path": "/ws",
            "query_string": b"",
            "headers": [],
        }
        app: Any = ws._app
        self.task = asyncio.create_task(app(scope, self.events.get, send))


class Step:
    """An awaitable that waits for one turn, and has neither `send` nor `throw`; granian's is so."""

    def __init__(self, done: Callable[[], None]) -> None:
        self.done, self.has_waited = done, False

    def __await__(self) -> Iterator[None]:
        return self

    def __iter__(self) -> Iterator[None]:
        return self

    def __next__(self) -> None:
        if self.has_waited:
            self.done()
            raise StopIteration
        self.has_waited = True


async def test_a_servers_send_may_return_any_awaitable() -> None:
    """ASGI asks for an awaitable; only a coroutine can be run step by step."""
    ws, codes = endpoint()
    sent: list[Any] = []

    @ws.on("echo")
    async def echo(conn: Connection, payload: int) -> int:
        return payload

    def send(event: Any) -> Step:
        return Step(lambda: sent.append(event))

    frames = [f'{{"type":"echo","id":{n},"payload":{n}}}' for n in range(3)]
    server = Server(ws, send, *frames)
    await until(lambda: len(sent) == 4)
    await ws._hub.send("all", "n", 5)
    await until(lambda: len(sent) == 5)
    server.events.put_nowait({"type": "websocket.disconnect", "code": 1001})
    await asyncio.wait_for(server.task, PATIENCE)
    payloads = [json.loads(event["text"])["payload"] for event in sent[1:]]
    assert payloads == [0, 1, 2, 5] and codes == [1001]


async def test_a_server_that_refuses_a_close_code_closes_all_the_same() -> None:
    """Falcon closes the socket after the responder if we could not. daphne takes few codes."""
    ws, codes = endpoint()
    closes: list[int] = []

    async def send(event: Any) -> None:
        if event["type"] == "websocket.close":
            closes.append(event["code"])
            if event["code"] != 1000:
                raise ValueError("invalid close code")

    server = Server(ws, send)
    await until(lambda: ws._hub.connections)
    (conn,) = ws._hub.connections
    await conn.close(4000)
    await asyncio.wait_for(server.task, PATIENCE)
    assert closes == [4000, 1000] and codes == [4000]


async def test_what_follows_a_caught_cancellation_is_not_a_part_of_it() -> None:
    """An error that is raised later has the context that it would have without the library."""

    async def work() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        raise KeyError

    async def run() -> None:
        steps: Any = work().__await__()
        await pachinko.rest_of(steps, next(steps))

    task = asyncio.create_task(run())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(KeyError) as caught:
        await task
    assert caught.value.__context__ is None
