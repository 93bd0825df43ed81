"""Attention: the hand-written kernels against the textbook formula, documents in packed rows, flash arguments."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import smol_kernels
import smol_model
from smol_config import SmolConfig
from smol_kernels import block_attention
from smol_model import SmolForCausalLM, eager_attention

SMALL = {
    "vocab_size": 89,
    "hidden_size": 72,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "initializer_range": 0.1,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
BF16_LOGITS = 0.03  # largest difference of two bf16 paths, as a share of the largest logit


def build(**options) -> SmolForCausalLM:
    torch.manual_seed(0)
    return SmolForCausalLM(SmolConfig(**SMALL | {"attn_implementation": "sdpa"} | options)).train()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def restarting(*lengths: int) -> torch.Tensor:
    """Position ids (1, T) of documents of these lengths in one row."""
    return torch.cat([torch.arange(n) for n in lengths])[None]


def textbook(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """softmax(QK'/sqrt(Dh))V over the allowed pairs in float64: (B, H, T, Dh) and (B, K, T, Dh) -> (B, T, H, Dh)."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double(), value.double()
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return (scores.masked_fill(~allowed, -1e300).softmax(-1) @ value).transpose(1, 2)


def pairs(kind: str, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which query may see which key (2, 1, T, T), and which queries are real (2, T): two rows of some `kind`."""
    causal, real = torch.ones(T, T, dtype=torch.bool).tril().expand(2, 1, T, T), torch.ones(2, T, dtype=torch.bool)
    if kind == "packed":
        document = torch.stack([torch.arange(T) * 5 // T, torch.arange(T) * 3 // T])
        causal = causal & (document[:, :, None] == document[:, None])[:, None]
    if kind == "left padding":
        real[1, : T // 3] = False
    if kind == "right padding":
        real[1, -(T // 3) :] = False
    return causal & real[:, None, None], real


@pytest.mark.parametrize("kind", ["causal", "packed", "left padding", "right padding"])
@pytest.mark.parametrize("block, T", [(8, 5), (8, 8), (8, 9), (8, 29), (256, 300)])
@pytest.mark.parametrize("heads", [(9, 3), (4, 4), (4, 1)])
def test_block_and_eager_attention_equal_the_textbook(kind, block, T, heads, monkeypatch):
    """Output and gradients, for lengths below, at and beyond a block and no multiple of it."""
    monkeypatch.setattr(smol_kernels, "CPU_QUERY_BLOCK", block)
    torch.manual_seed(0)
    shapes = [(2, number, T, 6) for number in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    allowed, real = pairs(kind, T)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    masks = [(eager_attention, additive), (block_attention, additive)]
    masks += [(block_attention, None)] if kind == "causal" else []
    expected = textbook(*inputs, allowed)[real]
    outer = torch.randn(expected.shape)
    wanted = torch.autograd.grad(expected, inputs, outer.double())
    for attend, mask in masks:
        found = attend(None, *inputs, mask, scaling=6**-0.5)[0][real]
        torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(found, inputs, outer), wanted, atol=1e-5, rtol=1e-5)


def spy(monkeypatch) -> list[int]:
    """The lengths with which block_attention is called from now on."""
    lengths, original = [], smol_model.block_attention

    def spying(module, query, *rest, **kwargs):
        lengths.append(query.shape[2])
        return original(module, query, *rest, **kwargs)

    monkeypatch.setattr(smol_model, "block_attention", spying)
    return lengths


@pytest.mark.parametrize("T", [100, 300])
def test_a_mask_of_the_callers_that_is_not_causal(T):
    """Prefix attention: the first half sees all of itself. Blocks of 128 queries would not see what is after them."""
    model, x = build().eval(), tokens(2, T)
    allowed = torch.ones(T, T, dtype=torch.bool).tril()
    allowed[: T // 2, : T // 2] = True
    additive = torch.zeros(T, T).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        expected, causal = model(x, attention_mask=additive).logits, model(x).logits
        for mask in (additive, allowed[None, None]):
            found = model.bfloat16()(x, attention_mask=mask).logits.float()
            assert (found - expected).abs().max() < BF16_LOGITS * expected.abs().max()
    assert (causal - expected).abs().max() > 2 * BF16_LOGITS * expected.abs().max()


def rows_of(kind: str, T: int) -> dict[str, torch.Tensor]:
    """Two rows of T tokens of a kind, as the model is given them."""
    batch = {"input_ids": tokens(2, T)}
    if kind == "packed":
        batch["position_ids"] = restarting(T // 3, T // 5, T - T // 3 - T // 5).expand(2, T)
    if "padding" in kind:
        batch["attention_mask"] = pairs(kind, T)[1].long()
    return batch


def run(model: SmolForCausalLM, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the real tokens and the gradient of their loss for q_proj of the first layer."""
    model.zero_grad()
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    logits = model(**batch).logits[real].float()
    F.cross_entropy(logits, batch["input_ids"][real]).backward()
    return logits.detach(), model.model.layers[0].self_attn.q_proj.weight.grad.float()


@pytest.mark.parametrize("kind", ["causal", "packed", "left padding", "right padding"])
@pytest.mark.parametrize("block, T", [(8, 21), (256, 300)])
def test_bf16_training_takes_the_blocks_and_equals_sdpa(kind, block, T, monkeypatch):
    """Against the fused kernel in bf16 within a tolerance, and no further from float32 than that kernel."""
    monkeypatch.setattr(smol_kernels, "CPU_QUERY_BLOCK", block)
    exact, batch = build(), rows_of(kind, T)
    reference, reference_grad = run(exact, batch)
    half = copy.deepcopy(exact).bfloat16()
    lengths = spy(monkeypatch)
    ours, ours_grad = run(half, batch)
    assert lengths == [T] * SMALL["num_hidden_layers"]
    monkeypatch.setattr(smol_model, "CPU_BLOCK_LENGTH", 0)
    fused, fused_grad = run(half, batch)
    assert len(lengths) == SMALL["num_hidden_layers"], "beyond CPU_BLOCK_LENGTH the fused kernel takes over"
    assert (ours - fused).abs().max() < BF16_LOGITS * reference.abs().max()
    assert (ours - reference).norm() < 1.5 * (fused - reference).norm()
    assert F.cosine_similarity(ours_grad.flatten(), reference_grad.flatten(), dim=0) > 0.999
    assert (ours_grad - reference_grad).norm() < 1.5 * (fused_grad - reference_grad).norm()


def test_where_the_blocks_are_used(monkeypatch):
    """Half precision, a whole row of at most CPU_BLOCK_LENGTH tokens; never float32, a cached past or dropout."""
    monkeypatch.setattr(smol_model, "CPU_BLOCK_LENGTH", 16)
    exact = build(num_hidden_layers=1)
    half, lengths = copy.deepcopy(exact).bfloat16(), spy(monkeypatch)
    half(tokens(1, 16))
    half(tokens(1, 17))
    exact(tokens(1, 8))
    with torch.no_grad():
        cache = half(tokens(1, 8), use_cache=True).past_key_values
    half(tokens(1, 3), past_key_values=cache)
    assert lengths == [16, 8]
    with torch.autocast("cpu", torch.bfloat16):
        exact(tokens(1, 5))
    assert lengths == [16, 8, 5]
    build(num_hidden_layers=1, attention_dropout=0.1).bfloat16()(tokens(1, 8))
    assert lengths == [16, 8, 5]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [{}, MOE], ids=["dense", "moe"])
def test_left_padding_under_autocast(options, attention):
    """A row of padding may see nothing at all. In bf16 that must not become NaN and spread to the real tokens."""
    model = build(**options, attn_implementation=attention)
    batch = rows_of("left padding", 12)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = model(**batch, labels=labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, labels=labels).loss
    loss.backward()
    assert abs(loss - expected) < 0.02 * expected  # a bf16 router may choose another expert
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_packed_rows_by_torchs_own_varlen_kernel(monkeypatch):
    """Its arguments, on a CPU: a stand-in that computes document by document has to find them where they are."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    rows = ((3, 3), (3, 1, 2))  # lengths of the documents of two rows of 6
    lengths = [length for row in rows for length in row]

    def kernel(query, key, value, bounds, key_bounds, longest, longest_key, *, scale, window_size, enable_gqa=True):
        assert query.shape == (12, 9, 8) and key.shape == value.shape == (12, 3, 8)  # tokens, heads, channels
        assert bounds.tolist() == key_bounds.tolist() == [0, 3, 6, 9, 10, 12] and longest == longest_key == 3
        assert window_size == (-1, 0) and scale == 8**-0.5, "causal, over the root of the channels"
        documents = []
        for part in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
            one = (x.transpose(0, 1)[None] for x in part)
            documents.append(textbook(*one, torch.ones(len(part[0]), len(part[0])).bool().tril())[0])
        return torch.cat(documents).to(query.dtype)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 9, 6, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    starts = torch.cat([restarting(*row) for row in rows]) == 0
    document = starts.cumsum(-1)
    allowed = (document[:, None, :, None] == document[:, None, None, :]) & torch.ones(6, 6).bool().tril()
    bounds = smol_model.document_bounds(starts)
    found, _ = smol_kernels.varlen_attention(None, query, key, value, None, scaling=8**-0.5, **bounds)
    torch.testing.assert_close(found, textbook(query, key, value, allowed).float())


def test_attention_dropout_removes_weights_and_scales_the_others():
    """With the identity as values the output is the weights: each is 0 or 1 / (1 - p) of what it was."""
    torch.manual_seed(0)
    T, p = 64, 0.25
    query, key, value = torch.randn(2, 3, T, T), torch.randn(2, 1, T, T), torch.eye(T).expand(2, 1, T, T)
    mask = torch.zeros(1, 1, T, T).masked_fill_(~torch.ones(T, T, dtype=torch.bool).tril(), -1e9)
    weights = eager_attention(None, query, key, value, mask, scaling=T**-0.5)[0]
    dropped = eager_attention(None, query, key, value, mask, scaling=T**-0.5, dropout=p)[0]
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / (1 - p))
    share = kept.sum() / (weights != 0).sum()
    assert abs(share - (1 - p)) < 0.02  # 12,480 weights: a standard deviation is 0.004


def test_dropout_reaches_the_attention_of_bf16_training():
    model, x = build(attention_dropout=0.5).bfloat16(), tokens(1, 12)
    assert not torch.equal(model(x).logits, model(x).logits)
    model.eval()
    assert torch.equal(model(x).logits, model(x).logits)


def gradients(model: SmolForCausalLM) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("mask", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, MOE], ids=["llama", "qwen3", "mixtral"])
def test_each_document_of_a_padded_packed_batch_is_as_alone(options, attention, mask):
    """Two packed rows, the second padded at its end: logits and gradients are those of five documents alone.

    Padding has the positions of a document of its own, as the collator writes it, with or without an attention mask.
    """
    # Router losses are means over a micro-batch by nature, so they stay out of this comparison.
    model = build(**options, attn_implementation=attention, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    rows, pad = [(4, 9, 3), (5, 6)], 5
    x = tokens(2, 16)
    positions = torch.cat([restarting(*rows[0]), restarting(*rows[1], pad)])
    labels = x.masked_fill(positions == 0, -100)
    labels[1, -pad:] = -100
    batch = {"input_ids": x, "position_ids": positions, "use_cache": False}
    if mask:
        batch["attention_mask"] = torch.ones_like(x)
        batch["attention_mask"][1, -pad:] = 0
    documents = [*x[0].split(rows[0]), *x[1, :-pad].split(rows[1])]
    packed = model(**batch).logits
    alone = torch.cat([model(document[None]).logits[0] for document in documents])
    torch.testing.assert_close(torch.cat([packed[0], packed[1, :-pad]]), alone, atol=1e-5, rtol=1e-5)
    model(**batch, labels=labels).loss.backward()
    found, items = gradients(model), (labels != -100).sum()
    for document in documents:
        model(document[None], labels=document[None], num_items_in_batch=items).loss.backward()
    expected = gradients(model)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_bounds_of_documents_are_literal():
    """Two rows of 5: documents of 2 and 3 tokens, of 4 and 1. A row begins a document whether it says so or not."""
    starts = torch.tensor([[0, 0, 1, 0, 0], [1, 0, 0, 0, 1]], dtype=torch.bool)
    kept = starts.clone()
    bounds = smol_model.document_bounds(starts)
    assert bounds["cu_seq_lens_q"].tolist() == bounds["cu_seq_lens_k"].tolist() == [0, 2, 5, 9, 10]
    assert bounds["cu_seq_lens_q"].dtype == torch.int32
    assert bounds["max_length_q"] == bounds["max_length_k"] == 4
    assert torch.equal(starts, kept)


# Flash attention: a GPU package that these tests stand in for


def test_flash_attention_without_its_package_is_refused_in_one_line():
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is installed here")
    with pytest.raises(ImportError, match="(?s)^FlashAttention2 .* package .* installed") as refusal:
        build(attn_implementation="flash_attention_2")
    assert "\n" not in str(refusal.value)


FAKE_PACKAGE = '''
"""Stands in for flash-attn: the same functions, computed the slow way; every call is written down."""
import torch

calls = []


def _causal(q, k, v, scale):
    """(T, H, Dh), (T, K, Dh) -> (T, H, Dh)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return torch.einsum("hts,shd->thd", scores.masked_fill(future, float("-inf")).softmax(-1), v)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **kwargs):
    assert causal
    calls.append({"function": "fixed", "shape": list(q.shape)})
    return torch.stack([_causal(*row, softmax_scale) for row in zip(q, k, v)])


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, **kwargs):
    assert causal and cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    calls.append({"function": "varlen", "cu_seqlens": cu_seqlens_q.tolist(), "max_seqlen": int(max_seqlen_q)})
    lengths = cu_seqlens_q.diff().tolist()
    parts = zip(*(x.split(lengths) for x in (q, k, v)))
    return torch.cat([_causal(*part, softmax_scale) for part in parts])


flash_attn_with_kvcache = flash_attn_func
'''
FAKE_PADDING = """
from transformers.modeling_flash_attention_utils import _pad_input as pad_input, _unpad_input as unpad_input
"""
FLASH_PROGRAM = """
import json, sys, torch, flash_attn
from transformers import modeling_flash_attention_utils
sys.path.insert(0, sys.argv[1])
import smol_kernels
import smol_model
from smol_model import SmolConfig, SmolForCausalLM
# transformers asks for a GPU in two places
smol_model.SmolPreTrainedModel._flash_attn_can_dispatch = lambda *args, **kwargs: True
modeling_flash_attention_utils.is_flash_attn_2_available = lambda *args, **kwargs: True
settings, batches = json.loads(sys.argv[2])
report = {}
for name, batch in batches.items():
    batch = {key: torch.tensor(value) for key, value in batch.items()}
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    logits = []
    for attention in ("eager", "flash_attention_2"):
        torch.manual_seed(0)
        model = SmolForCausalLM(SmolConfig(**settings, attn_implementation=attention)).train()
        flash_attn.calls.clear()
        with torch.no_grad():
            logits.append(model(**batch, use_cache=False).logits[real])
    report[name] = {"calls": flash_attn.calls[:], "difference": (logits[0] - logits[1]).abs().max().item()}
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def flash(tmp_path_factory) -> dict[str, dict]:
    """What the package is asked for, batch by batch, in a process that believes flash-attn to be installed."""
    site = tmp_path_factory.mktemp("site")
    (site / "flash_attn").mkdir()
    (site / "flash_attn" / "__init__.py").write_text(FAKE_PACKAGE)
    (site / "flash_attn" / "bert_padding.py").write_text(FAKE_PADDING)
    metadata = site / "flash_attn-2.8.3.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    (metadata / "RECORD").write_text("flash_attn/__init__.py,,\n")
    mask = [[1] * 8, [1] * 5 + [0] * 3]
    x = tokens(2, 8).tolist()
    batches = {
        "plain": {"input_ids": x},
        "padded": {"input_ids": x, "attention_mask": mask},
        "one packed row": {"input_ids": x[:1], "position_ids": restarting(3, 4, 1).tolist()},
        "two packed rows": {
            "input_ids": x,
            "position_ids": torch.cat([restarting(3, 4, 1), restarting(2, 6)]).tolist(),
        },
        "packed and padded": {
            "input_ids": x,
            "position_ids": torch.cat([restarting(3, 4, 1), restarting(2, 3, 3)]).tolist(),
            "attention_mask": mask,
        },
    }
    command = [sys.executable, "-c", FLASH_PROGRAM, str(Path(smol_model.__file__).parent), json.dumps([SMALL, batches])]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "batch, cu_seqlens",
    [
        ("plain", None),
        ("padded", [0, 8, 13]),
        ("one packed row", [0, 3, 7, 8]),
        ("two packed rows", [0, 3, 7, 8, 10, 16]),
        ("packed and padded", [0, 3, 7, 8, 10, 13, 16]),
    ],
)
def test_flash_attention_is_told_where_documents_begin(batch, cu_seqlens, flash):
    """Restarting positions become cu_seqlens, one entry per document of every row; logits equal eager's."""
    calls = flash[batch]["calls"]
    assert len(calls) == SMALL["num_hidden_layers"]
    for call in calls:
        assert call["function"] == ("fixed" if cu_seqlens is None else "varlen")
        assert call.get("cu_seqlens") == cu_seqlens
        if cu_seqlens is not None:
            assert call["max_seqlen"] == max(b - a for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False))
    assert flash[batch]["difference"] < 1e-5
