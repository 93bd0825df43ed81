"""The model card of a run, made from what the run left on disk: settings, figures, curves, evaluation, limits.

Written when training ends; `python export.py --model_path DIR --card` writes it again, for instance after evaluation.
Nothing in it is known from elsewhere: what a run does not say (licence, languages, intended use) is left to its owner.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, metadata_load

from smol_config import SmolConfig
from smolkit.checkpoints import describe_model
from smolkit.errors import UserError
from smolkit.evaluation.results import NOT_EVALUATED, evaluation_section, model_index
from smolkit.files import atomic_writer
from smolkit.report import read_rows
from smolkit.run_report import RUN_FILES, SAMPLES, cards, read_run

CARD = "README.md"
SETTINGS = {
    "base_model": "started from",
    "model_path": "started from",
    "upcycle_from": "upcycled from the dense",
    "ref_model_path": "reference",
    "lora_r": "LoRA rank",
    "lora_alpha": "LoRA alpha",
    "lora_target": "LoRA on",
    "loss_type": "loss",
    "beta": "beta",
    "block_size": "row length, tokens",
    "max_length": "row length, tokens",
    "global_batch_size": "rows per step",
    "learning_rate": "learning rate",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warm-up, steps or share",
    "weight_decay": "weight decay",
    "adam_beta1": "Adam beta 1",
    "adam_beta2": "Adam beta 2",
    "adam_epsilon": "Adam epsilon",
    "max_grad_norm": "gradient norm limit",
    "weights": "weights in training",
    "strategy": "divided among processes by",
    "seed": "seed",
}
_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
```"""
_USE_ADAPTER = """```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoPeftModelForCausalLM.from_pretrained("{name}")
```"""


def write_card(directory: str | Path, facts: Mapping[str, Any] | None = None) -> Path:
    """Write `README.md` of a final directory and return its path; `UserError` when there is no model in it.

    facts: what the training script knows besides; None takes what it left in `training_complete.json`.
    """
    directory = Path(directory)
    text = model_card(directory, facts)
    with atomic_writer(directory / CARD) as file:
        file.write(text)
    return directory / CARD


def model_card(directory: Path, facts: Mapping[str, Any] | None = None) -> str:
    """The card as text. See `write_card`."""
    adapter = (directory / "adapter_config.json").is_file()
    if not adapter and not (directory / "config.json").is_file():
        raise UserError(f"{directory}: no model there: neither config.json nor adapter_config.json")
    left = _json(directory / "training_complete.json")
    if facts is None and not left:
        raise UserError(
            f"{directory}: no finished run of this toolkit there (no training_complete.json); "
            "what its card says now could not be said again"
        )
    facts = dict(left.get("facts", {}) if facts is None else facts)
    settings, metrics = _json(directory / "run_settings.json"), _json(directory / "eval" / "metrics.json")
    datasets = facts.pop("datasets", None) or prepared_datasets(directory)
    about = facts.pop("model", None) or describe_model(SmolConfig.from_pretrained(directory))
    name = directory.resolve().name
    head = front_matter(name, directory, about, datasets, metrics)
    sections = [
        f"---\n{head}\n---\n\n# {name}\n\n{about}.",
        "## Use\n\n" + (_USE_ADAPTER if adapter else _USE).format(name=name),
        _data(settings, datasets),
        _training(directory, settings, facts, left.get("step")),
        _samples(directory),
        evaluation_section(metrics) if metrics else "",
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits(directory, settings, datasets, metrics)),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def gguf_card(source: Path, file: str, modelfile: str) -> str:
    """The card of a repository with a GGUF file of `source` and its Modelfile: their use, then what its card says."""
    card = source / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    head = {**(metadata_load(card) or {} if text else {}), "library_name": "gguf"}
    # Without its title and its own use, and without pictures, which stay where they are.
    about = "".join(f"\n## {part}" for part in text.split("\n## ")[1:] if not part.startswith("Use\n"))
    about = "\n".join(line for line in about.split("\n") if not line.startswith("!["))
    return f"""---
{_yaml(head)}
---

# {Path(file).stem}

A GGUF file of {source.resolve().name}, for llama.cpp and what is built on it:

```bash
llama-cli -m {file}
ollama create NAME -f {modelfile}
```
{about.rstrip()}
""".replace("\n\n\n", "\n\n")


def front_matter(
    name: str, directory: Path, about: str, datasets: Sequence[str], metrics: Mapping[str, Any]
) -> str:
    """The metadata the hub reads, as YAML."""
    adapter = (directory / "adapter_config.json").is_file()
    kind = about.partition(",")[0]
    head = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[kind] + ["mixture-of-experts"] * (kind in ("mixtral", "qwen3_moe")) + ["lora"] * adapter,
        datasets=list(datasets) or None,
    ).to_dict()
    if index := model_index(metrics, name):
        head["model-index"] = index
    return _yaml(head)


def _yaml(head: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True).rstrip()


def prepared_datasets(directory: Path) -> list[str]:
    """Hub ids of the datasets behind a run's data, by the reports that prepare_datasets.py leaves beside the files."""
    found: dict[str, None] = {}
    for file in _json(directory / "run_settings.json").get("inputs", {}):
        for source in _json(Path(file).parent / "prepare_report.json").get("sources", {}).values():
            if repo := source.get("repo"):  # the user's own files have no id
                found[repo] = None
    return list(found)


# --- sections -----------------------------------------------------------------------------------------------


def _data(settings: Mapping[str, Any], datasets: Sequence[str]) -> str:
    marks = [(path, *mark.partition(":")) for path, mark in settings.get("inputs", {}).items()]
    rows = [(f"`{_shown(path)}`", f"{int(size):,}", f"`{checksum}`") for path, size, colon, checksum in marks if colon]
    if not rows:
        return ""
    text = "## Data\n\n" + table(("file", "bytes", "checksum"), rows)
    return text + (f"\n\nPrepared from {', '.join(datasets)}." if datasets else "")


def _training(directory: Path, settings: Mapping[str, Any], facts: Mapping[str, Any], step: int | None) -> str:
    rows = [(name, _shown(value)) for name, value in facts.items()]
    if step is not None and "steps" not in facts:
        rows.append(("steps", f"{step:,}"))
    rows += [
        (text, _shown(settings[name]))
        for name, text in SETTINGS.items()
        if settings.get(name) not in (None, []) and text not in facts
    ]
    figures_ = ""
    if all((directory / name).is_file() for name in RUN_FILES[:2]):
        found = [(label, value, small) for label, value, small in cards(read_run(directory))]
        figures_ = "\n\n" + table(("at the end", "", ""), found)
    if not rows and not figures_:
        return ""
    picture = "\n\n![Curves of the run](curves.png)" if (directory / "curves.png").is_file() else ""
    return "## Training\n\n" + table(("setting", "value"), rows) + figures_ + picture


def _samples(directory: Path) -> str:
    rows = read_rows(directory / SAMPLES)
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    if not last:
        return ""
    quoted = [
        (row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"], ensure_ascii=False),
         row["answer"] + ("" if row["ended"] else " …"))
        for row in last
    ]  # fmt: skip
    return f"## Samples\n\nGreedy, at step {last[0]['step']:,}.\n\n" + table(("prompt", "answer"), quoted)


def limits(
    directory: Path, settings: Mapping[str, Any], datasets: Sequence[str], metrics: Mapping[str, Any]
) -> list[str]:
    """What a reader should not expect, as far as the run's files tell."""
    lines = []
    if not metrics:
        lines.append(NOT_EVALUATED)
    if settings:
        lines.append(f"One run with seed {settings.get('seed')}; how much another seed changes is not known.")
    config = _json(directory / "config.json")
    if "max_position_embeddings" in config:
        lines.append(f"Knows {config['max_position_embeddings']:,} positions; longer texts were never seen.")
    findings = _json(directory / "diagnosis.json").get("findings", [])
    lines += [f"{finding['text'].rstrip('.')}." for finding in findings if finding["level"] in ("warning", "problem")]
    if datasets:
        lines.append("Licences and biases of the datasets above carry over; none has been checked for this model.")
    lines.append("No test for harmful output was made. The licence is for the owner to choose and to write down here.")
    return lines


# --- text ---------------------------------------------------------------------------------------------------


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars and line ends inside cells cannot break it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("\r", "").replace("\n", "<br>")


def number(value: float) -> str:
    """Four significant digits, thousands apart."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _shown(value: Any) -> str:
    if isinstance(value, str) and value.startswith("/"):
        return "/".join(value.rsplit("/", 2)[-2:])  # where it lay on the machine is nobody's business
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).removeprefix("torch.")
    return number(value)


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; nothing where there is none. `UserError` for a damaged one."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}
