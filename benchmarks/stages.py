"""The training scripts themselves: does the speed of the bare step arrive in them, are they ahead of TRL, and do they
learn the same?

  python -m benchmarks.stages --rounds 2 --stages pretrain sft dpo
  python -m benchmarks.stages --samples ../shared/samples --steps 80       on slices of public datasets
  python -m benchmarks.stages --stages pretrain --pretrain_data FILE.jsonl --tokenizer DIR --batch 2 512

On the built-in tiny world, or with --samples DIR on IndustryCorpus2 (English and Chinese), Infinity-Instruct and
Infinity-Preference as they lie on the hub, or pretraining on your own texts; for each stage, each in its own process
and taking turns:

  script        train_pretrain.py, train_full_sft.py or train_dpo.py: the median tokens_per_second of its timing.jsonl
  bare          the same batches through forward, backward, clip and update, and nothing else. For DPO the loss is the
                plain likelihood of all answers: the least that a step on these pairs has to do
  peer          transformers' model of the same shape under transformers' Trainer, TRL's SFTTrainer or DPOTrainer, with
                the script's arguments on the same rows in the same order: fp32 weights, --bf16 (autocast), fused AdamW

  llama_factory LLaMA-Factory's fine-tuning of the same file, packed with its `neat_packing`, which keeps conversations
                apart as ours does, and without the gradient checkpointing that it turns on by itself. It is run with
                --llama_factory PYTHON, an interpreter that has it (pip install llamafactory; it wants an older
                transformers than we do), for the stage sft. Its rows are its own, so that losses are not compared

Tokens are those of the input without padding (LLaMA-Factory counts its own, with it); DPO with reference
log-probabilities computed beforehand on both sides, not counted. The first steps are not counted either. A script must
stay within 10 % of the bare step. `loss` has the means of five steps of the script and of the peer, and by how much
they differ at most and on average: rounding of bf16 weights against autocast, nothing else. --fp32 computes in float32
on both sides, where only the order of sums is left.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice, pairwise, repeat
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from trl import DPOTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from benchmarks import common
from benchmarks.train_step import LEARNING_RATE, MAX_NORM, SEED
from smolkit import command_line
from smolkit.checkpoints import build_model, document_end_id, load_config
from smolkit.errors import run
from smolkit.optimizer import MasterAdamW
from smolkit.packing import IGNORE, PackedCollator, SeededOrder, pack_conversations, pack_texts, preference_pairs
from smolkit.runtime import prepare
from smolkit.shards import tokenized

# rows of a batch, tokens of a row at most, script, flag of the checkpoint to start from
STAGES = {
    "pretrain": (4, 128, "train_pretrain.py", "--base_model"),
    "sft": (2, 512, "train_full_sft.py", "--base_model"),
    "dpo": (8, 512, "train_dpo.py", "--model_path"),
}
# The dataset of --samples.
DATASETS = {"pretrain": "BAAI/IndustryCorpus2", "sft": "BAAI/Infinity-Instruct", "dpo": "BAAI/Infinity-Preference"}
WINDOW = 5  # steps between two lines of timing.jsonl
WARMUP = 5  # steps that are not counted
SCRIPT_SHARE = 0.9


@dataclass(frozen=True)
class Job:
    """One stage for every side to run: steps that are counted, rows of a batch, tokens of a row at most."""

    home: Path
    stage: str
    steps: int
    fp32: bool
    rows: int
    length: int

    @classmethod
    def of(cls, words: dict[str, Any]) -> "Job":
        """From what `asdict` and JSON made of one."""
        return cls(**words | {"home": Path(words["home"])})

    @property
    def checkpoint(self) -> Path:
        """Where every side starts."""
        return self.home / "checkpoint"

    @property
    def tokenizer(self) -> Path:
        return self.home / "tokenizer"

    @property
    def data(self) -> Path:
        return data_file(self.home, self.stage)


def data_file(home: Path, stage: str) -> Path:
    return home / "data" / stage / f"{stage}_data.jsonl"


# --- what every side starts from ----------------------------------------------------------------------------


def script(*arguments: object) -> None:
    """Run one of the toolkit's scripts; RuntimeError with its last words when it fails."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} exited with {done.returncode}\n{done.stderr[-4000:]}")


def prepare_home(args: argparse.Namespace, home: Path) -> None:
    """Data, a tokenizer, and a checkpoint that has seen one step, in `home`."""
    data, tokenizer = home / "data", ["train_tokenizer.py", "--save_dir", home / "tokenizer"]
    if args.samples is None:
        script("prepare_datasets.py", "--source", "tiny", "--output_dir", data)
    for stage, dataset in DATASETS.items() if args.samples else ():
        source = ["--source", "local", "--path", args.samples, f"--{stage}", "--datasets", dataset]
        script("prepare_datasets.py", *source, "--output_dir", data)
    if args.pretrain_data:
        shutil.copy(args.pretrain_data, data_file(home, "pretrain"))
    if args.tokenizer:
        script(*tokenizer, "--mode", "load", "--qwen_model", args.tokenizer)
    else:
        texts = ["--data_path", data_file(home, "pretrain"), data_file(home, "sft")]
        script(*tokenizer, "--mode", "train", "--vocab_size", args.vocab_size, *texts)
    one_step = Job(home, "pretrain", 1, False, *STAGES["pretrain"][:2])
    start = ["--model_size", args.model_size, "--output_dir", one_step.checkpoint]
    script("train_pretrain.py", *settings(one_step, 1), *start)


def settings(job: Job, steps: int) -> list[str]:
    """Arguments of the stage's script, but for the model to start from and the place of the result."""
    limit = "--block_size" if job.stage == "pretrain" else "--max_length"
    words = ["--per_device_train_batch_size", job.rows, limit, job.length, "--max_steps", steps]
    words += ["--learning_rate", LEARNING_RATE, "--max_grad_norm", MAX_NORM, "--seed", SEED]
    words += ["--weights_dtype", "fp32" if job.fp32 else "auto"]
    words += ["--data_path", job.data, "--tokenizer_path", job.tokenizer]
    words += ["--logging_steps", WINDOW, "--save_strategy", "no", "--resume", "never", "--disable_tqdm", "true"]
    return [*map(str, words)]


def stage_rows(job: Job, tokenizer: Any) -> tuple[Dataset, Callable]:
    """The rows a stage trains on and what makes a batch of some of them, as its script does."""
    tokenise = partial(tokenized, tokenizer=tokenizer, cache_dir=job.home / "cache", num_proc=1)
    shared = ([job.data], [])
    if job.stage == "pretrain":
        end = document_end_id(tokenizer)
        rows = pack_texts(tokenise, *shared, end, job.length, SEED, strategy="best_fit", max_eval_rows=0).train
        return rows, PackedCollator(tokenizer.pad_token_id)
    if job.stage == "sft":
        rows = pack_conversations(tokenise, *shared, job.length, SEED, pack=True, max_eval_rows=0).train
        return rows, PackedCollator(tokenizer.pad_token_id)
    pairs, _ = preference_pairs(tokenise, [job.data], job.length)
    return pairs, DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)


# --- the three sides ----------------------------------------------------------------------------------------


def measure_script(**words: Any) -> dict[str, Any]:
    """The script's own figures."""
    job = Job.of(words)
    name, flag = STAGES[job.stage][2:]
    output = job.home / f"{job.stage}-run"
    script(name, *settings(job, WARMUP + job.steps), flag, job.checkpoint, "--output_dir", output)
    timing, metrics = (
        [json.loads(line) for line in (output / f"{kind}.jsonl").read_text().splitlines()]
        for kind in ("timing", "metrics")
    )
    speeds = [row["tokens_per_second"] for row in timing if "tokens_per_second" in row and row["step"] > WARMUP]
    return {"tokens_per_second": statistics.median(speeds), "loss": [row["loss"] for row in metrics if "loss" in row]}


def batches(rows: Dataset, collate: Callable, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Shuffled batches without end."""
    random = torch.Generator().manual_seed(SEED)
    loader = DataLoader(rows, batch_size=size, shuffle=True, drop_last=True, collate_fn=collate, generator=random)
    return chain.from_iterable(repeat(loader))


def measure_bare(**words: Any) -> dict[str, Any]:
    """Forward, backward, clip and update on the stage's batches."""
    job = Job.of(words)
    prepare(SEED)
    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    config = load_config(job.checkpoint, tokenizer, job.tokenizer)
    model = build_model(config, job.checkpoint, torch.float32 if job.fp32 else torch.bfloat16).train()
    optimizer = MasterAdamW(model.parameters(), lr=LEARNING_RATE)
    tokens, starts = [], []
    for batch in islice(batches(*stage_rows(job, tokenizer), job.rows), WARMUP + job.steps + 1):
        starts.append(time.perf_counter())
        tokens.append(real_tokens(batch))
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


def real_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Tokens without padding, as the scripts count them; takes the collator's own count out of the batch."""
    tokens = batch.pop("tokens", None)
    return int(batch["attention_mask"].sum()) if tokens is None else tokens


class Clocked:
    """Put before a trainer: rows in the scripts' order; notes when each step began and how many tokens it had."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SeededOrder:
        return SeededOrder(len(self.train_dataset), SEED)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        self.starts.append(time.perf_counter())
        self.tokens.append(real_tokens(inputs))
        return super().training_step(model, inputs, *args)


class ClockedTrainer(Clocked, Trainer):
    """transformers' trainer."""


class ClockedSftTrainer(Clocked, SFTTrainer):
    """TRL's trainer."""


class ClockedDpoTrainer(Clocked, DPOTrainer):
    """TRL's trainer on pairs that are rendered already."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def measure_peer(**words: Any) -> dict[str, Any]:
    """transformers' or TRL's trainer with transformers' model, untouched, and the arguments of the script."""
    job = Job.of(words)
    start = [STAGES[job.stage][-1], str(job.checkpoint), "--output_dir", str(job.home / f"{job.stage}-peer")]
    *_, args = command_line.parse(command_line.STAGES[job.stage], [*settings(job, WARMUP + job.steps), *start], "")
    args.bf16, args.max_length = not job.fp32, job.length
    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    rows, collate = stage_rows(job, tokenizer)
    if job.stage == "sft":
        args.packing = False  # the rows are packed already
    trainer_class = {"pretrain": ClockedTrainer, "sft": ClockedSftTrainer, "dpo": ClockedDpoTrainer}[job.stage]
    model = AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=torch.float32)
    trainer = trainer_class(
        model=model, args=args, train_dataset=rows, data_collator=collate, processing_class=tokenizer
    )
    trainer.starts, trainer.tokens = [], []
    trainer._send_telemetry = lambda: None
    trainer.train()
    trainer.starts.append(time.perf_counter())
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"tokens_per_second": pace(trainer.tokens, trainer.starts), "loss": losses}


def measure_llama_factory(job: Job, python: str) -> dict[str, Any]:
    """The other toolkit's command on the conversations of the stage sft."""
    folder, output = job.home / "llama_factory", job.home / "llama_factory-run"
    roles = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    source = {"file_name": str(job.data), "columns": {"messages": "messages"}}
    folder.mkdir(exist_ok=True)
    described = source | {"formatting": "sharegpt", "tags": roles | {"system_tag": "system"}}
    (folder / "dataset_info.json").write_text(json.dumps({"sft": described}))
    words = f"""--stage sft --do_train true --finetuning_type full --template chatml --dataset sft
        --dataset_dir {folder} --model_name_or_path {job.checkpoint} --cutoff_len {job.length}
        --packing true --neat_packing true
        --per_device_train_batch_size {job.rows} --gradient_accumulation_steps 1 --max_steps {WARMUP + job.steps}
        --learning_rate {LEARNING_RATE} --max_grad_norm {MAX_NORM} --seed {SEED} --optim adamw_torch_fused
        --bf16 {not job.fp32} --use_cpu true --flash_attn sdpa --disable_gradient_checkpointing true --save_strategy no
        --include_num_input_tokens_seen true --logging_steps {WINDOW} --report_to none --output_dir {output}
        --overwrite_output_dir true --overwrite_cache true --disable_tqdm true""".split()
    start = [python, "-c", "from llamafactory.train.tuner import run_exp; run_exp()"]
    done = subprocess.run([*start, *words], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"LLaMA-Factory exited with {done.returncode}\n{done.stderr[-4000:]}")
    rows = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    seen = [(row["total_tokens"], row["total_tokens"] / row["throughput"]) for row in rows if "loss" in row]
    windows = [(tokens - before, at - then) for (before, then), (tokens, at) in pairwise(seen)]
    return {"tokens_per_second": statistics.median(tokens / seconds for tokens, seconds in windows)}


def difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Both curves and how far they are apart."""
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    curves = {"script": [round(loss, 4) for loss in ours], "peer": [round(loss, 4) for loss in theirs]}
    return {**curves, "largest_difference": max(apart), "mean_difference": statistics.mean(apart)}


# --- report -------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Measure the sides of every stage in turn and put the report together."""
    report = {}
    for stage in args.stages:
        job = Job(home, stage, args.steps, args.fp32, *(args.batch or STAGES[stage][:2]))
        words = asdict(job) | {"home": str(home)}
        sides = ["script", *args.against]
        jobs = {
            f"{stage} {side}": partial(common.in_a_process, f"benchmarks.stages:measure_{side}", **words)
            for side in sides
        }
        if stage == "sft" and args.llama_factory:
            sides.append("llama_factory")
            jobs["sft llama_factory"] = partial(measure_llama_factory, job, args.llama_factory)
        results = common.take_turns(jobs, args.rounds, lambda result: f"{result['tokens_per_second']:,.0f} tok/s")
        speeds = {side: [row["tokens_per_second"] for row in results[f"{stage} {side}"]] for side in sides}
        ratios = {side: common.ratio_by_round(speeds["script"], speeds[side]) for side in sides[1:]}
        report[stage] = {
            "rows": job.rows,
            "tokens_of_a_row": job.length,
            "tokens_per_second": {side: [round(speed, 1) for speed in values] for side, values in speeds.items()},
            **{f"script_over_{side}": ratio for side, ratio in ratios.items()},
        }
        if "peer" in sides:
            curves = (results[f"{stage} {side}"][0]["loss"] for side in ("script", "peer"))
            report[stage]["loss"] = difference(*curves)
        if "bare" in sides:
            target = common.Target("script", "speed", SCRIPT_SHARE, "bare")
            report[stage]["target"] = target.judge(ratios["bare"]["median"])
    return report


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = common.parser(__doc__)
    options.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    both = ["bare", "peer"]
    options.add_argument("--against", nargs="+", choices=both, default=both, help="what to compare with (default both)")
    options.add_argument("--model_size", default="tiny", help="preset to train (default tiny)")
    options.add_argument("--vocab_size", type=int, default=2000, help="of the tokenizer (default 2000)")
    options.add_argument("--steps", type=int, default=40, help="counted steps of a run (default 40)")
    options.add_argument("--samples", help="directory with slices of the public datasets; default: the tiny world")
    options.add_argument("--pretrain_data", metavar="FILE", help="texts (JSON Lines) to pretrain on instead")
    options.add_argument("--tokenizer", metavar="DIR", help="take this one instead of training one")
    sizes = ", ".join(f"{stage} {rows} {length}" for stage, (rows, length, *_) in STAGES.items())
    batch = f"rows of a batch and tokens of a row (default: {sizes})"
    options.add_argument("--batch", nargs=2, type=int, metavar=("ROWS", "TOKENS"), help=batch)
    options.add_argument("--fp32", action="store_true", help="float32 on all sides, to compare the losses")
    options.add_argument("--llama_factory", metavar="PYTHON", help="interpreter of an environment with LLaMA-Factory")
    args = options.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        prepare_home(args, home)
        stages = compare(args, home)
    report = {"benchmark": "stages", **common.environment(), "model_size": args.model_size, "stages": stages}
    return common.emit(report, args.output)


if __name__ == "__main__":
    run(main)
