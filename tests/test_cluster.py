"""The hub on several processes, here several hubs on one real broker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import falcon
import pytest
from brokers import BrokerKind, BrokerProcess, environment, running
from support import PATIENCE, Client, Server, connect, let_clients_join, new_app, serving, until

import pachinko_cluster
from pachinko import Connection, Hub, Kind, Pachinko, PachinkoError, Relay, hub, message
from pachinko_cluster import Cluster, PeerMessage, pack, subject_of

NAMES = ["room:1", "a.b.c", ">", "*", "a *", "new\nline", "", "x" * 10_000, "ä☃", "%2E", "{a}"]


@message("said")
class Said:
    text: str


class Process:
    """What takes the place of a process: a hub with an app and a server of its own."""

    def __init__(self, url: Any, namespace: str | None = None, **options: Any) -> None:
        self.hub = Hub()
        self.hub.configure(url, namespace=namespace)
        self.app = new_app()
        self.ws = Pachinko(self.app, "/ws", hub=self.hub, **options)
        self.url = ""

        @self.ws.connect
        async def arrive(conn: Connection) -> None:
            conn.user = conn.req.get_param("user")
            for group in conn.req.get_param_as_list("group") or ():
                await conn.join(group)

        let_clients_join(self.ws)

        @self.ws.on("say")
        async def say(conn: Connection, *, group: str, text: str) -> str:
            await self.hub.send(group, Said(text))
            return text

    @contextlib.asynccontextmanager
    async def client(self, **query: str) -> AsyncIterator[Client]:
        async with connect(self.url + falcon.to_query_str(query)) as client:
            yield client

    async def join(self, client: Client, group: str) -> None:
        assert (await client.ask("join", group))["type"] == "join.reply"


@contextlib.asynccontextmanager
async def processes(url: Any, count: int = 2, **options: Any) -> AsyncIterator[list[Process]]:
    started = [Process(url, **options) for _ in range(count)]
    servers = [Server(process.app) for process in started]
    try:
        await asyncio.gather(*(server.start() for server in servers))
        for process, server in zip(started, servers, strict=True):
            process.url = f"{server.url}/ws"
        yield started
    finally:
        await asyncio.gather(*(server.stop() for server in servers))


class Own:
    """The backplane of the documentation's kind: here, one that connects the hubs of a process."""

    everywhere: ClassVar[list[Own]] = []

    async def start(self, deliver: Any, lost: Any) -> None:
        self.deliver, self.subjects = deliver, set[str]()
        self.everywhere.append(self)

    async def publish(self, subject: str, data: bytes) -> int | None:
        reached = [own for own in self.everywhere if subject in own.subjects]
        for own in reached:
            await own.deliver(subject, data)
        return len(reached)

    async def subscribe(self, subject: str) -> None:
        self.subjects.add(subject)

    async def unsubscribe(self, subject: str) -> None:
        self.subjects.discard(subject)

    async def stop(self) -> None:
        if self in self.everywhere:
            self.everywhere.remove(self)


def cluster_of(hub: Hub) -> Cluster:
    assert isinstance(hub.state.relay, Cluster)
    return hub.state.relay


def text(frame: dict[str, Any]) -> Any:
    return frame["payload"]["text"]


async def test_a_group_reaches_over_processes(broker: BrokerProcess) -> None:
    """From either, each member once; `members` and `groups` are those of the process."""
    async with processes(broker.url) as (one, two), one.client() as a, two.client() as b:
        await one.join(a, "room")
        await two.join(b, "room")
        for n, hub in enumerate((one.hub, two.hub)):
            await hub.send("room", Said(str(n)))
            frame = {"type": "said", "group": "room", "payload": {"text": str(n)}}
            assert await a.receive() == frame and await b.receive() == frame
        assert len(one.hub.members("room")) == len(two.hub.members("room")) == 1
        assert one.hub.groups == two.hub.groups == {"room"}
        await b.ask("leave", "room")
        await one.hub.send("room", Said("one only"))
        await two.hub.send_to(next(iter(two.hub.connections)), "direct")
        assert text(await a.receive()) == "one only"
        assert (await b.receive())["type"] == "direct"


async def test_a_message_sent_after_join_has_returned_arrives(broker: BrokerProcess) -> None:
    """On any process, at once, however many groups there are."""
    async with processes(broker.url) as (one, two), one.client() as client:
        for n in range(20):
            await one.join(client, f"room:{n}")
            await two.hub.send(f"room:{n}", Said(str(n)))
            assert text(await client.receive()) == str(n)


async def test_a_reply_comes_after_the_group_message_sent_before_it(
    broker: BrokerProcess,
) -> None:
    """Promise 1 holds as on one process, also with others that send."""
    async with processes(broker.url) as (one, two), one.client() as a, two.client() as b:
        await one.join(a, "room")
        await two.join(b, "room")

        async def chatter() -> None:
            for n in range(25):
                await b.send("say", {"group": "room", "text": f"b{n}"}, id=n)
            for _ in range(75):
                await b.receive()

        async def say() -> list[str]:
            seen = []
            for n in range(25):
                await a.send("say", {"group": "room", "text": f"a{n}"}, id=n)
            while len(seen) < 75:
                frame = await a.receive()
                seen.append(text(frame) if frame["type"] == "said" else frame["payload"] + "!")
            return seen

        seen, _ = await asyncio.gather(say(), chatter())
        assert [x for x in seen if x[0] == "b"] == [f"b{n}" for n in range(25)]
        own = [x for x in seen if x[0] == "a"]
        assert own == [x for n in range(25) for x in (f"a{n}", f"a{n}!")]


async def test_all_processes_see_one_order(broker: BrokerProcess) -> None:
    """Of each sender, of several that send at the same time; with one Redis of all of them."""
    async with (
        processes(broker.url, 3) as started,
        started[0].client(group="room") as a,
        started[1].client(group="room") as b,
    ):
        await asyncio.gather(
            *(
                p.hub.send("room", Said(f"{k}.{n}"))
                for n in range(50)
                for k, p in enumerate(started)
            )
        )
        seen = [[text(await client.receive()) for _ in range(150)] for client in (a, b)]
        for k in range(3):
            for log in seen:
                assert [x for x in log if x[0] == str(k)] == [f"{k}.{n}" for n in range(50)]
        assert broker.kind == "nats" or seen[0] == seen[1]


@pytest.mark.parametrize("name", NAMES)
async def test_names_are_any_text(broker: BrokerProcess, name: str) -> None:
    """None of them is interpreted, so that no other group gets what is sent to it."""
    others = [other for other in NAMES if other != name]
    async with processes(broker.url) as (one, two), one.client() as a, one.client() as b:
        await one.join(a, name)
        for other in others:
            await one.join(b, other)
        await two.hub.send(name, Said("x"))
        await two.hub.broadcast("end")
        frame = await a.receive()
        assert frame["group"] == name and text(frame) == "x"
        assert (await a.receive())["type"] == (await b.receive())["type"] == "end"


async def test_what_is_no_utf8_reaches_other_processes(broker: BrokerProcess) -> None:
    """Half a surrogate pair in the name of a group, an id, a type or a payload is replaced."""
    async with processes(broker.url) as (one, two), one.client() as client:
        (conn,) = one.hub.connections
        await one.hub.join("\ud83d", conn)
        await two.hub.send("\ud83d", "n\ud83d", {"\ud83d": "\ude00"}, exclude="\ud83d")
        frame = {"type": "n\ufffd", "group": "\ufffd", "payload": {"\ufffd": "\ufffd"}}
        assert await client.receive() == frame


async def test_exclude(broker: BrokerProcess) -> None:
    """A connection, an id or several, of any process; also of a broadcast."""
    async with (
        processes(broker.url) as (one, two),
        one.client(group="room") as a,
        two.client(group="room") as b,
        two.client(group="room") as c,
    ):
        (conn,) = one.hub.connections
        ids = [p.id for p in await one.hub.presence("room")]
        (first, second) = (i for i in ids if i != conn.id)
        await one.hub.send("room", "to-b-and-c", exclude=conn)
        await one.hub.send("room", "to-a-only", exclude=[first, second])
        await two.hub.broadcast("to-all-but-one", exclude=first)
        await two.hub.send("room", "end")
        logs: list[list[str]] = []
        for client in (a, b, c):
            logs.append([])
            while "end" not in logs[-1]:
                logs[-1].append((await client.receive())["type"])
        assert logs[0] == ["to-a-only", "to-all-but-one", "end"]
        assert sorted(logs[1:], key=len) == [
            ["to-b-and-c", "end"],
            ["to-b-and-c", "to-all-but-one", "end"],
        ]


@pytest.mark.parametrize("url", ["memory://", "nats"])
@pytest.mark.parametrize("wrong", [5, [1], [None], b"x", [b"x"]])
async def test_exclude_takes_ids_only(url: str, wrong: Any) -> None:
    """Anything else is told where it was written."""
    async with contextlib.AsyncExitStack() as stack:
        if url == "nats":
            url = (await stack.enter_async_context(running("nats"))).url
        (one,) = await stack.enter_async_context(processes(url, 1))
        with pytest.raises(TypeError):
            await one.hub.send("room", "x", exclude=wrong)


async def test_a_group_that_the_broker_does_not_permit(tmp_path: Any) -> None:
    """A join raises, and does not pretend; a send too; the others go on."""
    config = tmp_path / "nats.conf"
    permissions = '{ allow: "pachinko.>", deny: ["pachinko.g.denied", "pachinko.u.denied"] }'
    config.write_text(
        f"authorization {{ users = [{{ user: u, password: p, permissions: "
        f"{{ publish: {permissions}, subscribe: {permissions} }} }}] }}"
    )
    async with running("nats", "-c", str(config)) as broker:
        url = broker.url.replace("://", "://u:p@")
        async with processes(url, 1) as (one,), one.client(group="room") as client:
            (conn,) = one.hub.connections
            with pytest.raises(PachinkoError, match="does not permit the subscription"):
                await one.hub.join("denied", conn)
            joins = (one.hub.join("denied", conn) for _ in range(3))
            for outcome in await asyncio.gather(*joins, return_exceptions=True):
                assert "does not permit the subscription" in str(outcome)
            assert conn.groups == one.hub.groups == {"room"}
            with pytest.raises(PachinkoError, match="does not permit the publish"):
                await one.hub.send("denied", "x")
            async with one.client(user="denied") as other:
                await one.hub.broadcast("hello")  # it is let in all the same
                assert (await other.receive())["type"] == "hello"
                assert (await client.receive())["type"] == "hello"
            await one.hub.send("room", Said("x"))
            assert text(await client.receive()) == "x"
            assert one.hub.stats()["outages"] == 0


async def test_broadcast_reaches_all(broker: BrokerProcess) -> None:
    """Also those in no group."""
    async with processes(broker.url) as (one, two), one.client() as a, two.client() as b:
        await one.hub.broadcast(Said("all"))
        assert (
            await a.receive() == await b.receive() == {"type": "said", "payload": {"text": "all"}}
        )


async def test_send_to_finds_the_process(broker: BrokerProcess) -> None:
    """By the id; to one that is gone, or to what is no id, nothing happens."""
    async with processes(broker.url) as (one, two), one.client() as a, two.client() as b:
        (there,), (here,) = two.hub.connections, one.hub.connections
        assert there.id.startswith(two.hub.process) and len(there.id) == 24
        await one.hub.send_to(there.id, "far")
        await one.hub.send_to(there.id, "far-too")
        with pytest.raises(PachinkoError, match="another hub"):
            await one.hub.send_to(there, "not-by-the-object")
        await one.hub.send_to(here, "near")
        for nobody in ("", "*", ">", "0" * 24, one.hub.process + "0" * 12, "x.y" * 8):
            await one.hub.send_to(nobody, "nothing")
        assert [(await b.receive())["type"] for _ in "12"] == ["far", "far-too"]
        assert (await a.receive())["type"] == "near"
        await b.close()
        await until(lambda: not two.hub.connections)
        await one.hub.send_to(there.id, "late")


async def test_send_to_user_reaches_all_of_a_users_clients(broker: BrokerProcess) -> None:
    """From the moment at which each is accepted; names of users are any text, too."""
    user = "a.*>\n ü" + "x" * 300
    async with (
        processes(broker.url) as (one, two),
        one.client(user=user) as a,
        two.client(user=user) as b,
        two.client(user="other") as c,
    ):
        await one.hub.send_to_user(user, "for-you")
        await one.hub.send_to_user("nobody", "for-nobody")
        await one.hub.broadcast("end")
        assert (await a.receive())["type"] == (await b.receive())["type"] == "for-you"
        assert (await c.receive())["type"] == "end"


async def test_close_group(broker: BrokerProcess) -> None:
    """Behind what was sent before; others stay."""
    async with (
        processes(broker.url) as (one, two),
        one.client(group="room") as a,
        two.client(group="room") as b,
        two.client(group="other") as c,
    ):
        await one.hub.send("room", "last")
        await one.hub.close_group("room", 4001, "\ud83d" + "x" * 200)  # cut, as everywhere
        for client in (a, b):
            assert (await client.receive())["type"] == "last"
            assert await client.closed() == (4001, "\ufffd" + "x" * 120)
        await one.hub.send("other", "still-here")
        assert (await c.receive())["type"] == "still-here"
        with pytest.raises(ValueError, match="no close code"):
            await one.hub.close_group("room", 5)


async def test_presence_of_all_processes(broker: BrokerProcess) -> None:
    """Ids, users and processes; empty for a group without members; also when nobody asks twice."""
    async with (
        processes(broker.url, 3) as (one, two, three),
        one.client(group="room", user="ann"),
        two.client(group="room"),
        two.client(group="room", user="bob"),
    ):
        for conn in two.hub.connections:
            if conn.user == "bob":
                conn._user = "bob \udcff"  # half of a pair is no JSON
        found = await three.hub.presence("room")
        expected = {
            (conn.id, conn.user and conn.user.replace("\udcff", "?"), p.hub.process)
            for p in (one, two)
            for conn in p.hub.connections
        }
        assert {(p.id, p.user, p.process) for p in found} == expected and len(found) == 3
        assert {p.user for p in found} == {"ann", "bob ?", None}
        assert await three.hub.presence("empty") == []
        several = await asyncio.gather(*(p.hub.presence("room") for p in (one, two, three) * 5))
        assert all({p.id for p in each} == {p.id for p in found} for each in several)
        assert not any(cluster_of(p.hub)._asks for p in (one, two, three))


async def test_presence_of_a_user_in_all_processes(broker: BrokerProcess) -> None:
    """Ids, users and processes; also of one who has logged in later."""
    async with (
        processes(broker.url, 3) as (one, two, three),
        one.client(user="ann"),
        two.client(user="ann") as tab,
        two.client(user="bob"),
        two.client(group="ann"),
    ):
        found = await three.hub.presence(user="ann")
        assert {(each.user, each.process) for each in found} == {
            ("ann", one.hub.process),
            ("ann", two.hub.process),
        }
        assert len(found) == 2
        assert await one.hub.presence(user="eve") == []
        assert [each.user for each in await one.hub.presence("ann")] == [None]
        await tab.close()
        await until(lambda: len(two.hub.connections) == 2)
        assert [each.process for each in await three.hub.presence(user="ann")] == [one.hub.process]


async def test_presence_in_parts(broker: BrokerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long answer comes in several messages, as a broker takes no large one."""
    monkeypatch.setattr(pachinko_cluster, "_ANSWER_BYTES", 60)
    async with processes(broker.url) as (one, two), contextlib.AsyncExitStack() as stack:
        for _ in range(7):
            await stack.enter_async_context(one.client(group="room"))
        assert len(await two.hub.presence("room")) == 7
        assert len(await one.hub.presence("room")) == 7


class Trickle(Own):
    """From the second part of an answer on, a question has been asked too long ago."""

    parts = 0

    async def publish(self, subject: str, data: bytes) -> int | None:
        if b'"op":"here"' in data:
            self.parts += 1
            if self.parts == 2:
                await asyncio.sleep(pachinko_cluster._PRESENCE)  # what is tested
        return await super().publish(subject, data)


async def test_presence_waits_for_an_answer_that_has_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For the rest of it, some seconds more than for an answer."""
    monkeypatch.setattr(pachinko_cluster, "_ANSWER_BYTES", 60)
    monkeypatch.setattr(pachinko_cluster, "_PRESENCE", 1.0)
    one, two = Process(Trickle()), Process(Own())
    async with serving(one.app) as a, serving(two.app), contextlib.AsyncExitStack() as stack:
        one.url = f"{a.url}/ws"
        for _ in range(5):
            await stack.enter_async_context(one.client(group="room"))
        assert len(await two.hub.presence("room")) == 5


async def test_presence_is_complete_when_all_have_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the broker says how many it has asked, nobody waits for more."""
    monkeypatch.setattr(pachinko_cluster, "_PRESENCE", 2 * PATIENCE)
    async with (
        running("redis") as broker,
        processes(broker.url) as (one, two),
        one.client(group="room"),
        asyncio.timeout(PATIENCE),
    ):
        assert len(await one.hub.presence("room")) == len(await two.hub.presence("room")) == 1


async def test_presence_without_a_broker() -> None:
    """The same, of the one process."""
    async with processes("memory://", 1) as (one,), one.client(group="room", user="ann"):
        (only,) = await one.hub.presence("room")
        (conn,) = one.hub.members("room")
        assert (only.id, only.user, only.process) == (conn.id, "ann", one.hub.process)
        assert conn.id.startswith(one.hub.process)


async def test_namespaces_are_apart(broker: BrokerProcess) -> None:
    """By argument or in the URL; the argument counts."""
    url = f"{broker.url}?namespace=two"
    async with (
        processes(broker.url, 1, namespace="one") as (one,),
        processes(url, 1) as (two,),
        processes(url, 1, namespace="one") as (three,),
        one.client(group="room") as a,
        two.client(group="room") as b,
    ):
        await three.hub.send("room", "to-one")
        await two.hub.broadcast("to-two")
        assert (await a.receive())["type"] == "to-one"
        assert (await b.receive())["type"] == "to-two"
        assert len(await three.hub.presence("room")) == 1


async def test_the_environment_names_the_broker(broker: BrokerProcess) -> None:
    """For a file that says nothing of it, with one setting."""
    with environment(PACHINKO_BACKPLANE=broker.url):
        async with processes(None) as (one, two), two.client(group="room") as client:
            await one.hub.send("room", Said("x"))
            assert text(await client.receive()) == "x"
        with pytest.raises(PachinkoError, match=r"async with hub\.open\(\)"):
            await Hub().send("room", "x")
    await Hub().send("room", "x")


async def test_a_program_without_an_app(broker: BrokerProcess) -> None:
    """`hub.open` connects, sends, asks, and leaves nothing behind."""
    before = asyncio.all_tasks()
    async with processes(broker.url, 1) as (one,), one.client(group="room") as client:
        async with hub.open(broker.url) as opened:
            assert opened is hub
            await hub.send("room", Said("cron"))
            assert text(await client.receive()) == "cron"
            assert len(await hub.presence("room")) == 1
            async with hub.open():
                pass
            async with hub.open(broker.url):
                pass
            with pytest.raises(PachinkoError, match="runs on another broker"):
                async with hub.open("memory://"):
                    raise AssertionError
            await hub.send("room", Said("still-open"))
        assert hub.state.loop is None and type(hub.state.relay) is Relay
        with environment(PACHINKO_BACKPLANE=broker.url):
            async with hub.open():
                await hub.broadcast("again")
        assert [(await client.receive())["type"] for _ in "12"] == ["said", "again"]
    await until(lambda: asyncio.all_tasks() <= before)


async def test_parallel_programs_without_an_app(broker: BrokerProcess) -> None:
    """Each thread opens a hub of its own, as a view of a WSGI framework may."""
    together = threading.Barrier(5)

    async def tell(n: int) -> None:
        async with Hub().open(broker.url) as own:
            await asyncio.to_thread(together.wait, PATIENCE)
            await own.send("room", Said(str(n)))

    async with processes(broker.url, 1) as (one,), one.client(group="room") as client:
        await asyncio.gather(*(asyncio.to_thread(asyncio.run, tell(n)) for n in range(5)))
        assert sorted([text(await client.receive()) for _ in range(5)]) == list("01234")


async def test_threads_reach_other_processes(broker: BrokerProcess) -> None:
    """In the order of their calls, with or without waiting for each."""
    async with processes(broker.url) as (one, two), two.client(group="room") as client:

        def work() -> None:
            for n in range(50):
                call = one.hub.call_threadsafe(one.hub.send, "room", Said(str(n)))
                if n % 10 == 0:
                    call.result(PATIENCE)
            found = one.hub.call_threadsafe(one.hub.presence, "room").result(PATIENCE)
            assert len(found) == 1
            call.result(PATIENCE)

        thread = threading.Thread(target=work)
        thread.start()
        assert [text(await client.receive()) for _ in range(50)] == [str(n) for n in range(50)]
        await asyncio.to_thread(thread.join)


async def test_what_a_hub_does_by_itself_ends_with_it() -> None:
    """An answer that is on its way to another process, say."""
    one, ended = Hub(), asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with one.open(Own()):
        cluster_of(one)._start_work(work())
        await asyncio.sleep(0)  # so that it has begun
    await asyncio.wait_for(ended.wait(), PATIENCE)


def test_open_in_one_loop_after_another() -> None:
    """Also where the first has ended without a word, with a hub that was still open."""
    one = Hub()

    async def leave_open() -> None:
        context = one.open("memory://")
        await context.__aenter__()
        contexts.append(context)

    async def use() -> None:
        async with one.open(Own()):
            assert isinstance(one.state.relay, Cluster)
        with pytest.raises(PachinkoError, match="takes the broker"):
            async with one.open():
                raise AssertionError

    contexts: list[Any] = []
    asyncio.run(leave_open())
    asyncio.run(use())
    asyncio.run(contexts[0].__aexit__(None, None, None))


async def test_open_says_what_is_wrong(kind: BrokerKind) -> None:
    """No broker named; one that is not there; the wrong way to name it."""
    with pytest.raises(PachinkoError, match=r"PACHINKO_BACKPLANE"):
        async with hub.open():
            raise AssertionError
    with pytest.raises(PachinkoError, match=rf"{kind}://127\.0\.0\.1:1 cannot be reached"):
        async with hub.open(f"{kind}://127.0.0.1:1"):
            raise AssertionError
    assert hub.state.loop is None
    async with hub.open("memory://"):
        await hub.send("room", "x")


async def test_messages_that_are_held_and_a_refused_handshake(broker: BrokerProcess) -> None:
    """Group messages from the moment of `join` wait for the handshake; a refused client gets none,
    and is in no group."""
    async with processes(broker.url) as (one, two):

        @one.ws.connect
        async def history(conn: Connection) -> None:
            await conn.join("held")
            await two.hub.send("held", Said("from afar"))
            if conn.req.get_param("refused"):
                raise falcon.HTTPForbidden
            await conn.send("history")

        async with one.client() as client:
            frames = [await client.receive() for _ in "12"]
            assert sorted(frame["type"] for frame in frames) == ["history", "said"]
        with pytest.raises(Exception, match="403"):
            async with one.client(refused="1"):
                raise AssertionError
        await until(lambda: not one.hub.groups)
        assert await two.hub.presence("held") == []


async def test_a_failed_send_in_a_handler_is_answered(
    broker: BrokerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection goes on; the log has a line, and no traceback, since it is no bug."""
    async with processes(broker.url, 1) as (one,), one.client(group="room") as client:
        broker.kill()
        answer = await client.ask("say", {"group": "room", "text": "x"})
        assert answer["payload"]["code"] == "internal_error"
        assert "the handler of 'say' failed: " in caplog.text and "Traceback" not in caplog.text
        await until(lambda: one.hub.stats()["broker_down"])
        with pytest.raises(PachinkoError):
            await one.hub.presence("room")
        with pytest.raises(PachinkoError):
            await one.hub.close_group("room")
        await one.hub.send_to(next(iter(one.hub.connections)), "direct")
        assert (await client.receive())["type"] == "direct"
        await one.join(client, "other")
        async with one.client(group="room", user="ann") as second:
            await broker.start()
            gaps = [await client.receive(), await client.receive()]
            assert all(gap["type"] == "gap" for gap in gaps)
            assert {gap["payload"]["group"] for gap in gaps} == {"room", "other"}
            assert await second.receive() == {"type": "gap", "payload": {"group": "room"}}
            await one.hub.send_to_user("ann", "hello")
            assert (await second.receive())["type"] == "hello"
        assert one.hub.stats()["outages"] == 1 and not one.hub.stats()["broker_down"]


async def test_gaps_of_an_outage(kind: BrokerKind) -> None:
    """One with no group for a client in none; none for who has left; before what comes after."""
    async with (
        running(kind) as broker,
        processes(broker.url) as (one, two),
        one.client() as alone,
        one.client(group="room") as member,
        one.client(group="room") as left,
    ):
        await broker.restart()
        await left.send("leave", "room", id=1)
        await until(lambda: one.hub.stats()["outages"] and not one.hub.stats()["broker_down"])
        await until(lambda: not cluster_of(one.hub)._gaps and not two.hub.stats()["broker_down"])
        await two.hub.send("room", Said("after"))
        assert await alone.receive() == {"type": "gap", "payload": {"group": None}}
        assert await member.receive() == {"type": "gap", "payload": {"group": "room"}}
        assert text(await member.receive()) == "after"
        frames = [await left.receive()]
        if frames[0]["type"] != "leave.reply":
            frames.append(await left.receive())
        assert {"type": "leave.reply", "id": 1} in frames


async def test_a_gap_of_one_group_or_user() -> None:
    """Whose subscription has taken longer than its join has waited."""
    async with (
        processes(Own(), 1) as (one,),
        one.client(group="room") as a,
        one.client(group="other", user="ann") as b,
    ):
        cluster_of(one.hub).restored("pachinko.g.room")
        cluster_of(one.hub).restored("pachinko.u.ann")
        await until(lambda: not cluster_of(one.hub)._work)
        await one.hub.broadcast("end")
        frames = [[await client.receive(), await client.receive()] for client in (a, b)]
        assert [frame["type"] for both in frames for frame in both] == ["gap", "end"] * 2
        assert [both[0]["payload"]["group"] for both in frames] == ["room", None]


async def test_a_message_that_comes_before_its_groups_gap_waits_for_it() -> None:
    """The gap tells of what was before, so it comes before what is after; not to who has left."""
    async with (
        processes(Own(), 1) as (one,),
        one.client(group="room") as client,
        one.client(group="room") as left,
    ):
        cluster = cluster_of(one.hub)
        cluster.restored(None)
        (announcing,) = cluster._work
        announcing.cancel()  # so that the message is first
        await left.ask("leave", "room")
        data = pack(PeerMessage(1, "send", "p"), b'{"type":"later","group":"room"}')
        await cluster.receive("pachinko.g.room", data)
        assert [(await client.receive())["type"] for _ in "12"] == ["gap", "later"]
        await one.hub.broadcast("end")
        assert (await left.receive())["type"] == "end"
        assert not cluster_of(one.hub)._gaps


async def publish_raw(process: Process, kind: Kind, name: str, data: bytes) -> None:
    """As a stranger on the same broker would."""
    subject = subject_of("pachinko", kind, name)
    await cluster_of(process.hub)._backplane.publish(subject, data)


def message_of(process: str, session: int, op: str = "send") -> bytes:
    """A message to a process, for nobody in it."""
    return pack(PeerMessage(1, op, process, session, to="nobody"), b'{"type":"x"}')


def cluster_subject(process: Process) -> str:
    return subject_of("pachinko", Kind.CONNECTION, process.hub.process)


async def test_a_late_message_does_not_overtake() -> None:
    """What a process sent in a session before its present one is told there as lost."""
    async with processes(Own(), 1) as (one,), one.client(group="room") as client:
        cluster = cluster_of(one.hub)

        async def receive(process: str, session: int, type: str, op: str = "send") -> None:
            frame = json.dumps({"type": type, "group": "room"}).encode()
            data = pack(PeerMessage(1, op, process, session), frame)
            await cluster.receive("pachinko.g.room", data)

        for session, process, is_late in [
            (1, "p", False), (2, "p", False), (1, "p", True), (2, "p", False), (1, "q", False),
            (0, one.hub.process, True), (1, one.hub.process, False),
        ]:  # fmt: skip
            await receive(process, session, "late" if is_late else "in-time")
        assert one.hub.stats()["refused"] == 2
        await receive("p", 9, "beat", "beat")  # as a stranger might
        await receive("p", 2, "last")
        frames = [(await client.receive())["type"] for _ in range(6)]
        assert frames == ["in-time"] * 5 + ["last"]


async def test_few_processes_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger may make up as many as it likes."""
    monkeypatch.setattr(pachinko_cluster, "_MAX_PROCESSES", 10)
    async with processes(Own(), 1) as (one,):
        for n in range(50):
            await cluster_of(one.hub).receive(cluster_subject(one), message_of(f"p{n}", 2))
        for n in (49, 0):
            await cluster_of(one.hub).receive(cluster_subject(one), message_of(f"p{n}", 1))
        assert one.hub.stats()["refused"] == 1


async def test_what_is_late_does_not_hide_a_stranger(caplog: pytest.LogCaptureFixture) -> None:
    """What comes after an outage is logged apart from what is none of ours, once each."""
    async with processes(Own(), 1) as (one,):
        cluster = cluster_of(one.hub)
        await cluster.receive(cluster_subject(one), message_of("p", 2))
        for data in (message_of("p", 1), b'{"v":1}') * 2:
            await cluster.receive(cluster_subject(one), data)
        assert one.hub.stats()["refused"] == 4
    texts = [record.getMessage() for record in caplog.records if "refused" in record.msg]
    assert len(texts) == 2 and "has lost the connection" in texts[0] and "not a message" in texts[1]


async def test_kinds_of_refused_messages_are_logged_up_to_a_bound(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stranger may make up formats without end."""
    monkeypatch.setattr(pachinko_cluster, "_MAX_SUSPECTS", 3)
    async with processes(Own(), 1) as (one,):
        for format in range(3, 10):
            data = json.dumps({"v": format}).encode()
            await cluster_of(one.hub).receive(cluster_subject(one), data)
        assert one.hub.stats()["refused"] == 7
    assert caplog.text.count("refused a message from the broker") == 3


class Unhurried(Own):
    """It takes its time for users."""

    def __init__(self) -> None:
        self.asked, self.free = asyncio.Event(), asyncio.Event()

    async def subscribe(self, subject: str) -> None:
        if ".u." in subject:
            self.asked.set()
            await self.free.wait()
        await super().subscribe(subject)


async def test_who_is_let_in_can_be_reached_as_a_user() -> None:
    """So that the handshake waits for the subscription."""
    own = Unhurried()
    async with processes(own, 1) as (one,), contextlib.AsyncExitStack() as stack:
        entering = asyncio.create_task(stack.enter_async_context(one.client(user="ann")))
        await asyncio.wait_for(own.asked.wait(), PATIENCE)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(entering), 0.2)
        own.free.set()
        client = await asyncio.wait_for(entering, PATIENCE)
        await one.hub.send_to_user("ann", "hello")
        assert (await client.receive())["type"] == "hello"


async def test_a_stranger_on_our_subjects(
    broker: BrokerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """Is refused, counted, and logged once."""
    async with (
        processes(broker.url) as (one, two),
        one.client(group="room", user="ann") as client,
    ):
        head = {"v": 1, "op": "send", "from": "stranger", "session": 1}
        good = json.dumps(head).encode() + b"\n"
        wrong = [
            b"rubbish",
            good + b"rubbish",
            good + b'{"type":"x","group":"other"}',
            json.dumps({**head, "op": "close", "code": 17}).encode(),
            json.dumps({**head, "op": "close", "reason": "x" * 200}).encode(),
            json.dumps({**head, "op": "here"}).encode(),
            json.dumps({**head, "op": "no such"}).encode(),
        ]
        for data in wrong:
            await publish_raw(two, Kind.GROUP, "room", data)
        await publish_raw(two, Kind.USER, "ann", json.dumps({**head, "op": "who"}).encode())
        await publish_raw(two, Kind.EVERYBODY, "all", json.dumps({**head, "op": "close"}).encode())
        await publish_raw(two, Kind.CONNECTION, one.hub.process, good + b'{"type":"x"}')
        answer = {**head, "op": "here", "ask": 999, "members": [["id", None]]}
        await publish_raw(two, Kind.CONNECTION, one.hub.process, json.dumps(answer).encode())
        await two.hub.send("room", Said("ours"))
        assert text(await client.receive()) == "ours"
        await until(lambda: one.hub.stats()["refused"] == len(wrong) + 2)
        assert one.hub.stats()["connections"] == 1
    assert caplog.text.count("refused a message from the broker") == 2  # one a process


async def test_another_version_of_the_format(broker: BrokerProcess) -> None:
    """A gap for what is not understood, one for a run of them."""
    async with (
        processes(broker.url) as (one, two),
        one.client(group="room", user="ann") as client,
    ):
        newer = b'{"v":3,"op":"send","from":"newer"}\n{"type":"x","group":"room"}'
        for _ in range(2):
            for _ in range(3):
                await publish_raw(two, Kind.GROUP, "room", newer)
            await two.hub.send("room", Said("ours"))
        await publish_raw(two, Kind.USER, "ann", newer)
        await publish_raw(two, Kind.CONNECTION, one.hub.process, newer)
        frames = [await client.receive() for _ in range(5)]
        assert [frame["type"] for frame in frames] == ["gap", "said", "gap", "said", "gap"]
        assert [f["payload"]["group"] for f in frames if f["type"] == "gap"] == [
            "room",
            "room",
            None,
        ]
        await until(lambda: one.hub.stats()["refused"] == 8)


async def test_a_message_that_is_too_large_for_the_broker() -> None:
    """NATS has a limit; the error names it, and the next message goes through."""
    async with (
        running("nats") as broker,
        processes(broker.url, 1) as (one,),
        one.client(group="room") as client,
    ):
        with pytest.raises(PachinkoError, match="max_payload"):
            await one.hub.send("room", Said("x" * 1_048_576))
        await one.hub.send("room", Said("x"))
        assert text(await client.receive()) == "x"


async def test_an_app_starts_without_its_broker(
    kind: BrokerKind, caplog: pytest.LogCaptureFixture
) -> None:
    """It serves, says why, and is connected once the broker is there."""
    broker = BrokerProcess(kind)
    try:
        async with (
            processes(broker.url) as (one, two),
            one.client(group="room", user="ann") as a,
            two.client(group="room") as b,
        ):
            assert f"{broker.url} cannot be reached" in caplog.text
            with pytest.raises(PachinkoError, match="cannot be reached"):
                await one.hub.send("room", "x")
            await broker.start()
            for client in (a, b):
                assert await client.receive() == {"type": "gap", "payload": {"group": "room"}}
            await one.hub.send("room", Said("x"))
            assert text(await a.receive()) == text(await b.receive()) == "x"
    finally:
        broker.kill()
        broker.folder.cleanup()


async def test_without_a_lifespan_it_starts_with_the_first_connection(
    broker: BrokerProcess,
) -> None:
    """Whose join waits for that."""
    two = Process(broker.url)
    async with (
        processes(broker.url, 1) as (one,),
        serving(two.app, lifespan="off") as server,
    ):
        two.url = f"{server.url}/ws"
        async with two.client(group="room") as client:
            await one.hub.send("room", Said("x"))
            assert text(await client.receive()) == "x"
        await two.hub.state.stop(two.ws)


@pytest.mark.parametrize(
    ("url", "text"), [("kafka://host", "a backplane is a URL"), ("redis://h?x=1", "another option")]
)
async def test_a_wrong_setting_keeps_the_app_from_starting(url: str, text: str) -> None:
    """When it is started, since the environment is read then."""
    ws = Pachinko(new_app(), "/ws", hub=Hub())
    with environment(PACHINKO_BACKPLANE=url), pytest.raises(PachinkoError, match=text):
        await ws.process_startup({}, {})
    assert ws._hub.state.loop is None


async def test_a_backplane_of_ones_own() -> None:
    """An object with the five methods, instead of a URL."""
    first, second = Process(Own()), Process(Own())
    async with serving(first.app) as a, serving(second.app) as b:
        first.url, second.url = f"{a.url}/ws", f"{b.url}/ws"
        async with first.client(group="room") as client, second.client(group="room"):
            await second.hub.send("room", Said("x"))
            assert text(await client.receive()) == "x"
            assert len(await first.hub.presence("room")) == 2
    assert not Own.everywhere


async def test_many_gaps_let_others_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an outage each member of each group gets one."""
    monkeypatch.setattr(pachinko_cluster, "_GAPS_A_TURN", 2)
    async with processes(Own(), 1) as (one,), one.client() as client:
        for n in range(7):
            await one.join(client, f"room:{n}")
        cluster_of(one.hub).restored(None)
        for n in range(7):
            gap = await client.receive()
            assert gap == {"type": "gap", "payload": {"group": f"room:{n}"}}
        assert not cluster_of(one.hub)._gaps


@pytest.mark.parametrize("given", [5, object(), Own, b"nats://host"])
def test_what_is_no_backplane_is_refused(given: Any) -> None:
    """With what to write."""
    with pytest.raises(TypeError, match=r'hub\.configure\("nats://localhost:4222"\)'):
        Hub().configure(given)


async def test_credentials_are_in_no_log_and_no_error(
    kind: BrokerKind, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong password: everything goes on without the broker, and says why."""
    caplog.set_level(logging.DEBUG)
    secret = ("--user", "u", "--pass", "right") if kind == "nats" else ("--requirepass", "right")
    async with running(kind, *secret) as broker:
        url = f"{kind}://u:wr0ng-s3cret@127.0.0.1:{broker.port}"
        async with processes(url, 1) as (one,), one.client(group="room") as client:
            with pytest.raises(PachinkoError, match=r"(?i)authori[sz]ation|password") as caught:
                await one.hub.send("room", "x")
            assert "wr0ng" not in str(caught.value)
            await one.join(client, "other")
        right = url.replace("u:wr0ng-s3cret", "u:right" if kind == "nats" else ":right")
        async with processes(right, 1) as (one,), one.client(group="room") as client:
            await one.hub.send("room", Said("x"))
            assert text(await client.receive()) == "x"
    assert "cannot be reached" in caplog.text and "wr0ng" not in caplog.text
