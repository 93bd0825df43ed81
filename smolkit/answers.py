"""The way of an API request through the engine: request -> jobs of token ids -> pieces of finished text.

Streamed and whole answers are made from the same pieces, so they agree to the character.
"""

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from smolkit import openai_types as api
from smolkit.chat import chat_stop_ids, encode_prompt, encode_text, render
from smolkit.engine import DeadlineExceeded, Engine, EngineError
from smolkit.errors import UserError
from smolkit.grammar import Grammar, Grammars
from smolkit.openai_types import ApiError
from smolkit.sampling import GenerationRequest, TokenEvent
from smolkit.text_stream import BYTE_TOKEN, CallPart, Detokenizer, StopStrings, ToolCallStream

MAX_CHOICES_PER_REQUEST = 128
_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


@dataclass
class Piece:
    """The next part of one choice: everything in it is final."""

    index: int
    text: str = ""
    calls: list[CallPart] = field(default_factory=list)
    logprobs: list[api.TokenLogprob] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # of `logprobs`, in characters of the choice's text
    finish_reason: str | None = None
    num_tokens: int = 0  # generated for this choice so far


@dataclass(frozen=True)
class Job:
    """What one HTTP request asks of the engine: one generation request per choice."""

    requests: list[GenerationRequest]
    stops: list[str]
    prompt_tokens: int
    parse_tools: bool = False
    call_fragments: bool = False  # tool calls while they are written, instead of each as a whole
    single_call: bool = False
    echo: bool = False
    continues: bool = False  # the answer goes on in the prompt's text, where a chat's begins one of its own
    prompt_only: bool = False  # echo with max_tokens 0: the engine's one token is thrown away


class Answers:
    """Turns requests into jobs and jobs into pieces.

    `template_kwargs`: variables of the chat template that a request may set. `timeout`: seconds that one request may
    take.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerFast,
        model_name: str,
        stop_ids: Collection[int] | None = None,
        default_max_tokens: int | None = None,
        *,
        template_kwargs: Collection[str] = (),
        timeout: float | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.model_name = engine, tokenizer, model_name
        self.stop_ids = frozenset(chat_stop_ids(tokenizer) if stop_ids is None else stop_ids)
        self.default_max_tokens = default_max_tokens
        self.template_kwargs, self.timeout = tuple(template_kwargs), timeout
        self.adapters = tuple(engine.adapters)  # LoRA adapters: models of their own in the API

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer)  # when first needed: a large vocabulary takes a second

    def chat_job(self, body: api.ChatRequest) -> Job:
        self._check(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        tools = [tool.plain() for tool in body.tools or []] if body.tool_choice != "none" else []
        prompt_ids = self._rendered(body.messages, tools, True, body.chat_template_kwargs)
        single = body.parallel_tool_calls is False or isinstance(body.tool_choice, api.NamedTool)
        return self._job(
            body,
            [prompt_ids],
            max_tokens=body.max_completion_tokens or body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=self._grammar(body, tools, single),
            parse_tools=bool(tools),
            call_fragments=bool(body.stream),
            single_call=single,
        )

    def completion_job(self, body: api.CompletionRequest) -> Job:
        self._check(body)
        if body.max_tokens == 0 and not body.echo:
            raise ApiError(400, "max_tokens 0 needs echo: true", param="max_tokens")
        prompt = body.prompt
        prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        special = body.add_special_tokens is not False
        encoded = [encode_prompt(self.tokenizer, p, special) if isinstance(p, str) else list(p) for p in prompts]
        return self._job(
            body,
            encoded,
            max_tokens=1 if body.max_tokens == 0 else body.max_tokens,
            logprobs=body.logprobs,
            echo=bool(body.echo),
            continues=True,
            prompt_only=body.max_tokens == 0,
        )

    def tokenize(self, body: api.TokenizeRequest) -> api.Tokens:
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        if body.prompt is not None:
            ids = encode_prompt(self.tokenizer, body.prompt, body.add_special_tokens is not False)
        else:
            tools, generate = [tool.plain() for tool in body.tools or []], body.add_generation_prompt is not False
            ids = self._rendered(body.messages or [], tools, generate, body.chat_template_kwargs)
        strings: Any = None  # of a list of ids: a list
        if body.return_token_strs:
            strings = self.tokenizer.convert_ids_to_tokens(ids)
        return api.Tokens(count=len(ids), max_model_len=self.engine.max_model_len, tokens=ids, token_strs=strings)

    def detokenize(self, body: api.DetokenizeRequest) -> api.Text:
        self._check_model(body.model)
        self._check_ids(body.tokens, "tokens")
        text = self.tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False)
        return api.Text(prompt=text)  # type: ignore[arg-type]  # of a single sequence: one str

    def _rendered(
        self,
        messages: Sequence[api.Message],
        tools: list[dict[str, Any]],
        generation_prompt: bool,
        kwargs: dict[str, Any] | None,
    ) -> list[int]:
        for name in kwargs or {}:
            if name not in self.template_kwargs:
                allowed = ", ".join(self.template_kwargs) or "none"
                message = f"chat_template_kwargs: {ascii(name[:64])} is not among those this server allows ({allowed})"
                raise ApiError(400, message, param="chat_template_kwargs")
        plain = [message.plain(number) for number, message in enumerate(api.in_call_order(messages))]
        try:
            return render(self.tokenizer, plain, tools or None, generation_prompt, kwargs).input_ids
        except UserError as error:
            raise ApiError(400, str(error), param="messages") from None

    def _grammar(self, body: api.ChatRequest, tools: list[dict[str, Any]], single: bool) -> Grammar | None:
        must_call = body.tools_to_call()
        schema = body.response_format.schema_of() if body.response_format is not None else None
        if must_call:
            schema, param = None, "tools"  # an answer that has to call a tool has no content
        elif schema is not None:
            must_call, param = tools, "response_format"
        else:
            return None
        if body.ignore_eos or body.min_tokens:
            name = "ignore_eos" if body.ignore_eos else "min_tokens"
            raise ApiError(400, f"{name} cannot be combined with a constrained answer, which ends itself", param=name)
        try:
            return self._grammars.compile(schema, must_call, single)
        except UserError as error:
            raise ApiError(400, f"{param}: {error}", param=param) from None

    def _check(self, body: api.ChatRequest | api.CompletionRequest) -> None:
        api.refuse_unsupported(body)
        self._check_model(body.model)
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self.model_name and model not in self.adapters:
            message = f"the model {ascii(model[:64])} does not exist; this server has {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _check_ids(self, ids: Sequence[int], param: str) -> None:
        size = len(self.tokenizer)
        if not all(0 <= i < size for i in ids):
            raise ApiError(400, f"{param}: token ids are from 0 to {size - 1}", param=param)

    def _job(
        self,
        body: api.ChatRequest | api.CompletionRequest,
        prompts: list[list[int]],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        grammar: Grammar | None = None,
        **options: bool,
    ) -> Job:
        copies = body.n or 1
        # More than the engine ever holds would be refused as busy for ever.
        most = min(MAX_CHOICES_PER_REQUEST, getattr(self.engine, "capacity", MAX_CHOICES_PER_REQUEST))
        if copies * len(prompts) > most:
            message = f"{copies * len(prompts)} answers in one request, the limit is {most}"
            raise ApiError(400, message, param="n")
        requests = []
        for prompt_ids in prompts:
            room = self._room(prompt_ids, "prompt" if isinstance(body, api.CompletionRequest) else "messages")
            longest = min(max_tokens or self.default_max_tokens or room, room)
            for copy in range(copies):
                requests.append(
                    GenerationRequest(
                        prompt_ids=prompt_ids,
                        max_tokens=longest,
                        temperature=1.0 if body.temperature is None else body.temperature,
                        top_p=1.0 if body.top_p is None else body.top_p,
                        top_k=max(body.top_k or 0, 0),
                        min_p=body.min_p or 0.0,
                        presence_penalty=body.presence_penalty or 0.0,
                        frequency_penalty=body.frequency_penalty or 0.0,
                        repetition_penalty=body.repetition_penalty or 1.0,
                        logit_bias=body.biases(len(self.tokenizer)),
                        stop_ids=frozenset() if body.ignore_eos else self.stop_ids,
                        seed=None if body.seed is None else (body.seed + copy + 2**63) % 2**64 - 2**63,
                        logprobs=logprobs,
                        prompt_logprobs=logprobs if options.get("echo") else None,
                        min_tokens=min(body.min_tokens or 0, longest),
                        grammar=grammar,
                        adapter=body.model if body.model in self.adapters else None,
                        timeout=self.timeout,
                    )
                )
        return Job(requests, body.stops(), sum(map(len, prompts)), **options)

    def _room(self, prompt_ids: list[int], param: str) -> int:
        """How many tokens the context leaves for the answer."""
        limit = self.engine.max_model_len
        if not prompt_ids:
            raise ApiError(400, f"{param}: a prompt needs at least one token", param=param)
        self._check_ids(prompt_ids, param)
        if len(prompt_ids) >= limit:
            message = (
                f"the prompt has {len(prompt_ids)} tokens and the model's context is {limit} tokens, "
                "of which the answer needs at least one: shorten the prompt"
            )
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        return limit - len(prompt_ids)

    async def pieces(self, job: Job) -> AsyncGenerator[Piece]:
        """Pieces of all choices as they come. Closing it early cancels the generation.

        Raises `DeadlineExceeded` where the answers take longer than `timeout`.
        """
        deadline = None if self.timeout is None else asyncio.get_running_loop().time() + self.timeout
        streams = [self._choice(job, index, deadline) for index in range(len(job.requests))]
        if len(streams) == 1:
            async with aclosing(streams[0]) as stream:
                async for piece in stream:
                    yield piece
            return
        async with aclosing(_merged(streams)) as merged:
            async for piece in merged:
                yield piece

    async def _choice(self, job: Job, index: int, deadline: float | None) -> AsyncGenerator[Piece]:
        text = _ChoiceText(self.tokenizer, job, index)
        async with aclosing(self.engine.generate(job.requests[index])) as events:
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        event = await anext(events)
                except StopAsyncIteration:  # an engine that is shut down may give up without a word
                    raise EngineError("generation ended early") from None
                except TimeoutError:
                    raise DeadlineExceeded(f"the request took longer than {self.timeout:g} seconds") from None
                first = job.echo and text.num_tokens == 0  # has the whole prompt in it: seconds, for a long one
                piece = await asyncio.to_thread(text.push, event) if first else text.push(event)
                yield piece
                if piece.finish_reason:
                    return


class _ChoiceText:
    """The text side of one choice: tokens in, pieces out."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, job: Job, index: int) -> None:
        self.tokenizer, self.job, self.index = tokenizer, job, index
        before = job.requests[index].prompt_ids if job.continues and not job.echo else ()
        self.detokenizer, self.stops = Detokenizer(tokenizer, before), StopStrings(job.stops)
        self.calls = ToolCallStream(job.call_fragments) if job.parse_tools else None
        self.num_tokens = 0
        self.decoded = self.shown = 0  # characters known, and characters past the stop strings
        self.waiting: list[tuple[int, api.TokenLogprob]] = []  # log-probabilities of tokens not shown yet
        self.tokens: dict[int, dict[str, Any]] = {}  # see `_token`: likely ones come again and again

    def push(self, event: TokenEvent) -> Piece:
        if event.finish_reason == "error":
            raise EngineError("the grammar of this answer became too complex to follow")
        piece = Piece(self.index)
        if self.job.echo and self.num_tokens == 0:
            self._echo(piece, event)
        self.num_tokens += 1
        if self.job.prompt_only:
            self.num_tokens, piece.finish_reason = 0, "length"
            return piece
        piece.num_tokens = self.num_tokens
        ended = event.finish_reason == "stop"
        # Whoever scores a prompt counts on an entry for every token, the one that ends the answer included.
        if event.logprob is not None and (self.job.echo or not ended):
            self.waiting.append((self.decoded, self._logprob(event.token_id, event.logprob, event.top_logprobs)))
        new = "" if ended else self.detokenizer.push(event.token_id)
        if event.finish_reason:
            new += self.detokenizer.flush()
        self.decoded += len(new)
        text = self.stops.push(new)
        piece.finish_reason = "stop" if self.stops.stopped else event.finish_reason
        if piece.finish_reason:
            text += self.stops.flush()
        self.shown += len(text)
        self._show_logprobs(piece)
        if self.calls is not None:
            text, piece.calls = self._split(self.calls, text, piece)
        piece.text += text
        return piece

    def _echo(self, piece: Piece, event: TokenEvent) -> None:
        """The prompt, as the beginning of the choice."""
        scores = event.prompt_logprobs or ()
        for number, token_id in enumerate(self.job.requests[self.index].prompt_ids):
            if scores:
                piece.offsets.append(len(piece.text))
                piece.logprobs.append(self._logprob(token_id, *scores[number]))
            piece.text += self.detokenizer.push(token_id)
        if self.job.prompt_only:
            piece.text += self.detokenizer.flush()
        self.decoded = self.shown = len(piece.text)

    def _show_logprobs(self, piece: Piece) -> None:
        whole = piece.finish_reason is not None and not self.stops.stopped
        while self.waiting and (whole or self.waiting[0][0] < self.shown):
            offset, entry = self.waiting.pop(0)
            piece.offsets.append(offset)
            piece.logprobs.append(entry)

    def _split(self, stream: ToolCallStream, text: str, piece: Piece) -> tuple[str, list[CallPart]]:
        """Content and calls of a text. A complete call may end the answer, and says why it ended."""
        content, calls = stream.push(text)
        if piece.finish_reason is not None:
            rest, more = stream.flush()
            content, calls = content + rest, calls + more
        if stream.complete and self.job.single_call:
            calls, piece.finish_reason = [call for call in calls if call.index <= stream.complete[0]], "stop"
        if stream.complete and piece.finish_reason == "stop":
            piece.finish_reason = "tool_calls"
        return content, calls

    def _logprob(
        self, token_id: int, logprob: float | None, likely: Sequence[tuple[int, float]]
    ) -> api.TokenLogprob:
        top = [api.TopLogprob(**self._token(i), logprob=value) for i, value in likely]
        return api.TokenLogprob(**self._token(token_id), logprob=logprob, top_logprobs=top)

    def _token(self, token_id: int) -> dict[str, Any]:
        """Text and bytes of a token, as they are written in a response."""
        if (known := self.tokens.get(token_id)) is None:
            known = self.tokens[token_id] = self._read_token(token_id)
        return known

    def _read_token(self, token_id: int) -> dict[str, Any]:
        # As after another word: some decoders take a space from the beginning of a text.
        word, start = self._word
        text = self._decoded([*word, token_id])[start:]
        written: Any = self.tokenizer.convert_ids_to_tokens(token_id)  # of one id: one str
        if "\ufffd" in text and (byte := BYTE_TOKEN.fullmatch(written)):
            return {"token": text, "bytes": [int(byte[1], 16)]}
        if "\ufffd" in text and all(character in _BYTE_OF for character in written):  # part of a character
            return {"token": text, "bytes": [_BYTE_OF[character] for character in written]}
        return {"token": text, "bytes": list(text.encode())}

    @cached_property
    def _word(self) -> tuple[list[int], int]:
        """An ordinary token for the others to stand after, and the length of its text."""
        ids = encode_text(self.tokenizer, "a")[-1:]
        return ids, len(self._decoded(ids))

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


async def _merged(streams: Sequence[AsyncGenerator[Piece]]) -> AsyncGenerator[Piece]:
    """Pieces of several streams as they come; the first failure ends them all."""
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Piece]) -> None:
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
