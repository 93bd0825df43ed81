"""Token generation: the small `Engine` protocol, and our own continuous-batching engine over a PyTorch model.

Token ids go in, token events come out; text, templates and HTTP live elsewhere. `ContinuousBatch` is the
synchronous core (who is in a step, and in which part of the memory); `TorchEngine` runs it on one inference
thread behind asyncio; `generate_batch` runs it in a plain loop for evaluation.

The arithmetic is `smolkit.decoder`'s, the memory `smolkit.cache`'s.

Requests join and leave between decode steps (iteration-level scheduling: Orca, Yu et al., OSDI 2022).
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from smolkit.cache import Cache, Row
from smolkit.decoder import Decoder, Pair
from smolkit.runtime import release_threads
from smolkit.sampling import FinishReason, GenerationRequest, Sampler, Scores, TokenEvent, logprobs_of

logger = logging.getLogger(__name__)

# Tokens of a prompt that run together, and most of them between two steps, by device.
CHUNK = {"cpu": 128, "else": 512}
PREFIX_SHARE = 1 / 8  # of the memory for keys and values
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
    both while the first (or a later) event is awaited.
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


class _Sequence:
    """A request on its way: its sampler, its tokens so far, the row of the cache they fill."""

    def __init__(self, request: GenerationRequest, vocab_size: int) -> None:
        self.request = request
        self.sampler = Sampler(request, vocab_size)
        self.tokens = list(request.prompt_ids)  # then what was generated
        self.prompt_length = len(self.tokens)
        self.row: Row | None = None
        self.length = 0  # columns filled

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def place(self) -> Row:
        """The row of a running sequence."""
        assert self.row is not None
        return self.row

    @property
    def in_prompt(self) -> bool:
        return self.length < self.prompt_length


class ContinuousBatch:
    """Sequences decoded together. They wait for a place, join between steps, and leave at their end or by `remove`.

    Each `step` admits those that wait, in order of arrival, runs at most `max_num_batched_tokens` tokens of prompts,
    and then decodes one token of every sequence whose prompt is complete: no long prompt stalls the others.

    Memory: a sequence is admitted when there is room for what it has so far. When a running one needs more than the
    budget has, the one that came last gives up its row and waits again. Later it goes through the same steps, without
    choosing anew: its answer does not change. (Admission by the worst case, prompt plus `max_tokens`, would leave most
    of the memory unused, because most answers end early.)

    Prompts run in chunks that end at multiples of `chunk` tokens, several sequences together where that changes no bit
    (`Decoder.rows_are_independent`), else each alone: what a prompt computes does not depend on other requests, and
    whole chunks can be reused by prompts that begin alike. `chunk` None runs new sequences whole and together, without
    reuse.

    `vocab_limit`: padded vocabulary rows (the embedding may be larger than the tokenizer) are never chosen; they keep
    their share of the probability, as in transformers and vLLM. `budget` is bytes for keys and values, None unlimited.
    Not thread-safe: one thread owns it.
    """

    def __init__(
        self,
        model: nn.Module,
        vocab_limit: int | None = None,
        *,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 512,
        chunk: int | None = None,
        max_model_len: int | None = None,
        budget: int | None = None,
        prefix_reuse: bool = True,
    ) -> None:
        self.decoder = Decoder(model)
        self.prompts_together = self.decoder.rows_are_independent
        rows = self.decoder.config.vocab_size
        self.vocab_size = min(vocab_limit or rows, rows)
        self.max_num_seqs, self.max_num_batched_tokens, self.chunk = max_num_seqs, max_num_batched_tokens, chunk
        self.max_model_len = min(max_model_len or 1 << 62, self.decoder.config.max_position_embeddings)
        self.budget, self.prefix_reuse = budget, prefix_reuse and None not in (chunk, budget)
        self.waiting: deque[_Sequence] = deque()
        self.running: list[_Sequence] = []  # in order of admission
        self.preemptions = self.reused_tokens = 0  # since the start, for reports
        self.clear()
        if chunk is not None and max_num_batched_tokens < chunk:
            raise ValueError(f"max_num_batched_tokens {max_num_batched_tokens}: prompts run {chunk} tokens at a time")
        if budget is not None and budget < self.cache.least_budget:
            raise ValueError(
                f"{budget / 2**20:,.0f} MiB for keys and values: a sequence of {self.max_model_len} tokens needs "
                f"{self.cache.least_budget / 2**20:,.0f}; allow more or lower max_model_len"
            )

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def clear(self) -> None:
        """Forget what runs, and the cache (which may hold non-finite values after a failed step)."""
        self.running.clear()
        config, dtype, device = self.decoder.config, self.decoder.dtype, self.decoder.device
        self.cache = Cache(
            config,
            dtype,
            device,
            max_rows=self.max_num_seqs,
            max_columns=self.max_model_len,
            budget=self.budget,
            prefix_share=PREFIX_SHARE * self.prefix_reuse,
        )

    def start(self, request: GenerationRequest) -> _Sequence:
        """The state of a new request, to be given to `add`."""
        return _Sequence(request, self.vocab_size)

    def add(self, sequence: _Sequence) -> None:
        """Let a sequence wait for its place."""
        self.waiting.append(sequence)

    @torch.inference_mode()  # the row that moves into its place is an inference tensor
    def remove(self, sequence: _Sequence) -> None:
        """Take a sequence out, wherever it is."""
        if sequence.row is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self.cache.release(sequence.row)
            sequence.row = None

    @torch.inference_mode()
    def step(self) -> list[tuple[_Sequence, TokenEvent]]:
        """One round for everybody: new tokens by sequence; finished ones have left the batch afterwards."""
        self._admit()
        return self._prefill() + self._decode()

    # --- places -------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            row = self.cache.take(len(sequence.tokens), sequence)
            if row is None:
                assert self.running, "the budget holds any one sequence"
                return
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.row = row
            if self.prefix_reuse and self.chunk is not None:
                prompt = sequence.tokens[: sequence.prompt_length]
                sequence.length = self.cache.fill_from_prefixes(sequence.request.adapter, prompt, self.chunk, row)
                self.reused_tokens += sequence.length

    def _secure(self, sequence: _Sequence) -> None:
        """Room for one more column; while there is none, the latest sequence gives way, and be it this one."""
        while sequence.row is not None:
            row = self.cache.widen(sequence.row, sequence.length)
            if row is not None:
                sequence.row = row
                return
            latest = self.running.pop()
            self.cache.release(latest.place)
            latest.row, latest.length = None, 0
            self.waiting.appendleft(latest)
            self.preemptions += 1

    # --- steps --------------------------------------------------------------------------------------------------

    def _prefill(self) -> list[tuple[_Sequence, TokenEvent]]:
        """The next chunks of prompts."""
        pending = [sequence for sequence in self.running if sequence.in_prompt]
        if self.chunk is None:
            return self._run_chunks({sequence: sequence.prompt_length for sequence in pending}) if pending else []
        results: list[tuple[_Sequence, TokenEvent]] = []
        plan = self._plan(pending, self.chunk)
        while plan:
            wave = {sequence: ends.pop(0) for sequence, ends in plan.items()}
            # Adapters' products are small ones of torch's, which differ in the last bit.
            together = {s: end for s, end in wave.items() if self.prompts_together and s.request.adapter is None}
            groups = [together] if together else []
            groups += [{sequence: end} for sequence, end in wave.items() if sequence not in together]
            for group in groups:
                results += self._run_chunks(group)
            plan = {sequence: ends for sequence, ends in plan.items() if ends}
        return results

    def _plan(self, pending: Sequence[_Sequence], chunk: int) -> dict[_Sequence, list[int]]:
        """Where the next chunks of each prompt end, within the tokens of a step.

        First comes one of the oldest prompt, so that it comes to its end; then those that end soonest.
        """
        plan: dict[_Sequence, list[int]] = {}
        left = self.max_num_batched_tokens
        soonest = sorted(pending, key=lambda sequence: sequence.prompt_length - sequence.length)
        for sequence, once in [*((oldest, True) for oldest in pending[:1]), *((each, False) for each in soonest)]:
            ends = plan.get(sequence, [])
            position = ends[-1] if ends else sequence.length
            while position < sequence.prompt_length:
                end = min((position // chunk + 1) * chunk, sequence.prompt_length)
                left -= end - position
                if left < 0:
                    return plan
                plan.setdefault(sequence, []).append(end)
                position = end
                if once:
                    break
        return plan

    def _run_chunks(self, ends: dict[_Sequence, int]) -> list[tuple[_Sequence, TokenEvent]]:
        """Run the prompts of sequences up to `ends`, and choose the first token where a prompt ends."""
        complete = [sequence.prompt_length == end for sequence, end in ends.items()]
        logits = self.decoder.prefill(
            [sequence.place for sequence in ends],
            [sequence.tokens[sequence.length : end] for sequence, end in ends.items()],
            [sequence.length for sequence in ends],
            [sequence.request.adapter for sequence in ends],
            complete,
        )
        for sequence, end in ends.items():
            sequence.length = end
            if self.prefix_reuse and self.chunk is not None and end % self.chunk == 0:
                self.cache.keep_prefix(sequence.request.adapter, sequence.tokens[:end], self.chunk, sequence.place)
        if logits is None:
            return []
        return self._choose_new([sequence for sequence, done in zip(ends, complete, strict=True) if done], logits)

    def _decode(self) -> list[tuple[_Sequence, TokenEvent]]:
        """One token of every sequence that is past its prompt."""
        for sequence in [sequence for sequence in self.running if not sequence.in_prompt]:
            self._secure(sequence)
        wanted = {sequence.place for sequence in self.running if not sequence.in_prompt}
        racks = self.cache.racks_with(wanted)
        if not racks:
            return []
        # Rows between them whose prompts are not complete take part, too: their next chunk overwrites the column.
        sequences = [row.owner for _, rows in racks for row in rows]
        logits = self.decoder.step(
            [states for states, _ in racks],
            [sequence.tokens[sequence.length] for sequence in sequences],
            [sequence.length for sequence in sequences],
            [sequence.request.adapter for sequence in sequences],
        )
        decoded = [row for row, sequence in enumerate(sequences) if not sequence.in_prompt]
        for row in decoded:
            sequences[row].length += 1
        if len(decoded) < len(sequences):
            sequences, logits = [sequences[row] for row in decoded], logits[decoded]
        return self._choose_new(sequences, logits)

    def _choose_new(self, sequences: Sequence[_Sequence], logits: Tensor) -> list[tuple[_Sequence, TokenEvent]]:
        """`_choose`, but for sequences that are on their way back to where they gave way and know their next token."""
        rows = [row for row, sequence in enumerate(sequences) if sequence.length == len(sequence.tokens)]
        if len(rows) < len(sequences):
            sequences, logits = [sequences[row] for row in rows], logits[rows]
        return self._choose(sequences, logits) if rows else []

    def _choose(self, sequences: Sequence[_Sequence], logits: Tensor) -> list[tuple[_Sequence, TokenEvent]]:
        """Sample from logits (R, V); sequences that end here leave the batch."""
        allowed = logits[:, : self.vocab_size]
        values, ids = allowed.max(-1)
        best, finite = ids.tolist(), values.isfinite().tolist()
        results = []
        for row, sequence in enumerate(sequences):
            if not finite[row]:
                raise FloatingPointError("the model produced non-finite logits")
            request = sequence.request
            token = best[row] if sequence.sampler.plain_greedy else sequence.sampler.pick(allowed[row])
            sequence.tokens.append(token)
            finish: FinishReason | None = None
            if sequence.sampler.failed:
                finish = "error"
            elif token in request.stop_ids:
                finish = "stop"
            elif sequence.num_generated >= request.max_tokens:
                finish = "length"
            logprob, top = logprobs_of(logits[row], token, request.logprobs, self.vocab_size)
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
        prompt = list(request.prompt_ids)
        scores: list[Scores] = [(None, ())]
        for logits in self.decoder.prompt_logits(prompt, request.adapter):
            tokens = prompt[len(scores) :]
            pairs, count = zip(logits, tokens, strict=False), request.prompt_logprobs
            scores += [logprobs_of(row, token, count, self.vocab_size) for row, token in pairs]
        return tuple(scores)


class _Ticket:
    """Connects one awaiting coroutine with the inference thread."""

    def __init__(self, sequence: _Sequence, timeout: float | None) -> None:
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
    `limits` are those of `ContinuousBatch`. `adapters`: LoRA weights by name, see `Decoder.adapt`.
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
        **limits: Any,
    ) -> None:
        kind = "cpu" if model.device.type == "cpu" else "else"
        limits = {"chunk": CHUNK[kind], "max_num_batched_tokens": MAX_BATCHED_TOKENS[kind]} | limits
        self._batch = ContinuousBatch(model.eval(), vocab_limit, **limits)
        for name, pairs in (adapters or {}).items():
            self._batch.decoder.adapt(name, pairs)
        self._name, self._adapters = model_name, tuple(adapters or ())
        self._max_queue, self._timeout = max_queue, timeout
        self._arrived: deque[_Ticket] = deque()  # not yet seen by the inference thread
        self._tickets: dict[_Sequence, _Ticket] = {}
        self._changed = threading.Condition()
        self._closed = False
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
            if len(self._tickets) + len(self._arrived) >= self._batch.max_num_seqs + self._max_queue:
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
            except Exception:
                # One bad step must not end the server: everybody in it is told, and the batch starts empty.
                logger.exception("inference failed")
                waiting = set(self._batch.waiting)
                self._abort([s for s in self._tickets if s not in waiting], EngineError("generation failed"))
                self._batch.clear()
        self._abort(list(self._tickets), EngineError("the engine was shut down"))

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

    def _deliver(self, results: Iterable[tuple[_Sequence, TokenEvent]]) -> None:
        """Hand a step's events over, in one call to each event loop: a call wakes its thread, which takes a core."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Ticket, TokenEvent]]] = {}
        for sequence, event in results:
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

    def _abort(self, sequences: Iterable[_Sequence], error: EngineError) -> None:
        for sequence in sequences:
            self._tickets.pop(sequence).send(error)


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
        batch = ContinuousBatch(model, vocab_limit, max_num_seqs=batch_size)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        answers: dict[_Sequence, list[int]] = {}
        index_of: dict[_Sequence, int] = {}
        while order or len(batch):
            free = batch_size - len(batch)
            if order and free >= max(1, batch_size // 4):  # refill in groups: a prefill has a fixed cost
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
                    batch.add(sequence)
                order = order[free:]
            for sequence, event in batch.step():
                answers[sequence].append(event.token_id)
        return [answers[s] for s in sorted(answers, key=index_of.__getitem__)]
    finally:
        model.train(was_training)
