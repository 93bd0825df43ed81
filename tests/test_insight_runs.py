"""Real runs: healthy, without a learning rate, diverging, memorising, collapsed, flat; and the verdict on each."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import train_dpo
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
