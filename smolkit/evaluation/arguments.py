"""The command line of eval_model.py: what there is to measure, and what goes together."""

import argparse
import os
from pathlib import Path

from smolkit.errors import UserError
from smolkit.evaluation.results import RESERVED, read_limits
from smolkit.evaluation.subjects import BATCH_SIZE

MEASUREMENTS = ("exam", "preferences", "text", "multiple_choice", "generation", "lm_eval")
NEED_LOG_PROBS = ("preferences", "text", "multiple_choice")
# Settings and who reads them: without one of these a setting would be taken and ignored.
READERS = {
    "num_fewshot": ("lm_eval",),
    "lm_eval_include_path": ("lm_eval",),
    "chat": ("multiple_choice", "lm_eval"),
    "context": ("text",),
    "temperature": ("preferences",),
    "max_new_tokens": ("exam", "generation", "preferences"),
    "model": ("endpoint",),
    "concurrency": ("endpoint",),
    "api_key": ("endpoint",),
}


def parser(description: str | None) -> argparse.ArgumentParser:
    """All flags."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_subject(made.add_argument_group("who is asked"))
    _add_measurements(made.add_argument_group("what is measured (at least one)"))
    _add_settings(made.add_argument_group("how"))
    _add_uses(made.add_argument_group("what the figures are for"))
    return made


def _add_subject(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model_path", type=Path, help="checkpoint directory (Llama, Qwen2, Qwen3, Mixtral, Qwen3-MoE)")
    add("--adapter", type=Path, help="PEFT adapter directory, merged in memory")
    implementations = ["smol", "transformers"]
    help_text = "whose model code and generation (default: smol)"
    add("--implementation", choices=implementations, default="smol", help=help_text)
    dtypes = ["fp32", "bf16", "fp16", "auto"]
    add("--dtype", choices=dtypes, default="fp32", help="default: fp32, which equals other implementations")
    add("--device", help="cpu, cuda, cuda:1, mps, …; default: the GPU if there is one")
    add("--endpoint", help="an OpenAI-compatible server instead, such as http://127.0.0.1:8000/v1")
    key = os.environ.get("SMOLLM_API_KEY", "none")
    add("--api_key", default=key, help="key for --endpoint (environment variable SMOLLM_API_KEY)")
    add("--model", help="model name for --endpoint (default: the server's first)")
    add("--concurrency", type=int, default=8, help="requests to --endpoint at a time (default: 8)")
    help_text = "tokenizer directory (default: the checkpoint's); for --endpoint that of its model"
    add("--tokenizer_path", type=Path, help=help_text)


def _add_measurements(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--exam", type=Path, help="exam items (JSON Lines): exact replies, tool calls, refusals, endings")
    add("--kinds", nargs="+", help="only exam items of these kinds: qa, tool, refusal, skill")
    add("--preferences", type=Path, help="held-out preference pairs (JSON Lines)")
    add("--text", type=Path, help="bits per byte and perplexity: .txt as one text, .jsonl and .parquet by record")
    help_text = "files of {question, choices, answer} (JSON Lines): FILE_acc and FILE_acc_norm"
    add("--multiple_choice", type=Path, nargs="+", default=[], metavar="FILE", help=help_text)
    help_text = "files of {prompt or messages, answer, match: exact|contains|regex|number} (JSON Lines)"
    add("--generation", type=Path, nargs="+", default=[], metavar="FILE", help=help_text)
    add("--lm_eval", help="tasks of lm-evaluation-harness, such as hellaswag,arc_easy,gsm8k")
    add("--lm_eval_include_path", type=Path, metavar="DIR", help="directory of your own harness tasks (YAML)")
    add("--num_fewshot", type=int, help="examples before each harness question (default: the task's)")
    help_text = "ask multiple choice and harness tasks as conversations"
    add("--chat", action="store_true", help=help_text)


def _add_settings(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    help_text = "at most this many items of each measurement (a .txt is one)"
    add("--max_items", "--limit", type=int, dest="max_items", metavar="N", help=help_text)
    add("--output_dir", type=Path, help="default: MODEL_PATH/eval, with --adapter ADAPTER/eval")
    help_text = f"sequences decoded together (default: {BATCH_SIZE}; of --lm_eval, what 1 GiB of logits allows)"
    add("--batch_size", type=int, help=help_text)
    add("--max_new_tokens", type=int, default=96, help="length limit of a reply (default: 96)")
    add("--context", type=int, help="tokens of a window of --text (default: the model's context)")
    help_text = "of the sampled replies to the pairs' prompts (default: 0.7)"
    add("--temperature", type=float, default=0.7, help=help_text)
    add("--seed", type=int, default=0, help="of the sampled replies (default: 0)")


def _add_uses(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--compare_with", type=Path, help="answers.jsonl of another run: share of identical greedy replies")
    help_text = "same, against AutoModelForCausalLM and its generate, in fp32"
    add("--check_transformers", action="store_true", help=help_text)
    limits = "exit code 1 when a figure is {} its limit, such as {}; shares in percent"
    add("--fail_below", nargs="+", default=[], metavar="NAME=LIMIT", help=limits.format("below", "qa_en=90"))
    add("--fail_above", nargs="+", default=[], metavar="NAME=LIMIT", help=limits.format("above", "perplexity=20"))
    help_text = "no evaluation: print finished ones side by side, with the significance against the first"
    add("--compare", type=Path, nargs="+", metavar="DIR", help=help_text)


def check(args: argparse.Namespace) -> None:
    """UserError for what does not go together, before anything is read; limits become numbers."""
    given = _given(args)
    if args.compare:
        others = [name for name in given if name != "compare"]
        if len(args.compare) < 2 or others:
            found = f", not --{others[0]}" if others else ""
            raise UserError(f"--compare A B ... takes two or more evaluated directories and nothing else{found}")
        return
    asked = [name for name in MEASUREMENTS if getattr(args, name)]
    if not asked:
        raise UserError(f"nothing to evaluate: give one of {', '.join(f'--{name}' for name in MEASUREMENTS)}")
    _check_names(args)
    if bool(args.model_path) == bool(args.endpoint):
        raise UserError("give either --model_path DIR or --endpoint URL")
    if args.endpoint:
        _check_endpoint(args, asked)
    if (args.compare_with or args.check_transformers or args.kinds) and not args.exam:
        raise UserError("--compare_with, --check_transformers and --kinds need --exam")
    if args.check_transformers and (args.dtype != "fp32" or args.implementation != "smol"):
        raise UserError(
            "--check_transformers compares in fp32 with --implementation smol: leave those at their defaults"
        )
    if args.temperature <= 0:
        raise UserError(f"--temperature {args.temperature}: sampled replies need more than 0")
    for name in ("batch_size", "max_new_tokens", "max_items", "concurrency"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.context is not None and args.context < 2:
        raise UserError(f"--context {args.context}: a window needs at least 2 tokens")
    _check_readers(args, given)
    if args.output_dir and (taken := [path for path in (args.output_dir, *args.output_dir.parents) if path.is_file()]):
        raise UserError(f"--output_dir {args.output_dir}: {taken[0]} is a file: name a directory")
    args.fail_below = read_limits(args.fail_below, "--fail_below")
    args.fail_above = read_limits(args.fail_above, "--fail_above")


def _given(args: argparse.Namespace) -> list[str]:
    """The options that differ from their defaults."""
    unset = vars(parser(None).parse_args([]))
    return [name for name, value in vars(args).items() if value != unset[name]]


def _check_readers(args: argparse.Namespace, given: list[str]) -> None:
    """UserError for the first setting that nothing of what is asked would read."""
    for name in given:
        readers = READERS.get(name)
        if readers and not any(getattr(args, reader) for reader in readers):
            wanted = " or ".join(f"--{reader}" for reader in readers)
            raise UserError(f"--{name} is for {wanted}, which is not given: add it or leave --{name} out")


def _check_names(args: argparse.Namespace) -> None:
    """Figures are called like their files: UserError for two of one name, and for a name that is taken."""
    for flag, paths in (("--multiple_choice", args.multiple_choice), ("--generation", args.generation)):
        seen: set[str] = set()
        for path in paths:
            taken = flag == "--generation" and path.stem in (*RESERVED, "seconds")
            if taken or path.stem in seen:
                owner = "metrics.json has that name for something else" if taken else "another file has that name"
                raise UserError(f"{flag} {path}: its figures would be called {path.stem!r}, but {owner}; rename it")
            seen.add(path.stem)


def _check_endpoint(args: argparse.Namespace, asked: list[str]) -> None:
    local = [name for name in ("adapter", "device", "batch_size", "check_transformers") if getattr(args, name)]
    if local or args.implementation != "smol" or args.dtype != "fp32":
        wrong = local or ["implementation, --dtype"]
        raise UserError(f"--{wrong[0]} is for --model_path: a server decides that itself")
    if args.output_dir is None:
        raise UserError("--endpoint needs --output_dir DIR for the results")
    needing = [name for name in asked if name in NEED_LOG_PROBS]
    if needing and args.tokenizer_path is None:
        raise UserError(f"--{needing[0]} over an endpoint needs the model's tokenizer: give --tokenizer_path DIR")
