"""The serving and quantisation benchmarks at a toy size: is the work what they say? Never: how fast."""

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks import common, quantization, serving
from benchmarks.common import shape
from smolkit.errors import UserError

TOY = shape(64, 1, 2, 1, 64, 400) | {"head_dim": 32, "max_position_embeddings": 256}


def test_loads() -> None:
    """Known sizes, the same every time; late arrivals after the first four."""
    assert serving.load_of("one", 64, 32, 0.5) == [(0.0, 64, 32)]
    assert serving.load_of("many", 64, 32, 0.5) == [(0.0, 64, 32)] * 16
    mixed = serving.load_of("mixed", 64, 32, 0.5)
    assert mixed == serving.load_of("mixed", 64, 32, 0.5) and len(mixed) == 24
    assert [delay for delay, *_ in mixed][:6] == [0, 0, 0, 0, 0.5, 1.0]
    assert all(16 <= prompt <= 128 and 8 <= new <= 64 for _, prompt, new in mixed)
    texts = serving.texts_of(mixed)
    assert [len(text) for text in texts] == [prompt for _, prompt, _ in mixed]
    assert len({text[:8] for text in texts}) == 24  # no common beginning


def test_one_token_per_character() -> None:
    tokenizer = serving.tokenizer_of(400)
    assert len(tokenizer) == 400 and len(tokenizer.encode("hello world", add_special_tokens=False)) == 11


def test_figures_by_hand() -> None:
    """Twelve tokens of three requests, the last at two seconds: six per second; the slowest first token."""
    load = [(0.0, 5, 4), (0.0, 5, 2), (1.0, 5, 6)]
    assert serving.summary(load, [(0.1, 1.0), (0.3, 2.0), (0.2, 1.5)]) == {"speed": 6.0, "ttft": 0.3}


def test_sides_answer_every_request(tmp_path: Path) -> None:
    """`drive` insists on the number of tokens, here for both sides that need no other environment."""
    serving.write_model(str(tmp_path), TOY)
    loads = {"mixed": serving.load_of("mixed", 8, 4, 0.001)}
    for result in (
        asyncio.run(serving.with_engine("engine", str(tmp_path), loads, "fp32")),
        serving.with_transformers(str(tmp_path), loads, "fp32"),
    ):
        assert result["mixed"]["speed"] > 0 < result["mixed"]["ttft"]


def test_a_wrong_number_of_tokens_is_no_result() -> None:
    async def stream(text: str, new: int):
        for _ in range(new - 1):
            yield 1

    with pytest.raises(AssertionError, match="3 tokens instead of 4"):
        asyncio.run(serving.drive(stream, {"one": [(0.0, 3, 4)]}))


def test_arguments_of_the_serving_benchmark() -> None:
    for arguments, message in ((["--sides", "vllm"], "needs --vllm_python"), (["--sides", "nobody"], "nobody unknown")):
        with pytest.raises(UserError, match=message):
            serving.main(arguments)
    for arguments in ([], ["--case", "tiny", "--model_path", "x"], ["--model_path", "x"]):
        with pytest.raises(UserError, match="give --model_path with --text, or --case"):
            quantization.main(arguments)


def test_the_table_of_quantised_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one's own text: bf16 against itself is no change, int8 moves less than int4."""

    def here(function: str, **arguments: object) -> dict:
        assert function == "benchmarks.quantization:measure"
        return json.loads(json.dumps(quantization.measure(**arguments)))

    monkeypatch.setattr(common, "in_a_process", here)
    monkeypatch.setattr(quantization, "prepare", lambda _: None)
    directory = tmp_path / "model"
    serving.write_model(str(directory), TOY)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "Some text of a few words. " * 20}) + "\n")
    flags = ["--model_path", str(directory), "--text", str(tmp_path / "text.jsonl"), "--rounds", "1", "--new", "2"]
    table = quantization.main([*flags, "--streams", "1"])["table"]
    assert table["bf16"]["perplexity_change"] == 0 == table["bf16"]["weight_error"]
    assert 0 < table["int8"]["weight_error"] < table["int4"]["weight_error"] < 0.2
    assert table["int4"]["mib"] < table["int8"]["mib"] < table["bf16"]["mib"]
    assert all(row["decode_1"][0] > 0 and row["perplexity"] > 1 for row in table.values())
