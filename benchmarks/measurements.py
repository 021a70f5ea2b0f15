"""What is measured: each function in `MEASUREMENTS` gives one result or several."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import driver, growth, load, peers, server
from benchmarks.processes import Child, ChildFailed

AGAIN = "bare again"  # the same as "bare", for the noise
FALCON = ("bare", "falcon_expert", "pachinko")
MICRO, KIB, MIB = 1e-6, 2**10, 2**20
WINDOW = 0.15  # seconds that an entry is measured in one round

Measure = Callable[[], float]
numbers = itertools.count()


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass
class Result:
    """The figures of each entry, a peer or a case of one, round by round."""

    name: str
    title: str
    unit: str
    method: str
    baseline: str | None = "bare"
    is_difference: bool = False  # to the baseline, where a ratio would say little
    rounds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    more: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # by column and entry

    def add(self, column: str, entry: str, figure: float) -> None:
        """A figure beside the one that is measured."""
        self.more.setdefault(column, {}).setdefault(entry, []).append(figure)

    def compared(self, entry: str) -> list[float]:
        """To the baseline, round by round."""
        pairs = zip(self.rounds[entry], self.rounds.get(self.baseline or "", []), strict=False)
        return [a - b if self.is_difference else a / b for a, b in pairs]


@contextlib.contextmanager
def noting(result: Result, entry: str) -> Iterator[None]:
    """One that fails is told of, and does not end the run."""
    try:
        yield
    except (ChildFailed, ValueError) as exc:
        log(f"  {entry}: {exc}")
        result.errors[entry] = str(exc)


class Bench:
    """What the measurements share: processes that are kept for the next one, and what to do."""

    def __init__(
        self, names: Sequence[str], *, rounds: int, quick: bool, window: float = WINDOW
    ) -> None:
        self.names = names
        self.rounds = rounds
        self.quick = quick
        self.window = window
        self.labels: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self.missing: dict[str, str] = {}  # peers that cannot start, and why
        self.shares: list[float] = []  # of a core, the load client's
        self.target: Callable[..., None] | None = None
        self.children: dict[str, Child] = {}  # of that target, by entry
        self.load: Child | None = None

    def choose(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def entries(self, only: Iterable[str] = peers.NAMES, *, again: bool = True) -> list[str]:
        names = [name for name in self.names if name in only and name not in self.missing]
        return [*names, AGAIN] if again and "bare" in names else names

    def start(self, target: Callable[..., None], entries: Iterable[str]) -> dict[str, Child]:
        """The processes of *entries*, as far as they can start; those of another target end."""
        if target is not self.target:
            self.stop()
            self.target = target
        names = {entry: entry.removesuffix(" again") for entry in entries}
        for entry, name in names.items():
            if entry not in self.children or not self.children[entry].is_alive:
                self.children[entry] = Child(target, name)
        for entry, name in names.items():  # all of them are starting already
            try:
                about = self.children[entry].about
            except ChildFailed as exc:
                log(f"  {name} is left out: {exc}")
                self.missing[name] = str(exc)
                self.children.pop(entry).close()
            else:
                self.labels[name] = about["label"]
                self.versions.update(about["versions"])
        return {entry: self.children[entry] for entry in names if entry in self.children}

    def stop(self) -> None:
        for child in self.children.values():
            child.close()
        self.children.clear()
        if self.load is not None:
            self.load.close()
            self.load = None

    def interleave(
        self,
        result: Result,
        entries: Iterable[str],
        prepare: Callable[[str], Measure],
        *,
        rounds: int | None = None,
        budget: float = 60.0,
    ) -> Result:
        """Round by round, measure every entry in turn; *budget* is in seconds, for each."""
        measures: dict[str, Measure] = {}
        for entry in entries:
            with noting(result, entry):
                measures[entry] = prepare(entry)
        spent = dict.fromkeys(measures, 0.0)
        for _ in range(rounds or self.rounds):
            for entry, measure in measures.items():
                if entry not in result.errors and spent[entry] < budget:
                    begun = time.perf_counter()
                    with noting(result, entry):
                        result.rounds.setdefault(entry, []).append(measure())
                    spent[entry] += time.perf_counter() - begun
        result.rounds = {entry: figures for entry, figures in result.rounds.items() if figures}
        for entry, figures in result.rounds.items():
            log(f"  {entry}: {statistics.median(figures):.4g} {result.unit}")
        return result


# ── in process ────────────────────────────────────────────────────────────────────────────────


def dispatch_in_process(bench: Bench) -> list[Result]:
    method = (
        "CPU time to take one of ten message types, validate three fields and reply. The ASGI app "
        "is called without a server; the messages have all arrived."
    )
    result = Result("dispatch-in-process", "A message, in process", "µs", method)
    no_asgi = {"websockets_library"}
    children = bench.start(driver.run, bench.entries(set(peers.NAMES) - no_asgi))
    return [bench.interleave(result, children, answering(bench, children, "dispatch"))]


def alone_in_process(bench: Bench) -> list[Result]:
    method = (
        "CPU time to take one of ten message types and reply, where each message comes when the "
        "one before has been answered: the app and its client wake each other up. On asyncio's "
        "event loop, without a server."
    )
    result = Result("alone-in-process", "A message that comes alone, in process", "µs", method)
    children = bench.start(driver.run_on_asyncio, bench.entries(FALCON))
    return [bench.interleave(result, children, answering(bench, children, "alone"))]


def answering(bench: Bench, children: dict[str, Child], do: str) -> Callable[[str], Measure]:
    """Prepares an entry to answer messages in the way that its command *do* feeds them."""

    def prepare(entry: str) -> Measure:
        child = children[entry]
        child.ask(do, messages=50)
        messages = max(50, int(bench.window / child.ask(do, messages=200)))
        return lambda: float(child.ask(do, messages=messages)) / MICRO

    return prepare


def connections_in_process(bench: Bench) -> list[Result]:
    return [*coming_and_going(bench), *staying(bench)]


def coming_and_going(bench: Bench) -> list[Result]:
    method = "CPU time from the handshake to the end of the app's call, without a server."
    title = "A connection that comes and goes, in process"
    result = Result("connect-in-process", title, "µs", method)
    children = bench.start(driver.run, bench.entries(FALCON))

    def prepare(entry: str) -> Measure:
        child = children[entry]
        count = max(50, int(bench.window / child.ask("come_and_go", count=200)))
        return lambda: float(child.ask("come_and_go", count=count)) / MICRO

    return [bench.interleave(result, children, prepare)]


def staying(bench: Bench) -> list[Result]:
    count = bench.choose(2000, 500)
    method = (
        f"What Python allocates for each of {count:,} connections in one group (tracemalloc), "
        "including what the fake server does; so the difference counts."
    )
    title = "An idle connection, in process"
    result = Result("memory-in-process", title, "KiB", method, "falcon_expert", True)
    children = bench.start(driver.run, bench.entries(FALCON))

    def prepare(entry: str) -> Measure:
        return lambda: float(children[entry].ask("memory", count=count)) / KIB

    return [bench.interleave(result, children, prepare, rounds=bench.choose(3, 1))]


def hold(bench: Bench) -> list[Result]:
    receivers = bench.choose(10_000, 2000)
    children = bench.start(driver.run, bench.entries(("bare", "pachinko"), again=False))
    title = f"How long one group send to {receivers:,} receivers holds the event loop"
    method = (
        "The longest time between two turns of the loop, in process. Another client asks something "
        "at each turn; its answers are those that it gets before the group send is over."
    )
    result = Result("hold", title, "ms", method)

    def prepare(entry: str) -> Measure:
        def measure() -> float:
            figures = children[entry].ask("hold", receivers=receivers)
            result.add("answers", entry, figures["answers"])
            return float(figures["longest"]) * 1000

        return measure

    return [bench.interleave(result, children, prepare, budget=15)]


CURVES = {
    "types": ("A message, by registered types", (10, 100, 1000)),
    "groups": ("A message, by groups in the hub", (1, 1000, 100_000)),
    "receivers": ("A group send, for each receiver, by receivers", (100, 500, 1000, 5000)),
    "loop": ("A bare loop that awaits the same sends, for each receiver", (100, 500, 1000, 5000)),
    "join": ("Leave and join, by groups in the hub", (1, 1000, 100_000)),
    "members": ("Leave and join, by members of the group", (1, 1000, 100_000)),
}


def growing(bench: Bench) -> list[Result]:
    results = []
    for curve, (title, sizes) in CURVES.items() if "pachinko" in bench.entries() else ():
        used = [size for size in sizes if size <= bench.choose(100_000, 10_000)]
        cases = [f"{size:,}" for size in used]
        method = "CPU time in process, of Pachinko unless it says otherwise."
        result = Result(f"growth-{curve}", title, "µs", method, cases[0])
        child, times = Child(growth.run), bench.choose(20_000, 5000)
        with noting(result, "pachinko"):
            figures = child.ask(
                "measure", curve=curve, sizes=used, times=times, rounds=bench.rounds
            )
            for case, costs in zip(cases, figures, strict=True):
                result.rounds[case] = [cost / MICRO for cost in costs]
                log(f"  {curve} {case}: {statistics.median(result.rounds[case]):.4g} µs")
        child.close()
        results.append(result)
    return results


# ── over sockets ──────────────────────────────────────────────────────────────────────────────


class Served:
    """A peer's server together with the load client."""

    def __init__(self, bench: Bench, entry: str) -> None:
        self.bench = bench
        self.entry = entry
        self.server = bench.children[entry]
        self.shares = bench.shares

    @property
    def load(self) -> Child:
        """One for all, and another when that was given up because a peer did not answer it."""
        if self.bench.load is None or not self.bench.load.is_alive:
            self.bench.load = Child(load.run, core=-1)
        return self.bench.load

    def connect(self, path: str, count: int, **options: Any) -> str:
        """Connect a crowd of clients; the key to call it by."""
        key = f"{self.entry} {next(numbers)}"
        about = self.server.about
        self.load.ask("open", key=key, about=about, path=path, count=count, **options)
        time.sleep(0.1)  # a peer may answer the handshake before it joins the group
        return key

    def check_replies(self, key: str) -> None:
        texts = self.load.ask("sample", key=key, frames=self.server.about["requests"][:20])
        if not self.server.ask("check_replies", texts=texts):
            raise ValueError(f"wrong replies: {texts!r:.300}")

    def check_group(self, key: str, shout: str, receivers: int) -> int:
        """Check that everybody hears a group send; the bytes of one."""
        heard = self.load.ask("hear", key=key, frame=shout)
        texts, count = heard["texts"], self.server.ask("count_group_messages", texts=heard["texts"])
        if count != receivers or len(texts) != receivers + 1:
            raise ValueError(f"{count} messages to the group in {len(texts)}: {texts[:3]!r:.300}")
        return int(heard["bytes"])

    def cpu(self, do: str, **arguments: Any) -> tuple[float, dict[str, Any]]:
        """CPU seconds of the server while the load client does something; what that gives."""
        before = self.server.ask("usage")
        done: dict[str, Any] = self.load.ask(do, **arguments)
        after = self.server.ask("usage")
        self.shares.append(done["share"])
        return after["cpu"] - before["cpu"], done


def serve(bench: Bench, entries: Iterable[str]) -> dict[str, Served]:
    return {entry: Served(bench, entry) for entry in bench.start(server.run, entries)}


def dispatch(bench: Bench) -> list[Result]:
    connections, window = 32, 16
    method = (
        f"CPU time of the server for the same work; {connections} connections with {window} "
        "requests each on their way."
    )
    result = Result("dispatch", "A message, over sockets", "µs", method)
    served = serve(bench, bench.entries())

    def prepare(entry: str) -> Measure:
        one = served[entry]
        frames = one.server.about["requests"]
        key = one.connect("path", connections)
        one.check_replies(key)

        def run(messages: int) -> tuple[float, float]:
            cpu, done = one.cpu(
                "dispatch", key=key, frames=frames, messages=messages, window=window
            )
            return cpu / messages, messages / done["wall"]

        run(1000)
        messages = max(1000, int(bench.window / run(1000)[0]))

        def measure() -> float:
            cost, rate = run(messages)
            result.add("messages/s", entry, rate)
            return cost / MICRO

        return measure

    return [bench.interleave(result, served, prepare)]


def group(bench: Bench) -> list[Result]:
    served = serve(bench, bench.entries())
    one = next(iter(served.values()))
    most: int = (one.load.about["files"] - 1000) // len(served)
    receivers = min(bench.choose(1000, 200), most)
    title = f"A delivery to one of {receivers:,} receivers, over sockets"
    method = (
        "CPU time of the server for each receiver of a group send of 100 characters; the next is "
        "asked for when everybody has the one before."
    )
    result = Result("group", title, "µs", method)

    def prepare(entry: str) -> Measure:
        one = served[entry]
        shout = one.server.ask("shout", size=100)
        key = one.connect("group_path", receivers)
        size = one.check_group(key, shout, receivers)

        def run(sends: int) -> float:
            cpu, done = one.cpu("group", key=key, frame=shout, sends=sends, size=size, patience=10)
            if not done["result"]:
                raise ValueError("a group send never came to its end")
            return float(cpu) / sends / receivers

        run(2)
        sends = max(2, int(bench.window / run(2) / receivers))
        return lambda: run(sends) / MICRO

    return [bench.interleave(result, served, prepare, budget=30)]


def connections(bench: Bench) -> list[Result]:
    count = 320
    method = "CPU time of the server from the TCP connection to its end, 16 at once."
    title = "A connection that comes and goes, over sockets"
    result = Result("connect", title, "µs", method)
    served = serve(bench, bench.entries(FALCON))

    def prepare(entry: str) -> Measure:
        def measure() -> float:
            one = served[entry]
            cpu, _ = one.cpu("come_and_go", about=one.server.about, path="path", count=count)
            return cpu / count / MICRO

        measure()
        return measure

    return [bench.interleave(result, served, prepare)]


def stalled(bench: Bench) -> list[Result]:
    others, size, sends = 99, 10_000, bench.choose(400, 150)
    method = (
        f"How fast the {others} others get {sends} messages of {size // 1000} KB (fewer where that "
        "takes many seconds), compared with the same without the one that does not read; 0 where "
        "nothing arrives any more. The "
        "server's send buffers are limited to 64 KiB, so that it soon cannot write to it. Beside: "
        "the CPU time of a delivery compared in the same way, and by how much the server's "
        "resident memory grows."
    )
    title = "One client that stops reading, in a group of 100"
    result = Result("stalled", title, "of the rate", method, None)
    served = serve(bench, bench.entries(again=False))

    def run(entry: str, shout: str, sends: int, **options: Any) -> tuple[float, float]:
        """Group sends per second, and per CPU second."""
        one = served[entry]
        key = one.connect("group_path", others)
        size = one.check_group(key, shout, others)
        stalled = one.connect("group_path", 1, **options) if options else None
        before = one.server.ask("usage")
        cpu, done = one.cpu(
            "group",
            key=key,
            frame=shout,
            sends=sends,
            size=size,
            patience=bench.choose(2, 1),
            stalled=stalled,
        )
        after = one.server.ask("usage")
        if stalled:
            result.add("MiB", entry, (after["memory"] - before["memory"]) / MIB)
        if stalled and "evicted" in after["stats"]:
            result.add("closed", entry, after["stats"]["evicted"] - before["stats"]["evicted"])
        one.load.ask("close", key=stalled)
        one.load.ask("close", key=key)
        return (sends / done["wall"], sends / cpu) if done["result"] else (0, 0)

    def prepare(entry: str) -> Measure:
        server = served[entry].server
        server.ask("limit_send_buffers", size=65536)
        shout = server.ask("shout", size=size)
        first, _ = run(entry, shout, 20)
        times = max(20, min(sends, round(5 * first)))

        def measure() -> float:
            if 0.0 in result.rounds[entry]:
                return 0.0  # it may not have recovered
            rate, per_cpu = run(entry, shout, times)
            if not rate:
                raise ValueError("nothing arrives, without a stalled client either")
            rate_then, per_cpu_then = run(entry, shout, times, buffer=4096)
            if rate_then:
                result.add("CPU", entry, per_cpu / per_cpu_then)
            return rate_then / rate

        return measure

    bench.interleave(result, served, prepare, budget=bench.choose(15, 2))
    bench.stop()  # some of them may wait for ever
    return [result]


def memory(bench: Bench) -> list[Result]:
    count = bench.choose(1000, 800)
    method = (
        f"Resident memory of a fresh server for each of {count:,} connections in one group that "
        "has as many already, without compression."
    )
    title = "An idle connection, over sockets"
    result = Result("memory", title, "KiB", method, "falcon_expert", True)

    def prepare(entry: str) -> Measure:
        def measure() -> float:
            bench.stop()
            if entry not in (served := serve(bench, [entry])):
                raise ValueError(bench.missing[entry.removesuffix(" again")])
            one = served[entry]
            one.connect("group_path", count)  # it takes up what was left over from starting
            before = one.server.ask("collect")
            one.connect("group_path", count)
            return float(one.server.ask("collect") - before) / count / KIB

        return measure

    return [bench.interleave(result, bench.entries(), prepare, rounds=bench.choose(3, 1))]


MEASUREMENTS: dict[str, Callable[[Bench], list[Result]]] = {
    "dispatch-in-process": dispatch_in_process,
    "alone-in-process": alone_in_process,
    "connections-in-process": connections_in_process,
    "hold": hold,
    "growth": growing,
    "dispatch": dispatch,
    "group": group,
    "connections": connections,
    "stalled": stalled,
    "memory": memory,
}
