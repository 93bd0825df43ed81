"""O1-OPEN/OpenO1-SFT: answers with worked thoughts, `<Thought>…</Thought><Output>…</Output>`.

{"instruction": str, "output": str}; the repository holds other files too, so the file is named."""

import re

from smolkit.sources.base import Rejected, RowContext, Source, question_and_answer, sft_record

THOUGHT = re.compile(r"<Thought>.*?</Thought>", re.DOTALL | re.IGNORECASE)
OUTPUT_TAG = re.compile(r"</?Output>", re.IGNORECASE)
ANY_TAG = re.compile(r"</?Thought>", re.IGNORECASE)


def answer_only(text: str) -> str:
    """The answer without the thoughts and without the tags around it. Raises Rejected when thoughts are not
    closed, because their end is then a guess."""
    text = THOUGHT.sub("", text)
    if ANY_TAG.search(text):
        raise Rejected("thoughts that are not closed cannot be stripped")
    return OUTPUT_TAG.sub("", text).strip()


def convert(row: dict, context: RowContext) -> dict:
    answer = row["output"] if context.thoughts == "keep" else answer_only(row["output"] or "")
    messages = question_and_answer(row["instruction"], answer)
    return sft_record("OpenO1-SFT", f"openo1-sft-{context.index}", messages)


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
