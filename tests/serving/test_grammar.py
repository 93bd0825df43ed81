"""Schemas that lead far through their references: refused before llguidance runs out of stack, and no others."""

import random
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from smolkit.errors import UserError
from smolkit.grammar import MAX_LEVELS, Grammars, _levels


@pytest.fixture(scope="module")
def grammars(tokenizer: PreTrainedTokenizerFast) -> Grammars:
    return Grammars(tokenizer)


def definitions(*parts: Any) -> dict[str, Any]:
    """A schema that begins with the first of its definitions a0, a1, ...."""
    return {"$defs": {f"a{number}": part for number, part in enumerate(parts)}, "$ref": "#/$defs/a0"}


def to(number: int) -> dict[str, Any]:
    return {"$ref": f"#/$defs/a{number}"}


def chain(length: int, wrap: Any = lambda part: part) -> dict[str, Any]:
    return definitions(*(wrap(to(number + 1)) for number in range(length)), {"type": "null"})


def nested(levels: int, part: Any) -> Any:
    for _ in range(levels):
        part = {"type": "array", "items": part}
    return part


FAR = {
    "plain": chain(5000),
    "circle": definitions(*(to((number + 1) % 5000) for number in range(5000))),
    "properties": chain(1500, lambda part: {"type": "object", "properties": {"x": part}}),
    "options": chain(2000, lambda part: {"anyOf": [part, {"type": "null"}]}),
    "all of": chain(2000, lambda part: {"allOf": [part]}),
    "few, but deep": chain(60, lambda part: nested(50, part)),
    "escaped": {"$defs": {f"a/{i}": {"$ref": f"#/%24defs/a~1{i + 1}"} for i in range(5000)}, "$ref": "#/$defs/a~10"},
    "in a list": {"anyOf": [{"$ref": f"#/anyOf/{i + 1}"} for i in range(5000)] + [{"type": "null"}]},
    "by anchors": definitions(*({"$anchor": f"n{i}", "$ref": f"#n{i + 1}"} for i in range(5000))),
    "by names": definitions(*({"$id": f"http://x/{i}", "$ref": str(i + 1)} for i in range(5000))),
    "by their own name": {"$id": "http://x/r", **chain(5000, lambda part: {"$ref": "http://x/r" + part["$ref"]})},
}


@pytest.mark.parametrize("name", FAR)
def test_schemas_that_lead_too_far(grammars: Grammars, name: str) -> None:
    """Each of them ended the process."""
    with pytest.raises(UserError, match=rf"levels deep, references followed, and the limit is {MAX_LEVELS}: let"):
        grammars.compile(FAR[name])
    tool = {"function": {"name": "f", "parameters": {**FAR[name], "type": "object"}}}
    with pytest.raises(UserError, match="levels deep"):
        grammars.compile(tools=[tool])


LARGE = {
    "many": {"$defs": {f"a{i}": {"type": "object", "properties": {"x": {"enum": [i]}}} for i in range(1000)},
             "type": "object", "properties": {f"p{i}": to(i) for i in range(1000)}},
    "all to one": definitions({"anyOf": [to(i) for i in range(1, 300)]}, *(nested(3, to(300)) for _ in range(1, 300)),
                              {"type": "null"}),
    "a language": definitions(*({"type": "object", "properties": {"x": to(i * 7 % 60), "y": to((i + 1) % 60)}}
                                for i in range(60))),
    "chain": chain(100),
    "itself": {"type": "object", "properties": {"left": {"$ref": "#"}, "id": {"type": "string"}}},
    "named": {"$id": "http://x/r", "$schema": "https://json-schema.org/draft/2020-12/schema", **chain(100)},
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_schemas_that_are_only_large(grammars: Grammars, name: str) -> None:
    assert not grammars.compile(LARGE[name]).mask().failed


def longest(schema: dict[str, Any], part: Any, seen: frozenset[str] = frozenset()) -> int:
    """The naive way: all ways."""
    values = part.values() if isinstance(part, dict) else part if isinstance(part, list) else None
    if values is None:
        return 0
    below = [longest(schema, value, seen) for value in values]
    if isinstance(part, dict) and (name := part.get("$ref")) and name not in seen:
        return max(0, *below, longest(schema, schema["$defs"][name.rpartition("/")[2]], seen | {name})) + 1
    return max([0, *below]) + 1


def test_the_bound_is_one() -> None:
    generator = random.Random(0)
    for _ in range(300):
        count, acyclic = generator.randrange(1, 6), generator.random() < 0.5
        parts = []
        for number in range(count):
            targets = [*range(number + 1, count)] if acyclic else [*range(count)]
            chosen = generator.sample(targets, min(len(targets), generator.randrange(3)))
            parts.append({"anyOf": [nested(generator.randrange(4), to(target)) for target in chosen]})
        schema = definitions(*parts)
        most = longest(schema, schema)
        assert most <= _levels(schema) <= 3 * most
