"""A key/value cache in slots: every sequence has one row, filled from column 0, as long as it needs.

A decode step feeds one token per row and masks the columns beyond each row's own length, so a row sees the
same columns whoever shares the batch, and joining or leaving never moves another row's tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class _Window:
    """The part of the slot cache that the current forward pass works on."""

    first_row: int = 0
    end_row: int = 0
    lengths: Tensor | None = None  # (rows,) column to write for each row; None = a prefill from column 0
    width: int = 0  # number of columns attention reads
    slots: int = 0  # allocated rows
    columns: int = 0  # allocated columns


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: (slots, K, columns, Dh), grown on demand."""

    is_sliding = False

    def __init__(self, window: _Window) -> None:
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = self._grown(None, key_states)
        self.values = self._grown(None, value_states)
        self.is_initialized = True

    def _grown(self, old: Tensor | None, like: Tensor) -> Tensor:
        # Zeros, not garbage: a masked column still enters 0 * value, and 0 * NaN is NaN.
        new = like.new_zeros(self.window.slots, like.shape[1], self.window.columns, like.shape[3])
        if old is not None:
            new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store the new (rows, K, T, Dh) states and return what attention reads."""
        window = self.window
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.keys.shape[0] < window.slots or self.keys.shape[2] < window.columns:
            self.keys, self.values = (
                self._grown(self.keys, key_states),
                self._grown(self.values, value_states),
            )
        rows = slice(window.first_row, window.end_row)
        if window.lengths is None:
            self.keys[rows, :, : window.width] = key_states
            self.values[rows, :, : window.width] = value_states
            return key_states, value_states
        index = torch.arange(window.first_row, window.end_row, device=key_states.device)
        self.keys[index, :, window.lengths] = key_states[:, :, 0]
        self.values[index, :, window.lengths] = value_states[:, :, 0]
        return self.keys[rows, :, : window.width], self.values[rows, :, : window.width]

    def move(self, source: int, target: int, length: int) -> None:
        self.keys[target, :, :length] = self.keys[source, :, :length]
        self.values[target, :, :length] = self.values[source, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.width, 0

    def get_seq_length(self) -> int:
        """Where the queries of a prefill start; decode steps bring their own mask."""
        return 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """A transformers `Cache` of slots; `prefill_window` and `decode_window` aim it before a forward pass."""

    def __init__(self, num_layers: int) -> None:
        self.window = _Window()
        super().__init__(layers=[_SlotLayer(self.window) for _ in range(num_layers)])

    def _reserve(self, rows: int, columns: int) -> None:
        while self.window.slots < rows:
            self.window.slots = max(1, self.window.slots * 2)
        while self.window.columns < columns:
            self.window.columns = max(64, self.window.columns * 2)

    def prefill_window(self, first_row: int, end_row: int, width: int) -> None:
        """The next forward writes columns 0..width of these rows."""
        self._reserve(end_row, width)
        self.window.first_row, self.window.end_row = first_row, end_row
        self.window.lengths, self.window.width = None, width

    def decode_window(self, lengths: Tensor, width: int) -> None:
        """The next forward writes column `lengths[i]` of each row i and reads columns 0..width."""
        self._reserve(len(lengths), width)
        self.window.first_row, self.window.end_row = 0, len(lengths)
        self.window.lengths, self.window.width = lengths, width

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of one row over another row."""
        for layer in self.layers:
            layer.move(source, target, length)
