"""trl-lib/ultrafeedback_binarized: preference pairs as two whole conversations, the prompt inside.

{"chosen": [{"role", "content"}, …], "rejected": […], "score_chosen": float, "score_rejected": float}"""

from smolkit.sources.base import RowContext, Source, pair_from_conversations, refuse_tied


def convert(row: dict, context: RowContext) -> dict:
    refuse_tied(row["score_chosen"], row["score_rejected"])
    identifier = f"trl-ultrafeedback-{context.stem}-{context.index}"
    return pair_from_conversations("trl-ultrafeedback_binarized", identifier, row["chosen"], row["rejected"])


SOURCE = Source(
    repo="trl-lib/ultrafeedback_binarized",
    part="dpo",
    columns={
        "chosen": (list,),
        "rejected": (list,),
        "score_chosen": (float, int, str),
        "score_rejected": (float, int, str),
    },
    convert=convert,
    train=("data/train-*.parquet",),
    held_out=("data/test-*.parquet",),
    revision="47124cb5778f5d50de1c7676a412828f3ea7c555",
    licence="MIT",
    size="62,135 + 1,000 pairs",
)
