"""Streams that go on without their client, for one that comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from unittest.mock import patch

import falcon.asgi
import pytest
from support import turns, until

import pachinko
import pachinko_cluster
from pachinko import (
    Client,
    Close,
    Connection,
    Envelope,
    Hub,
    MessageError,
    Pachinko,
    PachinkoError,
    simulate,
)

LOST = {
    "code": "stream_lost", "message": "what is missing of the stream is not kept any more",
}  # fmt: skip
Id = int | str


class Count:
    """An app whose stream counts to what it is given, and waits at each number for `release`."""

    def __init__(self, seconds: float = 60.0, **options: Any) -> None:
        self.app, self.hub = falcon.asgi.App(), Hub()
        self.ws = Pachinko(self.app, "/ws", hub=self.hub, **options)
        self.released = asyncio.Semaphore(0)
        self.ended: list[str] = []
        self.conns: list[Connection] = []

        @self.ws.authenticate(optional=True)
        async def authenticate(conn: Connection, token: str | None) -> str | None:
            return token

        @self.ws.on("count", resumable=seconds)
        async def count(conn: Connection, *, to: int) -> AsyncIterator[int]:
            self.conns.append(conn)
            try:
                for n in range(to):
                    await self.released.acquire()
                    yield n
                await self.released.acquire()
            except asyncio.CancelledError:
                self.ended.append("cancelled")
                raise
            self.ended.append("done")

    def release(self, count: int = 1) -> None:
        for _ in range(count):
            self.released.release()

    @property
    def kept(self) -> list[Any]:
        return [*self.hub.state.registry.resumable.values()]


async def begin(client: Client, id: Id = 8, to: int = 5, type: str = "count") -> None:
    await client.send_text(json.dumps({"type": type, "id": id, "payload": {"to": to}}))


async def begun(
    process: pachinko.Process, count: Count, released: int = 1, *, to: int = 5, **options: Any
) -> Client:
    """Connect a client that begins a stream, and release so many numbers of it."""
    client = await process.connect("/ws", **options)
    await begin(client, to=to)
    count.release(released)
    await process.sim.settle()
    return client


async def left_alone(process: pachinko.Process, count: Count, *args: Any, **options: Any) -> Client:
    """Connect a client that begins a stream, as in `begun`, and then leaves it."""
    client = await begun(process, count, *args, **options)
    client.cut()
    await process.sim.settle()
    return client


def resume(at: Any, id: Any = 8, ids: Any = ()) -> dict[str, str]:
    return {"resume": json.dumps({"streams": [{"id": id, "at": at}], "ids": [*ids]})}


def seen(client: Client) -> list[tuple[str, Any, Any]]:
    """What has come: type, id and payload."""
    return [(each.type, each.id, each.payload) for each in client.received]


def items(*numbers: int, id: Id = 8) -> list[tuple[str, Any, Any]]:
    return [("count.reply", id, n) for n in numbers]


def final(id: Id = 8) -> tuple[str, Any, Any]:
    return ("complete", id, None)


def lost(id: Id = 8) -> tuple[str, Any, Any]:
    return ("error", id, LOST)


# What goes on


async def test_items_have_positions() -> None:
    """Of 96 random bits, the process and a number."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await begun(sim, count, 6)
        ats = [each.at or "" for each in ada.received]
        assert seen(ada) == [*items(0, 1, 2, 3, 4), final()]
        (token,) = {at.partition(".")[0] for at in ats[:-1]}
        assert re.fullmatch("[0-9a-f]{24}" + count.hub.process, token)
        assert ats == [*(f"{token}.{n}" for n in range(1, 6)), ""]


async def test_a_stream_has_a_token_of_its_own() -> None:
    """So nobody can tell that of another one."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await sim.connect("/ws")
        for id in (8, "8"):
            await begin(ada, id)
        count.release(2)
        await sim.settle()
        assert len({(each.at or "").partition(".")[0] for each in ada.received}) == 2


@pytest.mark.parametrize("got", [1, 2, 3, 4])
@pytest.mark.parametrize("meanwhile", [0, 1, 2])
async def test_a_client_gets_what_it_has_missed(got: int, meanwhile: int) -> None:
    """Of what came before it left, too, and then what comes; each item once, and the end."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await left_alone(sim, count, 4, to=7)
        at = ada.received[got - 1].at
        count.release(meanwhile)
        await sim.settle()
        bob = await sim.connect("/ws", query=resume(at))
        count.release(10)
        await sim.settle()
        assert seen(bob) == [*items(*range(got, 7)), final()]
        assert count.ended == ["done"]


async def test_it_may_be_resumed_again_and_again() -> None:
    """Each time from where the client is."""
    count, got = Count(), list[Envelope]()
    async with simulate(count.app) as sim:
        ada = await sim.connect("/ws")
        await begin(ada, to=9)
        for _ in range(9):
            count.release()
            await sim.settle()
            got += ada.received
            ada.cut()
            await sim.settle()
            ada = await sim.connect("/ws", query=resume(got[-1].at))
            assert got[-1].id == 8
        count.release()
        await sim.settle()
        assert [each.payload for each in got] == [*range(9)]
        assert seen(ada) == [final()]


@pytest.mark.parametrize("how", ["cut", "close", "server"])
async def test_however_the_connection_ends(how: str) -> None:
    """The stream goes on."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await begun(sim, count)
        at = ada.received[0].at
        if how == "cut":
            ada.cut()
        elif how == "close":
            await ada.close()
        else:
            await count.hub.close(ada.conn, 4000)
        await sim.settle()
        assert count.ended == []
        bob = await sim.connect("/ws", query=resume(at))
        count.release(5)
        await sim.settle()
        assert seen(bob) == [*items(1, 2, 3, 4), final()]


async def test_the_final_answer_is_kept() -> None:
    """Also without an item behind it, and for a while after it was sent."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await begun(sim, count, 2, to=1)
        at = ada.received[0].at
        assert seen(ada) == [*items(0), final()]
        for _ in range(2):
            ada.cut()
            await sim.settle()
            ada = await sim.connect("/ws", query=resume(at))
            await sim.settle()
            assert seen(ada) == [final()]
        assert len(count.kept) == 1
        await sim.advance(61)
        assert count.kept == []
        bob = await sim.connect("/ws", query=resume(at))
        await sim.settle()
        assert seen(bob) == [lost()]


@pytest.mark.parametrize(
    "raised", [MessageError("no", "never"), KeyError("bug"), falcon.HTTPNotFound(description="no")]
)
async def test_an_error_is_the_final_answer(raised: Exception) -> None:
    """Also without a client."""
    app, hub, fails = falcon.asgi.App(), Hub(), asyncio.Event()
    ws = Pachinko(app, "/ws", hub=hub)

    @ws.on("fail", resumable=5)
    async def fail(conn: Connection) -> AsyncIterator[int]:
        yield 0
        await fails.wait()
        raise raised

    async with simulate(app) as sim:
        is_bug = isinstance(raised, KeyError)
        with sim.bugs(KeyError) if is_bug else contextlib.nullcontext():
            ada = await sim.connect("/ws")
            await ada.send("fail", id=8)
            await sim.settle()
            at = ada.received[0].at
            ada.cut()
            await sim.settle()
            fails.set()
            await sim.settle()
            bob = await sim.connect("/ws", query=resume(at))
            said = await bob.receive("error")
        codes = {"MessageError": "no", "KeyError": "internal_error", "HTTPNotFound": "http_404"}
        assert said["code"] == codes[type(raised).__name__]
        await sim.settle()
        assert bob.received == []


# Who may go on


@pytest.mark.parametrize(
    "at",
    [
        "", ".", "1", "x.1", "{token}", "{token}.", "{token}.-1", "{token}.1.1", "{token}.2",
        "{token}.99999999999999999999999", "{token}.\u0661", " {token}.1", "{TOKEN}.1", 5, True,
        [], {},
    ],
)  # fmt: skip
async def test_another_position_is_none(at: Any) -> None:
    """Of a stream that goes on; it is lost for who says so, and nothing happens to it."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await begun(sim, count, token="ada")
        mine = ada.received[0].at or ""
        token = mine.partition(".")[0]
        if isinstance(at, str):
            at = at.replace("{token}", token).replace("{TOKEN}", "0" * 24)
        eve = await sim.connect("/ws", token="eve", query=resume(at, ids=[ada.conn.id]))
        await sim.settle()
        assert seen(eve) == [lost()]
        count.release(6)
        await sim.settle()
        assert seen(ada) == [*items(0, 1, 2, 3, 4), final()]


@pytest.mark.parametrize("id", ["8", 9, "x", ""])
async def test_another_id_is_another_stream(id: Id) -> None:
    """Also "8" beside 8."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await begun(sim, count)
        bob = await sim.connect("/ws", query=resume(ada.received[0].at, id))
        await sim.settle()
        assert seen(bob) == [lost(id)]


async def test_ids_of_two_kinds_go_on_side_by_side() -> None:
    """Each of them for itself."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await sim.connect("/ws")
        for id in (8, "8"):
            await begin(ada, id, to=3)
        count.release(2)
        await sim.settle()
        streams = [{"id": each.id, "at": each.at} for each in ada.received]
        ada.cut()
        await sim.settle()
        bob = await sim.connect("/ws", query={"resume": json.dumps({"streams": streams})})
        count.release(10)
        await sim.settle()
        for id in (8, "8"):
            own = [each for each in seen(bob) if (type(each[1]), each[1]) == (type(id), id)]
            assert own == [*items(1, 2, id=id), final(id)]


@pytest.mark.parametrize("user", ["ada", "eve", None])
@pytest.mark.parametrize("is_known", [True, False])
async def test_without_a_position_the_user_counts(user: str | None, is_known: bool) -> None:
    """Who has got no item may go on if it is the same user, in what was a connection of its own."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await left_alone(sim, count, 0, token="ada")
        ids = [ada.conn.id] if is_known else ["another"]
        bob = await sim.connect("/ws", token=user, query=resume(None, ids=ids))
        count.release(6)
        await sim.settle()
        is_right = is_known and user == "ada"
        assert seen(bob) == ([*items(0, 1, 2, 3, 4), final()] if is_right else [lost()])


@pytest.mark.parametrize("others", [0, 1])
async def test_a_client_that_does_not_know_its_ids(others: int) -> None:
    """It goes on with the only stream of its user with that id that has no client."""
    count = Count()
    async with simulate(count.app) as sim:
        eve, tab = await sim.connect("/ws", token="eve"), await sim.connect("/ws", token="ada")
        for client in (eve, tab):
            await begin(client)
        for _ in range(1 + others):
            ada = await begun(sim, count, 0, to=1, token="ada")
            ada.cut()
        await sim.settle()
        bob = await sim.connect("/ws", token="ada", query=resume(None))
        count.release(20)
        await sim.settle()
        assert seen(bob) == ([lost()] if others else [*items(0), final()])
        assert seen(tab)[-1] == final()


async def test_nobody_is_no_user() -> None:
    """Guests cannot be told apart."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await begun(sim, count, 0)
        bob = await sim.connect("/ws", query=resume(None, ids=[ada.conn.id]))
        await sim.settle()
        assert seen(bob) == [lost()]


async def test_items_that_were_lost_on_their_way() -> None:
    """Without a position they are all sent, if all of them are still kept."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await left_alone(sim, count, 2, token="ada")
        bob = await sim.connect("/ws", token="ada", query=resume(None, ids=[ada.conn.id]))
        await sim.settle()
        assert seen(bob) == items(0, 1)


async def test_a_second_client_takes_the_stream_over() -> None:
    """The first one is told that it is lost, so that each has one final answer."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await begun(sim, count, to=3)
        bob = await sim.connect("/ws", query=resume(ada.received[0].at))
        count.release(5)
        await sim.settle()
        assert seen(ada) == [*items(0), lost()]
        assert seen(bob) == [*items(1, 2), final()]
        await begin(ada, to=1)
        await sim.settle()
        assert seen(ada) == [*items(0), lost(), *items(0), final()]


async def test_an_answer_is_not_taken_back() -> None:
    """Who has had the final one is told nothing when another client asks for it."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await begun(sim, count, 2, to=1)
        bob = await sim.connect("/ws", query=resume(ada.received[0].at))
        await sim.settle()
        assert seen(ada) == [*items(0), final()] and seen(bob) == [final()]


async def test_an_id_that_the_client_has_used_anew() -> None:
    """Its new stream has it."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await left_alone(sim, count)
        at = ada.received[0].at
        bob = await sim.connect("/ws")
        await begin(bob)
        await bob.send("resume", {"streams": [{"id": 8, "at": at}]})
        await sim.settle()
        assert seen(bob) == []
        count.release(2)
        await sim.settle()
        assert len(seen(bob)) == 1


# When, and how it is asked for


@pytest.mark.parametrize("how", ["query", "message", "authenticate", "before"])
async def test_ways_to_resume(how: str) -> None:
    """In the handshake, and by a message, in an authentication or before it."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await left_alone(sim, count, to=3, token="ada")
        at, ids = ada.received[0].at, [ada.conn.id]
        payload = {"streams": [{"id": 8, "at": at}], "ids": ids}
        if how == "query":
            bob = await sim.connect("/ws", query={"resume": json.dumps(payload)})
        else:
            bob = await sim.connect("/ws", query={"resume": "message"})
            await bob.send_text(json.dumps({"type": "resume", "id": "r", "payload": payload}))
            assert (await bob.receive()).type == "resume.reply"
        count.release(5)
        await sim.settle()
        assert sorted(seen(bob), key=repr) == sorted([*items(1, 2), final()], key=repr)


async def test_a_message_overtakes_an_accepted_handler() -> None:
    """A client that is in goes on, although no handler of a message may begin yet."""
    count, is_free = Count(), asyncio.Event()

    @count.ws.accepted
    async def greet(conn: Connection) -> None:
        if conn.user == "slow":
            await is_free.wait()

    async with simulate(count.app) as sim:
        at = (await left_alone(sim, count, 2)).received[0].at
        bob = await sim.connect("/ws", token="slow")
        await sim.settle()
        await bob.send("resume", {"streams": [{"id": 8, "at": at}]})
        await sim.settle()
        assert seen(bob) == items(1)
        is_free.set()
        count.release(6)
        await sim.settle()
        assert seen(bob) == [*items(1, 2, 3, 4), final()]


@pytest.mark.parametrize("is_over", [True, False])
async def test_what_is_asked_for_twice_is_answered_once(is_over: bool) -> None:
    """Also what is lost; ids of two kinds are two."""
    count = Count()
    async with simulate(count.app) as sim:
        at = (await left_alone(sim, count, 2)).received[0].at
        if is_over:
            count.release(6)
            await sim.settle()
        bob = await sim.connect("/ws")
        wanted = [{"id": id, "at": at} for id in (8, 9, "8", 9, 8, "8")]
        await bob.send("resume", {"streams": [{"id": 8, "at": "x.1"}, *wanted]})
        count.release(6)
        await sim.settle()
        assert sorted(map(repr, seen(bob))) == sorted(
            map(repr, [*items(1, 2, 3, 4), final(), lost(9), lost("8")])
        )


@pytest.mark.parametrize("at", ["x.1", "{at}"])
async def test_a_client_that_does_not_read_is_read_no_further(at: str) -> None:
    """Or it would fill the memory with answers; once it reads, it goes on."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await left_alone(sim, count, 2)
        at = at.replace("{at}", ada.received[0].at or "")
        count.release(6)
        await sim.settle()
        bob = await sim.connect("/ws")
        bob.stall()
        for _ in range(50):
            await bob.send("resume", {"streams": [{"id": 8, "at": at}]})
        await sim.settle()
        assert bob.conn.outgoing.outbox is not None
        assert len(bob.conn.outgoing.outbox.queue) < 20
        bob.resume()
        await sim.settle()
        assert len([each for each in seen(bob) if each in (lost(), final())]) == 50


async def test_a_client_that_goes_as_it_comes_in_takes_nothing() -> None:
    """The stream stays alone, and ends with its seconds."""
    count = Count(30)
    async with simulate(count.app) as sim:
        at = (await left_alone(sim, count, 2)).received[0].at
        opening = pachinko.Outgoing.open

        def opened(outgoing: pachinko.Outgoing) -> None:
            opening(outgoing)
            outgoing.lost()  # as when the first write fails

        with patch.object(pachinko.Outgoing, "open", opened):
            await sim.connect("/ws", query=resume(at))
        await sim.settle()
        assert len(count.kept) == 1
        await sim.advance(30)
        await sim.settle()
        assert count.kept == [] and count.ended == ["cancelled"]


@pytest.mark.parametrize("is_inside", [True, False])
async def test_a_late_login_counts(is_inside: bool) -> None:
    """A client that has got nothing yet is known by its user, once that is known."""
    app, hub, released = falcon.asgi.App(), Hub(), asyncio.Event()
    ws = Pachinko(app, "/ws", hub=hub)

    @ws.authenticate
    async def authenticate(conn: Connection, token: str | None) -> str | None:
        return token

    @ws.on("ask", resumable=9)
    async def ask(conn: Connection) -> AsyncIterator[str]:
        await released.wait()
        yield conn.user_id

    async with simulate(app) as sim:
        ada = await sim.connect("/ws", token="ada")
        await ada.send("ask", id=8)
        await sim.settle()
        ada.cut()
        await sim.settle()
        payload = {"streams": [{"id": 8, "at": None}], "ids": [ada.conn.id]}
        bob = await sim.connect("/ws", query={"resume": "message"})
        login: dict[str, Any] = {"token": "ada"}
        if is_inside:
            login["resume"] = payload
        else:
            await bob.send_text(json.dumps({"type": "resume", "payload": payload}))
        await bob.send_text(json.dumps({"type": "authenticate", "payload": login}))
        released.set()
        await sim.settle()
        assert [(each.type, each.id) for each in bob.received] == [
            ("ask.reply", 8), ("complete", 8)
        ]  # fmt: skip


@pytest.mark.parametrize(
    "streams",
    [None, 5, {}, "x", [], [None], [5], [{}], [{"id": None}], [{"id": True, "at": "x"}], [[8]]],
)
async def test_what_is_no_stream_is_left_out(streams: Any) -> None:
    """Nothing is answered, since nothing has an id."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await sim.connect("/ws", query={"resume": json.dumps({"streams": streams})})
        await ada.send("resume", {"streams": streams})
        await sim.settle()
        assert seen(ada) == []


async def test_a_hundred_streams_at_a_time() -> None:
    """Are looked for; the rest of such a list is not."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("resume", {"streams": [{"id": n, "at": "x.1"} for n in range(200)]})
        await sim.settle()
        assert seen(ada) == [lost(n) for n in range(100)]


async def test_elsewhere_a_stream_is_lost() -> None:
    """An app without any says so, too, since the client waits for a final answer."""
    app = falcon.asgi.App()
    Pachinko(app, "/ws", hub=Hub())
    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("resume", {"streams": [{"id": 8, "at": "x.1"}]})
        await sim.settle()
        assert seen(ada) == [lost()]


# How it ends


async def test_nobody_comes_back() -> None:
    """After its seconds the generator is cancelled, and forgotten."""
    count = Count(seconds=30)
    async with simulate(count.app) as sim:
        ada = await left_alone(sim, count)
        at = ada.received[0].at
        await sim.advance(29)
        assert count.ended == [] and len(count.kept) == 1
        await sim.advance(1)
        assert count.ended == ["cancelled"] and count.kept == []
        bob = await sim.connect("/ws", query=resume(at))
        await sim.settle()
        assert seen(bob) == [lost()]


async def test_a_generator_that_ignores_its_end() -> None:
    """What it returns is kept for nobody."""
    app, hub = falcon.asgi.App(), Hub()
    ws = Pachinko(app, "/ws", hub=hub)

    @ws.on("ask", resumable=5)
    async def ask(conn: Connection) -> AsyncIterator[int]:
        yield 0
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("ask", id=8)
        await sim.settle()
        ada.cut()
        await sim.settle()
        await sim.advance(5)
        assert not hub.state.registry.resumable
        await sim.advance(5)


async def test_its_seconds_begin_anew() -> None:
    """With each departure."""
    count = Count(seconds=30)
    async with simulate(count.app) as sim:
        ada = await begun(sim, count)
        at = ada.received[0].at
        for _ in range(3):
            ada.cut()
            await sim.settle()
            await sim.advance(20)
            ada = await sim.connect("/ws", query=resume(at))
            await sim.settle()
        await sim.advance(100)
        assert count.ended == []


@pytest.mark.parametrize("is_resumed", [True, False])
async def test_the_client_stops_it(is_resumed: bool) -> None:
    """With ``complete``, in its first connection or in a later one."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await begun(sim, count)
        at = ada.received[0].at
        if is_resumed:
            ada.cut()
            await sim.settle()
            ada = await sim.connect("/ws", query=resume(at))
            await sim.settle()
        await ada.send_text(json.dumps({"type": "complete", "id": 8}))
        await sim.settle()
        assert seen(ada)[-1] == final()
        assert count.ended == ["cancelled"]
        ada.cut()
        await sim.settle()
        bob = await sim.connect("/ws", query=resume(at))
        await sim.settle()
        assert seen(bob) == [final()]


async def test_the_server_stops() -> None:
    """All of them end with the app, with a client and without."""
    count = Count()
    async with simulate(count.app) as sim:
        ada, bob = await sim.connect("/ws"), await sim.connect("/ws")
        for client in (ada, bob):
            await begin(client)
        await sim.settle()
        ada.cut()
        await sim.settle()
    assert count.ended == ["cancelled"] * 2 and count.kept == []


async def test_streams_of_another_endpoint_go_on() -> None:
    """An endpoint ends its own only."""
    count = Count()
    other = Pachinko(falcon.asgi.App(), "/other", hub=count.hub)
    async with simulate(count.app) as sim:
        await left_alone(sim, count, 0)
        async with other.running():
            pass
        assert count.ended == [] and len(count.kept) == 1


@pytest.mark.parametrize("is_kept", [True, False])
async def test_a_generator_that_uses_its_connection(is_kept: bool) -> None:
    """That has gone: the stream is lost, and no bug is logged."""
    app, hub, goes_on = falcon.asgi.App(), Hub(), asyncio.Event()
    ws = Pachinko(app, "/ws", hub=hub)

    @ws.on("ask", resumable=5)
    async def ask(conn: Connection) -> AsyncIterator[int]:
        yield 0
        await goes_on.wait()
        if is_kept:
            await conn.send("progress", 1)
        else:
            raise Close(4000)

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("ask", id=8)
        await sim.settle()
        at = ada.received[0].at
        ada.cut()
        await sim.settle()
        goes_on.set()
        await sim.settle()
        bob = await sim.connect("/ws", query=resume(at))
        await sim.settle()
        assert seen(bob) == [lost()]


async def test_a_close_ends_the_connection_of_now() -> None:
    """Not the one that has gone."""
    app, hub, goes_on = falcon.asgi.App(), Hub(), asyncio.Event()
    ws = Pachinko(app, "/ws", hub=hub)

    @ws.on("ask", resumable=5)
    async def ask(conn: Connection) -> AsyncIterator[int]:
        yield 0
        await goes_on.wait()
        raise Close(4000, "enough")

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("ask", id=8)
        await sim.settle()
        bob = await sim.connect("/ws", query=resume(ada.received[0].at))
        goes_on.set()
        assert await bob.closed() == (4000, "enough")
        assert ada.end is None


@pytest.mark.parametrize("how", ["close", "write"])
@pytest.mark.parametrize("comes_back", [True, False])
async def test_a_stream_that_ends_its_connection_itself(how: str, comes_back: bool) -> None:
    """Goes on alone, too: until its client comes back, or its seconds are over."""
    app, hub, goes_on, ended = falcon.asgi.App(), Hub(), asyncio.Semaphore(0), list[int]()
    ws = Pachinko(app, "/ws", hub=hub)

    @ws.on("ask", resumable=5)
    async def ask(conn: Connection) -> AsyncIterator[int]:
        try:
            for n in range(4):
                await goes_on.acquire()
                if n == 1 and how == "close":
                    await conn.close(4000)
                yield n
        finally:
            ended.append(1)

    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        async def checked(event: Any) -> None:
            if how == "write" and '"payload":1' in (event.get("text") or "") and not is_back:
                raise ConnectionResetError
            await send(event)

        await app(scope, receive, checked)

    is_back = False
    async with simulate(wrapped) as sim:
        ada = await sim.connect("/ws")
        await ada.send("ask", id=8)
        goes_on.release()
        await sim.settle()
        at = ada.received[0].at
        goes_on.release()
        await sim.settle()
        ada.cut()
        await sim.settle()
        is_back = True
        if comes_back:
            bob = await sim.connect("/ws", query=resume(at))
            goes_on.release()
            goes_on.release()
            await sim.settle()
            assert [each.payload for each in bob.received] == [1, 2, 3, None]
        else:
            await sim.advance(5)
            assert not hub.state.registry.resumable
        assert ended == [1]


async def test_it_ends_with_its_client_there() -> None:
    """The end of the server may find it so, and the client gets the final answer."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await begun(sim, count, 0)
        count.kept[0].end()
        await sim.settle()
        assert seen(ada) == [final()] and count.kept == []


@pytest.mark.parametrize("is_taken", [True, False])
async def test_a_departure_while_an_error_is_explained(is_taken: bool) -> None:
    """The stream has not ended before its final answer, which is for who has it then."""
    app, hub, explained = falcon.asgi.App(), Hub(), asyncio.Event()
    ws = Pachinko(app, "/ws", hub=hub)

    @ws.on("fail", resumable=60)
    async def fail(conn: Connection) -> AsyncIterator[int]:
        yield 0
        raise KeyError

    @ws.error(KeyError)
    async def explain(conn: Connection, exc: Exception) -> MessageError:
        await explained.wait()
        return MessageError("no")

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("fail", id=8)
        await sim.settle()
        at = ada.received[0].at
        bob = ada
        if is_taken:
            bob = await sim.connect("/ws", query=resume(at))
            explained.set()
            await sim.settle()
            assert seen(ada)[1:] == [lost()] and seen(bob)[0][2]["code"] == "no"
        bob.cut()
        await sim.settle()
        explained.set()
        await sim.settle()
        eve = await sim.connect("/ws", query=resume(at))
        await sim.settle()
        assert [each.payload["code"] for each in eve.received] == ["no"]


# What it takes


async def test_a_generator_waits_for_its_client() -> None:
    """Alone, it goes on until 256 items or 1 MiB are kept; none is lost."""
    app, hub, made = falcon.asgi.App(), Hub(), list[int]()
    ws = Pachinko(app, "/ws", hub=hub)

    @ws.on("run", resumable=60)
    async def run(conn: Connection) -> AsyncIterator[int]:
        for n in range(1000):
            made.append(n)
            yield n
            if n == 0:
                await turns(50)

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("run", id=8)
        at = (await ada.receive()).at
        ada.cut()
        await sim.settle()
        assert 250 < len(made) < 270
        bob = await sim.connect("/ws", query=resume(at))
        await sim.settle()
        assert [each.payload for each in bob.received[:-1]] == [*range(1, 1000)]


async def test_large_items_count_by_their_size() -> None:
    """A few of them are enough."""
    app, hub, made = falcon.asgi.App(), Hub(), list[int]()
    ws = Pachinko(app, "/ws", hub=hub)

    @ws.on("run", resumable=60)
    async def run(conn: Connection) -> AsyncIterator[str]:
        for n in range(100):
            made.append(n)
            yield "x" * 300_000
            if n == 0:
                await turns(50)

    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("run", id=8)
        await ada.receive()
        ada.cut()
        await sim.settle()
        assert 3 < len(made) < 7


async def test_old_items_are_not_kept() -> None:
    """A client that is too far behind has lost the stream, and it ends with its seconds."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await begun(sim, count, 300, to=1000, token="ada")
        old, good = ada.received[42].at, ada.received[43].at
        ada.cut()
        await sim.settle()
        for at in (old, None):
            bob = await sim.connect("/ws", token="ada", query=resume(at, ids=[ada.conn.id]))
            await sim.settle()
            assert seen(bob) == [lost()]
        bob = await sim.connect("/ws", query=resume(good))
        await sim.settle()
        assert seen(bob) == items(*range(44, 300))


async def test_it_counts_for_the_client_that_has_it() -> None:
    """Beside its other tasks; a client that has lost or left it may begin others."""
    count = Count(max_concurrent=2)
    async with simulate(count.app) as sim:
        ada = await sim.connect("/ws")
        for id in (1, 2, 3):
            await begin(ada, id)
        await sim.settle()
        (said,) = ada.received
        assert said.id == 3 and said.payload["code"] == "too_busy"


async def test_streams_without_a_client_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were left first end first, and none that has a client."""
    monkeypatch.setattr(pachinko, "_MOST_ALONE", 3)
    count = Count()
    async with simulate(count.app) as sim:
        clients = [await sim.connect("/ws") for _ in range(6)]
        for client in clients:
            await begin(client)
        count.release(6)
        await sim.settle()
        ats = [client.received[0].at for client in clients]
        for client in reversed(clients[1:]):
            client.cut()
            await sim.settle()
        assert len(count.kept) == 4 and count.ended == ["cancelled"] * 2
        found = []
        for at in ats[1:]:
            bob = await sim.connect("/ws", query=resume(at))
            await sim.settle()
            found.append(seen(bob) == [])
        assert found == [True, True, True, False, False]


async def test_finished_streams_count_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that begins one after the other makes the process keep no more."""
    monkeypatch.setattr(pachinko, "_MOST_ALONE", 3)
    count = Count()
    async with simulate(count.app) as sim:
        ada = await sim.connect("/ws")
        for id in range(9):
            await begin(ada, id, to=1)
            count.release(2)
            await sim.settle()
        assert seen(ada)[-1] == final(8) and len(count.kept) == 3
        bob = await sim.connect("/ws", query=resume(ada.received[-2].at, 8))
        await sim.settle()
        assert seen(bob) == [final(8)]


async def test_items_of_all_streams_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams without a client end first; then fewer items are kept for those who have one."""
    count = Count()
    async with simulate(count.app) as sim:
        clients = [await sim.connect("/ws") for _ in range(4)]
        for client in clients:
            await begin(client, to=100)
        count.release(40)
        await sim.settle()
        at = clients[3].received[-1].at
        for client in clients[:2]:
            client.cut()
            await sim.settle()
        size = count.hub.state.counts["stream_bytes"]
        monkeypatch.setattr(pachinko, "_ALL_BYTES", size * 7 // 8)
        count.release(4)
        await sim.settle()
        assert len(count.kept) == 3
        monkeypatch.setattr(pachinko, "_ALL_BYTES", 100)
        count.release(30)
        await sim.settle()
        assert len(count.kept) == 2 and count.hub.state.counts["stream_bytes"] <= 400
        clients[3].cut()
        await sim.settle()
        bob = await sim.connect("/ws", query=resume(at))
        await sim.settle()
        assert seen(bob) == [lost()]
    assert count.hub.state.counts["stream_bytes"] == 0


async def test_a_client_may_have_so_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many messages ask for them."""
    monkeypatch.setattr(pachinko, "_MOST_RESUMED", 3)
    count = Count()
    async with simulate(count.app) as sim:
        ada = await sim.connect("/ws", token="ada")
        for id in range(5):
            await begin(ada, id)
        await sim.settle()
        ids = [ada.conn.id]
        ada.cut()
        await sim.settle()
        bob = await sim.connect("/ws", token="ada")
        for id in range(5):
            await bob.send("resume", {"streams": [{"id": id, "at": None}], "ids": ids})
        await sim.settle()
        assert seen(bob) == [lost(3), lost(4)]


async def test_middleware_is_around_it() -> None:
    """Its context is that of the message, also after a resume."""
    count, seen_by = Count(), list[str]()

    @count.ws.middleware
    async def timed(
        conn: Connection, envelope: Envelope, call_next: Callable[[], Awaitable[Any]]
    ) -> Any:
        with contextlib.ExitStack() as stack:
            stack.callback(seen_by.append, f"end of {envelope.type}")
            return await call_next()

    async with simulate(count.app) as sim:
        ada = await left_alone(sim, count, to=2)
        at = ada.received[0].at
        assert seen_by == []
        bob = await sim.connect("/ws", query=resume(at))
        count.release(5)
        await sim.settle()
        assert seen(bob) == [*items(1), final()] and seen_by == ["end of count"]


async def test_an_outage_of_the_broker_changes_nothing() -> None:
    """The stream is in one process."""
    count = Count()
    async with simulate(count.app) as sim:
        ada = await begun(sim, count, to=2)
        at = ada.received[0].at
        ada.cut()
        sim.broker.lose()
        await sim.settle()
        bob = await sim.connect("/ws", query=resume(at))
        count.release(5)
        await sim.settle()
        assert seen(bob) == [*items(1), final()]


# Mistakes


@pytest.mark.parametrize("seconds", [0, -1, True, "60", float("inf"), float("nan")])
def test_seconds_are_a_number_above_0(seconds: Any) -> None:
    """The error has what was given."""
    with pytest.raises(PachinkoError, match="resumable is a number of seconds above 0, got"):
        Pachinko().on("ask", resumable=seconds)


def test_only_a_stream_can_be_resumable() -> None:
    """The error names the function."""
    ws = Pachinko()
    with pytest.raises(PachinkoError, match=r"answer\(\) at .* is no stream.*write `yield`"):

        @ws.on("ask", resumable=60)
        async def answer(conn: Connection) -> int:
            return 1


async def test_it_may_be_included() -> None:
    """Under its prefix."""
    app, hub, part = falcon.asgi.App(), Hub(), Pachinko()

    @part.on("ask", resumable=5)
    async def ask(conn: Connection) -> AsyncIterator[int]:
        yield 0

    ws = Pachinko(app, "/ws", hub=hub)
    ws.include(part, prefix="ai")
    async with simulate(app) as sim:
        ada = await sim.connect("/ws")
        await ada.send("ai.ask", id=8)
        assert (await ada.receive()).at


# In another process


class Counts:
    """Makes an app with a stream for each process of a simulation."""

    def __init__(self) -> None:
        self.made: list[Count] = []

    def __call__(self) -> Any:
        self.made.append(Count())
        return self.made[-1].app


@pytest.mark.parametrize("got", [1, 2, 3])
async def test_another_process_goes_on_with_it(got: int) -> None:
    """It asks the one that the position names for items; each comes once, and the end."""
    counts = Counts()
    async with simulate(counts) as sim:
        other = await sim.process()
        ada = await left_alone(sim, counts.made[0], 3, to=7)
        at = ada.received[got - 1].at
        bob = await other.connect("/ws", query=resume(at))
        await sim.settle()
        assert seen(bob) == items(*range(got, 3))
        for n in range(3, 7):
            counts.made[0].release()
            await sim.settle()
            assert seen(bob)[-1:] == items(n)
        counts.made[0].release()
        await sim.settle()
        assert seen(bob) == [*items(*range(got, 7)), final()]
        await begin(bob, to=0)
        counts.made[1].release()
        await sim.settle()
        assert seen(bob)[-1] == final()


async def test_and_back_again() -> None:
    """From process to process, with items before and behind each step."""
    counts, got = Counts(), list[Envelope]()
    async with simulate(counts) as sim:
        processes = [sim, await sim.process(), await sim.process()]
        ada, ids = await sim.connect("/ws"), list[str]()
        await begin(ada, to=8)
        for n in range(8):
            counts.made[0].release()
            await sim.settle()
            got += [each for each in ada.received if each.type == "count.reply"]
            ids.append(ada.conn.id)
            ada.cut()
            await sim.settle()
            where = processes[n % 3]
            ada = await where.connect("/ws", query=resume(got[-1].at, ids=ids))
        counts.made[0].release()
        await sim.settle()
        assert [each.payload for each in got] == [*range(8)]
        assert seen(ada) == [final()]


@pytest.mark.parametrize("user", ["ada", "eve"])
async def test_the_user_counts_there_too(user: str) -> None:
    """For a client that has got no item."""
    counts = Counts()
    async with simulate(counts) as sim:
        other = await sim.process()
        ada = await left_alone(sim, counts.made[0], 0, to=2, token="ada")
        ids = [ada.conn.id]
        bob = await other.connect("/ws", token=user, query=resume(None, ids=ids))
        counts.made[0].release(3)
        await sim.settle()
        assert seen(bob) == ([*items(0, 1), final()] if user == "ada" else [lost()])


async def test_the_client_stops_it_there() -> None:
    """The generator ends in the process that has it."""
    counts = Counts()
    async with simulate(counts) as sim:
        other = await sim.process()
        ada = await left_alone(sim, counts.made[0])
        at, ids = ada.received[0].at, [ada.conn.id]
        bob = await other.connect("/ws", query=resume(at, ids=ids))
        await sim.settle()
        await bob.send_text(json.dumps({"type": "complete", "id": 8}))
        await sim.settle()
        assert seen(bob) == [final()] and counts.made[0].ended == ["cancelled"]


async def test_a_client_that_leaves_there_may_come_back() -> None:
    """Its departure stops nothing."""
    counts = Counts()
    async with simulate(counts) as sim:
        other = await sim.process()
        ada = await left_alone(sim, counts.made[0], to=2)
        at, ids = ada.received[0].at, [ada.conn.id]
        bob = await other.connect("/ws", query=resume(at, ids=ids))
        await sim.settle()
        bob.cut()
        await sim.settle()
        assert counts.made[0].ended == []
        ada = await sim.connect("/ws", query=resume(at, ids=ids))
        counts.made[0].release(2)
        await sim.settle()
        assert seen(ada) == [*items(1), final()]


async def test_its_seconds_run_from_the_latest_question() -> None:
    """A client in another process keeps it; without one it ends."""
    counts = Counts()
    async with simulate(counts) as sim:
        other = await sim.process()
        ada = await left_alone(sim, counts.made[0])
        at, ids = ada.received[0].at, [ada.conn.id]
        bob = await other.connect("/ws", query=resume(at, ids=ids))
        for _ in range(8):
            await sim.advance(20)
        assert counts.made[0].ended == []
        bob.cut()
        await sim.advance(100)
        assert counts.made[0].ended == ["cancelled"]


@pytest.mark.parametrize("is_here", [True, False])
async def test_one_client_at_a_time_there(is_here: bool) -> None:
    """One in another process loses the stream to the next one, here or in a third process."""
    counts = Counts()
    async with simulate(counts) as sim:
        other, third = await sim.process(), await sim.process()
        ada = await left_alone(sim, counts.made[0], to=4)
        at, ids = ada.received[0].at, [ada.conn.id]
        bob = await other.connect("/ws", query=resume(at, ids=ids))
        counts.made[0].release()
        await sim.settle()
        eve = await (sim if is_here else third).connect("/ws", query=resume(at, ids=ids))
        await sim.settle()
        counts.made[0].release(5)
        await sim.settle()
        assert seen(bob) == [*items(1), lost()]
        assert seen(eve) == [*items(1, 2, 3), final()]


async def test_whoever_was_late_to_ask_has_lost_it() -> None:
    """Another client came between two of its questions."""
    counts = Counts()
    async with simulate(counts) as sim:
        other = await sim.process()
        ada = await begun(sim, counts.made[0], to=2)
        (stream,) = counts.made[0].kept
        assert await stream.pull("bob", 8, 0, 0) is not None
        eve = await sim.connect("/ws", query=resume(ada.received[0].at))
        assert await stream.pull("bob", 8, 0, 0) is None
        assert await stream.pull(eve.conn.id, 8, 0, 0) is None
        counts.made[0].release(2)
        await sim.settle()
        assert seen(eve) == [*items(1), final()]
        assert not other.hub.state.registry.resumable


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of other processes, whose time is real, take milliseconds instead of seconds."""
    monkeypatch.setattr(pachinko_cluster, "_BROKER_WAIT", 0.3)
    monkeypatch.setattr(pachinko, "_PULL", 0.05)
    monkeypatch.setattr(pachinko, "_PULL_AGAIN", 0.05)


@pytest.mark.usefixtures("patience")
async def test_the_process_that_has_it_dies() -> None:
    """Then the stream is lost."""
    counts = Counts()
    async with simulate(counts) as sim:
        other = await sim.process()
        ada = await left_alone(other, counts.made[1])
        at, ids = ada.received[0].at, [ada.conn.id]
        bob = await sim.connect("/ws", query=resume(at, ids=ids))
        await sim.settle()
        other.kill()
        await until(lambda: bob.received)
        assert seen(bob) == [lost()]


@pytest.mark.usefixtures("patience")
async def test_an_outage_in_between() -> None:
    """The items come when the broker is back."""
    counts = Counts()
    async with simulate(counts) as sim:
        other = await sim.process()
        ada = await left_alone(sim, counts.made[0], to=3)
        at, ids = ada.received[0].at, [ada.conn.id]
        bob = await other.connect("/ws", query=resume(at, ids=ids))
        await sim.settle()
        sim.broker.lose()
        counts.made[0].release(3)
        await sim.settle()
        sim.broker.restore()
        await until(lambda: final() in seen(bob))
        assert [each for each in seen(bob) if each[0] != "gap"] == [*items(1, 2), final()]


@pytest.mark.parametrize("at", [None, "0" * 36 + ".1", "0" * 24 + "{process}.1", "0" * 24 + ".1"])
async def test_no_process_has_it(at: str | None) -> None:
    """Of those that the position names, or the client was connected to; no others are asked."""
    counts = Counts()
    async with simulate(counts) as sim:
        other = await sim.process()
        ada, eve = await sim.connect("/ws"), await other.connect("/ws")
        ids = [ada.conn.id, eve.conn.id, "x", "f" * 24, 5]
        at = at and at.replace("{process}", counts.made[0].hub.process)
        bob = await other.connect("/ws", token="bob", query=resume(at, ids=ids))
        await sim.advance(60)
        assert seen(bob) == [lost()]


@pytest.mark.parametrize("number", [2, 99])
async def test_positions_that_are_none_there(number: int) -> None:
    """The process that has the stream says so."""
    counts = Counts()
    async with simulate(counts) as sim:
        other = await sim.process()
        ada = await begun(sim, counts.made[0])
        token = (ada.received[0].at or "").partition(".")[0]
        bob = await other.connect("/ws", query=resume(f"{token}.{number}", ids=[ada.conn.id]))
        await sim.settle()
        assert seen(bob) == [lost()]
        counts.made[0].release(6)
        await sim.settle()
        assert seen(ada) == [*items(0, 1, 2, 3, 4), final()]


async def test_without_a_broker_nobody_else_is_asked() -> None:
    """Not even for an id of another process."""
    count = Count()
    count.hub.configure("memory://")
    async with simulate(count.app) as sim:
        ada = await sim.connect("/ws", query=resume("x.1", ids=["f" * 24]))
        await sim.settle()
        assert seen(ada) == [lost()]


async def test_a_write_that_fails_there() -> None:
    """The client has gone, and may go on elsewhere."""
    counts = Counts()

    def make() -> Any:
        app, is_first = counts(), len(counts.made) == 1

        async def wrapped(scope: Any, receive: Any, send: Any) -> None:
            async def checked(event: Any) -> None:
                if "count.reply" in (event.get("text") or "") and not is_first:
                    raise ConnectionResetError
                await send(event)

            await app(scope, receive, checked)

        return wrapped

    async with simulate(make) as sim:
        other = await sim.process()
        ada = await left_alone(sim, counts.made[0], 2, to=3)
        at, ids = ada.received[0].at, [ada.conn.id]
        bob = await other.connect("/ws", query=resume(at, ids=ids))
        await sim.settle()
        bob.cut()
        ada = await sim.connect("/ws", query=resume(at, ids=ids))
        counts.made[0].release(2)
        await sim.settle()
        assert seen(ada) == [*items(1, 2), final()]
