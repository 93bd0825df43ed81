"""The other implementations, each built to the same shape and able to take our weights.

A peer is a module whose `forward(ids)` is the mean cross-entropy of predicting ids[:, 1:], computed the way its own
training loop computes it, and whose `copy_weights(ours)` makes it the same function as our model (nanochat's is another
function and has none).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from smol_config import SmolConfig
from smol_model import SmolForCausalLM

# --- transformers -------------------------------------------------------------------------------------------


class TransformersPeer(nn.Module):
    """Llama, Qwen3, Mixtral or Qwen3-MoE of transformers in fp32, with its default kernels."""

    def __init__(self, config: SmolConfig, attention: str | None = None):
        super().__init__()
        native = config.to_native()
        self.model = AutoModelForCausalLM.from_config(native, dtype=torch.float32, attn_implementation=attention)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss  # Trainer switches the cache off, too

    def copy_weights(self, ours: SmolForCausalLM) -> None:
        self.model.load_state_dict(ours.state_dict())  # the names are the same


# --- litgpt -------------------------------------------------------------------------------------------------


class LitgptPeer(nn.Module):
    """litgpt's GPT and the chunked cross-entropy of its pretraining script. Needs the package."""

    def __init__(self, config: SmolConfig):
        from litgpt.config import Config
        from litgpt.model import GPT
        from litgpt.utils import chunked_cross_entropy

        super().__init__()
        experts = {"n_expert": config.num_experts, "n_expert_per_token": config.num_experts_per_tok}
        width = config.moe_intermediate_size or config.intermediate_size
        self.cross_entropy = chunked_cross_entropy
        self.model = GPT(
            Config(
                name="benchmark",
                block_size=config.max_position_embeddings,
                n_layer=config.num_hidden_layers,
                n_embd=config.hidden_size,
                vocab_size=config.vocab_size,
                padded_vocab_size=config.vocab_size,
                norm_class_name="RMSNorm",
                norm_eps=config.rms_norm_eps,
                norm_qk=config.qk_norm,
                parallel_residual=False,
                n_head=config.num_attention_heads,
                head_size=config.head_dim,
                n_query_groups=config.num_key_value_heads,
                rope_base=int(config.rope_parameters["rope_theta"]),
                rotary_percentage=1.0,
                bias=False,
                mlp_class_name="LLaMAMoE" if config.num_experts else "LLaMAMLP",
                intermediate_size=width,
                **({"moe_intermediate_size": width, **experts} if config.num_experts else {}),
            )
        )
        self.model.apply(self.model._init_weights)
        if config.tie_word_embeddings:
            self.model.lm_head.weight = self.model.transformer.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.cross_entropy(self.model(ids)[:, :-1], ids[:, 1:])

    def copy_weights(self, ours: SmolForCausalLM) -> None:
        theirs = {
            "lm_head.weight": ours.lm_head.weight,
            "transformer.wte.weight": ours.model.embed_tokens.weight,
            "transformer.ln_f.weight": ours.model.norm.weight,
        }
        for number, layer in enumerate(ours.model.layers):
            block, attention = f"transformer.h.{number}.", layer.self_attn
            qkv = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
            theirs |= {
                f"{block}norm_1.weight": layer.input_layernorm.weight,
                f"{block}norm_2.weight": layer.post_attention_layernorm.weight,
                f"{block}attn.qkv.weight": torch.cat(qkv),
                f"{block}attn.proj.weight": attention.o_proj.weight,
            }
            if ours.config.qk_norm:
                theirs |= {
                    f"{block}attn.norm_q.weight": attention.q_norm.weight,
                    f"{block}attn.norm_k.weight": attention.k_norm.weight,
                }
            if ours.config.num_experts:
                theirs[f"{block}mlp.gate.weight"] = layer.mlp.gate.weight
            for prefix, (gate, up, down) in feed_forwards(layer.mlp):
                names = (f"{block}mlp.{prefix}{name}.weight" for name in ("fc_1", "fc_2", "proj"))
                theirs |= dict(zip(names, (gate, up, down), strict=True))
        self.model.load_state_dict(theirs)


def feed_forwards(mlp: nn.Module) -> list[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """("", weights) of a dense MLP of ours, or ("experts.e.", weights) of each expert: gate, up (F, D), down (D, F)."""
    if not hasattr(mlp, "experts"):
        return [("", (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight))]
    stacked = zip(mlp.experts.gate_up_proj, mlp.experts.down_proj, strict=True)
    return [(f"experts.{e}.", (*gate_up.chunk(2), down)) for e, (gate_up, down) in enumerate(stacked)]


# --- plain PyTorch, as teaching repositories write it -------------------------------------------------------


class PlainNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotations(config: SmolConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all positions, each (positions, 1, Dh)."""
    channels = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    frequencies = 1.0 / config.rope_parameters["rope_theta"] ** channels
    angles = torch.arange(config.max_position_embeddings)[:, None] * frequencies.repeat(2)
    return angles.cos()[:, None], angles.sin()[:, None]


def repeat_kv(x: Tensor, groups: int) -> Tensor:
    """(B, T, K, Dh) -> (B, T, K * groups, Dh)."""
    B, T, K, Dh = x.shape
    return x[:, :, :, None, :].expand(B, T, K, groups, Dh).reshape(B, T, K * groups, Dh)


class PlainAttention(nn.Module):
    def __init__(self, config: SmolConfig):
        super().__init__()
        D, self.head_dim = config.hidden_size, config.head_dim
        query, kv = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.groups = query // kv
        self.q_proj = nn.Linear(D, query, bias=False)
        self.k_proj = nn.Linear(D, kv, bias=False)
        self.v_proj = nn.Linear(D, kv, bias=False)
        self.o_proj = nn.Linear(query, D, bias=False)
        self.q_norm = PlainNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = PlainNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        query = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim))
        key = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim))
        value = self.v_proj(x).view(B, T, -1, self.head_dim)
        query, key = query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin
        query, key, value = (
            part.transpose(1, 2).to(value.dtype)
            for part in (query, repeat_kv(key, self.groups), repeat_kv(value, self.groups))
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # (B, H, T, Dh)
        return self.o_proj(mixed.transpose(1, 2).reshape(B, T, -1))


class PlainMLP(nn.Module):
    def __init__(self, D: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(D, width, bias=False)
        self.up_proj = nn.Linear(D, width, bias=False)
        self.down_proj = nn.Linear(width, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PlainMoE(nn.Module):
    """Every token is repeated k times; a loop over experts picks its rows out by a mask and puts results back."""

    def __init__(self, config: SmolConfig):
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        sizes = config.hidden_size, config.moe_intermediate_size
        self.experts = nn.ModuleList([PlainMLP(*sizes) for _ in range(config.num_experts)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, x.shape[-1])  # (N, D)
        weights, chosen = self.gate(tokens).float().softmax(-1).topk(self.top_k, dim=-1)  # (N, k)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        repeated, flat = tokens.repeat_interleave(self.top_k, dim=0), chosen.view(-1)
        mixed = torch.empty_like(repeated)
        for number, expert in enumerate(self.experts):
            mine = flat == number
            mixed[mine] = expert(repeated[mine]).to(mixed.dtype)
        mixed = (mixed.view(*weights.shape, -1) * weights[..., None]).sum(1)
        return mixed.view_as(x)


class PlainBlock(nn.Module):
    def __init__(self, config: SmolConfig):
        super().__init__()
        self.self_attn = PlainAttention(config)
        sizes = config.hidden_size, config.intermediate_size
        self.mlp = PlainMoE(config) if config.num_experts else PlainMLP(*sizes)
        self.input_layernorm = PlainNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = PlainNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class PlainPeer(nn.Module):
    """minimind-style: the straightforward decoder, all logits of the step at once and F.cross_entropy on them."""

    def __init__(self, config: SmolConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([PlainBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = PlainNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        cos, sin = rotations(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x, T = self.embed_tokens(ids), ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:T], self.sin[:T])
        logits = self.lm_head(self.norm(x)).float()  # (B, T, V)
        return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))

    def copy_weights(self, ours: SmolForCausalLM) -> None:
        theirs = {name.removeprefix("model."): value for name, value in ours.state_dict().items()}
        for number, layer in enumerate(ours.model.layers if ours.config.num_experts else ()):
            block = f"layers.{number}.mlp."
            del theirs[f"{block}experts.gate_up_proj"], theirs[f"{block}experts.down_proj"]
            for prefix, weights in feed_forwards(layer.mlp):
                names = (f"{block}{prefix}{name}_proj.weight" for name in ("gate", "up", "down"))
                theirs |= dict(zip(names, weights, strict=True))
        self.load_state_dict(theirs)


# --- nanochat -----------------------------------------------------------------------------------------------


def weightless_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


class NanochatBlock(nn.Module):
    """Attention whose queries and keys are normed after the rotation, and a squared-ReLU MLP; norms without weights."""

    def __init__(self, config: SmolConfig):
        super().__init__()
        D, self.head_dim = config.hidden_size, config.head_dim
        query, kv = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        width = 3 * config.intermediate_size // 2  # two matrices as large as SwiGLU's three; nanochat's 4 D at 135M
        self.groups = query // kv
        self.q, self.k, self.v = (nn.Linear(D, size, bias=False) for size in (query, kv, kv))
        self.o = nn.Linear(query, D, bias=False)
        self.up, self.down = nn.Linear(D, width, bias=False), nn.Linear(width, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = weightless_norm(x)
        query, key, value = (
            projection(normed).unflatten(-1, (-1, self.head_dim)) for projection in (self.q, self.k, self.v)
        )
        query, key = (
            weightless_norm((part * cos + rotate_half(part) * sin).to(value.dtype)) for part in (query, key)
        )
        key, value = repeat_kv(key, self.groups), repeat_kv(value, self.groups)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # (B, H, T, Dh)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(weightless_norm(x))).square())


class NanochatPeer(nn.Module):
    """nanochat-style (its first public form, October 2025), with as many weights in each block as ours.

    A norm behind the embedding, a head of its own that starts at zero, all logits of the step in float32 at once, held
    within 15 by a tanh. Its Muon is left out: what that costs per step is nothing in its batches of half a million
    tokens and much in the batches here.
    """

    def __init__(self, config: SmolConfig):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([NanochatBlock(config) for _ in range(config.num_hidden_layers)])
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for matrix in (self.head, *(part for block in self.blocks for part in (block.o, block.down))):
            nn.init.zeros_(matrix.weight)
        cos, sin = rotations(config)
        self.register_buffer("cos", cos.bfloat16(), persistent=False)
        self.register_buffer("sin", sin.bfloat16(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x, T = weightless_norm(self.embed(ids)), ids.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = 15 * torch.tanh(self.head(weightless_norm(x)).float() / 15)  # (B, T, V)
        return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


PEERS = {"transformers": TransformersPeer, "litgpt": LitgptPeer, "minimind": PlainPeer, "nanochat": NanochatPeer}
