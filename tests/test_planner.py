"""The planner's figures against numbers worked out by hand, and `--dry_run` as a user runs it."""

import json
import os
from pathlib import Path

import pytest

import train_dpo
import train_full_sft
import train_lora
import train_pretrain
from smol_config import SmolConfig, preset_config
from smolkit import planner
from smolkit.errors import UserError
from smolkit.planner import STRATEGIES, Work, amount, memory
from smolkit.shards import write_store

BY_NAME = {strategy.name: strategy for strategy in STRATEGIES}


def dense(**changes) -> SmolConfig:
    shape = dict(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    return SmolConfig(**shape | changes)


# By hand: embedding 64,000; a layer 2 * 64² + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64 = 36,992; final norm 64.
P = 64_000 + 2 * 36_992 + 64


@pytest.mark.parametrize(
    ("name", "devices", "weights", "gradients", "optimizer"),
    [
        ("ddp", 1, 2 * P, 2 * P, 12 * P),
        ("ddp-fp32", 1, 4 * P, 4 * P, 8 * P),
        ("ddp-autocast", 1, 4 * P, 4 * P, 8 * P),
        ("zero-1", 2, 2 * P, 2 * P, 12 * P // 2),
        ("zero-2", 2, 2 * P, 2 * P // 2, 12 * P // 2),
        ("zero-3", 2, 2 * P // 2, 2 * P // 2, 12 * P // 2 + 4 * P // 2),
        ("fsdp2", 2, 4 * P // 2, 4 * P // 2, 8 * P // 2),
        ("zero-2-offload", 2, 2 * P, 0, 0),
        ("zero-3-offload", 2, 0, 0, 0),
        ("zero-3-fp32", 2, 4 * P // 2, 4 * P // 2, 8 * P // 2 + 4 * P // 2),  # no masters beside fp32 weights
        ("zero-2-fp32", 2, 4 * P, 4 * P // 2, 12 * P // 2),
        ("fsdp2-fp32", 2, 4 * P // 2, 4 * P // 2, 8 * P // 2),
    ],
)
def test_state_of_each_strategy(name, devices, weights, gradients, optimizer) -> None:
    need = memory(Work(dense(), 1, 8, devices=devices, device="cpu"), BY_NAME[name])
    assert (need.weights, need.gradients, need.optimizer) == pytest.approx((weights, gradients, optimizer), rel=1e-4)


def test_seven_billion_do_not_fit_under_plain_ddp() -> None:
    """16 bytes a parameter: 6.9B x 16 = 110.6 GB, the well-known 112 GB of a 7B model."""
    work = Work(preset_config("base"), 4, 2048, devices=8, gradient_checkpointing=True)
    ddp = memory(work, BY_NAME["ddp"])
    assert ddp.weights + ddp.gradients + ddp.optimizer == pytest.approx(16 * 6_915_624_960)
    lines = planner.compare(work, 80e9, 1e12)
    assert not next(line for line in lines if line["strategy"] == "ddp")["fits"]
    (warning,) = planner.check_fit(work, lines, "ddp", 80e9)
    assert "110.6 GB of it weights, gradients and optimizer state" in warning
    assert "zero-1 fits" in warning
    assert planner.check_fit(work, lines, "zero-3", 80e9) == []
    for unknown in ("zero-0", "zero-1-offload", "zero-2-nvme"):
        (warning,) = planner.check_fit(work, lines, unknown, 80e9)
        assert warning.startswith(f"{unknown}: the memory it takes is not known here, only that of ddp, ")


def test_what_offloading_leaves_where() -> None:
    """README: a few layers on the GPU, 20 bytes a parameter beside it (2 of bf16 weights and gradients each, 16 of fp32
    masters, moments and gradients), or 2 when a disk has the rest."""
    work = Work(preset_config("moe"), 1, 2048, gradient_checkpointing=True)
    total, _ = planner.count_parameters(work.config)
    host, disk = (memory(work, BY_NAME[name]) for name in ("zero-3-offload", "zero-3-nvme"))
    assert (host.host, disk.host) == (20 * total, 2 * total)
    assert host.peak == disk.peak < 20e9
    assert memory(Work(dense(), 1, 8), BY_NAME["zero-2-offload"]).host == 18 * P


def test_what_computes_in_bf16_is_not_offered_where_there_is_none() -> None:
    work = Work(dense(), 1, 8, devices=2)

    def offered(**options) -> list[str]:
        return [line["strategy"] for line in planner.compare(work, None, **options) if not line["host"]]

    assert offered() == ["ddp", "ddp-fp32", "ddp-autocast", "zero-1", "zero-2", "fsdp2", "zero-3"]
    assert offered(bf16=False, asked="zero-1-fp32") == [
        "ddp-fp32", "zero-1-fp32", "zero-2-fp32", "fsdp2-fp32", "zero-3-fp32"
    ]  # fmt: skip
    # What was asked for has a line, sensible or not: an engine without --bf16, or --bf16 in software.
    assert set(offered(asked="zero-3-fp32")) == {*offered(), "zero-3-fp32"}
    assert set(offered(bf16=False, asked="ddp-autocast")) == {*offered(bf16=False), "ddp-autocast"}


def test_expert_parallelism_splits_experts_only() -> None:
    moe = dense(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    experts = 2 * 4 * 3 * 64 * 32
    assert planner.expert_parameters(moe) == experts
    one, two = (
        memory(Work(moe, 1, 8, devices=2, expert_parallel_size=n, device="cpu"), BY_NAME["ddp"]) for n in (1, 2)
    )
    assert one.weights - two.weights == 2 * experts // 2


def test_activations_by_hand() -> None:
    """bf16 on a GPU, per token and layer: 4 D + 2 Q + 2 K + 3 F = 256 + 128 + 64 + 384 values, and 4 B x 4 heads."""
    work = Work(dense(), 3, 10)
    layer = 2 * (256 + 128 + 64 + 384) + 16
    assert planner.activation_bytes(work, 2) == 30 * (2 * layer + 2 * 64 * 2)
    checkpointed = Work(dense(), 3, 10, gradient_checkpointing=True)
    assert planner.activation_bytes(checkpointed, 2) == 30 * (2 * 64 * 2 + layer)
    # BlockAttention on a CPU keeps, of 256 positions in blocks of 128, (256 + 128) / 2 weights per head and token.
    assert planner.attention_weight_bytes(dense(), 256, 2, "cpu") == 4 * 2 * 192


def test_gradients_add_to_activations_only_under_accumulation() -> None:
    one = memory(Work(dense(), 1, 512), BY_NAME["ddp"])
    more = memory(Work(dense(), 1, 512, accumulation=2), BY_NAME["ddp"])
    assert one.peak == one.weights + one.optimizer + one.buffers + max(one.activations + one.logits, one.gradients)
    assert more.peak == more.weights + more.optimizer + more.buffers + more.activations + more.logits + more.gradients


@pytest.mark.parametrize("name", ["zero-1", "zero-2"])
def test_deepspeed_copies_gradients_when_activations_are_gone(name: str) -> None:
    """A bucket with all gradients in bf16 and its copy on the way, 4 P; beside few activations that is the peak."""
    little, much = (memory(Work(dense(), 1, n, devices=2, device="cpu"), BY_NAME[name]) for n in (1, 4096))
    assert little.gradients + little.update == pytest.approx(4 * P, rel=1e-4)
    assert little.peak == little.weights + little.optimizer + little.gradients + little.update
    assert much.peak == much.weights + much.optimizer + much.activations + much.logits


def test_lora_trains_rank_times_both_sides() -> None:
    # q 64+64, k and v 64+32, o 64+64, gate and up 64+128, down 128+64; two layers
    assert planner.lora_parameters(dense(), 8, ["all-linear"]) == 2 * 8 * (128 + 96 + 96 + 128 + 3 * 192)
    assert planner.lora_parameters(dense(), 8, ["q_proj"]) == 2 * 8 * 128
    adapter = memory(Work(dense(), 1, 8, trained=1000), BY_NAME["ddp"])
    assert (adapter.gradients, adapter.optimizer) == (2000, 12000)


def test_qlora_keeps_tables_and_fused_experts_in_sixteen_bits() -> None:
    """Linear layers and, for simplicity, norms take 4.127 bits; a layer's attention has 12,288 weights, its experts
    4 * 3 * 64 * 32 = 24,576, its router 256."""
    ddp = BY_NAME["ddp"]
    found = memory(Work(dense(), 1, 128, trained=1000, base_bits=4), ddp).weights
    assert found == pytest.approx(64_000 * 2 + (P - 64_000) * 4.127 / 8 + 1000 * 2)
    moe = dense(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    found = memory(Work(moe, 1, 128, trained=1000, base_bits=4), ddp).weights
    layer = 12_288 + 256 + 2 * 64
    assert found == pytest.approx((64_000 + 2 * 24_576) * 2 + (2 * layer + 64) * 4.127 / 8 + 1000 * 2)


def test_accumulation_for_half_a_million_tokens() -> None:
    assert planner.accumulation_for(524_288, 128, 256, 2) == 8
    work = Work(preset_config("smollama"), 128, 256, accumulation=4096, devices=2)
    (warning,) = planner.check_batch(work, 524_288)
    assert "268,435,456 tokens instead of 524,288" in warning
    assert "--gradient_accumulation_steps 8 (524,288 tokens)" in warning


def test_a_linear_schedule_turns_negative_beyond_its_end() -> None:
    assert planner.linear_factor(5000, 100, 5000) == 0
    assert planner.linear_factor(5050, 100, 5000) == pytest.approx(-50 / 4900)
    (warning,) = planner.check_schedule("linear", 100, 5050, 5000)
    assert "-0.0102 times the peak" in warning
    assert "never reached" in planner.check_schedule("linear", 100, 100, None)[0]


def test_claimed_sizes_are_counted() -> None:
    warnings = planner.check_parameters(preset_config("moe"), 30e9, 7e9)
    assert any("8 experts, top-2, can never be 7B active of 30B" in warning for warning in warnings)
    assert planner.check_parameters(preset_config("moe-30b-a7b"), 30e9, 7e9) == []
    (warning,) = planner.check_parameters(preset_config("smollama", num_hidden_layers=16), 130e6, None)
    assert "130M expected" in warning


def test_epochs() -> None:
    (warning,) = planner.check_epochs(6000 * 524_288 / 10e9, 3)
    assert "0.31" in warning
    assert "5 times" in planner.check_epochs(5.0, None)[0]


@pytest.mark.parametrize(
    ("text", "value"), [("80GB", 80e9), ("24GiB", 24 * 2**30), ("7B", 7e9), ("524,288", 524288.0), (None, None)]
)
def test_amounts(text, value) -> None:
    assert amount(text) == value


@pytest.mark.parametrize("text", ["many", "-1GB", "8 XB", "0"])
def test_bad_amounts(text) -> None:
    with pytest.raises(ValueError, match="not a number|positive"):
        amount(text)


# --- as a user runs it --------------------------------------------------------------------------------------


def plan(capsys, main, line: str) -> dict:
    """The plan as JSON."""
    main([*line.split(), "--dry_run", "--plan_format", "json"])
    return json.loads(capsys.readouterr().out)


def test_a_plan_without_anything_on_disk(tmp_path, capsys) -> None:
    line = f"""--data_path {tmp_path}/no.jsonl --tokenizer_path {tmp_path}/no --model_size base --num_devices 8
        --device_memory 80GB --host_memory 1TB --data_tokens 5B --num_epochs 3 --device_flops 989T --mfu 0.4
        --per_device_train_batch_size 4 --block_size 2048 --gradient_accumulation_steps 8 --gradient_checkpointing true
        --output_dir {tmp_path}/out"""
    made = plan(capsys, train_pretrain.main, line)
    assert made["model"]["total_parameters"] == 6_915_624_960
    assert made["steps"]["tokens_per_step"] == 524_288
    assert made["steps"]["steps"] == 3 * -(-int(5e9 / 0.98) // 524_288)
    assert [line.split(":")[0] for line in made["missing"]] == ["tokenizer", "data"]
    fits = {line["strategy"] for line in made["memory"]["strategies"] if line["fits"]}
    assert "ddp" not in fits and "zero-3" in fits
    assert any("ddp needs" in warning and "zero-1 fits" in warning for warning in made["warnings"])
    # 3 x 5B tokens at 6 x 6.3B FLOPs and attention: 15.3e9 x 43.9e9 / (8 x 0.4 x 989e12) = 59 hours
    assert made["time"]["seconds"] / 3600 == pytest.approx(56, rel=0.1)
    assert not any("float32" in warning for warning in made["warnings"])
    wide = plan(capsys, train_pretrain.main, f"{line} --weights_dtype fp32")
    assert any("ddp-fp32: this run computes in float32" in warning for warning in wide["warnings"])
    assert not any(tmp_path.iterdir())


def test_a_plan_from_what_is_there(tmp_path, capsys, monkeypatch) -> None:
    text = "one two three four five six seven eight. " * 10
    (tmp_path / "text.jsonl").write_text((json.dumps({"text": text}) + "\n") * 500)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "timing.jsonl").write_text('{"step": 1, "tokens_per_second": 1000}\n')
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    line = f"--data_path {tmp_path}/text.jsonl --model_size tiny --output_dir {tmp_path}/out --num_devices 1"
    made = plan(capsys, train_pretrain.main, line)
    assert made["data"]["rows"] == 500
    assert made["data"]["tokens"] == pytest.approx(500 * len(text) / 4, rel=0.01)
    assert made["time"]["seconds"] == pytest.approx(made["steps"]["tokens"] / 1000)
    assert any("CUDA_LAUNCH_BLOCKING" in warning for warning in made["warnings"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model_size huge", "huge is neither a preset"),
        ("--model_size tiny --device_memory lots", "--device_memory 'lots'"),
        ("--model_size tiny --block_size 4096", "longer than the model's context"),
        ("--model_size tiny --num_devices 0", "--num_devices 0"),
    ],
)
def test_mistakes_stay_mistakes(line, message, tmp_path) -> None:
    with pytest.raises(UserError, match=message):
        train_pretrain.main(["--data_path", "nowhere", "--dry_run", *line.split()])


def test_experts_that_cannot_be_spread_are_refused_in_the_plan_too(capsys) -> None:
    line = "--data_path nowhere --model_size tiny-moe --dry_run --data_tokens 1M --expert_parallel_size"
    for size, devices, message in ((3, 6, "does not divide the 4 experts"), (4, 2, r"more than the 2 process\(es\)")):
        with pytest.raises(UserError, match=message):
            train_pretrain.main([*line.split(), str(size), "--num_devices", str(devices)])
    train_pretrain.main([*line.split(), "4", "--num_devices", "8"])
    with pytest.raises(UserError, match="PEFT's adapters know nothing of spread experts"):
        train_dpo.main("--data_path n --model_path m --plan_model tiny-moe --num_devices 2 --dry_run --use_lora "
                       "--expert_parallel_size 2".split())  # fmt: skip


@pytest.mark.parametrize(
    ("main", "line", "message"),
    [
        (train_pretrain.main, "--weights_dtype bf16 --optim adafactor", "--weights_dtype bf16 contradicts --optim"),
        (train_pretrain.main, "--resume never --resume_from_checkpoint c", "--resume never and --resume_from_"),
        (train_pretrain.main, "--base_model m", "--base_model contradicts the flags of a new model"),
        (train_pretrain.main, "--lr_scheduler_type warmup_stable_decay", "--lr_scheduler_type warmup_stable_decay: "),
        (train_lora.main, "--base_model m --plan_model tiny --lora_target no", "--lora_target no: m has no such"),
        (train_lora.main, "--base_model m --plan_model tiny --lora_target experts", "--lora_target experts: m has no"),
        (train_dpo.main, "--model_path m --rpo_alpha 1 --loss_type sft", "--rpo_alpha and --loss_type sft are the"),
    ],
)
def test_what_the_run_refuses_the_plan_refuses(main, line, message) -> None:
    new = "--model_size tiny " if main is train_pretrain.main else ""
    with pytest.raises(UserError, match=message):
        main(f"--data_path nowhere --data_tokens 1M --dry_run {new}{line}".split())


def test_a_directory_of_tokens_is_counted(tmp_path, capsys) -> None:
    """It has counted itself; it is no missing data, and what it cannot stand beside is a mistake."""
    store, line = tmp_path / "tokens", f"--model_size tiny --num_devices 1 --output_dir {tmp_path}/out"
    write_store(store, ["input_ids"], [({"input_ids": [[1, 2, 3], [4, 5]] * 100}, {})], {"kind": "pretrain"})
    made = plan(capsys, train_pretrain.main, f"--data_path {store} {line}")
    assert (made["data"]["rows"], made["data"]["tokens"]) == (200, 500)
    assert not any(line.startswith("data") for line in made["missing"])
    given = plan(capsys, train_pretrain.main, f"--data_path {store} --data_tokens 1M {line}")
    assert given["data"] == {"rows": None, "tokens": 1_000_000, "files": 1, "source": "given"}
    with pytest.raises(UserError, match="is a directory of tokens; name no other data beside it"):
        plan(capsys, train_pretrain.main, f"--data_path {store} more.jsonl {line}")
    (store / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not a token store: manifest.json is unreadable"):
        plan(capsys, train_pretrain.main, f"--data_path {store} {line}")


def test_an_adapter_in_the_plan(tmp_path, capsys) -> None:
    """Of the base nothing but the adapter is trained, and its 50 conversations are packed unless they are not to be."""
    talk = {"messages": [{"role": role, "content": "one two three " * 3} for role in ("user", "assistant")]}
    (tmp_path / "sft.jsonl").write_text((json.dumps(talk) + "\n") * 50)
    line = f"""--data_path {tmp_path}/sft.jsonl --base_model {tmp_path}/no --plan_model tiny --num_epochs 1 --lora_r 4
        --output_dir {tmp_path}/out --num_devices 1 --lora_target q_proj"""
    made = plan(capsys, train_lora.main, line)
    tiny = preset_config("tiny")
    heads = tiny.num_attention_heads * (tiny.head_dim or tiny.hidden_size // tiny.num_attention_heads)
    assert made["model"]["trained_parameters"] == tiny.num_hidden_layers * 4 * (tiny.hidden_size + heads)
    assert (made["data"]["rows"], made["steps"]["steps"]) == (50, 1)
    for main, more in ((train_lora.main, line), (train_full_sft.main, line.partition("--lora_r")[0])):
        assert plan(capsys, main, more + " --packing false")["steps"]["steps"] == 7, "8 of 50 conversations a step"
    assert not (tmp_path / "out").exists()


def test_an_extension_is_planned_once(tmp_path, capsys) -> None:
    """Whether it has a checkpoint yet or not."""
    line = f"""--data_path nowhere --model_size tiny --data_tokens 10M --max_steps 100 --additional_steps 50
        --output_dir {tmp_path} --num_devices 1"""
    assert plan(capsys, train_pretrain.main, line)["steps"]["steps"] == 150
    for step, extra in ((100, 0), (120, 50)):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text(json.dumps({"max_steps": 100 + extra}))
        (checkpoint / "training_arguments.json").write_text(json.dumps({"additional_steps": extra}))
        os.utime(checkpoint / "trainer_state.json", (step, step))
        steps = plan(capsys, train_pretrain.main, line)["steps"]
        assert (steps["steps"], steps["extended_from"]) == (150, 100)


def test_another_reference_than_the_start_is_pointed_out(capsys) -> None:
    line = "--data_path n --model_path one --plan_model tiny --data_rows 100 --ref_model_path"
    said = [plan(capsys, train_dpo.main, f"{line} {name}")["warnings"] for name in ("one", "two")]
    found = [any("--ref_model_path is not --model_path" in warning for warning in warnings) for warnings in said]
    assert found == [False, True]


SCRIPTS = {
    "train_pretrain.py": train_pretrain.main,
    "train_full_sft.py": train_full_sft.main,
    "train_lora.py": train_lora.main,
    "train_dpo.py": train_dpo.main,
}
RECIPES = sorted((Path(__file__).resolve().parent.parent / "recipes").glob("*.yaml"))


def script_of(recipe: Path) -> str:
    """The script that the recipe's comment names."""
    return next(name for name in SCRIPTS if f"{name} --config recipes/{recipe.name}" in recipe.read_text())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_planned_offline(recipe, capsys) -> None:
    made = plan(capsys, SCRIPTS[script_of(recipe)], f"--config {recipe}")
    assert made["steps"]["steps"] > 100
    fitting = [line for line in made["memory"]["strategies"] if line["fits"] or made["memory"]["device_bytes"] is None]
    assert fitting, "there is a way to train it on the devices it names"
    contradictions = [warning for warning in made["warnings"] if "ddp needs" not in warning]
    assert contradictions == [], "its arithmetic is right"


def test_the_text_names_every_part(capsys) -> None:
    train_dpo.main(["--config", str(next(path for path in RECIPES if path.stem == "smollama-dpo")), "--dry_run"])
    text = capsys.readouterr().out
    for part in "arguments|model  |data  |step  |steps  |schedule  |memory  |missing  |time  ".split("|"):
        assert f"\n{part}" in text
