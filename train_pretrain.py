"""Pretrain a language model on text.

  python train_pretrain.py --data_path data/pretrain/pretrain_data.jsonl --tokenizer_path tokenizer \\
      --model_size tiny --num_epochs 1 --output_dir output/pretrain

--base_model DIR continues a checkpoint; --upcycle_from DIR makes a dense one a Mixture-of-Experts.

Takes .jsonl ({"text": ...}), .txt and .parquet files, directories and globs, and keeps their token ids for later
runs (--data_cache_dir). Documents are packed into rows of --block_size tokens and never attend to each other.
Writes a complete Hugging Face directory, metrics.jsonl and timing.jsonl to --output_dir. Runs under python,
torchrun, accelerate launch and deepspeed; running the same command again continues an interrupted run.
"""

from collections.abc import Sequence
from functools import partial

from transformers import Trainer

from smolkit.checkpoints import (
    build_model,
    describe_model,
    document_end_id,
    resolve_model,
    row_length,
)
from smolkit.command_line import STAGES, parse
from smolkit.doctor import PRETRAIN_SUFFIXES
from smolkit.dry_run import dry_run
from smolkit.errors import run
from smolkit.expert_trainer import ExpertParallelMixin
from smolkit.packing import PackedCollator, pack_texts
from smolkit.parallel import check_expert_parallel, spread_experts, whole_model
from smolkit.progress import watch
from smolkit.runs import open_job
from smolkit.runtime import prepare
from smolkit.shards import tokenized
from smolkit.training import TokenLossMixin, TrainerMixin, finish
from smolkit.upcycle import build_upcycled, resolve_upcycled


class PretrainTrainer(ExpertParallelMixin, TokenLossMixin, TrainerMixin, Trainer):
    """`transformers.Trainer` with this toolkit's loss, masters and checkpoints."""


def main(argv: Sequence[str] | None = None) -> None:
    stage, new, args = parse(STAGES["pretrain"], argv, __doc__)
    if stage.dry_run:
        dry_run("pretrain", stage, args, new)
        return
    prepare(args.seed, stage.threads)
    start, build = stage.base_model, build_model
    if stage.upcycle_from:
        start, build = stage.upcycle_from, partial(build_upcycled, noise=stage.upcycle_noise or 0.0)
        config, tokenizer, tokenizer_path = resolve_upcycled(stage, new)
    else:
        config, tokenizer, tokenizer_path = resolve_model(
            start, new, stage.tokenizer_path, stage.tokenizer_type, chat=False
        )
    block_size = row_length(stage.block_size, 512, config, "--block_size")
    check_expert_parallel(stage.expert_parallel_size, config, args)
    job = open_job(stage, args, PRETRAIN_SUFFIXES, [tokenizer_path, start], new_model=vars(new))
    if job.finished:
        return
    progress = watch(stage, tokenizer, config, chat=False)

    rows = pack_texts(
        partial(tokenized, tokenizer=tokenizer, cache_dir=stage.data_cache_dir, num_proc=stage.num_proc),
        job.files,
        job.eval_files,
        document_end_id(tokenizer),
        block_size,
        args.seed,
        stage.packing_strategy,
        stage.max_eval_rows,
    )
    job.announce(
        {
            "model": describe_model(config),
            "weights": f"{start or 'random'}, trained in {job.dtype}",
            "data": rows.summary,
            "validation": f"{len(rows.evaluation):,} rows" if rows.evaluation else "none",
            "processes": job.processes(),
            "output": job.where(),
        }
    )

    prepare(args.seed)  # random weights depend on the seed, not on what ran before
    with whole_model(stage.expert_parallel_size > 1 or bool(stage.upcycle_from)):
        model = build(config, start, job.dtype, stage.attn_implementation)
    spread_experts(model, stage.expert_parallel_size, args)
    job.begin()
    trainer = PretrainTrainer(
        model=model,
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.evaluation,
        data_collator=PackedCollator(tokenizer.pad_token_id, mask_padding=bool(config.num_experts)),
        processing_class=tokenizer,
        progress=progress,
    )
    trainer.train(resume_from_checkpoint=job.checkpoint)
    facts = {"data": rows.summary, "steps": trainer.state.global_step}
    if rows.evaluation:
        facts["validation loss"] = f"{trainer.last_evaluation()['eval_loss']:.4f} nats per token"
    finish(trainer, job.save_dtype, config, facts)


if __name__ == "__main__":
    run(main)
