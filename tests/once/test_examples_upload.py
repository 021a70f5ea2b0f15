"""The example of uploads: its messages over a real server, and its page in a real browser."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import threading
import types
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import playwright.async_api
import pytest
from playwright.async_api import expect
from support import PATIENCE, Client, Server, connect, serving, until

from pachinko import hub

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "upload.py"
CHUNK = 65_536
CONTENT = bytes(range(256)) * 1000

expect.set_options(timeout=PATIENCE * 1000)


def png(width: int) -> bytes:
    """A picture that a browser can show."""

    def part(name: bytes, data: bytes) -> bytes:
        body = name + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    size = width.to_bytes(4, "big") * 2
    rows = zlib.compress((b"\0" + b"\x4f\x46\xc8" * width) * width)
    head = part(b"IHDR", size + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + head + part(b"IDAT", rows) + part(b"IEND", b"")


@pytest.fixture(autouse=True)
def clean_hub() -> Iterator[None]:
    """The example has the module's hub."""
    yield
    hub.state.replace()


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module of its own, with a folder of its own."""
    monkeypatch.setenv("UPLOADS", str(tmp_path))
    spec = importlib.util.spec_from_file_location("upload_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
async def server(example: types.ModuleType) -> AsyncIterator[Server]:
    async with serving(example.app) as server:
        yield server


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


async def begin(client: Client, size: int, name: str = "a.bin", type: str = "") -> dict[str, Any]:
    return await client.ask("upload.begin", {"name": name, "size": size, "type": type})


async def upload(client: Client, content: bytes, **about: str) -> dict[str, Any]:
    """Send a whole file without waiting for its progress; return the answer to its end."""
    assert await begin(client, len(content), **about) == {"type": "upload.begin.reply", "id": 1}
    for at in range(0, len(content), CHUNK):
        await client.raw(content[at : at + CHUNK])
    await client.send("upload.end", id=2)
    for at in range(0, len(content), CHUNK):
        size = min(at + CHUNK, len(content))
        assert await client.receive() == {"type": "progress", "payload": {"size": size}}
    return await client.receive()


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, len(CONTENT)])
async def test_an_upload_is_kept_under_its_digest(
    server: Server, tmp_path: Path, size: int
) -> None:
    """Progress for each frame, and at the end its size and its SHA-256."""
    content = CONTENT[:size]
    async with connect(server.url + "/ws") as client:
        answer = await upload(client, content)
        expected = {"size": size, "sha256": digest(content)}
        assert answer == {"type": "upload.end.reply", "id": 2, "payload": expected}
        assert files(tmp_path) == [digest(content)]
        assert (tmp_path / digest(content)).read_bytes() == content
        assert (await upload(client, b"again"))["type"] == "upload.end.reply"
    assert files(tmp_path) == sorted([digest(content), digest(b"again")])


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "", "a\0b", "x" * 5000])
async def test_a_clients_name_is_no_path(server: Server, tmp_path: Path, name: str) -> None:
    """It is only shown."""
    async with connect(server.url + "/ws") as client:
        assert (await upload(client, b"x", name=name))["payload"]["sha256"] == digest(b"x")
    assert files(tmp_path) == [digest(b"x")]


async def test_an_upload_that_is_aborted_leaves_nothing(server: Server, tmp_path: Path) -> None:
    """What is sent after the abort is no part of the next one."""
    async with connect(server.url + "/ws") as client:
        await begin(client, len(CONTENT))
        await client.raw(CONTENT[:CHUNK])
        assert (await client.receive())["payload"] == {"size": CHUNK}
        assert len(files(tmp_path)) == 1
        assert (await client.ask("upload.abort"))["type"] == "upload.abort.reply"
        assert files(tmp_path) == []
        await client.raw(b"late")
        assert (await client.receive())["payload"]["code"] == "too_many"
        assert (await client.ask("upload.end"))["payload"]["code"] == "incomplete"
        assert (await upload(client, b"next"))["payload"]["sha256"] == digest(b"next")


async def test_who_leaves_leaves_no_file(server: Server, tmp_path: Path) -> None:
    """With a close frame, or without a word."""
    for leave in ("close", "cut"):
        async with connect(server.url + "/ws") as client:
            await begin(client, len(CONTENT))
            await client.raw(CONTENT[:CHUNK])
            await client.receive()
            assert len(files(tmp_path)) == 1
            await client.close() if leave == "close" else client.cut()
            await until(lambda: files(tmp_path) == [])


async def test_who_leaves_while_a_thread_writes_leaves_no_file(
    example: types.ModuleType, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread goes on when its handler is cancelled; the file is removed behind it."""
    writes, may_write = threading.Event(), threading.Event()
    write = example.Upload.write

    def slow(upload: Any, data: bytes) -> None:
        writes.set()
        assert may_write.wait(PATIENCE)
        write(upload, data)

    monkeypatch.setattr(example.Upload, "write", slow)
    async with connect(server.url + "/ws") as client:
        await begin(client, len(CONTENT))
        await client.raw(CONTENT[:CHUNK])
        await until(writes.is_set)
        (conn,) = hub.connections
        upload = conn.context.upload
        await client.close()
        may_write.set()
        await until(lambda: upload.is_over)
    await until(lambda: not hub.state.serving)
    upload.write(b"late")
    assert files(tmp_path) == []


async def test_who_leaves_before_a_thread_is_free_leaves_no_file(
    example: types.ModuleType, tmp_path: Path
) -> None:
    """A call that is cancelled before a thread takes it is made again when the client has gone."""
    one_thread, may_go_on = concurrent.futures.ThreadPoolExecutor(1), threading.Event()
    asyncio.get_running_loop().set_default_executor(one_thread)
    conn = types.SimpleNamespace(context=types.SimpleNamespace())
    conn.context.upload = example.Upload("a", 1, "")
    conn.context.upload.write(b"a")
    one_thread.submit(may_go_on.wait, PATIENCE)
    abort = asyncio.create_task(example.end(conn))
    await asyncio.sleep(0)  # It waits for a thread from now on.
    abort.cancel()
    await asyncio.wait([abort])
    may_go_on.set()
    await example.end(conn)
    assert files(tmp_path) == []


async def test_two_at_once_are_refused(server: Server, tmp_path: Path) -> None:
    """On one connection; the first one goes on, and others have their own."""
    async with connect(server.url + "/ws") as one, connect(server.url + "/ws") as two:
        await begin(one, 2)
        assert (await begin(one, 1))["payload"]["code"] == "busy"
        assert (await upload(two, b"x"))["type"] == "upload.end.reply"
        await one.raw(b"ab")
        assert (await one.receive())["payload"] == {"size": 2}
        assert (await one.ask("upload.end"))["payload"]["sha256"] == digest(b"ab")
    assert files(tmp_path) == sorted([digest(b"x"), digest(b"ab")])


@pytest.mark.parametrize("size", [-1, 100 * 2**20 + 1, 10**30])
async def test_a_size_is_bounded(server: Server, size: int) -> None:
    """What is refused is no upload in progress."""
    async with connect(server.url + "/ws") as client:
        answer = await begin(client, size)
        assert (answer["id"], answer["payload"]["code"]) == (1, "too_large")
        assert (await begin(client, 1))["type"] == "upload.begin.reply"


async def test_the_size_has_to_be_the_announced_one(server: Server, tmp_path: Path) -> None:
    """Neither more nor less; the file is gone, and another upload may begin."""
    async with connect(server.url + "/ws") as client:
        await begin(client, 3)
        await client.raw(b"ab")
        await client.receive()
        await client.raw(b"cd")
        assert (await client.receive())["payload"]["code"] == "too_many"
        assert files(tmp_path) == []
        await begin(client, 3)
        await client.raw(b"ab")
        await client.receive()
        assert (await client.ask("upload.end"))["payload"]["code"] == "incomplete"
        assert files(tmp_path) == []
        assert (await upload(client, b"abc"))["type"] == "upload.end.reply"


async def test_a_full_disk(
    example: types.ModuleType, server: Server, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """It is logged, the client gets ``internal_error``, and may try again."""
    async with connect(server.url + "/ws") as client:
        with monkeypatch.context() as patch:
            patch.setattr(example, "folder", Path("/nowhere"))
            await begin(client, 1)
        await client.raw(b"x")
        assert (await client.receive())["payload"]["code"] == "internal_error"
        assert (await upload(client, b"x"))["type"] == "upload.end.reply"
    assert "FileNotFoundError" in caplog.text


async def test_a_picture_is_shown_to_everybody(server: Server) -> None:
    """As one binary frame: the length of the head, the head, and the content."""
    picture = png(4)
    async with connect(server.url + "/ws") as one, connect(server.url + "/ws") as two:
        await until(lambda: len(hub.members("everybody")) == 2)
        await begin(one, len(picture), name="<b>ä", type="image/png")
        await one.raw(picture)
        await one.receive()
        await one.send("upload.end", id=2)
        for client in (one, two):
            frame = await asyncio.wait_for(client.socket.recv(), PATIENCE)
            assert isinstance(frame, bytes)
            start = 4 + int.from_bytes(frame[:4], "big")
            head = {"name": "<b>ä", "type": "image/png", "sha256": digest(picture)}
            assert json.loads(frame[4:start]) == head and frame[start:] == picture
        assert (await one.receive())["id"] == 2
        large = bytes(900_001)
        assert (await upload(one, large, type="image/png"))["payload"]["size"] == len(large)
        assert (await upload(one, b"x", type="text/plain"))["payload"]["size"] == 1
        await hub.send("everybody", "nothing")
        assert (await two.receive())["type"] == "nothing"


# The page


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[playwright.async_api.Browser]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.fail("the page is tested in Chromium: apt-get install chromium, or set CHROMIUM")
    async with playwright.async_api.async_playwright() as play:
        browser = await play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            await browser.close()


async def test_the_page(
    example: types.ModuleType, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It uploads, shows progress and pictures, aborts, names errors, and reconnects; on a phone."""
    complaints: list[str] = []
    held, begun, write = threading.Event(), threading.Event(), example.Upload.write
    held.set()

    def holding(upload: Any, data: bytes) -> None:
        begun.set()
        assert held.wait(PATIENCE)
        write(upload, data)

    monkeypatch.setattr(example.Upload, "write", holding)
    async with chromium() as browser:
        pages = []
        for options in ({"viewport": {"width": 360, "height": 640}}, {}):
            page = await (await browser.new_context(**options)).new_page()  # type: ignore[arg-type]  # a viewport is a dict
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda line: line.type == "error" and complaints.append(line.text))
            await page.goto(f"http://127.0.0.1:{server.port}/")
            await expect(page.locator(".state")).to_have_text("Connected")
            pages.append(page)
        phone, desk = pages
        assert await phone.evaluate("document.documentElement.scrollWidth") == 360
        assert await desk.locator("button").is_hidden()

        async def choose(name: str, content: bytes, mime: str = "") -> None:
            file: Any = {"name": name, "mimeType": mime, "buffer": content}
            await phone.locator("input").set_input_files(file)

        # A file of many frames, its progress, and what others see of a picture.
        await choose("big.bin", CONTENT * 8, "application/octet-stream")
        await expect(phone.locator(".done")).to_contain_text(digest(CONTENT * 8))
        assert (tmp_path / digest(CONTENT * 8)).read_bytes() == CONTENT * 8
        picture = png(64)
        await choose("<i>a</i>.png", picture, "image/png")
        for page in pages:
            await expect(page.locator("figcaption")).to_have_text("<i>a</i>.png")
            await expect(page.locator("figure img")).to_have_js_property("naturalWidth", 64)
        await choose("empty.txt", b"", "text/plain")
        await expect(phone.locator(".done")).to_contain_text(digest(b""))

        # An abort, while the server writes: what was on its way is written first, and then removed.
        kept = files(tmp_path)
        held.clear()
        begun.clear()
        await choose("held.bin", CONTENT * 8)
        await expect(phone.locator(".row span")).to_have_text("0 kB of 2.0 MB")
        await until(begun.is_set)
        await phone.locator("button").click()
        held.set()
        await expect(phone.locator(".wrong")).to_have_text("held.bin: Aborted.")
        assert files(tmp_path) == kept

        # What the server refuses, and a connection that is lost.
        monkeypatch.setattr(example, "MAX_SIZE", 10)
        await choose("large.bin", CONTENT)
        await expect(phone.locator(".wrong")).to_have_text("large.bin: a file has at most 10 bytes")
        monkeypatch.setattr(example, "MAX_SIZE", 10_000_000)
        held.clear()
        begun.clear()
        await choose("lost.bin", CONTENT * 8)
        await until(begun.is_set)
        for conn in hub.connections:
            await conn.close(1012)
        held.set()
        await expect(phone.locator(".wrong")).to_have_text("lost.bin: The connection is lost.")
        for page in pages:
            await expect(page.locator(".state")).to_have_text("Connected")
        await choose("again.txt", b"again")
        await expect(phone.locator(".done")).to_contain_text(digest(b"again"))
        await until(lambda: not [name for name in files(tmp_path) if name.endswith(".part")])
    assert complaints == []
