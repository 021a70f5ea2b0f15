"""Shows that every peer does the same work: ``python -m benchmarks.check [peer ...]``."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from types import ModuleType

import uvicorn
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from benchmarks.peers import NAMES, load
from benchmarks.workload import TYPES, Wire

IDS = (1, 2, 70_000)
MEMBERS = 3
COUNT = 5

WRONG = (('"a":1', '"a":"x"'), ('"b":"text"', '"b":5'), ('"c":1.5', '"c":"x"'), ('"t0"', '"t99"'))
"""What is replaced in a frame to make a wrong one."""

ANSWER_SECONDS = 5.0
QUIET_SECONDS = 0.3  # in which the answer to a wrong frame would have come


class WrongError(Exception):
    """A peer does not do what it should."""


@asynccontextmanager
async def serving(peer: ModuleType) -> AsyncGenerator[str, None]:
    """Serve *peer* in this event loop, and give its URL."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"ws://127.0.0.1:{sock.getsockname()[1]}"
        if hasattr(peer, "serve"):
            task = asyncio.create_task(peer.serve(sock))
            try:
                yield url
            finally:
                task.cancel()
                await asyncio.wait([task])
        else:
            config = uvicorn.Config(
                peer.create_app(),
                timeout_graceful_shutdown=1,
                ws_per_message_deflate=False,
            )
            server = uvicorn.Server(config)
            task = asyncio.create_task(server.serve(sockets=[sock]))
            try:
                yield url
            finally:
                server.should_exit = True
                await task


@asynccontextmanager
async def connected(url: str, wire: Wire) -> AsyncGenerator[ClientConnection, None]:
    async with connect(url, compression=None) as client:
        for frame, beginning in wire.prelude:
            if frame is not None:
                await client.send(frame)
            if beginning is not None and not (text := await receive(client)).startswith(beginning):
                raise WrongError(f"{text!r} does not begin with {beginning!r}")
        yield client


async def receive(client: ClientConnection) -> str:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            text = await client.recv()
    except TimeoutError:
        raise WrongError(f"there is no answer in {ANSWER_SECONDS:g} s") from None
    if not isinstance(text, str):
        raise WrongError(f"{text!r} is not text")
    return text


async def answers(client: ClientConnection, wire: Wire) -> None:
    """Each type is answered, with the id of the request."""
    for id in IDS:
        for number in range(len(TYPES)):
            await client.send(wire.request(number, id))
            text = await receive(client)
            if not wire.check(text, number, id) or wire.check(text, number, id + 1):
                raise WrongError(f"{text!r} answers {wire.request(number, id)!r}")


async def refuses(client: ClientConnection, wire: Wire, right: str, wrong: str) -> None:
    """A wrong frame gets an error, the end of the connection, or nothing; but not the reply."""
    frame = wire.request(0, 1).replace(right, wrong)
    if frame == wire.request(0, 1):
        raise WrongError(f"{right!r} is not in {frame!r}")
    await client.send(frame)
    with suppress(TimeoutError, ConnectionClosed):
        async with asyncio.timeout(QUIET_SECONDS):
            while True:
                if wire.check(text := await receive(client), 0, 1):
                    raise WrongError(f"{text!r} answers {frame!r}")


async def shouts(
    members: list[ClientConnection], outsider: ClientConnection, wire: Wire, text: str
) -> None:
    """The members, and nobody else, hear each shout once; then who shouted has the reply."""
    await members[0].send(wire.shout(COUNT, text))
    for member in members:
        frames = [await receive(member) for _ in range(COUNT + (member is members[0]))]
        heard = [frame for frame in frames if wire.is_group_message(frame)]
        if len(heard) != COUNT or not all(text in frame for frame in heard):
            raise WrongError(f"{frames} arrived after {COUNT} shouts of {text!r}")
        for reply in set(frames) - set(heard):
            is_done(reply, COUNT)
    for member in members:
        await member.send(wire.shout(0, text))
        is_done(await receive(member), 0)
    await outsider.send(wire.request(0, 1))
    if not wire.check(frame := await receive(outsider), 0, 1):
        raise WrongError(f"{frame!r} came to a client outside the group")


def is_done(text: str, count: int) -> None:
    if f'{{"a":{count},"b":"done"}}' not in text.replace(" ", ""):
        raise WrongError(f"{text!r} answers {count} shouts")


async def check(peer: ModuleType) -> None:
    wire: Wire = peer.WIRE
    async with serving(peer) as url, AsyncExitStack() as stack:
        plain = await stack.enter_async_context(connected(url + wire.path, wire))
        await answers(plain, wire)
        for right, wrong in WRONG:
            async with connected(url + wire.path, wire) as client:
                await refuses(client, wire, right, wrong)
        group = [connected(url + wire.group_path, wire) for _ in range(MEMBERS)]
        members = [await stack.enter_async_context(member) for member in group]
        for number in range(2):
            await shouts(members, plain, wire, f"text {number}")


def main(names: list[str]) -> int:
    logging.disable()  # to an app a wrong frame may be an error of its own
    failed = 0
    for name in names or NAMES:
        try:
            asyncio.run(check(load(name)))
        except Exception as error:  # whatever the peer raises: the others are still checked
            failed += 1
            print(f"{name:<20}{type(error).__name__}: {error}")
        else:
            print(
                f"{name:<20}answers {len(TYPES)} types with their ids, refuses {len(WRONG)} wrong"
                f" frames, sends to a group of {MEMBERS}"
            )
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
