"""roneneldan/TinyStories: short stories in the words of a four-year-old.

{"text": str}"""

from smolkit.sources.base import RowContext, Source, text_record


def convert(row: dict, context: RowContext) -> dict:
    return text_record(row["text"], "TinyStories")


SOURCE = Source(
    repo="roneneldan/TinyStories",
    part="pretrain",
    columns={"text": (str,)},
    convert=convert,
    train=("data/train-*.parquet",),
    held_out=("data/validation-*.parquet",),
    revision="f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
    licence="CDLA-Sharing-1.0",
    size="2,119,719 + 21,990 stories",
)
