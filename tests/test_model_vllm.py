"""The same greedy tokens from vLLM: on directories that we save and on directories that transformers saves."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from smol_config import SmolConfig
from smol_model import SmolForCausalLM

NEW = 12
SHAPE = {  # vLLM's CPU attention wants a head size of at least 32, its experts a width of a multiple of 32
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MODELS = {
    "llama": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True, "tie_word_embeddings": False},
    "mixtral": MOE,
    "qwen3_moe": MOE | {"qk_norm": True},
}
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    directory, prompts, new = json.loads(sys.argv[1])
    model = LLM(directory, dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=128)
    settings = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
    answers = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings)
    print("ANSWERS", json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
"""


def in_vllm(python: str, directory: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy continuations by vLLM, in a process of its own."""
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    program = directory.parent / "program.py"  # its engine starts processes that import the program
    program.write_text(PROGRAM)
    command = [python, str(program), json.dumps([str(directory), prompts, NEW])]
    result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("ANSWERS"))
    return json.loads(line.removeprefix("ANSWERS"))


@pytest.mark.slow
@pytest.mark.parametrize("saved_by", ["us", "transformers"])
@pytest.mark.parametrize("kind", MODELS)
def test_vllm_continues_like_our_model(kind: str, saved_by: str, tmp_path: Path, vllm_python: str) -> None:
    torch.manual_seed(0)
    config = SmolConfig(**SHAPE | MODELS[kind])
    model = SmolForCausalLM(config) if saved_by == "us" else AutoModelForCausalLM.from_config(config.to_native())
    model.save_pretrained(tmp_path / "model")
    ours = SmolForCausalLM.from_pretrained(tmp_path / "model").eval()
    prompts = torch.randint(config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(1))
    expected = ours.generate(prompts, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)[:, prompts.shape[1] :]
    assert len(set(expected.flatten().tolist())) > NEW, "a model that repeats itself shows nothing"
    assert in_vllm(vllm_python, tmp_path / "model", prompts.tolist()) == expected.tolist()
