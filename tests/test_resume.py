"""Runs that are killed, stopped, continued, extended and branched: real processes, compared bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_tokenizer
from smolkit.checkpoints import build_model, load_tokenizer, new_config, save_final
from smolkit.manifest import checkpoints

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the a cat dog sat on mat with red blue house of tree and ran fast slow very big small".split()
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "residual_dropout": 0.1,
    "attention_dropout": 0.1,
}
SCRIPTS = {"pretrain": "train_pretrain", "sft": "train_full_sft", "lora": "train_lora", "dpo": "train_dpo"}
STAGES = tuple(SCRIPTS)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Data for all stages, a tokenizer, and a model with dropout."""
    folder = tmp_path_factory.mktemp("resume")
    random = np.random.default_rng(0)

    def text(most: int = 20) -> str:
        return " ".join(random.choice(WORDS, random.integers(3, most))) + "."

    def write(name: str, rows: list[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("pretrain.jsonl", [{"text": text(30)} for _ in range(60)])
    chats = [[{"role": "user", "content": text()}, {"role": "assistant", "content": text()}] for _ in range(50)]
    write("sft.jsonl", [{"messages": messages} for messages in chats])
    shutil.copyfile(folder / "sft.jsonl", folder / "lora.jsonl")
    write("dpo.jsonl", [{"prompt": text(), "chosen": "Gladly: " + text(), "rejected": text()} for _ in range(22)])
    train_tokenizer.main(
        f"--mode train --data_path {folder}/pretrain.jsonl --vocab_size 320 --save_dir {folder}/tokenizer".split()
    )
    tokenizer = load_tokenizer(folder / "tokenizer")
    config = new_config("tiny", SHAPE, tokenizer)
    torch.manual_seed(0)
    model = build_model(config, None, torch.float32)
    save_final(model, dict(model.named_parameters()), tokenizer, folder / "base", torch.float32, "a base")
    return folder


def job(world: Path, stage: str, output: Path, *more: str, batch: int = 2, accumulation: int = 2, **run: Any) -> dict:
    """A run for tests/forks.py: 9 steps, checkpoints at 4 and 8, logs at 3 and 6; 4 to 7 steps are an epoch."""
    words = f"""--data_path {world}/{stage}.jsonl --max_steps 9 --save_steps 4 --logging_steps 3 --learning_rate 1e-2
        --per_device_train_batch_size {batch} --gradient_accumulation_steps {accumulation} --disable_tqdm true
        --output_dir {output}""".split()
    if stage == "pretrain":
        words += f"--tokenizer_path {world}/tokenizer --model_size tiny --block_size 32 --model_overrides".split()
        words += [f"{name}={value}" for name, value in SHAPE.items()]
    else:
        words += ["--model_path", str(world / "base"), "--max_length", "64"]
    words += {"lora": ["--lora_dropout", "0.1"], "sft": ["--packing", "false"], "dpo": []}.get(stage, [])
    return {"script": SCRIPTS[stage], "argv": [*words, *more], **run}


def execute(folder: Path, runs: list[dict], expect: list[Any] | None = None) -> list[dict]:
    """Run one after the other; `expect` are the exit codes of rank 0, None where anything goes."""
    plan = folder / f"plan-{time.monotonic_ns()}.json"
    plan.write_text(json.dumps(runs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/forks.py"), str(plan)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(runs)
    for number, (result, code) in enumerate(zip(results, expect or [], strict=expect is not None)):
        assert code is None or result["codes"][0] == code, f"run {number} {runs[number]}\n{result}\n{result['output']}"
    return results


def rows(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def newest(directory: Path) -> Path:
    return checkpoints(directory)[-1]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = [*directory.glob("model*.safetensors"), *directory.glob("adapter_model.safetensors")]
    return {name: value for file in files for name, value in load_file(file).items()}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested containers as one dict of leaves."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is None:
        return {name: value}
    return {key: leaf for inner, each in items for key, leaf in flat(each, f"{name}/{inner}").items()}


def assert_same(left: Path, right: Path) -> None:
    """Final weights, last checkpoint (weights, optimizer, schedule, random states), metrics: bit for bit."""
    for one, two in ((left, right), (newest(left), newest(right))):
        first, second = weights(one), weights(two)
        assert first and first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), one
    assert newest(left).name == newest(right).name
    for file in sorted(path.name for path in newest(left).iterdir() if path.suffix in (".pt", ".pth")):
        first, second = (
            flat(torch.load(newest(directory) / file, weights_only=False)) for directory in (left, right)
        )
        assert first.keys() == second.keys()
        for name, value in first.items():
            same = np.array_equal(value, second[name]) if hasattr(value, "shape") else value == second[name]
            assert same, (file, name)
    assert (left / "metrics.jsonl").read_bytes() == (right / "metrics.jsonl").read_bytes()
    for window in newest(left).glob("window_*.json"):
        first, second = (json.loads((newest(each) / window.name).read_text()) for each in (left, right))
        for state in (first, second):
            state.pop("total_loss")  # of the timing: the mean over the steps of one call
            (state.get("logs") or {}).pop("timing.jsonl", None)
        assert first == second


# --- kill -9


def killed_and_whole(world: Path, folder: Path, stage: str, kill: dict, *more: str, **layout: Any) -> list[dict]:
    return [
        job(world, stage, folder / f"{stage}-whole", *more, **layout),
        job(world, stage, folder / f"{stage}-killed", *more, fault=kill, **layout),
        job(world, stage, folder / f"{stage}-killed", *more, **layout),
    ]


def test_killed_runs_continue_bit_for_bit(world, tmp_path) -> None:
    """All stages: SIGKILL between two micro-batches of step 7, in the middle of an epoch and of a logging window."""
    plan = [run for stage in STAGES for run in killed_and_whole(world, tmp_path, stage, {"kill_at": 7, "micro": 1})]
    execute(tmp_path, plan, [0, -signal.SIGKILL, 0] * len(STAGES))
    for stage in STAGES:
        whole, killed = tmp_path / f"{stage}-whole", tmp_path / f"{stage}-killed"
        assert_same(whole, killed)
        steps = [row["step"] for row in rows(whole) if "loss" in row]
        assert steps == [3, 6, 9]
        assert not list(whole.rglob("*.bin"))
    tokens = [row["num_tokens"] for row in rows(tmp_path / "dpo-killed") if "num_tokens" in row]
    assert tokens == [row["tokens"] for row in rows(tmp_path / "dpo-killed") if "tokens" in row]


def test_two_processes_and_another_number_of_them(world, tmp_path) -> None:
    """Two ranks killed and continued: bit for bit. The same global batch on 1, 2 and again 2 ranks: equal to rounding.

    The epochs end in the middle of a batch (22 pairs, a global batch of 8), where no pair may be repeated.
    """
    exact = ("--weights_dtype", "fp32")  # bf16 weights would turn rounding into differences of 1e-4
    one, two = {"batch": 4, "accumulation": 2}, {"ranks": 2, "batch": 2, "accumulation": 2}
    plan = [
        job(world, "dpo", tmp_path / "one", *exact, **one),
        *killed_and_whole(world, tmp_path, "dpo", {"kill_at": 7, "rank": 1}, *exact, **two),
        job(world, "dpo", tmp_path / "moved", *exact, fault={"kill_at": 6}, **one),
        job(world, "dpo", tmp_path / "moved", *exact, **two),
        job(world, "dpo", tmp_path / "moved", *exact, batch=2),
    ]
    results = execute(tmp_path, plan, [0, 0, None, 0, -9, 0, 2])
    print([result["seconds"] for result in results])
    assert results[2]["codes"][1] == -9 and results[2]["codes"][0] not in (0, -999), "the other rank ends, too"
    assert results[2]["seconds"] < 30
    assert_same(tmp_path / "dpo-whole", tmp_path / "dpo-killed")
    assert "2 x 2 x 2 (processes x batch x accumulation) instead of 1 x 4 x 2" in results[5]["output"]
    assert "global batch (processes x batch x accumulation) was 8 (2 x 2 x 2) and is now 4" in results[6]["output"]
    reference = [row for row in rows(tmp_path / "one") if "loss" in row]
    for name in ("dpo-whole", "moved"):
        got = [row for row in rows(tmp_path / name) if "loss" in row]
        for one, other in zip(reference, got, strict=True):
            assert one["tokens"] == other["tokens"] == other["num_tokens"]
            for key in ("loss", "grad_norm", "rewards/margins"):
                assert other[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), (name, key)
