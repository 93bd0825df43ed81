"""What only a GPU can show: kernels in 16 bits, packed rows by flash attention, the compiled step, decoding.

References are the same model on the CPU in float32, a naive loop, and transformers. bf16 is held to a relative error of
a few times its precision (2^-8), since sums are taken in another order.
"""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import smol_kernels
import smol_model
from smol_config import SmolConfig
from smol_kernels import loss_of_all_tokens, loss_of_trained_tokens
from smol_model import SmolForCausalLM
from smolkit import optimizer
from smolkit.adapters import build_base
from smolkit.batch import generate_batch
from smolkit.optimizer import MasterAdamW
from smolkit.packing import PackedCollator

pytestmark = pytest.mark.gpu

DENSE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
MOE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
MOE |= {"num_experts": 8, "moe_intermediate_size": 256}
SHAPES = {"dense": DENSE, "moe": MOE, "moe-capacity": MOE | {"capacity_factor": 1.0}}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def build(shape: str, **more: object) -> SmolForCausalLM:
    """A random model in float32 on the CPU, in training mode."""
    torch.manual_seed(0)
    settings = {"vocab_size": 512, "num_hidden_layers": 2, "initializer_range": 0.04} | SHAPES[shape] | more
    config = SmolConfig(**settings)
    config._attn_implementation = "sdpa"
    return SmolForCausalLM(config).train()


def distance(one: Tensor, two: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    one, two = one.detach().double().cpu(), two.detach().double().cpu()
    return ((one - two).norm() / two.norm().clamp(min=1e-30)).item()


def loss_and_gradients(
    model: SmolForCausalLM, called: object = None, **batch: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    batch = {name: value.to(model.device) for name, value in batch.items()}
    loss = (model if called is None else called)(**batch, use_cache=False).loss
    loss.backward()
    return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def batch(rows: int = 3, length: int = 128) -> dict[str, Tensor]:
    ids = torch.randint(512, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, : length // 2] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_loss_and_gradients_are_those_of_the_cpu(shape: str, dtype: torch.dtype) -> None:
    """In bf16 the rounded weights are the reference's, so that only arithmetic differs. Routing is discrete and a token
    may take another expert in bf16: there the gradients of the dense model alone are compared."""
    reference = build(shape).to(dtype).float()
    expected, gradients = loss_and_gradients(reference, **batch())
    loss, found = loss_and_gradients(copy.deepcopy(reference).to(dtype).cuda(), **batch())
    assert distance(loss, expected) < TOLERANCE[dtype]
    if shape == "dense" or dtype == torch.float32:
        worst = {name: distance(found[name], gradients[name]) for name in gradients}
        assert max(worst.values()) < 2 * TOLERANCE[dtype], worst


def test_the_compiled_step_is_the_eager_one() -> None:
    torch._dynamo.reset()
    model = build("dense").cuda()
    expected, gradients = loss_and_gradients(model, **batch())
    compiled = torch.compile(model, fullgraph=True)
    loss, found = loss_and_gradients(model, compiled, **batch())
    with torch._dynamo.config.patch(error_on_recompile=True):  # one graph serves every step
        loss_and_gradients(model, compiled, **batch())
    assert distance(loss, expected) < 1e-5, (loss.item(), expected.item())
    worst = {name: distance(found[name], gradients[name]) for name in gradients}
    assert max(worst.values()) < 1e-3, worst


@pytest.mark.parametrize("shape", ["moe", "moe-capacity"])
def test_the_compiled_experts_train_like_the_eager_ones(shape: str) -> None:
    """In bf16, the dtype of the grouped product. Fewer roundings in the compiled router let some tokens choose another
    expert, so the loss is held to bf16's precision and the gradient as a whole to a few times that."""
    torch._dynamo.reset()
    model = build(shape).to(torch.bfloat16).cuda()
    expected, gradients = loss_and_gradients(model, **batch())
    loss, found = loss_and_gradients(model, torch.compile(model, fullgraph=True), **batch())
    assert distance(loss, expected) < 2**-8, (loss.item(), expected.item())
    together, apart = (torch.cat([g.flatten() for g in grads.values()]) for grads in (gradients, found))
    assert distance(apart, together) < 0.1


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_packed_documents_do_not_meet(dtype: torch.dtype, compiled: bool) -> None:
    """Two rows of documents of several lengths; each gets the hidden states it has alone."""
    torch._dynamo.reset()
    model = build("dense").to(dtype).cuda()
    lengths = [[50, 30, 48], [128]]
    ids = batch(2)["input_ids"].cuda()
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]).cuda()
    backbone = torch.compile(model.model) if compiled else model.model
    hidden = backbone(input_ids=ids, position_ids=positions).last_hidden_state
    for row, parts in enumerate(lengths):
        for document, states in zip(ids[row].split(parts), hidden[row].split(parts), strict=True):
            alone = model.model(input_ids=document[None]).last_hidden_state[0]
            assert distance(states, alone) < TOLERANCE[dtype]


def test_packed_rows_take_the_flash_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kept = smol_model.varlen_attention
    monkeypatch.setattr(smol_model, "varlen_attention", lambda *args, **kw: calls.append(kw) or kept(*args, **kw))
    model = build("dense").to(torch.bfloat16).cuda()
    ids, positions = batch(2)["input_ids"].cuda(), torch.arange(64).repeat(2, 2).cuda()
    loss = model(input_ids=ids, position_ids=positions, labels=ids).loss
    loss.backward()
    assert len(calls) == 2 and calls[0]["max_length_q"] == 64
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_bounds_from_the_collator_are_those_found_on_the_device() -> None:
    """And whole rows, of which they are told as well, take the kernel of whole rows."""
    model = build("dense").to(torch.bfloat16).cuda()
    collate = PackedCollator(0)
    for lengths in ([[50, 30, 48], [128]], [[128], [128]]):
        ids = batch(2)["input_ids"].tolist()
        positions = [[i for n in row for i in range(n)] for row in lengths]
        rows = [{"input_ids": a, "labels": a, "position_ids": p} for a, p in zip(ids, positions, strict=True)]
        told = collate(rows)
        told.pop("tokens")
        found = {name: value.cuda() for name, value in told.items() if name in ("input_ids", "labels", "position_ids")}
        told = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in told.items()}
        one, two = (model(**kwargs, use_cache=False).loss for kwargs in (told, found))
        assert torch.equal(one, two)


@pytest.mark.parametrize("function", [loss_of_trained_tokens, loss_of_all_tokens])
def test_the_loss_is_cross_entropy(function: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(smol_kernels.LOSS_ELEMENTS, "else", 2**16)  # several blocks
    torch.manual_seed(2)
    hidden, weight = torch.randn(300, 64, device="cuda"), torch.randn(512, 64, device="cuda") * 0.3
    labels = torch.randint(512, (300,), device="cuda")
    labels[::3] = -100
    exact_hidden, exact_weight = (x.double().requires_grad_() for x in (hidden, weight))
    expected = F.cross_entropy(exact_hidden @ exact_weight.t(), labels, reduction="sum")
    expected.backward()
    loss, grad_hidden, grad_weight = function(hidden, weight, labels, True, True)
    assert distance(loss, expected) < 1e-5
    assert distance(grad_hidden, exact_hidden.grad) < 1e-4
    assert distance(grad_weight, exact_weight.grad) < 1e-4


@pytest.mark.parametrize("capacity_factor", [None, 0.5], ids=["dropless", "half"])
def test_experts_are_a_naive_loop(capacity_factor: float | None) -> None:
    torch.manual_seed(3)
    mlp = build("moe", capacity_factor=capacity_factor).model.layers[0].mlp.to(torch.bfloat16).cuda()
    x = torch.randn(2, 64, 256, device="cuda", dtype=torch.bfloat16)
    output, logits, stats = mlp(x, None)
    tokens = x.view(-1, 256).double()
    weights, chosen = logits.double().softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    limit = len(tokens) if capacity_factor is None else 16  # ceil(0.5 * 2 * 128 / 8)
    taken, expected = [0] * 8, torch.zeros_like(tokens)
    for choice in range(2):  # first choices come before second ones
        for token in range(len(tokens)):
            expert = int(chosen[token, choice])
            taken[expert] += 1
            if taken[expert] <= limit:
                gate, up = (mlp.experts.gate_up_proj[expert].double() @ tokens[token]).chunk(2)
                mixed = mlp.experts.down_proj[expert].double() @ (F.silu(gate) * up)
                expected[token] += weights[token, choice] * mixed
    assert distance(output.view(-1, 256), expected) < 2e-2
    dropped = sum(max(0, n - limit) for n in taken) / 256
    assert stats.dropped.item() == pytest.approx(dropped, abs=1e-6)


def test_masters_learn_what_fp32_learns() -> None:
    """Twenty steps of bf16 weights with fp32 masters against torch's AdamW on the same model in fp32."""
    reference = build("dense").cuda()
    model = copy.deepcopy(reference).to(torch.bfloat16)
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    masters = MasterAdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        expected, _ = loss_and_gradients(reference, **batch())
        loss, _ = loss_and_gradients(model, **batch())
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        masters.clip_grad_norm(1.0)
        plain.step()
        masters.step()
        losses.append((loss.item(), expected.item()))
    assert losses[-1][1] < 0.5 * losses[0][1]
    assert losses[-1][0] == pytest.approx(losses[-1][1], rel=0.05)


def test_the_compiled_update_is_the_fused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large weights in a kernel of their own, small ones and fp32 ones by the library's, clipped, at two rates."""
    monkeypatch.setitem(optimizer.LARGE, "else", 10_000)
    states = []
    for compiled in (False, True):
        torch.manual_seed(4)
        shapes, dtypes = [(300, 700), (64,), (200, 100)], [torch.bfloat16, torch.bfloat16, torch.float32]
        weights = [
            torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype))
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        masters = MasterAdamW(weights, lr=1e-2, weight_decay=0.1, compiled=compiled)
        for rate in (1e-2, 1e-2, 3e-3):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            masters.param_groups[0]["lr"] = rate
            norm = masters.clip_grad_norm(1.0)
            exact = torch.stack([weight.grad.double().square().sum() for weight in weights]).sum().sqrt()
            assert norm.item() == pytest.approx(exact.item(), rel=1e-5)
            masters.step()
        assert all(torch.equal(weight, master.to(weight.dtype)) for weight, master in masters.master_of().items())
        states.append(masters.master_of().values())
    for one, two in zip(*states, strict=True):
        assert distance(one, two) < 1e-5


def test_a_bad_update_is_left_out_without_waiting() -> None:
    """Both ways of updating: a gradient that is not finite changes nothing, and the next one is the next step."""
    for compiled in (False, True):
        torch.manual_seed(5)
        weights = [torch.nn.Parameter(torch.randn(n, device="cuda", dtype=torch.bfloat16)) for n in (2**20, 64)]
        masters = MasterAdamW(weights, lr=1e-2, weight_decay=0.1, compiled=compiled)
        kept = copy.deepcopy(masters.state_dict()["state"])
        for bad in (True, False):
            for weight in weights:
                weight.grad = torch.full_like(weight, torch.nan if bad else 1.0)
            norm = masters.clip_grad_norm(1.0)
            masters.skip_if(~norm.isfinite())
            masters.step()
            state = masters.state_dict()["state"]
            same = [torch.equal(value, kept[i][name]) for i, parts in state.items() for name, value in parts.items()]
            assert all(same) if bad else not any(same)
        assert all(parts["step"].item() == 1 for parts in state.values())


def test_qlora_keeps_the_base_in_four_bits(tmp_path: Path) -> None:
    """Every linear layer but the head; losses near those of the model it was made of, and gradients for the adapter."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = build("dense").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    stage = SimpleNamespace(qlora=True)
    config = SmolConfig.from_pretrained(tmp_path)
    four = build_base(stage, config, str(tmp_path), torch.bfloat16, "sdpa", 0)
    layers = [module for module in four.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 7 and all(layer.weight.dtype == torch.uint8 for layer in layers)
    rows = {name: value.cuda() for name, value in batch().items()}
    expected = model.cuda()(**rows, use_cache=False).loss
    adapted = get_peft_model(four, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    loss = adapted(**rows, use_cache=False).loss
    loss.backward()
    assert distance(loss, expected) < 0.02, (loss.item(), expected.item())
    trained = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert trained and all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_the_engine_decodes_what_transformers_generates(shape: str, tmp_path: object) -> None:
    model = build(shape).eval()
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).cuda().eval()
    prompts = [[5, 9, 100], [7] * 20, list(range(40))]
    answers = generate_batch(model.cuda(), prompts, max_new_tokens=24, stop_ids=[])
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt], device="cuda")
        rules = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **rules)
        assert answer == expected[0, len(prompt) :].tolist()
