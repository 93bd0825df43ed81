"""Arguments of the training scripts: dataclasses, `--config FILE.yaml`, defaults and validation.

Each script has two dataclasses: its own (`PretrainArguments`, ...) and a `TrainingArguments` of transformers
or TRL with this toolkit's defaults, so that every flag of theirs works too. Anything a user got wrong raises
`UserError` before any work starts.
"""

import dataclasses
import json
import os
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from transformers import HfArgumentParser, TrainingArguments
from trl import DPOConfig, SFTConfig

from smolkit.errors import UserError
from smolkit.planner import amount
from smolkit.renamed import hint
from smolkit.reporters import check_reporters
from smolkit.runtime import has_accelerator

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


def option(default: Any = None, text: str = "", aliases: Sequence[str] = ()) -> Any:
    """A dataclass field for the parser: its default, its help text, other spellings of the flag."""
    metadata = {"help": text, **({"aliases": list(aliases)} if aliases else {})}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class PlanArguments:
    """--dry_run and what it wants to know; nothing here changes a run."""

    dry_run: bool = option(
        False,
        "Print what the run would do and need (parameters, tokens, steps, memory of every strategy, time), and exit. "
        "Nothing is written; what the run would read may be missing.",
    )
    plan_format: Literal["text", "json"] = option("text", "Form of the plan.")
    plan_model: str | None = option(None, "Preset or model directory to plan with while the checkpoint is missing.")
    data_tokens: str | None = option(None, "Plan with this many tokens of training data (10B). Default: an estimate.")
    data_rows: str | None = option(None, "Plan with this many rows (pairs) of training data.")
    num_devices: int | None = option(None, "Plan for this many devices. Default: the processes or GPUs here.")
    device_memory: str | None = option(None, "Plan for GPUs of this memory (80GB, 24GiB). Default: what is here.")
    host_memory: str | None = option(None, "Memory of the machine, for offloading (1TB).")
    tokens_per_second: str | None = option(None, "Plan with this speed of all devices together.")
    device_flops: str | None = option(None, "Dense bf16 FLOP/s of a device (989T). Default: known for common GPUs.")
    mfu: float | None = option(None, "Share of these FLOP/s that training reaches. Default: 0.35.")
    expect_parameters: str | None = option(None, "Warn unless the model has this many parameters (30B).")
    expect_active_parameters: str | None = option(None, "Warn unless this many are active per token (7B).")
    expect_tokens_per_step: str | None = option(None, "Warn unless a step has this many tokens (524288).")
    expect_epochs: float | None = option(None, "Warn unless the steps pass over the data this many times.")

    def validate_plan(self) -> None:
        """Raise `UserError` for a number that is none."""
        names = "data_tokens data_rows device_memory host_memory tokens_per_second device_flops".split()
        names += "expect_parameters expect_active_parameters expect_tokens_per_step".split()
        for name in names:
            try:
                amount(getattr(self, name))
            except ValueError as error:
                raise UserError(f"--{name} {error}") from None
        if self.num_devices is not None and self.num_devices < 1:
            raise UserError(f"--num_devices {self.num_devices} must be at least 1")
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise UserError(f"--mfu {self.mfu} must be in (0, 1]")


@dataclass
class StageArguments(PlanArguments):
    """What all training scripts take."""

    config: str | None = option(None, "YAML file with any of these arguments; the command line wins over it.")
    data_path: list[str] | None = option(
        None, "Training data: files, directories or globs (quote globs). 'validation' folders are left out."
    )
    eval_data_path: list[str] | None = option(
        None,
        "Validation data. Default: the file of the same name in validation/ beside the data, if any.",
    )
    max_eval_rows: int = option(256, "Evaluate on at most this many packed rows (or pairs). 0: no evaluation.")
    tokenizer_path: str | None = option(
        None, "Tokenizer directory (train_tokenizer.py makes one). Default: the one in the model's directory."
    )
    tokenizer_type: Literal["auto", "qwen", "custom"] = option(
        "auto",
        "'qwen' insists on Qwen's ChatML control tokens; 'auto' and 'custom' take what the directory has.",
    )
    weights_dtype: Literal["auto", "bf16", "fp32"] = option(
        "auto",
        "Dtype of the weights in training. bf16 keeps fp32 master weights in the optimizer. auto: bf16 "
        "where the hardware has it; fp32 under --bf16/--fp16, DeepSpeed, FSDP or another --optim than AdamW.",
    )
    save_dtype: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto",
        "Dtype of the final weights, cast from the masters. auto: the dtype of the weights in training.",
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] = option(
        "sdpa", "Attention kernel. sdpa is the fastest that needs no other package; on a CPU the model refines it."
    )
    data_cache_dir: str | None = option(
        None,
        "Where data is kept as token ids for later runs. Default: $SMOLLM_CACHE, else smollm in the user's cache "
        "directory. Such a directory of tokens (with its manifest.json) can itself be named in --data_path.",
    )
    num_proc: int = option(1, "Processes that turn the data into token ids. The result does not depend on it.")
    resume: Literal["auto", "never"] = option(
        "auto",
        "auto: continue an interrupted run from its last checkpoint; a finished run says so and exits 0; "
        "a run with other settings is refused. never: start over, replacing the checkpoints in --output_dir.",
    )
    expert_parallel_size: int = option(
        1,
        "Spread the experts of a MoE model over groups of this many processes; it must divide the experts and the "
        "processes. The smallest size that fits into memory is the fastest.",
    )
    threads: int | None = option(None, "CPU threads per process. Default: what OMP_NUM_THREADS or the machine says.")
    sample_prompts: list[str] | None = option(
        None,
        "Texts, or .jsonl files with rows {'prompt': text} or {'messages': [...]}, answered greedily at every "
        "checkpoint and at the end; written to samples.jsonl.",
    )
    sample_tokens: int = option(64, "Longest answer to a sample prompt, in tokens.")
    peak_tflops: float | None = option(
        None,
        "16-bit matrix TFLOP/s of one device, for MFU. Default: its data sheet, or a short measurement on a CPU.",
    )

    _argument_group_name = "data, tokenizer and run"

    def validate(self) -> None:
        """Raise `UserError` for values that contradict each other or cannot work."""
        self.validate_plan()
        if not self.data_path:
            raise UserError("--data_path is required: files, directories or globs with the training data")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"--threads {self.threads} must be at least 1")
        if self.num_proc < 1:
            raise UserError(f"--num_proc {self.num_proc} must be at least 1")
        if self.max_eval_rows < 0:
            raise UserError(f"--max_eval_rows {self.max_eval_rows} must not be negative")
        if self.sample_tokens < 1:
            raise UserError(f"--sample_tokens {self.sample_tokens} must be at least 1")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise UserError(f"--peak_tflops {self.peak_tflops} must be positive")


@dataclass
class NewModelArguments:
    """How to build a model with random weights; shared by pretraining and `--init_from_scratch`."""

    model_size: str | None = option(None, "Preset of a new model: tiny, tiny-moe, smollm2-135m, base, moe, ...")
    model_overrides: list[str] | None = option(
        None,
        "Fields of the preset to change, as field=value: hidden_size=256 capacity_factor=none",
    )
    vocab_size: int | None = option(
        None,
        "Rows of the embedding of a new model, at least the tokenizer's entries. Default: the tokenizer's.",
    )
    pad_vocab_to_multiple_of: int = option(1, "Round a new model's vocabulary up to a multiple of this.")

    _argument_group_name = "new model"

    def wants_new_model(self) -> bool:
        """Whether any flag of this group was used."""
        return any((self.model_size, self.model_overrides, self.vocab_size, self.pad_vocab_to_multiple_of != 1))

    def validate(self) -> None:
        """Raise `UserError` for values that cannot work."""
        if self.pad_vocab_to_multiple_of < 1:
            raise UserError(f"--pad_vocab_to_multiple_of {self.pad_vocab_to_multiple_of} must be at least 1")
        self.overrides()

    def overrides(self) -> dict[str, Any]:
        """`--model_overrides` as a dict; values are read as JSON where they are JSON, `none` is None."""
        result = {}
        for item in self.model_overrides or ():
            name, equals, value = item.partition("=")
            if not (equals and name.isidentifier()):
                raise UserError(f"--model_overrides {item!r} is not of the form field=value")
            try:
                result[name] = None if value.lower() == "none" else json.loads(value)
            except json.JSONDecodeError:
                result[name] = value
        return result


@dataclass
class UpcycleArguments:
    """A Mixture-of-Experts started from a dense checkpoint (arXiv:2212.05055)."""

    upcycle_from: str | None = option(
        None, "Start a Mixture-of-Experts from this dense checkpoint directory: every expert is a copy of its MLP."
    )
    upcycle_experts: int | None = option(None, "Experts per layer. Default: 8.")
    upcycle_top_k: int | None = option(None, "Experts per token, at least 2. Default: 2.")
    upcycle_noise: float | None = option(
        None, "Noise on each expert, as a share of its weights' standard deviation. Default: 0, exact copies."
    )

    def upcycle_shape(self) -> tuple[int, int]:
        """(experts, experts per token)."""
        given = (self.upcycle_experts, self.upcycle_top_k)
        return tuple(default if value is None else value for value, default in zip(given, (8, 2), strict=True))

    def validate_upcycle(self) -> None:
        """Raise `UserError` for values that contradict each other or cannot work."""
        for name in ("upcycle_experts", "upcycle_top_k", "upcycle_noise"):
            if self.upcycle_from is None and getattr(self, name) is not None:
                raise UserError(f"--{name} needs --upcycle_from: the dense checkpoint to start from")
        experts, chosen = self.upcycle_shape()
        if not 2 <= chosen <= experts:
            raise UserError(
                f"--upcycle_top_k {chosen} must be between 2 and the {experts} of --upcycle_experts: a single expert's "
                "weight cannot be renormalised, so that the model would not start as the dense one"
            )
        if self.upcycle_noise is not None and self.upcycle_noise < 0:
            raise UserError(f"--upcycle_noise {self.upcycle_noise} must not be negative")


@dataclass
class PretrainArguments(StageArguments, UpcycleArguments):
    """train_pretrain.py"""

    base_model: str | None = option(None, "Continue from this checkpoint directory instead of random weights.")
    block_size: int | None = option(
        None,
        "Tokens per row; documents are packed into rows and never see each other. Default: 512, or the "
        "model's context if that is shorter.",
    )
    packing_strategy: Literal["best_fit", "blocks"] = option(
        "best_fit",
        "best_fit places whole documents and splits only those longer than a row; blocks concatenates all documents "
        "and cuts, which leaves no padding and splits more of them.",
    )

    def validate(self) -> None:
        super().validate()
        self.validate_upcycle()
        if self.base_model and self.upcycle_from:
            raise UserError("--base_model and --upcycle_from contradict each other; leave one out")
        if self.block_size is not None and self.block_size < 8:
            raise UserError(f"--block_size {self.block_size} must be at least 8")


@dataclass
class SftArguments(StageArguments):
    """train_full_sft.py"""

    base_model: str | None = option(None, "Checkpoint directory to fine-tune.", ["--model_path"])
    init_from_scratch: bool = option(
        False,
        "Train from random weights of --model_size: the control experiment for what pretraining taught.",
    )

    def validate(self) -> None:
        super().validate()
        if self.init_from_scratch and self.base_model:
            raise UserError("--init_from_scratch and --base_model contradict each other; leave one out")
        if not (self.init_from_scratch or self.base_model):
            raise UserError("--base_model is required (or --init_from_scratch with --model_size)")


@dataclass
class AdapterArguments:
    """LoRA (arXiv:2106.09685), wherever an adapter is trained."""

    lora_r: int = option(8, "Rank of the update.")
    lora_alpha: float = option(16, "The update is scaled by alpha / r.")
    lora_dropout: float = option(0.0, "Dropout on the adapter's input.")
    lora_target: list[str] = option(
        ["all-linear"],
        "Module names to adapt (q_proj v_proj ...). 'all-linear': every linear layer but the head; in a MoE model "
        "those of the attention, never the router. 'experts' adds the fused expert weights (needs --lora_dropout 0).",
    )
    use_dora: bool = option(False, "Train magnitude and direction apart (DoRA, arXiv:2402.09353); not for experts.")
    use_rslora: bool = option(False, "Scale by alpha / sqrt(r), for ranks above 32 (rsLoRA, arXiv:2312.03732).")
    qlora: bool = option(False, "Keep the base in 4 bits (QLoRA, arXiv:2305.14314). Needs CUDA and bitsandbytes.")
    merge: bool = option(False, "Also write the base model with the update merged into its weights.")
    merged_dir: str | None = option(None, "Where --merge writes. Default: <output_dir>-merged. Implies --merge.")

    def validate_adapter(self) -> None:
        """Raise `UserError` for values that contradict each other or cannot work."""
        if self.lora_r < 1:
            raise UserError(f"--lora_r {self.lora_r} must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout {self.lora_dropout} must be in [0, 1)")
        if "experts" in self.lora_target and self.lora_dropout:
            raise UserError("--lora_target experts needs --lora_dropout 0: PEFT has no dropout for fused weights")
        if "experts" in self.lora_target and self.use_dora:
            raise UserError("--lora_target experts and --use_dora: PEFT has no DoRA for fused weights; leave one out")


def refuse_spread_adapters(expert_parallel_size: int) -> None:
    """Raise `UserError` when experts would be spread although an adapter is trained."""
    if expert_parallel_size != 1:
        raise UserError(
            f"--expert_parallel_size {expert_parallel_size}: PEFT's adapters know nothing of spread experts; "
            "frozen weights need no optimizer state, so leave it out and use FSDP or ZeRO-3 if they do not fit"
        )


@dataclass
class LoraArguments(StageArguments, AdapterArguments):
    """train_lora.py"""

    base_model: str | None = option(
        None, "Checkpoint directory to adapt; its weights stay as they are.", ["--model_path"]
    )

    def validate(self) -> None:
        super().validate()
        if not self.base_model:
            raise UserError("--base_model is required: the checkpoint directory to adapt")
        refuse_spread_adapters(self.expert_parallel_size)
        self.validate_adapter()


@dataclass
class DpoArguments(StageArguments, AdapterArguments):
    """train_dpo.py"""

    model_path: str | None = option(
        None,
        "The fine-tuned (SFT) checkpoint; it is both the policy to train and the reference. An adapter directory of "
        "train_lora.py is trained on, against itself as it was.",
        ["--base_model"],
    )
    ref_model_path: str | None = option(
        None, "Reference checkpoint, when it lies elsewhere. It must agree with the policy before step 1."
    )
    use_lora: bool = option(
        False, "Train a LoRA adapter (--lora_*): the reference is the same model with the adapter switched off."
    )
    rpo_alpha: float = option(
        0.0, "Weight of an added likelihood term on the chosen answers (RPO); TRL's loss_type 'sft'."
    )
    packing: bool = option(
        False, "Put the answers of a batch into shared rows, where none sees another, instead of padding them all to "
        "the longest: the same loss, less work.",
    )

    def validate(self) -> None:
        super().validate()
        if not self.model_path:
            raise UserError("--model_path is required: the SFT checkpoint directory")
        if self.rpo_alpha < 0:
            raise UserError(f"--rpo_alpha {self.rpo_alpha} must not be negative")
        if self.use_lora and self.ref_model_path:
            raise UserError("--use_lora needs no --ref_model_path: the reference is the model without the adapter")
        self.validate_adapter()


@dataclass
class _CommonBehaviour:
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
        if self.fp16 and self.use_cpu:
            raise UserError("--fp16 needs a GPU; on a CPU leave it out or use --weights_dtype bf16")
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
        if self.mixed_precision == "fp16" and self.use_cpu:
            raise UserError("the launcher's --mixed_precision fp16 needs a GPU; on a CPU leave it out")


def _with_defaults(name: str, base: type, doc: str, **defaults: Any) -> type:
    """A dataclass like `base` with other defaults; types and help texts stay the library's."""
    originals = {item.name: item for item in dataclasses.fields(base)}
    fields = []
    for key, value in defaults.items():
        metadata = dict(originals[key].metadata)
        if key == "num_train_epochs":
            metadata["aliases"] = ["--num_epochs", "--epochs"]
        factory = {"default_factory": (lambda value=value: list(value))} if isinstance(value, list) else {}
        fields.append((key, originals[key].type, field(**(factory or {"default": value}), metadata=metadata)))
    made = dataclasses.make_dataclass(name, fields, bases=(_CommonBehaviour, base))
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

T = TypeVar("T")


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
        list(dataclasses_), description=description, formatter_class=_HelpFormatter, allow_abbrev=False
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
            shown |= {item.name for item in dataclasses.fields(dataclass_type)}
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
        item = known.get(str(key).replace("-", "_"))
        if item is None:
            raise UserError(f"{path}: unknown argument {key!r}{hint(str(key)) or '; --help_all lists them'}")
        is_list = "list" in str(item.type)
        result[item.name] = value if not is_list or isinstance(value, list | None) else [value]
    return result
