"""``docs/servers.md`` says what the tests see."""

from __future__ import annotations

from pathlib import Path

from observed import COLUMNS, HANDSHAKE_COLUMNS, RFC_COLUMNS, SERVERS

DOCS = (Path(__file__).parents[2] / "docs" / "servers.md").read_text()


def table(text: str) -> tuple[str, list[str]]:
    """The header and the rows of the only table in *text*."""
    header, rule, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert set(rule) == {"|", "-"}
    return header, rows


def test_table() -> None:
    """Its first table has a row for each server, word for word, and no other."""
    header, rows = table(DOCS.partition("\n## ")[0])
    assert header == f"| {' | '.join(COLUMNS)} |"
    assert rows == list(dict.fromkeys(server.row for server in SERVERS))


def test_handshake_table() -> None:
    """So has the one of the section on handshakes."""
    header, rows = table(DOCS.partition("\n## Handshakes\n")[2].partition("\n## ")[0])
    assert header == f"| {' | '.join(HANDSHAKE_COLUMNS)} |"
    assert rows == list(dict.fromkeys(server.handshake_row for server in SERVERS))


def test_rfc_table() -> None:
    """So has the one of the section on RFC 6455."""
    header, rows = table(DOCS.partition("\n## RFC 6455\n")[2].partition("\n## ")[0])
    assert header == f"| {' | '.join(RFC_COLUMNS)} |"
    assert rows == list(dict.fromkeys(server.rfc_row for server in SERVERS))


def test_commands() -> None:
    """It shows the commands with which the servers were started."""
    commands = {server.command for server in SERVERS if "--ws" not in server.command}
    commands.add(SERVERS[0].command)
    for command in commands:
        before, _, after = command.partition("{grace}")
        assert any(
            line.startswith(f"    {before}") and line.endswith(after) for line in DOCS.splitlines()
        ), command
