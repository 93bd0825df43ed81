"""Mixtures: proportions counted by hand, small sources repeated, mistakes named."""

import json
from collections import Counter
from pathlib import Path

import pytest

import prepare_datasets
from smolkit.errors import UserError
from smolkit.sources.mixture import Mixture, Share, interleave, quotas


def copies(root: Path) -> Path:
    """100 rows of one dataset, 10 of another; none falls into the validation split when its share is 0."""
    for name, file, count in (("gsm8k", "train.jsonl", 10), ("OpenO1-SFT", "OpenO1-SFT.jsonl", 100)):
        (root / name).mkdir(parents=True)
        keys = ("question", "answer") if name == "gsm8k" else ("instruction", "output")
        lines = [json.dumps(dict(zip(keys, (f"{name} {i}", "a"), strict=True))) for i in range(count)]
        (root / name / file).write_text("\n".join(lines) + "\n", "utf-8")
    return root


def mix(tmp_path: Path, text: str, *more: str) -> tuple[list[dict], dict]:
    """The records of an SFT mixture in order, and its report."""
    root = copies(tmp_path / "copies") if not (tmp_path / "copies").exists() else tmp_path / "copies"
    (tmp_path / "mixture.yaml").write_text(text, "utf-8")
    arguments = ["--source", "local", "--path", str(root), "--output_dir", str(tmp_path / "data")]
    prepare_datasets.main([*arguments, "--mixture", str(tmp_path / "mixture.yaml"), *more])
    records = [json.loads(line) for line in (tmp_path / "data/sft/sft_data.jsonl").read_text("utf-8").splitlines()]
    return records, json.loads((tmp_path / "data/sft/prepare_report.json").read_text())["sources"]


def test_a_mixture_has_its_proportions_in_every_stretch_and_repeats_what_is_small(tmp_path: Path) -> None:
    text = """
sft:
  total: 80
  sources:
    - {dataset: OpenO1-SFT, weight: 3}
    - {dataset: gsm8k, weight: 1, repeat: 2}
"""
    records, report = mix(tmp_path, text, "--validation_fraction", "0")
    assert Counter(record["source"] for record in records) == {"OpenO1-SFT": 60, "gsm8k": 20}
    for start in range(0, 80, 8):
        assert Counter(r["source"] for r in records[start : start + 8]) == {"OpenO1-SFT": 6, "gsm8k": 2}
    ids = [record["id"] for record in records if record["source"] == "gsm8k"]
    first = [f"gsm8k-train-{i}" for i in range(10)]
    assert ids == first + [f"{name}#2" for name in first]
    assert report["gsm8k"]["mixture"]["passes"] == 2 and report["gsm8k"]["mixture"]["share"] == 0.25
    assert report["OpenO1-SFT"]["mixture"]["passes"] == 0.6 and report["OpenO1-SFT"]["mixture"]["rows"] == 60


def test_without_a_total_no_source_is_used_more_often_than_allowed(tmp_path: Path) -> None:
    sources = "[{dataset: OpenO1-SFT, weight: 1, max_records: 40}, {dataset: gsm8k, weight: 1}]"
    records, _ = mix(tmp_path, f"sft: {{sources: {sources}}}", "--validation_fraction", "0")
    assert Counter(record["source"] for record in records) == {"OpenO1-SFT": 10, "gsm8k": 10}


def test_validation_rows_are_neither_repeated_nor_trained_on(tmp_path: Path) -> None:
    sources = "[{dataset: OpenO1-SFT, weight: 1}, {dataset: gsm8k, weight: 1, repeat: 9}]"
    records, _ = mix(tmp_path, f"sft: {{sources: {sources}}}", "--validation_fraction", "0.3")
    lines = (tmp_path / "data/sft/validation/sft_data.jsonl").read_text("utf-8").splitlines()
    held_out = [json.loads(line)["messages"][0]["content"] for line in lines]
    trained = {record["messages"][0]["content"] for record in records}
    assert len(set(held_out)) == len(held_out) > 10 and not trained & set(held_out)


def test_what_one_source_holds_out_is_not_trained_on_from_another(tmp_path: Path) -> None:
    root = copies(tmp_path / "copies")
    rows = [{"question": f"OpenO1-SFT {i}", "answer": "held out"} for i in range(7)]
    (root / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    sources = "[{dataset: OpenO1-SFT, weight: 1}, {dataset: gsm8k, weight: 1, repeat: 99}]"
    records, report = mix(tmp_path, f"sft: {{sources: {sources}}}", "--validation_fraction", "0")
    trained = {record["messages"][0]["content"] for record in records if record["source"] == "OpenO1-SFT"}
    assert trained == {f"OpenO1-SFT {i}" for i in range(7, 100)}
    assert report["OpenO1-SFT"]["dropped"]["stands in the held-out files"]["rows"] == 7
    assert {name: source["repo"] for name, source in report.items()} == {
        "OpenO1-SFT": "O1-OPEN/OpenO1-SFT",
        "gsm8k": "openai/gsm8k",
    }


def test_quotas_by_hand() -> None:
    mixture = Mixture((Share("a", 3), Share("b", 1, repeat=4)))
    assert quotas({"a": 300, "b": 50}, mixture, None) == {"a": 300, "b": 100}  # all of a; b may give 200
    assert quotas({"a": 300, "b": 20}, mixture, None) == {"a": 240, "b": 80}  # b four times
    assert quotas({"a": 300, "b": 20}, mixture, 100) == {"a": 75, "b": 25}
    with pytest.raises(UserError, match="b would have to be used 5.0 times for a total of 400.*at most 320"):
        quotas({"a": 300, "b": 20}, mixture, 400)


def test_by_bytes_the_shares_are_bytes(tmp_path: Path) -> None:
    long, short = tmp_path / "long", tmp_path / "short"
    long.write_bytes((b"x" * 99 + b"\n") * 10)
    short.write_bytes(b"123456789\n" * 100)
    taken = Counter(name for name, _ in interleave({"l": long, "s": short}, {"l": 500, "s": 500}, by_bytes=True))
    assert taken == {"l": 5, "s": 50}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sft: [", "cannot be read as YAML"),
        ("code: {sources: []}", "must hold a mixture under pretrain, sft or dpo"),
        ("sft: {sources: []}", "sft: needs a list called sources"),
        ("sft: {sources: [{dataset: gsm8k}]}", "source 1: needs dataset and weight"),
        ("sft: {sources: [{dataset: gsm8k, weight: 0}]}", "weight: 0: must be a number above 0"),
        ("sft: {sources: [{dataset: gsm8k, weight: 1, times: 2}]}", "unknown key times"),
        ("sft: {sources: [{dataset: gsm8k, weight: 1}, {dataset: gsm8k, weight: 1}]}", "named twice"),
        ("sft: {sources: [{dataset: gsm8k, weight: 1}, {dataset: openai/gsm8k, weight: 1}]}", "gsm8k and openai/gsm8k"),
        ("sft: {total: x, sources: [{dataset: gsm8k, weight: 1}]}", "total: x: must be a number"),
        ("dpo: {sources: [{dataset: gsm8k, weight: 1}]}", "gsm8k is sft data, not dpo data"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mix(tmp_path, text)
