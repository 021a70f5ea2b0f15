"""Messages on their way: decode, find, bind, call, answer."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import attrs
import cattrs
import falcon
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    PATIENCE,
    Client,
    Stalled,
    connect,
    new_app,
    serving,
    session_of,
    simulated,
    turns,
    until,
)

import pachinko
from pachinko import Close, Connection, Envelope, Hub, MessageError, Pachinko, message


@message("said")
class Said:
    text: str


@attrs.frozen
class Base:
    a: int


@attrs.frozen
class Derived(Base):
    secret: str = "hidden"


def endpoint(**options: Any) -> Pachinko:
    return Pachinko(new_app(), "/ws", hub=Hub(), **options)


class Session:
    """A server for one endpoint, with a client in it: ``async with Session(ws) as client``."""

    def __init__(self, ws: Pachinko) -> None:
        self.ws = ws

    async def __aenter__(self) -> Client:
        self.serving = simulated(self.ws._app)
        self.server = await self.serving.__aenter__()
        self.connecting = connect(self.server.url + "/ws")
        return await self.connecting.__aenter__()

    async def __aexit__(self, *exc: Any) -> None:
        await self.connecting.__aexit__(*exc)
        await self.serving.__aexit__(*exc)


# Replies


async def test_a_reply_echoes_the_id_under_the_reply_type() -> None:
    """What a handler returns goes back under ``<type>.reply`` with the id unchanged."""
    ws = endpoint()

    @ws.on("sum")
    async def add(conn: Connection, *, a: int, b: int = 0) -> int:
        return a + b

    async with Session(ws) as client:
        for id in (0, 7, -1, 10**30, "seven", ""):
            assert await client.ask("sum", {"a": 1, "b": 2}, id=id) == {
                "type": "sum.reply",
                "id": id,
                "payload": 3,
            }
        assert await client.ask("sum", {"a": 1}, id=None) == {"type": "sum.reply", "payload": 1}


async def test_a_message_object_is_answered_under_its_own_type() -> None:
    """A ``@message`` object that is returned keeps its type."""
    ws = endpoint()

    @ws.on("echo")
    async def echo(conn: Connection, text: str) -> Said:
        return Said(text)

    async with Session(ws) as client:
        assert await client.ask("echo", "hi", id=1) == {
            "type": "said",
            "id": 1,
            "payload": {"text": "hi"},
        }


async def test_none_is_answered_only_where_there_is_an_id() -> None:
    """A handler that returns None answers without a payload, and not at all without an id."""
    ws = endpoint()

    @ws.on("note")
    async def note(conn: Connection) -> None: ...

    async with Session(ws) as client:
        await client.send("note")
        assert await client.ask("note", id=3) == {"type": "note.reply", "id": 3}


async def test_a_null_id_is_no_id() -> None:
    """``"id": null`` is answered like a message without an id."""
    ws = endpoint()

    @ws.on("one")
    async def one(conn: Connection) -> int:
        return 1

    async with Session(ws) as client:
        await client.raw('{"type":"one","id":null}')
        assert await client.receive() == {"type": "one.reply", "payload": 1}


async def test_only_the_declared_fields_are_returned() -> None:
    """A subclass returned where its base was declared goes out as the base."""
    ws = endpoint()

    @ws.on("plain")
    async def plain(conn: Connection) -> Base:
        return Derived(1)

    @ws.on("maybe")
    async def maybe(conn: Connection) -> Base | None:
        return Derived(2)

    @ws.on("several")
    async def several(conn: Connection) -> list[Base]:
        return [Derived(3)]

    @ws.on("stream")
    async def stream(conn: Connection) -> AsyncIterator[Base]:
        yield Derived(4)

    async with Session(ws) as client:
        assert (await client.ask("plain"))["payload"] == {"a": 1}
        assert (await client.ask("maybe"))["payload"] == {"a": 2}
        assert (await client.ask("several"))["payload"] == [{"a": 3}]
        assert (await client.ask("stream"))["payload"] == {"a": 4}


async def test_a_reply_that_cannot_be_encoded_is_an_internal_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client gets ``internal_error``, the log the reason."""
    ws = endpoint()

    @ws.on("bad")
    async def bad(conn: Connection) -> object:
        return object()

    async with Session(ws) as client:
        answer = await client.ask("bad", id=1)
        assert answer["payload"]["code"] == "internal_error" and answer["id"] == 1
        assert (await client.ask("bad", id=2))["id"] == 2
    assert "unsupported" in caplog.text


# Errors


BAD_FRAMES = [
    ("", "invalid_json", None),
    ("x", "invalid_json", None),
    ("[]", "invalid_envelope", None),
    ("null", "invalid_envelope", None),
    ("{}", "invalid_envelope", None),
    ('{"type":5,"id":3}', "invalid_envelope", 3),
    ('{"type":null,"id":"x"}', "invalid_envelope", "x"),
    ('{"type":"one","id":{}}', "invalid_envelope", None),
    ('{"type":"one","id":1.5}', "invalid_envelope", None),
    ('{"type":"one","id":true}', "invalid_envelope", None),
    ('{"type":"one","payload":' + "[" * 100_000 + "]" * 100_000 + "}", "invalid_json", None),
    ('{"type":"one","payload":"\\ud800"}', "invalid_json", None),
    ('{"type":"one","payload":NaN}', "invalid_json", None),
    ('{"type":"one","payload":1e999}', "invalid_json", None),
    ('{"type":"__class__","id":1}', "unknown_type", 1),
    ('{"type":"on_connect","id":1}', "unknown_type", 1),
    ('{"type":"gap","id":1}', "unknown_type", 1),
    ('{"type":"$x","id":1}', "unknown_type", 1),
    ('{"type":"$none","id":1}', "unknown_type", 1),
    ('{"type":"","id":1}', "unknown_type", 1),
    ('{"type":"sum","id":1,"payload":[]}', "invalid_payload", 1),
    ('{"type":"sum","id":1}', "invalid_payload", 1),
]


async def test_each_bad_frame_gets_its_error_and_the_connection_goes_on() -> None:
    """Every kind of bad frame has one code, echoes the id it had, and costs nothing else."""
    ws = endpoint()

    @ws.on("one")
    async def one(conn: Connection) -> int:
        return 1

    @ws.on("sum")
    async def add(conn: Connection, *, a: int) -> int:
        return a

    async with Session(ws) as client:
        for frame, code, id in BAD_FRAMES:
            assert await client.error(frame) == (code, id), frame[:60]
        assert await client.ask("one", id=9) == {"type": "one.reply", "id": 9, "payload": 1}
        errors = {k: n for k, n in ws._hub.stats().items() if k.startswith("errors")}
    assert errors["errors"] == len(BAD_FRAMES)
    assert errors["errors.unknown_type"] == 6


async def test_the_last_of_duplicate_keys_counts() -> None:
    """Duplicate keys are resolved as by JavaScript's JSON.parse; but a frame has one type."""
    ws = endpoint()

    @ws.on("one")
    async def one(conn: Connection, n: int) -> int:
        return n

    async with Session(ws) as client:
        await client.raw('{"type":"one","payload":1,"payload":2,"id":1,"id":2}')
        assert await client.receive() == {"type": "one.reply", "id": 2, "payload": 2}
        assert await client.error('{"type":"one","type":"no","payload":1}') == (
            "unknown_type",
            None,
        )
        for first in ("no", "complete"):
            frame = f'{{"type":"{first}","type":"one","payload":1,"id":3}}'
            assert await client.error(frame) == ("invalid_envelope", 3)


async def test_a_bug_is_logged_and_answered_without_its_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An unexpected exception reaches the log with its traceback, and no client."""
    ws = endpoint()

    @ws.on("bug")
    async def bug(conn: Connection) -> None:
        raise RuntimeError("the secret")

    async with Session(ws) as client:
        answer = await client.ask("bug", id=1)
        assert answer["payload"]["code"] == "internal_error"
        assert "secret" not in json.dumps(answer)
        (conn,) = ws._hub.connections
    record = next(r for r in caplog.records if r.name == "pachinko" and r.levelname == "ERROR")
    assert record.exc_info and "the secret" in caplog.text
    assert (record.connection_id, record.message_type) == (conn.id, "bug")  # type: ignore[attr-defined]


async def test_an_http_error_becomes_an_error_with_its_status() -> None:
    """`falcon.HTTPError` gives ``http_<status>`` with status, title and description."""
    ws = endpoint()

    @ws.on("secret")
    async def secret(conn: Connection) -> None:
        raise falcon.HTTPForbidden(title="No", description="not yours")

    async with Session(ws) as client:
        assert (await client.ask("secret", id=1))["payload"] == {
            "code": "http_403",
            "message": "not yours",
            "status": 403,
            "title": "No",
            "description": "not yours",
        }


async def test_a_message_error_is_answered_as_it_is() -> None:
    """The application's own codes and details reach the client."""
    ws = endpoint()

    @ws.on("move")
    async def move(conn: Connection) -> None:
        raise MessageError("not_your_turn", "wait", turn="bob")

    async with Session(ws) as client:
        assert await client.ask("move", id="m") == {
            "type": "error",
            "id": "m",
            "payload": {"code": "not_your_turn", "message": "wait", "turn": "bob"},
        }


async def test_details_that_cannot_be_encoded_are_an_internal_error() -> None:
    """A `MessageError` with details that are no JSON is a bug, and answered as one."""
    ws = endpoint()

    @ws.on("move")
    async def move(conn: Connection) -> None:
        raise MessageError("x", detail=object())

    async with Session(ws) as client:
        assert (await client.ask("move"))["payload"]["code"] == "internal_error"


async def test_a_stray_cancelled_error_is_a_bug_like_any_other() -> None:
    """A handler that awaits a cancelled future fails alone."""
    ws = endpoint()

    @ws.on("stray")
    async def stray(conn: Connection) -> None:
        raise asyncio.CancelledError

    async with Session(ws) as client:
        assert (await client.ask("stray"))["payload"]["code"] == "internal_error"
        assert (await client.ask("stray"))["payload"]["code"] == "internal_error"


async def test_a_caught_task_group_leaves_the_connection_as_it_was() -> None:
    """Before Python 3.13 a caught `TaskGroup` failure leaves a count of cancellations behind."""
    ws = endpoint()
    gate, saved = asyncio.Event(), list[str]()
    codes = recording(ws)

    @ws.on("group")
    async def group(conn: Connection) -> str:
        async def child() -> None:
            await asyncio.sleep(0)
            raise ValueError

        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(child())
        except* ValueError:
            pass
        return "caught"

    @ws.on("own")
    async def own(conn: Connection) -> str:
        with contextlib.suppress(asyncio.CancelledError):  # the same, on every Python
            asyncio.current_task().cancel()  # type: ignore[union-attr]
            await asyncio.sleep(0)
        return "caught"

    @ws.on("stray")
    async def stray(conn: Connection) -> None:
        raise asyncio.CancelledError

    @ws.on("order", concurrent=True)
    async def order(conn: Connection) -> None:
        await gate.wait()
        saved.append("order")

    async with Session(ws) as client:
        for type in ("group", "own"):
            assert (await client.ask(type))["payload"] == "caught"
        assert (await client.ask("stray"))["payload"]["code"] == "internal_error"
        (conn,) = ws._hub.connections
        await client.send("order")
        await until(lambda: session_of(conn).tasks)
        await client.close()
        await until(lambda: conn.closed)
        gate.set()
        await clean(ws, codes)
    assert saved == ["order"] and codes == [1000]


async def test_a_stray_cancelled_error_in_an_error_handler_is_a_bug_too() -> None:
    """It is answered with `internal_error`, and the connection goes on."""
    ws = endpoint()

    @ws.error(KeyError)
    async def failed(conn: Connection, exc: KeyError) -> None:
        raise asyncio.CancelledError

    @ws.on("fail")
    async def fail(conn: Connection) -> None:
        raise KeyError

    async with Session(ws) as client:
        for _ in range(2):
            assert (await client.ask("fail"))["payload"]["code"] == "internal_error"


async def test_an_error_handler_may_have_nothing_to_answer() -> None:
    """Its None is the empty reply to an id, and silence without one."""
    ws = endpoint()

    @ws.error(KeyError)
    async def failed(conn: Connection, exc: KeyError) -> None: ...

    @ws.on("fail")
    async def fail(conn: Connection) -> None:
        raise KeyError

    async with Session(ws) as client:
        await client.send("fail")
        assert await client.ask("fail", id=2) == {"type": "fail.reply", "id": 2}


async def test_an_error_handler_is_cancelled_with_its_connection() -> None:
    """One that waits for ever ends with the linger, like the handler it speaks for."""
    ws = endpoint(linger=0.05)
    codes, entered = recording(ws), asyncio.Event()

    @ws.error(KeyError)
    async def failed(conn: Connection, exc: KeyError) -> None:
        entered.set()
        await asyncio.Event().wait()

    @ws.on("fail")
    async def fail(conn: Connection) -> None:
        raise KeyError

    async with Session(ws) as client:
        await client.send("fail")
        await asyncio.wait_for(entered.wait(), PATIENCE)
        await client.close()
        await clean(ws, codes)


async def test_close_in_a_handler_closes_with_code_and_reason() -> None:
    """``raise Close`` ends the connection behind what was sent before."""
    ws = endpoint()

    @ws.on("quit")
    async def leave(conn: Connection) -> None:
        await conn.send("bye", {})
        raise Close(4001, "as you wish")

    async with Session(ws) as client:
        assert await client.ask("quit") == {"type": "bye", "payload": {}}
        assert await client.closed() == (4001, "as you wish")


async def test_error_handlers_choose_the_outcome() -> None:
    """`@ws.error` may answer with an error, a close, a value; the nearest class wins."""
    ws = endpoint()

    @ws.error(LookupError)
    async def lookup(conn: Connection, exc: LookupError) -> MessageError:
        return MessageError("not_found", str(exc))

    @ws.error(IndexError)
    async def index(conn: Connection, exc: IndexError) -> str:
        return "a default"

    @ws.error(Exception)
    async def other(conn: Connection, exc: Exception) -> Close:
        return Close(4000, type(exc).__name__)

    @ws.error(ZeroDivisionError)
    async def zero(conn: Connection, exc: Exception) -> None:
        raise ValueError("a bug in here")

    raised: dict[str, Exception] = {
        "key": KeyError("k"),
        "index": IndexError(),
        "own": MessageError("own"),
        "zero": ZeroDivisionError(),
        "any": OSError(),
    }

    @ws.on("fail")
    async def fail(conn: Connection, name: str) -> None:
        raise raised[name]

    async with Session(ws) as client:
        assert (await client.ask("fail", "key"))["payload"]["code"] == "not_found"
        assert (await client.ask("fail", "index")) == {
            "type": "fail.reply",
            "id": 1,
            "payload": "a default",
        }
        assert (await client.ask("fail", "own"))["payload"]["code"] == "own"
        assert (await client.ask("fail", "zero"))["payload"]["code"] == "internal_error"
        await client.send("fail", "any")
        assert await client.closed() == (4000, "OSError")


async def test_a_gone_stranger_is_an_error_like_any_other() -> None:
    """`WebSocketDisconnected` about another connection is answered, not swallowed."""
    ws = endpoint()
    others: list[Connection] = []

    @ws.connect
    async def arrive(conn: Connection) -> None:
        others.append(conn)

    @ws.on("poke")
    async def poke(conn: Connection) -> None:
        await others[0].send("poked", {})

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        await client.close()
        await until(lambda: others[0].closed)
        async with connect(server.url + "/ws") as second:
            assert (await second.ask("poke"))["payload"]["code"] == "internal_error"


# Fallback and binary


async def test_the_fallback_takes_what_no_handler_does() -> None:
    """Unknown types and frames that are no envelope go to the fallback as they came."""
    ws = endpoint()
    seen: list[str] = []

    @ws.fallback
    async def other(conn: Connection, frame: str) -> Said | None:
        seen.append(frame)
        return Said(frame) if frame.startswith("?") else None

    frames = ["", "x", "[1]", '{"type":"nobody","id":1}', "?"]
    async with Session(ws) as client:
        for frame in frames:
            await client.raw(frame)
        assert await client.receive() == {"type": "said", "payload": {"text": "?"}}
    assert seen == frames


async def test_binary_frames_go_to_their_handler() -> None:
    """Binary frames arrive as they came, and a ``@message`` may answer them."""
    ws = endpoint()

    @ws.binary
    async def upload(conn: Connection, data: bytes) -> Said | str:
        return Said(data.hex()) if data else "not a message"

    async with Session(ws) as client:
        await client.raw(b"\x00\xff")
        assert await client.receive() == {"type": "said", "payload": {"text": "00ff"}}
        await client.raw(b"")
        assert (await client.receive())["payload"]["code"] == "internal_error"


@pytest.mark.parametrize("frame", ["no json", b"bytes"])
async def test_a_bug_in_the_fallback_is_logged_as_its_own(
    frame: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What was wrong with the frame is no part of the traceback."""
    ws = endpoint()

    @ws.fallback
    @ws.binary
    async def other(conn: Connection, frame: Any) -> None:
        raise KeyError("a bug")

    async with Session(ws) as client:
        await client.raw(frame)
        assert (await client.receive())["payload"]["code"] == "internal_error"
    assert "the fallback or the binary handler failed" in caplog.text
    assert "KeyError: 'a bug'" in caplog.text and "BadFrame" not in caplog.text


async def test_a_client_that_has_gone_ends_a_handler_that_uses_falcons_socket(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """That is quiet, though the server tells Falcon's send before anybody reads the disconnect."""
    ws = endpoint()
    codes = recording(ws)
    sent: list[str] = []

    @ws.fallback
    async def echo(conn: Connection, frame: str) -> None:
        try:
            await conn.ws.send_text(frame)
        except falcon.WebSocketDisconnected:
            sent.append(frame)
            raise

    mask = bytes(4)
    text, close = b"\x81\x81" + mask + b"x", b"\x88\x82" + mask + (1000).to_bytes(2, "big")
    async with serving(ws._app) as server:
        async with Stalled(server.url + "/ws") as client:
            await asyncio.get_running_loop().sock_sendall(client.socket, text + close)
            await client.read_all()
        await clean(ws, codes)
    assert sent == ["x"] and codes == [1000]
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


async def test_errors_of_the_fallback_are_answered_without_an_id() -> None:
    """The fallback's errors have the same outcomes as a handler's."""
    ws = endpoint()

    @ws.fallback
    async def other(conn: Connection, frame: str) -> None:
        raise MessageError("odd", frame) if frame != "value" else KeyError()

    @ws.error(KeyError)
    async def value(conn: Connection, exc: KeyError) -> str:
        return "nothing to answer it to"

    async with Session(ws) as client:
        await client.raw("value")
        assert await client.error("x") == ("odd", None)


async def test_binary_frames_without_a_handler_close_with_1003() -> None:
    """A frame kind that nobody handles ends the connection."""
    async with Session(endpoint()) as client:
        await client.raw(b"x")
        assert (await client.closed())[0] == 1003


async def test_a_frame_may_have_max_size_bytes_and_not_one_more() -> None:
    """`max_size` counts UTF-8 bytes; above it the connection closes with 1009."""
    ws = endpoint()

    @ws.on("len")
    async def length(conn: Connection, text: str) -> int:
        return len(text)

    for character in ("x", "é"):
        async with Session(ws) as client:
            room = 1_048_576 - len('{"type":"len","payload":""}')
            text = character * (room // len(character.encode()))
            text += "." * (room - len(text.encode()))
            frame = '{"type":"len","payload":"' + text + '"}'
            assert len(frame.encode()) == 1_048_576
            await client.raw(frame)
            assert (await client.receive())["payload"] == len(text)
            await client.raw(frame[:-2] + '."}')
            assert (await client.closed())[0] == 1009


async def test_a_rate_refuses_and_then_closes() -> None:
    """Messages over `rate` are answered `rate_limited`; who keeps on is closed with 1008."""
    ws = endpoint(rate=(2, 60.0))

    @ws.on("one")
    async def one(conn: Connection) -> int:
        return 1

    @ws.binary
    async def binary(conn: Connection, data: bytes) -> None: ...

    async with Session(ws) as client:
        assert (await client.ask("one"))["payload"] == 1
        await client.raw(b"counts as well")
        answer = await client.ask("one", id=5)
        assert answer["id"] == 5 and answer["payload"]["code"] == "rate_limited"
        assert 0 < answer["payload"]["retry_after"] <= 60
        assert await client.error("no json") == ("rate_limited", None)
        assert await client.error('{"type":"two","id":6}') == ("rate_limited", 6)
        assert await client.error('{"type":"one","id":7,"payload":{}}') == ("rate_limited", 7)
        await client.raw(b"one too many")
        assert (await client.receive())["payload"]["code"] == "rate_limited"
        assert await client.error('{"type":"complete","id":8}') == ("rate_limited", None)
        for _ in range(15):
            await client.send("complete")
        await client.raw(b"x")
        assert (await client.closed())[0] == 1008


async def test_stopping_a_stream_is_never_too_much() -> None:
    """At the end of its rate a client may still send the `complete` for what goes on."""
    ws = endpoint(rate=(1, 60.0))

    @ws.on("ticks")
    async def ticks(conn: Connection) -> AsyncIterator[int]:
        while True:
            yield 1

    async with Session(ws) as client:
        assert (await client.ask("ticks"))["more"]
        await client.send("complete", id=2)
        await client.send("complete", id=1)
        others = []
        while len(others) < 2:
            others += [m] if not (m := await client.receive()).get("more") else []
        assert "id" not in others[0] and others[0]["payload"]["code"] == "rate_limited"
        assert others[1] == {"type": "complete", "id": 1}


# Middleware


async def test_middleware_wraps_handlers_from_the_outside_in() -> None:
    """The first registered is the outermost; each sees the envelope and may change the answer."""
    ws = endpoint()
    seen: list[Any] = []

    @ws.middleware
    async def outer(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        seen.append(("outer", envelope))
        return [await call_next()]

    @ws.middleware
    async def inner(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        seen.append("inner")
        if envelope.type == "refused":
            raise MessageError("refused")
        return {"inner": await call_next()}

    @ws.on("sum")
    async def add(conn: Connection, *, a: int, b: int = 1) -> int:
        return a + b

    @ws.on("said")
    async def said(conn: Connection, text: str) -> str:
        return text

    @ws.on("refused")
    async def refused(conn: Connection) -> None:
        seen.append("never")

    async with Session(ws) as client:
        assert (await client.ask("sum", {"a": 1}))["payload"] == [{"inner": 2}]
        assert seen == [("outer", Envelope("sum", {"a": 1, "b": 1}, 1)), "inner"]
        assert (await client.ask("said", "x"))["payload"] == [{"inner": "x"}]
        assert (await client.ask("refused"))["payload"]["code"] == "refused"
        assert (await client.ask("sum", {"a": ""}))["payload"]["code"] == "invalid_payload"
    assert "never" not in seen and len(seen) == 6


async def test_middleware_sees_no_items_of_a_stream() -> None:
    """Around a stream, `call_next` sends the items; what the middleware then returns is ignored."""
    ws = endpoint()

    @ws.middleware
    async def around(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        assert await call_next() is None
        return "ignored"

    @ws.on("count")
    async def count(conn: Connection, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    async with Session(ws) as client:
        await client.send("count", 2, id=1)
        assert [(await client.receive()).get("payload") for _ in range(3)] == [0, 1, None]


async def test_middleware_may_answer_instead_of_a_stream() -> None:
    """A value in place of the generator is the one, final answer."""
    ws = endpoint()

    @ws.middleware
    async def cached(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        return "cached"

    @ws.on("count")
    async def count(conn: Connection) -> AsyncIterator[int]:
        yield 1

    async with Session(ws) as client:
        for _ in range(2):
            assert await client.ask("count", id=4) == {
                "type": "count.reply",
                "id": 4,
                "payload": "cached",
            }


# Order and concurrency


async def test_messages_are_handled_one_at_a_time_in_order() -> None:
    """A handler that waits delays those behind it; nothing overtakes."""
    ws = endpoint()

    @ws.on("wait")
    async def wait(conn: Connection, n: int) -> int:
        await turns(3 - n)
        return n

    async with Session(ws) as client:
        for n in range(4):
            await client.send("wait", n, id=n)
        assert [(await client.receive())["id"] for _ in range(4)] == [0, 1, 2, 3]


async def test_concurrent_handlers_run_beside_others() -> None:
    """`concurrent=True` lets later messages overtake, at most `max_concurrent` of them."""
    ws = endpoint(max_concurrent=2)
    gate = asyncio.Event()

    @ws.on("slow", concurrent=True)
    async def slow(conn: Connection) -> str:
        await gate.wait()
        return "slow"

    @ws.on("fast")
    async def fast(conn: Connection) -> str:
        return "fast"

    async with Session(ws) as client:
        await client.send("slow", id=1)
        await client.send("slow", id=2)
        assert (await client.ask("fast", id=3))["payload"] == "fast"
        answer = await client.ask("slow", id=4)
        assert (answer["payload"]["code"], answer["id"]) == ("too_busy", 4)
        gate.set()
        assert {(await client.receive())["id"] for _ in range(2)} == {1, 2}
        assert (await client.ask("slow", id=5))["payload"] == "slow"


async def test_replies_and_group_messages_leave_in_the_order_of_the_code() -> None:
    """To one connection messages go out as they were sent, whichever way."""
    ws = endpoint()

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.join("all")
        await conn.send("first", 0)
        await ws._hub.send("all", "second", 0)

    @ws.on("mixed")
    async def mixed(conn: Connection) -> str:
        for i in range(50):
            await ws._hub.send("all", "group", i)
            await conn.send("direct", i)
        await ws._hub.send_to(conn, "last", 0)
        return "reply"

    async with Session(ws) as client:
        assert [(await client.receive())["type"] for _ in range(2)] == ["first", "second"]
        await client.send("mixed", id=1)
        received = [await client.receive() for _ in range(102)]
    assert [m["type"] for m in received] == ["group", "direct"] * 50 + ["last", "mixed.reply"]
    assert [m["payload"] for m in received[:100:2]] == list(range(50))


# The end of a connection


def recording(ws: Pachinko) -> list[int | None]:
    """Register a disconnect handler; return the close codes that it has seen."""
    codes: list[int | None] = []

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.join("room")

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        assert conn.groups == {"room"} and conn.closed
        codes.append(conn.close_code)

    return codes


async def clean(ws: Pachinko, codes: list[int | None], count: int = 1) -> None:
    """Wait until *count* disconnect handlers have run and nothing is left of the connections."""
    await until(lambda: len(codes) >= count and not ws._hub.state.serving)
    assert len(codes) == count
    assert not ws._hub.connections and not ws._hub.groups and not ws._hub.state.registry.connections


@pytest.mark.parametrize("code", [1000, 1001, 4001])
async def test_disconnect_handlers_see_the_clients_code(code: int) -> None:
    """The code that the client closed with is in `close_code`."""
    ws = endpoint()
    codes = recording(ws)
    async with Session(ws) as client:
        await client.close(code)
        await clean(ws, codes)
    assert codes == [code]


@pytest.mark.parametrize("during", ["nothing", "handler", "stream", "concurrent"])
async def test_a_cut_socket_runs_disconnect_handlers_once(during: str) -> None:
    """An abrupt loss is noticed whatever goes on, and streams end at once."""
    ws = endpoint(linger=0.05)
    codes = recording(ws)
    started, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    @ws.on("handler")
    async def handler(conn: Connection) -> None:
        await work()

    @ws.on("concurrent", concurrent=True)
    async def concurrent(conn: Connection) -> None:
        await work()

    @ws.on("stream")
    async def stream(conn: Connection) -> AsyncIterator[None]:
        await work()
        yield

    async with Session(ws) as client:
        if during != "nothing":
            await client.send(during, id=1)
            await asyncio.wait_for(started.wait(), PATIENCE)
        client.cut()
        await clean(ws, codes)
    assert codes[0] in (1005, 1006)
    assert ended.is_set() == (during != "nothing")


async def test_a_handler_may_finish_within_the_linger() -> None:
    """A handler whose client has gone goes on, and disconnect handlers wait for it."""
    ws = endpoint(linger=60.0)
    codes = recording(ws)
    started, gate, events = asyncio.Event(), asyncio.Event(), list[str]()

    @ws.on("order")
    async def order(conn: Connection) -> str:
        started.set()
        await gate.wait()
        events.append(f"saved with {len(codes)} disconnected")
        return "nobody reads this"

    async with Session(ws) as client:
        await client.send("order", id=1)
        await client.send("order", id=2)
        await asyncio.wait_for(started.wait(), PATIENCE)
        await client.close(4000)
        (conn,) = ws._hub.connections
        await until(lambda: conn.closed)
        assert codes == []
        gate.set()
        await clean(ws, codes)
    assert events == ["saved with 0 disconnected"] * 2, "frames read before the end are handled"
    assert codes == [4000]


async def test_a_backlog_is_handled_before_the_disconnect() -> None:
    """Messages that came before the client left are not lost."""
    ws = endpoint()
    codes = recording(ws)
    seen: list[int] = []

    @ws.on("n")
    async def n(conn: Connection, n: int) -> int:
        seen.append(n)
        return n

    async with Session(ws) as client:
        for i in range(6):
            await client.send("n", i, id=i)
        await client.close()
        await clean(ws, codes)
    assert seen == list(range(6))


async def test_frames_behind_a_close_of_ours_are_not_handled() -> None:
    """After `conn.close` nothing more is taken from the client."""
    ws = endpoint()
    codes, seen = recording(ws), list[str]()

    @ws.on("quit")
    async def quit(conn: Connection) -> None:
        await turns()
        await conn.close(4005, "enough")
        await conn.close(4006, "twice is once")
        seen.append("quit")

    async with Session(ws) as client:
        for _ in range(3):
            await client.send("quit")
        assert await client.closed() == (4005, "enough")
        await clean(ws, codes)
    assert (codes, seen) == ([4005], ["quit"])


async def test_conn_close_from_other_code_ends_an_idle_connection() -> None:
    """A close from a worker or another handler wakes the reader."""
    ws = endpoint()
    codes = recording(ws)
    async with Session(ws) as client:
        (conn,) = ws._hub.connections
        await conn.close(4007)
        assert (await client.closed())[0] == 4007
        await clean(ws, codes)
    assert codes == [4007]


async def test_a_handler_goes_on_after_its_own_close() -> None:
    """Closing does not cancel the handler that does it; only its linger ends it."""
    ws = endpoint(linger=0.2)
    codes, seen = recording(ws), list[str]()

    @ws.on("quit")
    async def quit(conn: Connection, hangs: bool) -> None:
        await conn.close()
        try:
            await (asyncio.Event().wait() if hangs else turns())
            seen.append("done")
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    for hangs in (False, True):
        async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
            await client.send("quit", hangs)
            await client.closed()
            await server.spend(0.2)
            await until(lambda: not ws._hub.state.serving)
    assert seen == ["done", "cancelled"] and codes == [1000, 1000]


async def test_close_group_runs_disconnect_handlers_once() -> None:
    """Every member is closed with the code, behind what was sent before."""
    ws = endpoint()
    codes = recording(ws)
    async with (
        simulated(ws._app) as server,
        connect(server.url + "/ws") as one,
        connect(server.url + "/ws") as two,
    ):
        await ws._hub.send("room", "last", 1)
        await ws._hub.close_group("room", 4008, "over")
        for client in (one, two):
            assert (await client.receive())["type"] == "last"
            assert await client.closed() == (4008, "over")
        await clean(ws, codes, 2)
    assert codes == [4008, 4008]


async def test_a_bug_in_a_disconnect_handler_leaves_the_others_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each disconnect handler runs, and the bug is logged."""
    ws = endpoint()

    @ws.disconnect
    async def broken(conn: Connection) -> None:
        raise RuntimeError("a bug")

    @ws.disconnect
    async def cancelled(conn: Connection) -> None:
        raise asyncio.CancelledError

    codes = recording(ws)
    async with Session(ws) as client:
        await client.close()
        await clean(ws, codes)
    assert caplog.text.count("failed") == 2 and "a bug" in caplog.text


async def test_a_cut_during_a_send_ends_the_handler_quietly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`WebSocketDisconnected` about the handler's own client is no error."""
    ws = endpoint()
    codes = recording(ws)
    ended: list[str] = []

    @ws.on("flood")
    async def flood(conn: Connection) -> None:
        try:
            while True:
                await conn.send("data", "x" * 100_000)
        except falcon.WebSocketDisconnected:
            ended.append("disconnected")
            raise

    async with Session(ws) as client:
        await client.send("flood")
        await client.receive()
        client.cut()
        await clean(ws, codes)
    assert ended == ["disconnected"]
    assert not [r for r in caplog.records if r.name == "pachinko" and r.levelno >= logging.ERROR]


async def test_sigterm_runs_disconnect_handlers_with_open_connections() -> None:
    """At shutdown an idle connection, a handler and a stream all end, and nothing hangs."""
    ws = endpoint(linger=0.1)
    codes = recording(ws)
    started: list[str] = []

    @ws.on("handler")
    async def handler(conn: Connection) -> None:
        started.append("handler")
        await asyncio.Event().wait()

    @ws.on("stream")
    async def stream(conn: Connection) -> AsyncIterator[None]:
        started.append("stream")
        await asyncio.Event().wait()
        yield

    async with (
        simulated(ws._app) as server,
        connect(server.url + "/ws"),
        connect(server.url + "/ws") as busy,
        connect(server.url + "/ws") as streaming,
    ):
        await busy.send("handler", id=1)
        await streaming.send("stream", id=1)
        await until(lambda: len(started) == 2)
        await server.stop()
        await clean(ws, codes, 3)
    assert codes == [1012] * 3


async def test_python_closes_a_disconnect_handler_without_the_others() -> None:
    """A `GeneratorExit` is nobody's bug; nothing of the connection stays all the same."""
    ws = endpoint()
    codes = recording(ws)

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        raise GeneratorExit

    @ws.disconnect
    async def never(conn: Connection) -> None:
        codes.append(None)

    async with simulated(ws._app) as server:
        async with connect(server.url + "/ws"):
            pass
        await clean(ws, codes)


async def test_a_cancellation_during_disconnect_spares_the_other_handlers() -> None:
    """When the server cancels while disconnect handlers run, the rest of them still do."""
    ws = endpoint()
    entered = asyncio.Event()

    @ws.disconnect
    async def slow(conn: Connection) -> None:
        entered.set()
        await asyncio.Event().wait()

    codes = recording(ws)
    async with Session(ws) as client:
        (task,) = ws._hub.state.serving
        await client.close()
        await asyncio.wait_for(entered.wait(), PATIENCE)
        task.cancel()
        await clean(ws, codes)
    assert codes == [1000]


async def test_a_handler_that_ignores_its_cancellation_holds_up_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A concurrent handler that swallows cancellations is logged and left behind."""
    ws = endpoint(linger=0.05)
    codes = recording(ws)
    started, gate = asyncio.Event(), asyncio.Event()

    @ws.on("stubborn", concurrent=True)
    async def stubborn(conn: Connection) -> None:
        started.set()
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                asyncio.current_task().uncancel()  # type: ignore[union-attr]

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        await client.send("stubborn")
        await asyncio.wait_for(started.wait(), PATIENCE)
        await client.close()
        for _ in range(2):  # its linger, and the time to clean up
            await server.spend(1.0)
        await clean(ws, codes)
        gate.set()
    assert "ignores its cancellation" in caplog.text


# Properties

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
envelopes = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["sum", "said", "any", "complete", "error"]) | json_values,
        "id": st.integers(0, 3) | json_values,
        "payload": st.fixed_dictionaries({"a": json_values}) | json_values,
        "extra": json_values,
    },
)


class Talk:
    """An endpoint of every kind of handler, and a client, for examples that share one server."""

    def __init__(self) -> None:
        ws = endpoint()

        @ws.on("sum")
        async def add(conn: Connection, *, a: int, b: int = 0) -> int:
            assert type(a) is int and type(b) is int
            return a + b

        @ws.on("said")
        async def said(conn: Connection, text: str) -> None:
            assert type(text) is str

        @ws.on("any")
        async def any_(conn: Connection, value: Any) -> Any:
            return value

        self.session = Session(ws)

    async def outcomes(self, client: Client, frame: str) -> list[dict[str, Any]]:
        """What is answered to *frame*, up to the answer of a frame sent behind it."""
        await client.raw(frame)
        answers = [await client.ask("any", 0, id="the end")]
        while answers[-1].get("id") != "the end":
            answers.append(await client.receive())
        return answers[:-1]


def test_any_json_value_gets_one_defined_outcome() -> None:
    """Whatever a frame holds, it has at most one final answer and the connection lives."""
    talk = Talk()
    with asyncio.Runner() as runner:
        client = runner.run(talk.session.__aenter__())

        @settings(max_examples=200, deadline=None)
        @given(frame=json_values | envelopes)
        def check(frame: Any) -> None:
            text = json.dumps(frame)
            answers = runner.run(talk.outcomes(client, text))
            for answer in answers:
                assert (
                    answer["payload"]["code"] != "internal_error"
                    if (answer["type"] == "error")
                    else answer["type"] == "complete" or answer["type"].endswith(".reply")
                )
            final = [answer for answer in answers if "more" not in answer]
            assert len(final) <= 1, (frame, answers)
            if isinstance(frame, dict) and frame.get("type") in ("sum", "said", "any"):
                assert len(final) == (frame.get("id") is not None or bool(final)), (frame, answers)

        check()
        runner.run(talk.session.__aexit__(None, None, None))


# A handler's time, and what it must not do to the server


async def test_a_handler_has_its_time() -> None:
    """One that takes longer is cancelled and answered `handler_timeout`; a stream may go on."""
    ws, ended = endpoint(handler_timeout=0.05), list[str]()
    goes_on = asyncio.Event()

    async def hang(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    @ws.on("plain")
    async def plain(conn: Connection) -> None:
        await hang("plain")

    @ws.on("beside", concurrent=True)
    async def beside(conn: Connection) -> None:
        await hang("beside")

    @ws.fallback
    async def fallback(conn: Connection, frame: str) -> None:
        await hang("fallback")

    @ws.binary
    async def binary(conn: Connection, data: bytes) -> None:
        await hang("binary")

    @ws.on("quick")
    async def quick(conn: Connection) -> int:
        return 1

    @ws.on("stream")
    async def stream(conn: Connection) -> AsyncIterator[int]:
        await goes_on.wait()
        yield 1

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        for n, frame in enumerate(
            ('{"type":"plain","id":0}', '{"type":"beside","id":1}', "?", b"?")
        ):
            await client.raw(frame)
            await server.spend(0.05)
            answer = await client.receive()
            assert answer["payload"] == {
                "code": "handler_timeout",
                "message": "not done within 0.05 s",
            }
            assert answer.get("id") == (n if n < 2 else None)
        assert ended == ["plain", "beside", "fallback", "binary"]
        assert (await client.ask("quick"))["payload"] == 1
        await client.send("stream", id=5)
        await server.spend(0.1)
        goes_on.set()
        assert (await client.receive())["payload"] == 1


async def test_a_timeout_of_the_handlers_own_is_a_bug_like_any_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is not mistaken for the handler's time."""
    ws = endpoint(handler_timeout=30.0)

    @ws.on("own")
    async def own(conn: Connection) -> None:
        async with asyncio.timeout(0):
            await asyncio.Event().wait()

    async with Session(ws) as client:
        assert (await client.ask("own"))["payload"]["code"] == "internal_error"
    assert "TimeoutError" in caplog.text


async def test_a_handler_may_ignore_its_cancellation_and_answer() -> None:
    """What it returns then is its answer."""
    ws = endpoint(handler_timeout=0.02)

    @ws.on("stubborn")
    async def stubborn(conn: Connection) -> int:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return 5
        return 6

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        for _ in range(2):
            await client.send("stubborn", id=1)
            await server.spend(0.02)
            assert (await client.receive())["payload"] == 5


async def test_a_caught_failure_of_a_task_group_does_not_hide_the_timeout() -> None:
    """On Python 3.11 and 3.12 it leaves the task's cancellation count at one."""
    ws = endpoint(handler_timeout=0.05)

    async def fail() -> None:
        raise ValueError

    @ws.on("group")
    async def group(conn: Connection) -> None:
        with contextlib.suppress(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                group.create_task(fail())
        await asyncio.Event().wait()

    @ws.on("two")
    async def two(conn: Connection) -> int:
        return 2

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        for id in (1, 2):
            await client.send("group", id=id)
            await server.spend(0.05)
            assert (await client.receive())["payload"]["code"] == "handler_timeout"
            assert (await client.ask("two", id=3))["payload"] == 2


@pytest.mark.parametrize("limits", [{"linger": 0.02}, {"handler_timeout": 0.02, "linger": 60.0}])
async def test_a_handler_that_swallows_its_cancellation_is_cancelled_again(
    limits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a `TaskGroup` of Python 3.11 does while it ends; else it would be served for ever."""
    monkeypatch.setattr(pachinko, "_CANCEL_AGAIN", 0.02)
    ws = endpoint(**limits)
    codes = recording(ws)
    swallowed: list[str] = []

    @ws.on("hang")
    async def hang(conn: Connection) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            swallowed.append("once")
        await asyncio.Event().wait()

    async with simulated(ws._app) as server:
        async with connect(server.url + "/ws") as client:
            await client.send("hang", id=1)
            if "handler_timeout" in limits:
                await server.spend(0.02)
                await server.spend(0.02)
                assert (await client.receive())["payload"]["code"] == "handler_timeout"
            else:
                await until(lambda: session_of(next(iter(ws._hub.connections))).is_handling)
        await clean(ws, codes)
    assert swallowed == ["once"]


async def test_the_linger_ends_a_handler_that_has_caught_a_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The cancellation that Python 3.11 and 3.12 leave counted is nobody's error."""
    ws = endpoint(linger=0.02)
    codes = recording(ws)

    async def fail() -> None:
        raise ValueError

    @ws.on("group")
    async def group(conn: Connection) -> None:
        with contextlib.suppress(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                group.create_task(fail())
        await conn.send("waits")
        await asyncio.Event().wait()

    async with simulated(ws._app) as server:
        async with connect(server.url + "/ws") as client:
            await client.send("group", id=1)
            assert (await client.receive())["type"] == "waits"
            client.cut()
        await clean(ws, codes)
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


@pytest.mark.parametrize("where", ["plain", "beside", "stream", "fallback", "binary", "translated"])
async def test_sys_exit_in_a_handler_is_a_bug(where: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged and answered, and ends nothing else; asyncio would end the whole server."""
    ws = endpoint()
    codes = recording(ws)

    @ws.on("plain")
    async def plain(conn: Connection) -> None:
        raise SystemExit(3)

    @ws.on("beside", concurrent=True)
    async def beside(conn: Connection) -> None:
        raise SystemExit(3)

    @ws.on("stream")
    async def stream(conn: Connection) -> AsyncIterator[int]:
        if where:
            raise SystemExit(3)
        yield 1

    @ws.fallback
    async def fallback(conn: Connection, frame: str) -> None:
        raise SystemExit(3)

    @ws.binary
    async def binary(conn: Connection, data: bytes) -> None:
        raise SystemExit(3)

    @ws.on("translated")
    async def failing(conn: Connection) -> None:
        raise KeyError

    @ws.error(KeyError)
    async def error(conn: Connection, exc: KeyError) -> None:
        raise SystemExit(3)

    @ws.on("alive")
    async def alive(conn: Connection) -> bool:
        return True

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        raise SystemExit(3)

    async with Session(ws) as client:
        raw = {"fallback": "?", "binary": b"?"}.get(where, f'{{"type":"{where}","id":1}}')
        await client.raw(raw)
        assert (await client.receive())["payload"]["code"] == "internal_error"
        assert (await client.ask("alive"))["payload"] is True
        await client.close()
        await clean(ws, codes)
    assert caplog.text.count("SystemExit: 3") == 2


@pytest.mark.parametrize("options", [{}, {"rate": (100, 1.0)}])
async def test_a_frame_that_comes_in_the_turn_of_our_close_is_not_handled(options: Any) -> None:
    """As those behind it are not; its handler would have no time to linger."""
    ws = endpoint(**options)
    codes, handled = recording(ws), list[str]()

    @ws.on("late")
    async def late(conn: Connection) -> None:
        handled.append("late")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def receive_and_close() -> Any:
            event = await receive()
            for conn in ws._hub.connections if event.get("text") else ():
                await conn.close(4000)
            return event

        in_turn = receive_and_close if scope["type"] == "websocket" else receive
        await ws._app(scope, in_turn, send)  # type: ignore[misc]

    async with simulated(app) as server:
        async with connect(server.url + "/ws") as client:
            await client.send("late", id=1)
            assert (await client.closed())[0] == 4000
        await clean(ws, codes)
    assert handled == []


@attrs.frozen
class FrozenError(Exception):
    text: str = "no"


@pytest.mark.parametrize("error", [SystemExit(2), FrozenError(), KeyError("x")])
async def test_a_validator_may_raise_anything(error: BaseException) -> None:
    """The payload is refused, and the connection goes on."""

    def check(*_: Any) -> None:
        raise error

    @message("checked")
    class Checked:
        a: int = attrs.field(validator=check)

    ws = endpoint()

    @ws.on(Checked)
    async def checked(conn: Connection, msg: Checked) -> None: ...

    async with Session(ws) as client:
        for _ in range(2):
            answer = await client.ask("checked", {"a": 1})
            assert answer["payload"]["code"] == "invalid_payload"


# Nothing waits for the garbage collector


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("how", ["stream", "concurrent", "plain"])
@pytest.mark.usefixtures("no_collection")
async def test_a_connection_is_freed_at_its_end(how: str) -> None:
    """What its handlers were cancelled with does not hold it in a cycle."""
    ws = endpoint(linger=0)
    codes, seen = recording(ws), weakref.WeakSet[Connection]()

    @ws.on("stream")
    async def stream(conn: Connection) -> AsyncIterator[int]:
        seen.add(conn)
        yield 1
        await asyncio.Event().wait()

    @ws.on("concurrent", concurrent=True)
    async def concurrent(conn: Connection) -> None:
        seen.add(conn)
        await conn.send("waits")
        await asyncio.Event().wait()

    @ws.on("plain")
    async def plain(conn: Connection) -> None:
        seen.add(conn)
        await conn.send("waits")
        await asyncio.Event().wait()

    async with serving(ws._app) as server:
        async with connect(server.url + "/ws") as client:
            await client.ask(how)
            assert len(seen) == 1
        await clean(ws, codes)
        await until(lambda: not seen)


@pytest.mark.usefixtures("no_collection")
async def test_a_refusal_is_freed_at_once() -> None:
    """Neither an error nor what caused it holds itself in a cycle."""
    ws = endpoint()

    @ws.on("typed")
    async def typed(conn: Connection, *, a: int, b: list[int]) -> None: ...

    def errors() -> int:
        kinds = (MessageError, cattrs.BaseValidationError)
        return sum(isinstance(each, kinds) for each in gc.get_objects())

    async with Session(ws) as client:
        before = errors()
        frames = ("{", "[]", '{"type":5}', '{"type":"x"}', '{"type":"typed","payload":{"a":"1"}}')
        for frame in frames:
            await client.raw(frame)
            assert (await client.receive())["type"] == "error"
        assert errors() == before


# What is refused is seen


REFUSED = [
    ("{", "invalid_json", None), ("[]", "invalid_envelope", None),
    ('{"type":"s3cret","id":1}', "unknown_type", "s3cret"),
    ('{"type":"' + "x" * 200 + '"}', "unknown_type", "x" * 80),
    ('{"type":"sum","payload":{"a":"s3cret"}}', "invalid_payload", "sum"),
    ('{"type":"no","id":1}', "no_way", "no"), ('{"type":"http","id":1}', "http_404", "http"),
    ('{"type":"count"}', "id_required", "count"), ('{"type":"busy"}', "too_busy", "busy"),
    ('{"type":"authenticate","payload":{"token":5}}', "invalid_payload", "authenticate"),
]  # fmt: skip


def refusing() -> Pachinko:
    """An endpoint that refuses in many ways."""
    ws = endpoint(linger=0.0, max_concurrent=1)

    @ws.on("sum")
    async def add(conn: Connection, *, a: int) -> int:
        return a

    @ws.on("no")
    async def no(conn: Connection) -> None:
        raise MessageError("no_way", "s3cret", why="s3cret")

    @ws.on("http")
    async def http(conn: Connection) -> None:
        raise falcon.HTTPNotFound(title="s3cret")

    @ws.on("count")
    async def count(conn: Connection) -> AsyncIterator[int]:
        yield 1

    @ws.on("wait", concurrent=True)
    async def wait(conn: Connection) -> None:
        await asyncio.Event().wait()

    @ws.on("busy", concurrent=True)
    async def busy(conn: Connection) -> None: ...

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str:
        return "ada"

    return ws


async def test_a_refused_message_is_logged_for_who_looks(caplog: pytest.LogCaptureFixture) -> None:
    """At DEBUG, with connection, type and code; nothing of the payload, and no token."""
    caplog.set_level(logging.DEBUG, "pachinko")
    ws = refusing()
    async with Session(ws) as client:
        await client.send("wait")
        (conn,) = ws._hub.connections
        for frame, code, type in REFUSED:
            caplog.clear()
            assert (await client.error(frame))[0] == code
            (record,) = [r for r in caplog.records if hasattr(r, "code")]
            found = {key: vars(record)[key] for key in ("connection_id", "message_type", "code")}
            assert found == {"connection_id": conn.id, "message_type": type, "code": code}
            assert record.levelno == logging.DEBUG
            assert record.getMessage() == f"answered {type!r} with the error {code!r}"
            assert type == "s3cret" or "s3cret" not in caplog.text


async def test_a_rate_that_refuses_is_logged_for_who_looks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A message that is one too many is seen as well."""
    caplog.set_level(logging.DEBUG, "pachinko")
    ws = endpoint(rate=(1, 60.0))
    async with Session(ws) as client:
        assert (await client.ask("x", id=1))["payload"]["code"] == "unknown_type"
        assert (await client.ask("x", id=2))["payload"]["code"] == "rate_limited"
    codes = [vars(record)["code"] for record in caplog.records if hasattr(record, "code")]
    assert codes == ["unknown_type", "rate_limited"]


async def test_a_refused_message_is_not_logged_by_default(caplog: pytest.LogCaptureFixture) -> None:
    """A client's mistakes fill no log."""
    caplog.set_level(logging.INFO, "pachinko")
    async with Session(refusing()) as client:
        await client.send("wait")
        for frame, code, _ in REFUSED:
            assert (await client.error(frame))[0] == code
    assert not [record for record in caplog.records if record.name == "pachinko"]


# Ids of frames that are no JSON


async def test_a_request_that_is_no_json_is_answered_under_its_id() -> None:
    """Half an emoji, as `JSON.stringify` writes it, lets no promise wait for ever."""
    ws = endpoint()

    @ws.on("say")
    async def say(conn: Connection, *, text: str) -> str:
        return text

    wrong = [
        r'"\ud83d"',
        '"' + "x" * 20_000 + r'\ud83d"',
        "1e400",
        "[" * 5_000 + "]" * 5_000,
        "NaN",
    ]
    async with Session(ws) as client:
        for id, text in enumerate(wrong):
            frame = f'{{"type":"say","id":{id},"payload":{{"text":{text}}}}}'
            assert await client.error(frame) == ("invalid_json", id)
        assert (await client.ask("say", {"text": "ok"}, id=9))["payload"] == "ok"
