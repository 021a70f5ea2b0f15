"""What a framework without payload types leaves to the app: dataclasses, checked by hand."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Work:
    a: int
    b: str
    c: float

    @classmethod
    def parse(cls, data: Any) -> Work:
        try:
            a, b, c = data["a"], data["b"], data["c"]
        except (KeyError, TypeError):
            raise ValueError("a payload has a, b and c") from None
        if not (isinstance(a, int) and isinstance(b, str) and isinstance(c, (int, float))):
            raise ValueError("a is an int, b a str, c a float")
        return cls(a, b, c)


@dataclass(slots=True)
class Shout:
    count: int
    text: str

    @classmethod
    def parse(cls, data: Any) -> Shout:
        try:
            count, text = data["count"], data["text"]
        except (KeyError, TypeError):
            raise ValueError("a payload has count and text") from None
        if not (isinstance(count, int) and isinstance(text, str)):
            raise ValueError("count is an int, text a str")
        return cls(count, text)


@dataclass(slots=True)
class Y:
    a: int
    b: str


Handler = Callable[[Any], Awaitable[Y]]


async def work(data: Any) -> Y:
    payload = Work.parse(data)
    return Y(payload.a, payload.b)


async def answer(handlers: Mapping[str, Handler], message: Any) -> dict[str, Any]:
    """The reply to a decoded message, made by the handler of its type."""
    handler = handlers.get(message.get("type"))
    if handler is None:
        return {"type": "error", "payload": "there is no such type"}
    try:
        y = await handler(message.get("payload"))
    except ValueError as error:
        return {"type": "error", "payload": str(error)}
    return {"type": "y", "id": message.get("id"), "payload": {"a": y.a, "b": y.b}}
