"""int8 and int4 checkpoints in the compressed-tensors format, which vLLM, transformers and serve_hf.py load.

    python -m smolkit.quantize --model_path out/quickstart/sft --quantization int8

Weights are rounded to the nearest step: `int8` is W8A8 (a scale per output channel; inputs of a layer are rounded
while serving, with a scale per token), `int4` is W4A16 (a scale for every 128 inputs of a channel, or 64 or 32 where
the width is no multiple; inputs stay as they are). Embeddings, output head and norms keep their dtype. Models with
experts are refused: quantised experts need kernels that only some processors have, and a directory whose experts are
not quantised is one that transformers 5.19 loads with random experts.

A directory is made once for each source and kept under `$SMOLLM_CACHE/quantized`; `quantization.json` in it says how
large it is and how far the weights moved.
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from smol_config import SmolConfig
from smol_model import SmolForCausalLM
from smolkit.checkpoints import (
    UNREADABLE,
    load_weights,
    one_line,
    plain_card,
    quantization_of,
    read_config,
    require_all_weights,
    require_checkpoint,
)
from smolkit.errors import UserError, run
from smolkit.files import default_cache_dir, sync, write_json

logger = logging.getLogger(__name__)

PRESETS = {"int8": "W8A8", "int4": "W4A16"}  # names of compressed-tensors
GROUP_SIZES = (128, 64, 32)
IGNORE = ["lm_head"]  # shares its weight with the embedding in small models
REPORT = "quantization.json"
INT8_PAYS_FROM = 2**22  # weights of an MLP layer, see Int8Product.pays
# What a loader needs beside the weights: nothing of the run, or the copy would look like a finished one itself.
COPIED = (
    "generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "vocab.txt merges.txt *.model *.jinja"
).split()

# --- making -------------------------------------------------------------------------------------------------


def cached(source: str | Path, method: str) -> Path:
    """The quantised directory of a checkpoint, made now if it is not there. Raises `UserError`."""
    source = require_checkpoint(source)
    digest = hashlib.sha256((source / "config.json").read_bytes())
    for file in sorted(source.glob("*.safetensors")):
        state = file.stat()
        digest.update(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}".encode())
    target = default_cache_dir() / "quantized" / f"{source.resolve().name}-{method}-{digest.hexdigest()[:16]}"
    if not (target / REPORT).is_file():
        quantize(source, target, method)
    logger.info("%s", describe_report(target))
    return target


def quantize(source: str | Path, target: str | Path, method: str, name: str | None = None) -> dict[str, Any]:
    """Write the quantised checkpoint to the new or empty directory `target`, whole or not at all; returns its report.

    `name`: what the report and the card call the source, where its path says nothing."""
    from compressed_tensors import ModelCompressor  # heavy; only this needs it

    source, target = require_checkpoint(source), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already: remove it or choose another directory")
    _check_source(source)
    model = load_weights(source, AutoModelForCausalLM, dtype="auto", local_files_only=True, trust_remote_code=False)
    size = _choose_group_size(source, model, method)
    count, moved = _set_scales(model, method, size)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)

    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model.save_pretrained(aside)
        compressor.update_config(aside)
        for pattern in COPIED:
            for file in source.glob(pattern):
                if not (aside / file.name).exists() and not file.name.endswith(".index.json"):
                    shutil.copy2(file, aside / file.name)
        before, after = (sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (source, aside))
        report = {
            "source": name or str(source),
            "method": method,
            "scheme": PRESETS[method],
            "group_size": size,
            "layers": count,
            "bytes_before": before,
            "bytes": after,
            "weight_error": moved,  # |quantised - original| / |original| over all quantised weights
        }
        write_json(aside / REPORT, report)
        card = plain_card(target.name, read_config(source), report)
        (aside / "README.md").write_text(card, encoding="utf-8")
        for file in aside.iterdir():
            sync(file)
        try:
            os.rename(aside, target)
        except OSError:  # another process was faster: its directory is the same
            if not (target / REPORT).is_file():
                raise
        sync(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return report


def _check_source(source: Path) -> None:
    if quantization_of(source):
        raise UserError(f"{source} is quantised already: serve it without --quantization")
    if read_config(source).num_experts:
        raise UserError(
            f"{source} has experts, which cannot be quantised to int8 or int4 here: their kernels exist on few "
            "processors, and without them next to nothing is saved; serve it without --quantization"
        )


def _choose_group_size(source: Path, model: nn.Module, method: str) -> int | None:
    """The largest group that divides the width of every layer; None for int8, whose scales are per channel."""
    if method == "int8":
        return None
    widths = {layer.in_features for _, layer in _layers(model)}
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in widths):
            return size
    raise UserError(
        f"{source}: int4 needs layers whose widths are multiples of {GROUP_SIZES[-1]}, this model has "
        f"{', '.join(map(str, sorted(widths)))}: use int8"
    )


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """What is quantised: attention and dense MLP."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith("_proj"):
            yield name, module


def _set_scales(model: nn.Module, method: str, group_size: int | None) -> tuple[int, float]:
    """Attach scales, in the model's dtype; returns the number of layers and the relative error of all their weights."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.lifecycle import fake_quantize
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = preset_name_to_scheme(PRESETS[method], ["Linear"])
    if group_size is not None:
        scheme.weights.group_size = group_size
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=IGNORE)
    apply_quantization_config(model, config)
    squared = moved = 0.0
    layers = list(_layers(model))
    with torch.no_grad():
        for _, layer in layers:
            weight = layer.weight.data = layer.weight.float()  # bf16 quotients would round to the wrong step
            groups = weight.unflatten(1, (-1, group_size or weight.shape[1]))  # (O, groups, size)
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
            stored = layer.get_parameter("weight_scale")
            stored.copy_(scale)
            rounded = fake_quantize(weight, stored.float(), zero, scheme.weights)
            squared += float(weight.square().sum())
            moved += float((rounded - weight).square().sum())
    return len(layers), (moved / squared) ** 0.5


def describe_report(directory: Path) -> str:
    """One line about a quantised directory."""
    report = json.loads((directory / REPORT).read_text(encoding="utf-8"))
    group = f", groups of {report['group_size']}" if report["group_size"] else ""
    return (
        f"{report['method']} ({report['scheme']}{group}) in {directory}: {report['bytes'] / 2**20:,.1f} MiB instead of "
        f"{report['bytes_before'] / 2**20:,.1f}, weights moved by {report['weight_error']:.2%}"
    )


# --- loading into our model ---------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """x (..., I) -> (..., O): weights and inputs in int8, products summed exactly in int32 (W8A8).

    weight (O, I) int8 and scale (O,) float32. The scale of a token's inputs is its largest magnitude over 127.5.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.scale, self.bias = (nn.Buffer(weight), nn.Buffer(scale), bias)

    def forward(self, x: Tensor) -> Tensor:
        """In plain operations, for any device."""
        steps, token_scale = quantize_tokens(x)
        y = steps.float() @ self.weight.float().T * (token_scale * self.scale)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Int8Product:
    """Several `Int8Linear` with the same input as one product of oneDNN (CPU): (N, I) -> (N, O)."""

    def __init__(self, layers: Sequence[Int8Linear]):
        biases = [layer.bias for layer in layers if layer.bias is not None]  # all have one, or none
        self.bias = torch.cat(biases).float() if biases else None
        self.scale = torch.cat([layer.scale for layer in layers])
        weight = torch.cat([layer.weight for layer in layers])
        self.weight = torch.ops.onednn.qlinear_prepack(weight, None)
        self.zero = torch.zeros(len(weight), dtype=torch.int64)

    @staticmethod
    def available() -> bool:
        """Whether oneDNN's int8 products run on instructions made for them."""
        capabilities = torch.cpu.get_capabilities()
        return torch.backends.mkldnn.is_available() and bool(capabilities.get("avx512_vnni"))

    @classmethod
    def pays(cls, config: SmolConfig) -> bool:
        """Whether the layers are large enough for int8 to be faster than bf16 on a CPU, rounding of inputs included.

        One core, bf16's time over int8's for 1, 16 and 128 rows: 0.6, 0.6 and 1.2 for layers of 576 x 1536, 1.4, 1.2
        and 0.8 for 1024 x 2816, 3.0, 1.8 and 1.6 for 2048 x 5632.
        """
        return cls.available() and config.hidden_size * config.intermediate_size >= INT8_PAYS_FROM

    def __call__(self, x: Tensor) -> Tensor:
        steps, size = quantize_tokens(x)
        # bias, output scale and zero point, dtype, what follows
        how: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
        y = torch.ops.onednn.qlinear_pointwise(steps, 1.0, 0, self.weight, self.scale, self.zero, *how).mul_(size)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., I) -> int8 steps of the same shape and the size of a step (..., 1), float32."""
    x = x.float()
    size = x.abs().amax(-1, keepdim=True).div_(127.5).clamp_min_(torch.finfo(torch.float32).tiny)
    return (x / size).round_().clamp_(-128, 127).to(torch.int8), size


def check_vllm_kernels(directory: str | Path, method: str | None) -> None:
    """`UserError` where vLLM's build for CPUs cannot multiply with int8 or int4 weights, or does it wrongly.

    `method`: what `directory` will be rounded to; None: what it holds already, if it is one of the two.
    Measured in vLLM 0.32 against exact sums: without VNNI, products of int8 are added in 16 bits and overflow, 13 to
    16 % off for normally distributed inputs, 25 to 27 % for large ones; its build for AVX2 has no int4 product at all.
    """
    capabilities = torch.cpu.get_capabilities()
    if torch.cuda.is_available() or capabilities.get("architecture") != "x86_64":
        return
    if method is None and (scheme := quantization_of(directory)):
        try:
            method = _method_of(Path(directory), scheme)
        except UserError:  # a scheme that vLLM may know
            return
    instead = "serve with serve_hf.py, or weights that are not quantised"
    if method == "int8" and not (capabilities.get("avx512_vnni") or capabilities.get("avx_vnni")):
        raise UserError(f"int8: this CPU has no VNNI, without which vLLM's int8 products overflow; {instead}")
    if method == "int4" and not capabilities.get("avx512_f"):
        raise UserError(f"int4: vLLM's int4 products need AVX-512, which this CPU does not have; {instead}")


def load_quantized(
    directory: str | Path, dtype: torch.dtype, keep_int8: bool | None = None, device: torch.device | None = None
) -> SmolForCausalLM:
    """A directory of this module (or of others, in the same two schemes) as our model, still on the CPU.

    `keep_int8`: int8 layers become `Int8Linear`; else they, like int4 ones always, are multiplied out to `dtype`.
    None: whichever is faster on `device` (default: this CPU). `UserError` for other schemes, and for weights that are
    damaged or not all there.
    """
    directory = Path(directory)
    config = read_config(directory)
    method = _method_of(directory, config.quantization_config)
    if keep_int8 is None:
        keep_int8 = (device is None or device.type == "cpu") and Int8Product.pays(config)
    del config.quantization_config
    state = _read_tensors(directory)
    kept, plain = {}, {}
    for name, value in state.items():
        layer, _, part = name.rpartition(".")
        if part not in ("weight_scale", "weight_shape", "weight_packed") and f"{layer}.weight_scale" not in state:
            plain[name] = value
        elif part in ("weight", "weight_packed"):
            scale = state[f"{layer}.weight_scale"].float()
            steps = value if part == "weight" else _unpack(value, state[f"{layer}.weight_shape"])
            plain[f"{layer}.weight"] = _multiplied_out(steps, scale, state.get(f"{layer}.weight_g_idx")).to(dtype)
            kept[layer] = (steps, scale[:, 0])
        elif part == "bias":
            plain[name] = value
    loaded: Any = SmolForCausalLM.from_pretrained(
        None, config=config, state_dict=plain, dtype=dtype, output_loading_info=True
    )
    model, info = loaded
    require_all_weights(info, directory)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    if method == "int8" and keep_int8:
        for name, (steps, scale) in kept.items():
            parent, _, child = name.rpartition(".")
            layer = getattr(model.get_submodule(parent), child)
            setattr(model.get_submodule(parent), child, Int8Linear(steps, scale, layer.bias))
    return model


def _method_of(directory: Path, raw: Any) -> str:
    from compressed_tensors.quantization import QuantizationConfig

    if isinstance(raw, dict) and raw.get("quant_method") == "compressed-tensors":
        groups = QuantizationConfig.model_validate(raw).config_groups.values()
        for method, (bits, inputs) in {"int8": (8, True), "int4": (4, False)}.items():
            if all(
                group.weights.num_bits == bits
                and group.weights.type == "int"
                and group.weights.symmetric
                and (group.input_activations is not None) == inputs
                for group in groups
            ):
                return method
    raise UserError(f"{directory}: quantised in a way that only serve_vllm.py may know; here: {', '.join(PRESETS)}")


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            state |= load_file(file)
        except UNREADABLE as error:
            raise UserError(f"{directory}: cannot read {file.name}: {one_line(error)}") from error
    return state


def _multiplied_out(steps: Tensor, scale: Tensor, group_of: Tensor | None) -> Tensor:
    """steps (O, I) times their scales (O, groups), float32: (O, I).

    group_of (I,): the group of each input, where groups were made of inputs of like importance (`actorder: group`);
    None, or -1 where it was never set: groups are neighbours.
    """
    if group_of is not None and not (group_of < 0).any():
        return steps * scale[:, group_of.long()]
    groups = steps.unflatten(1, (scale.shape[1], -1))  # (O, groups, size)
    return (groups * scale[:, :, None]).flatten(1)


def _unpack(packed: Tensor, shape: Tensor) -> Tensor:
    """Eight unsigned 4-bit steps of each int32, lowest bits first -> (O, I) int8 from -8 to 7."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    steps = (packed.unsqueeze(-1) >> shifts) & 15
    return (steps - 8).to(torch.int8).flatten(1)[:, : int(shape[1])]


# --- command ------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Make a quantised directory, or say where it is already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="checkpoint directory")
    parser.add_argument("--quantization", required=True, choices=list(PRESETS))
    parser.add_argument("--output_dir", help="new directory; default: the cache")
    args = parser.parse_args(argv)
    if args.output_dir is None:
        print(describe_report(cached(args.model_path, args.quantization)))
        return
    quantize(args.model_path, args.output_dir, args.quantization)
    print(describe_report(Path(args.output_dir)))


if __name__ == "__main__":
    run(main)
