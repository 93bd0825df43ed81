"""Exams: questions with one right reply, judged exactly; tool calls argument by argument.

An exam is a JSON Lines file of `{"id", "kind", "language", "messages", "tools"?, "answer", "chance"?}`.
`answer` is the exact reply (or a list of accepted ones), or `{"name", "arguments"}` for a tool call (or a list of the
calls that a reply has to make, in this order).
Replies are greedy, so that two implementations of the same weights can be compared token by token.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smolkit.chat import parse_tool_calls
from smolkit.doctor import check_exam, wanted_calls
from smolkit.errors import UserError
from smolkit.evaluation.records import Record, missing, read_records
from smolkit.evaluation.results import RESERVED, Results
from smolkit.evaluation.subjects import Prompt, Subject
from smolkit.evaluation.texts import refuses
from smolkit.files import read_lines

LABELS = ("kind", "language")


def read_exam(path: Path, kinds: Sequence[str] | None = None, limit: int | None = None) -> list[dict]:
    """The items of an exam file, of the named kinds only, at most `limit`; each is checked."""
    remedy = "`prepare_datasets.py --source tiny` writes data/exam/exam.jsonl"
    items = [item for item in read_records(path, problem_of_item, remedy) if kinds is None or item["kind"] in kinds]
    if not items:
        raise UserError(f"{path}: no exam item{f' of kind {kinds}' if kinds else ''}")
    return items[:limit]


def problem_of_item(item: Record) -> str | None:
    """What is wrong with an exam item, or None."""
    problem = missing(item, "id", "kind", "language", "messages", "answer") or _problem_of_labels(item)
    try:
        if not problem:
            check_exam(item)
    except UserError as error:
        problem = str(error)
    return f"exam item: {problem}" if problem else None


def _problem_of_labels(item: Record) -> str | None:
    """What is wrong with what the figures are named by, or None."""
    for key, types, wanted in (("id", (str, int), "a text or a number"), *((k, (str,), "a text") for k in LABELS)):
        if not isinstance(item[key], types) or isinstance(item[key], bool) or item[key] == "":
            return f"{key} must be {wanted}, not {item[key]!r}"
    chance = item.get("chance", 0)
    if isinstance(chance, bool) or not isinstance(chance, (int, float)) or not 0 <= chance <= 1:
        return f"chance must be a number from 0 to 1, not {chance!r}"
    kind = item["kind"]
    return f"kind {kind!r} is a key of metrics.json: call it otherwise" if kind in RESERVED else None


@dataclass(frozen=True)
class Answer:
    """What the model replied to one item, with the end token if it `ended`, and the verdicts. `output_ids` is None
    where a server replied."""

    id: str
    kind: str
    language: str
    correct: bool
    ended: bool
    text: str
    output_ids: list[int] | None
    verdicts: dict[str, bool]


def prompt_of(item: Record) -> Prompt:
    """What is asked by an exam item."""
    return Prompt(item["messages"], item.get("tools"))


def take_exam(items: list[dict], subject: Subject, max_new_tokens: int) -> list[Answer]:
    """Ask every item, greedily, and judge the replies."""
    prompts = [prompt_of(item) for item in items]
    answers = []
    for item, reply in zip(items, subject.replies(prompts, max_new_tokens, desc="exam"), strict=True):
        verdicts = judge(item["answer"], reply.text)
        answers.append(
            Answer(
                item["id"],
                item["kind"],
                item["language"],
                verdicts["exact"],
                reply.ended,
                reply.text,
                reply.output_ids,
                verdicts,
            )
        )
    return answers


def judge(expected: str | list | dict, text: str) -> dict[str, bool]:
    """Verdicts on one reply. Text: "exact". Tool calls: "parses", "right_tool", "arguments_exact", each only with the
    one before and of all wanted calls in their order, and "exact" when there are exactly these calls and no broken one
    beside them."""
    wanted = wanted_calls(expected)
    if not wanted:
        accepted = [expected] if isinstance(expected, str) else expected
        return {"exact": text in [answer.strip() for answer in accepted]}
    content, calls = parse_tool_calls(text)
    pairs = list(zip(calls, wanted, strict=False))
    parses = len(calls) >= len(wanted)
    right_tool = parses and all(call["name"] == other["name"] for call, other in pairs)
    same = right_tool and all(canonical(call["arguments"]) == canonical(other["arguments"]) for call, other in pairs)
    exact = same and len(calls) == len(wanted) and "<tool_call>" not in content
    return {"parses": parses, "right_tool": right_tool, "arguments_exact": same, "exact": exact}


def canonical(value: object) -> str:
    """JSON in which equal values are equal texts; unlike `==`, 1 and "1", 1 and True, 1 and 1.0 differ."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def exam_results(items: list[dict], answers: list[Answer]) -> Results:
    """Shares per kind and per kind and language: `qa`, `qa_en`, `qa_en_chance`, `tool_exact`, `tool_parses`,
    `tool_exact_zh`, …, `skill`; over all, `ends_by_itself`; and where the exam asks for refusals, `refused` (of what
    should be) and `false_refusal` (of what should not)."""
    results = Results()
    groups: dict[str, list[tuple[dict, Answer]]] = defaultdict(list)
    for item, answer in zip(items, answers, strict=True):
        groups[item["kind"]].append((item, answer))
    for kind, group in groups.items():
        languages = sorted({item["language"] for item, _ in group})
        for suffix, wanted in [("", languages), *((f"_{language}", [language]) for language in languages)]:
            part = [(item, answer) for item, answer in group if item["language"] in wanted]
            verdicts = list(dict.fromkeys(name for _, answer in part for name in answer.verdicts))
            for verdict in verdicts:
                name = f"{kind}{suffix}" if verdicts == ["exact"] else f"{kind}_{verdict}{suffix}"
                results.add(name, [(answer.id, answer.verdicts.get(verdict, False)) for _, answer in part])
            chances = [item["chance"] for item, _ in part if "chance" in item]
            if chances:
                results.expectation(f"{kind}{suffix}_chance", sum(chances) / len(chances))
    results.add("ends_by_itself", [(answer.id, answer.ended) for answer in answers])
    if "refusal" in groups:
        for name, is_refusal in (("refused", True), ("false_refusal", False)):
            judged = [(a.id, refuses(a.text)) for a in answers if (a.kind == "refusal") is is_refusal]
            if judged:
                results.add(name, judged)
    return results


Given = tuple[str, list[int] | None, str]  # item id, token ids, text


def same_answers(answers: list[Answer], others: list[Given]) -> Results:
    """Share of answers that equal those of another run of the same exam, token by token, or as texts where one of the
    two runs asked a server."""
    _check_same([answer.id for answer in answers], others, "the other run")
    results = Results()
    results.add(
        "same_greedy_answers",
        [
            (answer.id, answer.text == text if None in (answer.output_ids, ids) else answer.output_ids == ids)
            for answer, (_, ids, text) in zip(answers, others, strict=True)
        ],
    )
    return results


def _check_same(ids: list[str], others: list[Given], whose: str) -> None:
    if ids != [identifier for identifier, _, _ in others]:
        raise UserError(f"{whose} answered other items ({len(others)}, here {len(ids)}): use the same exam")


def as_given(answers: list[Answer]) -> list[Given]:
    """Answers as `same_answers` compares them."""
    return [(answer.id, answer.output_ids, answer.text) for answer in answers]


def read_answers(path: Path, items: list[Record] | None = None) -> list[Given]:
    """The answers in an `answers.jsonl` of another run. UserError where they are none, or not those of `items`."""
    try:
        rows = [json.loads(line) for line in read_lines(path) if line.strip()]
        answers = [(row["id"], row["output_ids"], row["text"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not an answers.jsonl of eval_model.py --exam ({error})") from None
    if items is not None:
        _check_same([item["id"] for item in items], answers, f"--compare_with {path}: the other run")
    return answers
