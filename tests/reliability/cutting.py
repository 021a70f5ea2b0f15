"""A proxy that cuts connections after a number of bytes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Literal

import attrs

_NO_LINGER = struct.pack("ii", 1, 0)  # SO_LINGER: a close is a reset, and what is unsent is lost
_PIECE = 65536

Side = Literal["client", "server"]


@attrs.frozen
class Cut:
    """Where a connection ends: *after* so many bytes on their way to *toward*, and how."""

    toward: Side
    after: int
    by: Literal["FIN", "RST"]


@attrs.define(eq=False)
class Proxy:
    """Takes connections for the server at *port*; ends the next one where *cut* says.

    ``async with Proxy(server.port) as proxy:``. Both ends of a connection see the same cut.
    """

    port: int
    cut: Cut | None = None
    passed: dict[Side, int] = attrs.Factory(lambda: {"client": 0, "server": 0})
    """The bytes that the latest connection has let through, by where they went."""
    url: str = ""
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = attrs.Factory(set)

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        await self.idle()

    async def idle(self) -> None:
        """Wait until no connection is left."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.passed = {"client": 0, "server": 0}
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.port)
        writers = (writer, there_writer)
        for each in writers:
            each.transport.set_write_buffer_limits(0)  # so that drain() waits for the kernel
        pumps = {
            asyncio.create_task(self._pump("server", reader, there_writer)),
            asyncio.create_task(self._pump("client", there_reader, writer)),
        }
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        await asyncio.wait(pumps)
        for each in writers:
            with contextlib.suppress(OSError):
                if self.cut is not None and self.cut.by == "RST":
                    its_socket = each.get_extra_info("socket")
                    its_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
                    each.transport.abort()
                else:
                    each.write_eof()
        # What the ends still have to say is read and dropped: a close would make a reset of it.
        await asyncio.gather(_read_out(reader), _read_out(there_reader))
        for each in writers:
            each.close()
            with contextlib.suppress(OSError):
                await each.wait_closed()

    async def _pump(
        self, toward: Side, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Let bytes through up to the cut, or the end."""
        cut = self.cut if self.cut is not None and self.cut.toward == toward else None
        with contextlib.suppress(OSError):
            while cut is None or self.passed[toward] < cut.after:
                left = _PIECE if cut is None else cut.after - self.passed[toward]
                data = await reader.read(min(left, _PIECE))
                if not data:
                    break
                writer.write(data)
                await writer.drain()
                self.passed[toward] += len(data)


async def _read_out(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while await reader.read(_PIECE):
            pass
