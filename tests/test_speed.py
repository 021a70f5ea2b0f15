"""What a message costs in process, by counts that are the same in every run."""

import importlib
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
    ("a message that comes alone", "in pachinko.py", 300),  # the rest is mostly the event loop's
    ("a message that comes alone", "from pachinko.py", 8),
    ("fields and int reply", "instructions", 250),
    ("fields and int reply", "C calls", 7),
    ("message without a reply", "instructions", 157),
    ("message without a reply", "C calls", 4),
    ("middleware", "instructions", 405),
    ("middleware", "C calls", 9),
    ("an unknown type", "instructions", 530),  # it may be a ping or an answer; it is logged
    ("an unknown type", "C calls", 16),
    ("handler that suspends", "in pachinko.py", 415),  # as above
    ("handler that suspends", "from pachinko.py", 11),
    ("connect and disconnect", "instructions", 2550),  # each handler of a handshake is bounded
    ("connect and disconnect", "C calls", 57),
    ("receiver of a group send", "instructions", 71),
    ("receiver of a group send", "C calls", 2),
    ("idle, more than Falcon's", "bytes", 1536),  # 1.5 KiB
    ("a send to a kept group", "in pachinko.py", 740),
    ("a send to a kept group", "from pachinko.py", 27),
    ("a message that was missed", "in pachinko.py", 145),  # as above
    ("a message that was missed", "from pachinko.py", 4),
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


@pytest.mark.parametrize("column", ["instructions", "C calls"])
def test_a_message_of_an_included_file_costs_what_others_cost(figures, column):
    """An app in several files is as fast as one in one file."""
    assert figures["included"][column] == figures["typed message and reply"][column]


@pytest.fixture(scope="module")
def five():
    """The module `benchmarks.figures`, where what the benchmarks need is installed."""
    return pytest.importorskip("benchmarks.figures", reason="needs psutil")


@pytest.fixture
def result(five):
    """Three rounds: Pachinko costs 1, 2 and 3 times what the peer costs."""
    rounds = {"bare": [10.0, 20.0, 10.0], "pachinko": [20.0, 20.0, 30.0], "bare again": [10.0] * 3}
    return five.Result("group", "a title", "µs", "a method", "falcon_expert", rounds=rounds)


@pytest.mark.parametrize(("most", "holds"), [(1.99, False), (2.0, True)])
def test_a_figure_is_the_median_of_ratios_to_the_peer_of_the_same_round(five, result, most, holds):
    """A ratio of the medians would be that of two different rounds, and more noisy."""
    outcome = five.outcome_of(five.Figure("a group", five.measurements.group, "bare", most), result)
    assert (outcome.median, outcome.lowest, outcome.highest) == (2.0, 1.0, 3.0)
    assert outcome.noise == (1.0, 0.5, 1.0)
    assert outcome.holds is holds
    (line,) = [line for line in five.table([outcome], {}).splitlines() if "a group" in line]
    cells = [cell.strip() for cell in line.strip("| ").split("|")]
    noise = "1.00 (0.50 … 1.00)"
    verdict = "yes" if holds else "no"
    assert cells == ["a group", "bare", f"≤ {most:.2f}", "2.00", "1.00 … 3.00", noise, verdict]


def test_a_figure_may_be_a_difference(five, result):
    """Memory is compared in KiB: what an idle connection takes more than the peer's."""
    result.is_difference, result.unit = True, "KiB"
    outcome = five.outcome_of(five.Figure("a group", five.measurements.group, "bare", 1.5), result)
    assert (outcome.median, outcome.lowest, outcome.highest) == (10.0, 0.0, 20.0)
    assert "| +10.00 KiB |" in five.table([outcome], {})


@pytest.mark.parametrize("entry", ["bare", "pachinko", "bare again"])
def test_a_figure_needs_all_three(five, result, entry):
    """What could not be measured is no figure, and the error says what was missing."""
    figure = five.Figure("a group", five.measurements.group, "bare", 1.5)
    result.errors[entry] = "it ended"
    with pytest.raises(ValueError, match=f"^a group: {entry}: it ended$"):
        five.outcome_of(figure, result)
    result.errors.clear()
    del result.rounds[entry]
    with pytest.raises(ValueError, match=f"^a group: {entry}: not measured$"):
        five.outcome_of(figure, result)


def test_a_request_in_a_simulation_is_measured_beside_one_by_hand():
    """The three clients that need nothing but Falcon do the same work, and none is left out."""
    # In a process of its own, as it takes much longer beside what other tests have left in memory.
    code = (
        "import json; from benchmarks import simulating; "
        "own = {name: each for name, each in simulating.CLIENTS.items() if not each[1]}; "
        "print(json.dumps([list(own), simulating.measure(1, share=20, clients=own)]))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    own, figures = json.loads(subprocess.check_output(command, cwd=TREE))
    assert list(figures["request"]) == list(figures["connection"]) == own
    assert list(figures["send"]) == ["by hand", "simulate", "by hand, again"]
    assert list(figures["settle"]) == ["simulate"]


async def test_what_kept_groups_cost_is_measured(five):
    """The measures of the benchmark do the work that they name, in small."""
    own = importlib.import_module("benchmarks.history").Own()
    await own.about()
    await own.grow(3)
    assert await own.send("kept", 2) > 0 < await own.send("plain", 2)
    taken, counted = await own.weigh(100, 200)
    assert 0.8 * taken < counted < 1.2 * taken
    assert set(await own.replay(4, 3)) == {"turn", "cpu"}
    await own.end()
