"""The two small examples of pachinko.js, in a real browser."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from javascript import InBrowser
from playwright.async_api import Page, expect
from support import PATIENCE, Server, serving, until

from pachinko import hub

expect.set_options(timeout=PATIENCE * 1000)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.fixture
def example(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The example as a module of its own; it has the module's hub."""
    file = EXAMPLES / f"{request.param}.py"
    spec = importlib.util.spec_from_file_location(f"{file.stem}_example", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    hub.state.replace()


@pytest_asyncio.fixture(loop_scope="session")
async def server(example: Any) -> AsyncIterator[Server]:
    async with serving(example.app) as server:
        yield server


def address(server: Server) -> str:
    return server.url.replace("ws:", "http:")


async def test_the_smallest_page_is_small() -> None:
    """Server and page have 40 lines together."""
    files = [EXAMPLES / "live.py", EXAMPLES / "live.html"]
    assert sum(len(file.read_text().splitlines()) for file in files) <= 40


@pytest.mark.parametrize("example", ["live"], indirect=True)
async def test_what_one_says_all_see(server: Server, tab: InBrowser) -> None:
    """Also a page whose connection was lost meanwhile."""
    one, two = tab.page, await tab.page.context.new_page()
    for page in (one, two):
        await page.goto(address(server))
        await expect(page.locator("output")).to_have_text("open")
    for conn in hub.connections:
        await hub.close(conn, 1012)
    await hub.send("all", "said", "meanwhile")
    for page in (one, two):
        await page.evaluate("() => { dispatchEvent(new Event('online')); }")
        await expect(page.locator("li")).to_have_text(["meanwhile"])
    await one.locator("input").fill("hello")
    await one.locator("input").press("Enter")
    for page in (one, two):
        await expect(page.locator("li")).to_have_text(["hello", "meanwhile"])


async def ask(page: Page, prompt: str) -> None:
    await page.get_by_label("Ask").fill(prompt)
    await page.get_by_role("button", name="Ask").click()
    await expect(page.locator("p").first).to_contain_text("You")


@pytest.mark.parametrize("example", ["tokens"], indirect=True)
async def test_tokens_go_on_after_a_reload(example: Any, server: Server, tab: InBrowser) -> None:
    """And after a cut; each token is there once, and then the next question can be asked."""
    example.PAUSE = 0.02
    page = tab.page
    await page.goto(address(server))
    await ask(page, "why?")
    await page.reload()
    await until(lambda: hub.count == 1)
    for conn in hub.connections:
        await hub.close(conn, 4000)
    whole = "You have asked: why? A model would think about it now. " * 5
    await expect(page.locator("p").first).to_have_text(whole.strip())
    await expect(page.get_by_role("button", name="Ask")).to_be_enabled()
    await page.reload()
    await expect(page.locator("p").first).to_have_text(whole.strip())
    await expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    # A page that is reloaded before the first token of another answer has not kept the last one.
    await page.get_by_label("Ask").fill("and?")
    code = "() => { document.forms[0].requestSubmit(); return sessionStorage.text; }"
    assert await page.evaluate(code) == ""


@pytest.mark.parametrize("example", ["tokens"], indirect=True)
async def test_tokens_can_be_stopped(example: Any, server: Server, tab: InBrowser) -> None:
    """At once, also after a reload: the model stops, too."""
    example.PAUSE = 60
    example.print = (printed := list[str]()).append
    page = tab.page
    await page.goto(address(server))
    for reloads in (False, True):
        await ask(page, "why?")
        if reloads:
            await page.reload()
        await page.get_by_role("button", name="Stop").click()
        await expect(page.get_by_role("button", name="Ask")).to_be_enabled()
        await expect(page.locator("p").first).to_have_text("You")
        await until(lambda: printed == ["the model can stop"])
        printed.clear()
