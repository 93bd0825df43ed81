"""HuggingFaceTB/smol-smoltalk: conversations for models below a billion parameters.

{"messages": [{"role": str, "content": str}, …], "source": str}"""

from smolkit.sources.base import RowContext, Source, as_messages, sft_record


def convert(row: dict, context: RowContext) -> dict:
    identifier = f"smol-smoltalk-{context.stem}-{context.index}"
    return sft_record(row["source"] or "smol-smoltalk", identifier, as_messages(row["messages"]))


SOURCE = Source(
    repo="HuggingFaceTB/smol-smoltalk",
    part="sft",
    columns={"messages": (list,), "source": (str,)},
    convert=convert,
    train=("data/train-*.parquet",),
    held_out=("data/test-*.parquet",),
    revision="f73fe857d519ff6ac5af2ea67c4d3834da7b8bcc",
    default=True,
    licence="Apache-2.0",
    size="460,341 + 24,229 conversations",
)
