"""From a stream of token ids to a stream of text: detokenising, stop strings, tool calls.

Each class takes pieces with `push` and gives out only what later pieces cannot change, so that the streamed
parts add up to exactly the text that would have been returned at once. `flush` gives the rest when generation
ends.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from smolkit.chat import THOUGHT_TOKENS, TOOL_TOKENS, find_tool_calls, read_tool_call

REPLACEMENT = "\ufffd"
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
CONTEXT_TOKENS = 16  # of a prompt that an answer continues
PENDING_TOKENS = 16  # that are decoded again and again, waiting for the end of a character
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # of SentencePiece's byte fallback
_CALL_TAG = re.compile(r"\n?<tool_call>\s*")
# A call as templates and grammars write it, up to the first brace of its arguments. Its name, quoted, is group 1.
_CALL_HEAD = re.compile(r'\n?<tool_call>\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


class Detokenizer:
    """Token ids to text, never splitting a character: bytes of an unfinished one wait for the next token.

    Only a short window of ids is decoded again for each token; a decoder may treat the first token of a text
    differently (a leading space), so the window always begins one finished piece earlier. `before`: ids of a text that
    this one continues.

    Where bytes are tokens of their own (SentencePiece's byte fallback), one that is wrong spoils all those beside it,
    so they wait for the end of their row.

    Special tokens have no text, except the tags of tool calls and thoughts, which some tokenizers mark as special, too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, before: Sequence[int] = ()) -> None:
        self._backend = tokenizer.backend_tokenizer  # called per token: the wrapper around it costs more than it
        added, shown = self._backend.get_added_tokens_decoder(), {*TOOL_TOKENS, *THOUGHT_TOKENS}
        self._skipped = frozenset(i for i, token in added.items() if token.special and token.content not in shown)
        # The parts of a decoder can only be read in its serialised form, JSON.
        decoder = self._backend.decoder
        self._bytes_are_tokens = decoder is not None and b'"ByteFallback"' in decoder.__getstate__()
        self._context = [i for i in before[-CONTEXT_TOKENS:] if i not in self._skipped]  # whose text has been given out
        if self._decode(self._context).endswith(REPLACEMENT):  # a character that may be finished here: shown here
            self._context = []
        self._pending: list[int] = []
        self._given = ""  # the part of the pending ids' text that has been given out

    def push(self, token_id: int) -> str:
        """The new text that this token completes, possibly empty."""
        if token_id in self._skipped:
            return ""
        self._pending.append(token_id)
        if self._bytes_are_tokens and BYTE_TOKEN.fullmatch(self._backend.id_to_token(token_id) or ""):
            return ""  # the next one may continue its row
        text = self._text(self._context, self._pending)
        # An unfinished character decodes to one replacement character at the end.
        unfinished = text.endswith(REPLACEMENT) and not self._bytes_are_tokens
        delta = (text[:-1] if unfinished else text)[len(self._given) :]
        if unfinished or not text:
            self._given += delta
            self._shorten(text)
        else:
            self._context, self._pending, self._given = self._pending, [], ""
        return delta

    def _shorten(self, text: str) -> None:
        """Bound the pending ids, whose text is `text`: nobody says that their character ever comes to its end."""
        if len(self._pending) <= PENDING_TOKENS:
            return
        if not text:  # ids that are no tokens
            self._pending.pop()
            return
        for length in range(4, 8):  # a character has four bytes at most: one of these cuts is between two of them
            head, tail = self._pending[:-length], self._pending[-length:]
            rest = self._text(head, tail)
            if rest and self._text(self._context, head) + rest == text:
                self._given = self._given[len(text) - len(rest) :]
                self._context, self._pending = head, tail
                return

    def flush(self) -> str:
        """What remains: the replacement character of bytes that were never completed."""
        delta = self._text(self._context, self._pending)[len(self._given) :]
        self._context, self._pending, self._given = [], [], ""
        return delta

    def _text(self, before: list[int], ids: list[int]) -> str:
        return self._decode(before + ids)[len(self._decode(before)) :]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


class StopStrings:
    """Cuts a text stream before the first stop string; holds back an ending that may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that is safe to show; `stopped` is set when a stop string was found, and nothing follows."""
        text = self._held + text
        found = [position for position in map(text.find, self._stops) if position >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True)
class CallPart:
    """The next part of the tool call `index` of an answer: its name comes with the first one, and only there."""

    index: int
    name: str | None
    arguments: str


class ToolCallStream:
    """Separates tool calls from content, as `parse_tool_calls` does on the whole text: each call whole, or in parts.

    `fragments`: a call begins as soon as its name and the first brace of its arguments have arrived, and goes on while
    the model writes. Without, it comes when its closing tag has arrived. Either way arguments are spelled as the model
    spelled them. A malformed call is content, unless it has begun by then, which cannot be taken back: its arguments
    are what the model wrote, and the rest is content.
    """

    def __init__(self, fragments: bool = False) -> None:
        self.complete: list[int] = []  # the well-formed calls so far
        self._fragments = fragments
        self._num_begun = 0
        self._held = ""  # begins with the tag of a call that is not decided yet, if it has one
        self._object: _ObjectEnd | None = None  # of that call, as soon as it has one
        self._arguments: _ObjectEnd | None = None  # of that call, if it has begun

    def push(self, text: str) -> tuple[str, list[CallPart]]:
        """(content that is certain, what this piece adds to calls)."""
        self._held += text
        content, parts = "", []
        while True:
            content += self._release(self._before_call())
            parts += self._fragment() if self._fragments else []
            end = self._end_of_call()
            if end is None:
                return content, parts
            start = self._held.index(CALL_OPEN)
            found = read_tool_call(self._held[:end], start)
            if found is not None:
                parts += self._take([(start, *found)])[1]
            elif self._arguments is not None:  # it has begun: what follows is content
                self._release(self._arguments.position)
                self._arguments = None
            else:  # malformed for good, but another may begin inside
                content += self._release(start + len(CALL_OPEN))

    def _before_call(self) -> int:
        """The length of what is before the first call, or before what may become the tag of one."""
        start = self._held.find(CALL_OPEN)
        if start < 0:
            return len(self._held) - max(_overlap(self._held, "\n" + CALL_OPEN), _overlap(self._held, CALL_OPEN))
        return start - 1 if self._held[:start].endswith("\n") else start

    def _end_of_call(self) -> int | None:
        """Where the call that the held text begins with ends, its closing tag included; None while it may go on.

        0 where it is malformed, whatever follows. Each call is looked through once. A tag inside a string of it may
        begin another one, which ends at the next tag if not before: where one of them is inside a string the other is
        not. So all of them together take as long as the text.
        """
        if self._object is None:
            tag = _CALL_TAG.match(self._held)
            if tag is None or tag.end() == len(self._held):
                return None
            if not self._held.startswith("{", tag.end()):
                return 0
            self._object = _ObjectEnd(tag.end())
        self._object.advance(self._held)
        if self._object.broken or not self._object.found:
            return 0 if self._object.broken else None
        rest = self._held[self._object.position :].lstrip()
        if rest.startswith(CALL_CLOSE):
            return len(self._held) - len(rest) + len(CALL_CLOSE)
        return None if CALL_CLOSE.startswith(rest) else 0

    def flush(self) -> tuple[str, list[CallPart]]:
        content, parts = self._take(list(find_tool_calls(self._held)))
        if self._arguments is not None:  # it has begun, and is malformed or cut off
            self._release(self._arguments.position)
        return content + self._release(len(self._held)), parts

    def _fragment(self) -> list[CallPart]:
        """What has arrived since the last time of the call that the held text begins with."""
        parts: list[CallPart] = []
        if self._arguments is None:
            # What has not begun by then has no such beginning, and is not searched for it again and again.
            head = _CALL_HEAD.match(self._held) if len(self._held) < 1000 else None
            if head is None or (name := _string(head[1])) is None:
                return []
            self._arguments = _ObjectEnd(head.end())
            parts.append(self._begin(name))
        if fragment := self._arguments.advance(self._held):
            parts.append(CallPart(self._num_begun - 1, None, fragment))
        return parts

    def _take(self, found: Sequence[tuple[int, int, dict[str, Any]]]) -> tuple[str, list[CallPart]]:
        """Content and calls of the held text up to the last of the calls found in it; they are released."""
        content, parts, position = "", [], 0
        for start, end, call in found:
            begun, self._arguments = self._arguments, None
            if begun is None or start > len("\n"):  # another one than that which has begun
                position = begun.position if begun else position
                content += self._held[position:start].removesuffix("\n")
                parts.append(self._begin(call["name"]))
                arguments = _as_written(self._held[start:end], call["arguments"])
                parts.append(CallPart(self._num_begun - 1, None, arguments))
            self.complete.append(self._num_begun - 1)
            position = end
        self._release(position)
        return content, parts

    def _begin(self, name: str) -> CallPart:
        self._num_begun += 1
        return CallPart(self._num_begun - 1, name, "")

    def _release(self, count: int) -> str:
        released, self._held = self._held[:count], self._held[count:]
        if count:
            self._object = None
        return released


class _ObjectEnd:
    """Where a JSON object ends, in a text that grows: behind the brace that closes it, or where it is broken."""

    def __init__(self, start: int) -> None:
        self.position = start
        self.found = self.broken = self._quoted = self._escaped = False
        self._depth = 0

    def advance(self, text: str) -> str:
        """The part of the object that was not there before; `text` is all there is by now."""
        start = self.position
        while self.position < len(text) and not self.found:
            character = text[self.position]
            # Strings have no line breaks: nobody closed this one. Outside of them there is no tag, nor an escape.
            self.found = self.broken = character < " " if self._quoted else character in "<\\"
            if not self.found:
                self._read(character)
                self.position += 1
        return text[start : self.position]

    def _read(self, character: str) -> None:
        if self._quoted:
            self._quoted = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.found = self._depth == 0


def _as_written(call: str, arguments: dict[str, Any]) -> str:
    """The arguments of a well-formed call as they are written in it; anew where they are not where they should be."""
    if head := _CALL_HEAD.match(call):
        written = _ObjectEnd(head.end()).advance(call)
        if json.loads(written) == arguments:
            return written
    written = json.dumps(arguments, ensure_ascii=False)
    # An escaped lone surrogate is JSON, but has no UTF-8 form.
    return json.dumps(arguments) if re.search("[\ud800-\udfff]", written) else written


def _string(written: str) -> str | None:
    try:
        return json.loads(written)
    except ValueError:
        return None


def _overlap(text: str, word: str) -> int:
    """Length of the longest ending of `text` that is a proper beginning of `word`."""
    for length in range(min(len(text), len(word) - 1), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0
