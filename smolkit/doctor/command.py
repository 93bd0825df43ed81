"""The doctor's command line: examine files, print the findings, write cleaned copies."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smolkit.doctor.checkup import (
    Examiner,
    FileReport,
    as_json,
    examine,
    held_out_files,
    held_out_prompts,
    histogram,
    is_held_out,
    quantiles,
)
from smolkit.doctor.repair import Cleaned, clean, clean_path
from smolkit.doctor.rows import CHECKS, PRETRAIN_SUFFIXES, expand_paths
from smolkit.errors import UserError

EPILOG = """
Findings are printed as `file:line: what — remedy`. A problem keeps the row out of training and makes the exit
code 2; a warning does not (--strict: it does). Prompts are compared with those of the `validation/` folder beside
each file and of exam files on the same command line. `--fix` never touches the originals: it writes
DIR/<folder>/<name>.jsonl with the good rows as they are and the mendable ones mended (ShareGPT names, turns of
one role in a row, template markers at the ends of a text), and <name>.quarantine with the rest and the reasons;
leaked rows go there, too.
"""
BAR = 40  # characters of the longest bar of the histogram


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m smolkit.doctor",
        description=main.__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="FILE", help="data files, directories or glob patterns")
    add("--kind", choices=sorted(CHECKS), help="what the rows are (default: by the first row's fields)")
    add("--tokenizer_path", help="tokenizer directory: adds lengths in tokens and looks at loss masks")
    add("--max_length", type=int, help="tokens a conversation or pair may have in training")
    add("--sample", type=int, metavar="N", help="look at about N rows of each file, spread over it")
    add("--max_problems", type=int, default=20, help="findings printed per file (default: 20)")
    add("--strict", action="store_true", help="exit with 2 for warnings, too")
    add("--json", action="store_true", help="print one JSON object, with every finding")
    add("--fix", action="store_true", help="write a cleaned copy and a quarantine file for each file")
    add("--fix_dir", type=Path, default=Path("cleaned"), metavar="DIR", help="where (default: cleaned)")
    arguments = parser.parse_args(argv)
    for name, least in (("max_length", 1), ("sample", 1), ("max_problems", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value} is too small — at least {least}")
    if arguments.max_length is not None and arguments.tokenizer_path is None:
        raise UserError("--max_length counts tokens — give --tokenizer_path, too")
    if arguments.fix and arguments.sample is not None:
        raise UserError("--fix needs to see every row — leave --sample out")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Examine data files before they are trained on."""
    arguments = parse(argv)
    paths = expand_paths(arguments.paths, PRETRAIN_SUFFIXES)
    targets = _targets(paths, arguments.fix_dir) if arguments.fix else {}
    tokenizer = None
    if arguments.tokenizer_path:
        from smolkit.tokenizer import load_pretrained

        tokenizer = load_pretrained(arguments.tokenizer_path)
    held_out = held_out_prompts(held_out_files(paths, arguments.kind), arguments.kind)
    examiner = Examiner(arguments.kind, tokenizer, arguments.max_length, held_out)
    reports, cleaned = [], []
    for path in paths:
        report = examine(path, examiner, arguments.sample)
        reports.append(report)
        if not arguments.json:
            print(as_text(report, arguments.max_problems), flush=True)
        if arguments.fix:
            cleaned.append(clean(path, examiner, report.kind, targets[path]))
            if not arguments.json:
                print(_what_became(cleaned[-1]), flush=True)
    problems = sum(report.number("problem") for report in reports)
    warnings = sum(report.number("warning") for report in reports)
    if arguments.json:
        print(json.dumps(_machine(reports, cleaned, problems, warnings), ensure_ascii=False, indent=1))
    if problems or (arguments.strict and warnings):
        raise UserError(f"{problems:,} problems and {warnings:,} warnings found — see above, or --fix")


def _targets(paths: Sequence[Path], directory: Path) -> dict[Path, Path]:
    targets: dict[Path, Path] = {}
    for path in paths:
        target = clean_path(path, directory)
        if target in targets.values():
            raise UserError(f"--fix: two files would become {target} — clean them one by one, with other --fix_dir")
        targets[path] = target
    return targets


def _machine(reports: list[FileReport], cleaned: list[Cleaned], problems: int, warnings: int) -> dict[str, Any]:
    result: dict[str, Any] = {"problems": problems, "warnings": warnings, "files": [as_json(r) for r in reports]}
    if cleaned:
        result["cleaned"] = [{key: _plain(value) for key, value in vars(each).items()} for each in cleaned]
    return result


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _what_became(cleaned: Cleaned) -> str:
    counts = f"{cleaned.kept:,} rows as they were, {cleaned.mended:,} mended, {cleaned.quarantined:,} quarantined"
    return f"  wrote {cleaned.path} ({counts} in {cleaned.quarantine})"


def as_text(report: FileReport, limit: int) -> str:
    """The report for people, with at most `limit` findings."""
    held_out = ", held out" if is_held_out(report.path, report.kind) else ""
    lines = [
        f"{report.path}: {report.kind or 'unknown'}{held_out}, {report.rows:,} rows, "
        f"{_counted(report, 'problem')}, {_counted(report, 'warning')}"
    ]
    shown = [*report.problems, *report.warnings][:limit]
    lines += [f"  {'warning: ' if finding.severity == 'warning' else ''}{finding}" for finding in shown]
    hidden = report.counts.total() - len(shown)
    if hidden:
        lines.append(f"  ... and {hidden:,} more (--max_problems)")
    total = sum(report.languages.values())
    if total:
        shares = [f"{name} {100 * count / total:.1f} %" for name, count in report.languages.most_common()]
        lines.append(f"  languages   {', '.join(shares)}")
    for name in ("characters", "tokens"):
        figures = quantiles(getattr(report, name))
        if figures:
            lines.append(f"  {name:<11} " + ", ".join(f"{key} {value:,}" for key, value in figures.items()))
    if report.cut:
        lines.append(f"  {report.cut:,} conversations are cut after an earlier reply to fit")
    return "\n".join(lines + _bars(histogram(report.tokens)))


def _counted(report: FileReport, severity: str) -> str:
    codes = [f"{code} {n:,}" for (theirs, code), n in report.counts.most_common() if theirs == severity]
    return f"{report.number(severity):,} {severity}s" + (f" ({', '.join(codes)})" if codes else "")


def _bars(bins: list[tuple[int, int, int]]) -> list[str]:
    most, total = max((count for *_, count in bins), default=1), sum(count for *_, count in bins)
    return [
        f"  {first:>9,}–{last:<9,} {'#' * -(-BAR * count // most):<{BAR}} {count:>8,} ({100 * count / total:.1f} %)"
        for first, last, count in bins
    ]
