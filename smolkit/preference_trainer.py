"""The trainer of preference pairs: TRL's, its reference kept on disk and proven equal to the policy before step 1."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import TrainerCallback, TrainingArguments
from trl import DPOTrainer
from trl.models import prepare_deepspeed

from smolkit.errors import UserError
from smolkit.expert_trainer import ExpertParallelMixin
from smolkit.pairs import PairCollator, PairLossMixin, unpadded
from smolkit.preferences import load_reference, save_reference
from smolkit.scores import scored_positions

# Comparison of policy and reference before step 1, in nats per answer. Both see the same batches, so that even bf16
# leaves next to no rounding.
CHECKED_PAIRS = 64
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}


class PreferenceTrainer(ExpertParallelMixin, PairLossMixin, DPOTrainer):
    """TRL's trainer on pairs that are rendered already.

    `keep_reference`: (Dataset) -> file where the reference's log-probabilities of these pairs are kept.
    `packing`: the sides of a batch share rows instead of being padded. (TRL 1.16 has switched its own way off. A
    reference that is computed at every step, by TRL, is still padded.)
    """

    def __init__(self, *args: Any, keep_reference: Callable[[Dataset], Path], packing: bool = False, **kwargs: Any):
        self.keep_reference, self.packing = keep_reference, packing
        super().__init__(*args, **kwargs)
        self.data_collator = PairCollator(self.data_collator, self.processing_class.pad_token_id)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        """One after the other: the library would group these by length, too, and does not know how long a pair is."""
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Reference log-probabilities as two more columns: kept ones, or computed now and kept."""
        file = self.keep_reference(dataset)
        kept: list[tuple[list[float], list[float]] | None] = [None]
        if self.accelerator.is_main_process:
            kept[0] = load_reference(file, len(dataset))
        broadcast_object_list(kept)  # what one process found decides for all
        sides = kept[0]
        if sides is None:
            sides = self.log_probs(self.placed_reference(), dataset, batch_size)
            if self.accelerator.is_main_process and not save_reference(file, sides):
                print(f"warning: {file} cannot be written; the reference will be computed again next time")
        elif self.accelerator.is_main_process:
            print(f"{name}: the reference's log-probabilities are those of {file}", flush=True)
        chosen, rejected = sides
        dataset = dataset.add_column("ref_chosen_logps", chosen)
        return dataset.add_column("ref_rejected_logps", rejected)

    def placed_reference(self) -> torch.nn.Module:
        """The reference before training has placed the models."""
        if self.ref_model is not None or not self.is_deepspeed_enabled:
            return self.ref_model or self.model
        # the policy is not on its device yet, or in parts
        engine: Any = self._precompute_engine or prepare_deepspeed(self.model, self.accelerator)
        self._precompute_engine = engine
        return engine

    def log_probs(self, model: torch.nn.Module, dataset: Dataset, batch_size: int) -> tuple[list[float], list[float]]:
        """Summed log-probabilities of the chosen and the rejected answer of each pair under `model`."""
        columns = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
        # A loader draws a random number; training's must not depend on whether the results were kept from a former run.
        own = torch.Generator()
        loader = DataLoader(columns, batch_size=batch_size, collate_fn=self.data_collator, generator=own)
        results: tuple[list[float], list[float]] = ([], [])
        for batch in self.accelerator.prepare(loader):
            sides = self.accelerator.gather_for_metrics(self.compute_ref_log_probs(self.called(model), batch))
            for result, values in zip(results, sides, strict=True):
                result.extend(values.float().tolist())
        return results

    def policy_log_probs(self, dataset: Dataset, batch_size: int) -> tuple[list[float], list[float]]:
        """The same of the policy, its adapter on: without a reference model TRL would switch it off."""
        reference, self.ref_model = self.ref_model, self.model
        try:
            return self.log_probs(self.model_wrapped, dataset, batch_size)
        finally:
            self.ref_model = reference

    def _prepare_input(self, data: Any) -> Any:
        """On the device; the library would round the reference's log-probabilities to the dtype of DeepSpeed's weights.

        In bf16 -300 would become a multiple of 2: at learning rate 0 a loss of 0.68 to 0.70 instead of ln 2.
        """
        if isinstance(data, torch.Tensor):
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's, and the mean length of both sides among the metrics."""
        lengths = inputs["completion_mask"].sum(1).float().chunk(2)
        for side, values in zip(("chosen", "rejected"), lengths, strict=True):
            mean = self.accelerator.gather_for_metrics(values).mean().item()
            self._metrics["train" if model.training else "eval"][f"lengths/{side}"].append(mean)
        return super()._compute_loss(self.called(model), inputs, *args, **kwargs)

    def called(self, model: torch.nn.Module) -> Callable[..., Any]:
        """What TRL's losses call with a padded batch."""
        compute = unpadded(model) if self.packing else model

        def call(**inputs: Any) -> Any:
            with scored_positions():
                return compute(**inputs)

        return call

    def check_reference(self, tolerance: float) -> float:
        """Largest |log-ratio| of policy and reference over the first answers; `UserError` beyond tolerance.

        The policy runs in training mode and as the strategy has wrapped it, as it will in step 1.
        """
        batch_size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        whole_batches = -(-CHECKED_PAIRS // batch_size) * batch_size * self.accelerator.num_processes
        rows = self.train_dataset.select(range(min(whole_batches, len(self.train_dataset))))
        self.model.train()
        policy = self.policy_log_probs(rows, batch_size)
        if self.precompute_ref_logps:
            reference = (rows["ref_chosen_logps"], rows["ref_rejected_logps"])
        else:
            reference = self.log_probs(self.ref_model or self.model_wrapped, rows, batch_size)
        pairs = zip((*policy[0], *policy[1]), (*reference[0], *reference[1]), strict=True)
        worst = max(abs(ours - theirs) for ours, theirs in pairs)
        if not worst <= tolerance:
            raise UserError(
                f"policy and reference disagree before step 1: a log-ratio of {worst:.3g} where at most "
                f"{tolerance:.3g} is rounding. Both must start from the same SFT checkpoint: check --model_path "
                "and --ref_model_path"
            )
        return worst


class ReferenceCheck(TrainerCallback):
    """Compares policy and reference when everything is placed and nothing is trained yet."""

    def __init__(self, trainer: PreferenceTrainer, dtype: torch.dtype) -> None:
        self.trainer, self.tolerance = trainer, TOLERANCE[dtype]

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            return  # a continued run has moved away from its reference
        worst = self.trainer.check_reference(self.tolerance)
        if args.process_index == 0:
            print(f"check  policy and reference agree before step 1 (largest log-ratio {worst:.1e})", flush=True)
