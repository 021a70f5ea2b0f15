"""The results as Markdown, as pictures, and as JSON to compare another run with."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.machine import machine as machine
from benchmarks.machine import packages as packages
from benchmarks.measurements import AGAIN, Bench, Result
from benchmarks.processes import PINNED

OURS, OTHERS = "#c2410c", "#94a3b8"
STYLE: dict[Any, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",  # also where the page is dark
    "svg.fonttype": "none",
    "svg.hashsalt": "pachinko",  # the same figures give the same file
}


def about(bench: Bench, results: list[Result]) -> dict[str, str]:
    """Under which circumstances."""
    noise = [
        f"{result.title.lower()} {' ('.join(compared(result, AGAIN))})"
        for result in results
        if AGAIN in result.rounds and not result.is_difference
    ]
    shares = bench.shares or [0.0]
    return {
        **machine(),
        "Packages": packages(bench.versions),
        "Cores": "one for the server, another for the load client" if PINNED else "not pinned",
        "Load client": f"used {statistics.median(shares):.0%} of a core, at most {max(shares):.0%}",
        "Rounds": str(bench.rounds),
        "Noise, as the ratio of bare to bare": "; ".join(noise) or "not measured",
        "Left out": "; ".join(f"{peer} ({why})" for peer, why in bench.missing.items()) or "nobody",
    }


def label(bench: Bench, entry: str) -> str:
    name = entry.removesuffix(" again")
    return bench.labels.get(name, name) + (", again" if entry == AGAIN else "")


def compared(result: Result, entry: str) -> tuple[str, str]:
    """What it is to the baseline: the median, and the spread."""
    form = "{:+.1f}" if result.is_difference else "{:.2f}"
    values = result.compared(entry)
    if not values:
        return "", ""
    low, high = form.format(min(values)), form.format(max(values))
    return form.format(statistics.median(values)), f"{low} … {high}"


def number(figure: float) -> str:
    return f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:.3g}"


def table(bench: Bench, result: Result) -> str:
    """One result in Markdown."""
    heads = ["", result.unit]
    if result.baseline is not None:
        kind = "difference" if result.is_difference else "ratio"
        heads += [f"{kind} to {label(bench, result.baseline)}", "min … max"]
    heads += ["rounds", *result.more]
    rows = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for entry, figures in result.rounds.items():
        row = [label(bench, entry), number(statistics.median(figures))]
        row += compared(result, entry) if result.baseline is not None else ()
        row.append(str(len(figures)))
        for column in result.more.values():
            row.append(number(statistics.median(column[entry])) if entry in column else "")
        rows.append(row)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    failed = [f"{label(bench, entry)}: {why}\n" for entry, why in result.errors.items()]
    return "\n".join([f"## {result.title}", "", result.method, "", *lines, "", *failed]).rstrip()


def dots(bench: Bench, result: Result) -> Figure:
    """What each entry is to the baseline, with the spread as a line."""
    values = {
        label(bench, entry): result.compared(entry)
        for entry in result.rounds
        if entry != AGAIN and result.compared(entry)
    }
    names = sorted(values, key=lambda name: statistics.median(values[name]), reverse=True)
    figure = Figure(figsize=(8, 1 + 0.3 * len(names)))
    axes = figure.add_subplot()
    for name in names:
        color = OURS if name == bench.labels.get("pachinko") else OTHERS
        axes.plot([min(values[name]), max(values[name])], [name, name], color=color)
        axes.plot([statistics.median(values[name])], [name], "o", color=color)
    baseline = label(bench, result.baseline or "")
    if result.is_difference:
        axes.set_title(f"{result.title}: {result.unit} more than {baseline}")
    else:
        axes.set_title(f"{result.title}: how many times what it is for {baseline}")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(0 if result.is_difference else 1, color="black", linewidth=0.5, zorder=0)
    return figure


def curves(results: list[Result]) -> Figure:
    """How costs grow, each compared with the smallest size."""
    figure = Figure(figsize=(8, 4))
    axes = figure.add_subplot()
    for result in results:
        sizes = [int(case.replace(",", "")) for case in result.rounds]
        medians = [statistics.median(result.compared(case)) for case in result.rounds]
        axes.plot(sizes, medians, marker="o", label=result.title)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.set_ylim(bottom=0)
    axes.set_title("How many times what it is for the smallest number")
    axes.legend(frameon=False)
    return figure


def draw(bench: Bench, results: list[Result], output: Path) -> dict[str, str]:
    """Write the pictures; the file for a result that has one."""
    growth = [result for result in results if result.name.startswith("growth") and result.rounds]
    files, metadata = {}, {"Date": None, "Creator": None}
    with mpl.rc_context(STYLE):
        for result in results:
            if result not in growth and result.baseline in result.rounds:
                files[result.name] = f"{result.name}.svg"
                dots(bench, result).savefig(output / files[result.name], metadata=metadata)
        if growth:
            files[growth[-1].name] = "growth.svg"
            curves(growth).savefig(output / "growth.svg", metadata=metadata)
    return files


def write(bench: Bench, results: list[Result], output: Path) -> str:
    """Write all of it into the directory *output*; the Markdown."""
    output.mkdir(parents=True, exist_ok=True)
    circumstances, files = about(bench, results), draw(bench, results, output)
    parts = [
        "# Benchmarks",
        "Written by `python -m benchmarks`. Medians over rounds in which the peers take turns; "
        "each is compared with the baseline of its round. "
        "`python -m benchmarks.figures` measures more often [the five that have a target]"
        "(../performance.md#the-five-figures).",
        "\n".join(f"- {name}: {text}" for name, text in circumstances.items()),
    ]
    for result in results:
        parts.append(table(bench, result))
        if result.name in files:
            parts.append(f"![{result.title}]({files[result.name]})")
    text = "\n\n".join(parts) + "\n"
    (output / "README.md").write_text(text, encoding="utf-8")
    data = {"about": circumstances, "results": [asdict(result) for result in results]}
    as_json = json.dumps(data, ensure_ascii=False, indent=1)
    (output / "results.json").write_text(as_json + "\n", encoding="utf-8")
    return text
