"""Align a fine-tuned model with preference pairs by Direct Preference Optimization (arXiv:2305.18290).

  python train_dpo.py --data_path data/dpo/dpo_data.jsonl --model_path output/sft --output_dir output/dpo

Rows are {"prompt", "chosen", "rejected"}: strings or lists of messages. The model in --model_path is the policy
to train and the reference it is compared with; before step 1 both must give every answer the same
log-probability. With --use_lora an adapter is trained and the reference is the model without it. The reference's
log-probabilities are computed once and kept for later runs. Pairs whose sides are equal are refused. Every loss
of TRL is available (--loss_type), and --rpo_alpha adds the likelihood of the chosen answers. Runs under python,
torchrun, accelerate launch and deepspeed. Running the same command again continues an interrupted run.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import TrainerCallback, TrainingArguments
from trl import DPOTrainer
from trl.models import prepare_deepspeed

from smolkit.adapters import adapter_base, build_base, check_quantised, lora_config, merged_directory, write_merged
from smolkit.arguments import DpoArguments, DpoTrainingArguments, parse, refuse_spread_adapters
from smolkit.checkpoints import (
    build_model,
    describe_model,
    load_config,
    model_card,
    resolve_model,
    row_length,
    save_adapter,
)
from smolkit.doctor import RECORD_SUFFIXES
from smolkit.dry_run import dry_run
from smolkit.errors import UserError, run
from smolkit.expert_trainer import ExpertParallelMixin
from smolkit.packing import preference_pairs
from smolkit.pairs import PairCollator, PairLossMixin
from smolkit.parallel import check_expert_parallel, spread_experts, whole_model
from smolkit.preferences import (
    content_hash,
    describe_lengths,
    load_reference,
    reference_file,
    save_reference,
    side_lengths,
)
from smolkit.progress import watch
from smolkit.runs import complete, load_on_every_process, open_job
from smolkit.runtime import prepare
from smolkit.shards import default_cache_dir, tokenized
from smolkit.training import TrainerMixin, finish

# Comparison of policy and reference before step 1, in nats per answer. Both see the same batches, so that even bf16
# leaves next to no rounding.
CHECKED_PAIRS = 64
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
# Switched off in training, kept in config.json.
NOISE = ("attention_dropout", "residual_dropout", "capacity_factor")


class PreferenceTrainer(ExpertParallelMixin, TrainerMixin, PairLossMixin, DPOTrainer):
    """TRL's trainer on pairs that are rendered already.

    `keep_reference`: (Dataset) -> file where the reference's log-probabilities of these pairs are kept.
    """

    def __init__(self, *args: Any, keep_reference: Callable[[Dataset], Path], **kwargs: Any):
        self.keep_reference = keep_reference
        super().__init__(*args, **kwargs)
        self.data_collator = PairCollator(self.data_collator, self.processing_class.pad_token_id)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        """One after the other: the library would group these by length, too, and does not know how long a pair is."""
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Reference log-probabilities as two more columns: kept ones, or computed now and kept."""
        file, kept = self.keep_reference(dataset), [None]
        if self.accelerator.is_main_process:
            kept[0] = load_reference(file, len(dataset))
        broadcast_object_list(kept)  # what one process found decides for all
        sides = kept[0]
        if sides is None:
            sides = self.log_probs(self.placed_reference(), dataset, batch_size)
            if self.accelerator.is_main_process and not save_reference(file, sides):
                print(f"warning: {file} cannot be written; the reference will be computed again next time")
        elif self.accelerator.is_main_process:
            print(f"{name}: the reference's log-probabilities are those of {file}", flush=True)
        chosen, rejected = sides
        dataset = dataset.add_column("ref_chosen_logps", chosen)
        return dataset.add_column("ref_rejected_logps", rejected)

    def placed_reference(self) -> torch.nn.Module:
        """The reference before training has placed the models."""
        if self.ref_model is not None or not self.is_deepspeed_enabled:
            return self.ref_model or self.model
        # the policy is not on its device yet, or in parts
        self._precompute_engine = self._precompute_engine or prepare_deepspeed(self.model, self.accelerator)
        return self._precompute_engine

    def log_probs(self, model: torch.nn.Module, dataset: Dataset, batch_size: int) -> tuple[list[float], list[float]]:
        """Summed log-probabilities of the chosen and the rejected answer of each pair under `model`."""
        columns = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
        # A loader draws a random number; training's must not depend on whether the results were kept from a former run.
        own = torch.Generator()
        loader = DataLoader(columns, batch_size=batch_size, collate_fn=self.data_collator, generator=own)
        results: tuple[list[float], list[float]] = ([], [])
        for batch in self.accelerator.prepare(loader):
            sides = self.accelerator.gather_for_metrics(self.compute_ref_log_probs(model, batch))
            for result, values in zip(results, sides, strict=True):
                result.extend(values.float().tolist())
        return results

    def policy_log_probs(self, dataset: Dataset, batch_size: int) -> tuple[list[float], list[float]]:
        """The same of the policy, its adapter on: without a reference model TRL would switch it off."""
        reference, self.ref_model = self.ref_model, self.model
        try:
            return self.log_probs(self.model_wrapped, dataset, batch_size)
        finally:
            self.ref_model = reference

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's, and the mean length of both sides among the metrics."""
        lengths = inputs["completion_mask"].sum(1).float().chunk(2)
        for side, values in zip(("chosen", "rejected"), lengths, strict=True):
            mean = self.accelerator.gather_for_metrics(values).mean().item()
            self._metrics["train" if model.training else "eval"][f"lengths/{side}"].append(mean)
        return super()._compute_loss(model, inputs, *args, **kwargs)

    def check_reference(self, tolerance: float) -> float:
        """Largest |log-ratio| of policy and reference over the first answers; `UserError` beyond tolerance.

        The policy runs in training mode and as the strategy has wrapped it, as it will in step 1.
        """
        batch_size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        whole_batches = -(-CHECKED_PAIRS // batch_size) * batch_size * self.accelerator.num_processes
        rows = self.train_dataset.select(range(min(whole_batches, len(self.train_dataset))))
        self.model.train()
        policy = self.policy_log_probs(rows, batch_size)
        if self.precompute_ref_logps:
            reference = (rows["ref_chosen_logps"], rows["ref_rejected_logps"])
        else:
            reference = self.log_probs(self.ref_model or self.model_wrapped, rows, batch_size)
        pairs = zip((*policy[0], *policy[1]), (*reference[0], *reference[1]), strict=True)
        worst = max(abs(ours - theirs) for ours, theirs in pairs)
        if not worst <= tolerance:
            raise UserError(
                f"policy and reference disagree before step 1: a log-ratio of {worst:.3g} where at most "
                f"{tolerance:.3g} is rounding. Both must start from the same SFT checkpoint: check --model_path "
                "and --ref_model_path"
            )
        return worst


class ReferenceCheck(TrainerCallback):
    """Compares policy and reference when everything is placed and nothing is trained yet."""

    def __init__(self, trainer: PreferenceTrainer, tolerance: float) -> None:
        self.trainer, self.tolerance = trainer, tolerance

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            return  # a continued run has moved away from its reference
        worst = self.trainer.check_reference(self.tolerance)
        if args.process_index == 0:
            print(f"check  policy and reference agree before step 1 (largest log-ratio {worst:.1e})", flush=True)


def without_noise(config: Any) -> Any:
    """The configuration without dropout and capacity limit, which would blur the log-probabilities."""
    config = deepcopy(config)
    config.attention_dropout = config.residual_dropout = 0.0
    config.capacity_factor = None
    return config


def add_likelihood(args: DpoTrainingArguments, rpo_alpha: float) -> None:
    """Turn --rpo_alpha into TRL's loss types and weights."""
    if not rpo_alpha:
        return
    if "sft" in args.loss_type:
        raise UserError("--rpo_alpha and --loss_type sft are the same term; leave one out")
    args.loss_weights = [*(args.loss_weights or [1.0] * len(args.loss_type)), rpo_alpha]
    args.loss_type = [*args.loss_type, "sft"]


def main(argv: Sequence[str] | None = None) -> None:
    stage, args = parse((DpoArguments, DpoTrainingArguments), argv, __doc__)
    if stage.dry_run:
        dry_run("dpo", stage, args)
        return
    if stage.qlora:
        check_quantised()
    prepare(args.seed, stage.threads)
    add_likelihood(args, stage.rpo_alpha)
    base = adapter_base(stage.model_path)  # the policy may be an adapter
    start, lora = base or stage.model_path, bool(base or stage.use_lora)
    if base and stage.use_lora:
        raise UserError(f"--use_lora: {stage.model_path} is an adapter already and is trained on; leave --use_lora out")
    if lora:
        refuse_spread_adapters(stage.expert_parallel_size)
    config, tokenizer, tokenizer_path = resolve_model(
        start, None, stage.tokenizer_path, stage.tokenizer_type, chat=True
    )
    peft_config = lora_config(stage, config, start) if stage.use_lora else None
    reference_path = stage.ref_model_path or start
    reference_config = load_config(reference_path, tokenizer, tokenizer_path)
    max_length = row_length(args.max_length, 1024, config, "--max_length")
    check_expert_parallel(stage.expert_parallel_size, config, args)
    job = open_job(stage, args, RECORD_SUFFIXES, [tokenizer_path, stage.model_path, reference_path])
    merged_dir = merged_directory(stage, args.output_dir) if lora else None
    merging = (merged_dir, start, args.output_dir, config, tokenizer, job.save_dtype)
    if job.finished:
        if merged_dir and args.should_save and not (Path(merged_dir) / "config.json").is_file():
            write_merged(*merging)
        return
    progress = watch(stage, tokenizer, config, chat=True)

    tokenise = partial(tokenized, tokenizer=tokenizer, cache_dir=stage.data_cache_dir, num_proc=stage.num_proc)
    pairs, dropped = preference_pairs(tokenise, job.files, max_length)
    eval_pairs = None
    if job.eval_files:
        eval_pairs, _ = preference_pairs(tokenise, job.eval_files, max_length)
        eval_pairs = eval_pairs.select(range(min(stage.max_eval_rows, len(eval_pairs))))
    weights = args.loss_weights or [1.0] * len(args.loss_type)
    loss = " + ".join(f"{weight:g} {name}" for weight, name in zip(weights, args.loss_type, strict=True))
    job.announce(
        {
            "model": describe_model(config),
            "weights": f"{stage.model_path}, trained in {job.dtype}",
            "reference": f"{reference_path}, " + ("once" if args.precompute_ref_log_probs else "at every step"),
            "loss": f"{loss}, beta {args.beta:g}",
            "data": f"{len(pairs):,} pairs ({dropped:,} dropped as longer than {max_length} tokens)",
            "lengths": describe_lengths(side_lengths(pairs)),
            "validation": f"{len(eval_pairs):,} pairs" if eval_pairs else "none",
            "processes": job.processes(),
            "output": job.where(),
        }
    )

    load_on_every_process(args)
    # An adapter needs no second model: it is switched off, or kept a second time as it was.
    separate = reference_path != start or not (args.precompute_ref_log_probs or lora)
    kernel = stage.attn_implementation
    quiet = without_noise(config) if args.disable_dropout else config
    with whole_model(stage.expert_parallel_size > 1):
        reference = build_model(reference_config, reference_path, job.dtype, kernel) if separate else None
        model = build_base(stage, quiet, start, job.dtype, kernel, args.local_process_index)
    spread_experts(model, stage.expert_parallel_size, args)
    if base:
        model = PeftModel.from_pretrained(model, stage.model_path, is_trainable=True)
    sources = [reference_path, *([stage.model_path] if base else [])]
    settings = {"dtype": str(job.dtype), "max_length": max_length, "ld_alpha": args.ld_alpha, "qlora": stage.qlora}
    cache = Path(stage.data_cache_dir or default_cache_dir())
    trainer = PreferenceTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=pairs,
        eval_dataset=eval_pairs,
        processing_class=tokenizer,
        progress=progress,
        peft_config=peft_config,
        keep_reference=lambda rows: reference_file(cache, content_hash(sources, rows, **settings)),
    )
    trainer.add_callback(ReferenceCheck(trainer, TOLERANCE[torch.bfloat16 if args.bf16 else job.dtype]))
    job.begin()
    trainer.train(resume_from_checkpoint=job.checkpoint)
    facts = {"aligned from": stage.model_path, "loss": loss, "beta": args.beta}
    if eval_pairs:
        facts["validation preference accuracy"] = f"{trainer.last_evaluation()['eval_rewards/accuracies']:.3f}"
    for name in NOISE:
        setattr(model.config, name, getattr(config, name))
    card = model_card(Path(args.output_dir).name, config, facts)
    if not lora:
        finish(trainer, job.save_dtype, card)
        return
    save_adapter(trainer, card)
    if args.should_save:
        complete(args, trainer.state.global_step)
        if merged_dir:
            write_merged(*merging)


if __name__ == "__main__":
    run(main)
