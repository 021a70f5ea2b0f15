"""The private names of Falcon that the module uses, each with what the module relies on.

`house.FALCON` has the list, with reasons. The environment ``oldest`` of tox runs this file with the
oldest release of Falcon that is supported, the others with the newest one.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

import falcon
import falcon.asgi
import house
import pytest
from support import PATIENCE

each_queue = pytest.mark.parametrize("queue", [0, 4])


class Exchange:
    """A WebSocket of Falcon's inside its responder, and the server's side of it."""

    def __init__(self, queue: int = 4) -> None:
        self.app = falcon.asgi.App()
        self.app.ws_options.max_receive_queue = queue
        self.app.add_route("/", self)
        self.incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.receive = self.incoming.get  # kept: each look-up of a method makes a new object
        self.sent: list[dict[str, Any]] = []
        self.entered: asyncio.Queue[Any] = asyncio.Queue()
        self.leave = asyncio.Event()
        self.error: Exception | None = None

    async def send(self, event: dict[str, Any]) -> None:
        self.sent.append(event)

    async def on_websocket(self, req: Any, ws: Any) -> None:
        self.entered.put_nowait(ws)
        await self.leave.wait()
        if self.error is not None:
            raise self.error

    def arrive(self, type: str, **keys: Any) -> None:
        self.incoming.put_nowait({"type": f"websocket.{type}", **keys})

    @contextlib.asynccontextmanager
    async def responder(self) -> AsyncIterator[Any]:
        """Inside, the responder of a new connection waits; its WebSocket is yielded."""
        scope = {
            "type": "websocket", "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1", "scheme": "ws", "path": "/", "raw_path": b"/",
            "query_string": b"", "root_path": "", "headers": [(b"host", b"test")],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "subprotocols": [],
        }  # fmt: skip
        self.leave.clear()
        self.arrive("connect")
        async with asyncio.timeout(PATIENCE):
            task = asyncio.create_task(self.app(scope, self.receive, self.send))
            try:
                yield await self.entered.get()
            finally:
                self.leave.set()
                await task


@each_queue
async def test__asgi_send(queue: int) -> None:
    """It is the server's own callable, so that calling it leaves out nothing but a state check."""
    exchange = Exchange(queue)
    async with exchange.responder() as ws:
        assert ws._asgi_send == exchange.send
        await ws.accept()
        await ws._asgi_send({"type": "websocket.send", "text": "x"})
    assert exchange.sent[1] == {"type": "websocket.send", "text": "x"}


async def test__asgi_send_before_the_accept() -> None:
    """Falcon's close sends by whatever is stored there, while it handles the error that it refuses.

    So a refusal may become another event, of which Falcon needs to know nothing.
    """
    exchange = Exchange()
    seen: list[Any] = []

    async def send(event: dict[str, Any]) -> None:
        seen.append((event["type"], event["code"], sys.exc_info()[1]))

    async def refuse(req: Any, resp: Any, ex: Any, params: Any, ws: Any = None) -> None:
        raise falcon.HTTPNotFound

    exchange.app.add_error_handler(KeyError, refuse)
    for error in (falcon.HTTPForbidden(), KeyError()):
        exchange.error = error
        async with exchange.responder() as ws:
            ws._asgi_send = send
    (first, second) = seen
    assert first[:2] == ("websocket.close", 3403) and isinstance(first[2], falcon.HTTPForbidden)
    assert second[:2] == ("websocket.close", 3404) and isinstance(second[2], falcon.HTTPNotFound)
    assert exchange.sent == []


async def test__asgi_receive() -> None:
    """Without a queue it is the server's own callable; Falcon calls whatever is stored there."""
    exchange = Exchange(0)
    async with exchange.responder() as ws:
        assert ws._asgi_receive is exchange.receive
        await ws.accept()

        async def receive() -> dict[str, Any]:
            return {"type": "websocket.receive", "text": "from elsewhere"}

        ws._asgi_receive = receive
        assert await ws.receive_text() == "from elsewhere"


async def test__asgi_receive_with_a_queue() -> None:
    """With a queue it is the method that reads from it."""
    async with Exchange(4).responder() as ws:
        assert ws._asgi_receive == ws._buffered_receiver.receive


@each_queue
async def test__buffered_receiver(queue: int) -> None:
    """It is there with and without a queue, and has the server's own callable."""
    exchange = Exchange(queue)
    async with exchange.responder() as ws:
        assert ws._buffered_receiver._asgi_receive is exchange.receive


async def test__max_queue() -> None:
    """0 before the accept turns the queue of this connection off, and no other one's."""
    exchange = Exchange(4)
    async with exchange.responder() as ws:
        receiver = ws._buffered_receiver
        assert receiver._max_queue == 4
        receiver._max_queue = 0
        ws._asgi_receive = receiver._asgi_receive
        await ws.accept()
        assert receiver._pump_task is None
        exchange.arrive("receive", text="hello")
        await asyncio.sleep(0.01)
        assert exchange.incoming.qsize() == 1  # nobody has read it ahead
        assert await ws.receive_text() == "hello"
        exchange.arrive("disconnect", code=4000)
        with pytest.raises(falcon.WebSocketDisconnected):
            await ws.receive_text()
    assert [event["type"] for event in exchange.sent] == ["websocket.accept"]
    async with exchange.responder() as other:
        assert other._buffered_receiver._max_queue == 4


async def test__pump_task() -> None:
    """It is None until a connection with a queue is accepted, and then the task that reads."""
    async with Exchange(4).responder() as ws:
        assert ws._buffered_receiver._pump_task is None
        await ws.accept()
        assert isinstance(ws._buffered_receiver._pump_task, asyncio.Task)
    async with Exchange(0).responder() as ws:
        await ws.accept()
        assert ws._buffered_receiver._pump_task is None


@each_queue
async def test__state(queue: int) -> None:
    """CLOSED means: nothing is sent any more, neither by the application nor by Falcon itself."""
    exchange = Exchange(queue)
    async with exchange.responder() as ws:
        await ws.accept()
        assert not ws.closed
        ws._state = type(ws._state).CLOSED
        assert ws.closed and not ws.ready and not ws.unaccepted
        with pytest.raises(falcon.WebSocketDisconnected):
            await ws.send_text("x")
        await ws.close()
    assert [event["type"] for event in exchange.sent] == ["websocket.accept"]


async def test__state_before_the_accept() -> None:
    """CLOSED also keeps Falcon from refusing a handshake that has been refused already."""
    exchange = Exchange()
    async with exchange.responder() as ws:
        assert ws.unaccepted
        ws._state = type(ws._state).CLOSED
    assert exchange.sent == []


async def test__close_code() -> None:
    """It is the code that the client closed with, and the one that Falcon's exceptions tell."""
    exchange = Exchange(0)
    async with exchange.responder() as ws:
        await ws.accept()
        assert ws._close_code is None
        exchange.arrive("disconnect", code=4001)
        with pytest.raises(falcon.WebSocketDisconnected):
            await ws.receive_text()
        assert ws._close_code == 4001
        ws._close_code = 4002
        with pytest.raises(falcon.WebSocketDisconnected) as caught:
            await ws.send_text("x")
        assert caught.value.code == 4002


def test_each_listed_name_is_pinned() -> None:
    """A name comes onto the list together with a test of what it does."""
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test__")}
    assert house.FALCON.keys() <= tests
