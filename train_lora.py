"""Adapt a model with LoRA: train low-rank updates of its linear layers, leave its weights alone.

  python train_lora.py --data_path data/lora/lora_data.jsonl --base_model output/sft --lora_r 8 --merge

Rows, packing and loss are those of train_full_sft.py. --output_dir becomes a PEFT adapter directory; --merge
also writes a complete model directory with the update added to the weights. Runs under python, torchrun,
accelerate launch and deepspeed; running the same command again continues an interrupted run.
"""

from collections.abc import Sequence
from functools import partial

from trl import SFTTrainer

from smolkit.adapters import Merge, build_base, check_quantised, finish_adapter, lora_config, merged_directory
from smolkit.checkpoints import (
    describe_model,
    resolve_model,
    row_length,
)
from smolkit.command_line import STAGES, parse
from smolkit.doctor import RECORD_SUFFIXES
from smolkit.dry_run import dry_run
from smolkit.errors import run
from smolkit.packing import PackedCollator, pack_conversations
from smolkit.progress import watch
from smolkit.runs import open_job
from smolkit.runtime import prepare
from smolkit.shards import tokenized
from smolkit.training import TokenLossMixin, TrainerMixin


class LoraTrainer(TokenLossMixin, TrainerMixin, SFTTrainer):
    """TRL's trainer on rows that are rendered and packed already, with the model's own loss."""


def main(argv: Sequence[str] | None = None) -> None:
    stage, args = parse(STAGES["lora"], argv, __doc__)
    if stage.dry_run:
        dry_run("lora", stage, args)
        return
    if stage.qlora:
        check_quantised()
    prepare(args.seed, stage.threads)
    config, tokenizer, tokenizer_path = resolve_model(
        stage.base_model, None, stage.tokenizer_path, stage.tokenizer_type, chat=True
    )
    args.check_router(config.num_experts)
    adapter = lora_config(stage, config, stage.base_model)
    max_length = row_length(args.max_length, 1024, config, "--max_length")
    job = open_job(stage, args, RECORD_SUFFIXES, [tokenizer_path, stage.base_model])
    merged = merged_directory(stage, args.output_dir)
    merge = Merge(merged, stage.base_model, args.output_dir, config, tokenizer, job.save_dtype)
    if job.finished:
        if args.should_save:
            merge.write_if_missing()
        return
    progress = watch(stage, tokenizer, config, chat=True)

    tokenise = partial(tokenized, tokenizer=tokenizer, cache_dir=stage.data_cache_dir, num_proc=stage.num_proc)
    rows = pack_conversations(
        tokenise, job.files, job.eval_files, max_length, args.seed, args.take_packing(), stage.max_eval_rows
    )
    job.announce(
        {
            "model": describe_model(config),
            "weights": f"{stage.base_model}, kept in {'4 bits' if stage.qlora else job.dtype}",
            "adapter": f"rank {stage.lora_r}, alpha {stage.lora_alpha:g}, on {' '.join(stage.lora_target)}",
            "data": rows.summary,
            "validation": f"{len(rows.evaluation):,} rows" if rows.evaluation else "none",
            "processes": job.processes(),
            "output": job.where(),
        }
    )

    model = build_base(stage, config, stage.base_model, job.dtype, stage.attn_implementation, args.local_process_index)
    trainer = LoraTrainer(
        model=model,
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.evaluation,
        data_collator=PackedCollator(tokenizer.pad_token_id, mask_padding=bool(config.num_experts)),
        processing_class=tokenizer,
        peft_config=adapter,
        progress=progress,
    )
    job.begin()
    trainer.train(resume_from_checkpoint=job.checkpoint)
    facts = {"started from": stage.base_model, "data": rows.summary, "steps": trainer.state.global_step}
    if rows.evaluation:
        facts["validation loss"] = f"{trainer.last_evaluation()['eval_loss']:.4f} nats per trained token"
    finish_adapter(trainer, config, facts, merge)


if __name__ == "__main__":
    run(main)
