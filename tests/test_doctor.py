"""Reading data files: what is found, what is accepted, and that every error names file, line and remedy."""

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from smolkit.doctor import Finding, expand_paths, read_dpo, read_pretrain, read_sft, read_texts, rows, validation_path
from smolkit.doctor.checkup import Examiner, examine
from smolkit.doctor.command import main
from smolkit.errors import UserError

PRETRAIN = {"text": "Ada lives in Rome.", "category": "facts"}
USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SFT = {"id": "1", "source": "test", "messages": [USER, REPLY]}
DPO = {"id": "1", "source": "test", "prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]


def write(path: Path, *rows: object) -> Path:
    """Rows as JSON Lines; strings and bytes are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, (str, bytes)) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes(b"".join((row if isinstance(row, bytes) else row.encode()) + b"\n" for row in lines))
    return path


# --- finding files ------------------------------------------------------------------------------------------


def test_files_directories_and_globs_skip_validation(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", PRETRAIN)
    b = write(tmp_path / "deep" / "b.jsonl", PRETRAIN)
    held_out = write(tmp_path / "validation" / "a.jsonl", PRETRAIN)
    write(tmp_path / ".cache" / "c.jsonl", PRETRAIN)
    write(tmp_path / "deep" / ".hidden.jsonl", PRETRAIN)
    write(tmp_path / "notes.md", "x")
    kinds = (".jsonl",)
    assert expand_paths(a, kinds) == [a]
    assert expand_paths(str(tmp_path), kinds) == [a, b]
    assert expand_paths(f"{tmp_path}/*.jsonl", kinds) == [a]
    assert expand_paths(f"{tmp_path}/**/*.jsonl", kinds) == [a, b]
    assert expand_paths([b, str(tmp_path), a], kinds) == [b, a]  # in the order given, each file once
    for named in (held_out, held_out.parent, f"{tmp_path}/validation/*", f"{tmp_path}/*/../validation/*"):
        assert {path.resolve() for path in expand_paths(named, kinds)} == {held_out}
    with pytest.raises(UserError, match="no .jsonl file found there"):
        expand_paths(f"{tmp_path}/*/a.jsonl", kinds)  # reaches validation/a.jsonl only by its wildcard


@pytest.mark.parametrize("entry", ["missing.jsonl", "missing/", "*.jsonl", "empty", "only_validation"])
def test_nothing_found_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "only_validation" / "validation" / "a.jsonl", PRETRAIN)
    with pytest.raises(UserError, match="no such file or directory|no .jsonl file found there") as error:
        expand_paths(entry, (".jsonl",))
    assert str(error.value).startswith(str(Path(entry)))


def test_unsupported_suffix_names_what_is_supported(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", "a,b")
    with pytest.raises(UserError, match=r"data\.csv: unsupported file type \.csv — expected \.jsonl, \.txt"):
        read_pretrain(path)
    with pytest.raises(UserError, match=r"unsupported file type \.txt — expected \.jsonl, \.parquet"):
        read_sft(write(tmp_path / "data.txt", "x"))
    with pytest.raises(UserError, match="no data path"):
        expand_paths([], (".jsonl",))


def test_validation_path(tmp_path: Path) -> None:
    path = write(tmp_path / "sft_data.jsonl", SFT)
    assert validation_path(path) is None and validation_path(tmp_path) is None
    held_out = write(tmp_path / "validation" / "sft_data.jsonl", SFT)
    assert validation_path(str(path)) == held_out
    assert validation_path(tmp_path) == held_out.parent
    assert validation_path(tmp_path / "*.jsonl") is None


# --- good rows ----------------------------------------------------------------------------------------------


def test_rows_come_back_with_all_their_fields(tmp_path: Path) -> None:
    assert list(read_pretrain(write(tmp_path / "p.jsonl", PRETRAIN, "", {"text": "二"}))) == [
        PRETRAIN,
        {"text": "二"},
    ]
    with_tools = {
        "messages": [
            {"role": "system", "content": ""},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": ""},
            {"role": "tool", "content": "2"},
            REPLY,
            USER,
        ],
        "tools": TOOLS,
    }
    no_tools = {**SFT, "tools": None}  # as datasets and parquet fill absent columns
    assert list(read_sft(write(tmp_path / "s.jsonl", SFT, with_tools, no_tools))) == [
        SFT,
        with_tools,
        no_tools,
    ]


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", b"\xef\xbb\xbf" + json.dumps(PRETRAIN).encode() + b"\r", PRETRAIN)
    assert list(read_pretrain(path)) == [PRETRAIN, PRETRAIN]


def test_dpo_forms_become_the_same_messages(tmp_path: Path) -> None:
    prompt, good, bad = (
        [USER],
        {"role": "assistant", "content": "Hello!"},
        {"role": "assistant", "content": "What?"},
    )
    extra = {"quality": {"must_start_with": ["H"]}}
    forms = [
        {**DPO, **extra},
        {**DPO, **extra, "prompt": prompt},
        {**DPO, **extra, "chosen": [good], "rejected": [bad]},
        {**DPO, **extra, "chosen": [USER, good], "rejected": [USER, bad]},  # repeats the prompt
        {**DPO, **extra, "prompt": prompt, "chosen": [USER, good]},
    ]
    expected = {**DPO, **extra, "prompt": prompt, "chosen": [good], "rejected": [bad]}
    assert list(read_dpo(write(tmp_path / "d.jsonl", *forms))) == [expected] * len(forms)


def test_parquet_equals_jsonl(tmp_path: Path) -> None:
    made = {"p": [PRETRAIN] * 600, "s": [SFT] * 3, "d": [DPO] * 3}
    for name, read in (("p", read_pretrain), ("s", read_sft), ("d", read_dpo)):
        parquet.write_table(pyarrow.Table.from_pylist(made[name]), tmp_path / f"{name}.parquet")
        assert list(read(tmp_path / f"{name}.parquet")) == list(
            read(write(tmp_path / f"{name}.jsonl", *made[name]))
        )


def test_texts_of_every_kind(tmp_path: Path) -> None:
    conversation = {**SFT, "tools": TOOLS, "messages": [USER, {**REPLY, "tool_calls": [CALL]}]}
    path = write(tmp_path / "mixed.jsonl", PRETRAIN, conversation, DPO)
    assert list(read_texts(path)) == [
        ["Ada lives in Rome."],
        ["user\nHi", "assistant\nHello", json.dumps(CALL), json.dumps(TOOLS[0])],
        ["user\nHi", "assistant\nHello!", "assistant\nWhat?"],
    ]


# --- plain text ---------------------------------------------------------------------------------------------


def test_text_paragraphs_stay_together_and_lose_nothing(tmp_path: Path) -> None:
    text = "\n = Title = \n\nFirst paragraph.\n \nSecond.\n\n\nThird\r\n"
    (path := tmp_path / "a.txt").write_bytes(text.encode())
    assert list(read_pretrain(path)) == [{"text": text.replace("\r\n", "\n")}]


def test_text_separator_lines_end_documents(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.txt",
        "one",
        "",
        "still one",
        "<|endoftext|>",
        "",
        "<|endoftext|>",
        "two",
        "<|endoftext|>",
    )
    assert [row["text"] for row in read_pretrain(path)] == ["one\n\nstill one\n", "two\n"]


def test_long_text_is_cut_at_blank_lines_then_at_line_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "TEXT_DOCUMENT_CHARACTERS", 20)
    path = write(tmp_path / "a.txt", "a" * 12, "", "b" * 12, "b", "", "c", "", *["d" * 30] * 5)
    texts = [row["text"] for row in read_pretrain(path)]
    assert texts == [
        f"{'a' * 12}\n\n{'b' * 12}\nb\n\n",
        "c\n\n" + ("d" * 30 + "\n") * 3,
        ("d" * 30 + "\n") * 2,
    ]
    assert "".join(texts) == path.read_text()


# --- bad rows -----------------------------------------------------------------------------------------------

TWO_USERS = [USER, USER, REPLY]
BAD_ROWS = {
    "broken json": (
        read_pretrain,
        '{"text": "a',
        r"not valid JSON \(Unterminated string.*one complete JSON object",
    ),
    "two objects": (read_pretrain, '{"text": "a"}{"text": "b"}', "not valid JSON.*Extra data"),
    "deep json": (read_pretrain, "[" * 100_000, "not valid JSON"),
    "array": (read_pretrain, "[1]", "expected a JSON object, got list"),
    "not utf-8": (read_pretrain, b'{"text": "\xff"}', "byte 10 is not UTF-8 — convert"),
    "other field": (read_pretrain, {"content": "x"}, "field 'text' is missing — the row has 'content'"),
    "number": (read_pretrain, {"text": 3}, "'text' must be a string, got int"),
    "null": (read_pretrain, {"text": None}, "field 'text' is missing"),
    "blank": (read_pretrain, {"text": " \n"}, "'text' is empty — remove the row"),
    "surrogate": (read_pretrain, '{"text": "a\\ud800"}', "unpaired surrogate at character 1"),
    "sft as pretrain": (read_sft, PRETRAIN, "field 'messages' is missing"),
    "no messages": (read_sft, {"messages": []}, "messages must be a non-empty list"),
    "messages string": (read_sft, {"messages": "Hi"}, "messages must be a non-empty list"),
    "sharegpt role": (
        read_sft,
        {"messages": [{"role": "human", "content": "x"}]},
        "message 0: role must be one of",
    ),
    "sharegpt keys": (
        read_sft,
        {"messages": [{"from": "human", "value": "x"}]},
        "message 0: role must be one of",
    ),
    "no assistant": (read_sft, {"messages": [USER]}, "no assistant message"),
    "assistant first": (read_sft, {"messages": [REPLY, USER]}, "must be a user message"),
    "system only": (read_sft, {"messages": [{"role": "system", "content": "x"}]}, "must be a user message"),
    "two users": (read_sft, {"messages": TWO_USERS}, "message 1: two user messages in a row — merge"),
    "empty turn": (
        read_sft,
        {"messages": [USER, {"role": "assistant", "content": " "}]},
        "1: empty assistant",
    ),
    "stray tool": (read_sft, {"messages": [USER, {"role": "tool", "content": "x"}, REPLY]}, "must follow"),
    "bad tools": (read_sft, {**SFT, "tools": [{"name": 1}]}, "tool 0: needs a function with a name"),
    "same": (read_dpo, {**DPO, "rejected": "Hello!"}, "'chosen' and 'rejected' are the same"),
    "same but space": (read_dpo, {**DPO, "rejected": " Hello!\n"}, "'chosen' and 'rejected' are the same"),
    "lost prompt": (read_dpo, {"chosen": "a", "rejected": "b"}, "field 'prompt' is missing"),
    "empty prompt": (read_dpo, {**DPO, "prompt": []}, "messages must be a non-empty list"),
    "answered prompt": (read_dpo, {**DPO, "prompt": [USER, REPLY]}, "must end with a user or tool message"),
    "empty answer": (read_dpo, {**DPO, "chosen": ""}, "'chosen': message 1: empty assistant message"),
    "user answer": (read_dpo, {**DPO, "chosen": [USER]}, "'chosen' must continue the prompt"),
    "number answer": (read_dpo, {**DPO, "rejected": 1}, "'rejected' must be a string or a list"),
    "odd answer": (read_dpo, {**DPO, "rejected": ["x"]}, "'rejected' must continue the prompt"),
    "other prompt": (
        read_dpo,
        {**DPO, "chosen": [{**USER, "content": "Bye"}, REPLY]},
        "must continue the prompt",
    ),
}
GOOD = {read_pretrain: PRETRAIN, read_sft: SFT, read_dpo: DPO}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, name: str) -> None:
    read, bad, complaint = BAD_ROWS[name]
    path = write(tmp_path / "data.jsonl", GOOD[read], "", bad, GOOD[read])
    reader = read(path)
    next(reader)
    with pytest.raises(UserError, match=complaint) as error:
        next(reader)
    assert re.fullmatch(rf"{re.escape(str(path))}:3: \S.* — \S.*", str(error.value))  # one line, with a remedy


CODES = {
    "broken json": "not_json",
    "not utf-8": "not_utf8",
    "surrogate": "not_utf8",
    "number": "field",
    "blank": "empty_text",
    "sharegpt role": "role",
    "assistant first": "order",
    "two users": "order",
    "stray tool": "order",
    "empty turn": "empty_turn",
    "bad tools": "tool",
    "no assistant": "empty_mask",
    "same": "no_preference",
    "lost prompt": "lost_prompt",
    "other prompt": "lost_prompt",
    "empty answer": "empty_turn",
}


@pytest.mark.parametrize("name", CODES)
def test_findings_carry_codes_and_survive_worker_processes(tmp_path: Path, name: str) -> None:
    read, bad, _ = BAD_ROWS[name]
    path = write(tmp_path / "data.jsonl", GOOD[read], bad)
    with pytest.raises(Finding) as error:
        list(read(path))
    finding = pickle.loads(pickle.dumps(error.value))
    assert (finding.code, finding.path, finding.line, finding.severity) == (CODES[name], path, 2, "problem")
    assert str(finding) == str(error.value) == f"{path}:2: {finding.what} — {finding.remedy}"


@pytest.mark.parametrize("read", [read_pretrain, read_sft, read_dpo, read_texts])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_files_are_errors(tmp_path: Path, read: Callable, content: str) -> None:
    (path := tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"data\.jsonl: the file has no rows — remove it or fill it"):
        list(read(path))


def test_damaged_parquet_and_bad_parquet_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 this is no parquet file")
    with pytest.raises(UserError, match=r"a\.parquet: unreadable parquet after row 0"):
        list(read_pretrain(path))
    parquet.write_table(pyarrow.table({"text": ["fine", None]}), path)
    with pytest.raises(UserError, match=r"a\.parquet:2: field 'text' is missing"):
        list(read_pretrain(path))


# --- command line -------------------------------------------------------------------------------------------


def test_command_counts_rows_and_problems(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "p.jsonl", PRETRAIN, PRETRAIN)
    write(tmp_path / "d.jsonl", DPO)
    main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{tmp_path}/d.jsonl: dpo, 1 rows, 0 problems, 0 warnings",
        "  languages   English 100.0 %",
        "  characters  min 13, median 13, p95 13, max 13, total 13",
        f"{tmp_path}/p.jsonl: pretrain, 2 rows, 0 problems, 0 warnings",
        "  languages   English 100.0 %",
        "  characters  min 18, median 18, p95 18, max 18, total 36",
    ]

    broken = write(tmp_path / "s.jsonl", "{", SFT, {**SFT, "messages": TWO_USERS}, b"\xff", "{")
    with pytest.raises(UserError, match="4 problems and 0 warnings found"):
        main([str(broken), "--max_problems", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{broken}: sft, 5 rows, 4 problems (not_json 2, order 1, not_utf8 1), 0 warnings"
    assert [line.split(": ")[0] for line in lines[1:4]] == [f"  {broken}:{line}" for line in (1, 3, 4)]
    assert lines[4] == "  ... and 1 more (--max_problems)"


def test_exam_items_are_known_and_kept_from_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    item = {"id": "1", "messages": [USER], "answer": ["Hello", "Hi"]}
    path = write(tmp_path / "exam.jsonl", item, {**item, "answer": {"name": "f", "arguments": {}}, "tools": TOOLS})
    main([str(path)])
    assert capsys.readouterr().out.startswith(f"{path}: exam, held out, 2 rows, 0 problems, 0 warnings\n")
    with pytest.raises(UserError, match=r"exam\.jsonl:1: an exam item is no training text"):
        list(read_texts(path))
    bad = write(tmp_path / "bad.jsonl", {**item, "messages": [USER, REPLY]}, {**item, "answer": 3})
    report = examine(bad, Examiner())
    assert (report.kind, report.rows) == ("exam", 2)
    order, field = report.problems
    assert "must end with the question" in str(order) and "must be a text, a call" in str(field)


def test_command_exits_2_with_one_line(tmp_path: Path, root: Path) -> None:
    path = write(tmp_path / "d.jsonl", {**DPO, "rejected": "Hello!"})
    command = [sys.executable, "-m", "smolkit.doctor", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert result.returncode == 2
    assert result.stderr == "error: 1 problems and 0 warnings found — see above, or --fix\n"
    assert f"{path}:1: 'chosen' and 'rejected' are the same" in result.stdout


# --- real files ---------------------------------------------------------------------------------------------


def test_real_samples_read_whole(samples: Path) -> None:
    assert sum(1 for _ in read_pretrain(samples / "industrycorpus2")) == 200
    assert sum(1 for _ in read_dpo(samples / "infinity_preference")) == 200
    articles = [row["text"] for row in read_pretrain(samples / "wikitext2" / "valid.txt")]
    assert "".join(articles) == (samples / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
    with pytest.raises(
        UserError, match=r"train\.jsonl:1: field 'text' is missing — the row has 'question', 'answer'"
    ):
        next(read_pretrain(samples / "gsm8k"))
