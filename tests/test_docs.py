"""What the README, the pages in ``docs`` and the docstrings show and claim is run here."""

from __future__ import annotations
import __future__

import ast
import asyncio
import configparser
import contextlib
import dataclasses
import decimal
import functools
import inspect
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
import types
import typing
import urllib.request
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any, Literal

import cattrs
import falcon.asgi
import playwright.async_api
import pytest
import uvicorn
from falcon.testing import ASGIConductor
from support import PATIENCE, Server, connect, serving, simulated, until
from websockets.exceptions import InvalidStatus

import pachinko
import pachinko_cluster
from pachinko import Connection, Hub, Pachinko, PachinkoError, hub

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code of *page* in *language*, with empty lines before: as many as on the page."""
    text = page.read_text()
    found = [match for match in BLOCK.finditer(text) if match[1] == language]
    return ["\n" * text.count("\n", 0, match.start(2)) + match[2] for match in found]


def prose(page: Path) -> str:
    """The text of *page* without its fenced code."""
    return BLOCK.sub("", page.read_text())


def tables(page: Path, *columns: str) -> list[list[str]]:
    """The rows of every table of *page* that has these *columns*."""
    rows: list[list[str]] = []
    wanted = False
    for line in prose(page).splitlines():
        cells = [c.strip().replace(r"\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            wanted = False
        elif cells == list(columns):
            wanted = True
        elif wanted and set(line) != set("|-"):
            rows.append(cells)
    return rows


def filled(rows: list[list[str]]) -> list[list[str]]:
    """Merge each row with an empty first cell into the one above, cell by cell."""
    merged: list[list[str]] = []
    for row in rows:
        if row[0]:
            merged.append(row)
        else:
            merged[-1] = [
                f"{above}\n{below}".strip() for above, below in zip(merged[-1], row, strict=True)
            ]
    return merged


def spans(cell: str) -> list[str]:
    return SPAN.findall(cell)


def is_client(code: str) -> bool:
    """Whether *code* is a program of its own, and not a part of the page's app."""
    return "websockets" in code or "asyncio.run(" in code or "SyncHub(" in code


@functools.cache
def load(page: Path) -> Any:
    """Run a page's Python, one block after the other, as one module."""
    module = types.ModuleType(f"page_{page.stem}")
    module.__file__ = str(page)
    sys.modules[module.__name__] = module  # where annotations are looked up
    for code in blocks(page, "python"):
        if not is_client(code):
            exec(compile(code, page, "exec", dont_inherit=True), vars(module))
    return module


@pytest.fixture(autouse=True)
def clean_hub() -> Iterator[None]:
    """The pages' apps share the module's hub."""
    hub.configure(None, converter=None, namespace=None)
    yield
    hub.state.replace()  # also after a test that failed before its app was shut down
    hub.configure(None, converter=None, namespace=None)


# The README's app


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """All of the README's Python as one app, served by uvicorn."""
    async with serving(load(README).app) as server:
        yield server


def here(code: str, server: Server) -> str:
    """*code* for the port that *server* has."""
    assert "127.0.0.1:8000" in code
    return code.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")


def test_the_main_example_is_type_checked() -> None:
    """The README begins with the program that mypy and pyright check in ``tests/typing``."""
    first = blocks(README, "python")[0]
    assert first.lstrip("\n") == (ROOT / "tests" / "typing" / "readme.py").read_text()


async def test_the_main_example_runs_by_itself() -> None:
    """The README's first block needs nothing of the later ones."""
    module = types.ModuleType("first")
    exec(blocks(README, "python")[0], vars(module))
    async with simulated(module.app) as server, connect(f"{server.url}/ws/lobby") as client:
        async with connect(f"{server.url}/ws/lobby") as other:
            answer = await other.ask("sum", {"a": 1, "b": 2}, id=7)
            assert answer == {"type": "sum.reply", "id": 7, "payload": 3}
            await other.send("say", {"text": "hi"})
            said = await client.receive()
            assert said["payload"]["text"] == "hi"
        left = await client.receive()
        assert left["type"] == "left" and left["payload"]["who"] == said["payload"]["who"]


async def test_the_python_client_runs(server: Server) -> None:
    """The README's client in Python prints what its comment says."""
    (code,) = filter(is_client, blocks(README, "python"))
    (printed,) = re.findall(r"print\(.*  # (.*)", code)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", here(code, server), stdout=subprocess.PIPE,
        env={**os.environ, "NO_PROXY": "127.0.0.1"},
    )  # fmt: skip
    output, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 0
    assert output.decode().strip() == printed


async def test_the_browser_client_runs(server: Server) -> None:
    """The README's JavaScript runs in the console of the server's own page."""
    log_in, code = blocks(README, "js")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.fail("this test needs Chromium: apt-get install chromium, or set CHROMIUM")
    async with playwright.async_api.async_playwright() as play:
        browser = await play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = await browser.new_page()
        errors: list[str] = []
        lines: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: line.type == "log" and lines.append(line.text))
        await page.goto(f"http://127.0.0.1:{server.port}/")
        console = await page.context.new_cdp_session(page)

        async def paste(code: str) -> Any:
            options = {"expression": code, "replMode": True, "returnByValue": True}
            done = await console.send("Runtime.evaluate", {**options, "awaitPromise": True})
            assert "exceptionDetails" not in done, done
            return done["result"].get("value")

        await paste(here(code, server))
        await until(lambda: len(lines) == 2 or errors)
        refused = "await ask('sum', { a: 'x' }).catch((error) => error.code)"
        assert await paste(refused) == "invalid_payload"
        page.once("dialog", lambda dialog: asyncio.ensure_future(dialog.accept()))
        assert await paste("await ask('leave')") == "bye"
        lost = "const lost = ask('report', { year: 1 }); socket.close();"
        lost += "await lost.catch((event) => event.type)"
        assert await paste(lost) == "close"
        await paste(here(log_in, server))
        await until(lambda: len(hub.state.registry.users.get("ada", ())) == 2)
        await browser.close()
    assert errors == []
    assert re.fullmatch(r"\S{24} said hi", lines[0])
    assert lines[1] == "3"


def matches(shown: Any, actual: Any) -> bool:
    """Whether *actual* is what is *shown*, in which ``…`` stands for any text."""
    if isinstance(shown, dict) and isinstance(actual, dict):
        return shown.keys() == actual.keys() and all(matches(shown[k], actual[k]) for k in shown)
    if isinstance(shown, list) and isinstance(actual, list):
        return len(shown) == len(actual) and all(map(matches, shown, actual))
    return shown == actual or (shown == "…" and isinstance(actual, str))


async def test_the_conversation(server: Server) -> None:
    """Each line of the README's conversation is sent, or received, as it is shown."""
    (talk,) = (text for text in blocks(README, "text") if "→" in text)
    async with connect(f"{server.url}/ws/lobby") as client:
        for line in talk.split("\n"):
            direction, _, frame = line.partition(" ")
            assert direction in {"→", "←", ""}
            if direction == "→":
                await client.raw(frame)
            elif direction == "←":
                answer = await client.receive()
                assert matches(json.loads(frame), answer), answer


FOR_CHECKERS = {"Connection", "Envelope", "AsyncIterator", "Awaitable", "Callable"}


async def test_the_app_with_imports_for_type_checkers_only() -> None:
    """What ``ruff check --select TC --fix`` moves below ``if TYPE_CHECKING:`` is not missed."""
    code = "\n".join(code for code in blocks(README, "python") if not is_client(code))
    tree = ast.parse(code)
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            alias.asname = "_" if alias.name in FOR_CHECKERS else alias.asname
    postponed = __future__.annotations.compiler_flag
    exec(compile(tree, README, "exec", postponed, True), names := {"__name__": "page"})
    assert names.keys().isdisjoint(FOR_CHECKERS)
    async with simulated(names["app"]) as server, connect(server.url + "/ws/a") as client:
        assert (await client.ask("sum", {"a": 1, "b": 2}))["payload"] == 3
        assert (await client.ask("count", {"to": 2}))["payload"] == 0


async def test_a_stream_is_stopped(server: Server) -> None:
    """The client's ``complete`` for a stream is answered by the same."""
    async with connect(f"{server.url}/ws/lobby") as client:
        assert (await client.ask("count", {"to": 1000}, id=8))["more"]
        await client.send("complete", id=8)
        while (frame := await client.receive()).get("more"):
            pass
    assert frame == {"type": "complete", "id": 8}


async def test_a_concurrent_handler(server: Server) -> None:
    """While the report is made, other messages are answered."""
    async with connect(f"{server.url}/ws/lobby") as client:
        await client.send("report", {"year": 2026}, id=1)
        assert (await client.ask("sum", {"a": 1}, id=2))["id"] == 2


async def test_the_inbox(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """A known token names the user, whom ``send_to_user`` reaches; another one is told why not."""
    async with connect(f"{server.url}/inbox", subprotocols=["bearer", "s3cret"]) as ada:
        assert await ada.receive() == {"type": "welcome", "payload": {"user": "ada"}}
        assert 'await hub.send_to_user("ada", "mail", {"unread": 1})' in prose(README)
        await hub.send_to_user("ada", "mail", {"unread": 1})
        assert (await ada.receive())["payload"] == {"unread": 1}
        await ada.close(4000)
    async with connect(f"{server.url}/inbox", subprotocols=["bearer", "guess"]) as nobody:
        assert await nobody.closed() == (3401, "authentication failed")
    await until(lambda: "ada left with 4000" in capsys.readouterr().out)


async def test_errors_of_ones_own(server: Server) -> None:
    """A `MessageError` is answered with its details, another exception by its error handler."""
    async with connect(f"{server.url}/ws/lobby") as client:
        assert (await client.ask("move", {"x": 9}))["payload"] == {
            "code": "off_board", "message": "the board has 8 columns", "columns": 8,
        }  # fmt: skip
        assert (await client.ask("move", {"x": 2}))["payload"] == {
            "code": "empty_field", "message": "no piece at 2",
        }  # fmt: skip
        await client.send("move", {"x": 1})
        assert await client.receive() == {"type": "moved", "payload": "rook"}


async def test_the_resource(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """The resource has one list for all connections, and the middleware sees its messages."""
    async with connect(f"{server.url}/ws/a") as one, connect(f"{server.url}/ws/b") as two:
        await one.ask("todo.add", {"text": "x"})
        answer = await two.ask("todo.add", {"text": "y"})
    assert answer == {"type": "todo.add.reply", "id": 1, "payload": ["x", "y"]}
    assert re.search(r"^todo.add: 0\.\d{6} s$", capsys.readouterr().out, re.MULTILINE)


async def test_the_hub_from_elsewhere(server: Server) -> None:
    """An HTTP route reaches everybody, a thread the members of a group."""
    async with connect(f"{server.url}/ws/lobby") as client:
        await client.ask("sum", {"a": 1})
        await asyncio.to_thread(post, server, "/notices", {"text": "soon"})
        assert await client.receive() == {"type": "notice", "payload": {"text": "soon"}}
        (call,) = (each for each in spans(prose(README)) if each.startswith("hub.call_threadsafe"))
        await asyncio.to_thread(eval, call.replace("room:1", "room:lobby"), {"hub": hub})
        said = {"type": "said", "group": "room:lobby", "payload": {"text": "hi"}}
        assert await client.receive() == said


def post(server: Server, path: str, media: Any) -> int:
    url = f"http://127.0.0.1:{server.port}{path}"
    request = urllib.request.Request(
        url, json.dumps(media).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        return int(response.status)


# The README's tables and lists


SIGNATURES = tables(README, "Signature", "The client sends", "The handler gets")


@pytest.mark.parametrize(("signature", "frame", "gets"), SIGNATURES)
async def test_the_rule_of_signatures(signature: str, frame: str, gets: str) -> None:
    """A handler with the signature gets what the table says."""
    namespace = vars(load(README))
    code = f"async def handler{signature.strip('`')}:\n    got.append(locals())"
    exec(code, namespace | {"got": (got := [])}, made := {})
    text = frame.strip("`")
    async with talking(Hub(), {json.loads(text)["type"]: made["handler"]}) as client:
        await client.send_text(text)
        await client.send_text('{"type":"unknown"}')  # its answer comes after the handler
        await client.receive_text()
    del got[0]["conn"]
    assert got == [eval(f"dict({gets.strip('`')})" if gets != "nothing" else "{}", namespace)]


@contextlib.asynccontextmanager
async def talking(hub: Hub, handlers: dict[str, Any]) -> AsyncIterator[Any]:
    """A client of an app with these *handlers* by type."""
    app, ws = falcon.asgi.App(), Pachinko(hub=hub)
    app.add_route("/ws", ws)
    app.add_middleware(ws)
    for type, handler in handlers.items():
        ws.on(type)(handler)
    async with ASGIConductor(app) as conductor, conductor.simulate_ws("/ws") as client:
        yield client


def test_the_options() -> None:
    """The table of options has every option of `Pachinko`, with its default."""
    parameters = inspect.signature(Pachinko).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    table = tables(README, "Option of `Pachinko`", "Default", "Meaning")
    shown = {
        name.strip("`"): eval(default.strip("`"), vars(pachinko)) for name, default, _ in table
    }
    assert shown == options


def test_the_error_codes() -> None:
    """The README lists the codes that the module sends, and no other."""
    (line,) = re.findall(r"^- Error codes: (.*?)\.$", README.read_text(), re.M | re.S)
    source = inspect.getsource(pachinko)
    sent = set(re.findall(r'(?:MessageError|BadFrame)\(\s*f?"([a-z_{}]+)"', source))
    sent = {code.replace("{status}", "<status>") for code in sent}
    assert set(spans(line)) == sent | {"http_<status>"}


def test_the_reserved_types() -> None:
    """The types that the README calls reserved are refused."""
    (line,) = re.findall(r"^- Reserved types: (.*)\.$", README.read_text(), re.MULTILINE)
    for type in spans(line):
        with pytest.raises(PachinkoError, match="is reserved"):
            Pachinko().on(type.replace("…", "x"))(lambda conn: None)


# docs/falcon.md: authentication


AUTHENTICATION = tables(
    ROOT / "docs" / "falcon.md", "The client sends", "The function gets", "and if it returns None"
)


@pytest.mark.parametrize(("sends", "gets", "then"), AUTHENTICATION)
async def test_how_a_token_is_sent(sends: str, gets: str, then: str) -> None:
    """Each way of the table gives the function what it says, and ends as it says."""
    app, got, first = falcon.asgi.App(), list[Any](), None
    ws = Pachinko(app, "/ws", hub=Hub())

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        got.append(token)

    options: dict[str, Any] = {}
    if "Authorization" in sends:
        name, _, value = spans(sends)[0].partition(": ")
        options["additional_headers"] = {name: value}
    elif "subprotocols" in sends:
        options["subprotocols"] = spans(sends)
    elif sends != "neither":
        (first,) = spans(sends)
    async with simulated(app) as server, connect(f"{server.url}/ws", **options) as client:
        if first is not None:
            await client.raw(first)
        if then != "the first message is waited for":
            assert f"closed with {(await client.closed())[0]}" == then
        else:
            await until(lambda: got and not client.socket.close_code)
        assert repr(got[-1]) == (spans(gets)[0] if gets.startswith("`None") else "'TOKEN'")


@pytest.mark.parametrize("how", ["cookie", "token", "message"])
async def test_the_account(how: str) -> None:
    """A cookie and a token name the same session, which ends when it has to."""
    page = load(ROOT / "docs" / "falcon.md")
    options: dict[str, Any] = {
        "cookie": {"additional_headers": {"Cookie": "session=5e551"}},
        "token": {"additional_headers": {"Authorization": "Bearer 5e551"}},
        "message": {},
    }[how]
    async with simulated(page.app) as server, connect(f"{server.url}/account", **options) as client:
        if how == "message":
            await client.send("authenticate", {"token": "5e551"})
        assert (await client.ask("x"))["payload"]["code"] == "unknown_type"
        (conn,) = hub.connections
        assert (conn.user, conn.expires_at) == page.SESSIONS["5e551"]


# docs/reliability.md


RELIABILITY = tables(ROOT / "docs" / "reliability.md", "Promise", "Shown by")


@pytest.mark.parametrize(("promise", "shown_by"), RELIABILITY)
def test_each_promise_has_its_test(promise: str, shown_by: str) -> None:
    """The tests that are said to show a promise exist, each of them."""
    assert spans(shown_by)
    for test in spans(shown_by):
        path, _, name = test.partition("::")
        assert re.search(rf"^ *(async )?def {name}\(", (ROOT / path).read_text(), re.M), promise


# docs/payloads.md


PAYLOADS = ROOT / "docs" / "payloads.md"
TYPES = tables(
    PAYLOADS, "Annotation", "The client sends", "The handler gets", "It goes out as", "Refused"
)
ERRORS = filled(tables(PAYLOADS, "Annotation", "The client sends", "Path", "Message"))
WAYS = tables(PAYLOADS, "Annotation", "The client sends", "In one pass", "By cattrs")
COERCED = tables(PAYLOADS, "Annotation", "The client sends", "Pachinko", "`cattrs.Converter()`")

each_way = pytest.mark.parametrize("way", ["In one pass", "By cattrs"])


@pytest.fixture
def names() -> dict[str, Any]:
    """What the code in the tables' cells may use."""
    times = {"UTC": UTC, "date": date, "datetime": datetime, "time": time, "timedelta": timedelta}
    others = {"UUID": uuid.UUID, "Decimal": decimal.Decimal, "Sequence": Sequence}
    page = vars(load(PAYLOADS))
    hub.configure(converter=page["converter"])
    return {**vars(typing), **page, **times, **others}


def hub_that_reads(way: str) -> Hub:
    """A hub whose payloads are read in one pass where they can be; or the page's, by cattrs."""
    return Hub() if way == "In one pass" else hub


def returning(annotation: Any, got: list[Any]) -> Any:
    """A handler that takes a payload of the type *annotation*, and returns it."""

    async def handler(conn: Connection, value: Any) -> Any:
        got.append(value)
        return value

    handler.__annotations__["value"] = annotation
    return handler


async def ask(client: Any, type: str, payload: str) -> dict[str, Any]:
    await client.send_text(f'{{"type":"{type}","id":1,"payload":{payload}}}')
    answer: dict[str, Any] = await client.receive_json()
    return answer


def alike(one: Any, other: Any) -> bool:
    return bool(one == other) and repr(one) == repr(other)  # 1 == 1.0 == True


@each_way
@pytest.mark.parametrize(("annotation", "sent", "gets", "out", "refused"), TYPES)
async def test_a_type(
    names: dict[str, Any], way: str, annotation: str, sent: str, gets: str, out: str, refused: str
) -> None:
    """What a row of the table of types says comes in, goes out and is refused, in both ways."""
    for span in spans(annotation):
        got: list[Any] = []
        handler = returning(eval(span, names), got)
        if way == "In one pass" and "IPv4Address" in span:
            with pytest.raises(PachinkoError, match=r"give hub\.configure"):
                Pachinko(hub=Hub()).on("t")(handler)
            continue
        async with talking(hub_that_reads(way), {"t": handler}) as client:
            answer = await ask(client, "t", sent.strip("`"))
            assert answer["type"] == "t.reply" or answer["type"] == "order", answer
            assert alike(got, [eval(gets.strip("`"), names)])
            expected = json.loads((out or sent).strip("`"))
            assert alike(answer.get("payload"), expected)
            for payload in spans(refused):
                answer = await ask(client, "t", payload)
                assert answer["type"] == "error", (payload, answer)
                assert answer["payload"]["code"] == "invalid_payload"


@each_way
@pytest.mark.parametrize(("annotation", "sent", "paths", "messages"), ERRORS)
async def test_an_error(
    names: dict[str, Any], way: str, annotation: str, sent: str, paths: str, messages: str
) -> None:
    """Every wrong field is reported as the table of errors says, in both ways."""
    handler = returning(eval(annotation.strip("`"), names), [])
    async with talking(hub_that_reads(way), {"t": handler}) as client:
        payload = (await ask(client, "t", sent.strip("`")))["payload"]
    lines = zip(spans(paths), messages.split("\n"), strict=True)
    assert payload["code"] == "invalid_payload"
    assert payload["errors"] == [{"path": path, "message": text} for path, text in lines]


def test_what_is_read_in_one_pass(names: dict[str, Any]) -> None:
    """The page names each type of its tables that is not, or that contains one which is not."""
    (items,) = re.findall(r"^- `Decimal`, .*?\n\n", PAYLOADS.read_text(), re.M | re.S)
    alone = set(spans(items.replace("\n  ", " ")))
    for row in TYPES:
        for span in spans(row[0]):
            if "IPv4Address" not in span:
                codec, annotation = pachinko.Codec(), eval(span, names)
                codec.check(annotation, (names, {}), [])
                is_built = codec.frame_class("t", annotation).is_built
                assert is_built == (span not in alone), span


@each_way
@pytest.mark.parametrize(("annotation", "sent", "quick", "slow"), WAYS)
async def test_where_the_two_ways_differ(
    names: dict[str, Any], way: str, annotation: str, sent: str, quick: str, slow: str
) -> None:
    """A client sees what the table says of the two ways to read a payload."""
    got: list[Any] = []
    handler = returning(eval(annotation.strip("`"), names), got)
    expected = quick if way == "In one pass" else slow
    async with talking(hub_that_reads(way), {"t": handler}) as client:
        answer = await ask(client, "t", sent.strip("`"))
    if expected == "refused":
        assert answer["type"] == "error" and got == []
    else:
        assert alike(got, [eval(expected.strip("`"), names)])


@pytest.mark.parametrize(("annotation", "sent", "strict", "plain"), COERCED)
async def test_what_a_plain_converter_does(
    names: dict[str, Any], annotation: str, sent: str, strict: str, plain: str
) -> None:
    """The hub's converter and a new one of cattrs do what the table says."""
    value, expected_type = json.loads(sent.strip("`")), eval(annotation.strip("`"), names)
    for converter, expected in ((Hub().converter, strict), (cattrs.Converter(), plain)):
        try:
            structured = converter.structure(value, expected_type)
        except Exception:  # each converter has exceptions of its own
            assert expected == "refused"
        else:
            assert alike(structured, eval(expected.strip("`"), names))


async def test_other_claims_about_payloads(names: dict[str, Any]) -> None:
    """What the page says between its tables holds."""
    for refused in (uuid.UUID | datetime, complex):
        with pytest.raises(PachinkoError):
            Pachinko(hub=Hub()).on("t")(returning(refused, []))
    numbers: list[Any] = []
    point = names["Point"]
    colored = names["attrs"].make_class(
        "Colored", {"color": names["attrs"].field(default="")}, (point,)
    )

    async def special(conn: Connection, value: Any) -> Any:
        return float("nan") if value else None

    async def base(conn: Connection) -> Any:
        return colored(1, 2, "red")

    base.__annotations__["return"] = point
    handlers = {"t": returning(list[int], numbers), "special": special, "base": base}
    async with talking(hub, handlers) as client:
        for malformed in ("NaN", "1e400", "[" * 129 + "]" * 129):
            assert (await ask(client, "t", malformed))["payload"]["code"] == "invalid_json"
        many = (await ask(client, "t", json.dumps(["x"] * 200)))["payload"]["errors"]
        assert len(many) == 101 and many[-1]["message"] == "and more"
        assert (await ask(client, "special", "1"))["payload"] is None
        assert "payload" not in await ask(client, "special", "0")
        assert (await ask(client, "base", "1"))["payload"] == {"x": 1, "y": 2}
    async with talking(Hub(), {"t": returning(list[int], numbers)}) as client:
        large = (await ask(client, "t", json.dumps(["x"] * 5000)))["payload"]["errors"]
        assert len(large) == 101 and large[0]["path"] == "$.payload[0]"


REFUSED = tables(PAYLOADS, "You write", "The error says")


@dataclasses.dataclass
class Wrapping:
    factor: dataclasses.InitVar[int]


class Handmade:
    def __init__(self, text: str) -> None:
        self.text = text


class Undecorated:
    text: str


@dataclasses.dataclass(frozen=True)
class AfterValidator:
    func: Any


AfterValidator.__module__ = "pydantic.functional_validators"


@pytest.mark.parametrize(("annotation", "says"), REFUSED)
def test_what_is_refused(names: dict[str, Any], annotation: str, says: str) -> None:
    """Each annotation of the table is refused with these words."""
    names = {**vars(typing), **names, **globals()}
    handler = returning(eval(spans(annotation)[0], names), [])
    with pytest.raises(PachinkoError) as caught:
        Pachinko(hub=Hub()).on("t")(handler)
    assert says in str(caught.value)


async def test_a_pydantic_model(names: dict[str, Any]) -> None:
    """With the page's hook, a model validates in its own way, both ways."""
    pydantic = pytest.importorskip("pydantic", reason="needs pydantic")
    model = pydantic.create_model("Signup", age=(int, pydantic.Field(gt=17)), name=(str, "x"))
    with pytest.raises(PachinkoError, match=r"pydantic model; register .* docs/payloads\.md"):
        Pachinko(hub=Hub()).on("t")(returning(model, []))
    got: list[Any] = []
    async with talking(hub, {"t": returning(model, got), "many": returning(list[model], got)}) as c:
        assert (await ask(c, "t", '{"age":18}'))["payload"] == {"age": 18, "name": "x"}
        assert got == [model(age=18)]
        (error,) = (await ask(c, "many", '[{"age":18},{"age":17}]'))["payload"]["errors"]
    assert error["path"] == "$.payload[1]"
    assert error["message"] == "age: Input should be greater than 17"


class Validating:
    """It validates as a pydantic model does, which need not be installed."""

    def __init__(self, age: int) -> None:
        self.age = age

    @classmethod
    def model_validate(cls, value: Any) -> Validating:
        if value["age"] < 18:
            error = ValueError()
            setattr(error, "errors", lambda: [{"loc": ("age",), "msg": "too young"}])  # noqa: B010 - it is pydantic's
            raise error
        return cls(value["age"])

    def model_dump(self, **options: Any) -> Any:
        assert options == {"mode": "json", "by_alias": True}
        return vars(self)


async def test_what_validates_as_a_pydantic_model_does(names: dict[str, Any]) -> None:
    """The page's hook needs no more than the methods of a model."""
    async with talking(hub, {"t": returning(Validating, [])}) as client:
        assert (await ask(client, "t", '{"age":18}'))["payload"] == {"age": 18}
        (error,) = (await ask(client, "t", '{"age":17}'))["payload"]["errors"]
    assert error == {"path": "$.payload", "message": "age: too young"}


def of(module: str) -> Any:
    """An object whose class is of a library."""
    return type("Marker", (), {"__module__": module})()


REGISTERED = tables(PAYLOADS, "You write", "What happens")


@pytest.mark.parametrize(("code", "happens"), REGISTERED, ids=[row[0] for row in REGISTERED])
async def test_what_a_handler_may_look_like(code: str, happens: str, names: dict[str, Any]) -> None:
    """Each row is registered, or refused with these words."""

    def plain_decorator(function: Any) -> Any:
        return functools.wraps(function)(lambda conn, text, db: function(conn, text, db=db))

    async def say(conn: Any, text: str, db: Any) -> None: ...

    def make_class(defaults: dict[str, Any]) -> type:
        return type("Cart", (), {"__annotations__": {"items": list}, **defaults})

    point, said = names["Point"], type("Said", (), {"__annotations__": {"text": str}})
    known = {
        "functools": functools, "say": say, "plain_decorator": plain_decorator, "conn": None,
        "db": None, "Depends": lambda _: of("fastapi.params"), "connect": connect,
        "FromDishka": {point: typing.Annotated[point, of("dishka.markers")]},
        "Marker": type("Marker", (), {}), "ws": Pachinko(hub=Hub()),
        "make_class": make_class, "Said": pachinko.message("said")(said),
    }  # fmt: skip
    decorator, _, function = spans(code)[0].rpartition(" async def ")
    source = f"{decorator}\nasync def {function}" if decorator else spans(code)[0]

    def register() -> None:
        scope = {**names, **known}
        exec(compile(f"from __future__ import annotations\n{source}", "<console>", "exec"), scope)
        if not decorator:
            known["ws"].on("t")(scope["f"])

    if happens == "registered":
        register()
    else:
        with pytest.raises(PachinkoError) as caught:
            register()
        assert happens.startswith("refused: ")
        assert spans(happens)[0] in str(caught.value).replace("`", "")


async def test_options_of_the_converter(names: dict[str, Any]) -> None:
    """A copy may refuse unknown keys and leave out defaults."""
    assert "copy(forbid_extra_keys=True)" in PAYLOADS.read_text()
    hub.configure(converter=hub.converter.copy(forbid_extra_keys=True, omit_if_default=True))
    async with talking(hub, {"t": returning(names["Point"], [])}) as client:
        assert (await ask(client, "t", '{"x":1,"y":0}'))["payload"] == {"x": 1}
        refused = (await ask(client, "t", '{"x":1,"z":0}'))["payload"]
        assert refused["errors"] == [{"path": "$.payload", "message": "unknown: z"}]


# docs/falcon.md


FALCON = ROOT / "docs" / "falcon.md"
PATHS = tables(FALCON, "Path", "Connect handler", "What happens")
METHODS = tables(FALCON, "Method of `Todo`", '`ws.add_resource("todo", Todo())`')


class OwnConverter:
    def convert(self, value: str) -> decimal.Decimal | None:
        return decimal.Decimal(value)


@pytest.mark.parametrize(("path", "code", "happens"), PATHS, ids=[f"{row}" for row in PATHS])
def test_path_parameters(path: str, code: str, happens: str) -> None:
    """Each row is registered, or refused with these words."""
    app = falcon.asgi.App()
    app.router_options.converters["own"] = OwnConverter
    ws = Pachinko(app, spans(path)[0], hub=Hub())
    scope: dict[str, Any] = {
        "Literal": Literal, "UUID": uuid.UUID, "date": date, "Decimal": decimal.Decimal,
    }  # fmt: skip
    exec(spans(code)[0], scope)
    if happens == "registered":
        ws.connect(scope["f"])
        return
    with pytest.raises(PachinkoError) as caught:
        ws.connect(scope["f"])
    assert spans(happens)[0] in str(caught.value).replace("`", "")


@pytest.mark.parametrize(("code", "happens"), METHODS, ids=[f"{row}" for row in METHODS])
def test_methods_of_a_resource(code: str, happens: str) -> None:
    """Each is Falcon's or a message handler, by its first parameter."""
    scope: dict[str, Any] = {"falcon": falcon}
    exec(f"class Todo:\n    {spans(code)[0]}\n    async def on_other(self, conn): ...", scope)
    ws = Pachinko(hub=Hub())
    if happens == "refuses it":
        with pytest.raises(PachinkoError):
            ws.add_resource("todo", scope["Todo"]())
        return
    ws.add_resource("todo", scope["Todo"]())
    handled = spans(happens) if happens.startswith("handles ") else []
    assert sorted(ws._routes.handlers) == sorted(["todo.other", *handled])


@pytest.fixture
def falcon_page() -> Any:
    return load(FALCON)


async def test_the_test_that_is_shown(falcon_page: Any) -> None:
    """The page's own test passes."""
    await falcon_page.test_where()


async def test_what_workers_use_is_open(
    falcon_page: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The page's worker starts behind the pool, which was added after its endpoint."""
    states: list[bool] = []
    startup = falcon_page.Pool.process_startup

    async def slow(self: Any, scope: object, event: object) -> None:
        states.append(bool(falcon_page.board._workers))
        await asyncio.sleep(0.02)
        await startup(self, scope, event)

    monkeypatch.setattr(falcon_page.Pool, "process_startup", slow)
    async with simulated(falcon_page.app):
        assert falcon_page.pool.is_open
        await until(lambda: not falcon_page.board._workers)
    assert states == [False] and not falcon_page.pool.is_open
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("queue", [0, 4])
async def test_attached_by_hand(falcon_page: Any, queue: int) -> None:
    """The app made without app and path works, whatever the size of the app's receive queue."""
    app = falcon_page.create_app()
    app.ws_options.max_receive_queue = queue
    async with simulated(app) as server, connect(f"{server.url}/ws") as client:
        assert (await client.ask("nothing"))["payload"]["code"] == "unknown_type"
    assert app.ws_options.max_receive_queue == queue


def test_the_app_keeps_its_queue(falcon_page: Any) -> None:
    """A `Pachinko` leaves the app's receive queue as Falcon has it, added in either way."""
    default = falcon.asgi.App().ws_options.max_receive_queue
    assert default > 0
    for app in (falcon_page.app, falcon_page.create_app()):
        assert app.ws_options.max_receive_queue == default


@pytest.mark.parametrize("is_attached", [True, False], ids=["app and path", "add_route"])
async def test_another_route_keeps_its_queue(is_attached: bool) -> None:
    """A raw route beside a `Pachinko` sees by ``ws.closed`` alone that its client has gone."""
    app, ended = falcon.asgi.App(), asyncio.Event()

    class Poll:
        async def on_websocket(self, req: Any, ws: falcon.asgi.WebSocket) -> None:
            await ws.accept()
            await ws.send_text("tick")
            while not ws.closed:  # without the queue this would never end
                await asyncio.sleep(0.01)
            ended.set()

    if is_attached:
        Pachinko(app, "/ws", hub=Hub())
    else:
        ws = Pachinko(hub=Hub())
        app.add_route("/ws", ws)
        app.add_middleware(ws)
    app.add_route("/poll", Poll())
    async with serving(app, timeout_graceful_shutdown=1) as server:
        async with (
            connect(f"{server.url}/ws") as client,
            connect(f"{server.url}/poll") as polling,
        ):
            assert (await client.ask("nothing"))["payload"]["code"] == "unknown_type"
            assert await polling.socket.recv() == "tick"
        await asyncio.wait_for(ended.wait(), PATIENCE)


async def test_refusals(falcon_page: Any) -> None:
    """An error handler's status is the client's; a middleware and a path converter give 403."""
    async with simulated(falcon_page.app) as server:
        for path, status in (("missing/2", 404), ("b/2?token=wrong", 403), ("b/0", 403)):
            with pytest.raises(InvalidStatus, match=f"HTTP {status}"):
                async with connect(f"{server.url}/boards/{path}"):
                    pass


async def test_a_seat_is_given_back(falcon_page: Any) -> None:
    """Behind the `yield`, whether the client was let in or refused by a later handler."""
    async with serving(falcon_page.app) as server:
        url = f"{server.url}/lounge/2"
        async with connect(f"{url}?name=a"), connect(f"{url}?name=b") as client:
            assert client.socket.response is not None
            assert client.socket.response.headers["Set-Cookie"].startswith("seen=1")
            with pytest.raises(InvalidStatus, match="HTTP 503"):
                async with connect(f"{url}?name=c", process_exception=lambda exc: exc):
                    pass
        await until(lambda: falcon_page.seats["2"] == 2)
        with pytest.raises(InvalidStatus, match="HTTP 400"):
            async with connect(url):
                pass
        assert falcon_page.seats["2"] == 2


async def test_a_guest_logs_in(falcon_page: Any) -> None:
    """The handler of the page tells guests from users."""
    async with simulated(falcon_page.app) as server, connect(f"{server.url}/shop") as client:
        assert (await client.ask("name"))["payload"] == "a guest"
        await client.ask("authenticate", {"token": "t-ada"})
        assert (await client.ask("name"))["payload"] == "ada"


async def test_a_count_at_both_ends(falcon_page: Any) -> None:
    """It has the newcomer, and no longer has who left."""
    async with simulated(falcon_page.app) as server, connect(f"{server.url}/party/a") as client:
        counts = [(await client.receive())["payload"]]
        async with connect(f"{server.url}/party/a") as other:
            assert (await other.receive())["payload"] == 2
        counts += [(await client.receive())["payload"] for _ in range(2)]
        assert counts == [1, 2, 1]


async def test_endpoints_and_routes_share_the_hub(falcon_page: Any) -> None:
    """What is posted reaches both endpoints; a raw route works beside them."""
    async with (
        serving(falcon_page.app) as server,
        connect(f"{server.url}/public") as public,
        connect(f"{server.url}/staff") as staff,
        connect(f"{server.url}/echo") as echo,
    ):
        assert await asyncio.to_thread(post, server, "/news", {"a": 1}) == 202
        for client in (public, staff):
            assert await client.receive() == {"type": "news", "group": "news", "payload": {"a": 1}}
        await echo.raw("hi")
        assert await echo.socket.recv() == "hi"


async def test_who_is_here(falcon_page: Any) -> None:
    """The list lacks the newcomer in a connect handler, and has it after the handshake."""
    async with simulated(falcon_page.app) as server, connect(f"{server.url}/lobby") as client:
        assert await client.receive() == {"type": "early", "payload": 0}
        assert len((await client.ask("who"))["payload"]) == 1


async def test_a_path_is_taken(falcon_page: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A second `Pachinko` is refused; one that `add_route` replaced warns at a connection."""
    app = falcon.asgi.App()
    Pachinko(app, "/staff")
    with pytest.raises(PachinkoError, match="has a Pachinko already"):
        Pachinko(app, "/staff")
    app.add_route("/staff", falcon_page.Echo())
    async with simulated(app) as server, connect(f"{server.url}/staff"):
        assert "replaced the Pachinko at /staff" in caplog.text


async def test_without_lifespan() -> None:
    """On a server without lifespan, workers start with the first connection."""
    app = falcon.asgi.App()
    ws = Pachinko(app, "/ws", hub=Hub())
    started: list[bool] = []

    @ws.worker
    async def work() -> None:
        started.append(True)

    async with serving(app, lifespan="off") as server:
        assert started == []
        async with connect(f"{server.url}/ws") as client:
            await client.ask("nothing")
            assert started == [True]


# docs/performance.md


PERFORMANCE = ROOT / "docs" / "performance.md"


def test_what_is_built_while_reading(names: dict[str, Any]) -> None:
    """msgspec builds the types of the first column, and cattrs those of the second."""
    rows = tables(PERFORMANCE, "Built while reading", "Left to cattrs")
    columns = [[span for row in rows for span in spans(row[side])] for side in (0, 1)]
    columns[0] += ["Color", "Point", "Size", "Movie"]
    columns[1] += ["Level", "Pair", "Order", "Point | Size"]
    for column, expected in zip(columns, (True, False), strict=True):
        for annotation in column:
            frame = pachinko.Codec().frame_class("t", eval(annotation, names))
            assert frame.is_built == expected, annotation


def test_the_listener_limits_send_buffers() -> None:
    """What the page sets for the listener is so for each connection."""
    with load(PERFORMANCE).listen(0) as listener:
        size = listener.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        with socket.create_connection(("127.0.0.1", listener.getsockname()[1])):
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == size
    assert 65536 <= size <= 2 * 65536


async def test_the_watch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The worker prints how late it is, and every figure that the page explains."""
    page, sleep = load(PERFORMANCE), asyncio.sleep
    quick = {**vars(asyncio), "sleep": lambda _: sleep(0.1)}
    monkeypatch.setattr(page, "asyncio", types.SimpleNamespace(**quick))
    async with simulated(page.app) as server, connect(f"{server.url}/ws") as client:
        assert (await client.ask("nothing"))["type"] == "error"
        printed = ""
        while "errors.unknown_type" not in printed:
            await sleep(0.1)
            printed += capsys.readouterr().out
    figures = ast.literal_eval(re.findall(r" s late, (.*)", printed)[-1])
    explained = {
        figure for row in tables(PERFORMANCE, "Figure", "What it tells") for figure in spans(row[0])
    }
    assert {re.sub(r"^errors\..*", "errors.<code>", figure) for figure in figures} == explained


def test_the_settings() -> None:
    """The options that the page speaks of are uvicorn's, and the table's are those measured."""
    options = {option for param in uvicorn.main.params for option in param.opts}
    assert set(re.findall(r"`(--[a-z-]+)", prose(PERFORMANCE))) <= options
    measured = (ROOT / "benchmarks" / "settings.py").read_text()
    columns = re.findall(r'"((?:µs|KiB) .*?)": ', measured)
    rows = tables(PERFORMANCE, "", *columns)
    assert len(rows) > 1
    assert all(f'"{setting.removesuffix(" again")}"' in measured for setting, *_ in rows)


@pytest.mark.parametrize(
    ("command", "expected"), [("PYTHONASYNCIODEBUG=1", " took 0.2"), ("cProfile", "time.sleep")]
)
async def test_what_is_slow_is_found(command: str, expected: str, tmp_path: Path) -> None:
    """The page's commands show that a handler has blocked the loop."""
    more = '@ws.on("block")\nasync def block(conn):\n    __import__("time").sleep(0.2)\n'
    if sys.version_info < (3, 12) and "DEBUG" in command:
        more += "@ws.worker\nasync def f():\n    asyncio.get_running_loop().set_debug(True)\n"
        assert "`loop.set_debug(True)`" in prose(PERFORMANCE)
    (tmp_path / "app.py").write_text("\n".join([*blocks(PERFORMANCE, "python"), more]))
    (lines,) = (text for text in blocks(PERFORMANCE, "sh") if command in text)
    serve, *show = lines.strip().split("\n")
    folder = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": folder, "PYTHONPATH": os.pathsep.join(sys.path)}
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment}
    process = await asyncio.create_subprocess_shell(
        f"{serve} --port 0", stderr=subprocess.PIPE, start_new_session=True, **options
    )
    assert process.stderr is not None
    try:
        log = ""
        while not (url := re.search(r"running on http://(\S+)", log)):
            line = await asyncio.wait_for(process.stderr.readline(), PATIENCE)
            assert line, log
            log += line.decode()
        async with connect(f"ws://{url[1]}/ws") as client:
            assert (await client.ask("block"))["type"] == "block.reply"
        os.killpg(process.pid, signal.SIGINT)
        _, rest = await asyncio.wait_for(process.communicate(), PATIENCE)
        log += rest.decode()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for line in show:
        process = await asyncio.create_subprocess_shell(line, stdout=subprocess.PIPE, **options)
        output, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
        log += output.decode()
    assert expected in log


# Every page


def test_the_module_docstring_runs() -> None:
    """The example that the module's docstring begins with is a program."""
    _, *lines = (pachinko.__doc__ or "").splitlines()
    example = itertools.takewhile(lambda line: line.startswith("    ") or not line, lines)
    code = inspect.cleandoc("\n" + "\n".join(example))
    module = types.ModuleType("docstring")
    exec("import falcon.asgi\nfrom pachinko import *\n" + code, vars(module))

    async def talk() -> Any:
        async with (
            ASGIConductor(module.app) as conductor,
            conductor.simulate_ws("/ws/lobby") as client,
        ):
            await client.send_json({"type": "say", "payload": {"text": "hi"}})
            said = await client.receive_json()
            return said["payload"]["text"], await ask(client, "sum", '{"a": 1}')

    text, total = asyncio.run(talk())
    assert text == "hi" and total["payload"] == 1


OF_THE_LIBRARY = {"outgoing", "stop_expiry"}  # of a connection, "not for applications"


def test_public_names_are_documented() -> None:
    """Each name of ``__all__`` and each public method is mentioned on a page."""
    text = "\n".join(page.read_text() for page in PAGES)
    for name in pachinko.__all__:
        assert re.search(rf"\b{name}\b", text), name
    methods = [(cls, n) for cls in (Pachinko, Hub, Connection) for n in vars(cls) if n[0] != "_"]
    for cls, name in methods:
        is_falcons = name.startswith("process_")
        if not is_falcons and name not in OF_THE_LIBRARY:
            assert re.search(rf"\.{name}\b|\b{name}\(", text), f"{cls.__name__}.{name}"


@each_page
def test_names_exist(page: Path) -> None:
    """The attributes that a page uses of the hub, a connection and an endpoint exist."""
    texts = [*spans(prose(page)), *blocks(page, "python")]
    for text in texts:
        for name, attribute in re.findall(r"(?<![\w.])(hub|conn)\.(\w+)", text):
            assert hasattr({"hub": Hub, "conn": Connection}[name], attribute), text
        for attribute in re.findall(r"@(?:ws|inbox)\.(\w+)", text):
            assert hasattr(Pachinko, attribute), text


@each_page
def test_code_in_the_text_parses(page: Path) -> None:
    """What looks like a statement in the text of a page is one."""
    starts = (
        "await hub",
        "await conn",
        "hub.",
        "conn.",
        "app.",
        "ws",
        "Pachinko(",
        "raise ",
        "-> ",
    )
    for span in spans(prose(page)):
        if span.startswith(starts):
            code = span.replace("…", "...").replace(".... ", ".x ")
            code = re.sub("^-> ", "x: ", code)
            ast.parse(f"async def f():\n    {code}")


@each_page
def test_frames_are_valid(page: Path) -> None:
    """Each JSON object in the text that has a type is a frame, and JSON blocks are JSON."""
    for span in spans(prose(page)):
        if span.startswith('{"type":') and "str" not in span:
            assert set(json.loads(span)) <= {"type", "id", "payload", "group", "more", "at"}
    for block in blocks(page, "json"):
        for line in block.split("\n"):
            assert not line or isinstance(pachinko.decode_or_error(line), pachinko.Frame)


@each_page
def test_links_resolve(page: Path) -> None:
    """Each link to a file or a heading leads somewhere."""
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if not target.startswith(("https://", "http://")):
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.is_file(), target
            assert not anchor or anchor in anchors(path), target


def anchors(page: Path) -> list[str]:
    """The fragments of the headings of *page*, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles]


@functools.cache
def environments() -> set[str]:
    """The names that ``tox run -e`` takes."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    listed = tox["tox"]["env_list"].split()
    names = set()
    for entry in [*listed, *(section.partition(":")[2] for section in tox.sections())]:
        head, _, choices = entry.partition("{")
        names |= {head + choice for choice in choices.rstrip("}").split(",")}
    return names - {""}


@each_page
def test_commands_exist(page: Path) -> None:
    """Shell blocks parse, and the tox environments and extras that they name exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for block in blocks(page, "sh"):
        subprocess.run(["sh", "-n"], input=block, text=True, check=True)
        assert set(re.findall(r"-m tox run -e (\S+)", block)) <= environments(), block
        assert set(re.findall(r'install "\.\[(\w+)\]"', block)) <= {
            *project["optional-dependencies"]
        }
    if page == README:
        (line,) = re.findall(r"install (falcon .*)", page.read_text())
        extra = project["optional-dependencies"]["server"]
        wanted = {re.split(r"[<>=]", name)[0] for name in [*project["dependencies"], *extra]}
        assert set(line.replace('"', "").split()) == wanted


# What people are told to type

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TELLS = [
    *(page for page in PAGES if page.name != "CHANGELOG.md"),  # which tells what once was
    *(Path(str(module.__file__)) for module in (pachinko, pachinko_cluster)),
    *sorted(ROOT.glob("examples/**/*.py")),
]
INSTALL = re.compile(r'((?:[\w{}.]+ -m )?)pip install((?: (?:"[^"\n]+"|[\w.{}-][\w.{}\[\],-]*))+)')
PROGRAMS = {
    "curl", "nats", "nats-server", "nginx", "py-spy", "python3", "redis-cli", "sed", "set",
    "systemctl", "uvicorn",
}  # fmt: skip


def on_the_index() -> set[str]:
    """What the project itself installs from an index, and two programs beside it."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    deps = "\n".join(tox[section].get("deps", "") for section in tox.sections())
    listed = [*PROJECT["dependencies"], *deps.split()]
    listed += itertools.chain(*PROJECT["optional-dependencies"].values())
    names = {re.split(r"[<>=;\[ ]", name)[0] for name in listed}
    return (names | {"tox", "py-spy"}) - {PROJECT["name"]}


@pytest.mark.parametrize("path", TELLS, ids=lambda path: path.name)
def test_what_is_to_be_installed_can_be(path: Path) -> None:
    """By ``python3 -m pip``, from the checkout or an index; the package itself is on none."""
    text = path.read_text()
    for python, arguments in INSTALL.findall(text):
        assert python in ("python3 -m ", "{sys.executable} -m "), arguments
        for argument in shlex.split(arguments):
            name, _, extras = argument.partition("[")
            if name == ".":
                wanted = {extra for extra in extras.rstrip("]").split(",") if "{" not in extra}
                assert wanted <= {"", *PROJECT["optional-dependencies"]}, argument
            elif "{" not in name:  # The text in which that is filled in has a test of its own.
                assert name in on_the_index(), argument
    assert not re.search(rf"install [^\n`]*{PROJECT['name']}|{PROJECT['name']}\[", text)


def commands() -> list[tuple[str, str]]:
    """Each command of the pages, on one line, with the page's name."""
    found: list[tuple[str, str]] = []
    for page in (path for path in TELLS if path.suffix == ".md"):
        lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").split("\n")
        lines += [
            span for span in spans(prose(page)) if re.match(r"(\w+=\S+ )?(python3?|pip|tox) ", span)
        ]
        parts = itertools.chain(*(re.split(r" && | & ?$", line) for line in lines))
        found += [(part.strip(), page.name) for part in parts if part.strip()]
    return found


@pytest.mark.parametrize(("command", "page"), commands())
def test_a_command_can_be_typed(command: str, page: str) -> None:
    """It is a program that the page is about, or Python 3 with a module or file that is there."""
    given, words = re.match(r"((?:\w+=\S+ )*)(.*)", command).groups()  # type: ignore[union-attr]  # any text matches
    program, *rest = words.split()
    if program == ".":
        assert command == ". .venv/bin/activate"
        return
    assert program in PROGRAMS, command
    if program == "uvicorn":
        options = {option for param in uvicorn.main.params for option in param.opts}
        assert {word for word in rest if word.startswith("--")} <= options
    if program == "python3" and rest[0] == "-m":
        module = rest[1].split(".")[-1]
        assert (
            rest[1] in ("pip", "tox", "venv", "cProfile")
            or (ROOT / "benchmarks" / f"{module}.py").is_file()
        )
    elif program == "python3" and rest[0] not in ("-c", "serve.py", "pachinko_cluster.py"):
        # The second is shown on its page. The wheel is tested in a tree without the companion.
        assert (ROOT / rest[0]).is_file(), command
    if "tox run -e" in command:
        tox = configparser.ConfigParser(interpolation=None)
        tox.read(ROOT / "tox.ini")
        section = f"testenv:{command.split('-e ')[1].split()[0]}"
        passed = tox[section]["pass_env"].split() if given else []
        assert set(re.findall(r"(\w+)=", given)) <= set(passed), command


def test_after_which_closes_clients_come_back() -> None:
    """The page about deployment, pachinko.js and an example's page name the same codes as final."""
    rows = tables(ROOT / "docs" / "deployment.md", "Closed with", "Client")
    final, busy = "[" + ", ".join(codes for codes, what in rows[:2]) + "]", rows[4][0]
    assert all("stays away" in what for _, what in [*rows[:2], rows[3]])
    client, cluster = (
        (ROOT / name).read_text() for name in ("client/pachinko.js", "examples/cluster/page.html")
    )
    assert f"  if ({final}.includes(code)) return true;" in client
    assert f"  if ({final}.includes(code)) return true;" in cluster
    assert f"  return [{busy.partition(', 3408')[0]}].includes(code)" in client
    assert "[3408, 3429, 4408, 4429].includes(code)" in cluster
    wait, last = re.findall(r"const (?:BUSY|LONGEST) = (\d+)_000;", client)
    assert f"after {wait} seconds at first" in rows[4][1]
    assert f"doubles up to {last} seconds" in (ROOT / "docs" / "deployment.md").read_text()


def test_the_readme_says_how_long_the_chat_is() -> None:
    """The chat's server has the length that the README names."""
    assert "about 130 lines" in README.read_text().replace("\n", " ")
    lines = (ROOT / "examples" / "chat.py").read_text().splitlines()
    assert 120 <= len(lines) <= 140


def test_nothing_is_left_out() -> None:
    """Every fenced block of every page is of a language that is checked."""
    languages = {match[1] for page in PAGES for match in BLOCK.finditer(page.read_text())}
    assert languages <= {"python", "js", "json", "sh", "text", "ts"}
    assert all(page.read_text().count("```") % 2 == 0 for page in PAGES)
    assert len(list(itertools.chain(TYPES, ERRORS, WAYS, COERCED, SIGNATURES))) > 70
