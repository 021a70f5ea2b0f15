"""By which rules the processes of a namespace keep groups, and brokers that keep nothing."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from support import until
from test_archive import (
    ROOM,
    SEVEN,
    Reads,
    app_of,
    cut,
    enter,
    errors,
    heard,
    last,
    links,
    say,
    watch,
)

import pachinko
import pachinko_cluster
from pachinko import Hub, PachinkoError, Window, simulate
from pachinko_cluster import SimulatedBroker, SimulatedConnection, read_rules, write_rules


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads.use(monkeypatch)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has lost its broker tries again soon."""
    monkeypatch.setattr(pachinko_cluster, "_RECONNECT", (0.01,))


async def test_who_was_there_before_the_app_learns_of_its_rules() -> None:
    """What it has sent before is kept by nobody."""
    sim, program = simulate(app_of()), Hub()
    program.configure(sim.broker.connection("0"))
    async with program.open():
        await program.send(ROOM, "said", 0)
        with pytest.raises(PachinkoError, match="not kept"):
            await program.position(ROOM)
        async with sim:
            client = await enter(sim)
            await sim.settle()
            await program.send(ROOM, "said", 1)
            await sim.settle()
            assert heard(client) == [("resume", 0), 1]
            assert await program.position(ROOM) == last(client)


async def test_rules_that_come_while_a_process_connects_are_learned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The broker had none when it asked, and it was told of them before it was connected."""
    broker, agree = SimulatedBroker(), SimulatedConnection.agree
    (app, theirs), (program, ours) = ((Hub(), broker.connection()) for _ in range(2))
    app.keep("room:")
    app.configure(theirs)
    program.configure(ours)
    opened = list[Hub]()

    async def late(self: SimulatedConnection, *given: Any) -> bytes:
        found = await agree(self, *given)
        if self is ours and not opened:
            opened.append(await stack.enter_async_context(app.open()))
            await until(ours.messages.empty)
        return found

    monkeypatch.setattr(SimulatedConnection, "agree", late)
    async with contextlib.AsyncExitStack() as stack, program.open():
        await until(lambda: program.state.history is not None)


async def test_the_rules_outlast_the_app() -> None:
    """What is sent while no process of it runs, for a deployment, is kept as well."""
    sim = simulate(app_of())
    async with sim:
        client = await enter(sim)
        await say(sim, 1)
        await sim.settle()
        at = last(client)
        sim.kill()
        await sim.advance(3600)
        program = Hub()
        program.configure(sim.broker.connection("0"))
        async with program.open():
            await program.send(ROOM, "said", 2)
        client = await enter(await sim.process(), at)
        await sim.settle()
        assert heard(client) == [2, ("resume", 1)]


async def test_rules_come_again_after_a_broker_has_forgotten_them() -> None:
    """As soon as a process that has them connects."""
    async with simulate(app_of(SEVEN)) as sim:
        program = Hub()
        program.configure(sim.broker.connection("0"))
        async with program.open():
            assert program.state.history is not None
            sim.broker.flush()
            again = Hub()
            again.configure(sim.broker.connection("0"))
            async with again.open():
                assert again.state.history is None
                cut(sim)
                await sim.settle()
                assert again.state.history is not None
                client = await enter(sim)
                await again.send(ROOM, "said", 1)
                await program.send(ROOM, "said", 2)
                await sim.settle()
                assert heard(client)[-2:] == [1, 2] and last(client).endswith(".2")


async def test_other_rules_are_logged_once_and_do_not_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The broker's count: they are those of who came first, until all of them have gone."""
    new = {"room:": {"messages": 2}, "user:": {"messages": 1}}
    async with simulate(app_of(SEVEN, SEVEN, new)) as sim:
        await sim.process()
        other = await sim.process()
        await say(other, 1, 2, 3)
        await say(other, 1, group="user:ada")
        assert [each.payload async for each in other.hub.history(ROOM)] == [1, 2, 3]
        with pytest.raises(PachinkoError, match="not kept"):
            await other.hub.position("user:ada")
        client = await watch(other, ROOM, "user:ada")
        for _ in range(5):
            await sim.advance(20)
            cut(other)
            await sim.settle()
        assert errors(caplog, "the broker keeps groups by other rules") == 1
        for process in sim.processes[:2]:
            process.kill()
        await sim.advance(60)
        await sim.advance(20)
        await say(other, 4, 5, 6)
        await say(other, 2, group="user:ada")
        await sim.settle()
        assert [each.payload async for each in other.hub.history(ROOM)] == [5, 6]
        assert [each.payload async for each in other.hub.history("user:ada")] == [2]
        assert heard(client)[-4:] == [4, 5, 6, 2] and client.received[-1].at is not None


async def test_a_group_whose_rules_change_goes_on() -> None:
    """A larger window is read; a group that is no longer kept has its ring to its end."""
    async with simulate(app_of({"room:": {"messages": 2}, "old:": {}}, SEVEN)) as sim:
        other = await sim.process()
        client, old = await enter(other), await enter(other, group="old:a")
        await say(other, 1, 2, 3)
        await say(other, 1, group="old:a")
        await sim.settle()
        sim.kill()
        await sim.advance(60)
        await sim.advance(20)
        await say(other, 4, 5, 6)
        await say(other, 2, group="old:a")
        await sim.settle()
        assert heard(client)[-6:] == [1, 2, 3, 4, 5, 6] and heard(old) == [("resume", 0), 1, 2]
        late = await enter(other, client.received[3].at)
        again = await enter(other, last(old), group="old:a")
        await sim.settle()
        assert heard(late) == [4, 5, 6, ("resume", 3)] and heard(again) == []


async def test_rules_change_while_nothing_is_known_of_a_group(reads: Reads) -> None:
    """Groups that are not kept, and those whose past is still read, go on as well."""
    async with simulate(app_of(SEVEN, {**SEVEN, "user:": {"messages": 1}})) as sim:
        other = await sim.process()
        reads.goes_on.clear()
        client, user = await enter(other), await watch(other, "user:ada", "lobby")
        sim.kill()
        await sim.advance(60)
        reads.goes_on.set()
        await sim.advance(20)
        await say(other, 1)
        await say(other, 2, group="user:ada")
        await say(other, 3, group="lobby")
        await sim.settle()
        assert heard(client)[-1] == 1 and heard(user) == [2, 3]
        assert [each.at is None for each in user.received] == [False, True]
        user.cut()
        await sim.settle()


async def test_rules_that_are_renewed_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure is logged, and tried again; while the broker is away, nobody is asked."""
    async with simulate(app_of()) as sim:
        for _ in range(6):
            await sim.advance(15)
        assert len(sim.broker.values) == 1
        ((value, end),) = sim.broker.values.values()
        assert read_rules(value) == {"room:": Window(7, 300.0, 1_048_576)}
        assert end > pachinko.clock.time() + 30


async def test_a_failure_to_renew_rules_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next attempt may be better; while the broker is away there is none."""
    async with simulate(app_of()) as sim:
        calls = list[bytes]()

        async def fail(self: SimulatedConnection, key: str, value: bytes, seconds: float) -> bytes:
            calls.append(value)
            raise OSError("no luck")

        monkeypatch.setattr(SimulatedConnection, "agree", fail)
        await sim.advance(21)
        assert errors(caplog, "rules were not renewed: OSError: no luck") == 1 and len(calls) == 1
        sim.broker.lose()
        await sim.advance(60)
        assert len(calls) == 1


async def test_rules_of_another_version_are_an_error_at_the_start() -> None:
    """It says what can be done about them; one that keeps nothing goes on."""
    async with simulate(app_of({})) as sim:
        subject = pachinko_cluster.subject_of("pachinko", "history", "rules")
        await links(sim)[0].agree(subject, b'{"room:":{"new":1}}', 1000.0)
        cut(sim)
        await sim.settle()
        assert sim.hub.stats()["broker_down"] == 0
        hub = Hub()
        hub.keep("room:")
        hub.configure(sim.broker.connection("0"))
        with pytest.raises(PachinkoError, match=r"another version.*update.*namespace="):
            async with hub.open():
                raise AssertionError("it is open")


def test_equal_rules_are_equal_bytes() -> None:
    """In whatever order they were written."""
    one = {"b": Window(1, 5, 2), "a": Window(2, 300.0, 3)}
    assert write_rules(one) == write_rules(dict(reversed(one.items())))
    assert read_rules(write_rules(one)) == one and read_rules(b"") == {}


# Brokers that keep nothing


class Plain:
    """A backplane without a store."""

    async def start(self, deliver: Any, lost: Any) -> None: ...
    async def publish(self, subject: str, data: bytes) -> int | None: ...
    async def subscribe(self, subject: str) -> None: ...
    async def unsubscribe(self, subject: str) -> None: ...
    async def stop(self) -> None: ...


async def test_a_backplane_without_a_store_is_refused() -> None:
    """At the start, with what can be done about it. Without kept groups it is as good as any."""
    hub = Hub()
    hub.configure(Plain())
    async with hub.open():
        pass
    hub.keep("room:")
    with pytest.raises(PachinkoError, match=r"Plain.*use nats://.*or leave out hub\.keep\(\)"):
        async with hub.open():
            raise AssertionError("it is open")


async def test_a_broker_that_cannot_keep_anything_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the start of an app, and of a program. It is logged once; later it may be able to."""

    async def refuse(self: SimulatedConnection, key: str, value: bytes, seconds: float) -> bytes:
        raise PachinkoError("nats-server needs --jetstream")

    agree = SimulatedConnection.agree
    monkeypatch.setattr(SimulatedConnection, "agree", refuse)
    with pytest.raises(PachinkoError, match="needs --jetstream"):
        async with simulate(app_of()):
            raise AssertionError("it has started")
    assert errors(caplog, "needs --jetstream") == 1
    async with simulate(app_of({})) as sim:
        await say(sim, 1)
        assert errors(caplog, "needs --jetstream") == 1
        hub = Hub()
        hub.keep("room:")
        hub.configure(sim.broker.connection("0"))
        with pytest.raises(PachinkoError, match="needs --jetstream"):
            async with hub.open():
                raise AssertionError("it is open")
    monkeypatch.setattr(SimulatedConnection, "agree", agree)
    async with simulate(app_of()) as sim:
        await say(sim, 1)


async def test_who_knows_no_rules_yet_delivers_what_was_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With its position, which clients store."""
    async with simulate(app_of(SEVEN, {})) as sim:
        real = SimulatedConnection.agree

        async def nothing(self: SimulatedConnection, *given: Any) -> bytes:
            return b""

        monkeypatch.setattr(SimulatedConnection, "agree", nothing)
        other = await sim.process()
        client = await watch(other)
        await say(sim, 1)
        await sim.settle()
        assert heard(client) == [1] and last(client).endswith(".1")
        await say(other, 2)
        await sim.settle()
        assert heard(client) == [1, 2] and client.received[1].at is None
        monkeypatch.setattr(SimulatedConnection, "agree", real)
        cut(other)
        await sim.settle()
        await say(other, 3)
        await sim.settle()
        assert heard(client)[-1] == 3 and last(client).endswith(".2")
