"""`openai-tools`: function-calling conversations in OpenAI's own form, in your own files.

{"messages": [{"role": str, "content": str | null, "tool_calls"?: [{"type": "function", "function": {"name": str,
"arguments": JSON str}}, …]}, …], "tools"?: [{"type": "function", "function": {…}}, …]}"""

from smolkit.sources.base import RowContext, Source, sft_record
from smolkit.sources.tools import as_tools, tool_messages


def convert(row: dict, context: RowContext) -> dict:
    messages = tool_messages(row["messages"], "role", "content")
    return sft_record("openai-tools", f"{context.stem}-{context.index}", messages, as_tools(row.get("tools")))


SOURCE = Source(
    repo="own/openai-tools",
    part="sft",
    columns={"messages": (list,)},
    convert=convert,
    train=("*.jsonl", "*.json", "*.parquet"),
    on_hub=False,
    licence="yours",
    size="your files",
)
