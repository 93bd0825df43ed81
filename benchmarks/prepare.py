"""How fast prepare_datasets.py converts, and how its memory grows with the input.

    python -m benchmarks.prepare                                    # speed per kind of file; memory at 10 and 100 MB
    python -m benchmarks.prepare --megabytes 10 100 1000 10000      # memory up to 10 GB (needs twice that on disk)

Prints JSON. Inputs are synthetic rows in the layouts of public datasets, every prompt a new one; each measurement is
the script in a process of its own, on one core. `mb_per_cpu_second` is the input's size over all CPU time of that
process, imports included. Everything is written under --directory and removed afterwards."""

import argparse
import json
import os
import random
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
START = "import sys, prepare_datasets; prepare_datasets.main(sys.argv[1:])"


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
        rows, lines = zip(*rows_of(make, megabytes), strict=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
        return sum(map(len, lines))
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(line for _, line in rows_of(make, megabytes))
    return path.stat().st_size


def measure(directory: Path, kind: str, megabytes: float, more: list[str]) -> dict:
    """Convert that much input in a process of its own."""
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
    child = subprocess.Popen(
        [sys.executable, "-c", START, *map(str, arguments)],
        cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(child.pid, 0)
    report = json.loads((output / part / "prepare_report.json").read_text("utf-8"))
    (source,) = report["sources"].values()
    assert status == 0 and source["read"] == source["written"] + sum(d["rows"] for d in source["dropped"].values())
    shutil.rmtree(copies)
    shutil.rmtree(output)
    cpu = usage.ru_utime + usage.ru_stime
    return {
        "kind": kind,
        "options": more,
        "megabytes": round(size / MB, 1),
        "rows": source["read"],
        "cpu_seconds": round(cpu, 2),
        "mb_per_cpu_second": round(size / MB / cpu, 1),
        "peak_memory_mib": round(usage.ru_maxrss / 1024),
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
        speed = [measure(directory, kind, args.speed, []) for kind in KINDS if args.speed]
        filters = [measure(directory, "OpenO1-SFT, JSON Lines", args.filters, f) for f in chosen if args.filters]
        memory = [measure(directory, "OpenO1-SFT, JSON Lines", size, []) for size in args.megabytes]
    print(json.dumps({"speed": speed, "filters": filters, "memory": memory}, indent=2))


if __name__ == "__main__":
    main()
