"""The one renderer: messages and tools become token ids and a loss mask, and tool calls are parsed back.

The layout is ChatML with Hermes-style tools and lives in one place, `CHAT_TEMPLATE`, which is saved with the
tokenizer, so transformers and vLLM render the same conversation. What a template alone cannot do is keep user
text apart from control tokens: a literal `<|im_end|>` typed by a user would end the turn. `render` therefore
runs the template, cuts the result at the control tokens *the template wrote*, and encodes everything between
them as ordinary text. For text without control words the ids equal `tokenizer.apply_chat_template`.

The loss mask covers what the model has to produce: the content, tool calls and `<|im_end|>` of every
assistant turn. A conversation that is too long for training loses its end (`render_fitting`).
"""

import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from smolkit.errors import UserError

END_OF_TEXT = "<|endoftext|>"  # separates documents in pretraining, and pads
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"  # ends a chat turn; never the pad token, or models would not learn to stop
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
# Not "special": clients that decode with skip_special_tokens=True must still see them to parse a call.
TOOL_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# Reasoning models write these themselves and templates look for them, so in assistant text they stay tokens.
THOUGHT_TOKENS = ("<think>", "</think>")
ROLES = ("system", "user", "assistant", "tool")

# Assistant content loses leading whitespace: a leading newline would merge with the header's newline into one
# token that the generation prompt cannot end with: training and serving would disagree on the first token.
CHAT_TEMPLATE = r"""
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content or '' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- if tools %}
    {{- '<|im_start|>system\n' + (system + '\n\n' if system else '') + '# Tools\n<tools>\n' }}
    {%- for tool in tools %}
        {%- set function = tool.function if tool.function is defined else tool %}
        {%- set description = function.description or '' %}
        {%- set parameters = function.parameters or {} %}
        {{- {'name': function.name, 'description': description, 'parameters': parameters} | tojson }}
        {{- '\n' }}
    {%- endfor %}
    {{- '</tools><|im_end|>\n' }}
{%- elif system %}
    {{- '<|im_start|>system\n' + system + '<|im_end|>\n' }}
{%- endif %}
{%- for message in turns %}
    {%- set content = message.content or '' %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = content.lstrip() %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
            {{- content }}
            {%- for call in message.tool_calls or [] %}
                {%- set function = call.function if call.function is defined else call %}
                {{- '\n' if content or not loop.first else '' }}
                {{- '<tool_call>\n{"name": ' + function.name | tojson + ', "arguments": ' }}
                {{- function.arguments if function.arguments is string else function.arguments | tojson }}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or turns[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or turns[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- elif message.role == 'system' %}
        {{- raise_exception('a system message must be the first message') }}
    {%- else %}
        {{- raise_exception('unknown role: ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".strip()


@dataclass(frozen=True)
class Rendered:
    """Token ids of a conversation, and at each position 1 where the model is trained on it, else 0."""

    input_ids: list[int]
    loss_mask: list[int]


# --- tokenizers ---------------------------------------------------------------------------------------------


def add_chat_tokens(tokenizer: PreTrainedTokenizerFast, extra_tokens: Iterable[str] = ()) -> int:
    """Give a tokenizer the chat tokens, `CHAT_TEMPLATE`, pad `<|endoftext|>` and eos `<|im_end|>`.

    Tokens that exist keep their ids; `extra_tokens` become special tokens. Returns the number of new entries,
    by which a model's embedding has to cover more rows.
    """
    before = len(tokenizer)
    special = [*SPECIAL_TOKENS, *dict.fromkeys(extra_tokens)]
    tokenizer.add_special_tokens(
        {
            "pad_token": AddedToken(END_OF_TEXT, special=True, normalized=False),
            "eos_token": AddedToken(IM_END, special=True, normalized=False),
            "extra_special_tokens": [AddedToken(t, special=True, normalized=False) for t in special[1:]],
        },
        replace_extra_special_tokens=False,
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TOOL_TOKENS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return len(tokenizer) - before


def chat_stop_ids(tokenizer: PreTrainedTokenizerFast, eos: int | list[int] | None = None) -> list[int]:
    """Ids that end a reply: the tokenizer's eos first, `<|im_end|>` and `<|endoftext|>` where known, then `eos`, those
    of a checkpoint's generation_config.json."""
    vocabulary = tokenizer.get_added_vocab()
    candidates = [tokenizer.eos_token_id, vocabulary.get(IM_END), vocabulary.get(END_OF_TEXT)]
    candidates += eos if isinstance(eos, list) else [eos]
    return list(dict.fromkeys(i for i in candidates if i is not None))


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: str | Path) -> None:
    """Write the tokenizer's files into `directory` (made if missing), each file whole or not at all."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".tokenizer-") as aside:
        tokenizer.save_pretrained(aside)
        for file in sorted(Path(aside).iterdir()):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(file, directory / file.name)


@dataclass(frozen=True)
class _Codec:
    """What `render` needs of one tokenizer, made once."""

    entries: int
    plain: Tokenizer  # same normalizer, pre-tokenizer and merges, but knows no added tokens
    control: re.Pattern[str]  # any added token, longest first as in the tokenizer itself; the token is a group
    ids: dict[str, int]  # added token -> id
    words: re.Pattern[str]  # what to guard in message text: control words, and the signs they begin with
    assistant_words: re.Pattern[str]  # the same for assistant text, which may contain thought tokens


# transformers keeps one compiled template, whose record of assistant spans is not made for two threads at a time.
_RENDERING = threading.Lock()
_CODECS: WeakKeyDictionary[PreTrainedTokenizerFast, _Codec] = WeakKeyDictionary()


def _codec(tokenizer: PreTrainedTokenizerFast) -> _Codec:
    codec = _CODECS.get(tokenizer)
    if codec is None or codec.entries != len(tokenizer):
        backend = tokenizer.backend_tokenizer
        plain = Tokenizer(backend.model)  # shares the vocabulary, copies nothing
        if backend.normalizer is not None:
            plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            plain.pre_tokenizer = backend.pre_tokenizer
        added = {token.content: (i, token) for i, token in tokenizer.added_tokens_decoder.items()}
        signs = {word[0] for word in added if not (word[0].isalnum() or word[0].isspace())}
        codec = _Codec(
            entries=len(tokenizer),
            plain=plain,
            control=_any_of(added, lambda word: _token_pattern(added[word][1])),
            ids={word: i for word, (i, _) in added.items()},
            words=_any_of({*added, *signs}, re.escape),
            assistant_words=_any_of(set(added) - set(THOUGHT_TOKENS), re.escape),
        )
        _CODECS[tokenizer] = codec
    return codec


def _any_of(words: Iterable[str], pattern: Callable[[str], str]) -> re.Pattern[str]:
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return re.compile("|".join(map(pattern, longest_first)) or r"(?!)")


def _token_pattern(token: AddedToken) -> str:
    """Some foreign tokens swallow the space beside them (`lstrip`, `rstrip`)."""
    left, right = r"\s*" * token.lstrip, r"\s*" * token.rstrip
    return f"{left}({re.escape(token.content)}){right}"


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of ordinary text: a literal `<|im_end|>` in it is spelled out, never made the control token."""
    return _codec(tokenizer).plain.encode(text, add_special_tokens=False).ids


def encode_prompt(tokenizer: PreTrainedTokenizerFast, text: str, add_special_tokens: bool = True) -> list[int]:
    """`encode_text` for a text to be continued: with what the tokenizer puts around a text (`<s>`), where it does."""
    encoding = _codec(tokenizer).plain.encode(text, add_special_tokens=False)
    return tokenizer.backend_tokenizer.post_process(encoding, None, add_special_tokens).ids


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """`encode_text` for many texts at once, in parallel."""
    encodings = _codec(tokenizer).plain.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


# --- messages -----------------------------------------------------------------------------------------------


def validate_messages(messages: Any) -> None:
    """Raise `UserError` unless `messages` is a conversation that the template can render faithfully.

    Required: a non-empty list of objects with a known role and text content; a system message only in first
    place; a tool message only after an assistant turn with tool calls; calls with a name and JSON-object
    arguments.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"messages must be a non-empty list, got {_short(messages)} — give at least one message", "field"
        )
    previous: dict[str, Any] = {}
    for number, message in enumerate(messages):
        where = f"message {number}"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise UserError(
                f"{where}: role must be one of {', '.join(ROLES)}, got {_short(message)} — rename it", "role"
            )
        calls = message.get("tool_calls") or []
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and calls):
            raise UserError(
                f"{where} ({role}): content must be a string, got {_short(content)} — write it as text", "field"
            )
        _check_encodable(content or "", where)
        if role == "system" and number > 0:
            raise UserError(f"{where}: a system message must be the first message — move it there", "order")
        if role == "tool" and not (previous.get("role") == "tool" or previous.get("tool_calls")):
            raise UserError(
                f"{where}: a tool message must follow an assistant message with tool_calls — add it", "order"
            )
        if calls and role != "assistant":
            raise UserError(
                f"{where} ({role}): only assistant messages can carry tool_calls — remove them", "tool_call"
            )
        if not isinstance(calls, list):
            raise UserError(f"{where}: tool_calls must be a list, got {_short(calls)} — put it into one", "tool_call")
        for call in calls:
            _function_of(call, where)
        previous = message


def validate_tools(tools: Any) -> None:
    """Raise `UserError` unless `tools` is a list of OpenAI tool objects `{"type", "function": {...}}`."""
    if not isinstance(tools, list):
        raise UserError(f"tools must be a list, got {_short(tools)} — put it into one", "tool")
    for number, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"tool {number}: needs a function with a name, got {_short(tool)} — name it", "tool")
        _check_encodable(_json(function, f"tool {number}"), f"tool {number}")


def _function_of(call: Any, where: str) -> dict[str, Any]:
    """`{"name", "arguments": dict}` of a tool call whose arguments are an object or a JSON string of one."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: a tool call needs a function with a name, got {_short(call)} — name it", "tool_call")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise UserError(
                f"{where}: tool call arguments are not JSON: {_short(arguments)} — write it", "tool_call"
            ) from None
    if not isinstance(arguments, dict):
        raise UserError(
            f"{where}: tool call arguments must be a JSON object, got {_short(arguments)} — write one", "tool_call"
        )
    _check_encodable(_json(function, where), where)
    return {"name": function["name"], "arguments": arguments}


def _json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be written as JSON: {error} — use JSON types only", "tool_call") from None


def _check_encodable(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: text has an unpaired surrogate at character {error.start} — remove it", "not_utf8"
        ) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- rendering ----------------------------------------------------------------------------------------------


def render(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Rendered:
    """Token ids and loss mask of a conversation, by the tokenizer's own chat template.

    Message text, tool names, arguments and results are ordinary text whatever they spell. The ids of a prompt
    rendered with `add_generation_prompt` are a prefix of the ids of the prompt plus its reply. With a foreign
    template that has no `{% generation %}` marks the mask is all 0. `template_kwargs` are further variables of
    the template. Raises `UserError` for a conversation that cannot be rendered.
    """
    validate_messages(messages)
    validate_tools(tools or [])
    codec = _codec(tokenizer)
    messages = [_normalised(message) for message in messages]
    guard = _Guard(codec, messages, tools, template_kwargs)
    template = tokenizer.get_chat_template(tools=tools)
    special: dict[str, Any] = tokenizer.special_tokens_map
    try:
        with _RENDERING:
            rendered: Any = render_jinja_template(  # not the str of its signature
                conversations=[[guard.message(message) for message in messages]],
                tools=guard.value(tools) or None,
                chat_template=template,
                return_assistant_tokens_mask=re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None,
                add_generation_prompt=add_generation_prompt,
                **special,
                **guard.value(template_kwargs or {}),
            )
            (text,), spans = rendered
    except Exception as error:  # foreign templates refuse conversations in their own ways (jinja2, TypeError)
        raise UserError(f"the tokenizer's chat template refused the conversation: {error}") from error
    ids: list[int] = []
    mask: list[int] = []
    position = 0
    for start, end in [*(spans[0] if spans else []), (len(text), len(text))]:
        for lower, upper, trained in ((position, start, 0), (start, end, 1)):
            piece = _encode_rendered(codec, text[lower:upper], guard.mark)
            ids += piece
            mask += [trained] * len(piece)
        position = end
    return Rendered(ids, mask)


def render_fitting(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    max_length: int,
) -> tuple[Rendered, int] | None:
    """The conversation, or its longest beginning that ends with a reply, within `max_length` tokens.

    Long conversations lose their *end*: what is left is a conversation from its start, system message and tools
    included, cut after an assistant message, never inside one. Returns it with the number of messages kept, or
    None when not even the first reply ends in time (there is nothing to train on then).
    """
    whole = render(tokenizer, messages, tools)
    if len(whole.input_ids) <= max_length:
        return whole, len(messages)
    ends = [i + 1 for i, message in enumerate(messages[:-1]) if message["role"] == "assistant"]
    best = None
    while ends:  # bisection: a longer beginning has more tokens
        middle = len(ends) // 2
        rendered = render(tokenizer, messages[: ends[middle]], tools)
        if len(rendered.input_ids) <= max_length:
            best, ends = (rendered, ends[middle]), ends[middle + 1 :]
        else:
            ends = ends[:middle]
    return best


def _normalised(message: dict[str, Any]) -> dict[str, Any]:
    """The message with text content and, where it calls tools, with arguments as objects."""
    message = {**message, "content": message.get("content") or ""}
    calls = message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = [{**call, "function": _function_of(call, "message")} for call in calls]
    return message


class _Guard:
    """Marks control words inside message text, so that they can be told from the ones the template writes.

    The mark is a Unicode noncharacter absent from the conversation, put after every character of a control
    word: no pattern of the tokenizer can match across it, and removing all marks restores the text exactly. A sign
    that control words begin with is marked wherever it stands, or a template that takes something out of the text
    (`replace`) could leave a control word behind.
    """

    def __init__(self, codec: _Codec, *values: Any) -> None:
        text = json.dumps(values, ensure_ascii=False)
        self.codec = codec
        self.mark = next((mark for mark in map(chr, range(0xFDD0, 0xFDF0)) if mark not in text), "")
        if not self.mark:
            raise UserError("the conversation contains all of the noncharacters U+FDD0 to U+FDEF")

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        guarded = self.value(message)
        if message["role"] == "assistant":
            guarded["content"] = self._text(message["content"], self.codec.assistant_words)
        return guarded

    def value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._text(value, self.codec.words)
        if isinstance(value, dict):
            return {self.value(key): self.value(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item) for item in value]
        return value

    def _text(self, text: str, words: re.Pattern[str]) -> str:
        return words.sub(lambda match: "".join(character + self.mark for character in match[0]), text)


def _encode_rendered(codec: _Codec, text: str, mark: str) -> list[int]:
    """Ids of a stretch of rendered text: control tokens by id, the text between them without its marks."""
    ids: list[int] = []
    position = 0
    for match in codec.control.finditer(text):
        ids += _encode_plain(codec, text[position : match.start()], mark)
        ids.append(codec.ids[match[match.lastindex]])  # type: ignore[index]  # each token is a group
        position = match.end()
    return ids + _encode_plain(codec, text[position:], mark)


def _encode_plain(codec: _Codec, text: str, mark: str) -> list[int]:
    return codec.plain.encode(text.replace(mark, ""), add_special_tokens=False).ids if text else []


# --- tool calls ---------------------------------------------------------------------------------------------


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_CALL_START = re.compile(r"<tool_call>\s*")
_CALL_END = re.compile(r"\s*(?:</tool_call>|\Z)")


def parse_tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Split generated text into its content and its tool calls `{"name": str, "arguments": dict}`, in order.

    The inverse of the template: the newline that separates content from a call is removed with the call. JSON
    is read by a decoder, so braces or `</tool_call>` inside strings do no harm. The closing tag may be
    missing at the very end (a stop token can take its place). A malformed call stays in the content, visible
    to whoever reads it.
    """
    kept: list[str] = []
    calls: list[dict[str, Any]] = []
    position = 0
    for start, end, call in find_tool_calls(text):
        kept.append(text[position:start].removesuffix("\n"))
        calls.append({"name": call["name"], "arguments": call["arguments"]})
        position = end
    kept.append(text[position:])
    return "".join(kept), calls


def find_tool_calls(text: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(start, end, call) of every well-formed call in a text, its tags included; see `parse_tool_calls`."""
    position = 0
    for tag in _CALL_START.finditer(text):
        # Not where the tag is inside the JSON of the call before.
        if tag.start() >= position and (found := read_tool_call(text, tag.start())):
            position, call = found
            yield tag.start(), position, call


def read_tool_call(text: str, start: int) -> tuple[int, dict[str, Any]] | None:
    """(end, call) of the call whose opening tag is at `start`; None where there is no well-formed one."""
    tag = _CALL_START.match(text, start)
    # Asked before the decoder is, whose complaint about anything else would count the lines up to there.
    if tag is None or not text.startswith("{", tag.end()):
        return None
    try:
        call, end = _DECODER.raw_decode(text, tag.end())
    except (ValueError, RecursionError):
        return None
    closing = _CALL_END.match(text, end)
    if closing is None or not isinstance(call.get("name"), str) or not isinstance(call.get("arguments"), dict):
        return None
    return closing.end(), call
