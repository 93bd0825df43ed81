"""BAAI/IndustryCorpus2: web text by `<industry>/<language>/<quality>/rank_N.parquet`.

Apart from `text` the columns differ between the English and the Chinese files, and `industry_type` is Chinese
in both; the category is therefore the industry's folder name."""

from smolkit.sources.base import Choice, RowContext, Source, text_record


def convert(row: dict, context: RowContext) -> dict:
    """{"text": str, …} → {"text", "category"}."""
    return text_record(row["text"], context.path.split("/")[-4])


SOURCE = Source(
    repo="BAAI/IndustryCorpus2",
    part="pretrain",
    columns={"text": (str,)},
    convert=convert,
    train=("{industry}/{language}/{quality}/*.parquet",),
    choices={
        "industry": Choice(("*",)),
        "language": Choice(("english", "chinese"), ("english", "chinese")),
        "quality": Choice(("high",), ("high", "middle", "low")),
    },
    default=True,
    gated=True,
    licence="Apache-2.0",
    size="1 TB Chinese, 2.2 TB English",
)
