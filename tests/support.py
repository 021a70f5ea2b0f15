"""Real servers and clients for the tests."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
import types
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import falcon.asgi
import uvicorn
import websockets.asyncio.client
import websockets.exceptions

from pachinko import Connection, Session

PATIENCE = 15  # seconds: for what takes milliseconds, on a slow and noisy machine


def _soon(seconds: float) -> Any:
    return asyncio.sleep(seconds / 10)


# uvicorn looks every 0.1 seconds whether it has to end, and once more at its end. Thousands of
# servers, each for one test, would wait for minutes in all.
uvicorn.server.asyncio = types.SimpleNamespace(**{**vars(asyncio), "sleep": _soon})  # type: ignore[attr-defined]  # no public name


class Server:
    """A uvicorn that runs in the loop of the test, and is quick to see that it has to end."""

    def __init__(self, app: Any, **options: Any) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        # asyncio sees to it only for a socket that it has made itself. Connections inherit it.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port: int = self.socket.getsockname()[1]
        self.url = f"ws://127.0.0.1:{self.port}"
        options = {"log_level": "warning", "ws_ping_interval": None, **options}
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, **options))
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.task = asyncio.create_task(self.uvicorn.serve([self.socket]))
        await until(lambda: self.uvicorn.started or self.task is None or self.task.done())
        if self.task.done():
            self.task.result()
            raise AssertionError("the server did not start")

    async def stop(self) -> None:
        """Shut down as on SIGTERM, and wait for it."""
        self.uvicorn.should_exit = True
        assert self.task is not None
        await asyncio.wait_for(self.task, PATIENCE)


@contextlib.asynccontextmanager
async def serving(app: Any, **options: Any) -> AsyncIterator[Server]:
    """A running server for *app*: ``async with serving(app) as server:``."""
    server = Server(app, **options)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


class Client:
    """A websockets client that speaks the wire format."""

    def __init__(self, socket: websockets.asyncio.client.ClientConnection) -> None:
        self.socket = socket

    async def send(self, type: str, payload: Any = None, id: Any = None, **keys: Any) -> None:
        frame = {"type": type, **keys}
        if payload is not None:
            frame["payload"] = payload
        if id is not None:
            frame["id"] = id
        await self.socket.send(json.dumps(frame))

    async def raw(self, frame: str | bytes) -> None:
        await self.socket.send(frame)

    async def receive(self) -> dict[str, Any]:
        """The next message as a dict."""
        message: dict[str, Any] = json.loads(await asyncio.wait_for(self.socket.recv(), PATIENCE))
        return message

    async def ask(self, type: str, payload: Any = None, id: Any = 1, **keys: Any) -> dict[str, Any]:
        """Send and receive one message."""
        await self.send(type, payload, id, **keys)
        return await self.receive()

    async def error(self, frame: str) -> tuple[str, Any]:
        """Send *frame* as it is; return the code and the id of the error that answers it."""
        await self.raw(frame)
        answer = await self.receive()
        assert answer["type"] == "error", answer
        return answer["payload"]["code"], answer.get("id")

    async def closed(self) -> tuple[int | None, str | None]:
        """Wait for the server to close; return the code and the reason."""
        async with asyncio.timeout(PATIENCE):
            with contextlib.suppress(websockets.exceptions.ConnectionClosed):
                while True:  # what is still to be read would hold the close frame up
                    await self.socket.recv()
            await self.socket.wait_closed()
        return self.socket.close_code, self.socket.close_reason

    async def close(self, code: int = 1000, reason: str = "") -> None:
        await self.socket.close(code, reason)

    def cut(self) -> None:
        """Lose the connection without a word."""
        with contextlib.suppress(AttributeError):  # asyncio's, where it is lost already
            self.socket.transport.abort()


def session_of(conn: Connection) -> Session:
    """What the library does for *conn*, as long as it is served."""
    return next(each for each in conn.hub.state.serving.values() if each.conn is conn)


@contextlib.asynccontextmanager
async def connect(url: str, **options: Any) -> AsyncIterator[Client]:
    """A connected client; it is closed at the end."""
    options = {"compression": None, "ping_interval": None, "proxy": None, **options}
    async with websockets.asyncio.client.connect(url, **options) as socket:
        yield Client(socket)


class Stalled:
    """A client that has connected and does not read, on a small receive buffer."""

    def __init__(self, url: str) -> None:
        self.url = urlsplit(url)
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.setblocking(False)

    async def __aenter__(self) -> Stalled:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self.socket, (self.url.hostname, self.url.port))
        key = base64.b64encode(os.urandom(16)).decode()
        request = (
            f"GET {self.url.path} HTTP/1.1\r\nHost: {self.url.netloc}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
        )
        await loop.sock_sendall(self.socket, request.encode())
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += await asyncio.wait_for(loop.sock_recv(self.socket, 1), PATIENCE)
        assert answer.startswith(b"HTTP/1.1 101"), answer
        return self

    async def __aexit__(self, *_: object) -> None:
        self.socket.close()

    async def send(self, frame: dict[str, Any]) -> None:
        """Send *frame* as a masked text frame of less than 64 KiB."""
        data = json.dumps(frame).encode()
        size = (
            bytes([0x80 | len(data)])
            if len(data) < 126
            else bytes([0x80 | 126]) + len(data).to_bytes(2, "big")
        )
        await asyncio.get_running_loop().sock_sendall(
            self.socket, b"\x81" + size + b"\0\0\0\0" + data
        )

    async def read_all(self) -> bytes:
        """Read up to the close frame, or the end of the connection."""
        loop, data = asyncio.get_running_loop(), b""
        with contextlib.suppress(ConnectionError):
            while b"\x88" not in data[-130:]:  # no other frame of these tests holds this byte
                chunk = await asyncio.wait_for(loop.sock_recv(self.socket, 65536), PATIENCE)
                if not chunk:
                    break
                data += chunk
        return data


async def until(condition: Callable[[], object]) -> None:
    """Wait until *condition* holds; fail when it does not within `PATIENCE`."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


def new_app() -> falcon.asgi.App[Any, Any]:
    return falcon.asgi.App()
