"""Who is where."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import pachinko
from pachinko import Connection, Hub, Kind, Outgoing, Pachinko, Relay


class Socket:
    """As much of Falcon's socket as the tables need: it can always be written to."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    async def send(self, event: dict[str, Any]) -> None:
        self.sent.append(event)

    async def close(self, code: int, reason: str | None) -> None:
        self.sent.append({"type": "websocket.close", "code": code})


class Noting(Relay):
    """Notes what the registry has told it."""

    def __init__(self) -> None:
        self.subscriptions: set[tuple[Kind, str]] = set()

    def subscribe(self, kind: Kind, name: str) -> None:
        assert (kind, name) not in self.subscriptions
        self.subscriptions.add((kind, name))

    def unsubscribe(self, kind: Kind, name: str) -> None:
        self.subscriptions.remove((kind, name))


class Tables(RuleBasedStateMachine):
    """Random interleavings of connect, join, leave, send, close keep hub and model the same.

    The relay is told of the first one in each group and of the last, also for users.
    """

    groups = st.sampled_from("abc")
    indexes = st.integers(0, 5)

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.conns: list[Connection] = []
        self.alive: set[Connection] = set()
        self.joined: dict[Connection, set[str]] = {}
        self.expected: dict[Connection, int] = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pachinko, "Relay", Noting)
            self.hub = Hub()
            self.runner.run(self.start())
        self.limits = Pachinko(hub=self.hub)._limits

    async def start(self) -> None:
        self.hub.state.start(self)

    def pick(self, index: int) -> Connection | None:
        return self.conns[index % len(self.conns)] if self.conns else None

    @rule(user=st.sampled_from(["ann", "bob", None]))
    def connect(self, user: str | None) -> None:
        request: Any = None
        socket: Any = Socket()
        state, id = self.hub.state, secrets.token_hex(12)
        counts, nobody = state.counts, pachinko._NOBODY
        outgoing = Outgoing(id, socket, socket.send, self.limits, counts, nobody)
        conn = Connection(self.hub, request, socket, {}, id, outgoing)
        state.registry.add(conn)
        conn.user = user
        outgoing.open()
        self.conns.append(conn)
        self.alive.add(conn)
        self.joined[conn], self.expected[conn] = set(), 0

    @rule(group=groups, index=indexes)
    def join(self, group: str, index: int) -> None:
        if (conn := self.pick(index)) is not None:
            self.runner.run(self.hub.join(group, conn))
            if conn in self.alive:
                self.joined[conn].add(group)

    @rule(group=groups, index=indexes)
    def leave(self, group: str, index: int) -> None:
        if (conn := self.pick(index)) is not None:
            self.runner.run(self.hub.leave(group, conn))
            self.joined[conn].discard(group)

    @rule(group=groups, index=st.none() | indexes)
    def send(self, group: str, index: int | None) -> None:
        exclude = None if index is None else self.pick(index)
        self.runner.run(self.settled(self.hub.send(group, "x", exclude=exclude)))
        for conn, groups in self.joined.items():
            self.expected[conn] += group in groups and not conn.closed and conn is not exclude

    @rule(group=groups)
    def close_group(self, group: str) -> None:
        self.runner.run(self.settled(self.hub.close_group(group)))
        for conn, groups in self.joined.items():
            assert conn.closed or group not in groups

    @rule(index=indexes)
    def remove(self, index: int) -> None:
        if (conn := self.pick(index)) is not None:
            conn.outgoing.lost()
            self.hub.state.registry.remove(conn)
            self.alive.discard(conn)
            self.joined[conn] = set()

    async def settled(self, call: Any) -> None:
        await call
        while any(conn.outgoing.writing for conn in self.conns):
            await asyncio.sleep(0)  # the turn of the next one

    @invariant()
    def tables_agree(self) -> None:
        assert self.hub.connections == self.alive
        for conn in self.conns:
            assert conn.groups == self.joined[conn]
            events = cast(Any, conn.ws).sent
            sent = [event for event in events if event["type"] == "websocket.send"]
            assert len(sent) == self.expected[conn]
        names = set().union(*self.joined.values()) if self.joined else set()
        assert self.hub.groups == names
        for name in names:
            assert self.hub.members(name) == {c for c, g in self.joined.items() if name in g}
        users = {conn.user for conn in self.alive if conn.user is not None}
        assert set(self.hub.state.registry.users) == users
        relay = cast(Noting, self.hub.state.relay)
        expected = {(Kind.GROUP, name) for name in names} | {(Kind.USER, user) for user in users}
        assert relay.subscriptions == expected

    def teardown(self) -> None:
        self.runner.close()


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
