"""Evaluate a checkpoint: exam, tool calls, preferences, bits per byte; metrics.json and a printed table.

    python eval_model.py --model_path out/quickstart/sft --exam data/exam/exam.jsonl
    python eval_model.py --model_path out/quickstart/sft --adapter out/quickstart/lora \\
        --exam data/exam/exam.jsonl --kinds skill --output_dir out/quickstart/lora/eval
    python eval_model.py --model_path out/quickstart/dpo --exam data/exam/exam.jsonl --check_transformers \\
        --preferences data/dpo/validation/dpo_data.jsonl --text data/pretrain/validation/pretrain_data.jsonl

In the output directory: metrics.json (plain numbers, counts as `…_n`), answers.jsonl (greedy replies with
their ids), samples.jsonl (sampled replies). Exit code 0 whatever the numbers are.
"""

import argparse
import itertools
import json
import time
from dataclasses import asdict
from pathlib import Path

from smolkit import evaluation
from smolkit.checkpoints import load_tokenizer
from smolkit.doctor import read_dpo
from smolkit.doctor.checkup import glance
from smolkit.errors import UserError, run
from smolkit.files import atomic_writer, write_json
from smolkit.runtime import compute_dtype, default_device, prepare


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model_path",
        type=Path,
        required=True,
        help="checkpoint directory (Llama, Qwen2, Qwen3, Mixtral, Qwen3-MoE)",
    )
    add("--tokenizer_path", type=Path, help="tokenizer directory (default: the checkpoint's)")
    add("--adapter", type=Path, help="PEFT adapter directory, merged in memory")
    add(
        "--implementation",
        choices=["smol", "transformers"],
        default="smol",
        help="whose model code and generation (default: smol)",
    )
    add("--exam", type=Path, help="exam items (JSON Lines)")
    add("--kinds", nargs="+", help="only exam items of these kinds: qa, tool, refusal, skill")
    add("--preferences", type=Path, help="held-out preference pairs (JSON Lines)")
    add(
        "--text",
        type=Path,
        help="text to measure bits per byte on: .txt as one text, .jsonl and .parquet by record",
    )
    add("--max_items", type=int, help="at most this many exam items, pairs and text records")
    add("--output_dir", type=Path, help="default: MODEL_PATH/eval")
    add("--batch_size", type=int, default=128, help="sequences decoded together (default: 128)")
    add("--max_new_tokens", type=int, default=96, help="length limit of a reply (default: 96)")
    add(
        "--temperature",
        type=float,
        default=0.7,
        help="of the sampled replies to the pairs' prompts (default: 0.7)",
    )
    add("--seed", type=int, default=0, help="of the sampled replies (default: 0)")
    dtypes = ["fp32", "bf16", "fp16", "auto"]
    add("--dtype", choices=dtypes, default="fp32", help="default: fp32, which equals other implementations")
    add("--device", help="cpu, cuda, mps (default: the GPU if there is one)")
    add("--compare_with", type=Path, help="answers.jsonl of another run: share of identical greedy replies")
    add(
        "--check_transformers",
        action="store_true",
        help="same, against AutoModelForCausalLM and its generate, in fp32",
    )
    args = parser.parse_args(argv)
    if not (args.exam or args.preferences or args.text):
        raise UserError("nothing to evaluate: give --exam, --preferences or --text")
    if (args.compare_with or args.check_transformers or args.kinds) and not args.exam:
        raise UserError("--compare_with, --check_transformers and --kinds need --exam")
    if args.check_transformers and (args.dtype != "fp32" or args.implementation != "smol"):
        raise UserError(
            "--check_transformers compares in fp32 with --implementation smol: leave those at their defaults"
        )
    if args.temperature <= 0:
        raise UserError(f"--temperature {args.temperature}: sampled replies need more than 0")
    for name in ("batch_size", "max_new_tokens", "max_items"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    return args


def run_exam(args: argparse.Namespace, model, tokenizer, items: list[dict], output_dir: Path) -> dict:
    generate = evaluation.decoding_of(model)(model, tokenizer, args.max_new_tokens, args.batch_size)
    answers = evaluation.take_exam(items, tokenizer, generate)
    metrics = evaluation.exam_metrics(items, answers)
    if args.compare_with:
        metrics |= evaluation.same_answers(answers, evaluation.read_answers(args.compare_with))
    if args.check_transformers:
        place = (model.dtype, model.device)
        theirs = evaluation.load_model(args.model_path, tokenizer, "transformers", args.adapter, *place)
        generate = evaluation.transformers_generate(theirs, tokenizer, args.max_new_tokens, args.batch_size)
        others = evaluation.take_exam(items, tokenizer, generate)
        metrics |= evaluation.same_answers(answers, [(answer.id, answer.output_ids) for answer in others])
    write_rows(output_dir / "answers.jsonl", [asdict(answer) for answer in answers])
    return metrics


def run_preferences(args: argparse.Namespace, model, tokenizer, pairs: list[dict], output_dir: Path) -> dict:
    metrics = evaluation.preference_metrics(model, tokenizer, pairs)
    limits = (args.max_new_tokens, args.batch_size)
    generate = evaluation.decoding_of(model)(model, tokenizer, *limits, args.temperature, args.seed)
    quality, samples = evaluation.preferred_quality(tokenizer, pairs, generate)
    if samples:
        write_rows(output_dir / "samples.jsonl", samples)
    return metrics | quality


def write_rows(path: Path, rows: list[dict]) -> None:
    with atomic_writer(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def print_table(metrics: dict[str, float]) -> None:
    for name, value in metrics.items():
        if not name.endswith("_n"):
            count = metrics.get(f"{name}_n")
            shown = str(value) if isinstance(value, int) else f"{value:.4f}"
            print(f"{name:32} {shown:>12} {f'n={count}' if count is not None else ''}".rstrip())


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    prepare(args.seed)
    started = time.monotonic()
    # Read everything first: a bad file should not be found out after minutes of work.
    items = evaluation.read_exam(args.exam, args.kinds, args.max_items) if args.exam else []
    pairs = list(itertools.islice(read_dpo(args.preferences), args.max_items)) if args.preferences else []
    texts = evaluation.read_texts(args.text, args.max_items) if args.text else []
    for warning in glance([path for path in (args.preferences, args.text) if path], mixed=True):
        print(f"warning: {warning}")
    tokenizer = load_tokenizer(args.tokenizer_path or args.model_path)
    place = (compute_dtype(args.dtype), args.device or default_device())
    model = evaluation.load_model(args.model_path, tokenizer, args.implementation, args.adapter, *place)
    output_dir = args.output_dir or args.model_path / "eval"
    metrics: dict[str, float] = {}
    if items:
        metrics |= run_exam(args, model, tokenizer, items, output_dir)
    if pairs:
        metrics |= run_preferences(args, model, tokenizer, pairs, output_dir)
    if texts:
        metrics |= evaluation.text_metrics(model, tokenizer, texts)
    metrics["seconds"] = round(time.monotonic() - started, 1)
    write_json(output_dir / "metrics.json", metrics)
    print_table(metrics)
    print(f"→ {output_dir / 'metrics.json'}")


if __name__ == "__main__":
    run(main)
