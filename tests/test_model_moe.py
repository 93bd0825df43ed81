"""Mixture-of-Experts: routing, capacity, losses and statistics against naive loops and hand-made numbers."""

import pytest
import torch
import torch.nn.functional as F

import smol_model
from smol_config import SmolConfig
from smol_kernels import grouped_linear
from smol_model import SmolForCausalLM, SparseMoE, dispatch

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
TOP1 = {"num_experts_per_tok": 1, "qk_norm": True}


def layer(seed: int = 0, **options) -> SparseMoE:
    torch.manual_seed(seed)
    model = SmolForCausalLM(SmolConfig(**SHAPE | options))
    return model.model.layers[0].mlp


def naive(moe: SparseMoE, x: torch.Tensor, limit: int | None = None) -> torch.Tensor:
    """Token by token and choice by choice; first choices of all tokens claim capacity before second ones."""
    tokens = x.view(-1, x.shape[-1])
    probabilities = F.linear(tokens, moe.gate.weight).softmax(-1)
    weights, chosen = probabilities.topk(moe.gate.top_k)
    if moe.gate.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    output, taken = torch.zeros_like(tokens), [0] * moe.num_experts
    for choice in range(moe.gate.top_k):
        for token in range(len(tokens)):
            expert = chosen[token, choice].item()
            if limit is not None and taken[expert] >= limit:
                continue
            taken[expert] += 1
            gate, up = (moe.experts.gate_up_proj[expert] @ tokens[token]).chunk(2)
            value = moe.experts.down_proj[expert] @ (F.silu(gate) * up)
            output = output.index_add(0, torch.tensor([token]), (weights[token, choice] * value)[None])
    return output.view_as(x)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "norm_topk_prob": False}, TOP1])
def test_routing_equals_a_naive_loop(options):
    moe, x = layer(**options), torch.randn(2, 5, 32, requires_grad=True)
    expected, (output, logits, _) = naive(moe, x), moe(x, None)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(logits, F.linear(x.view(-1, 32), moe.gate.weight))
    outer, wanted = torch.randn_like(x), (x, *moe.parameters())
    found, reference = (torch.autograd.grad(y, wanted, outer, retain_graph=True) for y in (output, expected))
    torch.testing.assert_close(found, reference, atol=1e-5, rtol=1e-4)


def test_rows_of_an_expert_are_filled_up_to_a_multiple(monkeypatch):
    """The example of the next test in multiples of 4: two rows of filling each, what is dropped after all experts."""
    monkeypatch.setattr(smol_model, "ROW_MULTIPLE", 4)
    plan = dispatch(torch.tensor([[0, 1], [0, 1], [0, 1]]), num_experts=2, capacity=2, real=None)
    assert plan.ends.tolist() == [4, 8]
    assert plan.order.tolist() == [0, 1, 0, 0, 3, 4, 0, 0, 2, 5, 0, 0]
    assert plan.kept.flatten().tolist() == [True, True, False, False] * 2 + [False] * 4
    assert plan.inverse.tolist() == [0, 1, 8, 4, 5, 9]
    assert plan.load.tolist() == [3, 3] and not plan.complete


def test_capacity_drops_exactly_the_overflow_in_priority_order(monkeypatch):
    """Literal example: 3 tokens, 2 experts, top-2. Everybody's first choice is expert 0, which takes two."""
    monkeypatch.setattr(smol_model, "ROW_MULTIPLE", 1)
    experts = torch.tensor([[0, 1], [0, 1], [0, 1]])
    plan = dispatch(experts, num_experts=2, capacity=2, real=None)
    # slots 0-2 are the first choices of tokens 0-2, slots 3-5 their second ones
    assert plan.order[:4].tolist() == [0, 1, 3, 4]  # expert 0: tokens 0, 1; expert 1: tokens 0, 1
    assert sorted(plan.order[4:].tolist()) == [2, 5]
    assert plan.ends.tolist() == [2, 4]
    assert plan.load.tolist() == [3, 3]
    assert plan.kept.flatten().tolist() == [True] * 4 + [False] * 2
    assert plan.order[plan.inverse].tolist() == list(range(6))
    # a first choice comes before a second one of an earlier token
    plan = dispatch(torch.tensor([[1, 0], [0, 1]]), num_experts=2, capacity=1, real=None)
    assert plan.order[:2].tolist() == [1, 0]


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_capacity_equals_a_naive_loop_in_training_only(factor):
    moe, x = layer(capacity_factor=factor).train(), torch.randn(2, 8, 32, requires_grad=True)
    limit = -int(-factor * 2 * 16 // 4)
    output, _, stats = moe(x, None)
    expected = naive(moe, x, limit)
    torch.testing.assert_close(output, expected)
    outer, wanted = torch.randn_like(x), (x, *moe.parameters())
    found, reference = (torch.autograd.grad(y, wanted, outer, retain_graph=True) for y in (output, expected))
    torch.testing.assert_close(found, reference, atol=1e-5, rtol=1e-4)
    kept = (stats.load * 32).clamp(max=limit).sum() / 32
    assert stats.dropped.item() == pytest.approx(1 - kept.item(), abs=1e-6)
    assert factor > 0.5 or stats.dropped >= 0.5
    output, _, stats = moe.eval()(x, None)
    torch.testing.assert_close(output, naive(moe, x))
    assert stats.dropped == 0


def test_unlimited_capacity_equals_dropless():
    free, limited, x = layer().train(), layer(capacity_factor=100.0).train(), torch.randn(1, 9, 32)
    torch.testing.assert_close(limited(x, None)[0], free(x, None)[0])


@pytest.mark.parametrize("factor, limit", [(1.1, 55), (1.25, 63), (1.0, 50), (0.001, 1)])
def test_capacity_is_rounded_up_in_whole_numbers(factor, limit):
    """k = 2 of 8 experts, 200 tokens: 50 times the factor, padding or not."""
    moe, experts = layer(capacity_factor=factor, num_experts=8), torch.zeros(200, 2)
    assert moe.capacity(experts, None) == limit
    assert moe.capacity(torch.zeros(300, 2), torch.arange(300) < 200) == limit


def test_a_dropped_token_passes_through_the_residual_stream():
    moe = layer(capacity_factor=0.01).train()
    with torch.no_grad():
        moe.gate.weight.copy_(torch.arange(4.0)[:, None].expand(4, 32))  # everybody: expert 3, then 2
    output = moe(torch.ones(1, 6, 32), None)[0][0]
    assert output[0].any() and not output[1:].any()  # capacity 1: the first token takes it


def test_auxiliary_loss_is_one_at_perfect_balance_and_worse_when_collapsed():
    moe = layer(**TOP1)
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.weight[:, :4] = 50 * torch.eye(4)
    balanced = F.pad(torch.eye(4), (0, 28)).repeat(3, 1)[None]  # (1, 12, 32): three tokens for each expert
    assert moe(balanced, None)[2].aux_loss.item() == pytest.approx(1.0, abs=1e-5)
    collapsed = balanced[:, :1].expand(1, 12, 32)
    assert moe(collapsed, None)[2].aux_loss.item() == pytest.approx(4.0, abs=1e-5)


def test_router_losses_and_statistics_against_their_formulas():
    moe, x = layer(), torch.randn(2, 6, 32)
    logits = F.linear(x.view(-1, 32), moe.gate.weight).requires_grad_()
    probabilities = logits.softmax(-1)
    chosen = F.one_hot(probabilities.topk(2).indices, 4).sum((0, 1)) / 24  # fraction of slots per expert
    aux = 4 * (chosen * probabilities.mean(0)).sum()
    z = logits.logsumexp(-1).pow(2).mean()
    stats = moe(x, None)[2]
    torch.testing.assert_close(stats.aux_loss, aux)
    torch.testing.assert_close(stats.z_loss, z)
    torch.testing.assert_close(stats.load, chosen)
    torch.testing.assert_close(stats.entropy, torch.distributions.Categorical(probabilities).entropy().mean())
    found = torch.autograd.grad(stats.aux_loss + 0.1 * stats.z_loss, moe.gate.weight)[0]
    expected = torch.autograd.grad(aux + 0.1 * z, logits)[0].T @ x.view(-1, 32)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("factor", [None, 1.0])
def test_padding_is_not_routed_counted_or_given_capacity(factor):
    moe, x = layer(capacity_factor=factor).train(), torch.randn(1, 7, 32)
    padded = torch.cat((torch.full((1, 4, 32), 1e3), x), 1)
    real = torch.tensor([False] * 4 + [True] * 7)
    alone, with_padding = moe(x, None), moe(padded, real)
    torch.testing.assert_close(with_padding[0][:, 4:], alone[0])
    assert not with_padding[0][:, :4].any()
    for name in alone[2]._fields:
        torch.testing.assert_close(getattr(with_padding[2], name), getattr(alone[2], name), msg=name)


def test_of_padding_alone_nothing_is_dropped():
    stats = layer(capacity_factor=1.0).train()(torch.randn(1, 6, 32), torch.zeros(6, dtype=torch.bool))[2]
    assert stats.dropped == 0 and not stats.load.any()


def test_padding_is_excluded_through_the_attention_mask():
    torch.manual_seed(0)
    model = SmolForCausalLM(SmolConfig(**SHAPE)).train()
    x, mask = torch.randint(0, 61, (1, 8)), torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    labels = x.masked_fill(mask == 0, -100)
    padded, alone = model(x, attention_mask=mask, labels=labels), model(x[:, :5], labels=x[:, :5])
    torch.testing.assert_close(padded.loss, alone.loss)
    torch.testing.assert_close(padded.router_stats.load, alone.router_stats.load)


def test_every_expert_gets_a_gradient_even_without_tokens():
    moe, x = layer(**TOP1), torch.randn(1, 3, 32)
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.weight[2] = 100 * x[0, 0]
    output, _, stats = moe(x[:, :1].expand(1, 5, 32), None)
    assert stats.load.tolist() == [0, 0, 1, 0]
    output.sum().backward()
    for parameter in moe.experts.parameters():
        assert parameter.grad[2].any() and not parameter.grad[[0, 1, 3]].any()
        assert parameter.grad.isfinite().all()


def test_top1_router_learns_from_the_language_loss():
    moe, x = layer(**TOP1), torch.randn(1, 6, 32)
    moe(x, None)[0].square().sum().backward()
    assert moe.gate.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_product_and_its_fallback_agree(dtype):
    torch.manual_seed(0)
    rows, ends = torch.randn(10, 16, dtype=dtype), torch.tensor([3, 3, 7], dtype=torch.int32)
    weight = torch.randn(3, 24, 16, dtype=dtype)
    expected = torch.cat((rows[:3] @ weight[0].T, rows[3:7] @ weight[2].T))
    aligned = grouped_linear(rows, weight, ends)[:7]
    # 18 input channels are not a multiple of 16 bytes in either dtype: this takes the loop
    looped = grouped_linear(F.pad(rows, (0, 1)), F.pad(weight, (0, 1)), ends)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    torch.testing.assert_close(aligned, expected, **tolerance)
    torch.testing.assert_close(looped[:7], expected, **tolerance)
    weight = F.pad(weight, (0, 1)).requires_grad_()
    grouped_linear(F.pad(rows, (0, 1)), weight, ends)[:7].sum().backward()
    assert weight.grad[0].any() and not weight.grad[1].any()


def test_losses_join_the_loss_in_training_only():
    torch.manual_seed(0)
    model, x = SmolForCausalLM(SmolConfig(**SHAPE, router_aux_loss_coef=0.3, router_z_loss_coef=0.2)), None
    x = torch.randint(0, 61, (2, 6))
    plain, trained = model.eval()(x, labels=x), model.train()(x, labels=x)
    torch.testing.assert_close(trained.loss, plain.loss + 0.3 * trained.aux_loss + 0.2 * trained.z_loss)
    torch.testing.assert_close(trained.aux_loss, trained.router_stats.aux_loss.mean())
    half = model(x, labels=x, num_items_in_batch=20)  # this call has 10 of the step's 20 trained tokens
    torch.testing.assert_close(half.loss, trained.loss / 2)


def test_statistics_come_back_per_layer():
    torch.manual_seed(0)
    output = SmolForCausalLM(SmolConfig(**SHAPE)).eval()(torch.randint(0, 61, (2, 6)))
    assert output.router_stats.load.shape == (2, 4)
    torch.testing.assert_close(output.router_stats.load.sum(-1), torch.ones(2))
    assert output.router_stats.entropy.shape == output.router_stats.dropped.shape == (2,)
    assert [logits.shape for logits in output.router_logits] == [(12, 4)] * 2
    assert output.router_logits[0].dtype == torch.float32


def test_router_stays_in_float32_under_autocast_and_in_bf16():
    moe, x = layer(), torch.randn(1, 4, 32)
    expected = moe(x, None)[2]
    with torch.autocast("cpu", torch.bfloat16):
        _, logits, stats = moe(x, None)
    torch.testing.assert_close(logits, F.linear(x[0], moe.gate.weight))
    for name in stats._fields:  # losses and their gradients with them
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name), msg=name)
    assert layer().bfloat16()(x.bfloat16(), None)[1].dtype == torch.float32


@pytest.mark.parametrize("coefficient, recovers", [(0.1, True), (0.0, False)])
def test_a_collapsed_router_recovers_with_the_auxiliary_loss_and_not_without(coefficient, recovers):
    torch.manual_seed(0)
    config = SmolConfig(**SHAPE | TOP1, router_aux_loss_coef=coefficient, router_z_loss_coef=0.0)
    model = SmolForCausalLM(config).train()
    with torch.no_grad():
        for block in model.model.layers:
            block.post_attention_layernorm.weight.fill_(1.0)
            block.mlp.gate.weight.mul_(0.1)
            # a common direction that all inputs share draws every token to expert 0
            block.mlp.gate.weight[0] += 0.1
        model.model.embed_tokens.weight += 0.2
    x = torch.randint(0, 61, (4, 16))
    start = model(x).router_stats.load.max(-1).values
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    end = model(x).router_stats.load.max(-1).values
    assert start.max() > 0.9
    assert (end.max() < 0.6) == recovers
