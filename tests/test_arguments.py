"""Arguments of the training scripts: spellings, YAML, defaults, and errors that name the remedy."""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
import yaml
from trl import DPOConfig, DPOTrainer

from smolkit import arguments
from smolkit.arguments import NewModelArguments
from smolkit.checkpoints import changed_preset
from smolkit.command_line import STAGES, parse
from smolkit.errors import UserError
from smolkit.runs import FREE, SETTINGS_FILE, find_start, run_settings

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


# --- what nothing reads, or nothing can make ----------------------------------------------------------------

START = {"pretrain": "", "sft": "--base_model m", "lora": "--base_model m", "dpo": "--model_path m"}


def refusal(stage: str, line: str) -> str:
    with pytest.raises(UserError) as error:
        read(STAGES[stage], f"--data_path a {START[stage]} {line}")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("stage", STAGES)
def test_smoothed_labels_are_refused_in_every_stage(stage: str) -> None:
    """They would not be shifted: the model would learn the token it sees."""
    why = "means nothing for pairs" if stage == "dpo" else "would teach the model to copy its input"
    assert refusal(stage, "--label_smoothing_factor 0.1").startswith(f"--label_smoothing_factor {why}")


UNREAD = """--loss_type dft|--loss_type chunked_nll|--chat_template_path t|--eos_token x|--pad_token x
    --completion_only_loss true|--assistant_only_loss true|--pad_to_multiple_of 8|--dataset_text_field body
    --dataset_kwargs {"skip_prepare_dataset":false}|--eval_packing true|--packing_strategy wrapped
    --shuffle_dataset true|--dataset_num_proc 4|--truncation_mode keep_end|--padding_free true
    --model_init_kwargs {"dtype":"float16"}
    --trust_remote_code true|--bf16_full_eval true|--use_liger_kernel true|--do_predict true|--use_cache true
    --enable_jit_checkpoint true|--batch_eval_metrics true|--include_for_metrics loss|--fp16_full_eval true"""


@pytest.mark.parametrize("line", re.split(r"\||\n +", UNREAD))
def test_what_fine_tuning_does_not_read_is_refused(line: str) -> None:
    for stage in ("sft", "lora"):
        found = refusal(stage, line)
        flag, value = line.split()
        assert found.startswith(f"{flag} ") and "leave it out" in found
        assert value.startswith("{") or value.lower() in found.lower()


@pytest.mark.parametrize(
    "line", "--sync_ref_model true|--ref_model_sync_steps 9|--pad_token x|--truncation_mode keep_end".split("|")
)
def test_what_preferences_cannot_keep_is_refused(line: str) -> None:
    assert refusal("dpo", line).startswith(line.split()[0])


def test_the_synced_reference_is_in_no_checkpoint() -> None:
    assert "no checkpoint holds the reference" in refusal("dpo", "--sync_ref_model true")
    assert "choose random, sequential" in refusal("sft", "--train_sampling_strategy batch_rebalance")
    assert "--activation_offloading needs a GPU" in refusal("dpo", "--use_cpu true --activation_offloading true")


def test_the_defaults_may_be_given() -> None:
    read(SFT, "--data_path a --base_model m --loss_type nll --packing_strategy bfd --label_smoothing_factor 0")
    read(DPO, "--data_path a --model_path m --loss_type ipo --truncation_mode keep_start --sync_ref_model false")


def test_every_refused_field_is_one_of_the_library() -> None:
    fields = {stage: {item.name for item in dataclasses.fields(kinds[-1])} for stage, kinds in STAGES.items()}
    assert arguments.UNREAD.keys() <= fields["sft"] and arguments.UNREAD_CONVERSATIONS.keys() <= fields["sft"]
    assert arguments.UNREAD_PAIRS.keys() <= fields["dpo"]


def test_what_is_known_of_losses_is_what_trl_says() -> None:
    documented = DPOConfig.__doc__.split("loss_type (`list[str]`")[1].split("loss_weights")[0]
    assert set(re.findall(r"`'(\w+)'`", documented)) == set(arguments.LOSSES)
    (diverging,) = re.findall(r"f_divergence_loss_types = \{(.*?)\}", inspect.getsource(DPOTrainer))
    assert set(re.findall(r'"(\w+)"', diverging)) == set(arguments.DIVERGING)
    branches = re.split(r"(?:el)?if loss_type == ", inspect.getsource(DPOTrainer._compute_loss))[1:]
    smoothed = {branch.split('"')[1] for branch in branches if "self.label_smoothing" in branch}
    assert smoothed == set(arguments.SMOOTHED)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--loss_type foo", "--loss_type foo: TRL has sigmoid, hinge, "),
        ("--loss_type exo_pair", "--loss_type exo_pair needs --label_smoothing above 0"),
        ("--loss_type exo_pair --label_smoothing 0.5", "--label_smoothing 0.5 must be in [0, 0.5)"),
        ("--label_smoothing 0.1", "--label_smoothing 0.1: for --loss_type exo_pair, robust, aot, aot_unpaired"),
        ("--f_divergence_type foo", "--f_divergence_type foo: choose reverse_kl, "),
        ("--loss_type aot --f_divergence_type forward_kl", "--f_divergence_type forward_kl: not for --loss_type aot"),
        ("--loss_type aot --use_weighting true", "--use_weighting true: not for --loss_type aot"),
        ("--neftune_noise_alpha 5", "--neftune_noise_alpha would blur"),
    ],
)
def test_losses_that_trl_does_not_have_are_refused(line: str, message: str) -> None:
    assert refusal("dpo", line).startswith(message)


def test_losses_that_trl_has_are_not() -> None:
    for line in ("exo_pair --label_smoothing 1e-3", "sigmoid sft --f_divergence_type js_divergence", "aot"):
        read(DPO, f"--data_path a --model_path m --loss_type {line}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lr_scheduler_type warmup_stable_decay", '--lr_scheduler_kwargs \'{"num_decay_steps": 100}'),
        ("--lr_scheduler_type cosine_with_min_lr", '--lr_scheduler_kwargs \'{"min_lr_rate": 0.1}'),
        ('--lr_scheduler_type cosine --lr_scheduler_kwargs {"cycles":1}', "unexpected keyword argument 'cycles'"),
        ('--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":"1e-5"}', "unsupported operand"),
        ("--optim adamw_bnb_8bit", "pip install -U bitsandbytes"),
        ("--optim galore_adamw", "You need to install `galore_torch`"),
        ("--adam_beta1 1.5", "--optim adamw_torch_fused: Invalid beta parameter"),
        ("--optim_args momentum=0.9", "--optim_args momentum=0.9: --optim adamw_torch_fused takes none"),
        ("--metric_for_best_model accuracy", "accuracy: an evaluation gives loss, bits_per_byte; choose one"),
    ],
)
def test_what_the_library_cannot_make_is_refused_before_any_work(line: str, message: str) -> None:
    assert message in refusal("sft", line)


def test_what_it_can_make_is_not() -> None:
    for line in (
        '--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs {"num_decay_steps":100} --max_steps 10',
        "--optim sgd --optim_args momentum=0.9",
        "--optim adafactor",
        "--lr_scheduler_type reduce_lr_on_plateau --eval_strategy steps",
    ):
        read(SFT, f"--data_path a --base_model m {line}")
    best = "--eval_strategy steps --load_best_model_at_end true --metric_for_best_model"
    args = [read(SFT, f"--data_path a --base_model m {best} {name}")[-1] for name in ("bits_per_byte", "eval_loss")]
    assert [each.greater_is_better for each in args] == [False, False]
    assert read(DPO, f"--data_path a --model_path m {best} rewards/accuracies")[-1].greater_is_better
    assert "accuracies" in refusal("dpo", f"{best} accuracy")


def test_packing_is_kept_as_it_was_given() -> None:
    """What packs here takes it; TRL must not see it, and what is saved must."""
    for value in (True, False):
        args = read(SFT, f"--data_path a --base_model m --packing {value}")[-1]
        assert (args.packing, json.loads(args.to_json_string())["packing"]) == (value, value)
        assert (args.take_packing(), args.packing) == (value, False)
        assert json.loads(args.to_json_string())["packing"] == value


# --- YAML is checked like the command line ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("packing_strategy: bestfit", 'packing_strategy: "bestfit": expected one of best_fit, blocks'),
        ("weights_dtype: fp16", 'weights_dtype: "fp16": expected one of auto, bf16, fp32'),
        ("resume: nevr", 'resume: "nevr": expected one of auto, never'),
        ("lr-scheduler-type: cosin", 'lr-scheduler-type: "cosin": expected one of linear, cosine, '),
        ("max_steps: 1.5", "max_steps: 1.5: expected int"),
        ("max_steps: [1]", "max_steps: [1]: expected int"),
        ("max_eval_rows: 3.5", "max_eval_rows: 3.5: expected int"),
        ("max_steps:", "max_steps: null: expected int"),
        ("threads: true", "threads: true: expected int"),
        ("epochs: many", 'epochs: "many": expected float'),
        ("bf16: maybe", 'bf16: "maybe": expected true or false'),
        ("output_dir: [a, b]", 'output_dir: ["a", "b"]: expected str'),
        ("data_path: [{a: 1}]", 'data_path: [{"a": 1}]: expected str, or a list of it'),
        ("model_overrides: [{hidden_size: 64}]", "expected str, or a list of it, or a mapping"),
        ("lr_scheduler_kwargs: [1]", "lr_scheduler_kwargs: [1]: expected a mapping"),
    ],
)
def test_a_wrong_value_in_yaml_is_refused_by_name(tmp_path, content: str, message: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(content)
    with pytest.raises(UserError) as error:
        read(PRETRAIN, f"--config {config}" + ("" if "data_path" in content else " --data_path a"))
    assert str(error.value).startswith(f"{config}: ") and message in str(error.value)


def test_yaml_values_become_what_the_command_line_makes_of_them(tmp_path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("""
        data_path: [1, text.jsonl]
        model_overrides: {hidden_size: 64, capacity_factor: null, qk_norm: true, rope_parameters: {rope_theta: 1e6}}
        lr_scheduler_type: cosine_with_min_lr
        lr_scheduler_kwargs: {min_lr: 1e-5}
        save_strategy: no
        bf16: true
        data_tokens: 1000000
        logging_steps: 5
        threads: null
        report_to: [none]
    """)
    stage, new, args = read(PRETRAIN, f"--config {config}")
    assert stage.data_path == ["1", "text.jsonl"] and stage.data_tokens == "1000000" and stage.threads is None
    assert new.overrides() == {
        "hidden_size": 64, "capacity_factor": None, "qk_norm": True, "rope_parameters": {"rope_theta": 1e6}
    }  # fmt: skip
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert (args.save_strategy.value, args.bf16, args.logging_steps, args.report_to) == ("no", True, 5, [])


@pytest.mark.parametrize("stage", STAGES)
def test_every_default_may_be_written_into_yaml(tmp_path, stage: str) -> None:
    """The arguments of a run, as they are saved, are values that --config takes."""
    parsed = read(STAGES[stage], f"--data_path a {START[stage]} --output_dir {tmp_path}")
    values = {name: value for each in parsed[:-1] for name, value in vars(each).items()}
    made = {item.name for item in dataclasses.fields(STAGES[stage][-1]) if item.init}
    made -= {"hub_token", "eos_token", "pad_token"}  # hidden by the library
    made -= {"dataset_kwargs", "pad_to_multiple_of"}  # filled in by this toolkit and by TRL
    values |= {name: value for name, value in json.loads(parsed[-1].to_json_string()).items() if name in made}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    again = read(STAGES[stage], f"--config {config}")
    again[0].config = None
    assert again[:-1] == parsed[:-1]
    assert json.loads(again[-1].to_json_string()) == json.loads(parsed[-1].to_json_string())


# --- what determines a run ----------------------------------------------------------------------------------


def settings(stage: str, line: str = "") -> dict:
    parsed = read(STAGES[stage], f"--data_path a {START[stage]} --output_dir out --max_steps 9 {line}")
    return run_settings(parsed[0], parsed[-1], [], strategy=None)


CHANGES = """--use_weighting true|--ld_alpha 0.5|--disable_dropout false|--dataloader_drop_last true
    --f_divergence_type forward_kl|--f_alpha_divergence_coef 0.3|--discopop_tau 0.1|--seed 1|--data_seed 1
    --average_tokens_across_devices false|--optim sgd --optim_args momentum=0.9|--train_sampling_strategy sequential
    --load_best_model_at_end true --eval_strategy steps|--metric_for_best_model loss|--greater_is_better true
    --beta 0.2|--rpo_alpha 1|--packing true|--router_aux_loss_coef 0.1|--max_length 64|--loss_type ipo|--fp16 false
    --learning_rate 1|--lr_scheduler_kwargs {"num_cycles":1}|--optim_target_modules q_proj
    --auto_find_batch_size true"""
SAME = """--logging_steps 1|--save_steps 2|--save_strategy epoch|--eval_strategy epoch|--skip_nonfinite 3|--keep_every 2
    --async_save true|--dataloader_num_workers 2|--report_to none|--run_name x|--gradient_checkpointing true
    --per_device_eval_batch_size 1|--torch_compile true|--fsdp full_shard|--use_cpu true|--tf32 false|--threads 1
    --precompute_ref_log_probs false|--merge true --use_lora false|--ddp_timeout 9|--log_level debug|--resume never
    --save_total_limit 5|--attn_implementation eager|--expert_parallel_size 2|--num_proc 2|--output_dir other"""


def test_what_changes_the_result_is_written_down_and_nothing_else() -> None:
    before = settings("dpo")
    for line in re.split(r"\||\n +", CHANGES):
        assert (settings("dpo", line) == before) == (line == "--fp16 false"), line
    for line in re.split(r"\||\n +", SAME):
        assert settings("dpo", line) == before, line
    assert settings("sft", "--neftune_noise_alpha 5") != settings("sft") != settings("sft", "--packing false")


def test_what_may_change_is_an_argument() -> None:
    names = {item.name for kinds in STAGES.values() for kind in kinds for item in dataclasses.fields(kind)}
    assert FREE <= names


def test_records_of_other_versions_are_continued(tmp_path) -> None:
    """One of before all settings were written down, and one of a library that has other options."""
    directory = tmp_path / "out"
    directory.mkdir()

    def start(record: dict, line: str = "") -> tuple:
        (directory / SETTINGS_FILE).write_text(json.dumps(record))
        stage, args = read(DPO, f"--data_path a --model_path m --output_dir {directory} --max_steps 9 {line}")
        now = run_settings(stage, args, [], strategy=None)
        found = find_start(args, now, stage.resume)
        return found, now

    _, now = start({"additional_steps": 0, "layout": [1, 8, 1]})
    kept = """learning_rate lr_scheduler_type warmup_steps weight_decay max_steps seed beta loss_type weights_dtype
        additional_steps layout global_batch_size inputs strategy""".split()
    old = {name: now[name] for name in kept}
    for line in ("", "--ld_alpha 0.5", "--use_weighting true"):  # which of these it was, it does not say
        assert start(old, line)[0] == (False, None, [])
    with pytest.raises(UserError, match="beta was 0.1 and is now 0.2"):
        start(old, "--beta 0.2")
    assert start(now | {"an_option_of_yesterday": 1})[0] == (False, None, [])
    today = {name: value for name, value in now.items() if name != "discopop_tau"}  # new in a later library
    assert start(today)[0] == (False, None, [])
    with pytest.raises(UserError, match="ld_alpha was None and is now 0.5"):
        start(today, "--ld_alpha 0.5")
    checkpoint = tmp_path / "elsewhere" / "checkpoint-4"
    with pytest.raises(UserError, match="branched_from was None and is now"):
        start(old, f"--resume_from_checkpoint {checkpoint}")


@pytest.mark.parametrize("before", STAGES)
def test_the_directory_of_another_stage_is_refused(tmp_path, before: str) -> None:
    """With the same values in all they have in common; also where the record is an old one, of few of the library's."""
    common = f"--data_path a --output_dir {tmp_path} --max_steps 9 --learning_rate 1e-3 --num_epochs 1 --weight_decay 0"
    parsed = {name: read(STAGES[name], f"{common} {START[name]}") for name in STAGES}
    made = {name: run_settings(each[0], each[-1], [], strategy=None) for name, each in parsed.items()}
    for name in ("pretrain", "sft"):
        made[name]["new_model"] = {}
    own = {item.name for item in dataclasses.fields(STAGES[before][0])} | {"new_model", "additional_steps", "layout"}
    old = {name: value for name, value in made[before].items() if name in own}
    for record in (made[before], old):
        (tmp_path / SETTINGS_FILE).write_text(json.dumps(record))
        for name, (stage, *_, args) in parsed.items():
            if name == before:
                assert find_start(args, made[name], stage.resume) == (False, None, [])
            else:
                with pytest.raises(UserError, match="holds a run with other settings"):
                    find_start(args, made[name], stage.resume)


def test_a_checkpoint_may_be_named_by_a_link(tmp_path) -> None:
    out = tmp_path / "out"
    for name in ("checkpoint-4", "checkpoint-5-backup", "best"):
        (out / name).mkdir(parents=True)
        (out / name / "trainer_state.json").write_text("{}")
    (out / "latest").symlink_to("checkpoint-4")
    (tmp_path / "far").symlink_to(out / "checkpoint-4")

    def start(named: Path) -> tuple:
        line = f"--data_path a --output_dir {out} --max_steps 9 --resume_from_checkpoint {named}"
        stage, _, args = read(PRETRAIN, line)
        return find_start(args, run_settings(stage, args, [], strategy=None), stage.resume)

    for named in (out / "latest", tmp_path / "far", out / "checkpoint-4"):
        assert start(named)[:2] == (False, str(out / "checkpoint-4"))
    for name in ("checkpoint-5-backup", "best"):
        with pytest.raises(UserError, match=f"{name}: in --output_dir a checkpoint is called checkpoint-N"):
            start(out / name)
    with pytest.raises(UserError, match="nothing: not a training checkpoint"):
        start(out / "nothing")
