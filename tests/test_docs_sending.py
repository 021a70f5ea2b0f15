"""What the documentation says about what goes out, and about what is refused."""

from __future__ import annotations

import datetime
import json
import logging
from collections import defaultdict
from typing import Any

import falcon
import pytest
from support import Client, connect, new_app, simulated
from test_docs import PAYLOADS, ROOT, clean_hub, load, spans, tables

import pachinko
from pachinko import AnswerError, Close, Connection, Hub, MessageError, NoAnswer, Pachinko

__all__ = ["clean_hub"]  # a fixture for each test, here too

SENT = tables(PAYLOADS, "Your code sends", "It goes out as")
UNSENDABLE = tables(PAYLOADS, "Your code sends", "The error")
BROKEN = tables(PAYLOADS, "The client sends", "The id of the answer")
RAISED = tables(
    ROOT / "docs" / "reliability.md", "A handler raises", "The client gets", "In the log"
)


@pytest.fixture
def names() -> dict[str, Any]:
    """What the code in the tables' cells may use."""
    circle: list[Any] = []
    circle.append(circle)
    made = {
        "Text": type("Text", (str,), {}), "Count": type("Count", (int,), {}),
        "Mean": type("Mean", (float,), {}), "Moment": type("Moment", (datetime.datetime,), {}),
        "defaultdict": defaultdict, "circle": circle,
        "falcon": falcon, "Close": Close, "MessageError": MessageError,
        "AnswerError": AnswerError, "NoAnswer": NoAnswer,
    }  # fmt: skip
    return {**vars(load(PAYLOADS)), **made}


@pytest.mark.parametrize(("value", "out"), SENT)
def test_what_goes_out(names: dict[str, Any], value: str, out: str) -> None:
    """A row of the table of what goes out."""
    frame = Hub().state.codec.encode("t", eval(spans(value)[0], names))
    assert json.loads(frame).get("payload") == json.loads(spans(out)[0])


@pytest.mark.parametrize(("value", "error"), UNSENDABLE)
def test_what_cannot_go_out(names: dict[str, Any], value: str, error: str) -> None:
    """A row of the table of errors."""
    with pytest.raises(TypeError) as raised:
        Hub().state.codec.encode("t", eval(spans(value)[0], names))
    assert str(raised.value) == spans(error)[0]


@pytest.mark.parametrize(("frame", "id"), BROKEN)
def test_the_id_of_what_is_no_json(frame: str, id: str) -> None:
    """A row of the table of frames that are no JSON."""
    found = pachinko.decode_or_error(spans(frame)[0])
    assert isinstance(found, pachinko.BadFrame) and found.code == "invalid_json"
    assert found.id == (None if id == "none" else json.loads(id.strip("`")))


@pytest.mark.parametrize(("raised", "gets", "logged"), RAISED)
async def test_what_an_exception_means(
    names: dict[str, Any], raised: str, gets: str, logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A row of the table of outcomes."""
    caplog.set_level(logging.WARNING, "pachinko")
    ws = Pachinko(new_app(), "/ws", hub=Hub())

    @ws.on("t")
    async def handler(conn: Connection) -> None:
        raise eval(raised.strip("`"), names)

    async with simulated(ws._app) as server, connect(server.url + "/ws") as client:
        assert await outcome(client, gets) == gets.strip("`")
    assert bool(caplog.records) == (logged != "nothing")
    assert ("ExceptionGroup" in caplog.text) == (logged == "the whole group")


async def outcome(client: Client, gets: str) -> str:
    """What the client gets for a message."""
    await client.send("t", id=1)
    if gets.startswith("a close"):
        return f"a close with {(await client.closed())[0]}"
    return str((await client.receive())["payload"]["code"])
