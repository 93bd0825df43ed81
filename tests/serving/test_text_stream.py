"""Streamed text adds up to the whole text, however the stream is cut."""

import random

import pytest
from transformers import PreTrainedTokenizerFast

from smolkit.chat import parse_tool_calls
from smolkit.text_stream import Detokenizer, StopStrings, ToolCallStream

MIXED = "naïve 光合作用 🚀🌍 x\n"


def test_characters_are_never_split(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode(MIXED, add_special_tokens=False)
    assert len(ids) > len(MIXED) / 2 and any("\ufffd" in tokenizer.decode([i]) for i in ids)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join(pieces) == MIXED
    assert not any("\ufffd" in piece for piece in pieces)
    assert detokenizer.flush() == ""


def test_any_tokens_decode_as_a_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    """Invalid UTF-8 included: the parts add up to decoding everything at once."""
    generator = random.Random(0)
    for _ in range(200):
        ids = [generator.randrange(len(tokenizer)) for _ in range(generator.randrange(1, 40))]
        detokenizer = Detokenizer(tokenizer)
        text = "".join(detokenizer.push(i) for i in ids) + detokenizer.flush()
        assert text == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("one two three", ["two"]),
        ("one two three", ["ee", "three", "t"]),
        ("aaab", ["aab"]),
        ("ababac", ["abac"]),
        ("no stop here", ["xyz", "here!"]),
        ("ends with the beginning of a st", ["stop"]),
        ("中文停止词", ["停止"]),
    ],
)
def test_stop_strings(text: str, stops: list[str]) -> None:
    """Naive reference: cut the whole text at the first occurrence."""
    expected = text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
    for size in range(1, len(text) + 1):
        stream, shown = StopStrings(stops), ""
        for start in range(0, len(text), size):
            shown += stream.push(text[start : start + size])
            assert expected.startswith(shown), "a stop string, or a part of it, leaked"
            if stream.stopped:
                break
        assert shown + stream.flush() == expected
        assert stream.stopped == any(stop in text for stop in stops)


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>'


@pytest.mark.parametrize(
    "text",
    [
        "plain text\n",
        CALL,
        f"Let me see.\n{CALL}",
        f"{CALL}\n{CALL}",
        f"{CALL} and after",
        f"before {CALL}\n\n{CALL}\nafter <tool_",
        "<tool_call>\nnot json\n</tool_call>",
        f"<tool_call>broken</tool_call> then\n{CALL}",
        '<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call>"}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {}}',
        '<tool_call>\n{"name": "f", "argum',
        "a < b and <tool> is none\n",
    ],
)
def test_tool_calls(text: str) -> None:
    for size in (1, 2, 3, 7, 11, len(text)):
        stream, content, calls = ToolCallStream(), "", []
        for start in range(0, len(text), size):
            more, found = stream.push(text[start : start + size])
            content, calls = content + more, calls + found
        more, found = stream.flush()
        assert (content + more, calls + found) == parse_tool_calls(text)


def test_content_before_a_call_is_not_delayed() -> None:
    stream = ToolCallStream()
    assert stream.push("Let me see.\n<tool") == ("Let me see.", [])
    assert stream.push("_call>\n{") == ("", [])
