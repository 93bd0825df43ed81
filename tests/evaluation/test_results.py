"""Intervals and tests against published and hand-made values; figures on disk, tables, cards, limits, comparisons."""

import json
import math
from pathlib import Path

import pytest
import yaml

import eval_model
from smolkit.errors import UserError
from smolkit.evaluation import statistics
from smolkit.evaluation.comparison import FEWEST, compare, comparison_table, difference, read_run
from smolkit.evaluation.results import (
    Results,
    card_beside,
    check_limits,
    evaluation_table,
    model_index,
    read_limits,
    update_card,
)

# --- statistics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_the_published_examples(successes: int, count: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert statistics.wilson(successes, count) == pytest.approx((low, high), abs=5e-5)
    assert statistics.wilson(count - successes, count) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_the_bootstrap_of_a_mean_is_near_the_normal_interval() -> None:
    values = [math.sin(i) for i in range(400)]
    mean = sum(values) / 400
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 400 / 400)
    low, high = statistics.bootstrap(values, [1] * 400)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)
    assert (low, high) == statistics.bootstrap(values, [1] * 400), "the same items give the same limits"


def test_the_bootstrap_of_a_ratio_weighs_items_by_their_denominators() -> None:
    assert statistics.bootstrap([1, 20, 300], [1, 20, 300]) == (1.0, 1.0)
    low, high = statistics.bootstrap([10.0, 0.0], [1000.0, 1.0])
    assert low == 0.0 and high == pytest.approx(0.01)  # both draws the second item, or both the first


@pytest.mark.parametrize(("better", "worse", "p"), [(6, 1, 0.125), (0, 0, 1.0), (5, 5, 1.0), (10, 0, 2 / 1024)])
def test_mcnemar_is_the_two_sided_binomial_test(better: int, worse: int, p: float) -> None:
    assert statistics.mcnemar(better, worse) == statistics.mcnemar(worse, better) == pytest.approx(p)


def test_the_paired_bootstrap_sees_what_is_hidden_between_items() -> None:
    first = [(10.0 * math.sin(i), 1.0) for i in range(100)]
    second = [(value + 0.1 + 0.01 * math.cos(i), 1.0) for i, (value, _) in enumerate(first)]
    low, high, p = statistics.paired_bootstrap(first, second)
    assert 0.09 < low < 0.1 < high < 0.11 and p == 1 / statistics.RESAMPLES
    assert statistics.paired_bootstrap(first, first) == (0.0, 0.0, 1.0)
    noise = [(value + math.sin(7 * i), 1.0) for i, (value, _) in enumerate(first)]
    assert statistics.paired_bootstrap(first, noise)[2] > 0.05


# --- figures ------------------------------------------------------------------------------------------------


def results_of(right: int, count: int = 20) -> Results:
    results = Results()
    results.add("qa", [(f"q{i}", i < right) for i in range(count)])
    results.add("length", [(f"q{i}", float(i + right)) for i in range(count)])
    results.add("bits", [(f"t{i}", (float(i), 2.0 * i + right)) for i in range(count)])
    results.number("seconds", 2.5)
    return results


def test_figures_have_items_intervals_and_units(tmp_path: Path) -> None:
    whole = Results()
    whole.include(results_of(15), "exam.jsonl")
    metrics = whole.write(tmp_path, {"model_path": "x"})
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert metrics["qa"] == 0.75 and metrics["qa_n"] == 20 and metrics["seconds"] == 2.5
    assert metrics["bits"] == pytest.approx(190 / (380 + 300))
    assert metrics["intervals"]["qa"] == list(statistics.wilson(15, 20))
    assert metrics["shares"] == ["qa"] and metrics["settings"] == {"model_path": "x"}
    assert "seconds" not in metrics["intervals"] and metrics["data"]["qa"] == "exam.jsonl"
    rows = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert rows[3] == {"id": "q3", "values": {"qa": True, "length": 18.0}} and len(rows) == 40
    assert (tmp_path / "metrics.md").read_text() == evaluation_table(metrics) + "\n"


def test_ids_that_come_twice_are_told_apart_and_names_may_not() -> None:
    results = Results()
    results.add("qa", [("a", True), ("a", False), ("a", True)])
    assert list(results.figures["qa"].items) == ["a", "a#2", "a#3"]
    with pytest.raises(UserError, match="called 'qa'"):
        results.number("qa", 1.0)


def test_one_number_has_no_interval_and_one_share_has() -> None:
    results = Results()
    results.add("length", [("a", 3.0)])
    results.add("qa", [("a", True)])
    assert results.figures["length"].interval is None
    assert results.figures["qa"].interval == pytest.approx((0.2065, 1.0), abs=1e-4)


def test_the_table_shows_shares_in_percent() -> None:
    lines = evaluation_table(results_of(15).metrics()).splitlines()
    assert len(lines) == 6 and len({len(line) for line in lines}) == 1
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["qa", "75.0 %", "53.1 – 88.8 %", "20", ""]
    assert lines[1].startswith("| ---") and lines[5].split("|")[2].strip() == "2.5000"


# --- the model card -----------------------------------------------------------------------------------------


def test_a_card_gets_its_evaluation_once_and_keeps_the_rest(tmp_path: Path) -> None:
    model = tmp_path / "toy"
    model.mkdir()
    card = model / "README.md"
    card.write_text("---\nlicense: apache-2.0\ntags:\n- 小模型\n---\n\n# Toy\n\nText with --- in it.\n")
    assert card_beside(model / "eval") is None, "not a model yet"
    (model / "config.json").write_text("{}")
    assert card_beside(model / "eval") == card
    assert card_beside(tmp_path / "eval") is None and card_beside(model / "other") is None
    for right in (15, 5):
        update_card(card, results_of(right).metrics())
        text = card.read_text()
        assert text.count("## Evaluation") == 1 and f"{100 * right / 20:.1f} %" in text
        assert "# Toy\n\nText with --- in it.\n" in text
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["license"] == "apache-2.0" and metadata["tags"] == ["小模型"]
    (model_entry,) = metadata["model-index"]
    assert model_entry["name"] == "toy"
    values = {m["type"]: m["value"] for r in model_entry["results"] for m in r["metrics"]}
    assert values == {"qa": 0.25, "length": pytest.approx(14.5), "bits": pytest.approx(190 / 480)}


def test_a_name_that_metrics_json_needs_is_no_figure() -> None:
    with pytest.raises(UserError, match="'data' is a key of metrics.json"):
        Results().number("data", 1.0)


def test_the_hub_reads_the_metadata_of_a_card(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    card = tmp_path / "README.md"
    card.write_text("# No metadata\n")
    update_card(card, results_of(15).metrics())
    read = ModelCard.load(card)
    assert {r.metric_type: r.metric_value for r in read.data.eval_results}["qa"] == 0.75
    assert model_index({"seconds": 1.0}, "x") == []


def test_metadata_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\na: [\n---\n# x\n")
    with pytest.raises(UserError, match="README.md: the metadata is not YAML"):
        update_card(card, results_of(15).metrics())
    assert card.read_text() == "---\na: [\n---\n# x\n"


# --- limits -------------------------------------------------------------------------------------------------


def test_limits_of_shares_are_in_percent() -> None:
    metrics = results_of(15).metrics()
    assert check_limits(metrics, read_limits(["qa=75", "length=20"], "--fail_below"), {"seconds": 3.0}) == []
    failures = check_limits(metrics, read_limits(["qa=75.1%"], "--fail_below"), {"length": 24.0})
    assert failures == ["qa is 75 %, below 75.1 %", "length is 24.5, above 24"]


def test_unusable_limits_are_named() -> None:
    metrics = results_of(15).metrics()
    with pytest.raises(UserError, match="write NAME=LIMIT"):
        read_limits(["qa>90"], "--fail_below")
    with pytest.raises(UserError, match="--fail_below qb: not measured; there are qa, length, bits, seconds"):
        check_limits(metrics, {"qb": 1.0}, {})
    with pytest.raises(UserError, match="qa=0.9: limits of shares are in percent; write 90"):
        check_limits(metrics, {"qa": 0.9}, {})


# --- comparisons --------------------------------------------------------------------------------------------


def test_runs_are_compared_on_the_items_of_both(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, right, count in (("a", 5, 20), ("b", 15, 20), ("c", 6, 30)):
        results_of(right, count).write(tmp_path / name / "eval")
    paths = [tmp_path / name for name in "abc"]
    runs = [read_run(paths[0]), read_run(paths[1] / "eval"), read_run(paths[2])]
    found = compare(runs)
    first, second, third = (found["qa"][run.name] for run in runs)
    assert first == {"value": 0.25}
    assert second == {"value": 0.75, "difference": 0.5, "p": statistics.mcnemar(10, 0), "items": 20}
    assert third == {"value": 0.2, "difference": 0.05, "p": 1.0, "items": 20}
    assert found["length"][runs[1].name]["difference"] == pytest.approx(10)
    assert found["seconds"][runs[1].name] == {"value": 2.5}
    line = next(line for line in comparison_table(runs).splitlines() if line.startswith("| qa"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["qa", "25.0 %", "75.0 % (+50.0, p 0.002)*", "20.0 % (+5.0, p 1.000)"]
    eval_model.main(["--compare", *map(str, paths)])
    assert "75.0 % (+50.0, p 0.002)*" in capsys.readouterr().out


def test_only_figures_of_the_same_data_are_tested(tmp_path: Path) -> None:
    """Texts have the ids text-0, text-1, …, whatever is in them."""
    for name, right, checksum in (("a", 5, "one"), ("b", 15, "one"), ("c", 15, "two")):
        whole = Results()
        whole.include(results_of(right), "text.jsonl", checksum)
        whole.write(tmp_path / name)
    runs = [read_run(tmp_path / name) for name in "abc"]
    found = compare(runs)
    assert found["qa"][runs[1].name]["p"] < 0.05 and found["qa"][runs[2].name] == {"value": 0.75}
    *_, last = comparison_table(runs).splitlines()
    assert last == f"not tested: {runs[0].name} and {runs[2].name} measured qa, length, bits on different data"
    assert "not tested" not in comparison_table(runs[:2])


def test_ids_with_unusual_line_ends_are_read(tmp_path: Path) -> None:
    results = Results()
    results.add("qa", [("a\u2028b", True), ("c\x85", False)])
    results.write(tmp_path)
    assert list(read_run(tmp_path).items["qa"]) == ["a\u2028b", "c\x85"]


def test_too_few_numbers_are_not_tested() -> None:
    few = {str(i): 1.0 for i in range(FEWEST - 1)}
    assert difference(few, {name: 2.0 for name in few}) is None
    assert difference({"a": True}, {"b": True}) is None
    assert difference({"a": True}, {"a": False, "b": True}) == (-1.0, 1.0, 1)


def test_directories_without_an_evaluation_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics.json: missing; evaluate .* first"):
        read_run(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "items.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(UserError, match="not an evaluation"):
        read_run(tmp_path)
