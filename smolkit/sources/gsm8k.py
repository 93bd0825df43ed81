"""openai/gsm8k: primary-school word problems with worked answers.

{"question": str, "answer": str}; the answer carries `<<48/2=24>>` calculator marks, which are removed, and
ends with `#### 24`, which stays: it is where the result is read from."""

import re

from smolkit.sources.base import RowContext, Source, question_and_answer, sft_record

CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


def convert(row: dict, context: RowContext) -> dict:
    messages = question_and_answer(row["question"], CALCULATOR_MARK.sub("", row["answer"] or ""))
    return sft_record("gsm8k", f"gsm8k-{context.stem}-{context.index}", messages)


SOURCE = Source(
    repo="openai/gsm8k",
    part="sft",
    columns={"question": (str,), "answer": (str,)},
    convert=convert,
    train=("main/train-*.parquet", "train.jsonl"),
    held_out=("main/test-*.parquet", "test.jsonl"),
    revision="e53f048856ff4f594e959d75785d2c2d37b678ee",
    licence="MIT",
    size="7,473 + 1,319 problems",
)
