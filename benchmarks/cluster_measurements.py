"""What is measured of a cluster: each function gives results, as those in `measurements` do."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.cluster_processes import Broker, Cluster, Entry, run_load
from benchmarks.measurements import KIB, MICRO, Bench, Measure, Result, log, noting
from benchmarks.processes import Child, ChildFailed

CHANNELS = "Django Channels, channels-redis"
ENTRIES: dict[str, Entry] = {
    "memory": Entry("Pachinko, memory://, in one process", "pachinko", None, 1),
    "memory_again": Entry("the same again", "pachinko", None, 1),
    "apart": Entry("memory://, two processes that are both told", "pachinko", None),
    "nats": Entry("Pachinko, nats://", "pachinko", "nats"),
    "redis": Entry("Pachinko, redis://", "pachinko", "redis"),
    "socketio": Entry("python-socketio, AsyncRedisManager", "socketio", "redis"),
    "litestar": Entry("Litestar channels, RedisChannelsPubSubBackend", "litestar", "redis"),
    "channels": Entry(
        f"{CHANNELS}, RedisChannelLayer", "channels", "redis", 2, ("core.RedisChannelLayer",)
    ),
    "channels_pubsub": Entry(
        f"{CHANNELS}, RedisPubSubChannelLayer", "channels", "redis", 2,
        ("pubsub.RedisPubSubChannelLayer",),
    ),
}  # fmt: skip
OURS = ("memory", "nats", "redis")
SIZE = 100  # characters of a message
WINDOW = 0.15  # CPU seconds that a round of group sends takes
FEW = 20  # receivers, all of which may ask
GROUPS = 10_000
MEMBERS = 100  # connections that share them
TOGETHER = 100  # joins
CONNECTIONS = 1000  # that do nothing
RATES = {FEW: 20, 1000: 10}  # messages a second, by receivers


class ClusterBench(Bench):
    """Entries that take turns, each with processes and a broker of its own."""

    def __init__(self, names: Iterable[str], *, rounds: int, quick: bool) -> None:
        super().__init__(list(names), rounds=rounds, quick=quick)
        self.labels = {name: entry.label for name, entry in ENTRIES.items()}
        self.clusters: dict[str, Cluster] = {}

    def entries(self, only: Iterable[str] = ENTRIES, *, again: bool = True) -> list[str]:
        return [name for name in self.names if name in only and name not in self.missing]

    @property
    def clients(self) -> Child:
        """The process of all clients."""
        if self.load is None or not self.load.is_alive:
            self.load = Child(run_load, core=-1)
        return self.load

    def choose_sizes(self) -> list[int]:
        """Receivers."""
        return [FEW, 1000] if self.quick else [2, FEW, 100, 1000]

    def open(
        self, *names: str, processes: int | None = None, cores: Sequence[int] = (0,)
    ) -> list[str]:
        """Start them in place of those that run; the names of those that can start."""
        self.stop()
        for name in names:
            entry = ENTRIES[name]
            entry = dataclasses.replace(entry, processes=processes or entry.processes)
            self.clusters[name] = Cluster(entry, cores=cores)
        for name in names:  # all of them are starting already
            try:
                for about in self.clusters[name].abouts:
                    self.versions.update(about["versions"])
            except ChildFailed as exc:
                log(f"  {name} is left out: {exc}")
                self.missing[name] = str(exc)
                self.clusters.pop(name).close()
        return list(self.clusters)

    def stop(self) -> None:
        super().stop()
        for cluster in self.clusters.values():
            cluster.close()
        self.clusters.clear()


# ── deliveries ────────────────────────────────────────────────────────────────────────────────


class Group:
    """The clients of an entry, which are all in one group."""

    def __init__(
        self, bench: ClusterBench, name: str, receivers: int, path: str, askers: int | None = None
    ) -> None:
        if name not in bench.clusters:
            raise ValueError(bench.missing[name])
        self.bench, self.receivers = bench, receivers
        self.cluster = bench.clusters[name]
        self.askers = askers or self.cluster.entry.parts
        self.key = f"{name} {path}"
        abouts = self.cluster.abouts
        self.path = abouts[0]["group_path"] if path == "/group" else path
        bench.clients.ask("grow", key=self.key, abouts=abouts, path=self.path, count=receivers)
        time.sleep(0.1)  # a peer may answer the handshake before it joins the group

    def shout(self, times: int) -> dict[str, Any]:
        """How to ask for *times* messages. Checks that everybody hears each of them once."""
        desk, askers = self.cluster.processes[0], self.askers
        frame = desk.ask("shout", size=SIZE, count=times)
        ask: dict[str, Any] = {"key": self.key, "askers": askers, "frame": frame}
        each = times * askers // self.cluster.entry.parts
        heard = self.bench.clients.ask("hear_all", each=each, **ask)
        texts, count = heard["texts"], desk.ask("count_group_messages", texts=heard["texts"])
        if count != self.receivers * each or len(texts) != count + askers:
            raise ValueError(f"{count} messages to the group in {len(texts)}: {texts[:3]!r:.300}")
        return {**ask, "size": heard["bytes"]}

    def costs(self, ask: dict[str, Any], sends: int) -> tuple[float, list[float]]:
        """CPU seconds of the broker, and of each process, for each of *sends*."""
        before = self.cluster.cpu()
        done = self.bench.clients.ask("ask_all", sends=sends, **ask)
        broker, *processes = map(operator.sub, self.cluster.cpu(), before)
        self.bench.shares.append(done["share"])
        return broker / sends, [cpu / sends for cpu in processes]


def deliveries(bench: ClusterBench) -> list[Result]:
    """Messages to a group, which grows from one result to the next."""
    bench.open(*bench.entries())
    results, sizes = [], bench.choose_sizes()
    for receivers in sizes:
        if receivers == FEW:
            results.append(requests(bench, FEW, askers=1))
            results.append(requests(bench, FEW, askers=FEW))
            results.append(shouts(bench, FEW, askers=FEW))
        results.append(shouts(bench, receivers))
    return [*results, rate(bench, sizes[-1])]


def shouts(bench: ClusterBench, receivers: int, askers: int | None = None) -> Result:
    kind, name = ("at once", f"busy-{askers}") if askers else ("alone", f"deliveries-{receivers}")
    title = f"100,000 deliveries, to {receivers:,} receivers, of messages that come {kind}"
    result = Result(name, title, "CPU s", "", "memory")
    whole = [name for name in ENTRIES if name != "apart"]  # where half of them would not hear it
    names = bench.entries(whole if askers else ENTRIES)

    def prepare(name: str) -> Measure:
        group = Group(bench, name, receivers, "/group", askers)
        ask, deliveries = group.shout(1), receivers * (askers or 1)
        group.costs(ask, 1)
        window = bench.choose(3, 1) * WINDOW / 3
        sends = min(1000, max(1, int(window / sum(group.costs(ask, 2)[1]))))

        def measure() -> float:
            broker, processes = group.costs(ask, sends)
            result.add("broker", name, broker / deliveries * receivers / MICRO)
            for n, cpu in enumerate(processes):
                result.add(f"process {n}", name, cpu / deliveries * receivers / MICRO)
            return sum(processes) / deliveries * 100_000

        return measure

    return bench.interleave(result, names, prepare, budget=60)


def requests(bench: ClusterBench, receivers: int, askers: int) -> Result:
    """Asking for no message: what the other figures have in common, and the units have not."""
    title = f"A request and its reply, {askers} at once"
    result = Result(f"request-{askers}", title, "CPU µs", "", "memory")

    def prepare(name: str) -> Measure:
        group = Group(bench, name, receivers, "/group", askers)
        ask, sends = group.shout(0), bench.choose(1000, 200) // askers
        return lambda: sum(group.costs(ask, sends)[1]) / askers / MICRO

    return bench.interleave(result, bench.entries(OURS), prepare)


def rate(bench: ClusterBench, receivers: int) -> Result:
    """What a core does that is busy all the time; in CPU time, for others may want it too."""
    title = f"Deliveries to {receivers:,} receivers in a second of a core"
    result = Result("rate", title, "deliveries", "", "memory")

    def prepare(name: str) -> Measure:
        group = Group(bench, name, receivers, "/group")
        times = bench.choose(20, 5)
        ask = group.shout(times)
        return lambda: receivers * times / sum(group.costs(ask, 1)[1])

    return bench.interleave(result, bench.entries(OURS), prepare)


# ── latency ───────────────────────────────────────────────────────────────────────────────────


def latencies(bench: ClusterBench) -> list[Result]:
    """From `hub.send` to the last receiver; the rounds are messages."""
    results = []
    for receivers, rate in RATES.items():
        title = f"From hub.send to the last of {receivers:,} receivers"
        result = Result(f"latency-{receivers}", title, "ms", "", None)
        names = bench.open(*bench.entries(OURS), cores=(0, -1))
        keys = {name: Group(bench, name, receivers, "/timed").key for name in names}
        frame = json.dumps({"type": "stamp", "payload": {"size": SIZE}})
        ask: dict[str, Any] = {"frame": frame, "every": 1 / rate, "count": rate}
        for _ in range(bench.choose(15, 2)):
            for name, key in keys.items():
                delays = bench.clients.ask("delays", key=key, **ask)
                result.rounds.setdefault(name, []).extend(1000 * delay for delay in delays)
        results.append(result)
    return results


# ── groups ────────────────────────────────────────────────────────────────────────────────────


def groups(bench: ClusterBench) -> list[Result]:
    """One process with many groups, each round a fresh one."""
    titles = {
        "join": ("A join of a new group, one after the other", "CPU µs"),
        "join-ms": ("A join of a new group, one after the other", "ms"),
        "join-broker": ("The same for the broker", "CPU µs"),
        "join-last": ("The last tenth of these joins", "CPU µs"),
        "join-together": (f"A join, {TOGETHER} at the same time", "CPU µs"),
        "join-together-ms": (f"A join, {TOGETHER} at the same time", "ms"),
        "leave": ("A leave of a group's last member", "CPU µs"),
        "group-kib": ("A group with a member, resident", "KiB"),
        "broker-kib": ("The same in the broker", "KiB"),
        "restore": (f"From the broker's restart to {GROUPS:,} groups restored", "s"),
        "restore-cpu": ("CPU time of the process for that, and for the gaps it tells of", "CPU s"),
    }
    results = {name: Result(name, title, unit, "", None) for name, (title, unit) in titles.items()}
    for _ in range(bench.choose(3, 1)):
        for name in bench.entries(OURS):
            with noting(results["join"], name):
                for figure, value in many_groups(bench, name).items():
                    results[figure].rounds.setdefault(name, []).append(value)
    return list(results.values())


def many_groups(bench: ClusterBench, name: str) -> dict[str, float]:
    bench.open(name, processes=1)
    clients, count = Group(bench, name, MEMBERS, "/many"), GROUPS
    cluster = clients.cluster

    def do(what: str, first: int, count: int, **options: int) -> tuple[float, float]:
        """Microseconds of CPU time, and of time, for each of *count*."""
        payload = {"first": first, "count": count, **options}
        frame = json.dumps({"type": what, "id": 1, "payload": payload})
        text = bench.clients.ask("ask", key=clients.key, frame=frame, start='{"type":"spent"')
        spent = json.loads(text)["payload"]
        return spent["cpu"] / count / MICRO, spent["wall"] / count / MICRO

    def resident() -> tuple[int, int]:
        return cluster.collect()[0], cluster.broker.memory() if cluster.broker else 0

    do("enter", count, 100)  # what is made when it is first used
    do("leave", count, 100)
    figures: dict[str, float] = {}
    before, broker = resident(), cluster.cpu()[0]
    tenths = [do("enter", first, count // 10) for first in range(0, count, count // 10)]
    figures["join"] = statistics.mean(cpu for cpu, _ in tenths)
    figures["join-last"] = tenths[-1][0]
    figures["join-ms"] = statistics.mean(wall for _, wall in tenths) / 1000
    figures["join-broker"] = (cluster.cpu()[0] - broker) / count / MICRO
    kib = [(now - then) / count / KIB for now, then in zip(resident(), before, strict=True)]
    figures["group-kib"], figures["broker-kib"] = kib
    figures["leave"], _ = do("leave", 0, count)
    together, wall = do("enter", 0, count, together=TOGETHER)
    figures["join-together"], figures["join-together-ms"] = together, wall / 1000
    if cluster.broker:
        figures["restore"], figures["restore-cpu"] = restore(cluster, cluster.broker)
    return figures


def restore(cluster: Cluster, broker: Broker) -> tuple[float, float]:
    """Seconds, and CPU seconds, from when a restarted broker takes connections."""
    broker.kill()
    cluster.wait_until_broker_is(down=True)
    broker.start()
    begun, (_, cpu) = time.perf_counter(), cluster.cpu()
    cluster.wait_until_broker_is(down=False)
    return time.perf_counter() - begun, cluster.cpu()[1] - cpu


# ── memory ────────────────────────────────────────────────────────────────────────────────────


def memory(bench: ClusterBench) -> list[Result]:
    """Clients that do nothing, in one group of a fresh process that has as many already."""
    count = CONNECTIONS
    title = f"An idle connection, of {count:,}"
    result = Result("connection-kib", title, "KiB", "", None)

    def measure(name: str) -> float:
        bench.open(name, processes=1)
        cluster = Group(bench, name, count, "/group").cluster
        before = cluster.collect()[0]
        Group(bench, name, 2 * count, "/group")
        return (cluster.collect()[0] - before) / count / KIB

    names, rounds = bench.entries(OURS), bench.choose(3, 1)
    prepare = functools.partial(functools.partial, measure)
    return [bench.interleave(result, names, prepare, rounds=rounds)]
