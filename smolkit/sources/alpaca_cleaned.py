"""yahma/alpaca-cleaned: instructions with an optional input, one JSON array.

{"instruction": str, "input": str (often ""), "output": str}"""

from smolkit.sources.base import RowContext, Source, question_and_answer, sft_record


def convert(row: dict, context: RowContext) -> dict:
    parts = [part for part in (row["instruction"], row["input"]) if (part or "").strip()]
    return sft_record(
        "alpaca-cleaned", f"alpaca-cleaned-{context.index}", question_and_answer("\n\n".join(parts), row["output"])
    )


SOURCE = Source(
    repo="yahma/alpaca-cleaned",
    part="sft",
    columns={"instruction": (str,), "input": (str,), "output": (str,)},
    convert=convert,
    train=("alpaca_data_cleaned.json",),
    revision="12567cabf869d7c92e573c7c783905fc160e9639",
    licence="CC-BY-4.0",
    size="51,760 instructions",
)
