"""The work that every peer does, and the frames it takes to ask for it.

A request is ``{"type":"t5","id":7,"payload":{"a":1,"b":"text","c":1.5}}``: one of ten types, three
fields to validate. The reply is ``{"type":"y","id":7,"payload":{"a":1,"b":"text"}}``, made from a
typed object. On the group path a client is in the group "all" once it is connected. There
``{"type":"shout","id":1,"payload":{"count":50,"text":"…"}}`` makes the peer send
``{"type":"heard","payload":{"text":"…"}}`` to that group 50 times, one after the other, and then
reply ``{"type":"y","id":1,"payload":{"a":50,"b":"done"}}`` to the one who asked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

TYPES: tuple[str, ...] = tuple(f"t{number}" for number in range(10))


class Wire:
    """How to talk to a peer: plain JSON, unless a subclass says otherwise."""

    path: str = "/ws"
    group_path: str = "/group"
    prelude: Sequence[tuple[str | None, str | None]] = ()
    """After the handshake: what to send, if anything, and how the answer to wait for begins."""

    def request(self, number: int, id: int) -> str:
        """The frame that asks for message type *number*, 0 to 9."""
        return f'{{"type":"{TYPES[number]}","id":{id},"payload":{{"a":1,"b":"text","c":1.5}}}}'

    def reply(self, number: int, id: int) -> str | None:
        """The answer to that; None where only `check` can tell."""
        return f'{{"type":"y","id":{id},"payload":{{"a":1,"b":"text"}}}}'

    def check(self, text: str, number: int, id: int) -> bool:
        """Whether *text* is the answer: equal as JSON."""
        reply = self.reply(number, id)
        return reply is not None and json.loads(text) == json.loads(reply)

    def shout(self, count: int, text: str) -> str:
        """The frame that asks for *count* group sends of *text*."""
        payload = {"count": count, "text": text}
        return json.dumps({"type": "shout", "id": 1, "payload": payload}, separators=(",", ":"))

    def is_group_message(self, text: str) -> bool:
        """Whether *text* is one of them, rather than the reply."""
        message = json.loads(text)
        return isinstance(message, dict) and message.get("type") == "heard"


WIRE: Wire = Wire()
