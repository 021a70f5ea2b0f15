"""The recipes of ``docs/deployment.md`` for an app that is mounted in another framework's."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import sys
import types
from typing import Any
from urllib.request import Request, urlopen

import falcon.asgi
import pytest
from support import connect, serving, until
from test_docs import ROOT, blocks

from pachinko import Connection, Hub, Pachinko, hub

PAGE = ROOT / "docs" / "deployment.md"
FRAMEWORKS = ("fastapi", "starlette", "litestar")


def recipe(name: str) -> Any:
    """The page's program for the framework *name*, as a module."""
    if importlib.util.find_spec(name) is None:
        pytest.fail(f"this recipe is for {name}: {sys.executable} -m pip install {name}")
    (code,) = (c for c in blocks(PAGE, "python") if f"from {name}" in c and "ws.running()" in c)
    module = types.ModuleType(f"mounted_{name}")
    sys.modules[module.__name__] = module  # where annotations are looked up
    exec(compile(code, PAGE, "exec", dont_inherit=True), vars(module))
    return module


@pytest.mark.parametrize("name", FRAMEWORKS)
async def test_a_mounted_app_runs_with_the_other_one(name: str) -> None:
    """Hub and workers start and end with its lifespan; clients connect below the mount."""
    module, events = recipe(name), list[Any]()

    @module.ws.worker
    async def work() -> None:
        events.append("worker starts")
        try:
            await asyncio.Event().wait()
        finally:
            events.append("worker ends")

    @module.ws.on("slow")
    async def slow(conn: Connection) -> None:
        events.append("handler starts")
        await asyncio.sleep(0.2)
        events.append("handler ends")

    @module.ws.disconnect
    async def leave(conn: Connection) -> None:
        events.append(conn.close_code)

    async with contextlib.AsyncExitStack() as stack:
        async with serving(module.app) as server:
            await until(lambda: events)
            await hub.send("lobby", "nobody", None)  # before the first client, it is no error
            assert hub.state.loop is asyncio.get_running_loop()
            url = f"{server.url}/live/rooms/lobby"
            client = await stack.enter_async_context(connect(url))
            await until(lambda: hub.members("lobby"))
            await hub.send("lobby", "notice", {"text": "hi"})
            assert (await client.receive())["payload"] == {"text": "hi"}
            await client.send("slow")
            await until(lambda: "handler starts" in events)
        assert (await client.closed())[0] == 1012
    assert events == ["worker starts", "handler starts", "handler ends", 1012, "worker ends"]
    assert hub.state.loop is None


async def test_a_route_of_the_other_app_sends() -> None:
    """An ordinary endpoint of FastAPI reaches the members of a group."""
    module = recipe("fastapi")
    async with (
        serving(module.app) as server,
        connect(f"{server.url}/live/rooms/lobby") as client,
    ):
        await until(lambda: hub.members("lobby"))
        url = f"http://127.0.0.1:{server.port}/rooms/lobby/notices?text=hi"
        await asyncio.to_thread(lambda: urlopen(Request(url, b"")).close())
        assert await client.receive() == {
            "type": "notice", "group": "lobby", "payload": {"text": "hi"},
        }  # fmt: skip


async def test_a_plain_asgi_app_around_it() -> None:
    """Without a framework: whoever answers the lifespan enters the block."""
    app = falcon.asgi.App()
    ws = Pachinko(app, "/ws", hub=Hub())
    events: list[str] = []

    @ws.worker
    async def work() -> None:
        events.append("started")

    async def around(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        await receive()
        async with ws.running():
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async with serving(around) as server:
        await until(lambda: events)
        async with connect(f"{server.url}/ws"):
            await until(lambda: ws._hub.connections)
    assert ws._hub.state.loop is None
