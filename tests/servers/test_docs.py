"""``docs/servers.md`` says what the tests see."""

from __future__ import annotations

from pathlib import Path

from observed import COLUMNS, SERVERS

DOCS = (Path(__file__).parents[2] / "docs" / "servers.md").read_text()


def test_table() -> None:
    """Its first table has a row for each server, word for word, and no other."""
    header, rule, *rows = [line for line in DOCS.splitlines() if line.startswith("|")]
    assert header == f"| {' | '.join(COLUMNS)} |"
    assert set(rule) == {"|", "-"}
    assert rows == list(dict.fromkeys(server.row for server in SERVERS))


def test_commands() -> None:
    """It shows the commands with which the servers were started."""
    commands = {server.command for server in SERVERS if "--ws" not in server.command}
    commands.add(SERVERS[0].command)
    for command in commands:
        before, _, after = command.partition("{grace}")
        assert any(
            line.startswith(f"    {before}") and line.endswith(after) for line in DOCS.splitlines()
        ), command
