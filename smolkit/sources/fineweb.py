"""HuggingFaceFW/fineweb: cleaned English web text; `sample-10BT` is a random 10 billion tokens of it.

{"text": str, "id": str, "dump": str, "url": str, "date": str, "file_path": str, "language": str,
"language_score": float, "token_count": int}"""

from smolkit.sources.base import Choice, RowContext, Source, text_record

FOLDERS = {"sample-10BT": "sample/10BT", "sample-100BT": "sample/100BT", "sample-350BT": "sample/350BT"}


def convert(row: dict, context: RowContext) -> dict:
    return text_record(row["text"], "fineweb")


SOURCE = Source(
    repo="HuggingFaceFW/fineweb",
    part="pretrain",
    columns={"text": (str,), "id": (str,), "language": (str,), "token_count": (int,)},
    convert=convert,
    train=("{config}/*.parquet",),
    choices={"config": Choice(("sample-10BT",), tuple(FOLDERS), FOLDERS)},
    revision="9bb295ddab0e05d785b879661af7260fed5140fc",
    licence="ODC-By-1.0",
    size="28 GB for sample-10BT (14.9 million documents)",
)
