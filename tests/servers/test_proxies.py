"""The proxies and the commands of ``docs/deployment.md``, as they stand there."""

from __future__ import annotations

import asyncio
import configparser
import contextlib
import http.client
import inspect
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvicorn
from ports import free_port
from process import START, folder_of
from support import PATIENCE, Client, Stalled, connect, until
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus

import pachinko

PAGE = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text()
HOST = "chat.example.com"  # clients send this name, to 127.0.0.1
MIB = 1_048_576  # max_size
PINGS = "--ws-ping-interval 0.3"
APP = """
import asyncio
import os

import falcon.asgi

from pachinko import Close, Connection, Pachinko, hub

log = open(os.environ["PACHINKO_TEST_LOG"], "a", buffering=1)
app = falcon.asgi.App()
ws = Pachinko(app, "/ws/{name}", linger=1.0)
private = Pachinko(app, "/ws/{name}/private")
forwarded = Pachinko(app, "/ws/{name}/forwarded", trust_forwarded=True)


class Process:
    async def on_get(self, req, resp):
        resp.text = str(os.getpid())


app.add_route("/process", Process())


@private.authenticate
async def who(conn: Connection, token: str | None) -> str | None:
    return {"s3cret": "ada"}.get(token)


@private.connect
async def greet(conn: Connection) -> None:
    await conn.send("welcome", conn.user)


@ws.on("echo")
async def echo(conn: Connection, text: str) -> str:
    return text


@ws.on("where")
async def where(conn: Connection) -> list[object]:
    return [os.getpid(), conn.req.scheme, conn.req.netloc, conn.req.remote_addr]


@ws.on("quit")
async def quit(conn: Connection) -> None:
    raise Close(4000, "as you like")


@ws.disconnect
async def leave(conn: Connection) -> None:
    print(conn.params["name"], conn.close_code, file=log)

"""


# What the page shows


def section(heading: str) -> str:
    """What the page has under *heading*, up to the next one."""
    _, found, rest = PAGE.partition(f"\n{heading}\n")
    assert found, heading
    return re.split(r"^##+ ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def block(heading: str, language: str, containing: str = "") -> str:
    """The only code in *language* of a section that contains a text."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", section(heading), re.MULTILINE | re.DOTALL)
    (code,) = (code for code in found if containing in code)
    return str(code)


def replaced(text: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


RESTART = "## Rolling restart"
READY = block("## Shutdown without a loss", "python")
DRAIN = replaced(block("### uvicorn", "python"), ("hub.drain(10)", "hub.drain(1)"))
COMMAND = block("## Servers and workers", "sh").replace("\\\n", " ").split()
UNIT = configparser.ConfigParser(interpolation=None)
UNIT.optionxform = str  # systemd's names have capitals
UNIT.read_string(block(RESTART, "text", "[Service]"))


# Processes


def reach(port: int, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), PATIENCE, (source, 0))


class Process:
    """A process in a group and a folder of its own."""

    def __init__(self, folder: Path, command: str, **environment: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.file = (folder / "output").open("wb")
        self.popen = subprocess.Popen(
            shlex.split(command),
            cwd=folder,
            env={**os.environ, **environment},
            stdout=self.file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    def starts(self, words: str) -> bool:
        """Wait until it has written *words*; False when it has ended instead, or takes too long."""
        deadline, has_started = time.monotonic() + START, False
        try:
            while time.monotonic() < deadline and self.popen.poll() is None and not has_started:
                time.sleep(0.01)
                has_started = words in self.output
        finally:
            if not has_started:
                self.kill()
        return has_started

    def kill(self) -> None:
        """Leave nothing of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self.file.close()


class Upstream(Process):
    """The app, started with the command of the page's unit and more *options*."""

    def __init__(
        self, folder: Path, options: str = PINGS, port: int = 0, uds: Path | None = None
    ) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "chat.py").write_text(APP + READY + DRAIN)
        self.log = folder / "log"
        self.log.touch()
        for _ in range(3):  # another process may have taken the free port
            self.port = port or free_port()
            command = replaced(
                UNIT["Service"]["ExecStart"],
                ("/srv/chat/venv/bin/uvicorn", f"{shlex.quote(sys.executable)} -m uvicorn"),
                ("--port %i", f"--uds {uds}" if uds else f"--port {self.port}"),
            )
            super().__init__(
                folder,
                f"{command} {options}",
                PACHINKO_TEST_LOG=str(self.log),
                PYTHONPATH=os.pathsep.join([str(folder), folder_of("pachinko")]),
            )
            if self.starts("Uvicorn running on"):
                break
        else:
            raise AssertionError(self.output)

    def left(self, name: str) -> list[int]:
        """What `conn.close_code` was when the clients of that name had gone."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [int(code) for who, code in lines if who == name]


class Proxy(Process):
    """A proxy with what the page shows, for its own ports and paths."""

    program: str
    package: str
    words: str
    """What it writes when it has started."""

    def __init__(self, folder: Path, certificate: Path, *changes: tuple[str, str]) -> None:
        path = shutil.which(self.program) or f"/usr/sbin/{self.program}"
        if not os.access(path, os.X_OK):
            pytest.fail(f"this test needs {self.program}: apt-get install {self.package}")
        folder.mkdir()
        self.path = path
        for _ in range(3):
            self.port, self.tls_port = free_port(), free_port()
            self.configure(folder, certificate, *changes)
            super().__init__(
                folder, self.command(folder), HOME=str(folder), XDG_DATA_HOME=str(folder)
            )
            if self.starts(self.words):
                break
        else:
            raise AssertionError(self.output)

    def configure(self, folder: Path, certificate: Path, *changes: tuple[str, str]) -> None:
        raise NotImplementedError

    def command(self, folder: Path) -> str:
        raise NotImplementedError

    def requests(self) -> str:
        """Its access log."""
        raise NotImplementedError

    def get(self, path: str, source: str = "127.0.0.1") -> tuple[int, str]:
        """The status and the text of an HTTP answer."""
        request = http.client.HTTPConnection("127.0.0.1", self.port)
        with contextlib.closing(request):
            request.sock = reach(self.port, source)
            request.request("GET", path, headers={"Host": f"{HOST}:{self.port}"})
            answer = request.getresponse()
            return answer.status, answer.read().decode()


class Nginx(Proxy):
    program, package = "nginx", "nginx-light"
    words = "start worker process "

    def configure(self, folder: Path, certificate: Path, *changes: tuple[str, str]) -> None:
        (folder / "chat.conf").write_text(
            replaced(
                block("### nginx", "text"),
                (
                    "listen 443 ssl;",
                    f"listen 127.0.0.1:{self.tls_port} ssl; listen 127.0.0.1:{self.port};",
                ),
                ("/etc/ssl/chat.pem", str(certificate)),
                ("/etc/ssl/chat.key", str(certificate)),
                *changes,
            )
        )
        paths = "".join(
            f"{name}_temp_path {folder}/{name};"
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (folder / "nginx.conf").write_text(
            "daemon off; worker_processes 1; error_log stderr info; "
            f"pid {folder}/pid; user root; "  # if it is root's; nobody may not enter the folder
            + block("### File descriptors", "text")
            + f"http {{ access_log {folder}/requests; {paths} include {folder}/chat.conf; }}"
        )

    def command(self, folder: Path) -> str:
        # -e: what it writes before it has read where to
        return f"{self.path} -e stderr -p {folder} -c {folder}/nginx.conf"

    def requests(self) -> str:
        return (self.folder / "requests").read_text()


class Caddy(Proxy):
    program = package = "caddy"
    words = "serving initial configuration"

    def configure(self, folder: Path, certificate: Path, *changes: tuple[str, str]) -> None:
        text = replaced(block("### Caddy", "text"), *changes)
        options, found, site = text.partition("\n}\n\n")
        assert found and options.startswith("{\n")
        address = f"{HOST} {{"
        (folder / "Caddyfile").write_text(
            "{\n    admin off\n    default_bind 127.0.0.1\n    auto_https disable_redirects\n"
            + options.removeprefix("{\n")
            + found
            + replaced(site, (address, f"http://{HOST}:{self.port} {{"))
            + replaced(
                site,
                (
                    address,
                    f"https://{HOST}:{self.tls_port} {{\n    tls {certificate} {certificate}",
                ),
            )
        )

    def command(self, folder: Path) -> str:
        return f"{self.path} run --adapter caddyfile --config {folder}/Caddyfile"

    def requests(self) -> str:
        return "\n".join(line for line in self.output.splitlines() if "http.log" in line)


PROXIES = [Nginx, Caddy]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of `HOST`, signed by itself, with its key."""
    path = tmp_path_factory.mktemp("certificate") / "chat.pem"
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN={HOST} "
        f"-addext subjectAltName=DNS:{HOST} -keyout {path} -out {path}.public"
    )
    subprocess.run(command.split(), check=True, capture_output=True, timeout=PATIENCE)
    path.write_text(path.read_text() + Path(f"{path}.public").read_text())
    return path


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    """uvicorn, which sends pings and trusts the proxy."""
    with started(Upstream(tmp_path_factory.mktemp("upstream"))) as upstream:
        yield upstream


@pytest.fixture(scope="module")
def distrustful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    """uvicorn, which sends no pings and trusts nobody."""
    options = "--ws-ping-interval 0 --no-proxy-headers"
    with started(Upstream(tmp_path_factory.mktemp("distrustful"), options)) as upstream:
        yield upstream


@pytest.fixture(scope="module", params=PROXIES, ids=lambda proxy: proxy.program)
def proxy(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    upstream: Upstream,
    certificate: Path,
) -> Iterator[Proxy]:
    """A proxy before the `upstream`, one for all tests."""
    changes = [to(upstream)]
    if request.param is Nginx:
        changes.append(("rate=10r/s", "rate=1000r/s"))  # all these tests have one address
    folder = tmp_path_factory.mktemp("proxy") / "proxy"
    with started(request.param(folder, certificate, *changes)) as proxy:
        yield proxy


Some = TypeVar("Some", bound=Process)


@contextlib.contextmanager
def started(process: Some) -> Iterator[Some]:
    """End it, whatever happens."""
    try:
        yield process
    finally:
        process.kill()


def to(upstream: Upstream) -> tuple[str, str]:
    return "127.0.0.1:8001", f"127.0.0.1:{upstream.port}"


@pytest.fixture(scope="module")
def blind(
    tmp_path_factory: pytest.TempPathFactory, distrustful: Upstream, certificate: Path
) -> Iterator[Nginx]:
    """nginx before a server that sends no pings and does not listen to it."""
    folder = tmp_path_factory.mktemp("blind") / "proxy"
    with started(Nginx(folder, certificate, to(distrustful), SOON)) as proxy:
        yield proxy


SOON = ("proxy_read_timeout 60s", "proxy_read_timeout 2s")


# Clients


@contextlib.asynccontextmanager
async def through(
    proxy: Proxy, path: str, tls: Path | None = None, port: str | None = None, **options: Any
) -> AsyncIterator[Client]:
    """A client that knows the proxy by its name; *port* is what stands in its URL."""
    number = proxy.tls_port if tls else proxy.port
    if tls:
        options["ssl"] = ssl.create_default_context(cafile=tls)
    url = f"{'wss' if tls else 'ws'}://{HOST}{f':{number}' if port is None else port}{path}"
    options = {"host": "127.0.0.1", "port": number, "max_size": None, **options}
    async with connect(url, **options) as client:
        yield client


async def status(proxy: Proxy, path: str, **options: Any) -> int:
    """What a handshake is answered with."""
    try:
        async with through(proxy, path, **options):
            return 101
    except InvalidStatus as error:
        return error.response.status_code


# Tests


async def test_messages(proxy: Proxy, upstream: Upstream) -> None:
    """They go both ways, also large ones; the app sees the host, and the client's address."""
    async with through(proxy, "/ws/a", local_addr=("127.0.0.2", 0)) as client:
        answer = await client.ask("where")
        assert answer["payload"] == [upstream.popen.pid, "ws", f"{HOST}:{proxy.port}", "127.0.0.2"]
        frame = '{"type":"echo","id":1,"payload":"%s"}'
        text = "x" * (MIB - len(frame) + 2)
        await client.raw(frame % text)
        assert (await client.receive())["payload"] == text
        await client.raw(frame % (text + "x"))
        assert (await client.closed())[0] == 1009
    async with through(proxy, "/ws/a") as client:  # now it is uvicorn, which reads no further
        with contextlib.suppress(ConnectionClosed):
            await client.raw(frame % (3 * text))
        assert (await client.closed())[0] in (1006, 1009)


async def test_tokens(proxy: Proxy) -> None:
    """A token passes through in each of its ways, and is not in the proxy's log."""
    ways: list[dict[str, Any]] = [
        {"subprotocols": ["bearer", "s3cret"]},
        {"additional_headers": {"Authorization": "Bearer s3cret"}},
        {},
    ]
    for way in ways:
        async with through(proxy, "/ws/token/private", **way) as client:
            if not way:
                await client.send("authenticate", {"token": "s3cret"})
            assert (await client.receive())["payload"] == "ada"
            assert client.socket.subprotocol == ("bearer" if "subprotocols" in way else None)
    await until(lambda: proxy.requests().count("/ws/token/private") == len(ways))
    assert "s3cret" not in proxy.output + proxy.requests()


async def test_origins(proxy: Proxy) -> None:
    """The host's own page is let in with no setting, others are not."""
    own = f"http://{HOST}:{proxy.port}"
    assert await status(proxy, "/ws/a", origin=own) == 101
    for other in (f"http://{HOST}", f"http://www.{HOST}:{proxy.port}", "https://evil.example"):
        assert await status(proxy, "/ws/a", origin=other) == 403


async def test_the_port(tmp_path: Path, upstream: Upstream, certificate: Path) -> None:
    """With nginx's ``$host`` the host's own page is refused, since the port is missing."""
    change = ("Host $http_host;", "Host $host;")
    with started(Nginx(tmp_path / "proxy", certificate, change, to(upstream))) as proxy:
        assert await status(proxy, "/ws/a", origin=f"http://{HOST}:{proxy.port}") == 403


async def test_encrypted(proxy: Proxy, certificate: Path) -> None:
    """An https page may connect, an http page may not, since uvicorn trusts the proxy."""
    async with through(proxy, "/ws/a", certificate, origin=f"https://{HOST}:{proxy.tls_port}") as c:
        assert (await c.ask("where"))["payload"][1] == "wss"
    for scheme, expected in (("https", 101), ("http", 403)):
        options: dict[str, Any] = {"tls": certificate, "port": "", "origin": f"{scheme}://{HOST}"}
        assert await status(proxy, "/ws/a", **options) == expected


async def test_encrypted_without_trust(blind: Proxy, certificate: Path) -> None:
    """The app takes the connection for unencrypted, and the http page is let in."""
    options: dict[str, Any] = {"tls": certificate, "port": "", "local_addr": ("127.0.0.2", 0)}
    async with through(blind, "/ws/a", origin=f"http://{HOST}", **options) as client:
        assert (await client.ask("where"))["payload"][1:] == ["ws", HOST, "127.0.0.1"]


async def test_a_unix_socket(tmp_path: Path, certificate: Path) -> None:
    """nginx reaches uvicorn there, and is trusted with the page's option."""
    row = next(line for line in PAGE.splitlines() if "--uds" in line)
    options = re.findall(r"--forwarded-allow-ips '\*'", row)
    uds = tmp_path / "chat.sock"
    server, path = "server unix:/run/chat.sock;", "/run/chat.sock"
    assert f"`{server}`" in row and f"`--uds {path}`" in row
    change = ("server 127.0.0.1:8001;", server.replace(path, str(uds)))
    with (
        started(Upstream(tmp_path / "upstream", *options, uds=uds)),
        started(Nginx(tmp_path / "proxy", certificate, change)) as proxy,
    ):
        async with through(proxy, "/ws/a", certificate, local_addr=("127.0.0.2", 0)) as client:
            answer = await client.ask("where")
            assert answer["payload"][1:] == ["wss", f"{HOST}:{proxy.tls_port}", "127.0.0.2"]


@pytest.mark.parametrize("proxy_type", PROXIES, ids=lambda proxy: proxy.program)
async def test_the_forwarded_host(
    proxy_type: type[Proxy], tmp_path: Path, upstream: Upstream, certificate: Path
) -> None:
    """`trust_forwarded` goes by the host that the proxy names, and not by what a client says."""
    text = section("### Host, scheme and address")
    host = "    proxy_set_header Host $http_host;\n"
    changes = {
        Nginx: (host, block("### Host, scheme and address", "text")),
        Caddy: ("127.0.0.1:8001\n", "127.0.0.1:8001 {\nheader_up -Forwarded\n}\n"),
    }
    assert "`header_up -Forwarded`" in text
    folder = tmp_path / "proxy"
    change = changes[proxy_type]
    with started(proxy_type(folder, certificate, change, to(upstream))) as proxy:
        own = f"http://{HOST}:{proxy.port}"
        assert await status(proxy, "/ws/a/forwarded", origin=own) == 101
        if proxy_type is Nginx:
            assert await status(proxy, "/ws/a", origin=own) == 403
        lies = {"Forwarded": "host=evil.example", "X-Forwarded-Host": "evil.example"}
        options: dict[str, Any] = {"origin": "http://evil.example", "additional_headers": lies}
        assert await status(proxy, "/ws/a/forwarded", **options) == 403


async def test_close_codes(proxy: Proxy, upstream: Upstream) -> None:
    """The app's code and reason reach the client, and the client's reach the app."""
    async with through(proxy, "/ws/a") as client:
        await client.send("quit")
        assert await client.closed() == (4000, "as you like")
    name = f"closes-{proxy.program}"
    async with through(proxy, f"/ws/{name}") as client:
        await client.close(4001)
    await until(lambda: upstream.left(name) == [4001])


async def test_a_client_is_cut_off(proxy: Proxy, upstream: Upstream) -> None:
    """The app notices, and runs its disconnect handler."""
    name = f"cut-{proxy.program}"
    async with through(proxy, f"/ws/{name}") as client:
        await client.ask("echo", "x")
        client.cut()
        await until(lambda: upstream.left(name))
    assert upstream.left(name)[0] in (1005, 1006)


async def test_pings(tmp_path: Path, upstream: Upstream, blind: Proxy, certificate: Path) -> None:
    """An idle connection outlasts nginx's time-out with pings, and is cut without them."""
    with started(Nginx(tmp_path / "proxy", certificate, to(upstream), SOON)) as proxy:
        async with through(proxy, "/ws/a") as kept, through(blind, "/ws/a") as idle:
            assert (await idle.closed())[0] == 1006
            assert "upstream timed out" in blind.output
            assert (await kept.ask("echo", "still here"))["payload"] == "still here"


@pytest.mark.parametrize("proxy_type", PROXIES, ids=lambda proxy: proxy.program)
async def test_an_unfinished_handshake(
    proxy_type: type[Proxy], tmp_path: Path, upstream: Upstream, certificate: Path
) -> None:
    """The proxy gives up, uvicorn does not."""
    timeouts = {
        Nginx: ("client_header_timeout 10s", "client_header_timeout 1s"),
        Caddy: ("read_header 10s", "read_header 1s"),
    }
    changes = (to(upstream), timeouts[proxy_type])
    with (
        started(proxy_type(tmp_path / "proxy", certificate, *changes)) as proxy,
        reach(upstream.port) as direct,
        reach(proxy.port) as slow,
    ):
        for connection in (direct, slow):
            connection.sendall(f"GET /ready HTTP/1.1\r\nHost: {HOST}\r\n".encode())
        with contextlib.suppress(ConnectionError):
            while data := await asyncio.to_thread(slow.recv, 65536):
                assert b"200" not in data
        direct.sendall(b"\r\n")
        assert (await asyncio.to_thread(direct.recv, 65536)).startswith(b"HTTP/1.1 200")


async def test_limits(tmp_path: Path, upstream: Upstream, certificate: Path) -> None:
    """nginx bounds the connections and the handshakes of one address."""
    changes = (
        ("limit_conn ws_open 50", "limit_conn ws_open 2"),
        ("rate=10r/s", "rate=1r/m"),
        ("burst=20", "burst=3"),
    )
    one, two = {"local_addr": ("127.0.0.3", 0)}, {"local_addr": ("127.0.0.4", 0)}
    with started(Nginx(tmp_path / "proxy", certificate, to(upstream), *changes)) as proxy:
        async with through(proxy, "/ws/a", **one), through(proxy, "/ws/b", **one) as client:
            assert await status(proxy, "/ws/c", **one) == 429
            assert 'limiting connections by zone "ws_open"' in proxy.output
            assert await status(proxy, "/ws/c", **two) == 101
            await client.close()
            await until(lambda: "/ws/b" in proxy.requests())
            assert await status(proxy, "/ws/c", **one) == 101
        answers = [proxy.get("/ws/d", "127.0.0.5")[0] for _ in range(5)]
        assert answers == [405, 405, 405, 405, 429]
        assert "limiting requests" in proxy.output
        assert proxy.get("/process", "127.0.0.5")[0] == 200


async def test_the_server_dies(tmp_path: Path, certificate: Path) -> None:
    """Clients see 1006, newcomers 502; before that, one that answers no pings is let go."""
    options = f"{PINGS} --ws-ping-timeout 2"
    secret = {"subprotocols": ["bearer", "s3cret"]}
    filtered = "request>headers>Sec-Websocket-Protocol delete"
    with (
        started(Upstream(tmp_path / "upstream", options)) as upstream,
        started(Nginx(tmp_path / "nginx", certificate, to(upstream))) as nginx,
        started(Caddy(tmp_path / "caddy", certificate, to(upstream))) as caddy,
        started(
            Caddy(tmp_path / "loud", certificate, to(upstream), (filtered, "request>none delete"))
        ) as loud,
    ):
        async with Stalled(f"ws://127.0.0.1:{nginx.port}/ws/silent"):
            await until(lambda: upstream.left("silent"))
            assert upstream.left("silent") == [1005]
        async with through(nginx, "/ws/a") as one, through(caddy, "/ws/a") as other:
            upstream.kill()
            assert [(await client.closed())[0] for client in (one, other)] == [1006, 1006]
        for proxy in (nginx, caddy, loud):
            assert await status(proxy, "/ws/a", **secret) == 502
            await until(lambda proxy=proxy: "/ws/a" in proxy.requests())
            assert ("s3cret" in proxy.output + proxy.requests()) == (proxy is loud)


async def test_no_descriptors_are_left(tmp_path: Path) -> None:
    """With uvloop newcomers are closed, nothing is logged, and the others notice nothing."""
    with started(Upstream(tmp_path / "upstream")) as upstream:
        resource.prlimit(upstream.popen.pid, resource.RLIMIT_NOFILE, (64, 64))
        url = f"ws://127.0.0.1:{upstream.port}/ws/a"
        async with contextlib.AsyncExitStack() as stack:
            clients: list[Client] = []
            with contextlib.suppress(InvalidMessage, ConnectionError):
                while len(clients) < 64:
                    clients.append(await stack.enter_async_context(connect(url)))
            assert 64 - 25 < len(clients) < 64
            for client in clients:
                assert (await client.ask("echo", "x"))["payload"] == "x"
            await clients[0].close()
            await until(lambda: upstream.left("a"))
            async with connect(url) as client:
                assert (await client.ask("echo", "x"))["payload"] == "x"
        assert not re.search("Error|Traceback|Too many", upstream.output), upstream.output


SYSTEMCTL = """#!{python} -SE
import socket, sys
with socket.create_connection(("127.0.0.1", {port}), 60) as test:
    test.sendall(" ".join(sys.argv[1:]).encode() + b"\\n")
    sys.exit(test.recv(2) != b"ok")
"""


async def test_a_rolling_restart(tmp_path: Path, certificate: Path) -> None:
    """The page's commands lose no connection: old ones stay until they get 1012, new ones work."""
    if shutil.which("curl") is None:
        pytest.fail("this test needs curl: apt-get install curl")
    new_port = free_port()
    stopped: list[int] = []
    problems: list[Exception] = []
    folder = tmp_path / "bin"
    folder.mkdir()
    async with contextlib.AsyncExitStack() as stack:
        old = stack.enter_context(started(Upstream(tmp_path / "old")))
        proxy = stack.enter_context(started(Nginx(tmp_path / "proxy", certificate, to(old))))
        client = await stack.enter_async_context(through(proxy, "/ws/a"))
        starting: list[asyncio.Task[Upstream]] = []

        async def start() -> None:
            run = asyncio.to_thread(Upstream, tmp_path / "new", PINGS, new_port)
            starting.append(asyncio.create_task(run))
            stack.push_async_callback(kill)

        async def kill() -> None:
            (await starting[0]).kill()

        async def stop() -> None:
            """What is so when it is called, and then what systemd does."""
            new = await starting[0]
            await until(lambda: "gracefully shutting down" in proxy.output)  # nginx's old worker
            await served_by(proxy, new)
            async with through(proxy, "/ws/b") as newcomer:
                assert (await newcomer.ask("where"))["payload"][0] == new.popen.pid
                assert (await client.ask("where"))["payload"][0] == old.popen.pid
                old.popen.terminate()
                assert await client.closed() == (1012, "the server restarts")
                await asyncio.to_thread(old.popen.wait, PATIENCE)
                assert (await newcomer.ask("where"))["payload"][0] == new.popen.pid
            stopped.append(old.popen.pid)

        async def systemctl(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            wanted = {
                f"enable --now chat@{new_port}\n": start,
                f"disable --now chat@{old.port}\n": stop,
            }
            try:
                await wanted[(await reader.readline()).decode()]()
                writer.write(b"ok")
            except Exception as error:  # would be lost here
                problems.append(error)
            finally:
                writer.close()

        systemd = await asyncio.start_server(systemctl, "127.0.0.1", 0)
        await stack.enter_async_context(systemd)
        programs = {
            "systemctl": SYSTEMCTL.format(
                python=sys.executable, port=systemd.sockets[0].getsockname()[1]
            ),
            "nginx": f'#!/bin/sh\nexec {proxy.command(proxy.folder)} "$@"\n',
        }
        for name, text in programs.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        recipe = replaced(
            block(RESTART, "sh"),
            ("8001", "OLD"), ("8002", "NEW"), ("OLD", str(old.port)), ("NEW", str(new_port)),
            ("/etc/nginx/conf.d/chat.conf", str(proxy.folder / "chat.conf")),
        )  # fmt: skip
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", recipe, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "no_proxy": "*"},
        )  # fmt: skip
        try:
            output, _ = await asyncio.wait_for(process.communicate(), START)
        finally:
            if process.returncode is None:
                process.kill()
        if problems:
            raise problems[0]
        assert process.returncode == 0 and stopped == [old.popen.pid], output.decode()
        await until(lambda: "exited with code 0" in proxy.output)  # the old worker


async def served_by(proxy: Proxy, upstream: Upstream) -> None:
    """Wait until the proxy goes to *upstream*."""
    async with asyncio.timeout(PATIENCE):
        while await asyncio.to_thread(proxy.get, "/process") != (200, str(upstream.popen.pid)):
            await asyncio.sleep(0.02)


async def test_a_rolling_restart_with_caddy(tmp_path: Path, certificate: Path) -> None:
    """Caddy notices by itself that the old process is draining, and goes to the new one."""
    new_port = free_port()
    with started(Upstream(tmp_path / "old")) as old:
        two = replaced(
            block(RESTART, "text", "health_uri"),
            ("127.0.0.1:8002", f"127.0.0.1:{new_port}"),
        )
        change = ("    reverse_proxy 127.0.0.1:8001\n", two)
        with started(Caddy(tmp_path / "proxy", certificate, change, to(old))) as proxy:
            async with through(proxy, "/ws/a") as client:
                assert (await client.ask("where"))["payload"][0] == old.popen.pid
                with started(Upstream(tmp_path / "new", port=new_port)) as new:
                    old.popen.terminate()
                    assert await client.closed() == (1012, "the server restarts")
                    await served_by(proxy, new)
                    async with through(proxy, "/ws/b") as newcomer:
                        assert (await newcomer.ask("where"))["payload"][0] == new.popen.pid


def test_the_commands() -> None:
    """The unit's is the one of the page's beginning, and systemd waits for the worst case."""
    path, *options = UNIT["Service"]["ExecStart"].replace("%i", "8001").split()
    assert [Path(path).name, *options] == COMMAND
    assert f"--ws-max-size {2 * MIB} " in UNIT["Service"]["ExecStart"]
    drain = float(re.findall(r"hub\.drain\((\d+)\)", block("### uvicorn", "python"))[0])
    linger = inspect.signature(pachinko.Pachinko).parameters["linger"].default
    worst = drain + linger + pachinko._FAREWELL + float(COMMAND[-1])
    assert float(UNIT["Service"]["TimeoutStopSec"]) > worst


def test_the_options() -> None:
    """Those that the page names are uvicorn's, or else known here."""
    others = {"--websocket-ping-interval", "--ping-interval", "--ping-timeout", "--ulimit"}
    options = {option for param in uvicorn.main.params for option in param.opts}
    options |= {option for param in uvicorn.main.params for option in param.secondary_opts}
    assert set(re.findall(r"`(--[a-z-]+)", PAGE)) - others <= options
