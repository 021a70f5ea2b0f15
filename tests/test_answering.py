"""Whatever goes wrong with a message becomes one answer, and the connection goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import falcon
import pytest
from support import new_app

import pachinko
from pachinko import Close, Connection, Hub, MessageError, Pachinko, Session, simulate


@pachinko.message("done")
class Done:
    """What an error handler returns."""

    x: Any


OUTCOMES: list[tuple[Exception, str, Any]] = [
    (MessageError("no", "not now", a=1), "error", {"code": "no", "message": "not now", "a": 1}),
    (falcon.HTTPForbidden(description="not you"), "error", None),
    (ExceptionGroup("", [MessageError("no", "")]), "error", {"code": "no", "message": ""}),
    (KeyError("a bug"), "error", None),
    (LookupError("handled"), "done", {"x": 1}),
    (OSError("handled, and its answer cannot be encoded"), "error", None),
]


def app_of(raised: BaseException, **options: Any) -> Any:
    """An endpoint whose handlers raise."""
    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub(), **options)

    @ws.on("fail")
    async def fail(conn: Connection) -> int:
        raise raised

    @ws.on("apart", concurrent=True)
    async def apart(conn: Connection) -> int:
        raise raised

    @ws.fallback
    async def other(conn: Connection, text: str) -> None:
        raise raised

    @ws.error(LookupError)
    async def lookup(conn: Connection, exc: LookupError) -> Any:
        if type(exc) is not LookupError:
            raise exc
        return Done(1)

    @ws.error(OSError)
    async def os_error(conn: Connection, exc: OSError) -> Any:
        return Done(object())

    return app


@pytest.mark.parametrize("id", [None, 0, 7, "x"])
@pytest.mark.parametrize("type", ["fail", "apart", "other"])
@pytest.mark.parametrize(("raised", "answer", "payload"), OUTCOMES)
async def test_an_exception_is_answered_once(
    raised: Exception, answer: str, payload: Any, type: str, id: Any
) -> None:
    """With the id of its message, wherever the handler runs; the next message is handled."""
    async with simulate(app_of(raised)) as sim:
        with sim.bugs(Exception) as bugs:
            bugs.append(KeyError("none may be needed"))
            client = await sim.connect("/ws")
            await client.send(type, id=id)
            await sim.settle()
            if type == "other" and str(raised).startswith("handled"):
                assert client.received == []  # An error handler has no message to answer.
                return
            envelope = await client.receive()
            assert envelope.type == answer
            assert envelope.id == (id if type != "other" else None)
            assert payload is None or envelope.payload == payload
            await sim.settle()
            assert client.received == [] and not client.conn.closed


async def test_a_close_closes() -> None:
    """It is no answer."""
    async with simulate(app_of(Close(4001, "enough"))) as sim:
        client = await sim.connect("/ws")
        await client.send("fail", id=1)
        assert await client.closed() == (4001, "enough")


async def test_a_rate_is_answered_and_its_abuse_closes() -> None:
    """Each refusal has the id, and says how long to wait; ten times as many are too many."""
    async with simulate(app_of(MessageError("no"), rate=(1, 1000.0))) as sim:
        client = await sim.connect("/ws")
        await client.send("fail", id=1)
        assert (await client.receive()).payload["code"] == "no"
        await client.send("fail", id=2)
        refused = await client.receive()
        assert refused.id == 2 and refused.payload["code"] == "rate_limited"
        for _ in range(12):
            await client.send("fail")
        assert await client.closed() == (1008, "too many messages")


async def test_a_rate_counts_each_frame_once() -> None:
    """Also one that was read while a handler waited. A ``resume`` message is counted, too."""
    app, event = new_app(), asyncio.Event()
    ws = Pachinko(app, "/ws", hub=Hub(), rate=(3, 1000.0))

    @ws.on("wait")
    async def wait(conn: Connection) -> int:
        await event.wait()
        return 1

    async with simulate(app) as sim:
        client = await sim.connect("/ws")
        for id in (1, 2):
            await client.send("wait", id=id)
        await client.send("resume", id=3)
        await client.send("resume", id=4)
        event.set()
        await sim.settle()
        assert sorted((e.id, e.type) for e in client.received) == [
            (1, "wait.reply"), (2, "wait.reply"), (3, "resume.reply"), (4, "error"),
        ]  # fmt: skip


async def test_an_answer_to_a_client_that_has_gone_is_nothing() -> None:
    """A handler that outlives its client has no bug."""
    app, begun, event = new_app(), asyncio.Event(), asyncio.Event()
    ws = Pachinko(app, "/ws", hub=Hub())

    @ws.on("late")
    async def late(conn: Connection) -> None:
        begun.set()
        await event.wait()
        raise MessageError("no")

    async with simulate(app) as sim:
        client = await sim.connect("/ws")
        await client.send("late", id=1)
        await begun.wait()
        client.cut()
        event.set()
        await sim.settle()
        assert client.received == []


def test_a_session_has_no_dict() -> None:
    """Its slots are those of both classes."""
    assert not hasattr(Session.__new__(Session), "__dict__")
