"""Tasks of lm-evaluation-harness (Gao et al.), on a checkpoint or an endpoint.

A checkpoint is run by the harness's own `hf` backend on transformers' class, an endpoint by `local-completions`, or by
`local-chat-completions` for conversations, which has no log-probabilities. Figures are called `TASK_METRIC`, with the
filter where a task has several (`gsm8k_exact_match_strict-match`), and have the harness's own documents as items.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from smolkit.checkpoints import require_checkpoint
from smolkit.errors import UserError
from smolkit.evaluation.endpoint import ServedModel
from smolkit.evaluation.results import Results, Value, fraction
from smolkit.evaluation.subjects import BATCH_SIZE

LOGITS_PER_BATCH = 2**28  # 1 GiB in float32
LONG = 1024  # tokens: few documents of the usual tasks have more
INSTALL = "pip install -r requirements-eval.txt"


@dataclass(frozen=True)
class HarnessTasks:
    """What to run: task names, at most `limit` documents of each, local task files, and how to ask."""

    tasks: Sequence[str]
    limit: int | None = None
    include_path: Path | None = None
    num_fewshot: int | None = None
    chat: bool = False


def require_harness() -> None:
    """UserError where the package is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError(f"--lm_eval needs lm-evaluation-harness: {INSTALL}")


def backend_of_checkpoint(
    model_path: Path, tokenizer_path: Path, adapter: Path | None, dtype: str, device: str
) -> tuple[str, dict[str, Any]]:
    """The harness's backend for a checkpoint directory, and its arguments."""
    arguments: dict[str, Any] = {"pretrained": str(model_path), "tokenizer": str(tokenizer_path)}
    arguments |= {"dtype": dtype, "device": device}
    return "hf", arguments | ({"peft": str(adapter)} if adapter else {})


def backend_of_endpoint(endpoint: ServedModel, tokenizer_path: Path | None, chat: bool) -> tuple[str, dict[str, Any]]:
    """The harness's backend for a server, and its arguments."""
    arguments: dict[str, Any] = {
        "model": endpoint.model,
        "header": {"Authorization": f"Bearer {endpoint.client.api_key}"},
        "num_concurrent": endpoint.concurrency,
    }
    if chat:
        return "local-chat-completions", arguments | {"base_url": f"{endpoint.url}/chat/completions"}
    if tokenizer_path is None:
        raise UserError("--lm_eval over an endpoint needs the model's tokenizer: give --tokenizer_path DIR (or --chat)")
    arguments |= {"tokenizer": str(tokenizer_path), "tokenizer_backend": "huggingface"}
    # the backend itself keeps one token for the answer
    arguments |= {"max_length": endpoint.context + 1} if endpoint.context else {}
    return "local-completions", arguments | {"base_url": f"{endpoint.url}/completions"}


def default_batch_size(model_path: Path) -> int:
    """Rows at a time: at most BATCH_SIZE, and not more than keep the logits of documents of LONG tokens within
    LOGITS_PER_BATCH (the harness holds those of a whole batch, twice)."""
    config = AutoConfig.from_pretrained(require_checkpoint(model_path))
    row = config.vocab_size * min(LONG, config.max_position_embeddings)
    return max(1, min(BATCH_SIZE, LOGITS_PER_BATCH // row))


def harness_results(wanted: HarnessTasks, backend: str, arguments: Mapping[str, Any], batch_size: int) -> Results:
    """Run the tasks. UserError for a task that is not known or whose data cannot be had."""
    require_harness()
    from lm_eval import simple_evaluate

    manager = task_manager(wanted)
    try:
        content = simple_evaluate(
            model=backend,
            model_args=dict(arguments),
            tasks=list(wanted.tasks),
            num_fewshot=wanted.num_fewshot,
            batch_size=batch_size,
            limit=wanted.limit,
            bootstrap_iters=0,  # intervals are made from the items, as everywhere else
            task_manager=manager,
            apply_chat_template=wanted.chat,
        )
    except (OSError, ValueError, NotImplementedError) as error:  # no data or server; no such option
        problem = " ".join(str(error).split())[:300]
        raise UserError(f"--lm_eval {','.join(wanted.tasks)}: {problem}") from error
    return results_of(content)


def task_manager(wanted: HarnessTasks) -> Any:
    """The harness's index of tasks: of the given directory alone where it has them all, because reading the thousands
    of files that the package brings takes seconds. UserError for a task that is in neither."""
    from lm_eval.tasks import TaskManager

    path = str(wanted.include_path) if wanted.include_path else None
    for defaults in (False, True):
        manager = TaskManager(include_path=path, include_defaults=defaults)
        unknown = [task for task in wanted.tasks if not manager.match_tasks([task])]
        if not unknown:
            return manager
    raise UserError(f"--lm_eval {unknown[0]}: no such task in lm-evaluation-harness or --lm_eval_include_path")


def results_of(content: Mapping[str, Any]) -> Results:
    """The figures of the harness's result: made of its samples where the figure is the mean of them, else as it is."""
    results = Results()
    for task, figures in content["results"].items():
        for key, value in figures.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue  # the alias, the number of samples, errors of the mean
            name = f"{task}_{metric}" if chosen == "none" else f"{task}_{metric}_{chosen}"
            items = sample_values(content.get("samples", {}).get(task, []), task, metric, chosen)
            if items and abs(sum(fraction(item)[0] for _, item in items) / len(items) - value) < 1e-9:
                results.add(name, items)
            else:
                results.number(name, float(value))
    return results


def sample_values(samples: Sequence[Mapping[str, Any]], task: str, metric: str, chosen: str) -> list[tuple[str, Value]]:
    """(item id, value) of the documents of a task for one metric and filter; empty where they are no numbers."""
    mine = [sample for sample in samples if sample.get("filter", "none") == chosen and metric in sample]
    values = [sample[metric] for sample in mine]
    if not all(isinstance(value, (bool, int, float)) for value in values):
        return []
    if all(value in (0, 1) for value in values):
        values = [bool(value) for value in values]
    return [(f"{task}-{sample['doc_id']}", value) for sample, value in zip(mine, values, strict=True)]
