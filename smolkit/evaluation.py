"""Exams and metrics: what a checkpoint answers, how sure it is, and the plain numbers that come of it.

An exam is a JSON Lines file of `{"id", "kind", "language", "messages", "tools"?, "answer", "chance"?}`.
`answer` is the exact reply (or a list of accepted replies), or `{"name", "arguments"}` for a tool call.
Replies are greedy, so that two implementations of the same weights can be compared token by token.
"""

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from smol_model import SmolForCausalLM
from smolkit.chat import chat_stop_ids, encode_text, parse_tool_calls, render
from smolkit.checkpoints import build_model, load_config, require_checkpoint
from smolkit.doctor import read_pretrain
from smolkit.engine import generate_batch
from smolkit.errors import UserError

LOGITS_PER_BATCH = 2**25  # 128 MiB of float32 logits at a time, whatever the vocabulary
Generate = Callable[[Sequence[Sequence[int]]], list[list[int]]]


# --- checkpoints --------------------------------------------------------------------------------------------


def load_model(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    implementation: str = "smol",
    adapter: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """A checkpoint as `SmolForCausalLM` ("smol") or as transformers' own class ("transformers").

    An adapter is merged in memory: the same numbers as leaving it beside the weights, and faster to decode.
    Raises UserError when a directory is not what it should be or the tokenizer does not fit the model."""
    if implementation == "smol":
        model = build_model(load_config(path, tokenizer, tokenizer.name_or_path), path, dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(require_checkpoint(path), dtype=dtype)
        assert type(model).__module__.startswith("transformers."), type(model)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            raise UserError(f"{path}: the tokenizer has {len(tokenizer)} entries, more than the model has rows")
    if adapter is not None:
        if not (adapter / "adapter_config.json").is_file():
            raise UserError(f"{adapter}: not a PEFT adapter (no adapter_config.json); train_lora.py writes one")
        from peft import PeftModel  # heavy, and only adapters need it

        try:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{adapter}: does not fit {path}: {' '.join(str(error).split())[:300]}") from error
    return model.to(device).eval()


# --- the exam -----------------------------------------------------------------------------------------------


def read_exam(path: Path, kinds: Sequence[str] | None = None, limit: int | None = None) -> list[dict]:
    """The items of an exam file, of the named kinds only, at most `limit`; each is checked."""
    items = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; `prepare_datasets.py --source tiny` writes data/exam/exam.jsonl") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
        missing = [key for key in ("id", "kind", "language", "messages", "answer") if key not in item]
        if missing or not isinstance(item["answer"], (str, list, dict)):
            problem = f"no {', '.join(missing)}" if missing else "answer must be a text, a list of texts or a call"
            raise UserError(f"{path}:{number}: exam item: {problem}")
        if kinds is None or item["kind"] in kinds:
            items.append(item)
    if not items:
        raise UserError(f"{path}: no exam item{f' of kind {kinds}' if kinds else ''}")
    return items[:limit]


@dataclass(frozen=True)
class Answer:
    """What the model replied to one item: ids, with the end token if it `ended`, and the verdicts."""

    id: str
    kind: str
    language: str
    correct: bool
    ended: bool
    text: str
    output_ids: list[int]
    verdicts: dict[str, bool]


def take_exam(
    items: list[dict], tokenizer: PreTrainedTokenizerBase, generate: Generate, chunk: int = 512
) -> list[Answer]:
    """Answer every item by `generate` (lists of prompt ids → lists of new ids), `chunk` prompts of similar
    length at a time, and judge the replies; in the order of `items`."""
    ends = chat_end_ids(tokenizer)
    prompts = [
        render(tokenizer, item["messages"], tools=item.get("tools"), add_generation_prompt=True).input_ids
        for item in items
    ]
    order = sorted(range(len(items)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    with tqdm(total=len(items), desc="exam", unit=" items") as progress:
        for start in range(0, len(order), chunk):
            part = order[start : start + chunk]
            for i, output in zip(part, generate([prompts[i] for i in part]), strict=True):
                item, ended = items[i], bool(output) and output[-1] in ends
                text = tokenizer.decode(output, skip_special_tokens=True).strip()
                verdicts = judge(item["answer"], text)
                answers[i] = Answer(
                    item["id"],
                    item["kind"],
                    item["language"],
                    verdicts["exact"],
                    ended,
                    text,
                    list(output),
                    verdicts,
                )
            progress.update(len(part))
    return [answers[i] for i in range(len(items))]


def chat_end_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that end a turn: the stop ids without the pad token, which separates documents."""
    stops = chat_stop_ids(tokenizer)
    return {i for i in stops if i != tokenizer.pad_token_id} or set(stops)


def judge(expected: str | list | dict, text: str) -> dict[str, bool]:
    """Verdicts on one reply. Text: "exact". Tool call: "parses", "right_tool", "arguments_exact", each only
    with the one before, and "exact" when there is exactly that one call and no broken one beside it."""
    if not isinstance(expected, dict):
        accepted = [expected] if isinstance(expected, str) else expected
        return {"exact": text in [answer.strip() for answer in accepted]}
    content, calls = parse_tool_calls(text)
    arguments = expected["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    parses = bool(calls)
    right_tool = parses and calls[0]["name"] == expected["name"]
    same = right_tool and canonical(calls[0]["arguments"]) == canonical(arguments)
    exact = same and len(calls) == 1 and "<tool_call>" not in content
    return {"parses": parses, "right_tool": right_tool, "arguments_exact": same, "exact": exact}


def canonical(value: object) -> str:
    """JSON in which equal values are equal texts; unlike `==`, 1 and "1", 1 and True, 1 and 1.0 differ."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def exam_metrics(items: list[dict], answers: list[Answer]) -> dict[str, float]:
    """Shares per kind and per kind and language with their counts `…_n`: `qa`, `qa_en`, `qa_en_chance`,
    `tool_exact`, `tool_parses`, `tool_exact_zh`, …, `skill`, and `ends_by_itself` over all."""
    groups: dict[str, list[tuple[dict, Answer]]] = defaultdict(list)
    for item, answer in zip(items, answers, strict=True):
        groups[item["kind"]].append((item, answer))
    metrics: dict[str, float] = {}
    for kind, group in groups.items():
        languages = sorted({item["language"] for item, _ in group})
        for suffix, wanted in [("", languages), *((f"_{language}", [language]) for language in languages)]:
            part = [(item, answer) for item, answer in group if item["language"] in wanted]
            verdicts = list(dict.fromkeys(name for _, answer in part for name in answer.verdicts))
            for verdict in verdicts:
                name = f"{kind}{suffix}" if verdicts == ["exact"] else f"{kind}_{verdict}{suffix}"
                metrics[name] = share(answer.verdicts.get(verdict, False) for _, answer in part)
                if verdict == "exact":
                    metrics[f"{name}_n"] = len(part)
            chances = [item["chance"] for item, _ in part if "chance" in item]
            if chances:
                metrics[f"{kind}{suffix}_chance"] = sum(chances) / len(chances)
    metrics["ends_by_itself"] = share(answer.ended for answer in answers)
    metrics["ends_by_itself_n"] = len(answers)
    return metrics


def share(values: Iterable[bool]) -> float:
    values = list(values)
    return sum(values) / len(values)


def same_answers(answers: list[Answer], others: list[tuple[str, list[int]]]) -> dict[str, float]:
    """Share of answers with the same token ids as in another run of the same exam: (item id, ids)."""
    if [answer.id for answer in answers] != [identifier for identifier, _ in others]:
        raise UserError(f"the other run answered other items ({len(others)}, here {len(answers)}): use the same exam")
    same = share(answer.output_ids == ids for answer, (_, ids) in zip(answers, others, strict=True))
    return {"same_greedy_answers": same, "same_greedy_answers_n": len(answers)}


def read_answers(path: Path) -> list[tuple[str, list[int]]]:
    """(item id, token ids) of an `answers.jsonl` of another run."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [(row["id"], row["output_ids"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not an answers.jsonl of eval_model.py ({error})") from None


# --- decoding -----------------------------------------------------------------------------------------------


def decoding_of(model: PreTrainedModel) -> Callable[..., Generate]:
    """Who decodes for a model: our engine for ours, transformers' own `generate` for theirs."""
    return engine_generate if isinstance(model, SmolForCausalLM) else transformers_generate


def engine_generate(
    model: SmolForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generate:
    """Decoding by our engine."""
    limit, stops = len(tokenizer), chat_stop_ids(tokenizer)

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
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generate:
    """Decoding by transformers' own `generate`, left-padded: an independent opinion on our engine."""
    sampling = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else {}
    stops, pad = chat_stop_ids(tokenizer), tokenizer.pad_token_id
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
            new = model.generate(
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


# --- likelihoods --------------------------------------------------------------------------------------------


@torch.inference_mode()
def sum_log_probs(
    model: PreTrainedModel,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
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


def batch_log_probs(model: PreTrainedModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> Tensor:
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


def preference_metrics(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[dict]
) -> dict[str, float]:
    """Share of pairs whose chosen answer is more likely than the rejected one, log-probabilities summed over
    the answer's tokens (the convention of DPO, Rafailov et al. 2023); a tie counts as wrong."""
    rows = []
    for pair in pairs:
        prompt = render(tokenizer, pair["prompt"], tools=pair.get("tools"), add_generation_prompt=True).input_ids
        for side in ("chosen", "rejected"):
            whole = render(tokenizer, pair["prompt"] + pair[side], tools=pair.get("tools"))
            assert whole.input_ids[: len(prompt)] == prompt, "a prompt must be a prefix of its conversation"
            mask = [0] * len(prompt) + whole.loss_mask[len(prompt) :]
            rows.append((whole.input_ids, mask))
    sums = sum_log_probs(model, rows, tokenizer.pad_token_id, desc="preferences")
    chosen, rejected = sums[0::2], sums[1::2]
    wins = [good > bad for good, bad in zip(chosen, rejected, strict=True)]
    margin = sum(good - bad for good, bad in zip(chosen, rejected, strict=True)) / len(wins)
    return {
        "preference_accuracy": share(wins),
        "preference_accuracy_n": len(wins),
        "preference_margin": margin,
    }


def preferred_quality(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[dict], generate: Generate
) -> tuple[dict[str, float], list[dict]]:
    """Share of sampled replies to the pairs' prompts that show the preferred quality, judged by the pairs'
    `quality` hints (`must_start_with`, `must_end_with`: one of the texts each) and by ending; and the replies
    themselves."""
    hinted = [pair for pair in pairs if pair.get("quality")]
    if not hinted:
        return {}, []
    prompts = [
        render(tokenizer, pair["prompt"], tools=pair.get("tools"), add_generation_prompt=True).input_ids
        for pair in hinted
    ]
    ends, samples = chat_end_ids(tokenizer), []
    for pair, output in zip(hinted, generate(prompts), strict=True):
        text = tokenizer.decode(output, skip_special_tokens=True).strip()
        ended = bool(output) and output[-1] in ends
        samples.append({"id": pair.get("id"), "text": text, "preferred": ended and shows(pair["quality"], text)})
    quality = share(sample["preferred"] for sample in samples)
    return {"preferred_quality": quality, "preferred_quality_n": len(samples)}, samples


def shows(quality: dict, text: str) -> bool:
    """Whether `text` starts and ends with one of the texts that `quality` asks for."""
    starts, ends = quality.get("must_start_with"), quality.get("must_end_with")
    return (not starts or text.startswith(tuple(starts))) and (not ends or text.endswith(tuple(ends)))


# --- text ---------------------------------------------------------------------------------------------------


def read_texts(path: Path, limit: int | None = None) -> list[str]:
    """What to measure of a file: a .txt as one text, of .jsonl and .parquet the first `limit` records."""
    if path.suffix != ".txt":
        return [row["text"] for row in itertools.islice(read_pretrain(path), limit)]
    try:
        return [path.read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; --text takes a UTF-8 file") from None


def text_metrics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    context: int | None = None,
) -> dict[str, float]:
    """`bits_per_byte` (independent of the tokenizer) and per-token `perplexity` of texts, every token counted
    once.

    Each text starts after the document separator; long ones are read in windows of `context` tokens (default:
    the model's) that overlap by half, so that no token but the first ones is predicted from less than half a
    window."""
    context = context or model.config.max_position_embeddings
    separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.pad_token_id
    rows, size = [], 0
    for text in texts:
        size += len(text.encode("utf-8"))
        ids = [separator, *encode_text(tokenizer, text)]
        rows += windows(ids, context)
    scored = sum(sum(mask) for _, mask in rows)
    if not scored:
        raise UserError("the text to measure is empty")
    nats = -math.fsum(sum_log_probs(model, rows, tokenizer.pad_token_id, desc="text"))
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "perplexity": math.exp(nats / scored),
        "text_bytes": size,
        "text_tokens": scored,
    }


def windows(ids: list[int], context: int) -> list[tuple[list[int], list[int]]]:
    """Cut `ids` into (ids, mask) windows of at most `context`; every id but the first is asked for once."""
    rows, done = [], 1
    while done < len(ids):
        end = min(len(ids), context if done == 1 else done + context // 2)
        start = max(0, end - context)
        rows.append((ids[start:end], [0] * (done - start) + [1] * (end - done)))
        done = end
    return rows
