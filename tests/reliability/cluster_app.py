"""The app of the tests in test_brokers.py; as a program, one more process of their cluster.

``PACHINKO_BACKPLANE=nats://localhost:4222 python cluster_app.py`` prints the port that it has
found; ``--format 2`` makes it write, and take, peer messages of another version of Pachinko.
"""

from __future__ import annotations

import argparse
import socket
from typing import Any

import falcon.asgi
import uvicorn

import pachinko_cluster
from pachinko import Connection, Hub, MessageError, Pachinko, PachinkoError


def cluster_app(hub: Hub) -> falcon.asgi.App[Any, Any]:
    """An app whose clients are in the groups of their query string, and may say numbers to them."""
    app = falcon.asgi.App()
    ws = Pachinko(app, "/ws", hub=hub)

    @ws.connect
    async def arrive(conn: Connection) -> None:
        conn.user = conn.req.get_param("user")
        for group in conn.req.get_param_as_list("group") or ():
            await conn.join(group)
        await conn.send("welcome", {"id": conn.id})

    @ws.on("join")
    async def join(conn: Connection, *, groups: list[str]) -> None:
        for group in groups:
            await conn.join(group)

    @ws.on("leave")
    async def leave(conn: Connection, *, groups: list[str]) -> None:
        for group in groups:
            await conn.leave(group)

    @ws.on("say")
    async def say(conn: Connection, *, group: str, sender: str, n: int) -> None:
        await hub.send(group, "number", {"sender": sender, "n": n})

    @ws.on("presence")
    async def presence(conn: Connection, *, group: str) -> list[str]:
        return [each.id for each in await hub.presence(group)]

    @ws.on("stats")
    async def stats(conn: Connection) -> dict[str, int]:
        return hub.stats()

    @ws.error(PachinkoError)
    async def broker_is_away(conn: Connection, exc: PachinkoError) -> MessageError:
        return MessageError("broker_is_away", str(exc))

    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--format", type=int, default=pachinko_cluster._FORMAT)
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio")
    given = parser.parse_args()
    pachinko_cluster._FORMAT = given.format
    listening = socket.create_server(("127.0.0.1", 0))
    app = cluster_app(Hub())

    class Announcer:
        """Says where the app is once its lifespan has begun, which waits for the broker."""

        async def process_startup(self, scope: Any, event: Any) -> None:
            print(listening.getsockname()[1], flush=True)  # noqa: T201 - for the test

    app.add_middleware(Announcer())
    config = uvicorn.Config(app, loop=given.loop, log_level="warning", ws_ping_interval=None)
    uvicorn.Server(config).run([listening])


if __name__ == "__main__":
    main()
