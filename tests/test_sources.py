"""Every converter on hand-written rows, and the reading of files through `datasets`."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from smolkit.chat import validate_messages, validate_tools
from smolkit.errors import UserError
from smolkit.sources import (
    alpaca_cleaned,
    fineweb,
    glaive_toolcall,
    gsm8k,
    hermes_function_calling,
    infinity_instruct,
    openai_tools,
    openo1_sft,
    smoltalk,
    trl_ultrafeedback,
    ultrafeedback,
)
from smolkit.sources.base import Rejected, RowContext
from smolkit.sources.files import DataFile, LayoutChanged, Unreadable, check_columns, find_folder, read_rows, spread
from smolkit.sources.selection import parse_dataset

CONTEXT = RowContext(path="data/all/train-00000-of-00001.parquet", index=4, seed=0)
WEATHER = {"name": "weather", "description": "of a town", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Rome"}}}


def turn(role: str, content: str | None) -> dict:
    return {"role": role, "content": content}


def said(who: str, value: str) -> dict:
    return {"from": who, "value": value}


def completion(score: object, response: str) -> dict:
    return {"model": "m", "response": response, "overall_score": score, "annotations": {"honesty": {"Rating": "N/A"}}}


# --- conversations ------------------------------------------------------------------------------------------


def test_smoltalk_names_the_configuration_where_the_row_has_no_source() -> None:
    talk = [turn("user", "q"), turn("assistant", "a")]
    record = smoltalk.convert({"messages": talk, "source": None}, CONTEXT)
    assert record == {"id": "smoltalk-all-train-00000-of-00001-4", "source": "all", "messages": talk}
    assert smoltalk.convert({"messages": talk, "source": "x"}, CONTEXT)["source"] == "x"


def test_infinity_instruct_roles_are_translated_and_an_empty_system_prompt_dropped() -> None:
    turns = [said("system", ""), said("human", "q"), said("gpt", "a")]
    row = {"id": 3, "conversations": turns, "source": "s"}
    context = RowContext("7M/train-0.parquet", 0, 0)
    record = infinity_instruct.convert(row, context)
    messages = [turn("user", "q"), turn("assistant", "a")]
    assert record == {"id": "infinity-instruct-7M-3", "source": "s", "messages": messages}
    turns[0]["value"] = "be kind"
    assert infinity_instruct.convert(row, context)["messages"] == [turn("system", "be kind"), *messages]


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


def test_openo1_thoughts_are_kept_or_stripped() -> None:
    row = {"instruction": "2+2?", "output": "<Thought>\nsum\n</Thought>\n<Output>\n4, so\n4</Output>"}
    assert openo1_sft.convert(row, CONTEXT)["messages"] == [turn("user", "2+2?"), turn("assistant", row["output"])]
    strip = RowContext("OpenO1-SFT.jsonl", 0, 0, thoughts="strip")
    assert openo1_sft.convert(row, strip)["messages"][1]["content"] == "4, so\n4"
    plain = {"instruction": "q", "output": "no tags"}
    assert openo1_sft.convert(plain, strip)["messages"][1]["content"] == "no tags"
    with pytest.raises(Rejected, match="not closed"):
        openo1_sft.convert({"instruction": "q", "output": "<Thought>on and on <Output>4</Output>"}, strip)
    with pytest.raises(Rejected, match="empty turn"):
        openo1_sft.convert({"instruction": "q", "output": "<Thought>on and on</Thought>"}, strip)


def test_gsm8k_loses_its_calculator_marks_and_keeps_its_result() -> None:
    row = {"question": "How many?", "answer": "She sold 48/2 = <<48/2=24>>24 clips.\n#### 24"}
    assert gsm8k.convert(row, CONTEXT)["messages"][1]["content"] == "She sold 48/2 = 24 clips.\n#### 24"


def test_alpaca_joins_the_input_where_there_is_one() -> None:
    asked = {"instruction": "Sort.", "input": "", "output": "1 2"}
    assert alpaca_cleaned.convert(asked, CONTEXT)["messages"] == [turn("user", "Sort."), turn("assistant", "1 2")]
    asked["input"] = "2 1"
    assert alpaca_cleaned.convert(asked, CONTEXT)["messages"][0]["content"] == "Sort.\n\n2 1"


# --- function calls -----------------------------------------------------------------------------------------

HERMES_SYSTEM = "You may call functions. <tools> [{t}] </tools> Answer in <tool_call> tags.".replace(
    "{t}", json.dumps({"type": "function", "function": WEATHER})
)


def test_four_forms_of_a_function_call_become_the_same_conversation() -> None:
    hermes_call = '<tool_call>\n{"name": "weather", "arguments": {"town": "Rome"}}\n</tool_call>'
    hermes = {
        "id": "1",
        "conversations": [
            said("system", HERMES_SYSTEM),
            said("human", "Rome?"),
            said("gpt", hermes_call),
            said("tool", "<tool_response>\nsunny\n</tool_response>"),
            said("gpt", "Sunny."),
        ],
    }
    call = {"name": "weather", "arguments": {"town": "Rome"}}
    glaive = {
        "conversations": [
            said("human", "Rome?"),
            said("function_call", json.dumps(call)),
            said("observation", "sunny"),
            said("gpt", "Sunny."),
        ],
        "tools": json.dumps([WEATHER]),
    }
    openai_call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Rome"}'}}
    openai = {
        "messages": [
            turn("user", "Rome?"),
            {"role": "assistant", "content": None, "tool_calls": [openai_call]},
            {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
            {"role": "assistant", "content": "Sunny.", "tool_calls": None},
        ],
        "tools": [{"type": "function", "function": {**WEATHER, "strict": None}}],
    }
    apigen = {
        "messages": [
            turn("system", HERMES_SYSTEM),
            turn("user", "Rome?"),
            turn("assistant", f"<tool_call>{json.dumps([call])}</tool_call>"),
        ]
    }
    expected = [
        turn("user", "Rome?"),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        turn("tool", "sunny"),
        turn("assistant", "Sunny."),
    ]
    records = [hermes_function_calling.convert(hermes, CONTEXT), glaive_toolcall.convert(glaive, CONTEXT)]
    records += [openai_tools.convert(openai, CONTEXT), smoltalk.convert(apigen, CONTEXT)]
    for record in records[:3]:
        assert record["messages"] == expected
    assert records[3]["messages"] == expected[:2]
    for record in records:
        assert record["tools"] == [{"type": "function", "function": WEATHER}]
        validate_messages(record["messages"])  # what training and serving ask of a conversation
        validate_tools(record["tools"])


def test_an_empty_list_of_calls_leaves_no_tags_to_learn() -> None:
    def answered(text: str) -> dict:
        return {"messages": [turn("system", HERMES_SYSTEM), turn("user", "Who are you?"), turn("assistant", text)]}

    record = smoltalk.convert(answered("I am a model.\n<tool_call>[]</tool_call>"), CONTEXT)
    assert record["messages"] == [turn("user", "Who are you?"), turn("assistant", "I am a model.")]
    with pytest.raises(Rejected, match="empty tool call list"):
        smoltalk.convert(answered("<tool_call>[]</tool_call>"), CONTEXT)


def test_calls_written_as_python_literals_and_several_calls_and_results_are_read() -> None:
    calls = "Both.<tool_call>\n{'arguments': {'town': 'Rome'}, 'name': 'weather'}\n</tool_call>" * 2
    results = "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    turns = [said("system", HERMES_SYSTEM), said("human", "q"), said("gpt", calls), said("tool", results)]
    row = {"id": "1", "conversations": [*turns, said("gpt", "a")]}
    messages = hermes_function_calling.convert(row, CONTEXT)["messages"]
    assert messages[1] == {"role": "assistant", "content": "Both.Both.", "tool_calls": [CALL, CALL]}
    assert messages[2:4] == [turn("tool", "1"), turn("tool", "2")]


@pytest.mark.parametrize(
    ("turns", "tools", "reason"),
    [
        ([said("human", "q"), said("function_call", "weather(Rome)")], "[]", "tool call that is not JSON"),
        ([said("human", "q"), said("function_call", '{"name": "weather"}')], "[]", "tool call without"),
        ([said("human", "q"), said("gpt", "a")], '[{"description": "x"}]', "tool without a name"),
        ([said("human", "q"), said("gpt", "a")], "[{", "tool list that is not JSON"),
        ([said("human", "q"), said("observation", "r"), said("gpt", "a")], "[]", "a tool turn after a user turn"),
        ([said("human", "q"), said("gpt", "a"), said("human", "q")], "[]", "does not end with the assistant"),
        ([said("human", "q"), said("gpt", " ")], "[]", "empty turn"),
        ([said("robot", "q"), said("gpt", " ")], "[]", "unknown role"),
    ],
)
def test_function_calls_that_cannot_be_trained_on_are_rejected_by_reason(turns: list, tools: str, reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        glaive_toolcall.convert({"conversations": turns, "tools": tools}, CONTEXT)


# --- preferences --------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("scores", "reason"), [((5.0, "5"), "tied"), (("4.5", 5.0), "below"), ((5.0, 4.5), None), (("N/A", 5.0), None)]
)
def test_pairs_with_tied_or_turned_scores_are_rejected(scores: tuple, reason: str | None) -> None:
    good, bad = ([turn("user", "q"), turn("assistant", answer)] for answer in "ab")
    row = {"chosen": good, "rejected": bad, "score_chosen": scores[0], "score_rejected": scores[1]}
    if reason:
        with pytest.raises(Rejected, match=reason):
            trl_ultrafeedback.convert(row, CONTEXT)
    else:
        record = trl_ultrafeedback.convert(row, CONTEXT)
        assert (record["prompt"], record["chosen"], record["rejected"]) == ("q", "a", "b")


# --- reading files ------------------------------------------------------------------------------------------


def data_file(path: Path) -> DataFile:
    return DataFile(path.as_posix(), path.name, False)


ROWS = [{"question": f"q{i}\u2028\x85é中", "n": i if i % 2 else str(i), "list": ["]", ", ["]} for i in range(2500)]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet"])
def test_every_kind_of_file_gives_its_rows_and_can_be_entered_anywhere(tmp_path: Path, name: str, indent: int) -> None:
    path, rows = tmp_path / name, ROWS
    if name.endswith(".parquet"):
        rows = [{**row, "n": str(row["n"])} for row in ROWS]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=700)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding="utf-8")
    else:
        text = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    expected = list(enumerate(rows))
    assert list(read_rows(data_file(path))) == expected  # types and all characters as they were
    for start in (1, 999, 1000, 2400, 2500, 9999):
        assert list(read_rows(data_file(path), start)) == expected[start:]


def test_a_bad_line_spoils_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n\n[1]\n{"a": "\xff"}\n{"a": 2}')
    rows = list(read_rows(data_file(path)))
    assert [index for index, _ in rows] == [0, 1, 3, 4, 5]
    assert [str(row) if isinstance(row, Unreadable) else row["a"] for _, row in rows] == [
        1,
        "malformed JSON or UTF-8",
        "not a JSON object",
        "malformed JSON or UTF-8",
        2,
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.parquet", b"PAR1 this is no parquet file"),
        ("x.json", b'[{"a": 1},\n{"a": 2'),
        ("x.jsonl.gz", b"\x1f\x8b\x08 cut off"),
        ("missing.jsonl", None),
    ],
)
def test_a_file_that_cannot_be_read_says_so_in_one_line(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Unreadable) as error:
        list(read_rows(data_file(path)))
    assert str(error.value) and "\n" not in str(error.value)


def test_a_layout_that_changed_upstream_is_named_field_by_field() -> None:
    file = DataFile("/data/gsm8k/train.jsonl", "train.jsonl", False)
    with pytest.raises(LayoutChanged) as error:
        check_columns(gsm8k.SOURCE, file, {"query": "q", "answer": 7})
    for words in ("question is missing (expected str)", "answer is int (expected str)", "Columns there: query, answer"):
        assert words in str(error.value)
    check_columns(gsm8k.SOURCE, file, {"question": "q", "answer": None, "more": 1})


def test_files_are_spread_over_their_folders() -> None:
    files = [DataFile("", f"{folder}/{number}", False) for folder in "abc" for number in range(5)]
    for seed in range(5):
        assert {file.path[0] for file in spread(files, seed)[:3]} == set("abc")
        assert sorted(f.path for f in spread(files, seed)) == sorted(f.path for f in files)


def test_local_copies_are_found_under_the_names_that_tools_give_them(tmp_path: Path) -> None:
    trl, h4 = (parse_dataset(f"{owner}/ultrafeedback_binarized", {}).source for owner in ("trl-lib", "HuggingFaceH4"))
    for name in ("ultrafeedback_binarized", "trl-lib/ultrafeedback_binarized", "datasets--HuggingFaceTB--smoltalk"):
        (tmp_path / name).mkdir(parents=True)
    assert find_folder(trl, tmp_path) == tmp_path / "trl-lib" / "ultrafeedback_binarized"
    assert find_folder(h4, tmp_path) == tmp_path / "ultrafeedback_binarized"
    assert find_folder(smoltalk.SOURCE, tmp_path).name == "datasets--HuggingFaceTB--smoltalk"
    assert find_folder(gsm8k.SOURCE, tmp_path) is None


# --- naming datasets ----------------------------------------------------------------------------------------


def test_a_dataset_is_named_with_configuration_and_revision() -> None:
    selected = parse_dataset("HuggingFaceTB/smoltalk:apigen-80k,longalign@abc", {"quality": ["high"]})
    assert selected.source is smoltalk.SOURCE and selected.revision == "abc"
    train, held_out = selected.source.patterns(selected.chosen)
    assert train == ["data/apigen-80k/train-*.parquet", "data/longalign/train-*.parquet"] and len(held_out) == 2
    assert fineweb.SOURCE.patterns({})[0] == ["sample/10BT/*.parquet"]
    industry = parse_dataset(
        "industrycorpus2", {"industry": ["news_media"], "language": None, "quality": ["low", "high"]}
    )
    assert industry.source.patterns(industry.chosen)[0] == [
        f"news_media/{language}/{quality}/*.parquet"
        for language in ("english", "chinese")
        for quality in ("low", "high")
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "nonsense: unknown; known are .*smol-smoltalk"),
        ("ultrafeedback_binarized", "several .*HuggingFaceH4/ultrafeedback_binarized or trl-lib/"),
        ("smoltalk:other", "config other: unknown; known are all, apigen-80k"),
        (
            "smollm-corpus:python-edu",
            "python-edu holds only file identifiers.* take cosmopedia-v2 or fineweb-edu-dedup",
        ),
        ("gsm8k:main", "no configurations"),
        ("IndustryCorpus2", "quality best: unknown; known are high, middle, low"),
    ],
)
def test_datasets_that_are_not_known_are_named_with_the_known_ones(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_dataset(name, {"quality": ["best"]})
