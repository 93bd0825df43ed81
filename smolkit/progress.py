"""What a run shows while it trains: the progress bar, `metrics.jsonl` and `timing.jsonl`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments


class Progress(TrainerCallback):
    """Progress bar on the terminal, `metrics.jsonl` (what was learned) and `timing.jsonl` (how fast) on disk.

    A resumed run first cuts the files back to the step it continues from, so no step appears twice.
    """

    _TIMING = ("_runtime", "_per_second", "total_flos", "train_loss")

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.directory = Path(args.output_dir)
        self.writes = state.is_world_process_zero
        self.started = self.last_time = time.perf_counter()
        self.tokens = 0
        if not self.writes:
            return
        for name in ("metrics.jsonl", "timing.jsonl"):
            self.tokens = max(self.tokens, _cut_back(self.directory / name, state.global_step))
        if not args.disable_tqdm:
            from tqdm.auto import tqdm

            every = 0.5 if sys.stderr.isatty() else 15.0  # a log file needs no animation
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, mininterval=every, dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(1)
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last window is logged even when it is a short one

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not getattr(self, "writes", False):
            return
        now = time.perf_counter()
        metrics = {"step": state.global_step}
        timing = {"step": state.global_step}
        for name, value in logs.items():
            (timing if any(part in name for part in self._TIMING) else metrics)[name] = value
        if "loss" in logs:
            speed = logs["tokens"] / (now - self.last_time)
            self.last_time = now
            self.tokens = metrics["tokens"] = self.tokens + logs["tokens"]
            timing["tokens_per_second"] = round(speed, 1)
            if self.bar is not None:
                self.bar.set_postfix_str(
                    f"loss {logs['loss']:.3f}, lr {logs['learning_rate']:.2g}, {speed:,.0f} tok/s",
                    refresh=False,
                )
        timing["elapsed_seconds"] = round(now - self.started, 3)
        _append(self.directory / "timing.jsonl", timing)
        if len(metrics) > 1 + ("epoch" in metrics):
            _append(self.directory / "metrics.jsonl", metrics)

    def on_evaluate(
        self, args: TrainingArguments, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        self.last_time = time.perf_counter()  # evaluation is not training time
        if self.bar is not None and metrics:
            self.bar.write(f"step {state.global_step}: validation loss {metrics.get('eval_loss', float('nan')):.4f}")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _append(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _cut_back(path: Path, step: int) -> int:
    """Keep the rows up to `step`; returns the last token count among them."""
    if not path.is_file():
        return 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [row for row in rows if row["step"] <= step]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return max((row.get("tokens", 0) for row in kept), default=0)
