"""llamafactory/glaive_toolcall_en and _zh: function calls in ShareGPT form, each in a turn of its own.

{"conversations": [{"from": "human" | "gpt" | "function_call" | "observation", "value": str}, …], "tools": str
(JSON)}. `sharegpt-tools` is the same form in your own files."""

from dataclasses import replace

from smolkit.sources.base import RowContext, Source, sft_record
from smolkit.sources.tools import as_tools, tool_messages


def convert(row: dict, context: RowContext) -> dict:
    turns = row["conversations"]
    if (row.get("system") or "").strip():
        turns = [{"from": "system", "value": row["system"]}, *turns]
    tools = as_tools(row["tools"])
    return sft_record(context.stem, f"{context.stem}-{context.index}", tool_messages(turns), tools)


ENGLISH = Source(
    repo="llamafactory/glaive_toolcall_en",
    part="sft",
    columns={"conversations": (list,), "tools": (str, list)},
    convert=convert,
    train=("glaive_toolcall_en*.json",),
    licence="Apache-2.0",
    size="1,000 conversations",
)
CHINESE = replace(ENGLISH, repo="llamafactory/glaive_toolcall_zh", train=("glaive_toolcall_zh*.json",))
OWN = replace(
    ENGLISH,
    repo="own/sharegpt-tools",
    train=("*.json", "*.jsonl", "*.parquet"),
    on_hub=False,
    licence="yours",
    size="your files",
)
SOURCES = (ENGLISH, CHINESE, OWN)
