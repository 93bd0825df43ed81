"""What a public dataset is to us: where its files lie, what columns they have, and a pure function from a raw
row to our record. Nothing here touches the network."""

from collections.abc import Callable
from dataclasses import dataclass


class Rejected(Exception):
    """A row that cannot be used; the message is the reason under which it is counted."""


@dataclass(frozen=True)
class RowContext:
    """What a converter may know beside the row: its place in the dataset and the run's seed."""

    path: str  # of the file inside the dataset's folder, with "/"
    index: int  # of the row in that file
    seed: int  # of the run, for choices that a converter has to draw


@dataclass(frozen=True)
class Source:
    """One public dataset. `columns` maps each column that `convert` reads to the types it may have; the first
    row of every file is checked against it. `train` and `held_out` are glob patterns of files inside the
    dataset."""

    repo: str
    part: str  # "pretrain", "sft" or "dpo"
    columns: dict[str, tuple[type, ...]]
    convert: Callable[[dict, RowContext], dict]
    train: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    revision: str = "main"
    default: bool = False  # taken when the user names no source
    gated: bool = False
    licence: str = ""
    size: str = ""

    @property
    def name(self) -> str:
        """The repository's own name, which is also the folder's name of a local copy."""
        return self.repo.split("/")[-1]


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def as_messages(turns: list[dict], role: str = "role", content: str = "content") -> list[dict[str, str]]:
    """Conversation turns as our messages; the field names differ between datasets (`from`/`value`).

    Raises Rejected for an unknown role, an empty turn, or an order other than (system) user assistant user …
    ending with the assistant."""
    messages = []
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


def sft_record(source: str, identifier: object, messages: list[dict[str, str]]) -> dict:
    return {"id": str(identifier), "source": source, "messages": messages}


def pair_record(
    source: str, identifier: object, prompt: str | list[dict], chosen: str, rejected: str
) -> dict:
    """A preference pair. Raises Rejected when nothing can be learned from it."""
    texts = (chosen, rejected, prompt if isinstance(prompt, str) else prompt[-1]["content"])
    if not all(text.strip() for text in texts):
        raise Rejected("empty prompt or answer")
    if chosen.strip() == rejected.strip():
        raise Rejected("chosen and rejected are the same text")
    return {"id": str(identifier), "source": source, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def pair_from_conversations(
    source: str, identifier: object, chosen: list[dict], rejected: list[dict]
) -> dict:
    """A pair given as two whole conversations that share everything but the last turn."""
    good, bad = as_messages(chosen), as_messages(rejected)
    if good[:-1] != bad[:-1]:
        raise Rejected("chosen and rejected answer different prompts")
    prompt = good[:-1]
    plain = prompt[0]["content"] if len(prompt) == 1 else prompt
    return pair_record(source, identifier, plain, good[-1]["content"], bad[-1]["content"])
