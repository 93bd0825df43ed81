"""An evaluation has the same figures whoever answers: both servers, our model, transformers."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from smolkit.evaluation import exam, generation, likelihoods
from smolkit.evaluation.endpoint import ServedModel
from smolkit.evaluation.results import Results
from smolkit.evaluation.subjects import LocalModel, Subject, load_model

QUESTIONS = ["What is the weather?", "Who are you?", "你好吗？", "Count to 3."]
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
ITEMS = [
    {
        "id": f"{kind}-{number}",
        "kind": kind,
        "language": "en",
        "messages": [{"role": "user", "content": question}],
        "answer": {"name": "get_weather", "arguments": {}} if kind == "tool" else question,
        **({"tools": [TOOL]} if kind == "tool" else {}),
    }
    for kind in ("qa", "tool", "refusal")
    for number, question in enumerate(QUESTIONS)
]
TASKS = [{"prompt": f"{question} I", "stop": [" ", "\n"], "answer": "a", "match": "contains"} for question in QUESTIONS]
CHOICES = [{"question": q, "choices": ["Yes", "It is warm.", "没有"], "answer": i % 3} for i, q in enumerate(QUESTIONS)]
PAIRS = [
    {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": "It is warm."}],
        "rejected": [{"role": "assistant", "content": other}],
    }
    for question in QUESTIONS
    for other in ("Yes", "It is cold today.")
]


def agree(server: ServedModel, local: Sequence[LocalModel], measured: Callable[[Subject], Results]) -> Results:
    """Every figure of the server, and of every yes-or-no item, is that of the checkpoint; the server's figures."""
    found = measured(server)
    for subject in local:
        expected = measured(subject)
        assert list(found.figures) == list(expected.figures)
        for name, figure in found.figures.items():
            assert figure.value == pytest.approx(expected.figures[name].value, rel=1e-3), name
            if figure.is_share:
                assert figure.items == expected.figures[name].items, name
    return found


def both(checkpoint: Path, tokenizer: PreTrainedTokenizerFast) -> list[LocalModel]:
    """A checkpoint in our implementation and in transformers'."""
    tokenizer.name_or_path = str(checkpoint)
    return [LocalModel(load_model(checkpoint, tokenizer, name), tokenizer) for name in ("smol", "transformers")]


def test_replies_are_judged_alike(url: str, checkpoint: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    server, local = ServedModel(url, tokenizer=tokenizer), both(checkpoint, tokenizer)
    answers = exam.take_exam(ITEMS, server, 20)
    assert len({answer.text for answer in answers}) > 6, "a random model should not say the same everywhere"
    for subject in local:
        others = exam.as_given(exam.take_exam(ITEMS, subject, 20))
        assert exam.same_answers(answers, others).figures["same_greedy_answers"].value == 1.0
    found = agree(server, local, lambda subject: exam.exam_results(ITEMS, exam.take_exam(ITEMS, subject, 20)))
    assert {"qa", "tool_exact", "refusal", "ends_by_itself", "refused", "false_refusal"} <= set(found.figures)
    agree(server, local, lambda subject: generation.task_results("tasks", TASKS, subject, 12)[0])


def test_prompts_are_scored_alike(url: str, checkpoint: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Log-probabilities are over all rows of the vocabulary, on both sides."""
    server, local = ServedModel(url, tokenizer=tokenizer), both(checkpoint, tokenizer)
    agree(server, local, lambda subject: likelihoods.choice_results("choices", CHOICES, subject))
    agree(server, local, lambda subject: likelihoods.choice_results("choices", CHOICES, subject, chat=True))
    agree(server, local, lambda subject: likelihoods.preference_results(subject, PAIRS))
    texts = ["The weather is warm today. " * 20, "你好，世界。"]
    found = agree(server, local, lambda subject: likelihoods.text_results(subject, texts, context=64))
    assert found.figures["perplexity"].value > 1
