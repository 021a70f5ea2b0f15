"""The chat of two processes: one is away for a while, and its people miss nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
from brokers import BrokerKind, running
from javascript import InBrowser
from playwright.async_api import Page, expect
from support import PATIENCE
from test_chat import Client, Server, dial

expect.set_options(timeout=PATIENCE * 1000)

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def enter(page: Page, url: str, nick: str) -> None:
    await page.goto(url)
    await page.get_by_label("Nickname").fill(nick)
    await page.get_by_role("button", name="Join the room").click()
    await expect(page.get_by_role("status")).to_have_text("Connected")


async def say(page: Page, text: str) -> None:
    box = page.get_by_role("textbox", name="Message to")
    await box.fill(text)
    await box.press("Enter")


def bubbles(page: Page) -> Any:
    return page.get_by_role("log").locator(".bubble")


def talk(program: Client, text: str) -> None:
    """Say *text*, and wait until it has been said; others may come and go meanwhile."""
    program.send("say", 7, text=text)
    while program.receive().get("id") != 7:
        pass


async def come_back(page: Page) -> None:
    await page.evaluate("() => { dispatchEvent(new Event('online')); }")
    await expect(page.get_by_role("status")).to_have_text("Connected")


async def test_nothing_is_missing_after_a_minute_without_the_server(
    kind: BrokerKind, tab: InBrowser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ada's process is stopped, Bob talks on by another one, and Ada gets it all in order, once."""
    async with running(kind, *(["-js", "-sd", "store"] if kind == "nats" else [])) as broker:
        monkeypatch.setenv("PACHINKO_BACKPLANE", broker.url)
        one, two = Server(), Server()
        try:
            ada = tab.page
            await ada.clock.install()
            await enter(ada, f"{one.url}#room", "Ada")
            with dial(two, "room") as connection:
                bob = Client(connection)
                bob.enter("Bob")
                talk(bob, "before")
                await say(ada, "mine")
                await expect(bubbles(ada)).to_have_text(["before", "mine"])
                await expect(ada.locator(".mine")).to_have_attribute("data-state", "")
                one.stop()
                await expect(ada.get_by_role("status")).to_have_text(re.compile("lost|Connecting"))
                said = [f"line {n}" for n in range(15)]  # 20 in 5 seconds is the chat's rate
                for text in said:
                    talk(bob, text)
                await ada.clock.run_for(60_000)
                await say(ada, "waits")
                one.start()
                await come_back(ada)
                await expect(bubbles(ada)).to_have_text(["before", "mine", "waits", *said])
                await expect(ada.locator(".mine").last).to_have_attribute("data-state", "")
                talk(bob, "after")
                await expect(bubbles(ada)).to_have_text(["before", "mine", "waits", *said, "after"])
                await expect(ada.get_by_text("been missed")).to_have_count(0)
        finally:
            one.stop()
            two.stop()


async def test_without_a_broker_a_restart_is_told(tab: InBrowser) -> None:
    """What only the process knew is gone, and the page says so."""
    server = Server()
    try:
        await enter(tab.page, f"{server.url}#room", "Ada")
        server.kill()
        await expect(tab.page.get_by_role("status")).to_have_text(re.compile("lost|Connecting"))
        server.start()
        await come_back(tab.page)
        await expect(tab.page.get_by_text("Some messages may have been missed")).to_be_visible()
    finally:
        server.stop()
