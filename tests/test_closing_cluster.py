"""Closing clients from any process, here several hubs on one real broker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import Any

import pytest
from brokers import BrokerKind, BrokerProcess, running
from support import PATIENCE, connect, until
from test_closing import OUT, ending
from test_cluster import NAMES, Own, Process, cluster_of, processes, publish_raw

from pachinko import Connection, Hub, Kind, PachinkoError
from pachinko_cluster import PeerMessage


def presence_of(started: list[Process], user: str = "ada") -> Any:
    return asyncio.gather(*(each.hub.presence(user=user) for each in started))


async def test_a_user_with_tabs_on_three_processes_is_gone_within_a_second(
    broker: BrokerProcess,
) -> None:
    """Behind what was sent before; others stay, and nobody is present any more."""
    async with processes(broker.url, 3) as started, contextlib.AsyncExitStack() as stack:
        for each in started:
            bob = await stack.enter_async_context(each.client(user="bob", group="room"))
        fastest, loop = 60.0, asyncio.get_running_loop()
        for each in started:  # The machine may be busy, but not all the time.
            tabs = [
                await stack.enter_async_context(process.client(user="ada", group="room"))
                for process in (*started, each)
            ]
            present = await presence_of(started)
            assert [len(found) for found in present] == [4, 4, 4]
            await each.hub.send_to_user("ada", "mail")
            await each.hub.send("room", "last")
            begun = loop.time()
            await each.hub.close_user("ada", *OUT)
            ends = await asyncio.gather(*map(ending, tabs))
            fastest = min(fastest, loop.time() - begun)
            assert ends == [(["mail", "last"], OUT)] * 4
            await until(lambda: all(process.hub.count == 1 for process in started))
            assert await presence_of(started) == [[], [], []]
        assert fastest < 1
        assert {each.user for each in await started[0].hub.presence("room")} == {"bob"}
        await started[0].hub.send_to_user("bob", "end")
        assert [(await bob.receive())["type"] for _ in range(4)] == ["last"] * 3 + ["end"]
        assert not any(process.hub.stats()["refused"] for process in started)


async def test_one_connection_is_closed_by_its_id_from_any_process(broker: BrokerProcess) -> None:
    """Behind what was sent before; an id that is over, or of no process, is nobody."""
    async with (
        processes(broker.url) as (one, two),
        one.client(user="ada") as a,
        one.client(user="ada") as b,
        two.client(user="ada") as c,
    ):
        by_id = sorted(one.hub.connections, key=lambda conn: conn.id)
        for process, conn in ((two, by_id[0]), (one, by_id[1])):
            await process.hub.send_to(conn.id, "last")
            await process.hub.close(conn.id, *OUT)
        for client in (a, b):
            assert await ending(client) == (["last"], OUT)
        for id in (by_id[0].id, by_id[1].id, "f" * 24, "nobody", "", "\udcff", "x" * 10_000):
            for process in (one, two):
                await process.hub.close(id, *OUT)
        await two.hub.broadcast("still-here")
        assert (await c.receive())["type"] == "still-here"
        assert not one.hub.stats()["refused"] and not two.hub.stats()["refused"]


class Gates:
    """What `authenticate` and the connect handlers of a process wait for."""

    def __init__(self, process: Process) -> None:
        self.asked, self.may_go_on = asyncio.Event(), asyncio.Event()
        self.conns: list[Connection] = []
        self.left: list[Connection] = []
        self.step = ""
        self.process = process
        process.ws.disconnect(self.leave)

    async def leave(self, conn: Connection) -> None:
        self.left.append(conn)

    async def who(self, conn: Connection, token: str | None) -> str | None:
        if token is None:
            return None
        await self.wait(conn)
        return token

    async def late(self, conn: Connection) -> None:
        await self.wait(conn)
        conn.user = "ada"

    async def wait(self, conn: Connection) -> None:
        self.conns.append(conn)
        self.asked.set()
        await self.may_go_on.wait()


@pytest.mark.parametrize("step", ["authenticate", "first message", "connect", "id"])
async def test_a_handshake_in_another_process_does_not_slip_through(
    broker: BrokerProcess, step: str
) -> None:
    """That process has no connection of the user, and has subscribed to nothing."""
    async with processes(broker.url) as (one, two), two.client() as other:
        gates = Gates(one)
        if step == "connect":
            one.ws.connect(gates.late)
        else:
            one.ws.authenticate(gates.who)
            one.ws._routes.connect.clear()  # They would set the user again.

        async def visit() -> Any:
            is_header = step in ("authenticate", "id")
            headers = {"Authorization": "Bearer ada"} if is_header else {}
            async with connect(one.url, additional_headers=headers) as client:
                if step == "first message":
                    await client.send("authenticate", {"token": "ada"})
                return await client.closed()

        visitor = asyncio.create_task(visit())
        await asyncio.wait_for(gates.asked.wait(), PATIENCE)
        if step == "id":
            await two.hub.close(gates.conns[0].id, *OUT)
        else:
            await two.hub.close_user("ada", *OUT)
            await two.hub.broadcast("behind")
            await other.receive()
            await one.hub.broadcast("behind")  # This process has read the close before it.
            await other.receive()
            gates.may_go_on.set()
        assert await visitor == OUT
        await until(lambda: not one.hub.count)
        assert not gates.left and not one.hub.state.registry.arriving
        assert await two.hub.presence(user="ada") == []


@pytest.mark.parametrize("name", [*NAMES, "\ud83d", "50%", "a/b", "\x00"])
async def test_any_text_names_a_user(broker: BrokerProcess, name: str) -> None:
    """Names are data, on both ways of a message."""
    async with processes(broker.url) as (one, two):
        for process in (one, two):

            @process.ws.connect
            async def rename(conn: Connection) -> None:
                conn.user = conn.user or name

        async with one.client() as a, two.client() as b, two.client(user="other") as c:
            await one.hub.close_user(name, *OUT)
            assert await a.closed() == await b.closed() == OUT
            await two.hub.send_to_user("other", "end")
            assert (await c.receive())["type"] == "end"


async def test_what_crosses_the_broker() -> None:
    """The format is that of the first release, which refuses what it does not know."""
    published: list[tuple[str, dict[str, Any]]] = []

    class Noting(Own):
        async def publish(self, subject: str, data: bytes) -> int | None:
            head = json.loads(data.partition(b"\n")[0])
            if head["op"] == "close":
                published.append((subject, {key: head[key] for key in head if key != "n"}))
            return await super().publish(subject, data)

    async with processes(Noting(), 1) as (one,):
        process = one.hub.process
        await one.hub.close_user("ada l.", 4401, "signed out")
        await one.hub.close_user("", 4401)
        await one.hub.close("ab" * 12, 4401)
        await one.hub.close_group("room", 4401)
        await one.hub.close(process + "00" * 6, 4401)  # a connection of this process
    session = {"v": 1, "op": "close", "from": process, "session": 1}
    assert published == [
        ("pachinko.a.all", {**session, "to": "ada%20l%2E", "code": 4401, "reason": "signed out"}),
        ("pachinko.a.all", {**session, "to": "", "code": 4401}),
        (f"pachinko.p.{'ab' * 6}", {**session, "to": "ab" * 12, "code": 4401}),
        ("pachinko.g.room", {**session, "code": 4401}),
    ]


async def test_a_stranger_closes_nobody_by_rubbish(broker: BrokerProcess) -> None:
    """Each wrong message is refused and counted; a right one is taken."""
    async with (
        processes(broker.url) as (one, two),
        one.client(user="ada", group="room") as client,
    ):
        (conn,) = one.hub.connections
        everybody, own = (Kind.EVERYBODY, "all"), (Kind.CONNECTION, one.hub.process)
        head: dict[str, Any] = {"v": 1, "op": "close", "from": "stranger", "session": 1}
        wrong: list[tuple[tuple[Kind, str], dict[str, Any]]] = [
            (everybody, {}),
            (everybody, {"to": None}),
            (everybody, {"to": ["ada"]}),
            (everybody, {"to": "%ff"}),
            (everybody, {"to": "ada", "code": 17}),
            (everybody, {"to": "ada", "code": "4000"}),
            (everybody, {"to": "ada", "reason": "x" * 124}),
            (everybody, {"to": "ada", "reason": 5}),
            (everybody, {"to": "ada", "v": 3}),
            (own, {}),
            (own, {"to": conn.id, "code": 1006}),
            (own, {"to": conn.id, "reason": "ü" * 62}),
            (own, {"to": 5}),
            ((Kind.USER, "ada"), {}),
            ((Kind.USER, "ada"), {"to": "ada"}),
            (everybody, {"to": "ada", "v": 2}),  # A close has no binary frame.
        ]
        for address, fields in wrong:
            await publish_raw(two, *address, json.dumps({**head, **fields}).encode())
        for address, fields in (  # They are well formed, and mean nobody here.
            (everybody, {"to": "bob"}), (everybody, {"to": "%61d%61%20"}), (own, {"to": "nobody"}),
        ):  # fmt: skip
            await publish_raw(two, *address, json.dumps({**head, **fields}).encode())
        await two.hub.send("room", "ours")
        types = [(await client.receive())["type"] for _ in range(2)]
        assert types == ["gap", "ours"]  # Another version may be anything.
        everywhere = sum(address is everybody for address, _ in wrong)
        await until(lambda: one.hub.stats()["refused"] == len(wrong))
        await until(lambda: two.hub.stats()["refused"] == everywhere)
        await publish_raw(two, *everybody, json.dumps({**head, "to": "ad%61"}).encode())
        assert (await client.closed())[0] == 1000


async def test_an_older_process_refuses_it(caplog: pytest.LogCaptureFixture) -> None:
    """It knows no `close` but that of a group, and counts it; newer ones are reached."""
    async with (
        processes(Own(), 1) as (old,),
        processes(Own(), 1) as (new,),
        old.client(user="ada") as stays,
        new.client(user="ada") as goes,
    ):
        cluster = cluster_of(old.hub)
        take = cluster._take

        async def take_as_before(kind: Kind, name: str, message: PeerMessage, frame: bytes) -> None:
            if message.op == "close" and kind is not Kind.GROUP:
                message.op = "unknown"
            await take(kind, name, message, frame)

        cluster._take = take_as_before  # type: ignore[method-assign]  # as the former release
        await new.hub.close_user("ada", *OUT)
        await new.hub.close(next(iter(old.hub.connections)).id, *OUT)
        assert await goes.closed() == OUT
        assert old.hub.stats()["refused"] == 2 and not new.hub.stats()["refused"]
        await old.hub.send_to_user("ada", "still-here")
        assert (await stays.receive())["type"] == "still-here"
    assert caplog.text.count("refused a message from the broker") == 1


async def test_without_the_broker_it_fails_and_closes_nobody(
    kind: BrokerKind, caplog: pytest.LogCaptureFixture
) -> None:
    """As `close_group`; a connection of this process is closed by its id. Later it works."""
    caplog.set_level(logging.CRITICAL, "pachinko")
    async with (
        running(kind) as broker,
        processes(broker.url) as (one, two),
        one.client(user="ada") as a,
        one.client(user="ada") as b,
        two.client() as c,
    ):
        broker.kill()
        await until(lambda: one.hub.stats()["broker_down"])
        foreign = next(iter(two.hub.connections)).id
        for call in (
            one.hub.close_user("ada", *OUT),
            one.hub.close(foreign, *OUT),
            one.hub.presence(user="ada"),
        ):
            with pytest.raises(PachinkoError):
                await call
        await one.hub.close(next(iter(one.hub.connections)).id, *OUT)
        done, left = await asyncio.wait(
            [asyncio.create_task(each.closed()) for each in (a, b)],
            return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE,
        )  # fmt: skip
        assert len(done) == len(left) == 1 and done.pop().result() == OUT
        await broker.start()
        await until(lambda: not any(each.hub.stats()["broker_down"] for each in (one, two)))
        await one.hub.close_user("ada", *OUT)
        assert await left.pop() == OUT
        await one.hub.close(foreign, *OUT)
        assert (await ending(c))[1] == OUT


async def test_a_program_without_an_app_closes_users(broker: BrokerProcess) -> None:
    """An administrator's script, also from a thread."""
    async with (
        processes(broker.url) as (one, two),
        one.client(user="ada") as a,
        two.client(user="ada") as b,
        two.client(user="bob") as c,
        Hub().open(broker.url) as script,
    ):
        await script.close_user("ada", *OUT)
        assert await a.closed() == await b.closed() == OUT
        (bob,) = await script.presence(user="bob")
        await asyncio.wrap_future(script.call_threadsafe(script.close, bob.id, 4000))
        assert await c.closed() == (4000, "")


async def test_a_connect_handler_that_closes_its_user_ends(broker: BrokerProcess) -> None:
    """The call comes back by the broker, and means this client as well."""
    async with processes(broker.url) as (one, two), two.client(user="ada") as tab:
        gates = Gates(one)

        @one.ws.connect
        async def alone(conn: Connection) -> None:
            await one.hub.close_user(conn.user_id, *OUT)

        @one.ws.connect
        async def never(conn: Connection) -> None:
            gates.left.append(conn)

        async with one.client(user="ada") as client:
            assert await client.closed() == OUT
        assert await tab.closed() == OUT
        await until(lambda: not one.hub.count)
        assert not gates.left
