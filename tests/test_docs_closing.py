"""What the documentation says about closing clients, and about who they are."""

from __future__ import annotations

import asyncio
from typing import Any

from support import connect, serving, simulated, until
from test_docs import ROOT, clean_hub, load, post

from pachinko import hub

__all__ = ["clean_hub"]  # a fixture for each test, here too

REACHING, FALCON = ROOT / "docs" / "reaching.md", ROOT / "docs" / "falcon.md"


def bearer(token: str) -> dict[str, Any]:
    return {"additional_headers": {"Authorization": f"Bearer {token}"}}


async def test_an_administrator_signs_a_user_out() -> None:
    """All tabs are closed, the tokens are good for nothing, and others stay."""
    page = load(REACHING)
    async with serving(page.account._app) as server:
        url = f"{server.url}/account"
        async with (
            connect(url, **bearer("t-ada")) as one,
            connect(url, **bearer("t-ada-2")) as two,
            connect(url, **bearer("t-bob")) as bob,
        ):
            await until(lambda: len(hub.connections) == 3)
            assert await asyncio.to_thread(post, server, "/users/ada/sign-out", {}) == 204
            assert await one.closed() == await two.closed() == (4401, "signed out")
            assert (await bob.ask("x"))["payload"]["code"] == "unknown_type"
            async with connect(url, **bearer("t-ada")) as again:
                assert (await again.closed())[0] == 3401


async def test_a_reminder_goes_to_all_tabs() -> None:
    """`conn.user_id` is who has sent the message."""
    page = load(FALCON)
    async with simulated(page.app) as server:
        options = {"additional_headers": {"Cookie": "session=5e551"}}
        url = f"{server.url}/account"
        async with connect(url, **options) as one, connect(url, **options) as two:
            await until(lambda: len(hub.connections) == 2)
            await one.send("remind", {"text": "tea"})
            for tab in (one, two):
                assert (await tab.receive())["payload"] == {"text": "tea"}
