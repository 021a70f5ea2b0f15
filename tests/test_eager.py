"""Nothing depends on when a new task begins: in a later turn of the loop, or at once.

`asyncio.eager_task_factory` runs a task up to its first wait before its creator gets it. The
environment ``eager`` of tox runs the other tests on such loops.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest
from support import PATIENCE, connect, new_app, serving, until

from pachinko import Connection, Hub, Pachinko, Presence

FACTORIES: list[Any] = [None]
if sys.version_info >= (3, 12):
    FACTORIES.append(asyncio.eager_task_factory)

pytestmark = pytest.mark.parametrize("factory", FACTORIES, ids=["plain", "eager"][: len(FACTORIES)])


@pytest.fixture(autouse=True)
async def tasks(factory: Any) -> None:
    """Let the tasks of the test's loop begin as *factory* says."""
    asyncio.get_running_loop().set_task_factory(factory)


class AtOnce:
    """A `Backplane` in memory, none of whose methods ever waits."""

    def __init__(self, all_: list[AtOnce] | None = None) -> None:
        self.all = all_ if all_ is not None else []
        self.subjects: set[str] = set()
        self.starts = 0

    async def start(self, deliver: Any, lost: Any) -> None:
        self.deliver, self.lost = deliver, lost
        self.starts += 1
        self.all.append(self)

    async def publish(self, subject: str, data: bytes) -> int:
        reached = [each for each in self.all if subject in each.subjects]
        for each in reached:
            await each.deliver(subject, data)
        return len(reached)

    async def subscribe(self, subject: str) -> None:
        self.subjects.add(subject)

    async def unsubscribe(self, subject: str) -> None:
        self.subjects.discard(subject)

    async def stop(self) -> None:
        self.subjects.clear()
        if self in self.all:
            self.all.remove(self)


def endpoint(backplane: AtOnce) -> Pachinko:
    hub = Hub()
    hub.configure(backplane)
    ws = Pachinko(new_app(), "/ws", hub=hub)

    @ws.connect
    async def arrive(conn: Connection) -> None:
        conn.user = "ada"

    @ws.on("join")
    async def join(conn: Connection, payload: str) -> float:
        begun = asyncio.get_running_loop().time()
        await conn.join(payload)
        return asyncio.get_running_loop().time() - begun

    @ws.on("leave")
    async def leave(conn: Connection, payload: str) -> None:
        await conn.leave(payload)

    return ws


async def test_a_backplane_that_never_waits() -> None:
    """A join takes no time, and what the group gets arrives, whoever sends it."""
    first = AtOnce()
    ws, other = endpoint(first), endpoint(AtOnce(first.all))
    async with (
        serving(ws._app) as server,
        serving(other._app),
        connect(server.url + "/ws") as client,
    ):
        for n in range(3):  # Again and again: nothing is left behind by the time before.
            for group in "ab":
                assert (await client.ask("join", group))["payload"] < 1
            await ws._hub.send("a", "own", n)
            await other._hub.send("a", "foreign", n)
            await other._hub.send_to_user("ada", "user", n)
            received = [await client.receive() for _ in range(3)]
            assert [m["type"] for m in received] == ["own", "foreign", "user"]
            (present,) = await other._hub.presence("a")
            assert present == Presence(present.id, "ada", ws._hub.process)
            for group in "ab":
                await client.ask("leave", group)
            assert await other._hub.presence("a") == []
        await client.ask("join", "a")
        await other._hub.close_group("a", 4000)
        assert (await client.closed())[0] == 4000


async def test_a_backplane_that_never_waits_is_lost() -> None:
    """The link starts it again, and the members get a gap and later messages."""
    backplane = AtOnce()
    ws = endpoint(backplane)
    async with serving(ws._app) as server, connect(server.url + "/ws") as client:
        await client.ask("join", "a")
        backplane.lost(ConnectionError("gone"))
        gap = await client.receive()
        assert gap["type"] == "gap" and backplane.starts == 2
        await ws._hub.send("a", "later")
        while (message := await client.receive())["type"] == "gap":
            pass
        assert message["type"] == "later"


async def test_a_concurrent_handler_may_drain() -> None:
    """The drain does not wait for the handler that has called it, in its first step."""
    ws = Pachinko(new_app(), "/ws", hub=Hub(), linger=PATIENCE)
    drained: list[float] = []

    @ws.on("drain", concurrent=True)
    async def drain(conn: Connection) -> None:
        begun = asyncio.get_running_loop().time()
        await conn.hub.drain(0)
        drained.append(asyncio.get_running_loop().time() - begun)

    async with serving(ws._app) as server, connect(server.url + "/ws") as client:
        await client.send("drain", id=1)
        assert (await client.closed())[0] == 1012
        await until(lambda: drained)
    assert drained[0] < 5


@pytest.mark.parametrize("concurrent", [False, True])
async def test_a_handler_that_cancels_itself_is_answered(
    concurrent: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a bug of the handler, whenever its first step runs."""
    ws = Pachinko(new_app(), "/ws", hub=Hub())

    @ws.on("stop", concurrent=concurrent)
    async def stop(conn: Connection) -> None:
        task: Any = asyncio.current_task()
        task.cancel()
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            raise ValueError("it has cancelled itself") from None

    @ws.on("ping")
    async def ping(conn: Connection) -> None: ...

    async with serving(ws._app) as server, connect(server.url + "/ws") as client:
        if concurrent:
            answer = await client.ask("stop", id=1)
            assert answer["payload"]["code"] == "internal_error" and answer["id"] == 1
            assert (await client.ask("ping", id=2))["type"] == "ping.reply"
        else:
            await client.send("stop", id=1)
            assert (await client.closed())[0] in (1006, 1011, 1012)


async def test_a_worker_may_register_another_when_it_starts() -> None:
    """Each of the two runs once."""
    ws, runs = Pachinko(new_app(), "/ws", hub=Hub()), list[str]()

    @ws.worker
    async def first() -> None:
        runs.append("first")

        @ws.worker
        async def second() -> None:
            runs.append("second")

    async with serving(ws._app):
        await until(lambda: "second" in runs and not ws._workers)
    assert runs == ["first", "second"]
