"""HuggingFaceTB/smollm-corpus: synthetic textbooks (`cosmopedia-v2`) and educational web text
(`fineweb-edu-dedup`).

cosmopedia-v2: {"prompt": str, "text": str, "token_length": int, "audience": str, "format": str,
"seed_data": str}; fineweb-edu-dedup: {"text": str, "id": str, "metadata": {…}}"""

from smolkit.sources.base import Choice, RowContext, Source, text_record


def convert(row: dict, context: RowContext) -> dict:
    return text_record(row["text"], context.path.split("/")[-2])


SOURCE = Source(
    repo="HuggingFaceTB/smollm-corpus",
    part="pretrain",
    columns={"text": (str,)},
    convert=convert,
    train=("{config}/train-*.parquet",),
    choices={"config": Choice(("cosmopedia-v2", "fineweb-edu-dedup"), ("cosmopedia-v2", "fineweb-edu-dedup"))},
    refused={
        "python-edu": "python-edu holds only file identifiers; its text must be fetched from the Software Heritage "
        "archive and is not in the dataset"
    },
    revision="3ba9d605774198c5868892d7a8deda78031a781f",
    licence="ODC-By-1.0",
    size="39 million and 190 million documents (28B and 220B tokens)",
)
