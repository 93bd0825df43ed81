"""The files of `data/<part>/`: written aside, continued after a checkpoint, given their names at the end."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from smolkit.errors import UserError
from smolkit.files import write_json

REPORT = "prepare_report.json"
PROGRESS = ".prepare_progress.json"


class Writer:
    """The two unfinished outputs of one part, their checkpoint, and their way to the final names."""

    def __init__(self, folder: Path, part: str, fingerprint: dict) -> None:
        self.folder, self.part = folder, part
        self.finals = dict(zip(("train", "held_out"), (folder / name for name in output_names(part)), strict=True))
        self.parts = {side: path.with_name(f".{path.name}.part") for side, path in self.finals.items()}
        self.progress = folder / PROGRESS
        self.fingerprint = fingerprint
        self.rows = dict.fromkeys(self.finals, 0)
        self.unsaved = 0

    def resume(self) -> list[dict] | None:
        """The states of the streams at the last checkpoint, the outputs cut back to it; None to begin afresh.
        Raises UserError when an unfinished run had other settings."""
        saved = json.loads(self.progress.read_text("utf-8")) if self.progress.exists() else None
        if saved:
            changed = [key for key, value in self.fingerprint.items() if saved["fingerprint"].get(key) != value]
            if changed:
                raise UserError(
                    f"{self.progress.parent}: an unfinished run had other settings ({', '.join(changed)}); repeat its "
                    "command to finish it, or add --restart to begin afresh"
                )
            self.rows = saved["rows"]
        self.files = {}
        for side, path in self.parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.files[side] = open(path, "r+b" if saved else "wb")
            self.files[side].truncate(saved["sizes"][side] if saved else 0)
            self.files[side].seek(0, os.SEEK_END)
        return saved and saved["streams"]

    def write(self, line: bytes, side: str) -> None:
        self.files[side].write(line)
        self.rows[side] += 1
        self.unsaved += len(line)

    def checkpoint(self, states: list[dict]) -> None:
        """Bring everything to the disk, with the states of the streams that wrote it."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {side: file.tell() for side, file in self.files.items()}
        value = {"fingerprint": self.fingerprint, "rows": self.rows, "sizes": sizes, "streams": states}
        write_json(self.progress, value)
        self.unsaved = 0

    def finish(self) -> None:
        """Give the outputs their names, and remove what else lies there of an earlier run. An empty one is not written:
        to every stage an empty file is an error."""
        self.progress.unlink(missing_ok=True)  # killed from here on, the next run begins afresh
        for side, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            if self.rows[side]:
                os.replace(self.parts[side], self.finals[side])
            else:
                self.parts[side].unlink()
                self.finals[side].unlink(missing_ok=True)
        remove_earlier(self.folder, self.part, output_names(self.part))

    def discard(self) -> None:
        for path in (*self.parts.values(), self.progress):
            path.unlink(missing_ok=True)


def output_names(part: str) -> tuple[str, str]:
    """The files of `part` with the training and the validation rows, in the folder of the part."""
    return f"{part}_data.jsonl", f"validation/{part}_data.jsonl"


def remove_earlier(folder: Path, part: str, kept: Container[str]) -> None:
    """Remove the data that an earlier run, of this kind or another, left in `folder`, but for the files in `kept`: a
    directory as --data_path would take both. Other names are the user's own files."""
    ours = re.compile(rf"{part}_data(-\d{{5,}})?\.jsonl")
    for path in [*folder.glob(f"{part}_data*.jsonl"), *folder.glob(f"validation/{part}_data*.jsonl")]:
        if ours.fullmatch(path.name) and path.relative_to(folder).as_posix() not in kept:
            path.unlink()
    if (folder / "tokens" / "manifest.json").exists():
        shutil.rmtree(folder / "tokens")


def records_of(paths: Iterable[Path]) -> Iterator[dict]:
    """The records of those of our files that exist."""
    for path in paths:
        if path.exists():
            with open(path, "rb") as file:
                yield from map(json.loads, file)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` against a second run, which would write into the same unfinished files."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{folder}: another run is writing here; wait for it or use another --output_dir") from None
    finally:
        os.close(handle)


def already_written(folder: Path, fingerprint: dict) -> bool:
    """Whether the finished output in `folder` is what this run would write."""
    report = folder / REPORT
    if not report.exists() or (folder / PROGRESS).exists():
        return False
    found = json.loads(report.read_text("utf-8"))
    files = found.get("files", {})
    same_sizes = all(
        (folder / name).exists() and (folder / name).stat().st_size == f["bytes"] for name, f in files.items()
    )
    return found.get("settings") == fingerprint and same_sizes
