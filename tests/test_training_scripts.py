"""The four training scripts, one after the other as a user runs them, each under another launcher."""

import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_dpo
import train_full_sft
import train_lora
import train_pretrain
from smolkit.adapters import MERGED_FROM, merged_directory
from smolkit.arguments import LoraArguments
from smolkit.chat import IM_END, render
from smolkit.errors import UserError
from smolkit.packing import (
    IGNORE,
    PackedCollator,
    convert_conversations,
    pack_rows,
    preference_pairs,
    render_conversations,
    render_preferences,
)
from smolkit.shards import TokenStore, tokenized

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the a cat dog sat on mat with red blue house of tree and ran fast slow very big small".split()
SHAPE = "hidden_size=32 intermediate_size=64 num_hidden_layers=2 num_attention_heads=2 num_key_value_heads=1"
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "", "parameters": {"type": "object", "properties": {}}},
}
FILES = {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md"}


def sentence(random: np.random.Generator) -> str:
    return " ".join(random.choice(WORDS, random.integers(3, 20))) + "."


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def conversations(random: np.random.Generator, count: int) -> list[dict]:
    rows = []
    for number in range(count):
        messages = [{"role": "user", "content": sentence(random)}]
        row: dict = {"id": str(number), "source": "toy", "messages": messages}
        if number % 4 == 0:
            call = {"type": "function", "function": {"name": "weather", "arguments": {"city": sentence(random)}}}
            row["tools"] = [WEATHER]
            messages += [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "sunny"},
            ]
        messages.append({"role": "assistant", "content": "It is " + sentence(random)})
        rows.append(row)
    return rows


def command(*words: object) -> str:
    """Run in the checkout; stdout and stderr together, which must not report a failure."""
    result = subprocess.run([*map(str, words)], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, f"{words}\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr


def rows(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def metrics(directory: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in rows(directory) if name in row]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    for part, count in (("", 60), ("validation/", 8)):
        write(folder / f"pretrain/{part}text.jsonl", [{"text": sentence(random)} for _ in range(count)])
        write(folder / f"sft/{part}sft.jsonl", conversations(random, count))
        pairs = [
            {"prompt": sentence(random), "chosen": "Gladly: " + sentence(random), "rejected": sentence(random)}
            for _ in range(count // 2)
        ]
        write(folder / f"dpo/{part}dpo.jsonl", pairs)
    command(
        *(sys.executable, "train_tokenizer.py", "--mode", "train", "--data_path", folder / "pretrain"),
        *("--vocab_size", 320, "--save_dir", folder / "tokenizer"),
    )
    return folder


def pretrain_arguments(world: Path, output: Path, batch_size: int) -> list[str]:
    return f"""--data_path {world}/pretrain --tokenizer_path {world}/tokenizer --model_size tiny
        --model_overrides {SHAPE} --block_size 64 --per_device_train_batch_size {batch_size} --max_steps 4
        --logging_steps 1 --weights_dtype fp32 --learning_rate 3e-3 --packing_strategy blocks
        --output_dir {output}""".split()


@pytest.fixture(scope="module")
def pretrained(world) -> Path:
    """Two gloo ranks under torchrun."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    command(*launcher, "train_pretrain.py", *pretrain_arguments(world, world / "out" / "pretrain", 1))
    return world / "out" / "pretrain"


@pytest.fixture(scope="module")
def tuned(world, pretrained) -> Path:
    """accelerate launch."""
    output = world / "out" / "sft"
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 1)
    more = ("--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no")
    arguments = f"""--data_path {world}/sft --base_model {pretrained} --tokenizer_path {world}/tokenizer
        --tokenizer_type qwen --max_length 128 --num_epochs 2 --per_device_train_batch_size 4 --logging_steps 1
        --learning_rate 5e-3 --output_dir {output}""".split()
    command(*launcher, *more, "train_full_sft.py", *arguments)
    return output


def test_two_ranks_equal_one_process(world, pretrained, tmp_path) -> None:
    train_pretrain.main([*pretrain_arguments(world, tmp_path / "one", 2), "--disable_tqdm", "true"])
    assert metrics(pretrained) == pytest.approx(metrics(tmp_path / "one"), rel=1e-5)
    assert metrics(pretrained, "tokens") == metrics(tmp_path / "one", "tokens")
    assert metrics(pretrained, "eval_loss") == pytest.approx(metrics(tmp_path / "one", "eval_loss"), rel=1e-5)
    one, two = (load_file(path / "model.safetensors") for path in (tmp_path / "one", pretrained))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


def test_fine_tuning_learns_and_leaves_a_complete_directory(tuned) -> None:
    losses = metrics(tuned)
    assert losses[-1] < losses[0] - 0.3
    assert FILES <= {path.name for path in tuned.iterdir()}
    arguments = [tuned, *tuned.glob("checkpoint-*")]
    assert all(json.loads((path / "training_arguments.json").read_text())["packing"] for path in arguments)
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    stops = json.loads((tuned / "generation_config.json").read_text())["eos_token_id"]
    assert stops[0] == tokenizer.convert_tokens_to_ids(IM_END) and len(stops) == 2
    model = AutoModelForCausalLM.from_pretrained(tuned)
    assert model.config.vocab_size == len(tokenizer)
    assert (tuned / "timing.jsonl").is_file()


def test_lora_adapter_and_merged_model_agree(world, tuned) -> None:
    output = world / "out" / "lora"
    before = (tuned / "model.safetensors").read_bytes()
    command(
        *(sys.executable, "train_lora.py", "--data_path", world / "sft", "--base_model", tuned, "--lora_r", 4),
        *("--max_length", 128, "--max_steps", 6, "--learning_rate", "1e-2", "--weights_dtype", "fp32", "--merge"),
        *("--output_dir", output, "--logging_steps", 1),
    )
    assert (tuned / "model.safetensors").read_bytes() == before
    assert metrics(output)[-1] < metrics(output)[0]
    ids = torch.arange(5, 25)[None]
    base = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, output)(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(world / "out" / "lora-merged", dtype=torch.float32)
    torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - plain).abs().max() > 0.01


def test_lora_adapts_fused_experts(world, tmp_path) -> None:
    """PEFT works on the fused tensors; the merged directory has per-expert names again."""
    moe = [*SHAPE.split(), "num_experts=4", "num_experts_per_tok=2"]
    quiet = "--disable_tqdm true --weights_dtype fp32 --max_steps 3 --max_length 128".split()
    train_full_sft.main(
        f"""--data_path {world}/sft --init_from_scratch --model_size tiny-moe --tokenizer_path {world}/tokenizer
        --output_dir {tmp_path}/base --model_overrides""".split()
        + [*moe, *quiet]
    )
    train_lora.main(
        f"""--data_path {world}/sft --base_model {tmp_path}/base --output_dir {tmp_path}/lora --merge
        --learning_rate 1e-2 --lora_target all-linear experts""".split()
        + quiet
    )
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "lora-merged"))
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert any(".experts.3." in name for name in changed)
    assert not any(".mlp.gate." in name for name in changed), "the router stays"


def test_lora_refuses_unknown_modules(world, tuned, tmp_path) -> None:
    arguments = f"--data_path {world}/sft --base_model {tuned} --output_dir {tmp_path}/out --max_length 128".split()
    with pytest.raises(UserError, match="--lora_target nonsense"):
        train_lora.main([*arguments, "--lora_target", "nonsense"])
    with pytest.raises(UserError, match="has no experts"):
        train_lora.main([*arguments, "--lora_target", "experts"])
    with pytest.raises(UserError, match="--lora_target q_prj: .* has no such layers to adapt, but down_proj, "):
        train_lora.main([*arguments, "--lora_target", "v_proj", "q_prj"])
    with pytest.raises(UserError, match="--lora_target lm_head: "):
        train_lora.main([*arguments, "--lora_target", "lm_head"])
    assert not (tmp_path / "out").exists()


def test_a_mistake_beside_the_adapter_is_not_blamed_on_its_targets(world, tuned, tmp_path) -> None:
    arguments = f"--data_path {world}/sft --base_model {tuned} --output_dir {tmp_path}/out --max_length 128".split()
    with pytest.raises(UserError, match="^--router_aux_loss_coef is for a model with experts"):
        train_lora.main([*arguments, "--router_aux_loss_coef", "0.1"])


def test_a_merged_model_is_that_of_the_adapter(world, tuned, tmp_path, capsys) -> None:
    """Merged, trained on without merging, merged again: not the first model, which would be there already."""
    model = tmp_path / "lora-merged" / "model.safetensors"
    words = f"""--data_path {world}/sft --base_model {tuned} --output_dir {tmp_path}/lora --max_length 128 --max_steps 2
        --learning_rate 1e-2 --disable_tqdm true --weights_dtype fp32 --max_eval_rows 0""".split()
    longer = [*words, "--additional_steps", "2"]
    train_lora.main([*words, "--merge"])
    first = model.read_bytes()
    train_lora.main(longer)
    assert model.read_bytes() == first
    train_lora.main([*longer, "--merge"])
    second = model.read_bytes()
    assert second != first
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tuned), tmp_path / "lora")
    expected = adapted.merge_and_unload().state_dict()
    for name, value in load_file(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    model.unlink()  # to see whether it is written
    capsys.readouterr()
    train_lora.main([*longer, "--merge"])
    assert "nothing to do" in capsys.readouterr().out and not model.exists()
    train_lora.main([*longer, "--merge", "--save_dtype", "bf16"])
    assert load_file(model)["model.norm.weight"].dtype == torch.bfloat16


def dpo_arguments(world: Path, model: Path, output: Path, *more: str) -> list[str]:
    return [
        *f"""--data_path {world}/dpo --model_path {model} --max_length 128 --num_epochs 3 --logging_steps 1
        --per_device_train_batch_size 8 --learning_rate 1e-3 --beta 0.5 --output_dir {output}""".split(),
        *more,
    ]


def test_dpo_starts_at_ln_2_and_learns_the_preference(world, tuned) -> None:
    output = world / "out" / "dpo"
    text = command(sys.executable, "train_dpo.py", *dpo_arguments(world, tuned, output, "--weights_dtype", "fp32"))
    assert "agree before step 1" in text
    assert metrics(output)[0] == pytest.approx(math.log(2), abs=1e-3)
    assert metrics(output, "rewards/accuracies")[-1] > 0.9
    assert metrics(output, "eval_rewards/accuracies")[-1] > 0.9
    assert FILES <= {path.name for path in output.iterdir()}


@pytest.mark.parametrize(
    "more, message",
    [
        ("--merge true", "--merge is for an adapter, and none is trained: add --use_lora, or leave it out"),
        ("--lora_r 64", "--lora_r is for an adapter, and none is trained"),
        ("--lora_target q_proj", "--lora_target is for an adapter, and none is trained"),
        ("--merged_dir m", "--merged_dir is for an adapter, and none is trained"),
        ("--use_lora true --lora_target nosuch", "--lora_target nosuch: .* has no such layers to adapt"),
        ("--router_aux_loss_coef 0.1", "--router_aux_loss_coef is for a model with experts"),
    ],
)
def test_dpo_refuses_what_it_would_not_do(world, tuned, tmp_path, monkeypatch, more, message) -> None:
    """Before anything is tokenised or made; in the plan as well."""
    monkeypatch.setattr(train_dpo, "load_pairs", lambda *_: pytest.fail("tokenised"))
    for dry in ("false", "true"):
        with pytest.raises(UserError, match=message):
            train_dpo.main(dpo_arguments(world, tuned, tmp_path / "out", *more.split(), "--dry_run", dry))
    assert not (tmp_path / "out").exists()


def test_dpo_on_an_adapter_refuses_another_shape(world, tuned, tmp_path) -> None:
    adapter = tmp_path / "adapter"
    train_lora.main(
        f"""--data_path {world}/sft --base_model {tuned} --output_dir {adapter} --max_length 128 --max_steps 1
        --disable_tqdm true --max_eval_rows 0""".split()
    )
    with pytest.raises(UserError, match=f"--lora_r: the adapter in {adapter} has its own and keeps it; leave it out"):
        train_dpo.main(dpo_arguments(world, adapter, tmp_path / "out", "--lora_r", "64"))
    quick = "--max_steps 1 --max_eval_rows 0 --disable_tqdm true --merge true".split()
    train_dpo.main(dpo_arguments(world, adapter, tmp_path / "out", *quick))
    assert (tmp_path / "out-merged" / "model.safetensors").is_file()


def test_settings_that_were_not_written_down_before_are_noticed(world, tuned, tmp_path) -> None:
    """A finished run is not "already trained" with another loss; one of an older record goes on as it is."""
    output, quick = tmp_path / "out", "--max_steps 1 --max_eval_rows 0 --disable_tqdm true".split()
    train_dpo.main(dpo_arguments(world, tuned, output, *quick))
    for more in ("--ld_alpha 0.5", "--use_weighting true", "--disable_dropout false", "--dataloader_drop_last true"):
        name = more.split()[0].removeprefix("--")
        with pytest.raises(UserError, match=f"holds a run with other settings: {name} was "):
            train_dpo.main(dpo_arguments(world, tuned, output, *quick, *more.split()))
    record = json.loads((output / "run_settings.json").read_text())
    for name in ("ld_alpha", "use_weighting", "optim_args", "neftune_noise_alpha"):
        record.pop(name)
    (output / "run_settings.json").write_text(json.dumps(record))
    (output / "training_complete.json").unlink()
    shutil.rmtree(output / "checkpoint-1")
    train_dpo.main(dpo_arguments(world, tuned, output, *quick))
    assert json.loads((output / "run_settings.json").read_text())["use_weighting"] is False


# `--cpu --num_processes 2` would silently start one process.
LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc_per_node", 2),
    "accelerate": (
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    ),
}


@pytest.mark.parametrize(
    "launcher, stage",
    [
        ("torchrun", "lora"),
        pytest.param("torchrun", "dpo", marks=pytest.mark.slow),
        *(pytest.param("accelerate", stage, marks=pytest.mark.slow) for stage in ("pretrain", "sft", "lora", "dpo")),
    ],
)
def test_every_stage_runs_on_two_processes_like_on_one(world, tuned, launcher, stage, tmp_path) -> None:
    """Equal losses with the same global batch, which also shows that there are two processes.

    Without a file of accelerate_offload/; tests/test_strategies.py has those.
    """
    start = "--model_path" if stage == "dpo" else "--base_model"
    length = "--block_size" if stage == "pretrain" else "--max_length"
    program = {"sft": "train_full_sft.py"}.get(stage, f"train_{stage}.py")

    def arguments(output: Path, batch_size: int) -> list[str]:
        data = world / ("sft" if stage == "lora" else stage)
        return f"""{program} --data_path {data} {start} {tuned} {length} 128 --max_steps 3 --logging_steps 1
            --per_device_train_batch_size {batch_size} --weights_dtype fp32 --output_dir {output}""".split()

    command(sys.executable, "-m", *LAUNCHERS[launcher], *arguments(tmp_path / "two", 2))
    command(sys.executable, *arguments(tmp_path / "one", 4))
    assert metrics(tmp_path / "two") == pytest.approx(metrics(tmp_path / "one"), rel=1e-4)
    assert len(metrics(tmp_path / "one")) == 3


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "sft", "lora", "dpo", "moe"])
def test_a_compiled_run_learns_what_an_eager_one_does(world, tuned, stage, tmp_path) -> None:
    """In fp32, block by block: the losses, which every step's gradients have made, and the names in the checkpoint."""
    start = ("--model_path" if stage == "dpo" else "--base_model"), tuned
    if stage == "moe":
        start = "--tokenizer_path", world / "tokenizer", "--model_size", "tiny-moe", "--model_overrides", *SHAPE.split()
    length = "--block_size" if stage in ("pretrain", "moe") else "--max_length"
    program = {"sft": "train_full_sft.py", "moe": "train_pretrain.py"}.get(stage, f"train_{stage}.py")
    data = world / {"lora": "sft", "moe": "pretrain"}.get(stage, stage)
    for compiled in ("true", "false"):
        command(
            *(sys.executable, program, "--data_path", data, *start, length, 128, "--max_steps", 4),
            *("--logging_steps", 1, "--weights_dtype", "fp32", "--torch_compile", compiled, "--learning_rate", 1e-3),
            *("--output_dir", tmp_path / compiled),
        )
    assert metrics(tmp_path / "true") == pytest.approx(metrics(tmp_path / "false"), rel=1e-4)
    name = "adapter_model.safetensors" if stage == "lora" else "model.safetensors"
    one, two = (load_file(tmp_path / compiled / name) for compiled in ("true", "false"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=1e-2, atol=1e-4)


def test_compiling_without_a_compiler_is_refused(world, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler, and there is none \(/nowhere/g\+\+\): install one"):
        train_pretrain.main([*pretrain_arguments(world, tmp_path / "out", 2), "--torch_compile", "true"])
    assert not (tmp_path / "out").exists()


def test_a_run_goes_back_to_a_checkpoint_that_a_link_names(world, tmp_path, capsys) -> None:
    words = [*pretrain_arguments(world, tmp_path, 2), "--disable_tqdm", "true", "--save_steps", "2"]
    train_pretrain.main(words)
    (tmp_path / "latest").symlink_to("checkpoint-2")
    capsys.readouterr()
    train_pretrain.main([*words, "--resume_from_checkpoint", str(tmp_path / "latest")])
    assert f"continued from {tmp_path}/checkpoint-2" in capsys.readouterr().out


def test_best_is_what_has_fewer_bits(world, tmp_path) -> None:
    """transformers takes whatever does not end in "loss" for something to be raised."""
    words = pretrain_arguments(world, tmp_path, 2)
    more = "--disable_tqdm true --save_steps 1 --eval_steps 1 --load_best_model_at_end true --save_total_limit 9"
    train_pretrain.main([*words, *more.split(), "--metric_for_best_model", "bits_per_byte"])
    found = {row["step"]: row["eval_bits_per_byte"] for row in rows(tmp_path) if "eval_bits_per_byte" in row}
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_global_step"] == min(found, key=found.__getitem__) and len(found) == 4


def test_dpo_with_a_likelihood_term_in_bf16(world, tuned, tmp_path) -> None:
    more = ["--weights_dtype", "bf16", "--rpo_alpha", "1.0", "--disable_tqdm", "true", "--max_eval_rows", "0"]
    train_dpo.main(dpo_arguments(world, tuned, tmp_path / "out", *more))
    chosen = metrics(tmp_path / "out", "logps/chosen")
    assert chosen[-1] > chosen[0]
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_dpo_pads_less_when_steps_are_grouped_by_length(world, tuned, tmp_path, capsys) -> None:
    quiet = "--disable_tqdm true --max_eval_rows 0 --num_epochs 2 --per_device_train_batch_size 2".split()
    tokens, work = {}, {}
    for strategy in ("random", "group_by_length"):
        more = [*quiet, "--save_steps", "20", "--train_sampling_strategy", strategy]
        train_dpo.main(dpo_arguments(world, tuned, tmp_path / strategy, *more))
        tokens[strategy] = metrics(tmp_path / strategy, "tokens")
        timing = (tmp_path / strategy / "timing.jsonl").read_text().splitlines()
        work[strategy] = next(row["total_flos"] for row in map(json.loads, timing) if "total_flos" in row)
    assert len(tokens["random"]) == len(tokens["group_by_length"]) == 30
    assert tokens["group_by_length"][-1] == tokens["random"][-1], "padding is not counted"
    assert work["group_by_length"] < 0.95 * work["random"]

    output = tmp_path / "group_by_length"
    learned = ("step", "loss", "tokens", "grad_norm", "logps/chosen", "logps/rejected")
    before = [metrics(output, name) for name in learned]
    shutil.rmtree(output / "checkpoint-30")  # as it was when killed in the second epoch
    for name in ("config.json", "model.safetensors", "training_complete.json"):
        (output / name).unlink()
    train_dpo.main(dpo_arguments(world, tuned, output, *more))
    assert "continued from" in capsys.readouterr().out
    assert [metrics(output, name) for name in learned] == before and len(before[1]) == 30


def test_dpo_refuses_another_reference(world, tuned, pretrained, tmp_path) -> None:
    more = ["--ref_model_path", str(pretrained), "--disable_tqdm", "true"]
    with pytest.raises(UserError, match="disagree before step 1.*--ref_model_path"):
        train_dpo.main(dpo_arguments(world, tuned, tmp_path / "out", *more))
    assert not (tmp_path / "out" / "config.json").exists()


def test_dpo_refuses_equal_answers(world, tuned, tmp_path) -> None:
    write(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(UserError, match=r"pairs.jsonl:1: .*the same"):
        train_dpo.main(dpo_arguments(world, tuned, tmp_path / "out", "--data_path", str(tmp_path / "pairs.jsonl")))


def test_a_mistake_leaves_with_exit_code_2_and_one_line(world, tmp_path) -> None:
    words = (sys.executable, "train_full_sft.py", "--data_path", world / "sft", "--base_model", tmp_path)
    result = subprocess.run([*map(str, words)], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1] == f"error: {tmp_path}: no config.json in it: not a checkpoint"


def test_a_foreign_tokenizer_is_refused(world, tuned, tmp_path) -> None:
    write(tmp_path / "other.jsonl", [{"text": "zzz yyy xxx zzz yyy xxx 123 " * 20}])
    other = tmp_path / "tokenizer"
    command(
        *(sys.executable, "train_tokenizer.py", "--mode", "train", "--data_path", tmp_path / "other.jsonl"),
        *("--vocab_size", 300, "--save_dir", other),
    )
    arguments = f"--data_path {world}/sft --base_model {tuned} --tokenizer_path {other} --output_dir {tmp_path}/out"
    with pytest.raises(UserError, match="is not the tokenizer of"):
        train_full_sft.main(arguments.split())


def test_labels_are_the_assistant_text(world) -> None:
    """What is trained, decoded: replies and calls with their end token, nothing else."""
    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer")
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "system", "content": "be nice"},
        {"role": "user", "content": f"hi {IM_END} there"},
        {"role": "assistant", "content": "red cat"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "blue dog"},
    ]
    columns, counts = convert_conversations(tokenizer, [{"messages": messages, "tools": [WEATHER]}], 1024)
    rows = pack_rows(TokenStore.of(**columns), 1024, seed=0)
    batch = PackedCollator(tokenizer.pad_token_id)(rows.__getitems__([0]))
    labels = batch["labels"][0]
    assert tokenizer.decode(labels[labels != IGNORE]) == (
        f"red cat{IM_END}"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
        f"{IM_END}blue dog{IM_END}"
    )
    assert counts == {"kept": 1, "cut": 0, "dropped": 0, "trained_tokens": int((labels != IGNORE).sum())}


def test_too_long_conversations_are_cut_after_a_reply(world, tuned, tmp_path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer")
    turn = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "red cat"}]
    one, two = (len(render(tokenizer, turn * n).input_ids) for n in (1, 2))
    pieces, counts = render_conversations([{"messages": turn * 3}, {"messages": turn}], tokenizer, two + 1)
    assert [len(piece.input_ids) for piece in pieces] == [two, one]
    assert (counts.kept, counts.cut, counts.dropped) == (1, 1, 0)
    pieces, counts = render_conversations([{"messages": turn}], tokenizer, one - 1)
    assert (pieces, counts.dropped) == ([], 1)
    arguments = f"--data_path {world}/sft --base_model {tuned} --output_dir {tmp_path}/out --max_length 4".split()
    with pytest.raises(UserError, match=r"within 4 tokens \(60 dropped\); raise --max_length"):
        train_full_sft.main(arguments)


def test_preferences_are_prompt_and_two_completions(world, tmp_path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer")
    prompt = [{"role": "user", "content": "hi"}]
    row = {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": "red cat"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    pairs, dropped = render_preferences([row], tokenizer, 64)
    assert dropped == 0
    assert tokenizer.decode(pairs["prompt_ids"][0]).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(pairs["chosen_ids"][0]) == f"red cat{IM_END}"
    assert tokenizer.decode(pairs["rejected_ids"][0]) == f"no{IM_END}"
    write(tmp_path / "pairs.jsonl", [row])
    tokenise = partial(tokenized, tokenizer=tokenizer)
    stored, _ = preference_pairs(tokenise, [tmp_path / "pairs.jsonl"], 64)
    assert stored[0] == {name: ids[0].tolist() for name, ids in pairs.items()}
    with pytest.raises(UserError, match="no pair fits"):
        preference_pairs(tokenise, [tmp_path / "pairs.jsonl"], 4)


def test_real_text_and_tokenizer_end_in_a_model_that_loads_elsewhere(samples, tmp_path) -> None:
    """The generated twin of this test is the chain above."""
    tokenizer, text = samples / "qwen2.5_tokenizer", samples / "wikitext2" / "valid.txt"
    train_pretrain.main(
        f"""--data_path {text} --tokenizer_path {tokenizer} --tokenizer_type qwen --model_size tiny
        --pad_vocab_to_multiple_of 128 --block_size 128 --max_steps 3 --logging_steps 1 --learning_rate 1e-2
        --per_device_train_batch_size 4 --disable_tqdm true --output_dir {tmp_path}/out --model_overrides
        hidden_size=16 intermediate_size=32 num_hidden_layers=1 num_attention_heads=2 num_key_value_heads=1""".split()
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size % 128 == 0
    assert model.config.vocab_size >= len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    losses = metrics(tmp_path / "out")
    assert math.log(151_665) * 0.9 < losses[0] < math.log(151_665) * 1.1


def test_a_merged_model_replaces_only_one_like_it(tmp_path: Path) -> None:
    """Nor the base model, nor the adapter, nor a file."""
    stage = LoraArguments(data_path=["d"], base_model="b", merged_dir=str(tmp_path / "merged"))
    assert merged_directory(stage, str(tmp_path / "out")) == stage.merged_dir, "not there yet"
    (tmp_path / "merged").mkdir()
    assert merged_directory(stage, str(tmp_path / "out")) == stage.merged_dir, "empty"
    (tmp_path / "merged" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds something that --merge has not written"):
        merged_directory(stage, str(tmp_path / "out"))
    (tmp_path / "merged" / MERGED_FROM).write_text("{}")
    assert merged_directory(stage, str(tmp_path / "out")) == stage.merged_dir, "written by --merge"
    with pytest.raises(UserError, match="is the --output_dir"):
        merged_directory(stage, str(tmp_path / "merged"))
