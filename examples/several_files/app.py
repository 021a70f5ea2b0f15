"""The app: it makes what is shared, and includes what the other files have registered."""

from typing import Any

import falcon.asgi

from pachinko import Connection, Hub, Pachinko

from . import admin, todos
from .database import Database
from .rooms import Rooms


async def authenticate(conn: Connection, token: str | None) -> str | None:
    """Take the token for the name of the user, as no real app does."""
    return token


def create_app(path: str = ":memory:") -> falcon.asgi.App[Any, Any]:
    """Make an app with a database of its own, in the file *path*."""
    app = falcon.asgi.App(middleware=[Database(path)])
    ws = Pachinko(app, "/ws/{room}", hub=Hub())
    ws.authenticate(authenticate)
    ws.add_resource("room", Rooms())
    ws.include(todos.ws, prefix="todo")
    ws.include(admin.ws, prefix="admin")
    return app
