"""The pipeline around the converters, and the script: files in each dataset's own layout go in, our files come out."""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import prepare_datasets
from smolkit import sources
from smolkit.doctor import read_dpo, read_pretrain, read_sft
from smolkit.errors import UserError
from smolkit.sources import gsm8k, pipeline
from smolkit.sources.files import DataFile
from smolkit.sources.pipeline import Input, Limits, Settings, Stream, identity_hash, in_share

ROOT = Path(__file__).resolve().parent.parent


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def talk(i: int) -> list[dict]:
    return [turn("user", f"question {i}"), turn("assistant", f"answer {i}")]


def said(who: str, value: str) -> dict:
    return {"from": who, "value": value}


# --- generated twins of every layout ------------------------------------------------------------------------


def parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def array(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")


def write_pretrain(root: Path) -> None:
    n = range(20)
    english = [{"text": f"An English document {i}.", "num_words": i, "industry_type": "住宿"} for i in n[:10]]
    chinese = [{"text": f"第{i}篇中文文章。", "num_words": str(i), "_id": i} for i in n[:10]]
    industry = root / "IndustryCorpus2" / "news_media"
    parquet(industry / "english" / "high" / "rank_00001.parquet", english)
    parquet(industry / "chinese" / "high" / "rank_00002.parquet", chinese)
    parquet(industry / "english" / "low" / "rank_00003.parquet", [{"text": f"Poor {i}."} for i in n])
    parquet(industry.parent / "law_judiciary" / "english" / "middle" / "rank_4.parquet", [{"text": "A law."}])
    web = {"dump": "d", "url": "u", "date": "t", "file_path": "f", "language": "en", "language_score": 0.9}
    rows = [{"text": f"Web page {i}.", "id": str(i), **web, "token_count": i} for i in n]
    parquet(root / "fineweb" / "sample" / "10BT" / "000_00000.parquet", rows)
    rows = [{"text": f"Chapter {i}.", "prompt": "p", "token_length": i, "audience": "a", "format": "f"} for i in n]
    parquet(root / "smollm-corpus" / "cosmopedia-v2" / "train-00000-of-00104.parquet", rows[:10])
    rows = [{"text": f"Lesson {i}.", "id": str(i), "metadata": {"score": 3.2, "int_score": 3}} for i in n]
    parquet(root / "smollm-corpus" / "fineweb-edu-dedup" / "train-00000-of-00234.parquet", rows[10:])
    parquet(root / "smollm-corpus" / "python-edu" / "train-00000-of-00002.parquet", [{"blob_id": "b"}])
    stories = [{"text": f"Once upon a time, {i}."} for i in n]
    parquet(root / "TinyStories" / "data" / "train-00000-of-00004-2d5a1467fff1081b.parquet", stories[:15])
    parquet(root / "TinyStories" / "data" / "validation-00000-of-00001-869c898b519ad725.parquet", stories[15:])


def write_sft(root: Path) -> None:
    n = range(20)
    talks = [{"messages": talk(i), "source": "self"} for i in n]
    parquet(root / "smol-smoltalk" / "data" / "train-00000-of-00001.parquet", talks[:15])
    parquet(root / "smol-smoltalk" / "data" / "test-00000-of-00001.parquet", talks[15:])
    parquet(root / "smoltalk" / "data" / "all" / "train-00000-of-00001.parquet", talks)
    parquet(root / "smoltalk" / "data" / "everyday-conversations" / "train-00000-of-00001.parquet", talks[:3])
    lines(root / "OpenO1-SFT" / "OpenO1-SFT.jsonl", [{"instruction": f"q{i}", "output": f"a{i}"} for i in n])
    lines(root / "OpenO1-SFT" / "OpenO1-SFT-Pro.jsonl", [{"other": "file"}])
    rows = [{"instruction": f"q{i}", "input": "" if i % 2 else "in", "output": f"a{i}"} for i in n]
    array(root / "alpaca-cleaned" / "alpaca_data_cleaned.json", rows)
    rows = [{"prompt": f"question {i}", "prompt_id": f"p{i}", "messages": talk(i) * 2} for i in n]
    parquet(root / "ultrachat_200k" / "data" / "train_sft-00000-of-00003-a3ecf92756993583.parquet", rows[:15])
    parquet(root / "ultrachat_200k" / "data" / "test_sft-00000-of-00001-f7dfac4afe5b93f4.parquet", rows[15:])
    parquet(root / "ultrachat_200k" / "data" / "train_gen-00000-of-00003-a6c9fb894be3e50b.parquet", [{"other": 1}])
    shared = [[said("human", f"问{i}"), said("gpt", f"答{i}")] for i in n]
    rows = [{"id": i, "conversations": c, "source": "x", "reward": 1.0} for i, c in enumerate(shared)]
    parquet(root / "infinity_instruct" / "7M" / "train-00000-of-00075.parquet", rows[:10])
    rows = [{**row, "id": str(row["id"])} for row in rows]
    parquet(root / "infinity_instruct" / "Gen" / "train-00000-of-00015.parquet", rows[10:])
    lines(root / "gsm8k" / "train.jsonl", [{"question": f"q{i}", "answer": f"#### {i}"} for i in n])
    call = '{"name": "look", "arguments": {"at": 1}}'
    hermes = f"<tool_call>\n{call}\n</tool_call>"
    system = said("system", '<tools>[{"type": "function", "function": {"name": "look"}}]</tools>')
    rows = [{"id": str(i), "conversations": [system, said("human", f"q{i}"), said("gpt", hermes)]} for i in n]
    array(root / "hermes-function-calling-v1" / "func-calling-singleturn.json", rows)
    turns = [said("function_call", call), said("observation", "1"), said("gpt", "One.")]
    rows = [{"conversations": [said("human", f"q{i}"), *turns], "tools": '[{"name": "look"}]'} for i in n]
    array(root / "glaive_toolcall_en" / "glaive_toolcall_en_demo.json", rows)
    array(root / "glaive_toolcall_zh" / "glaive_toolcall_zh_demo.json", rows)


def write_dpo(root: Path) -> None:
    n = range(20)
    ratings = {"honesty": {"Rating": "N/A"}, "helpfulness": {"Rating": "4"}}
    scored = [
        {"model": "m", "response": text, "overall_score": score, "fine-grained_score": 4.0, "annotations": ratings}
        for text, score in (("good", 5.0), ("bad", "2"), ("unrated", "N/A"))
    ]
    rows = [{"source": "flan", "instruction": f"q{i}", "completions": scored, "models": ["m"]} for i in n]
    lines(root / "UltraFeedback" / "flan.jsonl", rows)
    chats = [{"chosen": talk(i), "rejected": [*talk(i)[:1], turn("assistant", "no")]} for i in n]
    scores = {"score_chosen": 8.0, "score_rejected": 3.5}
    rows = [
        {**c, **scores, "prompt": f"question {i}", "prompt_id": f"p{i}", "messages": []} for i, c in enumerate(chats)
    ]
    for owner in ("HuggingFaceH4", "trl-lib"):
        folder = root / owner / "ultrafeedback_binarized" / "data"
        parquet(folder / ("train_prefs-0.parquet" if owner == "HuggingFaceH4" else "train-0.parquet"), rows[:15])
        parquet(folder / ("test_prefs-0.parquet" if owner == "HuggingFaceH4" else "test-0.parquet"), rows[15:])
    rows = [{**chat, "prompt": f"question {i}", "id": i} for i, chat in enumerate(chats)]
    parquet(root / "datasets--BAAI--Infinity-Preference" / "data" / "train-00000-of-00001.parquet", rows)


@pytest.fixture(scope="module")
def all_copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small folder per dataset, in the layout it has on the hub, 20 good rows in what is taken by default;
    read only."""
    root = tmp_path_factory.mktemp("copies")
    write_pretrain(root)
    write_sft(root)
    write_dpo(root)
    return root


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """A folder with one dataset that a test may change."""
    root = tmp_path / "problems"
    lines(root / "gsm8k" / "train.jsonl", [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(20)])
    return root


def prepare(copies: Path, output_dir: Path, *more: object) -> None:
    arguments = ["--source", "local", "--path", copies, "--output_dir", output_dir, *more]
    prepare_datasets.main([str(a) for a in arguments])


def report_of(output_dir: Path, part: str) -> dict:
    return json.loads((output_dir / part / "prepare_report.json").read_text())["sources"]


def counts_of(output_dir: Path, part: str) -> dict:
    """(rows read, rows written, {reason: rows dropped}) of each source in the report."""
    return {
        repo: (s["read"], s["written"], {reason: d["rows"] for reason, d in s["dropped"].items()})
        for repo, s in report_of(output_dir, part).items()
    }


def texts_of(path: Path) -> list[str]:
    return [row["text"] for row in read_pretrain(path)]


def bytes_of(output_dir: Path) -> dict[str, bytes]:
    return {p.relative_to(output_dir).as_posix(): p.read_bytes() for p in output_dir.rglob("*") if p.is_file()}


def test_every_known_dataset_converts_from_a_local_copy_without_loss(all_copies: Path, tmp_path: Path) -> None:
    prepare(all_copies, tmp_path)  # none of --pretrain, --sft, --dpo: all of them
    converted = {}
    for part, read in (("pretrain", read_pretrain), ("sft", read_sft), ("dpo", read_dpo)):
        converted |= counts_of(tmp_path, part)
        train, held_out = tmp_path / part / f"{part}_data.jsonl", tmp_path / part / "validation" / f"{part}_data.jsonl"
        count = len(list(read(train))) + (len(list(read(held_out))) if held_out.exists() else 0)
        assert count == sum(written for _, written, _ in counts_of(tmp_path, part).values())
    assert converted == {s.repo: (20, 20, {}) for s in sources.ALL if s.on_hub}
    rows = list(read_pretrain(tmp_path / "pretrain" / "pretrain_data.jsonl"))
    expected = {"news_media", "fineweb", "cosmopedia-v2", "fineweb-edu-dedup", "TinyStories"}
    assert {row["category"] for row in rows} == expected
    assert {"第3篇中文文章。", "An English document 3."} <= {row["text"] for row in rows}


@pytest.mark.parametrize(
    ("choice", "texts"),
    [
        ([], {"An English document 3.", "第3篇中文文章。"}),
        (["--language", "chinese"], {"第3篇中文文章。"}),
        (["--quality", "low"], {"Poor 3."}),
        (["--quality", "low", "high", "--language", "english"], {"An English document 3.", "Poor 3."}),
        (["--industry", "law_judiciary", "--quality", "middle"], {"A law."}),
    ],
)
def test_language_industry_and_quality_choose_the_files_of_industry_corpus2(
    all_copies: Path, tmp_path: Path, choice: list[str], texts: set[str]
) -> None:
    prepare(all_copies, tmp_path, "--datasets", "IndustryCorpus2", "--validation_fraction", "0", "--pretrain", *choice)
    written = texts_of(tmp_path / "pretrain" / "pretrain_data.jsonl")
    assert {text for text in written if " 3" in text or "第3" in text or "law" in text} == texts


def test_a_token_budget_is_kept_and_shared_by_the_folders(all_copies: Path, tmp_path: Path) -> None:
    more = ["--pretrain", "--datasets", "IndustryCorpus2", "--max_tokens", "20", "--validation_fraction", "0"]
    prepare(all_copies, tmp_path, *more)
    texts = texts_of(tmp_path / "pretrain" / "pretrain_data.jsonl")
    size = sum(len(text.encode()) for text in texts)
    assert 80 <= size < 80 + len(texts[-1].encode())  # 20 tokens of 4 bytes, the last record whole
    assert {text[0] for text in texts} == {"A", "第"}


def test_any_configuration_is_named_after_a_colon(all_copies: Path, tmp_path: Path) -> None:
    prepare(all_copies, tmp_path, "--sft", "--datasets", "smoltalk:everyday-conversations")
    assert counts_of(tmp_path, "sft") == {"HuggingFaceTB/smoltalk": (3, 3, {})}
    with pytest.raises(UserError, match="longalign.*no files of HuggingFaceTB/smoltalk|no files .*longalign"):
        prepare(all_copies, tmp_path, "--sft", "--datasets", "smoltalk:longalign")


def test_thoughts_are_stripped_on_request(tmp_path: Path) -> None:
    output = "<Thought>two and two</Thought><Output>4</Output>"
    lines(tmp_path / "OpenO1-SFT" / "OpenO1-SFT.jsonl", [{"instruction": "2+2?", "output": output}])
    for thoughts, answer in (("keep", output), ("strip", "4")):
        prepare(tmp_path, tmp_path / thoughts, "--sft", "--thoughts", thoughts, "--validation_fraction", "0")
        assert next(read_sft(tmp_path / thoughts / "sft" / "sft_data.jsonl"))["messages"][1]["content"] == answer


@pytest.mark.parametrize("name", ["openai-tools", "sharegpt-tools"])
def test_own_function_calling_files_are_read_in_both_forms(tmp_path: Path, name: str) -> None:
    function = {"name": "look", "arguments": '{"at": 1}'}
    row = {
        "openai-tools": {
            "messages": [turn("user", "q"), {**turn("assistant", ""), "tool_calls": [{"function": function}]}],
            "tools": [{"type": "function", "function": {"name": "look"}}],
        },
        "sharegpt-tools": {
            "conversations": [said("human", "q"), said("function_call", json.dumps(function))],
            "tools": [{"name": "look"}],
        },
    }[name]
    lines(tmp_path / "mine" / "calls.jsonl", [row])
    prepare(tmp_path / "mine", tmp_path, "--sft", "--datasets", name, "--validation_fraction", "0")
    (record,) = read_sft(tmp_path / "sft" / "sft_data.jsonl")
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
    assert record["messages"] == [turn("user", "q"), {**turn("assistant", ""), "tool_calls": [call]}]
    assert record["tools"] == [{"type": "function", "function": {"name": "look"}}]


def test_what_the_publisher_held_out_is_never_trained_on(all_copies: Path, tmp_path: Path) -> None:
    prepare(all_copies, tmp_path, "--sft", "--datasets", "smol-smoltalk", "--validation_fraction", "0")
    train = list(read_sft(tmp_path / "sft" / "sft_data.jsonl"))
    held_out = list(read_sft(tmp_path / "sft" / "validation" / "sft_data.jsonl"))
    assert [row["messages"][0]["content"] for row in held_out] == [f"question {i}" for i in range(15, 20)]
    assert len(train) == 15 and all("test" in row["id"] for row in held_out)


def test_the_split_depends_on_the_question_alone(all_copies: Path, tmp_path: Path) -> None:
    prepare(all_copies, tmp_path, "--sft", "--datasets", "smoltalk", "--validation_fraction", "0.3")
    prepare(all_copies, tmp_path, "--dpo", "--datasets", "Infinity-Preference", "--validation_fraction", "0.3")

    def questions(part: str, side: str) -> set[str]:
        read = read_sft if part == "sft" else read_dpo
        rows = read(tmp_path / part / side / f"{part}_data.jsonl")
        return {(row.get("messages") or row["prompt"])[0]["content"] for row in rows}

    assert questions("sft", "") == questions("dpo", "") and questions("sft", "validation") == questions(
        "dpo", "validation"
    )
    assert len(questions("sft", "")) + len(questions("sft", "validation")) == 20 and questions("sft", "validation")
    share = sum(in_share(identity_hash({"text": f"text {i}"}), 0.1) for i in range(5000)) / 5000
    assert 0.08 < share < 0.12


def test_the_same_command_writes_the_same_bytes(all_copies: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        prepare(all_copies, tmp_path / name)
    one, two = bytes_of(tmp_path / "one"), bytes_of(tmp_path / "two")
    assert one == two and len(one) == 9  # three parts: both sides and the report
    prepare(all_copies, tmp_path / "one", "--seed", "7")  # over the old files
    assert bytes_of(tmp_path / "one") != two


def test_a_small_run_takes_its_records_from_several_files(all_copies: Path, tmp_path: Path) -> None:
    more = ["--pretrain", "--datasets", "IndustryCorpus2", "--max_records", "4", "--validation_fraction", "0"]
    prepare(all_copies, tmp_path, *more)
    assert Counter(text[0] for text in texts_of(tmp_path / "pretrain" / "pretrain_data.jsonl")) == {"A": 2, "第": 2}
    assert prepare_datasets.SMALL_RECORDS == 1000
    prepare(all_copies, tmp_path / "small", "--dpo", "--small")
    assert list(report_of(tmp_path / "small", "dpo").values())[0]["written"] == 20


def test_bad_rows_and_shards_are_counted_and_never_stop_the_rest(problems: Path, tmp_path: Path) -> None:
    with open(problems / "gsm8k" / "train.jsonl", "ab") as file:
        file.write(b'{"question": "cut off\n\n[1, 2]\n{"question": "\xff"}\n')
        file.write(b'{"question": "q", "answer": ""}\n{"question": "q"}\n{"question": ["q"], "answer": "a"}\n')
        file.write(b'{"question": "q3", "answer": "\\ud800"}\n{"question": "q3", "answer": "again"}\n')
    folder = problems / "IndustryCorpus2" / "news_media" / "english" / "high"
    parquet(
        folder / "rank_00001.parquet", [{"text": "good", "words": "7"}, {"text": " ", "words": "8"}, {"text": None}]
    )
    (folder / "rank_00009.parquet").write_bytes(b"PAR1 this is no parquet file")
    prepare(problems, tmp_path, "--pretrain", "--sft")
    assert counts_of(tmp_path, "sft")["openai/gsm8k"] == (
        28,
        21,
        {
            "malformed JSON or UTF-8": 2,
            "not a JSON object": 1,
            "empty turn": 1,
            "row not in the layout (KeyError: 'answer')": 1,
            "row not in the layout (AttributeError: 'list' object has no attribute 'strip')": 1,
            "text with an unpaired surrogate": 1,
        },
    )
    tally = report_of(tmp_path, "sft")["openai/gsm8k"]
    assert tally["duplicate_prompts"] == 1 and tally["dropped"]["not a JSON object"]["for_example"] == [
        "train.jsonl:23"
    ]
    read, written, dropped = counts_of(tmp_path, "pretrain")["BAAI/IndustryCorpus2"]
    assert (read, written, dropped.pop("empty text")) == (3, 1, 2)
    assert list(dropped.values()) == [1] and next(iter(dropped)).startswith("unreadable file: ")
    place = report_of(tmp_path, "pretrain")["BAAI/IndustryCorpus2"]["dropped"][next(iter(dropped))]["for_example"]
    assert place == ["news_media/english/high/rank_00009.parquet"]


def test_reasons_that_carry_values_of_the_rows_do_not_grow_without_end(problems: Path, tmp_path: Path) -> None:
    rows = [{"messages": [turn(f"robot {i}", "q"), turn("assistant", "a")]} for i in range(200)]
    parquet(problems / "smoltalk" / "data" / "all" / "train-0.parquet", [{"messages": talk(1)}, *rows])
    prepare(problems, tmp_path, "--sft", "--datasets", "smoltalk", "--validation_fraction", "0")
    _, written, dropped = counts_of(tmp_path, "sft")["HuggingFaceTB/smoltalk"]
    assert written == 1 and sum(dropped.values()) == 200 and len(dropped) == 51 and dropped["other reasons"] == 150


def test_a_layout_that_changed_upstream_is_named_field_by_field(problems: Path, tmp_path: Path) -> None:
    prepare(problems, tmp_path, "--sft")
    before = bytes_of(tmp_path / "sft")
    lines(problems / "gsm8k" / "train.jsonl", [{"query": "q", "answer": 7}])
    with pytest.raises(UserError) as error:
        prepare(problems, tmp_path, "--sft")
    message = str(error.value)
    assert "question is missing (expected str)" in message and "answer is int (expected str)" in message
    assert bytes_of(tmp_path / "sft") == before  # the old files are left alone, nothing is left half-written


def test_one_dataset_folder_may_be_given_itself(all_copies: Path, tmp_path: Path) -> None:
    prepare(all_copies / "UltraFeedback", tmp_path, "--dpo")
    assert list(report_of(tmp_path, "dpo")) == ["openbmb/UltraFeedback"]


# --- interruption -------------------------------------------------------------------------------------------


def many_rows(root: Path) -> Path:
    """Two files of one dataset and a second dataset, with duplicates and bad lines, about 2 MB."""
    rows = [{"question": f"q{i % 2900} " + "x" * 300, "answer": f"a{i % 2900}" if i % 50 else ""} for i in range(3000)]
    lines(root / "gsm8k" / "train.jsonl", rows)
    lines(root / "gsm8k" / "test.jsonl", rows[:200])
    parquet(
        root / "smol-smoltalk" / "data" / "train-0.parquet", [{"messages": talk(i), "source": "s"} for i in range(3000)]
    )
    return root


SLOWED_DOWN = """
import itertools, os, signal, sys, prepare_datasets
from smolkit.sources import pipeline
pipeline.CHECKPOINT_BYTES = 50_000
rows, read = itertools.count(), pipeline.read_rows
def killed(file, start):
    for row in read(file, start):
        if next(rows) == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield row
pipeline.read_rows = killed
prepare_datasets.main(sys.argv[2:])
"""


@pytest.mark.parametrize("part", ["single", "mixture"])
def test_a_run_killed_twice_ends_with_the_bytes_of_an_uninterrupted_one(tmp_path: Path, part: str) -> None:
    root, more = many_rows(tmp_path / "copies"), ["--deduplicate", "exact", "--validation_fraction", "0.1"]
    if part == "mixture":
        mixture = tmp_path / "mixture.yaml"
        two = "[{dataset: gsm8k, weight: 1}, {dataset: smol-smoltalk, weight: 3, repeat: 2}]"
        mixture.write_text(f"sft: {{sources: {two}}}", "utf-8")
        more += ["--mixture", str(mixture)]
    else:
        more += ["--sft", "--datasets", "gsm8k", "smol-smoltalk"]
    prepare(root, tmp_path / "whole", *more)
    command = ["--source", "local", "--path", root, "--output_dir", tmp_path / "killed", *more]
    for rows in (1700, 2800):  # in the first dataset, then in the second: each run begins at the last checkpoint
        done = subprocess.run([sys.executable, "-c", SLOWED_DOWN, str(rows), *map(str, command)], cwd=ROOT)
        assert done.returncode == -signal.SIGKILL
        assert not list((tmp_path / "killed").rglob("sft/sft_data.jsonl"))  # nothing half-written under a final name
    prepare(root, tmp_path / "killed", *more)
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob(pipeline.PROGRESS))


def test_a_finished_run_is_not_repeated_and_other_settings_do_not_continue_one(
    problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(problems, tmp_path, "--sft")
    stamp = (tmp_path / "sft" / "sft_data.jsonl").stat().st_mtime_ns
    prepare(problems, tmp_path, "--sft")
    assert "already prepared" in capsys.readouterr().out
    assert (tmp_path / "sft" / "sft_data.jsonl").stat().st_mtime_ns == stamp

    def lost(file: DataFile, start: int) -> None:
        yield 0, {"question": "q0", "answer": "a"}
        raise UserError("connection lost")

    monkeypatch.setattr(pipeline, "read_rows", lost)
    with pytest.raises(UserError, match="connection lost"):
        prepare(problems, tmp_path, "--sft", "--seed", "1")
    with pytest.raises(UserError, match="other settings .seed.*--restart"):
        prepare(problems, tmp_path, "--sft", "--seed", "2")
    monkeypatch.undo()
    prepare(problems, tmp_path, "--sft", "--seed", "2", "--restart")
    assert counts_of(tmp_path, "sft") == {"openai/gsm8k": (20, 20, {})}


def test_two_runs_do_not_write_into_the_same_folder(problems: Path, tmp_path: Path) -> None:
    with pipeline.locked(tmp_path / "sft"), pytest.raises(UserError, match="another run is writing here"):
        prepare(problems, tmp_path, "--sft")


def test_the_position_of_a_stream_goes_through_json(all_copies: Path) -> None:
    files = [DataFile(f"{all_copies}/gsm8k/train.jsonl", "train.jsonl", False)]
    data = Input(gsm8k.SOURCE, files, Limits())
    whole = list(Stream(data, Settings(), lambda record: None))
    for rows in (0, 1, 7, 19, 20):
        first = Stream(data, Settings(), lambda record: None)
        begun = [record for record, _ in zip(first, range(rows), strict=False)]
        second = Stream(data, Settings(), lambda record: None)
        second.restore(json.loads(json.dumps(first.state())))
        assert begun + list(second) == whole[: len(begun)] + whole[first.tally.written :]


# --- the script ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "local"], "--path"),
        (["--path", "x"], "--path only goes with"),
        (["--source", "tiny", "--max_records", "3"], "--small"),
        (["--small", "--max_records", "3"], "--max_records 3"),
        (["--max_records", "0"], "--max_records 0"),
        (["--validation_fraction", "1"], "--validation_fraction 1"),
        (["--datasets", "nonsense"], "known are .*smol-smoltalk"),
        (["--sft", "--datasets", "UltraFeedback"], "not all belong"),
        (["--source", "local", "--path", "nowhere"], "nowhere: no such directory"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_datasets.main(arguments)


def test_a_folder_without_known_datasets_is_an_error(problems: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no dataset for pretrain, sft, dpo"):
        prepare(tmp_path / "empty", tmp_path)
    with pytest.raises(UserError, match="no dataset for dpo .*UltraFeedback"):
        prepare(problems, tmp_path, "--dpo")
    with pytest.raises(UserError, match="OpenO1-SFT: no files of O1-OPEN"):
        prepare(problems, tmp_path, "--datasets", "OpenO1-SFT")


def test_tiny_writes_every_part_and_only_what_is_asked(tmp_path: Path, run_script) -> None:
    result = run_script("prepare_datasets.py", "--source", "tiny", "--small", "--output_dir", tmp_path / "all")
    assert "rows" in result.stdout
    written = {p.relative_to(tmp_path / "all").as_posix() for p in (tmp_path / "all").rglob("*.jsonl")}
    expected = {
        f"{part}/{side}{part}_data.jsonl" for part in ("pretrain", "sft", "lora", "dpo") for side in ("", "validation/")
    }
    assert written == expected | {"exam/exam.jsonl"}
    prepare_datasets.main(["--source", "tiny", "--small", "--dpo", "--output_dir", str(tmp_path / "dpo")])
    parts = {p.name for p in (tmp_path / "dpo").iterdir()}
    assert parts == {"dpo", "exam"}
    same = Path("dpo") / "dpo_data.jsonl"
    assert (tmp_path / "dpo" / same).read_bytes() == (tmp_path / "all" / same).read_bytes()


def test_tiny_leaves_no_report_of_the_data_it_replaces(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(5)]
    lines(tmp_path / "copies" / "gsm8k" / "train.jsonl", rows)
    flags = ["--sft", "--output_dir", str(tmp_path)]
    prepare_datasets.main(["--source", "local", "--path", str(tmp_path / "copies"), "--datasets", "gsm8k", *flags])
    assert (tmp_path / "sft" / "prepare_report.json").is_file()
    prepare_datasets.main(["--source", "tiny", "--small", *flags])
    assert not (tmp_path / "sft" / "prepare_report.json").exists()


def test_list_shows_size_licence_gating_and_columns_of_every_dataset(capsys: pytest.CaptureFixture) -> None:
    prepare_datasets.main(["--list"])
    shown = capsys.readouterr().out
    assert all(f" {s.repo} " in shown and s.licence and s.size in shown for s in sources.ALL)
    entry = shown[shown.index("pretrain  BAAI/IndustryCorpus2") :].split("pretrain  HuggingFaceFW")[0]
    for words in (
        "Apache-2.0",
        "1 TB Chinese, 2.2 TB English (default) (gated)",
        "columns text: str",
        "high, middle, low",
    ):
        assert words in entry
    assert "python-edu is refused: python-edu holds only file identifiers" in shown


def test_the_real_samples_convert_without_loss(samples: Path, tmp_path: Path) -> None:
    prepare(samples, tmp_path)
    found, files = {}, {}
    for part, read in (("pretrain", read_pretrain), ("sft", read_sft), ("dpo", read_dpo)):
        found |= counts_of(tmp_path, part)
        files[part] = [len(list(read(tmp_path / part / side / f"{part}_data.jsonl"))) for side in ("", "validation")]
    assert found == {
        "BAAI/IndustryCorpus2": (200, 200, {}),
        "BAAI/Infinity-Instruct": (200, 200, {}),
        "openai/gsm8k": (7473, 7473, {}),
        "BAAI/Infinity-Preference": (200, 200, {}),
    }
    assert {part: sum(counts) for part, counts in files.items()} == {"pretrain": 200, "sft": 7673, "dpo": 200}
    assert files["dpo"][1] >= 100  # the publisher's test file
    assert report_of(tmp_path, "sft")["openai/gsm8k"]["duplicate_prompts"] == 1
