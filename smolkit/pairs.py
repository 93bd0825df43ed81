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

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader

from smolkit.packing import IGNORE, LengthGroupedOrder, SeededOrder, best_fit, pair_lengths
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

    def get_train_dataloader(self) -> DataLoader:
        """With --train_sampling_strategy group_by_length, steps of pairs of similar length: less padding."""
        processes, rows = self.accelerator.num_processes, len(self.train_dataset)
        multiple = processes * self._train_batch_size if processes > 1 else 1
        order: SeededOrder
        if self.args.train_sampling_strategy == "group_by_length":
            step = self._train_batch_size * self.args.gradient_accumulation_steps * processes
            order = LengthGroupedOrder(pair_lengths(self.train_dataset), self.order_seed(), step, multiple)
        elif self.args.train_sampling_strategy == "random":
            order = SeededOrder(rows, self.order_seed(), multiple)
        else:
            return super().get_train_dataloader()
        if processes == 1:
            return self.ordered_dataloader(self.train_dataset, order)
        with_blank: Any = [self.train_dataset, [None]]
        return self.ordered_dataloader(ConcatDataset(with_blank), order)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, weighted by this micro-batch's share of the pairs of the step."""
        pairs = inputs.pop("pairs", None)
        if pairs is None or not model.training or self._order is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        processes, micro_batches = self.args.world_size, self.current_gradient_accumulation_steps
        whole = self._train_batch_size * self.args.gradient_accumulation_steps * processes
        rows = self._order.rows
        if self.args.dataloader_drop_last and processes == 1:  # several share filled up batches: none is dropped
            rows -= rows % self._train_batch_size
        done = self.state.global_step % -(-rows // whole) * whole
        in_step = min(whole, rows - done)
        uneven = processes > 1 and in_step < whole
        with self._uneven_gathers(int(pairs)) if uneven else nullcontext():
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        weight = int(pairs) * processes * micro_batches / in_step
        assert not isinstance(loss, tuple), "outputs are only asked for in evaluation"
        return loss if weight == 1 else loss * weight

    @contextmanager
    def _uneven_gathers(self, pairs: int) -> Iterator[None]:
        """Within: TRL's metrics are gathered although processes hold different numbers of pairs."""
        plain = self.accelerator.gather

        def gather(values: torch.Tensor) -> torch.Tensor:
            if values.ndim == 0:  # a sum over tokens; a blank pair has none
                return plain(values if pairs else torch.zeros_like(values))
            padded = values.new_full((self._train_batch_size,), float("nan"))
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

    def forward(
        input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **options: Any
    ) -> Any:
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
