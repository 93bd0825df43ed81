"""Reading the JSON Lines files of an evaluation: every mistake is named by file and line before a model is asked."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from smolkit.doctor import Finding, parse_line
from smolkit.errors import UserError

Record = dict[str, Any]


def read_records(path: Path, check: Callable[[Record], str | None], remedy: str) -> list[Record]:
    """The objects of a file, its lines read as the doctor reads them; `check` says what is wrong with one, or None.
    UserError with file and line, and `remedy` for a file that cannot be read."""
    records = []
    try:
        for number, record in _numbered(path):
            if problem := check(record) or _not_encodable(record):
                raise UserError(f"{path}:{number}: {problem}")
            records.append(record)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; {remedy}") from None
    if not records:
        raise UserError(f"{path}: empty; {remedy}")
    return records


def _numbered(path: Path) -> Iterator[tuple[int, Record]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            record = parse_line(path, number, line)
            if isinstance(record, Finding):
                raise record
            if record is not None:
                yield number, record


def _not_encodable(record: Record) -> str | None:
    """Half a character (`"\\ud800"` in JSON), which nobody can tokenize, send or write down, or None."""
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        return f"an unpaired surrogate, {error.object[error.start]!a}: remove it"
    return None


def missing(record: Record, *keys: str) -> str | None:
    """What is not there of `keys`."""
    absent = [key for key in keys if key not in record]
    return f"no {', '.join(absent)}" if absent else None


def identifiers(records: list[Record], prefix: str) -> list[str]:
    """The records' ids, or the prefix with their number."""
    return [str(record.get("id", f"{prefix}-{number}")) for number, record in enumerate(records)]
