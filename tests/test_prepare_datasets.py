"""Every source's converter on rows in the dataset's own layout, the pipeline around them, and the script."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import prepare_datasets
from smolkit import sources
from smolkit.doctor import read_dpo, read_pretrain, read_sft
from smolkit.errors import UserError
from smolkit.sources import files, gsm8k, infinity_instruct, openo1_sft, smoltalk, ultrafeedback
from smolkit.sources.base import Rejected, RowContext
from smolkit.sources.pipeline import is_validation

CONTEXT = RowContext(path="data/all/train-00000-of-00001.parquet", index=4, seed=0)


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def talk(i: int) -> list[dict]:
    return [turn("user", f"question {i}"), turn("assistant", f"answer {i}")]


def completion(score: object, response: str) -> dict:
    return {"model": "m", "response": response, "overall_score": score, "annotations": {"honesty": {"Rating": "N/A"}}}


# --- converters ---------------------------------------------------------------------------------------------


def test_smoltalk_names_the_configuration_where_the_row_has_no_source() -> None:
    record = smoltalk.convert({"messages": talk(1), "source": None}, CONTEXT)
    assert record == {"id": "smoltalk-all-train-00000-of-00001-4", "source": "all", "messages": talk(1)}
    assert smoltalk.convert({"messages": talk(1), "source": "x"}, CONTEXT)["source"] == "x"


def test_infinity_instruct_roles_are_translated_and_an_empty_system_prompt_dropped() -> None:
    turns = [{"from": "system", "value": ""}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    row = {"id": 3, "conversations": turns, "source": "s"}
    record = infinity_instruct.convert(row, RowContext("7M/train-0.parquet", 0, 0))
    assert record == {
        "id": "infinity-instruct-7M-3",
        "source": "s",
        "messages": [turn("user", "q"), turn("assistant", "a")],
    }
    turns[0]["value"] = "be kind"
    messages = infinity_instruct.convert(row, RowContext("7M/train-0.parquet", 0, 0))["messages"]
    assert messages[0] == turn("system", "be kind")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([turn("user", "q")], "alternate"),
        ([turn("assistant", "a")], "alternate"),
        ([turn("user", "q"), turn("user", "q")], "alternate"),
        ([turn("user", "q"), turn("system", "s"), turn("user", "q"), turn("assistant", "a")], "alternate"),
        ([], "alternate"),
        ([turn("user", "q"), turn("assistant", " ")], "empty turn"),
        ([turn("user", "q"), turn("assistant", None)], "empty turn"),
        ([turn("user", "q"), turn("robot", "a")], "unknown role"),
    ],
)
def test_conversations_that_cannot_be_trained_on_are_rejected_by_reason(messages: list, reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        smoltalk.convert({"messages": messages}, CONTEXT)


def test_openo1_keeps_its_thoughts() -> None:
    row = {"instruction": "2+2?", "output": "<Thought>sum</Thought><Output>4</Output>"}
    messages = openo1_sft.convert(row, CONTEXT)["messages"]
    assert messages == [turn("user", "2+2?"), turn("assistant", row["output"])]


def test_gsm8k_loses_its_calculator_marks_and_keeps_its_result() -> None:
    row = {"question": "How many?", "answer": "She sold 48/2 = <<48/2=24>>24 clips.\n#### 24"}
    assert gsm8k.convert(row, CONTEXT)["messages"][1]["content"] == "She sold 48/2 = 24 clips.\n#### 24"


def test_ultrafeedback_takes_the_best_against_a_strictly_worse_answer() -> None:
    scores = [completion("7.5", "b"), completion(9, "best"), completion("N/A", "n"), completion(9.0, "also best")]
    row = {"source": "flan", "instruction": "q", "completions": [*scores, completion(2, "c"), completion(None, "d")]}
    rejected = Counter()
    for seed in range(40):
        record = ultrafeedback.convert(row, RowContext("flan.jsonl", 7, seed))
        assert record["chosen"] == "best" and record["id"] == "ultrafeedback-flan-7" and record["prompt"] == "q"
        rejected[record["rejected"]] += 1
        assert record == ultrafeedback.convert(row, RowContext("flan.jsonl", 7, seed))
    assert set(rejected) == {"b", "c"} and min(rejected.values()) > 8  # both are drawn, and only those


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"source": "truthful_qa", "instruction": "q", "completions": []}, "evaluation set"),
        ({"source": "s", "instruction": "q", "completions": [completion(3, "a")]}, "fewer than two"),
        ({"source": "s", "instruction": "q", "completions": [completion(3, "a"), completion("N/A", "b")]}, "fewer"),
        ({"source": "s", "instruction": "q", "completions": [completion(3, "a"), completion("nan", "b")]}, "fewer"),
        ({"source": "s", "instruction": "q", "completions": [completion(3, "a"), completion("3", "b")]}, "same score"),
        ({"source": "s", "instruction": "q", "completions": [completion(3, "a"), completion(1, "a ")]}, "same text"),
        ({"source": "s", "instruction": " ", "completions": [completion(3, "a"), completion(1, "b")]}, "empty prompt"),
    ],
)
def test_ultrafeedback_rows_that_teach_nothing_are_rejected_by_reason(row: dict, reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        ultrafeedback.convert(row, CONTEXT)


# --- generated twins of every layout ------------------------------------------------------------------------


def parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """One small folder per dataset, in the layout it has on the hub, 20 good rows in each."""
    root = tmp_path / "copies"
    n = range(20)
    english = [{"text": f"An English document {i}.", "num_words": i, "industry_type": "住宿"} for i in n[:10]]
    chinese = [{"text": f"第{i}篇中文文章。", "num_words": str(i), "_id": i} for i in n[:10]]
    parquet(root / "IndustryCorpus2" / "news_media" / "english" / "high" / "rank_00001.parquet", english)
    parquet(root / "IndustryCorpus2" / "news_media" / "chinese" / "high" / "rank_00002.parquet", chinese)
    parquet(root / "IndustryCorpus2" / "news_media" / "english" / "low" / "rank_00003.parquet", english)
    pairs = [{"messages": talk(i), "source": "self"} for i in n]
    parquet(root / "smol-smoltalk" / "data" / "train-00000-of-00001.parquet", pairs[:15])
    parquet(root / "smol-smoltalk" / "data" / "test-00000-of-00001.parquet", pairs[15:])
    parquet(root / "smoltalk" / "data" / "all" / "train-00000-of-00001.parquet", pairs)
    parquet(root / "smoltalk" / "data" / "apigen-80k" / "train-00000-of-00001.parquet", pairs)
    lines(root / "OpenO1-SFT" / "OpenO1-SFT.jsonl", [{"instruction": f"q{i}", "output": f"a{i}"} for i in n])
    lines(root / "gsm8k" / "train.jsonl", [{"question": f"q{i}", "answer": f"#### {i}"} for i in n])
    shared = [[{"from": "human", "value": f"问{i}"}, {"from": "gpt", "value": f"答{i}"}] for i in n]
    rows = [{"id": i, "conversations": c, "source": "x", "reward": 1.0} for i, c in enumerate(shared)]
    parquet(root / "infinity_instruct" / "7M" / "train-00000-of-00075.parquet", rows[:10])
    rows = [{**row, "id": str(row["id"])} for row in rows]
    parquet(root / "infinity_instruct" / "Gen" / "train-00000-of-00015.parquet", rows[10:])
    scored = [completion(5.0, "good"), completion("2", "bad")]
    rows = [{"source": "flan", "instruction": f"q{i}", "completions": scored, "models": ["m"]} for i in n]
    lines(root / "UltraFeedback" / "flan.jsonl", rows)
    chats = [{"chosen": talk(i), "rejected": [*talk(i)[:1], turn("assistant", "no")]} for i in n]
    rows = [{**chat, "prompt": f"question {i}", "prompt_id": f"p{i}"} for i, chat in enumerate(chats)]
    parquet(root / "ultrafeedback_binarized" / "data" / "train_prefs-00000-of-00001.parquet", rows[:15])
    parquet(root / "ultrafeedback_binarized" / "data" / "test_prefs-00000-of-00001.parquet", rows[15:])
    rows = [{**chat, "prompt": f"question {i}", "id": i} for i, chat in enumerate(chats)]
    parquet(root / "datasets--BAAI--Infinity-Preference" / "data" / "train-00000-of-00001.parquet", rows)
    return root


def prepare(copies: Path, output_dir: Path, *more: object) -> None:
    arguments = ["--source", "local", "--path", copies, "--output_dir", output_dir, *more]
    prepare_datasets.main([str(a) for a in arguments])


def report_of(output_dir: Path, part: str) -> dict:
    return json.loads((output_dir / part / "prepare_report.json").read_text())["sources"]


def test_every_known_dataset_converts_from_a_local_copy_without_loss(copies: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    prepare(copies, out)
    converted = {}
    for part, read in (("pretrain", read_pretrain), ("sft", read_sft), ("dpo", read_dpo)):
        converted |= report_of(out, part)
        train, held_out = out / part / f"{part}_data.jsonl", out / part / "validation" / f"{part}_data.jsonl"
        count = len(list(read(train))) + (len(list(read(held_out))) if held_out.exists() else 0)
        assert count == sum(source["written"] for source in report_of(out, part).values())
    assert converted == {s.repo: {"read": 20, "written": 20, "dropped": {}} for s in sources.ALL}
    text = [json.loads(line) for line in (out / "pretrain" / "pretrain_data.jsonl").read_text("utf-8").splitlines()]
    assert {row["category"] for row in text} == {"news_media"}
    assert {"第3篇中文文章。", "An English document 3."} <= {row["text"] for row in text}


def test_what_the_publisher_held_out_is_never_trained_on(copies: Path, tmp_path: Path) -> None:
    prepare(copies, tmp_path, "--sft", "--datasets", "smol-smoltalk", "--validation_fraction", "0")
    train = list(read_sft(tmp_path / "sft" / "sft_data.jsonl"))
    held_out = list(read_sft(tmp_path / "sft" / "validation" / "sft_data.jsonl"))
    assert [row["messages"][0]["content"] for row in held_out] == [f"question {i}" for i in range(15, 20)]
    assert len(train) == 15 and all("test" in row["id"] for row in held_out)


def test_the_split_depends_on_the_question_alone(copies: Path, tmp_path: Path) -> None:
    prepare(copies, tmp_path, "--sft", "--dpo", "--validation_fraction", "0.3")

    def questions(part: str, validation: bool) -> set[str]:
        path = tmp_path / part / ("validation" if validation else "") / f"{part}_data.jsonl"
        read = read_sft if part == "sft" else read_dpo
        return {(row.get("messages") or row["prompt"])[0]["content"] for row in read(path)}

    train = questions("sft", False) | questions("dpo", False)
    held_out = questions("sft", True) | questions("dpo", True)
    publishers = {f"question {i}" for i in range(15, 20)}  # the test files of two datasets
    assert not any(is_validation({"prompt": q}, 0.3) for q in train)
    assert all(is_validation({"prompt": q}, 0.3) for q in held_out - publishers)
    assert questions("sft", True) & questions("dpo", True) - publishers  # the same question, the same side
    share = sum(is_validation({"text": f"text {i}"}, 0.1) for i in range(5000)) / 5000
    assert 0.08 < share < 0.12


def test_the_same_command_writes_the_same_bytes(copies: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        prepare(copies, tmp_path / name)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("*.jsonl")} for n in ("one", "two"))
    assert one == two and len(one) >= 3
    prepare(copies, tmp_path / "one", "--seed", "7")  # over the old files


def test_limits_spread_over_files(copies: Path, tmp_path: Path) -> None:
    prepare(copies, tmp_path, "--pretrain", "--max_records", "4", "--validation_fraction", "0")
    texts = [row["text"] for row in read_pretrain(tmp_path / "pretrain" / "pretrain_data.jsonl")]
    assert len(texts) == 4 and len([t for t in texts if t.startswith("An")]) == 2  # both languages
    prepare(copies, tmp_path, "--pretrain", "--max_tokens", "20", "--validation_fraction", "0")
    texts = [row["text"] for row in read_pretrain(tmp_path / "pretrain" / "pretrain_data.jsonl")]
    size = sum(len(text.encode()) for text in texts)
    assert 80 <= size < 80 + len(texts[-1].encode())  # 20 tokens of 4 bytes, the last record whole


def test_bad_rows_and_shards_are_counted_and_never_stop_the_rest(copies: Path, tmp_path: Path) -> None:
    with open(copies / "gsm8k" / "train.jsonl", "ab") as file:
        file.write(b'{"question": "cut off\n\n[1, 2]\n{"question": "\xff"}\n')
        file.write(b'{"question": "q", "answer": ""}\n{"question": "q"}\n{"question": ["q"], "answer": "a"}\n')
    broken = copies / "IndustryCorpus2" / "news_media" / "english" / "high" / "rank_00009.parquet"
    broken.write_bytes(b"PAR1 this is no parquet file")
    prepare(copies, tmp_path, "--pretrain", "--sft")
    tally = report_of(tmp_path, "sft")["openai/gsm8k"]
    assert tally["written"] == 20 and tally["read"] == 26
    dropped = tally["dropped"]
    assert dropped["malformed JSON or UTF-8"] == 2 and dropped["not a JSON object"] == 1
    assert dropped["empty turn"] == 1 and sum(dropped.values()) == 6
    dropped = report_of(tmp_path, "pretrain")["BAAI/IndustryCorpus2"]["dropped"]
    assert list(dropped.values()) == [1] and "unreadable file news_media/english/high/rank_00009" in next(iter(dropped))


def test_compressed_lines_are_read(copies: Path, tmp_path: Path) -> None:
    path = copies / "gsm8k" / "train.jsonl"
    packed = tmp_path / "train.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    rows = list(files.read_rows(files.DataFile(packed.as_posix(), packed.name, False)))
    assert len(rows) == 20 and rows[3] == (3, {"question": "q3", "answer": "#### 3"})


def test_a_layout_that_changed_upstream_is_named_field_by_field(copies: Path, tmp_path: Path) -> None:
    lines(copies / "gsm8k" / "train.jsonl", [{"query": "q", "answer": 7}])
    with pytest.raises(UserError) as error:
        prepare(copies, tmp_path, "--sft")
    message = str(error.value)
    assert "question is missing (expected str)" in message and "answer is int (expected str)" in message
    assert not (tmp_path / "sft" / "sft_data.jsonl").exists() and not list((tmp_path / "sft").glob(".*"))


def test_a_failing_run_leaves_the_old_files_alone(copies: Path, tmp_path: Path) -> None:
    prepare(copies, tmp_path, "--sft")
    before = (tmp_path / "sft" / "sft_data.jsonl").read_bytes()
    lines(copies / "gsm8k" / "train.jsonl", [{"query": "q"}])
    with pytest.raises(UserError):
        prepare(copies, tmp_path, "--sft")
    assert (tmp_path / "sft" / "sft_data.jsonl").read_bytes() == before


def test_one_dataset_folder_may_be_given_itself(copies: Path, tmp_path: Path) -> None:
    prepare(copies / "UltraFeedback", tmp_path, "--dpo")
    assert list(report_of(tmp_path, "dpo")) == ["openbmb/UltraFeedback"]


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


def test_a_folder_without_known_datasets_is_an_error(copies: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no dataset for pretrain, sft, dpo"):
        prepare(tmp_path / "empty", tmp_path)
    with pytest.raises(UserError, match="no dataset for dpo .*UltraFeedback"):
        prepare(copies / "gsm8k", tmp_path, "--dpo")
    with pytest.raises(UserError, match="OpenO1-SFT: no files of O1-OPEN"):
        prepare(copies / "gsm8k", tmp_path, "--datasets", "OpenO1-SFT")


def test_the_hub_out_of_reach_is_one_clear_line_and_nothing_instead(tmp_path: Path, run_script) -> None:
    result = run_script("prepare_datasets.py", "--small", "--output_dir", tmp_path, expect=2)
    assert len(result.stderr.strip().splitlines()) == 1
    for word in ("BAAI/IndustryCorpus2", "--source local", "--source tiny", "HF_ENDPOINT"):
        assert word in result.stderr
    assert not any(tmp_path.rglob("*"))


def test_hub_files_are_listed_at_the_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    class Api:
        def auth_check(self, repo: str, repo_type: str) -> None:
            asked.append((repo, repo_type))

        def list_repo_files(self, repo: str, repo_type: str, revision: str) -> list[str]:
            asked.append((repo, repo_type, revision))
            return ["README.md", "flan.jsonl", "false_qa.jsonl", "data/other.jsonl"]

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    source = ultrafeedback.SOURCE
    found = files.hub_files(source)
    prefix = f"hf://datasets/openbmb/UltraFeedback@{source.revision}/"
    assert [file.url for file in found] == [prefix + "flan.jsonl", prefix + "false_qa.jsonl"]
    assert asked[1] == ("openbmb/UltraFeedback", "dataset", "40b436560ca83a8dba36114c22ab3c66e43f6d5e")


def test_a_lost_connection_stops_instead_of_counting_as_a_bad_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: files.DataFile) -> None:
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(files, "read_json_lines", fail)
    with pytest.raises(UserError, match="connection lost .*reset by peer"):
        list(files.read_rows(files.DataFile("hf://datasets/a/b@main/x.jsonl", "x.jsonl", False)))


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


def test_list_names_every_dataset(capsys: pytest.CaptureFixture) -> None:
    prepare_datasets.main(["--list"])
    shown = capsys.readouterr().out
    assert all(source.repo in shown and source.licence in shown for source in sources.ALL)


def test_the_real_samples_convert_without_loss(samples: Path, tmp_path: Path) -> None:
    prepare(samples, tmp_path)
    found = {}
    for part, read in (("pretrain", read_pretrain), ("sft", read_sft), ("dpo", read_dpo)):
        found |= report_of(tmp_path, part)
        assert list(read(tmp_path / part / f"{part}_data.jsonl"))
    assert found == {
        "BAAI/IndustryCorpus2": {"read": 200, "written": 200, "dropped": {}},
        "BAAI/Infinity-Instruct": {"read": 200, "written": 200, "dropped": {}},
        "openai/gsm8k": {"read": 7473, "written": 7473, "dropped": {}},
        "BAAI/Infinity-Preference": {"read": 200, "written": 200, "dropped": {}},
    }
