"""lm-evaluation-harness on local task files, nothing downloaded: its figures for a checkpoint and for servers."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import eval_model
from smolkit.errors import UserError
from smolkit.evaluation.harness import default_batch_size, require_harness, results_of
from smolkit.evaluation.likelihoods import choice_results
from smolkit.evaluation.subjects import LocalModel

QUESTIONS = [
    {"question": question, "choices": ["baker.", "smith", "job of the baker Ada"], "answer": answer}
    for question in ("The job of Ada is", "Ada, the", "你好，", "Who? ")
    for answer in (0, 1, 2)
]
CHOICE = """
task: toy_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITTEN = """
task: toy_written
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
filter_list:
  - {name: strict, filter: [{function: take_first}]}
  - {name: lenient, filter: [{function: lowercase}, {function: take_first}]}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two task files and their data."""
    directory = tmp_path_factory.mktemp("tasks")
    data = directory / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (directory / "choice.yaml").write_text(CHOICE.replace("FILE", str(data)))
    (directory / "written.yaml").write_text(WRITTEN.replace("FILE", str(data)))
    return directory


def evaluate(tasks: Path, out: Path, *arguments: object) -> dict:
    common = ["--lm_eval_include_path", str(tasks), "--output_dir", str(out)]
    eval_model.main([*common, *map(str, arguments)])
    return json.loads((out / "metrics.json").read_text())


def values(out: Path, name: str) -> list:
    rows = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    return [row["values"][name] for row in rows if name in row["values"]]


def test_the_harness_and_our_multiple_choice_agree(
    tasks: Path,
    checkpoint: Path,
    plain: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """Item by item: the `hf` backend on our directory, `local-completions` on a server, and our own code."""
    ours = choice_results("ours", QUESTIONS, LocalModel(model, tokenizer)).figures
    here = ("--model_path", checkpoint, "--device", "cpu", "--lm_eval", "toy_choice")
    there = ("--endpoint", plain, "--tokenizer_path", checkpoint, "--lm_eval", "toy_choice")
    for number, subject in enumerate((here, there)):
        metrics = evaluate(tasks, tmp_path / str(number), *subject)
        for metric in ("acc", "acc_norm"):
            name, expected = f"toy_choice_{metric}", list(ours[f"ours_{metric}"].items.values())
            assert values(tmp_path / str(number), name) == expected
            assert metrics[name] == sum(expected) / 12 and name in metrics["shares"]
    assert metrics["data"]["toy_choice_acc"] == "lm-evaluation-harness" and metrics["settings"]["versions"]["lm_eval"]
    limited = evaluate(tasks, tmp_path / "limited", *here, "--limit", 5)
    assert limited["toy_choice_acc_n"] == 5


def test_written_answers_of_a_checkpoint_and_of_a_server(
    tasks: Path, checkpoint: Path, ours: str, tmp_path: Path
) -> None:
    subjects = (
        ("--model_path", checkpoint, "--device", "cpu"),
        ("--endpoint", ours, "--api_key", "secret", "--chat"),  # no log-probabilities, no tokenizer
    )
    for number, subject in enumerate(subjects):
        metrics = evaluate(tasks, tmp_path / str(number), *subject, "--lm_eval", "toy_written", "--limit", 4)
        assert metrics["toy_written_exact_match_strict_n"] == metrics["toy_written_exact_match_lenient_n"] == 4
        assert len(metrics["intervals"]["toy_written_exact_match_strict"]) == 2


def test_figures_that_are_no_means_of_items_are_taken_as_they_are() -> None:
    content = {
        "results": {
            "web": {"alias": "web", "word_perplexity,none": 20.5, "word_perplexity_stderr,none": "N/A"},
            "group": {"alias": "group", "acc,none": 0.5, "acc_stderr,none": 0.1},
            "sums": {"alias": "sums", "exact_match,strict-match": 0.5, "sample_len": 2, "length,strict-match": 4.0},
        },
        "samples": {
            "web": [{"doc_id": 0, "filter": "none", "word_perplexity": [-30.0, 10]}],
            "sums": [
                {"doc_id": 0, "filter": "strict-match", "exact_match": 1.0, "length": 3},
                {"doc_id": 0, "filter": "flexible-extract", "exact_match": 1.0, "length": 3},
                {"doc_id": 1, "filter": "strict-match", "exact_match": 0.0, "length": 5},
            ],
        },
    }
    figures = results_of(content).figures
    sums = ["sums_exact_match_strict-match", "sums_length_strict-match"]
    assert list(figures) == ["web_word_perplexity", "group_acc", *sums]
    assert figures["web_word_perplexity"].value == 20.5 and not figures["web_word_perplexity"].items
    assert figures["sums_exact_match_strict-match"].items == {"sums-0": True, "sums-1": False}
    assert figures["sums_length_strict-match"].items == {"sums-0": 3, "sums-1": 5}


def test_unknown_tasks_and_missing_tokenizers_are_named(
    tasks: Path, checkpoint: Path, plain: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--lm_eval nonsense_task: no such task"):
        evaluate(tasks, tmp_path, "--model_path", checkpoint, "--lm_eval", "toy_choice,nonsense_task")
    with pytest.raises(UserError, match=r"needs the model's tokenizer: give --tokenizer_path DIR \(or --chat\)"):
        evaluate(tasks, tmp_path, "--endpoint", plain, "--lm_eval", "toy_choice")
    with pytest.raises(UserError, match="--lm_eval toy_choice: .*not supported for chat completions"):
        evaluate(tasks, tmp_path, "--endpoint", plain, "--lm_eval", "toy_choice", "--chat")


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # what Python does with a package that is not there
    with pytest.raises(UserError, match="--lm_eval needs lm-evaluation-harness: pip install -r requirements-eval.txt"):
        require_harness()


def test_the_logits_of_a_batch_are_bounded(checkpoint: Path, tmp_path: Path) -> None:
    """128 rows where the vocabulary is small; of Qwen's 151,936 entries one row of 1,024 tokens takes 0.6 GiB."""
    assert default_batch_size(checkpoint) == 128
    shutil.copytree(checkpoint, tmp_path / "toy")
    config = json.loads((checkpoint / "config.json").read_text())
    for vocabulary, context, rows in ((151_936, 32_768, 1), (49_152, 8192, 5), (49_152, 128, 42)):
        changed = config | {"vocab_size": vocabulary, "max_position_embeddings": context}
        (tmp_path / "toy" / "config.json").write_text(json.dumps(changed))
        assert default_batch_size(tmp_path / "toy") == rows
