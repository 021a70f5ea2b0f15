"""What a message costs in process, by counts that are the same in every run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(
    not (TREE / "hatch_build.py").exists(), reason="needs the files of the checkout"
)

# About an eighth above what it was on the Python that needs most: new versions of Falcon, attrs,
# cattrs and Python itself change the counts too.
LIMITS = [
    ("typed message and reply", "instructions", 270),
    ("typed message and reply", "C calls", 7),
    ("fields and int reply", "instructions", 250),
    ("fields and int reply", "C calls", 7),
    ("message without a reply", "instructions", 126),
    ("message without a reply", "C calls", 4),
    ("connect and disconnect", "instructions", 2430),
    ("connect and disconnect", "C calls", 61),
    ("receiver of a group send", "instructions", 103),
    ("receiver of a group send", "C calls", 3),
    ("idle, more than Falcon's", "bytes", 1536),  # 1.5 KiB
]


@pytest.fixture(scope="module")
def figures():
    """What `benchmarks.instructions` counts, without coverage, which traces as well."""
    command = [sys.executable, "-m", "benchmarks.instructions", "--json"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    return json.loads(subprocess.check_output(command, cwd=TREE, env=environment))


@pytest.mark.parametrize(("case", "column", "limit"), LIMITS)
def test_what_it_costs_has_a_limit(figures, case, column, limit):
    """A change that makes every message, connection or receiver dearer is noticed."""
    assert figures[case][column] <= limit, (
        f"{case}: {figures[case][column]} {column}, the limit is {limit}. Compare what `python -m "
        f"benchmarks.instructions` prints with and without the change, and with other versions of "
        f"the packages it names. Make pachinko.py cheaper again; or raise the limit in {__file__}, "
        f"where another package is the reason, or where the change is worth its cost."
    )
