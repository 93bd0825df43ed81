"""Runs side by side, with the significance of their differences on the items that both answered."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolkit.errors import UserError
from smolkit.evaluation.results import ITEMS, METRICS, Value, figure_names, fraction, markdown_table, shown
from smolkit.evaluation.statistics import mcnemar, paired_bootstrap
from smolkit.files import read_lines

SIGNIFICANT = 0.05
FEWEST = 10  # items for a bootstrap test: with fewer it finds differences that are not there


@dataclass(frozen=True)
class Run:
    """One evaluation on disk: the content of its metrics.json, and figure → item id → value."""

    name: str
    metrics: Mapping[str, Any]
    items: Mapping[str, Mapping[str, Value]]


def read_run(path: Path) -> Run:
    """The evaluation in `path` or, when that is a checkpoint, in its `eval` directory."""
    directory = path if (path / METRICS).is_file() else path / "eval"
    items: dict[str, dict[str, Value]] = {}
    try:
        metrics = json.loads((directory / METRICS).read_text(encoding="utf-8"))
        for line in filter(str.strip, read_lines(directory / ITEMS)):
            row = json.loads(line)
            for name, value in row["values"].items():
                items.setdefault(name, {})[row["id"]] = value
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: missing; evaluate {path} first (eval_model.py --model_path)") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory}: not an evaluation of eval_model.py ({error!r})") from None
    return Run(str(path), metrics, items)


def difference(first: Mapping[str, Value], second: Mapping[str, Value]) -> tuple[float, float, int] | None:
    """(second − first, p-value, number of items) on the items of both runs: McNemar's exact test where they are yes
    or no, else the paired bootstrap. None where they have none in common."""
    common = [identifier for identifier in first if identifier in second]
    if not common:
        return None
    pairs = [(first[i], second[i]) for i in common]
    if all(isinstance(value, bool) for pair in pairs for value in pair):
        better, worse = pairs.count((False, True)), pairs.count((True, False))
        return (better - worse) / len(pairs), mcnemar(better, worse), len(pairs)
    if len(pairs) < FEWEST:
        return None
    before, after = [fraction(a) for a, _ in pairs], [fraction(b) for _, b in pairs]
    change = sum(n for n, _ in after) / sum(d for _, d in after) - sum(n for n, _ in before) / sum(d for _, d in before)
    return change, paired_bootstrap(before, after)[2], len(pairs)


def same_data(baseline: Run, run: Run, name: str) -> bool:
    """Whether a figure of both runs was measured on the same data: equal ids alone do not say so."""
    return checksum(baseline, name) == checksum(run, name)


def checksum(run: Run, name: str) -> str | None:
    """That of a figure's data; None where it comes from no file."""
    found: str | None = run.metrics.get("checksums", {}).get(name)
    return found


def compared(baseline: Run, run: Run, name: str) -> dict[str, Any]:
    """One figure of `run`, and its difference from the baseline where it can be tested."""
    cell: dict[str, Any] = {"value": run.metrics.get(name)}
    if run is baseline or not same_data(baseline, run, name):
        return cell
    if found := difference(baseline.items.get(name, {}), run.items.get(name, {})):
        cell |= dict(zip(("difference", "p", "items"), found, strict=True))
    return cell


def on_other_data(runs: Sequence[Run]) -> list[str]:
    """A line for each run with figures that cannot be tested, because the first run measured them on other data."""
    baseline, lines = runs[0], []
    for run in runs[1:]:
        names = [name for name in run.items if name in baseline.items and not same_data(baseline, run, name)]
        if names:
            lines.append(f"not tested: {baseline.name} and {run.name} measured {', '.join(names)} on different data")
    return lines


def compare(runs: Sequence[Run]) -> dict[str, dict[str, dict[str, Any]]]:
    """figure → run → `{"value"}`, with `"difference"`, `"p"` and `"items"` against the first run."""
    names = dict.fromkeys(name for run in runs for name in figure_names(run.metrics))
    return {name: {run.name: compared(runs[0], run, name) for run in runs} for name in names}


def comparison_table(runs: Sequence[Run]) -> str:
    """`compare` as a Markdown table; differences of shares are in percentage points, `*` marks p < 0.05. Below it
    `on_other_data`."""
    shares = {name for run in runs for name in run.metrics.get("shares", ())}
    rows = [["figure", *(run.name for run in runs)]]
    for name, cells in compare(runs).items():
        rows.append([name, *(_cell(cells[run.name], name in shares) for run in runs)])
    return "\n".join([markdown_table(rows, "l" + "r" * len(runs)), *on_other_data(runs)])


def _cell(cell: Mapping[str, Any], is_share: bool) -> str:
    if cell["value"] is None:
        return ""
    text = shown(cell["value"], is_share)
    if "p" not in cell:
        return text
    change = f"{100 * cell['difference']:+.1f}" if is_share else f"{cell['difference']:+.4f}"
    return f"{text} ({change}, p {_p(cell['p'])}){'*' if cell['p'] < SIGNIFICANT else ' '}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
