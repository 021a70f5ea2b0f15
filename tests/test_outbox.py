"""What waits to be written to one client."""

from __future__ import annotations

import asyncio

import pachinko


def waiting(name: str, size: int = 0, group: str | None = None) -> pachinko.Waiting:
    return pachinko.Waiting({"type": "websocket.send", "text": name}, None, size, group)


def texts(outbox: pachinko.Outbox) -> list[str]:
    """Everything that is taken out, in order."""
    taken = []
    while (item := outbox.take()) is not None:
        taken.append(item.event.get("text", item.event["type"]))
    return taken


def test_an_outbox_keeps_the_order() -> None:
    """Answers and pushed messages leave as they came; only pushed ones count."""
    outbox = pachinko.Outbox()
    for item in (waiting("a"), waiting("b", 5, "g"), waiting("c"), waiting("d", 7)):
        outbox.put(item)
    assert (outbox.pushed, outbox.size) == (2, 12)
    assert texts(outbox) == ["a", "b", "c", "d"]
    assert (outbox.pushed, outbox.size) == (0, 0)


def test_the_oldest_pushed_message_is_dropped_and_never_an_answer() -> None:
    """Its group is remembered, once, and announced behind all that waits."""
    outbox = pachinko.Outbox()
    for item in (waiting("a"), waiting("b", 5, "g"), waiting("c", 7), waiting("d", 9, "g")):
        outbox.put(item)
    for _ in range(3):
        outbox.drop_oldest()
    assert (outbox.pushed, outbox.size) == (0, 0)
    gap = '{"type":"gap","payload":{"group":%s}}'
    assert texts(outbox) == ["a", gap % '"g"', gap % "null"]
    assert texts(outbox) == []


def test_gaps_are_announced_before_a_close() -> None:
    """Behind the close frame nobody would read them."""
    outbox = pachinko.Outbox()
    outbox.put(waiting("a", 1, "g"))
    outbox.drop_oldest()
    outbox.put(pachinko.Waiting({"type": "close"}, close=pachinko.Close()))
    assert texts(outbox) == ['{"type":"gap","payload":{"group":"g"}}', "close"]


async def test_whoever_waits_learns_that_the_outbox_was_cleared() -> None:
    """Cancelled senders are passed over, the others get False."""
    outbox = pachinko.Outbox()
    loop = asyncio.get_running_loop()
    sent, cancelled = loop.create_future(), loop.create_future()
    for future in (cancelled, sent):
        outbox.put(pachinko.Waiting({"type": "websocket.send"}, future))
    outbox.put(waiting("pushed", 3))
    cancelled.cancel()
    outbox.clear()
    assert sent.result() is False and texts(outbox) == []
    outbox.put(pachinko.Waiting({"type": "websocket.send"}, cancelled))
    assert outbox.take() is None


def test_only_binary_content_makes_a_binary_frame() -> None:
    """Servers may want exactly `bytes`; plain content is a text, whatever is in it."""
    event = pachinko.event_of(pachinko.Binary(b"\xff"))
    assert event == {"type": "websocket.send", "bytes": b"\xff"} and type(event["bytes"]) is bytes
    assert pachinko.event_of(b"{}") == {"type": "websocket.send", "text": "{}"}
