"""What is asked of a generation, what comes back per token, and how the next token is chosen."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from smolkit.grammar import Grammar

FinishReason = Literal["stop", "length", "error"]
Scores = tuple[float | None, tuple[tuple[int, float], ...]]  # log-probability of a token; the most likely ones
GREEDY_BELOW = 1e-5  # temperature, as in vLLM: logits divided by much less are no numbers any more


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off.

    `stop_ids` end the answer, after `min_tokens` others, and are reported in the last event. `logprobs` asks for the
    log-probability of each chosen token and of that many most likely alternatives, `prompt_logprobs` for the same of
    the prompt's tokens. The presence and frequency penalties count generated tokens, the repetition penalty also
    counts the prompt (1 is off). `grammar` says which answers are allowed.
    """

    prompt_ids: Sequence[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    adapter: str | None = None  # the LoRA adapter that answers; None: the model itself
    timeout: float | None = None  # seconds after which the engine gives the request up; None: the engine's own limit
    stop_ids: Collection[int] = ()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    min_tokens: int = 0
    grammar: "Grammar | None" = None


@dataclass(frozen=True)
class TokenEvent:
    """One generated token. The last one says why: "stop" when `token_id` is a stop id, else "length"; "error" when the
    request's grammar became too complex.

    `logprob` and `top_logprobs` (most likely first) come from the model's own distribution, before
    temperature. `prompt_logprobs` is in the first event, one entry per token of the prompt; the first has none.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    prompt_logprobs: tuple[Scores, ...] | None = None


class Sampler:
    """Chooses the next token of one sequence from its own random generator: one uniform number per token.

    Inverting the cumulative distribution (instead of drawing noise per vocabulary entry) makes the choice
    depend on the probabilities only, so rounding differences between batch shapes almost never change it.
    """

    def __init__(self, request: GenerationRequest, vocab_size: int) -> None:
        self.request = request
        self.generator = torch.Generator()
        if request.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(request.seed)
        self.mask = request.grammar.mask() if request.grammar else None
        self.num_tokens = 0
        self.stops = [i for i in request.stop_ids if i < vocab_size]  # the others are never chosen
        self.generated = self.prompt = self.biases = None
        if self._penalises():
            self.generated = torch.zeros(vocab_size, dtype=torch.int32)
            self.prompt = torch.zeros(vocab_size, dtype=torch.bool)
            self.prompt[torch.tensor([i for i in request.prompt_ids if i < vocab_size], dtype=torch.long)] = True
        if request.logit_bias:
            self.biases = torch.zeros(vocab_size)
            self.biases[torch.tensor(list(request.logit_bias))] = torch.tensor(list(request.logit_bias.values()))
        changed = self.mask or request.min_tokens or self._penalises() or request.logit_bias
        self.greedy = request.temperature < GREEDY_BELOW
        self.plain_greedy = self.greedy and not changed

    @property
    def failed(self) -> bool:
        """Whether the grammar can no longer be followed."""
        return self.mask is not None and self.mask.failed

    def _penalises(self) -> bool:
        r = self.request
        return bool(r.presence_penalty or r.frequency_penalty or r.repetition_penalty != 1)

    def _penalised(self, logits: Tensor) -> Tensor:
        r = self.request
        assert self.generated is not None and self.prompt is not None
        counts = self.generated.to(logits.device)
        if r.repetition_penalty != 1:  # CTRL (Keskar et al. 2019): shrink positive, stretch negative logits
            seen = (counts > 0) | self.prompt.to(logits.device)
            scaled = torch.where(logits > 0, logits / r.repetition_penalty, logits * r.repetition_penalty)
            logits = torch.where(seen, scaled, logits)
        return logits - r.frequency_penalty * counts - r.presence_penalty * (counts > 0)

    def pick(self, logits: Tensor) -> int:
        """The next token id from float32 logits (V,)."""
        r = self.request
        if self.generated is not None:
            logits = self._penalised(logits)
        if self.biases is not None:
            logits = logits + self.biases.to(logits.device)
        if self.num_tokens < r.min_tokens and self.stops:
            logits = logits.index_fill(0, torch.tensor(self.stops, device=logits.device), -torch.inf)
        if self.mask is not None:
            logits = self.mask.apply(logits)
        token_id = int(logits.argmax()) if self.greedy else self._sample(logits / r.temperature)
        self.num_tokens += 1
        if self.generated is not None:
            self.generated[token_id] += 1
        if self.mask is not None:
            self.mask.advance(token_id)
        return token_id

    def _sample(self, scores: Tensor) -> int:
        r = self.request
        token_ids = None
        if r.top_k:
            scores, token_ids = scores.topk(min(r.top_k, len(scores)))
        elif r.top_p < 1:
            scores, token_ids = scores.sort(descending=True)
        probabilities = _exact(scores).softmax(0)
        if r.min_p > 0:
            probabilities = probabilities * (probabilities >= r.min_p * probabilities.max())
        if r.top_p < 1:  # nucleus: the smallest head whose mass reaches top_p of what is left
            before = probabilities.cumsum(0) - probabilities
            probabilities = probabilities * (before < r.top_p * probabilities.sum())
        cumulative = probabilities.cumsum(0)
        uniform = torch.rand((), dtype=torch.float64, generator=self.generator).item()
        position = torch.searchsorted(cumulative, cumulative[-1:] * uniform, right=True)
        last = torch.searchsorted(cumulative, cumulative[-1:])  # the last entry that has any probability
        index = int(torch.minimum(position, last))
        return index if token_ids is None else int(token_ids[index])


def _exact(scores: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none."""
    return (scores.cpu() if scores.device.type == "mps" else scores).double()


def logprobs_of(logits: Tensor, token: int, count: int | None, vocab_size: int) -> Scores:
    """Those of one token from logits (V,), see `scores_of`; `count` None: neither is wanted."""
    if count is None:
        return None, ()
    return scores_of(logits[None], torch.tensor([token], device=logits.device), count, vocab_size)[0]


def scores_of(logits: Tensor, tokens: Tensor, count: int, vocab_size: int) -> list[Scores]:
    """For every row of logits (R, V) and its token (R,): (log-probability of the token, the `count` most likely tokens
    with theirs).

    All V columns share the probability, padded ones included, but only the first `vocab_size` are tokens.
    """
    log_probs = logits.log_softmax(-1)[:, :vocab_size]  # (R, vocab_size)
    chosen, (values, ids) = log_probs.gather(1, tokens[:, None]).squeeze(1), log_probs.topk(min(count, vocab_size))
    top = [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    return list(zip(chosen.tolist(), top, strict=True))
