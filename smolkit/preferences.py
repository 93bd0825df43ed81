"""What preference training keeps and counts: the reference's log-probabilities on disk, and the lengths of both sides.

A reference does not change during a run, nor between runs on the same pairs, so its two numbers per pair are kept
under a name that is a hash of everything they depend on. Another reference, tokenizer, length or pair is another name.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from smolkit.files import atomic_writer

FORMAT = 1  # of a file; part of its name
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
SIDES = ("chosen", "rejected")
MODEL_FILES = ("*.safetensors", "config.json", "adapter_config.json")
LOPSIDED = 1.5  # ratio of mean lengths from which a warning is due


def content_hash(paths: Sequence[str | Path], pairs: Dataset, **settings: Any) -> str:
    """Hash of all bytes of the model files in the directories `paths`, of the pairs' tokens and of `settings`."""
    digest = hashlib.sha256(repr((FORMAT, sorted(settings.items()))).encode())
    for directory in map(Path, paths):
        for file in sorted(file for pattern in MODEL_FILES for file in directory.glob(pattern)):
            with open(file, "rb") as handle:
                digest.update(file.name.encode() + hashlib.file_digest(handle, "sha256").digest())
    table = pairs.with_format("arrow")[:]
    for name in COLUMNS:
        digest.update(np.ascontiguousarray(pc.list_value_length(table[name]).to_numpy()).data)
        digest.update(np.ascontiguousarray(pc.list_flatten(table[name]).to_numpy()).data)
    return digest.hexdigest()[:32]


def reference_file(cache: Path, name: str) -> Path:
    return cache / "reference" / f"{name}.safetensors"


def load_reference(file: Path, count: int) -> tuple[list[float], list[float]] | None:
    """Log-probabilities of the chosen and the rejected answers of `count` pairs; None when the file is absent, damaged
    or of another size."""
    try:
        arrays = load_file(file)
        chosen, rejected = (arrays[side].tolist() for side in SIDES)
    except (OSError, SafetensorError, KeyError):
        return None
    return (chosen, rejected) if len(chosen) == len(rejected) == count else None


def save_reference(file: Path, sides: tuple[list[float], list[float]]) -> bool:
    """Keep them for later runs. False when the place cannot be written: the run goes on without."""
    arrays = {name: np.asarray(values, np.float32) for name, values in zip(SIDES, sides, strict=True)}
    try:
        with atomic_writer(file, "wb") as handle:
            handle.write(save(arrays))
    except OSError:
        return False
    return True


def side_lengths(pairs: Dataset) -> dict[str, np.ndarray]:
    """Tokens of every chosen and rejected answer, each (N,)."""
    table = pairs.with_format("arrow")[:]
    return {side: pc.list_value_length(table[f"{side}_ids"]).to_numpy() for side in SIDES}


def describe_lengths(lengths: dict[str, np.ndarray]) -> str:
    """One line on the lengths of both sides, with a warning when one is much longer: DPO then learns length
    (arXiv:2403.19159)."""
    parts = [
        f"{side} {values.mean():.0f} tokens on average (median {np.median(values):.0f}, "
        f"95 % up to {np.percentile(values, 95):.0f}, longest {values.max()})"
        for side, values in lengths.items()
    ]
    chosen, rejected = (lengths[side] for side in SIDES)
    text = f"{'; '.join(parts)}; chosen is longer in {(chosen > rejected).mean():.0%} of the pairs"
    ratio = chosen.mean() / rejected.mean()
    if max(ratio, 1 / ratio) >= LOPSIDED:
        text += (
            f"\nwarning: {SIDES[int(ratio < 1)]} answers are {max(ratio, 1 / ratio):.1f} times as long as the others: "
            "what is learned may be length. --loss_type sigmoid_norm compares log-probabilities per token"
        )
    return text
