"""Token ids on disk: literal contents, reuse, refusal of what belongs elsewhere, damage, kills, memory."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from smolkit import files, shards
from smolkit.arguments import PretrainArguments
from smolkit.chat import add_chat_tokens
from smolkit.doctor import read_pretrain
from smolkit.errors import UserError
from smolkit.packing import documents
from smolkit.shards import TokenStore, open_store, tokenized, write_store

ROOT = Path(__file__).resolve().parent.parent


def byte_tokenizer(*, first: int = 0) -> PreTrainedTokenizerFast:
    """Ids are the places of the 256 byte symbols in sorted order, counted from `first`."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: (i + first) % 256 for i, symbol in enumerate(symbols)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    add_chat_tokens(tokenizer)
    return tokenizer


def id_of(letter: str) -> int:
    return sorted(pre_tokenizers.ByteLevel.alphabet()).index(letter)


@pytest.fixture
def text(tmp_path) -> Path:
    return write_text(tmp_path / "text.jsonl", 1000)


def write_text(path: Path, rows: int) -> Path:
    random = np.random.default_rng(0)
    letters = (random.integers(97, 123, random.integers(1, 30)) for _ in range(rows))
    path.write_text("".join(json.dumps({"text": "".join(map(chr, each))}) + "\n" for each in letters))
    return path


def expected_ids(path: Path) -> list[list[int]]:
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    return [[*map(id_of, text), 256] for text in texts]


def contents(store: TokenStore) -> list[list[int]]:
    return [store.cut("input_ids", i).tolist() for i in range(len(store))]


def stores(cache: Path) -> list[Path]:
    """Finished stores; nothing else may be there but locks."""
    found = sorted(path for path in cache.iterdir() if not path.name.endswith(".lock"))
    assert all((path / "manifest.json").is_file() for path in found), found
    return found


CONVERSION = documents(256)


def test_contents_and_manifest_are_literal(tmp_path, text) -> None:
    store = tokenized(CONVERSION, [text], byte_tokenizer(), tmp_path / "cache")
    ids = expected_ids(text)
    assert contents(store) == ids
    assert store.lengths.tolist() == [len(each) for each in ids]
    assert store.cut("input_ids", 3, 1, 2).tolist() == ids[3][1:2]
    (directory,) = stores(tmp_path / "cache")
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["counts"] == {"records": 1000, "tokens": sum(map(len, ids))}
    assert manifest["sources"][0]["bytes"] == text.stat().st_size
    assert manifest["settings"] == {"end_id": 256}
    (shard,) = manifest["shards"]
    assert Dataset.from_file(str(directory / shard["file"]))["input_ids"][:3] == ids[:3], "a public format"


def test_many_shards_and_batches_keep_the_order(tmp_path) -> None:
    random = np.random.default_rng(0)
    columns = [
        {"a": [random.integers(0, 9, n) for n in sizes], "b": [random.integers(0, 9, n + 1) for n in sizes]}
        for sizes in ([3, 1, 4], [1], [], [5, 9, 2], [6])
    ]
    manifest = write_store(tmp_path / "s", ["a", "b"], [(c, {"odd": 1}) for c in columns], {}, shard_tokens=9)
    assert [(s["records"], s["tokens"]) for s in manifest["shards"]] == [(4, 9), (3, 16), (1, 6)]
    assert manifest["counts"] == {"records": 8, "tokens": 31, "odd": 5}
    store = open_store(tmp_path / "s")
    for name in ("a", "b"):
        expected = [ids.tolist() for batch in columns for ids in batch[name]]
        assert [store.cut(name, i).tolist() for i in range(8)] == expected
        assert store.dataset()[name][:] == expected


def test_processes_give_the_same_files(tmp_path) -> None:
    text = write_text(tmp_path / "text.jsonl", 3000)  # twelve batches
    for name, num_proc in (("one", 1), ("two", 2)):
        tokenized(CONVERSION, [text], byte_tokenizer(), tmp_path / name, num_proc)
    (one,), (two,) = stores(tmp_path / "one"), stores(tmp_path / "two")
    assert one.name == two.name
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()


def test_a_later_run_reads_the_store_and_changes_give_another(tmp_path, text) -> None:
    reads = []

    def read(files):
        reads.append(files)
        return read_pretrain(files)

    conversion, cache = replace(CONVERSION, read=read), tmp_path / "cache"
    first = contents(tokenized(conversion, [text], byte_tokenizer(), cache))
    moved = text.rename(tmp_path / "moved.jsonl")
    assert contents(tokenized(conversion, [moved], byte_tokenizer(), cache)) == first
    assert len(reads) == len(stores(cache)) == 1
    other = contents(tokenized(conversion, [moved], byte_tokenizer(first=1), cache))
    assert [[(i + 1) % 256 for i in ids[:-1]] for ids in first] == [ids[:-1] for ids in other]
    tokenized(replace(conversion, settings={"end_id": 257}), [moved], byte_tokenizer(), cache)
    moved.write_text(moved.read_text().replace("a", "b"))
    assert contents(tokenized(conversion, [moved], byte_tokenizer(), cache)) == expected_ids(moved)
    assert len(reads) == len(stores(cache)) == 4


def damage_byte(directory: Path) -> None:
    shard = directory / "shard-00000.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def cut_short(directory: Path) -> None:
    shard = directory / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])


def lose_shard(directory: Path) -> None:
    (directory / "shard-00000.arrow").unlink()


def lose_manifest(directory: Path) -> None:
    (directory / "manifest.json").unlink()


def change_manifest(directory: Path) -> None:
    manifest = directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"records": 1000', '"records": 999'))


def cut_manifest(directory: Path) -> None:
    manifest = directory / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_byte, r"shard-00000.arrow: damaged: its checksum"),
        (cut_short, r"shard-00000.arrow: damaged: [\d,]+ bytes where"),
        (lose_shard, r"shard-00000.arrow: damaged: 0 bytes where"),
        (lose_manifest, "manifest.json is unreadable"),
        (change_manifest, "manifest.json is damaged"),
        (cut_manifest, "manifest.json is unreadable"),
    ],
)
def test_damaged_stores_are_never_used(tmp_path, text, damage, message, capsys) -> None:
    expected = contents(tokenized(CONVERSION, [text], byte_tokenizer(), tmp_path / "cache"))
    (directory,) = stores(tmp_path / "cache")
    damage(directory)
    with pytest.raises(UserError, match=message) as error:
        open_store(directory)
    assert "\n" not in str(error.value)
    assert contents(tokenized(CONVERSION, [text], byte_tokenizer(), tmp_path / "cache")) == expected
    assert "tokenising again" in capsys.readouterr().out
    assert contents(open_store(directory)) == expected


KILLED = """
import os, signal, sys
from pathlib import Path
from smolkit import shards
from tests.test_shards import CONVERSION, byte_tokenizer, replace, read_pretrain

def read(files):
    for number, row in enumerate(read_pretrain(files)):
        if number == 2900:
            assert list(Path(sys.argv[2]).glob(".*.part/shard-00002.arrow")), "some shards are written"
            os.kill(os.getpid(), signal.SIGKILL)
        yield row

read.__module__ = read_pretrain.__module__  # its code is part of a store's name
shards.write_store.__defaults__ = (2000,)
shards.tokenized(replace(CONVERSION, read=read), [Path(sys.argv[1])], byte_tokenizer(), sys.argv[2], int(sys.argv[3]))
"""


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_killed_process_leaves_nothing_that_is_used(tmp_path, num_proc) -> None:
    text, cache = write_text(tmp_path / "text.jsonl", 3000), tmp_path / "cache"
    command = [sys.executable, "-c", KILLED, text, cache, str(num_proc)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (part,) = (path for path in cache.iterdir() if path.is_dir())
    assert part.name.endswith(".part") and not (part / "manifest.json").exists()
    assert contents(tokenized(CONVERSION, [text], byte_tokenizer(), cache)) == expected_ids(text)
    assert len(stores(cache)) == 1, "the remains are gone"


def test_who_comes_second_waits_for_the_first(tmp_path, text) -> None:
    reads, results = [], []

    def read(files):
        reads.append(files)
        time.sleep(0.3)  # long enough for all to be at the lock
        return read_pretrain(files)

    def work() -> None:
        store = tokenized(replace(CONVERSION, read=read), [text], byte_tokenizer(), tmp_path / "cache")
        results.append(contents(store))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
    assert results == [expected_ids(text)] * 4


def test_bad_rows_and_places_are_named_and_leave_nothing(tmp_path, text) -> None:
    with open(text, "a") as file:
        file.write('{"text": 5}\n')
    with pytest.raises(UserError, match=r"text.jsonl:1001: 'text' must be a string"):
        tokenized(CONVERSION, [text], byte_tokenizer(), tmp_path / "cache")
    assert stores(tmp_path / "cache") == []
    with pytest.raises(UserError, match=r"text.jsonl: cannot keep tokens there: .*--data_cache_dir"):
        tokenized(CONVERSION, [text], byte_tokenizer(), text)


def test_a_long_wait_is_announced(tmp_path, text, capsys, monkeypatch) -> None:
    store = tokenized(CONVERSION, [text], byte_tokenizer(), tmp_path / "cache")
    held = FileLock(store.directory.parent / f".{store.directory.name}.lock")
    held.acquire()
    acquire = FileLock.acquire

    def impatient(self, timeout=None, **more):
        if timeout is None:  # the wait without a limit comes after the announcement
            held.release()
        return acquire(self, timeout=timeout and 0.01, **more)

    monkeypatch.setattr(FileLock, "acquire", impatient)
    assert contents(tokenized(CONVERSION, [text], byte_tokenizer(), tmp_path / "cache")) == expected_ids(text)
    assert "waiting for the process that makes these tokens" in capsys.readouterr().out


def test_processes_are_at_least_one() -> None:
    with pytest.raises(UserError, match="--num_proc 0 must be at least 1"):
        PretrainArguments(data_path=["x"], num_proc=0).validate()


def test_memory_does_not_grow_with_the_data(tmp_path) -> None:
    def peak(batches: int) -> int:
        tokens = [(({"a": [np.full(500, i, np.int32) for i in range(100)]}), {}) for _ in range(1)]
        tracemalloc.start()
        arrow = pa.total_allocated_bytes()
        most = 0

        def stream():
            nonlocal most
            for _ in range(batches):
                most = max(most, pa.total_allocated_bytes() - arrow)
                yield {"a": [ids + 1 for ids in tokens[0][0]["a"]]}, {}

        write_store(tmp_path / str(batches), ["a"], stream(), {}, shard_tokens=2**20)
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most + python

    small, large = peak(10), peak(200)  # 2 MB and 40 MB of tokens
    assert large < 1.5 * small < 40e6 / 4


def test_a_store_can_be_named_and_another_tokenizer_is_refused(tmp_path, text) -> None:
    import train_pretrain  # slow to import, and a process of another test imports this file

    for name, first in (("right", 0), ("wrong", 1)):
        byte_tokenizer(first=first).save_pretrained(tmp_path / name)
    shape = "hidden_size=16 intermediate_size=16 num_hidden_layers=1 num_attention_heads=1 num_key_value_heads=1"

    def pretrain(data: Path, tokenizer: str, output: str) -> list[float]:
        train_pretrain.main(
            f"""--data_path {data} --tokenizer_path {tmp_path / tokenizer} --model_size tiny --block_size 32
            --max_steps 2 --logging_steps 1 --data_cache_dir {tmp_path}/cache --output_dir {tmp_path / output}
            --disable_tqdm true --model_overrides {shape}""".split()
        )
        rows = map(json.loads, (tmp_path / output / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if "loss" in row]

    losses = pretrain(text, "right", "one")
    (directory,) = stores(tmp_path / "cache")
    text.unlink()
    assert pretrain(directory, "right", "two") == losses
    with pytest.raises(UserError, match="tokens of another tokenizer .*--data_path") as error:
        pretrain(directory, "wrong", "three")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "three").exists()
    with pytest.raises(UserError, match="name no other data beside it"):
        shards.token_store([str(text), str(directory)])
    with pytest.raises(UserError, match="tokens of another kind"):
        open_store(directory, {"kind": "sft"})
    damage_byte(directory)
    with pytest.raises(UserError, match="damaged"):
        pretrain(directory, "right", "four")


def test_what_decides_the_ids_is_in_the_hash() -> None:
    hashes = [shards.tokenizer_hash(byte_tokenizer()), shards.tokenizer_hash(byte_tokenizer())]
    assert len(set(hashes)) == 1
    other = byte_tokenizer()
    other.chat_template += " "
    hashes.append(shards.tokenizer_hash(other))
    other = byte_tokenizer()
    other.add_special_tokens({"extra_special_tokens": ["<repo_name>"]})
    hashes.append(shards.tokenizer_hash(other))
    hashes.append(shards.tokenizer_hash(byte_tokenizer(first=1)))
    assert len(set(hashes)) == 4


def test_the_default_cache_follows_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("SMOLLM_CACHE", raising=False)
    assert files.default_cache_dir() == Path("/somewhere/smollm")
    monkeypatch.setenv("SMOLLM_CACHE", "/elsewhere")
    assert files.default_cache_dir() == Path("/elsewhere")
    monkeypatch.delenv("SMOLLM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.default_cache_dir() == Path(os.path.expanduser("~")) / ".cache" / "smollm"
