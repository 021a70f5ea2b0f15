"""What is read from one client, and ahead of a handler that waits."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import falcon
import pytest
from support import (
    PATIENCE,
    Stalled,
    connect,
    new_app,
    serving,
    session_of,
    simulated,
    turns,
    until,
)
from test_sending import BIG, endpoint, named, served, waiting

import pachinko
from pachinko import Connection, Hub, Pachinko


def note_tasks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by the name of each coroutine that the library starts a task for."""
    names: list[str] = []
    start = pachinko.start_task

    def start_task(coroutine: Any) -> Any:
        names.append(coroutine.__name__)
        return start(coroutine)

    def factory(loop: Any, coroutine: Any, **options: Any) -> Any:
        if coroutine.cr_code.co_filename == pachinko.__file__:
            names.append(coroutine.__name__)
        return asyncio.Task(coroutine, loop=loop, **options)

    monkeypatch.setattr(pachinko, "start_task", start_task)
    asyncio.get_running_loop().set_task_factory(factory)
    return names


async def test_messages_cost_no_task_while_handlers_do_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thousand are read, handled and answered without one."""
    names = note_tasks(monkeypatch)
    ws, _ = endpoint()
    async with serving(ws._app) as server, connect(f"{server.url}/a", max_queue=None) as client:
        for n in range(1000):
            await client.send("echo", n, id=n)
        for n in range(1000):
            assert (await client.receive())["payload"] == n
        assert names == []


@pytest.mark.parametrize("depth", [0, 1, 20])
async def test_a_handler_that_waits_is_watched(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One task reads ahead, however deep in the handler's code the wait is."""
    names = note_tasks(monkeypatch)
    ws, _ = endpoint()
    gate = asyncio.Event()

    async def wait(depth: int) -> bool:
        return await (wait(depth - 1) if depth else gate.wait())

    @ws.on("wait")
    async def handler(conn: Connection) -> bool:
        return await wait(depth)

    async with served(ws) as server, connect(f"{server.url}/a") as client:
        await client.ask("echo", 1)
        await client.send("wait", id=2)
        await until(lambda: names)
        gate.set()
        assert (await client.receive())["id"] == 2
        assert names == ["_read_ahead"]


@pytest.mark.parametrize("end", ["close", "cut"])
async def test_a_client_that_leaves_a_waiting_handler_is_noticed(end: str) -> None:
    """Meanwhile the handler goes on; what came before the end is handled behind it."""
    ws, left = endpoint()
    gate, seen = asyncio.Event(), []

    @ws.on("wait")
    async def wait(conn: Connection) -> None:
        await gate.wait()
        seen.append("waited")

    @ws.on("note")
    async def note(conn: Connection, payload: Any) -> None:
        seen.append(payload)

    async with served(ws) as server, connect(f"{server.url}/a") as client:
        await until(lambda: ws._hub.connections)
        conn = named(ws, "a")
        await client.send("wait")
        for n in range(5):
            await client.send("note", n)
        await until(lambda: len(session_of(conn).incoming._inbox) == 5)
        if end == "close":
            await client.close(4001)
        else:
            client.cut()
        await until(lambda: conn.closed)
        assert seen == [] and left == []
        gate.set()
        await until(lambda: left)
        assert seen == ["waited", 0, 1, 2, 3, 4]


async def test_frames_read_ahead_keep_their_order_with_those_behind() -> None:
    """More than are read ahead at once, with handlers that wait and ones that do not."""
    ws, _ = endpoint()

    @ws.on("pause")
    async def pause(conn: Connection, payload: Any) -> Any:
        for _ in range(payload % 5):
            await asyncio.sleep(0)
        return payload

    async with served(ws) as server, connect(f"{server.url}/a", max_queue=None) as client:
        for n in range(200):
            await client.send("pause" if n % 3 else "echo", n, id=n)
        assert [(await client.receive())["id"] for n in range(200)] == list(range(200))


async def test_a_cancellation_that_a_handler_left_behind_harms_nobody() -> None:
    """Neither the next message, nor one whose handler raises `CancelledError` by itself."""
    ws, left = endpoint()
    counts: list[int] = []

    @ws.on("stray")
    async def stray(conn: Connection) -> str:
        async def fail() -> None:
            raise ValueError

        with contextlib.suppress(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                group.create_task(fail())
        task = asyncio.current_task()
        assert task is not None
        if not task.cancelling():  # on newer Pythons a task group leaves nothing behind
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        return "stray"

    @ws.on("odd")
    async def odd(conn: Connection) -> None:
        task = asyncio.current_task()
        assert task is not None
        counts.append(task.cancelling())
        raise asyncio.CancelledError

    async with served(ws) as server, connect(f"{server.url}/a") as client:
        for type in ("stray", "odd", "stray", "echo", "odd", "odd"):
            await client.send(type, id=type)
        answers = [await client.receive() for _ in range(6)]
        types = [answer["type"] for answer in answers]
        assert types == ["stray.reply", "error", "stray.reply", "echo.reply", "error", "error"]
        assert counts == [0, 0, 0] and not left


async def test_a_reply_waits_for_its_client_although_a_cancellation_is_left() -> None:
    """A stray count of the handler does not end the connection when the wait is over."""
    ws, left = endpoint(send_timeout=0.1)

    @ws.on("stray")
    async def stray(conn: Connection) -> str:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        return BIG

    async with served(ws) as server, Stalled(f"{server.url}/slow") as client:
        await waiting(ws, client, "stray")
        await until(lambda: not ws._hub.state.serving)
        assert left == [("slow", 1013)]


# Falcon's receive queue


@pytest.mark.parametrize("queue", [0, 1, 4, 16])
@pytest.mark.parametrize("by_hand", [False, True])
async def test_the_apps_receive_queue_stays_as_it_is(queue: int, by_hand: bool) -> None:
    """It is off for an endpoint's own connections only, however that is routed."""
    app, lengths = new_app(), list[int]()
    app.ws_options.max_receive_queue = queue
    ws = Pachinko(hub=Hub()) if by_hand else Pachinko(app, "/ws", hub=Hub())
    if by_hand:
        app.add_route("/ws", ws)

    @ws.on("wait")
    async def wait(conn: Connection, n: int) -> int:
        lengths.append(len(conn.ws._buffered_receiver._messages))
        await turns()
        return n

    async with simulated(app) as server, connect(server.url + "/ws") as client:
        for n in range(20):
            await client.send("wait", n, id=n)
        assert [(await client.receive())["payload"] for n in range(20)] == list(range(20))
    assert app.ws_options.max_receive_queue == queue
    assert lengths == [0] * 20


async def test_other_routes_keep_the_queue_that_they_had() -> None:
    """A plain Falcon route that only looks at `ws.closed` notices that its client leaves."""
    app, ended = new_app(), asyncio.Event()
    Pachinko(app, "/ws", hub=Hub())

    class Ticker:
        async def on_websocket(self, req: Any, ws: Any) -> None:
            await ws.accept()
            while not ws.closed:
                await asyncio.sleep(0.001)
            ended.set()

    app.add_route("/ticks", Ticker())
    async with serving(app) as server:
        async with connect(server.url + "/ticks"):
            pass
        await asyncio.wait_for(ended.wait(), PATIENCE)


@pytest.mark.parametrize("queue", [0, 2])
async def test_a_socket_that_a_middleware_has_accepted_is_read_through_its_queue(
    queue: int,
) -> None:
    """The queue runs already, and what it holds comes first, in order; then the client's code."""
    app, codes = new_app(), list[int | None]()
    app.ws_options.max_receive_queue = queue

    class Accepting:
        async def process_request_ws(self, req: Any, ws: Any) -> None:
            await ws.accept()
            await turns()

    app.add_middleware(Accepting())
    ws = Pachinko(app, "/ws", hub=Hub())

    @ws.on("wait")
    async def wait(conn: Connection, n: int) -> int:
        await turns()
        return n

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        codes.append(conn.close_code)

    async with simulated(app) as server:
        async with connect(server.url + "/ws") as client:
            for n in range(10):
                await client.send("wait", n, id=n)
            assert [(await client.receive())["payload"] for n in range(10)] == list(range(10))
            await client.close(4000)
        await until(lambda: codes)
    assert codes == [4000]


@pytest.mark.parametrize("end", ["close", "cut", "server"])
async def test_falcons_socket_is_told_that_its_client_has_gone(end: str) -> None:
    """Pachinko reads past it, so `ws.closed` and what is sent by it would else be wrong."""
    ws, seen = Pachinko(new_app(), "/ws", hub=Hub()), list[bool]()

    @ws.on("close")
    async def close(conn: Connection) -> None:
        await conn.close(4000)

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        if end != "server":  # Then the close frame may still be on its way.
            with pytest.raises(falcon.WebSocketDisconnected):
                await conn.ws.send_text("too late")
        seen.append(conn.ws.closed or end == "server")

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        await until(lambda: ws._hub.connections)
        if end == "close":
            await client.close()
        elif end == "cut":
            client.cut()
        else:
            await client.send("close")
        await until(lambda: seen and not ws._hub.state.serving)
    assert seen == [True]
