"""Files of accelerate_offload/, and the commands of the documents the toolkit was specified from.

Every file is read by the program it is for; every row of docs/reference_commands.md names what exists; the documents'
command lines run, shrunken by documented flags.
"""

import importlib
import io
import json
import os
import re
import subprocess
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from deepspeed.launcher.runner import fetch_hostfile
from deepspeed.runtime.config import DeepSpeedConfig
from torch.distributed.launcher.api import LaunchConfig
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from smolkit import command_line, runs
from smolkit.errors import UserError
from smolkit.renamed import TODAY

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "accelerate_offload"
TABLE = ROOT / "docs" / "reference_commands.md"
STAGES = {
    f"train_{name}.py": command_line.STAGES[stage]
    for name, stage in (("pretrain", "pretrain"), ("full_sft", "sft"), ("lora", "lora"), ("dpo", "dpo"))
}


# --- the files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("ds_*.json")), ids=lambda path: path.stem)
def test_deepspeed_files_are_read_by_transformers_and_deepspeed(path, tmp_path) -> None:
    args = command_line.PretrainTrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=3, max_steps=1)
    filled = HfTrainerDeepSpeedConfig(str(path))
    filled.trainer_config_process(args)
    assert not filled.mismatches
    config = DeepSpeedConfig(filled.config)
    zero = config.zero_config
    assert config.train_micro_batch_size_per_gpu == 3
    assert config.gradient_clipping == args.max_grad_norm
    expected = {
        "ds_config": (3, "cpu", "cpu"),
        "ds_zero1": (1, None, None),
        "ds_zero2": (2, None, None),
        "ds_zero2_experts": (2, None, None),
        "ds_zero3": (3, None, None),
        "ds_zero3_nvme": (3, "nvme", "nvme"),
    }
    devices = [part and str(part.device) for part in (zero.offload_optimizer, zero.offload_param)]
    assert (zero.stage, *devices) == expected[path.stem]
    if zero.stage == 3:
        assert zero.gather_16bit_weights_on_model_save, "checkpoints would not be whole"
    # Trainer's own AdamW and schedule, so that every strategy optimises alike.
    assert not {"optimizer", "scheduler"} & json.loads(path.read_text()).keys()


@pytest.mark.parametrize(
    "name, kind, processes",
    [("ddp", "MULTI_GPU", 2), ("fsdp2", "FSDP", 2), ("deepspeed", "DEEPSPEED", 2), ("cpu", "NO", 1)],
)
def test_accelerate_files_are_read_by_accelerate(name, kind, processes) -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"ddp", "fsdp2", "deepspeed", "cpu"}
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (str(config.distributed_type.value), config.num_processes) == (kind, processes)
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name == "deepspeed":
        assert (ROOT / config.deepspeed_config["deepspeed_config_file"]).is_file()


def test_the_hostfile_is_read_by_deepspeed() -> None:
    assert dict(fetch_hostfile(str(CONFIGS / "hostfile"))) == {"node1": 8, "node2": 8}


@pytest.mark.parametrize("path", [*CONFIGS.glob("*.sh"), CONFIGS / "slurm.sbatch"], ids=lambda path: path.name)
def test_scripts_are_valid_shell(path) -> None:
    result = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_two_node_scripts_say_what_is_missing() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("NODE_RANK", "MAIN_ADDRESS")}
    for kind in ("torchrun", "accelerate"):
        command = ["bash", str(CONFIGS / f"two_nodes_{kind}.sh"), "train_pretrain.py"]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode and "NODE_RANK: the number of this node" in result.stderr


def test_two_node_scripts_leave_time_to_save(tmp_path, monkeypatch) -> None:
    """torch, which kills what still runs, reads the seconds from where the scripts put them."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    for kind in ("torchrun", "accelerate"):
        (tmp_path / kind).write_text("#!/bin/sh\necho $TORCH_ELASTIC_SHUTDOWN_TIMEOUT\n")
        (tmp_path / kind).chmod(0o755)
        command = ["bash", str(CONFIGS / f"two_nodes_{kind}.sh"), "train_pretrain.py"]
        for given, seconds in ({}, "300"), ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}, "60"):
            environment = {**os.environ, "NODE_RANK": "0", "MAIN_ADDRESS": "here", **given}
            assert subprocess.run(command, capture_output=True, text=True, env=environment).stdout.strip() == seconds
    assert LaunchConfig(1, 1, 1).shutdown_timeout == 30
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    assert LaunchConfig(1, 1, 1).shutdown_timeout == 300


def test_the_readme_names_every_file() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in CONFIGS.iterdir():
        assert path.name in readme, path


def test_offload_to_a_disk_is_refused_where_it_cannot_work(tmp_path, monkeypatch) -> None:
    content = json.loads((CONFIGS / "ds_zero3_nvme.json").read_text())
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=content))
    args = SimpleNamespace(deepspeed_plugin=plugin, bf16=False, fp16=False)
    for part in ("offload_optimizer", "offload_param"):
        content["zero_optimization"][part]["nvme_path"] = str(tmp_path / "absent")
    with pytest.raises(UserError, match="nvme_path .*absent is no writable directory"):
        runs.check_disk_offload(args)
    (tmp_path / "absent").mkdir()
    with pytest.raises(UserError, match="in 16 bits, also those of a run in fp32: add --bf16 true"):
        runs.check_disk_offload(args)
    args.bf16 = True
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", lambda self, verbose: False)
    with pytest.raises(UserError, match="libaio-dev"):
        runs.check_disk_offload(args)
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", lambda self, verbose: True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    lock.touch()
    runs.check_disk_offload(args)  # somebody else compiles it now
    os.utime(lock, (time.time() - 3600,) * 2)
    with pytest.raises(UserError, match=f"began 60 minutes ago .* delete {lock}"):
        runs.check_disk_offload(args)
    lock.unlink()
    runs.check_disk_offload(args)


def test_deepspeed_wants_a_launcher(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    line = f"--data_path x --model_size tiny --output_dir {tmp_path}/out --deepspeed {CONFIGS}/ds_zero2.json"
    with pytest.raises(UserError, match="--deepspeed needs a launcher"):
        command_line.parse(STAGES["train_pretrain.py"], line.split(), "")


@pytest.mark.parametrize("stage", ["train_pretrain.py", "train_full_sft.py", "train_lora.py", "train_dpo.py"])
def test_fp16_wants_a_gpu(stage, tmp_path, monkeypatch) -> None:
    """Asked for by the flag or by a launcher, which tells it to accelerate in the environment."""
    start = {"train_pretrain.py": "--model_size tiny", "train_dpo.py": "--model_path x"}.get(stage, "--base_model x")
    line = f"--data_path x {start} --output_dir {tmp_path}/out --use_cpu true"
    with pytest.raises(UserError, match="^--fp16 needs a GPU; on a CPU leave it out"):
        command_line.parse(STAGES[stage], [*line.split(), "--fp16", "true"], "")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="^the launcher's --mixed_precision fp16 needs a GPU"):
        command_line.parse(STAGES[stage], line.split(), "")


def test_weights_are_fp32_where_something_else_has_the_masters(tmp_path, monkeypatch) -> None:
    """bf16 weights without masters would lose small updates; under an accelerate file only the environment tells."""
    args = command_line.PretrainTrainingArguments(output_dir=str(tmp_path), max_steps=1)
    assert runs.sharding_engine(args) is None
    assert runs.weights_dtype("bf16", args) == torch.bfloat16
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert runs.sharding_engine(args) == "FSDP2"
    assert runs.weights_dtype("auto", args) == torch.float32
    with pytest.raises(UserError, match="--weights_dtype bf16 contradicts FSDP2"):
        runs.weights_dtype("bf16", args)


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """Flags of each script, as its own help prints them."""
    known = {}
    for script in sorted(path.name for path in ROOT.glob("*.py") if not path.stem.startswith("smol_")):
        printed = io.StringIO()
        with redirect_stdout(printed), pytest.raises(SystemExit):
            help_flag = "--help_all" if script in STAGES else "--help"
            importlib.import_module(script.removesuffix(".py")).main([help_flag])
        known[script] = set(re.findall(r"--[a-z][a-z0-9_-]*", printed.getvalue()))
        assert known[script]
    return known


def rows() -> list[list[str]]:
    """The three cells of each row of the table."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if row[0] != "there"]


def test_every_row_of_the_table_names_what_exists(flags) -> None:
    everywhere = set().union(*flags.values())
    for row in rows():
        assert len(row) == 3, row
        assert row[1] in ("kept", "renamed", "refused", "not yet"), row
        script = None
        for word in re.findall(r"[a-z_0-9/]+\.(?:py|yaml|json)\b|--[a-z][a-z0-9_]*", row[2]):
            if not word.startswith("--"):
                script = word if word.endswith(".py") else script
                assert (ROOT / word).is_file() or word in ("smol_model.py",), (word, row)
            elif "hf download" not in row[2]:
                launcher = word in ("--num_processes", "--mixed_precision", "--nproc_per_node")
                assert launcher or word in (flags.get(script) or everywhere), (script, word, row)


def test_every_flag_and_file_of_the_documents_is_in_the_table() -> None:
    folder = ROOT.parent / "shared" / "reference"
    if not folder.is_dir():
        pytest.skip(f"the documents are not at {folder}")
    there = " ".join(row[0] for row in rows())
    for path in sorted(folder.glob("*.txt")):
        text = re.sub(r"https?://\S+", "", path.read_text(encoding="utf-8"))
        names = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_]*", text))
        names |= set(re.findall(r"\b[\w-]+\.(?:py|sh|ipynb)\b", text))
        launcher = {"--multi_gpu", "--mixed_precision", "--num_gpus", "--standalone", "--nproc_per_node"}
        launcher |= {"train_script.py"}  # a placeholder
        missing = sorted(name for name in names - launcher if name not in there)
        assert not missing, f"{path.name}: {missing}"


# --- spellings of yesterday ------------------------------------------------------------------------------------------


def test_hints_name_flags_that_exist(flags) -> None:
    everywhere = set().union(*flags.values())
    for name, text in TODAY.items():
        for flag in re.findall(r"--[a-z][a-z0-9_]*", text):
            assert flag in everywhere, (name, flag)
        assert not all(f"--{name}" in flags[script] for script in STAGES), f"--{name} is a flag everywhere"


@pytest.mark.parametrize(
    "script, old, today",
    [
        ("train_dpo.py", "--evaluation_strategy steps", "--eval_strategy"),
        ("train_full_sft.py", "--max_seq_length 2048", "--max_length"),
        ("train_pretrain.py", "--max-seq-length=2048", "--block_size"),
        ("train_pretrain.py", "--total_batch_size 524288", "--gradient_accumulation_steps"),
        ("train_pretrain.py", "--train P", "train_dpo.py"),
        ("train_lora.py", "--warmup_ratio 0.1", "--warmup_steps"),
        ("train_pretrain.py", "--beta 0.1", "train_dpo.py --beta"),
    ],
)
def test_old_spellings_are_refused_with_todays(script, old, today, tmp_path) -> None:
    needed = {"train_dpo.py": "--model_path x", "train_pretrain.py": "--model_size tiny"}.get(script, "--base_model x")
    line = f"--data_path x {needed} {old} --output_dir {tmp_path}/out"
    with pytest.raises(UserError, match=f"unknown argument {old.split()[0].split('=')[0]}.*{re.escape(today)}"):
        command_line.parse(STAGES[script], line.split(), "")


def test_old_spellings_in_a_file_are_refused_with_todays(tmp_path) -> None:
    (tmp_path / "old.yaml").write_text("data_path: x\nevaluation_strategy: steps\n")
    with pytest.raises(UserError, match="old.yaml: unknown argument 'evaluation_strategy': it is --eval_strategy now"):
        command_line.parse(STAGES["train_dpo.py"], ["--config", str(tmp_path / "old.yaml")], "")
