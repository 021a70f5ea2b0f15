"""Groups that NATS keeps: the stream of a namespace, and what becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import falcon
import pytest
from brokers import BrokerProcess, Proxy, connect_to_nats, running, shared
from nats.aio.client import Client
from support import PATIENCE, connect, new_app, serving, until
from test_leases import startup

import pachinko_cluster
from pachinko import Connection, Hub, Kind, Pachinko, PachinkoError, Position, Window
from pachinko_cluster import Nats, Past, Stamp, StreamGone, read_stamp, subject_of

LONG = Window(100, 300.0, 1_048_576)
STREAM = "pachinko-kept"
ROOM = "pachinko.g.room"


class Process:
    """A process with a connection to NATS, and what has come by it."""

    def __init__(self, broker: BrokerProcess, login: str = "") -> None:
        self.nats = Nats(pachinko_cluster.read_broker(broker.url.replace("://", f"://{login}")))
        self.came: list[tuple[str, Stamp | None, bytes]] = []
        self.lost = asyncio.Event()

    async def deliver(self, subject: str, data: bytes) -> None:
        self.came.append((subject, *read_stamp(data)))

    async def start(self, *subjects: str) -> Process:
        self.lost.clear()
        async with asyncio.timeout(PATIENCE):
            await self.nats.start(self.deliver, lambda _: self.lost.set())
            for subject in subjects:
                await self.nats.subscribe(subject)
        return self

    async def stop(self) -> None:
        await asyncio.wait_for(self.nats.stop(), PATIENCE)

    async def keep(self, *texts: object, to: str = ROOM, window: Window = LONG) -> None:
        for text in texts:
            async with asyncio.timeout(PATIENCE):
                await self.nats.keep(to, b"{%b" % str(text).encode(), window)

    async def past(self, of: str, count: int, after: Position | None = None) -> Past:
        async with asyncio.timeout(PATIENCE):
            return await self.nats.past(of, count, after)

    async def texts(self, of: str = ROOM) -> list[str]:
        return texts(await self.past(of, 100))

    def stamps(self) -> list[Stamp]:
        return [stamp for _, stamp, _ in self.came if stamp is not None]


def texts(past: Past) -> list[str]:
    return [entry.data[1:].decode() for entry in past.entries]


class Scene:
    """A server with JetStream, and processes."""

    def __init__(self, broker: BrokerProcess) -> None:
        self.broker = broker
        self.processes: list[Process] = []

    async def process(self, *subjects: str, login: str = "") -> Process:
        self.processes.append(Process(self.broker, login))
        return await self.processes[-1].start(*subjects)

    @contextlib.asynccontextmanager
    async def admin(self, login: str = "") -> AsyncIterator[Client]:
        client = await connect_to_nats(self.broker.url.replace("://", f"://{login}"))
        try:
            yield client
        finally:
            await client.close()

    async def call(self, what: str, **wanted: Any) -> dict[str, Any]:
        """Call the API of JetStream, as an administrator would."""
        async with self.admin() as client:
            reply = await client.request(
                f"$JS.API.{what}", json.dumps(wanted).encode(), timeout=PATIENCE
            )
        answer: dict[str, Any] = json.loads(reply.data)
        return answer

    async def edit(self, **changes: Any) -> None:
        config = (await self.call(f"STREAM.INFO.{STREAM}"))["config"]
        assert "error" not in await self.call(f"STREAM.UPDATE.{STREAM}", **config | changes)

    async def delete(self) -> None:
        assert "error" not in await self.call(f"STREAM.DELETE.{STREAM}")


@contextlib.asynccontextmanager
async def scene_of(broker: BrokerProcess) -> AsyncIterator[Scene]:
    scene = Scene(broker)
    try:
        yield scene
    finally:
        for process in scene.processes:
            await process.stop()


@contextlib.asynccontextmanager
async def scene_on(*options: str) -> AsyncIterator[Scene]:
    async with running("nats", *options) as broker, scene_of(broker) as scene:
        yield scene


@pytest.fixture
async def own_scene() -> AsyncIterator[Scene]:
    """A server that the test may stop, and whose files it may change."""
    async with scene_on("-js", "-sd", "store") as scene:
        yield scene


@pytest.fixture(scope="module")
def jetstream() -> Iterator[BrokerProcess]:
    with shared("nats", "-js", "-sd", "store") as broker:
        yield broker


@pytest.fixture
async def scene(jetstream: BrokerProcess) -> AsyncIterator[Scene]:
    """A server without streams."""
    async with scene_of(jetstream) as scene:
        for name in (await scene.call("STREAM.NAMES"))["streams"] or ():
            await scene.call(f"STREAM.DELETE.{name}")
        yield scene


def test_no_test_stops_a_server_of_others(jetstream: BrokerProcess) -> None:
    """Those behind it would find it dead, and seem to have failed themselves."""
    for stop in (jetstream.kill, jetstream.pause):
        with pytest.raises(AssertionError, match="one of its own"):
            stop()


# One who keeps nothing


async def test_without_kept_groups_one_question_is_asked(scene: Scene) -> None:
    """On a server without JetStream, too. Nothing is made, and nothing fails."""
    async with scene_on() as without:
        for each in (without, scene):
            process = await each.process()
            assert await process.nats.agree("pachinko.history.rules", b"", 60.0) == b""
            assert process.nats._client.stats["out_msgs"] == 1
    assert (await scene.call("STREAM.NAMES"))["streams"] is None


async def test_without_jetstream_the_error_says_how_to_start_it() -> None:
    """Whether it is off for the server, or for the account."""
    async with scene_on() as scene:
        process = await scene.process()
        for call in (
            lambda: process.nats.agree("pachinko.history.rules", b"{}", 60.0),
            lambda: process.nats.keep(ROOM, b"{", LONG),
            lambda: process.past(ROOM, 1),
        ):
            with pytest.raises(PachinkoError, match="start it as nats-server -js -sd /var/lib"):
                await call()
    with pytest.raises(PachinkoError, match="start it as nats-server -js -sd /var/lib"):
        raise pachinko_cluster._refusal({"err_code": 10039}, "made a stream")


@pytest.mark.parametrize(
    ("publish", "subscribe", "is_enough"),
    [
        ([], [], False),
        (["$JS.API.>"], [], False),
        ([], ["_INBOX.>"], False),
        (["$JS.API.DIRECT.GET.>"], ["_INBOX.>"], False),
        (["$JS.API.>"], ["_INBOX.>"], True),
    ],
)
async def test_the_error_has_the_rights_that_are_needed(
    publish: list[str], subscribe: list[str], is_enough: bool, tmp_path: Path
) -> None:
    """It comes at once, each time, and also to those who only ask. What is kept is no leak."""
    rights = f"publish: {['pachinko.>', *publish]}, subscribe: {['pachinko.>', *subscribe]}"
    config = tmp_path / "nats.conf"
    config.write_text(
        'jetstream { store_dir: "store" }\nauthorization { users = [{ user: app, password: '
        f"password, permissions: {{ {rights} }} }}] }}".replace("'", '"')
    )
    async with scene_on("-c", str(config)) as scene:
        process = await scene.process(login="app:password@")
        if is_enough:
            assert await process.nats.agree("pachinko.history.rules", b"{}", 60.0) == b"{}"
            await process.keep("a")
            assert await process.texts() == ["a"]
            return
        for _ in range(2):
            with pytest.raises(PachinkoError, match=r"\$JS\.API\.>, and to subscribe to _INBOX\.>"):
                await process.nats.agree("pachinko.history.rules", b"{}", 60.0)
        with contextlib.suppress(PachinkoError):
            assert await process.nats.agree("pachinko.history.rules", b"", 60.0) == b""
        assert not process.nats._questions and not process.nats._refusals
        assert not process.lost.is_set()


# The stream


async def test_all_make_one_stream(scene: Scene) -> None:
    """However many want it at once, and whether it is agreed on, written or read first."""
    processes = [await scene.process() for _ in range(9)]
    rules = b'{"":[100,300.0,1000]}'
    calls: list[Callable[[int, Process], Awaitable[object]]] = [
        lambda _, each: each.nats.agree("pachinko.history.rules", rules, 60.0),
        lambda n, each: each.keep(n),
        lambda _, each: each.past(ROOM, 3),
    ]
    await asyncio.gather(*(calls[n % 3](n, each) for n, each in enumerate(processes)))
    pasts = await asyncio.gather(*(p.past(ROOM, 3) for p in processes))
    assert len({past.epoch for past in pasts}) == 1
    assert {*texts(pasts[0])} == {"1", "4", "7"}
    assert (await scene.call("STREAM.NAMES"))["streams"] == [STREAM]


async def test_who_is_overtaken_while_agreeing_takes_what_is_there(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has set its value after this one had found none."""
    other, key = await scene.process(), "pachinko.history.rules"
    ask, is_first = Nats._ask, True

    async def overtaken(
        self: Nats, subject: str, data: bytes = b"", *args: Any, **keys: Any
    ) -> Any:
        nonlocal is_first
        if is_first and data.endswith(b'{"a":1}'):
            is_first = False
            assert await other.nats.agree(key, b'{"b":2}', 60.0) == b'{"b":2}'
        return await ask(self, subject, data, *args, **keys)

    monkeypatch.setattr(Nats, "_ask", overtaken)
    process = await scene.process()
    assert await process.nats.agree(key, b'{"a":1}', 60.0) == b'{"b":2}'


async def test_namespaces_have_streams_of_their_own(scene: Scene) -> None:
    """With epochs, numbers and limits of their own, also if one name begins with the other."""
    process, other = await scene.process(), await scene.process()
    await process.keep("a", window=Window(1, 300.0, 100))
    for n in range(3):
        await other.keep(n, to="pachinko-kept.g.room")
    first, second = (
        await process.past(ROOM, 9),
        await other.past("pachinko-kept.g.room", 9),
    )
    assert (texts(first), texts(second)) == (["a"], ["0", "1", "2"])
    assert first.epoch != second.epoch


@pytest.mark.parametrize("name", ["", "a.b", "*", ">", "a b\r\n", "ä☃", "\ud800", "x" * 5000, "="])
async def test_a_group_may_have_any_name(scene: Scene, name: str) -> None:
    """A subject has no wildcards, so that no group gets what another one has."""
    subject, other = (subject_of("pachinko", Kind.GROUP, text) for text in (name, "other"))
    process = await scene.process(subject)
    await process.keep("other", to=other)
    await process.keep("a", to=subject)
    assert await process.texts(of=subject) == ["a"]
    await until(lambda: process.came)
    assert [data for _, _, data in process.came] == [b"{a"]


async def test_a_message_is_as_long_as_the_server_takes_it(scene: Scene) -> None:
    """It comes back from the feed and the past. A longer one is refused, and nothing ends."""
    process = await scene.process(ROOM)
    await process.nats.keep(ROOM, b"{" * 1_048_576, LONG)
    await until(lambda: process.came)
    assert len(process.came[0][2]) == 1_048_576
    assert [len(each.data) for each in (await process.past(ROOM, 1)).entries] == [1_048_576]
    with pytest.raises(PachinkoError, match="at most 1048576 bytes"):
        await process.nats.keep(ROOM, b"{" * 1_048_577, LONG)
    await process.keep("a")


async def test_what_others_publish_with_headers_has_no_stamp(scene: Scene) -> None:
    """Also if its headers are like those of a stream."""
    process = await scene.process(ROOM)
    forged = {"Nats-Subject": "a.b.c.d", "Nats-Sequence": "x", "Nats-Last-Sequence": "1"}
    async with scene.admin() as client:
        for headers in ({"a": "b"}, forged, {**forged, "Nats-Subject": "a"}):
            await client.publish(ROOM, b"{", headers=headers)
    await until(lambda: len(process.came) == 3)
    assert process.came == [(ROOM, None, b"{")] * 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"subjects": ["other.>"]}, {"subjects": ["pachinko.h.x.*"]}, {"republish": None},
        {"deny_purge": False}, {"deny_delete": False}, {"allow_direct": False},
        {"retention": "interest"},
    ],
)  # fmt: skip
async def test_a_stream_of_another_form_is_refused(scene: Scene, wrong: dict[str, Any]) -> None:
    """The error says which setting it is, and how to go on."""
    config = {**pachinko_cluster._settings_of("pachinko", "x"), "name": STREAM, **wrong}
    assert "error" not in await scene.call(f"STREAM.CREATE.{STREAM}", **config)
    process = await scene.process()
    [key] = wrong
    with pytest.raises(PachinkoError, match=rf"has {key} = .*nats stream rm {STREAM}"):
        await process.keep("a")
    await scene.delete()
    await process.keep("a")


async def test_other_settings_are_the_administrators(scene: Scene) -> None:
    """They stay when more is to be kept. Without a limit, there is always room."""
    process = await scene.process()
    await process.keep("a", window=Window(2, 1.0, 100))
    await scene.edit(description="ours", max_bytes=1_000_000)
    process.nats._jetstream.forget()
    await process.keep("b", window=Window(2, 9.0, 100))
    await process.keep("b", window=Window(9, 9.0, 100))
    config = (await scene.call(f"STREAM.INFO.{STREAM}"))["config"]
    assert (config["description"], config["max_bytes"]) == ("ours", 1_000_000)
    assert (config["max_msgs_per_subject"], config["max_age"]) == (10, 86_409 * 10**9)
    await scene.edit(max_msgs_per_subject=-1, max_age=0)
    process.nats._jetstream.forget()
    await process.keep("c", window=Window(99, 99.0, 100))
    config = (await scene.call(f"STREAM.INFO.{STREAM}"))["config"]
    assert (config["max_msgs_per_subject"], config["max_age"]) == (-1, 0)
    assert await process.texts() == [*"bbc"]  # Something before "a" may have been dropped.


async def test_a_stream_is_used_when_it_takes_messages(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server describes it before that, to other processes."""
    is_active, answers = pachinko_cluster.JetStream._is_active, [False, False]

    async def not_yet(self: Any, *args: Any) -> bool:
        return answers.pop() if answers else await is_active(self, *args)

    monkeypatch.setattr(pachinko_cluster.JetStream, "_is_active", not_yet)
    process = await scene.process()
    await process.keep("a")
    assert await process.texts() == ["a"] and not answers


async def test_another_stream_may_have_the_subjects(scene: Scene) -> None:
    """Ours cannot be made then, and the error says why."""
    await scene.call("STREAM.CREATE.other", name="other", subjects=["pachinko.>"])
    process = await scene.process()
    with pytest.raises(PachinkoError, match="another stream has subjects of this namespace"):
        await process.keep("a")


async def test_a_full_storage_is_told(tmp_path: Path) -> None:
    """Nothing is dropped silently, and what is stored can still be read."""
    config = tmp_path / "nats.conf"
    config.write_text('jetstream { store_dir: "store", max_file_store: 100000 }')
    async with scene_on("-c", str(config)) as scene:
        process = await scene.process()
        await process.keep("a")
        with pytest.raises(PachinkoError, match="the storage is full"):
            await process.keep(*["x" * 40_000] * 10)
        process.nats._jetstream.forget()  # So the next mark is stored, if it can be.
        assert (await process.texts())[0] == "a"


def test_a_cluster_without_a_leader_is_away() -> None:
    """The link tries again, as with any lost connection."""
    error = {"err_code": 10008, "description": "JetStream system temporarily unavailable"}
    assert type(pachinko_cluster._refusal(error, "made a stream")) is ConnectionError


# What is missing, and what is not


def known(past: Past, numbers: Sequence[int]) -> list[int]:
    """Check that a past has all above its floor; return the numbers in it."""
    found = [entry.number for entry in past.entries]
    assert [number for number in numbers if number > past.floor] == found
    return found


async def test_messages_that_begin_to_be_dropped_later_are_told(scene: Scene) -> None:
    """When more are kept from now on, what was dropped before is still missing."""
    process = await scene.process(ROOM)
    await process.keep(*range(6), window=Window(2, 300.0, 1000))
    await process.keep("a", to="pachinko.g.other", window=Window(2, 300.0, 1000))
    assert (await process.past("pachinko.g.other", 9)).floor == 0  # nothing of it is missing
    await process.keep(6, 7, window=Window(9, 300.0, 1000))
    await until(lambda: len(process.came) == 8)
    numbers = [stamp.number for stamp in process.stamps()]
    past = await process.past(ROOM, 9)
    assert known(past, numbers) == numbers[4:] and past.floor == numbers[3]
    await process.keep(*range(8, 20), window=Window(9, 300.0, 1000))
    await until(lambda: len(process.came) == 20)
    numbers = [stamp.number for stamp in process.stamps()]
    assert known(await process.past(ROOM, 9), numbers) == numbers[-9:]


async def test_a_busy_group_does_not_make_a_quiet_one_look_forgotten(scene: Scene) -> None:
    """Its clients go on, although the first message of the stream is a later one."""
    process, window = await scene.process(), Window(2, 300.0, 1000)
    before = await process.past("pachinko.g.quiet", 9)
    await process.keep(*range(9), window=window)
    await process.keep("a", to="pachinko.g.quiet", window=window)
    past = await process.past("pachinko.g.quiet", 9)
    assert (texts(past), past.floor <= before.top) == (["a"], True)


async def test_fewer_messages_are_kept_if_rules_say_so_and_a_new_stream_is_made(
    scene: Scene,
) -> None:
    """Until then a stream keeps what it kept. Each rule's values count, not those of one."""
    process = await scene.process()
    rules = b'{"a":[7,10.0,1],"b":[3,20.0,1]}'
    assert await process.nats.agree("pachinko.history.rules", rules, 60.0) == rules
    config = (await scene.call(f"STREAM.INFO.{STREAM}"))["config"]
    assert (config["max_msgs_per_subject"], config["max_age"]) == (8, 86_420 * 10**9)


async def test_what_all_groups_together_lose_is_told(scene: Scene) -> None:
    """If an administrator bounds the stream, the oldest of any group go first."""
    process = await scene.process(ROOM)
    await process.keep("a", to="pachinko.g.quiet")
    await process.keep(*range(9))
    await until(lambda: len(process.came) == 9)
    await scene.edit(max_msgs=5)
    numbers = [stamp.number for stamp in process.stamps()]
    past = await process.past(ROOM, 9)
    assert known(past, numbers) == numbers[4:] and past.floor == numbers[3]
    quiet = await process.past("pachinko.g.quiet", 9)
    assert (texts(quiet), quiet.floor, quiet.top) == ([], numbers[3], numbers[8])


async def test_a_stream_cannot_be_purged(scene: Scene) -> None:
    """Nor can a message be deleted: nobody could tell what is missing then."""
    process = await scene.process()
    await process.keep("a", "b")
    assert "error" in await scene.call(f"STREAM.PURGE.{STREAM}")
    assert "error" in await scene.call(f"STREAM.MSG.DELETE.{STREAM}", seq=1)
    assert await process.texts() == ["a", "b"]


@pytest.mark.parametrize("messages", [3, 100])
async def test_only_what_is_behind_a_number_is_read(scene: Scene, messages: int) -> None:
    """If nothing behind it was dropped, it is the floor."""
    process = await scene.process(ROOM)
    window = Window(messages, 300.0, 1000)
    await process.keep("a", to="pachinko.g.other", window=window)
    before = await process.past(ROOM, 9)
    for n in range(6):
        await process.keep(n, window=window)
        await process.keep(n, to="pachinko.g.other", window=window)
    await until(lambda: len(process.came) == 6)
    numbers = [stamp.number for stamp in process.stamps()]
    for n, after in enumerate(numbers):
        past = await process.past(ROOM, 9, Position(before.epoch, after))
        dropped = messages == 3 and n < 2
        assert past.floor == (numbers[2] if dropped else after)
        assert known(past, numbers) == numbers[3 if dropped else n + 1 :]
        assert past.top >= numbers[-1]
    idle = await process.past(ROOM, 9, Position(before.epoch, before.top))
    assert idle.floor == (numbers[2] if messages == 3 else before.top)
    other = await process.past(ROOM, 9, Position("other", 10**9))
    assert known(other, numbers) == numbers[3 if messages == 3 else 0 :]
    for after in (numbers[-1] + 1, 10**9):  # Another process may give the one, and none the other.
        past = await process.past(ROOM, 9, Position(before.epoch, after))
        assert (past.top, past.floor, past.entries) == (numbers[-1] + 1, numbers[-1] + 1, [])
        empty = await process.past("pachinko.g.empty", 9, Position(past.epoch, after))
        assert empty.floor == empty.top and not empty.entries


@pytest.mark.parametrize("after", [0, 2, 4])
async def test_what_is_dropped_while_it_is_read_is_told(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """A server that sends one message at a time leaves more time for that."""
    process, window = await scene.process(ROOM), Window(3, 300.0, 1000)
    await process.keep(*range(6), window=window)
    await until(lambda: len(process.came) == 6)
    at = Position(process.stamps()[0].epoch, process.stamps()[after].number)
    read, is_first = pachinko_cluster.JetStream._messages, True

    async def late(self: Any, stream: Any, kept: str, start: int, top: int) -> Any:
        nonlocal is_first
        if not is_first:
            return await read(self, stream, kept, start, top)
        is_first = False
        await process.keep(6, 7, window=window)
        return [each for each in await read(self, stream, kept, start, top) if each.number <= top]

    monkeypatch.setattr(pachinko_cluster.JetStream, "_messages", late)
    past = await process.past(ROOM, 9, at)
    await until(lambda: len(process.came) == 8)
    numbers = [stamp.number for stamp in process.stamps()]
    assert known(past, [number for number in numbers if number <= past.top])


async def test_a_long_past_is_read_in_parts(scene: Scene) -> None:
    """The server sends a mebibyte for a question."""
    process = await scene.process()
    for n in range(30):
        await process.keep(f"{n}" * 100_000)
    assert [text[: len(f"{n}")] for n, text in enumerate(await process.texts())] == [
        f"{n}" for n in range(30)
    ]


async def test_an_older_server_sends_one_message_at_a_time(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NATS 2.10 does not know ``batch``, and says nothing of what is pending."""
    ask, asked = Nats._ask, 0

    async def without_batch(self: Nats, subject: str, data: bytes = b"", *args: Any, **keys: Any):
        nonlocal asked
        if b'"batch"' in data:
            asked += 1
            data = json.dumps(
                {k: v for k, v in json.loads(data).items() if k in ("seq", "next_by_subj")}
            ).encode()
        return await ask(self, subject, data, *args, **keys)

    monkeypatch.setattr(Nats, "_ask", without_batch)
    process = await scene.process()
    await process.keep(*"abc")
    assert await process.texts() == [*"abc"]
    assert asked == 3


async def test_what_comes_before_an_answer_is_delivered_before_it(scene: Scene) -> None:
    """So the top of a past is known to be delivered, however slow that is."""
    process, sender = Process(scene.broker), await scene.process()
    scene.processes.append(process)
    deliver = process.deliver

    async def slowly(subject: str, data: bytes) -> None:
        await asyncio.sleep(0.01)  # the slowness of this process
        await deliver(subject, data)

    process.deliver = slowly  # type: ignore[method-assign]  # as a slow process does
    await process.start(ROOM)
    for n in range(3):
        await sender.keep(*range(5))
        past = await process.past(ROOM, n)
        assert process.stamps()[-1].number == past.top
        assert len(process.came) == 5 * (n + 1)


# A stream that is gone


async def test_a_deleted_stream_is_made_anew(scene: Scene) -> None:
    """With another epoch, which all see; senders keep their order, and nothing is lost."""
    process, other = await scene.process(ROOM), await scene.process(ROOM)
    await process.keep("old")
    old = await other.past(ROOM, 9)
    await scene.delete()
    await asyncio.gather(*(process.keep(n) for n in range(20)))
    await until(lambda: len(other.came) == 21)
    assert [data for _, _, data in other.came[1:]] == [b"{%d" % n for n in range(20)]
    [epoch] = {stamp.epoch for stamp in other.stamps()[1:]}
    assert epoch != old.epoch
    past = await other.past(ROOM, 99)
    assert (past.epoch, len(past.entries), past.floor) == (epoch, 20, 0)
    await other.keep("by the other one")


async def test_a_reader_makes_a_stream_that_is_gone(scene: Scene) -> None:
    """A client that comes back has to hear of the new epoch, though nobody sends anything."""
    process = await scene.process()
    await process.keep("old")
    old = await process.past(ROOM, 9)
    for count in (0, 9):
        await scene.delete()
        past = await process.past(ROOM, count)
        assert past.epoch != old.epoch and past.top < 2 and not past.entries
        old = past


async def test_a_stream_that_another_process_has_made_anew_is_read(scene: Scene) -> None:
    """Its messages are those of the new epoch, also if it is as long as the old one."""
    process, other = await scene.process(), await scene.process()
    await process.keep("old")
    assert await other.texts() == ["old"]
    for count in (0, 9):
        await scene.delete()
        await process.keep("new")
        past = await other.past(ROOM, count)
        assert past.epoch == (await process.past(ROOM, 9)).epoch
        assert texts(past) == ["new"] * (count > 0)
        await other.keep("more")


async def test_a_stream_that_begins_with_messages_of_a_deleted_one_is_made_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NATS may remove files late. A process that knows the old stream would think it is there."""
    call, epochs = pachinko_cluster.JetStream._call, list[str]()

    async def with_old_files(self: Any, what: str, wanted: Any, expected: int) -> Any:
        answer = await call(self, what, wanted, expected)
        if what.startswith("STREAM.CREATE"):
            epochs.append(wanted["subjects"][0].split(".")[2])
            answer["state"]["messages"] += len(epochs) == 1
        return answer

    monkeypatch.setattr(pachinko_cluster.JetStream, "_call", with_old_files)
    process = await scene.process()
    await process.keep("a")
    past = await process.past(ROOM, 9)
    assert texts(past) == ["a"] and past.epoch == epochs[-1] != epochs[0]


async def test_a_listener_to_everything_does_not_hide_that_the_stream_is_gone(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NATS then does not say that nobody stores a message. The first one times out."""
    process = await scene.process()
    await process.keep("old")
    async with scene.admin() as client:
        await client.subscribe("pachinko.>")
        await client.flush()
        await scene.delete()
        monkeypatch.setattr(pachinko_cluster, "_JS_PATIENCE", 0.2)
        with pytest.raises(TimeoutError):
            await process.keep("lost")
        monkeypatch.setattr(pachinko_cluster, "_JS_PATIENCE", PATIENCE)
        await process.keep("new")
        assert await process.texts() == ["new"]


async def test_a_stream_may_go_while_it_is_read(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader begins anew."""
    process = await scene.process()
    await process.keep("old")
    describe, times = pachinko_cluster.JetStream._describe, 1

    async def then_delete(self: Any, namespace: str, subject: str = "") -> Any:
        nonlocal times
        described = await describe(self, namespace, subject)
        if subject and times:
            times -= 1
            await scene.delete()
        return described

    monkeypatch.setattr(pachinko_cluster.JetStream, "_describe", then_delete)
    assert await process.texts() == []
    await process.keep("new")
    assert await process.texts() == ["new"]


async def test_a_stream_that_goes_again_and_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is an error as of a lost server."""

    async def gone(*_: object) -> None:
        raise StreamGone

    monkeypatch.setattr(pachinko_cluster.JetStream, "_read", gone)
    process = await scene.process()
    with pytest.raises(StreamGone):
        await process.texts()


@pytest.mark.parametrize("replicas", [1, 3])
async def test_a_late_replica_hides_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, replicas: int
) -> None:
    """What it has is the top. A stream that is alone has all, and a top that stays good longer."""
    describe = pachinko_cluster.JetStream._describe

    async def replicated(self: Any, *args: Any) -> Any:
        described = await describe(self, *args)
        if described is not None:
            described.config["num_replicas"] = replicas
        return described

    process = await scene.process()
    await process.keep("a")
    await process.keep("b", to="pachinko.g.other")
    monkeypatch.setattr(pachinko_cluster.JetStream, "_describe", replicated)
    past = await process.past(ROOM, 9)
    top = past.entries[-1].number
    assert past.top == top + (replicas == 1)
    empty = await process.past("pachinko.g.empty", 9)
    assert empty.top == top + 1


async def test_a_late_replica_is_read_again(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replica of a stream may answer a read; one may not have the latest messages yet."""
    process = await scene.process()
    await process.keep(*"abc")
    read, reads = pachinko_cluster.JetStream._messages, 0

    async def late(self: Any, *args: Any) -> Any:
        nonlocal reads
        reads += 1
        return (await read(self, *args))[: 1 if reads == 1 else None]

    monkeypatch.setattr(pachinko_cluster.JetStream, "_messages", late)
    assert await process.texts() == [*"abc"]
    assert reads == 2


@pytest.mark.parametrize("is_empty", [False, True])
async def test_a_server_that_was_killed(own_scene: Scene, is_empty: bool) -> None:
    """With its store, positions stay good. With an empty one, there is a new epoch."""
    broker = own_scene.broker
    process = await own_scene.process(ROOM)
    await process.keep(*"ab")
    before = await process.past(ROOM, 9)
    broker.kill()
    await asyncio.wait_for(process.lost.wait(), PATIENCE)
    await process.stop()
    if is_empty:
        shutil.rmtree(Path(broker.folder.name) / "store")
    await broker.start()
    await process.start(ROOM)
    past = await process.past(ROOM, 9)
    assert (past.epoch == before.epoch) is not is_empty
    assert texts(past) == ([] if is_empty else [*"ab"])
    await process.keep("c")
    assert await process.texts() == [*("" if is_empty else "ab"), "c"]


@pytest.mark.parametrize("has_read", [False, True])
async def test_a_server_that_has_lost_the_latest_messages(own_scene: Scene, has_read: bool) -> None:
    """After a power cut, or with a backup, numbers would come again. Then there is a new epoch."""
    broker = own_scene.broker
    process, sender = await own_scene.process(ROOM), await own_scene.process()
    await sender.keep(*"ab")
    before = await sender.past(ROOM, 9)
    await until(lambda: len(process.came) == 2)  # A killed server no longer sends them.
    store = Path(broker.folder.name) / "store"
    broker.kill()
    shutil.copytree(store, store.with_name("backup"))
    await broker.start()
    for each in (process, sender):
        await each.stop()
        await each.start(ROOM)
    await sender.keep("c")
    await until(lambda: len(process.came) == 3)
    broker.kill()
    shutil.rmtree(store)
    shutil.move(store.with_name("backup"), store)
    await broker.start()
    who = process if has_read else sender
    await who.stop()
    await who.start(ROOM)
    past = await who.past(ROOM, 9)
    assert (past.epoch != before.epoch, texts(past)) == (True, [])


# Apps


def app_on(url: str, *, keeps: bool = True) -> tuple[falcon.asgi.App[Any, Any], Hub]:
    app, hub = new_app(), Hub()
    hub.configure(url)
    if keeps:
        hub.keep("room:")
    ws = Pachinko(app, "/ws", hub=hub)

    @ws.connect
    async def arrive(conn: Connection) -> None:
        await conn.join("room:a")

    return app, hub


async def test_an_app_that_keeps_groups_does_not_start_without_jetstream() -> None:
    """It says what is missing. An app that keeps nothing starts on any server."""
    async with running("nats") as broker:
        answer = await startup(app_on(broker.url)[0])
        assert answer["type"] == "lifespan.startup.failed"
        assert "start it as nats-server -js" in answer["message"]
        answer = await startup(app_on(broker.url, keeps=False)[0])
        assert answer["type"] == "lifespan.startup.complete"


async def test_a_client_goes_on_in_another_process() -> None:
    """After an outage of the first one, and a message by a program without clients."""
    async with running("nats", "-js", "-sd", "store") as broker, Proxy(broker.port) as network:
        (one, _), (two, hub) = app_on(network.url("nats")), app_on(broker.url)
        async with serving(one) as first, serving(two) as second:
            ask = falcon.to_query_str({"resume": "{}"})
            async with connect(f"{first.url}/ws{ask}") as ada, connect(f"{second.url}/ws") as bob:
                assert (await ada.receive())["type"] == "resume"
                await hub.send("room:a", "said", 1)
                assert (await bob.receive())["payload"] == 1
                at = (await ada.receive())["at"]
                network.cut()
                async with Hub().open(broker.url) as program:
                    for n in (2, 3):
                        await program.send("room:a", "said", n)
                got = [(await ada.receive())["payload"] for _ in range(3)]
                got.remove({"group": None})  # Messages to all may be missing.
                assert got == [2, 3]
            ask = falcon.to_query_str({"resume": json.dumps({"groups": {"room:a": at}})})
            async with connect(f"{second.url}/ws{ask}") as ada:
                assert [(await ada.receive())["payload"] for _ in range(2)] == [2, 3]
                assert (await ada.receive())["payload"]["replayed"] == 2
            kept = [each.payload async for each in hub.history("room:a", last=2)]
            assert kept == [2, 3]


# Questions


async def test_a_lost_connection_ends_all_questions(own_scene: Scene) -> None:
    """At once. None is left behind, and what comes later for one that was given up is ignored."""
    broker, process = own_scene.broker, await own_scene.process()
    await process.keep("a")
    broker.pause()
    calls = [asyncio.ensure_future(call) for call in (process.keep("b"), process.texts())]
    given_up = asyncio.ensure_future(process.keep("c"))
    await until(lambda: len(process.nats._questions) == 3)
    given_up.cancel()
    await until(given_up.done)
    broker.resume()
    await calls[0]
    await calls[1]
    assert await process.texts() == [*"abc"]
    broker.pause()
    calls = [asyncio.ensure_future(call) for call in (process.keep("d"), process.texts())]
    await until(lambda: len(process.nats._questions) == 2)
    await process.stop()
    for call in calls:
        with pytest.raises(ConnectionError):
            await call
    assert not process.nats._questions


@pytest.mark.parametrize("call", ["keep", "past", "agree", "publish"])
async def test_a_lost_connection_ends_what_waits_for_a_round_trip(
    own_scene: Scene, call: str
) -> None:
    """With an error: nobody has cancelled the caller. A first question opens the inbox."""
    process = await own_scene.process()
    own_scene.broker.pause()
    given: dict[str, tuple[Any, ...]] = {
        "keep": (ROOM, b"{", LONG), "past": (ROOM, 1), "publish": (ROOM, b"{"),
        "agree": ("pachinko.history.rules", b"", 60.0),
    }  # fmt: skip
    calls = [asyncio.ensure_future(getattr(process.nats, call)(*given[call])) for _ in range(2)]
    await until(lambda: process.nats._round_trips and not process.nats._round_trip)
    await process.stop()
    await until(lambda: all(each.done() for each in calls))
    for each in calls:
        with pytest.raises(ConnectionError):
            await each


def test_a_question_ends_once() -> None:
    """Whatever comes after that."""

    async def end() -> list[Any]:
        question = pachinko_cluster.Question("a", is_batch=False)
        question.end()
        question.end(ConnectionError())
        return await question.answer

    assert asyncio.run(end()) == []


def test_headers_are_read() -> None:
    """With a status, or without one."""
    read = pachinko_cluster.read_headers
    assert read(b"") == ("", {})
    assert read(b"NATS/1.0\r\nA: b: c\r\nempty\r\n\r\n") == ("", {"A": "b: c"})
    assert read(b"NATS/1.0 503\r\n\r\n") == ("503", {})
    assert read(b"NATS/1.0 204 EOB\r\nNats-Num-Pending: 0\r\n\r\n") == (
        "204",
        {"Nats-Num-Pending": "0"},
    )


# The page


def test_the_page_has_the_rights() -> None:
    """And how to start the server."""
    page = (Path(__file__).parent.parent / "docs/cluster.md").read_text()
    assert re.search(r"kept groups[^.]*`\$JS\.API\.>`[^.]*`_INBOX\.>`", page)
    assert "nats-server -js -sd" in page and f"`{STREAM}`" in page
