"""The recipes of ``docs/deployment.md``: SIGTERM, with many clients connected."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_port
from process import START, folder_of
from support import Client, Stalled, connect, until
from websockets.exceptions import InvalidStatus

DOCS = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text()
CLIENTS = 500
SECONDS = 3  # of the recipes' 10
PRELUDE = """
import asyncio
import os

import falcon.asgi

from pachinko import Connection, Pachinko, hub

app = falcon.asgi.App()
ws = Pachinko(app, "/ws/{name}", linger=1.0)
locked = Pachinko(app, "/locked", auth_timeout=60.0)


def log(line: str) -> None:
    with open(os.environ["PACHINKO_TEST_LOG"], "a") as file:
        file.write(line + "\\n")


@locked.authenticate
async def who(conn: Connection, token: str | None) -> str | None:
    return token


@ws.connect
async def arrive(conn: Connection) -> None:
    await hub.join("all", conn)


@ws.on("nap")
async def nap(conn: Connection, *, seconds: float) -> None:
    await asyncio.sleep(seconds)
    log(f"saved {conn.params['name']}")


@ws.on("flood")
async def flood(conn: Connection) -> None:
    while True:
        await conn.send("flood", "x" * 65_536)


@ws.disconnect
async def leave(conn: Connection) -> None:
    await asyncio.sleep(0.05)  # as a database takes
    log(f"left {conn.params['name']} {conn.close_code}")

"""
UVICORN = "-m uvicorn chat:app --timeout-graceful-shutdown 5"
OPTIONS = "--log-level warning --port {port}"  # what only the tests need
COMMANDS = {
    "uvicorn": f"{UVICORN} {OPTIONS}",
    "uvicorn --workers": f"{UVICORN} --workers 2 {OPTIONS}",
    "hypercorn": "serve.py",
    "granian": "serve.py",
}


def blocks(heading: str) -> list[str]:
    """The Python of the section under *heading*."""
    _, _, section = DOCS.partition(f"\n{heading}\n")
    section = re.split(r"^##+ ", section, maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


class Draining:
    """A server process with one of the recipes."""

    def __init__(self, name: str, folder: Path) -> None:
        # From Python 3.12 on hypercorn waits for the sockets before its grace period begins.
        self.ends_with_stalled = name != "hypercorn" or sys.version_info < (3, 12)
        self.port = free_port()
        self.folder = folder
        self.log = folder / "log"
        self.log.touch()
        (ready,) = blocks("## Shutdown without a loss")
        (recipe,) = blocks(f"### {name.split()[0]}")
        recipe, times = re.subn(r"hub\.drain\(10\)", f"hub.drain({SECONDS})", recipe)
        assert times == 1
        is_worker = "@ws.worker" in recipe
        (folder / "chat.py").write_text(PRELUDE + ready + (recipe if is_worker else ""))
        (folder / "serve.py").write_text(recipe.replace("8000", str(self.port)))
        self.output = (folder / "output").open("wb")
        self.popen = subprocess.Popen(
            [sys.executable, *COMMANDS[name].format(port=self.port).split()],
            cwd=folder,
            env={
                **os.environ,
                "PACHINKO_TEST_LOG": str(self.log),
                "PYTHONPATH": os.pathsep.join([str(folder), folder_of("pachinko")]),
            },
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def text(self) -> str:
        return (self.folder / "output").read_text()

    def ready(self) -> int:
        """The status of the health check; 0 while nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except OSError:
            return 0

    def lines(self, word: str) -> list[list[str]]:
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [line[1:] for line in lines if line[0] == word]

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self.output.close()


@pytest.fixture(params=COMMANDS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Draining]:
    """A server that is ready."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4 * CLIENTS), hard))
    draining = Draining(request.param, tmp_path)
    try:
        deadline = time.monotonic() + START
        while draining.ready() != 200:
            assert draining.popen.poll() is None and time.monotonic() < deadline, draining.text()
            time.sleep(0.02)
        yield draining
    finally:
        draining.close()


async def closed(client: Client) -> tuple[int | None, float]:
    """The close code that *client* sees, and when."""
    async with asyncio.timeout(60):
        await client.socket.wait_closed()
    return client.socket.close_code, time.monotonic()


async def test_sigterm(server: Draining) -> None:
    """All get 1012, spread over the time; each disconnect handler runs once; nothing hangs."""
    names = [*map(str, range(CLIENTS))]
    async with contextlib.AsyncExitStack() as stack:

        async def visit(path: str) -> Client:
            client: Client = await stack.enter_async_context(connect(server.url + path))
            return client

        clients = [await visit(f"/ws/{n}") for n in range(CLIENTS)]
        stranger = await visit("/locked")
        if server.ends_with_stalled:
            names.append("stalled")
            stalled = await stack.enter_async_context(Stalled(f"{server.url}/ws/stalled"))
            await stalled.send({"type": "flood"})
        for client in clients[:10]:
            await client.send("nap", {"seconds": 0.5})
        await clients[10].send("nap", {"seconds": 3600})  # is cancelled after `linger`
        codes = [asyncio.create_task(closed(client)) for client in (*clients, stranger)]
        await clients[-1].send("x", id=1)  # its answer: all that was sent before has arrived
        assert (await clients[-1].receive())["type"] == "error"
        server.popen.terminate()
        begun = time.monotonic()
        if "--workers" not in server.popen.args:  # whose supervisor closes the port first
            await until(lambda: server.ready() == 503)
            with pytest.raises(InvalidStatus) as caught:
                await visit("/ws/late")
            assert caught.value.response.status_code == 503
        seen = await asyncio.gather(*codes)
        await asyncio.to_thread(server.popen.wait, 60)
    assert collections.Counter(code for code, _ in seen) == {1012: CLIENTS + 1}, server.text()
    times = sorted(at - begun for _, at in seen)
    halfway = times[len(times) // 2]
    assert halfway > 0.25 * SECONDS and times[-1] > 0.9 * SECONDS, (times[0], halfway, times[-1])
    left = collections.Counter(name for name, _ in server.lines("left"))
    assert left == collections.Counter(names)
    assert {code for _, code in server.lines("left")} == {"1012"}
    assert {int(name) for (name,) in server.lines("saved")} == set(range(10))
    assert "pachinko" not in server.text(), server.text()  # neither a line of its log nor a bug


def test_the_commands() -> None:
    """They are on the page as they are run here."""
    assert f"\n{UVICORN.removeprefix('-m ')}\n" in DOCS
    assert DOCS.count("`python3 serve.py`") == 1
