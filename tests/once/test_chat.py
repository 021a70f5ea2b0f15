"""The chat example: its messages over a real server, and its page in a real browser.

``PYTHONPATH=tests python tests/once/test_chat.py docs/chat.png`` makes the screenshot for the
documentation instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.request import urlopen

import pytest
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Locator,
    Page,
    WebSocketRoute,
    expect,
    sync_playwright,
)
from ports import free_port
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 15.0  # seconds for anything to happen; a slow machine needs it, a fast one never waits

expect.set_options(timeout=PATIENCE * 1000)


class Server:
    """``python examples/chat.py`` on a port of its own, which it keeps when started again."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self.start()

    def start(self) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "examples" / "chat.py")],
            env={**os.environ, "PYTHONPATH": path, "HOST": "127.0.0.1", "PORT": str(self.port)},
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + PATIENCE
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                pytest.fail(f"examples/chat.py does not answer at {self.url}; its log is above")
            time.sleep(0.05)

    def answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def kill(self) -> None:
        """End it as a crash would: no close frame, no goodbye."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()


class Client:
    """Someone who speaks the chat's messages without the page."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.id = ""

    def send(self, type: str, id: int | None = None, **payload: Any) -> None:
        self.connection.send(json.dumps({"type": type, "id": id, "payload": payload}))

    def receive(self) -> dict[str, Any]:
        """The next message; the clock ticks between any two."""
        while True:
            frame: dict[str, Any] = json.loads(self.connection.recv(PATIENCE))
            if frame["type"] != "tick":
                return frame

    def request(self, type: str, **payload: Any) -> dict[str, Any]:
        self.send(type, 7, **payload)
        frame = self.receive()
        assert frame.pop("id") == 7
        return frame

    def enter(self, nick: str) -> dict[str, Any]:
        welcome = self.request("enter", nick=nick)
        self.id = welcome["payload"]["you"]["id"]
        return welcome

    @property
    def silent(self) -> bool:
        """Whether nothing has come for this client but what it asks for now."""
        return bool(self.request("sum", a=0, b=0)["type"] == "sum.reply")


Join = Callable[..., Client]
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def own_server(shared_server: Server) -> Iterator[Server]:
    """The same one, for a test that kills it: no other test runs meanwhile."""
    yield shared_server
    if shared_server.process.poll() is not None:
        shared_server.start()


def dial(server: Server, room: str) -> ClientConnection:
    return connect(f"ws://127.0.0.1:{server.port}/ws/{room}", proxy=None)


@pytest.fixture
def join(shared_server: Server, room: str) -> Iterator[Join]:
    """Connect to the test's room, under a nickname if there is one."""
    with contextlib.ExitStack() as stack:

        def join(nick: str = "") -> Client:
            client = Client(stack.enter_context(dial(shared_server, room)))
            if nick:
                client.enter(nick)
            return client

        yield join


@pytest.fixture
def room() -> str:
    """A room that no other test uses."""
    return f"room-{secrets.token_hex(4)}"


@contextlib.contextmanager
def chromium() -> Generator[Browser, None, None]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.fail("the page is tested in Chromium: apt-get install chromium, or set CHROMIUM")
    options = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"]
    options += ["disable-background-networking", "disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=[f"--{option}" for option in options]
        )
        with contextlib.closing(browser):
            yield browser


@pytest.fixture(scope="module")
def shared_browser() -> Iterator[tuple[Browser, asyncio.AbstractEventLoop]]:
    """A browser, and the event loop of Playwright's sync API, which counts as running."""
    with chromium() as browser:
        loop = asyncio.get_running_loop()
        asyncio._set_running_loop(None)
        yield browser, loop
        asyncio._set_running_loop(loop)


@pytest.fixture
def browser(
    shared_browser: tuple[Browser, asyncio.AbstractEventLoop],
) -> Iterator[Browser]:
    """The browser, whose event loop runs during the test: others could not bear it."""
    browser, loop = shared_browser
    asyncio._set_running_loop(loop)
    yield browser
    for context in browser.contexts:
        context.close()
    asyncio._set_running_loop(None)


@pytest.fixture
def open_page(browser: Browser, shared_server: Server, room: str) -> Iterator[Open]:
    """Open the page as another person each time; it must not complain in the console."""
    complaints: list[str] = []

    def complain(line: ConsoleMessage) -> None:
        if line.type == "error":
            complaints.append(line.text)

    def open_page(
        nick: str = "", server: Server = shared_server, has_clock: bool = False, **options: Any
    ) -> Page:
        """*has_clock*: the test moves the page's time with ``page.clock``."""
        page = browser.new_context(**options).new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", complain)
        if has_clock:
            page.clock.install()
        page.goto(f"{server.url}#{room}")
        if nick:
            page.get_by_label("Nickname").fill(nick)
            page.get_by_role("button", name="Join the room").click()
            expect(page.get_by_role("status")).to_have_text("Connected")
        return page

    yield open_page
    # A refused connection is reported by the browser itself, and no page can prevent it.
    assert [text for text in complaints if "ERR_CONNECTION_REFUSED" not in text] == []


def box(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Message to")


def say(page: Page, text: str) -> None:
    box(page).fill(text)
    box(page).press("Enter")


def come_back(page: Page) -> None:
    """Connect again, now that the server is there, without the wait before the next attempt."""
    page.evaluate("client.retry()")
    expect(page.get_by_role("status")).to_have_text("Connected", timeout=2 * PATIENCE * 1000)


def bubble(page: Page, text: str) -> Locator:
    return page.get_by_role("log").locator(".bubble", has_text=text)


def people(page: Page) -> Locator:
    return page.get_by_role("list", name="Here now").get_by_role("listitem").locator("bdi")


# The messages


def test_a_port_in_use_is_one_clear_line(shared_server: Server) -> None:
    """A second server on the same port ends with a line that says how to choose another."""
    second = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "chat.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PORT": str(shared_server.port)},
        capture_output=True,
        check=False,
        text=True,
        timeout=PATIENCE,
    )
    assert second.returncode != 0
    assert "Traceback" not in second.stderr
    assert [line for line in second.stderr.splitlines() if "in use" in line][1:] == []
    assert f"port {shared_server.port} is already in use" in second.stderr
    assert f"write PORT={shared_server.port + 1} in front of the command" in second.stderr


def test_the_page_is_served(shared_server: Server) -> None:
    """``GET /`` gives the page as HTML in UTF-8."""
    with urlopen(shared_server.url, timeout=PATIENCE) as response:
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        assert response.read() == (ROOT / "examples" / "chat.html").read_bytes()


def test_the_welcome_comes_first(join: Join) -> None:
    """The first message tells a client who it is, and that it is the first one here."""
    welcome = join().enter("Ada")
    you = welcome["payload"]["you"]
    assert welcome["type"] == "welcome"
    assert you["nick"] == "Ada"
    assert welcome["payload"]["here"] == [you]


def test_an_arrival_is_announced(join: Join) -> None:
    """Whoever enters sees who is here, and those who are here see who enters."""
    ada, bob = join("Ada"), join()
    welcome = bob.enter("Bob")
    here = {person["nick"]: person["id"] for person in welcome["payload"]["here"]}
    assert here == {"Ada": ada.id, "Bob": bob.id}
    joined = ada.receive()
    assert (joined["type"], joined["payload"]) == ("joined", {"id": bob.id, "nick": "Bob"})


def test_a_departure_is_announced(join: Join) -> None:
    """Those who stay see who left, and a later list does not name them."""
    ada, bob = join("Ada"), join("Bob")
    ada.receive()
    bob.connection.close()
    left = ada.receive()
    assert (left["type"], left["payload"]) == ("left", {"id": bob.id, "nick": "Bob"})
    here = join().enter("Cleo")["payload"]["here"]
    assert sorted(person["nick"] for person in here) == ["Ada", "Cleo"]


def test_who_never_entered_leaves_unnoticed(join: Join) -> None:
    """A connection without a nickname comes and goes without a message to anyone."""
    ada = join("Ada")
    join().connection.close()
    assert ada.silent


def test_entering_again_is_a_new_nickname(join: Join) -> None:
    """The id stays, the nickname changes, and the others are told."""
    ada, bob = join("Ada"), join("Bob")
    ada.receive()
    assert bob.request("enter", nick="Robert")["payload"]["you"] == {"id": bob.id, "nick": "Robert"}
    assert ada.receive()["payload"] == {"id": bob.id, "nick": "Robert"}


def test_what_is_said_reaches_everybody_once(join: Join) -> None:
    """The others get the message, and the sender gets the same as its reply."""
    ada, bob = join("Ada"), join("Bob")
    ada.receive()
    reply = bob.request("say", text="  Grüße 🎉\n")
    assert reply["type"] == "said"
    assert reply["payload"]["who"] == {"id": bob.id, "nick": "Bob"}
    assert reply["payload"]["text"] == "Grüße 🎉"
    assert ada.receive()["payload"] == reply["payload"]
    assert ada.silent
    assert bob.silent


def test_typing_is_shown_to_the_others(join: Join) -> None:
    """The others learn who types, the one who types hears nothing of it."""
    ada, bob = join("Ada"), join("Bob")
    ada.receive()
    bob.send("typing")
    typing = ada.receive()
    assert (typing["type"], typing["payload"]) == ("typing", {"id": bob.id, "nick": "Bob"})
    assert bob.silent


def test_sum(join: Join) -> None:
    """A sum is answered with its total."""
    assert join().request("sum", a=2, b=3) == {"type": "sum.reply", "payload": 5}


def test_a_wrong_sum_names_each_wrong_field(join: Join) -> None:
    """Both wrong terms are named in one error, and the connection goes on."""
    ada = join("Ada")
    error = ada.request("sum", a="x", b=None)["payload"]
    assert error["code"] == "invalid_payload"
    assert [wrong["path"] for wrong in error["errors"]] == ["$.payload.a", "$.payload.b"]
    assert ada.silent


@pytest.mark.parametrize("nick", ["", "  ", "n" * 25])
def test_a_nickname_has_a_sensible_length(join: Join, nick: str) -> None:
    """An empty or over-long nickname is refused, and a better one is taken."""
    client = join()
    error = client.request("enter", nick=nick)["payload"]
    assert error["code"] == "invalid_payload"
    assert error["errors"][0]["path"] == "$.payload.nick"
    assert client.enter("n" * 24)["type"] == "welcome"


@pytest.mark.parametrize("text", ["", " \n ", "t" * 2001])
def test_a_text_has_a_sensible_length(join: Join, text: str) -> None:
    """An empty or over-long text is refused, and nobody else hears of it."""
    ada, bob = join("Ada"), join("Bob")
    ada.receive()
    error = bob.request("say", text=text)["payload"]
    assert error["code"] == "invalid_payload"
    assert error["errors"][0]["path"] == "$.payload.text"
    assert ada.silent
    assert bob.request("say", text="🎉" * 2000)["type"] == "said"


@pytest.mark.parametrize(("type", "payload"), [("say", {"text": "hi"}), ("typing", {})])
def test_nobody_speaks_without_a_nickname(join: Join, type: str, payload: dict[str, str]) -> None:
    """What concerns the room is refused until the client has entered."""
    assert join().request(type, **payload)["payload"]["code"] == "enter_first"


def test_an_over_long_room_is_refused(shared_server: Server) -> None:
    """The connection is closed with a code and a reason that a browser can read."""
    with dial(shared_server, "r" * 33) as connection:
        with pytest.raises(ConnectionClosed):
            connection.recv(PATIENCE)
        assert connection.close_code == 4400
        assert connection.close_reason == "a room's name has at most 32 characters"


def test_rooms_are_apart(shared_server: Server, join: Join, room: str) -> None:
    """What is said in one room is not heard in another."""
    ada = join("Ada")
    with dial(shared_server, f"not-{room}") as connection:
        elsewhere = Client(connection)
        elsewhere.enter("Bob")
        elsewhere.request("say", text="hi")
        assert ada.silent


def test_the_clock_ticks(join: Join) -> None:
    """Everybody in a room gets the server's time, again and again."""
    ada = join("Ada")
    ticks = [json.loads(ada.connection.recv(PATIENCE)) for _ in range(2)]
    assert [tick["type"] for tick in ticks] == ["tick", "tick"]
    assert ticks[0]["payload"]["at"] < ticks[1]["payload"]["at"]


# The page

LONG_WAIT = "Math.random = () => 25"  # makes pachinko.js wait for more than ten seconds


def test_two_people_talk(open_page: Open) -> None:
    """Each sees the other's message as the other's, and the own one as delivered."""
    ada, bob = open_page("Ada"), open_page("Bob")
    say(ada, "Hello <b>Bob</b>")
    expect(bubble(bob, "Hello <b>Bob</b>")).to_have_count(1)
    say(bob, "Hello Ada")
    expect(bubble(ada, "Hello Ada")).to_be_visible()
    expect(ada.locator(".message:not(.mine) .name")).to_have_text("Bob")
    expect(ada.locator(".mine")).to_have_attribute("data-state", "")
    expect(bob.locator(".mine .bubble")).to_have_text("Hello Ada")
    expect(box(ada)).to_have_value("")


def test_who_is_here(open_page: Open) -> None:
    """The list follows those who come, change their name and leave."""
    ada = open_page("Ada")
    expect(people(ada)).to_have_text(["Ada"])
    bob = open_page("Bob")
    expect(people(bob)).to_have_text(["Bob", "Ada"])
    expect(people(ada)).to_have_text(["Ada", "Bob"])
    say(bob, "/nick Robert")
    expect(people(ada)).to_have_text(["Ada", "Robert"])
    expect(ada.get_by_role("log")).to_contain_text("Bob is now Robert")
    bob.context.close()
    expect(people(ada)).to_have_text(["Ada"])
    expect(ada.get_by_role("log")).to_contain_text("Robert left")


def test_typing_sum_and_clock(open_page: Open) -> None:
    """Typing shows and goes, the sum is answered, and the server's time runs."""
    ada, bob = open_page("Ada"), open_page("Bob", has_clock=True)
    box(bob).press_sequentially("Hm")
    expect(ada.locator(".typing")).to_have_text("Bob is typing…")
    box(bob).press("Enter")
    expect(bubble(ada, "Hm")).to_be_visible()
    expect(ada.locator(".typing")).to_have_text("")
    box(bob).press_sequentially("An")
    bob.clock.run_for(2500)  # It tells the others not too often.
    expect(ada.locator(".typing")).to_have_text("Bob is typing…")
    say(ada, "/sum 2 3")
    expect(ada.get_by_text("2 + 3 = 5", exact=True)).to_be_visible()
    before = ada.locator("#clock").text_content()
    expect(ada.locator("#clock")).not_to_have_text(before or "")


def test_an_error_reply_is_shown(open_page: Open) -> None:
    """The server's refusal is put into words, and the line is kept until it is corrected."""
    ada = open_page("Ada")
    say(ada, "/sum 2 x")
    expect(ada.get_by_role("alert")).to_contain_text("The second of the two is no whole number")
    expect(box(ada)).to_have_value("/sum 2 x")
    say(ada, "/sum 2 4")
    expect(ada.get_by_text("2 + 4 = 6", exact=True)).to_be_visible()
    expect(ada.get_by_role("alert")).to_have_count(0)
    say(ada, "/dance")
    expect(ada.get_by_role("alert")).to_contain_text("no command /dance")


def test_a_refused_nickname_is_asked_for_again(open_page: Open) -> None:
    """A name that the server does not take is shown with the reason, and the old one stays."""
    ada = open_page("Ada")
    say(ada, f"/nick {'n' * 25}")
    expect(ada.get_by_role("alert")).to_contain_text("nick")
    ada.get_by_role("button", name="Cancel").click()
    expect(people(ada)).to_have_text(["Ada"])
    say(ada, "Still me")
    expect(ada.locator(".mine")).to_have_attribute("data-state", "")


def test_both_come_back_after_a_crash(open_page: Open, own_server: Server) -> None:
    """A killed server is noticed, what is written meanwhile waits, and all goes on by itself."""
    ada, bob = (open_page(nick, own_server, has_clock=True) for nick in ("Ada", "Bob"))
    expect(people(ada)).to_have_text(["Ada", "Bob"])
    own_server.kill()
    for page in (ada, bob):
        expect(page.get_by_role("button", name="Reconnect now")).to_be_visible()
        expect(page.get_by_role("status")).to_have_text(re.compile("Connection lost|Connecting…"))
    say(ada, "Written in between")
    expect(ada.locator(".mine")).to_contain_text("Waiting to be sent")
    own_server.start()
    for page in (ada, bob):
        page.clock.run_for(4000)
        expect(page.get_by_role("status")).to_have_text("Connected", timeout=2 * PATIENCE * 1000)
        expect(page.get_by_role("button", name="Reconnect now")).to_be_hidden()
    expect(ada.locator(".mine")).to_have_attribute("data-state", "")
    expect(people(ada)).to_have_text(["Ada", "Bob"])
    expect(people(bob)).to_have_text(["Bob", "Ada"])
    say(bob, "Back again")
    expect(bubble(ada, "Back again")).to_have_count(1)


def test_reconnect_now(open_page: Open, own_server: Server) -> None:
    """The button and the browser's ``online`` event try at once, however long the wait would be."""
    ada, bob = open_page("Ada", own_server), open_page("Bob", own_server)
    for page in (ada, bob):
        page.evaluate(LONG_WAIT)
    own_server.kill()
    for page in (ada, bob):
        expect(page.locator("#countdown")).to_have_text(re.compile(r"in \d\d s"))
    own_server.start()
    ada.get_by_role("button", name="Reconnect now").click()
    bob.evaluate("dispatchEvent(new Event('online'))")
    for page in (ada, bob):
        expect(page.get_by_role("status")).to_have_text("Connected", timeout=8000)


def test_a_message_cut_off_is_the_persons_choice(open_page: Open, own_server: Server) -> None:
    """A message without an answer is marked, and sent again only on demand."""
    ada = open_page("Ada", own_server)
    # A line that swallows what is sent.
    ada.evaluate("() => { globalThis.sends = WebSocket.prototype.send; }")
    ada.evaluate("() => { WebSocket.prototype.send = () => {}; }")
    say(ada, "Did this arrive?")
    own_server.kill()
    expect(ada.locator(".mine")).to_contain_text("May not have arrived")
    ada.evaluate("() => { WebSocket.prototype.send = sends; }")
    own_server.start()
    come_back(ada)
    ada.get_by_role("button", name="Send again").click()
    expect(ada.locator(".mine")).to_have_attribute("data-state", "")
    expect(ada.locator(".mine")).not_to_contain_text("May not have arrived")


def test_the_keyboard_is_enough(open_page: Open, room: str) -> None:
    """Name, message, new line, room and nickname: all without a mouse."""
    ada = open_page()
    expect(ada.get_by_label("Nickname")).to_be_focused()
    ada.keyboard.press("Enter")
    expect(ada.get_by_role("alert")).to_have_text("Please enter a nickname.")
    ada.keyboard.press("Escape")
    expect(ada.get_by_label("Nickname")).to_be_visible()
    ada.get_by_label("Nickname").press_sequentially("Ada")
    ada.keyboard.press("Enter")
    expect(ada.get_by_role("status")).to_have_text("Connected")
    expect(box(ada)).to_be_focused()
    ada.keyboard.type("one")
    ada.keyboard.press("Shift+Enter")
    ada.keyboard.type("two")
    ada.keyboard.press("Enter")
    expect(ada.locator(".mine .bubble")).to_have_text("one\ntwo", use_inner_text=True)
    tab_to(ada, ada.get_by_label("Join another room"))
    ada.keyboard.type("Book Club")
    ada.keyboard.press("Enter")
    expect(ada.get_by_role("heading", level=1)).to_have_text("#book-club")
    expect(ada).to_have_url(re.compile("#book-club$"))
    expect(ada.get_by_role("status")).to_have_text("Connected")
    tab_to(ada, ada.get_by_role("link", name=room))
    ada.keyboard.press("Enter")
    expect(ada.locator(".mine .bubble")).to_be_visible()
    tab_to(ada, ada.get_by_role("button", name="Change nickname"))
    ada.keyboard.press("Enter")
    ada.keyboard.type("Countess")
    ada.keyboard.press("Enter")
    expect(people(ada)).to_have_text(["Countess"])
    tab_to(ada, ada.get_by_role("button", name="Skip to the message box"))
    ada.keyboard.press("Enter")
    expect(box(ada)).to_be_focused()


def tab_to(page: Page, target: Locator) -> None:
    """Press Tab until the focus is on *target*; each stop on the way must show its focus."""
    for _ in range(40):
        page.keyboard.press("Tab")
        seen = page.evaluate(
            """() => {
                const at = document.activeElement;
                const styles = [getComputedStyle(at), getComputedStyle(at.parentElement)];
                return at === document.body
                    || styles.some((s) => s.outlineStyle !== 'none' || s.boxShadow !== 'none');
            }"""
        )
        assert seen, page.evaluate("document.activeElement.outerHTML")
        if target.evaluate("element => element === document.activeElement"):
            return
    pytest.fail(f"Tab never reaches {target}")


def test_the_page_remembers(open_page: Open) -> None:
    """After a reload the nickname is known and the link still leads to the room."""
    ada = open_page("Ada")
    ada.reload()
    expect(ada.get_by_role("status")).to_have_text("Connected")
    expect(people(ada)).to_have_text(["Ada"])


LANDMARKS: tuple[Literal["main", "log", "status"], ...] = ("main", "log", "status")


@pytest.mark.parametrize("width", [375, 1200])
def test_everything_has_a_name(open_page: Open, width: int) -> None:
    """Each input and button has a name, each landmark is there, and nothing overflows sideways."""
    ada = open_page("Ada", viewport={"width": width, "height": 740})
    say(ada, "Hello https://example.com/" + "x" * 200)
    say(ada, "/sum 1 x")
    expect(ada.get_by_role("alert")).to_be_visible()
    assert nameless(ada) == []
    for drawer, side in (("^Rooms$", "rooms"), ("^Who is here", "people")):
        button = ada.get_by_role("button", name=re.compile(drawer))
        if width == 375:
            button.click()
            expect(ada.get_by_role("button", name=f"Close the list of {side}")).to_be_focused()
            assert nameless(ada) == []
            ada.keyboard.press("Escape")
            expect(button).to_be_focused()
    for landmark in LANDMARKS:
        expect(ada.get_by_role(landmark)).to_have_count(1)
    expect(ada.get_by_role("log")).to_have_attribute("aria-live", "polite")
    assert ada.evaluate("document.documentElement.scrollWidth") == width
    assert ada.evaluate("document.querySelector('.log').scrollWidth") <= width


def nameless(page: Page) -> list[str]:
    """The controls that a screen reader could not tell the name of."""
    lines = page.locator("body").aria_snapshot().splitlines()
    controls = [line for line in lines if re.match(r"\s*- '?(button|textbox|link)\b", line)]
    assert len(controls) > 5
    return [line for line in controls if not re.search(r'(button|textbox|link) "\w', line)]


def test_two_browsers_and_a_program(open_page: Open, join: Join) -> None:
    """Two pages and a client in Python share one room."""
    ada, bob, program = open_page("Ada"), open_page("Bob"), join("Program")
    for page in (ada, bob):
        expect(page.get_by_role("list", name="Here now")).to_contain_text("Program")
    program.request("say", text="I am a program")
    for page in (ada, bob):
        expect(bubble(page, "I am a program")).to_have_count(1)
    say(ada, "Pleased to meet you")
    said = next(frame for frame in iter(program.receive, None) if frame["type"] == "said")
    assert said["payload"]["who"]["nick"] == "Ada"
    assert said["payload"]["text"] == "Pleased to meet you"
    expect(bubble(bob, "Pleased to meet you")).to_have_count(1)


# A burst


def frames_sent(page: Page) -> list[dict[str, Any]]:
    """What the page's next connections send, from now on."""
    frames: list[dict[str, Any]] = []
    page.on(
        "websocket",
        lambda socket: socket.on("framesent", lambda data: frames.append(json.loads(data))),
    )
    return frames


def texts(frames: list[dict[str, Any]]) -> list[str]:
    return [frame["payload"]["text"] for frame in frames if frame["type"] == "say"]


LINES = [f"line {n}" for n in range(30)]


def test_a_burst_arrives_in_order_and_within_the_rate(open_page: Open, join: Join) -> None:
    """Thirty messages at once all arrive, and hardly one of them is sent twice."""
    ada, bob = open_page(), join("Bob")
    frames = frames_sent(ada)
    ada.reload()
    ada.get_by_label("Nickname").fill("Ada")
    ada.get_by_role("button", name="Join the room").click()
    expect(ada.get_by_role("status")).to_have_text("Connected")
    for line in LINES:
        say(ada, line)
    heard: list[str] = []
    while len(heard) < len(LINES):
        frame = bob.receive()
        heard += [frame["payload"]["text"]] if frame["type"] == "said" else []
    assert heard == LINES
    expect(ada.locator(".mine:not([data-state=''])")).to_have_count(0)
    expect(ada.get_by_role("status")).to_have_text("Connected")
    assert len(texts(frames)) <= len(LINES) + 10
    assert ada.evaluate("client.state") == "open"


def test_a_burst_is_sent_from_a_hidden_window(open_page: Open) -> None:
    """A hidden window's timers hardly run; there the server's clock sends what waits."""
    ada, bob = open_page("Ada"), open_page("Bob")
    ada.evaluate("window.setTimeout = () => 0")
    ada.evaluate("for (let n = 0; n < 24; n++) say(`line ${n}`)")
    expect(bob.locator(".bubble")).to_have_text(LINES[:24], timeout=4 * PATIENCE * 1000)


def test_a_burst_goes_on_after_a_restart(open_page: Open, own_server: Server) -> None:
    """Of what waits for its turn nothing is lost, doubled or out of order."""
    ada, bob = open_page("Ada", own_server), open_page("Bob", own_server)
    ada.evaluate("for (let n = 0; n < 30; n++) say(`line ${n}`)")
    expect(ada.locator(".mine[data-state=queued]").first).to_be_visible()
    ada.evaluate(LONG_WAIT)  # Bob comes back first, and hears all
    own_server.kill()
    for page in (ada, bob):
        expect(page.get_by_role("button", name="Reconnect now")).to_be_visible()
    queued = ada.locator(".mine[data-state=queued] .bubble").all_text_contents()
    assert queued
    own_server.start()
    come_back(bob)
    come_back(ada)
    undecided = ada.locator(".mine:not([data-state='']):not([data-state=unsure])")
    expect(undecided).to_have_count(0, timeout=2 * PATIENCE * 1000)
    heard = bob.locator(".bubble").all_text_contents()
    unsure = ada.locator(".mine[data-state=unsure] .bubble").all_text_contents()
    assert len(unsure) <= 1
    assert heard == sorted(set(heard), key=lambda line: int(line.removeprefix("line ")))
    assert set(heard) | set(unsure) >= set(queued)


# The page, and a server that says what the test wants


class Stage:
    """A server of the test's own, as the page sees it."""

    def __init__(self, page: Page, answers: dict[str, list[dict[str, Any]]]) -> None:
        self.frames: list[dict[str, Any]] = []
        self.answers = answers
        self.loses_ids = False  # in errors
        self.sockets: list[WebSocketRoute] = []
        page.route_web_socket(re.compile("/ws/"), self.accept)

    def accept(self, socket: WebSocketRoute) -> None:
        self.sockets.append(socket)
        socket.on_message(lambda data: self.receive(socket, json.loads(data)))

    def receive(self, socket: WebSocketRoute, frame: dict[str, Any]) -> None:
        self.frames.append(frame)
        kind, id, payload = frame["type"], frame.get("id"), frame.get("payload")
        if refusals := self.answers.get(kind):
            error = {"type": "error", "payload": refusals.pop(0)}
            known = id is not None and not self.loses_ids
            socket.send(json.dumps({**error, "id": id} if known else error))
        elif kind == "enter":
            you = {"id": "1", "nick": payload["nick"]}
            here = [you, {"id": "2", "nick": "Bob"}]
            welcome = {"type": "welcome", "id": id, "payload": {"you": you, "here": here}}
            socket.send(json.dumps(welcome))
        elif kind == "say":
            said = {"who": {"id": "1", "nick": "Ada"}, "at": "2026-11-30T02:00:00Z", **payload}
            socket.send(json.dumps({"type": "said", "id": id, "payload": said}))

    def of(self, type: str) -> list[dict[str, Any]]:
        return [frame for frame in self.frames if frame["type"] == type]


@pytest.fixture
def staged(open_page: Open) -> Callable[..., tuple[Page, Stage]]:
    """The page as Ada, before a server that refuses what *answers* says."""

    def staged(**answers: list[dict[str, Any]]) -> tuple[Page, Stage]:
        page = open_page(has_clock=True)
        stage = Stage(page, answers)
        page.reload()
        page.get_by_label("Nickname").fill("Ada")
        page.get_by_role("button", name="Join the room").click()
        expect(page.get_by_role("status")).to_have_text("Connected")
        return page, stage

    return staged


Staged = Callable[..., tuple[Page, Stage]]


def stop_clock(page: Page) -> None:
    """Let the page's time go on only as the test moves it; it is five seconds later then."""
    page.clock.pause_at(page.evaluate("Date.now()") / 1000 + 5)


def limited(seconds: float) -> dict[str, Any]:
    return {"code": "rate_limited", "message": "at most 20 messages", "retry_after": seconds}


def test_retry_after_is_obeyed(staged: Staged) -> None:
    """All wait as long as the server says; then they go in order, the refused one first."""
    ada, stage = staged(say=[limited(1.5)])
    stop_clock(ada)
    for line in LINES[:3]:
        say(ada, line)
    expect(ada.locator(".mine[data-state=queued]")).to_have_count(3)
    expect(ada.locator(".mine").first).to_contain_text("Waiting to be sent")
    ada.clock.run_for(1499)
    expect(ada.locator(".mine[data-state=queued]")).to_have_count(3)
    assert len(stage.of("say")) == 1
    ada.clock.resume()
    ada.clock.fast_forward(1000)
    expect(ada.locator(".mine[data-state='']")).to_have_count(3)
    assert [frame["payload"]["text"] for frame in stage.of("say")] == [LINES[0], *LINES[:3]]


def test_every_request_waits_its_time(staged: Staged) -> None:
    """An entry and a sum that are refused as too many are sent again, and nobody is bothered."""
    ada, stage = staged(enter=[limited(0.2)], sum=[limited(0.2), {"code": "internal_error"}])
    assert len(stage.of("enter")) == 2
    say(ada, "/sum 2 3")
    expect(ada.get_by_role("alert")).to_contain_text("Something went wrong on the server")
    assert len(stage.of("sum")) == 2


def test_typing_never_takes_the_place_of_a_message(staged: Staged) -> None:
    """Who types one message after the other sends few notices, and none while messages wait."""
    ada, stage = staged(say=[limited(2.0)])
    began = ada.evaluate("performance.now()")
    for line in LINES[:10]:
        box(ada).press_sequentially(line)
        box(ada).press("Enter")
    ada.clock.run_for(2000)
    expect(ada.locator(".mine[data-state='']")).to_have_count(10, timeout=3 * PATIENCE * 1000)
    assert [frame["payload"]["text"] for frame in stage.of("say")] == [LINES[0], *LINES[:10]]
    seconds = (ada.evaluate("performance.now()") - began) / 1000
    assert len(stage.of("typing")) <= 1 + seconds / 2.5


def test_a_refused_notice_of_typing_is_nobodys_business(staged: Staged) -> None:
    """What is refused without an id delays the next message, and shows no error."""
    ada, stage = staged(typing=[limited(0.5)])
    box(ada).press_sequentially("Hm")
    box(ada).press("Enter")
    expect(ada.locator(".mine")).to_have_attribute("data-state", "")
    expect(ada.get_by_role("alert")).to_have_count(0)
    assert [frame["type"] for frame in stage.frames] == ["enter", "typing", "say"]


def test_an_error_without_an_id_is_the_answer(staged: Staged) -> None:
    """A server that could not read the id answers without one; the next message goes on."""
    ada, stage = staged(say=[{"code": "invalid_json", "message": "no JSON"}])
    stage.loses_ids = True
    say(ada, "one")
    expect(ada.locator(".mine").first).to_contain_text("Not sent.")
    say(ada, "two")
    expect(ada.locator(".mine").last).to_have_attribute("data-state", "")


WORDS = "expected str, got int"  # as a library writes them, for developers


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"code": "invalid_payload", "errors": [{"path": "$.payload.text"}]}, "1 to 2000 characters"),
    ({"code": "invalid_payload", "errors": [{"path": "$.payload.else"}]}, "did not take"),
    ({"code": "invalid_payload"}, "did not take"),
    ({"code": "invalid_envelope"}, "did not take"),
    ({"code": "internal_error"}, "Something went wrong"),
    ({"code": "handler_timeout"}, "took too long"),
    ({"code": "too_busy"}, "is busy"),
    ({"code": "unknown_type"}, "Reload it"),
    ({"code": "enter_first"}, "Choose a nickname"),
    ({"code": "http_503", "title": WORDS}, "did not take"),
    ({"code": "toString"}, "did not take this (toString)"),
]


def test_errors_are_put_into_words(staged: Staged) -> None:
    """Whatever the code, people read a sentence, and never a library's words."""
    ada, stage = staged(say=(refusals := []))
    for error, told in ERRORS:
        fields = [field | {"message": WORDS} for field in error.get("errors", [])]
        refusals.append({**error, "message": WORDS, "errors": fields})
        say(ada, "one")
        expect(ada.locator(".mine .state")).to_contain_text(told)
        expect(ada.get_by_text(WORDS)).to_have_count(0)
        ada.get_by_role("button", name="Send again").click()
        expect(ada.locator(".mine .state")).to_have_count(0)
    assert len(stage.of("say")) == 2 * len(ERRORS)


FINAL = (1000, 1003, 1007, 1008, 1009, 3400, 3401, 3403, 3499, 4400, 4401, 4403, 4499)
PASSING = (1001, 1006, 1011, 1012, 1013, 3000, 3408, 3429, 3500, 3503, 4000, 4408, 4429, 4500)


@pytest.mark.parametrize("is_final", [True, False])
def test_the_page_comes_back_unless_that_is_in_vain(staged: Staged, is_final: bool) -> None:
    """After some close codes the page waits for a person; after all others it tries again."""
    ada, stage = staged()
    status, countdown = ada.get_by_role("status"), ada.locator("#countdown")
    ada.evaluate(LONG_WAIT)  # to have time to look
    for code in FINAL if is_final else PASSING:
        stage.sockets[-1].close(code=code, reason=WORDS)
        expect(status).to_have_text("Closed" if is_final else "Connection lost")
        expect(countdown).to_have_text("" if is_final else re.compile("Next attempt in"))
        expect(ada.get_by_text(WORDS)).to_have_count(int(is_final and code >= 4000))
        ada.get_by_role("button", name="Try again" if is_final else "Reconnect now").click()
        expect(status).to_have_text("Connected")
    assert len(stage.sockets) == 1 + len(FINAL if is_final else PASSING)
    away = ada.get_by_text("Messages sent while you were away are not shown.")
    expect(away).to_have_count(len(FINAL) if is_final else 0)


def test_a_server_that_asks_for_patience_gets_it(staged: Staged) -> None:
    """After 1013 the first attempt comes later than after a loss."""
    ada, stage = staged()
    ada.evaluate("Math.random = () => 0")
    stop_clock(ada)
    stage.sockets[-1].close(code=1013)
    expect(ada.get_by_role("status")).to_have_text("Connection lost")
    ada.clock.run_for(4900)
    expect(ada.get_by_role("status")).to_have_text("Connection lost")
    assert len(stage.sockets) == 1
    ada.clock.run_for(500)
    expect(ada.get_by_role("status")).to_have_text("Connected")


# The page's looks


def test_a_text_that_is_too_long_is_kept(open_page: Open) -> None:
    """Nothing of a long text is cut off; the person is told how long it is."""
    ada = open_page("Ada")
    say(ada, "🎉" * 2001)
    expect(ada.get_by_role("alert")).to_contain_text("2001 characters")
    expect(box(ada)).to_have_value("🎉" * 2001)
    say(ada, "🎉" * 2000)
    expect(ada.locator(".mine")).to_have_attribute("data-state", "")
    say(ada, "half a pair: \ud83d")
    expect(ada.locator(".mine").last).to_have_attribute("data-state", "")
    expect(bubble(ada, "half a pair: \ufffd")).to_be_visible()


@pytest.mark.parametrize(
    ("nick", "told"),
    [("", "enter a nickname"), ("  ", "enter a nickname"), ("n" * 25, "1 to 24 characters")],
)
def test_a_nickname_that_cannot_be_is_explained(open_page: Open, nick: str, told: str) -> None:
    """The dialog stays open, and says what a nickname has to be."""
    ada = open_page()
    ada.get_by_label("Nickname").fill(nick)
    ada.get_by_role("button", name="Join the room").click()
    expect(ada.locator("#wrong")).to_contain_text(told)
    ada.get_by_label("Nickname").fill("🎉" * 24)
    ada.get_by_role("button", name="Join the room").click()
    expect(people(ada)).to_have_text(["🎉" * 24])


@pytest.mark.parametrize("locale", ["en-US", "de-DE", "ar-EG"])
def test_times_look_alike(open_page: Open, locale: str) -> None:
    """The server's clock and the messages' times have one format, whatever the browser's locale."""
    ada = open_page("Ada", locale=locale)
    say(ada, "one")
    expect(ada.locator(".mine")).to_have_attribute("data-state", "")
    expect(ada.locator(".clock")).to_be_visible()
    for time_shown in (ada.locator("#clock"), ada.locator(".mine time")):
        expect(time_shown).to_have_text(re.compile(r"^[0-9]{2}:[0-9]{2}:[0-9]{2}$"))


def test_the_list_of_people_outlives_the_connection(open_page: Open, own_server: Server) -> None:
    """While the server is away the list stays and is marked as old; then it is that of now."""
    ada, bob = open_page("Ada", own_server), open_page("Bob", own_server)
    expect(people(ada)).to_have_text(["Ada", "Bob"])
    own_server.kill()
    expect(ada.get_by_role("status")).to_have_text(re.compile("Connection lost|Connecting…"))
    expect(people(ada)).to_have_text(["Ada", "Bob"])
    expect(ada.get_by_text("before the connection was lost")).to_be_visible()
    expect(ada.get_by_role("list", name="Here now")).to_contain_text("you")
    bob.context.close()
    own_server.start()
    come_back(ada)
    expect(people(ada)).to_have_text(["Ada"])
    expect(ada.get_by_text("before the connection was lost")).to_be_hidden()


def test_a_restart_brings_all_windows_back(open_page: Open, own_server: Server) -> None:
    """SIGTERM closes with 1012; two windows of one person come back without a click."""
    ada = open_page("Ada", own_server, has_clock=True)
    other = ada.context.new_page()
    other.goto(ada.url)
    for page in (ada, other):
        expect(people(page)).to_have_text(["Ada", "Ada"])
    own_server.stop()
    own_server.start()
    ada.clock.run_for(10_000)  # in both windows
    for page in (ada, other):
        expect(page.get_by_role("status")).to_have_text("Connected", timeout=2 * PATIENCE * 1000)
    say(other, "from the other window")
    expect(bubble(ada, "from the other window")).to_have_count(1)
    expect(ada.locator(".mine")).to_have_count(0)


def take_screenshot(path: str) -> None:
    """Two people at work in a room, as the documentation shows it."""
    talk = [
        ("Ada", "Morning! The release notes are ready: https://example.com/notes"),
        ("Ada", "Could you try the reconnect screen before we ship?"),
        ("Grace", "Just did. I stopped the server in the middle of a sentence."),
        ("Ada", "And?"),
        (
            "Grace",
            "It counted down, came back by itself, and what I had typed meanwhile went out.\n"
            "Nothing to complain about.",
        ),
        ("Ada", "/sum 17 25"),
    ]
    server = Server()
    try:
        with chromium() as browser:
            pages: dict[str, Page] = {}
            for nick, name in (("Ada", "Ada Lovelace"), ("Grace", "Grace Hopper")):
                context = browser.new_context(viewport={"width": 1200, "height": 800})
                page = pages[nick] = context.new_page()
                page.goto(f"{server.url}#design")
                page.get_by_label("Nickname").fill(name)
                page.get_by_role("button", name="Join the room").click()
                expect(page.get_by_role("status")).to_have_text("Connected")
            for nick, text in talk:
                say(pages[nick], text)
                for page in pages.values() if not text.startswith("/") else ():
                    expect(bubble(page, text.splitlines()[0])).to_be_visible()
            box(pages["Grace"]).press_sequentially("Ship")
            expect(pages["Ada"].locator(".typing")).to_have_text("Grace Hopper is typing…")
            expect(pages["Ada"].locator("#clock")).to_be_visible()
            pages["Ada"].screenshot(path=path)
    finally:
        server.stop()


if __name__ == "__main__":
    take_screenshot(sys.argv[1])
