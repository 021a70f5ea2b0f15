"""The cost of a message in process, counted and not timed: ``python -m benchmarks.instructions``.

A Falcon app with a Pachinko gets ASGI events that are all at hand, while every bytecode instruction
and every call of a C function outside of this file is counted. What some work costs is subtracted
from what twice as much costs, so that what happens once drops out. The rest is the same in every
run and on every machine: ``--repeat 20`` shows that, and ``tests/test_speed.py`` relies on it.
Where a task waits, the event loop's own instructions are counted as well.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tracemalloc
import urllib.parse
from collections.abc import Awaitable, Callable, Generator, Sequence
from types import FrameType
from typing import Any

import falcon.asgi

import pachinko
from pachinko import Connection, Envelope, Hub, Pachinko, hub, message

Event = dict[str, Any]  # of ASGI
App = Callable[..., Awaitable[None]]  # of ASGI
Work = Callable[[int], Awaitable[None]]  # to be done so many times
Figures = dict[str, dict[str, int]]  # by case and column

COUNTS = ("instructions", "in pachinko.py", "C calls", "from pachinko.py")
COLUMNS = (*COUNTS, "bytes")
TYPES = 10  # of messages, for each kind of handler
TIMES = 50  # and twice that

# ── the app ───────────────────────────────────────────────────────────────────────────────────

app = falcon.asgi.App()
ws = Pachinko(app, "/pachinko")
app_with_middleware = falcon.asgi.App()
surrounded = Pachinko(app_with_middleware, "/pachinko")
app_of_files = falcon.asgi.App()
file, file_with_middleware, file_with_guards = Pachinko(), Pachinko(), Pachinko()
app_that_keeps = falcon.asgi.App()
keeping = Hub()
keeping.keep("kept")
keeping.keep("kept shortly", messages=TIMES // 2)
kept = Pachinko(app_that_keeps, "/kept/{number}", hub=keeping)


@message("y")
class Y:
    a: int
    b: str


@message("heard")
class Heard:
    text: str


@ws.connect
async def arrive(conn: Connection) -> None:
    await hub.join("all", conn)


@kept.connect
async def come_back(conn: Connection, number: str) -> None:
    await conn.join(f"kept {number}")


@surrounded.middleware
@file_with_middleware.middleware
async def pass_on(conn: Connection, envelope: Envelope, call_next: Callable[[], Any]) -> Any:
    return await call_next()


def anybody(conn: Connection) -> bool:
    return True


class Turn:
    """One turn of the event loop, which a task waits for."""

    def __await__(self) -> Generator[None, None, None]:
        yield


def add_handlers(number: int) -> None:
    @message(f"typed{number}")
    class X:
        a: int
        b: str
        c: float

    @ws.on(X)
    @surrounded.on(X)
    @file.on(X)
    @file_with_middleware.on(X)
    @file_with_guards.on(X, only=anybody)
    async def typed(conn: Connection, msg: X) -> Y:
        return Y(msg.a, msg.b)

    @ws.on(f"fields{number}")
    async def fields(conn: Connection, *, a: int, b: str, c: float) -> int:
        return a

    @ws.on(f"silent{number}")
    async def silent(conn: Connection, msg: X) -> None:
        pass

    @ws.on(f"waiting{number}")
    async def waiting(conn: Connection, msg: X) -> Y:
        await Turn()
        return Y(msg.a, msg.b)


for number in range(TYPES):
    add_handlers(number)


for path, each in (
    ("/file", file), ("/around", file_with_middleware), ("/only", file_with_guards),
):  # fmt: skip
    Pachinko(app_of_files, path).include(each)


class Plain:
    """The least that holds a connection in Falcon; the app's receive queue is off."""

    async def on_websocket(self, req: falcon.asgi.Request, ws: falcon.asgi.WebSocket) -> None:
        await ws.accept()
        while True:
            await ws.receive_text()


app.add_route("/falcon", Plain())
app.ws_options.max_receive_queue = 0  # for that route; Pachinko turns it off for its own

# ── the server ────────────────────────────────────────────────────────────────────────────────

LEAVE = {"type": "websocket.disconnect", "code": 1000}
sent: list[str] = []


async def send(event: Event) -> None:
    if event["type"] == "websocket.send":
        sent.append(event["text"])


async def serve(
    path: str, *events: Event, to: App = app, is_slow: bool = False, query: str = ""
) -> None:
    """A connection with these *events*, and then silence. Each makes *to* wait if *is_slow*."""
    coming = iter([{"type": "websocket.connect"}, *events])

    async def receive() -> Event:
        if is_slow:
            await Turn()
        return next(coming, None) or await asyncio.get_running_loop().create_future()

    scope = {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "path": path,
        "query_string": query.encode(),
        "headers": [(b"host", b"localhost")],
    }
    await to(scope, receive, send)


async def settle() -> None:
    """Let every task go as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def hold(path: str, number: int) -> list[asyncio.Task[None]]:
    """Connections that say nothing and stay."""
    tasks = [asyncio.create_task(serve(path)) for _ in range(number)]
    await settle()
    assert not any(task.done() for task in tasks)
    return tasks


async def release(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


# ── instructions and calls ────────────────────────────────────────────────────────────────────


def messages(
    type: str,
    *,
    to: App = app,
    is_answered: bool = True,
    is_refused: bool = False,
    is_slow: bool = False,
    path: str = "/pachinko",
) -> Work:
    """Messages that have all arrived when *to* asks for the first; or, if *is_slow*, none has."""
    id = '"id":7,' if is_answered else ""
    rest = id + '"payload":{"a":1,"b":"text","c":1.5}'

    async def work(times: int) -> None:
        texts = [f'{{"type":"{type}{n % TYPES}",{rest}}}' for n in range(times)]
        events = [{"type": "websocket.receive", "text": text} for text in texts]
        sent.clear()
        await serve(path, *events, LEAVE, to=to, is_slow=is_slow)
        assert len(sent) == is_answered * times
        assert sum('"error"' in text for text in sent) == is_refused * times

    return work


async def visits(times: int) -> None:
    for _ in range(times):
        await serve("/pachinko", LEAVE)


async def group_send(receivers: int) -> None:
    sent.clear()
    await hub.send(f"group of {receivers}", Heard("text"))
    await settle()
    assert len(sent) == receivers


async def keep(times: int) -> None:
    """Messages to nobody, of which the latest are kept."""
    for _ in range(times):
        await keeping.send("kept shortly", Heard("text"))


async def fill() -> Work:
    """Keep as many messages as a client is to miss; return what lets one come back that has."""
    await serve("/kept/0", LEAVE, to=app_that_keeps)
    resume = {}
    for size in (TIMES, 2 * TIMES):
        resume[size] = {"groups": {f"kept {size}": await keeping.position(f"kept {size}")}}
        for _ in range(size):
            await keeping.send(f"kept {size}", Heard("text"))

    async def work(times: int) -> None:
        sent.clear()
        query = "resume=" + urllib.parse.quote(json.dumps(resume[times]))
        coming = serve(f"/kept/{times}", to=app_that_keeps, query=query)
        task = asyncio.create_task(coming)
        while len(sent) < times + 1:  # noqa: ASYNC110 - it counts turns, too
            await asyncio.sleep(0)
        await release([task])
        assert f'"replayed":{times},' in sent[-1]

    return work


async def cost(work: Work) -> dict[str, int]:
    """What doing it once more costs."""
    await count(work, TIMES)  # fills caches
    once, twice = await count(work, TIMES), await count(work, 2 * TIMES)
    return {column: round((twice[column] - once[column]) / TIMES) for column in COUNTS}


async def count(work: Work, times: int) -> dict[str, int]:
    instructions: collections.Counter[str] = collections.Counter()  # by source file
    calls: collections.Counter[str] = collections.Counter()

    def enter(frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename == __file__:
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return step

    def step(frame: FrameType, event: str, arg: object) -> Any:
        if event == "opcode":
            instructions[frame.f_code.co_filename] += 1
        return step

    def call(frame: FrameType, event: str, arg: object) -> None:
        if event == "c_call" and frame.f_code.co_filename != __file__:
            calls[frame.f_code.co_filename] += 1

    sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for it in settrace
    sys.setprofile(call)
    sys.settrace(enter)
    await work(times)
    sys.settrace(None)
    sys.setprofile(None)
    own = pachinko.__file__
    counts = (instructions.total(), instructions[own], calls.total(), calls[own])
    return dict(zip(COUNTS, counts, strict=True))


# ── memory ────────────────────────────────────────────────────────────────────────────────────


async def idle_bytes(path: str) -> float:
    """Bytes of one more idle connection, without the tables of all of them, which grow in leaps."""
    tasks: list[asyncio.Task[None]] = []
    sizes: list[int] = []
    tracemalloc.start()
    for _ in range(50):
        tasks += await hold(path, 10)
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    await release(tasks)
    return statistics.median(after - before for before, after in itertools.pairwise(sizes)) / 10


# ── the whole ─────────────────────────────────────────────────────────────────────────────────


async def measure() -> Figures:
    gc.disable()  # where it ran by itself, finalizers would be counted
    figures = {
        "typed message and reply": await cost(messages("typed")),
        "a message that comes alone": await cost(messages("typed", is_slow=True)),
        "fields and int reply": await cost(messages("fields")),
        "message without a reply": await cost(messages("silent", is_answered=False)),
        "middleware": await cost(messages("typed", to=app_with_middleware)),
        "included": await cost(messages("typed", to=app_of_files, path="/file")),
        "its own middleware": await cost(messages("typed", to=app_of_files, path="/around")),
        "only=": await cost(messages("typed", to=app_of_files, path="/only")),
        "an unknown type": await cost(messages("unknown", is_refused=True)),
        "handler that suspends": await cost(messages("waiting")),
        "connect and disconnect": await cost(visits),
    }
    members = await hold("/pachinko", 2 * TIMES)
    for size in (TIMES, 2 * TIMES):
        for conn in itertools.islice(hub.connections, size):
            await hub.join(f"group of {size}", conn)
    figures["receiver of a group send"] = await cost(group_send)
    await release(members)
    returns = await fill()
    figures["a send to a kept group"] = await cost(keep)
    figures["a message that was missed"] = await cost(returns)
    more = await idle_bytes("/pachinko") - await idle_bytes("/falcon")
    figures["idle, more than Falcon's"] = {"bytes": round(more)}
    return figures


def measure_again(seed: int) -> Figures:
    """Measure in a fresh process, with the order of sets that *seed* gives."""
    command = [sys.executable, "-m", "benchmarks.instructions", "--json"]
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    figures: Figures = json.loads(subprocess.check_output(command, env=environment))
    return figures


def show(runs: Sequence[Figures]) -> None:
    packages = ("falcon", "attrs", "cattrs", "msgspec")
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    print(f"Python {platform.python_version()}, {', '.join(versions)}\n")
    print(f"{'one more':27}", *(f"{column:>16}" for column in COLUMNS))
    for case, columns in runs[0].items():
        cells = [
            spread([figures[case][column] for figures in runs]) if column in columns else ""
            for column in COLUMNS
        ]
        print(f"{case:27}", *(f"{cell:>16}" for cell in cells))


def spread(values: Sequence[int]) -> str:
    lowest, highest = min(values), max(values)
    return f"{lowest:,}" if lowest == highest else f"{lowest:,}-{highest:,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON instead of a table")
    output.add_argument(
        "--repeat", type=int, metavar="N",
        help="measure in N processes; print lowest-highest of what is not the same in all",
    )  # fmt: skip
    options = parser.parse_args()
    if options.repeat:
        show([measure_again(seed) for seed in range(options.repeat)])
        return
    figures = asyncio.run(measure(), debug=False)
    if options.json:
        print(json.dumps(figures))
    else:
        show([figures])


if __name__ == "__main__":
    main()
