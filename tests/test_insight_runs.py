"""Real runs: healthy, without a learning rate, diverging, memorising, collapsed, flat; and the verdict on each."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train_dpo
import train_full_sft
import train_pretrain
import train_tokenizer

SHAPE = "hidden_size=32 intermediate_size=64 num_hidden_layers=2 num_attention_heads=2 num_key_value_heads=1"
WORDS = "the a cat dog sat on mat with red blue house of tree and ran fast slow very big small".split()


def sentence(random: np.random.Generator, low: int = 4, high: int = 12) -> str:
    return " ".join(random.choice(WORDS, random.integers(low, high))) + "."


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Text, a handful of text to memorise, preference pairs with sides at random, a tokenizer, a model."""
    folder = tmp_path_factory.mktemp("insight")
    random = np.random.default_rng(0)
    for name, count in (("text", 300), ("few", 8)):
        for part in ("", "validation/"):
            rows = [{"text": sentence(random)} for _ in range(count if not part else 12)]
            write(folder / name / part / "text.jsonl", rows)
    sound = [
        {"prompt": sentence(random), "chosen": "Yes, " + sentence(random), "rejected": "No, " + sentence(random)}
        for _ in range(120)
    ]
    write(folder / "sound.jsonl", sound)
    swapped = [pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in sound]
    write(folder / "random.jsonl", [both[random.integers(2)] for both in zip(sound, swapped, strict=True)])
    arguments = f"--mode train --data_path {folder}/text --vocab_size 320 --save_dir {folder}/tokenizer"
    train_tokenizer.main(arguments.split())
    pretrain(folder, folder / "base", "--max_steps", "40", "--learning_rate", "1e-2")
    return folder


def pretrain(world: Path, output: Path, *more: str, shape: str = SHAPE, data: str = "text") -> dict:
    """Codes and levels of the verdict on a run of train_pretrain.main."""
    arguments = f"""--data_path {world}/{data} --tokenizer_path {world}/tokenizer --model_size tiny
        --model_overrides {shape} --block_size 32 --per_device_train_batch_size 8 --logging_steps 2
        --disable_tqdm true --save_strategy no --weights_dtype fp32 --output_dir {output}"""
    train_pretrain.main([*arguments.split(), *more])
    return verdict(output)


def align(world: Path, output: Path, data: str, *more: str) -> dict:
    arguments = f"""--data_path {world}/{data}.jsonl --model_path {world}/base --per_device_train_batch_size 8
        --max_steps 15 --logging_steps 1 --disable_tqdm true --save_strategy no --weights_dtype fp32
        --output_dir {output}"""
    train_dpo.main([*arguments.split(), *more])
    return verdict(output)


def verdict(output: Path) -> dict[str, str]:
    content = json.loads((output / "diagnosis.json").read_text())
    return {finding["code"]: finding["level"] for finding in content["findings"]}


def test_a_run_that_learns(world, capsys) -> None:
    assert verdict(world / "base")["learning"] == "good"
    assert not {"problem", "warning"} & set(verdict(world / "base").values())


def test_a_learning_rate_of_zero(world, tmp_path, capsys) -> None:
    found = pretrain(world, tmp_path, "--max_steps", "16", "--learning_rate", "0")
    assert found == {"not_learning": "problem"}
    assert "The learning rate is 0" in capsys.readouterr().out


def test_a_learning_rate_that_is_far_too_high(world, tmp_path) -> None:
    found = pretrain(world, tmp_path, "--max_steps", "40", "--learning_rate", "3", "--max_grad_norm", "1e9")
    assert {"diverged", "worse_than_guessing"} & found.keys(), found


def test_eight_rows_are_memorised(world, tmp_path) -> None:
    more = ["--max_steps", "120", "--learning_rate", "2e-2", "--eval_steps", "20"]
    found = pretrain(world, tmp_path, *more, data="few")
    assert found["overfitting"] == "problem" and found["learning"] == "good"


def test_a_router_without_balancing_collapses(world, tmp_path) -> None:
    experts = f"{SHAPE} num_experts=8 num_experts_per_tok=2 qk_norm=true moe_intermediate_size=32"
    steps = ["--max_steps", "40", "--learning_rate", "1e-2"]
    balanced = pretrain(world, tmp_path / "balanced", *steps, shape=f"{experts} router_aux_loss_coef=0.1")
    collapsed = pretrain(world, tmp_path / "collapsed", *steps, shape=f"{experts} router_aux_loss_coef=0")
    assert collapsed["router_collapse"] == "problem"
    assert "router_collapse" not in balanced and balanced["learning"] == "good"
    # 0 was an int on the command line; what is saved is what the native configuration wants
    assert json.loads((tmp_path / "collapsed" / "config.json").read_text())["router_aux_loss_coef"] == 0.0


def test_pairs_with_sides_at_random_stay_at_ln_2(world, tmp_path, capsys) -> None:
    found = align(world, tmp_path, "random", "--learning_rate", "1e-4")
    assert found == {"flat": "problem"}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert abs(rows[-1]["loss"] - math.log(2)) < 0.03
    printed = capsys.readouterr().out
    assert "ln 2 = 0.693" in printed and "rewards/margins" in printed


def test_sound_pairs_are_learned(world, tmp_path) -> None:
    found = align(world, tmp_path / "a", "sound", "--learning_rate", "5e-3")
    assert found["preference_learned"] == "good" and "flat" not in found
    assert align(world, tmp_path / "b", "sound", "--learning_rate", "0")["flat"] == "problem"


def test_bits_per_byte_of_fine_tuning_are_those_of_the_answers(world, tmp_path) -> None:
    random = np.random.default_rng(1)
    talks = []
    for turns in (1, 2, 3, 1):
        talk = []
        for _ in range(turns):
            said = (("user", sentence(random)), ("assistant", "猫: " + sentence(random)))
            talk += [{"role": role, "content": text} for role, text in said]
        talks.append({"messages": talk})
    write(tmp_path / "data" / "sft.jsonl", talks)
    write(tmp_path / "data" / "validation" / "sft.jsonl", talks)
    arguments = f"""--data_path {tmp_path}/data --base_model {world}/base --max_length 256 --max_steps 1
        --per_device_train_batch_size 2 --disable_tqdm true --save_strategy no --output_dir {tmp_path}/out
        --sample_tokens 4 --sample_prompts"""
    train_full_sft.main([*arguments.split(), "What?"])
    row = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    answers = [m["content"] for talk in talks for m in talk["messages"] if m["role"] == "assistant"]
    assert row["eval_bytes"] == sum(len(answer.encode()) for answer in answers)
    assert row["eval_tokens"] > len(answers)
    (sample,) = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert sample["prompt"] == "What?" and sample["tokens"] <= 4


FSDP = ["--fsdp", "full_shard auto_wrap", "--fsdp_config"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_sample_and_measure_like_one(kind: str, world, tmp_path) -> None:
    """Weights that lie in parts on two processes are put together for the samples."""
    more: list[str] = []
    if kind == "fsdp2":
        wrapped = {"version": 2, "transformer_layer_cls_to_wrap": ["SmolDecoderLayer"]}
        (tmp_path / "fsdp.json").write_text(json.dumps(wrapped))
        more = [*FSDP, str(tmp_path / "fsdp.json")]

    def command(output: Path, batch: int) -> list[str]:
        arguments = f"""train_pretrain.py --data_path {world}/text --tokenizer_path {world}/tokenizer --model_size tiny
            --block_size 32 --per_device_train_batch_size {batch} --logging_steps 1 --disable_tqdm true --max_steps 6
            --save_strategy no --weights_dtype fp32 --learning_rate 1e-2 --eval_steps 3 --output_dir {output}
            --model_overrides {SHAPE} --sample_tokens 6 --sample_prompts"""
        return [*arguments.split(), "the cat", "a dog"]

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    started = [*launcher, *command(tmp_path / kind, 2), *more]
    result = subprocess.run(started, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    train_pretrain.main(command(tmp_path / "one", 4)[1:])
    one, two = (
        {name: [json.loads(line) for line in (tmp_path / run / name).read_text().splitlines()] for name in names}
        for names in [("metrics.jsonl", "timing.jsonl", "samples.jsonl")]
        for run in ("one", kind)
    )
    assert two["samples.jsonl"] == one["samples.jsonl"] and len(one["samples.jsonl"]) == 2
    for name in ("loss", "eval_loss", "eval_bits_per_byte", "eval_bytes", "tokens"):
        values = [[row[name] for row in run["metrics.jsonl"] if name in row] for run in (one, two)]
        assert values[1] == pytest.approx(values[0], rel=1e-4), name
    assert all(0 < row["mfu"] < 1 for row in two["timing.jsonl"] if "mfu" in row)
