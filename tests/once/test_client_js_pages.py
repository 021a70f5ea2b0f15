"""What pachinko.js does in a page, with a real server: reloads, sleep, lost networks, tabs."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import falcon
import falcon.asgi
import pytest
import pytest_asyncio
from javascript import InBrowser, Script
from playwright.async_api import Browser
from support import Server, serving, until
from test_client_js import begin, resume_of

from pachinko import Close, Connection, Hub, Pachinko

pytestmark = pytest.mark.asyncio(loop_scope="session")

# What the page of the tests does: it notes all that it hears, also over a reload.
PAGE = """<!doctype html>
<title>A page</title>
<script type="module">
import { connect } from "/pachinko.js";
globalThis.seen = JSON.parse(sessionStorage.seen ?? "[]");
globalThis.states = [];
globalThis.c = connect("/ws", { storage: sessionStorage, token: globalThis.token });
c.on("$state", (state, detail) => states.push([state, detail]));
const note = (entry) => { seen.push(entry); sessionStorage.seen = JSON.stringify(seen); };
c.on("said", (text) => note(text));
c.on("gap", ({ reason }) => note(`gap: ${reason}`));
globalThis.say = async (text) => { await c.request("say", { text }); note(text); };
</script>
"""


class Site:
    """A page, its endpoint, and a kept group that everybody is in."""

    def __init__(self) -> None:
        self.hub = Hub()
        self.hub.keep("room")
        self.app: falcon.asgi.App[Any, Any] = falcon.asgi.App()
        self.ws = ws = Pachinko(self.app, "/ws", hub=self.hub, linger=0.1)
        ws.client("/pachinko.js")
        self.app.add_route("/", self)
        self.server: Server

        @ws.connect
        async def arrive(conn: Connection) -> None:
            await self.hub.join("room", conn)

        @ws.on("say")
        async def say(conn: Connection, *, text: str) -> None:
            await self.hub.send("room", "said", text, exclude=conn)

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        resp.content_type, resp.text = falcon.MEDIA_HTML, PAGE

    @property
    def url(self) -> str:
        return self.server.url.replace("ws:", "http:")

    async def say(self, *texts: str) -> None:
        for text in texts:
            await self.hub.send("room", "said", text)

    async def close_all(self, code: int) -> None:
        for conn in self.hub.connections:
            await self.hub.close(conn, code)


@pytest_asyncio.fixture(loop_scope="session")
async def site() -> AsyncIterator[Site]:
    site = Site()
    async with serving(site.app) as site.server:
        yield site


async def visit(tab: InBrowser, site: Site) -> None:
    """Open the page, or open it again, and wait until its client is in."""
    await tab.page.goto(site.url)
    await in_room(tab)


async def in_room(tab: InBrowser) -> None:
    await tab.page.wait_for_function("() => globalThis.c?.state === 'open'")


async def sees(tab: InBrowser, *texts: str) -> None:
    """The page has heard these and no other, each once and in order."""
    code = "(n) => globalThis.seen?.length >= n"
    await tab.page.wait_for_function(code, arg=len(texts))
    assert await tab.run("() => seen") == [*texts]


@contextlib.asynccontextmanager
async def another(tab: InBrowser) -> AsyncIterator[InBrowser]:
    """Another tab of the same person."""
    other = InBrowser(await tab.page.context.new_page())
    yield other
    await other.page.close()


async def test_a_reload_goes_on(tab: InBrowser, site: Site) -> None:
    """The new page gets what came since the last message, and nothing that the old one had."""
    await visit(tab, site)
    await site.say("one", "two")
    await sees(tab, "one", "two")
    await tab.page.goto("about:blank")
    await until(lambda: not site.hub.connections)
    await site.say("three", "four")
    await visit(tab, site)
    await site.say("five")
    await sees(tab, "one", "two", "three", "four", "five")


async def test_a_reload_does_not_repeat_what_the_page_said(tab: InBrowser, site: Site) -> None:
    """What was sent to all but this client is not for the page behind the reload either."""
    await visit(tab, site)
    await site.say("one")
    await sees(tab, "one")
    await tab.run("() => say('mine')")
    await tab.page.reload()
    await in_room(tab)
    await site.say("two")
    await sees(tab, "one", "mine", "two")


async def test_two_tabs_have_two_positions(tab: InBrowser, site: Site) -> None:
    """Each gets what the other says, and what it has missed itself."""
    await visit(tab, site)
    async with another(tab) as other:
        await visit(other, site)
        await tab.run("() => say('from one')")
        await sees(other, "from one")
        await other.page.goto("about:blank")
        await tab.run("() => say('to nobody')")
        await visit(other, site)
        await sees(other, "from one", "to nobody")
        await sees(tab, "from one", "to nobody")


async def test_a_duplicated_tab_is_another_client(tab: InBrowser, site: Site) -> None:
    """It begins with a copy of the storage, and yet hears what the first tab says."""
    await visit(tab, site)
    await site.say("one")
    await sees(tab, "one")
    async with tab.page.context.expect_page() as opened:
        await tab.run("() => { open(location.href); }")
    twin = InBrowser(await opened.value)
    await in_room(twin)
    await tab.run("() => say('two')")
    await sees(twin, "one", "two")
    await site.close_all(4000)
    await tab.run("async () => { await c.retry(); }")
    await in_room(tab)
    await twin.page.wait_for_function("() => c.state !== 'open'")
    await tab.run("() => say('three')")
    await twin.run("() => { c.retry(); }")
    await sees(twin, "one", "two", "three")


@pytest.mark.skipif(sys.platform == "win32", reason="has no signals that stop a process")
async def test_a_page_that_was_frozen_goes_on(
    tab: InBrowser, site: Site, browser_of_clients: Browser
) -> None:
    """A laptop sleeps, the server closes the connection, and the lid is opened: at once."""
    await visit(tab, site)
    session = await browser_of_clients.new_browser_cdp_session()
    processes = (await session.send("SystemInfo.getProcessInfo"))["processInfo"]
    pages = [int(each["id"]) for each in processes if each["type"] == "renderer"]
    # A page in the foreground cannot be frozen by the developer tools, but its process can.
    for pid in pages:
        os.kill(pid, signal.SIGSTOP)
    try:
        await site.say("one")
        await site.close_all(1013)
        await until(lambda: not site.hub.connections)
        await site.say("two")
    finally:
        for pid in pages:
            os.kill(pid, signal.SIGCONT)
    await tab.run("() => { document.dispatchEvent(new Event('visibilitychange')); }")
    started = time.monotonic()
    await sees(tab, "one", "two")
    assert time.monotonic() - started < 5  # the least that 1013 would have it wait


async def test_a_lost_network_comes_back(tab: InBrowser, site: Site) -> None:
    """While it is away attempts fail; when it is back the next one is made at once."""
    await visit(tab, site)
    await tab.page.context.set_offline(True)
    await site.close_all(1012)
    await tab.page.wait_for_function("() => c.state === 'waiting'")
    await tab.run("() => { c.retry(); }")
    await tab.page.wait_for_function("() => c.state === 'waiting'")
    await tab.run("() => { c.request('say', {text: 'mine'}).then(() => seen.push('mine')); }")
    await site.say("one")
    await tab.page.context.set_offline(False)
    await in_room(tab)
    await sees(tab, "one", "mine")


async def test_a_server_that_drains(tab: InBrowser, site: Site) -> None:
    """Its clients come back after 5 seconds at first, to the next one, and miss nothing."""
    await tab.page.clock.install()
    await visit(tab, site)
    await site.close_all(1012)
    await tab.page.wait_for_function("() => c.state === 'waiting'")
    state, detail = (await tab.run("() => states"))[-1]
    assert state == "waiting" and 5_000 <= detail["wait"] <= 10_000
    await site.say("one")
    await tab.page.clock.run_for(detail["wait"] - 2_000)
    assert not site.hub.connections
    await tab.page.clock.run_for(2_000)
    await sees(tab, "one")


async def test_a_token_that_has_expired(tab: InBrowser, site: Site) -> None:
    """The server closes with 3401, the page gets a fresh token, and nothing is missing."""
    valid = {"old"}

    @site.ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        return "ada" if token in valid else None

    await tab.page.add_init_script("globalThis.token = () => globalThis.fresh ?? 'old';")
    await visit(tab, site)
    await site.say("one")
    await sees(tab, "one")
    valid.clear()
    valid.add("new")
    await tab.run("() => { globalThis.fresh = 'new'; }")
    await site.hub.close_user("ada", 3401)
    await until(lambda: not site.hub.connections)
    await site.say("two")
    await tab.run("() => { c.send('say', {text: 'mine'}); }")
    await sees(tab, "one", "two")
    assert [conn.user for conn in site.hub.connections] == ["ada"]


async def test_a_guest_who_has_a_token_goes_on(tab: InBrowser, site: Site) -> None:
    """Where authentication is optional the positions in its message are read all the same."""

    @site.ws.authenticate(optional=True)
    async def who(conn: Connection, token: str | None) -> str | None:
        return token

    await tab.page.add_init_script("globalThis.token = 'ada';")
    await visit(tab, site)
    await site.say("one")
    await sees(tab, "one")
    await tab.page.goto("about:blank")
    await until(lambda: not site.hub.connections)
    await site.say("two")
    await visit(tab, site)
    await sees(tab, "one", "two")


async def test_a_token_may_come_as_a_subprotocol(tab: InBrowser, site: Site) -> None:
    """A real server takes it from there, and chooses ``bearer``, without which browsers give up."""

    @site.ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        return token

    await tab.page.add_init_script("globalThis.token = 'eve';")
    await visit(tab, site)
    code = """async () => {
      const { connect } = await import('/pachinko.js');
      c.close();
      globalThis.c = connect('/ws', {token: 'ada', protocols: 'bearer'});
    }"""
    await tab.run(code)
    await in_room(tab)
    await until(lambda: [conn.user for conn in site.hub.connections] == ["ada"])


async def test_a_gap_is_told(tab: InBrowser, site: Site) -> None:
    """What was missed and is gone is a gap, and the page goes on behind it."""
    await visit(tab, site)
    await site.say("one")
    await sees(tab, "one")
    await tab.page.goto("about:blank")
    await until(lambda: not site.hub.connections)
    await site.say(*(f"{n}" for n in range(200)))
    await visit(tab, site)
    await site.say("two")
    await sees(tab, "one", "gap: expired", "two")


async def test_a_refusal_of_the_application_is_final(tab: InBrowser, site: Site) -> None:
    """Its code and its reason are for the page to show."""

    @site.ws.connect
    async def refuse(conn: Connection) -> None:
        raise Close(4403, "members only")

    await tab.page.goto(site.url)
    await tab.page.wait_for_function("() => globalThis.c?.state === 'closed'")
    last = (await tab.run("() => states"))[-1]
    assert last == ["closed", {"code": 4403, "reason": "members only"}]


# With a script for a server


@pytest.mark.parametrize("event", ["online", "visibilitychange", "resume"])
async def test_a_living_connection_is_probed(tab: InBrowser, script: Script, event: str) -> None:
    """When the network or the user is back; without an answer another is made at once."""
    await tab.page.clock.install()
    await begin(tab, script)
    peer = await script.accept()
    await tab.run("() => { log(c, '$pong'); return until(() => c.state === 'open'); }")
    target = "window" if event == "online" else "document"
    code = f"() => {{ {target}.dispatchEvent(new Event('{event}')); }}"
    await tab.run(code)
    assert (await peer.receive())["type"] == "$ping"
    await peer.send("$pong")
    await tab.page.wait_for_function("() => c.log.at(-1)[0] === '$pong'")
    await tab.page.clock.run_for(6_000)
    await tab.run("() => { c.on('$state', (_, detail) => { c.wait ??= detail?.wait; }); }")
    for _ in range(3):  # A network that comes and goes does not put off the end.
        await tab.run(code)
        await tab.page.clock.run_for(1_700)
    assert (await peer.receive())["type"] == "$ping"
    await script.accept()
    assert await tab.run("() => c.wait") == 0
    assert (await peer.gone())[0] == 1005


@pytest.mark.parametrize("event", ["online", "visibilitychange", "resume"])
async def test_a_client_that_waits_tries_at_once(
    tab: InBrowser, script: Script, event: str
) -> None:
    """When the network or the user is back; never after its own ``close()``."""
    await tab.page.clock.install()
    await begin(tab, script)
    await (await script.accept()).close(1012)
    await tab.run("() => until(() => c.state === 'waiting')")
    target = "window" if event == "online" else "document"
    await tab.run(f"() => {{ {target}.dispatchEvent(new Event('{event}')); }}")
    await script.accept()
    await tab.run(f"() => {{ c.close(); {target}.dispatchEvent(new Event('{event}')); }}")
    await tab.page.clock.run_for(60_000)
    assert await tab.run("() => c.state") == "closed"
    assert script.attempts == 2


async def test_a_silent_server_is_asked(tab: InBrowser, script: Script) -> None:
    """After 30 seconds, as long as the page is open."""
    await tab.page.clock.install()
    await begin(tab, script)
    peer = await script.accept()
    await tab.run("() => { log(c, 'a'); return until(() => c.state === 'open'); }")
    await tab.page.clock.run_for(29_000)
    await peer.send("a")
    await tab.page.wait_for_function("() => c.log.length > 1")
    await tab.page.clock.run_for(29_900)
    await peer.send("a")
    await tab.page.wait_for_function("() => c.log.length > 2")
    await tab.page.clock.run_for(30_000)
    assert await peer.receive() == {"type": "$ping"}
    await tab.run("() => { c.on('$state', (_, detail) => { c.wait ??= detail?.wait; }); }")
    await tab.page.clock.run_for(5_000)
    await tab.page.wait_for_function("() => c.wait !== undefined")
    assert 500 <= await tab.run("() => c.wait") <= 1_000  # Many may ask at the same time.


async def test_a_connection_that_lasted_starts_the_waits_anew(
    tab: InBrowser, script: Script
) -> None:
    """After 5 seconds, not before: it may have been refused behind its first message."""
    await tab.page.clock.install()
    await tab.page.clock.pause_at(4_000_000_000)
    await begin(tab, script)
    await tab.run("""() => {
      Math.random = () => 0.9999;
      c.on('$state', (state, detail) => { if (detail) c.wait = detail.wait; });
    }""")
    waits = []
    for seconds in (0, 4, 0, 6, 0):
        peer = await script.accept()
        await tab.page.wait_for_function("() => c.state === 'open'")
        await tab.page.clock.run_for(1_000 * seconds)
        await peer.close(4000)
        await tab.page.wait_for_function("() => c.state === 'waiting'")
        waits.append(round(await tab.run("() => c.wait")))
        await tab.run("() => { c.retry(); }")
    assert waits == [1000, 2000, 4000, 1000, 2000]


HANGS = {
    "token": "{token: () => new Promise(() => {})}",
    "handshake": "(globalThis.WebSocket = class { close() {} }, {})",
    "answer": "{token: 's3cret'}",
}


@pytest.mark.parametrize("what", HANGS)
async def test_an_attempt_that_hangs_is_given_up(tab: InBrowser, script: Script, what: str) -> None:
    """A token, a handshake or an answer to it that does not come in 20 seconds."""
    await tab.page.clock.install()
    await begin(tab, script, HANGS[what])
    if what == "answer":
        await (await script.accept()).receive()
    await tab.page.clock.run_for(15_000)
    assert await tab.run("() => c.state") == "connecting"
    await tab.page.clock.run_for(5_000)
    assert await tab.run("() => c.state") == "waiting"


async def test_an_attempt_from_before_the_network_came_back_is_given_up(
    tab: InBrowser, script: Script
) -> None:
    """It may hang; another one is made at once, and what waits is sent once."""
    await begin(tab, script, "{token: 's3cret'}")
    await tab.run("() => { c.send('next'); }")
    first = await script.accept()
    await first.receive()
    await tab.run("() => { dispatchEvent(new Event('online')); }")
    second = await script.accept()
    asked = await second.receive()
    await second.send("authenticate.reply", id=asked["id"])
    assert await second.receive() == {"type": "next"}
    assert (await first.gone())[0] == 1005


async def test_each_address_has_a_note_of_its_own(tab: InBrowser, script: Script) -> None:
    """Also two relative ones, on two pages that a tab shows one after the other."""
    for n, page in enumerate(("one/", "two/")):
        await begin(tab, script, "{resume: false}")
        await tab.run("(page) => { history.pushState({}, '', page); }", page)
        await tab.run(
            "() => { globalThis.d = log(connect('ws', {storage: sessionStorage}), 'a'); }"
        )
        await script.accept()
        peer = await script.accept()
        assert peer.path == f"/{page}ws?resume=%7B%7D"
        await peer.send("a", 1, group="g", at=f"e.{n}")
        await tab.page.wait_for_function("() => d.log.length === 1")
    assert await tab.run("() => Object.keys(sessionStorage).sort()") == [
        f"pachinko {script.url.replace('http', 'ws')}/{page}ws" for page in ("one/", "two/")
    ]


async def test_ids_are_stored_while_the_page_is_hidden(tab: InBrowser, script: Script) -> None:
    """A hidden page may be killed; one that is seen may be duplicated, and keeps them to itself."""
    await begin(tab, script, "{storage: sessionStorage}")
    peer = await script.accept()
    await tab.run("() => { log(c, 'resume'); }")
    await peer.send("resume", {"replayed": 0, "id": "one"}, group="g", at="e.1")
    await tab.page.wait_for_function("() => c.log.length > 1")
    stored = "() => JSON.parse(sessionStorage.getItem(sessionStorage.key(0)))"
    assert await tab.run(stored) == {"groups": {"g": "e.1"}}
    turn = """(hidden) => {
      Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});
      document.dispatchEvent(new Event('visibilitychange'));
    }"""
    await tab.run(turn, True)
    assert await tab.run(stored) == {"groups": {"g": "e.1"}, "ids": ["one"], "streams": []}
    await tab.run(turn, False)
    assert await tab.run(stored) == {"groups": {"g": "e.1"}}
    peer.cut()
    assert resume_of((await script.accept()).path)["ids"] == ["one"]
