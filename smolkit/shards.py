"""Records turned into token ids once: memory-mapped Arrow shards with a manifest, reused by later runs.

A store is a directory:

    manifest.json        what it was made from (source files, tokenizer, settings, code), counts, checksums
    shard-00000.arrow    record batches of int32 lists, in Arrow's IPC stream format (`Dataset.from_file` reads it)

Its name in the cache is a hash of everything the token ids depend on, so that another tokenizer, changed data
or a new version of the renderer gives another store and never meets the old one. A store is written aside and
renamed when it is complete; shards are checked against the manifest before use. Records keep the order of the
source files, whatever the number of processes.
"""

import ctypes
import inspect
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset, concatenate_datasets
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from smolkit import chat
from smolkit.errors import UserError
from smolkit.files import default_cache_dir, write_json

FORMAT = 1
MANIFEST = "manifest.json"
SHARD_TOKENS = 64 * 2**20  # a shard is closed beyond this: 256 MiB per column
BATCH_ROWS, BATCH_CHARACTERS = 256, 2**20  # rows that are converted together; what bounds the memory
COLUMN = pa.list_(pa.int32())
PR_SET_PDEATHSIG = 1  # prctl(2)

Columns = dict[str, list[np.ndarray]]  # per column one int array for each record that came out of a batch of rows
Convert = Callable[[PreTrainedTokenizerFast, list[dict[str, Any]]], tuple[Columns, dict[str, int]]]


@dataclass(frozen=True)
class Conversion:
    """How rows become records of token ids.

    `read`: files → rows. `convert`: (tokenizer, rows, **settings) → columns and counts; a module-level
    function, because processes receive it by name. `settings`: JSON values.
    """

    kind: str
    columns: tuple[str, ...]
    read: Callable[[Sequence[Path]], Iterator[dict[str, Any]]]
    convert: Callable[..., tuple[Columns, dict[str, int]]]
    settings: dict[str, Any] = field(default_factory=dict)

    def identity(self, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        """All that the ids depend on, apart from the data."""
        modules = (chat, *(sys.modules[function.__module__] for function in (self.read, self.convert)))
        code = _digest("\0".join(inspect.getsource(module) for module in modules))
        return {
            "format": FORMAT,
            "kind": self.kind,
            "tokenizer": tokenizer_hash(tokenizer),
            "settings": self.settings,
            "code": code,
        }


class TokenStore:
    """Read access to the records of a store: `columns` of int32 lists of any length, memory-mapped."""

    def __init__(self, columns: dict[str, pa.ChunkedArray], manifest: dict[str, Any], directory: Path | None = None):
        self.columns, self.manifest, self.directory = columns, manifest, directory

    @classmethod
    def open(cls, directory: Path, manifest: dict[str, Any] | None = None) -> "TokenStore":
        """The store in a directory whose shards have been checked (see `open_store`)."""
        manifest = manifest or json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        maps = [pa.memory_map(str(directory / shard["file"])) for shard in manifest["shards"]]
        tables = [pa.ipc.open_stream(each).read_all() for each in maps]
        columns = {
            name: pa.chunked_array([chunk for table in tables for chunk in table[name].chunks], COLUMN)
            for name in manifest["columns"]
        }
        return cls(columns, manifest, directory)

    @classmethod
    def of(cls, **columns: Sequence[Sequence[int]]) -> "TokenStore":
        """A store in memory, out of lists of token ids."""
        arrays = {name: pa.chunked_array([_list_array(lists)], COLUMN) for name, lists in columns.items()}
        return cls(arrays, {"columns": list(columns), "counts": {}})

    def __reduce__(self) -> tuple:
        """Processes that load data get the path, not the tokens."""
        if self.directory is None:
            return TokenStore, (self.columns, self.manifest)
        return TokenStore.open, (self.directory,)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def counts(self) -> dict[str, int]:
        """What the conversion counted: records, tokens and its own names."""
        return self.manifest["counts"]

    @cached_property
    def _views(self) -> dict[str, tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]]:
        """Per column: number of the first record of each chunk, and (offsets, values) of each chunk."""
        views = {}
        for name, column in self.columns.items():
            starts = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])
            arrays = [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in column.chunks]
            views[name] = (starts, arrays)
        return views

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each record in its first column, (N,) int64."""
        _, chunks = self._views[next(iter(self.columns))]
        return np.concatenate([np.diff(offsets) for offsets, _ in chunks] or [np.empty(0)]).astype(np.int64)

    def cut(self, column: str, record: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a record: a read-only view into the file, int32."""
        starts, chunks = self._views[column]
        chunk = int(np.searchsorted(starts, record, side="right")) - 1
        offsets, values = chunks[chunk]
        first, end = offsets[record - starts[chunk]], offsets[record - starts[chunk] + 1]
        return values[first + start : end if stop is None else min(first + stop, end)]

    def dataset(self) -> Dataset:
        """The records as a memory-mapped `datasets.Dataset`."""
        assert self.directory is not None
        shards = [Dataset.from_file(str(self.directory / shard["file"])) for shard in self.manifest["shards"]]
        return concatenate_datasets(shards) if shards else Dataset.from_dict({name: [] for name in self.columns})


# --- opening and making -------------------------------------------------------------------------------------


def token_store(paths: Sequence[str]) -> list[Path]:
    """The manifest, if the path is the directory of a store; else nothing. A store has to be the only path."""
    manifests = [path for path in (Path(each) / MANIFEST for each in paths) if path.is_file()]
    if manifests and len(paths) > 1:
        raise UserError(f"{manifests[0].parent} is a directory of tokens; name no other data beside it")
    return manifests


def tokenized(
    conversion: Conversion,
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: str | Path | None = None,
    num_proc: int = 1,
) -> TokenStore:
    """The records of `files`, from the cache or made now; or of a store whose manifest is the only file.

    Processes that want the same store at the same time wait for the one that makes it. Raises `UserError` for
    bad rows, an unwritable cache, and a named store that is damaged or belongs to something else.
    """
    if [path.name for path in files] == [MANIFEST]:
        return open_store(files[0].parent, conversion.identity(tokenizer))
    sources = [{"path": str(path), "bytes": path.stat().st_size, "checksum": checksum(path)} for path in files]
    identity = conversion.identity(tokenizer)
    content = [(source["bytes"], source["checksum"]) for source in sources]
    name = f"{conversion.kind}-{_digest(json.dumps([identity, content], sort_keys=True))[:16]}"
    cache = Path(cache_dir) if cache_dir else default_cache_dir()
    directory, aside = cache / name, cache / f".{name}.part"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _waiting(FileLock(cache / f".{name}.lock")):
            if directory.exists():
                try:
                    return open_store(directory)
                except UserError as error:
                    print(f"{error}; tokenising again", flush=True)
                    shutil.rmtree(directory)
            shutil.rmtree(aside, ignore_errors=True)  # what a killed run left
            try:
                rows = _converted(conversion, files, tokenizer, num_proc)
                manifest = write_store(aside, conversion.columns, rows, {**identity, "sources": sources})
                os.replace(aside, directory)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
            return TokenStore.open(directory, manifest)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{cache}: cannot keep tokens there: {reason}; name another --data_cache_dir") from error


@contextmanager
def _waiting(lock: FileLock) -> Iterator[None]:
    """Hold the lock; say so when another process has it for long."""
    try:
        lock.acquire(timeout=10)
    except Timeout:
        print(f"waiting for the process that makes these tokens ({lock.lock_file})", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def open_store(directory: Path, identity: dict[str, Any] | None = None) -> TokenStore:
    """The store in `directory`, every shard checked; `UserError` when it is damaged, or not of `identity`."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        sealed = manifest.pop("checksum") == _digest(json.dumps(manifest, sort_keys=True))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{directory}: not a token store: {MANIFEST} is unreadable ({error!r})") from error
    if not sealed:
        raise UserError(f"{directory}: {MANIFEST} is damaged: it does not have its own checksum")
    for shard in manifest["shards"]:
        file = directory / shard["file"]
        size = file.stat().st_size if file.is_file() else 0
        if size != shard["bytes"]:
            raise UserError(f"{file}: damaged: {size:,} bytes where the manifest says {shard['bytes']:,}")
        if checksum(file) != shard["checksum"]:
            raise UserError(f"{file}: damaged: its checksum is not that of the manifest")
    for name, expected in (identity or {}).items():
        if manifest[name] != expected:
            raise UserError(
                f"{directory}: tokens of another {name} ({_short(manifest[name])} where this run has "
                f"{_short(expected)}); name the text files in --data_path to tokenise them again"
            )
    return TokenStore.open(directory, manifest)


def write_store(
    directory: Path,
    columns: Sequence[str],
    batches: Iterable[tuple[Columns, dict[str, int]]],
    facts: dict[str, Any],
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Write batches of records as shards, then the manifest; everything is on the disk when it returns.

    Only the current batch is in memory. Returns the manifest.
    """
    directory.mkdir(parents=True)
    counts: Counter[str] = Counter(records=0, tokens=0)
    shards: list[dict[str, Any]] = []
    shard: _ShardWriter | None = None
    for batch, counted in batches:
        counts.update(counted)
        arrays = [_list_array(batch[name]) for name in columns]
        if not len(arrays[0]):
            continue
        shard = shard or _ShardWriter(directory / f"shard-{len(shards):05d}.arrow", columns)
        shard.write(arrays)
        if shard.tokens >= shard_tokens:
            shards.append(shard.close())
            shard = None
    if shard:
        shards.append(shard.close())
    for name in ("records", "tokens"):
        counts[name] = sum(each[name] for each in shards)
    return _write_manifest(directory, {**facts, "columns": list(columns), "counts": dict(counts), "shards": shards})


def join_stores(parts: Sequence[Path], directory: Path) -> dict[str, Any]:
    """Make one store of several by moving their shards, in this order; `UserError` unless all are alike. Returns the
    manifest."""
    manifests = [open_store(part).manifest for part in parts]
    joined = {**manifests[0], "sources": [], "shards": []}
    counts: Counter[str] = Counter()
    aside = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for part, manifest in zip(parts, manifests, strict=True):
        for name in manifest.keys() - {"sources", "shards", "counts"}:
            if manifest[name] != joined[name]:
                raise UserError(f"{part}: tokens of another {name} than those of {parts[0]}")
        counts.update(manifest["counts"])
        joined["sources"] += manifest["sources"]
        for shard in manifest["shards"]:
            name = f"shard-{len(joined['shards']):05d}.arrow"
            os.link(part / shard["file"], aside / name)
            joined["shards"].append({**shard, "file": name})
    manifest = _write_manifest(aside, {**joined, "counts": dict(counts)})
    os.replace(aside, directory)
    return manifest


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    manifest = json.loads(json.dumps(manifest))
    write_json(directory / MANIFEST, {**manifest, "checksum": _digest(json.dumps(manifest, sort_keys=True))})
    return manifest


class _ShardWriter:
    """One shard being written: record batches are appended, `close` makes it durable and describes it."""

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self.records, self.tokens = path, 0, 0
        self.schema = pa.schema([(name, COLUMN) for name in columns])
        self.file = open(path, "wb")
        self.stream = pa.ipc.new_stream(self.file, self.schema)

    def write(self, arrays: list[pa.ListArray]) -> None:
        self.stream.write_batch(pa.record_batch(arrays, schema=self.schema))
        self.records += len(arrays[0])
        self.tokens += len(arrays[0].values)

    def close(self) -> dict[str, Any]:
        self.stream.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {
            "file": self.path.name,
            "records": self.records,
            "tokens": self.tokens,
            "bytes": self.path.stat().st_size,
            "checksum": checksum(self.path),
        }


# --- converting ---------------------------------------------------------------------------------------------


def _converted(
    conversion: Conversion, files: Sequence[Path], tokenizer: PreTrainedTokenizerFast, num_proc: int
) -> Iterator[tuple[Columns, dict[str, int]]]:
    """Batches of rows converted in order, by this process or by `num_proc` others, with a progress bar."""
    batches = _batches(conversion.read(files))
    convert = partial(conversion.convert, **conversion.settings)
    results: Iterator[tuple[Columns, dict[str, int]]]
    if num_proc == 1:
        results = (convert(tokenizer, batch) for batch in batches)
    else:
        results = _in_processes(convert, tokenizer, batches, num_proc)
    with tqdm(desc=f"tokenising ({conversion.kind})", unit=" records", unit_scale=True, disable=None) as bar:
        for columns, counts in results:
            bar.update(len(columns[conversion.columns[0]]))
            yield columns, counts


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch, characters = [], 0
    for row in rows:
        batch.append(row)
        characters += len(row.get("text") or "")
        if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _in_processes(
    convert: Convert, tokenizer: PreTrainedTokenizerFast, batches: Iterable[list[dict[str, Any]]], num_proc: int
) -> Iterator[tuple[Columns, dict[str, int]]]:
    """Results in the order of the batches; a few batches per process are under way, so memory stays bounded."""
    # As `datasets.map` does: spawned processes would import torch and the calling script for seconds each.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(num_proc, context, initializer=_start_worker, initargs=(convert, tokenizer)) as pool:
        under_way: deque = deque()
        try:
            for batch in batches:
                under_way.append(pool.submit(_work, batch))
                if len(under_way) > 3 * num_proc:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


_worker: Callable[[list[dict[str, Any]]], tuple[Columns, dict[str, int]]]


def _start_worker(convert: Convert, tokenizer: PreTrainedTokenizerFast) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process, and none that a fork would miss
    if sys.platform == "linux":  # a killed parent must not leave processes behind that hold its lock
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _worker = partial(convert, tokenizer)


def _work(batch: list[dict[str, Any]]) -> tuple[Columns, dict[str, int]]:
    return _worker(batch)


def _list_array(lists: Sequence[Sequence[int] | np.ndarray]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, lists)])
    assert offsets[-1] < 2**31, "a batch fits into Arrow's 32-bit offsets"
    values = np.concatenate(lists).astype(np.int32, copy=False) if len(lists) else np.empty(0, np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.int32()))


# --- hashes -------------------------------------------------------------------------------------------------


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash of everything that decides the ids of a text or a conversation."""
    names = {name: str(getattr(tokenizer, name)) for name in ("eos_token", "pad_token", "bos_token")}
    return _digest(json.dumps([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, names]))


def checksum(path: Path) -> str:
    """xxh3-128 of a whole file: guards against damage, not against malice; as fast as the disk."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
