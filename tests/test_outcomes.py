"""What an exception of the application means: an answer, a close, or something that goes on up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import falcon
import pytest
import websockets.exceptions
from support import PATIENCE, Client, connect, new_app, simulated, until

import pachinko
from pachinko import Close, Connection, Hub, MessageError, Pachinko

Event = dict[str, Any]
LogCapture = pytest.LogCaptureFixture
Way = Callable[[], Awaitable[Any]]


def endpoint(**options: Any) -> Pachinko:
    return Pachinko(new_app(), "/ws", hub=Hub(), **options)


def errors(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [r for r in caplog.records if r.name == "pachinko" and r.levelno >= logging.ERROR]


async def forever() -> None:
    await asyncio.Event().wait()


# Ways to fail while a cancellation is under way


async def plain() -> None:
    try:
        await forever()
    finally:
        raise KeyError("clean-up")


async def after_a_pause() -> None:
    try:
        await forever()
    finally:
        await asyncio.sleep(0)
        raise KeyError("clean-up")


async def renamed() -> None:
    try:
        await plain()
    except KeyError as exc:
        raise ValueError("clean-up") from exc


async def unchained() -> None:
    try:
        await plain()
    except KeyError:
        raise ValueError("clean-up") from None


async def in_a_context() -> None:
    @contextlib.asynccontextmanager
    async def pool() -> Any:
        try:
            yield
        finally:
            raise OSError("clean-up")

    async with pool():
        await forever()


async def in_a_group() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(plain())
        group.create_task(forever())


async def in_a_nested_group() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(in_a_group())


async def within_a_time_limit() -> None:
    async with asyncio.timeout(60):
        await plain()


async def exits() -> None:
    try:
        await forever()
    finally:
        sys.exit("clean-up")


async def after_a_failed_group() -> None:
    """On Python 3.11 and 3.12 the group leaves a cancellation counted."""

    async def fail() -> None:
        raise ValueError

    with contextlib.suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            await forever()
    await plain()


async def some_turns() -> None:
    """Let a group fail. Before Python 3.13 it forgets a cancellation that comes meanwhile."""
    for _ in range(10):
        await asyncio.sleep(0)


async def swallowed() -> None:
    with contextlib.suppress(asyncio.CancelledError):
        await forever()
    raise KeyError("clean-up")


CHAINED: list[Way] = [
    plain, after_a_pause, renamed, unchained, in_a_context, in_a_group, in_a_nested_group,
    within_a_time_limit, exits, after_a_failed_group,
]  # fmt: skip
ways = pytest.mark.parametrize("way", CHAINED, ids=lambda way: way.__name__)
all_ways = pytest.mark.parametrize("way", [*CHAINED, swallowed], ids=lambda way: way.__name__)


# Workers


@all_ways
async def test_a_worker_that_fails_while_it_is_stopped_is_not_started_again(
    way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    """At a shutdown its error is logged, once, and nobody waits for it."""
    ws, began = endpoint(), list[str]()

    @ws.worker
    async def work() -> None:
        began.append("work")
        await way()

    async with simulated(ws._app):
        await until(lambda: began)
        await some_turns()
    assert began == ["work"] and not ws._workers
    (record,) = errors(caplog)
    assert record.exc_info is not None and "work()" in record.getMessage()


@all_ways
def test_a_loop_that_ends_is_not_held_up_by_such_a_worker(
    way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a shutdown of the app, `asyncio.run` cancels its tasks and returns."""
    ws, began = endpoint(), list[str]()

    @ws.worker
    async def work() -> None:
        began.append("work")
        await way()

    async def main() -> None:
        await ws.process_startup({}, {})
        await until(lambda: began)
        await some_turns()

    thread = threading.Thread(target=asyncio.run, args=[main()], daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive() and began == ["work"]
    assert len(errors(caplog)) == 1


async def test_a_worker_that_ends_with_its_cancellation_is_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither where it passes on, nor where the worker returns instead."""
    ws = endpoint()
    ws.worker(forever)

    @ws.worker
    async def returns() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await forever()

    async with simulated(ws._app):
        await some_turns()
    assert not ws._workers and not errors(caplog)


# Connections


class Served:
    """A connection whose server is the test, so that it can cancel the task."""

    def __init__(self, ws: Pachinko, *frames: str) -> None:
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.sent: list[Event] = []
        self.events.put_nowait({"type": "websocket.connect"})
        for frame in frames:
            self.put(frame)
        scope = {
            "type": "websocket",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "path": "/ws",
            "query_string": b"",
            "headers": [],
        }
        app: Any = ws._app
        self.task = asyncio.create_task(app(scope, self.events.get, self.send))

    def put(self, frame: str) -> None:
        self.events.put_nowait({"type": "websocket.receive", "text": frame})

    async def send(self, event: Event) -> None:
        self.sent.append(event)

    async def cancelled(self) -> bool:
        """Cancel the task as a server does, and wait for its end."""
        self.task.cancel()
        self.put('{"type":"after","id":2}')
        await asyncio.wait([self.task], timeout=PATIENCE)
        return self.task.cancelled()


def watched(ws: Pachinko) -> tuple[list[str], list[int | None]]:
    """What runs at *ws* from now on: a handler that must not, and disconnect handlers."""
    after, left = list[str](), list[int | None]()

    @ws.on("after")
    async def never(conn: Connection) -> None:
        after.append("handled")

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        left.append(conn.close_code)

    return after, left


def handlers(way: Way, begun: asyncio.Event) -> dict[str, Callable[[], Pachinko]]:
    """Endpoints in each of which *way* is in progress, by what runs it."""

    async def run() -> None:
        begun.set()
        await way()

    def with_handler(**options: Any) -> Pachinko:
        ws = endpoint(**options)

        @ws.on("wait")
        async def wait(conn: Connection, *, n: int = 0) -> None:
            await run()

        return ws

    def read_by_cattrs() -> Pachinko:
        ws = endpoint()

        @ws.on("wait")
        async def wait(conn: Connection, payload: dict[int, str]) -> None:
            await run()

        return ws

    def with_middleware() -> Pachinko:
        ws = with_handler()

        @ws.middleware
        async def around(conn: Connection, envelope: Any, call_next: Any) -> Any:
            return await call_next()

        return ws

    def with_fallback() -> Pachinko:
        ws = endpoint()

        @ws.fallback
        async def other(conn: Connection, frame: str) -> None:
            if "wait" in frame:
                await run()

        return ws

    def with_error_handler() -> Pachinko:
        ws = endpoint()

        @ws.on("wait")
        async def wait(conn: Connection) -> None:
            raise RuntimeError

        @ws.error(RuntimeError)
        async def failed(conn: Connection, exc: RuntimeError) -> None:
            await run()

        return ws

    def with_a_time_limit() -> Pachinko:
        return with_handler(handler_timeout=60.0)

    makers = [with_handler, read_by_cattrs, with_middleware, with_fallback, with_error_handler]
    return {maker.__name__: maker for maker in [*makers, with_a_time_limit]}


KINDS = list(handlers(plain, asyncio.Event()))


@ways
@pytest.mark.parametrize("kind", KINDS)
async def test_a_cancellation_ends_the_connection_although_its_handler_fails(
    way: Way, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A server, or an ASGI middleware's time-out, cancels it: nothing more is handled."""
    begun = asyncio.Event()
    ws = handlers(way, begun)[kind]()
    after, left = watched(ws)
    served = Served(ws, '{"type":"wait","id":1,"payload":{}}')
    await asyncio.wait_for(begun.wait(), PATIENCE)
    await some_turns()
    assert await served.cancelled()
    assert (after, left) == ([], [1006])
    assert [event["type"] for event in served.sent] == ["websocket.accept"]
    (record,) = errors(caplog)
    assert record.exc_info is not None


@pytest.mark.parametrize("exc", [MessageError("aborted"), Close(4000), falcon.HTTPNotFound()])
async def test_an_outcome_is_no_answer_to_a_cancellation(
    exc: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """What a handler raises for the client while it is cancelled is neither sent nor logged."""
    begun = asyncio.Event()

    async def translated() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            raise exc from None

    ws = handlers(translated, begun)["with_handler"]()
    after, left = watched(ws)
    served = Served(ws, '{"type":"wait","id":1}')
    await asyncio.wait_for(begun.wait(), PATIENCE)
    assert await served.cancelled()
    assert (after, left) == ([], [1006]) and not errors(caplog)


@ways
@pytest.mark.parametrize("kind", ["connect", "authenticate", "disconnect"])
async def test_a_cancellation_outlives_the_clean_up_of_other_handlers(
    way: Way, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where a connect, authenticate or disconnect handler fails; other ones still run."""
    ws, begun, left = endpoint(), asyncio.Event(), list[str]()

    async def slow(conn: Connection) -> None:
        begun.set()
        await way()

    async def who(conn: Connection, token: str | None) -> Any:
        await slow(conn)

    if kind == "authenticate":
        ws.authenticate(who)
    else:
        getattr(ws, kind)(slow)

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        left.append("left")

    served = Served(ws)
    if kind == "disconnect":
        served.events.put_nowait({"type": "websocket.disconnect", "code": 1000})
    await asyncio.wait_for(begun.wait(), PATIENCE)
    await some_turns()
    assert await served.cancelled()
    assert left == (["left"] if kind == "disconnect" else [])
    assert len(errors(caplog)) == 1 and not ws._hub.state.serving


async def fails_in_a_group() -> None:
    async def fail() -> None:
        raise KeyError("no clean-up")

    async with asyncio.TaskGroup() as group:
        group.create_task(fail())
        group.create_task(forever())


async def fails_after_a_time_out() -> None:
    try:
        async with asyncio.timeout(0):
            await forever()
    except TimeoutError:
        raise KeyError("no clean-up")  # noqa: B904 - the context is what the test is about


async def fails_after_a_failed_group() -> None:
    with contextlib.suppress(ExceptionGroup):
        await fails_in_a_group()
    raise KeyError("no clean-up")


async def fails_behind_a_task() -> None:
    task = asyncio.create_task(forever())
    await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    raise KeyError("no clean-up")


@pytest.mark.parametrize(
    "way",
    [fails_in_a_group, fails_after_a_time_out, fails_after_a_failed_group, fails_behind_a_task],
    ids=lambda way: way.__name__,
)
async def test_a_bug_that_only_looks_like_a_cancellation_is_answered(way: Way) -> None:
    """Nobody has cancelled the connection: it goes on."""
    ws = endpoint()

    @ws.on("fail")
    async def fail(conn: Connection) -> None:
        await way()

    @ws.on("echo")
    async def echo(conn: Connection, payload: int) -> int:
        return payload

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        for _ in range(2):
            assert (await client.ask("fail"))["payload"]["code"] == "internal_error"
            assert (await client.ask("echo", 5))["payload"] == 5


async def test_a_stream_that_fails_while_it_is_stopped_is_answered() -> None:
    """The client's `complete` cancels the stream's task and not the connection."""
    ws = endpoint()

    @ws.on("count")
    async def count(conn: Connection) -> Any:
        try:
            yield 1
            await forever()
        finally:
            raise KeyError("clean-up")

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        for _ in range(2):
            assert (await client.ask("count", id=7))["payload"] == 1
            answer = await client.ask("complete", id=7)
            assert (answer["id"], answer["payload"]["code"]) == (7, "internal_error")


# Disconnect handlers


async def by_send(conn: Connection) -> None:
    await conn.send("bye")


async def by_falcon(conn: Connection) -> None:
    await conn.ws.send_text("bye")


async def by_falcons_media(conn: Connection) -> None:
    await conn.ws.send_media({"type": "bye"})


async def by_a_helper(conn: Connection) -> None:
    await asyncio.create_task(by_send(conn))


async def by_a_task(conn: Connection) -> None:
    await asyncio.sleep(0)  # An eager task would fail before its group has another.
    await by_send(conn)


async def by_a_group(conn: Connection) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(by_a_task(conn))
        group.create_task(by_a_task(conn))


SENDS = [by_send, by_falcon, by_falcons_media, by_a_helper, by_a_group]


@pytest.mark.parametrize("by", SENDS)
@pytest.mark.parametrize("end", ["client", "lost", "server"])
async def test_sending_in_a_disconnect_handler_is_no_bug(
    by: Callable[[Connection], Awaitable[None]], end: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The client has gone: that handler ends quietly, and the others run."""
    ws, left = endpoint(), list[str]()

    @ws.on("close")
    async def close(conn: Connection) -> None:
        raise Close(4000)

    @ws.disconnect
    async def first(conn: Connection) -> None:
        await by(conn)

    @ws.disconnect
    async def second(conn: Connection) -> None:
        left.append(conn.id)

    caplog.set_level(logging.DEBUG, "pachinko")
    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        await until(lambda: ws._hub.connections)
        if end == "client":
            await client.close()
        elif end == "lost":
            client.cut()
        else:
            await client.send("close")
        await until(lambda: left and not ws._hub.state.serving)
    if end != "server" or by not in (by_falcon, by_falcons_media):
        assert "first()" in caplog.text
    assert not errors(caplog)


def test_only_the_documented_names_pass_for_outcomes() -> None:
    """A bug has no outcome, so that nothing of it reaches a client."""
    error, close = MessageError("code"), Close(4000)
    assert pachinko.outcome_of(error) is error and pachinko.outcome_of(close) is close
    refused = pachinko.outcome_of(falcon.HTTPNotFound(description="no such thing"))
    assert isinstance(refused, MessageError) and refused.code == "http_404"
    assert pachinko.outcome_of(KeyError("secret")) is None


def test_what_closes_a_coroutine_goes_on_up_without_a_task() -> None:
    """Python closes coroutines that a loop has left behind, when there is no loop any more."""
    for kind in (GeneratorExit, KeyboardInterrupt):
        with pytest.raises(kind):
            pachinko.pass_on(kind(), "a handler", "id")

    async def close_later() -> Any:
        coroutine: Any = pachinko._keep_working(forever, "forever")
        asyncio.get_running_loop().call_soon(lambda: None)
        coroutine.send(None)
        return coroutine

    asyncio.run(close_later()).close()


@pytest.mark.parametrize("is_group", [False, True])
async def test_a_worker_without_its_broker_logs_no_traceback(
    is_group: bool, caplog: LogCapture
) -> None:
    """The reason is in the line; the link has logged the rest, once."""
    ws = endpoint()

    @ws.worker
    async def work() -> None:
        away = pachinko.BrokerAway("nobody is there")
        raise ExceptionGroup("of sends", [away, away]) if is_group else away

    async with simulated(ws._app):
        await until(lambda: errors(caplog))
    (record,) = errors(caplog)
    assert "failed: " in record.message and "; again in 1 s" in record.message
    assert not record.exc_info


@pytest.mark.parametrize("error", [MessageError("no"), falcon.HTTPNotFound(), KeyError("a")])
async def test_an_error_that_is_returned_should_be_raised(
    error: Exception, caplog: LogCapture
) -> None:
    """The client gets `internal_error`; the log says what to do."""
    ws = endpoint()

    @ws.on("give")
    async def give(conn: Connection) -> Any:
        return error

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        assert (await client.ask("give"))["payload"]["code"] == "internal_error"
    assert f"cannot send a {type(error).__name__}; raise it instead" in caplog.text


async def load() -> int:
    return 5


@pytest.mark.parametrize("make", [load, lambda: asyncio.ensure_future(load())])
async def test_what_should_have_been_awaited_is_named(
    make: Callable[[], Any], caplog: LogCapture
) -> None:
    """The client gets `internal_error`; the log says what to write."""
    ws, given = endpoint(), list[Any]()

    @ws.on("give")
    async def give(conn: Connection) -> Any:
        given.append(make())
        return given[-1]

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        assert (await client.ask("give"))["payload"]["code"] == "internal_error"
        assert await given[0] == 5
    what = type(given[0]).__name__
    assert f"cannot send a {what}; write `await` in front of it" in caplog.text


@pytest.mark.parametrize("streams", [False, True])
async def test_a_task_that_the_application_cancels_is_answered(streams: bool) -> None:
    """A concurrent handler or a stream may say what has become of it; the connection goes on."""
    ws, tasks = endpoint(), list[asyncio.Task[Any]]()

    async def work() -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        try:
            await forever()
        except asyncio.CancelledError:
            raise MessageError("aborted") from None

    @ws.on("job", concurrent=True)
    async def job(conn: Connection) -> None:
        await work()

    @ws.on("stream")
    async def stream(conn: Connection) -> Any:
        await work()
        yield 1

    @ws.on("abort")
    async def abort(conn: Connection) -> None:
        for task in tasks:
            task.cancel()

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        await client.send("stream" if streams else "job", id=7)
        await until(lambda: tasks)
        await client.send("abort")
        answer = await client.receive()
        assert (answer["id"], answer["payload"]["code"]) == (7, "aborted")
        assert (await client.ask("abort"))["type"] == "abort.reply"


async def test_a_worker_that_cancels_itself_ends(caplog: pytest.LogCaptureFixture) -> None:
    """It has asked for that, and is not started again."""
    ws, began = endpoint(), list[str]()

    @ws.worker
    async def work() -> None:
        began.append("work")
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await forever()

    async with simulated(ws._app):
        await until(lambda: began and not ws._workers)
    assert began == ["work"] and not errors(caplog)


# Groups of exceptions


async def fail(exc: BaseException) -> None:
    await asyncio.sleep(0)  # An eager task would fail before its group has another.
    raise exc


async def by_raise(*errors: Exception) -> None:
    raise ExceptionGroup("several", errors)


async def by_nesting(*errors: Exception) -> None:
    inner = [ExceptionGroup("inner", [each]) for each in errors]
    raise BaseExceptionGroup("outer", [BaseExceptionGroup("middle", inner)])


async def by_a_task_group(*errors: Exception) -> None:
    async with asyncio.TaskGroup() as group:
        for each in errors:
            group.create_task(fail(each))
        await forever()


async def by_a_task_group_in_another(*errors: Exception) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(by_a_task_group(*errors))


async def by_an_anyio_group(*errors: Exception) -> None:
    async with anyio.create_task_group() as group:
        for each in errors:
            group.start_soon(fail, each)
        await anyio.sleep_forever()


async def by_a_body(*errors: Exception) -> None:
    """The body of the group fails, and with it the group."""
    async with asyncio.TaskGroup() as group:
        group.create_task(forever())
        await asyncio.sleep(0)
        raise errors[0] if len(errors) == 1 else ExceptionGroup("several", errors)


GROUPS = [
    by_raise, by_nesting, by_a_task_group, by_a_task_group_in_another, by_an_anyio_group, by_a_body,
]  # fmt: skip
groups = pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
PLACES = ["handler", "concurrent", "stream", "late", "middleware", "mended", "fallback", "binary"]


def failing(group: Callable[..., Awaitable[None]], *errors: Exception) -> Pachinko:
    """An endpoint that fails with *errors* in all `PLACES`."""
    ws = endpoint()

    @ws.on("handler")
    async def handler(conn: Connection) -> None:
        await group(*errors)

    @ws.on("concurrent", concurrent=True)
    async def concurrent(conn: Connection) -> None:
        await group(*errors)

    @ws.on("stream")
    async def stream(conn: Connection) -> Any:
        await group(*errors)
        yield 1

    @ws.on("late")
    async def late(conn: Connection) -> Any:
        yield 1
        await group(*errors)

    @ws.on("middleware")
    async def never(conn: Connection) -> None: ...

    @ws.middleware
    async def around(conn: Connection, envelope: Any, call_next: Any) -> Any:
        if envelope.type == "middleware":
            await group(*errors)
        return await call_next()

    @ws.on("mended")
    async def mended(conn: Connection) -> None:
        raise RuntimeError

    @ws.error(RuntimeError)
    async def mend(conn: Connection, exc: RuntimeError) -> None:
        await group(*errors)

    @ws.fallback
    async def other(conn: Connection, frame: str) -> None:
        await group(*errors)

    @ws.binary
    async def odd(conn: Connection, data: bytes) -> None:
        await group(*errors)

    return ws


async def failed(client: Client, place: str) -> dict[str, Any]:
    """The answer to what fails in *place*."""
    if place == "binary":
        await client.raw(b"x")
    else:
        await client.send(place, id=7)
    answer = await client.receive()
    if place == "late":
        assert answer.pop("more") and answer["payload"] == 1
        answer = await client.receive()
    assert answer.get("id") == (None if place in ("fallback", "binary") else 7)
    payload: dict[str, Any] = answer["payload"]
    return payload


@groups
async def test_a_group_of_one_outcome_is_that_one(group: Any, caplog: LogCapture) -> None:
    """Whatever has made the group, and wherever it is raised, the client gets the outcome."""
    ws = failing(group, MessageError("off_board", "no", x=1))
    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        for place in PLACES:
            assert await failed(client, place) == {"code": "off_board", "message": "no", "x": 1}
    assert not errors(caplog)


@groups
@pytest.mark.parametrize("place", PLACES)
async def test_a_close_in_a_group_closes(place: str, group: Any, caplog: LogCapture) -> None:
    """It is no bug, and the client learns code and reason."""
    ws = failing(group, Close(4003, "bye"))
    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        await (client.raw(b"x") if place == "binary" else client.send(place, id=7))
        assert await client.closed() == (4003, "bye")
    assert not errors(caplog)


@groups
async def test_an_http_error_in_a_group_has_its_status(group: Any) -> None:
    """Code that is shared with HTTP may run in a group too."""
    ws = failing(group, falcon.HTTPNotFound(title="gone"))
    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        for place in PLACES:
            answer = await failed(client, place)
            assert (answer["code"], answer["title"]) == ("http_404", "gone")


@pytest.mark.parametrize("group", [by_raise, by_nesting, by_a_task_group, by_a_body])
async def test_of_several_outcomes_the_first_counts(group: Any, caplog: LogCapture) -> None:
    """The order is that of the group."""
    outcomes = [MessageError("first"), falcon.HTTPNotFound(), Close(4000), MessageError("last")]
    ws = failing(group, *outcomes)
    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        for place in PLACES:
            assert (await failed(client, place))["code"] == "first"
    assert not errors(caplog)


@pytest.mark.parametrize("group", [by_raise, by_nesting, by_a_task_group, by_an_anyio_group])
async def test_a_bug_in_a_group_makes_it_a_bug(group: Any, caplog: LogCapture) -> None:
    """The client gets `internal_error`, and the log the whole group."""
    ws = failing(group, MessageError("off_board"), KeyError("a bug"), Close(4000))
    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        for place in PLACES:
            caplog.clear()
            assert (await failed(client, place))["code"] == "internal_error"
            (record,) = errors(caplog)
            assert record.exc_info and isinstance(record.exc_info[1], BaseExceptionGroup)
            assert "off_board" in caplog.text and "KeyError: 'a bug'" in caplog.text


@groups
async def test_an_error_handler_finds_its_error_in_a_group(group: Any, caplog: LogCapture) -> None:
    """The handler for its class, or for a base class, gets the error itself."""
    ws = failing(group, KeyError("a"), KeyError("b"))

    @ws.error(LookupError)
    async def found(conn: Connection, exc: LookupError) -> MessageError:
        return MessageError("missing", repr(exc))

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        for place in PLACES:
            if place != "mended":  # An error handler's own error has no handler.
                answer = await failed(client, place)
                assert answer == {"code": "missing", "message": "KeyError('a')"}
    assert not errors(caplog)


@pytest.mark.parametrize("kinds", [[ExceptionGroup], [ExceptionGroup, KeyError], [Exception]])
async def test_an_error_handler_for_groups_gets_them_whole(kinds: list[type[Exception]]) -> None:
    """So does one for any `Exception`, unless the group means an outcome or has a handler."""
    ws = failing(by_nesting, KeyError("a"), ValueError("b"))
    seen: list[Exception] = []

    async def found(conn: Connection, exc: Exception) -> MessageError:
        seen.append(exc)
        return MessageError("seen")

    for kind in kinds:

        @ws.error(kind)
        async def handle(conn: Connection, exc: Exception) -> MessageError:
            return await found(conn, exc)

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        assert (await failed(client, "handler"))["code"] == "seen"
    assert [type(each) for each in seen] == [ExceptionGroup]


@groups
async def test_a_group_in_a_connect_handler_refuses(group: Any, caplog: LogCapture) -> None:
    """What has a status refuses the handshake, and a `Close` closes, as without a group."""
    raised = [falcon.HTTPForbidden(), falcon.HTTPStatus(451), Close(4003, "bye")]
    ws, exc = endpoint(), list[Exception](raised)

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await group(exc.pop(0))

    async with simulated(ws._app) as server:
        for status in (403, 451):
            with pytest.raises(websockets.exceptions.InvalidStatus, match=str(status)):
                async with connect(server.url + "/ws"):
                    pass
        async with connect(server.url + "/ws") as client:
            assert await client.closed() == (4003, "bye")
    assert not errors(caplog)


@pytest.mark.parametrize("is_scoped", [False, True])
async def test_what_is_raised_after_a_group_counts(is_scoped: bool, caplog: LogCapture) -> None:
    """Before Python 3.13 a `TaskGroup` that fails leaves a cancellation counted."""
    ws = endpoint()

    async def forgive() -> None:
        with contextlib.suppress(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                group.create_task(fail(ValueError()))

    @ws.connect
    async def arrive(conn: Connection) -> None:
        if conn.req.get_param("no"):
            await forgive()
            raise falcon.HTTPNotFound

    @ws.on("x")
    async def x(conn: Connection) -> None:
        await forgive()
        raise MessageError("meant")

    if is_scoped:

        @ws.middleware
        async def around(conn: Connection, envelope: Any, call_next: Any) -> Any:
            return await call_next()

    async with simulated(ws._app) as server:
        with pytest.raises(websockets.exceptions.InvalidStatus, match="404"):
            async with connect(server.url + "/ws?no=1"):
                pass
        async with connect(server.url + "/ws") as client:
            assert (await client.ask("x"))["payload"]["code"] == "meant"
    assert not errors(caplog)


@groups
async def test_a_group_in_authenticate_refuses(group: Any, caplog: LogCapture) -> None:
    """The same holds for who authenticates clients."""
    ws, exc = endpoint(), list[Exception]([falcon.HTTPForbidden(), Close(4003, "bye")])

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        await group(exc.pop(0))
        return None

    async with simulated(ws._app) as server:
        with pytest.raises(websockets.exceptions.InvalidStatus):
            async with connect(server.url + "/ws"):
                pass
        async with connect(server.url + "/ws") as client:
            assert await client.closed() == (4003, "bye")
    assert not errors(caplog)


@groups
async def test_a_bug_in_a_group_of_authenticate_hides_its_text(
    group: Any, caplog: LogCapture
) -> None:
    """The log has the class and the place, and no token."""
    ws = endpoint()

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        await group(
            MessageError("x"), KeyError("".join(["s3", "cret"]))
        )  # a traceback shows this line
        return None

    async with simulated(ws._app) as server:
        with pytest.raises(websockets.exceptions.InvalidStatus):
            async with connect(server.url + "/ws"):
                pass
    assert "s3cret" not in caplog.text and "failed: KeyError" in caplog.text


async def test_a_group_that_sends_to_a_client_that_has_gone_is_quiet(caplog: LogCapture) -> None:
    """A departure is no bug, also in a group beside a cancellation."""
    ws, gone = endpoint(linger=0.05), asyncio.Event()
    ended: list[BaseException] = []

    @ws.on("talk", concurrent=True)
    async def talk(conn: Connection, *, waits: bool) -> None:
        async def send() -> None:
            await gone.wait()
            await conn.send("n", 1)

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(send())
                group.create_task(send())
                if waits:
                    group.create_task(forever())
        except BaseException as exc:
            ended.append(exc)
            raise

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        for waits in (False, True):
            await client.send("talk", {"waits": waits})
        await until(lambda: any(session.tasks for session in ws._hub.state.serving.values()))
        client.cut()
        await until(lambda: all(conn.closed for conn in ws._hub.connections))
        gone.set()
        await until(lambda: len(ended) == 2 and not ws._hub.state.serving)
    assert all(isinstance(exc, BaseExceptionGroup) for exc in ended)
    assert not errors(caplog)


DISCONNECTED = falcon.WebSocketDisconnected(1001)
WHAT_COUNTS: list[tuple[list[BaseException], type[BaseException] | None]] = [
    ([asyncio.CancelledError()], asyncio.CancelledError),
    ([GeneratorExit()], asyncio.CancelledError),
    ([DISCONNECTED], falcon.WebSocketDisconnected),
    ([DISCONNECTED, asyncio.CancelledError()], asyncio.CancelledError),
    ([GeneratorExit(), DISCONNECTED], asyncio.CancelledError),
    ([DISCONNECTED, asyncio.CancelledError(), MessageError("x")], MessageError),
    ([DISCONNECTED, KeyError()], None),
    ([GeneratorExit(), Close(4000)], Close),
    ([KeyError(), KeyboardInterrupt()], KeyboardInterrupt),
    ([MessageError("x"), SystemExit()], None),
]


@pytest.mark.parametrize(("several", "kind"), WHAT_COUNTS)
def test_what_a_group_means(several: list[BaseException], kind: type[BaseException] | None) -> None:
    """What a stop or a departure causes counts only alone; a bug makes the group a bug."""
    for group in (
        BaseExceptionGroup("flat", several),
        BaseExceptionGroup("outer", [BaseExceptionGroup("inner", several)]),
    ):
        found = pachinko.single(group)
        assert found is group if kind is None else type(found) is kind
    (first, *_) = several
    assert pachinko.single(first) is first
