"""What each server makes of a handshake that is refused, left, or in progress at the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time

import pytest
from app import CONNECT_TIMEOUT, LINGER
from observed import Observed
from process import GRACE, Process
from support import PATIENCE, connect, until
from websockets.exceptions import InvalidStatus, WebSocketException


async def visit(url: str) -> None:
    """Try to connect; how that ends does not matter."""
    with contextlib.suppress(OSError, EOFError, WebSocketException):
        async with connect(url):
            pass


async def test_a_refusal_has_its_status(server: Process, observed: Observed, room: str) -> None:
    """With the headers and the body of the error, where the server offers that."""
    with pytest.raises(InvalidStatus) as caught:
        async with connect(f"{server.url}/ws/{room}?refuse=limit"):
            pass
    response = caught.value.response
    assert response.status_code == (429 if observed.statuses else 403)
    if observed.statuses:
        assert response.headers["Retry-After"] == "7"
        assert response.headers["X-Added"] == "1"
        assert response.headers["Content-Type"] == "application/json"
        body = json.loads(bytes(response.body or b""))
        assert body == {"title": "429 Too Many Requests", "description": "not now"}


async def test_an_origin_has_its_status(server: Process, observed: Observed, room: str) -> None:
    """403, with a body where the server offers that."""
    with pytest.raises(InvalidStatus) as caught:
        async with connect(f"{server.url}/ws/{room}", origin="https://evil.example"):
            pass
    assert caught.value.response.status_code == 403
    assert (b"this origin" in bytes(caught.value.response.body or b"")) is observed.statuses


async def test_headers_of_the_answer(server: Process, observed: Observed, room: str) -> None:
    """Cookies too, or none; the client is let in."""
    async with connect(f"{server.url}/ws/{room}?cookies=1") as client:
        assert (await client.receive())["type"] == "welcome"
        assert client.socket.response is not None
        headers = client.socket.response.headers
        does = observed.headers == "yes"
        assert headers.get_all("Set-Cookie") == (["a=1", "b=2"] if does else [])
        assert ("X-Added" in headers) is does
    lost = {"dropped": "this server drops what", "left out": "this server refuses what"}
    for name, text in lost.items():
        assert (text in server.output.read_text()) is (observed.headers == name)


async def test_a_connect_handler_that_waits(server: Process, observed: Observed, room: str) -> None:
    """A read that began before the accept loses no message, and sees the end."""
    async with connect(f"{server.url}/ws/{room}?slow=1") as client:
        for id in range(20):
            await client.send("echo", id, id=id)
        assert (await client.receive())["type"] == "welcome"
        assert [(await client.receive())["payload"] for _ in range(20)] == list(range(20))
        await client.close(4001)
    await until(lambda: "disconnect" in server.events(room))
    (line,) = server.lines(room, "disconnect")
    assert line["code"] == (4001 if observed.client_codes else 1006)


async def test_a_client_that_leaves_before_the_accept(
    server: Process, observed: Observed, room: str
) -> None:
    """Its handler is cancelled after *linger*, where the server says that it has left."""
    visitor = asyncio.create_task(visit(f"{server.url}/ws/{room}?refuse=hang"))
    await until(lambda: "hangs" in server.events(room))
    visitor.cancel()
    left = time.monotonic()
    if observed.notices:
        await until(lambda: "hang ends" in server.events(room))
        assert time.monotonic() - left < PATIENCE / 2
    else:
        await asyncio.sleep(1.5 * LINGER)
        assert "hang ends" not in server.events(room)
        await until(lambda: "hang ends" in server.events(room))  # after `connect_timeout`


async def test_sigterm_while_a_connect_handler_hangs(
    doomed: Process, observed: Observed, room: str
) -> None:
    """The process ends."""
    for _ in range(5):  # granian itself may panic while it stops, and calls nothing then
        visitor = asyncio.create_task(visit(f"{doomed.url}/ws/{room}?refuse=hang"))
        await until(lambda: "hangs" in doomed.events(room))
        doomed.terminate()
        sent = time.monotonic()
        assert await asyncio.to_thread(doomed.ends_within, GRACE + PATIENCE)
        took = time.monotonic() - sent
        await asyncio.wait([visitor])
        if "panicked" not in doomed.output.read_text():
            break
        doomed.start()
    match observed.hung_ends:
        case "after `linger`":
            assert LINGER * 0.9 < took < GRACE
            assert "hang ends" in doomed.events(room)
        case "after `connect_timeout`":
            assert CONNECT_TIMEOUT * 0.75 < took < GRACE
            assert "hang ends" in doomed.events(room)
        case _:
            assert took < GRACE
