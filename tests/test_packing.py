"""Packing: literal rows and labels, nothing lost, nothing predicted across documents."""

import hashlib

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from smol_config import SmolConfig
from smol_model import SmolForCausalLM
from smolkit.chat import encode_texts
from smolkit.doctor import read_pretrain
from smolkit.errors import UserError
from smolkit.packing import (
    IGNORE,
    PackedCollator,
    Piece,
    best_fit,
    blank_row,
    conversations,
    convert_documents,
    documents,
    filling,
    pack_blocks,
    pack_conversations,
    pack_rows,
    pack_texts,
    pair_lengths,
    preferences,
)
from smolkit.shards import TokenStore, tokenized
from smolkit.tiny_world import build_world, pretraining_documents


def lists(dataset) -> list[dict[str, list[int]]]:
    return [{name: np.asarray(value).tolist() for name, value in row.items()} for row in dataset]


def of_pieces(*pieces: Piece) -> TokenStore:
    return TokenStore.of(input_ids=[p.input_ids for p in pieces], labels=[p.labels for p in pieces])


def random_documents(count: int, most: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(1, 50, random.integers(1, most)).astype(np.int32) for _ in range(count)]


def test_documents_end_with_the_end_token(samples) -> None:
    tokenizer = AutoTokenizer.from_pretrained(samples / "qwen2.5_tokenizer")
    columns, counts = convert_documents(tokenizer, [{"text": "a b"}, {"text": "c<|im_end|>"}], 7)
    decoded = [tokenizer.decode(ids[:-1]) for ids in columns["input_ids"]]
    assert decoded == ["a b", "c<|im_end|>"] and counts == {}
    assert [ids[-1] for ids in columns["input_ids"]] == [7, 7]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in columns["input_ids"][1]


def test_blocks_are_literal() -> None:
    store = TokenStore.of(input_ids=[[1, 2, 3, 0], [4, 5, 0], [6, 7, 8, 9, 10, 0]])
    # seed 0 orders them 2, 0, 1
    rows = pack_blocks(store, 5, seed=0)
    assert lists(rows) == [
        {"input_ids": [6, 7, 8, 9, 10], "labels": [IGNORE, 7, 8, 9, 10], "position_ids": [0, 1, 2, 3, 4]},
        {"input_ids": [0, 1, 2, 3, 0], "labels": [IGNORE, IGNORE, 2, 3, 0], "position_ids": [0, 0, 1, 2, 3]},
        {"input_ids": [4, 5, 0], "labels": [IGNORE, 5, 0], "position_ids": [0, 1, 2]},
    ]
    report = filling(rows, 5)
    assert (report.tokens, report.rows, report.split_documents, report.split_pieces) == (13, 3, 1, 2)
    assert report.fill == pytest.approx(13 / 15)
    assert str(report) == "13 tokens in 3 rows of 5, 86.7% filled, 1 of the documents split into 2 pieces"


def naive_blocks(documents: list[np.ndarray], block_size: int, seed: int) -> list[dict[str, list[int]]]:
    """Concatenate and cut, token by token."""
    rows: list[dict[str, list[int]]] = []
    for number in np.random.default_rng(seed).permutation(len(documents)):
        position = 0
        for place, token in enumerate(documents[number].tolist()):
            if not rows or len(rows[-1]["input_ids"]) == block_size:
                rows.append({"input_ids": [], "labels": [], "position_ids": []})
                position = 0
            position = 0 if place == 0 else position
            rows[-1]["input_ids"].append(token)
            rows[-1]["labels"].append(token if position else IGNORE)
            rows[-1]["position_ids"].append(position)
            position += 1
    return rows


@pytest.mark.parametrize("block_size", [8, 32, 100])
def test_blocks_equal_a_naive_loop(block_size) -> None:
    documents = random_documents(60, 70)
    assert lists(pack_blocks(TokenStore.of(input_ids=documents), block_size, 3)) == naive_blocks(
        documents, block_size, 3
    )


def digest(rows) -> str:
    result = hashlib.sha256()
    for row in rows:
        for name in ("input_ids", "labels", "position_ids"):
            result.update(np.asarray(row[name], np.int32).tobytes() + b"|")
    return result.hexdigest()


def test_rows_of_the_tiny_world_stay_what_they_were() -> None:
    """The quickstart is tuned on such rows. The hashes were taken from the first version, which concatenated
    everything in memory."""
    texts = [row["text"] for row in pretraining_documents(build_world(0), 300)]
    corpus = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    assert corpus == "f9722375cf5d391262a5681137e264d8f0e800d5738d5f21295c9c7565ef3e10", "another corpus, other rows"
    documents = [np.array([*text.encode(), 0], np.int32) for text in texts]
    blocks = pack_blocks(TokenStore.of(input_ids=documents), 128, 42)
    assert digest(blocks) == "5c63a1e436dcdbac85154a0fa74cb3494868caab6d8e466e3cf6e66662cca07a"
    pieces = [Piece.of(ids, np.arange(len(ids)) % 3 > 0) for ids in documents]
    conversations = pack_rows(of_pieces(*pieces), 512, 42)
    assert digest(conversations) == "260fa0642759b8acc2f9571752e06f84da28b691906e3e852d72e25d92a90da5"


def test_best_fit_places_documents_whole_and_splits_only_longer_ones() -> None:
    documents = random_documents(200, 80)
    rows = pack_rows(TokenStore.of(input_ids=documents), 32, seed=1)
    pieces = []
    for row in lists(rows):
        assert len(row["input_ids"]) <= 32
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        for start, stop in zip(starts, [*starts[1:], None], strict=True):
            piece = row["input_ids"][start:stop]
            assert row["position_ids"][start:stop] == list(range(len(piece)))
            assert row["labels"][start:stop] == [IGNORE, *piece[1:]]
            pieces.append(piece)
    expected = [d.tolist()[i : i + 32] for d in documents for i in range(0, len(d), 32)]
    assert sorted(pieces) == sorted(expected)
    report = filling(rows, 32)
    longer = [len(d) for d in documents if len(d) > 32]
    assert report.split_documents == len(longer)
    assert report.split_pieces == sum(-(-length // 32) for length in longer)
    assert report.tokens == sum(map(len, documents))
    assert report.fill == report.tokens / (32 * len(rows)) > 0.97


@pytest.mark.parametrize("block_size", [512, 2048])
def test_real_corpora_fill_rows_to_97_percent(samples, tmp_path, block_size) -> None:
    """Counted from the rows themselves; nothing is cropped, and only documents longer than a row are split."""
    industry = samples / "industrycorpus2" / "accommodation_catering_hotel"
    tokenizer = AutoTokenizer.from_pretrained(samples / "qwen2.5_tokenizer")
    for files in (
        [samples / "wikitext2" / "valid.txt"],
        list((industry / "chinese").rglob("*.parquet")),
        list((industry / "english").rglob("*.parquet")),
    ):
        texts = [row["text"] for row in read_pretrain(files)]
        lengths = [len(ids) + 1 for ids in encode_texts(tokenizer, texts)]
        store = tokenized(documents(tokenizer.eos_token_id), files, tokenizer, tmp_path)
        rows = pack_rows(store, block_size, seed=0)
        tokens = sum(len(row["input_ids"]) for row in rows)
        trained = sum(label != IGNORE for row in rows for label in row["labels"])
        assert tokens == sum(lengths)
        assert tokens - trained == sum(-(-length // block_size) for length in lengths), "one per piece"
        assert tokens / (len(rows) * block_size) > 0.97


def test_no_token_is_lost_and_the_order_depends_on_the_seed_only() -> None:
    documents = random_documents(60, 40)
    for pack in (pack_blocks, pack_rows):
        first, again, other = (pack(TokenStore.of(input_ids=documents), 32, seed) for seed in (1, 1, 2))
        flat = np.concatenate([row["input_ids"] for row in first])
        assert sorted(flat.tolist()) == sorted(np.concatenate(documents).tolist())
        assert lists(first) == lists(again) != lists(other)


def test_conversations_are_literal() -> None:
    pieces = [Piece.of([1, 2, 3, 4], [0, 0, 1, 1]), Piece.of([5, 6, 7], [0, 1, 1]), Piece.of([8, 9], [0, 1])]
    rows = lists(pack_rows(of_pieces(*pieces), 6, seed=0))
    assert sorted(rows, key=lambda row: row["input_ids"]) == [
        {
            "input_ids": [1, 2, 3, 4, 8, 9],
            "labels": [IGNORE, IGNORE, 3, 4, IGNORE, 9],
            "position_ids": [0, 1, 2, 3, 0, 1],
        },
        {"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7], "position_ids": [0, 1, 2]},
    ]
    assert len(pack_rows(of_pieces(*pieces), 6, seed=0, pack=False)) == 3


def test_best_fit_keeps_every_item_and_the_capacity() -> None:
    lengths = np.random.default_rng(0).integers(1, 101, 500).tolist()
    bins = best_fit(lengths, 100)
    assert sorted(i for members in bins for i in members) == list(range(500))
    assert all(sum(lengths[i] for i in members) <= 100 for members in bins)
    assert len(bins) <= 1.1 * sum(lengths) / 100
    assert best_fit([5, 5, 3, 7], 10) == [[3, 2], [0, 1]]  # 7 with 3, 5 with 5


def test_collator_pads_with_unlabelled_tokens() -> None:
    rows = pack_rows(of_pieces(Piece.of([1, 2, 3], [0, 1, 1]), Piece.of([5, 6], [0, 1])), 3, seed=0)
    batch = PackedCollator(pad_token_id=9)(sorted(rows, key=lambda row: row["input_ids"][0]))
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, 6, 9]]
    assert batch["labels"].tolist() == [[IGNORE, 2, 3], [IGNORE, 6, IGNORE]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]
    assert "attention_mask" not in batch, "it would let packed documents see each other in transformers' models"
    masked = PackedCollator(pad_token_id=9, mask_padding=True)(sorted(rows, key=lambda row: row["input_ids"][0]))
    assert masked.pop("attention_mask").tolist() == [[1, 1, 1], [1, 1, 0]]
    assert all(torch.equal(torch.as_tensor(masked[name]), torch.as_tensor(batch[name])) for name in batch)
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 6], "padding is a document"
    assert batch["max_length_q"] == batch["max_length_k"] == 3 and batch["tokens"] == 5


@pytest.mark.parametrize(("longest", "width"), [(255, 255), (256, 256), (257, 288), (511, 512)])
def test_long_rows_have_few_different_lengths(longest: int, width: int) -> None:
    rows = [
        {"input_ids": list(range(n)), "labels": list(range(n)), "position_ids": list(range(n))} for n in (longest, 9)
    ]
    batch = PackedCollator(pad_token_id=7)(rows)
    assert batch["input_ids"].shape == (2, width) and batch["tokens"] == longest + 9
    assert batch["input_ids"][0].tolist() == [*range(longest), *[7] * (width - longest)]
    assert batch["position_ids"][1].tolist() == [*range(9), *range(width - 9)]
    assert (batch["labels"][0, longest:] == IGNORE).all()


def test_a_blank_row_is_one_token_that_counts_for_nothing() -> None:
    row = {"input_ids": [1, 2], "labels": [IGNORE, 2], "position_ids": [0, 1]}
    batch = PackedCollator(pad_token_id=9)([blank_row(9), row])
    assert batch["input_ids"].tolist() == [[9, 9], [1, 2]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE], [IGNORE, 2]]
    assert batch["position_ids"].tolist() == [[0, 0], [0, 1]]
    assert batch["tokens"] == 2


# --- rows of files, with the tokenising replaced: a "file" is a store ----------------------------------------


def given(_conversion, files: list[TokenStore]) -> TokenStore:
    (store,) = files
    return store


@pytest.mark.parametrize("strategy, lengths", [("blocks", [5, 5, 2]), ("best_fit", [4, 5, 3])])
def test_texts_become_rows_to_train_and_a_few_to_evaluate_on(strategy, lengths) -> None:
    train = TokenStore.of(input_ids=[[1, 2, 3, 0], [4, 5, 0], [6, 7, 8, 9, 0]])
    rows = pack_texts(given, [train], [train], 0, 5, 0, strategy, max_eval_rows=2)
    assert sorted(len(row["input_ids"]) for row in rows.train) == sorted(lengths)
    assert lists(rows.evaluation) == lists(rows.train)[:2]
    split = ", 1 of the documents split into 2 pieces" if strategy == "blocks" else ""
    assert rows.summary == f"3 documents, 12 tokens in 3 rows of 5, 80.0% filled{split} ({strategy})"
    assert len(pack_texts(given, [train], [train], 0, 5, 0, strategy, max_eval_rows=9).evaluation) == 3
    assert pack_texts(given, [train], [], 0, 5, 0, strategy, 2).evaluation is None


def test_conversations_become_rows_to_train_and_a_few_to_evaluate_on() -> None:
    store = of_pieces(Piece.of([1, 2, 3], [0, 1, 1]), Piece.of([4, 5], [0, 1]), Piece.of([6, 7], [0, 1]))
    store.manifest["counts"] = {"kept": 2, "cut": 1, "dropped": 4, "trained_tokens": 4}
    rows = pack_conversations(given, [store], [store], 4, 0, pack=False, max_eval_rows=1)
    assert [len(row["input_ids"]) for row in lists(rows.train)].count(2) == 2 and len(rows.train) == 3
    assert lists(rows.evaluation) in ([row] for row in lists(pack_rows(store, 4, 0)))
    assert len(pack_conversations(given, [store], [store], 4, 0, True, 9).evaluation) == 2, "evaluation is packed"
    assert len(pack_conversations(given, [store], [], 4, 0, True, 9).train) == 2
    assert rows.summary == (
        "3 conversations (1 cut and 4 dropped as too long), 4 trained of 7 tokens in 3 rows of 4, 58.3% filled"
    )
    assert pack_conversations(given, [store], [], 4, 0, True, 9).evaluation is None
    empty = TokenStore.of(input_ids=[], labels=[])
    empty.manifest["counts"] = {"dropped": 4}
    for files in ([empty], [store]), ([store], [empty]):
        with pytest.raises(UserError, match=r"within 4 tokens \(4 dropped\)"):
            pack_conversations(given, *files, 4, 0, True, 9)


def test_stores_are_named_by_stage_and_keep_its_columns() -> None:
    found = [(each.kind, each.columns, each.settings) for each in (documents(7), conversations(8), preferences(9))]
    assert found == [
        ("pretrain", ("input_ids",), {"end_id": 7}),
        ("sft", ("input_ids", "labels"), {"max_length": 8}),
        ("dpo", ("prompt_ids", "chosen_ids", "rejected_ids"), {"max_length": 9}),
    ]


def test_a_pair_costs_its_prompt_and_its_longer_answer() -> None:
    pairs = Dataset.from_dict(
        {"prompt_ids": [[1, 2], [1]], "chosen_ids": [[3], [2, 3]], "rejected_ids": [[4, 5, 6], [4]]}
    )
    assert pair_lengths(pairs).tolist() == [5, 3]


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
        rows = pack_rows(of_pieces(*pieces), 24, seed=0, pack=pack)
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
