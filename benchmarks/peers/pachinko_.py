"""Pachinko, as its README shows it."""

from __future__ import annotations

from typing import Any

import attrs
import falcon.asgi

from benchmarks.workload import TYPES, WIRE
from pachinko import Connection, Pachinko, hub, message

__all__ = ["LABEL", "PACKAGES", "WIRE", "create_app"]

LABEL = "Pachinko"
PACKAGES = ("falcon-pachinko", "falcon", "attrs", "cattrs", "msgspec")


@message("shout")
class Shout:
    count: int
    text: str


@message("heard")
class Heard:
    text: str


@message("y")
class Y:
    a: int
    b: str


@attrs.frozen
class Work:
    a: int
    b: str
    c: float


async def work(conn: Connection, msg: Work) -> Y:
    return Y(msg.a, msg.b)


async def join(conn: Connection) -> None:
    await hub.join("all", conn)


async def shout(conn: Connection, msg: Shout) -> Y:
    for _ in range(msg.count):
        await hub.send("all", Heard(msg.text))
    return Y(msg.count, "done")


def create_app(types: int = len(TYPES)) -> Any:
    app = falcon.asgi.App()
    ws = Pachinko(app, "/ws")
    for number in range(types):
        ws.on(f"t{number}")(work)
    group = Pachinko(app, "/group")
    group.connect(join)
    group.on(Shout)(shout)
    return app


def stats() -> dict[str, int]:
    return hub.stats()
