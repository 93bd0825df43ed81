"""Expert parallelism: every strategy against one process that sees the same micro-batches, on gloo ranks."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import prepare_datasets
import train_lora
import train_pretrain
import train_tokenizer
from smol_config import SmolConfig
from smolkit.errors import UserError
from smolkit.parallel import check_expert_parallel, group_ranks

ROOT = Path(__file__).resolve().parent.parent
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
GRID = ("ragged", "empty", "accumulation", "clip", "capacity", "all")
slow = pytest.mark.slow


def command(*words: object, expect: int = 0) -> str:
    """Run one command in the checkout, as a user would, with a thread per process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    limited = ["timeout", "--signal", "KILL", "600", *map(str, words)]  # which ends a launcher's workers with it
    result = subprocess.run(limited, capture_output=True, text=True, cwd=ROOT, env=env)
    assert result.returncode == expect, f"{words}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result.stdout + result.stderr


def torchrun(processes: int, *words: object, expect: int = 0) -> str:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes)
    return command(*launcher, *words, expect=expect)


def reports(folder: Path, processes: int, size: int, cases: list[str]) -> dict[str, dict[str, Any]]:
    """What parallel_worker.py reports of all `cases` (strategy:case), from one launch."""
    torchrun(processes, ROOT / "tests" / "parallel_worker.py", folder / "report.json", size, *cases)
    found = json.loads((folder / "report.json").read_text())
    assert list(found) == cases
    return found


def check_equal(report: dict[str, Any], case: str, processes: int) -> None:
    """Per-step loss, gradient norm and the updated weights are those of one process; so is the validation loss."""
    assert report["world"] == processes and report["names"]
    assert report["loss"] == pytest.approx(report["expected_loss"], rel=1e-6)
    assert report["norm"] == pytest.approx(report["expected_norm"], rel=1e-6)
    assert report["weights"] < 1e-6 < 1e-3 < report["moved"]
    assert report["validation"] == pytest.approx(report["expected_validation"], rel=1e-6)
    assert len(report["loss"]) == 3
    # the case is what its name says
    assert (report["idle"] == 0) == (case == "empty"), "a process without rows for its experts"
    assert (report["dropped"] > 0.05) == (case == "capacity")
    if case in ("clip", "all"):
        assert min(report["norm"]) > 3 * 0.1
    logged = report["logged"]
    loads = [value for name, value in logged.items() if "load" in name]
    assert sum(loads) == pytest.approx(len(loads), rel=1e-5) and len(loads) > 1
    assert logged["expert_parallel/all_to_all_runtime_max"] >= logged["expert_parallel/all_to_all_runtime"] > 0


def check_resumed(report: dict[str, Any], strategy: str) -> None:
    """Native directories whatever the placement; the same placement continues bit for bit, another one if it can."""
    assert report["architecture"] == "MixtralForCausalLM"
    assert report["final"] == 0.0 and report["logits"] < 1e-5
    assert report["middle"] > 1e-3, "the checkpoint is of an earlier step"
    assert {"config.json", "model.safetensors", "tokenizer.json", "expert_parallel.json"} <= set(report["files"])
    assert report["continued"] == 0.0
    # the plan is the new command's, except that DeepSpeed keeps its checkpoint's
    assert report["branched"] == (1e-2 if strategy.startswith("zero") else 5e-3)
    assert report["best_step"] < 4 and report["best"] == 0.0
    assert report["best_evaluation"][0] == pytest.approx(report["best_evaluation"][1], rel=1e-6)
    if strategy.startswith("zero"):
        assert "--expert_parallel_size 2 (deepspeed), which 1 (deepspeed) cannot continue" in report["elsewhere"]
    else:
        assert report["elsewhere"] < (1e-2 if strategy == "masters" else 2e-6)
    if strategy in ("ddp", "masters"):
        assert report["spread later"] < (1e-2 if strategy == "masters" else 2e-6)
    else:  # their engines keep parts of an optimizer state without spread experts
        assert "--expert_parallel_size 1 (by number), which 2 (" in report["spread later"]
    if strategy == "masters":
        assert report["norms"][0] == pytest.approx(report["norms"][1], rel=1e-5)


def test_two_processes_equal_one(tmp_path) -> None:
    """One launch for every strategy: accumulation, clipping, recomputation, a limit, a process without rows."""
    cases = ["ddp:all", "ddp:empty", "ddp:capacity", "fsdp2:all", "zero1:all", "zero2:all", "zero3:all", "zero3:empty"]
    found = reports(tmp_path, 2, 2, [*cases, "masters:resume"])
    check_resumed(found.pop("masters:resume"), "masters")  # bf16 weights, fp32 masters, under DDP
    for item, report in found.items():
        check_equal(report, item.split(":")[1], 2)


@slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_full_grid(strategy: str, tmp_path) -> None:
    cases = [f"{strategy}:{case}" for case in GRID]
    for item, report in reports(tmp_path, 2, 2, cases).items():
        check_equal(report, item.split(":")[1], 2)


@slow
def test_offload_and_an_optimizer_from_the_deepspeed_config(tmp_path) -> None:
    cases = ["zero3-offload:all", "zero1-config:all", "zero2-config:all", "zero3-config:all"]
    for report in reports(tmp_path, 2, 2, cases).values():
        check_equal(report, "all", 2)


@slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_four_processes_equal_one(strategy: str, size: int, tmp_path) -> None:
    """Size 2: two groups, and two processes with the same experts."""
    for item, report in reports(tmp_path, 4, size, [f"{strategy}:{case}" for case in GRID]).items():
        check_equal(report, item.split(":")[1], 4)


@slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpoints_are_whole_and_continue(strategy: str, tmp_path) -> None:
    report = reports(tmp_path, 2, 2, [f"{strategy}:resume"])[f"{strategy}:resume"]
    check_resumed(report, strategy)


@slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
def test_checkpoints_of_four_processes_continue(strategy: str, tmp_path) -> None:
    report = reports(tmp_path, 4, 2, [f"{strategy}:resume"])[f"{strategy}:resume"]
    check_resumed(report, strategy)


# --- placement and refusals


def test_groups_are_neighbours_on_a_node() -> None:
    assert group_ranks(["a"] * 4, 2) == [[0, 1], [2, 3]]
    assert group_ranks(["a", "b", "a", "b"], 2) == [[0, 2], [1, 3]]
    assert group_ranks(["b", "b", "a", "a", "b", "b", "a", "a"], 4) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert group_ranks(["a", "a", "b", "b"], 4) == [[0, 1, 2, 3]]


MOE = SmolConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)


def run_arguments(**more: Any) -> Any:
    values = dict(world_size=4, fp16=False, mixed_precision="no", deepspeed_plugin=None, fsdp_plugin_args=None)
    return SimpleNamespace(**values | more)


def stage(number: int) -> Any:
    return SimpleNamespace(hf_ds_config=SimpleNamespace(_stage=number))


@pytest.mark.parametrize(
    "size, config, run, message",
    [
        (0, MOE, {}, "must be at least 1"),
        (2, SmolConfig(), {}, "the model is dense"),
        (3, MOE, {}, r"does not divide the 4 experts; possible: \[1, 2, 4\]"),
        (4, MOE, {"world_size": 2}, r"more than the 2 process\(es\)"),
        (4, MOE, {"world_size": 6}, "does not divide the 6 processes"),
        (2, MOE, {"fp16": True}, "use --bf16"),
        (2, MOE, {"deepspeed_plugin": stage(0)}, "stage 1, 2 or 3"),
        (2, MOE, {"fsdp_plugin_args": {"fsdp_version": 1}}, "version 2 of FSDP"),
        (4, MOE, {"fsdp_plugin_args": {"fsdp_version": 2}, "world_size": 20}, "cannot cut 1 experts of width 24"),
    ],
)
def test_impossible_sizes_are_refused_in_one_line(size, config, run, message) -> None:
    with pytest.raises(UserError, match=message) as error:
        check_expert_parallel(size, config, run_arguments(**run))
    assert "\n" not in str(error.value)


def test_possible_sizes_are_not_refused() -> None:
    check_expert_parallel(1, SmolConfig(), run_arguments(world_size=1))
    for size in (1, 2, 4):
        check_expert_parallel(size, MOE, run_arguments())
        check_expert_parallel(size, MOE, run_arguments(deepspeed_plugin=stage(3)))
        check_expert_parallel(size, MOE, run_arguments(fsdp_plugin_args={"fsdp_version": 2}))


# --- the scripts


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A twentieth of the built-in world, a tokenizer and a MoE model, pretrained by one process."""
    folder = tmp_path_factory.mktemp("experts")
    prepare_datasets.main(["--source", "tiny", "--small", "--output_dir", str(folder)])
    train_tokenizer.main(
        ["--mode", "train", "--data_path", str(folder / "pretrain"), "--vocab_size", "512"]
        + ["--save_dir", str(folder / "tokenizer")]
    )
    train_pretrain.main([*pretrain(folder, folder / "one"), "--gradient_accumulation_steps", "2"])
    return folder


def pretrain(world: Path, output: Path) -> list[str]:
    return f"""--data_path {world}/pretrain --tokenizer_path {world}/tokenizer --model_size tiny-moe --model_overrides
        hidden_size=64 num_hidden_layers=2 num_attention_heads=2 num_key_value_heads=1 moe_intermediate_size=48
        capacity_factor=1.25 --block_size 64 --per_device_train_batch_size 4 --max_steps 6 --logging_steps 1
        --weights_dtype fp32 --max_eval_rows 16 --disable_tqdm true --sample_prompts The --sample_tokens 6
        --output_dir {output}""".split()


def stage_arguments(program: str, world: Path, output: Path) -> list[str]:
    """Two steps of a stage that starts from the pretrained model."""
    part, start = ("dpo", "--model_path") if "dpo" in program else ("sft", "--base_model")
    return f"""--data_path {world}/{part} {start} {world}/one --max_length 128 --max_steps 2 --logging_steps 1
        --per_device_train_batch_size 2 --weights_dtype fp32 --max_eval_rows 0 --disable_tqdm true
        --output_dir {output}""".split()


def metrics(directory: Path, name: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def check_same_run(one: Path, two: Path, steps: int, tolerance: float = 1e-5) -> None:
    """Equal losses and norms in metrics.jsonl and equal final weights; timing and load are logged by one of them."""
    for name in ("loss", "grad_norm", "eval_loss"):
        assert metrics(two, name) == pytest.approx(metrics(one, name), rel=tolerance), name
    assert len(metrics(one)) == steps
    weights = [load_file(folder / "model.safetensors") for folder in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=10 * tolerance)
    timing = [json.loads(line) for line in (two / "timing.jsonl").read_text().splitlines()]
    assert all(row["expert_parallel/all_to_all_runtime"] > 0 for row in timing if "tokens_per_second" in row)
    assert "expert_parallel" not in (one / "timing.jsonl").read_text()


def test_pretraining_with_spread_experts_equals_one_process(world, tmp_path) -> None:
    torchrun(2, "train_pretrain.py", *pretrain(world, tmp_path / "two"), "--expert_parallel_size", 2)
    check_same_run(world / "one", tmp_path / "two", 6)
    samples = [(folder / "samples.jsonl").read_text() for folder in (world / "one", tmp_path / "two")]
    assert samples[0] == samples[1] and "The" in samples[0], "generation needs all experts in one process"
    loads = [metrics(tmp_path / "two", f"expert_parallel/load_{place}") for place in (0, 1)]
    assert [a + b for a, b in zip(*loads, strict=True)] == pytest.approx([2.0] * 6, rel=1e-5)


ZERO = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


def under_deepspeed(stage: int, folder: Path, program: str, arguments: list[str]) -> None:
    """Two processes with half of the experts each, started by DeepSpeed's launcher; `folder` is for its file."""
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    (folder / "zero.json").write_text(json.dumps(ZERO | {"zero_optimization": zero}))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launcher = (Path(sys.executable).with_name("deepspeed"), "--num_gpus", 2, "--master_port", port)
    more = ("--expert_parallel_size", 2, "--deepspeed", folder / "zero.json")
    command(*launcher, program, *arguments, *more)


@slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_pretraining_under_the_deepspeed_launcher_equals_one_process(world, tmp_path, stage: int) -> None:
    under_deepspeed(stage, tmp_path, "train_pretrain.py", pretrain(world, tmp_path / "two"))
    check_same_run(world / "one", tmp_path / "two", 6)


@slow
@pytest.mark.parametrize("zero_stage", [None, 1, 2, 3])
@pytest.mark.parametrize("program", ["train_full_sft.py", "train_dpo.py"])
def test_other_stages_with_spread_experts_equal_one_process(world, tmp_path, program: str, zero_stage) -> None:
    """Under torchrun (None), and under DeepSpeed's launcher."""
    one = stage_arguments(program, world, tmp_path / "one")
    command(sys.executable, program, *one, "--gradient_accumulation_steps", 2)
    two = stage_arguments(program, world, tmp_path / "two")
    if zero_stage is None:
        torchrun(2, program, *two, "--expert_parallel_size", 2)
    else:
        under_deepspeed(zero_stage, tmp_path, program, two)
    check_same_run(tmp_path / "one", tmp_path / "two", 2)


def test_a_bad_size_leaves_nothing_behind(world, tmp_path) -> None:
    for size, message in ((2, "more than the 1 process"), (3, "does not divide the 4 experts")):
        with pytest.raises(UserError, match=message):
            train_pretrain.main([*pretrain(world, tmp_path / "out"), "--expert_parallel_size", str(size)])
    dense = [word for word in pretrain(world, tmp_path / "out") if "moe_" not in word and "capacity" not in word]
    dense[dense.index("tiny-moe")] = "tiny"
    with pytest.raises(UserError, match="the model is dense"):
        train_pretrain.main([*dense, "--expert_parallel_size", "2"])
    lora = f"--data_path {world}/sft --base_model {world}/one --output_dir {tmp_path}/out".split()
    with pytest.raises(UserError, match="PEFT's adapters know nothing of spread experts"):
        train_lora.main([*lora, "--expert_parallel_size", "2"])
    assert not (tmp_path / "out").exists()
