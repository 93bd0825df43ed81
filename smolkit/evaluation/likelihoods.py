"""What log-probabilities say: text in bits per byte, pairs of answers, multiple choice."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from smolkit.chat import encode_text, render
from smolkit.checkpoints import document_end_id
from smolkit.doctor import read_pretrain
from smolkit.errors import UserError
from smolkit.evaluation.records import Record, identifiers, missing
from smolkit.evaluation.results import Results
from smolkit.evaluation.statistics import bootstrap
from smolkit.evaluation.subjects import Row, Subject, leading_ids

# --- text ---------------------------------------------------------------------------------------------------


def read_texts(path: Path, limit: int | None = None) -> list[str]:
    """What to measure of a file: a .txt as one text, of .jsonl and .parquet the first `limit` records."""
    if path.suffix != ".txt":
        return [row["text"] for row in itertools.islice(read_pretrain(path), limit)]
    try:
        return [path.read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; --text takes a UTF-8 file") from None


def text_results(subject: Subject, texts: Sequence[str], context: int | None = None) -> Results:
    """`bits_per_byte` (independent of the tokenizer) and per-token `perplexity` of texts, every token counted
    once.

    Each text starts after what came before it in training: the tokenizer's BOS where it puts one before every text,
    else the end of another document. Long ones are read in windows of `context` tokens (default: the subject's) that
    overlap by half, so that no token but the first ones is predicted from less than half a window. A text is an item:
    the intervals say how far the figures would move with other texts of the kind."""
    tokenizer = tokenizer_of(subject, "text")
    context = context or subject.context
    if context is None:
        raise UserError("the server does not say how long its context is: give --context")
    before = leading_ids(tokenizer) or [document_end_id(tokenizer)]
    rows: list[Row] = []
    owners: list[int] = []
    for owner, text in enumerate(texts):
        found = windows([*before, *encode_text(tokenizer, text)], context)
        rows += found
        owners += [owner] * len(found)
    if not rows:
        raise UserError("the text to measure is empty")
    nats, tokens = [0.0] * len(texts), [0] * len(texts)
    for owner, (_, mask), log_prob in zip(owners, rows, subject.log_probs(rows, desc="text"), strict=True):
        nats[owner] -= log_prob
        tokens[owner] += sum(mask)
    sizes = [len(text.encode("utf-8")) for text in texts]
    kept = [i for i, size in enumerate(sizes) if size]
    results = Results()
    results.add("bits_per_byte", [(f"text-{i}", (nats[i] / math.log(2), sizes[i])) for i in kept])
    perplexity = math.exp(math.fsum(nats) / sum(tokens))
    interval = None
    if len(kept) > 1 and math.isfinite(perplexity):
        low, high = bootstrap([nats[i] for i in kept], [tokens[i] for i in kept])
        interval = (math.exp(low), math.exp(high))
    results.number("perplexity", perplexity, interval)
    results.number("text_bytes", sum(sizes))
    results.number("text_tokens", sum(tokens))
    return results


def tokenizer_of(subject: Subject, what: str) -> PreTrainedTokenizerFast:
    """The subject's tokenizer, or UserError where a server was given without one."""
    if subject.tokenizer is None:
        raise UserError(f"{what} over an endpoint needs the model's tokenizer: give --tokenizer_path DIR")
    return subject.tokenizer


def windows(ids: list[int], context: int) -> list[tuple[list[int], list[int]]]:
    """Cut `ids` into (ids, mask) windows of at most `context`; every id but the first is asked for once."""
    rows, done = [], 1
    while done < len(ids):
        end = min(len(ids), context if done == 1 else done + context // 2)
        start = max(0, end - context)
        rows.append((ids[start:end], [0] * (done - start) + [1] * (end - done)))
        done = end
    return rows


# --- preferences --------------------------------------------------------------------------------------------


def preference_results(subject: Subject, pairs: Sequence[dict]) -> Results:
    """Share of pairs whose chosen answer is more likely than the rejected one, log-probabilities summed over
    the answer's tokens (the convention of DPO, Rafailov et al. 2023); a tie counts as wrong."""
    tokenizer = tokenizer_of(subject, "preferences")
    rows: list[Row] = []
    for pair in pairs:
        rows += pair_rows(tokenizer, pair)
    sums = subject.log_probs(rows, desc="preferences")
    margins = [good - bad for good, bad in zip(sums[0::2], sums[1::2], strict=True)]
    names = identifiers(list(pairs), "pair")
    results = Results()
    results.add("preference_accuracy", [(name, margin > 0) for name, margin in zip(names, margins, strict=True)])
    results.add("preference_margin", zip(names, margins, strict=True))
    return results


def pair_rows(tokenizer: PreTrainedTokenizerFast, pair: Record) -> list[Row]:
    """The conversation with the chosen and with the rejected answer as ids, the answer's to be scored."""
    prompt = render(tokenizer, pair["prompt"], tools=pair.get("tools"), add_generation_prompt=True).input_ids
    rows: list[Row] = []
    for side in ("chosen", "rejected"):
        whole = render(tokenizer, pair["prompt"] + pair[side], tools=pair.get("tools"))
        assert whole.input_ids[: len(prompt)] == prompt, "a prompt must be a prefix of its conversation"
        rows.append((whole.input_ids, [0] * len(prompt) + whole.loss_mask[len(prompt) :]))
    return rows


# --- multiple choice ----------------------------------------------------------------------------------------


def problem_of_choice(row: Record) -> str | None:
    """What is wrong with a multiple-choice row `{"id"?, "question", "choices", "answer"}`, or None."""
    if problem := missing(row, "question", "choices", "answer"):
        return problem
    choices, answer = row["choices"], row["answer"]
    if not isinstance(row["question"], str) or not row["question"].strip():
        return "question must be a text"
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        return "choices must be a list of at least two texts"
    if isinstance(answer, str):
        return None if answer in choices else f"the answer {answer!r} is none of the choices"
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        return f"answer must be a choice or its index from 0 to {len(choices) - 1}, not {answer!r}"
    return None


def choice_results(name: str, rows: Sequence[Record], subject: Subject, chat: bool = False) -> Results:
    """`NAME_acc`: the share of questions whose right choice has the highest log-probability; `NAME_acc_norm`: the same
    after dividing by the choice's length in characters. Both as lm-evaluation-harness defines them, ties going to
    the earlier choice. A choice continues the question after a space; with `chat` it is the reply to it."""
    tokenizer = tokenizer_of(subject, "multiple choice")
    sums = iter(subject.log_probs([scored for row in rows for scored in choice_rows(tokenizer, row, chat)], desc=name))
    plain, normalised = [], []
    for identifier, row in zip(identifiers(list(rows), name), rows, strict=True):
        choices = row["choices"]
        right = choices.index(row["answer"]) if isinstance(row["answer"], str) else row["answer"]
        scores = [next(sums) for _ in choices]
        by_length = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        numbers = all(map(math.isfinite, scores))  # else no choice is the best
        plain.append((identifier, numbers and scores.index(max(scores)) == right))
        normalised.append((identifier, numbers and by_length.index(max(by_length)) == right))
    results = Results()
    results.add(f"{name}_acc", plain)
    results.add(f"{name}_acc_norm", normalised)
    return results


def choice_rows(tokenizer: PreTrainedTokenizerFast, row: Record, chat: bool) -> list[Row]:
    """`choice_row` of every choice of a question."""
    return [choice_row(tokenizer, row["question"], choice, chat) for choice in row["choices"]]


def choice_row(tokenizer: PreTrainedTokenizerFast, question: str, choice: str, chat: bool) -> Row:
    """Question and choice as ids, the choice's to be scored. Like the harness, both are encoded as one text and cut
    where the question alone would end, its trailing spaces counted to the choice."""
    if chat:
        messages = [{"role": "user", "content": question}]
        context = render(tokenizer, messages, add_generation_prompt=True).input_ids
        whole = context + encode_text(tokenizer, choice)
    else:
        before = question.rstrip()
        context = leading_ids(tokenizer) + encode_text(tokenizer, before)
        whole = leading_ids(tokenizer) + encode_text(tokenizer, f"{question} {choice}")
    return whole, [0] * len(context) + [1] * (len(whole) - len(context))
