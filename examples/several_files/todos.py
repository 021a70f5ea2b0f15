"""What every user does with the to-do list of a room."""

from pachinko import Connection, Pachinko, message

from .database import Database, database_of

ws = Pachinko()
ws.provide(database_of)


@message("added")
class Added:
    """Sent to the room: it keeps this type, whatever the prefix."""

    text: str
    who: str


@ws.on("add")
async def add(conn: Connection, *, text: str, db: Database) -> None:
    """Add a line, and tell the room."""
    room = conn.params["room"]
    await db.execute("INSERT INTO todos VALUES (?, ?)", room, text)
    await conn.hub.send(f"room:{room}", Added(text, conn.user or ""))


@ws.on("list")
async def list_all(conn: Connection, *, db: Database) -> list[str]:
    """Return all lines of the room."""
    rows = await db.execute("SELECT text FROM todos WHERE room = ?", conn.params["room"])
    return [text for (text,) in rows]
