"""RFC 6455 (and 7692) through the whole stack: the echo example under every server.

The cases follow the sections of the Autobahn test suite, by whose numbers their names begin; those
of the opening handshake, which it leaves out, begin with "handshake". What a server fails is its
own, and stands in `observed.py`.
"""

from __future__ import annotations

import asyncio
import http.client
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Case,
    Declined,
    Message,
    Opening,
    Seen,
    close,
    fragments,
    frame,
    pieces,
    request,
)
from observed import SERVERS, Observed
from process import Process, running
from wsproto.extensions import PerMessageDeflate

EXAMPLES = Path(__file__).parents[2] / "examples"
AT_ONCE = 16  # connections; more would only make each slower

VIOLATION = (1002,)
NO_UTF8 = (1007,)
HELLO = frame(TEXT, b"hello")
BEHIND = frame(TEXT, b"behind")
OCTETS = bytes(range(256))


def handshakes() -> Iterator[Opening]:
    accepted = [101]
    sample = "dGhlIHNhbXBsZSBub25jZQ=="  # and its answer: RFC 6455, 1.3
    answer: dict[str, str | None] = {
        "upgrade": "websocket",
        "connection": "upgrade",
        "sec-websocket-accept": r"s3pPLMBiTxaQ9kYGzzhZRbK\+xOo=",
    }
    yield Opening("handshake: the sample", request(sec_websocket_key=sample), accepted, answer)
    yield Opening(
        "handshake: other letters and further tokens",
        request(upgrade="WebSocket", connection="keep-alive, UPGRADE"),
        accepted,
    )
    yield Opening(
        "handshake: an extension that nobody knows",
        request(sec_websocket_extensions="x-unknown; a=1"),
        accepted,
        {"sec-websocket-extensions": None},
    )
    yield Opening(
        "handshake: a subprotocol that nobody speaks",
        request(sec_websocket_protocol="unknown"),
        accepted,
        {"sec-websocket-protocol": None},
    )
    not_accepted = range(200, 600)  # it is plain HTTP
    yield Opening("handshake: no Upgrade", request(upgrade=None), not_accepted)
    yield Opening("handshake: Upgrade to something else", request(upgrade="x-other"), not_accepted)
    yield Opening("handshake: no Connection", request(connection=None), not_accepted)
    yield Opening(
        "handshake: Connection without upgrade", request(connection="close"), not_accepted
    )
    yield Opening("handshake: POST", request("POST", content_length="0"), not_accepted)
    yield Opening("handshake: HTTP/1.0", request(http="1.0"), not_accepted)
    yield Opening("handshake: no Host", request(host=None))
    yield Opening("handshake: no key", request(sec_websocket_key=None))
    yield Opening("handshake: key of 3 octets", request(sec_websocket_key="YWJj"))
    yield Opening("handshake: key that is not base64", request(sec_websocket_key="?" * 24))
    yield Opening("handshake: no version", request(sec_websocket_version=None))
    yield Opening("handshake: version 12", request(sec_websocket_version="12"))
    yield Opening(
        "handshake: version 12 is told the right one",
        request(sec_websocket_version="12"),
        range(400, 500),
        {"sec-websocket-version": r"(.*\W)?13(\W.*)?"},
    )


def framing() -> Iterator[Case]:
    for size in (0, 125, 126, 127, 128, 65_535, 65_536):
        text, data = "*" * size, (OCTETS * 257)[:size]
        yield Case(f"1 text of {size}", [frame(TEXT, text.encode())], messages=[text])
        yield Case(f"1 binary of {size}", [frame(BINARY, data)], messages=[data])
    for size, chop in ((0, 1), (125, 1), (126, 1), (128, 1), (65_536, 997)):
        text = "*" * size
        sends = pieces(frame(TEXT, text.encode()), chop)
        yield Case(f"1 text of {size} by {chop}", sends, messages=[text])
    sends = [HELLO + frame(BINARY, b"\0") + HELLO]
    yield Case("1 three messages at once", sends, messages=["hello", b"\0", "hello"])
    yield Case("1 without a mask", [frame(TEXT, b"hello", key=b"")], fails=VIOLATION)
    yield Case("1 ping without a mask", [frame(PING, b"hello", key=b"")], fails=VIOLATION)


def pings() -> Iterator[Case]:
    for name, payload in (
        ("without payload", b""),
        ("of text", b"hello"),
        ("of octets", b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff"),
        ("of 125", b"\xfe" * 125),
    ):
        yield Case(f"2 ping {name}", [frame(PING, payload)], pongs=[payload])
    yield Case("2 ping of 125 by 1", pieces(frame(PING, b"\xfe" * 125)), pongs=[b"\xfe" * 125])
    yield Case("2 ping of 126", [frame(PING, b"\xfe" * 126)], fails=VIOLATION)
    yield Case("2 ping of 65536", [frame(PING, b"\xfe" * 65_536)], fails=VIOLATION)
    yield Case("2 pong without a ping", [frame(PONG)])
    yield Case("2 pong with payload", [frame(PONG, b"hello")])
    sends = [frame(PONG, b"pong"), frame(PING, b"ping")]
    yield Case("2 pong and ping", sends, pongs=[b"ping"])
    payloads = [b"payload %d" % number for number in range(10)]
    sends = [frame(PING, payload) for payload in payloads]
    yield Case("2 ten pings", sends, pongs=payloads)
    yield Case("2 ten pings by 1", pieces(b"".join(sends)), pongs=payloads)


def reserved_bits() -> Iterator[Case]:
    for rsv in range(1, 8):
        for name, opcode in (("text", TEXT), ("binary", BINARY), ("ping", PING), ("close", CLOSE)):
            payload = b"\x03\xe8" if opcode == CLOSE else b"hello"
            bad = frame(opcode, payload, rsv=rsv)
            yield Case(f"3 {name} RSV {rsv}", [bad], fails=VIOLATION)
        bad = frame(TEXT, b"hello", rsv=rsv)
        yield Case(f"3 behind a text RSV {rsv}", [HELLO + bad], messages=["hello"], fails=VIOLATION)
        sends = [HELLO, *pieces(bad)]
        yield Case(f"3 by 1 RSV {rsv}", sends, messages=["hello"], fails=VIOLATION)


def reserved_opcodes() -> Iterator[Case]:
    for opcode in (*range(3, 8), *range(11, 16)):
        bad = frame(opcode, b"hello")
        yield Case(f"4 opcode {opcode} empty", [frame(opcode)], fails=VIOLATION)
        yield Case(f"4 opcode {opcode}", [bad], fails=VIOLATION)
        yield Case(
            f"4 opcode {opcode} behind a text", [HELLO + bad], messages=["hello"], fails=VIOLATION
        )
        yield Case(
            f"4 opcode {opcode} by 1",
            [HELLO, *pieces(bad + BEHIND)],
            messages=["hello"],
            fails=VIOLATION,
        )


def fragmentation() -> Iterator[Case]:
    for name, opcode, payload in (
        ("ping", PING, b"hello"),
        ("pong", PONG, b"hello"),
        ("close", CLOSE, b"\x03\xe8ok"),
    ):
        yield Case(f"5 {name} in fragments", fragments(opcode, payload, 3), fails=VIOLATION)
        sends = [frame(TEXT, b"a", fin=False), *fragments(opcode, payload, 3)]
        yield Case(f"5 {name} in fragments, in a message", sends, fails=VIOLATION)
    text = "an example of some words"
    data = text.encode()
    for size in (12, 1):
        sends = fragments(TEXT, data, size)
        yield Case(f"5 text in fragments of {size}", sends, messages=[text])
        yield Case(f"5 … written at once, of {size}", [b"".join(sends)], messages=[text])
        yield Case(f"5 … written by 1, of {size}", pieces(b"".join(sends)), messages=[text])
        sends = fragments(BINARY, OCTETS, 100 * size)
        yield Case(f"5 binary in fragments of {100 * size}", sends, messages=[OCTETS])
    one, two = fragments(TEXT, data, 12)
    ping, pong = frame(PING, b"ping"), frame(PONG, b"pong")
    empty = frame(CONTINUATION, fin=False)
    case = partial(Case, messages=[text], pongs=[b"ping"])
    yield case("5 ping between fragments", [one, ping, two])
    yield case("5 ping between fragments, at once", [one + ping + two])
    yield case("5 ping between fragments, by 1", pieces(one + ping + two))
    yield Case("5 pong between fragments", [one, pong, two], messages=[text])
    five = fragments(TEXT, data, 5)
    pinged = [octets for part in five for octets in (part, ping)]
    yield Case("5 a ping behind each fragment", pinged, messages=[text], pongs=[b"ping"] * 5)
    sends = [one, empty, empty, two, *fragments(BINARY, data, 12)]
    yield Case("5 empty fragments, and a second message", sends, messages=[text, data])
    sends = [frame(TEXT, fin=False), empty, frame(CONTINUATION)]
    yield Case("5 text of three empty fragments", sends, messages=[""])
    for fin in (True, False):
        stray = frame(CONTINUATION, b"stray", fin=fin)
        name = "last" if fin else "further"
        yield Case(f"5 {name} fragment of nothing", [stray], fails=VIOLATION)
        yield Case(f"5 {name} fragment of nothing, then a text", [stray, HELLO], fails=VIOLATION)
        yield Case(f"5 … {name}, at once", [stray + HELLO], fails=VIOLATION)
        yield Case(f"5 … {name}, by 1", pieces(stray + HELLO), fails=VIOLATION)
        sends = [one, two, stray]
        name = f"5 {name} fragment behind the end of a message"
        yield Case(name, sends, messages=[text], fails=VIOLATION)
    for name, opcode in (("text", TEXT), ("binary", BINARY)):
        sends = [one, frame(opcode, b"new"), two]
        yield Case(f"5 {name} before the end of a message", sends, fails=VIOLATION)
        sends = [one, *fragments(opcode, b"other", 3)]
        yield Case(f"5 fragments of {name} before the end of a message", sends, fails=VIOLATION)


BOUNDARIES = (
    "0000 007F 0080 07FF 0800 D7FF E000 FDD0 FEFF FFFD FFFE FFFF 10000 1FFFE 2FFFF 3FFFF 40000 "
    "FFFFF 100000 10FFFE 10FFFF"
)
VALID = {"Greek": "κόσμε", "all lengths": "a é € 😀"} | {
    f"U+{number}": chr(int(number, 16)) for number in BOUNDARIES.split()
}
INVALID = {
    "continuation": "80|BF|80 BF|80 BF 80 BF 80 BF",
    "start alone": "C2 20|DF 20|E0 20|EF 20|F0 20|F4 20",
    "cut": "E2 82 20|EF BF 20|F0 9F 98 20|F4 8F BF 20|E2 82 E2 82 AC",
    "never": "C0|C1|F5|F8|FC|FE|FF|FE FE FF FF",
    "overlong": "C0 80|C0 AF|C1 BF|E0 80 80|E0 80 AF|E0 9F BF|F0 80 80 80|F0 80 80 AF|F0 8F BF BF"
    "|F8 80 80 80 AF|FC 80 80 80 80 AF",
    "surrogate": "ED A0 80|ED AD BF|ED AE 80|ED AF BF|ED B0 80|ED BE 80|ED BF BF|ED A0 80 ED B0 80"
    "|ED AF BF ED BF BF",
    "beyond U+10FFFF": "F4 90 80 80|F7 BF BF BF|F8 88 80 80 80|FB BF BF BF BF|FC 84 80 80 80 80"
    "|FD BF BF BF BF BF",
}
CUT_SHORT = "C2|DF|E0|E2 82|EF BF|F0|F0 9F|F0 9F 98|F4 8F BF"


def utf8() -> Iterator[Case]:
    for name, text in VALID.items():
        data = text.encode()
        yield Case(f"6 {name}", [frame(TEXT, data)], messages=[text])
        sends = fragments(TEXT, b"a" + data)
        yield Case(f"6 {name} in fragments", sends, messages=["a" + text])
    every = "".join(map(chr, range(0x800)))
    sends = pieces(b"".join(fragments(TEXT, every.encode(), 255)), 101)
    yield Case("6 all of one and two octets", sends, messages=[every])
    data = "κόσμε".encode() * 20
    one, two = fragments(TEXT, data, 101)  # within a character
    sends = [one, frame(PING, b"\xff"), two]
    yield Case("6 ping within a character", sends, messages=[data.decode()], pongs=[b"\xff"])
    yield Case("6 binary may be anything", [frame(BINARY, b"\xff\xc0")], messages=[b"\xff\xc0"])
    for kind, sequences in INVALID.items():
        for sequence in sequences.split("|"):
            data = b"before " + bytes.fromhex(sequence) + b" behind"
            yield Case(f"6 {kind} {sequence}", [frame(TEXT, data)], fails=NO_UTF8)
            sends = fragments(TEXT, data)
            yield Case(f"6 {kind} {sequence} in fragments", sends, fails=NO_UTF8)
    for sequence in CUT_SHORT.split("|"):
        data = b"before " + bytes.fromhex(sequence)
        yield Case(f"6 ends with {sequence}", [frame(TEXT, data)], fails=NO_UTF8)
        sends = [*fragments(TEXT, data), BEHIND]
        yield Case(f"6 ends with {sequence} in fragments", sends, fails=NO_UTF8)
    sends = [HELLO, frame(TEXT, b"\xff"), BEHIND]
    yield Case("6 between two texts", sends, messages=["hello"], fails=NO_UTF8)


def closing() -> Iterator[Case]:
    normal, answers = close(1000), [1000]
    cases = partial(Case, closes=answers)
    yield cases("7 text before it", [HELLO, normal], messages=["hello"])
    yield cases("7 a second one", [normal, normal])
    yield cases("7 ping behind it", [normal, frame(PING)])
    yield cases("7 text behind it", [normal, BEHIND])
    yield cases("7 all at once", [HELLO + normal + BEHIND + frame(PING)], messages=["hello"])
    one, two = fragments(TEXT, b"hello", 3)
    yield cases("7 within a message", [one, normal, two])
    text = "*" * 2**18
    # With anything behind the close frame, TCP may reset the connection before all has arrived.
    sends = [frame(TEXT, text.encode()), HELLO, normal]
    yield cases("7 behind a large text", sends, messages=[text, "hello"])
    yield Case("7 without payload", [frame(CLOSE)], closes=[1000, 1005])
    yield Case("7 of one octet", [frame(CLOSE, b"\x03")], fails=VIOLATION)
    yield cases("7 with a reason", [close(1000, b"ok")])
    yield cases("7 with a reason, by 1", pieces(close(1000, b"ok")))
    yield cases("7 reason of 123", [close(1000, b"*" * 123)])
    yield Case("7 reason of 124", [close(1000, b"*" * 124)], fails=VIOLATION)
    yield cases("7 reason of UTF-8", [close(1000, "Ende gut, ✓".encode())])
    for sequence in ("FF", "CE BA E1", "ED A0 80"):
        bad = close(1000, b"bad " + bytes.fromhex(sequence))
        yield Case(f"7 reason with {sequence}", [bad], fails=VIOLATION + NO_UTF8)
    for code in (*range(1000, 1004), *range(1007, 1012), 3000, 3999, 4000, 4999):
        answers = [code, 1000]  # typically the same, but it need not be (5.5.1)
        yield Case(f"7 code {code}", [close(code)], closes=answers)
        yield Case(f"7 code {code} with a reason", [close(code, b"ok")], closes=answers)
    for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999):
        yield Case(f"7 code {code}", [close(code)], fails=VIOLATION)
        yield Case(f"7 code {code} with a reason", [close(code, b"ok")], fails=VIOLATION)


def large_and_many() -> Iterator[Case]:
    text, data = "*" * 2**22, OCTETS * 2**14
    yield Case("9 text of 4 MiB", [frame(TEXT, text.encode())], messages=[text])
    yield Case("9 binary of 4 MiB", [frame(BINARY, data)], messages=[data])
    sends = fragments(TEXT, text.encode(), 2**16)
    yield Case("9 text of 4 MiB in 64 fragments", sends, messages=[text])
    sends = [b"".join(fragments(BINARY, data, 2**12))]
    yield Case("9 binary of 4 MiB in 1024 fragments", sends, messages=[data])
    text = text[: 2**20]
    sends = pieces(frame(TEXT, text.encode()), 2**11)
    yield Case("9 text of 1 MiB by 2048", sends, messages=[text])
    texts = [f"number {number}" for number in range(1000)]
    sends = [b"".join(frame(TEXT, text.encode()) for text in texts)]
    yield Case("9 a thousand texts", sends, messages=texts)
    sends = fragments(TEXT, b"*" * 65_536, 1300)
    yield Case("10 text of 65536 in fragments of 1300", sends, messages=["*" * 65_536])


def deflated(data: bytes) -> bytes:
    """*data* as RFC 7692, 7.2.1 has it, with the smallest window."""
    deflate = zlib.compressobj(wbits=-9)
    return (deflate.compress(data) + deflate.flush(zlib.Z_SYNC_FLUSH))[:-4]


def compression() -> Iterator[Case | Opening]:
    no_takeover = {"client_no_context_takeover": True, "server_no_context_takeover": True}
    for offered, options in (
        ("", {}),
        (", no context", no_takeover),
        (", window of 512", {"server_max_window_bits": 9, "client_max_window_bits": 9}),
    ):
        offer = partial(PerMessageDeflate, **options)
        for size in (0, 16, 1024, 65_536, 131_072):
            texts = [f"{number} {'lorem ipsum ' * size}"[:size] for number in range(10)]
            sends = [Message(text) for text in texts]
            yield Case(f"12 ten texts of {size}{offered}", sends, messages=texts, offer=offer)
        noise = [(zlib.compress(bytes(number) + OCTETS) * 300)[:65_536] for number in range(5)]
        name = f"12 five binaries that do not shrink{offered}"
        yield Case(name, [*map(Message, noise)], messages=noise, offer=offer)
    case = partial(Case, offer=PerMessageDeflate)
    text = "an example of some words " * 20
    sends = [Message(text), HELLO, Message(text), frame(BINARY, OCTETS)]
    yield case("12 some without compression", sends, messages=[text, "hello", text, OCTETS])
    sends = [Message(text[:100], finished=False), Message(text[100:], finished=True)]
    yield case("12 two fragments", sends, messages=[text])
    sends = fragments(TEXT, deflated(text.encode()), rsv=4)
    yield case("12 fragments of one octet", sends, messages=[text])
    yield case("12 … at once", [b"".join(sends)], messages=[text])
    pinged = [sends[0], frame(PING, b"ping"), *sends[1:]]
    yield case("12 ping between fragments", pinged, messages=[text], pongs=[b"ping"])
    for name, hexes, texts in (  # RFC 7692, 7.2.3
        ("sample", ["f248cdc9c90700"], ["Hello"]),
        ("sample of a shared window", ["f248cdc9c90700", "f200110000"], ["Hello", "Hello"]),
        ("sample of no compression", ["000500faff48656c6c6f00"], ["Hello"]),
        ("sample of two blocks", ["f248050000 00ffffcac9c90700"], ["Hello"]),
        ("sample of BFINAL", ["f348cdc9c9070000"], ["Hello"]),
        ("sample of BFINAL, twice", ["f348cdc9c9070000"] * 2, ["Hello"] * 2),
    ):
        sends = [frame(TEXT, bytes.fromhex(octets), rsv=4) for octets in hexes]
        yield case(f"12 {name}", sends, messages=texts)
    yield case("12 RSV 4 on a ping", [frame(PING, b"ping", rsv=4)], fails=VIOLATION)
    yield case("12 RSV 2", [frame(TEXT, b"hello", rsv=2)], fails=VIOLATION)
    sends = [frame(TEXT, b"hel", fin=False), frame(CONTINUATION, b"lo", rsv=4)]
    yield case("12 RSV 4 on a later fragment", sends, fails=VIOLATION)
    bad = frame(TEXT, b"\xff" * 20, rsv=4)
    yield case("12 not compressed data", [bad], fails=VIOLATION + NO_UTF8)
    bad = frame(TEXT, deflated(b"\xff"), rsv=4)
    yield case("12 not UTF-8", [bad], fails=NO_UTF8)
    for name, parameters in (
        ("unknown parameter", "x=1"),
        ("window of 16 bits", "server_max_window_bits=16"),
        ("same parameter twice", "server_no_context_takeover; server_no_context_takeover"),
    ):
        offer = request(sec_websocket_extensions=f"permessage-deflate; {parameters}")
        yield Opening(f"12 offer: {name}", offer, [101], {"sec-websocket-extensions": None})


SECTIONS = [
    handshakes,
    framing,
    pings,
    reserved_bits,
    reserved_opcodes,
    fragmentation,
    utf8,
    closing,
    large_and_many,
    compression,
]
CASES = {case.id: case for section in SECTIONS for case in section()}


def is_echo(address: str) -> bool:
    """Whether Falcon answers there, which has only a WebSocket at this path."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", "/echo")
        return connection.getresponse().status == 405
    finally:
        connection.close()


@pytest.fixture(scope="module")
def echo(observed: Observed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """The echo, one process for all cases."""
    with running(observed, tmp_path_factory.mktemp("echo"), "echo", EXAMPLES, is_echo) as process:
        yield process


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
async def test_section(
    echo: Process, observed: Observed, section: Callable[[], Iterator[Case | Opening]]
) -> None:
    """A server fails the cases that are listed for it, and no others."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def fault(case: Case | Opening) -> str | None:
        async with gate:
            try:
                return await case.fault(echo.port)
            except Declined:
                return "declines compression" if observed.compresses else None

    cases = list(section())
    faults = await asyncio.gather(*map(fault, cases))
    found = {case.id: fault for case, fault in zip(cases, faults, strict=True) if fault}
    listed = {case for failure in observed.failures for case in failure.cases}
    unlisted = {id: fault for id, fault in found.items() if id not in listed}
    passed = listed.intersection(case.id for case in cases).difference(found)
    assert (unlisted, passed) == ({}, set())


async def test_violation(echo: Process, observed: Observed) -> None:
    """What a client sees of it when the server fails the connection."""
    for id, code in (
        ("3 text RSV 2", 1002),
        ("4 opcode 3", 1002),
        ("5 ping in fragments", 1002),
        ("6 never FF", 1007),
    ):
        seen = Seen()
        await CASES[id].run(echo.port, seen)
        expected = {"1002 or 1007": code, "no code": 1005, "no close frame": None}
        assert seen.code == expected[observed.violation], id


async def test_compression(echo: Process, observed: Observed) -> None:
    """A server that is listed as not compressing declines the offer."""
    try:
        await CASES["12 two fragments"].run(echo.port, Seen())
    except Declined:
        assert not observed.compresses
    else:
        assert observed.compresses


async def test_afterwards(echo: Process) -> None:
    """After all that, the echo serves on."""
    for id in ("1 text of 125", "1 binary of 65536", "2 ten pings"):
        assert await CASES[id].fault(echo.port) is None


def test_names() -> None:
    """Each case has a name of its own, and what is listed is the name of one."""
    assert len(CASES) == sum(len(list(section())) for section in SECTIONS)
    for observed in SERVERS:
        for failure in observed.failures:
            assert CASES.keys() >= {*failure.cases}
