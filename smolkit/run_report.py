"""The report of one training run: verdict, curves, samples and figures as one self-contained page.

    python -m smolkit.run_report output/pretrain            # also while it runs, or after it was stopped

Reads what a run leaves in its directory (`metrics.jsonl`, `timing.jsonl`, `samples.jsonl`, settings) and writes
`report.html` (no other file or network needed), `curves.png` and `diagnosis.json` beside them. The training scripts do
so at their end.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from smolkit.charts import LEFT, RIGHT, Panel, number, panels, svg, thin, write_png
from smolkit.diagnosis import Diagnosis, diagnose
from smolkit.errors import UserError, run
from smolkit.files import atomic_writer, write_json
from smolkit.findings import Setting, series
from smolkit.manifest import checkpoints
from smolkit.report import read_rows

METRICS, TIMING, SAMPLES = RUN_FILES = ("metrics.jsonl", "timing.jsonl", "samples.jsonl")  # rows by step
PAGE = Path(__file__).with_name("report_page.html")
REPORT_FILES = ("report.html", "curves.png", "diagnosis.json")
MOST_ROWS, MOST_SAMPLES = 200, 8  # shown in the table of figures; of each prompt
VERDICTS = {
    "good": "This run looks good.",
    "note": "Too little to judge.",
    "warning": "Something here deserves a look.",
    "problem": "Something went wrong.",
}


@dataclass(frozen=True)
class Run:
    """What is on disk of a run."""

    name: str
    metrics: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    settings: dict[str, Any]
    setting: Setting
    finished: bool


def read_run(directory: Path) -> Run:
    """Raises `UserError` when there is no `metrics.jsonl`."""
    metrics, timing, samples = (read_rows(directory / name) for name in RUN_FILES)
    if not metrics:
        raise UserError(f"{directory / METRICS}: no rows; the training scripts write them every --logging_steps")
    settings = _json(directory / "run_settings.json")
    # The final files, or those of the newest checkpoint while the run is on its way.
    places = [directory, *reversed(checkpoints(directory))]
    config = next(filter(None, (_json(place / "config.json") for place in places)), {})
    arguments = next(filter(None, (_json(place / "training_arguments.json") for place in places)), {})
    losses = arguments.get("loss_type") or ["sigmoid"]
    setting = Setting(
        vocabulary=config.get("vocab_size"),
        losses=tuple([losses] if isinstance(losses, str) else losses),
        beta=arguments.get("beta"),
        experts=config.get("num_experts") or config.get("num_local_experts"),
        chosen=config.get("num_experts_per_tok"),
        clip=arguments.get("max_grad_norm"),
    )
    finished = (directory / "training_complete.json").is_file()
    return Run(directory.resolve().name, metrics, timing, samples, settings, setting, finished)


def write_report(directory: Path, finished: bool = False) -> str:
    """Write the files of the report; returns what to print: the findings and where the page is.

    `finished`: the run is, though the mark of it is not on disk yet.
    """
    found = read_run(directory)
    found = replace(found, finished=found.finished or finished)
    verdict = diagnose(found.metrics, found.setting)
    preferences = verdict.kind == "preferences"
    drawn = panels(found.metrics, found.timing, preferences and tuple(found.setting.losses) == ("sigmoid",))
    write_json(
        directory / "diagnosis.json",
        {
            "verdict": verdict.verdict,
            "kind": verdict.kind,
            "findings": [asdict(finding) for finding in verdict.findings],
            "metrics": [asdict(metric) for metric in verdict.explained],
        },
    )
    write_png(drawn, directory / "curves.png")
    with atomic_writer(directory / "report.html") as file:
        file.write(page(found, verdict, drawn))
    lines = verdict.lines()
    if preferences:
        lines += ["what the figures mean:"]
        lines += [f"  {m.name} {number(m.value)}: {m.meaning}" for m in verdict.explained if "logits" not in m.name]
    return "\n".join([*lines, f"report: {directory / 'report.html'}"])


# --- the page -----------------------------------------------------------------------------------------------


def page(found: Run, verdict: Diagnosis, drawn: Sequence[Panel]) -> str:
    """The whole HTML page."""
    data = [
        [
            {"label": line.label, "metric": line.metric, "steps": steps, "values": values}
            for line in panel.lines
            for steps, values in [thin(line.steps, line.values)]
        ]
        for panel in drawn
    ]
    parts = {
        "title": escape(found.name),
        "state": "finished" if found.finished else "so far",
        "level": verdict.verdict,
        "verdict": VERDICTS[verdict.verdict],
        "findings": "".join(map(_finding, verdict.findings)),
        "cards": "".join(_card(*card) for card in cards(found)),
        "charts": "".join(_figure(panel, i) for i, panel in enumerate(drawn)),
        "samples": _samples(found.samples),
        "explained": "".join(map(_meaning, verdict.explained)),
        "rows": _table(found.metrics),
        "settings": _settings(found.settings),
        # "</" would end the script element
        "data": json.dumps(data).replace("</", "<\\/"),
    }
    parts |= {"left": str(LEFT), "right": str(RIGHT)}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], PAGE.read_text(encoding="utf-8"))


def cards(found: Run) -> list[tuple[str, str, str]]:
    """The figures at the top: (label, value, small print)."""
    result = []

    def add(label: str, name: str, small: str = "", scale: float = 1.0, unit: str = "") -> None:
        steps, values = series(found.metrics, name)
        if values:
            result.append((label, number(values[-1] * scale) + unit, small or f"step {steps[-1]:,}"))

    add("training loss", "loss")
    add("validation loss", "eval_loss")
    add("bits per byte", "eval_bits_per_byte", "of validation text")
    add("held-out accuracy", "eval_rewards/accuracies", "of the preferences", 100, " %")
    add("reward margin", "rewards/margins")
    _, tokens = series(found.metrics, "tokens")
    if tokens:
        result.append(("tokens", short(tokens[-1]), f"{max(row['step'] for row in found.metrics):,} steps"))
    for label, name, scale, unit, small in (
        ("speed", "tokens_per_second", 1, "", "tokens/s, median"),
        ("MFU", "mfu", 100, " %", "of peak, median"),
    ):
        _, values = series(found.timing, name)
        if values:
            result.append((label, number(round(median(values) * scale, 1)) + unit, small))
    _, memory = series(found.timing, "memory_bytes")
    if memory:
        result.append(("memory", f"{max(memory) / 2**30:.1f} GiB", "at most"))
    seconds = elapsed(found.timing)
    if seconds:
        result.append(("time", duration(seconds), "in all"))
    return result


def elapsed(timing: Sequence[dict[str, Any]]) -> float:
    """Seconds of all parts of a run: the clock starts anew when it is continued."""
    _, clock = series(timing, "elapsed_seconds")
    return sum(before for before, after in zip(clock, [*clock[1:], 0.0], strict=False) if after < before)


def duration(seconds: float) -> str:
    """75 → "1 min 15 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def short(value: float) -> str:
    """1234567 → "1.23 M"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{value:,.0f}"


def _card(label: str, value: str, small: str) -> str:
    return f"<div class='card'><span>{escape(label)}</span><b>{escape(value)}</b><small>{escape(small)}</small></div>"


def _finding(finding: Any) -> str:
    remedy = (
        f"<p class='remedy'>{escape(finding.remedy[:1].upper() + finding.remedy[1:])}.</p>" if finding.remedy else ""
    )
    return f"<li class='{finding.level}'><i>{finding.level}</i><div><p>{escape(finding.text)}</p>{remedy}</div></li>"


def _meaning(metric: Any) -> str:
    name, meaning = escape(metric.name), escape(metric.meaning)
    return f"<tr><td><code>{name}</code></td><td class='n'>{number(metric.value)}</td><td>{meaning}</td></tr>"


def _figure(panel: Panel, index: int) -> str:
    names = "".join(f"<span class='key-{i}'>{escape(line.label)}</span>" for i, line in enumerate(panel.lines, start=1))
    legend = names if len(panel.lines) > 1 else ""
    return (
        f"<figure><figcaption><b>{escape(panel.chart.title)}</b><span class='legend'>{legend}</span>"
        f"<output></output></figcaption>{svg(panel, index)}</figure>"
    )


def _samples(rows: Sequence[dict[str, Any]]) -> str:
    """Answers by prompt, in the order of steps."""
    if not rows:
        return ""
    prompts = dict.fromkeys(row["prompt"] for row in rows)
    blocks = []
    for prompt in prompts:
        own = [row for row in rows if row["prompt"] == prompt]
        if len(own) > MOST_SAMPLES:  # evenly, with the first and the last
            own = [own[round(i * (len(own) - 1) / (MOST_SAMPLES - 1))] for i in range(MOST_SAMPLES)]
        answers = "".join(
            f"<tr><td class='n'>{row['step']:,}</td><td class='text' dir='auto'>{escape(row['answer'])}"
            + ("" if row["ended"] else f"<em title='stopped after {row['tokens']} tokens'>…</em>")
            + "</td></tr>"
            for row in own
        )
        blocks.append(
            f"<div class='sample'><p class='prompt' dir='auto'>{escape(prompt)}</p>"
            f"<table><thead><tr><th>step</th><th>answer</th></tr></thead><tbody>{answers}</tbody></table></div>"
        )
    note = "<p class='quiet'>Greedy answers to the same prompts; … marks those that were cut at the length limit.</p>"
    return f"<section><h2>Samples</h2>{note}{''.join(blocks)}</section>"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of metrics.jsonl, as they are; evenly thinned beyond `MOST_ROWS`."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if len(rows) > MOST_ROWS:
        rows = [rows[round(i * (len(rows) - 1) / (MOST_ROWS - 1))] for i in range(MOST_ROWS)]
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(_cell(row.get(name)) for name in columns)}</tr>" for row in rows)
    return f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"


def _cell(value: Any) -> str:
    if value is None:
        return "<td></td>"
    shown = number(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    return f"<td class='n' title='{escape(str(value))}'>{escape(shown)}</td>"


def _settings(settings: dict[str, Any]) -> str:
    rows = []
    for name, value in settings.items():
        if isinstance(value, dict):
            value = ", ".join(str(key) for key in value) if name == "inputs" else json.dumps(value, ensure_ascii=False)
        if value not in (None, [], {}, ""):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append(f"<tr><td><code>{escape(name)}</code></td><td class='text'>{escape(text)}</td></tr>")
    return "".join(rows)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, nargs="+", help="--output_dir of a training script")
    for directory in parser.parse_args(argv).run_dir:
        print(write_report(directory))


if __name__ == "__main__":
    run(main)
