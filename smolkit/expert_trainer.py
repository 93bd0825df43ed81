"""What a trainer does differently when the experts of its model are spread over processes (see `parallel`)."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from smol_model import SmolForCausalLM
from smolkit import parallel
from smolkit.errors import UserError
from smolkit.files import write_json
from smolkit.training import TrainerMixin

PLACEMENT_FILE = "expert_parallel.json"  # in a checkpoint: how its optimizer state is kept, see saved_placement


class ExpertParallelMixin(TrainerMixin):
    """Put it first in the bases. Without spread experts it changes nothing."""

    experts: parallel.ExpertGroups | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        layers = parallel.spread_layers(self.model)
        self.experts = layers[0].groups if layers else None
        self._expert_load: torch.Tensor | None = None  # (N,) share of the slots by place in the group, this window
        if self.experts is None:
            return
        self._watch = layers[0].watch
        self._watch.read()
        if self.experts.crossing and self.args.process_index == 0:
            print(
                f"warning: --expert_parallel_size {self.experts.size} does not fit into one node: rows of every layer "
                "travel over the network; a size that divides the processes of a node is faster",
                flush=True,
            )

    # optimizer

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        if self.experts is None or self.optimizer is not None or self.wants_masters(model):
            return super().create_optimizer(model)
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = kind(self.parameter_groups(model), **settings)
        return self.optimizer

    def parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """Groups of their own for the experts: DeepSpeed wants them, and FSDP2 has them on another mesh."""
        groups = super().parameter_groups(model)
        if self.experts is None:
            return groups
        experts = parallel.expert_parameters(model)
        marks = ((False, {"name": "shared"}), (True, {"moe": True, "name": f"ep_size_{self.experts.size}"}))
        split = [
            {**group, **mark, "params": [p for p in group["params"] if (p in experts) == expert]}
            for expert, mark in marks
            for group in groups
        ]
        return [group for group in split if group["params"]]

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The first step after DeepSpeed took the model over: it needs to know of experts no longer.

        When saving and loading it would look for its own expert layers; what it writes for models without experts
        holds all that its processes differ in but the experts' weights, and those are in the native checkpoint.
        """
        wrapped = getattr(self.accelerator, "deepspeed_engine_wrapped", None)  # None while DeepSpeed starts
        if self.experts is not None and wrapped is not None:
            wrapped.engine.has_moe_layers = False
        return super().create_scheduler(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.experts is not None and not self.is_sharded_by_engine() and self.accelerator.sync_gradients:
            parallel.reduce_gradients(self.model)
        return loss

    def _clip_grad_norm(self, model: torch.nn.Module, max_norm: float | None = None) -> torch.Tensor | float:
        if self.experts is None or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        max_norm = self.args.max_grad_norm if max_norm is None else max_norm
        masters = self.master_optimizer()
        if masters is not None:
            return masters.clip_grad_norm(max_norm, parallel.sum_over_group(self.model))
        return parallel.clip_gradients(self.model, max_norm)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and self.experts is not None and not self.is_deepspeed_enabled:
            grad_norm = self._clip_grad_norm(model, float("inf"))
        return super()._get_grad_norm(model, grad_norm)

    def is_sharded(self) -> bool:
        return self.experts is not None or super().is_sharded()

    # what is logged

    def observe_router(self, outputs: Any) -> None:
        super().observe_router(outputs)
        if self.experts is not None and getattr(outputs, "router_stats", None) is not None:
            load = outputs.router_stats.load.detach()  # (L, E)
            load = load.view(len(load), self.experts.size, -1).sum(-1).mean(0)  # (N,)
            self._expert_load = load if self._expert_load is None else self._expert_load + load

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the loss: rows wanted from each place of a group (1: an equal share), seconds of its exchanges."""
        if self.experts is not None and "loss" in logs:
            seconds = self.accelerator.gather(torch.tensor([self._watch.read()], device=self.args.device))
            logs["expert_parallel/all_to_all_runtime"] = round(float(seconds.mean()), 4)
            logs["expert_parallel/all_to_all_runtime_max"] = round(float(seconds.max()), 4)
            if self._expert_load is not None:
                load = self.accelerator.reduce(self._expert_load / self._expert_load.sum(), "mean")
                for place, share in enumerate(load.tolist()):
                    logs[f"expert_parallel/load_{place}"] = share * self.experts.size
                self._expert_load = None
        super().log(logs, start_time)

    # checkpoints

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """All weights of the model by name, on the main process (call it on all), in fp32 where there are masters."""
        masters = self.master_optimizer()
        return parallel.whole_weights(self.model, self.args.should_save, masters.master_of() if masters else None)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A native directory with all experts, whatever the placement."""
        if self.experts is None:
            return super().save_model(output_dir, _internal_call)
        state = parallel.whole_weights(self.model, self.args.should_save)
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=state)
        return None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.experts is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        engine = "deepspeed" if self.is_deepspeed_enabled else "by name"
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            state = parallel.whole_optimizer_state(self._bare_optimizer(), self.model, self.args.should_save)
            if self.args.should_save:
                torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
                torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))
        if self.args.should_save:
            placement = {"expert_parallel_size": self.experts.size, "optimizer": engine}
            write_json(Path(output_dir) / PLACEMENT_FILE, placement)
        return None

    def _bare_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Refuse, before anything is loaded, a checkpoint whose optimizer state does not fit this placement.

        Only then FSDP2 takes the experts: a forward pass before training (as in DPO's check) must not be its first.
        """
        if resume_from_checkpoint is not None:
            saved, size = saved_placement(resume_from_checkpoint), self.experts.size if self.experts else 1
            engine = "deepspeed" if self.is_deepspeed_enabled else "by name"
            if engine == "by name":
                fits = self._is_whole(resume_from_checkpoint)
            else:
                fits = saved == {"expert_parallel_size": size, "optimizer": engine}
            if (self.experts is not None or saved["optimizer"] != "by number") and not fits:
                raise UserError(
                    f"{resume_from_checkpoint} keeps the optimizer state of --expert_parallel_size "
                    f"{saved['expert_parallel_size']} ({saved['optimizer']}), which {size} ({engine}) cannot continue; "
                    "its weights fit everywhere: start from it with --base_model and another --output_dir"
                )
        if self.experts is not None and self.is_fsdp_enabled:
            parallel.shard_over_replicas(self.model, self.accelerator.state.fsdp_plugin)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _is_whole(self, checkpoint: str) -> bool:
        """Whether its optimizer state is one file of whole tensors: any placement can cut its own parts out of it."""
        return saved_placement(checkpoint)["optimizer"] != "deepspeed" and (Path(checkpoint) / OPTIMIZER_NAME).is_file()

    def _is_placed_anew(self, checkpoint: str) -> bool:
        """Whether we load it: where experts are spread, or were; the library's own to the library's own is its work."""
        by_name = saved_placement(checkpoint)["optimizer"] == "by name"
        return by_name or (self.experts is not None and self._is_whole(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not self._is_placed_anew(resume_from_checkpoint):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        parallel.load_weights(self.model, self._saved_weights(resume_from_checkpoint))
        return None

    def _place_optimizer(self, checkpoint: str) -> None:
        saved = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
        if "param_groups" in saved:  # torch's own form, by number in the order of the groups of a model that is whole
            names = {parameter: name for name, parameter, _ in parallel.placed_parameters(self.model)}
            groups = super().parameter_groups(self.model)
            order = [names[parameter] for group in groups for parameter in group["params"]]
            state = {name: saved["state"][number] for number, name in enumerate(order)}
            saved = {"state": state, "groups": saved["param_groups"]}
        parallel.load_optimizer_state(self._bare_optimizer(), self.model, saved)

    def load_states(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._is_placed_anew(checkpoint):
            self._place_optimizer(checkpoint)
            schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
            count = len(self._bare_optimizer().param_groups)  # may differ; they all have the same learning rate
            schedule = {key: value[:1] * count if isinstance(value, list) else value for key, value in schedule.items()}
            self.lr_scheduler.load_state_dict(schedule)
            return
        super().load_states(checkpoint)
        if checkpoint is not None:
            self._load_experts_of_others(checkpoint)

    def _load_experts_of_others(self, checkpoint: str) -> None:
        """DeepSpeed wrote the experts of the first process only; stage 3 keeps all weights by process."""
        if self.experts is not None and not is_partitioned(self.model):
            parallel.load_weights(self.model, self._saved_weights(checkpoint), only_experts=True)

    def _load_best_model(self) -> None:
        self.finish_saving()
        best = self.state.best_model_checkpoint
        assert best is not None, "the library asks only where there is one"
        if not self._is_placed_anew(best):
            super()._load_best_model()
            if self.is_deepspeed_enabled:
                self._load_experts_of_others(best)
            return
        self._load_from_checkpoint(best)
        masters = self.master_optimizer()
        if masters is not None and (Path(best) / OPTIMIZER_NAME).is_file():
            self._place_optimizer(best)
        elif masters is not None:  # --save_only_model
            masters.take_weights()

    def _saved_weights(self, checkpoint: str) -> dict[str, torch.Tensor]:
        with parallel.whole_model():
            return SmolForCausalLM.from_pretrained(checkpoint, dtype=self.model.dtype).state_dict()


def is_partitioned(model: torch.nn.Module) -> bool:
    """Whether ZeRO-3 holds the weights."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def saved_placement(checkpoint: str | Path) -> dict[str, Any]:
    """How the optimizer state of a checkpoint is kept: "by name", parts of "deepspeed", or the library's "by number".

    Without expert parallelism the library keeps it: in whole tensors (one process, DDP) or in parts (FSDP, DeepSpeed).
    """
    file = Path(checkpoint) / PLACEMENT_FILE
    return json.loads(file.read_text()) if file.is_file() else {"expert_parallel_size": 1, "optimizer": "by number"}
