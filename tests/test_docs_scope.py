"""What docs/scope.md shows and claims, as far as the packages are there: run here."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import types
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from support import connect, simulated, until
from test_session import endpoint

from pachinko import Connection, PachinkoError, hub

PAGE = Path(__file__).parent.parent / "docs" / "scope.md"

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs the files of the checkout")


@pytest.fixture(autouse=True)
def clean_hub() -> Iterator[None]:
    yield
    hub.state.replace()


def code_of(*headings: str) -> types.ModuleType:
    """The Python under these headings of the page, run as one module."""
    module = types.ModuleType("scope_" + re.sub(r"\W", "_", headings[0]))
    sys.modules[module.__name__] = module  # where annotations are looked up
    text = PAGE.read_text()
    for heading in headings:
        part = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        (code,) = re.findall(r"^```python\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
        exec(compile(code, f"{PAGE} ({heading})", "exec", dont_inherit=True), vars(module))
    return module


@contextlib.asynccontextmanager
async def talking(page: Any) -> AsyncIterator[Any]:
    """A client of the page's app."""
    async with simulated(page.app) as server, connect(f"{server.url}/ws") as client:
        yield client


async def test_the_pages_app() -> None:
    """A session is opened for each call, and closed after it with what became of it."""
    page: Any = code_of("Middleware", "Provided values")
    async with talking(page) as client:
        assert (await client.ask("note", {"text": "a", "session": "evil"}))["payload"] == "a"
        assert (await client.ask("note", {"text": ""}))["payload"]["code"] == "empty"
        assert (await client.ask("note", {"text": 1}))["payload"]["code"] == "invalid_payload"
        assert (await client.ask("notes", 1))["payload"] == 0
        assert (await client.receive())["type"] == "complete"
    logs = [session.log for session in page.sessions]
    assert logs == [["open", "commit"], ["open", "rollback"], ["open", "commit"]]
    assert page.request_id.get() == "none"


class Session: ...


async def no_type(conn: Connection):  # type: ignore[no-untyped-def]  # that is what is wrong
    yield Session()


async def yields(conn: Connection) -> Session:  # type: ignore[misc]  # as above
    yield Session()


async def by_iterator(conn: Connection) -> Iterator[Session]:  # type: ignore[misc]  # as above
    yield Session()


async def does_not_yield(conn: Connection) -> AsyncIterator[Session]:
    raise NotImplementedError


@contextlib.asynccontextmanager
async def decorated(conn: Connection) -> AsyncIterator[Session]:
    yield Session()


async def text(conn: Connection) -> str:
    raise NotImplementedError


async def several(conn: Connection) -> list[Session]:
    raise NotImplementedError


async def anything(conn: Connection) -> Any:
    raise NotImplementedError


async def right(conn: Connection) -> Session:
    raise NotImplementedError


async def positional(conn: Connection, session: Session) -> None: ...


async def optional(conn: Connection, *, session: Session | None) -> None: ...


async def annotated(conn: Connection, *, session: Annotated[Session, "x"]) -> None: ...


ROWS: dict[str, list[Any]] = {
    "`async def f(conn):` and `yield`": [no_type],
    "`-> Session` and `yield`, or `-> Iterator[Session]`": [yields, by_iterator],
    "`-> AsyncIterator[Session]` without `yield`": [does_not_yield],
    "`@contextlib.asynccontextmanager` below `@ws.provide`": [decorated],
    "`-> str`, `-> list[Session]`, `-> Any`": [text, several, anything],
    r"`(conn, session: Session)`, `*, session: Session \| None`": [positional, optional, annotated],
}


@pytest.mark.parametrize("row", ROWS)
def test_the_table_of_mistakes(row: str) -> None:
    """Each row is on the page, and says what the error says."""
    (line,) = [each for each in PAGE.read_text().splitlines() if each.startswith(f"| {row} |")]
    says = line.split(" | ")[1].removesuffix(" |")
    for function in ROWS[row]:
        ws = endpoint()
        if row.startswith("`(conn"):
            ws.provide(right)
            decorate: Any = ws.on("get")
        else:
            decorate = ws.provide
        with pytest.raises(PachinkoError) as caught:
            decorate(function)
        error = str(caught.value).replace(f" {function.__name__}(conn)", " f(conn)")
        if function in (several, anything):
            error = re.sub("provides .*?, as", "provides str, as", error)
        assert says.partition(". A `typing")[0] in error


async def test_structlog(capsys: pytest.CaptureFixture[str]) -> None:
    """What is bound for a message is in its own lines alone, also side by side."""
    structlog = pytest.importorskip("structlog", reason="is in the extra named test")
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as lines:
        async with talking(code_of("structlog")) as client:
            for id, said in enumerate(("a", "bcd")):
                await client.send("say", {"text": said}, id=id)
            await client.receive()
            await client.receive()
    assert [(line["event"], line["type"], line["length"]) for line in lines] == [
        ("said", "say", 1),
        ("said", "say", 3),
    ]
    assert structlog.contextvars.get_contextvars() == {}


async def test_opentelemetry(caplog: pytest.LogCaptureFixture) -> None:
    """A stream is one span around those of its items; no token is detached elsewhere."""
    trace = pytest.importorskip("opentelemetry.trace", reason="is in the extra named test")
    page: Any = code_of("OpenTelemetry")
    ended: list[Any] = []

    class Tracer(trace.NoOpTracer):  # type: ignore[misc]  # of a package that may be missing
        """Makes spans that note their parent and their end; the SDK would be a lot for that."""

        @contextlib.contextmanager
        def start_as_current_span(self, name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
            parent = trace.get_current_span()
            context = trace.SpanContext(1, 1 + id(object()), False)
            span = trace.NonRecordingSpan(context)
            span.name = name
            with trace.use_span(span):
                yield span
            ended.append((name, getattr(parent, "name", None)))

    page.tracer = Tracer()
    async with talking(page) as client:
        await client.send("count", {"to": 2}, id=1)
        await client.send("count", {"to": 1}, id=2)
        await until(lambda: sum(name == "count" for name, _ in ended) == 2)
        for _ in range(5):
            await client.receive()
    assert sorted(ended) == [("count", None)] * 2 + [("item", "count")] * 3
    await asyncio.sleep(0)
    assert "Failed to detach" not in caplog.text
