"""What pachinko.js sends and gets: messages, requests, streams, questions, tokens and close codes.

The server is a script, so that each test decides what the client sees.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from javascript import InBrowser, InNode, Script
from support import PATIENCE, until

Js = InBrowser | InNode

pytestmark = pytest.mark.asyncio(loop_scope="session")


def resume_of(path: str) -> Any:
    """What the handshake says that the client has: an object, ``"message"``, or None."""
    text = parse_qs(urlsplit(path).query).get("resume", [None])[0]
    return text if text in (None, "message") else json.loads(text)


# A token that comes when the test calls `give`: until then the client does not connect.
HELD = "{token: () => new Promise((give) => { globalThis.give = give; })}"


async def begin(js: Js, script: Script, options: str = "{}") -> None:
    """Connect a client, as the global ``c``, which notes each of its states."""
    await js.load(script.url)
    code = f"(url) => {{ globalThis.c = log(connect(url + '/ws', {options}), '$state'); }}"
    await js.run(code, script.url)


async def test_messages_go_both_ways(js: Js, script: Script) -> None:
    """A listener gets payload and message; what is sent before the connection is open waits."""
    await begin(js, script)
    await js.run("() => { c.send('say', {text: 'hi'}); c.send('typing'); log(c, 'said'); }")
    peer = await script.accept()
    assert peer.path == "/ws?resume=%7B%7D"
    assert await peer.receive() == {"type": "say", "payload": {"text": "hi"}}
    assert await peer.receive() == {"type": "typing"}
    await js.run("() => { c.on('said', (payload, message) => c.log.push(message)); }")
    await peer.send("said", {"text": "hi"}, group="room:1", at="e.1")
    await js.run("() => until(() => c.log.length > 2)")
    log = await js.run("() => c.log")
    message = {"type": "said", "payload": {"text": "hi"}, "group": "room:1", "at": "e.1"}
    assert log == [["$state", "open"], ["said", {"text": "hi"}], message]


async def test_a_binary_frame_is_none_of_its_business(js: Js, script: Script) -> None:
    """It is passed over, and what follows is read."""
    await begin(js, script)
    peer = await script.accept()
    await js.run("() => { log(c, 'a'); }")
    await peer.socket.send(b"\x00\x01")
    await peer.send("a", 1)
    await js.run("() => until(() => c.log.length > 1)")
    assert await js.run("() => c.log") == [["$state", "open"], ["a", 1]]


async def test_what_is_no_message_does_no_harm(js: Js, script: Script) -> None:
    """It is reported, or passed over, and what follows is read; in Node the process goes on."""
    await begin(js, script)
    peer = await script.accept()
    await js.run("() => { globalThis.reportError = ({name}) => c.log.push(name); log(c, 'a'); }")
    for text in ("no JSON", "", "null", "7", "[]", '"a"', "{}", '{"type":"$state","payload":1}'):
        await peer.socket.send(text)
    await peer.send("a", 1, id=None)
    await js.run("() => until(() => c.log.at(-1)[0] === 'a')")
    errors = ["SyntaxError", "SyntaxError", "TypeError"]
    assert await js.run("() => c.log") == [["$state", "open"], *errors, ["a", 1]]


async def test_a_listener_can_be_taken_away(js: Js, script: Script) -> None:
    """``on`` returns what ends it; the other listeners of the type stay."""
    await begin(js, script)
    peer = await script.accept()
    await js.run("() => { const off = c.on('a', () => c.log.push('never')); log(c, 'a'); off(); }")
    await peer.send("a", 1)
    await js.run("() => until(() => c.log.length > 1)")
    assert await js.run("() => c.log") == [["$state", "open"], ["a", 1]]


async def test_listeners_do_not_disturb_each_other(js: Js, script: Script) -> None:
    """Who has been taken away is not called any more, and nobody hears of a state that is over."""
    await begin(js, script, HELD)
    await js.run("""() => {
      const off = c.on('a', () => later());
      const later = c.on('a', () => c.log.push('never'));
      c.on('a', () => { off(); c.log.push('a'); });
      c.states = [];
      c.on('$state', (state) => { if (state === 'waiting') c.retry(); });
      c.on('$state', (state) => { if (state === 'connecting') c.close(); });
      c.on('$state', (state) => c.states.push(state));
      give(null);
    }""")
    peer = await script.accept()
    await peer.send("a")
    await js.run("() => until(() => c.log.at(-1) === 'a')")
    peer.cut()
    await js.run("() => until(() => c.state === 'closed')")
    assert await js.run("() => c.states") == ["open", "closed"]
    assert await js.run("() => c.log") == [
        ["$state", "open"],
        "a",
        ["$state", "waiting"],
        ["$state", "connecting"],
        ["$state", "closed"],
    ]


async def test_a_request_has_one_answer(js: Js, script: Script) -> None:
    """Answers may come in any order, and each goes to its request."""
    await begin(js, script)
    await js.run("() => { c.asked = [c.request('sum', {a: 1}), c.request('sum', {a: 2})]; }")
    peer = await script.accept()
    first, second = await peer.receive(), await peer.receive()
    assert first["id"] != second["id"]
    await peer.send("sum.reply", "two", id=second["id"])
    await peer.send("sum.reply", "one", id=first["id"])
    await peer.send("sum.reply", "late", id=first["id"])
    assert await js.run("() => Promise.all(c.asked)") == ["one", "two"]


async def test_an_error_has_the_servers_words(js: Js, script: Script) -> None:
    """Its code, its message, and what else it says."""
    await begin(js, script)
    await js.run("() => { c.asked = outcome(c.request('move')); }")
    peer = await script.accept()
    error = {"code": "off_board", "message": "8 columns", "columns": 8}
    await peer.send("error", error, id=(await peer.receive())["id"])
    told = await js.run("() => c.asked")
    assert (told["name"], told["code"], told["message"]) == (
        "MessageError",
        *list(error.values())[:2],
    )
    assert told["details"] == {"columns": 8}
    await js.run("() => { log(c, 'error'); }")
    await peer.send("error", error)
    await js.run("() => until(() => c.log.length > 1)")
    assert (await js.run("() => c.log"))[1] == ["error", error]


async def test_a_request_may_have_a_time_limit(js: Js, script: Script) -> None:
    """It rejects with `Lost`, which is a ``TimeoutError``; what was not sent never is."""
    await begin(js, script, HELD)
    unsent = await js.run("() => outcome(c.request('a', 1, {timeout: 10}))")
    assert (unsent["name"], unsent["sent"]) == ("TimeoutError", False)
    await js.run("() => { give(null); return until(() => c.state === 'open'); }")
    await js.run("() => { c.asked = outcome(c.request('b', 2, {timeout: 1})); }")
    peer = await script.accept()
    assert (await peer.receive())["type"] == "b"
    late = await js.run("() => c.asked")
    assert (late["name"], late["sent"]) == ("TimeoutError", True)


async def test_a_time_limit_may_be_none(js: Js, script: Script) -> None:
    """One of more than 24 days is as good as none: it does not end at once."""
    await begin(js, script)
    peer = await script.accept()
    await js.run("""() => {
      const limits = [Infinity, 2 ** 31, 2 ** 40, undefined, null];
      c.asked = limits.map((timeout) => outcome(c.request('a', 1, {timeout})));
    }""")
    asked = [await peer.receive() for _ in range(5)]
    await js.run("() => new Promise((wake) => setTimeout(wake, 5))")
    for each in asked:
        await peer.send("a.reply", 2, id=each["id"])
    assert await js.run("() => Promise.all(c.asked)") == [{"value": 2}] * 5


async def test_a_request_may_be_given_up(js: Js, script: Script) -> None:
    """It rejects with the reason of the signal, before it is sent or after that."""
    await begin(js, script)
    code = """async (isLate) => {
      const abort = new AbortController();
      if (!isLate) abort.abort(new Error("enough"));
      const asked = outcome(c.request('a', 1, {signal: abort.signal}));
      abort.abort(new Error("enough"));
      return asked;
    }"""
    assert (await js.run(code, False))["message"] == "enough"
    assert (await js.run(code, True))["message"] == "enough"
    await js.run("() => { c.send('next'); }")
    peer = await script.accept()
    types = [(await peer.receive())["type"]]
    while types[-1] != "next":  # The second one may have been sent.
        types.append((await peer.receive())["type"])
    assert types in (["next"], ["a", "next"])


async def test_what_is_no_json_is_an_error_of_its_own(js: Js, script: Script) -> None:
    """Where it is sent; the next message goes on."""
    await begin(js, script, HELD)
    code = """async () => {
      const names = [], loop = {}; loop.loop = loop;
      for (const payload of [1n, loop, { toJSON() { throw new TypeError(); } }]) {
        try { c.send('a', payload); } catch (error) { names.push(error.name); }
        try { c.stream('a', payload); } catch (error) { names.push(error.name); }
        names.push((await outcome(c.request('a', payload))).name);
      }
      give(null);
      c.send('next');
      return names;
    }"""
    assert await js.run(code) == ["TypeError"] * 9
    assert await (await script.accept()).receive() == {"type": "next"}


async def test_a_lost_request_says_whether_it_was_sent(js: Js, script: Script) -> None:
    """Sent, it rejects with the cut; unsent, it waits for the next connection, or for the end."""
    await begin(js, script)
    await js.run("() => { c.first = outcome(c.request('a')); }")
    peer = await script.accept()
    await peer.receive()
    peer.cut()
    lost = await js.run("() => c.first")
    assert (lost["name"], lost["sent"]) == ("Lost", True)
    await js.run("() => { c.second = c.request('b'); c.retry(); }")
    peer = await script.accept()
    await peer.send("b.reply", "here", id=(await peer.receive())["id"])
    assert await js.run("() => c.second") == "here"
    script.refuses = True
    peer.cut()
    await js.run("() => until(() => c.state === 'waiting')")
    await js.run("() => { c.third = outcome(c.request('c')); c.close(); }")
    lost = await js.run("() => c.third")
    assert (lost["name"], lost["sent"]) == ("Lost", False)


async def test_a_stream_ends_with_its_loop(js: Js, script: Script) -> None:
    """Items come in order; an end ends the loop, and an error is raised behind the last item."""
    await begin(js, script)
    code = """async (type) => {
      const items = [];
      try { for await (const item of c.stream(type, {to: 2})) items.push(item); }
      catch (error) { items.push(error.code); }
      return items;
    }"""
    peer = await script.accept()
    for end, last in (("complete", []), ("error", ["broken"])):
        await js.run(f"() => {{ c.all = ({code})('count'); }}")
        asked = await peer.receive()
        assert asked["type"] == "count"
        await peer.send("count.reply", 0, id=asked["id"], more=True)
        await peer.send("count.reply", None, id=asked["id"], more=True)
        await peer.send(end, {"code": "broken"}, id=asked["id"])
        assert await js.run("() => c.all") == [0, None, *last]


@pytest.mark.parametrize("way", ["loop", "return", "signal"])
async def test_a_stream_is_stopped_by_who_leaves(js: Js, script: Script, way: str) -> None:
    """Leaving the loop sends ``complete``; so do ``return()``, while it waits, and a signal."""
    await begin(js, script)
    code = """async (way) => {
      const abort = new AbortController(), items = c.stream('count', {}, {signal: abort.signal});
      const got = [];
      setTimeout(async () => {
        await until(() => got.length);
        if (way === 'return') await items.return();
        if (way === 'signal') abort.abort();
      });
      for await (const item of items) { got.push(item); if (way === 'loop') break; }
      return got;
    }"""
    await js.run(f"(way) => {{ c.all = ({code})(way); }}", way)
    peer = await script.accept()
    asked = await peer.receive()
    await peer.send("count.reply", 0, id=asked["id"], more=True)
    assert await peer.receive() == {"type": "complete", "id": asked["id"]}
    await peer.send("count.reply", 1, id=asked["id"], more=True)
    await peer.send("complete", id=asked["id"])
    assert await js.run("() => c.all") == [0]
    await js.run("() => { c.send('done'); }")
    assert await peer.receive() == {"type": "done"}


async def test_a_stream_leaves_nothing_at_its_signal(in_node: InNode, script: Script) -> None:
    """A signal may outlive many: each takes its listener away, however it ends."""
    js = in_node
    await begin(js, script)
    peer = await script.accept()
    await js.run("""() => {
      c.abort = new AbortController();
      const { getEventListeners } = process.getBuiltinModule('node:events');
      c.left = () => getEventListeners(c.abort.signal, 'abort').length;
      c.start = (payload) => c.stream('a', payload, {signal: c.abort.signal});
      c.all = [c.start(), c.start(), c.start(), c.start()];
      c.all[0].return();
      try { c.start(1n); } catch {}
    }""")
    asked = [await peer.receive() for _ in range(5)]
    assert await js.run("() => c.left()") == 3
    await peer.send("complete", id=asked[1]["id"])
    await peer.send("error", {"code": "broken"}, id=asked[2]["id"])
    await js.run("async () => { await c.all[1].next(); await outcome(c.all[2].next()); }")
    assert await js.run("() => c.left()") == 1
    await js.run("() => { c.close(); }")
    assert await js.run("() => c.left()") == 0
    thrown = "() => { c.abort.abort(); try { c.start(); } catch (error) { return error.name; } }"
    assert await js.run(thrown) == "AbortError"


# A connection that says nothing, as the global `socket`, and notes what is sent, as `sent`.
MUTE = """
globalThis.sent = [];
globalThis.WebSocket = class {
  readyState = 0;
  bufferedAmount = 0;
  constructor() { globalThis.socket = this; }
  open() { this.readyState = 1; this.onopen(); }
  send(text) { sent.push(JSON.parse(text).type); }
  close(code) { sent.push(`close ${code}`); }
};
"""


async def test_a_stream_is_stopped_also_where_nothing_else_may_be_sent(
    in_node: InNode, script: Script
) -> None:
    """The browser's own buffer is full; the server makes no more items for nobody."""
    await in_node.load(script.url)
    code = f"""async () => {{
      {MUTE}
      const c = connect('ws://localhost'), items = c.stream('a');
      await until(() => globalThis.socket);
      socket.open();
      socket.bufferedAmount = 2 ** 20 + 1;
      await items.return();
      const refused = await outcome(c.request('b'));
      c.close();
      return [refused.sent, ...sent];
    }}"""
    assert await in_node.run(code) == [False, "a", "complete", "close 1000", "close undefined"]


async def test_a_failed_attempt_may_be_an_error_only(in_node: InNode, script: Script) -> None:
    """Node 22 tells no more of a server that is not there; a connection that was has its code."""
    await in_node.load(script.url)
    code = f"""async () => {{
      {MUTE}
      const c = log(connect('ws://localhost')), told = [];
      c.on('$state', (state, detail) => told.push([state, detail?.code ?? null]));
      await until(() => globalThis.socket);
      socket.onerror();
      socket = undefined;
      c.retry();
      await until(() => socket);
      socket.open();
      socket.onerror?.();
      socket.onclose({{ code: 4403, reason: '' }});
      return told;
    }}"""
    told = [["waiting", 1006], ["connecting", None], ["open", None], ["closed", 4403]]
    assert await in_node.run(code) == told


async def test_several_may_wait_for_a_stream(js: Js, script: Script) -> None:
    """Each ``next()`` gets an item of its own, and those behind the end are told of it."""
    await begin(js, script)
    await js.run("""() => {
      const items = c.stream('count');
      c.all = Promise.all([items.next(), items.next(), items.next()]);
    }""")
    peer = await script.accept()
    id = (await peer.receive())["id"]
    for n in range(2):
        await peer.send("count.reply", n, id=id, more=True)
    await peer.send("complete", id=id)
    values = [(each.get("value"), each["done"]) for each in await js.run("() => c.all")]
    assert values == [(0, False), (1, False), (None, True)]


async def test_a_long_stream_costs_no_more_at_its_end(in_node: InNode, script: Script) -> None:
    """Nothing of the items before is kept: 20,000, of which each is waited for."""
    await in_node.load(script.url)
    code = """async () => {
      let socket;
      globalThis.WebSocket = class {
        readyState = 1;
        constructor() { socket = this; setTimeout(() => this.onopen()); }
        send(text) { this.sent = JSON.parse(text); }
        close() {}
      };
      const c = connect('ws://localhost'), items = c.stream('a');
      await until(() => socket?.sent);
      let n = 0;
      for (let done = false; n < 20_000 && !done; n++) {
        const next = items.next();
        const message = { type: 'a.reply', id: socket.sent.id, more: true, payload: n };
        socket.onmessage({ data: JSON.stringify(message) });
        done = (await next).value !== n;
      }
      c.close();
      return n;
    }"""
    assert await in_node.run(code) == 20_000


async def test_a_stream_that_was_not_sent_is_not_sent(js: Js, script: Script) -> None:
    """Who leaves before the connection is open leaves nothing behind."""
    await begin(js, script, HELD)
    await js.run("() => { c.stream('count').return(); c.send('next'); give(null); }")
    peer = await script.accept()
    assert await peer.receive() == {"type": "next"}


async def test_questions_are_answered(js: Js, script: Script) -> None:
    """With what the function returns or resolves to, or with the `MessageError` that it throws."""
    await begin(js, script)
    await js.run("""() => {
      c.answer('double', async (n) => 2 * n);
      c.answer('refuse', () => { throw new MessageError('busy', 'not now', {until: 3}); });
    }""")
    peer = await script.accept()
    await peer.send("double", 4, id="$1")
    assert await peer.receive() == {"type": "double.reply", "id": "$1", "payload": 8}
    await peer.send("refuse", id="$2")
    error = {"code": "busy", "message": "not now", "until": 3}
    assert await peer.receive() == {"type": "error", "id": "$2", "payload": error}
    await peer.send("unknown", id="$3")
    assert (await peer.receive())["payload"]["code"] == "unknown_type"


BUGS = {
    "an error": "() => { throw new Error('s3cret'); }",
    "a rejection": "async () => { throw new Error('s3cret'); }",
    "no error": "() => { throw undefined; }",
    "a number that JSON does not have": "() => 1n",
    "a circle": "() => { const a = {}; return a.a = a; }",
    "details that are no JSON": "() => { throw new MessageError('a', 'b', {c: 1n}); }",
}


async def test_a_bug_in_an_answer_is_not_told(js: Js, script: Script) -> None:
    """The server learns that there is none; the page sees the bug as any other."""
    await begin(js, script)
    bugs = ", ".join(f"c.answer({json.dumps(name)}, {code})" for name, code in BUGS.items())
    await js.run(f"() => {{ globalThis.reportError = (e) => c.log.push(`${{e}}`); {bugs}; }}")
    peer = await script.accept()
    for n, name in enumerate(BUGS):
        await peer.send(name, 4, id=f"${n}")
        payload = {"code": "internal_error", "message": "internal_error"}
        assert await peer.receive() == {"type": "error", "id": f"${n}", "payload": payload}
    errors = (await js.run("() => c.log"))[1:]
    assert errors[:3] == ["Error: s3cret", "Error: s3cret", "undefined"]
    assert len(errors) == len(BUGS)


async def test_an_answer_belongs_to_its_connection(js: Js, script: Script) -> None:
    """One that takes longer than the connection is not sent on the next."""
    await begin(js, script)
    await js.run("() => { c.answer('a', () => new Promise((give) => { c.give = give; })); }")
    peer = await script.accept()
    await peer.send("a", id="$1")
    await js.run("() => until(() => c.give)")
    peer.cut()
    await js.run("async () => { await until(() => c.state === 'waiting'); c.retry(); }")
    peer = await script.accept()
    await js.run("async () => { await until(() => c.state === 'open'); c.give(1); c.send('b'); }")
    assert await peer.receive() == {"type": "b"}


async def test_a_bug_in_a_listener_is_its_own(tab: InBrowser, script: Script) -> None:
    """The next listener is called, the position is kept, and the page sees the bug."""
    await begin(tab, script)
    await tab.run("() => { c.on('a', () => { throw new Error('oh'); }); log(c, 'a'); }")
    peer = await script.accept()
    await peer.send("a", 1, group="g", at="e.7")
    await tab.run("() => until(() => c.log.length > 1)")
    await until(lambda: tab.complaints == ["oh"])
    peer.cut()
    await tab.run("async () => { await until(() => c.state === 'waiting'); c.retry(); }")
    assert resume_of((await script.accept()).path) == {"groups": {"g": "e.7"}}


STOPS = [1000, 1003, 1007, 1008, 1009, 3400, 3401, 3403, 3499, 4400, 4401, 4404, 4499]
BUSY = [1012, 1013, 3408, 3429, 4408, 4429, 3500, 3503, 3599, 4500, 4599]
SOON = [1001, 1006, 1011, 1014, 3000, 3399, 3600, 4000, 4399, 4600, 4999]


async def test_a_close_code_says_what_to_do(js: Js, script: Script) -> None:
    """Stay away, come back after 5 seconds at first, or after half a second."""
    await js.load(script.url)
    await js.run("""(url) => {
      globalThis.ends = {};
      globalThis.dial = async (code) => {
        const c = connect(`${url}/${code}`);
        c.on('$state', (state, detail) => {
          if (!detail || ends[code]) return;
          c.retry(); // of no use where the client stays away
          ends[code] = [state, detail, state === 'closed' ? c.state : 'waiting'];
          c.close();
        });
      };
    }""", script.url)  # fmt: skip
    codes = [*STOPS, *BUSY, *SOON]
    for code in codes:
        await js.run("(code) => dial(code)", code)
        peer = await script.accept()
        peer.cut() if code == 1006 else await peer.close(code, "because")
    await js.run("(n) => until(() => Object.keys(ends).length === n)", len(codes))
    ends = await js.run("() => ends")
    for code in codes:
        state, detail, later = ends[str(code)]
        assert state == later == ("closed" if code in STOPS else "waiting"), code
        assert (detail["code"], detail["reason"]) == (code, "" if code == 1006 else "because")
        low = 5_000 if code in BUSY else 500
        assert code in STOPS or low <= detail["wait"] <= 2 * low, code


async def test_who_is_here_does_not_wait(js: Js, script: Script) -> None:
    """What the server had sent before it closed does not count for the answer to ``$ping``."""
    await begin(js, script)
    await js.run("() => { c.on('$state', (_, detail) => { c.wait ??= detail?.wait; }); }")
    for last, low, high in (("a", 0, 0), ("$pong", 5_000, 20_000)):
        peer = await script.accept()
        await js.run("() => until(() => c.state === 'open')")
        await js.run("() => { c.wait = undefined; c.retry(); }")
        assert (await peer.receive())["type"] == "$ping"
        await peer.send(last)
        await peer.close(1013)
        await js.run("() => until(() => c.wait !== undefined)")
        assert low <= await js.run("() => c.wait") <= high


@pytest.mark.parametrize("code", [3401, 4401])
async def test_a_token_is_renewed_once(js: Js, script: Script, code: int) -> None:
    """After …401 a function is asked for a fresh one; if that is refused, too, the client stops."""
    await begin(js, script, "{token: async () => `token${globalThis.n = (globalThis.n ?? 0) + 1}`}")
    await js.run("() => { c.asked = outcome(c.request('work')); }")
    for n in (1, 2):
        peer = await script.accept()
        assert (await peer.receive())["payload"]["token"] == f"token{n}"
        await peer.close(code, "expired")
        if n == 1:
            await js.run("async () => { await until(() => c.state === 'waiting'); c.retry(); }")
    await js.run("() => until(() => c.state === 'closed')")
    lost = await js.run("() => c.asked")
    assert (lost["name"], lost["sent"]) == ("Lost", False)
    assert script.peers.empty()


async def test_nothing_is_lost_to_an_expired_token(js: Js, script: Script) -> None:
    """What waits is sent once the server knows the client, and not before."""
    await begin(js, script, "{token: () => globalThis.token ?? 'old'}")
    await js.run("() => { globalThis.token = 'new'; c.asked = c.request('work'); }")
    peer = await script.accept()
    assert (await peer.receive())["payload"] == {"token": "old", "resume": {}}
    await peer.close(3401)
    await js.run("async () => { await until(() => c.state === 'waiting'); c.retry(); }")
    peer = await script.accept()
    assert peer.path == "/ws?resume=message"
    asked = await peer.receive()
    assert (asked["type"], asked["payload"]["token"]) == ("authenticate", "new")
    assert await js.run("() => c.state") == "connecting"
    await peer.send("authenticate.reply", id=asked["id"])
    asked = await peer.receive()
    assert asked["type"] == "work"
    await peer.send("work.reply", "done", id=asked["id"])
    assert await js.run("() => c.asked") == "done"


async def test_a_server_may_know_no_tokens(js: Js, script: Script) -> None:
    """It answers with an error; then the client tells by a message what it would have read."""
    await begin(js, script, "{token: 's3cret', resume: {g: 'e.1'}}")
    await js.run("() => { c.send('next'); }")
    peer = await script.accept()
    asked = await peer.receive()
    await peer.send("error", {"code": "unknown_type"}, id=asked["id"])
    assert await peer.receive() == {
        "type": "resume", "payload": {"groups": {"g": "e.1"}}
    }  # fmt: skip
    assert await peer.receive() == {"type": "next"}


async def test_a_token_may_be_read_later(js: Js, script: Script) -> None:
    """A server that cannot look at it now is no server without tokens: nothing is sent to it."""
    await begin(js, script, "{token: 's3cret'}")
    await js.run("() => { c.send('next'); c.on('$state', (_, detail) => { c.detail = detail; }); }")
    for n, code in enumerate(("internal_error", "handler_timeout", "too_busy", "rate_limited")):
        peer = await script.accept()
        asked = await peer.receive()
        await peer.send("error", {"code": code, "message": "not now"}, id=asked["id"])
        await js.run("() => until(() => c.state === 'waiting')")
        detail = await js.run("() => c.detail")
        assert detail["reason"] == "not now"
        assert 5_000 <= detail["wait"] <= (20_000 if n else 10_000)
        await js.run("() => { c.retry(); }")
    peer = await script.accept()
    asked = await peer.receive()
    await peer.send("authenticate.reply", id=asked["id"])
    assert await peer.receive() == {"type": "next"}


async def test_a_token_that_cannot_be_had_is_tried_again(js: Js, script: Script) -> None:
    """The function's error ends the attempt, and is shown as the reason."""
    await begin(js, script, "{token: () => { throw new Error('offline'); }}")
    await js.run("() => until(() => c.state === 'waiting')")
    assert script.attempts == 0
    await js.run("() => { c.retry(); c.close(); }")
    await js.run("() => new Promise((wake) => setTimeout(wake))")
    assert await js.run("() => c.state") == "closed"


@pytest.mark.parametrize("protocols", ["'bearer'", "['bearer']", "['bearer', 'pachinko.1']"])
async def test_a_token_may_be_a_subprotocol(js: Js, script: Script, protocols: str) -> None:
    """Behind ``bearer``, and nowhere else."""
    await begin(js, script, f"{{token: 's3cret', protocols: {protocols}}}")
    await js.run("() => { c.send('next'); }")
    peer = await script.accept()
    assert peer.offered is not None
    assert peer.offered.replace(" ", "").split(",")[:2] == ["bearer", "s3cret"]
    assert peer.path == "/ws?resume=%7B%7D"
    assert await peer.receive() == {"type": "next"}


async def test_an_outbox_is_bounded_by_count(js: Js, script: Script) -> None:
    """One message more than 100 is refused, while those before it are sent."""
    script.refuses = True
    await begin(js, script)
    await js.run("() => until(() => c.state === 'waiting')")
    code = "() => { for (let n = 0; n < 100; n++) c.send('n', n); }"
    await js.run(code)
    thrown = await js.run(
        "() => { try { c.send('n', 100); } catch (e) { return [e.name, e.sent]; } }"
    )
    assert thrown == ["Lost", False]
    refused = await js.run("() => outcome(c.request('n', 101))")
    assert (refused["name"], refused["sent"]) == ("Lost", False)
    assert await js.run("() => { try { c.stream('n'); } catch (e) { return e.name; } }") == "Lost"
    script.refuses = False
    await js.run("() => { c.retry(); }")
    peer = await script.accept()
    assert [(await peer.receive())["payload"] for _ in range(100)] == list(range(100))
    await js.run("() => until(() => c.state === 'open')")
    await js.run("() => { c.send('n', 'next'); }")
    assert (await peer.receive())["payload"] == "next"


async def test_an_outbox_is_bounded_by_bytes(js: Js, script: Script) -> None:
    """They are those of UTF-8, and 1 MiB in all."""
    script.refuses = True
    await begin(js, script)
    await js.run("() => { c.send('a', 'ü'.repeat(400_000)); }")
    code = (
        "(n) => { try { c.send('a', 'ü'.repeat(n)); return 'taken' } catch (e) { return e.name } }"
    )
    assert await js.run(code, 130_000) == "Lost"
    assert await js.run(code, 120_000) == "taken"


async def test_closing_is_final(js: Js, script: Script) -> None:
    """``close()`` tells the server its code, ends everything once, and nothing brings it back."""
    await begin(js, script)
    peer = await script.accept()
    await js.run("() => until(() => c.state === 'open')")
    await js.run("""() => {
      c.asked = outcome(c.request('a'));
      c.items = outcome(c.stream('b').next());
      c.close(4000, 'done');
      c.close();
      c.retry();
    }""")
    assert await peer.gone() == (4000, "done")
    assert (await js.run("() => c.asked"))["sent"] is True
    assert (await js.run("() => c.items"))["name"] == "Lost"
    states = [state for _, state in await js.run("() => c.log")]
    assert states == ["open", "closed"]
    assert await js.run("() => { try { c.send('a'); } catch (e) { return e.sent; } }") is False


async def test_waits_grow_and_never_end(in_node: InNode, script: Script) -> None:
    """They are random between half a second and a bound that doubles up to 20 seconds."""
    js = in_node  # Chromium itself delays attempts on a host that refuses.
    script.refuses = True
    await js.load(script.url)
    code = """async ([url, least]) => {
      Math.random = () => least ? 0 : 1 - 2 ** -53;
      const waits = [], c = connect(url);
      await new Promise((done) => c.on('$state', (state, detail) => {
        if (state !== 'waiting') return;
        waits.push(Math.round(detail.wait));
        waits.length < 9 ? c.retry() : done();
      }));
      c.close();
      return waits;
    }"""
    growing = [1000, 2000, 4000, 8000, 16000, 20000, 20000, 20000, 20000]
    assert await js.run(code, [script.url, False]) == growing
    assert await js.run(code, [script.url, True]) == [500] * 9


async def test_importing_does_nothing(js: Js, script: Script) -> None:
    """No timer, no listener, no connection: a program that only imports it ends."""
    await js.load(script.url)
    if isinstance(js, InNode):
        assert set(await js.run("() => process.getActiveResourcesInfo()")) == {"PipeWrap"}
    else:
        used = """async () => {
          const used = [], targets = [globalThis, document, Storage.prototype];
          const names = ['setTimeout', 'addEventListener', 'fetch', 'WebSocket', 'getItem'];
          for (const target of targets) for (const name of names.filter((each) => each in target)) {
            const own = target[name];
            target[name] = (...args) => (used.push(name), own(...args));
          }
          await import('/pachinko.js?again');
          setTimeout(() => {});
          return used;
        }"""
        assert await js.run(used) == ["setTimeout"]  # It would have been seen.
    assert script.attempts == 0


async def test_an_address_has_to_be_one(js: Js, script: Script) -> None:
    """A wrong one is an error at once, and no endless attempt."""
    await js.load(script.url)
    code = "(url) => { try { connect(url); } catch (error) { return error.name; } }"
    for url in ("http://[", "ftp://example.com", "file:///ws", "data:,ws", "mailto:a@example.com"):
        assert await js.run(code, url) == "TypeError"


WAYS = {  # to a state of the client
    "a token is asked for": "connect(url, {token: () => new Promise(() => {})})",
    "it connects": "connect(url)",
    "it is open": "connect(url)",
    "it waits": "connect(url.replace(/[0-9]+$/, '1'))",
}


async def test_a_program_ends_after_its_client(in_node: InNode, script: Script) -> None:
    """No timer and no connection is left of a client that is closed, whatever it did."""
    js = in_node
    await js.load(script.url)
    for way, code in WAYS.items():
        await js.run(f"(url) => {{ globalThis.c = log({code}, '$state'); }}", script.url)
        if way == "it is open":
            await js.run("() => until(() => c.state === 'open')")
        if way == "it waits":
            await js.run("() => until(() => c.state === 'waiting')")
        await js.run("""() => {
          c.asked = [outcome(c.request('a', 1, {timeout: 60_000})), outcome(c.stream('b').next())];
          c.log = [];
          c.close(4000, 'done');
        }""")
        assert [lost["name"] for lost in await js.run("() => Promise.all(c.asked)")] == ["Lost"] * 2
        async with asyncio.timeout(PATIENCE):
            while set(await js.run("() => process.getActiveResourcesInfo()")) != {"PipeWrap"}:
                pass
        assert await js.run("() => c.log.map(([, state]) => state)") == ["closed"], way
