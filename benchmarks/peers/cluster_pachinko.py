"""Pachinko with a backplane, or without one: the hub is the same, the URL decides.

Beside the group there is a way to join many groups, in a connection of its own.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import attrs

from benchmarks.peers import pachinko_
from benchmarks.peers.pachinko_ import LABEL, PACKAGES, WIRE, Heard
from pachinko import Connection, Pachinko, hub, message

__all__ = ["LABEL", "PACKAGES", "WIRE", "create_app", "stats"]

stats = pachinko_.stats


@message("stamp")
class Stamp:
    """To be sent to the group, with the time at which that begins."""

    size: int


@attrs.frozen
class Groups:
    """The groups of some numbers."""

    first: int
    count: int
    together: int = 1


@message("spent")
class Spent:
    """Seconds."""

    cpu: float
    wall: float


class Clock:
    def __init__(self) -> None:
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def spent(self) -> Spent:
        return Spent(time.process_time() - self.cpu, time.perf_counter() - self.wall)


async def stamp(conn: Connection, msg: Stamp) -> None:
    # The clock of the system, which all its processes share.
    await hub.send("all", Heard(f"{time.monotonic():020.6f}".ljust(msg.size)))


def members() -> list[Connection]:
    return sorted(hub.connections, key=lambda conn: conn.id)


async def enter(conn: Connection, msg: Groups) -> Spent:
    """Let the connections take turns in joining new groups, some of them at the same time."""
    there, clock = members(), Clock()
    for first in range(msg.first, msg.first + msg.count, msg.together):
        numbers = range(first, first + msg.together)
        joins = [hub.join(f"room:{n}", there[n % len(there)]) for n in numbers]
        if msg.together == 1:
            await joins[0]
        else:
            await asyncio.gather(*joins)
    return clock.spent()


async def leave(conn: Connection, msg: Groups) -> Spent:
    there, clock = members(), Clock()
    for n in range(msg.first, msg.first + msg.count):
        await hub.leave(f"room:{n}", there[n % len(there)])
    # The broker hears of it in the background. What comes behind is done when that is.
    await hub.join("the end", conn)
    spent = clock.spent()
    await hub.leave("the end", conn)
    return spent


def create_app(url: str) -> Any:
    hub.configure(url)
    app = pachinko_.create_app()
    many = Pachinko(app, "/many", max_groups=1_000_000)
    many.on("enter")(enter)
    many.on("leave")(leave)
    timed = Pachinko(app, "/timed")
    timed.connect(pachinko_.join)
    timed.on(Stamp)(stamp)
    return app
