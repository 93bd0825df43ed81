"""NousResearch/hermes-function-calling-v1: function calls in ShareGPT form, written between Hermes tags.

{"id": str, "conversations": [{"from": "system" | "human" | "gpt" | "tool", "value": str}, …], "tools"?: str
(JSON)}. The system prompt is the tool list and the call format; with the tools known, our template writes
both."""

from smolkit.sources.base import Choice, Rejected, RowContext, Source, sft_record
from smolkit.sources.tools import as_tools, tool_messages, tools_in_system


def convert(row: dict, context: RowContext) -> dict:
    turns = row["conversations"]
    tools = as_tools(row.get("tools") or []) or tools_in_system(turns[0]["value"] or "")
    if not tools:
        raise Rejected("no tool list")
    messages = tool_messages([turn for turn in turns if turn["from"] != "system"])
    return sft_record("hermes-function-calling-v1", f"hermes-{context.stem}-{row['id']}", messages, tools)


SOURCE = Source(
    repo="NousResearch/hermes-function-calling-v1",
    part="sft",
    columns={"id": (str,), "conversations": (list,)},
    convert=convert,
    train=("{config}.json",),
    choices={
        "config": Choice(
            ("func-calling-singleturn", "func-calling", "glaive-function-calling-5k"),
            ("func-calling-singleturn", "func-calling", "glaive-function-calling-5k"),
        )
    },
    revision="dae3e1d28cfbcf4b915c04ea1e072030529b4bda",
    licence="Apache-2.0",
    size="about 8,900 conversations",
)
