"""While a handler waits, frames are read on: some act at once, the others keep their order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support import (
    PATIENCE,
    Client,
    Stalled,
    connect,
    new_app,
    serving,
    session_of,
    simulated,
    until,
)

from pachinko import Connection, Envelope, Hub, Pachinko, Rate


class Gate:
    """An endpoint with a plain handler that waits until it is let go on."""

    def __init__(self, **options: Any) -> None:
        self.ws = Pachinko(new_app(), "/ws", hub=Hub(), **options)
        self.opened, self.entered = asyncio.Event(), asyncio.Event()
        self.seen: list[Any] = []
        self.ws.on("wait")(self.wait)
        self.ws.on("note")(self.note)
        self.ws.on("beside", concurrent=True)(self.beside)
        self.ws.on("count")(self.count)
        self.ws.on("forever")(self.forever)

    async def wait(self, conn: Connection) -> str:
        self.entered.set()
        await self.opened.wait()
        return "waited"

    async def note(self, conn: Connection, payload: Any) -> None:
        self.seen.append(payload)

    async def beside(self, conn: Connection, *, n: int = 0) -> int:
        return n

    async def count(self, conn: Connection, *, to: int) -> AsyncIterator[int]:
        for n in range(to):
            yield n

    async def forever(self, conn: Connection) -> AsyncIterator[int]:
        yield 0
        await asyncio.Event().wait()

    async def enter(self, client: Client) -> None:
        """Let the handler wait."""
        await client.send("wait", id="wait")
        await asyncio.wait_for(self.entered.wait(), PATIENCE)

    @property
    def held(self) -> int:
        """How many frames wait for the handler."""
        (conn,) = self.ws._hub.connections
        return len(session_of(conn).incoming._inbox)

    @property
    def late(self) -> int:
        return self.ws._hub.stats()["late"]


async def test_what_needs_no_turn_goes_by_a_handler_that_waits() -> None:
    """A concurrent handler, a stream and a ping are answered; plain messages before them wait."""
    gate = Gate()
    async with simulated(gate.ws._app) as server, connect(server.url + "/ws") as client:
        await gate.enter(client)
        await client.send("note", 1)
        assert await client.ask("beside", {"n": 5}, id=1) == {
            "type": "beside.reply", "id": 1, "payload": 5
        }  # fmt: skip
        await client.send("note", 2, id="noted")
        assert await client.ask("$ping", id=2) == {"type": "$pong", "id": 2}
        await client.send("count", {"to": 2}, id=3)
        assert [(await client.receive()).get("payload") for _ in range(3)] == [0, 1, None]
        assert gate.seen == [] and gate.held == 2
        gate.opened.set()
        assert (await client.receive())["id"] == "wait"
        assert (await client.receive())["id"] == "noted"
        assert gate.seen == [1, 2]


async def test_a_stream_is_stopped_while_a_handler_waits() -> None:
    """A ``complete`` for another request in progress, or for none, changes nothing."""
    gate = Gate()
    async with simulated(gate.ws._app) as server, connect(server.url + "/ws") as client:
        await client.ask("forever", id="f")
        await gate.enter(client)
        await client.send("complete", id="wait")
        await client.send("complete", id="none")
        await client.send("complete", id="f")
        assert await client.receive() == {"type": "complete", "id": "f"}
        gate.opened.set()
        assert await client.receive() == {"type": "wait.reply", "id": "wait", "payload": "waited"}


async def test_plain_messages_are_held_up_to_a_limit_and_none_is_refused() -> None:
    """The 257th is not read before the handler has ended, and neither is what comes behind it."""
    gate = Gate()
    async with simulated(gate.ws._app) as server, connect(server.url + "/ws") as client:
        await gate.enter(client)
        for n in range(300):
            await client.send("note", n)
        await client.send("$ping", id="behind")
        await until(lambda: gate.held == 256)
        gate.opened.set()
        assert (await client.receive())["id"] == "wait"
        assert (await client.receive())["id"] == "behind"
        assert gate.seen == list(range(300))


@pytest.mark.parametrize("kind", ["text", "binary"])
async def test_what_is_held_is_bounded_in_bytes(kind: str) -> None:
    """Reading stops once it is more than one frame may have."""
    gate = Gate(max_size=1000)

    @gate.ws.binary
    async def upload(conn: Connection, data: bytes) -> None:
        gate.seen.append(data)

    async with simulated(gate.ws._app) as server, connect(server.url + "/ws") as client:
        await gate.enter(client)
        for _ in range(10):
            if kind == "text":
                await client.send("note", "x" * 400)
            else:
                await client.raw(b"x" * 400)
        await until(lambda: gate.held == 3)
        gate.opened.set()
        await until(lambda: len(gate.seen) == 10)
        await gate.ws._hub.broadcast("on")
        (conn,) = gate.ws._hub.connections
        assert session_of(conn).incoming._size == 0


@pytest.mark.parametrize(
    "frame",
    [
        "no JSON", "{}", '{"type":"none","id":1}', '{"type":"beside","id":1,"payload":{"n":"x"}}',
        '{"type":"note","payload":"\\ud83d","id":1}', '{"type":"beside","type":"none","id":1}',
        '{"type":"note","type":"beside","id":1}',
        '{"type":"beside","id":1,"payload":' + "[" * 200 + "]" * 200 + "}",
        '{"type":"beside","id":1,"payload":' + "[" * 5000 + "]" * 5000 + "}",
    ],
)  # fmt: skip
async def test_what_is_wrong_is_refused_in_its_turn(frame: str) -> None:
    """Behind the handler that waits, and before the message that follows."""
    gate = Gate()
    async with simulated(gate.ws._app) as server, connect(server.url + "/ws") as client:
        await gate.enter(client)
        await client.raw(frame)
        await client.send("note", 1, id=2)
        await until(lambda: gate.held == 2)
        gate.opened.set()
        assert [(await client.receive())["type"] for _ in range(3)] == [
            "wait.reply", "error", "note.reply"
        ]  # fmt: skip


async def test_a_frame_that_is_too_large_closes_in_its_turn() -> None:
    """The answer to the message before it goes out."""
    gate = Gate(max_size=1000)
    async with simulated(gate.ws._app) as server, connect(server.url + "/ws") as client:
        await gate.enter(client)
        await client.send("beside", "x" * 1000)
        await until(lambda: gate.held == 1)
        gate.opened.set()
        assert (await client.receive())["id"] == "wait"
        assert (await client.closed())[0] == 1009


# The rate


async def test_a_message_counts_for_the_rate_when_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that keeps to the rate is refused nothing after a handler that took long."""
    gate, now = Gate(rate=(2, 10.0)), [1000.0]
    take = Rate.take
    monkeypatch.setattr(Rate, "take", lambda self, _: take(self, now[0]))
    async with simulated(gate.ws._app) as server, connect(server.url + "/ws") as client:
        await gate.enter(client)
        for n in range(8):
            now[0] += 5.0
            await client.send("note", n)
            await until(lambda count=n + 1: gate.held == count)
        now[0] += 5.0
        gate.opened.set()
        assert (await client.receive())["id"] == "wait"
        assert await client.ask("beside", id=1) == {"type": "beside.reply", "id": 1, "payload": 0}
        assert gate.seen == list(range(8))


async def test_a_message_too_many_is_refused_at_once() -> None:
    """Its client need not wait for the handler to know when to send it again."""
    gate = Gate(rate=(3, 600.0))

    @gate.ws.binary
    async def upload(conn: Connection, data: bytes) -> None:
        gate.seen.append(data)

    async with simulated(gate.ws._app) as server, connect(server.url + "/ws") as client:
        await gate.enter(client)
        await client.send("note", 1)
        await client.raw(b"2")
        for frame, id in (
            ('{"type":"note","id":3}', 3), ('{"type":"beside","id":4}', 4), (b"5", None),
            ('{"type":"$ping","id":6}', 6), ('{"id":7}', 7),
        ):  # fmt: skip
            await client.raw(frame)
            refused = await client.receive()
            assert refused["payload"]["code"] == "rate_limited" and refused.get("id") == id
            assert refused["payload"]["retry_after"] > 100
        gate.opened.set()
        assert (await client.receive())["id"] == "wait"
        await until(lambda: gate.seen == [1, b"2"])


async def test_a_rate_that_refuses_meanwhile_is_logged_with_the_type(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log names what was refused, as when no handler waits; a broken frame has no type."""
    caplog.set_level(logging.DEBUG, "pachinko")
    gate = Gate(rate=(1, 600.0))
    async with simulated(gate.ws._app) as server, connect(server.url + "/ws") as client:
        await gate.enter(client)
        for frame in ('{"type":"note"}', '{"type":"beside"}', '{"type":"$ping"}', "{"):
            assert (await client.error(frame))[0] == "rate_limited"
        gate.opened.set()
        assert (await client.receive())["id"] == "wait"
    types = [vars(record)["message_type"] for record in caplog.records if hasattr(record, "code")]
    assert types == ["note", "beside", "$ping", None]


async def test_far_too_many_messages_close_while_a_handler_waits() -> None:
    """What the handler then does has `linger` seconds, as after any close."""
    gate = Gate(rate=(1, 600.0), linger=0.0)
    async with simulated(gate.ws._app) as server, connect(server.url + "/ws") as client:
        await gate.enter(client)
        for _ in range(11):
            await client.send("note", 1)
        codes = [(await client.receive())["payload"]["code"] for _ in range(10)]
        assert codes == ["rate_limited"] * 10
        assert (await client.closed())[0] == 1008


# Pings and answers


@pytest.mark.parametrize("waits", [False, True])
async def test_the_library_answers_pings(waits: bool) -> None:
    """Before middleware and the fallback, with the id if there is one, and at the rate's cost."""
    gate, others = Gate(rate=(4 if waits else 3, 600.0)), list[Any]()

    @gate.ws.middleware
    async def note(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        others.append(envelope.type)
        return await call_next()

    @gate.ws.fallback
    async def other(conn: Connection, frame: str) -> None:
        others.append(frame)

    async with simulated(gate.ws._app) as server, connect(server.url + "/ws") as client:
        if waits:
            await gate.enter(client)
        assert await client.ask("$ping", id=1) == {"type": "$pong", "id": 1}
        assert await client.ask("$ping", {"n": 1}, id="x") == {"type": "$pong", "id": "x"}
        await client.raw('{"type":"$ping"}')
        assert await client.receive() == {"type": "$pong"}
        assert (await client.ask("$ping", id=4))["payload"]["code"] == "rate_limited"
        gate.opened.set()
    assert others == (["wait"] if waits else [])


async def test_pings_and_answers_wait_for_no_accepted_handler() -> None:
    """Messages do, those to concurrent handlers too."""
    gate = Gate()

    @gate.ws.accepted
    async def welcome(conn: Connection) -> None:
        await gate.opened.wait()

    async with simulated(gate.ws._app) as server, connect(server.url + "/ws") as client:
        await client.send("beside", {"n": 5}, id=1)
        await client.send("error", {"code": "x"}, id="$1")
        assert await client.ask("$ping", id=2) == {"type": "$pong", "id": 2}
        assert gate.late == 1
        gate.opened.set()
        assert await client.receive() == {"type": "beside.reply", "id": 1, "payload": 5}


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("frame", ['{"type":"error","id":"$1"}', '{"type":"x.reply","id":"$1"}'])
async def test_an_answer_that_nobody_waits_for_is_counted_and_ignored(
    frame: str, waits: bool
) -> None:
    """It is not answered, does not count for the rate, and does not reach the fallback."""
    gate, others = Gate(rate=(2, 600.0)), list[str]()

    @gate.ws.fallback
    async def other(conn: Connection, frame: str) -> None:
        others.append(frame)

    async with simulated(gate.ws._app) as server, connect(server.url + "/ws") as client:
        if waits:
            await gate.enter(client)
        for _ in range(5):
            await client.raw(frame)
        assert await client.ask("$ping", id=1) == {"type": "$pong", "id": 1}
        assert gate.late == 5 and others == []
        gate.opened.set()


async def test_nothing_goes_by_a_connect_handler() -> None:
    """What a client sends before it is in keeps its order, whatever its kind."""
    ws, order, gate = Pachinko(new_app(), "/ws", hub=Hub()), list[str](), asyncio.Event()

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        return token

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await gate.wait()
        order.append("connect")

    @ws.on("beside", concurrent=True)
    async def beside(conn: Connection) -> None:
        order.append("beside")

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        await client.send("authenticate", {"token": "ada"})
        await client.send("beside", id=1)
        await client.send("$ping", id=2)
        (session,) = ws._hub.state.serving.values()
        await until(lambda: len(session.incoming._inbox) == 2)
        gate.set()
        assert {(await client.receive())["id"] for _ in range(2)} == {1, 2}
    assert order == ["connect", "beside"]


async def test_a_client_that_reads_no_answers_is_read_no_further() -> None:
    """Its pings fill no memory; it is evicted as other slow clients are."""
    gate, codes = Gate(send_timeout=0.2, linger=0.0), list[int | None]()

    @gate.ws.on("beside big", concurrent=True)
    async def big(conn: Connection) -> None:
        await conn.send("big", "x" * 4_000_000)  # more than all buffers hold
        gate.seen.append("big")

    @gate.ws.disconnect
    async def leave(conn: Connection) -> None:
        codes.append(conn.close_code)

    async with serving(gate.ws._app) as server, Stalled(server.url + "/ws") as client:
        await client.send({"type": "wait"})
        await client.send({"type": "beside big"})
        await until(lambda: gate.seen)
        for n in range(3):
            await client.send({"type": "$ping", "id": n})
        await until(lambda: codes)
    assert codes == [1013]
