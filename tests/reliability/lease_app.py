"""A process of the app in test_takeover.py, whose worker prints when it runs.

``PACHINKO_BACKPLANE=redis://localhost:6379 python lease_app.py`` prints ``ready``. Where the worker
runs, it prints ``tick`` ten times a second, with the seconds of a clock that all processes share.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import time
from typing import Any

import falcon.asgi
import uvicorn

from pachinko import Hub, Pachinko

app = falcon.asgi.App()
ws = Pachinko(app, "/ws", hub=Hub())


def tell(what: str) -> None:
    print(what, time.monotonic(), flush=True)  # noqa: T201 - for the test


@ws.worker(once=True)
async def clock() -> None:
    try:
        while True:
            tell("tick")
            await asyncio.sleep(0.1)
    finally:
        tell("end")


class Announcer:
    async def process_startup(self, scope: Any, event: Any) -> None:
        tell("ready")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio")
    app.add_middleware(Announcer())
    config = uvicorn.Config(app, loop=parser.parse_args().loop, log_level="warning")
    uvicorn.Server(config).run([socket.create_server(("127.0.0.1", 0))])


if __name__ == "__main__":
    main()
