"""Models with more vocabulary rows than the tokenizer has entries (Qwen: 151,936 for 151,665), and resizing.

Padded rows take part in the softmax, as they do in every other program, so training pushes their logits down. They are
never an input, a label or a sampled token, and they are written to disk with the rest.
"""

import asyncio
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import train_full_sft
import train_tokenizer
from smol_model import SmolForCausalLM
from smolkit.batch import generate_batch
from smolkit.chat import add_chat_tokens, save_tokenizer
from smolkit.checkpoints import new_config
from smolkit.errors import UserError
from smolkit.evaluation.subjects import transformers_generate
from smolkit.packing import IGNORE, PackedCollator, render_conversations
from smolkit.sampling import GenerationRequest
from smolkit.serving import load_engine

ENTRIES, ROWS = 263, 320  # 256 bytes and 7 control tokens; 57 rows that mean nothing
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    add_chat_tokens(tokenizer)
    assert len(tokenizer) == ENTRIES
    return tokenizer


def llama(rows: int, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def padded(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that prefers its padded rows: their logits are the largest at every position."""
    model = llama(ROWS)
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight[ENTRIES:] = 50 * model.lm_head.weight[: ROWS - ENTRIES]
    directory = tmp_path_factory.mktemp("padded")
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    return directory


def test_padded_rows_are_never_sampled(padded: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = SmolForCausalLM.from_pretrained(padded)
    prompts = [[1, 2, 3], [4, 5]]
    unlimited = [i for ids in generate_batch(model, prompts, 16, []) for i in ids]
    assert max(unlimited) >= ENTRIES  # this model would write them
    for temperature in (0.0, 1.0, 5.0):
        limited = generate_batch(model, prompts, 16, [], temperature=temperature, seed=0, vocab_limit=ENTRIES)
        assert all(0 <= i < ENTRIES for ids in limited for i in ids)

    engine = load_engine(padded, tokenizer, model_name="m")
    request = GenerationRequest(prompt_ids=[1, 2, 3], max_tokens=16, temperature=2.0, seed=1, logprobs=5)

    async def ask() -> list:
        return [event async for event in engine.generate(request)]

    try:
        events = asyncio.run(ask())
    finally:
        engine.close()
    assert len(events) == 16 and all(event.token_id < ENTRIES for event in events)
    assert all(i < ENTRIES for event in events for i, _ in event.top_logprobs)
    theirs = transformers_generate(model, tokenizer, 8, 2)(prompts)
    assert all(i < ENTRIES for ids in theirs for i in ids)


def test_padded_rows_are_never_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    longer = {"messages": [TURNS[0], {"role": "assistant", "content": "Hello " * 3}]}
    pieces, _ = render_conversations([{"messages": TURNS}, longer], tokenizer, 64)
    rows = [{"input_ids": p.input_ids, "labels": p.labels, "position_ids": p.input_ids * 0} for p in pieces]
    batch = PackedCollator(tokenizer.pad_token_id)(rows)  # the first is padded to the length of the second
    assert int((batch["input_ids"] == tokenizer.pad_token_id).sum()) == len("Hello " * 3) - len("Hello")
    assert int(batch["input_ids"].max()) < ENTRIES
    assert all(label == IGNORE or label < ENTRIES for label in batch["labels"].flatten().tolist())


def test_training_and_export_keep_the_rows(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A padded checkpoint comes out of fine-tuning with all its rows, and other programs read it."""
    start = tmp_path / "start"
    llama(ROWS, tied=True).save_pretrained(start)
    save_tokenizer(tokenizer, start)
    data = tmp_path / "sft.jsonl"
    data.write_text(json.dumps({"messages": TURNS}) + "\n")
    out = tmp_path / "out"
    options = ["--max_steps", "2", "--max_length", "64", "--per_device_train_batch_size", "1", "--use_cpu"]
    paths = ["--data_path", str(data), "--base_model", str(start), "--output_dir", str(out)]
    train_full_sft.main([*paths, *options, "--weights_dtype", "fp32", "--learning_rate", "1e-2"])
    assert json.loads((out / "config.json").read_text())["vocab_size"] == ROWS
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [ROWS, 32]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.get_output_embeddings().weight.shape[0] == ROWS
    assert len(AutoTokenizer.from_pretrained(out)) == ENTRIES
    # the softmax over all rows has pushed the padded logits down, which protects programs that do not know the limit
    inputs = torch.tensor([tokenizer.apply_chat_template(TURNS, return_dict=False)])
    before, after = (
        model(inputs).logits[0, -4:].softmax(-1)[:, ENTRIES:].sum().item()
        for model in (AutoModelForCausalLM.from_pretrained(start), loaded)
    )
    assert after < before


def test_real_sizes_of_qwen(samples: Path) -> None:
    """151,665 entries fit the 151,936 rows; two more for tools still do, so nothing has to be resized."""
    tokenizer = AutoTokenizer.from_pretrained(samples / "qwen2.5_tokenizer")
    rows = json.loads((samples / "qwen2.5_tokenizer" / "config.json").read_text())["vocab_size"]
    assert (len(tokenizer), rows) == (151_665, 151_936)
    assert add_chat_tokens(tokenizer) == 2 and len(tokenizer) < rows
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1  # no holes: the limit is the number of entries
    assert new_config("tiny", {}, tokenizer, rows).vocab_size == rows
    assert new_config("tiny", {}, tokenizer, multiple_of=128).vocab_size == 151_680
    with pytest.raises(UserError, match="--vocab_size 151646 is less than the 151667 entries"):
        new_config("tiny", {}, tokenizer, 151_646)  # Qwen1.5's number


# --- resizing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_adds_rows_and_changes_no_other(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, tied: bool, capsys: pytest.CaptureFixture
) -> None:
    source, model = tmp_path / "source", llama(ENTRIES, tied)
    model.save_pretrained(source)
    save_tokenizer(tokenizer, source)
    command = ["--mode", "load", "--qwen_model", str(source), "--save_dir", str(tmp_path / "tok")]
    resize = ["--resize_model", str(source), "--resized_dir", str(tmp_path / "big"), "--pad_vocab_to_multiple_of", "64"]
    train_tokenizer.main([*command, "--extra_special_tokens", "<a>", "<b>", *resize])
    assert "263 → 320 vocabulary rows for 265 entries" in capsys.readouterr().out
    big = AutoModelForCausalLM.from_pretrained(tmp_path / "big")
    assert big.config.vocab_size == 320 and len(AutoTokenizer.from_pretrained(tmp_path / "big")) == 265
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(model, name)().weight, getattr(big, name)().weight
        assert torch.equal(new[:ENTRIES], old) and new.shape[0] == 320
        assert (new[ENTRIES:].mean(0) - old.mean(0)).abs().max() < old.std()  # near the mean of the others
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(big(ids).logits[..., :ENTRIES], model(ids).logits, rtol=0, atol=1e-6)


def test_rows_that_are_padded_already_are_used(padded: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["--mode", "load", "--qwen_model", str(padded), "--save_dir", str(tmp_path / "tok")]
    resize = ["--resize_model", str(padded), "--resized_dir", str(tmp_path / "same")]
    train_tokenizer.main([*command, "--extra_special_tokens", "<a>", *resize])
    assert "320 → 320 vocabulary rows for 264 entries" in capsys.readouterr().out
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (padded, tmp_path / "same"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(UserError, match="--resized_dir .* is in use"):
        train_tokenizer.main([*command, "--extra_special_tokens", "<a>", *resize])
