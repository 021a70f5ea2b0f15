"""Each test makes an app of its own, and talks to it by a real socket."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncGenerator
from typing import Any

import uvicorn
from websockets.asyncio.client import ClientConnection, connect

from several_files.app import create_app


@contextlib.asynccontextmanager
async def running() -> AsyncGenerator[str, None]:
    """Serve a new app at a free port; give its URL."""
    server = uvicorn.Server(uvicorn.Config(create_app(), log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        task = asyncio.create_task(server.serve([sock]))
        while not server.started:
            assert not task.done()
            await asyncio.sleep(0.01)  # uvicorn tells nobody that it has started
        yield f"ws://127.0.0.1:{sock.getsockname()[1]}/ws"
        server.should_exit = True
        await task


def client(url: str, user: str) -> connect:
    """Connect as *user*: ``async with client(url + "/home", "ada") as socket:``."""
    return connect(url, additional_headers={"Authorization": f"Bearer {user}"}, proxy=None)


async def ask(client: ClientConnection, type: str, payload: Any = None) -> Any:
    """Send a request; return the payload of its reply, or the code of the error."""
    await client.send(json.dumps({"type": type, "id": 1, "payload": payload}))
    while True:
        message = json.loads(await asyncio.wait_for(client.recv(), 15))
        if message.get("id") == 1:
            payload = message.get("payload")
            return payload["code"] if message["type"] == "error" else payload


async def test_what_one_adds_the_room_sees() -> None:
    """The message that is sent has no prefix."""
    async with running() as url, client(url + "/home", "ada") as ada:
        async with client(url + "/home", "bob") as bob:
            assert await ask(bob, "room.size") == 2
            await ask(ada, "todo.add", {"text": "milk"})
            said = json.loads(await asyncio.wait_for(bob.recv(), 15))
        assert said["type"] == "added"
        assert said["payload"] == {"text": "milk", "who": "ada"}
        assert await ask(ada, "todo.list") == ["milk"]


async def test_only_the_administrator_clears() -> None:
    """Others are refused before their payload is looked at."""
    async with running() as url, client(url + "/home", "ada") as ada:
        await ask(ada, "todo.add", {"text": "milk"})
        assert await ask(ada, "admin.clear", {"name": 5}) == "forbidden"
        async with client(url + "/office", "admin") as admin:
            assert await ask(admin, "admin.clear", {"name": "home"}) == 1
            assert await ask(admin, "admin.clear", {"name": "home"}) == "not_found"
        assert await ask(ada, "todo.list") == []


async def test_two_apps_in_one_process_share_nothing() -> None:
    """Each has its database and its hub; the files are imported once."""
    async with (
        running() as one,
        running() as two,
        client(one + "/home", "ada") as ada,
        client(two + "/home", "bob") as bob,
    ):
        await ask(ada, "todo.add", {"text": "milk"})
        assert await ask(bob, "todo.list") == []
        assert await ask(bob, "room.size") == 1
