"""What a SmolLM model can be: its configuration, presets, and how many parameters and operations they amount to.

A configuration is also one of the five native ones (Llama, Qwen2, Qwen3, Mixtral, Qwen3-MoE): `to_native` and
`from_native` translate, and what no native architecture can express is refused.
"""

import copy
import math
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

NATIVE_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    config.model_type: config for config in (LlamaConfig, Qwen2Config, Qwen3Config, MixtralConfig, Qwen3MoeConfig)
}
NATIVE_ARCHITECTURES = {
    kind: config.__name__.replace("Config", "ForCausalLM") for kind, config in NATIVE_CONFIGS.items()
}
# Fields that the native architectures have under the same name.
SHARED_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings attention_dropout "
    "initializer_range use_cache pad_token_id bos_token_id eos_token_id dtype"
).split()
MOE_FIELDS = "num_experts_per_tok router_aux_loss_coef output_router_logits".split()
# Training-only settings: they travel in config.json as extra keys, which other readers ignore.
EXTRA_FIELDS = ("residual_dropout",)
MOE_EXTRA_FIELDS = ("capacity_factor", "router_z_loss_coef")
# What is at least 1 (of experts, where there are any).
SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings num_experts num_experts_per_tok moe_intermediate_size"
).split()
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# For fields that __post_init__ fills in: whoever reads a configuration finds a value (of experts, where there are any).
UNSET: Any = None


class SmolConfig(PreTrainedConfig):
    """Shape and training settings of a model; names are transformers' own.

    The native architecture follows from the options: no experts gives Llama, `attention_bias` Qwen2, `qk_norm`
    Qwen3; experts give Mixtral, with `qk_norm` Qwen3-MoE. A combination that none of the five can express is a
    ValueError, so that every model can be saved as a native directory.

    Args:
        num_key_value_heads: key/value heads; None means one per query head.
        head_dim: width of a head; None means hidden_size / num_attention_heads.
        rope_parameters: {"rope_theta": 10000.0, "rope_type": "default" | "linear" | "llama3" | "yarn", ...}.
        qk_norm: RMSNorm over head_dim on queries and keys before the rotation.
        attention_bias: bias on q, k and v (not on the output projection), as in Qwen2.
        residual_dropout: dropout on the output of attention and MLP before it is added to the residual stream.
        num_experts: None for a dense model.
        moe_intermediate_size: width of one expert; None means intermediate_size.
        norm_topk_prob: renormalise the weights of the chosen experts; None means True for k > 1, False for k = 1
            (renormalising a single weight would make it 1 and leave the router without a gradient).
        capacity_factor: in training an expert takes at most ceil(capacity_factor * k * tokens / E) slots of a
            micro-batch; None is dropless. Evaluation and generation are always dropless.
        router_aux_loss_coef, router_z_loss_coef: weights of the load-balancing loss (Switch Transformer,
            arXiv:2101.03961, 1.0 at perfect balance, mean over layers) and of the z-loss (ST-MoE, arXiv:2202.08906).
        initializer_range: standard deviation of all weight matrices and embeddings (GPT-2, Llama).
        depth_scaled_init: divide that by sqrt(2 L) for the two projections that write to the residual stream (GPT-2).
        mimetic_init: start o_proj as the transpose of v_proj, so that whatever a head attends to is copied to its
            output from the first step (after arXiv:2305.09828). Copying from the context, which tool calls need,
            then forms early: after 0.3M tokens of the tiny world's notes 100 % of single names, against 21 % at most.
    """

    model_type = "smol"  # of the class; an instance carries its native type
    attribute_map = {"num_local_experts": "num_experts"}
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "router_stats"]

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = UNSET
    head_dim: int = UNSET
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_parameters: dict[str, Any] = UNSET
    tie_word_embeddings: bool = True
    qk_norm: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    num_experts: int = UNSET
    num_experts_per_tok: int = UNSET
    moe_intermediate_size: int = UNSET
    norm_topk_prob: bool = UNSET
    capacity_factor: float | None = None
    router_aux_loss_coef: float = UNSET
    router_z_loss_coef: float = UNSET
    output_router_logits: bool = False
    initializer_range: float = 0.02
    mimetic_init: bool = False
    depth_scaled_init: bool = False
    use_cache: bool = True
    dtype: torch.dtype | None = None  # a name becomes one
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)
        self.check_sizes()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_experts:
            if self.num_experts_per_tok is None:
                self.num_experts_per_tok = min(2, self.num_experts)
            if self.moe_intermediate_size is None:
                self.moe_intermediate_size = self.intermediate_size
            if self.norm_topk_prob is None:
                self.norm_topk_prob = self.num_experts_per_tok > 1
            if self.router_aux_loss_coef is None:
                self.router_aux_loss_coef = 0.01
            if self.router_z_loss_coef is None:
                self.router_z_loss_coef = 0.001
        else:
            self.num_experts = self.num_experts_per_tok = self.moe_intermediate_size = self.norm_topk_prob = UNSET
            self.router_aux_loss_coef = self.router_z_loss_coef = 0.0
        super().__post_init__(**kwargs)
        # Theirs is a variable of the class alone; here it follows from the options of this instance.
        self.model_type = self.native_type()  # type: ignore[misc]
        self.check()

    def native_type(self) -> str:
        """The native architecture these options amount to; ValueError where none of the five has them all."""
        if self.qk_norm and self.attention_bias:
            raise ValueError("qk_norm=True with attention_bias=True: no native architecture has both; drop one")
        if not self.num_experts:
            return "qwen3" if self.qk_norm else "qwen2" if self.attention_bias else "llama"
        if self.attention_bias:
            raise ValueError("attention_bias=True with experts: Mixtral and Qwen3-MoE have no q/k/v bias; drop it")
        if not self.qk_norm and not self.norm_topk_prob:
            raise ValueError(
                "norm_topk_prob=False without qk_norm: Mixtral always renormalises and Qwen3-MoE always has qk-norm; "
                "set qk_norm=True (Qwen3-MoE)"
            )
        return "qwen3_moe" if self.qk_norm else "mixtral"

    def check_sizes(self) -> None:
        """ValueError for a size below 1: before others are derived from it."""
        for name in SIZES:
            value = getattr(self, name)
            if value is not None and value < 1 and (name, value) != ("num_experts", 0):  # which is dense
                raise ValueError(f"{name} {value} must be at least 1")

    def check(self) -> None:
        """ValueError for a value the model cannot have; every message names the setting, the value and the limit."""
        if self.hidden_size % self.num_attention_heads and self.native_type() == "llama":
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary positions turn pairs of channels")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported: SwiGLU has 'silu'")
        if (rope_type := self.rope_parameters["rope_type"]) not in ROPE_TYPES:
            raise ValueError(f"rope_type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
        if self.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("partial_rotary_factor other than 1 is not supported")
        for name in ("attention_dropout", "residual_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} {getattr(self, name)} is outside [0, 1)")
        if self.initializer_range < 0:
            raise ValueError(f"initializer_range {self.initializer_range} is negative: it is a standard deviation")
        if self.num_experts:
            self.check_experts()
        try:
            self.to_native()  # whose own checks would otherwise come at the first save
        except (StrictDataclassError, TypeError, KeyError) as error:
            raise ValueError(" ".join(str(error.args[0]).split())) from error

    def check_experts(self) -> None:
        """`check` of what only a model with experts has."""
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} is outside [1, {self.num_experts}]")
        if self.num_experts_per_tok == 1 and self.norm_topk_prob:
            raise ValueError(
                "num_experts_per_tok=1 with norm_topk_prob=True leaves the router without a gradient; "
                "set norm_topk_prob=False and qk_norm=True (Qwen3-MoE)"
            )
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ValueError(f"capacity_factor {self.capacity_factor} must be positive, or None for dropless")

    def to_native(self) -> PreTrainedConfig:
        """The same model as a Llama, Qwen2, Qwen3, Mixtral or Qwen3-MoE config (training-only settings as extras)."""
        kind = self.native_type()
        values = {name: getattr(self, name) for name in (*SHARED_FIELDS, *EXTRA_FIELDS)}
        values["rope_parameters"] = dict(self.rope_parameters)
        if self.num_experts:
            values |= {name: getattr(self, name) for name in (*MOE_FIELDS, *MOE_EXTRA_FIELDS)}
        if kind == "mixtral":
            values |= {"num_local_experts": self.num_experts, "intermediate_size": self.moe_intermediate_size}
        if kind == "qwen3_moe":
            values |= {name: getattr(self, name) for name in ("num_experts", "moe_intermediate_size", "norm_topk_prob")}
        return NATIVE_CONFIGS[kind](architectures=[NATIVE_ARCHITECTURES[kind]], **values)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"model_type": self.native_type()}

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the *native* config.json into `save_directory`."""
        self.to_native().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    # Theirs spells out cache_dir, revision, ... which `kwargs` passes on as they are: every call of theirs fits.
    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> "SmolConfig":
        """Read the config.json of a native directory; ValueError for a setting this model does not implement."""
        config_dict, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_dict(config_dict, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "SmolConfig":
        return super().from_dict(from_native(config_dict), **kwargs)


def from_native(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Arguments of SmolConfig for the contents of a native config.json.

    The dict is first read by the native config class, so that absent keys get *that* architecture's defaults and
    old spellings (rope_theta, rope_scaling, torch_dtype) keep their meaning.
    """
    kind = config_dict.get("model_type")
    if kind not in NATIVE_CONFIGS:
        raise ValueError(f"model_type {kind!r} is not supported; supported: {', '.join(NATIVE_CONFIGS)}")
    native = NATIVE_CONFIGS[kind].from_dict(dict(config_dict))
    refuse_unsupported(native)
    values = {name: getattr(native, name, None) for name in SHARED_FIELDS}
    values |= {name: getattr(native, name) for name in EXTRA_FIELDS if hasattr(native, name)}
    values |= {"qk_norm": kind in ("qwen3", "qwen3_moe"), "attention_bias": kind == "qwen2"}
    if kind in ("mixtral", "qwen3_moe"):
        names = ("num_experts", *MOE_FIELDS, *MOE_EXTRA_FIELDS)
        values |= {name: getattr(native, name) for name in names if hasattr(native, name)}
        values["moe_intermediate_size"] = getattr(native, "moe_intermediate_size", native.intermediate_size)
        values["norm_topk_prob"] = getattr(native, "norm_topk_prob", True)
    if getattr(native, "quantization_config", None) is not None:
        values["quantization_config"] = native.quantization_config
    return values


def refuse_unsupported(native: PreTrainedConfig) -> None:
    """ValueError naming the first setting of a native config that would change the result and is not implemented."""
    kind = native.model_type
    unsupported = {
        "sliding_window": getattr(native, "sliding_window", None),
        "attention_bias": getattr(native, "attention_bias", False),  # native meaning: the output projection as well
        "mlp_bias": getattr(native, "mlp_bias", False),
        "mlp_only_layers": getattr(native, "mlp_only_layers", None),
        "decoder_sparse_step": getattr(native, "decoder_sparse_step", 1) != 1,
        "router_jitter_noise": getattr(native, "router_jitter_noise", 0.0),
        "layer_types": any(kind != "full_attention" for kind in getattr(native, "layer_types", None) or []),
    }
    if kind == "qwen2":  # its bias is always there and is the one we have
        unsupported.pop("attention_bias")
    for name, active in unsupported.items():
        if active:
            value = getattr(native, name)
            raise ValueError(f"{kind} checkpoint has {name}={value}, which this model does not implement")


def _shape(D: int, F: int, L: int, H: int, K: int, V: int, T: int, **options: Any) -> dict[str, Any]:
    """Width, MLP width, layers, query heads, key heads, vocabulary, context, and whatever else differs."""
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    return dict(zip(names.split(), (D, F, L, H, K, V), strict=True)) | {"max_position_embeddings": T} | options


def _theta(value: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": value}


_TINY = _shape(
    *(256, 704, 4, 8, 4, 2048, 1024),
    qk_norm=True,
    initializer_range=0.05,  # small widths learn faster from larger weights
    mimetic_init=True,
)
_QWEN = 151_936  # Qwen's padded embedding: its tokenizers have 151,646 (Qwen1.5) or 151,665 (Qwen2.5) entries
_TOP2 = {"num_experts_per_tok": 2, "capacity_factor": 1.25, "tie_word_embeddings": False}
# Sizes are (total / active per token) parameters; a test counts them on the real modules.
PRESETS: dict[str, dict[str, Any]] = {
    # 3.5M: the quickstart on two CPU cores
    "tiny": _TINY,
    # 5.6M / 3.5M: two experts together are as wide as the dense MLP
    "tiny-moe": _TINY | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 352},
    # 50M
    "smollama": _shape(512, 1536, 8, 8, 2, 50304, 512, attention_dropout=0.1, residual_dropout=0.1),
    # 134,515,008, 361,821,120 and 1,711,376,384: SmolLM2 exactly
    "smollm2-135m": _shape(576, 1536, 30, 9, 3, 49152, 8192, rope_parameters=_theta(1e5), initializer_range=1 / 24),
    "smollm2-360m": _shape(960, 2560, 32, 15, 5, 49152, 8192, rope_parameters=_theta(1e5)),
    "smollm2-1.7b": _shape(2048, 8192, 24, 32, 32, 49152, 8192, rope_parameters=_theta(1.3e5)),
    # 6.9B
    "base": _shape(4096, 11008, 32, 32, 8, _QWEN, 4096, tie_word_embeddings=False),
    # 20.3B / 7.0B: eight experts, top-2 (these can never be "7B active of 30B": total stays below 4 x active)
    "moe": _shape(4096, 11008, 32, 32, 8, _QWEN, 4096, num_experts=8, moe_intermediate_size=5632, **_TOP2),
    # 29.9B / 7.0B: sixteen experts, top-2
    "moe-30b-a7b": _shape(5120, 11008, 34, 40, 8, _QWEN, 4096, num_experts=16, moe_intermediate_size=3136, **_TOP2),
}


def preset_config(name: str, **overrides: Any) -> SmolConfig:
    """A named configuration with some fields replaced; ValueError naming the presets when `name` is not one."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; presets: {', '.join(PRESETS)}")
    return SmolConfig(**copy.deepcopy(PRESETS[name]) | overrides)  # nobody's change of a dict reaches the preset


def count_parameters(config: SmolConfig) -> tuple[int, int]:
    """(total, active per token) parameters by arithmetic alone; embeddings count as active."""
    D, Dh, L = config.hidden_size, config.head_dim, config.num_hidden_layers
    query, key = config.num_attention_heads * Dh, config.num_key_value_heads * Dh
    attention = 2 * D * query + 2 * D * key
    attention += (query + 2 * key) * config.attention_bias + 2 * Dh * config.qk_norm
    embeddings = config.vocab_size * D * (1 if config.tie_word_embeddings else 2)
    shared = embeddings + L * (attention + 2 * D) + D
    if not config.num_experts:
        total = shared + L * 3 * D * config.intermediate_size
        return total, total
    expert, router = 3 * D * config.moe_intermediate_size, D * config.num_experts
    return (
        shared + L * (router + config.num_experts * expert),
        shared + L * (router + config.num_experts_per_tok * expert),
    )


def flops_per_token(config: SmolConfig, sequence_length: int) -> int:
    """Training FLOPs (forward and backward, no recomputation) per token of a causal row of `sequence_length`.

    6 per matrix parameter a token meets (the embedding lookup is free, the head is not, experts count k times) plus
    attention: 12 per layer, query channel and attended position, of which a causal row has (T + 1) / 2 on average.
    """
    _, active = count_parameters(config)
    D, L, query = config.hidden_size, config.num_hidden_layers, config.num_attention_heads * config.head_dim
    norms = L * (2 * D + 2 * config.head_dim * config.qk_norm) + D
    biases = L * (query + 2 * config.num_key_value_heads * config.head_dim) * config.attention_bias
    lookup = 0 if config.tie_word_embeddings else config.vocab_size * D
    return 6 * (active - norms - biases - lookup) + 6 * L * query * (sequence_length + 1)
