"""openai/gsm8k: primary-school word problems with worked answers.

{"question": str, "answer": str}; the answer carries `<<48/2=24>>` calculator marks, which are removed, and
ends with `#### 24`, which stays: it is where the result is read from."""

import re

from smolkit.sources.base import RowContext, Source, as_messages, sft_record

CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


def convert(row: dict, context: RowContext) -> dict:
    turns = [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": CALCULATOR_MARK.sub("", row["answer"] or "")},
    ]
    return sft_record(
        "gsm8k", f"gsm8k-{context.path.split('/')[-1].split('.')[0]}-{context.index}", as_messages(turns)
    )


SOURCE = Source(
    repo="openai/gsm8k",
    part="sft",
    columns={"question": (str,), "answer": (str,)},
    convert=convert,
    train=("main/train-*.parquet", "train.jsonl"),
    held_out=("main/test-*.parquet", "test.jsonl"),
    licence="MIT",
    size="7,473 + 1,319 problems",
)
