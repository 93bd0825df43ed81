"""Arguments of the training scripts: spellings, YAML, defaults, and errors that name the remedy."""

import pytest

from smolkit.arguments import NewModelArguments
from smolkit.checkpoints import changed_preset
from smolkit.command_line import STAGES, parse
from smolkit.errors import UserError

PRETRAIN, SFT, LORA, DPO = (STAGES[name] for name in ("pretrain", "sft", "lora", "dpo"))


def read(kinds: tuple, line: str) -> tuple:
    return parse(kinds, line.split(), "description")


@pytest.mark.parametrize(
    ("kinds", "line"),
    [  # the command lines of the documents this toolkit was specified from
        (
            PRETRAIN,
            "--data_path data/pretrain/pretrain_data.jsonl --tokenizer_path tokenizer --tokenizer_type qwen "
            "--model_size base --num_epochs 3",
        ),
        (
            SFT,
            "--data_path data/sft/sft_data.jsonl --base_model path --tokenizer_path tokenizer "
            "--tokenizer_type qwen --output_dir out",
        ),
        (
            LORA,
            "--data_path data/sft/sft_data.jsonl --base_model path --tokenizer_path tokenizer "
            "--tokenizer_type qwen --lora_r 8",
        ),
        (
            DPO,
            "--data_path data/dpo/dpo_data.jsonl --model_path path --tokenizer_path tokenizer "
            "--tokenizer_type qwen --output_dir out",
        ),
    ],
)
def test_reference_command_lines_are_accepted(kinds: tuple, line: str) -> None:
    stage = read(kinds, line)[0]
    assert stage.tokenizer_type == "qwen"


def test_spellings_and_defaults() -> None:
    stage, new, args = read(PRETRAIN, "--data-path a b --num_epochs 3 --model_overrides capacity_factor=none")
    assert stage.data_path == ["a", "b"]
    assert new.overrides() == {"capacity_factor": None}
    assert (args.num_train_epochs, args.adam_beta2, args.bf16, args.report_to) == (3.0, 0.95, False, [])
    assert not args.logging_nan_inf_filter
    assert read(DPO, "--data_path a --base_model m")[0].model_path == "m"
    assert read(SFT, "--data_path a --model_path m")[0].base_model == "m"


def test_every_library_flag_works() -> None:
    args = read(DPO, "--data_path a --model_path m --loss_type ipo --beta 0.3 --warmup_steps 7 --seed 3")[1]
    assert (args.loss_type, args.beta, args.warmup_steps, args.seed) == (["ipo"], 0.3, 7, 3)


def test_overrides_are_typed() -> None:
    new = NewModelArguments(model_overrides=["a=3", "b=0.5", "c=true", "d=none", "e=silu", 'f={"x": 1}'])
    assert new.overrides() == {"a": 3, "b": 0.5, "c": True, "d": None, "e": "silu", "f": {"x": 1}}


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"hidden_size": "32 num_hidden_layers=2"}, r"hidden_size=32 num.*: expected int \(several fields: a=1 b=2\)"),
        ({"hidden_size": None}, "hidden_size=None: expected int"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1: expected bool"),
        ({"attention_dropout": "low"}, "attention_dropout=low: expected float"),
        ({"hidden": 3}, "hidden: no such field"),
    ],
)
def test_overrides_of_another_type_are_refused(overrides: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        changed_preset("tiny", overrides)
    config = changed_preset("tiny", {"attention_dropout": 0, "capacity_factor": None, "head_dim": None})
    assert type(config.attention_dropout) is float


def test_yaml_is_overridden_by_the_command_line(tmp_path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("data_path: x.jsonl\nlearning_rate: 3e-4\nnum_epochs: 2\nmodel_size: tiny\nseed: 5\n")
    stage, new, args = read(PRETRAIN, f"--config {config} --seed 6")
    assert stage.data_path == ["x.jsonl"]
    assert new.model_size == "tiny"
    assert (args.learning_rate, args.num_train_epochs, args.seed) == (3e-4, 2.0, 6)


@pytest.mark.parametrize(
    ("content", "message"),
    [("nonsense: 1", "unknown argument 'nonsense'"), ("- 1", "expected a mapping"), ("a: [", "not valid YAML")],
)
def test_bad_yaml(tmp_path, content: str, message: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(content)
    with pytest.raises(UserError, match=message):
        read(PRETRAIN, f"--config {config}")


@pytest.mark.parametrize(
    ("kinds", "line", "message"),
    [
        (PRETRAIN, "--model_size tiny", "--data_path is required"),
        (PRETRAIN, "--config missing.yaml", "not found"),
        (PRETRAIN, "--data_path a --block_size 2", "--block_size 2"),
        (PRETRAIN, "--data_path a --num_epochs 0", "--num_epochs 0"),
        (PRETRAIN, "--data_path a --learning_rate -1", "--learning_rate -1"),
        (PRETRAIN, "--data_path a --per_device_train_batch_size 0", "--per_device_train_batch_size 0"),
        (PRETRAIN, "--data_path a --model_overrides hidden_size", "field=value"),
        (PRETRAIN, "--data_path a --pad_vocab_to_multiple_of 0", "--pad_vocab_to_multiple_of 0"),
        (PRETRAIN, "--data_path a --eval_strategy epoch --load_best_model_at_end", "strategy to match"),
        (PRETRAIN, "--data_path a --remove_unused_columns true", "--remove_unused_columns"),
        (PRETRAIN, "--data_path a --dry_run --mfu 2", r"--mfu 2.0 must be in \(0, 1\]"),
        (PRETRAIN, "--data_path a --threads 0", "--threads 0 must be at least 1"),
        (PRETRAIN, "--data_path a --max_eval_rows -1", "--max_eval_rows -1 must not be negative"),
        (PRETRAIN, "--data_path a --base_model m --upcycle_from m", "--base_model and --upcycle_from contradict"),
        (PRETRAIN, "--data_path a --upcycle_experts 4", "--upcycle_experts needs --upcycle_from"),
        (SFT, "--data_path a", "--base_model is required"),
        (SFT, "--data_path a --base_model m --init_from_scratch", "contradict"),
        (LORA, "--data_path a --base_model m --lora_r 0", "--lora_r 0"),
        (LORA, "--data_path a --base_model m --lora_target experts --lora_dropout 0.1", "--lora_dropout 0"),
        (LORA, "--data_path a --base_model m --lora_dropout 1", r"--lora_dropout 1.0 must be in \[0, 1\)"),
        (LORA, "--data_path a --base_model m --lora_target experts --use_dora", "no DoRA for fused weights"),
        (LORA, "--data_path a", "--base_model is required: the checkpoint directory to adapt"),
        (DPO, "--data_path a", "--model_path is required"),
        (DPO, "--data_path a --model_path m --rpo_alpha -1", "--rpo_alpha -1.0 must not be negative"),
        (DPO, "--data_path a --model_path m --use_lora --ref_model_path r", "--use_lora needs no --ref_model_path"),
        (DPO, "--data_path a --model_path m --loss_type ipo sft --loss_weights 1", "loss_weights"),
    ],
)
def test_mistakes_are_user_errors(kinds: tuple, line: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read(kinds, line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["--nonsense 1", "--num_epoch 3"])
def test_unknown_flags_are_not_guessed(line: str) -> None:
    with pytest.raises(UserError, match=f"unknown arguments: {line}"):
        read(PRETRAIN, line)


@pytest.mark.parametrize("line", ["--learning_rate fast", "--tokenizer_type gpt", "--max_steps"])
def test_malformed_values_leave_with_exit_code_2(line: str, capsys) -> None:
    with pytest.raises(SystemExit) as leaving:
        read(PRETRAIN, line)
    assert leaving.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_help_is_short_and_help_all_is_complete(capsys) -> None:
    texts = []
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as leaving:
            read(PRETRAIN, flag)
        assert leaving.value.code == 0
        texts.append(capsys.readouterr().out)
    assert all(flag in texts[0] for flag in ("--data_path", "--model_size", "--num_epochs", "--help_all"))
    assert "--hub_strategy" not in texts[0]
    assert "--hub_strategy" in texts[1]
