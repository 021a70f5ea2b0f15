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


def uvicorn(implementation: str, loop: str, **deviations: Any) -> Observed:
    return Observed(
        name=f"uvicorn `{implementation}`",
        command=f"uvicorn app:app --ws {implementation} --timeout-graceful-shutdown {{grace}}",
        loop=loop,
        options=f"--loop {loop} --log-level warning --port {{port}}",
        **deviations,
    )


SERVERS = [
    uvicorn("websockets-sansio", "asyncio", lost=1005),
    uvicorn("websockets-sansio", "uvloop", lost=1005),
    uvicorn("websockets", "asyncio"),
    uvicorn("websockets", "uvloop"),
    uvicorn("wsproto", "asyncio", lost=1005),
    uvicorn("wsproto", "uvloop", lost=1005),
    Observed(
        name="hypercorn",
        command="hypercorn app:app --graceful-timeout {grace}",
        options="--bind 127.0.0.1:{port}",
        client_codes=False,
        sigterm_seen=1011,
        sigterm_codes=(1006,),
        ends="after the whole grace period",
    ),
    Observed(
        name="granian",
        command="granian app:app --interface asgi --workers-kill-timeout {grace}",
        options="--port {port}",
        lost=1005,
        sigterm_seen=1006,
        sigterm_codes=(1005, 1012),
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
    ),
]
