"""The results of a run: tables in Markdown, and what one thing costs as JSON."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.cluster_measurements import (
    ENTRIES,
    FEW,
    GROUPS,
    MEMBERS,
    OURS,
    RATES,
    SIZE,
    TOGETHER,
    ClusterBench,
)
from benchmarks.cluster_processes import KINDS, find
from benchmarks.measurements import Result
from benchmarks.processes import PINNED
from benchmarks.report import machine, number, packages

Results = dict[str, Result]


def percentile(figures: Iterable[float], percent: float) -> float:
    ordered = sorted(figures)
    return ordered[round(percent / 100 * (len(ordered) - 1))]


def about(bench: ClusterBench, load: float) -> dict[str, str]:
    """Under which circumstances."""
    brokers = [
        subprocess.check_output([find(kind), "--version"], text=True).partition(" sha=")[0].strip()
        for kind in KINDS
    ]
    shares = bench.shares or [0.0]
    return {
        **machine(),
        "Brokers": "; ".join(brokers),
        "Packages": packages(bench.versions),
        "Cores": "one for the app's processes, another for broker and clients"
        if PINNED
        else "not pinned",
        "Load of the machine before the run": f"{load:.1f}",
        "Clients": f"used {statistics.median(shares):.0%} of a core, at most {max(shares):.0%}",
        "Rounds": str(bench.rounds),
        "Left out": "; ".join(f"{name} ({why})" for name, why in bench.missing.items()) or "nobody",
    }


# ── units ─────────────────────────────────────────────────────────────────────────────────────


class Costs:
    """Medians of what was measured; 0 where nothing was."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.sizes = sorted(int(name[11:]) for name in results if name.startswith("deliveries-"))

    def of(self, result: str, name: str, column: str | None = None) -> float:
        found = self.results[result]
        figures = found.rounds if column is None else found.more.get(column, {})
        return statistics.median(figures[name]) if figures.get(name) else 0.0

    def message(self, result: str, name: str, receivers: int) -> float:
        """CPU µs of all processes for a message to a group."""
        return self.of(result, name) * 10 * receivers  # from seconds for 100,000 deliveries

    def fixed(self, result: str, name: str, receivers: int, askers: int) -> float:
        """CPU µs of a message in each process, apart from its deliveries and the request for it.

        For the memory hub that is hardly to be seen beside those. So for the others it is theirs
        plus the difference between the two, which have the rest in common.
        """
        memory = self.message(result, "memory", receivers)
        deliveries = self.delivery("memory") * receivers
        least = max(0.0, memory - deliveries - self.of(f"request-{askers}", "memory"))
        more = self.message(result, name, receivers) - memory
        return (least + more) / ENTRIES[name].processes

    def delivery(self, name: str) -> float:
        few, many = self.sizes[0], self.sizes[-1]
        more = self.message(f"deliveries-{many}", name, many)
        return (more - self.message(f"deliveries-{few}", name, few)) / (many - few)

    def units(self, name: str) -> dict[str, float]:
        """What one thing costs, so that the costs of more processes can be added up."""
        few, processes = self.sizes[0], ENTRIES[name].processes
        alone, crowded = f"deliveries-{few}", f"busy-{FEW}"
        units = {
            "delivery_us": self.delivery(name),
            "message_us": self.fixed(alone, name, few, 1),
            "message_busy_us": self.fixed(crowded, name, FEW, FEW),
            "broker_us": self.of(alone, name, "broker") / processes,
            "broker_busy_us": self.of(crowded, name, "broker") / processes,
        }
        if processes > 1:  # the second one does not publish
            deliveries = self.delivery(name) * few / processes
            receive = max(0.0, self.of(alone, name, "process 1") - deliveries)
            units["receive_us"] = receive
            units["publish_us"] = processes * (units["message_us"] - receive)
        units |= {
            unit: self.of(result, name)
            for unit, result in {
                "join_us": "join", "join_ms": "join-ms", "join_together_us": "join-together",
                "leave_us": "leave", "group_kib": "group-kib", "broker_group_kib": "broker-kib",
                "restore_s": "restore",
            }.items()
        }  # fmt: skip
        delays = self.results[f"latency-{max(RATES)}"].rounds.get(name, [0.0])
        return units | {f"latency_p{n}_ms": percentile(delays, n) for n in (50, 99)}


def as_json(bench: ClusterBench, results: Results, circumstances: dict[str, str]) -> dict[str, Any]:
    """What the documentation and its simulation use."""
    costs = Costs(results)
    ours = [name for name in OURS if name not in bench.missing]
    largest = results[f"deliveries-{costs.sizes[-1]}"]
    return {
        "machine": circumstances["Machine"],
        "python": circumstances["Python"],
        "date": circumstances["Date"],
        "brokers": {
            name: {unit: float(f"{cost:.4g}") for unit, cost in costs.units(name).items() if cost}
            for name in ours
        },
        "connection_kib": round(statistics.median(costs.of("connection-kib", n) for n in ours), 1),
        "deliveries_per_s": round(statistics.median(costs.of("rate", name) for name in ours)),
        "receivers": costs.sizes[-1],
        "ratios_to_memory": {
            name: round(statistics.median(largest.compared(name)), 3) for name in largest.rounds
        },
        "about": circumstances,
    }


# ── tables ────────────────────────────────────────────────────────────────────────────────────


def table(*lines: Sequence[str]) -> str:
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def ratio(result: Result, name: str) -> str:
    values = result.compared(name)
    return f"{statistics.median(values):.2f}" if values else ""


def spread(result: Result, name: str) -> str:
    """The middle half of the ratios, and the ends."""
    values = result.compared(name)
    low, first, third, high = (f"{percentile(values, n):.2f}" for n in (0, 25, 75, 100))
    return f"{first} … {third} ({low} … {high})"


def delivery_table(bench: ClusterBench, results: Results) -> str:
    shown = [each for name, each in results.items() if name.startswith(("deliveries-", "busy-"))]
    heads = [f"{each.name.partition('-')[2]} receivers" for each in shown]
    for n, each in enumerate(shown):
        if each.name.startswith("busy"):
            heads[n] += ", all ask at once"
    lines = [["CPU s for 100,000 deliveries", *heads]]
    for name in bench.entries():
        cells = [
            f"{number(statistics.median(each.rounds[name]))} ({ratio(each, name)})"
            if name in each.rounds
            else ""
            for each in shown
        ]
        lines.append([bench.labels[name], *cells])
    return table(*lines)


def ratio_table(bench: ClusterBench, result: Result) -> str:
    lines = [["", "CPU s", "ratio", "middle half (all)", "broker, CPU s", "rounds"]]
    for name, figures in result.rounds.items():
        receivers = int(result.name.partition("-")[2])
        broker = statistics.median(result.more["broker"][name]) / receivers / 10
        lines.append(
            [
                bench.labels[name], number(statistics.median(figures)), ratio(result, name),
                spread(result, name), number(broker) if broker else "", str(len(figures)),
            ]
        )  # fmt: skip
    return table(*lines)


def latency_table(bench: ClusterBench, results: Results) -> str:
    lines = [["ms", "receivers", "p50", "p90", "p99", "longest", "messages"]]
    for receivers in sorted(RATES, reverse=True):
        for name, delays in results[f"latency-{receivers}"].rounds.items():
            figures = [f"{percentile(delays, n):.1f}" for n in (50, 90, 99, 100)]
            lines.append([bench.labels[name], f"{receivers:,}", *figures, str(len(delays))])
    return table(*lines)


def plain_table(bench: ClusterBench, results: Sequence[Result]) -> str:
    names = [name for name in OURS if name not in bench.missing]
    lines = [["", "", *names]]
    for each in results:
        cells = [
            number(statistics.median(each.rounds[name])) if each.rounds.get(name) else ""
            for name in names
        ]
        if any(cells):
            lines.append([each.title, each.unit, *cells])
    return table(*lines)


def unit_table(bench: ClusterBench, results: Results) -> str:
    names = [name for name in OURS if name not in bench.missing]
    costs = {name: Costs(results).units(name) for name in names}
    lines = [["", *names]]
    for unit in costs[names[-1]]:
        cells = [number(costs[name][unit]) if costs[name].get(unit) else "" for name in names]
        lines.append([f"`{unit}`", *cells])
    return table(*lines)


def as_markdown(bench: ClusterBench, results: Results, circumstances: dict[str, str]) -> str:
    sizes = Costs(results).sizes
    largest = results[f"deliveries-{sizes[-1]}"]
    failed = {
        f"{bench.labels[name]}, {each.title}: {why}"
        for each in results.values()
        for name, why in each.errors.items()
    }
    others = [each for name, each in results.items() if name in ("rate", "connection-kib")]
    others += [each for name, each in results.items() if name.startswith("request-")]
    rooms = [
        each for name, each in results.items()
        if name.startswith(("join", "leave", "group-", "broker-", "restore"))
    ]  # fmt: skip
    parts = [
        "# A cluster",
        "Written by `python -m benchmarks.cluster`.",
        "\n".join(f"- {name}: {text}" for name, text in circumstances.items()),
        "## Deliveries",
        METHOD.format(size=SIZE, few=FEW),
        delivery_table(bench, results),
        f"The same for {sizes[-1]:,} receivers, with how much the ratios differ:",
        ratio_table(bench, largest),
        "## Latency",
        "From `hub.send` in one process until the last of the clients of both processes has the "
        f"message, {' or '.join(f'{rate} a second to {n:,}' for n, rate in RATES.items())}; here "
        "each process is on a core of its own, broker and clients share both.",
        latency_table(bench, results),
        "## Groups",
        f"Of {GROUPS:,} groups in one process, with {MEMBERS} "
        f"connections that are in different ones; {TOGETHER} joins where it is several at once. "
        "In a fresh process each round.",
        plain_table(bench, rooms),
        "## More",
        plain_table(bench, others),
        "## Units",
        UNITS,
        unit_table(bench, results),
        *sorted(failed),
    ]
    return "\n\n".join(parts) + "\n"


METHOD = """\
CPU time, user and system, of the app's processes. A client of one process asks for a message of \
{size} characters to a group that has half of its members there and half in the other process, and \
for the next one when everybody has it and it has its reply. So a message comes alone; in the \
column "all ask at once" each of {few} members asks, and again when everybody has everything. In \
brackets: the median of the ratios to the first line, round by round, in which the entries take \
turns. The first line is the same app and hub without a broker, in one process with all \
receivers: what those deliveries cost before there are two processes. \
The second line shows the noise. In the third there are two processes which do not know of each \
other, and each is asked for its half: what two processes cost that have nothing to do with each \
other, so that the rest is due to the broker."""

UNITS = """\
CPU µs of the app's processes, unless it says otherwise: `delivery_us` is the slope between the \
smallest and the largest group; `message_us` is the rest of a message for each subscribed process, \
without the request of the client that has asked for it (for the memory hub, little more than \
noise), and `message_busy_us` the same when many come at once; of `message_us`, `publish_us` is \
spent once and `receive_us` in each process; `broker_us` and `broker_busy_us` are the broker's for \
each process. Much of what a message that comes alone costs is to wake the other side up: it is \
spent in system calls, and differs from one machine to the next more than the rest."""
