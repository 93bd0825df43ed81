"""What the training scripts' command lines consist of: the options of each stage, validated.

Each script has two dataclasses: its own, here, and the library's `TrainingArguments` with this toolkit's defaults
(`smolkit.command_line`). Anything a user got wrong raises `UserError` before any work starts.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from smolkit.errors import UserError
from smolkit.planner import amount


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
        experts = 8 if self.upcycle_experts is None else self.upcycle_experts
        return experts, 2 if self.upcycle_top_k is None else self.upcycle_top_k

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


# --- what the libraries' trainers read, and ours do not ------------------------------------------------------

_AFTERWARDS = "would change the tokenizer after the rows were rendered with it; train_tokenizer.py changes it before"

# Fields of transformers and TRL that would do nothing here, or harm: another value than the default is refused.
UNREAD: dict[str, str] = {
    "label_smoothing_factor": "would teach the model to copy its input: the library's smoother does not shift labels",
    "bf16_full_eval": "would evaluate another model than the one trained; --bf16 and --weights_dtype are for both",
    "fp16_full_eval": "would evaluate another model than the one trained; --fp16 is for both",
    "use_liger_kernel": "would replace the model's own kernels and loss",
    "liger_kernel_config": "belongs to --use_liger_kernel, which would replace the model's own kernels and loss",
    "use_cache": "keeps what training never looks at again",
    "enable_jit_checkpoint": "is what every run does here when it gets SIGTERM",
    "batch_eval_metrics": "is for metrics of predictions, which no stage computes; eval_model.py measures a model",
    "include_for_metrics": "is for metrics of predictions, which no stage computes; eval_model.py measures a model",
    "do_predict": "is for a test set; eval_model.py measures a finished model",
    # of TRL
    "model_init_kwargs": "is for a model that TRL loads; --attn_implementation and --weights_dtype say how it is here",
    "trust_remote_code": "would run code of a checkpoint, which nothing here does",
    "dataset_num_proc": "is --num_proc here",
    "truncation_mode": "does nothing: what is longer than --max_length ends with a reply that fits, or is left out",
    "padding_free": "is --packing here: rows of several answers or conversations",
    "pad_token": _AFTERWARDS,
}
UNREAD_CONVERSATIONS: dict[str, str] = {
    "chat_template_path": _AFTERWARDS,
    "eos_token": _AFTERWARDS,
    "dataset_text_field": 'does nothing: rows are {"messages": [...]}; prepare_datasets.py makes them of others',
    "dataset_kwargs": "does nothing: rows arrive rendered, packed and shuffled",
    "shuffle_dataset": "does nothing: rows are shuffled anyway, by --seed or --data_seed",
    "packing_strategy": "does nothing: --packing puts whole conversations into rows, best fit",
    "pad_to_multiple_of": "does nothing: rows are padded to the longest of their batch",
    "eval_packing": "does nothing: validation rows are packed where --packing says so",
    "completion_only_loss": "does nothing: the loss is on the assistant's tokens, always",
    "assistant_only_loss": "does nothing: the loss is on the assistant's tokens, always",
    "loss_type": "does nothing: the loss of conversations is the model's own, nll",
}
UNREAD_PAIRS: dict[str, str] = {
    "label_smoothing_factor": "means nothing for pairs; some losses have --label_smoothing",
    "neftune_noise_alpha": "would blur the log-probabilities by which the policy is compared with its reference",
    "sync_ref_model": "cannot be continued: no checkpoint holds the reference as it was then",
    "ref_model_mixup_alpha": "belongs to --sync_ref_model, which cannot be continued",
    "ref_model_sync_steps": "belongs to --sync_ref_model, which cannot be continued",
}
# TRL's losses of pairs, and of them those that read --label_smoothing, or know --f_divergence_type.
LOSSES = """sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop
    sft sigmoid_norm""".split()
SMOOTHED = "exo_pair robust aot aot_unpaired".split()
DIVERGENCES = "reverse_kl forward_kl js_divergence alpha_divergence".split()
DIVERGING = "sigmoid sigmoid_norm hinge ipo exo_pair robust discopop sft".split()


def check_losses(losses: Sequence[str], divergence: str, smoothing: float, weighting: bool) -> None:
    """Raise `UserError` for losses of pairs that TRL does not have, or not with these settings."""
    if divergence not in DIVERGENCES:
        raise UserError(f"--f_divergence_type {divergence}: choose {', '.join(DIVERGENCES)}")
    for loss in losses:
        if loss not in LOSSES:
            raise UserError(f"--loss_type {loss}: TRL has {', '.join(LOSSES)}")
        if divergence != "reverse_kl" and loss not in DIVERGING:
            raise UserError(f"--f_divergence_type {divergence}: not for --loss_type {loss}; for {', '.join(DIVERGING)}")
        if weighting and loss.startswith("aot"):
            raise UserError(f"--use_weighting true: not for --loss_type {loss}, which sorts the pairs; leave one out")
    if not 0 <= smoothing < 0.5:
        raise UserError(f"--label_smoothing {smoothing} must be in [0, 0.5): the share of pairs that are turned round")
    if "exo_pair" in losses and not smoothing:
        raise UserError("--loss_type exo_pair needs --label_smoothing above 0; its authors take 1e-3")
    if smoothing and not set(losses) & set(SMOOTHED):
        raise UserError(f"--label_smoothing {smoothing}: for --loss_type {', '.join(SMOOTHED)}; leave it out")
