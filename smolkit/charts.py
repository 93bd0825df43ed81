"""Curves of a run: which there are, as SVG inside a page (light and dark by CSS variables) and as one PNG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from smolkit.files import atomic_writer
from smolkit.findings import series, smoothed

WIDTH, HEIGHT = 520, 240  # of a chart, in CSS pixels
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 30
MOST_POINTS = 600  # drawn of one line
COLOURS = ("#2f6fdf", "#d9731a", "#1a8f6b", "#a8409c")  # for the PNG; the page has them as --line-1, ...


@dataclass(frozen=True)
class Chart:
    """A panel: `lines` are (metric, label); `level` is a horizontal line to compare with; values times `scale`.

    `noisy`: a moving average is drawn over the points, where there are many.
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    level: float | None = None
    level_label: str = ""
    scale: float = 1.0
    noisy: bool = True


LOSS = Chart("Loss", (("loss", "training"), ("eval_loss", "validation")))
LEARNED = (
    Chart("Validation, bits per byte", (("eval_bits_per_byte", "validation"),)),
    Chart(
        "Rewards against the reference", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")), 0, "equal"
    ),
    Chart(
        "Reward margin", (("rewards/margins", "training"), ("eval_rewards/margins", "validation")), 0, "no preference"
    ),
    Chart(
        "Preference accuracy",
        (("rewards/accuracies", "training"), ("eval_rewards/accuracies", "validation")),
        0.5,
        "chance",
    ),
    Chart("Log-probability of an answer", (("logps/chosen", "chosen"), ("logps/rejected", "rejected"))),
    Chart("Gradient norm before clipping", (("grad_norm", "gradient norm"),)),
    Chart("Learning rate", (("learning_rate", "learning rate"),), noisy=False),
    Chart("Load of the experts", (("router/load_max", "busiest"), ("router/load_min", "idlest")), 1, "equal share"),
    Chart("Router entropy, nats", (("router/entropy", "entropy"),)),
    Chart("Experts left out, %", (("router/dropped", "places dropped"), ("router/dead", "experts idle")), scale=100),
)
SPEED = (
    Chart("Tokens per second", (("tokens_per_second", "tokens/s"),)),
    Chart("Model FLOPs utilisation, %", (("mfu", "MFU"),), scale=100),
    Chart("Memory, GiB", (("memory_bytes", "memory"),), scale=2**-30, noisy=False),
)


@dataclass(frozen=True)
class Line:
    """Points of one metric, scaled; `trend` is a moving average where there are enough of them."""

    metric: str
    label: str
    steps: list[int]
    values: list[float]
    noisy: bool = True

    @property
    def trend(self) -> tuple[list[int], list[float]] | None:
        width = len(self.values) // 25 // 2 * 2 + 1  # odd: the mean belongs to the step in its middle
        if width < 3 or not self.noisy:
            return None
        middle = self.steps[width // 2 : width // 2 + len(self.values) - width + 1]
        return middle, smoothed(self.values, width)


@dataclass(frozen=True)
class Panel:
    """A chart with its data."""

    chart: Chart
    lines: list[Line]
    steps: tuple[int, int]  # of the whole run: all panels have the same axis


def panels(metrics: Sequence[dict[str, Any]], timing: Sequence[dict[str, Any]], coin_toss: bool) -> list[Panel]:
    """The charts for which there is data. `coin_toss`: mark ln 2 in the loss, where that is chance."""
    loss = Chart(LOSS.title, LOSS.lines, math.log(2), "ln 2: a coin toss") if coin_toss else LOSS
    found = []
    steps = [row["step"] for row in (*metrics, *timing)]
    for charts, rows in (((loss, *LEARNED), metrics), (SPEED, timing)):
        for chart in charts:
            lines = []
            for metric, label in chart.lines:
                at, values = series(rows, metric)
                if values:
                    lines.append(Line(metric, label, at, [value * chart.scale for value in values], chart.noisy))
            if lines:
                found.append(Panel(chart, lines, (min(steps), max(*steps, min(steps) + 1))))
    return found


def thin(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most `MOST_POINTS` points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(values) <= MOST_POINTS:
        return list(steps), list(values)
    kept = {0, len(values) - 1}
    stretches = MOST_POINTS // 2 - 1
    for i in range(stretches):
        part = range(i * len(values) // stretches, (i + 1) * len(values) // stretches)
        kept |= {min(part, key=values.__getitem__), max(part, key=values.__getitem__)}
    order = sorted(kept)
    return [steps[i] for i in order], [values[i] for i in order]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within [low, high]."""
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A value as short as it can be read: 3.214, 0.00034, 12,400."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-")
    return f"{value:.4g}"


def bounds(panel: Panel) -> tuple[float, float, float, float]:
    """Steps from, to; values from, to, with some air and never of no extent."""
    values = [value for line in panel.lines for value in line.values]
    values += [] if panel.chart.level is None else [panel.chart.level]
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    # Nothing here but rewards and log-probabilities is ever negative: no axis below 0 for the others.
    return *panel.steps, max(low - air, 0.0) if low >= 0 else low - air, high + air


def svg(panel: Panel, index: int) -> str:
    """The panel as an `<svg>` element; lines have the classes line-1, line-2, ... of the page."""
    first, last, low, high = bounds(panel)

    def x(step: float) -> float:
        return round(LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(panel.chart.title)}" data-chart="{index}" '
        f'data-x="{first} {last}" data-y="{low!r} {high!r}">'
    ]
    for tick in ticks(low, high, 6):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y(tick) + 4}" text-anchor="end">{number(tick)}</text>')
    for tick in ticks(first, last):
        if tick == int(tick):
            parts.append(f'<text class="tick" x="{x(tick)}" y="{HEIGHT - 10}" text-anchor="middle">{tick:,.0f}</text>')
    if panel.chart.level is not None:
        height = y(panel.chart.level)
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height}" y2="{height}"/>')
        below = height < TOP + 14
        text = f'x="{WIDTH - RIGHT - 2}" y="{height + (13 if below else -5)}" text-anchor="end"'
        parts.append(f'<text class="level-label" {text}>{escape(panel.chart.level_label)}</text>')
    for number_, line in enumerate(panel.lines, start=1):
        few = len(line.values) <= 40
        curves = [(line.steps, line.values, "faint" if line.trend else "")]
        curves += [(*line.trend, "")] if line.trend else []
        for steps, values, kind in curves:
            points = " ".join(f"{x(a)},{y(b)}" for a, b in zip(*thin(steps, values), strict=True))
            parts.append(f'<polyline class="line-{number_} {kind}" points="{points}"/>')
        if few:
            dots = zip(line.steps, line.values, strict=True)
            parts += [f'<circle class="dot-{number_}" cx="{x(a)}" cy="{y(b)}" r="2.6"/>' for a, b in dots]
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="0" x2="0"/></svg>')
    return "".join(parts)


def write_png(found: Sequence[Panel], path: Path) -> None:
    """All panels in one picture."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    columns = min(3, len(found))
    size = (4.6 * columns, 2.9 * -(-len(found) // columns))
    picture, axes = pyplot.subplots(-(-len(found) // columns), columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.remove()
    for axis, panel in zip(axes.flat, found, strict=False):
        for line, colour in zip(panel.lines, COLOURS, strict=False):
            few = {"marker": "o", "markersize": 3} if len(line.values) <= 40 else {}
            label = line.label if len(panel.lines) > 1 else None
            steps, values = thin(line.steps, line.values)
            if line.trend:
                axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
                steps, values = thin(*line.trend)
            axis.plot(steps, values, color=colour, linewidth=1.4, label=label, **few)
        if panel.chart.level is not None:
            axis.axhline(panel.chart.level, color="grey", linewidth=0.8, linestyle="--")
        axis.set_xlim(*panel.steps)
        axis.set_title(panel.chart.title, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(panel.lines) > 1:
            axis.legend(frameon=False, fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step", fontsize=8)
    picture.tight_layout()
    with atomic_writer(path, "wb") as file:
        picture.savefig(file, format="png", dpi=110)
    pyplot.close(picture)
