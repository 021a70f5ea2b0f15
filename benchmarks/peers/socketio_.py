"""python-socketio's AsyncServer: an event a type, the reply as its acknowledgement, a room.

Socket.IO has its own protocol, in which the acknowledgement carries the id. It has no payload
types, so the payloads are checked by hand. Its pings, to which the client would have to reply, are
put off until the measurement is over.
"""

from __future__ import annotations

import json
from typing import Any

import socketio

from benchmarks.peers.plain import Shout, Work, Y
from benchmarks.workload import TYPES, Wire

LABEL = "python-socketio"
PACKAGES = ("python-socketio", "python-engineio")


class SocketIO(Wire):
    """Engine.IO packets over a WebSocket from the start: 4 is a message; in it, 2 and 3 are events
    and acknowledgements.
    """

    path = "/socket.io/?EIO=4&transport=websocket"
    group_path = "/socket.io/?EIO=4&transport=websocket&group=all"
    prelude = ((None, "0"), ("40", "40"))

    def request(self, number: int, id: int) -> str:
        return f'42{id}["{TYPES[number]}",{{"a":1,"b":"text","c":1.5}}]'

    def reply(self, number: int, id: int) -> str:
        return f'43{id}[{{"a":1,"b":"text"}}]'

    def check(self, text: str, number: int, id: int) -> bool:
        return text == self.reply(number, id)

    def shout(self, count: int, text: str) -> str:
        event = ["shout", {"count": count, "text": text}]
        return "421" + json.dumps(event, separators=(",", ":"))

    def is_group_message(self, text: str) -> bool:
        return text.startswith('42["heard",')


WIRE: Wire = SocketIO()


async def work(sid: str, data: Any) -> dict[str, Any]:
    try:
        payload = Work.parse(data)
    except ValueError as error:
        return {"error": str(error)}
    y = Y(payload.a, payload.b)
    return {"a": y.a, "b": y.b}


def create_app(client_manager: Any = None) -> Any:
    sio = socketio.AsyncServer(async_mode="asgi", ping_interval=3600, client_manager=client_manager)

    @sio.event
    async def connect(sid: str, environ: dict[str, Any]) -> None:
        if "group=all" in environ["QUERY_STRING"]:
            await sio.enter_room(sid, "all")

    @sio.event
    async def shout(sid: str, data: Any) -> dict[str, Any]:
        payload = Shout.parse(data)
        for _ in range(payload.count):
            await sio.emit("heard", {"text": payload.text}, room="all")
        return {"a": payload.count, "b": "done"}

    for type in TYPES:
        sio.on(type, work)
    return socketio.ASGIApp(sio)
