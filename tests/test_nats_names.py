"""The private names of nats-py that the companion uses, each with what it relies on.

`house.NATS` has the list, with reasons. The environment ``oldest`` of tox runs this file with the
oldest release of nats-py that is supported, the others with the newest one.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from typing import Any

import house
import pytest
from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport
from support import PATIENCE, until

INFO = b'INFO {"server_id":"x","version":"2.10.0","max_payload":1000,"tls_available":true}\r\n'


class Recording(Client):
    """Notes the calls of what the companion overrides."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    async def _process_msg(self, *arguments: Any) -> None:
        self.calls.append(("_process_msg", *arguments))

    async def _process_op_err(self, *arguments: Any) -> None:
        self.calls.append(("_process_op_err", *arguments))
        await super()._process_op_err(*arguments)

    async def _close(self, *arguments: Any, **keys: Any) -> None:
        self.calls.append(("_close", *arguments))
        await super()._close(*arguments, **keys)

    def _connect_command(self) -> bytes:
        self.calls.append(("_connect_command", dict(self._server_info)))
        return super()._connect_command()


class Broker:
    """A NATS server, as far as a client needs it to connect and to get a message."""

    async def __aenter__(self) -> Broker:
        self.written, self.ended = b"", asyncio.Event()
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        writer.write(INFO)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(4096):
                self.written += data
                writer.write(b"PONG\r\n" * data.count(b"PING\r\n"))
        self.ended.set()

    async def connected(self) -> Recording:
        client = Recording()
        url = f"nats://127.0.0.1:{self.port}"
        options: dict[str, Any] = {"user": "ada", "password": "s3cret", "error_cb": quiet}
        async with asyncio.timeout(PATIENCE):
            await client.connect(url, allow_reconnect=False, flusher_queue_size=0, **options)
        return client

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        self.server.close()


async def quiet(exc: Exception) -> None:
    """Take what nats-py otherwise logs."""


def names(client: Recording) -> list[str]:
    return [name for name, *_ in client.calls]


async def test__process_msg() -> None:
    """It is awaited for each message, with the number of the subscription, before the next one."""
    async with Broker() as broker:
        client = await broker.connected()
        await client.subscribe("a.b")
        broker.writer.write(b"MSG a.b 1 2\r\nhi\r\nMSG a.b 1 r 3\r\nyou\r\n")
        await until(lambda: names(client).count("_process_msg") == 2)
        taken = [call[1:5] for call in client.calls if call[0] == "_process_msg"]
        assert [(sid, subject, bytes(data)) for sid, subject, _, data in taken] == [
            (1, b"a.b", b"hi"),
            (1, b"a.b", b"you"),
        ]
        await client.close()
    given = list(inspect.signature(Client._process_msg).parameters)
    assert given == ["self", "sid", "subject", "reply", "data", "headers"]


async def test__process_op_err() -> None:
    """It is awaited with the error when the connection fails."""
    async with Broker() as broker:
        client = await broker.connected()
        broker.writer.transport.abort()
        await until(lambda: "_process_op_err" in names(client))
        (error,) = [call[1] for call in client.calls if call[0] == "_process_op_err"]
        assert isinstance(error, Exception)
        await client.close()


async def test__close_and__pending_and__pending_data_size() -> None:
    """Everything that ends the client goes through it; what was pending then is not written."""
    async with Broker() as broker:
        client = await broker.connected()
        assert (client._pending, client._pending_data_size) == ([], 0)
        await client.publish("a", b"late")
        assert client._pending and client._pending_data_size
        client._pending, client._pending_data_size = [], 0
        await client.close()
        assert "_close" in names(client)
        await asyncio.wait_for(broker.ended.wait(), PATIENCE)
        assert b"late" not in broker.written
    assert list(inspect.signature(Client._close).parameters) == ["self", "status", "do_cbs"]


async def test__connect_command_and__server_info() -> None:
    """The command is made once, after what the server says of TLS has come, and before a write."""
    async with Broker() as broker:
        client = await broker.connected()
        ((_, info),) = [call for call in client.calls if call[0] == "_connect_command"]
        assert info["tls_available"] is True and not info.get("tls_required")
        assert client._connect_command() in broker.written
        assert b"s3cret" in client._connect_command()
        await client.close()


async def test__transport_and__io_writer() -> None:
    """They have the socket of a connected client, and are there before."""
    assert Client()._transport is None
    assert TcpTransport()._io_writer is None
    async with Broker() as broker:
        client = await broker.connected()
        writer = client._transport._io_writer
        assert isinstance(writer, asyncio.StreamWriter)
        writer.transport.abort()
        await asyncio.wait_for(broker.ended.wait(), PATIENCE)
        await client.close()


@pytest.mark.parametrize("queue", [None, asyncio.Queue()])
async def test__pending_queue(queue: Any) -> None:
    """Nothing but nats-py's own way to deliver reads it, so that a subscription ends without it."""
    async with Broker() as broker:
        client = await broker.connected()
        subscription = await client.subscribe("a")
        assert isinstance(subscription, Subscription)
        assert isinstance(subscription._pending_queue, asyncio.Queue)
        subscription._pending_queue = queue
        await subscription.unsubscribe()
        await client.close()


def test_each_listed_name_is_pinned() -> None:
    """A name comes onto the list together with a test of what it does."""
    tests = [name.removeprefix("test_") for name in globals() if name.startswith("test__")]
    assert house.NATS.keys() <= {name for test in tests for name in test.split("_and_")}
