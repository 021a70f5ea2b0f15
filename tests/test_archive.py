"""Kept groups of several processes: what comes by the feed, what is read, and what is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import falcon.asgi
import pytest
from support import PATIENCE, let_clients_join, until

import pachinko
import pachinko_cluster
from pachinko import (
    BrokerAway,
    Client,
    Connection,
    Hub,
    Pachinko,
    PachinkoError,
    Position,
    SyncHub,
    Window,
    simulate,
)
from pachinko_cluster import (
    Archive,
    Past,
    SimulatedBroker,
    SimulatedConnection,
    write_rules,
)

ROOM = "room:a"
SEVEN = {"room:": {"messages": 7}}


def app_of(
    *rules: Mapping[str, dict[str, Any]], **options: Any
) -> Callable[[], falcon.asgi.App[Any, Any]]:
    """What makes an app that keeps groups: each process by the next rules, or by the last ones.

    A client joins the groups of its query, and on demand.
    """
    left = [*rules] or [SEVEN]

    def make() -> falcon.asgi.App[Any, Any]:
        hub, app = Hub(), falcon.asgi.App()
        for prefix, window in (left.pop(0) if len(left) > 1 else left[0]).items():
            hub.keep(prefix, **window)
        ws = Pachinko(app, "/ws", hub=hub, **options)

        @ws.connect
        async def connect(conn: Connection) -> None:
            for group in conn.req.get_param_as_list("group") or ():
                await conn.join(group)

        let_clients_join(ws)

        return app

    return make


async def enter(process: Any, at: Any = None, *, group: str = ROOM) -> Client:
    """Connect a client that wants to resume *group*, at a position or for the first time."""
    resume = {"groups": {group: at}} if at is not None else {}
    query = {"group": group, "resume": json.dumps(resume)}
    client: Client = await process.connect("/ws", query=query)
    return client


async def watch(process: Any, *groups: str) -> Client:
    """Connect a client that wants no verdicts."""
    return await process.connect("/ws", query={"group": groups or (ROOM,)})


def heard(client: Client) -> list[Any]:
    """What has come to groups: payloads, and of verdicts their type and what they say."""
    return [
        each.payload if each.type == "said"
        else (each.type, each.payload.get("reason", each.payload.get("replayed")))
        for each in client.received if each.group is not None
    ]  # fmt: skip


def last(client: Client) -> str:
    """The position that a client has."""
    return next(each.at for each in reversed(client.received) if each.at is not None)


async def say(process: Any, *payloads: object, group: str = ROOM) -> None:
    for payload in payloads:
        await process.hub.send(group, "said", payload)


def links(process: Any) -> list[SimulatedConnection]:
    return [*process._links.values()]


def cut(process: Any) -> None:
    """End the connection of one process to the broker; it connects again at once."""
    for link in links(process):
        link.cut("a test wants it")


@contextlib.asynccontextmanager
async def away(*processes: Any) -> AsyncIterator[None]:
    """Keep processes from their broker for a while. Others have it."""
    unlucky = {link for process in processes for link in links(process)}
    real = SimulatedConnection.start
    back = asyncio.Event()

    async def start(self: SimulatedConnection, *given: Any) -> None:
        if self in unlucky and not back.is_set():
            await back.wait()
        await real(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimulatedConnection, "start", start)
        patch.setattr(pachinko_cluster, "_CONNECT", PATIENCE)
        for process in processes:
            cut(process)
        down = lambda: [each.hub.stats()["broker_down"] for each in processes]  # noqa: E731
        await until(lambda: all(down()))
        yield
        back.set()
        await until(lambda: not any(down()))


async def lose(process: Any, work: Awaitable[None]) -> None:
    """Do *work*. The process does not get what is sent to it meanwhile."""
    (link,) = links(process)
    messages, link.messages = link.messages, asyncio.Queue()
    await work
    link.messages = messages


class Reads:
    """What processes read of the past; a test may hold it up, or let it fail."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.error: Exception | None = None
        self.is_early = True  # What is answered is what was known before the wait.

    @classmethod
    def use(cls, patch: pytest.MonkeyPatch) -> Reads:
        reads = cls()

        async def past(self: SimulatedConnection, subject: str, count: int, *more: Any) -> Past:
            return await reads.past(self, subject, count, *more)

        patch.setattr(SimulatedConnection, "past", past)
        return reads

    async def past(
        self, connection: SimulatedConnection, subject: str, count: int, *more: Any
    ) -> Past:
        self.counts.append(count)
        found = await REAL_PAST(connection, subject, count, *more)
        await self.goes_on.wait()
        if self.error is not None:
            raise self.error
        return found if self.is_early else await REAL_PAST(connection, subject, count, *more)


REAL_PAST = SimulatedConnection.past


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads.use(monkeypatch)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has lost its broker tries again soon."""
    monkeypatch.setattr(pachinko_cluster, "_RECONNECT", (0.01,))


def errors(caplog: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in each.getMessage() for each in caplog.records)


# Positions


async def test_all_processes_have_the_same_positions() -> None:
    """A client goes on in any of them, also in one that nobody was in."""
    async with simulate(app_of()) as sim:
        other, third = await sim.process(), await sim.process()
        one, two = await enter(sim), await watch(other)
        await say(sim, 1)
        await say(other, 2)
        await say(third, 3)
        await sim.settle()
        assert heard(one) == [("resume", 0), 1, 2, 3] and heard(two) == [1, 2, 3]
        assert [each.at for each in one.received][1:] == [each.at for each in two.received]
        at = one.received[1].at
        for process in (sim, other, third):
            client = await enter(process, at)
            await sim.settle()
            assert heard(client) == [2, 3, ("resume", 2)] and last(client) == last(one)


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_process_that_comes_again_knows_what_was(how: str) -> None:
    """Whether it has ended by itself or not; in between, another one has sent something."""
    async with simulate(app_of()) as sim:
        other = await sim.process()
        client = await enter(other)
        await say(other, 1)
        await sim.settle()
        at = last(client)
        other.kill()
        if how == "stop":
            await other.stop()
        await say(sim, 2)
        client = await enter(await sim.process(), at)
        await sim.settle()
        await say(sim, 3)
        await sim.settle()
        assert heard(client) == [2, ("resume", 1), 3]


async def test_a_process_without_members_knows_position_and_history() -> None:
    """So does a program without an app, which learns the rules."""
    async with simulate(app_of()) as sim:
        client = await enter(sim)
        before = await sim.hub.position(ROOM)
        await say(sim, 1, 2, 3)
        await sim.settle()
        other, program = await sim.process(), Hub()
        program.configure(sim.broker.connection("0"))
        async with program.open():
            for hub in (sim.hub, other.hub, program):
                assert await hub.position(ROOM) == last(client)
                found = [each async for each in hub.history(ROOM, last=2)]
                assert [(each.payload, each.at) for each in found] == [
                    (each.payload, each.at) for each in client.received[2:]
                ]
                assert [each async for each in hub.history(ROOM, last=0)] == []
                assert len([each async for each in hub.history(ROOM)]) == 3
                with pytest.raises(PachinkoError, match="not kept"):
                    await hub.position("lobby")
            await program.send(ROOM, "said", 4)
            await program.send("lobby", "said", 4)
        page = await enter(other, before)
        await sim.settle()
        assert heard(page) == [1, 2, 3, 4, ("resume", 4)]
        assert heard(client) == [("resume", 0), 1, 2, 3, 4]


async def test_history_is_as_old_as_the_window() -> None:
    """Also where the broker still has more."""
    async with simulate(app_of({"room:": {"seconds": 10.0}})) as sim:
        await say(sim, 1)
        await sim.advance(6)
        await say(sim, 2)
        await sim.advance(5)
        assert [each.payload async for each in sim.hub.history(ROOM)] == [2]
        client = await enter(sim, await sim.hub.position(ROOM))
        await sim.settle()
        assert heard(client) == [("resume", 0)]


async def test_history_needs_the_broker(reads: Reads) -> None:
    """Without it, or if it fails, the call raises within 5 seconds."""
    async with simulate(app_of()) as sim:
        reads.error = ConnectionError("no luck")
        with pytest.raises(BrokerAway, match="'room:a' was not read: ConnectionError: no luck"):
            await sim.hub.position(ROOM)
        reads.error = PachinkoError("not permitted")
        with pytest.raises(PachinkoError, match=r"^not permitted$"):
            await sim.hub.position(ROOM)
        sim.broker.lose()
        with pytest.raises(BrokerAway):
            await sim.hub.position(ROOM)


# Joining while the past is read


async def test_a_first_join_misses_nothing_while_the_past_is_read(reads: Reads) -> None:
    """Whoever joins first, or later, gets all that is sent after its join, behind its verdict."""
    async with simulate(app_of()) as sim:
        other = await sim.process()
        await say(other, 0)
        reads.goes_on.clear()
        first = await enter(sim)
        await say(other, 1)
        await sim.settle()  # It has come.
        second = await enter(sim)
        await say(other, 2)
        await sim.settle()
        reads.goes_on.set()
        await sim.settle()
        await say(other, 3)
        await sim.settle()
        assert heard(first) == [1, 2, ("resume", 2), 3]
        assert heard(second) == [("resume", 0), 2, 3]


async def test_live_members_do_not_wait_for_a_read(reads: Reads) -> None:
    """Those who resume meanwhile get it once, in its order."""
    async with simulate(app_of()) as sim:
        client = await enter(sim)
        await say(sim, 1, 2, 3)
        await sim.settle()
        at, other = client.received[1].at, await sim.process()
        reads.goes_on.clear()
        live, late = await watch(other), await enter(other, at)
        await say(sim, 4, 5)
        await sim.settle()
        assert heard(live) == [4, 5] and heard(late) == []
        reads.goes_on.set()
        await sim.settle()
        await say(other, 6)
        await sim.settle()
        assert heard(live) == [4, 5, 6]
        assert heard(late) == [2, 3, 4, 5, ("resume", 4), 6]


async def test_the_past_of_a_group_is_read_once(reads: Reads) -> None:
    """However many resume, as long as there is a member; for those who join first, never."""
    async with simulate(app_of()) as sim:
        client = await enter(sim)
        await say(sim, 1, 2, 3)
        await sim.settle()
        positions = [each.at for each in client.received]
        other = await sim.process()
        reads.counts.clear()
        await watch(other)
        for at in positions:
            late = await enter(other, at)
            await sim.settle()
            assert heard(late)[-1][0] == "resume"
            await enter(other)
        assert reads.counts == [0, 7]


async def test_each_read_goes_further_back_than_it_has_to(reads: Reads) -> None:
    """So a group is read a few times only, also if each client is behind the one before it."""
    async with simulate(app_of({"room:": {"messages": 64}})) as sim:
        client = await enter(sim)
        await say(sim, *range(40))
        await sim.settle()
        other = await sim.process()
        reads.counts.clear()
        for n in range(40, -1, -1):
            late = await enter(other, client.received[n].at)
            await sim.settle()
            assert heard(late) == [*range(n, 40), ("resume", 40 - n)]
        assert len(reads.counts) <= 8


async def test_who_comes_while_the_past_is_read_waits_for_the_next_one(reads: Reads) -> None:
    """What it has may be newer than what was read, and than what the feed has brought."""
    async with simulate(app_of()) as sim:
        other = await sim.process()
        client = await enter(sim)
        await say(sim, 1)
        await sim.settle()
        reads.goes_on.clear()
        old = await enter(other, client.received[0].at)
        await until(lambda: 7 in reads.counts)
        await lose(other, say(sim, 2))
        await sim.settle()
        late = await enter(other, last(client))
        await sim.settle()
        reads.goes_on.set()
        await sim.settle()
        assert heard(old) == [1, 2, ("resume", 2)]
        assert heard(late) == [("resume", 0)]


@pytest.mark.parametrize(
    ("invent", "counts"),
    [
        (lambda at: at[:-1] + "9", [7]),  # ahead of all that there is
        (lambda at: "elsewhere.1", [7]),
        (lambda at: "nothing of ours", []),
        (lambda at: 5, []),
    ],
)
async def test_an_invented_position_is_a_gap(
    reads: Reads, invent: Callable[[str], Any], counts: list[int]
) -> None:
    """Once the broker was asked, where it could be one of ours."""
    async with simulate(app_of()) as sim:
        live = await enter(sim)
        await say(sim, 1)
        await sim.settle()
        reads.counts.clear()
        client = await enter(sim, invent(last(live)))
        await sim.settle()
        await say(sim, 2)
        await sim.settle()
        assert heard(client) == [("gap", "epoch"), 2] and reads.counts == counts
        assert heard(live) == [("resume", 0), 1, 2]


async def test_what_is_in_a_broker_and_none_of_ours_is_left_out() -> None:
    """As it is left out where it is only sent."""
    async with simulate(app_of()) as sim:
        client = await enter(sim)
        await say(sim, 1)
        subject = pachinko_cluster.subject_of("pachinko", pachinko.Kind.GROUP, ROOM)
        await links(sim)[0].keep(subject, b"{}", Window(7, 300.0, 1_000))
        await say(sim, 2)
        await sim.settle()
        other = await enter(await sim.process(), client.received[0].at)
        await sim.settle()
        assert heard(client)[1:] == [1, 2] and heard(other) == [1, 2, ("resume", 2)]
        assert sim.hub.stats()["refused"] == 1


@pytest.mark.parametrize("is_last", [True, False])
async def test_what_only_a_later_version_can_read_is_a_gap(is_last: bool) -> None:
    """For who lacks it; who has got a gap for it, or comes from behind it, goes on."""
    async with simulate(app_of()) as sim:
        await enter(sim)
        await say(sim, 1)
        subject = pachinko_cluster.subject_of("pachinko", pachinko.Kind.GROUP, ROOM)
        await links(sim)[0].keep(subject, b'{"v":9}\n?', Window(7, 300.0, 1_000))
        await say(sim, *(() if is_last else (2, 3)))
        await sim.settle()
        late = [await enter(await sim.process(), at) for at in await kept_by(sim)]
        await sim.settle()
        expected: list[Any] = [[("gap", "expired")]]
        if not is_last:
            expected += [[3, ("resume", 1)], [("resume", 0)]]
        assert [heard(each) for each in late] == expected


async def kept_by(process: Any) -> list[str]:
    """The positions of the messages to the group that are kept."""
    return [each.at async for each in process.hub.history(ROOM)]


async def test_who_sends_without_knowing_the_rules_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once: its messages reach the members, but nobody numbers them."""
    async with simulate(app_of()) as sim:
        clients = [await watch(sim), await watch(sim, "other")]
        relay = sim.hub.state.relay
        for group in (ROOM, ROOM, "other"):
            await relay._publish(pachinko.Kind.GROUP, group, "send", frame=said_to(group))
        await sim.settle()
        assert [len(each.received) for each in clients] == [2, 1]
    texts = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert len(texts) == 1 and f"sends to '{ROOM}', which is kept," in texts[0]


def said_to(group: str) -> bytes:
    return json.dumps({"type": "said", "payload": 1, "group": group}).encode()


async def test_an_outage_may_lose_what_is_sent_to_all() -> None:
    """Who gets no other gap is told so by one without a group."""
    async with simulate(app_of()) as sim:
        other = await sim.process()
        clients = [await watch(sim), await watch(sim, ROOM, "other"), await watch(sim, "other")]
        async with away(sim):
            await other.hub.broadcast("news")
        await sim.settle()
        gaps = [[each.payload["group"] for each in client.received] for client in clients]
        assert gaps == [[None], ["other"], ["other"]]


async def test_who_has_left_meanwhile_gets_nothing(reads: Reads) -> None:
    """A member that is back then gets one verdict; an old read tells nothing of the new one."""
    async with simulate(app_of()) as sim:
        client = await enter(await sim.process())
        await say(sim, 1)
        await sim.settle()
        reads.goes_on.clear()
        gone, back = await enter(sim, client.received[0].at), await enter(sim, group="room:b")
        gone.cut()
        await back.send("leave", "room:b")
        await sim.settle()
        await back.send("join", "room:b")
        await sim.settle()
        reads.goes_on.set()
        await say(sim, 2)
        await say(sim, 3, group="room:b")
        await sim.settle()
        assert heard(gone) == [] and heard(back) == [3, ("resume", 1)]


async def test_who_comes_and_goes_while_nothing_can_be_read_is_forgotten(
    reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who stay begin when it can be."""
    monkeypatch.setattr(pachinko_cluster, "_LEFT", 5)
    async with simulate(app_of()) as sim:
        reads.goes_on.clear()
        stays, restless = await enter(sim), await enter(sim, group="other")
        for _ in range(50):
            for type in ("join", "leave"):
                await restless.request(type, ROOM)
        relay = sim.hub.state.relay
        assert len(relay._archive._feeds[ROOM]._waiting) <= 10
        reads.goes_on.set()
        await sim.settle()
        assert not relay._archive._feeds[ROOM]._waiting
        await say(sim, 1)
        await sim.settle()
        assert heard(stays) == [("resume", 0), 1] and not heard(restless)


async def test_a_member_leaves_while_it_gets_what_it_has_missed(reads: Reads) -> None:
    """The rest of that is delivered to nobody, and the next member begins anew."""
    async with simulate(app_of()) as sim:
        other = await sim.process()
        client = await enter(sim)
        await sim.settle()
        real = sim.hub.state.relay._archive.deliver

        async def deliver(group: str, frame: Any, excluded: Any) -> None:
            await real(group, frame, excluded)
            client.cut()
            await until(lambda: not sim.hub.groups)

        async with away(sim):
            await say(other, 1, 2)
            sim.hub.state.relay._archive.deliver = deliver
        await sim.settle()
        assert sim.hub.groups == frozenset()
        sim.hub.state.relay._archive.deliver = real
        client = await enter(sim)
        await say(other, 3)
        await sim.settle()
        assert heard(client)[-1] == 3


async def test_a_broker_may_say_a_later_top(monkeypatch: pytest.MonkeyPatch) -> None:
    """A position of that is as good; what comes then is behind it."""
    async with simulate(app_of()) as sim:
        live = await enter(sim)
        await say(sim, 1)
        for _ in range(5):
            next(sim.broker.numbers)

        async def later(self: SimulatedConnection, subject: str, count: int, *more: Any) -> Past:
            found = await REAL_PAST(self, subject, count, *more)
            return found._replace(top=found.top + 5)

        monkeypatch.setattr(SimulatedConnection, "past", later)
        at = await sim.hub.position(ROOM)
        client = await enter(sim, at)
        await sim.settle()
        monkeypatch.setattr(SimulatedConnection, "past", REAL_PAST)
        await say(sim, 2)
        await sim.settle()
        assert heard(client) == [("resume", 0), 2] and heard(live) == [("resume", 0), 1, 2]


async def test_who_is_ahead_of_what_a_broker_says_of_a_part_waits_for_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NATS numbers what all groups get, and is not always asked how far it is."""

    async def past(
        self: SimulatedConnection, subject: str, count: int, after: Position | None = None
    ) -> Past:
        found = await REAL_PAST(self, subject, count)
        is_quick = not count or (after is not None and after.number == found.top)
        return found if is_quick else found._replace(top=found.top + 1)

    async with simulate(app_of()) as sim:
        other = await sim.process()
        client = await enter(other)
        await say(other, 1)
        await sim.settle()
        monkeypatch.setattr(SimulatedConnection, "past", past)
        epoch, _, number = last(client).partition(".")
        ahead = f"{epoch}.{int(number) + 1}"
        async with away(sim):
            entering = [asyncio.create_task(enter(sim, at)) for at in (last(client), ahead)]
            await until(lambda: len(sim.hub.state.registry.groups.get(ROOM, ())) == 2)
        late = [await each for each in entering]
        await sim.settle()
        assert [heard(each) for each in late] == [[("resume", 0)]] * 2
        assert [last(each) for each in late] == [ahead] * 2


async def test_many_begin_in_turns(reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nobody else waits for all of them."""
    monkeypatch.setattr(pachinko_cluster, "_BEGUN_A_TURN", 2)
    async with simulate(app_of()) as sim:
        await say(sim, 1)
        reads.goes_on.clear()
        clients = [await enter(sim) for _ in range(5)]
        clients[3].cut()
        reads.goes_on.set()
        await say(sim, 2)
        await sim.settle()
        del clients[3]
        assert all(("resume", 0) in heard(each) or ("resume", 1) in heard(each) for each in clients)
        assert all(each.received[-1].at == clients[0].received[-1].at for each in clients)


# Sending


async def test_a_send_returns_when_its_own_copy_is_back(reads: Reads) -> None:
    """Also while the process reads what it has missed before."""
    async with simulate(app_of()) as sim:
        other = await sim.process()
        client = await enter(sim)
        await sim.settle()
        async with away(sim):
            await say(other, 1)
            reads.goes_on.clear()
        await asyncio.wait_for(say(sim, 2), PATIENCE)
        assert heard(client) == [("resume", 0)]
        reads.goes_on.set()
        await sim.settle()
        assert heard(client) == [("resume", 0), 1, 2]


async def test_a_close_comes_behind_what_was_sent(reads: Reads) -> None:
    """To a kept group as to any other."""
    async with simulate(app_of()) as sim:
        client = await enter(await sim.process())
        await say(sim, 1)
        await sim.hub.close_group(ROOM, 4000, "over")
        await sim.settle()
        assert heard(client) == [("resume", 0), 1] and client.end == (4000, "over")


# Outages


async def test_what_was_missed_in_a_short_outage_is_delivered() -> None:
    """In its order, once, and without a gap, to all members; and so is what comes meanwhile."""
    async with simulate(app_of()) as sim:
        other = await sim.process()
        clients = [await enter(sim), await watch(sim), await watch(other)]
        await say(sim, 1)
        await sim.settle()
        async with away(sim):
            await say(other, 2, 3)
        await say(other, 4)
        await sim.settle()
        assert [heard(each)[-4:] for each in clients] == [[1, 2, 3, 4]] * 3
        late = await enter(sim, clients[0].received[1].at)
        await sim.settle()
        assert heard(late) == [2, 3, 4, ("resume", 3)]


async def test_what_comes_while_the_missed_is_read_waits_for_it(reads: Reads) -> None:
    """Whether the read has begun or not, and whether it is of before or after."""
    async with simulate(app_of()) as sim:
        other = await sim.process()
        client = await enter(sim)
        await say(other, 1)
        await sim.settle()
        for is_early in (True, False):
            reads.is_early = is_early
            async with away(sim):
                await say(other, 2)
                reads.goes_on.clear()
            await say(other, 3, 4)
            await sim.settle()
            assert 2 not in heard(client)
            reads.goes_on.set()
            await sim.settle()
            assert heard(client)[-4:] == [1, 2, 3, 4]
            client = await enter(sim)
            await say(other, 1)
            await sim.settle()


async def test_an_outage_that_outlasts_the_window_is_a_gap() -> None:
    """At the place where it goes on; listeners of the process are told, too."""
    async with simulate(app_of({"room:": {"messages": 2}})) as sim:
        other = await sim.process()
        clients = [await enter(sim), await watch(sim)]
        told = list[str]()

        async def listen() -> None:
            async for envelope in sim.hub.listen(ROOM):
                told.append(envelope.type)

        task = asyncio.create_task(listen())
        await say(sim, 1)
        await sim.settle()
        async with away(sim):
            await say(other, 2, 3, 4)
        await sim.settle()
        at = last(clients[0])
        await say(other, 5)
        await sim.settle()
        assert [heard(each)[-3:] for each in clients] == [[1, ("gap", "broker"), 5]] * 2
        assert told == ["said", "gap", "said"]
        late = await enter(other, at)
        await sim.settle()
        assert heard(late) == [5, ("resume", 1)]
        task.cancel()


async def test_a_quiet_group_has_no_gap_after_an_outage() -> None:
    """Neither one without any message, nor one whose messages are long gone."""
    async with simulate(app_of({"room:": {"seconds": 10.0}})) as sim:
        old, new = await enter(sim), await enter(sim, group="room:b")
        await say(sim, 1)
        await sim.advance(60)
        async with away(sim):
            pass
        await sim.settle()
        at = last(old)
        assert heard(old) == [("resume", 0), 1] and heard(new) == [("resume", 0)]
        for process in (sim, await sim.process()):
            client = await enter(process, at)
            await sim.settle()
            assert heard(client) == [("resume", 0)]


async def test_a_group_that_is_quiet_for_days_has_no_gap_after_an_outage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A broker forgets where it was after a day, and a process asks before that."""
    floor = 0

    async def forgetful(self: SimulatedConnection, *given: Any) -> Past:
        found = await REAL_PAST(self, *given)
        latest = max((kept[-1][0].number for kept in sim.broker.kept.values()), default=0)
        entries = [each for each in found.entries if each.number > floor]
        return Past(found.epoch, latest, max(found.floor, floor), entries)

    monkeypatch.setattr(SimulatedConnection, "past", forgetful)
    monkeypatch.setattr(pachinko_cluster, "_FORGET", 200.0)
    async with simulate(app_of({"room:": {"seconds": 50.0}})) as sim:
        other = await sim.process()
        quiet, never = await enter(sim), await enter(sim, group="room:b")
        await say(sim, 1)
        for _ in range(6):
            before = (await other.hub.position("room:busy")).rpartition(".")[2]
            await say(other, *range(3), group="room:busy")
            await sim.advance(100)
            floor = int(before)
        async with away(sim):
            pass
        await sim.settle()
        assert heard(quiet) == [("resume", 0), 1] and heard(never) == [("resume", 0)]
        late = await enter(sim)
        await sim.settle()
        again = await enter(other, last(late))
        await sim.settle()
        assert heard(again) == [("resume", 0)]


async def test_what_comes_before_all_is_subscribed_is_read(
    reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link throws it away, since it would overtake what was missed before it.

    It is not in what was read before that either, for a client that comes from elsewhere.
    """
    real_subscribe, real_deliver = SimulatedConnection.subscribe, Archive.deliver
    is_waiting, is_subscribed = asyncio.Event(), asyncio.Event()
    is_delivering, goes_on = asyncio.Event(), asyncio.Event()
    waits = pachinko_cluster.subject_of("pachinko", pachinko.Kind.GROUP, "room:b")
    failures = [ConnectionResetError("a first attempt")]  # Joins do not wait for a second one.

    async def subscribe(self: SimulatedConnection, subject: str) -> None:
        if subject == waits:
            if failures:
                raise failures.pop()
            is_waiting.set()
            await is_subscribed.wait()
        await real_subscribe(self, subject)

    async def deliver(self: Archive, *what: Any) -> None:
        if self.link is link:  # Many members take as long.
            is_delivering.set()
            await goes_on.wait()
        await real_deliver(self, *what)

    async with simulate(app_of()) as sim:
        other = await sim.process()
        clients = [await enter(sim), await enter(sim, group="room:b"), await enter(other)]
        await say(other, 1)
        await sim.settle()
        monkeypatch.setattr(SimulatedConnection, "subscribe", subscribe)
        monkeypatch.setattr(Archive, "deliver", deliver)
        link = sim.hub.state.relay._link
        (connection,) = links(sim)
        subject = pachinko_cluster.subject_of("pachinko", pachinko.Kind.GROUP, ROOM)
        cut(sim)
        await until(lambda: is_waiting.is_set() and subject in connection.subjects)
        await say(other, 2)
        await until(lambda: 2 in heard(clients[2]))
        before = len(reads.counts)
        reads.goes_on.clear()
        entering = asyncio.create_task(enter(sim, last(clients[2])))
        await until(lambda: len(reads.counts) > before)
        await say(other, 3)
        await until(connection.messages.empty)
        assert not link.is_connected
        is_subscribed.set()
        await until(lambda: link.is_connected)
        reads.goes_on.set()
        await is_delivering.wait()
        await say(other, 4)
        await until(connection.messages.empty)
        goes_on.set()
        late = await entering
        await sim.settle()
        assert heard(clients[0]) == [("resume", 0), 1, 2, 3, 4]
        assert heard(clients[1]) == [("resume", 0)]
        assert heard(late) == [3, 4, ("resume", 2)]


async def test_an_outage_before_anything_was_known_is_a_gap(reads: Reads) -> None:
    """Nobody can tell what was sent after the join: neither who is live nor who waits."""
    async with simulate(app_of()) as sim:
        other = await sim.process()
        reads.goes_on.clear()
        live, first = await watch(sim), await enter(sim)
        later = await sim.connect("/ws", query={"group": ROOM, "resume": "message"})
        async with away(sim):
            await say(other, 1)
        reads.goes_on.set()
        await sim.settle()
        await later.send_text('{"type":"resume"}')
        await sim.settle()
        await say(other, 2)
        await sim.settle()
        assert heard(live) == [("gap", "broker"), 2]
        assert heard(first) == [("gap", "epoch"), 2]
        assert heard(later) == [("gap", "epoch"), 2]


@pytest.mark.parametrize("window", [2, 9])
async def test_an_outage_while_members_catch_up(window: int) -> None:
    """A slow one goes on from the ring, or is told; none gets a message twice."""
    async with simulate(
        app_of({"room:": {"messages": window}}, overflow="replay", outbox=1)
    ) as sim:
        other = await sim.process()
        slow, waits = await enter(sim), await sim.connect(
            "/ws", query={"group": ROOM, "resume": "message"}
        )  # fmt: skip
        await sim.settle()
        slow.stall()
        await say(other, 1, 2, 3)
        await sim.settle()
        async with away(sim):
            await say(other, 4, 5, 6)
        await sim.settle()
        await waits.send_text('{"type":"resume","payload":{}}')
        slow.resume()
        await sim.settle()
        await say(other, 7)
        await sim.settle()
        for client in (slow, waits):
            numbers = [each for each in heard(client) if type(each) is int]
            gaps = [each for each in heard(client) if "gap" in str(each)]
            assert numbers == sorted({*numbers}) and numbers[-1] == 7
            assert (numbers == [1, 2, 3, 4, 5, 6, 7]) == (gaps == [])
            assert bool(gaps) == (window == 2)


async def test_a_read_of_an_earlier_connection_does_not_count(reads: Reads) -> None:
    """Messages may have come between that it does not have."""
    async with simulate(app_of()) as sim:
        other = await sim.process()
        client = await enter(sim)
        await say(sim, 1)
        await sim.settle()
        async with away(sim):
            await say(other, 2)
            reads.goes_on.clear()
        await until(lambda: 7 in reads.counts)
        async with away(sim):
            await say(other, 3)
        await say(other, 4)
        reads.goes_on.set()
        await sim.settle()
        assert heard(client) == [("resume", 0), 1, 2, 3, 4]


async def test_a_hole_in_the_feed_is_filled() -> None:
    """Whatever has lost a message, the one behind it tells."""
    async with simulate(app_of()) as sim:
        other = await sim.process()
        client = await enter(sim)
        await say(other, 1)
        await sim.settle()
        await lose(sim, say(other, 2))
        await say(other, 3)
        await sim.settle()
        await say(other, 4)
        await sim.settle()
        assert heard(client) == [("resume", 0), 1, 2, 3, 4]


async def test_a_hole_that_no_read_can_fill_is_a_gap(reads: Reads) -> None:
    """A broker that has lost something of the past says so by it."""
    async with simulate(app_of()) as sim:
        other = await sim.process()
        client = await enter(sim)
        await say(other, 1)
        await sim.settle()
        async with away(sim):
            await say(other, 2)
            reads.goes_on.clear()
        await until(lambda: 7 in reads.counts)
        await lose(sim, say(other, 3))
        await say(other, 4)
        reads.goes_on.set()
        await sim.settle()
        await say(other, 5)
        await sim.settle()
        assert heard(client) == [("resume", 0), 1, 2, ("gap", "broker"), 5]


# A broker that has begun anew


async def test_a_flushed_broker_is_a_gap() -> None:
    """Those who go on learn of it by the next message, and others when they come back."""
    async with simulate(app_of()) as sim:
        other = await sim.process()
        one, two = await enter(sim), await enter(other)
        quiet = await enter(sim, group="room:b")
        await say(sim, 1)
        await sim.settle()
        at = last(one)
        sim.broker.flush()
        await say(other, 2)
        await sim.settle()
        await say(other, 3)
        await sim.settle()
        assert heard(one) == heard(two) == [("resume", 0), 1, ("gap", "epoch"), 3]
        assert heard(quiet) == [("resume", 0)]
        later = one.received[2].at
        for position, expected in ((at, [("gap", "epoch")]), (later, [3, ("resume", 1)])):
            late = await enter(await sim.process(), position)
            await sim.settle()
            assert heard(late) == expected


async def test_a_position_of_a_new_life_is_not_refused_by_who_knows_the_old_one() -> None:
    """A process that has members of a quiet group asks the broker, and tells them."""
    async with simulate(app_of()) as sim:
        quiet = await enter(sim)
        await say(sim, 1)
        await sim.settle()
        sim.broker.flush()
        at = await (await sim.process()).hub.position(ROOM)
        client = await enter(sim, at)
        await sim.settle()
        assert heard(client) == [("resume", 0)]
        assert heard(quiet) == [("resume", 0), 1, ("gap", "epoch")]


async def test_a_broker_that_comes_back_empty_is_a_gap() -> None:
    """To all members of groups that had anything, and to those that had nothing."""
    async with simulate(app_of()) as sim:
        clients = [await enter(sim), await watch(sim), await enter(sim, group="room:b")]
        await say(sim, 1)
        await sim.settle()
        sim.broker.lose()
        await sim.settle()
        sim.broker.flush()
        sim.broker.restore()
        await sim.settle()
        await say(sim, 2)
        await sim.settle()
        assert heard(clients[0]) == [("resume", 0), 1, ("gap", "epoch"), 2]
        assert heard(clients[1]) == [1, ("gap", "epoch"), 2]
        assert heard(clients[2]) == [("resume", 0), ("gap", "epoch")]


async def test_a_read_of_an_earlier_life_does_not_count(reads: Reads) -> None:
    """The feed has told of the new one meanwhile."""
    async with simulate(app_of()) as sim:
        live = await enter(sim)
        await say(sim, 1)
        await sim.settle()
        reads.goes_on.clear()
        client = await enter(sim, last(live)[:-1] + "5")
        await until(lambda: 7 in reads.counts)
        sim.broker.flush()
        await say(sim, 2)
        await sim.settle()
        reads.goes_on.set()
        await sim.settle()
        await say(sim, 3)
        await sim.settle()
        assert heard(live) == [("resume", 0), 1, ("gap", "epoch"), 3]
        assert heard(client) == [("gap", "epoch"), 3]


async def test_what_came_of_an_earlier_life_during_a_read_does_not_count(reads: Reads) -> None:
    """The read has told of the new one. Positions of the old one end for that reason."""
    reads.is_early = False
    async with simulate(app_of()) as sim:
        other = await sim.process()
        live, there = await enter(sim), await enter(other)
        async with away(sim):
            await say(other, 1)
            reads.goes_on.clear()
        await until(lambda: 7 in reads.counts)
        entering = asyncio.create_task(enter(sim, last(there)))
        await say(other, 2)
        await until(links(sim)[0].messages.empty)
        sim.broker.flush()
        reads.goes_on.set()
        late = await entering
        await sim.settle()
        await say(other, 3)
        await sim.settle()
        assert heard(live) == [("resume", 0), ("gap", "epoch"), 3]
        assert heard(late) == [("gap", "epoch"), 3]
        assert await sim.hub.position(ROOM) == last(live) == last(late)


# Reads that fail


async def test_a_read_that_fails_is_tried_again(
    reads: Reads, caplog: pytest.LogCaptureFixture
) -> None:
    """Once a second, and logged once. Others go on, and nothing is lost."""
    async with simulate(app_of()) as sim:
        other = await sim.process()
        behind, ready = await enter(sim), await enter(other)
        await say(sim, 1)
        await sim.settle()
        reads.error = OSError("no luck")
        async with away(sim):
            await say(other, 2)
        late = await enter(other, "elsewhere.5")
        reads.counts.clear()
        for n in range(3, 6):
            await say(other, n)
            await sim.advance(1.01)
        assert 3 <= len(reads.counts) <= 2 * 4
        assert errors(caplog, "'room:a' was not read: OSError: no luck; trying again") == 2
        assert heard(behind) == [("resume", 0), 1] and heard(late) == []
        assert heard(ready) == [("resume", 0), 1, 2, 3, 4, 5]
        reads.error = None
        await sim.advance(1.01)
        assert heard(behind) == [("resume", 0), 1, 2, 3, 4, 5]
        assert heard(late) == [("gap", "epoch")]


async def test_a_read_that_takes_too_long_is_tried_again(
    reads: Reads, caplog: pytest.LogCaptureFixture
) -> None:
    """After 4 seconds. Who has left until then is not read for."""
    async with simulate(app_of()) as sim:
        await say(sim, 1)
        at = await sim.hub.position(ROOM)
        reads.goes_on.clear()
        client, gone = await enter(sim, at), await enter(sim, at, group="room:b")
        await sim.advance(4.1)
        assert errors(caplog, "no answer within") == 1
        gone.cut()
        await sim.settle()
        reads.counts.clear()
        reads.goes_on.set()
        await sim.advance(1.01)
        assert heard(client) == [("resume", 0)] and len(reads.counts) == 1


async def test_a_broker_that_goes_is_not_asked(
    reads: Reads, caplog: pytest.LogCaptureFixture
) -> None:
    """It is asked when it is back, at once."""
    async with simulate(app_of()) as sim:
        client = await enter(sim)
        await say(sim, 1)
        await sim.settle()
        reads.goes_on.clear()
        late = await enter(sim, last(client)[:-1] + "9")
        sim.broker.lose()
        await sim.settle()
        reads.error = ConnectionError()
        reads.goes_on.set()
        await sim.settle()
        reads.counts.clear()
        await sim.advance(5)
        # A read that fails before the link has noticed the loss is logged.
        assert reads.counts == [] and errors(caplog, "was not read") <= 1
        reads.error = None
        sim.broker.restore()
        await sim.settle()
        assert reads.counts[0] == 7 and heard(late) == [("gap", "epoch")]


async def test_a_message_to_no_member_is_delivered_to_nobody(reads: Reads) -> None:
    """It may still come when the last one has left."""
    async with simulate(app_of()) as sim:
        client = await enter(sim)
        await sim.settle()
        archive = sim.hub.state.relay._archive
        assert isinstance(archive, Archive)
        client.cut()
        await sim.settle()
        await say(sim, 1)
        link = links(sim)[0]
        subject = pachinko_cluster.subject_of("pachinko", pachinko.Kind.GROUP, ROOM)
        assert subject not in link.subjects
        stamp = pachinko_cluster.Stamp("e", 1, 0)
        await archive.take(ROOM, pachinko_cluster.Arrived(stamp, b'{"type":"said"}', ()))


# Shell command and SyncHub


async def run(broker: SimulatedBroker, *arguments: str) -> None:
    """Do what the shell command does, on a broker in memory."""
    given = pachinko_cluster._parser().parse_args([arguments[0], "nats://h", *arguments[1:]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pachinko_cluster, "backplane_of", lambda _: broker.connection("0"))
        await pachinko_cluster._run(given)


async def test_the_shell_sends_to_kept_groups_and_reads_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What it sends is numbered and stored; what it prints has its position."""
    async with simulate(app_of()) as sim:
        client = await enter(sim)
        listening = asyncio.create_task(run(sim.broker, "listen", ROOM, "--count", "2"))
        await until(lambda: len(sim.broker.connections) == 2)
        await sim.settle()
        await run(sim.broker, "send", ROOM, "said", "1")
        await run(sim.broker, "send", ROOM, "said", "2")
        await asyncio.wait_for(listening, PATIENCE)
        await run(sim.broker, "history", ROOM)
        await run(sim.broker, "history", ROOM, "--last", "1")
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [each["at"] for each in found] == [client.received[n].at for n in (1, 2, 1, 2, 2)]
        assert heard(client) == [("resume", 0), 1, 2]
        for broker in (sim.broker, SimulatedBroker()):
            with pytest.raises(PachinkoError, match="not kept"):
                await run(broker, "history", "lobby")


async def test_a_sync_hub_sends_to_kept_groups_and_reads_them() -> None:
    """It learns the rules as other programs do."""
    broker = SimulatedBroker()
    subject = pachinko_cluster.subject_of("pachinko", "history", "rules")
    broker.values[f".{subject}"] = write_rules({"room:": Window(7, 300.0, 1_000)}), 1e12
    with SyncHub(broker.connection()) as hub:

        def work() -> None:
            before = hub.position(ROOM)
            for n in range(3):
                hub.send(ROOM, "said", n)
            found = hub.history(ROOM, last=2)
            assert [each.payload for each in found] == [1, 2]
            assert found[-1].at == hub.position(ROOM) != before
            with pytest.raises(PachinkoError, match="not kept"):
                hub.position("lobby")
            with pytest.raises(ValueError, match="at least 0"):
                hub.history(ROOM, last=-1)

        await asyncio.to_thread(work)
        with pytest.raises(PachinkoError, match=r"`async for envelope in hub\.history\(\.\.\.\)`"):
            hub.history(ROOM)
        with pytest.raises(PachinkoError, match=r"`await hub\.position\(\.\.\.\)`"):
            hub.position(ROOM)


async def test_a_subscription_that_came_late() -> None:
    """What was missed of a kept group until then is read; its members are told of no gap."""
    async with simulate(app_of()) as sim:
        ada = await enter(sim)
        await say(sim, 1)
        relay: Any = sim.hub.state.relay
        relay.restored(pachinko_cluster.subject_of("pachinko", "g", ROOM))
        await say(sim, 2)
        await sim.settle()
        assert heard(ada) == [("resume", 0), 1, 2]
