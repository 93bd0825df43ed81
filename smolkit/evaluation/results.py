"""Figures and the items they are made of: intervals, metrics.json, tables, the model card, limits for CI."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from smolkit.errors import UserError
from smolkit.evaluation.statistics import CONFIDENCE, bootstrap, wilson
from smolkit.files import atomic_writer, write_json

# What one item contributes: yes or no, a number, or (numerator, denominator) of a ratio of sums.
Value = bool | float | tuple[float, float]
Interval = tuple[float, float]
METRICS, ITEMS, TABLE = "metrics.json", "items.jsonl", "metrics.md"
# Keys of metrics.json that are no figures, which no figure may take.
RESERVED = ("intervals", "shares", "data", "checksums", "settings")
NOT_EVALUATED = "Not evaluated: the losses above, if any, are all that is known of its quality."
_BEGIN, _END = "<!-- evaluation:begin -->", "<!-- evaluation:end -->"


def fraction(value: Value) -> tuple[float, float]:
    """Numerator and denominator of an item."""
    return (float(value[0]), float(value[1])) if isinstance(value, (tuple, list)) else (float(value), 1.0)


@dataclass(frozen=True)
class Figure:
    """One number of an evaluation, with its interval and, where it has any, its items by id."""

    value: float
    interval: Interval | None = None
    items: Mapping[str, Value] = field(default_factory=dict)
    data: str = ""
    checksum: str = ""  # of the data: figures of other data are not to be tested against each other
    expected: bool = False  # a share that nobody measured, as that of a guess

    @property
    def is_share(self) -> bool:
        """Whether the items are yes or no, or would be."""
        return self.expected or bool(self.items) and all(isinstance(value, bool) for value in self.items.values())


class Results:
    """Figures in the order in which they were added."""

    def __init__(self) -> None:
        self.figures: dict[str, Figure] = {}

    def add(self, name: str, values: Iterable[tuple[str, Value]]) -> None:
        """A figure from (item id, value): a share with its Wilson interval when all values are yes or no, else the mean
        or ratio of sums with a bootstrap interval (none for a single item). Repeated ids are numbered."""
        items: dict[str, Value] = {}
        for identifier, value in values:
            key, repeats = identifier, 1
            while key in items:
                repeats += 1
                key = f"{identifier}#{repeats}"
            items[key] = value
        assert items, f"{name}: a figure without items"
        above, below = zip(*(fraction(value) for value in items.values()), strict=True)
        figure = Figure(math.fsum(above) / math.fsum(below), items=items)
        interval = None
        if figure.is_share:
            interval = wilson(int(sum(above)), len(items))
        elif len(items) > 1 and math.isfinite(figure.value):
            interval = bootstrap(above, below)
        self._put(name, Figure(figure.value, interval, items))

    def number(self, name: str, value: float, interval: Interval | None = None) -> None:
        """A figure that is no mean of items."""
        self._put(name, Figure(value, interval))

    def expectation(self, name: str, share: float) -> None:
        """A share that is not measured but known, as that of a guess."""
        self._put(name, Figure(share, expected=True))

    def include(self, part: "Results", data: str = "", checksum: str = "") -> None:
        """Take over the figures of a measurement on `data` (a file name, a task) with that checksum."""
        for name, figure in part.figures.items():
            self._put(name, replace(figure, data=figure.data or data, checksum=figure.checksum or checksum))

    def _put(self, name: str, figure: Figure) -> None:
        if name in self.figures:
            raise UserError(f"two measurements are called {name!r}: rename the file or task of one of them")
        if name in RESERVED:
            raise UserError(f"{name!r} is a key of metrics.json and names no figure: rename the file or kind")
        self.figures[name] = figure

    def metrics(self, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The content of metrics.json (see the package's docstring)."""
        content: dict[str, Any] = {}
        for name, figure in self.figures.items():
            content[name] = figure.value if math.isfinite(figure.value) else None
            if figure.items:
                content[f"{name}_n"] = len(figure.items)
        named = self.figures.items()
        intervals = {name: figure.interval for name, figure in named if figure.interval}
        content["intervals"] = {name: list(i) for name, i in intervals.items() if all(map(math.isfinite, i))}
        content["shares"] = [name for name, figure in named if figure.is_share]
        content["data"] = {name: figure.data for name, figure in named if figure.data}
        content["checksums"] = {name: figure.checksum for name, figure in named if figure.checksum}
        content["settings"] = dict(settings or {})
        return content

    def write(self, directory: Path, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write items.jsonl, metrics.md and, last, metrics.json into `directory`; the content of metrics.json."""
        by_item: dict[str, dict[str, Value]] = {}
        for name, figure in self.figures.items():
            for identifier, value in figure.items.items():
                if all(map(math.isfinite, fraction(value))):  # JSON has no other numbers
                    by_item.setdefault(identifier, {})[name] = value
        write_rows(directory / ITEMS, [{"id": i, "values": values} for i, values in by_item.items()])
        metrics = self.metrics(settings)
        with atomic_writer(directory / TABLE) as file:
            file.write(evaluation_table(metrics) + "\n")
        write_json(directory / METRICS, metrics)
        return metrics


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON Lines, whole or not at all."""
    with atomic_writer(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- tables -------------------------------------------------------------------------------------------------


def figure_names(metrics: Mapping[str, Any]) -> list[str]:
    """Names of the figures in the content of a metrics.json, counts left out; null is one that was not finite."""
    numbers = [name for name, value in metrics.items() if value is None or isinstance(value, (int, float))]
    return [name for name in numbers if not (name.endswith("_n") and name.removesuffix("_n") in metrics)]


def shown(value: float | None, is_share: bool) -> str:
    """A figure for people: shares in percent."""
    if value is None:
        return "not finite"
    if is_share:
        return f"{100 * value:.1f} %"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def shown_interval(metrics: Mapping[str, Any], name: str) -> str:
    """The interval of a figure for people; empty where there is none."""
    if name not in metrics.get("intervals", {}):
        return ""
    low, high = metrics["intervals"][name]
    if name in metrics.get("shares", ()):
        return f"{100 * low:.1f} – {100 * high:.1f} %"
    return f"{low:.4f} – {high:.4f}"


def evaluation_table(metrics: Mapping[str, Any]) -> str:
    """The content of a metrics.json as a Markdown table, aligned for the terminal."""
    rows = [["figure", "value", f"{100 * CONFIDENCE:.0f} % interval", "items", "data"]]
    for name in figure_names(metrics):
        share = name in metrics.get("shares", ())
        count = str(metrics.get(f"{name}_n", ""))
        data = metrics.get("data", {}).get(name, "")
        rows.append([name, shown(metrics[name], share), shown_interval(metrics, name), count, data])
    return markdown_table(rows, "lrrrl")


def markdown_table(rows: Sequence[Sequence[str]], alignment: str) -> str:
    """Rows of cells, the first one the header, padded to equal width; `alignment` has l or r for each column."""
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(alignment))]
    rule = ["-" * (width - 1) + (":" if side == "r" else "-") for width, side in zip(widths, alignment, strict=True)]
    padded = [
        [cell.rjust(width) if side == "r" else cell.ljust(width)
         for cell, width, side in zip(row, widths, alignment, strict=True)]
        for row in (rows[0], rule, *rows[1:])
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


# --- the model card -----------------------------------------------------------------------------------------


def model_index(metrics: Mapping[str, Any], model_name: str) -> list[dict[str, Any]]:
    """The figures with an interval as the hub's `model-index` metadata; the rest (chances, counts, seconds) describes
    them."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="custom",
            dataset_name=metrics.get("data", {}).get(name, "evaluation"),
            dataset_config=metrics.get("data", {}).get(name),  # results of one type and configuration share one name
            metric_type=name,
            metric_value=metrics[name],
            metric_name=name,
        )
        for name in figure_names(metrics)
        if name in metrics.get("intervals", {})
    ]
    return eval_results_to_model_index(model_name, results) if results else []


def evaluation_section(metrics: Mapping[str, Any]) -> str:
    """The section of a model card, between marks by which it can be replaced."""
    note = "Shares have Wilson intervals, means bootstrap intervals over the items."
    return f"{_BEGIN}\n## Evaluation\n\n{evaluation_table(metrics)}\n\n{note}\n{_END}"


def card_beside(directory: Path) -> Path | None:
    """The model card of the checkpoint or adapter whose `eval` directory this is, or None."""
    home = directory.resolve().parent
    is_model = (home / "config.json").is_file() or (home / "adapter_config.json").is_file()
    return home / "README.md" if directory.name == "eval" and is_model and (home / "README.md").is_file() else None


def update_card(path: Path, metrics: Mapping[str, Any]) -> None:
    """Put the evaluation into the model card at `path`: its section, new or replaced, and the `model-index` of its
    metadata. Everything else of the card stays, but for the limit that there is none."""
    import yaml  # here, because tables alone need no YAML

    text = path.read_text(encoding="utf-8")
    front, body = "", text
    if text.startswith("---\n") and "\n---\n" in text:
        front, body = text[4:].split("\n---\n", 1)
    try:
        metadata = yaml.safe_load(front) or {}
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{path}: the metadata is not YAML ({problem}); mend or remove it") from None
    metadata.pop("model-index", None)
    if index := model_index(metrics, path.resolve().parent.name):
        metadata["model-index"] = index
    if _BEGIN in body and _END in body:
        before, rest = body.split(_BEGIN, 1)
        body = before + evaluation_section(metrics) + rest.split(_END, 1)[1]
    else:
        body = f"{body.rstrip()}\n\n{evaluation_section(metrics)}\n"
    body = body.replace(f"- {NOT_EVALUATED}\n", "")
    header = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    with atomic_writer(path) as file:
        file.write(f"---\n{header}---\n{body}")


# --- limits for CI ------------------------------------------------------------------------------------------


def read_limits(texts: Sequence[str], flag: str) -> dict[str, float]:
    """`name=limit` arguments; UserError for anything else."""
    limits = {}
    for text in texts:
        name, _, limit = text.partition("=")
        try:
            limits[name] = float(limit.removesuffix("%"))
        except ValueError:
            raise UserError(f"{flag} {text}: write NAME=LIMIT, such as qa_en=90") from None
    return limits


def check_limits(metrics: Mapping[str, Any], lowest: Mapping[str, float], highest: Mapping[str, float]) -> list[str]:
    """What is below or above its limit, one line each. Limits of shares are in percent; UserError for a figure that
    was not measured and for a limit of a share that looks like a fraction."""
    failures = []
    limits = [(*item, "below") for item in lowest.items()] + [(*item, "above") for item in highest.items()]
    for name, limit, side in limits:
        flag = f"--fail_{side}"
        if name not in figure_names(metrics):
            raise UserError(f"{flag} {name}: not measured; there are {', '.join(figure_names(metrics))}")
        share = name in metrics["shares"]
        if share and 0 < limit < 1:
            raise UserError(f"{flag} {name}={limit:g}: limits of shares are in percent; write {100 * limit:g}")
        if metrics[name] is None:
            failures.append(f"{name} is not finite, which no limit allows")
            continue
        value = round(100 * metrics[name] if share else metrics[name], 9)
        unit = " %" if share else ""
        if value < limit if side == "below" else value > limit:
            failures.append(f"{name} is {value:.4g}{unit}, {side} {limit:g}{unit}")
    return failures
