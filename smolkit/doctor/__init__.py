"""The doctor: reading data files, judging their rows, and examining whole files before they are trained on.

Every stage reads its rows through `rows`; `checkup` looks at what a row alone does not show; `repair` writes
cleaned copies. `python -m smolkit.doctor FILE...` does it all for people and for machines.

Rows (schemas in data/README.md):
    pretrain  {"text": str, "category"?: str}
    sft       {"messages": [{"role", "content", "tool_calls"?}...], "tools"?: [...]}
    dpo       {"prompt": str | messages, "chosen": str | messages, "rejected": str | messages}
    exam      {"messages": [...], "answer": str | [str, ...] | call | [call, ...], "tools"?: [...]}
Of several texts each is accepted, of several calls {"name", "arguments"} all are wanted, in order.
"""

from smolkit.doctor.rows import (
    CHECKS,
    PRETRAIN_SUFFIXES,
    RECORD_SUFFIXES,
    Finding,
    Row,
    check_dpo,
    check_exam,
    check_pretrain,
    check_question,
    check_sft,
    expand_paths,
    judged_rows,
    kind_of,
    parse_line,
    read_dpo,
    read_pretrain,
    read_sft,
    read_texts,
    validation_path,
    wanted_calls,
)

__all__ = [
    "CHECKS",
    "PRETRAIN_SUFFIXES",
    "RECORD_SUFFIXES",
    "Finding",
    "Row",
    "check_dpo",
    "check_exam",
    "check_pretrain",
    "check_question",
    "check_sft",
    "expand_paths",
    "judged_rows",
    "kind_of",
    "parse_line",
    "read_dpo",
    "read_pretrain",
    "read_sft",
    "read_texts",
    "validation_path",
    "wanted_calls",
]
