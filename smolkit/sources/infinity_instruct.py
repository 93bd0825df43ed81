"""BAAI/Infinity-Instruct: English and Chinese conversations, one folder per release (`7M`, `Gen`, …).

{"id": int | str, "conversations": [{"from": "human" | "gpt" | "system", "value": str}, …], "source": str,
…}"""

from smolkit.sources.base import Choice, RowContext, Source, as_messages, sft_record


def convert(row: dict, context: RowContext) -> dict:
    messages = as_messages(row["conversations"], role="from", content="value")
    release = context.path.split("/")[-2]
    return sft_record(row["source"] or "Infinity-Instruct", f"infinity-instruct-{release}-{row['id']}", messages)


SOURCE = Source(
    repo="BAAI/Infinity-Instruct",
    part="sft",
    columns={"id": (int, str), "conversations": (list,), "source": (str,)},
    convert=convert,
    train=("{config}/*.parquet",),
    choices={"config": Choice(("7M", "Gen"), ("3M", "7M", "7M_core", "7M_domains", "0625", "Gen"))},
    gated=True,
    licence="CC-BY-SA-4.0",
    size="7.4 + 1.4 million conversations",
)
