"""The load client: as little as it takes to ask and to count, so that the server is the bottleneck.

Frames are masked beforehand, answers are split but not decoded, and of what a group hears only the
bytes are counted.
"""

from __future__ import annotations

import asyncio
import collections
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

from benchmarks.processes import Pipe, allow_open_files, answer_all

MASK = b"\x37\xfa\x21\x3d"
TEXT, CLOSE = 0x81, 0x88  # the first byte of an unfragmented frame
AT_ONCE = 50  # handshakes


def masked(text: str) -> bytes:
    """A text frame from a client (RFC 6455, 5.2)."""
    data = text.encode()
    size = len(data)
    key = int.from_bytes((MASK * (size // 4 + 1))[:size])
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2)
    return bytes([TEXT]) + length + MASK + (int.from_bytes(data) ^ key).to_bytes(size)


def split(data: bytes) -> tuple[list[bytes], bytes]:
    """The payloads of the text frames from a server, and what is left: the start of another."""
    payloads, at = [], 0
    while len(data) >= at + 2:
        size, start = data[at + 1], at + 2
        if size == 126:
            size, start = int.from_bytes(data[at + 2 : at + 4]), at + 4
        elif size == 127:
            size, start = int.from_bytes(data[at + 2 : at + 10]), at + 10
        if len(data) < start + size:
            break
        if data[at] == TEXT:
            payloads.append(data[start : start + size])
        elif data[at] == CLOSE:
            code = int.from_bytes(data[start : start + 2])
            raise ConnectionError(f"the server closed with {code}")
        at = start + size
    return payloads, data[at:]


class Client(asyncio.Protocol):
    """One WebSocket. `on_data` is what it does with what comes."""

    transport: asyncio.Transport

    def __init__(self, crowd: Crowd) -> None:
        self.crowd = crowd
        self.on_data: Callable[[bytes], None] = self.shake_hands
        self.rest = b""  # the start of a frame
        self.texts: collections.deque[str] = collections.deque()
        self.waiter: asyncio.Future[None] | None = None
        self.next = 0  # frame to send
        self.received = 0  # bytes
        self.is_closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.on_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.is_closing:
            self.crowd.arrived(1)
        else:
            self.crowd.fail(exc or ConnectionError("the server closed the connection"))

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def shake_hands(self, data: bytes) -> None:
        self.rest += data
        head, end, rest = self.rest.partition(b"\r\n\r\n")
        if end:
            self.rest = b""
            if not head.startswith(b"HTTP/1.1 101"):
                raise ConnectionError(head.partition(b"\r\n")[0].decode())
            self.on_data = self.keep_texts
            self.texts.append("")  # connected
            self.keep_texts(rest)

    def keep_texts(self, data: bytes) -> None:
        self.received += len(data)
        payloads, self.rest = split(self.rest + data)
        self.texts.extend(payload.decode() for payload in payloads)
        self.wake()

    def count_bytes(self, data: bytes) -> None:
        self.crowd.arrived(len(data))

    def work(self, data: bytes) -> None:
        """Count answers, and ask for as many more."""
        payloads, self.rest = split(self.rest + data if self.rest else data)
        self.send_next(len(payloads))
        self.crowd.arrived(len(payloads))

    def send_next(self, count: int) -> None:
        crowd = self.crowd
        count = min(count, crowd.unsent)
        if count:
            crowd.unsent -= count
            self.transport.write(b"".join(crowd.frames[self.next : self.next + count]))
            self.next = (self.next + count) % (len(crowd.frames) // 2)

    async def text(self) -> str:
        """The next one."""
        while not self.texts:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        return self.texts.popleft()

    def close(self) -> None:
        self.is_closing = True
        self.on_data = lambda data: None
        self.transport.write(b"\x88\x82" + bytes(4) + (1000).to_bytes(2))  # a mask of zeros


class Crowd:
    """Clients of one server, and what they wait for together."""

    def __init__(self) -> None:
        self.clients: list[Client] = []
        self.missing = 0  # answers, bytes or connections, whatever is waited for
        self.unsent = 0  # requests
        self.frames: list[bytes] = []  # twice the same, so that a slice never wraps
        self.all_there: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.failure: Exception | None = None

    def arrived(self, count: int) -> None:
        self.missing -= count
        if self.missing <= 0 and not self.all_there.done():
            self.all_there.set_result(None)

    def fail(self, exc: Exception) -> None:
        self.failure = exc
        if not self.all_there.done():
            self.all_there.set_exception(exc)
        for client in self.clients:
            if client.waiter is not None and not client.waiter.done():
                client.waiter.set_exception(exc)

    def expect(self, count: int) -> asyncio.Future[None]:
        """Done when *count* more have arrived."""
        if self.failure is not None:
            raise self.failure
        self.missing = count
        self.all_there = asyncio.get_running_loop().create_future()
        return self.all_there


async def connect(
    crowd: Crowd, about: dict[str, Any], path: str, buffer: int | None = None
) -> Client:
    """Shake hands and go through the prelude. *buffer* limits what the system receives."""
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    sock.setblocking(False)
    if buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    await loop.sock_connect(sock, ("127.0.0.1", about["port"]))
    _, client = await loop.create_connection(lambda: Client(crowd), sock=sock)
    crowd.clients.append(client)
    client.transport.write(
        f"GET {about[path]} HTTP/1.1\r\nHost: 127.0.0.1:{about['port']}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        "Sec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    await client.text()
    for text, start in about["prelude"]:
        if text is not None:
            client.transport.write(masked(text))
        if start is not None and not (answer := await client.text()).startswith(start):
            raise ConnectionError(f"expected {start!r}, got {answer!r}")
    return client


async def timed(work: Awaitable[Any]) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = await work
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall, "share": cpu / wall, "result": result}


class Load:
    """The commands. *about* is what the server says about itself, *key* names a crowd."""

    def __init__(self) -> None:
        self.crowds: dict[str | None, Crowd] = {}

    def about(self) -> dict[str, Any]:
        return {"files": allow_open_files()}

    async def open(self, key: str, about: dict[str, Any], count: int, **options: Any) -> None:
        """Connect *count* clients."""
        crowd = self.crowds[key] = Crowd()
        for start in range(0, count, AT_ONCE):
            async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
                for _ in range(start, min(start + AT_ONCE, count)):
                    tasks.create_task(connect(crowd, about, **options))

    async def close(self, key: str | None) -> None:
        """Close in order those that read, then all."""
        crowd = self.crowds.pop(key, None)
        if crowd is None:
            return
        crowd.failure = None
        reading = [client for client in crowd.clients if client.transport.is_reading()]
        everybody = crowd.expect(len(reading))
        for client in reading:
            client.close()
        if reading:
            await asyncio.wait([everybody], timeout=1)
        for client in crowd.clients:
            client.is_closing = True
            client.transport.abort()

    async def sample(self, key: str, frames: list[str]) -> list[str]:
        """The answers to *frames*, one after the other."""
        client, texts = self.crowds[key].clients[0], []
        async with asyncio.timeout(30):
            for frame in frames:
                client.transport.write(masked(frame))
                texts.append(await client.text())
        return texts

    async def hear(self, key: str, frame: str) -> dict[str, Any]:
        """One group send that is read: all the texts, and how many bytes."""
        clients = self.crowds[key].clients
        for client in clients:
            client.received = 0
        clients[0].transport.write(masked(frame))
        async with asyncio.timeout(30):
            texts = [await client.text() for client in (*clients, clients[0])]
        await asyncio.sleep(0.1)  # for more than there should be
        texts.extend(text for client in clients for text in client.texts)
        return {"texts": texts, "bytes": sum(client.received for client in clients)}

    async def dispatch(
        self, key: str, frames: list[str], messages: int, window: int
    ) -> dict[str, Any]:
        """Ask for *messages*, each client with *window* on their way."""
        crowd = self.crowds[key]
        crowd.frames, crowd.unsent = [masked(frame) for frame in frames] * 2, messages

        async def work() -> None:
            everything = crowd.expect(messages)
            for client in crowd.clients:
                client.on_data = client.work
                client.send_next(window)
            async with asyncio.timeout(60):
                await everything

        return await timed(work())

    async def group(
        self,
        key: str,
        frame: str,
        sends: int,
        size: int,
        patience: float,
        stalled: str | None = None,
    ) -> dict[str, Any]:
        """Ask for *sends*, each when the *size* bytes of the one before are all there.

        Nobody of the crowd *stalled* reads meanwhile. The result is whether it came to the end;
        it does not when nothing arrives for *patience* seconds.
        """
        crowd, shout = self.crowds[key], masked(frame)
        for client in crowd.clients:
            client.on_data = client.count_bytes
        for client in self.crowds[stalled].clients if stalled else ():
            client.transport.pause_reading()

        async def work() -> bool:
            for _ in range(sends):
                everything = crowd.expect(size)
                crowd.clients[0].transport.write(shout)
                while not everything.done():
                    before = crowd.missing
                    await asyncio.wait([everything], timeout=patience)
                    if not everything.done() and crowd.missing == before:
                        return False
                everything.result()
                if crowd.missing < 0:
                    raise ValueError(f"{-crowd.missing} bytes more than expected")
            return True

        return await timed(work())

    async def come_and_go(self, about: dict[str, Any], path: str, count: int) -> dict[str, Any]:
        """Connect and disconnect *count* times, several at once."""

        async def one_by_one(times: int) -> None:
            for _ in range(times):
                crowd = Crowd()
                client = await connect(crowd, about, path)
                gone = crowd.expect(1)
                client.close()
                await gone

        async def work() -> None:
            async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
                for _ in range(16):
                    tasks.create_task(one_by_one(count // 16))

        return await timed(work())


def run(pipe: Pipe) -> None:
    """A child of the harness."""
    answer_all(pipe, Load)
