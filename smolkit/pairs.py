"""Batches of preference pairs that do not divide evenly: every pair once per epoch, on any number of processes.

A step's loss is the mean over its pairs, wherever they are computed. Where an epoch ends in the middle of a batch,
processes have different numbers of pairs, some none; each loss is weighted by its share of the step's pairs. (The
library would train the first pairs of the epoch a second time, and give micro-batches equal weight whatever they hold.)

With `unpadded` the sides of a batch are computed in shared rows instead of being padded to the longest.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from smolkit.packing import IGNORE, best_fit, pair_lengths
from smolkit.training import TrainerMixin

# What TRL's head gives for every token, where it is asked for it.
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclass
class PairCollator:
    """TRL's collator on the pairs of a batch, without its blank ones (None); their number in `pairs`, (1,).

    A batch of blanks only becomes one pair of two equal answers, for a process that has to take part in the step.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any] | None]) -> dict[str, torch.Tensor]:
        pairs = [row for row in rows if row is not None]
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        blank = {name: [self.pad_token_id] for name in names} | {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}
        batch = self.collate(pairs or [blank])
        return {**batch, "pairs": torch.tensor([len(pairs)])}


class PairLossMixin(TrainerMixin):
    """Put before TRL's trainer of preference pairs; the trainer's collator is a `PairCollator`."""

    loss_types: list[str]  # TRL's
    loss_weights: list[float]

    def __init__(self, *args: Any, **kwargs: Any):
        self._lengths: dict[str, np.ndarray] = {}
        self._epoch: tuple[int, np.ndarray] | None = None  # its number, and the order of its pairs
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """With --train_sampling_strategy group_by_length, steps of pairs of similar length: less padding."""
        return self.ordered_dataloader(None, pair_lengths)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """A process that runs out of pairs gets a blank."""
        pairs = self.eval_dataset if eval_dataset is None else eval_dataset

        def collate(numbers: list[int]) -> dict[str, torch.Tensor]:
            rows: Any = [pairs[number] if number < len(pairs) else None for number in numbers]
            return self.data_collator(rows)

        return self.shared_out(len(pairs), collate)

    def held_out(self, model: torch.nn.Module, dataloader: DataLoader) -> dict[str, float]:
        """Mean loss over *pairs*; `log` has the other figures."""
        total = torch.zeros(2, dtype=torch.float64)  # loss, pairs
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            pairs = int(inputs["pairs"])
            with torch.no_grad(), self.accelerator.autocast():
                loss = self.compute_loss(model, inputs)
            total += torch.tensor([float(loss) * pairs, pairs], dtype=torch.float64)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss, pairs = self.ballots(*total.tolist()).sum(0).tolist()
        return {"loss": loss / pairs}

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss; in training weighted by this micro-batch's share of the pairs of the step."""
        pairs, processes = int(inputs.pop("pairs")), self.args.world_size
        lengths = self._step_lengths() if model.training else self._chosen_lengths("eval")
        self._metrics["train" if model.training else "eval"]["pairs"].append(self.ballots(pairs).sum().item())
        uneven = processes > 1 and (not model.training or len(lengths) < self._pairs_of_a_step())
        with self._uneven_gathers(pairs) if uneven else nullcontext(), self._likelihood(inputs, pairs, lengths):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        assert not isinstance(loss, tuple), "nothing asks for outputs"
        if not model.training:
            return loss
        weight = pairs * processes * self.current_gradient_accumulation_steps / len(lengths)
        return loss if weight == 1 else loss * weight

    def _pairs_of_a_step(self) -> int:
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _chosen_lengths(self, name: str) -> np.ndarray:
        """Tokens of the chosen answer of every pair, (N,), to train on or of "eval"."""
        if name not in self._lengths:
            pairs = self.eval_dataset if name == "eval" else self.train_dataset
            self._lengths[name] = pc.list_value_length(pairs.with_format("arrow")[:]["chosen_ids"]).to_numpy()
        return self._lengths[name]

    def _step_lengths(self) -> np.ndarray:
        """The same of the pairs of this step, on all processes and in all micro-batches."""
        assert self._order is not None, "made with the loader"
        whole, rows = self._pairs_of_a_step(), self._order.rows
        if self.args.dataloader_drop_last and self.args.world_size == 1:  # several fill up batches: none is dropped
            rows -= rows % self._train_batch_size
        if self._epoch is None or self._epoch[0] != self._order.epoch:
            self._epoch = self._order.epoch, np.fromiter(self._order, np.int64)[:rows]
        done = self.state.global_step % -(-rows // whole) * whole
        return self._chosen_lengths("train")[self._epoch[1][done : done + whole]]

    @contextmanager
    def _likelihood(self, inputs: dict[str, Any], pairs: int, lengths: np.ndarray) -> Iterator[None]:
        """Within: TRL's "sft" term, a mean over the tokens of the micro-batch, counts as its share of all tokens.

        `lengths`: chosen tokens of all pairs that the loss is a mean of. The loss as a whole is multiplied by the
        micro-batch's share of the pairs.
        """
        given = self.loss_weights
        if "sft" in self.loss_types and pairs:
            tokens = int(inputs["completion_mask"].chunk(2)[0][:, 1:].sum())
            scale = tokens / pairs * len(lengths) / float(lengths.sum())
            kinds = zip(self.loss_types, given, strict=True)
            self.loss_weights = [weight * scale if kind == "sft" else weight for kind, weight in kinds]
        try:
            yield
        finally:
            self.loss_weights = given

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL averages its metrics over batches; here each counts as many times as it has pairs."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        pairs = metrics.pop("pairs", [])
        for name, values in metrics.items():
            if len(values) == len(pairs) and len(set(pairs)) > 1:
                metrics[name] = [float(np.average(values, weights=pairs))]
        super().log(logs, *args, **kwargs)

    @contextmanager
    def _uneven_gathers(self, pairs: int) -> Iterator[None]:
        """Within: TRL's metrics are gathered although processes hold different numbers of pairs."""
        plain = self.accelerator.gather

        def gather(values: torch.Tensor) -> torch.Tensor:
            if values.ndim == 0:  # a sum over tokens; a blank pair has none
                return plain(values if pairs else torch.zeros_like(values))
            size = self._train_batch_size if self.model.training else self.args.eval_batch_size
            padded = values.new_full((size,), float("nan"))
            padded[:pairs] = values[:pairs]
            every = plain(padded)
            return every[~every.isnan()]

        self.accelerator.gather = gather
        try:
            yield
        finally:
            del self.accelerator.gather


def unpadded(model: Callable[..., Any]) -> Callable[..., Any]:
    """`model` with TRL's fused head, for padded batches, without computing the padding.

    The sides (B, T) of a batch are laid next to each other, best fit, into rows as long as the longest of them.
    Positions that restart keep them apart; what the head gives for each token is handed back in the padded shape, so
    that every loss of TRL and every engine around the model stays as it is.
    """

    def forward(input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
        real, length = attention_mask.bool(), attention_mask.shape[1]
        lengths = attention_mask.sum(1).tolist()
        rows = best_fit(lengths, length)
        if labels is None or len(rows) == len(lengths):
            return model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **options)
        starts = [0] * len(lengths)
        for row, members in enumerate(rows):
            start = row * length
            for side in members:
                starts[side], start = start, start + lengths[side]
        positions = attention_mask.cumsum(1) - 1  # (B, T)
        place = (torch.tensor(starts, device=positions.device)[:, None] + positions)[real]  # (tokens,) in R · T

        def lay(values: Tensor, blank: int) -> Tensor:  # (B, T) -> (R, T)
            laid = values.new_full((len(rows) * length,), blank)
            laid[place] = values[real]
            return laid.view(len(rows), length)

        outputs = model(
            input_ids=lay(input_ids, 0),
            attention_mask=lay(attention_mask, 0),
            position_ids=lay(positions, 0),
            labels=lay(labels.masked_fill(positions == 0, IGNORE), IGNORE),  # no side ends in the next
            **options,
        )
        for name in PER_TOKEN:
            if (values := getattr(outputs, name)) is not None:  # (R, T - 1), of the token after
                padded = values.new_zeros(real.shape)
                padded[real] = F.pad(values, (1, 0)).flatten()[place]
                setattr(outputs, name, padded[:, 1:])  # (B, T - 1)
        return outputs

    return forward
