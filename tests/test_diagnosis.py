"""Verdicts on curves drawn by hand: each says one thing, and a healthy one says nothing bad."""

import math
import random

import pytest

from smolkit.diagnosis import diagnose
from smolkit.findings import LEVELS, Setting, noise, series

VOCABULARY = 2000
GUESS = math.log(VOCABULARY)


def curve(shape, steps: int = 60, jitter: float = 0.02, seed: int = 0, **more) -> list[dict]:
    """Training rows; `shape` maps progress in [0, 1] to the loss, `more` other columns likewise."""
    draw = random.Random(seed)
    rows = []
    for i in range(steps):
        at = i / (steps - 1)
        row = {"step": 10 * (i + 1), "loss": shape(at) + draw.gauss(0, jitter), "learning_rate": 1e-3, "grad_norm": 1.0}
        rows.append(row | {name: value(at) if callable(value) else value for name, value in more.items()})
    return rows


def healthy(at: float) -> float:
    return 2 + 5.6 * math.exp(-8 * at)


def held_out(rows: list[dict], values: list[float]) -> list[dict]:
    """With evaluations spread over the run."""
    places = [round((i + 1) * len(rows) / len(values)) - 1 for i in range(len(values))]
    found = [{"step": rows[i]["step"], "eval_loss": value} for i, value in zip(places, values, strict=True)]
    return sorted([*rows, *found], key=lambda row: row["step"])


def codes(rows: list[dict], **setting) -> dict[str, str]:
    found = diagnose(rows, Setting(**({"vocabulary": VOCABULARY} | setting)))
    levels = [LEVELS.index(finding.level) for finding in found.findings]
    assert levels == sorted(levels, reverse=True), "worst first"
    return {finding.code: finding.level for finding in found.findings}


def test_a_healthy_run_is_called_good() -> None:
    rows = held_out(curve(healthy), [3.0, 2.4, 2.2, 2.1])
    assert codes(rows) == {"learning": "good", "generalises": "good"}
    assert diagnose(rows).verdict == "good"


@pytest.mark.parametrize("noise_level", [0.005, 0.05, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_noise_alone_raises_no_alarm(noise_level: float, seed: int) -> None:
    found = codes(curve(healthy, 80, noise_level, seed))
    assert found.keys() <= {"learning", "still_falling"}, found


@pytest.mark.parametrize(
    ("shape", "more", "code", "level"),
    [
        (lambda at: GUESS, {"learning_rate": 0.0}, "not_learning", "problem"),
        (lambda at: GUESS - 0.1 * at, {}, "not_learning", "problem"),
        (lambda at: 2.3, {}, "not_learning", "warning"),
        (lambda at: 0.03, {}, "nothing_left", "note"),
        (lambda at: 8.5, {}, "worse_than_guessing", "problem"),
        (lambda at: healthy(at) + 3 * max(0.0, at - 0.5), {}, "diverged", "problem"),
        (lambda at: 7.5 + 40 * at - 46 * at * at, {}, "diverged", "problem"),  # away and back again
        (lambda at: 7.5 - 0.5 * at, {}, "learning_rate_too_low", "warning"),
        (lambda at: 7.5 - 4 * at, {}, "still_falling", "note"),
        (healthy, {"grad_norm": lambda at: 0.5 if at < 0.6 else 9.0}, "gradients_growing", "warning"),
        (healthy, {"grad_norm": 30.0}, "always_clipped", "note"),
    ],
)
def test_training_curves(shape, more, code: str, level: str) -> None:
    found = codes(curve(shape, **more), clip=1.0)
    assert found.pop(code) == level
    assert not {"not_learning", "diverged", "loss_spikes", "learning_rate_too_low"} & found.keys()


def test_a_zero_learning_rate_is_named_as_the_reason() -> None:
    (finding,) = diagnose(curve(lambda at: GUESS, learning_rate=0.0), Setting(vocabulary=VOCABULARY)).findings
    assert "learning rate is 0" in finding.text and "--learning_rate" in finding.remedy


def test_spikes_are_counted_and_named() -> None:
    rows = curve(healthy)
    for i in (30, 45):
        rows[i]["loss"] += 2.5
    (finding,) = [f for f in diagnose(rows).findings if f.code == "loss_spikes"]
    assert finding.level == "warning" and "2 times (step 310, 460; highest 4." in finding.text
    for nothing in (float("nan"), None):
        rows[-1]["loss"] = nothing
        assert codes(rows)["non_finite"] == "problem"


@pytest.mark.parametrize(
    ("values", "level"),
    [
        ([3.0, 2.5, 2.6, 2.65], "warning"),
        ([3.0, 2.5, 3.2, 4.0], "problem"),
        ([3.1, 3.05, 3.04, 3.03], "warning"),  # training went on to 2.0: the gap grew
        ([4.5], "warning"),
        ([2.2], None),
        ([3.0, 2.4, 2.2, 2.21], None),
    ],
)
def test_overfitting(values: list[float], level: str | None) -> None:
    assert codes(held_out(curve(healthy), values)).get("overfitting") == level


def test_a_gap_that_was_there_from_the_start_is_not_overfitting() -> None:
    rows = held_out(curve(lambda at: 1.2 - 0.3 * at), [2.4, 2.3, 2.2, 2.15])
    assert "overfitting" not in codes(rows)


@pytest.mark.parametrize(
    ("high", "low", "dead", "dropped", "code", "level"),
    [
        (1.2, 0.8, 0.0, 0.0, "router_balanced", "good"),
        (3.9, 0.0, 0.75, 0.0, "router_collapse", "problem"),
        (1.9, 0.02, 0.05, 0.0, "dead_experts", "warning"),
        (3.0, 0.3, 0.0, 0.0, "router_imbalance", "warning"),
        (1.2, 0.8, 0.0, 0.3, "tokens_dropped", "warning"),
    ],
)
def test_router(high: float, low: float, dead: float, dropped: float, code: str, level: str) -> None:
    names = {"load_max": high, "load_min": low, "dead": dead, "dropped": dropped, "entropy": 1.0}
    rows = curve(healthy, **{f"router/{name}": value for name, value in names.items()})
    assert codes(rows, experts=8, chosen=2)[code] == level
    assert codes(rows)[code] == level, "without knowing the number of experts, too"


def test_two_experts_of_which_both_are_chosen_cannot_collapse() -> None:
    rows = curve(healthy, **{"router/load_max": 1.0, "router/load_min": 1.0, "router/dead": 0.0})
    assert codes(rows, experts=2, chosen=2) == {"learning": "good", "router_balanced": "good"}


# --- preferences


def pairs(chosen, rejected, accuracy, loss=None, steps: int = 24, **more) -> list[dict]:
    """DPO rows from the rewards at progress in [0, 1]; the loss is that of the mean margin."""
    draw, rows = random.Random(0), []
    for i in range(steps):
        at = i / (steps - 1)
        a, b = chosen(at) + draw.gauss(0, 0.004), rejected(at) + draw.gauss(0, 0.004)
        row = {
            "step": i + 1,
            "loss": math.log1p(math.exp(b - a)) if loss is None else loss,
            "learning_rate": 1e-6,
            "grad_norm": 1.0,
            "rewards/chosen": a,
            "rewards/rejected": b,
            "rewards/margins": a - b,
            "rewards/accuracies": accuracy(at) if callable(accuracy) else accuracy,
            "logps/chosen": -50.0,
            "logps/rejected": -60.0,
        }
        rows.append(row | more)
    return rows


@pytest.mark.parametrize(
    ("rows", "code", "level"),
    [
        (pairs(lambda at: 0.3 * at, lambda at: -1.5 * at, lambda at: 0.5 + 0.4 * at), "preference_learned", "good"),
        (pairs(lambda at: 0, lambda at: 0, 0.5), "flat", "problem"),
        (pairs(lambda at: 0, lambda at: 0, 0.0), "flat", "problem"),  # equal sides: accuracy 0, as in the walk-through
        (pairs(lambda at: -0.5 * at, lambda at: 0.3 * at, 0.2, loss=0.66), "wrong_way", "problem"),
        (pairs(lambda at: 0, lambda at: 0, 0.5, loss=0.96), "worse_than_reference", "problem"),
        (pairs(lambda at: 0.02 * at, lambda at: -0.03 * at, 0.85), "accuracy_without_margin", "warning"),
        (pairs(lambda at: -4 * at, lambda at: -7 * at, 0.9), "both_falling", "warning"),
        (pairs(lambda at: 2 * at, lambda at: -12 * at, 1.0), "margins_exploding", "warning"),
        (pairs(lambda at: 0, lambda at: 0, 0.5)[:2], "too_short", "note"),
    ],
)
def test_preference_curves(rows: list[dict], code: str, level: str) -> None:
    found = codes(rows)
    assert found.pop(code) == level
    assert level == "warning" or not {"both_falling", "margins_exploding", "flat", "wrong_way"} & found.keys()


def test_the_flat_run_says_why() -> None:
    flat = pairs(lambda at: 0, lambda at: 0, 0.5)
    (finding,) = diagnose(flat).findings
    assert "ln 2 = 0.693" in finding.text and "chosen and rejected" in finding.remedy
    (finding,) = diagnose([row | {"learning_rate": 0.0} for row in flat]).findings
    assert "learning rate is 0" in finding.text
    # With a likelihood term the loss is no coin toss, and the margin alone decides.
    (finding,) = diagnose([row | {"loss": 1.9} for row in flat], Setting(losses=("sigmoid", "sft"))).findings
    assert finding.code == "flat" and "ln 2" not in finding.text


def test_the_table_of_the_walk_through_is_read_as_it_should_be() -> None:
    """Equal texts on both sides, a policy that is not its reference: 0.6931, -5.77 twice, accuracy and margin 0."""
    figures = {"loss": 0.6931, "rewards/chosen": -5.77, "rewards/rejected": -5.77}
    rows = [
        {"step": 50 * i, "learning_rate": 1e-7, "rewards/margins": 0.0, "rewards/accuracies": 0.0} | figures
        for i in range(1, 11)
    ]
    found = diagnose(rows)
    assert {f.code: f.level for f in found.findings} == {"flat": "problem", "different_start": "problem"}
    assert any("the same text" in f.text for f in found.findings)


def test_held_out_pairs_decide_about_overfitting() -> None:
    rows = pairs(lambda at: 0.5 * at, lambda at: -1.5 * at, 0.98)
    worse = {"step": 24, "eval_loss": 0.7, "eval_rewards/accuracies": 0.55}
    assert codes([*rows, worse])["overfitting"] == "warning"
    good = {"step": 24, "eval_loss": 0.3, "eval_rewards/accuracies": 0.93}
    assert codes([*rows, good])["generalises"] == "good"
    rising = [{"step": 12, "eval_loss": 0.3, "eval_rewards/accuracies": 0.93}, good | {"eval_loss": 0.5}]
    assert codes([*rows, *rising])["overfitting"] == "warning"


def test_every_figure_is_explained_with_its_last_value() -> None:
    rows = pairs(lambda at: 0.3 * at, lambda at: -1.5 * at, 0.9, loss=0.4)
    explained = {metric.name: metric for metric in diagnose(rows, Setting(beta=0.1)).explained}
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "grad_norm"):
        assert explained[name].value == rows[-1][name] and explained[name].meaning
    assert "coin toss" in explained["loss"].meaning and "beta = 0.1" in explained["rewards/chosen"].meaning
    tokens = {m.name: m for m in diagnose([{"step": 1, "loss": math.log(8.0), "eval_bits_per_byte": 1.5}]).explained}
    assert "8.0 tokens" in tokens["loss"].meaning and tokens["eval_bits_per_byte"].value == 1.5


def test_noise_ignores_the_trend_and_values_that_are_no_numbers() -> None:
    draw = random.Random(1)
    assert noise([3 - 0.1 * i for i in range(50)]) == pytest.approx(0, abs=1e-9)
    assert noise([3 - 0.1 * i + draw.gauss(0, 0.2) for i in range(500)]) == pytest.approx(0.2, rel=0.15)
    odd = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1}, {"step": 3, "loss": "x"}, {"step": 4}]
    assert series(odd, "loss") == ([2], [1.0])
    assert diagnose([]).verdict == "note"
