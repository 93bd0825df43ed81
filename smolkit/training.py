"""What all trainers share: mixins for `transformers.Trainer` and its TRL children, progress, the final model.

The mixin adds fp32 master weights, whole-or-absent checkpoints (`smolkit.persistence`), a stop at signals and at the
first non-finite loss (`smolkit.guards`), router statistics and cheap bookkeeping. `TokenLossMixin` adds the loss of
token prediction: a sum over trained tokens divided by their global number, in training and in evaluation.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from smol_model import SmolConfig, flops_per_token
from smolkit.checkpoints import save_final
from smolkit.guards import GuardMixin
from smolkit.optimizer import MasterAdamW
from smolkit.packing import IGNORE, SeededOrder, blank_row
from smolkit.persistence import PersistenceMixin
from smolkit.runs import complete

# --- trainers -----------------------------------------------------------------------------------------------


class TrainerMixin(GuardMixin, PersistenceMixin):
    """Put before `Trainer` or a TRL trainer in the bases. Nothing here depends on what is trained."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self._order: SeededOrder | None = None  # of the rows, where it is ours
        self.begin_persistence()  # first: it cuts the logs back to what progress continues
        self.begin_guards()
        self.progress = Progress()
        self.add_callback(self.progress)
        self._tokens = 0  # tokens this process has trained on since the last log, padding not counted
        self._flops_per_token: float | None = None
        self._router: dict[str, torch.Tensor] = {}
        self._router_batches = 0

    def _send_telemetry(self) -> None:
        """TRL reports each run to its authors; this toolkit makes no network calls of its own."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card is written once, with the final model."""

    # optimizer

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """fp32 masters for weights that are not fp32; else the library's choice."""
        model = self.model if model is None else model
        trainable = [p for p in model.parameters() if p.requires_grad]
        plain = self.is_deepspeed_enabled or self.is_fsdp_enabled or self.optimizer is not None
        if plain or all(p.dtype == torch.float32 for p in trainable):
            return super().create_optimizer(model)
        decayed = set(self.get_decay_parameter_names(model))  # not norms, not biases
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.optimizer = MasterAdamW(
            [
                {"params": [p for n, p in named if n in decayed], "weight_decay": self.args.weight_decay},
                {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
            ],
            lr=self.args.learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
        )
        return self.optimizer

    def master_optimizer(self) -> MasterAdamW | None:
        """The optimizer with the fp32 masters, out of accelerate's wrapper; None when there is none."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner if isinstance(inner, MasterAdamW) else None

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor | float:
        masters = self.master_optimizer()
        return masters.clip_grad_norm(self.args.max_grad_norm) if masters else super()._clip_grad_norm(model)

    # data

    def order_seed(self) -> int:
        """What the order of the rows depends on, beside the epoch."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def ordered_dataloader(self, dataset: Any, order: SeededOrder) -> DataLoader:
        """The library's training loader with an order of ours, which learns the epoch in a resumed one, too."""
        if len(dataset) != order.rows:  # accelerate takes the rest of a division for duplicates to drop from metrics
            dataset.total_dataset_length = len(order)
        loader = self._get_dataloader(
            dataset, "Training", self._train_batch_size, lambda _: order, is_training=True
        )
        self._order = order
        loader.set_sampler(order)  # where accelerate looks for it when batches are skipped
        return loader

    # steps

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        tokens = inputs.pop("tokens", None)  # counted by the collator, where there is no mask to count
        if tokens is None:
            tokens = inputs.get("attention_mask")
        self._tokens += inputs["input_ids"].numel() if tokens is None else int(tokens.sum())
        return super().training_step(model, inputs, num_items_in_batch)

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Training FLOPs of a micro-batch; the library's version counts the parameters anew at every step."""
        if self._flops_per_token is None:
            config = self.model.config
            length = inputs["input_ids"].shape[-1]
            exact = isinstance(config, SmolConfig)
            self._flops_per_token = flops_per_token(config, length) if exact else 6 * self.model.num_parameters()
        return self._flops_per_token * inputs["input_ids"].numel()

    def observe_router(self, outputs: Any) -> None:
        """Add one micro-batch to the router statistics of the log window; does nothing for dense models."""
        stats = getattr(outputs, "router_stats", None)
        if stats is None:
            return
        with torch.no_grad():
            load = stats.load * stats.load.shape[-1]  # 1 = an equal share
            values = {
                "router/aux_loss": stats.aux_loss.mean(),
                "router/z_loss": stats.z_loss.mean(),
                "router/entropy": stats.entropy.mean(),
                "router/dropped": stats.dropped.mean(),
                "router/load_max": load.amax(-1).mean(),
                "router/load_min": load.amin(-1).mean(),
            }
        for name, value in values.items():
            self._router[name] = self._router.get(name, 0.0) + value.detach()
        self._router_batches += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            window = torch.tensor(self._tokens, device=self.args.device)
            logs["tokens"] = int(self.accelerator.gather(window).sum())
            self._tokens = 0
            if self._router_batches:
                logs |= {name: float(value) / self._router_batches for name, value in self._router.items()}
                self._router, self._router_batches = {}, 0
            if self._skipped:
                logs["skipped_updates"] = self._skipped
        super().log(logs, start_time)


class TokenLossMixin:
    """Loss of token prediction by the model itself; put it before `TrainerMixin`.

    TRL's own loss also computes the entropy and accuracy of every token, which costs more than the loss.
    """

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        loss, outputs = Trainer.compute_loss(self, model, {**inputs, "use_cache": False}, True, num_items_in_batch)
        self.observe_router(outputs)
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self) -> DataLoader:
        """The library's, but rows that do not divide among the processes are filled up with blank ones."""
        if self.args.train_sampling_strategy != "random":
            return super().get_train_dataloader()
        processes = self.accelerator.num_processes
        multiple = processes * self._train_batch_size if processes > 1 else 1
        order = SeededOrder(len(self.train_dataset), self.order_seed(), multiple)
        if processes == 1:
            return self.ordered_dataloader(self.train_dataset, order)
        blank = [blank_row(self.processing_class.pad_token_id)]
        return self.ordered_dataloader(ConcatDataset([self.train_dataset, blank]), order)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Every `world_size`-th row on each process; a process that runs out gets a row without labels."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        padded = -(-len(rows) // world) * world

        def collate(numbers: list[int]) -> dict[str, torch.Tensor]:
            batch = self.data_collator([rows[min(number, len(rows) - 1)] for number in numbers])
            batch["labels"][torch.tensor(numbers) >= len(rows)] = IGNORE
            return batch

        return DataLoader(range(rank, padded, world), batch_size=self.args.eval_batch_size, collate_fn=collate)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean loss over trained *tokens*; the library averages over batches, whatever they hold."""
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        model = self.model_wrapped if sharded else self.model
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            inputs.pop("tokens", None)
            with torch.no_grad(), self.accelerator.autocast():
                # A divisor of 1 gives the sum; no cache and one position of logits keep it cheap.
                loss = model(**inputs, num_items_in_batch=1, use_cache=False, logits_to_keep=1).loss
            total += torch.stack((loss.double(), (inputs["labels"][:, 1:] != IGNORE).sum().double()))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss_sum, tokens = self.accelerator.reduce(total, "sum").tolist()
        metrics = {
            f"{metric_key_prefix}_loss": loss_sum / max(tokens, 1),
            f"{metric_key_prefix}_tokens": int(tokens),
        }
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(self.eval_dataset))


# --- callbacks ----------------------------------------------------------------------------------------------


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


# --- ending -------------------------------------------------------------------------------------------------


def final_weights(trainer: TrainerMixin) -> dict[str, torch.Tensor]:
    """The trained weights by name, in fp32 where there are masters. Call it on all processes (it gathers)."""
    masters = trainer.master_optimizer()
    if masters is None:
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)
    values = masters.master_of()
    return {name: values.get(parameter, parameter) for name, parameter in trainer.model.named_parameters()}


def finish(trainer: TrainerMixin, dtype: torch.dtype, card: str) -> None:
    """Write the complete final directory and mark the run as finished (weights on the main process only)."""
    state = final_weights(trainer)
    if trainer.args.should_save:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        save_final(model, state, trainer.processing_class, trainer.args.output_dir, dtype, card)
        complete(trainer.args, trainer.state.global_step)
    trainer.accelerator.wait_for_everyone()
