"""What docs/client.md shows is run here, in a browser; what it claims is in test_client_js*.py."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import falcon
import falcon.asgi
import pytest
from javascript import InBrowser
from support import serving, until

import pachinko
from pachinko import hub

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "client.md"
SOURCE = (ROOT / "client" / "pachinko.js").read_text()

pytestmark = pytest.mark.asyncio(loop_scope="session")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def clean_hub() -> Iterator[None]:
    """The page's app has the module's hub."""
    yield
    hub._settings["rules"] = {}
    hub.state.replace()


class Html:
    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        resp.content_type, resp.text = falcon.MEDIA_HTML, "<!doctype html><title></title>"


async def test_what_the_page_shows_runs(tab: InBrowser) -> None:
    """All its scripts in a row: what they print is what their comments say."""
    module: Any = types.ModuleType("client_page")
    (code,) = blocks("python")
    exec(compile(code, str(PAGE), "exec", dont_inherit=True), vars(module))
    module.app.add_route("/", Html())
    printed = list[str]()
    tab.page.on("console", lambda line: line.type == "log" and printed.append(line.text))
    tab.page.on("dialog", lambda dialog: dialog.accept())
    first, *rest = blocks("js")
    async with serving(module.app) as server:
        await tab.page.goto(server.url.replace("ws:", "http:"))
        more = "document.title = await client.request('leave') + await order('tea');"
        script = "\n".join([first, *rest, more])
        await tab.page.add_script_tag(content=script, type="module")
        await tab.page.wait_for_function("() => document.title.includes('refused')")
        assert await tab.page.title() == "byerefused: unknown_type"
        (conn,) = hub.connections
        await until(lambda: len(printed) >= 5)
        assert printed == [f"{conn.id} said hi", "3", "0", "1", "2"]
        await hub.close(conn, 4404, "no such room")
        await tab.page.wait_for_function("() => document.title === 'no such room'")


async def test_the_page_names_the_codes_of_the_client() -> None:
    """Its table, that of the page about deployment, and the source say the same."""
    rows = r"^\| (?:its own `close\(\)`, )?(1000|1003, [^|]*|1012, [^|]*) \|"
    files = (PAGE, PAGE.with_name("deployment.md"))
    pages = [re.findall(rows, file.read_text(), re.M) for file in files]
    assert pages[0] == pages[1]
    finished, refused, busy = pages[0]
    assert f"[{finished}, {refused}].includes(code)" in SOURCE
    assert f"[{busy.partition(', 3408')[0]}].includes(code)" in SOURCE


async def test_the_page_names_the_bounds_of_the_client() -> None:
    """Numbers of the page are those of the source, and its names are there."""
    text = " ".join(PAGE.read_text().split())
    found = dict(re.findall(r"^const ([A-Z_]+) = ([\d_]+);", SOURCE, re.M))
    assert (found["SHORTEST"], found["BUSY"], found["LONGEST"]) == ("500", "5_000", "20_000")
    assert f"at most {found['MOST_WAITING']} messages and 1 MiB" in text
    assert found["MOST_BYTES"] == "1_048_576"
    assert f"after {int(found['SILENCE']) // 1000} seconds without a message" in text
    assert f"within {int(found['PROBE']) // 1000} seconds it makes another one" in text
    calls = re.findall(r"^\| `(\w+)[(`]", PAGE.read_text(), re.M)
    types = (ROOT / "client" / "pachinko.d.ts").read_text()
    assert len(calls) > 12
    assert [name for name in calls if not re.search(rf"\b{name}[?(<:]", types)] == []
    assert Path(pachinko.__file__).with_name("client").is_dir()
