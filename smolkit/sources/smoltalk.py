"""HuggingFaceTB/smoltalk: the larger mixture, one folder per configuration; `all` holds every other one.

{"messages": [{"role": str, "content": str}, …]}, in `all` also {"source": str}. Its `apigen-80k` rows write
tools into the system prompt and calls as text; both become real tools and `tool_calls`."""

from smolkit.sources.base import Choice, RowContext, Source, as_messages, sft_record
from smolkit.sources.tools import CALL, tool_messages, tools_in_system

CONFIGS = (
    "all",
    "apigen-80k",
    "everyday-conversations",
    "explore-instruct-rewriting",
    "longalign",
    "metamathqa-50k",
    "numina-cot-100k",
    "openhermes-100k",
    "self-oss-instruct",
    "smol-constraints",
    "smol-magpie-ultra",
    "smol-rewrite",
    "smol-summarize",
    "systemchats-30k",
)


def convert(row: dict, context: RowContext) -> dict:
    configuration = context.path.split("/")[-2]
    identifier = f"smoltalk-{configuration}-{context.stem}-{context.index}"
    turns, source = row["messages"], row.get("source") or configuration
    if not any(CALL.search(turn["content"] or "") for turn in turns):
        return sft_record(source, identifier, as_messages(turns))
    tools = tools_in_system(turns[0]["content"] or "")
    # The system prompt of such a row is the tool list and the call format, which our template writes itself.
    return sft_record(source, identifier, tool_messages(turns[1:] if tools else turns, "role", "content"), tools)


SOURCE = Source(
    repo="HuggingFaceTB/smoltalk",
    part="sft",
    columns={"messages": (list,)},
    convert=convert,
    train=("data/{config}/train-*.parquet",),
    held_out=("data/{config}/test-*.parquet",),
    choices={"config": Choice(("all",), CONFIGS)},
    revision="5feaf2fd3ffca7c237fc38d1861bc30365d48ffa",
    default=True,
    licence="Apache-2.0",
    size="about 1.1 million conversations",
)
