"""The section "errors": what the program, the client and nobody is to blame for."""

import enum
from typing import Any

import pytest

import pachinko
from pachinko import Close, MessageError, PachinkoError


def test_message_error_holds_its_details() -> None:
    """A `MessageError` keeps the code, the message and whatever else goes to the client."""
    error = MessageError("not_your_turn", "wait for bob", next="bob", in_seconds=3)
    assert (error.code, error.message) == ("not_your_turn", "wait for bob")
    assert error.details == {"next": "bob", "in_seconds": 3}


def test_message_error_needs_only_a_code() -> None:
    """The text of a `MessageError` is optional."""
    error = MessageError("nope")
    assert (error.code, error.message, error.details) == ("nope", "", {})


def test_message_error_reads_as_code_and_message() -> None:
    """A log line shows what the client was told."""
    assert str(MessageError("not_your_turn", "wait for bob")) == "not_your_turn: wait for bob"


@pytest.mark.parametrize(
    "code", [1000, 1001, 1002, 1003, *range(1007, 1015), 3000, 3401, 3999, 4000, 4999]
)
def test_close_takes_the_codes_of_rfc_6455(code: int) -> None:
    """`Close` takes every code that an endpoint may send."""
    assert Close(code).code == code


@pytest.mark.parametrize(
    "code", [-1, 0, 999, 1004, 1005, 1006, 1015, 1016, 2000, 2999, 5000, 65536]
)
def test_close_refuses_the_codes_that_no_endpoint_sends(code: int) -> None:
    """Reserved and unassigned codes are refused where `Close` is made, with those to use."""
    advice = "use 1000, or 4000 to 4999 .* 1000 to 1003, 1007 to 1014 and 3000 to 4999 may be sent"
    with pytest.raises(ValueError, match=rf"^{code} is no close code .* {advice}"):
        Close(code)


def test_a_code_may_be_a_member_of_an_enum() -> None:
    """It is kept as the integer that it is."""

    class Code(enum.IntEnum):
        BANNED = 4403

    close = Close(Code.BANNED)
    assert (close.code, type(close.code), str(close)) == (4403, int, "4403 ")


def test_close_is_normal_by_default() -> None:
    """`Close()` is 1000 without a reason."""
    assert (Close().code, Close().reason) == (1000, "")


@pytest.mark.parametrize("reason", ["x" * 123, "é" * 61, "🂡" * 30])
def test_close_takes_a_reason_that_fits_its_frame(reason: str) -> None:
    """A reason of up to 123 bytes of UTF-8 is taken."""
    assert Close(4000, reason).reason == reason


@pytest.mark.parametrize(
    ("reason", "sent"),
    [
        ("x" * 124, "x" * 123), ("é" * 62, "é" * 61), ("🂡" * 31, "🂡" * 30), ("xé" * 99, "xé" * 41),
        ("x" * 1_000_000, "x" * 123), ("x" * 121 + "é" * 9, "x" * 121 + "é"),
    ],
)  # fmt: skip
def test_close_cuts_a_reason_that_does_not_fit(reason: str, sent: str) -> None:
    """A reason of more than 123 bytes, not characters, is cut between two of its characters."""
    assert Close(4000, reason).reason == sent


@pytest.mark.parametrize(
    ("reason", "sent"),
    [
        ("\ud83d", "\ufffd"), ("a\ud83dz", "a\ufffdz"), ("\ude00\ud83d", "\ufffd\ufffd"),
        ("\ud83d\ude00", "😀"), ("\udcff!", "\ufffd!"), ("\ud83d" * 50, "\ufffd" * 41), (None, ""),
    ],
)  # fmt: skip
def test_close_takes_a_reason_that_is_no_utf8(reason: str | None, sent: str) -> None:
    """Half of a surrogate pair is replaced, and None is no reason: a goodbye does not fail."""
    assert Close(4000, reason).reason == sent


def test_a_reason_is_an_exact_text() -> None:
    """A server may want no subclass of `str`."""

    class Text(str):
        pass

    assert type(Close(4000, Text("bye")).reason) is str


def test_close_reads_as_code_and_reason() -> None:
    """A log line shows code and reason."""
    assert str(Close(4001, "kicked")) == "4001 kicked"


def test_the_three_errors_are_told_apart_by_class() -> None:
    """None of the three is a kind of another, so that ``except`` can tell whose mistake it is."""
    classes = (PachinkoError, MessageError, Close)
    assert all(issubclass(cls, Exception) for cls in classes)
    assert not any(issubclass(a, b) for a in classes for b in classes if a is not b)


@pytest.mark.parametrize("name", pachinko.__all__)
def test_every_public_name_exists(name: str) -> None:
    """What ``__all__`` promises is there, with a docstring."""
    assert getattr(pachinko, name).__doc__


@pytest.mark.parametrize("arguments", [("bye",), (1000, 5), (None,)])
def test_a_close_of_another_kind_shows_the_right_code(arguments: Any) -> None:
    """The code comes first, the reason is text."""
    with pytest.raises(TypeError, match=r'write Close\(4000, "a reason"\)'):
        Close(*arguments)
