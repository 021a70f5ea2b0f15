"""What ``docs/reaching.md`` shows and claims about bytes is run here."""

from __future__ import annotations

import ast
import asyncio
import re
import sys
import types
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support import PATIENCE, Client, connect, simulated, until

from pachinko import hub

PAGE = Path(__file__).parent.parent / "docs" / "reaching.md"

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs the files of the checkout")

TEXT = PAGE.read_text().partition("\n## Bytes\n")[2].partition("\n## ")[0] if PAGE.exists() else ""


def rows(*columns: str) -> list[tuple[str, str]]:
    """The rows of the table with these columns."""
    table = TEXT.partition(f"\n| {' | '.join(columns)} |\n")[2].partition("\n\n")[0]
    return [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in table.splitlines()[1:]]  # type: ignore[misc]  # of two


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """Where the page's app is served, to the user "ada"."""
    module = types.ModuleType("bytes_page")
    sys.modules[module.__name__] = module  # where annotations are looked up
    (code,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    exec(compile(code, str(PAGE), "exec", dont_inherit=True), vars(module))

    @module.ws.connect
    async def name(conn: Any) -> None:
        conn.user = "ada"

    async with simulated(module.app) as server:
        yield f"{server.url}/ws"
    hub.state.replace()


@pytest.fixture
async def client(url: str) -> AsyncIterator[Client]:
    async with connect(url) as client:
        await until(lambda: hub.members("room"))
        yield client


async def shown(client: Client) -> str:
    """The next frame as the page shows it."""
    frame = await asyncio.wait_for(client.socket.recv(), PATIENCE)
    return f"`{frame}`" if isinstance(frame, str) else f'`b"{frame.decode()}"`'


async def test_the_calls(client: Client) -> None:
    """Each row sends what it says, or raises."""
    (conn,) = hub.connections
    found = rows("You write", "The client gets")
    assert len(found) > 10
    data = b"hi"
    scope = {"conn": conn, "hub": hub, "data": data, "buffer": bytearray(data)}
    for code, gets in found:
        work = eval(code.strip("`"), scope)
        if gets.startswith("nothing: "):
            with pytest.raises(TypeError):
                await work
        else:
            await work
            assert await shown(client) == gets, code


async def test_the_answers(client: Client) -> None:
    """Each row answers what it says."""
    found = rows("The client sends", "It gets")
    assert len(found) == 3
    for sends, gets in found:
        code = sends.strip("`")
        await client.raw(ast.literal_eval(code) if code.startswith("b") else code)
        assert await shown(client) == gets


async def test_bytes_are_shared_with_the_others(url: str, client: Client) -> None:
    """As the page's handler says."""
    async with connect(url) as other:
        await until(lambda: len(hub.members("room")) == 2)
        await client.raw(b"\xff\x00")
        assert await asyncio.wait_for(other.socket.recv(), PATIENCE) == b"\xff\x00"
        assert await shown(client) == '`b"shared"`'
