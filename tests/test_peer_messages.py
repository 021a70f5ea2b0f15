"""Peer messages: what processes say to one another, and on which subject."""

from __future__ import annotations

import contextlib
import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pachinko import Binary, Kind
from pachinko_cluster import PeerMessage, Refused, check_carried, pack, subject_of, unpack

# Subjects


@given(st.text(max_size=200), st.text(max_size=200))
def test_every_name_has_a_subject_of_its_own(one: str, other: str) -> None:
    """Of few characters, none of which means anything to a broker."""
    subject = subject_of("ns", Kind.GROUP, one)
    assert (subject == subject_of("ns", Kind.GROUP, other)) == (one == other)
    assert len(subject) <= 200 and subject.startswith("ns.g.") and subject.count(".") == 2
    assert set(subject) <= set(string.ascii_letters + string.digits + "-_.%=~")
    assert len(subject.split(".")[2]) > 0


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("room:1", "room%3A1"),
        ("a.b", "a%2Eb"),
        (">", "%3E"),
        ("*", "%2A"),
        ("a b\n", "a%20b%0A"),
        ("ä", "%C3%A4"),
        ("", "="),
    ],
)
def test_a_short_name_stays_readable(name: str, token: str) -> None:
    """For whoever looks at the broker."""
    assert subject_of("pachinko", Kind.GROUP, name).startswith(f"pachinko.g.{token}")


def test_long_and_odd_names_are_hashed() -> None:
    """10,000 characters, nothing at all, half a surrogate pair."""
    names = ["", "x" * 10_000, "x" * 10_001, "\udcff" * 100, "\ud800"]
    subjects = {subject_of("ns", Kind.USER, name) for name in names}
    assert len(subjects) == len(names) and max(map(len, subjects)) <= 200


# Messages


def test_a_message_is_a_line_and_the_frame_behind_it() -> None:
    """The line is JSON; what is not there has its default, what is unknown is ignored."""
    head = {"v": 1, "op": "send", "from": "p", "n": 3, "later": [1]}
    message, frame = unpack(json.dumps(head).encode() + b'\n{"type":"a\\nb"}\nrest')
    assert (message.op, message.source, message.n, message.exclude, message.to) == (
        "send",
        "p",
        3,
        [],
        None,
    )
    assert frame == b'{"type":"a\\nb"}\nrest'


def test_processes_of_the_first_release_understand_it() -> None:
    """The wire format between processes: an update takes one process after the other."""
    subjects = {kind: subject_of("pachinko", kind, "a.b") for kind in Kind}
    assert subjects == {
        Kind.GROUP: "pachinko.g.a%2Eb",
        Kind.USER: "pachinko.u.a%2Eb",
        Kind.CONNECTION: "pachinko.p.a%2Eb",
        Kind.EVERYBODY: "pachinko.a.a%2Eb",
    }
    message = PeerMessage(1, "here", "me", 2, 3, ask=4, members=[("id", None)], more=True)
    head, frame = pack(message, b'{"type":"x"}').split(b"\n")
    assert frame == b'{"type":"x"}' and json.loads(head) == {
        "v": 1, "op": "here", "from": "me", "session": 2, "n": 3, "ask": 4,
        "members": [["id", None]], "more": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("data", "why", "version"),
    [
        (b"", "not a message of ours", None),
        (b"\n", "not a message of ours", None),
        (b"hello", "not a message of ours", None),
        (b"\xff\xfe\n{}", "not a message of ours", None),
        (b'{"v":1}\n', "missing required field", None),
        (b'{"v":1,"op":5,"from":"p"}\n', "Expected `str`", None),
        (b'{"v":1,"op":"send","from":"p","exclude":"all"}', "Expected `array`", None),
        (b'{"v":2}\n', "missing required field", None),
        (b'{"v":2,"op":"close","from":"p","to":"ada"}\n', "only what is sent", None),
        (b'{"v":2,"op":"done","from":"p","ask":1}\n{}', "only what is sent", None),
        (b'{"v":3,"op":"send","from":"p"}\n', "it has format 3, not 1 or 2", 3),
        (b'{"v":3}\n', "it has format 3, not 1", 3),
        (b'{"v":0,"op":"send","from":"p"}\n', "it has format 0, not 1", 0),
        (b'{"v":3,"op":{}}', "it has format 3, not 1", 3),
        (b'{"v":"2"}', "not a message of ours", None),
        (b"[" * 100_000, "not a message of ours", None),
        (b'{"v":1,"op":"send","from":"p","x":' + b"[" * 100_000, "not a message of ours", None),
    ],
)
def test_what_is_no_peer_message_is_refused(data: bytes, why: str, version: int | None) -> None:
    """A stranger's bytes, and another version's."""
    with pytest.raises(Refused, match=why) as caught:
        unpack(data)
    assert caught.value.format == version


def test_a_binary_frame_has_a_format_of_its_own() -> None:
    """So that processes of earlier releases, which would decode it, announce a gap."""
    message = PeerMessage(2, "send", "me", 1, 3)
    for content in (b"", b"\n", b"\xff\x00\nrest", b'{"type":"x"}'):
        again, frame = unpack(pack(message, Binary(content)))
        assert (again, frame, type(frame)) == (message, content, Binary)
        check_carried(frame, "a group")
        assert type(unpack(pack(PeerMessage(1, "send", "me"), content))[1]) is bytes


@given(st.binary(max_size=300))
def test_no_bytes_break_it(data: bytes) -> None:
    """Any bytes are a message or refused."""
    with contextlib.suppress(Refused):
        unpack(data)
    with contextlib.suppress(Refused):
        check_carried(data, "a")


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"hello",
        b"[]",
        b"{}",
        b'{"type":5}',
        b'{"type":"a","group":"other"}',
        b'{"type":"a"}',
        b'{"type":"a","group":"room","payload":}',
        b'{"type":"a","group":"room"} and more',
        b'{"type":"a","group":"room","payload":' + b"[" * 100_000,
        b'{"type":"a","group":"room","payload":"\xff"}',
    ],
)
def test_what_is_no_frame_for_clients_is_refused(frame: bytes) -> None:
    """It has a type, and names the group that it was sent to."""
    with pytest.raises(Refused):
        check_carried(frame, "room")


def test_a_frame_for_clients_passes() -> None:
    """With its group, or without one where it is for no group."""
    check_carried(b'{"type":"a","group":"room","payload":[{"x":1}]}', "room")
    check_carried(b'{"type":"a"}', None)
