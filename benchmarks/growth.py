"""How Pachinko's costs grow: in process, with more types, groups, receivers and members."""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Any

import falcon.asgi

from benchmarks.driver import Call, connect, drain
from benchmarks.peers.pachinko_ import Heard, work
from benchmarks.processes import Pipe, answer_all
from benchmarks.workload import WIRE
from pachinko import Connection, Hub, Pachinko


class Stage:
    """An app of one size, with a hub of its own."""

    def __init__(self, curve: str, size: int) -> None:
        self.curve = curve
        self.size = size
        self.hub = Hub()
        self.members: list[Connection] = []
        self.calls: list[Call] = []
        self.app: Any = falcon.asgi.App()
        self.types = size if curve == "types" else 10
        ws = Pachinko(self.app, "/ws", hub=self.hub)
        for number in range(self.types):
            ws.on(f"t{number}")(work)
        ws.connect(self.arrive)

    async def arrive(self, conn: Connection) -> None:
        self.members.append(conn)
        await conn.join("group 0")

    async def prepare(self) -> None:
        for _ in range(self.size if self.curve in ("receivers", "loop", "members") else 1):
            self.calls.append(await connect(self.app, WIRE, "/ws"))
        for number in range(self.size if self.curve in ("groups", "join") else 1):
            await self.hub.join(f"group {number}", self.members[0])

    async def measure(self, times: int) -> float:
        """CPU seconds for one of *times*."""
        gc.collect()
        if self.curve in ("types", "groups"):
            return await self.dispatch(times)
        before = time.process_time()
        if self.curve in ("receivers", "loop"):
            times = max(1, times // self.size) * self.size
            await self.send(times // self.size)
        else:
            await self.join_and_leave(times)
        return (time.process_time() - before) / times

    async def dispatch(self, times: int) -> float:
        payload = '{"a":1,"b":"text","c":1.5}'
        apart = self.types // 10  # the same number of types is used, of however many there are
        numbers = (n % 10 * apart for n in range(times))
        texts = [f'{{"type":"t{number}","id":1,"payload":{payload}}}' for number in numbers]
        return await drain(self.calls[0], texts)

    async def send(self, times: int) -> None:
        text, sent = Heard("x" * 100), self.calls[-1].sent
        event = {"type": "websocket.send", "text": "x" * 100}
        for _ in range(times):
            if self.curve == "receivers":
                await self.hub.send("group 0", text)
            else:
                for call in self.calls:
                    await call.send(event)
        await asyncio.sleep(0)
        if self.calls[-1].sent != sent + times:
            raise ValueError("not everybody got everything")

    async def join_and_leave(self, times: int) -> None:
        hub, conn = self.hub, self.members[-1]
        for _ in range(times):
            await hub.leave("group 0", conn)
            await hub.join("group 0", conn)


class Growth:
    """The command."""

    def about(self) -> dict[str, Any]:
        return {}

    async def measure(
        self, curve: str, sizes: list[int], times: int, rounds: int
    ) -> list[list[float]]:
        """CPU seconds by size and round; the sizes take turns."""
        gc.disable()
        stages = [Stage(curve, size) for size in sizes]
        for stage in stages:
            await stage.prepare()
            await stage.measure(times)
        gc.freeze()  # each round begins with a collection, which need not see all this again
        gc.enable()
        figures = [[await stage.measure(times) for stage in stages] for _ in range(rounds)]
        return [list(column) for column in zip(*figures, strict=True)]


def run(pipe: Pipe) -> None:
    """A child of the harness."""
    answer_all(pipe, Growth)
