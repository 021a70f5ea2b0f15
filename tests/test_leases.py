"""Workers that run in one process of the cluster at a time, and warnings of split processes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, get_args

import falcon.asgi
import pytest
import websockets.exceptions
from brokers import BrokerKind, BrokerProcess, connect_to_nats, running
from support import PATIENCE, connect, new_app, serving, until

import pachinko
import pachinko_cluster
from pachinko import Hub, Pachinko, PachinkoError, Simulation, simulate
from pachinko_cluster import Nats, Redis

ROOT = Path(__file__).parent.parent


@contextlib.asynccontextmanager
async def with_leases(kind: BrokerKind) -> AsyncIterator[BrokerProcess]:
    """A broker that has leases: NATS with JetStream, or any Redis."""
    async with running(kind, *(("-js", "-sd", "store") if kind == "nats" else ())) as broker:
        yield broker


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that waits for a lease asks for it all the time."""
    monkeypatch.setattr(pachinko_cluster, "_TRY", 0.05)


async def forever() -> None:
    await asyncio.Event().wait()


class Scene:
    """Processes of one app, all in this one, and which of them the worker runs in."""

    def __init__(self, url: Any, work: Callable[[], Awaitable[None]] = forever) -> None:
        self.url, self.work = url, work
        self.here: list[str] = []  # the names of the processes, now
        self.began: list[str] = []  # the same, of all times
        self.ends: dict[str, str] = {}
        self.hubs: dict[str, Hub] = {}

    def app(self, name: str, **options: Any) -> falcon.asgi.App[Any, Any]:
        app, hub = new_app(), Hub()
        self.hubs[name] = hub
        hub.configure(self.url, **options)
        ws = Pachinko(app, "/ws", hub=hub)

        @ws.worker(once=True)
        async def work() -> None:
            self.here.append(name)
            self.began.append(name)
            try:
                await self.work()
            finally:
                self.here.remove(name)

        return app

    def process(self, name: str, **options: Any) -> Any:
        return serving(self.app(name, **options))

    def has_asked(self, name: str) -> bool:
        """Whether that process knows who has the lease."""
        relay: Any = self.hubs[name].state.relay
        return any(lease._answered > 0 for lease in relay._leases.values())

    def simulated(self) -> Simulation:
        """The same processes on a simulated broker, with the names "a", "b" and so on."""
        names = iter("abc")
        return simulate(lambda: self.app(next(names)))


async def startup(app: falcon.asgi.App[Any, Any]) -> dict[str, Any]:
    """Run the lifespan of *app*, and return what its start answers to the server."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "lifespan.shutdown" if sent else "lifespan.startup"}

    async def send(event: dict[str, Any]) -> None:
        sent.append(event)

    scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}}
    async with asyncio.timeout(PATIENCE):
        await app(scope, receive, send)
    return sent[0]


async def refusal(url: Any) -> str:
    """What the start of an app with such a worker on this broker fails with."""
    answer = await startup(Scene(url).app("a"))
    assert answer["type"] == "lifespan.startup.failed"
    return str(answer["message"])


# Registration


def endpoint() -> Pachinko:
    return Pachinko(new_app(), "/ws", hub=Hub())


async def clock() -> None: ...


def test_each_way_to_write_it_returns_the_function() -> None:
    """A decorator with the option, with False, without parentheses, and a plain call."""
    assert endpoint().worker(once=True)(clock) is clock
    assert endpoint().worker(once=False)(clock) is clock
    assert endpoint().worker(clock) is clock
    assert endpoint().worker(clock, once=True) is clock


@pytest.mark.parametrize("function", [lambda: None, 5, endpoint])
def test_the_corrected_code_has_the_option(function: Any) -> None:
    """A function that is no worker is refused, with an example that has what was written."""
    with pytest.raises(PachinkoError) as caught:
        endpoint().worker(once=True)(function)
    assert "@ws.worker(once=True)\nasync def " in str(caught.value)


@pytest.mark.parametrize("once", ["yes", 1, 0, []])
def test_the_option_is_true_or_false(once: Any) -> None:
    """Anything else is refused where it is written."""
    with pytest.raises(PachinkoError, match=r"write @ws\.worker\(once=True\), got once="):
        endpoint().worker(once=once)


def make() -> Callable[[], Awaitable[None]]:
    async def made() -> None: ...

    return made


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (clock, clock),
        (make(), make()),
        (functools.partial(clock), clock),
        (functools.wraps(clock)(make()), clock),
    ],
)
def test_two_of_one_name_are_refused(first: Any, second: Any) -> None:
    """Their lease would be the same; the text names both and shows what to write."""
    ws = endpoint()
    ws.worker(once=True)(first)
    with pytest.raises(PachinkoError) as caught:
        ws.worker(once=True)(second)
    text = str(caught.value)
    assert text.count("test_leases.py") == 2 and "test_leases." in text
    assert text.endswith("@ws.worker(once=True)\nasync def another_name(): ...")
    ws.worker(second)  # in each process
    endpoint().worker(once=True)(second)  # another endpoint


# Without a broker


@pytest.mark.parametrize("url", [None, "memory://"])
async def test_without_a_broker_it_runs_at_once(url: str | None) -> None:
    """The lease is this process's."""
    scene = Scene(url)
    async with scene.process("a"):
        await until(lambda: scene.here == ["a"])
    assert scene.began == ["a"] and not scene.here


async def test_one_added_later_runs_at_once() -> None:
    """An endpoint that has started starts it."""
    app, hub = new_app(), Hub()
    ws, ran = Pachinko(app, "/ws", hub=hub), list[str]()
    async with serving(app):

        @ws.worker(once=True)
        async def later() -> None:
            ran.append("later")

        await until(lambda: ran)


# In one process at a time


async def test_it_runs_in_one_process_and_then_in_the_other(
    kind: BrokerKind, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that ends gives the lease up; the next one says that the worker runs there."""
    caplog.set_level(logging.INFO, "pachinko")
    async with with_leases(kind) as broker:
        scene = Scene(broker.url)
        async with scene.process("b"), contextlib.AsyncExitStack() as stack:
            await until(lambda: scene.here == ["b"])
            await stack.enter_async_context(scene.process("a"))
            await asyncio.wait_for(stack.aclose(), PATIENCE)
            assert scene.began == ["b"]
        async with scene.process("c"):
            await until(lambda: scene.here == ["c"])
            async with scene.process("d"):
                pass
    assert scene.began == ["b", "c"] and not scene.here
    assert caplog.text.count("runs here now (process ") == 2


@pytest.mark.usefixtures("impatient")
async def test_the_next_one_has_waited(kind: BrokerKind) -> None:
    """A process that was there all the time takes over when the first one stops."""
    async with with_leases(kind) as broker:
        scene = Scene(broker.url)
        first, second = scene.process("a"), scene.process("b")
        await first.__aenter__()
        await until(lambda: scene.here == ["a"])
        async with second:
            await first.__aexit__(None, None, None)
            await until(lambda: scene.here == ["b"])
    assert scene.began == ["a", "b"]


async def test_each_namespace_has_its_own(kind: BrokerKind) -> None:
    """Two apps on one broker do not wait for one another."""
    async with with_leases(kind) as broker:
        scene = Scene(broker.url)
        async with scene.process("a"), scene.process("b", namespace="shop"):
            await until(lambda: sorted(scene.here) == ["a", "b"])


async def test_a_worker_that_fails_is_run_by_the_next_process(
    kind: BrokerKind, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives its lease up while it waits for its next start; `sys.exit` is such a failure."""
    monkeypatch.setattr(pachinko, "_BACKOFFS", (60.0,))
    bugs = iter([SystemExit(3), ValueError("a bug")])

    async def work() -> None:
        if (bug := next(bugs, None)) is not None:
            raise bug
        await forever()

    async with with_leases(kind) as broker:
        scene = Scene(broker.url, work)
        async with scene.process("a"), scene.process("b"), scene.process("c"):
            await until(lambda: len(scene.began) == 3 and scene.here)
    assert sorted(scene.began) == ["a", "b", "c"]
    assert caplog.text.count("failed; again in 60 s") == 2
    assert "sys.exit() in worker" in caplog.text and "ValueError: a bug" in caplog.text


async def test_a_worker_that_returns_is_run_by_the_next_process(kind: BrokerKind) -> None:
    """Each process runs it once, one after the other."""

    async def work() -> None: ...

    async with with_leases(kind) as broker:
        scene = Scene(broker.url, work)
        async with scene.process("a"), scene.process("b"):
            await until(lambda: sorted(scene.began) == ["a", "b"])


async def test_without_such_a_worker_the_broker_has_no_lease(kind: BrokerKind) -> None:
    """What is not used costs nothing: no key, no bucket, no subscription."""
    app, hub, ran = new_app(), Hub(), list[int]()
    async with with_leases(kind) as broker:
        hub.configure(broker.url)

        @Pachinko(app, "/ws", hub=hub).worker
        async def each() -> None:
            ran.append(1)

        async with serving(app):
            await until(lambda: ran)
            if kind == "redis":
                assert await command(broker, "KEYS *") == b"*0"
            else:
                assert not (Path(broker.folder.name) / "store/jetstream/$G").exists()


async def command(broker: BrokerProcess, text: str) -> bytes:
    """The first line of Redis' reply."""
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
    writer.write(f"{text}\r\n".encode())
    reply = await asyncio.wait_for(reader.readline(), PATIENCE)
    writer.close()
    return reply.rstrip()


# The broker goes and comes


async def test_a_restart_of_the_broker_interrupts_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The holder goes on, and nobody else starts, even where Redis comes back without its keys."""

    async def restart(kind: BrokerKind) -> None:
        async with with_leases(kind) as broker:
            scene = Scene(broker.url)
            async with scene.process("a"):
                await until(lambda: scene.here == ["a"])
                async with scene.process("b"):
                    await until(lambda: scene.has_asked("b"))
                    await broker.restart()
                    await until(lambda: caplog.text.count(f"{broker.url}: connected, with") == 2)
                    await asyncio.sleep(pachinko_cluster.LEASE)  # Until then another may take it.
        assert scene.began == ["a"]

    await asyncio.gather(*map(restart, get_args(BrokerKind)))  # both wait for real seconds
    assert "is stopped here" not in caplog.text


async def test_a_worker_that_fails_with_its_broker_goes_on_where_it_was(
    kind: BrokerKind, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has not given its lease up, and takes it again without a wait for its end."""
    monkeypatch.setattr(pachinko, "_BACKOFFS", (0.1,))
    is_away = asyncio.Event()

    async def work() -> None:
        await is_away.wait()
        if len(scene.began) == 1:
            raise pachinko.BrokerAway("no message was taken")
        await forever()

    async with with_leases(kind) as broker:
        scene = Scene(broker.url, work)
        async with scene.process("a"):
            await until(lambda: scene.here == ["a"])
            async with scene.process("b"):
                await asyncio.sleep(0.1)  # It asks for the lease at once.
                broker.kill()
                await until(lambda: caplog.text.count("is lost: ") == 2)
                is_away.set()
                await until(lambda: not scene.here)
                begun = asyncio.get_running_loop().time()
                await broker.start()
                await until(lambda: scene.here)
                assert asyncio.get_running_loop().time() - begun < pachinko_cluster.LEASE
    assert scene.began == ["a", "a"]


@pytest.mark.usefixtures("impatient")
async def test_two_of_one_name_without_a_path_take_turns() -> None:
    """Their lease is the same, within a process too."""
    hub, apps, ran = Hub(), [new_app(), new_app()], list[str]()

    async def work() -> None:
        ran.append("began")
        await asyncio.sleep(0.01)  # which lets the other one begin
        ran.append("ended")

    async with with_leases("redis") as broker, contextlib.AsyncExitStack() as stack:
        hub.configure(broker.url)
        for app in apps:
            ws = Pachinko(hub=hub)
            app.add_route("/ws", ws)
            app.add_middleware(ws)
            ws.worker(work, once=True)
            await stack.enter_async_context(serving(app))
        await until(lambda: len(ran) == 4)
    assert ran == ["began", "ended"] * 2


async def test_a_broker_that_stays_away_stops_the_worker_in_time(
    kind: BrokerKind, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows who may run it then; it goes on once the broker is back."""
    time_left = pachinko_cluster.LEASE - pachinko_cluster._HOLD
    for name in ("_HOLD", "_RENEW", "_TRY"):
        monkeypatch.setattr(pachinko_cluster, name, getattr(pachinko_cluster, name) / 3)
    async with with_leases(kind) as broker:
        scene = Scene(broker.url)
        async with scene.process("a"), scene.process("b"):
            await until(lambda: scene.here)
            begun = asyncio.get_running_loop().time()
            broker.signal(signal.SIGSTOP)
            await until(lambda: not scene.here)
            taken = asyncio.get_running_loop().time() - begun
            assert taken < pachinko_cluster._HOLD + time_left
            assert "its lease is lost: it was not renewed for 1.5 s" in caplog.text
            broker.signal(signal.SIGCONT)
            await until(lambda: scene.here)
    assert len(scene.began) == 2


@pytest.mark.usefixtures("impatient")
async def test_an_app_starts_without_its_broker(kind: BrokerKind) -> None:
    """The worker waits for it."""
    async with with_leases(kind) as broker:
        broker.kill()
        scene = Scene(broker.url)
        async with scene.process("a"):
            assert not scene.began
            await broker.start()
            await until(lambda: scene.here == ["a"])


async def take(broker: BrokerProcess) -> None:
    """Write another token into the only lease of a worker."""
    if broker.kind == "redis":
        assert await command(broker, f"SET {await key_of(broker)} other PX 60000") == b"+OK"
        return
    client = await connect_to_nats(broker.url)
    bucket = await client.jetstream().key_value("pachinko-leases")
    (key,) = [each for each in await bucket.keys() if "work" in each]
    await bucket.put(key, b"other", validate_keys=False)
    await client.close()


async def key_of(broker: BrokerProcess) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
    writer.write(b"KEYS *work*\r\n")
    async with asyncio.timeout(PATIENCE):
        lines = [await reader.readline() for _ in range(3)]
    writer.close()
    return lines[2].decode().strip()


@pytest.mark.usefixtures("impatient")
async def test_a_lease_that_another_process_has_stops_the_worker(
    kind: BrokerKind, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs again when the broker has forgotten that lease: Redis is told to, NATS does so."""
    monkeypatch.setattr(pachinko_cluster, "_RENEW", 0.3)
    monkeypatch.setattr(pachinko_cluster, "LEASE", 2.0)
    async with with_leases(kind) as broker:
        scene = Scene(broker.url)
        async with scene.process("a"):
            await until(lambda: scene.here)
            await take(broker)
            await until(lambda: "its lease is lost: another process has it" in caplog.text)
            await until(lambda: not scene.here)
            if kind == "redis":
                await command(broker, f"DEL {await key_of(broker)}")
            await until(lambda: scene.here == ["a"])


@pytest.mark.parametrize("ending", ["passes on", "returns", "fails"])
async def test_a_worker_that_has_lost_its_lease_runs_with_the_next_one(
    ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    """However it ends when it is cancelled."""

    async def work() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            if ending == "fails" and len(scene.began) == 1:
                raise ValueError("a bug in the clean-up") from None
            if ending == "passes on":
                raise

    scene = Scene(None, work)
    async with scene.simulated() as sim:
        await sim.settle()
        give_to_another(sim)
        with sim.bugs(ValueError) if ending == "fails" else contextlib.nullcontext():
            await sim.advance(pachinko_cluster._RENEW)
        assert "its lease is lost: another process has it" in caplog.text and not scene.here
        await sim.advance(pachinko_cluster.LEASE)
        assert not scene.here
        sim.broker.leases.clear()
        await sim.advance(pachinko_cluster._TRY)
        assert scene.here == ["a"]
    assert scene.began == ["a", "a"]
    assert ("a bug in the clean-up" in caplog.text) == (ending == "fails")


async def test_a_worker_that_ignores_its_cancellation_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing can stop it, and another process may run it too."""
    may_end = asyncio.Event()

    async def work() -> None:
        while not may_end.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await may_end.wait()

    scene = Scene(None, work)
    async with scene.simulated() as sim:
        await sim.settle()
        give_to_another(sim)
        await sim.advance(pachinko_cluster._RENEW)
        assert "goes on without its lease" not in caplog.text
        await sim.advance(pachinko_cluster.LEASE - pachinko_cluster._HOLD)
        assert "goes on without its lease" in caplog.text and scene.here == ["a"]
        may_end.set()


# The same by a clock that is moved


def give_to_another(sim: Simulation) -> None:
    """Write another token into the lease of the worker, for ever."""
    (key,) = [each for each in sim.broker.leases if "work" in each]
    sim.broker.leases[key] = "other", math.inf


async def test_it_is_renewed_as_long_as_its_process_lives() -> None:
    """Another process asks for it all the time, and never gets it."""
    scene = Scene(None)
    async with scene.simulated() as sim, sim.process():
        await sim.advance(10 * pachinko_cluster.LEASE)
        assert scene.here == scene.began == ["a"]


async def test_a_killed_process_is_followed_by_another(caplog: pytest.LogCaptureFixture) -> None:
    """Once its lease has ended, for it has given nothing up; it logs nothing."""
    scene = Scene(None)
    async with scene.simulated() as sim, sim.process():
        await sim.advance(3.0)
        sim.kill()
        await sim.advance(pachinko_cluster.LEASE - pachinko_cluster._RENEW - 1.0)
        assert scene.began == ["a"] and not scene.here
        await sim.advance(1.0 + pachinko_cluster._RENEW + pachinko_cluster._TRY)
        assert scene.here == ["b"]
    assert "is stopped here" not in caplog.text


async def test_an_outage_shorter_than_the_lease_interrupts_nothing() -> None:
    """The holder renews it as soon as the broker is back, before anybody else gets it."""
    scene = Scene(None)
    async with scene.simulated() as sim, sim.process():
        await sim.advance(3.0)
        sim.broker.lose()
        await sim.advance(pachinko_cluster._HOLD - pachinko_cluster._RENEW - 1.0)
        assert scene.here == ["a"]
        sim.broker.restore()
        await sim.advance(2 * pachinko_cluster.LEASE)
        assert scene.here == scene.began == ["a"]


async def test_a_broker_that_comes_back_without_its_leases_has_one_holder() -> None:
    """Who waits does not take what the broker may have forgotten while its holder goes on."""
    scene = Scene(None)
    async with scene.simulated() as sim, sim.process(), sim.process():
        await sim.advance(3.0)
        sim.broker.lose()
        sim.broker.leases.clear()
        sim.broker.restore()
        await sim.advance(2 * pachinko_cluster.LEASE)
        assert scene.here == scene.began == ["a"]


async def test_an_outage_longer_than_the_lease_stops_the_worker_in_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Before another process could have it. It goes on where it was once the broker is back."""
    scene = Scene(None)
    async with scene.simulated() as sim, sim.process():
        await sim.advance(3.0)
        sim.broker.lose()
        await sim.advance(pachinko_cluster._HOLD)
        assert not scene.here
        assert "its lease is lost: it was not renewed for 4.5 s" in caplog.text
        await sim.advance(pachinko_cluster.LEASE)
        assert scene.began == ["a"]
        sim.broker.restore()
        await sim.advance(pachinko_cluster._TRY)
        assert len(scene.here) == 1 and len(scene.began) == 2


@pytest.mark.usefixtures("impatient")
async def test_an_error_of_the_broker_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A Redis without memory for keys is no Redis that is away; the worker waits for it."""
    async with with_leases("redis") as broker:
        await command(broker, "CONFIG SET maxmemory 1")
        scene = Scene(broker.url)
        async with scene.process("a"):
            assert "leases were not checked: " in caplog.text
            await until(lambda: "no lease for worker" in caplog.text)
            assert "OOM" in caplog.text or "OutOfMemory" in caplog.text
            await command(broker, "CONFIG SET maxmemory 0")
            await until(lambda: scene.here)


@pytest.mark.usefixtures("impatient")
async def test_a_broker_that_does_not_answer_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It carries messages, but no leases."""

    async def never(*_: object) -> bool:
        return await asyncio.Event().wait()

    async with with_leases("redis") as broker:
        with monkeypatch.context() as patch:
            patch.setattr(Redis, "lease", never)
            patch.setattr(pachinko_cluster, "_RENEW", 0.01)
            scene = Scene(broker.url)
            async with scene.process("a"):
                await until(lambda: "no lease for worker" in caplog.text)
    assert "no answer within 0.01 s; trying again" in caplog.text


# What cannot have leases


class Own:
    """A backplane of the program's own."""

    async def start(self, deliver: Any, lost: Any) -> None: ...
    async def publish(self, subject: str, data: bytes) -> None: ...
    async def subscribe(self, subject: str) -> None: ...
    async def unsubscribe(self, subject: str) -> None: ...
    async def stop(self) -> None: ...


async def test_a_backplane_of_ones_own_has_no_leases() -> None:
    """The start fails, and says what to use."""
    text = await refusal(Own())
    assert "needs leases, and Own has none: use nats:// (with JetStream) or redis://" in text


@pytest.mark.parametrize("lease", [None, lambda *_: True, "a lease"])
async def test_only_a_coroutine_function_gives_leases(lease: Any) -> None:
    """An attribute of that name that is something else is no lease."""
    own = Own()
    own.lease = lease  # type: ignore[attr-defined]  # a program may have it
    assert "needs leases, and Own has none" in await refusal(own)


async def test_a_backplane_of_ones_own_may_have_leases() -> None:
    """It is asked as NATS and Redis are: the worker runs when it says so, and gives that up."""
    asked: list[tuple[str, float]] = []

    class Granting(Own):
        async def lease(self, key: str, token: str, seconds: float) -> bool:
            asked.append((key, seconds))
            return bool(seconds)

    scene = Scene(Granting())
    async with scene.process("a"):
        await until(lambda: scene.here)
    assert asked[2][0] == asked[-1][0] != asked[0][0]
    assert [seconds for _, seconds in asked] == [pachinko_cluster.LEASE, 0] * 2


async def test_without_a_lifespan_the_error_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """There no start can fail: clients are served, and the worker is tried again."""
    scene = Scene(Own())
    async with (
        serving(scene.app("a"), lifespan="off") as server,
        connect(f"{server.url}/ws") as client,
    ):
        assert (await client.ask("nothing"))["payload"]["code"] == "unknown_type"
        await until(lambda: "failed; again in 1 s" in caplog.text)
    assert "needs leases, and Own has none" in caplog.text and not scene.began


async def test_nats_without_jetstream_has_no_leases() -> None:
    """The start fails, and says how the server is started; afterwards the hub may start again."""
    async with running("nats") as broker:
        scene = Scene(broker.url)
        app = scene.app("a")
        for _ in range(2):
            answer = await startup(app)
            assert answer["type"] == "lifespan.startup.failed"
            assert "needs JetStream" in answer["message"] and "nats-server -js" in answer["message"]
        assert not scene.began


async def test_jetstream_that_is_not_ready_is_waited_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster of NATS that is choosing its leader is one that is away."""
    from nats.js import JetStreamContext
    from nats.js.errors import ServiceUnavailableError

    async def unready(*_: object) -> None:
        raise ServiceUnavailableError(code=503, err_code=10008, description="no leader")

    async with with_leases("nats") as broker:
        scene = Scene(broker.url)
        with monkeypatch.context() as patch:
            patch.setattr(JetStreamContext, "key_value", unready)
            await scene_started(scene, caplog)
        async with scene.process("a"):
            await until(lambda: scene.here)


async def scene_started(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    async with scene.process("a"):
        assert "leases were not checked: " in caplog.text and "no leader" in caplog.text
        assert not scene.began


async def test_a_bucket_with_another_age_is_refused() -> None:
    """A lease would be forgotten too early, or too late."""
    async with with_leases("nats") as broker:
        client = await connect_to_nats(broker.url)
        await client.jetstream().create_key_value(bucket="pachinko-leases", ttl=60)
        assert "for 60 s, and leases need 6 s: nats kv del" in await refusal(broker.url)
        await client.close()


async def test_a_redis_cluster_has_no_leases() -> None:
    """Another node would have another key."""
    async with running("redis", "--cluster-enabled", "yes") as broker:
        assert "needs a single Redis server, or NATS" in await refusal(broker.url)


MESSAGES = "SETUSER app on >password resetchannels &pachinko.* +@pubsub +@connection"


@pytest.mark.parametrize(
    ("rights", "is_enough"),
    [
        ("", False),
        ("+eval +get +set", False),
        ("~pachinko.lease.* +eval", False),
        ("~pachinko.lease.* +eval +get +set", True),
    ],
)
async def test_redis_needs_further_rights(rights: str, is_enough: bool) -> None:
    """The error has the rights to add, and they are all that a worker needs."""
    async with running("redis") as broker:
        assert await command(broker, f"ACL {MESSAGES} {rights}") == b"+OK"
        url = broker.url.replace("://", "://app:password@")
        if is_enough:
            assert (await startup(Scene(url).app("a")))["type"] == "lifespan.startup.complete"
        else:
            assert "ACL SETUSER app ~pachinko.lease.* +eval +get +set" in await refusal(url)


@pytest.mark.parametrize(
    ("publish", "subscribe", "is_enough"),
    [
        ([], [], False),
        (["$JS.API.>"], [], False),
        (["$JS.API.>"], ["_INBOX.>"], False),
        (["$JS.API.>", "$KV.pachinko-leases.>"], ["_INBOX.>"], True),
    ],
)
async def test_nats_needs_further_rights(
    publish: list[str],
    subscribe: list[str],
    is_enough: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error has the rights to add, and they are all that a worker needs."""
    if not is_enough:  # NATS answers a request that it does not permit by silence.
        monkeypatch.setattr(pachinko_cluster, "_REQUEST", 1.0)
    config = tmp_path / "nats.conf"
    config.write_text(
        'jetstream { store_dir: "store" }\n'
        "authorization { users = [{ user: app, password: password, permissions: { publish: "
        f"{['pachinko.>', *publish]}, subscribe: {['pachinko.>', *subscribe]} }} }}] }}".replace(
            "'", '"'
        )
    )
    async with running("nats", "-c", str(config)) as broker:
        url = broker.url.replace("://", "://app:password@")
        if is_enough:
            assert (await startup(Scene(url).app("a")))["type"] == "lifespan.startup.complete"
        else:
            text = await refusal(url)
            assert "$JS.API.> and $KV.pachinko-leases.>" in text and "_INBOX.>" in text


async def test_a_request_of_jetstream_may_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a refusal that is no matter of rights."""
    from nats.errors import TimeoutError as Unanswered

    async def late(*_: object) -> None:
        raise Unanswered

    monkeypatch.setattr(Nats, "_open_bucket", late)
    with pytest.raises(Unanswered):
        await Nats(pachinko_cluster.read_broker("nats://h")).lease("key", "token", 1.0)


async def test_two_processes_that_take_a_lease_at_once() -> None:
    """The revision decides, and the slower one hears that it has none."""
    async with with_leases("nats") as broker:
        made = [Nats(pachinko_cluster.read_broker(broker.url)) for _ in range(8)]

        async def deliver(subject: str, data: bytes) -> None: ...

        await asyncio.gather(*(each.start(deliver, lambda _: None) for each in made))
        await made[0].lease("other", "0", 6.0)  # makes the bucket
        for _ in range(5):
            calls = (each.lease("key", str(n), 6.0) for n, each in enumerate(made))
            held = await asyncio.gather(*calls)
            assert held.count(True) == 1
            winner = held.index(True)
            for _ in range(2):  # The second time there is nothing to give up.
                assert not await made[winner].lease("key", str(winner), 0.0)
        await asyncio.gather(*(each.stop() for each in made))


# The page


def test_the_page_has_the_seconds_and_the_rights() -> None:
    """What a reader can plan with is what the module does."""
    page = (ROOT / "docs/cluster.md").read_text()
    worker = page.partition("\n## Workers\n")[2].partition("\n## ")[0]
    hold, lease, pause = pachinko_cluster._HOLD, pachinko_cluster.LEASE, pachinko_cluster._TRY
    assert f"renews every {pachinko_cluster._RENEW:g} seconds" in worker
    assert f"for more than {hold:g} seconds" in worker
    assert f"{lease - hold:g} seconds before another process" in worker
    assert f"in another process within {lease + pause + 1:g} seconds" in worker  # NATS takes one
    assert "`~pachinko.lease.* +eval +get +set`" in page
    assert "`$JS.API.>`" in page and "`$KV.pachinko-leases.>`" in page and "`_INBOX.>`" in page


# Several processes without a broker


class Config:
    def __init__(self, workers: Any) -> None:
        self.workers = workers


@pytest.mark.parametrize(
    ("name", "config", "workers"),
    [
        ("SpawnProcess-1", Config(2), 2),
        ("SpawnProcess-2", Config(2), 1),  # the first one warns
        ("SpawnProcess-1", Config(1), 1),  # with a reloader
        ("SpawnProcess-1", Config(None), 1),
        ("SpawnProcess-1", Config("2"), 1),  # another program's
        ("SpawnProcess-1", object(), 1),
    ],
)
def test_the_configuration_of_a_server_has_the_number(
    name: str, config: object, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvicorn and hypercorn give it to each process that they start."""
    process = types.SimpleNamespace(name=name, _kwargs={"config": config, "sockets": []})
    module = types.SimpleNamespace(current_process=lambda: process)
    monkeypatch.setitem(sys.modules, "multiprocessing.process", module)
    assert pachinko.count_workers() == workers


@pytest.mark.parametrize(
    ("line", "variables", "workers"),
    [
        ("/usr/bin/gunicorn app:app -w 3 -k uvicorn_worker.UvicornWorker", {}, 3),
        ("gunicorn -w3 app:app", {}, 3),
        ("gunicorn --workers=3 app:app", {}, 3),
        ("gunicorn app:app", {"WEB_CONCURRENCY": "4"}, 4),
        ("gunicorn -w 1 app:app", {"WEB_CONCURRENCY": "4"}, 1),
        ("gunicorn app:app", {}, 1),
        ("granian --interface asgi --workers 2 app:app", {}, 2),
        ("/venv/granian/__main__.py --workers 2 app:app", {}, 2),
        ("granian app:app", {"GRANIAN_WORKERS": "2"}, 2),
        ("granian app:app", {"GRANIAN_WORKERS": "many", "WEB_CONCURRENCY": "2"}, 1),
        ("granian --workers-kill-timeout 15 app:app", {}, 1),
        ("granian --workers-max-rss 200 --workers 2 app:app", {}, 2),
        ("uvicorn app:app --workers 2", {}, 1),  # the parent, which serves nobody
        ("pytest -w 2", {"WEB_CONCURRENCY": "2"}, 1),
        ("/srv/granian-app/run.py -w 2", {}, 1),
        ("", {"WEB_CONCURRENCY": "2"}, 1),  # Python in another program
        ("C:\\venv\\granian.exe --workers 2 app:app", {}, 2),
    ],
)
def test_the_command_line_of_a_server_has_the_number(
    line: str, variables: dict[str, str], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For gunicorn and granian, whose processes are told nothing."""
    monkeypatch.setattr(sys, "argv", line.split())
    for name in ("WEB_CONCURRENCY", "GRANIAN_WORKERS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert pachinko.count_workers() == workers


def test_a_program_without_multiprocessing_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not imported for this."""
    monkeypatch.delitem(sys.modules, "multiprocessing.process", raising=False)
    assert pachinko.count_workers() == 1


@pytest.mark.parametrize(("url", "warns"), [(None, True), ("memory://", False)])
async def test_split_groups_are_warned_of(
    url: str | None, warns: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for all endpoints of a process; whoever names memory:// has been told."""
    monkeypatch.setattr(pachinko, "count_workers", lambda: 2)
    pachinko._warn_of_workers.cache_clear()
    app, hub = new_app(), Hub()
    hub.configure(url)
    for path in ("/one", "/two"):
        Pachinko(app, path, hub=hub)
    async with serving(app):
        pass
    warnings = [each for each in caplog.messages if "2 worker processes without a broker" in each]
    assert len(warnings) == warns
    assert all("PACHINKO_BACKPLANE" in each and "group" in each for each in warnings)


# With uvicorn as it is started from a shell

APP = """
import falcon.asgi
from pachinko import Connection, Pachinko, hub

app = falcon.asgi.App()
ws = Pachinko(app, "/ws")


@ws.on("fail")
async def fail(conn: Connection) -> None:
    raise ValueError("a bug")


@ws.on("drain")
async def drain(conn: Connection) -> None:
    await hub.drain(0)


if __name__ == "__main__":
    import uvicorn

    uvicorn.run("app:app", port=0, workers=2)
"""
(LOGGING,) = re.findall(
    r"^## Logging\n.*?^```python\n(.*?)^```",
    (ROOT / "docs/deployment.md").read_text(),
    re.MULTILINE | re.DOTALL,
)


class Uvicorn:
    """A process of uvicorn in *folder*, and what it prints."""

    def __init__(self, folder: Path, *command: str, **environment: str) -> None:
        self.command = command
        path = os.pathsep.join((str(folder), str(ROOT)))
        self.environment = {**os.environ, "PYTHONPATH": path, **environment}
        self.folder, self.output = folder, ""

    async def __aenter__(self) -> Uvicorn:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, *self.command, cwd=self.folder, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.reading = asyncio.create_task(self._read())
        return self

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.output += line.decode()

    async def stop(self) -> str:
        """Let it end as it does by itself, and return all that it has printed."""
        self.process.terminate()
        await asyncio.wait_for(self.process.wait(), PATIENCE)
        await asyncio.wait_for(self.reading, PATIENCE)
        return self.output

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # Its workers hold the other end of the pipe.
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()
        await self.reading


COMMAND = ("-m", "uvicorn", "app:app", "--port", "0")


@pytest.mark.parametrize(
    ("command", "variables", "processes", "warnings"),
    [
        ((*COMMAND, "--workers", "3"), {}, 3, 1),
        (COMMAND, {"WEB_CONCURRENCY": "2"}, 2, 1),
        (("app.py",), {}, 2, 1),
        (COMMAND, {}, 1, 0),
        ((*COMMAND, "--workers", "1"), {}, 1, 0),
        ((*COMMAND, "--reload"), {"WEB_CONCURRENCY": "2"}, 1, 0),
        ((*COMMAND, "--workers", "2"), {"PACHINKO_BACKPLANE": "memory://"}, 2, 0),
    ],
)
async def test_workers_of_uvicorn_without_a_broker(
    command: tuple[str, ...],
    variables: dict[str, str],
    processes: int,
    warnings: int,
    tmp_path: Path,
) -> None:
    """One warning in all, wherever the number comes from; none for a reloader."""
    (tmp_path / "app.py").write_text(APP)
    async with Uvicorn(tmp_path, *command, **variables) as uvicorn:
        await until(lambda: uvicorn.output.count("Application startup complete") == processes)
        output = await uvicorn.stop()
    assert output.count("worker processes without a broker") == warnings
    assert output.count("PACHINKO_BACKPLANE") == warnings


async def test_uvicorn_does_not_start_without_leases(tmp_path: Path) -> None:
    """Its output ends with the reason, and its exit status says so."""
    once = "@ws.worker(once=True)\nasync def clock() -> None: ...\n\n\nif __name__"
    (tmp_path / "app.py").write_text(APP.replace("if __name__", once))
    async with (
        running("nats") as broker,
        Uvicorn(tmp_path, *COMMAND, PACHINKO_BACKPLANE=broker.url) as uvicorn,
    ):
        assert await asyncio.wait_for(uvicorn.process.wait(), PATIENCE) == 3
        await uvicorn.reading
    assert "PachinkoError: a worker with once=True needs JetStream" in uvicorn.output


@pytest.mark.parametrize("with_logging", [False, True])
async def test_the_log_under_uvicorn(with_logging: bool, tmp_path: Path) -> None:
    """Warnings and errors are seen without a line of the app's, INFO with the one of the docs."""
    (tmp_path / "app.py").write_text((LOGGING if with_logging else "") + APP)
    async with Uvicorn(tmp_path, *COMMAND) as uvicorn:
        await until(lambda: "running on" in uvicorn.output)
        (port,) = re.findall(r"running on http://127.0.0.1:(\d+)", uvicorn.output)
        with pytest.raises(websockets.exceptions.InvalidStatus):
            await connect(f"ws://127.0.0.1:{port}/ws", origin="https://evil.example").__aenter__()
        async with connect(f"ws://127.0.0.1:{port}/ws") as client:
            assert (await client.ask("fail"))["payload"]["code"] == "internal_error"
            await client.send("drain")
            await client.closed()
        output = await uvicorn.stop()
    assert "refused origin 'https://evil.example'" in output
    assert "handler of 'fail'" in output and "ValueError: a bug" in output
    assert ("INFO:pachinko:draining 1 connections" in output) == with_logging
    assert output.count("refused origin") == output.count("ValueError: a bug") == 1
