"""GGUF files for llama.cpp and Ollama, written tensor by tensor from a native checkpoint directory.

What llama.cpp expects, and a native directory has otherwise (its converter and loader are the reference):

- Mixtral is its `llama` architecture with experts. Experts of a layer are one tensor (E, F, D).
- `llama` turns neighbouring channels (2i, 2i+1) where transformers turns (i, i + Dh/2): the rows of q and k are
  reordered. The qwen architectures turn as transformers does and keep their order.
- Frequencies of rope type llama3 are a tensor of divisors, `rope_freqs.weight`; linear and yarn are settings.
- Padding rows of the vocabulary need a token each; they are marked as unused and as never to be sampled.

What it cannot express is refused. Vectors (norms, biases) and routers stay in float32 in every file.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from safetensors import safe_open
from tokenizers import models
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from smol_config import SmolConfig, count_parameters
from smol_model import RotaryPositions
from smolkit.chat import IM_END, chat_stop_ids
from smolkit.checkpoints import UNREADABLE, document_end_id, load_config, load_tokenizer, one_line, require_range
from smolkit.errors import UserError
from smolkit.files import atomic_writer
from smolkit.tokenizer import PRE_TOKENIZERS, llama_cpp_name

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mixtral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
}
TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
SUPPRESS_TOKENS = "tokenizer.ggml.suppress_tokens"  # known to llama.cpp, not yet named in the package
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)(\..+)")


@dataclass(frozen=True)
class GgufReport:
    """What was written; `kept_f16` names tensors whose rows do not divide into blocks of the type asked for."""

    path: Path
    tensors: int
    size: int
    kept_f16: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{self.path}: {self.tensors} tensors, {self.size / 2**20:,.1f} MiB"
        if self.kept_f16:
            text += f"; in f16, as their rows are no multiple of 32: {', '.join(self.kept_f16)}"
        return text


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: `load` reads its values as they belong there, in the dtype of the checkpoint."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    load: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size

    def values(self) -> np.ndarray:
        """The values as the file has them; `UserError` where the type cannot hold them."""
        values = self.load().float()
        require_range(self.name, values, torch.float16 if self.kind == GGMLQuantizationType.F16 else torch.float32)
        return gguf.quants.quantize(values.contiguous().numpy(), self.kind)


def write_gguf(source: str | Path, target: str | Path, dtype: str, title: str | None = None) -> GgufReport:
    """Write the checkpoint directory `source` as the GGUF file `target`.

    dtype: f32, f16, bf16 or q8_0 (blocks of 32 as int8 with an f16 scale). Holds one tensor at a time. `UserError` for
    a model or tokenizer that llama.cpp would read as another one; then nothing is written.
    """
    source, target = Path(source), Path(target)
    tokenizer = load_tokenizer(source)
    config = load_config(source, tokenizer, source)
    check_expressible(config, source)
    kind, file_type = TYPES[dtype]
    tensors = list(plan_tensors(source, config, kind))
    with atomic_writer(target, "wb") as file:
        writer = GGUFWriter(file.name, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.native_type()]])
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(title or source.resolve().name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_shape(writer, config)
        add_tokenizer(writer, tokenizer, config.vocab_size, source)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tqdm(tensors, desc=target.name, unit=" tensors"):
            writer.write_tensor_data(tensor.values())
        writer.close()
    kept = tuple(t.name for t in tensors if len(t.shape) > 1 and t.kind == GGMLQuantizationType.F16 != kind)
    return GgufReport(target, len(tensors), target.stat().st_size, kept)


def check_expressible(config: SmolConfig, source: Path) -> None:
    """`UserError` naming the first thing that llama.cpp would compute differently."""
    kind, rope = config.native_type(), config.rope_parameters
    problem = None
    if getattr(config, "quantization_config", None) is not None:
        problem = "it is quantised already; export the checkpoint it was made from"
    elif kind == "qwen3_moe" and not config.norm_topk_prob:
        problem = "norm_topk_prob is false, but llama.cpp's qwen3moe always renormalises the chosen experts' weights"
    elif kind == "qwen2" and config.head_dim * config.num_attention_heads != config.hidden_size:
        problem = "llama.cpp's qwen2 knows no head_dim other than hidden_size / num_attention_heads"
    elif rope["rope_type"] == "llama3" and ARCHITECTURES[kind] != MODEL_ARCH.LLAMA:
        problem = f"rope_type llama3 with {kind}: llama.cpp reads its factors for Llama and Mixtral only"
    elif rope["rope_type"] == "yarn" and not rope.get("truncate", True):
        problem = "yarn with truncate=false, but llama.cpp always rounds the range of channels"
    if problem:
        raise UserError(f"{source} cannot become a GGUF file: {problem}")


# --- settings -----------------------------------------------------------------------------------------------


def add_shape(writer: GGUFWriter, config: SmolConfig) -> None:
    """The settings of the model."""
    rope = config.rope_parameters
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    experts = config.num_experts
    writer.add_feed_forward_length(config.moe_intermediate_size if experts else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
        # llama.cpp scales by this on top of its own 0.1 ln(factor) + 1 (yarn, arXiv:2309.00071, section 3.4).
        _, scale = RotaryPositions(config).init_frequencies(torch.device("cpu"))
        writer.add_rope_scaling_attn_factors(scale / (0.1 * math.log(rope["factor"]) + 1.0))


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, rows: int, source: Path) -> None:
    """Vocabulary with a type per entry, merges, special ids and chat template; `rows` of the embedding."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for byte-level BPE
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer, source))
    known = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    types = [
        TokenType.UNUSED if i not in known
        else TokenType.NORMAL if i not in added
        else TokenType.CONTROL if added[i].special
        else TokenType.USER_DEFINED
        for i in range(rows)
    ]  # fmt: skip
    writer.add_token_list([known.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    if padding := [i for i in range(rows) if i not in known]:
        writer.add_array(SUPPRESS_TOKENS, padding)
    ends, automatic = chat_stop_ids(tokenizer), tokenizer("").input_ids
    if not ends:
        raise UserError(f"{source}: the tokenizer has no token that ends a text, and llama.cpp would never stop")
    # Without one llama.cpp takes entry 11. What separates documents in training is what a text begins after.
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else document_end_id(tokenizer)
    begins = automatic[:1] == [bos]
    writer.add_bos_token_id(ends[0] if bos is None else bos)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(automatic[begins:] == [tokenizer.eos_token_id])
    writer.add_eos_token_id(ends[0])
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if IM_END in tokenizer.get_vocab():
        writer.add_eot_token_id(tokenizer.get_vocab()[IM_END])
    if tokenizer.chat_template:
        writer.add_chat_template(without_generation_marks(str(tokenizer.chat_template)))


def pre_tokenizer_name(tokenizer: PreTrainedTokenizerFast, source: Path) -> str:
    """llama.cpp's name for how this tokenizer cuts text; `UserError` where it would arrive at other ids."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model, name = backend["model"], llama_cpp_name(tokenizer)
    if model["type"] != "BPE" or "ByteLevel" not in str(backend["decoder"]) or name is None:
        raise UserError(
            f"{source}: only byte-level BPE tokenizers that cut text as {', '.join(PRE_TOKENIZERS)} do can be "
            f"exported; this one is a {model['type']} with another way"
        )
    normalizer = backend["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":  # llama.cpp leaves composing characters to the caller
        raise UserError(f"{source}: the tokenizer normalises text ({normalizer['type']}), which llama.cpp does not")
    # Under this name llama.cpp takes a word whole if it is an entry, whatever the merges say.
    if model.get("ignore_merges", False) != (name == "llama-bpe"):
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        plain = models.BPE(vocab=model["vocab"], merges=[(left, right) for left, right in pairs])
        odd = next((token for token in model["vocab"] if len(plain.tokenize(token)) != 1), None)
        if odd is not None:
            raise UserError(f"{source}: no merges lead to the entry {odd!r}, so llama.cpp would find other ids")
    return name


def without_generation_marks(template: str) -> str:
    """The chat template without `{% generation %}`, which only training needs and other programs do not know.

    A condition that is always true stands in its place, so that white space is cut as before.
    """
    template = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", template)


# --- tensors ------------------------------------------------------------------------------------------------


def plan_tensors(source: Path, config: SmolConfig, kind: GGMLQuantizationType) -> Iterator[GgufTensor]:
    """The tensors of the file in order, by the names on disk; `UserError` unless these are all of the model's."""
    architecture = ARCHITECTURES[config.native_type()]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    groups: dict[str, list[tuple[int, Callable[[], Tensor], tuple[int, ...]]]] = {}
    for key, load, shape in stored_tensors(source):
        if key.endswith("rotary_emb.inv_freq") or (key == "lm_head.weight" and config.tie_word_embeddings):
            continue  # computed anew, or the embedding once more
        expert = _EXPERT.fullmatch(key)
        name = names.get_name(expert[1] + expert[3] if expert else key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"{source}: {key} has no place in llama.cpp's {gguf.MODEL_ARCH_NAMES[architecture]}")
        groups.setdefault(name, []).append((int(expert[2]) if expert else 0, load, shape))
    if config.rope_parameters["rope_type"] == "llama3":
        divisors = rope_divisors(config)
        yield GgufTensor("rope_freqs.weight", tuple(divisors.shape), GGMLQuantizationType.F32, lambda: divisors)
    found = 0
    for name, parts in groups.items():
        parts.sort(key=lambda part: part[0])
        shape = ((len(parts),) if "_exps" in name else ()) + parts[0][2]
        found += math.prod(shape)
        yield GgufTensor(name, shape, type_of(name, shape, kind), _loader(name, [load for _, load, _ in parts], config))
    expected, _ = count_parameters(config)
    if found != expected:
        raise UserError(f"{source}: the weights have {found:,} parameters, but config.json says {expected:,}")


def stored_tensors(source: Path) -> Iterator[tuple[str, Callable[[], Tensor], tuple[int, ...]]]:
    """(name, function that reads it, shape) of all tensors in a directory's safetensors."""
    index = source / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for file in files:
        if not (source / file).is_file():
            raise UserError(f"{source}: {file} is missing, which {index.name} names")
        try:
            handle = safe_open(source / file, framework="pt")
        except UNREADABLE as error:
            raise UserError(f"{source}: cannot read {file}: {one_line(error)}") from error
        for key in handle.keys():
            yield key, partial(handle.get_tensor, key), tuple(handle.get_slice(key).get_shape())


def type_of(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type of a tensor in a file of `kind`: float32 for vectors and routers; f16 where blocks do not fit."""
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


def _loader(name: str, loads: list[Callable[[], Tensor]], config: SmolConfig) -> Callable[[], Tensor]:
    if "_exps" in name:
        return lambda: torch.stack([load() for load in loads])  # (E, F, D), or (E, D, F) for down
    if ARCHITECTURES[config.native_type()] == MODEL_ARCH.LLAMA and re.search(r"\.attn_[qk]\.", name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        return lambda: interleave(loads[0](), heads)
    return loads[0]


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads * Dh, ...) in the order of rotation by neighbours: channel i of a half becomes channel 2i or 2i+1."""
    halves = weight.unflatten(0, (heads, 2, -1))  # (heads, 2, Dh/2, ...)
    return halves.transpose(1, 2).flatten(0, 2)


def rope_divisors(config: SmolConfig) -> Tensor:
    """(Dh / 2,): what rope type llama3 divides each frequency by."""
    scaled, _ = RotaryPositions(config).init_frequencies(torch.device("cpu"))
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (channels / config.head_dim)
    return (plain / scaled.double()).float()
