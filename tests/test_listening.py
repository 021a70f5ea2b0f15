"""A listener gets the messages to a group, without a connection."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from brokers import BrokerKind, running
from support import PATIENCE, connect, new_app, simulated, until
from test_cluster import Own, cluster_of, processes

import pachinko
from pachinko import Connection, Envelope, Hub, Listener, Pachinko, PachinkoError
from pachinko_cluster import PeerMessage, pack


@contextlib.asynccontextmanager
async def running_hub() -> AsyncIterator[Hub]:
    """A hub that runs, without an app."""
    hub = Hub()
    async with hub.open("memory://"):
        yield hub


def endpoint(hub: Hub) -> Pachinko:
    ws = Pachinko(new_app(), "/ws", hub=hub)

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.join("room")

    return ws


async def step(listener: Listener[Any]) -> Any:
    """The next one, soon."""
    return await asyncio.wait_for(anext(listener), PATIENCE)


async def rest(listener: Listener[Any]) -> list[Any]:
    """All that come until the end."""
    async with asyncio.timeout(PATIENCE):
        return [envelope async for envelope in listener]


def types_of(envelopes: list[Any]) -> list[str]:
    return [envelope.type for envelope in envelopes]


SENT: list[tuple[tuple[Any, ...], Any]] = [
    (("said", {"text": "hi"}), {"text": "hi"}),
    (("said",), None),
    (("said", 0), 0),
    (("said", ""), ""),
    (("said", 2**80), 2**80),
    (("said", [1.5, None, True]), [1.5, None, True]),
    (("said", "ä☃\ud800"), "ä☃\ufffd"),
]


@pytest.mark.parametrize(("message", "payload"), SENT)
async def test_a_listener_gets_what_a_member_gets(message: Any, payload: Any) -> None:
    """The type, the payload as plain JSON, and the group; no id, and no position."""
    async with running_hub() as hub:
        listener = hub.listen("room")
        await hub.send("room", *message)
        assert await step(listener) == Envelope("said", payload, group="room")


async def test_objects_arrive_as_json() -> None:
    """What was sent as an object of a message class has become a dict."""

    @pachinko.message("moved")
    class Moved:
        x: int
        by: tuple[str, ...] = ()

    async with running_hub() as hub:
        listener = hub.listen("room")
        await hub.send("room", Moved(1, ("ada",)))
        assert await step(listener) == Envelope("moved", {"x": 1, "by": ["ada"]}, group="room")


@pytest.mark.parametrize("data", [b"", b"\0\xff", b"x" * 1000])
async def test_bytes_have_no_type(data: bytes) -> None:
    """A binary frame is an envelope as middleware has it."""
    async with running_hub() as hub:
        listener = hub.listen("room")
        (mailbox,) = hub.state.listeners
        event = {"type": "websocket.send", "bytes": data}
        mailbox.push(pachinko.Waiting(event, None, len(data), "room"))
        assert await step(listener) == Envelope("", data, group="room")


@pytest.mark.parametrize("group", ["room:1", "", "ä☃", "\ud800", "x" * 5000, "a.b.*"])
async def test_any_text_names_a_group(group: str) -> None:
    """Also one that no frame can carry as it is."""
    async with running_hub() as hub:
        listener = hub.listen(group)
        await hub.send(group, "said", 1)
        assert await step(listener) == Envelope("said", 1, group=group)


async def test_it_listens_from_the_call_on() -> None:
    """What comes between the call and the first step is held."""
    async with running_hub() as hub:
        await hub.send("room", "before")
        listener = hub.listen("room")
        await hub.send("room", "between")
        stepping = asyncio.create_task(anext(listener))
        assert (await stepping).type == "between"
        stepping = asyncio.create_task(anext(listener))
        await asyncio.sleep(0)
        await hub.send("room", "after")
        assert (await asyncio.wait_for(stepping, PATIENCE)).type == "after"


async def test_messages_to_others_do_not_come() -> None:
    """Those to another group, to everybody, a user or a connection; exclude changes nothing."""
    async with running_hub() as hub:
        listener = hub.listen("room")
        (mailbox,) = hub.state.listeners
        await hub.send("other", "no")
        await hub.broadcast("no")
        await hub.send_to_user("room", "no")
        await hub.send_to("room", "no")
        await hub.send("room", "yes", exclude=["room", "0" * 24])
        assert mailbox.id not in ("room", "0" * 24)
        assert (await step(listener)).type == "yes"
        listening = hub.listen("room", heartbeat=0.01)
        assert await step(listening) is None


async def test_a_listener_is_no_connection() -> None:
    """It is in none of the lists of connections; its group is one of the hub's groups."""
    async with running_hub() as hub:
        listener = hub.listen("room")
        assert hub.members("room") == hub.connections == frozenset()
        assert await hub.presence("room") == [] and hub.count == 0
        assert hub.groups == {"room"} and hub.stats()["groups"] == 1
        assert hub.stats()["connections"] == 0
        await listener.aclose()
        assert hub.groups == frozenset() and not hub.state.listeners


async def test_close_group_closes_members_only() -> None:
    """A listener beside a member goes on, and the member gets no less."""
    hub = Hub()
    ws = endpoint(hub)
    async with simulated(ws._app) as server, connect(f"{server.url}/ws") as client:
        await until(lambda: hub.members("room"))
        listener = hub.listen("room")
        await hub.send("room", "one")
        assert (await client.receive())["type"] == "one"
        await hub.close_group("room", 4000)
        assert (await client.closed())[0] == 4000
        await hub.send("room", "two")
        assert types_of([await step(listener), await step(listener)]) == ["one", "two"]
        await listener.aclose()


async def test_several_listeners_of_a_group() -> None:
    """Each gets all messages, and the last one that leaves unsubscribes."""
    async with running_hub() as hub:
        one, two = hub.listen("room"), hub.listen("room")
        await hub.send("room", "x")
        assert (await step(one)).type == (await step(two)).type == "x"
        await one.aclose()
        assert hub.groups == {"room"}
        await two.aclose()
        assert hub.groups == frozenset()


async def test_several_tasks_share_what_one_listener_gets() -> None:
    """Each message goes to one of them, and the end to all."""
    async with running_hub() as hub:
        listener = hub.listen("room")
        readers = [asyncio.create_task(rest(listener)) for _ in "123"]
        await asyncio.sleep(0)
        for n in range(10):
            await hub.send("room", str(n))
    got = [envelope.type for each in await asyncio.gather(*readers) for envelope in each]
    assert sorted(got) == [str(n) for n in range(10)]


# Its end


async def end_by_break(hub: Hub) -> None:
    async for _ in hub.listen("room"):
        break


async def end_by_error(hub: Hub) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async for _ in hub.listen("room"):
            raise ZeroDivisionError


async def end_by_return(hub: Hub) -> None:
    async def first() -> object:
        async for envelope in hub.listen("room"):
            return envelope
        return None

    await first()


async def end_of_a_block(hub: Hub) -> None:
    async with hub.listen("room") as listener:
        await anext(listener)
        assert hub.groups == {"room"}
    assert hub.groups == frozenset()
    assert await rest(listener) == []


async def end_by_aclose(hub: Hub) -> None:
    listener = hub.listen("room")
    await anext(listener)
    await listener.aclose()
    await listener.aclose()
    assert hub.groups == frozenset()


async def end_of_a_generator(hub: Hub) -> None:
    async def generate() -> AsyncIterator[Envelope]:
        async for envelope in hub.listen("room"):
            yield envelope

    async for _ in generate():
        break


async def end_by_cancellation(hub: Hub) -> None:
    await anext(hub.listen("room"))

    async def wait() -> None:
        async for _ in hub.listen("room"):
            pass

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    assert hub.groups == {"room"}
    task.cancel()
    await asyncio.wait([task])


async def end_of_a_call_alone(hub: Hub) -> None:
    hub.listen("room")


async def end_in_a_cycle(hub: Hub) -> None:
    cycle: list[Any] = [hub.listen("room")]
    cycle.append(cycle)
    await anext(cycle[0])
    del cycle
    await asyncio.to_thread(gc.collect)  # in another thread


ENDS = [
    end_by_break, end_by_error, end_by_return, end_of_a_block, end_by_aclose, end_of_a_generator,
    end_by_cancellation, end_of_a_call_alone, end_in_a_cycle,
]  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
async def test_whoever_leaves_the_loop_is_unsubscribed(end: Callable[[Hub], Any]) -> None:
    """In any way, with `aclose` or without."""
    async with running_hub() as hub:
        task = asyncio.create_task(end(hub))
        while not task.done():
            await hub.send("room", "x")
            await asyncio.sleep(0)
        task.result()
        await until(lambda: not hub.groups)
        assert not hub.state.listeners


async def test_a_step_that_is_cancelled_loses_nothing() -> None:
    """The next step gets what has come meanwhile."""
    async with running_hub() as hub:
        listener = hub.listen("room")
        task = asyncio.create_task(anext(listener))
        await asyncio.sleep(0)
        await hub.send("room", "x")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await step(listener)).type == "x"


async def test_it_ends_with_the_hub() -> None:
    """What has come before the stop still comes, and then the loop ends, for good."""
    async with running_hub() as hub:
        waiting = asyncio.create_task(rest(hub.listen("quiet")))
        listener = hub.listen("room")
        await hub.send("room", "last")
    assert types_of(await rest(listener)) == ["last"]
    assert await waiting == [] and await rest(listener) == []
    await listener.aclose()


async def test_it_ends_with_the_last_app() -> None:
    """As at any shutdown of a server."""
    hub = Hub()
    async with simulated(endpoint(hub)._app):
        waiting = asyncio.create_task(rest(hub.listen("room")))
        await until(lambda: hub.groups)
    assert await waiting == []


async def test_a_drain_ends_it() -> None:
    """Also one that is begun later. The last messages still come."""
    async with running_hub() as hub:
        listener = hub.listen("room")
        await hub.send("room", "last")
        await hub.drain(0)
        await hub.send("room", "late")
        assert types_of(await rest(listener)) == ["last"]
        assert hub.groups == frozenset()
        assert await rest(hub.listen("room")) == [] and hub.groups == frozenset()


async def test_a_drain_takes_listeners_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does clients, and not those that have left."""
    monkeypatch.setattr(pachinko, "clock", clock := pachinko.MovableClock())
    async with running_hub() as hub:
        listeners = [hub.listen("room") for _ in range(4)]
        drain = asyncio.create_task(hub.drain(400))
        await until(lambda: len(hub.state.listeners) == 3)
        clock.advance(100)
        await until(lambda: len(hub.state.listeners) == 2)
        assert not drain.done()
        for listener in listeners:
            await listener.aclose()
        clock.advance(100)
        await drain
        assert not hub.state.listeners


async def test_a_hub_that_does_not_run_has_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The log says so, as for the other methods."""
    assert await rest(Hub().listen("room")) == []
    (record,) = caplog.records
    assert "reaches nobody" in record.message


async def test_a_hub_that_is_not_connected_says_so() -> None:
    """A program without an app opens it first."""
    hub = Hub()
    hub.configure("nats://localhost:4222")
    with pytest.raises(PachinkoError, match=r"async with hub\.open\(\)"):
        hub.listen("room")


def test_a_loop_that_has_ended_without_a_stop() -> None:
    """Neither the next start nor a listener that is left over complains."""
    hub = Hub()
    kept: list[Any] = []

    async def start() -> None:
        hub.state.start(object())
        kept.extend(hub.listen("room") for _ in "12")
        kept.append(asyncio.create_task(rest(kept[0])))
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(start())
    loop.run_until_complete(asyncio.sleep(0))
    with pytest.raises(RuntimeError, match="no running event loop"):
        hub.listen("room")
    assert len(hub.state.listeners) == 2
    kept.pop().cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    del kept[1]
    gc.collect()
    asyncio.run(_start(hub))
    assert hub.groups == frozenset()


async def _start(hub: Hub) -> None:
    hub.state.start(object())


# Mistakes


@pytest.mark.parametrize("group", [None, 5, b"room", ["room"]])
async def test_a_wrong_name_is_told_at_the_call(group: Any) -> None:
    """Not at the first step."""
    async with running_hub() as hub:
        with pytest.raises(TypeError, match="a group is named by a str"):
            hub.listen(group)
        assert hub.groups == frozenset()


@pytest.mark.parametrize("heartbeat", [0, -1, float("nan"), float("inf"), 10**400, "5", True])
async def test_a_wrong_heartbeat_is_told_at_the_call(heartbeat: Any) -> None:
    """It is a number of seconds."""
    async with running_hub() as hub:
        with pytest.raises(ValueError, match="heartbeat is a number of seconds above 0"):
            hub.listen("room", heartbeat=heartbeat)
        assert hub.groups == frozenset()


async def test_another_thread_is_refused() -> None:
    """At the call, at a step and at the end; the cure is the whole loop in the hub's thread."""
    async with running_hub() as hub:
        listener = hub.listen("room")

        async def loop() -> list[str]:
            return [envelope.type async for envelope in hub.listen("room")]

        async def call() -> Any:
            return hub.listen("room")

        async def enter() -> None:
            async with listener:
                pass

        def work() -> None:
            for wrong in (call, enter, lambda: rest(listener), listener.aclose):
                with pytest.raises(PachinkoError, match=r"hub\.call_threadsafe\(f, "):
                    asyncio.run(wrong())
            future = hub.call_threadsafe(loop)
            hub.call_threadsafe(hub.send, "room", "x").result(PATIENCE)
            hub.call_threadsafe(hub.drain, 0).result(PATIENCE)
            assert future.result(PATIENCE) == ["x"]

        thread = threading.Thread(target=work)
        thread.start()
        await asyncio.to_thread(thread.join)
        assert types_of(await rest(listener)) == ["x"]


# A slow one


async def test_the_oldest_messages_of_too_many_are_dropped() -> None:
    """One gap is in their place."""
    async with running_hub() as hub:
        listener = hub.listen("room")
        for n in range(300):
            await hub.send("room", "n", n)
        first, *others = [await step(listener) for _ in range(257)]
        assert first == Envelope("gap", {"group": "room"}, group="room")
        assert [envelope.payload for envelope in others] == list(range(44, 300))
        await hub.send("room", "n", 300)
        assert (await step(listener)).payload == 300


@pytest.mark.parametrize(("size", "left"), [(300_000, 3), (600_000, 1), (2_000_000, 1)])
async def test_their_bytes_are_bounded_too(size: int, left: int) -> None:
    """To 1 MiB, or to one larger message."""
    async with running_hub() as hub:
        listener = hub.listen("room")
        for n in range(6):
            await hub.send("room", "large", [n, "x" * size])
        got = [await step(listener) for _ in range(left + 1)]
        assert types_of(got) == ["gap", *["large"] * left]
        assert got[-1].payload[0] == 5
        await hub.send("room", "end")
        assert (await step(listener)).type == "end"


async def test_a_message_larger_than_all_that_may_wait_arrives() -> None:
    """A listener that keeps up misses nothing."""
    async with running_hub() as hub:
        listener = hub.listen("room")
        await hub.send("room", "large", "x" * 2_000_000)
        assert (await step(listener)).type == "large"


async def test_a_sender_that_never_waits_gives_it_a_turn() -> None:
    """As it does clients, so that none is slow because of the sender."""
    async with running_hub() as hub:
        reading = asyncio.create_task(rest(hub.listen("room")))
        await asyncio.sleep(0)
        for n in range(2000):
            await hub.send("room", "n", n)
    assert [envelope.payload for envelope in await reading] == list(range(2000))


async def test_what_comes_after_its_end_is_thrown_away() -> None:
    """A delivery may be in progress when it ends."""
    async with running_hub() as hub:
        listener = hub.listen("room")
        (mailbox,) = hub.state.listeners
        await listener.aclose()
        assert not mailbox.push(pachinko.Waiting({}, None, 1, "room"))
        assert await rest(listener) == []


async def test_a_heartbeat_comes_in_silence() -> None:
    """As None, which Falcon makes a comment of; and messages in between."""
    async with running_hub() as hub:
        listener = hub.listen("room", heartbeat=0.01)
        assert [await step(listener) for _ in "12"] == [None, None]
        await hub.send("room", "x")
        assert [await step(listener) for _ in "12"] == [Envelope("x", None, group="room"), None]


# With a broker


async def test_it_hears_other_processes(kind: BrokerKind) -> None:
    """In a block from its begin on. The last one unsubscribes."""
    async with running(kind) as broker, processes(broker.url) as (one, two):
        async with one.hub.listen("room") as listener, one.hub.listen("room") as second:
            async with two.client(group="room") as member:
                await two.hub.send("room", "x", 1)
                assert await step(listener) == Envelope("x", 1, group="room")
                assert (await step(second)).type == (await member.receive())["type"] == "x"
                (present,) = await one.hub.presence("room")
                assert present.process == two.hub.process
                await one.hub.close_group("room", 4000)
                assert (await member.closed())[0] == 4000
            await one.hub.send("room", "own")
            assert (await step(listener)).type == "own"
        subject = "pachinko.g.room"
        link = cluster_of(one.hub)._link
        await until(lambda: subject not in link._subscribed)


async def test_a_program_without_an_app_may_listen(kind: BrokerKind) -> None:
    """It ends with the block."""
    hub, sender = Hub(), Hub()
    async with running(kind) as broker, sender.open(broker.url):
        async with hub.open(broker.url):
            async with hub.listen("room") as listener:
                await sender.send("room", "x")
                assert (await step(listener)).type == "x"
            listener = hub.listen("room")
            stepping = asyncio.create_task(anext(listener))
            await until(lambda: not stepping.done() and hub.groups)
        with pytest.raises(StopAsyncIteration):
            await stepping


async def test_an_outage_is_a_gap(kind: BrokerKind) -> None:
    """One for each, as members get it, before what comes after."""
    async with (
        running(kind) as broker,
        processes(broker.url) as (one, two),
        one.hub.listen("room") as a,
        one.hub.listen("room") as b,
    ):
        await broker.restart()
        for each in (one, two):
            await until(lambda each=each: each.hub.stats()["outages"])
            await until(lambda each=each: not each.hub.stats()["broker_down"])
        await until(lambda: not cluster_of(one.hub)._gaps)
        await two.hub.send("room", "after")
        for listener in (a, b):
            assert await step(listener) == Envelope("gap", {"group": "room"}, group="room")
            assert (await step(listener)).type == "after"


async def test_messages_that_cannot_be_read_are_one_gap() -> None:
    """Of another version, or no JSON for Python; also for one that listens since."""
    async with processes(Own(), 1) as (one,):
        cluster, hub = cluster_of(one.hub), one.hub
        first = await hub.listen("room").__aenter__()
        for n in range(3):
            if n == 2:
                second = hub.listen("room")
            await cluster.receive("pachinko.g.room", b'{"v":99}\n')
        frame = b'{"type":"x","group":"room","payload":1e400}'
        await cluster.receive("pachinko.g.room", pack(PeerMessage(1, "send", "p"), frame))
        await hub.send("room", "end")
        assert types_of([await step(first) for _ in "123"]) == ["gap", "gap", "end"]
        assert types_of([await step(second) for _ in "123"]) == ["gap", "gap", "end"]


class Denied(Own):
    """A backplane that does not permit one group."""

    async def subscribe(self, subject: str) -> None:
        if subject.endswith("secret"):
            raise PachinkoError("the broker does not permit it")
        await super().subscribe(subject)


@pytest.mark.parametrize("enters", [True, False])
async def test_a_group_that_the_broker_does_not_permit(enters: bool) -> None:
    """The first step raises it, and the listener has ended."""
    async with processes(Denied(), 1) as (one,):
        listener = one.hub.listen("secret")
        with pytest.raises(PachinkoError, match="does not permit"):
            await (listener.__aenter__() if enters else anext(listener))
        assert one.hub.groups == frozenset()
        assert await rest(listener) == []
