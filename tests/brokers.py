"""NATS and Redis, started and killed by the tests, and a bad network in front of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from ports import free_port
from support import PATIENCE

BrokerKind = Literal["nats", "redis"]


def find(kind: BrokerKind) -> str:
    """The broker's program: NATS of the wheel, Redis of the system or else of a wheel."""
    name = f"{kind}-server"
    own = Path(sys.executable).parent
    others = os.pathsep.join(
        folder for folder in os.environ["PATH"].split(os.pathsep) if Path(folder) != own
    )
    first, second = (others, str(own)) if kind == "redis" else (str(own), others)
    found = shutil.which(name, path=first) or shutil.which(name, path=second)
    if found is None:
        pytest.fail(f"the tests need {name}: apt-get install {name}")
    return found


def has_tls(kind: BrokerKind) -> bool:
    """Whether the broker was built with OpenSSL."""
    return kind == "nats" or b"libssl" in Path(find(kind)).read_bytes()


async def connect_to_nats(url: str) -> Any:
    """Connect as an administrator does. By itself, nats-py tries for two minutes."""
    import nats  # Only the tests of NATS need it.

    return await nats.connect(
        url, connect_timeout=PATIENCE, allow_reconnect=False,
        max_reconnect_attempts=1, reconnect_time_wait=0,
    )  # fmt: skip


class BrokerProcess:
    """A server of its own on a port that stays the same when it is started again."""

    def __init__(self, kind: BrokerKind, *options: str) -> None:
        self.kind, self.options = kind, options
        self.is_shared = False  # A test that stops it would leave a broken one to those behind it.
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.folder = tempfile.TemporaryDirectory(prefix="broker-")

    @property
    def url(self) -> str:
        return f"{self.kind}://127.0.0.1:{self.port}"

    async def start(self, *first: str) -> None:
        """Return once it can be used; *first* is what the program wants before all else."""
        where = ("-a", "127.0.0.1", "-p") if self.kind == "nats" else (
            "--bind", "127.0.0.1", "--save", "", "--port"
        )  # fmt: skip
        self.process = subprocess.Popen(  # noqa: ASYNC220 - it takes no time
            [find(self.kind), *first, *where, str(self.port), *self.options],
            cwd=self.folder.name, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        async with asyncio.timeout(PATIENCE):
            while True:
                assert self.process.poll() is None, f"{self.kind} has ended"
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.close()
                    break
                await asyncio.sleep(0.02)  # nobody tells when it takes connections
            if "-js" in self.options:
                await self._have_jetstream()

    async def _have_jetstream(self) -> None:
        """Wait until JetStream answers, which reads its store first."""
        from nats.errors import NoRespondersError

        client = await connect_to_nats(self.url)
        try:
            while True:
                with contextlib.suppress(NoRespondersError):
                    reply = await client.request("$JS.API.INFO", timeout=PATIENCE)
                    if "error" not in json.loads(reply.data):
                        return
                await asyncio.sleep(0.02)  # nobody tells when it answers
        finally:
            await client.close()

    def signal(self, number: int) -> None:
        assert self.process is not None
        assert not self.is_shared, "a test that stops a server needs one of its own"
        self.process.send_signal(number)

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """As a power cut would; the port stays ours. Nothing writes to its files any more."""
        assert not self.is_shared, "a test that stops a server needs one of its own"
        if self.process is not None:
            self.process.kill()
            self.process.wait(PATIENCE)
            self.process = None

    async def restart(self) -> None:
        self.kill()
        await self.start()


@contextlib.asynccontextmanager
async def running(kind: BrokerKind, *options: str) -> AsyncIterator[BrokerProcess]:
    """A running server: ``async with running("nats") as broker:``."""
    broker = BrokerProcess(kind, *options)
    try:
        await broker.start()
        yield broker
    finally:
        broker.kill()
        broker.folder.cleanup()


@contextlib.contextmanager
def shared(kind: BrokerKind, *options: str) -> Iterator[BrokerProcess]:
    """A running server for several tests, each of which has a loop of its own. None stops it."""
    broker = BrokerProcess(kind, *options)
    try:
        asyncio.run(broker.start())
        broker.is_shared = True
        yield broker
    finally:
        broker.is_shared = False
        broker.kill()
        broker.folder.cleanup()


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables for the time of a test."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


class Proxy:
    """A network between the app and a broker that can be slow, silent or cut."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.port = 0
        self.delay = 0.0  # seconds for each chunk, in each direction
        self.silent = False  # what comes is thrown away
        self.refuses = False  # new connections
        self.server: asyncio.Server | None = None
        self.writers: set[asyncio.StreamWriter] = set()
        self.tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Proxy:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.server is not None
        self.server.close()
        self.cut()
        for task in tuple(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def url(self, kind: BrokerKind) -> str:
        return f"{kind}://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """End all connections without a word."""
        for writer in tuple(self.writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        self.writers.add(writer)
        try:
            if self.refuses:
                writer.transport.abort()
                return
            with contextlib.suppress(OSError, asyncio.CancelledError):
                there, back = await asyncio.open_connection("127.0.0.1", self.target)
                self.writers.add(back)
                try:
                    await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
                finally:
                    back.transport.abort()
                    self.writers.discard(back)
        finally:
            writer.transport.abort()
            self.writers.discard(writer)
            self.tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on in order, each chunk *delay* seconds after it came."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def write() -> None:
            while True:
                due, data = await queue.get()
                if (left := due - loop.time()) > 0:
                    await asyncio.sleep(left)  # the slowness of this network
                if not self.silent:
                    writer.write(data)
                    await writer.drain()
                if not data:
                    raise ConnectionResetError

        async def read() -> None:
            while data := await reader.read(65536):
                queue.put_nowait((loop.time() + self.delay, data))
            queue.put_nowait((loop.time() + self.delay, b""))
            await asyncio.Event().wait()

        await asyncio.gather(write(), read())
