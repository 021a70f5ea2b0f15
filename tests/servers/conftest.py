"""Each test runs once with each of the servers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from observed import SERVERS, Observed
from process import Process, running

numbers = itertools.count(1)


@pytest.fixture(scope="module", params=SERVERS, ids=str)
def observed(request: pytest.FixtureRequest) -> Observed:
    found: Observed = request.param
    return found


@pytest.fixture(scope="module")
def server(observed: Observed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A running server, one for all tests of a module."""
    with running(observed, tmp_path_factory.mktemp("server")) as process:
        yield process


@pytest.fixture
def doomed(observed: Observed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A running server that the test is going to end."""
    process = Process(observed, tmp_path_factory.mktemp("doomed"))
    try:
        yield process
    finally:
        process.kill()


@pytest.fixture(params=["room"])
def room(request: pytest.FixtureRequest) -> str:
    """A room of one's own; those called ``timeout-…`` and ``contextvar-…`` wrap ``send``."""
    return f"{request.param}-{next(numbers)}"
