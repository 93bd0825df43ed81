"""Who is asked: any OpenAI-compatible server, through OpenAI's own client.

Conversations go to `/v1/chat/completions`, texts to `/v1/completions`. Log-probabilities are those of an echoed prompt
(`echo` with `logprobs`, as lm-evaluation-harness asks for them), sent as token ids: the tokenizer must be the model's.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import openai
from openai.types import CompletionChoice
from openai.types.chat import ChatCompletionMessage
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from smolkit.chat import encode_text
from smolkit.errors import UserError
from smolkit.evaluation.subjects import Prompt, Reply, Row, leading_ids

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
ROWS_PER_REQUEST = 8
MAX_RETRIES = 6  # of a request that the server was too busy for; the client waits longer each time


class ServedModel:
    """A server, asked by `concurrency` requests at a time."""

    def __init__(
        self,
        url: str,
        api_key: str = "none",
        model: str | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        concurrency: int = 8,
    ) -> None:
        """`url` with or without `/v1`; `model` None is the server's first. UserError where no server answers."""
        self.url = url.rstrip("/") if url.rstrip("/").endswith("/v1") else f"{url.rstrip('/')}/v1"
        self.client = openai.OpenAI(base_url=self.url, api_key=api_key, max_retries=MAX_RETRIES, timeout=600)
        self.tokenizer, self.concurrency = tokenizer, concurrency
        with self._asking():
            first = self.client.with_options(max_retries=1)  # a wrong address should not cost half a minute
            served = {card.id: card for card in first.models.list().data}
        if model is not None and served and model not in served:
            raise UserError(f"--model {model}: {self.url} serves {', '.join(served)}")
        if model is None and not served:
            raise UserError(f"{self.url} names no model: give --model")
        self.model = model or next(iter(served))
        # Not in OpenAI's API, but vLLM and we say it. An echoed prompt leaves one token to the answer.
        longest = (getattr(served.get(self.model), "model_extra", None) or {}).get("max_model_len")
        self.context: int | None = longest - 1 if isinstance(longest, int) else None

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except openai.APIConnectionError as error:
            raise UserError(f"no server answers at {self.url} ({error.__cause__ or error}); is it running?") from None
        except openai.APIStatusError as error:
            raise UserError(f"{self.url} refused: {error.message}") from None

    def _ask_all(self, ask: Callable[[_Item], _Result], items: Sequence[_Item], desc: str) -> list[_Result]:
        """`ask` of every item, in order; the first failure ends the rest."""
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            with self._asking():
                return list(tqdm(pool.map(ask, items), total=len(items), desc=desc, unit=" requests"))
        finally:
            pool.shutdown(cancel_futures=True)

    def replies(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        desc: str = "replies",
    ) -> list[Reply]:
        """See `Subject`. A reply `ended` unless the server says that it was cut off."""

        def ask(numbered: tuple[int, Prompt]) -> Reply:
            number, prompt = numbered
            options: dict[str, Any] = {"model": self.model, "max_tokens": max_new_tokens, "temperature": temperature}
            if temperature:
                options["seed"] = seed + number
            if prompt.text is not None:
                options |= {"stop": list(prompt.stop)} if prompt.stop else {}
                choice = self.client.completions.create(prompt=self._text(prompt.text), **options).choices[0]
                return Reply(choice.text.strip(), choice.finish_reason != "length")
            options |= {"tools": prompt.tools} if prompt.tools else {}
            messages: Any = prompt.messages
            answer = self.client.chat.completions.create(messages=messages, **options).choices[0]
            return Reply(reply_text(answer.message), answer.finish_reason != "length")

        return self._ask_all(ask, list(enumerate(prompts)), desc)

    def _text(self, text: str) -> str | list[int]:
        """Ids where there is a tokenizer: servers differ in what they put before a text."""
        return text if self.tokenizer is None else leading_ids(self.tokenizer) + encode_text(self.tokenizer, text)

    def log_probs(self, rows: Sequence[Row], desc: str = "scoring") -> list[float]:
        """See `Subject`; UserError where the server does not give the log-probabilities of a prompt."""
        parts = [rows[start : start + ROWS_PER_REQUEST] for start in range(0, len(rows), ROWS_PER_REQUEST)]

        def ask(part: Sequence[Row]) -> list[float]:
            options: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
            prompt = [list(ids) for ids, _ in part]
            choices = self.client.completions.create(model=self.model, prompt=prompt, **options).choices
            ordered = sorted(choices, key=lambda choice: choice.index)
            return [self._scored(choice, row) for choice, row in zip(ordered, part, strict=True)]

        return [value for values in self._ask_all(ask, parts, desc) for value in values]

    def _scored(self, choice: CompletionChoice, row: Row) -> float:
        ids, mask = row
        given = (choice.logprobs.token_logprobs if choice.logprobs else None) or []
        if len(given) < len(ids):
            raise UserError(
                f"{self.url} gave log-probabilities of {len(given)} tokens for a prompt of {len(ids)}: it does not "
                "echo prompts, which --text, --multiple_choice and --preferences need"
            )
        wanted = [value for value, counts in zip(given, mask, strict=False) if counts]
        if None in wanted:
            raise UserError(f"{self.url} gave no log-probability for a token of the prompt")
        return sum(wanted)


def reply_text(message: ChatCompletionMessage) -> str:
    """The text of a reply with its tool calls written as our template writes them, so that one judge reads both."""
    parts = [message.content.strip()] if message.content and message.content.strip() else []
    for call in message.tool_calls or []:
        if call.type != "function":
            continue
        try:
            arguments = json.dumps(json.loads(call.function.arguments), ensure_ascii=False)
        except ValueError:
            arguments = call.function.arguments  # stays broken, and is judged so
        name = json.dumps(call.function.name, ensure_ascii=False)
        parts.append(f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>')
    return "\n".join(parts)
