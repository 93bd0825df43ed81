"""The model: configuration, counting, the pieces written by hand, loss, packing, cache, training switches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import smol_kernels
import smol_model
from smol_config import PRESETS, SmolConfig, count_parameters, flops_per_token, preset_config
from smol_kernels import LinearCrossEntropy, RMSNorm, Rotate, SmolLinear, loss_of_all_tokens, row_block
from smol_model import LMHead, SmolForCausalLM

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def build(seed: int = 0, **overrides) -> SmolForCausalLM:
    torch.manual_seed(seed)
    return SmolForCausalLM(SmolConfig(**SMALL | overrides))


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: SmolForCausalLM) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(one: dict, other: dict, atol: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# Configuration and counting


def test_presets_have_the_parameters_they_say():
    assert count_parameters(preset_config("smollm2-135m")) == (134_515_008, 134_515_008)
    assert count_parameters(preset_config("smollm2-360m"))[0] == 361_821_120
    assert count_parameters(preset_config("smollm2-1.7b"))[0] == 1_711_376_384
    assert 6.5e9 < count_parameters(preset_config("base"))[0] < 7.5e9
    total, active = count_parameters(preset_config("moe-30b-a7b"))
    assert 29.5e9 < total < 30.5e9 and 6.9e9 < active < 7.1e9


@pytest.mark.parametrize("name", PRESETS)
def test_counted_parameters_are_those_of_the_module(name):
    config = preset_config(name)
    with torch.device("meta"):
        model = SmolForCausalLM(config)
    total, active = count_parameters(config)
    assert sum(p.numel() for p in model.parameters()) == total  # parameters() lists a tied head once
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    idle = experts - experts * (config.num_experts_per_tok or 0) // (config.num_experts or 1)
    assert total - idle == active


@pytest.mark.parametrize("options", [{}, {"attention_bias": True}, {"qk_norm": True, "tie_word_embeddings": False}])
def test_flops_are_those_a_counter_sees(options):
    model, T = build(**options, attn_implementation="eager"), 32
    with FlopCounterMode(display=False) as counter:
        model.train()
        logits = F.linear(model.model(tokens(1, T)).last_hidden_state, model.lm_head.weight)
        logits.sum().backward()
    # An eager row computes all T x T scores; ours counts the causal (T + 1) / 2 of them per token.
    query = SMALL["num_attention_heads"] * model.config.head_dim
    seen = counter.get_total_flops() - 6 * SMALL["num_hidden_layers"] * query * T * (T - 1)
    assert flops_per_token(model.config, T) * T == seen


def test_flops_of_a_mixture_by_hand():
    """A token of a tiny MoE at length 1, worked out on paper: 2 forward and 4 backward per weight it meets."""
    shape = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = SmolConfig(**SMALL | MOE | shape | {"head_dim": 12, "vocab_size": 100, "num_experts": 8})
    attention = 48 * 48 + 2 * 48 * 24 + 48 * 48  # query, key and value, output
    experts = 48 * 8 + 2 * 3 * 48 * 32  # the router, and gate, up and down of two experts of eight
    scores = 2 * 48  # each head's query with one key, and one weight with its value
    assert flops_per_token(config, 1) == 6 * (3 * (attention + experts + scores) + 48 * 100) == 327_744


def test_a_configuration_shares_nothing_with_its_preset():
    preset_config("smollm2-135m").rope_parameters["rope_theta"] = 7.0
    assert preset_config("smollm2-135m").rope_parameters["rope_theta"] == PRESETS["smollm2-135m"]["rope_parameters"][
        "rope_theta"
    ] == 1e5  # fmt: skip


def test_unknown_preset_names_the_presets():
    with pytest.raises(ValueError, match="tiny-moe.*smollm2-135m"):
        preset_config("huge")


@pytest.mark.parametrize(
    "options, named",
    [
        ({"qk_norm": True, "attention_bias": True}, "qk_norm"),
        ({**MOE, "attention_bias": True}, "attention_bias"),
        ({**MOE, "norm_topk_prob": False}, "norm_topk_prob"),
        ({**MOE, "num_experts_per_tok": 1, "norm_topk_prob": True, "qk_norm": True}, "num_experts_per_tok"),
        ({**MOE, "num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({**MOE, "num_experts_per_tok": 0}, "num_experts_per_tok 0 must be at least 1"),
        ({**MOE, "moe_intermediate_size": 0}, "moe_intermediate_size 0 must be at least 1"),
        ({**MOE, "num_experts": -4}, "num_experts -4 must be at least 1"),
        ({**MOE, "capacity_factor": 0.0}, "capacity_factor"),
        ({**MOE, "capacity_factor": float("inf")}, "capacity_factor inf"),
        ({**MOE, "capacity_factor": float("nan")}, "capacity_factor nan"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 must be at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0 must be at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0 must be at least 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers -1 must be at least 1"),
        ({"initializer_range": -0.1}, "initializer_range"),
        ({"eos_token_id": "a"}, "eos_token_id"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn.*factor"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size 48 is not a multiple"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 1.5}, "attention_dropout"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
    ],
)
def test_impossible_configurations_are_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        SmolConfig(**SMALL | options)


@pytest.mark.parametrize(
    "options, native",
    [
        ({}, "llama"),
        ({"attention_bias": True}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        (MOE, "mixtral"),
        ({**MOE, "qk_norm": True}, "qwen3_moe"),
        ({**MOE, "num_experts_per_tok": 1, "qk_norm": True}, "qwen3_moe"),
    ],
)
def test_options_choose_the_native_architecture(options, native):
    config = SmolConfig(**SMALL | options)
    assert config.model_type == native
    assert SmolConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


# Pieces written by hand, against the plain expression and numerical gradients


def test_products_are_cut_where_oneDNN_leaves_a_core_idle(monkeypatch):
    narrow = torch.empty(0, dtype=torch.bfloat16)
    monkeypatch.setattr(smol_kernels, "on_two_amx_cores", lambda: False)
    assert row_block(narrow, 1024, 1536, 576) == 1024
    monkeypatch.setattr(smol_kernels, "on_two_amx_cores", lambda: True)
    assert row_block(narrow, 1024, 1536, 576) == 512
    assert row_block(narrow, 1024, 576, 1536) == 1024  # both cores work on more columns than rows
    assert row_block(narrow, 64, 1536, 576) == 64
    assert row_block(narrow, 1024, 49152, 576) == 256 and row_block(narrow, 96, 49152, 576) == 96
    assert row_block(torch.empty(0), 1024, 1536, 576) == 1024  # float32
    assert row_block(narrow.to("meta"), 1024, 1536, 576) == 1024  # no CPU


@pytest.mark.parametrize("compiling", [False, True])
def test_a_linear_layer_by_rows_is_the_linear_layer(monkeypatch, compiling):
    """13 rows in blocks of 5: the last one is shorter."""
    blocks = []
    monkeypatch.setattr(smol_kernels, "row_block", lambda like, M, K, N: blocks.append((M, K, N)) or 5)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    layer = SmolLinear(24, 16, bias=False, dtype=torch.bfloat16)
    x = torch.randn(13, 1, 24).bfloat16().requires_grad_()
    outer = torch.randn(13, 1, 16).bfloat16()
    ours = torch.autograd.grad(layer(x), (x, layer.weight), outer)
    assert {(13, 24, 16), (13, 16, 24)} == set(blocks)
    theirs = torch.autograd.grad(F.linear(x, layer.weight), (x, layer.weight), outer)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight))
    torch.testing.assert_close(ours, theirs)


def test_a_model_whose_products_are_cut_has_the_same_loss_and_gradients(monkeypatch):
    torch.manual_seed(0)
    model, ids = SmolForCausalLM(SmolConfig(**SMALL)).bfloat16().train(), torch.randint(0, SMALL["vocab_size"], (2, 32))
    found = []
    for block in (64, 32, 20):
        monkeypatch.setattr(smol_kernels, "row_block", lambda like, M, K, N, block=block: min(block, M))
        loss = model(input_ids=ids, labels=ids).loss
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for cut in found[1:]:
        torch.testing.assert_close(cut, found[0], atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("options", [{}, {"attention_bias": True}, {"qk_norm": True}, MOE])
def test_products_side_by_side_give_the_same_gradients(options, monkeypatch):
    """What a GPU's compiler gets, here without one: one product for query, key and value, one for gate and up."""
    model, x = build(**options).train(), tokens(2, 10)
    loss = model(x, labels=x).loss
    loss.backward()
    expected, calls, kept = gradients(model), [], SmolLinear.forward
    monkeypatch.setattr(smol_model, "computes_side_by_side", lambda x: True)
    monkeypatch.setattr(SmolLinear, "forward", lambda self, x: calls.append(self) or kept(self, x))
    for called in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        joined = called(x, labels=x).loss
        joined.backward()
        torch.testing.assert_close(joined, loss)
        assert_same_gradients(gradients(model), expected)
    alone = [name for name, module in model.named_modules() if any(module is each for each in calls)]
    assert {name.rpartition(".")[2] for name in alone} <= {"o_proj", "down_proj"}


def test_a_layer_that_something_took_the_place_of_is_called(monkeypatch):
    class Adapted(SmolLinear):
        def forward(self, x):
            return super().forward(x) + 1

    model = build()
    before = model(tokens(1, 8)).logits
    model.model.layers[0].mlp.up_proj.__class__ = Adapted
    expected = model(tokens(1, 8)).logits
    monkeypatch.setattr(smol_model, "computes_side_by_side", lambda x: True)
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(model(tokens(1, 8)).logits, expected)


def test_what_a_library_will_quantise_is_torchs_own_linear():
    """bitsandbytes looks for exactly that class: others stay in 16 bits, with a warning about something else."""
    config = SmolConfig(**SMALL)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    layers = [m for name, m in SmolForCausalLM(config).named_modules() if name.endswith("_proj")]
    assert len(layers) == 7 * 2 and all(type(layer) is torch.nn.Linear for layer in layers)


def test_rms_norm_against_the_plain_expression():
    x = torch.randn(3, 5, 16, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(16, requires_grad=True)
    plain = weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    ours = RMSNorm.apply(x, weight, 1e-5)
    torch.testing.assert_close(ours, plain)
    outer = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, (x, weight), outer)
    torch.testing.assert_close(torch.autograd.grad(ours, (x, weight), outer), expected, atol=1e-5, rtol=1e-5)


def test_rms_norm_in_bf16_is_the_float32_one_rounded_once():
    x, weight = torch.randn(64, 32).bfloat16() * 100, torch.randn(32).bfloat16()
    exact = F.rms_norm(x.float(), (32,), weight.float(), 1e-5)
    assert torch.equal(RMSNorm.apply(x, weight, 1e-5), exact.bfloat16())


def test_rotation_is_complex_multiplication():
    x = torch.randn(2, 4, 3, 8, dtype=torch.float64, requires_grad=True)  # (B, T, H, Dh)
    angles = torch.randn(2, 4, 1, 4, dtype=torch.float64)
    turned = torch.complex(*x.detach().chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned.real, turned.imag), -1).transpose(1, 2)
    cos, sin = angles.cos().repeat(1, 1, 1, 2), torch.cat((-angles.sin(), angles.sin()), -1)
    torch.testing.assert_close(Rotate.apply(x, cos, sin), expected)
    assert torch.autograd.gradcheck(lambda x: Rotate.apply(x, cos, sin), x)


def test_rotary_positions_survive_a_dtype_change():
    model = build().bfloat16()
    cos, _ = model.model.rotary(torch.tensor([[1000]]), torch.float32)
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(cos.flatten(), (1000 * frequencies).cos().repeat(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("trained", [1, 32, 47, 70], ids="{} trained".format)
@pytest.mark.parametrize("elements", [1, 33, 440, 10**6], ids="{} logits at once".format)
def test_loss_equals_cross_entropy_of_the_logits(elements, trained, monkeypatch):
    """In one block and in several, in chunks of one row and of many, with rows added up to a multiple of 32 or not."""
    monkeypatch.setitem(smol_kernels.LOSS_ELEMENTS, "cpu", elements)
    monkeypatch.setattr(smol_kernels, "LOSS_BLOCK_ELEMENTS", 1)
    hidden, weight = torch.randn(70, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    labels = torch.randint(11, (70,)).index_fill(0, torch.randperm(70)[trained:], -100)
    naive = F.cross_entropy(hidden @ weight.T, labels, reduction="sum") * 0.25
    ours = LinearCrossEntropy.apply(hidden, weight, labels, True) * 0.25
    torch.testing.assert_close(ours, naive)
    expected = torch.autograd.grad(naive, (hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(ours, (hidden, weight)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "device, dtype, tokens",
    [("cpu", torch.bfloat16, (1152, 42)), ("cpu", torch.float32, (704, 42)), ("meta", torch.bfloat16, (2752, 2730))],
)
def test_logits_held_at_once(device, dtype, tokens):
    """By hand, for SmolLM2-135M: as large as a float32 gradient, 576 x 4 / 2 tokens in bf16, or 2^25 / 49,152 = 682,
    in multiples of 32; in float32 2^21 / 49,152 on a CPU, 2^27 / 49,152 elsewhere."""
    assert smol_kernels.loss_blocks(torch.empty(49152, 576, dtype=dtype, device=device)) == tokens


def test_gradients_of_the_loss_are_scaled_in_float32():
    """1 / tokens is no power of two: rounded to bf16 first it makes every gradient too large (or small) by one factor,
    here 66 instead of 65.75."""
    hidden, weight = torch.randn(70, 64).bfloat16(), torch.randn(300, 64).bfloat16()
    labels = torch.randint(300, (70,))
    found = []
    for scale in (1.0, 65.75):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        found.append(torch.autograd.grad(LinearCrossEntropy.apply(*leaves, labels, True) * scale, leaves))
    for plain, scaled in zip(*found, strict=True):
        factor = (scaled.float() * plain.float()).sum() / plain.float().square().sum()
        torch.testing.assert_close(factor, torch.tensor(65.75), rtol=1e-3, atol=0)


@pytest.mark.parametrize("rows", [1, 128, 300], ids="{} rows".format)
def test_the_loss_for_compilers_equals_cross_entropy(rows, monkeypatch):
    """Called by itself: in one block of at least 128 rows and in several, with each gradient asked for or not."""
    monkeypatch.setitem(smol_kernels.LOSS_ELEMENTS, "else", 1)
    hidden, weight = torch.randn(rows, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    labels = torch.randint(11, (rows,)).index_fill(0, torch.arange(rows // 3), -100)
    naive = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    expected = torch.autograd.grad(naive, (hidden, weight))
    with torch.no_grad():
        for wanted in ((True, True), (True, False), (False, True), (False, False)):
            loss, *found = loss_of_all_tokens(hidden, weight, labels, *wanted)
            torch.testing.assert_close(loss, naive)
            for asked, gradient, reference in zip(wanted, found, expected, strict=True):
                assert (gradient is not None) == asked
                if asked:
                    torch.testing.assert_close(gradient, reference, atol=1e-5, rtol=1e-5)


def test_loss_of_no_trained_token_is_zero_with_zero_gradients():
    model = build().train()
    loss = model(tokens(1, 5), labels=torch.full((1, 5), -100)).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_loss_in_bf16_and_under_autocast_is_close_to_float32():
    exact = build().train()
    half, x = copy.deepcopy(exact).bfloat16(), tokens(4, 32)
    loss = exact(x, labels=x).loss
    loss.backward()
    loss_half = half(x, labels=x).loss
    loss_half.backward()
    assert loss_half.dtype == torch.float32
    assert abs(loss - loss_half) < 0.01 * loss
    mixed = copy.deepcopy(exact)
    mixed.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss_mixed = mixed(x, labels=x).loss
    loss_mixed.backward()
    assert abs(loss - loss_mixed) < 0.01 * loss
    for name, expected in gradients(exact).items():
        for other in (half, mixed):
            found = other.get_parameter(name).grad.float()
            assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99, name


# Forward pass


def test_training_with_labels_never_makes_logits():
    model, x = build(), tokens(2, 7)
    assert model.train()(x, labels=x).logits is None
    assert model.eval()(x, labels=x).logits.shape == (2, 7, 97)
    assert model(x, logits_to_keep=2).logits.shape == (2, 2, 97)
    torch.testing.assert_close(model(x, labels=x, logits_to_keep=1).loss, model(x, labels=x).loss)


@pytest.mark.parametrize("items", [0, torch.tensor(0), None])
def test_a_step_without_a_trained_token_has_no_loss_and_no_gradient(items):
    """A row of one token, or whose labels are all ignored, may be alone in a step."""
    model, x = build(**MOE).train(), tokens(1, 3)
    loss = model(x, labels=torch.full_like(x, -100), num_items_in_batch=items).loss
    loss.backward()
    assert loss == 0 and not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False}, MOE])
def test_loss_does_not_depend_on_how_a_batch_is_split(options):
    """Sum over the step's tokens / their number: micro-batches and padding change nothing but rounding."""
    # Router losses are means over a micro-batch by nature, so they stay out of this comparison.
    model = build(**options, router_aux_loss_coef=0.0, router_z_loss_coef=0.0).train()
    x = tokens(4, 9)
    labels = x.masked_fill(tokens(4, 9, seed=2) < 40, -100)
    whole = model(x, labels=labels)
    whole.loss.backward()
    expected, items, total = gradients(model), (labels[:, 1:] != -100).sum(), 0.0
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        part = model(F.pad(x[rows], (0, 3)), labels=F.pad(labels[rows], (0, 3), value=-100), num_items_in_batch=items)
        part.loss.backward()
        total += part.loss.item()
    assert total == pytest.approx(whole.loss.item(), abs=1e-5)
    assert_same_gradients(gradients(model), expected)


def test_already_shifted_labels():
    model, x = build().eval(), tokens(2, 6)
    shifted = F.pad(x[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(x, shift_labels=shifted).loss, model(x, labels=x).loss)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, MOE])
def test_cached_decoding_equals_the_whole_row(options, attention):
    model, x = build(**options, attn_implementation=attention).eval(), tokens(2, 12)
    with torch.no_grad():
        whole = model(x).logits
        output = model(x[:, :5])
        pieces = [output.logits]
        for start, end in ((5, 6), (6, 9), (9, 12)):
            output = model(x[:, start:end], past_key_values=output.past_key_values)
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [{}, MOE])
def test_packed_documents_are_as_alone(options, attention, dtype):
    """Logits and gradients of a packed row are those of its documents, in training too."""
    model = build(**options, attn_implementation=attention, router_aux_loss_coef=0.0, router_z_loss_coef=0.0).to(dtype)
    lengths, x = (4, 7, 5), tokens(1, 16)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = x.split(lengths, dim=1)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    with torch.no_grad():
        packed = model.eval()(x, position_ids=positions).logits
        alone = torch.cat([model(document).logits for document in documents], 1)
    torch.testing.assert_close(packed, alone, atol=tolerance, rtol=tolerance)
    model.train()
    labels = x.masked_fill(positions == 0, -100)  # the first token of a document is not predicted from the last one
    model(x, position_ids=positions, labels=labels).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    for document in documents:
        model(document, labels=document, num_items_in_batch=16 - 3).loss.backward()
    assert_same_gradients(gradients(model), expected, atol=tolerance)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_on_either_side_changes_nothing(attention):
    model, x = build(attn_implementation=attention).eval(), tokens(1, 6)
    expected = model(x).logits
    for pad in ((3, 0), (0, 3)):
        mask = F.pad(torch.ones(1, 6, dtype=torch.long), pad)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = model(F.pad(x, pad), attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(padded[mask.bool()][None], expected, atol=1e-5, rtol=1e-4)


def test_embeddings_instead_of_ids():
    model, x = build().eval(), tokens(2, 5)
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(x)).logits, model(x).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_hidden_states_end_with_the_normed_one():
    output = build().eval()(tokens(1, 4), output_hidden_states=True)
    assert len(output.hidden_states) == 3


# Training switches


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {**MOE, "capacity_factor": 1.0}])
def test_gradient_checkpointing_gives_the_same_gradients(options, reentrant):
    model, x = build(**options).train(), tokens(2, 10)
    model(x, labels=x).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(x, labels=x).loss.backward()
    assert_same_gradients(gradients(model), expected)


def test_compiling_under_autocast():
    """--bf16 true --torch_compile true: fp32 weights, and rows short enough for block attention."""
    model, x = build(attn_implementation="sdpa").train(), tokens(2, 10)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x, labels=x).loss
        loss = torch.compile(model)(x, labels=x).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=0.02, rtol=0)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("options", [{}, {**MOE, "capacity_factor": 1.0}])
def test_compiling_gives_the_same_gradients(options):
    model, x = build(**options).train(), tokens(2, 10)
    loss = model(x, labels=x).loss
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")(x, labels=x).loss
    compiled.backward()
    torch.testing.assert_close(compiled, loss)
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["attention_dropout", "residual_dropout"])
def test_dropout_is_honoured_in_training_only(name, attention):
    model, x = build(**{name: 0.5}, attn_implementation=attention), tokens(2, 8)
    plain = build(attn_implementation=attention).eval()
    model.eval()
    torch.testing.assert_close(model(x).logits, plain(x).logits)
    model.train()
    assert not torch.equal(model(x).logits, model(x).logits)


@pytest.mark.parametrize("options", [{}, MOE])
def test_initialisation(options):
    model = build(**options, depth_scaled_init=True, initializer_range=0.1, hidden_size=96, attention_bias=not options)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter))
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            scaled = "o_proj" in name or "down_proj" in name
            expected = 0.1 / 2 if scaled else 0.1  # sqrt(2 L) = 2
            assert parameter.std().item() == pytest.approx(expected, rel=0.2), name
    assert isinstance(model.lm_head, LMHead)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_mimetic_initialisation_copies_what_a_head_attends_to(tmp_path):
    model = build(mimetic_init=True, num_attention_heads=4, num_key_value_heads=2)
    attention = model.model.layers[1].self_attn
    width = attention.head_dim
    for head in range(4):
        columns = attention.o_proj.weight[:, head * width : (head + 1) * width]
        rows = attention.v_proj.weight[head // 2 * width : (head // 2 + 1) * width]
        assert torch.equal(columns, rows.T)
    with torch.no_grad():
        attention.o_proj.weight.zero_()
    model.save_pretrained(tmp_path)
    loaded = SmolForCausalLM.from_pretrained(tmp_path)
    assert not loaded.model.layers[1].self_attn.o_proj.weight.any(), "loading must not initialise again"


def test_a_resized_vocabulary_still_trains():
    model = build(tie_word_embeddings=False).train()
    model.resize_token_embeddings(120)
    x = torch.full((1, 4), 110)
    loss = model(x, labels=x).loss
    loss.backward()
    model.eval()
    torch.testing.assert_close(loss, F.cross_entropy(model(x).logits[0, :-1], x[0, 1:]))


def test_it_learns():
    """A few steps on one batch bring the loss near zero, in float32 and with bf16 weights."""
    for dtype in (torch.float32, torch.bfloat16):
        model, x = build().to(dtype).train(), tokens(4, 16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(60):
            loss = model(x, labels=x).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss < 0.2
