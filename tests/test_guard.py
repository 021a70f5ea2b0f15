"""Who may send a message type: `@ws.on(..., only=...)`."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Any

import falcon
import pytest
from support import until
from test_session import Session, endpoint

import pachinko
from pachinko import Close, Connection, Envelope, MessageError, Pachinko, PachinkoError, message

NAME: ContextVar[str] = ContextVar("NAME", default="nobody")


@message("ban")
class Ban:
    name: str


def nobody(conn: Connection) -> bool:
    return False


def anybody(conn: Connection) -> bool:
    return True


async def nobody_async(conn: Connection) -> bool:
    await asyncio.sleep(0)
    return False


async def anybody_async(conn: Connection) -> bool:
    await asyncio.sleep(0)
    return True


class Guard:
    """An object that is called, and one with a method."""

    def __init__(self, answer: bool) -> None:
        self.answer = answer

    def __call__(self, conn: Connection) -> bool:
        return self.answer

    async def method(self, conn: Connection) -> bool:
        return self.answer

    @staticmethod
    def static(conn: Connection) -> bool:
        return True

    @classmethod
    def of_class(cls, conn: Connection) -> bool:
        return True


def level(least: int, conn: Connection) -> bool:
    return least < 5


def promises(conn: Connection) -> Awaitable[bool]:
    return nobody_async(conn)


@functools.wraps(anybody)
def wrapper(*args: Any, **kwargs: Any) -> bool:
    return anybody(*args, **kwargs)


NO = [
    nobody, nobody_async, lambda conn: False, Guard(False), Guard(False).method,
    functools.partial(level, 7), promises,
]  # fmt: skip
YES = [
    anybody, anybody_async, lambda _: True, Guard(True), Guard(True).method, Guard.static,
    Guard.of_class, functools.partial(level, 1), wrapper,
    lambda *args: True,
]  # fmt: skip


def guarded(only: Any, kind: str = "plain", **options: Any) -> tuple[Pachinko, list[Any]]:
    """An endpoint with a guarded handler of a *kind*, and what it was called with."""
    ws, calls = endpoint(**options), list[Any]()

    if kind == "stream":

        @ws.on("ban", only=only)
        async def stream(conn: Connection, *, name: str) -> AsyncIterator[str]:
            calls.append(name)
            yield name

    elif kind == "class":

        @ws.on(Ban, only=only)
        async def ban(conn: Connection, msg: Ban) -> str:
            calls.append(msg.name)
            return msg.name

    elif kind == "none":

        @ws.on("ban", only=only)
        async def alone(conn: Connection) -> str:
            calls.append(None)
            return "alone"

    else:

        @ws.on("ban", only=only, concurrent=kind == "concurrent")
        async def plain(conn: Connection, *, name: str) -> str:
            calls.append(name)
            return name

    return ws, calls


KINDS = ["plain", "concurrent", "stream", "class", "none"]


@pytest.mark.parametrize("only", NO)
@pytest.mark.parametrize("kind", KINDS)
async def test_who_is_refused_learns_nothing_about_the_payload(kind: str, only: Any) -> None:
    """A right payload, a wrong one and none are answered in the same way, with the id."""
    ws, calls = guarded(only, kind)
    async with Session(ws) as client:
        for payload in ({"name": "bob"}, {"name": 5}, {"nmae": "bob"}, "bob", [], None):
            answer = await client.ask("ban", payload, id="x")
            assert answer == {
                "type": "error",
                "id": "x",
                "payload": {"code": "forbidden", "message": "this client may not send 'ban'"},
            }
    assert calls == []


@pytest.mark.parametrize("only", YES)
@pytest.mark.parametrize("kind", ["plain", "stream", "class"])
async def test_who_is_allowed_is_served(kind: str, only: Any) -> None:
    """The payload is checked then, as always."""
    ws, calls = guarded(only, kind)
    async with Session(ws) as client:
        answer = await client.ask("ban", {"name": "bob"})
        assert answer["payload"] == "bob"
        if kind == "stream":
            assert await client.receive() == {"type": "complete", "id": 1}
        wrong = await client.ask("ban", {"name": 5})
        assert wrong["payload"]["errors"] == [
            {"path": "$.payload.name", "message": "expected str, got int"}
        ]
    assert calls == ["bob"]


async def test_a_message_without_an_id_is_refused_too() -> None:
    """The error has no id then."""
    ws, _ = guarded(nobody)
    async with Session(ws) as client:
        await client.send("ban", {"name": "bob"})
        answer = await client.receive()
        assert answer["payload"]["code"] == "forbidden"
        assert "id" not in answer


@pytest.mark.parametrize(
    "frame",
    [
        '{"type":"ban","type":"other","id":1,"payload":{"name":5}}',
        '{"type":"other","type":"ban","id":1,"payload":{"name":5}}',
        '{"type":"$none","type":"ban","id":1,"payload":{"name":5}}',
        '{"type":"ban","id":1,"payload":{"name":5},"type":"ban2"}',
        '{"type":"ban","id":1,"payload":{"name":1e400}}',
        '{"type":"ban","id":1,"payload":{"name":"\\ud800"}}',
    ],
)
@pytest.mark.parametrize("kind", ["plain", "class"])
async def test_an_odd_frame_is_no_way_around(kind: str, frame: str) -> None:
    """What is wrong with an envelope says nothing of the payload either."""
    ws, calls = guarded(nobody, kind)
    ws.on("other")(alone)
    ws.on("ban2")(alone)
    async with Session(ws) as client:
        code, _ = await client.error(frame)
    assert code in ("forbidden", "invalid_envelope", "invalid_json")
    assert calls == []


async def alone(conn: Connection) -> None: ...


async def test_middleware_sees_no_refused_message() -> None:
    """A message that may not be sent is none."""
    ws, calls = guarded(lambda conn: conn.context.name == "ada")

    @ws.connect
    async def arrive(conn: Connection) -> None:
        conn.context.name = "bob"

    @ws.middleware
    async def around(
        conn: Connection, envelope: Envelope, call_next: Callable[[], Awaitable[Any]]
    ) -> Any:
        calls.append(envelope)
        return await call_next()

    @ws.on("become")
    async def become(conn: Connection, *, name: str) -> None:
        conn.context.name = name

    async with Session(ws) as client:
        assert (await client.ask("ban", {"name": "eve"}))["payload"]["code"] == "forbidden"
        assert calls == []
        await client.ask("become", {"name": "ada"})
        assert (await client.ask("ban", {"name": "eve"}))["payload"] == "eve"
        assert calls[1:] == [Envelope("ban", {"name": "eve"}, 1), "eve"]


async def test_a_guard_and_its_handler_have_one_context() -> None:
    """It is the message's, where there is a provider, say."""
    ws = endpoint()

    async def only(conn: Connection) -> bool:
        NAME.set(NAME.get() + "+")
        return True

    @ws.middleware
    async def around(conn: Any, envelope: Any, call_next: Any) -> Any:
        return await call_next()

    @ws.on("name", only=only)
    async def name(conn: Connection) -> str:
        return NAME.get()

    async with Session(ws) as client:
        for _ in range(2):
            assert (await client.ask("name"))["payload"] == "nobody+"


async def test_the_time_limit_includes_the_guard() -> None:
    """A guard that hangs is stopped as a handler is."""

    async def hangs(conn: Connection) -> bool:
        await asyncio.Event().wait()
        return True

    ws, calls = guarded(hangs, handler_timeout=0.01)
    async with Session(ws) as client:
        assert (await client.ask("ban", {"name": "a"}))["payload"]["code"] == "handler_timeout"
    assert calls == []


async def test_refused_messages_count_for_the_rate() -> None:
    """Asking is not free."""
    ws, _ = guarded(nobody, rate=(2, 60.0))
    async with Session(ws) as client:
        codes = [(await client.ask("ban"))["payload"]["code"] for _ in range(3)]
    assert codes == ["forbidden", "forbidden", "rate_limited"]


async def test_a_stream_may_be_stopped_while_its_guard_is_asked() -> None:
    """The client gets its one final frame, and the generator does not begin."""
    asked = asyncio.Event()

    async def hangs(conn: Connection) -> bool:
        asked.set()
        await asyncio.Event().wait()
        return True

    ws, calls = guarded(hangs, "stream")
    async with Session(ws) as client:
        await client.send("ban", {"name": "a"}, id=7)
        await asyncio.wait_for(asked.wait(), 10)
        assert await client.ask("complete", id=7) == {"type": "complete", "id": 7}
    assert calls == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MessageError("too_young", "wait"), "too_young"),
        (falcon.HTTPConflict(), "http_409"),
        (Close(4001, "out"), 4001),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "concurrent", "stream"])
async def test_what_a_guard_raises_is_an_outcome(kind: str, error: Exception, code: Any) -> None:
    """As in a handler. One error may be raised many times, and gets no notes."""

    def only(conn: Connection) -> bool:
        raise error

    ws, calls = guarded(only, kind)
    async with Session(ws) as client:
        await client.send("ban", {"name": "a"}, id=1)
        if isinstance(error, Close):
            assert (await client.closed())[0] == code
        else:
            assert (await client.receive())["payload"]["code"] == code
    assert calls == []
    assert not hasattr(error, "__notes__")


async def test_error_handlers_take_what_a_guard_raises() -> None:
    """`forbidden` as well, if they are for `MessageError`."""
    ws, _ = guarded(nobody)

    @ws.error(MessageError)
    async def failed(conn: Connection, exc: MessageError) -> str:
        return exc.code

    async with Session(ws) as client:
        assert (await client.ask("ban"))["payload"] == "forbidden"


def raises(conn: Connection) -> bool:
    raise KeyError("secret")


async def raises_async(conn: Connection) -> bool:
    raise KeyError("secret")


def returns_none(conn: Any) -> Any:
    return None


def returns_name(conn: Any) -> Any:
    return "ada"


def returns_one(conn: Any) -> Any:
    return 1


async def returns_list(conn: Any) -> Any:
    return [1]


@pytest.mark.parametrize(
    "only", [raises, raises_async, returns_none, returns_name, returns_one, returns_list]
)
@pytest.mark.parametrize("kind", ["plain", "concurrent", "stream"])
async def test_a_bug_in_a_guard_lets_nobody_in(
    kind: str, only: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged with its place; something that is merely true is a bug, too."""
    ws, calls = guarded(only, kind)
    with caplog.at_level(logging.ERROR):
        async with Session(ws) as client:
            answer = await client.ask("ban", {"name": "a"})
            assert answer["payload"]["code"] == "internal_error"
            assert answer["id"] == 1
    assert calls == []
    assert pachinko.place_of(only) in caplog.text
    assert "secret" not in str(answer)


async def test_one_error_that_is_raised_again_is_noted_once() -> None:
    """An object that is kept does not grow with each message."""
    error = KeyError("one")

    def only(conn: Connection) -> bool:
        raise error

    ws, _ = guarded(only)
    async with Session(ws) as client:
        for _ in range(3):
            await client.ask("ban")
    assert len(error.__notes__) == 1


async def test_a_guard_is_kept_by_an_include() -> None:
    """Its error names the type as it is received."""
    ws, other = endpoint(), Pachinko()

    @other.on("ban", only=nobody)
    async def ban(conn: Connection, *, name: str) -> None: ...

    ws.include(other, prefix="admin")
    async with Session(ws) as client:
        answer = await client.ask("admin.ban", {"name": 5})
        assert answer["payload"]["message"] == "this client may not send 'admin.ban'"


async def test_a_client_that_leaves_meanwhile_is_not_waited_for() -> None:
    """The guard has `linger`, as a handler has."""
    asked = asyncio.Event()
    ended = list[str]()

    async def hangs(conn: Connection) -> bool:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("ended")
        return True

    ws, _ = guarded(hangs, linger=0.01)
    async with Session(ws) as client:
        await client.send("ban", {"name": "a"}, id=7)
        await asyncio.wait_for(asked.wait(), 10)
        await client.close()
        await until(lambda: ended)


# Mistakes


def no_parameters() -> bool:
    return True


def takes_two(conn: Connection, payload: Any) -> bool:
    return True


def optional_second(conn: Connection, strict: bool = True) -> bool:
    return True


def keyword_only(*, conn: Connection) -> bool:
    return True


def needs_keyword(conn: Connection, *, session: object) -> bool:
    return True


def takes_payload(msg: Ban) -> bool:
    return True


def takes_text(name: str) -> bool:
    return True


def returns_text(conn: Connection) -> str:
    return "yes"


def returns_nothing(conn: Connection) -> None: ...


def generator(conn: Connection) -> Iterator[bool]:
    yield True


async def async_generator(conn: Connection) -> AsyncIterator[bool]:
    yield True


class Unbound:
    def only(self) -> bool:
        return True

    def two(self, conn: Connection) -> bool:
        return True


@pytest.mark.parametrize(
    ("only", "says"),
    [
        (True, "but got True"),
        (False, "but got False"),
        ("admin", "but got 'admin'"),
        (["admin"], "but got an object of the class list"),
        (Guard, "but got the class Guard"),
        (bool, "but got the class bool"),
        (object(), "but got an object of the class object"),
        (no_parameters, "takes the wrong parameters: too many positional arguments"),
        (takes_two, "takes the wrong parameters: missing a required argument"),
        (optional_second, "takes `conn: Connection, strict: bool = True`"),
        (keyword_only, "takes the wrong parameters"),
        (needs_keyword, "takes the wrong parameters"),
        (takes_payload, "takes `msg: Ban`, but gets the connection"),
        (takes_text, "takes `name: str`, but gets the connection"),
        (returns_text, "returns str"),
        (returns_nothing, "returns None"),
        (generator, "has a `yield`"),
        (async_generator, "has a `yield`"),
        (Unbound.only, "takes `self`"),
        (Unbound.two, "takes the wrong parameters"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_no_guard_is_refused(only: Any, says: str) -> None:
    """At once, with the code to write."""
    with pytest.raises(PachinkoError) as caught:
        endpoint().on("ban", only=only)
    text = str(caught.value)
    assert says in text
    assert text.endswith(
        'write\ndef is_admin(conn: Connection) -> bool: ...\n\n@ws.on("ban", only=is_admin)'
    )


def test_a_guard_that_is_called_already_is_refused() -> None:
    """No coroutine is left over, which Python would warn of."""
    with pytest.raises(PachinkoError, match=r"but got nobody_async\(\), which is called already"):
        endpoint().on("ban", only=nobody_async(None))


def test_a_callable_without_a_signature_is_refused() -> None:
    """Nobody could tell what it takes."""

    class Odd:
        __signature__ = "none"

        def __call__(self, conn: Any) -> bool:
            return True

    with pytest.raises(PachinkoError, match="takes the wrong parameters"):
        endpoint().on("ban", only=Odd())


def test_none_is_no_guard() -> None:
    """Then everybody may send the type."""
    endpoint().on("ban", only=None)(alone)
