"""Ports for servers that the tests start in processes of their own."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import random
import socket
from collections.abc import Iterator


def free_port() -> int:
    """A port of 127.0.0.1 that no other run of the tests takes, also while its server is down."""
    for port in itertools.islice(_own_ports(), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("none of the hundred ports of these tests is free")


@functools.cache
def _own_ports() -> Iterator[int]:
    """A hundred ports, over and over: below those that the system gives away by itself.

    A UDP socket at the first one, kept to the end, makes them this run's. A node of a Redis cluster
    takes the port 10,000 above its own as well, which is nobody's.
    """
    for first in random.sample(range(12_000, 22_000, 100), 100):
        ours = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with contextlib.suppress(OSError):
            ours.bind(("127.0.0.1", first))
            atexit.register(ours.close)
            return itertools.cycle(range(first, first + 100))
        ours.close()
    raise AssertionError("a hundred other runs of the tests go on")
