"""How fast prepare_datasets.py converts, and how its memory grows with the input.

    python -m benchmarks.prepare                                    # speed per kind of file; memory at 10 and 100 MB
    python -m benchmarks.prepare --megabytes 10 100 1000 10000      # memory up to 10 GB (needs twice that on disk)

Prints JSON. Inputs are synthetic rows in the layouts of public datasets, every prompt a new one; each measurement is
the script in a process of its own. `mb_per_cpu_second` is the input's size (as JSON Lines) over the CPU time above that
of a run with three rows, which is mostly imports. Everything is written under --directory and removed afterwards."""

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow
import pyarrow.parquet

ROOT = Path(__file__).resolve().parent.parent
MB = 10**6
# The last line that it prints is its own peak of memory: the kernel's account of a child begins with its parent's.
START = (
    "import sys, prepare_datasets; prepare_datasets.main(sys.argv[1:]);"
    "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
)


def text_maker(seed: int = 0) -> Callable[[int], str]:
    """A function that gives that many characters of English, at random out of Python's own documentation."""
    rng, text = random.Random(seed), " ".join(" ".join(topics.values()).split())
    return lambda length: text[(start := rng.randrange(len(text) - length)) : start + length]


def openo1(text: Callable[[int], str], number: int) -> dict:
    """About 3.4 kB, as long worked answers are."""
    return {
        "instruction": f"{number} {text(250)}",
        "output": f"<Thought>{text(2600)}</Thought><Output>{text(500)}</Output>",
    }


def gsm8k(text: Callable[[int], str], number: int) -> dict:
    """About 550 bytes: where the cost of a row shows."""
    return {"question": f"{number} {text(230)}", "answer": f"{text(230)} <<48/2=24>>24\n#### 24"}


def smoltalk(text: Callable[[int], str], number: int) -> dict:
    """Four turns, about 1.8 kB."""
    turns = [("user", f"{number} {text(200)}"), ("assistant", text(800)), ("user", text(100)), ("assistant", text(700))]
    return {"messages": [{"role": role, "content": content} for role, content in turns], "source": "synthetic"}


def tiny_stories(text: Callable[[int], str], number: int) -> dict:
    """About 900 bytes."""
    return {"text": f"{number} {text(900)}"}


# name: (dataset, part, file inside its folder, maker of rows)
KINDS = {
    "OpenO1-SFT, JSON Lines": ("OpenO1-SFT", "sft", "OpenO1-SFT.jsonl", openo1),
    "gsm8k, JSON Lines": ("gsm8k", "sft", "train.jsonl", gsm8k),
    "smol-smoltalk, Parquet": ("smol-smoltalk", "sft", "data/train-0.parquet", smoltalk),
    "TinyStories, Parquet": ("TinyStories", "pretrain", "data/train-0.parquet", tiny_stories),
}


def rows_of(make: Callable, megabytes: float) -> Iterator[tuple[dict, str]]:
    """(row, its line of JSON), together about `megabytes`."""
    text, size, number = text_maker(), 0, 0
    while size < megabytes * MB:
        row = make(text, number)
        line = json.dumps(row) + "\n"
        yield row, line
        size, number = size + len(line), number + 1


def write_input(path: Path, make: Callable, megabytes: float) -> int:
    """Write the rows as JSON Lines or Parquet; returns their size as JSON Lines, bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        return write_parquet(path, rows_of(make, megabytes))
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(line for _, line in rows_of(make, megabytes))
    return path.stat().st_size


def write_parquet(path: Path, rows: Iterator[tuple[dict, str]]) -> int:
    """In row groups of 1000 rows, as on the hub."""
    size, writer = 0, None
    while group := list(itertools.islice(rows, 1000)):
        table = pyarrow.Table.from_pylist([row for row, _ in group])
        writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
        size += sum(len(line) for _, line in group)
    writer.close()
    return size


def measure(directory: Path, kind: str, megabytes: float, more: list[str], startup: float = 0) -> dict:
    """Convert that much input in a process of its own. `startup`: CPU seconds that count for nothing."""
    dataset, part, name, make = KINDS[kind]
    copies, output = directory / "copies", directory / "data"
    size = write_input(copies / dataset / name, make, megabytes)
    arguments = [
        "--source",
        "local",
        "--path",
        copies,
        "--output_dir",
        output,
        f"--{part}",
        "--datasets",
        dataset,
        *more,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ARROW_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", START, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    report = json.loads((output / part / "prepare_report.json").read_text("utf-8"))
    (source,) = report["sources"].values()
    assert source["read"] == source["written"] + sum(d["rows"] for d in source["dropped"].values())
    shutil.rmtree(copies)
    shutil.rmtree(output)
    return {
        "kind": kind,
        "options": more,
        "megabytes": round(size / MB, 1),
        "rows": source["read"],
        "cpu_seconds": round(cpu, 2),
        "mb_per_cpu_second": round(size / MB / (cpu - startup), 1) if cpu > startup else None,
        "peak_memory_mib": round(int(done.stdout.split()[-2]) / 1024),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", type=float, default=200, metavar="MB", help="input for each speed (0: none)")
    parser.add_argument("--filters", type=float, default=10, metavar="MB", help="input for each filter (0: none)")
    parser.add_argument("--megabytes", type=float, nargs="*", default=[10, 100], help="inputs for the memory curve")
    parser.add_argument("--directory", type=Path, help="where to write (default: the system's temporary directory)")
    args = parser.parse_args(argv)
    chosen = [["--deduplicate", "exact"], ["--deduplicate", "near"], ["--keep_languages", "en"], ["--quality_rules"]]
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        directory = Path(name)
        first, *_ = KINDS
        startup = min(measure(directory, first, 0.01, [])["cpu_seconds"] for _ in range(3))
        speed = [measure(directory, kind, args.speed, [], startup) for kind in KINDS if args.speed]
        filters = [measure(directory, first, args.filters, f, startup) for f in chosen if args.filters]
        kinds = (first, "TinyStories, Parquet")
        memory = [measure(directory, kind, size, [], startup) for kind in kinds for size in args.megabytes]
    print(json.dumps({"startup_cpu_seconds": startup, "speed": speed, "filters": filters, "memory": memory}, indent=2))


if __name__ == "__main__":
    main()
