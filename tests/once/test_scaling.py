"""The model behind docs/scaling.md: its formulas, its simulations, and the page's tables."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pachinko
import pachinko_cluster

TREE = Path(__file__).resolve().parents[2]
PAGE = TREE / "docs" / "scaling.md"


def load() -> ModuleType:
    """By its path: where the installed wheel is tested, the tree is not on Python's."""
    spec = importlib.util.spec_from_file_location("scaling", TREE / "benchmarks" / "scaling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look annotations up
    spec.loader.exec_module(module)
    return module


scaling: Any = load()

BROKER = {"delivery_us": 20, "message_us": 50, "broker_us": 5, "restore_s": 1}
COSTS: dict[str, Any] = {
    "machine": "a machine", "python": "CPython 3", "date": "2026-11-27",
    "brokers": {"memory": {"delivery_us": 20}, "nats": BROKER, "redis": BROKER},
    "connection_kib": 25, "deliveries_per_s": 50_000,
}  # fmt: skip
ASSUMED = scaling.Assumed()
GROUPS, GIANT = (10_000, 100), (1, 1_000_000)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The costs of this test, as the command reads them."""
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps(COSTS))
    return path


@pytest.fixture
def costs(file: Path) -> Any:
    return scaling.read_costs(file)


# Formulas and simulations


@pytest.mark.parametrize("processes", [1, 2, 10, 40, 100, 1000])
@pytest.mark.parametrize("members", [1, 100, 3000])
def test_copies(processes: int, members: int) -> None:
    """A message goes to as many processes as the formula says, when connections come to lie."""
    expected = scaling.reached(members, processes)
    found = scaling.place(random.Random(1), 30_000 // members + 20, members, processes)
    assert found.copies == pytest.approx(expected, rel=0.03)
    assert expected <= min(members, processes) + 1e-9


def test_a_sticky_group_has_one_copy() -> None:
    """And its process may have more connections than others, but all are somewhere."""
    found = scaling.place(random.Random(1), 1000, 100, 50, is_sticky=True)
    assert found.copies == scaling.Load(1000, 100, 1, True).copies(50) == 1
    assert 1 < found.fullest < 3
    assert found.fullest > scaling.place(random.Random(1), 1000, 100, 50).fullest


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("works", [[0.01], [0.001, 0.002, 0.01]], ids=["same", "different"])
def test_waiting(works: list[float], share: float) -> None:
    """A process that takes messages one by one lets them wait as long as the formula says."""
    rate = share / statistics.fmean(works)
    found = scaling.queue(random.Random(1), rate, works, 5000)
    expected = scaling.Peaks.expected(rate, works)
    assert found.mean == pytest.approx(share, rel=0.03)
    assert expected.mean == pytest.approx(share)
    assert found.p99 == pytest.approx(expected.p99, rel=0.1)  # sums of few
    assert found.wait_s == pytest.approx(expected.wait_s, rel=0.1)
    assert found.wait_p99_s > found.wait_s


@pytest.mark.parametrize(
    ("processes", "subscriptions"), [(1, 20_000), (10, 5000), (100, 5000), (400, 2500)]
)
def test_recovery(processes: int, subscriptions: int) -> None:
    """If nobody gives up, the slower of broker and process decides when all are back."""
    costs = 100.0, 4.0
    found = scaling.recover(random.Random(1), processes, subscriptions, *costs, ASSUMED, down_s=0.0)
    best = scaling.recovery_at_best(processes, subscriptions, *costs)
    assert found.failed == 0
    assert best * (1 - 1e-9) <= found.last_s <= 1.1 * best + 0.06  # the last one's last batch
    assert found.median_s <= found.last_s


def test_a_broker_that_is_too_slow() -> None:
    """Processes that wait too long give up and come again, and it takes longer than it must."""
    many = 9000, 600, 100.0, 4.0
    found = scaling.recover(random.Random(1), *many, ASSUMED, down_s=0.0, patience_s=60)
    assert found.failed > 9000
    assert found.last_s > 2 * scaling.recovery_at_best(*many)
    quicker = scaling.recover(random.Random(1), *many[:3], 1.0, ASSUMED, down_s=0.0)
    assert quicker.failed == 0 and math.isfinite(quicker.last_s)


def test_the_same_seed_gives_the_same(costs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is simulated is repeatable, and depends on nothing but the seed."""
    first, again, other = (scaling.Page(costs, seed) for seed in (1, 1, 2))
    monkeypatch.setattr(scaling, "PROCESSES", (10, 300))  # to be quick
    monkeypatch.setattr(scaling, "SECONDS", 20)
    for name in ("placement", "peaks", "recovery"):
        tables = [getattr(page, name)() for page in (first, again, other)]
        assert tables[0] == tables[1] != tables[2], name
        random.seed(5)  # nobody's


# Plans


@pytest.mark.parametrize("rate", [0.01, 1, 5, 50])
@pytest.mark.parametrize(("shape", "sticky"), [(GROUPS, False), (GROUPS, True), (GIANT, False)])
def test_a_plan_is_as_small_as_can_be(
    costs: Any, shape: tuple[int, int], sticky: bool, rate: float
) -> None:
    """The processes are enough, one fewer is not; the same holds for the nodes of NATS."""
    load = scaling.Load(*shape, rate, sticky)
    found = scaling.plan(load, "nats", costs, ASSUMED)
    assert found.share <= ASSUMED.full
    fewer = scaling.Plan(load, "nats", costs, ASSUMED, found.processes - 1, found.floor)
    assert found.processes == found.floor or fewer.share > ASSUMED.full
    assert (found.bound == "connections") == (found.processes == found.floor)
    assert found.floor * min(scaling.capacity(costs, ASSUMED).values()) >= load.connections
    if found.nodes is not None:
        assert found.of_nodes(found.nodes) <= ASSUMED.full
        assert found.nodes == 1 or found.of_nodes(found.nodes - 1) > ASSUMED.full


def test_what_flows(costs: Any) -> None:
    """Copies and bytes by hand, for two processes of which a group of one is at one."""
    load = scaling.Load(20_000, 1, 0.5)
    found = scaling.plan(load, "redis", costs, ASSUMED)
    assert (found.processes, found.copies, found.hosts) == (2, pytest.approx(1), 1)
    beats = 2 * ASSUMED.beats
    assert found.broker_copies == pytest.approx(10_000 + beats)
    assert found.broker_in == pytest.approx((10_000 + beats) * 320)
    assert found.broker_out == pytest.approx(found.host_in) == pytest.approx(found.broker_in)
    assert found.host_out == pytest.approx(10_000 * 270 + found.broker_in)
    assert found.of_one == pytest.approx((10_000 + beats) * 5e-6)
    assert found.cores == pytest.approx(10_000 * 70e-6 + beats * 50e-6 + 20_000 / 20 * 100e-6)


def test_busy_costs_count_where_they_are_known(tmp_path: Path) -> None:
    """What a message costs among many, and how that divides, is used if it has been measured."""
    more = {"message_busy_us": 25, "publish_us": 60, "receive_us": 20, "broker_busy_us": 2}
    brokers = {**COSTS["brokers"], "nats": BROKER | more}
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({**COSTS, "brokers": brokers}))
    unit = scaling.read_costs(path).brokers["nats"]
    assert (unit.publish, unit.receive, unit.copy) == (30, 10, 2)
    plain = scaling.BrokerCosts(**BROKER)
    assert (plain.publish, plain.receive, plain.copy) == (0, 50, 5)


def test_a_limit_is_where_it_begins() -> None:
    """The rate that is found is over the limit, and hardly less is not."""
    found = scaling.first_rate(lambda rate: rate > 3)
    assert 3 < found < 3.01
    assert scaling.first_rate(lambda rate: False) == math.inf


# What is assumed of Pachinko


def test_what_is_assumed_is_so() -> None:
    """Pachinko tries again, and notices, after the times that the model and the page name."""
    assert ASSUMED.reconnect_s == pachinko_cluster._RECONNECT
    assert ASSUMED.batch_s == pachinko_cluster._RESTORE
    assert pytest.approx(ASSUMED.beats) == 1 / pachinko_cluster._BEAT
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert f"{pachinko_cluster._BEAT * pachinko_cluster._MISSED:g} seconds of silence" in text
    assert "after 0.1, 0.2, 0.5, 1, 2 and then every 5 seconds" in text
    assert f"once it is {pachinko_cluster._BROKER_WAIT:g} seconds behind" in text
    assert f"{pachinko_cluster._PRESENCE:g} seconds" in text


async def test_the_bytes_of_a_post() -> None:
    """What Pachinko adds to a message between processes is what the model adds."""
    sent: list[bytes] = []

    class Mirror:
        async def start(self, deliver: pachinko.Deliver, lost: pachinko.Lost) -> None:
            self.deliver = deliver

        async def publish(self, subject: str, data: bytes) -> None:
            sent.append(data)
            await self.deliver(subject, data)

        async def subscribe(self, subject: str) -> None:
            pass

        unsubscribe = subscribe

        async def stop(self) -> None:
            pass

    async with pachinko.Hub().open(Mirror()) as hub:
        await hub.send("room:1", "said", {"text": "hi"})
    (data,) = (data for data in sent if b"said" in data)
    frame = b'{"type":"said","payload":{"text":"hi"},"group":"room:1"}'
    assert data.endswith(b"\n" + frame)
    added = len(data) - len(frame)
    assert added <= ASSUMED.head <= added + 20  # numbers grow


# The page and the command


def test_the_page_has_the_tables_of_the_committed_costs() -> None:
    """Each table of docs/scaling.md is what the script makes of docs/benchmarks/cluster.json."""
    again = "run: python -m benchmarks.scaling --markdown docs/scaling.md"
    assert scaling.COSTS.exists(), f"measure, and then {again}"
    text = PAGE.read_text(encoding="utf-8")
    parts = scaling.Page(scaling.read_costs(scaling.COSTS)).parts()
    for name, part in parts.items():
        begin, end = f"<!-- begin: {name} -->\n", f"\n<!-- end: {name} -->"
        assert text.partition(begin)[2].partition(end)[0] == part, f"{name}: {again}"
    assert scaling.fill(text, parts) == text, again


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command prints."""
    scaling.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_the_command(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It prints all tables, or puts them into a page; into the same page again, the same."""
    monkeypatch.setattr(scaling, "PROCESSES", (10,))  # to be quick
    monkeypatch.setattr(scaling, "SECONDS", 5)
    printed = run(capsys, "--costs", file)
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    run(capsys, "--costs", file, "--markdown", page)
    once = page.read_text(encoding="utf-8")
    assert once != PAGE.read_text(encoding="utf-8") and "a machine" in once
    parts = printed.split("\n\n## ")
    assert len(parts) == once.count("<!-- begin") > 8
    for part in parts:
        assert part.partition("\n\n")[2].strip() in once
    run(capsys, "--costs", file, "--markdown", page)
    assert page.read_text(encoding="utf-8") == once


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (None, "No such file"),
        ("[", "is no JSON"),
        ("[]", "brokers.memory.delivery_us should be a number above 0, not None"),
        ({"brokers": {}}, "brokers.memory.delivery_us should be a number above 0, not None"),
        ({"brokers": 5}, "brokers.memory.delivery_us"),
        ({"connection_kib": "25"}, "connection_kib should be a number above 0, not '25'"),
        ({"connection_kib": True}, "connection_kib"),
        ({"deliveries_per_s": 0}, "deliveries_per_s should be a number above 0, not 0"),
        ({"deliveries_per_s": math.inf}, "deliveries_per_s"),
        ({"date": 2026}, "date should be a text, not 2026"),
        ({"nats": {"broker_us": None}}, "brokers.nats.broker_us"),
        ({"redis": {"message_us": -1}}, "brokers.redis.message_us"),
        ({"redis": {"latency_p50_ms": "fast"}}, "brokers.redis.latency_p50_ms"),
        ({"nats": {"message_us": 1e9}}, "no number of processes is enough"),
    ],
)
def test_costs_that_are_none(
    change: Any, why: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is missing or wrong is named, with what is wrong and the way to a new one."""
    if change is None:
        file.unlink()
    elif isinstance(change, str):
        file.write_text(change)
    else:
        brokers = {name: old | change.get(name, {}) for name, old in COSTS["brokers"].items()}
        file.write_text(json.dumps(COSTS | {"brokers": brokers} | change))
    with pytest.raises(SystemExit) as caught:
        run(capsys, "--costs", file)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert why in printed.err and printed.out == ""
    assert "no number" in why or (str(file) in printed.err and "benchmarks.cluster" in printed.err)


@pytest.mark.parametrize(
    "text",
    [
        "no place at all",
        "<!-- begin: limits -->\n<!-- end: limits -->",
        "<!-- begin: limits -->\n<!-- end: peaks -->",
        "<!-- begin: limits -->\n<!-- begin: peaks -->\n<!-- end: limits -->",
    ],
)
def test_a_page_without_the_places(text: str) -> None:
    """A page that lacks a place, or closes another than it has opened, is not written."""
    with pytest.raises(ValueError, match="should have places for"):
        scaling.fill(text, {"limits": "x", "peaks": "y"})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (17, "17"), (0.0474, "0.047"), (9.96, "10"), (1234, "1,200"), (99.6, "100"),
        (1.0, "1.0"), (0.95, "0.95"), (2_700_000, "2,700,000"), (math.inf, "never"),
    ],
)  # fmt: skip
def test_figures(value: float, text: str) -> None:
    """A number has two digits that mean something."""
    assert scaling.figure(value) == text
