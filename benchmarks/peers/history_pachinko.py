"""Pachinko with a kept group. Its clients resume from the position that they have."""

from __future__ import annotations

import json
import urllib.parse
from typing import Any

from benchmarks.peers import pachinko_
from benchmarks.peers.pachinko_ import LABEL, PACKAGES
from benchmarks.workload import Wire
from pachinko import hub

__all__ = ["FRAMES", "LABEL", "OTHERS", "PACKAGES", "WIRE", "create_app", "target"]

FRAMES: tuple[str, ...] = ()
OTHERS = 1  # the verdict


def resuming(**payload: Any) -> str:
    return f"/group?resume={urllib.parse.quote(json.dumps(payload))}"


class Resuming(Wire):
    """A client of the group learns its position when it comes."""

    group_path = resuming()
    prelude = ((None, '{"type":"resume"'),)


WIRE: Wire = Resuming()


def target(heard: str) -> str:
    return resuming(groups={"all": json.loads(heard)["at"]}, ids=[])


def create_app() -> Any:
    hub.keep("all", messages=100)
    return pachinko_.create_app()
