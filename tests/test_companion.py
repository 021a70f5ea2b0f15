"""The README's app where only `pachinko.py` is, and where the wheel has been installed.

Each of the two places has a Python of its own, which finds the packages that the library needs, but
no other copy of the library. The server runs there; the tests are its clients.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

import pytest
import test_docs
from support import PATIENCE, connect
from test_docs import README, blocks, is_client
from test_packaging import TREE, build

pytestmark = pytest.mark.skipif(
    not (TREE / "hatch_build.py").exists(), reason="needs the files of the checkout"
)

where_the_file_is = pytest.mark.parametrize("place", ["alone"], indirect=True, scope="module")
where_the_wheel_is = pytest.mark.parametrize("place", ["wheel"], indirect=True, scope="module")

BROKERS = ["nats://127.0.0.1:4222", "tls://127.0.0.1", "redis://127.0.0.1", "rediss://127.0.0.1"]
# What the environment says of Python, of coverage and of a broker is not for the servers.
ENVIRONMENT = {
    key: value
    for key, value in os.environ.items()
    if not key.startswith(("PYTHON", "COVERAGE", "COV_", "PACHINKO"))
} | {"NO_PROXY": "127.0.0.1", "PYTHONUNBUFFERED": "1"}


@dataclasses.dataclass
class Place:
    """A folder to work in, and a Python that finds the library there or installed, once."""

    kind: Literal["alone", "wheel"]
    folder: Path
    bin: Path
    library: Path

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program of this place to its end."""
        return subprocess.run(
            [self.bin / command[0], *command[1:]],
            cwd=self.folder, env=ENVIRONMENT, capture_output=True, text=True, check=False,
            timeout=60,
        )  # fmt: skip

    def prints(self, code: str) -> list[str]:
        """The lines that the program *code* prints here; it must not fail."""
        done = self.run("python", "-c", code)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


def packages(folder: Path) -> Path:
    """A folder with links to all packages of the running Python but this library."""
    folder.mkdir()
    for site in (Path(path) for path in sys.path if path.endswith("-packages")):
        for package in site.iterdir():
            is_ours = "pachinko" in package.name
            # An editable install is a .pth file, which nobody reads in a folder of links.
            if not is_ours and not (folder / package.name).exists():
                (folder / package.name).symlink_to(package)
    return folder


@pytest.fixture(scope="module", params=["alone", "wheel"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp(request.param)
    environment, folder = root / "environment", root / "empty"
    folder.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (bin,) = {path.parent for path in environment.glob("[bS][ic][nr]*/python*")}
    (site,) = environment.glob("[lL]ib/**/site-packages")
    (site / "packages.pth").write_text(str(packages(root / "packages")))
    if request.param == "alone":
        library = folder
        shutil.copy(TREE / "pachinko.py", folder)
    else:
        library = site
        wheel = build("wheel", TREE, root / "wheel")
        pip = [sys.executable, "-m", "pip", "--python", str(next(bin.glob("python*")))]
        install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
        subprocess.run([*pip, *install], check=True)
    return Place(request.param, folder, bin, library)


class Uvicorn:
    """``uvicorn app:app`` in a place, where *code* is ``app.py``, on a port that is free."""

    def __init__(self, place: Place, code: str) -> None:
        (place.folder / "app.py").write_text(code)
        self.output: list[str] = []
        self.process = subprocess.Popen(
            [place.bin / "python", "-m", "uvicorn", "app:app", "--port", "0"],
            cwd=place.folder, env=ENVIRONMENT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.changed = threading.Condition()
        self.reader = threading.Thread(target=self._read, args=[self.process.stdout])
        self.reader.start()

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                with self.changed:
                    self.output.append(line)
                    self.changed.notify_all()
        with self.changed:
            self.output.append("the end")
            self.changed.notify_all()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first match in its output, as soon as there is one."""

        def found() -> re.Match[str] | None:
            return re.search(pattern, "".join(self.output), re.MULTILINE)

        with self.changed:
            self.changed.wait_for(lambda: found() or "the end" in self.output, PATIENCE)
            match = found()
            assert match is not None, "".join(self.output)
            return match

    def __enter__(self) -> Uvicorn:
        try:
            self.port = int(self.wait_for(r"running on http://127\.0\.0\.1:(\d+)")[1])
        except BaseException:
            self.__exit__()
            raise
        self.url = f"ws://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self.reader.join()


def parts() -> list[str]:
    """The Python of the README, without the program of its client."""
    return [code for code in blocks(README, "python") if not is_client(code)]


COUNTS = """
class Clients:
    async def on_get(self, req, resp):
        resp.media = hub.count


app.add_route("/clients", Clients())
"""


def clients(page: Uvicorn) -> int:
    """How many clients the server has."""
    url = f"http://127.0.0.1:{page.port}/clients"
    with urllib.request.urlopen(url, timeout=PATIENCE) as response:
        return int(response.read())


@pytest.fixture(scope="module")
def page(place: Place) -> Iterator[Uvicorn]:
    """A server of all that the README shows, as one file."""
    with Uvicorn(place, "\n".join(code.lstrip("\n") for code in [*parts(), COUNTS])) as server:
        yield server


def test_the_library_is_there_once(place: Place) -> None:
    """What is imported is what was copied or installed, and nobody has imported the companion."""
    file, companion, is_loaded = place.prints(
        "import importlib.util, sys, pachinko; print(pachinko.__file__)\n"
        "print(importlib.util.find_spec('pachinko_cluster'))\n"
        "print('pachinko_cluster' in sys.modules)"
    )
    assert Path(file).is_relative_to(place.library)
    assert (companion == "None") == (place.kind == "alone")
    assert is_loaded == "False"


async def test_the_first_app_and_its_client(place: Place) -> None:
    """The README's first block, saved as ``app.py``, answers the README's client in Python."""
    with Uvicorn(place, parts()[0]) as server:
        await test_docs.test_the_python_client_runs(server)


@pytest.mark.parametrize(
    "claim",
    [
        test_docs.test_the_python_client_runs,
        test_docs.test_the_conversation,
        test_docs.test_a_stream_is_stopped,
        test_docs.test_a_concurrent_handler,
        test_docs.test_errors_of_ones_own,
    ],
    ids=lambda claim: claim.__name__,
)
async def test_what_the_readme_shows(page: Uvicorn, claim: Any) -> None:
    """What is tested in this process also holds there."""
    await claim(page)
    async with asyncio.timeout(PATIENCE):  # Others in a room are told of each that leaves.
        while await asyncio.to_thread(clients, page):
            await asyncio.sleep(0.01)  # the pause between two questions


async def test_authentication_the_resource_and_the_hub(page: Uvicorn) -> None:
    """The rest of the README: users, resources, middleware, and an HTTP route that sends."""
    async with connect(f"{page.url}/inbox", subprotocols=["bearer", "s3cret"]) as ada:
        assert await ada.receive() == {"type": "welcome", "payload": {"user": "ada"}}
        async with connect(f"{page.url}/ws/lobby") as client:
            answer = await client.ask("todo.add", {"text": "x"})
            assert answer == {"type": "todo.add.reply", "id": 1, "payload": ["x"]}
            assert test_docs.post(page, "/notices", {"text": "soon"}) == 200
            assert await client.receive() == {"type": "notice", "payload": {"text": "soon"}}
        assert await ada.receive() == {"type": "notice", "payload": {"text": "soon"}}
        await ada.close(4000)
    page.wait_for("^ada left with 4000$")
    page.wait_for(r"^todo\.add: 0\.\d{6} s$")


@where_the_file_is
@pytest.mark.parametrize("url", BROKERS)
def test_a_broker_needs_the_companion(place: Place, url: str) -> None:
    """Its URL is a `PachinkoError` that names the file which is missing."""
    (text,) = place.prints(
        "import asyncio\nfrom pachinko import PachinkoError, hub\n"
        "async def main():\n"
        f"    async with hub.open({url!r}): pass\n"
        "try: asyncio.run(main())\n"
        "except PachinkoError as exc: print(exc)"
    )
    assert "pachinko_cluster.py" in text


def test_sync_hub_is_there_with_the_companion(place: Place) -> None:
    """Without the file it is a `PachinkoError`; other ways to look at the module need no file."""
    found = place.prints(
        "import inspect, sys, pachinko\nfrom pachinko import *\n"
        "print(hasattr(pachinko, '__wrapped__'), 'SyncHub' in dir(pachinko))\n"
        "inspect.getmembers(pachinko)\n"
        "print('pachinko_cluster' in sys.modules)\n"
        "try:\n    from pachinko import SyncHub\n"
        "except PachinkoError as exc: print(exc)\n"
        "else: print(SyncHub('nats://localhost:4222').send)\n"
    )
    assert found[:2] == ["False False", "False"]
    missing = "SyncHub needs pachinko_cluster.py of the same version: copy it"
    there = "<bound method SyncHub.send of <pachinko_cluster.SyncHub object at "
    assert found[2].startswith(missing if place.kind == "alone" else there)


@where_the_file_is
def test_an_app_with_a_broker_does_not_start_without_the_companion(place: Place) -> None:
    """The server says why, and ends."""
    code = parts()[0] + f"\nhub.configure({BROKERS[0]!r})\n"
    with pytest.raises(AssertionError, match=r"pachinko_cluster\.py"), Uvicorn(place, code):
        pass


BUS = '''\
from typing import Any

import falcon.asgi

from pachinko import Connection, Hub, Pachinko

started: list["Bus"] = []
app = falcon.asgi.App()


class Bus:
    """A backplane between the hubs of one process."""

    def __init__(self) -> None:
        self.subjects: set[str] = set()

    async def start(self, deliver: Any, lost: Any) -> None:
        self.deliver = deliver
        started.append(self)

    async def publish(self, subject: str, data: bytes) -> int:
        reached = [each for each in started if subject in each.subjects]
        for each in reached:
            await each.deliver(subject, data)
        return len(reached)

    async def subscribe(self, subject: str) -> None:
        self.subjects.add(subject)

    async def unsubscribe(self, subject: str) -> None:
        self.subjects.discard(subject)

    async def stop(self) -> None:
        if self in started:
            started.remove(self)


def endpoint(path: str) -> None:
    hub = Hub()
    hub.configure(Bus())
    ws = Pachinko(app, path, hub=hub)

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.join("everybody")

    @ws.on("say")
    async def say(conn: Connection, *, text: str) -> int:
        await hub.send("everybody", "said", {"text": text})
        return len(await hub.presence("everybody"))


endpoint("/one")
endpoint("/two")
'''


@where_the_wheel_is
async def test_a_cluster_of_two_hubs(place: Place) -> None:
    """A backplane of one's own carries a group message from one hub to another."""
    with Uvicorn(place, BUS) as server:
        async with (
            connect(f"{server.url}/one") as one,
            connect(f"{server.url}/two") as two,
        ):
            said = {"type": "said", "group": "everybody", "payload": {"text": "hi"}}
            assert await one.ask("say", {"text": "hi"}) == said
            assert await one.receive() == {"type": "say.reply", "id": 1, "payload": 2}
            assert await two.receive() == said


@where_the_file_is
def test_a_backplane_needs_the_companion(place: Place) -> None:
    """An object in place of a URL does not help: the companion knows what to send to others."""
    with pytest.raises(AssertionError, match=r"pachinko_cluster\.py"), Uvicorn(place, BUS):
        pass


@where_the_wheel_is
def test_the_command(place: Place) -> None:
    """The installed command tells its version, and what it would need."""
    done = place.run("pachinko", "--version")
    (version,) = place.prints("import pachinko; print(pachinko.__version__)")
    assert (done.returncode, done.stdout) == (0, f"pachinko {version}\n"), done.stderr
    done = place.run("pachinko", "send", "memory://", "room", "said", json.dumps({"n": 1}))
    assert done.returncode == 2 and "reaches no other process" in done.stderr
