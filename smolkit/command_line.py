"""From a command line to validated arguments: the library's flags with our defaults, `--config FILE.yaml`, help.

A stage's second dataclass is a `TrainingArguments` of transformers or TRL with this toolkit's defaults, so that every
flag of theirs works too. `parse` reads both from the command line.
"""

import dataclasses
import os
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import HfArgumentParser, TrainingArguments
from trl import DPOConfig, SFTConfig

from smolkit.arguments import (
    DpoArguments,
    LoraArguments,
    NewModelArguments,
    PretrainArguments,
    SftArguments,
    option,
)
from smolkit.errors import UserError
from smolkit.renamed import hint
from smolkit.reporters import check_reporters
from smolkit.runtime import has_accelerator

if TYPE_CHECKING:
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

# The TrainingArguments flags that most runs touch; `--help` shows these, `--help_all` the rest.
COMMON_FLAGS = """
    output_dir num_train_epochs max_steps learning_rate lr_scheduler_type warmup_steps weight_decay
    adam_beta1 adam_beta2 max_grad_norm per_device_train_batch_size gradient_accumulation_steps
    gradient_checkpointing bf16 fp16 use_cpu logging_steps eval_strategy eval_steps save_strategy
    save_steps save_total_limit report_to seed deepspeed fsdp dataloader_num_workers max_length packing
    train_sampling_strategy
    additional_steps keep_every async_save skip_nonfinite resume_from_checkpoint
    beta loss_type loss_weights label_smoothing precompute_ref_log_probs disable_dropout
""".split()


if TYPE_CHECKING:

    class LibraryArguments(TrainingArguments):
        """The library's, as they are when their `__post_init__` has run."""

        output_dir: str
        run_name: str
        report_to: list[str]
        optim: OptimizerNames
        lr_scheduler_type: SchedulerType
        # of TRL's, which pretraining does without
        max_length: int | None
        precompute_ref_log_probs: bool
        precompute_ref_batch_size: int | None

else:
    LibraryArguments = object


@dataclass
class RunArguments(LibraryArguments):
    """What our TrainingArguments add to the library's: some flags, and the CPU is used without being asked for."""

    additional_steps: int = option(
        0,
        "Train this many steps more than the run was planned for; the schedule is planned anew over all of them. Works "
        "on finished and on interrupted runs.",
    )
    keep_every: int = option(0, "Never delete the checkpoints of every N-th step, beside the last --save_total_limit.")
    async_save: bool = option(
        False, "Bring checkpoints to the disk in the background: training goes on once the system has taken the files."
    )
    skip_nonfinite: int = option(
        0, "Leave out up to N updates whose loss or gradient is not finite. 0: stop before the first one."
    )

    def __post_init__(self) -> None:
        if not has_accelerator():
            self.use_cpu = True
        if isinstance(self, SFTConfig):
            self.dataset_kwargs = {"skip_prepare_dataset": True}  # rows arrive rendered, packed and shuffled
        if getattr(self, "padding_free", False):
            raise UserError("--padding_free is --packing here: rows of several answers or conversations")
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.max_steps < 1 and self.num_train_epochs <= 0:
            raise UserError(f"--num_epochs {self.num_train_epochs} must be positive (or give --max_steps)")
        for name in ("additional_steps", "keep_every", "skip_nonfinite"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)} must not be negative")
        if self.keep_every and self.load_best_model_at_end and self.save_total_limit == 1:
            raise UserError("--save_total_limit 1 with --load_best_model_at_end keeps only the best; raise it to 2")
        if self.deepspeed and "LOCAL_RANK" not in os.environ:
            raise UserError(
                "--deepspeed needs a launcher, for one process as well: deepspeed --num_gpus 1 SCRIPT.py ... (or "
                "torchrun, accelerate launch) instead of python"
            )
        if self.learning_rate < 0:
            raise UserError(f"--learning_rate {self.learning_rate} must not be negative")
        if self.eval_steps and self.eval_strategy == "no":
            self.eval_strategy = "steps"  # the library would ignore --eval_steps without a word
        self.report_to = check_reporters(self.report_to)
        self.run_name = self.run_name or Path(self.output_dir).name
        if self.remove_unused_columns:
            raise UserError("--remove_unused_columns true would remove what keeps packed documents apart")
        super().__post_init__()
        self.check_fp16()

    def check_fp16(self) -> None:
        """`UserError` where the libraries have no loss scaler for the device."""
        if self.use_cpu and self.fp16:
            raise UserError("--fp16 needs a GPU; on a CPU leave it out or use --weights_dtype bf16")
        if self.use_cpu and self.mixed_precision == "fp16":
            raise UserError("the launcher's --mixed_precision fp16 needs a GPU; on a CPU leave it out")


def _with_defaults(name: str, base: type, doc: str, **defaults: Any) -> type:
    """A dataclass like `base` with other defaults; types and help texts stay the library's."""
    originals = {item.name: item for item in dataclasses.fields(base)}
    fields = []
    for key, value in defaults.items():
        metadata = dict(originals[key].metadata)
        if key == "num_train_epochs":
            metadata["aliases"] = ["--num_epochs", "--epochs"]
        default: dict[str, Any] = {"default": value}
        if isinstance(value, list):
            default = {"default_factory": partial(list, value)}
        fields.append((key, originals[key].type, field(**default, metadata=metadata)))
    made: Any = dataclasses.make_dataclass(name, fields, bases=(RunArguments, base))
    made.__module__, made.__doc__, made._argument_group_name = (
        __name__,
        doc,
        "training (transformers / TRL flags)",
    )
    return made


_SHARED = dict(
    adam_beta2=0.95,
    lr_scheduler_type="cosine",
    warmup_steps=0.02,
    logging_steps=10,
    # Off: it would hide a NaN; the trainers stop on the first non-finite loss instead.
    logging_nan_inf_filter=False,
    save_total_limit=2,
    report_to="none",
    project="smollm",
    remove_unused_columns=False,
    ddp_find_unused_parameters=False,
    gradient_checkpointing=False,
    bf16=False,
    per_device_train_batch_size=8,
)

PretrainTrainingArguments = _with_defaults(
    "PretrainTrainingArguments",
    TrainingArguments,
    "transformers.TrainingArguments with defaults for pretraining.",
    output_dir="output/pretrain",
    num_train_epochs=1.0,
    learning_rate=1e-3,
    weight_decay=0.1,
    **_SHARED,
)
SftTrainingArguments = _with_defaults(
    "SftTrainingArguments",
    SFTConfig,
    "trl.SFTConfig with defaults for full fine-tuning. `packing` means this toolkit's own packing.",
    output_dir="output/sft",
    num_train_epochs=2.0,
    learning_rate=2e-4,
    weight_decay=0.01,
    packing=True,
    max_length=None,
    **_SHARED,
)
LoraTrainingArguments = _with_defaults(
    "LoraTrainingArguments",
    SFTConfig,
    "trl.SFTConfig with defaults for LoRA.",
    output_dir="output/lora",
    num_train_epochs=3.0,
    learning_rate=1e-3,
    packing=True,
    max_length=None,
    **_SHARED,
)
DpoTrainingArguments = _with_defaults(
    "DpoTrainingArguments",
    DPOConfig,
    "trl.DPOConfig with defaults for preference training.",
    output_dir="output/dpo",
    num_train_epochs=1.0,
    learning_rate=1e-5,
    precompute_ref_log_probs=True,
    max_length=None,
    **_SHARED,
)

# What the script of each stage takes.
STAGES: dict[str, tuple[type, ...]] = {
    "pretrain": (PretrainArguments, NewModelArguments, PretrainTrainingArguments),
    "sft": (SftArguments, NewModelArguments, SftTrainingArguments),
    "lora": (LoraArguments, LoraTrainingArguments),
    "dpo": (DpoArguments, DpoTrainingArguments),
}


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults are shown, the description keeps its line breaks."""


def parse(dataclasses_: Sequence[type], argv: Sequence[str] | None, description: str) -> tuple:
    """Parse the command line (and `--config`) into one instance of each dataclass, validated.

    `argv`: arguments without the program name; None takes sys.argv. Raises `UserError` for values that the
    dataclasses refuse; argparse itself leaves with exit code 2, too.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    show_all = "--help_all" in argv
    parser = HfArgumentParser(
        list(dataclasses_),  # type: ignore[arg-type]  # classes, of which `type` says too little
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--help_all", action="help", default=SUPPRESS, help="like --help, with every training flag")
    if not show_all:
        _hide_rare_flags(parser)
    config = _value_of("--config", argv)
    if config is not None:
        parser.set_defaults(**_read_config(config, dataclasses_))
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except UserError:
        raise
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if unknown:
        renamed = [item + hint(item) for item in unknown if item.startswith("--") and hint(item)]
        if renamed:
            raise UserError("unknown argument " + "; ".join(renamed))
        raise UserError(f"unknown arguments: {' '.join(unknown)}; --help_all lists the known ones")
    for arguments in parsed:
        if hasattr(arguments, "validate"):
            arguments.validate()
    return tuple(parsed)


def _hide_rare_flags(parser: HfArgumentParser) -> None:
    shown = set(COMMON_FLAGS)
    for dataclass_type in parser.dataclass_types:
        if not issubclass(dataclass_type, TrainingArguments):
            shown |= {item.name for item in dataclasses.fields(dataclass_type)}  # type: ignore[arg-type]  # the same
    for action in parser._actions:
        if action.dest not in shown and action.dest not in ("help", "help_all"):
            action.help = SUPPRESS
        if any(flag.startswith(("--no_", "--no-")) for flag in action.option_strings):
            action.help = SUPPRESS


def _value_of(flag: str, argv: Sequence[str]) -> str | None:
    for position, item in enumerate(argv):
        if item == flag and position + 1 < len(argv):
            return argv[position + 1]
        if item.startswith(f"{flag}="):
            return item.split("=", 1)[1]
    return None


def _read_config(path: str, dataclasses_: Sequence[type]) -> dict[str, Any]:
    """The YAML mapping at `path`: flag names (or aliases) with the values the command line would take."""
    if not Path(path).is_file():
        raise UserError(f"{path}: --config file not found")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of argument: value")
    known: dict[str, dataclasses.Field] = {}
    for item in (item for type_ in dataclasses_ for item in dataclasses.fields(type_) if item.init):
        known[item.name] = item
        for alias in item.metadata.get("aliases", ()):
            known[alias.lstrip("-")] = item
    result = {}
    for key, value in content.items():
        named = known.get(str(key).replace("-", "_"))
        if named is None:
            raise UserError(f"{path}: unknown argument {key!r}{hint(str(key)) or '; --help_all lists them'}")
        is_list = "list" in str(named.type)
        result[named.name] = value if not is_list or isinstance(value, list | None) else [value]
    return result
