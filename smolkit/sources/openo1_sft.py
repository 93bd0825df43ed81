"""O1-OPEN/OpenO1-SFT: answers with worked thoughts, `<Thought>…</Thought><Output>…</Output>`.

{"instruction": str, "output": str}; the repository holds other files too, so the file is named."""

from smolkit.sources.base import RowContext, Source, as_messages, sft_record


def convert(row: dict, context: RowContext) -> dict:
    turns = [
        {"role": "user", "content": row["instruction"]},
        {"role": "assistant", "content": row["output"]},
    ]
    return sft_record("OpenO1-SFT", f"openo1-sft-{context.index}", as_messages(turns))


SOURCE = Source(
    repo="O1-OPEN/OpenO1-SFT",
    part="sft",
    columns={"instruction": (str,), "output": (str,)},
    convert=convert,
    train=("OpenO1-SFT.jsonl",),
    default=True,
    licence="Apache-2.0",
    size="about 78,000 conversations",
)
