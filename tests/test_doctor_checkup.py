"""The doctor's examination of whole files: what it finds, what it counts, and the cleaned copies it writes."""

import json
import os
import random
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from smolkit.chat import add_chat_tokens, render, save_tokenizer
from smolkit.doctor import checkup
from smolkit.doctor.checkup import Examiner, examine, glance, histogram, quantiles
from smolkit.doctor.command import main
from smolkit.doctor.languages import language_of
from smolkit.doctor.repair import mend
from smolkit.errors import UserError


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def sft(*contents: str, **extra: object) -> dict:
    """Contents of user and assistant turns, in turn."""
    roles = ("user", "assistant")
    return {"messages": [turn(roles[i % 2], text) for i, text in enumerate(contents)], **extra}


GOOD = sft("What is the job of Nora?", "The job of Nora is baker.")
DPO = {"prompt": "Where is Ada?", "chosen": "Ada is in Rome.", "rejected": "No idea."}


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that lengths can be counted by hand."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    add_chat_tokens(tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def machine(capsys: pytest.CaptureFixture, *arguments: object, fails: bool = False) -> dict:
    """What `--json` prints, and whether the exit is an error."""
    if fails:
        with pytest.raises(UserError, match="found"):
            main([*map(str, arguments), "--json"])
    else:
        main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def codes(report: dict) -> list[tuple[int, str]]:
    return [(finding["line"], finding["code"]) for finding in report["findings"]]


# --- one row ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "marker"),
    [
        (sft("Hi", "Hello<|im_end|>"), "'<|im_end|>' in 'messages' 1 (assistant)"),
        (sft("[INST] Hi [/INST]", "Hello"), "'[INST]' in 'messages' 0 (user)"),
        (sft("Hi", "### Response:\nHello"), "'### Response:' in 'messages' 1"),
        ({**DPO, "rejected": "<|eot_id|>"}, "'<|eot_id|>' in 'rejected' 0"),
        ({"text": "one document<|endoftext|>another"}, "'<|endoftext|>' in 'text'"),
        ({"text": "<start_of_turn>user"}, "'<start_of_turn>' in 'text'"),
        ({"text": "一<｜Assistant｜>二三四五六七"}, "'<｜Assistant｜>' in 'text'"),
        ({"text": "a <| b |> c, x <|> y, [1], <s>old</s> and a ### Response in a line"}, None),
        (sft("What does <br> do in <html>?", "It ends a line."), None),
    ],
)
def test_template_markers_are_pointed_out(tmp_path: Path, row: dict, marker: str | None) -> None:
    path = write(tmp_path / "a.jsonl", row)
    found = [str(finding) for finding in examine(path, Examiner()).warnings]
    if marker is None:
        assert found == []
    else:
        assert len(found) == 1
        assert found[0].startswith(f"{path}:1: template marker {marker}") and " — remove it" in found[0]


def test_control_words_of_the_tokenizer_are_pointed_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "Copy <filename> there."}, {"text": "<file_sep> in a.py @@END"})
    own = byte_tokenizer()
    own.add_special_tokens({"extra_special_tokens": ["@@END", "<filename>"]})
    assert not examine(path, Examiner()).counts
    found = [finding.what for finding in examine(path, Examiner(tokenizer=own)).warnings]
    assert found == ["template marker '<filename>' in 'text'", "template marker '@@END' in 'text'"]


def test_extreme_lengths(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "1234567"}, {"text": "12345678"}, {"text": "x" * 1_000_001})
    report = examine(path, Examiner())
    found = [(f.line, f.code, f.severity) for f in report.problems + report.warnings]
    assert found == [(1, "length", "warning"), (3, "length", "warning")]
    path = write(tmp_path / "b.jsonl", sft("a", "b" * 100_000), sft("a", "b" * 99_999))
    assert [(f.line, f.what) for f in examine(path, Examiner()).warnings] == [
        (1, "100,001 characters, more than 100,000")
    ]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Ada lives in Rome.", "English"),
        ("Où est le café ?", "English"),  # any language in Latin letters
        ("苏晴住在北京。", "Chinese"),
        ("苏晴用 GPT 写作业和论文", "Chinese"),
        ("Say 苏晴住在北京 in English", "mixed"),
        ("Где живёт Ада?", "other"),
        ("ひらがなカタカナ", "other"),
        ("한국어 문장", "other"),
        ("12 + 30 = 42", "none"),
        ("", "none"),
    ],
)
def test_language_by_letters(text: str, language: str) -> None:
    assert language_of(text) == language


def test_figures_by_hand() -> None:
    assert histogram([1, 2, 3, 4, 9, 0]) == [(1, 1, 2), (2, 3, 2), (4, 7, 1), (8, 15, 1)]
    assert histogram([]) == [] and quantiles([]) == {}
    assert histogram([1, 4]) == [(1, 1, 1), (2, 3, 0), (4, 7, 1)]
    assert quantiles(list(range(100, 0, -1))) == {"min": 1, "median": 50, "p95": 95, "max": 100, "total": 5050}


# --- tokens and masks ---------------------------------------------------------------------------------------

# One token a byte: <|im_start|> user \n a <|im_end|> \n = 1 + 5 + 1 + 1 + 1, the same with assistant = 14 and the text.
TURN_U, TURN_A = 9, 14


def test_empty_masks_after_truncation(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    short, long = sft("a", "b"), sft("a", "b" * 30)
    two = sft("a", "b", "a", "b" * 30)
    path = write(tmp_path / "a.jsonl", short, long, two)
    first = len(render(tokenizer, short["messages"]).input_ids)
    assert first == TURN_U + TURN_A  # 23
    report = examine(path, Examiner(tokenizer=tokenizer, max_length=first))
    assert list(report.tokens) == [23, 52, 75]
    assert [(f.line, f.code) for f in report.problems] == [(2, "empty_mask")]
    assert report.problems[0].what == "52 tokens, and no reply ends within 23"
    assert report.cut == 1  # the third is cut after its first reply
    assert not examine(path, Examiner(tokenizer=tokenizer, max_length=75)).counts
    assert len(examine(path, Examiner(tokenizer=tokenizer, max_length=22)).problems) == 3
    assert not examine(path, Examiner(tokenizer=tokenizer)).counts


def test_pairs_that_would_be_dropped(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "d.jsonl", {"prompt": "a", "chosen": "b", "rejected": "bc"})
    report = examine(path, Examiner(tokenizer=tokenizer, max_length=23))
    assert list(report.tokens) == [24] and not report.counts  # the last newline is not part of a pair
    assert examine(path, Examiner(tokenizer=tokenizer, max_length=22)).problems[0].code == "empty_mask"


def test_a_template_without_marks_trains_nothing(tmp_path: Path) -> None:
    foreign = byte_tokenizer()
    foreign.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    report = examine(write(tmp_path / "a.jsonl", GOOD), Examiner(tokenizer=foreign))
    assert [f.what for f in report.problems] == ["no token would be trained"]


def test_token_lengths_of_every_kind(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "p.jsonl", {"text": "abc def 你好"})
    assert list(examine(path, Examiner(tokenizer=tokenizer)).tokens) == [8 + 6 + 1]  # and the end of the document
    path = write(tmp_path / "e.jsonl", {"messages": [turn("user", "a")], "answer": "b"})
    assert list(examine(path, Examiner(tokenizer=tokenizer)).tokens) == [TURN_U + 11]  # the prompt: no reply yet


def test_histogram_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture, tokenizer) -> None:
    save_tokenizer(tokenizer, tmp_path / "tok")
    path = write(tmp_path / "a.jsonl", *[{"text": "x" * 8}] * 3, {"text": "x" * 40})
    main([str(path), "--tokenizer_path", str(tmp_path / "tok")])
    lines = capsys.readouterr().out.splitlines()
    assert "  tokens      min 9, median 9, p95 9, max 41, total 68" in lines
    assert [line.split() for line in lines[-3:]] == [
        ["8–15", "#" * 40, "3", "(75.0", "%)"],
        ["16–31", "0", "(0.0", "%)"],
        ["32–63", "#" * 14, "1", "(25.0", "%)"],
    ]


# --- leaks --------------------------------------------------------------------------------------------------


def test_leaks_into_the_validation_twin(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = sft("Where  is\nAda?", "In Rome.")
    other["messages"].insert(0, turn("system", "Be brief."))
    write(tmp_path / "validation" / "a.jsonl", sft("Is it 5?", "No."), other)
    # the same question with other spaces, another answer and no system message; a longer chat that begins with it
    again = sft("Where is Ada?", "I do not know.", "Sure?", "Yes.")
    path = write(tmp_path / "a.jsonl", GOOD, again, sft("Where is Ada now?", "In Rome."))
    main([str(path)])
    lines = capsys.readouterr().out.splitlines()
    held_out = tmp_path / "validation" / "a.jsonl"
    assert lines[1] == (
        f"  warning: {path}:2: this prompt is also held out in {held_out}:2 — remove it from one of the two"
    )
    assert "3 rows, 0 problems, 1 warnings (leak 1)" in lines[0]
    with pytest.raises(UserError, match="0 problems and 1 warnings"):
        main([str(path), "--strict"])
    capsys.readouterr()
    assert machine(capsys, held_out)["warnings"] == 0  # a held-out file does not leak into itself


def test_leaks_of_other_kinds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = {"text": "A whole document."}
    write(tmp_path / "pre" / "validation" / "a.jsonl", text)
    write(tmp_path / "dpo" / "validation" / "a.jsonl", DPO)
    as_messages = {**DPO, "prompt": [turn("user", "Where is Ada?")]}
    exam = write(tmp_path / "exam.jsonl", {"messages": GOOD["messages"][:1], "answer": "baker"})
    files = [
        write(tmp_path / "pre" / "a.jsonl", {"text": "Another document."}, text),
        write(tmp_path / "dpo" / "a.jsonl", as_messages, {**DPO, "prompt": "Who is Ada?"}),
        write(tmp_path / "sft.jsonl", sft("Who is Ada?", "A baker."), GOOD),  # asks what the exam asks
    ]
    result = machine(capsys, *files, exam)
    assert [codes(report) for report in result["files"]] == [[(2, "leak")], [(1, "leak")], [(2, "leak")], []]


TRAINED = ("sft", "dpo")
HELD_OUT = ("sft/validation", "dpo/validation", "exam")


def asking(kind: str, prompt: str) -> dict:
    """A row of a kind ("sft/validation" is one of "sft") that asks `prompt`, each with another answer."""
    if kind.startswith("dpo"):
        return {"prompt": prompt, "chosen": "A baker.", "rejected": "No idea."}
    return sft(prompt, "Baker.") if kind.startswith("sft") else {"messages": [turn("user", prompt)], "answer": "baker"}


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("held_out", HELD_OUT)
def test_a_prompt_leaks_into_every_kind_of_held_out_file(
    tmp_path: Path, capsys: pytest.CaptureFixture, trained: str, held_out: str
) -> None:
    asked, files = "What is the job of Nora?", []
    for kind in TRAINED:
        rows = [asking(kind, "Who is Ada?"), *([asking(kind, asked)] if kind == trained else [])]
        files.append(write(tmp_path / kind / "a.jsonl", *rows))
    kept = write(tmp_path / held_out / "a.jsonl", asking(held_out, asked))
    files += [kept] if held_out == "exam" else []  # the other two are found beside what is trained on
    found = {report["path"]: codes(report) for report in machine(capsys, *files)["files"]}
    assert found.pop(str(tmp_path / trained / "a.jsonl")) == [(2, "leak")]
    assert not any(found.values())


def test_a_prompt_may_be_trained_on_in_two_stages_and_held_out_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = [write(tmp_path / kind / "a.jsonl", asking(kind, "What is the job of Nora?")) for kind in TRAINED]
    write(tmp_path / "sft" / "validation" / "a.jsonl", asking("sft", "Who is Ada?"))
    assert machine(capsys, *files)["warnings"] == 0
    held_out = [write(tmp_path / kind / "a.jsonl", asking(kind, "Where is Rome?")) for kind in HELD_OUT]
    assert machine(capsys, *files, *held_out)["warnings"] == 0


def test_a_document_is_no_prompt(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = write(tmp_path / "p.jsonl", {"text": "Where is Rome?"})
    exam = write(tmp_path / "exam.jsonl", asking("exam", "Where is Rome?"))
    assert machine(capsys, text, exam)["warnings"] == 0


# --- whole files --------------------------------------------------------------------------------------------


def test_json_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, b'{"messages": "\xff"}', sft("你好吗？", ""))
    result = machine(capsys, path, fails=True)
    assert (result["problems"], result["warnings"]) == (2, 0)
    (report,) = result["files"]
    assert {key: report[key] for key in ("path", "kind", "rows", "languages")} == {
        "path": str(path),
        "kind": "sft",
        "rows": 3,
        "languages": {"English": 1},
    }
    assert report["findings"] == [
        {
            "path": str(path),
            "line": 2,
            "code": "not_utf8",
            "severity": "problem",
            "what": "byte 14 is not UTF-8",
            "remedy": "convert the file to UTF-8",
        },
        {
            "path": str(path),
            "line": 3,
            "code": "empty_turn",
            "severity": "problem",
            "what": "message 1: empty assistant message",
            "remedy": "fill it or remove the row",
        },
    ]


def test_a_file_of_the_wrong_kind_takes_no_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkup, "KEPT", 5)
    path = write(tmp_path / "a.jsonl", *[{"question": "a"}] * 30, *[{"text": "short"}] * 8)
    result = machine(capsys, path, fails=True)
    (report,) = result["files"]
    assert (result["problems"], result["warnings"]) == (30, 8)
    assert report["counts"] == {"problem field": 30, "warning length": 8}
    assert [line for line, _ in codes(report)] == [1, 2, 3, 4, 5, 31, 32, 33, 34, 35] and report["left_out"] == 28
    options = ["--fix", "--fix_dir", tmp_path / "out"]  # mending does not depend on what is kept
    (cleaned,) = machine(capsys, path, *options, fails=True)["cleaned"]
    assert (cleaned["kept"], cleaned["quarantined"]) == (8, 30)


def test_empty_and_damaged_files_do_not_end_the_examination(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no parquet")
    write(tmp_path / "c.jsonl", GOOD)
    result = machine(capsys, tmp_path, fails=True)
    assert [codes(report) for report in result["files"]] == [[(1, "no_rows")], [(1, "unreadable")], []]


def big_file(path: Path, bad: range) -> tuple[Path, int]:
    """12,000 rows of uneven length (about 3 MB); those numbered in `bad` have their number as role."""
    pick = random.Random(5)
    rows = [sft(f"Question {i}?", "x" * pick.randrange(1, 400)) for i in range(1, 12_001)]
    for i in bad:
        rows[i - 1]["messages"][0]["role"] = f"role {i}"
    return write(path, *rows), len(rows)


def test_a_sample_is_spread_and_names_the_right_lines(tmp_path: Path) -> None:
    path, total = big_file(tmp_path / "a.jsonl", range(6_001, 12_001))
    report = examine(path, Examiner(), sample=100)
    assert 90 <= report.rows <= 100
    lines = [finding.line for finding in report.problems]
    assert 35 <= len(lines) <= 65 and len(set(lines)) == len(lines)  # the bad half, evenly
    assert min(lines) < 6_500 and max(lines) > 11_500
    assert all(f"'role {finding.line}'" in finding.what for finding in report.problems)
    assert all(6_001 <= line <= total for line in lines)


def test_a_glance_stops_a_stage_early_and_sums_up_warnings(tmp_path: Path) -> None:
    good, _ = big_file(tmp_path / "a.jsonl", range(0))
    bad, _ = big_file(tmp_path / "b.jsonl", range(6_001, 12_001))
    held_out = write(tmp_path / "elsewhere.jsonl", GOOD)
    warned = write(tmp_path / "c.jsonl", GOOD, sft("a", "b<|im_end|>"), sft("a", "b</s><|im_end|>"))
    assert glance([good]) == []
    with pytest.raises(UserError, match=r"b\.jsonl:(\d+): message 0: role must be .*'role \1'"):
        glance([good, bad])
    lines = glance([good, warned], [held_out])
    assert len(lines) == 2
    assert f"{warned}:1: this prompt is also held out in {held_out}:1" in lines[0]
    assert f"{warned}:2: template marker" in lines[1] and lines[1].endswith("(2 such rows seen)")


def test_a_glance_reads_little_of_a_big_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = big_file(tmp_path / "a.jsonl", range(0))
    seen = 0
    look = Examiner.look

    def counting(self: Examiner, *arguments: object) -> list:
        nonlocal seen
        seen += 1
        return look(self, *arguments)

    monkeypatch.setattr(Examiner, "look", counting)
    glance([path] * 40)
    assert 0 < seen <= 16 * 32


def test_stages_glance_before_they_start(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from smolkit.arguments import SftArguments
    from smolkit.command_line import SftTrainingArguments
    from smolkit.doctor import RECORD_SUFFIXES
    from smolkit.runs import open_job

    def open_(path: Path) -> None:
        stage = SftArguments(data_path=[str(path)], base_model="none")
        args = SftTrainingArguments(output_dir=str(tmp_path / "out"), max_steps=1)
        open_job(stage, args, RECORD_SUFFIXES, [])

    write(tmp_path / "validation" / "a.jsonl", GOOD)
    path = write(tmp_path / "a.jsonl", GOOD)
    open_(path)
    assert f"warning: {path}:1: this prompt is also held out in" in capsys.readouterr().out
    bad, _ = big_file(tmp_path / "b.jsonl", range(6_001, 12_001))
    with pytest.raises(UserError, match="message 0: role must be one of"):
        open_(bad)
    assert not (tmp_path / "out").exists()


# --- cleaned copies -----------------------------------------------------------------------------------------

SHAREGPT = {"id": "7", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}


@pytest.mark.parametrize(
    ("row", "mended"),
    [
        ({"messages": [turn("User", "Hi"), turn("Assistant ", "Hello")]}, sft("Hi", "Hello")),
        (SHAREGPT, {"id": "7", "messages": [turn("user", "Hi"), turn("assistant", "Hello")]}),
        (
            {"messages": [turn("user", "One"), turn("user", "two"), turn("assistant", "Yes")]},
            sft("One\n\ntwo", "Yes"),
        ),
        (sft("Hi<|im_end|>", "<|im_start|> Hello </s>[/INST] <|im_end|>\n"), sft("Hi", "Hello </s>")),
        (sft("What is <|im_end|> for?", "It ends a turn."), sft("What is <|im_end|> for?", "It ends a turn.")),
        ({**DPO, "chosen": "Yes<|eot_id|>"}, {**DPO, "chosen": "Yes"}),
        ({"text": "<|endoftext|>A text.<|endoftext|>", "id": 1}, {"text": "A text.", "id": 1}),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}, turn("assistant", "b")]},
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}, turn("assistant", "b")]},
        ),
        ({"messages": ["odd", 3]}, {"messages": ["odd", 3]}),
    ],
)
def test_what_is_mended(row: dict, mended: dict) -> None:
    before = json.dumps(row)
    assert mend(row) == mended
    assert json.dumps(row) == before  # the row given is left alone


def test_fix_writes_a_clean_copy_and_a_quarantine(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spaced = b'{"messages":[ {"role":"user","content":"\\u0041da?"}, {"role":"assistant","content":"Yes."}]}'
    leaked = sft("Is it 5?", "Maybe.")
    rows = [
        b"\xef\xbb\xbf" + spaced + b"\r",  # kept byte for byte but for the mark and the line end
        SHAREGPT,
        b"",
        b"{broken",
        b'{"messages": "\xff\xfe"}',
        GOOD,
        leaked,
        sft("a", "b<|im_end|>"),
        {"messages": [turn("user", "a"), turn("user", "b")]},  # joined, but still without an answer
        sft("What is <|im_end|>?", "An end."),
        sft("Is it 5?", "No.<|im_end|>"),  # leaked as well as marked: it stays out
        {"messages": [turn("human", "Is <|im_end|> a word?"), turn("gpt", "No.")]},  # mended, marker and all
    ]
    path = write(tmp_path / "sft" / "a.jsonl", *rows)
    write(tmp_path / "sft" / "validation" / "a.jsonl", sft("Is it 5?", "No."))
    before = path.read_bytes()
    with pytest.raises(UserError, match="5 problems"):
        main(["sft/a.jsonl", "--fix"])
    assert "(3 rows as they were, 3 mended, 5 quarantined in" in capsys.readouterr().out
    clean, quarantine = tmp_path / "cleaned" / "sft" / "a.jsonl", tmp_path / "cleaned" / "sft" / "a.quarantine"
    assert path.read_bytes() == before
    lines = clean.read_bytes().splitlines()
    assert lines[0] == spaced
    assert [json.loads(line) for line in lines[1:]] == [
        {"id": "7", "messages": [turn("user", "Hi"), turn("assistant", "Hello")]},
        GOOD,
        sft("a", "b"),
        sft("What is <|im_end|>?", "An end."),
        sft("Is <|im_end|> a word?", "No."),
    ]
    aside = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [(each["line"], each["code"]) for each in aside] == [
        (4, "not_json"),
        (5, "not_utf8"),
        (7, "leak"),
        (9, "order"),
        (11, "leak"),
    ]
    assert aside[0]["row"] == "{broken" and "\\xff\\xfe" in aside[1]["row"] and aside[2]["row"] == leaked
    assert all(" — " in each["problem"] for each in aside)
    assert len(lines) + len(aside) == len(rows) - 1  # all but the blank line

    capsys.readouterr()
    main([str(clean)])  # no problem is left, and none of the leaks
    assert "6 rows, 0 problems, 2 warnings (marker 2)" in capsys.readouterr().out


def test_fix_counts_for_machines_and_reads_parquet(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "sft" / "a.parquet"
    path.parent.mkdir()
    conversations = [[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": text}] for text in ("Hello", "")]
    parquet.write_table(pyarrow.table({"conversations": conversations}), path)
    text = tmp_path / "pretrain" / "b.txt"
    text.parent.mkdir()
    text.write_bytes(b"One document.\n<|endoftext|>\nbad \xff line\nAnother document.\n")
    directory = tmp_path / "out"
    result = machine(capsys, path, text, "--fix", "--fix_dir", directory, fails=True)
    counts = [{key: each[key] for key in ("kept", "mended", "quarantined")} for each in result["cleaned"]]
    assert counts == [{"kept": 0, "mended": 1, "quarantined": 1}, {"kept": 2, "mended": 0, "quarantined": 1}]
    assert json.loads((directory / "sft" / "a.jsonl").read_text()) == sft("Hi", "Hello")
    documents = (directory / "pretrain" / "b.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in documents] == ["One document.\n", "Another document.\n"]


def test_mended_rows_must_still_fit_the_mask(tmp_path: Path, capsys, tokenizer: PreTrainedTokenizerFast) -> None:
    save_tokenizer(tokenizer, tmp_path / "tok")
    long = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b" * 30}]}
    path = write(tmp_path / "sft" / "a.jsonl", sft("a", "b"), long)
    options = ["--tokenizer_path", tmp_path / "tok", "--max_length", 23, "--fix", "--fix_dir", tmp_path / "out"]
    (cleaned,) = machine(capsys, path, *options, fails=True)["cleaned"]
    assert (cleaned["kept"], cleaned["mended"], cleaned["quarantined"]) == (1, 0, 1)


def test_fix_never_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "sft" / "a.jsonl", GOOD)
    with pytest.raises(UserError, match="--fix_dir would overwrite"):
        main([str(path), "--fix", "--fix_dir", str(tmp_path)])
    assert sorted(os.listdir(path.parent)) == ["a.jsonl"]
    parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "sft" / "a.parquet")
    with pytest.raises(UserError, match="two files would become"):
        main([str(tmp_path / "sft"), "--fix", "--fix_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--max_length", "0"], "--max_length 0 is too small — at least 1"),
        (["--max_length", "8"], "--max_length counts tokens — give --tokenizer_path"),
        (["--sample", "0"], "--sample 0 is too small"),
        (["--sample", "5", "--fix"], "--fix needs to see every row"),
        (["--tokenizer_path", "missing"], "no tokenizer at missing"),
    ],
)
def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], complaint: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(UserError, match=complaint):
        main([str(path), *options])


# --- real data ----------------------------------------------------------------------------------------------


def test_real_conversations_are_mended_whole(samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Infinity-Instruct comes in ShareGPT form: what is mended has the same texts under our names."""
    path = samples / "infinity_instruct" / "Gen" / "train-00000-of-00015.parquet"
    (cleaned,) = machine(capsys, path, "--fix", "--fix_dir", tmp_path, fails=True)["cleaned"]
    assert cleaned["mended"] + cleaned["quarantined"] == 100 and cleaned["mended"] >= 95
    originals = {row["id"]: row for row in parquet.read_table(path).to_pylist()}
    for line in Path(cleaned["path"]).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        theirs = [message["value"].strip() for message in originals[row["id"]]["conversations"]]
        assert [message["content"].strip() for message in row["messages"]] == theirs


def test_real_preferences_with_the_real_tokenizer(samples: Path, capsys: pytest.CaptureFixture) -> None:
    directory = samples / "qwen2.5_tokenizer"
    path = samples / "infinity_preference" / "train-00000-of-00001.parquet"
    (report,) = machine(capsys, path, "--tokenizer_path", directory)["files"]
    # an independent count: transformers' own template path, no guard against control words
    tokenizer = AutoTokenizer.from_pretrained(directory)
    lengths = []
    for row in parquet.read_table(path).to_pylist():
        prompt = row["prompt"] if isinstance(row["prompt"], list) else [turn("user", row["prompt"])]
        sides = [[m for m in row[side] if m["role"] == "assistant"][-1:] for side in ("chosen", "rejected")]
        lengths.append(max(len(tokenizer.apply_chat_template(prompt + s, return_dict=False)) for s in sides))
    assert report["tokens"]["total"] == sum(lengths) and report["tokens"]["max"] == max(lengths)
