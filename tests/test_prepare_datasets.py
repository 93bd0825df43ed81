"""The pipeline around the converters, and the script: files in each dataset's own layout go in, our files come out."""

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import prepare_datasets
from smolkit import sources
from smolkit.doctor import expand_paths, read_dpo, read_pretrain, read_sft
from smolkit.errors import UserError
from smolkit.sources import gsm8k, output, pipeline
from smolkit.sources.files import DataFile
from smolkit.sources.pipeline import Input, Limits, Settings, Stream, identity_hash, in_share, opening_hash

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


QUESTIONS = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(20)]


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
    expected = {s.repo: (20, 20, {}) for s in sources.ALL if s.on_hub}
    # Questions 15 to 19 are held out by smol-smoltalk and ultrachat, and by both binarised UltraFeedbacks.
    shared = dict.fromkeys(("HuggingFaceTB/smoltalk", "BAAI/Infinity-Preference"), (20, 15, {pipeline.HELD_OUT: 5}))
    assert converted == expected | shared
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


def asked(output_dir: Path, side: str = "") -> list[str]:
    """What the user says first, in the SFT rows of one side."""
    return [row["messages"][0]["content"] for row in read_sft(output_dir / "sft" / side / "sft_data.jsonl")]


@pytest.mark.parametrize("more", [[], ["--deduplicate", "exact"], ["--deduplicate", "near"], ["--max_records", "60"]])
def test_a_question_of_the_held_out_files_is_not_trained_on_from_the_others(tmp_path: Path, more: list[str]) -> None:
    """Five questions stand in both files of a publisher, with other answers, and two of them in another's file."""
    words = [f"the {n} old bridges of {n * 7} towns are open to all {n + 3} carts on day {n * 13}" for n in range(40)]
    rows = [{"question": f"{text}, why?", "answer": f"since {n}"} for n, text in enumerate(words)]
    lines(tmp_path / "gsm8k" / "train.jsonl", rows)
    lines(tmp_path / "gsm8k" / "test.jsonl", [{**row, "answer": "so"} for row in rows[:5]])
    others = [{"instruction": row["question"], "output": "a"} for row in rows[3:5]]
    others.append({"instruction": "Who are you?", "output": "a"})
    lines(tmp_path / "OpenO1-SFT" / "OpenO1-SFT.jsonl", others)
    names = ["OpenO1-SFT", "gsm8k"]  # what is held out is known before the first of them is converted
    prepare(tmp_path, tmp_path, "--sft", "--datasets", *names, "--validation_fraction", "0", *more)
    assert asked(tmp_path, "validation") == [row["question"] for row in rows[:5]]
    assert sorted(asked(tmp_path)) == sorted([*(row["question"] for row in rows[5:]), "Who are you?"])
    counts = {"openai/gsm8k": (45, 40, {pipeline.HELD_OUT: 5}), "O1-OPEN/OpenO1-SFT": (3, 1, {pipeline.HELD_OUT: 2})}
    assert counts_of(tmp_path, "sft") == counts
    assert report_of(tmp_path, "sft")["openai/gsm8k"]["dropped"][pipeline.HELD_OUT]["for_example"][0] == "train.jsonl:1"


@pytest.mark.parametrize(("kind", "change"), [("exact", "  "), ("near", "! ")])
def test_of_two_copies_the_one_that_the_publisher_held_out_stays(tmp_path: Path, kind: str, change: str) -> None:
    text = " ".join(f"word{n}" for n in range(60))
    lines(tmp_path / "gsm8k" / "train.jsonl", [{"question": f"{change}{text}", "answer": "a"}, *QUESTIONS[:3]])
    lines(tmp_path / "gsm8k" / "test.jsonl", [{"question": text, "answer": "a"}])
    others = [{"instruction": question, "output": "a"} for question in ("Who?", f"{text}{change}")]
    lines(tmp_path / "OpenO1-SFT" / "OpenO1-SFT.jsonl", others)  # read before gsm8k's training rows
    names = ["--datasets", "OpenO1-SFT", "gsm8k"]
    prepare(tmp_path, tmp_path, "--sft", *names, "--validation_fraction", "0", "--deduplicate", kind)
    assert asked(tmp_path, "validation") == [text] and asked(tmp_path) == ["Who?", "q0", "q1", "q2"]


def test_a_greeting_is_no_question(tmp_path: Path) -> None:
    def hello(greeting: str, question: str) -> dict:
        turns = [turn("user", greeting), turn("assistant", "Hello!"), turn("user", question), turn("assistant", "Yes.")]
        return {"messages": turns}

    folder = tmp_path / "smoltalk" / "data" / "everyday-conversations"
    held_out = [hello("Hi", "Is tea better than coffee?"), {"messages": talk(7)}]
    same = [*held_out, hello("Hi", "Is tea better than coffee?")]
    parquet(folder / "train-0.parquet", [hello("Hi", f"Are there {n} rivers?") for n in range(9)] + same)
    parquet(folder / "test-0.parquet", held_out)
    names = ["--datasets", "smoltalk:everyday-conversations", "--validation_fraction", "0"]
    prepare(tmp_path, tmp_path, "--sft", *names)
    assert counts_of(tmp_path, "sft") == {"HuggingFaceTB/smoltalk": (14, 11, {pipeline.HELD_OUT: 3})}
    long = "What is the longest river of them all?"
    assert opening_hash(hello(long, "a")) == opening_hash(hello(long, "b")) == opening_hash({"prompt": long})


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


def test_a_limit_is_reached_as_long_as_there_are_rows(tmp_path: Path) -> None:
    """A file that has fewer rows than its share leaves the rest to the others, and then to what those held back."""
    data = tmp_path / "smol-smoltalk" / "data"
    parts = {"train-0": range(30), "train-1": range(30, 1030), "test-0": range(2000, 2400)}
    for name, numbers in parts.items():
        parquet(data / f"{name}.parquet", [{"messages": talk(i), "source": "s"} for i in numbers])
    for limit, held_out in ((100, 5), (1030, 51), (1400, 370), (1430, 400), (9999, 400)):
        folder = tmp_path / str(limit)
        prepare(tmp_path, folder, "--sft", "--max_records", limit, "--validation_fraction", "0")
        numbers = [int(text.split()[1]) for text in asked(folder, "validation")]
        assert numbers == list(range(2000, 2000 + held_out)), limit  # few while there are others, at last all
        numbers = [int(text.split()[1]) for text in asked(folder)]
        assert len(numbers) == len(set(numbers)) == min(limit, 1430) - held_out and set(numbers) >= set(range(30))
        assert counts_of(folder, "sft")["HuggingFaceTB/smol-smoltalk"][0] == min(limit, 1430)  # none is read twice


def test_a_token_budget_is_reached_as_long_as_there_are_texts(tmp_path: Path) -> None:
    folder = tmp_path / "IndustryCorpus2" / "law"
    english, chinese = [f"English text number {i:03}. " * 20 for i in range(500)], [f"中文{i}" * 20 for i in range(5)]
    parquet(folder / "english" / "high" / "r.parquet", [{"text": text} for text in english])
    parquet(folder / "chinese" / "high" / "r.parquet", [{"text": text} for text in chinese])
    prepare(tmp_path, tmp_path, "--pretrain", "--max_tokens", "20000", "--validation_fraction", "0")
    texts = texts_of(tmp_path / "pretrain" / "pretrain_data.jsonl")
    size = sum(len(text.encode()) for text in texts)
    assert 80_000 <= size < 80_000 + len(english[0]) and len(set(texts)) == len(texts) and set(chinese) < set(texts)


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
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob(output.PROGRESS))


def test_a_limited_run_interrupted_anywhere_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every third row that is read: while the held-out files are looked through, in each pass, between files."""
    data = tmp_path / "copies" / "smol-smoltalk" / "data"
    parts = {"train-0": range(3), "train-1": range(3, 30), "train-2": range(25, 60), "test-0": range(55, 75)}
    for name, numbers in parts.items():
        parquet(data / f"{name}.parquet", [{"messages": talk(i), "source": "s"} for i in numbers])
    more = ["--sft", "--max_records", "45", "--validation_fraction", "0.2", "--deduplicate", "exact"]
    prepare(data.parent.parent, tmp_path / "whole", *more)
    read_rows, interruptions = pipeline.read_rows, 0
    for wanted in range(0, 100, 3):
        rows = iter(range(1000))

        def lost(file: DataFile, start: int, rows=rows, wanted=wanted) -> Iterator:
            for row in read_rows(file, start):
                if next(rows) == wanted:
                    raise UserError("connection lost")
                yield row

        output_dir = tmp_path / str(wanted)
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "read_rows", lost)
            try:
                prepare(data.parent.parent, output_dir, *more)
            except UserError:
                interruptions += 1
        prepare(data.parent.parent, output_dir, *more)
        assert bytes_of(output_dir) == bytes_of(tmp_path / "whole"), wanted
    assert 20 < interruptions < 33 and counts_of(tmp_path / "whole", "sft")["HuggingFaceTB/smol-smoltalk"][1] == 45


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
    with output.locked(tmp_path / "sft"), pytest.raises(UserError, match="another run is writing here"):
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
        (["--source", "tiny", "--language", "chinese", "--deduplicate", "near"], "--deduplicate, --language: not with"),
        (["--source", "tiny", "--validation_fraction", "0.5"], "--validation_fraction: not with --source tiny"),
        (["--source", "tiny", "--max_tokens", "1e6", "--keep_languages", "zh"], "--keep_languages, --max_tokens: not"),
        (["--source", "tiny", "--decontaminate", "x", "--min_characters", "9"], "--decontaminate, --min_characters: "),
        (["--deduplicate", "near", "--near_threshold", "80"], "--near_threshold 80.0: must be at most 1"),
        (["--deduplicate", "near", "--near_threshold", "0"], "--near_threshold 0.0: must be above 0"),
        (["--near_threshold", "0.9"], "--near_threshold 0.9: only --deduplicate near uses it"),
        (["--sft", "--datasets", "gsm8k", "--language", "chinese"], "--language chinese: only IndustryCorpus2 has it"),
        (["--dpo", "--industry", "law", "news"], "--industry law news: only IndustryCorpus2 has it, which is not sel"),
        (["--quality", "low", "--pretrain", "--datasets", "fineweb"], "--quality low: only IndustryCorpus2 has it"),
        (["--datasets", "gsm8k", "openai/gsm8k"], "gsm8k and openai/gsm8k both take .* of openai/gsm8k"),
        (["--datasets", "gsm8k", "gsm8k"], "gsm8k and gsm8k both take"),
        (["--datasets", "gsm8k", "gsm8k@abc"], "gsm8k and gsm8k@abc both take"),
        (["--datasets", "smoltalk:longalign,all", "smoltalk"], "both take data/all/train"),
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


def test_choices_that_no_dataset_of_a_folder_has_are_refused(problems: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--language chinese: only IndustryCorpus2 has it"):
        prepare(problems, tmp_path, "--language", "chinese")
    assert not list(tmp_path.rglob("*_data.jsonl"))


def test_two_configurations_of_a_dataset_are_told_apart_in_the_report(all_copies: Path, tmp_path: Path) -> None:
    prepare(all_copies, tmp_path, "--sft", "--datasets", "smoltalk:everyday-conversations", "smoltalk", "gsm8k")
    counts = {name: (read, written) for name, (read, written, _) in counts_of(tmp_path, "sft").items()}
    assert counts == {
        "HuggingFaceTB/smoltalk:everyday-conversations": (3, 3),
        "HuggingFaceTB/smoltalk:all": (20, 20),
        "openai/gsm8k": (20, 20),
    }
    repos = [source["repo"] for source in report_of(tmp_path, "sft").values()]
    assert repos == ["HuggingFaceTB/smoltalk", "HuggingFaceTB/smoltalk", "openai/gsm8k"]


def leave_shards(folder: Path, part: str) -> Path:
    """What a run on executors leaves there, and a file of the user's own, whose path is returned."""
    for name in ("-00000.jsonl", "-00012.jsonl"):
        for side in ("", "validation/"):
            lines(folder / f"{side}{part}_data{name}", [{"text": "of an earlier run"}])
    lines(folder / "tokens" / "manifest.json", [{}])
    lines(folder / f"{part}_data-mine.jsonl", [{"text": "mine"}])
    return folder / f"{part}_data-mine.jsonl"


@pytest.mark.parametrize("kind", ["plain", "mixture", "tiny"])
def test_what_another_kind_of_run_left_is_removed(problems: Path, tmp_path: Path, kind: str) -> None:
    """A directory as --data_path would train on both."""
    mine = leave_shards(tmp_path / "sft", "sft")
    (tmp_path / "m.yaml").write_text("sft: {sources: [{dataset: gsm8k, weight: 1}]}", "utf-8")
    if kind == "tiny":
        prepare_datasets.main(["--source", "tiny", "--small", "--sft", "--output_dir", str(tmp_path)])
    else:
        more = ["--mixture", tmp_path / "m.yaml"] if kind == "mixture" else ["--sft"]
        prepare(problems, tmp_path, *more, "--validation_fraction", "0.3")
    visible = expand_paths([tmp_path / "sft", tmp_path / "sft" / "validation"], (".jsonl",))
    names = {path.relative_to(tmp_path / "sft").as_posix() for path in visible}
    assert names == {"sft_data.jsonl", "validation/sft_data.jsonl", mine.name}
    assert not (tmp_path / "sft" / "tokens").exists()


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
