"""Nothing of a kept group is lost when processes are killed, and a broker is slow or forgets.

The steps of `test_history_steps`, and further ones, with other examples.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_history_steps import (
    ALONE,
    BROKEN,
    EXAMPLES,
    ROUND,
    Scene,
    Step,
    make_app,
    options,
    processes,
)

import pachinko_cluster
from pachinko import simulate
from pachinko_cluster import Past, SimulatedConnection

REAL = SimulatedConnection.past
WORSE = (
    st.tuples(st.just("kill"), processes),
    st.tuples(st.just("flush")),
    st.tuples(st.just("hold")),
    st.tuples(st.just("release")),
    st.tuples(st.just("fail")),
)


class Worse(Scene):
    """A scene whose broker can be slow, and forget."""

    def __init__(self, sim: Any) -> None:
        super().__init__(sim, is_alone=False)
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.fails = 0  # reads that are to fail

    async def past(
        self, connection: SimulatedConnection, subject: str, count: int, *more: Any
    ) -> Past:
        """Read what is known now, and answer later."""
        found = await REAL(connection, subject, count, *more)
        await self.goes_on.wait()
        if self.fails:
            self.fails -= 1
            raise OSError("a test wants it")
        return found

    async def kill(self, n: int) -> None:
        """Kill a process, and start another one in its place."""
        self.process(n).kill()
        self.processes[n % len(self.processes)] = await self.sim.process()
        for seat in self.forks:  # Nobody of them comes back.
            if seat.client is not None and seat.client.end is not None:
                seat.read()
                seat.client = None

    async def flush(self) -> None:
        self.sim.broker.flush()

    async def hold(self) -> None:
        self.goes_on.clear()

    async def release(self) -> None:
        self.goes_on.set()

    async def fail(self) -> None:
        self.fails += 1

    async def end(self) -> None:
        self.fails = 0
        self.goes_on.set()
        await self.find()
        await self.settle()
        await self.advance(3 * pachinko_cluster._AGAIN + 0.1)
        await super().end()


async def play(steps: list[Step], patch: pytest.MonkeyPatch) -> None:
    async with simulate(make_app) as sim:
        scene = Worse(sim)

        async def past(self: SimulatedConnection, subject: str, count: int, *more: Any) -> Past:
            return await scene.past(self, subject, count, *more)

        patch.setattr(SimulatedConnection, "past", past)
        scene.processes.append(await sim.process())
        for name, *args in steps:
            await getattr(scene, name)(*args)
        await scene.end()
        scene.published.check(reasons=("expired", "overflow", "epoch", "broker"))


@pytest.mark.parametrize("round", range(-(-EXAMPLES // ROUND)))
def test_nothing_is_lost_with_a_bad_broker(
    round: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each client has what was published, or is told what not."""
    caplog.set_level(logging.CRITICAL, "pachinko")
    monkeypatch.setattr(pachinko_cluster, "_RECONNECT", (0.001,))

    @options(EXAMPLES)
    @given(st.lists(st.one_of(*ALONE, *BROKEN, *WORSE), max_size=25))
    def run(steps: list[Step]) -> None:
        asyncio.run(play(steps, monkeypatch))

    run()
