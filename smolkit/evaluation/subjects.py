"""Who is asked: a checkpoint in this process. (`endpoint` asks a server; both answer the same calls.)

Replies of a checkpoint are decoded by our engine or by transformers' own `generate`, log-probabilities are one forward
pass per batch. In float32 both implementations agree token by token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from smol_model import SmolForCausalLM
from smolkit.batch import generate_batch
from smolkit.chat import chat_stop_ids, encode_text, render
from smolkit.checkpoints import build_model, load_config, merge_adapter, require_checkpoint
from smolkit.errors import UserError
from smolkit.quantize import load_quantized, quantization_of

BATCH_SIZE = 128  # sequences decoded together
LOGITS_PER_BATCH = 2**25  # 128 MiB of float32 logits at a time, whatever the vocabulary
Generate = Callable[[Sequence[Sequence[int]]], list[list[int]]]
# Token ids and, for each, whether its log-probability counts. The first one has nothing before it and cannot.
Row = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Prompt:
    """What to answer: a conversation, or a text to continue up to the first of `stop`."""

    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """A reply: its text with tool calls in `<tool_call>` tags, whether it ended by itself, its tokens with the end
    token (None: a server does not say)."""

    text: str
    ended: bool
    output_ids: list[int] | None = None


class Subject(Protocol):
    """Whoever is evaluated."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The model's; None where there is none at hand, and no log-probabilities, then."""
        ...

    @property
    def context(self) -> int | None:
        """Tokens of the longest row whose log-probabilities can be had; None where nobody says."""
        ...

    def replies(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        desc: str = "replies",
    ) -> list[Reply]:
        """A reply to every prompt, in order; greedy at temperature 0."""
        ...

    def log_probs(self, rows: Sequence[Row], desc: str = "scoring") -> list[float]:
        """For each row the log-probabilities (nats) of the ids that count, summed, each given the ids before it."""
        ...


def before_first(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first stop string in it, and whether there was one."""
    found = [position for stop in stops if (position := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


def leading_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What the tokenizer puts before every text (Llama's BOS), as lm-evaluation-harness does it."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in tokenizer("").input_ids else []


# --- a checkpoint -------------------------------------------------------------------------------------------


class LocalModel:
    """A model in this process, ours or transformers'."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch_size: int = BATCH_SIZE
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.context: int | None = model.config.max_position_embeddings
        self.stop_ids = chat_stop_ids(tokenizer, model.generation_config.eos_token_id)

    def encoded(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt."""
        if prompt.messages is not None:
            return render(self.tokenizer, prompt.messages, prompt.tools, add_generation_prompt=True).input_ids
        assert prompt.text is not None, "a prompt is a conversation or a text"
        return leading_ids(self.tokenizer) + encode_text(self.tokenizer, prompt.text)

    def replies(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        desc: str = "replies",
    ) -> list[Reply]:
        """Batches of prompts of similar length; sampled replies stay in order, which their seeds follow."""
        ids = [self.encoded(prompt) for prompt in prompts]
        order = list(range(len(prompts)))
        if not temperature:
            order.sort(key=lambda i: len(ids[i]))
        found: dict[int, Reply] = {}
        with tqdm(total=len(prompts), desc=desc, unit=" items") as progress:
            for start in range(0, len(order), 4 * self.batch_size):
                part = order[start : start + 4 * self.batch_size]
                outputs = self.generate([ids[i] for i in part], max_new_tokens, temperature, seed + start)
                for i, output in zip(part, outputs, strict=True):
                    found[i] = self.reply(prompts[i], output)
                progress.update(len(part))
        return [found[i] for i in range(len(prompts))]

    def reply(self, prompt: Prompt, output: list[int]) -> Reply:
        """New ids as a reply."""
        # Whatever the servers stop at, the end of a document included: their replies end there, and without it.
        ended = bool(output) and output[-1] in self.stop_ids
        text = str(self.tokenizer.decode(output[:-1] if ended else output, skip_special_tokens=True))
        stopped = False
        if prompt.text is not None:
            text, stopped = before_first(text, prompt.stop)
        return Reply(text.strip(), ended or stopped, list(output))

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        """New ids for prompt ids, up to and including a stop id."""
        limits = (max_new_tokens, self.batch_size, temperature, seed)
        return decoding_of(self.model)(self.model, self.tokenizer, *limits)(prompts)

    def log_probs(self, rows: Sequence[Row], desc: str = "scoring") -> list[float]:
        """See `Subject`; UserError for a row that is longer than the context."""
        longest = max((len(ids) for ids, _ in rows), default=0)
        if self.context is not None and longest > self.context:
            raise UserError(f"{desc}: {longest} tokens are more than the model's context of {self.context}; shorten it")
        return sum_log_probs(self.model, rows, self.tokenizer.pad_token_id, desc)


def load_model(
    path: Path,
    tokenizer: PreTrainedTokenizerFast,
    implementation: str = "smol",
    adapter: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """A checkpoint as `SmolForCausalLM` ("smol") or as transformers' own class ("transformers").

    An adapter is merged in memory: the same numbers as leaving it beside the weights, and faster to decode. Of an int8
    or int4 directory "smol" is what serve_hf.py computes with.
    Raises UserError when a directory is not what it should be or the tokenizer does not fit the model."""
    model: PreTrainedModel
    if quantization_of(require_checkpoint(path)) and adapter is not None:
        raise UserError(f"--adapter {adapter}: cannot be merged into the quantised weights of {path}; give its source")
    if implementation == "smol":
        config = load_config(path, tokenizer, tokenizer.name_or_path)
        if quantization_of(path):
            model = load_quantized(path, dtype, device=torch.device(device))
        else:
            model = build_model(config, path, dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            require_checkpoint(path), dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        assert type(model).__module__.startswith("transformers."), type(model)
        if len(tokenizer) > model.get_input_embeddings().get_parameter("weight").shape[0]:
            raise UserError(f"{path}: the tokenizer has {len(tokenizer)} entries, more than the model has rows")
    if adapter is not None:
        model = merge_adapter(model, adapter)
    return model.to(device).eval()  # type: ignore[arg-type]  # transformers hides its signature


# --- decoding -----------------------------------------------------------------------------------------------


def decoding_of(model: PreTrainedModel) -> Callable[..., Generate]:
    """Who decodes for a model: our engine for ours, transformers' own `generate` for theirs."""
    return engine_generate if isinstance(model, SmolForCausalLM) else transformers_generate


def engine_generate(
    model: SmolForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generate:
    """Decoding by our engine."""
    limit, stops = len(tokenizer), chat_stop_ids(tokenizer, model.generation_config.eos_token_id)

    @torch.inference_mode()
    def generate(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        check_length(model, max(map(len, prompts)), max_new_tokens)
        return generate_batch(
            model,
            prompts,
            max_new_tokens,
            stops,
            temperature,
            seed=seed,
            vocab_limit=limit,
            batch_size=batch_size,
        )

    return generate


def check_length(model: PreTrainedModel, prompt: int, max_new_tokens: int) -> None:
    """Refuse a prompt (in tokens) whose reply could run past the positions the model knows."""
    context = model.config.max_position_embeddings
    if prompt + max_new_tokens > context:
        raise UserError(
            f"a prompt of {prompt} tokens and {max_new_tokens} new ones exceed the context of {context}; "
            "lower --max_new_tokens or drop the item"
        )


def transformers_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generate:
    """Decoding by transformers' own `generate`, left-padded: an independent opinion on our engine."""
    sampling = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else {}
    stops, pad = chat_stop_ids(tokenizer, model.generation_config.eos_token_id), tokenizer.pad_token_id
    rows = model.get_output_embeddings().weight.shape[0]
    suppress = list(range(len(tokenizer), rows)) or None  # padding rows of the embedding are no tokens

    @torch.inference_mode()
    def generate(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        outputs: list[list[int]] = []
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            width = max(map(len, part))
            ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in part], device=model.device)  # (B, T)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=model.device)
            new = model.generate(  # type: ignore[operator]  # of GenerationMixin
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                **sampling or {"do_sample": False},
                num_beams=1,
                repetition_penalty=1.0,
                suppress_tokens=suppress,
                eos_token_id=stops,
                pad_token_id=pad,
            )[:, width:]
            outputs += [up_to_stop(row, stops) for row in new.tolist()]
        return outputs

    return generate


def up_to_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    """`ids` up to and including the first stop id."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids) - 1)
    return ids[: end + 1]


# --- log-probabilities ---------------------------------------------------------------------------------------


@torch.inference_mode()
def sum_log_probs(
    model: PreTrainedModel,
    rows: Sequence[Row],
    pad_id: int,
    desc: str = "scoring",
) -> list[float]:
    """For each (ids, mask): the log-probabilities (nats) of the ids whose mask is 1, summed, each given the
    ids before it. The first id of a row has nothing before it and must not be asked for."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    budget = max(1, LOGITS_PER_BATCH // vocabulary)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    sums = [0.0] * len(rows)
    with tqdm(total=len(rows), desc=desc, unit=" rows") as progress:
        while order:
            count = max(1, min(len(order), budget // len(rows[order[-1]][0])))
            part, order = order[-count:], order[:-count]
            for i, total in zip(part, batch_log_probs(model, [rows[i] for i in part], pad_id).tolist(), strict=True):
                sums[i] = total
            progress.update(len(part))
    return sums


def batch_log_probs(model: PreTrainedModel, rows: Sequence[Row], pad_id: int) -> Tensor:
    """`sum_log_probs` of one batch: (B,) in float64."""
    width = max(len(ids) for ids, _ in rows)
    fill = [width - len(ids) for ids, _ in rows]
    ids = torch.tensor([[*row, *[pad_id] * n] for (row, _), n in zip(rows, fill, strict=True)])  # (B, T)
    wanted = torch.tensor([[*mask, *[0] * n] for (_, mask), n in zip(rows, fill, strict=True)])  # (B, T)
    present = torch.tensor([[1] * (width - n) + [0] * n for n in fill])  # (B, T)
    assert not wanted[:, 0].any(), "the first token of a row has no context to be predicted from"
    ids, wanted, present = (t.to(model.device) for t in (ids, wanted, present))
    logits = model(input_ids=ids, attention_mask=present, use_cache=False).logits[:, :-1]  # (B, T-1, V)
    log_probs = -torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    ).view(ids.shape[0], -1)  # (B, T-1)
    return (log_probs.double() * wanted[:, 1:]).sum(1)
