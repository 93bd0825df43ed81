"""SmolLM: one small language model, dense or Mixture-of-Experts, to be read top to bottom.

What it is: a decoder-only transformer in the Llama family, built so that every saved directory *is* a native
Hugging Face checkpoint. `SmolForCausalLM` reads and writes Llama, Qwen2, Qwen3, Mixtral and Qwen3-MoE directories;
`AutoModelForCausalLM`, vLLM and llama.cpp read them without this file. What it can be is in smol_config.py; what it
computes with, and why in that form, in smol_kernels.py.

Features
- grouped-query attention, rotary positions (default, linear, llama3, yarn), SwiGLU, RMSNorm, pre-norm residuals
- optional qk-norm (Qwen3), optional q/k/v bias (Qwen2), tied or untied head, attention and residual dropout
- attention through transformers' registry: eager, sdpa, flash_attention_2; KV cache; `generate` in all its modes
- packed rows: position ids that restart begin a new document, and documents never attend to each other
- Mixture-of-Experts: float32 router, top-k, capacity (training only) or dropless, load-balancing and z-loss over
  real tokens only, router statistics returned per layer, one grouped matrix product for all experts
- the training loss never materialises the logits of a step: chunked linear cross-entropy, ignored labels skipped
- works with transformers.Trainer, TRL, PEFT, accelerate, gradient checkpointing, `torch.compile`

Shapes
    B batch   T query length   S key length   D hidden_size   H query heads   K key/value heads   Dh head_dim
    G = H / K query heads per key head   F expert or MLP width   E experts   k experts per token   L layers
    V vocabulary   N = B * T tokens of a micro-batch   M = k * N routed slots   R >= M rows of all experts
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

# Those that this file does not use are here for whoever imports the model: `from smol_model import preset_config`.
from smol_config import PRESETS, SmolConfig, count_parameters, flops_per_token, preset_config  # noqa: F401
from smol_kernels import (
    CPU_BLOCK_LENGTH,
    CPU_QUERY_BLOCK,
    LinearCrossEntropy,
    RMSNorm,
    Rotate,
    SiluProduct,
    SmolLinear,
    SplitForRotation,
    block_attention,
    computes_side_by_side,
    grouped_linear,
    one_query_attention,
    uncompiled_cross_entropy,
    varlen_attention,
)

# --------------------------------------------------------------------------------------------------------------
# Linear layers
# --------------------------------------------------------------------------------------------------------------


def linear(config: SmolConfig, inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    """SmolLinear, and nn.Linear itself where a library will quantise it: bitsandbytes leaves its subclasses alone."""
    kind = nn.Linear if getattr(config, "quantization_config", None) else SmolLinear
    return kind(inputs, outputs, bias=bias)


def linear_products(x: Tensor, *linears: nn.Module, split: Callable = torch.split) -> Sequence[Tensor]:
    """The result of each of several linear layers of the same x.

    Compiled for a GPU they are one product, with their weights side by side: x is read once, and its gradient is one
    product instead of a sum of several. Not so where something else has taken a layer's place (an adapter, a quantised
    one) or holds its weight elsewhere until it is called (ZeRO-3 leaves an empty tensor without rows).
    """
    if not computes_side_by_side(x) or any(type(each) is not SmolLinear or each.weight.dim() != 2 for each in linears):
        return [each(x) for each in linears]
    weights, biases = zip(*((each.weight, each.bias) for each in linears), strict=True)
    bias = None if biases[0] is None else torch.cat(biases)
    return split(F.linear(x, torch.cat(weights), bias), tuple(len(weight) for weight in weights), -1)


# --------------------------------------------------------------------------------------------------------------
# RMSNorm and rotary positions
# --------------------------------------------------------------------------------------------------------------


class SmolRMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467) over the last dimension."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return RMSNorm.apply(x, self.weight, self.eps)


class RotaryPositions:
    """cos and sin (B, T, 1, Dh) of rotary position embedding (RoFormer, arXiv:2104.09864) for given positions (B, T).

    sin is negative for the first half of the channels: that is the sign with which the second half enters them.

    Frequencies are kept as a plain float32 tensor, made on first use: a module buffer would be rounded by
    `model.to(torch.bfloat16)`, which at position 1,000 already turns the fastest channels by a wrong angle.
    """

    def __init__(self, config: SmolConfig):
        self.config = config
        self.frequencies: Tensor | None = None  # (Dh / 2,)
        self.scale = 1.0

    def __call__(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frequencies, scale = self.frequencies, self.scale
        if frequencies is None or frequencies.device != position_ids.device:
            frequencies, scale = self.init_frequencies(position_ids.device)
            if not torch.compiler.is_compiling():  # which, finding them the next time, would compile everything anew
                self.frequencies, self.scale = frequencies, scale
        angles = position_ids[:, :, None, None].float() * frequencies  # (B, T, 1, Dh/2)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)

    def init_frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        rope = self.config.rope_parameters
        if rope["rope_type"] != "default":
            return ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.config, device)
        channels = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=device)
        return 1.0 / rope["rope_theta"] ** (channels / self.config.head_dim), 1.0


# --------------------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------------------


def eager_attention(
    module: nn.Module,
    query: Tensor,  # (B, H, T, Dh)
    key: Tensor,  # (B, K, S, Dh)
    value: Tensor,  # (B, K, S, Dh)
    attention_mask: Tensor | None,  # additive, (B or 1, 1 or H, T, S)
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Plain softmax attention. The G query heads of a key head are stacked along T, so keys are never repeated."""
    B, H, T, Dh = query.shape
    K, S = key.shape[1], key.shape[2]
    query = (query * scaling).reshape(B * K, H // K * T, Dh)
    key, value = key.reshape(B * K, S, Dh), value.reshape(B * K, S, Dh)
    scores = torch.bmm(query, key.transpose(1, 2))  # (B*K, G*T, S)
    if attention_mask is not None:
        scores.view(B, K, H // K, T, S).add_(attention_mask.unflatten(1, (min(K, attention_mask.shape[1]), -1)))
    weights = F.softmax(scores, dim=-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return torch.bmm(weights, value).view(B, H, T, Dh).transpose(1, 2), None  # (B, T, H, Dh)


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv:2305.13245) with rotary positions."""

    def __init__(self, config: SmolConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        D, query, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = linear(config, D, query * self.head_dim, config.attention_bias)
        self.k_proj = linear(config, D, kv * self.head_dim, config.attention_bias)
        self.v_proj = linear(config, D, kv * self.head_dim, config.attention_bias)
        self.o_proj = linear(config, query * self.head_dim, D)
        self.q_norm = SmolRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = SmolRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        attend: Callable,  # eager_attention or one of transformers' registry
        rotation: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        heads = (*x.shape[:-1], -1, self.head_dim)
        products = linear_products(x, self.q_proj, self.k_proj, self.v_proj, split=SplitForRotation.apply)
        query, key, value = (product.view(heads) for product in products)
        query = Rotate.apply(self.q_norm(query), *rotation)  # (B, H, T, Dh)
        key = Rotate.apply(self.k_norm(key), *rotation)  # (B, K, T, Dh)
        value = value.transpose(1, 2)  # (B, K, T, Dh)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, K, S, Dh)
        dropout = self.attention_dropout if self.training else 0.0
        mixed, _ = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(mixed.reshape(*x.shape[:-1], -1))  # (B, T, D)


# --------------------------------------------------------------------------------------------------------------
# SwiGLU and Mixture-of-Experts
# --------------------------------------------------------------------------------------------------------------


class SwiGLU(nn.Module):
    """Gated MLP (arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: SmolConfig):
        super().__init__()
        self.gate_proj = linear(config, config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config, config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config, config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linear_products(x, self.gate_proj, self.up_proj)
        return self.down_proj(SiluProduct.apply(gate, up))


class RouterStats(NamedTuple):
    """What one layer's router did with the real tokens of a micro-batch (stacked over layers in the output)."""

    aux_loss: Tensor  # () load-balancing loss, 1 at perfect balance; differentiable
    z_loss: Tensor  # () mean squared log-partition; differentiable
    load: Tensor  # (E,) fraction of the routed slots each expert was chosen for, before capacity
    entropy: Tensor  # () mean entropy of the routing distribution, nats
    dropped: Tensor  # () fraction of the routed slots dropped by the capacity limit


class Router(nn.Module):
    """Token-choice top-k router in float32: softmax over experts, then the k largest."""

    def __init__(self, config: SmolConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (N, D) -> logits (N, E), probabilities (N, E), weights (N, k), experts (N, k); floats in float32."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        return logits, *self.choose(logits)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """logits (N, E) -> probabilities (N, E), weights (N, k), experts (N, k)."""
        probabilities = logits.softmax(-1)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return probabilities, weights, experts


# Every expert's rows are filled up to a multiple of this. On a CPU oneDNN compiles and keeps a kernel for each number
# of rows it meets, and an expert's share of a batch is another number every time; a GPU's grouped product sums over
# rows in steps of 16 bytes and stops the program where a compiler chose a layout in which a share is no multiple of
# them.
ROW_MULTIPLE = 8


class Dispatch(NamedTuple):
    """Which slot goes where. A slot is one (choice, token) pair; slot = choice * N + token, so first choices
    come before second ones, and that order is kept inside an expert: it is the priority when capacity runs out."""

    order: Tensor  # (R,) slot of each row, sorted by expert, 0 for filling; R is M and room for that
    inverse: Tensor  # (M,) row of each slot; those that nobody computes come last
    ends: Tensor  # (E,) int32: rows of expert e are order[ends[e-1]:ends[e]]
    kept: Tensor  # (R, 1) bool, True for rows that hold a slot that its expert computes
    complete: bool  # every slot is computed: neither a capacity limit nor padding
    load: Tensor  # (E,) slots per expert before the capacity limit, real tokens only


def dispatch(experts: Tensor, num_experts: int, capacity: Tensor | int | None, real: Tensor | None) -> Dispatch:
    """Plan the work of all experts for the choices `experts` (N, k), without waiting for the device.

    capacity: most slots an expert takes, None for no limit. real: (N,) bool, False for padding, which is not routed.
    """
    slot_expert = experts.t().reshape(-1)  # (M,)
    if real is not None:
        slot_expert = slot_expert.masked_fill(~real.repeat(experts.shape[1]), num_experts)  # past the last expert
    sorted_expert, order = slot_expert.sort(stable=True)
    bins = torch.arange(num_experts, device=experts.device)
    ends = torch.searchsorted(sorted_expert, bins, right=True, out_int32=True)
    load = ends.diff(prepend=ends.new_zeros(1))
    rows = torch.arange(len(order), device=experts.device)
    if capacity is not None:
        starts = F.pad(ends - load, (0, 1))  # the pseudo-expert of padding has no limit to pass: it is last anyway
        overflow = rows - starts[sorted_expert] >= capacity
        sorted_expert, again = sorted_expert.masked_fill(overflow, num_experts).sort(stable=True)
        order = order[again]
        ends = torch.searchsorted(sorted_expert, bins, right=True, out_int32=True)
    sizes = ends.diff(prepend=ends.new_zeros(1))
    filled_ends = (-(-sizes // ROW_MULTIPLE) * ROW_MULTIPLE).cumsum(0, dtype=torch.int32)
    # Each expert's rows move down by what was filled up before it, and those past the last expert by all of it.
    moved = torch.cat((F.pad(filled_ends - ends, (1, 0))[:-1], (filled_ends - ends)[-1:]))
    rows = rows + moved[sorted_expert]
    room = len(order) + num_experts * (ROW_MULTIPLE - 1)
    kept = torch.zeros(room, dtype=torch.bool, device=rows.device).scatter_(0, rows, sorted_expert < num_experts)
    return Dispatch(
        order=rows.new_zeros(room).scatter_(0, rows, order),
        inverse=torch.empty_like(order).scatter_(0, order, rows),
        ends=filled_ends,
        kept=kept[:, None],
        complete=capacity is None and real is None,
        load=load,
    )


class TokensToRows(torch.autograd.Function):
    """(N, D) tokens -> (R, D) rows in expert order; its gradient is RowsToTokens, so neither needs atomic adds."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, plan: Dispatch) -> Tensor:
        ctx.plan, ctx.copies = plan, len(plan.inverse) // len(tokens)
        return tokens.index_select(0, plan.order % len(tokens))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_copies(grad.index_select(0, ctx.plan.inverse), ctx.copies), None


class RowsToTokens(torch.autograd.Function):
    """(R, D) rows in expert order -> (N, D): the sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: Dispatch, copies: int) -> Tensor:
        ctx.plan, ctx.tokens = plan, len(plan.inverse) // copies
        return sum_copies(rows.index_select(0, plan.inverse), copies)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.plan.order % ctx.tokens), None, None


def sum_copies(slots: Tensor, copies: int) -> Tensor:
    """(k * N, D) -> (N, D). Two are added: a reduction over them takes eight times as long on a CPU."""
    parts = slots.view(copies, -1, slots.shape[-1])
    return parts[0] + parts[1] if copies == 2 else parts.sum(0)


def combine(rows: Tensor, weights: Tensor, plan: Dispatch) -> Tensor:
    """Expert outputs `rows` (R, D) times the router's `weights` (N, k), summed per token: (N, D)."""
    row_weights = weights.t().reshape(-1)[plan.order, None].masked_fill(~plan.kept, 0.0)  # (R, 1)
    return RowsToTokens.apply(rows * row_weights.to(rows.dtype), plan, weights.shape[1])


class Experts(nn.Module):
    """E SwiGLU experts as two stacked weights, computed by one grouped matrix product each."""

    def __init__(self, config: SmolConfig):
        super().__init__()
        E, D, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, width))

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows (M, D) sorted by expert, ends (E,) -> (M, D); rows past ends[-1] are undefined."""
        gate, up = grouped_linear(rows, self.gate_up_proj, ends).chunk(2, dim=-1)  # (M, F) each
        return grouped_linear(SiluProduct.apply(gate, up), self.down_proj, ends)


class SparseMoE(nn.Module):
    """Router -> dispatch -> experts -> combine."""

    def __init__(self, config: SmolConfig):
        super().__init__()
        self.num_experts, self.capacity_factor = config.num_experts, config.capacity_factor
        share = Fraction(config.capacity_factor or 0).limit_denominator(10**6) * config.num_experts_per_tok
        self.capacity_ratio = (share / config.num_experts).as_integer_ratio()  # slots of an expert per token
        self.gate = Router(config)
        self.experts = Experts(config)

    def forward(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, RouterStats]:
        """x (B, T, D), real (N,) bool or None -> output (B, T, D), router logits (N, E), statistics."""
        tokens = x.view(-1, x.shape[-1])  # (N, D)
        logits, probabilities, weights, experts = self.gate(tokens)
        capacity = self.capacity(experts, real) if self.training and self.capacity_factor is not None else None
        plan = dispatch(experts, self.num_experts, capacity, real)
        rows = TokensToRows.apply(tokens, plan)  # (R, D)
        if not plan.complete:  # undefined rows must stay out of the sums and out of the gradients
            rows = rows.masked_fill(~plan.kept, 0.0)
        rows = self.experts(rows, plan.ends)
        if not plan.complete:
            rows = rows.masked_fill(~plan.kept, 0.0)
        output = combine(rows, weights, plan).to(x.dtype).view_as(x)
        return output, logits, router_stats(logits, probabilities, plan, real)

    def capacity(self, experts: Tensor, real: Tensor | None) -> Tensor | int:
        """ceil(capacity_factor * k * tokens / E), over real tokens. Whole numbers: in floats 1.1 * 50 is above 55."""
        tokens: Any = len(experts) if real is None else real.sum()
        slots, per = self.capacity_ratio
        return -(-tokens * slots // per)


def router_stats(logits: Tensor, probabilities: Tensor, plan: Dispatch, real: Tensor | None) -> RouterStats:
    """Losses and statistics of one router over real tokens; logits and probabilities (N, E), real (N,) or None."""
    share = torch.full_like(logits[:, 0], 1 / len(logits)) if real is None else real / real.sum().clamp(min=1)  # (N,)
    routed = plan.load.sum()  # 0 of padding alone, of which nothing is dropped
    slots = routed.clamp(min=1)
    load = plan.load / slots
    log_partition = logits.logsumexp(-1)  # (N,)
    with torch.autocast(logits.device.type, enabled=False):  # which would take the products to 16 bits
        aux_loss = load.numel() * (load * (share @ probabilities)).sum()
        z_loss = share @ log_partition.square()
        with torch.no_grad():
            entropy = share @ (log_partition - (probabilities * logits).sum(-1))
    dropped = (1 - plan.kept.sum() / slots) * (routed > 0)
    return RouterStats(aux_loss, z_loss, load, entropy, dropped)


def stack_stats(layers: Sequence[Sequence[Tensor]], device: torch.device) -> RouterStats:
    """Those of all layers on one device: a device map may have spread the layers over several."""
    return RouterStats(*(torch.stack([value.to(device) for value in values]) for values in zip(*layers, strict=True)))


# --------------------------------------------------------------------------------------------------------------
# Block and model
# --------------------------------------------------------------------------------------------------------------


class SmolDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm residual block. The one place where dense and MoE part ways."""

    def __init__(self, config: SmolConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = SparseMoE(config) if config.num_experts else SwiGLU(config)
        self.input_layernorm = SmolRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = SmolRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.drop = nn.Dropout(config.residual_dropout)  # a module, so that TRL can switch it off

    def forward(self, x: Tensor, *, real: Tensor | None, **attention: Any) -> tuple[Tensor, ...]:
        """x (B, T, D) -> (x,) or, for MoE, (x, router logits (N, E), *RouterStats).

        A flat tuple of tensors, because reentrant checkpointing only follows gradients of those.
        """
        x = x + self.drop(self.self_attn(self.input_layernorm(x), **attention))
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, SwiGLU):
            return (x + self.drop(self.mlp(normed)),)
        mixed, logits, stats = self.mlp(normed, real)
        return x + self.drop(mixed), logits, *stats


@dataclass
class SmolModelOutput(ModelOutput):
    """Output of the backbone; router fields are None for a dense model."""

    last_hidden_state: Tensor | None = None  # (B, T, D), normed
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None  # L + 1 of (B, T, D)
    router_logits: tuple[Tensor, ...] | None = None  # L of (N, E)
    router_stats: RouterStats | None = None  # every field stacked over layers


@dataclass
class SmolOutput(ModelOutput):
    """Output of the language model.

    In training with labels `logits` is None: they are never materialised. `loss` is the language-model loss plus, in
    training, the weighted router losses; `aux_loss` and `z_loss` are those losses unweighted (mean over layers).
    """

    loss: Tensor | None = None  # ()
    logits: Tensor | None = None  # (B, T, V)
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None  # ()
    z_loss: Tensor | None = None  # ()
    router_logits: tuple[Tensor, ...] | None = None  # L of (N, E)
    router_stats: RouterStats | None = None  # aux_loss, z_loss, entropy, dropped (L,); load (L, E)


class SmolPreTrainedModel(PreTrainedModel):
    """What transformers, TRL, PEFT and accelerate want to know about the model."""

    config: SmolConfig
    config_class = SmolConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SmolDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: names and shapes are the native architecture's, so its checkpoint conversions apply to us."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # linear and embedding normal(0, initializer_range), bias 0, norm 1
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers) if self.config.depth_scaled_init else std
        if isinstance(module, Router):
            init.normal_(module.weight, std=std)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, std=std)
            init.normal_(module.down_proj, std=residual_std)
        elif isinstance(module, Attention):
            if self.config.mimetic_init:
                values = module.v_proj.weight.detach().view(-1, module.head_dim, self.config.hidden_size)  # (K, Dh, D)
                values = values.repeat_interleave(module.num_key_value_groups, dim=0).flatten(0, 1)  # (H*Dh, D)
                init.copy_(module.o_proj.weight, values.t() * (residual_std / std))
            else:
                init.normal_(module.o_proj.weight, std=residual_std)
        elif isinstance(module, SwiGLU):
            init.normal_(module.down_proj.weight, std=residual_std)


def document_bounds(starts: Tensor) -> dict[str, Any]:
    """What flash attention wants to know of packed rows, which transformers finds out for a single row only.

    starts (B, T): True where a document begins inside a row; every row begins one.
    """
    starts = starts.clone()
    starts[:, 0] = True
    bounds = F.pad(starts.flatten().nonzero().squeeze(1), (0, 1), value=starts.numel()).int()  # (documents + 1,)
    longest = int(bounds.diff().max())
    return dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=longest, max_length_k=longest)


class SmolModel(SmolPreTrainedModel):
    """The backbone: embedding, L blocks, final norm."""

    def __init__(self, config: SmolConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([SmolDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = SmolRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryPositions(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, S), 0 for padding
        position_ids: Tensor | None = None,  # (B, T)
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,  # (B, T, D)
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,  # accepted because callers pass it; they are always returned
        **kwargs: Any,
    ) -> SmolModelOutput:
        """Position ids that restart inside a row separate packed documents, also beside an `attention_mask` (B, S) that
        marks padding: there a document is what begins with a real token at position 0.

        A collator may also say where they begin, in transformers' keywords (see `document_bounds`): found out here, it
        takes a GPU that has finished its work.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        known = kwargs.get("cu_seq_lens_q")
        attend, mask, bounds = self.attention(x, attention_mask, position_ids, past_key_values, seen, known)
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None] + seen
        rotation = self.rotary(position_ids, x.dtype)
        real = self.real_tokens(attention_mask, x)
        hidden_states, router = [x], []
        for layer in self.layers:
            x, *routing = layer(
                x,
                real=real,
                attend=attend,
                rotation=rotation,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs | bounds,
            )
            if output_hidden_states:
                hidden_states.append(x)
            router.append(routing)
        x = self.norm(x)
        return SmolModelOutput(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*hidden_states[:-1], x) if output_hidden_states else None,
            router_logits=tuple(logits for logits, *_ in router) if self.config.num_experts else None,
            router_stats=stack_stats([stats for _, *stats in router], x.device) if self.config.num_experts else None,
        )

    def attention(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Any,
        seen: Any,
        known_bounds: Tensor | None,
    ) -> tuple[Callable, Tensor | None, dict[str, Any]]:
        """The attention function for this call, the mask in the form it wants, and what else it wants to be told."""
        (B, T, _), device, implementation = x.shape, x.device.type, self.config._attn_implementation
        if isinstance(past_key_values, DynamicCache) and not seen:
            past_key_values = None  # an empty cache changes nothing, but would switch packing detection off
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        dropout = self.training and self.config.attention_dropout
        bounds, flash = {}, implementation.startswith("flash")
        varlen = implementation == "sdpa" and device == "cuda" and dtype.itemsize == 2 and not dropout
        varlen = varlen and self.config.head_dim % 8 == 0 and self.config.head_dim <= 256  # what the kernel takes,
        varlen = varlen and torch.cuda.get_device_capability(x.device)[0] >= 8  # and where it runs
        padding = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None  # where it is 0
        if position_ids is not None and past_key_values is None and (
            padding is not None or varlen or (flash and B > 1)
        ):
            starts = F.pad(position_ids.diff() != 1, (1, 0)).expand(B, T)
            packed: Any
            if known_bounds is not None:
                packed = len(known_bounds) > B + 1
            elif padding is not None:  # inside or beside a document it makes positions jump as well
                packed = ((position_ids == 0) & padding.bool()).sum(-1).max() > 1
            else:
                packed = starts.any()
            if packed:
                attention_mask = None  # packed: the positions of padding make it a document of its own
                if varlen:
                    return varlen_attention, None, document_bounds(starts) if known_bounds is None else {}
                bounds = document_bounds(starts) if flash and known_bounds is None else {}
        mask: Tensor | None = create_causal_mask(  # type: ignore[assignment]  # BlockMask: flex attention alone
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        if mask is None:  # also for an empty cache of fixed length, whose keys are more than T
            whole = past_key_values is None
        else:  # one by the caller need not be causal, as blocks of queries are
            whole = mask.shape[1] == 1 and mask.shape[-1] == T and (mask is not attention_mask or T <= CPU_QUERY_BLOCK)
        short = 1 < T <= CPU_BLOCK_LENGTH and whole
        if implementation == "sdpa" and device == "cpu" and dtype == torch.bfloat16 and short and not dropout:
            attend = block_attention
        if mask is not None and mask.dtype == torch.bool and attend is block_attention:
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
        elif mask is not None and mask.is_floating_point():
            # Under autocast the scores are narrower than x, and the lowest float32 would become -inf: a row of padding,
            # which sees nothing, would be NaN.
            mask = mask.to(dtype).clamp(min=torch.finfo(dtype).min)
        if implementation == "sdpa" and T == 1 and not dropout:
            attend = one_query_attention
        return attend, mask, bounds

    def real_tokens(self, attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
        """(N,) bool, False for padding; None where every token is real or the model has no router."""
        if not self.config.num_experts or attention_mask is None or attention_mask.dim() != 2:
            return None
        real = attention_mask[:, -x.shape[1] :].reshape(-1).bool()
        return None if real.all() else real


# --------------------------------------------------------------------------------------------------------------
# Loss and language model
# --------------------------------------------------------------------------------------------------------------


class LMHead(nn.Linear):
    """The output projection. Given labels it returns the summed cross-entropy instead of logits.

    The loss lives in the module so that whoever gathers or moves its weight around a call (ZeRO-3, FSDP, device
    maps) does so for the loss as well.
    """

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """hidden (..., D) -> logits (..., V); with labels (...), -100 ignored -> ()."""
        if labels is None:
            return F.linear(hidden, self.weight)
        weight, device = self.weight, hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        with torch.autocast(device, enabled=False):
            hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
            loss = uncompiled_cross_entropy if device == "cpu" else LinearCrossEntropy.apply
            return loss(hidden, weight, labels, torch.is_grad_enabled())


class SmolForCausalLM(SmolPreTrainedModel, GenerationMixin):
    """The language model; see the module docstring. `save_pretrained` writes a native directory."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SmolConfig):
        super().__init__(config)
        self.model = SmolModel(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, S), 0 for padding
        position_ids: Tensor | None = None,  # (B, T)
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,  # (B, T, D)
        labels: Tensor | None = None,  # (B, T), -100 ignored; shifted here
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SmolOutput:
        """Logits, and with labels the loss: the sum over trained tokens divided by `num_items_in_batch`.

        `num_items_in_batch` is the number of trained tokens of the whole optimizer step, over micro-batches and ranks;
        None means those of this call. Router losses are weighted by this call's share of that number, so that they
        too sum to one step's worth over any split. In training with labels no logits are returned; `logits_to_keep`
        = n keeps those of the last n positions only (0: all).

        Keyword `shift_labels` (B, T) gives labels already shifted; it is not in the signature because Trainer takes
        every parameter with "label" in its name for a required column.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden, stats = outputs.last_hidden_state, outputs.router_stats
        loss = logits = None
        aux_loss: Any = stats.aux_loss.mean() if stats else None
        z_loss: Any = stats.z_loss.mean() if stats else None
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        if shift_labels is not None:
            count = (shift_labels != -100).sum()
            total = count if num_items_in_batch is None else num_items_in_batch
            total = total.clamp(min=1) if isinstance(total, Tensor) else max(1, total)
            loss = self.summed_loss(hidden, shift_labels) / total
            if stats and self.training:
                router_loss = self.config.router_aux_loss_coef * aux_loss + self.config.router_z_loss_coef * z_loss
                loss = loss + router_loss * (count / total)
        if shift_labels is None or not self.training:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])
        return SmolOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            aux_loss=aux_loss,
            z_loss=z_loss,
            router_logits=outputs.router_logits,
            router_stats=stats,
        )

    def summed_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Summed cross-entropy of hidden (B, T, D) against labels (B, T), -100 ignored."""
        if isinstance(getattr(self.lm_head, "_orig_mod", self.lm_head), LMHead):  # torch.compile of a part wraps it
            return self.lm_head(hidden, labels=labels)
        # The head was replaced, by a LoRA layer or after resizing: only its logits are known.
        logits = self.lm_head(hidden).float()
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")
