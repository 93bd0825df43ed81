"""Whether everything fits the model's context, before anything is asked: what does not is named by file and item."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from smolkit.errors import UserError
from smolkit.evaluation.records import Record
from smolkit.evaluation.subjects import LocalModel, Prompt, Row, Subject


def check_replies(
    path: Path, records: Sequence[Record], prompt_of: Callable[[Record], Prompt | None], subject: Subject, new: int
) -> None:
    """UserError for the first record whose prompt leaves no room for a reply of `new` tokens. A server renders
    conversations itself, and refuses them itself."""
    if not isinstance(subject, LocalModel) or subject.context is None:
        return
    for name, record in named(path, records):
        prompt = prompt_of(record)
        length = len(subject.encoded(prompt)) if prompt else 0
        if prompt and length + new > subject.context:
            raise UserError(
                f"{name}: a prompt of {length} tokens and {new} new ones exceed the context of {subject.context}; "
                "lower --max_new_tokens or leave the item out"
            )


def check_rows(path: Path, records: Sequence[Record], rows_of: Callable[[Record], list[Row]], subject: Subject) -> None:
    """UserError for the first record with a row to score that is longer than the context."""
    if subject.context is None:
        return
    for name, record in named(path, records):
        longest = max(len(ids) for ids, _ in rows_of(record))
        if longest > subject.context:
            raise UserError(
                f"{name}: {longest} tokens are more than the context of {subject.context}; shorten it or leave it out"
            )


def check_window(window: int | None, subject: Subject) -> None:
    """UserError for a --context that the model does not have."""
    if window is not None and subject.context is not None and window > subject.context:
        raise UserError(f"--context {window}: more than the {subject.context} tokens that can be scored at once")


def named(path: Path, records: Sequence[Record]) -> Iterator[tuple[str, Record]]:
    """(what an error calls it, record) for the records of a file."""
    for number, record in enumerate(records, start=1):
        yield f"{path}: item {record['id']}" if "id" in record else f"{path}: row {number}", record
