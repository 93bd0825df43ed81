"""Where keys and values live: literal sizes, and rows against a plain dictionary of what was written into them."""

import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from smolkit.cache import Cache, PrefixBlocks, Row, room_for

COLUMN = 16  # bytes: keys and values of one layer, one head, two channels, float32
CONFIG = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=1, head_dim=2)


@dataclass(eq=False)
class Owner:
    number: int
    length: int = 0


def make(**options: object) -> Cache:
    """Rows of 256 and 608 columns."""
    return Cache(CONFIG, torch.float32, torch.device("cpu"), **{"max_rows": 3, "max_columns": 600, **options})


def fill(row: Row, until: int) -> None:
    """Write the columns up to `until`, each with a number of its own."""
    owner = row.owner
    row.states[0, :, 0, owner.length : until] = (owner.number * 1000 + torch.arange(owner.length, until))[:, None]
    owner.length = until


def test_rows_have_room_for_the_next_token_and_a_column_that_nobody_sees() -> None:
    assert [room_for(columns) for columns in (0, 30, 31, 62, 63)] == [32, 32, 64, 64, 96]
    cache = make()
    assert cache.take(254, Owner(0)).states.shape == (1, 2, 1, 256, 2)
    assert cache.take(255, Owner(1)).states.shape == (1, 2, 1, 608, 2)
    assert [shelf.width for shelf in make(max_columns=100).shelves] == [128]
    assert [shelf.width for shelf in make(max_columns=480).shelves] == [256, 512]
    assert [shelf.width for shelf in make(max_columns=2048).shelves] == [256, 512, 1024, 2080]
    assert [shelf.rows_per_rack for shelf in make(max_rows=10**6).shelves] == [2**27 // 4096, 2**27 // 9728]
    elsewhere = Cache(CONFIG, torch.float32, torch.device("meta"), max_rows=10**6, max_columns=600)
    assert [shelf.rows_per_rack for shelf in elsewhere.shelves] == [2**29 // 4096, 2**29 // 9728]
    assert elsewhere.take(10, Owner(0)).states.is_meta


@pytest.mark.parametrize("seed", range(3))
def test_a_row_keeps_its_columns_whoever_comes_goes_or_grows(seed: int) -> None:
    pick, cache, rows = random.Random(seed), make(max_rows=2), []
    for number in range(300):
        action = pick.choice("take grow grow release".split())
        if action == "take" or not rows:
            length = pick.randrange(1, 500)
            rows.append(cache.take(length, Owner(number)))
            fill(rows[-1], length)
        elif action == "grow":
            at = pick.randrange(len(rows))
            row = cache.widen(rows[at], rows[at].owner.length)
            assert row.states.shape[3] > row.owner.length + 1
            assert row is rows[at] or rows[at].states.shape[3] < row.states.shape[3], "only if it has to"
            rows[at] = row
            fill(row, min(row.owner.length + pick.randrange(1, 90), row.states.shape[3] - 1, 600))
            rows = [row for row in rows if row.owner.length < 600 or cache.release(row)]
        else:
            cache.release(rows.pop(pick.randrange(len(rows))))
        for row in rows:
            expected = (row.owner.number * 1000 + torch.arange(row.owner.length))[None, :, None].expand(2, -1, 2)
            assert torch.equal(row.states[0, :, 0, : row.owner.length], expected.float())
        assert sum(rack.nbytes for shelf in cache.shelves for rack in shelf.racks) == cache.bytes == cache.row_bytes
        assert {row for _, members in cache.racks_with(set(rows)) for row in members} == set(rows)


def test_memory_is_given_back_before_a_row_is_refused() -> None:
    """An eighth of 64 KiB holds a rack of two short rows, or a single long one; a quarter is for prefixes."""
    cache = make(budget=2**16, prefix_share=0.25)
    assert [cache.rack_bytes(shelf) for shelf in cache.shelves] == [2 * 256 * COLUMN, 608 * COLUMN]
    assert cache.prefixes.limit == 2**14 and cache.least_budget == 8192 + 9728 + 2**14
    rows = [cache.take(10, Owner(number)) for number in range(12)]
    assert None not in rows and cache.row_bytes == cache.bytes == 2**16 - 2**14, "six racks fill the budget"
    assert cache.take(10, Owner(12)) is None
    for row in rows[10:]:
        cache.release(row)
    assert cache.row_bytes == 2**16 - 2**14, "kept for whoever comes next"
    assert cache.take(300, Owner(13)) is None and cache.widen(rows[0], 255) is None, "one idle rack is too little"
    assert rows[0].states.shape[3] == 256 and cache.row_bytes == 5 * 8192
    for row in rows[8:10]:
        cache.release(row)
    assert cache.take(300, Owner(14)) is not None and cache.row_bytes == 4 * 8192 + 9728


def test_a_step_gets_each_rack_up_to_the_last_row_it_wants() -> None:
    cache = make(budget=2**16)  # two short rows in a rack
    a, b, c, d = (cache.take(10, Owner(number)) for number in range(4))
    long = cache.take(300, Owner(4))
    for row in (a, b, c, d, long):
        fill(row, 10)
    for wanted, expected in (
        ({a}, [[a]]),
        ({b}, [[a, b]]),
        ({b, c}, [[a, b], [c]]),
        ({d, long}, [[c, d], [long]]),
        (set(), []),
    ):
        racks = cache.racks_with(wanted)
        assert [rows for _, rows in racks] == expected
        for states, rows in racks:
            assert states.shape[2] == len(rows)
            assert states[0, 0, :, 0, 3, 0].tolist() == [row.owner.number * 1000 + 3 for row in rows]


# --- beginnings of prompts: chunks of two tokens, 16 bytes each -----------------------------------------------


def states(first: int) -> torch.Tensor:
    return (first + torch.arange(8.0)).view(1, 1, 1, 8, 1).repeat(1, 2, 1, 1, 1)


def columns(blocks: list[torch.Tensor]) -> list[list[float]]:
    return [block[0, 0, 0, :, 0].tolist() for block in blocks]


def test_prefixes_are_found_by_all_their_tokens() -> None:
    prefixes = PrefixBlocks(limit=1000)
    row = states(0)
    prefixes.keep(None, [1, 2], 2, row)
    prefixes.keep(None, [1, 2, 3, 4], 2, row)
    prefixes.keep(None, [1, 2, 3, 4], 2, states(50))  # known already
    prefixes.keep(None, [7, 8, 9, 10], 2, row)  # without [7, 8] nobody could find it
    assert prefixes.bytes == 2 * 16
    row.zero_()  # the row goes on to another sequence
    for tokens, expected in (
        ([1, 2, 3, 4, 5], [[0, 1], [2, 3]]),
        ([1, 2, 3, 4], [[0, 1], [2, 3]]),
        ([1, 2, 3, 5], [[0, 1]]),
        ([1], []),
        ([3, 4], []),
        ([7, 8, 9, 10], []),
    ):
        assert columns(prefixes.find(None, tokens, 2)) == expected
    assert prefixes.find("an adapter", [1, 2], 2) == []


def test_the_same_tokens_after_another_beginning_are_others() -> None:
    prefixes = PrefixBlocks(limit=1000)
    for tokens in ([1, 2], [1, 2, 5, 6], [3, 4]):
        prefixes.keep(None, tokens, 2, states(tokens[0]))
    assert columns(prefixes.find(None, [3, 4, 5, 6], 2)) == [[3, 4]]
    prefixes.keep(None, [3, 4, 5, 6], 2, states(3))
    assert columns(prefixes.find(None, [3, 4, 5, 6], 2)) == [[3, 4], [5, 6]]
    assert columns(prefixes.find(None, [1, 2, 5, 6], 2)) == [[1, 2], [3, 4]]


def test_the_least_recently_used_chunk_goes_first_and_before_the_one_it_stands_on() -> None:
    prefixes = PrefixBlocks(limit=3 * 16)
    prefixes.keep(None, [1, 2], 2, states(0))
    prefixes.keep(None, [1, 2, 3, 4], 2, states(0))
    prefixes.keep(None, [5, 6], 2, states(20))
    assert prefixes.bytes == 48
    prefixes.keep(None, [7, 8], 2, states(30))
    assert prefixes.bytes == 48 and columns(prefixes.find(None, [1, 2, 3, 4], 2)) == [[0, 1]]
    prefixes.keep(None, [9, 9], 2, states(40))  # [1, 2] has just been used
    assert [len(prefixes.find(None, tokens, 2)) for tokens in ([1, 2], [5, 6], [7, 8], [9, 9])] == [1, 0, 1, 1]


def test_a_beginning_that_does_not_fit_is_not_begun_to_be_replaced() -> None:
    prefixes = PrefixBlocks(limit=2 * 16)
    tokens = [1, 2, 3, 4, 5, 6]
    for end in (2, 4, 6):
        prefixes.keep(None, tokens[:end], 2, states(0))
    assert columns(prefixes.find(None, tokens, 2)) == [[0, 1], [2, 3]] and prefixes.bytes == 32


def test_one_token_is_always_left_to_compute() -> None:
    cache = make(budget=2**20, prefix_share=0.5)
    first = cache.take(10, Owner(1))
    fill(first, 4)
    for end in (2, 4):
        cache.keep_prefix(None, [1, 2, 3, 4][:end], 2, first)
    for tokens, filled in (([1, 2, 3, 4, 5], 4), ([1, 2, 3, 4], 2), ([1, 2], 0)):
        row = cache.take(10, Owner(2))
        assert cache.fill_from_prefixes(None, tokens, 2, row) == filled
        assert torch.equal(row.states[:, :, :, :filled], first.states[:, :, :, :filled])
    assert cache.bytes == cache.row_bytes + 2 * 2 * COLUMN
