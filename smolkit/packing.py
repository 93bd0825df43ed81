"""Token rows for training: tokenised documents and conversations packed into rows, and the collator.

A row holds several documents side by side. `position_ids` restart at 0 with each document, which is how the
model keeps them apart, and the first token of each document carries no label, so nothing is predicted across
a border. All arrays are int32 here and become int64 tensors in the collator.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from smolkit.chat import render, render_fitting
from smolkit.doctor import read_sft
from smolkit.errors import UserError

IGNORE = -100  # label of a token that is not trained


@dataclass(frozen=True)
class Piece:
    """One document or conversation: `input_ids` and `labels` (IGNORE where not trained), both (T,) int32."""

    input_ids: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, input_ids: Sequence[int], loss_mask: Sequence[int] | None = None) -> "Piece":
        """From token ids and a 0/1 mask of trained tokens (None: all). The first token is never trained."""
        ids = np.asarray(input_ids, np.int32)
        labels = ids.copy()
        if loss_mask is not None:
            labels[np.asarray(loss_mask) == 0] = IGNORE
        labels[:1] = IGNORE
        return cls(ids, labels)

    @property
    def trained_tokens(self) -> int:
        """Number of labelled tokens."""
        return int((self.labels != IGNORE).sum())


def tokenize_documents(
    texts: Iterable[str], encode: Callable[[list[str]], list[list[int]]], end_id: int, batch_size: int = 512
) -> Iterator[np.ndarray]:
    """Token ids of each text followed by `end_id`, (T,) int32 each.

    `encode` maps a list of texts to their token ids (a fast tokenizer works in parallel on a list).
    """
    texts = iter(texts)
    while batch := list(islice(texts, batch_size)):
        for ids in encode(batch):
            yield np.asarray([*ids, end_id], np.int32)


def pack_blocks(documents: Sequence[np.ndarray], block_size: int, seed: int) -> Dataset:
    """Rows of exactly `block_size` tokens out of documents in a seeded order (the last row may be shorter).

    A document that does not fit is continued in the next row, as a document of its own. Every token of every
    document appears once.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    tokens = np.concatenate([documents[i] for i in order]) if len(order) else np.empty(0, np.int32)
    lengths = np.fromiter((len(documents[i]) for i in order), np.int64, len(order))
    starts = np.zeros(len(tokens), bool)
    starts[np.concatenate(([0], np.cumsum(lengths)[:-1])).astype(np.int64)[: len(order)]] = True
    starts[::block_size] = True
    index = np.arange(len(tokens))
    positions = (index - np.maximum.accumulate(np.where(starts, index, 0))).astype(np.int32)
    labels = np.where(starts, IGNORE, tokens).astype(np.int32)
    cuts = range(0, len(tokens), block_size)
    return _dataset(*([array[cut : cut + block_size] for cut in cuts] for array in (tokens, labels, positions)))


@dataclass
class ConversationCounts:
    """What became of the conversations: kept whole, cut after an earlier reply, dropped (nothing fitted)."""

    kept: int = 0
    cut: int = 0
    dropped: int = 0


def render_conversations(
    rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> tuple[list[Piece], ConversationCounts]:
    """Conversations as pieces with the loss on assistant tokens.

    One that is longer than `max_length` is cut after its last assistant turn that fits; when not even the
    first fits, it is dropped. Raises `UserError` when nothing is left to train on.
    """
    pieces, counts = [], ConversationCounts()
    for row in rows:
        fitting = render_fitting(tokenizer, row["messages"], row.get("tools"), max_length)
        piece = Piece.of(fitting[0].input_ids, fitting[0].loss_mask) if fitting else None
        if piece is None or not piece.trained_tokens:
            counts.dropped += 1
            continue
        whole = fitting[1] == len(row["messages"])
        counts.kept, counts.cut = counts.kept + whole, counts.cut + (not whole)
        pieces.append(piece)
    if not pieces:
        raise UserError(
            f"no conversation has an answer within {max_length} tokens ({counts.dropped} dropped); raise --max_length"
        )
    return pieces, counts


def render_preferences(
    rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> tuple[Dataset, int]:
    """Pairs as `prompt_ids`, `chosen_ids`, `rejected_ids`, and how many pairs were dropped as too long.

    Completions end with the end token (what follows it is not the model's to write). A pair is dropped, not
    cut, when a side is longer than `max_length`: without its end an answer is another answer.
    """
    columns: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    dropped = 0
    for row in rows:
        tools = row.get("tools")
        prompt = render(tokenizer, row["prompt"], tools, add_generation_prompt=True).input_ids
        answers = []
        for side in ("chosen", "rejected"):
            rendered = render(tokenizer, row["prompt"] + row[side], tools)
            last = max(i for i, trained in enumerate(rendered.loss_mask) if trained)
            assert rendered.input_ids[: len(prompt)] == prompt, "the prompt is a prefix of prompt and answer"
            answers.append(rendered.input_ids[len(prompt) : last + 1])
        if len(prompt) + max(map(len, answers)) > max_length:
            dropped += 1
            continue
        for name, ids in zip(columns, (prompt, *answers), strict=True):
            columns[name].append(ids)
    if not columns["prompt_ids"]:
        raise UserError(f"no pair fits into {max_length} tokens ({dropped} dropped); raise --max_length")
    return Dataset.from_dict(columns), dropped


@dataclass
class ConversationRows:
    """Packed rows to train on, rows to evaluate on (or None), and one line about them."""

    train: Dataset
    evaluation: Dataset | None
    summary: str


def pack_conversations(
    files: Sequence[Path],
    eval_files: Sequence[Path],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    seed: int,
    pack: bool,
    max_eval_rows: int,
) -> ConversationRows:
    """Read, render and pack conversation files; `UserError` at the first bad row."""
    pieces, counts = render_conversations(read_sft(files), tokenizer, max_length)
    train = pack_rows(pieces, max_length, seed, pack)
    evaluation = None
    if eval_files:
        evaluation = pack_rows(render_conversations(read_sft(eval_files), tokenizer, max_length)[0], max_length, seed)
        evaluation = evaluation.select(range(min(max_eval_rows, len(evaluation))))
    tokens, trained = count_tokens(train)
    summary = (
        f"{len(pieces):,} conversations ({counts.cut:,} cut and {counts.dropped:,} dropped as too long), "
        f"{tokens:,} tokens ({trained:,} trained) in {len(train):,} rows of up to {max_length}"
    )
    return ConversationRows(train, evaluation, summary)


def pack_rows(pieces: Sequence[Piece], max_length: int, seed: int, pack: bool = True) -> Dataset:
    """Rows of at most `max_length` tokens out of whole pieces, by best-fit decreasing, in a seeded order.

    `pack=False` gives one row per piece. Each piece must fit (`len <= max_length`); callers cut or drop the
    rest.
    """
    order = np.random.default_rng(seed).permutation(len(pieces))
    if pack:
        bins = best_fit([len(pieces[i].input_ids) for i in order], max_length)
        rows = [[order[i] for i in members] for members in bins]
        rows = [rows[i] for i in np.random.default_rng(seed + 1).permutation(len(rows))]
    else:
        rows = [[i] for i in order]
    ids = [np.concatenate([pieces[i].input_ids for i in row]) for row in rows]
    labels = [np.concatenate([pieces[i].labels for i in row]) for row in rows]
    positions = [np.concatenate([np.arange(len(pieces[i].input_ids), dtype=np.int32) for i in row]) for row in rows]
    return _dataset(ids, labels, positions)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` grouped into bins of at most `capacity`, by best-fit decreasing (Johnson 1974).

    Each item, longest first, goes where the least room is left over. O(n · capacity / 64) through a bit set
    of the rooms that occur.
    """
    bins: list[list[int]] = []
    bins_with_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set when some bin has room for exactly r more tokens
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        assert 0 < length <= capacity, f"an item of {length} tokens does not fit into {capacity}"
        fitting = rooms >> length
        if fitting:
            room = length + ((fitting & -fitting).bit_length() - 1)
            chosen = bins_with_room[room].pop()
            if not bins_with_room[room]:
                rooms &= ~(1 << room)
            bins[chosen].append(item)
        else:
            room, chosen = capacity, len(bins)
            bins.append([item])
        if room > length:
            bins_with_room.setdefault(room - length, []).append(chosen)
            rooms |= 1 << (room - length)
    return bins


def _dataset(ids: list[np.ndarray], labels: list[np.ndarray], positions: list[np.ndarray]) -> Dataset:
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "position_ids": positions}).with_format("numpy")


@dataclass
class PackedCollator:
    """Rows → `input_ids`, `labels`, `position_ids`, int64 (B, T), padded on the right to the longest row.

    With `mask_padding` an `attention_mask` (B, T) is added when there is padding, for models that count
    tokens (a router's load balance). Padding has label IGNORE and positions of its own document, so it
    changes no real token.
    """

    pad_token_id: int
    mask_padding: bool = False

    def __call__(self, rows: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        shape = (len(rows), max(lengths))
        batch = {
            "input_ids": np.full(shape, self.pad_token_id, np.int64),
            "labels": np.full(shape, IGNORE, np.int64),
            "position_ids": np.zeros(shape, np.int64),
        }
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            for name, array in batch.items():
                array[i, :length] = row[name]
            batch["position_ids"][i, length:] = np.arange(shape[1] - length)
        if self.mask_padding and min(lengths) < shape[1]:
            batch["attention_mask"] = (np.arange(shape[1]) < np.asarray(lengths)[:, None]).astype(np.int64)
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def count_tokens(rows: Dataset) -> tuple[int, int]:
    """(tokens, trained tokens) of packed rows."""
    tokens = trained = 0
    for batch in rows.iter(1000):
        tokens += sum(len(row) for row in batch["input_ids"])
        trained += sum(int((np.asarray(row) != IGNORE).sum()) for row in batch["labels"])
    return tokens, trained
