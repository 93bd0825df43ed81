"""Token generation: the small `Engine` protocol, and our own continuous-batching engine over a PyTorch model.

Token ids go in, token events come out; text, templates and HTTP live elsewhere. `TorchEngine` runs the batch of
`smolkit.batch` on one inference thread behind asyncio.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from smolkit.batch import ContinuousBatch, Result, SequenceState
from smolkit.decoder import Pair
from smolkit.runtime import release_threads
from smolkit.sampling import GenerationRequest, TokenEvent

logger = logging.getLogger(__name__)

# Tokens of a prompt that run together, and most of them between two steps, by device.
CHUNK = {"cpu": 128, "else": 512}
MAX_BATCHED_TOKENS = {"cpu": 512, "else": 4096}


class EngineBusy(RuntimeError):
    """The waiting queue is full; the caller should try again later."""


class EngineError(RuntimeError):
    """Generation failed inside the engine; details are in the log, not in the message."""


class DeadlineExceeded(EngineError):
    """The request was not finished in the time it had."""


class Engine(Protocol):
    """What the HTTP layer needs. Closing the iterator early cancels the request.

    `generate` raises `EngineBusy` when it cannot take the request and `EngineError` when generation fails,
    both while the first (or a later) event is awaited. One may also have `capacity`, the most requests it holds, and
    `dead`, true once it has failed for good.
    """

    @property
    def model_name(self) -> str: ...

    @property
    def adapters(self) -> Sequence[str]:
        """Names that `GenerationRequest.adapter` may have."""
        ...

    @property
    def max_model_len(self) -> int: ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent]: ...


class _Ticket:
    """Connects one awaiting coroutine with the inference thread."""

    def __init__(self, sequence: SequenceState, timeout: float | None) -> None:
        self.sequence = sequence
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[TokenEvent | Exception] = asyncio.Queue()
        self.cancelled = False

    @property
    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def send(self, event: TokenEvent | Exception) -> None:
        """Called on the inference thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the event loop has been closed: nobody is listening any more
            self.cancelled = True


def _put_all(deliveries: Iterable[tuple[_Ticket, TokenEvent]]) -> None:
    for ticket, event in deliveries:
        ticket.events.put_nowait(event)


class TorchEngine:
    """The `Engine` over a PyTorch model: one inference thread, continuous batching, a bounded queue.

    At most `max_num_seqs` sequences are decoded together and `max_queue` more wait; beyond that `generate` raises
    `EngineBusy`. A request that is not finished after `timeout` seconds, or its own, gets `DeadlineExceeded`.
    `limits` are those of `ContinuousBatch`. `adapters`: LoRA weights by name, see `Decoder.adapt`. `on_death` is called
    on the inference thread when the device has failed for good: the engine is `dead` then, and takes nothing more.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        model_name: str = "model",
        adapters: Mapping[str, dict[str, Pair]] | None = None,
        max_queue: int = 256,
        timeout: float | None = None,
        vocab_limit: int | None = None,
        on_death: Callable[[], None] = lambda: None,
        **limits: Any,
    ) -> None:
        kind = "cpu" if model.device.type == "cpu" else "else"
        limits = {"max_num_batched_tokens": MAX_BATCHED_TOKENS[kind]} | limits
        limits = {"chunk": min(CHUNK[kind], limits["max_num_batched_tokens"])} | limits
        self._batch = ContinuousBatch(model.eval(), vocab_limit, **limits)
        for name, pairs in (adapters or {}).items():
            self._batch.decoder.adapt(name, pairs)
        self._name, self._adapters = model_name, tuple(adapters or ())
        self._max_queue, self._timeout = max_queue, timeout
        self._arrived: deque[_Ticket] = deque()  # not yet seen by the inference thread
        self._tickets: dict[SequenceState, _Ticket] = {}
        self._changed = threading.Condition()
        self._closed = self.dead = False
        self._on_death = on_death
        release_threads()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    @property
    def model_name(self) -> str:
        return self._name

    @property
    def adapters(self) -> Sequence[str]:
        """Names of the LoRA adapters."""
        return self._adapters

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus answer, in tokens."""
        return self._batch.max_model_len

    @property
    def capacity(self) -> int:
        """Most requests at a time, running or waiting."""
        return self._batch.max_num_seqs + self._max_queue

    @property
    def num_running(self) -> int:
        return len(self._batch.running)

    @property
    def num_waiting(self) -> int:
        return len(self._arrived) + len(self._batch.waiting)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent]:
        """Yield the tokens of one request; see `Engine`. The prompt must leave room for `max_tokens`."""
        self._check(request)
        timeout = self._timeout if request.timeout is None else request.timeout
        ticket = _Ticket(self._batch.start(request), timeout)
        with self._changed:
            if self._closed:
                raise EngineError("the engine is shut down")
            if len(self._tickets) + len(self._arrived) >= self.capacity:
                raise EngineBusy(f"{self.num_waiting} requests are waiting already (limit {self._max_queue})")
            self._arrived.append(ticket)
            self._changed.notify()
        try:
            while True:
                event = await ticket.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if event.finish_reason:
                    return
        finally:
            ticket.cancelled = True  # harmless when finished; otherwise the thread drops the sequence

    def close(self) -> None:
        """Stop the inference thread; unfinished requests get an `EngineError`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _check(self, request: GenerationRequest) -> None:
        total = len(request.prompt_ids) + request.max_tokens
        if not request.prompt_ids or request.max_tokens < 1:
            raise ValueError("a request needs at least one prompt token and max_tokens >= 1")
        if total > self.max_model_len:
            raise ValueError(f"prompt plus max_tokens is {total}, the model's limit is {self.max_model_len}")
        if request.adapter is not None and request.adapter not in self._adapters:
            raise ValueError(f"no adapter {request.adapter!r}; there are: {', '.join(self._adapters) or 'none'}")

    def _run(self) -> None:
        while self._take_in():
            try:
                self._drop()
                self._deliver(self._batch.step())
            except Exception as error:
                # One bad step must not end the server: everybody in it is told, and the batch starts empty.
                logger.exception("inference failed")
                waiting = set(self._batch.waiting)
                self._abort([s for s in self._tickets if s not in waiting], EngineError("generation failed"))
                if isinstance(error, torch.AcceleratorError):  # every later call would fail like this one
                    self._die()
                else:
                    self._batch.clear()
        self._abort(list(self._tickets), EngineError("the engine was shut down"))

    def _die(self) -> None:
        with self._changed:
            self._closed = self.dead = True
        self._on_death()

    def _take_in(self) -> bool:
        """Give new requests to the batch, after waiting for one if there is nothing to do; False at the end."""
        with self._changed:
            while not (self._closed or self._arrived or self._tickets):
                self._changed.wait()
            while self._arrived:
                ticket = self._arrived.popleft()
                self._tickets[ticket.sequence] = ticket
                self._batch.add(ticket.sequence)
            return not self._closed

    def _drop(self) -> None:
        """Take out what nobody waits for and what is late."""
        for sequence, ticket in list(self._tickets.items()):
            if ticket.cancelled or ticket.late:
                self._batch.remove(sequence)
                self._abort([sequence], DeadlineExceeded("the request was not finished in the time it had"))

    def _deliver(self, results: Iterable[Result]) -> None:
        """Hand a step's events over, in one call to each event loop: a call wakes its thread, which takes a core."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Ticket, TokenEvent]]] = {}
        for sequence, event in results:
            if isinstance(event, Exception):
                logger.error("inference of one request failed", exc_info=event)
                self._abort([sequence], EngineError("generation failed"))
                continue
            ticket = self._tickets[sequence]
            by_loop.setdefault(ticket.loop, []).append((ticket, event))
            if event.finish_reason:
                del self._tickets[sequence]
        for loop, deliveries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, deliveries)
            except RuntimeError:  # closed: nobody is listening any more
                for ticket, _ in deliveries:
                    ticket.cancelled = True

    def _abort(self, sequences: Iterable[SequenceState], error: EngineError) -> None:
        for sequence in sequences:
            self._tickets.pop(sequence).send(error)
