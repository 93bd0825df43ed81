"""From the files of public datasets to `data/<part>/`: convert, split by a stable hash, count, write."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from smolkit.errors import UserError
from smolkit.files import atomic_writer, write_json
from smolkit.sources.base import Rejected, RowContext, Source
from smolkit.sources.files import DataFile, Unreadable, check_columns, read_rows, spread

SPREAD_FILES = (
    8  # a limited run takes its records from up to this many files, so that it covers languages and topics
)
BYTES_PER_TOKEN = (
    4  # the estimate behind `max_tokens`: English text under a large vocabulary, UTF-8 Chinese likewise
)


@dataclass
class Limits:
    """How much to take of each source: `records` of any part, estimated `tokens` of pretraining text."""

    records: int | None = None
    tokens: float | None = None


@dataclass
class Tally:
    """What became of the rows of one source."""

    read: int = 0
    written: int = 0
    text_bytes: int = 0
    dropped: Counter = field(default_factory=Counter)

    def as_dict(self) -> dict:
        return {"read": self.read, "written": self.written, "dropped": dict(self.dropped.most_common())}


def convert_files(
    source: Source, files: list[DataFile], limits: Limits, seed: int, tally: Tally
) -> Iterator[tuple[dict, bool]]:
    """(record, held_out) of every usable row; the rest is counted in `tally` by reason."""
    training = spread([f for f in files if not f.held_out], seed)
    per_file = limits.records and -(-limits.records // max(1, min(SPREAD_FILES, len(training))))
    for file in training + [f for f in files if f.held_out]:
        taken, checked = 0, False
        try:
            for index, row in read_rows(file):
                tally.read += 1
                if isinstance(row, Unreadable):
                    tally.dropped[str(row)] += 1
                    continue
                if not checked:
                    check_columns(source, file, row)
                    checked = True
                try:
                    record = source.convert(row, RowContext(file.path, index, seed))
                except Rejected as reason:
                    tally.dropped[str(reason)] += 1
                    continue
                except (KeyError, TypeError, AttributeError) as error:
                    # A row unlike the first one (checked above): a field is missing or of another type.
                    tally.dropped[f"row not in the layout ({type(error).__name__}: {error})"] += 1
                    continue
                tally.written += 1
                tally.text_bytes += len(record.get("text", "").encode())
                yield record, file.held_out
                taken += 1
                if (per_file and taken >= per_file) or enough(limits, tally):
                    break
        except Unreadable as error:
            tally.dropped[f"unreadable file {file.path}: {error}"] += 1
        if enough(limits, tally):
            return


def enough(limits: Limits, tally: Tally) -> bool:
    return bool(
        (limits.records and tally.written >= limits.records)
        or (limits.tokens and tally.text_bytes >= limits.tokens * BYTES_PER_TOKEN)
    )


def identity(record: dict) -> str:
    """What decides on which side of the split a record falls: its text, or what the user first asked, so that
    the same question never stands on both sides."""
    if "text" in record:
        return record["text"]
    turns = record.get("messages") or record["prompt"]
    if isinstance(turns, str):
        return turns
    return next((m["content"] for m in turns if m["role"] == "user"), turns[0]["content"])


def is_validation(record: dict, fraction: float) -> bool:
    """Whether `record` belongs to the validation split; depends on nothing but the record."""
    digest = hashlib.blake2b(identity(record).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def write_part(
    part: str,
    sources: Iterable[tuple[Source, list[DataFile]]],
    output_dir: Path,
    limits: Limits,
    seed: int,
    validation_fraction: float,
) -> dict[str, Tally]:
    """Write `<part>/<part>_data.jsonl`, the same under `validation/`, and `prepare_report.json`."""
    path = output_dir / part / f"{part}_data.jsonl"
    held_out_path = path.parent / "validation" / path.name
    tallies: dict[str, Tally] = {}
    rows = {path: 0, held_out_path: 0}
    with atomic_writer(path) as train, atomic_writer(held_out_path) as held_out:
        for source, files in sources:
            tally = tallies[source.repo] = Tally()
            records = convert_files(source, files, limits, seed, tally)
            for record, is_held_out in tqdm(
                records, desc=f"{part}: {source.name}", unit=" rows", mininterval=1
            ):
                aside = is_held_out or is_validation(record, validation_fraction)
                (held_out if aside else train).write(json.dumps(record, ensure_ascii=False) + "\n")
                rows[held_out_path if aside else path] += 1
        if not rows[path]:
            reasons = {repo: tally.as_dict() for repo, tally in tallies.items()}
            raise UserError(f"{path}: no usable row in {reasons}; check the files or raise --max_records")
    if not rows[held_out_path]:
        held_out_path.unlink()  # an empty data file is an error to every stage; without one they do without
    report = {
        "sources": {repo: tally.as_dict() for repo, tally in tallies.items()},
        "files": {file.relative_to(output_dir).as_posix(): count for file, count in rows.items()},
        "seed": seed,
        "validation_fraction": validation_fraction,
    }
    write_json(path.parent / "prepare_report.json", report)
    return tallies
