"""What a row alone does not show: template markers in text, empty loss masks, leaks, lengths, languages.

A problem keeps a row out of training; a warning is worth a look. Leaks and markers are warnings: such rows
train, only not the way one thinks.
"""

import hashlib
import itertools
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from smolkit.chat import encode_text, render, render_fitting
from smolkit.doctor.languages import language_of
from smolkit.doctor.rows import (
    CHECKS,
    PRETRAIN_SUFFIXES,
    VALIDATION,
    Finding,
    Row,
    judge,
    judged_rows,
    kind_of,
    parse_line,
    raw_rows,
    validation_path,
)
from smolkit.errors import UserError

# Control words of the usual chat templates (ChatML, Llama 2 and 3, Gemma, DeepSeek). In our rows they are plain
# text, so they do not break anything, but a model that reads them learns to write them.
MARKERS = re.compile(
    r"<\|[A-Za-z_]{2,24}\|>|<｜[^｜\n]{2,30}｜>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|(?m:^### (?:Instruction|Response|Input|Human|Assistant):)"
)
SHORT_TEXT = 8  # characters; a shorter document teaches next to nothing
LONG_TEXT = {"pretrain": 1_000_000, "sft": 100_000, "dpo": 100_000, "exam": 100_000}
KEPT = 10_000  # findings of a severity kept per file: a file of the wrong kind has one in every row
GLANCE_WHOLE = 1 << 20  # bytes; files up to this size are read whole by a glance
GLANCE_FILES, GLANCE_ROWS = 16, 32

HeldOut = dict[tuple[str, bytes], tuple[Path, int]]  # ("text" or "prompt", its hash) -> where it is held out


@dataclass
class FileReport:
    """What was found in one file. `counts`: findings by severity and code; of each severity the first `KEPT` are
    kept. `characters` and `tokens` hold one number per good row."""

    path: Path
    kind: str | None = None
    rows: int = 0
    cut: int = 0  # conversations that are cut after an earlier reply to fit
    problems: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    characters: array = field(default_factory=lambda: array("q"))
    tokens: array = field(default_factory=lambda: array("q"))

    def add(self, findings: Iterable[Finding]) -> None:
        """Count findings, and keep them while there is room."""
        for finding in findings:
            self.counts[finding.severity, finding.code] += 1
            kept = self.problems if finding.severity == "problem" else self.warnings
            if len(kept) < KEPT:
                kept.append(finding)

    def number(self, severity: str) -> int:
        """How many problems or warnings there are."""
        return sum(count for (theirs, _), count in self.counts.items() if theirs == severity)


# --- one row ------------------------------------------------------------------------------------------------


class Examiner:
    """Looks at rows one by one.

    `kind`: what the rows are (None: decided by the first row of a file, or with `mixed` by each row).
    `tokenizer`: for lengths in tokens, loss masks and its own control words. `max_length`: tokens a stage would cut
    or drop at. `held_out`: prompts that must not be trained on.
    """

    def __init__(
        self,
        kind: str | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        max_length: int | None = None,
        held_out: HeldOut | None = None,
        mixed: bool = False,
    ) -> None:
        self.kind, self.tokenizer, self.max_length, self.mixed = kind, tokenizer, max_length, mixed
        self.held_out = held_out or {}
        specials = tokenizer.all_special_tokens if tokenizer is not None else []
        words = "|".join(re.escape(word) for word in sorted(specials, key=len, reverse=True))
        self.markers = re.compile(f"{MARKERS.pattern}|{words}") if words else MARKERS

    def look(self, number: int, row: Row | Finding, report: FileReport) -> list[Finding]:
        """Findings about one row as it was read; its figures are added to `report`."""
        path = report.path
        if isinstance(row, Finding):
            return [row]
        decided = self.kind or (None if self.mixed else report.kind)
        kind = report.kind = decided or kind_of(row)
        row = judge(path, number, row, CHECKS[kind])
        if isinstance(row, Finding):
            return [row]
        parts = texts_of(kind, row)
        size = sum(len(text) for _, text in parts)
        report.characters.append(size)
        report.languages[language_of(" ".join(text for _, text in parts))] += 1
        found = [*self._markers(parts), *_extreme(kind, size), *self._leak(path, kind, row)]
        findings = [Finding(path, number, code, text, "warning") for code, text in found]
        if self.tokenizer is not None:
            complaint = self._count_tokens(self.tokenizer, kind, row, report)
            if complaint:
                findings.append(Finding(path, number, "empty_mask", complaint))
        return findings

    def _markers(self, parts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        for where, text in parts:
            if self.markers is MARKERS and not ("<" in text or "[" in text or "### " in text):
                continue  # much faster than the pattern
            match = self.markers.search(text)
            if match:
                what = f"template marker {match[0]!r} in {where}"
                yield "marker", f"{what} — remove it: it is read as text, and models learn to write it"

    def _leak(self, path: Path, kind: str, row: Row) -> Iterator[tuple[str, str]]:
        place = self.held_out and self.held_out.get(prompt_key(kind, row))
        if place and not is_held_out(path, kind):
            yield "leak", f"this prompt is also held out in {place[0]}:{place[1]} — remove it from one of the two"

    def _count_tokens(
        self, tokenizer: PreTrainedTokenizerFast, kind: str, row: Row, report: FileReport
    ) -> str | None:
        """Add the row's length in tokens; returns why nothing of it would be trained, or None."""
        tools, limit = row.get("tools"), self.max_length
        if kind == "pretrain":
            report.tokens.append(len(encode_text(tokenizer, row["text"])) + 1)  # and the end of the document
            return None
        if kind == "exam":
            report.tokens.append(len(render(tokenizer, row["messages"], tools, True).input_ids))
            return None
        if kind == "dpo":
            sides = [render(tokenizer, row["prompt"] + row[side], tools) for side in ("chosen", "rejected")]
            length = max(len(side.input_ids) for side in sides)
            report.tokens.append(length)
            long = limit is not None and length - 1 > limit  # the last newline is not trained
            return f"{length} tokens, and pairs longer than {limit} are dropped — raise --max_length" if long else None
        whole = render(tokenizer, row["messages"], tools)
        length = len(whole.input_ids)
        report.tokens.append(length)
        if not any(whole.loss_mask):
            return "no token would be trained — use a tokenizer from train_tokenizer.py, which marks replies"
        if limit is not None and length > limit:
            if render_fitting(tokenizer, row["messages"], tools, limit) is None:
                return f"{length} tokens, and no reply ends within {limit} — raise --max_length or remove the row"
            report.cut += 1
        return None


def texts_of(kind: str, row: Row) -> list[tuple[str, str]]:
    """(where, text) of everything in a good row that a person or a model wrote."""
    if kind == "pretrain":
        return [("'text'", row["text"])]
    lists = ["messages"] if kind != "dpo" else ["prompt", "chosen", "rejected"]
    return [
        (f"'{name}' {number} ({message['role']})", message.get("content") or "")
        for name in lists
        for number, message in enumerate(row[name])
    ]


def _extreme(kind: str, size: int) -> Iterator[tuple[str, str]]:
    if size > LONG_TEXT[kind]:
        yield "length", f"{size:,} characters, more than {LONG_TEXT[kind]:,} — split it or look what it is"
    if kind == "pretrain" and size < SHORT_TEXT:
        yield "length", f"{size} characters, fewer than {SHORT_TEXT} — join it with its neighbours or remove it"


# --- prompts that are held out ------------------------------------------------------------------------------


def is_held_out(path: Path, kind: str | None) -> bool:
    """Whether the file is for evaluation only."""
    return VALIDATION in path.parts or kind == "exam"


def prompt_key(kind: str, row: Row) -> tuple[str, bytes]:
    """What two rows share when one leaks into the other, whatever the white space: the text of a document, or of
    the messages before the first reply, system message aside, be it a conversation's, a pair's or an exam item's."""
    if kind == "pretrain":
        texts = [row["text"]]
    else:
        texts = []
        for message in row["prompt" if kind == "dpo" else "messages"]:
            if message["role"] == "assistant":
                break
            if message["role"] != "system":
                texts.append(message["content"])
    digest = hashlib.blake2b(" ".join(" ".join(texts).split()).encode(), digest_size=8)
    return ("text" if kind == "pretrain" else "prompt"), digest.digest()


def held_out_files(paths: Iterable[Path], kind: str | None = None) -> list[Path]:
    """The files among `paths` that are held out, and the `validation/` twins of the others."""
    paths = list(paths)
    twins = [path if VALIDATION in path.parts else validation_path(path) for path in paths]
    exams = [path for path in paths if _first_kind(path, kind) == "exam"]
    return list(dict.fromkeys([twin for twin in twins if twin is not None] + exams))


def held_out_prompts(files: Iterable[Path], kind: str | None = None, limit: int | None = None) -> HeldOut:
    """Where each prompt of held-out files stands, of at most `limit` rows per file.

    Memory: about 200 bytes per held-out row, whatever the size of the training files.
    """
    index: HeldOut = {}
    for path in files:
        kind_here = _first_kind(path, kind)
        if kind_here is None:
            continue
        for number, row in itertools.islice(judged_rows(path, CHECKS[kind_here]), limit):
            if not isinstance(row, Finding):
                index.setdefault(prompt_key(kind_here, row), (path, number))
    return index


def _first_kind(path: Path, kind: str | None) -> str | None:
    rows = (row for _, row in readable_rows(path))
    first = next((row for row in rows if not isinstance(row, Finding)), None)
    return None if first is None else kind or kind_of(first)


# --- files --------------------------------------------------------------------------------------------------


def examine(path: Path, examiner: Examiner, sample: int | None = None) -> FileReport:
    """Look at every row of a file, or at about `sample` rows spread over it."""
    report = FileReport(path)
    if sample is not None:
        for findings in _sampled(report, examiner, sample):
            report.add(findings)
        return report
    for number, row in tqdm(readable_rows(path), path.name, unit=" rows", leave=False, disable=None):
        report.rows += 1
        report.add(examiner.look(number, row, report))
    if report.rows == 0:
        report.add([Finding(path, 1, "no_rows", "the file has no rows — remove it or fill it")])
    return report


def readable_rows(path: Path) -> Iterator[tuple[int, Row | Finding]]:
    """`raw_rows`, with damage that ends a file early as its last row."""
    number = 0
    try:
        for number, row in raw_rows(path):
            yield number, row
    except UserError as error:
        yield number + 1, Finding(path, number + 1, "unreadable", str(error).removeprefix(f"{path}: "))


def _sampled(report: FileReport, examiner: Examiner, count: int) -> Iterator[list[Finding]]:
    """Findings of the sampled rows. Big .jsonl files are entered at evenly spaced bytes, so the cost does not
    grow with them; of other big files the beginning is read."""
    path = report.path
    if path.suffix != ".jsonl" or path.stat().st_size <= GLANCE_WHOLE:
        whole = path.suffix == ".jsonl"
        for position, (number, row) in enumerate(readable_rows(path)):
            if not whole and position == count:
                return
            report.rows += 1
            yield examiner.look(number, row, report)
        return
    for offset, line in _spread_lines(path, count):
        parsed = parse_line(path, 2, line)
        if parsed is None:
            continue
        report.rows += 1
        findings = examiner.look(2, parsed, report)
        if findings:  # only now is the line number worth counting
            number = _line_number(path, offset)
            parsed = parse_line(path, number, line) or parsed  # a finding names the line
            findings = examiner.look(number, parsed, FileReport(path, report.kind))
        yield findings


def _spread_lines(path: Path, count: int) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) of `count` lines at evenly spaced places; the first line of the file is one of them."""
    step = path.stat().st_size / count
    with open(path, "rb") as file:
        end = 0
        for i in range(count):
            position = int(i * step)
            if position < end:  # still inside the line before
                continue
            file.seek(position)
            if position:
                file.readline()  # the rest of a line that began earlier
            offset = file.tell()
            line = file.readline()
            end = file.tell()
            if line:
                yield offset, line


def _line_number(path: Path, offset: int) -> int:
    number, left = 1, offset
    with open(path, "rb") as file:
        while left > 0 and (chunk := file.read(min(left, 1 << 22))):
            number += chunk.count(b"\n")
            left -= len(chunk)
    return number


def glance(files: Sequence[Path], held_out: Sequence[Path] = (), mixed: bool = False) -> list[str]:
    """A quick look before a stage starts: up to 32 rows of up to 16 files, spread over them (small files whole).

    `mixed`: rows of several kinds may share a file. Paths that are no data files (token ids on disk) are passed
    over. Returns one line per kind of warning. Raises the first problem, which the stage would otherwise meet after
    hours of reading.
    """
    files, held_out = ([path for path in paths if path.suffix in PRETRAIN_SUFFIXES] for paths in (files, held_out))
    step = max(1, len(files) // GLANCE_FILES)
    examiner = Examiner(held_out=held_out_prompts(held_out, limit=1000), mixed=mixed)
    warnings: dict[str, list[Finding]] = {}
    for path in files[::step][:GLANCE_FILES]:
        report = examine(path, examiner, GLANCE_ROWS)
        for problem in report.problems:
            raise problem
        for warning in report.warnings:
            warnings.setdefault(warning.code, []).append(warning)
    return [f"{same[0]}" + (f" ({len(same)} such rows seen)" if same[1:] else "") for same in warnings.values()]


# --- figures ------------------------------------------------------------------------------------------------


def quantiles(numbers: Sequence[int]) -> dict[str, int]:
    """Least, middle, 95 % and greatest of the numbers, and their sum."""
    if not numbers:
        return {}
    ordered = sorted(numbers)
    at = {"min": 0, "median": (len(ordered) - 1) // 2, "p95": int(0.95 * (len(ordered) - 1)), "max": -1}
    return {name: ordered[index] for name, index in at.items()} | {"total": sum(ordered)}


def histogram(numbers: Iterable[int]) -> list[tuple[int, int, int]]:
    """(first, last, how many) per power of two, empty ranges in between included."""
    counts = Counter(max(number, 1).bit_length() - 1 for number in numbers)
    if not counts:
        return []
    return [(2**bit, 2 ** (bit + 1) - 1, counts[bit]) for bit in range(min(counts), max(counts) + 1)]


def as_json(report: FileReport) -> dict[str, Any]:
    """The report for machines; `left_out`: findings beyond the first `KEPT` of a severity."""
    found = report.problems + report.warnings
    return {
        "path": str(report.path),
        "kind": report.kind,
        "rows": report.rows,
        "cut": report.cut,
        "languages": dict(report.languages.most_common()),
        "characters": quantiles(report.characters),
        "tokens": quantiles(report.tokens),
        "token_histogram": histogram(report.tokens),
        "counts": {f"{severity} {code}": count for (severity, code), count in report.counts.most_common()},
        "findings": [finding.as_json() for finding in sorted(found, key=lambda finding: finding.line)],
        "left_out": report.counts.total() - len(found),
    }
