"""Nothing of a kept group is lost, over sockets: many clients, real servers, brokers and processes.

Clients come and go all the time, are cut after any octet, are slow, resume twice and with old and
invented positions, and speak, also with ``exclude``; brokers are killed, paused and flushed, and
processes are killed. Then all come once more, and what they have heard is checked (`following`).

``PACHINKO_FAULT_EXAMPLES=2000`` is the nightly form: a thousand clients, and longer. It needs
``pytest -o faulthandler_timeout=900``, since pytest ends a test after two minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import attrs
import pytest
import websockets.asyncio.client
import websockets.exceptions
from brokers import BrokerKind, BrokerProcess, running
from cutting import Cut, Proxy
from following import Follower, Published, Send, query_of
from history_app import history_app
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import PATIENCE, Server, serving, until

import pachinko_cluster
from pachinko import Hub

EXAMPLES = int(os.environ.get("PACHINKO_FAULT_EXAMPLES", "40"))
IS_NIGHTLY = "PACHINKO_FAULT_EXAMPLES" in os.environ
ROUND = 500  # examples of one test, which pytest ends after two minutes
CLIENTS = 1000 if EXAMPLES >= 2000 else EXAMPLES
SECONDS = 30.0 if EXAMPLES >= 2000 else 1.5  # of a storm without faults
SETTLE = 60.0 if IS_NIGHTLY else 20.0  # until all have everything, on a slow and noisy machine
MEMBERS = 10  # clients in a group
SEED = int(os.environ.get("PACHINKO_FAULT_SEED") or random.randrange(2**32))
LOGGERS = ("asyncio", "falcon", "pachinko", "uvicorn.error")
ENDED = (OSError, EOFError, TimeoutError, websockets.exceptions.WebSocketException)


# A client


@attrs.define(eq=False)
class Life:
    """A connection of a follower."""

    follower: Follower
    socket: websockets.asyncio.client.ClientConnection
    answers: dict[int, asyncio.Future[dict[str, Any]]] = attrs.Factory(dict)
    reads: asyncio.Event = attrs.Factory(asyncio.Event)
    reader: asyncio.Task[None] | None = None

    async def read(self) -> None:
        """Take what comes, as long as the client reads, up to the end."""
        with contextlib.suppress(*ENDED):
            while True:
                await self.reads.wait()
                frame = json.loads(await self.socket.recv())
                await self.reads.wait()
                if (answer := self.answers.pop(frame.get("id"), None)) is not None:
                    answer.set_result(frame)
                else:
                    self.follower.take(frame)
        for answer in self.answers.values():
            answer.cancel()

    @property
    def is_over(self) -> bool:
        return self.reader is None or self.reader.done()

    async def ask(self, type: str, **payload: Any) -> dict[str, Any] | None:
        """Ask the server; None if the connection ends before it has answered."""
        answer = asyncio.get_running_loop().create_future()
        id = len(self.answers) + random.getrandbits(40)
        self.answers[id] = answer
        try:
            await self.socket.send(json.dumps({"type": type, "id": id, "payload": payload}))
            if self.is_over:
                return None
            return await asyncio.wait_for(answer, PATIENCE)
        except (asyncio.CancelledError, *ENDED):
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            return None

    async def cut(self) -> None:
        """Lose the connection without a word."""
        if self.reader is not None:
            self.reader.cancel()  # What has come and was not read is lost as well.
            await asyncio.wait([self.reader])
        with contextlib.suppress(AttributeError):
            self.socket.transport.abort()

    async def close(self) -> None:
        self.reads.set()
        await self.socket.close()
        if self.reader is not None:
            await asyncio.wait([self.reader])


async def come(
    follower: Follower, url: str, *groups: str, how: str = "query", small: bool = False
) -> Life:
    """Connect, with what *follower* knows. Raises `ENDED`."""
    resume = follower.resume
    query: list[tuple[str, str]] = [("group", group) for group in groups]
    query.append(("resume", query_of(resume) if how == "query" else "message"))
    follower.joins(*groups)
    options: dict[str, Any] = {"compression": None, "ping_interval": None, "proxy": None}
    if small:  # So little is on its way that a client which does not read is slow at once.
        port = int(url.rsplit(":", 1)[1])
        its_socket = socket.socket()
        its_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        its_socket.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(its_socket, ("127.0.0.1", port))
        except OSError:
            its_socket.close()
            raise
        options |= {"sock": its_socket, "max_queue": 1}
    connecting = websockets.asyncio.client.connect(f"{url}/ws?{urlencode(query)}", **options)
    ws = await asyncio.wait_for(connecting, PATIENCE)
    life = Life(follower, ws)
    life.reads.set()
    life.reader = asyncio.create_task(life.read())
    with contextlib.suppress(*ENDED):
        if how == "message":
            await ws.send(json.dumps({"type": "resume", "payload": resume}))
        elif how == "authenticate":
            frame = {"type": "authenticate", "payload": {"token": "ada", "resume": resume}}
            await ws.send(json.dumps(frame))
    return life


async def say(life: Life, group: str, others: bool = False, size: int = 0) -> Send | None:
    """Have the server send to *group*; return the message if it was stored."""
    follower = life.follower
    if others and group not in follower.verdicts:
        return None  # It does not know the id of its connection yet.
    sent = follower.published.begin(
        group, follower.name, follower.ids[-1] if others else None
    )  # fmt: skip
    answer = await life.ask(
        "say", group=group, sender=follower.name, n=sent.n, others=others, size=size
    )
    sent.is_stored = answer is not None and answer["type"] == "say.reply"
    return sent if sent.is_stored else None


# Many clients


@attrs.define(eq=False)
class Storm:
    """Clients that come and go, at some servers."""

    urls: list[Callable[[], str]]
    count: int
    lot: random.Random = attrs.Factory(lambda: random.Random(SEED))
    published: Published = attrs.Factory(Published)
    is_over: bool = False
    lives: list[Life] = attrs.Factory(list)
    old: list[Follower] = attrs.Factory(list)
    connections: int = 0

    @property
    def groups(self) -> list[str]:
        return [f"room:{n}" for n in range(max(2, 2 * self.count // MEMBERS))]

    async def run(self, during: Awaitable[object]) -> None:
        """Let all come and go while *during* goes on; then let all come, and check."""
        print(f"PACHINKO_FAULT_SEED={SEED}")  # noqa: T201 - to repeat a failure
        tasks = [asyncio.create_task(self.wander(n)) for n in range(self.count)]
        try:
            await during
            self.is_over = True
            await asyncio.wait_for(asyncio.gather(*tasks), SETTLE)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def wander(self, n: int) -> None:
        """Follow two groups over many connections, and stay at the end."""
        lot = random.Random(self.lot.getrandbits(64))
        follower = Follower(self.published, f"client {n}")
        groups = lot.sample(self.groups, 2)
        await asyncio.sleep(lot.uniform(0, 0.3))  # the chance of this run
        forks = 0
        while not self.is_over:
            if lot.random() < 0.1 and follower.at:
                await self.live(lot, self.inventor(lot, follower), groups)
            if lot.random() < 0.1 and forks < 3:
                forks += 1
                other = follower.fork(f"fork {forks} of {follower.name}")
                if lot.random() < 0.5:
                    self.old.append(other)
                    other = follower
                    if len(self.old) > 5:
                        other = self.old.pop(lot.randrange(len(self.old)))
                    await self.live(lot, other, [*other.heard] or groups)
                    continue
                await asyncio.gather(
                    self.live(lot, follower, groups), self.live(lot, other, groups)
                )
            await self.live(lot, follower, groups)
        while True:
            with contextlib.suppress(*ENDED):
                self.lives.append(await come(follower, lot.choice(self.urls)(), *groups))
                follower.is_at_the_end = True
                return
            await asyncio.sleep(0.1)  # a server that is not yet there

    def inventor(self, lot: random.Random, known: Follower) -> Follower:
        """A client with positions that nobody was given."""
        at = dict[str, str]()
        for group, position in known.at.items():
            epoch, _, number = position.rpartition(".")
            by = lot.choice([-3, -1, 1, 10**6])
            invented = f"{epoch}.{max(0, int(number) + by)}"
            at[group] = lot.choice([invented, invented, f"x.{number}", f"{epoch}x.{number}", "?"])
        name = f"inventor {len(self.published.followers)}"
        return Follower(self.published, name, at, excuses=("epoch", "broker"))

    async def live(self, lot: random.Random, follower: Follower, groups: list[str]) -> None:
        """One connection, up to an end of some kind."""
        how = lot.choice(["query", "query", "message", "authenticate"])
        is_slow = lot.random() < 0.1
        try:
            life = await come(follower, lot.choice(self.urls)(), *groups, how=how, small=is_slow)
        except ENDED:
            await asyncio.sleep(0.05)  # a server that is not yet there
            return
        self.connections += 1
        for _ in range(lot.randrange(4)):
            if self.is_over or life.is_over:
                break
            if lot.random() < 0.4:
                size = lot.choice([0, 0, 1000, 20_000])
                await say(life, lot.choice(groups), others=lot.random() < 0.3, size=size)
            if is_slow and lot.random() < 0.5:
                life.reads.clear()
            await asyncio.sleep(lot.uniform(0, 0.3))  # the chance of this run
            life.reads.set()
        if lot.random() < 0.7:
            await life.cut()
        else:
            await life.close()

    async def end(self, **options: Any) -> None:
        """Wait until all have everything, and check what they have heard."""
        speaker = Follower(self.published, "the last word")
        life = await self.reach(speaker)
        last = dict[str, Send]()
        async with asyncio.timeout(SETTLE):
            while len(last) < len(self.groups):
                for group in self.groups:
                    if group not in last and (sent := await say(life, group)) is not None:
                        last[group] = sent
                if life.is_over:
                    life = await self.reach(speaker)
        followers = [each.follower for each in self.lives]
        with contextlib.suppress(TimeoutError):  # What is missing is told by the check.
            async with asyncio.timeout(SETTLE):
                while not all(f.has(last[g]) for f in followers for g in f.heard):
                    await asyncio.sleep(0.02)  # nobody tells when it is so
        for each in [life, *self.lives]:
            assert not each.is_over, f"{each.follower.name} was closed: {each.socket.close_code}"
            await each.cut()
        self.published.check(**options)

    async def reach(self, follower: Follower) -> Life:
        async with asyncio.timeout(SETTLE):
            while True:
                with contextlib.suppress(*ENDED):
                    return await come(follower, self.urls[0]())
                await asyncio.sleep(0.1)  # a server that is not yet there


def bugs(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as a bug."""
    return [
        logging.Formatter().format(record)
        for record in caplog.records
        if record.name in LOGGERS
        and (record.exc_info or (record.levelno >= logging.ERROR and record.name != "pachinko"))
    ]


@contextlib.contextmanager
def no_timeout() -> Iterator[None]:
    """Tell what has timed out from what was cut: both are an `OSError`."""
    try:
        yield
    except TimeoutError as exc:
        raise AssertionError("it has timed out") from exc


async def empty(hub: Hub) -> None:
    """Wait until nothing is left of the hub's clients."""
    await until(lambda: not hub.connections and not hub.state.registry.groups)
    history = hub.state.history
    assert history is not None
    kept = [history._resumes, history._timers, history._contexts, history._waiting]
    await until(lambda: not any(kept))


def small_buffers(server: Server) -> None:
    """Let the system hold little of what a client does not read."""
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


async def test_nothing_is_lost_while_many_come_and_go(caplog: pytest.LogCaptureFixture) -> None:
    """In one process with its memory: no gap at all, since the window holds everything."""
    hub = Hub()
    async with serving(history_app(hub), log_config=None) as server:
        small_buffers(server)
        storm = Storm([lambda: server.url], CLIENTS)
        await storm.run(asyncio.sleep(SECONDS))
        await storm.end()
        await empty(hub)
    assert not bugs(caplog)


async def test_nothing_is_lost_between_two_processes(caplog: pytest.LogCaptureFixture) -> None:
    """On a broker in memory that is lost and comes back: everything is delivered, without a gap."""
    broker = pachinko_cluster.SimulatedBroker()
    hubs = [Hub(), Hub()]
    async with contextlib.AsyncExitStack() as stack:
        servers = []
        for hub in hubs:
            hub.configure(broker.connection())
            app = history_app(hub)
            servers.append(await stack.enter_async_context(serving(app, log_config=None)))
            small_buffers(servers[-1])
        storm = Storm([lambda: servers[0].url, lambda: servers[1].url], CLIENTS)

        async def faults() -> None:
            for n in range(4):
                await asyncio.sleep(SECONDS / 5)  # the chance of this run
                if n % 2:
                    next(iter(broker.connections)).cut("a test wants it")
                else:
                    broker.lose()
                    await asyncio.sleep(SECONDS / 20)  # the length of this outage
                    broker.restore()
            await asyncio.sleep(SECONDS / 5)  # the chance of this run

        await storm.run(faults())
        await storm.end(reasons=("first",))
        for hub in hubs:
            await empty(hub)
    assert not bugs(caplog)


# Brokers and processes that fail


class Program:
    """The app in a process of its own, which a test kills and starts again."""

    def __init__(self, url: str) -> None:
        self.broker = url
        self.process: subprocess.Popen[str] | None = None
        self.url = "ws://127.0.0.1:9"  # where nobody is

    async def start(self) -> None:
        """Start it; return when it takes clients."""
        path = Path(__file__).with_name("history_app.py")
        env = {**os.environ, "PACHINKO_BACKPLANE": self.broker}
        self.process = subprocess.Popen(  # noqa: ASYNC220 - it takes no time
            [sys.executable, str(path)], env=env, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        port = await asyncio.to_thread(self.process.stdout.readline)
        self.url = f"ws://127.0.0.1:{int(port)}"

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(PATIENCE)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    async def __aenter__(self) -> Program:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.kill()


async def test_who_outlives_a_process_is_told_that_its_memory_is_lost() -> None:
    """A process without a broker that is killed takes its history with it: a gap, and no more."""
    async with Program("memory://") as program:
        storm = Storm([lambda: program.url], CLIENTS)

        async def faults() -> None:
            await asyncio.sleep(SECONDS / 2)  # the chance of this run
            program.kill()
            await program.start()
            await asyncio.sleep(SECONDS / 4)  # the chance of this run

        await storm.run(faults())
        await storm.end(reasons=("epoch",))


@contextlib.asynccontextmanager
async def lasting(kind: BrokerKind) -> AsyncIterator[BrokerProcess]:
    """A broker that has everything again after it was killed."""
    options = {"redis": ("--appendonly", "yes", "--appendfsync", "always"),
               "nats": ("--jetstream", "--store_dir", "store")}  # fmt: skip
    async with running(kind, *options[kind]) as broker:
        yield broker


@contextlib.asynccontextmanager
async def storm_on(
    kind: BrokerKind, count: int = CLIENTS
) -> AsyncIterator[tuple[Storm, BrokerProcess, Program, Hub]]:
    """A storm in two processes, of which one can be killed, on a broker that can be, too."""
    async with contextlib.AsyncExitStack() as stack:
        broker = await stack.enter_async_context(lasting(kind))
        hub = Hub()
        hub.configure(broker.url)
        app = history_app(hub)
        server = await stack.enter_async_context(serving(app, log_config=None))
        small_buffers(server)
        program = await stack.enter_async_context(Program(broker.url))
        storm = Storm([lambda: server.url, lambda: program.url], count)
        yield storm, broker, program, hub
        await empty(hub)


async def test_nothing_is_lost_while_a_broker_pauses_and_a_process_dies(
    kind: BrokerKind, caplog: pytest.LogCaptureFixture
) -> None:
    """The broker is paused, and a process is killed: all is delivered, without a gap."""
    async with storm_on(kind) as (storm, broker, program, _):

        async def faults() -> None:
            await asyncio.sleep(SECONDS / 4)  # the chance of this run
            broker.pause()
            await asyncio.sleep(SECONDS / 8)  # the length of this pause
            broker.resume()
            await asyncio.sleep(SECONDS / 4)  # the chance of this run
            program.kill()
            await program.start()
            await asyncio.sleep(SECONDS / 8)  # the chance of this run

        await storm.run(faults())
        await storm.end(reasons=("first",))
    assert not bugs(caplog)


async def flush(broker: BrokerProcess) -> None:
    """Delete all that the broker has."""
    if broker.kind == "redis":
        reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
        writer.write(b"FLUSHALL\r\n")
        assert await reader.readline() == b"+OK\r\n"
        writer.close()
        await writer.wait_closed()
    else:
        import nats

        client = await nats.connect(broker.url)
        stream = client.jetstream()
        for each in await stream.streams_info():
            await stream.delete_stream(each.config.name)
        await client.close()


async def test_what_a_broker_has_forgotten_is_announced(
    kind: BrokerKind, caplog: pytest.LogCaptureFixture
) -> None:
    """It is killed, and its history deleted, at any moment: who has missed something is told so."""
    async with storm_on(kind) as (storm, broker, _, _):

        async def faults() -> None:
            await asyncio.sleep(SECONDS / 4)  # the chance of this run
            await flush(broker)
            await asyncio.sleep(SECONDS / 4)  # the chance of this run
            broker.kill()
            await asyncio.sleep(SECONDS / 8)  # the length of this outage
            await broker.start()
            await asyncio.sleep(SECONDS / 4)  # the chance of this run
            await flush(broker)
            await asyncio.sleep(SECONDS / 4)  # the chance of this run

        await storm.run(faults())
        await storm.end(reasons=("epoch", "broker", "first"))
    assert not bugs(caplog)


async def test_a_broker_that_stores_on_disk_goes_on_where_it_was(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """JetStream that is killed and started again has everything: there is no gap."""
    async with storm_on("nats") as (storm, broker, _, _):

        async def faults() -> None:
            for _ in range(2):
                await asyncio.sleep(SECONDS / 3)  # the chance of this run
                broker.kill()
                await asyncio.sleep(SECONDS / 8)  # the length of this outage
                await broker.start()
            await asyncio.sleep(SECONDS / 3)  # the chance of this run

        await storm.run(faults())
        await storm.end(reasons=("first",))
    assert not bugs(caplog)


# A cut after any octet


class Conversation:
    """A client that comes back and hears of two groups, and another one who speaks."""

    def __init__(self, processes: int) -> None:
        self.groups = ("room:0", "room:1")
        self.stack = contextlib.AsyncExitStack()
        self.processes = processes
        self.hubs = [Hub() for _ in range(processes)]

    async def begin(self) -> None:
        """Start the servers, the proxy in front of the first, and the other client."""
        broker = pachinko_cluster.SimulatedBroker()
        self.servers: list[Server] = []
        for hub in self.hubs:
            if self.processes > 1:
                hub.configure(broker.connection())
            server = serving(history_app(hub), log_config=None)
            self.servers.append(await self.stack.enter_async_context(server))
        self.proxy = await self.stack.enter_async_context(Proxy(self.servers[0].port))
        self.speaker = Follower(Published(), "")
        self.life = await come(self.speaker, self.servers[-1].url)
        self.passed = await self.hold(None, "query")

    async def speak(self, published: Published, count: int) -> list[Send]:
        """Send *count* messages to each group; return the last ones."""
        self.life.follower = Follower(published, "speaker")
        last: list[Send | None] = []
        for _ in range(count):
            last = [await say(self.life, group, size=50) for group in self.groups]
        assert all(last)
        return [each for each in last if each is not None]

    async def hold(self, cut: Cut | None, how: str) -> dict[Any, int]:
        """Come, leave, come back up to *cut*, and come back; check what was heard."""
        published = Published()
        follower = Follower(published, "client")

        async def hears(last: list[Send], life: Life) -> None:
            await until(lambda: life.is_over or all(map(follower.has, last)))

        self.proxy.cut = None
        life = await come(follower, self.servers[-1].url, *self.groups)
        await until(lambda: len(follower.verdicts) == 2)
        await life.cut()
        last = await self.speak(published, 2)
        self.proxy.cut = cut
        with contextlib.suppress(*ENDED), no_timeout():
            life = await come(follower, self.proxy.url, *self.groups, how=how)
            await hears(last, life)
            await until(lambda: life.is_over or len(follower.verdicts) == 2)
            await say(life, self.groups[0], others=True)
            last = await self.speak(published, 2)
            await say(life, self.groups[1])
            await hears(last, life)
            await life.close()
        passed = dict(self.proxy.passed)
        last = await self.speak(published, 1)
        life = await come(follower, self.servers[-1].url, *self.groups, how=how)
        await hears(last, life)
        await until(lambda: len(follower.verdicts) == 2)
        follower.is_at_the_end = True
        await life.cut()
        published.check()
        await asyncio.wait_for(self.proxy.idle(), PATIENCE)
        return passed


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("round", range(-(-EXAMPLES // ROUND)))
def test_a_client_that_is_cut_after_any_octet_misses_nothing(
    round: int, processes: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It comes back with the position that it has, to the same process or to another one."""
    talk = Conversation(processes)
    with asyncio.Runner() as runner:
        runner.run(talk.begin())
        end = talk.passed

        @settings(
            max_examples=min(EXAMPLES, ROUND), deadline=None, derandomize=not IS_NIGHTLY,
            database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate],
        )  # fmt: skip
        @given(
            toward=st.sampled_from(["client", "server"]),
            by=st.sampled_from(["FIN", "RST"]),
            share=st.integers(0, 1000),
            how=st.sampled_from(["query", "message", "authenticate"]),
        )
        def check(toward: Any, by: Any, share: int, how: str) -> None:
            runner.run(talk.hold(Cut(toward, end[toward] * share // 1000, by), how))

        try:
            check()
            runner.run(talk.life.cut())
            for hub in talk.hubs:
                runner.run(empty(hub))
        finally:
            runner.run(talk.stack.aclose())
    assert not bugs(caplog)
