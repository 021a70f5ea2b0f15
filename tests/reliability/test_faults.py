"""Faults, against real servers: cut and half-open connections, slow peers, bugs, signals, limits.

``PACHINKO_FAULT_EXAMPLES=2000`` is the nightly form of the test that cuts connections, with other
places each time.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import itertools
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import attrs
import falcon
import falcon.asgi
import pytest
import websockets.exceptions
from cutting import Cut, Proxy
from hypothesis import given, settings
from hypothesis import strategies as st
from support import PATIENCE, Client, Server, connect, new_app, serving, until

import pachinko
from pachinko import Close, Connection, Hub, Pachinko, PachinkoError

EXAMPLES = int(os.environ.get("PACHINKO_FAULT_EXAMPLES", "40"))
IS_NIGHTLY = "PACHINKO_FAULT_EXAMPLES" in os.environ
LOGGERS = ("asyncio", "falcon", "pachinko", "uvicorn.error")
ROUND = 500  # examples of one test, which pytest ends after two minutes
LARGE = "x" * 200_000  # more than one read of a socket, and less than the outbox may hold
ENDED = (OSError, EOFError, websockets.exceptions.WebSocketException)  # a client's view of a cut


def run(app: Any, **options: Any) -> contextlib.AbstractAsyncContextManager[Server]:
    """A server whose log pytest sees."""
    return serving(app, log_config=None, **options)


@attrs.define
class Lives:
    """Who came in, and who has been seen out with which code."""

    arrived: list[str] = attrs.Factory(list)
    left: dict[str, int | None] = attrs.Factory(dict)
    refs: weakref.WeakSet[Connection] = attrs.Factory(weakref.WeakSet)

    def check(self) -> None:
        """Everybody who came in has been seen out."""
        assert sorted(self.arrived) == sorted(self.left)


def watch(ws: Pachinko) -> Lives:
    """Follow the clients of *ws*; call it behind its last connect handler."""
    lives = Lives()

    @ws.connect
    async def arrive(conn: Connection) -> None:
        lives.arrived.append(conn.id)
        lives.refs.add(conn)

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        assert conn.id in lives.arrived and conn.id not in lives.left
        assert conn.close_code is not None
        lives.left[conn.id] = conn.close_code

    return lives


def endpoint(**options: Any) -> Pachinko:
    """An endpoint at ``/ws`` whose clients join the group "all", and may ask for an echo."""
    ws = Pachinko(new_app(), "/ws", **{"hub": Hub(), "linger": 0.5, **options})

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.join("all")

    @ws.on("echo")
    async def echo(conn: Connection, payload: Any) -> Any:
        return payload

    return ws


def held(hub: Hub) -> list[Any]:
    """What the hub has in its tables."""
    return [
        hub.state.serving,
        hub.state.registry.connections,
        hub.state.registry.groups,
        hub.state.registry.users,
        hub.state.calls,
    ]


async def empty(hub: Hub) -> None:
    """Wait until nothing is left of the hub's clients."""
    await until(lambda: not any(held(hub)))


def bugs(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as an error, by anybody who may have seen one."""
    return [
        f"{record.name}: {record.getMessage()}"
        for record in caplog.records
        if record.levelno >= logging.ERROR and record.name in LOGGERS
    ]


async def works(url: str) -> None:
    """A new client is served at *url*."""
    async with connect(url) as client:
        assert (await client.ask("echo", "hello"))["payload"] == "hello"


# Cut connections


class Conversation:
    """An endpoint of all kinds of traffic, and a client that goes through them."""

    def __init__(self) -> None:
        self.hub = hub = Hub()
        ws = self.ws = Pachinko(new_app(), "/ws", hub=hub, linger=0.5)
        self.steps: list[dict[str, int]] = []  # how far the proxy was, after each

        @ws.authenticate
        async def who(conn: Connection, token: str | None) -> str | None:
            return token

        @ws.connect
        async def arrive(conn: Connection) -> None:
            await conn.join("all")
            await conn.send("welcome", {"history": "x" * 1000})
            await asyncio.sleep(0.001)

        self.lives = watch(ws)

        @ws.on("echo")
        async def echo(conn: Connection, payload: Any) -> Any:
            return payload

        @ws.on("wait", concurrent=True)
        async def wait(conn: Connection, payload: Any) -> Any:
            await asyncio.sleep(0.002)
            return payload

        @ws.on("count")
        async def count(conn: Connection, *, to: int) -> AsyncIterator[int]:
            for n in range(to):
                await asyncio.sleep(0)
                yield n

        @ws.on("say")
        async def say(conn: Connection, payload: Any) -> None:
            for _ in range(3):
                await hub.send("all", "said", payload)

        @ws.on("bye")
        async def bye(conn: Connection) -> None:
            raise Close(4000, "bye")

    async def begin(self) -> tuple[Server, Proxy]:
        """Start the server, and the proxy in front of it."""
        server = Server(self.ws._app, log_config=None)
        server.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else it idles
        await server.start()
        return server, await Proxy(server.port).__aenter__()

    async def hold(self, proxy: Proxy, server_closes: bool) -> None:
        """The whole conversation, or as much of it as gets through."""
        self.steps = []

        def step() -> None:
            self.steps.append(dict(proxy.passed))

        async with connect(proxy.url + "/ws") as client:
            step()
            token = {"token": "ada"}
            assert (await client.ask("authenticate", token))["type"] == "authenticate.reply"
            assert (await client.receive())["type"] == "welcome"
            step()
            assert (await client.ask("echo", "a", id=2))["payload"] == "a"
            step()
            await client.send("wait", "b", id=3)
            await client.send("count", {"to": 5}, id=4)
            last, answers = [3, 4], []
            while last:
                answers.append(await client.receive())
                if "more" not in answers[-1]:
                    last.remove(answers[-1]["id"])
            assert len(answers) == 7
            step()
            await client.send("say", {"text": "hi"})
            for _ in range(3):
                assert (await client.receive())["group"] == "all"
            step()
            assert (await client.ask("echo", LARGE, id=5))["payload"] == LARGE
            step()
            if server_closes:
                await client.send("bye")
                assert await client.closed() in [(4000, "bye"), (1006, "")]
                if client.socket.close_code == 1006:
                    raise ConnectionAbortedError
        step()

    async def hold_cut(self, proxy: Proxy, cut: Cut, server_closes: bool) -> None:
        """The conversation up to *cut*, and then one that is not cut."""
        proxy.cut = cut
        with contextlib.suppress(*ENDED):
            await self.hold(proxy, server_closes)
        proxy.cut = None
        await self.hold(proxy, server_closes)
        await asyncio.wait_for(proxy.idle(), PATIENCE)
        await empty(self.hub)
        self.lives.check()


@pytest.mark.parametrize("round", range(-(-EXAMPLES // ROUND)))
def test_a_connection_may_be_cut_at_any_byte(round: int, caplog: pytest.LogCaptureFixture) -> None:
    """The next client is served, who was in is seen out once, and nothing stays or is a bug."""
    talk = Conversation()
    with asyncio.Runner() as runner:
        server, proxy = runner.run(talk.begin())
        runner.run(talk.hold(proxy, server_closes=True))
        steps = [{"client": 0, "server": 0}, *talk.steps]
        idle = len(asyncio.all_tasks(runner.get_loop()))

        @settings(
            max_examples=min(EXAMPLES, ROUND),
            deadline=None,
            derandomize=not IS_NIGHTLY,
            database=None,
        )
        @given(
            toward=st.sampled_from(["client", "server"]),
            by=st.sampled_from(["FIN", "RST"]),
            step=st.integers(0, len(steps) - 2),
            share=st.integers(0, 100) | st.integers(0, 100_000).map(lambda n: n / 1000),
            server_closes=st.booleans(),
        )
        def check(toward: Any, by: Any, step: int, share: float, server_closes: bool) -> None:
            begin, end = steps[step][toward], steps[step + 1][toward]
            cut = Cut(toward, begin + int((end - begin) * share / 100), by)
            runner.run(talk.hold_cut(proxy, cut, server_closes))

        try:
            check()
            runner.run(until(lambda: len(asyncio.all_tasks(runner.get_loop())) <= idle + 1))
        finally:
            runner.run(proxy.__aexit__())
            runner.run(server.stop())
    gc.collect()
    assert not talk.lives.refs
    assert not bugs(caplog)


# Half-open peers

CLIENT = """
import asyncio, sys
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

async def main():
    options = {"ping_interval": None, "compression": None, "proxy": None, "max_queue": 1}
    async with connect(sys.argv[1], **options) as socket:
        print("in", flush=True)
        try:
            while True:
                await socket.recv()
        except ConnectionClosed:
            print("out", socket.close_code, flush=True)

asyncio.run(main())
"""


class Script:
    """A Python process that runs *source*; what it prints is read as lines."""

    def __init__(self, folder: Path, source: str, *args: object) -> None:
        self.output, self.errors = folder / "output", folder / "errors"
        command = [sys.executable, "-W", "error", "-c", source, *map(str, args)]
        with self.output.open("wb") as output, self.errors.open("wb") as errors:
            self.popen = subprocess.Popen(command, stdout=output, stderr=errors)

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.popen.wait()

    @property
    def lines(self) -> list[str]:
        return self.output.read_text().splitlines()

    async def prints(self, count: int) -> list[str]:
        """Wait for *count* lines."""
        await until(lambda: len(self.lines) >= count or self.popen.poll() is not None)
        assert len(self.lines) >= count, self.errors.read_text()
        return self.lines

    async def ends(self) -> int:
        """Wait for its end, with nothing to complain about; return how it has ended."""
        await until(lambda: self.popen.poll() is not None)
        assert self.errors.read_text() == ""
        return int(self.popen.returncode)


async def send_until(
    hub: Hub, client: Client, condition: Callable[[], object], size: int, pause: float = 0.0
) -> int:
    """Send to the group, and have *client* get each message, until *condition* holds."""
    for n in itertools.count():
        if condition():
            return n
        await asyncio.sleep(pause)  # the pace of this group
        await hub.send("all", "n", [n, "x" * size])
        assert (await client.receive())["payload"][0] == n
    raise AssertionError


async def test_a_stopped_client_is_noticed_by_the_servers_pings(tmp_path: Path) -> None:
    """Its disconnect handler runs, its group goes on meanwhile, and it sees the end later."""
    ws = endpoint()
    lives, hub = watch(ws), ws._hub
    async with (
        run(ws._app, ws_ping_interval=0.2, ws_ping_timeout=2.0) as server,
        connect(server.url + "/ws") as client,
    ):
        with Script(tmp_path, CLIENT, server.url + "/ws") as script:
            await script.prints(1)
            await until(lambda: len(hub.members("all")) == 2)
            script.popen.send_signal(signal.SIGSTOP)
            # At full speed its outbox would be full before a ping is late.
            assert await send_until(hub, client, lambda: lives.left, 10, pause=0.005) > 1
            assert len(hub.members("all")) == 1
            script.popen.send_signal(signal.SIGCONT)
            assert await script.ends() == 0
            assert script.lines[1] in ("out 1011", "out 1006")
        await works(server.url + "/ws")
    await empty(hub)
    lives.check()


async def test_a_stopped_client_is_evicted_by_the_traffic_of_its_group(tmp_path: Path) -> None:
    """Without pings too: with 1013, from a bounded outbox, while the others get each message."""
    ws = endpoint(outbox_bytes=100_000)
    lives, hub = watch(ws), ws._hub
    async with run(ws._app) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with Script(tmp_path, CLIENT, server.url + "/ws") as script:
            await script.prints(1)
            await until(lambda: hub.connections)
            (conn,) = hub.connections
            script.popen.send_signal(signal.SIGSTOP)
            async with connect(server.url + "/ws") as client:
                await send_until(hub, client, lambda: conn.closed, 10_000)
                await until(lambda: lives.left)
                assert list(lives.left.values()) == [1013]
                assert 0 < hub.stats()["outbox_high_water"] <= 11
                assert hub.members("all").isdisjoint({conn})
                script.popen.send_signal(signal.SIGCONT)
                assert await script.ends() == 0
                assert script.lines[1] in ("out 1013", "out 1006")
    await empty(hub)
    lives.check()
    assert (
        conn.outgoing.outbox is None or not conn.outgoing.outbox.queue
    )  # what waited for it is dropped


# Slow peers


class Trickle:
    """A raw client that writes, or reads, a byte at a time."""

    def __init__(self, url: str, path: str = "/ws") -> None:
        self.address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        self.request = (
            f"GET {path} HTTP/1.1\r\nHost: {url[5:]}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\n\r\n"
        ).encode()
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.setblocking(False)
        self.count = 0
        self.task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Trickle:
        await asyncio.get_running_loop().sock_connect(self.socket, self.address)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])
        self.socket.close()

    async def shake_hands(self) -> None:
        """The whole handshake at once."""
        await asyncio.get_running_loop().sock_sendall(self.socket, self.request)
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += await asyncio.get_running_loop().sock_recv(self.socket, 1)
        assert answer.startswith(b"HTTP/1.1 101"), answer

    def reset(self) -> None:
        """Lose the connection by a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def start(self, data: bytes = b"") -> None:
        """From now on write *data*, or else read, byte by byte."""
        self.task = asyncio.create_task(self._write(data) if data else self._read())

    async def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            for self.count in range(1, len(data) + 1):
                await asyncio.get_running_loop().sock_sendall(
                    self.socket, data[self.count - 1 : self.count]
                )
                await asyncio.sleep(0.002)

    async def _read(self) -> None:
        with contextlib.suppress(OSError):
            while await asyncio.get_running_loop().sock_recv(self.socket, 1):
                self.count += 1
                await asyncio.sleep(0.002)


def text_frame(text: str) -> bytes:
    """A masked text frame, as a client sends it."""
    data = text.encode()
    assert len(data) < 126
    return bytes([0x81, 0x80 | len(data), 0, 0, 0, 0]) + data


async def test_clients_that_read_byte_by_byte_delay_nobody() -> None:
    """A reader gets a long series of group messages beside twenty of them, who are evicted."""
    ws = endpoint(outbox=20)
    lives, hub = watch(ws), ws._hub
    async with run(ws._app) as server, contextlib.AsyncExitStack() as stack:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        slow = [await stack.enter_async_context(Trickle(server.url)) for _ in range(20)]
        for each in slow:
            await each.shake_hands()
            each.start()
        client = await stack.enter_async_context(connect(server.url + "/ws"))
        await until(lambda: len(hub.connections) == 21)
        await send_until(hub, client, lambda: len(lives.left) == 20, 10_000)
        assert set(lives.left.values()) == {1013}
        assert hub.stats()["outbox_high_water"] <= 21
        assert all(0 < each.count < 50_000 for each in slow)
        assert len(hub.connections) == 1
    await empty(hub)
    lives.check()


@pytest.mark.parametrize("what", ["handshake", "frame", "length"])
async def test_clients_that_never_finish_writing_hold_up_nobody(what: str) -> None:
    """Others are served meanwhile, and so is the shutdown."""
    ws = endpoint()
    lives, hub = watch(ws), ws._hub
    async with contextlib.AsyncExitStack() as stack:
        async with run(ws._app, timeout_graceful_shutdown=5) as server:
            slow = [await stack.enter_async_context(Trickle(server.url)) for _ in range(10)]
            for each in slow:
                data = each.request[:-1]
                if what != "handshake":
                    await each.shake_hands()
                    whole = text_frame('{"type":"echo","id":1,"payload":"' + "x" * 80 + '"}')
                    data = whole[:-1] if what == "frame" else b"\x81\xff\0\0\0\0\0"
                each.start(data)
            await until(lambda: sum(each.count for each in slow) > 30)
            for _ in range(10):
                await works(server.url + "/ws")
            await until(lambda: all(each.task is not None and each.task.done() for each in slow))
            assert len(hub.state.serving) == (0 if what == "handshake" else 10)
            await works(server.url + "/ws")
        assert not any(held(hub))
    lives.check()


async def test_a_handshake_that_comes_byte_by_byte_is_answered() -> None:
    """To be slow is no fault, neither is a frame that comes in pieces."""
    ws = endpoint()
    lives = watch(ws)
    async with run(ws._app) as server, Trickle(server.url) as slow:
        slow.start(slow.request + text_frame('{"type":"echo","id":1,"payload":"slow"}'))
        data, loop = b"", asyncio.get_running_loop()
        while b'"payload":"slow"' not in data:
            data += await asyncio.wait_for(loop.sock_recv(slow.socket, 1000), PATIENCE)
        assert data.startswith(b"HTTP/1.1 101")
    await empty(ws._hub)
    lives.check()


async def test_a_token_that_comes_byte_by_byte_has_its_time() -> None:
    """Over `auth_timeout` the client is closed with 3401, and neither handler has seen it."""
    ws = endpoint(auth_timeout=0.2)

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        return token

    lives = watch(ws)
    async with run(ws._app) as server, Trickle(server.url) as slow:
        await slow.shake_hands()
        frame = text_frame('{"type":"authenticate","payload":{"token":"' + "x" * 50 + '"}}')
        slow.start(frame[:-1])
        data, loop = b"", asyncio.get_running_loop()
        while chunk := await asyncio.wait_for(loop.sock_recv(slow.socket, 1000), PATIENCE):
            data += chunk
            if (3401).to_bytes(2, "big") in data:
                break
        assert b"not authenticated within 0.2 s" in data
    await empty(ws._hub)
    assert not lives.arrived and not lives.left


# Closing at the wrong time


def abort(client: Trickle) -> None:
    client.reset()


def leave(client: Trickle) -> None:
    client.socket.close()


@pytest.mark.parametrize("how", [abort, leave])
@pytest.mark.parametrize("then", ["ends", "fails"])
async def test_a_client_may_go_while_a_connect_handler_waits(
    then: str, how: Callable[[Trickle], None]
) -> None:
    """It is seen out if its connect handlers return, and only then."""
    ws, entered, may_go_on = endpoint(), asyncio.Event(), asyncio.Event()

    @ws.connect
    async def load(conn: Connection) -> None:
        entered.set()
        await may_go_on.wait()
        await conn.send("welcome", {})
        if then == "fails":
            raise falcon.HTTPForbidden

    lives = watch(ws)
    async with run(ws._app) as server, Trickle(server.url) as client:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client.socket, client.request)
        await asyncio.wait_for(entered.wait(), PATIENCE)
        how(client)
        await until(lambda: not server.uvicorn.server_state.connections)
        may_go_on.set()
        await empty(ws._hub)
        assert len(lives.arrived) == (then == "ends")
        lives.check()


@pytest.mark.parametrize("end", ["close", "cut"])
@pytest.mark.parametrize("then", ["ends", "sends", "fails", "closes"])
async def test_a_client_may_go_between_its_token_and_the_end_of_connect(
    then: str, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The handshake has been answered by then, and the same holds."""
    ws, entered, may_go_on = endpoint(), asyncio.Event(), asyncio.Event()

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        return token

    @ws.connect
    async def load(conn: Connection) -> None:
        entered.set()
        await may_go_on.wait()
        if then == "sends":
            await conn.send("welcome", {})  # which says that the client is gone
        elif then != "ends":
            raise falcon.HTTPForbidden if then == "fails" else Close(4000)

    lives = watch(ws)
    async with run(ws._app) as server, connect(server.url + "/ws") as client:
        await client.send("authenticate", {"token": "ada"})
        await asyncio.wait_for(entered.wait(), PATIENCE)
        if end == "close":
            await client.close(4321)
        else:
            client.cut()
        await until(lambda: all(each.outgoing.closed for each in ws._hub.state.serving.values()))
        may_go_on.set()
        await empty(ws._hub)
        assert len(lives.arrived) == (then == "ends")
        lives.check()
        if lives.left:
            assert list(lives.left.values()) == [4321 if end == "close" else 1005]
    if then != "fails":  # which Falcon logs as it logs all HTTP errors
        assert not bugs(caplog)


async def test_a_client_may_go_while_the_handshake_is_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is seen out."""
    ws, entered, may_go_on = endpoint(), asyncio.Event(), asyncio.Event()
    lives = watch(ws)

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        async def slow(event: Any) -> None:
            if event["type"] == "websocket.accept":
                entered.set()
                await may_go_on.wait()
            await send(event)

        await ws._app(scope, receive, slow)  # type: ignore[misc]

    async with run(middleware) as server, Trickle(server.url) as client:
        await asyncio.get_running_loop().sock_sendall(client.socket, client.request)
        await asyncio.wait_for(entered.wait(), PATIENCE)
        client.reset()
        await until(lambda: not server.uvicorn.server_state.connections)
        may_go_on.set()
        await empty(ws._hub)
        assert len(lives.arrived) == 1
        lives.check()
    assert not bugs(caplog)


def with_history(**options: Any) -> Pachinko:
    """An endpoint whose clients get eight megabytes before anything else."""
    ws = endpoint(**options)

    @ws.connect
    async def load(conn: Connection) -> None:
        for n in range(80):
            await conn.send("history", [n, "x" * 100_000])

    return ws


@pytest.mark.parametrize("end", ["close", "cut"])
async def test_a_client_may_go_in_the_middle_of_its_history(
    end: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The rest is dropped, and it is seen out."""
    ws = with_history()
    lives = watch(ws)
    async with run(ws._app) as server, connect(server.url + "/ws", close_timeout=0.1) as client:
        for n in range(5):
            assert (await client.receive())["payload"][0] == n
        if end == "close":
            await client.close(4321)
        else:
            client.cut()
        await empty(ws._hub)
        lives.check()
        await works_after_history(server.url)
    gc.collect()
    assert not lives.refs and not bugs(caplog)


async def works_after_history(url: str) -> None:
    async with connect(url + "/ws") as client:
        for n in range(80):
            assert (await client.receive())["payload"][0] == n
        assert (await client.ask("echo", "hello"))["payload"] == "hello"


async def test_a_client_that_never_reads_its_history_is_evicted_by_its_group() -> None:
    """With 1013; what waited for it is dropped."""
    ws = with_history(outbox=5)
    lives = watch(ws)
    async with run(ws._app) as server, Trickle(server.url) as client:
        await client.shake_hands()
        await until(lambda: ws._hub.connections)
        for n in range(6):
            await ws._hub.send("all", "n", n)
        await empty(ws._hub)
        assert list(lives.left.values()) == [1013]
    gc.collect()
    assert not lives.refs


async def test_a_client_that_never_reads_its_history_does_not_hold_up_the_shutdown() -> None:
    """It is seen out like everybody."""
    ws = with_history()
    lives = watch(ws)
    async with run(ws._app, timeout_graceful_shutdown=1) as server, Trickle(server.url) as client:
        await client.shake_hands()
        await until(lambda: ws._hub.connections)
        await server.stop()
        assert len(lives.arrived) == 1
        lives.check()
        assert not any(held(ws._hub))
        server.task = asyncio.create_task(asyncio.sleep(0))  # stopped already


async def test_to_close_twice_is_once() -> None:
    """The first code and reason count, and the disconnect handlers run once."""
    ws = endpoint()
    lives = watch(ws)

    @ws.on("close")
    async def close(conn: Connection) -> None:
        await conn.close(4000, "first")
        await conn.close(4001, "second")
        raise Close(4002, "third")

    async with run(ws._app) as server, connect(server.url + "/ws") as client:
        await client.send("close")
        assert await client.closed() == (4000, "first")
        await empty(ws._hub)
        assert list(lives.left.values()) == [4000]


async def test_both_ends_may_close_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever comes first, each of many clients is seen out once."""
    ws = endpoint()
    lives, hub = watch(ws), ws._hub
    async with run(ws._app) as server, contextlib.AsyncExitStack() as stack:
        url = server.url + "/ws"
        clients = [await stack.enter_async_context(connect(url)) for _ in range(30)]
        await until(lambda: len(hub.connections) == 30)
        conns = list(hub.connections)
        closing: list[Awaitable[None]] = [client.close(4321) for client in clients[::2]]
        closing += [conn.close(4000) for conn in conns[::2]]
        await asyncio.gather(hub.close_group("all", 4001), *closing, hub.close_group("all", 4002))
        await empty(hub)
        lives.check()
        assert len(lives.left) == 30 and set(lives.left.values()) <= {4321, 4000, 4001}
    assert not bugs(caplog)


async def test_a_group_may_be_closed_while_its_members_are_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each is seen out once, by a cut or by the close."""
    ws = endpoint()
    lives, hub = watch(ws), ws._hub
    async with run(ws._app) as server, contextlib.AsyncExitStack() as stack:
        url = server.url + "/ws"
        clients = [await stack.enter_async_context(connect(url)) for _ in range(20)]
        await until(lambda: len(hub.connections) == 20)
        for n, client in enumerate(clients):
            client.cut()
            await hub.send("all", "n", n)
            if n == 10:
                await hub.close_group("all", 4000)
            if n % 3 == 0:
                await asyncio.sleep(0)
        await empty(hub)
        lives.check()
        assert set(lives.left.values()) <= {4000, 1005, 1006}
    assert not bugs(caplog)


async def test_a_close_ends_the_streams(caplog: pytest.LogCaptureFixture) -> None:
    """Their generators are closed, and no item comes behind the close frame."""
    ws, closed = endpoint(), list[str]()
    lives = watch(ws)

    @ws.on("count")
    async def count(conn: Connection) -> AsyncIterator[int]:
        try:
            for n in itertools.count():
                yield n
        finally:
            closed.append("stream")

    @ws.on("close")
    async def close(conn: Connection) -> None:
        await conn.close(4000)

    async with run(ws._app) as server, connect(server.url + "/ws") as client:
        for id in range(5):
            await client.send("count", id=id)
        while (await client.receive())["payload"] < 10:
            pass
        await client.send("close")
        assert await client.closed() == (4000, "")
        await empty(ws._hub)
        assert closed == ["stream"] * 5
        lives.check()
    assert not bugs(caplog)


# Draining at the wrong time


@pytest.mark.parametrize("at_once", [True, False])
async def test_to_drain_twice_closes_once(at_once: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Both calls return when everybody has been seen out."""
    ws = endpoint()
    lives, hub = watch(ws), ws._hub
    async with run(ws._app) as server, contextlib.AsyncExitStack() as stack:
        for _ in range(10):
            await stack.enter_async_context(connect(server.url + "/ws"))
        await until(lambda: len(hub.connections) == 10)
        first = asyncio.create_task(hub.drain(0.1))
        if not at_once:
            await until(lambda: lives.left)
        await asyncio.wait_for(hub.drain(0), PATIENCE)
        assert list(lives.left.values()) == [1012] * 10 and not any(held(hub))
        await asyncio.wait_for(first, PATIENCE)
    lives.check()
    assert not bugs(caplog)


async def test_to_drain_during_the_shutdown_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """A handler in progress ends, everybody is seen out once, and the hub is as new."""
    ws, entered, may_go_on = endpoint(linger=PATIENCE), asyncio.Event(), asyncio.Event()
    lives, hub = watch(ws), ws._hub

    @ws.on("wait")
    async def wait(conn: Connection) -> None:
        entered.set()
        await may_go_on.wait()

    async with (
        run(ws._app) as server,
        connect(server.url + "/ws") as client,
        connect(server.url + "/ws"),
    ):
        await client.send("wait")
        await asyncio.wait_for(entered.wait(), PATIENCE)
        stopping = asyncio.create_task(server.stop())
        await until(lambda: lives.left)  # the one without a handler
        drain = asyncio.create_task(hub.drain(0))
        await until(lambda: hub.draining)
        may_go_on.set()
        await asyncio.wait_for(drain, PATIENCE)
        await stopping
    assert not hub.draining and not any(held(hub))
    assert len(lives.left) == 2
    lives.check()
    assert not bugs(caplog)


async def test_a_shutdown_during_a_drain_is_not_held_up(caplog: pytest.LogCaptureFixture) -> None:
    """Those who have not had their turn are closed by the shutdown."""
    ws = endpoint()
    lives, hub = watch(ws), ws._hub
    async with run(ws._app) as server, contextlib.AsyncExitStack() as stack:
        for _ in range(5):
            await stack.enter_async_context(connect(server.url + "/ws"))
        await until(lambda: len(hub.connections) == 5)
        drain = asyncio.create_task(hub.drain(1000))
        await until(lambda: lives.left)
    assert not any(held(hub)) and len(lives.left) == 5
    lives.check()
    drain.cancel()
    await asyncio.wait([drain])
    assert not bugs(caplog)


async def test_draining_closes_who_has_run_out_of_time_to_authenticate() -> None:
    """Although its `authenticate` function has not ended yet, which cleans up behind itself."""
    ws, entered, may_go_on = endpoint(auth_timeout=0.05), asyncio.Event(), asyncio.Event()

    @ws.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        try:
            return await asyncio.Future()
        finally:
            entered.set()
            await may_go_on.wait()

    async def refused(url: str) -> int | None:
        async with connect(url) as client:
            return (await client.closed())[0]

    async with run(ws._app) as server:
        client = asyncio.create_task(refused(server.url + "/ws"))
        await asyncio.wait_for(entered.wait(), PATIENCE)
        drain = asyncio.create_task(ws._hub.drain(0))
        await until(lambda: drain.done() or ws._hub.draining)
        may_go_on.set()
        await asyncio.wait_for(drain, PATIENCE)
        assert await client in (1012, 3401)
        assert not any(held(ws._hub))


def draining(seconds: float, **options: Any) -> tuple[Pachinko, list[str]]:
    """An endpoint whose handlers drain, and which of them have done so."""
    ws, drained = endpoint(**options), list[str]()

    @ws.on("plain")
    async def plain(conn: Connection, kind: str = "plain") -> None:
        await ws._hub.drain(seconds)
        drained.append(kind)

    ws.on("concurrent", concurrent=True)(plain)

    @ws.on("stream")
    async def stream(conn: Connection) -> AsyncIterator[int]:
        await plain(conn)
        yield 1

    return ws, drained


@pytest.mark.parametrize("kind", ["plain", "concurrent"])
async def test_a_handler_may_drain(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """It does not wait for its own connection, which would wait for it."""
    ws, drained = draining(0, linger=PATIENCE)
    lives = watch(ws)
    async with run(ws._app) as server, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(server.url + "/ws")) for _ in range(3)]
        await clients[0].send(kind, id=1)
        for client in clients:
            assert (await client.closed())[0] == 1012
        await until(lambda: drained)
        await empty(ws._hub)
        lives.check()
    assert not bugs(caplog)


@pytest.mark.parametrize("kind", ["plain", "concurrent", "stream"])
async def test_a_drain_goes_on_without_the_handler_that_has_begun_it(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own connection may be the first to be closed, and it has a linger like any other."""
    ws, _ = draining(0.6, linger=0.1)
    lives = watch(ws)

    def sample(population: Any, k: int) -> Any:
        return sorted(population, key=lambda session: lives.arrived.index(session.conn.id))

    monkeypatch.setattr(pachinko.random, "sample", sample)
    async with run(ws._app) as server, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(server.url + "/ws")) for _ in range(3)]
        await clients[0].send(kind, id=1)
        for client in clients:
            assert (await client.closed())[0] == 1012
        await empty(ws._hub)
        lives.check()
    assert not bugs(caplog)


# Bugs that are no `Exception`, and others that hurt


class Panic(BaseException):
    """What an extension raises: pyo3's `PanicException` is no `Exception` either."""


def recurse() -> None:
    recurse()


def fail(kind: str) -> None:
    """Fail in a way that some code fails in."""
    if kind == "SystemExit":
        sys.exit("a secret")
    if kind == "RecursionError":
        recurse()
    if kind == "allocation":
        bytearray(2**62)
    raise {
        "CancelledError": asyncio.CancelledError,
        "GeneratorExit": GeneratorExit,
        "MemoryError": MemoryError,
        "Panic": Panic,
    }[kind]("a secret")


KINDS = ["CancelledError", "SystemExit", "RecursionError", "MemoryError", "allocation", "Panic"]
PLACES = ["plain", "late", "concurrent", "stream", "cleanup", "error handler", "middleware"]


def failing(kind: str) -> Pachinko:
    """An endpoint that fails in the place that a message names."""
    ws = endpoint()

    @ws.on("plain")
    async def plain(conn: Connection) -> None:
        fail(kind)

    @ws.on("late")
    async def late(conn: Connection) -> None:
        await asyncio.sleep(0.001)
        fail(kind)

    @ws.on("concurrent", concurrent=True)
    async def concurrent(conn: Connection) -> None:
        await late(conn)

    @ws.on("stream")
    async def stream(conn: Connection) -> AsyncIterator[int]:
        yield 1
        fail(kind)

    @ws.on("cleanup")
    async def cleanup(conn: Connection) -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            fail(kind)

    @ws.on("error handler")
    async def raises(conn: Connection) -> None:
        raise KeyError("a secret")

    @ws.error(KeyError)
    async def translate(conn: Connection, exc: KeyError) -> None:
        fail(kind)

    @ws.on("middleware")
    async def handled(conn: Connection) -> None: ...

    @ws.middleware
    async def middleware(conn: Connection, envelope: Any, call_next: Any) -> Any:
        result = await call_next()
        if envelope.type == "middleware":
            fail(kind)
        return result

    @ws.fallback
    async def fallback(conn: Connection, frame: str) -> None:
        fail(kind)

    @ws.binary
    async def binary(conn: Connection, data: bytes) -> None:
        fail(kind)

    return ws


async def last_answer(client: Client) -> dict[str, Any]:
    """The next message that is no stream's item."""
    while "more" in (answer := await client.receive()):
        pass
    return answer


@pytest.mark.parametrize("kind", KINDS)
async def test_a_bug_of_any_kind_costs_one_answer(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever it is: it is logged, answered with ``internal_error``, and all goes on."""
    ws = failing(kind)
    lives = watch(ws)
    async with (
        run(ws._app) as server,
        connect(server.url + "/ws") as client,
        connect(server.url + "/ws") as other,
    ):
        for place in [*PLACES, *PLACES]:
            caplog.clear()
            await client.send(place, id=place)
            answer = await last_answer(client)
            assert answer["type"] == "error" and answer["id"] == place
            assert answer["payload"]["code"] == "internal_error"
            assert "secret" not in json.dumps(answer)
            assert len(bugs(caplog)) == 1 and bugs(caplog)[0].startswith("pachinko: ")
        for frame in (b"bytes", "text", '{"type":"unknown"}'):
            caplog.clear()
            await client.raw(frame)
            answer = await client.receive()
            assert answer["payload"]["code"] == "internal_error" and "id" not in answer
            assert len(bugs(caplog)) == 1
        caplog.clear()
        await client.send("plain")  # without an id
        assert (await client.receive())["payload"]["code"] == "internal_error"
        for each in (client, other):
            assert (await each.ask("echo", "hello"))["payload"] == "hello"
    await empty(ws._hub)
    lives.check()
    assert len(lives.left) == 2
    gc.collect()
    assert len(bugs(caplog)) == 1  # no task had one that nobody has retrieved


async def test_a_handler_that_raises_generator_exit_costs_its_connection_at_most() -> None:
    """Python closes coroutines with it, so it is not held; but everybody is seen out once."""
    ws = failing("GeneratorExit")
    lives = watch(ws)
    async with run(ws._app) as server, connect(server.url + "/ws") as other:
        for place in PLACES:
            async with connect(server.url + "/ws") as client:
                await client.send(place, id=place)
                await client.send("echo", "hello", id="next")
                with contextlib.suppress(websockets.exceptions.ConnectionClosed):
                    while (await client.receive()).get("id") != "next":
                        pass
            assert (await other.ask("echo", "hello"))["payload"] == "hello"
            await works(server.url + "/ws")
    await empty(ws._hub)
    lives.check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["connect", "authenticate"])
async def test_a_bug_of_any_kind_before_accept_refuses_the_handshake(
    kind: str, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By way of Falcon's error handlers, which log it; the next client is served."""
    ws, failed = endpoint(), list[str]()

    async def once(conn: Connection, *_: Any) -> str:
        if not failed:
            failed.append(kind)
            await asyncio.sleep(0)
            fail(kind)
        return "ada"

    if place == "connect":

        @ws.connect
        async def load(conn: Connection) -> None:
            await once(conn)
    else:

        @ws.authenticate
        async def who(conn: Connection, token: str | None) -> str:
            return await once(conn)

    lives = watch(ws)
    async with run(ws._app) as server:
        with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
            async with connect(server.url + "/ws"):
                pass
        assert refused.value.response.status_code == 403
        assert failed and not lives.arrived
        assert {bug.split(":")[0] for bug in bugs(caplog)} <= {"falcon", "pachinko"}
        assert bugs(caplog)
        await empty(ws._hub)
        await works(server.url + "/ws")
    await empty(ws._hub)
    lives.check()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_bug_of_any_kind_in_a_disconnect_handler_spares_the_others(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and nothing of the connection stays."""
    ws = endpoint()

    @ws.disconnect
    async def broken(conn: Connection) -> None:
        await asyncio.sleep(0)
        fail(kind)

    lives = watch(ws)
    async with run(ws._app) as server:
        await works(server.url + "/ws")
        await empty(ws._hub)
        assert len(lives.left) == 1
        lives.check()
        assert len(bugs(caplog)) == 1 and bugs(caplog)[0].startswith("pachinko: ")
        await works(server.url + "/ws")
    await empty(ws._hub)
    lives.check()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_bug_of_any_kind_in_a_worker_starts_it_again(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and at the end the worker is cancelled."""
    monkeypatch.setattr(pachinko, "_BACKOFFS", (0.001,))
    ws, began, ended = endpoint(), list[str](), list[str]()

    @ws.worker
    async def work() -> None:
        began.append(kind)
        await asyncio.sleep(0)
        if len(began) < 3:
            fail(kind)
        try:
            await asyncio.Future()
        finally:
            ended.append(kind)

    async with run(ws._app) as server:
        await until(lambda: len(began) == 3)
        await works(server.url + "/ws")
        assert not ended
    assert ended == [kind]
    assert [bug.split(" ")[:2] for bug in bugs(caplog)] == [["pachinko:", "worker"]] * 2


INTERRUPTED = """
import asyncio, socket, sys
import falcon.asgi, uvicorn
from pachinko import Connection, Pachinko

app = falcon.asgi.App()
ws = Pachinko(app, "/ws")
sockets = [socket.create_server(("127.0.0.1", 0))]

@ws.on("interrupt", concurrent=True)
async def interrupt(conn):
    raise KeyboardInterrupt

@ws.disconnect
async def leave(conn):
    print("left", flush=True)

print(sockets[0].getsockname()[1], flush=True)
server = uvicorn.Server(uvicorn.Config(app, ws_ping_interval=None, log_level="critical"))
try:
    asyncio.run(server.serve(sockets))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


async def test_a_keyboard_interrupt_ends_the_process(tmp_path: Path) -> None:
    """From a task of the handler's own it goes to the loop, and disconnect handlers run even so."""
    with Script(tmp_path, INTERRUPTED) as script:
        (port,) = await script.prints(1)
        async with connect(f"ws://127.0.0.1:{port}/ws") as client:
            await client.send("interrupt", id=1)
            with pytest.raises(websockets.exceptions.ConnectionClosed):
                await client.receive()
        await until(lambda: script.popen.poll() is not None)
        assert sorted(script.lines[1:]) == ["interrupted", "left"]


async def test_a_keyboard_interrupt_is_left_to_the_server(caplog: pytest.LogCaptureFixture) -> None:
    """Where there is no task between it and the server, which is asked what to make of it."""
    ws = endpoint()
    lives = watch(ws)

    @ws.on("interrupt")
    async def interrupt(conn: Connection) -> None:
        raise KeyboardInterrupt

    async with run(ws._app) as server, connect(server.url + "/ws") as client:
        await client.send("interrupt", id=1)
        with pytest.raises(websockets.exceptions.ConnectionClosed):
            await client.receive()
        await works(server.url + "/ws")
    await empty(ws._hub)
    lives.check()
    (record,) = (record for record in caplog.records if record.levelno >= logging.ERROR)
    assert record.name == "uvicorn.error"
    assert record.exc_info is not None and record.exc_info[0] is KeyboardInterrupt


# Threads and loops


def hammer(hub: Hub, calls: list[int]) -> None:
    """Call the hub from a thread for as long as it takes calls."""
    functions: list[Any] = [hub.stats, lambda: hub.send("all", "n", 1), lambda: hub.members("x")]
    for n in itertools.count():
        try:
            hub.call_threadsafe(functions[n % 3]).result(PATIENCE)
        except PachinkoError:
            return
        calls.append(n)


async def test_threads_may_call_while_the_server_stops(caplog: pytest.LogCaptureFixture) -> None:
    """Each call returns a result or raises `PachinkoError`, in bounded time."""
    ws = endpoint()
    calls: list[list[int]] = [[] for _ in range(4)]
    async with run(ws._app) as server, connect(server.url + "/ws") as client:
        reading = asyncio.create_task(client.closed())
        threads = [asyncio.create_task(asyncio.to_thread(hammer, ws._hub, each)) for each in calls]
        await until(lambda: all(len(each) > 10 for each in calls))
        await server.stop()
        await asyncio.wait_for(asyncio.gather(*threads), 2 * PATIENCE)
        assert await reading == (1012, "")
        server.task = asyncio.create_task(asyncio.sleep(0))  # stopped already
    gc.collect()
    assert not any(held(ws._hub)) and not bugs(caplog)


def test_threads_may_call_while_the_loop_ends(caplog: pytest.LogCaptureFixture) -> None:
    """The same for a loop that is closed right after the app's shutdown."""
    ws, calls = endpoint(), list[int]()

    async def serve() -> None:
        async with run(ws._app):
            for thread in threads:
                thread.start()
            await until(lambda: len(calls) > 50)

    threads = [threading.Thread(target=hammer, args=(ws._hub, calls)) for _ in range(4)]
    asyncio.run(serve())
    for thread in threads:
        thread.join(2 * PATIENCE)
        assert not thread.is_alive()
    gc.collect()
    assert not any(held(ws._hub)) and not bugs(caplog)


async def use(hub: Hub) -> None:
    """Call everything that a hub has, where no app runs."""
    await hub.send("all", "n", 1)
    await hub.broadcast("n", 1)
    await hub.send_to("nobody", "n", 1)
    await hub.send_to_user("nobody", "n", 1)
    await hub.close_group("all", 4000)
    assert hub.members("all") == hub.connections == hub.groups == frozenset()
    assert not any(hub.stats().values())
    with pytest.raises(PachinkoError, match="the hub is not running"):
        hub.call_threadsafe(hub.send, "all", "n", 1)
    await asyncio.wait_for(hub.drain(), PATIENCE)
    assert not any(held(hub)) and hub.state.loop is None


def test_a_hub_without_an_app_reaches_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Before the first start and behind the last stop, in any loop; apps start all the same."""
    ws = endpoint()
    lives = watch(ws)

    async def serve() -> None:
        async with run(ws._app) as server:
            await works(server.url + "/ws")
            assert ws._hub.stats()["received"] == 1

    asyncio.run(use(ws._hub))
    for _ in range(2):
        asyncio.run(serve())
        asyncio.run(use(ws._hub))
    assert len(lives.left) == 2
    lives.check()
    assert not bugs(caplog)


async def lost(ws: Pachinko) -> None:
    """Serve *ws* with a client connected, and fail without a shutdown."""
    server = Server(ws._app, log_config=None)
    try:
        await server.start()
        async with connect(server.url + "/ws"):
            await until(lambda: ws._hub.connections)
            raise ZeroDivisionError
    finally:
        server.socket.close()


def test_a_loop_may_end_without_a_shutdown() -> None:
    """Its clients are seen out; then the hub is as new for another loop, and another app."""
    ws = endpoint()
    lives, hub = watch(ws), ws._hub
    other = endpoint(hub=hub)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            asyncio.run(lost(ws))
        lives.check()
        with pytest.raises(PachinkoError, match="the hub is not running"):
            hub.call_threadsafe(hub.stats)

        async def serve(ws: Pachinko) -> None:
            async with run(ws._app) as server:
                assert not any(hub.stats().values())
                await works(server.url + "/ws")
            assert not any(held(hub))

        asyncio.run(serve(other))
        asyncio.run(serve(ws))
    assert len(lives.left) == 4


def test_a_call_that_a_lost_loop_never_took_fails_with_the_next_start() -> None:
    """It raises `PachinkoError`, instead of leaving its thread to wait for ever."""
    ws = endpoint()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(ws.process_startup({}, {}))
    call = ws._hub.call_threadsafe(ws._hub.stats)  # a loop that does not run takes it
    loop.close()

    async def start_and_stop() -> None:
        await ws.process_startup({}, {})
        await ws.process_shutdown({}, {})

    asyncio.run(start_and_stop())
    with pytest.raises(PachinkoError):
        call.result(0)
    gc.collect()


async def test_an_app_may_stop_before_another_one_of_its_hub(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Only its own clients are closed, and the hub goes on."""
    first = endpoint()
    hub = first._hub
    second = endpoint(hub=hub)
    lives = [watch(first), watch(second)]
    async with run(second._app) as second_server, connect(second_server.url + "/ws") as client:
        async with run(first._app) as first_server, connect(first_server.url + "/ws") as other:
            await until(lambda: len(hub.members("all")) == 2)
            stopping = asyncio.create_task(first_server.stop())
            assert (await other.closed())[0] == 1012
            await stopping
            first_server.task = asyncio.create_task(asyncio.sleep(0))  # stopped already
        lives[0].check()
        assert len(hub.connections) == len(hub.members("all")) == 1
        await hub.send("all", "n", 1)
        assert (await client.receive())["payload"] == 1
        assert await asyncio.wrap_future(hub.call_threadsafe(hub.groups.copy)) == {"all"}
    lives[1].check()
    assert hub.state.loop is None and not any(held(hub))
    assert not bugs(caplog)


class Elsewhere:
    """A server in a thread and a loop of its own."""

    def __init__(self, app: Any, **options: Any) -> None:
        self.app, self.options = app, options
        self.url = ""
        self.loop: asyncio.AbstractEventLoop | None = None
        self.end = asyncio.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        server = Server(self.app, log_config=None, **self.options)
        with server.socket:
            await server.start()
            self.url = server.url
            await self.end.wait()
            await server.stop()

    async def __aenter__(self) -> Elsewhere:
        self.thread.start()
        await until(lambda: self.url or not self.thread.is_alive())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.thread.is_alive():
            assert self.loop is not None
            self.loop.call_soon_threadsafe(self.end.set)
        await until(lambda: not self.thread.is_alive())


async def test_two_apps_in_two_threads_have_a_hub_each(caplog: pytest.LogCaptureFixture) -> None:
    """What is sent by one reaches its own clients, from its loop or any thread."""
    here, there = endpoint(), endpoint()
    lives = [watch(here), watch(there)]
    async with (
        run(here._app) as server,
        Elsewhere(there._app) as elsewhere,
        connect(server.url + "/ws") as one,
        connect(elsewhere.url + "/ws") as two,
    ):
        await until(lambda: here._hub.connections and there._hub.connections)
        await here._hub.send("all", "n", "here")
        there._hub.call_threadsafe(there._hub.send, "all", "n", "there").result(PATIENCE)
        for client, where in ((one, "here"), (two, "there")):
            assert (await client.receive())["payload"] == where
            assert (await client.ask("echo", where))["payload"] == where
        with pytest.raises(PachinkoError, match="another thread or event loop"):
            await there._hub.send("all", "n", 1)
    for each in lives:
        assert len(each.left) == 1
        each.check()
    assert not any(held(there._hub)) and not bugs(caplog)


async def test_the_first_client_of_a_hub_in_a_second_loop_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log says what to do; the first app goes on."""
    here = endpoint()
    there = endpoint(hub=here._hub)
    async with run(here._app) as server, connect(server.url + "/ws") as client:
        async with Elsewhere(there._app, lifespan="off") as elsewhere:
            with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
                async with connect(elsewhere.url + "/ws"):
                    pass
            assert refused.value.response.status_code == 403
        assert 'Pachinko(app, "/ws", hub=Hub())' in caplog.text
        await here._hub.send("all", "n", 1)
        assert (await client.receive())["payload"] == 1


async def test_an_app_of_a_hub_in_a_second_loop_does_not_start() -> None:
    """The server is told what to do; the first app goes on."""
    here, told = endpoint(), list[Any]()
    there = endpoint(hub=here._hub)

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def send(event: Any) -> None:
        told.append(event)

    scope = {"type": "lifespan", "asgi": {"version": "3.0"}}
    async with run(here._app) as server, connect(server.url + "/ws") as client:
        await asyncio.to_thread(lambda: asyncio.run(there._app(scope, receive, send)))  # type: ignore[misc]
        assert [event["type"] for event in told] == ["lifespan.startup.failed"]
        assert 'Pachinko(app, "/ws", hub=Hub())' in told[0]["message"]
        await here._hub.send("all", "n", 1)
        assert (await client.receive())["payload"] == 1


# Forks

FORKED = """
import asyncio, os, socket, sys
import falcon.asgi, uvicorn
from pachinko import Connection, Pachinko, PachinkoError, hub

app = falcon.asgi.App()
ws = Pachinko(app, "/ws")

@ws.connect
async def arrive(conn):
    await conn.join("all")

@ws.on("say")
async def say(conn, text: str):
    await hub.send("all", "said", {"pid": os.getpid(), "text": text})

@ws.on("members")
async def members(conn) -> int:
    return len(hub.members("all"))

@ws.disconnect
async def leave(conn):
    os.write(1, b"left %d\\n" % len(hub.connections))  # in one piece, beside the other process

@ws.on("fork")
async def fork(conn) -> list[str]:
    child = os.fork()
    if child:
        return [str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))]
    try:
        assert not (hub.connections or hub.groups or hub.state.serving or any(hub.stats().values()))
        hub.call_threadsafe(hub.send, "all", "said", {})
    except PachinkoError as exc:
        os._exit(7 if "the hub is not running" in str(exc) else 1)
    except BaseException:
        os._exit(2)
    os._exit(3)

sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(each.getsockname()[1] for each in sockets), flush=True)
child = 0 if sys.argv[1:] == ["alone"] else os.fork()
config = uvicorn.Config(app, ws_ping_interval=None, log_level="error")
uvicorn.Server(config).run(sockets=sockets[:1] if child else sockets[1:])
"""


async def test_a_fork_before_the_start_makes_two_that_do_not_disturb_each_other(
    tmp_path: Path,
) -> None:
    """Each has the handlers, and clients of its own."""
    with Script(tmp_path, FORKED) as script:
        ports = (await script.prints(1))[0].split()
        async with (
            connect(f"ws://127.0.0.1:{ports[0]}/ws") as one,
            connect(f"ws://127.0.0.1:{ports[1]}/ws") as two,
        ):
            pids = set()
            for client, text in ((one, "one"), (two, "two")):
                assert (await client.ask("members"))["payload"] == 1
                said = (await client.ask("say", text, id=None))["payload"]
                assert said["text"] == text
                pids.add(said["pid"])
            assert len(pids) == 2 and script.popen.pid in pids
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            assert (await one.closed())[0] == (await two.closed())[0] == 1012
        await script.prints(3)
        assert script.lines[1:] == ["left 0", "left 0"]
        assert await script.ends() == -signal.SIGTERM


async def test_a_fork_behind_the_start_leaves_the_parent_alone(tmp_path: Path) -> None:
    """In the child the hub is empty and says that it does not run; the parent serves on."""
    with Script(tmp_path, FORKED, "alone") as script:
        port = (await script.prints(1))[0].split()[1]
        async with connect(f"ws://127.0.0.1:{port}/ws") as client:
            assert (await client.ask("fork"))["payload"] == ["7"]
            assert (await client.ask("members"))["payload"] == 1
            assert (await client.ask("say", "hi", id=None))["payload"]["text"] == "hi"
            assert (await client.ask("fork"))["payload"] == ["7"]
        await script.prints(2)
        assert script.lines[1:] == ["left 0"]


# Handlers that have their time


def timed(**options: Any) -> tuple[Pachinko, list[str], threading.Event]:
    """An endpoint of handlers that are stopped in different states, plain and concurrent."""
    ws, seen, may_go_on = endpoint(**options), list[str](), threading.Event()

    async def wait() -> None:
        await asyncio.Future()

    async def run(conn: Connection, how: str) -> str:
        seen.append("began")
        try:
            if how == "swallows":
                with contextlib.suppress(asyncio.CancelledError):
                    await wait()
                await wait()
            elif how == "task group":
                async with asyncio.TaskGroup() as group:
                    group.create_task(wait())
                    group.create_task(wait())
            elif how == "shield":
                await asyncio.shield(asyncio.ensure_future(asyncio.sleep(0.05)))
                await wait()
            else:
                await asyncio.to_thread(may_go_on.wait, PATIENCE)
                await wait()
        finally:
            seen.append("ended")
        return "done"

    ws.on("plain")(run)
    ws.on("concurrent", concurrent=True)(run)
    return ws, seen, may_go_on


@pytest.mark.parametrize("kind", ["plain", "concurrent"])
@pytest.mark.parametrize("how", ["task group", "shield", "thread"])
async def test_a_handler_is_stopped_whatever_it_waits_in(
    how: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is answered with ``handler_timeout``, and the connection goes on."""
    ws, seen, may_go_on = timed(handler_timeout=0.02)
    lives = watch(ws)
    async with run(ws._app) as server, connect(server.url + "/ws") as client:
        for id in range(3):
            answer = await client.ask(kind, how, id=id)
            assert answer["id"] == id and answer["payload"]["code"] == "handler_timeout"
            assert (await client.ask("echo", "hello"))["payload"] == "hello"
        assert seen == ["began", "ended"] * 3
        may_go_on.set()
    await empty(ws._hub)
    lives.check()
    assert not bugs(caplog)


@pytest.mark.parametrize("kind", ["plain", "concurrent"])
@pytest.mark.parametrize("how", ["swallows", "task group", "shield", "thread"])
@pytest.mark.parametrize(("handler_timeout", "linger"), [(0.02, 0.2), (0.05, 0.05), (0.2, 0.02)])
async def test_a_handler_that_has_its_time_ends_with_its_client(
    how: str, kind: str, handler_timeout: float, linger: float
) -> None:
    """Also when both times end at once, or the first cancellation was swallowed."""
    ws, seen, may_go_on = timed(handler_timeout=handler_timeout, linger=linger)
    lives = watch(ws)
    async with run(ws._app) as server, connect(server.url + "/ws") as client:
        await client.send(kind, how, id=1)
        await until(lambda: seen)
        client.cut()
        await empty(ws._hub)
        may_go_on.set()
        assert seen == ["began", "ended"]
        lives.check()
        await works(server.url + "/ws")
    await empty(ws._hub)
    lives.check()


# Limits of the system

LIMITED = """
import logging, resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
import falcon.asgi, uvicorn
from pachinko import Connection, Pachinko, hub

app = falcon.asgi.App()
ws = Pachinko(app, "/ws")

@ws.on("echo")
async def echo(conn, payload):
    return payload

@ws.disconnect
async def leave(conn):
    print("left", flush=True)

with socket.create_server(("127.0.0.1", 0)) as listening:
    print(listening.getsockname()[1], flush=True)
    logging.getLogger("asyncio").setLevel("CRITICAL")  # which complains of each that has to wait
    options = {"ws_ping_interval": None, "log_level": "critical", "backlog": 5}
    uvicorn.Server(uvicorn.Config(app, loop=sys.argv[1], **options)).run(sockets=[listening])
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_a_server_out_of_file_descriptors_serves_whom_it_has(
    loop: str, tmp_path: Path
) -> None:
    """When some of them have left, new ones come in, and it ends as always."""
    with Script(tmp_path, LIMITED, loop) as script:
        (port,) = await script.prints(1)
        url = f"ws://127.0.0.1:{port}/ws"
        async with contextlib.AsyncExitStack() as stack:
            clients: list[Client] = []
            with contextlib.suppress(TimeoutError, *ENDED):
                while len(clients) < 64:
                    clients.append(await stack.enter_async_context(connect(url, open_timeout=1)))
            assert 10 < len(clients) < 64
            for client in clients:
                assert (await client.ask("echo", "hello"))["payload"] == "hello"
            for client in clients[:5]:
                await client.close()
            await script.prints(6)
            for _ in range(3):
                await until_works(url)
            for client in clients[5:]:
                assert (await client.ask("echo", "hello"))["payload"] == "hello"
        script.popen.send_signal(signal.SIGTERM)
        await until(lambda: script.popen.poll() is not None)
        assert script.popen.returncode == -signal.SIGTERM  # which uvicorn hands on
        assert script.lines.count("left") >= len(clients) + 3  # and those who had given up waiting


async def until_works(url: str) -> None:
    """Connect, as often as it takes: a server that was out of descriptors looks again by and by."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(TimeoutError, *ENDED):
                return await works(url)
            await asyncio.sleep(0.05)
