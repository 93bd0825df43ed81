"""Upcycling: a Mixture-of-Experts that is its dense checkpoint before the first step, and learns as any run after."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import train_pretrain
from smol_config import SmolConfig
from smol_model import SmolForCausalLM
from smolkit.arguments import PretrainArguments
from smolkit.chat import add_chat_tokens, save_tokenizer
from smolkit.errors import UserError
from smolkit.tokenizer import train_bpe
from smolkit.upcycle import build_upcycled, upcycled_config

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
CASES = {
    "llama": {},
    "llama-untied": {"tie_word_embeddings": False, "head_dim": 16},
    "qwen3": {"qk_norm": True, "head_dim": 12},
}
NATIVE = {"llama": "MixtralForCausalLM", "llama-untied": "MixtralForCausalLM", "qwen3": "Qwen3MoeForCausalLM"}
WORDS = "the a cat dog sat on mat with red blue house of tree and ran fast slow very big small".split()


def text(count: int, seed: int) -> list[str]:
    draw = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(WORDS), (count, 14), generator=draw).tolist()
    return [" ".join(WORDS[i] for i in row) for row in picks]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Text, and a dense checkpoint of every case with norms that are not 1."""
    root = tmp_path_factory.mktemp("upcycle")
    (root / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in text(80, 0)))
    tokenizer = train_bpe(text(200, 1), 320, "qwen2", True, ())
    add_chat_tokens(tokenizer)
    for case, options in CASES.items():
        torch.manual_seed(0)
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        model = SmolForCausalLM(SmolConfig(**SHAPE | options | ids, vocab_size=len(tokenizer) + 3))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(root / case)
        save_tokenizer(tokenizer, root / case)
    return root


def stage_for(directory: Path, **options) -> PretrainArguments:
    return PretrainArguments(data_path=["x"], upcycle_from=str(directory), **options)


def upcycled(directory: Path, noise: float = 0.0, **options) -> SmolForCausalLM:
    config = upcycled_config(SmolConfig.from_pretrained(directory), stage_for(directory, **options), {})
    torch.manual_seed(5)
    return build_upcycled(config, directory, torch.float32, noise=noise)


@pytest.mark.parametrize("shape", [{}, {"upcycle_experts": 4, "upcycle_top_k": 3}], ids=["8-2", "4-3"])
@pytest.mark.parametrize("case", CASES)
def test_the_new_model_is_the_dense_one(case, shape, world, tmp_path):
    dense, model = SmolForCausalLM.from_pretrained(world / case), upcycled(world / case, **shape)
    experts, chosen = shape.get("upcycle_experts", 8), shape.get("upcycle_top_k", 2)
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (experts, chosen)
    ids = torch.randint(0, 300, (3, 30), generator=torch.Generator().manual_seed(2))
    routers = [p for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")]
    assert len(routers) == 2 and all(router.std() > 0.1 for router in routers)
    for mode in (False, True):  # capacity is none: training computes the same
        expected, found = dense.train(mode)(ids, labels=ids), model.train(mode)(ids, labels=ids)
        extra = found.aux_loss * model.config.router_aux_loss_coef + found.z_loss * model.config.router_z_loss_coef
        loss = found.loss - (extra if mode else 0.0)
        torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == NATIVE[case]
    torch.testing.assert_close(theirs(ids).logits, dense.eval()(ids).logits, atol=1e-4, rtol=1e-4)


def test_noise_makes_experts_differ_by_as_much_as_was_asked(world):
    exact, noisy = upcycled(world / "llama"), upcycled(world / "llama", noise=0.1)
    for name, parameter in exact.named_parameters():
        other = noisy.get_parameter(name)
        if "mlp.experts." in name:
            assert torch.equal(parameter, parameter[:1].expand_as(parameter))
            share = (other - parameter).std() / parameter.std()
            assert 0.08 < share < 0.12
            assert not torch.equal(other[0], other[1])
        elif not name.endswith("mlp.gate.weight"):
            assert torch.equal(other, parameter)


def arguments(world: Path, output: Path, *more: str) -> list[str]:
    common = f"""--data_path {world}/text.jsonl --block_size 32 --per_device_train_batch_size 2 --max_steps 4
        --logging_steps 1 --save_steps 2 --weights_dtype fp32 --learning_rate 1e-3 --warmup_steps 0
        --data_cache_dir {world}/cache --output_dir {output}""".split()
    return [*common, *more]


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in map(json.loads, (directory / "metrics.jsonl").open()) if "loss" in row]


def test_a_run_starts_at_the_dense_loss_and_continues_as_any_run(world, tmp_path, capsys):
    plain = ("--model_overrides", "router_aux_loss_coef=0", "router_z_loss_coef=0")
    train_pretrain.main(arguments(world, tmp_path / "dense", "--base_model", f"{world}/qwen3"))
    command = arguments(world, tmp_path / "moe", "--upcycle_from", f"{world}/qwen3", "--upcycle_experts", "4", *plain)
    train_pretrain.main(command)
    dense, moe = losses(tmp_path / "dense"), losses(tmp_path / "moe")
    assert abs(dense[0] - moe[0]) < 1e-5
    assert abs(dense[-1] - moe[-1]) > 1e-5  # and goes its own way afterwards
    written = SmolForCausalLM.from_pretrained(tmp_path / "moe")
    assert written.config.native_type() == "qwen3_moe" and written.config.num_experts == 4
    first = written.get_parameter("model.layers.0.mlp.experts.down_proj")
    assert not torch.equal(first[0], first[1])  # experts went apart

    files = [tmp_path / "moe" / name for name in ("model.safetensors", "metrics.jsonl")]
    whole = [file.read_bytes() for file in files]
    for name in ("config.json", "model.safetensors", "training_complete.json"):
        (tmp_path / "moe" / name).unlink()
    shutil.rmtree(tmp_path / "moe" / "checkpoint-4")
    capsys.readouterr()
    train_pretrain.main(command)
    assert "checkpoint-2" in capsys.readouterr().out
    assert [file.read_bytes() for file in files] == whole


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3", "experts"])
def test_two_processes_start_at_the_same_loss(strategy, world, tmp_path):
    more = ["--upcycle_from", f"{world}/llama", "--upcycle_experts", "4", "--per_device_train_batch_size", "1"]
    more += ["--model_overrides", "router_aux_loss_coef=0", "router_z_loss_coef=0"]
    more += {
        "ddp": [],
        "fsdp2": ["--fsdp", "full_shard"],
        "zero3": ["--deepspeed", "accelerate_offload/ds_zero3.json"],
        "experts": ["--expert_parallel_size", "2"],
    }[strategy]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "train_pretrain.py", *arguments(world, tmp_path / "two", *more)]
    result = subprocess.run(command, cwd=Path(train_pretrain.__file__).parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    train_pretrain.main(arguments(world, tmp_path / "one", "--base_model", f"{world}/llama", "--max_steps", "1"))
    assert abs(losses(tmp_path / "two")[0] - losses(tmp_path / "one")[0]) < 1e-5
    written = SmolForCausalLM.from_pretrained(tmp_path / "two")
    assert written.config.native_type() == "mixtral"
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(2))
    dense = SmolForCausalLM.from_pretrained(world / "llama")
    change = (written(ids, labels=ids).loss - dense(ids, labels=ids).loss).abs()
    assert 0 < change < 0.5  # four small steps away from the dense model, not random weights


def test_the_plan_knows_the_new_shape(world, tmp_path, capsys):
    more = ("--upcycle_from", f"{world}/llama", "--upcycle_experts", "4", "--dry_run", "--plan_format", "json")
    train_pretrain.main(arguments(world, tmp_path / "none", *more))
    found = json.loads(capsys.readouterr().out)["model"]
    total = sum(p.numel() for p in upcycled(world / "llama", upcycle_experts=4).parameters())
    assert (found["architecture"], found["total_parameters"]) == ("mixtral", total)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--upcycle_experts", "4"], "needs --upcycle_from"),
        (["--upcycle_from", "llama", "--base_model", "llama"], "contradict"),
        (["--upcycle_from", "llama", "--upcycle_top_k", "1"], "between 2 and the 8"),
        (["--upcycle_from", "llama", "--upcycle_experts", "0"], "between 2 and the 0"),
        (["--upcycle_from", "llama", "--upcycle_noise", "-0.1"], "must not be negative"),
        (["--upcycle_from", "llama", "--model_size", "tiny"], "contradicts"),
        (["--upcycle_from", "llama", "--model_overrides", "hidden_size=64"], "the shape is the checkpoint's"),
        (["--upcycle_from", "nowhere"], "no such checkpoint"),
    ],
)
def test_mistakes_are_named_before_any_work(more, words, world, tmp_path):
    more = [str(world / word) if word in (*CASES, "nowhere") else word for word in more]
    with pytest.raises(UserError, match=words):
        train_pretrain.main(arguments(world, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_dense_checkpoint_that_is_damaged_or_quantised_is_refused(world, tmp_path):
    config = upcycled_config(SmolConfig.from_pretrained(world / "llama"), stage_for(world / "llama"), {})
    shutil.copytree(world / "llama", tmp_path / "model")
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    for change, words in (
        ({"hidden_size": "32"}, "expected int, got str"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\."),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "is quantised; use the checkpoint"),
    ):
        (tmp_path / "model" / "config.json").write_text(json.dumps(written | change))
        with pytest.raises(UserError, match=words) as caught:
            build_upcycled(config, tmp_path / "model", torch.float32)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("options", "words"), [({"attention_bias": True}, "Qwen2"), ({"num_experts": 4}, "already")])
def test_checkpoints_that_have_no_such_form_are_refused(options, words, tmp_path):
    config = SmolConfig(**SHAPE | options, vocab_size=300)
    with pytest.raises(UserError, match=words):
        upcycled_config(config, stage_for(tmp_path), {})
