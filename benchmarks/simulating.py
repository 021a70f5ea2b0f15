"""What tests with `simulate` cost: ``python -m benchmarks.simulating``.

CPU time of one process, all its threads included, for the same app and the same work. *By hand*
is the least that a test needs without a client: it calls the ASGI app itself, encodes JSON, waits
for the reply's future and decodes. The clients of Falcon, Starlette and Channels take their turns
where they are installed. A figure in brackets is the median of the ratios to the work by hand in
the same round.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import gc
import importlib
import json
import statistics
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any

import falcon.asgi
import falcon.testing

from pachinko import Connection, Hub, Pachinko, simulate

REQUESTS, CONNECTIONS, SENDS, RUNS, ROUNDS, MEMBERS = 400, 40, 20, 10, 25, 100
PAYLOAD = {"a": 1, "b": 2}
MOST = 3.0  # of the work by hand, which a request in a simulation may cost
SCOPE = {
    "type": "websocket", "asgi": {"version": "3.0", "spec_version": "2.4"}, "path": "/ws",
    "query_string": b"", "headers": [(b"host", b"localhost")],
}  # fmt: skip

Work = Callable[[int], Coroutine[Any, Any, None]]  # to be done so many times
Kind = Mapping[str, Work]  # of one client, by the name of the work


def make_app() -> Any:
    app = falcon.asgi.App()
    ws = Pachinko(app, "/ws", hub=Hub())

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.hub.join("all", conn)

    @ws.on("sum")
    async def add(conn: Connection, *, a: int, b: int) -> int:
        return a + b

    @ws.on("shout")
    async def shout(conn: Connection) -> None:
        await conn.hub.send("all", "shouted", PAYLOAD)

    return app


class Line:
    """A connection by hand: what the app calls, and two futures."""

    def __init__(self, app: Any, scope: Any, first: str) -> None:
        self.loop = asyncio.get_running_loop()
        self.inbox = collections.deque[Any]([{"type": first}])
        self.more = self.loop.create_future()  # for the app
        self.answer = self.loop.create_future()  # for the test
        self.task = self.loop.create_task(app(scope, self.receive, self.send))

    async def receive(self) -> Any:
        while not self.inbox:
            self.more = self.loop.create_future()
            await self.more
        return self.inbox.popleft()

    async def send(self, event: Any) -> None:
        if not self.answer.done():
            self.answer.set_result(event)

    def push(self, event: Any) -> Awaitable[Any]:
        """Hand *event* to the app; return what it will send next."""
        self.answer = self.loop.create_future()
        self.inbox.append(event)
        if not self.more.done():
            self.more.set_result(None)
        return self.answer

    async def request(self, type: str, payload: object, id: int) -> Any:
        text = json.dumps({"type": type, "payload": payload, "id": id})
        event = await self.push({"type": "websocket.receive", "text": text})
        reply = json.loads(event["text"])
        if reply["id"] != id:
            raise ValueError(reply)
        return reply["payload"]

    async def leave(self) -> None:
        self.push({"type": "websocket.disconnect", "code": 1000})
        await self.task


async def line(app: Any) -> Line:
    it = Line(app, dict(SCOPE), "websocket.connect")
    await it.answer
    return it


@contextlib.asynccontextmanager
async def lifespan(app: Any) -> AsyncGenerator[None, None]:
    it = Line(app, {"type": "lifespan", "asgi": {"version": "3.0"}}, "lifespan.startup")
    await it.answer
    yield
    await it.push({"type": "lifespan.shutdown"})
    await it.task


@contextlib.asynccontextmanager
async def by_hand() -> AsyncGenerator[Kind, None]:
    app = make_app()
    async with lifespan(app):
        client = await line(app)
        crowd = [await line(app) for _ in range(MEMBERS)]

        async def requests(times: int) -> None:
            for id in range(times):
                assert await client.request("sum", PAYLOAD, id) == 3

        async def connections(times: int) -> None:
            for _ in range(times):
                await (await line(app)).leave()

        async def sends(times: int) -> None:
            text = json.dumps({"type": "shout"})
            for _ in range(times):
                for each in crowd:
                    each.answer = each.loop.create_future()
                client.push({"type": "websocket.receive", "text": text})
                for each in crowd:
                    json.loads((await each.answer)["text"])

        async def runs(times: int) -> None:
            for _ in range(times):
                async with lifespan(make_app()):
                    pass

        yield {"request": requests, "connection": connections, "send": sends, "run": runs}
        for each in (client, *crowd):
            await each.leave()


@contextlib.asynccontextmanager
async def simulated() -> AsyncGenerator[Kind, None]:
    async with simulate(make_app) as sim:
        client = await sim.connect("/ws")
        crowd = [await sim.connect("/ws") for _ in range(MEMBERS)]

        async def requests(times: int) -> None:
            for _ in range(times):
                assert await client.request("sum", PAYLOAD) == 3

        async def connections(times: int) -> None:
            for _ in range(times):
                await (await sim.connect("/ws")).close()

        async def sends(times: int) -> None:
            for _ in range(times):
                await client.send("shout")
                await sim.settle()
                for each in (client, *crowd):
                    await each.receive("shouted")

        async def settles(times: int) -> None:
            for _ in range(times):
                await sim.settle()

        async def runs(times: int) -> None:
            for _ in range(times):
                async with simulate(make_app()):
                    pass

        yield {
            "request": requests, "connection": connections, "send": sends, "run": runs,
            "settle": settles,
        }  # fmt: skip


@contextlib.asynccontextmanager
async def of_falcon() -> AsyncGenerator[Kind, None]:
    async with (
        falcon.testing.ASGIConductor(make_app()) as conductor,
        conductor.simulate_ws("/ws") as client,
    ):

        async def requests(times: int) -> None:
            for id in range(times):
                await client.send_json({"type": "sum", "payload": PAYLOAD, "id": id})
                assert (await client.receive_json())["payload"] == 3

        async def connections(times: int) -> None:
            for _ in range(times):
                async with conductor.simulate_ws("/ws"):
                    pass

        async def runs(times: int) -> None:
            for _ in range(times):
                async with falcon.testing.ASGIConductor(make_app()):
                    pass

        yield {"request": requests, "connection": connections, "run": runs}


@contextlib.asynccontextmanager
async def of_starlette() -> AsyncGenerator[Kind, None]:
    client_of = importlib.import_module("starlette.testclient").TestClient
    # It is not entered, since Falcon does not end its lifespan. Each connection has a loop.
    with client_of(make_app()).websocket_connect("/ws") as client:
        other = client_of(make_app())

        async def requests(times: int) -> None:
            for id in range(times):
                client.send_json({"type": "sum", "payload": PAYLOAD, "id": id})
                assert client.receive_json()["payload"] == 3

        async def connections(times: int) -> None:
            for _ in range(times):
                with other.websocket_connect("/ws"):
                    pass

        yield {"request": requests, "connection": connections}


@contextlib.asynccontextmanager
async def of_channels() -> AsyncGenerator[Kind, None]:
    communicator = importlib.import_module("channels.testing").WebsocketCommunicator
    app = make_app()
    async with lifespan(app):
        client = communicator(app, "/ws")
        await client.connect()

        async def requests(times: int) -> None:
            for id in range(times):
                await client.send_json_to({"type": "sum", "payload": PAYLOAD, "id": id})
                assert (await client.receive_json_from())["payload"] == 3

        async def connections(times: int) -> None:
            for _ in range(times):
                one = communicator(app, "/ws")
                await one.connect()
                await one.disconnect()

        yield {"request": requests, "connection": connections}
        await client.disconnect()


Clients = Mapping[str, tuple[Callable[[], contextlib.AbstractAsyncContextManager[Kind]], str]]
# Each with the module that it needs.
CLIENTS: Clients = {
    "by hand": (by_hand, ""),
    "simulate": (simulated, ""),
    "by hand, again": (by_hand, ""),
    "falcon.testing": (of_falcon, ""),
    "Starlette's TestClient": (of_starlette, "starlette.testclient"),
    "Channels' WebsocketCommunicator": (of_channels, "channels.testing"),
}
WORKS = {
    "request": ("a request and its answer", REQUESTS),
    "connection": ("connect and close", CONNECTIONS),
    "send": (f"a message to {MEMBERS} members, read by all", SENDS),
    "run": ("start and end", RUNS),
    "settle": ("settle, when nothing runs", REQUESTS),
}


def is_installed(module: str) -> bool:
    try:
        importlib.import_module(module or "falcon")
    except (ImportError, RuntimeError):  # Starlette raises this where its HTTP client is missing.
        return False
    return True


def leave(runner: asyncio.Runner, client: Any) -> None:
    runner.run(client.__aexit__(None, None, None))


def measure(
    rounds: int, share: int = 1, clients: Clients = CLIENTS
) -> dict[str, dict[str, list[float]]]:
    """CPU seconds in each round, by work and client. Each client has an event loop of its own.

    Everything is done one *share*-th as often as usual.
    """
    figures: dict[str, dict[str, list[float]]] = {work: {} for work in WORKS}
    with contextlib.ExitStack() as stack:
        kinds: dict[str, tuple[asyncio.Runner, Kind]] = {}
        for name, (make, module) in clients.items():
            if is_installed(module):
                runner, client = stack.enter_context(asyncio.Runner()), make()
                kinds[name] = runner, runner.run(client.__aenter__())
                stack.callback(leave, runner, client)
        for _ in range(rounds):
            for work, (_, usual) in WORKS.items():
                times = max(usual // share, 1)
                for name, (runner, kind) in kinds.items():
                    if work in kind:
                        gc.collect()
                        before = time.process_time()
                        runner.run(kind[work](times))
                        cost = (time.process_time() - before) / times
                        figures[work].setdefault(name, []).append(cost)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    figures = measure(given.rounds)
    ratio = 0.0
    for work, (title, _) in WORKS.items():
        print(title)
        base = figures[work].get("by hand", [])
        for name, costs in figures[work].items():
            ratios = [cost / of for cost, of in zip(costs, base, strict=False)]
            beside = f" ({statistics.median(ratios):.2f})" if ratios else ""
            print(f"  {name:33} {statistics.median(costs) * 1e6:9.1f} µs{beside}")
            if (work, name) == ("request", "simulate"):
                ratio = statistics.median(ratios)
    return ratio > MOST


if __name__ == "__main__":
    sys.exit(main())
