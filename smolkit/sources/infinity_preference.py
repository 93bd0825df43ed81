"""BAAI/Infinity-Preference: preference pairs as two whole conversations.

{"id": int, "prompt": str, "chosen": [{"role", "content"}, …], "rejected": […], "task_category": str}"""

from smolkit.sources.base import RowContext, Source, pair_from_conversations


def convert(row: dict, context: RowContext) -> dict:
    identifier = f"infinity-preference-{row['id']}"
    return pair_from_conversations("Infinity-Preference", identifier, row["chosen"], row["rejected"])


SOURCE = Source(
    repo="BAAI/Infinity-Preference",
    part="dpo",
    columns={"id": (int,), "chosen": (list,), "rejected": (list,)},
    convert=convert,
    train=("data/train-*.parquet", "train-*.parquet"),
    held_out=("data/test-*.parquet", "test-*.parquet"),
    gated=True,
    licence="Apache-2.0",
    size="about 59,000 pairs",
)
