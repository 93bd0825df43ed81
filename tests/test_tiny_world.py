"""The built-in world: reproducible, balanced, and without leaks from the exam into any training file."""

import json
from collections import Counter
from itertools import chain

import pytest

from smolkit import tiny_world
from smolkit.doctor.checkup import prompt_key
from smolkit.tiny_world_words import FRESH, KINDS, NOTES, REFUSAL, STORIES, TOOLS

PARTS = {"pretrain", "sft", "lora", "dpo", "exam"}


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def training_text(directory, *parts):
    return "".join((directory / part / f"{part}_data.jsonl").read_text(encoding="utf-8") for part in parts)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    return directory, tiny_world.write(directory, seed=0, parts=PARTS)


@pytest.fixture(scope="module")
def world():
    return tiny_world.build_world(0)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_world(files, tmp_path):
    directory, counts = files
    tiny_world.write(tmp_path / "again", seed=0, parts=PARTS)
    tiny_world.write(tmp_path / "other", seed=1, parts=PARTS)
    for path in counts:
        relative = directory.joinpath(path).relative_to(directory)
        first, again = directory / relative, tmp_path / "again" / relative
        assert first.read_bytes() == again.read_bytes()
    assert (directory / "exam/exam.jsonl").read_bytes() != (tmp_path / "other/exam/exam.jsonl").read_bytes()
    assert not list(directory.rglob("*.tmp"))


def test_counts_are_the_lines_written(files):
    directory, counts = files
    for path, count in counts.items():
        if path.endswith(".jsonl"):
            assert len((directory / path).read_text(encoding="utf-8").splitlines()) == count > 0


def test_validation_has_documents_of_its_own(files):
    directory, _ = files
    for part in ("pretrain", "sft", "lora"):
        train = set((directory / part / f"{part}_data.jsonl").read_text(encoding="utf-8").splitlines())
        validation = (directory / part / "validation" / f"{part}_data.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(train & set(validation)) < 0.1 * len(validation), "only short sums and lists may coincide"


def test_no_validation_row_begins_as_a_training_row_does(files):
    """By the doctor's measure, which is not the one that the files are written by."""
    directory, _ = files
    for part, kind in (("pretrain", "pretrain"), ("sft", "sft"), ("lora", "sft")):
        train, validation = (
            {prompt_key(kind, row) for row in read(directory / part / side / f"{part}_data.jsonl")}
            for side in ("", "validation")
        )
        assert validation and not train & validation, part


def test_validation_pairs_ask_about_entities_no_training_pair_names(files, world):
    directory, _ = files
    prompts = [row["prompt"] for row in read(directory / "dpo/validation/dpo_data.jsonl")]
    taught = [name for e in world.entities if e.taught for name in e.name.values()]
    assert not any(name in prompt for prompt in prompts for name in taught)


def test_half_of_the_facts_are_taught_and_values_are_balanced_in_each_half(world):
    assert len(world.facts(taught=True)) == len(world.facts(taught=False)) == 124
    for kind, spec in KINDS.items():
        for attribute in spec.attributes:
            for taught in (True, False):
                seen = Counter(e.facts[attribute.key] for e in world.entities if e.kind == kind and e.taught == taught)
                assert len(seen) == len(attribute.values), "every value occurs, so a constant answer scores chance"
                assert len(set(seen.values())) == 1


def test_characters_of_chinese_names_occur_in_no_other_text():
    texts = [REFUSAL["zh"], *STORIES["zh"], *(text for note in NOTES for text in note.text["zh"])]
    texts += [text for tool in TOOLS for text in (*tool.questions["zh"], *tool.results["zh"], tool.answer["zh"])]
    for attribute in (a for spec in KINDS.values() for a in spec.attributes):
        texts += [zh for _, zh in attribute.values]
        texts += [*attribute.statements["zh"], *attribute.questions["zh"], attribute.answer["zh"]]
    names = "".join(zh for spec in KINDS.values() for _, zh in spec.names)
    fresh = "".join(character for kind in FRESH.values() for part in kind["zh"] for character in part)
    assert not set(names + fresh) & set("".join(texts))
    assert not set(names) & set(fresh)


def answers(directory, part):
    rows = read(directory / part / f"{part}_data.jsonl")
    if part == "dpo":
        return [row["chosen"] for row in rows]
    return [m["content"] for row in rows for m in row["messages"] if m["role"] == "assistant"]


def test_every_fact_is_in_pretraining_and_no_exam_answer_is_in_any_later_stage(files, world):
    directory, _ = files
    pretraining = "\n".join(row["text"] for row in read(directory / "pretrain/pretrain_data.jsonl"))
    asked = training_text(directory, "sft", "lora", "dpo")
    later = "\n".join(chain.from_iterable(answers(directory, part) for part in ("sft", "lora", "dpo")))
    for taught in (True, False):
        for entity, attribute in world.facts(taught):
            for language in tiny_world.LANGUAGES:
                sentence = tiny_world.fill(attribute.answer[language], entity, attribute, language)
                assert sentence in pretraining
                if not taught:
                    assert sentence not in later
                    assert not any(q.format(x=entity.name[language]) in asked for q in attribute.questions[language])


def test_exam_ids_are_unique(files):
    ids = [row["id"] for row in read(files[0] / "exam/exam.jsonl")]
    assert len(ids) == len(set(ids))


def test_exam_values_occur_in_no_training_file(files):
    directory, _ = files
    training = training_text(directory, "pretrain", "sft", "lora", "dpo")
    for row in read(directory / "exam/exam.jsonl"):
        if row["kind"] == "tool":
            for value in row["answer"]["arguments"].values():
                assert isinstance(value, int) or value not in training, value


def test_reserved_numbers_are_never_arguments_in_training(files):
    directory, _ = files
    used = set()
    for row in read(directory / "sft/sft_data.jsonl"):
        for message in row["messages"]:
            for call in message.get("tool_calls", ()):
                used |= {v for v in call["function"]["arguments"].values() if isinstance(v, int)}
    asked = {
        value
        for row in read(directory / "exam/exam.jsonl")
        if row["kind"] == "tool"
        for value in row["answer"]["arguments"].values()
        if isinstance(value, int)
    }
    assert asked and used and not asked & used


def test_every_exam_tool_is_offered_and_its_arguments_stand_in_the_question(files):
    directory, _ = files
    for row in read(directory / "exam/exam.jsonl"):
        if row["kind"] == "tool":
            offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row["tools"]}
            assert len(offered) >= 2
            assert set(row["answer"]["arguments"]) == set(offered[row["answer"]["name"]]["required"])
            for value in row["answer"]["arguments"].values():
                assert str(value) in row["messages"][-1]["content"]
    calls = [row["answer"]["name"] for row in read(directory / "exam/exam.jsonl") if row["kind"] == "tool"]
    assert set(calls) == {tool.name for tool in TOOLS}


def test_the_lora_skill_appears_only_in_the_lora_data(files):
    text = training_text(files[0], "pretrain", "sft", "dpo")
    assert "is happy today" not in text and "今天很高兴" not in text


def test_chosen_and_rejected_differ_in_the_stated_quality(files):
    directory, _ = files
    for row in read(directory / "dpo/dpo_data.jsonl"):
        ending = tuple(row["quality"]["must_end_with"])
        assert row["chosen"].endswith(ending) and not row["rejected"].endswith(ending)
