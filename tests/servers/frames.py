"""Frames as no client may send them, and a client that sends them and notes what comes back."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
import socket
from collections.abc import Callable, Sequence

import attrs
from wsproto.extensions import PerMessageDeflate
from wsproto.frame_protocol import (
    Frame,
    FrameDecoder,
    FrameProtocol,
    MessageDecoder,
    Opcode,
    ParseFailed,
)
from wsproto.utilities import generate_accept_token

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
KEY = bytes.fromhex("37fa213d")
PROBES = (b"are you there?", b"still?")  # see `Client.probe`
GOES_ON = "the connection goes on"
PATIENCE = 30  # seconds for what takes milliseconds, or one second for 4 MiB, on a slow machine


def frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, key: bytes = KEY
) -> bytes:
    """A frame (RFC 6455, 5.2), whether it is allowed or not; an empty *key* leaves it unmasked."""
    mask, size = 0x80 if key else 0, len(payload)
    head = bytes([fin << 7 | rsv << 4 | opcode])
    if size < 126:
        head += bytes([mask | size])
    elif size < 65_536:
        head += bytes([mask | 126]) + size.to_bytes(2, "big")
    else:
        head += bytes([mask | 127]) + size.to_bytes(8, "big")
    return head + key + (masked(payload, key) if key else payload)


def masked(payload: bytes, key: bytes) -> bytes:
    keys = (key * (len(payload) // 4 + 1))[: len(payload)]
    number = int.from_bytes(payload, "big") ^ int.from_bytes(keys, "big")
    return number.to_bytes(len(payload), "big")


def close(code: int, reason: bytes = b"") -> bytes:
    return frame(CLOSE, code.to_bytes(2, "big") + reason)


def pieces(data: bytes, size: int = 1) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def fragments(opcode: int, payload: bytes, size: int = 1, *, rsv: int = 0) -> list[bytes]:
    """The frames of a message in fragments of *size* octets."""
    first, *others = pieces(payload, size)
    frames = [frame(opcode, first, fin=not others, rsv=rsv)]
    return frames + [
        frame(CONTINUATION, part, fin=number == len(others))
        for number, part in enumerate(others, start=1)
    ]


def request(method: str = "GET", http: str = "1.1", **headers: str | None) -> bytes:
    """An opening handshake (RFC 6455, 4.1), but for *headers*; one that is None is left out."""
    sent = {
        "host": "127.0.0.1",
        "upgrade": "websocket",
        "connection": "Upgrade",
        "sec_websocket_version": "13",
        "sec_websocket_key": base64.b64encode(os.urandom(16)).decode(),
        **headers,
    }
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in sent.items() if value]
    return "\r\n".join([f"{method} /echo HTTP/{http}", *lines, "", ""]).encode()


class IllegalAnswer(Exception):
    """The server has sent what no server may send."""


class Declined(Exception):
    """The server does not speak the extension."""


class Tcp:
    """A connection of octets, on which a handshake can be tried."""

    async def __aenter__(self) -> Tcp:
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket()
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._socket.close()

    async def send(self, data: bytes) -> None:
        """Send *data*, also to a server that has hung up already."""
        with contextlib.suppress(ConnectionError):
            await self._loop.sock_sendall(self._socket, data)

    async def receive(self) -> bytes:
        """What comes next; nothing at the end, be that orderly or a reset."""
        with contextlib.suppress(ConnectionError):
            return await self._loop.sock_recv(self._socket, 2**18)
        return b""

    async def open(self, port: int, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send a handshake; return the answer's status, its headers, and what is behind them."""
        await self._loop.sock_connect(self._socket, ("127.0.0.1", port))
        await self.send(request)
        data = b""
        while b"\r\n\r\n" not in data:
            chunk = await self.receive()
            if not chunk:
                raise IllegalAnswer("hung up without an HTTP answer")
            data += chunk
        head, _, rest = data.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines)
        headers: dict[str, str] = {}
        for name, _, value in fields:
            others = headers.get(name.lower())
            headers[name.lower()] = f"{others}, {value.strip()}" if others else value.strip()
        return int(status.split()[1]), headers, rest


@attrs.frozen
class Opening:
    """An opening handshake, and how the server has to answer."""

    id: str
    request: bytes
    statuses: Sequence[int] = range(400, 500)
    headers: dict[str, str | None] = attrs.field(factory=dict)
    """Patterns of some of the answer's; one that is None has to be absent."""

    async def fault(self, port: int) -> str | None:
        """What is wrong with the answer of the server at *port*."""
        try:
            async with asyncio.timeout(PATIENCE), Tcp() as tcp:
                status, headers, _ = await tcp.open(port, self.request)
        except IllegalAnswer as exc:
            return str(exc)
        except TimeoutError:
            return "no answer"
        found = {name: headers.get(name) for name in self.headers}
        is_right = status in self.statuses and all(
            found[name] is None
            if pattern is None
            else re.fullmatch(pattern, found[name] or "", re.IGNORECASE)
            for name, pattern in self.headers.items()
        )
        return None if is_right else f"answered {status} with {found}"


@attrs.frozen
class Message:
    """A message, or a fragment of one, compressed as it has been agreed."""

    data: str | bytes
    finished: bool = True


@attrs.define
class Seen:
    """What has come back, up to the end of the connection."""

    messages: list[str | bytes] = attrs.field(factory=list)
    pongs: list[bytes] = attrs.field(factory=list)
    code: int | None = None
    """Of the close frame, 1005 if it has none; None: there was no close frame."""
    probed: int = 0
    """How many of `PROBES` have been answered."""
    ended: bool = False
    """The server has closed the TCP connection."""

    def __str__(self) -> str:
        frames = [repr(item)[:40] for item in (*self.messages, *self.pongs)]
        end = f"close {self.code}, probed {self.probed}, ended {self.ended}"
        return f"got [{', '.join(frames[:4])}], {end}"


@attrs.frozen
class Case:
    """What a client sends after the handshake, and what has to come back.

    Unless *fails* or *closes* is given, every message and ping is answered, in the order of its
    kind. One more text then shows that the connection goes on, and the client closes with 1000.
    """

    id: str
    sends: Sequence[bytes | Message]
    """Each is written by itself."""
    messages: Sequence[str | bytes] = attrs.field(default=(), kw_only=True)
    pongs: Sequence[bytes] = attrs.field(default=(), kw_only=True)
    fails: Sequence[int] = attrs.field(default=(), kw_only=True)
    """The server must fail the connection (7.1.7), with one of these codes, or without a code, or
    without a close frame. What was sent before may stay unanswered; nothing behind is answered."""
    closes: Sequence[int] = attrs.field(default=(), kw_only=True)
    """The client has sent a close frame, and these codes may answer it; the rest is as above."""
    offer: Callable[[], PerMessageDeflate] | None = attrs.field(default=None, kw_only=True)
    """An extension without which the case says nothing."""

    async def fault(self, port: int) -> str | None:
        """What is wrong with the answers of the server at *port*; raise `Declined`."""
        seen = Seen()
        try:
            await self.run(port, seen)
        except (IllegalAnswer, ParseFailed, UnicodeDecodeError) as exc:
            return f"{exc}; {seen}"
        except TimeoutError:
            pass  # it has not ended
        return None if self.suits(seen) else str(seen)

    async def run(self, port: int, seen: Seen) -> None:
        """Note in *seen* what comes back."""
        async with asyncio.timeout(PATIENCE), Tcp() as tcp:
            client = Client(tcp, self, seen)
            await client.open(port)
            await client.converse()

    @property
    def goes_on(self) -> bool:
        return not self.fails and not self.closes

    @property
    def echoes(self) -> list[str | bytes]:
        return [*self.messages, GOES_ON] if self.goes_on else [*self.messages]

    def is_begun(self, seen: Seen) -> bool:
        """Nothing but what had to come has come."""
        return seen.messages == self.echoes[: len(seen.messages)] and seen.pongs == [
            *self.pongs[: len(seen.pongs)]
        ]

    def is_answered(self, seen: Seen) -> bool:
        return seen.messages == self.echoes and seen.pongs == [*self.pongs]

    def suits(self, seen: Seen) -> bool:
        if self.goes_on:
            is_right = self.is_answered(seen) and seen.code == 1000
        else:
            is_right = self.is_begun(seen) and seen.code in (
                self.closes or (*self.fails, 1005, None)
            )
        return is_right and seen.ended


class Client:
    """The client of one case."""

    def __init__(self, tcp: Tcp, case: Case, seen: Seen) -> None:
        self.tcp, self.case, self.seen = tcp, case, seen
        self.extensions = [case.offer()] if case.offer else []
        self.parts: list[str | bytes] = []

    async def open(self, port: int) -> None:
        """Raise `Declined` unless the extension is agreed upon."""
        key = base64.b64encode(os.urandom(16)).decode()
        offers = ", ".join(f"{one.name}; {one.offer()}" for one in self.extensions)
        opening = request(sec_websocket_key=key, sec_websocket_extensions=offers)
        status, headers, rest = await self.tcp.open(port, opening)
        accept = generate_accept_token(key.encode()).decode()
        if (status, headers.get("sec-websocket-accept")) != (101, accept):
            raise IllegalAnswer(f"answered {status}")
        agreed = headers.get("sec-websocket-extensions")
        for extension in self.extensions:
            if agreed is None:
                raise Declined
            extension.finalize(agreed)
        self.encoder = FrameProtocol(client=True, extensions=[*self.extensions])
        self.decoder = FrameDecoder(client=True, extensions=[*self.extensions])
        self.messages = MessageDecoder()
        self.decoder.receive_bytes(rest)

    async def converse(self) -> None:
        """Send everything, and note the answers until the connection has ended or goes on."""
        sending = asyncio.create_task(self.send())
        closing = bool(self.case.closes)
        try:
            while True:
                await self.decode()
                if self.seen.probed == len(PROBES) or not self.case.is_begun(self.seen):
                    return
                if self.seen.code is not None and not closing:
                    closing = True
                    await self.tcp.send(close(1000))
                elif self.case.goes_on and not closing and self.case.is_answered(self.seen):
                    closing = True
                    await sending
                    await self.tcp.send(close(1000))
                chunk = await self.tcp.receive()
                if not chunk:
                    self.seen.ended = True
                    return
                self.decoder.receive_bytes(chunk)
        finally:
            sending.cancel()

    async def send(self) -> None:
        for item in self.case.sends:
            await self.tcp.send(
                self.encoder.send_data(item.data, item.finished)
                if isinstance(item, Message)
                else item
            )
        if self.case.fails:
            await self.probe()
        elif self.case.goes_on:
            await self.tcp.send(frame(TEXT, GOES_ON.encode()))

    async def probe(self) -> None:
        """Ping a server that must fail the connection, so that one which goes on is found at once.

        It may have read the first ping together with what it refuses, but not the second.
        """
        await self.tcp.send(frame(PING, PROBES[self.seen.probed]))

    async def decode(self) -> None:
        while (found := self.decoder.process_buffer()) is not None:
            if self.seen.code is not None:
                raise IllegalAnswer("sent a frame behind its close frame")
            await self.note(found)

    async def note(self, found: Frame) -> None:
        match found.opcode:
            case Opcode.PONG if found.payload in PROBES:
                self.seen.probed += 1
                if self.seen.probed < len(PROBES):
                    await self.probe()
            case Opcode.PONG:
                self.seen.pongs.append(bytes(found.payload))
            case Opcode.CLOSE:
                payload = bytes(found.payload)
                payload[2:].decode()
                self.seen.code = int.from_bytes(payload[:2], "big") if payload else 1005
            case Opcode.PING:
                raise IllegalAnswer("sent a ping")  # not soon, at least
            case _:
                part = self.messages.process_frame(found)
                self.parts.append(part.payload)
                if part.message_finished:
                    whole = type(part.payload)().join(self.parts)
                    self.parts.clear()
                    self.seen.messages.append(whole)
