"""The OpenAI-compatible HTTP API over any `Engine`: `create_app` makes the FastAPI application.

What a request asks of the engine and how tokens become text is in `smolkit.answers`; here are routes, response
bodies, server-sent events, keys, limits and error shapes.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from transformers import PreTrainedTokenizerFast

from smolkit import openai_types as api
from smolkit.answers import Answers, Job, Piece
from smolkit.engine import DeadlineExceeded, Engine, EngineBusy, EngineError
from smolkit.http_guard import Guard, Limits, Metrics, RequestRecord
from smolkit.openai_types import ApiError
from smolkit.text_stream import CallPart

logger = logging.getLogger(__name__)

# Variables of well-known chat templates that only choose among the template's own words.
TEMPLATE_KWARGS = ("enable_thinking", "thinking")
LONG = 256  # log-probabilities that are written in a thread: those of a whole prompt take a second


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
        top_logprobs=[_likely(entry) for entry in piece.logprobs],
    )


def _likely(entry: api.TokenLogprob) -> dict[str, float] | None:
    """As at OpenAI the token itself is among them, as one more where it is not likely."""
    if entry.logprob is None:
        return None
    likely = {top.token: top.logprob for top in reversed(entry.top_logprobs)}  # of tokens that read alike the best one
    likely.setdefault(entry.token, entry.logprob)
    return likely


def _tool_calls(parts: list[CallPart]) -> list[api.ToolCall]:
    calls: dict[int, api.ToolCall] = {}
    for part in parts:
        if part.name is not None:
            calls[part.index] = api.new_tool_call(part.name)
        calls[part.index].function.arguments += part.arguments
    return list(calls.values())


def _chat_choice(piece: Piece, logprobs: bool) -> dict[str, Any]:
    message = api.AssistantMessage(content=piece.text, tool_calls=_tool_calls(piece.calls) or None)
    if piece.calls and not piece.text:
        message.content = None
    choice = api.ChatChoice(
        index=piece.index,
        message=message,
        logprobs=api.ChatLogprobs(content=piece.logprobs) if logprobs else None,
        finish_reason=piece.finish_reason,  # type: ignore[arg-type]  # pydantic looks at it
    ).model_dump()
    if not piece.calls:
        del choice["message"]["tool_calls"]
    return choice


def _text_choice(piece: Piece, logprobs: bool) -> dict[str, Any]:
    return api.TextChoice(
        index=piece.index,
        text=piece.text,
        logprobs=_text_logprobs(piece) if logprobs else None,
        finish_reason=piece.finish_reason,  # type: ignore[arg-type]  # pydantic looks at it
    ).model_dump()


class _ChatChunks:
    """Streamed chat choices: a role chunk first, then deltas, then the finish reason.

    Of a tool call: a delta with its id, its name and no arguments first, then the arguments as they are written.
    """

    object_name = "chat.completion.chunk"

    def __init__(self, logprobs: bool) -> None:
        self.logprobs = logprobs
        self.begun: set[int] = set()

    def of(self, piece: Piece) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        if piece.index not in self.begun:
            self.begun.add(piece.index)
            deltas.append({"role": "assistant", "content": ""})
        if piece.text or piece.logprobs:
            deltas.append({"content": piece.text})
        for part in piece.calls:
            call = {"function": {"arguments": part.arguments}}
            if part.name is not None:
                call = api.new_tool_call(part.name).model_dump()
            deltas.append({"tool_calls": [{"index": part.index, **call}]})
        choices: list[dict[str, Any]]
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
    pieces: AsyncGenerator[Piece],
    head: dict[str, Any],
    chunks: _ChatChunks | _TextChunks,
    include_usage: bool,
    record: RequestRecord,
) -> AsyncGenerator[str]:
    """Server-sent events; an error after the first one is an `error` event, as at OpenAI."""
    head = {**head, "object": chunks.object_name}
    if include_usage:
        head["usage"] = None
    counts: dict[int, int] = {}
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                counts[piece.index] = piece.num_tokens
                record.completion_tokens = sum(counts.values())
                write = partial(_events, head, chunks, piece)
                for event in await run_in_threadpool(write) if len(piece.logprobs) > LONG else write():
                    yield event
    except Exception as error:  # the status line is out: the client can only be told in the stream
        known = isinstance(error, EngineError)
        if not known:
            logger.exception("streaming failed")
        yield _event(api.error_body(str(error) if known else "internal error", "server_error"))
        return
    if include_usage:
        yield _event({**head, "choices": [], "usage": _usage(job, counts).model_dump()})
    yield "data: [DONE]\n\n"


def _events(head: dict[str, Any], chunks: _ChatChunks | _TextChunks, piece: Piece) -> list[str]:
    return [_event({**head, "choices": [choice]}) for choice in chunks.of(piece)]


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _timed(pieces: AsyncGenerator[Piece], record: RequestRecord) -> AsyncGenerator[Piece]:
    """The same pieces; the first sets the record's clock."""
    async with aclosing(pieces):
        async for piece in pieces:
            if record.first_token is None:
                record.first_token = time.monotonic()
            yield piece


async def _primed(pieces: AsyncGenerator[Piece]) -> AsyncGenerator[Piece]:
    """Wait for the first piece, so that a refusal still becomes an HTTP status."""
    first = await anext(pieces)

    async def chained() -> AsyncGenerator[Piece]:
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
    answers: Answers,
    job: Job,
    body: api.ChatRequest | api.CompletionRequest,
    chat: bool,
) -> Response:
    head = api.response_head("chatcmpl" if chat else "cmpl", body.model or answers.model_name)
    logprobs = job.requests[0].logprobs is not None
    record: RequestRecord = http.scope["record"]
    record.prompt_tokens, record.streamed = job.prompt_tokens, bool(body.stream)
    timed = _timed(answers.pieces(job), record)
    if body.stream:
        pieces = await _unless_disconnected(http, partial(_primed, timed))
        if pieces is None:
            return Response(status_code=499)
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = _ChatChunks(logprobs) if chat else _TextChunks(logprobs)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = _sse(job, pieces, head, chunks, include_usage, record)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    async def collect() -> list[Piece]:
        async with aclosing(timed):
            return _joined(job, [piece async for piece in timed])

    whole = await _unless_disconnected(http, collect)
    if whole is None:
        return Response(status_code=499)
    usage = _usage(job, {piece.index: piece.num_tokens for piece in whole})
    record.completion_tokens = usage.completion_tokens

    def write() -> Response:
        choice = _chat_choice if chat else _text_choice
        name = "chat.completion" if chat else "text_completion"
        choices = [choice(piece, logprobs) for piece in whole]
        return JSONResponse({**head, "object": name, "choices": choices, "usage": usage.model_dump()})

    return await run_in_threadpool(write) if sum(len(piece.logprobs) for piece in whole) > LONG else write()


# --- the application ----------------------------------------------------------------------------------------


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
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param or 'body'}: {message}", param=param)


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

    @app.exception_handler(DeadlineExceeded)
    async def late(_: Request, error: DeadlineExceeded) -> JSONResponse:
        return response(ApiError(503, str(error), kind="server_error", code="timeout"))

    @app.exception_handler(EngineError)
    async def engine_error(_: Request, error: EngineError) -> JSONResponse:
        return response(ApiError(500, str(error), kind="server_error"))


def create_app(
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    model_name: str,
    api_key: str | Sequence[str] | None = None,
    *,
    stop_ids: Collection[int] | None = None,
    default_max_tokens: int | None = None,
    template_kwargs: Collection[str] = TEMPLATE_KWARGS,
    limits: Limits | None = None,
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """The application that serves `engine` as `model_name`.

    `api_key`: one or several keys; None serves everybody. `stop_ids` end every answer (default: the
    tokenizer's chat end and end of text). `default_max_tokens` is used when a request names none; None is
    what the context leaves. `template_kwargs`: variables of the chat template that requests may set. `cors_origins`:
    web pages whose scripts may ask (`*`: all). Documentation pages need no network.
    """
    limits, metrics = limits or Limits(), Metrics()
    metrics.watch(engine)
    answers = Answers(
        engine,
        tokenizer,
        model_name,
        stop_ids,
        default_max_tokens,
        template_kwargs=template_kwargs,
        timeout=limits.request_timeout,
    )
    app = FastAPIOffline(title="SmolLM", description="OpenAI-compatible API", version="1")
    keys = [api_key] if isinstance(api_key, str) else list(api_key or [])
    app.add_middleware(Guard, limits=limits, metrics=metrics, api_keys=keys)
    if cors_origins:  # before the keys: a browser asks without them whether it may send them
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    _add_error_handlers(app)
    _add_generation(app, answers)
    _add_models(app, answers)

    @app.get("/health", responses={503: {"model": api.ErrorResponse}})
    async def health() -> api.Health:
        """Whether the server is up and its engine can answer; needs no key."""
        if getattr(engine, "dead", False):
            raise ApiError(503, "the engine has failed for good", kind="server_error")
        return api.Health()

    @app.get("/metrics", responses=_ERRORS, response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Counters and timings for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    _document(app)
    return app


def _document(app: FastAPI) -> None:
    """The OpenAPI document says what is answered: status 400 instead of FastAPI's 422."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = original()
            for methods in document["paths"].values():
                for operation in methods.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(name, None)
        assert app.openapi_schema is not None, "`original` keeps what it made"
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to change the document


# Statuses that OpenAI's clients know; every one of them has this body.
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": api.ErrorResponse} for status in (400, 401, 404, 413, 429, 431, 500, 503)
}

# Of each event, as OpenAPI 3.2 and FastAPI write it: the schema of a stream would be that of its text.
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_STREAM = {"content": {"text/event-stream": {"itemSchema": _EVENT}}}


def _add_generation(app: FastAPI, answers: Answers) -> None:
    @app.post("/v1/chat/completions", responses={200: {"model": api.ChatCompletion, **_STREAM}, **_ERRORS})
    async def chat_completions(body: api.ChatRequest, http: Request) -> Response:
        """Answer a conversation; tools may be called."""
        job = await run_in_threadpool(answers.chat_job, body)
        return await _respond(http, answers, job, body, chat=True)

    @app.post("/v1/completions", responses={200: {"model": api.Completion, **_STREAM}, **_ERRORS})
    async def completions(body: api.CompletionRequest, http: Request) -> Response:
        """Continue a text."""
        job = await run_in_threadpool(answers.completion_job, body)
        return await _respond(http, answers, job, body, chat=False)

    @app.post("/tokenize", responses=_ERRORS)
    async def tokenize(body: api.TokenizeRequest) -> api.Tokens:
        """The token ids of a prompt, or of a conversation as the model gets it."""
        return await run_in_threadpool(answers.tokenize, body)

    @app.post("/detokenize", responses=_ERRORS)
    async def detokenize(body: api.DetokenizeRequest) -> api.Text:
        """The text of token ids."""
        return await run_in_threadpool(answers.detokenize, body)


def _add_models(app: FastAPI, answers: Answers) -> None:
    created, length = int(time.time()), answers.engine.max_model_len
    names = (answers.model_name, *answers.adapters)
    cards = {name: api.ModelCard(id=name, created=created, max_model_len=length) for name in names}

    @app.get("/v1/models", responses=_ERRORS)
    async def models() -> api.ModelList:
        """The served model, and its adapters."""
        return api.ModelList(data=list(cards.values()))

    @app.get("/v1/models/{model:path}", responses=_ERRORS)
    async def model(model: str) -> api.ModelCard:
        """A served model, by name."""
        if model not in cards:
            raise ApiError(404, f"the model {ascii(model[:64])} does not exist", param="model", code="model_not_found")
        return cards[model]
