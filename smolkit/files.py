"""Where this toolkit keeps files, and how it writes them: aside, fsync, rename, so that none is ever half there."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def default_cache_dir() -> Path:
    """$SMOLLM_CACHE, else `smollm` in the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SMOLLM_CACHE") or Path(cache) / "smollm")


@contextmanager
def atomic_writer(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open `path` for writing under a temporary name in the same folder; it takes its name only when the
    block ends without an exception, and is removed otherwise. Text is UTF-8 with "\\n" line ends."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(aside, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk: a rename is only durable once its directory is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, without their ends.

    For JSON Lines: `str.splitlines` also splits at U+2028, U+0085 and others, which JSON leaves in texts as they are.
    """
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_writer(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
