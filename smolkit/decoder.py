"""The forward pass of generation: the weights of a `SmolForCausalLM` laid out for inference, over a cache in rows.

`SmolForCausalLM.forward` serves every caller: training, transformers' `generate`, packed rows. A decode step of a small
model spends more time on that generality (modules, autograd functions, masks, cache objects) and on rearranging weights
than on arithmetic. Here the projections that read the same input are one matrix, weights lie as the matrix kernel wants
them, and a step is about twenty operations per layer. SmolLM2-135M in bf16 on two cores: 1.8 times the tokens per
second of transformers' `generate` with one stream, 2.2 times with sixteen (`python -m benchmarks.generate`).

The operations and their order are those of the model, so greedy answers are the same.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smol_config import SmolConfig
from smol_kernels import (
    CPU_BLOCK_LENGTH,
    SmolLinear,
    attend_in_blocks,
    by_position,
    future,
    one_query_attention,
    rms_norm,
    turn,
)
from smol_model import (
    ROW_MULTIPLE,
    Experts,
    LMHead,
    SmolDecoderLayer,
    SmolForCausalLM,
    SparseMoE,
    combine,
    dispatch,
    sum_copies,
)
from smolkit.cache import Row, room_for
from smolkit.quantize import Int8Linear, Int8Product

ROUTER_ELEMENTS = 2**22  # products of a router at once: 16 MiB
Pair = tuple[Tensor, Tensor]  # of a LoRA adapter: A (r, I), and B (O, r) times its scale
# Which rows of a batch use which adapter: a name and its rows, for each adapter in use.
Users = Sequence[tuple[str, Tensor]]


class Projection:
    """x (N, I) -> (N, O): the product with the stacked weights of linear layers that read the same input.

    On a CPU in bf16 the weight is reordered once into the blocks oneDNN computes with; otherwise every call would walk
    through it row by row (one row of input, 576 to 1536: 0.10 instead of 0.17 ms). Layers that are no plain linear
    layers, such as those that PEFT puts around them, are called one by one. LoRA adapters can be added beside the
    weights, each for its own rows of the batch.
    """

    def __init__(self, *layers: nn.Module):
        self.layers: tuple[nn.Module, ...] = ()
        self.packed = False
        self.adapters: dict[str, Pair] = {}
        self.int8: Int8Product | None = None
        quantised = [layer for layer in layers if type(layer) is Int8Linear]
        # nn.Linear itself: the head of a model whose vocabulary was resized.
        plain = [
            layer
            for layer in layers
            if type(layer) is nn.Linear or type(layer) is SmolLinear or type(layer) is LMHead
        ]
        if len(quantised) == len(layers):
            self.sizes, self.int8 = [len(layer.weight) for layer in quantised], Int8Product(quantised)
            return
        if len(plain) < len(layers):
            self.layers = layers
            return
        with torch.no_grad():
            weights = [layer.weight for layer in plain]
            self.sizes = [len(weight) for weight in weights]
            self.weight = weights[0] if len(layers) == 1 else torch.cat(weights)
            biases: list[Tensor] = [layer.bias for layer in plain]
            self.bias = None if biases[0] is None else torch.cat(biases)
            if packs(self.weight):
                self.weight, self.packed = reordered(self.weight), True

    def __call__(self, x: Tensor, users: Users = ()) -> Tensor:
        y = self._product(x)
        for name, rows in users:
            if name in self.adapters:
                first, second = self.adapters[name]
                y[rows] += F.linear(F.linear(x[rows], first), second)
        return y

    def _product(self, x: Tensor) -> Tensor:
        if self.int8 is not None:
            return self.int8(x)
        if self.layers:
            return torch.cat([layer(x) for layer in self.layers], dim=-1)
        if self.packed:
            return packed_linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def adapt(self, name: str, pairs: list[Pair | None], device: torch.device, dtype: torch.dtype) -> None:
        """Add an adapter: a pair for each stacked layer that it changes. Their products become one."""
        present = [pair for pair in pairs if pair is not None]
        if not present:
            return
        blocks = [
            pair[1] if pair is not None else torch.zeros(size, 0) for pair, size in zip(pairs, self.sizes, strict=True)
        ]
        first, second = torch.cat([pair[0] for pair in present]), torch.block_diag(*blocks)  # (R, I), (O, R)
        self.adapters[name] = (first.to(device, dtype), second.to(device, dtype))


def packs(weight: Tensor) -> bool:
    """Whether this build of torch has oneDNN's kernels for reordered weights of this kind."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def reordered(weight: Tensor) -> Tensor:
    """A weight (O, I) in the blocks that oneDNN computes with."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with a reordered weight."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Layer:
    """One block: the order of operations of `SmolDecoderLayer`, without dropout."""

    def __init__(self, layer: SmolDecoderLayer, config: SmolConfig):
        attention, mlp = layer.self_attn, layer.mlp
        self.H, self.K, self.Dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.eps, self.scaling = config.rms_norm_eps, attention.scaling
        self.norm, self.mlp_norm = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.qkv = Projection(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = Projection(attention.o_proj)
        self.head_norm: Tensor | None = None  # (H + K, Dh)
        if config.qk_norm:
            query, key = attention.q_norm.get_parameter("weight"), attention.k_norm.get_parameter("weight")
            self.head_norm = torch.cat((query.expand(self.H, -1), key.expand(self.K, -1)))
        self.mlp: SparseExperts | GatedMlp
        if isinstance(mlp, SparseMoE):
            self.mlp = SparseExperts(mlp)
        else:
            self.mlp = GatedMlp(Projection(mlp.gate_proj), Projection(mlp.up_proj), Projection(mlp.down_proj))

    @property
    def packed(self) -> bool:
        return self.qkv.packed and self.out.packed and self.mlp.packed

    def adapt(self, name: str, pairs: dict[str, Pair]) -> None:
        """Take what an adapter changes here out of `pairs`, whose keys are module names inside this layer."""
        parts = {self.qkv: "self_attn.q_proj self_attn.k_proj self_attn.v_proj", self.out: "self_attn.o_proj"}
        if isinstance(self.mlp, GatedMlp):
            mlp = self.mlp
            parts |= {mlp.gate: "mlp.gate_proj", mlp.up: "mlp.up_proj", mlp.down: "mlp.down_proj"}
        for projection, modules in parts.items():
            own = [pairs.pop(module, None) for module in modules.split()]
            projection.adapt(name, own, self.norm.device, self.norm.dtype)

    def heads(self, x: Tensor, rotation: tuple[Tensor, Tensor], users: Users = ()) -> Tensor:
        """x (N, D) -> (N, H + 2K, Dh): queries and keys, turned, then values."""
        states = self.qkv(rms_norm(x, self.norm, self.eps), users).view(len(x), -1, self.Dh)
        turned = states[:, : self.H + self.K]
        if self.head_norm is not None:
            turned.copy_(rms_norm(turned, self.head_norm, self.eps))
        turn(turned, *rotation, out=turned)
        return states

    def rest(self, x: Tensor, mixed: Tensor, users: Users = ()) -> Tensor:
        """What follows attention, whose result is `mixed` (N, H * Dh)."""
        x = x + self.out(mixed, users)
        return x + self.mlp(rms_norm(x, self.mlp_norm, self.eps), users)


class GatedMlp:
    """SwiGLU. Gate and up apart: halves of one product would be strided, which costs more than a call saves."""

    def __init__(self, gate: Projection, up: Projection, down: Projection):
        self.gate, self.up, self.down = gate, up, down
        self.packed = gate.packed and up.packed and down.packed

    def __call__(self, x: Tensor, users: Users = ()) -> Tensor:
        return self.down(F.silu(self.gate(x, users)).mul_(self.up(x, users)), users)


class PackedExperts:
    """`Experts` with reordered weights, expert by expert: a decode step of 16 rows takes 19 instead of 25 ms (85M)."""

    def __init__(self, experts: Experts):
        with torch.no_grad():
            self.gate_up = [reordered(weight) for weight in experts.gate_up_proj]
            self.down = [reordered(weight) for weight in experts.down_proj]

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x (N, D), the router's weights and choices (N, k) -> (N, D): `dispatch` and `combine` of the model by lists,
        since some twenty operations on a few numbers take longer than the products of a row."""
        experts = chosen.t().flatten().tolist()  # of each slot, see Dispatch
        order = sorted(range(len(experts)), key=experts.__getitem__)
        slots = torch.tensor(order)
        rows = F.pad(x.index_select(0, slots % len(x)), (0, 0, 0, ROW_MULTIPLE))
        output, start = x.new_empty(len(order), x.shape[1]), 0
        for expert, count in sorted(Counter(experts).items()):
            filled = -(-count // ROW_MULTIPLE) * ROW_MULTIPLE  # with rows of the next one, for nothing
            gate, up = packed_linear(rows[start : start + filled], self.gate_up[expert]).chunk(2, dim=-1)
            output[start : start + count] = packed_linear(F.silu(gate).mul_(up), self.down[expert])[:count]
            start += count
        results = torch.empty_like(output).index_copy_(0, slots, output)
        return sum_copies(results.mul_(weights.t().reshape(-1, 1).to(x.dtype)), chosen.shape[1])


class SparseExperts:
    """The MoE block without statistics. Adapters of experts are not served beside the weights (they can be merged)."""

    def __init__(self, moe: SparseMoE):
        self.gate, self.count = moe.gate, moe.num_experts
        self.experts: Experts | PackedExperts = moe.experts
        self.packed = packs(moe.experts.down_proj)
        if self.packed:
            self.experts, self.router = PackedExperts(moe.experts), moe.gate.weight.detach().float()

    def __call__(self, x: Tensor, users: Users = ()) -> Tensor:
        if isinstance(self.experts, PackedExperts):
            return self.experts(x, *self.gate.choose(self.logits(x))[1:])
        _, weights, chosen = self.gate(x)[1:]
        plan = dispatch(chosen, self.count, None, None)
        rows = self.experts(x.index_select(0, plan.order % len(x)), plan.ends)
        return combine(rows, weights, plan).to(x.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """The router's (N, E), float32, as sums: a matrix product's rounding depends on the number of rows.

        In blocks of rows, since all products of a block exist at once.
        """
        blocks = x.float()[:, None].split(max(1, ROUTER_ELEMENTS // self.router.numel()))
        return torch.cat([(block * self.router).sum(-1) for block in blocks])


def attend_once(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attention of one query per row, (R, H, Dh), to keys and values (R, K, S, Dh) -> (R, H * Dh)."""
    return one_query_attention(None, query.unsqueeze(2), key, value, mask, scaling=scaling)[0].flatten(1)


class Decoder:
    """Prefill and decode steps of one model over rows of a `Cache`. Not thread-safe; call it under inference mode.

    The weights are those the model had when this was built.
    """

    def __init__(self, model: nn.Module):
        # A PEFT model injects its layers into the model it wraps; the wrapped model is then the complete one.
        unwrap = getattr(model, "get_base_model", None)
        model = unwrap() if unwrap is not None else model
        if not isinstance(model, SmolForCausalLM):
            raise TypeError(f"{type(model).__name__}: generation here takes SmolForCausalLM, which loads any of ours")
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self.embedding, self.rotary = model.model.embed_tokens.weight, model.model.rotary
        with torch.no_grad():
            layers = cast(Iterable[SmolDecoderLayer], model.model.layers)
            self.layers = [_Layer(layer, model.config) for layer in layers]
            self.norm, self.eps = model.model.norm.weight, model.config.rms_norm_eps
            self.head = Projection(model.lm_head)

    @property
    def rows_are_independent(self) -> bool:
        """Whether what a token computes is the same to the last bit, whatever the number of tokens beside it.

        Measured on CPUs for products with reordered weights, which always go through their inner dimension in the same
        order; not true of torch's other products from 33 rows on (bf16), or at all (float32, experts).
        """
        return self.head.packed and all(layer.packed for layer in self.layers)

    def adapt(self, name: str, pairs: dict[str, Pair]) -> None:
        """Add a LoRA adapter beside the weights: (A, scaled B) by module name. ValueError for what cannot be added."""
        for number, layer in enumerate(self.layers):
            prefix = f"model.layers.{number}."
            own = {key.removeprefix(prefix): pair for key, pair in pairs.items() if key.startswith(prefix)}
            pairs = {key: pair for key, pair in pairs.items() if not key.startswith(prefix)}
            layer.adapt(name, own)
            pairs |= {prefix + key: pair for key, pair in own.items()}
        if pairs:
            raise ValueError(f"{next(iter(pairs))} can only be adapted by merging")

    def prefill(
        self,
        rows: Sequence[Row],
        chunks: Sequence[list[int]],
        starts: Sequence[int],
        adapters: Sequence[str | None],
        ends: Sequence[bool],
    ) -> Tensor | None:
        """Run the next tokens of prompts, whose first `starts` tokens are in their rows already.

        The tokens of all go through the layers together, (N, D); attention is each prompt's own. Returns the logits
        (E, V), float32, of the token after each prompt that `ends` here, or None where none does.
        """
        sizes = [len(chunk) for chunk in chunks]
        stops = list(accumulate(sizes))
        positions = [torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        rotation = self.rotation(torch.cat(positions)[None].to(self.device))
        users = self.users([name for name, size in zip(adapters, sizes, strict=True) for _ in range(size)])
        tokens = torch.tensor([token for chunk in chunks for token in chunk], device=self.device)
        x = F.embedding(tokens, self.embedding)  # (N, D)
        firsts = [stop - size for stop, size in zip(stops, sizes, strict=True)]
        parts = list(zip([row.states for row in rows], firsts, sizes, starts, strict=True))
        for number, layer in enumerate(self.layers):
            heads = layer.heads(x, rotation, users).transpose(0, 1)  # (H + 2K, N, Dh)
            final, mixed = layer is self.layers[-1], []
            for (states, first, size, start), end in zip(parts, ends, strict=True):
                query, key, value = heads[:, first : first + size].split((layer.H, layer.K, layer.K))  # (., T, Dh)
                states[number, 0, :, start : start + size] = key
                states[number, 1, :, start : start + size] = value
                if final and not end:
                    continue
                if start:
                    key, value = states[number, :, :, : start + size]  # (K, start + T, Dh)
                key, value = key[None].contiguous(), value[None].contiguous()
                if final:  # of which only the last token is wanted
                    mask = self.mask(torch.tensor([start + size], device=self.device), start + size)
                    mixed.append(attend_once(query[None, :, -1], key, value, mask, layer.scaling))
                else:
                    mixed.append(self.attend(query[None], key, value, layer.scaling, start).reshape(size, -1))
            if not final:
                x = layer.rest(x, torch.cat(mixed), users)
        if not mixed:
            return None
        last = torch.tensor([stop - 1 for stop, end in zip(stops, ends, strict=True) if end], device=self.device)
        users = self.users([name for name, end in zip(adapters, ends, strict=True) if end])
        return self.logits(layer.rest(x[last], torch.cat(mixed), users))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, start: int = 0) -> Tensor:
        """Causal attention of T positions from `start` on: query (R, H, T, Dh), key and value (R, K, start + T, Dh)
        -> (R, T, H, Dh)."""
        (R, H, T, Dh), K, S = query.shape, key.shape[1], key.shape[2]
        if self.dtype == torch.bfloat16 and self.device.type == "cpu" and S <= CPU_BLOCK_LENGTH:
            grouped = by_position(query.unflatten(1, (K, H // K))).mul_(scaling)  # (R*K, T*G, Dh)
            key, value = key.reshape(R * K, S, Dh), value.reshape(R * K, S, Dh)
            if start:
                scores = torch.bmm(grouped, key.mT)
                scores[..., start:].add_(future(T, H // K, grouped))
                mixed = torch.bmm(scores.softmax(-1), value)
            else:
                mixed = attend_in_blocks(grouped, key, value)
            return mixed.view(R, K, T, H // K, Dh).transpose(1, 2)
        seen = None
        if start:
            seen = torch.ones(T, S, dtype=torch.bool, device=self.device).tril(start)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=not start, scale=scaling, enable_gqa=True
        )
        return mixed.transpose(1, 2)

    def step(
        self, racks: Sequence[Tensor], tokens: list[int], lengths: list[int], adapters: Sequence[str | None]
    ) -> Tensor:
        """The next token of every row of some racks (L, 2, R, K, width, Dh), whose rows hold `lengths` columns.

        Tokens, lengths and adapters in the order of the racks' rows. Logits (N, V), float32.
        """
        positions = torch.tensor(lengths, device=self.device)
        rotation, users = self.rotation(positions[:, None]), self.users(adapters)
        lanes, first = [], 0
        for rack in racks:
            rows = slice(first, first + rack.shape[2])
            first = rows.stop
            # Whole blocks of columns, at least one of them never visible: the attention kernel then rounds alike
            # whoever shares the batch (measured on CPU: equal to the last bit in multiples of 32, not otherwise).
            width = room_for(max(lengths[rows]))
            mask = self.mask(positions[rows] + 1, width)
            lanes.append((rows, torch.arange(rack.shape[2], device=self.device), positions[rows], width, mask))
        x = F.embedding(torch.tensor(tokens, device=self.device), self.embedding)  # (N, D)
        for number, layer in enumerate(self.layers):
            heads = layer.heads(x, rotation, users)  # (N, H + 2K, Dh)
            mixed = []
            for rack, (rows, row, columns, width, mask) in zip(racks, lanes, strict=True):
                states = rack[number]  # (2, R, K, width, Dh)
                states[:, row, :, columns] = heads[rows, layer.H :].view(-1, 2, layer.K, layer.Dh)
                key, value = states[0, :, :, :width], states[1, :, :, :width]
                mixed.append(attend_once(heads[rows, : layer.H], key, value, mask, layer.scaling))
            x = layer.rest(x, mixed[0] if len(mixed) == 1 else torch.cat(mixed), users)
        return self.logits(x)

    def users(self, adapters: Sequence[str | None]) -> Users:
        """The rows of each adapter, from the adapter of each row (None: none)."""
        names = sorted({name for name in adapters if name is not None})
        return [
            (name, torch.tensor([i for i, own in enumerate(adapters) if own == name], device=self.device))
            for name in names
        ]

    def mask(self, lengths: Tensor, width: int) -> Tensor:
        """(R, 1, 1, width), additive: the first `lengths` columns of each row are visible."""
        mask = torch.zeros(len(lengths), width, dtype=self.dtype, device=self.device)
        mask.masked_fill_(torch.arange(width, device=self.device) >= lengths[:, None], torch.finfo(self.dtype).min)
        return mask[:, None, None]

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (N, 1, Dh) of positions (R, T), N = R * T."""
        cos, sin = self.rotary(positions, self.dtype)
        return cos.flatten(0, 1), sin.flatten(0, 1)

    def prompt_states(self, prompt: list[int], adapter: str | None = None) -> Iterator[Tensor]:
        """What each layer in turn makes of a whole prompt, (T, D), the last for `logits`; the cache stays as it is."""
        T = len(prompt)
        rotation, users = self.rotation(torch.arange(T, device=self.device)[None]), self.users([adapter] * T)
        x = F.embedding(torch.tensor(prompt, device=self.device), self.embedding)  # (T, D)
        for layer in self.layers:
            heads = layer.heads(x, rotation, users).view(1, T, -1, layer.Dh).transpose(1, 2)  # (1, H + 2K, T, Dh)
            query, key, value = heads.split((layer.H, layer.K, layer.K), dim=1)
            mixed = self.attend(query, key.contiguous(), value.contiguous(), layer.scaling)
            x = layer.rest(x, mixed.reshape(T, -1), users)
            yield x

    def logits(self, x: Tensor) -> Tensor:
        """x (R, D), not normed yet -> (R, V) float32."""
        return self.head(rms_norm(x, self.norm, self.eps)).float()
