"""The server asks a client, and waits for its answer."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import logging
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, Literal, NewType, TypedDict

import attrs
import cattrs
import falcon
import msgspec
import pytest
from support import PATIENCE, Client, Stalled, connect, new_app, serving, until

from pachinko import (
    AnswerError,
    Close,
    Connection,
    Hub,
    MessageError,
    NoAnswer,
    Pachinko,
    PachinkoError,
    message,
)

ERRORS = (AnswerError, NoAnswer, PachinkoError, MessageError, TypeError, ValueError)
Ask = Callable[[Connection], Awaitable[Any]]


@message("unlock")
class Unlock:
    door: int
    codes: list[str] = attrs.field(factory=list[str])


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
        except BaseException as exc:
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
        async with serving(self.app) as server, connect(server.url + "/ws") as client:
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
    async with desk.client() as client, contextlib.AsyncExitStack() as stack:
        for n in (1, 2, 3):
            await client.send("go")
            question = {"type": "unlock", "id": f"${n}", "payload": {"door": 4}}
            assert await client.receive() == question
            await client.send("unlock.reply", {"ok": n}, f"${n}")
            assert await desk.outcome() == {"ok": n}
        del stack
        assert desk.late == 0 and desk.waiting == 0


async def test_each_connection_counts_for_itself() -> None:
    """And no answer goes to the question of another one."""
    desk = Desk()
    async with serving(desk.app) as server:
        async with desk.client(server.url) as a, desk.client(server.url) as b:
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


class Unknown:
    def __init__(self, n: int) -> None: ...


@pytest.mark.parametrize(
    ("returns", "advice"),
    [
        (Unknown, "register a hook"),
        (list[Unknown], "register a hook"),
        (complex, "write float"),
        (Callable[[], int], "Callable"),
        (5, "5"),
        ("Unlocked", "Unlocked"),
        ({"a": int}, "{"),
        ([int], "[<class 'int'>]"),
        (Unlocked(datetime.datetime(2030, 1, 1)), "Unlocked("),
        (lambda value: value, "lambda"),
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


async def test_a_type_is_checked_once_for_a_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call only looks it up; another converter asks again."""
    desk, seen = Desk(), list[Any]()
    codec = desk.hub.state.codec
    check = codec.check
    monkeypatch.setattr(codec, "check", lambda t, *rest: (seen.append(t), check(t, *rest)))
    async with desk.client() as client:
        for _ in range(3):
            assert await asked(desk, client, [1], returns=list[int]) == [1]
    assert seen == [list[int]]
    desk.hub.configure(converter=desk.hub.converter.copy())
    assert desk.hub.state.codec.answers == {}


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
    assert AnswerError("a").details == {} and AnswerError("a").details is not AnswerError("b").details


# No answer


async def test_a_question_that_is_not_answered_times_out() -> None:
    """And is forgotten: what comes after that is late."""
    desk = Desk()
    desk.do = asks("unlock", timeout=0.05)
    async with desk.client() as client:
        await client.send("go")
        outcome = await desk.outcome()
        assert type(outcome) is NoAnswer and "'unlock' within 0.05 s" in str(outcome)
        assert outcome.__cause__ is None and outcome.__context__ is None
        assert desk.waiting == 0
        await answer(client, 1)
        await until(lambda: desk.late == 1)


@pytest.mark.parametrize(
    "timeout", [0, -1, -0.5, None, math.nan, math.inf, -math.inf, "10", True, [1], 10j]
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
        for _ in range(100):
            try:
                await conn.ask("unlock", "x" * 500_000, timeout=0.05)
            except NoAnswer:
                if conn.outgoing.writing or conn.outgoing.outbox:
                    break
        with pytest.raises(NoAnswer, match="within 0.05 s"):
            await conn.ask("unlock", timeout=0.05)
        assert not conn.closed


async def test_a_client_that_is_too_slow_is_evicted_as_by_send() -> None:
    """`send_timeout` ends the wait if it is the shorter one."""
    desk = Desk(send_timeout=0.1)
    async with serving(desk.app) as server, Stalled(server.url + "/ws"):
        await until(lambda: desk.hub.connections)
        (conn,) = desk.conns
        with pytest.raises(NoAnswer, match="has ended"):
            while True:
                with contextlib.suppress(PachinkoError):
                    await asyncio.gather(
                        *(conn.ask("unlock", "x" * 900_000, timeout=1000) for _ in range(60))
                    )
        assert conn.closed and conn.close_code == 1013
