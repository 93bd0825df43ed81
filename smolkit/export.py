"""Taking a final directory elsewhere: another dtype or a merged adapter, GGUF, fewer bits, the Hugging Face hub."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from smolkit.adapters import write_merged
from smolkit.checkpoints import build_model, load_config, load_tokenizer, plain_card, require_checkpoint, save_final
from smolkit.errors import UserError
from smolkit.files import atomic_writer
from smolkit.gguf_file import write_gguf
from smolkit.ollama import modelfile

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# What of a directory belongs to the model; checkpoints, optimizer state and logs stay at home.
FINAL_FILES = (
    "README.md config.json generation_config.json *.safetensors *.safetensors.index.json tokenizer.json "
    "tokenizer_config.json tokenizer.model vocab.json merges.txt special_tokens_map.json added_tokens.json "
    "chat_template.jinja adapter_config.json curves.png eval/metrics.json LICENSE"
).split()


def export_native(source: Path, target: Path, dtype: str, adapter: Path | None = None) -> str:
    """Write the checkpoint `source` in another dtype (f32, f16, bf16), `adapter` merged into it, to a new directory.

    Sums are made in float32. Returns a line about it; `UserError` for a directory that is in use.
    """
    require_new(target)
    tokenizer = load_tokenizer(require_checkpoint(source))
    config = load_config(source, tokenizer, source)
    if adapter is not None:
        write_merged(target, source, adapter, config, tokenizer, DTYPES[dtype])
    else:
        model = build_model(config, source, torch.float32)
        card = plain_card(target.name, config, {"converted from": source, "dtype": dtype})
        save_final(model, dict(model.named_parameters()), tokenizer, target, DTYPES[dtype], card)
    return f"{target}: {dtype}, {sum(path.stat().st_size for path in target.glob('*.safetensors')) / 2**20:,.1f} MiB"


def export_gguf(source: Path, target: Path, dtype: str, adapter: Path | None = None) -> str:
    """Write the GGUF file `target` (f32, f16, bf16, q8_0) and its `modelfile_of` for Ollama; returns what to say."""
    with merged(source, adapter, target) as directory:
        report = write_gguf(directory, target, dtype, title=(adapter or source).resolve().name)
        tokenizer = load_tokenizer(directory)
        settings = directory / "generation_config.json"
        generation = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        config = load_config(directory, tokenizer, directory)
        text = modelfile(target, tokenizer, config.max_position_embeddings, generation)
    place = modelfile_of(target)
    with atomic_writer(place) as file:
        file.write(text)
    return f"{report}\n{place}: ollama create NAME -f {place}"


def modelfile_of(target: Path) -> Path:
    """`Modelfile` beside a GGUF file, or `NAME.Modelfile` where another GGUF file of the folder has that one."""
    common = target.parent / "Modelfile"
    if not common.exists() or common.read_text(encoding="utf-8").startswith(f"FROM ./{target.name}\n"):
        return common
    return target.with_suffix(".Modelfile")


def export_compressed(source: Path, target: Path, bits: int, adapter: Path | None = None) -> str:
    """Write a compressed-tensors checkpoint of 8 or 4 bits to a new directory; returns a line about it."""
    from smolkit.quantize import describe_report, quantize  # heavy, and only this needs it

    require_new(target)
    with merged(source, adapter, target) as directory:
        quantize(directory, target, f"int{bits}", f"{source} + {adapter}" if adapter else None)
    return describe_report(target)


@contextmanager
def merged(source: Path, adapter: Path | None, beside: Path) -> Iterator[Path]:
    """`source`, or for the length of the block a directory beside `beside` with `adapter` merged into it in float32."""
    require_checkpoint(source)
    if adapter is None:
        yield source
        return
    beside.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside.parent, prefix=f".{beside.name}-merged-") as directory:
        whole = Path(directory) / "model"
        export_native(source, whole, "f32", adapter)
        yield whole


def require_new(target: Path) -> None:
    """`UserError` unless `target` is absent or an empty directory."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--output {target} is in use; remove it or choose another directory")


# --- the hub ------------------------------------------------------------------------------------------------


def final_files(directory: Path) -> list[str]:
    """The files of a final directory that others need, by name; never those of checkpoints."""
    found = {path for pattern in FINAL_FILES for path in directory.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(directory).as_posix() for path in found)


def push_to_hub(directory: Path, repo: str, private: bool, files: Sequence[str] = (), card: str | None = None) -> str:
    """Upload a final directory, or only `files` of it with another `card`, to a model repository; returns its address.

    `UserError` without a token, for a name the hub refuses, and when the hub does not answer.
    """
    files = list(files) or final_files(directory)
    if not any(name.endswith((".safetensors", ".gguf")) for name in files):
        raise UserError(f"{directory}: no safetensors in it, nothing to upload")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError("--push_to_hub: HF_HUB_OFFLINE is set; unset it to upload")
    if huggingface_hub.get_token() is None:
        raise UserError("--push_to_hub: no token of the hub; run `hf auth login` or set HF_TOKEN")
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        parts: dict[str, Path | bytes] = {name: directory / name for name in files}
        if card is not None:
            parts["README.md"] = card.encode()
        operations = [huggingface_hub.CommitOperationAdd(name, part) for name, part in parts.items()]
        api.create_commit(address.repo_id, operations, commit_message="Upload model")
    except (HTTPError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"--push_to_hub {repo}: {' '.join(str(error).split())}") from error
    return f"{address} ({len(parts)} files)"
