"""What only the administrator does."""

from pachinko import Connection, MessageError, Pachinko

from .database import Database, database_of

ws = Pachinko()
ws.provide(database_of)


def is_admin(conn: Connection) -> bool:
    """Tell who may send the messages of this file."""
    return conn.user == "admin"


@ws.error(LookupError)
async def not_found(conn: Connection, exc: LookupError) -> MessageError:
    """Answer for the handlers of this file, and for no others."""
    return MessageError("not_found", str(exc))


@ws.on("clear", only=is_admin)
async def clear(conn: Connection, *, name: str, db: Database) -> int:
    """Delete the lines of the room *name*; return how many there were."""
    rows = await db.execute("SELECT text FROM todos WHERE room = ?", name)
    if not rows:
        raise LookupError(f"nothing to do in {name}")
    await db.execute("DELETE FROM todos WHERE room = ?", name)
    return len(rows)
