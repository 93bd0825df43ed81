"""Align a fine-tuned model with preference pairs by Direct Preference Optimization (arXiv:2305.18290).

  python train_dpo.py --data_path data/dpo/dpo_data.jsonl --model_path output/sft --output_dir output/dpo

Rows are {"prompt", "chosen", "rejected"}: strings or lists of messages. The model in --model_path is the policy
to train and the reference it is compared with; before step 1 both must give every answer the same
log-probability. With --use_lora an adapter is trained and the reference is the model without it. The reference's
log-probabilities are computed once and kept for later runs. Pairs whose sides are equal are refused. Every loss
of TRL is available (--loss_type), --rpo_alpha adds the likelihood of the chosen answers, and --packing leaves the
padding out. Runs under python, torchrun, accelerate launch and deepspeed. Running the same command again continues
an interrupted run.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from smol_config import SmolConfig
from smolkit.adapters import (
    Merge,
    build_base,
    check_quantised,
    finish_adapter,
    lora_config,
    merged_directory,
    policy_of,
)
from smolkit.arguments import DpoArguments
from smolkit.checkpoints import build_model, describe_model, load_config, resolve_model, row_length
from smolkit.command_line import STAGES, losses, parse
from smolkit.doctor import RECORD_SUFFIXES
from smolkit.dry_run import dry_run
from smolkit.errors import run
from smolkit.files import default_cache_dir
from smolkit.packing import preference_pairs
from smolkit.parallel import check_expert_parallel, spread_experts, whole_model
from smolkit.preference_trainer import PreferenceTrainer, ReferenceCheck
from smolkit.preferences import content_hash, describe_lengths, reference_file, side_lengths
from smolkit.progress import watch
from smolkit.runs import Job, load_on_every_process, open_job
from smolkit.runtime import prepare, product_dtype
from smolkit.shards import tokenized
from smolkit.training import finish

# Switched off in training, kept in config.json.
NOISE = ("attention_dropout", "residual_dropout", "capacity_factor")


def without_noise(config: Any) -> Any:
    """The configuration without dropout and capacity limit, which would blur the log-probabilities."""
    config = deepcopy(config)
    config.attention_dropout = config.residual_dropout = 0.0
    config.capacity_factor = None
    return config


def load_pairs(
    stage: DpoArguments, job: Job, tokenizer: PreTrainedTokenizerFast, max_length: int
) -> tuple[Dataset, int, Dataset | None]:
    """Pairs to train on, how many were dropped as too long, and pairs to evaluate on if there are any."""
    tokenise = partial(tokenized, tokenizer=tokenizer, cache_dir=stage.data_cache_dir, num_proc=stage.num_proc)
    pairs, dropped = preference_pairs(tokenise, job.files, max_length)
    if not job.eval_files:
        return pairs, dropped, None
    held_out, _ = preference_pairs(tokenise, job.eval_files, max_length)
    return pairs, dropped, held_out.select(range(min(stage.max_eval_rows, len(held_out))))


def build_models(
    stage: DpoArguments, job: Job, config: SmolConfig, reference_config: SmolConfig, start: str, adapter: str | None
) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """The policy, and a reference model where one is needed: an adapter is switched off, or kept as it was, instead."""
    args, reference_path, kernel = job.args, stage.ref_model_path or start, stage.attn_implementation
    load_on_every_process(args)
    separate = reference_path != start or not (args.precompute_ref_log_probs or adapter or stage.use_lora)
    quiet = without_noise(config) if args.disable_dropout else config
    with whole_model(stage.expert_parallel_size > 1):
        reference = build_model(reference_config, reference_path, job.dtype, kernel) if separate else None
        policy = build_base(stage, quiet, start, job.dtype, kernel, args.local_process_index)
    spread_experts(policy, stage.expert_parallel_size, args)
    return PeftModel.from_pretrained(policy, adapter, is_trainable=True) if adapter else policy, reference


def reference_cache(stage: DpoArguments, job: Job, sources: list[str], max_length: int) -> Callable[[Dataset], Path]:
    """Where the log-probabilities of a reference made of `sources` are kept for these rows and settings."""
    directory = Path(stage.data_cache_dir or default_cache_dir())
    dtypes = {"dtype": str(job.dtype), "products": str(product_dtype(job.args.mixed_precision, job.dtype))}
    settings = dtypes | {"max_length": max_length, "ld_alpha": job.args.ld_alpha, "qlora": stage.qlora}
    return lambda rows: reference_file(directory, content_hash(sources, rows, **settings))


def main(argv: Sequence[str] | None = None) -> None:
    stage, args = parse(STAGES["dpo"], argv, __doc__)
    if stage.dry_run:
        dry_run("dpo", stage, args)
        return
    if stage.qlora:
        check_quantised()
    prepare(args.seed, stage.threads)
    loss = losses(args, stage.rpo_alpha)
    start, adapter = policy_of(stage)
    lora = bool(adapter or stage.use_lora)
    config, tokenizer, tokenizer_path = resolve_model(
        start, None, stage.tokenizer_path, stage.tokenizer_type, chat=True
    )
    peft_config = lora_config(stage, config, start) if stage.use_lora else None
    reference_path = stage.ref_model_path or start
    reference_config = load_config(reference_path, tokenizer, tokenizer_path)
    max_length = row_length(args.max_length, 1024, config, "--max_length")
    check_expert_parallel(stage.expert_parallel_size, config, args)
    args.check_router(config.num_experts)
    job = open_job(stage, args, RECORD_SUFFIXES, [tokenizer_path, stage.model_path, reference_path])
    merged = merged_directory(stage, args.output_dir) if lora else None
    merge = Merge(merged, start, args.output_dir, config, tokenizer, job.save_dtype)
    if job.finished:
        if args.should_save:
            merge.write_if_missing()
        return
    progress = watch(stage, tokenizer, config, chat=True)

    pairs, dropped, held_out = load_pairs(stage, job, tokenizer, max_length)
    job.announce(
        {
            "model": describe_model(config),
            "weights": f"{stage.model_path}, trained in {job.dtype}",
            "reference": f"{reference_path}, " + ("once" if args.precompute_ref_log_probs else "at every step"),
            "loss": f"{loss}, beta {args.beta:g}",
            "data": f"{len(pairs):,} pairs ({dropped:,} dropped as longer than {max_length} tokens)",
            "lengths": describe_lengths(side_lengths(pairs)),
            "validation": f"{len(held_out):,} pairs" if held_out else "none",
            "processes": job.processes(),
            "output": job.where(),
        }
    )

    model, reference = build_models(stage, job, config, reference_config, start, adapter)
    trainer = PreferenceTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=pairs,
        eval_dataset=held_out,
        processing_class=tokenizer,
        progress=progress,
        peft_config=peft_config,
        keep_reference=reference_cache(stage, job, [reference_path, *([adapter] if adapter else [])], max_length),
        packing=stage.packing,
    )
    trainer.add_callback(ReferenceCheck(trainer, product_dtype(args.mixed_precision, job.dtype)))
    job.begin()
    trainer.train(resume_from_checkpoint=job.checkpoint)
    facts = {"started from": stage.model_path, "data": f"{len(pairs):,} pairs", "loss": loss, "beta": args.beta}
    if held_out:
        facts["validation preference accuracy"] = f"{trainer.last_evaluation()['eval_rewards/accuracies']:.3f}"
    for name in NOISE:
        setattr(model.config, name, getattr(config, name))
    if lora:
        finish_adapter(trainer, config, facts, merge)
    else:
        finish(trainer, job.save_dtype, config, facts)


if __name__ == "__main__":
    run(main)
