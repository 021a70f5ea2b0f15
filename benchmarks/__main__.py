"""Measure, and write the report: ``python -m benchmarks --quick`` for a first look."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks import peers, report
from benchmarks.measurements import MEASUREMENTS, Bench, log


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    known, all_peers = ", ".join(MEASUREMENTS), ", ".join(peers.NAMES)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and less in each")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, metavar="NAME", help=known)
    parser.add_argument("--peers", nargs="+", choices=peers.NAMES, metavar="NAME", help=all_peers)
    parser.add_argument("--rounds", type=int, help="21, or 3 with --quick")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), metavar="DIR")
    options = parser.parse_args()

    names = [name for name in peers.NAMES if name in ("bare", *(options.peers or peers.NAMES))]
    rounds = options.rounds or (3 if options.quick else 21)
    bench, results, begun = Bench(names, rounds=rounds, quick=options.quick), [], time.monotonic()
    try:
        for name in options.only or MEASUREMENTS:
            log(f"{name}, after {time.monotonic() - begun:.0f} s")
            results.extend(MEASUREMENTS[name](bench))
    finally:
        bench.stop()
    print(report.write(bench, results, options.output))
    log(f"done after {time.monotonic() - begun:.0f} s; the report is in {options.output}")


if __name__ == "__main__":
    main()
