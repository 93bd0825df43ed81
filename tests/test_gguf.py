"""GGUF files: every tensor against transformers' reading of the same directory, what other readers make of them,
and llama.cpp itself."""

import json
import math
import random
import re
import shutil
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from smol_config import SmolConfig
from smol_model import SmolForCausalLM
from smolkit.chat import CHAT_TEMPLATE, END_OF_TEXT, IM_END, IM_START, add_chat_tokens, save_tokenizer
from smolkit.errors import UserError
from smolkit.gguf_file import without_generation_marks, write_gguf
from smolkit.ollama import GO_TEMPLATE, modelfile
from smolkit.tokenizer import PRE_TOKENIZERS, train_bpe

BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = SCALED | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "llama": {},
    "llama-untied-wide-heads": {"tie_word_embeddings": False, "head_dim": 32, "rms_norm_eps": 1e-4},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 2.0}},
    "llama-llama3": {"rope_parameters": LLAMA3},
    "llama-yarn": {"rope_parameters": SCALED | {"rope_type": "yarn"}},
    "llama-yarn-attention": {"rope_parameters": SCALED | {"rope_type": "yarn", "attention_factor": 1.3}},
    "qwen2": {"attention_bias": True, "tie_word_embeddings": False},
    "qwen2-yarn": {"attention_bias": True, "rope_parameters": SCALED | {"rope_type": "yarn"}},
    "qwen3": {"qk_norm": True, "head_dim": 24},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS | {"qk_norm": True, "head_dim": 32, "tie_word_embeddings": False},
}
PADDING = 7  # rows of the embedding beyond the tokenizer
TEXTS = [
    "the cat sat on 12345 mats",
    "  It's I'LL 3½ x+=1;\n\n",
    "你好，世界2024！the猫",
    "naïve\t\tHTTPServer 'tail' \n end  ",
]


def corpus(lines: int = 400) -> list[str]:
    draw = random.Random(0)
    words = "the cat dog sat on mat 12 345 你好 世界 red blue house it's we'll x+=1 running naïve".split()
    return [" ".join(draw.choices(words, k=12)) for _ in range(lines)]


def make_tokenizer(pre_tokenizer: str = "qwen2") -> PreTrainedTokenizerFast:
    tokenizer = train_bpe(corpus(), 330, pre_tokenizer, True, ())
    add_chat_tokens(tokenizer)
    return tokenizer


def build(directory: Path, case: str, tokenizer: PreTrainedTokenizerFast, **options) -> Path:
    """A checkpoint, in several files, with norms and biases that are not 1 and 0."""
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    config = SmolConfig(**BASE | {"vocab_size": len(tokenizer) + PADDING} | ids | CASES[case] | options)
    model = SmolForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory, max_shard_size="40KB")
    save_tokenizer(tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def checkpoints(tokenizer, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {case: build(root / case, case, tokenizer) for case in CASES}


def read(path: Path) -> tuple[dict[str, object], dict[str, np.ndarray], dict[str, str]]:
    """(settings, tensors in float32, their types) by the package's reader."""
    reader = gguf.GGUFReader(path)
    settings = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return settings, tensors, {t.name: t.tensor_type.name.lower() for t in reader.tensors}


def neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """The known reordering of q and k, row by row."""
    width = len(weight) // heads
    expected = np.empty_like(weight)
    for head in range(heads):
        for i in range(width // 2):
            expected[head * width + 2 * i] = weight[head * width + i]
            expected[head * width + 2 * i + 1] = weight[head * width + i + width // 2]
    return expected


def expected_tensors(directory: Path, case: str) -> dict[str, np.ndarray]:
    """What the file has to hold, from transformers' own model."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    config, result = model.config, {}
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = "output.weight"
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "mlp.gate": "ffn_gate_inp",
    }
    for layer in range(config.num_hidden_layers):
        for theirs, its in parts.items():
            for kind in ("weight", "bias"):
                names[f"model.layers.{layer}.{theirs}.{kind}"] = f"blk.{layer}.{its}.{kind}"
    for theirs, its in names.items():
        if theirs in weights:
            result[its] = weights[theirs]
            if case.startswith(("llama", "mixtral")) and ".attn_q." in its:
                result[its] = neighbours(weights[theirs], config.num_attention_heads)
            if case.startswith(("llama", "mixtral")) and ".attn_k." in its:
                result[its] = neighbours(weights[theirs], config.num_key_value_heads)
    for layer in range(config.num_hidden_layers if "moe" in case or "mixtral" in case else 0):
        fused = weights[f"model.layers.{layer}.mlp.experts.gate_up_proj"]  # (E, 2F, D)
        result[f"blk.{layer}.ffn_gate_exps.weight"] = fused[:, : fused.shape[1] // 2]
        result[f"blk.{layer}.ffn_up_exps.weight"] = fused[:, fused.shape[1] // 2 :]
        result[f"blk.{layer}.ffn_down_exps.weight"] = weights[f"model.layers.{layer}.mlp.experts.down_proj"]
    return result


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_that_of_the_checkpoint(case, checkpoints, tmp_path):
    report = write_gguf(checkpoints[case], tmp_path / "model.gguf", "f32")
    settings, found, _ = read(tmp_path / "model.gguf")
    expected = expected_tensors(checkpoints[case], case)
    divisors = found.pop("rope_freqs.weight", None)
    assert (divisors is not None) == (case == "llama-llama3")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert report.tensors == len(expected) + (divisors is not None) and report.kept_f16 == ()
    assert settings["general.architecture"] == {"mixtral": "llama", "qwen3_moe": "qwen3moe"}.get(
        case, case.split("-")[0]
    )


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_narrower_types_stay_within_their_bound(case, dtype, checkpoints, tmp_path):
    write_gguf(checkpoints[case], tmp_path / "model.gguf", dtype)
    _, found, types = read(tmp_path / "model.gguf")
    exact = [name for name, kind in types.items() if kind == "f32"]
    assert exact and all(name.endswith("norm.weight") or "ffn_gate_inp" in name for name in exact)
    for name, value in expected_tensors(checkpoints[case], case).items():
        if name in exact:
            np.testing.assert_array_equal(found[name], value)
            continue
        assert types[name] == dtype
        blocks = value.reshape(-1, 32)
        most = np.abs(blocks).max(axis=1, keepdims=True)
        bound = {
            "f16": np.abs(blocks) * 2.0**-11 + 2.0**-25,  # half a unit in the last of 11 bits, or a subnormal's
            "bf16": np.abs(blocks) * 2.0**-8,
            "q8_0": most / 127 / 2 + most * 2.0**-11,  # half a step, and the scale's own rounding to f16
        }[dtype]
        error = np.abs(found[name].reshape(-1, 32) - blocks)
        assert (error <= bound).all(), f"{name}: {error.max()}"
        assert error.max() > 0


def test_rows_that_fill_no_block_are_kept_in_f16_and_named(tokenizer, tmp_path):
    build(tmp_path / "odd", "llama", tokenizer, intermediate_size=48)
    report = write_gguf(tmp_path / "odd", tmp_path / "model.gguf", "q8_0")
    assert report.kept_f16 == ("blk.0.ffn_down.weight", "blk.1.ffn_down.weight")
    assert "blk.0.ffn_down.weight" in str(report) and read(tmp_path / "model.gguf")[2]["blk.0.ffn_up.weight"] == "q8_0"


def test_a_bf16_checkpoint_in_one_file_is_taken_exactly(tokenizer, tmp_path):
    build(tmp_path / "full", "llama", tokenizer)
    model = SmolForCausalLM.from_pretrained(tmp_path / "full").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    save_tokenizer(tokenizer, tmp_path / "bf16")
    write_gguf(tmp_path / "bf16", tmp_path / "model.gguf", "bf16")
    _, found, _ = read(tmp_path / "model.gguf")
    for name, value in expected_tensors(tmp_path / "bf16", "llama").items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_settings_of_the_model(checkpoints, tmp_path):
    write_gguf(checkpoints["qwen3_moe"], tmp_path / "moe.gguf", "f32", title="a name")
    settings = read(tmp_path / "moe.gguf")[0]
    expected = {
        "general.name": "a name",
        "general.type": "model",
        "qwen3moe.context_length": 128,
        "qwen3moe.embedding_length": 64,
        "qwen3moe.block_count": 2,
        "qwen3moe.attention.head_count": 4,
        "qwen3moe.attention.head_count_kv": 2,
        "qwen3moe.attention.key_length": 32,
        "qwen3moe.attention.value_length": 32,
        "qwen3moe.rope.dimension_count": 32,
        "qwen3moe.expert_count": 4,
        "qwen3moe.expert_used_count": 2,
        "qwen3moe.expert_feed_forward_length": 32,
    }
    assert {name: settings[name] for name in expected} == expected
    assert math.isclose(settings["qwen3moe.attention.layer_norm_rms_epsilon"], 1e-5, rel_tol=1e-6)
    assert settings["qwen3moe.rope.freq_base"] == 1e4

    write_gguf(checkpoints["llama-yarn-attention"], tmp_path / "yarn.gguf", "f32")
    settings = read(tmp_path / "yarn.gguf")[0]
    assert settings["llama.rope.scaling.type"] == "yarn" and settings["llama.rope.scaling.factor"] == 4
    assert settings["llama.rope.scaling.original_context_length"] == 32
    assert math.isclose(settings["llama.rope.scaling.attn_factor"], 1.3 / (1 + 0.1 * math.log(4)), rel_tol=1e-6)


def test_tokenizer_types_ids_and_template(checkpoints, tokenizer, tmp_path):
    write_gguf(checkpoints["llama"], tmp_path / "model.gguf", "f32")
    settings = read(tmp_path / "model.gguf")[0]
    tokens, types = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == settings["llama.vocab_size"] == len(tokenizer) + PADDING
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    by_type = {kind: {t for t, k in zip(tokens, types, strict=True) if k == kind} for kind in gguf.TokenType}
    assert by_type[gguf.TokenType.CONTROL] == {END_OF_TEXT, IM_START, IM_END}
    assert "<tool_call>" in by_type[gguf.TokenType.USER_DEFINED] and len(by_type[gguf.TokenType.USER_DEFINED]) == 4
    padding = list(range(len(tokenizer), len(tokens)))
    assert by_type[gguf.TokenType.UNUSED] == {f"[PAD{i}]" for i in padding}
    assert settings["tokenizer.ggml.suppress_tokens"] == padding
    ids = {"eos": IM_END, "eot": IM_END, "padding": END_OF_TEXT, "bos": END_OF_TEXT}
    for name, token in ids.items():
        assert tokens[settings[f"tokenizer.ggml.{name}_token_id"]] == token
    assert settings["tokenizer.ggml.add_bos_token"] is False and settings["tokenizer.ggml.add_eos_token"] is False
    assert settings["tokenizer.ggml.pre"] == "qwen2" and settings["tokenizer.ggml.model"] == "gpt2"
    assert "generation" not in settings["tokenizer.chat_template"].replace("add_generation_prompt", "")


def qwen(samples: Path, directory: Path) -> PreTrainedTokenizerFast:
    """Qwen2.5's tokenizer beside a small model with Qwen's padded embedding."""
    tokenizer = AutoTokenizer.from_pretrained(samples / "qwen2.5_tokenizer")
    shape = {"vocab_size": 151_936, "hidden_size": 32, "num_attention_heads": 2, "tie_word_embeddings": True}
    build(directory, "qwen2", tokenizer, **shape)
    return tokenizer


@pytest.mark.slow
def test_the_padded_vocabulary_of_qwen(samples, tmp_path):
    tokenizer = qwen(samples, tmp_path / "qwen")
    write_gguf(tmp_path / "qwen", tmp_path / "model.gguf", "q8_0")
    settings, found, _ = read(tmp_path / "model.gguf")
    tokens = settings["tokenizer.ggml.tokens"]
    assert len(tokens) == len(found["token_embd.weight"]) == 151_936 and len(set(tokens)) == 151_936
    assert settings["tokenizer.ggml.suppress_tokens"] == list(range(len(tokenizer), 151_936))
    assert settings["tokenizer.ggml.pre"] == "qwen2" and settings["tokenizer.ggml.add_bos_token"] is False
    assert tokens[settings["tokenizer.ggml.eos_token_id"]] == tokenizer.eos_token
    assert "TEMPLATE" not in modelfile(tmp_path / "model.gguf", tokenizer, 128)  # its own layout, not ours


def test_a_tokenizer_that_begins_texts_says_so(tokenizer, tmp_path):
    from tokenizers.processors import TemplateProcessing

    begun = make_tokenizer()
    begun.bos_token = END_OF_TEXT
    special = [(END_OF_TEXT, begun.bos_token_id)]
    begun.backend_tokenizer.post_processor = TemplateProcessing(single=f"{END_OF_TEXT} $A", special_tokens=special)
    write_gguf(build(tmp_path / "begun", "llama", begun), tmp_path / "model.gguf", "f32")
    assert AutoTokenizer.from_pretrained(tmp_path / "begun")("").input_ids == [begun.bos_token_id]
    settings = read(tmp_path / "model.gguf")[0]
    assert settings["tokenizer.ggml.add_bos_token"] is True and settings["tokenizer.ggml.add_eos_token"] is False
    assert settings["tokenizer.ggml.bos_token_id"] == begun.bos_token_id


def test_the_template_renders_the_same_without_its_marks(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "One."},
    ]
    plain = without_generation_marks(CHAT_TEMPLATE)
    for more in ({}, {"add_generation_prompt": True}, {"tools": [{"function": {"name": "f", "parameters": {}}}]}):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, **more)
        assert tokenizer.apply_chat_template(messages, tokenize=False, chat_template=plain, **more) == expected
    assert without_generation_marks("{% generation -%} a {%- endgeneration %}") == "{% if true -%} a {%- endif %}"


@pytest.mark.parametrize("case", [case for case in CASES if case in ("llama", "qwen2", "qwen3", "qwen3_moe")])
def test_transformers_reads_the_file_as_the_same_model(case, checkpoints, tmp_path):
    write_gguf(checkpoints[case], tmp_path / "model.gguf", "f32")
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    overlooked = {"head_dim": 24} if case == "qwen3" else {}  # transformers reads the key length for others only
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(checkpoints[case])(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", **overlooked)(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    ours, theirs = (AutoTokenizer.from_pretrained(d, **k) for d, k in (
        (checkpoints[case], {}), (tmp_path, {"gguf_file": "model.gguf"})
    ))  # fmt: skip
    for text in TEXTS:
        assert theirs(text).input_ids == ours(text).input_ids


@pytest.mark.parametrize(
    ("case", "options", "words"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3", {"rope_parameters": LLAMA3}, "llama3"),
        ("qwen2", {"head_dim": 32}, "head_dim"),
        ("llama", {"rope_parameters": SCALED | {"rope_type": "yarn", "truncate": False}}, "truncate"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused(case, options, words, tokenizer, tmp_path):
    build(tmp_path / "model", case, tokenizer, **options)
    with pytest.raises(UserError, match=words):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_tokenizers_are_refused(checkpoints, tokenizer, tmp_path):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    def refused(backend: Tokenizer, words: str) -> None:
        odd = PreTrainedTokenizerFast(tokenizer_object=backend)
        add_chat_tokens(odd)
        with pytest.raises(UserError, match=words):
            write_gguf(build(tmp_path / words.split()[0], "llama", odd), tmp_path / "model.gguf", "f32")

    refused(Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), "WordLevel")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Lowercase()
    refused(backend, "Lowercase")
    cut = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    cut.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    refused(cut, "another way")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "ab"])}  # an entry that no merge leads to
    whole = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    whole.pre_tokenizer, whole.decoder = PRE_TOKENIZERS["qwen2"](), decoders.ByteLevel()
    refused(whole, "merges")
    assert not (tmp_path / "model.gguf").exists()


def test_weights_that_do_not_fit_are_refused_and_leave_nothing(checkpoints, tmp_path):
    from safetensors.torch import load_file, save_file

    def changed(name: str, change) -> Path:
        shutil.copytree(checkpoints["mixtral"], tmp_path / name)
        index = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())["weight_map"]
        key = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
        file = tmp_path / name / index[key]
        weights = load_file(file)
        change(weights, key)
        save_file(weights, file)
        return tmp_path / name

    def refused(directory: Path, words: str, dtype: str = "f16") -> None:
        with pytest.raises(UserError, match=words):
            write_gguf(directory, tmp_path / "out" / "model.gguf", dtype)
        assert not any((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else True

    refused(changed("missing", lambda weights, key: weights.pop(key)), "parameters, but config.json says")
    refused(changed("foreign", lambda weights, key: weights.update(extra=weights[key].clone())), "extra has no place")
    broken = changed("partial", lambda weights, key: None)
    sorted(broken.glob("*.safetensors"))[-1].unlink()
    refused(broken, "is missing, which model.safetensors.index.json names")
    refused(changed("large", lambda weights, key: weights[key][0].fill_(1e5)), "use --dtype bf16")
    refused(changed("broken", lambda weights, key: weights[key][0].fill_(float("nan"))), "not finite", "f32")


# --- Ollama -------------------------------------------------------------------------------------------------

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Rome and Oslo?"},
    {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [
            {"function": {"name": "weather", "arguments": {"city": "Rome"}}},
            {"function": {"name": "weather", "arguments": {"city": "Oslo"}}},
        ],
    },
    {"role": "tool", "content": "sun"},
    {"role": "tool", "content": "snow"},
    {"role": "assistant", "content": "Sun in Rome, snow in Oslo."},
    {"role": "user", "content": "Thanks"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"The {name} in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name in ("weather", "time")
]
# Fills the template in as Ollama does: system text apart, messages and tools with the fields of its API.
GO_PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type Arguments map[string]any

func (a Arguments) String() string { b, _ := json.Marshal(a); return string(b) }

type Function struct {
	Name      string
	Arguments Arguments
}
type Call struct{ Function Function }
type Message struct {
	Role, Content string
	ToolCalls     []Call `json:"tool_calls"`
}
type Parameters struct {
	Type       string         `json:"type"`
	Required   []string       `json:"required,omitempty"`
	Properties map[string]any `json:"properties"`
}
type ToolFunction struct {
	Name        string     `json:"name"`
	Description string     `json:"description,omitempty"`
	Parameters  Parameters `json:"parameters"`
}

func (f *ToolFunction) String() string { b, _ := json.Marshal(f); return string(b) }

type Tool struct{ Function ToolFunction }
type Case struct {
	Messages []Message
	Tools    []Tool
}

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	text, err := os.ReadFile(os.Args[1])
	if err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Parse(string(text)))
	rendered := []string{}
	for _, asked := range cases {
		messages, system := asked.Messages, ""
		if messages[0].Role == "system" {
			system = messages[0].Content
		}
		var out Writer
		values := map[string]any{"System": system, "Messages": messages, "Tools": asked.Tools, "Response": ""}
		if err := parsed.Execute(&out, values); err != nil {
			panic(err)
		}
		rendered = append(rendered, string(out))
	}
	json.NewEncoder(os.Stdout).Encode(rendered)
}

type Writer []byte

func (w *Writer) Write(p []byte) (int, error) { *w = append(*w, p...); return len(p), nil }
"""


def test_modelfile(tokenizer, tmp_path):
    text = modelfile(tmp_path / "model.gguf", tokenizer, 128, {"temperature": 0.7, "repetition_penalty": 1.1})
    assert text.startswith("FROM ./model.gguf\n") and f'TEMPLATE """{GO_TEMPLATE}"""\n' in text
    parameters = [line for line in text.splitlines() if line.startswith("PARAMETER")]
    assert parameters == [
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
        "PARAMETER num_ctx 128",
        "PARAMETER temperature 0.7",
        "PARAMETER repeat_penalty 1.1",
    ]
    foreign = make_tokenizer()
    foreign.chat_template = "{{ messages[0].content }}"
    assert "TEMPLATE" not in modelfile(tmp_path / "model.gguf", foreign, 128)


TOOL_LINE = re.compile(r'^{"name": ?"\w+", ?"description".*$', re.MULTILINE)


@pytest.mark.skipif(not shutil.which("go"), reason="Ollama's templates are Go's: needs the go command")
def test_the_go_template_renders_as_the_chat_template(tokenizer, tmp_path):
    (tmp_path / "main.go").write_text(GO_PROGRAM)
    (tmp_path / "template").write_text(GO_TEMPLATE)
    asked = [CONVERSATION[:n] for n in (2, 5, 7)] + [CONVERSATION[1:2]]
    cases = [{"messages": messages, "tools": tools} for messages in asked for tools in (None, TOOLS[:1], TOOLS)]
    result = subprocess.run(
        ["go", "run", "main.go", "template"],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "GOFLAGS": "-mod=mod", "GO111MODULE": "off"},
    )
    assert result.returncode == 0, result.stderr
    for case, found in zip(cases, json.loads(result.stdout), strict=True):
        expected = tokenizer.apply_chat_template(
            case["messages"], tools=case["tools"], tokenize=False, add_generation_prompt=True
        )
        # Go's JSON has no spaces after colons and commas, and a tool's keys are in the order of Ollama's API.
        assert TOOL_LINE.sub("", found) == TOOL_LINE.sub("", expected).replace('{"city": ', '{"city":')
        lines, wanted = (list(map(json.loads, TOOL_LINE.findall(text))) for text in (found, expected))
        assert lines == wanted and len(lines) == len(case["tools"] or [])


# --- llama.cpp ----------------------------------------------------------------------------------------------

def open_in_llama_cpp(path: Path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python (pip install llama-cpp-python)")
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    return llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, logits_all=True, verbose=False, **exact)


@pytest.mark.slow
@pytest.mark.llama_cpp
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(case, checkpoints, tokenizer, tmp_path):
    write_gguf(checkpoints[case], tmp_path / "model.gguf", "f32")
    llama = open_in_llama_cpp(tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(checkpoints[case], dtype=torch.float32)
    prompt = torch.randint(0, len(tokenizer), (1, 70), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(prompt).logits[0].numpy()
    llama.eval(prompt[0].tolist())
    np.testing.assert_allclose(llama.scores[: prompt.shape[1]], expected, atol=2e-3, rtol=1e-3)
    llama.reset()
    generated = model.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=[], pad_token_id=0)
    stream = llama.generate(prompt[0].tolist(), temp=0.0, repeat_penalty=1.0)
    assert [next(stream) for _ in range(40)] == generated[0, prompt.shape[1] :].tolist()
    assert len(set(generated[0, prompt.shape[1] :].tolist())) > 5


@pytest.mark.slow
@pytest.mark.llama_cpp
@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("case", ["llama", "qwen3_moe"])
def test_llama_cpp_reads_narrower_types(case, dtype, checkpoints, tmp_path):
    """llama.cpp rounds activations to the type of the weights as well: with independent errors of equal size it ends up
    √2 times as far from the checkpoint as the rounded weights alone, in transformers' arithmetic, do."""
    write_gguf(checkpoints[case], tmp_path / "model.gguf", dtype)
    llama = open_in_llama_cpp(tmp_path / "model.gguf")
    prompt = torch.randint(0, 300, (1, 60), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(checkpoints[case], dtype=torch.float32)(prompt).logits[0].numpy()
        rounded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
        weights_alone = np.linalg.norm(rounded(prompt).logits[0].numpy() - exact, axis=1)
    llama.eval(prompt[0].tolist())
    found = np.linalg.norm(llama.scores[:60] - exact, axis=1)
    assert 0 < np.median(found) < 2 * np.median(weights_alone)
    assert np.median(found) < 0.1 * np.median(np.linalg.norm(exact, axis=1))


@pytest.mark.slow
@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_llama_cpp_tokenises_and_renders_the_same(name, tmp_path):
    tokenizer = make_tokenizer(name)
    write_gguf(build(tmp_path / "model", "llama", tokenizer), tmp_path / "model.gguf", "f32")
    llama = open_in_llama_cpp(tmp_path / "model.gguf")
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter  # behind the line that skips where it is missing

    for text in [*TEXTS, *corpus(20)]:
        ids = tokenizer(text).input_ids
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == ids
        assert llama.detokenize(ids).decode() == text
    rendered = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert llama.tokenize(rendered.encode(), special=True) == tokenizer(rendered).input_ids
    assert IM_END in llama.detokenize(llama.tokenize(IM_END.encode(), special=True), special=True).decode()
    assert llama.token_eos() == tokenizer.eos_token_id and llama.token_bos() == tokenizer.pad_token_id
    formatter = Jinja2ChatFormatter(llama.metadata["tokenizer.chat_template"], eos_token="", bos_token="")
    assert formatter(messages=CONVERSATION).prompt == rendered


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_llama_cpp_tokenises_as_qwen(samples, tmp_path):
    tokenizer = qwen(samples, tmp_path / "qwen")
    write_gguf(tmp_path / "qwen", tmp_path / "model.gguf", "f32")
    llama = open_in_llama_cpp(tmp_path / "model.gguf")
    chat = [{"role": "user", "content": "Hi, 你好 123!"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for text in [*TEXTS, rendered]:
        assert llama.tokenize(text.encode(), special=True) == tokenizer(text).input_ids
    llama.eval(tokenizer(rendered).input_ids)
    assert llama.token_eos() == tokenizer.eos_token_id
