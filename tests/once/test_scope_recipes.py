"""The recipes of docs/scope.md for packages that bring others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support import connect, new_app, serving
from test_docs_scope import clean_hub, code_of, talking

from pachinko import Connection, Envelope, Hub, Pachinko

__all__ = ["clean_hub"]  # a fixture for each test, here too


async def test_sqlalchemy(caplog: pytest.LogCaptureFixture) -> None:
    """A session is committed before the reply, and rolled back after an error."""
    pytest.importorskip("aiosqlite", reason="tox's environment once has it")
    page: Any = code_of("SQLAlchemy")
    async with talking(page) as client:
        assert (await client.ask("add", {"note": "a"}))["payload"] == 1
        assert (await client.ask("add", {"note": "fail"}))["payload"]["code"] == "internal_error"
        assert (await client.ask("add", {"note": "b"}))["payload"] == 2
        assert "rolled back" in caplog.text
    await page.database.dispose()


async def test_sqlalchemys_sessions_by_task() -> None:
    """`async_scoped_session` by `current_task`: a middleware removes what a message has opened."""
    pytest.importorskip("aiosqlite", reason="tox's environment once has it")
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import (
        async_scoped_session,
        async_sessionmaker,
        create_async_engine,
    )

    app = new_app()
    ws = Pachinko(app, "/ws", hub=Hub())
    engine = create_async_engine("sqlite+aiosqlite://")
    session = async_scoped_session(async_sessionmaker(engine), asyncio.current_task)
    seen: list[Any] = []

    @ws.middleware
    async def scoped(conn: Connection, envelope: Envelope, call_next: Any) -> Any:
        try:
            return await call_next()
        finally:
            await session.remove()

    async def work() -> int:
        seen.append(session())
        value = await session.scalar(text("SELECT 1"))
        assert session() is seen[-1]
        return int(value)

    @ws.on("plain")
    async def plain(conn: Connection) -> int:
        return await work()

    @ws.on("concurrent", concurrent=True)
    async def concurrent(conn: Connection) -> int:
        return await work()

    async with serving(app) as server, connect(f"{server.url}/ws") as client:
        for type in ("plain", "concurrent") * 2:
            assert (await client.ask(type))["payload"] == 1
    assert len(set(map(id, seen))) == len(seen) == 4
    await engine.dispose()


async def test_dishka() -> None:
    """What dishka has made for a call is closed after it."""
    pytest.importorskip("dishka", reason="tox's environment once has it")
    page: Any = code_of("dishka")
    made: list[Any] = []
    init = page.Database.__init__
    page.Database.__init__ = lambda self: (made.append(self), init(self))[1]
    async with talking(page) as client:
        for _ in range(2):
            assert (await client.ask("look"))["payload"] is True
        assert [database.is_open for database in made] == [False, False]
    await page.container.close()
