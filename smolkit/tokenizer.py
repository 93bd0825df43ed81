"""Tokenizers: training a byte-level BPE, opening somebody else's, comparing several.

Trained ones hold the 256 bytes as entries, so every text survives encoding and decoding. Ids: bytes, then
merges in the order learned, then control tokens. Before merging, text is cut into words by one of the patterns
that llama.cpp has built in (`tokenizer.ggml.pre` of a GGUF file), so every runtime cuts alike:

    name        numbers                 words
    qwen2       every digit alone       a word takes the space or sign before it; case-blind 's, 't, 're, ...
    llama-bpe   up to three digits      the same
    smollm      every digit alone       GPT-2's: a word takes the space before it
    gpt-2       whole numbers           the same

Single digits make a number look the same wherever it occurs. Chinese has no spaces, so a run of characters is one
word to all of them; `split_cjk` keeps the characters apart *while merges are learned*. A small vocabulary then
spends its entries on characters that recombine, not on a few frequent phrases, and since no merge joins two
characters, encoding needs no rule that llama.cpp would not know.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from smolkit.chat import SPECIAL_TOKENS, TOOL_TOKENS, add_chat_tokens, encode_text, encode_texts, save_tokenizer
from smolkit.doctor import PRETRAIN_SUFFIXES, expand_paths, read_texts
from smolkit.doctor.languages import language_of
from smolkit.errors import UserError
from smolkit.files import write_json

# Markers for source code, repositories and Jupyter notebooks in pretraining text (the StarCoder set, as
# SmolLM uses).
CODE_TOKENS = (
    "<repo_name> <reponame> <file_sep> <filename> <gh_stars> <issue_start> <issue_comment> <issue_closed> "
    "<jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> <jupyter_script> <empty_output>"
).split()

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
RECORD = "tokenizer_training.json"  # what made the directory, so that a repeated command can be recognised
# Told apart by what they do to this text: case, digits, other numbers, marks, line ends, Chinese, camel case.
_PROBE = "It's I'LL 12345 ３½Ⅷ x+=1;\r\n\r\n  你好，世界2024 nai\u0308ve\t\tHTTPServer 'tail' \n end  "
SAMPLES = {
    "English": "The old lighthouse keeper counted 27 ships before sunset, and wrote every name in his book.",
    "Chinese": "老灯塔管理员在日落之前数了27艘船，并把每一艘船的名字都写进了他的本子里。",
}


# --- how text is cut before merging -------------------------------------------------------------------------


def _split_by(*patterns: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    def build() -> pre_tokenizers.PreTokenizer:
        words = pre_tokenizers.Split(Regex("|".join(patterns)), behavior="isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([words, to_bytes])

    return build


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


PRE_TOKENIZERS = {
    "qwen2": _split_by(_LETTERS, r"\p{N}", _REST),
    "llama-bpe": _split_by(_LETTERS, r"\p{N}{1,3}", _REST),
    "smollm": _smollm,
    "gpt-2": _gpt2,
}


def llama_cpp_name(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """`tokenizer.ggml.pre` for a GGUF file of this tokenizer, or None where llama.cpp's patterns known here differ.

    Decided by what the pre-tokenizer does to a probing text, so it also recognises foreign tokenizers.
    """
    cut = tokenizer.backend_tokenizer.pre_tokenizer
    if cut is None:
        return None
    pieces = cut.pre_tokenize_str(_PROBE)
    matches = (name for name, build in PRE_TOKENIZERS.items() if build().pre_tokenize_str(_PROBE) == pieces)
    return next(matches, None)


# --- making and opening -------------------------------------------------------------------------------------


def require_room(vocab_size: int, extra: Iterable[str]) -> None:
    """`UserError` when the bytes and control words alone need more entries."""
    smallest = 256 + len({*SPECIAL_TOKENS, *TOOL_TOKENS, *extra})
    if vocab_size < smallest:
        raise UserError(
            f"--vocab_size {vocab_size} is too small: 256 bytes and {smallest - 256} control words "
            f"need {smallest} (--extra_special_tokens without a value drops the optional ones)"
        )


def build(settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that train_tokenizer.py's settings ask for, ready for chat."""
    extra = settings["extra_special_tokens"]
    if settings["mode"] == "load":
        tokenizer = load_pretrained(settings["qwen_model"])
    else:
        texts = texts_of_files([Path(path) for path in settings["data"]], settings["max_documents"])
        tokenizer = train_bpe(texts, settings["vocab_size"], settings["pre_tokenizer"], settings["split_cjk"], extra)
    add_chat_tokens(tokenizer, extra)
    return tokenizer


def train_bpe(
    texts: Iterable[str], vocab_size: int, pre_tokenizer: str, split_cjk: bool, control: Iterable[str]
) -> PreTrainedTokenizerFast:
    """Byte-level BPE without normalisation, smaller than `vocab_size` by the `control` tokens to be added.

    `texts` are streamed; memory grows with the number of different words only. The same texts give the same
    tokenizer.
    """
    cut = PRE_TOKENIZERS[pre_tokenizer]()
    characters = pre_tokenizers.Split(Regex(r"\p{Han}"), behavior="isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([characters, cut]) if split_cjk else cut
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len({*SPECIAL_TOKENS, *TOOL_TOKENS, *control}),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = cut
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def texts_of_files(paths: Sequence[Path], max_documents: int | None) -> Iterator[str]:
    """The texts of all rows. A cap takes rows of each file in turn, so that every file has its part in it."""
    if max_documents is None:
        return chain.from_iterable(read_texts(paths))
    return chain.from_iterable(islice(_in_turn([read_texts(path) for path in paths]), max_documents))


def _in_turn(iterators: list[Iterator[list[str]]]) -> Iterator[list[str]]:
    while iterators:
        for iterator in list(iterators):
            try:
                yield next(iterator)
            except StopIteration:
                iterators.remove(iterator)


def load_pretrained(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer from the hub or a directory; `UserError` when there is none, or none that is fast."""
    from transformers import AutoTokenizer  # imports torch: seconds that training a tokenizer can do without

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"no tokenizer at {name}: {reason} — give a directory with its files") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        kind = type(tokenizer).__name__
        raise UserError(f"{name} is a {kind} without tokenizer.json — choose another tokenizer")
    return tokenizer


# --- the directory ------------------------------------------------------------------------------------------


def file_mark(path: Path) -> str:
    """Size and hash of the first MiB: enough to notice that a corpus was replaced, cheap on any size."""
    try:
        with open(path, "rb") as file:
            return f"{path.stat().st_size}-{hashlib.sha256(file.read(1 << 20)).hexdigest()[:16]}"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def source_mark(name: str) -> str | None:
    """The mark of a tokenizer directory's main file, so that a replaced one is noticed; None for a hub name."""
    files = (Path(name) / file for file in ("tokenizer.json", "vocab.json"))
    return next((file_mark(file) for file in files if file.is_file()), None)


def is_finished(directory: Path, settings: dict[str, Any]) -> bool:
    """Whether the very same settings have filled `directory` before; `UserError` if anything else has."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    record = directory / RECORD
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == settings:
        return True
    raise UserError(f"--save_dir {directory} is in use by something else — remove it or choose another directory")


def write_directory(
    directory: Path, settings: dict[str, Any], build: Callable[[], PreTrainedTokenizerFast]
) -> PreTrainedTokenizerFast:
    """Build a tokenizer and save it with its settings; the directory appears whole or not at all."""
    aside = directory.with_name(f".{directory.name}.{os.getpid()}.part")
    try:
        aside.mkdir(parents=True)
        tokenizer = build()
        save_tokenizer(tokenizer, aside)
        write_json(aside / RECORD, settings)
        os.rename(aside, directory)
    except OSError as error:
        raise UserError(f"--save_dir {directory} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return tokenizer


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> np.ndarray | None:
    """UTF-8 bytes of text that each id stands for, (V,) int64; 0 for control tokens.

    The sum over the ids of a text is its length in bytes (after the tokenizer's own normalisation, where it has one:
    Qwen composes characters, NFC). None for a tokenizer whose tokens are not pieces of bytes or of text: there such a
    sum would be wrong.
    """
    vocabulary = tokenizer.get_vocab()
    decoder = str(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    size = np.zeros(max(vocabulary.values()) + 1, np.int64)
    added = tokenizer.added_tokens_decoder
    if "ByteLevel" in decoder:
        # Each character of a token is one byte.
        for token, i in vocabulary.items():
            size[i] = len(token)
    elif "ByteFallback" in decoder:
        # SentencePiece's: pieces of text with ▁ for a space, and <0x0A> for single bytes.
        for token, i in vocabulary.items():
            size[i] = 1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode())
    else:
        return None
    for i, entry in added.items():  # those that are not special are text, written as it is
        size[i] = 0 if entry.special else len(entry.content.encode())
    return size


def summary(tokenizer: PreTrainedTokenizerFast, wanted: int = 0) -> str:
    """A few lines for people: size, control tokens, and how long a token is in English and Chinese."""
    lines = [f"entries: {len(tokenizer):,} (ids 0 to {len(tokenizer) - 1:,})"]
    if len(tokenizer) < wanted:
        lines[0] += f", fewer than --vocab_size {wanted:,}: the data has no more pairs to merge"
    pad, eos = (tokenizer.pad_token, tokenizer.pad_token_id), (tokenizer.eos_token, tokenizer.eos_token_id)
    lines.append("pad {} = {}, eos {} = {}".format(*pad, *eos))
    lines.append(f"pre-tokenizer in llama.cpp: {llama_cpp_name(tokenizer) or 'unknown'}")
    for language, text in SAMPLES.items():
        ids = encode_text(tokenizer, text)
        pieces = "|".join(tokenizer.batch_decode([[i] for i in ids[:12]]))
        lines.append(f"{language}: {len(text.encode()) / len(ids):.2f} bytes per token, {pieces}|...")
    return "\n".join(lines)


# --- comparing ----------------------------------------------------------------------------------------------

_WORDS = {"English": re.compile(r"\w+(?:['’]\w+)*"), "Chinese": re.compile("[\u3400-\u9fff]|[A-Za-z0-9]+")}


@dataclass(frozen=True)
class Measured:
    """One tokenizer on the text of one language; a word of Chinese is a character. `speed` in MB/s."""

    tokenizer: str
    entries: int
    language: str
    bytes_per_token: float
    words_per_token: float
    speed: float


def by_language(texts: Iterable[str]) -> dict[str, list[str]]:
    """The texts' lines that are English or Chinese, each language's joined again per text; others are left out."""
    sorted_texts: dict[str, list[str]] = {language: [] for language in _WORDS}
    for text in texts:
        lines: dict[str, list[str]] = {language: [] for language in _WORDS}
        for line in text.splitlines(keepends=True):
            lines.get(language_of(line), []).append(line)
        for language, mine in lines.items():
            if mine:
                sorted_texts[language].append("".join(mine))
    return {language: found for language, found in sorted_texts.items() if found}


def compare(names: Sequence[str], texts: dict[str, list[str]]) -> list[Measured]:
    """Every tokenizer (hub name or directory) on the texts of every language, encoded as ordinary text."""
    results = []
    for name in names:
        tokenizer = load_pretrained(name)
        encode_text(tokenizer, "warm-up")
        for language, documents in texts.items():
            started = time.perf_counter()
            tokens = sum(map(len, encode_texts(tokenizer, documents)))
            seconds = time.perf_counter() - started
            size = sum(len(document.encode()) for document in documents)
            words = sum(len(_WORDS[language].findall(document)) for document in documents)
            figures = (size / tokens, words / tokens, size / 1e6 / seconds)
            results.append(Measured(name, len(tokenizer), language, *figures))
    return results


def comparison_table(results: Sequence[Measured]) -> str:
    """The measurements as aligned columns, the best of each language marked."""
    width = max(len("tokenizer"), *(len(result.tokenizer) for result in results))
    lines = [f"{'tokenizer':<{width}} {'entries':>8}  language  bytes/token  words/token    MB/s"]
    for language in dict.fromkeys(result.language for result in results):
        same = [result for result in results if result.language == language]
        best = max(result.bytes_per_token for result in same)
        for r in same:
            mark = "*" if r.bytes_per_token == best and len(same) > 1 else " "
            lines.append(
                f"{r.tokenizer:<{width}} {r.entries:>8,}  {r.language:<8}  {r.bytes_per_token:>10.2f}{mark} "
                f"{r.words_per_token:>12.3f} {r.speed:>7.1f}"
            )
    return "\n".join([*lines, "* fewest tokens; a word of Chinese is one character"])


def compare_files(names: Sequence[str], data_path: Sequence[str], max_documents: int | None) -> str:
    """The table for the rows of some files; `UserError` when they hold neither English nor Chinese lines."""
    texts = by_language(texts_of_files(expand_paths(data_path, PRETRAIN_SUFFIXES), max_documents))
    if not texts:
        raise UserError(f"{' '.join(data_path)}: no English or Chinese line — give other text")
    return comparison_table(compare(names, texts))
