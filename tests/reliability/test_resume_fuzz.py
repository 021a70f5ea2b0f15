"""What a client sends to resume may be anything: it is answered by the rules, and harms nothing.

The model is short. A value is an object, or it is ``{}``. Of its ``groups``, an object, a text that
is a position of this hub is one; anything else beside a group's name is none of ours. Each join of
a kept group has one verdict: after a first join nothing, after a position what was sent behind it.

``PACHINKO_FAULT_EXAMPLES=20000`` is the nightly form, with other examples each time.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
from typing import Any
from urllib.parse import quote, urlencode

import falcon.asgi
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pachinko
from pachinko import Connection, Hub, Pachinko, simulate

EXAMPLES = int(os.environ.get("PACHINKO_FAULT_EXAMPLES", "40")) * 2
IS_NIGHTLY = "PACHINKO_FAULT_EXAMPLES" in os.environ
ROUND = 2_500  # examples of one test, which pytest ends after two minutes
KEPT = ("room:a", "room:b", "room:\N{SNOWMAN}")
SENT = 5  # messages to each, before a client comes
CHARACTERS = 2_000  # of ``?resume=``

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = st.integers() | st.sampled_from([0, -1, 2**31, 2**53, 2**63, 2**64, 10**400])
scalars = (
    st.none() | st.booleans() | numbers | st.floats(allow_nan=False, allow_infinity=False) | texts
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
# "{epoch}" is that of the hub, and "{n}" a number of the message that is the nth of the group.
positions = (
    st.integers(-1, SENT - 1).map(lambda n: ("of message", n))
    | st.sampled_from([
        "", ".", "..", "{epoch}", "{epoch}.", "{epoch}.-1", "{epoch}.+1", "{epoch}. 1",
        "{epoch}.1e2",
        "{epoch}.1_0", "{epoch}.\N{ARABIC-INDIC DIGIT ONE}", "{epoch}.\N{SUPERSCRIPT TWO}",
        "{epoch}.99999", "{epoch}." + "9" * 150, "{epoch}." + "9" * 4400, "{epoch}.0x1", ".1",
        "x.1", "{epoch}.{epoch}.1", "\0.1", "{epoch}.1\0", "\N{SNOWMAN}.1", "{epoch}.1\n",
        " {epoch}.1",
    ])
    | anything
)  # fmt: skip
names = st.sampled_from(KEPT) | st.sampled_from(["other", "", "room:", "room:a\0"]) | texts
groups = st.dictionaries(names, positions, max_size=6) | anything
ids = st.lists(texts | st.just("{id}") | anything, max_size=20) | anything
objects = st.fixed_dictionaries({}, optional={"groups": groups, "ids": ids, "more": anything})
values = objects | anything
ODD = (  # which is no JSON, or no text that a query can have
    "", "{", "nul", "[" * 100_000, '{"groups":' * 900, "{}{}", "\ufeff{}", "{'groups':1}",
    '{"a":NaN}',
    '{"groups":{"room:a":"\\ud800"}}', '{"groups":{"\\ud800":"a.1"}}', '{"groups":{},"groups":[]}',
    "%", "%zz", "message ", "Message", "null", "true", '"message"', "{}" + " " * 1_998,
    "{}" + " " * 1_999, "1" * 1_999, "1e999", "-", "\0",
)  # fmt: skip


def make_app(hub: Hub, seen: list[Any], url: str | None) -> falcon.asgi.App[Any, Any]:
    app = falcon.asgi.App()
    hub.configure(url)
    hub.keep("room:", messages=100)
    ws = Pachinko(app, "/ws", hub=hub, auth_timeout=1000.0)
    members = Pachinko(app, "/members", hub=hub, auth_timeout=1000.0)

    @ws.authenticate(optional=True)
    @members.authenticate
    async def who(conn: Connection, token: str | None) -> str | None:
        return token

    @ws.connect
    @members.connect
    async def arrive(conn: Connection) -> None:
        for group in (*KEPT, "other"):
            await conn.join(group)

    @ws.middleware
    @members.middleware
    async def around(conn: Connection, message: Any, call_next: Any) -> Any:
        seen.append(message)
        return await call_next()

    @ws.on("echo")
    @members.on("echo")
    async def echo(conn: Connection, payload: Any) -> Any:
        return payload

    return app


def filled(value: Any, epoch: str, numbers: list[int]) -> Any:
    """Put the hub's epoch and numbers in for what stands for them."""
    if isinstance(value, str):
        return value.replace("{epoch}", epoch)
    if isinstance(value, tuple):  # the position behind the nth message, or before the first
        return f"{epoch}.{numbers[value[1]] if value[1] >= 0 else 0}"
    if isinstance(value, list):
        return [filled(each, epoch, numbers) for each in value]
    if isinstance(value, dict):
        return {filled(k, epoch, []): filled(v, epoch, numbers) for k, v in value.items()}
    return value


def expected(
    value: Any, group: str, epoch: str, known: dict[int, int], top: int
) -> tuple[list[int], str]:
    """What a client with *value* gets of *group*: messages, and a verdict or its reason.

    *known*: the messages by their numbers in the count of all groups.
    """
    groups = value.get("groups") if isinstance(value, dict) else None
    if not isinstance(groups, dict) or group not in groups:
        return [], "resume"
    at = groups[group]
    if not isinstance(at, str) or len(at) > 200:  # longer than any of ours
        return [], "epoch"
    its_epoch, _, number = at.rpartition(".")
    if its_epoch != epoch or not (number.isascii() and number.isdecimal()):
        return [], "epoch"
    if int(number) > top:
        return [], "epoch"
    return [n for at, n in sorted(known.items()) if at > int(number)], "resume"


async def play(resumes: list[tuple[str, Any]], url: str | None) -> None:
    """Let clients come with *resumes*, and check what each of them gets."""
    hub, seen = Hub(), list[Any]()
    async with simulate(make_app(hub, seen, url)) as sim:
        numbers = dict[str, dict[int, int]]({group: {} for group in KEPT})
        count = 0
        for n in range(SENT):
            for group in KEPT:
                await hub.send(group, "said", n)
                count += 1
                numbers[group][count] = n
        epoch = (await hub.position(KEPT[0])).rpartition(".")[0]
        for how, template in resumes:
            value = template
            if how != "text":
                own = {g: sorted(numbers[g]) for g in KEPT}
                value = filled(template, epoch, own[KEPT[0]])
                if isinstance(value, dict) and isinstance(value.get("groups"), dict):
                    raw = template["groups"]
                    value["groups"] = {
                        filled(g, epoch, []): filled(at, epoch, own.get(g, own[KEPT[0]]))
                        for g, at in raw.items()
                    }
            text = value if how == "text" else json.dumps(value)
            announced = how in ("message", "bare message", "authenticate")
            query = urlencode({"resume": "message" if announced else text}, errors="replace")
            if how == "text" and text.startswith("%"):
                query = f"resume={text}"
            elif how == "comma":  # Some clients do not encode it.
                query = "a=1&resume=" + quote(text, safe=',:{}[]"') + "&b=2"
            is_first = how == "first message"
            path, query = ("/members", "") if is_first else ("/ws", query)
            client = await sim.connect(path, query=query)
            if announced or is_first:
                await sim.settle()
                assert client.received == [], "a verdict before the message"
                frame = {"type": "resume", "payload": value}
                if how == "message":
                    frame["id"] = 7
                elif how in ("authenticate", "first message"):
                    payload = {"token": "ada", "resume": value}
                    frame = {"type": "authenticate", "payload": payload}
                await client.send_text(json.dumps(frame))
            assert await client.request("echo", text[:50]) == text[:50]
            await sim.settle()
            # In memory a position is good for all groups, on a broker up to the latest message.
            tops = {g: count if url is not None else max(numbers[g]) for g in KEPT}
            check(client, how, value, epoch, numbers, tops)
            assert not any("resume" in repr(each)[:30] for each in seen), "a middleware saw it"
            client.cut()
        await sim.settle()
        history = hub.state.history
        assert history is not None
        kept = [history._resumes, history._timers, history._contexts, history._waiting]
        assert not any(kept) and not hub.state.returning, "something is left of a client"
        assert not hub.connections and not hub.state.registry.groups


def check(
    client: pachinko.Client, how: str, value: Any, epoch: str, numbers: dict[str, dict[int, int]],
    tops: dict[str, int],
) -> None:  # fmt: skip
    assert client.end is None, client.end
    if how == "text":
        value = read(value)
    elif how in ("query", "comma") and len(json.dumps(value)) > CHARACTERS:
        value = {}
    replies = [each for each in client.received if each.group is None]
    assert [(each.type, each.id) for each in replies] == (
        [("resume.reply", 7)] if how == "message" else []
    )
    for group in KEPT:
        frames = [each for each in client.received if each.group == group]
        messages, verdict = expected(value, group, epoch, numbers[group], tops[group])
        assert [each.payload for each in frames[:-1]] == messages, (group, frames)
        last = frames[-1]
        assert last.at == f"{epoch}.{tops[group]}", last
        if verdict == "resume":
            wanted: dict[str, Any] = {"replayed": len(messages), "id": client.conn.id}
            assert (last.type, last.payload) == ("resume", wanted)
        else:
            wanted = {"group": group, "reason": verdict, "id": client.conn.id}
            assert (last.type, last.payload) == ("gap", wanted)
    assert not [each for each in client.received if each.group == "other"]


def read(text: str) -> Any:
    """What a text in the query stands for: here, none is an object that names a group."""
    return {}


def options(count: int) -> Any:
    return settings(
        max_examples=min(count, ROUND), deadline=None, derandomize=not IS_NIGHTLY, database=None,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip


def bugs(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


@pytest.mark.parametrize("url", ["memory://", None], ids=["memory", "a broker"])
@pytest.mark.parametrize("round", range(-(-EXAMPLES // ROUND)))
def test_whatever_comes_to_resume_is_answered_by_the_rules(
    round: int, url: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """In the query, and in a message: no failure, no log, no reply that is wrong, nothing left."""
    hows = st.sampled_from([
        "query", "comma", "message", "bare message", "authenticate", "first message",
    ])  # fmt: skip

    @options(EXAMPLES)
    @given(st.lists(st.tuples(hows, values), min_size=1, max_size=4))
    def run(resumes: list[tuple[str, Any]]) -> None:
        asyncio.run(play(resumes, url))

    run()
    gc.collect()
    assert not bugs(caplog)


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_a_query_that_is_no_object_is_a_first_join(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Broken JSON, other JSON, what is too long or too deep: as if it were ``{}``."""
    asyncio.run(play([("text", text)], "memory://"))
    assert not bugs(caplog)
