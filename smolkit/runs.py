"""One run of a training script: its files, what determines its result, where it stands on disk.

A run leaves `run_settings.json` when it starts and `training_complete.json` when it is done, so that running
the same command again continues an interrupted run, does nothing for a finished one and refuses changed
settings.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from smolkit.arguments import PlanArguments, StageArguments
from smolkit.doctor import expand_paths, validation_path
from smolkit.doctor.checkup import glance
from smolkit.errors import UserError
from smolkit.files import write_json
from smolkit.run_report import REPORT_FILES, RUN_FILES, write_report
from smolkit.runtime import compute_dtype
from smolkit.shards import token_store

SETTINGS_FILE = "run_settings.json"  # what the run was started with; changed settings are refused
COMPLETE_FILE = "training_complete.json"  # written last; its presence means the directory is final
_ADAMW = ("adamw_torch", "adamw_torch_fused")


@dataclass
class Job:
    """A training run, resolved before any work.

    `files`, `eval_files`: data. `dtype`: of the weights in training, `save_dtype`: of the final ones.
    `finished`: nothing is left to do. `checkpoint`: where an interrupted run continues, or None.
    """

    args: TrainingArguments
    files: list[Path]
    eval_files: list[Path]
    dtype: torch.dtype
    save_dtype: torch.dtype
    settings: dict[str, Any]
    finished: bool
    checkpoint: str | None

    def announce(self, facts: dict[str, Any]) -> None:
        """Print what was resolved, on the main process."""
        if self.args.process_index == 0:
            width = max(map(len, facts))
            print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()), flush=True)

    def begin(self) -> None:
        """Make the output directory ready: settings written, traces of an earlier run removed."""
        if not self.args.should_save:
            return
        directory = Path(self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / COMPLETE_FILE).unlink(missing_ok=True)
        if self.checkpoint is None:
            for old in directory.glob("checkpoint-*"):
                shutil.rmtree(old)
            for name in (*RUN_FILES, *REPORT_FILES):
                (directory / name).unlink(missing_ok=True)
        write_json(directory / SETTINGS_FILE, self.settings)

    def where(self) -> str:
        """Output directory, and the checkpoint the run continues from."""
        return self.args.output_dir + (f", continued from {self.checkpoint}" if self.checkpoint else "")


def open_job(
    stage: StageArguments,
    args: TrainingArguments,
    suffixes: Sequence[str],
    models: Iterable[str | Path | None],
    **more: Any,
) -> Job:
    """Resolve a run from its arguments; changes nothing on disk.

    `suffixes`: of data files. `models`: directories the result depends on. `more`: other settings it depends
    on. Raises `UserError` for missing data, contradicting flags, and an output directory that is taken.
    """
    dtype = weights_dtype(stage.weights_dtype, args)
    files = token_store(stage.data_path) or expand_paths(stage.data_path, suffixes)
    eval_files: list[Path] = []
    if stage.max_eval_rows:
        twins = (validation_path(path) for path in files)
        found = [path for path in dict.fromkeys(twins) if path is not None]
        named = stage.eval_data_path
        eval_files = token_store(named) or expand_paths(named, suffixes) if named else found
    if args.eval_strategy != "no" and not eval_files:
        why = "--max_eval_rows is 0" if not stage.max_eval_rows else "there is no file in validation/ beside the data"
        raise UserError(f"nothing to evaluate on every so many steps (--eval_steps): {why}; name --eval_data_path")
    inputs = dict.fromkeys(str(path) for path in (*files, *models) if path is not None)
    settings = run_settings(stage, args, inputs, weights=str(dtype), **more)
    finished, checkpoint = find_start(args, settings, stage.resume)
    if finished and args.process_index == 0:
        print(f"{args.output_dir} is already trained with these settings; nothing to do")
    warnings = [] if finished else glance(files, eval_files)  # by every process: a problem must stop them all
    if args.process_index == 0:
        print("".join(f"warning: {warning}\n" for warning in warnings), end="", flush=True)
    save_dtype = dtype if stage.save_dtype == "auto" else compute_dtype(stage.save_dtype)
    return Job(args, files, eval_files, dtype, save_dtype, settings, finished, checkpoint)


def complete(args: TrainingArguments, step: int) -> None:
    """Leave the arguments as JSON, the report with its verdict, and the mark of a finished run."""
    directory = Path(args.output_dir)
    write_json(directory / "training_arguments.json", json.loads(args.to_json_string()))
    print(write_report(directory, finished=True), flush=True)
    write_json(directory / COMPLETE_FILE, {"step": step})


def weights_dtype(name: str, args: TrainingArguments) -> torch.dtype:
    """Dtype of the weights in training for `--weights_dtype`; `UserError` when flags contradict."""
    engine = "DeepSpeed" if args.deepspeed_plugin else "FSDP" if args.fsdp_plugin_args else None
    reason = (
        f"{args.mixed_precision} autocast" if args.mixed_precision != "no"
        else engine if engine
        else f"--optim {args.optim.value}" if args.optim.value not in _ADAMW
        else None
    )  # fmt: skip
    if name == "bf16" and reason:
        raise UserError(f"--weights_dtype bf16 contradicts {reason}, which wants fp32 weights; leave one out")
    return torch.float32 if reason else compute_dtype(name)


def run_settings(
    stage: StageArguments, args: TrainingArguments, inputs: Iterable[str | Path], **more: Any
) -> dict[str, Any]:
    """What determines the result of a run: arguments that matter, and a fingerprint of every input file."""
    ignored = """
        config max_eval_rows resume threads data_cache_dir num_proc save_dtype merge merged_dir output_dir
        eval_data_path attn_implementation sample_prompts sample_tokens peak_tflops
    """.split() + [item.name for item in fields(PlanArguments)]
    kept = """
        learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay adam_beta1
        adam_beta2 adam_epsilon max_grad_norm per_device_train_batch_size
        gradient_accumulation_steps max_steps num_train_epochs seed data_seed optim bf16 fp16
        label_smoothing_factor max_length packing beta loss_type loss_weights label_smoothing
        f_divergence_type train_sampling_strategy world_size
    """.split()
    settings = {name: value for name, value in asdict(stage).items() if name not in ignored}
    values = {name: getattr(args, name) for name in kept if hasattr(args, name)}
    settings |= {name: getattr(value, "value", value) for name, value in values.items()}
    settings |= more
    settings["inputs"] = {str(path): fingerprint(path) for path in inputs}
    return json.loads(json.dumps(settings))


def fingerprint(path: str | Path) -> str:
    """Size and hash of a file (of its ends beyond 64 MiB), or hash of a model directory's main files."""
    path = Path(path)
    if path.is_dir():
        patterns = ("*.safetensors", "config.json", "tokenizer.json", "vocab.json", "merges.txt")
        names = sorted(name for pattern in patterns for name in path.glob(pattern))
        return hashlib.sha256(" ".join(fingerprint(name) for name in names).encode()).hexdigest()[:16]
    digest, size, chunk = hashlib.sha256(), path.stat().st_size, 32 * 2**20
    with open(path, "rb") as file:
        digest.update(file.read(chunk))
        file.seek(max(min(size, chunk), size - chunk))
        digest.update(file.read(chunk))
    return f"{size}:{digest.hexdigest()[:16]}"


def find_start(args: TrainingArguments, settings: dict[str, Any], resume: str) -> tuple[bool, str | None]:
    """(finished, checkpoint to continue from) for an output directory. Changes nothing on disk.

    Raises `UserError` when the directory belongs to a run with other settings or to something else.
    """
    directory = Path(args.output_dir)
    if args.resume_from_checkpoint:
        if resume == "never":
            raise UserError("--resume never and --resume_from_checkpoint contradict each other; leave one out")
        if not (Path(args.resume_from_checkpoint) / "trainer_state.json").is_file():
            raise UserError(f"--resume_from_checkpoint {args.resume_from_checkpoint}: not a training checkpoint")
        return False, args.resume_from_checkpoint
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--output_dir {directory} is a file; name a directory")
    try:
        before = json.loads((directory / SETTINGS_FILE).read_text())
    except (OSError, ValueError):
        foreign = [name for name in ("config.json", "adapter_config.json") if (directory / name).exists()]
        foreign += [path.name for path in directory.glob("checkpoint-*")]
        if foreign:  # starting over would overwrite or delete it
            raise UserError(
                f"{directory} holds {foreign[0]}, which this script did not write; use another --output_dir"
            ) from None
        return False, None
    if resume == "never":
        return False, None
    changed = [name for name in settings.keys() | before.keys() if settings.get(name) != before.get(name)]
    if changed:
        raise UserError(
            f"{directory} holds a run with other settings: {_difference(before, settings, min(changed))}; "
            "use another --output_dir, or --resume never to start over"
        )
    return (directory / COMPLETE_FILE).is_file(), get_last_checkpoint(directory)


def _difference(before: dict[str, Any], now: dict[str, Any], name: str) -> str:
    """What changed in one setting; for the inputs, which file."""
    old, new = before.get(name), now.get(name)
    if name != "inputs" or not isinstance(old, dict) or not isinstance(new, dict):
        return f"{name} was {old!r} and is now {new!r}"
    path = min(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    return f"{path} {'has changed' if path in old and path in new else 'is not an input of both'}"
