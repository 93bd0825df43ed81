"""What all trainers share: mixins for `transformers.Trainer` and its TRL children, progress, the final model.

The mixin adds fp32 master weights, whole-or-absent checkpoints (`smolkit.persistence`), a stop at signals and at the
first non-finite loss (`smolkit.guards`), router statistics and cheap bookkeeping. `TokenLossMixin` adds the loss of
token prediction: a sum over trained tokens divided by their global number, in training and in evaluation.
"""

import math
import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import ConcatDataset, DataLoader
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from smol_config import SmolConfig, flops_per_token
from smol_model import SmolForCausalLM
from smolkit.checkpoints import save_final
from smolkit.errors import UserError, writing
from smolkit.guards import GuardMixin
from smolkit.optimizer import MasterAdamW
from smolkit.packing import IGNORE, GivenOrder, LengthGroupedOrder, SeededOrder, blank_row, row_lengths
from smolkit.parallel import clean_name, fsdp_version
from smolkit.progress import Progress
from smolkit.runs import complete, leave
from smolkit.tokenizer import token_bytes

DEAD = 0.1  # an expert with less than this part of an equal share of a micro-batch learns next to nothing


# --- trainers -----------------------------------------------------------------------------------------------


class TrainerMixin(GuardMixin):
    """Put before `Trainer` or a TRL trainer in the bases. Nothing here depends on what is trained."""

    def __init__(self, *args: Any, progress: Progress | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self._order = None
        self.progress = progress or Progress()
        self.progress.evaluates = self.eval_dataset is not None
        if self.progress.samples is not None:
            if self.is_sharded() and not isinstance(self.model, SmolForCausalLM):
                raise UserError("--sample_prompts: an adapter on sharded weights cannot generate; leave it out")
            self.progress.samples.whole = self.whole_model
        self.callback_handler.callbacks.insert(0, self.progress)  # before the reporters: it adds the speed to the logs
        self.begin_persistence()  # the first of the callbacks: it cuts back the logs that progress continues
        self.begin_guards()
        # tokens this process has trained on since the last log, padding not counted; a tensor once masks were counted
        self._tokens: int | torch.Tensor = 0
        self._flops_per_token: dict[int, float] = {}  # by the length of a row
        self._router: dict[str, torch.Tensor] = {}
        self._router_batches = 0

    def _send_telemetry(self) -> None:
        """TRL reports each run to its authors; this toolkit makes no network calls of its own."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card is written once, with the final model."""

    def create_accelerator_and_postprocess(self) -> None:
        """Let CPU processes shard, too: accelerate 1.15 takes FSDP up on GPUs only, and would quietly run DDP."""
        state = self.args.distributed_state
        if state.distributed_type == DistributedType.MULTI_CPU and fsdp_version(self.args):
            state.distributed_type = DistributedType.MULTI_GPU  # becomes FSDP; the device stays the CPU
        # A batch goes to the GPU while it still computes the step before.
        transfer: Any = self.args.accelerator_config
        transfer.non_blocking = self.args.device.type == "cuda" and self.args.dataloader_pin_memory
        # --torch_compile: one block for all of them (25 s of compiling SmolLM2-135M for a GPU instead of 84)
        os.environ.setdefault("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
        super().create_accelerator_and_postprocess()
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin and isinstance(policy := plugin.mixed_precision_policy, MixedPrecisionPolicy):
            # accelerate would round the loss to 16 bits on its way out, and add gradients up in them.
            plugin.mixed_precision_policy = replace(policy, output_dtype=None, reduce_dtype=torch.float32)

    # optimizer

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """fp32 masters for weights that are not fp32; else the library's choice."""
        model = self.model if model is None else model
        if self.optimizer is not None or not self.wants_masters(model):
            return super().create_optimizer(model)
        betas = (self.args.adam_beta1, self.args.adam_beta2)
        rate, eps = self.args.learning_rate, self.args.adam_epsilon
        groups, compiled = self.parameter_groups(model), self.args.torch_compile
        self.optimizer = MasterAdamW(groups, lr=rate, betas=betas, eps=eps, compiled=compiled)
        # Its state lies beside the weights. accelerate would place it by loading a copy of all of it: 12 bytes a
        # parameter twice, on a GPU in the worst moment.
        self.accelerator.prepare_optimizer = partial(_prepare_in_place, self.accelerator.prepare_optimizer)
        return self.optimizer

    def wants_masters(self, model: torch.nn.Module) -> bool:
        """Whether weights are kept twice: narrow to compute with, fp32 to add updates to (engines have their own)."""
        trainable = (parameter for parameter in model.parameters() if parameter.requires_grad)
        return not self.is_sharded_by_engine() and any(p.dtype != torch.float32 for p in trainable)

    def parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """Trained parameters with weight decay, and those without: norms and biases."""
        decayed = set(self.get_decay_parameter_names(model))
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return [
            {"params": [p for n, p in named if n in decayed], "weight_decay": self.args.weight_decay},
            {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
        ]

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor | float:
        masters = self.master_optimizer()
        return masters.clip_grad_norm(self.args.max_grad_norm) if masters else super()._clip_grad_norm(model)

    # data

    def order_seed(self) -> int:
        """What the order of the rows depends on, beside the epoch."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def ordered_dataloader(self, blank: Any, lengths: Callable[[Any], np.ndarray]) -> DataLoader:
        """The library's training loader in the order of --train_sampling_strategy, made of seed and epoch alone.

        `blank`: fills up rows that do not divide among the processes; `lengths`: of the rows, (N,).
        """
        processes, rows = self.accelerator.num_processes, self.train_dataset
        multiple = processes * self._train_batch_size if processes > 1 else 1
        if self.args.train_sampling_strategy == "group_by_length":
            step = self._train_batch_size * self.args.gradient_accumulation_steps * processes
            order: SeededOrder = LengthGroupedOrder(lengths(rows), self.order_seed(), step, multiple)
        else:
            kind = GivenOrder if self.args.train_sampling_strategy == "sequential" else SeededOrder
            order = kind(len(rows), self.order_seed(), multiple)
        end: Any = [blank]  # a list is dataset enough
        dataset: Any = rows if processes == 1 else ConcatDataset([rows, end])
        if len(dataset) != order.rows:  # accelerate takes the rest of a division for duplicates to drop from metrics
            dataset.total_dataset_length = len(order)
        loader = self._get_dataloader(dataset, "Training", self._train_batch_size, lambda _: order, is_training=True)
        self._order = order
        # where accelerate looks for it when batches are skipped
        loader.set_sampler(order)  # type: ignore[attr-defined]  # accelerate's loader
        return loader

    # steps

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        tokens = inputs.pop("tokens", None)  # counted by the collator, where there is no mask to count
        if tokens is None:
            mask = inputs.get("attention_mask")
            tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
        self._tokens = self._tokens + tokens
        return super().training_step(model, inputs, num_items_in_batch)

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:  # type: ignore[override]  # theirs says int
        """Training FLOPs of a micro-batch; the library's version counts the parameters anew at every step."""
        length = inputs["input_ids"].shape[-1]
        if length not in self._flops_per_token:
            config = self.model.config
            if isinstance(config, SmolConfig):
                flops = flops_per_token(config, length)
                products = flops_per_token(config, -1)  # without attention, whose length is T + 1
            else:
                flops = products = 6 * self.model.num_parameters()
            # ZeRO-3 leaves empty tensors on a process, and says how large they are
            sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in self.model.parameters()]
            frozen = sum(size for size, trained in sizes if not trained) / sum(size for size, _ in sizes)
            # frozen weights need no gradient of their own
            self._flops_per_token[length] = flops - frozen * products / 3
        return self._flops_per_token[length] * inputs["input_ids"].numel()

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
                "router/dead": (load < DEAD).float().mean(),
            }
        for name, value in values.items():
            self._router[name] = self._router.get(name, 0.0) + value.detach()
        self._router_batches += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            window = torch.tensor(int(self._tokens), device=self.args.device)
            logs["tokens"] = int(self.accelerator.gather(window).sum())
            self._tokens = 0
            if self._router_batches:
                logs |= {name: float(value) / self._router_batches for name, value in self._router.items()}
                self._router, self._router_batches = {}, 0
            if self._skipped:
                logs["skipped_updates"] = self._skipped
            if (scale := self.loss_scale()) is not None:
                logs["loss_scale"] = scale
        super().log(logs, start_time)

    # evaluation and samples

    def shared_out(self, count: int, collate: Callable[[list[int]], dict[str, torch.Tensor]]) -> DataLoader:
        """Every `world_size`-th of `count` row numbers on each process, on some one from `count` on to be as many."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        own: Any = range(rank, -(-count // world) * world, world)  # a dataset of numbers
        return DataLoader(own, batch_size=self.args.eval_batch_size, collate_fn=collate)

    def held_out(self, model: torch.nn.Module, dataloader: DataLoader) -> dict[str, float]:
        """The figures of an evaluation, on all processes."""
        raise NotImplementedError

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The figures of `held_out`. The library averages over batches, whatever they hold, and counts some rows twice
        to give each process the same number."""
        model = self.model_wrapped if self.is_sharded() else self.model
        model.eval()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.held_out(model, dataloader).items()}
        none: Any = None  # kept of what was predicted
        return EvalLoopOutput(predictions=none, label_ids=None, metrics=metrics, num_samples=len(self.eval_dataset))

    def last_evaluation(self) -> dict[str, float]:
        """Metrics of the finished model on the validation rows; evaluates only where training has not done so.

        The last step of a training evaluates; when the best checkpoint was loaded instead of the last one, that is
        another model.
        """
        for logs in reversed(self.state.log_history):
            if "eval_loss" in logs and logs["step"] == self.state.global_step:
                if not self.args.load_best_model_at_end or self.state.best_global_step == self.state.global_step:
                    return logs
        return self.evaluate()

    def is_sharded(self) -> bool:
        """Whether the weights may lie in parts on several processes."""
        return self.is_sharded_by_engine()

    def whole_model(self, model: torch.nn.Module) -> torch.nn.Module | None:
        """The model to sample from, on the main process; None on the others. Call it on all processes (it gathers)."""
        if not self.is_sharded():
            return self.accelerator.unwrap_model(model) if self.args.process_index == 0 else None
        state = final_weights(self)
        if self.args.process_index:
            return None
        with torch.random.fork_rng(devices=[]):  # training's random numbers are its own
            copy = SmolForCausalLM(deepcopy(self.model.config))  # type: ignore[arg-type]  # its class is ours, too
        missing, unexpected = copy.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= set(copy._tied_weights_keys), (missing, unexpected)
        dtype = next(self.model.parameters()).dtype
        return copy.to(device=self.args.device, dtype=dtype)  # type: ignore[call-arg]  # transformers hides its signature


def _prepare_in_place(prepare: Callable, optimizer: Any, device_placement: Any = None) -> Any:
    """accelerate's `prepare_optimizer`, which leaves the state where it is."""
    return prepare(optimizer, device_placement=False)


class TokenLossMixin(TrainerMixin):
    """Loss of token prediction by the model itself.

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
        return self.ordered_dataloader(blank_row(self.processing_class.pad_token_id), row_lengths)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """A process that runs out of rows gets one without labels."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset

        def collate(numbers: list[int]) -> dict[str, torch.Tensor]:
            batch = self.data_collator([rows[min(number, len(rows) - 1)] for number in numbers])
            batch["labels"][torch.tensor(numbers) >= len(rows)] = IGNORE
            return batch

        return self.shared_out(len(rows), collate)

    def byte_table(self) -> torch.Tensor | None:
        """Bytes of each token id, (V,), made once; None where the tokenizer has no such thing."""
        if not hasattr(self, "_byte_table"):
            sizes = token_bytes(self.processing_class)
            self._byte_table = None if sizes is None else torch.from_numpy(sizes).to(self.args.device)
        return self._byte_table

    def held_out(self, model: torch.nn.Module, dataloader: DataLoader) -> dict[str, float]:
        """Mean loss over trained *tokens*, and bits per byte."""
        table = self.byte_table()
        place = "cpu" if self.args.device.type == "mps" else self.args.device  # Apple's GPUs know no float64
        total = torch.zeros(3, dtype=torch.float64, device=place)  # nats, tokens, bytes
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            inputs.pop("tokens", None)
            with torch.no_grad(), self.accelerator.autocast():
                # A divisor of 1 gives the sum; no cache and one position of logits keep it cheap.
                loss = model(**inputs, num_items_in_batch=1, use_cache=False, logits_to_keep=1).loss
            predicted = inputs["labels"][:, 1:]
            predicted = predicted[predicted != IGNORE]
            total[0] += loss.to(place)
            total[1] += len(predicted)
            if table is not None:
                total[2] += table[predicted].sum().to(place)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        nats, tokens, size = self.accelerator.reduce(total, "sum").tolist()
        metrics = {"loss": nats / max(tokens, 1), "tokens": int(tokens)}
        if size:
            # Of exactly the text whose tokens were predicted. Control tokens (the end of a document or a reply) have no
            # bytes, but their nats count: the figure is an upper bound, and a tight one for longer texts.
            metrics |= {"bits_per_byte": nats / math.log(2) / size, "bytes": int(size)}
        return metrics


# --- ending -------------------------------------------------------------------------------------------------


def final_weights(trainer: TrainerMixin) -> dict[str, torch.Tensor]:
    """The trained weights by name, in fp32 where there are masters. Call it on all processes (it gathers).

    Under DeepSpeed and FSDP the main process gets them on the CPU, the others nothing they may use.
    """
    if getattr(trainer, "experts", None) is not None:
        return trainer.whole_weights()  # type: ignore[attr-defined]  # of ExpertParallelMixin
    masters = trainer.master_optimizer()
    if masters is not None:
        values = masters.master_of()
        return {name: values.get(parameter, parameter) for name, parameter in trainer.model.named_parameters()}
    if not trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        # FSDP gathers tied weights once for each of their names; compiled blocks have a name of the compiler's before.
        names = {clean_name(name) for name, _ in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}
        state = {clean_name(name): value for name, value in state.items()}
        return {name: value for name, value in state.items() if name in names}
    from deepspeed.utils import safe_get_full_fp32_param

    # The engine's own consolidation returns its 16-bit copies, which lose what --bf16 keeps in the masters.
    state = {}
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        value = safe_get_full_fp32_param(parameter)
        if trainer.args.should_save:
            state[name] = parameter.detach().cpu() if value is None else value.detach().to("cpu", copy=True)
    return state


def finish(trainer: TrainerMixin, dtype: torch.dtype, config: SmolConfig, facts: dict[str, Any]) -> None:
    """End a run: its final directory, then the process group (call it on all processes)."""
    write_final(trainer, dtype, config, facts)
    leave(trainer)


def write_final(trainer: TrainerMixin, dtype: torch.dtype, config: SmolConfig, facts: dict[str, Any]) -> None:
    """Write the complete final directory and mark the run as finished (weights on the main process only).

    facts: of the run, for its model card.
    """
    state = final_weights(trainer)
    if trainer.args.should_save:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        missing = {name for name, _ in model.named_parameters()} - state.keys()
        assert not missing, missing  # the library would write a directory without them, or without any weights
        with writing(trainer.args.output_dir):
            save_final(model, state, trainer.processing_class, trainer.args.output_dir, dtype)
        complete(trainer.args, trainer.state.global_step, config, facts)
    trainer.accelerator.wait_for_everyone()
