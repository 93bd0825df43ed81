"""The forward pass of generation: the weights of a `SmolForCausalLM` laid out for inference, over a cache in slots.

`SmolForCausalLM.forward` serves every caller: training, transformers' `generate`, packed rows. A decode step of a small
model spends more time on that generality (modules, autograd functions, masks, cache objects) and on rearranging weights
than on arithmetic. Here the projections that read the same input are one matrix, weights lie as the matrix kernel wants
them, and a step is about twenty operations per layer. SmolLM2-135M in bf16 on two cores: 1.8 times the tokens per
second of transformers' `generate` with one stream, 2.2 times with sixteen (`python -m benchmarks.generate`).

The operations and their order are those of the model, so greedy answers are the same.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smol_model import (
    CPU_BLOCK_LENGTH,
    LMHead,
    SmolForCausalLM,
    SparseMoE,
    attend_in_blocks,
    by_position,
    combine,
    dispatch,
    one_query_attention,
    rms_norm,
    turn,
)

COLUMN_BLOCK = 32


class Projection:
    """x (N, I) -> (N, O): the product with the stacked weights of linear layers that read the same input.

    On a CPU in bf16 the weight is reordered once into the blocks oneDNN computes with; otherwise every call would walk
    through it row by row (one row of input, 576 to 1536: 0.10 instead of 0.17 ms). Layers that are no plain linear
    layers, such as those of a LoRA adapter, are called one by one.
    """

    def __init__(self, *layers: nn.Module, rows: int | None = None):
        """`rows`: keep only so many outputs (of a single layer)."""
        self.layers: tuple[nn.Module, ...] = ()
        self.rows, self.packed = rows, False
        if not all(type(layer) in (nn.Linear, LMHead) for layer in layers):
            self.layers = layers
            return
        with torch.no_grad():
            weights = [layer.weight[:rows] for layer in layers]
            self.weight = weights[0] if len(layers) == 1 else torch.cat(weights)
            biases = [layer.bias for layer in layers]
            self.bias = None if biases[0] is None else torch.cat(biases)
            if self.weight.device.type == "cpu" and self.weight.dtype == torch.bfloat16 and packs():
                self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, 1)
                self.packed = True

    def __call__(self, x: Tensor) -> Tensor:
        if self.layers:
            return torch.cat([layer(x) for layer in self.layers], dim=-1)[:, : self.rows]
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def packs() -> bool:
    """Whether this build of torch has oneDNN's bf16 kernels for reordered weights."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class SlotCache:
    """Keys and values of all layers: every sequence has one row, filled from column 0, as long as it needs.

    A decode step masks the columns beyond each row's own length, so a row sees the same columns whoever shares the
    batch, and joining or leaving never moves another row's tokens. It grows on demand.
    """

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device):
        shape = (config.num_hidden_layers, 2, 0, config.num_key_value_heads, 0, config.head_dim)
        self.states = torch.zeros(shape, dtype=dtype, device=device)  # (L, 2, slots, K, columns, Dh)

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for so many sequences of such a length."""
        slots, width = self.states.shape[2], self.states.shape[4]
        if slots >= rows and width >= columns:
            return
        while slots < rows:
            slots = max(1, slots * 2)
        while width < columns:
            width = max(64, width * 2)
        old, shape = self.states, list(self.states.shape)
        shape[2], shape[4] = slots, width
        # Zeros, not garbage: a masked column still enters 0 * value, and 0 * NaN is NaN.
        self.states = old.new_zeros(shape)
        self.states[:, :, : old.shape[2], :, : old.shape[4]] = old

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of one row over another row."""
        self.states[:, :, target, :, :length] = self.states[:, :, source, :, :length]


class _Layer:
    """One block: the order of operations of `SmolDecoderLayer`, without dropout."""

    def __init__(self, layer: nn.Module, config: Any):
        attention, mlp = layer.self_attn, layer.mlp
        self.H, self.K, self.Dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.eps, self.scaling = config.rms_norm_eps, attention.scaling
        self.norm, self.mlp_norm = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.qkv = Projection(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = Projection(attention.o_proj)
        self.head_norm: Tensor | None = None  # (H + K, Dh)
        if config.qk_norm:
            query, key = attention.q_norm.weight, attention.k_norm.weight
            self.head_norm = torch.cat((query.expand(self.H, -1), key.expand(self.K, -1)))
        if isinstance(mlp, SparseMoE):
            self.mlp = SparseExperts(mlp)
        else:
            self.mlp = GatedMlp(Projection(mlp.gate_proj), Projection(mlp.up_proj), Projection(mlp.down_proj))

    def heads(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """x (N, D) -> (N, H + 2K, Dh): queries and keys, turned, then values."""
        states = self.qkv(rms_norm(x, self.norm, self.eps)).view(len(x), -1, self.Dh)
        turned = states[:, : self.H + self.K]
        if self.head_norm is not None:
            turned.copy_(rms_norm(turned, self.head_norm, self.eps))
        turn(turned, *rotation, out=turned)
        return states

    def rest(self, x: Tensor, mixed: Tensor) -> Tensor:
        """What follows attention, whose result is `mixed` (N, H * Dh)."""
        x = x + self.out(mixed)
        return x + self.mlp(rms_norm(x, self.mlp_norm, self.eps))


class GatedMlp:
    """SwiGLU. Gate and up apart: halves of one product would be strided, which costs more than a call saves."""

    def __init__(self, gate: Projection, up: Projection, down: Projection):
        self.gate, self.up, self.down = gate, up, down

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)).mul_(self.up(x)))


class SparseExperts:
    """The MoE block without statistics."""

    def __init__(self, moe: SparseMoE):
        self.gate, self.experts, self.count = moe.gate, moe.experts, moe.num_experts

    def __call__(self, x: Tensor) -> Tensor:
        _, _, weights, chosen = self.gate(x)
        plan = dispatch(chosen, self.count, None, None)
        rows = self.experts(x.index_select(0, plan.order % len(x)), plan.ends)
        return combine(rows, weights, plan).to(x.dtype)


def attend_once(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attention of one query per row, (R, H, Dh), to keys and values (R, K, S, Dh) -> (R, H * Dh)."""
    return one_query_attention(None, query.unsqueeze(2), key, value, mask, scaling=scaling)[0].flatten(1)


class Decoder:
    """Prefill and decode steps of one model over one `SlotCache`. Not thread-safe; call it under inference mode.

    The weights are those the model had when this was built. `vocab_limit` cuts padded vocabulary rows off.
    """

    def __init__(self, model: SmolForCausalLM, vocab_limit: int | None = None):
        # A PEFT model injects its layers into the model it wraps; the wrapped model is then the complete one.
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not isinstance(model, SmolForCausalLM):
            raise TypeError(f"{type(model).__name__}: generation here takes SmolForCausalLM, which loads any of ours")
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self.embedding, self.rotary = model.model.embed_tokens.weight, model.model.rotary
        with torch.no_grad():
            self.layers = [_Layer(layer, model.config) for layer in model.model.layers]
            self.norm, self.eps = model.model.norm.weight, model.config.rms_norm_eps
            rows = model.lm_head.weight.shape[0]
            self.vocab_size = min(vocab_limit or rows, rows)
            self.head = Projection(model.lm_head, rows=self.vocab_size)
        self.clear()

    def clear(self) -> None:
        """Forget the cache (which may hold non-finite values after a failed step)."""
        self.cache = SlotCache(self.config, self.dtype, self.device)

    def prefill(self, prompts: list[list[int]], first: int) -> Tensor:
        """Run prompts into the cache rows from `first` on; logits (R, V) of the token after each, float32.

        Rows are padded on the right: causal attention keeps real tokens blind to it, and decoding overwrites its
        columns.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        R, T = len(prompts), int(lengths.max())
        tokens = torch.tensor([prompt + [0] * (T - len(prompt)) for prompt in prompts], device=self.device)
        self.cache.reserve(first + R, T)
        rotation = self.rotation(torch.arange(T, device=self.device).expand(R, T))
        last = torch.arange(R, device=self.device) * T + lengths - 1
        x = F.embedding(tokens.view(-1), self.embedding)  # (R*T, D)
        for layer, states in zip(self.layers, self.cache.states[:, :, first : first + R, :, :T], strict=True):
            flat = layer.heads(x, rotation)  # (R*T, H + 2K, Dh)
            query, key, value = flat.view(R, T, -1, layer.Dh).transpose(1, 2).split((layer.H, layer.K, layer.K), dim=1)
            states[0], states[1] = key, value
            key, value = states  # side by side in memory, as products want them
            if layer is self.layers[-1]:  # of which only the last token of each row is wanted
                mixed = attend_once(flat[last, : layer.H], key, value, self.mask(lengths, T), layer.scaling)
                return self.logits(layer.rest(x[last], mixed))
            x = layer.rest(x, self.attend(query, key, value, layer.scaling).reshape(R * T, -1))
        raise AssertionError("a model without layers")

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Causal attention of whole rows: query (R, H, T, Dh), key and value (R, K, T, Dh) -> (R, T, H, Dh)."""
        (R, H, T, Dh), K = query.shape, key.shape[1]
        if self.dtype == torch.bfloat16 and self.device.type == "cpu" and T <= CPU_BLOCK_LENGTH:
            grouped = by_position(query.unflatten(1, (K, H // K))).mul_(scaling)
            mixed = attend_in_blocks(grouped, key.flatten(0, 1), value.flatten(0, 1))
            return mixed.view(R, K, T, H // K, Dh).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return mixed.transpose(1, 2)

    def step(self, tokens: list[int], lengths: list[int]) -> Tensor:
        """The next token of rows 0, 1, ... whose caches hold `lengths` columns: logits (R, V), float32."""
        R, positions = len(tokens), torch.tensor(lengths, device=self.device)
        # Whole blocks of columns, at least one of them never visible: the attention kernel then rounds alike
        # whoever shares the batch (measured on CPU: equal to the last bit in multiples of 32, not otherwise).
        width = (max(lengths) + 1) // COLUMN_BLOCK * COLUMN_BLOCK + COLUMN_BLOCK
        self.cache.reserve(R, width)
        mask, rotation = self.mask(positions + 1, width), self.rotation(positions[:, None])
        row = torch.arange(R, device=self.device)
        x = F.embedding(torch.tensor(tokens, device=self.device), self.embedding)  # (R, D)
        for layer, states in zip(self.layers, self.cache.states, strict=True):
            heads = layer.heads(x, rotation)  # (R, H + 2K, Dh)
            states[:, row, :, positions] = heads[:, layer.H :].view(R, 2, layer.K, layer.Dh)
            key, value = states[0, :R, :, :width], states[1, :R, :, :width]
            x = layer.rest(x, attend_once(heads[:, : layer.H], key, value, mask, layer.scaling))
        return self.logits(x)

    def mask(self, lengths: Tensor, width: int) -> Tensor:
        """(R, 1, 1, width), additive: the first `lengths` columns of each row are visible."""
        mask = torch.zeros(len(lengths), width, dtype=self.dtype, device=self.device)
        mask.masked_fill_(torch.arange(width, device=self.device) >= lengths[:, None], torch.finfo(self.dtype).min)
        return mask[:, None, None]

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (N, 1, Dh) of positions (R, T), N = R * T."""
        cos, sin = self.rotary(positions, self.dtype)
        return cos.flatten(0, 1), sin.flatten(0, 1)

    def prompt_logits(self, prompt: list[int], rows: int = 256) -> Iterator[Tensor]:
        """Logits after every token of a prompt, float32, in blocks of `rows` positions; the cache stays as it is.

        (Blocks, because a long prompt times the vocabulary would not fit where the model does.)
        """
        T = len(prompt)
        rotation = self.rotation(torch.arange(T, device=self.device)[None])
        x = F.embedding(torch.tensor(prompt, device=self.device), self.embedding)  # (T, D)
        for layer in self.layers:
            heads = layer.heads(x, rotation).view(1, T, -1, layer.Dh).transpose(1, 2)  # (1, H + 2K, T, Dh)
            query, key, value = heads.split((layer.H, layer.K, layer.K), dim=1)
            mixed = self.attend(query, key.contiguous(), value.contiguous(), layer.scaling)
            x = layer.rest(x, mixed.reshape(T, -1))
        for start in range(0, T, rows):
            yield self.logits(x[start : start + rows])

    def logits(self, x: Tensor) -> Tensor:
        """x (R, D), not normed yet -> (R, V) float32."""
        return self.head(rms_norm(x, self.norm, self.eps)).float()
