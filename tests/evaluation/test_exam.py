"""Exam verdicts and figures on hand-made replies."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from smolkit.doctor.checkup import Examiner, examine
from smolkit.errors import UserError
from smolkit.evaluation import exam
from smolkit.evaluation.results import write_rows
from smolkit.evaluation.subjects import LocalModel

TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather", "parameters": {"type": "object"}},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Lund", "days": 3}}\n</tool_call>'
WANTED = {"name": "get_weather", "arguments": {"days": 3, "city": "Lund"}}


class Scripted(LocalModel):
    """A model that generates what a function says."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, generate: Callable) -> None:
        super().__init__(model, tokenizer, batch_size=1)
        self.says = generate

    def generate(self, prompts: list[list[int]], *_: object) -> list[list[int]]:
        return self.says(prompts)


def item(number: int, kind: str, language: str, answer: object, **extra: object) -> dict:
    messages = [{"role": "user", "content": f"Question {number}?"}]
    identifier = f"{kind}-{language}-{number}"
    base = {"id": identifier, "kind": kind, "language": language, "messages": messages, "answer": answer}
    return {**base, **extra}


# --- verdicts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parses", "right_tool", "arguments_exact", "exact"),
    [
        (CALL, True, True, True, True),
        ("Let me look.\n" + CALL, True, True, True, True),
        (CALL.replace("Lund", "Lundd"), True, True, False, False),
        (CALL.replace("3", '"3"'), True, True, False, False),  # a string is not a number
        (CALL.replace("3", "3, 4"), False, False, False, False),
        (CALL.replace("get_weather", "get_time"), True, False, False, False),
        (CALL + "\n" + CALL, True, True, True, False),  # one call was wanted
        (CALL + "\n<tool_call>\n{broken\n</tool_call>", True, True, True, False),
        ('{"name": "get_weather", "arguments": {"city": "Lund", "days": 3}}', False, False, False, False),
        ("", False, False, False, False),
    ],
)
def test_tool_verdicts(text: str, parses: bool, right_tool: bool, arguments_exact: bool, exact: bool) -> None:
    expected = {
        "parses": parses,
        "right_tool": right_tool,
        "arguments_exact": arguments_exact,
        "exact": exact,
    }
    assert exam.judge(WANTED, text) == expected
    as_text = {**WANTED, "arguments": json.dumps(WANTED["arguments"])}
    assert exam.judge(as_text, text) == expected


TIME = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "parses", "right_tool", "arguments_exact", "exact"),
    [
        (f"{CALL}\n{TIME}", True, True, True, True),
        (f"{TIME}\n{CALL}", True, False, False, False),  # in the order that is asked for
        (f"{CALL.replace('Lund', 'Bern')}\n{TIME}", True, True, False, False),
        (f"{CALL}\n{TIME}\n{TIME}", True, True, True, False),
        (CALL, False, False, False, False),
        ("", False, False, False, False),
    ],
)
def test_all_calls_of_a_list_are_wanted(
    text: str, parses: bool, right_tool: bool, arguments_exact: bool, exact: bool
) -> None:
    verdicts = {"parses": parses, "right_tool": right_tool, "arguments_exact": arguments_exact, "exact": exact}
    assert exam.judge([WANTED, {"name": "get_time", "arguments": "{}"}], text) == verdicts


def test_a_list_of_one_call_is_that_call() -> None:
    for text in (CALL, CALL + CALL, "Lund"):
        assert exam.judge([WANTED], text) == exam.judge(WANTED, text)


def test_text_verdicts_are_exact_and_take_any_accepted_answer() -> None:
    assert exam.judge("Baker.", "Baker.") == {"exact": True}
    assert exam.judge("Baker.", "Baker") == {"exact": False}
    assert exam.judge("Baker.", "A Baker.") == {"exact": False}
    assert exam.judge(["Baker.", "Baker. Bye!"], "Baker. Bye!") == {"exact": True}


def test_exam_metrics_by_hand(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    items = [
        item(1, "qa", "en", "baker", chance=0.1),
        item(2, "qa", "en", "smith", chance=0.3),
        item(3, "qa", "zh", "世界", chance=0.2),
        item(4, "tool", "en", WANTED, tools=[TOOL]),
        item(5, "tool", "zh", WANTED, tools=[TOOL]),
        item(6, "skill", "en", "good"),
    ]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    replies = {1: "baker", 2: "baker", 3: "世界", 4: CALL, 5: CALL.replace("Lund", "Bern"), 6: "good"}

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        outputs = []
        for prompt in prompts:
            number = next(n for n in replies if f"Question {n}?" in tokenizer.decode(prompt))
            ids = tokenizer(replies[number], add_special_tokens=False)["input_ids"]
            outputs.append(ids if number == 6 else [*ids, end])  # item 6 runs into the length limit
        return outputs

    answers = exam.take_exam(items, Scripted(model, tokenizer, generate), max_new_tokens=9)
    assert [answer.id for answer in answers] == [i["id"] for i in items]  # the order of the exam, not of lengths
    metrics = exam.exam_results(items, answers).metrics()
    figures = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    verdicts = ("tool_parses", "tool_right_tool", "tool_arguments_exact")
    counts = {f"{v}{s}_n": n for v in verdicts for s, n in (("", 2), ("_en", 1), ("_zh", 1))}
    assert figures == pytest.approx(
        counts |
        {
            "qa": 2 / 3, "qa_n": 3, "qa_chance": 0.2,
            "qa_en": 0.5, "qa_en_n": 2, "qa_en_chance": 0.2,
            "qa_zh": 1.0, "qa_zh_n": 1, "qa_zh_chance": 0.2,
            "tool_parses": 1.0, "tool_right_tool": 1.0, "tool_arguments_exact": 0.5,
            "tool_exact": 0.5, "tool_exact_n": 2,
            "tool_parses_en": 1.0, "tool_right_tool_en": 1.0, "tool_arguments_exact_en": 1.0,
            "tool_exact_en": 1.0, "tool_exact_en_n": 1,
            "tool_parses_zh": 1.0, "tool_right_tool_zh": 1.0, "tool_arguments_exact_zh": 0.0,
            "tool_exact_zh": 0.0, "tool_exact_zh_n": 1,
            "skill": 1.0, "skill_n": 1, "skill_en": 1.0, "skill_en_n": 1,
            "ends_by_itself": 5 / 6, "ends_by_itself_n": 6,
        }
    )  # fmt: skip
    assert {"qa", "qa_chance"} <= set(metrics["shares"]) and "ends_by_itself_n" not in metrics["shares"]
    assert not answers[5].ended

    others = [(i, list(ids), text) for i, ids, text in exam.as_given(answers)]
    assert same(answers, others) == 1.0
    others[2][1][0] += 1
    assert same(answers, others) == pytest.approx(5 / 6)
    others[2] = (others[2][0], None, answers[2].text)  # a server's answer: only its text is known
    assert same(answers, others) == 1.0
    others[2] = (others[2][0], None, "else")
    assert same(answers, others) == pytest.approx(5 / 6)
    with pytest.raises(UserError, match="other items"):
        exam.same_answers(answers, others[:-1])


def same(answers: list[exam.Answer], others: list) -> float:
    return exam.same_answers(answers, others).figures["same_greedy_answers"].value


@pytest.mark.parametrize(("last", "ended"), [("<|im_end|>", True), ("<|endoftext|>", True), ("a", False)])
def test_a_reply_ends_where_a_server_says_so(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, last: str, ended: bool
) -> None:
    subject = Scripted(model, tokenizer, lambda prompts: [[65, tokenizer.convert_tokens_to_ids(last)]])
    answers = exam.take_exam([item(1, "qa", "en", "x")], subject, max_new_tokens=9)
    assert answers[0].ended is ended


def test_refusals_count_where_they_are_due_and_where_not(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    replies = iter(["I do not know anyone called Zork.", "The job of Zork is baker.", "我不认识叫周梅的人。", "Baker."])
    subject = Scripted(model, tokenizer, lambda prompts: [tokenizer(next(replies)).input_ids for _ in prompts])
    items = [item(i, "refusal", "en", "x") for i in (1, 2)] + [item(i, "qa", "zh", "x") for i in (3, 4)]
    figures = exam.exam_results(items, exam.take_exam(items, subject, 9)).figures
    assert figures["refused"].value == 0.5 and figures["false_refusal"].value == 0.5
    assert set(figures["false_refusal"].items) == {"qa-zh-3", "qa-zh-4"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"exam.jsonl:2: not valid JSON"),
        ('{"id": "a", "kind": "qa", "language": "en", "answer": "x"}', r"exam.jsonl:2: .*no messages"),
        (json.dumps(item(1, "qa", "en", 7)), r"exam.jsonl:2: .*answer must be"),
        (json.dumps(item(1, "shares", "en", "x")), r"exam.jsonl:2: .*kind 'shares' is a key of metrics.json"),
        (json.dumps(item(1, ["qa"], "en", "x")), r"exam.jsonl:2: .*kind must be a text, not \['qa'\]"),
        (json.dumps(item(1, "qa", None, "x")), r"exam.jsonl:2: .*language must be a text, not None"),
        (json.dumps(item(1, "qa", "en", "x", id={})), r"exam.jsonl:2: .*id must be a text or a number, not {}"),
        (json.dumps(item(1, "qa", "en", "x", chance="10 %")), r"exam.jsonl:2: .*chance must be a number from 0 to 1"),
        (json.dumps(item(1, "qa", "en", "x", id="\ud800")), r"exam.jsonl:2: an unpaired surrogate, '.ud800'"),
        ("[" * 9999, r"exam.jsonl:2: not valid JSON"),
    ],
)
def test_a_bad_exam_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "exam.jsonl"
    path.write_text(json.dumps(item(1, "qa", "en", "x")) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        exam.read_exam(path)


ASKED = [{"role": "user", "content": "Hi?"}]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"answer": "x"}, None),
        ({"answer": ["x", "y"]}, None),
        ({"answer": WANTED}, None),
        ({"answer": [WANTED, {"name": "f", "arguments": "{}"}], "tools": [TOOL]}, None),
        ({"answer": ""}, "answer must be a text, a call"),
        ({"answer": []}, "answer must be a text, a call"),
        ({"answer": ["x", " "]}, "answer must be a text, a call"),
        ({"answer": [1, 2]}, r"answer must be a text, a call .*, got \[1, 2\] — correct it"),
        ({"answer": ["x", WANTED]}, "a list of accepted texts or a list of wanted calls"),
        ({"answer": "\ud800"}, "unpaired surrogate"),
        ({"answer": {"name": "f", "arguments": {"a": "\ud800"}}}, "unpaired surrogate"),
        ({"answer": {"name": "f"}}, r"tool call without name or arguments: {'name': 'f'} — write"),
        ({"answer": {"arguments": {}}}, "tool call without name or arguments"),
        ({"answer": [WANTED, {"name": 3, "arguments": {}}]}, "tool call without name or arguments"),
        ({"answer": {"function": WANTED}}, "tool call without name or arguments"),
        ({"answer": {"name": "f", "arguments": "{bad"}}, "must be a JSON object or its text, got '{bad' — write one"),
        ({"answer": {"name": "f", "arguments": "[1]"}}, r"must be a JSON object or its text, got '\[1\]'"),
        ({"answer": {"name": "f", "arguments": [1]}}, r"must be a JSON object or its text, got \[1\]"),
        ({"answer": "x", "messages": [{"role": "bot", "content": "x"}]}, "message 0: role must be one of"),
        ({"answer": "x", "messages": [*ASKED, {"role": "assistant", "content": "x"}]}, "must end with the question"),
        ({"answer": "x", "messages": []}, "messages must be a non-empty list"),
        ({"answer": "x", "tools": [{"type": "function"}]}, "tool 0: needs a function with a name"),
        ({"answer": "x", "tools": {}}, "tools must be a list"),
    ],
)
def test_the_doctor_and_the_exam_agree_about_what_is_valid(tmp_path: Path, row: dict, problem: str | None) -> None:
    path = tmp_path / "exam.jsonl"
    whole = item(2, "qa", "en", "") | row
    path.write_text(json.dumps(item(1, "qa", "en", "x")) + "\n" + json.dumps(whole) + "\n")
    found = examine(path, Examiner()).problems
    if problem is None:
        assert not found and len(exam.read_exam(path)) == 2
        return
    (finding,) = found
    assert re.search(f"exam.jsonl:2: .*{problem}", str(finding))
    with pytest.raises(UserError, match=f"exam.jsonl:2: .*{problem}"):
        exam.read_exam(path)


def test_a_byte_order_mark_is_no_part_of_an_exam(tmp_path: Path) -> None:
    path = tmp_path / "exam.jsonl"
    path.write_text(json.dumps(item(1, "qa", "en", "x")) + "\n", encoding="utf-8-sig")
    assert len(exam.read_exam(path)) == 1
    path.write_bytes(path.read_bytes() + b'{"id": "\xff"}\n')
    with pytest.raises(UserError, match=r"exam.jsonl:2: byte 8 is not UTF-8"):
        exam.read_exam(path)


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    """Texts with U+2028 and the like are written as they are; str.splitlines would cut their rows."""
    text = "one\u2028two\u2029three\x85four"
    exam_file, answers = tmp_path / "exam.jsonl", tmp_path / "answers.jsonl"
    exam_file.write_text(json.dumps(item(1, "qa", "en", text), ensure_ascii=False) + "\r\n\n", encoding="utf-8")
    (read,) = exam.read_exam(exam_file)
    assert read["answer"] == text
    write_rows(answers, [{"id": "a", "output_ids": [1], "text": text}])
    assert exam.read_answers(answers) == [("a", [1], text)]


def test_exam_kinds_and_limit(tmp_path: Path) -> None:
    path = tmp_path / "exam.jsonl"
    path.write_text("".join(json.dumps(item(i, k, "en", "x")) + "\n" for i, k in enumerate(["qa", "skill"] * 3)))
    assert len(exam.read_exam(path, ["skill"], limit=2)) == 2
    with pytest.raises(UserError, match="no exam item of kind"):
        exam.read_exam(path, ["tool"])
    with pytest.raises(UserError, match="missing.jsonl"):
        exam.read_exam(tmp_path / "missing.jsonl")
