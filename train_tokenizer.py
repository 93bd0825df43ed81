"""Make the tokenizer: train a byte-level BPE on your text, or fit an existing one (Qwen) for chat.

    python train_tokenizer.py --mode train --data_path data/pretrain --vocab_size 4000 --save_dir tokenizer
    python train_tokenizer.py --mode load --qwen_model Qwen/Qwen1.5-7B --save_dir tokenizer

Either way `--save_dir` is a directory that `AutoTokenizer.from_pretrained` loads, with the ChatML special
tokens and chat template of smolkit/chat.py, pad `<|endoftext|>` and eos `<|im_end|>`.

Training: the 256 bytes are entries, so every text survives encoding and decoding. Ids: bytes, then merges in
the order learned, then control tokens. Text is cut by Qwen2's pattern before merging, which keeps words,
digits and punctuation apart; llama.cpp knows it as `qwen2`. Two choices matter for small vocabularies:

- Digits stay single tokens (`--split_digits`), so a number is written the same way wherever it occurs. With
  `--no-split_digits` up to three digits merge, by Llama 3's pattern (`llama-bpe` in llama.cpp).
- Chinese characters are kept apart while merges are learned (`--split_cjk`, default below 16,000 entries), so
  a small vocabulary spends its entries on characters that recombine, not on a few frequent phrases. No merge
  then joins two characters, so encoding needs no extra rule and other programs read the files unchanged.

The same data and flags give the same files, byte for byte. Running a finished command again changes nothing.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from smolkit.chat import SPECIAL_TOKENS, TOOL_TOKENS, add_chat_tokens, encode_text, save_tokenizer
from smolkit.doctor import PRETRAIN_SUFFIXES, expand_paths, read_texts
from smolkit.errors import UserError, run
from smolkit.files import write_json

# Markers for source code, repositories and Jupyter notebooks in pretraining text (the StarCoder set, as
# SmolLM uses).
CODE_TOKENS = (
    "<repo_name> <reponame> <file_sep> <filename> <gh_stars> <issue_start> <issue_comment> <issue_closed> "
    "<jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> <jupyter_script> <empty_output>"
).split()

LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ONE_DIGIT, UP_TO_THREE_DIGITS = r"\p{N}", r"\p{N}{1,3}"
SPLIT_CJK_BELOW = 16_000
RECORD = "tokenizer_training.json"  # what made the directory, so that a repeated command can be recognised
SAMPLES = {
    "English": "The old lighthouse keeper counted 27 ships before sunset, and wrote every name in his book.",
    "Chinese": "老灯塔管理员在日落之前数了27艘船，并把每一艘船的名字都写进了他的本子里。",
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line to settings; contradictory ones are refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = argparse.BooleanOptionalAction
    parser.add_argument(
        "--mode", choices=("train", "load"), required=True, help="train anew, or load and fit"
    )
    parser.add_argument(
        "--save_dir", type=Path, required=True, help="directory to write; new, or of this command"
    )
    parser.add_argument(
        "--qwen_model", help="load: hub name or directory (Qwen or another), e.g. Qwen/Qwen1.5-7B"
    )
    parser.add_argument(
        "--data_path", nargs="+", help="train: .jsonl/.txt/.parquet files, directories or globs; any row kind"
    )
    parser.add_argument(
        "--vocab_size", type=int, help="train: entries in all, e.g. 4000 (tiny) or 49152 (SmolLM)"
    )
    parser.add_argument("--max_documents", type=int, help="train: read only the first N rows (default: all)")
    parser.add_argument("--split_digits", action=flag, help="train: every digit its own token (default: yes)")
    parser.add_argument(
        "--split_cjk",
        action=flag,
        help=f"train: no merge across Chinese characters (default: below {SPLIT_CJK_BELOW} entries)",
    )
    parser.add_argument(
        "--extra_special_tokens",
        nargs="*",
        help="special tokens besides the chat ones; without a value none (default for load: none, for train: "
        f"{' '.join(CODE_TOKENS)})",
    )
    arguments = parser.parse_args(argv)
    training = ("data_path", "vocab_size", "max_documents", "split_digits", "split_cjk")
    foreign, needed = (
        (("qwen_model",), training[:2]) if arguments.mode == "train" else (training, ("qwen_model",))
    )
    for name in foreign:
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} has no meaning with --mode {arguments.mode} — leave it out")
    for name in needed:
        if getattr(arguments, name) is None:
            raise UserError(f"--mode {arguments.mode} needs --{name}")
    for token in arguments.extra_special_tokens or []:
        if not token.strip() or token in TOOL_TOKENS:
            raise UserError(f"--extra_special_tokens: {token!r} cannot be a special token")
    return arguments


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that decides the result, defaults filled in, with a fingerprint of the data."""
    extra = arguments.extra_special_tokens
    if arguments.mode == "load":
        return {"mode": "load", "qwen_model": arguments.qwen_model, "extra_special_tokens": extra or []}
    extra = list(dict.fromkeys(CODE_TOKENS if extra is None else extra))
    smallest = 256 + len({*SPECIAL_TOKENS, *TOOL_TOKENS, *extra})
    if arguments.vocab_size < smallest:
        raise UserError(
            f"--vocab_size {arguments.vocab_size} is too small: 256 bytes and {smallest - 256} control words "
            f"need {smallest} (--extra_special_tokens without a value drops the optional ones)"
        )
    if arguments.max_documents is not None and arguments.max_documents < 1:
        raise UserError(f"--max_documents must be at least 1, got {arguments.max_documents}")
    paths = expand_paths(arguments.data_path, PRETRAIN_SUFFIXES)
    cjk = arguments.split_cjk
    return {
        "mode": "train",
        "data": {str(path): _fingerprint(path) for path in paths},
        "vocab_size": arguments.vocab_size,
        "max_documents": arguments.max_documents,
        "split_digits": arguments.split_digits is not False,
        "split_cjk": arguments.vocab_size < SPLIT_CJK_BELOW if cjk is None else cjk,
        "extra_special_tokens": extra,
    }


def _fingerprint(path: Path) -> str:
    """Size and hash of the first MiB: enough to notice that a corpus was replaced, cheap on any size."""
    try:
        with open(path, "rb") as file:
            return f"{path.stat().st_size}-{hashlib.sha256(file.read(1 << 20)).hexdigest()[:16]}"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def train(settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE without normalisation, smaller than `vocab_size` by the control tokens to come."""
    digits = ONE_DIGIT if settings["split_digits"] else UP_TO_THREE_DIGITS
    words = pre_tokenizers.Split(Regex(f"{LETTERS}|{digits}|{REST}"), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters = pre_tokenizers.Split(Regex(r"\p{Han}"), behavior="isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [characters] * settings["split_cjk"] + [words, to_bytes]
    )
    control = {*SPECIAL_TOKENS, *TOOL_TOKENS, *settings["extra_special_tokens"]}
    trainer = trainers.BpeTrainer(
        vocab_size=settings["vocab_size"] - len(control),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    rows = islice(read_texts(list(settings["data"])), settings["max_documents"])
    tokenizer.train_from_iterator(chain.from_iterable(rows), trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def load(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer from the hub or a directory."""
    from transformers import AutoTokenizer  # imports torch: seconds that training a tokenizer can do without

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no tokenizer at {name}: {reason} — give a directory with its files") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{name} is a {type(tokenizer).__name__} without tokenizer.json — choose another tokenizer"
        )
    return tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, build, save, and say what came out."""
    arguments = parse_arguments(argv)
    settings = settings_of(arguments)
    directory = arguments.save_dir
    if _finished(directory, settings):
        print(f"{directory} already holds this tokenizer; nothing to do")
        return
    aside = directory.with_name(f".{directory.name}.{os.getpid()}.part")
    try:
        aside.mkdir(parents=True)
        started = time.perf_counter()
        tokenizer = train(settings) if arguments.mode == "train" else load(arguments.qwen_model)
        add_chat_tokens(tokenizer, settings["extra_special_tokens"])
        save_tokenizer(tokenizer, aside)
        write_json(aside / RECORD, settings)
        os.rename(aside, directory)
    except OSError as error:
        raise UserError(f"--save_dir {directory} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"saved {directory} after {time.perf_counter() - started:.1f} s")
    print(summary(tokenizer, settings))


def _finished(directory: Path, settings: dict[str, Any]) -> bool:
    """Whether the very same command has filled `directory` before; `UserError` if anything else has."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    record = directory / RECORD
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == settings:
        return True
    raise UserError(
        f"--save_dir {directory} is in use by something else — remove it or choose another directory"
    )


def summary(tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any]) -> str:
    """A few lines for people: size, control tokens, and how long a token is in English and Chinese."""
    lines = [f"entries: {len(tokenizer):,} (ids 0 to {len(tokenizer) - 1:,})"]
    if len(tokenizer) < settings.get("vocab_size", 0):
        lines[0] += (
            f", fewer than --vocab_size {settings['vocab_size']:,}: the data has no more pairs to merge"
        )
    pad, eos = (tokenizer.pad_token, tokenizer.pad_token_id), (tokenizer.eos_token, tokenizer.eos_token_id)
    lines.append("pad {} = {}, eos {} = {}".format(*pad, *eos))
    for language, text in SAMPLES.items():
        ids = encode_text(tokenizer, text)
        pieces = [tokenizer.decode([i]) for i in ids[:12]]
        lines.append(
            f"{language}: {len(text.encode()) / len(ids):.2f} bytes per token, {'|'.join(pieces)}|..."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
