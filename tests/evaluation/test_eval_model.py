"""The script as a user runs it: files, figures, exit codes, arguments."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

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
    assert metrics["data"]["tasks"] == tasks.name and set(metrics["settings"]["versions"]) == {"torch", "transformers"}
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


def rows_file(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_nothing_of_this_machine_is_written_down(checkpoint: Path, tmp_path: Path) -> None:
    """metrics.json and the card go to the hub."""
    shutil.copytree(checkpoint, tmp_path / "toy")
    (tmp_path / "toy" / "README.md").write_text("# Toy\n")
    tasks = rows_file(tmp_path / "tasks.jsonl", {"prompt": "The job of", "answer": "x"})
    exam = rows_file(tmp_path / "exam.jsonl", item(1, "qa", "en", "x"))
    command = ["--model_path", tmp_path / "toy", "--exam", exam, "--generation", tasks, "--max_new_tokens", 4]
    eval_model.main([*map(str, command), "--device", "cpu"])
    metrics, card = (tmp_path / "toy" / name for name in ("eval/metrics.json", "README.md"))
    settings = json.loads(metrics.read_text())["settings"]
    assert (settings["model_path"], settings["exam"], settings["generation"]) == ("toy", "exam.jsonl", ["tasks.jsonl"])
    assert str(tmp_path) not in metrics.read_text() + card.read_text() and "exam.jsonl" in card.read_text()


def test_the_figures_of_an_adapter_stay_with_the_adapter(checkpoint: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text("# Toy\n")
    shutil.copytree(checkpoint, tmp_path / "base", dirs_exist_ok=True)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(checkpoint), lora)
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("# Toy\n")  # in the place of PEFT's
    exam = rows_file(tmp_path / "exam.jsonl", item(1, "qa", "en", "x"))
    command = ["--model_path", tmp_path / "base", "--adapter", tmp_path / "adapter", "--exam", exam]
    eval_model.main([*map(str, command), "--max_new_tokens", "4", "--device", "cpu"])
    assert (tmp_path / "adapter" / "eval" / "metrics.json").is_file() and not (tmp_path / "base" / "eval").exists()
    assert (tmp_path / "base" / "README.md").read_text() == "# Toy\n"
    assert "## Evaluation" in (tmp_path / "adapter" / "README.md").read_text()


LONG = "word " * 400


@pytest.mark.parametrize(
    ("flag", "row", "message"),
    [
        ("--exam", item(7, "qa", "en", "x", tools=[TOOL | {"function": {"name": LONG}}]), "item qa-en-7: a prompt"),
        ("--generation", {"prompt": LONG}, "row 2: a prompt of"),
        ("--preferences", {"prompt": "Who?", "chosen": LONG, "rejected": "a"}, "row 2: .* than the context of 256"),
        ("--multiple_choice", {"question": "Who?", "choices": ["a", LONG], "answer": 0}, "row 2: .* than the context"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_asked(
    checkpoint: Path, tmp_path: Path, flag: str, row: dict, message: str
) -> None:
    short = {
        "--exam": item(1, "qa", "en", "x"),
        "--generation": {"prompt": "The job"},
        "--preferences": {"prompt": "Who?", "chosen": "b", "rejected": "a"},
        "--multiple_choice": {"question": "Who?", "choices": ["a", "b"], "answer": 0},
    }
    files = {name: rows_file(tmp_path / f"{name[2:]}.jsonl", good) for name, good in short.items()}
    rows_file(files[flag], short[flag], row)
    command = [str(word) for pair in files.items() for word in pair]
    with pytest.raises(UserError, match=f"{flag[2:]}.jsonl: {message}"):
        eval_model.main([*command, "--model_path", str(checkpoint), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_window_beyond_the_context_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The job of Ada is baker.")
    command = ["--model_path", checkpoint, "--text", tmp_path / "text.txt", "--context", 512, "--output_dir", tmp_path]
    with pytest.raises(UserError, match="--context 512: more than the 256 tokens"):
        eval_model.main([*map(str, command)])


def test_figures_that_are_no_numbers_fail_every_limit(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(checkpoint, tmp_path / "toy")
    broken = LlamaForCausalLM.from_pretrained(checkpoint)
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    broken.save_pretrained(tmp_path / "toy")
    texts = rows_file(tmp_path / "text.jsonl", *({"text": f"The job of Ada is baker {i}."} for i in range(3)))
    choices = rows_file(tmp_path / "mc.jsonl", {"question": "Who?", "choices": ["a", "b"], "answer": 0})
    command = ["--model_path", tmp_path / "toy", "--text", texts, "--multiple_choice", choices, "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        eval_model.main([*map(str, command), "--fail_above", "perplexity=20", "--fail_below", "bits_per_byte=0"])
    assert stop.value.code == 1
    assert capsys.readouterr().err.count("not finite, which no limit allows") == 2

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    metrics = json.loads((tmp_path / "toy" / "eval" / "metrics.json").read_text(), parse_constant=refuse)
    assert metrics["perplexity"] is None and metrics["mc_acc"] == 0.0, "no choice is the best of what is no number"
    lines = (tmp_path / "toy" / "eval" / "items.jsonl").read_text().splitlines()
    assert all("bits_per_byte" not in json.loads(line, parse_constant=refuse)["values"] for line in lines)
    assert "not finite" in (tmp_path / "toy" / "eval" / "metrics.md").read_text()


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
        (["--compare", "a", "b", "--fail_below", "qa=90"], "nothing else, not --fail_below"),
        (["--compare", "a", "b", "--exam", "x"], "nothing else, not --exam"),
        (["--model_path", "nowhere", "--generation", "data.jsonl"], "called 'data', but metrics.json has that name"),
        (["--model_path", "nowhere", "--generation", "a/x.jsonl", "b/x.jsonl"], "'x', but another file has that name"),
        (["--model_path", "nowhere", "--text", "x", "--context", "1"], "--context 1"),
        (["--model_path", "nowhere", "--text", "x", "--fail_below", "qa"], "write NAME=LIMIT"),
        (["--model_path", "nowhere", "--multiple_choice", "none.jsonl"], "none.jsonl.*the README has the format"),
        (["--model_path", "nowhere", "--exam", "x", "--check_transformers", "--dtype", "bf16"], "fp32"),
        (["--model_path", "nowhere", "--exam", "x", "--output_dir", "README.md"], "README.md is a file"),
        (["--model_path", "nowhere", "--exam", "x", "--output_dir", "README.md/out"], "README.md is a file: name"),
        (["--model_path", "nowhere", "--exam", "x", "--num_fewshot", "5"], "--num_fewshot is for --lm_eval, .* leave"),
        (["--model_path", "nowhere", "--exam", "x", "--num_fewshot", "0"], "--num_fewshot is for --lm_eval, .* leave"),
        (["--model_path", "nowhere", "--exam", "x", "--lm_eval_include_path", "d"], "--lm_eval_include_path is for"),
        (["--model_path", "nowhere", "--exam", "x", "--context", "7"], "--context is for --text, which is not given"),
        (["--model_path", "nowhere", "--exam", "x", "--chat"], "--chat is for --multiple_choice or --lm_eval, which"),
        (["--model_path", "nowhere", "--exam", "x", "--model", "m"], "--model is for --endpoint, .* leave --model out"),
        (["--model_path", "nowhere", "--exam", "x", "--concurrency", "2"], "--concurrency is for --endpoint"),
        (["--model_path", "nowhere", "--exam", "x", "--api_key", "k"], "--api_key is for --endpoint"),
        (["--model_path", "nowhere", "--exam", "x", "--temperature", "1"], "--temperature is for --preferences"),
        (["--model_path", "nowhere", "--text", "x", "--max_new_tokens", "9"], "--max_new_tokens is for --exam or"),
    ],
)
def test_bad_arguments_are_named_before_any_work(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        eval_model.main(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--text", "none.txt", "--context", "7"],
        ["--multiple_choice", "none.txt", "--chat"],
        ["--preferences", "none.txt", "--temperature", "1", "--max_new_tokens", "9"],
        ["--generation", "none.txt", "--max_new_tokens", "9", "--batch_size", "2"],
    ],
)
def test_settings_that_are_read_are_taken(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="none.txt"):
        eval_model.main(["--model_path", "nowhere", *arguments])


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (None, "answers.jsonl: not an answers.jsonl of eval_model.py .*No such file"),
        ([{"id": "1"}], "answers.jsonl: not an answers.jsonl of eval_model.py .*output_ids"),
        (
            [{"id": "other", "output_ids": [1], "text": "x"}] * 2,
            r"--compare_with .*answers.jsonl: the other run answered other items \(2, here 1\): use the same exam",
        ),
    ],
)
def test_answers_to_compare_with_are_read_before_a_model(
    tmp_path: Path, answers: list[dict] | None, message: str
) -> None:
    """There is none at "nowhere"."""
    questions = rows_file(tmp_path / "exam.jsonl", item(1, "qa", "en", "x"))
    if answers is not None:
        rows_file(tmp_path / "answers.jsonl", *answers)
    command = ["--model_path", "nowhere", "--exam", questions, "--compare_with", tmp_path / "answers.jsonl"]
    with pytest.raises(UserError, match=message):
        eval_model.main([*map(str, command)])


def test_hints_of_pairs_are_read_before_a_model(tmp_path: Path) -> None:
    pair = {"prompt": "Who?", "chosen": "b", "rejected": "a", "quality": {"must_end_with": "Bye!"}}
    pairs = rows_file(tmp_path / "pairs.jsonl", pair)
    with pytest.raises(UserError, match="pairs.jsonl: row 1: quality must be"):
        eval_model.main(["--model_path", "nowhere", "--preferences", str(pairs)])


def test_an_exam_that_wants_several_calls(checkpoint: Path, tmp_path: Path) -> None:
    questions = rows_file(tmp_path / "exam.jsonl", *(item(i, "tool", "en", [WANTED] * i) for i in (1, 2)))
    command = ["--model_path", checkpoint, "--exam", questions, "--max_new_tokens", 4, "--device", "cpu"]
    eval_model.main([*map(str, command), "--output_dir", str(tmp_path / "out")])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["tool_exact_n"] == metrics["tool_parses_n"] == 2
