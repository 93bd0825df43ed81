"""Fine-tune all weights of a model on conversations (supervised fine-tuning).

  python train_full_sft.py --data_path data/sft/sft_data.jsonl --base_model output/pretrain \\
      --output_dir output/sft

Rows are {"messages": [{"role", "content"}, ...], "tools"?: [...]}; the loss is on assistant tokens only, the
end token included. Whole conversations are packed into rows of --max_length tokens and never attend to each
other; one that is too long is cut after its last reply that fits. Runs under python, torchrun, accelerate
launch and deepspeed; running the same command again continues an interrupted run.
"""

from collections.abc import Sequence
from functools import partial

from trl import SFTTrainer

from smolkit.checkpoints import (
    build_model,
    describe_model,
    resolve_model,
    row_length,
)
from smolkit.command_line import STAGES, parse
from smolkit.doctor import RECORD_SUFFIXES
from smolkit.dry_run import dry_run
from smolkit.errors import run
from smolkit.expert_trainer import ExpertParallelMixin
from smolkit.packing import PackedCollator, pack_conversations
from smolkit.parallel import check_expert_parallel, spread_experts, whole_model
from smolkit.progress import watch
from smolkit.runs import open_job
from smolkit.runtime import prepare
from smolkit.shards import tokenized
from smolkit.training import TokenLossMixin, TrainerMixin, finish


class FullSftTrainer(ExpertParallelMixin, TokenLossMixin, TrainerMixin, SFTTrainer):
    """TRL's trainer on rows that are rendered and packed already, with the model's own loss."""


def main(argv: Sequence[str] | None = None) -> None:
    stage, new, args = parse(STAGES["sft"], argv, __doc__)
    if stage.dry_run:
        dry_run("sft", stage, args, new)
        return
    prepare(args.seed, stage.threads)
    config, tokenizer, tokenizer_path = resolve_model(
        stage.base_model, new, stage.tokenizer_path, stage.tokenizer_type, chat=True
    )
    max_length = row_length(args.max_length, 1024, config, "--max_length")
    check_expert_parallel(stage.expert_parallel_size, config, args)
    args.check_router(config.num_experts)
    job = open_job(stage, args, RECORD_SUFFIXES, [tokenizer_path, stage.base_model], new_model=vars(new))
    if job.finished:
        return
    progress = watch(stage, tokenizer, config, chat=True)

    tokenise = partial(tokenized, tokenizer=tokenizer, cache_dir=stage.data_cache_dir, num_proc=stage.num_proc)
    rows = pack_conversations(
        tokenise, job.files, job.eval_files, max_length, args.seed, args.take_packing(), stage.max_eval_rows
    )
    job.announce(
        {
            "model": describe_model(config),
            "weights": f"{stage.base_model or 'random'}, trained in {job.dtype}",
            "data": rows.summary,
            "validation": f"{len(rows.evaluation):,} rows" if rows.evaluation else "none",
            "processes": job.processes(),
            "output": job.where(),
        }
    )

    prepare(args.seed)  # random weights depend on the seed, not on what ran before
    with whole_model(stage.expert_parallel_size > 1):
        model = build_model(config, stage.base_model, job.dtype, stage.attn_implementation)
    spread_experts(model, stage.expert_parallel_size, args)
    job.begin()
    trainer = FullSftTrainer(
        model=model,
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.evaluation,
        data_collator=PackedCollator(tokenizer.pad_token_id, mask_padding=bool(config.num_experts)),
        processing_class=tokenizer,
        progress=progress,
    )
    trainer.train(resume_from_checkpoint=job.checkpoint)
    start = stage.base_model or "random weights"
    facts = {"started from": start, "data": rows.summary, "steps": trainer.state.global_step}
    if rows.evaluation:
        facts["validation loss"] = f"{trainer.last_evaluation()['eval_loss']:.4f} nats per trained token"
    finish(trainer, job.save_dtype, config, facts)


if __name__ == "__main__":
    run(main)
