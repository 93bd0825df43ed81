"""What the curves of preference training (DPO and its relatives) say; `diagnosis` puts it together with the rest."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from smolkit.findings import Explained, Finding, Setting, last, noise, series

LN2 = math.log(2)


def judge_preferences(rows: Sequence[dict[str, Any]], setting: Setting) -> Iterator[Finding]:
    """Whether a preference was learned, and what it cost."""
    steps, margins = series(rows, "rewards/margins")
    if len(margins) < 3:
        text = f"Windows logged: {len(margins)}, too few to judge."
        yield Finding("note", "too_short", text, "train longer, or lower --logging_steps")
        return
    margin, accuracy = _last(rows, "rewards/margins"), _last(rows, "rewards/accuracies")
    chosen, rejected = _last(rows, "rewards/chosen"), _last(rows, "rewards/rejected")
    loss, pure = _last(rows, "loss"), tuple(setting.losses) == ("sigmoid",)
    count = max(1, len(margins) // 4)
    error = 3 * noise(margins) / math.sqrt(count)
    figures = f"margin {margin:+.3f}, accuracy {accuracy:.0%}"
    if pure and loss > LN2 + 0.02:
        yield Finding(
            "problem",
            "worse_than_reference",
            f"The loss is {loss:.3f}, above the ln 2 = 0.693 of the untrained model: where it errs, it errs badly "
            f"({figures}).",
            "lower --learning_rate; check that chosen and rejected are not swapped",
        )
    elif margin < -max(0.02, error):
        text = f"The model moved towards the rejected answers ({figures})."
        yield Finding(
            "problem", "wrong_way", text, "check that chosen and rejected are not swapped; lower --learning_rate"
        )
    elif margin < max(0.02, error) and accuracy < 0.65:
        yield _no_preference(rows, loss, figures, pure)
    elif accuracy >= 0.65 and margin < 0.1:
        yield Finding(
            "warning",
            "accuracy_without_margin",
            f"The order is right more often than not, but by a hair ({figures}): sampled answers will hardly change.",
            "train longer, raise --learning_rate or lower --beta",
        )
    else:
        yield Finding("good", "preference_learned", f"The model has learned to prefer the chosen answers ({figures}).")
        yield from _exploding(margins, margin, loss, accuracy, pure)
    yield from _start(rows)
    yield from _falling(rows, chosen, rejected, margin, setting)
    yield from _held_out_preferences(rows, accuracy)


def _last(rows: Sequence[dict[str, Any]], name: str) -> float:
    value = last(rows, name)
    assert value is not None, f"{name} is logged together with the margins"
    return value


def _no_preference(rows: Sequence[dict[str, Any]], loss: float, figures: str, pure: bool) -> Finding:
    _, rates = series(rows, "learning_rate")
    text = f"No preference was learned ({figures})"
    if pure and abs(loss - LN2) < 0.03:
        text += f": the loss stays at ln 2 = 0.693 ({loss:.3f}), a coin toss between the two answers"
    if rates and max(rates) == 0:
        return Finding("problem", "flat", f"{text}. The learning rate is 0.", "set --learning_rate")
    if all(row["rewards/accuracies"] == 0 == row["rewards/margins"] for row in rows if "rewards/margins" in row):
        text += ". Margin and accuracy are exactly 0: the two answers of every pair are the same text"
        return Finding("problem", "flat", f"{text}.", "make pairs whose chosen and rejected answers differ")
    remedy = (
        "if the pairs are sound, raise --learning_rate or train longer; if chosen and rejected differ at random or are "
        "the same, no setting will help"
    )
    return Finding("problem", "flat", f"{text}.", remedy)


def _start(rows: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """Policy and reference are to be the same model at first: then both rewards are 0."""
    (_, chosen), (_, rejected) = series(rows, "rewards/chosen"), series(rows, "rewards/rejected")
    if abs(chosen[0]) > 1 and abs(chosen[0]) > 2 * abs(chosen[0] - rejected[0]):
        yield Finding(
            "problem",
            "different_start",
            f"Both rewards are far from 0 at the very start ({chosen[0]:+.2f} and {rejected[0]:+.2f}): the policy did "
            "not start from its reference.",
            "give both the same fine-tuned checkpoint (--model_path, --ref_model_path)",
        )


def _exploding(margins: Sequence[float], margin: float, loss: float, accuracy: float, pure: bool) -> Iterator[Finding]:
    # At a margin of 5 the loss of a pair is 0.007: whatever is gained beyond is not preference but distance from the
    # reference. Beyond 10 answers are e^10 times as likely against each other as before.
    if margin > 10 or (pure and margin > 5 and loss < 0.01):
        yield Finding(
            "warning",
            "margins_exploding",
            f"The margin is {margin:.1f}: the pairs were told apart long before, and the model went on moving away "
            "from its reference.",
            "stop earlier, lower --learning_rate or raise --beta; read samples before you use it",
        )


def _falling(
    rows: Sequence[dict[str, Any]], chosen: float, rejected: float, margin: float, setting: Setting
) -> Iterator[Finding]:
    _, values = series(rows, "rewards/chosen")
    falls = values[0] - chosen > 3 * noise(values) / math.sqrt(max(1, len(values) // 4))
    # Half of the margin, and a reward of -0.3 (with beta 0.1: 1/20 of the reference's probability).
    if chosen < -0.3 and chosen < -0.5 * abs(margin) and rejected < 0 and falls:
        times = f" (to e^{chosen / setting.beta:.0f} of what the reference gives them)" if setting.beta else ""
        yield Finding(
            "warning",
            "both_falling",
            f"Both rewards fall: the chosen answers have become less likely, too{times}; the preference comes from "
            f"pushing the rejected ones down ({chosen:+.2f} and {rejected:+.2f}).",
            "add the likelihood of the chosen answers (--rpo_alpha 1.0), lower --learning_rate or raise --beta",
        )


def _held_out_preferences(rows: Sequence[dict[str, Any]], accuracy: float) -> Iterator[Finding]:
    steps, held_out = series(rows, "eval_rewards/accuracies")
    if not held_out:
        return
    _, losses = series(rows, "eval_loss")
    best = min(range(len(losses)), key=losses.__getitem__) if losses else 0
    if accuracy - held_out[-1] > 0.15:
        yield Finding(
            "warning",
            "overfitting",
            f"Training pairs are ordered rightly {accuracy:.0%} of the time, held-out ones {held_out[-1]:.0%}.",
            "train for less, on more pairs, or with a higher --beta",
        )
    elif losses and losses[-1] > 1.05 * losses[best] and losses[-1] - losses[best] > 0.02:
        yield Finding(
            "warning",
            "overfitting",
            f"The validation loss was best at step {steps[best]} ({losses[best]:.3f}) and rose to {losses[-1]:.3f}.",
            "stop earlier (--load_best_model_at_end)",
        )
    elif held_out[-1] >= 0.65:
        yield Finding("good", "generalises", f"Held-out pairs are ordered rightly {held_out[-1]:.0%} of the time.")


def explain_preferences(rows: Sequence[dict[str, Any]], setting: Setting) -> Iterator[Explained]:
    """The metrics that only preference training has, and its loss."""
    unit = f"; divide by beta = {setting.beta:g} for nats" if setting.beta else ""
    meanings = {
        "loss": "0.693 (ln 2) is a coin toss between the two answers, 0 certainty"
        if tuple(setting.losses) == ("sigmoid",)
        else f"sum of {' + '.join(setting.losses)}: watch its direction, not its size",
        "rewards/chosen": f"log-probability of the chosen answers against the reference, times beta{unit}; above 0: "
        "likelier than before",
        "rewards/rejected": "the same for the rejected answers; it should fall below the chosen one",
        "rewards/margins": "chosen minus rejected: how far the pair is told apart; 0 is the reference itself",
        "rewards/accuracies": "share of pairs with a positive margin; 50 % is chance",
        "logps/chosen": "log-probability of a chosen answer, summed over its tokens: long answers are lower, only "
        "changes count",
        "logps/rejected": "the same for rejected answers",
        "logits/chosen": "mean raw output over the answer's tokens; has no meaning of its own",
        "logits/rejected": "mean raw output over the answer's tokens; has no meaning of its own",
        "eval_rewards/accuracies": "share of held-out pairs with a positive margin: the figure to trust",
        "eval_rewards/margins": "margin on held-out pairs",
    }
    for name, meaning in meanings.items():
        _, values = series(rows, name)
        if values:
            yield Explained(name, values[-1], meaning)
