"""Make the tokenizer: train a byte-level BPE on your text, or fit an existing one (Qwen, GPT-2, ...) for chat.

    python train_tokenizer.py --mode train --data_path data/pretrain --vocab_size 4000 --save_dir tokenizer
    python train_tokenizer.py --mode load --qwen_model Qwen/Qwen1.5-7B --save_dir tokenizer
    python train_tokenizer.py --mode compare --tokenizers tokenizer Qwen/Qwen2.5-0.5B --data_path mytext.txt

`--save_dir` becomes a directory that `AutoTokenizer.from_pretrained` loads, with the ChatML special tokens and
chat template of smolkit/chat.py, pad `<|endoftext|>` and eos `<|im_end|>`. Two choices matter for small
vocabularies (smolkit/tokenizer.py says why):

- Digits stay single tokens. With `--pre_tokenizer llama-bpe` (or `--no-split_digits`) up to three digits merge,
  with `gpt-2` whole numbers do. llama.cpp knows all four patterns by these names.
- Chinese characters are kept apart while merges are learned (`--split_cjk`, default below 16,000 entries).

The same data and flags give the same files, byte for byte. Running a finished command again changes nothing.

`--mode load` keeps every id and adds what is missing at the end; `--resize_model` gives a model the rows for it.
`--mode compare` prints bytes and words per token and the speed on your text, English and Chinese apart.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smolkit.chat import TOOL_TOKENS
from smolkit.doctor import PRETRAIN_SUFFIXES, expand_paths
from smolkit.doctor.checkup import glance
from smolkit.errors import UserError, run
from smolkit.tokenizer import (
    CODE_TOKENS,
    PRE_TOKENIZERS,
    build,
    compare_files,
    file_mark,
    is_finished,
    require_room,
    source_mark,
    summary,
    write_directory,
)

SPLIT_CJK_BELOW = 16_000
NEEDED = {
    "train": ["save_dir", "data_path", "vocab_size"],
    "load": ["save_dir", "qwen_model"],
    "compare": ["data_path", "tokenizers"],
}
OPTIONAL = {
    "train": ["max_documents", "pre_tokenizer", "split_digits", "split_cjk", "extra_special_tokens"],
    "load": ["extra_special_tokens", "resize_model", "resized_dir", "pad_vocab_to_multiple_of"],
    "compare": ["max_documents"],
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line to settings; contradictory ones are refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--mode", choices=list(NEEDED), required=True, help="train anew, load and fit, or compare")
    add("--save_dir", type=Path, help="train, load: directory to write; new, or of this command")
    add("--qwen_model", "--base_tokenizer", help="load: hub name or directory of any tokenizer, e.g. Qwen/Qwen1.5-7B")
    add("--data_path", nargs="+", help="train, compare: .jsonl/.txt/.parquet files, directories, globs; any row kind")
    add("--tokenizers", nargs="+", help="compare: hub names or directories")
    add("--vocab_size", type=int, help="train: entries in all, e.g. 4000 (tiny) or 49152 (SmolLM)")
    add("--max_documents", type=int, help="train, compare: read N rows, of each file in turn (default: all)")
    add("--pre_tokenizer", choices=list(PRE_TOKENIZERS), help="train: how words are cut, by llama.cpp's name (qwen2)")
    add("--split_digits", action=flag, help="train: every digit its own token (default); --no-...: llama-bpe")
    add("--split_cjk", action=flag, help=f"train: keep Chinese characters apart (default: below {SPLIT_CJK_BELOW})")
    add(
        "--extra_special_tokens",
        nargs="*",
        help="special tokens besides the chat ones; without a value none (default for load: none, for train: "
        f"{' '.join(CODE_TOKENS)})",
    )
    add("--resize_model", help="load: checkpoint whose embedding has to cover the new entries")
    add("--resized_dir", type=Path, help="load: where the resized checkpoint is written")
    text = "load, with --resize_model: round the resized vocabulary up to a multiple of this"
    add("--pad_vocab_to_multiple_of", type=int, help=text)
    arguments = parser.parse_args(argv)
    mode = arguments.mode
    known = ["mode", *NEEDED[mode], *OPTIONAL[mode]]
    for name, value in vars(arguments).items():
        if value is not None and name not in known:
            raise UserError(f"--{name} has no meaning with --mode {mode} — leave it out")
    for name in NEEDED[mode]:
        if getattr(arguments, name) is None:
            raise UserError(f"--mode {mode} needs --{name}")
    for token in arguments.extra_special_tokens or []:
        if not token.strip() or token in TOOL_TOKENS:
            raise UserError(f"--extra_special_tokens: {token!r} cannot be a special token")
    for name in ("max_documents", "pad_vocab_to_multiple_of"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if (arguments.resize_model is None) != (arguments.resized_dir is None):
        raise UserError("--resize_model and --resized_dir belong together — give both or none")
    if arguments.pad_vocab_to_multiple_of is not None and arguments.resize_model is None:
        value = arguments.pad_vocab_to_multiple_of
        raise UserError(f"--pad_vocab_to_multiple_of {value}: only --resize_model uses it — add that or leave this out")
    digits = arguments.split_digits
    if digits is not None and arguments.pre_tokenizer not in (None, "qwen2" if digits else "llama-bpe"):
        name = "split_digits" if digits else "no-split_digits"
        raise UserError(f"--pre_tokenizer {arguments.pre_tokenizer} decides about digits — leave --{name} out")
    return arguments


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that decides the result, defaults filled in, with a fingerprint of the data."""
    extra = arguments.extra_special_tokens
    if arguments.mode == "load":
        name = arguments.qwen_model
        return {"mode": "load", "qwen_model": name, "source": source_mark(name), "extra_special_tokens": extra or []}
    extra = list(dict.fromkeys(CODE_TOKENS if extra is None else extra))
    require_room(arguments.vocab_size, extra)
    paths = expand_paths(arguments.data_path, PRETRAIN_SUFFIXES)
    cjk = arguments.split_cjk
    return {
        "mode": "train",
        "data": {str(path): file_mark(path) for path in paths},
        "vocab_size": arguments.vocab_size,
        "max_documents": arguments.max_documents,
        "pre_tokenizer": arguments.pre_tokenizer or ("llama-bpe" if arguments.split_digits is False else "qwen2"),
        "split_cjk": arguments.vocab_size < SPLIT_CJK_BELOW if cjk is None else cjk,
        "extra_special_tokens": extra,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, build, save, and say what came out."""
    arguments = parse_arguments(argv)
    if arguments.mode == "compare":
        print(compare_files(arguments.tokenizers, arguments.data_path, arguments.max_documents))
        return
    settings, directory = settings_of(arguments), arguments.save_dir
    if is_finished(directory, settings):
        print(f"{directory} already holds this tokenizer; nothing to do")
    else:
        for warning in glance([Path(path) for path in settings.get("data", ())], mixed=True):
            print(f"warning: {warning}")
        started = time.perf_counter()
        tokenizer = write_directory(directory, settings, lambda: build(settings))
        print(f"saved {directory} after {time.perf_counter() - started:.1f} s")
        print(summary(tokenizer, settings.get("vocab_size", 0)))
    if arguments.resize_model:
        from smolkit.checkpoints import resize_vocabulary  # imports torch

        multiple = arguments.pad_vocab_to_multiple_of or 1
        print(resize_vocabulary(arguments.resize_model, directory, arguments.resized_dir, multiple))


if __name__ == "__main__":
    run(main)
