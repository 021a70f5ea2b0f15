"""The command ``pachinko``, as a program of its own and on real brokers."""

from __future__ import annotations

import asyncio
import json
import operator
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path

import pytest
from brokers import BrokerKind, running
from ports import free_port
from support import PATIENCE, connect, new_app, serving, until

import pachinko_cluster
from pachinko import Connection, Hub, Pachinko, __version__
from pachinko_cluster import Cluster, Eavesdropper, main

COMMAND = (sys.executable, "-c", "import sys, pachinko_cluster; sys.exit(pachinko_cluster.main())")


class Command:
    """The program, while it runs."""

    def __init__(self, *arguments: str, **variables: str) -> None:
        self.arguments, self.variables = arguments, variables
        self.process: asyncio.subprocess.Process

    async def __aenter__(self) -> Command:
        self.process = await asyncio.create_subprocess_exec(
            *COMMAND,
            *self.arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **self.variables},
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.communicate()

    async def line(self) -> str:
        """The next line of its output."""
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), PATIENCE)).decode().strip()

    async def said(self) -> str:
        """The next line of what it says beside that."""
        assert self.process.stderr is not None
        return (await asyncio.wait_for(self.process.stderr.readline(), PATIENCE)).decode().strip()

    async def end(self, input: str = "") -> tuple[int | None, str, str]:
        """Wait for its end; return the status and what it printed."""
        work = self.process.communicate(input.encode())
        out, err = await asyncio.wait_for(work, PATIENCE)
        return self.process.returncode, out.decode(), err.decode()


async def run(*arguments: str, input: str = "", **variables: str) -> tuple[int | None, str, str]:
    async with Command(*arguments, **variables) as command:
        return await command.end(input)


async def test_listen_prints_what_a_member_would_see(kind: BrokerKind) -> None:
    """Messages a line each, with nothing of other groups; a close on the side; a gap."""
    sender = Hub()
    async with running(kind) as broker, Command("listen", broker.url, "a b.*") as listening:
        assert "listening to 'a b.*'" in await listening.said()
        async with sender.open(broker.url):
            await sender.send("other", "no")
            await sender.broadcast("all")
            assert json.loads(await listening.line()) == {"type": "all"}
            await sender.send("a b.*", "said", {"text": "hi\n"})
            assert json.loads(await listening.line()) == {
                "type": "said",
                "group": "a b.*",
                "payload": {"text": "hi\n"},
            }
            assert await sender.presence("a b.*") == []
            await sender.close_group("a b.*", 4001, "done")
            assert "closed with 4001 done" in await listening.said()
            await broker.restart()
            gap = json.loads(await listening.line())
            assert gap == {"type": "gap", "payload": {"group": "a b.*"}}
            await until(lambda: not sender.stats()["broker_down"])
            await sender.send("a b.*", "after")
            assert json.loads(await listening.line())["type"] == "after"
        assert "is lost" in await listening.said()
        listening.process.send_signal(signal.SIGINT)
        status, out, err = await listening.end()
        assert status == 130 and not out and "Traceback" not in err


async def test_listen_ends_after_a_number_of_messages() -> None:
    """For scripts."""
    sender = Hub()
    async with (
        running("nats") as broker,
        Command("listen", broker.url, "room", "--count", "2") as listening,
    ):
        await listening.said()
        async with sender.open(broker.url):
            for n in range(3):
                await sender.send("room", "n", n)
        status, out, _ = await listening.end()
        assert status == 0 and [json.loads(line)["payload"] for line in out.splitlines()] == [0, 1]


async def test_listen_ends_with_whoever_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``pachinko listen … | head -1``: no traceback. Also with a namespace."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # else there is nothing to be flushed
    sender = Hub()
    sender.configure(namespace="shop")
    async with running("nats") as broker, sender.open(broker.url):
        read, write = os.pipe()
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "listen", broker.url, "room", "--namespace", "shop",
            stdout=write, stderr=subprocess.PIPE,
        )  # fmt: skip
        os.close(write)
        assert process.stderr is not None
        await asyncio.wait_for(process.stderr.readline(), PATIENCE)
        os.close(read)
        await sender.send("room", "x")
        _, err = await asyncio.wait_for(process.communicate(), PATIENCE)
        assert process.returncode == 0 and err == b""


async def test_send_reaches_the_members(kind: BrokerKind) -> None:
    """A payload as an argument, from standard input, or none; with a namespace."""
    hub = Hub()
    app = new_app()
    ws = Pachinko(app, "/ws", hub=hub)

    @ws.connect
    async def join(conn: Connection) -> None:
        conn.user = "ada"
        await conn.join("room")

    async with running(kind) as broker:
        hub.configure(broker.url, namespace="shop")
        named = ("--namespace", "shop")
        async with serving(app) as server, connect(f"{server.url}/ws") as client:
            forms = [((), ""), (('{"a": [1]}',), ""), (("-",), '"from stdin"')]
            sent = (
                run(
                    "send", "-", "room", "x", *arguments, *named,
                    input=input, PACHINKO_BACKPLANE=broker.url,
                )
                for arguments, input in forms
            )  # fmt: skip
            assert await asyncio.gather(*sent) == [(0, "", "")] * 3
            frames = [await client.receive() for _ in range(3)]
            payloads = [frame.get("payload") for frame in frames]
            assert sorted(payloads, key=str) == [None, "from stdin", {"a": [1]}]
            (status, out, err), elsewhere = await asyncio.gather(
                run("presence", broker.url, "room", *named), run("presence", broker.url, "room")
            )
            (conn,) = hub.connections
            expected = {"id": conn.id, "user": "ada", "process": hub.process}
            assert (status, err) == (0, "") and json.loads(out) == expected
            assert elsewhere == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("send", "secret", "room", "x"), "a backplane is a URL"),
        (("send", "memory://", "room", "x"), "reaches no other process"),
        (("send", "-", "room", "x"), "PACHINKO_BACKPLANE is not set"),
        (("send", "", "room", "x"), "the URL is empty"),
        (("send", "nats://h:1", "room", "x", "{secret"), "the payload is JSON"),
        (("send", "nats://h:1", "room", "x", "[" * 10_000), "the payload is JSON"),
        (("send", "redis://h:1?odd=1", "room", "x"), "another option"),
        (("send", "nats://h:1", "room", "x", "--namespace", "a b"), "1 to 64 letters"),
        (("listen", "nats://h:1"), "required: GROUP"),
        (("listen", "nats://h:1", "room", "--count", "x"), "at least 1, got 'x'"),
        (("listen", "nats://h:1", "room", "--count", "0"), "at least 1, got '0'"),
        (("shout", "nats://h:1", "room"), "invalid choice"),
        (("send", "nats://h:1", "\udcff", "x"), "surrogates not allowed"),
        ((), "required: COMMAND"),
    ],
)
def test_a_wrong_call_is_told(
    arguments: tuple[str, ...],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On one line, without what may be a password; the status is 2."""
    monkeypatch.setenv("PACHINKO_BACKPLANE", "")
    assert status_of(*arguments) == 2
    out, err = capsys.readouterr()
    assert not out and text in err
    assert "secret" not in err.replace("redis://:secret@host:6379", "")


def status_of(*arguments: str) -> object:
    try:
        return main(arguments)
    except SystemExit as exc:  # of argparse
        return exc.code


async def test_a_message_that_is_none_is_told() -> None:
    """With the hint of `hub.send`."""
    async with running("nats") as broker:
        status, _, err = await run("send", broker.url, "room", "hello world")
        assert status == 2 and 'write send("text", ' in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("kind", "command"), [("redis", ("send", "x")), ("nats", ("listen",)), ("nats", ("presence",))]
)
async def test_a_broker_that_is_not_there_is_told(
    command: tuple[str, ...], kind: BrokerKind
) -> None:
    """The status is 1, and the text has no password."""
    url = f"{kind}://user:s3cret@127.0.0.1:{free_port()}"
    status, out, err = await run(command[0], url, "room", *command[1:])
    assert status == 1 and not out and "cannot be reached" in err
    assert "s3cret" not in err and "Traceback" not in err


async def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the program and of each command, with an example."""
    status, out, _ = await run("--help")
    assert status == 0 and all(word in out for word in ("send", "listen", "presence", "nats://"))
    for command in ("send", "listen", "history", "presence"):
        assert status_of(command, "--help") == 0
        example = f"pachinko {command} nats://localhost:4222 room:1"
        assert example in " ".join(capsys.readouterr().out.split())
    assert status_of("--version") == 0
    assert capsys.readouterr().out == f"pachinko {__version__}\n"


# In this process, where the coverage is seen


def test_a_copied_file_is_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``python3 pachinko_cluster.py`` does what the installed command does."""
    monkeypatch.setattr(sys, "argv", ["pachinko_cluster.py", "send", "memory://", "room", "said"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(pachinko_cluster.__file__), run_name="__main__")
    assert end.value.code == 2
    assert "reaches no other process" in capsys.readouterr().err


async def call(*arguments: str) -> int:
    """Run `main` with the broker of the environment."""
    return await asyncio.to_thread(main, [arguments[0], "-", *arguments[1:]])


async def test_the_function_behind_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`main` returns the status."""
    async with running("redis") as broker:
        monkeypatch.setenv("PACHINKO_BACKPLANE", broker.url)
        assert await call("send", "room", "x", '{"a":1}') == 0
        assert await call("presence", "room") == 0
        assert await call("send", "room", "x", "{") == 2
        given = tmp_path / "payload.json"
        given.write_text("5")
        with given.open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            assert await call("send", "room", "x", "-") == 0
        listening = asyncio.create_task(call("listen", "room", "--count", "1"))
        capsys.readouterr()
        await until(lambda: "listening" in capsys.readouterr().err)
        app, hub = new_app(), Hub()
        hub.configure(broker.url)
        ws = Pachinko(app, "/ws", hub=hub)

        @ws.connect
        async def join(conn: Connection) -> None:
            await conn.join("room")

        async with serving(app) as server, connect(f"{server.url}/ws"):
            assert await call("send", "room", "x") == 0
            assert await asyncio.wait_for(listening, PATIENCE) == 0
            assert await call("presence", "room") == 0
            heard, found = capsys.readouterr().out.splitlines()
        assert json.loads(heard)["type"] == "x" and len(json.loads(found)["process"]) == 12
        broker.kill()
        assert await call("send", "room", "x") == 1
    capsys.readouterr()
    for url in ("memory://", "rubbish"):
        assert await asyncio.to_thread(main, ["send", url, "room", "x"]) == 2
    assert "reaches no other process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failure", "status"), [(BrokenPipeError(), 0), (OSError("No space left"), 1)]
)
def test_what_cannot_be_printed(
    failure: OSError,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Whoever reads has seen enough, which is no failure; or the disk is full."""

    def fail(work: Coroutine[object, object, None]) -> None:
        work.close()
        raise failure

    monkeypatch.setattr(asyncio, "run", fail)
    silenced: list[bool] = []
    monkeypatch.setattr(pachinko_cluster, "_silence_stdout", lambda: silenced.append(True))
    assert main(["presence", "nats://h:1", "room"]) == status
    assert silenced  # since Python would flush once more at its end
    assert ("cannot print: No space left" in capfd.readouterr().err) == (status == 1)


def test_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is still to be flushed goes nowhere."""
    path = tmp_path / "out"
    with path.open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        out.write("x")
        pachinko_cluster._silence_stdout()
    assert not path.read_text()


def test_it_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the status that a shell expects."""

    def interrupted(work: Coroutine[object, object, None]) -> None:
        work.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(asyncio, "run", interrupted)
    assert main(["send", "memory://", "room", "x"]) == 130


async def test_what_is_behind_listen(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints messages of the group, broadcasts and gaps, and no more than it was asked for."""
    sender = Hub()
    texts = ["", ""]  # of stdout and stderr

    def has_told(text: str) -> bool:
        texts[:] = map(operator.add, texts, capsys.readouterr())
        return text in texts[1]

    app = new_app()
    Pachinko(app, "/ws", hub=sender)
    async with running("nats") as broker:
        sender.configure(broker.url)
        async with serving(app):
            listener = Eavesdropper(broker.url, "pachinko", "room")
            printing = asyncio.create_task(listener.run(8))
            await until(lambda: has_told("listening"))
            await sender.broadcast("all")
            await sender.send("room", "one")
            await sender.send("room", b"\xff\n")
            await sender.send_to(listener.process + "0" * 12, "nobody")
            assert await sender.presence("room") == []
            relay = sender.state.relay
            assert isinstance(relay, Cluster)
            raw = relay._backplane
            for subject in ("pachinko.g.room", "pachinko.a.all"):
                await raw.publish(subject, b"rubbish")
            for n in range(3):
                await raw.publish("pachinko.g.room", b'{"v":3}')
                if n == 1:
                    await sender.send("room", "between")
            await sender.close_group("room", 4000)
            await until(lambda: has_told("closed with 4000"))
            await broker.restart()
            await until(lambda: has_told("") and texts[0].count("gap") == 3)
            await until(lambda: not sender.stats()["broker_down"])
            await asyncio.gather(sender.send("room", "two"), sender.send("room", "three"))
            await asyncio.wait_for(printing, PATIENCE)
            await sender.send("room", "four")
    assert has_told("closed with 4000")
    lines = [json.loads(line) for line in texts[0].splitlines()]
    assert lines.pop(2) == {"bytes": "/wo="}
    types = [line["type"] for line in lines]
    assert types == ["all", "one", "gap", "between", "gap", "gap", "two"]


@pytest.mark.parametrize(
    "failure",
    [BrokenPipeError(), OSError("No space left"), UnicodeEncodeError("ascii", "ä", 0, 1, "")],
)
async def test_a_message_that_cannot_be_printed_is_the_last_one(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads has seen enough, the disk is full, or the terminal has no such character."""
    printed: list[str] = []

    def fail(line: str) -> None:
        printed.append(line)
        raise failure

    monkeypatch.setattr(pachinko_cluster, "_print", fail)
    sender = Hub()
    async with running("nats") as broker, sender.open(broker.url):
        listening = asyncio.create_task(Eavesdropper(broker.url, "pachinko", "room").run())
        while not listening.done():  # it is not subscribed at once
            await sender.send("room", "x")
        with pytest.raises(type(failure)):
            listening.result()
    assert len(printed) == 1
