"""Reading and judging rows: every stage reads its data through here, and errors name file and line.

Formats: `.jsonl` (one JSON object per line), `.parquet` (columns with the same names) and, for pretraining,
`.txt`.

Plain text has no record structure, so `.txt` is read as running text: a line that holds only `<|endoftext|>`
ends a document, and without such lines consecutive paragraphs stay together (they belong to each other) until
a document has `TEXT_DOCUMENT_CHARACTERS` characters; it then ends at the next blank line, or after four times
that size at the next line end. Concatenating the documents with the cut lines gives the file back; only line
ends are normalised.
"""

import glob
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from smolkit.chat import END_OF_TEXT, validate_messages, validate_tools
from smolkit.errors import UserError

Row = dict[str, Any]
T = TypeVar("T")
RECORD_SUFFIXES = (".jsonl", ".parquet")
PRETRAIN_SUFFIXES = (".jsonl", ".txt", ".parquet")
TEXT_DOCUMENT_CHARACTERS = 20_000
VALIDATION = "validation"


class Finding(UserError):
    """Something about one row: `path:line: what — remedy`. Readers raise the ones that are problems.

    `line` counts lines (rows in parquet, a document's first line in .txt) from 1. A "problem" keeps the row out
    of training, a "warning" does not.
    """

    def __init__(self, path: Path, line: int, code: str, text: str, severity: str = "problem") -> None:
        super().__init__(f"{path}:{line}: {text}", code)
        self.path, self.line, self.text, self.severity = path, line, text, severity
        self.what, _, self.remedy = text.rpartition(" — ")  # the last dash: quoted data may have others

    def __reduce__(self) -> tuple:  # worker processes hand it over to their parent
        return Finding, (self.path, self.line, self.code, self.text, self.severity)

    def as_json(self) -> dict[str, Any]:
        """The finding for machines."""
        names = ("line", "code", "severity", "what", "remedy")
        return {"path": str(self.path), **{name: getattr(self, name) for name in names}}


# --- finding files ------------------------------------------------------------------------------------------


def expand_paths(spec: str | Path | Sequence[str | Path], suffixes: Sequence[str]) -> list[Path]:
    """Files meant by one or several files, directories (searched recursively) or glob patterns, sorted per
    entry.

    Folders called `validation` are left out unless the entry itself names one, so held-out rows are never
    trained on by accident; hidden files are left out too. Raises `UserError` when an entry matches nothing or
    a named file has another suffix than `suffixes`.
    """
    entries = [spec] if isinstance(spec, (str, Path)) else list(spec)
    if not entries:
        raise UserError("no data path given")
    found: dict[Path, None] = {}
    for entry in entries:
        found.update(dict.fromkeys(_expand(str(entry), tuple(suffixes))))
    return list(found)


def _expand(entry: str, suffixes: tuple[str, ...]) -> list[Path]:
    path, kinds = Path(entry), ", ".join(suffixes)
    files: Iterable[Path]
    if path.is_file():
        if path.suffix not in suffixes:
            raise UserError(f"{path}: unsupported file type {path.suffix or '(none)'} — expected {kinds}")
        return [path]
    if path.is_dir():
        root, files = path, path.rglob("*")
    elif glob.has_magic(entry):
        # What comes before the first wildcard was typed on purpose, so only the rest is searched for
        # `validation`.
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
        root, files = Path(*fixed), map(Path, glob.glob(entry, recursive=True))
    else:
        raise UserError(f"{entry}: no such file or directory")
    named = VALIDATION in path.parts[len(root.parts) :]
    matches = []
    for file in files:
        inner = file.relative_to(root).parts
        skipped = (VALIDATION in inner and not named) or any(
            part.startswith(".") and part != ".." for part in inner
        )
        if file.suffix in suffixes and not skipped and file.is_file():
            matches.append(file)
    if not matches:
        raise UserError(f"{entry}: no {kinds} file found there")
    return sorted(matches)


def validation_path(path: str | Path) -> Path | None:
    """The held-out twin of a training file (`validation/` beside it, same name) or directory, or None."""
    path = Path(path)
    twin = path / VALIDATION if path.is_dir() else path.parent / VALIDATION / path.name
    return twin if twin.exists() else None


# --- reading rows -------------------------------------------------------------------------------------------


def read_pretrain(spec: str | Path | Sequence[str | Path]) -> Iterator[Row]:
    """Rows `{"text", ...}` of .jsonl, .txt and .parquet files; `UserError` at the first bad row."""
    return _checked(expand_paths(spec, PRETRAIN_SUFFIXES), check_pretrain)


def read_sft(spec: str | Path | Sequence[str | Path]) -> Iterator[Row]:
    """Conversations `{"messages", "tools"?, ...}`; `UserError` at the first bad row."""
    return _checked(expand_paths(spec, RECORD_SUFFIXES), check_sft)


def read_dpo(spec: str | Path | Sequence[str | Path]) -> Iterator[Row]:
    """Preference pairs with `prompt`, `chosen` and `rejected` as message lists (other keys kept, chosen and
    rejected without the prompt); `UserError` at the first bad row."""
    return _checked(expand_paths(spec, RECORD_SUFFIXES), check_dpo)


def read_texts(spec: str | Path | Sequence[str | Path]) -> Iterator[list[str]]:
    """The text of each row of any kind (document; messages, tools, calls): what a tokenizer learns from."""
    return _checked(expand_paths(spec, PRETRAIN_SUFFIXES), _texts)


def _texts(row: Row) -> list[str]:
    kind = kind_of(row)
    if kind == "exam":
        raise UserError("an exam item is no training text — leave the exam file out", "exam")
    row = CHECKS[kind](row)
    if kind == "pretrain":
        return [row["text"]]
    messages = row["messages"] if kind == "sft" else row["prompt"] + row["chosen"] + row["rejected"]
    texts = [f"{message['role']}\n{message.get('content') or ''}" for message in messages]
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    return texts + [json.dumps(item, ensure_ascii=False) for item in calls + (row.get("tools") or [])]


def _checked(paths: Iterable[Path], check: Callable[[Row], T]) -> Iterator[T]:
    for path in paths:
        empty = True
        for _, row in judged_rows(path, check):
            if isinstance(row, Finding):
                raise row
            empty = False
            yield row
        if empty:
            raise UserError(f"{path}: the file has no rows — remove it or fill it")


def judged_rows(path: Path, check: Callable[[Row], T]) -> Iterator[tuple[int, T | Finding]]:
    """(line or row number from 1, `check(row)` or the problem with the row) for every row of one file."""
    for number, row in raw_rows(path):
        yield number, row if isinstance(row, Finding) else judge(path, number, row, check)


def judge(path: Path, number: int, row: Row, check: Callable[[Row], T]) -> T | Finding:
    """`check(row)`, or the problem with the row."""
    try:
        return check(row)
    except UserError as error:
        return Finding(path, number, error.code, str(error))


def raw_rows(path: Path) -> Iterator[tuple[int, Row | Finding]]:
    """(line or row number from 1, the row as read or the problem with reading it); blank lines are no rows."""
    readers = {".jsonl": _jsonl_rows, ".txt": _text_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise UserError(
            f"{path}: unsupported file type {path.suffix or '(none)'} — expected {', '.join(readers)}"
        )
    try:
        yield from readers[path.suffix](path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str | Finding]]:
    """Numbered lines decoded as UTF-8, without line ends and byte order mark."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, _decoded(path, number, line)


def _decoded(path: Path, number: int, line: bytes) -> str | Finding:
    try:
        text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        text = f"byte {error.start} is not UTF-8 — convert the file to UTF-8"
        return Finding(path, number, "not_utf8", text)
    return text.removeprefix("\ufeff") if number == 1 else text


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row | Finding]]:
    for number, line in _lines(path):
        if isinstance(line, Finding):
            yield number, line
        elif line and not line.isspace():
            yield number, _parsed(path, number, line)


def parse_line(path: Path, number: int, line: bytes) -> Row | Finding | None:
    """One line of a .jsonl file as a row, as the problem with it, or None when it is blank."""
    text = _decoded(path, number, line)
    if isinstance(text, Finding):
        return text
    return _parsed(path, number, text) if text and not text.isspace() else None


def _parsed(path: Path, number: int, line: str) -> Row | Finding:
    remedy = "every line must be one complete JSON object"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Finding(path, number, "not_json", f"not valid JSON ({error}) — {remedy}")
    if isinstance(row, dict):
        return row
    return Finding(path, number, "not_json", f"expected a JSON object, got {type(row).__name__} — {remedy}")


def _text_rows(path: Path) -> Iterator[tuple[int, Row | Finding]]:
    first, size, lines = 1, 0, []
    for number, line in _lines(path):
        if isinstance(line, Finding):
            yield number, line
            continue
        blank = not line or line.isspace()
        separator = line.strip() == END_OF_TEXT
        if not separator:
            lines.append(line)
            size += len(line) + 1
        if separator or size >= (TEXT_DOCUMENT_CHARACTERS if blank else 4 * TEXT_DOCUMENT_CHARACTERS):
            if any(text.strip() for text in lines):
                yield first, {"text": "\n".join(lines) + "\n"}
            first, size, lines = number + 1, 0, []
    if any(text.strip() for text in lines):
        yield first, {"text": "\n".join(lines) + "\n"}


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row | Finding]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: unreadable parquet after row {number}: {reason} — fetch the file again"
        ) from error


# --- judging rows -------------------------------------------------------------------------------------------


def check_pretrain(row: Row) -> Row:
    """The row, if `text` is a non-empty string; else `UserError` (without file and line)."""
    text = _field(row, "text")
    if not isinstance(text, str):
        raise UserError(f"'text' must be a string, got {type(text).__name__} — convert or remove the row", "field")
    if not text.strip():
        raise UserError("'text' is empty — remove the row", "empty_text")
    _check_encodable(text)
    return row


def check_sft(row: Row) -> Row:
    """The row, if its conversation can be trained on; else `UserError` (without file and line)."""
    messages = _field(row, "messages")
    validate_messages(messages)
    if row.get("tools") is not None:
        validate_tools(row["tools"])
    _check_order(messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError("no assistant message, so nothing to learn — remove the row", "empty_mask")
    return row


def check_dpo(row: Row) -> Row:
    """The row with message lists, prompt apart from answers; else `UserError` (without file and line)."""
    prompt = _field(row, "prompt")
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    validate_messages(prompt)
    if prompt[-1]["role"] not in ("user", "tool"):
        text = "'prompt' must end with a user or tool message — move the answer into 'chosen' and 'rejected'"
        raise UserError(text, "order")
    if row.get("tools") is not None:
        validate_tools(row["tools"])
    answers = {name: _answer(_field(row, name), name, prompt) for name in ("chosen", "rejected")}
    if _essence(answers["chosen"]) == _essence(answers["rejected"]):
        text = "'chosen' and 'rejected' are the same, so there is no preference — remove the pair"
        raise UserError(text, "no_preference")
    return {**row, "prompt": prompt, **answers}


def check_exam(row: Row) -> Row:
    """The row, if it asks something and names what is wanted; else `UserError` (without file and line).

    An exam needs more (`id`, `kind`, `language`), for which eval_model.py asks: a task of its --generation is such a
    row, too."""
    check_question(row)
    wanted_calls(_field(row, "answer"))
    return row


def check_question(row: Row) -> None:
    """`UserError` unless `messages` is a conversation that waits for a reply, and `tools`, if any, are tools."""
    messages = _field(row, "messages")
    validate_messages(messages)
    if messages[-1]["role"] not in ("user", "tool"):
        text = "'messages' must end with the question, a user or tool message — move the answer into 'answer'"
        raise UserError(text, "order")
    if row.get("tools") is not None:
        validate_tools(row["tools"])


def wanted_calls(answer: Any) -> list[Row]:
    """The calls `{"name", "arguments": dict}` of an `answer` that is one, or a list of all that are wanted, in their
    order; none where it is a text or a list of accepted ones. `UserError` for anything else."""
    each = answer if isinstance(answer, list) else [answer]
    if each and all(isinstance(one, dict) for one in each):
        return [_wanted_call(one) for one in each]
    if not each or not all(isinstance(one, str) and one.strip() for one in each):
        text = "answer must be a text, a call {'name', 'arguments'}, a list of accepted texts or a list of wanted calls"
        raise UserError(f"{text}, got {_short(answer)} — correct it", "field")
    for one in each:
        _check_encodable(one, "answer")
    return []


def _wanted_call(call: Row) -> Row:
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or arguments is None:
        text = f"the answer is a tool call without name or arguments: {_short(call)}"
        raise UserError(f"{text} — write {{'name': …, 'arguments': {{…}}}}", "tool_call")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        text = f"arguments of the answer's tool call must be a JSON object or its text, got {_short(call['arguments'])}"
        raise UserError(f"{text} — write one", "tool_call")
    _check_encodable(json.dumps(call, ensure_ascii=False, default=str), "answer")
    return {"name": name, "arguments": arguments}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _answer(value: Any, name: str, prompt: list[Row]) -> list[Row]:
    answer = [{"role": "assistant", "content": value}] if isinstance(value, str) else value
    if not isinstance(answer, list):
        text = f"'{name}' must be a string or a list of messages, got {type(value).__name__} — convert it"
        raise UserError(text, "field")
    if _essence(answer[: len(prompt)]) == _essence(prompt):
        answer = answer[len(prompt) :]
    if not answer or not isinstance(answer[0], dict) or answer[0].get("role") != "assistant":
        text = f"'{name}' must continue the prompt with an assistant message — give the whole prompt in 'prompt'"
        raise UserError(text, "lost_prompt")
    try:
        validate_messages(prompt + answer)
        _check_order(prompt + answer)
    except UserError as error:
        raise UserError(f"'{name}': {error}", error.code) from None
    return answer


def _check_order(messages: list[Row]) -> None:
    """After a system message, if any: user first, no role twice in a row (tools apart), nothing empty."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns or turns[0]["role"] != "user":
        text = "the first message after the optional system message must be a user message — add or remove a turn"
        raise UserError(text, "order")
    for number, message in enumerate(turns, start=len(messages) - len(turns)):
        role = message["role"]
        if role != "tool" and number > 0 and messages[number - 1]["role"] == role:
            raise UserError(f"message {number}: two {role} messages in a row — merge them", "order")
        if role != "tool" and not message.get("tool_calls") and not message["content"].strip():
            raise UserError(f"message {number}: empty {role} message — fill it or remove the row", "empty_turn")


def _essence(messages: Any) -> Any:
    """What distinguishes message lists for the model: roles, text without surrounding space, tool calls."""
    if not all(isinstance(message, dict) for message in messages):
        return None
    return [
        (message.get("role"), str(message.get("content") or "").strip(), message.get("tool_calls") or None)
        for message in messages
    ]


def _field(row: Row, name: str) -> Any:
    if row.get(name) is None:
        text = f"field '{name}' is missing — the row has {', '.join(map(repr, row)) or 'no fields'}"
        sharegpt = "conversations" in row and "`python -m smolkit.doctor --fix` converts the ShareGPT form"
        text += f": {sharegpt or 'rename one, or convert the file with prepare_datasets.py'}"
        raise UserError(text, "lost_prompt" if name == "prompt" else "field")
    return row[name]


def _check_encodable(text: str, where: str = "'text'") -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        text = f"{where} has an unpaired surrogate at character {error.start} — remove the character"
        raise UserError(text, "not_utf8") from None


CHECKS = {"pretrain": check_pretrain, "sft": check_sft, "dpo": check_dpo, "exam": check_exam}


def kind_of(row: Row) -> str:
    """The kind of row by its fields: "sft", "exam", "dpo" or "pretrain"."""
    if "messages" in row or "conversations" in row:
        return "exam" if "answer" in row else "sft"
    return "dpo" if "chosen" in row or "rejected" in row else "pretrain"
