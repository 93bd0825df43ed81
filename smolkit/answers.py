"""The way of an API request through the engine: request -> jobs of token ids -> pieces of finished text.

Streamed and whole answers are made from the same pieces, so they agree to the character.
"""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from smolkit import openai_types as api
from smolkit.chat import chat_stop_ids, encode_text, render
from smolkit.engine import Engine
from smolkit.errors import UserError
from smolkit.openai_types import ApiError
from smolkit.sampling import GenerationRequest, TokenEvent
from smolkit.text_stream import Detokenizer, StopStrings, ToolCallStream

MAX_CHOICES_PER_REQUEST = 128
_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


@dataclass
class Piece:
    """The next part of one choice: everything in it is final."""

    index: int
    text: str = ""
    calls: list[api.ToolCall] = field(default_factory=list)
    logprobs: list[api.TokenLogprob] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # of `logprobs`, in characters of the choice's text
    finish_reason: str | None = None
    num_tokens: int = 0  # generated for this choice so far


@dataclass(frozen=True)
class Job:
    """What one HTTP request asks of the engine: one generation request per choice."""

    requests: list[GenerationRequest]
    stops: list[str]
    parse_tools: bool
    prompt_tokens: int


class Answers:
    """Turns requests into jobs and jobs into pieces."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerFast,
        model_name: str,
        stop_ids: Collection[int] | None,
        default_max_tokens: int | None,
    ) -> None:
        self.engine, self.tokenizer, self.model_name = engine, tokenizer, model_name
        self.stop_ids = frozenset(chat_stop_ids(tokenizer) if stop_ids is None else stop_ids)
        self.default_max_tokens = default_max_tokens

    def chat_job(self, body: api.ChatRequest) -> Job:
        self._check(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        messages = [message.plain(number) for number, message in enumerate(body.messages)]
        tools = [tool.plain() for tool in body.tools or []] if body.tool_choice != "none" else []
        try:
            prompt_ids = render(self.tokenizer, messages, tools or None, add_generation_prompt=True).input_ids
        except UserError as error:
            raise ApiError(400, str(error), param="messages") from None
        max_tokens = body.max_completion_tokens or body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return self._job(body, [prompt_ids], max_tokens, logprobs, bool(tools))

    def completion_job(self, body: api.CompletionRequest) -> Job:
        self._check(body)
        prompt = body.prompt
        prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        encoded = [self._encode(item) if isinstance(item, str) else list(item) for item in prompts]
        return self._job(body, encoded, body.max_tokens, body.logprobs, False)

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            message = f"prompt: unpaired surrogate at character {error.start}"
            raise ApiError(400, message, param="prompt") from None
        return encode_text(self.tokenizer, text)

    def _check(self, body: api.ChatRequest | api.CompletionRequest) -> None:
        api.refuse_unsupported(body)
        if body.model is not None and body.model != self.model_name:
            message = f"the model {ascii(body.model[:64])} does not exist; this server has {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")

    def _job(
        self,
        body: api.ChatRequest | api.CompletionRequest,
        prompts: list[list[int]],
        max_tokens: int | None,
        logprobs: int | None,
        parse_tools: bool,
    ) -> Job:
        copies = body.n or 1
        if copies * len(prompts) > MAX_CHOICES_PER_REQUEST:
            message = f"{copies * len(prompts)} answers in one request, the limit is {MAX_CHOICES_PER_REQUEST}"
            raise ApiError(400, message, param="n")
        vocab_size, limit = len(self.tokenizer), self.engine.max_model_len
        requests = []
        for prompt_ids in prompts:
            room = limit - len(prompt_ids)
            if not prompt_ids or not all(0 <= i < vocab_size for i in prompt_ids):
                message = f"a prompt needs at least one token, and token ids from 0 to {vocab_size - 1}"
                raise ApiError(400, message, param="prompt")
            if room < 1:
                message = (
                    f"the prompt has {len(prompt_ids)} tokens and the model's context is {limit} tokens, "
                    "of which the answer needs at least one: shorten the prompt"
                )
                param = "prompt" if isinstance(body, api.CompletionRequest) else "messages"
                raise ApiError(400, message, param=param, code="context_length_exceeded")
            for copy in range(copies):
                requests.append(
                    GenerationRequest(
                        prompt_ids=prompt_ids,
                        max_tokens=min(max_tokens or self.default_max_tokens or room, room),
                        temperature=1.0 if body.temperature is None else body.temperature,
                        top_p=1.0 if body.top_p is None else body.top_p,
                        top_k=max(body.top_k or 0, 0),
                        min_p=body.min_p or 0.0,
                        presence_penalty=body.presence_penalty or 0.0,
                        frequency_penalty=body.frequency_penalty or 0.0,
                        repetition_penalty=body.repetition_penalty or 1.0,
                        logit_bias=body.biases(vocab_size),
                        stop_ids=self.stop_ids,
                        seed=None if body.seed is None else (body.seed + copy + 2**63) % 2**64 - 2**63,
                        logprobs=logprobs,
                    )
                )
        return Job(requests, body.stops(), parse_tools, sum(map(len, prompts)) * copies)

    async def pieces(self, job: Job) -> AsyncIterator[Piece]:
        """Pieces of all choices as they come. Closing it early cancels the generation."""
        streams = [self._choice(job, index) for index in range(len(job.requests))]
        if len(streams) == 1:
            async with aclosing(streams[0]) as stream:
                async for piece in stream:
                    yield piece
            return
        async with aclosing(_merged(streams)) as merged:
            async for piece in merged:
                yield piece

    async def _choice(self, job: Job, index: int) -> AsyncIterator[Piece]:
        request = job.requests[index]
        text = _ChoiceText(self.tokenizer, job, index)
        async with aclosing(self.engine.generate(request)) as events:
            async for event in events:
                piece = text.push(event)
                yield piece
                if piece.finish_reason:
                    return


class _ChoiceText:
    """The text side of one choice: tokens in, pieces out."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, job: Job, index: int) -> None:
        self.tokenizer, self.index = tokenizer, index
        self.detokenizer, self.stops = Detokenizer(tokenizer), StopStrings(job.stops)
        self.calls = ToolCallStream() if job.parse_tools else None
        self.num_tokens = self.num_calls = 0
        self.decoded = self.shown = 0  # characters known, and characters past the stop strings
        self.waiting: list[tuple[int, api.TokenLogprob]] = []  # log-probabilities of tokens not shown yet

    def push(self, event: TokenEvent) -> Piece:
        self.num_tokens += 1
        ended = event.finish_reason == "stop"
        if event.logprob is not None and not ended:
            self.waiting.append((self.decoded, self._logprob(event)))
        new = "" if ended else self.detokenizer.push(event.token_id)
        if event.finish_reason:
            new += self.detokenizer.flush()
        self.decoded += len(new)
        text = self.stops.push(new)
        finish = "stop" if self.stops.stopped else event.finish_reason
        if finish:
            text += self.stops.flush()
        self.shown += len(text)
        piece = Piece(self.index, finish_reason=finish, num_tokens=self.num_tokens)
        whole = finish is not None and not self.stops.stopped
        while self.waiting and (whole or self.waiting[0][0] < self.shown):
            offset, entry = self.waiting.pop(0)
            piece.offsets.append(offset)
            piece.logprobs.append(entry)
        piece.text, calls = self._split(text, finish is not None)
        for call in calls:
            piece.calls.append(_tool_call(call))
        self.num_calls += len(calls)
        if finish == "stop" and self.num_calls:
            piece.finish_reason = "tool_calls"
        return piece

    def _split(self, text: str, last: bool) -> tuple[str, list[dict[str, Any]]]:
        if self.calls is None:
            return text, []
        content, calls = self.calls.push(text)
        if last:
            rest, more = self.calls.flush()
            content, calls = content + rest, calls + more
        return content, calls

    def _logprob(self, event: TokenEvent) -> api.TokenLogprob:
        assert event.logprob is not None
        top = [api.TopLogprob(**self._token(i), logprob=value) for i, value in event.top_logprobs]
        return api.TokenLogprob(**self._token(event.token_id), logprob=event.logprob, top_logprobs=top)

    def _token(self, token_id: int) -> dict[str, Any]:
        text = self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        written = self.tokenizer.convert_ids_to_tokens(token_id)
        if "\ufffd" in text and all(character in _BYTE_OF for character in written):  # part of a character
            return {"token": text, "bytes": [_BYTE_OF[character] for character in written]}
        return {"token": text, "bytes": list(text.encode())}


def _tool_call(call: dict[str, Any]) -> api.ToolCall:
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    if not _encodable(arguments):  # an escaped lone surrogate is JSON, but not UTF-8
        arguments = json.dumps(call["arguments"])
    name = call["name"] if _encodable(call["name"]) else ascii(call["name"])[1:-1]
    return api.ToolCall(id=f"call_{uuid.uuid4().hex}", function=api.FunctionCall(name=name, arguments=arguments))


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


async def _merged(streams: Sequence[AsyncIterator[Piece]]) -> AsyncIterator[Piece]:
    """Pieces of several streams as they come; the first failure ends them all."""
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

    async def pump(stream: AsyncIterator[Piece]) -> None:
        try:
            async with aclosing(stream):
                async for piece in stream:
                    queue.put_nowait(piece)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
