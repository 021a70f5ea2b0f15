"""Serve one peer on a free port: ``python -m benchmarks.server PEER``."""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.metadata
import os
import socket
import time
from typing import Any

import psutil
import uvicorn
import uvloop

from benchmarks import peers
from benchmarks.processes import Pipe, allow_open_files, answer, explained
from benchmarks.workload import TYPES, Wire

BACKLOG = 4096  # connections that nobody has accepted yet
REQUESTS = 320  # different ones; more than a client has on their way


def versions(*packages: str) -> dict[str, str]:
    """Of distributions that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "from the checkout"
    return found


class Desk:
    """Answers about the process, and about how to talk to the peer."""

    def __init__(self, peer: Any, listener: socket.socket) -> None:
        self.peer = peer
        self.wire: Wire = peer.WIRE
        self.listener = listener
        self.process = psutil.Process()

    def about(self) -> dict[str, Any]:
        return {
            "label": self.peer.LABEL,
            "versions": versions("uvicorn", "uvloop", "websockets", *self.peer.PACKAGES),
            "port": self.listener.getsockname()[1],
            "path": self.wire.path,
            "group_path": self.wire.group_path,
            "prelude": self.wire.prelude,
            "requests": [self.wire.request(id % len(TYPES), id) for id in range(REQUESTS)],
        }

    def shout(self, size: int) -> str:
        return self.wire.shout(1, "x" * size)

    def check_replies(self, texts: list[str]) -> bool:
        """Whether *texts* answer the first of the requests."""
        check = self.wire.check
        return all(check(text, id % len(TYPES), id) for id, text in enumerate(texts))

    def count_group_messages(self, texts: list[str]) -> int:
        return sum(map(self.wire.is_group_message, texts))

    def usage(self) -> dict[str, Any]:
        """CPU seconds so far, resident bytes, and what the peer counts itself."""
        return {
            "cpu": time.process_time(),
            "memory": self.process.memory_info().rss,
            "stats": self.peer.stats() if hasattr(self.peer, "stats") else {},
        }

    def collect(self) -> int:
        """Resident bytes without garbage."""
        gc.collect()
        return int(self.process.memory_info().rss)

    def limit_send_buffers(self, size: int) -> None:
        """Of connections from now on: they have it from the listening socket."""
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)


async def serve(name: str, pipe: Pipe | None = None) -> None:
    """Serve the peer, and answer what is asked through *pipe* until that ends."""
    peer = peers.load(name)
    listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    desk = Desk(peer, listener)

    def read(pipe: Pipe) -> None:
        try:
            answer(pipe, desk)
        except EOFError:
            os._exit(0)  # connections that are open would hold up anything gentler

    if pipe is not None:
        asyncio.get_running_loop().add_reader(pipe.fileno(), read, pipe)
        os.set_blocking(pipe.fileno(), True)  # uvloop has just turned that off
    print(f"{peer.LABEL}: ws://127.0.0.1:{listener.getsockname()[1]}{peer.WIRE.path}", flush=True)
    if hasattr(peer, "serve"):
        await peer.serve(listener)
        return
    config = uvicorn.Config(
        peer.create_app(),
        backlog=BACKLOG,
        log_level="warning",
        ws_per_message_deflate=False,
        ws_ping_interval=None,
    )
    await uvicorn.Server(config).serve(sockets=[listener])


def run(pipe: Pipe, name: str) -> None:
    """A child of the harness."""
    with explained(pipe):
        allow_open_files()
        uvloop.run(serve(name, pipe))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=peers.NAMES)
    uvloop.run(serve(parser.parse_args().peer))
