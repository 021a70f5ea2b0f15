"""The app of the tests in test_history_storm.py; as a program, a process that they can kill.

``PACHINKO_BACKPLANE=redis://localhost:6379 python history_app.py`` prints the port that it has
found; without the variable its groups are kept in memory.
"""

from __future__ import annotations

import socket
from typing import Any

import falcon.asgi
import uvicorn

from pachinko import Connection, Hub, MessageError, Pachinko, PachinkoError

WINDOW = 2_000  # messages: more than a test sends to a group
BYTES = 64 * 1024 * 1024


def history_app(hub: Hub, **options: Any) -> falcon.asgi.App[Any, Any]:
    """An app whose clients are in the groups of their query, and may say numbers to them."""
    hub.keep("room:", messages=WINDOW, seconds=3600.0, bytes=BYTES)
    app = falcon.asgi.App()
    # Slow clients are common here. Whoever is slow reads on from the ring.
    ws = Pachinko(
        app, "/ws", hub=hub, **{"overflow": "replay", "outbox": 16, "linger": 0.5, **options}
    )

    @ws.authenticate(optional=True)
    async def who(conn: Connection, token: str | None) -> str | None:
        return token

    @ws.connect
    async def arrive(conn: Connection) -> None:
        for group in conn.req.get_param_as_list("group") or ():
            await conn.join(group)

    @ws.on("say", concurrent=True)
    async def say(
        conn: Connection, *, group: str, sender: str, n: int, others: bool, size: int = 0
    ) -> str:
        """Send a message to a group, or to the others in it; answer once it is stored."""
        payload = {"sender": sender, "n": n, "text": "x" * size}
        await hub.send(group, "said", payload, exclude=conn if others else None)
        return conn.id

    @ws.on("id")
    async def id(conn: Connection) -> str:
        return conn.id

    @ws.error(PachinkoError)
    async def broker_is_away(conn: Connection, exc: PachinkoError) -> MessageError:
        return MessageError("broker_is_away", str(exc))

    return app


def main() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    app = history_app(Hub())

    class Announcer:
        """Says where the app is once its lifespan has begun, which waits for the broker."""

        async def process_startup(self, scope: Any, event: Any) -> None:
            print(listening.getsockname()[1], flush=True)  # noqa: T201 - for the test

    app.add_middleware(Announcer())
    config = uvicorn.Config(app, log_level="warning", ws_ping_interval=None)
    uvicorn.Server(config).run([listening])


if __name__ == "__main__":
    main()
