"""Reading a public dataset's files row by row, from the hub or from a local copy of the same layout.

The JSON Lines reader is our own: `datasets` streaming stops at the first malformed line, settles each column
on one type (the string "7" comes back as a number) and reads a seventh as fast. Parquet goes through pyarrow,
one group of rows at a time, so memory does not grow with the file. Both open files through fsspec, so the hub
is one more file system; only `hub_files` and reading what it returns touch the network."""

import fnmatch
import json
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet

from smolkit.errors import UserError
from smolkit.sources.base import Source

BATCH_ROWS = 1000


@dataclass(frozen=True)
class DataFile:
    """One file of a dataset; `path` is relative to its folder, `held_out`: the publisher's test set."""

    url: str
    path: str
    held_out: bool


class Unreadable(Exception):
    """A file (or one line of it) that does not parse; the message says why in a few words."""


def hub_files(source: Source) -> list[DataFile]:
    """The files of `source` on the hub at its pinned revision. Raises UserError when it cannot be listed."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError

    url = f"https://huggingface.co/datasets/{source.repo}"
    elsewhere = "or take a copy on disk (--source local --path DIR) or the built-in data (--source tiny)"
    try:
        api = HfApi()
        # The list of files of a gated repository is public; whether they may be read is asked first.
        api.auth_check(source.repo, repo_type="dataset")
        paths = api.list_repo_files(source.repo, repo_type="dataset", revision=source.revision)
    except (GatedRepoError, RepositoryNotFoundError):
        raise UserError(
            f"{source.repo} cannot be read with your account: accept its conditions at {url} and run "
            f"`hf auth login` (or set HF_TOKEN), {elsewhere}"
        ) from None
    except (HTTPError, OSError) as error:
        raise UserError(
            f"the hub could not be reached for {source.repo} ({first_line(error)}): check the network or set "
            f"HF_ENDPOINT to a mirror, {elsewhere}"
        ) from None
    prefix = f"hf://datasets/{source.repo}@{source.revision}/"
    return select(source, paths, prefix)


def first_line(error: Exception) -> str:
    """The first line of an error's message, short enough to stand inside another message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def local_files(source: Source, folder: Path) -> list[DataFile]:
    """The files of `source` in `folder`, a local copy of the repository."""
    paths = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return select(source, paths, f"{folder.resolve().as_posix()}/")


def select(source: Source, paths: list[str], prefix: str) -> list[DataFile]:
    def matches(path: str, patterns: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatchcase(path, p) and path.count("/") == p.count("/") for p in patterns)

    chosen = [(path, True) for path in paths if matches(path, source.held_out)]
    chosen += [(path, False) for path in paths if matches(path, source.train)]
    return [DataFile(prefix + path, path, held_out) for path, held_out in chosen]


def find_folder(source: Source, root: Path) -> Path | None:
    """The local copy of `source` in `root`: `root` itself or a folder below it that bears the dataset's name.

    Case and punctuation do not count, and an owner before the name (`BAAI/…`, `datasets--BAAI--…`) may be
    there."""

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower())

    owner, name = source.repo.split("/")
    wanted = {plain(name), plain(owner + name), plain("datasets" + owner + name)}
    candidates = [root, *sorted(p for p in root.glob("*") if p.is_dir()), root / owner / name]
    return next((p for p in candidates if p.is_dir() and plain(p.name) in wanted), None)


def spread(files: list[DataFile], seed: int) -> list[DataFile]:
    """Files in a seeded order that goes round their folders: the first few already cover all kinds."""
    rng = random.Random(seed)
    folders: dict[str, list[DataFile]] = {}
    for file in sorted(files, key=lambda f: f.path):
        folders.setdefault(file.path.rpartition("/")[0], []).append(file)
    queues = list(folders.values())
    rng.shuffle(queues)
    for queue in queues:
        rng.shuffle(queue)
    ordered = []
    while queues:
        ordered += [queue.pop() for queue in queues]
        queues = [queue for queue in queues if queue]
    return ordered


def read_rows(file: DataFile) -> Iterator[tuple[int, dict | Unreadable]]:
    """(index, row) of a .parquet, .jsonl or .jsonl.gz/.zst file; a line that does not parse yields
    `Unreadable` in the row's place, a file that does not raises it. A lost connection raises UserError: that
    is no fault of the file."""
    from huggingface_hub.errors import HTTPError

    try:
        if file.path.endswith(".parquet"):
            yield from read_parquet(file)
        else:
            yield from read_json_lines(file)
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"{file.url}: connection lost ({first_line(error)}); nothing was written, try again"
        ) from None
    except (pyarrow.ArrowInvalid, OSError, EOFError, zlib.error) as error:
        raise Unreadable(first_line(error)) from error


def read_parquet(file: DataFile) -> Iterator[tuple[int, dict]]:
    with fsspec.open(file.url, "rb") as handle:
        index = 0
        for batch in pyarrow.parquet.ParquetFile(handle).iter_batches(batch_size=BATCH_ROWS):
            for row in batch.to_pylist():
                yield index, row
                index += 1


def read_json_lines(file: DataFile) -> Iterator[tuple[int, dict | Unreadable]]:
    with fsspec.open(file.url, "rb", compression="infer") as handle:
        for index, line in enumerate(handle):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = Unreadable("malformed JSON or UTF-8")
            if not isinstance(row, (dict, Unreadable)):
                row = Unreadable("not a JSON object")
            yield index, row


def check_columns(source: Source, file: DataFile, row: dict) -> None:
    """Compare a file's first row with the schema that the converter knows, naming every difference."""
    problems = []
    for column, types in source.columns.items():
        expected = " or ".join(t.__name__ for t in types)
        if column not in row:
            problems.append(f"{column} is missing (expected {expected})")
        elif row[column] is not None and not isinstance(row[column], types):
            problems.append(f"{column} is {type(row[column]).__name__} (expected {expected})")
    if problems:
        raise UserError(
            f"{file.url}: not the layout of {source.repo} that this converter knows: {'; '.join(problems)}. "
            f"Columns there: {', '.join(row)}. Update smolkit/sources or pin the revision"
        )
