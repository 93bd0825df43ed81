"""Talking to a model through the OpenAI client: a server somewhere, or a private one over a checkpoint.

`connected` gives an `Endpoint`; `stream_chat` and `stream_text` give the reply while it grows: text, tool calls, and
where asked for each token with its probability and the most probable alternatives.
"""

import argparse
import json
import math
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from smolkit.errors import UserError

Message = dict[str, Any]


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible API; `name` is for people, `model` for requests."""

    name: str
    client: openai.OpenAI
    model: str


@dataclass(frozen=True)
class Token:
    """A generated token, the probability it had (0 to 1), and the most probable tokens in its place, best first."""

    text: str
    probability: float
    alternatives: list[tuple[str, float]]


@dataclass
class Reply:
    """What a model has said so far. `finish_reason` is None until the end; `seconds` is wall time so far."""

    content: str = ""
    tool_calls: list[Message] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    num_tokens: int | None = None
    seconds: float = 0.0

    def message(self) -> Message:
        """The reply as a message of the conversation."""
        message: Message = {"role": "assistant", "content": self.content}
        return {**message, "tool_calls": self.tool_calls} if self.tool_calls else message


def is_whole(call: Message) -> bool:
    """Whether the arguments of a tool call have come to their end: a JSON object."""
    try:
        return isinstance(json.loads(call["function"]["arguments"]), dict)
    except ValueError:
        return False


def without_cut_calls(message: Message) -> Message:
    """The message as a model may see it again: without tool calls that were stopped, or too long, before their end."""
    calls = [call for call in message.get("tool_calls", []) if is_whole(call)]
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "tool_calls": calls} if calls else rest


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """How a checkpoint is loaded here: flags for `dtype` and `device` of `connected`."""
    parser.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, …; default: the GPU if there is one")


@contextmanager
def connected(
    source: str,
    *,
    name: str | None = None,
    model: str | None = None,
    api_key: str = "none",
    adapter: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> Iterator[Endpoint]:
    """A model to talk to, until the context ends.

    `source`: URL of a server (`http://127.0.0.1:8000/v1`), of which `model` chooses among several (default: its first),
    or a checkpoint or PEFT adapter directory, or `hf://OWNER/NAME` for one of the Hugging Face hub. A checkpoint is
    loaded in this process and served on a loopback port to whoever knows its key, which is this client. Raises
    `UserError` when nobody answers at the URL, or for a directory that is no checkpoint.
    """
    if is_url(source):
        client = openai.OpenAI(base_url=source, api_key=api_key)
        try:
            model = model or client.models.list().data[0].id
        except openai.APIConnectionError:
            raise UserError(f"no server answers at {source}; start one with serve_hf.py") from None
        except openai.APIStatusError as error:
            raise UserError(f"{source}: the server refused: {error.message}") from None
        yield Endpoint(name or model, client, model)
        return
    # Loaded only here: talking to a server needs no PyTorch.
    from smolkit.openai_api import create_app
    from smolkit.runtime import prepare
    from smolkit.serving import load_engine, load_tokenizer, model_name_of, serving, split_adapter, stop_ids_of

    prepare(seed=None, huge_pages=True)
    directory, adapter_path = split_adapter(_downloaded(source), adapter)
    tokenizer, key = load_tokenizer(directory), secrets.token_urlsafe()
    stop_ids = stop_ids_of(directory, tokenizer)
    engine = load_engine(directory, tokenizer, model_name="local", dtype=dtype, device=device, adapter=adapter_path)
    app = create_app(engine, tokenizer, "local", key, stop_ids=stop_ids)
    try:
        with serving(app) as url:
            yield Endpoint(name or model_name_of(source), openai.OpenAI(base_url=f"{url}/v1", api_key=key), "local")
    finally:
        engine.close()


def is_url(source: str) -> bool:
    """Whether `source` is a server rather than a checkpoint."""
    return source.startswith(("http://", "https://"))


def _downloaded(source: str) -> str:
    """The directory of a `hf://OWNER/NAME`; anything else is a directory already."""
    if not source.startswith("hf://"):
        return source
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(source.removeprefix("hf://"), allow_patterns=["*.json", "*.jinja", "*.safetensors"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{source}: cannot be downloaded: {reason}; give hf://OWNER/NAME or a directory") from None


def read_tools(path: str | Path) -> list[dict[str, Any]]:
    """The OpenAI tool objects of a JSON file, checked."""
    try:
        return parse_tools(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or the UserError below
        raise UserError(f"{path}: {error}") from None


def parse_tools(text: str) -> list[dict[str, Any]]:
    """The OpenAI tool objects of a JSON text, checked; blank text is none."""
    if not text.strip():
        return []
    from smolkit.chat import validate_tools  # imports transformers: seconds that only tools need

    try:
        tools = json.loads(text)
    except ValueError as error:
        raise UserError(f"tools: not JSON: {error}") from None
    validate_tools(tools)
    return tools


# --- replies ------------------------------------------------------------------------------------------------


def stream_chat(
    endpoint: Endpoint,
    messages: Sequence[Message],
    *,
    system: str | None = None,
    tools: Sequence[dict[str, Any]] = (),
    top_logprobs: int | None = None,
    **options: Any,
) -> Iterator[Reply]:
    """The answer to `messages` as it grows: the same `Reply` again and again, complete when the iterator ends.

    `top_logprobs`: alternatives per token; None asks for no probabilities. `options` go to the API (`max_tokens`,
    `temperature`, ...). Closing the iterator cancels the generation. Raises `openai.APIError`.
    """
    if tools:
        options["tools"] = list(tools)
    if top_logprobs is not None:
        options |= {"logprobs": True, "top_logprobs": top_logprobs}
    conversation: Any = [{"role": "system", "content": system}] if system else []
    conversation += map(without_cut_calls, messages)
    calls: dict[int, Message] = {}
    reply, start = Reply(), time.monotonic()
    stream = endpoint.client.chat.completions.create(
        model=endpoint.model,
        messages=conversation,
        stream=True,
        stream_options={"include_usage": True},
        **options,
    )
    with stream:
        for chunk in stream:
            for choice in chunk.choices:
                reply.content += choice.delta.content or ""
                for part in choice.delta.tool_calls or []:
                    _collect(calls, part)
                for entry in (choice.logprobs and choice.logprobs.content) or []:
                    reply.tokens.append(_token(entry))
                reply.finish_reason = choice.finish_reason or reply.finish_reason
            reply.num_tokens = chunk.usage.completion_tokens if chunk.usage else reply.num_tokens
            reply.tool_calls, reply.seconds = list(calls.values()), time.monotonic() - start
            yield reply


def stream_text(endpoint: Endpoint, prompt: str, *, top_logprobs: int | None = None, **options: Any) -> Iterator[Reply]:
    """The continuation of a text as it grows, without a chat template; otherwise as `stream_chat`."""
    reply, start = Reply(), time.monotonic()
    stream = endpoint.client.completions.create(
        model=endpoint.model,
        prompt=prompt,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=top_logprobs,
        **options,
    )
    with stream:
        for chunk in stream:
            for choice in chunk.choices:
                reply.content += choice.text
                if found := choice.logprobs:
                    columns = (found.tokens or [], found.token_logprobs or [], found.top_logprobs or [])
                    for text, logprob, top in zip(*columns, strict=True):
                        ranked = sorted(top.items(), key=lambda pair: -pair[1])
                        alternatives = [(other, math.exp(value)) for other, value in ranked]
                        reply.tokens.append(Token(text, math.exp(logprob), alternatives))
                reply.finish_reason = choice.finish_reason or reply.finish_reason
            reply.num_tokens = chunk.usage.completion_tokens if chunk.usage else reply.num_tokens
            reply.seconds = time.monotonic() - start
            yield reply


def _collect(calls: dict[int, Message], part: Any) -> None:
    """Add a streamed piece of a tool call to the calls so far, by index."""
    empty = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
    call = calls.setdefault(part.index, empty)
    call["id"] += part.id or ""
    if part.function is not None:
        call["function"]["name"] += part.function.name or ""
        call["function"]["arguments"] += part.function.arguments or ""


def _token(entry: Any) -> Token:
    alternatives = [(_text_of(top), math.exp(top.logprob)) for top in entry.top_logprobs or []]
    return Token(_text_of(entry), math.exp(entry.logprob), alternatives)


def _text_of(entry: Any) -> str:
    """The token's text; for a part of a character its bytes, as ⟨E5 B7⟩."""
    if entry.bytes is None:
        return entry.token
    try:
        return bytes(entry.bytes).decode()
    except UnicodeDecodeError:
        return "⟨" + " ".join(f"{byte:02X}" for byte in entry.bytes) + "⟩"


NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)


def named_source(text: str) -> tuple[str | None, str]:
    """(name, source) of `NAME=SOURCE`, or (None, source)."""
    match = None if is_url(text) else NAMED.fullmatch(text)
    return (match[1], match[2]) if match else (None, text)
