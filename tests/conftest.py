"""Puts the tests' own helpers on the path, and gives each test that wants one a broker."""

from __future__ import annotations

import gc
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from brokers import BrokerKind, BrokerProcess, running

import pachinko_cluster


@given(st.none())
def begin(_: None) -> None:
    """A test of Hypothesis, which has a generator of random numbers from then on."""


def pytest_collection_finish() -> None:
    """What the modules have made stays to the end, and no search for garbage looks at it again."""
    begin()  # The generator asks then who refers to it: what is frozen would not be found.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def no_garbage() -> Iterator[None]:
    """A simulation looks at all tasks that there are, also at those of loops that have ended."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def no_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of whoever runs the tests is none of theirs."""
    monkeypatch.delenv("PACHINKO_BACKPLANE", raising=False)


@pytest.fixture(params=get_args(BrokerKind))
def kind(request: pytest.FixtureRequest) -> BrokerKind:
    """A test that asks for it is run with each broker."""
    kind: BrokerKind = request.param
    return kind


@pytest.fixture
async def broker(kind: BrokerKind, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[BrokerProcess]:
    """A broker; processes on it may take longer to say who is there than they may in use."""
    monkeypatch.setattr(pachinko_cluster, "_PRESENCE", 1.0)
    async with running(kind) as broker:
        yield broker
