"""Bytes alone are a binary frame: to one client, to many, as an answer, and between processes."""

from __future__ import annotations

import array
import asyncio
import base64
import contextlib
import importlib.util
import json
import sys
import types
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import falcon.testing
import pytest
from brokers import BrokerProcess, environment, running
from support import PATIENCE, Client, Server, Stalled, connect, new_app, serving, simulated, until

import pachinko
import pachinko_cluster
from pachinko import Connection, Hub, Kind, Pachinko, PachinkoError, message
from pachinko_cluster import Cluster

DATA = b"\x00\xff\n{"
BIG = b"\x01" * 50_000


@message("said")
class Said:
    text: str


class Chunk(bytes):
    """Bytes of an application, which say that they are others."""

    def __bytes__(self) -> bytes:
        return b"others"


class Buffer(bytearray):
    """A buffer of an application."""


def endpoint(**options: Any) -> Pachinko:
    """An endpoint whose clients are in the group "all", and are users by the query string."""
    ws = Pachinko(new_app(), "/ws", hub=Hub(), **options)

    @ws.connect
    async def arrive(conn: Connection) -> None:
        conn.user = conn.req.get_param("user")
        await conn.join("all")

    return ws


@contextlib.asynccontextmanager
async def talking(ws: Pachinko, query: str = "") -> AsyncIterator[Client]:
    """A client of a server for one endpoint."""
    async with simulated(ws._app) as server, connect(f"{server.url}/ws{query}") as client:
        await until(lambda: ws._hub.members("all"))
        yield client


async def frame(client: Client) -> str | bytes:
    """The next frame as it is."""
    return await asyncio.wait_for(client.socket.recv(), PATIENCE)


# What bytes are


def strided() -> memoryview:
    return memoryview(b"a-b-c-")[::2]


KINDS: list[tuple[Any, bytes]] = [
    (b"", b""),
    (DATA, DATA),
    (bytearray(DATA), DATA),
    (bytearray(), b""),
    (memoryview(DATA), DATA),
    (memoryview(bytearray(DATA)), DATA),
    (memoryview(b"")[:0], b""),
    (strided(), b"abc"),
    (memoryview(DATA)[::-1], DATA[::-1]),
    (memoryview(array.array("H", [1, 2])), array.array("H", [1, 2]).tobytes()),
    (memoryview(array.array("d", [0.5])), array.array("d", [0.5]).tobytes()),
    (memoryview(bytes(range(6))).cast("B", (2, 3)), bytes(range(6))),
    (memoryview(b"\x07").cast("B", ()), b"\x07"),
    (memoryview(b"ab").cast("c"), b"ab"),
    (Chunk(DATA), DATA),
    (Buffer(DATA), DATA),
    (memoryview(Chunk(DATA)), DATA),
]


async def test_all_kinds_of_bytes_are_binary_frames() -> None:
    """They go out in C order, to one client and to a group; the empty ones as well."""
    ws = endpoint()
    async with talking(ws) as client:
        (conn,) = ws._hub.connections
        for given, expected in KINDS:
            await conn.send(given)
            await ws._hub.send("all", given)
            assert [await frame(client), await frame(client)] == [expected, expected]


def calls(hub: Hub, conn: Connection) -> dict[str, Callable[..., Awaitable[None]]]:
    """All that send, with what they take before the message."""
    return {
        "conn.send": conn.send,
        "hub.send": lambda *message: hub.send("all", *message),
        "broadcast": hub.broadcast,
        "send_to": lambda *message: hub.send_to(conn, *message),
        "send_to by id": lambda *message: hub.send_to(conn.id, *message),
        "send_to_user": lambda *message: hub.send_to_user("ada", *message),
    }


async def test_all_calls_that_send_take_bytes() -> None:
    """In the order of the calls, among the text frames, also without a turn of the loop between."""
    ws = endpoint()
    async with talking(ws, "?user=ada") as client:
        (conn,) = ws._hub.connections
        sends = calls(ws._hub, conn)
        for name, send in sends.items():
            await send(name.encode())
            await send("text", name)
        for name in sends:
            assert await frame(client) == name.encode()
            assert (await client.receive())["payload"] == name
        mixed = [send(name) for name, send in sends.items() for name in (b"x", "x")]
        await asyncio.gather(*mixed)
        seen = [type(await frame(client)) for _ in mixed]
        assert seen == [bytes, str] * len(sends)
        assert ws._hub.stats()["sent"] == 4 * len(sends)


async def test_bytes_have_no_payload_beside_them() -> None:
    """The error shows both right forms, and nothing is sent."""
    ws = endpoint()
    async with talking(ws, "?user=ada") as client:
        (conn,) = ws._hub.connections
        for send in calls(ws._hub, conn).values():
            for given in (DATA, bytearray(DATA), memoryview(DATA), Chunk()):
                with pytest.raises(TypeError, match=r'send\(data\), .*"file", {"data": data}'):
                    await send(given, {"name": "a.png"})
        await conn.send(b"last", None)
        assert await frame(client) == b"last"


@pytest.mark.parametrize("given", [array.array("B", DATA), [1, 2], 5, bytes, object()])
async def test_what_only_holds_bytes_is_no_frame(given: Any) -> None:
    """It is refused as any other object is; `memoryview` makes bytes of a buffer."""
    ws = endpoint()
    async with talking(ws, "?user=ada") as client:
        (conn,) = ws._hub.connections
        for send in calls(ws._hub, conn).values():
            with pytest.raises(TypeError, match="a message is an object of a class with"):
                await send(given)
        await conn.send(b"last")
        assert await frame(client) == b"last"


async def test_within_a_message_bytes_are_base64() -> None:
    """As a payload, a part of one, a reply, and an item of a stream."""
    ws = endpoint()

    @ws.on("bytes")
    async def give(conn: Connection) -> bytes:
        return DATA

    @ws.on("items")
    async def items(conn: Connection) -> AsyncIterator[bytes]:
        yield DATA

    text = base64.b64encode(DATA).decode()
    async with talking(ws) as client:
        await ws._hub.send("all", "file", DATA)
        await ws._hub.send("all", "file", {"data": bytearray(DATA)})
        assert (await client.receive())["payload"] == text
        assert (await client.receive())["payload"] == {"data": text}
        assert (await client.ask("bytes"))["payload"] == text
        assert (await client.ask("items"))["payload"] == text


@pytest.mark.parametrize("view", [lambda buffer: buffer, memoryview, lambda b: memoryview(b)[:]])
async def test_a_buffer_may_be_used_again_at_once(view: Any) -> None:
    """What is sent is what it held at the call, also where the client is behind."""
    ws = endpoint(outbox=500, send_timeout=60.0, linger=0.1)
    async with serving(ws._app) as server, Stalled(server.url + "/ws") as client:
        await until(lambda: ws._hub.members("all"))
        (conn,) = ws._hub.connections
        while not conn.outgoing.writing:
            await ws._hub.send_to(conn, BIG)
            await asyncio.sleep(0)
        buffer = bytearray(b"first")
        await ws._hub.send("all", view(buffer))
        waits = asyncio.create_task(conn.send(view(buffer)))
        await until(lambda: conn.outgoing.outbox and len(conn.outgoing.outbox.queue) > 1)
        buffer[:] = b"other"
        await ws._hub.send("all", view(buffer)[:2])
        reading = asyncio.create_task(client.read_all())
        await asyncio.wait_for(waits, PATIENCE)
        await conn.close(4000, "end")
        data = (await reading).partition(b"\x82\x05first")
    assert data[1:] == (b"\x82\x05first", b"\x82\x05first\x82\x02ot\x88\x05\x0f\xa0end")


async def test_a_buffer_may_change_its_size_while_a_copy_waits() -> None:
    """The library keeps no view of it, which would forbid that."""
    ws = endpoint(outbox=500, send_timeout=60.0, linger=0.1)
    async with serving(ws._app) as server, Stalled(server.url + "/ws"):
        await until(lambda: ws._hub.members("all"))
        (conn,) = ws._hub.connections
        while not conn.outgoing.writing:
            await ws._hub.send_to(conn, BIG)
            await asyncio.sleep(0)
        buffer = bytearray(b"first")
        waits = asyncio.create_task(conn.send(buffer))
        await until(lambda: conn.outgoing.outbox and conn.outgoing.outbox.queue)
        await ws._hub.send("all", buffer)
        del buffer[2:]
        waits.cancel()
        await asyncio.wait([waits])


async def test_bytes_of_a_connect_handler_go_out_after_the_handshake() -> None:
    """In their order among what else it sends."""
    ws = endpoint()

    @ws.connect
    async def greet(conn: Connection) -> None:
        await conn.send(b"one")
        await conn.send("two")
        await conn.hub.send("all", b"three")

    async with talking(ws) as client:
        assert await frame(client) == b"one"
        assert (await client.receive())["type"] == "two"
        assert await frame(client) == b"three"


async def test_bytes_are_what_falcons_test_client_receives() -> None:
    """As data, in order with the texts."""
    ws = endpoint()

    @ws.binary
    async def answer(conn: Connection, data: bytes) -> bytes:
        await conn.hub.send("all", data)
        await conn.send("text")
        return b""

    async with (
        falcon.testing.ASGIConductor(ws._app) as conductor,
        conductor.simulate_ws("/ws") as client,
    ):
        await client.send_data(DATA)
        assert await client.receive_data() == DATA
        assert (await client.receive_json())["type"] == "text"
        assert await client.receive_data() == b""


# To many


async def test_who_is_excluded_gets_no_bytes() -> None:
    """By the connection, by its id, or by several of them."""
    ws = endpoint()
    async with (
        simulated(ws._app) as server,
        connect(server.url + "/ws?user=ada") as ada,
        connect(server.url + "/ws?user=bob") as bob,
    ):
        await until(lambda: len(ws._hub.members("all")) == 2)
        conn = next(each for each in ws._hub.connections if each.user == "ada")
        for exclude in (conn, conn.id, [conn], (conn.id, "nobody")):
            await ws._hub.send("all", b"group", exclude=exclude)
            await ws._hub.broadcast(b"everybody", exclude=exclude)
            assert [await frame(bob), await frame(bob)] == [b"group", b"everybody"]
        with pytest.raises(TypeError, match="exclude takes connections"):
            await ws._hub.send("all", b"x", exclude=[5])  # type: ignore[list-item]  # what is tested
        await ws._hub.send("all", b"to both")
        assert await frame(ada) == await frame(bob) == b"to both"


@pytest.mark.parametrize("size", [0, len(BIG)])
async def test_bytes_fill_an_outbox(size: int) -> None:
    """A client that does not read is evicted by their number, also of empty ones, or size."""
    ws = endpoint(outbox=20, outbox_bytes=3 * len(BIG), send_timeout=60.0, linger=0.1)
    async with serving(ws._app) as server, Stalled(server.url + "/ws"):
        await until(lambda: ws._hub.members("all"))
        (conn,) = ws._hub.connections
        while not conn.outgoing.writing:
            await ws._hub.send_to(conn, BIG)
            await asyncio.sleep(0)
        for _ in range(20 if size == 0 else 3):
            await ws._hub.send("all", BIG[:size])
            assert not conn.closed
        for _ in range(2):
            await ws._hub.send("all", BIG[:size])
        assert conn.closed and conn.close_code == 1013
        await until(lambda: not ws._hub.state.serving)
        stats = ws._hub.stats()
    assert (stats["evicted"], stats["dropped"]) == (1, 0)
    assert stats["outbox_high_water"] == (21 if size == 0 else 4)


async def test_dropped_bytes_are_a_gap() -> None:
    """With "drop_oldest" the newest frames go out, empty ones too, and then the group's gap."""
    ws = endpoint(outbox=2, overflow="drop_oldest", send_timeout=60.0, linger=0.1)
    async with serving(ws._app) as server, Stalled(server.url + "/ws") as client:
        await until(lambda: ws._hub.members("all"))
        (conn,) = ws._hub.connections
        while not conn.outgoing.writing:
            await ws._hub.send_to(conn, BIG)
            await asyncio.sleep(0)
        for n in range(3):
            await ws._hub.send("all", b"")
            await ws._hub.send("all", b"kept%d" % n)
        assert not conn.closed and ws._hub.stats()["dropped"] == 4
        reading = asyncio.create_task(client.read_all())
        await until(lambda: not conn.outgoing.writing)
        await conn.close(4000, "end")
        data = await reading
    gap = b'{"type":"gap","payload":{"group":"all"}}'
    assert data.endswith(b"\x01\x82\x00\x82\x05kept2\x81%c%b\x88\x05\x0f\xa0end" % (len(gap), gap))


# The binary handler, the fallback, and what is around them


@pytest.mark.parametrize(("given", "expected"), KINDS[:7] + KINDS[-3:])
async def test_a_binary_handler_answers_with_bytes(given: Any, expected: bytes) -> None:
    """Also with none, and in the order of the frames that it answers."""
    ws = endpoint()
    results: list[Any] = [given, Said("hi"), None, given]

    @ws.binary
    async def answer(conn: Connection, data: bytes) -> Any:
        return results[data[0]]

    async with talking(ws) as client:
        for n in range(4):
            await client.raw(bytes([n]))
        assert await frame(client) == expected
        assert (await client.receive())["type"] == "said"
        assert await frame(client) == expected


class Pong(str):
    """A text of an application, which says that it is another."""

    __slots__ = ()

    def __str__(self) -> str:
        return "another"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", ""),
        ("pong", "pong"),
        ('{"type":"x"}', '{"type":"x"}'),
        ("ä☃\n\0", "ä☃\n\0"),
        ("half \ud83d a pair", "half \ufffd a pair"),
        (Pong("pong"), "pong"),
        (Kind.GROUP, "g"),
        ("x" * 100_000, "x" * 100_000),
    ],
)
async def test_a_fallback_answers_with_a_text(given: Any, expected: str) -> None:
    """It goes out as it is: a text that only looks like a message, and an empty one, too."""
    ws = endpoint()

    @ws.fallback
    async def answer(conn: Connection, text: str) -> Any:
        return {"?": given, "!": Said("hi")}.get(text)

    async with talking(ws) as client:
        for text in ("?", "nothing", "!"):
            await client.raw(text)
        assert await frame(client) == expected
        assert (await client.receive())["type"] == "said"


@pytest.mark.parametrize(
    ("sent", "returned", "says"),
    [
        ("?", b"bytes", "may return a str, a @message object or None; got bytes"),
        ("?", bytearray(), "may return a str, a @message object or None"),
        ("?", 0, "may return a str, a @message object or None; got int"),
        (b"?", "text", "may return bytes, a @message object or None; got str"),
        (b"?", "", "may return bytes, a @message object or None"),
        (b"?", [b""], "may return bytes, a @message object or None; got list"),
    ],
)
async def test_anything_else_is_a_bug(
    sent: str | bytes, returned: Any, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged with the function's place, and the client gets ``internal_error``."""
    ws = endpoint()

    @ws.fallback
    @ws.binary
    async def answer(conn: Connection, frame: Any) -> Any:
        return returned

    async with talking(ws) as client:
        await client.raw(sent)
        assert (await client.receive())["payload"]["code"] == "internal_error"
    assert f"{__file__}:" in caplog.text and says in caplog.text


async def test_middleware_may_answer_frames_as_they_are() -> None:
    """It sees what the handler has returned, and may return a text or bytes in its place."""
    ws = endpoint()
    seen: list[Any] = []

    @ws.middleware
    async def around(conn: Connection, envelope: Any, call_next: Any) -> Any:
        seen.append((envelope.type, envelope.payload))
        if envelope.payload in ("refuse", b"refuse"):
            return envelope.payload[::-1]
        return 2 * await call_next()

    @ws.fallback
    async def text(conn: Connection, frame: str) -> str:
        return frame

    @ws.binary
    async def data(conn: Connection, frame: bytes) -> bytearray:
        return bytearray(frame)

    async with talking(ws) as client:
        for sent in ("a", b"a", "refuse", b"refuse"):
            await client.raw(sent)
        assert [await frame(client) for _ in range(4)] == ["aa", b"aa", "esufer", b"esufer"]
    assert seen == [("", "a"), ("", b"a"), ("", "refuse"), ("", b"refuse")]


async def test_an_answer_to_a_client_that_has_gone_is_quiet(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As a reply is."""
    ws = endpoint()
    is_called, may_go_on, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @ws.fallback
    @ws.binary
    async def answer(conn: Connection, frame: Any) -> Any:
        is_called.set()
        await may_go_on.wait()
        return frame

    @ws.disconnect
    async def leave(conn: Connection) -> None:
        ended.set()

    async with simulated(ws._app) as server:
        for sent in ("x", b"x"):
            for event in (is_called, may_go_on, ended):
                event.clear()
            async with connect(server.url + "/ws") as client:
                await client.raw(sent)
                await asyncio.wait_for(is_called.wait(), PATIENCE)
            await until(lambda: all(each.closed for each in ws._hub.connections))
            may_go_on.set()
            await asyncio.wait_for(ended.wait(), PATIENCE)
    assert caplog.text == ""


# Between processes


class Process:
    """What takes the place of a process: a hub with an app and a server of its own."""

    def __init__(self, url: str) -> None:
        self.ws = endpoint()
        self.hub: Hub = self.ws._hub
        self.hub.configure(url)
        self.server = Server(self.ws._app)

    @contextlib.asynccontextmanager
    async def client(self, user: str = "") -> AsyncIterator[Client]:
        count = len(self.hub.members("all"))
        async with connect(f"{self.server.url}/ws?user={user}") as client:
            await until(lambda: len(self.hub.members("all")) > count)
            yield client


@contextlib.asynccontextmanager
async def processes(url: str, *modules: types.ModuleType) -> AsyncIterator[list[Process]]:
    """Two processes; each of *modules* is the companion of one of them, or of both."""
    found: list[Process] = []
    async with contextlib.AsyncExitStack() as stack:
        for module in (modules * 2)[:2]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(sys.modules, "pachinko_cluster", module)
                process = Process(url)
                await process.server.start()
            stack.push_async_callback(process.server.stop)
            found.append(process)
        yield found


def older_companion() -> types.ModuleType:
    """The module as it was before there were binary frames: it reads the format 1 only."""
    spec = importlib.util.spec_from_file_location("older_cluster", pachinko_cluster.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    module._BINARY = None  # type: ignore[attr-defined]  # a constant of any module
    return module


async def test_bytes_reach_other_processes(broker: BrokerProcess) -> None:
    """A group, a user, everybody, one connection: from either process, in order with texts."""
    async with (
        processes(broker.url, pachinko_cluster) as (one, two),
        one.client("ada") as a,
        two.client("ada") as b,
    ):
        (near,), (far,) = one.hub.connections, two.hub.connections
        for process, here, there in ((one, near, far), (two, far, near)):
            hub = process.hub
            for content in (DATA, b"", b"\n", bytes(range(256)) * 200):
                await hub.send("all", bytearray(content))
                await hub.send("all", "text")
                await hub.send_to_user("ada", content)
                await hub.broadcast(memoryview(content))
                for client in (a, b):
                    assert await frame(client) == content
                    assert (await client.receive())["type"] == "text"
                    assert [await frame(client), await frame(client)] == [content] * 2
                await hub.send("all", content, exclude=here)
                await hub.send("all", content, exclude=there.id)
                await hub.send_to(here, b"here" + content)
                await hub.send_to(there.id, b"there" + content)
                mine, yours = (a, b) if process is one else (b, a)
                # Within a process `send_to` needs no broker.
                seen = {await frame(mine), await frame(mine)}
                assert seen == {content, b"here" + content}
                assert [await frame(yours), await frame(yours)] == [content, b"there" + content]


async def test_a_member_gets_bytes_and_texts_in_the_order_of_the_calls(
    broker: BrokerProcess,
) -> None:
    """Sent at once from one process, to members in both."""
    async with (
        processes(broker.url, pachinko_cluster) as (one, two),
        one.client() as a,
        two.client() as b,
    ):
        sends = [one.hub.send("all", *((b"%d" % n,) if n % 3 else ("n", n))) for n in range(90)]
        await asyncio.gather(*sends)
        for client in (a, b):
            for n in range(90):
                found = await frame(client)
                expected = b"%d" % n if n % 3 else f'{{"type":"n","payload":{n},"group":"all"}}'
                assert found == expected


async def test_an_older_process_announces_a_gap(broker: BrokerProcess) -> None:
    """One for a run of binary frames; texts go both ways, and so do its own."""
    async with (
        processes(broker.url, pachinko_cluster, older_companion()) as (new, old),
        new.client("ada") as a,
        old.client("ada") as b,
    ):
        assert isinstance(new.hub.state.relay, Cluster)
        assert not isinstance(old.hub.state.relay, Cluster)
        for _ in range(3):
            await new.hub.send("all", DATA)
        await new.hub.send_to_user("ada", DATA)
        await new.hub.broadcast(DATA)
        (far,) = old.hub.connections
        await new.hub.send_to(far.id, DATA)  # It is lost: nobody is known to be meant.
        await new.hub.send("all", "after")
        assert [await frame(a) for _ in range(5)] == [DATA] * 5
        gaps = [await b.receive() for _ in range(3)]
        assert all(gap["type"] == "gap" for gap in gaps)
        assert [gap["payload"]["group"] for gap in gaps] == ["all", None, None]
        assert (await b.receive())["type"] == "after"
        assert old.hub.stats()["refused"] == 6
        assert (await a.receive())["type"] == "after"
        await old.hub.send("all", "theirs")
        assert [(await each.receive())["type"] for each in (a, b)] == ["theirs", "theirs"]


async def test_what_the_broker_does_not_take_is_an_error() -> None:
    """NATS takes 1 MiB by default, head included; the next frame goes through."""
    async with (
        running("nats") as broker,
        processes(broker.url, pachinko_cluster) as (one, two),
        two.client() as client,
    ):
        with pytest.raises(PachinkoError, match="max_payload"):
            await one.hub.send("all", bytes(2**20))
        await one.hub.send("all", bytes(2**20 - 1000))
        assert await frame(client) == bytes(2**20 - 1000)


async def test_a_program_without_an_app_sends_bytes(broker: BrokerProcess) -> None:
    """By `hub.open`, and from a thread by `call_threadsafe`."""
    async with processes(broker.url, pachinko_cluster) as (one, _), one.client() as client:
        hub = Hub()
        async with hub.open(broker.url):
            await hub.send("all", DATA)

            def from_a_thread() -> None:
                hub.call_threadsafe(hub.send, "all", b"from a thread").result(PATIENCE)

            await asyncio.to_thread(from_a_thread)
        assert [await frame(client), await frame(client)] == [DATA, b"from a thread"]


def test_a_hub_that_reaches_nobody_takes_bytes(caplog: pytest.LogCaptureFixture) -> None:
    """As it takes messages: a test of a handler may do this."""
    with environment(PACHINKO_BACKPLANE="memory://"):
        asyncio.run(Hub().send("all", DATA))
    assert "reaches nobody" in caplog.text


def test_the_head_names_the_format() -> None:
    """Only a binary frame has format 2; all else stays readable for older processes."""
    relay = Cluster("redis://h:1", None)
    relay.process = "me"
    heads = [
        json.loads(relay._pack(1, "send", data).partition(b"\n")[0])["v"]
        for data in (b'{"type":"x"}', b"", pachinko.Binary(b""), pachinko.Binary(DATA))
    ]
    assert heads == [1, 1, 2, 2]
