"""The OpenAI-compatible HTTP API over any `Engine`: `create_app` makes the FastAPI application.

A request is rendered to token ids, handed to the engine, and its tokens come back as text through
`smolkit.text_stream`. Streamed and whole answers are made from the same pieces, so they agree to the
character.
"""

import asyncio
import hmac
import json
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from smolkit import openai_types as api
from smolkit.chat import chat_stop_ids, encode_text, render
from smolkit.engine import Engine, EngineBusy, EngineError, GenerationRequest, TokenEvent
from smolkit.errors import UserError
from smolkit.openai_types import ApiError
from smolkit.text_stream import Detokenizer, StopStrings, ToolCallStream

logger = logging.getLogger(__name__)

MAX_CHOICES_PER_REQUEST = 128
MAX_MESSAGE_LENGTH = 500  # of error messages, which may quote the request
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


class _Answers:
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
                raise ApiError(400, message, param="messages", code="context_length_exceeded")
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


# --- responses ----------------------------------------------------------------------------------------------


def _usage(job: Job, counts: dict[int, int]) -> api.Usage:
    generated = sum(counts.values())
    return api.Usage(
        prompt_tokens=job.prompt_tokens,
        completion_tokens=generated,
        total_tokens=job.prompt_tokens + generated,
    )


def _joined(job: Job, pieces: list[Piece]) -> list[Piece]:
    """One piece per choice."""
    whole = [Piece(index) for index in range(len(job.requests))]
    for piece in pieces:
        target = whole[piece.index]
        target.text += piece.text
        target.calls += piece.calls
        target.logprobs += piece.logprobs
        target.offsets += piece.offsets
        target.finish_reason, target.num_tokens = piece.finish_reason, piece.num_tokens
    return whole


def _text_logprobs(piece: Piece) -> api.TextLogprobs:
    return api.TextLogprobs(
        text_offset=piece.offsets,
        token_logprobs=[entry.logprob for entry in piece.logprobs],
        tokens=[entry.token for entry in piece.logprobs],
        top_logprobs=[{top.token: top.logprob for top in entry.top_logprobs} for entry in piece.logprobs],
    )


def _chat_choice(piece: Piece, logprobs: bool) -> dict[str, Any]:
    message = api.AssistantMessage(content=piece.text, tool_calls=piece.calls or None)
    if piece.calls and not piece.text:
        message.content = None
    choice = api.ChatChoice(
        index=piece.index,
        message=message,
        logprobs=api.ChatLogprobs(content=piece.logprobs) if logprobs else None,
        finish_reason=piece.finish_reason,
    ).model_dump()
    if not piece.calls:
        del choice["message"]["tool_calls"]
    return choice


def _text_choice(piece: Piece, logprobs: bool) -> dict[str, Any]:
    return api.TextChoice(
        index=piece.index,
        text=piece.text,
        logprobs=_text_logprobs(piece) if logprobs else None,
        finish_reason=piece.finish_reason,
    ).model_dump()


class _ChatChunks:
    """Streamed chat choices: a role chunk first, then deltas, then the finish reason."""

    object_name = "chat.completion.chunk"

    def __init__(self, logprobs: bool) -> None:
        self.logprobs = logprobs
        self.num_calls: dict[int, int] = {}

    def of(self, piece: Piece) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        if piece.index not in self.num_calls:
            self.num_calls[piece.index] = 0
            deltas.append({"role": "assistant", "content": ""})
        if piece.text or piece.logprobs:
            deltas.append({"content": piece.text})
        for call in piece.calls:
            deltas.append({"tool_calls": [{"index": self.num_calls[piece.index], **call.model_dump()}]})
            self.num_calls[piece.index] += 1
        choices = [{"index": piece.index, "delta": d, "logprobs": None, "finish_reason": None} for d in deltas]
        if piece.logprobs and self.logprobs:
            chosen = next(choice for choice in choices if "role" not in choice["delta"])
            chosen["logprobs"] = api.ChatLogprobs(content=piece.logprobs).model_dump()
        if piece.finish_reason:
            choices.append({"index": piece.index, "delta": {}, "logprobs": None, "finish_reason": piece.finish_reason})
        return choices


class _TextChunks:
    """Streamed text choices."""

    object_name = "text_completion"

    def __init__(self, logprobs: bool) -> None:
        self.logprobs = logprobs

    def of(self, piece: Piece) -> list[dict[str, Any]]:
        if not (piece.text or piece.logprobs or piece.finish_reason):
            return []
        logprobs = _text_logprobs(piece).model_dump() if self.logprobs else None
        finish = piece.finish_reason
        return [{"index": piece.index, "text": piece.text, "logprobs": logprobs, "finish_reason": finish}]


async def _sse(
    job: Job,
    pieces: AsyncIterator[Piece],
    head: dict[str, Any],
    chunks: _ChatChunks | _TextChunks,
    include_usage: bool,
) -> AsyncIterator[str]:
    """Server-sent events; an error after the first one is an `error` event, as at OpenAI."""
    head = {**head, "object": chunks.object_name}
    if include_usage:
        head["usage"] = None
    counts: dict[int, int] = {}
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                counts[piece.index] = piece.num_tokens
                for choice in chunks.of(piece):
                    yield _event({**head, "choices": [choice]})
    except EngineError as error:
        yield _event(api.error_body(str(error), "server_error"))
        return
    if include_usage:
        yield _event({**head, "choices": [], "usage": _usage(job, counts).model_dump()})
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _primed(pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    """Wait for the first piece, so that a refusal still becomes an HTTP status."""
    first = await anext(pieces)

    async def chained() -> AsyncIterator[Piece]:
        async with aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece

    return chained()


async def _unless_disconnected(http: Request, work: Callable[[], Any]) -> Any:
    """The result of `work()`; None, with the work cancelled, when the client leaves first."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work()), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _respond(
    http: Request,
    answers: _Answers,
    job: Job,
    body: api.ChatRequest | api.CompletionRequest,
    chat: bool,
) -> Response:
    head = api.response_head("chatcmpl" if chat else "cmpl", answers.model_name)
    logprobs = job.requests[0].logprobs is not None
    if body.stream:
        pieces = await _unless_disconnected(http, partial(_primed, answers.pieces(job)))
        if pieces is None:
            return Response(status_code=499)
        usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = _ChatChunks(logprobs) if chat else _TextChunks(logprobs)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = _sse(job, pieces, head, chunks, usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    async def collect() -> list[Piece]:
        return _joined(job, [piece async for piece in answers.pieces(job)])

    whole = await _unless_disconnected(http, collect)
    if whole is None:
        return Response(status_code=499)
    choice = _chat_choice if chat else _text_choice
    name = "chat.completion" if chat else "text_completion"
    usage = _usage(job, {piece.index: piece.num_tokens for piece in whole})
    choices = [choice(piece, logprobs) for piece in whole]
    return JSONResponse({**head, "object": name, "choices": choices, "usage": usage.model_dump()})


# --- the application ----------------------------------------------------------------------------------------


class _Guard:
    """ASGI middleware: API keys on every route but /health, and a limit on the request body."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], max_body_bytes: int) -> None:
        self.app, self.max_body_bytes = app, max_body_bytes
        self.expected = [f"Bearer {key}".encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        # Every key is compared, each in constant time: timing tells nothing about any of them.
        allowed = [hmac.compare_digest(given, expected) for expected in self.expected]
        if self.expected and scope["path"] != "/health" and not any(allowed):
            body = api.error_body("missing or wrong API key", "invalid_request_error", code="invalid_api_key")
            response = JSONResponse(body, 401, headers={"WWW-Authenticate": "Bearer"})
            await response(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body_bytes:
            await _too_large(self.max_body_bytes)(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise HTTPException(413, f"the request body is larger than {self.max_body_bytes} bytes")
            return message

        await self.app(scope, limited, send)


def _too_large(limit: int) -> JSONResponse:
    message = f"the request body is larger than {limit} bytes"
    return JSONResponse(api.error_body(message, "invalid_request_error"), 413)


def _validation_error(error: RequestValidationError) -> ApiError:
    errors = error.errors()
    # A field of several types (a string or a list) fails once per type: a wrong value says more than a wrong
    # type.
    first = next((e for e in errors if not e["type"].endswith("_type")), errors[0])
    path: list[str] = []
    value = error.body
    for part in first["loc"][1:]:  # past "body"; pydantic also puts the names of tried types here
        if isinstance(value, dict) and (part in value or first["type"] == "missing"):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        path.append(str(part))
    param = ".".join(path).encode("ascii", "backslashreplace").decode()[:100] or None
    return ApiError(400, f"{param or 'body'}: {first['msg']}"[:MAX_MESSAGE_LENGTH], param=param)


def _add_error_handlers(app: FastAPI) -> None:
    def response(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return response(_validation_error(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"no such route: {request.method} {ascii(request.url.path[:100])[1:-1]}"
        return response(ApiError(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(EngineBusy)
    async def busy(_: Request, error: EngineBusy) -> JSONResponse:
        return response(
            ApiError(503, str(error), kind="overloaded_error", code="overloaded", headers={"Retry-After": "1"})
        )

    @app.exception_handler(EngineError)
    async def engine_error(_: Request, error: EngineError) -> JSONResponse:
        return response(ApiError(500, str(error), kind="server_error"))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        # Starlette logs the traceback; the client learns nothing about the inside.
        return response(ApiError(500, "internal error", kind="server_error"))


def create_app(
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    model_name: str,
    api_key: str | Sequence[str] | None = None,
    *,
    stop_ids: Collection[int] | None = None,
    default_max_tokens: int | None = None,
    max_body_bytes: int = 4 * 2**20,
) -> FastAPI:
    """The application that serves `engine` as `model_name`.

    `api_key`: one or several keys; None serves everybody. `stop_ids` end every answer (default: the
    tokenizer's chat end and end of text). `default_max_tokens` is used when a request names none; None is
    what the context leaves. Documentation pages need no network.
    """
    answers = _Answers(engine, tokenizer, model_name, stop_ids, default_max_tokens)
    app = FastAPIOffline(title="SmolLM", description="OpenAI-compatible API", version="1")
    keys = [api_key] if isinstance(api_key, str) else list(api_key or [])
    app.add_middleware(_Guard, api_keys=keys, max_body_bytes=max_body_bytes)
    _add_error_handlers(app)
    errors = {status: {"model": api.ErrorResponse} for status in (400, 401, 404, 413, 500, 503)}
    card = api.ModelCard(
        id=model_name,
        created=api.response_head("", "")["created"],
        max_model_len=engine.max_model_len,
    )

    @app.post("/v1/chat/completions", responses={200: {"model": api.ChatCompletion}, **errors})
    async def chat_completions(body: api.ChatRequest, http: Request) -> Response:
        """Answer a conversation; tools may be called."""
        job = await run_in_threadpool(answers.chat_job, body)
        return await _respond(http, answers, job, body, chat=True)

    @app.post("/v1/completions", responses={200: {"model": api.Completion}, **errors})
    async def completions(body: api.CompletionRequest, http: Request) -> Response:
        """Continue a text."""
        job = await run_in_threadpool(answers.completion_job, body)
        return await _respond(http, answers, job, body, chat=False)

    @app.get("/v1/models", responses={401: errors[401]})
    async def models() -> api.ModelList:
        """The served model."""
        return api.ModelList(data=[card])

    @app.get("/v1/models/{model}", responses={401: errors[401], 404: errors[404]})
    async def model(model: str) -> api.ModelCard:
        """The served model, by name."""
        if model != model_name:
            raise ApiError(404, f"the model {ascii(model[:64])} does not exist", param="model", code="model_not_found")
        return card

    @app.get("/health")
    async def health() -> api.Health:
        """Whether the server is up; needs no key."""
        return api.Health()

    return app
