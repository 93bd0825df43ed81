"""HuggingFaceTB/smoltalk: the larger mixture, one folder per configuration; `all` holds every other one.

{"messages": [{"role": str, "content": str}, …]}, in `all` also {"source": str}"""

from smolkit.sources.base import RowContext, Source, as_messages, sft_record


def convert(row: dict, context: RowContext) -> dict:
    configuration, file = context.path.split("/")[-2:]
    identifier = f"smoltalk-{configuration}-{file.split('.')[0]}-{context.index}"
    return sft_record(row.get("source") or configuration, identifier, as_messages(row["messages"]))


SOURCE = Source(
    repo="HuggingFaceTB/smoltalk",
    part="sft",
    columns={"messages": (list,)},
    convert=convert,
    train=("data/all/train-*.parquet",),
    held_out=("data/all/test-*.parquet",),
    default=True,
    licence="Apache-2.0",
    size="about 1.1 million conversations",
)
