"""Sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055): a Mixture-of-Experts that starts as a dense checkpoint.

Every expert of a layer is a copy of its MLP, the router starts at random, everything else is taken over. The weights
of the chosen experts sum to 1, so that equal experts, however they are chosen, give what the MLP gave: before its first
step the new model is the dense one. From then on each expert sees other tokens.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from smol_config import EXTRA_FIELDS, SHARED_FIELDS, SmolConfig
from smol_model import SmolForCausalLM
from smolkit.arguments import NewModelArguments, PretrainArguments
from smolkit.checkpoints import UNREADABLE, build_model, one_line, read_config, resolve_model, typed_fields
from smolkit.errors import UserError

# What --model_overrides may change of an upcycled model: how it is trained, not what it computes.
TRAINING_FIELDS = "capacity_factor router_aux_loss_coef router_z_loss_coef attention_dropout residual_dropout".split()


def resolve_upcycled(
    stage: PretrainArguments, new: NewModelArguments
) -> tuple[SmolConfig, PreTrainedTokenizerFast, str]:
    """`checkpoints.resolve_model` for --upcycle_from: configuration of the new model, tokenizer and its directory."""
    overrides = new.overrides()
    if wrong := [name for name in overrides if name not in TRAINING_FIELDS]:
        raise UserError(
            f"--model_overrides {wrong[0]} with --upcycle_from: the shape is the checkpoint's; "
            f"what may change is {', '.join(TRAINING_FIELDS)}"
        )
    start = (stage.upcycle_from, replace(new, model_overrides=None), stage.tokenizer_path, stage.tokenizer_type)
    dense, tokenizer, directory = resolve_model(*start, chat=False)
    return upcycled_config(dense, stage, overrides), tokenizer, directory


def upcycled_config(dense: SmolConfig, stage: PretrainArguments, overrides: dict[str, Any]) -> SmolConfig:
    """The configuration with experts as wide as the MLP of `dense`: Mixtral of a Llama, Qwen3-MoE of a Qwen3.

    Raises `UserError` for a checkpoint that no native architecture with experts can express.
    """
    if dense.num_experts:
        raise UserError(f"--upcycle_from {stage.upcycle_from} has experts already: use --base_model")
    if dense.attention_bias:
        raise UserError(
            f"--upcycle_from {stage.upcycle_from} is a Qwen2 model: no native architecture has experts and biases "
            "on q, k and v; start from a Llama or Qwen3 checkpoint"
        )
    kept = {name: getattr(dense, name) for name in (*SHARED_FIELDS, *EXTRA_FIELDS, "qk_norm")}
    experts, chosen = stage.upcycle_shape()
    try:
        return SmolConfig(**kept | {"num_experts": experts, "num_experts_per_tok": chosen} | typed_fields(overrides))
    except UNREADABLE as error:
        raise UserError(one_line(error)) from error


def build_upcycled(
    config: SmolConfig,
    directory: str | Path,
    dtype: torch.dtype,
    attention: str = "sdpa",
    noise: float = 0.0,
) -> SmolForCausalLM:
    """The model of `config` (`upcycled_config`) with the weights of the dense checkpoint `directory`.

    noise: added to each expert's weights as Gaussian noise of this share of their standard deviation. The routers and
    the noise come from torch's global generator.
    """
    dense = dict(build_model(read_config(directory), directory, dtype).named_parameters())
    model = build_model(config, None, dtype, attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp.experts." in name:
                mlp = name.partition("experts.")[0]
                parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
                parameter.copy_(torch.cat([dense[f"{mlp}{part}.weight"] for part in parts]))  # (rows, cols) → (E, …)
                if noise:
                    parameter.add_(torch.randn_like(parameter), alpha=noise * parameter.float().std().item())
            elif not name.endswith("mlp.gate.weight"):
                parameter.copy_(dense[name])
    return model
