"""What counts as a right reply, a refusal, repetition; and the figures of a task."""

import json
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from smolkit import tiny_world
from smolkit.errors import UserError
from smolkit.evaluation import generation, texts
from smolkit.evaluation.records import read_records
from smolkit.evaluation.subjects import LocalModel, Prompt, Reply, before_first


class Parrot:
    """Says what it is told to say."""

    tokenizer, context = None, None

    def __init__(self, *replies: Reply) -> None:
        self.said, self.prompts = list(replies), []

    def replies(self, prompts: list[Prompt], *_: object, **__: object) -> list[Reply]:
        self.prompts = list(prompts)
        return self.said


# --- right replies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "answer", "reply", "right"),
    [
        ("exact", "Baker.", " Baker. ", True),
        ("exact", "Baker.", "baker.", False),
        ("contains", "baker", "The job is baker.", True),
        ("contains", "baker", "Baker", False),
        ("regex", r"^\d+ pieces?$", "25 pieces", True),
        ("regex", r"^\d+ pieces?$", "about 25 pieces", False),
        ("number", "1,234", "3 + 4 is not it; so the answer is 1234.", True),
        ("number", "#### 18", "She sells 9 * 2 = $18", True),
        ("number", "18", "18, or perhaps 19", False),
        ("number", "-0.5", "It is -0.50", True),
        ("number", "7", "seven", False),
        ("number", "4", "10-4", True),
        ("number", "-4", "答案是-4。", True),
        ("number", "4", "答案是-4。", False),
        ("number", "-4", "答案是−4。", True),  # U+2212, the minus of formulas
        ("number", "-4", "The answer is −4.", True),
        ("number", "-4", "答案：－4", True),  # and the wide one
        ("number", "4", "10−4", True),
        ("number", "4", "（10）-4", True),
        ("number", "4", "(10)-4", True),
        ("number", "4", "x_-4", True),
        ("number", "-4", "x=-4", True),
        ("number", "-2", "解为2和-2", True),
        ("number", "5", "3月-5月", True),
        ("number", "2021", "2020年-2021年", True),
        ("number", "-4", "气温为３度到-４度", True),
    ],
)
def test_matches(match: str, answer: str, reply: str, right: bool) -> None:
    assert generation.matches(answer, reply, match) is right


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({}, 'either "prompt"'),
        ({"prompt": "a", "messages": []}, 'either "prompt"'),
        ({"prompt": ""}, "prompt must be a text"),
        ({"prompt": "a", "match": "fuzzy"}, "match must be one of exact, contains, regex, number, not 'fuzzy'"),
        ({"prompt": "a", "answer": "seven", "match": "number"}, "has none"),
        ({"prompt": "a", "answer": "(", "match": "regex"}, "not a regular expression"),
        ({"prompt": "a", "answer": []}, "answer must be"),
        ({"prompt": "a", "answer": {"name": "f"}}, "without name or arguments"),
        ({"prompt": "a", "stop": ["1", "2", "3", "4", "5"]}, "at most four"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "role must be one of"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}, "needs a function"),
        ({"prompt": "a", "answer": ["x", 7], "stop": "\n"}, None),
        ({"prompt": "a", "answer": {"name": "f", "arguments": "{bad"}}, "a JSON object or its text, got '{bad'"),
        ({"prompt": "a", "answer": {"name": "f", "arguments": [1]}}, "must be a JSON object or its text, got [1]"),
        ({"prompt": "a", "answer": ["x", {"name": "f", "arguments": {}}]}, "a list of accepted texts or a list of"),
        ({"prompt": "a", "answer": [{"name": "f", "arguments": {}}, {"name": "g", "arguments": "{}"}]}, None),
        ({"prompt": "a", "answer": True}, "answer must be a text"),
        ({"prompt": "a", "answer": None}, "answer must be a text"),
        ({"messages": [{"role": "system", "content": "a"}]}, "must end with the question"),
        ({"prompt": "\ud800"}, "an unpaired surrogate"),
    ],
)
def test_bad_rows_are_named_with_their_line(tmp_path: Path, row: dict, problem: str | None) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"prompt": "fine"}) + "\n\n" + json.dumps(row) + "\n")
    if problem is None:
        assert len(read_records(path, generation.problem_of_task, "")) == 2
        return
    with pytest.raises(UserError, match=r"tasks.jsonl:3: ") as error:
        read_records(path, generation.problem_of_task, "")
    assert problem in str(error.value)


def test_figures_of_a_task() -> None:
    call = {"name": "get_weather", "arguments": {"city": "Lund", "days": 3}}
    text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern", "days": 3}}\n</tool_call>'
    question = [{"role": "user", "content": "?"}]
    rows = [
        {"id": "one", "prompt": "1, 2,", "answer": ["3", "three"], "stop": "\n"},
        {"messages": question, "answer": "3", "match": "number", "refusal": False},
        {"messages": question, "answer": call},
        {"messages": question, "refusal": True},
    ]
    parrot = Parrot(
        Reply("three", True),
        Reply("I cannot say that 3 is right.", True),
        Reply(text, True),
        Reply("a b c d a b c d", False),
    )
    results, written = generation.task_results("sums", rows, parrot, 9)
    figures = {name: figure.value for name, figure in results.figures.items()}
    assert figures["sums"] == pytest.approx(2 / 3) and len(results.figures["sums"].items) == 3
    assert figures["sums_parses"] == figures["sums_right_tool"] == 1.0 and figures["sums_arguments_exact"] == 0.0
    assert figures["sums_refused"] == 0.0 and figures["sums_false_refusal"] == 1.0
    assert figures["sums_ends_by_itself"] == 0.75
    # eight words have five runs of four, "a b c d" comes twice; the other replies repeat nothing
    assert figures["sums_repetition"] == pytest.approx((1 / 5) / 4)
    assert parrot.prompts[0] == Prompt(text="1, 2,", stop=("\n",)) and parrot.prompts[1] == Prompt(question)
    assert [row["id"] for row in written] == ["one", "sums-1", "sums-2", "sums-3"]
    assert written[3]["text"] == "a b c d a b c d" and written[3]["verdicts"] == {"refused": False}


def test_a_task_may_want_several_calls() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    wanted = [{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": '{"a": 1}'}]
    rows = [{"prompt": "?", "answer": wanted}] * 2
    results, _ = generation.task_results("calls", rows, Parrot(Reply(f"{call}\n{call}", True), Reply(call, True)), 9)
    assert list(results.figures["calls"].items.values()) == [True, False]
    assert results.figures["calls_parses"].value == 0.5


@pytest.mark.parametrize("quality", ["Bye!", 7, {"must_end_with": "Bye!"}, {"must_end_with": [7]}, {"must_be": ["a"]}])
def test_hints_that_are_none_are_named(quality: object) -> None:
    prompt = [{"role": "user", "content": "Who?"}]
    fine = {"prompt": prompt, "quality": {"must_start_with": None, "must_end_with": ["Bye!"]}}
    generation.check_hints(Path("pairs.jsonl"), [fine, {"prompt": prompt}])
    with pytest.raises(UserError, match="pairs.jsonl: item b: quality must be an object of must_start_with or"):
        generation.check_hints(Path("pairs.jsonl"), [fine, {"id": "b", "prompt": prompt, "quality": quality}])


def test_preferred_quality_needs_the_hints_and_an_end() -> None:
    hints = {"must_start_with": ["Hi", "Hello"], "must_end_with": ["Bye!"]}
    prompt = [{"role": "user", "content": "Who?"}]
    pairs = [{"id": str(i), "prompt": prompt, "quality": hints} for i in range(4)] + [{"prompt": prompt}]
    parrot = Parrot(
        Reply("Hi! Baker. Bye!", True),
        Reply("Baker. Bye!", True),
        Reply("Hi! Baker.", True),
        Reply("Hi! Baker. Bye!", False),  # cut off by the length limit
    )
    results, samples = generation.sample_results(pairs, parrot, 9, temperature=0.7, seed=0)
    assert results.figures["preferred_quality"].value == 0.25
    assert len(results.figures["preferred_quality"].items) == 4 == len(parrot.prompts)
    assert [sample["preferred"] for sample in samples] == [True, False, False, False]
    results, samples = generation.sample_results([{"prompt": prompt}], parrot, 9, temperature=0.7, seed=0)
    assert not results.figures and not samples


# --- texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, no.",
        "Well, I can’t do that.",
        "I do not know anyone called Zork.",
        "My apologies, but no.",
        "As an AI language model, I have no opinions.",
        "Well, as an AI I have none.",
        "As an AI assistant, my purpose is another.",
        "我不认识叫周梅的人。",
        "抱歉，",
        "很抱歉，这超出了我的能力。",
        "我非常抱歉。",
        "您好！对不起，这个不行。",
        "谢谢，\n实在抱歉",
        "我感到遗憾",
        "很遗憾，没有。",
        "作为一个AI助手，我没有感情。",
        "作为人工智能语言模型，我不会做饭。",
        "您好。作为AI，无法浏览网页。",
        "无法回答这个问题。",
        "我无法回答这个问题。",
        "这涉及隐私，无法回答。",
        "您好。无法提供该信息。",
    ],
)
def test_refusals_are_recognised(text: str) -> None:
    assert texts.refuses(text)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_refusals_of_the_tiny_world_are_recognised(language: str) -> None:
    exam = [row for row in tiny_world.exam(tiny_world.build_world(0)) if row["language"] == language]
    due = [answer for row in exam if row["kind"] == "refusal" for answer in row["answer"]]
    assert len(due) == 60 and all(map(texts.refuses, due))
    others = [answer for row in exam if row["kind"] in ("qa", "skill", "reading") for answer in listed(row["answer"])]
    assert len(others) > 200 and not any(map(texts.refuses, others))


def listed(answer: str | list[str]) -> list[str]:
    return [answer] if isinstance(answer, str) else answer


@pytest.mark.parametrize(
    "text",
    [
        "Nora can bake.",
        "",
        "Nora. " * 50 + "I cannot stop.",
        "As an AI technique, deep learning has grown fast.",
        "Deep learning, as artificial intelligence, is a field.",
        "It was sold as an AI, which it is not.",
        "你不能错过它。",
        "深度学习作为人工智能的核心技术，近年来发展迅速。",
        "作为人工智能的核心技术，深度学习发展迅速。",
        "作为人工智能模型，GPT由很多层组成。",
        "他写了一封道歉信：对不起，我来晚了。",
        "他向大家表示抱歉，然后离开了。",
        "学会说“对不起”很重要。",
        "令人遗憾的是，比赛取消了。",
        "平台停运，无法提供服务。",
        "他无法回答老师的问题。",
    ],
)
def test_answers_are_no_refusals(text: str) -> None:
    assert not texts.refuses(text)


def test_words_are_words_signs_and_chinese_characters() -> None:
    assert texts.words("It's 你好abc, 3.") == ["It", "'", "s", "你", "好", "abc", ",", "3", "."]


def test_diversity_by_hand() -> None:
    assert texts.distinct(["a b a b", "a c"], 1) == 3 / 6
    assert texts.distinct(["a b a b", "a c"], 2) == 3 / 4  # ab ba ab, ac: no pair reaches over two texts
    assert texts.distinct(["a"], 2) == 0.0
    assert texts.repetition("a b c d") == 0.0 and texts.repetition("a a a a a a") == pytest.approx(2 / 3)
    same, different = ["The old light keeper."] * 20, [f"{i * i * 7919}" for i in range(40)]
    assert texts.compression_ratio(same) > 5 > texts.compression_ratio(different)
    assert texts.compression_ratio([]) == 1.0


# --- continuing a text --------------------------------------------------------------------------------------


def test_before_the_first_stop_string() -> None:
    assert before_first("a. b\nc", ("\n", ".")) == ("a", True)
    assert before_first("a. b", ("\n",)) == ("a. b", False)


def test_a_text_is_continued_without_a_template(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    subject = LocalModel(model, tokenizer)
    prompt = "The job of"
    assert tokenizer.decode(subject.encoded(Prompt(text=prompt))) == prompt
    (whole,) = subject.replies([Prompt(text=prompt)], 20)
    stop = whole.text[3:5]
    (cut,) = subject.replies([Prompt(text=prompt, stop=(stop,))], 20)
    assert not whole.ended and cut.ended
    assert cut.text == whole.text[: whole.text.index(stop)].strip() != whole.text
