"""A resource: the methods of one object that belong together."""

from pachinko import Connection


class Rooms:
    """The rooms that clients are in."""

    async def on_connect(self, conn: Connection, room: str) -> None:
        """Let the client join the room of its path."""
        await conn.hub.join(f"room:{room}", conn)

    async def on_size(self, conn: Connection) -> int:
        """Return how many are in the room."""
        return len(conn.hub.members(f"room:{conn.params['room']}"))
