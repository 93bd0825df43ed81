"""The training scripts themselves: does the speed of the bare step arrive in them, and how far ahead of TRL are they?

  python -m benchmarks.stages --rounds 2 --stages pretrain sft dpo

On the built-in tiny world, for each stage, each in its own process and taking turns:

  script        train_pretrain.py, train_full_sft.py or train_dpo.py: the median tokens_per_second of its timing.jsonl
  bare          the same batches through forward, backward, clip and update, and nothing else. For DPO the loss is the
                plain likelihood of all answers: the least that a step on these pairs has to do
  peer          transformers' model of the same shape under transformers' Trainer, TRL's SFTTrainer or DPOTrainer, on
                the same batches: fp32 weights, --bf16 (autocast), fused AdamW

Tokens are those of the input, padding included; DPO with reference log-probabilities computed beforehand on both
sides, not counted. The first steps are not counted either. A script must stay within 10 % of the bare step.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from benchmarks import common
from benchmarks.train_step import LEARNING_RATE, MAX_NORM, SEED
from smolkit.checkpoints import build_model, document_end_id, load_config
from smolkit.errors import run
from smolkit.optimizer import MasterAdamW
from smolkit.packing import IGNORE, PackedCollator, pack_conversations, pack_texts, preference_pairs
from smolkit.runtime import prepare
from smolkit.shards import tokenized

# rows of a batch, tokens of a row at most, script, flag of the checkpoint to start from
STAGES = {
    "pretrain": (4, 128, "train_pretrain.py", "--base_model"),
    "sft": (2, 512, "train_full_sft.py", "--base_model"),
    "dpo": (8, 512, "train_dpo.py", "--model_path"),
}
WINDOW = 5  # steps between two lines of timing.jsonl
WARMUP = 5  # steps that are not counted
SCRIPT_SHARE = 0.9

# --- what every side starts from ----------------------------------------------------------------------------


def script(*arguments: object) -> None:
    """Run one of the toolkit's scripts; RuntimeError with its last words when it fails."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} exited with {done.returncode}\n{done.stderr[-4000:]}")


def prepare_world(home: Path, model_size: str, vocab_size: int) -> None:
    """The tiny world's data, a tokenizer, and a checkpoint that has seen one step, in `home`."""
    data = home / "data"
    texts = [data / "pretrain" / "pretrain_data.jsonl", data / "sft" / "sft_data.jsonl"]
    script("prepare_datasets.py", "--source", "tiny", "--output_dir", data)
    tokenizer = ["--mode", "train", "--vocab_size", vocab_size, "--data_path", *texts]
    script("train_tokenizer.py", *tokenizer, "--save_dir", home / "tokenizer")
    train(home, "pretrain", steps=1, output="checkpoint", start=["--model_size", model_size])


def train(home: Path, stage: str, steps: int, output: str, start: Sequence[object]) -> None:
    """Run a stage's script for some steps."""
    rows, length, name, _ = STAGES[stage]
    limit = "--block_size" if stage == "pretrain" else "--max_length"
    settings = ["--per_device_train_batch_size", rows, limit, length, "--max_steps", steps, "--learning_rate", 1e-4]
    places = ["--data_path", data_file(home, stage), "--tokenizer_path", home / "tokenizer"]
    logging = ["--logging_steps", WINDOW, "--save_strategy", "no", "--resume", "never", "--disable_tqdm", "true"]
    script(name, *start, *settings, *places, *logging, "--output_dir", home / output)


def data_file(home: Path, stage: str) -> Path:
    return home / "data" / stage / f"{stage}_data.jsonl"


def stage_rows(home: Path, stage: str, tokenizer: Any) -> tuple[Dataset, Callable]:
    """The rows a stage trains on and what makes a batch of some of them, as its script does."""
    _, length, *_ = STAGES[stage]
    file = data_file(home, stage)
    tokenise, shared = partial(tokenized, tokenizer=tokenizer, cache_dir=home / "cache", num_proc=1), ([file], [])
    if stage == "pretrain":
        end = document_end_id(tokenizer)
        rows = pack_texts(tokenise, *shared, end, length, SEED, strategy="best_fit", max_eval_rows=0).train
        return rows, PackedCollator(tokenizer.pad_token_id)
    if stage == "sft":
        rows = pack_conversations(tokenise, *shared, length, SEED, pack=True, max_eval_rows=0).train
        return rows, PackedCollator(tokenizer.pad_token_id)
    pairs, _ = preference_pairs(tokenise, [file], length)
    return pairs, DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)


# --- the three sides ----------------------------------------------------------------------------------------


def measure_script(home: str, stage: str, steps: int) -> dict[str, Any]:
    """The script's own figures."""
    flag = STAGES[stage][-1]
    train(Path(home), stage, WARMUP + steps, f"{stage}-run", [flag, Path(home, "checkpoint")])
    timing = [json.loads(line) for line in Path(home, f"{stage}-run", "timing.jsonl").read_text().splitlines()]
    speeds = [row["tokens_per_second"] for row in timing if "tokens_per_second" in row and row["step"] > WARMUP]
    return {"tokens_per_second": statistics.median(speeds)}


def batches(rows: Dataset, collate: Callable, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Shuffled batches without end."""
    random = torch.Generator().manual_seed(SEED)
    loader = DataLoader(rows, batch_size=size, shuffle=True, drop_last=True, collate_fn=collate, generator=random)
    return chain.from_iterable(repeat(loader))


def measure_bare(home: str, stage: str, steps: int) -> dict[str, Any]:
    """Forward, backward, clip and update on the stage's batches."""
    prepare(SEED)
    size, length, *_ = STAGES[stage]
    checkpoint, tokenizer_path = Path(home, "checkpoint"), Path(home, "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    config = load_config(checkpoint, tokenizer, tokenizer_path)
    model = build_model(config, checkpoint, torch.bfloat16).train()
    optimizer = MasterAdamW(model.parameters(), lr=LEARNING_RATE)
    tokens, starts = [], []
    for batch in islice(batches(*stage_rows(Path(home), stage, tokenizer), size), WARMUP + steps + 1):
        starts.append(time.perf_counter())
        tokens.append(batch["input_ids"].numel())
        if "completion_mask" in batch:
            batch["labels"] = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, IGNORE)
        model(**batch, use_cache=False).loss.backward()
        optimizer.clip_grad_norm(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return {"tokens_per_second": pace(tokens, starts)}


def pace(tokens: Sequence[int], starts: Sequence[float]) -> float:
    """Tokens per second of steps that began at `starts`: the median over windows, as in timing.jsonl."""
    ends = range(WARMUP, len(starts) - WINDOW, WINDOW)
    return statistics.median(sum(tokens[i : i + WINDOW]) / (starts[i + WINDOW] - starts[i]) for i in ends)


class Clocked:
    """Put before a trainer: notes when each step began and how many tokens it had."""

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        self.starts.append(time.perf_counter())
        self.tokens.append(inputs["input_ids"].numel())
        return super().training_step(model, inputs, *args)


class ClockedTrainer(Clocked, Trainer):
    """transformers' trainer."""


class ClockedSftTrainer(Clocked, SFTTrainer):
    """TRL's trainer."""


class ClockedDpoTrainer(Clocked, DPOTrainer):
    """TRL's trainer on pairs that are rendered already."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def measure_peer(home: str, stage: str, steps: int) -> dict[str, Any]:
    """transformers' or TRL's trainer with transformers' model, untouched."""
    size, length, *_ = STAGES[stage]
    tokenizer = AutoTokenizer.from_pretrained(Path(home, "tokenizer"))
    rows, collate = stage_rows(Path(home), stage, tokenizer)
    trainer_class, arguments_class, more = {
        "pretrain": (ClockedTrainer, TrainingArguments, {}),
        "sft": (ClockedSftTrainer, SFTConfig, {"dataset_kwargs": {"skip_prepare_dataset": True}}),
        "dpo": (ClockedDpoTrainer, DPOConfig, {"precompute_ref_log_probs": True}),
    }[stage]
    arguments = arguments_class(
        output_dir=str(Path(home, f"{stage}-peer")),
        max_steps=WARMUP + steps + 1,
        per_device_train_batch_size=size,
        learning_rate=LEARNING_RATE,
        max_grad_norm=MAX_NORM,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=WINDOW,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
        **({} if stage == "pretrain" else {"max_length": length}),
        **more,
    )
    model = AutoModelForCausalLM.from_pretrained(Path(home, "checkpoint"), dtype=torch.float32)
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=rows, data_collator=collate, processing_class=tokenizer
    )
    trainer.starts, trainer.tokens = [], []
    trainer._send_telemetry = lambda: None
    trainer.train()
    return {"tokens_per_second": pace(trainer.tokens, trainer.starts)}


# --- report -------------------------------------------------------------------------------------------------


def compare(home: Path, stages: Sequence[str], rounds: int, steps: int) -> dict[str, Any]:
    """Measure the sides of every stage in turn and put the report together."""
    report = {}
    for stage in stages:
        work = {"home": str(home), "stage": stage, "steps": steps}
        sides = ("script", "bare", "peer")
        jobs = {
            f"{stage} {side}": partial(common.in_a_process, f"benchmarks.stages:measure_{side}", **work)
            for side in sides
        }
        results = common.take_turns(jobs, rounds, lambda result: f"{result['tokens_per_second']:,.0f} tok/s")
        speeds = {side: [row["tokens_per_second"] for row in results[f"{stage} {side}"]] for side in sides}
        ratios = {side: common.ratio_by_round(speeds["script"], speeds[side]) for side in ("bare", "peer")}
        target = common.Target("script", "speed", SCRIPT_SHARE, "bare")
        report[stage] = {
            "tokens_per_second": {side: [round(speed, 1) for speed in values] for side, values in speeds.items()},
            "script_over_bare": ratios["bare"],
            "script_over_peer": ratios["peer"],
            "target": target.judge(ratios["bare"]["median"]),
        }
    return report


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = common.parser(__doc__)
    options.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    options.add_argument("--model_size", default="tiny", help="preset to train (default tiny)")
    options.add_argument("--vocab_size", type=int, default=2000, help="of the tokenizer (default 2000)")
    options.add_argument("--steps", type=int, default=40, help="counted steps of a run (default 40)")
    args = options.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        prepare_world(home, args.model_size, args.vocab_size)
        stages = compare(home, args.stages, args.rounds, args.steps)
    report = {"benchmark": "stages", **common.environment(), "model_size": args.model_size, "stages": stages}
    return common.emit(report, args.output)


if __name__ == "__main__":
    run(main)
