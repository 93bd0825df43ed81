"""The engine against transformers' own `generate`, naive sampling, and itself alone."""

import asyncio
import copy
import math
import time
from collections.abc import Callable, Iterator
from unittest.mock import MagicMock

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from smol_model import SmolForCausalLM
from smolkit import sampling
from smolkit.batch import ContinuousBatch, generate_batch
from smolkit.chat import chat_stop_ids
from smolkit.decoder import Decoder
from smolkit.engine import DeadlineExceeded, EngineBusy, EngineError, TorchEngine
from smolkit.sampling import GenerationRequest, Sampler, TokenEvent, logprobs_of

from .conftest import tiny_config

Greedy = Callable[[list[int], int], list[int]]
VOCABULARY, STOPS = 96, [3, 4, 5]


def random_model(kind: str) -> torch.nn.Module:
    torch.manual_seed(1)
    moe = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32) if "moe" in kind else {}
    options = {"qwen2": {"attention_bias": True}, "qwen3": {"qk_norm": True}, "qwen3_moe": {"qk_norm": True}}
    return SmolForCausalLM(tiny_config(VOCABULARY, **moe, **options.get(kind, {}))).eval()


def random_prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 50, (count,), generator=generator).tolist()
    return [torch.randint(6, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("kind", ["dense", "qwen2", "qwen3", "moe", "qwen3_moe"])
def test_generate_batch_equals_generate(kind: str) -> None:
    """Mixed lengths, rows that end early and are refilled; one prompt at a time in transformers."""
    model, prompts = random_model(kind), random_prompts(9)
    stops = [generate_batch(model, prompts[:1], 5, [])[0][-1]]  # so that at least one ends early
    answers = generate_batch(model, prompts, 14, stops, batch_size=3)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=14, do_sample=False, eos_token_id=stops, pad_token_id=0
        )
        assert answer == output[0, len(prompt) :].tolist()
    assert any(answer[-1] in stops for answer in answers) and any(len(answer) == 14 for answer in answers)


def test_generate_batch_with_padded_vocabulary(
    model: SmolForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]], greedy: Greedy
) -> None:
    stops = chat_stop_ids(tokenizer)
    answers = generate_batch(model, prompts, 12, stops, vocab_limit=len(tokenizer))
    assert answers == [greedy(prompt, 12) for prompt in prompts]
    hot = generate_batch(model, prompts, 40, stops, temperature=3, seed=0, vocab_limit=len(tokenizer))
    assert max(map(max, hot)) < len(tokenizer)
    assert max(map(max, generate_batch(model, prompts, 40, stops, temperature=3, seed=0))) >= len(tokenizer)


def test_sampled_batch_does_not_depend_on_company() -> None:
    model, prompts = random_model("dense"), random_prompts(6)
    sampling = dict(temperature=1.0, top_p=0.9)
    together = generate_batch(model, prompts, 16, STOPS, seed=5, batch_size=4, **sampling)
    alone = [generate_batch(model, [p], 16, STOPS, seed=5 + i, **sampling)[0] for i, p in enumerate(prompts)]
    assert together == alone != generate_batch(model, prompts, 16, STOPS, seed=6, **sampling)


def test_generate_batch_leaves_training_mode_as_it_was() -> None:
    model = random_model("dense").train()
    generate_batch(model, [[7, 8]], 2, STOPS)
    assert model.training and generate_batch(model, [], 2, STOPS) == []


def test_peft_model() -> None:
    """A wrapped model decodes with its adapter, as `PeftModel.generate` does."""
    from peft import LoraConfig, get_peft_model

    model = random_model("dense")
    plain = generate_batch(model, [[7, 8, 9]], 12, ())
    config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    wrapped = get_peft_model(model, config).eval()
    (answer,) = generate_batch(wrapped, [[7, 8, 9]], 12, ())
    ids = torch.tensor([[7, 8, 9]])
    expected = wrapped.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
    )
    assert answer == expected[0, 3:].tolist() and [answer] != plain


LAYERS = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"


@pytest.mark.parametrize("parts", [[part] for part in LAYERS.split()] + [LAYERS.split()], ids=" ".join)
def test_an_adapter_beside_the_weights_answers_as_if_merged(parts: list[str]) -> None:
    """Two prompts with the adapter and two without in one batch, against transformers' `generate`."""
    model, prompts = random_model("dense"), random_prompts(2)
    merged, pairs = copy.deepcopy(model), {}
    for name in [f"model.layers.{number}.{part}" for number in range(2) for part in parts]:
        weight = merged.get_submodule(name).weight
        pairs[name] = torch.randn(2, weight.shape[1]) * 0.4, torch.randn(weight.shape[0], 2) * 0.4
        weight.data += pairs[name][1] @ pairs[name][0]
    batch = ContinuousBatch(model)
    batch.decoder.adapt("a", dict(pairs))
    names = [name for _ in prompts for name in ("a", None)]
    requests = [GenerationRequest(p, 12, 0.0, adapter=name) for p, name in zip(sorted(prompts * 2), names, strict=True)]
    answers = answers_of(batch, requests)
    for request, answer in zip(requests, answers, strict=True):
        ids = torch.tensor([request.prompt_ids])
        options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
        output = (merged if request.adapter else model).generate(ids, **options)
        assert answer == output[0, ids.shape[1] :].tolist()
    assert answers[0] != answers[1] or answers[2] != answers[3]
    with torch.inference_mode():
        *_, states = batch.decoder.prompt_states(prompts[0], "a")
        logits = batch.decoder.logits(states)
        torch.testing.assert_close(logits, merged(torch.tensor(prompts[:1])).logits[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="lm_head can only be adapted by merging"):
        batch.decoder.adapt("b", {"lm_head": (torch.zeros(1, 32), torch.zeros(VOCABULARY, 1))})


def test_logprobs_are_the_models_own() -> None:
    """Against one uncached forward pass over the finished answer."""
    model = random_model("dense")
    batch, prompt = ContinuousBatch(model), [9, 10, 11]
    request = GenerationRequest(prompt, 8, temperature=1.5, seed=0, logprobs=4)
    batch.add(batch.start(request))
    events = []
    while len(batch):
        events += [event for _, event in batch.step()]
    tokens = [event.token_id for event in events]
    with torch.inference_mode():
        expected = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for row, event in zip(expected, events, strict=True):
        assert event.logprob == pytest.approx(float(row[event.token_id]), abs=1e-4)
        values, ids = row.topk(4)
        assert [i for i, _ in event.top_logprobs] == ids.tolist()
        assert [v for _, v in event.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", ["dense", "qwen3_moe"])
def test_scores_of_a_long_prompt_are_the_models_own(kind: str) -> None:
    """Over several blocks of 256 positions; also of a prompt of one token, which has nothing to score."""
    model, (prompt,) = long_model(kind, torch.float32), long_prompts(1, 600, 601)
    batch = ContinuousBatch(model)
    sequences = [batch.start(GenerationRequest(p, 2, 0.0, prompt_logprobs=1)) for p in (prompt, prompt[:1])]
    for sequence in sequences:
        batch.add(sequence)
    first = {}
    while len(batch):
        first |= {sequence: event for sequence, event in batch.step() if event.prompt_logprobs}
    assert first[sequences[1]].prompt_logprobs == ((None, ()),)
    scores = first[sequences[0]].prompt_logprobs
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert len(scores) == 600 and scores[0] == (None, ())
    for row, token, (score, top) in zip(expected, prompt[1:], scores[1:], strict=False):
        assert score == pytest.approx(float(row[token]), abs=1e-4)
        assert [v for _, v in top] == pytest.approx([float(row.max())], abs=1e-4)


def test_scoring_a_long_prompt_holds_nobody_up() -> None:
    """It is done a part at a time, beside those that run; one that leaves meanwhile takes nothing with it."""
    model, (prompt, other) = long_model("dense", torch.float32), long_prompts(2, 600, 601)
    alone = ContinuousBatch(model)
    scored = GenerationRequest(prompt, 1, 0.0, prompt_logprobs=2)
    alone.add(alone.start(scored))
    expected = None
    while len(alone):
        expected = next((event for _, event in alone.step()), expected)

    batch = ContinuousBatch(model, chunk=64, max_num_batched_tokens=64)
    running = batch.start(GenerationRequest(other[:8], 100, 0.0))
    sequence, gone = batch.start(scored), batch.start(scored)
    batch.add(running), batch.add(gone), batch.add(sequence)
    rounds = [batch.step() for _ in range(2)]
    batch.remove(gone)
    while len(batch) == 2:
        rounds.append(batch.step())
    assert all(running in dict(results) for results in rounds), "a round without a token for the one that runs"
    assert len(rounds) > 600 // 64 + 5, "ten for the prompt itself, and each layer and block of logits took one"
    (found,) = (event for results in rounds for each, event in results if each is sequence)
    assert found.prompt_logprobs == expected.prompt_logprobs


def test_a_prompt_that_cannot_be_scored_ends_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, prompts = ContinuousBatch(random_model("dense")), random_prompts(2)
    states = batch.decoder.prompt_states

    def fails_once(prompt: list[int], adapter: str | None) -> Iterator[torch.Tensor]:
        if prompt == prompts[0]:
            raise RuntimeError("no memory for this one")
        return states(prompt, adapter)

    monkeypatch.setattr(batch.decoder, "prompt_states", fails_once)
    sequences = [batch.start(GenerationRequest(prompt, 1, 0.0, prompt_logprobs=0)) for prompt in prompts]
    for sequence in sequences:
        batch.add(sequence)
    found = {}
    while len(batch):
        found |= dict(batch.step())
    assert str(found[sequences[0]]) == "no memory for this one"
    assert len(found[sequences[1]].prompt_logprobs) == len(prompts[1])


# --- sampling
# -------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -3.0])


def naive_probabilities(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[float]:
    """The definitions, over plain lists."""
    weights = [math.exp(x / temperature) for x in LOGITS.tolist()]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    kept = order[:top_k] if top_k else order
    kept = [i for i in kept if weights[i] >= min_p * weights[order[0]]]
    mass, nucleus = sum(weights[i] for i in kept), []
    for i in kept:
        nucleus.append(i)
        if sum(weights[j] for j in nucleus) >= top_p * mass:
            break
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.3},
        {"temperature": 2.0, "top_k": 5, "top_p": 0.8, "min_p": 0.2},
        {"top_p": 0.75, "min_p": 0.3},  # two of the three that min_p leaves
        {"top_p": 1e-9},
    ],
)
def test_sampling_frequencies(settings: dict[str, float]) -> None:
    order = [3, 0, 5, 1, 6, 2, 4]  # the most likely token is not the first one
    expected, logits = [naive_probabilities(**settings)[i] for i in order], LOGITS[order]
    sampler = Sampler(GenerationRequest([0], 1, seed=0, **settings), len(LOGITS))
    draws = 1500
    counts = torch.bincount(torch.tensor([sampler.pick(logits) for _ in range(draws)]), minlength=len(LOGITS))
    for count, probability in zip(counts.tolist(), expected, strict=True):
        spread = math.sqrt(probability * (1 - probability) / draws)
        assert abs(count / draws - probability) <= 5 * spread


def test_greedy_penalties_and_bias() -> None:
    """Hand-computed: what is chosen first loses its lead by the penalty, bias lifts or bans a token."""

    def picks(count: int, prompt: list[int] | None = None, **settings: object) -> list[int]:
        request = GenerationRequest(prompt or [6], count, temperature=0, **settings)
        sampler = Sampler(request, len(LOGITS))
        return [sampler.pick(LOGITS.clone()) for _ in range(count)]

    assert picks(3) == [0, 0, 0]
    # logits 2, 1.5, 1: after one use of token 0 it has 1.4; token 1 then has 0.9; 0 leads again, then 2 (1.0)
    assert picks(4, frequency_penalty=0.6) == [0, 1, 0, 2]
    assert picks(4, presence_penalty=0.6) == [0, 1, 0, 0]  # once only: 1.4 stays ahead of 1.0
    assert picks(2, repetition_penalty=2.0) == [0, 1]
    assert picks(1, prompt=[0], repetition_penalty=2.0) == [1]
    assert picks(1, logit_bias={6: 100.0}) == [6] and picks(1, logit_bias={0: -100.0}) == [1]
    assert picks(1, top_k=50) == [0], "a limit above the vocabulary is none"


def test_the_repetition_penalty_lowers_negative_logits_too() -> None:
    logits = torch.tensor([-1.0, -1.5, -9.0])
    request = GenerationRequest([0, 99], 1, temperature=0, repetition_penalty=2.0)  # 99 is no row of this vocabulary
    assert Sampler(request, 3).pick(logits) == 1
    assert Sampler(GenerationRequest([2], 1, temperature=0, repetition_penalty=2.0), 3).pick(logits) == 0
    assert Sampler(GenerationRequest([99], 1, temperature=0, repetition_penalty=2.0), 3).pick(logits) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {1: 1.0}},
        {"min_tokens": 1},
    ],
)
def test_the_largest_logit_is_taken_unseen_only_where_nothing_changes_it(settings: dict[str, object]) -> None:
    assert Sampler(GenerationRequest([0], 1, temperature=0, top_p=0.5, logprobs=1), 3).plain_greedy
    assert not Sampler(GenerationRequest([0], 1, **{"temperature": 0, **settings}), 3).plain_greedy


def test_an_answer_does_not_end_before_its_least_length() -> None:
    request = GenerationRequest([6], 4, temperature=0, stop_ids=[0, 1], min_tokens=2)
    sampler = Sampler(request, len(LOGITS))
    assert [sampler.pick(LOGITS.clone()) for _ in range(4)] == [2, 2, 0, 0]


class GivesUp:
    """A grammar, and its own mask, that allows one token at a time and can no longer be followed after two."""

    def __init__(self) -> None:
        self.advanced: list[int] = []

    @property
    def failed(self) -> bool:
        return len(self.advanced) == 2

    def mask(self) -> "GivesUp":
        return self

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor(20 + len(self.advanced)), 0.0)

    def advance(self, token: int) -> None:
        self.advanced.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_ends_with_an_error_when_its_grammar_gives_up(temperature: float) -> None:
    batch, grammar = ContinuousBatch(random_model("dense")), GivesUp()
    batch.add(batch.start(GenerationRequest([7, 8], 9, temperature, grammar=grammar)))
    events = [event for _ in range(2) for _, event in batch.step()]
    assert [(event.token_id, event.finish_reason) for event in events] == [(20, None), (21, "error")]
    assert grammar.advanced == [20, 21] and len(batch) == 0


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="Linear: generation here takes SmolForCausalLM"):
        ContinuousBatch(torch.nn.Linear(2, 2))


def test_a_seed_gives_the_same_draws_and_no_seed_gives_others() -> None:
    def draws(**settings: object) -> list[int]:
        sampler = Sampler(GenerationRequest([6], 1, **settings), 1000)
        return [sampler.pick(torch.zeros(1000)) for _ in range(8)]

    assert draws(seed=3) == draws(seed=3) != draws(seed=4)
    assert draws() != draws()


def test_scores_are_the_log_probabilities_in_order() -> None:
    logits = torch.log(torch.tensor([0.2, 0.5, 0.3]))
    assert logprobs_of(logits, 0, None, 3) == (None, ())
    score, top = logprobs_of(logits, 0, 0, 3)
    assert score == pytest.approx(math.log(0.2)) and top == ()
    score, top = logprobs_of(logits, 2, 2, 3)
    assert score == pytest.approx(math.log(0.3))
    assert [i for i, _ in top] == [1, 2] and [v for _, v in top] == pytest.approx([math.log(0.5), math.log(0.3)])
    assert [i for i, _ in logprobs_of(logits, 0, 20, 3)[1]] == [1, 2, 0]


# --- the asynchronous engine --------------------------------------------------------------------------------


async def collect(engine: TorchEngine, request: GenerationRequest, delay: float = 0) -> list[TokenEvent]:
    await asyncio.sleep(delay)
    return [event async for event in engine.generate(request)]


def request_of(prompt: list[int], number: int = 0, max_tokens: int = 12) -> GenerationRequest:
    return GenerationRequest(prompt, max_tokens, (number % 2) * 1.0, seed=number, stop_ids=STOPS)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_late_arrivals_change_nothing(kind: str) -> None:
    model, prompts = random_model(kind), random_prompts(8)
    engine = TorchEngine(model, max_num_seqs=4)

    async def run() -> None:
        requests = [request_of(prompt, number) for number, prompt in enumerate(prompts)]
        alone = [await collect(engine, request) for request in requests]
        together = await asyncio.gather(*(collect(engine, r, 0.004 * i) for i, r in enumerate(requests)))
        assert together == alone
        assert all(events[-1].finish_reason and not events[0].logprob for events in alone)

    asyncio.run(run())
    engine.close()


def test_bf16_answers_do_not_depend_on_company() -> None:
    """bf16 logits have many near ties, so any change of rounding would show."""
    model, prompts = random_model("dense").to(torch.bfloat16), random_prompts(8)
    alone = [generate_batch(model, [prompt], 12, STOPS)[0] for prompt in prompts]
    batch, answers = ContinuousBatch(model, chunk=128), {}
    waiting = [batch.start(GenerationRequest(p, 12, 0.0, stop_ids=STOPS)) for p in prompts]
    order = list(waiting)
    while waiting or len(batch):
        if waiting:  # one joins at every step
            batch.add(waiting.pop(0))
        for sequence, event in batch.step():
            answers.setdefault(sequence, []).append(event.token_id)
    assert [answers[sequence] for sequence in order] == alone


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_prompts_that_run_together_compute_what_they_do_alone(kind: str, dtype: torch.dtype, monkeypatch) -> None:
    """Chunks of several prompts share the products exactly where that changes no bit of any log-probability."""
    model, sizes = random_model(kind).to(dtype), []
    random = torch.Generator().manual_seed(7)
    prompts = [torch.randint(6, VOCABULARY, (n,), generator=random).tolist() for n in (1, 5, 16, 17, 40, 64, 33, 70)]
    prefill = Decoder.prefill
    counted = lambda decoder, rows, *rest: sizes.append(len(rows)) or prefill(decoder, rows, *rest)  # noqa: E731
    monkeypatch.setattr(Decoder, "prefill", counted)

    def answer(prompts: list[list[int]]) -> list[list[TokenEvent]]:
        batch = ContinuousBatch(model, chunk=16, max_num_batched_tokens=100)
        sequences = [batch.start(GenerationRequest(p, 4, 0.0, logprobs=3)) for p in prompts]
        events: dict = {sequence: [] for sequence in sequences}
        for sequence in sequences:
            batch.add(sequence)
        while len(batch):
            for sequence, event in batch.step():
                events[sequence].append(event)
        return [events[sequence] for sequence in sequences]

    alone = [answer([prompt])[0] for prompt in prompts]
    sizes.clear()
    together = answer(prompts)
    assert [events[0] for events in together] == [events[0] for events in alone]  # what the prompt computes
    assert together == alone or dtype == torch.float32  # whose decoding rounds by the number of rows
    assert (max(sizes) > 1) == ContinuousBatch(model, chunk=16).decoder.rows_are_independent
    if dtype == torch.float32:
        assert max(sizes) == 1


def test_cancelling_frees_the_place() -> None:
    engine = TorchEngine(random_model("dense"), max_num_seqs=1)

    async def run() -> None:
        endless = GenerationRequest([7, 8, 9], 200, 0.0)
        stream = engine.generate(endless)
        await anext(stream)
        waiting = asyncio.create_task(collect(engine, request_of([10, 11])))
        abandoned = asyncio.create_task(collect(engine, endless))
        await asyncio.sleep(0)
        abandoned.cancel()
        await stream.aclose()
        assert await asyncio.wait_for(waiting, 20) == await collect(engine, request_of([10, 11]))
        assert engine.num_running == engine.num_waiting == 0

    asyncio.run(run())
    engine.close()


def test_who_stays_is_not_hurt_by_who_leaves() -> None:
    """The row of the one that leaves stands before that of the other, which moves into its place."""
    engine = TorchEngine(random_model("dense"), max_num_seqs=2)

    async def run() -> None:
        stays = request_of([10, 11], max_tokens=60)
        alone = await collect(engine, stays)
        leaves = engine.generate(GenerationRequest([7, 8, 9], 200, 0.0))
        await anext(leaves)
        beside = asyncio.create_task(collect(engine, stays))
        while engine.num_running < 2:
            await asyncio.sleep(0)
        await leaves.aclose()
        assert await asyncio.wait_for(beside, 60) == alone

    asyncio.run(run())
    engine.close()


def test_queue_limit() -> None:
    engine = TorchEngine(random_model("dense"), max_num_seqs=1, max_queue=1)

    async def run() -> None:
        endless = GenerationRequest([7, 8, 9], 250, 0.0)
        first = engine.generate(endless)
        await anext(first)
        second = asyncio.create_task(collect(engine, request_of([9])))
        await asyncio.sleep(0)
        with pytest.raises(EngineBusy, match="limit 1"):
            await collect(engine, request_of([10]))
        await first.aclose()
        assert await second

    asyncio.run(run())
    engine.close()


def test_a_failing_step_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("dense")
    engine = TorchEngine(model)

    async def run() -> None:
        expected = await collect(engine, request_of([7, 8]))
        embedding = model.model.embed_tokens
        with torch.no_grad():
            kept = embedding.weight[9].clone()
            embedding.weight[9] = torch.nan
            with pytest.raises(EngineError, match="generation failed"):
                await collect(engine, request_of([7, 9]))
            embedding.weight[9] = kept
        assert await collect(engine, request_of([7, 8])) == expected

    asyncio.run(run())
    engine.close()

    async def closed() -> None:
        with pytest.raises(EngineError, match="shut down"):
            await collect(engine, request_of([7, 8]))

    asyncio.run(closed())


def nan_pairs() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """An adapter that has diverged in training."""
    return {"model.layers.0.self_attn.q_proj": (torch.full((1, 32), torch.nan), torch.ones(128, 1))}


def test_an_adapter_that_has_diverged_fails_alone() -> None:
    """Beside others, joining in the middle, and in the place that another one takes afterwards."""
    engine = TorchEngine(random_model("dense"), adapters={"bad": nan_pairs()}, max_num_seqs=3)

    async def run() -> None:
        fine = [GenerationRequest([7, 8], 200, 0.0), GenerationRequest([9, 10], 200, 0.0)]
        expected = [await collect(engine, request) for request in fine]
        together = [asyncio.create_task(collect(engine, request)) for request in fine]
        await asyncio.sleep(0.02)
        for prompt in ([7], [8, 9], [10] * 300):
            with pytest.raises(EngineError, match="generation failed"):
                await collect(engine, GenerationRequest(prompt, 5, 0.0, adapter="bad"))
        assert await asyncio.gather(*together) == expected
        assert [await collect(engine, request) for request in fine] == expected

    asyncio.run(run())
    engine.close()


def test_no_numbers_that_are_none_stay_in_the_cache() -> None:
    """Neither in rows, of sequences that failed, left in their prompt or gave way, nor in prefixes of their prompt."""
    model = random_model("dense")
    batch = ContinuousBatch(model, chunk=32, max_num_batched_tokens=32, budget=2**26, max_num_seqs=4)
    clean = random_prompts(1)[0] * 3
    spoiled = [*range(6, 70), 9] * 2
    weight = model.model.embed_tokens.weight
    kept = weight[9].clone()

    def all_finite() -> bool:
        racks = [rack for shelf in batch.cache.shelves for rack in shelf.racks]
        blocks = [block for _, block in batch.cache.prefixes.blocks.values()]
        return all(bool(states.isfinite().all()) for states in racks + blocks)

    def start(prompt: list[int]) -> object:
        sequence = batch.start(GenerationRequest(prompt, 4, 0.0))
        batch.add(sequence)
        return sequence

    expected = answers_of(batch, [GenerationRequest(clean, 4, 0.0)])
    with torch.no_grad():
        weight[9] = torch.nan
    results = []
    start(spoiled)
    while len(batch):
        results += batch.step()
    assert [type(event) for _, event in results] == [FloatingPointError] and all_finite()
    sequence = start(spoiled)
    for _ in range(2):
        batch.step()
    assert not all_finite()
    batch.remove(sequence)
    racks = [rack for shelf in batch.cache.shelves for rack in shelf.racks]
    assert all(bool(rack.isfinite().all()) for rack in racks)
    with torch.no_grad():
        weight[9] = kept
    assert answers_of(batch, [GenerationRequest(clean, 4, 0.0)]) == expected


def test_chunks_are_no_longer_than_a_step() -> None:
    """`--max_num_batched_tokens` below the usual chunk, which nobody asked for, is not refused for its sake."""
    engine = TorchEngine(random_model("dense"), max_num_batched_tokens=20)
    assert engine._batch.chunk == 20
    prompt = random_prompts(1)[0]
    expected = generate_batch(random_model("dense"), [prompt], 5, ())
    events = asyncio.run(collect(engine, GenerationRequest(prompt, 5, 0.0)))
    assert [[event.token_id for event in events]] == expected
    engine.close()
    with pytest.raises(ValueError, match="128 tokens at a time"):
        TorchEngine(random_model("dense"), max_num_batched_tokens=20, chunk=128)


def test_sampling_where_the_device_has_no_float64() -> None:
    """Apple's GPUs: the choice is made on the CPU, in as many digits."""
    scores = MagicMock(device=torch.device("mps"))
    assert sampling._exact(scores) is scores.cpu.return_value.double.return_value
    assert sampling._exact(torch.zeros(2)).dtype == torch.float64


class Breaks(GivesUp):
    """A grammar that fails in the middle of a step."""

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("odd", "ends"),
    [
        (dict(min_tokens=2), True),  # nothing ends it: nothing is to be kept from ending it
        (dict(min_tokens=2, stop_ids=[VOCABULARY + 3]), True),  # as a checkpoint's files may name it
        (dict(logit_bias={7: -100.0}, logprobs=2**40), True),
        (dict(grammar=Breaks()), False),
        (dict(grammar=Breaks(), temperature=1.0), False),
    ],
)
def test_what_one_request_asks_for_ends_no_other(odd: dict[str, object], ends: bool) -> None:
    engine = TorchEngine(random_model("dense"))

    async def run() -> None:
        request = GenerationRequest([7, 8], 30, 0.0)
        expected = await collect(engine, request)
        other = engine.generate(request)
        begun = [await anext(other)]
        strange = GenerationRequest([9], 4, **{"temperature": 0.0, **odd})
        if ends:
            assert len(await collect(engine, strange)) == 4
        else:
            with pytest.raises(EngineError, match="generation failed"):
                await collect(engine, strange)
        assert begun + [event async for event in other] == expected
        assert engine.num_running == engine.num_waiting == 0

    asyncio.run(run())
    engine.close()


def test_a_list_of_prompts_does_not_hide_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(Sampler, "pick", broken)
    with pytest.raises(ZeroDivisionError):
        generate_batch(random_model("dense"), [[7, 8]], 4, [], temperature=1.0)


def test_a_device_that_fails_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a CUDA error every call fails: nobody waits for ever, and whoever runs the server is told."""
    told: list[int] = []
    engine = TorchEngine(random_model("dense"), max_num_seqs=1, on_death=lambda: told.append(1))

    def broken(*_: object) -> object:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine._batch.decoder, "prefill", broken)
    monkeypatch.setattr(engine._batch, "clear", lambda: pytest.fail("it would touch the device"))

    async def run() -> None:
        tasks = [asyncio.create_task(collect(engine, request_of([token]))) for token in (7, 8, 9)]
        for task in tasks:
            with pytest.raises(EngineError):
                await task
        with pytest.raises(EngineError, match="shut down"):
            await collect(engine, request_of([7]))

    asyncio.run(run())
    assert engine.dead and told == [1]
    engine.close()


def test_limits_are_those_of_the_device_unless_given() -> None:
    for given, expected in (({}, (128, 512, 16)), ({"chunk": 32, "max_num_seqs": 3}, (32, 512, 3))):
        engine = TorchEngine(random_model("dense"), **given)
        batch = engine._batch
        assert (batch.chunk, batch.max_num_batched_tokens, batch.max_num_seqs) == expected
        assert (engine.model_name, engine.adapters, engine.max_model_len) == ("model", (), 512)
        engine.close()


def test_limits_are_checked() -> None:
    engine = TorchEngine(random_model("dense"), max_model_len=32)

    async def run() -> None:
        for prompt, max_tokens in (([], 4), ([7], 0), ([7] * 30, 3)):
            with pytest.raises(ValueError, match="token"):
                await collect(engine, request_of(prompt, max_tokens=max_tokens))
        assert engine.max_model_len == 32

    asyncio.run(run())
    engine.close()


# --- memory, chunks, prefixes -------------------------------------------------------------------------------


def answers_of(batch: ContinuousBatch, requests: list[GenerationRequest]) -> list[list[int]]:
    """All requests at once; the cache never passes the budget."""
    sequences, answers = [batch.start(request) for request in requests], {}
    for sequence in sequences:
        batch.add(sequence)
    while len(batch):
        for sequence, event in batch.step():
            answers.setdefault(sequence, []).append(event.token_id)
        assert batch.budget is None or batch.cache.bytes <= batch.budget
    return [answers[sequence] for sequence in sequences]


def long_prompts(count: int, low: int, high: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    return [torch.randint(6, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def long_model(kind: str, dtype: torch.dtype = torch.bfloat16) -> SmolForCausalLM:
    """Like `random_model`, with a context of 2,048: rows of 256, 512, 1,024 and 2,080 columns."""
    torch.manual_seed(1)
    moe = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32) if "moe" in kind else {}
    config = tiny_config(VOCABULARY, max_position_embeddings=2048, qk_norm="qwen3" in kind, **moe)
    return SmolForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize("kind", ["dense", "qwen3_moe"])
def test_chunks_equal_generate(kind: str) -> None:
    """Prompts over several chunks, answers that outgrow their rows; fp32, so that only a mistake can show."""
    model = long_model(kind, torch.float32)
    prompts = long_prompts(3, 200, 260)
    batch = ContinuousBatch(model, chunk=32, max_num_batched_tokens=96, max_num_seqs=2)
    answers = answers_of(batch, [GenerationRequest(prompt, 60, 0.0) for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=60, do_sample=False, pad_token_id=0)
        assert answer == output[0, len(prompt) :].tolist()


def test_a_long_prompt_does_not_stall_a_stream() -> None:
    """Every step decodes the running stream and takes no more of the prompt than it may; a short one overtakes."""
    batch = ContinuousBatch(long_model("dense"), chunk=32, max_num_batched_tokens=64)
    stream, long, short = (
        batch.start(GenerationRequest(prompt, 60, 0.0)) for prompt in ([7, 8], [9] * 1000, [10] * 20)
    )
    batch.add(stream)
    batch.step()
    batch.add(long)
    batch.add(short)
    first = {}
    for number in range(20):
        before = long.length
        events = batch.step()
        assert stream in [sequence for sequence, _ in events]
        assert long.length - before <= 64
        for sequence, _ in events:
            first.setdefault(sequence, number)
    assert first[short] == 0 and first[long] == 16  # 32 tokens beside the short one, then 15 times 64, then 8


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_giving_way_changes_no_answer(kind: str) -> None:
    """A budget for about three of six sequences, in bf16, where any change of rounding would show."""
    model = long_model(kind)
    prompts = long_prompts(6, 180, 250)
    requests = [GenerationRequest(p, 120, i % 2 * 1.0, seed=i) for i, p in enumerate(prompts)]
    free = ContinuousBatch(model, chunk=128)
    expected = answers_of(free, requests)
    tight = ContinuousBatch(model, chunk=128, budget=5 * 2**18, max_model_len=600)  # rows of 256 and 632 columns
    assert tight.budget < 6 * 632 * tight.cache.column_bytes
    assert answers_of(tight, requests) == expected
    assert tight.preemptions > 0 == free.preemptions
    assert all(not shelf.rows for shelf in tight.cache.shelves)


def test_prefixes_are_reused_to_the_last_bit() -> None:
    """Keys and values of a prompt that begins like an earlier one equal those computed without it."""
    model, system = long_model("dense"), long_prompts(1, 300, 301)[0]
    prompts = [system + [number] * 50 for number in (8, 9)]
    plain = ContinuousBatch(model, chunk=128, budget=2**26, prefix_reuse=False)
    expected = answers_of(plain, [GenerationRequest(prompt, 20, 0.0, logprobs=0) for prompt in prompts])
    batch = ContinuousBatch(model, chunk=128, budget=2**26)
    sequences = [batch.start(GenerationRequest(prompt, 20, 0.0)) for prompt in (*prompts, prompts[0])]
    states = []
    for sequence in sequences:
        batch.add(sequence)
        batch.step()
        states.append(sequence.row.states[:, :, :, :300].clone())
    assert batch.reused_tokens == 256 + 256 and plain.reused_tokens == 0
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])
    while len(batch):
        batch.step()
    assert [sequence.tokens[350:] for sequence in sequences] == [*expected, expected[0]]


def test_prefixes_stay_in_their_share() -> None:
    """They take at most an eighth of the budget, leave in order of last use, and belong to one adapter."""
    model = long_model("dense")
    batch = ContinuousBatch(model, chunk=128, budget=2**22)
    prefixes, prompts = batch.cache.prefixes, long_prompts(12, 300, 500)
    for prompt in prompts:
        answers_of(batch, [GenerationRequest(prompt, 2, 0.0)])
    kept = [block.nbytes for _, block in prefixes.blocks.values()]
    assert sum(kept) == prefixes.bytes <= 2**22 // 8 < prefixes.bytes + kept[0]
    before = batch.reused_tokens
    answers_of(batch, [GenerationRequest(prompts[-1], 2, 0.0)])
    assert batch.reused_tokens - before == (len(prompts[-1]) - 1) // 128 * 128
    answers_of(batch, [GenerationRequest(prompts[0], 2, 0.0)])
    assert batch.reused_tokens - before == (len(prompts[-1]) - 1) // 128 * 128
    assert prefixes.find("an adapter", prompts[-1], 128) == []


def test_an_adapter_does_not_reuse_what_the_model_alone_computed() -> None:
    model, (prompt,) = long_model("dense"), long_prompts(1, 300, 301)
    pairs = {f"model.layers.{number}.self_attn.k_proj": (torch.randn(4, 32), torch.randn(64, 4)) for number in range(2)}

    def answers(adapters: list[str | None], **options: object) -> tuple[list[list[int]], int]:
        batch = ContinuousBatch(model, chunk=128, budget=2**26, **options)
        batch.decoder.adapt("a", pairs)
        found = [answers_of(batch, [GenerationRequest(prompt, 20, 0.0, adapter=name)])[0] for name in adapters]
        return found, batch.reused_tokens

    turns = [None, "a", None, "a"]
    expected, none = answers(turns, prefix_reuse=False)
    assert expected[0] != expected[1] and none == 0
    assert answers(turns) == (expected, 2 * 256)


def test_the_least_budget_holds_the_longest_sequence() -> None:
    model, limits = long_model("dense"), {"chunk": 128, "max_model_len": 600, "prefix_reuse": False}
    least = (256 + 608) * ContinuousBatch(model).cache.column_bytes  # its last two rows, for the move
    batch = ContinuousBatch(model, budget=least, **limits)
    assert [len(answer) for answer in answers_of(batch, [GenerationRequest([7] * 200, 400, 0.0)])] == [400]
    with pytest.raises(ValueError, match="600 tokens needs"):
        ContinuousBatch(model, budget=least - 1, **limits)


def test_a_budget_that_holds_no_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="2048 tokens needs"):
        ContinuousBatch(long_model("dense"), budget=2**20)
    with pytest.raises(ValueError, match="128 tokens at a time"):
        ContinuousBatch(long_model("dense"), chunk=128, max_num_batched_tokens=64)


def test_deadline() -> None:
    """Of a running request and of a waiting one; others go on."""
    engine = TorchEngine(random_model("dense"), max_num_seqs=1, timeout=30)

    async def run() -> None:
        hurried = GenerationRequest([7, 8, 9], 240, 0.0, timeout=0.05)
        running = asyncio.create_task(collect(engine, GenerationRequest([9], 250, 0.0, timeout=0.2)))
        waiting = asyncio.create_task(collect(engine, hurried))
        for task in (running, waiting):
            with pytest.raises(DeadlineExceeded, match="in the time it had"):
                await task
        assert len(await collect(engine, request_of([10, 11]))) > 0
        assert engine.num_running == engine.num_waiting == 0

    original = engine._batch.step

    def slowly() -> list:
        time.sleep(0.02)
        return original()

    engine._batch.step = slowly
    asyncio.run(run())
    engine.close()


def test_everybody_hears_of_a_failing_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a request whose last token was computed in it, and one that waits goes on afterwards."""
    engine = TorchEngine(random_model("dense"), max_num_seqs=2)
    decode = engine._batch._decode
    monkeypatch.setattr(engine._batch, "_decode", lambda: 1 / 0)

    async def run() -> None:
        ended = asyncio.create_task(collect(engine, GenerationRequest([7], 1, 0.0)))
        running = asyncio.create_task(collect(engine, GenerationRequest([8], 5, 0.0)))
        waiting = asyncio.create_task(collect(engine, GenerationRequest([9], 5, 0.0)))
        for task in (ended, running):
            with pytest.raises(EngineError, match="generation failed"):
                await task
        monkeypatch.setattr(engine._batch, "_decode", decode)
        try:
            assert len(await waiting) == 5
        except EngineError:  # it may have been admitted while steps still failed
            pass
        assert len(await collect(engine, GenerationRequest([9], 5, 0.0))) == 5

    asyncio.run(run())
    engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "qwen3_moe"])
def test_on_a_gpu(kind: str) -> None:
    """fp32 greedy answers of transformers, through chunks, reused prefixes, adapters beside them and rows given up."""
    model = long_model(kind, torch.float32).cuda()
    system = long_prompts(1, 150, 151)[0]
    prompts = [system + prompt for prompt in long_prompts(5, 30, 100)]  # they start in rows of 256 and outgrow them
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=120, do_sample=False, pad_token_id=0)
        expected.append(output[0, len(prompt) :].tolist())
    column = ContinuousBatch(model).cache.column_bytes
    batch = ContinuousBatch(model, chunk=128, max_model_len=600, budget=4 * 632 * column)
    pair = torch.randn(4, 32), torch.randn(128, 4)
    batch.decoder.adapt("a", {f"model.layers.{i}.self_attn.q_proj": pair for i in range(2)})
    requests = [GenerationRequest(prompt, 120, 0.0) for prompt in prompts]
    mixed = answers_of(batch, [GenerationRequest(prompts[0], 120, 0.0, adapter="a"), *requests])
    assert mixed[1:] == expected and mixed[0] != expected[0]
    assert batch.reused_tokens > 0 and batch.preemptions > 0
    engine = TorchEngine(model.to(torch.bfloat16), budget=2**28)

    async def run() -> None:
        answers = await asyncio.gather(*(collect(engine, request) for request in requests))
        assert [len(answer) for answer in answers] == [120] * len(prompts)

    asyncio.run(run())
    engine.close()


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_temperatures_near_zero_are_greedy(temperature: float) -> None:
    """Divided by them logits overflow: that chose a token that does not exist, and ended every answer in the batch."""
    logits = torch.randn(100, generator=torch.Generator().manual_seed(0)) * 5
    assert Sampler(GenerationRequest([1, 2], 4, temperature), 100).pick(logits) == int(logits.argmax())
