"""Runs that are killed, stopped, continued, extended and branched: real processes, compared bit for bit."""

import json
import os
import re
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
from transformers import LlamaConfig, LlamaForCausalLM

import train_tokenizer
from smolkit import guards
from smolkit.checkpoints import build_model, load_tokenizer, new_config, save_final
from smolkit.manifest import MANIFEST, checkpoints, problem, rotate, seal

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
    if stage in ("pretrain", "sft"):
        words += f"--eval_data_path {world}/{stage}.jsonl --max_eval_rows 3".split()
        words += "--eval_strategy steps --eval_steps 2".split()
    words += {"lora": ["--lora_dropout", "0.1"], "sft": ["--packing", "false"]}.get(stage, [])
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
        first, second = (flat(torch.load(newest(directory) / file, weights_only=False)) for directory in (left, right))
        assert first.keys() == second.keys()
        for name, value in first.items():
            same = np.array_equal(value, second[name]) if hasattr(value, "shape") else value == second[name]
            assert same, (file, name)
    assert (left / "metrics.jsonl").read_bytes() == (right / "metrics.jsonl").read_bytes()
    for window in newest(left).glob("window_*.json"):
        first, second = (json.loads((newest(each) / window.name).read_text()) for each in (left, right))
        for state in (first, second):
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
    plan[2:2] = [{**plan[1], "fault": {"kill_at_the_end": True}}]  # pretraining is killed a second time
    execute(tmp_path, plan, [0, -9, -9, 0, *[0, -9, 0] * 3])
    for stage in STAGES:
        whole, killed = tmp_path / f"{stage}-whole", tmp_path / f"{stage}-killed"
        assert_same(whole, killed)
        steps = [row["step"] for row in rows(whole) if "loss" in row]
        assert steps == [3, 6, 9]
        evaluated = [row["step"] for row in rows(whole) if "eval_loss" in row]
        assert evaluated == ([2, 4, 6, 8, 9] if stage in ("pretrain", "sft") else [])
        assert not list(whole.rglob("*.bin"))
    tokens = [row["num_tokens"] for row in rows(tmp_path / "dpo-killed") if "num_tokens" in row]
    assert tokens == [row["tokens"] for row in rows(tmp_path / "dpo-killed") if "tokens" in row]


@pytest.mark.parametrize(("stage", "ranks"), [("sft", 1), pytest.param("sft", 2, marks=pytest.mark.slow)])
def test_other_orders_continue_bit_for_bit(world, tmp_path, stage, ranks) -> None:
    """42 rows fit, 4 or 8 a step: killed in its second epoch. Every row once an epoch, similar ones together."""
    plan, orders = [], ("group_by_length", "sequential")
    layout = {"ranks": ranks, "accumulation": 2}
    for name in orders:
        how = f"--train_sampling_strategy {name} --max_steps 16 --logging_steps 1 --eval_strategy no".split()
        plan += killed_and_whole(world, tmp_path / name, stage, {"kill_at": 15}, *how, **layout)
    execute(tmp_path, plan, [0, -9, 0] * 2)
    epoch, spread = {}, {}
    for name in orders:
        whole = tmp_path / name / f"{stage}-whole"
        assert_same(whole, tmp_path / name / f"{stage}-killed")
        seen = [row["tokens"] for row in rows(whole) if "loss" in row and row["epoch"] <= 1]
        epoch[name], spread[name] = seen[-1], np.diff([0, *seen[:-1]]).std()
    assert epoch["group_by_length"] == epoch["sequential"], "every row once"
    assert spread["group_by_length"] > 1.2 * spread["sequential"]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "dtype"), [("pretrain", "fp32"), ("pretrain", "bf16"), ("dpo", "fp32")])
def test_a_compiled_run_continues(world, tmp_path, stage, dtype) -> None:
    """Bit for bit where rows have one length. Else the compiler makes its code for the lengths of the first batches it
    sees, and after a continuation these are others: equal to rounding."""
    how = ["--torch_compile", "true", "--weights_dtype", dtype]
    if dtype == "bf16":  # with weights that are large enough for a compiled update
        how += "--model_overrides num_hidden_layers=2 hidden_size=256 intermediate_size=512".split()
    execute(tmp_path, killed_and_whole(world, tmp_path, stage, {"kill_at": 7}, *how, seconds=300), [0, -9, 0])
    whole, killed = tmp_path / f"{stage}-whole", tmp_path / f"{stage}-killed"
    if stage == "pretrain":
        assert_same(whole, killed)
    expected, found = ([row["loss"] for row in rows(each) if "loss" in row] for each in (whole, killed))
    assert found == pytest.approx(expected, rel=1e-5)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(killed)[name], value, rtol=1e-3, atol=1e-5)


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


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """An uninterrupted pretraining run with all its checkpoints, and `interrupted`, as it was when killed at step 7."""
    folder = tmp_path_factory.mktemp("whole")
    keep = ("--save_total_limit", "3")
    plan = [
        job(world, "pretrain", folder / "whole", *keep),
        job(world, "pretrain", folder / "interrupted", *keep, fault={"kill_at": 7}),
    ]
    execute(folder, plan, [0, -9])
    return folder / "whole"


def copy(directory: Path, target: Path) -> Path:
    """A copy, without the mark of a finished run."""
    shutil.copytree(directory, target)
    for name in ("config.json", "model.safetensors", "training_complete.json"):
        (target / name).unlink(missing_ok=True)
    return target


KEEP = ("--save_total_limit", "3")


# --- signals


def test_signals_finish_the_step_and_save(world, whole, tmp_path) -> None:
    """A signal that reaches one of two ranks stops both; the stopped run ends as if nothing had happened."""
    two = {"ranks": 2, "batch": 1}
    plan = [
        job(world, "pretrain", tmp_path / "term", *KEEP, fault={"signal": "SIGTERM", "at": 5}),
        job(world, "pretrain", tmp_path / "term", *KEEP),
        job(world, "pretrain", tmp_path / "usr1", *KEEP, fault={"signal": "SIGUSR1", "at": 2, "rank": 1}, **two),
        job(world, "pretrain", tmp_path / "usr1", *KEEP),
        job(world, "pretrain", tmp_path / "int", "--save_strategy", "no", fault={"signal": "SIGINT", "at": 9}),
        job(world, "pretrain", tmp_path / "bare", "--save_only_model", fault={"signal": "SIGTERM", "at": 5}),
    ]
    results = execute(tmp_path, plan, [75, 0, 75, 0, 0, 75])
    assert "the same command continues the run" in results[0]["output"]
    assert "cannot be continued, but be the --base_model of another run" in results[5]["output"]
    assert "same command" not in results[5]["output"]
    assert "stopped by SIGTERM after step 5 of 9" in results[0]["output"]
    assert_same(whole, tmp_path / "term")
    assert results[2]["codes"] == [75, 75]
    assert "after step 2 of 9" in results[2]["output"]
    pairs = zip(rows(whole), rows(tmp_path / "usr1"), strict=True)
    assert all((one["step"], one.get("tokens")) == (other["step"], other.get("tokens")) for one, other in pairs)


@pytest.mark.parametrize("save", [["--save_steps", "5"], ["--save_strategy", "epoch"]], ids=["steps", "epoch"])
def test_the_end_of_an_epoch_is_written_before_the_checkpoint_that_follows_it(world, tmp_path, save) -> None:
    """Of 50 conversations ten make a step, so that step 5 ends an epoch: a run that is stopped there, or continues from
    there, has evaluated, logged and drawn what the undisturbed one has."""
    more = ("--eval_strategy", "epoch", "--logging_strategy", "epoch", "--sample_prompts", "the", *save)
    plan = [
        job(world, "sft", tmp_path / "whole", *more, batch=5),
        job(world, "sft", tmp_path / "killed", *more, batch=5, fault={"kill_at": 7}),
        job(world, "sft", tmp_path / "killed", *more, batch=5),
        job(world, "sft", tmp_path / "asked", *more, batch=5, fault={"signal": "SIGTERM", "at": 5}),
        job(world, "sft", tmp_path / "asked", *more, batch=5),
    ]
    results = execute(tmp_path, plan, [0, -9, 0, 75, 0])
    assert "after step 5 of 9" in results[3]["output"]
    for name in ("killed", "asked"):
        assert_same(tmp_path / "whole", tmp_path / name)
        samples = [(tmp_path / each / "samples.jsonl").read_text() for each in ("whole", name)]
        assert samples[0] == samples[1]
    assert {row["step"] for row in rows(tmp_path / "asked") if "eval_loss" in row} == {5, 9}


def test_a_second_interrupt_aborts_at_once(monkeypatch) -> None:
    class Plain(guards.GuardMixin):
        _asked = 0

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    trainer, before = Plain(), signal.getsignal(signal.SIGINT)
    with trainer._signals():
        interrupt()
        interrupt()  # a launcher passes on the terminal's: the same Ctrl-C
        assert trainer._asked == signal.SIGINT
        monkeypatch.setattr(guards, "ECHO", 0.0)
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert signal.getsignal(signal.SIGINT) is before


# --- losses


def test_losses_that_are_not_finite(world, tmp_path) -> None:
    """One rank's NaN stops both before the update, or is left out without a trace in weights and optimizer."""
    two = {"ranks": 2, "batch": 1}
    every = ("--save_steps", "1", "--save_total_limit", "9")
    plan = [
        job(world, "sft", tmp_path / "stop", *KEEP, fault={"nan_at": [6], "rank": 1}, **two),
        job(world, "sft", tmp_path / "skip", *every, "--skip_nonfinite", "1", fault={"nan_at": [5], "rank": 1}, **two),
        job(world, "sft", tmp_path / "many", "--skip_nonfinite", "1", fault={"nan_at": [2, 5]}),
    ]
    results = execute(tmp_path, plan, [2, 0, 2])
    assert results[0]["codes"] == [2, 2]
    line = next(line for line in results[0]["output"].splitlines() if line.startswith("error"))
    assert "the loss is nan at step 6 (process 1, batch 1 of 2 in the step, rows " in line
    assert [path.name for path in checkpoints(tmp_path / "stop")] == ["checkpoint-4"]
    assert "update skipped (1 of 1 allowed)" in results[1]["output"]
    before, after = tmp_path / "skip/checkpoint-4", tmp_path / "skip/checkpoint-5"
    for name, value in weights(before).items():
        assert torch.equal(value, weights(after)[name])
    states = [flat(torch.load(each / "optimizer.pt")["state"]) for each in (before, after)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key])) for key, value in states[0].items())
    assert not torch.equal(*(weights(tmp_path / f"skip/checkpoint-{n}")["model.norm.weight"] for n in (5, 6)))
    logged = [row for row in rows(tmp_path / "skip") if "loss" in row]
    assert all(np.isfinite([row["loss"], row["grad_norm"]]).all() for row in logged)
    assert [row.get("skipped_updates") for row in logged] == [None, 1, 1]
    assert "at step 5" in results[2]["output"] and "1 skipped before" in results[2]["output"]


def test_an_update_that_guards_itself_is_left_out_on_the_device(world, tmp_path) -> None:
    """Where nobody waits for the device: the same run bit for bit, and nothing that is not finite is written down."""
    bf16, every = ("--weights_dtype", "bf16"), ("--save_steps", "1", "--save_total_limit", "9")
    nan, term = {"nan_at": [6], "on_a_gpu": True}, {"signal": "SIGTERM", "at": 5, "on_a_gpu": True}
    log = ("--logging_steps", "1", "--save_steps", "20")
    plan = [
        job(world, "pretrain", tmp_path / "plain", *bf16),
        job(world, "pretrain", tmp_path / "later", *bf16, fault={"on_a_gpu": True}),
        job(world, "pretrain", tmp_path / "unsaved", *bf16, "--save_steps", "20", fault=nan),
        job(world, "pretrain", tmp_path / "saved", *bf16, *every, fault=nan),
        job(world, "pretrain", tmp_path / "asked", *bf16, fault=term),
        job(world, "pretrain", tmp_path / "logged", *bf16, *log, fault=term),
    ]
    results = execute(tmp_path, plan, [0, 0, 2, 2, 75, 75])
    assert_same(tmp_path / "plain", tmp_path / "later")
    for result in results[2:4]:
        assert "the loss is nan at step 6 (process 0, batch 1 of 2 in the step, rows " in result["output"]
        assert "nothing was updated with it" in result["output"]
    assert [row["step"] for row in rows(tmp_path / "unsaved") if "loss" in row] == [3]
    assert checkpoints(tmp_path / "saved")[-1].name == "checkpoint-5"
    for name in ("asked", "logged"):  # where every step is logged, the signal is noticed in front of a row
        assert checkpoints(tmp_path / name)[-1].name in ("checkpoint-5", "checkpoint-6")


def test_fp16_halves_its_scale_until_it_cannot(world, tmp_path) -> None:
    """A gradient that is not finite is its scaler's to handle while there is a scale to blame; a loss never is."""
    fp16 = ("--fp16", "true", "--logging_steps", "1")
    plan = [
        job(world, "sft", tmp_path / "halved", *fp16, fault={"nan_gradient_at": [5, 6], "fp16": 4.0}),
        job(world, "sft", tmp_path / "stop", *fp16, fault={"nan_gradient_at": [5, 6], "fp16": 2.0}),
        job(world, "sft", tmp_path / "nan", *fp16, fault={"nan_at": [5], "fp16": 4.0}),
        job(world, "sft", tmp_path / "skip", *fp16, "--skip_nonfinite", "1", fault={"nan_at": [5], "fp16": 4.0}),
    ]
    results = execute(tmp_path, plan, [0, 2, 2, 0])
    logged = [row for row in rows(tmp_path / "halved") if "loss" in row]
    assert [row["step"] for row in logged if row["grad_norm"] is None] == [5, 6], "null: JSON has no NaN"
    scales = [row["loss_scale"] for row in logged]
    assert scales[:6] == [4.0] * 4 + [2.0, 1.0] and set(scales[6:]) == {1.0}
    assert "the gradient norm is nan at step 6 (every loss is finite); nothing was updated" in results[1]["output"]
    assert "the loss is nan at step 5" in results[2]["output"]
    assert "update skipped (1 of 1 allowed)" in results[3]["output"]


def test_dropped_pairs_are_no_part_of_a_step(world, tmp_path) -> None:
    """22 pairs, 8 a step: an epoch has two steps. Where nothing is learned, every loss is ln 2, whatever the epoch."""
    still = ("--learning_rate", "0", "--logging_steps", "1", "--max_steps", "5", "--dataloader_drop_last", "true")
    execute(tmp_path, [job(world, "dpo", tmp_path / "out", *still, batch=8, accumulation=1)], [0])
    assert [row["loss"] for row in rows(tmp_path / "out") if "loss" in row] == pytest.approx([np.log(2)] * 5, rel=1e-4)


def test_a_jump_of_the_loss_is_noticed_once() -> None:
    spikes = guards.Spikes()
    falling = [6 - 0.05 * step + 0.1 * (-1) ** step for step in range(40)]
    assert [spikes.usual(loss) for loss in falling] == [None] * 40
    assert spikes.usual(7.5) == pytest.approx(float(np.median(falling[-10:])))
    assert [spikes.usual(loss) for loss in (7.6, 4.0, 4.1)] == [None] * 3
    assert guards.Spikes().usual(1e9) is None, "nothing to compare with yet"


def test_an_evaluation_at_the_start_and_samples_are_not_repeated(world, tmp_path) -> None:
    """The run is killed within a logging window, after samples whose rows have numbers of tokens as well."""
    more = "--eval_on_start true --save_steps 2 --logging_steps 5 --sample_prompts the --sample_tokens 4".split()
    execute(tmp_path, killed_and_whole(world, tmp_path, "pretrain", {"kill_at": 4}, *more), [0, -9, 0])
    assert_same(tmp_path / "pretrain-whole", tmp_path / "pretrain-killed")
    whole = rows(tmp_path / "pretrain-whole")
    assert [row["step"] for row in whole if "eval_loss" in row][:2] == [0, 2]


def test_the_best_of_weights_alone_becomes_the_final_model(world, tmp_path) -> None:
    """--save_only_model keeps no masters. Here the highest loss is the best, which is an early one's."""
    best = "--load_best_model_at_end true --save_only_model true --save_steps 2 --save_total_limit 9".split()
    more = [*best, "--metric_for_best_model", "eval_loss", "--greater_is_better", "true", "--weights_dtype", "bf16"]
    execute(tmp_path, [job(world, "pretrain", tmp_path / "out", *more)], [0])
    state = json.loads((newest(tmp_path / "out") / "trainer_state.json").read_text())
    chosen = Path(state["best_model_checkpoint"])
    assert chosen.name != newest(tmp_path / "out").name
    final, kept = weights(tmp_path / "out"), weights(chosen)
    assert all(torch.equal(final[name].float(), kept[name].float()) for name in kept)


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [21, 1])
def test_held_out_pairs_on_two_processes(world, tmp_path, pairs) -> None:
    """Each counts once: the processes have different numbers of them, or one has none."""
    lines = (world / "dpo.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "held_out.jsonl").write_text("".join(lines[:pairs]))
    more = f"--eval_data_path {tmp_path}/held_out.jsonl --eval_strategy steps --eval_steps 3 --rpo_alpha 0.5".split()
    more += "--per_device_eval_batch_size 4 --weights_dtype fp32 --max_steps 3".split()
    plan = [
        job(world, "dpo", tmp_path / "one", *more, batch=4, accumulation=2),
        job(world, "dpo", tmp_path / "two", *more, batch=2, accumulation=2, ranks=2),
    ]
    execute(tmp_path, plan, [0, 0])
    one, two = ([row for row in rows(tmp_path / name) if "eval_loss" in row][-1] for name in ("one", "two"))
    for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "lengths/chosen"):
        assert two[f"eval_{name}"] == pytest.approx(one[f"eval_{name}"], rel=1e-4, abs=1e-5), name


def test_uneven_shares_are_no_jump_of_the_loss(world, tmp_path) -> None:
    """The last step of an epoch has one row for two processes: that row's process has twice the mean as its loss."""
    still = "--learning_rate 1e-9 --max_steps 30 --logging_steps 1 --eval_strategy no --block_size 41".split()
    run = job(world, "pretrain", tmp_path / "out", *still, ranks=2, batch=1, accumulation=1)
    (result,) = execute(tmp_path, [run], [0])
    made = int(re.search(r"tokens in (\d+) rows", result["output"])[1])
    assert made % 2 and 10 < made / 2 < 30, "the case that is meant"
    assert "the loss jumped" not in result["output"]


# --- saving


def test_killed_at_some_phases_of_saving(world, whole, tmp_path) -> None:
    killed_in_saving(world, whole, tmp_path, [1, 6, 14, 19, 21, 23])


@pytest.mark.slow
def test_killed_at_every_phase_of_saving(world, whole, tmp_path) -> None:
    first = 1
    while killed_in_saving(world, whole, tmp_path, list(range(first, first + 12))):
        first += 12


def killed_in_saving(world: Path, whole: Path, folder: Path, calls: list[int]) -> bool:
    """Whatever file operation of saving is the last, what is there is whole and continues bit for bit."""
    plan = []
    for call in calls:
        directory = copy(whole.with_name("interrupted"), folder / str(call))
        plan.append(job(world, "pretrain", directory, *KEEP, fault={"kill_call": call}))
    died = [result["codes"][0] == -9 for result in execute(folder, plan)]
    for call in calls:
        found = checkpoints(folder / str(call))
        assert found and [problem(each) for each in found] == [None] * len(found)
        assert {each.name for each in found} <= {"checkpoint-4", "checkpoint-8", "checkpoint-9"}
    execute(folder, [job(world, "pretrain", folder / str(call), *KEEP) for call in calls], [0] * len(calls))
    for call in calls:
        assert_same(whole, folder / str(call))
        assert not [*(folder / str(call)).glob(".old*"), *(folder / str(call)).glob(".writing*")]
    print(calls, died)
    return all(died)


@pytest.mark.parametrize("how", [[], ["--async_save"]], ids=["waiting", "async"])
def test_a_full_disk_stops_with_one_line(world, whole, tmp_path, how) -> None:
    directory = copy(whole.with_name("interrupted"), tmp_path / "full")
    plan = [
        job(world, "pretrain", directory, *KEEP, *how, fault={"full_after": 60_000}),
        job(world, "pretrain", directory, *KEEP, *how),
    ]
    results = execute(tmp_path, plan)
    assert results[0]["codes"] == [2], results[0]
    assert "cannot save" in results[0]["output"] and "Traceback" not in results[0]["output"]
    assert results[1]["codes"] == [0]
    assert_same(whole, directory)


def test_a_disk_that_is_full_at_the_end_stops_with_one_line(world, tmp_path) -> None:
    full = {"full_after": 60_000}
    runs = [
        job(world, stage, tmp_path / stage, "--save_strategy", "no", *more, fault=full)
        for stage, more in (("pretrain", []), ("lora", ["--lora_r", "64"]))
    ]
    for result in execute(tmp_path, runs, [2, 2]):
        (line,) = [line for line in result["output"].splitlines() if line.startswith("error: ")]
        assert "File too large" in line and "Traceback" not in result["output"]


def test_saving_in_the_background_does_not_hold_up_training(world, whole, tmp_path) -> None:
    """The disk only answers once training is two steps further; every third step's checkpoint is kept."""
    more = ("--async_save", "--save_steps", "1", "--keep_every", "3", "--save_total_limit", "2")
    plan = [
        job(world, "pretrain", tmp_path / "async", *KEEP, "--async_save", fault={"slow_disk": 2}),
        job(world, "pretrain", tmp_path / "kept", *more),
    ]
    execute(tmp_path, plan, [0, 0])
    assert_same(whole, tmp_path / "async")
    assert [path.name for path in checkpoints(tmp_path / "kept")] == [f"checkpoint-{n}" for n in (3, 6, 8, 9)]
    assert all(problem(path) is None for path in checkpoints(tmp_path / "kept"))


def test_damaged_checkpoints_are_skipped_with_a_reason(world, whole, tmp_path) -> None:
    skipped, none, rewritten = (copy(whole, tmp_path / name) for name in ("skipped", "none", "rewritten"))
    os.truncate(skipped / "checkpoint-9" / "model.safetensors", 1000)
    (skipped / "checkpoint-8" / MANIFEST).write_text("{")
    for checkpoint in checkpoints(none):
        (checkpoint / "optimizer.pt").unlink()
    data = tmp_path / "pretrain.jsonl"
    shutil.copyfile(world / "pretrain.jsonl", data)
    shutil.rmtree(rewritten)
    other = ["--data_path", str(data)]
    plan = [
        job(world, "pretrain", skipped, *KEEP),
        job(world, "pretrain", none, *KEEP),
        job(world, "pretrain", rewritten, *other, fault={"kill_at": 5}),
        job(world, "pretrain", Path("/proc/nowhere")),
    ]
    results = execute(tmp_path, plan, [0, 2, -9, 2])
    assert "checkpoint-9: model.safetensors has 1,000 bytes where the manifest says" in results[0]["output"]
    assert f"checkpoint-8: its {MANIFEST} is unreadable" in results[0]["output"]
    assert "continued from" in results[0]["output"] and "checkpoint-4" in results[0]["output"]
    assert_same(whole, skipped)
    assert "no checkpoint of" in results[1]["output"] and "optimizer.pt is missing" in results[1]["output"]
    assert len(checkpoints(none)) == 3, "nothing is deleted"
    assert "cannot write there" in results[3]["output"]
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    result = execute(tmp_path, [job(world, "pretrain", rewritten, *other)], [2])[0]
    assert "pretrain.jsonl has changed" in result["output"]


def test_what_is_wrong_with_a_checkpoint(tmp_path) -> None:
    def sealed(name: str) -> Path:
        directory = tmp_path / name
        (directory / "global_step1").mkdir(parents=True)
        (directory / "model-00001-of-00002.safetensors").write_bytes(b"a" * 100)
        (directory / "global_step1" / "shard_0.pt").write_bytes(b"b" * 100)
        seal(directory, step=1)
        assert problem(directory) is None
        return directory

    missing, flipped, unsealed, partial, weights_only = map(sealed, ("1", "2", "3", "4", "5"))
    (missing / "global_step1" / "shard_0.pt").unlink()
    assert problem(missing) == "global_step1/shard_0.pt is missing"
    (flipped / "model-00001-of-00002.safetensors").write_bytes(b"a" * 99 + b"c")
    assert "is not what was written" in problem(flipped)
    (unsealed / MANIFEST).unlink()
    assert f"no {MANIFEST}" in problem(unsealed)
    (partial / MANIFEST).write_text('{"files": {"a": 1}}')
    assert "unreadable" in problem(partial)
    seal(weights_only, resumable=False)
    assert "--save_only_model" in problem(weights_only)


def test_no_limit_deletes_nothing(tmp_path) -> None:
    for limit in (-1, 0, None):
        for step in range(1, 5):
            (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
        rotate(tmp_path, limit, 0, None)
        assert len(checkpoints(tmp_path)) == 4
    rotate(tmp_path, 1, 0, None)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4"]


# --- more steps, branches


def test_a_run_that_went_back_goes_on_and_is_done(world, whole, tmp_path) -> None:
    """The same command again, as a scheduler repeats it: where the run had come to, though the start is deleted."""
    back = copy(whole, tmp_path / "back")
    more = ("--resume_from_checkpoint", str(back / "checkpoint-4"), "--save_steps", "1", "--learning_rate", "5e-3")
    plan = [
        job(world, "pretrain", back, *more, fault={"kill_at": 9}),
        job(world, "pretrain", back, *more),
        job(world, "pretrain", back, *more),
    ]
    results = execute(tmp_path, plan, [-9, 0, 0])
    assert "checkpoint-4" in results[0]["output"] and not (back / "checkpoint-4").exists()
    assert "checkpoint-8" in results[1]["output"].partition("continued from")[2].splitlines()[0]
    assert "nothing to do" in results[2]["output"]
    again = ("--resume_from_checkpoint", str(back / "checkpoint-8"), "--save_steps", "1")  # another start: back it is
    result = execute(tmp_path, [job(world, "pretrain", back, *again, fault={"kill_at": 9})], [-9])[0]
    assert "checkpoint-8" in result["output"] and [path.name for path in checkpoints(back)][-1] == "checkpoint-8"


def test_more_steps_branches_and_other_peoples_weights(world, whole, tmp_path) -> None:
    longer, straight = copy(whole, tmp_path / "longer"), tmp_path / "straight"
    shutil.copytree(whole, straight)
    linear = ("--lr_scheduler_type", "linear", "--warmup_steps", "0")
    branch = ("--resume_from_checkpoint", str(whole / "checkpoint-4"), "--learning_rate", "5e-3")
    config = LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    theirs = ["--data_path", str(world / "sft.jsonl"), "--tokenizer_path", str(world / "tokenizer")]
    foreign = job(world, "sft", tmp_path / "tuned", "--model_path", str(tmp_path / "theirs"), *theirs)
    plan = [
        job(world, "pretrain", tmp_path / "linear", *linear),
        job(world, "pretrain", tmp_path / "linear", *linear, "--additional_steps", "3", fault={"kill_at": 11}),
        job(world, "pretrain", tmp_path / "linear", *linear, "--additional_steps", "3", "--logging_steps", "1"),
        job(world, "pretrain", tmp_path / "linear", *linear, "--additional_steps", "3"),
        job(world, "pretrain", tmp_path / "linear", *linear),
        job(world, "pretrain", longer, *KEEP, "--additional_steps", "3", fault={"kill_at": 11}),
        job(world, "pretrain", longer, *KEEP, "--additional_steps", "3"),
        job(world, "pretrain", straight, *KEEP, "--additional_steps", "3"),
        job(world, "pretrain", tmp_path / "branch", *branch, fault={"kill_at": 9}),
        job(world, "pretrain", tmp_path / "branch", *branch),
        job(world, "pretrain", tmp_path / "branch", *branch),
        foreign,
    ]
    results = execute(tmp_path, plan, [0, -9, 0, 0, 2, -9, 0, 0, -9, 0, 0, 0])
    rates = {row["step"]: row["learning_rate"] for row in rows(tmp_path / "linear") if "learning_rate" in row}
    assert rates[9] > 0  # of the first plan, whose last update is made with 1/9
    for step in (10, 11, 12):
        assert rates[step] == pytest.approx(1e-2 * (12 - step + 1) / 12)
    assert "nothing to do" in results[3]["output"]
    assert "--additional_steps 3, not 0" in results[4]["output"]
    assert_same(longer, straight)
    assert "checkpoint-8" in results[9]["output"] and "nothing to do" in results[10]["output"]
    branched = {row["step"]: row for row in rows(tmp_path / "branch") if "loss" in row}
    original = {row["step"]: row for row in rows(whole) if "loss" in row}
    assert branched[3] == original[3] and branched.keys() == original.keys()
    for step in (6, 9):
        assert branched[step]["learning_rate"] == pytest.approx(original[step]["learning_rate"] / 2)
        assert branched[step]["tokens"] == original[step]["tokens"]
    assert checkpoints(whole)[0].name == "checkpoint-4", "the origin is left alone"
    assert (tmp_path / "tuned/model.safetensors").is_file()


# --- larger matrices


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_continues_bit_for_bit_on_one_and_two_ranks(world, tmp_path, stage, ranks) -> None:
    """With and without accumulation; killed at the first step of an epoch and in its middle; saved in background."""
    plan = []
    for accumulation, step, more in ((1, 6, ()), (3, 5, ("--async_save",))):
        folder = tmp_path / str(accumulation)
        folder.mkdir()
        layout = {"ranks": ranks, "batch": 2, "accumulation": accumulation}
        plan += killed_and_whole(world, folder, stage, {"kill_at": step, "rank": ranks - 1}, *more, **layout)
    execute(tmp_path, plan, [0, None, 0] * 2)
    for accumulation in ("1", "3"):
        assert_same(tmp_path / accumulation / f"{stage}-whole", tmp_path / accumulation / f"{stage}-killed")


@pytest.mark.slow
def test_torchrun_ends_when_a_rank_dies_and_continues(world, tmp_path) -> None:
    """From outside: a rank under torchrun is killed while it trains; the launcher ends; the same command goes on."""
    run = job(world, "pretrain", tmp_path / "died", "--max_steps", "300", "--save_steps", "3", batch=1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, f"{run['script']}.py", *run["argv"]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"cwd": ROOT, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as process:
        deadline = time.monotonic() + 100
        while not (found := checkpoints(tmp_path / "died")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert found
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(pid) for pid in children if b"train_pretrain" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    reached = newest(tmp_path / "died")
    with subprocess.Popen(command, **quiet) as process:
        while newest(tmp_path / "died").name == reached.name and time.monotonic() < deadline + 100:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # torchrun passes it on: both ranks finish their step and save
        process.wait(timeout=60)
    stopped = newest(tmp_path / "died")
    assert problem(stopped) is None and int(stopped.name.partition("-")[2]) > int(reached.name.partition("-")[2])
    assert not (tmp_path / "died" / "training_complete.json").exists()
