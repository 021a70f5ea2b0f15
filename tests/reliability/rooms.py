"""Processes that keep two rooms, and clients that follow both through the faults of a broker."""

from __future__ import annotations

import asyncio
import contextlib
import json

import attrs
import falcon
from following import Follower, Published, query_of
from support import Client, connect, new_app, serving, until

from pachinko import Connection, Hub, Pachinko

ROOM = "room:a"
QUIET = "room:quiet"
WINDOW = 100  # messages that are kept of a room


class Process:
    """An app that keeps its rooms, and the address of its server."""

    def __init__(self, broker: str) -> None:
        self.hub, self.app, self.url = Hub(), new_app(), ""
        self.hub.configure(broker)
        self.hub.keep("room:", messages=WINDOW)
        ws = Pachinko(self.app, "/ws", hub=self.hub)

        @ws.connect
        async def arrive(conn: Connection) -> None:
            await conn.join(ROOM)
            await conn.join(QUIET)

    async def connected(self, outages: int = 1) -> None:
        """Wait until the process is connected, after so many outages."""
        stats = self.hub.stats
        await until(lambda: stats()["outages"] >= outages and not stats()["broker_down"])


@attrs.define(eq=False)
class Seat:
    """A follower that is connected to a process."""

    follower: Follower
    client: Client
    task: asyncio.Task[None] | None = None

    async def read(self) -> None:
        while True:
            self.follower.take(json.loads(await self.client.socket.recv()))


class Rooms:
    """What was published in the rooms, and who follows it."""

    def __init__(self) -> None:
        self.published = Published()
        self.stack = contextlib.AsyncExitStack()

    async def serve(self, process: Process) -> None:
        server = await self.stack.enter_async_context(serving(process.app))
        process.url = f"{server.url}/ws"

    async def follow(self, process: Process, follower: Follower) -> Seat:
        """Connect *follower*, with what it knows, and wait for its verdicts."""
        follower.joins(ROOM, QUIET)
        query = falcon.to_query_str({"resume": query_of(follower.resume)})
        client = await self.stack.enter_async_context(connect(process.url + query))
        seat = Seat(follower, client)
        seat.task = asyncio.create_task(seat.read())
        self.stack.push_async_callback(self.leave, seat)
        await until(lambda: follower.verdicts >= {ROOM, QUIET})
        return seat

    async def leave(self, seat: Seat) -> None:
        if seat.task is not None:
            seat.task.cancel()
            await asyncio.wait([seat.task])
            await seat.client.socket.close()


def reasons_of(follower: Follower, group: str = ROOM) -> list[str]:
    """Return the reasons of the gaps that *follower* has heard of."""
    return [each.reason for each in follower.heard[group] if each.kind == "gap"]
