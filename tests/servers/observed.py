"""The servers, how each is started, and where each deviates.

The defaults of `Observed` are what one would wish for. Whatever a server does otherwise is written
here and asserted by the tests, so that they fail when it improves. `docs/servers.md` has these
rows and commands word for word, which is tested too.
"""

from __future__ import annotations

from typing import Any

import attrs

COLUMNS = (
    "Server",
    "Client's close code",
    "Lost connection",
    "Our close codes",
    "Our reasons",
    "Largest frame",
    "Client that does not read",
    "Lifespan",
    "SIGTERM: the client sees",
    "SIGTERM: `conn.close_code`",
    "SIGTERM: ends",
)
HANDSHAKE_COLUMNS = (
    "Server",
    "Status of a refusal",
    "`conn.add_header`",
    "Client that leaves before the accept",
    "SIGTERM while a connect handler hangs: ends",
)
RFC_COLUMNS = ("Server", "Closes after a violation with", "Compression", "Fails")


@attrs.frozen
class Failure:
    """What servers fail of RFC 6455 or 7692, and the cases of ``test_rfc6455.py`` that show it."""

    words: str
    cases: tuple[str, ...]


HTTP_1_0 = Failure("accepts HTTP/1.0", ("handshake: HTTP/1.0",))
NO_HOST = Failure("accepts a handshake without `Host`", ("handshake: no Host",))
POST = Failure("accepts a handshake by `POST`", ("handshake: POST",))
BAD_KEY = Failure(
    "accepts a `Sec-WebSocket-Key` that is not 16 octets",
    ("handshake: key of 3 octets", "handshake: key that is not base64"),
)
VERSION = Failure(
    "does not name version 13 when it refuses another",
    ("handshake: version 12 is told the right one",),
)
EMPTY = Failure(
    "does not send empty messages",
    ("1 text of 0", "1 binary of 0", "1 text of 0 by 1", "5 text of three empty fragments"),
)
CLOSE_WITHIN = Failure(
    "answers a close frame between the fragments of a message with 1002", ("7 within a message",)
)
LARGE = Failure(
    "ends the connection at a message of more than 1 MiB",
    (
        "9 text of 4 MiB",
        "9 binary of 4 MiB",
        "9 text of 4 MiB in 64 fragments",
        "9 binary of 4 MiB in 1024 fragments",
    ),
)
PING_WITHIN = Failure(
    "ends the connection at a ping between the fragments of a compressed message",
    ("12 ping between fragments",),
)
BFINAL = Failure(
    "loses the compressed messages behind one whose last block has BFINAL set",
    ("12 sample of BFINAL, twice",),
)
LAX_OFFER = Failure(
    "accepts a compression offer with an unknown or a repeated parameter",
    ("12 offer: unknown parameter", "12 offer: same parameter twice"),
)
STRICT_OFFER = Failure(
    "refuses the handshake because of a wrong compression offer",
    (
        "12 offer: unknown parameter",
        "12 offer: window of 16 bits",
        "12 offer: same parameter twice",
    ),
)


@attrs.frozen(kw_only=True)
class Observed:
    """One server and what is seen of it."""

    name: str
    """As in the docs."""
    command: str
    """As in the docs; ``{grace}`` is the seconds that open connections are given on SIGTERM."""
    options: str
    """What only the tests need."""
    loop: str = ""
    """Of uvicorn, which has one row in the docs for both of its loops."""
    client_codes: bool = True
    """`conn.close_code` is the code that the client has closed with; else it is 1006."""
    lost: int = 1006
    """`conn.close_code` after the connection was lost without a close frame."""
    low_codes: bool = True
    """The client sees our close codes below 3000, such as 1003 and 1009; else it sees 1000."""
    reasons: bool = True
    """The client sees the reasons of our close frames."""
    largest: int = 16
    """MiB of a frame, however large `max_size` is."""
    pushes_back: bool = True
    """A send waits for a client that does not read, so that the outbox and its bounds count."""
    lifespan: bool = True
    """Workers start and end with the server; else they start with the first connection."""
    sigterm_seen: int = 1012
    """The close code that a client sees after SIGTERM."""
    sigterm_codes: tuple[int, ...] = (1012,)
    """What `conn.close_code` may be after SIGTERM; empty: disconnect handlers do not run."""
    ends: str = "with the last handler"
    """When the process ends after SIGTERM."""
    violation: str = "1002 or 1007"
    """How it fails a connection, if not with "no code" in its close frame, or "no close frame"."""
    compresses: bool = True
    """It agrees to permessage-deflate (RFC 7692)."""
    statuses: bool = True
    """A refused handshake has the status, the headers and the body of the error; else it is 403."""
    headers: str = "yes"
    """Whether what `conn.add_header` adds goes out with the accept."""
    notices: bool = True
    """It says that a client has left before the accept."""
    hung_ends: str = "after `linger`"
    """When the process ends after SIGTERM while a connect handler hangs."""
    failures: tuple[Failure, ...] = ()
    """Where it deviates from RFC 6455."""

    def __str__(self) -> str:
        return f"{self.name} {self.loop}".replace("`", "").strip().replace(" ", "-")

    @property
    def row(self) -> str:
        """The line in the table of the docs."""
        cells = (
            self.name,
            "yes" if self.client_codes else "1006",
            self.lost,
            "yes" if self.low_codes else "1000 for those below 3000",
            "yes" if self.reasons else "dropped",
            f"{self.largest} MiB",
            "evicted" if self.pushes_back else "buffered without bound",
            "yes" if self.lifespan else "no",
            self.sigterm_seen,
            " or ".join(map(str, self.sigterm_codes)) or "handlers do not run",
            self.ends,
        )
        return f"| {' | '.join(map(str, cells))} |"

    @property
    def handshake_row(self) -> str:
        """The line in the docs' table on handshakes."""
        cells = (
            self.name,
            "its own" if self.statuses else "403",
            self.headers,
            "noticed" if self.notices else "not noticed",
            self.hung_ends,
        )
        return f"| {' | '.join(cells)} |"

    @property
    def rfc_row(self) -> str:
        """The line in the docs' table on RFC 6455."""
        cells = (
            self.name,
            self.violation,
            "yes" if self.compresses else "no",
            "; ".join(failure.words for failure in self.failures) or "nothing",
        )
        return f"| {' | '.join(cells)} |"


def uvicorn(implementation: str, loop: str, **deviations: Any) -> Observed:
    return Observed(
        name=f"uvicorn `{implementation}`",
        command=f"uvicorn app:app --ws {implementation} --timeout-graceful-shutdown {{grace}}",
        loop=loop,
        options=f"--loop {loop} --log-level warning --port {{port}}",
        **deviations,
    )


SANSIO = (HTTP_1_0, NO_HOST, VERSION, CLOSE_WITHIN, BFINAL)
WEBSOCKETS = (HTTP_1_0, NO_HOST, VERSION, BFINAL)
WSPROTO = {
    "violation": "no close frame",
    "failures": (HTTP_1_0, BAD_KEY, PING_WITHIN, BFINAL, LAX_OFFER),
}
SERVERS = [
    uvicorn("websockets-sansio", "asyncio", lost=1005, failures=SANSIO),
    uvicorn("websockets-sansio", "uvloop", lost=1005, failures=SANSIO),
    uvicorn("websockets", "asyncio", failures=WEBSOCKETS),
    uvicorn("websockets", "uvloop", failures=WEBSOCKETS),
    uvicorn("wsproto", "asyncio", lost=1005, **WSPROTO),
    uvicorn("wsproto", "uvloop", lost=1005, **WSPROTO),
    Observed(
        name="hypercorn",
        command="hypercorn app:app --graceful-timeout {grace}",
        options="--bind 127.0.0.1:{port}",
        client_codes=False,
        sigterm_seen=1011,
        sigterm_codes=(1006,),
        ends="after the whole grace period",
        hung_ends="after `connect_timeout`",
        violation="no close frame",
        failures=(BAD_KEY, VERSION, PING_WITHIN, BFINAL, LAX_OFFER),
    ),
    Observed(
        name="granian",
        command="granian app:app --interface asgi --workers-kill-timeout {grace}",
        options="--port {port}",
        lost=1005,
        sigterm_seen=1006,
        sigterm_codes=(1005, 1012),
        violation="no code",
        headers="dropped",
        notices=False,
        hung_ends="after `connect_timeout`",
        compresses=False,
        failures=(POST, NO_HOST, BAD_KEY, VERSION),
    ),
    Observed(
        name="daphne",
        command="daphne app:app",
        options="--port {port}",
        low_codes=False,
        reasons=False,
        largest=1,
        pushes_back=False,
        lifespan=False,
        sigterm_seen=1006,
        sigterm_codes=(),
        ends="at once",
        statuses=False,
        headers="left out",
        hung_ends="at once",
        violation="no close frame",
        compresses=False,
        failures=(HTTP_1_0, EMPTY, LARGE, STRICT_OFFER),
    ),
]
