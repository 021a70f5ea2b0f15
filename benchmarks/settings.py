"""What a server's settings cost: ``python -m benchmarks.settings`` prints a table in Markdown.

The harness measures each setting as if it were a peer. Other than there, the clients offer to be
sent compressed messages, as browsers do; and no two group messages are alike, since one that has
just been sent compresses at half the cost.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import platform
import random
import statistics
import zlib
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import uvicorn
import uvloop

from benchmarks import load, measurements, server
from benchmarks.machine import cpu_model
from benchmarks.measurements import Bench, Result
from benchmarks.peers import pachinko_
from benchmarks.processes import Child, Pipe, allow_open_files, answer_all, explained
from benchmarks.workload import Wire
from pachinko import Connection, hub

USUAL: dict[str, Any] = {
    "ws": "websockets-sansio", "ws_per_message_deflate": False, "http": "httptools",
    "loop": uvloop.new_event_loop, "gc": gc.collect,
}  # fmt: skip
BASE = "`--ws-per-message-deflate false`"
SETTINGS: dict[str, dict[str, Any]] = {  # what is not as usual
    BASE: {},
    f"{BASE} again": {},
    "with compression, the default": {"ws_per_message_deflate": True},
    "`--ws websockets`": {"ws": "websockets"},
    "`--ws wsproto`": {"ws": "wsproto"},
    "`--loop asyncio`": {"loop": asyncio.new_event_loop},
    "`--http h11`": {"http": "h11"},
    "`gc.disable()`": {"gc": gc.disable},
}
COLUMNS: dict[str, Callable[[Bench], list[Result]]] = {
    "µs a message": measurements.dispatch, "µs a delivery": measurements.group,
    "µs to come and go": measurements.connections, "KiB a connection": measurements.memory,
}  # fmt: skip
OFFER = " HTTP/1.1\r\nSec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\nX:"
BROWSER = Wire()  # a request that names one of its paths also offers compression
BROWSER.path += OFFER
BROWSER.group_path += OFFER
WORDS = ("a", "room", "where", "people", "talk", "about", "lunch", "and", "the", "green", "ball")


async def shout(conn: Connection, msg: pachinko_.Shout) -> pachinko_.Y:
    """As the peer does, but each time with another text of that length."""
    for _ in range(msg.count):
        text = " ".join(random.choices(WORDS, k=len(msg.text)))[: len(msg.text)]
        await hub.send("all", pachinko_.Heard(text))
    return pachinko_.Y(msg.count, "done")


def serve(pipe: Pipe, name: str) -> None:
    """A child of the harness: Pachinko under uvicorn with one of the settings."""
    options = USUAL | SETTINGS[name]
    loop_factory, prepare, config = options.pop("loop"), options.pop("gc"), uvicorn.Config

    def configure(app: Any, **others: Any) -> uvicorn.Config:
        prepare()
        return config(app, **others | options)

    with (
        explained(pipe),
        mock.patch.object(uvicorn, "Config", configure),
        mock.patch.multiple(pachinko_, WIRE=BROWSER, shout=shout),
        asyncio.Runner(loop_factory=loop_factory) as runner,
    ):
        allow_open_files()
        runner.run(server.serve("pachinko", pipe))


class Client(load.Client):
    """Inflates what comes compressed, and is otherwise as usual."""

    part = b""  # of a frame
    inflate: Any = None

    def data_received(self, data: bytes) -> None:
        if self.inflate is None:  # this answers the handshake
            self.inflate = zlib.decompressobj(-zlib.MAX_WBITS).decompress
            return super().data_received(data)
        data, at, plain = self.part + data, 0, b""
        while len(data) >= at + 2:
            size, start = data[at + 1], at + 2
            if size == 126:
                size, start = int.from_bytes(data[at + 2 : at + 4]), at + 4
            if len(data) < start + size:
                break
            frame = data[at : start + size]
            if frame[0] == load.TEXT | 0x40:  # compressed
                text = self.inflate(data[start : start + size] + b"\0\0\xff\xff")
                head = bytes([len(text)]) if len(text) < 126 else b"\x7e" + len(text).to_bytes(2)
                frame = bytes([load.TEXT]) + head + text
            plain, at = plain + frame, start + size
        self.part = data[at:]
        super().data_received(plain)


def run_load(pipe: Pipe) -> None:
    with mock.patch.object(load, "Client", Client):
        answer_all(pipe, load.Load)


class Settings(Bench):
    """Measures the settings where the harness would measure peers."""

    def entries(self, only: Iterable[str] = (), *, again: bool = True) -> list[str]:
        return list(SETTINGS)

    def start(self, target: Callable[..., None], entries: Iterable[str]) -> dict[str, Child]:
        return super().start(serve, entries)

    def choose(self, full: int, quick: int) -> int:
        return max(quick, full // 2)  # 500 receivers, 1000 idle connections


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.settings", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    bench, rows = Settings([], rounds=parser.parse_args().rounds, quick=False), [list(SETTINGS)]
    try:
        with mock.patch.object(load, "run", run_load):
            for measure in COLUMNS.values():
                (result,) = measure(bench)
                result.baseline, result.is_difference = BASE, False
                medians = [float(f"{statistics.median(result.rounds[n]):.2g}") for n in SETTINGS]
                ratios = [f"{statistics.median(result.compared(name)):.1f}" for name in SETTINGS]
                rows.append([f"{m:g} ({ratio})" for m, ratio in zip(medians, ratios, strict=True)])
    finally:
        bench.stop()
    lines = [["", *COLUMNS], ["---"] + ["---:"] * len(COLUMNS), *zip(*rows, strict=True)]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    print(f"\n{cpu_model()}, Python {platform.python_version()}, {bench.versions}")


if __name__ == "__main__":
    main()
