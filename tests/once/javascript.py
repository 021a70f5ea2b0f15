"""Where pachinko.js runs in tests, Chromium and Node, and a server that says what it is told."""

from __future__ import annotations

import asyncio
import contextlib
import http
import itertools
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import playwright
import websockets.asyncio.server
from playwright.async_api import Browser, Page, async_playwright
from support import PATIENCE
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

import pachinko

CLIENT = Path(pachinko.__file__).with_name("client") / "pachinko.js"
# Playwright brings a Node with it, so that tests need no other one.
NODE = Path(playwright.__file__).parent / "driver" / "node"
# What the code of tests finds: the module's names, and `log`, which notes the messages of a type.
PRELUDE = """
globalThis.log = (client, ...types) => {
  client.log ??= [];
  for (const type of types) client.on(type, (payload) => client.log.push([type, payload]));
  return client;
};
globalThis.until = async (test) => {
  while (!test()) await new Promise((wake) => setTimeout(wake, 5));
};
// A storage as browsers have it, also for Node: `kept`, with a text for the client of an address.
globalThis.kept = { items: {}, getItem(key) { return this.items[key] ?? null; },
  setItem(key, value) { this.items[key] = `${value}`; } };
globalThis.holding = (url, text) => (kept.setItem(`pachinko ${url}/ws`, text), kept);
globalThis.outcome = (promise) => promise.then(
  (value) => ({ value: value ?? null }),
  ({ name, code, sent, message, details }) => ({ name, code, sent, message, details }));
"""
DRIVER = """
import { createInterface } from "node:readline";
import * as pachinko from "./pachinko.mjs";
Object.assign(globalThis, pachinko);
const answer = (id, more) => console.log(JSON.stringify({ id, ...more }));
for await (const line of createInterface({ input: process.stdin })) {
  const { id, code, argument } = JSON.parse(line);
  (async () => (0, eval)(`(${code})`)(argument))().then(
    (value) => answer(id, { value }), (error) => answer(id, { error: String(error?.stack) }));
}
"""


class Peer:
    """The server's side of one connection of a `Script`."""

    def __init__(self, socket: websockets.asyncio.server.ServerConnection) -> None:
        self.socket = socket
        assert socket.request is not None
        self.path = socket.request.path
        self.offered = socket.request.headers.get("Sec-WebSocket-Protocol")

    async def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await asyncio.wait_for(self.socket.recv(), PATIENCE))
        return message

    async def send(self, type: str, payload: Any = None, **keys: Any) -> None:
        await self.socket.send(json.dumps({"type": type, "payload": payload, **keys}))

    async def close(self, code: int, reason: str = "") -> None:
        await self.socket.close(code, reason)

    async def gone(self) -> tuple[int | None, str | None]:
        await asyncio.wait_for(self.socket.wait_closed(), PATIENCE)
        return self.socket.close_code, self.socket.close_reason

    def cut(self) -> None:
        self.socket.transport.abort()


class Script:
    """A server: a test takes its connections one by one, and says what each of them gets."""

    def __init__(self) -> None:
        self.refuses = False
        self.attempts = 0
        self.peers = asyncio.Queue[Peer]()
        self.url = ""

    async def accept(self) -> Peer:
        return await asyncio.wait_for(self.peers.get(), PATIENCE)

    async def _serve(self, socket: websockets.asyncio.server.ServerConnection) -> None:
        self.peers.put_nowait(Peer(socket))
        await socket.wait_closed()

    def _answer(
        self, connection: websockets.asyncio.server.ServerConnection, request: Request
    ) -> Response | None:
        if "Upgrade" in request.headers:
            self.attempts += 1
            return connection.respond(http.HTTPStatus.FORBIDDEN, "") if self.refuses else None
        is_page = request.path == "/"
        body = b"<!doctype html><title>A page</title>" if is_page else CLIENT.read_bytes()
        kind = "text/html" if is_page else "text/javascript"
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close"}
        return Response(200, "OK", Headers(headers), body)


@contextlib.asynccontextmanager
async def scripted() -> AsyncIterator[Script]:
    script = Script()
    server = await websockets.asyncio.server.serve(
        script._serve, "127.0.0.1", 0, process_request=script._answer, ping_interval=None,
        select_subprotocol=lambda _, offered: offered[0] if offered else None,
    )  # fmt: skip
    script.url = f"http://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
    try:
        yield script
    finally:
        server.close()
        await server.wait_closed()


class InBrowser:
    """A page in Chromium, with the client's names as globals."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("pageerror", self._complain)

    def _complain(self, error: object) -> None:
        self.complaints.append(str(error))

    def forget(self) -> None:
        """Leave the page to the next test."""
        self.page.remove_listener("pageerror", self._complain)

    async def load(self, url: str) -> None:
        await self.page.goto(f"{url}/")
        await self.start()

    async def start(self) -> None:
        await self.page.evaluate(
            "async () => Object.assign(globalThis, await import('/pachinko.js'))"
        )
        await self.page.evaluate(f"() => {{ {PRELUDE} }}")

    async def run(self, code: str, argument: Any = None) -> Any:
        return await asyncio.wait_for(self.page.evaluate(code, argument), PATIENCE)


class InNode:
    """A process of Node, with the client's names as globals."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.complaints: list[str] = []
        self._answers = dict[int, asyncio.Future[Any]]()
        self._ids = itertools.count()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._complain())]

    async def load(self, url: str) -> None:
        await self.run(f"() => {{ {PRELUDE} }}")

    async def run(self, code: str, argument: Any = None) -> Any:
        id = next(self._ids)
        answer = self._answers[id] = asyncio.get_running_loop().create_future()
        line = json.dumps({"id": id, "code": code, "argument": argument})
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        said = await asyncio.wait_for(answer, PATIENCE)
        if "error" in said:
            raise AssertionError(said["error"])
        return said.get("value")

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            said = json.loads(line)
            self._answers.pop(said["id"]).set_result(said)

    async def _complain(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.complaints.append(line.decode())

    async def stop(self) -> None:
        self.process.kill()
        await self.process.wait()
        await asyncio.gather(*self._tasks)


@contextlib.asynccontextmanager
async def node(folder: Path) -> AsyncIterator[InNode]:
    (folder / "pachinko.mjs").write_bytes(CLIENT.read_bytes())
    (folder / "driver.mjs").write_text(DRIVER)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        NODE, folder / "driver.mjs", stdin=pipe, stdout=pipe, stderr=pipe
    )
    runtime = InNode(process)
    try:
        yield runtime
    finally:
        await runtime.stop()


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert path, "the client is tested in Chromium: apt-get install chromium, or set CHROMIUM"
    options = ["no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"]
    async with async_playwright() as started:
        browser = await started.chromium.launch(
            executable_path=path, args=[f"--{option}" for option in options]
        )
        yield browser
        await browser.close()
