"""What a question to a client and its answer cost in process: ``python -m benchmarks.asking``.

CPU time, without a server. In the same run and on one connection, a typed message and its reply,
each of which comes when the one before has been answered, and 32 at a time.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from typing import Any

import falcon.asgi

from benchmarks.driver import Call, drain, scope, take_turns
from pachinko import Connection, Pachinko, message

TIMES, ROUNDS, AT_ONCE = 2048, 30, 32

app = falcon.asgi.App()
ws = Pachinko(app, "/ws")
conns: list[Connection] = []


@message("t")
class Asked:
    a: int
    b: str
    c: float


@message("y")
class Answer:
    a: int
    b: str


@ws.connect
async def arrive(conn: Connection) -> None:
    conns.append(conn)


@ws.on(Asked)
async def reply(conn: Connection, msg: Asked) -> Answer:
    return Answer(msg.a, msg.b)


class Answering(Call):
    """A client that answers each question at once."""

    async def send(self, event: Any) -> None:
        await super().send(event)
        if '"id":"$' in (text := event.get("text") or ""):
            id = text[text.rindex("$") : -2]
            self.feed([f'{{"type":"t.reply","id":"{id}","payload":{{"a":1,"b":"text"}}}}'])


async def questions(at_once: int, returns: Any) -> float:
    """CPU seconds for a question and its answer."""
    (conn,) = conns
    question = Asked(1, "text", 1.5)

    async def ask(times: int) -> None:
        for _ in range(times):
            await conn.ask(question, returns=returns)

    before = time.process_time()
    await asyncio.gather(*(ask(TIMES // at_once) for _ in range(at_once)))
    return (time.process_time() - before) / TIMES


async def main() -> None:
    call = Answering(app, scope("/ws"), "websocket.connect")
    await call.until(1)
    payload = {"a": 1, "b": "text", "c": 1.5}
    texts = [json.dumps({"type": "t", "id": n, "payload": payload}) for n in range(TIMES)]
    figures: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, cost in (
            ("a message and its reply, all at hand", await drain(call, texts)),
            ("a message and its reply, one at a time", await take_turns(call, texts)),
            ("a question and its answer, one at a time", await questions(1, Answer)),
            ("the same without returns=", await questions(1, Any)),
            (f"a question and its answer, {AT_ONCE} at a time", await questions(AT_ONCE, Answer)),
        ):
            figures.setdefault(name, []).append(cost)
    for name, costs in figures.items():
        print(f"{name:45} {statistics.median(costs) * 1e6:6.1f} µs")
    await call.end()


if __name__ == "__main__":
    asyncio.run(main())
