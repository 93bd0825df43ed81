"""HuggingFaceH4/ultrafeedback_binarized: preference pairs as two whole conversations.

{"prompt_id": str, "chosen": [{"role", "content"}, …], "rejected": […], "score_chosen": float,
"score_rejected": float, …}"""

from smolkit.sources.base import RowContext, Source, pair_from_conversations, refuse_tied


def convert(row: dict, context: RowContext) -> dict:
    refuse_tied(row["score_chosen"], row["score_rejected"])
    return pair_from_conversations("ultrafeedback_binarized", row["prompt_id"], row["chosen"], row["rejected"])


SOURCE = Source(
    repo="HuggingFaceH4/ultrafeedback_binarized",
    part="dpo",
    columns={
        "prompt_id": (str,),
        "chosen": (list,),
        "rejected": (list,),
        "score_chosen": (float, int, str),
        "score_rejected": (float, int, str),
    },
    convert=convert,
    train=("data/train_prefs-*.parquet",),
    held_out=("data/test_prefs-*.parquet",),
    revision="3949bf5f8c17c394422ccfab0c31ea9c20bdeb85",
    licence="MIT",
    size="61,135 + 2,000 pairs",
)
