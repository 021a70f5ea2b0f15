"""The section "envelope and message": frames to envelopes, classes to messages."""

import collections
import dataclasses
import enum
import json
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple, TypedDict

import attrs
import falcon.asgi
import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import pachinko
from pachinko import _BRACKETS_AND_IDS as BRACKETS_AND_IDS
from pachinko import _MAX_DEPTH as MAX_DEPTH
from pachinko import (
    BadFrame,
    Envelope,
    Frame,
    Hub,
    Pachinko,
    PachinkoError,
    check_type,
    decode_or_error,
    id_in,
    message,
    message_type,
    split_message,
)


def refused(text: str) -> BadFrame:
    """What is wrong with *text*."""
    found = decode_or_error(text)
    assert isinstance(found, BadFrame)
    return found


def decode(text: str) -> Frame:
    """The content of *text*, which is right."""
    found = decode_or_error(text)
    assert isinstance(found, Frame)
    return found


OPEN = '{"k": '


def arrays(depth: int) -> str:
    """A frame whose payload makes it *depth* levels deep."""
    return f'{{"type": "t", "payload": {"[" * (depth - 1)}{"]" * (depth - 1)}}}'


def objects(depth: int) -> str:
    """The same of objects."""
    return f'{{"type": "t", "payload": {OPEN * (depth - 1)}1{"}" * (depth - 1)}}}'


# decode: good frames


def test_a_frame_has_type_id_and_payload() -> None:
    """All three keys are read."""
    frame = decode('{"type": "say", "id": 7, "payload": {"text": "hi"}}')
    assert (frame.type, frame.id, frame.payload) == ("say", 7, {"text": "hi"})


def test_only_the_type_is_required() -> None:
    """Without them there is no id, and no payload, which is not the same as null."""
    frame = decode('{"type": "say"}')
    assert (frame.id, frame.payload) == (None, msgspec.UNSET)


def test_a_null_payload_is_a_payload() -> None:
    """``"payload": null`` differs from none."""
    assert decode('{"type": "say", "payload": null}').payload is None


@pytest.mark.parametrize("id", [0, -1, 2**53, "", "a", "7", "é"])
def test_an_id_is_kept_as_it_is(id: Any) -> None:
    """An id is a string or an integer, and stays the one that it is."""
    found = decode(json.dumps({"type": "t", "id": id})).id
    assert (found, type(found)) == (id, type(id))


def test_a_null_id_is_none() -> None:
    """``"id": null`` is no id."""
    assert decode('{"type": "t", "id": null}').id is None


def test_unknown_keys_are_ignored() -> None:
    """A newer client may send more."""
    frame = decode('{"v": 2, "type": "t", "group": {"deep": [1]}, "more": true}')
    assert frame == decode('{"type": "t"}')


def test_of_duplicate_keys_the_last_counts() -> None:
    """Duplicate keys are read as JavaScript and Python read them."""
    frame = decode('{"type": "a", "payload": 1, "id": 1, "type": "b", "payload": 2, "id": 2}')
    assert (frame.type, frame.id, frame.payload) == ("b", 2, 2)


def test_the_order_of_keys_is_free() -> None:
    """The type may come last."""
    assert decode('{"payload": [1], "id": 1, "type": "t"}').type == "t"


def test_an_empty_type_is_a_string() -> None:
    """The empty type is an envelope; there is merely no handler for it."""
    assert decode('{"type": ""}').type == ""


def test_white_space_around_a_frame_is_allowed() -> None:
    """JSON allows white space around a value."""
    assert decode(' \r\n\t{"type": "t"}\n').type == "t"


@pytest.mark.parametrize("number", [2**63, 2**64, -(2**70), 10**400])
def test_a_huge_integer_is_an_integer(number: int) -> None:
    """An integer is not bound to 64 bits."""
    assert decode(f'{{"type": "t", "payload": {number}}}').payload == number


# decode: bad frames


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "hello", "{", '{"type": "t"', '{"type": "t",}', "{'type': 't'}", '{"type"}',
        '{"type": "t"} x', '{"type": "t"}{"type": "t"}', '\ufeff{"type": "t"}', "\x00",
        '{"type": "t", "payload": NaN}', '{"type": "t", "payload": Infinity}',
        '{"type": "t", "payload": -Infinity}', '{"type": "t", "payload": 1e999}',
        '{"type": "t", "payload": 01}', '{"type": "t", "payload": .5}', '{"type": "t\n"}',
        '{"type": "t", "payload": "\\x"}', '{"type": "t", "payload": "\\ud800"}',
        '{"type": "\\udfff"}', '{"type": "t", "payload": "\ud800"}', '{"type": "\udfff"}',
        '{"type": "t"} // comment', '{"type": "t", "payload": undefined}',
    ],
)  # fmt: skip
def test_what_is_not_json_is_refused(text: str) -> None:
    """Text that is no JSON, lone surrogates and non-finite numbers included, is `invalid_json`."""
    bad = refused(text)
    assert (bad.code, bad.id) == ("invalid_json", None)
    assert bad.message and "$" not in bad.message  # a path would be the decoder's


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("[]", "array"), ("null", "null"), ("true", "bool"), ("1", "int"), ("1.5", "float"),
        ('"say"', "str"), ('[{"type": "say"}]', "array"),
    ],
)  # fmt: skip
def test_what_is_not_an_object_is_refused(text: str, kind: str) -> None:
    """JSON that is no object is `invalid_envelope`, which says what came instead."""
    bad = refused(text)
    assert (bad.code, bad.id) == ("invalid_envelope", None)
    assert bad.message == f'a message is an object with a "type", got {kind}'


@pytest.mark.parametrize(
    ("frame", "found"),
    [
        ({}, "none"), ({"payload": 1}, "none"), ({"Type": "t"}, "none"), ({"type": None}, "null"),
        ({"type": 1}, "int"), ({"type": True}, "bool"), ({"type": 1.5}, "float"),
        ({"type": ["t"]}, "array"), ({"type": {"t": 1}}, "object"),
    ],
)  # fmt: skip
def test_a_type_that_is_no_string_is_refused(frame: dict[str, Any], found: str) -> None:
    """A frame needs a type, and it is a string."""
    bad = refused(json.dumps(frame))
    assert (bad.code, bad.id) == ("invalid_envelope", None)
    assert bad.message == f'"type" is a string, got {found}'


@pytest.mark.parametrize("id", [7, 0, "seven", "", 2**70])
@pytest.mark.parametrize("type", [{}, {"type": 1}, {"type": None}])
def test_the_error_for_a_bad_type_has_the_id(id: Any, type: dict[str, Any]) -> None:
    """A client that sent an id is answered under it, although the type is unusable."""
    assert refused(json.dumps({**type, "id": id})).id == id


@pytest.mark.parametrize(
    ("id", "found"),
    [
        (1.5, "float"), (1e30, "float"), (True, "bool"), (False, "bool"), ([], "array"),
        ([1], "array"), ({}, "object"), ({"a": 1}, "object"),
    ],
)  # fmt: skip
def test_an_id_of_another_kind_is_refused(id: Any, found: str) -> None:
    """An id is a string or an integer; what else came is not echoed."""
    bad = refused(json.dumps({"type": "t", "id": id}))
    assert (bad.code, bad.id) == ("invalid_envelope", None)
    assert bad.message == f'"id" is a string or an integer, got {found}'


@pytest.mark.parametrize("keys", ['"id":[],"id":7,"type":"t"', '"type":5,"id":7,"type":"t"'])
def test_a_bad_value_in_front_of_a_good_one_is_refused(keys: str) -> None:
    """The text says why, for the last value alone would do; the id is answered."""
    bad = refused(f"{{{keys}}}")
    assert (bad.code, bad.id) == ("invalid_envelope", 7)
    assert bad.message == '"type" or "id" is there twice'


def test_with_a_bad_type_and_a_bad_id_neither_is_used() -> None:
    """Both wrong: the type is reported, the id is not echoed."""
    bad = refused('{"type": 1, "id": [1]}')
    assert (bad.code, bad.id) == ("invalid_envelope", None)


# decode: the id of a frame that is no JSON


DEEP = "[" * 5_000 + "]" * 5_000


@pytest.mark.parametrize("id", [1, 0, -5, 2**70, "a", "", "é", '"]}{[,\\', "\U0001f600", "a\nb"])
@pytest.mark.parametrize(
    "wrong",
    [
        r'{"text":"\ud83d"}', r'["\ude00\ud83d"]', r'{"\ud83d":1}', r'"\ud83dx"', "1e400",
        "-1e400", "NaN",
        "[1,Infinity]", '"' + "\ud83d" + '"', '"' + "x" * 20_000 + r'\ud83d"',
        "[" * 128 + "]" * 128,
        DEEP, '{"a":' * 5_000 + "1" + "}" * 5_000, "9" * 5_000, r'"\x"', "01", "undefined",
        "{'a':1}",
        '{"id":"inner","a":1e400}', '[{"id":5}, 1e400]', '"\\"id\\":5," x', '"\n"', "1 2",
    ],
)  # fmt: skip
def test_the_error_has_the_id_although_the_payload_is_wrong(id: Any, wrong: str) -> None:
    """Whatever is wrong in the payload, a client's request is answered, before or behind it."""
    for ascii in (True, False):
        member = f'"id": {json.dumps(id, ensure_ascii=ascii)}'
        for text in (
            f'{{"type":"say",{member} ,"payload":{wrong}}}', f'{{"payload":{wrong},{member}}}',
            f' {{\n{member}\t,"payload":{wrong}}}',
        ):  # fmt: skip
            bad = refused(text)
            assert (bad.code, bad.id, type(bad.id)) == ("invalid_json", id, type(id)), text


@pytest.mark.parametrize(
    ("text", "id"),
    [
        ('{"id":1} x', 1), ('{"id":1}{"id":2}', 1), ('{"type":"t"}{"id":2}', None),
        ('{"id":7,"payload":"cut', 7), ('{"id":12,"payl', 12), ('{"id":12', None),
        ('{"id":"1', None),
        ('{"id":1,"id":"b","x":NaN}', "b"), ('{"id":1,"id":[2],"x":NaN}', None),
        ('{"id":[1],"id":2,"x":NaN}', 2), (r'{"\u0069d":1,"x":NaN}', 1),
        (r'{"i\u0064":1,"x":NaN}', 1),
        ('{"id":null,"x":NaN}', None), ('{"id":1.5,"x":NaN}', None), ('{"id":1e3,"x":NaN}', None),
        ('{"id":true,"x":NaN}', None), ('{"id":[],"x":NaN}', None), ('{"id":{},"x":NaN}', None),
        (r'{"id":"\ud83d","x":NaN}', None), ('{"id":"\ud83d","x":NaN}', None),
        ('{"id":01,"x":1}', None),
        (f'{{"id":{"9" * 5_000},"x":NaN}}', None), ('{"a":{"id":1},"x":NaN}', None),
        ('{"a":[{"id":1,"b":2}],"x":NaN}', None), ('{"a":"id","b":1,"x":NaN}', None),
        (r'{"a":"\"id\":1,","x":NaN}', None), ('["id":1,]', None), ('[{"id":1,"x":NaN}]', None),
        ('x{"id":1,}', None), ('"id":1,', None), ("{'id':1,}", None), ('{"ID":1,"x":NaN}', None),
        ('{"a":{},"id":1,"b":[],"x":NaN}', 1), ('{"a":[]],"id":1,}', None), ("[" * 9_999, None),
        ("", None),
    ],
)  # fmt: skip
def test_the_id_is_the_frames_own_and_a_legal_one(text: str, id: Any) -> None:
    """An id inside of the payload, one that is cut off, and what is no id are not answered."""
    bad = refused(text)
    assert (bad.code, bad.id) == ("invalid_json", id)


MIB = 1 << 20
BUSY = [
    ("[]", 7), ("{}", 7), ("[1],", 7), ('{"id":1},', 7), ('"a":[{}],', 7), (",", 7), ('"', 7),
    ('"id":1,', 1), (r'"\u0069d":"a",', "a"), ('"id":', None),
]  # fmt: skip


@pytest.mark.parametrize(("busy", "id"), BUSY)
def test_reading_an_id_takes_few_steps(busy: str, id: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame of 1 MiB holds nobody up, and an early id in it is found."""
    text, steps = f'{{"id":7,"a":{(busy * MIB)[:MIB]}', []

    def finditer(text: str) -> Iterator[re.Match[str]]:
        for match in BRACKETS_AND_IDS.finditer(text):
            steps.append(match.end())
            yield match

    monkeypatch.setattr(pachinko, "_BRACKETS_AND_IDS", SimpleNamespace(finditer=finditer))
    assert id_in(text) == id
    assert len(steps) <= 20_000


@given(st.text('[]{}",:\\id 1', max_size=40))
def test_reading_an_id_never_fails(text: str) -> None:
    """Any text has an id or none; that of an envelope which is JSON is found as well."""
    assert type(id_in(text)) in (str, int, type(None))


@given(st.integers() | st.text(), st.dictionaries(st.text("id", max_size=3), st.text(), max_size=3))
def test_the_id_of_json_is_read_alike(id: Any, rest: dict[str, Any]) -> None:
    """Where a frame is JSON, both ways find one id."""
    text = json.dumps({**rest, "id": id, "payload": rest})
    assert id_in(text) == decode(json.dumps({**json.loads(text), "type": "t"})).id


# decode: depth


@pytest.mark.parametrize("nested", [arrays, objects])
def test_a_frame_may_nest_up_to_the_limit(nested: Any) -> None:
    """At the limit a frame is read."""
    assert decode(nested(MAX_DEPTH)).type == "t"


@pytest.mark.parametrize("nested", [arrays, objects])
@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 900, 5_000, 100_000])
def test_a_frame_may_not_nest_deeper(nested: Any, depth: int) -> None:
    """Over it, a frame is `invalid_json`, however deep it is."""
    bad = refused(nested(depth))
    assert (bad.code, bad.message) == ("invalid_json", f"nested deeper than {MAX_DEPTH} levels")


def test_depth_counts_under_unknown_keys() -> None:
    """A key that is ignored does not hide a deep value."""
    assert refused(f'{{"x": {"[" * 300}{"]" * 300}, "type": "t"}}').code == "invalid_json"


def test_unclosed_brackets_are_refused() -> None:
    """A flood of opening brackets is no JSON, and no crash."""
    assert refused("[" * 100_000).code == "invalid_json"


@pytest.mark.parametrize("brackets", ["[" * 1000, "{" * 1000, '\\"[{' * 500, "\\\\[" * 500])
def test_brackets_in_strings_do_not_nest(brackets: str) -> None:
    """Text may hold any number of brackets, beside escaped quotes and backslashes."""
    frame = decode(f'{{"type": "t", "payload": ["{brackets}", [1]], "{brackets}": 1}}')
    assert frame.payload == [json.loads(f'"{brackets}"'), [1]]


def test_brackets_in_strings_do_not_hide_depth() -> None:
    """Closing brackets in text do not make a frame flat."""
    text = '["]]]]", ' * 300 + "1" + "]" * 300
    assert refused(f'{{"type": "t", "payload": {text}}}').code == "invalid_json"


def test_many_flat_brackets_do_not_nest() -> None:
    """A long list of lists is not deep."""
    assert len(decode(f'{{"type": "t", "payload": {[[]] * 1000}}}').payload) == 1000


# decode: properties


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip
ANY_TEXT = st.text(st.characters(exclude_categories=()))  # lone surrogates too


@given(ANY_TEXT | st.text('[]{}",:\\ntuidype 01', max_size=30))
@example("\ud800")
@example('"\\')
def test_decode_raises_only_bad_frame_for_text(text: str) -> None:
    """Whatever the text, it is an envelope or a `BadFrame` with one of two codes."""
    found = decode_or_error(text)
    if isinstance(found, Frame):
        assert isinstance(found.type, str)
        return
    assert refused(text).code in ("invalid_json", "invalid_envelope")


@given(JSON | st.fixed_dictionaries({}, optional={"type": JSON, "id": JSON, "payload": JSON}))
def test_decode_takes_exactly_the_envelopes(value: Any) -> None:
    """Of all JSON values, objects with a string type and a proper id are taken, and unchanged."""
    good = (
        isinstance(value, dict)
        and isinstance(value.get("type"), str)
        and type(value.get("id")) in (int, str, type(None))
    )
    text = json.dumps(value)
    if good:
        frame = decode(text)
        assert (frame.type, frame.id) == (value["type"], value.get("id"))
        assert frame.payload == value.get("payload", msgspec.UNSET)
    else:
        assert refused(text).code == "invalid_envelope"


@pytest.mark.parametrize("field", ["type", "id", "payload"])
def test_an_envelope_is_read_only(field: str) -> None:
    """Middleware sees the message and cannot change it."""
    envelope = Envelope("say", {"text": "hi"}, 7)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(envelope, field, None)


# message


def test_a_plain_class_becomes_frozen_attrs() -> None:
    """A plain annotated class gets a constructor, equality and read-only fields."""

    @message("say")
    class Say:
        text: str
        loud: bool = False

    said = Say("hi")  # type: ignore[call-arg]
    assert attrs.has(Say)
    assert said == Say("hi", loud=False)  # type: ignore[call-arg]
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        said.text = "ho"


def test_a_plain_class_keeps_its_methods() -> None:
    """Methods, properties and class attributes without an annotation stay what they are."""

    @message("say")
    class Say:
        text: str
        LIMIT = 3

        def short(self) -> str:
            return self.text[: self.LIMIT]

    assert Say("hello").short() == "hel"  # type: ignore[call-arg]


def test_a_class_without_fields_is_a_message() -> None:
    """A message may consist of its type alone."""

    @message("ping")
    class Ping:
        pass

    assert attrs.fields(Ping) == ()
    assert Ping() == Ping()


def test_attrs_fields_work_in_a_plain_class() -> None:
    """`attrs.field` does in a plain class what it does in an attrs class."""

    @message("say")
    class Say:
        tags: list[str] = attrs.field(factory=list)

    assert Say().tags == []


def test_an_attrs_class_is_only_tagged() -> None:
    """An attrs class stays as mutable as its author made it."""

    @attrs.define
    class Say:
        text: str

    tagged = message("say")(Say)
    assert tagged is Say
    said = Say("hi")
    said.text = "ho"
    assert message_type(Say) == "say"


def test_a_dataclass_is_only_tagged() -> None:
    """A dataclass stays a dataclass."""

    @dataclasses.dataclass
    class Say:
        text: str

    assert message("say")(Say) is Say
    assert not attrs.has(Say)
    assert message_type(Say) == "say"


def test_a_subclass_does_not_inherit_the_type() -> None:
    """Each message class has a type of its own or none."""

    @message("say")
    class Say:
        text: str

    class Shout(Say):
        pass

    assert (message_type(Say), message_type(Shout)) == ("say", None)


def test_a_subclass_may_have_a_type_of_its_own() -> None:
    """A plain subclass of a message is a message with the fields of both."""

    @message("say")
    class Say:
        text: str

    @message("shout")
    class Shout(Say):
        times: int

    assert [field.name for field in attrs.fields(Shout)] == ["text", "times"]
    assert (message_type(Say), message_type(Shout)) == ("say", "shout")


class OwnMeta(type):
    pass


class Typed(TypedDict):
    text: str


class Pair(NamedTuple):
    a: int


class Struct(msgspec.Struct):
    text: str


class Color(enum.Enum):
    RED = 1


class ModelLike(metaclass=OwnMeta):
    text: str


class OwnInit:
    def __init__(self, text: str) -> None:
        self.text = text


class OwnNew:
    def __new__(cls, text: str) -> Any:
        return object.__new__(cls)


@dataclasses.dataclass
class Data:
    text: str


class SubData(Data):
    more: int


class SubInit(OwnInit):
    more: int


class SubList(list):  # type: ignore[type-arg]
    text: str


class SubError(Exception):
    text: str


@pytest.mark.parametrize(
    "cls",
    [
        Typed, Pair, Color, ModelLike, OwnInit, OwnNew, SubData, SubInit, SubList, SubError,
    ],
)  # fmt: skip
def test_other_classes_are_refused(cls: Any) -> None:
    """What has its own idea of fields or construction is refused, with what to write."""
    with pytest.raises(PachinkoError, match=f"class {cls.__name__}: text: str") as caught:
        message("say")(cls)
    assert "attrs class or a dataclass" in str(caught.value)
    assert message_type(cls) is None


def test_an_attrs_subclass_with_its_own_constructor_is_refused() -> None:
    """A constructor of one's own is refused also below an attrs class."""

    @attrs.define
    class Base:
        text: str

    class Sub(Base):
        def __init__(self) -> None:
            super().__init__("hi")

    with pytest.raises(PachinkoError, match="constructor"):
        message("say")(Sub)


@pytest.mark.parametrize("other", [5, len, "a function", None])
def test_what_is_no_class_is_refused(other: Any) -> None:
    """Only a class is tagged."""
    with pytest.raises(PachinkoError, match=r"@message.* class"):
        message("say")(other)


def test_message_without_a_type_is_refused() -> None:
    """``@message`` without parentheses says what is missing."""
    with pytest.raises(PachinkoError, match=r'write @message\("say"\) above .*Typed'):
        message(Typed)  # type: ignore[arg-type]


@pytest.mark.parametrize("type", [None, 5, b"say", ["say"]])
def test_a_type_that_is_no_text_is_refused(type: Any) -> None:
    """A type is a str."""
    with pytest.raises(PachinkoError, match=r'write @message\("say"\)'):
        message(type)


RESERVED = [
    "", "error", "complete", "gap", "resume", "authenticate", "$", "$sys", "$.x", ".reply",
    "say.reply", "a.b.reply",
]  # fmt: skip


@pytest.mark.parametrize("type", RESERVED)
def test_reserved_types_are_refused(type: str) -> None:
    """The library's own types are refused where the class is made."""
    with pytest.raises(PachinkoError, match="reserved") as caught:
        message(type)
    assert str(caught.value).startswith(repr(type))
    assert 'choose another message type, such as "chat.say"' in str(caught.value)


@pytest.mark.parametrize(
    "type", ["errors", "Error", "complete.x", "reply", "a.reply.b", "x$", "über", "a b", "on_x"]
)
def test_other_types_are_free(type: str) -> None:
    """Whatever is not reserved may be a type."""
    check_type(type)


def test_local_text_annotations_are_resolved() -> None:
    """A class local to a function may name its neighbours in text annotations."""

    @attrs.define
    class Point:
        x: int

    @message("line")
    class Line:
        start: "Point"
        via: "list[Point]"

    assert [field.type for field in attrs.fields(Line)] == [Point, list[Point]]


def test_local_text_annotations_of_a_dataclass_are_resolved() -> None:
    """The same for a dataclass."""

    @attrs.define
    class Point:
        x: int

    @message("line")
    @dataclasses.dataclass
    class Line:
        start: "Point"

    assert [field.type for field in dataclasses.fields(Line)] == [Point]


def test_a_class_may_name_one_that_comes_later() -> None:
    """A forward reference is left for the registration of a handler, which resolves it."""

    @message("tree")
    class Tree:
        root: "Node"

    @attrs.define
    class Node:
        label: str

    ws = Pachinko(hub=Hub())

    @ws.on(Tree)
    async def plant(conn: Any, tree: Tree) -> None: ...

    assert attrs.fields(Tree).root.type is Node


def test_a_class_may_name_itself() -> None:
    """A recursive message is resolved."""

    @message("node")
    class Node:
        children: "list[Node]"

    ws = Pachinko(hub=Hub())

    @ws.on(Node)
    async def grow(conn: Any, node: Node) -> None: ...

    assert attrs.fields(Node).children.type == list[Node]


# split_message


@message("said")
class Said:
    text: str


class Louder(Said):
    pass


def test_a_message_object_is_its_own_payload() -> None:
    """An object of a tagged class brings its type along."""
    said = Said("hi")  # type: ignore[call-arg]
    assert split_message(said, None) == ("said", said)


@pytest.mark.parametrize("payload", [None, 0, "", [], {"a": 1}])
def test_a_type_and_a_payload(payload: Any) -> None:
    """A type goes with any payload, or none."""
    assert split_message("tick", payload) == ("tick", payload)


def test_a_type_may_have_blanks_when_a_payload_shows_that_it_is_one() -> None:
    """What is told apart by its blanks is a lone text."""
    assert split_message("hello world", 1) == ("hello world", 1)


@pytest.mark.parametrize("text", ["hello world", "hello\nworld", "a\tb", " ", ""])
def test_a_text_instead_of_a_message_is_refused(text: str) -> None:
    """A text with blanks is no type: the hint shows the type that it lacks."""
    with pytest.raises(TypeError) as caught:
        split_message(text, None)
    assert str(caught.value) == f'{text!r} is no message type; write send("text", {text!r})'


def test_a_message_object_with_a_payload_is_refused() -> None:
    """A message object is whole."""
    with pytest.raises(TypeError, match="Said is a whole message; send it without a payload"):
        split_message(Said("hi"), {"more": 1})  # type: ignore[call-arg]


@pytest.mark.parametrize("other", [None, 5, b"say", {"type": "say"}, ["say"], Said, Data("hi")])
def test_what_is_no_message_is_refused(other: Any) -> None:
    """Anything else is refused with both right forms. Only a class is shown itself."""
    with pytest.raises(TypeError, match=r'@message\("…"\).* send\("said", {"text": "hi"}\)') as exc:
        split_message(other, None)
    named = repr(Said) if other is Said else type(other).__name__
    assert str(exc.value).endswith(f"got {named}")


@pytest.mark.parametrize("given", [b"ab", bytearray(b"ab"), memoryview(b"a-b-")[::2]])
def test_bytes_have_no_type(given: Any) -> None:
    """Where they are taken, what may change is copied. A payload beside them is a mistake."""
    assert split_message(given, None, takes_bytes=True) == ("", b"ab")
    _, taken = split_message(given, None, takes_bytes=True)
    assert type(taken) is bytes and (taken is given) == (type(given) is bytes)
    with pytest.raises(TypeError, match="bytes go out alone, as a binary frame; write send"):
        split_message(given, {}, takes_bytes=True)
    for payload in (None, {}):
        with pytest.raises(TypeError, match=f"got {type(given).__name__}$"):
            split_message(given, payload)


def test_an_object_of_an_untagged_subclass_is_refused() -> None:
    """A subclass has no type, so that its object is no message."""
    with pytest.raises(TypeError, match="got Louder"):
        split_message(Louder("hi"), None)  # type: ignore[call-arg]


def test_the_module_level_classes_stay_usable_in_an_app() -> None:
    """A tagged class is what ``@ws.on`` takes."""
    ws = Pachinko(falcon.asgi.App(), "/ws", hub=Hub())

    @ws.on(Said)
    async def said(conn: Any, msg: Said) -> None: ...


class Kind(enum.Enum):
    ONE = 1


@attrs.frozen
class Whole:
    text: str


SHARED: list[tuple[Any, str]] = [
    ([], "list"), ({}, "dict"), (set(), "set"), ([1], "lambda: list(...)"),
    ({"a": 1}, "lambda: dict(...)"), (collections.deque([1]), "lambda: deque(...)"),
    (bytearray(b"a"), "lambda: bytearray(...)"),
    (collections.defaultdict(list, a=[]), "lambda: defaultdict(...)"),
    (Data("hi"), "lambda: Data(...)"),
]  # fmt: skip


@pytest.mark.parametrize("made", [lambda cls: cls, attrs.define, attrs.frozen])
@pytest.mark.parametrize(
    "field", [lambda default: default, lambda default: attrs.field(default=default)]
)
@pytest.mark.parametrize(("default", "factory"), SHARED, ids=str)
def test_a_shared_default_is_refused(default: Any, factory: str, field: Any, made: Any) -> None:
    """All messages would change it together; the text shows the factory."""

    class Say:
        tags: Any = field(default)

    with pytest.raises(PachinkoError, match=re.escape(f" attrs.field(factory={factory})`")):
        message("say")(made(Say))


def test_a_shared_default_of_a_base_class_is_refused() -> None:
    """Its messages share it as well."""

    @attrs.define
    class Base:
        tags: list[str] = []  # noqa: RUF008 - the mistake

    class Say(Base):
        text: str = ""

    with pytest.raises(PachinkoError, match=r"share the default of Say\.tags"):
        message("say")(Say)


@pytest.mark.parametrize(
    "default",
    [None, 5, "x", (), frozenset(), Kind.ONE, msgspec.UNSET, attrs.Factory(list), Whole("hi")],
    ids=str,
)  # fmt: skip
def test_a_default_that_nobody_can_change_is_shared(default: Any) -> None:
    """So is a factory, which makes a new value each time."""

    class Say:
        tags: Any = default

    assert message("say")(Say) is not None
