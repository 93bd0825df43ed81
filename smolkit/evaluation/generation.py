"""Tasks with written replies: right ones, refusals, endings, diversity; and samples that show a wanted quality.

A task is a JSON Lines file of `{"id"?, "prompt" | "messages", "tools"?, "stop"?, "answer"?, "match"?, "refusal"?}`:
`messages` is a conversation to answer, `prompt` a text to continue (up to `stop`, a text or several). `answer` is one
accepted answer or several, or `{"name", "arguments"}` for a tool call (or a list of all wanted ones); `match` says when
a reply gives it: "exact" (all of the reply), "contains", "regex" (found anywhere), "number" (the last number of the
reply). `refusal` says whether the prompt should be refused. A row without `answer` only counts for endings and
diversity.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smolkit.doctor import check_question, wanted_calls
from smolkit.errors import UserError
from smolkit.evaluation.exam import judge
from smolkit.evaluation.lengths import named
from smolkit.evaluation.records import Record, identifiers
from smolkit.evaluation.results import Results
from smolkit.evaluation.subjects import Prompt, Reply, Subject
from smolkit.evaluation.texts import compression_ratio, distinct, refuses, repetition

MATCHES = ("exact", "contains", "regex", "number")
# The sign of 10-4 is no sign of the 4, nor the dash of 3月-5月 one of the 5; that of 答案是-4 and 2和-2 is.
_UNITS = "年月日号周天时点分秒岁元角个页章节"
_NUMBER = re.compile(rf"(?:(?<![A-Za-z\d_)）])(?<!\d[{_UNITS}])-)?\d[\d,]*(?:\.\d+)?")
_MINUS = str.maketrans("−－", "--")  # U+2212, which models write in formulas, and the wide one of Chinese keyboards
HINTS = ("must_start_with", "must_end_with")


def problem_of_task(row: Record) -> str | None:
    """What is wrong with a row of a task, or None."""
    if ("prompt" in row) == ("messages" in row):
        return 'needs either "prompt" (a text to continue) or "messages" (a conversation)'
    if "prompt" in row and (not isinstance(row["prompt"], str) or not row["prompt"]):
        return "prompt must be a text"
    if row.get("match", "exact") not in MATCHES:
        return f"match must be one of {', '.join(MATCHES)}, not {row['match']!r}"
    stops = _listed(row.get("stop", []))
    if len(stops) > 4 or not all(isinstance(stop, str) and stop for stop in stops):
        return "stop must be a text or a list of at most four texts"
    try:
        if "messages" in row:
            check_question(row)
        return _problem_of_answer(row)
    except UserError as error:
        return str(error)


def _problem_of_answer(row: Record) -> str | None:
    """What is wrong with the answer, if there is one, or None; `UserError` where the doctor says it."""
    if "answer" not in row or wanted_calls(_answers(row)):
        return None
    for answer in _answers(row):
        if row.get("match") == "number" and number_in(answer) is None:
            return f"match is number, but the answer {answer!r} has none"
        if row.get("match") == "regex":
            try:
                re.compile(answer)
            except re.error as error:
                return f"answer {answer!r} is not a regular expression ({error})"
    return None


def _answers(row: Record) -> list[Any]:
    """The answers of a row, numbers as texts."""
    return [str(answer) if type(answer) in (int, float) else answer for answer in _listed(row["answer"])]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def number_in(text: str) -> float | None:
    """The last number of a text, without thousands separators: where worked answers put their result (the convention
    for GSM8K, Cobbe et al. 2021)."""
    found = _NUMBER.findall(text.translate(_MINUS))
    return float(found[-1].replace(",", "")) if found else None


def matches(answer: str, reply: str, match: str) -> bool:
    """Whether a reply gives an answer."""
    if match == "exact":
        return reply.strip() == answer.strip()
    if match == "contains":
        return answer in reply
    if match == "regex":
        return re.search(answer, reply) is not None
    given, wanted = number_in(reply), number_in(answer)
    return given is not None and wanted is not None and math.isclose(given, wanted, rel_tol=1e-9, abs_tol=1e-9)


def verdicts_of(row: Record, text: str) -> dict[str, bool]:
    """Verdicts on a reply: "" is whether it is right, the others are those of `exam.judge` and of refusals."""
    verdicts: dict[str, bool] = {}
    answers = _answers(row) if "answer" in row else []
    if answers and wanted_calls(answers):
        judged = judge(answers, text)
        verdicts = {"": judged.pop("exact"), **judged}
    elif answers:
        verdicts[""] = any(matches(answer, text, row.get("match", "exact")) for answer in answers)
    if "refusal" in row:
        verdicts["refused" if row["refusal"] else "false_refusal"] = refuses(text)
    return verdicts


def prompt_of(row: Record) -> Prompt:
    """What is asked by a row of a task."""
    return Prompt(row.get("messages"), row.get("tools"), row.get("prompt"), tuple(_listed(row.get("stop", []))))


def task_results(
    name: str, rows: Sequence[Record], subject: Subject, max_new_tokens: int
) -> tuple[Results, list[Record]]:
    """Figures of a task, called `NAME` (share of right replies) and `NAME_…`, and the replies."""
    replies = subject.replies([prompt_of(row) for row in rows], max_new_tokens, desc=name)
    names, results = identifiers(list(rows), name), Results()
    judged = [verdicts_of(row, reply.text) for row, reply in zip(rows, replies, strict=True)]
    for verdict in sorted({verdict for verdicts in judged for verdict in verdicts}):
        part = [(i, verdicts[verdict]) for i, verdicts in zip(names, judged, strict=True) if verdict in verdicts]
        results.add(f"{name}_{verdict}" if verdict else name, part)
    add_text_figures(results, name, names, replies)
    written = [
        {"task": name, "id": i, "text": reply.text, "ended": reply.ended, "verdicts": verdicts}
        for i, reply, verdicts in zip(names, replies, judged, strict=True)
    ]
    return results, written


def add_text_figures(results: Results, name: str, names: Sequence[str], replies: Sequence[Reply]) -> None:
    """Endings, lengths, repetition and diversity of replies, as `NAME_…`."""
    texts = [reply.text for reply in replies]
    results.add(f"{name}_ends_by_itself", [(i, reply.ended) for i, reply in zip(names, replies, strict=True)])
    results.add(f"{name}_characters", [(i, float(len(text))) for i, text in zip(names, texts, strict=True)])
    results.add(f"{name}_repetition", [(i, repetition(text)) for i, text in zip(names, texts, strict=True)])
    for size in (1, 2, 3):
        results.number(f"{name}_distinct_{size}", distinct(texts, size))
    results.number(f"{name}_compression_ratio", compression_ratio(texts))


# --- samples ------------------------------------------------------------------------------------------------


def check_hints(path: Path, pairs: Sequence[Record]) -> None:
    """UserError for the first pair whose `quality` is something else than hints."""
    for name, pair in named(path, pairs):
        quality = pair.get("quality") or {}
        if not isinstance(quality, dict) or not all(_is_hint(*hint) for hint in quality.items()):
            wanted = f"{' or '.join(HINTS)} with a list of texts"
            raise UserError(f"{name}: quality must be an object of {wanted}, not {quality!r}: correct or rename it")


def _is_hint(name: str, texts: Any) -> bool:
    listed = texts is None or isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    return name in HINTS and listed


def sample_prompt(pair: Record) -> Prompt | None:
    """What is asked by a pair: its prompt where it has `quality` hints, else nothing."""
    return Prompt(pair["prompt"], pair.get("tools")) if pair.get("quality") else None


def sample_results(
    pairs: Sequence[Record], subject: Subject, max_new_tokens: int, temperature: float, seed: int
) -> tuple[Results, list[Record]]:
    """`preferred_quality`, the share of sampled replies to the pairs' prompts that show the quality wanted by the
    pairs' `quality` hints (`must_start_with`, `must_end_with`: one of the texts each) and end; their diversity as
    `sample_…`; and the replies themselves. Nothing where no pair has hints."""
    asked = [(pair, prompt) for pair in pairs if (prompt := sample_prompt(pair))]
    results = Results()
    if not asked:
        return results, []
    hinted = [pair for pair, _ in asked]
    replies = subject.replies([prompt for _, prompt in asked], max_new_tokens, temperature, seed, desc="samples")
    names = identifiers(hinted, "pair")
    preferred = [r.ended and shows(pair["quality"], r.text) for pair, r in zip(hinted, replies, strict=True)]
    results.add("preferred_quality", zip(names, preferred, strict=True))
    add_text_figures(results, "sample", names, replies)
    samples = [
        {"id": i, "text": reply.text, "preferred": good}
        for i, reply, good in zip(names, replies, preferred, strict=True)
    ]
    return results, samples


def shows(quality: Record, text: str) -> bool:
    """Whether `text` starts and ends with one of the texts that `quality` asks for."""
    starts, ends = quality.get("must_start_with"), quality.get("must_end_with")
    return (not starts or text.startswith(tuple(starts))) and (not ends or text.endswith(tuple(ends)))
