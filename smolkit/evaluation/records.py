"""Reading the JSON Lines files of an evaluation: every mistake is named by file and line before a model is asked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smolkit.errors import UserError
from smolkit.files import read_lines

Record = dict[str, Any]


def read_records(path: Path, check: Callable[[Record], str | None], remedy: str) -> list[Record]:
    """The objects of a file; `check` says what is wrong with one, or None. UserError with file and line, and
    `remedy` for a file that cannot be read."""
    records = []
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; {remedy}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
        problem = check(record) if isinstance(record, dict) else "not a JSON object"
        if problem:
            raise UserError(f"{path}:{number}: {problem}")
        records.append(record)
    if not records:
        raise UserError(f"{path}: empty; {remedy}")
    return records


def missing(record: Record, *keys: str) -> str | None:
    """What is not there of `keys`."""
    absent = [key for key in keys if key not in record]
    return f"no {', '.join(absent)}" if absent else None


def identifiers(records: list[Record], prefix: str) -> list[str]:
    """The records' ids, or the prefix with their number."""
    return [str(record.get("id", f"{prefix}-{number}")) for number, record in enumerate(records)]
