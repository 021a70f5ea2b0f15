"""Measure a cluster, and what others do in its place: ``python -m benchmarks.cluster --quick``.

Two processes of each app and a broker between them: what a message to a group costs whose members
are in both. And what else Pachinko's processes have to do when there is a broker.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from benchmarks import cluster_report as report
from benchmarks.cluster_measurements import ENTRIES, ClusterBench, deliveries, groups, latencies
from benchmarks.cluster_measurements import memory as idle
from benchmarks.measurements import log


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and less in each")
    parser.add_argument("--rounds", type=int, help="21, or 3 with --quick")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what one thing costs")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables; else printed")
    options = parser.parse_args()

    rounds = options.rounds or (3 if options.quick else 21)
    bench = ClusterBench(ENTRIES, rounds=rounds, quick=options.quick)
    begun, load, results = time.monotonic(), os.getloadavg()[0], {}
    try:
        for measure in (deliveries, latencies, groups, idle):
            log(f"{measure.__name__}, after {time.monotonic() - begun:.0f} s")
            results.update({result.name: result for result in measure(bench)})
            bench.stop()
    finally:
        bench.stop()
    circumstances = report.about(bench, load)
    text = report.as_markdown(bench, results, circumstances)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    else:
        print(text)
    if options.json:
        costs = report.as_json(bench, results, circumstances)
        as_text = json.dumps(costs, ensure_ascii=False, indent=1)
        options.json.write_text(as_text + "\n", encoding="utf-8")
    log(f"done after {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
