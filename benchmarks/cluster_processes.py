"""The processes of one app, the broker between them, and the clients of all."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import psutil
import uvloop

from benchmarks import load, peers, server
from benchmarks.processes import (
    CORES,
    PINNED,
    Child,
    ChildFailed,
    Pipe,
    allow_open_files,
    answer_all,
    explained,
)

Kind = Literal["nats", "redis"]
KINDS: tuple[Kind, ...] = ("nats", "redis")
PATIENCE = 30.0  # seconds, for what takes a few at most


@dataclass(frozen=True)
class Entry:
    """What is measured: an app, how many processes of it, and the broker between them."""

    label: str
    module: str
    broker: Kind | None
    processes: int = 2
    options: tuple[str, ...] = ()  # of its `create_app`, behind the URL

    @property
    def parts(self) -> int:
        """How many clients have to ask for a message that all get."""
        return 1 if self.broker else self.processes


def find(kind: Kind) -> str:
    """The broker's program: of the wheel that is installed, or of the system."""
    name = f"{kind}-server"
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise SystemExit(f"the benchmark needs {name}: apt-get install {name}")
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


class Broker:
    """A server on a port that stays the same when it is started again. On the last core."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.port = free_port()
        self.folder = tempfile.TemporaryDirectory(prefix="broker-")
        self.start()

    @property
    def url(self) -> str:
        return f"{self.kind}://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Return once it takes connections."""
        where = {"nats": ("-a", "127.0.0.1", "-p"), "redis": ("--bind", "127.0.0.1", "--port")}
        save_nothing = ("--save", "") if self.kind == "redis" else ()
        self.process = subprocess.Popen(
            [find(self.kind), *where[self.kind], str(self.port), *save_nothing],
            cwd=self.folder.name, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if PINNED:
            psutil.Process(self.process.pid).cpu_affinity([CORES[-1]])
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise ChildFailed(f"{self.kind} does not start")
            time.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self.folder.cleanup()

    def cpu(self) -> float:
        """Seconds so far, of all its threads."""
        if psutil.LINUX:
            # The number of another process's CPU clock (clock_getcpuclockid): what /proc tells
            # is in steps of 10 ms.
            return time.clock_gettime(~self.process.pid << 3 | 2)
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def memory(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)


class Desk(server.Desk):
    def shout(self, size: int, count: int = 1) -> str:
        return self.wire.shout(count, "x" * size)


def run_server(pipe: Pipe, module: str, url: str, *options: str) -> None:
    """A child: one process of an app."""
    with explained(pipe):
        allow_open_files()
        peer = import_module(f"benchmarks.peers.cluster_{module}")
        create_app = functools.partial(peer.create_app, url, *options)
        served = types.SimpleNamespace(**{**vars(peer), "create_app": create_app})
        with (
            mock.patch.object(peers, "load", return_value=served),
            mock.patch.object(server, "Desk", Desk),
        ):
            uvloop.run(server.serve(module, pipe))


class Load(load.Load):
    """The clients of all processes of an app are one crowd. The first is of the first process."""

    async def grow(self, key: str, abouts: Sequence[dict[str, Any]], path: str, count: int) -> None:
        """Connect until there are *count*, one process after the other."""
        if key not in self.crowds:
            self.crowds[key] = load.Crowd()
        crowd = self.crowds[key]
        while (begun := len(crowd.clients)) < count:
            # The first of each process one by one: some of them will ask.
            end = min(begun + (load.AT_ONCE if begun >= len(abouts) else 1), count)
            async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as tasks:
                for n in range(begun, end):
                    about = {**abouts[n % len(abouts)], "path": path}
                    tasks.create_task(load.connect(crowd, about, "path"))

    async def hear_all(self, key: str, frame: str, askers: int, each: int) -> dict[str, Any]:
        """What comes when *askers* ask and *each* client is to get so many: texts and bytes."""
        clients = self.crowds[key].clients
        for client in clients:
            client.received, client.on_data = 0, client.keep_texts
        for client in clients[:askers]:
            client.transport.write(load.masked(frame))
        texts: list[str] = []
        async with asyncio.timeout(PATIENCE):
            for client in [*clients * each, *clients[:askers]]:
                texts.append(await client.text())
        await asyncio.sleep(0.1)  # for more than there should be
        texts.extend(text for client in clients for text in client.texts)
        return {"texts": texts, "bytes": sum(client.received for client in clients)}

    async def ask_all(
        self, key: str, frame: str, askers: int, size: int, sends: int
    ) -> dict[str, Any]:
        """Let *askers* ask *sends* times, each when all the *size* bytes before are there."""
        crowd, shout = self.crowds[key], load.masked(frame)
        for client in crowd.clients:
            client.on_data = client.count_bytes

        async def work() -> None:
            for _ in range(sends):
                everything = crowd.expect(size)
                for client in crowd.clients[:askers]:
                    client.transport.write(shout)
                async with asyncio.timeout(PATIENCE):
                    await everything
                if crowd.missing < 0:
                    raise ValueError(f"{-crowd.missing} bytes more than expected")

        return await load.timed(work())

    async def ask(self, key: str, frame: str, start: str) -> str:
        """The answer to the first client, which is known by its *start*."""
        client = self.crowds[key].clients[0]
        client.transport.write(load.masked(frame))
        async with asyncio.timeout(100):
            while not (text := await client.text()).startswith(start):
                pass
            return text

    async def delays(self, key: str, frame: str, count: int, every: float) -> list[float]:
        """Seconds from the time that each of *count* messages tells until the last client has it.

        One is asked for *every* so many seconds, or when the one before is there.
        """
        crowd, ask, loop = self.crowds[key], load.masked(frame), asyncio.get_running_loop()
        first, delays = crowd.clients[0], list[float]()
        for client in crowd.clients:
            client.received, client.on_data = 0, client.keep_texts
        first.transport.write(ask)
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(client.text() for client in crowd.clients))
        size = sum(client.received for client in crowd.clients)
        for client in crowd.clients[1:]:
            client.on_data = client.count_bytes

        def keep_and_count(data: bytes) -> None:
            first.keep_texts(data)
            first.count_bytes(data)

        first.on_data = keep_and_count
        due = loop.time()
        for _ in range(count):
            due += every
            await asyncio.sleep(due - loop.time())
            everything = crowd.expect(size)
            first.transport.write(ask)
            async with asyncio.timeout(PATIENCE):
                await everything
            now = time.monotonic()
            _, _, text = first.texts.popleft().partition('"text":"')
            delays.append(now - float(text[:20]))
        return delays


def run_load(pipe: Pipe) -> None:
    """A child: all clients."""
    answer_all(pipe, Load)


class Cluster:
    """An entry that runs. Its processes are on the cores of these numbers, in turn."""

    def __init__(self, entry: Entry, *, cores: Sequence[int] = (0,)) -> None:
        self.entry = entry
        self.broker = Broker(entry.broker) if entry.broker else None
        url = self.broker.url if self.broker else "memory://"
        self.processes = [
            Child(run_server, entry.module, url, *entry.options, core=cores[n % len(cores)])
            for n in range(entry.processes)
        ]

    @property
    def abouts(self) -> list[dict[str, Any]]:
        """What each process says about itself. Waits until it is up."""
        return [process.about for process in self.processes]

    def usages(self) -> list[dict[str, Any]]:
        return [process.ask("usage") for process in self.processes]

    def cpu(self) -> tuple[float, ...]:
        """Seconds so far: the broker's, and those of each process."""
        broker = self.broker.cpu() if self.broker else 0.0
        return broker, *(usage["cpu"] for usage in self.usages())

    def collect(self) -> list[int]:
        """The resident bytes of each process without garbage."""
        return [process.ask("collect") for process in self.processes]

    def wait_until_broker_is(self, *, down: bool) -> None:
        """Until all processes have noticed."""
        deadline = time.monotonic() + PATIENCE
        while any(bool(usage["stats"]["broker_down"]) != down for usage in self.usages()):
            if time.monotonic() > deadline:
                raise ChildFailed(f"not noticed in {PATIENCE:g} s: broker_down = {down:d}")
            time.sleep(0.01)

    def close(self) -> None:
        for process in self.processes:
            process.close()
        if self.broker:
            self.broker.close()
