"""Reading a public dataset's files row by row, from the hub or from a local copy of the same layout.

Every file is opened by `datasets`' streaming layer, so the hub's authentication, mirrors, retries and compression
are its business and a local copy takes the same path. Rows are parsed here, file by file, because the builders behind
`load_dataset(streaming=True)` do not fit (tried with datasets 5.2):
- JSON gives up at the first malformed line, turns texts that look like dates into timestamps, and casts every file to
  the columns of the first, where files of one dataset differ;
- Parquet reads ahead without limit while rows are converted: 98 MiB above the imports for 50 MB of rows and 760 for
  500 MB (496 with `pre_buffer` off and a buffered stream), here 29 and 31;
- text forgets the encoding of remote and compressed files.
Only `hub_files` and reading what it returns touch the network."""

import codecs
import fnmatch
import functools
import itertools
import json
import random
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from smolkit.errors import UserError
from smolkit.sources.base import Source

BATCH_ROWS = 1000
CHUNK_BYTES = 1 << 20  # of a JSON file that are read at a time
BETWEEN = re.compile(r"[\s,]*")  # what stands between two elements of a JSON array
SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz")


@dataclass(frozen=True)
class DataFile:
    """One file of a dataset; `path` is relative to its folder, `held_out`: the publisher's test set. `stamp`
    changes with the file: size and time on disk, nothing on the hub, where the URL names a commit."""

    url: str
    path: str
    held_out: bool
    stamp: str = ""


class Unreadable(Exception):
    """A file (or one line of it) that does not parse; the message says why in a few words."""


class LayoutChanged(UserError):
    """A file whose columns are not those that the converter knows."""


def hub_files(
    source: Source, chosen: Mapping[str, tuple[str, ...]] | None = None, revision: str | None = None
) -> tuple[list[DataFile], str]:
    """The files of `source` on the hub, and the commit they are of: `revision`, else the pinned one ("main" is
    resolved). Raises UserError with a remedy when they cannot be listed or read."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError

    url = f"https://huggingface.co/datasets/{source.repo}"
    elsewhere = "or take a copy on disk (--source local --path DIR) or the built-in data (--source tiny)"
    revision = revision or source.revision
    try:
        api = HfApi()
        # The list of files of a gated repository is public; whether they may be read is asked first.
        api.auth_check(source.repo, repo_type="dataset")
        if revision == "main":
            revision = api.dataset_info(source.repo, revision="main").sha
            assert revision is not None, "the hub names the commit of every dataset"
        paths = api.list_repo_files(source.repo, repo_type="dataset", revision=revision)
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
    files = select(source, chosen or {}, {path: "" for path in paths}, f"hf://datasets/{source.repo}@{revision}/")
    if not files:
        raise UserError(f"{source.repo}@{revision}: no file matches {expected(source, chosen or {})}")
    return files, revision


def first_line(error: Exception) -> str:
    """The first line of an error's message, short enough to stand inside another message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def local_files(source: Source, folder: Path, chosen: Mapping[str, tuple[str, ...]] | None = None) -> list[DataFile]:
    """The files of `source` in `folder`, a local copy of the repository (also the hub's cache folder of it)."""
    snapshots = sorted((folder / "snapshots").glob("*"), key=lambda p: p.stat().st_mtime)
    folder = snapshots[-1] if snapshots else folder
    paths = {}
    for path in sorted(folder.rglob("*")):
        if path.name.endswith(SUFFIXES) and path.is_file():
            stat = path.stat()
            paths[path.relative_to(folder).as_posix()] = f"{stat.st_size}-{stat.st_mtime_ns}"
    return select(source, chosen or {}, paths, f"{folder.resolve().as_posix()}/")


def select(
    source: Source, chosen: Mapping[str, tuple[str, ...]], stamps: Mapping[str, str], prefix: str
) -> list[DataFile]:
    """Those of the files (path → stamp) that belong to `source`, the publisher's held-out ones first."""
    train, held_out = source.patterns(chosen)

    def matches(path: str, patterns: list[str]) -> bool:
        return any(fnmatch.fnmatchcase(path, p) and path.count("/") == p.count("/") for p in patterns)

    found = [(path, True) for path in stamps if matches(path, held_out)]
    found += [(path, False) for path in stamps if matches(path, train)]
    return [DataFile(prefix + path, path, is_held_out, stamps[path]) for path, is_held_out in found]


def expected(source: Source, chosen: Mapping[str, tuple[str, ...]]) -> str:
    return " ".join(source.patterns(chosen)[0])


def find_folder(source: Source, root: Path) -> Path | None:
    """The local copy of `source` in `root`: `root` itself or a folder below it that bears the dataset's name.

    Case and punctuation do not count, and an owner before the name (`BAAI/…`, `datasets--BAAI--…`) may be
    there; a folder with the right owner is preferred (two datasets are called ultrafeedback_binarized)."""

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower())

    owner, name = source.repo.split("/")
    with_owner, without = {plain(owner + name), plain("datasets" + owner + name)}, {plain(name)}
    candidates = [root, *sorted(p for p in root.glob("*") if p.is_dir())]
    deeper = sorted(p for p in root.glob("*/*") if p.is_dir())
    below_owner = [p for p in [root, *deeper] if plain(p.parent.name + p.name) in with_owner]
    named = [p for p in candidates if plain(p.name) in with_owner]
    return next(iter(below_owner + named + [p for p in candidates + deeper if plain(p.name) in without]), None)


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


def read_rows(file: DataFile, start: int = 0) -> Iterator[tuple[int, dict | Unreadable]]:
    """(index, row) from row `start` on of a .parquet, .jsonl or .json file (a JSON array), plain or compressed;
    a line that does not parse yields `Unreadable` in the row's place, a file that does not raises it. A lost
    connection raises UserError: that is no fault of the file."""
    import datasets
    from huggingface_hub.errors import HTTPError

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors come back as exceptions too
    rows = _parquet_rows if file.path.endswith(".parquet") else _json_rows
    try:
        yield from rows(file, start)
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"{file.url}: connection lost ({first_line(error)}); run the same command again to go on"
        ) from None
    except (OSError, EOFError, ValueError, zlib.error) as error:  # pyarrow's errors are ValueErrors
        raise Unreadable(first_line(error)) from error


def _opened(file: DataFile) -> BinaryIO:
    """The file's bytes as `datasets` streams them: decompressed, from disk or the hub, with its retries."""
    import datasets
    from datasets.utils.file_utils import xopen

    return xopen(datasets.StreamingDownloadManager().extract(file.url), "rb")


def _parquet_rows(file: DataFile, start: int) -> Iterator[tuple[int, dict]]:
    from pyarrow.parquet import ParquetFile

    with _opened(file) as stream, ParquetFile(stream, pre_buffer=False) as parquet:
        index = 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if index + rows <= start:  # not even read
                index += rows
                continue
            for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group]):
                skipped = min(max(0, start - index), len(batch))
                yield from enumerate(batch.slice(skipped).to_pylist(), index + skipped)
                index += len(batch)


def _json_rows(file: DataFile, start: int) -> Iterator[tuple[int, dict | Unreadable]]:
    with _opened(file) as stream:
        chunks = iter(functools.partial(stream.read, CHUNK_BYTES), b"")
        first = next(chunks, b"").removeprefix(codecs.BOM_UTF8)
        is_array = ".jsonl" not in file.path and first.lstrip().startswith(b"[")
        read = _array_rows if is_array else _line_rows
        yield from read(itertools.chain([first], chunks), start)


def _line_rows(chunks: Iterator[bytes], start: int) -> Iterator[tuple[int, dict | Unreadable]]:
    for index, line in enumerate(_lines(chunks)):
        if index >= start and line.strip():
            yield index, _parse(line)


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their ends, cut at "\\n" only: texts hold other characters that Python takes for line ends."""
    pieces: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        pieces.append(first)
        if others:
            yield b"".join(pieces)
            yield from others[:-1]
            pieces = [others[-1]]
    yield b"".join(pieces)


def _parse(line: bytes) -> dict | Unreadable:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return Unreadable("malformed JSON or UTF-8")
    return row if isinstance(row, dict) else Unreadable("not a JSON object")


def _array_rows(chunks: Iterator[bytes], start: int) -> Iterator[tuple[int, dict | Unreadable]]:
    for index, value in enumerate(_array_values(codecs.iterdecode(chunks, "utf-8"))):
        if index >= start:
            yield index, value if isinstance(value, dict) else Unreadable("not a JSON object")


def _array_values(chunks: Iterator[str]) -> Iterator[object]:
    """The elements of a JSON array, one after the other: memory holds one element and the chunks it came in."""
    decoder, text, at, exhausted = json.JSONDecoder(), next(chunks).lstrip(), 1, False
    while True:
        at = BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it matches anywhere
        if text.startswith("]", at):
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError:
            if exhausted:
                raise ValueError("the JSON array is malformed or cut off") from None
            # Incomplete so far: at least double the rest, so that a long element is not parsed chunk by chunk.
            pieces, size = [text[at:]], 0
            while size <= len(pieces[0]) and not exhausted:
                piece = next(chunks, None)
                exhausted = piece is None
                pieces.append(piece or "")
                size += len(pieces[-1])
            text, at = "".join(pieces), 0
        else:
            yield value


def check_columns(source: Source, file: DataFile, row: dict) -> None:
    """Compare a file's first row with the schema that the converter knows, naming every difference. Raises
    LayoutChanged."""
    problems = []
    for column, types in source.columns.items():
        wanted = " or ".join(t.__name__ for t in types)
        if column not in row:
            problems.append(f"{column} is missing (expected {wanted})")
        elif row[column] is not None and not isinstance(row[column], types):
            problems.append(f"{column} is {type(row[column]).__name__} (expected {wanted})")
    if problems:
        raise LayoutChanged(
            f"{file.url}: not the layout of {source.repo} that this converter knows: {'; '.join(problems)}. "
            f"Columns there: {', '.join(row)}. Update smolkit/sources or pin the revision"
        )
