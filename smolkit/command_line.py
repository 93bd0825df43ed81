"""From a command line to validated arguments: the library's flags with our defaults, `--config FILE.yaml`, help.

A stage's second dataclass is a `TrainingArguments` of transformers or TRL with this toolkit's defaults, so that every
flag of theirs works too. `parse` reads both from the command line.
"""

import dataclasses
import json
import os
import re
import sys
from argparse import (
    SUPPRESS,
    Action,
    ArgumentDefaultsHelpFormatter,
    ArgumentTypeError,
    RawDescriptionHelpFormatter,
)
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser, Trainer, TrainingArguments, get_scheduler
from transformers.hf_argparser import string_to_bool
from trl import DPOConfig, SFTConfig

from smolkit.arguments import (
    UNREAD,
    UNREAD_CONVERSATIONS,
    UNREAD_PAIRS,
    DpoArguments,
    LoraArguments,
    NewModelArguments,
    PretrainArguments,
    SftArguments,
    check_losses,
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

# What an evaluation gives to choose the best checkpoint by.
TOKEN_METRICS = ("loss", "bits_per_byte")
PAIR_METRICS = """loss rewards/accuracies rewards/margins rewards/chosen rewards/rejected logps/chosen logps/rejected
    mean_token_accuracy entropy""".split()
# Schedules that need to be told more, and an example of it.
SCHEDULES = {
    "warmup_stable_decay": '{"num_decay_steps": 100}',
    "cosine_with_min_lr": '{"min_lr_rate": 0.1}',
    "cosine_warmup_with_min_lr": '{"min_lr_rate": 0.1}',
}
ADAMW = ("adamw_torch", "adamw_torch_fused")  # for which there are fp32 masters beside bf16 weights


if TYPE_CHECKING:

    class LibraryArguments(TrainingArguments):
        """The library's, as they are when their `__post_init__` has run."""

        output_dir: str
        run_name: str
        report_to: list[str]
        optim: OptimizerNames
        lr_scheduler_type: SchedulerType
        lr_scheduler_kwargs: dict[str, Any] | None
        # of TRL's, which pretraining does without
        max_length: int | None
        packing: bool
        loss_type: list[str]
        loss_weights: list[float] | None
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
        self.refuse_unread()
        if isinstance(self, SFTConfig):
            self.dataset_kwargs = {"skip_prepare_dataset": True}  # rows arrive rendered, packed and shuffled
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
        self.check_best_metric()
        super().__post_init__()
        self.check_fp16()
        self.check_updates()
        if isinstance(self, DPOConfig):
            check_losses(self.loss_type, self.f_divergence_type, self.label_smoothing, self.use_weighting)

    def refuse_unread(self) -> None:
        """`UserError` for another value than the default in a field that nothing here reads."""
        conversations, pairs = isinstance(self, SFTConfig), isinstance(self, DPOConfig)
        reasons = UNREAD | (UNREAD_CONVERSATIONS if conversations else UNREAD_PAIRS if pairs else {})
        for item in (item for item in dataclasses.fields(self) if item.name in reasons):
            made = item.default_factory
            default = item.default if made is dataclasses.MISSING else made()
            if (value := getattr(self, item.name)) != default:
                raise UserError(f"--{item.name} {reasons[item.name]}; leave it out (given: {value})")
        orders = ("random", "sequential", "group_by_length")
        if self.train_sampling_strategy not in orders:
            raise UserError(f"--train_sampling_strategy {self.train_sampling_strategy}: choose {', '.join(orders)}")
        # On a CPU TRL finds no device to offload from.
        if self.use_cpu and getattr(self, "activation_offloading", False):
            raise UserError("--activation_offloading needs a GPU; on a CPU leave it out")

    def check_best_metric(self) -> None:
        """`UserError` for a --metric_for_best_model that no evaluation gives; the library would find out in the first.

        Fewer bits are better; the library takes whatever does not end in "loss" for the opposite.
        """
        if self.metric_for_best_model is None:
            return
        name = self.metric_for_best_model.removeprefix("eval_")
        known = PAIR_METRICS if isinstance(self, DPOConfig) else TOKEN_METRICS
        if name not in known:
            raise UserError(f"--metric_for_best_model {name}: an evaluation gives {', '.join(known)}; choose one")
        if name == "bits_per_byte" and self.greater_is_better is None:
            self.greater_is_better = False

    def check_updates(self) -> None:
        """`UserError` where --optim or --lr_scheduler_type cannot be made: tried on one weight, before any work."""
        weights = [torch.nn.Parameter(torch.zeros(1))]
        steps = self.max_steps if self.max_steps > 0 else 1000
        if self.optim_args and self.optim.value in (*ADAMW, "adafactor"):
            raise UserError(f"--optim_args {self.optim_args}: --optim {self.optim.value} takes none; leave it out")
        try:
            kind, settings = Trainer.get_optimizer_cls_and_kwargs(self)
            if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
                kind(weights, **settings)
        # for a package that is not here, settings that it does not have, bad values of them, and what is not supported
        except (ImportError, TypeError, ValueError, NotImplementedError) as error:
            if "need to pass a" not in str(error):  # else it is made of a model's layers, and that stays to be seen
                raise UserError(f"--optim {self.optim.value}: {_line(error)}") from error
        optimizer, more = torch.optim.SGD(weights, self.learning_rate), self.lr_scheduler_kwargs
        try:
            get_scheduler(self.lr_scheduler_type, optimizer, self.get_warmup_steps(steps), steps, more)
        except (TypeError, ValueError) as error:
            kind = self.lr_scheduler_type.value
            example = SCHEDULES.get(kind, '{"name": value}')
            raise UserError(
                f"--lr_scheduler_type {kind}: {_line(error)}; it is told more by --lr_scheduler_kwargs '{example}'"
            ) from error

    def check_router(self, experts: int | None) -> None:
        """`UserError` for --router_aux_loss_coef of a model without experts, which has nothing to weight with it."""
        if getattr(self, "router_aux_loss_coef", None) and not experts:
            raise UserError("--router_aux_loss_coef is for a model with experts, and this one has none; leave it out")

    def take_packing(self) -> bool:
        """--packing, for what packs here. TRL's trainer must not see it: it would pack the packed rows."""
        self._packing, self.packing = self.packing, False
        return self._packing

    def to_dict(self) -> dict[str, Any]:
        """As given, for what is kept of a run: --packing was not switched off by `take_packing`."""
        taken = getattr(self, "_packing", None)
        return super().to_dict() | ({} if taken is None else {"packing": taken})

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


def losses(args: Any, rpo_alpha: float) -> str:
    """Turn --rpo_alpha into TRL's loss types and weights; all of them in words. `UserError` where they contradict."""
    weights = args.loss_weights or [1.0] * len(args.loss_type)
    if rpo_alpha and "sft" in args.loss_type:
        raise UserError("--rpo_alpha and --loss_type sft are the same term; leave one out")
    if rpo_alpha:
        args.loss_weights = weights = [*weights, rpo_alpha]
        args.loss_type = [*args.loss_type, "sft"]
    return " + ".join(f"{weight:g} {name}" for weight, name in zip(weights, args.loss_type, strict=True))


# --- parsing ------------------------------------------------------------------------------------------------


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
        parser.set_defaults(**_read_config(config, parser))
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except UserError:
        raise
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise UserError(_line(error)) from error
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


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


# --- --config -----------------------------------------------------------------------------------------------


def _read_config(path: str, parser: HfArgumentParser) -> dict[str, Any]:
    """The YAML mapping at `path`: flag names (or aliases) with the values the command line would take.

    Raises `UserError` for an unknown name, and for a value that the command line would refuse.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: --config file not found")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of argument: value")
    hints: dict[str, Any] = {}
    for type_ in parser.dataclass_types:
        hints |= get_type_hints(type_)
    known: dict[str, Action] = {}
    for action in parser._actions:
        # a switch's complement (--no_...) comes after it, with the same destination
        if action.dest in hints and action.dest not in {each.dest for each in known.values()}:
            known |= {name.lstrip("-").replace("-", "_"): action for name in action.option_strings}
    result = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"{path}: unknown argument {key!r}{hint(str(key)) or '; --help_all lists them'}")
        action = known[name]
        try:
            result[action.dest] = _as_given(action, _kinds(hints[action.dest]), value)
        except (ValueError, TypeError, ArgumentTypeError):
            wanted = _wanted(action, _kinds(hints[action.dest]))
            raise UserError(f"{path}: {key}: {json.dumps(value, default=str)}: expected {wanted}") from None
    return result


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation unites, without what they hold: list[str] | None is {list, NoneType}."""
    each = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return {get_origin(kind) or kind for kind in each}


def _as_given(action: Action, kinds: set[Any], value: Any) -> Any:
    """What the command line would make of a YAML value; ValueError, TypeError or argparse's where it would not."""
    if value is None and (type(None) in kinds or action.default is None):
        return None
    if isinstance(value, Mapping) and dict in kinds:
        return _with_numbers(value)
    if isinstance(value, Mapping) and action.dest == "model_overrides":
        return [f"{name}={_override(each)}" for name, each in _with_numbers(value).items()]
    if isinstance(value, list) and list in kinds:
        return [_one(action, each) for each in value]
    made = _one(action, value)
    return [made] if action.nargs == "+" else made


def _one(action: Action, value: Any) -> Any:
    """One word of the command line: through the option's type, and among its choices."""
    if isinstance(value, bool) and action.type is string_to_bool:
        return value
    if value is False and "no" in (action.choices or ()):  # YAML 1.1 reads an unquoted no as false
        return "no"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError(value)
    kind: Any = action.type
    made = kind(str(value))
    if action.choices is not None and made not in action.choices:
        raise ValueError(value)
    return made


def _wanted(action: Action, kinds: set[Any]) -> str:
    """What an option takes, in words."""
    if action.choices is not None:
        one = f"one of {', '.join(map(str, action.choices))}"
    elif action.type is string_to_bool:
        one = "true or false"
    else:
        one = getattr(action.type, "__name__", str(action.type))
    if list in kinds:
        return f"{one}, or a list of it" + ", or a mapping" * (action.dest == "model_overrides")
    return one if dict not in kinds else "a mapping"


def _override(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _with_numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 as text, and inside a mapping no option's type says that it is a number."""
    if isinstance(value, Mapping):
        return {name: _with_numbers(each) for name, each in value.items()}
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)
    return value
