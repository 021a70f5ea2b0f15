"""The same conversation with every server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from app import LINGER, MAX_SIZE
from observed import EMPTY, Observed
from process import GRACE, Process
from support import PATIENCE, Client, Stalled, connect, until
from websockets.exceptions import ConnectionClosed, InvalidStatus

STALLING = 160  # messages of 64 KiB: twice what fits into the buffers on the way and the outbox
MEMBERS = 300  # of a large group, one of them stalled
WRAPPED = pytest.mark.parametrize("room", ["room", "timeout", "contextvar"], indirect=True)


@contextlib.asynccontextmanager
async def enter(server: Process, room: str, **options: Any) -> AsyncIterator[Client]:
    """A client in *room*, that has been welcomed."""
    async with connect(f"{server.url}/ws/{room}", **options) as client:
        assert (await client.receive())["type"] == "welcome"
        yield client


async def left(server: Process, room: str, count: int = 1) -> list[int]:
    """Wait until *count* disconnect handlers have run in *room*; return their close codes.

    Another connection then gives one that runs too often the time to show itself.
    """
    await until(lambda: len(server.lines(room, "disconnect")) >= count)
    async with enter(server, f"{room}-control") as control:
        await control.ask("nothing")
    lines = server.lines(room, "disconnect")
    assert len(lines) == count, lines
    assert all(line["groups"] == [f"room:{room}"] for line in lines)
    return [line["code"] for line in lines]


def closed_with(observed: Observed, code: int, reason: str) -> tuple[int, str]:
    """What the client sees of our close frame."""
    code = code if observed.low_codes or code >= 3000 else 1000
    return code, reason if observed.reasons else ""


class TestMessages:
    async def test_connect_has_the_path_parameters_and_sends(
        self, server: Process, room: str
    ) -> None:
        """What a connect handler sends arrives after the handshake, before anything else."""
        async with connect(f"{server.url}/ws/{room}") as client:
            await client.send("echo", "hi", id=1)
            welcome = await client.receive()
            assert welcome["type"] == "welcome"
            assert welcome["payload"]["room"] == room
            assert await client.receive() == {"type": "echo.reply", "id": 1, "payload": "hi"}

    async def test_typed_request_and_reply(self, server: Process, room: str) -> None:
        """A message object goes under its own type, with the request's id."""
        async with enter(server, room) as client:
            answer = await client.ask("whisper", {"text": "grüß Gott ✓"}, id=7)
            assert (answer["type"], answer["id"]) == ("said", 7)
            assert answer["payload"]["text"] == "grüß Gott ✓"

    async def test_ids(self, server: Process, room: str) -> None:
        """Ids are echoed unchanged; without one, only a result is answered."""
        async with enter(server, room) as client:
            for id in (0, -1, 2**53, "", "é"):
                answer = await client.ask("echo", 1, id=id)
                assert (answer["id"], type(answer["id"])) == (id, type(id))
            await client.raw('{"type":"echo","payload":1,"id":null}')
            assert await client.receive() == {"type": "echo.reply", "payload": 1}
            assert await client.ask("nothing", id=1) == {"type": "nothing.reply", "id": 1}
            await client.send("nothing")
            assert (await client.ask("echo", 2, id=2))["id"] == 2

    async def test_keyword_fields(self, server: Process, room: str) -> None:
        """Keyword-only parameters are fields of the payload."""
        async with enter(server, room) as client:
            assert (await client.ask("sum", {"a": 1, "b": 2}))["payload"] == 3
            assert (await client.ask("sum", {"a": 1}))["payload"] == 1

    @pytest.mark.parametrize("size", [1, 0, 70_000])
    async def test_bytes_are_binary_frames(
        self, server: Process, observed: Observed, room: str, size: int
    ) -> None:
        """Of any kind, in order with the texts; a server may leave out empty ones."""
        data = bytes(number % 256 for number in range(size))
        async with enter(server, room) as client, enter(server, room) as other:
            await client.send("bytes", {"size": size})
            await client.send("nothing", id=1)
            seen = [data, "between", data, data, data[::-1], "nothing.reply"]
            for each, expected in ((client, seen), (other, seen[1:3])):
                for content in expected:
                    if content == b"" and EMPTY in observed.failures:
                        continue
                    frame = await asyncio.wait_for(each.socket.recv(), PATIENCE)
                    frame = json.loads(frame)["type"] if isinstance(frame, str) else frame
                    assert frame == content

    @pytest.mark.parametrize(
        ("frame", "code"),
        [
            ("{", "invalid_json"),
            ("[]", "invalid_envelope"),
            ('{"type":"what","id":1}', "unknown_type"),
            ('{"type":"sum","id":1,"payload":{"a":"1"}}', "invalid_payload"),
            ('{"type":"count","payload":{"to":1}}', "id_required"),
            ('{"type":"fail","id":1,"payload":{"how":"bug"}}', "internal_error"),
            ('{"type":"fail","id":1,"payload":{"how":"http"}}', "http_403"),
            ('{"type":"fail","id":1,"payload":{"how":"own"}}', "not_your_turn"),
        ],
    )
    async def test_error(self, server: Process, room: str, frame: str, code: str) -> None:
        """A mistake is answered, and the connection goes on."""
        async with enter(server, room) as client:
            id = 1 if '"id"' in frame else None
            assert await client.error(frame) == (code, id)
            assert (await client.ask("echo", 1))["type"] == "echo.reply"

    async def test_concurrent_handler_is_overtaken(self, server: Process, room: str) -> None:
        """While it waits, the messages behind it are answered."""
        async with enter(server, room) as client:
            await client.send("wait", id=1)
            assert (await client.ask("echo", 2, id=2))["id"] == 2
            await client.send("release")
            answer = await client.receive()
            assert answer == {"type": "wait.reply", "id": 1, "payload": "released"}

    async def test_too_busy(self, server: Process, room: str) -> None:
        """More concurrent handlers than the limit are refused."""
        async with enter(server, room) as client:
            await client.send("wait", id=1)
            await client.send("wait", id=2)
            assert await client.error('{"type":"wait","id":3}') == ("too_busy", 3)
            await client.send("release")
            assert {(await client.receive())["id"] for _ in "ab"} == {1, 2}

    async def test_compression(self, server: Process, room: str) -> None:
        """Nothing changes for a client that offers to compress."""
        async with enter(server, room, compression="deflate") as client:
            assert (await client.ask("echo", "x" * 1000))["payload"] == "x" * 1000
            await client.raw("x" * (MAX_SIZE + 1))
            await client.closed()
        assert await left(server, room) == [1009]

    async def test_plain_http_beside(self, server: Process) -> None:
        """Falcon's other routes work in the same app, and an unknown path is no WebSocket."""
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /alive HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), PATIENCE)
        writer.close()
        assert b'{"alive": true}' in answer
        with pytest.raises(InvalidStatus):
            async with connect(f"{server.url}/nowhere"):
                pass


class TestStreams:
    @WRAPPED
    async def test_items_and_the_end(self, server: Process, room: str) -> None:
        """Items carry the id and ``more``; the end is ``complete``."""
        async with enter(server, room) as client:
            await client.send("count", {"to": 3}, id="s")
            items = [await client.receive() for _ in range(4)]
            assert items == [
                *[
                    {"type": "count.reply", "id": "s", "more": True, "payload": number}
                    for number in range(3)
                ],
                {"type": "complete", "id": "s"},
            ]

    @WRAPPED
    @pytest.mark.parametrize("pause", [0.0, 0.002])
    async def test_stopped_by_the_client(self, server: Process, room: str, pause: float) -> None:
        """``complete`` stops even a stream that never waits, and the id can be used again."""
        async with enter(server, room) as client:
            await client.send("ticks", {"pause": pause}, id=1)
            for number in range(5):
                assert (await client.receive())["payload"] == number
            await client.send("complete", id=1)
            async with asyncio.timeout(PATIENCE):
                while (await client.receive())["type"] != "complete":
                    pass
            assert server.events(room)[-1] == "stream closed"
            assert (await client.ask("count", {"to": 0}, id=1))["type"] == "complete"


class TestFrames:
    async def test_binary(self, server: Process) -> None:
        """A binary frame reaches its handler as it came."""
        async with connect(f"{server.url}/uploads") as client:
            await client.raw(b"\x00\xff" * 50_000)
            assert await client.receive() == {"type": "received", "payload": {"size": 100_000}}

    async def test_binary_without_a_handler(
        self, server: Process, observed: Observed, room: str
    ) -> None:
        """It ends the connection with 1003."""
        async with enter(server, room) as client:
            await client.raw(b"\x00")
            assert await client.closed() == closed_with(
                observed, 1003, "binary frames are not handled"
            )
        assert await left(server, room) == [1003]

    async def test_max_size(self, server: Process, observed: Observed, room: str) -> None:
        """A frame of the maximum is handled, one more byte ends the connection with 1009."""
        frame = '{"type":"echo","payload":"%s"}'
        async with enter(server, room) as client:
            await client.raw(frame % ("x" * (MAX_SIZE - len(frame) + 2)))
            assert (await client.receive())["type"] == "echo.reply"
            await client.raw(frame % ("x" * (MAX_SIZE - len(frame) + 3)))
            assert await client.closed() == closed_with(
                observed, 1009, f"more than {MAX_SIZE} bytes"
            )
        assert await left(server, room) == [1009]

    async def test_largest_frame(self, server: Process, observed: Observed) -> None:
        """Every server has a limit of its own, beside ``max_size``."""
        size = observed.largest * 2**20
        async with connect(f"{server.url}/uploads") as client:
            await client.raw(b"x" * size)
            assert await client.receive() == {"type": "received", "payload": {"size": size}}
            with contextlib.suppress(ConnectionClosed):
                await client.raw(b"x" * (size + 1))
            with pytest.raises(ConnectionClosed):
                await client.receive()
            client.cut()


class TestGroups:
    @WRAPPED
    async def test_send_to_three_in_order(self, server: Process, room: str) -> None:
        """Every member gets every message once, in order; the reply comes behind its own."""
        async with (
            enter(server, room) as one,
            enter(server, room) as two,
            enter(server, room) as three,
        ):
            for number in range(20):
                await one.send("say", {"text": str(number)}, id=number)
            for number in range(20):
                said = await one.receive()
                assert (said["type"], said["group"]) == ("said", f"room:{room}")
                assert said["payload"]["text"] == str(number)
                reply = {"type": "say.reply", "id": number, "payload": "sent"}
                assert await one.receive() == reply
            for other in (two, three):
                texts = [(await other.receive())["payload"]["text"] for _ in range(20)]
                assert texts == [str(number) for number in range(20)]
        await left(server, room, 3)

    @WRAPPED
    async def test_exclude(self, server: Process, room: str) -> None:
        """The excluded one gets nothing."""
        async with enter(server, room) as one, enter(server, room) as two:
            assert (await one.ask("say_others", {"text": "hi"}))["type"] == "say_others.reply"
            assert (await two.receive())["payload"]["text"] == "hi"

    @WRAPPED
    async def test_broadcast(self, server: Process, room: str) -> None:
        """It reaches connections that are in no common group."""
        async with enter(server, room) as one, enter(server, f"{room}-2") as two:
            await one.send("shout", {"text": "all"})
            await one.send("shout", {"text": "others", "others": True})
            assert (await one.ask("echo", 1))["payload"] == {"text": "all"}
            assert (await one.receive())["type"] == "echo.reply"
            assert [(await two.receive())["payload"]["text"] for _ in "ab"] == ["all", "others"]

    async def test_close_group(self, server: Process, observed: Observed, room: str) -> None:
        """Every member sees the code and the reason."""
        async with enter(server, room) as one, enter(server, room) as two:
            await one.send("close_group")
            for client in (one, two):
                assert await client.closed() == closed_with(observed, 4007, "the room is closed")
        assert await left(server, room, 2) == [4007, 4007]

    async def test_close_group_while_a_handler_is_suspended(
        self, server: Process, observed: Observed, room: str
    ) -> None:
        """The client is closed at once; its handler may end."""
        async with enter(server, room) as one, enter(server, room) as two:
            await two.send("nap", {"seconds": LINGER / 2})
            await until(lambda: "nap begins" in server.events(room))
            await one.send("close_group")
            assert await two.closed() == closed_with(observed, 4007, "the room is closed")
            assert "nap ends" not in server.events(room)
        assert await left(server, room, 2) == [4007, 4007]
        assert "nap ends" in server.events(room)


class TestHandshake:
    @pytest.mark.parametrize("how", ["http", "bug"])
    async def test_refused(self, server: Process, room: str, how: str) -> None:
        """An exception in connect is HTTP 403; no disconnect handler runs."""
        with pytest.raises(InvalidStatus) as refused:
            async with connect(f"{server.url}/ws/{room}?refuse={how}"):
                pass
        assert refused.value.response.status_code == 403
        async with enter(server, f"{room}-control"):
            assert server.events(room) == ["connect"]

    async def test_close_in_connect(self, server: Process, observed: Observed, room: str) -> None:
        """``Close`` in connect accepts first, so that a browser can read the code."""
        async with connect(f"{server.url}/ws/{room}?refuse=close") as client:
            assert await client.closed() == closed_with(observed, 4403, "not you")
        async with enter(server, f"{room}-control"):
            assert server.events(room) == ["connect"]

    @pytest.mark.parametrize(
        ("offered", "chosen"),
        [
            (["chat.v1", "chat.v2"], "chat.v2"),
            (["chat.v1", "other"], "chat.v1"),
            (["other"], None),
            (None, None),
        ],
    )
    async def test_subprotocol(
        self, server: Process, room: str, offered: Any, chosen: str | None
    ) -> None:
        """The server's first choice among what the client offers."""
        async with enter(server, room, subprotocols=offered) as client:
            assert client.socket.subprotocol == chosen


class TestEnds:
    @pytest.mark.parametrize("how", ["close", "late close"])
    async def test_close_in_a_handler(
        self, server: Process, observed: Observed, room: str, how: str
    ) -> None:
        """The client sees the code and the reason of a raised ``Close``."""
        async with enter(server, room) as client:
            await client.send("fail", {"how": how})
            assert await client.closed() == closed_with(observed, 4002, "enough")
        assert await left(server, room) == [4002]

    async def test_conn_close(self, server: Process, observed: Observed, room: str) -> None:
        """What was sent before ``conn.close`` still arrives."""
        async with enter(server, room) as client:
            await client.send("close_me")
            assert await client.receive() == {"type": "last"}
            assert await client.closed() == closed_with(observed, 4003, "as you wish")
        assert await left(server, room) == [4003]

    @pytest.mark.parametrize("code", [1000, 4001])
    async def test_client_closes(
        self, server: Process, observed: Observed, room: str, code: int
    ) -> None:
        """Disconnect handlers run once, with the client's code."""
        async with enter(server, room) as client:
            await client.close(code, "bye")
        assert await left(server, room) == [code if observed.client_codes else 1006]

    async def test_cut(self, server: Process, observed: Observed, room: str) -> None:
        """A lost connection runs them too."""
        async with enter(server, room) as client:
            client.cut()
            assert await left(server, room) == [observed.lost]

    async def test_cut_during_a_handler(
        self, server: Process, observed: Observed, room: str
    ) -> None:
        """The handler may end first."""
        async with enter(server, room) as client:
            await client.send("nap", {"seconds": LINGER / 2})
            await until(lambda: "nap begins" in server.events(room))
            client.cut()
            assert await left(server, room) == [observed.lost]
        assert server.events(room) == ["connect", "nap begins", "nap ends", "disconnect"]

    async def test_cut_during_a_long_handler(
        self, server: Process, observed: Observed, room: str
    ) -> None:
        """After ``linger`` seconds it is cancelled: the read-ahead has seen the end."""
        async with enter(server, room) as client:
            await client.send("nap", {"seconds": 2 * PATIENCE})
            await until(lambda: "nap begins" in server.events(room))
            client.cut()
            assert await left(server, room) == [observed.lost]
        assert server.events(room) == ["connect", "nap begins", "nap is cancelled", "disconnect"]

    @WRAPPED
    @pytest.mark.parametrize("pause", [0.0, 2.0 * PATIENCE])
    async def test_cut_during_a_stream(
        self, server: Process, observed: Observed, room: str, pause: float
    ) -> None:
        """The stream is closed at once."""
        async with enter(server, room) as client:
            await client.send("ticks", {"pause": pause}, id=1)
            await client.receive()
            client.cut()
            (code,) = await left(server, room)
            assert code in (observed.lost, 1006)  # 1006 when it was a send that failed first
        assert server.events(room) == ["connect", "stream closed", "disconnect"]


class TestSlowClients:
    @WRAPPED
    async def test_stalled_client(self, server: Process, observed: Observed, room: str) -> None:
        """The others get everything, in order; the stalled one is evicted."""
        async with (
            enter(server, room) as one,
            enter(server, room) as two,
            Stalled(f"{server.url}/ws/{room}"),
        ):
            for number in range(STALLING):
                await one.send("drop", {"number": number, "size": 65_536})
                for client in (one, two):
                    assert (await client.receive())["payload"]["number"] == number
            if observed.pushes_back:
                await until(lambda: "disconnect" in server.events(room))
                (line,) = server.lines(room, "disconnect")
                assert line["code"] == 1013
            else:
                assert "disconnect" not in server.events(room)
            assert (await two.ask("echo", 1, id=2))["id"] == 2
        await left(server, room, 3)

    async def test_stalled_member_of_a_large_group(
        self, server: Process, observed: Observed, room: str
    ) -> None:
        """Everybody else gets every message in order, and the senders their replies between."""
        async with contextlib.AsyncExitStack() as stack:
            stalled = await stack.enter_async_context(Stalled(f"{server.url}/ws/{room}"))
            others: list[Client] = []
            while len(others) < MEMBERS - 1:
                entering = (enter(server, room, max_queue=None) for _ in range(23))
                others += await asyncio.gather(*map(stack.enter_async_context, entering))
            senders = others[:3]
            _, *heard = await asyncio.gather(
                fill(stalled),
                *(converse(client, name) for client, name in zip(senders, "abc", strict=True)),
                *(listen(client) for client in others[3:]),
            )
            expected = [f"{name}{number}" for name in "abc" for number in range(10)]
            assert all(sorted(texts) == expected for texts in heard)
            assert all(sorted(texts, key=lambda text: text[0]) == expected for texts in heard)
            if observed.pushes_back:
                await until(lambda: "disconnect" in server.events(room))
                (line,) = server.lines(room, "disconnect")
                assert line["code"] == 1013
            assert (await others[-1].ask("echo", 1, id=2))["id"] == 2
            await asyncio.gather(*(client.close() for client in others))
        await left(server, room, MEMBERS)


async def fill(client: Stalled) -> None:
    """Have the server send to *client* until it is given up."""
    with contextlib.suppress(ConnectionError):
        for number in range(STALLING):
            payload = {"number": number, "size": 65_536}
            await client.send({"type": "drop_to_me", "payload": payload})


async def converse(client: Client, name: str) -> list[str]:
    """Say ten things to the room; return all that is said there."""
    texts: list[str] = []
    for number in range(10):
        await client.send("say", {"text": f"{name}{number}"}, id=number)
        while (answer := await client.receive())["type"] == "said":
            texts.append(answer["payload"]["text"])
        assert answer == {"type": "say.reply", "id": number, "payload": "sent"}
        assert texts.count(f"{name}{number}") == 1
    return texts + await listen(client, 30 - len(texts))


async def listen(client: Client, count: int = 30) -> list[str]:
    """The next *count* things that are said in the room."""
    answers = [await client.receive() for _ in range(count)]
    assert {answer["type"] for answer in answers} <= {"said"}
    return [answer["payload"]["text"] for answer in answers]


class TestProcess:
    async def test_worker(self, server: Process, observed: Observed, room: str) -> None:
        """A worker runs; without a lifespan it starts with the first connection."""
        async with enter(server, room) as client:
            first = (await client.ask("beats"))["payload"]
            async with asyncio.timeout(PATIENCE):
                while (await client.ask("beats"))["payload"] <= first + 1:
                    pass
        assert server.events().count("worker started") == 1
        assert observed.lifespan == (server.events()[0] == "worker started")

    async def ends_after_sigterm(
        self, doomed: Process, observed: Observed, rooms: list[str]
    ) -> float:
        """End it while four clients are busy; return the seconds that took."""
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(enter(doomed, room)) for room in rooms]
            _, nap, long, stream = clients
            await nap.send("nap", {"seconds": LINGER / 2})
            await long.send("nap", {"seconds": 2 * PATIENCE})
            await stream.send("ticks", {"pause": 0.01}, id=1)
            await stream.receive()
            await until(lambda: doomed.events().count("nap begins") == 2)
            doomed.terminate()
            sent = time.monotonic()
            codes = [asyncio.create_task(drained(client)) for client in clients]
            assert await asyncio.to_thread(doomed.ends_within, PATIENCE)
            took = time.monotonic() - sent
            assert await asyncio.gather(*codes) == [observed.sigterm_seen] * 4
        return took

    async def test_sigterm(self, doomed: Process, observed: Observed, room: str) -> None:
        """Everything ends within the grace period, and every disconnect handler has run."""
        rooms = [f"{room}-{name}" for name in ("idle", "nap", "long", "stream")]
        took = await self.ends_after_sigterm(doomed, observed, rooms)
        for _ in range(4):  # granian itself may panic while it stops, and calls nothing then
            if "panicked" not in doomed.output.read_text():
                break
            doomed.start()
            took = await self.ends_after_sigterm(doomed, observed, rooms)
        codes = [line["code"] for name in rooms for line in doomed.lines(name, "disconnect")]
        if not observed.sigterm_codes:
            assert observed.ends == "at once"
            assert codes == []
            assert not {"nap is cancelled", "stream closed", "worker ended"} & {*doomed.events()}
            return
        assert len(codes) == 4
        assert {*codes} <= {*observed.sigterm_codes}
        assert doomed.events(rooms[1]) == ["connect", "nap begins", "nap ends", "disconnect"]
        assert doomed.events(rooms[2]) == [
            "connect",
            "nap begins",
            "nap is cancelled",
            "disconnect",
        ]
        assert doomed.events(rooms[3]) == ["connect", "stream closed", "disconnect"]
        assert "worker ended" in doomed.events()
        if observed.ends == "with the last handler":
            assert took < GRACE
        else:
            assert observed.ends == "after the whole grace period"
            assert took > GRACE


async def drained(client: Client) -> int | None:
    """Read everything; return the close code behind it."""
    with contextlib.suppress(ConnectionClosed):
        async with asyncio.timeout(PATIENCE):
            while True:
                await client.socket.recv()
    return client.socket.close_code
