"""train_tokenizer.py: trained and loaded tokenizers are lossless, reproducible, loadable; its refusals."""

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import train_tokenizer
from smolkit.chat import CHAT_TEMPLATE, encode_text, render
from smolkit.checkpoints import load_tokenizer, require_chat
from smolkit.errors import UserError
from smolkit.tokenizer import by_language, compare, llama_cpp_name, texts_of_files, train_bpe

NAMES = ["Ada", "Boris", "Chen", "Dilan", "Emeka", "苏晴", "王小明", "陈晨"]
PLACES = ["the old lighthouse", "Rome", "北京", "a café in Zürich", "上海的老城区"]


def corpus(rows: int = 400) -> list[dict]:
    """Bilingual documents and conversations with digits, code and accents."""
    pick = random.Random(7)
    made: list[dict] = []
    for _ in range(rows):
        name, place, number = pick.choice(NAMES), pick.choice(PLACES), pick.randrange(100_000)
        text = pick.choice(
            [
                f"{name} lives at {number} {place}. It's raining, and {name} doesn't mind!\n",
                f"{name}住在{place}，门牌号是{number}。今天天气很好！",
                f"def f(x):\n    return x + {number}  # {place}\n",
            ]
        )
        turns = [{"role": "user", "content": f"Where is {name}?"}, {"role": "assistant", "content": text}]
        made.append(pick.choice([{"text": text, "category": "x"}, {"messages": turns}]))
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "mixed.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in corpus()), encoding="utf-8")
    return path


def train(data: Path, directory: Path, *options: object) -> PreTrainedTokenizerFast:
    arguments = ["--mode", "train", "--data_path", data, "--save_dir", directory]
    if "--vocab_size" not in options:
        arguments += ["--vocab_size", 400]
    train_tokenizer.main([*map(str, arguments), *map(str, options)])
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def directory(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("trained") / "tokenizer"
    train(data, target)
    return target


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(directory)


# --- a trained tokenizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (("{", "{{"), "unreadable tokenizer"),
        (("<|im_start|>", "<|begin|>"), r"--tokenizer_type qwen, but the tokenizer has no <\|im_start\|>"),
        (("<|endoftext|>", "<|end|>", '"pad_token"', '"no_pad"'), "the tokenizer has no pad token"),
    ],
)
def test_directories_that_are_no_tokenizer_for_training(damage, message, directory: Path, tmp_path: Path) -> None:
    """`damage`: words to replace, and by what."""
    shutil.copytree(directory, tmp_path / "t")
    for path in (tmp_path / "t").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        for old, new in zip(damage[::2], damage[1::2], strict=True):
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
    kind = "qwen" if "qwen" in message else "auto"
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / "t", kind)


def test_chat_needs_marks_and_an_end_that_is_no_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    require_chat(tokenizer, "t")
    unmarked, same = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    unmarked.chat_template = "{{ messages[0].content }}"
    with pytest.raises(UserError, match="chat template has no generation marks; run train_tokenizer.py"):
        require_chat(unmarked, "t")
    same.pad_token = "<|im_end|>"
    with pytest.raises(UserError, match="pad and chat end are the same token"):
        require_chat(same, "t")


def test_entries_and_control_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 400
    assert sorted(tokenizer.get_vocab().values()) == list(range(400))
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == (
        "<|endoftext|>",
        "<|im_end|>",
        None,
    )
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.chat_template == CHAT_TEMPLATE
    words = (
        "<|endoftext|> <|im_start|> <|im_end|> <repo_name> <file_sep> <filename> <jupyter_start> <tool_call>"
    )
    assert [len(tokenizer(word)["input_ids"]) for word in words.split()] == [1] * 8
    visible = tokenizer.decode(tokenizer(words)["input_ids"], skip_special_tokens=True)
    assert visible.split() == ["<tool_call>"]


def test_any_text_and_every_byte_survive(tokenizer: PreTrainedTokenizerFast) -> None:
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(tokenizer.get_vocab())
    pick = random.Random(1)
    texts = [
        "",
        " ",
        "\n\n \t\r\n",
        "e\u0301 ≠ é",
        "ﬁ １２３ ½ Ⅻ",
        "👩‍👩‍👧",
        "\x00\x7f\ufeff\ufffd",
        "한국어 ไทย",
    ]
    ranges = [range(0x20, 0x7F), range(0, 0x3000), range(0x3400, 0xD800), range(0xE000, 0x110000)]
    texts += ["".join(chr(pick.choice(pick.choice(ranges))) for _ in range(60)) for _ in range(100)]
    for text in texts:
        assert tokenizer.decode(encode_text(tokenizer, text)) == text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_and_chinese_characters_stand_alone(data: Path, tmp_path: Path) -> None:
    tokenizer = train(data, tmp_path / "default")
    pieces = [tokenizer.decode([i]) for i in tokenizer("room 12345 is 门牌号")["input_ids"]]
    assert [piece for piece in pieces if any(letter.isdigit() for letter in piece)] == list("12345")
    assert {"门", "牌", "号"} <= set(pieces)
    joined = train(data, tmp_path / "joined", "--no-split_digits", "--no-split_cjk", "--vocab_size", 800)
    entries = [joined.decode([i]) for i in range(len(joined))]
    assert any(len(entry) in (2, 3) and entry.isdigit() for entry in entries)
    assert not any(len(entry) > 3 and entry.isdigit() for entry in entries)
    assert any(
        len(entry) > 1 and all("\u4e00" <= letter <= "\u9fff" for letter in entry) for entry in entries
    )


def test_encoding_needs_no_rule_for_chinese(tokenizer: PreTrainedTokenizerFast) -> None:
    """No merge joins two Chinese characters, so the saved file does with Qwen2's pattern alone."""
    strict = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    han = pre_tokenizers.Split(Regex(r"\p{Han}"), behavior="isolated")
    strict.pre_tokenizer = pre_tokenizers.Sequence([han, tokenizer.backend_tokenizer.pre_tokenizer])
    for row in corpus():
        text = row.get("text") or row["messages"][1]["content"]
        assert strict.encode(text).ids == tokenizer(text)["input_ids"]


def test_golden_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    """Ids of a tokenizer trained on `corpus()`: neither a refactoring nor an upgrade may change them unnoticed."""
    english = [364, 300, 301, 220, 19, 16, 15, 17, 220, 49, 78, 283, 13]
    assert tokenizer("Ada lives at 4102 Rome.")["input_ids"] == english
    chinese = [164, 233, 237, 306, 112, 320, 341, 370, 369, 334, 343, 342, 340, 336, 17, 22, 339]
    assert tokenizer("苏晴住在北京，门牌号是27。")["input_ids"] == chinese


def test_bytes_that_are_no_text_survive(tokenizer: PreTrainedTokenizerFast) -> None:
    """Any bytes, valid UTF-8 or not, have ids whose entries spell them out again."""
    backend, letter = tokenizer.backend_tokenizer, bytes_to_unicode()
    byte = {character: number for number, character in letter.items()}
    pick = random.Random(2)
    for _ in range(200):
        data = bytes(pick.choices(range(256), k=pick.randrange(80)))
        ids = [token.id for token in backend.model.tokenize("".join(letter[b] for b in data))]
        assert bytes(byte[c] for i in ids for c in tokenizer.convert_ids_to_tokens(i)) == data
        text = data.decode("latin-1")  # every byte as a character, control characters among them
        assert tokenizer.decode(encode_text(tokenizer, text)) == text


SPLITS = {  # by hand, from the patterns in llama.cpp's source
    "qwen2": ["It", "'s", " ", "1", "2", "3", "4", " o", "'CLOCK", ",你好", "！\n\n", " ", " x", "+=", "1"],
    "llama-bpe": ["It", "'s", " ", "123", "4", " o", "'CLOCK", ",你好", "！\n\n", " ", " x", "+=", "1"],
    "smollm": ["It", "'s", " ", "1", "2", "3", "4", " o", "'", "CLOCK", ",", "你好", "！", "\n\n ", " x", "+=", "1"],
    "gpt-2": ["It", "'s", " 1234", " o", "'", "CLOCK", ",", "你好", "！", "\n\n ", " x", "+=", "1"],
}


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_patterns_that_llama_cpp_knows(data: Path, tmp_path: Path, name: str, model_type: str) -> None:
    text = "It's 1234 o'CLOCK,你好！\n\n  x+=1"
    tokenizer = train(data, tmp_path / "trained", "--pre_tokenizer", name)
    (tmp_path / "trained" / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "trained")
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in pieces] == SPLITS[name]
    assert llama_cpp_name(tokenizer) == name
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_names_of_foreign_tokenizers(samples: Path) -> None:
    assert llama_cpp_name(AutoTokenizer.from_pretrained(samples / "qwen2.5_tokenizer")) == "qwen2"
    for cut in (None, pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=True)):
        backend = Tokenizer(models.BPE())
        if cut is not None:
            backend.pre_tokenizer = cut
        assert llama_cpp_name(PreTrainedTokenizerFast(tokenizer_object=backend)) is None


def test_a_cap_takes_rows_of_each_file_in_turn(tmp_path: Path) -> None:
    for name, rows in (("a", 5), ("b", 1), ("c", 3)):
        lines = [json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    assert list(texts_of_files(paths, 6)) == ["a0", "b0", "c0", "a1", "c1", "a2"]
    assert list(texts_of_files(paths, None)) == ["a0", "a1", "a2", "a3", "a4", "b0", "c0", "c1", "c2"]
    assert len(list(texts_of_files(paths, 100))) == 9


def test_training_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are taken one after the other while training reads them, never collected."""
    alive = most = 0

    class Text(str):
        def __new__(cls, value: str) -> "Text":
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return super().__new__(cls, value)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    texts = (Text(f"document {i % 7} of a long stream") for i in range(20_000))
    assert len(train_bpe(texts, 300, "qwen2", False, [])) > 256
    assert most < 2_000


def test_pattern_is_qwen2s(tokenizer: PreTrainedTokenizerFast, samples: Path) -> None:
    qwen = AutoTokenizer.from_pretrained(samples / "qwen2.5_tokenizer").backend_tokenizer
    text = "It's 2024: don't\r\n\r\n  x+=1;  你好，世界！ naïve １２ \t end "
    assert tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(
        text
    ) == qwen.pre_tokenizer.pre_tokenize_str(text)


def test_same_data_and_flags_give_the_same_bytes(
    data: Path, directory: Path, tmp_path: Path, run_script: Callable
) -> None:
    target = tmp_path / "again"
    arguments = ["--mode", "train", "--data_path", data, "--vocab_size", 400, "--save_dir", target]
    # another process, with another hash seed and number of threads
    environment = {"PYTHONHASHSEED": "3", "RAYON_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true"}
    run_script("train_tokenizer.py", *arguments, env=environment)
    assert digests(target) == digests(directory)


def digests(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}


def test_extra_tokens_and_document_cap(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bare = train(data, tmp_path / "bare", "--extra_special_tokens")
    assert len(bare) == 400 and "<file_sep>" not in bare.get_vocab()
    own = train(data, tmp_path / "own", "--extra_special_tokens", "<a>", "<b>", "<a>")
    assert len(own) == 400 and own.convert_tokens_to_ids(["<a>", "<b>"]) == [394, 395]
    capsys.readouterr()
    capped = train(data, tmp_path / "capped", "--max_documents", 2, "--vocab_size", 5000)
    assert len(capped) < 420
    assert "fewer than --vocab_size 5,000" in capsys.readouterr().out
    smallest = train(data, tmp_path / "smallest", "--extra_special_tokens", "--vocab_size", 263)
    assert smallest.decode(encode_text(smallest, "Ada 苏晴")) == "Ada 苏晴"


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe"])
def test_loads_the_same_from_a_checkpoint_directory(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, model_type: str
) -> None:
    """AutoTokenizer looks at config.json too: the model's architecture must not change the tokenizer."""
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = " It's 12:30\n\n 苏晴 住在北京<|im_end|><tool_call>  x"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    turns = corpus()[0].get("messages") or [{"role": "user", "content": "x"}]
    assert render(loaded, turns) == render(tokenizer, turns)
    assert (loaded.pad_token, loaded.eos_token) == ("<|endoftext|>", "<|im_end|>")


# --- a loaded tokenizer -------------------------------------------------------------------------------------


def test_qwen_directory(samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = samples / "qwen2.5_tokenizer"
    command = ["--mode", "load", "--qwen_model", str(source), "--save_dir", str(tmp_path / "qwen")]
    train_tokenizer.main(command)
    assert "entries: 151,667" in capsys.readouterr().out
    original, loaded = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path / "qwen")
    text = "It's 12:30, 苏晴住在北京。\n\n def f(x):\n\treturn x<|im_end|><tool_call> Cafe\u0301"
    assert loaded(text)["input_ids"] == original(text)["input_ids"]
    assert (loaded.pad_token, loaded.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert loaded.chat_template == CHAT_TEMPLATE
    train_tokenizer.main(command)
    assert "nothing to do" in capsys.readouterr().out


@pytest.fixture
def gpt2(tmp_path: Path, data: Path) -> Path:
    """A directory in GPT-2's layout: vocab.json, merges.txt, one `<|endoftext|>` at the end, no chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([row["text"] for row in corpus() if "text" in row], trainer)
    directory = tmp_path / "gpt2"
    directory.mkdir()
    backend.model.save(str(directory))
    vocabulary = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    vocabulary["<|endoftext|>"] = len(vocabulary)
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return directory


def test_gpt2_gets_chat_tokens_and_keeps_its_ids(gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    markers = ["<repo_name>", "<jupyter_start>"]
    command = ["--mode", "load", "--base_tokenizer", str(gpt2), "--save_dir", str(tmp_path / "fitted")]
    train_tokenizer.main([*command, "--extra_special_tokens", *markers])
    assert "pre-tokenizer in llama.cpp: gpt-2" in capsys.readouterr().out
    original, loaded = AutoTokenizer.from_pretrained(gpt2), AutoTokenizer.from_pretrained(tmp_path / "fitted")
    text = "It's 12345, 苏晴住在北京。\n\n def f(x):\n\treturn x"
    assert loaded(text)["input_ids"] == original(text)["input_ids"]
    # 301 entries of its own, 2 chat tokens more, the markers, 4 tool tokens
    assert (len(original), len(loaded)) == (301, 309)
    assert loaded.convert_tokens_to_ids(["<|endoftext|>", *markers]) == [300, 303, 304]
    assert (loaded.pad_token_id, loaded.eos_token) == (300, "<|im_end|>")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rendered = render(loaded, turns)
    assert rendered.input_ids == loaded.apply_chat_template(turns, return_dict=False)
    assert sum(rendered.loss_mask) == len(original("Hello")["input_ids"]) + 1


def test_trained_directory_can_be_loaded_and_extended(directory: Path, tmp_path: Path) -> None:
    command = ["--mode", "load", "--qwen_model", str(directory), "--save_dir", str(tmp_path / "more")]
    train_tokenizer.main([*command, "--extra_special_tokens", "<new>"])
    loaded = AutoTokenizer.from_pretrained(tmp_path / "more")
    assert len(loaded) == 401 and loaded.convert_tokens_to_ids("<new>") == 400


def test_a_replaced_source_is_noticed(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = shutil.copytree(directory, tmp_path / "source")
    command = ["--mode", "load", "--qwen_model", str(source), "--save_dir", str(tmp_path / "fitted")]
    train_tokenizer.main(command)
    train_tokenizer.main(command)
    assert "nothing to do" in capsys.readouterr().out
    (source / "tokenizer.json").write_text((source / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match="is in use by something else"):
        train_tokenizer.main(command)


# --- comparing ----------------------------------------------------------------------------------------------


def test_compare_counts_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A tokenizer without merges has one token per byte, whatever the language."""
    (tmp_path / "a.txt").write_text("It's a small dog.\n苏晴住在北京 Rome\n12 + 30\nГде?\n", encoding="utf-8")
    row = json.dumps({"text": "x"}) + "\n"
    (tmp_path / "x.jsonl").write_text(row)
    bare = ["--extra_special_tokens", "--vocab_size", 263]
    train(tmp_path / "x.jsonl", tmp_path / "bare", *bare)
    texts = by_language((tmp_path / "a.txt").read_text(encoding="utf-8").splitlines(keepends=True))
    assert texts == {"English": ["It's a small dog.\n"], "Chinese": ["苏晴住在北京 Rome\n"]}
    english, chinese = compare([str(tmp_path / "bare")], texts)
    assert (english.language, english.entries, english.bytes_per_token) == ("English", 263, 1.0)
    assert english.words_per_token == 4 / 18  # It's, a, small, dog
    assert (chinese.bytes_per_token, chinese.words_per_token) == (1.0, 7 / 24)  # six characters and Rome
    assert english.speed > 0


def test_compare_prints_languages_apart(
    directory: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    english, chinese = "The lighthouse is old.\n", "灯塔很老，海很大。\n"
    (tmp_path / "a.txt").write_text(english + chinese, encoding="utf-8")
    names = [str(directory), str(samples / "qwen2.5_tokenizer")]
    train_tokenizer.main(["--mode", "compare", "--tokenizers", *names, "--data_path", str(tmp_path / "a.txt")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert [(line[0], line[2]) for line in lines] == [(n, lang) for lang in ("English", "Chinese") for n in names]
    for line, text in zip(lines, (english, english, chinese, chinese), strict=True):
        tokens = len(AutoTokenizer.from_pretrained(line[0])(text)["input_ids"])
        assert line[3].rstrip("*") == f"{len(text.encode()) / tokens:.2f}"
    assert [line[3].endswith("*") for line in lines] == [False, True, False, True]  # Qwen's are fewer


# --- refusals -----------------------------------------------------------------------------------------------


def test_same_command_again_changes_nothing_and_another_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target = tmp_path / "tokenizer"
    target.mkdir()  # an empty directory is free
    train(data, target)
    before = {file.name: file.stat().st_mtime_ns for file in target.iterdir()}
    train(data, target)
    assert "already holds this tokenizer" in capsys.readouterr().out
    assert {file.name: file.stat().st_mtime_ns for file in target.iterdir()} == before
    with pytest.raises(UserError, match="is in use by something else"):
        train(data, target, "--vocab_size", 401)
    changed = tmp_path / "changed.jsonl"
    changed.write_text(data.read_text() + '{"text": "more"}\n')
    train(changed, tmp_path / "second")
    changed.write_text(data.read_text() + '{"text": "less"}\n')
    with pytest.raises(UserError, match="is in use by something else"):
        train(changed, tmp_path / "second")


REFUSALS = {
    "missing file": (["--data_path", "missing.jsonl", "--vocab_size", "600"], "missing.jsonl: no such file"),
    "too small": (["--data_path", "DATA", "--vocab_size", "276"], "--vocab_size 276 is too small.*need 277"),
    "bad row": (
        ["--data_path", "DATA", "BAD", "--vocab_size", "600"],
        r"bad\.jsonl:2: field 'text' is missing",
    ),
    "broken row": (["--data_path", "BROKEN", "--vocab_size", "600"], r"broken\.jsonl:1: not valid JSON"),
    "empty file": (["--data_path", "EMPTY", "--vocab_size", "600"], r"empty\.jsonl: the file has no rows"),
    "no data": (["--vocab_size", "600"], "--mode train needs --data_path"),
    "no size": (["--data_path", "DATA"], "--mode train needs --vocab_size"),
    "cap": (
        ["--data_path", "DATA", "--vocab_size", "600", "--max_documents", "0"],
        "must be at least 1, got 0",
    ),
    "digits": (
        ["--data_path", "DATA", "--vocab_size", "600", "--pre_tokenizer", "gpt-2", "--split_digits"],
        "--pre_tokenizer gpt-2 decides about digits — leave --split_digits out",
    ),
    "resize": (["--data_path", "DATA", "--vocab_size", "600", "--resize_model", "x"], "no meaning with --mode train"),
    "model": (
        ["--data_path", "DATA", "--vocab_size", "600", "--qwen_model", "x"],
        "--qwen_model has no meaning",
    ),
    "tool token": (
        ["--data_path", "DATA", "--vocab_size", "600", "--extra_special_tokens", "<tool_call>"],
        "'<tool_call>' cannot be a special token",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_leave_nothing_behind(data: Path, tmp_path: Path, name: str) -> None:
    options, complaint = REFUSALS[name]
    files = {"DATA": data}
    for key, text in (("BAD", '{"text": "a"}\n{"question": "b"}\n'), ("BROKEN", "{\n"), ("EMPTY", "")):
        files[key] = tmp_path / f"{key.lower()}.jsonl"
        files[key].write_text(text)
    save_dir = tmp_path / "out" / "tokenizer"
    options = [str(files.get(option, option)) for option in options]
    with pytest.raises(UserError, match=complaint):
        train_tokenizer.main(["--mode", "train", "--save_dir", str(save_dir), *options])
    assert not list((tmp_path / "out").rglob("*"))


def test_load_refusals(data: Path, tmp_path: Path) -> None:
    command = ["--mode", "load", "--save_dir", str(tmp_path / "out" / "tokenizer")]
    with pytest.raises(UserError, match="--mode load needs --qwen_model"):
        train_tokenizer.main(command)
    with pytest.raises(UserError, match="--vocab_size has no meaning with --mode load"):
        train_tokenizer.main([*command, "--qwen_model", "x", "--vocab_size", "300"])
    with pytest.raises(UserError, match="no tokenizer at .*missing.* — give a directory"):
        train_tokenizer.main([*command, "--qwen_model", str(tmp_path / "missing")])
    (tmp_path / "no_tokenizer").mkdir()
    with pytest.raises(UserError, match="--resize_model and --resized_dir belong together"):
        train_tokenizer.main([*command, "--qwen_model", "x", "--resize_model", "y"])
    with pytest.raises(UserError, match="--pad_vocab_to_multiple_of 64: only --resize_model uses it"):
        train_tokenizer.main([*command, "--qwen_model", "x", "--pad_vocab_to_multiple_of", "64"])
    with pytest.raises(UserError, match="no tokenizer at .*no_tokenizer"):
        train_tokenizer.main([*command, "--qwen_model", str(tmp_path / "no_tokenizer")])
    assert not list((tmp_path / "out").rglob("*"))


def test_compare_refusals(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--mode compare needs --tokenizers"):
        train_tokenizer.main(["--mode", "compare", "--data_path", str(data)])
    numbers = tmp_path / "numbers.txt"
    numbers.write_text("1 + 1 = 2\n")
    with pytest.raises(UserError, match="no English or Chinese line"):
        train_tokenizer.main(["--mode", "compare", "--tokenizers", "x", "--data_path", str(numbers)])
    with pytest.raises(UserError, match="no tokenizer at .*missing"):
        missing = str(tmp_path / "missing")
        train_tokenizer.main(["--mode", "compare", "--tokenizers", missing, "--data_path", str(data)])


def test_save_dir_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is in use"):
        train(data, tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        train(data, tmp_path / "file" / "below")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("x")
    with pytest.raises(UserError, match="notes is in use"):
        train(data, tmp_path / "notes")
    assert (tmp_path / "notes" / "a.md").read_text() == "x"


def test_exit_code_2_and_one_line(run_script: Callable, tmp_path: Path) -> None:
    arguments = ["--mode", "train", "--data_path", tmp_path / "none.jsonl", "--vocab_size", 600]
    result = run_script("train_tokenizer.py", *arguments, "--save_dir", tmp_path / "t", expect=2)
    assert result.stderr == f"error: {tmp_path}/none.jsonl: no such file or directory\n"
