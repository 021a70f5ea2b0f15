"""What docs/cluster.md and the README say of several processes, run on real engines."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import falcon
import falcon.asgi
import pytest
from brokers import BrokerKind, BrokerProcess, running
from support import PATIENCE, Client, Server, connect, serving, until
from test_docs import README, ROOT, blocks, clean_hub, load, spans, tables

import pachinko_cluster
from pachinko import Connection, Hub, Pachinko, hub

__all__ = ["clean_hub"]  # a fixture for each test, here too

CLUSTER = ROOT / "docs" / "cluster.md"


def test_the_table_of_engines_has_all() -> None:
    """Each scheme, and the extra that it needs."""
    rows = tables(CLUSTER, "URL", "Broker", "Install")
    schemes = {span.split("://")[0] for row in rows for span in spans(row[0])}
    assert schemes == set(pachinko_cluster.SCHEMES)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = {extra for row in rows for extra in re.findall(r"\[(\w+)\]", row[2])}
    assert named == {"nats", "redis"} <= set(extras)


async def status(server: Server, path: str) -> str:
    """The status that a GET is answered with."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    head = (await reader.read()).decode()
    writer.close()
    return head.split()[1]


async def test_a_handler_that_answers_when_the_engine_is_away(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Before, the message goes out; then the client is told to try again."""
    async with running("nats") as engine:
        page = load(CLUSTER)
        hub.configure(engine.url)
        async with serving(page.app) as server, connect(f"{server.url}/ws") as client:
            assert (await client.ask("say", {"text": "hi"}))["type"] == "said"
            assert (await client.receive())["type"] == "say.reply"
            engine.kill()
            answer = await client.ask("say", {"text": "hi"})
            assert answer["payload"]["code"] == "try_again"
            async with connect(f"{server.url}/ws") as other:  # is let in all the same
                assert (await other.ask("say", {"text": "hi"}))["payload"]["code"] == "try_again"
            assert [record.levelname for record in caplog.records if record.name == page.__name__]


class Sending:
    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        await hub.send("lobby", "said")


async def test_a_responder_that_answers_when_the_engine_is_away() -> None:
    """With 200 before, and with 503."""
    async with running("nats") as engine:
        page = load.__wrapped__(CLUSTER)  # An app that runs takes no route.
        page.app.add_route("/send", Sending())
        hub.configure(engine.url)
        async with serving(page.app) as server:
            assert await status(server, "/send") == "200"
            engine.kill()
            assert await status(server, "/send") == "503"


@pytest.mark.parametrize(("page", "kind"), [(CLUSTER, "redis"), (README, "nats")])
async def test_nightly(page: Path, kind: BrokerKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program without an app reaches the members of a group."""
    async with running(kind) as engine, Scene(engine.url) as scene:
        (code,) = (code for code in blocks(page, "python") if "async def nightly" in code)
        port = r"localhost:\d+"
        names: dict[str, Any] = {"hub": Hub()}
        exec(re.sub(port, f"127.0.0.1:{engine.port}", code), names)
        group = "room:lobby" if page is README else "room:1"
        async with scene.member(group) as client:
            await names["nightly"]()
            assert (await client.receive())["payload"] == {"text": "the report is ready"}


async def test_a_program_without_an_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's lines, in a thread, reach the members of a group and find a user."""
    (code,) = (c for c in blocks(CLUSTER, "python") if "sync_hub.send(" in c)
    async with running("nats") as engine, Scene(engine.url) as scene:
        monkeypatch.setenv("PACHINKO_BACKPLANE", engine.url)
        async with scene.member("room:1") as client:
            names: dict[str, Any] = {}
            await asyncio.to_thread(exec, code, names)
            assert (await client.receive())["payload"] == {"text": "the report is ready"}
            assert names["online"] is True
            names["sync_hub"].stop()


class Scene:
    """An app on an engine, for what is outside of it."""

    def __init__(self, url: str) -> None:
        self.hub = Hub()
        self.hub.configure(url)
        app = falcon.asgi.App()
        ws = Pachinko(app, "/ws", hub=self.hub)
        self.server = Server(app)

        @ws.connect
        async def join(conn: Connection) -> None:
            conn.user = "ada"
            await conn.join(conn.req.get_param("group", required=True))

    async def __aenter__(self) -> Scene:
        await self.server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.stop()

    def member(self, group: str) -> Any:
        return connect(f"{self.server.url}/ws{falcon.to_query_str({'group': group})}")


async def run_command(line: str, engine: BrokerProcess) -> asyncio.subprocess.Process:
    """Run a line of a shell with the commands of this environment and another engine."""
    folder = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    line = re.sub(r"localhost:\d+", f"127.0.0.1:{engine.port}", line.removeprefix("$ "))
    environment = {**os.environ, "PATH": folder}
    return await asyncio.create_subprocess_shell(
        f"exec {line}", env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


async def test_the_commands_of_the_page() -> None:
    """What `listen`, `send` and `presence` print is what the page shows."""
    (shown,) = (text for text in blocks(CLUSTER, "text") if "pachinko listen" in text)
    (listen, heard), (send,), (ask, found) = (
        part.strip().split("\n") for part in shown.strip().split("\n\n")
    )
    async with running("nats") as engine, Scene(engine.url) as scene:
        listening = await run_command(f"{listen} --count 1", engine)
        assert listening.stderr is not None
        assert b"listening" in await asyncio.wait_for(listening.stderr.readline(), PATIENCE)
        sending = await run_command(send, engine)
        assert await asyncio.wait_for(sending.communicate(), PATIENCE) == (b"", b"")
        out, _ = await asyncio.wait_for(listening.communicate(), PATIENCE)
        assert out.decode().strip() == heard
        async with scene.member("lobby"):
            asking = await run_command(ask, engine)
            out, _ = await asyncio.wait_for(asking.communicate(), PATIENCE)
        (conn,) = [json.loads(line) for line in out.splitlines()]
        example = json.loads(found)
        assert conn.keys() == example.keys() and conn["user"] == example["user"]
        for each in (conn, example):
            assert each["id"].startswith(each["process"]) and len(each["id"]) == 24


async def test_the_command_of_the_readme() -> None:
    """The one line reaches a member."""
    (line,) = (t for t in blocks(README, "text") if "pachinko send" in t)
    async with (
        running("nats") as engine,
        Scene(engine.url) as scene,
        scene.member("room:lobby") as client,
    ):
        sending = await run_command(line.strip(), engine)
        assert await asyncio.wait_for(sending.communicate(), PATIENCE) == (b"", b"")
        assert (await client.receive())["payload"] == {"text": "the report is ready"}


async def test_a_backplane_of_sockets() -> None:
    """The page's own engine carries a group between two hubs, and loses nothing of a burst."""
    page = load(CLUSTER)
    with tempfile.TemporaryDirectory(prefix="p") as folder:  # a socket's path has a short limit
        scenes = [Scene(page.Sockets(folder)) for _ in range(2)]
        async with (
            scenes[0] as one,
            scenes[1] as other,
            one.member("room") as a,
            other.member("room") as b,
        ):
            await asyncio.gather(*(one.hub.send("room", "n", n) for n in range(50)))
            for client in (a, b):
                received = [(await client.receive())["payload"] for _ in range(50)]
                assert received == list(range(50))
            assert len(await other.hub.presence("room")) == 2
        assert not os.listdir(folder)


async def test_a_user_bound_to_what_the_page_says(tmp_path: Path) -> None:
    """NATS by subjects, Redis by the page's command: that is all that a hub needs."""
    (acl,) = re.findall(r"`ACL (SETUSER app .*?)`", CLUSTER.read_text(), re.DOTALL)
    config = tmp_path / "nats.conf"
    config.write_text(
        "authorization { users = [{ user: app, password: password, permissions: { publish: "
        '"pachinko.>", subscribe: "pachinko.>" } }] }'
    )
    assert "`pachinko.>`" in CLUSTER.read_text()
    async with running("redis") as redis, running("nats", "-c", str(config)) as nats:
        reader, writer = await asyncio.open_connection("127.0.0.1", redis.port)
        writer.write(f"ACL {' '.join(acl.split())}\r\n".encode())
        assert await asyncio.wait_for(reader.readline(), PATIENCE) == b"+OK\r\n"
        writer.close()
        for engine in (redis, nats):
            url = engine.url.replace("://", "://app:password@")
            async with Scene(url) as scene, scene.member("room") as client:
                await scene.hub.send("room", "hi")
                assert (await client.receive())["type"] == "hi"
                await scene.hub.send_to_user("ada", "hi")
                assert (await client.receive())["type"] == "hi"
                assert len(await scene.hub.presence("room")) == 1


class House(Scene):
    """A process with the page's recipe for the last tab of a user."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        (code,) = (code for code in blocks(CLUSTER, "python") if "async def tell" in code)
        attached = functools.partial(Pachinko, hub=self.hub)
        names = {"hub": self.hub, "Pachinko": attached, "Connection": Connection}
        _, attach, rest = code.partition("people = ")  # behind the imports and the app
        exec(attach + rest, {**names, "app": self.server.uvicorn.config.app})

    def tab(self, user: str) -> Any:
        return connect(f"{self.server.url}/people?user={user}")


async def about(client: Client, user: str, hub: Hub) -> list[bool]:
    """What *client* has been told about *user* up to now."""
    await hub.send("people", "marker")
    told: list[bool] = []
    while (message := await client.receive())["type"] != "marker":
        if message["payload"]["user"] == user:
            told.append(message["payload"]["is_here"])
    return told


async def test_the_last_tab_of_a_user(broker: BrokerProcess) -> None:
    """What the table of the page says of tabs on two processes."""
    async with House(broker.url) as one, House(broker.url) as two, one.tab("eve") as eve:
        hubs = (one.hub, two.hub)

        async def settled(count: int) -> None:
            await until(lambda: sum(len(each.connections) for each in hubs) == count)
            await until(lambda: sum(each.count for each in hubs) == count)

        async with one.tab("ada") as first, two.tab("ada") as second:
            assert (await first.receive())["payload"]["is_here"]
            assert (await second.receive())["payload"]["is_here"]
            await settled(3)
            await asyncio.gather(first.close(), second.close())
            await settled(1)
        told = await about(eve, "ada", one.hub)
        assert told[0] and not told[-1] and 1 <= told.count(False) <= 2
        async with one.tab("ada") as first, two.tab("ada") as second:
            await second.receive()
            await settled(3)
            await about(eve, "ada", one.hub)
            await first.close()
            await settled(2)
            assert set(await about(eve, "ada", one.hub)) == {True}
