"""What stops a training run before harm is done: signals, losses that are not finite, memory that grows, and a
word about jumps.

Once per step, after the gradients are there and before they are used, all processes compare notes (one small
reduction): has one of them been asked to stop, has one met a loss or gradient that is not finite? So all decide alike,
whichever process it happened to. A GPU would stand still meanwhile: there the update itself leaves out what is not
finite, and the notes are compared while the next step is computed, or before this one is logged or saved.
"""

import math
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from transformers import TrainerCallback

from smolkit.errors import STOPPED, Interrupted, UserError
from smolkit.optimizer import MasterAdamW
from smolkit.packing import SeededOrder
from smolkit.persistence import PersistenceMixin
from smolkit.runs import leave
from smolkit.runtime import KeptMemory

# SIGUSR1: SLURM's warning (--signal=USR1@300) to a process without a launcher; Windows has none.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
ECHO = 2.0  # seconds in which a second Ctrl-C is the launcher passing on the first


class Found(NamedTuple):
    """What a step's forward and backward passes gave, on its way from the device."""

    step: int  # complete before it
    losses: int
    values: torch.Tensor  # on the CPU: losses of the micro-batches, then the gradient norm if there is one
    arrival: torch.Event | None  # of the values; None where they are there

    def read(self) -> tuple[list[float], float | None]:
        """Losses and norm, waiting for them."""
        if self.arrival is not None:
            self.arrival.synchronize()
        values = self.values.tolist()
        return values[: self.losses], values[self.losses] if len(values) > self.losses else None


def _on_its_way(values: torch.Tensor) -> tuple[torch.Tensor, torch.Event | None]:
    """A copy on the CPU that nobody has waited for, and the event after which it may be read."""
    if values.device.type == "cpu":
        return values, None
    copy, arrival = values.to("cpu", non_blocking=True), torch.Event(values.device.type)
    arrival.record()
    return copy, arrival


class Spikes:
    """Tells when a loss is far above that of the last steps: by 6 deviations and by 0.5 nats.

    Both are robust: the level is a median of `NEEDED` steps, the deviation the median difference of neighbours among
    `SEEN` steps, which a steady fall does not widen.
    """

    SEEN, NEEDED = 50, 10

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=self.SEEN)
        self.quiet = 0  # steps without another warning

    def usual(self, loss: float) -> float | None:
        """The usual loss if this one is far above it, else None."""
        middle = None
        if len(self.losses) >= self.NEEDED and not self.quiet:
            median = statistics.median(list(self.losses)[-self.NEEDED :])
            deviation = 1.05 * statistics.median(abs(b - a) for a, b in pairwise(self.losses))  # 1.4826 / sqrt(2)
            if loss > median + max(6 * deviation, 0.5):
                middle, self.quiet = median, self.NEEDED
        self.quiet = max(0, self.quiet - 1)
        self.losses.append(loss)
        return middle


class Guard(TrainerCallback):
    """The trainer's callbacks on behalf of its `GuardMixin`."""

    def __init__(self, trainer: "GuardMixin"):
        self.trainer = trainer
        self.memory = KeptMemory()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stopping and state.global_step < state.max_steps:
            control.should_save = True
        # What follows now, if it writes anything: the end of an epoch, which a continued run would not repeat.
        strategies = (args.logging_strategy, args.eval_strategy, args.save_strategy)
        ends = state.epoch == round(state.epoch) or state.global_step >= state.max_steps
        self.trainer.epoch_ends = ends and any(strategy.value == "epoch" for strategy in strategies)
        self.memory.check()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save or self.trainer.save_is_due
        self.trainer.epoch_ends = self.trainer.save_is_due = False


class GuardMixin(PersistenceMixin):
    """Put before a trainer in the bases, and call `begin_guards` when it is built."""

    _order: SeededOrder | None  # of the rows, where it is ours

    def begin_guards(self) -> None:
        self._asked = 0  # the signal this process has received
        self.stopping = 0  # the signal that all processes agreed to stop for
        self.epoch_ends = False  # the step at hand is an epoch's last, and the epoch's end has something to write
        self.save_is_due = False  # then: after that, so that a continued run has it
        self._skipped = 0  # updates left out because of --skip_nonfinite
        self._losses: list[torch.Tensor] = []  # of the micro-batches of this step
        self._found: Found | None = None  # not looked at yet
        self._before: dict[str, Any] | None = None
        self._spikes = Spikes()
        self._group: Any = None
        self.add_callback(Guard(self))
        if self.is_deepspeed_enabled:
            if self.args.skip_nonfinite:
                raise UserError("--skip_nonfinite does not work with DeepSpeed, which updates inside its backward pass")
            self.accelerator.backward = self._checked(self.accelerator.backward)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self._signals():
            return super().train(*args, **kwargs)

    # agreement

    def ballots(self, *values: float) -> torch.Tensor:
        """The values of every process, (processes, values)."""
        mine = torch.tensor([values], dtype=torch.float64)
        if self.args.world_size == 1:
            return mine
        if self._group is None:  # on the CPU: the accelerator has nothing to wait for
            self._group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        every = mine.new_empty(self.args.world_size, len(values))
        dist.all_gather_into_tensor(every, mine, group=self._group)
        return every

    # signals

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Within: a signal finishes the step and saves. A second SIGINT aborts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        first = 0.0

        def handle(number: int, frame: Any) -> None:
            nonlocal first
            if number == signal.SIGINT and self._asked and time.monotonic() - first > ECHO:
                raise KeyboardInterrupt
            if not self._asked:
                self._asked, first = number, time.monotonic()

        before = {number: signal.signal(number, handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self._look()  # before what was found wrong is written down
        stops = self.stopping and self.state.global_step < self.state.max_steps  # at the last step only the end is left
        self.control.should_save = self.control.should_save or bool(stops)  # a signal that was only noticed now
        if self.epoch_ends:
            self.save_is_due, self.control.should_save = self.control.should_save, False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if not stops or self.epoch_ends:
            return
        self.finish_saving()
        self.callback_handler.on_train_end(self.args, self.state, self.control)
        leave(self)
        raise Interrupted(
            f"stopped by {signal.Signals(self.stopping).name} after step {self.state.global_step} of "
            f"{self.state.max_steps} and saved in {self.args.output_dir} (exit code {STOPPED}); "
            + (
                "weights without an optimizer (--save_only_model) cannot be continued, but be the --base_model of "
                "another run"
                if self.args.save_only_model
                else "the same command continues the run"
            )
        )

    # losses

    def begin_step(self) -> None:
        self._losses = []
        self._before = self.window_state() if self.args.skip_nonfinite else None

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._look()  # at the step before, while the device is busy with this one
        self._losses.append(loss)
        return loss

    def self_guarding(self) -> MasterAdamW | None:
        """The optimizer that leaves out an update by itself, so that nobody waits for a GPU before it; else None.

        Not with --skip_nonfinite, which takes the step's sums back: they must not hold another step's by then.
        """
        on_gpu = self.args.device.type == "cuda"
        return self.master_optimizer() if on_gpu and not self.args.skip_nonfinite else None

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The norm; between backward pass and update, so this is where the processes compare notes."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        found = self._losses if norm is None else [*self._losses, norm]
        if masters := self.self_guarding():
            values = torch.stack([value.detach().double() for value in found])
            masters.skip_if(~values.isfinite().all())
            self._found = Found(self.state.global_step, len(self._losses), *_on_its_way(values))
            return norm
        values = torch.tensor([float(value) for value in found], dtype=torch.float64)
        self._found = Found(self.state.global_step, len(self._losses), values, None)
        if not self._look():
            model.zero_grad(set_to_none=True)  # no gradient: the optimizer leaves weights and moments alone
            return 0.0
        return norm

    def loss_scale(self) -> float | None:
        """What fp16's losses are multiplied by, so that small gradients do not become 0; None with another dtype."""
        if self.accelerator.mixed_precision != "fp16":
            return None
        return float(self.deepspeed.optimizer.loss_scale if self.deepspeed else self.accelerator.scaler.get_scale())

    def _may_overflow(self) -> bool:
        """Whether an infinite norm may come of the loss scale, which is then halved and the update left out.

        DeepSpeed itself refuses to go on where no smaller scale is allowed, see `_checked`.
        """
        scale = self.loss_scale()
        return scale is not None and (self.is_deepspeed_enabled or scale > 1)

    def _look(self) -> bool:
        """At what the last step gave, if nobody has yet; False if its update is left out.

        `UserError` when it is not finite and may not be left out.
        """
        found, self._found = self._found, None
        if found is None:
            return True
        losses, norm = found.read()
        total = sum(losses)
        bad = not math.isfinite(total)
        bad = bad or norm is not None and not math.isfinite(norm) and not self._may_overflow()
        ballots = self.ballots(bad, self._asked, total)
        worst, asked, _ = ballots.amax(0).tolist()
        self.stopping = int(asked)
        if worst:
            self._leave_out(losses, norm, found.step)
            return False
        # a process's own is weighted by its share of the tokens: twice the mean where it has twice as many
        mean = float(ballots[:, 2].mean())
        usual = self._spikes.usual(mean)
        if usual is not None and self.args.process_index == 0:
            print(
                f"warning: the loss jumped to {mean:.3f} at step {found.step + 1}, from about "
                f"{usual:.3f}: look at the data there, or lower --learning_rate",
                flush=True,
            )
        return True

    def _leave_out(self, losses: list[float], norm: float | None, step: int) -> None:
        """Forget this step's sums, or raise `UserError` when no more updates may be skipped."""
        text = self._describe(losses, norm, step)
        if self._skipped >= self.args.skip_nonfinite:
            allowed = f", {self._skipped} skipped before" if self._skipped else ""
            # DeepSpeed's backward pass updates, and gives the norm afterwards.
            late = self.is_deepspeed_enabled and all(map(math.isfinite, losses))
            done = "the update with it was made, but not saved" if late else "nothing was updated with it"
            raise UserError(
                f"{text}; {done}{allowed}. Lower --learning_rate (now "
                f"{self._get_learning_rate():.2g}), raise --warmup_steps, look at the data of this batch, or let "
                "--skip_nonfinite N leave out up to N such updates"
            )
        skipped = self._skipped + 1
        assert self._before is not None, "kept when the step began"
        self.set_window_state(self._before)
        self._skipped = skipped
        self._globalstep_last_logged += 1  # the mean of the window is over the other steps
        if self.args.process_index == 0:
            print(f"warning: {text}; update skipped ({skipped} of {self.args.skip_nonfinite} allowed)", flush=True)

    def _describe(self, losses: list[float], norm: float | None, step: int) -> str:
        """What is not finite after `step` steps: step, process, micro-batch, rows."""
        mine = []
        for micro, loss in enumerate(losses):
            if not math.isfinite(loss):
                rows = self.rows_of(micro, step)
                where = f", rows {' '.join(map(str, rows))} of the training data" if rows else ""
                mine.append(f"process {self.args.process_index}, batch {micro + 1} of {len(losses)} in the step{where}")
                break
        value = next((loss for loss in losses if not math.isfinite(loss)), None)
        found = [(text, value) for text, value in gather_object([(mine[0] if mine else "", value)]) if text]
        if not found:
            return f"the gradient norm is {norm} at step {step + 1} (every loss is finite)"
        return f"the loss is {found[0][1]} at step {step + 1} ({'; '.join(text for text, _ in found)})"

    def rows_of(self, micro: int, step: int) -> list[int]:
        """Rows of the training data in a micro-batch of this process, after `step` steps; [] if unknown."""
        if self._order is None:
            return []
        size, processes = self._train_batch_size, self.args.world_size
        accumulation = self.args.gradient_accumulation_steps
        whole, rest = divmod(len(self._order), size * processes)
        batches = whole + bool(rest and not self.args.dataloader_drop_last)
        epoch, step = divmod(step, -(-batches // accumulation))
        order = copy(self._order)
        order.set_epoch(epoch)
        start = ((step * accumulation + micro) * processes + self.args.process_index) * size
        return [row for row in list(order)[start : start + size] if row < order.rows]

    def _checked(self, backward: Callable[..., None]) -> Callable[..., None]:
        """DeepSpeed updates inside the backward pass of a step's last micro-batch: look before it."""

        def checked(loss: torch.Tensor, **kwargs: Any) -> None:
            losses = [*(float(each) for each in self._losses), float(loss.detach())]
            if self.ballots(not math.isfinite(losses[-1])).any():
                self._leave_out(losses, None, self.state.global_step)
            try:
                backward(loss, **kwargs)
            except Exception as error:
                if "loss scale already at minimum" not in str(error):
                    raise
                text = self._describe(losses, math.inf, self.state.global_step)
                raise UserError(
                    f"{text}, in fp16 with the smallest loss scale; nothing was updated with it. Lower "
                    f"--learning_rate (now {self._get_learning_rate():.2g}), or train in bf16 (--bf16 true)"
                ) from None

        return checked
