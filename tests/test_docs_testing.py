"""What docs/testing.md and the README's part on testing show and claim is run here."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import falcon.asgi
import falcon.testing
import pytest
from support import PATIENCE
from test_docs import README, ROOT, blocks, clean_hub, load, prose, spans, tables

from pachinko import Connection, Hub, Pachinko, simulate

__all__ = ["clean_hub"]  # a fixture for each test, here too

PAGE = ROOT / "docs" / "testing.md"
FIRST, APP, CLIENTS, *BLOCKS = blocks(PAGE, "python") if PAGE.exists() else [""] * 3
(FAILS,) = [code for code in BLOCKS if code.endswith("await ada.receive(Said)\n")] or [""]
(FRAMEWORKS,) = [code for code in BLOCKS if "@pytest.fixture" in code] or [""]
RECIPES = [code for code in BLOCKS if code not in (FAILS, FRAMEWORKS)]

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs the files of the checkout")


@pytest.fixture
def page() -> types.ModuleType:
    """The page's first test and its app, as one module."""
    module = types.ModuleType("testing_page")
    sys.modules[module.__name__] = module  # where annotations are looked up
    for code in (APP, FIRST):
        exec(compile(code, PAGE, "exec", dont_inherit=True), vars(module))
    return module


async def run(code: str, page: types.ModuleType) -> None:
    """Run *code*, which may await, in *page*."""
    compiled = compile(code, PAGE, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    await types.FunctionType(compiled, vars(page))()


async def test_the_first_test(page: Any) -> None:
    """It passes."""
    await page.test_divide()


@pytest.mark.parametrize("code", RECIPES, ids=lambda code: code.strip().partition("\n")[0])
async def test_a_recipe(code: str, page: Any) -> None:
    """Each holds: with the page's app and two clients, or with an app that it makes itself."""
    makes_its_app = "make_app()" in code or "falcon.asgi.App()" in code
    await (run if makes_its_app else run_recipe)(code, page)


async def run_recipe(code: str, page: Any) -> None:
    """Run *code* with the page's app and two clients."""
    async with simulate(page.make_app) as page.sim:
        await run(CLIENTS, page)
        await run(code, page)


async def test_what_a_failure_shows(page: Any) -> None:
    """The transcript is the one on the page, but for the times."""
    with pytest.raises(AssertionError) as caught:
        await run_recipe(FAILS, page)
    (shown,) = (block.strip("\n") for block in blocks(PAGE, "text"))
    times = re.compile(r"^ +\d+\.\d{3} ", re.MULTILINE)
    assert times.sub("", f"AssertionError: {caught.value}") == times.sub("", shown)
    assert len(times.findall(shown)) == 6


async def test_a_plain_assert_has_the_transcript(page: Any) -> None:
    """As a note."""
    with pytest.raises(AssertionError) as caught:
        await run_recipe("assert not sim", page)
    (note,) = caught.value.__notes__
    assert note.startswith("Transcript") and "#2 ← accepted" in note


# Test frameworks


def run_pytest(folder: Path, mark: str, *arguments: str) -> str:
    """Run the page's part on frameworks, and *mark*, by pytest; return what it prints."""
    folder.joinpath("test_page.py").write_text("\n".join([APP, FIRST, FRAMEWORKS, mark]))
    folder.joinpath("pytest.ini").touch()
    command = [sys.executable, "-W", "error", "-m", "pytest", "-rA", "-p", "no:cacheprovider"]
    path = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(
        [*command, *arguments, "test_page.py"], cwd=folder, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def test_pytest_asyncio_and_unittest(tmp_path: Path) -> None:
    """All tests pass in the automatic mode."""
    mode = ("asyncio_mode=auto", "asyncio_default_fixture_loop_scope=function")
    said = await asyncio.to_thread(run_pytest, tmp_path, "", *(f"-o{each}" for each in mode))
    for name in ("test_divide", "TestDivide::test_divide", "test_with_fixture", "test_without"):
        assert f"PASSED test_page.py::{name}" in said


async def test_anyio(tmp_path: Path) -> None:
    """Tests and fixtures work with its plugin alone."""
    (mark,) = (each for each in spans(prose(PAGE)) if "pytestmark" in each)
    without = ("-p", "no:asyncio", "-k", "not TestDivide")
    said = await asyncio.to_thread(run_pytest, tmp_path, mark, *without)
    for name in ("test_divide[asyncio]", "test_with_fixture[asyncio]", "test_without_async"):
        assert f"PASSED test_page.py::{name}" in said


# What settle knows


async def other_task(conn: Connection) -> None:
    await conn.ask("never", timeout=1000)


async def event(conn: Connection) -> None:
    await asyncio.Event().wait()


async def queue(conn: Connection) -> None:
    await asyncio.Queue[int]().get()


async def lock(conn: Connection) -> None:
    held = asyncio.Lock()
    await held.acquire()
    await held.acquire()


async def sleep(conn: Connection) -> None:
    await asyncio.sleep(0.02)
    await conn.send("done")


async def sleep_long(conn: Connection) -> None:
    await asyncio.sleep(PATIENCE)


async def sleep_in_a_task(conn: Connection) -> None:
    conn.create_task(sleep(conn))


async def timeout(conn: Connection) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.02):
            await asyncio.Event().wait()
    await conn.send("done")


async def timeout_long(conn: Connection) -> None:
    async with asyncio.timeout(1000):
        await asyncio.Event().wait()


async def call_later(conn: Connection) -> None:
    is_over = asyncio.Event()
    asyncio.get_running_loop().call_later(0.02, is_over.set)
    await is_over.wait()
    await conn.send("done")


async def to_thread(conn: Connection) -> None:
    await asyncio.to_thread(time.sleep, 0.02)
    await conn.send("done")


async def in_executor(conn: Connection) -> None:
    await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.02)
    await conn.send("done")


async def stream(conn: Connection) -> None:
    def answer() -> None:
        one, _ = listener.accept()
        with one:
            time.sleep(0.02)
            one.sendall(b"hi\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        answering = threading.Thread(target=answer)
        answering.start()
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        try:
            await reader.readline()
        finally:
            answering.join()
            writer.close()
            await writer.wait_closed()
    await conn.send("done")


async def subprocess_(conn: Connection) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "pass")
    await process.wait()
    await conn.send("done")


async def unseen_thread(conn: Connection) -> None:
    is_over, loop = asyncio.Event(), asyncio.get_running_loop()
    thread = threading.Timer(0.02, lambda: loop.call_soon_threadsafe(is_over.set))
    thread.start()
    try:
        await is_over.wait()
    finally:
        thread.join()


async def never_rests(conn: Connection) -> None:
    while True:
        await asyncio.sleep(0)


Handler = Callable[[Connection], Awaitable[None]]
KNOWN: dict[str, list[Handler]] = {
    "a client, another task, an `asyncio.Event`, a `Queue`, a `Lock`": [
        other_task, event, queue, lock,
    ],
    "a time limit of the library; a worker, or a task of the app's startup, waits for anything": [
        other_task,
    ],
    "`asyncio.sleep`, `asyncio.timeout`, `loop.call_later`": [
        sleep, sleep_in_a_task, timeout, call_later,
    ],
    "a thread: `asyncio.to_thread`, `loop.run_in_executor`": [to_thread, in_executor],
    "a socket; from Python 3.12 on a subprocess": [
        stream, *([subprocess_] if sys.version_info >= (3, 12) else []),
    ],
    "an `asyncio.Event` that a thread sets by `loop.call_soon_threadsafe`": [unseen_thread],
    "nothing, since it runs all the time": [never_rests],
}  # fmt: skip
ROWS = tables(PAGE, "A task of the app waits for", "and `settle`") if PAGE.exists() else []
EACH = [(handler, says) for waits, says in ROWS for handler in KNOWN[waits]]


class Poller:
    async def process_startup(self, scope: object, event: object) -> None:
        self.task = asyncio.create_task(asyncio.sleep(1000))

    async def process_shutdown(self, scope: object, event: object) -> None:
        self.task.cancel()


async def settle(handler: Handler, seconds: float) -> str:
    """Say what `settle` does while *handler* is in progress."""
    app = falcon.asgi.App(middleware=[Poller()])
    ws = Pachinko(app, "/ws", hub=Hub(), linger=0.05)
    ws.on("go")(handler)

    @ws.worker
    async def work() -> None:
        await asyncio.sleep(1000)

    async with simulate(app, timeout=PATIENCE) as sim:
        client = await sim.connect("/ws")
        await client.send("go")
        try:
            await sim.settle(timeout=seconds)
        except AssertionError as exc:
            return str(exc)
        return "waits" if [each.type for each in client.received] == ["done"] else "returns"


@pytest.mark.parametrize(("handler", "says"), EACH, ids=lambda each: getattr(each, "__name__", ""))
async def test_what_settle_knows(handler: Handler, says: str) -> None:
    """Each kind of wait of the table is one that settle waits for, or not."""
    done = await settle(handler, 0.05 if handler is never_rests else PATIENCE)
    if says == "fails after `timeout`":
        assert "never_rests (" in done and "runs all the time" in done
    else:
        assert done == says.partition(",")[0]


async def test_settle_names_what_waits() -> None:
    """With its file and line."""
    said = await settle(sleep_long, 0.05)
    assert f"sleep_long ({__file__}:" in said and "waits for a timer" in said


@pytest.mark.parametrize("handler", [sleep, to_thread, timeout_long, stream])
def test_what_settle_knows_on_uvloop(handler: Handler) -> None:
    """Only what the page says is waited for there."""
    uvloop = pytest.importorskip("uvloop", reason="not for this Python or platform")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        done = runner.run(settle(handler, PATIENCE))
    assert done == ("returns" if handler is timeout_long else "waits")


# Around it


async def test_httpx_starts_nothing(page: Any) -> None:
    """Its transport and the simulation share an app."""
    httpx = pytest.importorskip("httpx", reason="no test needs it else")
    app = page.make_app()
    async with simulate(app) as sim:
        await sim.connect("/ws/lobby", token="s3cret")
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.get("/nothing")).status_code == 404
        assert sim.hub.count == 1


async def test_falcons_test_client_is_refused(page: Any) -> None:
    """It would start the app again, in another loop."""
    app = page.make_app()
    async with simulate(app):
        client = falcon.testing.TestClient(app)
        with pytest.raises(RuntimeError, match="this hub runs in another thread or event loop"):
            await asyncio.to_thread(client.simulate_get, "/nothing")


async def test_the_readme() -> None:
    """Its test passes with its app."""
    await load(README).test_sum()


async def test_the_readmes_question() -> None:
    """Its handler goes on with the client's answer."""
    async with simulate(load(README).app) as sim:
        client = await sim.connect("/ws/lobby")
        for sure, answer in ((True, "bye"), (False, "stay")):
            client.answer("confirm", lambda _, sure=sure: sure)
            assert await client.request("leave") == answer


def test_the_pages_lead_here() -> None:
    """The README and the page on Falcon link to the page."""
    assert "](docs/testing.md)" in README.read_text()
    assert "](testing.md)" in (ROOT / "docs" / "falcon.md").read_text()
