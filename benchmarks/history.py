"""What kept groups and resuming cost: ``python -m benchmarks.history``.

Everything but the storm is CPU time in process, without a server; what is compared takes turns, and
a ratio is the median of those of the rounds. In the storm all clients of a server come back at
once, over sockets. Peers are measured where they are installed.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import falcon.asgi
import uvloop

from benchmarks import driver, load, peers, server
from benchmarks.driver import Call, scope
from benchmarks.figures import aligned, summary
from benchmarks.machine import machine, packages
from benchmarks.measurements import log
from benchmarks.processes import Child, ChildFailed, Pipe, allow_open_files, answer_all, explained
from pachinko import Connection, Hub, Pachinko

PEERS = ("bare", "pachinko", "litestar", "socketio")
TEXT = "x" * 100
RECEIVERS = (1, 10, 100, 1000)
SIZES = (20, 100, 1000, 10_000)
MISSED, STORM_MISSED = 100, 50
CLIENTS = 10_000
PER_TURN = 256  # of the clients that come back within one turn of the loop, in process

# ── a process of its own ──────────────────────────────────────────────────────────────────────

hub = Hub()
hub.keep("kept", messages=1000, bytes=100_000_000)
app = falcon.asgi.App()
ws = Pachinko(app, "/ws", hub=hub, auth_timeout=600)  # it also bounds the wait for `resume`


@ws.connect
async def arrive(conn: Connection) -> None:
    for group in ("plain", "kept"):
        await conn.join(group)


class Turns:
    """CPU seconds of the event loop from now on, and of its longest turn, or a millisecond more.

    A callback that is due each millisecond comes as late as the turn is long. One for each turn
    would be more exact, but the loop would never wait.
    """

    def __init__(self) -> None:
        self.longest, self._is_over = 0.0, False
        self._begun = self._last = time.thread_time()
        self._next()

    def _next(self) -> None:
        now = time.thread_time()
        self.longest, self._last = max(self.longest, now - self._last), now
        if not self._is_over:
            asyncio.get_running_loop().call_later(0.001, self._next)

    def end(self) -> dict[str, float]:
        """Return both."""
        self._is_over = True
        return {"turn": self.longest, "cpu": time.thread_time() - self._begun}


class Own:
    """The commands: what Pachinko alone is measured for."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    async def about(self) -> dict[str, Any]:
        self.lifespan = Call(
            app, {"type": "lifespan", "asgi": {"version": "3.0"}}, "lifespan.startup"
        )
        await self.lifespan.until(1)
        return {"versions": server.versions(*import_module("benchmarks.peers.pachinko_").PACKAGES)}

    async def grow(self, count: int) -> None:
        """Have *count* members, of both groups."""
        while len(self.calls) < count:
            self.calls.append(Call(app, scope("/ws"), "websocket.connect"))
            await self.calls[-1].until(1)
            self.calls[-1].sent = self.calls[0].sent

    async def send(self, group: str, times: int) -> float:
        """CPU seconds for a group send, until all have it."""
        first, last = self.calls[0], self.calls[-1]
        before = time.process_time()
        for number in range(first.sent + 1, first.sent + 1 + times):
            await hub.send(group, "heard", TEXT)
            while min(first.sent, last.sent) < number:  # noqa: ASYNC110 - it counts turns, too
                await asyncio.sleep(0)
        return (time.process_time() - before) / times

    async def weigh(self, size: int, count: int) -> tuple[float, float]:
        """Bytes that a kept message takes, and how many of them `history_bytes` counts."""
        group, text = f"kept {size}", "x" * size
        await hub.send(group, "heard", text)
        gc.collect()
        tracemalloc.start()
        for _ in range(count):
            await hub.send(group, "heard", text)
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert hub.state.history is not None
        kept = hub.state.history.rings.last(group, count)
        assert len(kept) == count
        return taken / count, sum(each.weight for each in kept) / count

    async def replay(self, clients: int, missed: int) -> dict[str, float]:
        """The turns of the loop while *clients* resume, some of them in each turn, in process."""
        position = await hub.position("kept")
        calls = [
            Call(app, scope("/ws?resume=message"), "websocket.connect") for _ in range(clients)
        ]
        for call in calls:
            await call.until(1)
        for _ in range(missed):
            await hub.send("kept", "heard", TEXT)
        gc.collect()
        gc.freeze()  # else a pass over all connections may come in between
        text = f'{{"type":"resume","payload":{{"groups":{{"kept":"{position}"}}}}}}'
        turns = Turns()
        for start in range(0, clients, PER_TURN):
            for call in calls[start : start + PER_TURN]:
                call.feed([text])
            await asyncio.sleep(0)
        for call in calls:
            await call.until(1 + missed + 1)  # and the verdict
        figures = turns.end()
        gc.unfreeze()
        await asyncio.gather(*(call.end() for call in calls))
        return figures

    async def end(self) -> None:
        await asyncio.gather(*(call.end() for call in self.calls))
        self.lifespan.inbox.append({"type": "lifespan.shutdown"})
        self.lifespan.has_more.set()
        await self.lifespan.task


# ── beside others ─────────────────────────────────────────────────────────────────────────────


@contextmanager
def with_history() -> Iterator[None]:
    """Let the harness find the peers that keep what they have sent."""

    def find(name: str) -> Any:
        return import_module(f"benchmarks.peers.history_{name}")

    with mock.patch.object(peers, "load", find), mock.patch.object(server, "Desk", Desk):
        yield


class Driver(driver.Driver):
    """One peer's app, without a server."""

    async def fill(self, missed: int) -> None:
        """Send *missed* messages, behind the position that clients will come back with."""
        holder = Call(self.app, scope(self.wire.group_path), "websocket.connect")
        holder.feed(text for text, _ in self.wire.prelude if text is not None)
        heard = await holder.until(1 + len(self.wire.prelude))
        self.target, self.missed, self.holder = self.peer.target(heard), missed, holder
        if missed:
            await holder.ask(self.wire.shout(missed, TEXT), answers=missed + 1)

    async def come_back(self, count: int) -> float:
        """CPU seconds for a connection that gets what it missed, and leaves."""
        before = time.process_time()
        for _ in range(count):
            call = Call(self.app, scope(self.target), "websocket.connect")
            call.feed(self.peer.FRAMES)
            await call.until(1 + self.peer.OTHERS + self.missed)
            await call.end()
        return (time.process_time() - before) / count


class Desk(server.Desk):
    """Answers about the process that is served."""

    def target(self, heard: str) -> dict[str, Any]:
        """How a client comes back that has *heard* this when it came."""
        peer = self.peer
        return {"back": peer.target(heard), "frames": peer.FRAMES, "others": peer.OTHERS}

    def watch(self) -> None:
        """Note each turn of the loop from now on."""
        gc.collect()
        self.turns, self.before = Turns(), self.peak()

    def seen(self) -> dict[str, float]:
        return {**self.turns.end(), "memory": self.peak() - self.before}

    def peak(self) -> int:
        """The most resident bytes so far, of this process (Linux, proc_pid_status(5))."""
        _, _, rest = Path("/proc/self/status").read_text().partition("VmHWM:")
        return int(rest.split()[0]) * 1024


class Returning(load.Client):
    """Counts the texts that come, until all are there."""

    expected = 0  # of the class, for all of them
    count = 0
    last = b""

    def keep_texts(self, data: bytes) -> None:
        if not self.expected:
            return super().keep_texts(data)
        payloads, self.rest = load.split(self.rest + data)
        if payloads:
            self.count, self.last = self.count + len(payloads), payloads[-1]
            if self.count == self.expected:
                self.crowd.arrived(1)
        self.wake()


class Storm(load.Load):
    """The clients."""

    async def hold(self, about: dict[str, Any]) -> str:
        """Connect one that stays; return the last text that it hears at first, if it does."""
        bare, heard = {**about, "prelude": ()}, ""
        self.holder = await load.connect(load.Crowd(), bare, "group_path")
        for text, start in about["prelude"]:
            if text is not None:
                self.holder.transport.write(load.masked(text))
            if start is not None:
                heard = await self.holder.text()
        return heard

    async def shout(self, frame: str, answers: int) -> None:
        self.holder.transport.write(load.masked(frame))
        for _ in range(answers):
            await self.holder.text()

    async def come_back(
        self, about: dict[str, Any], frames: Sequence[str], count: int, expected: int
    ) -> float:
        """Connect *count* clients at once; return the seconds until all have what they missed."""
        Returning.expected, crowd = expected, load.Crowd()
        at_once = asyncio.Semaphore(server.BACKLOG // 4)
        everybody = crowd.expect(count)

        async def one() -> None:
            async with at_once:
                client = await load.connect(crowd, {**about, "prelude": ()}, "back")
            for frame in frames:
                client.transport.write(load.masked(frame))
            if not expected:
                crowd.arrived(1)

        begun = time.perf_counter()
        async with asyncio.timeout(240), asyncio.TaskGroup() as tasks:
            for _ in range(count):
                tasks.create_task(one())
            await everybody
        return time.perf_counter() - begun


def run_own(pipe: Pipe) -> None:
    answer_all(pipe, Own)


def run_driver(pipe: Pipe, name: str) -> None:
    with with_history():
        answer_all(pipe, functools.partial(Driver, name))


def run_server(pipe: Pipe, name: str) -> None:
    with explained(pipe), with_history():
        allow_open_files()
        uvloop.run(server.serve(name, pipe))


def run_storm(pipe: Pipe) -> None:
    with mock.patch.object(load, "Client", Returning):
        answer_all(pipe, Storm)


# ── the whole ─────────────────────────────────────────────────────────────────────────────────

Row = Sequence[str]


def sends(own: Child, rounds: int) -> Iterator[Row]:
    """What a send to a kept group costs, beside one to a group that is not."""
    yield "a group send to", "not kept, µs", "kept, µs", "ratio", "noise"
    for receivers in RECEIVERS:
        own.ask("grow", count=receivers)
        times = max(20, 4000 // (receivers + 20))
        plain, kept, again = list[float](), list[float](), list[float]()
        for _ in range(rounds):
            for figures, group in ((plain, "plain"), (kept, "kept"), (again, "plain")):
                figures.append(own.ask("send", group=group, times=times) * 1e6)
        yield (
            f"{receivers:,}", f"{statistics.median(plain):.3g}", f"{statistics.median(kept):.3g}",
            ratio(kept, plain), ratio(again, plain),
        )  # fmt: skip


def ratio(figures: Sequence[float], others: Sequence[float]) -> str:
    return f"{summary([a / b for a, b in zip(figures, others, strict=True)])[0]:.2f}"


def weights(own: Child) -> Iterator[Row]:
    yield "characters", "bytes that a kept message takes", "counted"
    for size in SIZES:
        taken, counted = own.ask("weigh", size=size, count=500)
        yield f"{size:,}", f"{taken:,.0f}", f"{counted:,.0f}"


def replays(own: Child) -> Iterator[Row]:
    yield "clients that resume", "messages each", "µs CPU a client", "longest turn, ms"
    for missed in (0, STORM_MISSED):
        found = own.ask("replay", clients=CLIENTS, missed=missed)
        yield (
            f"{CLIENTS:,}", f"{missed}", f"{found['cpu'] / CLIENTS * 1e6:.0f}",
            f"{found['turn'] * 1e3:.1f}",
        )  # fmt: skip


def started(
    names: Sequence[str], start: Callable[[str], Child], versions: dict[str, str]
) -> dict[str, Child]:
    """The children of the peers that are installed."""
    children = {}
    for name in names:
        child = start(name)
        try:
            versions.update(child.about["versions"])
        except ChildFailed as exc:
            log(f"  {name} is left out: {exc}")
            child.close()
        else:
            children[name] = child
    return children


def resumes(names: Sequence[str], rounds: int, versions: dict[str, str]) -> Iterator[Row]:
    """What it costs to come back, with and without messages that were missed."""
    yield "in process, µs", "nothing missed", f"{MISSED} missed", "a message", "ratio"
    children = {
        missed: started(names, lambda name: Child(run_driver, name), versions)
        for missed in (0, MISSED)
    }
    figures: dict[tuple[str, int], list[float]] = {}
    for missed, each in children.items():
        for child in each.values():
            child.ask("fill", missed=missed)
            child.ask("come_back", count=20)
    for _ in range(rounds):
        for name in children[0]:
            for missed, each in children.items():
                cost = each[name].ask("come_back", count=20) * 1e6
                figures.setdefault((name, missed), []).append(cost)
    labels = {name: children[0][name].about["label"] for name in children[0]}
    costs = {
        name: [
            (a - b) / MISSED for a, b in zip(figures[name, MISSED], figures[name, 0], strict=True)
        ]
        for name in labels
    }
    for name, label in labels.items():
        yield (
            label,
            *(f"{statistics.median(figures[name, missed]):,.0f}" for missed in (0, MISSED)),
            f"{statistics.median(costs[name]):.2f}",
            ratio(costs[name], costs["bare"]) if "bare" in costs else "",
        )
    for each in children.values():
        for child in each.values():
            child.close()


def storms(names: Sequence[str], clients: int, versions: dict[str, str]) -> Iterator[Row]:
    """Let all clients of a server come back at once, over sockets."""
    yield (
        f"{clients:,} clients, over sockets", "missed, each", "s", "ms CPU a client",
        "KiB a client", "longest turn, ms",
    )  # fmt: skip
    for name in names:
        for missed in (0, STORM_MISSED):
            for child in started([name], lambda name: Child(run_server, name), versions).values():
                crowd = Child(run_storm, core=-1)
                try:
                    row = storm(child, crowd, clients, missed)
                    log(f"  {row}")
                    yield row
                except ChildFailed as exc:
                    log(f"  {name}: {exc}")
                child.close()
                crowd.close()


def storm(child: Child, crowd: Child, clients: int, missed: int) -> Row:
    heard = crowd.ask("hold", about=child.about)
    if missed:
        frame = child.ask("shout", size=len(TEXT)).replace('"count":1', f'"count":{missed}')
        crowd.ask("shout", frame=frame, answers=missed + 1)
    found = child.ask("target", heard=heard)
    about = {**child.about, "back": found["back"]}
    child.ask("watch")
    seconds = crowd.ask(
        "come_back", about=about, frames=found["frames"], count=clients,
        expected=missed + found["others"], timeout=300,
    )  # fmt: skip
    seen = child.ask("seen")
    return (
        child.about["label"], f"{missed}", f"{seconds:.1f}",
        f"{seen['cpu'] / clients * 1000:.2f}",
        f"{seen['memory'] / clients / 1024:.1f}", f"{seen['turn'] * 1000:.0f}",
    )  # fmt: skip


PARTS = ("sends", "weights", "replays", "resumes", "storms")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.history", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--clients", type=int, default=CLIENTS, help="of the storm")
    options = parser.parse_args()
    own = Child(run_own)
    versions: dict[str, str] = own.about["versions"]
    for part in options.only:
        rows = {
            "sends": lambda: sends(own, options.rounds),
            "weights": lambda: weights(own),
            "replays": lambda: replays(own),
            "resumes": lambda: resumes(options.peers, options.rounds, versions),
            "storms": lambda: storms(options.peers, options.clients, versions),
        }[part]()
        head, *found = rows
        print(aligned([head, ["---"] + ["---:"] * (len(head) - 1), *found]), end="\n\n")
    own.close()
    about = {**machine(), "Packages": packages(versions), "Rounds": str(options.rounds)}
    print("\n".join(f"{name}: {text}" for name, text in about.items()))


if __name__ == "__main__":
    main()
