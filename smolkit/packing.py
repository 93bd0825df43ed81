"""Token rows for training: tokenised documents and conversations packed into rows, their order, the collator.

A row holds several documents side by side. `position_ids` restart at 0 with each document, which is how the
model keeps them apart, and the first token of each document carries no label, so nothing is predicted across
a border. Tokens stay in a memory-mapped store (smolkit/shards.py); what is kept in memory is a plan, which
document lies where in which row, and rows are put together when they are asked for. All arrays are int32 here
and become int64 tensors in the collator.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerFast

from smolkit.chat import encode_texts, render, render_fitting
from smolkit.doctor import read_dpo, read_pretrain, read_sft
from smolkit.errors import UserError
from smolkit.shards import Columns, Conversion, TokenStore

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


# --- rows of a file → records of token ids ------------------------------------------------------------------


def documents(end_id: int) -> Conversion:
    """Pretraining rows as one column `input_ids`, each document followed by `end_id`."""
    return Conversion("pretrain", ("input_ids",), read_pretrain, convert_documents, {"end_id": end_id})


def convert_documents(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, Any]], end_id: int
) -> tuple[Columns, dict[str, int]]:
    """See `documents`."""
    ids = encode_texts(tokenizer, [row["text"] for row in rows])
    return {"input_ids": [np.asarray([*each, end_id], np.int32) for each in ids]}, {}


def conversations(max_length: int) -> Conversion:
    """Conversations as `input_ids` and `labels`, cut or dropped as in `render_conversation`."""
    settings = {"max_length": max_length}
    return Conversion("sft", ("input_ids", "labels"), read_sft, convert_conversations, settings)


def convert_conversations(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, Any]], max_length: int
) -> tuple[Columns, dict[str, int]]:
    """See `conversations`; counts `kept` whole, `cut` after an earlier reply, `dropped` and `trained_tokens`."""
    pieces, counts = render_conversations(rows, tokenizer, max_length)
    columns = {"input_ids": [piece.input_ids for piece in pieces], "labels": [piece.labels for piece in pieces]}
    return columns, vars(counts) | {"trained_tokens": sum(piece.trained_tokens for piece in pieces)}


def preferences(max_length: int) -> Conversion:
    """Preference pairs as `prompt_ids`, `chosen_ids`, `rejected_ids`; see `render_preferences`."""
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Conversion("dpo", columns, read_dpo, convert_preferences, {"max_length": max_length})


def convert_preferences(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, Any]], max_length: int
) -> tuple[Columns, dict[str, int]]:
    """See `preferences`; counts `dropped`."""
    columns, dropped = render_preferences(rows, tokenizer, max_length)
    return columns, {"dropped": dropped}


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
    first fits, it is dropped.
    """
    pieces, counts = [], ConversationCounts()
    for row in rows:
        fitting = render_fitting(tokenizer, row["messages"], row.get("tools"), max_length)
        piece = Piece.of(fitting[0].input_ids, fitting[0].loss_mask) if fitting else None
        if fitting is None or piece is None or not piece.trained_tokens:
            counts.dropped += 1
            continue
        whole = fitting[1] == len(row["messages"])
        counts.kept, counts.cut = counts.kept + whole, counts.cut + (not whole)
        pieces.append(piece)
    return pieces, counts


def render_preferences(
    rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> tuple[Columns, int]:
    """Pairs as `prompt_ids`, `chosen_ids`, `rejected_ids`, and how many pairs were dropped as too long.

    Completions end with the end token (what follows it is not the model's to write). A pair is dropped, not
    cut, when a side is longer than `max_length`: without its end an answer is another answer.
    """
    columns: Columns = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
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
            columns[name].append(np.asarray(ids, np.int32))
    return columns, dropped


# --- records → rows -----------------------------------------------------------------------------------------

Strategy = Literal["best_fit", "blocks"]


def pack_blocks(store: TokenStore, block_size: int, seed: int) -> Dataset:
    """Rows of exactly `block_size` tokens out of documents in a seeded order (the last row may be shorter).

    Concatenate and cut: a document that does not fit is continued in the next row, as a document of its own.
    Every token of every document appears once.
    """
    order = np.random.default_rng(seed).permutation(len(store))
    ends = np.cumsum(store.lengths[order])
    begins = ends - store.lengths[order]
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(begins, np.arange(0, total, block_size))  # where pieces begin in the stream of tokens
    place = np.searchsorted(begins, cuts, side="right") - 1
    start = cuts - begins[place]
    length = np.diff(cuts, append=total)
    rows = np.searchsorted(cuts, np.arange(0, total + block_size, block_size))
    return _lazy_rows(store, rows, order[place], start, start + length)


def pack_rows(store: TokenStore, max_length: int, seed: int, pack: bool = True) -> Dataset:
    """Rows of at most `max_length` tokens by best-fit decreasing, in a seeded order.

    Documents that fit into a row stay whole; of a longer one, full rows are taken first and the rest is placed
    like a document of its own (arXiv:2404.10830). Every token appears once. `pack=False` gives one row per
    piece.
    """
    order = np.random.default_rng(seed).permutation(len(store))
    lengths = store.lengths[order]
    parts = -(-lengths // max_length)
    first = np.cumsum(parts) - parts  # number of the first piece of each document
    place = np.repeat(np.arange(len(order)), parts)
    start = (np.arange(len(place)) - first[place]) * max_length
    stop = np.minimum(start + max_length, lengths[place])
    if pack:
        bins = best_fit((stop - start).tolist(), max_length)
        bins = [bins[i] for i in np.random.default_rng(seed + 1).permutation(len(bins))]
        members = np.fromiter((i for members in bins for i in members), np.int64, len(place))
        rows = np.cumsum([0, *map(len, bins)])
        return _lazy_rows(store, rows, order[place[members]], start[members], stop[members])
    return _lazy_rows(store, np.arange(len(place) + 1), order[place], start, stop)


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


@dataclass
class _RowBuilder:
    """Plan of rows → tokens; a transform of `datasets`."""

    store: TokenStore

    def __call__(self, plan: dict[str, list[list[int]]]) -> dict[str, list[np.ndarray]]:
        rows: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": [], "position_ids": []}
        for pieces in zip(plan["document"], plan["start"], plan["stop"], strict=True):
            ids, labels = [], []
            for document, start, stop in zip(*pieces, strict=True):
                ids.append(self.store.cut("input_ids", document, start, stop))
                column = "labels" if "labels" in self.store.columns else "input_ids"
                labels.append(self.store.cut(column, document, start, stop).copy())
                labels[-1][:1] = IGNORE
            rows["input_ids"].append(np.concatenate(ids))
            rows["labels"].append(np.concatenate(labels))
            rows["position_ids"].append(np.concatenate([np.arange(len(piece), dtype=np.int32) for piece in ids]))
        return rows


def _lazy_rows(
    store: TokenStore, rows: np.ndarray, document: np.ndarray, start: np.ndarray, stop: np.ndarray
) -> Dataset:
    """Rows built on access. Row i has pieces rows[i]:rows[i + 1]; a piece is tokens [start, stop) of a document."""
    plan = {
        name: pa.LargeListArray.from_arrays(pa.array(rows, pa.int64()), pa.array(values, pa.int64()))
        for name, values in (("document", document), ("start", start), ("stop", stop))
    }
    return Dataset(pa.table(plan)).with_transform(_RowBuilder(store))


@dataclass(frozen=True)
class Filling:
    """What packing did: rows of `row_length` tokens, tokens in them, the share they fill, documents that had to be
    split and the pieces they became (a piece's first token is not trained)."""

    rows: int
    row_length: int
    tokens: int
    fill: float
    split_documents: int
    split_pieces: int

    def __str__(self) -> str:
        packed = f"{self.tokens:,} tokens in {self.rows:,} rows of {self.row_length:,}, {self.fill:.1%} filled"
        if not self.split_documents:
            return packed
        return f"{packed}, {self.split_documents:,} of the documents split into {self.split_pieces:,} pieces"


def filling(rows: Dataset, row_length: int) -> Filling:
    """Describe rows made by `pack_rows` or `pack_blocks`, from their plan alone."""
    plan = rows.with_format("arrow")[:]
    document, start, stop = (plan[name].combine_chunks().flatten().to_numpy() for name in ("document", "start", "stop"))
    tokens = int((stop - start).sum())
    _, pieces = np.unique(document, return_counts=True)
    split = pieces[pieces > 1]
    fill = tokens / max(len(rows) * row_length, 1)
    return Filling(len(rows), row_length, tokens, fill, len(split), int(split.sum()))


# --- files → rows -------------------------------------------------------------------------------------------


@dataclass
class TrainingRows:
    """Packed rows to train on, rows to evaluate on (or None), and one line about them."""

    train: Dataset
    evaluation: Dataset | None
    summary: str


def pack_texts(
    tokenise: Callable[[Conversion, Sequence[Path]], TokenStore],
    files: Sequence[Path],
    eval_files: Sequence[Path],
    end_id: int,
    block_size: int,
    seed: int,
    strategy: Strategy,
    max_eval_rows: int,
) -> TrainingRows:
    """Rows of the texts in `files`; `tokenise` is `shards.tokenized` with the tokenizer and the cache filled in.

    Raises `UserError` at the first bad row.
    """
    pack: Callable[[TokenStore, int, int], Dataset] = pack_rows if strategy == "best_fit" else pack_blocks
    store = tokenise(documents(end_id), files)
    train = pack(store, block_size, seed)
    evaluation = pack(tokenise(documents(end_id), eval_files), block_size, seed) if eval_files else None
    summary = f"{len(store):,} documents, {filling(train, block_size)} ({strategy})"
    return TrainingRows(train, _head(evaluation, max_eval_rows), summary)


def pack_conversations(
    tokenise: Callable[[Conversion, Sequence[Path]], TokenStore],
    files: Sequence[Path],
    eval_files: Sequence[Path],
    max_length: int,
    seed: int,
    pack: bool,
    max_eval_rows: int,
) -> TrainingRows:
    """Rows of the conversations in `files`, as `pack_texts`. Raises `UserError` when nothing is left to train on."""
    store = tokenise(conversations(max_length), files)
    held_out = tokenise(conversations(max_length), eval_files) if eval_files else None
    for each in (store, held_out):
        if each is not None and not len(each):
            raise UserError(
                f"no conversation has an answer within {max_length} tokens ({each.counts['dropped']} dropped); "
                "raise --max_length"
            )
    train = pack_rows(store, max_length, seed, pack)
    evaluation = pack_rows(held_out, max_length, seed) if held_out else None
    counts = store.counts
    summary = (
        f"{len(store):,} conversations ({counts['cut']:,} cut and {counts['dropped']:,} dropped as too long), "
        f"{counts['trained_tokens']:,} trained of {filling(train, max_length)}"
    )
    return TrainingRows(train, _head(evaluation, max_eval_rows), summary)


def preference_pairs(
    tokenise: Callable[[Conversion, Sequence[Path]], TokenStore], files: Sequence[Path], max_length: int
) -> tuple[Dataset, int]:
    """Rendered pairs of `files` and how many were dropped as too long; `UserError` when none is left."""
    store = tokenise(preferences(max_length), files)
    dropped = store.counts["dropped"]
    if not len(store):
        raise UserError(f"no pair fits into {max_length} tokens ({dropped} dropped); raise --max_length")
    return store.dataset(), dropped


def pair_lengths(pairs: Dataset) -> np.ndarray:
    """Tokens of prompt and longer answer of each pair, (N,): what a padded batch of pairs costs."""
    columns = pairs.with_format("arrow")[:]
    prompt, chosen, rejected = (
        pc.list_value_length(columns[name]).to_numpy() for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    return prompt + np.maximum(chosen, rejected)


def row_lengths(rows: Dataset) -> np.ndarray:
    """Tokens of each row made by `pack_rows` or `pack_blocks`, (N,)."""
    plan = rows.with_format("arrow")[:]
    start, stop = (plan[name].combine_chunks().flatten().to_numpy() for name in ("start", "stop"))
    ends = np.cumsum(pc.list_value_length(plan["start"]).to_numpy())  # of each row's pieces
    return np.diff(np.cumsum(stop - start)[ends - 1], prepend=0)


def _head(rows: Dataset | None, count: int) -> Dataset | None:
    return rows and rows.select(range(min(count, len(rows))))


# --- batches ------------------------------------------------------------------------------------------------


class SeededOrder(Sampler[int]):
    """Row numbers of an epoch: `torch.randperm` of seed + epoch, which is the order accelerate gives, too.

    Position p of an epoch is the same row whatever the number of processes that share the work. Where the rows
    do not divide into `multiple` (processes × batch size), the number `len(rows)` fills up the last batches:
    a blank row. (accelerate would train on the first rows a second time.)
    """

    def __init__(self, rows: int, seed: int, multiple: int = 1):
        self.rows, self.seed, self.epoch = rows, seed, 0
        self.length = -(-rows // multiple) * multiple

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.rows, generator=generator).tolist()
        yield from [self.rows] * (self.length - self.rows)


class LengthGroupedOrder(SeededOrder):
    """Like `SeededOrder`, but rows of similar length share a step: for rows that cannot be packed.

    The shuffled rows are sorted by length within stretches of `STRETCH` steps of `batch_size` rows (the global
    batch: processes × batch size × accumulation), and the steps of a stretch are shuffled again.
    """

    STRETCH = 50

    def __init__(self, lengths: Sequence[int] | np.ndarray, seed: int, batch_size: int, multiple: int = 1):
        super().__init__(len(lengths), seed, multiple)
        self.lengths, self.batch_size = np.asarray(lengths), batch_size

    def __iter__(self) -> Iterator[int]:
        order = np.fromiter(super().__iter__(), np.int64, self.rows)
        random = np.random.default_rng(self.seed + self.epoch)
        size = self.batch_size
        for start in range(0, self.rows, size * self.STRETCH):
            stretch = order[start : start + size * self.STRETCH]
            stretch = stretch[np.argsort(self.lengths[stretch], kind="stable")]
            whole = len(stretch) // size
            yield from stretch[: whole * size].reshape(whole, size)[random.permutation(whole)].ravel().tolist()
            yield from stretch[whole * size :].tolist()  # an incomplete step comes last
        yield from [self.rows] * (self.length - self.rows)


class GivenOrder(SeededOrder):
    """The rows as they lie in the file, in every epoch."""

    def __iter__(self) -> Iterator[int]:
        yield from range(self.rows)
        yield from [self.rows] * (self.length - self.rows)


def blank_row(pad_token_id: int) -> dict[str, np.ndarray]:
    """One padding token without a label."""
    row = {"input_ids": [pad_token_id], "labels": [IGNORE], "position_ids": [0]}
    return {name: np.array(values, np.int32) for name, values in row.items()}


@dataclass
class PackedCollator:
    """Rows → `input_ids`, `labels`, `position_ids`, int64 (B, T), padded on the right to the longest row.

    From 256 tokens on to a multiple of 32: with another length every few steps, new tensors do not fit into the memory
    of old ones, the heap grows and its lists get long (SmolLM2-135M, 2 x 512, one step in 20 shorter: 6.8 instead of
    4.4 % of the main thread's time is spent in malloc), and compiled kernels meet new shapes.

    Padding has label IGNORE and positions of its own document, so it changes no real token. Where documents begin goes
    along, in the keywords of flash attention (`smol_model.document_bounds`): a GPU would have to be asked. `tokens`, a
    number, counts what is not padding; it is taken out before the batch goes into a model. With `mask_padding` an
    `attention_mask` (B, T) is added when there is padding, for a router that must not count it. Only for
    SmolForCausalLM: given a mask, transformers' models no longer keep packed documents apart.
    """

    pad_token_id: int
    mask_padding: bool = False

    def __call__(self, rows: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor | int]:
        lengths = [len(row["input_ids"]) for row in rows]
        longest = max(lengths)
        shape = (len(rows), longest if longest < 256 else -(-longest // 32) * 32)
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
        starts = np.flatnonzero(batch["position_ids"] == 0)
        bounds = np.append(starts, batch["position_ids"].size).astype(np.int32)  # (documents + 1,)
        longest = int(np.diff(bounds).max())
        # A row of one token trains nothing: it is a blank one.
        numbers = {"max_length_q": longest, "max_length_k": longest, "tokens": sum(n for n in lengths if n > 1)}
        arrays = {**batch, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        return {name: torch.from_numpy(array) for name, array in arrays.items()} | numbers
