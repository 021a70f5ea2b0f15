"""What is kept in Redis: what it is lost by, which rights it takes, and what is said of both."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import falcon
import pytest
import redis.asyncio
from brokers import BrokerProcess, Proxy, running, shared
from support import PATIENCE, Client, connect, new_app, serving, until
from test_cluster import NAMES
from test_leases import startup

import pachinko_cluster
from pachinko import BrokerAway, Connection, Hub, Kind, Pachinko, PachinkoError, Window
from pachinko_cluster import Past, Redis, Stamp, read_broker, read_stamp, subject_of

LONG = Window(100, 300.0, 1_048_576)
ROOM = "pachinko.g.room"


class Process:
    """A connection to Redis, and what has come by it."""

    def __init__(self, url: str) -> None:
        self.store = Redis(read_broker(url))
        self.came: list[tuple[Stamp | None, bytes]] = []
        self.lost: list[BaseException | None] = []

    async def deliver(self, subject: str, data: bytes) -> None:
        self.came.append(read_stamp(data))

    async def keep(self, *texts: str, subject: str = ROOM, window: Window = LONG) -> list[Stamp]:
        """Keep messages, and return their stamps once they have come."""
        begun = len(self.came)
        for text in texts:
            await self.store.keep(subject, b"{}\n" + text.encode(), window)
        await until(lambda: len(self.came) == begun + len(texts))
        assert [data for _, data in self.came[begun:]] == [b"{}\n" + t.encode() for t in texts]
        return [stamp for stamp, _ in self.came[begun:] if stamp is not None]

    async def past(self, count: int = 100) -> Past:
        return await self.store.past(ROOM, count)


@contextlib.asynccontextmanager
async def process(url: str, *subjects: str) -> AsyncIterator[Process]:
    one = Process(url)
    try:
        await one.store.start(one.deliver, one.lost.append)
        for subject in subjects or (ROOM,):
            await one.store.subscribe(subject)
        yield one
    finally:
        await one.store.stop()


@contextlib.asynccontextmanager
async def admin_of(broker: BrokerProcess) -> AsyncIterator[Any]:
    async with redis.asyncio.from_url(broker.url, socket_timeout=PATIENCE) as admin:
        yield admin


@pytest.fixture(scope="module")
def redis_server() -> Iterator[BrokerProcess]:
    with shared("redis") as broker:
        yield broker


@pytest.fixture
async def server(redis_server: BrokerProcess) -> BrokerProcess:
    """One that is as it was when it began."""
    async with admin_of(redis_server) as admin:
        await admin.flushall()
        await admin.script_flush()
        await admin.acl_deluser("app")
    return redis_server


def texts_of(past: Past) -> list[str]:
    return [entry.data.partition(b"\n")[2].decode() for entry in past.entries]


# What is lost begins anew


LOSSES = {
    "everything": ("*", "epoch"),
    "the count": ("{pachinko}.kept", "epoch"),
    "the tops": ("{pachinko}.kept.tops", "epoch"),
    "a stream": ("{pachinko}.kept.*.g.room", "floor"),
    "no key": ("nothing", "nothing"),
}


@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
async def test_what_was_lost_is_known_to_be(
    server: BrokerProcess, loss: str, is_read: bool
) -> None:
    """By an operator, or by eviction: a floor above it, or another epoch, whatever comes next."""
    pattern, announced = LOSSES[loss]
    async with process(server.url) as one, admin_of(server) as admin:
        *_, last = await one.keep("a", "b", "c")
        if keys := await admin.keys(pattern):
            await admin.delete(*keys)
        if is_read:
            past = await one.past()
            assert (past.epoch != last.epoch) == (announced == "epoch")
            assert texts_of(past) == (["a", "b", "c"] if announced == "nothing" else [])
            assert past.floor == (last.number if announced == "floor" else 0)
        [new] = await one.keep("d")
        assert (new.epoch != last.epoch) == (announced == "epoch")
        assert new.previous == (0 if announced == "epoch" else last.number)
        past = await one.past()
        assert past.epoch == new.epoch and past.top == new.number
        assert texts_of(past) == (["a", "b", "c", "d"] if announced == "nothing" else ["d"])
        assert past.floor == (last.number if announced == "floor" else 0)


@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("persistence", ["none", "log", "snapshot"])
async def test_a_restart_begins_an_epoch(persistence: str, is_read: bool) -> None:
    """What the server still has can be read under it, and numbers go on."""
    options = ("--appendonly", "yes", "--appendfsync", "always") if persistence == "log" else ()
    async with running("redis", *options) as broker:
        async with process(broker.url) as one:
            *_, last = await one.keep("a", "b")
            if persistence == "snapshot":
                async with admin_of(broker) as admin:
                    await admin.save()
                [last] = await one.keep("c")  # The snapshot has no such message.
            await broker.restart()
            await until(lambda: one.lost)
        async with process(broker.url) as one:
            kept = [] if persistence == "none" else ["a", "b"]
            if is_read:
                past = await one.past()
                assert past.epoch != last.epoch and texts_of(past) == kept and past.top < 3
            [new] = await one.keep("d")
            assert new.epoch != last.epoch and new.number == (1 if persistence == "none" else 3)
            assert texts_of(await one.past()) == [*kept, "d"]


async def test_epochs_of_one_server_differ(server: BrokerProcess) -> None:
    """However often it is flushed, and however fast."""
    async with process(server.url) as one, admin_of(server) as admin:
        epochs = set()
        for _ in range(20):
            await admin.flushall()
            epochs.add((await one.past()).epoch)
        assert len(epochs) == 20


async def test_scripts_may_be_forgotten(server: BrokerProcess) -> None:
    """They are sent again."""
    async with process(server.url) as one, admin_of(server) as admin:
        for n in range(3):
            await one.keep(str(n))
            assert len((await one.past()).entries) == n + 1
            assert await one.store.agree("pachinko.history.rules", b"x", 5.0) == b"x"
            await admin.script_flush()


# What it takes


@pytest.mark.parametrize("seconds", [1e-9, 0.05, 1e300])
async def test_a_window_of_any_seconds_can_be_kept(server: BrokerProcess, seconds: float) -> None:
    """A message is delivered in any case; its top outlasts it."""
    async with process(server.url) as one:
        [stamp] = await one.keep("a", window=Window(5, seconds, 1000))
        async with asyncio.timeout(5):
            while seconds < 1 and (await one.past()).entries:
                await asyncio.sleep(0.02)  # nobody tells when Redis has dropped it
        past = await one.past()
        assert past.top == stamp.number
        assert past.floor == (0 if past.entries else stamp.number)
        assert await one.store.agree("pachinko.x", b"1", seconds) == b"1"


@pytest.mark.parametrize("group", NAMES)
async def test_a_group_of_any_name_is_kept(server: BrokerProcess, group: str) -> None:
    """Beside all others."""
    subject = subject_of("pachinko", Kind.GROUP, group)
    async with process(server.url, subject) as one:
        await one.keep("a", subject=subject)
        assert texts_of(await one.store.past(subject, 10)) == ["a"]
        for other in NAMES:
            if other != group:
                past = await one.store.past(subject_of("pachinko", Kind.GROUP, other), 10)
                assert not past.entries


async def test_large_messages_are_kept(server: BrokerProcess) -> None:
    """Of any bytes."""
    data = b"{}\n" + bytes(range(256)) * 4096
    async with process(server.url) as one:
        for _ in range(3):
            await one.store.keep(ROOM, data, LONG)
        assert [entry.data for entry in (await one.past(2)).entries] == [data] * 2
        await until(lambda: [data for _, data in one.came] == [data] * 3)


@pytest.mark.parametrize("other", ["shop", "pachinko/1"])
async def test_apps_of_one_server_share_nothing(server: BrokerProcess, other: str) -> None:
    """Namespaces have counts, epochs and rules of their own, and so have databases."""
    namespace, _, database = other.partition("/")
    subject = f"{namespace}.g.room"
    async with process(server.url) as one, process(f"{server.url}/{database}", subject) as two:
        await one.keep("a", "b")
        before = await two.store.past(subject, 10)
        assert before.top == 0 and not before.entries
        await one.store.agree("pachinko.history.rules", b"1", 60.0)
        assert await two.store.agree(f"{namespace}.history.rules", b"2", 60.0) == b"2"
        await two.store.keep(subject, b"{}\nc", LONG)
        await until(lambda: two.came and two.came[-1][1] == b"{}\nc")
        past, theirs = await one.past(), await two.store.past(subject, 10)
        assert texts_of(past) == ["a", "b"] and texts_of(theirs) == ["c"]
        assert past.epoch != theirs.epoch


async def test_quiet_subjects_are_forgotten(
    server: BrokerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before the next day; and then no position is taken for one that has missed nothing."""
    day = f"+ {pachinko_cluster._FORGET * 1000:.0f}"
    assert day in pachinko_cluster._KEEP
    async with process(server.url) as one, admin_of(server) as admin:
        *_, last = await one.keep("a", "b")
        never = subject_of("pachinko", Kind.GROUP, "never")

        async def send_to_others(days: int) -> None:
            script = pachinko_cluster._KEEP.replace(day, "- 1e12")
            for n in range(pachinko_cluster._TIDY * days):
                with monkeypatch.context() as patch:  # A day ends with each hundredth message.
                    if days:
                        patch.setattr(pachinko_cluster, "_KEEP", script)
                    await one.store.keep(f"pachinko.g.{n}", b"{}", LONG)

        async def tops() -> int:
            count: int = await admin.zcard("{pachinko}.kept.tops")
            return count

        quiet = await one.store.past(never, 5)
        await send_to_others(1)
        assert await tops() == 102 and (await one.past()).top == 102
        assert (await one.store.past(never, 5)).floor <= quiet.top
        await send_to_others(1)
        past = await one.past()
        assert await tops() <= 101  # all of the day before the last are gone
        assert texts_of(past) == ["a", "b"] and past.floor == 0 and past.top >= last.number
        old = await one.store.past("pachinko.g.never", 5)
        assert quiet.top < old.floor <= old.top
        for key in await admin.keys("{pachinko}.kept.*.room"):
            await admin.delete(key)
        past = await one.past()
        assert last.number <= past.floor <= past.top and not past.entries
        [new] = await one.keep("c")
        assert new.previous <= last.number and new.number > past.top
        assert last.number <= (await one.past()).floor < new.number
        await send_to_others(3)
        assert (await one.past()).floor <= (await one.past()).top
        assert await tops() <= 202


# What is said when it cannot


REFUSALS = {
    "cluster": (("--cluster-enabled", "yes"), r"needs a single Redis server, or NATS"),
    "old": (("--rename-command", "XADD", ""), r"they need Redis 5\.0 or later, or Valkey"),
    "no scripts": (("--rename-command", "EVALSHA", ""), r"with all its commands"),
    "full": (("--maxmemory", "1"), r"its memory is full, raise maxmemory"),
    "replica": (("--replicaof", "127.0.0.1", "1"), r"this is a replica, give the address of"),
    "alone": (("--min-replicas-to-write", "1"), r"Redis keeps no messages: it says \(.*replicas"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_a_server_that_keeps_nothing_is_told_apart(refusal: str) -> None:
    """With what is to be done, and without a traceback. What is not kept is not delivered."""
    options, text = REFUSALS[refusal]
    async with running("redis", *options) as broker, process(broker.url) as one:
        given: dict[str, tuple[Any, ...]] = {
            "keep": (ROOM, b"{}", LONG), "past": (ROOM, 5), "agree": ("pachinko.x", b"1", 5.0),
        }  # fmt: skip
        if refusal == "old":
            del given["past"]  # It needs nothing that is missing.
        for call, arguments in given.items():
            with pytest.raises(PachinkoError, match=text) as caught:
                await getattr(one.store, call)(*arguments)
            assert not one.came and not one.lost
            assert isinstance(caught.value, BrokerAway) == (refusal != "cluster")


async def test_a_server_that_cannot_tell_of_a_failover_is_refused(
    server: BrokerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some services leave out what Redis says of its replication."""
    script = pachinko_cluster._PAST.replace("'replication'", "'clients'")
    monkeypatch.setattr(pachinko_cluster, "_PAST", script)
    async with process(server.url) as one:
        with pytest.raises(PachinkoError, match="does not say when another one takes its place"):
            await one.past()


# What the documentation gives a user for messages alone.
MESSAGES = ("on", "nopass", "resetchannels", "&pachinko.*", "+@pubsub", "+@connection")
RIGHTS = f"~{{pachinko}}.* {pachinko_cluster._STORE_RIGHTS}"


async def test_its_rights_are_enough(server: BrokerProcess) -> None:
    """Those that the error names, beside those for messages alone."""
    async with admin_of(server) as admin:
        await admin.execute_command("ACL", "SETUSER", "app", *MESSAGES, *RIGHTS.split())
        async with process(server.url.replace("//", "//app:x@")) as one:
            assert await one.store.agree("pachinko.history.rules", b"1", 60.0) == b"1"
            await one.keep(*map(str, range(pachinko_cluster._TIDY + 1)))
            assert len((await one.past()).entries) == 100


@pytest.mark.parametrize("right", [*RIGHTS.split(), "&pachinko.*"])
async def test_a_right_that_is_missing_is_named(server: BrokerProcess, right: str) -> None:
    """At the start, with all that it takes, whichever it is."""
    given = [each for each in (*MESSAGES, *RIGHTS.split()) if each != right]
    given += [right.replace("+", "-")] if right[0] == "+" else []
    async with admin_of(server) as admin:
        await admin.execute_command("ACL", "SETUSER", "app", *given)
        one = Process(server.url.replace("//", "//app:x@"))
        try:
            await one.store.start(one.deliver, one.lost.append)
            with pytest.raises(PachinkoError) as caught:
                await one.store.agree("pachinko.history.rules", b"1", 60.0)
        finally:
            await one.store.stop()
        text = f"hub.keep() needs further rights in Redis: ACL SETUSER app {RIGHTS} ("
        assert str(caught.value).startswith(text)
        assert ("channel" in str(caught.value)) == (right[0] == "&")


# Apps


class App:
    """A process with an app that keeps its rooms."""

    def __init__(self, url: str, **window: Any) -> None:
        self.hub = Hub()
        self.hub.configure(url)
        self.hub.keep("room:", **window)
        self.app = new_app()
        self.url = ""
        ws = Pachinko(self.app, "/ws", hub=self.hub)

        @ws.connect
        async def arrive(conn: Connection) -> None:
            await conn.join("room:a")

    @contextlib.asynccontextmanager
    async def client(self, at: str | None = None) -> AsyncIterator[Client]:
        resume = json.dumps({"groups": {} if at is None else {"room:a": at}})
        async with connect(self.url + falcon.to_query_str({"resume": resume})) as client:
            yield client

    async def say(self, *texts: str) -> None:
        for text in texts:
            await self.hub.send("room:a", "said", text)


@contextlib.asynccontextmanager
async def apps(url: str, count: int = 2, **window: Any) -> AsyncIterator[list[App]]:
    async with contextlib.AsyncExitStack() as stack:
        started = [App(url, **window) for _ in range(count)]
        for each in started:
            server = await stack.enter_async_context(serving(each.app))
            each.url = f"{server.url}/ws"
        yield started


def spoken(frames: list[dict[str, Any]]) -> list[Any]:
    return [frame["payload"] if frame["type"] == "said" else frame["type"] for frame in frames]


async def heard(client: Client, count: int) -> list[dict[str, Any]]:
    return [await client.receive() for _ in range(count)]


async def test_a_client_resumes_in_the_other_process(server: BrokerProcess) -> None:
    """And in one that has just been started; each message has one position everywhere."""
    async with apps(server.url) as (one, two):
        async with one.client() as a, two.client() as b:
            assert [(await each.receive())["type"] for each in (a, b)] == ["resume"] * 2
            await one.say("1")
            await two.say("2")
            first, same = await heard(a, 2), await heard(b, 2)
            assert first == same and spoken(first) == ["1", "2"]
        await one.say("3")
        async with two.client(first[0]["at"]) as c:
            missed = await heard(c, 3)
            assert spoken(missed) == ["2", "3", "resume"] and missed[0] == first[1]
            assert missed[2]["payload"]["replayed"] == 2
        async with apps(server.url, 1) as (three,), three.client(first[1]["at"]) as d:
            missed = await heard(d, 2)
            assert spoken(missed) == ["3", "resume"]
            await two.say("4")
            assert spoken(await heard(d, 1)) == ["4"]


async def test_an_outage_of_one_process_is_made_good(server: BrokerProcess) -> None:
    """Its clients get what was sent meanwhile, in order; the gap is for messages to all."""
    async with (
        Proxy(server.port) as proxy,
        apps(server.url, 1) as (one,),
        apps(proxy.url("redis"), 1) as (two,),
        two.client() as client,
    ):
        assert (await client.receive())["type"] == "resume"
        await one.say("1")
        assert spoken(await heard(client, 1)) == ["1"]
        proxy.refuses = True
        proxy.cut()
        await one.say("2", "3")
        proxy.refuses = False
        await until(lambda: two.hub.stats()["broker_down"] == 0 and two.hub.stats()["outages"])
        await one.say("4")
        frames = await heard(client, 4)
        frames.remove({"type": "gap", "payload": {"group": None}})
        assert spoken(frames) == ["2", "3", "4"]


async def test_an_outage_that_loses_messages_is_a_gap() -> None:
    """With its reason, and a position from which the client can go on."""
    async with (
        running("redis") as server,
        apps(server.url) as (one, two),
        two.client() as client,
    ):
        assert (await client.receive())["type"] == "resume"
        await one.say("1")
        [frame] = await heard(client, 1)
        await server.restart()
        gaps = await heard(client, 2)
        gaps.remove({"type": "gap", "payload": {"group": None}})  # for messages to all
        [gap] = gaps
        assert gap["type"] == "gap" and gap["payload"]["reason"] == "epoch"
        await until(lambda: not any(each.hub.stats()["broker_down"] for each in (one, two)))
        await one.say("2")
        assert spoken(await heard(client, 1)) == ["2"]
        async with one.client(frame["at"]) as old, one.client(gap["at"]) as new:
            assert (await old.receive())["payload"]["reason"] == "epoch"
            assert spoken(await heard(new, 2)) == ["2", "resume"]


async def test_who_keeps_nothing_numbers_what_it_sends(server: BrokerProcess) -> None:
    """A program without rules of its own learns those of the app."""
    async with apps(server.url, 1) as (one,), one.client() as client:
        at = (await client.receive())["at"]
        async with Hub().open(server.url) as hub:
            await hub.send("room:a", "said", "1")
            await hub.send("lobby", "said", "not kept")
        [frame] = await heard(client, 1)
        assert spoken([frame]) == ["1"]
        async with one.client(at) as late:
            assert (await heard(late, 2))[0] == frame


async def test_an_app_on_a_server_that_keeps_nothing_does_not_start() -> None:
    """It says why; without rules it starts."""
    async with running("redis", "--rename-command", "XADD", "") as broker:
        answer = await startup(App(broker.url).app)
        assert answer["type"] == "lifespan.startup.failed"
        assert "they need Redis 5.0 or later, or Valkey" in answer["message"]
        async with Hub().open(broker.url) as hub:
            await hub.send("room:a", "said", "1")


async def test_who_keeps_nothing_needs_no_rights_for_it(server: BrokerProcess) -> None:
    """A user of before goes on as before."""
    async with admin_of(server) as admin:
        await admin.execute_command("ACL", "SETUSER", "app", *MESSAGES)
    async with Hub().open(server.url.replace("//", "//app:x@")) as hub:
        await hub.send("room:a", "said", "1")


def test_the_documentation_has_the_rights() -> None:
    """All of them, in one line that can be copied."""
    page = (Path(__file__).parent.parent / "docs" / "cluster.md").read_text()
    assert RIGHTS in " ".join(page.split())
