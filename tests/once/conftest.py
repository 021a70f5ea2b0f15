"""One browser for all tests of the client, and a page or a process of Node for each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from javascript import InBrowser, InNode, Script, chromium, node, scripted
from playwright.async_api import Browser, Page


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def browser_of_clients() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="session")
async def tab(browser_of_clients: Browser) -> AsyncIterator[InBrowser]:
    """A page, without an address yet."""
    context = await browser_of_clients.new_context()
    yield InBrowser(await context.new_page())
    await context.close()


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def shared_page(browser_of_clients: Browser) -> Page:
    """A page that tests use one after the other, each with a server at an address of its own."""
    return await browser_of_clients.new_page()


@pytest_asyncio.fixture(loop_scope="session")
async def in_node(tmp_path: Path) -> AsyncIterator[InNode]:
    """A process of Node."""
    async with node(tmp_path) as runtime:
        yield runtime
        assert runtime.complaints == []


@pytest.fixture(params=["chromium", "node"])
def js(request: pytest.FixtureRequest) -> InBrowser | InNode:
    """A place where the client runs: a page, or a process of Node."""
    name = "in_page" if request.param == "chromium" else "in_node"
    runtime: InBrowser | InNode = request.getfixturevalue(name)
    return runtime


@pytest_asyncio.fixture(loop_scope="session")
async def in_page(shared_page: Page) -> AsyncIterator[InBrowser]:
    """The shared page, which must not complain."""
    runtime = InBrowser(shared_page)
    yield runtime
    await shared_page.goto("about:blank")
    runtime.forget()
    assert runtime.complaints == []


@pytest_asyncio.fixture(loop_scope="session")
async def script() -> AsyncIterator[Script]:
    async with scripted() as script:
        yield script
