"""A chat: rooms by path, nicknames, who is here, who is typing, a sum, and the server's clock.

    python3 -m pip install ".[server]"      # in the checkout, once
    python3 examples/chat.py                # at http://127.0.0.1:8000/
    PORT=8001 python3 examples/chat.py      # at another port; HOST=0.0.0.0 lets in other machines
    uvicorn --app-dir examples chat:app     # the same app, with uvicorn's own options

A client sends ``enter`` first, and gets ``welcome`` with its own id and everybody who is here. One
that comes back gets what was said meanwhile.
"""

import asyncio
import contextlib
import os
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path

import attrs
import falcon
import falcon.asgi
import uvicorn
from attrs.validators import max_len, min_len

from pachinko import Close, Connection, MessageError, Pachinko, hub, message

hub.keep("talk:")  # what is said, but not who comes, goes and types
app = falcon.asgi.App()
ws = Pachinko(app, "/ws/{room}", max_size=32_768, rate=(20, 5.0))
ws.client("/pachinko.js")


@attrs.frozen
class Person:
    id: str
    nick: str


@message("enter")
class Enter:
    nick: str = attrs.field(converter=str.strip, validator=[min_len(1), max_len(24)])


@message("welcome")
class Welcome:
    you: Person
    here: list[Person]


@message("say")
class Say:
    text: str = attrs.field(converter=str.strip, validator=[min_len(1), max_len(2000)])


@message("said")
class Said:
    who: Person
    text: str
    at: datetime


def person(conn: Connection) -> Person:
    if "nick" not in conn.context:
        raise MessageError("enter_first", "enter with a nickname before anything else")
    return Person(conn.id, conn.context.nick)


def group_of(conn: Connection, what: str = "room") -> str:
    return f"{what}:{conn.params['room']}"


@ws.connect
async def check_room(conn: Connection, room: str) -> None:
    if len(room) > 32:  # A browser can read a close code, but not the status of a refusal.
        raise Close(4400, "a room's name has at most 32 characters")


@ws.on(Enter)
async def enter(conn: Connection, msg: Enter) -> Welcome:
    conn.context.nick = msg.nick
    await conn.join(group_of(conn))
    await conn.join(group_of(conn, "talk"))
    # Somebody who enters again has a new nickname. The same message tells everybody.
    await hub.send(group_of(conn), "joined", person(conn), exclude=conn)
    return Welcome(person(conn), [person(member) for member in hub.members(group_of(conn))])


@ws.on(Say)
async def say(conn: Connection, msg: Say) -> Said:
    said = Said(person(conn), msg.text, datetime.now(UTC))
    await hub.send(group_of(conn, "talk"), said, exclude=conn)
    return said  # The reply's id tells the sender which of its messages has arrived.


@ws.on("typing")
async def typing(conn: Connection) -> None:
    await hub.send(group_of(conn), "typing", person(conn), exclude=conn)


@ws.on("sum")
async def add(conn: Connection, *, a: int, b: int) -> int:
    return a + b


@ws.disconnect
async def leave(conn: Connection) -> None:
    if (room := group_of(conn)) in conn.groups:
        await conn.leave(room)  # Leave before the notice: lists made after it show no ghost.
        await hub.send(room, "left", person(conn))


@ws.worker
async def clock() -> None:
    while True:
        for group in (each for each in hub.groups if each.startswith("room:")):
            await hub.send(group, "tick", {"at": datetime.now(UTC)})
        await asyncio.sleep(1)


class Page:
    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        resp.content_type = falcon.MEDIA_HTML
        resp.text = Path(__file__).with_name("chat.html").read_text("utf-8")


app.add_route("/", Page())

if __name__ == "__main__":
    host, port = os.environ.get("HOST", "127.0.0.1"), int(os.environ.get("PORT", "8000"))
    with contextlib.suppress(OSError), socket.create_connection((host, port), 1):
        sys.exit(f"port {port} is already in use; write PORT={port + 1} in front of the command")
    uvicorn.run(app, host=host, port=port)
