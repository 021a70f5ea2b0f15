"""How pachinko.js goes on after a cut or a reload: positions, ids, streams, and what it stores.

The server is a script, so that each test decides what the client sees.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from javascript import InBrowser, InNode, Script
from test_client_js import HELD, Js, begin, resume_of

pytestmark = pytest.mark.asyncio(loop_scope="session")

# What is stored, as JSON.
STORED = "() => JSON.parse(Object.values(kept.items)[0])"


async def again(js: Js, script: Script, peer: Any) -> Any:
    """Cut the connection, and return the server's side of the next one."""
    peer.cut()
    await js.run("async () => { await until(() => c.state !== 'open'); c.retry(); }")
    return await script.accept()


async def heard(js: Js, count: int) -> Any:
    """What the client has noted, without its states, once it is as much."""
    code = "(n) => { const heard = () => c.log.filter(([type]) => type !== '$state');" \
        " return until(() => heard().length >= n).then(heard); }"  # fmt: skip
    return await js.run(code, count)


async def test_a_position_a_group_is_given_back(js: Js, script: Script) -> None:
    """The latest of each group, whatever the message; messages without one change nothing."""
    await begin(js, script)
    await js.run("() => { log(c, 'a', 'resume'); }")
    peer = await script.accept()
    assert resume_of(peer.path) == {}
    await peer.send("resume", {"replayed": 0, "id": "one"}, group="g", at="e.4")
    await peer.send("a", 1, group="g", at="e.9")
    await peer.send("a", 2, group="h", at="e.7")
    await peer.send("a", 3, group="not kept")
    await peer.send("a", 4)
    assert len(await heard(js, 5)) == 5
    peer = await again(js, script, peer)
    assert resume_of(peer.path) == {"groups": {"g": "e.9", "h": "e.7"}, "ids": ["one"]}


async def test_what_came_before_a_gap_counts_for_nothing(js: Js, script: Script) -> None:
    """A gap has the position to go on from; without one, the group has none until its state."""
    await begin(js, script)
    await js.run("() => { log(c, 'a', 'gap', 'state'); }")
    peer = await script.accept()
    for group in ("g", "h"):
        await peer.send("a", 1, group=group, at="e.9")
        at = {"at": "f.2"} if group == "g" else {}
        gap = {"group": group, "reason": "epoch", "id": "one"}
        await peer.send("gap", gap, group=group, **at)
    assert (await heard(js, 4))[-1] == ["gap", gap]
    peer = await again(js, script, peer)
    assert resume_of(peer.path) == {"groups": {"g": "f.2"}, "ids": ["one"]}
    await peer.send("state", [], group="h", at="f.5")
    await heard(js, 5)
    peer = await again(js, script, peer)
    assert resume_of(peer.path)["groups"] == {"g": "f.2", "h": "f.5"}


async def test_a_client_remembers_its_last_sixteen_ids(js: Js, script: Script) -> None:
    """Each once, the latest last."""
    await begin(js, script)
    await js.run("() => { log(c, 'resume'); }")
    peer = await script.accept()
    for n in (*range(20), 19):
        await peer.send("resume", {"replayed": 0, "id": f"id{n}"}, group="g", at="e.1")
    await heard(js, 21)
    peer = await again(js, script, peer)
    assert resume_of(peer.path)["ids"] == [f"id{n}" for n in range(4, 20)]


@pytest.mark.parametrize("name", ["ü" * 700, 'room:"' * 400, "room:" * 400])
async def test_a_long_position_goes_in_a_message(js: Js, script: Script, name: str) -> None:
    """The first one; then comes what was waiting."""
    await begin(js, script, json.dumps({"resume": {name: "e.1"}}))
    await js.run("() => { c.send('next'); }")
    peer = await script.accept()
    assert peer.path == "/ws?resume=message"
    groups = {"groups": {name: "e.1"}}
    assert await peer.receive() == {"type": "resume", "payload": groups}
    assert await peer.receive() == {"type": "next"}


async def test_who_does_not_resume_says_nothing_of_it(js: Js, script: Script) -> None:
    """No query, no position, nothing stored."""
    await begin(js, script, "{resume: false, token: 's3cret', storage: kept}")
    peer = await script.accept()
    assert peer.path == "/ws"
    asked = await peer.receive()
    assert asked["payload"] == {"token": "s3cret"}
    await peer.send("authenticate.reply", id=asked["id"])
    await js.run("() => { log(c, 'a'); }")
    await peer.send("a", 1, group="g", at="e.9")
    await heard(js, 1)
    peer = await again(js, script, peer)
    assert peer.path == "/ws"
    assert await js.run("() => kept.items") == {}


async def test_a_query_of_the_address_stays(js: Js, script: Script) -> None:
    """The client adds its own behind it."""
    await js.load(script.url)
    await js.run("(url) => { connect(url + '/ws?room=a%20b#top'); }", script.url)
    assert (await script.accept()).path == "/ws?room=a+b&resume=%7B%7D"


async def test_positions_begin_where_the_page_does(js: Js, script: Script) -> None:
    """Those that are given count more than those that are stored."""
    text = '{"groups":{"g":"e.1","h":"e.2"},"ids":["one"]}'
    options = f"{{resume: {{g: 'e.7', i: 'e.8'}}, storage: holding(url, '{text}')}}"
    await begin(js, script, options)
    resume = {"groups": {"g": "e.7", "h": "e.2", "i": "e.8"}, "ids": ["one"]}
    assert resume_of((await script.accept()).path) == resume


NOTES = ["", "no JSON", "null", "[]", "7", '{"groups":7,"ids":7,"streams":7}', '{"ids":{}}']
NOTES += [f'{{"streams":[{stream}]}}' for stream in ("null", "1", "{}", '{"id":"x"}', '{"id":1.5}')]


async def test_a_storage_may_hold_anything(js: Js, script: Script) -> None:
    """What is no note of the client's is none, and its ids are numbers all the same."""
    for text in NOTES:
        await begin(js, script, f"{{storage: holding(url, '{text}')}}")
        await js.run("() => { c.request('a').catch(() => {}); }")
        peer = await script.accept()
        assert resume_of(peer.path) == {}, text
        assert (await peer.receive())["id"] == 1, text
        await js.run("() => { c.close(); }")


async def test_a_storage_may_deny_access(js: Js, script: Script) -> None:
    """It is then as good as none."""
    denied = "() => { throw new Error('denied'); }"
    await begin(js, script, f"{{storage: {{getItem: {denied}, setItem: {denied}}}}}")
    peer = await script.accept()
    await js.run("() => { log(c, 'a'); }")
    await peer.send("a", 1, group="g", at="e.9")
    await heard(js, 1)
    assert resume_of((await again(js, script, peer)).path)["groups"] == {"g": "e.9"}


async def test_a_position_is_stored_after_the_listeners(js: Js, script: Script) -> None:
    """So that a page which dies in a listener gets the message again."""
    await begin(js, script, "{storage: kept}")
    await js.run(f"""() => {{
      log(c, 'a');
      c.on('a', () => c.log.push(['stored', ({STORED})().groups]));
    }}""")  # fmt: skip
    peer = await script.accept()
    await peer.send("a", 1, group="g", at="e.8")
    await peer.send("a", 2, group="g", at="e.9")
    log = await heard(js, 4)
    assert log == [["a", 1], ["stored", {}], ["a", 2], ["stored", {"g": "e.8"}]]
    assert (await js.run(STORED))["groups"] == {"g": "e.9"}


async def test_positions_are_bounded(js: Js, script: Script) -> None:
    """Of more than 1,000 groups the one that has been quiet for longest is forgotten."""
    groups = "Object.fromEntries(Array.from({length: 1000}, (_, n) => [`g${n}`, 'e.1']))"
    await begin(js, script, f"{{storage: kept, resume: {groups}}}")
    await js.run("() => { log(c, 'a'); }")
    peer = await script.accept()
    await peer.send("a", 1, group="g0", at="e.2")
    await peer.send("a", 1, group="new", at="e.3")
    await heard(js, 2)
    stored = (await js.run(STORED))["groups"]
    assert (len(stored), stored["g0"], stored["new"]) == (1000, "e.2", "e.3")
    assert "g1" not in stored


# Streams


async def test_what_a_hidden_page_has_read_is_stored(js: Js, script: Script) -> None:
    """It may be killed at any time: each item that it is done with, and the end of the stream."""
    peer, id = await started(js, script, "{storage: kept}")
    if isinstance(js, InBrowser):
        await js.run("() => { Object.defineProperty(document, 'hidden', {value: true}); }")
    for n in range(1, 4):
        await peer.send("ask.reply", n, id=id, more=True, at=f"s.{n}")
        await js.run("() => c.items.next()")
    await js.run("() => { c.last = c.items.next(); }")
    assert (await js.run(STORED))["streams"] == [{"id": id, "type": "ask", "at": "s.3"}]
    await peer.send("complete", id=id)
    assert (await js.run("() => c.last"))["done"]
    assert (await js.run(STORED))["streams"] == []


async def test_who_does_not_resume_takes_up_nothing(js: Js, script: Script) -> None:
    """Also where another client has left a note."""
    text = '{"groups":{"g":"e.1"},"streams":[{"id":1,"type":"ask","at":"s.1"}]}'
    await begin(js, script, f"{{resume: false, storage: holding(url, '{text}')}}")
    assert await js.run("() => c.resumed('ask') ?? null") is None
    assert (await script.accept()).path == "/ws"


async def started(js: Js, script: Script, options: str = "{}") -> tuple[Any, Any]:
    """A client that reads a stream, as ``c.items``; the server's side, and the stream's id."""
    await begin(js, script, options)
    await js.run("() => { c.items = c.stream('ask', {q: 1}); }")
    peer = await script.accept()
    return peer, (await peer.receive())["id"]


async def test_a_stream_goes_on_after_a_cut(js: Js, script: Script) -> None:
    """From the position of the last item, under its old id; its end is the last of all."""
    await begin(js, script)
    await js.run("""() => {
      c.got = [];
      c.all = (async () => { for await (const item of c.stream('ask')) c.got.push(item); })();
    }""")
    peer = await script.accept()
    id = (await peer.receive())["id"]
    await peer.send("ask.reply", "a", id=id, more=True, at="s.1")
    await peer.send("ask.reply", "b", id=id, more=True, at="s.2")
    await js.run("() => until(() => c.got.length === 2)")
    peer = await again(js, script, peer)
    assert peer.path == "/ws?resume=message"  # A position is a secret, and an address is logged.
    assert await peer.receive() == {
        "type": "resume", "payload": {"streams": [{"id": id, "at": "s.2"}]}
    }  # fmt: skip
    await peer.send("ask.reply", "c", id=id, more=True, at="s.3")
    await peer.send("complete", id=id)
    assert await js.run("() => c.all.then(() => c.got)") == ["a", "b", "c"]
    assert resume_of((await again(js, script, peer)).path) == {}


async def test_a_stream_without_items_goes_on_too(js: Js, script: Script) -> None:
    """Its position is null, and what the server answers is its end."""
    peer, id = await started(js, script)
    peer = await again(js, script, peer)
    assert (await peer.receive())["payload"] == {"streams": [{"id": id, "at": None}]}
    await peer.send("error", {"code": "stream_lost", "message": "gone"}, id=id)
    assert (await js.run("() => outcome(c.items.next())"))["code"] == "stream_lost"


@pytest.mark.parametrize("options", ["{}", "{resume: false}"])
async def test_other_streams_are_lost_with_the_connection(
    js: Js, script: Script, options: str
) -> None:
    """Items that have come are still read, and then the loop fails."""
    peer, id = await started(js, script, options)
    at = {"at": "s.1"} if "false" in options else {}
    await peer.send("ask.reply", "a", id=id, more=True, **at)
    await js.run("() => { c.first = c.items.next(); }")
    assert (await js.run("() => c.first"))["value"] == "a"
    peer.cut()
    lost = await js.run("() => outcome(c.items.next())")
    assert (lost["name"], lost["sent"]) == ("Lost", True)
    assert await js.run("() => c.items.next()") in ({"done": True}, {"done": True, "value": None})


async def test_a_stream_can_be_stopped_while_the_connection_is_lost(js: Js, script: Script) -> None:
    """It is resumed, so that ``complete`` finds it."""
    peer, id = await started(js, script)
    await peer.send("ask.reply", "a", id=id, more=True, at="s.1")
    await js.run("() => c.items.next()")
    script.refuses = True
    peer.cut()
    await js.run(
        "async () => { await until(() => c.state === 'waiting'); await c.items.return(); }"
    )
    script.refuses = False
    await js.run("() => { c.retry(); }")
    peer = await script.accept()
    assert (await peer.receive())["payload"] == {"streams": [{"id": id, "at": "s.1"}]}
    assert await peer.receive() == {"type": "complete", "id": id}
    assert (await js.run("() => c.items.next()"))["done"]


async def test_a_stream_that_was_stopped_is_not_resumed(js: Js, script: Script) -> None:
    """Its ``complete`` was sent; the server stops what nobody resumes."""
    peer, id = await started(js, script)
    await peer.send("ask.reply", "a", id=id, more=True, at="s.1")
    await js.run("() => c.items.return()")
    assert (await peer.receive())["type"] == "complete"
    assert resume_of((await again(js, script, peer)).path) == {}


async def test_a_new_page_takes_up_a_stream(js: Js, script: Script) -> None:
    """From the last item that the former page was done with; others are left to the server."""
    peer, id = await started(js, script, "{storage: kept}")
    await js.run("() => { c.other = c.stream('other'); }")
    await peer.receive()
    for n in range(1, 4):
        await peer.send("ask.reply", n, id=id, more=True, at=f"s.{n}")
    await js.run("async () => { await c.items.next(); await c.items.next(); }")
    await js.run("() => { log(c, 'a'); }")
    await peer.send("a", group="g", at="e.1")
    await heard(js, 1)
    stored = await js.run(STORED)
    await js.run("() => { c.close(); }")
    if isinstance(js, InBrowser):  # A page that is seen does not store what belongs to its tab.
        assert "streams" not in stored
        stored["streams"] = [{"id": id, "type": "ask", "at": "s.1"}]
    else:
        other = {"id": id + 1, "type": "other", "at": None}
        assert stored["streams"] == [{"id": id, "type": "ask", "at": "s.1"}, other]
    hold = HELD[1:-1]
    await js.run(f"""([url, text]) => {{
      globalThis.c = connect(url + '/ws', {{storage: holding(url, text), {hold}}});
      c.items = c.resumed('ask');
      c.none = c.resumed('ask');
      c.send('next');
      c.asked = outcome(c.request('sum'));
      give(null);
    }}""", [script.url, json.dumps(stored)])  # fmt: skip
    peer = await script.accept()
    assert (await peer.receive())["payload"]["streams"] == [{"id": id, "at": "s.1"}]
    assert await peer.receive() == {"type": "next"}
    assert (await peer.receive())["id"] > id + (isinstance(js, InNode))
    await peer.send("ask.reply", 2, id=id, more=True, at="s.2")
    assert (await js.run("() => c.items.next()"))["value"] == 2
    assert await js.run("() => [c.none ?? null, c.resumed('other') ?? null]") == [None, None]
