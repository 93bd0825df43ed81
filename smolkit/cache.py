"""Keys and values of running sequences within a memory budget, and of prompt beginnings that may come again.

A sequence lives in one row that is long enough for it: rows of one width stand side by side in *racks*, so that one
attention call serves a rack without gathering pages first. A sequence that outgrows its row moves to one of twice the
width. Racks hold about `RACK_BYTES` (a longer row has one of its own) and are allocated one by one: memory grows and
shrinks with what runs, and never passes the budget.

`PrefixBlocks` keeps what whole chunks of prompts computed, keyed by all tokens up to their end (as vLLM's automatic
prefix caching does, Kwon et al., arXiv:2309.06180), in a fixed part of the budget.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROW_COLUMNS = 256  # of the shortest rows
# Sixteen rows of SmolLM2-135M are one rack: with two a decode step has twice the attention calls (6 % of its time).
RACK_BYTES = {"cpu": 128 * 2**20, "else": 512 * 2**20}
_Key = tuple[Hashable, tuple[int, ...]]
COLUMN_BLOCK = 32  # widths of attention are multiples of it, see Decoder.step


def room_for(columns: int) -> int:
    """The width that a decode step wants when `columns` are filled: whole blocks, one column of them never visible."""
    return (columns + 1) // COLUMN_BLOCK * COLUMN_BLOCK + COLUMN_BLOCK


def cache_budget(token_bytes: int, sequences: int, length: int) -> int:
    """Bytes that so many sequences of such a length need, at `token_bytes` for the keys and values of a token."""
    # A quarter more than the tokens: for prefixes, and because rows are longer than what is in them.
    return int(1.25 * token_bytes * sequences * length) + 2**28


@dataclass(eq=False)
class Row:
    """Where a sequence (`owner`, with `length` columns filled) lives: a row of one of the racks of a shelf."""

    shelf: "Shelf"
    index: int
    owner: Any

    @property
    def states(self) -> Tensor:
        """(L, 2, K, width, Dh)"""
        rack, row = divmod(self.index, self.shelf.rows_per_rack)
        return self.shelf.racks[rack][:, :, row]


class Shelf:
    """All racks of one width. Rows are filled from the front without gaps: the last one moves into a hole."""

    def __init__(self, width: int, rows_per_rack: int):
        self.width, self.rows_per_rack = width, rows_per_rack
        self.racks: list[Tensor] = []  # (L, 2, rows, K, width, Dh)
        self.rows: list[Row] = []

    @property
    def full(self) -> bool:
        return len(self.rows) == len(self.racks) * self.rows_per_rack

    def take(self, owner: Any) -> Row:
        self.rows.append(Row(self, len(self.rows), owner))
        return self.rows[-1]

    def remove(self, row: Row) -> None:
        last = self.rows.pop()
        if last is not row:
            filled = last.owner.length
            row.states[:, :, :, :filled] = last.states[:, :, :, :filled]
            self.rows[row.index], last.index = last, row.index

    def idle(self) -> int:
        """Racks at the end that no row needs."""
        return len(self.racks) - -(-len(self.rows) // self.rows_per_rack)


class Cache:
    """Rows for at most `max_rows` sequences of at most `max_columns` tokens, and blocks of prefixes.

    All of it takes at most `budget` bytes (None: as much as the rows need, and no prefixes), a part `prefix_share` of
    them for prefixes.
    """

    def __init__(
        self,
        config: Any,
        dtype: torch.dtype,
        device: torch.device,
        *,
        max_rows: int,
        max_columns: int,
        budget: int | None = None,
        prefix_share: float = 0.0,
    ):
        self.L, self.K, self.Dh = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.dtype, self.device, self.budget = dtype, device, budget
        column = 2 * self.L * self.K * self.Dh * dtype.itemsize
        self.column_bytes = column  # keys and values of one token in all layers
        rack = RACK_BYTES.get(device.type, RACK_BYTES["else"])
        rack = rack if budget is None else min(rack, budget // 8)
        width, widest = ROW_COLUMNS, room_for(max_columns)
        widths = []
        while width * 2 <= widest:
            widths.append(width)
            width *= 2
        self.shelves = [Shelf(w, max(1, min(max_rows, rack // (w * column)))) for w in (*widths, widest)]
        self.prefixes = PrefixBlocks(int((budget or 0) * prefix_share))

    @property
    def bytes(self) -> int:
        """Allocated now."""
        return self.row_bytes + self.prefixes.bytes

    @property
    def row_bytes(self) -> int:
        return sum(len(shelf.racks) * self.rack_bytes(shelf) for shelf in self.shelves)

    def rack_bytes(self, shelf: Shelf) -> int:
        return shelf.rows_per_rack * shelf.width * self.column_bytes

    @property
    def least_budget(self) -> int:
        """Bytes without which the longest sequence could not run even alone: its last two rows, for the move."""
        return sum(self.rack_bytes(shelf) for shelf in self.shelves[-2:]) + self.prefixes.limit

    def shelf_for(self, columns: int) -> Shelf:
        return next(shelf for shelf in self.shelves if shelf.width >= room_for(columns))

    def take(self, columns: int, owner: Any) -> Row | None:
        """A row with room for so many columns; None when the budget has no memory for it."""
        shelf = self.shelf_for(columns)
        if shelf.full:
            if not self._make_room(self.rack_bytes(shelf)):
                return None
            shape = (self.L, 2, shelf.rows_per_rack, self.K, shelf.width, self.Dh)
            # Zeros, not garbage: a masked column still enters 0 * value, and 0 * NaN is NaN.
            shelf.racks.append(torch.zeros(shape, dtype=self.dtype, device=self.device))
        return shelf.take(owner)

    def release(self, row: Row) -> None:
        """Its memory stays for the next one, as long as nothing else needs it."""
        row.shelf.remove(row)

    def widen(self, row: Row, filled: int) -> Row | None:
        """A row with room for one more column than `filled`: this one, or a wider one with its columns.

        None (and the row as it was) when there is no memory.
        """
        if row.shelf.width >= room_for(filled):
            return row
        wider = self.take(filled, row.owner)
        if wider is not None:
            wider.states[:, :, :, :filled] = row.states[:, :, :, :filled]
            row.shelf.remove(row)
        return wider

    def racks_with(self, wanted: set[Row]) -> list[tuple[Tensor, list[Row]]]:
        """Racks that hold any of the wanted rows: states (L, 2, R, K, width, Dh) of their rows up to the last such."""
        found = []
        for shelf in self.shelves:
            for number, rack in enumerate(shelf.racks):
                rows = shelf.rows[number * shelf.rows_per_rack : (number + 1) * shelf.rows_per_rack]
                while rows and rows[-1] not in wanted:
                    rows.pop()
                if rows:
                    found.append((rack[:, :, : len(rows)], rows))
        return found

    def _make_room(self, wanted: int) -> bool:
        """Give back idle racks until `wanted` bytes fit beside the others."""
        if self.budget is None:
            return True
        limit = self.budget - self.prefixes.limit - wanted
        for shelf in self.shelves:
            while self.row_bytes > limit and shelf.idle():
                shelf.racks.pop()
        return self.row_bytes <= limit

    def keep_prefix(self, adapter: Hashable, tokens: Sequence[int], chunk: int, row: Row) -> None:
        """Keep the last `chunk` columns of a row filled with `tokens`."""
        self.prefixes.keep(adapter, tokens, chunk, row.states)

    def fill_from_prefixes(self, adapter: Hashable, tokens: Sequence[int], chunk: int, row: Row) -> int:
        """Copy what is known of the beginning of a prompt into an empty row; the number of columns filled.

        At least one token is always left to compute, for its logits.
        """
        blocks = self.prefixes.find(adapter, tokens[:-1], chunk)
        for number, block in enumerate(blocks):
            row.states[:, :, :, number * chunk : (number + 1) * chunk] = block
        return len(blocks) * chunk


class PrefixBlocks:
    """Chunks of keys and values (L, 2, K, chunk, Dh), found by every token up to their end.

    The key of a chunk is its own tokens and the number of the chunk before it: equal keys mean equal beginnings, with
    no hash to trust. The least recently used chunk goes first, and always before those it stands on.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit  # bytes
        self.blocks: OrderedDict[_Key, tuple[int, Tensor]] = OrderedDict()
        self.bytes = 0
        self.last = 0

    def find(self, adapter: Hashable, tokens: Sequence[int], chunk: int) -> list[Tensor]:
        """Known chunks of the beginning of `tokens`, in order."""
        return [self.blocks[key][1] for key in self._use(adapter, tokens, chunk)]

    def keep(self, adapter: Hashable, tokens: Sequence[int], chunk: int, states: Tensor) -> None:
        """Keep the last chunk of `tokens` from the row's `states`, unless a chunk before it is gone already."""
        before = self._use(adapter, tokens[:-chunk], chunk)
        if len(before) < len(tokens) // chunk - 1:
            return
        key = (self.blocks[before[-1]][0] if before else adapter, tuple(tokens[-chunk:]))
        block = states[:, :, :, len(tokens) - chunk : len(tokens)]
        if key in self.blocks or block.nbytes * (len(before) + 1) > self.limit:
            return
        self.last += 1
        self.blocks[key] = (self.last, block.clone(memory_format=torch.contiguous_format))
        self.bytes += block.nbytes
        self._use(adapter, tokens, chunk)
        while self.bytes > self.limit:
            _, (_, oldest) = self.blocks.popitem(last=False)
            self.bytes -= oldest.nbytes

    def _use(self, adapter: Hashable, tokens: Sequence[int], chunk: int) -> list[_Key]:
        """Keys of the known chunks, which become the most recent; the first one, that most others need, at the end."""
        keys: list[_Key] = []
        parent = adapter
        for start in range(0, len(tokens) - chunk + 1, chunk):
            key = (parent, tuple(tokens[start : start + chunk]))
            if key not in self.blocks:
                break
            keys.append(key)
            parent = self.blocks[key][0]
        for key in reversed(keys):
            self.blocks.move_to_end(key)
        return keys
