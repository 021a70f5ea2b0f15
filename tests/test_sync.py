"""`SyncHub` reaches clients from code without an event loop, by real brokers."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.request import urlopen

import cattrs
import pytest
from brokers import BrokerKind, BrokerProcess, environment, running
from ports import free_port
from support import PATIENCE, Client, connect, new_app, serving, until

import pachinko
import pachinko_cluster
from pachinko import BrokerAway, Connection, Hub, Pachinko, PachinkoError, SyncHub
from pachinko_cluster import HubThread

PROMISE = 5.0  # seconds until a call has failed when the broker is away
SLACK = PROMISE - pachinko_cluster._BROKER_WAIT  # seconds of them for all but the wait
LIMIT = 60  # seconds for a program of a test

each_broker = pytest.mark.parametrize("kind", ["nats", "redis"])


def threads() -> list[HubThread]:
    return [each for each in threading.enumerate() if isinstance(each, HubThread)]


@pytest.fixture(autouse=True)
async def no_thread_is_left() -> AsyncIterator[None]:
    """Whatever a test has done, no thread of a `SyncHub` goes on."""
    yield
    if threads():
        gc.collect()
    await until(lambda: threads() == [])


class Scene:
    """A broker, an app on it whose clients join groups, and a `SyncHub`."""

    def __init__(self, broker: BrokerProcess, url: str, namespace: str | None) -> None:
        self.broker, self.url, self.namespace = broker, url, namespace

    def member(self, group: str = "room", user: str = "ada") -> Any:
        return connect(f"{self.url}/ws?group={group}&user={user}")


@contextlib.asynccontextmanager
async def scene(kind: BrokerKind, *options: str, namespace: str | None = None) -> Any:
    async with running(kind, *options) as broker:
        own = Hub()
        own.configure(broker.url, namespace=namespace)
        app = new_app()
        ws = Pachinko(app, "/ws", hub=own)

        @ws.connect
        async def arrive(conn: Connection) -> None:
            conn.user = conn.req.get_param("user", required=True)
            await conn.join(conn.req.get_param("group", required=True))

        @ws.accepted
        async def came(conn: Connection) -> None:
            await conn.send("welcome", conn.id)

        async with serving(app) as server:
            yield Scene(broker, server.url, namespace)


async def call(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call *method* in a thread, and return its result within the time of a test."""
    return await asyncio.wait_for(asyncio.to_thread(method, *args, **kwargs), PATIENCE)


async def welcome(client: Client) -> str:
    """Return the id of the connection that *client* has got."""
    message = await client.receive()
    assert message["type"] == "welcome", message
    return str(message["payload"])


async def heard(client: Client) -> tuple[str, Any]:
    message = await client.receive()
    return message["type"], message.get("payload")


async def fails(method: Callable[..., Any], *args: Any) -> str:
    """Call *method*, which must fail as promised when the broker is away; return the text."""
    while True:  # A signal takes a moment to stop the broker.
        begun = time.monotonic()
        try:
            await call(method, *args)
        except BrokerAway as exc:
            assert time.monotonic() - begun < pachinko_cluster._BROKER_WAIT + SLACK
            return str(exc)


async def works(method: Callable[..., Any], *args: Any) -> Any:
    """Call *method* until it works, and return its result."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(BrokerAway):
                return await call(method, *args)
            await asyncio.sleep(0.05)  # the hub reconnects by itself


# Each method


@each_broker
async def test_each_method_reaches_clients(kind: BrokerKind) -> None:
    """What is sent arrives, and each method returns what that of the hub does."""
    async with scene(kind) as at, at.member() as ada, at.member("other", "bob") as bob:
        id, other = await welcome(ada), await welcome(bob)
        with SyncHub(at.broker.url) as hub:
            assert await call(hub.send, "room", "said", {"n": 1}) is None
            assert await heard(ada) == ("said", {"n": 1})
            assert await call(hub.broadcast, "all", exclude=[other]) is None
            assert await call(hub.broadcast, "all", 2, exclude=id) is None
            assert await heard(ada) == ("all", None)
            assert await heard(bob) == ("all", 2)
            assert await call(hub.send, "room", "secret", exclude=id) is None
            assert await call(hub.send_to, id, "one", 3) is None
            assert await heard(ada) == ("one", 3)
            assert await call(hub.send_to_user, "bob", "two", 4) is None
            assert await heard(bob) == ("two", 4)
            (found,) = await call(hub.presence, "room")
            assert isinstance(found, pachinko.Presence) and (found.id, found.user) == (id, "ada")
            assert [each.id for each in await call(hub.presence, user="bob")] == [other]
            assert await call(hub.close_group, "room", 4000, "over") is None
            assert await ada.closed() == (4000, "over")


@each_broker
async def test_each_method_for_one_connection(kind: BrokerKind) -> None:
    """A client is asked, and its connection is put into groups and closed, by its id."""
    async with scene(kind) as at, at.member() as ada, at.member("other", "bob") as bob:
        id = await welcome(ada)
        await welcome(bob)
        with SyncHub(at.broker.url) as hub:
            assert await call(hub.join, "more", id) is None
            await call(hub.send, "more", "said", 1)
            assert await heard(ada) == ("said", 1)
            assert await call(hub.leave, "more", id) is None
            await call(hub.send, "more", "said", 2)
            asking = asyncio.create_task(call(hub.ask, id, "sum", {"a": 1}, returns=int))
            question = await ada.receive()
            assert (question["type"], question["payload"]) == ("sum", {"a": 1})
            await ada.send("sum.reply", 5, question["id"])
            assert await asking == 5
            with pytest.raises(TimeoutError):
                await call(lambda: hub.ask(id, "sum", timeout=0.1))
            assert (await ada.receive())["type"] == "sum"
            assert await call(hub.close, id, 4001, "over") is None
            assert await ada.closed() == (4001, "over")
            assert await call(hub.close_user, "bob", 4002, "out") is None
            assert await bob.closed() == (4002, "out")


async def test_what_the_hub_refuses_is_raised() -> None:
    """A wrong name, a payload without JSON, an id of nobody: as with the hub."""
    async with running("nats") as broker:
        with SyncHub(broker.url) as hub:
            with pytest.raises(TypeError, match="named by a str"):
                await call(hub.send, 5, "said")
            with pytest.raises(TypeError):
                await call(hub.send, "room", "said", object())
            with pytest.raises(TypeError, match="not both"):
                await call(hub.presence, "room", user="ada")
            with pytest.raises(TypeError, match="named by a str"):
                await call(hub.presence)
            with pytest.raises(ValueError, match="close code"):
                await call(hub.close_group, "room", 1)
            await call(hub.send_to, "0" * 24, "said")


@each_broker
async def test_threads_share_one_connection(kind: BrokerKind) -> None:
    """32 at once begin with the first call; nothing is lost, and each keeps its order."""
    monitor = free_port()
    options = ("-m", str(monitor)) if kind == "nats" else ()

    async def connections() -> int:
        if kind == "nats":
            with await asyncio.to_thread(urlopen, f"http://127.0.0.1:{monitor}/connz") as answer:
                return len(json.load(answer)["connections"])
        reader, writer = await asyncio.open_connection("127.0.0.1", at.broker.port)
        writer.write(b"CLIENT LIST\r\n")
        size = int((await reader.readline())[1:])
        lines = (await reader.readexactly(size)).decode().splitlines()
        writer.close()
        return sum(" name=pachinko " in line for line in lines)

    async with scene(kind, *options) as at, at.member() as ada:
        await welcome(ada)
        before = await connections()
        barrier = threading.Barrier(32)
        with SyncHub(at.broker.url) as hub, ThreadPoolExecutor(32) as pool:

            def work(thread: int) -> None:
                barrier.wait(PATIENCE)
                for n in range(10):
                    hub.send("room", "n", [thread, n])

            loop = asyncio.get_running_loop()
            done = asyncio.gather(*(loop.run_in_executor(pool, work, n) for n in range(32)))
            received = [(await heard(ada))[1] for _ in range(320)]
            await done
            assert len(threads()) == 1
            # A process has two connections to Redis: one to publish, and one to subscribe.
            assert await connections() - before == {"nats": 1, "redis": 2}[kind]
        for thread in range(32):
            assert [n for t, n in received if t == thread] == list(range(10))


# The broker goes away


@each_broker
async def test_the_broker_comes_late_goes_and_comes_back(kind: BrokerKind) -> None:
    """A start that fails spoils nothing, and after an outage it works by itself."""
    broker = BrokerProcess(kind)
    with SyncHub(broker.url) as hub, ThreadPoolExecutor(32) as pool:
        loop = asyncio.get_running_loop()
        calls = [loop.run_in_executor(pool, hub.send, "room", "early") for _ in range(32)]
        begun = time.monotonic()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(each) for each in results} == {BrokerAway}
        assert time.monotonic() - begun < PROMISE
        assert str(broker.port) in str(results[0])
        try:
            await broker.start()
            await call(hub.send, "room", "again")
            await until(lambda: len(threads()) == 1)  # Those of the first calls end by themselves.
            (thread,) = threads()
            broker.kill()
            await fails(hub.send, "room", "away")
            await fails(hub.presence, "room")
            await broker.start()
            await works(hub.send, "room", "back")
            assert threads() == [thread]
        finally:
            broker.kill()
            broker.folder.cleanup()


@each_broker
async def test_a_broker_that_hangs(kind: BrokerKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is away as well, for a first call and for a later one, until it goes on."""
    for name in ("_BROKER_WAIT", "_CONNECT"):  # A `Silent` is waited for as long as others wait.
        monkeypatch.setattr(pachinko_cluster, name, getattr(pachinko_cluster, name) / 5)
    async with running(kind) as broker:
        with SyncHub(broker.url) as hub:
            broker.pause()
            await fails(hub.send, "room", "first")
            broker.resume()
            await works(hub.send, "room", "said")
            broker.pause()
            await fails(hub.send, "room", "second")
            broker.resume()
            await works(hub.send, "room", "said")


class Silent:
    """A backplane whose broker lets a process in, and does not answer it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def start(self, deliver: Any, lost: Any) -> None:
        self.calls.append("start")

    async def publish(self, subject: str, data: bytes) -> int | None:
        await asyncio.Event().wait()
        return None

    async def subscribe(self, subject: str) -> None:
        self.calls.append("subscribe")
        await asyncio.Event().wait()

    async def unsubscribe(self, subject: str) -> None: ...

    async def stop(self) -> None:
        self.calls.append("stop")


async def test_a_broker_that_lets_in_and_does_not_answer() -> None:
    """The call fails in time, though the attempt goes on; the end does not wait for that."""
    backplane = Silent()
    with SyncHub(backplane) as hub:
        assert "has not answered within 4 s" in await fails(hub.send, "room", "said")
        assert backplane.calls == ["start", "subscribe", "subscribe"]
        begun = time.monotonic()
    assert time.monotonic() - begun < PROMISE
    assert backplane.calls[-1] == "stop" and threads() == []


# Construction


@pytest.mark.parametrize(
    ("arguments", "variable", "text"),
    [
        ({}, None, r'SyncHub\("nats://localhost:4222"\).*PACHINKO_BACKPLANE'),
        ({}, "", "PACHINKO_BACKPLANE"),
        ({}, "memory://", "memory:// reaches no other process"),
        ({"url": "memory://?namespace=a"}, None, "memory:// reaches no other process"),
        ({"url": "memory://"}, "nats://localhost", "memory:// reaches no other process"),
        ({"url": "http://ada:s3cret@localhost"}, None, "a backplane is a URL such as"),
        ({"url": ""}, "nats://localhost", "a backplane is a URL such as"),
        (
            {},
            "nats://ada:s3cret@local host",
            "URL such as .* in PACHINKO_BACKPLANE",
        ),
        ({"url": "redis://:s3cret@localhost?no=1"}, None, "another option"),
        ({"url": "nats://localhost?no=1"}, None, "knows the options"),
        ({"url": "nats://localhost", "namespace": "a.b"}, None, "a namespace has"),
    ],
)
def test_a_mistake_fails_at_the_construction(
    arguments: dict[str, Any], variable: str | None, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named where it was made, with its cure, and without a password."""
    monkeypatch.delenv("PACHINKO_BACKPLANE", raising=False)
    if variable is not None:
        monkeypatch.setenv("PACHINKO_BACKPLANE", variable)
    with pytest.raises(PachinkoError, match=text) as caught:
        SyncHub(**arguments)
    assert "s3cret" not in str(caught.value)
    gc.collect()  # what is left of it does not fail


@pytest.mark.parametrize("url", [Hub(), SyncHub, 5, ["nats://localhost"]])
def test_what_is_no_broker_is_refused(url: Any) -> None:
    """With both right forms, and its class."""
    text = r'SyncHub\("nats://localhost:4222"\), or give an object with `async def` start'
    with pytest.raises(TypeError, match=text) as caught:
        SyncHub(url)
    assert str(caught.value).endswith(f"got {type(url).__name__}")


@pytest.mark.parametrize("wrong", [{"url": 5}, {"url": Silent}, {"converter": 5}])
def test_a_wrong_object_is_a_type_error(wrong: dict[str, Any]) -> None:
    """As with `Hub.configure`."""
    with pytest.raises(TypeError):
        SyncHub(**{"url": "nats://localhost", **wrong})


async def test_the_settings_are_those_of_the_hub() -> None:
    """The URL of the environment, a namespace and a converter are used."""
    converter = Hub().converter.copy()
    converter.register_unstructure_hook(complex, lambda value: [value.real, value.imag])
    async with scene("nats", namespace="shop") as at, at.member() as ada:
        await welcome(ada)
        with environment(PACHINKO_BACKPLANE=at.broker.url):
            hub = SyncHub(namespace="shop", converter=converter)
        with hub, SyncHub(f"{at.broker.url}?namespace=other") as other:
            await call(other.send, "room", "elsewhere")
            await call(hub.send, "room", "number", 1 + 2j)
            assert await heard(ada) == ("number", [1.0, 2.0])


async def test_a_payload_is_encoded_with_the_context_of_the_caller() -> None:
    """A hook of the converter sees the caller's context variables, as lazy texts of Django do."""
    language = contextvars.ContextVar("language", default="none")
    converter = Hub().converter.copy()
    converter.register_unstructure_hook(complex, lambda value: language.get())
    async with scene("nats") as at, at.member() as ada:
        await welcome(ada)
        with SyncHub(at.broker.url, converter=converter) as hub:
            for name in ("en", "de"):
                language.set(name)
                await call(hub.send, "room", "language", 1j)
                assert await heard(ada) == ("language", name)


async def test_nothing_happens_before_the_first_call() -> None:
    """To make one takes neither a thread nor a broker, and to stop it does no harm."""
    hub = SyncHub(f"nats://127.0.0.1:{free_port()}", converter=cattrs.Converter())
    assert threads() == []
    hub.stop()
    hub.stop()


# The end


@each_broker
async def test_it_is_stopped_and_used_again(kind: BrokerKind) -> None:
    """The connection has ended then; a later call makes another one."""
    async with scene(kind) as at, at.member() as ada:
        await welcome(ada)
        with SyncHub(at.broker.url) as hub:
            for n in range(3):
                await call(hub.send, "room", "n", n)
                assert await heard(ada) == ("n", n)
                hub.stop()
                assert threads() == []


async def test_a_stop_fails_the_calls_in_progress() -> None:
    """They do not wait for ever."""
    async with scene("nats") as at:
        with SyncHub(at.broker.url) as hub:
            await call(hub.send, "room", "said")
            asking = asyncio.create_task(call(hub.presence, "room"))  # it takes 0.4 seconds
            (thread,) = threads()
            await until(lambda: thread.hub.state.calls)
            await call(hub.stop)
            with pytest.raises(PachinkoError, match="stopped"):
                await asking


async def test_a_stop_fails_the_calls_that_wait_for_a_connection() -> None:
    """They say so at once."""
    with SyncHub(Silent()) as hub:
        calling = asyncio.create_task(call(hub.send, "room", "said"))
        await until(threads)
        begun = time.monotonic()
        await call(hub.stop)
        with pytest.raises(BrokerAway, match="stopped before it was connected"):
            await calling
        assert time.monotonic() - begun < 3


async def test_one_that_nobody_has_any_more_disconnects() -> None:
    """Its thread does not keep it."""
    async with running("nats") as broker:
        hub = SyncHub(broker.url)
        await call(hub.send, "room", "said")
        gone = weakref.ref(hub)
        del hub
        await until(lambda: gc.collect() >= 0 and gone() is None and threads() == [])


async def test_a_thread_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a `PachinkoError`, and the next call tries again."""
    async with running("nats") as broker:
        with SyncHub(broker.url) as hub:
            with monkeypatch.context() as patch:

                def start(_: object) -> None:
                    raise RuntimeError("can't start new thread")

                patch.setattr(HubThread, "start", start)
                with pytest.raises(PachinkoError, match="a SyncHub needs a thread: can't start"):
                    await call(hub.send, "room", "said")
            with monkeypatch.context() as patch:

                def fail() -> Any:
                    raise OSError(24, "Too many open files")

                patch.setattr(asyncio, "Runner", fail)
                with pytest.raises(BrokerAway, match="Too many open files"):
                    await call(hub.send, "room", "said")
            await call(hub.send, "room", "said")


def test_a_stopped_thread_is_told_again() -> None:
    """Its loop has been closed; nothing is logged of that."""
    hub = Hub()
    hub.configure(Silent())
    thread = HubThread(hub)
    thread.end()
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_ours and thread.has_failed
    thread.end()


async def test_the_end_of_the_program_ends_all_threads() -> None:
    """Each of them disconnects."""
    async with running("nats") as broker:
        hubs = [SyncHub(broker.url) for _ in range(3)]
        for hub in hubs:
            await call(hub.send, "room", "said")
        assert len(threads()) == 3
        await call(pachinko_cluster.stop_threads)
        assert threads() == []
        await call(hubs[0].send, "room", "said")
        hubs[0].stop()


async def test_another_process_leaves_the_thread_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fork that Python has not noticed, an end in the child is none in the parent."""
    async with running("nats") as broker:
        with SyncHub(broker.url) as hub:
            await call(hub.send, "room", "said")
            (thread,) = threads()
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 1)
                assert not thread.is_ours
                thread.end()
            await call(hub.send, "room", "said")
            assert threads() == [thread]


# Where it is called


async def test_a_call_in_an_event_loop() -> None:
    """It would block the loop: it is refused, with what to write, and nothing has been started."""
    hub = SyncHub(f"nats://127.0.0.1:{free_port()}")
    with pytest.raises(PachinkoError, match=r"`await hub\.send\(\.\.\.\)`"):
        hub.send("room", "said")
    with pytest.raises(PachinkoError, match=r"`await hub\.presence\(\.\.\.\)`"):
        hub.presence(user="ada")
    assert threads() == []


async def test_a_call_in_the_event_loop_of_another_thread() -> None:
    """It is refused there as well, also if the thread looks like one of ours."""

    class LoopThread(threading.Thread):
        text = ""

        def run(self) -> None:
            asyncio.run(self.main())

        async def main(self) -> None:
            self.loop = asyncio.get_running_loop()
            try:
                hub.send("room", "said")
            except PachinkoError as exc:
                self.text = str(exc)

    async with running("nats") as broker:
        with SyncHub(broker.url) as hub:
            await call(hub.send, "room", "said")
            thread = LoopThread()
            thread.start()
            await call(thread.join)
            assert "would block the event loop" in thread.text


async def test_a_call_in_its_own_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for itself. A thread of gevent that sees this loop is another matter."""
    async with running("nats") as broker:
        with SyncHub(broker.url) as hub:
            await call(hub.send, "room", "said")
            (thread,) = threads()
            inside = thread.hub.call_threadsafe(hub.send, "room", "said")
            with pytest.raises(PachinkoError, match="would block the event loop"):
                await asyncio.wrap_future(inside)
            with monkeypatch.context() as patch:
                patch.setattr(threading, "current_thread", threading.main_thread)
                inside = thread.hub.call_threadsafe(pachinko_cluster.is_in_loop)
                assert await asyncio.wrap_future(inside) is False


def test_the_name_is_the_companions() -> None:
    """The module finds it; other names are missing as ever."""
    assert pachinko.SyncHub is pachinko_cluster.SyncHub
    assert "SyncHub" not in pachinko.__all__
    for name in ("__wrapped__", "__mro_entries__", "SyncHubs", "_SyncHub"):
        assert not hasattr(pachinko, name)
    with pytest.raises(AttributeError, match="module 'pachinko' has no attribute 'synchub'"):
        _ = pachinko.synchub  # type: ignore[attr-defined]  # that is the test


@pytest.mark.parametrize("lost", ["file", "name"])
def test_without_the_companion(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said where the file is missing, or is of another version; all else works."""
    if lost == "file":
        monkeypatch.setitem(sys.modules, "pachinko_cluster", None)  # its import fails
    else:
        monkeypatch.delattr(pachinko_cluster, "SyncHub")
    with pytest.raises(PachinkoError, match=r"SyncHub needs pachinko_cluster\.py of the same"):
        _ = pachinko.SyncHub
    with pytest.raises(PachinkoError, match=r"pachinko_cluster\.py"):
        exec("from pachinko import SyncHub", {})
    exec("from pachinko import *", names := dict[str, Any]())
    assert "Hub" in names and "SyncHub" not in names


# Programs


PRELUDE = """
import contextlib, os, signal, sys, threading, time, warnings
from pachinko import PachinkoError, SyncHub
warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)  # of Python 3.12
hub = SyncHub(sys.argv[1])

def fork(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except Exception:  # whatever fails in the child is shown
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(1)
        sys.exit()
    return pid

def wait(*pids):
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
"""


async def run(code: str, *arguments: str) -> tuple[int, str]:
    """Run a program that warns of what it leaves open; return its exit status and its output."""
    command = [sys.executable, "-W", "error", "-c", PRELUDE + code, *arguments]

    def work() -> tuple[int, str]:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"}, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout

    return await asyncio.to_thread(work)


LATE = """
import atexit
def late():
    try:
        hub.send("room", "said")
    except PachinkoError as exc:
        assert "a SyncHub needs a thread" in str(exc), exc
    print("done")
atexit.register(late)
"""


async def test_a_first_call_at_the_end_of_the_program() -> None:
    """It works where Python still starts a thread, and is a `PachinkoError` where it does not."""
    async with running("nats") as broker:
        assert await run(LATE, broker.url) == (0, "done\n")
