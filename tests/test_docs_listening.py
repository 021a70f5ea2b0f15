"""The example of server-sent events, on a real server with real clients; and the page's code."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from ports import free_port
from support import PATIENCE, Server, connect, serving, simulated, until

from pachinko import hub

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "sse.py"
PAGE = ROOT / "docs" / "reaching.md"

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="needs the files of the checkout")


@pytest.fixture(autouse=True)
def clean_hub() -> Iterator[None]:
    yield
    hub.state.replace()


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module, without its worker, which takes the process's signals."""
    spec = importlib.util.spec_from_file_location("sse", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sse", module)
    spec.loader.exec_module(module)
    module.ws._routes.workers.clear()
    module.HEARTBEAT = 0.1
    return module


class Events:
    """An HTTP client that reads server-sent events."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def line(self) -> str:
        """The next line of the body that is neither empty nor the size of a chunk."""
        while True:
            line = (await asyncio.wait_for(self.reader.readline(), PATIENCE)).decode()
            if not line or (line.strip() and not re.fullmatch(r"[0-9a-f]+\s*", line)):
                return line.strip()

    async def event(self) -> tuple[str, Any]:
        """The next event, but no comment."""
        while True:
            line = await self.line()
            assert line, "the response has ended"
            if line.startswith("event:"):
                data = await self.line()
                return line.removeprefix("event:").strip(), json.loads(data.removeprefix("data: "))

    async def end(self) -> None:
        """Read to the end of the response, which is complete."""
        data = await asyncio.wait_for(self.reader.read(), PATIENCE)
        assert data.endswith(b"0\r\n\r\n")


@contextlib.asynccontextmanager
async def watching(port: int, room: str = "1") -> AsyncIterator[Events]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = f"GET /rooms/{room}/events HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n"
    writer.write(request.encode())
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
    assert head.startswith(b"HTTP/1.1 200") and b"text/event-stream" in head
    try:
        yield Events(reader, writer)
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("http", ["h11", "httptools"])
async def test_the_room_is_shown_as_events(example: Any, http: str) -> None:
    """What a WebSocket client says arrives; who leaves is noticed, also while nobody speaks."""
    async with serving(example.app, http=http) as server:
        async with connect(f"{server.url}/rooms/1") as member, watching(server.port) as events:
            await until(lambda: hub.state.listeners)
            for text in ("hi\nthere", "ä"):
                await member.send("say", {"text": text})
                assert await events.event() == ("said", {"text": text})
                assert (await member.receive())["payload"] == {"text": text}
        await until(lambda: not hub.state.listeners and not hub.groups)
        async with watching(server.port, "silent"):
            await until(lambda: hub.groups == {"room:silent"})
        await until(lambda: not hub.groups)


@pytest.mark.parametrize(
    ("message", "event"),
    [
        (("typing",), ("typing", None)),
        (("count", 0), ("count", 0)),
        (("said", {"text": "é\r\n\u2028"}), ("said", {"text": "é\r\n\u2028"})),
        ((b"hi",), ("", "aGk=")),
    ],
)
async def test_any_message_is_an_event_with_data(example: Any, message: Any, event: Any) -> None:
    """An `EventSource` ignores events without."""
    async with serving(example.app) as server, watching(server.port) as events:
        await until(lambda: hub.groups)
        await hub.send("room:1", *message)
        assert await events.event() == event


async def test_a_heartbeat_is_a_comment(example: Any) -> None:
    """An `EventSource` ignores it."""
    async with serving(example.app) as server, watching(server.port) as events:
        assert await events.line() == ": ping"


async def test_a_shutdown_after_a_drain_is_not_held_up(example: Any) -> None:
    """The response ends as it should, and the server with it."""
    server = Server(example.app)
    await server.start()
    async with watching(server.port) as events:
        await until(lambda: hub.groups)
        await hub.drain(0)
        await events.end()
        await server.stop()


async def test_without_a_drain_the_servers_time_limit_ends_it(example: Any) -> None:
    """That of uvicorn cancels the response."""
    server = Server(example.app, timeout_graceful_shutdown=0.1, log_level="critical")
    await server.start()
    async with watching(server.port):
        await until(lambda: hub.groups)
        await server.stop()
    assert not hub.groups


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_program_ends_at_a_signal(number: signal.Signals) -> None:
    """While somebody watches, in time, without a word of an error."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLE.parent), "sse:app",
        "--port", str(port), "--log-level", "warning",
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    break
                await asyncio.sleep(0.05)  # nobody tells when it takes connections
        async with watching(port) as events:
            process.send_signal(number)
            await events.end()
        _, err = await asyncio.wait_for(process.communicate(), PATIENCE)
        assert err == b""
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def test_the_page_is_served(example: Any) -> None:
    """With the names of the messages that the app sends."""
    assert 'addEventListener("said"' in example.PAGE and 'type: "say"' in example.PAGE
    async with serving(example.app) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), PATIENCE)
        writer.close()
        assert answer.endswith(example.PAGE.encode())


def code_of(heading: str) -> Any:
    """The Python under a heading of the page, run as one module."""
    module = types.ModuleType("reaching_" + heading.split()[0].lower())
    sys.modules[module.__name__] = module  # where annotations are looked up
    part = PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    for code in re.findall(r"^```python\n(.*?)^```$", part, re.MULTILINE | re.DOTALL):
        exec(compile(code, f"{PAGE} ({heading})", "exec", dont_inherit=True), vars(module))
    return module


async def test_the_pages_task(caplog: pytest.LogCaptureFixture) -> None:
    """It ticks until its client has gone, and then it is over."""
    page = code_of("Tasks of a connection")
    page.PERIOD = 0.01
    async with simulated(page.app) as server:
        async with connect(f"{server.url}/clock") as client:
            assert [(await client.receive())["type"] for _ in "12"] == ["tick", "tick"]
        await until(lambda: not hub.state.background)
    assert not caplog.records


async def test_the_pages_listener() -> None:
    """It passes messages on until the hub drains."""
    page = code_of("Listening")
    async with hub.open("memory://"):
        bridge = asyncio.create_task(page.bridge())
        state = asyncio.create_task(page.show("1"))
        await until(lambda: len(hub.state.listeners) == 2)
        await hub.send("room:1", "said", {"text": "hi"})
        await until(lambda: page.passed_on)
        await hub.drain(0)
        await asyncio.wait_for(asyncio.gather(bridge, state), PATIENCE)
    assert page.passed_on == [("said", {"text": "hi"})]
    assert page.shown == ["loaded", "said"]
