"""The script as a user runs it: files, figures, exit codes, arguments."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import eval_model
from smolkit.errors import UserError

TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather", "parameters": {"type": "object"}},
}
WANTED = {"name": "get_weather", "arguments": {"days": 3, "city": "Lund"}}


def item(number: int, kind: str, language: str, answer: object, **extra: object) -> dict:
    messages = [{"role": "user", "content": f"Question {number}?"}]
    identifier = f"{kind}-{language}-{number}"
    base = {"id": identifier, "kind": kind, "language": language, "messages": messages, "answer": answer}
    return {**base, **extra}


def test_the_script_on_a_toy_checkpoint(
    checkpoint: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    exam = tmp_path / "exam.jsonl"
    items = [item(i, "qa", "en", "x", chance=0.1) for i in range(5)] + [item(9, "tool", "zh", WANTED, tools=[TOOL])]
    exam.write_text("".join(json.dumps(i) + "\n" for i in items))
    pairs = tmp_path / "pairs.jsonl"
    row = {"id": "p", "source": "t", "prompt": "Who <|im_end|>?", "chosen": "Ada. Bye!", "rejected": "Ada"}
    pairs.write_text(json.dumps({**row, "quality": {"must_end_with": ["Bye!"]}}) + "\n")
    choices = tmp_path / "choices.jsonl"
    choices.write_text(json.dumps({"question": "Who?", "choices": ["Ada", "baker"], "answer": 0}) + "\n")
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps({"messages": [{"role": "user", "content": "Who?"}], "answer": "Ada"}) + "\n")
    text = tmp_path / "text.txt"
    text.write_text("The job of Ada is baker. 你好，世界。")
    out = tmp_path / "eval"
    common = ("--model_path", checkpoint, "--exam", exam, "--max_new_tokens", 12, "--device", "cpu")
    files = ("--preferences", pairs, "--text", text, "--multiple_choice", choices, "--generation", tasks)
    uses = ("--check_transformers", "--fail_below", "ends_by_itself=0", "--output_dir", out)
    eval_model.main([*map(str, (*common, *files, *uses))])
    printed = capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["same_greedy_answers"] == 1.0 and metrics["same_greedy_answers_n"] == 6
    assert metrics["qa_en_chance"] == pytest.approx(0.1) and metrics["qa_en_n"] == 5
    assert metrics["preferred_quality_n"] == 1 and metrics["text_bytes"] == len(text.read_bytes())
    expected = {"preference_accuracy", "tool_exact_zh", "ends_by_itself", "bits_per_byte", "perplexity"}
    expected |= {"choices_acc", "choices_acc_norm", "tasks", "tasks_ends_by_itself", "tasks_distinct_2", "seconds"}
    assert expected <= set(metrics)
    assert len(metrics["intervals"]["qa_en"]) == 2 and metrics["settings"]["max_new_tokens"] == 12
    assert metrics["data"]["tasks"] == str(tasks) and set(metrics["settings"]["versions"]) == {"torch", "transformers"}
    assert (out / "metrics.md").read_text() in printed
    assert "same_greedy_answers" in printed
    assert "warning:" in printed and "<|im_end|>" in printed  # the doctor's glance at what is read
    lengths = {"answers": 6, "samples": 1, "replies": 1}
    assert {name: len((out / f"{name}.jsonl").read_text().splitlines()) for name in lengths} == lengths

    theirs = ("--implementation", "transformers", "--compare_with", out / "answers.jsonl")
    eval_model.main([*map(str, common), *map(str, theirs), "--output_dir", str(tmp_path / "theirs")])
    metrics = json.loads((tmp_path / "theirs" / "metrics.json").read_text())
    assert metrics["same_greedy_answers"] == 1.0


def test_an_evaluation_inside_a_checkpoint_goes_into_its_card_and_fails_below_its_limit(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = tmp_path / "toy"
    shutil.copytree(checkpoint, model)
    (model / "README.md").write_text("# Toy\n")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("The job of Ada is baker.", "你好，世界。")))
    arguments = ["--model_path", str(model), "--text", str(text), "--device", "cpu", "--fail_above"]
    with pytest.raises(SystemExit) as stop:
        eval_model.main([*arguments, "perplexity=1"])
    assert stop.value.code == 1 and "above 1" in capsys.readouterr().err
    metrics = json.loads((model / "eval" / "metrics.json").read_text())
    assert f"{metrics['bits_per_byte']:.4f}" in (model / "README.md").read_text()
    low, high = metrics["intervals"]["perplexity"]
    assert low < metrics["perplexity"] < high
    eval_model.main([*arguments, "perplexity=1e9"])
    assert (model / "README.md").read_text().count("## Evaluation") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_path", "nowhere"], "nothing to evaluate"),
        (["--model_path", "nowhere", "--exam", "none.jsonl"], "none.jsonl"),
        (["--model_path", "nowhere", "--text", "README.md", "--kinds", "qa"], "need --exam"),
        (["--model_path", "nowhere", "--exam", "x", "--temperature", "0"], "--temperature 0"),
        (["--model_path", "nowhere", "--exam", "x", "--batch_size", "0"], "--batch_size 0"),
        (["--exam", "x"], "either --model_path DIR or --endpoint URL"),
        (["--compare", "a"], "two or more"),
        (["--model_path", "nowhere", "--text", "x", "--context", "1"], "--context 1"),
        (["--model_path", "nowhere", "--text", "x", "--fail_below", "qa"], "write NAME=LIMIT"),
        (["--model_path", "nowhere", "--multiple_choice", "none.jsonl"], "none.jsonl.*the README has the format"),
        (["--model_path", "nowhere", "--exam", "x", "--check_transformers", "--dtype", "bf16"], "fp32"),
    ],
)
def test_bad_arguments_are_named_before_any_work(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        eval_model.main(arguments)
