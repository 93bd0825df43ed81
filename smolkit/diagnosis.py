"""What the curves of a run say, in plain words: did it learn, and if not, what is the likely reason and the remedy.

`diagnose` is a pure function of the rows of `metrics.jsonl`; it knows token prediction (pretraining, fine-tuning) and
preference training (DPO and its relatives) by the columns. Thresholds are rules of thumb, each with its reason beside
it; a finding states the figures it rests on, so that a reader can disagree.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal

from smolkit.findings import LEVELS, Explained, Finding, Level, Setting, ends, last, noise, series, smoothed
from smolkit.preference_diagnosis import explain_preferences, judge_preferences

FEWEST = 6  # logged losses below which a curve has no shape


@dataclass(frozen=True)
class Diagnosis:
    """Findings, worst first, and the metrics explained."""

    kind: Literal["tokens", "preferences"]
    findings: list[Finding]
    explained: list[Explained]

    @property
    def verdict(self) -> Level:
        """The worst level among the findings; a note beside something good does not spoil it."""
        levels = {finding.level for finding in self.findings}
        return next((level for level in ("problem", "warning", "good") if level in levels), "note")

    def lines(self) -> list[str]:
        """The findings for a terminal."""
        return [f"{f.level}: {f.text}" + (f" → {f.remedy}" if f.remedy else "") for f in self.findings]


def diagnose(rows: Sequence[dict[str, Any]], setting: Setting | None = None) -> Diagnosis:
    """Judge the rows of `metrics.jsonl` (each with `step`; training rows have `loss`, evaluations `eval_loss`)."""
    setting = setting or Setting()
    preferences = any("rewards/margins" in row for row in rows)
    checks = (
        (_broken(rows), judge_preferences(rows, setting), _spikes(rows), _gradients(rows, setting))
        if preferences
        else (_broken(rows), _learning(rows, setting), _spikes(rows), _validation(rows), _gradients(rows, setting))
    )
    found = [finding for check in (*checks, _router(rows, setting)) for finding in check]
    found.sort(key=lambda finding: -LEVELS.index(finding.level))
    explain = explain_preferences if preferences else _explain_tokens
    explained = [*explain(rows, setting), *_explain_common(rows, setting)]
    return Diagnosis("preferences" if preferences else "tokens", found, explained)


# --- token prediction ---------------------------------------------------------------------------------------


def _broken(rows: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    # null in our own files (JSON has no NaN), NaN in those of other trainers
    bad = [step for step, loss in losses if loss is None or isinstance(loss, float) and not math.isfinite(loss)]
    if bad:
        yield Finding(
            "problem",
            "non_finite",
            f"The loss is not a number at step {bad[0]}.",
            "lower --learning_rate, check the data",
        )


def _learning(rows: Sequence[dict[str, Any]], setting: Setting) -> Iterator[Finding]:
    steps, losses = series(rows, "loss")
    if len(losses) < FEWEST:
        text = f"Losses logged: {len(losses)}, too few to judge the curve."
        yield Finding("note", "too_short", text, "train longer, or lower --logging_steps")
        return
    first, now, error = ends(losses)
    guessing = math.log(setting.vocabulary) if setting.vocabulary else None
    if guessing and now > 1.05 * guessing:
        yield Finding(
            "problem",
            "worse_than_guessing",
            f"The loss is {now:.2f}, above {guessing:.2f}, what guessing among {setting.vocabulary:,} tokens costs.",
            "the learning rate is too high: lower --learning_rate, raise --warmup_steps",
        )
        return
    width = max(2, len(losses) // 10)
    means = smoothed(losses, width)
    highest = max(range(len(means)), key=means.__getitem__)
    start = guessing or losses[0]
    if means[highest] > 1.5 * start + 0.5:
        told = "what guessing costs" if guessing else "where it began"
        yield Finding(
            "problem",
            "diverged",
            f"The loss rose to {means[highest]:.2f} around step {steps[highest]}, far above {told} ({start:.2f}); it "
            f"ended at {now:.2f}.",
            "the learning rate is too high: lower --learning_rate, raise --warmup_steps",
        )
        return
    lowest = min(range(len(means)), key=means.__getitem__)
    rise = means[-1] - means[lowest]
    # A tenth above its best in the first four fifths, and beyond noise: it went away from what it had learned.
    if lowest < 0.8 * (len(means) - 1) and rise > max(0.1 * means[lowest], 4 * noise(losses) / math.sqrt(width)):
        yield Finding(
            "problem",
            "diverged",
            f"The loss fell to {means[lowest]:.3f} around step {steps[lowest]} and rose to {means[-1]:.3f} again.",
            "the learning rate is too high: lower --learning_rate, raise --warmup_steps or --adam_beta2",
        )
        return
    drop = first - now
    if drop < max(0.02 * first, error):
        yield _flat(rows, first, now, error, guessing)
        return
    yield Finding("good", "learning", f"The training loss fell from {first:.3f} to {now:.3f}.")
    yield from _pace(losses, first, drop)


def _flat(rows: Sequence[dict[str, Any]], first: float, now: float, error: float, guessing: float | None) -> Finding:
    """Why a loss did not fall."""
    _, rates = series(rows, "learning_rate")
    told = f"The training loss did not fall: {first:.3f} at the start, {now:.3f} at the end"
    if rates and max(rates) == 0:
        return Finding("problem", "not_learning", f"{told}. The learning rate is 0.", "set --learning_rate")
    if guessing and now > 0.95 * guessing:
        text = f"{told}, about the {guessing:.2f} of guessing among all tokens."
        return Finding("problem", "not_learning", text, "raise --learning_rate; check that labels are not all masked")
    if now < 0.1:
        return Finding("note", "nothing_left", f"{told}. It is so low that there was hardly anything left to learn.")
    if first - now > 0.02 * first:
        text = f"The training loss went from {first:.3f} to {now:.3f}, which is within its noise (±{error:.3f})."
        return Finding("note", "unclear", text, "train longer, or log over more steps (--logging_steps)")
    return Finding(
        "warning",
        "not_learning",
        f"{told}.",
        "raise --learning_rate or train longer; check that the data fits the model",
    )


def _pace(losses: Sequence[float], first: float, drop: float) -> Iterator[Finding]:
    half = len(losses) // 2
    quarter = max(2, len(losses) // 4)
    middle = fmean(losses[half - quarter // 2 : half + (quarter + 1) // 2])
    early = fmean(losses[:quarter]) - middle
    late = middle - fmean(losses[-quarter:])
    # A learning curve bends. One that is straight to its end and fell by little moved too slowly all along.
    if drop < 0.1 * first and late > 0.7 * early > 0:
        yield Finding(
            "warning",
            "learning_rate_too_low",
            f"The loss fell by only {drop / first:.0%}, in a straight line that had not begun to bend.",
            "raise --learning_rate (three times is a fair trial)",
        )
    elif late > max(0.1 * losses[-1], 3 * noise(losses) * math.sqrt(2 / quarter)):
        yield Finding("note", "still_falling", "The loss was still falling fast when training ended.", "train longer")


def _spikes(rows: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """A loss far above the ones before it that came down again: by 6 standard deviations and 15 %."""
    steps, losses = series(rows, "loss")
    spread = noise(losses)
    spikes: list[tuple[int, float]] = []
    for i in range(4, len(losses) - 1):
        before = median(losses[max(0, i - 8) : i])
        limit = before + max(6 * spread, 0.15 * before, 0.05)
        if losses[i] > limit and min(losses[i + 1 : i + 9]) < limit and losses[i] == max(losses[i - 1 : i + 2]):
            spikes.append((steps[i], losses[i]))
    if spikes:
        named = ", ".join(str(step) for step, _ in spikes[:5]) + ("…" if len(spikes) > 5 else "")
        count = "once" if len(spikes) == 1 else f"{len(spikes)} times"
        yield Finding(
            "warning",
            "loss_spikes",
            f"The loss jumped up {count} (step {named}; highest {max(value for _, value in spikes):.2f}).",
            "lower --learning_rate or --max_grad_norm, raise --warmup_steps; look at the data of those steps",
        )


def _validation(rows: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    steps, held_out = series(rows, "eval_loss")
    train = last(rows, "loss")
    if not held_out or train is None:
        return
    best = min(range(len(held_out)), key=held_out.__getitem__)
    now, rise = held_out[-1], held_out[-1] / max(held_out[best], 1e-9) - 1
    stop = "stop earlier (--load_best_model_at_end), train fewer epochs, or on more data"
    if rise > 0.03:
        yield Finding(
            "problem" if rise > 0.15 else "warning",
            "overfitting",
            f"The validation loss was best at step {steps[best]} ({held_out[best]:.3f}) and rose to {now:.3f} while "
            f"the training loss is {train:.3f}: the model memorises.",
            stop,
        )
    elif now - train > max(0.3, 0.3 * now) and _gap_grew(rows):
        yield Finding(
            "warning",
            "overfitting",
            f"The training loss is {train:.3f}, the validation loss {now:.3f}: what was learned is the training data "
            "itself, or the validation data is of another kind.",
            stop,
        )
    elif len(held_out) > 1 and now < held_out[0]:
        yield Finding("good", "generalises", f"The validation loss fell, too: {held_out[0]:.3f} to {now:.3f}.")


def _gap_grew(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether validation and training losses moved apart; with one evaluation, nobody knows better."""
    gaps, train = [], None
    for row in rows:
        train = row.get("loss", train)
        if "eval_loss" in row and train is not None:
            gaps.append(row["eval_loss"] - train)
    return len(gaps) < 2 or gaps[-1] > 1.5 * max(gaps[0], 0.05)


def _gradients(rows: Sequence[dict[str, Any]], setting: Setting) -> Iterator[Finding]:
    _, norms = series(rows, "grad_norm")
    if len(norms) < 8:
        return
    quarter = len(norms) // 4
    before, now = median(norms[quarter : 2 * quarter]), median(norms[-quarter:])
    if now > 4 * before > 0 and now > 1:
        yield Finding(
            "warning",
            "gradients_growing",
            f"The gradient norm grew from {before:.2g} to {now:.2g}, often the first sign of divergence.",
            "lower --learning_rate",
        )
    elif setting.clip and now > 10 * setting.clip:
        text = f"Gradients (norm {now:.2g}) are cut to {setting.clip:g} at every step: the step size is the clip's."
        yield Finding("note", "always_clipped", text, "that is well if the loss falls; else lower --learning_rate")


# --- experts ------------------------------------------------------------------------------------------------


def _router(rows: Sequence[dict[str, Any]], setting: Setting) -> Iterator[Finding]:
    high, low, dead = (last(rows, f"router/{name}") for name in ("load_max", "load_min", "dead"))
    if high is None or low is None:
        return
    balance = "raise router_aux_loss_coef (--model_overrides), lower --learning_rate"
    most = setting.experts / setting.chosen if setting.experts and setting.chosen else None  # all tokens, one expert
    idle = dead if dead is not None else float(low < 0.1)
    shares = f"the busiest expert gets {high:.2f} of an equal share, the idlest {low:.2f}"
    if idle >= 0.2 or (most and most > 1.5 and high > 0.85 * most):
        text = f"The router has collapsed: {idle:.0%} of the experts get next to no token ({shares})."
        yield Finding("problem", "router_collapse", text, balance)
    elif idle > 0.02:
        yield Finding("warning", "dead_experts", f"{idle:.0%} of the experts get next to no token ({shares}).", balance)
    elif high > (1 + 0.5 * (most - 1) if most else 2) and high > 1.4:
        yield Finding("warning", "router_imbalance", f"The experts are unevenly used: {shares}.", balance)
    else:
        yield Finding("good", "router_balanced", f"The experts share the work: {shares}.")
    dropped = last(rows, "router/dropped") or 0.0
    if dropped > 0.1:
        text = f"{dropped:.0%} of the tokens' places were dropped for want of capacity: no expert saw them."
        yield Finding(
            "warning", "tokens_dropped", text, "raise capacity_factor (none: drop nothing) or balance the load"
        )


# --- metrics in plain words ---------------------------------------------------------------------------------


def _explain_tokens(rows: Sequence[dict[str, Any]], setting: Setting) -> Iterator[Explained]:
    def at_end(name: str) -> float | None:
        _, values = series(rows, name)
        return values[-1] if values else None

    for name, subject in (("loss", "training data, last window"), ("eval_loss", "validation data")):
        if (value := at_end(name)) is not None:
            among = f"as unsure as choosing among {math.exp(min(value, 50)):,.1f} tokens"
            yield Explained(name, value, f"nats per token on the {subject}: on average {among}")
    if (value := at_end("eval_bits_per_byte")) is not None:
        meaning = "bits the model needs per byte of validation text, whatever the tokenizer; plain UTF-8 needs 8"
        yield Explained("eval_bits_per_byte", value, meaning)


def _explain_common(rows: Sequence[dict[str, Any]], setting: Setting) -> Iterator[Explained]:
    limit = f" of at most {math.log(setting.experts):.2f}" if setting.experts else ""
    meanings = {
        "grad_norm": "length of the gradient before clipping; sudden jumps are the ones to look at",
        "learning_rate": "at the last step",
        "loss_scale": "fp16: what losses are multiplied by; halved (and the update left out) when a gradient overflows",
        "router/load_max": "share of the busiest expert, 1 = an equal share (mean over layers)",
        "router/load_min": "share of the idlest expert",
        "router/dead": "part of the experts with less than a tenth of an equal share",
        "router/entropy": f"nats{limit}: how undecided the router is about a token",
        "router/dropped": "part of the tokens' places lost to the capacity limit",
    }
    for name, meaning in meanings.items():
        _, values = series(rows, name)
        if values:
            yield Explained(name, values[-1], meaning)
