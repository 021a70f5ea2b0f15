"""What the page on reaching clients says about questions and about groups by id."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from typing import Any

import playwright.async_api
import pytest
from support import Client, Server, connect, serving, until
from test_docs import ROOT, blocks, clean_hub, load, spans, tables

from pachinko import AnswerError, hub

__all__ = ["clean_hub"]  # a fixture for each test, here too

PAGE = ROOT / "docs" / "reaching.md"


@pytest.fixture
def page() -> Any:
    return load(PAGE)


@pytest.fixture
async def server(page: Any) -> AsyncIterator[Server]:
    async with serving(page.shelf._app) as server:
        yield server


def frames() -> list[dict[str, Any]]:
    """The question and the two answers of the page's table."""
    text = PAGE.read_text().split("the server asks |")[1]
    return [json.loads(spans(line)[-1]) for line in text.splitlines()[:3]]


async def test_a_handler_goes_on_with_the_answer(page: Any, server: Server) -> None:
    """The frames are those of the table."""
    question, yes, busy = frames()
    async with connect(server.url + "/shelf") as client:
        assert await client.ask("delete", {"name": "a.txt"}, id=1) == question
        await client.raw(json.dumps(yes))
        assert await client.receive() == {"type": "delete.reply", "id": 1, "payload": True}
        assert page.files == {"b.txt"}
        assert (await client.ask("delete", {"name": "b.txt"}, id=2))["id"] == "$2"
        await client.raw(json.dumps({**busy, "id": "$2"}))
        error = await client.receive()
        assert error["id"] == 2 and error["payload"]["code"] == "no_answer"
        assert page.files == {"b.txt"}


async def test_a_page_answers(server: Server) -> None:
    """It answers a question that it knows, one that it does not know, and one that fails."""
    (code,) = blocks(PAGE, "js")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.fail("this test needs Chromium: apt-get install chromium, or set CHROMIUM")
    async with playwright.async_api.async_playwright() as play:
        browser = await play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = await browser.new_page()
        page.on("dialog", lambda dialog: asyncio.ensure_future(dialog.accept()))
        await page.goto(f"http://127.0.0.1:{server.port}/")
        socket = f"const socket = new WebSocket('{server.url}/shelf');"
        fail = "answers.fail = async () => { throw new Error('no idea'); };"
        await page.evaluate(f"() => {{ {socket}\n{code}\n{fail} }}")
        await until(lambda: hub.connections)
        (conn,) = hub.connections
        assert await hub.ask(conn, "confirm", {"text": "Sure?"}, returns=bool) is True
        for type, said in (("what", "not a function"), ("fail", "no idea")):
            with pytest.raises(AnswerError) as raised:
                await hub.ask(conn, type)
            assert raised.value.code == "failed" and said in raised.value.message
        await browser.close()


async def test_the_client_in_python_says_yes(page: Any, server: Server) -> None:
    """To each question, until it is closed."""
    (code,) = (code for code in blocks(PAGE, "python") if "def say_yes" in code)
    client: dict[str, Any] = {}
    exec(compile(code, PAGE, "exec", dont_inherit=True), client)
    thread = asyncio.to_thread(client["say_yes"], server.url + "/shelf")
    running = asyncio.ensure_future(thread)
    await until(lambda: hub.connections)
    (conn,) = hub.connections
    for _ in range(2):
        assert await hub.ask(conn, "confirm", {"text": "?"}, returns=bool) is True
    await conn.send("error", {"code": "none"})
    await hub.close(conn)
    await running
    assert hub.stats()["late"] == 0


async def delete(server: Server, id: str) -> tuple[str, Any]:
    """The status and the body that the page's responder answers with."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    path = f"/removal/{id}/b.txt"
    writer.write(f"DELETE {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    return head.split()[1], json.loads(body)


async def answer(client: Client, type: str, payload: Any) -> None:
    question = await client.receive()
    await client.send(type, payload, question["id"])


async def test_a_responder_asks_by_id(page: Any, server: Server) -> None:
    """It answers for each outcome."""
    async with connect(server.url + "/shelf") as client:
        await until(lambda: hub.connections)
        (conn,) = hub.connections
        task = asyncio.ensure_future(delete(server, conn.id))
        await answer(client, "error", {"code": "busy"})
        assert (await task)[0] == "409" and (await task)[1]["description"] == "refused: busy"
        task = asyncio.ensure_future(delete(server, conn.id))
        await answer(client, "confirm.reply", True)
        assert await task == ("200", {"is_deleted": True})
        assert "b.txt" not in page.files
        assert (await delete(server, "0" * 24))[0] == "504"


async def test_a_client_is_invited_by_its_id(server: Server) -> None:
    """It gets what is sent to the group from then on."""
    async with connect(server.url + "/shelf") as a, connect(server.url + "/shelf") as b:
        await until(lambda: len(hub.connections) == 2)
        ids = {conn.id for conn in hub.connections}
        for id in ids:
            assert (await a.ask("invite", {"id": id}, id=1))["type"] in ("joined", "invite.reply")
        frame = await b.receive()
        assert frame["type"] == "joined" and frame["payload"]["who"] in ids
        assert hub.members("readers") == hub.connections


def test_the_tables_have_their_rows() -> None:
    """A row for each thing that may happen."""
    assert len(tables(PAGE, "What happens", "The call")) == 13
