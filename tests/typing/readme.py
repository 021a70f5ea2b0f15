import falcon.asgi

from pachinko import Connection, Pachinko, hub, message

app = falcon.asgi.App()
ws = Pachinko(app, "/ws/{room}")


@message("say")
class Say:  # becomes a frozen attrs class, and the payload of the message type "say"
    text: str


@message("said")
class Said:
    who: str
    text: str


@ws.connect
async def arrive(conn: Connection, room: str) -> None:
    await hub.join(f"room:{room}", conn)


@ws.on(Say)
async def say(conn: Connection, msg: Say) -> None:
    await hub.send(f"room:{conn.params['room']}", Said(conn.id, msg.text))


@ws.on("sum")
async def add(conn: Connection, *, a: int, b: int = 0) -> int:
    return a + b  # goes to the sender, with the id of the request


@ws.disconnect
async def leave(conn: Connection) -> None:
    await hub.send(f"room:{conn.params['room']}", "left", {"who": conn.id}, exclude=conn)
