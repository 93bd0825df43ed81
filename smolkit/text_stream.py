"""From a stream of token ids to a stream of text: detokenising, stop strings, tool calls.

Each class takes pieces with `push` and gives out only what later pieces cannot change, so that the streamed
parts add up to exactly the text that would have been returned at once. `flush` gives the rest when generation
ends.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from smolkit.chat import parse_tool_calls

REPLACEMENT = "\ufffd"
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"


class Detokenizer:
    """Token ids to text, never splitting a character: bytes of an unfinished one wait for the next token.

    Only a short window of ids is decoded again for each token; a decoder may treat the first token of a text
    differently (a leading space), so the window always begins one finished piece earlier.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer  # called per token: the wrapper around it costs more than it
        self._context: list[int] = []  # ids whose text has been given out
        self._pending: list[int] = []
        self._given = ""  # the part of the pending ids' text that has been given out

    def push(self, token_id: int) -> str:
        """The new text that this token completes, possibly empty."""
        self._pending.append(token_id)
        text = self._text_of_pending()
        # An unfinished character decodes to one replacement character at the end.
        unfinished = text.endswith(REPLACEMENT)
        delta = (text[:-1] if unfinished else text)[len(self._given) :]
        if unfinished or not text:
            self._given += delta
        else:
            self._context, self._pending, self._given = self._pending, [], ""
        return delta

    def flush(self) -> str:
        """What remains: the replacement character of bytes that were never completed."""
        delta = self._text_of_pending()[len(self._given) :]
        self._context, self._pending, self._given = [], [], ""
        return delta

    def _text_of_pending(self) -> str:
        return self._decode(self._context + self._pending)[len(self._decode(self._context)) :]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)


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


class ToolCallStream:
    """Separates tool calls from content, with the same result as `parse_tool_calls` on the whole text.

    A call is given out whole, when its closing tag has arrived; a malformed call is content.
    """

    def __init__(self) -> None:
        self._held = ""
        self._searched = 0  # up to here the held text has no undecided closing tag

    def push(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """(content that is certain, calls completed by this piece)."""
        self._held += text
        start = self._held.find(CALL_OPEN)
        if start < 0:
            keep = max(_overlap(self._held, "\n" + CALL_OPEN), _overlap(self._held, CALL_OPEN))
            return self._release(len(self._held) - keep), []
        content = self._release(start - 1 if self._held[:start].endswith("\n") else start)
        calls: list[dict[str, Any]] = []
        while (end := self._held.find(CALL_CLOSE, self._searched)) >= 0:
            self._searched = end + len(CALL_CLOSE)
            # The tag may also be inside a JSON string: then nothing parses yet, and a later tag decides.
            before, found = parse_tool_calls(self._held[: self._searched])
            if found:
                content, calls = content + before, calls + found
                self._release(self._searched)
        self._searched = max(self._searched, len(self._held) - len(CALL_CLOSE) + 1)
        if calls:
            more, _ = self.push("")  # text after the last call is ordinary again
            content += more
        return content, calls

    def flush(self) -> tuple[str, list[dict[str, Any]]]:
        held, self._held = self._held, ""
        return parse_tool_calls(held)

    def _release(self, count: int) -> str:
        released, self._held = self._held[:count], self._held[count:]
        self._searched = 0
        return released


def _overlap(text: str, word: str) -> int:
    """Length of the longest ending of `text` that is a proper beginning of `word`."""
    for length in range(min(len(text), len(word) - 1), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0
