"""Packing: literal rows and labels, nothing lost, nothing predicted across documents."""

import numpy as np
import pytest
import torch

from smol_model import SmolConfig, SmolForCausalLM
from smolkit.packing import (
    IGNORE,
    PackedCollator,
    Piece,
    best_fit,
    count_tokens,
    pack_blocks,
    pack_rows,
    tokenize_documents,
)


def lists(dataset) -> list[dict[str, list[int]]]:
    return [{name: np.asarray(value).tolist() for name, value in row.items()} for row in dataset]


def test_documents_end_with_the_end_token() -> None:
    documents = list(tokenize_documents(["ab", "c"], lambda texts: [[ord(c) for c in t] for t in texts], 0))
    assert [d.tolist() for d in documents] == [[97, 98, 0], [99, 0]]


def test_blocks_are_literal() -> None:
    documents = [np.array(ids, np.int32) for ids in ([1, 2, 3, 0], [4, 5, 0], [6, 7, 8, 9, 10, 0])]
    # seed 0 orders them 2, 0, 1
    assert lists(pack_blocks(documents, 5, seed=0)) == [
        {"input_ids": [6, 7, 8, 9, 10], "labels": [IGNORE, 7, 8, 9, 10], "position_ids": [0, 1, 2, 3, 4]},
        {"input_ids": [0, 1, 2, 3, 0], "labels": [IGNORE, IGNORE, 2, 3, 0], "position_ids": [0, 0, 1, 2, 3]},
        {"input_ids": [4, 5, 0], "labels": [IGNORE, 5, 0], "position_ids": [0, 1, 2]},
    ]


def test_no_token_is_lost_and_the_order_depends_on_the_seed_only() -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(1, 50, random.integers(1, 40)).astype(np.int32) for _ in range(60)]
    first, again, other = (pack_blocks(documents, 32, seed) for seed in (1, 1, 2))
    flat = np.concatenate([row["input_ids"] for row in first])
    assert sorted(flat.tolist()) == sorted(np.concatenate(documents).tolist())
    assert lists(first) == lists(again) != lists(other)
    assert [len(row["input_ids"]) for row in first][:-1] == [32] * (len(first) - 1)


def test_conversations_are_literal() -> None:
    pieces = [Piece.of([1, 2, 3, 4], [0, 0, 1, 1]), Piece.of([5, 6, 7], [0, 1, 1]), Piece.of([8, 9], [0, 1])]
    rows = lists(pack_rows(pieces, 6, seed=0))
    assert sorted(rows, key=lambda row: row["input_ids"]) == [
        {
            "input_ids": [1, 2, 3, 4, 8, 9],
            "labels": [IGNORE, IGNORE, 3, 4, IGNORE, 9],
            "position_ids": [0, 1, 2, 3, 0, 1],
        },
        {"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7], "position_ids": [0, 1, 2]},
    ]
    assert len(pack_rows(pieces, 6, seed=0, pack=False)) == 3


def test_best_fit_keeps_every_item_and_the_capacity() -> None:
    lengths = np.random.default_rng(0).integers(1, 101, 500).tolist()
    bins = best_fit(lengths, 100)
    assert sorted(i for members in bins for i in members) == list(range(500))
    assert all(sum(lengths[i] for i in members) <= 100 for members in bins)
    assert len(bins) <= 1.1 * sum(lengths) / 100
    assert best_fit([5, 5, 3, 7], 10) == [[3, 2], [0, 1]]  # 7 with 3, 5 with 5


def test_collator_pads_with_unlabelled_tokens() -> None:
    rows = pack_rows([Piece.of([1, 2, 3], [0, 1, 1]), Piece.of([5, 6], [0, 1])], 3, seed=0)
    batch = PackedCollator(pad_token_id=9, mask_padding=True)(sorted(rows, key=lambda row: row["input_ids"][0]))
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, 6, 9]]
    assert batch["labels"].tolist() == [[IGNORE, 2, 3], [IGNORE, 6, IGNORE]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert count_tokens(rows) == (5, 3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_loss_equals_separate_loss(attention: str) -> None:
    torch.manual_seed(0)
    config = SmolConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config._attn_implementation = attention
    model = SmolForCausalLM(config).train()
    random = np.random.default_rng(0)
    pieces = [Piece.of(random.integers(0, 64, n), random.integers(0, 2, n)) for n in (7, 12, 5, 16, 3, 9)]
    total = sum(piece.trained_tokens for piece in pieces)

    def loss_and_gradient(pack: bool, batch_size: int) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        rows = pack_rows(pieces, 24, seed=0, pack=pack)
        loss = 0.0
        for start in range(0, len(rows), batch_size):
            batch = PackedCollator(0)([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
            part = model(**batch, num_items_in_batch=total, use_cache=False).loss
            part.backward()
            loss += part.item()
        return loss, torch.cat([p.grad.flatten() for p in model.parameters()])

    separate, separate_gradient = loss_and_gradient(pack=False, batch_size=1)
    for batch_size in (1, 2, 6):
        packed, packed_gradient = loss_and_gradient(pack=True, batch_size=batch_size)
        assert packed == pytest.approx(separate, rel=1e-5)
        torch.testing.assert_close(packed_gradient, separate_gradient, rtol=1e-3, atol=1e-5)
