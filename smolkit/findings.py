"""What a diagnosis is made of: findings, and figures drawn from the rows of `metrics.jsonl`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal

Level = Literal["good", "note", "warning", "problem"]
LEVELS: tuple[Level, ...] = ("good", "note", "warning", "problem")


@dataclass(frozen=True)
class Setting:
    """What is known of a run beside its rows; all of it optional.

    `vocabulary`: size; ln of it is the loss of guessing. `losses`: names of the preference losses. `beta`: of DPO.
    `experts`, `chosen`: experts of a layer, and how many a token goes to. `clip`: the gradient norm clipped to.
    """

    vocabulary: int | None = None
    losses: Sequence[str] = ("sigmoid",)
    beta: float | None = None
    experts: int | None = None
    chosen: int | None = None
    clip: float | None = None


@dataclass(frozen=True)
class Finding:
    """One thing the curves say. `code` is for machines, `remedy` may be empty."""

    level: Level
    code: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Explained:
    """One metric at the end of the run, and what it means."""

    name: str
    value: float
    meaning: str


# --- curves -------------------------------------------------------------------------------------------------


def series(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, where it is a finite number."""
    points = [(row["step"], float(row[name])) for row in rows if isinstance(row.get(name), int | float)]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]


def noise(values: Sequence[float]) -> float:
    """Standard deviation around the trend, from differences of neighbours (robust: median absolute deviation)."""
    steps = [b - a for a, b in zip(values, values[1:], strict=False)]
    if len(steps) < 2:
        return 0.0
    centre = median(steps)
    return 1.4826 * median(abs(step - centre) for step in steps) / math.sqrt(2)


def ends(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the first and of the last quarter, and three standard errors of their difference."""
    count = max(1, len(values) // 4)
    return fmean(values[:count]), fmean(values[-count:]), 3 * noise(values) * math.sqrt(2 / count)


def last(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    """Mean of the last quarter of a metric's values; None when there is none."""
    _, values = series(rows, name)
    return ends(values)[1] if values else None


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Means of `width` neighbours."""
    return [fmean(values[i : i + width]) for i in range(len(values) - width + 1)]
