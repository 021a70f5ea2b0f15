"""The check of what clients have heard notices each fault that it is there for."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import pytest
from following import Follower, Heard, Hole, Published, Send, check

GROUP = "room:a"
SECRET = "the id of its second connection"


def life() -> tuple[Published, list[Heard]]:
    """What a client has heard that came, was cut, came back, was told of a gap, and came back."""
    published = Published()
    witness = Follower(published, "a witness")  # who has heard everything
    witness.joins(GROUP)
    client = Follower(published, "a client")
    number = 0

    def verdict(follower: Follower, type: str, id: str, **payload: object) -> None:
        at = f"e.{number}"
        follower.take({"type": type, "group": GROUP, "at": at, "payload": {"id": id, **payload}})

    def said(sent: Send, *followers: Follower) -> None:
        nonlocal number
        number += 1
        sent.is_stored = True
        for each in followers:
            each.take(
                {"type": "said", "group": GROUP, "at": f"e.{number}", "payload": sent.payload}
            )

    def say(*followers: Follower, sender: str = "ada", excluded: str | None = None) -> Send:
        sent = published.begin(GROUP, sender, excluded)
        said(sent, *followers)
        return sent

    verdict(witness, "resume", "w", replayed=0)
    say(witness)
    client.joins(GROUP)
    verdict(client, "resume", "1", replayed=0)
    say(witness, client)
    say(witness, client, sender="bob")
    number += 3  # messages to other groups
    missed = [say(witness), say(witness, sender="bob"), say(witness)]
    client.joins(GROUP)
    number -= 3
    for sent in missed:
        said(sent, client)
    verdict(client, "resume", SECRET, replayed=3)
    say(witness, client)
    say(witness, excluded=SECRET)
    say(witness, client)
    for _ in range(3):
        say(witness)
    client.joins(GROUP)
    verdict(client, "gap", "3", reason="expired")
    say(witness, client)
    say(witness, client, sender="bob")
    published.check(reasons=["expired"], window=3)
    return published, client.heard[GROUP]


def messages(heard: list[Heard]) -> list[int]:
    return [n for n, each in enumerate(heard) if each.kind == "message"]


def without(n: int) -> Callable[[list[Heard]], None]:
    def change(heard: list[Heard]) -> None:
        del heard[messages(heard)[n]]

    return change


def doubled(n: int, after: int) -> Callable[[list[Heard]], None]:
    def change(heard: list[Heard]) -> None:
        places = messages(heard)
        heard.insert(places[n + after] + 1, heard[places[n]])

    return change


def swapped(n: int) -> Callable[[list[Heard]], None]:
    def change(heard: list[Heard]) -> None:
        one, other = messages(heard)[n : n + 2]
        heard[one], heard[other] = heard[other], heard[one]

    return change


def changed(kind: str, n: int, **values: object) -> Callable[[list[Heard]], None]:
    def change(heard: list[Heard]) -> None:
        place = [p for p, each in enumerate(heard) if each.kind == kind][n]
        heard[place] = attrs.evolve(heard[place], **values)  # type: ignore[arg-type]  # any field

    return change


def without_kind(kind: str, n: int) -> Callable[[list[Heard]], None]:
    def change(heard: list[Heard]) -> None:
        del heard[[p for p, each in enumerate(heard) if each.kind == kind][n]]

    return change


def heard_own(heard: list[Heard]) -> None:
    """What was to be left out comes after all, while the connection is there."""
    place = messages(heard)[6]
    heard.insert(place, Heard("message", "e.13", 99, ("ada", 5)))


FAULTS: dict[str, Callable[[list[Heard]], None]] = {
    **{f"the message {n} is lost": without(n) for n in range(9)},
    **{f"the message {n} comes twice": doubled(n, 0) for n in range(9)},
    "an early message comes again later": doubled(0, 4),
    "one from before a gap comes behind it": doubled(4, 3),
    **{f"the messages {n} and {n + 1} are swapped": swapped(n) for n in (0, 2, 3, 5, 7)},
    "a gap is not told": without_kind("gap", 0),
    "a gap has another reason": changed("gap", 0, reason="broker"),
    "a gap leads back": changed("gap", 0, at="e.3"),
    "a gap leads too far": changed("gap", 0, at="e.18"),
    "a verdict has another count": changed("resume", 1, replayed=2),
    "a verdict leads too far": changed("resume", 1, at="e.14"),
    "a verdict leads back": changed("resume", 1, at="e.2"),
    "a message has the place of another": changed("message", 3, at="e.7"),
    "a message is of another life": changed("message", 3, at="f.9"),
    "a message that nobody has sent": changed("message", 3, key=("eve", 0)),
    "a number that nobody has sent": changed("message", 3, key=("ada", 99)),
    "what it has excluded itself from": heard_own,
}


def test_a_right_life_passes() -> None:
    """The life that the faults are planted in has none."""
    published, heard = life()
    check(heard, published, GROUP, own=frozenset(["1", SECRET, "3"]), reasons=["expired"], window=3)
    assert len(messages(heard)) == 9


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    """Lost, doubled, swapped, foreign, silent: each is told."""
    published, heard = life()
    FAULTS[fault](heard)
    with pytest.raises(AssertionError):
        check(
            heard, published, GROUP, own=frozenset(["1", SECRET, "3"]), reasons=["expired"],
            window=3,
        )  # fmt: skip


def test_a_gap_while_the_window_has_everything_is_found() -> None:
    """A server that announces what it could deliver is wrong, too."""
    published, heard = life()
    with pytest.raises(AssertionError, match="only 3 behind"):
        check(
            heard, published, GROUP, own=frozenset(["1", SECRET, "3"]), reasons=["expired"],
            window=4,
        )  # fmt: skip


@pytest.mark.parametrize("is_seen", [True, False])
def test_what_nobody_has_received_is_missed_if_its_sender_was_told(is_seen: bool) -> None:
    """The word of the sender counts, and where it has none, that of another client."""
    published, heard = life()
    lost = published.begin(GROUP, "ada")
    lost.is_stored = not is_seen
    if is_seen:
        published.places[GROUP]["ada", lost.n] = ("e", 99)
        published._sorted = None
    with pytest.raises(Hole):
        check(
            heard, published, GROUP, own=frozenset(["1", SECRET, "3"]), reasons=["expired"],
            window=3,
        )  # fmt: skip


def test_two_clients_that_disagree_are_found() -> None:
    """A message has one place, and a place one message."""
    published, _ = life()
    witness = published.followers[0]
    place = messages(witness.heard[GROUP])[-1]
    witness.heard[GROUP][place] = attrs.evolve(witness.heard[GROUP][place], at="e.99")
    with pytest.raises(AssertionError, match="is at"):
        published.note_places()
