"""What a public dataset is to us: where its files lie, what columns they have, and a pure function from a raw
row to our record. Nothing here touches the network or a file."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


class Rejected(Exception):
    """A row that cannot be used; the message is the reason under which it is counted."""


@dataclass(frozen=True)
class RowContext:
    """What a converter may know beside the row: its place in the dataset and the settings of the run."""

    path: str  # of the file inside the dataset's folder, with "/"
    index: int  # of the row in that file
    seed: int  # of the run, for choices that a converter has to draw
    thoughts: str = "keep"  # "keep" or "strip" the written-out reasoning of an answer

    @property
    def stem(self) -> str:
        """The file's name up to its first dot."""
        return self.path.rpartition("/")[2].split(".")[0]


@dataclass(frozen=True)
class Choice:
    """A part of the file paths that the user may choose, as `{config}` in `data/{config}/train-*.parquet`."""

    default: tuple[str, ...]
    known: tuple[str, ...] = ()  # empty: whatever folder is there
    folders: Mapping[str, str] = field(default_factory=dict)  # where a value is not the folder's name itself


@dataclass(frozen=True)
class Source:
    """One public dataset. `columns` maps each column that `convert` reads to the types it may have; the first
    row of every file is checked against it. `train` and `held_out` are glob patterns of files inside the
    dataset, with the places of `choices` in braces; `refused` gives the reason why a choice cannot be used."""

    repo: str
    part: str  # "pretrain", "sft" or "dpo"
    columns: dict[str, tuple[type, ...]]
    convert: Callable[[dict, RowContext], dict]
    train: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    choices: Mapping[str, Choice] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    revision: str = "main"  # a commit; "main" is resolved to one when a run begins, and reported
    default: bool = False  # taken when the user names no source
    on_hub: bool = True  # False: a file format that users bring themselves, read with --source local
    gated: bool = False
    licence: str = ""
    size: str = ""

    @property
    def name(self) -> str:
        """The repository's own name, which is also the folder's name of a local copy."""
        return self.repo.split("/")[-1]

    def patterns(self, chosen: Mapping[str, tuple[str, ...]]) -> tuple[list[str], list[str]]:
        """The `train` and `held_out` patterns with every combination of the chosen (else default) values."""
        values = [
            [choice.folders.get(value, value) for value in chosen.get(name) or choice.default]
            for name, choice in self.choices.items()
        ]
        filled = [dict(zip(self.choices, combination, strict=True)) for combination in itertools.product(*values)]
        train, held_out = (
            list(dict.fromkeys(p.format(**f) for f in filled for p in patterns))
            for patterns in (self.train, self.held_out)
        )
        return train, held_out


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def text_record(text: str | None, category: str) -> dict:
    """A pretraining document. Raises Rejected when there is no text."""
    if not (text or "").strip():
        raise Rejected("empty text")
    return {"text": text, "category": category}


def as_messages(turns: list[dict], role: str = "role", content: str = "content") -> list[dict[str, str]]:
    """Conversation turns as our messages; the field names differ between datasets (`from`/`value`).

    Raises Rejected for an unknown role, an empty turn, or an order other than (system) user assistant user …
    ending with the assistant."""
    messages: list[dict[str, str]] = []
    for turn in turns:
        if turn[role] not in ROLES:
            raise Rejected(f"unknown role {turn[role]!r}")
        text = turn[content] or ""
        if ROLES[turn[role]] == "system" and not messages and not text.strip():
            continue  # an empty system prompt says nothing; the conversation itself is sound
        if not text.strip():
            raise Rejected("empty turn")
        messages.append({"role": ROLES[turn[role]], "content": text})
    spoken = [m["role"] for m in messages if m["role"] != "system" or m is not messages[0]]
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise Rejected("turns do not alternate user, assistant")
    return messages


def question_and_answer(question: str, answer: str) -> list[dict[str, str]]:
    """One exchange as messages. Raises Rejected when either is empty."""
    return as_messages([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def sft_record(source: str, identifier: object, messages: list[dict], tools: list[dict] | None = None) -> dict:
    record = {"id": str(identifier), "source": source, "messages": messages}
    return record | {"tools": tools} if tools else record


def pair_record(source: str, identifier: object, prompt: str | list[dict], chosen: str, rejected: str) -> dict:
    """A preference pair. Raises Rejected when nothing can be learned from it."""
    texts = (chosen, rejected, prompt if isinstance(prompt, str) else prompt[-1]["content"])
    if not all(text.strip() for text in texts):
        raise Rejected("empty prompt or answer")
    if chosen.strip() == rejected.strip():
        raise Rejected("chosen and rejected are the same text")
    return {"id": str(identifier), "source": source, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def pair_from_conversations(source: str, identifier: object, chosen: list[dict], rejected: list[dict]) -> dict:
    """A pair given as two whole conversations that share everything but the last turn."""
    good, bad = as_messages(chosen), as_messages(rejected)
    if good[:-1] != bad[:-1]:
        raise Rejected("chosen and rejected answer different prompts")
    prompt = good[:-1]
    plain = prompt[0]["content"] if len(prompt) == 1 else prompt
    return pair_record(source, identifier, plain, good[-1]["content"], bad[-1]["content"])


def refuse_tied(better: object, worse: object) -> None:
    """Raise Rejected when both scores are known and the chosen answer is not the better one."""
    a, b = as_number(better), as_number(worse)
    if a is not None and b is not None and a <= b:
        raise Rejected("tied scores" if a == b else "chosen scored below rejected")


def as_number(value: Any) -> float | None:
    """A finite number from a number or a numeric string; None for anything else ("N/A", NaN, missing)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if abs(number) != float("inf") and number == number else None
