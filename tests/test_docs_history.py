"""What docs/history.md shows and claims is run here."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re
import shutil
import sys
import types
import typing
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import falcon.asgi
import playwright.async_api
import pytest
from falcon.testing import ASGIConductor
from support import serving, until

import pachinko
from pachinko import (
    Client,
    Connection,
    Hub,
    MessageError,
    Pachinko,
    PachinkoError,
    Simulation,
    hub,
    simulate,
)

PAGE = Path(__file__).parent.parent / "docs" / "history.md"
TEXT = PAGE.read_text() if PAGE.exists() else ""
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
TALKS = [code for language, code in BLOCKS if language == "text"] or [""] * 3

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs the files of the checkout")


def rows(first: str) -> list[list[str]]:
    """The rows of the table whose first column is called *first*."""
    lines = TEXT.partition(f"\n| {first} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.fixture
def page() -> Iterator[Any]:
    """The page's Python, as one module."""
    module = types.ModuleType("history_page")
    sys.modules[module.__name__] = module  # where annotations are looked up
    for language, code in BLOCKS:
        if language == "python":
            exec(compile(code, PAGE, "exec", dont_inherit=True), vars(module))
    yield module
    hub._settings["rules"] = {}
    hub.state.replace()


class Talk:
    """A conversation as on the page, whose positions and ids stand for the real ones."""

    def __init__(self, sim: Simulation) -> None:
        self.sim, self.known = sim, dict[str, str]()
        self.client: Client | None = None
        self.taken = 0  # frames of this client

    def real(self, text: str) -> str:
        """*text* with the real positions and ids."""
        for shown, real in self.known.items():
            text = text.replace(shown, real)
        return text

    def matches(self, shown: Any, real: Any) -> bool:
        if isinstance(shown, dict) and isinstance(real, dict):
            return list(shown) == list(real) and all(self.matches(shown[k], real[k]) for k in shown)
        if isinstance(shown, str) and isinstance(real, str):
            if found := re.fullmatch(r"([0-9a-f]{4})(\.\d+)", shown):
                epoch = real.removesuffix(found[2])
                return real != epoch and self.known.setdefault(found[1], epoch) == epoch
            if re.fullmatch(r"c\d", shown):
                return self.known.setdefault(shown, real) == real
        return bool(shown == real) or (shown == "…" and isinstance(real, str))

    async def connect(self, path: str, query: dict[str, str]) -> None:
        self.client, self.taken = await self.sim.connect(path, query=query), 0

    async def run(self, lines: str, *does: Callable[[], Awaitable[object]]) -> None:
        """Run each line, and at the marks *does*, in this order."""
        for line in lines.strip().split("\n"):
            direction, _, what = line.partition(" ")
            if direction == "→" and what.startswith("/"):
                path, _, query = what.partition("?")
                name, _, value = self.real(query).partition("=")
                await self.connect(path, {name: value})
            elif direction == "→":
                assert self.client is not None
                await self.client.send_text(self.real(what))
            elif direction == "←":
                await self.sim.settle()
                assert self.client is not None
                frame = frames_of(self.sim, self.client)[self.taken]
                self.taken += 1
                assert self.matches(json.loads(what), json.loads(frame)), (what, frame)
            else:
                assert direction == "✕" and self.client is not None
                self.client.cut()
                action, *does = does
                await action()
        assert self.client is not None and len(frames_of(self.sim, self.client)) == self.taken


def frames_of(sim: Simulation, client: Client) -> list[str]:
    """The frames that *client* has got, as in the transcript."""
    return re.findall(rf"^ +[\d.]+ {client.name} ← (\{{.*)$", sim.transcript(), re.MULTILINE)


# The conversations


async def test_a_client_that_comes_back(page: Any) -> None:
    """It gets what it has missed, and is told that nothing is missing."""
    async with simulate(page.app) as sim:

        async def say(*texts: str) -> None:
            for text in texts:
                await hub.send("room:lobby", page.Said("ada", text))

        talk, lines = Talk(sim), TALKS[0].split("\n")
        await talk.run(lines[0] + "\n" + lines[1])
        await say("one")
        await talk.run("\n".join(lines[2:]), lambda: say("two", "three"))


async def test_a_snapshot_instead(page: Any) -> None:
    """The verdict has no position, the state has."""
    async with simulate(page.app) as sim:
        await Talk(sim).run(TALKS[1])


async def test_tokens_go_on(page: Any) -> None:
    """Where they were; an invented stream is lost."""
    async with simulate(page.app) as sim:
        talk, came, words = Talk(sim), asyncio.Event(), iter("1234")

        async def take_time(_: float) -> None:
            if next(words) == "2":
                await came.wait()

        async def come_back() -> None:
            came.set()
            await sim.settle()
            await talk.connect("/agent", {})

        page.asyncio = types.SimpleNamespace(sleep=take_time)
        await talk.connect("/agent", {})
        await talk.run(TALKS[2], come_back)


# The tables


WIRE = [(who, frame.strip("`")) for who, frame, _ in rows("From")]


@pytest.mark.parametrize("sends", [frame for who, frame in WIRE if who == "client"])
async def test_what_the_client_sends(page: Any, sends: str) -> None:
    """Each way to resume replays what was missed, or begins."""
    safe = Pachinko(page.app, "/safe/{room}")

    @safe.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        return token

    safe.connect(page.arrive)
    async with simulate(page.app) as sim:
        await hub.send("room:lobby", "said", 1)
        at = await hub.position("room:lobby")
        await hub.send("room:lobby", "said", 2)
        sends = sends.replace("9f3a.1", at)
        query = {"resume": sends.partition("=")[2] if sends.startswith("?") else "message"}
        path = "/safe/lobby" if "authenticate" in sends else "/ws/lobby"
        if path == "/safe/lobby":
            query = {}
        client = await sim.connect(path, query=query)
        if not sends.startswith("?"):
            await client.send_text(sends)
        elif query["resume"] == "message":
            await sim.settle()
            assert client.received == []
            await client.send("resume", {"groups": {"room:lobby": at}})
        await sim.settle()
        if "streams" in sends:
            (error,) = (each.payload for each in client.received if each.type == "error")
            assert error["code"] == "stream_lost"
            return
        types = [each.type for each in client.received if each.type != "authenticate.reply"]
        reply = ["resume.reply"] if json_id(sends) else []
        expected = ["resume"] if sends == "?resume={}" else ["said", "resume"]
        assert sorted(types) == sorted([*expected, *reply])


def json_id(text: str) -> Any:
    return json.loads(text).get("id") if text.startswith("{") else None


async def test_what_the_server_sends(page: Any) -> None:
    """Each frame of the table is one that a server sends, to the letter."""
    broken = Pachinko(page.app, "/broken/{room}")
    broken.connect(page.arrive)

    @broken.snapshot("room:")
    async def fail(conn: Connection, group: str) -> None:
        raise MessageError("no_such_room")

    frames = list[str]()
    async with simulate(page.app) as sim:
        clients = [await sim.connect("/ws/lobby", query={"resume": "{}"})]
        await hub.send("room:lobby", page.Said("ada", "one"))
        at = await hub.position("room:lobby")
        for text in ("two", "three"):
            await hub.send("room:lobby", page.Said("ada", text))
        client = await sim.connect(
            "/ws/lobby", query={"resume": json.dumps({"groups": {"room:lobby": at}})}
        )
        clients += [client, await sim.connect("/agent")]
        await client.send("resume", {"streams": [{"id": 8, "at": "x.1"}]}, id=1)
        await clients[-1].send("ask", {"prompt": "x"}, id=8)
        await sim.advance(301)
        for path in ("/ws/lobby", "/desk/lobby", "/broken/lobby"):
            query = {"resume": json.dumps({"groups": {"room:lobby": at}})}
            clients.append(await sim.connect(path, query=query))
        await sim.settle()
        frames = [frame for each in clients for frame in frames_of(sim, each)]
    for shown in [frame for who, frame in WIRE if who == "server"]:
        wanted = json.loads(shown.replace("Hel", "You"))
        assert any(Talk(sim).matches(wanted, json.loads(frame)) for frame in frames), shown


def test_the_reasons() -> None:
    """The table has each one."""
    assert {row[0].strip("`") for row in rows("`reason`")} == {*typing.get_args(pachinko.Reason)}


def test_the_sizes() -> None:
    """The table has the options and their defaults."""
    parameters = inspect.signature(Hub.keep).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    options["history_bytes"] = Hub()._settings["history_bytes"]
    shown = {}
    for call, default, _ in rows("Option"):
        name = re.findall(r"(\w+)=", call)[0]
        shown[name] = eval(default.strip("`"))
        assert f"{name}={default.strip('`')}" in call or name == "messages"
    assert shown == options


# The recipes


def test_the_numbers() -> None:
    """Those in the text are those of the code."""
    text = " ".join(TEXT.split())
    for shown, number in {
        "the last {} count": pachinko._RESUME_IDS,
        "with more than {} characters": pachinko._RESUME_CHARACTERS,
        "{} at a time in a process": pachinko._SNAPSHOTS,
        "(without one, {} seconds)": int(pachinko._SNAPSHOT_SECONDS),
        "The last {} items, or 1 MiB, are kept": pachinko._ITEMS,
        "A process keeps {} streams without a client": pachinko._MOST_ALONE,
        "go on with {} streams at a time": pachinko._MOST_RESUMED,
        "some {} bytes of Python objects": pachinko._ENTRY_BYTES + 50,  # an empty str
        "also counts {} bytes for each group": pachinko._RING_BYTES,
        "until {} other groups have run empty": pachinko._FLOORS,
        "at most {} messages or 64 KiB ahead": pachinko._BATCH,
        "together get {} messages in a turn": pachinko._REPLAYED,
    }.items():
        assert shown.format(f"{number:,}") in text, shown


async def test_prices(page: Any) -> None:
    """Who is new, or was away for long, gets the present price, and never old ones."""
    async with simulate(page.app) as sim:
        client = await sim.connect("/prices", query={"resume": "{}"})
        for symbol in ("new", "ACME"):
            await client.send("watch", {"symbol": symbol})
            await sim.settle()
        assert [(each.group, each.type) for each in client.received] == [
            ("price:new", "resume"), ("price:ACME", "resume"), ("price:ACME", "price"),
        ]  # fmt: skip
        at = client.received[-1].at
        for missed, expected in ((1, ["price", "resume"]), (3, ["gap", "price"])):
            client.cut()
            for n in range(missed):
                await page.publish("ACME", 42.0 + n)
            query = {"resume": json.dumps({"groups": {"price:ACME": at}})}
            client = await sim.connect("/prices", query=query)
            await client.send("watch", {"symbol": "ACME"})
            await sim.settle()
            assert [each.type for each in client.received] == expected
            (price,) = (each for each in client.received if each.type == "price")
            assert price.payload == {"value": 41.0 + missed}
            at = price.at


async def test_an_agent(page: Any) -> None:
    """It streams."""
    async with simulate(page.app) as sim:
        client = await sim.connect("/agent")
        tokens = [token async for token in client.stream("ask", {"prompt": "why?"})]
        assert tokens == ["You", "asked:", "why?"]


async def test_a_page_with_the_history(page: Any) -> None:
    """The client goes on where the page ends, with no message twice."""
    async with simulate(page.app) as sim:
        http = ASGIConductor(page.app)
        empty = (await http.simulate_get("/rooms/lobby")).json
        assert empty["said"] == []
        await hub.send("room:lobby", page.Said("ada", "one"))
        full = (await http.simulate_get("/rooms/lobby")).json
        assert full["said"] == [{"who": "ada", "text": "one"}]
        await hub.send("room:lobby", page.Said("ada", "two"))
        for rendered, texts in ((empty, ["one", "two"]), (full, ["two"])):
            query = {"resume": json.dumps({"groups": rendered["resume"]})}
            client = await sim.connect("/ws/lobby", query=query)
            await sim.settle()
            *said, verdict = client.received
            assert verdict.payload["replayed"] == len(texts)
            assert [each.payload["text"] for each in said] == texts


async def test_a_group_that_is_not_kept(page: Any) -> None:
    """It has neither a position nor a history; and a kept one takes no bytes."""
    async with simulate(page.app):
        with pytest.raises(PachinkoError):
            await hub.position("hall")
        with pytest.raises(PachinkoError):
            await anext(hub.history("hall"))
        with pytest.raises(PachinkoError):
            await hub.send("room:lobby", b"bytes")


async def test_a_slow_client(page: Any) -> None:
    """It is not closed, and gets what is kept; or is told that it was overtaken."""
    page.slow.connect(page.arrive)
    async with simulate(page.app) as sim:
        client = await sim.connect("/slow/lobby", query={"resume": "{}"})
        for count, is_gap in ((300, False), (2000, True)):
            await sim.settle()
            client.stall()
            for n in range(count):
                await hub.send("room:lobby", page.Said("ada", str(n)))
            client.resume()
            await sim.settle()
            gaps = [each.payload["reason"] for each in client.received if each.type == "gap"]
            assert gaps == ["overflow"] * len(gaps) and (bool(gaps) or not is_gap)
            assert client.end is None


class Shown:
    """A page of HTML."""

    def __init__(self, html: str) -> None:
        self.html = html

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        resp.content_type, resp.text = falcon.MEDIA_HTML, f"<!doctype html><body>{self.html}"


async def test_the_browsers_code(page: Any) -> None:
    """All of it runs in one page, with the library's client."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.fail("this test needs Chromium: apt-get install chromium, or set CHROMIUM")
    code = "\n".join(code for language, code in BLOCKS if language == "js")
    lines, errors = list[str](), list[str]()
    page.app.add_route("/", Shown(f'<script type="module">{code}</script>'))
    async with serving(page.app) as server, playwright.async_api.async_playwright() as play:
        browser = await play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = await browser.new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda line: line.type == "log" and lines.append(line.text))
        await tab.goto(f"http://127.0.0.1:{server.port}/")
        await until(lambda: lines or errors)  # The price that it has begun with.
        await until(lambda: len(hub.members("room:lobby")) == 2 or errors)
        assert (await tab.inner_text("body")).endswith("You asked: why?")
        await hub.send("room:lobby", page.Said("ada", "hi"))
        await page.publish("ACME", 50)
        await until(lambda: len(lines) == 3 or errors)
        await browser.close()
    assert errors == []
    assert sorted(lines) == ["ada hi", "price:ACME 41.5", "price:ACME 50"]


async def test_the_test(page: Any) -> None:
    """It passes."""
    await page.test_nothing_is_lost()
