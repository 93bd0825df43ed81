"""The model card: every statement in it has to be one of the run's own."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import train_lora
import train_pretrain
from smol_config import SmolConfig
from smol_model import SmolForCausalLM
from smolkit.chat import add_chat_tokens, save_tokenizer
from smolkit.errors import UserError
from smolkit.evaluation.results import evaluation_section, update_card
from smolkit.model_card import model_card, table, write_card
from smolkit.tokenizer import train_bpe

SHAPE = "hidden_size=32 intermediate_size=48 num_hidden_layers=1 num_attention_heads=4".split()
WORDS = "the a cat dog sat on mat with red blue house of tree and ran fast slow very big small".split()
# As prepare_datasets.py names them: by repository, with a configuration, or as the user of a mixture wrote it.
REPORT = {
    "sources": {
        "gsm8k": {"repo": "openai/gsm8k"},
        "HuggingFaceTB/smoltalk:apigen-80k": {"repo": "HuggingFaceTB/smoltalk"},
        "HuggingFaceTB/smoltalk:longalign": {"repo": "HuggingFaceTB/smoltalk"},
        "own/openai-tools": {"repo": None},
    }
}


def lines(count: int, seed: int) -> list[str]:
    picks = torch.randint(0, len(WORDS), (count, 14), generator=torch.Generator().manual_seed(seed)).tolist()
    return [" ".join(WORDS[i] for i in row) for row in picks]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A pretraining run with validation and samples, and an adapter on top of it."""
    root = tmp_path_factory.mktemp("cards")
    for name, count in (("data/text.jsonl", 60), ("data/validation/text.jsonl", 6)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("".join(json.dumps({"text": line}) + "\n" for line in lines(count, count)))
    (root / "data" / "prepare_report.json").write_text(json.dumps(REPORT))
    chat = [
        {"messages": [{"role": "user", "content": line}, {"role": "assistant", "content": "Yes."}]}
        for line in lines(20, 3)
    ]
    (root / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    tokenizer = train_bpe(lines(200, 1), 320, "qwen2", True, ())
    add_chat_tokens(tokenizer)
    save_tokenizer(tokenizer, root / "tokenizer")
    common = f"--logging_steps 1 --per_device_train_batch_size 2 --max_steps 3 --data_cache_dir {root}/cache".split()
    train_pretrain.main(
        f"""--data_path {root}/data --tokenizer_path {root}/tokenizer --model_size tiny --block_size 32
        --learning_rate 0.00123 --seed 7 --output_dir {root}/base --sample_prompts""".split()
        + ["the | cat\nsat"] + ["--model_overrides", *SHAPE] + common
    )  # fmt: skip
    lora = f"--data_path {root}/chat.jsonl --base_model {root}/base --max_length 64 --output_dir {root}/lora"
    train_lora.main(lora.split() + common)
    return root


def read_card(path: Path) -> ModelCard:
    """Parsed by the hub's library, metadata errors included."""
    card = ModelCard(path.read_text(), ignore_metadata_errors=False)
    assert yaml.safe_load(path.read_text().split("---\n")[1]) == yaml.safe_load(card.data.to_yaml())
    return card


def test_the_card_of_a_finished_run_says_what_the_run_left(runs):
    card = read_card(runs / "base" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.tags == ["qwen3"] and card.data.datasets == ["openai/gsm8k", "HuggingFaceTB/smoltalk"]
    assert card.data.license is None and card.data.eval_results is None
    model = SmolForCausalLM.from_pretrained(runs / "base")
    assert f"qwen3, {sum(p.numel() for p in model.parameters()):,} parameters" in card.text
    rows = [json.loads(line) for line in (runs / "base" / "metrics.jsonl").read_text().splitlines()]
    evaluated = next(row["eval_loss"] for row in rows if "eval_loss" in row)
    for text in (
        "# base",
        f"| validation loss | {evaluated:.4f} nats per token |",
        "| learning rate | 0.00123 |",
        "| seed | 7 |",
        "| steps | 3 |",
        "| row length, tokens | 32 |",
        "| rows per step | 2 |",
        f"| `data/text.jsonl` | {(runs / 'data' / 'text.jsonl').stat().st_size:,} |",
        "Prepared from openai/gsm8k, HuggingFaceTB/smoltalk.",
        "| the \\| cat<br>sat |",
        "![Curves of the run](curves.png)",
        "One run with seed 7",
        "Not evaluated",
    ):
        assert text in card.text, text
    assert (runs / "base" / "curves.png").is_file()


def test_the_card_of_an_adapter(runs):
    card = read_card(runs / "lora" / "README.md")
    assert card.data.library_name == "peft" and card.data.tags == ["qwen3", "lora"]
    assert "AutoPeftModelForCausalLM" in card.text and f"| started from | {runs.name}/base |" in card.text
    settings = [row.split(" | ")[0] for row in card.text.split("## Training")[1].split("\n\n")[1].splitlines()]
    assert "| seed" in settings and len(settings) == len(set(settings))
    assert str(runs) not in card.text
    assert "| LoRA rank | 8 |" in card.text


METRICS = {"qa_en": 0.875, "qa_en_n": 1000, "bits_per_byte": 1.23456, "text_tokens": 12345, "seconds": 3.0}


def test_an_evaluation_enters_the_card_when_it_is_written_again(runs):
    before = (runs / "base" / "README.md").read_text()
    assert write_card(runs / "base") == runs / "base" / "README.md"
    assert (runs / "base" / "README.md").read_text() == before  # the same facts, from the disk
    (runs / "base" / "eval").mkdir()
    intervals = {"qa_en": [0.85, 0.9], "bits_per_byte": [1.2, 1.3]}
    more = {"shares": ["qa_en"], "intervals": intervals, "data": {"qa_en": "exam.jsonl"}, "settings": {}}
    (runs / "base" / "eval" / "metrics.json").write_text(json.dumps(METRICS | more))
    card = read_card(write_card(runs / "base"))
    assert evaluation_section(METRICS | more) in card.text and "87.5" in card.text
    assert "Not evaluated" not in card.text
    written = (runs / "base" / "README.md").read_text()
    update_card(runs / "base" / "README.md", METRICS | more)  # eval_model.py finds its section: nothing to change
    assert (runs / "base" / "README.md").read_text() == written
    (runs / "base" / "README.md").write_text(before)  # and in a card that says "Not evaluated" it takes that back
    update_card(runs / "base" / "README.md", METRICS | more)
    updated = read_card(runs / "base" / "README.md")
    assert "87.5" in updated.text and "Not evaluated" not in updated.text and "One run with seed 7" in updated.text
    found = {result.metric_type: (result.metric_value, result.dataset_name) for result in card.data.eval_results}
    assert found["qa_en"] == (0.875, "exam.jsonl") and found["bits_per_byte"] == (1.23456, "evaluation")
    assert "qa_en_n" not in found


def test_findings_of_the_diagnosis_become_limits(runs, tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text((runs / "base" / "config.json").read_text())
    findings = [{"level": "warning", "text": "Loss rose at the end."}, {"level": "good", "text": "Learned."}]
    (directory / "diagnosis.json").write_text(json.dumps({"findings": findings}))
    text = model_card(directory, facts={})
    assert "- Loss rose at the end.\n" in text and "Learned" not in text
    assert "## Training" not in text and "## Data" not in text  # nothing is known, nothing is said


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no model there"):
        write_card(tmp_path)
    SmolConfig(vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no finished run"):
        write_card(tmp_path)
    (tmp_path / "training_complete.json").write_text('{"step": 1, "facts": {}}')
    (tmp_path / "run_settings.json").write_text("{broken")
    with pytest.raises(UserError, match="run_settings.json"):
        write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_cells_cannot_break_a_table():
    assert table(("a", "b"), [("x|y", "1\n2")]) == "| a | b |\n| --- | --- |\n| x\\|y | 1<br>2 |"
