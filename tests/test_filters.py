"""Each filter against texts whose fate is plain to the eye, and against slow definitions of what it estimates."""

import json
import random
from pathlib import Path

import pytest

import prepare_datasets
from smolkit.errors import UserError
from smolkit.filters import Filters, HashSet, NearDuplicates, bands_for, evaluation_grams, text_of, words_of

ENGLISH = (
    "The committee met on Tuesday and decided that the old bridge will have to be closed to traffic until the "
    "repairs are finished. Residents of the northern districts can use the ferry, which runs every half hour."
)
CHINESE = "委员会星期二开会决定，在修理完成之前，旧桥必须对车辆关闭。北区的居民可以乘坐每半小时一班的渡轮。"
FRENCH = (
    "Le comité s'est réuni mardi et a décidé que le vieux pont sera fermé à la circulation jusqu'à la fin des travaux."
)


def document(text: str) -> dict:
    return {"text": text, "category": "c"}


def verdicts(filters: Filters, texts: list[str]) -> list[str | None]:
    return [filters.judge(document(text)) for text in texts]


def test_text_of_covers_every_kind_of_record() -> None:
    call = {"function": {"name": "look", "arguments": {"town": "Rome"}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert text_of(document("t")) == "t"
    assert text_of({"messages": turns}).startswith("q\n") and "Rome" in text_of({"messages": turns})
    assert text_of({"prompt": "p", "chosen": "c", "rejected": "r"}) == "p\nc\nr"
    assert text_of({"prompt": turns[:1], "chosen": "c", "rejected": "r"}) == "q\nc\nr"
    assert words_of("Don't stop_it, 3.5 在桥 café") == ["don", "t", "stop", "it", "3", "5", "在", "桥", "café"]


def test_a_hash_set_is_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HashSet, "NEWEST", 50)  # so that the sorted array is used too
    rng, ours, reference = random.Random(0), HashSet(), set()
    for _ in range(2000):
        value = rng.choice([rng.randrange(600), 2**64 - 1 - rng.randrange(600)])
        assert ours.add(value) == (value not in reference)
        reference.add(value)
        assert len(ours) == len(reference)
    assert all((value in ours) == (value in reference) for value in range(600)) and len(ours.sorted) >= 800


def test_length() -> None:
    filters = Filters(min_characters=3, max_characters=5)
    assert verdicts(filters, ["ab", "abc", "abcde", "abcdef", "桥桥桥"]) == [
        "length: below 3 characters",
        None,
        None,
        "length: above 5 characters",
        None,
    ]


def test_language_drops_only_what_is_surely_another_language() -> None:
    filters = Filters(languages=["en", "zh"])
    assert verdicts(filters, [ENGLISH, CHINESE, FRENCH, "ok"]) == [None, None, "language: fr", None]
    assert verdicts(Filters(languages=["fr"]), [ENGLISH, FRENCH]) == ["language: en", None]
    with pytest.raises(UserError, match="--keep_languages xx: unknown; known are .* en "):
        Filters(languages=["xx"])


def test_quality_drops_by_the_rules_of_gopher() -> None:
    pytest.importorskip("datatrove")
    lines = "\n".join(["Share this page with the people that you have to tell."] * 9)
    reasons = {
        ENGLISH: None,
        CHINESE: None,
        "12345 6789 1234 the of, 5555 6666": "quality: gopher_below_alpha_threshold",
        "a b c d e f g h i j k l the of": "quality: gopher_below_avg_threshold",
        "pneumonoultramicroscopic incomprehensibilities the of": "quality: gopher_above_avg_threshold",
        "\n".join(f"- the item number {word} of it" for word in ENGLISH.split()): "quality: gopher_too_many_bullets",
        "Words without any common ones among them, strange sentences!": "quality: gopher_enough_stop_words",
        ENGLISH + "\n" + lines: "quality: dup_line_frac",
        "!!! ...": "quality: no words",
    }
    assert dict(zip(reasons, verdicts(Filters(quality=True), list(reasons)), strict=True)) == reasons


def test_exact_duplicates_differ_at_most_in_white_space() -> None:
    filters = Filters(deduplicate="exact")
    assert verdicts(filters, ["a b", "a  b\n", "A b", "a b"]) == [None, "duplicate: exact", None, "duplicate: exact"]


def jaccard(one: str, two: str) -> float:
    grams = [{tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (words_of(one), words_of(two))]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def test_near_duplicates_are_found_as_by_the_exact_jaccard_similarity() -> None:
    rng = random.Random(1)
    vocabulary = [f"w{i}" for i in range(2000)]
    texts: list[str] = []
    for _ in range(120):
        words = rng.choices(vocabulary, k=200)
        texts.append(" ".join(words))
        for _ in range(rng.choice([0, 0, 1, 4, 30])):  # changed words; five 5-grams each
            words[rng.randrange(200)] = "changed"
        texts.append(" ".join(words))
    found = verdicts(Filters(deduplicate="near"), texts)
    kept, expected, close = [], [], []
    for text, reason in zip(texts, found, strict=True):
        best = max((jaccard(text, other) for other in kept), default=0.0)
        expected.append(best >= 0.8)
        close.append(abs(best - 0.8) < 0.1)  # the estimate from 128 hashes may miss by that
        if reason is None:
            kept.append(text)
    wrong = [i for i, reason in enumerate(found) if (reason is not None) != expected[i] and not close[i]]
    assert wrong == [] and sum(expected) >= 40 and found.count(None) >= 120
    assert {reason for reason in found if reason} == {"duplicate: exact", "duplicate: near"}


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_near_duplicates_are_found_at_lower_thresholds(threshold: float) -> None:
    rng, found, alike = random.Random(2), 0, 0
    vocabulary = [f"w{i}" for i in range(5000)]
    for _ in range(150):
        words = rng.choices(vocabulary, k=200)
        changed = list(words)
        for place in rng.sample(range(200), 3 if threshold == 0.7 else 9):
            changed[place] = "changed"
        filters = NearDuplicates(threshold)
        one, two = document(" ".join(words)), document(" ".join(changed))
        filters.remember(one)
        if jaccard(one["text"], two["text"]) >= threshold + 0.1:  # the estimate cannot fall below
            alike += 1
            found += filters.judge(two) is not None
    assert alike > 100 and found >= 0.97 * alike


def test_bands_follow_the_threshold() -> None:
    """16 of 8 hashes at the default and above; a pair at the threshold shares one with the probability worked out."""
    assert [bands_for(t) for t in (1.0, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1)] == [16, 16, 16, 32, 64, 64, 128]
    assert 1 - (1 - 0.8**8) ** 16 == pytest.approx(0.947, abs=1e-3) and 1 - (1 - 0.7**8) ** 16 < 0.62


def test_near_duplicates_of_short_and_chinese_texts() -> None:
    filters = NearDuplicates(0.8)
    changed = CHINESE.replace("星期二", "星期三")
    for text, reason in ((CHINESE, None), (changed, None), ("hi", None), ("bye", None)):
        assert filters.judge(document(text)) == reason
        filters.remember(document(text))
    long = CHINESE * 3
    filters.remember(document(long))
    assert filters.judge(document(long + "完")) == "duplicate: near"
    assert filters.judge(document("Hi!")) == "duplicate: near"  # the same words


def test_contaminated_texts_share_thirteen_words_with_an_evaluation_set(tmp_path: Path, capsys) -> None:
    exam = tmp_path / "exam.jsonl"
    question = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    rows = [{"question": question, "answer": "short"}, {"question": "Who built the very old stone bridge in Rome?"}]
    exam.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    filters = Filters(decontaminate=[exam])
    assert "1 evaluation texts of fewer than 8 words are not looked for" in capsys.readouterr().out
    words = question.split()
    contaminated, sound = "x " + " ".join(words[1:14]).upper() + ", y", " ".join(words[1:13]) + " y"
    assert filters.judge(document(contaminated)) == "contaminated: shares 13 words with exam.jsonl"
    assert filters.judge(document(sound)) is None
    assert "shares 9 words" in filters.judge(document("Tell me: who built the very old stone bridge in Rome!"))
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "a"}]
    assert "contaminated" in filters.judge({"messages": turns})


def test_contaminated_chinese_texts_share_more_than_a_name_or_a_stock_phrase(tmp_path: Path, capsys) -> None:
    exam = tmp_path / "exam.jsonl"
    question = "根据中华人民共和国全国人民代表大会常务委员会的决定，旧桥修理完成之前必须对车辆关闭。"  # 39 characters
    short = "下列说法中正确的是"
    middle = "哪一条河流经过这座古老城市的中心"  # 16
    exam.write_text("".join(json.dumps({"q": text}) + "\n" for text in (question, short, middle)), "utf-8")
    filters = Filters(decontaminate=[exam])
    assert "1 evaluation texts of fewer than 8 words are not looked for" in capsys.readouterr().out
    name = "昨天，中华人民共和国全国人民代表大会常务委员会在北京举行了新闻发布会。"  # 20 of them in a row
    assert verdicts(filters, [name, f"请问{short}哪个，并说明理由。"]) == [None, None]
    characters = [c for c in question if c not in "，。"]
    stretch, shorter = "".join(characters[10:34]), "".join(characters[10:33])
    assert verdicts(filters, [f"他说：{stretch}好", f"他说：{shorter}好", f"请问{middle}？"]) == [
        "contaminated: shares 24 words with exam.jsonl",
        None,
        "contaminated: shares 16 words with exam.jsonl",
    ]


def test_only_the_chinese_stretches_of_a_mixed_text_are_taken_longer() -> None:
    english, chinese = [f"w{i}" for i in range(20)], list("天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁")
    assert evaluation_grams(english, 13) == [" ".join(english[i : i + 13]) for i in range(8)]
    assert evaluation_grams(chinese, 13) == [" ".join(chinese[i : i + 24]) for i in range(5)]
    mixed = english + chinese
    sizes = [gram.count(" ") + 1 for gram in evaluation_grams(mixed, 13)]
    assert sizes == [13] * 14 + [24] * 11  # up to 6 of the 13 are Chinese; then as many as fit into 48
    assert evaluation_grams(chinese[:14], 13) == [] and evaluation_grams(chinese[:15], 13) == [" ".join(chinese[:15])]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{broken\n", "a.jsonl:1: malformed JSON"),
        ("a.txt", "too short", "no text of 8 words"),
        ("missing.jsonl", None, "missing.jsonl: no such file"),
    ],
)
def test_an_evaluation_set_that_cannot_be_kept_out_is_an_error(
    tmp_path: Path, name: str, content, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(UserError, match=message):
        Filters(decontaminate=[tmp_path / name])


def test_a_filter_only_remembers_what_every_filter_kept_and_can_be_told_again() -> None:
    filters = Filters(min_characters=10, deduplicate="exact")
    assert verdicts(filters, ["short", "long enough", "short"]) == [
        "length: below 10 characters",
        None,
        "length: below 10 characters",
    ]
    resumed = Filters(min_characters=10, deduplicate="exact")
    resumed.remember(document("long enough"))
    assert resumed.judge(document("long  enough")) == filters.judge(document("long enough")) == "duplicate: exact"


def test_the_report_of_a_run_counts_what_each_filter_removed(samples: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copies" / "gsm8k"
    copy.mkdir(parents=True)
    rows = (samples / "gsm8k" / "train.jsonl").read_text("utf-8").splitlines()[:300]
    french = json.dumps({"question": FRENCH + " " + FRENCH, "answer": FRENCH})
    near = json.loads(rows[0]) | {"answer": json.loads(rows[0])["answer"] + " Done"}
    short = json.dumps({"question": "1+1?", "answer": "2"})
    (copy / "train.jsonl").write_text("\n".join([*rows, rows[7], json.dumps(near), french, short]) + "\n", "utf-8")
    exam = tmp_path / "exam.jsonl"
    exam.write_text(rows[3] + "\n", "utf-8")
    arguments = ["--source", "local", "--path", copy.parent, "--sft", "--output_dir", tmp_path, "--min_characters", 50]
    arguments += ["--keep_languages", "en", "--deduplicate", "near", "--decontaminate", exam]
    prepare_datasets.main([str(a) for a in arguments])
    report = json.loads((tmp_path / "sft" / "prepare_report.json").read_text())["sources"]["openai/gsm8k"]
    assert (report["read"], report["written"]) == (304, 299)
    assert {reason: d["for_example"] for reason, d in report["dropped"].items()} == {
        "contaminated: shares 13 words with exam.jsonl": ["train.jsonl:4"],
        "duplicate: exact": ["train.jsonl:301"],
        "duplicate: near": ["train.jsonl:302"],
        "language: fr": ["train.jsonl:303"],
        "length: below 50 characters": ["train.jsonl:304"],
    }
