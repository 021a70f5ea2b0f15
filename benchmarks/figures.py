"""Measure the five figures that a release is held against: ``python -m benchmarks.figures``.

Each figure compares Pachinko with one peer. In every round the peer, Pachinko and the peer once
more are measured in turn. The round's ratio is Pachinko's CPU time divided by that of the peer;
the figure is the median of the ratios. The ratio of the peer to itself shows the noise. Two
processes of the same code differ by up to 5 %, so the rounds are spread over several of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import measurements
from benchmarks.machine import machine, packages
from benchmarks.measurements import Bench, Result, log

PROCESSES, QUICK_PROCESSES = 5, 3  # of each entry, one after the other
ROUNDS, QUICK_ROUNDS = 41, 13  # in each of them
WINDOW = 0.03  # seconds; many short rounds see the same noise of the machine as their neighbours


@dataclass(frozen=True)
class Figure:
    """A figure and its target."""

    title: str
    measure: Callable[[Bench], list[Result]]
    peer: str
    """The peer that Pachinko is compared with."""
    most: float
    """The target: the highest ratio, or the highest difference in the result's unit."""
    is_exact: bool = False
    """Whether one process of each entry is enough."""


FIGURES = (
    Figure("a typed message and its reply", measurements.dispatch_in_process, "falcon_expert", 0.9),
    Figure("a message that comes alone", measurements.alone_in_process, "bare", 1.3),
    Figure("a delivery to one of 1,000, under uvicorn", measurements.group, "bare", 1.08),
    Figure("connect and disconnect", measurements.coming_and_going, "falcon_expert", 1.3),
    Figure("an idle connection", measurements.staying, "falcon_expert", 1.5, is_exact=True),
)


@dataclass(frozen=True)
class Outcome:
    """What a run says about a figure."""

    title: str
    peer: str
    unit: str
    is_difference: bool
    most: float
    median: float
    lowest: float
    highest: float
    noise: tuple[float, float, float]
    """The peer compared with itself: the median, the lowest and the highest of the rounds."""
    holds: bool
    rounds: dict[str, list[float]]
    """Pachinko, the peer and the peer again, round by round, in the unit."""


class Trio(Bench):
    """A bench for Pachinko and one peer, which is measured twice. Sizes are never reduced."""

    peer = ""

    def entries(self, only: Iterable[str] = (), *, again: bool = True) -> list[str]:
        return [self.peer, "pachinko", f"{self.peer} again"]

    def choose(self, full: int, quick: int) -> int:
        return full


def outcome_of(figure: Figure, result: Result) -> Outcome:
    """Compare Pachinko, and the peer's second run, with the peer, round by round.

    Raises `ValueError` if one of the three was not measured.
    """
    result.baseline = figure.peer
    again = f"{figure.peer} again"
    for entry in (figure.peer, "pachinko", again):
        if not result.rounds.get(entry) or entry in result.errors:
            raise ValueError(f"{figure.title}: {entry}: {result.errors.get(entry, 'not measured')}")
    median, lowest, highest = summary(result.compared("pachinko"))
    return Outcome(
        figure.title,
        figure.peer,
        result.unit,
        result.is_difference,
        figure.most,
        median,
        lowest,
        highest,
        summary(result.compared(again)),
        median <= figure.most,
        result.rounds,
    )


def summary(figures: Sequence[float]) -> tuple[float, float, float]:
    """The median, the lowest and the highest."""
    return statistics.median(figures), min(figures), max(figures)


def form_of(is_difference: bool, unit: str) -> tuple[str, str]:
    """The format of a figure, and the unit behind it: a ratio has none."""
    return ("{:+.2f}", f" {unit}") if is_difference else ("{:.2f}", "")


def table(outcomes: Sequence[Outcome], labels: dict[str, str]) -> str:
    """The outcomes in Markdown."""
    heads = ["", "compared with", "target", "measured", "lowest … highest", "noise", "it holds"]
    rows = [heads, ["---", "---", "---:", "---:", "---:", "---:", "---"]]
    for one in outcomes:
        form, unit = form_of(one.is_difference, one.unit)
        noise = [form.format(figure) for figure in one.noise]
        rows.append(
            [
                one.title,
                labels.get(one.peer, one.peer),
                f"≤ {form.format(one.most)}{unit}",
                f"{form.format(one.median)}{unit}",
                f"{form.format(one.lowest)} … {form.format(one.highest)}",
                f"{noise[0]} ({noise[1]} … {noise[2]})",
                "yes" if one.holds else "no",
            ]
        )
    return aligned(rows)


def side_by_side(runs: Sequence[Path]) -> str:
    """What earlier runs have measured, in Markdown: one column a run, named like its file."""
    by_run = [
        {figure["title"]: figure for figure in json.loads(run.read_text())["figures"]}
        for run in runs
    ]
    rows = [["", "target", *(run.stem for run in runs)], ["---"] + ["---:"] * (1 + len(runs))]
    for title, figure in by_run[0].items():
        form, unit = form_of(figure["is_difference"], figure["unit"])
        row = [title, f"≤ {form.format(figure['most'])}{unit}"]
        for measured in by_run:
            if title in measured:
                median, noise = measured[title]["median"], measured[title]["noise"][0]
                row.append(f"{form.format(median)}{unit} ({form.format(noise)})")
            else:
                row.append("")
        rows.append(row)
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown whose columns are also columns as plain text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def costs(outcomes: Sequence[Outcome], labels: dict[str, str]) -> str:
    """The medians themselves, one line a figure."""
    lines = []
    for one in outcomes:
        parts = [
            f"{labels.get(entry, 'again')} {statistics.median(figures):.3g}"
            for entry, figures in one.rounds.items()
        ]
        lines.append(f"{one.title}, in {one.unit}: {', '.join(parts)}")
    return "\n".join(lines)


def measured(figure: Figure, bench: Trio, processes: int) -> Result:
    """Measure *figure* in so many processes of each entry, one after the other."""
    bench.peer = figure.peer
    (result,) = figure.measure(bench)
    bench.stop()
    for _ in range(1, 1 if figure.is_exact else processes):
        (more,) = figure.measure(bench)
        bench.stop()
        result.errors |= more.errors
        for entry, figures in more.rounds.items():
            result.rounds.setdefault(entry, []).extend(figures)
    return result


def measure(bench: Trio, processes: int) -> list[Outcome]:
    """Measure all five; those that cannot be measured are logged and left out."""
    outcomes = []
    begun = time.monotonic()
    for figure in FIGURES:
        log(f"{figure.title}, after {time.monotonic() - begun:.0f} s")
        try:
            outcomes.append(outcome_of(figure, measured(figure, bench, processes)))
        except ValueError as exc:
            log(f"cannot measure {exc}")
    return outcomes


def as_json(outcomes: Sequence[Outcome], about: dict[str, str]) -> str:
    data = {"about": about, "figures": [asdict(outcome) for outcome in outcomes]}
    return json.dumps(data, ensure_ascii=False, indent=1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and processes")
    rounds_help = f"in each process; {ROUNDS}, or {QUICK_ROUNDS} with --quick"
    parser.add_argument("--rounds", type=int, help=rounds_help)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every round there")
    parser.add_argument(
        "--show", type=Path, nargs="+", metavar="FILE",
        help="measure nothing; print what these runs have written, and in brackets the noise",
    )  # fmt: skip
    options = parser.parse_args()
    if options.show:
        print(side_by_side(options.show))
        return 0

    processes, rounds = (QUICK_PROCESSES, QUICK_ROUNDS) if options.quick else (PROCESSES, ROUNDS)
    rounds = options.rounds or rounds
    bench = Trio((), rounds=rounds, quick=options.quick, window=WINDOW)
    try:
        outcomes = measure(bench, processes)
    finally:
        bench.stop()
    about = {
        **machine(),
        "Packages": packages(bench.versions),
        "Rounds": f"{rounds} in each of {processes} processes",
    }
    print(table(outcomes, bench.labels), costs(outcomes, bench.labels), sep="\n\n", end="\n\n")
    print("\n".join(f"{name}: {text}" for name, text in about.items()))
    if options.json:
        options.json.write_text(as_json(outcomes, about) + "\n", encoding="utf-8")
    return len(outcomes) < len(FIGURES)


if __name__ == "__main__":
    sys.exit(main())
