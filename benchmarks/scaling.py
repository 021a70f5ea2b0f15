"""What a million connections take: computed and simulated from unit costs that were measured.

``python -m benchmarks.scaling`` prints the tables of docs/scaling.md; ``--markdown FILE`` writes
them there, ``--plot FILE`` draws a picture. What a delivery, a message and a subscription cost
comes from docs/benchmarks/cluster.json, which `benchmarks.cluster` measures.
What is assumed beyond that is in `Assumed`.

Nothing here measures anything. Where there is a formula it is used; what has none, or one that
should not be taken on trust, is simulated: where connections come to lie, peaks of the load, and
all processes at once at a broker that has been restarted.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

COSTS = Path(__file__).parent.parent / "docs" / "benchmarks" / "cluster.json"
SEED = 1
BROKERS = {"nats": "NATS", "redis": "Redis"}
NEEDED = ("delivery_us", "message_us", "broker_us", "restore_s")  # of each broker
RESTORED = 10_000  # the groups of restore_s
MOST = 1_000_000_000  # processes: something is wrong with the costs
MEGA = 1e6
PROCESSES = (10, 50, 100, 300, 1000)  # for the placement
LONG_AWAY, SHORT_AWAY = 10.0, 0.05  # seconds without a broker
SECONDS = 20_000  # of a queue that is simulated, or fewer with many messages


class CostsError(Exception):
    """The file with the unit costs is missing, or is not what it should be."""


# What is measured


@dataclass(frozen=True)
class BrokerCosts:
    """As `benchmarks.cluster` measures them; what it has not measured is 0."""

    delivery_us: float = 0.0
    message_us: float = 0.0
    message_busy_us: float = 0.0
    publish_us: float = 0.0
    receive_us: float = 0.0
    broker_us: float = 0.0
    broker_busy_us: float = 0.0
    join_us: float = 0.0
    join_together_us: float = 0.0
    join_ms: float = 0.0
    restore_s: float = 0.0
    latency_p50_ms: float = 0.0
    latency_p99_ms: float = 0.0

    # What a process and a broker with much to do take: there, messages do not come one by one.

    @property
    def when_busy(self) -> float:
        """The ratio to what a message takes that comes alone."""
        return self.message_busy_us / self.message_us if self.message_busy_us > 0 else 1.0

    @property
    def publish(self) -> float:
        """µs of the process that sends; 0 if that is in `receive`."""
        return max(0.0, self.publish_us) * self.when_busy if self.receive_us > 0 else 0.0

    @property
    def receive(self) -> float:
        """µs of each process that has members."""
        return (self.receive_us if self.receive_us > 0 else self.message_us) * self.when_busy

    @property
    def copy(self) -> float:
        """µs of the broker for each of these."""
        return self.broker_busy_us if self.broker_busy_us > 0 else self.broker_us

    @property
    def join(self) -> float:
        """µs of the process."""
        return self.join_together_us if self.join_together_us > 0 else self.join_us


@dataclass(frozen=True)
class Costs:
    machine: str
    python: str
    date: str
    brokers: dict[str, BrokerCosts]
    connection_kib: float
    deliveries_per_s: float


def read_costs(path: Path) -> Costs:
    """Raises `CostsError`."""
    again = "write it with: python -m benchmarks.cluster --json FILE"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise CostsError(f"{path}: {exc.strerror}; {again}") from None
    except ValueError as exc:
        raise CostsError(f"{path} is no JSON: {exc}; {again}") from None

    def at(place: str) -> Any:
        found = data
        for key in place.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def text(place: str) -> str:
        if not isinstance(value := at(place), str):
            raise CostsError(f"{path}: {place} should be a text, not {value!r}; {again}")
        return value

    def number(place: str) -> float:
        if (value := at(place)) is None or not is_number(value) or value <= 0:
            raise CostsError(f"{path}: {place} should be a number above 0, not {value!r}; {again}")
        return float(value)

    brokers = {}
    for name in ("memory", *BROKERS):
        given = {field.name: at(f"brokers.{name}.{field.name}") for field in fields(BrokerCosts)}
        wanted = NEEDED if name in BROKERS else NEEDED[:1]
        for key, value in given.items():
            if key in wanted or not (value is None or is_number(value)):
                number(f"brokers.{name}.{key}")
        brokers[name] = BrokerCosts(**{key: value or 0.0 for key, value in given.items()})
    return Costs(
        text("machine"), text("python"), text("date"), brokers,
        number("connection_kib"), number("deliveries_per_s"),
    )  # fmt: skip


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# What is assumed


@dataclass(frozen=True)
class Assumed:
    """The machines, the traffic, and how full anything may be."""

    full: float = 0.6  # of a core or of a network
    process_mib: float = 2048  # memory of a process that connections may take
    socket_kib: float = 4  # the system's memory for an idle socket
    ping_us: float = 100  # a ping and its pong, as docs/performance.md has it
    ping_s: float = 20  # between two of them, uvicorn's default
    ping_share: float = 0.1  # of a core that pings may take
    collection_ms: float = 0.1  # a full garbage collection, for each connection; the same page
    collection_s: float = 1  # that it may take
    handshake_ms: float = 0.4  # a connection that comes and goes; the same page
    return_s: float = 10  # in which the clients of a process that has failed may come back
    host_processes: int = 16  # of the app on one host, one a core
    node_cores: float = 8  # of a NATS node; Redis has one core
    network_gbit: float = 10  # of a host, and of a broker's node
    frame: int = 200  # bytes of a message for clients
    head: int = 70  # bytes that Pachinko puts before it between processes
    protocol: int = 50  # bytes of the broker's protocol around both
    packet: int = 70  # bytes around a frame to a client: WebSocket, TCP, IP, Ethernet
    subscribe_us: tuple[tuple[str, float], ...] = (("nats", 4), ("redis", 2.5))
    batch: int = 500  # subscriptions that Pachinko asks for at a time when it reconnects
    batch_s: float = 10  # that the broker may take for them; else it starts again
    reconnect_s: tuple[float, ...] = (0.1, 0.2, 0.5, 1, 2, 5)  # then as the last; less, at random
    beats: float = 2  # signs of life of a process to itself, each second

    @property
    def network(self) -> float:
        """Bytes a second."""
        return self.network_gbit * 1e9 / 8

    @property
    def peer_bytes(self) -> int:
        """Of one copy of a message from the broker."""
        return self.frame + self.head + self.protocol

    @property
    def frame_bytes(self) -> int:
        """Of one delivery on the network."""
        return self.frame + self.packet

    def broker_subscribe_us(self, broker: str) -> float:
        return dict(self.subscribe_us)[broker]


# The model


@dataclass(frozen=True)
class Load:
    """Groups of the same size; each connection is in one of them."""

    groups: int
    members: int
    rate: float
    """Messages a second to each group."""
    is_sticky: bool = False
    """Whether a group's members are all at one process."""

    @property
    def connections(self) -> int:
        return self.groups * self.members

    @property
    def messages(self) -> float:
        """A second."""
        return self.groups * self.rate

    @property
    def deliveries(self) -> float:
        """A second."""
        return self.messages * self.members

    def copies(self, processes: int) -> float:
        """To how many processes the broker hands a message, on average."""
        return 1.0 if self.is_sticky else reached(self.members, processes)


def reached(things: float, places: int) -> float:
    """How many of *places* have one of *things* at least, when each is put anywhere."""
    return float(places * -math.expm1(things * math.log1p(-1 / places))) if places > 1 else 1.0


def capacity(costs: Costs, assumed: Assumed) -> dict[str, int]:
    """Idle connections that a process may have, by what bounds them."""
    per_connection = (costs.connection_kib + assumed.socket_kib) / 1024
    coming_ms = assumed.handshake_ms + max(unit.join for unit in costs.brokers.values()) / 1000
    return {
        "memory": int(assumed.process_mib / per_connection),
        "pings": int(assumed.ping_share * MEGA / assumed.ping_us * assumed.ping_s),
        "garbage collection": int(assumed.collection_s * 1000 / assumed.collection_ms),
        "coming back": int(assumed.return_s * 1000 / coming_ms),
    }


@dataclass(frozen=True)
class Plan:
    """How many processes of the app a load takes with a broker, and what that means for it."""

    load: Load
    broker: str
    costs: Costs
    assumed: Assumed
    processes: int
    floor: int
    """The processes that the connections alone need."""

    @property
    def unit(self) -> BrokerCosts:
        return self.costs.brokers[self.broker]

    @property
    def copies(self) -> float:
        return self.load.copies(self.processes)

    @property
    def parts(self) -> dict[str, float]:
        """Cores that the app is busy with, by what."""
        unit, load, assumed = self.unit, self.load, self.assumed
        beats = assumed.beats * self.processes
        published, received = load.messages + beats, load.messages * self.copies + beats
        return {
            "deliveries": load.deliveries * unit.delivery_us / MEGA,
            "copies": (published * unit.publish + received * unit.receive) / MEGA,
            "pings": load.connections / assumed.ping_s * assumed.ping_us / MEGA,
        }

    @property
    def cores(self) -> float:
        return sum(self.parts.values())

    @property
    def share(self) -> float:
        """Of a core that a process is busy with."""
        return self.cores / self.processes

    @property
    def bound(self) -> str:
        """What decides how many processes there are."""
        if self.processes == self.floor:
            return "connections"
        return max(("deliveries", "copies"), key=self.parts.__getitem__)

    @property
    def broker_copies(self) -> float:
        """Messages that the broker hands to processes, a second."""
        return self.load.messages * self.copies + self.assumed.beats * self.processes

    @property
    def broker_in(self) -> float:
        """Bytes a second."""
        return (self.load.messages + self.assumed.beats * self.processes) * self.assumed.peer_bytes

    @property
    def broker_out(self) -> float:
        """Bytes a second."""
        return self.broker_copies * self.assumed.peer_bytes

    @property
    def clients_out(self) -> float:
        """Bytes a second."""
        return self.load.deliveries * self.assumed.frame_bytes

    @property
    def hosts(self) -> int:
        return math.ceil(self.processes / self.assumed.host_processes)

    @property
    def host_in(self) -> float:
        """Bytes a second of one host of the app, without what clients send."""
        return self.broker_out / self.hosts

    @property
    def host_out(self) -> float:
        """Bytes a second of one host of the app."""
        return (self.clients_out + self.broker_in) / self.hosts

    @property
    def of_one(self) -> float:
        """How full a single broker is: of its CPU or of its network, whichever is fuller."""
        return self.of_nodes(1)

    def of_nodes(self, nodes: int) -> float:
        """How full each node of a NATS cluster is.

        A message goes to each other node that has a process for it, once, and from there to the
        processes: what comes by a route is not passed on to another node.
        """
        others = reached(self.copies, nodes) * (nodes - 1) / nodes
        routed = (self.broker_copies + self.load.messages * others) / nodes
        cores = self.assumed.node_cores if self.broker == "nats" else 1.0
        return max(
            routed * self.unit.copy / MEGA / cores,
            routed * self.assumed.peer_bytes / self.assumed.network,
        )

    @cached_property
    def nodes(self) -> int | None:
        """The NATS nodes that it takes; None if no number of them is enough."""
        return next((n for n in range(1, 201) if self.of_nodes(n) <= self.assumed.full), None)

    @property
    def local_members(self) -> float:
        """Of a group, at a process that has one at all."""
        return self.load.members / self.copies

    @property
    def busy_s(self) -> float:
        """How long a message keeps a process: from the first of its members to the last."""
        unit = self.unit
        return (unit.receive + self.local_members * unit.delivery_us) / MEGA

    @property
    def subscriptions(self) -> float:
        """Groups that a process is subscribed to."""
        return self.load.groups * self.copies / self.processes


def plan(load: Load, broker: str, costs: Costs, assumed: Assumed) -> Plan:
    """The fewest processes that are enough. More of them need more copies, so it is a search."""
    floor = max(1, math.ceil(load.connections / min(capacity(costs, assumed).values())))
    found = Plan(load, broker, costs, assumed, floor, floor)
    while found.share > assumed.full:
        processes = max(found.processes + 1, math.ceil(found.cores / assumed.full))
        if processes > MOST:
            raise CostsError(f"{broker}: with these costs no number of processes is enough")
        found = Plan(load, broker, costs, assumed, processes, floor)
    return found


def first_rate(is_over: Callable[[float], bool]) -> float:
    """The least rate at which *is_over*; infinite if even a million a second is not."""
    low, high = 1e-5, 1e6
    if not is_over(high):
        return math.inf
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if is_over(middle) else (middle, high)
    return high


# What is simulated


@dataclass(frozen=True)
class Placement:
    """Where connections have come to lie."""

    copies: float
    """Processes that have a member of a group, on average."""
    fullest: float
    """Connections of the fullest process, to those of the average one."""


def place(
    rng: random.Random, groups: int, members: int, processes: int, is_sticky: bool = False
) -> Placement:
    """Put each connection to any process, or, sticky, each group."""
    everywhere, load, distinct = range(processes), Counter[int](), 0
    for _ in range(groups):
        if is_sticky:
            load[rng.randrange(processes)] += members
            distinct += 1
        else:
            chosen = rng.choices(everywhere, k=members)
            load.update(chosen)
            distinct += len(set(chosen))
    mean = groups * members / processes
    return Placement(distinct / groups, max(load.values()) / mean)


@dataclass(frozen=True)
class Peaks:
    """What a process has to do, when messages come at random."""

    mean: float
    """Work that comes in a second, in seconds."""
    p99: float
    """The same, of the busiest second in a hundred."""
    wait_s: float
    """Until a message has its turn, on average."""
    wait_p99_s: float

    @staticmethod
    def expected(rate: float, works: Sequence[float]) -> Peaks:
        """By formulas: of Pollaczek and Khinchine, and with sums taken for normally distributed.

        There is none for the last figure.
        """
        first = statistics.fmean(works)
        second = statistics.fmean(work * work for work in works)
        mean = rate * first
        wait = rate * second / 2 / (1 - mean)
        return Peaks(mean, mean + 2.326 * math.sqrt(rate * second), wait, math.nan)


def queue(
    rng: random.Random, rate: float, works: Sequence[float], seconds: int, most: int = 800_000
) -> Peaks:
    """One process that takes one message after the other, *rate* a second, each one of *works*."""
    arrivals, free, waits = 0.0, 0.0, []
    windows = [0.0] * max(1, min(seconds, int(most / rate)))
    while True:
        arrivals += rng.expovariate(rate)
        if arrivals >= len(windows):
            break
        work = rng.choice(works)
        windows[int(arrivals)] += work
        waits.append(max(0.0, free - arrivals))
        free = max(free, arrivals) + work
    return Peaks(
        statistics.fmean(windows), percentile(windows), statistics.fmean(waits), percentile(waits)
    )


def percentile(values: Sequence[float], share: float = 0.99) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def works(rng: random.Random, found: Plan, number: int = 10_000) -> list[float]:
    """Seconds that a process works for a message, for each of *number* messages."""
    load, unit = found.load, found.unit
    if load.is_sticky or load.groups == 1:  # where the share hardly varies
        return [found.busy_s]
    here, seconds = range(found.processes), list[float]()
    while len(seconds) < number:
        for members in Counter(rng.choices(here, k=load.members)).values():
            seconds.append((unit.receive + members * unit.delivery_us) / MEGA)
    return seconds[:number]


@dataclass(frozen=True)
class Recovery:
    """After a broker has come back."""

    median_s: float
    """Until half of the processes are subscribed to all of theirs again."""
    last_s: float
    """Until all are; infinite, if some were not after ten minutes."""
    failed: int
    """Attempts that were given up, because the broker took too long."""


def recover(
    rng: random.Random, processes: int, subscriptions: float, process_us: float, broker_us: float,
    assumed: Assumed, down_s: float = 10, patience_s: float = 600,
) -> Recovery:  # fmt: skip
    """All *processes* have lost the broker *down_s* before 0, when it is back.

    A subscription takes the broker *broker_us*, one after the other, whoever asks; and with that
    *process_us* when it has nothing else to do. A process asks for a batch, waits for it, and asks
    for the next one; when that takes too long, it connects again and begins from the start.
    """
    wanted, free, failed = math.ceil(subscriptions), 0.0, 0
    delays = (*assumed.reconnect_s, assumed.reconnect_s[-1])
    events: list[tuple[float, int, int, int]] = []  # when, who, how many it has, failures
    ended: list[float] = []
    for process in range(processes):
        when, failures = -down_s, 0
        while when < 0:  # refused at once
            when += rng.uniform(0.5, 1) * delays[min(failures, len(delays) - 1)]
            failures += 1
        events.append((when, process, 0, failures))
    heapq.heapify(events)
    while events and events[0][0] < patience_s:
        when, process, has, failures = heapq.heappop(events)
        asks = min(assumed.batch, wanted - has)
        free = max(free, when) + asks * broker_us / MEGA
        answered = free + asks * max(0.0, process_us - broker_us) / MEGA
        if answered - when > assumed.batch_s:
            failed += 1
            delay = rng.uniform(0.5, 1) * delays[min(failures, len(delays) - 1)]
            heapq.heappush(events, (when + assumed.batch_s + delay, process, 0, failures + 1))
        elif has + asks < wanted:
            heapq.heappush(events, (answered, process, has + asks, failures))
        else:
            ended.append(answered)
    ended += [math.inf] * len(events)
    return Recovery(statistics.median(ended), max(ended), failed)


def recovery_at_best(
    processes: int, subscriptions: float, process_us: float, broker_us: float
) -> float:
    """Seconds, if all begin at once and none gives up: the slower one of both sides decides."""
    return max(subscriptions * process_us, processes * subscriptions * broker_us) / MEGA


# As Markdown


def figure(value: float, digits: int = 2) -> str:
    """With so many digits that mean something, and never an exponent."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "never"
    rounded = float(f"{value:.{digits}g}")
    places = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{places}f}"


def table(heads: Sequence[str], *rows: Sequence[str]) -> str:
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(
        textwrap.fill(line, 100, initial_indent="- ", subsequent_indent="  ") for line in lines
    )


GROUPS, GIANT = (10_000, 100), (1, 1_000_000)
RATES = {"one every 10 s": 0.1, "one a second": 1.0, "10 a second": 10.0}
APP_HEADS = ["processes", "because of", "MB/s to clients", "in / out of a host"]
BROKER_HEADS = ["copies a second", "MB/s in / out of the broker", "NATS nodes", "of one Redis"]


def app_columns(found: Plan) -> list[str]:
    host = f"{figure(found.host_in / MEGA)} / {figure(found.host_out / MEGA)}"
    return [f"{found.processes:,}", found.bound, figure(found.clients_out / MEGA), host]


def broker_columns(nats: Plan, redis: Plan) -> list[str]:
    return [
        figure(nats.broker_copies),
        f"{figure(nats.broker_in / MEGA)} / {figure(nats.broker_out / MEGA)}",
        "no number" if nats.nodes is None else f"{nats.nodes:,}",
        f"{figure(100 * redis.of_one)} %",
    ]


class Page:
    """The tables of docs/scaling.md, by the names of their places."""

    def __init__(self, costs: Costs, seed: int = SEED) -> None:
        self.costs = costs
        self.assumed = Assumed()
        self.seed = seed

    def rng(self, what: str) -> random.Random:
        """One for each table, so that none depends on the others."""
        return random.Random(f"{self.seed} {what}")

    def plan(
        self, shape: tuple[int, int], rate: float, *, sticky: bool = False, broker: str = "nats"
    ) -> Plan:
        return plan(Load(*shape, rate, sticky), broker, self.costs, self.assumed)

    def parts(self) -> dict[str, str]:
        return {
            "summary": self.summary(),
            "measured": self.measured(),
            "process": self.process(),
            "assumed": self.assumptions(),
            "placement": self.placement(),
            "groups": self.groups(),
            "giant": self.giant(),
            "limits": self.limits(),
            "peaks": self.peaks(),
            "recovery": self.recovery(),
        }

    def measured(self) -> str:
        titles = {
            "delivery_us": "a delivery to one member, µs of the app",
            "message_us": "a message, for each process with members, µs of the app",
            "message_busy_us": "the same, when many come at once",
            "receive_us": "of the first, to receive it",
            "publish_us": "to publish it, once",
            "broker_us": "a message, for each process with members, µs of the broker",
            "broker_busy_us": "the same, when many come at once",
            "join_us": "a join of a group that is new to the process, µs of the app",
            "join_ms": "the same, ms until it is live",
            "restore_s": "10,000 groups subscribed again, s",
            "latency_p50_ms": "from `hub.send` to the last receiver, median, ms",
            "latency_p99_ms": "the same, 99th percentile, ms",
        }
        brokers = [self.costs.brokers[name] for name in ("memory", *BROKERS)]
        rows = []
        for field, title in titles.items():
            values = [getattr(broker, field) for broker in brokers]
            if any(values):
                rows.append([title, *(figure(value) if value else "" for value in values)])
        return (
            f"{self.costs.machine}; {self.costs.python}; {self.costs.date}.\n\n"
            + table(["", "memory", *BROKERS.values()], *rows)
            + f"\n\nAn idle connection takes {figure(self.costs.connection_kib)} KiB. A core makes "
            f"{figure(self.costs.deliveries_per_s)} deliveries a second."
        )

    def process(self) -> str:
        assumed, most = self.assumed, capacity(self.costs, self.assumed)
        titles = {
            "memory": f"{assumed.process_mib / 1024:g} GiB, with {assumed.socket_kib:g} KiB of the "
            "system's for each socket",
            "pings": f"pings every {assumed.ping_s:g} s take {100 * assumed.ping_share:g} % "
            "of a core",
            "garbage collection": "a full garbage collection takes "
            f"{assumed.collection_s:g} s, in which nothing else happens",
            "coming back": "all of them come at once, each to a group that is new to the process, "
            f"in {assumed.return_s:g} s of its time",
        }
        rows = [[titles[name], f"{figure(number)}"] for name, number in most.items()]
        least, rate = min(most.values()), self.assumed.full * self.costs.deliveries_per_s
        text = (
            f"So {least:,} connections a process are taken below. Each of them may get a message "
            f"every {figure(least / rate)} s, with {100 * assumed.full:g} % of a core."
        )
        return f"{table(['What is reached', 'connections'], *rows)}\n\n{textwrap.fill(text, 100)}"

    def assumptions(self) -> str:
        assumed = self.assumed
        brokers = " and ".join(f"{us:g} µs ({BROKERS[name]})" for name, us in assumed.subscribe_us)
        lines = [
            f"{min(capacity(self.costs, assumed).values()):,} connections a process at most, "
            f"{assumed.host_processes} processes a host, one a core.",
            f"Nothing is more than {100 * assumed.full:g} % full on average: a core, a network.",
            f"A NATS node has {assumed.node_cores:g} cores, among which its work is divided "
            "evenly. Redis has one.",
            f"{assumed.network_gbit:g} Gbit/s for each host and each node.",
            f"A message has {assumed.frame} bytes. Between processes {assumed.head} are added by "
            f"Pachinko and {assumed.protocol} by the broker's protocol; towards a client "
            f"{assumed.packet} by WebSocket, TCP, IP and Ethernet. TLS comes on top, at the proxy.",
            f"Each process hears from itself {assumed.beats:g} times a second.",
            f"A subscription takes the broker {brokers}, measured with nothing but SUB and "
            "SUBSCRIBE on one connection.",
            "Messages come independently of each other (Poisson).",
        ]
        return bullets(lines)

    def placement(self) -> str:
        rng, rows = self.rng("placement"), []
        for processes in PROCESSES:
            spread = place(rng, *GROUPS, processes)
            sticky = place(rng, *GROUPS, processes, is_sticky=True)
            copies = [f"{reached(GROUPS[1], processes):.1f}", f"{spread.copies:.1f}"]
            fullest = [f"{spread.fullest:.2f}", f"{sticky.fullest:.2f}"]
            rows.append([f"{processes:,}", *copies, *fullest])
        heads = ["copies of a message", "simulated", "fullest process, spread", "fullest, sticky"]
        return table(["Processes", *heads], *rows)

    def groups(self) -> str:
        rows = []
        for sticky in (False, True):
            for words, rate in RATES.items():
                nats = self.plan(GROUPS, rate, sticky=sticky)
                redis = self.plan(GROUPS, rate, sticky=sticky, broker="redis")
                title = f"{words}, {'sticky' if sticky else 'spread'}"
                rows.append([title, *app_columns(nats), *broker_columns(nats, redis)])
        return table(["Messages to each group", *APP_HEADS, *BROKER_HEADS], *rows)

    def giant(self) -> str:
        rows = []
        for words, rate in RATES.items():
            nats, redis = self.plan(GIANT, rate), self.plan(GIANT, rate, broker="redis")
            here = [figure(nats.local_members), figure(nats.busy_s)]
            rows.append([words, *app_columns(nats), *here, *broker_columns(nats, redis)])
        heads = ["members in each", "first to last of them, s"]
        return table(["Messages", *APP_HEADS, *heads, *BROKER_HEADS], *rows)

    def summary(self) -> str:
        firsts = [min((rates[n], title) for title, rates in self.limit_rates().items())
                  for n in range(3)]  # fmt: skip
        spread, sticky, giant = (
            f"{title}, at {figure(rate)} messages a second" for rate, title in firsts
        )
        found = self.plan(GIANT, 0.1)
        return bullets([
            f"A million connections take {found.floor:,} processes, {found.hosts} hosts, before "
            "anybody sends anything.",
            f"In 10,000 groups of 100, whose members are anywhere, what is full first is {spread} "
            f"to each group. With each group at one process it is {sticky}.",
            f"In one group of a million, it is {giant}; and each message reaches the last member "
            f"{figure(found.busy_s)} s after the first.",
        ])  # fmt: skip

    def limits(self) -> str:
        rows = [
            [title, *("never" if rate == math.inf else figure(rate) for rate in rates)]
            for title, rates in self.limit_rates().items()
        ]
        heads = ["10,000 groups, spread", "10,000 groups, sticky", "one group of a million"]
        return table([f"What is {100 * self.assumed.full:g} % full", *heads], *rows)

    def limit_rates(self) -> dict[str, list[float]]:
        """By the limit, for the three cases."""
        full, floor = self.assumed.full, self.plan(GIANT, 0.1).floor
        cases = [(GROUPS, False), (GROUPS, True), (GIANT, False)]
        checks: dict[str, tuple[str, Callable[[Plan], bool]]] = {
            f"the CPU of {floor:,} processes": ("nats", lambda p: p.bound != "connections"),
            "one Redis": ("redis", lambda p: p.of_one > full),
            "one NATS node": ("nats", lambda p: p.of_one > full),
            "five NATS nodes": ("nats", lambda p: p.of_nodes(5) > full),
            "the network of a host of the app": (
                "nats", lambda p: p.host_out > full * self.assumed.network
            ),
        }  # fmt: skip
        return {
            title: [self.first_rate(*case, broker, is_over) for case in cases]
            for title, (broker, is_over) in checks.items()
        }

    def first_rate(
        self, shape: tuple[int, int], sticky: bool, broker: str, is_over: Callable[[Plan], bool]
    ) -> float:
        return first_rate(
            lambda rate: is_over(self.plan(shape, rate, sticky=sticky, broker=broker))
        )

    def peaks(self) -> str:
        rng, rows = self.rng("peaks"), []
        cases = {
            "10,000 groups, spread": self.plan(GROUPS, 1),
            "10,000 groups, sticky": self.plan(GROUPS, 1, sticky=True),
            "one group of a million": self.plan(GIANT, 1),
        }
        for words, found in cases.items():
            seconds = works(rng, found)
            for share in (0.6, 0.8):
                rate = share / statistics.fmean(seconds)
                simulated = queue(rng, rate, seconds, SECONDS)
                expected = Peaks.expected(rate, seconds)
                rows.append([
                    f"{words}, {100 * share:g} % full",
                    figure(1000 * statistics.fmean(seconds)),
                    f"{100 * simulated.p99:.0f} %", f"{100 * expected.p99:.0f} %",
                    figure(1000 * simulated.wait_s), figure(1000 * expected.wait_s),
                    figure(1000 * simulated.wait_p99_s),
                ])  # fmt: skip
        heads = [
            "A process", "ms for a message", "busiest of 100 s", "by formula",
            "ms that one waits", "by formula", "99th percentile",
        ]  # fmt: skip
        return table(heads, *rows)

    def recovery(self) -> str:
        rng, rows = self.rng("recovery"), []
        cases = [(100, True, 0), (100, False, 0)]
        cases += [(processes, False, 1) for processes in (100, 1000, 2000)]
        for processes, sticky, users in cases:
            for broker, name in BROKERS.items():
                load = Load(*GROUPS, 1, sticky)
                found = Plan(load, broker, self.costs, self.assumed, processes, processes)
                connections = load.connections / processes
                wanted = found.subscriptions + users * connections
                us = self.restore_us(broker), self.assumed.broker_subscribe_us(broker)
                long, short = (
                    recover(rng, processes, wanted, *us, self.assumed, down_s=down)
                    for down in (LONG_AWAY, SHORT_AWAY)
                )
                title = f"{name}, {processes:,} processes, {'sticky' if sticky else 'spread'}"
                rows.append([
                    title + (", users" if users else ""),
                    figure(wanted),
                    figure(recovery_at_best(processes, wanted, *us)),
                    figure(long.last_s),
                    figure(short.last_s),
                    f"{long.failed:,} / {short.failed:,}",
                    figure(connections * found.unit.delivery_us / MEGA),
                ])  # fmt: skip
        heads = [
            "", "subscriptions of each", "at best, s", f"after {LONG_AWAY:g} s away, s",
            "after a moment, s", "attempts given up", "gaps, s",
        ]  # fmt: skip
        return table(heads, *rows)

    def restore_us(self, broker: str) -> float:
        """For one subscription."""
        return self.costs.brokers[broker].restore_s / RESTORED * MEGA


PLACE = re.compile(r"(<!-- begin: (\w+) -->\n).*?(<!-- end: (\w+) -->)", re.DOTALL)


def fill(text: str, parts: dict[str, str]) -> str:
    """*text* with *parts* in their places. Raises `ValueError` if they are not the same ones."""
    places = [match[2] for match in PLACE.finditer(text)]
    if sorted(places) != sorted(parts) or any(m[2] != m[4] for m in PLACE.finditer(text)):
        raise ValueError(f"it should have places for {sorted(parts)}, not {sorted(places)}")
    return PLACE.sub(lambda match: f"{match[1]}{parts[match[2]]}\n{match[3]}", text)


# As a picture


def draw(page: Page, path: Path) -> None:
    """Write the picture. Needs matplotlib."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {
        "axes.spines.right": False, "axes.spines.top": False, "axes.titlesize": 10,
        "figure.constrained_layout.use": True, "figure.facecolor": "white", "font.size": 9,
        "legend.frameon": False,
    }  # fmt: skip
    spread, sticky, giant, limit = "#c2410c", "#0f766e", "#1d4ed8", "#64748b"
    with mpl.rc_context(style):
        whole = Figure(figsize=(10, 7.5), dpi=110)
        axes = whole.subplots(2, 2)
        draw_placement(page, axes[0][0], spread, limit)
        draw_rates(page, axes[0][1], axes[1][0], spread, sticky, giant, limit)
        draw_recovery(page, axes[1][1], spread, giant)
        whole.savefig(path, metadata={"Software": None})


def limit_line(axes: Any, value: float, text: str, color: str, at: float) -> None:
    axes.axhline(value, color=color, linestyle="--", linewidth=1)
    axes.text(at, value, text, color=color, fontsize=8, va="bottom", ha="left")


def draw_placement(page: Page, axes: Any, color: str, limit: str) -> None:
    rng, many = page.rng("picture"), [int(10 ** (n / 10)) for n in range(31)]
    few = many[::3]
    axes.plot(many, [reached(GROUPS[1], n) for n in many], color=color, label="formula")
    dots = [place(rng, 300, GROUPS[1], n).copies for n in few]
    axes.plot(few, dots, "o", color=color, markersize=4, label="simulated")
    limit_line(axes, GROUPS[1], "one for each member", limit, 1)
    axes.set(
        xscale="log", ylim=(0, 112), xlabel="processes", ylabel="copies of a message",
        title="A group of 100, spread: processes that a message goes to",
    )  # fmt: skip
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.legend(loc="lower right")


def draw_rates(
    page: Page, left: Any, right: Any, spread: str, sticky: str, giant: str, limit: str
) -> None:
    rates = [10 ** (n / 8 - 2) for n in range(33)]
    cases = [
        ("10,000 groups of 100, spread", GROUPS, False, spread),
        ("10,000 groups of 100, sticky", GROUPS, True, sticky),
        ("one group of a million", GIANT, False, giant),
    ]
    for label, shape, is_sticky, color in cases:
        plans = [page.plan(shape, rate, sticky=is_sticky) for rate in rates]
        line = "--" if shape is GIANT else "-"  # which has about as many as sticky groups
        for axes, values in (
            (left, [found.processes for found in plans]),
            (right, [found.broker_copies for found in plans]),
        ):
            axes.plot(rates, values, line, color=color, label=label)
    floor = page.plan(GROUPS, rates[0]).floor
    limit_line(left, floor, "what the connections need", limit, rates[0])
    full = page.assumed.full
    for broker, name, cores in (
        ("redis", "one Redis", 1.0), ("nats", "one NATS node", page.assumed.node_cores)
    ):  # fmt: skip
        us = page.costs.brokers[broker].copy
        limit_line(
            right, full * cores / us * MEGA, f"{name}, CPU {100 * full:g} % full", limit, rates[0]
        )
    network = full * page.assumed.network / page.assumed.peer_bytes
    limit_line(right, network, f"network {100 * full:g} % full", limit, rates[-9])
    left.set(
        xscale="log", yscale="log", ylim=(floor / 3, None),
        xlabel="messages a second to each group", ylabel="processes",
        title="A million connections: processes of the app (NATS)",
    )  # fmt: skip
    right.set(
        xscale="log", yscale="log",
        xlabel="messages a second to each group", ylabel="copies a second",
        title="The same: copies that the broker makes, and its limits",
    )  # fmt: skip
    for axes in (left, right):
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.legend(loc="upper left")


def draw_recovery(page: Page, axes: Any, nats: str, redis: str) -> None:
    many = [100, 150, 200, 300, 500, 700, 1000, 1500, 2000, 3000]
    for (broker, name), color in zip(BROKERS.items(), (nats, redis), strict=True):
        us = page.restore_us(broker), page.assumed.broker_subscribe_us(broker)
        for down, words, line in (
            (LONG_AWAY, f"it was away {LONG_AWAY:g} s", "o-"), (SHORT_AWAY, "a moment", "o:")
        ):  # fmt: skip
            rng, lasts = page.rng(f"picture {broker}"), []
            for processes in many:
                load = Load(*GROUPS, 1)
                wanted = (load.groups * load.copies(processes) + load.connections) / processes
                found = recover(rng, processes, wanted, *us, page.assumed, down_s=down)
                lasts.append(found.last_s)
            axes.plot(many, lasts, line, color=color, markersize=3, label=f"{name}, {words}")
    axes.set(
        xscale="log", ylim=(0, 20), xlabel="processes", ylabel="seconds",
        title="Until all have subscribed again to their groups and users",
    )  # fmt: skip
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.legend(loc="upper left")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--costs", type=Path, default=COSTS, help="the unit costs, as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables into it")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture")
    given = parser.parse_args(arguments)
    try:
        page = Page(read_costs(given.costs))
        parts = page.parts()
        if given.markdown is not None:
            text = given.markdown.read_text(encoding="utf-8")
            given.markdown.write_text(fill(text, parts), encoding="utf-8")
        else:
            print("\n\n".join(f"## {name}\n\n{text}" for name, text in parts.items()))
        if given.plot is not None:
            draw(page, given.plot)
    except (CostsError, ImportError, OSError, ValueError) as exc:
        parser.error(str(exc))


if __name__ == "__main__":
    main()
