"""The server asks a client, and waits for its answer."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import enum
import logging
import math
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, Literal, NewType, TypedDict

import attrs
import cattrs
import falcon
import msgspec
import pytest
from support import (
    PATIENCE,
    Client,
    Simulated,
    Stalled,
    connect,
    new_app,
    serving,
    simulated,
    until,
)
from test_session import no_collection

from pachinko import (
    AnswerError,
    Connection,
    Hub,
    MessageError,
    NoAnswer,
    Pachinko,
    PachinkoError,
    message,
)

__all__ = ["no_collection"]  # a fixture, here too

ERRORS = (AnswerError, NoAnswer, PachinkoError, MessageError, TypeError, ValueError)
Ask = Callable[[Connection], Awaitable[Any]]


@message("unlock")
class Unlock:
    door: int
    codes: list[str] = attrs.field(factory=list[str])


class Types(str, enum.Enum):  # noqa: UP042 - its members are formatted as their names
    UNLOCK = "unlock"


@message("unlocked")
class Unlocked:
    at: datetime.datetime
    by: str | None = None


class Desk:
    """An endpoint whose handlers do what a test says, and an HTTP resource beside it."""

    def __init__(self, **options: Any) -> None:
        self.hub = Hub()
        self.app = new_app()
        self.ws = Pachinko(self.app, "/ws", hub=self.hub, **options)
        self.do: Ask = lambda conn: conn.ask("unlock")
        self.outcomes: asyncio.Queue[Any] = asyncio.Queue()
        self.conns: list[Connection] = []
        self.server: Simulated  # that of `client` without a URL

        @self.ws.connect
        async def arrive(conn: Connection) -> None:
            self.conns.append(conn)

        @self.ws.on("go")
        async def go(conn: Connection) -> None:
            await self.note(conn)

        @self.ws.on("beside", concurrent=True)
        async def beside(conn: Connection) -> None:
            await self.note(conn)

        @self.ws.on("raw")
        async def raw(conn: Connection) -> Any:
            return await self.do(conn)

    async def note(self, conn: Connection) -> None:
        """Do it, and note what it returns or raises."""
        try:
            outcome = await self.do(conn)
        except ERRORS as exc:
            outcome = exc
        except BaseException as exc:  # it is noted, and raised again
            self.outcomes.put_nowait(exc)
            raise
        self.outcomes.put_nowait(outcome)

    async def outcome(self) -> Any:
        return await asyncio.wait_for(self.outcomes.get(), PATIENCE)

    @property
    def late(self) -> int:
        return self.hub.stats()["late"]

    @property
    def waiting(self) -> int:
        """How many questions are open, to all clients."""
        return sum(len(each._open) for each in self.hub.state.questions.values())

    @contextlib.asynccontextmanager
    async def client(self, url: str = "") -> AsyncIterator[Client]:
        if url:
            async with connect(url + "/ws") as client:
                yield client
            return
        async with simulated(self.app) as self.server, connect(self.server.url + "/ws") as client:
            yield client


def asks(*args: Any, **options: Any) -> Ask:
    return lambda conn: conn.ask(*args, **options)


async def answer(client: Client, payload: Any = None, type: str = "unlock.reply") -> Any:
    """Answer the next message, which is a question; return its id."""
    question = await client.receive()
    await client.send(type, payload, question["id"])
    return question["id"]


async def asked(desk: Desk, client: Client, payload: Any = None, **options: Any) -> Any:
    """What a handler gets for the answer *payload*."""
    desk.do = asks("unlock", **options)
    await client.send("go")
    await answer(client, payload)
    return await desk.outcome()


# The question and its answer


async def test_a_client_is_asked_and_answers() -> None:
    """Under ids of the server's own, which count up for each connection."""
    desk = Desk()
    desk.do = asks("unlock", {"door": 4})
    async with desk.client() as client:
        for n in (1, 2, 3):
            await client.send("go")
            question = {"type": "unlock", "id": f"${n}", "payload": {"door": 4}}
            assert await client.receive() == question
            await client.send("unlock.reply", {"ok": n}, f"${n}")
            assert await desk.outcome() == {"ok": n}
        assert desk.late == 0 and desk.waiting == 0


async def test_each_connection_counts_for_itself() -> None:
    """And no answer goes to the question of another one."""
    desk = Desk()
    async with (
        simulated(desk.app) as server,
        desk.client(server.url) as a,
        desk.client(server.url) as b,
    ):
        await a.send("go")
        assert (await a.receive())["id"] == "$1"
        await b.send("go")
        assert (await b.receive())["id"] == "$1"
        await b.send("unlock.reply", "of b", "$1")
        assert await desk.outcome() == "of b"
        await a.send("unlock.reply", "of a", "$1")
        assert await desk.outcome() == "of a"


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (("unlock",), {"type": "unlock"}),
        (("unlock", {"door": 1}), {"type": "unlock", "payload": {"door": 1}}),
        (("unlock", []), {"type": "unlock", "payload": []}),
        (('a "quoted" type', 0), {"type": 'a "quoted" type', "payload": 0}),
        (("ä☃", "é\n"), {"type": "ä☃", "payload": "é\n"}),
        (("half \ud83d", 5), {"type": "half \ufffd", "payload": 5}),
        ((Types.UNLOCK, Types.UNLOCK), {"type": "unlock", "payload": "unlock"}),
        ((Unlock(4),), {"type": "unlock", "payload": {"door": 4, "codes": []}}),
        (("open", Unlock(4, ["x"])), {"type": "open", "payload": {"door": 4, "codes": ["x"]}}),
    ],
)
async def test_a_question_is_what_send_would_send(given: Any, sent: dict[str, Any]) -> None:
    """A message object, or a type and its payload; only the id is added."""
    desk = Desk()
    desk.do = asks(*given)
    async with desk.client() as client:
        await client.send("go")
        question = await client.receive()
        assert question == {**sent, "id": "$1"}
        await client.send(f"{sent['type']}.reply", 1, "$1")
        assert await desk.outcome() == 1


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ((Unlock(1), 5), TypeError),
        ((5,), TypeError),
        (("",), TypeError),
        (("how are you",), TypeError),
        (("unlock", object()), TypeError),
    ],
)
async def test_what_cannot_be_sent_is_no_question(given: Any, error: type[Exception]) -> None:
    """The error is that of `send`, and nothing waits."""
    desk = Desk()
    desk.do = asks(*given)
    async with desk.client() as client:
        await client.send("go")
        assert type(await desk.outcome()) is error
        assert desk.waiting == 0


@pytest.mark.parametrize("payload", [5, "text", [1, 2], {"a": None}, 1.5, True, "", 0])
async def test_without_a_type_the_answer_is_as_it_came(payload: Any) -> None:
    """Any JSON value, unchanged."""
    desk = Desk()
    async with desk.client() as client:
        assert await asked(desk, client, payload) == payload


@pytest.mark.parametrize("frame", ['{"type":"unlock.reply","id":"$1"}',
                                   '{"type":"unlock.reply","id":"$1","payload":null}'])  # fmt: skip
@pytest.mark.parametrize("returns", [Any, None, int | None, type(None), Unlocked | None])
async def test_a_missing_payload_counts_as_null(frame: str, returns: Any) -> None:
    """As a reply of the server does that returns None."""
    desk = Desk()
    desk.do = asks("unlock", returns=returns)
    async with desk.client() as client:
        await client.send("go")
        await client.receive()
        await client.raw(frame)
        assert await desk.outcome() is None


Door = NewType("Door", int)


@attrs.frozen
class Inner:
    n: int


class Keys(TypedDict):
    a: int


class Packed(msgspec.Struct):
    n: int


@pytest.mark.parametrize(
    ("returns", "payload", "expected"),
    [
        (int, 5, 5),
        (float, 5, 5.0),
        (str, "a", "a"),
        (bool, True, True),
        (list[int], [1, 2], [1, 2]),
        (dict[str, Inner], {"a": {"n": 1}}, {"a": Inner(1)}),
        (tuple[int, str], [1, "a"], (1, "a")),
        (set[int], [1, 2], {1, 2}),
        (int | None, 4, 4),
        (int | str, "4", "4"),
        (Literal["a", "b"], "b", "b"),
        (Annotated[int, msgspec.Meta(gt=0)], 1, 1),
        (Annotated[int, msgspec.Meta(gt=0, examples=[1])], 1, 1),
        (Annotated[str, msgspec.Meta(max_length=2)] | None, "ab", "ab"),
        (Inner, {"n": 1}, Inner(1)),
        (Unlocked, {"at": "2030-01-01T00:00:00"}, Unlocked(datetime.datetime(2030, 1, 1))),
        (list[Unlocked | None], [None], [None]),
        (Inner | Unlock, {"door": 3}, Unlock(3)),
        (Keys, {"a": 1}, {"a": 1}),
        (Packed, {"n": 1}, Packed(1)),
        (Door, 5, 5),
        (bytes, "AAE=", b"\x00\x01"),
        (datetime.timedelta, "PT1S", datetime.timedelta(seconds=1)),
        (object, [1], [1]),
        (dict, {"a": 1}, {"a": 1}),
    ],
)
async def test_an_answer_is_structured_as_a_payload_would_be(
    returns: Any, payload: Any, expected: Any
) -> None:
    """Whatever a payload may be annotated with."""
    desk = Desk()
    async with desk.client() as client:
        for _ in range(2):
            outcome = await asked(desk, client, payload, returns=returns)
            assert outcome == expected and type(outcome) is type(expected)


@pytest.mark.parametrize(
    ("returns", "payload", "path"),
    [
        (int, "5", "$.payload"),
        (int, True, "$.payload"),
        (int, None, "$.payload"),
        (list[int], [1, "x"], "$.payload[1]"),
        (Annotated[int, msgspec.Meta(gt=0)], 0, "$.payload"),
        (Annotated[int, msgspec.Meta(gt=0)] | None, 0, "$.payload"),
        (Unlocked, {}, "$.payload.at"),
        (Unlocked, {"at": "never"}, "$.payload.at"),
        (Unlocked, "now", "$.payload"),
        (dict[str, Inner], {"a": {"n": None}}, '$.payload["a"].n'),
        (Literal["a", "b"], "c", "$.payload"),
        (None, 5, "$.payload"),
        (Keys, {"a": "x"}, "$.payload.a"),
        (Packed, {"n": "x"}, "$.payload.n"),
    ],
)
async def test_an_answer_that_does_not_fit_is_an_error_with_the_wrong_fields(
    returns: Any, payload: Any, path: str
) -> None:
    """With the code and the details that a client gets for such a payload."""
    desk = Desk()
    async with desk.client() as client:
        outcome = await asked(desk, client, payload, returns=returns)
        assert type(outcome) is AnswerError and outcome.code == "invalid_payload"
        assert outcome.message.startswith(f"unlock.reply: {path}: ")
        assert [error["path"] for error in outcome.details["errors"]] == [path]


async def test_all_wrong_fields_of_an_answer_are_told() -> None:
    """Not only the first one."""
    desk = Desk()
    async with desk.client() as client:
        wrong = {"door": "x", "codes": [1, "a", 2]}
        outcome = await asked(desk, client, wrong, returns=Unlock)
        paths = {error["path"] for error in outcome.details["errors"]}
        assert paths == {"$.payload.door", "$.payload.codes[0]", "$.payload.codes[2]"}


@pytest.mark.parametrize("type", ["error", "complete", "gap", "unlock.reply", "$ping"])
async def test_a_question_of_a_reserved_type_is_refused(type: str) -> None:
    """No client could tell it from what else has that type. Nothing is sent."""
    desk = Desk()
    async with desk.client() as client:
        for ask in (asks(type), lambda conn: desk.hub.ask(conn.id, type)):
            desk.do = ask
            await client.send("go")
            outcome = await desk.outcome()
            assert isinstance(outcome, PachinkoError) and "is reserved" in str(outcome)
        assert await client.ask("$ping") == {"type": "$pong", "id": 1}


class Unknown:
    def __init__(self, n: int) -> None: ...


@pytest.mark.parametrize(
    ("returns", "advice"),
    [
        (Unknown, "register a hook"),
        (list[Unknown], "register a hook"),
        (complex, "write float"),
        (Callable[[], int], "Callable"),
        (5, "5 is no type"),
        ("Unlocked", "'Unlocked' is no type"),
        ({"a": int}, "{'a': "),
        ([int], "unhashable"),
        ((int, str), "is no type"),
        (Unlocked(datetime.datetime(2030, 1, 1)), "Unlocked("),
        (lambda value: value, "lambda> is no type"),
        (list["Nowhere"], "Nowhere"),  # type: ignore[name-defined]  # noqa: F821 - there is none
        (msgspec.UnsetType, "Unset"),
    ],
)
async def test_a_type_that_no_payload_can_have_is_refused_before_the_client_is_asked(
    returns: Any, advice: str
) -> None:
    """With advice, each time, and nothing is sent."""
    desk = Desk()
    desk.do = asks("unlock", returns=returns)
    async with desk.client() as client:
        for _ in range(2):
            await client.send("go", id=1)
            outcome = await desk.outcome()
            assert type(outcome) is PachinkoError and advice in str(outcome), outcome
            assert "the answer, returns=" in str(outcome)
            assert (await client.receive())["type"] == "go.reply"


@pytest.mark.parametrize("t", [list[int], Annotated[list[int], msgspec.Meta(examples=[[1]])]])
async def test_a_type_is_checked_once_for_a_codec(t: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call only looks it up; another converter asks again."""
    desk, seen = Desk(), list[Any]()
    codec = desk.hub.state.codec
    check = codec.check
    monkeypatch.setattr(codec, "check", lambda t, *rest: (seen.append(t), check(t, *rest)))
    async with desk.client() as client:
        for _ in range(3):
            assert await asked(desk, client, [1], returns=t) == [1]
    assert len(seen) == 1
    desk.hub.configure(converter=desk.hub.converter.copy())
    assert desk.hub.state.codec.answers == set()


async def test_the_hooks_of_the_app_count_for_answers() -> None:
    """Those of the converter that its hub is configured with."""
    desk = Desk()
    converter: cattrs.Converter = desk.hub.converter.copy()
    converter.register_structure_hook(Unknown, lambda value, _: Unknown(value))
    desk.hub.configure(converter=converter)
    async with desk.client() as client:
        assert type(await asked(desk, client, 5, returns=Unknown)) is Unknown


# Errors of the client


@pytest.mark.parametrize(
    ("payload", "code", "text", "details"),
    [
        ({"code": "locked", "message": "no key"}, "locked", "no key", {}),
        ({"code": "locked"}, "locked", "", {}),
        ({"code": "a", "message": "b", "c": [1], "errors": 2}, "a", "b", {"c": [1], "errors": 2}),
        ({"code": 5, "message": None}, "", "", {"code": 5, "message": None}),
        ({"message": "b", "code": None}, "", "b", {"code": None}),
        ({"code": "a", "message": {"en": "b"}}, "a", "", {"message": {"en": "b"}}),
        ({"self": 1, "details": 2}, "", "", {"self": 1, "details": 2}),
        ({}, "", "", {}),
        ("locked", "", "", {}),
        ([1], "", "", {}),
        (5, "", "", {}),
        (None, "", "", {}),
    ],
)
async def test_an_error_is_raised_as_the_client_wrote_it(
    payload: Any, code: str, text: str, details: Any
) -> None:
    """Whatever it wrote; nothing of that is in the text of the exception."""
    desk = Desk()
    desk.do = asks("unlock", returns=int)
    async with desk.client() as client:
        await client.send("go")
        await answer(client, payload, "error")
        outcome = await desk.outcome()
        assert type(outcome) is AnswerError
        assert (outcome.code, outcome.message, outcome.details) == (code, text, details)
        assert str(outcome) == str(AnswerError("x")) and "lock" not in str(outcome)


def test_the_two_errors_are_what_they_are_said_to_be() -> None:
    """One is a time-out; neither is an error that a client would be told."""
    assert issubclass(NoAnswer, TimeoutError) and not issubclass(AnswerError, TimeoutError)
    assert not issubclass(AnswerError, MessageError) and not issubclass(NoAnswer, MessageError)
    error = AnswerError("a")
    error.details["b"] = 1
    assert AnswerError("a").details == {} and (error.code, error.message) == ("a", "")


# No answer


async def test_a_question_that_is_not_answered_times_out() -> None:
    """And is forgotten: what comes after that is late."""
    desk = Desk()
    desk.do = asks("unlock", timeout=0.05)
    async with desk.client() as client:
        await client.send("go")
        await desk.server.spend(0.05)
        outcome = await desk.outcome()
        assert type(outcome) is NoAnswer and "'unlock' within 0.05 s" in str(outcome)
        assert outcome.__cause__ is None and outcome.__context__ is None
        assert desk.waiting == 0
        await answer(client, 1)
        await until(lambda: desk.late == 1)


@pytest.mark.parametrize(
    "timeout", [0, -1, -0.5, None, math.nan, math.inf, -math.inf, 10**400, "10", True, [1], 10j]
)
async def test_every_wait_is_bounded_by_a_number_above_zero(timeout: Any) -> None:
    """Anything else is refused, by the connection and by the hub, and nothing is sent."""
    desk = Desk()
    async with desk.client() as client:
        for call in (
            lambda conn: conn.ask("unlock", timeout=timeout),
            lambda conn: desk.hub.ask(conn, "unlock", timeout=timeout),
            lambda conn: desk.hub.ask(conn.id, "unlock", timeout=timeout),
            lambda conn: desk.hub.ask("nobody", "unlock", timeout=timeout),
        ):
            desk.do = call
            await client.send("go", id=1)
            outcome = await desk.outcome()
            assert type(outcome) is ValueError and "a number of seconds above 0" in str(outcome)
            assert (await client.receive())["type"] == "go.reply"


@pytest.mark.parametrize("timeout", [1, 1e300, 3600.0])
async def test_a_time_out_may_be_any_number_of_seconds(timeout: float) -> None:
    """Whole ones as well, and more than anybody waits."""
    desk = Desk()
    async with desk.client() as client:
        assert await asked(desk, client, 5, timeout=timeout) == 5


@pytest.mark.parametrize("how", ["close", "cut"])
@pytest.mark.parametrize("handler", ["go", "beside"])
async def test_who_waits_is_told_at_once_that_the_client_has_gone(how: str, handler: str) -> None:
    """Long before the time-out."""
    desk = Desk()
    desk.do = asks("unlock", timeout=1000)
    async with desk.client() as client:
        await client.send(handler)
        await client.receive()
        if how == "close":
            await client.close()
        else:
            client.cut()
        outcome = await desk.outcome()
        assert type(outcome) is NoAnswer and "has ended" in str(outcome)
        await until(lambda: not desk.hub.state.questions)


async def test_who_waits_is_told_at_once_that_the_server_closes() -> None:
    """All of them, however many."""
    desk = Desk()
    desk.do = asks("unlock", timeout=1000)
    async with desk.client() as client:
        for _ in range(3):
            await client.send("beside")
            await client.receive()
        await desk.conns[0].close(4000)
        assert [type(await desk.outcome()) for _ in range(3)] == [NoAnswer] * 3
        assert (await client.closed())[0] == 4000


async def test_a_shutdown_ends_the_wait() -> None:
    """A server that stops does not wait for the answers of clients."""
    desk = Desk()
    desk.do = asks("unlock", timeout=1000)
    async with desk.client() as client:
        await client.send("go")
        await client.receive()
    assert type(await desk.outcome()) is NoAnswer


async def test_a_client_that_has_gone_is_not_asked() -> None:
    """Neither by its handler, nor by other code that has kept the connection, or its id."""
    desk = Desk()

    async def close_and_ask(conn: Connection) -> Any:
        await conn.close()
        return await conn.ask("unlock")

    desk.do = close_and_ask
    async with desk.client() as client:
        await client.send("go")
        outcome = await desk.outcome()
        assert type(outcome) is NoAnswer and "gone" in str(outcome)
        await client.closed()
        await until(lambda: not desk.hub.count)
        (conn,) = desk.conns
        for call in (conn.ask("unlock"), desk.hub.ask(conn, "unlock"),
                     desk.hub.ask(conn.id, "unlock"), desk.hub.ask("", "unlock")):  # fmt: skip
            with pytest.raises(NoAnswer):
                await call
        assert not desk.hub.state.questions


async def test_a_slow_client_is_not_waited_for_longer_than_asked() -> None:
    """The time-out covers the sending, too."""
    desk = Desk(send_timeout=100)
    async with serving(desk.app) as server, Stalled(server.url + "/ws"):
        await until(lambda: desk.hub.connections)
        (conn,) = desk.conns
        for _ in range(20):
            with pytest.raises(NoAnswer, match="'unlock' within"):
                await conn.ask("unlock", "x" * 500_000, timeout=0.05)
        assert not conn.closed and desk.waiting == 0


async def test_a_client_that_is_too_slow_is_evicted_as_by_send() -> None:
    """`send_timeout` ends the wait if it is the shorter one."""
    desk = Desk(send_timeout=0.1)
    async with serving(desk.app) as server, Stalled(server.url + "/ws"):
        await until(lambda: desk.hub.connections)
        (conn,) = desk.conns
        work = (conn.ask("unlock", "x" * 900_000, timeout=1000) for _ in range(60))
        outcomes = await asyncio.gather(*work, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {NoAnswer}
        assert conn.closed and conn.close_code == 1013


# Late answers


@pytest.mark.parametrize(
    "frame",
    [
        '{"type":"unlock.reply","id":"$2"}',
        '{"type":"unlock.reply","id":1}',
        '{"type":"unlock.reply","id":"1"}',
        '{"type":"unlock.reply"}',
        '{"type":"unlock.reply","id":null}',
        '{"type":"unlock.reply","id":"$01"}',
        '{"type":"lock.reply","id":"$1"}',
        '{"type":".reply","id":"$1"}',
        '{"type":"unlock.reply.reply","id":"$1"}',
        '{"type":"error","id":1}',
        '{"type":"error","payload":{"code":"locked"}}',
    ],
)
async def test_what_answers_no_question_is_late_and_changes_nothing(frame: str) -> None:
    """An id of nobody, a client's own, or the reply to something else; the question goes on."""
    desk = Desk(rate=(2, 600.0))
    async with desk.client() as client:
        await client.send("go")
        await client.receive()
        for n in range(5):
            await client.raw(frame)
            await until(lambda count=n + 1: desk.late == count)
        await client.send("unlock.reply", 5, "$1")
        assert await desk.outcome() == 5
        assert desk.hub.stats()["errors"] == 0


@pytest.mark.parametrize("type", ["unlock.reply", "error"])
async def test_only_the_first_answer_counts(type: str) -> None:
    """The second one is late, also if it comes in the same turn of the loop."""
    desk = Desk()
    async with desk.client() as client:
        await client.send("go")
        await client.receive()
        for _ in range(3):
            await client.send("unlock.reply", "first", "$1")
            await client.send(type, {"code": "second"}, "$1")
        assert await desk.outcome() == "first"
        await until(lambda: desk.late == 5)


async def test_a_message_that_is_no_answer_may_have_the_id_of_a_question() -> None:
    """It is handled, refused or ignored as ever: ids of the server are its own."""
    desk = Desk()
    async with desk.client() as client:
        await client.send("go")
        await client.receive()
        await client.send("complete", id="$1")
        assert await client.ask("$ping", id="$1") == {"type": "$pong", "id": "$1"}
        assert desk.waiting == 1
        await client.send("unlock.reply", 5, "$1")
        assert await desk.outcome() == 5
        error = (await client.ask("unlock", id="$1"))["payload"]
        assert error["code"] == "unknown_type" and "answers end in '.reply'" in error["message"]
        assert ".reply" not in (await client.ask("unlock", id=1))["payload"]["message"]


async def test_who_is_cancelled_forgets_the_question() -> None:
    """Its answer is late, and the next question has another id."""
    desk = Desk()
    async with desk.client() as client:
        await until(lambda: desk.hub.connections)
        task = asyncio.ensure_future(desk.conns[0].ask("unlock"))
        assert (await client.receive())["id"] == "$1"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert desk.waiting == 0
        await client.send("unlock.reply", 5, "$1")
        await until(lambda: desk.late == 1)
        await client.send("go")
        assert (await client.receive())["id"] == "$2"
        await client.send("unlock.reply", 6, "$2")
        assert await desk.outcome() == 6


async def test_an_answer_in_the_turn_of_the_time_out_is_one_of_the_two() -> None:
    """An answer that was taken is returned; one that was not is late."""
    desk = Desk()
    async with desk.client() as client:
        await until(lambda: desk.hub.connections)
        outcomes = set()
        for _ in range(30):
            task = asyncio.ensure_future(desk.conns[0].ask("unlock", timeout=0.003))
            await answer(client, 5)
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            outcomes.add(type(outcome))
        await client.ask("$ping")
        assert outcomes <= {int, NoAnswer} and desk.waiting == 0


async def test_at_most_64_questions_of_a_client_wait() -> None:
    """The next one is a mistake of the program; an answer makes room for another."""
    desk = Desk()
    async with desk.client() as client:
        await until(lambda: desk.hub.connections)
        (conn,) = desk.conns
        tasks = [asyncio.ensure_future(conn.ask("unlock", n)) for n in range(64)]
        ids = [(await client.receive())["id"] for _ in range(64)]
        assert ids == [f"${n}" for n in range(1, 65)]
        for call in (conn.ask("unlock"), desk.hub.ask(conn.id, "unlock")):
            with pytest.raises(PachinkoError, match="at most 64"):
                await call
        for n in reversed(range(64)):
            await client.send("unlock.reply", n, ids[n])
        assert await asyncio.gather(*tasks) == list(range(64))
        again = asyncio.ensure_future(conn.ask("unlock"))
        await answer(client, "again")
        assert await again == "again"


# Where it may be called


async def test_an_answer_goes_by_what_is_held_for_the_handler_that_asks() -> None:
    """Also by 256 messages less one; they keep their order."""
    desk, seen = Desk(), list[Any]()

    @desk.ws.on("note")
    async def note(conn: Connection, payload: int) -> None:
        seen.append(payload)

    async with desk.client() as client:
        await client.send("go")
        await client.receive()
        for n in range(255):
            await client.send("note", n)
        await client.send("unlock.reply", 5, "$1")
        assert await desk.outcome() == 5
        await until(lambda: seen == list(range(255)))


async def test_an_answer_behind_more_than_may_be_held_is_not_read_in_time() -> None:
    """The time-out ends the wait, and nothing is lost."""
    desk, seen = Desk(), list[Any]()
    desk.do = asks("unlock", timeout=0.3)

    @desk.ws.on("note")
    async def note(conn: Connection, payload: int) -> None:
        seen.append(payload)

    async with desk.client() as client:
        await client.send("go")
        await client.receive()
        for n in range(300):
            await client.send("note", n)
        await client.send("unlock.reply", 5, "$1")
        await desk.server.spend(0.3)
        assert type(await desk.outcome()) is NoAnswer
        await until(lambda: seen == list(range(300)) and desk.late == 1)


async def test_two_clients_may_ask_each_other() -> None:
    """Each by a plain handler that waits for the other one."""
    desk = Desk()

    async def ask_all(conn: Connection) -> Any:
        others = desk.hub.connections - {conn}
        return [await desk.hub.ask(other.id, "unlock", {"by": conn.id}) for other in others]

    desk.do = ask_all
    async with (
        simulated(desk.app) as server,
        desk.client(server.url) as a,
        desk.client(server.url) as b,
    ):
        await until(lambda: len(desk.hub.connections) == 2)
        await a.send("go")
        await b.send("go")
        await answer(a, "a")
        await answer(b, "b")
        outcomes = [await desk.outcome(), await desk.outcome()]
        assert sorted(outcomes) == [["a"], ["b"]]


async def test_answers_do_not_count_for_the_rate() -> None:
    """A client may answer more often than it may send."""
    desk = Desk(rate=(3, 600.0))
    async with desk.client() as client:
        await until(lambda: desk.hub.connections)
        for n in range(20):
            task = asyncio.ensure_future(desk.conns[0].ask("unlock"))
            await answer(client, n)
            assert await task == n
        assert desk.hub.stats()["errors"] == 0


async def test_an_accepted_handler_may_ask() -> None:
    """It is the first that a client can answer."""
    desk = Desk()

    @desk.ws.accepted
    async def greet(conn: Connection) -> None:
        desk.outcomes.put_nowait(await conn.ask("name", returns=str))

    async with desk.client() as client:
        await client.send("go")  # It waits for its turn, the answer does not.
        await answer(client, "ada", "name.reply")
        assert await desk.outcome() == "ada"
        await answer(client, 5)
        assert await desk.outcome() == 5


@pytest.mark.parametrize("where", ["connect", "disconnect", "authenticate", "end"])
@pytest.mark.parametrize("by", ["conn", "hub"])
async def test_where_no_client_can_answer_the_program_is_told_where_to_ask(
    where: str, by: str
) -> None:
    """At once, whatever the time-out."""
    desk = Desk()

    async def note(conn: Connection) -> None:
        try:
            ask = conn.ask if by == "conn" else lambda type: desk.hub.ask(conn, type)
            await ask("unlock")
        except Exception as exc:  # the test looks at its class
            desk.outcomes.put_nowait(exc)

    if where == "authenticate":

        @desk.ws.authenticate
        async def who(conn: Connection, token: str | None) -> str | None:
            await note(conn)
            return "ada"

    elif where == "end":

        @desk.ws.connect
        async def lend(conn: Connection) -> AsyncIterator[None]:
            yield
            await note(conn)

    elif where == "connect":
        desk.ws.connect(note)
    else:
        desk.ws.disconnect(note)
    async with desk.client():
        pass
    outcome = await desk.outcome()
    assert type(outcome) is PachinkoError and "@ws.accepted" in str(outcome)


async def test_a_handshake_in_progress_is_not_asked_by_others() -> None:
    """By its id it is no mistake, and they need not wait; a task of its handler is too early."""
    desk, gate = Desk(), asyncio.Event()

    @desk.ws.connect
    async def slow(conn: Connection) -> None:
        await gate.wait()

    async def come(url: str) -> None:
        async with desk.client(url) as client:
            await answer(client, 5)

    async with simulated(desk.app) as server:
        task = asyncio.ensure_future(come(server.url))
        await until(lambda: desk.conns)
        (conn,) = desk.conns
        with pytest.raises(NoAnswer, match="not in yet"):
            await desk.hub.ask(conn.id, "unlock")
        with pytest.raises(PachinkoError, match="accepted"):
            await conn.ask("unlock")
        gate.set()
        await until(lambda: desk.hub.connections)
        assert await desk.hub.ask(conn.id, "unlock") == 5
        await task


async def test_another_client_may_be_asked_in_connect_and_disconnect_handlers() -> None:
    """One that is in."""
    desk = Desk()
    async with simulated(desk.app) as server, desk.client(server.url) as client:
        await until(lambda: desk.hub.connections)
        first = desk.conns[0].id

        @desk.ws.connect
        async def arrive(conn: Connection) -> None:
            desk.outcomes.put_nowait(await desk.hub.ask(first, "unlock", "connect"))

        @desk.ws.disconnect
        async def leave(conn: Connection) -> None:
            if conn.id != first:
                desk.outcomes.put_nowait(await desk.hub.ask(first, "unlock", "disconnect"))

        async def come_and_go() -> None:
            async with desk.client(server.url):
                pass

        task = asyncio.ensure_future(come_and_go())
        await answer(client, 1)
        assert await desk.outcome() == 1
        await answer(client, 2)
        assert await desk.outcome() == 2
        await task


@pytest.mark.parametrize("given", ["conn", "id"])
async def test_an_http_responder_and_a_worker_ask(given: str) -> None:
    """All code in the loop may, with the connection or with its id."""
    desk, go = Desk(), asyncio.Event()

    async def ask() -> Any:
        (conn,) = desk.hub.connections
        target = conn if given == "conn" else conn.id
        return await desk.hub.ask(target, Unlock(1), returns=Unlocked | None)

    class Doors:
        async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
            resp.media = {"answer": await ask()}

    desk.app.add_route("/doors", Doors())

    @desk.ws.worker
    async def work() -> None:
        await go.wait()
        desk.outcomes.put_nowait(await ask())

    async with serving(desk.app) as server, desk.client(server.url) as client:
        await until(lambda: desk.hub.connections)
        go.set()
        await answer(client, {"at": "2030-01-01T00:00:00"})
        assert await desk.outcome() == Unlocked(datetime.datetime(2030, 1, 1))
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /doors HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        await answer(client)
        assert (await reader.read()).endswith(b'{"answer": null}')
        writer.close()


async def test_a_thread_asks_through_the_hub() -> None:
    """By `call_threadsafe`; without it, it is told so."""
    desk, outcomes = Desk(), list[Any]()

    def work(conn: Connection) -> None:
        future = desk.hub.call_threadsafe(desk.hub.ask, conn.id, "unlock", returns=int)
        outcomes.append(future.result(PATIENCE))
        outcomes.append(desk.hub.call_threadsafe(conn.ask, "unlock").result(PATIENCE))
        for call in (conn.ask("unlock"), desk.hub.ask(conn, "unlock")):
            try:
                asyncio.run(call)  # type: ignore[arg-type]  # a coroutine, as its type says
            except PachinkoError as exc:
                outcomes.append(str(exc))

    async with desk.client() as client:
        await until(lambda: desk.hub.connections)
        thread = threading.Thread(target=work, args=desk.conns)
        thread.start()
        await answer(client, 5)
        await answer(client, 6)
        await asyncio.to_thread(thread.join)
    assert outcomes[:2] == [5, 6]
    assert "use conn.hub.call_threadsafe(conn.ask, ...)" in outcomes[2]
    assert "use hub.call_threadsafe(hub.ask, ...)" in outcomes[3]


async def test_only_connections_and_ids_are_asked() -> None:
    """Those of another hub are asked through theirs."""
    desk, other = Desk(), Hub()
    for wrong in (None, 5, ["id"], object()):
        with pytest.raises(TypeError, match="named by a str"):
            await desk.hub.ask(wrong, "unlock")  # type: ignore[call-overload]  # as the test says
    async with desk.client():
        await until(lambda: desk.hub.connections)
        with pytest.raises(PachinkoError, match="another hub"):
            await other.ask(desk.conns[0], "unlock")
        with pytest.raises(NoAnswer, match="no connection with the id"):
            await other.ask(desk.conns[0].id, "unlock")


# Errors that no handler catches

FAILED = {"code": "no_answer", "message": "a client that was asked has not answered"}
SECRET = {"code": "s3cret", "message": "s3cret", "more": "s3cret"}


async def fail(desk: Desk, client: Client, how: str) -> None:
    """Let the question of a handler fail."""
    question = await client.receive()
    if how == "error":
        await client.send("error", SECRET, question["id"])
    elif how == "wrong":
        await client.send("unlock.reply", "s3cret", question["id"])
    else:
        await desk.server.spend(0.05)


def ask_in_vain(how: str) -> Ask:
    return asks("unlock", returns=int, timeout=0.05 if how == "late" else 100)


def check_log(caplog: pytest.LogCaptureFixture, code: str = "no_answer") -> None:
    """No word of the client's, no traceback, and one line at DEBUG with the code."""
    ours = [record for record in caplog.records if record.name == "pachinko"]
    assert "s3cret" not in caplog.text and not any(record.exc_info for record in ours)
    assert [r.levelname for r in ours if getattr(r, "code", "") == code] == ["DEBUG"]
    assert not [r for r in ours if r.levelno > logging.DEBUG and "hub" not in r.message]


@pytest.mark.parametrize("how", ["late", "error", "wrong"])
@pytest.mark.parametrize("concurrent", [False, True])
async def test_a_handler_that_lets_it_pass_answers_no_answer(
    how: str, concurrent: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With nothing of what the other one has said, neither to its client nor in the log."""
    caplog.set_level(logging.DEBUG, "pachinko")
    desk = Desk()

    @desk.ws.on("ask", concurrent=concurrent)
    async def ask(conn: Connection) -> Any:
        return await ask_in_vain(how)(conn)

    async with desk.client() as client:
        await client.send("ask", id=7)
        await fail(desk, client, how)
        assert await client.receive() == {"type": "error", "id": 7, "payload": FAILED}
        assert desk.hub.stats()["errors.no_answer"] == 1
    check_log(caplog)


@pytest.mark.parametrize("where", ["stream", "middleware", "fallback", "binary", "provider"])
@pytest.mark.parametrize("how", ["late", "error"])
async def test_it_is_one_outcome_wherever_a_message_is_handled(
    where: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Around a handler, in a generator, and where there is no type."""
    caplog.set_level(logging.DEBUG, "pachinko")
    desk, ask = Desk(), ask_in_vain(how)

    @desk.ws.on("count")
    async def count(conn: Connection) -> AsyncIterator[int]:
        yield 1
        await ask(conn)

    if where == "middleware":

        @desk.ws.middleware
        async def around(conn: Connection, envelope: Any, call_next: Any) -> Any:
            await ask(conn)

    @desk.ws.fallback
    async def other(conn: Connection, frame: str) -> None:
        await ask(conn)

    @desk.ws.binary
    async def upload(conn: Connection, data: bytes) -> None:
        await ask(conn)

    if where == "provider":

        @desk.ws.provide
        async def provided(conn: Connection) -> Inner:
            await ask(conn)
            return Inner(1)

        @desk.ws.on("provided")
        async def takes(conn: Connection, *, inner: Inner) -> None: ...

    async with desk.client() as client:
        id: Any = 7
        if where == "stream":
            await client.send("count", id=7)
            assert (await client.receive())["more"]
        elif where == "fallback":
            await client.send("nobody's")
            id = None
        elif where == "binary":
            await client.raw(b"data")
            id = None
        else:
            await client.send("provided" if where == "provider" else "raw", id=7)
        await fail(desk, client, how)
        error = await client.receive()
        assert error["payload"] == FAILED and error.get("id") == id
    check_log(caplog)


async def group_of(*errors: Exception) -> None:
    async def fail(exc: Exception) -> None:
        await asyncio.sleep(0)  # An eager task would fail before its group has another.
        raise exc

    async with asyncio.TaskGroup() as group:
        for exc in errors:
            group.create_task(fail(exc))


@pytest.mark.parametrize(
    ("errors", "code"),
    [
        ([NoAnswer("s3cret")], "no_answer"),
        ([AnswerError("s3cret")], "no_answer"),
        ([NoAnswer(""), AnswerError("s3cret")], "no_answer"),
        ([AnswerError("s3cret"), MessageError("mine")], "no_answer"),
        ([MessageError("mine"), NoAnswer("s3cret")], "mine"),
        ([NoAnswer(), falcon.WebSocketDisconnected()], "no_answer"),
        ([NoAnswer(), KeyError("bug")], "internal_error"),
        ([AnswerError("a"), TimeoutError()], "internal_error"),
    ],
)
async def test_a_group_of_exceptions_means_what_is_in_it(
    errors: list[Exception], code: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The first one if all are outcomes; a bug among them is a bug."""
    caplog.set_level(logging.DEBUG, "pachinko")
    desk = Desk()
    desk.do = lambda _: group_of(*errors)
    async with desk.client() as client:
        assert (await client.ask("raw"))["payload"]["code"] == code
    if code != "internal_error":
        check_log(caplog, code)


@pytest.mark.parametrize(
    ("exception", "how"),
    [
        (AnswerError, "error"),
        (AnswerError, "wrong"),
        (NoAnswer, "late"),
        (TimeoutError, "late"),
        (Exception, "error"),
    ],
)
async def test_an_error_handler_of_the_app_comes_first(
    exception: type[Exception], how: str
) -> None:
    """For the class, or for one above it; it sees what the client wrote."""
    desk = Desk()
    desk.do = ask_in_vain(how)

    @desk.ws.error(exception)
    async def failed(conn: Connection, exc: Any) -> MessageError:
        return MessageError("mine", was=getattr(exc, "code", None))

    async with desk.client() as client:
        await client.send("raw", id=7)
        await fail(desk, client, how)
        code = {"error": "s3cret", "wrong": "invalid_payload", "late": None}[how]
        payload = (await client.receive())["payload"]
        assert payload == {"code": "mine", "message": "", "was": code}


async def test_a_handler_whose_own_client_has_gone_ends_quietly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nobody is left who could be told, and no error is counted."""
    caplog.set_level(logging.DEBUG, "pachinko")
    desk, called = Desk(), list[object]()
    desk.do = asks("unlock", timeout=1000)

    @desk.ws.error(NoAnswer)
    async def failed(conn: Connection, exc: NoAnswer) -> None:
        called.append(exc)

    async with desk.client() as client:
        await client.send("raw", id=7)
        await client.receive()
        client.cut()
        await until(lambda: not desk.hub.count)
        assert desk.hub.stats()["errors"] == 0 and called == []
    assert not [r for r in caplog.records if r.name == "pachinko" and r.levelno > logging.INFO]


@pytest.mark.parametrize("how", ["late", "error"])
async def test_an_accepted_handler_that_lets_it_pass_closes(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With the code for 408, so that the client comes again a little later."""
    caplog.set_level(logging.DEBUG, "pachinko")
    desk = Desk()

    @desk.ws.accepted
    async def greet(conn: Connection) -> None:
        await ask_in_vain(how)(conn)

    async with desk.client() as client:
        await fail(desk, client, how)
        assert (await client.closed())[0] == 3408
    assert "s3cret" not in caplog.text and "Traceback" not in caplog.text


@pytest.mark.parametrize("where", ["connect", "authenticate"])
async def test_a_handshake_whose_question_to_another_client_is_not_answered_is_refused(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With 408, where the server can tell it."""
    caplog.set_level(logging.DEBUG, "pachinko")
    desk, first = Desk(), list[str]()

    async def ask() -> None:
        if first:
            await desk.hub.ask(first[0], "unlock")

    if where == "connect":

        @desk.ws.connect
        async def arrive(conn: Connection) -> None:
            await ask()

    else:

        @desk.ws.authenticate
        async def who(conn: Connection, token: str | None) -> str:
            await ask()
            return "ada"

    async with simulated(desk.app) as server, desk.client(server.url) as client:
        await until(lambda: desk.hub.connections)
        first.append(desk.conns[0].id)
        task = asyncio.ensure_future(connect(server.url + "/ws").__aenter__())
        await fail(desk, client, "error")
        (refused,) = await asyncio.gather(task, return_exceptions=True)
        assert "HTTP 408" in str(refused)
        first[0] = "nobody"
        with pytest.raises(Exception, match="HTTP 408"):
            await connect(server.url + "/ws").__aenter__()
    assert "s3cret" not in caplog.text and "Traceback" not in caplog.text


async def test_a_disconnect_handler_and_a_worker_that_let_it_pass_are_logged_in_a_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have not done all that they should; the text says why, without the client's words."""
    monkeypatch.setattr("pachinko._BACKOFFS", (0.0,))
    desk, go = Desk(), asyncio.Event()

    @desk.ws.disconnect
    async def leave(conn: Connection) -> None:
        await desk.hub.ask("nobody", "unlock")

    @desk.ws.worker
    async def work() -> None:
        await go.wait()
        go.clear()
        raise AnswerError("s3cret", "s3cret")

    async with desk.client():
        await until(lambda: desk.hub.connections)
        go.set()
        await until(lambda: "work() at" in caplog.text)
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 2 and not any(r.exc_info for r in errors)
    assert "leave() at" in caplog.text and "no connection with the id 'nobody'" in caplog.text
    assert "s3cret" not in caplog.text


async def test_a_renewal_that_lets_it_pass_is_answered() -> None:
    """A later token is a message as others."""
    desk = Desk()

    @desk.ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        if token == "again":
            await conn.ask("unlock", timeout=0.05)
        return "ada"

    async with desk.client() as client:
        await client.send("authenticate", {"token": "again"}, id=7)
        assert (await client.receive())["type"] == "unlock"
        await desk.server.spend(0.05)
        assert (await client.receive())["payload"] == FAILED


async def test_a_handler_that_is_stopped_is_told_of_its_own_time_limit() -> None:
    """Not of the question that it has waited for, which is forgotten."""
    desk = Desk(handler_timeout=0.05)
    desk.do = asks("unlock", timeout=100)
    async with desk.client() as client:
        await client.send("raw", id=7)
        assert (await client.receive())["type"] == "unlock"
        await desk.server.spend(0.05)
        assert (await client.receive())["payload"]["code"] == "handler_timeout"
        assert desk.waiting == 0


# What is kept


async def test_a_connection_that_is_not_asked_has_nothing_of_this() -> None:
    """And one that was asked leaves nothing behind."""
    desk = Desk()
    async with simulated(desk.app) as server:
        async with desk.client(server.url) as client:
            await client.ask("$ping")
            await client.send("unlock.reply", id="$1")
            await until(lambda: desk.late == 1)
            assert not desk.hub.state.questions
            await client.send("go")
            await answer(client)
            assert await desk.outcome() is None
            assert list(desk.hub.state.questions) == [desk.conns[0].id]
        await until(lambda: not desk.hub.count)
        assert not desk.hub.state.questions


@pytest.mark.parametrize("how", ["answer", "late", "error", "wrong", "gone"])
@pytest.mark.usefixtures("no_collection")
async def test_an_outcome_does_not_hold_the_connection_in_a_cycle(how: str) -> None:
    """It is freed at its end, without the garbage collector."""
    desk, seen = Desk(), weakref.WeakSet[Connection]()
    desk.do = ask_in_vain(how)
    async with serving(desk.app) as server:
        async with desk.client(server.url) as client:
            await client.send("raw", id=7)
            if how == "gone":
                await client.receive()
                client.cut()
            elif how == "answer":
                await answer(client, 5)
                assert (await client.receive())["payload"] == 5
            else:
                if how == "late":
                    await client.receive()  # The time of a server cannot be moved.
                else:
                    await fail(desk, client, how)
                assert (await client.receive())["payload"] == FAILED
            seen.update(desk.conns)
            desk.conns.clear()
        await until(lambda: not desk.hub.count and not seen)


# Groups by id


async def test_a_connection_joins_and_leaves_by_its_id() -> None:
    """As by itself."""
    desk = Desk()
    async with desk.client() as client:
        await until(lambda: desk.hub.connections)
        (conn,) = desk.conns
        await desk.hub.join("room", conn.id)
        assert conn.groups == {"room"} and desk.hub.members("room") == {conn}
        await desk.hub.send("room", "hello")
        assert await client.receive() == {"type": "hello", "group": "room"}
        await desk.hub.leave("other", conn.id)
        await desk.hub.leave("room", conn.id)
        assert conn.groups == frozenset()


async def test_an_id_of_nobody_joins_nothing() -> None:
    """It may have ended; that is no error."""
    desk = Desk()
    async with desk.client() as client:
        await until(lambda: desk.hub.connections)
        await client.close()
        await until(lambda: not desk.hub.count)
        for id in (desk.conns[0].id, "nobody", ""):
            await desk.hub.join("room", id)
            await desk.hub.leave("room", id)
        assert desk.hub.groups == frozenset()


async def test_a_connect_handler_may_join_by_id() -> None:
    """The connection may be a member as soon as it has authenticated."""
    desk = Desk()

    @desk.ws.connect
    async def arrive(conn: Connection) -> None:
        await desk.hub.join("room", conn.id)

    async with desk.client():
        await until(lambda: desk.hub.members("room"))


async def test_too_many_groups_are_refused_by_id_as_well() -> None:
    """With the error that a handler may let pass."""
    desk = Desk(max_groups=1)
    async with desk.client():
        await until(lambda: desk.hub.connections)
        (conn,) = desk.conns
        await desk.hub.join("room", conn.id)
        await desk.hub.join("room", conn.id)
        with pytest.raises(MessageError, match="too_many_groups"):
            await desk.hub.join("other", conn.id)


@pytest.mark.parametrize("wrong", [None, 5, ["id"], object()])
async def test_only_connections_and_ids_join(wrong: Any) -> None:
    """And groups are texts, also for an id."""
    for call in (Hub().join, Hub().leave):
        with pytest.raises(TypeError, match="or its id"):
            await call("room", wrong)
        with pytest.raises(TypeError, match="named by a str"):
            await call(wrong, "id")
