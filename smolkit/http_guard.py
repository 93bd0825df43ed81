"""What stands before the routes of a server: keys, limits, request ids, metrics, the access log.

One ASGI middleware, so that it sees refusals, streams and failures alike.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import math
import re
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smolkit.openai_types import ApiError

logger = logging.getLogger(__name__)
access = logging.getLogger("smolkit.access")

OPEN_PATHS = frozenset({"/health"})  # no key, no rate limit: load balancers ask often
MAX_CLIENTS = 10_000  # remembered by the rate limit
GRACE_SECONDS = 30  # beyond the time of a request, for a client that reads slowly
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


@dataclass(frozen=True)
class Limits:
    """What one server takes on. `requests_per_minute` counts per API key, without keys per client address."""

    max_body_bytes: int = 4 * 2**20
    max_header_bytes: int = 32 * 2**10
    max_concurrent_requests: int = 512
    requests_per_minute: int | None = None
    request_timeout: float = 600.0  # seconds


@dataclass
class RequestRecord:
    """One line of the access log on its way; the routes fill in the tokens. Times are of `time.monotonic`."""

    request_id: str
    started: float
    status: int | None = None  # None: the client left before there was an answer
    first_token: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    streamed: bool = False


class Metrics:
    """Prometheus metrics of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("route", "status")
        self.requests = Counter("smollm_requests", "requests answered", labels, registry=self.registry)
        timing: dict[str, Any] = {"buckets": _SECONDS, "registry": self.registry}
        self.seconds = Histogram("smollm_request_seconds", "time to the end of the answer", ("route",), **timing)
        self.first_token = Histogram("smollm_time_to_first_token_seconds", "of generations", **timing)
        self.prompt_tokens = Counter("smollm_prompt_tokens", "tokens read", registry=self.registry)
        self.completion_tokens = Counter("smollm_completion_tokens", "tokens generated", registry=self.registry)
        self.in_flight = Gauge("smollm_requests_in_flight", "requests being answered", registry=self.registry)

    def watch(self, engine: object) -> None:
        """Show how many sequences an engine decodes and has waiting, where it knows."""
        for name in ("num_running", "num_waiting"):
            if hasattr(engine, name):
                gauge = Gauge(f"smollm_engine_{name}", "sequences in the engine", registry=self.registry)
                gauge.set_function(partial(getattr, engine, name))

    def observe(self, record: RequestRecord, route: str, seconds: float) -> None:
        self.requests.labels(route, str(record.status or 499)).inc()
        self.seconds.labels(route).observe(seconds)
        self.prompt_tokens.inc(record.prompt_tokens)
        self.completion_tokens.inc(record.completion_tokens)
        if record.first_token is not None:
            self.first_token.observe(record.first_token - record.started)

    def text(self) -> bytes:
        """The exposition, with the process's own and, under vLLM, the engine's."""
        return generate_latest(self.registry) + generate_latest(REGISTRY)


class RateLimit:
    """A token bucket per client: `per_minute` requests at once, refilled evenly."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._left: dict[str, tuple[float, float]] = {}  # client -> (requests left, when)

    def wait(self, client: str, now: float) -> float:
        """Take one request; 0, or the seconds until there is one to take."""
        left, when = self._left.get(client, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - when) * self.per_minute / 60)
        if left < 1:
            return (1 - left) * 60 / self.per_minute
        self._left.pop(client, None)  # the longest idle come first
        self._left[client] = (left - 1, now)
        if len(self._left) > MAX_CLIENTS:
            del self._left[next(iter(self._left))]
        return 0.0


class Guard:
    """The middleware. Adds `x-request-id` to every response: the client's own, where it sent a usable one."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, api_keys: Sequence[str] = ()) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        # Digests, because comparing texts of different lengths takes different times.
        self._keys = [_digest(f"Bearer {key}".encode()) for key in api_keys]
        self._rate = RateLimit(limits.requests_per_minute) if limits.requests_per_minute else None
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        record = scope["record"] = RequestRecord(_request_id(headers), time.monotonic())

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode())]
            await send(message)

        self._running += 1
        self.metrics.in_flight.set(self._running)
        try:
            refusal = self._refusal(scope, headers)
            if refusal is not None:
                await _answer(refusal)(scope, receive, named)
            else:
                await self._pass_on(scope, receive, named, record)
        finally:
            self._running -= 1
            self.metrics.in_flight.set(self._running)
            self._report(scope, record)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        """The application's answer, within the time a request has; its failures become a plain status 500."""
        deadline = asyncio.timeout(self.limits.request_timeout + GRACE_SECONDS)
        try:
            async with deadline:
                await self.app(scope, self._limited(receive), send)
        except Exception as error:
            if isinstance(error, TimeoutError) and deadline.expired():
                logger.warning("request %s: no end in time, closed", record.request_id)
                failure = ApiError(503, "the request took too long", kind="server_error", code="timeout")
            else:
                logger.exception("request %s failed", record.request_id)
                failure = ApiError(500, "internal error", kind="server_error")
            if record.status is None:
                await _answer(failure)(scope, receive, send)
            # else the response has begun: returning without its end makes the server close the connection

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
        limits = self.limits
        if sum(len(name) + len(value) for name, value in scope["headers"]) > limits.max_header_bytes:
            return ApiError(431, f"the request's headers are larger than {limits.max_header_bytes} bytes")
        if scope["path"] in OPEN_PATHS:
            return None
        key = self._key(headers)
        if self._rate is not None:
            # A wrong key is counted against the address that tries it.
            client = str(key) if key is not None else (scope.get("client") or ("unknown",))[0]
            if seconds := self._rate.wait(client, time.monotonic()):
                message = f"more than {limits.requests_per_minute} requests a minute: wait {seconds:.1f} seconds"
                wait = {"Retry-After": str(math.ceil(seconds))}
                return ApiError(429, message, kind="requests", code="rate_limit_exceeded", headers=wait)
        if self._keys and key is None:
            wrong = {"WWW-Authenticate": "Bearer"}
            return ApiError(401, "missing or wrong API key", code="invalid_api_key", headers=wrong)
        if self._running > limits.max_concurrent_requests:
            message = f"{limits.max_concurrent_requests} requests are being answered already"
            return ApiError(503, message, kind="overloaded_error", code="overloaded", headers={"Retry-After": "1"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > limits.max_body_bytes:
            return _too_large(limits.max_body_bytes)
        return None

    def _key(self, headers: dict[bytes, bytes]) -> int | None:
        """The number of the key that was given. Every key is compared: timing tells nothing about any of them."""
        given = _digest(headers.get(b"authorization", b""))
        right = [number for number, key in enumerate(self._keys) if hmac.compare_digest(given, key)]
        return right[0] if right else None

    def _limited(self, receive: Receive) -> Receive:
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limits.max_body_bytes:
                error = _too_large(self.limits.max_body_bytes)
                raise HTTPException(error.status, str(error))
            return message

        return limited

    def _report(self, scope: Scope, record: RequestRecord) -> None:
        seconds = time.monotonic() - record.started
        route = getattr(scope.get("route"), "path", "other")  # never the path itself: anybody can make up paths
        self.metrics.observe(record, route, seconds)
        first = record.first_token
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": record.request_id,
            "client": (scope.get("client") or ("unknown",))[0],
            "method": scope["method"],
            "path": scope["path"][:200],  # without the query, which may hold secrets
            "status": record.status or 499,
            "milliseconds": round(1000 * seconds, 1),
            "first_token_milliseconds": None if first is None else round(1000 * (first - record.started), 1),
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "stream": record.streamed,
        }
        access.info(json.dumps(line))


def log_access_to(path: str) -> None:
    """Write the access log, a JSON object per line, to a file; `-` is standard error."""
    handler = logging.StreamHandler(sys.stderr) if path == "-" else logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.addHandler(handler)
    access.setLevel(logging.INFO)
    access.propagate = False


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def _request_id(headers: dict[bytes, bytes]) -> str:
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request body is larger than {limit} bytes")


def _answer(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, headers=error.headers)
