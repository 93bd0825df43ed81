"""LoRA adapters, for every script that trains or reads one: PEFT's configuration, the base under it, merging."""

import importlib.util
import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast

from smol_config import SmolConfig
from smol_model import SmolForCausalLM
from smolkit.arguments import AdapterArguments, DpoArguments, refuse_spread_adapters
from smolkit.checkpoints import build_model, merge_adapter, plain_card, save_adapter, save_final
from smolkit.errors import UserError
from smolkit.files import write_json
from smolkit.runs import complete, fingerprint, leave
from smolkit.shards import checksum

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MERGED_FROM = "merged_from.json"  # in a merged directory: of which adapter
_SHAPE = "lora_r lora_alpha lora_dropout lora_target use_dora use_rslora".split()  # what a trained adapter has already


def lora_config(stage: AdapterArguments, config: SmolConfig, base: str) -> LoraConfig:
    """PEFT's configuration for --lora_*; the MoE router is never adapted.

    Raises `UserError` for a --lora_target that `config`, of the model in `base`, does not have.
    """
    modules = [name for name in stage.lora_target if name != "experts"]
    experts = "experts" in stage.lora_target
    if experts and not config.num_experts:
        raise UserError(f"--lora_target experts: {base} has no experts")
    if "all-linear" in modules and len(modules) > 1:
        raise UserError("--lora_target all-linear covers the module names beside it; leave them out")
    targets: str | list[str] = modules
    if "all-linear" in modules:  # for MoE models PEFT would count the router and the experts among them
        targets = ATTENTION if config.num_experts else "all-linear"
    else:
        _check_targets(modules, config, base)
    return LoraConfig(
        r=stage.lora_r,
        lora_alpha=stage.lora_alpha,  # type: ignore[arg-type]  # a fraction is fine, whatever its hint says
        lora_dropout=stage.lora_dropout,
        use_dora=stage.use_dora,
        use_rslora=stage.use_rslora,
        target_modules=targets,
        target_parameters=EXPERTS if experts else None,
        task_type="CAUSAL_LM",
    )


def _check_targets(names: list[str], config: SmolConfig, base: str) -> None:
    """`UserError` unless every name is that of linear layers: PEFT leaves out what it does not find beside others."""
    with torch.device("meta"):
        skeleton = SmolForCausalLM(config)
    kinds = torch.nn.Linear | torch.nn.Embedding
    layers = [path for path, module in skeleton.named_modules() if isinstance(module, kinds)]
    layers = [path for path in layers if path != "lm_head"]  # whose adapter TRL's trainers would not see
    for name in names:
        if not any(f".{path}".endswith(f".{name}") for path in layers):
            known = sorted({path.rpartition(".")[2] for path in layers})
            raise UserError(f"--lora_target {name}: {base} has no such layers to adapt, but {', '.join(known)}")


def policy_of(stage: DpoArguments) -> tuple[str, str | None]:
    """The whole model that --model_path leads to, and the adapter on it when the policy is one.

    Raises `UserError` for flags of an adapter where none is trained, or one that has what they say already.
    """
    assert stage.model_path, "validated"
    base = adapter_base(stage.model_path)
    if base and stage.use_lora:
        raise UserError(f"--use_lora: {stage.model_path} is an adapter already and is trained on; leave --use_lora out")
    if base or stage.use_lora:
        refuse_spread_adapters(stage.expert_parallel_size)
    for item in () if stage.use_lora else fields(AdapterArguments):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if getattr(stage, item.name) == default:
            continue
        if not base:
            raise UserError(f"--{item.name} is for an adapter, and none is trained: add --use_lora, or leave it out")
        if item.name in _SHAPE:
            raise UserError(f"--{item.name}: the adapter in {stage.model_path} has its own and keeps it; leave it out")
    return (base, stage.model_path) if base else (stage.model_path, None)


def adapter_base(directory: str | Path) -> str | None:
    """The base model that an adapter directory names; None for any other directory. `UserError` when it is gone."""
    directory = Path(directory)
    if (directory / "config.json").is_file() or not (directory / "adapter_config.json").is_file():
        return None
    base = named_base(directory)
    if base is None or not (Path(base) / "config.json").is_file():
        raise UserError(f"{directory} adapts {base}, which is not there; put it there or merge the adapter first")
    return base


def named_base(adapter: str | Path) -> str | None:
    """The model that an adapter was trained on, as PEFT noted it; None where it noted none."""
    settings = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    return settings["base_model_name_or_path"]


def serving_pairs(model_config: SmolConfig, directory: str | Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A LoRA adapter as it is served beside the weights: A (r, I) and B (O, r) times its scale, by module name.

    PEFT reads the directory, patterns of ranks and scales included, into a model without weights. Raises `UserError`
    for what is more than a low-rank addition to linear layers.
    """
    config = LoraConfig.from_pretrained(str(directory))
    for what, there in (
        ("DoRA", config.use_dora),
        ("adapted experts", config.target_parameters),
        ("whole modules", config.modules_to_save),
        ("trained biases", config.bias != "none"),
    ):
        if there:
            raise UserError(f"{directory}: {what} cannot be served beside other adapters; merge it with --adapter")
    with torch.device("meta"):
        skeleton = SmolForCausalLM(model_config)
    inject_adapter_in_model(config, skeleton, low_cpu_mem_usage=True)
    weights = load_peft_weights(str(directory), device="cpu")
    weights = {name.removeprefix("base_model.model."): value for name, value in weights.items()}
    pairs = {}
    for name, module in skeleton.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        first, second = (weights.pop(f"{name}.{part}.weight", None) for part in ("lora_A", "lora_B"))
        expected = (module.in_features, module.out_features)
        if first is None or second is None or (first.shape[1], len(second)) != expected:
            raise UserError(f"{directory}: does not fit {name} of this model; it was made for another")
        pairs[name] = (first, second * module.scaling["default"])
    if weights:
        raise UserError(f"{directory}: {next(iter(weights))} cannot be served beside the weights; merge with --adapter")
    return pairs


def check_quantised() -> None:
    """`UserError` where a base in 4 bits cannot be trained on."""
    if not torch.cuda.is_available():
        raise UserError("--qlora needs a CUDA GPU, and torch sees none: leave it out (LoRA keeps the base in bf16)")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--qlora needs bitsandbytes: pip install -r requirements-qlora.txt")


def build_base(
    stage: AdapterArguments, config: SmolConfig, directory: str, dtype: torch.dtype, attention: str, index: int
) -> PreTrainedModel:
    """The model under an adapter: as it is, or its linear layers in 4 bits on GPU `index` (--qlora)."""
    if not stage.qlora:
        return build_model(config, directory, dtype, attention)
    check_quantised()
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return SmolForCausalLM.from_pretrained(
        directory,
        config=config,
        dtype=torch.bfloat16,
        attn_implementation=attention,
        quantization_config=four_bits,
        use_safetensors=True,
        device_map={"": index},
    )


def merged_directory(stage: AdapterArguments, output_dir: str) -> str | None:
    """Where --merge writes; None without it. `UserError` for a place that holds something else: the base model, say."""
    directory = stage.merged_dir or (f"{output_dir.rstrip('/')}-merged" if stage.merge else None)
    if directory is None:
        return None
    place = Path(directory)
    if place.resolve() == Path(output_dir).resolve():
        raise UserError(f"--merged_dir {directory}: is the --output_dir, where the adapter goes; name another")
    if place.exists() and not (place / MERGED_FROM).is_file() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"--merged_dir {directory}: holds something that --merge has not written; name another")
    return directory


def write_merged(
    directory: str | Path,
    base: str | Path,
    adapter: str | Path,
    config: SmolConfig,
    tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype,
) -> None:
    """Write `base` with the adapter added to its weights, in fp32 and from the files: only the final rounding is lost.

    `UserError` when the adapter does not fit.
    """
    merged = merge_adapter(build_model(config, base, torch.float32), adapter)
    card = plain_card(Path(directory).name, config, {"base": base, "adapter": adapter})
    save_final(merged, merged.state_dict(), tokenizer, directory, dtype, card)


@dataclass(frozen=True)
class Merge:
    """What --merge asks for: a base model with an adapter added to its weights, in `directory`; None asks nothing."""

    directory: str | None
    base: str
    adapter: str
    config: SmolConfig
    tokenizer: PreTrainedTokenizerFast
    dtype: torch.dtype

    def write(self) -> None:
        """Write it and say so."""
        if self.directory is None:
            return
        write_merged(self.directory, self.base, self.adapter, self.config, self.tokenizer, self.dtype)
        write_json(Path(self.directory) / MERGED_FROM, self.origin())
        print(f"merged model in {self.directory}")

    def origin(self) -> dict[str, str]:
        """What tells the merged model from one of another adapter, or in another dtype."""
        marks = {"adapter": fingerprint(self.adapter), "settings": checksum(Path(self.adapter) / "adapter_config.json")}
        return marks | {"dtype": str(self.dtype)}

    def write_if_missing(self) -> None:
        """For a finished run that was asked for it later: unless the directory holds this adapter's model already."""
        if self.directory is None:
            return
        try:
            made_of = json.loads((Path(self.directory) / MERGED_FROM).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            made_of = None  # nothing there, or nothing that says what it is
        if made_of != self.origin() or not (Path(self.directory) / "config.json").is_file():
            self.write()


def finish_adapter(trainer: Any, config: SmolConfig, facts: dict[str, Any], merge: Merge) -> None:
    """Write the adapter's directory, mark the run as finished, merge (call it on all processes).

    config: of the base. facts: of the run, for its model card.
    """
    save_adapter(trainer)
    if trainer.args.should_save:
        complete(trainer.args, trainer.state.global_step, config, facts)
        merge.write()
    leave(trainer)
