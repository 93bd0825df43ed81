"""Constrained decoding: from a JSON schema or tool definitions to a mask over the next token.

Grammars are llguidance's (a Lark dialect with embedded JSON schemas); vLLM takes the same text, so both servers allow
the same answers. Whitespace inside JSON is the single space that Python's `json.dumps` writes: a model that likes to
indent cannot go on for ever between two tokens that mean something.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import llguidance.hf
import torch
from llguidance import LLMatcher
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from smolkit.errors import UserError
from smolkit.text_stream import CALL_CLOSE, CALL_OPEN

JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MAX_CALLS = 8  # tool calls of one constrained answer
# Levels of a schema in each other, through its references. llguidance follows them by recursion: in a thread's usual
# 8 MiB it comes to 1,600, and then the process ends.
MAX_LEVELS = 400


@dataclass(frozen=True)
class Grammar:
    """A compiled constraint. `text` is what vLLM is given; `mask` starts one answer under it."""

    text: str
    matcher: LLMatcher

    def mask(self) -> "TokenMask":
        return TokenMask(self.matcher.deep_copy())


class TokenMask:
    """Which tokens may come next in one answer."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def failed(self) -> bool:
        """Whether the grammar outgrew llguidance's limits; nothing but the end of the answer is allowed then."""
        return self._matcher.is_error()

    def apply(self, logits: Tensor) -> Tensor:
        """logits (V,) -> the same with -inf where the grammar does not allow the token."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8).bool()
        blocked = torch.ones(len(logits), dtype=torch.bool)
        blocked[: len(allowed)] = ~allowed[: len(logits)]
        return logits.masked_fill(blocked.to(logits.device), -torch.inf)

    def advance(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)


class Grammars:
    """Compiles constraints for one tokenizer. Compiling takes milliseconds: not on an event loop."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._vocabulary = llguidance.hf.from_tokenizer(tokenizer, len(tokenizer))
        added = tokenizer.get_added_vocab()
        # The tag as its token where there is one, because that is what the model was trained to write.
        self._open, self._close = (
            f"<[{added[tag]}]>" if tag in added else json.dumps(tag) for tag in (CALL_OPEN, CALL_CLOSE)
        )

    def compile(
        self,
        schema: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        single_call: bool = False,
    ) -> Grammar:
        """An answer that is JSON by `schema`, or calls of `tools` (OpenAI's objects), or either where both are given.

        Raises `UserError` for a schema that is wrong or uses what llguidance does not implement.
        """
        rules, answers = [], []
        if schema is not None:
            rules.append(_rule("json", _embedded(schema)))
            answers.append("json")
        if tools:
            answers.append("call" if single_call else f'call ("\\n" call){{0,{MAX_CALLS - 1}}}')
            rules.append(_rule("call", " | ".join(f"call{i}" for i in range(len(tools)))))
        for number, tool in enumerate(tools):
            function = tool["function"]
            name, arguments = _embedded({"const": function["name"]}), _embedded(_arguments(function))
            head, middle, tail = map(json.dumps, ('\n{"name": ', ', "arguments": ', "}\n"))
            rules.append(_rule(f"call{number}", f"{self._open} {head} name{number} {middle} args{number} {tail}"
                               f" {self._close}"))  # fmt: skip
            rules += [_rule(f"name{number}", name), _rule(f"args{number}", arguments)]
        text = "\n".join([_rule("start", " | ".join(answers)), *rules])
        matcher = LLMatcher(self._vocabulary, text, log_level=0)
        if matcher.is_error():
            raise UserError(f"the schema cannot be used to constrain an answer: {_reason(matcher.get_error())}")
        return Grammar(text, matcher)


def _rule(name: str, body: str) -> str:
    return f"{name}: {body}"


def _embedded(schema: Mapping[str, Any]) -> str:
    """The schema as a rule's body; `UserError` where it is deeper than llguidance may be given."""
    if (levels := _levels(schema)) > MAX_LEVELS:
        raise UserError(
            f"the schema is up to {levels} levels deep, references followed, and the limit is {MAX_LEVELS}: let fewer "
            "of its parts refer to each other"
        )
    return "%json " + json.dumps({**schema, "x-guidance": JSON_OPTIONS})


def _levels(schema: Mapping[str, Any]) -> int:
    """How deep llguidance may go in a schema, at most: it follows each reference once, wherever it meets it first.

    That is the longest way through references that leads nowhere twice. Only a bound of it is cheap to find: parts
    that refer to each other in a circle, and those between two circles, count as if one way led through all of them.
    """
    old = ("id",) if "draft-04" in str(schema.get("$schema")) else ()
    deepest, references, plain = _extent(schema, ("$id", "$schema", *old))
    targets = {reference: _target(schema, reference) for reference in {*references}}
    if not plain or None in targets.values():  # who knows what they name: each may lead through everything
        return deepest * (1 + len(references))
    extents = {id(target): _extent(target) for target in targets.values()}
    own = {reference: extents[id(target)] for reference, target in targets.items()}
    sizes = {reference: extent[0] for reference, extent in own.items()}
    after = {reference: {*extent[1]} for reference, extent in own.items()}
    below, others = _longest_way(after, sizes)
    before: dict[str, set[str]] = {reference: set() for reference in others}
    for reference in others:
        for later in after[reference] & others:
            before[later].add(reference)
    above, circles = _longest_way(before, sizes)
    return deepest + above + sum(sizes[reference] for reference in circles) + below


def _extent(schema: Any, bases: Sequence[str] = ()) -> tuple[int, list[str], bool]:
    """Of a part of a schema: its levels; the references in it; whether no part of it has one of the keys `bases`, in
    which "#/..." would mean another schema."""
    level, levels, references, plain = [schema], 0, [], True
    while level:
        below: list[Any] = []
        for part in level:
            if isinstance(part, Mapping):
                references += [part["$ref"]] if isinstance(part.get("$ref"), str) else []
                plain &= levels == 0 or not any(isinstance(part.get(name), str) for name in bases)
            values = part.values() if isinstance(part, Mapping) else part
            below += [value for value in values if isinstance(value, (Mapping, list))]
        level, levels = below, levels + 1
    return levels, references, plain


def _target(schema: Any, reference: str) -> Any:
    """What a reference of the form "#/..." names; None where it has another one or names nothing."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    for step in unquote(reference).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, Mapping):
            schema = schema.get(step)
        elif isinstance(schema, list) and step.isascii() and step.isdigit() and len(step) < 10:
            schema = schema[int(step)] if int(step) < len(schema) else None
        else:
            return None
    return schema if isinstance(schema, (Mapping, list)) else None


def _longest_way(after: Mapping[str, set[str]], sizes: Mapping[str, int]) -> tuple[int, set[str]]:
    """(the longest way through nodes from which none leads into a circle, the other nodes); `after`: graph."""
    before: dict[str, list[str]] = {node: [] for node in after}
    for node, later in after.items():
        for each in later:
            before[each].append(node)
    left, ways = {node: len(later) for node, later in after.items()}, dict(sizes)
    ready = [node for node, count in left.items() if not count]
    for node in ready:  # grows meanwhile
        for earlier in before[node]:
            ways[earlier] = max(ways[earlier], sizes[earlier] + ways[node])
            left[earlier] -= 1
            if not left[earlier]:
                ready.append(earlier)
    return max((ways[node] for node in ready), default=0), {*after} - {*ready}


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a call's arguments: always an object, and closed unless the tool says otherwise."""
    schema = {"type": "object", **(function.get("parameters") or {})}
    if schema["type"] != "object":
        raise UserError(f"tool {ascii(function['name'][:64])}: the type of parameters must be 'object'")
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)
    return schema


def _reason(error: str) -> str:
    """llguidance quotes the grammar below its first line."""
    first = error.strip().splitlines()[0]
    return first.partition("failed to compile JSON schema: ")[2] or first
