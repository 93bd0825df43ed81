"""Pretrain a language model on text.

  python train_pretrain.py --data_path data/pretrain/pretrain_data.jsonl --tokenizer_path tokenizer \\
      --model_size tiny --num_epochs 1 --output_dir output/pretrain

Takes .jsonl ({"text": ...}), .txt and .parquet files, directories and globs. Documents are packed into rows
of --block_size tokens and never attend to each other. Writes a complete Hugging Face directory, metrics.jsonl
and timing.jsonl to --output_dir. Runs under python, torchrun, accelerate launch and deepspeed; running the
same command again continues an interrupted run.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Trainer

from smolkit.arguments import NewModelArguments, PretrainArguments, PretrainTrainingArguments, parse
from smolkit.chat import encode_texts
from smolkit.checkpoints import (
    attention_kernel,
    build_model,
    describe_model,
    document_end_id,
    model_card,
    resolve_model,
    row_length,
)
from smolkit.doctor import PRETRAIN_SUFFIXES, read_pretrain
from smolkit.errors import run
from smolkit.packing import PackedCollator, count_tokens, pack_blocks, tokenize_documents
from smolkit.runs import open_job
from smolkit.runtime import prepare
from smolkit.training import TokenLossMixin, TrainerMixin, finish


class PretrainTrainer(TokenLossMixin, TrainerMixin, Trainer):
    """`transformers.Trainer` with this toolkit's loss, masters and checkpoints."""


def text_rows(files: list[Path], tokenizer: PreTrainedTokenizerFast, block_size: int, seed: int) -> tuple[Dataset, str]:
    """Packed rows of the texts in `files`, and one line about them."""
    texts = (row["text"] for row in read_pretrain(files))
    documents = list(tokenize_documents(texts, partial(encode_texts, tokenizer), document_end_id(tokenizer)))
    rows = pack_blocks(documents, block_size, seed)
    tokens, _ = count_tokens(rows)
    return rows, f"{len(documents):,} documents, {tokens:,} tokens in {len(rows):,} rows of {block_size}"


def main(argv: Sequence[str] | None = None) -> None:
    stage, new, args = parse((PretrainArguments, NewModelArguments, PretrainTrainingArguments), argv, __doc__)
    prepare(args.seed, stage.threads)
    config, tokenizer, tokenizer_path = resolve_model(
        stage.base_model, new, stage.tokenizer_path, stage.tokenizer_type, chat=False
    )
    block_size = row_length(stage.block_size, 512, config, "--block_size")
    job = open_job(stage, args, PRETRAIN_SUFFIXES, [tokenizer_path, stage.base_model], new_model=vars(new))
    if job.finished:
        return

    rows, summary = text_rows(job.files, tokenizer, block_size, args.seed)
    eval_rows = None
    if job.eval_files:
        eval_rows, _ = text_rows(job.eval_files, tokenizer, block_size, args.seed)
        eval_rows = eval_rows.select(range(min(stage.max_eval_rows, len(eval_rows))))
    job.announce(
        {
            "model": describe_model(config),
            "weights": f"{stage.base_model or 'random'}, trained in {job.dtype}",
            "data": summary,
            "validation": f"{len(eval_rows):,} rows" if eval_rows else "none",
            "output": job.where(),
        }
    )

    attention = attention_kernel(stage.attn_implementation, block_size, args.use_cpu)
    prepare(args.seed)  # random weights depend on the seed, not on what ran before
    model = build_model(config, stage.base_model, job.dtype, attention)
    job.begin()
    trainer = PretrainTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=PackedCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=job.checkpoint)
    facts = {"pretrained on": summary, "steps": trainer.state.global_step}
    if eval_rows:
        facts["validation loss"] = f"{trainer.evaluate()['eval_loss']:.4f} nats per token"
    finish(trainer, job.save_dtype, model_card(Path(args.output_dir).name, config, facts))


if __name__ == "__main__":
    run(main)
