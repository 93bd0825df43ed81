"""From the files of public datasets to `data/<part>/`: convert, filter, split by a stable hash, count, write.

Everything streams: one batch of rows is in memory at a time, and 8 bytes for each prompt of a conversation (to
count the prompts that come twice). A run may be killed at any moment: the same command goes on from the last
checkpoint and ends with the same bytes. A checkpoint is a small JSON file beside the unfinished output that
says, for every source, how many rows were read, and how long the outputs were; what was written after it is cut
off."""

import fcntl
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from smolkit.errors import UserError
from smolkit.files import write_json
from smolkit.filters import Filters, HashSet
from smolkit.sources.base import Rejected, RowContext, Source
from smolkit.sources.files import DataFile, LayoutChanged, Unreadable, check_columns, read_rows, spread

SPREAD_FILES = 8  # a limited run takes its records from up to this many files, so that it covers languages, topics
BYTES_PER_TOKEN = 4  # the estimate behind `max_tokens`: English under a large vocabulary, UTF-8 Chinese likewise
CHECKPOINT_BYTES = 32 << 20  # of output between two checkpoints
PLACES = 3  # of each reason that the report names
MOST_REASONS = 50  # of one source that are told apart: some carry a value of the row, such as an unknown role
REPORT = "prepare_report.json"
ENCODE = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
PROGRESS = ".prepare_progress.json"


@dataclass(frozen=True)
class Limits:
    """How much to take of a source: `records` of any part, estimated `tokens` of pretraining text."""

    records: int | None = None
    tokens: float | None = None


@dataclass(frozen=True)
class Input:
    """One source with its files, the commit they are of ("" on disk), and how much to take of it."""

    source: Source
    files: list[DataFile]
    limits: Limits
    revision: str = ""


@dataclass(frozen=True)
class Settings:
    """What, beside the inputs, decides every byte of the output."""

    seed: int = 42
    validation_fraction: float = 0.02
    thoughts: str = "keep"


@dataclass
class Tally:
    """What became of the rows of one source; `places` has the first few of each reason."""

    read: int = 0
    written: int = 0
    text_bytes: int = 0
    duplicate_prompts: int = 0
    dropped: Counter = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, place: str) -> None:
        if reason not in self.dropped and len(self.dropped) >= MOST_REASONS:
            reason = "other reasons"
        self.dropped[reason] += 1
        if len(places := self.places.setdefault(reason, [])) < PLACES:
            places.append(place)

    def as_dict(self) -> dict:
        dropped = {
            reason: {"rows": count, "for_example": self.places[reason]} for reason, count in self.dropped.most_common()
        }
        counts = {"read": self.read, "written": self.written, "duplicate_prompts": self.duplicate_prompts}
        return counts | {"dropped": dropped}


class Stream:
    """The records of one source, from a position that can be saved and restored."""

    def __init__(self, data: Input, settings: Settings, judge: Callable[[dict], str | None]) -> None:
        """`judge` gives the reason why a record is unwanted, or None."""
        self.data, self.settings, self.judge = data, settings, judge
        training = spread([f for f in data.files if not f.held_out], settings.seed)
        self.files = training + [f for f in data.files if f.held_out]
        self.share = self.share_of_a_file(training)
        self.tally = Tally()
        # The file under way, its next row, what was written when it began, and whether its columns were checked.
        self.file, self.row, self.before, self.checked = 0, 0, (0, 0), False

    def share_of_a_file(self, training: Sequence[DataFile]) -> tuple[float, float]:
        """(records, bytes of text) that a limited run takes from one file, so that it covers several of them;
        a budget of tokens covers every folder (language, topic) that there is."""
        limits, folders = self.data.limits, {file.path.rpartition("/")[0] for file in training}
        most_files = max(1, min(SPREAD_FILES, len(training)))
        records = math.ceil(limits.records / most_files) if limits.records else math.inf
        text_bytes = limits.tokens * BYTES_PER_TOKEN / max(1, len(folders)) if limits.tokens else math.inf
        return records, text_bytes

    def state(self) -> dict:
        position = {"file": self.file, "row": self.row, "before": self.before, "checked": self.checked}
        return position | {"tally": vars(self.tally)}

    def restore(self, state: dict) -> None:
        self.file, self.row, self.before = state["file"], state["row"], tuple(state["before"])
        self.checked = state["checked"]
        self.tally = Tally(**state["tally"] | {"dropped": Counter(state["tally"]["dropped"])})

    def enough(self) -> bool:
        limits, tally = self.data.limits, self.tally
        return bool(
            (limits.records and tally.written >= limits.records)
            or (limits.tokens and tally.text_bytes >= limits.tokens * BYTES_PER_TOKEN)
        )

    def enough_of_file(self) -> bool:
        written, text_bytes = self.tally.written - self.before[0], self.tally.text_bytes - self.before[1]
        return written >= self.share[0] or text_bytes >= self.share[1] or self.enough()

    def __iter__(self) -> Iterator[tuple[dict, bytes, bool]]:
        """(record, its line of JSON, held out by the publisher) of every usable row; the rest is counted by
        reason."""
        while self.file < len(self.files) and not self.enough():
            file = self.files[self.file]
            for record, line in () if self.enough_of_file() else self.usable_rows(file):
                yield record, line, file.held_out
                if self.enough_of_file():
                    break
            self.file, self.row, self.checked = self.file + 1, 0, False
            self.before = (self.tally.written, self.tally.text_bytes)

    def usable_rows(self, file: DataFile) -> Iterator[tuple[dict, bytes]]:
        try:
            for index, row in read_rows(file, self.row):
                self.row = index + 1
                self.tally.read += 1
                if isinstance(row, Unreadable):
                    self.tally.drop(str(row), f"{file.path}:{self.row}")
                    continue
                if not self.checked:
                    check_columns(self.data.source, file, row)
                    self.checked = True
                try:
                    usable = self.convert(file, index, row)
                except Rejected as reason:
                    self.tally.drop(str(reason), f"{file.path}:{self.row}")
                    continue
                self.tally.written += 1
                self.tally.text_bytes += len(usable[0].get("text", "").encode())
                yield usable
        except Unreadable as error:
            self.tally.drop(f"unreadable file: {error}", file.path)

    def convert(self, file: DataFile, index: int, row: dict) -> tuple[dict, bytes]:
        """The record and its line. Raises Rejected."""
        context = RowContext(file.path, index, self.settings.seed, self.settings.thoughts)
        try:
            record = self.data.source.convert(row, context)
            line = ENCODE(record).encode() + b"\n"
        except UnicodeEncodeError:
            raise Rejected("text with an unpaired surrogate") from None
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            # A row unlike the first one (checked above): a field is missing or of another type.
            raise Rejected(f"row not in the layout ({type(error).__name__}: {error})") from None
        reason = self.judge(record)
        if reason is not None:
            raise Rejected(reason)
        return record, line


def identity(record: dict) -> str:
    """What decides on which side of the split a record falls: its text, or what the user first asked, so that
    the same question never stands on both sides."""
    if "text" in record:
        return record["text"]
    turns = record.get("messages") or record["prompt"]
    if isinstance(turns, str):
        return turns
    return next((m["content"] for m in turns if m["role"] == "user"), turns[0]["content"])


def identity_hash(record: dict) -> int:
    """64 bits of `identity`."""
    return int.from_bytes(hashlib.blake2b(identity(record).encode(), digest_size=8).digest(), "big")


def in_share(digest: int, fraction: float) -> bool:
    """Whether a 64-bit hash falls into the first `fraction` of all hashes."""
    return digest < fraction * 2**64


class Writer:
    """The two unfinished outputs of one part, their checkpoint, and their way to the final names."""

    def __init__(self, folder: Path, name: str, fingerprint: dict) -> None:
        self.finals = {"train": folder / name, "held_out": folder / "validation" / name}
        self.parts = {side: path.with_name(f".{path.name}.part") for side, path in self.finals.items()}
        self.progress = folder / PROGRESS
        self.fingerprint = fingerprint
        self.rows = dict.fromkeys(self.finals, 0)
        self.unsaved = 0

    def resume(self) -> list[dict] | None:
        """The states of the streams at the last checkpoint, the outputs cut back to it; None to begin afresh.
        Raises UserError when an unfinished run had other settings."""
        saved = json.loads(self.progress.read_text("utf-8")) if self.progress.exists() else None
        if saved:
            changed = [key for key, value in self.fingerprint.items() if saved["fingerprint"].get(key) != value]
            if changed:
                raise UserError(
                    f"{self.progress.parent}: an unfinished run had other settings ({', '.join(changed)}); repeat its "
                    "command to finish it, or add --restart to begin afresh"
                )
            self.rows = saved["rows"]
        self.files = {}
        for side, path in self.parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.files[side] = open(path, "r+b" if saved else "wb")
            self.files[side].truncate(saved["sizes"][side] if saved else 0)
            self.files[side].seek(0, os.SEEK_END)
        return saved and saved["streams"]

    def write(self, line: bytes, side: str) -> None:
        self.files[side].write(line)
        self.rows[side] += 1
        self.unsaved += len(line)

    def checkpoint(self, streams: Sequence[Stream]) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {side: file.tell() for side, file in self.files.items()}
        states = [stream.state() for stream in streams]
        value = {"fingerprint": self.fingerprint, "rows": self.rows, "sizes": sizes, "streams": states}
        write_json(self.progress, value)
        self.unsaved = 0

    def finish(self) -> None:
        """Give the outputs their names. An empty one is not written: to every stage an empty file is an error."""
        self.progress.unlink(missing_ok=True)  # killed from here on, the next run begins afresh
        for side, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            if self.rows[side]:
                os.replace(self.parts[side], self.finals[side])
            else:
                self.parts[side].unlink()
                self.finals[side].unlink(missing_ok=True)

    def discard(self) -> None:
        for path in (*self.parts.values(), self.progress):
            path.unlink(missing_ok=True)


def records_of(paths: Iterable[Path]) -> Iterator[dict]:
    """The records of those of our files that exist."""
    for path in paths:
        if path.exists():
            with open(path, "rb") as file:
                yield from map(json.loads, file)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` against a second run, which would write into the same unfinished files."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{folder}: another run is writing here; wait for it or use another --output_dir") from None
    finally:
        os.close(handle)


def fingerprint_of(part: str, inputs: Sequence[Input], settings: Settings, filters: Filters) -> dict:
    """Everything that decides the output, in JSON's types; two runs with equal ones write equal bytes."""

    def files_hash(files: list[DataFile]) -> str:
        listed = "\n".join(sorted(f"{f.path} {f.held_out} {f.stamp}" for f in files))
        return hashlib.blake2b(listed.encode(), digest_size=16).hexdigest()

    sources = [
        {"repo": i.source.repo, "revision": i.revision, "limits": asdict(i.limits), "files": files_hash(i.files)}
        for i in inputs
    ]
    return {"part": part, "sources": sources, **asdict(settings), "filters": filters.settings()}


def already_written(folder: Path, fingerprint: dict) -> bool:
    """Whether the finished output in `folder` is what this run would write."""
    report = folder / REPORT
    if not report.exists() or (folder / PROGRESS).exists():
        return False
    found = json.loads(report.read_text("utf-8"))
    files = found.get("files", {})
    same_sizes = all(
        (folder / name).exists() and (folder / name).stat().st_size == f["bytes"] for name, f in files.items()
    )
    return found.get("settings") == fingerprint and same_sizes


def write_part(
    part: str,
    inputs: Sequence[Input],
    folder: Path,
    settings: Settings,
    filters: Filters,
    restart: bool = False,
    after: str = "",
) -> dict:
    """Write `<folder>/<part>_data.jsonl`, the same under `validation/`, and the report, which is returned. An
    unfinished run of the same settings is continued, a finished one is left as it is (and says so in the
    report's "already"), unless `restart`. `after` names what `filters` remember from before. Raises UserError
    (unusable input, lost connection, other settings)."""
    fingerprint = fingerprint_of(part, inputs, settings, filters) | {"after": after}
    writer = Writer(folder, f"{part}_data.jsonl", fingerprint)
    streams = [Stream(data, settings, filters.judge) for data in inputs]
    with locked(folder):
        if restart:
            writer.discard()
        elif already_written(folder, fingerprint):
            for record in records_of(writer.finals.values()):
                filters.remember(record)
            return json.loads((folder / REPORT).read_text("utf-8")) | {"already": True}
        prompts = continue_run(writer, streams, filters, part)
        try:
            for stream in streams:
                write_stream(part, stream, streams, writer, prompts)
            if not writer.rows["train"]:
                reasons = {s.data.source.repo: dict(s.tally.dropped.most_common(3)) for s in streams}
                raise LayoutChanged(f"{folder}: no usable row in {reasons}; check the files or the limits")
        except LayoutChanged:
            writer.discard()  # going on would fail again
            raise
        except UserError:
            writer.checkpoint(streams)  # a lost connection loses nothing else
            raise
        report = report_of(writer, streams)
        writer.finish()
        write_json(folder / REPORT, report)
    return report


def write_stream(part: str, stream: Stream, streams: Sequence[Stream], writer: Writer, prompts: HashSet | None) -> None:
    """Write what is left of one source, with a progress bar and checkpoints of all of them."""
    name, total, done = stream.data.source.name, stream.data.limits.records, stream.tally.written
    rows = tqdm(stream, f"{part}: {name}", total, unit=" rows", mininterval=1, initial=done)
    for record, line, is_held_out in rows:
        digest = identity_hash(record)
        if prompts is not None:
            stream.tally.duplicate_prompts += not prompts.add(digest)
        aside = is_held_out or in_share(digest, stream.settings.validation_fraction)
        writer.write(line, "held_out" if aside else "train")
        if writer.unsaved >= CHECKPOINT_BYTES:
            writer.checkpoint(streams)


def continue_run(writer: Writer, streams: Sequence[Stream], filters: Filters, part: str) -> HashSet | None:
    """Bring streams, filters and the set of prompts (None for pretraining text) to where the last checkpoint
    left them. What a filter remembers is a function of what was written, so it is read from there."""
    states = writer.resume()
    prompts = None if part == "pretrain" else HashSet()
    if states:
        for stream, state in zip(streams, states, strict=True):
            stream.restore(state)
        for record in records_of(writer.parts.values()):
            filters.remember(record)
            if prompts is not None:
                prompts.add(identity_hash(record))
        print(f"{part}: going on after {sum(writer.rows.values())} rows of an unfinished run")
    return prompts


def report_of(writer: Writer, streams: Sequence[Stream]) -> dict:
    sizes = {side: file.tell() for side, file in writer.files.items()}
    folder = writer.progress.parent
    return {
        "sources": {s.data.source.repo: s.tally.as_dict() | {"revision": s.data.revision} for s in streams},
        "files": {
            path.relative_to(folder).as_posix(): {"rows": writer.rows[side], "bytes": sizes[side]}
            for side, path in writer.finals.items()
            if writer.rows[side]
        },
        "settings": writer.fingerprint,
    }
