"""Sample generations while a model trains (--sample_prompts): the same prompts, answered greedily each time."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from smolkit.batch import generate_batch
from smolkit.chat import chat_stop_ids, encode_text, render
from smolkit.errors import UserError
from smolkit.files import read_lines

SHOWN = 100  # characters of an answer on the terminal


@dataclass(frozen=True)
class Prompt:
    """What is shown of a prompt, and its token ids."""

    shown: str
    input_ids: list[int]


@dataclass
class Samples:
    """Prompts and how to answer them. `answer` gives the rows of `samples.jsonl`.

    `whole`: gives the complete model where `answer`'s argument is a wrapped or sharded one; called on every process,
    None on those that need not generate.
    """

    prompts: list[Prompt]
    tokenizer: PreTrainedTokenizerFast
    max_new_tokens: int
    whole: Callable[[nn.Module], nn.Module | None] = lambda model: model

    def answer(self, model: nn.Module, step: int) -> list[dict[str, Any]]:
        """Rows `{"step", "prompt", "answer", "tokens", "ended"}`, one per prompt; draws no random numbers.

        `ended`: the model wrote a token that ends a reply. An empty list on processes that do not generate.
        """
        complete = self.whole(model)
        if complete is None:
            return []
        stops = chat_stop_ids(self.tokenizer)
        with torch.no_grad():
            answers = generate_batch(
                complete,
                [prompt.input_ids for prompt in self.prompts],
                self.max_new_tokens,
                stops,
                vocab_limit=len(self.tokenizer),
            )
        return [
            {
                "step": step,
                "prompt": prompt.shown,
                "answer": self.tokenizer.decode([i for i in ids if i not in stops], skip_special_tokens=False),
                "tokens": len(ids),
                "ended": ids[-1] in stops,
            }
            for prompt, ids in zip(self.prompts, answers, strict=True)
        ]

    @staticmethod
    def line(row: dict[str, Any]) -> str:
        """A row as one line for the terminal."""
        answer = " ".join(row["answer"].split())
        cut = answer if len(answer) <= SHOWN else answer[:SHOWN] + "…"
        return f"{' '.join(row['prompt'].split())[-SHOWN:]!r} → {cut!r}"


def read_prompts(items: Sequence[str], tokenizer: PreTrainedTokenizerFast, chat: bool, room: int) -> list[Prompt]:
    """`--sample_prompts`: texts, and `.jsonl` files with rows `{"prompt": text}` or `{"messages": [...], "tools"?}`.

    `chat`: a text is what a user says, and the answer is a reply; without it, it is the beginning of a document that
    the model goes on writing. `room`: the most tokens a prompt may have. Raises `UserError` for what cannot be used.
    """
    prompts = []
    for item in items:
        if item.endswith(".jsonl"):
            rows = _rows(Path(item))
        else:
            rows = [("--sample_prompts", {"prompt": item})]
        for where, row in rows:
            prompt = _prompt(where, row, tokenizer, chat)
            if len(prompt.input_ids) > room:
                raise UserError(
                    f"{where}: the prompt has {len(prompt.input_ids)} tokens, and the model's context leaves room for "
                    f"{room} beside the answer; shorten it or lower --sample_tokens"
                )
            prompts.append(prompt)
    if not prompts:
        raise UserError(f"--sample_prompts {' '.join(items)}: no prompt in it")
    return prompts


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--sample_prompts {path}: {getattr(error, 'strerror', None) or error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(row, dict) or not ("prompt" in row or "messages" in row):
            raise UserError(f'{path}:{number}: expected {{"prompt": text}} or {{"messages": [...]}}')
        rows.append((f"{path}:{number}", row))
    return rows


def _prompt(where: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, chat: bool) -> Prompt:
    messages: Any = row.get("messages", row.get("prompt"))
    if isinstance(messages, str):
        if not messages:
            raise UserError(f"{where}: the prompt is empty")
        if not chat:
            return Prompt(messages, encode_text(tokenizer, messages))
        messages = [{"role": "user", "content": messages}]
    elif not chat:
        raise UserError(f"{where}: a conversation, but this stage continues plain text; give it as a text")
    try:
        ids = render(tokenizer, messages, row.get("tools"), add_generation_prompt=True).input_ids
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Prompt(_shown(messages), ids)


def _shown(messages: list[dict[str, Any]]) -> str:
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message.get('content') or ''}".rstrip() for message in messages)
