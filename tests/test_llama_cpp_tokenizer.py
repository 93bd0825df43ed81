"""Token ids by llama.cpp itself, for every way in which this toolkit cuts text, on all texts of the real samples."""

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import train_tokenizer
from smolkit.chat import add_chat_tokens, encode_text
from smolkit.tokenizer import PRE_TOKENIZERS, llama_cpp_name

HARD = [  # what patterns are likely to disagree on
    "It's I'LL we'Re  can'T ''s 'tis",
    "0 12 345 6789 1234567890 ３½Ⅷ 1e-5 2024年10月3日",
    " \t\n\r\n \n\n  trailing   \n",
    "naïve nai\u0308ve e\u0301 \u200d\u200b\ufeff",
    "x+=1;// --=>  !!?？！。。。……「」",
    "🙂👩‍👩‍👧‍👦🇨🇳 ✈️",
    "كتاب עברית हिन्दी ไทย 한국어 ひらがなカタカナ",
    "<|im_end|><|im_start|>user<tool_call>",
    "\x00\x01\x7f\x80",
]


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


@pytest.fixture(scope="module")
def texts(samples: Path) -> list[str]:
    """Without repetitions: prose, arithmetic and conversations, English and Chinese."""
    found = (samples / "wikitext2" / "valid.txt").read_text(encoding="utf-8").split("\n \n")
    found += strings([json.loads(line) for line in (samples / "gsm8k" / "train.jsonl").read_text().splitlines()])
    for path in sorted(samples.rglob("*.parquet")):
        found += strings(pyarrow.parquet.read_table(path).to_pylist())
    found = list(dict.fromkeys([*HARD, *found]))
    assert len(found) > 10_000 and sum(map(len, found)) > 5_000_000
    return found


def open_in_llama_cpp(tokenizer: PreTrainedTokenizerFast, file: Path) -> Any:
    """A GGUF file with nothing but the vocabulary, opened by llama.cpp."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python (pip install llama-cpp-python)")
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    names = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(llama_cpp_name(tokenizer))
    writer.add_token_list(names)
    kinds = [gguf.TokenType.CONTROL if i in control else gguf.TokenType.NORMAL for i in range(len(names))]
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return llama_cpp.Llama(str(file), vocab_only=True, verbose=False)


def check_same_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str], file: Path) -> None:
    llama = open_in_llama_cpp(tokenizer, file)
    for text in texts:
        theirs = llama.tokenize(text.encode(), add_bos=False, special=False)
        ours = encode_text(tokenizer, text)
        if theirs != ours:
            at = next(i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1])
            near = [tokenizer.convert_ids_to_tokens(ids[max(0, at - 3) : at + 5]) for ids in (theirs, ours)]
            pytest.fail(f"token {at} of {text[:60]!r}: llama.cpp has {near[0]}, we have {near[1]}")


@pytest.mark.slow
@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_trained_tokenizers(name: str, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[::7]))
    words = f"--mode train --pre_tokenizer {name} --vocab_size 6000 --save_dir {tmp_path}/tokenizer --data_path"
    train_tokenizer.main([*words.split(), str(tmp_path / "text.jsonl")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert llama_cpp_name(tokenizer) == name
    check_same_ids(tokenizer, texts, tmp_path / "vocabulary.gguf")


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_a_published_tokenizer(texts: list[str], samples: Path, tmp_path: Path) -> None:
    """Qwen's composes characters (NFC) before it cuts, which llama.cpp does not: only composed texts."""
    tokenizer = AutoTokenizer.from_pretrained(samples / "qwen2.5_tokenizer")
    add_chat_tokens(tokenizer)
    composed = [text for text in texts if unicodedata.is_normalized("NFC", text)]
    assert len(composed) > 0.99 * len(texts)
    check_same_ids(tokenizer, composed, tmp_path / "vocabulary.gguf")
