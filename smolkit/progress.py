"""What a run shows while it trains: the progress bar, `metrics.jsonl`, `timing.jsonl`, samples on the way.

`metrics.jsonl` holds what was learned and depends on nothing but the settings; `timing.jsonl` holds what depends on
the machine. Nothing is kept that is not in these files or in the trainer's own state, so a killed run continues from
a checkpoint by cutting the files back to its step.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from smol_config import SmolConfig
from smolkit.arguments import StageArguments
from smolkit.errors import UserError, writing
from smolkit.files import atomic_writer, read_lines
from smolkit.hardware import Peak, memory_used, peak
from smolkit.run_report import METRICS, RUN_FILES, SAMPLES, TIMING
from smolkit.runtime import product_dtype
from smolkit.samples import Samples, read_prompts


def watch(stage: StageArguments, tokenizer: PreTrainedTokenizerFast, config: SmolConfig, chat: bool) -> "Progress":
    """The progress of a training script, from its flags; `UserError` for sample prompts that cannot be answered.

    `chat`: a sample prompt is what a user says, not the beginning of a text.
    """
    samples = None
    if stage.sample_prompts:
        if stage.attn_implementation == "flash_attention_2":
            raise UserError("--sample_prompts: generation works with --attn_implementation sdpa and eager")
        room = config.max_position_embeddings - stage.sample_tokens
        prompts = read_prompts(stage.sample_prompts, tokenizer, chat, room)
        samples = Samples(prompts, tokenizer, stage.sample_tokens)
    return Progress(stage.peak_tflops, samples)


class Progress(TrainerCallback):
    """Bar on the terminal, rows on disk, and what the reporters (--report_to) get beside the losses.

    `peak_tflops`: of one device, for MFU; None takes the device's data sheet or measures. `samples`: prompts to answer
    at every checkpoint and at the end, if any. `evaluates`: whether there is something to evaluate on; then the last
    step does it too, so that every report ends with a validation loss.
    """

    _TIMING = ("_runtime", "_per_second", "total_flos", "train_loss")

    def __init__(self, peak_tflops: float | None = None, samples: Samples | None = None) -> None:
        self.peak_tflops, self.samples = peak_tflops, samples
        self.evaluates = False
        self.bar: Any = None
        self.writes = False
        self.last_time = 0.0  # also without training: an evaluation alone asks for it
        self.peak: Peak | None = None
        self.continued_tokens = 0  # of the open window, trained on before a checkpoint that this run continues

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        assert args.output_dir is not None, "every script has a default"
        self.directory = Path(args.output_dir)
        self.writes = state.is_world_process_zero
        self.device, self.processes = args.device, args.world_size
        self.tokens, self.flops = 0, state.total_flos
        self.last_step = state.global_step
        if self.writes:
            # samples.jsonl has "tokens", too: those of an answer
            self.tokens = {name: _cut_back(self.directory / name, state.global_step) for name in RUN_FILES}[METRICS]
            self.dtype = product_dtype(args.mixed_precision, next(model.parameters()).dtype)
            self.peak = peak(self.device, self.dtype, self.peak_tflops)
            print(f"MFU is measured against {self.peak} per process", flush=True)
            if not args.disable_tqdm:
                from tqdm.auto import tqdm

                every = 0.5 if sys.stderr.isatty() else 15.0  # a log file needs no animation
                done = {"total": state.max_steps, "initial": state.global_step}
                self.bar = tqdm(**done, mininterval=every, dynamic_ncols=True, unit="step")
        self.started = self.last_time = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(1)
        last = state.global_step >= state.max_steps
        if last:
            control.should_log = True  # the last window is logged even when it is a short one
            control.should_evaluate = control.should_evaluate or self.evaluates
        # By the steps at which checkpoints are due, not by `should_save`: a save on a signal must not add rows that
        # an undisturbed run would not have.
        due = args.save_strategy == SaveStrategy.STEPS and state.global_step % state.save_steps == 0
        if last or due:
            self._sample(model, state)

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.save_strategy == SaveStrategy.EPOCH and state.global_step < state.max_steps:
            self._sample(model, state)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not self.writes:
            return
        now = time.perf_counter()
        metrics = {"step": state.global_step}
        timing = {"step": state.global_step}
        for name, value in logs.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            (timing if any(part in name for part in self._TIMING) else metrics)[name] = value if finite else None
        if "loss" in logs:
            self.tokens = metrics["tokens"] = self.tokens + logs["tokens"]
            speed = self._speed(now - self.last_time, logs["tokens"] - self.continued_tokens, state)
            self.continued_tokens = 0
            timing |= speed
            logs |= speed  # the reporters come later in the list of callbacks and send it, too
            self.last_time, self.last_step, self.flops = now, state.global_step, state.total_flos
            if self.bar is not None:
                self.bar.set_postfix_str(
                    f"loss {logs['loss']:.3f}, lr {logs['learning_rate']:.2g}, "
                    f"{speed['tokens_per_second']:,.0f} tok/s, MFU {speed['mfu']:.0%}, "
                    f"{speed['memory_bytes'] / 2**30:.1f} GiB",
                    refresh=False,
                )
        timing["elapsed_seconds"] = round(now - self.started, 3)
        _append(self.directory / TIMING, timing)
        if len(metrics) > 1 + ("epoch" in metrics):
            _append(self.directory / METRICS, metrics)

    def on_evaluate(
        self, args: TrainingArguments, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        metrics = metrics or {}
        self.last_time += metrics.get("eval_runtime", 0.0)  # evaluation is not training time
        if self.bar is not None and "eval_loss" in metrics:
            bits = f", {metrics['eval_bits_per_byte']:.3f} bits per byte" if "eval_bits_per_byte" in metrics else ""
            self.bar.write(f"step {state.global_step}: validation loss {metrics['eval_loss']:.4f}{bits}")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _speed(self, seconds: float, tokens: int, state: Any) -> dict[str, float]:
        """Speed of a window of `seconds` on all processes together; memory of this one."""
        steps = state.global_step - self.last_step
        rate = (state.total_flos - self.flops) / seconds / self.processes
        assert self.peak is not None, "known since the run began"
        if rate > self.peak.flops:  # something else was running while it was measured
            again = peak(self.device, self.dtype, self.peak_tflops, again=True)
            if again.flops > self.peak.flops:
                self.peak = again
                print(f"faster than that: MFU is measured against {again} from here on", flush=True)
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "mfu": round(rate / self.peak.flops, 4),
            "memory_bytes": memory_used(self.device),
            "eta_seconds": round(seconds / max(steps, 1) * (state.max_steps - state.global_step), 3),
        }

    def _sample(self, model: Any, state: Any) -> None:
        if self.samples is None:
            return
        begin = time.perf_counter()
        rows = self.samples.answer(model, state.global_step)
        if self.writes:
            for row in rows:
                _append(self.directory / SAMPLES, row)
                if self.bar is not None:
                    self.bar.write(f"step {row['step']}: {self.samples.line(row)}")
        self.last_time += time.perf_counter() - begin


def _append(path: Path, row: dict[str, Any]) -> None:
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def _cut_back(path: Path, step: int) -> int:
    """Keep the rows up to `step`; returns the last token count among them. A last line cut off by a kill goes, too."""
    if not path.is_file():
        return 0
    kept = []
    for line in read_lines(path):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] <= step:
            kept.append((line, row))
    with writing(path), atomic_writer(path) as file:
        file.writelines(f"{line}\n" for line, _ in kept)
    return max((row.get("tokens", 0) for _, row in kept), default=0)
