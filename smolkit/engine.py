"""Token generation: the small `Engine` protocol, and our own continuous-batching engine over a PyTorch model.

Token ids go in, token events come out; text, templates and HTTP live elsewhere. `ContinuousBatch` is the
synchronous core (KV cache in slots, one decode step for everybody); `TorchEngine` runs it on one inference
thread behind asyncio; `generate_batch` runs it in a plain loop for evaluation.

The arithmetic is `smolkit.decoder`'s.

Requests join and leave between decode steps (iteration-level scheduling: Orca, Yu et al., OSDI 2022).
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from smolkit.decoder import Decoder
from smolkit.runtime import release_threads
from smolkit.sampling import FinishReason, GenerationRequest, Sampler, Scores, TokenEvent, logprobs_of

logger = logging.getLogger(__name__)


class EngineBusy(RuntimeError):
    """The waiting queue is full; the caller should try again later."""


class EngineError(RuntimeError):
    """Generation failed inside the engine; details are in the log, not in the message."""


class DeadlineExceeded(EngineError):
    """The request was not finished in the time it had."""


class Engine(Protocol):
    """What the HTTP layer needs. Closing the iterator early cancels the request.

    `generate` raises `EngineBusy` when it cannot take the request and `EngineError` when generation fails,
    both while the first (or a later) event is awaited.
    """

    @property
    def model_name(self) -> str: ...

    @property
    def max_model_len(self) -> int: ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]: ...


class _Sequence:
    """A request on its way: its sampler, the cache columns it fills, the token to feed next."""

    def __init__(self, request: GenerationRequest, vocab_size: int) -> None:
        self.request = request
        self.sampler = Sampler(request, vocab_size)
        self.length = 0  # columns in the cache
        self.next_token = 0
        self.num_generated = 0


class ContinuousBatch:
    """Sequences decoded together: they join by `prefill` and leave at their end or by `remove`.

    `vocab_limit` cuts padded vocabulary rows off (the embedding may be larger than the tokenizer).
    Not thread-safe: one thread owns it.
    """

    def __init__(self, model: nn.Module, vocab_limit: int | None = None) -> None:
        self.decoder = Decoder(model, vocab_limit)
        self.sequences: list[_Sequence] = []  # sequence i lives in cache row i

    def __len__(self) -> int:
        return len(self.sequences)

    def clear(self) -> None:
        """Forget every sequence and the cache."""
        self.sequences.clear()
        self.decoder.clear()

    def start(self, request: GenerationRequest) -> _Sequence:
        """The state of a new request, to be given to `prefill`."""
        return _Sequence(request, self.decoder.vocab_size)

    @torch.inference_mode()
    def prefill(self, sequences: Sequence[_Sequence]) -> list[tuple[_Sequence, TokenEvent]]:
        """Add new sequences, run their prompts, and return the first token of each."""
        prompts = [list(sequence.request.prompt_ids) for sequence in sequences]
        logits = self.decoder.prefill(prompts, first=len(self.sequences))
        for sequence, prompt in zip(sequences, prompts, strict=True):
            sequence.length = len(prompt)
        self.sequences.extend(sequences)
        return self._choose(sequences, logits)

    @torch.inference_mode()
    def step(self) -> list[tuple[_Sequence, TokenEvent]]:
        """One decode step: the next token of every sequence; finished ones have left the batch afterwards."""
        sequences = list(self.sequences)
        logits = self.decoder.step([s.next_token for s in sequences], [s.length for s in sequences])
        for sequence in sequences:
            sequence.length += 1
        return self._choose(sequences, logits)

    @torch.inference_mode()
    def remove(self, sequence: _Sequence) -> None:
        """Take a sequence out; the last row moves into its place."""
        row, last = self.sequences.index(sequence), len(self.sequences) - 1
        if row != last:
            self.decoder.cache.move(last, row, self.sequences[last].length)
            self.sequences[row] = self.sequences[last]
        self.sequences.pop()

    def _choose(self, sequences: Sequence[_Sequence], logits: Tensor) -> list[tuple[_Sequence, TokenEvent]]:
        """Sample from logits (R, V); sequences that end here leave the batch."""
        values, ids = logits.max(-1)
        best, finite = ids.tolist(), values.isfinite().tolist()
        results = []
        for row, sequence in enumerate(sequences):
            if not finite[row]:
                raise FloatingPointError("the model produced non-finite logits")
            request = sequence.request
            token = best[row] if sequence.sampler.plain_greedy else sequence.sampler.pick(logits[row])
            sequence.next_token = token
            sequence.num_generated += 1
            finish: FinishReason | None = None
            if sequence.sampler.failed:
                finish = "error"
            elif token in request.stop_ids:
                finish = "stop"
            elif sequence.num_generated >= request.max_tokens:
                finish = "length"
            logprob, top = logprobs_of(logits[row], token, request.logprobs)
            scores = self._prompt_scores(request) if sequence.num_generated == 1 else None
            results.append((sequence, TokenEvent(token, logprob, top, finish, scores)))
        for sequence, event in results:
            if event.finish_reason:
                self.remove(sequence)
        return results

    def _prompt_scores(self, request: GenerationRequest) -> tuple[Scores, ...] | None:
        """What the prompt's own tokens were worth, where the request asks for it; see `TokenEvent`."""
        if request.prompt_logprobs is None:
            return None
        prompt, scores = list(request.prompt_ids), [(None, ())]
        for logits in self.decoder.prompt_logits(prompt):
            tokens = prompt[len(scores) :]
            scores += [logprobs_of(row, i, request.prompt_logprobs) for row, i in zip(logits, tokens, strict=False)]
        return tuple(scores)


class _Ticket:
    """Connects one awaiting coroutine with the inference thread."""

    def __init__(self, sequence: _Sequence) -> None:
        self.sequence = sequence
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[TokenEvent | Exception] = asyncio.Queue()
        self.cancelled = False

    def send(self, event: TokenEvent | Exception) -> None:
        """Called on the inference thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the event loop has been closed: nobody is listening any more
            self.cancelled = True


class TorchEngine:
    """The `Engine` over a PyTorch model: one inference thread, continuous batching, a bounded queue.

    At most `max_num_seqs` sequences are decoded together and `max_queue` more wait; beyond that `generate`
    raises `EngineBusy`. A new request is prefilled alone, so its first logits never depend on the other
    requests.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        model_name: str = "model",
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
        max_queue: int = 256,
        vocab_limit: int | None = None,
    ) -> None:
        self._batch = ContinuousBatch(model.eval(), vocab_limit)
        self._name = model_name
        self._max_model_len = min(max_model_len or 1 << 62, self._batch.decoder.config.max_position_embeddings)
        self._max_num_seqs, self._max_queue = max_num_seqs, max_queue
        self._waiting: deque[_Ticket] = deque()
        self._running: dict[_Sequence, _Ticket] = {}
        self._changed = threading.Condition()
        self._closed = False
        release_threads()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    @property
    def model_name(self) -> str:
        return self._name

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus answer, in tokens."""
        return self._max_model_len

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        """Yield the tokens of one request; see `Engine`. The prompt must leave room for `max_tokens`."""
        self._check(request)
        ticket = _Ticket(self._batch.start(request))
        with self._changed:
            if self._closed:
                raise EngineError("the engine is shut down")
            if len(self._waiting) >= self._max_queue:
                raise EngineBusy(f"{len(self._waiting)} requests are waiting already (limit {self._max_queue})")
            self._waiting.append(ticket)
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
        if total > self._max_model_len:
            raise ValueError(f"prompt plus max_tokens is {total}, the model's limit is {self._max_model_len}")

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._waiting or self._running):
                    self._changed.wait()
                if self._closed:
                    self._abort(EngineError("the engine was shut down"))
                    return
            try:
                self._drop_cancelled()
                self._admit()
                if self._running:
                    self._deliver(self._batch.step())
            except Exception:
                # One bad step must not end the server: everybody in it is told, and the batch starts empty.
                logger.exception("inference failed")
                self._abort(EngineError("generation failed"), waiting=False)

    def _drop_cancelled(self) -> None:
        for sequence, ticket in list(self._running.items()):
            if ticket.cancelled:
                self._batch.remove(sequence)
                del self._running[sequence]

    def _admit(self) -> None:
        while len(self._running) < self._max_num_seqs:
            with self._changed:
                if not self._waiting:
                    return
                ticket = self._waiting.popleft()
            if ticket.cancelled:
                continue
            self._running[ticket.sequence] = ticket
            self._deliver(self._batch.prefill([ticket.sequence]))

    def _deliver(self, results: Iterable[tuple[_Sequence, TokenEvent]]) -> None:
        for sequence, event in results:
            ticket = self._running[sequence]
            if event.finish_reason:
                del self._running[sequence]
            ticket.send(event)

    def _abort(self, error: EngineError, waiting: bool = True) -> None:
        tickets = list(self._running.values())
        if waiting:
            tickets += self._waiting
            self._waiting.clear()
        for ticket in tickets:
            ticket.send(error)
        self._running.clear()
        self._batch.clear()


def generate_batch(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    *,
    top_k: int = 0,
    vocab_limit: int | None = None,
    batch_size: int = 64,
) -> list[list[int]]:
    """Generated token ids of every prompt, in order; an answer that ended by itself ends with its stop id.

    Prompts are taken by length, `batch_size` at a time, and finished rows are refilled. With a `seed`, prompt
    i samples from generator `seed + i`, so its answer does not depend on the rest of the list.
    """
    was_training = model.training
    model.eval()
    try:
        batch = ContinuousBatch(model, vocab_limit)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        answers: dict[_Sequence, list[int]] = {}
        index_of: dict[_Sequence, int] = {}
        while order or len(batch):
            results = []
            free = batch_size - len(batch)
            if order and free >= max(1, batch_size // 4):  # refill in groups: a prefill has a fixed cost
                sequences = []
                for i in order[:free]:
                    own_seed = None if seed is None else seed + i
                    request = GenerationRequest(
                        prompts[i],
                        max_new_tokens,
                        temperature,
                        top_p,
                        top_k,
                        stop_ids=stop_ids,
                        seed=own_seed,
                    )
                    sequence = batch.start(request)
                    index_of[sequence], answers[sequence] = i, []
                    sequences.append(sequence)
                order = order[free:]
                results += batch.prefill(sequences)
            if len(batch):
                results += batch.step()
            for sequence, event in results:
                answers[sequence].append(event.token_id)
        return [answers[s] for s in sorted(answers, key=index_of.__getitem__)]
    finally:
        model.train(was_training)
