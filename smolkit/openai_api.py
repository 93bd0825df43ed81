"""The OpenAI-compatible HTTP API over any `Engine`: `create_app` makes the FastAPI application.

What a request asks of the engine and how tokens become text is in `smolkit.answers`; here are routes, response
bodies, server-sent events, keys, limits and error shapes.
"""

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import aclosing
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

from smolkit import openai_types as api
from smolkit.answers import Answers, Job, Piece
from smolkit.engine import Engine, EngineBusy, EngineError
from smolkit.openai_types import ApiError

logger = logging.getLogger(__name__)

MAX_MESSAGE_LENGTH = 500  # of error messages, which may quote the request


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
    except Exception as error:  # the status line is out: the client can only be told in the stream
        known = isinstance(error, EngineError)
        if not known:
            logger.exception("streaming failed")
        yield _event(api.error_body(str(error) if known else "internal error", "server_error"))
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
    answers: Answers,
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
    answers = Answers(engine, tokenizer, model_name, stop_ids, default_max_tokens)
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
