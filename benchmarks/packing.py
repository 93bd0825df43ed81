"""Tokenising, packing and what packing is worth, measured on real samples; prints JSON.

  python -m benchmarks.packing --samples ../shared/samples                    all parts, about four minutes
  python -m benchmarks.packing --samples ../shared/samples --parts fill

tokenise  tokens per second from JSON Lines to tokens on disk: the toolkit's store (reading, checks and checksums
          included) beside `datasets` (load_dataset and map) with the same tokenizer; each run in a process of its own,
          sides in turn. `ratio` is the median over rounds of ours / theirs within a round.
memory    peak resident memory of tokenising 1, 4 and 16 copies of the text.
fill      share of the row tokens that hold data, and how many documents were split, for every corpus and both
          strategies.
step      real tokens per second of a training step of a tiny model: one conversation per row padded to the longest of
          the batch, against packed rows of about as many tokens; and eight pairs in random and in length-grouped
          batches, padded and with their sides in shared rows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl.trainer.utils import add_fused_lm_head

import prepare_datasets
import train_tokenizer
from smol_config import preset_config
from smolkit.chat import add_chat_tokens
from smolkit.checkpoints import build_model, document_end_id
from smolkit.doctor import read_pretrain
from smolkit.errors import UserError, run
from smolkit.optimizer import MasterAdamW
from smolkit.packing import (
    LengthGroupedOrder,
    PackedCollator,
    SeededOrder,
    conversations,
    documents,
    filling,
    pack_blocks,
    pack_rows,
    pair_lengths,
    preferences,
)
from smolkit.pairs import unpadded
from smolkit.runtime import compute_dtype, prepare
from smolkit.shards import tokenized

PARTS = ("tokenise", "memory", "fill", "step")
SIDES = (("ours", 1), ("datasets", 1), ("ours", 2), ("datasets", 2))
COPIES = 4  # of the sample text in a tokenising run, so that starting does not count much


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- corpora ------------------------------------------------------------------------------------------------


def qwen(samples: Path) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(samples / "qwen2.5_tokenizer")
    add_chat_tokens(tokenizer)
    return tokenizer


def corpora(samples: Path, work: Path) -> dict[str, tuple[str, list[Path]]]:
    """name → (kind, files): real texts as they are, conversations and pairs as prepare_datasets.py writes them."""
    industry = samples / "industrycorpus2"
    found = {
        "wikitext2": ("pretrain", [samples / "wikitext2" / "valid.txt"]),
        "industrycorpus2 en": ("pretrain", sorted(industry.rglob("english/**/*.parquet"))),
        "industrycorpus2 zh": ("pretrain", sorted(industry.rglob("chinese/**/*.parquet"))),
    }
    with redirect_stdout(sys.stderr):
        prepare_datasets.main(["--source", "tiny", "--output_dir", str(work / "tiny")])
        for name, part, dataset in (
            ("gsm8k", "sft", "openai/gsm8k"),
            ("infinity_instruct", "sft", "BAAI/Infinity-Instruct"),
            ("infinity_preference", "dpo", "BAAI/Infinity-Preference"),
        ):
            arguments = ["--source", "local", "--path", str(samples), f"--{part}", "--datasets", dataset]
            prepare_datasets.main([*arguments, "--output_dir", str(work / name)])
            found[name] = (part, [work / name / part / f"{part}_data.jsonl"])
    for part in ("pretrain", "sft", "dpo"):
        found[f"tiny world {part}"] = (part, [work / "tiny" / part / f"{part}_data.jsonl"])
    return found


def sample_text(samples: Path, path: Path, copies: int) -> Path:
    """JSON Lines with the sample documents, English, Chinese and arithmetic, each `copies` times."""
    industry = sorted((samples / "industrycorpus2").rglob("*.parquet"))
    texts = [row["text"] for row in read_pretrain([samples / "wikitext2" / "valid.txt", *industry])]
    for line in (samples / "gsm8k" / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        texts.append(f"{row['question']}\n{row['answer']}")
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines * copies))
    return path


# --- tokenising ---------------------------------------------------------------------------------------------


def tokenise(side: str, num_proc: int, text: Path, samples: Path, work: Path) -> dict[str, Any]:
    """One measurement: seconds, tokens and peak memory in MiB (of this process)."""
    tokenizer = qwen(samples)
    end = document_end_id(tokenizer)
    tokenizer(["warm up the thread pool"] * 8)
    started = time.perf_counter()
    if side == "ours":
        store = tokenized(documents(end), [text], tokenizer, work, num_proc)
        seconds, tokens = time.perf_counter() - started, store.counts["tokens"]
    else:
        disable_progress_bars()

        def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            ids = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
            return {"input_ids": [[*each, end] for each in ids]}

        rows = load_dataset("json", data_files=str(text), split="train", cache_dir=str(work))
        rows = rows.map(encode, batched=True, remove_columns=["text"], num_proc=num_proc if num_proc > 1 else None)
        seconds = time.perf_counter() - started
        tokens = sum(len(ids) for ids in rows.with_format("numpy")["input_ids"])
    status = Path("/proc/self/status")
    peak = next((line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")), "0")
    return {"seconds": round(seconds, 3), "tokens": tokens, "peak_mib": int(peak) // 1024}


def in_a_process(*arguments: object) -> dict[str, Any]:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-m", "benchmarks.packing", "--worker", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def measure_tokenising(samples: Path, work: Path, rounds: int) -> dict[str, Any]:
    text = sample_text(samples, work / "text.jsonl", COPIES)
    seconds: dict[str, list[float]] = {f"{side}, {num_proc} process(es)": [] for side, num_proc in SIDES}
    counts = set()
    for number in range(rounds):
        for side, num_proc in SIDES[number % len(SIDES) :] + SIDES[: number % len(SIDES)]:
            with tempfile.TemporaryDirectory(dir=work) as cache:
                result = in_a_process(side, num_proc, text, samples, cache)
            say(f"round {number + 1}/{rounds}  {side} {num_proc}: {result}")
            seconds[f"{side}, {num_proc} process(es)"].append(result["seconds"])
            counts.add(result["tokens"])
    assert len(counts) == 1, f"the sides disagree: {counts}"
    (tokens,) = counts
    ratios = {
        f"{n} process(es)": [
            theirs / ours
            for ours, theirs in zip(
                seconds[f"ours, {n} process(es)"], seconds[f"datasets, {n} process(es)"], strict=True
            )
        ]
        for n in (1, 2)
    }
    return {
        "megabytes": round(text.stat().st_size / 1e6, 1),
        "tokens": tokens,
        "tokens_per_second": {name: [round(tokens / s) for s in each] for name, each in seconds.items()},
        "ratio": {name: round(statistics.median(each), 2) for name, each in ratios.items()},
    }


def measure_memory(samples: Path, work: Path) -> list[dict[str, Any]]:
    points = []
    for copies in (1, 4, 16):
        text = sample_text(samples, work / f"text-{copies}.jsonl", copies)
        with tempfile.TemporaryDirectory(dir=work) as cache:
            result = in_a_process("ours", 1, text, samples, cache)
        points.append({"megabytes": round(text.stat().st_size / 1e6, 1), **result})
        say(f"memory: {points[-1]}")
    return points


# --- packing ------------------------------------------------------------------------------------------------


def measure_fill(samples: Path, work: Path) -> list[dict[str, Any]]:
    tokenizer = qwen(samples)
    result = []
    for name, (kind, files) in corpora(samples, work / "corpora").items():
        for length in (512, 2048) if kind != "dpo" else ():
            conversion = documents(document_end_id(tokenizer)) if kind == "pretrain" else conversations(length)
            store = tokenized(conversion, files, tokenizer, work / "cache")
            strategies: dict[str, Callable] = {"best_fit": pack_rows}
            if kind == "pretrain":
                strategies["blocks"] = pack_blocks
            else:
                strategies["one per row"] = partial(pack_rows, pack=False)
            for strategy, pack in strategies.items():
                started = time.perf_counter()
                rows = pack(store, length, 42)
                seconds = time.perf_counter() - started
                counts = {key: store.counts[key] for key in ("cut", "dropped") if key in store.counts}
                report = vars(filling(rows, length)) | counts
                report["fill"] = round(report["fill"], 4)
                result.append({"corpus": name, "kind": kind, "row_length": length, "strategy": strategy,
                               "documents": len(store), **report, "seconds": round(seconds, 3)})  # fmt: skip
                say(f"fill: {result[-1]}")
    return result


# --- steps --------------------------------------------------------------------------------------------------


class Model:
    """The `tiny` preset and its training step as train_*.py set them up, timed on real tokens."""

    def __init__(self, vocab_size: int):
        prepare(0)
        dtype = compute_dtype("auto")
        self.model = build_model(preset_config("tiny", vocab_size=vocab_size), None, dtype).train()
        add_fused_lm_head(self.model)  # TRL's, for pairs
        plain = partial(torch.optim.AdamW, fused=True)
        self.optimizer = (plain if dtype == torch.float32 else MasterAdamW)(self.model.parameters(), lr=1e-3)

    def loss(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.model(**batch, use_cache=False).loss

    def padded_loss(self, **batch: torch.Tensor) -> torch.Tensor:
        return -self.model(**batch, use_cache=False, fused_lm_head=True).log_probs.mean()

    def packed_loss(self, **batch: torch.Tensor) -> torch.Tensor:
        return -unpadded(self.model)(**batch, use_cache=False, fused_lm_head=True).log_probs.mean()

    def time(self, batches: Iterable[tuple[dict[str, torch.Tensor], int]], loss: Callable) -> dict[str, Any]:
        """(batch, real tokens) pairs → tokens per second and the share of tokens that are real in a batch."""
        seconds, real, computed = 0.0, 0, 0
        for number, (batch, tokens) in enumerate(batches):
            started = time.perf_counter()
            loss(**batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if number:  # the first step allocates
                seconds += time.perf_counter() - started
                real += tokens
                computed += batch["input_ids"].numel()
        return {"real_tokens_per_second": round(real / seconds), "real_share": round(real / computed, 3)}


def row_batches(rows: Dataset, size: int, count: int) -> Iterable[tuple[dict[str, torch.Tensor], int]]:
    collate, order = PackedCollator(0), list(SeededOrder(len(rows), 0))
    for start in range(0, min(count * size, len(order) - size + 1), size):
        batch = rows.__getitems__(order[start : start + size])
        yield collate(batch), sum(len(row["input_ids"]) for row in batch)


def pair_batches(pairs: Dataset, order: Iterable[int], size: int) -> Iterable[tuple[dict[str, torch.Tensor], int]]:
    """Chosen and rejected side by side, padded on the right with an attention mask, as TRL does."""
    numbers = iter(order)
    while len(chunk := list(islice(numbers, size))) == size:
        rows = pairs.select(chunk)
        sides = [row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids") for row in rows]
        longest = max(map(len, sides))
        ids = torch.tensor([side + [0] * (longest - len(side)) for side in sides])
        mask = torch.tensor([[1] * len(side) + [0] * (longest - len(side)) for side in sides])
        yield {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}, int(mask.sum())


def measure_steps(samples: Path, work: Path, rounds: int) -> dict[str, Any]:
    found = corpora(samples, work / "corpora")
    texts = [str(path) for name in ("gsm8k", "infinity_preference") for path in found[name][1]]
    with redirect_stdout(sys.stderr):
        train_tokenizer.main(["--mode", "train", "--vocab_size", "4000", "--data_path", *texts]
                             + ["--save_dir", str(work / "tokenizer")])  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    store = tokenized(conversations(512), found["gsm8k"][1], tokenizer, work / "cache")
    pairs = tokenized(preferences(1024), found["infinity_preference"][1], tokenizer, work / "cache").dataset()
    mean = float(np.mean(store.lengths))
    padded_size = round(1024 / mean)
    packed, padded = (pack_rows(store, 512, 0, pack) for pack in (True, False))
    lengths = pair_lengths(pairs)
    model = Model(len(tokenizer))
    at_random = partial(pair_batches, pairs, SeededOrder(len(pairs), 0), 8)
    grouped = partial(pair_batches, pairs, LengthGroupedOrder(lengths, 0, 8), 8)
    sides: dict[str, tuple[Callable[[], Iterable], Callable]] = {
        f"gsm8k padded, {padded_size} conversations": (lambda: row_batches(padded, padded_size, 25), model.loss),
        "gsm8k packed, 2 rows of 512": (lambda: row_batches(packed, 2, 25), model.loss),
        "pairs at random": (at_random, model.padded_loss),
        "pairs at random, packed": (at_random, model.packed_loss),
        "pairs grouped by length": (grouped, model.padded_loss),
        "pairs grouped by length, packed": (grouped, model.packed_loss),
    }
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (batches, loss) in sides.items():
            results[name].append(model.time(batches(), loss))
            say(f"step: {name}: {results[name][-1]}")
    speed = {name: [each["real_tokens_per_second"] for each in values] for name, values in results.items()}
    padded_name, packed_name, random_name, random_packed, grouped_name, grouped_packed = sides
    ratio = {
        "packed / padded": (packed_name, padded_name),
        "pairs, packed / padded": (random_packed, random_name),
        "pairs, grouped / random": (grouped_name, random_name),
        "pairs, grouped and packed / grouped": (grouped_packed, grouped_name),
    }
    return {
        "mean_conversation": round(mean, 1),
        "real_tokens_per_second": speed,
        "real_share": {name: values[0]["real_share"] for name, values in results.items()},
        "ratio": {
            name: round(statistics.median(a / b for a, b in zip(speed[x], speed[y], strict=True)), 2)
            for name, (x, y) in ratio.items()
        },
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, help="directory of the sample datasets")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="times every side is measured (default 3)")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        side, num_proc, *paths = args.worker
        print(json.dumps(tokenise(side, int(num_proc), *map(Path, paths))))
        return
    if args.samples is None or not args.samples.is_dir():
        raise UserError(f"--samples {args.samples}: no such directory; name the one with the sample datasets")
    report: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        measures = {
            "tokenise": lambda: measure_tokenising(args.samples, work, args.rounds),
            "memory": lambda: measure_memory(args.samples, work),
            "fill": lambda: measure_fill(args.samples, work),
            "step": lambda: measure_steps(args.samples, work, args.rounds),
        }
        for part in args.parts:
            report[part] = measures[part]()
    text = json.dumps(report, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
