"""Evaluate a checkpoint or a server: figures with confidence intervals, in metrics.json and as a table.

    python eval_model.py --model_path out/quickstart/sft --exam out/quickstart/data/exam/exam.jsonl
    python eval_model.py --model_path out/quickstart/dpo --exam out/quickstart/data/exam/exam.jsonl \\
        --preferences out/quickstart/data/dpo/validation/dpo_data.jsonl --check_transformers \\
        --text out/quickstart/data/pretrain/validation/pretrain_data.jsonl
    python eval_model.py --endpoint http://127.0.0.1:8000/v1 --generation tasks.jsonl --output_dir out/eval
    python eval_model.py --model_path DIR --lm_eval hellaswag,arc_easy --limit 100 --fail_below hellaswag_acc_norm=30
    python eval_model.py --compare out/quickstart/sft out/quickstart/dpo

In the output directory (default: `eval` in the checkpoint's, or in the adapter's): metrics.json, the same as
metrics.md, items.jsonl (what each item contributed; --compare reads it), and the replies (answers.jsonl, replies.jsonl,
samples.jsonl); an earlier evaluation there is replaced. One in a model's own `eval` directory also goes into its model
card. Exit code 0 whatever the figures are, unless --fail_below or --fail_above says otherwise.
"""

import argparse
import itertools
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from smolkit.checkpoints import load_tokenizer
from smolkit.doctor import read_dpo
from smolkit.doctor.checkup import glance
from smolkit.errors import run
from smolkit.evaluation import exam, generation, harness, lengths, likelihoods
from smolkit.evaluation.arguments import MEASUREMENTS, check, parser
from smolkit.evaluation.comparison import comparison_table, read_run
from smolkit.evaluation.endpoint import ServedModel
from smolkit.evaluation.records import Record, read_records
from smolkit.evaluation.results import Results, card_beside, check_limits, evaluation_table, update_card, write_rows
from smolkit.evaluation.subjects import BATCH_SIZE, LocalModel, Subject, load_model
from smolkit.runtime import chosen_device, compute_dtype, prepare
from smolkit.shards import checksum

NOT_SETTINGS = ("api_key", "output_dir", "compare", "compare_with", "fail_below", "fail_above")


@dataclass(frozen=True)
class Inputs:
    """What the files hold; empty where nothing was given. Tasks by file, `others` the answers to compare with."""

    items: list[Record]
    others: list[exam.Given]
    pairs: list[Record]
    texts: list[str]
    choices: dict[Path, list[Record]]
    tasks: dict[Path, list[Record]]


def read(args: argparse.Namespace) -> Inputs:
    """Read everything first: a bad file should not be found out after minutes of work."""
    limit = args.max_items
    remedy = "the README has the format"
    items = exam.read_exam(args.exam, args.kinds, limit) if args.exam else []
    inputs = Inputs(
        items,
        exam.read_answers(args.compare_with, items) if args.compare_with else [],
        list(itertools.islice(read_dpo(args.preferences), limit)) if args.preferences else [],
        likelihoods.read_texts(args.text, limit) if args.text else [],
        {path: read_records(path, likelihoods.problem_of_choice, remedy)[:limit] for path in args.multiple_choice},
        {path: read_records(path, generation.problem_of_task, remedy)[:limit] for path in args.generation},
    )
    generation.check_hints(args.preferences, inputs.pairs)
    if args.lm_eval:
        harness.require_harness()
    for warning in glance([path for path in (args.preferences, args.text) if path], mixed=True):
        print(f"warning: {warning}")
    return inputs


def open_endpoint(args: argparse.Namespace) -> ServedModel:
    tokenizer = load_tokenizer(args.tokenizer_path) if args.tokenizer_path else None
    return ServedModel(args.endpoint, args.api_key, args.model, tokenizer, args.concurrency)


def open_subject(args: argparse.Namespace) -> Subject:
    """The server, or the loaded checkpoint."""
    if args.endpoint:
        return open_endpoint(args)
    tokenizer = load_tokenizer(args.tokenizer_path or args.model_path)
    device = chosen_device(args.device)
    place = (compute_dtype(args.dtype, device), device)
    model = load_model(args.model_path, tokenizer, args.implementation, args.adapter, *place)
    return LocalModel(model, tokenizer, args.batch_size or BATCH_SIZE)


def check_lengths(args: argparse.Namespace, inputs: Inputs, subject: Subject) -> None:
    """UserError for the first item that the context does not hold: an evaluation should not end in its middle."""
    lengths.check_window(args.context, subject)
    asked = [(args.exam, inputs.items, exam.prompt_of), (args.preferences, inputs.pairs, generation.sample_prompt)]
    for path, rows, prompt_of in (*asked, *((path, rows, generation.prompt_of) for path, rows in inputs.tasks.items())):
        lengths.check_replies(path, rows, prompt_of, subject, args.max_new_tokens)
    if (tokenizer := subject.tokenizer) is None:
        return
    lengths.check_rows(args.preferences, inputs.pairs, partial(likelihoods.pair_rows, tokenizer), subject)
    for path, rows in inputs.choices.items():
        lengths.check_rows(path, rows, partial(likelihoods.choice_rows, tokenizer, chat=args.chat), subject)


def run_exam(args: argparse.Namespace, subject: Subject, inputs: Inputs, output_dir: Path) -> Results:
    items = inputs.items
    answers = exam.take_exam(items, subject, args.max_new_tokens)
    results = exam.exam_results(items, answers)
    if args.compare_with:
        results.include(exam.same_answers(answers, inputs.others))
    if args.check_transformers:
        assert isinstance(subject, LocalModel), "a server has no directory to load"
        place = (subject.model.dtype, subject.model.device)
        theirs = load_model(args.model_path, subject.tokenizer, "transformers", args.adapter, *place)
        others = exam.take_exam(items, LocalModel(theirs, subject.tokenizer, subject.batch_size), args.max_new_tokens)
        results.include(exam.same_answers(answers, exam.as_given(others)))
    write_rows(output_dir / "answers.jsonl", [asdict(answer) for answer in answers])
    return results


def run_preferences(args: argparse.Namespace, subject: Subject, pairs: list[Record], output_dir: Path) -> Results:
    results = likelihoods.preference_results(subject, pairs)
    sampled, samples = generation.sample_results(pairs, subject, args.max_new_tokens, args.temperature, args.seed)
    results.include(sampled)
    if samples:
        write_rows(output_dir / "samples.jsonl", samples)
    return results


def run_harness(args: argparse.Namespace) -> Results:
    """The harness loads the checkpoint itself."""
    tasks = [task.strip() for task in args.lm_eval.split(",")]
    wanted = harness.HarnessTasks(tasks, args.max_items, args.lm_eval_include_path, args.num_fewshot, args.chat)
    if args.endpoint:
        backend = harness.backend_of_endpoint(open_endpoint(args), args.tokenizer_path, args.chat)
        return harness.harness_results(wanted, *backend, batch_size=1)
    tokenizer_path = args.tokenizer_path or args.model_path
    device = chosen_device(args.device)
    place = (str(compute_dtype(args.dtype, device)).removeprefix("torch."), str(device))
    backend = harness.backend_of_checkpoint(args.model_path, tokenizer_path, args.adapter, *place)
    batch_size = args.batch_size or harness.default_batch_size(args.model_path)
    return harness.harness_results(wanted, *backend, batch_size=batch_size)


def measure(args: argparse.Namespace, inputs: Inputs, subject: Subject, output_dir: Path) -> Results:
    """All measurements but the harness's, one after the other."""
    results = Results()

    def include(found: Results, path: Path) -> None:
        results.include(found, path.name, data_checksum(path))  # the name alone: cards are for others to read

    if inputs.items:
        include(run_exam(args, subject, inputs, output_dir), args.exam)
    if inputs.pairs:
        include(run_preferences(args, subject, inputs.pairs, output_dir), args.preferences)
    if inputs.texts:
        include(likelihoods.text_results(subject, inputs.texts, args.context), args.text)
    for path, rows in inputs.choices.items():
        include(likelihoods.choice_results(path.stem, rows, subject, args.chat), path)
    replies: list[Record] = []
    for path, rows in inputs.tasks.items():
        found, written = generation.task_results(path.stem, rows, subject, args.max_new_tokens)
        include(found, path)
        replies += written
    if replies:
        write_rows(output_dir / "replies.jsonl", replies)
    return results


def data_checksum(path: Path) -> str:
    """Of a file, or of all files under a directory."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return " ".join(checksum(file) for file in files)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked of whom, in JSON's types; of paths the names, because metrics.json goes to the hub."""
    given = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS and value not in (None, [])}
    settings: dict[str, Any] = {}
    for name, value in given.items():
        several = value if isinstance(value, list) else [value]
        values = [item.absolute().name if isinstance(item, Path) else item for item in several]
        settings[name] = values if isinstance(value, list) else values[0]
    packages = ("torch", "transformers", *(("lm_eval",) if args.lm_eval else ()))
    return settings | {"versions": {package: version(package) for package in packages}}


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__).parse_args(argv)
    check(args)
    if args.compare:
        print(comparison_table([read_run(path) for path in args.compare]))
        return
    prepare(args.seed, huge_pages=True)
    started = time.monotonic()
    inputs = read(args)
    output_dir = args.output_dir or (args.adapter or args.model_path) / "eval"
    results = Results()
    if any(getattr(args, name) for name in MEASUREMENTS if name != "lm_eval"):
        subject = open_subject(args)
        check_lengths(args, inputs, subject)
        results.include(measure(args, inputs, subject, output_dir))
    if args.lm_eval:
        results.include(run_harness(args), "lm-evaluation-harness")
    results.number("seconds", round(time.monotonic() - started, 1))
    metrics = results.write(output_dir, settings_of(args))
    print(evaluation_table(metrics))
    if card := card_beside(output_dir):
        update_card(card, metrics)
    print(f"→ {output_dir / 'metrics.json'}")
    failures = check_limits(metrics, args.fail_below, args.fail_above)
    if failures:
        print("\n".join(failures), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(main)
