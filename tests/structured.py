"""What the tests of payloads share: a type, what comes in as it, and what goes out."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

import pachinko
from pachinko import Codec, MessageError

STRICT = Codec()


def check(annotation: Any, codec: Codec = STRICT) -> Any:
    """Prepare *annotation* as registration does, and return it."""
    annotation = pachinko.hashable(annotation)
    codec.check(annotation, (vars(sys.modules[__name__]), {}), [])
    return annotation


def read(payload: Any, annotation: Any, codec: Codec = STRICT) -> Any:
    """What a handler takes."""
    return codec.structure(payload, check(annotation, codec), "t")


def errors(payload: Any, annotation: Any, codec: Codec = STRICT) -> list[tuple[str, str]]:
    """What is wrong with *payload*: paths after ``$.payload``, and messages."""
    with pytest.raises(MessageError) as caught:
        read(payload, annotation, codec)
    found = caught.value.details["errors"]
    return [(error["path"].removeprefix("$.payload"), error["message"]) for error in found]


def written(value: Any, annotation: Any = None, codec: Codec = STRICT) -> Any:
    """The payload on the wire."""
    type, unstructure = codec.writer_of(value, "t", pachinko.hashable(annotation))
    frame = pachinko._encode(pachinko.Sent(type, payload=unstructure(value)))
    return json.loads(frame).get("payload")


def refused(annotation: Any) -> str:
    """Why a handler with a payload of this type is not registered."""

    async def handler(conn: Any, payload: Any) -> None: ...

    handler.__annotations__["payload"] = annotation
    with pytest.raises(pachinko.PachinkoError) as caught:
        pachinko.Pachinko(hub=pachinko.Hub()).on("t")(handler)
    return str(caught.value)


def like_annotated_types() -> Any:
    """The classes of annotated_types, as far as the library looks at them."""
    module: Any = types.ModuleType("annotated_types")
    base = type("BaseMetadata", (), {"__module__": "annotated_types"})
    fields = {
        "Gt": ["gt"], "Ge": ["ge"], "Lt": ["lt"], "Le": ["le"], "MultipleOf": ["multiple_of"],
        "MinLen": ["min_length"], "MaxLen": ["max_length"], "Timezone": ["tz"],
        "Predicate": ["func"], "Unit": ["unit"], "Unheard": ["of"],
    }  # fmt: skip
    for name, names in fields.items():
        made = dataclasses.make_dataclass(name, names, bases=(base,), frozen=True)
        made.__module__ = "annotated_types"
        setattr(module, name, made)
    called: Any = {"__call__": lambda self, value: True}
    module.Not = dataclasses.make_dataclass("Not", ["func"], namespace=called)
    module.Not.__module__ = "annotated_types"

    class Len:
        __is_annotated_types_grouped_metadata__ = True

        def __init__(self, least: int, most: int | None = None) -> None:
            self.pieces = [module.MinLen(least), module.MaxLen(most)]

        def __iter__(self) -> Iterator[Any]:
            return iter(self.pieces)

    module.Len = Len
    return module
