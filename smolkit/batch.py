"""The synchronous core of generation: who is in a step, and in which part of the memory.

`ContinuousBatch` is driven by `smolkit.engine` for serving, and by `generate_batch` in a plain loop for evaluation. The
arithmetic is `smolkit.decoder`'s, the memory `smolkit.cache`'s.

Requests join and leave between decode steps (iteration-level scheduling: Orca, Yu et al., OSDI 2022).
"""

from collections import deque
from collections.abc import Collection, Hashable, Iterator, Sequence

import torch
from torch import Tensor, nn

from smolkit.cache import Cache, Row
from smolkit.decoder import Decoder
from smolkit.sampling import FinishReason, GenerationRequest, Sampler, Scores, TokenEvent, logprobs_of, scores_of

PREFIX_SHARE = 1 / 8  # of the memory for keys and values
SCORED_ROWS = 256  # of logits at a time: a long prompt times the vocabulary would not fit where the model does


class SequenceState:
    """A request on its way: its sampler, its tokens so far, the row of the cache they fill."""

    def __init__(self, request: GenerationRequest, vocab_size: int) -> None:
        self.request = request
        self.sampler = Sampler(request, vocab_size)
        self.tokens = list(request.prompt_ids)  # then what was generated
        self.prompt_length = len(self.tokens)
        self.row: Row | None = None
        self.length = 0  # columns filled
        self.prompt_scores: list[Scores] | None = None  # as in `TokenEvent`
        self.scoring: Iterator[list[Scores]] | None = None  # what is to be done before it may join

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


# What a step has for a sequence; an exception where only this one failed, which has left the batch then.
Result = tuple[SequenceState, TokenEvent | Exception]


class ContinuousBatch:
    """Sequences decoded together. They wait for a place, join between steps, and leave at their end or by `remove`.

    Each `step` admits those that wait, in order of arrival, runs at most `max_num_batched_tokens` tokens of prompts,
    and then decodes one token of every sequence whose prompt is complete: no long prompt stalls the others. Prompts
    whose own tokens are to be scored are, before they are admitted, in no larger parts.

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
        self.waiting: deque[SequenceState] = deque()
        self.running: list[SequenceState] = []  # in order of admission
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

    def start(self, request: GenerationRequest) -> SequenceState:
        """The state of a new request, to be given to `add`."""
        return SequenceState(request, self.vocab_size)

    def add(self, sequence: SequenceState) -> None:
        """Let a sequence wait for its place."""
        if sequence.request.prompt_logprobs is not None:
            sequence.prompt_scores, sequence.scoring = [(None, ())], self._scores(sequence.request)
        self.waiting.append(sequence)

    @torch.inference_mode()  # the row that moves into its place is an inference tensor
    def remove(self, sequence: SequenceState) -> None:
        """Take a sequence out, wherever it is."""
        if sequence.row is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._release(sequence)

    @torch.inference_mode()
    def step(self) -> list[Result]:
        """One round for everybody: new tokens by sequence; finished ones have left the batch afterwards."""
        failed = self._score()
        self._admit()
        return failed + self._prefill() + self._decode()

    # --- places -------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        for sequence in [sequence for sequence in self.waiting if sequence.scoring is None]:
            if len(self.running) == self.max_num_seqs:
                return
            row = self.cache.take(len(sequence.tokens), sequence)
            if row is None:
                assert self.running, "the budget holds any one sequence"
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.row = row
            if self.prefix_reuse and self.chunk is not None:
                prompt = sequence.tokens[: sequence.prompt_length]
                sequence.length = self.cache.fill_from_prefixes(sequence.request.adapter, prompt, self.chunk, row)
                self.reused_tokens += sequence.length

    def _secure(self, sequence: SequenceState) -> None:
        """Room for one more column; while there is none, the latest sequence gives way, and be it this one."""
        while sequence.row is not None:
            row = self.cache.widen(sequence.row, sequence.length)
            if row is not None:
                sequence.row = row
                return
            latest = self.running.pop()
            self._release(latest)
            latest.length = 0
            self.waiting.appendleft(latest)
            self.preemptions += 1

    def _release(self, sequence: SequenceState, spoiled: bool = False) -> None:
        """Give its row back: as zeros where it holds what is no number, or where no logits have shown that it does not.

        Columns that others do not see still enter their sums, as 0 * value.
        """
        row = sequence.place
        if spoiled or sequence.in_prompt:
            row.states[:, :, :, : sequence.length + 1] = 0  # and the one of a step between two chunks, see `_decode`
        self.cache.release(row)
        sequence.row = None

    def _forget(self, sequence: SequenceState) -> None:
        """Take out a sequence whose logits are no numbers, with all that is kept of its prompt."""
        prefixes = self.cache.prefixes
        parent: Hashable = sequence.request.adapter
        prompt, chunk = sequence.tokens[: sequence.prompt_length], self.chunk or sequence.prompt_length
        for start in range(0, len(prompt), chunk):
            block = prefixes.blocks.pop((parent, tuple(prompt[start : start + chunk])), None)
            if block is None:
                break
            parent = block[0]  # what else stands on it is found no more, and goes in its turn
            prefixes.bytes -= block[1].nbytes
        self.running.remove(sequence)
        self._release(sequence, spoiled=True)

    # --- steps --------------------------------------------------------------------------------------------------

    def _score(self) -> list[Result]:
        """Go on with the prompts to be scored, in order, for as many tokens times layers as `_prefill` runs a step."""
        failed: list[Result] = []
        left = self.max_num_batched_tokens * len(self.decoder.layers)
        for sequence in [sequence for sequence in self.waiting if sequence.scoring is not None]:
            while left > 0 and sequence.scoring is not None:
                try:
                    scores = next(sequence.scoring, None)
                except torch.AcceleratorError:  # the device's, and so everybody's
                    raise
                except Exception as error:
                    failed.append((sequence, error))
                    self.remove(sequence)
                    break
                if scores is None:
                    sequence.scoring = None
                else:
                    assert sequence.prompt_scores is not None
                    sequence.prompt_scores += scores
                    left -= sequence.prompt_length
        return failed

    def _scores(self, request: GenerationRequest) -> Iterator[list[Scores]]:
        """What the tokens of a prompt after the first were worth, some at a time; nothing yet after each layer."""
        prompt = list(request.prompt_ids)
        for after_layer in self.decoder.prompt_states(prompt, request.adapter):
            states = after_layer
            yield []
        following = torch.tensor(prompt[1:], device=states.device)
        for rows, tokens in zip(states[:-1].split(SCORED_ROWS), following.split(SCORED_ROWS), strict=True):
            yield scores_of(self.decoder.logits(rows), tokens, request.prompt_logprobs or 0, self.vocab_size)

    def _prefill(self) -> list[Result]:
        """The next chunks of prompts."""
        pending = [sequence for sequence in self.running if sequence.in_prompt]
        if self.chunk is None:
            return self._run_chunks({sequence: sequence.prompt_length for sequence in pending}) if pending else []
        results: list[Result] = []
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

    def _plan(self, pending: Sequence[SequenceState], chunk: int) -> dict[SequenceState, list[int]]:
        """Where the next chunks of each prompt end, within the tokens of a step.

        First comes one of the oldest prompt, so that it comes to its end; then those that end soonest.
        """
        plan: dict[SequenceState, list[int]] = {}
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

    def _run_chunks(self, ends: dict[SequenceState, int]) -> list[Result]:
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

    def _decode(self) -> list[Result]:
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

    def _choose_new(self, sequences: Sequence[SequenceState], logits: Tensor) -> list[Result]:
        """`_choose`, but for sequences that are on their way back to where they gave way and know their next token."""
        rows = [row for row, sequence in enumerate(sequences) if sequence.length == len(sequence.tokens)]
        if len(rows) < len(sequences):
            sequences, logits = [sequences[row] for row in rows], logits[rows]
        return self._choose(sequences, logits) if rows else []

    def _choose(self, sequences: Sequence[SequenceState], logits: Tensor) -> list[Result]:
        """Sample from logits (R, V); sequences that end here leave the batch.

        One whose logits are no numbers fails alone: its adapter may have diverged, and the others have not.
        """
        values, ids = logits[:, : self.vocab_size].max(-1)
        best, finite = ids.tolist(), values.isfinite().tolist()
        results: list[Result] = []
        for row, sequence in enumerate(sequences):
            if not finite[row]:
                results.append((sequence, FloatingPointError("the model produced non-finite logits")))
                self._forget(sequence)
                continue
            try:
                results.append((sequence, self._chosen(sequence, logits[row], best[row])))
            except torch.AcceleratorError:  # the device's, and so everybody's
                raise
            except Exception as error:  # what one request asks for must not end the others
                results.append((sequence, error))
        for sequence, event in results:
            if sequence.row is not None and (isinstance(event, Exception) or event.finish_reason):
                self.remove(sequence)
        return results

    def _chosen(self, sequence: SequenceState, logits: Tensor, best: int) -> TokenEvent:
        """The next token of a sequence from its logits (V,), of which `best` is the largest allowed one."""
        request = sequence.request
        token = best if sequence.sampler.plain_greedy else sequence.sampler.pick(logits[: self.vocab_size])
        sequence.tokens.append(token)
        finish: FinishReason | None = None
        if sequence.sampler.failed:
            finish = "error"
        elif token in request.stop_ids:
            finish = "stop"
        elif sequence.num_generated >= request.max_tokens:
            finish = "length"
        logprob, top = logprobs_of(logits, token, request.logprobs, self.vocab_size)
        scores = sequence.prompt_scores if sequence.num_generated == 1 else None
        return TokenEvent(token, logprob, top, finish, None if scores is None else tuple(scores))


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
        answers: dict[SequenceState, list[int]] = {}
        index_of: dict[SequenceState, int] = {}
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
                if isinstance(event, Exception):
                    raise event
                answers[sequence].append(event.token_id)
        return [answers[s] for s in sorted(answers, key=index_of.__getitem__)]
    finally:
        model.train(was_training)
