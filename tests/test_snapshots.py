"""A client that is new to a kept group, or has missed messages, gets its state: `ws.snapshot`."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import json
import logging
import sys
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import attrs
import falcon
import pytest
from support import connect, let_clients_join, new_app, serving, until

import pachinko
from pachinko import (
    AnswerError,
    Client,
    Close,
    Connection,
    Hub,
    MessageError,
    Pachinko,
    PachinkoError,
    Refused,
    Simulation,
    message,
    simulate,
)

FIRST: dict[str, str] = {"resume": "{}"}  # of a client that resumes, and has nothing


@message("state")
class State:
    """What a snapshot sends."""

    texts: list[Any]


@attrs.define
class Room:
    """An app whose clients are in a kept group, and what its snapshot is to do."""

    hub: Hub = attrs.Factory(Hub)
    ws: Pachinko = attrs.Factory(lambda self: Pachinko(new_app(), "/ws", hub=self.hub), True)
    texts: list[Any] = attrs.Factory(list)
    calls: list[str] = attrs.Factory(list)  # users of connections, once each call
    held: asyncio.Event | None = None  # each call waits for it
    does: Callable[[], Any] = lambda: None
    groups: tuple[str, ...] = ("room:a",)
    running: int = 0
    most: int = 0

    def __attrs_post_init__(self) -> None:
        @self.ws.connect
        async def arrive(conn: Connection) -> None:
            conn.user = conn.req.get_param("user", default="?")
            for group in self.groups:
                await conn.join(group)

        let_clients_join(self.ws)

    def takes(self, prefix: str = "room:") -> Room:
        """With a snapshot of the groups that begin with *prefix*."""

        @self.ws.snapshot(prefix)
        async def state(conn: Connection, group: str) -> State | None:
            self.calls.append(conn.user or "")
            self.running += 1
            self.most = max(self.most, self.running)
            texts = [*self.texts]
            try:
                if self.held is not None:
                    await self.held.wait()
                if (result := self.does()) is not None:
                    await result
            finally:
                self.running -= 1
            return State(texts)

        return self

    async def say(self, *texts: Any) -> None:
        for text in texts:
            self.texts.append(text)
            await self.hub.send("room:a", "said", text)


@contextlib.asynccontextmanager
async def running(room: Room, messages: int = 10, **options: Any) -> AsyncIterator[Simulation]:
    room.hub.keep("room:", messages=messages)
    async with simulate(room.ws._app, **options) as sim:
        yield sim


def shown(client: Client) -> list[Any]:
    """What *client* has got, without payloads of verdicts but their reasons."""
    found: list[Any] = []
    for each in client.received:
        at = "" if each.at is None else " at " + each.at.rpartition(".")[2]
        payload = each.payload
        if each.type in ("resume", "gap", "error"):
            payload = payload.get("reason") or payload.get("code") or payload.get("replayed")
        if each.type == "state":
            payload = payload["texts"]
        assert each.group == "room:a", each
        found.append((each.type + at, payload))
    return found


def since(at: str | None, *ids: str) -> dict[str, str]:
    """The query of a client that comes back."""
    return {"resume": json.dumps({"groups": {"room:a": at}, "ids": ids})}


async def end_in(sim: Simulation) -> tuple[int | None, str | None]:
    """What a client is closed with that has just come in, or is just coming in."""
    try:
        return await (await sim.connect("/ws", query=FIRST)).closed()
    except Refused as exc:
        return exc.code, exc.reason


# Who gets one


async def test_a_client_that_resumes_gets_verdict_state_and_the_rest() -> None:
    """In this order; only the state has a position, which the state alone gives."""
    room = Room(held=asyncio.Event()).takes()
    async with running(room) as sim:
        await room.say(1)
        client = await sim.connect("/ws", query=FIRST)
        await sim.settle()
        await room.say(2, 3)
        await sim.settle()
        assert shown(client) == [("resume", 0)]
        assert room.held is not None
        room.held.set()
        await sim.settle()
        await room.say(4)
        await sim.settle()
        assert shown(client) == [
            ("resume", 0), ("state at 1", [1]),
            ("said at 2", 2), ("said at 3", 3), ("said at 4", 4),
        ]  # fmt: skip
        verdict = client.received[0]
        assert verdict.payload == {"replayed": 0, "id": client.conn.id}


async def test_a_client_that_does_not_resume_gets_the_state_alone() -> None:
    """It is told no verdict, and misses nothing of what is sent meanwhile."""
    room = Room(held=asyncio.Event()).takes()
    async with running(room) as sim:
        client = await sim.connect("/ws")
        await room.say(1)
        assert room.held is not None
        room.held.set()
        await sim.settle()
        assert shown(client) == [("state at 0", []), ("said at 1", 1)]


async def test_who_has_got_all_that_it_missed_needs_none() -> None:
    """The snapshot is not called."""
    room = Room().takes()
    async with running(room) as sim:
        client = await sim.connect("/ws", query=FIRST)
        await room.say(1)
        await sim.settle()
        at = client.received[-1].at
        client.cut()
        await room.say(2)
        room.calls.clear()
        client = await sim.connect("/ws", query=since(at))
        await sim.settle()
        assert shown(client) == [("said at 2", 2), ("resume at 2", 1)]
        assert room.calls == []


async def test_who_has_missed_nothing_gets_the_state() -> None:
    """A join that replays nothing is like a first one."""
    room = Room().takes()
    async with running(room) as sim:
        await room.say(1)
        at = await room.hub.position("room:a")
        client = await sim.connect("/ws", query=since(at))
        await sim.settle()
        assert shown(client) == [("resume", 0), ("state at 1", [1])]


@pytest.mark.parametrize(("at", "reason"), [(None, "epoch"), ("x.1", "epoch"), ("{}.0", "expired")])
async def test_a_gap_is_followed_by_the_state(at: str | None, reason: str) -> None:
    """The verdict has no position: who is cut before the state must not go on from there."""
    room = Room().takes()
    async with running(room, messages=2) as sim:
        await room.say(1, 2, 3)
        epoch = (await room.hub.position("room:a")).rpartition(".")[0]
        client = await sim.connect("/ws", query=since(at and at.format(epoch)))
        await sim.settle()
        assert shown(client) == [("gap", reason), ("state at 3", [1, 2, 3])]
        assert client.received[0].payload == {
            "group": "room:a", "reason": reason, "id": client.conn.id,
        }  # fmt: skip


async def test_the_position_of_a_state_is_one_to_resume_from() -> None:
    """What comes behind it is replayed, and no more."""
    room = Room().takes()
    async with running(room) as sim:
        await room.say(1)
        client = await sim.connect("/ws")
        await sim.settle()
        (state,) = client.received
        client.cut()
        await room.say(2)
        client = await sim.connect("/ws", query=since(state.at))
        await sim.settle()
        assert shown(client) == [("said at 2", 2), ("resume at 2", 1)]


async def test_a_client_that_says_later_what_it_has() -> None:
    """Nothing is called before its ``resume`` message; or before its time is over."""
    room = Room().takes()
    async with running(room) as sim:
        await room.say(1)
        one = await sim.connect("/ws", query={"resume": "message", "user": "one"})
        two = await sim.connect("/ws", query={"resume": "message", "user": "two"})
        await sim.settle()
        assert room.calls == []
        await one.send("resume", {"groups": {"room:a": "x.1"}})
        await sim.settle()
        assert room.calls == ["one"] and shown(one) == [("gap", "epoch"), ("state at 1", [1])]
        sim.advance(10)
        await sim.settle()
        assert room.calls == ["one", "two"] and shown(two) == [("resume", 0), ("state at 1", [1])]


@pytest.mark.parametrize("query", [{}, FIRST])
async def test_each_join_gets_one(query: dict[str, str]) -> None:
    """A second one after a leave, and none for a member."""
    room = Room(groups=()).takes()
    async with running(room) as sim:
        client = await sim.connect("/ws", query=query)
        await sim.settle()
        assert room.calls == []
        for type in ("join", "join", "leave", "join"):
            await client.send(type, "room:a")
            await sim.settle()
        assert [each.type for each in client.received if each.type == "state"] == ["state"] * 2


async def test_a_later_gap_is_followed_by_the_state() -> None:
    """Whoever resumes is told that messages are missing; everybody gets the state."""
    room = Room().takes()
    async with running(room) as sim:
        told = await sim.connect("/ws", query=FIRST)
        other = await sim.connect("/ws")
        await room.say(1)
        await sim.settle()
        for client in (told, other):
            assert await client.receive()
        assert room.hub.state.history is not None
        room.hub.state.history.lose("room:a", "broker")
        await sim.settle()
        then = [("state at 1", [1])]
        assert shown(told)[1:] == [("said at 1", 1), ("gap", "broker"), *then]
        assert shown(other) == [("said at 1", 1), *then]


async def test_a_gap_meanwhile_takes_the_place_of_a_state() -> None:
    """The state that was being loaded is not sent: it may lack what the gap is about."""
    room = Room(held=asyncio.Event()).takes()
    async with running(room) as sim:
        client = await sim.connect("/ws", query=FIRST)
        await sim.settle()
        await room.say(1)
        assert room.held is not None and room.hub.state.history is not None
        room.hub.state.history.lose("room:a", "broker")
        room.held.set()
        await sim.settle()
        assert shown(client) == [("resume", 0), ("gap", "broker"), ("state at 1", [1])]
        assert room.calls == ["?", "?"]


# Which one


async def test_a_state_may_hold_what_comes_behind_it() -> None:
    """The position is taken first, and then the state: nothing falls between the two."""
    room = Room()

    @room.ws.snapshot("room:")
    async def state(conn: Connection, group: str) -> State:
        await room.say(1)
        return State([*room.texts])

    async with running(room) as sim:
        client = await sim.connect("/ws")
        await sim.settle()
        assert shown(client) == [("state at 0", [1]), ("said at 1", 1)]


async def test_the_longest_prefix_counts() -> None:
    """As for the windows; groups that are not kept have none."""
    room = Room(groups=("room:a", "room:vip:a", "other", "hall"))
    room.hub.keep("hall")
    for prefix in ("", "room:", "room:vip:"):

        @room.ws.snapshot(prefix)
        async def state(conn: Connection, group: str, prefix: str = prefix) -> State:
            return State([prefix, group])

    async with running(room) as sim:
        client = await sim.connect("/ws")
        await sim.settle()
        assert sorted(each.payload["texts"] for each in client.received) == [
            ["", "hall"], ["room:", "room:a"], ["room:vip:", "room:vip:a"],
        ]  # fmt: skip


async def test_an_endpoint_has_its_own() -> None:
    """Members of the group by another endpoint get none, or that one's."""
    room = Room().takes()
    other = Pachinko(room.ws._app, "/other", hub=room.hub)

    @other.connect
    async def arrive(conn: Connection) -> None:
        await conn.join("room:a")

    async with running(room) as sim:
        client = await sim.connect("/other", query=FIRST)
        await sim.settle()
        assert shown(client) == [("resume at 0", 0)]
        assert room.calls == []


async def test_one_of_an_included_file() -> None:
    """It is the including endpoint's."""
    part, room = Pachinko(), Room()

    @part.snapshot("room:")
    async def state(conn: Connection, group: str) -> State:
        return State([group])

    room.ws.include(part, prefix="part")
    async with running(room) as sim:
        client = await sim.connect("/ws")
        await sim.settle()
        assert shown(client) == [("state at 0", ["room:a"])]


async def test_two_files_with_one_prefix_are_refused() -> None:
    """By an error that names both."""
    part, room = Pachinko(), Room().takes()

    @part.snapshot("room:")
    async def second(conn: Connection, group: str) -> None: ...

    with pytest.raises(PachinkoError, match=r"(?s)state\(\).*second\(\)"):
        room.ws.include(part)


async def test_none_sends_nothing() -> None:
    """The member goes on from where it was."""
    room = Room(held=asyncio.Event())

    @room.ws.snapshot("room:")
    async def state(conn: Connection, group: str) -> None:
        assert room.held is not None
        await room.held.wait()

    async with running(room) as sim:
        one, two = await sim.connect("/ws", query=FIRST), await sim.connect("/ws")
        await sim.settle()
        await room.say(1)
        assert room.held is not None
        room.held.set()
        await sim.settle()
        assert shown(one) == [("resume", 0), ("said at 1", 1)]
        assert shown(two) == [("said at 1", 1)]


# When


@pytest.mark.parametrize("query", [{}, FIRST])
async def test_none_takes_the_place_of_nothing(query: dict[str, str]) -> None:
    """What was sent while it waited for its turn comes, since no state has it."""
    room, joined, enters = Room(), asyncio.Event(), asyncio.Event()

    @room.ws.connect
    async def enter(conn: Connection) -> None:
        joined.set()
        await enters.wait()

    @room.ws.snapshot("room:")
    async def nothing(conn: Connection, group: str) -> None:
        await asyncio.sleep(0)  # It suspends once, as a snapshot that loads something would.

    async with running(room) as sim:
        coming = asyncio.create_task(sim.connect("/ws", query=query))
        await joined.wait()
        await room.say(1, 2)
        enters.set()
        client = await coming
        await sim.settle()
        await room.say(3)
        verdict = [("resume", 0)] if query else []
        assert shown(client) == [*verdict, ("said at 1", 1), ("said at 2", 2), ("said at 3", 3)]


@pytest.mark.parametrize("query", [{}, FIRST])
async def test_a_gap_is_told_that_none_stands_for(query: dict[str, str]) -> None:
    """To who does not resume, too: no state says it."""
    room = Room()

    @room.ws.snapshot("room:")
    async def nothing(conn: Connection, group: str) -> None:
        pass

    async with running(room) as sim:
        client = await sim.connect("/ws", query=query)
        await room.say(1)
        await sim.settle()
        assert room.hub.state.history is not None
        room.hub.state.history.lose("room:a", "broker")
        await sim.settle()
        assert shown(client)[-1] == ("gap" if query else "gap at 1", "broker")
        await room.say(2)
        assert shown(client)[-1] == ("said at 2", 2)


async def test_it_runs_after_the_accept() -> None:
    """However long before that the client has joined."""
    room, let_in = Room().takes(), asyncio.Event()

    @room.ws.connect
    async def wait(conn: Connection) -> None:
        await let_in.wait()

    async with running(room) as sim:
        coming = asyncio.create_task(sim.connect("/ws"))
        await sim.settle()
        assert room.calls == [] and not coming.done()
        await room.say(1)
        let_in.set()
        client = await coming
        await sim.settle()
        assert shown(client) == [("state at 1", [1])]


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("lets_in", [False, True])
async def test_connect_handlers_come_first(is_late: bool, lets_in: bool) -> None:
    """Also where the accept came before, for a first message. Who is refused needs no state."""
    room, decided = Room().takes(), asyncio.Event()
    if is_late:

        @room.ws.authenticate
        async def who(conn: Connection, token: str | None) -> str | None:
            return token

    @room.ws.connect
    async def decide(conn: Connection) -> None:
        await decided.wait()
        if not lets_in:
            raise Close(4000)

    async with running(room) as sim:
        coming = asyncio.create_task(sim.connect("/ws"))
        if is_late:
            client = await coming
            await client.send("authenticate", {"token": "ada"})
        await sim.settle()
        assert room.hub.members("room:a") == frozenset() and room.calls == []
        decided.set()
        with contextlib.suppress(Refused):
            await coming
        await sim.settle()
        assert len(room.calls) == lets_in


async def test_sixteen_at_a_time() -> None:
    """The others wait for their turn, and take what has come till then into account."""
    room = Room(held=asyncio.Event()).takes()
    async with running(room) as sim:
        clients = [await sim.connect("/ws") for _ in range(20)]
        await sim.settle()
        assert len(room.calls) == room.most == 16
        await room.say(1)
        assert room.held is not None
        room.held.set()
        await sim.settle()
        assert len(room.calls) == 20 and room.most == 16
        found = [shown(client) for client in clients]
        assert found.count([("state at 0", []), ("said at 1", 1)]) == 16
        assert found.count([("state at 1", [1])]) == 4


@pytest.mark.parametrize(("timeout", "seconds"), [(None, 10), (3.0, 3)])
async def test_it_has_its_time(timeout: float | None, seconds: int) -> None:
    """That of the endpoint's handlers, or ten seconds; what came meanwhile follows the gap."""
    hub = Hub()
    ws = Pachinko(new_app(), "/ws", hub=hub, handler_timeout=timeout)
    room = Room(hub, ws, held=asyncio.Event()).takes()
    async with running(room) as sim:
        client = await sim.connect("/ws", query=FIRST)
        await sim.settle()
        await room.say(1)
        await sim.advance(seconds - 0.5)
        assert shown(client) == [("resume", 0)]
        await sim.advance(1)
        assert shown(client) == [
            ("resume", 0), ("error", "handler_timeout"), ("gap at 0", "snapshot"), ("said at 1", 1),
        ]  # fmt: skip
        await room.say(2)
        await sim.settle()
        assert shown(client)[-1] == ("said at 2", 2)


async def test_it_may_ask_its_client() -> None:
    """As a task of the connection, it stops nothing else."""
    room = Room()

    @room.ws.snapshot("room:")
    async def state(conn: Connection, group: str) -> State:
        return State([await conn.ask("how_many", returns=int)])

    async with running(room) as sim:
        client = await sim.connect("/ws")
        await client.receive("how_many")
        await client.send("how_many.reply", 3, id="$1")
        await sim.settle()
        assert shown(client) == [("state at 0", [3])]


@pytest.mark.parametrize("is_in", [False, True])
async def test_a_simulation_waits_for_what_it_waits_for(is_in: bool) -> None:
    """`settle` returns when the state has come."""
    slow = functools.partial(asyncio.sleep, 0.02)  # long enough for `settle` to have to wait
    room = Room(groups=() if is_in else ("room:a",), does=slow).takes()
    async with running(room) as sim:
        client = await sim.connect("/ws")
        if is_in:
            await client.send("join", "room:a")
        await sim.settle()
        assert shown(client) == [("state at 0", [])]


WHO: contextvars.ContextVar[str] = contextvars.ContextVar("WHO", default="nobody")


async def test_it_runs_in_the_context_of_its_client() -> None:
    """Also where another client has caused the join."""
    room = Room(groups=())

    @room.ws.connect
    async def enter(conn: Connection) -> None:
        WHO.set(conn.user or "")
        if conn.user == "ada":
            await conn.join("room:a")

    @room.ws.on("invite")
    async def invite(conn: Connection, id: str) -> None:
        await room.hub.join("room:a", id)

    @room.ws.snapshot("room:")
    async def state(conn: Connection, group: str) -> State:
        texts = [WHO.get()]
        WHO.set("somebody")
        return State(texts)

    async with running(room) as sim:
        ada = await sim.connect("/ws", query={"user": "ada"})
        bob = await sim.connect("/ws", query={"user": "bob"})
        await ada.receive("state")
        await ada.send("invite", bob.conn.id)
        await sim.settle()
        assert room.hub.state.history is not None
        room.hub.state.history.lose("room:a", "broker")
        await sim.settle()
        assert shown(ada) == [("state at 0", ["ada"])]
        assert shown(bob) == [("state at 0", ["bob"])] * 2
        ada.cut()
        bob.cut()
        await sim.settle()
        assert not room.hub.state.history._contexts


@pytest.mark.parametrize("takes", [True, False])
async def test_only_clients_that_may_get_one_cost_something(takes: bool) -> None:
    """Of an endpoint without snapshots no context is kept."""
    room = Room().takes() if takes else Room()
    async with running(room) as sim:
        await sim.connect("/ws")
        assert room.hub.state.history is not None
        assert len(room.hub.state.history._contexts) == takes


async def test_one_for_who_was_in_before_it_was_registered() -> None:
    """As for anybody else, but in a context of its own: that of its client was not kept."""
    room = Room(groups=())

    @room.ws.connect
    async def enter(conn: Connection) -> None:
        WHO.set("ada")

    async with running(room) as sim:
        client = await sim.connect("/ws")

        @room.ws.snapshot("room:")
        async def state(conn: Connection, group: str) -> State:
            return State([WHO.get()])

        await room.hub.join("room:a", client.conn)
        await sim.settle()
        assert shown(client) == [("state at 0", ["nobody"])]


# What fails


def raising(exc: BaseException) -> Callable[[], Any]:
    async def fail() -> None:
        raise exc

    return fail


REFUSALS: list[tuple[BaseException, str]] = [
    (MessageError("closed", "the room is closed", until=5), "closed"),
    (falcon.HTTPNotFound(), "http_404"),
    (AnswerError("busy"), "no_answer"),
    (pachinko.NoAnswer(), "no_answer"),
    (ExceptionGroup("", [MessageError("closed")]), "closed"),
]
BUGS: list[BaseException] = [
    KeyError("x"), TimeoutError(), SystemExit(1), asyncio.CancelledError(), RecursionError(),
    falcon.HTTPFound("/"), ExceptionGroup("", [MessageError("x"), KeyError("x")]),
]  # fmt: skip


@pytest.mark.parametrize("query", [{}, FIRST])
@pytest.mark.parametrize(("exc", "code"), REFUSALS, ids=lambda each: type(each).__name__)
async def test_a_refusal_is_told_and_is_a_gap(
    query: dict[str, str], exc: BaseException, code: str
) -> None:
    """The client goes on from the gap's position, behind which nothing is missing."""
    room = Room(does=raising(exc)).takes()
    async with running(room) as sim:
        await room.say(1)
        client = await sim.connect("/ws", query=query)
        await room.say(2)
        await sim.settle()
        assert shown(client)[len(query) :] == [
            ("error", code), ("gap at 1", "snapshot"), ("said at 2", 2),
        ]  # fmt: skip
        error, gap = client.received[len(query) : len(query) + 2]
        if code == "closed" and not isinstance(exc, ExceptionGroup):
            assert error.payload == {"code": code, "message": "the room is closed", "until": 5}
        assert error.id is None
        assert gap.payload == {"group": "room:a", "reason": "snapshot", "id": client.conn.id}
        assert sim.hub.stats()["errors"] == 1 and sim.hub.state.counts[f"errors.{code}"] == 1


@pytest.mark.parametrize("exc", BUGS, ids=lambda each: type(each).__name__)
async def test_a_bug_is_logged_and_is_a_gap(
    exc: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """It fails the test of whoever does not expect it, and nothing of it is sent."""
    room = Room(does=raising(exc)).takes()
    async with running(room) as sim:
        with sim.bugs(BaseException) as bugs:
            client = await sim.connect("/ws", query=FIRST)
            await sim.settle()
        assert bugs == [exc]
        assert shown(client) == [
            ("resume", 0),
            ("error", "internal_error"),
            ("gap at 0", "snapshot"),
        ]
        (record,) = caplog.records
        assert "state() at " in record.message and record.connection_id == client.conn.id  # type: ignore[attr-defined]  # given as *extra*
        await room.say(1)
        await sim.settle()
        assert shown(client)[-1] == ("said at 1", 1)


@pytest.mark.parametrize("state", [{"a": 1}, "state", State, b"x", 0, object()])
async def test_what_has_no_type_is_a_bug(state: Any) -> None:
    """An object of a `@message` class has one, or None is returned."""
    room = Room()

    @room.ws.snapshot("room:")
    async def take(conn: Connection, group: str) -> Any:
        return state

    async with running(room) as sim:
        with sim.bugs(TypeError) as bugs:
            client = await sim.connect("/ws")
            await sim.settle()
        assert "take() at " in str(bugs[0]) and "@message object or None" in str(bugs[0])
        assert shown(client) == [("error", "internal_error"), ("gap at 0", "snapshot")]


async def test_what_cannot_be_sent_is_a_bug() -> None:
    """As in a reply."""
    room = Room(texts=[object()]).takes()
    async with running(room) as sim:
        with sim.bugs(TypeError):
            client = await sim.connect("/ws")
            await sim.settle()
        assert shown(client) == [("error", "internal_error"), ("gap at 0", "snapshot")]


async def test_close_closes() -> None:
    """As in a handler; the client gets no state, and no error."""
    room = Room(does=raising(Close(4003, "no state"))).takes()
    async with running(room) as sim:
        assert await end_in(sim) == (4003, "no state")
        assert "error" not in sim.transcript() and sim.hub.stats()["errors"] == 0


@pytest.mark.parametrize("overtaken", [1, 2, 3, 4])
async def test_one_that_is_overtaken_is_taken_again(overtaken: int) -> None:
    """Up to twice; then the client is told that there is none, and goes on from now."""
    room = Room().takes()
    left = overtaken

    async def flood() -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            await room.say(*range(3))

    room.does = flood
    async with running(room, messages=2) as sim:
        client = await sim.connect("/ws", query=FIRST)
        await sim.settle()
        if overtaken < 3:
            at = overtaken * 3
            assert shown(client) == [("resume", 0), (f"state at {at}", [0, 1, 2] * overtaken)]
        else:
            assert shown(client) == [("resume", 0), ("gap at 9", "snapshot")]
        assert len(room.calls) == min(overtaken + 1, 3)
        await room.say("live")
        await sim.settle()
        assert shown(client)[-1][1] == "live"


async def test_messages_that_still_fit_overtake_none() -> None:
    """They come behind the state."""
    room = Room().takes()
    room.does = functools.partial(room.say, 1, 2)
    async with running(room, messages=2) as sim:
        client = await sim.connect("/ws")
        await sim.settle()
        assert shown(client) == [("state at 0", []), ("said at 1", 1), ("said at 2", 2)]


async def test_a_failure_of_one_that_was_overtaken() -> None:
    """The gap's position is the present one, since those before cannot be had."""
    room = Room().takes()

    async def flood() -> None:
        await room.say(1, 2, 3)
        raise MessageError("closed")

    room.does = flood
    async with running(room, messages=2) as sim:
        client = await sim.connect("/ws", query=FIRST)
        await sim.settle()
        assert shown(client) == [("resume", 0), ("error", "closed"), ("gap at 3", "snapshot")]
        assert len(room.calls) == 1


# Who leaves meanwhile


@pytest.mark.parametrize("does", [None, raising(MessageError("closed"))])
async def test_who_has_left_the_group_gets_no_state(does: Any) -> None:
    """Neither a gap nor an error; the connection goes on."""
    room = Room(held=asyncio.Event(), does=does or (lambda: None)).takes()
    async with running(room) as sim:
        client = await sim.connect("/ws", query=FIRST)
        await sim.settle()
        await client.request("leave", "room:a")
        assert room.held is not None
        room.held.set()
        await sim.settle()
        assert shown(client) == [("resume", 0)]
        await room.say(1)
        await client.send("join", "room:a")
        room.does = lambda: None
        await sim.settle()
        assert shown(client)[1:] == [("resume", 0), ("state at 1", [1])]


async def test_who_has_left_before_its_turn_costs_no_call() -> None:
    """Nor does who has left, and was overtaken; and nothing is kept of those who have left."""
    room = Room(held=asyncio.Event()).takes()
    async with running(room) as sim:
        for _ in range(16):
            await sim.connect("/ws")
        client = await sim.connect("/ws", query={"user": "late"})
        for _ in range(3):
            await client.request("leave", "room:a")
            await client.request("join", "room:a")
        assert room.held is not None and room.hub.state.history is not None
        assert len(room.hub.state.history._loads) == 1
        room.held.set()
        await sim.settle()
        assert room.calls.count("late") == 1
        assert shown(client) == [("state at 0", [])]


async def test_close_group_ends_it() -> None:
    """Nothing comes behind the close."""
    room = Room(held=asyncio.Event()).takes()
    async with running(room) as sim:
        client = await sim.connect("/ws", query=FIRST)
        await sim.settle()
        await room.hub.close_group("room:a", 4000)
        assert room.held is not None
        room.held.set()
        assert (await client.closed())[0] == 4000
        assert shown(client) == [("resume", 0)]


@pytest.mark.parametrize("end", ["cut", "close", "server"])
async def test_the_end_of_the_connection_cancels_it(end: str) -> None:
    """Before its disconnect handlers, and without a word in the log."""
    room, events = Room(held=asyncio.Event()).takes(), list[str]()

    @room.ws.disconnect
    async def gone(conn: Connection) -> None:
        events.append(f"{room.running} run")

    async with running(room) as sim:
        client = await sim.connect("/ws")
        await sim.settle()
        assert room.running == 1
        if end == "cut":
            client.cut()
        elif end == "close":
            await client.close()
        else:
            await room.hub.close(client.conn.id)
        await sim.settle()
        assert events == ["0 run"]
        assert not room.hub.state.background
        other = await sim.connect("/ws")  # The turn was given back.
        assert room.held is not None
        room.held.set()
        await sim.settle()
        assert shown(other) == [("state at 0", [])]


async def test_a_departure_in_it_is_no_bug() -> None:
    """It may learn of the end by a send."""
    room = Room()

    @room.ws.snapshot("room:")
    async def state(conn: Connection, group: str) -> None:
        await conn.hub.close(conn, 4000)
        await conn.send("late")

    async with running(room) as sim:
        assert (await end_in(sim))[0] == 4000


async def test_a_bug_of_one_whose_client_has_gone_is_logged() -> None:
    """It is a bug."""
    room = Room()

    @room.ws.snapshot("room:")
    async def state(conn: Connection, group: str) -> None:
        await conn.hub.close(conn, 4000)
        raise KeyError("x")

    async with running(room) as sim:
        with sim.bugs(KeyError):
            assert (await end_in(sim))[0] == 4000


@pytest.mark.parametrize("make", [MessageError, KeyError, Close, falcon.HTTPNotFound])
async def test_a_failure_keeps_nothing(
    make: Callable[[], BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """The connection is free without a collection, once it is over."""
    room, conns, failed = Room(), weakref.WeakSet[Connection](), list[str]()

    @room.ws.snapshot("room:")
    async def state(conn: Connection, group: str) -> None:
        conns.add(conn)
        failed.append(group)
        raise make()

    room.hub.keep("room:")
    caplog.set_level(logging.CRITICAL, "pachinko")  # A record of the log would hold it.
    gc.collect()
    gc.disable()
    try:
        async with serving(room.ws._app) as server:
            async with connect(f"{server.url}/ws"):
                await until(lambda: failed)
            await until(lambda: not (room.hub.count or conns))
    finally:
        gc.enable()


# Mistakes


@pytest.mark.parametrize("prefix", ["room", "hall:", "roomy:"])
async def test_a_prefix_that_nothing_keeps_is_refused_at_the_start(prefix: str) -> None:
    """By the line that is missing."""
    room = Room().takes(prefix)
    if prefix == "room":  # The groups with this prefix that are kept have it.
        async with running(room):
            return
    with pytest.raises(PachinkoError) as caught:
        async with running(room):
            pass
    text = str(caught.value.__cause__ or caught.value)
    assert "state() at " in text and f"hub.keep({prefix!r})" in text


async def test_without_a_rule_it_is_refused_at_the_start() -> None:
    """Nothing has started then."""
    room = Room().takes()
    with pytest.raises(PachinkoError, match=r"hub\.keep\('room:'\)"):
        async with simulate(room.ws._app):
            pass
    assert room.hub.state.loop is None


async def test_one_more_while_the_app_runs() -> None:
    """It is for the joins from then on; groups that are not kept are refused at once."""
    room = Room()
    async with running(room) as sim:
        with pytest.raises(PachinkoError, match=r"hub\.keep\('hall:'\)"):
            room.takes("hall:")
        room.takes()
        client = await sim.connect("/ws")
        await sim.settle()
        assert shown(client) == [("state at 0", [])]


async def good(conn: Connection, group: str) -> State: ...
async def good_none(conn: Any, group: Any) -> State | None: ...
async def good_later(conn: Connection, group: str) -> Later: ...  # type: ignore[name-defined]  # noqa: F821 - it may be defined later
async def good_unknown(conn: Connection, group): ...  # type: ignore[no-untyped-def]  # no mistake
async def good_default(conn: Connection, group: str, *, limit: int = 5) -> None: ...


class Held:
    """Whose method takes snapshots."""

    async def state(self, conn: Connection, group: str) -> State: ...


@pytest.mark.parametrize(
    "function",
    [good, good_none, good_later, good_unknown, good_default, Held().state,
     functools.partial(good)],
)  # fmt: skip
def test_what_takes_snapshots(function: Any) -> None:
    """It is returned unchanged."""
    assert Pachinko().snapshot("room:")(function) is function


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the syntax of Python 3.12")
def test_a_type_statement_may_name_what_comes_later() -> None:
    """Nothing is refused that may be right."""
    code = "type Later = State | Undefined\nasync def state(conn, group) -> Later: ..."
    exec(code, names := {"State": State})
    Pachinko().snapshot("room:")(names["state"])


def plain(conn: Connection, group: str) -> State: ...
async def streams(conn: Connection, group: str) -> AsyncIterator[State]:
    yield State([])


async def one(conn: Connection) -> State: ...
async def three(conn: Connection, group: str, user: str) -> State: ...
async def named(conn: Connection, group: str, *, user: str) -> State: ...
async def number(conn: Connection, group: int) -> State: ...
async def swapped(group: str, conn: Connection) -> State: ...
async def plain_dict(conn: Connection, group: str) -> dict[str, Any]: ...
async def text(conn: Connection, group: str) -> str: ...
async def data(conn: Connection, group: str) -> State | bytes: ...
async def listed(conn: Connection, group: str) -> list[State]: ...


class Untagged:
    """Has no type."""


async def untagged(conn: Connection, group: str) -> Untagged | None: ...


MISTAKES: list[tuple[Any, str]] = [
    (plain, "is not async"),
    (streams, "has a `yield`"),
    (one, "takes the wrong parameters"),
    (three, "takes the wrong parameters"),
    (named, "takes the wrong parameters"),
    (number, "takes `group: int`, but gets str"),
    (swapped, "takes `conn: Connection`, but gets str"),
    (plain_dict, "returns dict[str, Any], but may return a @message object or None"),
    (text, "returns str, but may return a @message object or None"),
    (data, "returns State | bytes, but may return"),
    (listed, "returns list[State], but may return"),
    (untagged, "returns Untagged | None, but may return"),
    (Untagged, "the class Untagged"),
    (None, "expected a function, got None"),
]


@pytest.mark.parametrize(("function", "refused"), MISTAKES, ids=lambda each: str(each)[:30])
def test_mistakes_are_refused_with_the_corrected_code(function: Any, refused: str) -> None:
    """At registration, and nothing is registered."""
    ws = Pachinko()
    with pytest.raises(PachinkoError) as caught:
        ws.snapshot("room:")(function)
    assert refused in str(caught.value)
    assert "@ws.snapshot('room:')\nasync def " in str(caught.value)
    assert not ws._routes.snapshots


@pytest.mark.parametrize("prefix", [good, None, 5, b"room:", ["room:"], State])
def test_a_prefix_is_a_text(prefix: Any) -> None:
    """``@ws.snapshot`` without brackets gives a function."""
    with pytest.raises(PachinkoError, match=r'write @ws\.snapshot\("room:"\)'):
        Pachinko().snapshot(prefix)


def test_a_second_one_is_refused() -> None:
    """By an error that names both; another prefix is another one."""
    ws = Pachinko()
    ws.snapshot("room:")(good)
    ws.snapshot("room:vip:")(good)
    with pytest.raises(PachinkoError, match=r"good\(\).*good_none\(\).*longer prefix"):
        ws.snapshot("room:")(good_none)
    assert set(ws._routes.snapshots.values()) == {good}
