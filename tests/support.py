"""Real servers and clients for the tests, and simulated ones of the same shape."""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import contextvars
import http.client
import itertools
import json
import os
import socket
import types
import unittest.mock
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import falcon.asgi
import uvicorn
import websockets.asyncio.client
import websockets.datastructures
import websockets.exceptions
import websockets.frames
import websockets.http11

import pachinko
from pachinko import Connection, Pachinko, Refused, Session, simulate

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
    if url.startswith("sim:"):
        line = await Line.connect(url, **options)
        yield Client(line)  # type: ignore[arg-type]  # It has what a `Client` uses.
        await line.close()
        return
    options = {"compression": None, "ping_interval": None, "proxy": None, **options}
    async with websockets.asyncio.client.connect(url, **options) as socket:
        yield Client(socket)


_simulations = dict[str, pachinko.Simulation]()  # by the beginning of their URLs
_line = contextvars.ContextVar["Line | None"]("line", default=None)


class Simulated:
    """An application in a simulation, with what tests use of a `Server`."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.sim = simulate(self._tapped, timeout=PATIENCE)
        self.url = f"sim://{id(self)}"

    async def _tapped(self, scope: Any, receive: Any, send: Any) -> None:
        """Call the application, and note each event of it as it is."""
        line = _line.get() if scope["type"] == "websocket" else None

        async def noting(event: Any) -> None:
            await send(event)
            if line is not None:
                line.note(event)

        await self.app(scope, receive, noting)

    async def spend(self, seconds: float) -> None:
        """Let so much time pass for the library, once all that can run now has run."""
        await self.sim.settle()
        await self.sim.advance(seconds)

    async def stop(self) -> None:
        """Shut down as on SIGTERM, and wait for it."""
        await self.sim.stop()


@contextlib.asynccontextmanager
async def simulated(app: Any) -> AsyncIterator[Simulated]:
    """A simulation of *app* in place of `serving`, where no socket is needed.

    Bugs of the application fail no test: those that have any look for them in the log. A hub has
    no broker, as on a server, unless it is given one.
    """
    server = Simulated(app)
    _simulations[server.url] = server.sim
    alone = unittest.mock.patch.dict(os.environ, {"PACHINKO_BACKPLANE": "memory://"})
    with alone, server.sim.bugs(BaseException) as bugs:
        try:
            async with server.sim:
                yield server
                bugs.append(Exception("none is wanted"))
        finally:
            del _simulations[server.url]


class Line:
    """A client of a simulation, with the names of websockets' connections."""

    client: pachinko.Client

    def __init__(self) -> None:
        self.frames = collections.deque[str | bytes]()
        self.end: tuple[int, str] | None = None  # of a connection that was never open
        self.body = b""
        # A dict, such as a `Client` has, holds one header of each name.
        self.response = types.SimpleNamespace(headers=websockets.datastructures.Headers())
        self.transport = self

    @classmethod
    async def connect(
        cls, url: str, *, additional_headers: Any = None, origin: str | None = None,
        subprotocols: Any = (), max_queue: Any = None,
    ) -> Line:  # fmt: skip
        """Connect to *url*. Raises what websockets raises for a refusal."""
        line, parts = cls(), urlsplit(url)
        sim = _simulations[f"{parts.scheme}://{parts.netloc}"]
        path = f"{parts.path}?{parts.query}" if parts.query else parts.path
        headers = websockets.datastructures.Headers(additional_headers or {})
        token = _line.set(line)
        try:
            line.client = await sim.connect(
                path, headers=[*headers.raw_items()], origin=origin, subprotocols=subprotocols or ()
            )
        except Refused as exc:
            if exc.status is None:
                line.end = (exc.code or 1006, exc.reason)
            else:
                raise websockets.exceptions.InvalidStatus(
                    websockets.http11.Response(
                        exc.status, http.client.responses.get(exc.status, ""),
                        line.response.headers, line.body,
                    )
                ) from exc  # fmt: skip
        finally:
            _line.reset(token)
        return line

    def note(self, event: Any) -> None:
        """Note an *event* of the application."""
        for name, value in event.get("headers") or ():
            self.response.headers[name.decode("latin-1")] = value.decode("latin-1")
        if event["type"] == "websocket.send":
            text = event.get("text")
            self.frames.append(event["bytes"] if text is None else text)
        elif event["type"] == "websocket.http.response.body":
            self.body += event.get("body", b"")

    @property
    def _end(self) -> tuple[int, str] | None:
        return self.end or self.client.end

    def _closed(self) -> websockets.exceptions.ConnectionClosed:
        code, reason = self._end or (1006, "")
        return websockets.exceptions.ConnectionClosedError(
            None if code == 1006 else websockets.frames.Close(code, reason), None
        )

    async def send(self, content: str | bytes) -> None:
        if self._end is not None:
            raise self._closed()
        if isinstance(content, str):
            await self.client.send_text(content)
        else:
            await self.client.send_bytes(content)

    async def recv(self) -> str | bytes:
        """Return the next frame. Raises `ConnectionClosed`."""
        while self.end is None:
            try:
                await self.client.receive()
                return self.frames.popleft()
            except AssertionError:
                if self.client.end is not None:
                    raise self._closed() from None
                await asyncio.sleep(0.005)  # Another task of the test may bring it about.
        if self.frames:
            return self.frames.popleft()
        raise self._closed()

    async def wait_closed(self) -> None:
        while self._end is None:
            with contextlib.suppress(AssertionError):
                await self.client.closed()
                return
            await asyncio.sleep(0.005)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        if self._end is None:
            await self.client.close(code, reason)

    def abort(self) -> None:
        if self.end is None:
            self.client.cut()

    @property
    def close_code(self) -> int | None:
        return (self._end or (None, ""))[0]

    @property
    def close_reason(self) -> str | None:
        return (self._end or (None, ""))[1]

    @property
    def subprotocol(self) -> str | None:
        return self.client.subprotocol


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
            # After its first byte, which no other frame of these tests has, a close frame has the
            # length of what follows.
            while not (end := data.partition(b"\x88")[2]) or len(end) <= end[0]:
                chunk = await asyncio.wait_for(loop.sock_recv(self.socket, 65536), PATIENCE)
                if not chunk:
                    break
                data += chunk
        return data


async def until(condition: Callable[[], object]) -> None:
    """Wait until *condition* holds; fail when it does not within `PATIENCE`."""
    turns = itertools.count()
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0 if next(turns) < 50 else 0.005)


async def turns(count: int = 10) -> None:
    """Let all else in the loop run: so often that what it does is done, without a socket."""
    for _ in range(count):
        await asyncio.sleep(0)


def new_app() -> falcon.asgi.App[Any, Any]:
    return falcon.asgi.App()


def let_clients_join(ws: Pachinko) -> None:
    """Register messages by which a client joins and leaves the group that is their payload."""

    @ws.on("join")
    async def join(conn: Connection, group: str) -> None:
        await conn.join(group)

    @ws.on("leave")
    async def leave(conn: Connection, group: str) -> None:
        await conn.leave(group)
