"""The database: sqlite3 in a thread, opened and closed with the app, whose middleware it is."""

import asyncio
import sqlite3
from typing import Any

from falcon.asgi import Request, WebSocket

from pachinko import Connection


class Database:
    """A connection to sqlite3, which is used by one call at a time."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = asyncio.Lock()

    async def process_startup(self, scope: Any, event: Any) -> None:
        """Open it before the first client comes."""
        self._connection = sqlite3.connect(self.path, check_same_thread=False)
        await self.execute("CREATE TABLE IF NOT EXISTS todos (room TEXT, text TEXT)")

    async def process_shutdown(self, scope: Any, event: Any) -> None:
        """Close it when all connections are over."""
        self._connection.close()

    async def process_request_ws(self, req: Request, ws: WebSocket) -> None:
        """Put it where the provider finds it."""
        req.context.database = self

    async def execute(self, sql: str, *values: str) -> list[Any]:
        """Return the rows of one statement, which is committed."""
        async with self._lock:
            return await asyncio.to_thread(self._execute, sql, values)

    def _execute(self, sql: str, values: tuple[str, ...]) -> list[Any]:
        with self._connection:
            return self._connection.execute(sql, values).fetchall()


async def database_of(conn: Connection) -> Database:
    """Provide the database of the app: each file registers this one function."""
    database: Database = conn.context.database
    return database
