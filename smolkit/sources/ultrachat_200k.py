"""HuggingFaceH4/ultrachat_200k: filtered dialogues of several turns.

{"prompt": str, "prompt_id": str, "messages": [{"role": str, "content": str}, …]}"""

from smolkit.sources.base import RowContext, Source, as_messages, sft_record


def convert(row: dict, context: RowContext) -> dict:
    return sft_record("ultrachat_200k", f"ultrachat-{row['prompt_id']}", as_messages(row["messages"]))


SOURCE = Source(
    repo="HuggingFaceH4/ultrachat_200k",
    part="sft",
    columns={"prompt_id": (str,), "messages": (list,)},
    convert=convert,
    train=("data/train_sft-*.parquet",),
    held_out=("data/test_sft-*.parquet",),
    revision="8049631c405ae6576f93f445c6b8166f76f5505a",
    licence="MIT",
    size="207,865 + 23,110 conversations",
)
