"""Prepare training data: `data/{pretrain,sft,dpo}/*.jsonl` in the documented formats, with validation splits.

python prepare_datasets.py                                  # every part from the hub
python prepare_datasets.py --sft --small                    # a slice of the SFT sources
python prepare_datasets.py --source local --path DIR        # the same datasets from copies on disk
python prepare_datasets.py --source tiny                    # the built-in bilingual world, offline
python prepare_datasets.py --list                           # every known dataset
"""

import argparse
from pathlib import Path

from smolkit import sources, tiny_world
from smolkit.errors import UserError, run
from smolkit.sources.base import Source
from smolkit.sources.files import DataFile, find_folder, hub_files, local_files
from smolkit.sources.pipeline import Limits, write_part

PARTS = ("pretrain", "sft", "dpo")
# The built-in world has two parts more: the LoRA skill goes with SFT, the exam goes with everything.
TINY_PARTS = {"pretrain": {"pretrain"}, "sft": {"sft", "lora"}, "dpo": {"dpo"}}
SMALL_RECORDS = 1000
DEFAULT_TOKENS = 5e9


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source", choices=["hub", "local", "tiny"], default="hub", help="where the data comes from"
    )
    for part in PARTS:
        parser.add_argument(
            f"--{part}", action="store_true", help=f"prepare the {part} data (none named: all parts)"
        )
    parser.add_argument(
        "--datasets", nargs="+", metavar="NAME", help="take these datasets instead of the default ones"
    )
    parser.add_argument("--path", type=Path, help="with --source local: folder holding the datasets' folders")
    parser.add_argument("--output_dir", type=Path, default=Path("data"), help="default: data")
    parser.add_argument(
        "--small", action="store_true", help=f"{SMALL_RECORDS} records of each dataset (tiny: 5 %%)"
    )
    parser.add_argument("--max_records", type=int, help="records of each dataset")
    parser.add_argument(
        "--max_tokens",
        type=float,
        default=DEFAULT_TOKENS,
        help="pretraining tokens of each dataset, estimated at 4 bytes each (default: 5e9)",
    )
    parser.add_argument(
        "--validation_fraction", type=float, default=0.02, help="share set aside (default: 0.02)"
    )
    parser.add_argument("--seed", type=int, default=42, help="of every draw (default: 42)")
    parser.add_argument("--list", action="store_true", help="print the known datasets and stop")
    args = parser.parse_args(argv)
    if (args.source == "local") != (args.path is not None):
        raise UserError("--source local needs --path DIR, and --path only goes with --source local")
    if args.source == "tiny" and (args.datasets or args.max_records is not None):
        raise UserError(
            "--datasets and --max_records do not go with --source tiny; use --small for a smaller world"
        )
    if args.max_records is not None and (args.small or args.max_records < 1):
        raise UserError(f"--max_records {args.max_records}: must be at least 1 and not together with --small")
    if not 0 <= args.validation_fraction < 1:
        raise UserError(f"--validation_fraction {args.validation_fraction}: must be from 0 to below 1")
    return args


def chosen_sources(args: argparse.Namespace, parts: list[str]) -> list[Source]:
    """The datasets the user named, or the default ones (locally: whatever is there)."""
    if args.datasets:
        known = {name.lower(): source for source in sources.ALL for name in (source.name, source.repo)}
        unknown = [name for name in args.datasets if name.lower() not in known]
        if unknown:
            names = ", ".join(source.name for source in sources.ALL)
            raise UserError(f"--datasets {' '.join(unknown)}: unknown; known are {names}")
        wanted = [known[name.lower()] for name in args.datasets]
        if not all(source.part in parts for source in wanted):
            raise UserError(
                f"--datasets {' '.join(args.datasets)}: not all belong to the parts {', '.join(parts)}"
            )
        return wanted
    return [s for s in sources.ALL if s.part in parts and (s.default or args.source == "local")]


def locate(args: argparse.Namespace, wanted: list[Source]) -> list[tuple[Source, list[DataFile]]]:
    """Each dataset with its files; datasets not on disk are left out unless the user named them."""
    if args.source == "hub":
        return [(source, hub_files(source)) for source in wanted]
    if not args.path.is_dir():
        raise UserError(f"--path {args.path}: no such directory")
    found = []
    for source in wanted:
        folder = find_folder(source, args.path)
        files = local_files(source, folder) if folder else []
        if files:
            found.append((source, files))
        elif folder or args.datasets:
            patterns = " ".join(source.train)
            raise UserError(
                f"{folder or args.path / source.name}: no files of {source.repo}; expected {patterns}"
            )
    return found


def print_sources() -> None:
    for source in sources.ALL:
        notes = [f"({word})" for word in ("default", "gated") if getattr(source, word)]
        columns = [f"{name}: {'|'.join(t.__name__ for t in types)}" for name, types in source.columns.items()]
        print(f"{source.part:9} {source.repo:40} {source.licence:14} {' '.join([source.size, *notes])}")
        print(f"{'':9} columns {', '.join(columns)}; files {' '.join(source.train)} at {source.revision}")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.list:
        print_sources()
        return
    named = [part for part in PARTS if getattr(args, part)]
    parts = named or list(PARTS)
    if args.source == "tiny":
        tiny_parts = {"exam"}.union(*(TINY_PARTS[part] for part in parts))
        for path, count in tiny_world.write(args.output_dir, args.seed, tiny_parts, small=args.small).items():
            print(f"{count:7} rows  {path}")
        return
    located = locate(args, chosen_sources(args, parts))
    absent = [part for part in parts if not any(source.part == part for source, _ in located)]
    if absent and (named or len(absent) == len(PARTS)):
        known = ", ".join(s.name for s in sources.ALL if s.part in absent)
        raise UserError(f"no dataset for {', '.join(absent)} in {args.path}; folders it could hold: {known}")
    for part in absent:
        print(f"{part}: no known dataset in {args.path}, nothing written")
    limits = Limits(SMALL_RECORDS if args.small else args.max_records, args.max_tokens)
    for part in (part for part in parts if part not in absent):
        of_part = [(source, files) for source, files in located if source.part == part]
        tallies = write_part(part, of_part, args.output_dir, limits, args.seed, args.validation_fraction)
        for repo, tally in tallies.items():
            print(f"{part}: {repo}: {tally.read} rows read, {tally.written} written")
            for reason, count in tally.dropped.most_common():
                print(f"  {count} dropped: {reason}")
        print(f"{part}: → {args.output_dir / part}")


if __name__ == "__main__":
    run(main)
