"""Prepare training data: `data/{pretrain,sft,dpo}/*.jsonl` in the documented formats, with validation splits.

python prepare_datasets.py                                  # every part from the hub
python prepare_datasets.py --sft --small                    # a slice of the SFT sources
python prepare_datasets.py --pretrain --language chinese --industry news_media --max_tokens 1e9
python prepare_datasets.py --sft --datasets smoltalk:apigen-80k gsm8k --deduplicate near
python prepare_datasets.py --mixture FILE.yaml              # sources with weights, small ones repeated
python prepare_datasets.py --source local --path DIR        # the same datasets from copies on disk
python prepare_datasets.py --source tiny                    # the built-in bilingual world, offline
python prepare_datasets.py --list                           # every known dataset

Interrupted, the same command goes on where it stopped. A dataset is named `[owner/]name[:config,…][@revision]`.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from smolkit import sources, tiny_world
from smolkit.errors import UserError, run
from smolkit.filters import Filters
from smolkit.sources.base import Source
from smolkit.sources.mixture import Mixture, prepare_mixture, read_mixtures, slug
from smolkit.sources.output import PROGRESS, REPORT, output_names, remove_earlier
from smolkit.sources.pipeline import Input, Limits, Settings, write_part
from smolkit.sources.selection import Selected, defaults, on_disk, on_hub, parse_dataset, refuse_overlap

PARTS = ("pretrain", "sft", "dpo")
# The built-in world has two parts more: the LoRA skill goes with SFT, the exam goes with everything.
TINY_PARTS = {"pretrain": {"pretrain"}, "sft": {"sft", "lora"}, "dpo": {"dpo"}}
TINY_OPTIONS = {"source", *PARTS, "output_dir", "small", "seed", "restart", "list"}  # all that it looks at
CHOICES = ("language", "industry", "quality")
SMALL_RECORDS = 1000
DEFAULT_TOKENS = 5e9


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", choices=["hub", "local", "tiny"], default="hub", help="where the data comes from")
    for part in PARTS:
        add(f"--{part}", action="store_true", help=f"prepare the {part} data (none named: all parts)")
    add("--datasets", nargs="+", metavar="NAME", help="take these datasets instead of the default ones")
    add("--mixture", type=Path, metavar="FILE.yaml", help="datasets with weights (see smolkit/sources/mixture.py)")
    add("--path", type=Path, help="with --source local: folder holding the datasets' folders")
    add("--output_dir", type=Path, default=Path("data"), help="default: data")
    add("--small", action="store_true", help=f"{SMALL_RECORDS} records of each dataset (tiny: 5 %%)")
    add("--max_records", type=int, help="records of each dataset")
    text = "pretraining tokens of each dataset, estimated at 4 bytes each (default: 5e9)"
    add("--max_tokens", type=float, default=DEFAULT_TOKENS, help=text)
    add("--language", nargs="+", help="of IndustryCorpus2: english, chinese (default: both)")
    add("--industry", nargs="+", help="of IndustryCorpus2: folder names such as news_media (default: all)")
    add("--quality", nargs="+", help="of IndustryCorpus2: high, middle, low (default: high)")
    text = "written-out reasoning of OpenO1-SFT: keep it or strip it (default: keep)"
    add("--thoughts", choices=["keep", "strip"], default="keep", help=text)
    add("--validation_fraction", type=float, default=0.02, help="share set aside (default: 0.02)")
    add("--seed", type=int, default=42, help="of every draw (default: 42)")
    add("--restart", action="store_true", help="begin afresh instead of going on with an unfinished run")
    text = "run on datatrove's executors (local, Slurm, Ray; see smolkit/sources/cluster.py)"
    add("--executor", type=Path, metavar="FILE.yaml", help=text)
    add("--list", action="store_true", help="print the known datasets and stop")
    group = parser.add_argument_group("filters (what each removed is in prepare_report.json)").add_argument
    group("--deduplicate", choices=["none", "exact", "near"], default="none", help="near: MinHash, and exact too")
    group("--near_threshold", type=float, default=0.8, help="Jaccard similarity that is near (default: 0.8)")
    group("--keep_languages", nargs="+", default=[], metavar="CODE", help="only texts in these, such as en zh")
    group("--min_characters", type=int, help="shortest text to keep")
    group("--max_characters", type=int, help="longest text to keep")
    group("--quality_rules", action="store_true", help="drop texts that break the rules of Gopher")
    text = "evaluation sets: drop texts that share 13 words (24 Chinese characters) in a row with them"
    group("--decontaminate", nargs="+", type=Path, default=[], metavar="FILE", help=text)
    args = parser.parse_args(argv)
    check(args, {name for name, value in vars(args).items() if value != parser.get_default(name)})
    return args


def check(args: argparse.Namespace, given: set[str]) -> None:
    """`given`: the options that have another value than their default. Raises UserError."""
    if (args.source == "local") != (args.path is not None):
        raise UserError("--source local needs --path DIR, and --path only goes with --source local")
    if args.source == "tiny" and (unused := sorted(given - TINY_OPTIONS)):
        raise UserError(
            f"{', '.join(f'--{name}' for name in unused)}: not with --source tiny, which always writes the same world; "
            "leave it out, and use --small for a smaller one"
        )
    if args.executor and args.mixture:
        raise UserError("--executor goes without --mixture (mix what it has written)")
    if args.executor and args.deduplicate == "near" and args.near_threshold != 0.8:
        raise UserError("--near_threshold: datatrove's MinHash has a fixed one; leave it out with --executor")
    if args.mixture and (args.datasets or args.pretrain or args.sft or args.dpo):
        raise UserError("--mixture names the parts and datasets itself; leave out --pretrain, --sft, --dpo, --datasets")
    if args.max_records is not None and (args.small or args.max_records < 1):
        raise UserError(f"--max_records {args.max_records}: must be at least 1 and not together with --small")
    for name in ("max_tokens", "min_characters", "max_characters", "near_threshold"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name)}: must be above 0")
    if args.near_threshold > 1:
        raise UserError(f"--near_threshold {args.near_threshold}: must be at most 1, the similarity of equal texts")
    if "near_threshold" in given and args.deduplicate != "near":
        raise UserError(f"--near_threshold {args.near_threshold}: only --deduplicate near uses it; leave it out")
    if not 0 <= args.validation_fraction < 1:
        raise UserError(f"--validation_fraction {args.validation_fraction}: must be from 0 to below 1")


def select(args: argparse.Namespace, parts: list[str]) -> list[Selected]:
    """The datasets the user named, or the default ones (locally: whatever is there)."""
    options = {name: getattr(args, name) for name in CHOICES}
    if not args.datasets:
        return defaults(parts, options, everything=args.source == "local")
    wanted = [parse_dataset(name, options) for name in args.datasets]
    refuse_overlap(args.datasets, wanted)
    if not all(each.source.part in parts for each in wanted):
        raise UserError(f"--datasets {' '.join(args.datasets)}: not all belong to the parts {', '.join(parts)}")
    return wanted


def refuse_unused_choices(args: argparse.Namespace, selected: Iterable[Source]) -> None:
    """Raises UserError when the user chose among files in a way that no dataset of the run has."""
    found = list(selected)
    for name in CHOICES:
        values = getattr(args, name)
        if values and not any(name in source.choices for source in found):
            having = " and ".join(source.name for source in sources.ALL if name in source.choices)
            raise UserError(f"--{name} {' '.join(values)}: only {having} has it, which is not selected; leave it out")


def earlier_revisions(folder: Path) -> dict[tuple[str, str], str]:
    """The commit of each source (repository, configuration) of an earlier run in `folder`, unfinished or not: the same
    command means the same data, whatever has become of "main" since."""
    for name, keys in ((PROGRESS, ("fingerprint",)), (".datatrove/settings.json", ()), (REPORT, ("settings",))):
        if (folder / name).exists():
            value = json.loads((folder / name).read_text("utf-8"))
            for key in keys:
                value = value.get(key, {})
            found = value.get("sources", [])
            return {(source["repo"], source.get("config", "")): source["revision"] for source in found}
    return {}


def locate(args: argparse.Namespace, wanted: Selected, folder: Path, limits: Limits) -> Input:
    """The dataset with its files."""
    if args.source == "local":
        return Input(wanted.source, on_disk(wanted, args.path), limits, config=wanted.config)
    revisions = {} if args.restart else earlier_revisions(folder)
    files, revision = on_hub(wanted, revisions.get((wanted.source.repo, wanted.config)))
    return Input(wanted.source, files, limits, revision, wanted.config)


def from_mixture(args: argparse.Namespace, part: str, mixture: Mixture, limits: Limits) -> list[Input]:
    """The inputs of a mixture's sources, in its order."""
    options = {name: getattr(args, name) for name in CHOICES}
    selected = [parse_dataset(share.dataset, options) for share in mixture.shares]
    refuse_overlap([share.dataset for share in mixture.shares], selected)
    inputs = []
    for share, wanted in zip(mixture.shares, selected, strict=True):
        if wanted.source.part != part:
            raise UserError(f"{args.mixture}: {share.dataset} is {wanted.source.part} data, not {part} data")
        own = Limits(share.max_records or limits.records, share.max_tokens or limits.tokens)
        inputs.append(locate(args, wanted, args.output_dir / part / ".sources" / slug(share.dataset), own))
    return inputs


def filter_options(args: argparse.Namespace) -> dict:
    """The arguments of `Filters`."""
    return {
        "min_characters": args.min_characters,
        "max_characters": args.max_characters,
        "quality": args.quality_rules,
        "languages": args.keep_languages,
        "decontaminate": args.decontaminate,
        "deduplicate": args.deduplicate,
        "near_threshold": args.near_threshold,
    }


def on_executors(args: argparse.Namespace, part: str, inputs: list[Input], settings: Settings) -> dict | None:
    """Raises UserError, also when datatrove is not there."""
    try:
        from smolkit.sources.cluster import prepare_on_cluster, read_plan
    except ImportError as error:
        need = "pip install -r requirements-datatrove.txt"
        raise UserError(f"--executor needs datatrove ({error}): {need}") from None
    plan, folder = read_plan(args.executor), args.output_dir / part
    return prepare_on_cluster(part, inputs, folder, settings, filter_options(args), plan, args.restart)


def print_sources() -> None:
    for source in sources.ALL:
        notes = [f"({word})" for word in ("default", "gated") if getattr(source, word)]
        columns = [f"{name}: {'|'.join(t.__name__ for t in types)}" for name, types in source.columns.items()]
        print(f"{source.part:9} {source.repo:40} {source.licence:16} {' '.join([source.size, *notes])}")
        print(f"{'':9} columns {', '.join(columns)}; files {' '.join(source.train)} at {source.revision}")
        for name, choice in source.choices.items():
            known = f" of {', '.join(choice.known)}" if choice.known else ""
            print(f"{'':9} {name}: {', '.join(choice.default)}{known}")
        for name, reason in source.refused.items():
            print(f"{'':9} {name} is refused: {reason}")


def print_report(part: str, folder: Path, report: dict) -> None:
    if report.get("already"):
        print(f"{part}: already prepared with these settings; --restart prepares it again")
    for name, source in report["sources"].items():
        repeats = f", {source['duplicate_prompts']} prompts not new" if source["duplicate_prompts"] else ""
        print(f"{part}: {name}: {source['read']} rows read, {source['written']} written{repeats}")
        for reason, dropped in source["dropped"].items():
            print(f"  {dropped['rows']} dropped: {reason} (for example {dropped['for_example'][0]})")
        if "mixture" in source:
            mixed = source["mixture"]
            print(f"  {mixed['share']:.1%} of the mixture: {mixed['rows']} rows, {mixed['passes']} passes")
    print(f"{part}: → {folder}")


def prepare_all(args: argparse.Namespace) -> None:
    """Look for every dataset before anything is written, then prepare part after part."""
    limits = Limits(SMALL_RECORDS if args.small else args.max_records, args.max_tokens)
    mixtures = read_mixtures(args.mixture) if args.mixture else {}
    named = [part for part in PARTS if getattr(args, part) or part in mixtures]
    parts = named or list(PARTS)
    if mixtures:
        inputs = {part: from_mixture(args, part, mixture, limits) for part, mixture in mixtures.items()}
    else:
        wanted = select(args, parts)
        refuse_unused_choices(args, (each.source for each in wanted))
        inputs = {part: [locate(args, w, args.output_dir / part, limits) for w in wanted if w.source.part == part]
                  for part in parts}  # fmt: skip
        inputs = {part: [each for each in found if each.files] for part, found in inputs.items()}
    refuse_unused_choices(args, (each.source for found in inputs.values() for each in found))
    absent = [part for part in parts if not inputs[part]]
    if absent and not args.datasets and (named or len(absent) == len(PARTS)):
        known = ", ".join(s.name for s in sources.ALL if s.part in absent)
        raise UserError(f"no dataset for {', '.join(absent)} in {args.path}; folders it could hold: {known}")
    for part in absent:
        print(f"{part}: no dataset of this part, nothing written")
    settings = Settings(args.seed, args.validation_fraction, args.thoughts)
    for part in (part for part in parts if part not in absent):
        folder = args.output_dir / part
        if args.executor:
            report = on_executors(args, part, inputs[part], settings)
            if report is None:
                print(f"{part}: submitted; repeat the command when the jobs are done: it says what they wrote")
                continue
        elif part in mixtures:
            filters = Filters(**filter_options(args))
            report = prepare_mixture(part, mixtures[part], inputs[part], folder, settings, filters, args.restart)
        else:
            report = write_part(part, inputs[part], folder, settings, Filters(**filter_options(args)), args.restart)
        print_report(part, folder, report)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.list:
        print_sources()
    elif args.source == "tiny":
        parts = [part for part in PARTS if getattr(args, part)] or PARTS
        tiny_parts = {"exam"}.union(*(TINY_PARTS[part] for part in parts))
        for part in parts:  # a report of other data that lay there would speak of these files
            (args.output_dir / part / REPORT).unlink(missing_ok=True)
        for path, count in tiny_world.write(args.output_dir, args.seed, tiny_parts, small=args.small).items():
            print(f"{count:7} rows  {path}")
        for part in tiny_parts:
            remove_earlier(args.output_dir / part, part, output_names(part))
    else:
        prepare_all(args)


if __name__ == "__main__":
    run(main)
