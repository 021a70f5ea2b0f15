"""Questions to clients, and groups by id, across processes: several hubs on one real broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from brokers import BrokerKind, BrokerProcess, running
from support import Client, Server, until
from test_cluster import Own, Process, cluster_of, processes

import pachinko
import pachinko_cluster
from pachinko import (
    AnswerError,
    Connection,
    Hub,
    Kind,
    MessageError,
    NoAnswer,
    PachinkoError,
    message,
)
from pachinko_cluster import (
    Cluster,
    Done,
    PeerMessage,
    Refused,
    pack,
    pack_call,
    read_call,
    read_done,
)


@message("unlocked")
class Unlocked:
    at: int
    by: str | None = None


async def id_of(process: Process) -> str:
    """The id of the one client that a process has."""
    await until(lambda: process.hub.connections)
    (conn,) = process.hub.connections
    return conn.id


async def answer(client: Client, payload: Any = None, type: str = "unlock.reply") -> Any:
    """Answer the next message, which is a question; return it."""
    question = await client.receive()
    await client.send(type, payload, question["id"])
    return question


def open_questions(*some: Process) -> int:
    """How many wait, in all of the processes: for a client, or for another process."""
    clients = sum(len(q._open) for p in some for q in p.hub.state.questions.values())
    return clients + sum(len(cluster_of(p.hub)._asks) for p in some)


# Questions


async def test_a_client_of_another_process_is_asked_by_its_id(broker: BrokerProcess) -> None:
    """Also one of the same process; ids of questions count for each client."""
    async with processes(broker.url) as (one, two), two.client() as client:
        id = await id_of(two)
        for n, hub in enumerate((one.hub, two.hub, one.hub), 1):
            task = asyncio.ensure_future(hub.ask(id, "unlock", {"door": n}))
            question = {"type": "unlock", "id": f"${n}", "payload": {"door": n}}
            assert await answer(client, n) == question
            assert await task == n
        assert open_questions(one, two) == 0
        assert two.hub.stats()["refused"] == one.hub.stats()["refused"] == 0


@pytest.mark.parametrize(
    ("sent", "came"),
    [
        (("unlock",), {"type": "unlock"}),
        (("unlock", [1, {"ä☃": 1.5}]), {"type": "unlock", "payload": [1, {"ä☃": 1.5}]}),
        ((Unlocked(10**30),), {"type": "unlocked", "payload": {"at": 10**30, "by": None}}),
        (("a\n\"b", "\n"), {"type": "a\n\"b", "payload": "\n"}),
    ],
)  # fmt: skip
async def test_a_question_crosses_as_it_is(
    broker: BrokerProcess, sent: Any, came: dict[str, Any]
) -> None:
    """Any type, and any payload that can be sent."""
    async with processes(broker.url) as (one, two), two.client() as client:
        task = asyncio.ensure_future(one.hub.ask(await id_of(two), *sent))
        assert await answer(client, 5, f"{came['type']}.reply") == {**came, "id": "$1"}
        assert await task == 5


@pytest.mark.parametrize(
    ("returns", "payload", "expected"),
    [
        (Any, {"a": [None, 1.5, 10**30]}, {"a": [None, 1.5, 10**30]}),
        (Any, None, None),
        (Unlocked, {"at": 5}, Unlocked(5)),
        (list[int], [1], [1]),
        (Unlocked | None, None, None),
        (bytes, "AAE=", b"\x00\x01"),
    ],
)
async def test_the_process_that_asks_makes_the_value(
    broker: BrokerProcess, returns: Any, payload: Any, expected: Any
) -> None:
    """What crosses is JSON."""
    async with processes(broker.url) as (one, two), two.client() as client:
        task = asyncio.ensure_future(one.hub.ask(await id_of(two), "unlock", returns=returns))
        await answer(client, payload)
        assert await task == expected


async def test_an_answer_of_a_wrong_type_is_refused_where_it_was_asked_for(
    broker: BrokerProcess,
) -> None:
    """With the wrong fields."""
    async with processes(broker.url) as (one, two), two.client() as client:
        task = asyncio.ensure_future(one.hub.ask(await id_of(two), "unlock", returns=Unlocked))
        await answer(client, {"at": "x"})
        with pytest.raises(AnswerError) as caught:
            await task
        assert caught.value.code == "invalid_payload"
        assert caught.value.details["errors"][0]["path"] == "$.payload.at"


@pytest.mark.parametrize(
    ("payload", "code", "text", "details"),
    [
        ({"code": "locked", "message": "no", "x": [1]}, "locked", "no", {"x": [1]}),
        ({"code": 5, "message": None}, "", "", {"code": 5, "message": None}),
        ("text", "", "", {}),
    ],
)
async def test_the_error_of_a_client_crosses(
    broker: BrokerProcess, payload: Any, code: str, text: str, details: Any
) -> None:
    """As the client wrote it."""
    async with processes(broker.url) as (one, two), two.client() as client:
        task = asyncio.ensure_future(one.hub.ask(await id_of(two), "unlock"))
        await answer(client, payload, "error")
        with pytest.raises(AnswerError) as caught:
            await task
        error = caught.value
        assert (error.code, error.message, error.details) == (code, text, details)


async def test_a_client_that_does_not_answer_is_waited_for_as_long_as_asked(
    broker: BrokerProcess,
) -> None:
    """Both processes forget the question."""
    async with processes(broker.url) as (one, two), two.client() as client:
        id = await id_of(two)
        with pytest.raises(NoAnswer):
            await one.hub.ask(id, "unlock", timeout=0.3)
        await until(lambda: open_questions(one, two) == 0)
        await answer(client, 5)
        await until(lambda: two.hub.stats()["late"] == 1)


@pytest.mark.parametrize("how", ["client", "server"])
async def test_who_waits_is_told_at_once_that_the_client_has_gone(
    broker: BrokerProcess, how: str
) -> None:
    """By the process that it was in."""
    async with processes(broker.url) as (one, two), two.client() as client:
        id = await id_of(two)
        task = asyncio.ensure_future(one.hub.ask(id, "unlock", timeout=1000))
        await client.receive()
        if how == "client":
            client.cut()
        else:
            await two.hub.drain(0)
        with pytest.raises(NoAnswer, match="has ended"):
            await task


async def test_an_id_of_nobody_has_no_answer_at_once_if_its_process_runs(
    broker: BrokerProcess,
) -> None:
    """The process says so; so does this one for its own, and for what is no id."""
    async with processes(broker.url) as (one, two):
        for id in (two.hub.process + "0" * 12, one.hub.process + "0" * 12, "nobody", ""):
            with pytest.raises(NoAnswer, match="no connection"):
                await one.hub.ask(id, "unlock", timeout=1000)


async def test_a_process_that_has_gone_is_waited_for_unless_the_broker_knows(
    kind: BrokerKind,
) -> None:
    """Redis tells how many it has reached; NATS does not."""
    async with running(kind) as broker, processes(broker.url, 1) as (one,):
        timeout = 0.3 if kind == "nats" else 1000
        with pytest.raises(NoAnswer, match="or from its process"):
            await one.hub.ask("a" * 24, "unlock", timeout=timeout)
        assert open_questions(one) == 0


async def test_a_broker_that_is_away_is_told_or_waited_for(kind: BrokerKind) -> None:
    """As for other calls that reach other processes, and never longer than asked."""
    async with running(kind) as broker, processes(broker.url, 1) as (one,):
        broker.pause()
        with pytest.raises(NoAnswer):
            await one.hub.ask("a" * 24, "unlock", timeout=0.2)
        broker.resume()
        broker.kill()
        await until(lambda: one.hub.stats()["broker_down"])
        await asyncio.sleep(0)
        with pytest.raises(PachinkoError):
            await one.hub.ask("a" * 24, "unlock", timeout=100)


async def test_65_questions_at_a_time_are_too_many_wherever_they_come_from(
    broker: BrokerProcess,
) -> None:
    """The error crosses."""
    async with processes(broker.url) as (one, two), two.client() as client:
        id = await id_of(two)
        tasks = [asyncio.ensure_future(one.hub.ask(id, "unlock")) for _ in range(64)]
        questions = [await client.receive() for _ in tasks]
        with pytest.raises(PachinkoError, match="at most 64"):
            await one.hub.ask(id, "unlock")
        for question in questions:
            await client.send("unlock.reply", 5, question["id"])
        assert await asyncio.gather(*tasks) == [5] * 64


async def test_a_program_without_an_app_asks(broker: BrokerProcess) -> None:
    """Through `hub.open`."""
    async with processes(broker.url, 1) as (one,), one.client() as client:
        id = await id_of(one)
        async with Hub().open(broker.url) as hub:
            task = asyncio.ensure_future(hub.ask(id, "unlock", returns=int))
            await answer(client, 5)
            assert await task == 5


async def test_an_answer_that_the_broker_does_not_take_is_told() -> None:
    """At once, and as a mistake: NATS takes 1 MiB."""
    async with (
        running("nats") as broker,
        processes(broker.url, max_size=3_000_000) as (one, two),
        two.client() as client,
    ):
        task = asyncio.ensure_future(one.hub.ask(await id_of(two), "unlock", timeout=1000))
        await answer(client, "x" * 2_000_000)
        with pytest.raises(PachinkoError, match="has not taken the answer"):
            await task


async def test_an_answer_that_cannot_be_sent_leaves_who_asks_to_its_time_out(
    own: list[Process], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The broker is away by then; the process that has the client goes on."""
    one, two = own
    publish = Cluster._publish

    async def fail(self: Cluster, kind: Any, name: str, op: str, **fields: Any) -> Any:
        if op == "done":
            raise pachinko.BrokerAway("gone")
        return await publish(self, kind, name, op, **fields)

    monkeypatch.setattr(Cluster, "_publish", fail)
    async with two.client() as client:
        task = asyncio.ensure_future(one.hub.ask(await id_of(two), "unlock", timeout=0.5))
        await answer(client, 5)
        with pytest.raises(NoAnswer):
            await task
        await until(lambda: not cluster_of(two.hub)._work)
    assert caplog.text == ""


async def test_a_question_that_the_broker_does_not_take_is_told() -> None:
    """As for any other message."""
    async with running("nats") as broker, processes(broker.url) as (one, two), two.client():
        with pytest.raises(PachinkoError, match="max_payload"):
            await one.hub.ask(await id_of(two), "unlock", "x" * 2_000_000)


@pytest.fixture
async def own() -> AsyncIterator[list[Process]]:
    """Two processes that are connected by a transport of the app's own."""
    first, second = Process(Own()), Process(Own())
    servers = [Server(process.app) for process in (first, second)]
    for process, server in zip((first, second), servers, strict=True):
        await server.start()
        process.url = f"{server.url}/ws"
    yield [first, second]
    for server in servers:
        await server.stop()


async def test_a_backplane_of_ones_own_carries_questions(own: list[Process]) -> None:
    """It knows nothing but subjects and bytes."""
    one, two = own
    async with two.client() as client:
        task = asyncio.ensure_future(one.hub.ask(await id_of(two), "unlock"))
        await answer(client, 5)
        assert await task == 5


# Groups


async def test_a_connection_of_another_process_joins_and_leaves(broker: BrokerProcess) -> None:
    """When it has joined, messages of any process arrive."""
    async with processes(broker.url) as (one, two), two.client() as client:
        id = await id_of(two)
        for n in range(10):
            await one.hub.join(f"room:{n}", id)
            await one.hub.send(f"room:{n}", "hello")
            assert (await client.receive())["group"] == f"room:{n}"
        (conn,) = two.hub.connections
        assert len(conn.groups) == 10 and one.hub.groups == frozenset()
        await one.hub.leave("room:5", id)
        await one.hub.leave("other", id)
        assert len(conn.groups) == 9 and "room:5" not in conn.groups


@pytest.mark.parametrize("name", ["", "a.b", ">", "x" * 10_000, "ä☃", "new\nline", "\udcff"])
async def test_a_group_may_have_any_name(broker: BrokerProcess, name: str) -> None:
    """Half a surrogate pair, too, which is no JSON."""
    async with processes(broker.url) as (one, two), two.client() as client:
        await one.hub.join(name, await id_of(two))
        assert two.hub.groups == {name}
        await one.hub.send(name, "hello")
        assert (await client.receive())["type"] == "hello"
        await one.hub.leave(name, await id_of(two))
        assert two.hub.groups == frozenset()


async def test_too_many_groups_are_told_to_who_asks(broker: BrokerProcess) -> None:
    """With the error that a handler may let pass."""
    async with processes(broker.url, max_groups=1) as (one, two), two.client():
        id = await id_of(two)
        await one.hub.join("room", id)
        with pytest.raises(MessageError) as caught:
            await one.hub.join("other", id)
        assert (caught.value.code, caught.value.message) == (
            "too_many_groups",
            "at most 1 groups a connection",
        )


async def test_a_subscription_that_is_denied_is_told_to_who_asks() -> None:
    """As for a join in the process itself."""
    async with running("redis") as broker:
        reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
        writer.write(b"ACL SETUSER app on nopass +@all ~* &*.g.public &*.p.* &*.a.*\r\n")
        assert await reader.readline() == b"+OK\r\n"
        writer.close()
        url = f"redis://app:x@127.0.0.1:{broker.port}"
        async with processes(url) as (one, two), two.client():
            id = await id_of(two)
            await one.hub.join("public", id)
            with pytest.raises(PachinkoError, match="does not permit"):
                await one.hub.join("secret", id)
            assert two.hub.groups == {"public"}


async def test_an_id_of_nobody_joins_nothing(broker: BrokerProcess) -> None:
    """In a process that runs; it may have just ended."""
    async with processes(broker.url) as (one, two), two.client() as client:
        id = await id_of(two)
        await client.close()
        await until(lambda: not two.hub.count)
        await one.hub.join("room", id)
        await one.hub.leave("room", id)
        await one.hub.join("room", two.hub.process + "0" * 12)
        assert two.hub.groups == one.hub.groups == frozenset()


async def test_a_process_that_does_not_answer_counts_as_ended(
    broker: BrokerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the time that a broker may take, or at once if the broker knows."""
    async with processes(broker.url, 1) as (one,):
        monkeypatch.setattr(pachinko_cluster, "_BROKER_WAIT", 0.3)
        await one.hub.join("room", "a" * 24)
        await one.hub.leave("room", "a" * 24)
        assert open_questions(one) == 0


# What crosses


async def test_a_bug_is_logged_where_it_happens(
    own: list[Process], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has asked for it learns where to look."""
    one, two = own

    async def fail(conn: Connection, group: str) -> None:
        raise KeyError("s3cret")

    monkeypatch.setitem(pachinko.CALLS, "join", fail)
    async with two.client():
        with pytest.raises(PachinkoError) as caught:
            await one.hub.join("room", await id_of(two))
    assert two.hub.process in str(caught.value) and "s3cret" not in str(caught.value)
    assert "KeyError: 's3cret'" in caplog.text


def head(process: Process, op: str, frame: bytes, **fields: Any) -> bytes:
    """A peer message, as if another process had sent it."""
    return pack(PeerMessage(1, op, "f" * 12, 1, 1, **fields), frame)


GROUP = b'"cm9vbQ=="'  # room
TYPE = b'"dW5sb2Nr"'  # unlock


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"hello",
        b"{}",
        b"[]",
        b'["join"]',
        b'["join",5]',
        b'["join","?"]',
        b'["join","/w=="]',  # no UTF-8
        b'["close",' + GROUP + b"]",
        b'["__class__",' + GROUP + b"]",
        b'[5,' + GROUP + b"]",
        b'["join",' + GROUP + b"] and more",
        b'["ask",' + TYPE + b"]",
        b'["ask",' + TYPE + b',{"type":"unlock"},0]',
        b'["stream",' + TYPE + b"]",
        b'["stream",' + TYPE + b',{},1]',
        b'["stream",' + TYPE + b',[8,"x",1,[]],1]',
        b'["stream",' + TYPE + b',[8,5,1,[],null],1]',
        b'["stream",' + TYPE + b',[8,"x",1,[],null],-1]',
        b'["ask",' + TYPE + b',{"type":"unlock"},-1]',
        b'["ask",' + TYPE + b',{"type":"unlock"},null]',
        b'["ask",' + TYPE + b',{"type":"unlock"},"10"]',
        b'["ask",' + TYPE + b',{"type":"unlock"},1e999]',
        b'["ask",' + TYPE + b',{"type":"unlock","group":"a"},1]',
        b'["ask",' + TYPE + b',{"type":5},1]',
        b'["ask",' + TYPE + b',{"id":"a"},1]',
        b'["ask",' + TYPE + b",{},1]",
        b'["ask",' + TYPE + b",null,1]",
        b'["ask",' + TYPE + b',"{}",1]',
        b'["ask",' + TYPE + b',[{"type":"unlock"}],1]',
        b'["ask",' + TYPE + b',{"type":"unlock","payload":"\xff"},1]',
        b'["ask",' + TYPE + b',{"type":"unlock","payload":' + b"[" * 100_000 + b"},1]",
    ],
)  # fmt: skip
async def test_what_is_no_call_of_ours_is_refused(own: list[Process], frame: bytes) -> None:
    """Counted, and nothing is called or sent."""
    with pytest.raises(Refused):
        read_call(frame)
    one, _ = own
    async with one.client() as client:
        id = await id_of(one)
        await send(one, head(one, "call", frame, to=id, ask=1))
        assert one.hub.stats()["refused"] == 1
        assert await client.ask("$ping") == {"type": "$pong", "id": 1}
        assert one.hub.groups == frozenset() and not cluster_of(one.hub)._work


async def send(process: Process, data: bytes, kind: Kind = Kind.CONNECTION, name: str = "") -> None:
    relay = cluster_of(process.hub)
    subject = pachinko_cluster.subject_of("pachinko", kind, name or process.hub.process)
    await relay.receive(subject, data)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"[]",
        b'{"error":5}',
        b'{"error":"KeyError"}',
        b'{"error":""}',
        b'{"error":"AnswerError","details":[]}',
        b'{"error":"AnswerError","code":5}',
        b'{"error":"MessageError","details":{"code":1}}',
        b'{"error":"MessageError","details":{"self":1}}',
        b'{"result":"\xff"}',
        b'{"result":' + b"[" * 100_000 + b"}",
        b"{} and more",
    ],
)
async def test_what_is_no_end_of_a_call_is_refused(own: list[Process], frame: bytes) -> None:
    """Counted, and who waits goes on to wait."""
    with pytest.raises(Refused):
        read_done(frame)
    one, two = own
    async with two.client() as client:
        task = asyncio.ensure_future(one.hub.ask(await id_of(two), "unlock"))
        question = await client.receive()
        ((_, number),) = cluster_of(one.hub)._asks
        await send(one, head(two, "done", frame, ask=number))
        assert one.hub.stats()["refused"] == 1 and not task.done()
        await client.send("unlock.reply", 5, question["id"])
        assert await task == 5


async def test_calls_and_their_ends_come_on_the_subject_of_a_process_only(
    own: list[Process],
) -> None:
    """A group is no place for them."""
    one, _ = own
    async with one.client() as client:
        await one.join(client, "room")
        for op, frame in (("call", pack_call("join", "x")), ("done", b"{}")):
            await send(one, head(one, op, frame), Kind.GROUP, "room")
        assert one.hub.stats()["refused"] == 2


async def test_the_end_of_a_call_that_nobody_waits_for_is_ignored(own: list[Process]) -> None:
    """It may be late; an answer of another kind to the same number is none."""
    one, two = own
    async with two.client() as client:
        task = asyncio.ensure_future(one.hub.ask(await id_of(two), "unlock"))
        question = await client.receive()
        ((_, number),) = cluster_of(one.hub)._asks
        await send(one, head(two, "done", b'{"result":1}', ask=number + 1000))
        await send(one, head(two, "here", b"", ask=number))
        assert one.hub.stats()["refused"] == 0 and not task.done()
        await client.send("unlock.reply", 5, question["id"])
        assert await task == 5


def test_a_call_is_what_other_processes_read() -> None:
    """The wire format between processes, of this release on."""
    question = msgspec.Raw(b'{"type":"unlock"}')
    assert pack_call("join", "room") == b'["join",' + GROUP + b"]"
    ask = pack_call("ask", "unlock", question, 10.0)
    assert ask == b'["ask",' + TYPE + b',{"type":"unlock"},10.0]'
    method, name, frame, seconds = read_call(ask)
    assert (method, name, bytes(frame), seconds) == ("ask", "unlock", bytes(question), 10.0)
    assert read_call(pack_call("leave", "room")) == ("leave", "room")
    assert pachinko.encode(Done(5)) == b'{"result":5}'
    error = Done(None, "AnswerError", "b", "a", {"c": 1})
    assert pachinko.encode(error) == (
        b'{"error":"AnswerError","message":"b","code":"a","details":{"c":1}}'
    )


async def test_an_older_process_refuses_a_call_and_goes_on(
    own: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it refuses each op that it does not know; who asks waits in vain."""
    one, two = own
    take = Cluster._take

    async def older(self: Any, kind: Any, name: str, message: PeerMessage, frame: bytes) -> None:
        if message.op == "call":
            raise Refused(f"{message.op!r} makes no sense here")
        await take(self, kind, name, message, frame)

    monkeypatch.setattr(Cluster, "_take", older)
    monkeypatch.setattr(pachinko_cluster, "_BROKER_WAIT", 0.2)
    async with two.client():
        id = await id_of(two)
        with pytest.raises(NoAnswer):
            await one.hub.ask(id, "unlock", timeout=0.2)
        await one.hub.join("room", id)
        assert two.hub.stats()["refused"] == 2 and two.hub.groups == frozenset()


async def test_a_question_of_another_library_has_the_id_of_this_one(own: list[Process]) -> None:
    """However its JSON is written."""
    _, two = own
    async with two.client() as client:
        id = await id_of(two)
        frame = b'[ "ask" , ' + TYPE + b' , { "id" : "a" , "type" : "unlock" } , 100 ]'
        await send(two, head(two, "call", frame, to=id, ask=1))
        assert await client.receive() == {"id": "$1", "type": "unlock"}
