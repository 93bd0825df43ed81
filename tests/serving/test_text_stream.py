"""Streamed text adds up to the whole text, however the stream is cut."""

import copy
import json
import random
import time
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from smolkit.chat import parse_tool_calls
from smolkit.text_stream import CallPart, Detokenizer, StopStrings, ToolCallStream

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


def test_bytes_that_are_tokens(sentencepiece: PreTrainedTokenizerFast) -> None:
    """An unfinished character decodes to a sign per byte there, and one wrong byte spoils the row."""
    ids = sentencepiece.encode("of light光 ok 🚀🌍!")
    assert "<0xE5>" in sentencepiece.convert_ids_to_tokens(ids)
    detokenizer = Detokenizer(sentencepiece)
    pieces = [detokenizer.push(i) for i in ids] + [detokenizer.flush()]
    assert "".join(pieces) == "of light光 ok 🚀🌍!" and not any("\ufffd" in piece for piece in pieces)
    generator = random.Random(0)
    bytes_and_more = [*range(3, 259)] + 3 * [*range(259, len(sentencepiece))] + 9 * [1, 2, *ids]
    for _ in range(500):
        ids = [generator.choice(bytes_and_more) for _ in range(generator.randrange(1, 40))]
        detokenizer = Detokenizer(sentencepiece)
        text = "".join(detokenizer.push(i) for i in ids) + detokenizer.flush()
        assert text == sentencepiece.decode(ids, skip_special_tokens=True)


def test_characters_that_never_end(tokenizer: PreTrainedTokenizerFast, sentencepiece: PreTrainedTokenizerFast) -> None:
    """Invalid bytes, special tokens and ids that are no tokens, in any order, take as long as they are many."""
    generator = random.Random(1)
    bytes_of = tokenizer.convert_tokens_to_ids(["å", "ħ", "Ģ", "ð", "Ł", "A"])  # E5, 85, 80, F0, 9F and a letter
    nothing = [tokenizer.eos_token_id, len(tokenizer) + 5]
    for kinds in (bytes_of, bytes_of[:5], bytes_of[2:3], bytes_of[:2], bytes_of + nothing, nothing):
        ids = [generator.choice(kinds) for _ in range(400)]
        detokenizer = Detokenizer(tokenizer)
        text = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
    for either, ids in ((tokenizer, nothing), (tokenizer, bytes_of[2:3]), (sentencepiece, [2, 9999])):
        detokenizer, before = Detokenizer(either), time.process_time()
        for number in range(8000):
            detokenizer.push(ids[number % len(ids)])
        assert time.process_time() - before < 1.5, "every token was decoded anew with all before it"


def test_tags_that_are_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of other people's tokenizers: the tags of tool calls and thoughts are text all the same, the chat's are not."""
    special = copy.deepcopy(tokenizer)
    tags = ["<tool_call>", "</tool_call>", "<think>"]
    special.add_tokens([AddedToken(tag, special=True, normalized=False) for tag in tags], special_tokens=True)
    text = f"<think>a {CALL}"
    ids = special.encode(text + "<|im_end|>", add_special_tokens=False)
    assert special.decode(ids, skip_special_tokens=True) != text
    detokenizer = Detokenizer(special)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == text


def test_a_text_that_goes_on(sentencepiece: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast) -> None:
    """After a prompt the first token keeps its space, and bytes that finish the prompt's last character are shown."""
    for either in (tokenizer, sentencepiece):
        before, after = either.encode("The process"), either.encode("The process of light")
        assert after[: len(before)] == before
        detokenizer = Detokenizer(either, before)
        assert "".join(map(detokenizer.push, after[len(before) :])) + detokenizer.flush() == " of light"
        whole = either.encode("a火")
        detokenizer = Detokenizer(either, whole[:-1])
        assert "\ufffd" in detokenizer.push(whole[-1]) + detokenizer.flush()
    assert "".join(map(Detokenizer(sentencepiece).push, after[len(before) :])) != " of light"


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


def in_pieces(text: str, size: int, fragments: bool) -> tuple[str, list[dict[str, Any]], ToolCallStream]:
    """Content and calls of a text that arrives `size` characters at a time; arguments as text."""
    stream, content, calls = ToolCallStream(fragments), "", []
    for start in range(0, len(text) + size, size):
        more, parts = stream.push(text[start : start + size]) if start < len(text) else stream.flush()
        content += more
        for part in parts:
            assert (part.name is None) == (part.index < len(calls)) and part.index <= len(calls)
            if part.name is not None:
                assert part.arguments == ""
                calls.append({"name": part.name, "arguments": ""})
            calls[part.index]["arguments"] += part.arguments
    return content, calls, stream


@pytest.mark.parametrize("fragments", [False, True])
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
        '<tool_call>{"name":"天气","arguments":{"城市":["巴黎","}]{[",{"a":"\\\\\\"}"}],"n":-1.50}}</tool_call>',
        '<tool_call>\n{"arguments": {"a": "\\ud800"}, "name": "f"}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}, "id": "</tool_call>"}\n</tool_call>\n' + CALL,
        '<tool_call>\n{"name": "f", "arguments": "{}"}\n</tool_call>',
        '<tool_call>\n{"name": 1, "arguments": {}}\n</tool_call>',
    ],
)
def test_tool_calls(text: str, fragments: bool) -> None:
    """However the text is cut, whole or in parts: the calls that are in it, with the spelling of their arguments."""
    expected = in_pieces(text, len(text), False)[:2]
    for size in (1, 2, 3, 7, 11, len(text)):
        content, calls, stream = in_pieces(text, size, fragments)
        assert (content, calls) == expected and stream.complete == list(range(len(calls)))
    read = [{**call, "arguments": json.loads(call["arguments"])} for call in calls]
    assert (content, read) == parse_tool_calls(text)
    for call in calls:
        assert call["arguments"] in text or '"arguments"' in text.partition('"name"')[0]


@pytest.mark.parametrize(
    ("text", "content", "arguments", "complete"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"a": "x', "", ['{"a": "x'], []),  # cut off
        ('<tool_call>\n{"name": "f", "arguments": {"a": x}}\n</tool_call>', "}\n</tool_call>", ['{"a": x}'], []),
        ('<tool_call>\n{"name": "f", "arguments": {"a": "x}}\n' + CALL, "", ['{"a": "x}}', '{"a": "x"}'], [1]),
        ('<tool_call>\n{"name": "f", "arguments": {}} then', "} then", ["{}"], []),
    ],
)
def test_calls_that_have_begun_and_are_malformed(
    text: str, content: str, arguments: list[str], complete: list[int]
) -> None:
    """Nothing that the model wrote is lost, and none of it counts as a complete call. As a whole it is content."""
    for size in (1, 2, 5, len(text)):
        got, calls, stream = in_pieces(text, size, True)
        assert got == content and [call["arguments"] for call in calls] == arguments and stream.complete == complete
    assert in_pieces(text, 3, False)[0].startswith('<tool_call>\n{"name": "f"')


def test_arguments_are_not_delayed() -> None:
    """Every piece that belongs to the arguments comes out at once."""
    stream = ToolCallStream(fragments=True)
    assert stream.push('<tool_call>\n{"name": "f", "argum') == ("", [])
    assert stream.push('ents": {"') == ("", [CallPart(0, "f", ""), CallPart(0, None, '{"')])
    assert stream.push('城市": "巴') == ("", [CallPart(0, None, '城市": "巴')])
    assert stream.push('黎"}}\n</tool') == ("", [CallPart(0, None, '黎"}')])
    assert stream.complete == [] and stream.push("_call>") == ("", []) and stream.complete == [0]


def test_content_before_a_call_is_not_delayed() -> None:
    stream = ToolCallStream()
    assert stream.push("Let me see.\n<tool") == ("Let me see.", [])
    assert stream.push("_call>\n{") == ("", [])


PARTS = [
    "<tool_call>", "</tool_call>", "<tool_call>", "\n", "{", "}", '"', "\\", '\\"', "[", "]", ",", ":", " ", "\t", "1",
    "天", "<", "tool_call>", "</tool", '"a": "x"', '<tool_call>{"', '{"name": "f", "arguments": {', "}}", '"name"',
    '"arguments"', CALL, '<tool_call>{"name":"g","arguments":{"b":"<tool_call>{\\"</tool_call>"}}</tool_call>',
]  # fmt: skip


def test_any_text_in_any_pieces_has_the_calls_of_the_whole() -> None:
    """Content and calls of random texts are those of `parse_tool_calls`, and none is lost in parts either."""
    generator = random.Random(0)
    found = 0
    for _ in range(4000):
        text = "".join(generator.choice(PARTS) for _ in range(generator.randrange(1, 25)))
        cuts = sorted(generator.randrange(len(text) + 1) for _ in range(generator.randrange(9)))
        stream, content, calls = ToolCallStream(), "", {}
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            more, parts = stream.push(text[start:end])
            content += more
            for part in parts:
                calls[part.index] = calls.get(part.index, "") + part.arguments
        rest, parts = stream.flush()
        for part in parts:
            calls[part.index] = calls.get(part.index, "") + part.arguments
        expected = parse_tool_calls(text)
        assert content + rest == expected[0], text
        assert [json.loads(call) for call in calls.values()] == [call["arguments"] for call in expected[1]], text
        assert stream.complete == [*range(len(calls))]
        found += len(calls)
    assert found > 1000


@pytest.mark.parametrize("fragments", [False, True])
@pytest.mark.parametrize("before", ["", '<tool_call>{"name": "f", "arguments": {"x": "'])
def test_tags_without_end_take_as_long_as_they_are_many(fragments: bool, before: str) -> None:
    generator = random.Random(0)
    tag = "<tool_call>"
    for parts in ([tag, "</tool_call>"], [tag + '{"'], [tag + '{"a": "'], [tag + '{"\\"', "{"]):
        stream, clock = ToolCallStream(fragments), time.process_time()
        stream.push(before)
        for _ in range(4000):
            stream.push(generator.choice(parts))
        stream.push("\n"), stream.flush()
        assert time.process_time() - clock < 2, parts


def test_what_is_no_call_is_content_at_once() -> None:
    stream = ToolCallStream()
    assert stream.push("<tool_call>\n") == ("", [])
    assert stream.push("not JSON") == ("<tool_call>\nnot JSON", [])
    assert stream.push('<tool_call>{"a": </') == ('<tool_call>{"a": </', [])
