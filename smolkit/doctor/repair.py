"""Cleaned copies: good rows as they are, mendable rows mended, the rest aside with the reason.

Mended is only what has one obvious meaning: ShareGPT names (`conversations`, `from`/`value`, human and gpt) and
capital letters in roles become ours, two turns of one role in a row are joined, and template markers at the ends
of a text go.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolkit.doctor.checkup import MARKERS, Examiner, FileReport, readable_rows
from smolkit.doctor.rows import VALIDATION, Finding, Row, parse_line
from smolkit.errors import UserError
from smolkit.files import atomic_writer

QUARANTINE = ".quarantine"  # no data suffix, so no stage ever picks it up
_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_END_MARKERS = re.compile(rf"^(?:\s*(?:{MARKERS.pattern}))+\s*|\s*(?:(?:{MARKERS.pattern})\s*)+$")
_MESSAGES = ("messages", "prompt", "chosen", "rejected")


@dataclass
class Cleaned:
    """What became of the rows of one file."""

    path: Path
    quarantine: Path
    kept: int = 0
    mended: int = 0
    quarantined: int = 0


def clean_path(path: Path, directory: Path) -> Path:
    """Where the cleaned copy of `path` goes: `directory/<folder>/<name>.jsonl`, with `validation/` kept."""
    parent, inner = path.resolve().parent, Path()
    if parent.name == VALIDATION:
        parent, inner = parent.parent, Path(VALIDATION)
    return directory / parent.name / inner / f"{path.stem}.jsonl"


def clean(path: Path, examiner: Examiner, kind: str | None, target: Path) -> Cleaned:
    """Write the cleaned copy of a file of `kind` to `target` (.jsonl) and its quarantine file beside it.

    Rows without findings are copied byte for byte (line ends and a byte order mark aside). Both files appear
    whole or not at all.
    """
    if target.resolve() == path.resolve():
        raise UserError(f"--fix_dir would overwrite {path} — choose another directory")
    result, report = Cleaned(target, target.with_suffix(QUARANTINE)), FileReport(path, kind)
    with atomic_writer(target, "wb") as good, atomic_writer(result.quarantine) as bad:
        for number, row, written in _rows_as_written(path):
            reason = _gravest(examiner.look(number, row, report))
            better = row
            if reason is not None and not isinstance(row, Finding):
                better = mend(row)
                after = _gravest(examiner.look(number, better, FileReport(path, kind)))
                reason = after if after is None or after.code == "marker" else reason
            if reason is not None and reason.code != "marker":
                record = {"line": number, "code": reason.code, "problem": reason.text}
                record["row"] = written.decode("utf-8", "backslashreplace") if isinstance(row, Finding) else row
                bad.write(json.dumps(record, ensure_ascii=True, default=str) + "\n")
                result.quarantined += 1
            elif better != row:
                good.write(json.dumps(better, ensure_ascii=False).encode() + b"\n")
                result.mended += 1
            else:
                good.write(written + b"\n")
                result.kept += 1
    return result


def _gravest(findings: list[Finding]) -> Finding | None:
    """The finding that decides about a row: a problem, a leak, a marker, or none."""
    for code in ("problem", "leak", "marker"):
        for finding in findings:
            if code in (finding.severity, finding.code):
                return finding
    return None


def _rows_as_written(path: Path) -> Iterator[tuple[int, Row | Finding, bytes]]:
    """(number, row or the problem with it, the line to copy) for every row of a file."""
    if path.suffix != ".jsonl":
        for number, row in readable_rows(path):
            text = str(row) if isinstance(row, Finding) else json.dumps(row, ensure_ascii=False, default=str)
            yield number, row, text.encode("utf-8", "backslashreplace")
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            parsed = parse_line(path, number, line)
            if parsed is not None:
                yield number, parsed, line.rstrip(b"\r\n").removeprefix(b"\xef\xbb\xbf" if number == 1 else b"")


def mend(row: Row) -> Row:
    """The row with what has one obvious meaning put right."""
    row = dict(row)
    if "messages" not in row and isinstance(row.get("conversations"), list):
        row["messages"] = row.pop("conversations")
    for name in _MESSAGES:
        if isinstance(row.get(name), list):
            row[name] = _joined([_renamed(message) for message in row[name]])
        elif isinstance(row.get(name), str):
            row[name] = _END_MARKERS.sub("", row[name])
    if isinstance(row.get("text"), str):
        row["text"] = _END_MARKERS.sub("", row["text"])
    return row


def _renamed(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    message = dict(message)
    for ours, theirs in (("role", "from"), ("content", "value")):
        if ours not in message and theirs in message:
            message[ours] = message.pop(theirs)
    role, content = message.get("role"), message.get("content")
    if isinstance(role, str):
        name = role.strip().lower()
        message["role"] = _NAMES.get(name, name)
    if isinstance(content, str):
        message["content"] = _END_MARKERS.sub("", content)
    return message


def _joined(messages: list[Any]) -> list[Any]:
    """Neighbours of one role as one message; not tool results, and not turns that call tools."""
    joined: list[Any] = []
    for message in messages:
        before = joined[-1] if joined else None
        if (
            isinstance(before, dict)
            and isinstance(message, dict)
            and before.get("role") == message.get("role") in ("user", "assistant")
            and not before.get("tool_calls")
            and all(isinstance(each.get("content"), str) for each in (before, message))
        ):
            texts = [text for text in (before["content"], message["content"]) if text.strip()]
            joined[-1] = {**before, **message, "content": "\n\n".join(texts)}
        else:
            joined.append(message)
    return joined
