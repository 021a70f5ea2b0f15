"""A server as a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from observed import Observed
from ports import free_port

HERE = Path(__file__).parent
START = 30  # seconds for what takes one or two, on a slow and noisy machine
GRACE = 8  # seconds that a server gives open connections after SIGTERM, where it can be told


def is_alive(address: str) -> bool:
    """Whether it is ``app.py`` that answers there."""
    with urllib.request.urlopen(f"{address}/alive", timeout=5) as answer:
        return bool(json.load(answer) == {"alive": True})


class Process:
    """One server process that serves ``app.py``, or another *module* of a *directory*."""

    def __init__(
        self,
        observed: Observed,
        folder: Path,
        module: str = "app",
        directory: Path = HERE,
        is_alive: Callable[[str], bool] = is_alive,
    ) -> None:
        self.observed, self.module, self.directory = observed, module, directory
        self.is_alive = is_alive
        self.log = folder / "log"
        self.output = folder / "output"
        self.start()

    def start(self) -> None:
        """Start it, or start it again with an empty log."""
        self.log.write_text("")
        for _ in range(3):  # another process may have taken the free port
            self.port = free_port()
            self.popen = self._spawn()
            if self._is_ready():
                break
        else:
            raise AssertionError(f"{self.observed} did not start:\n{self.output.read_text()}")

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = f"{self.observed.command} {self.observed.options}"
        command = command.replace(" app:app ", f" {self.module}:app ")
        with self.output.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", *command.format(grace=GRACE, port=self.port).split()],
                cwd=self.directory,
                env={
                    **os.environ,
                    "PACHINKO_TEST_LOG": str(self.log),
                    "PYTHONPATH": os.pathsep.join([str(self.directory), folder_of("pachinko")]),
                },
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what it has started can be ended with it
            )

    def _is_ready(self) -> bool:
        """Wait until it answers; False when it has ended instead, or takes too long."""
        address = f"http://127.0.0.1:{self.port}"
        deadline = time.monotonic() + START
        while time.monotonic() < deadline and self.popen.poll() is None:
            # Another process may have taken the port, and answer in its own way.
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                return self.is_alive(address)
            time.sleep(0.02)
        self.kill()
        return False

    def lines(self, room: str | None = None, event: str | None = None) -> list[dict[str, Any]]:
        """What the app has logged, of one room or one kind."""
        whole, _, _ = self.log.read_text().rpartition("\n")  # The last line may be half written.
        lines = [json.loads(line) for line in whole.splitlines()]
        return [
            line
            for line in lines
            if room in (None, line["room"]) and event in (None, line["event"])
        ]

    def events(self, room: str | None = None) -> list[str]:
        return [line["event"] for line in self.lines(room)]

    def terminate(self) -> None:
        """SIGTERM, as from systemd or Kubernetes."""
        self.popen.send_signal(signal.SIGTERM)

    def ends_within(self, seconds: float) -> bool:
        try:
            self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """Make sure that nothing of it is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()


@contextlib.contextmanager
def running(observed: Observed, folder: Path, *served: Any) -> Iterator[Process]:
    """A `Process` that ends on SIGTERM, when no connections are left."""
    process = Process(observed, folder, *served)
    try:
        yield process
        process.terminate()
        assert process.ends_within(START), f"{observed} goes on after SIGTERM, without connections"
    finally:
        process.kill()


def folder_of(module: str) -> str:
    """Where *module* is imported from, be it a file or a package."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin)
    return str(path.parents[1] if path.name == "__init__.py" else path.parent)
