"""HuggingFaceH4/ultrafeedback_binarized: preference pairs as two whole conversations.

{"prompt_id": str, "chosen": [{"role", "content"}, …], "rejected": […], "score_chosen": float, …}"""

from smolkit.sources.base import RowContext, Source, pair_from_conversations


def convert(row: dict, context: RowContext) -> dict:
    return pair_from_conversations(
        "ultrafeedback_binarized", row["prompt_id"], row["chosen"], row["rejected"]
    )


SOURCE = Source(
    repo="HuggingFaceH4/ultrafeedback_binarized",
    part="dpo",
    columns={"prompt_id": (str,), "chosen": (list,), "rejected": (list,)},
    convert=convert,
    train=("data/train_prefs-*.parquet",),
    held_out=("data/test_prefs-*.parquet",),
    licence="MIT",
    size="61,100 + 2,000 pairs",
)
