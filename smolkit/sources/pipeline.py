"""From the files of public datasets to `data/<part>/`: convert, filter, split by a stable hash, count, write.

Everything streams: one batch of rows is in memory at a time, and 8 bytes for each prompt of a conversation (to
count the prompts that come twice) and for each row that a publisher held out. These are read before anything is
written, and again as the first rows of the output: no training row may begin as one of them does, and of two rows that
resemble each other the filters keep the held-out one. A run may be killed at any moment: the same command goes on from
the last checkpoint and ends with the same bytes. A checkpoint is a small JSON file beside the unfinished output that
says, for every source, how many rows were read, and how long the outputs were; what was written after it is cut
off."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from smolkit.errors import UserError
from smolkit.files import write_json
from smolkit.filters import Filters, HashSet, digest
from smolkit.sources.base import Rejected, RowContext, Source
from smolkit.sources.files import DataFile, LayoutChanged, Unreadable, check_columns, read_rows, spread
from smolkit.sources.output import REPORT, Writer, already_written, locked, records_of

SPREAD_FILES = 8  # a limited run takes its records from up to this many files, so that it covers languages, topics
HELD_OUT_PART = 20  # and at first one 20th of them from what the publisher held out, which is read before
OPENING_BYTES = 20  # of what a user says first; less is a greeting, which asks nothing
HELD_OUT = "stands in the held-out files"  # the reason under which training rows that do are counted
FORMAT = 2  # of the output: raised when equal settings no longer write equal bytes
BYTES_PER_TOKEN = 4  # the estimate behind `max_tokens`: English under a large vocabulary, UTF-8 Chinese likewise
CHECKPOINT_BYTES = 32 << 20  # of output between two checkpoints
PLACES = 3  # of each reason that the report names
MOST_REASONS = 50  # of one source that are told apart: some carry a value of the row, such as an unknown role
ENCODE = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


@dataclass(frozen=True)
class Limits:
    """How much to take of a source: `records` of any part, estimated `tokens` of pretraining text."""

    records: int | None = None
    tokens: float | None = None


@dataclass(frozen=True)
class Input:
    """One source with its files, the commit they are of ("" on disk), how much to take of it, and the configuration
    that tells it from another input of the same source."""

    source: Source
    files: list[DataFile]
    limits: Limits
    revision: str = ""
    config: str = ""


def names_of(inputs: Sequence[Input]) -> list[str]:
    """What each input is called in the report: its repository, and the configuration where that comes twice."""
    repos = [data.source.repo for data in inputs]
    return [i.source.repo if repos.count(i.source.repo) == 1 else f"{i.source.repo}:{i.config}" for i in inputs]


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
    """The records of one source, from a position that can be saved and restored.

    The files are read in passes: those that the publisher held out, the others, and, as long as a limit is not
    reached, what was left when a file had given its share."""

    def __init__(
        self,
        data: Input,
        settings: Settings,
        judge: Callable[[dict], str | None],
        held_out: frozenset[int] | HashSet = frozenset(),
    ) -> None:
        """`judge` gives the reason why a record is unwanted, or None; `held_out` are the `opening_hash`es that no
        training row may have."""
        self.data, self.settings, self.judge, self.held_out = data, settings, judge, held_out
        first = [f for f in data.files if f.held_out]
        self.files = first + spread([f for f in data.files if not f.held_out], settings.seed)
        # [file, its next row]: what this pass has still to read, the file under way first, and what later ones have.
        self.queue = [[number, 0] for number in range(len(first))]
        self.left = [[number, 0] for number in range(len(first), len(self.files))]
        self.in_held_out = True  # the first pass
        self.share = self.share_of_held_out()
        self.tally = Tally()
        # What was written when the file under way began, and whether its columns were checked.
        self.before, self.checked = (0, 0), False

    def share_of_held_out(self) -> tuple[float, float]:
        """(records, bytes of text) that a limited run takes from each held-out file before it reads the others."""
        limits, parts = self.data.limits, HELD_OUT_PART * max(1, len(self.queue))
        records = limits.records // parts if limits.records else math.inf
        return records, limits.tokens * BYTES_PER_TOKEN / parts if limits.tokens else math.inf

    def share_of_a_file(self) -> tuple[float, float]:
        """(records, bytes of text) of what a limit still allows that this pass takes from one file, so that it covers
        several of them; a budget of tokens covers every folder (language, topic) that there is."""
        limits, tally = self.data.limits, self.tally
        folders = {self.files[number].path.rpartition("/")[0] for number, _ in self.queue}
        most_files = max(1, min(SPREAD_FILES, len(self.queue)))
        records = math.ceil((limits.records - tally.written) / most_files) if limits.records else math.inf
        room = limits.tokens * BYTES_PER_TOKEN - tally.text_bytes if limits.tokens else math.inf
        return records, room / max(1, len(folders))

    def state(self) -> dict:
        names = ("queue", "left", "in_held_out", "share", "before", "checked")
        return {name: getattr(self, name) for name in names} | {"tally": vars(self.tally)}

    def restore(self, state: dict) -> None:
        self.queue, self.left, self.in_held_out = state["queue"], state["left"], state["in_held_out"]
        self.share, self.before, self.checked = tuple(state["share"]), tuple(state["before"]), state["checked"]
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
        yield from self.held_out_rows()
        while not self.enough() and (self.queue or self.next_pass()):
            yield from self.next_file()

    def held_out_rows(self) -> Iterator[tuple[dict, bytes, bool]]:
        """What iterating gives first: the rows of the first pass."""
        while self.in_held_out and self.queue and not self.enough():
            yield from self.next_file()

    def next_pass(self) -> bool:
        """Go on with the files that have rows left, those that the publisher held out when no others have. Whether
        there are any."""
        training, held_out = (
            [at for at in self.left if self.files[at[0]].held_out == wanted] for wanted in (False, True)
        )
        self.queue, self.left = (training, held_out) if training else (held_out, [])
        self.in_held_out, self.share = False, self.share_of_a_file()
        self.begin_file()
        return bool(self.queue)

    def begin_file(self) -> None:
        self.before = (self.tally.written, self.tally.text_bytes)
        self.checked = bool(self.queue) and self.queue[0][1] > 0  # left after a row that was sound

    def next_file(self) -> Iterator[tuple[dict, bytes, bool]]:
        """What the first file of the queue gives, up to its share."""
        file = self.files[self.queue[0][0]]
        for record, line in () if self.enough_of_file() else self.usable_rows(file):
            yield record, line, file.held_out
            if self.enough_of_file():
                break
        done = self.queue.pop(0)
        if self.enough_of_file():
            self.left.append(done)
        self.begin_file()

    def usable_rows(self, file: DataFile) -> Iterator[tuple[dict, bytes]]:
        at = self.queue[0]
        try:
            for index, row in read_rows(file, at[1]):
                at[1] = index + 1
                self.tally.read += 1
                place = f"{file.path}:{at[1]}"
                if isinstance(row, Unreadable):
                    self.tally.drop(str(row), place)
                    continue
                if not self.checked:
                    check_columns(self.data.source, file, row)
                    self.checked = True
                try:
                    usable = self.convert(file, index, row)
                except Rejected as reason:
                    self.tally.drop(str(reason), place)
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
        if self.held_out and not file.held_out and opening_hash(record) in self.held_out:
            raise Rejected(HELD_OUT)
        reason = self.judge(record)
        if reason is not None:
            raise Rejected(reason)
        return record, line


def identity(record: dict) -> str:
    """What decides on which side of the split a record falls: its text, or what the user first asked, so that
    the split never puts the same question on both sides."""
    if "text" in record:
        return record["text"]
    turns = record.get("messages") or record["prompt"]
    if isinstance(turns, str):
        return turns
    return next((m["content"] for m in turns if m["role"] == "user"), turns[0]["content"])


def identity_hash(record: dict) -> int:
    """64 bits of `identity`."""
    return digest(identity(record))


def opening_hash(record: dict) -> int:
    """64 bits of what no training row may share with a row that a publisher held out: its text or first question. A
    first turn of a few letters is taken together with what the user says next: most of everyday-conversations begin
    with "Hi", and would all be left out for one of them."""
    turns = record.get("messages") or record.get("prompt")
    said = [m["content"] for m in turns if m["role"] == "user"] if isinstance(turns, list) else []
    opening = said[0] if said else identity(record)
    for more in said[1:]:
        if len(opening.encode()) >= OPENING_BYTES:
            break
        opening = f"{opening}\n{more}"
    return digest(opening)


class HeldOut:
    """What the publishers of several inputs held out, whatever the limits are."""

    def __init__(self, inputs: Sequence[Input], settings: Settings) -> None:
        self.inputs = [replace(i, files=[f for f in i.files if f.held_out], limits=Limits()) for i in inputs]
        self.settings = settings

    def mark(self) -> str:
        """Changes with the files, for a run's fingerprint."""
        listed = [f"{i.source.repo} {i.revision} {files_hash(i.files)}" for i in self.inputs if i.files]
        return hashlib.blake2b("\n".join(listed).encode(), digest_size=16).hexdigest()

    @cached_property
    def openings(self) -> HashSet:
        """The `opening_hash` of every row, read when first asked for. Raises UserError."""
        found = HashSet()
        for data in (data for data in self.inputs if data.files):
            rows = Stream(data, self.settings, lambda record: None)
            for record, _, _ in tqdm(rows, f"{data.source.name}: held-out files", unit=" rows", mininterval=1):
                found.add(opening_hash(record))
        return found


def in_share(value: int, fraction: float) -> bool:
    """Whether a 64-bit hash falls into the first `fraction` of all hashes."""
    return value < fraction * 2**64


def files_hash(files: Iterable[DataFile]) -> str:
    listed = "\n".join(sorted(f"{f.path} {f.held_out} {f.stamp}" for f in files))
    return hashlib.blake2b(listed.encode(), digest_size=16).hexdigest()


def fingerprint_of(part: str, inputs: Sequence[Input], settings: Settings, filters: Filters) -> dict:
    """Everything that decides the output, in JSON's types; two runs with equal ones write equal bytes."""
    sources = [
        {
            "repo": i.source.repo,
            "config": i.config,
            "revision": i.revision,
            "limits": asdict(i.limits),
            "files": files_hash(i.files),
        }
        for i in inputs
    ]
    return {"format": FORMAT, "part": part, "sources": sources, **asdict(settings), "filters": filters.settings()}


def write_part(
    part: str,
    inputs: Sequence[Input],
    folder: Path,
    settings: Settings,
    filters: Filters,
    restart: bool = False,
    after: str = "",
    held_out: HeldOut | None = None,
) -> dict:
    """Write `<folder>/<part>_data.jsonl`, the same under `validation/`, and the report, which is returned. An
    unfinished run of the same settings is continued, a finished one is left as it is (and says so in the
    report's "already"), unless `restart`. `after` names what `filters` remember from before, `held_out` is what no
    training row may share (None: what the publishers of `inputs` held out). Raises UserError (unusable input, lost
    connection, other settings)."""
    held_out = held_out or HeldOut(inputs, settings)
    fingerprint = fingerprint_of(part, inputs, settings, filters) | {"after": after, "held_out": held_out.mark()}
    writer = Writer(folder, part, fingerprint)
    with locked(folder):
        if restart:
            writer.discard()
        elif already_written(folder, fingerprint):
            for record in records_of(writer.finals.values()):
                filters.remember(record)
            return json.loads((folder / REPORT).read_text("utf-8")) | {"already": True}
        streams = [Stream(data, settings, filters.judge, held_out.openings) for data in inputs]
        prompts = continue_run(writer, streams, filters, part)
        try:
            for stream in streams:
                write_rows(stream.held_out_rows(), stream, writer, prompts, streams)
            for stream in streams:
                name, total, done = stream.data.source.name, stream.data.limits.records, stream.tally.written
                rows = tqdm(stream, f"{part}: {name}", total, unit=" rows", mininterval=1, initial=done)
                write_rows(rows, stream, writer, prompts, streams)
            if not writer.rows["train"]:
                dropped = [dict(s.tally.dropped.most_common(3)) for s in streams]
                reasons = dict(zip(names_of(inputs), dropped, strict=True))
                raise LayoutChanged(f"{folder}: no usable row in {reasons}; check the files or the limits")
        except LayoutChanged:
            writer.discard()  # going on would fail again
            raise
        except UserError:
            writer.checkpoint([stream.state() for stream in streams])  # a lost connection loses nothing else
            raise
        report = report_of(writer, streams)
        writer.finish()
        write_json(folder / REPORT, report)
    return report


def write_rows(
    rows: Iterable[tuple[dict, bytes, bool]],
    stream: Stream,
    writer: Writer,
    prompts: HashSet | None,
    streams: Sequence[Stream],
) -> None:
    """Write rows of one source, with checkpoints of all of them."""
    for record, line, is_held_out in rows:
        value = identity_hash(record)
        if prompts is not None:
            stream.tally.duplicate_prompts += not prompts.add(value)
        aside = is_held_out or in_share(value, stream.settings.validation_fraction)
        writer.write(line, "held_out" if aside else "train")
        if writer.unsaved >= CHECKPOINT_BYTES:
            writer.checkpoint([stream.state() for stream in streams])


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


def origin(data: Input) -> dict:
    """Where a source is from, for the report: its id on the hub (None for the user's own files) and the commit."""
    return {"repo": data.source.repo if data.source.on_hub else None, "revision": data.revision}


def report_of(writer: Writer, streams: Sequence[Stream]) -> dict:
    sizes = {side: file.tell() for side, file in writer.files.items()}
    names = names_of([stream.data for stream in streams])
    return {
        "sources": {name: s.tally.as_dict() | origin(s.data) for name, s in zip(names, streams, strict=True)},
        "files": {
            path.relative_to(writer.folder).as_posix(): {"rows": writer.rows[side], "bytes": sizes[side]}
            for side, path in writer.finals.items()
            if writer.rows[side]
        },
        "settings": writer.fingerprint,
    }
