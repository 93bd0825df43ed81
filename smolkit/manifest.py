"""Checkpoints as directories on disk: sealed with a manifest, checked before use, rotated.

A sealed `checkpoint-N/` holds `checkpoint_manifest.json`, written last: size and SHA-256 of every other file in it,
whichever engine wrote them. A directory without one, or that differs from it, is not continued from.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from smolkit.files import sync, write_json

MANIFEST = "checkpoint_manifest.json"
_CHUNK = 8 * 2**20


def seal(directory: Path, **facts: Any) -> None:
    """Bring the files of `directory` to the disk and write its manifest, with `facts` beside the list of files."""
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST):
        sync(path)
        files[path.relative_to(directory).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    for folder in (path for path in directory.rglob("*") if path.is_dir()):
        sync(folder)
    write_json(directory / MANIFEST, {**facts, "files": files})
    sync(directory)


def problem(directory: Path) -> str | None:
    """Why `directory` is not a whole checkpoint to continue from, or None. Reads every file."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was not written to its end, or by another tool"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} is unreadable ({type(error).__name__})"
    if not manifest.get("resumable", True):
        return "it holds weights only (--save_only_model), no optimizer to continue with"
    for name, (size, sha256) in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes where the manifest says {size:,}"
        if _sha256(path) != sha256:
            return f"{name} is not what was written: its SHA-256 is not that of the manifest"
    return None


def checkpoints(directory: Path) -> list[Path]:
    """`checkpoint-N` directories, oldest first."""
    return sorted((path for path in directory.glob("checkpoint-*") if has_step(path) and path.is_dir()), key=step_of)


def has_step(checkpoint: Path) -> bool:
    """Whether it is called `checkpoint-N`."""
    return re.fullmatch(r"checkpoint-\d+", checkpoint.name) is not None


def step_of(checkpoint: Path) -> int:
    """N of `checkpoint-N` (see `has_step`)."""
    return int(checkpoint.name.rpartition("-")[2])


def newest_whole(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and one line for each newer one that is not."""
    skipped: list[str] = []
    for checkpoint in reversed(checkpoints(directory)):
        reason = problem(checkpoint)
        if reason is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint}: {reason}")
    return None, skipped


def rotate(directory: Path, keep_last: int | None, keep_every: int, best: str | None) -> None:
    """Delete all but the newest `keep_last` checkpoints (None, 0 or less: keep all), those at multiples of `keep_every`
    steps (0: none), and `best`."""
    found = checkpoints(directory)
    for checkpoint in found[: -keep_last if keep_last and keep_last > 0 else 0]:
        milestone = keep_every and step_of(checkpoint) % keep_every == 0
        if not milestone and (best is None or checkpoint.name != Path(best).name):
            discard(checkpoint)


def discard(directory: Path) -> None:
    """Delete a directory that never looks half deleted under its own name."""
    hidden = directory.with_name(f".old-{directory.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(directory, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def clear_remains(directory: Path) -> None:
    """Delete what a run that was killed while saving or deleting left in `directory`."""
    for pattern in (".old-*", ".writing*"):
        for remains in directory.glob(pattern):
            shutil.rmtree(remains, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
