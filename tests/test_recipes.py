"""Every recipe trains: its settings on a shrunken model with the tiny world's data. Plans are in test_planner.py."""

import json
import math
from pathlib import Path

import pytest
import torch

import prepare_datasets
import train_dpo
import train_full_sft
import train_pretrain
import train_tokenizer
from smol_config import SmolConfig
from smol_model import SmolForCausalLM
from smolkit.checkpoints import load_tokenizer, save_final

RECIPES = sorted((Path(__file__).resolve().parent.parent / "recipes").glob("*.yaml"))
MAIN = {"pretrain": train_pretrain.main, "full_sft": train_full_sft.main, "dpo": train_dpo.main}
SHAPE = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2)
QUICK = {"smollama-fineweb", "smollama-sft", "smollama-dpo", "moe"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The tiny world's data, a tokenizer and a checkpoint with random weights."""
    home = tmp_path_factory.mktemp("recipes")
    prepare_datasets.main(["--source", "tiny", "--output_dir", str(home / "data")])
    for file in (home / "data").glob("*/*.jsonl"):  # enough for three steps
        file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:300]), encoding="utf-8")
    text = home / "data" / "pretrain" / "pretrain_data.jsonl"
    train_tokenizer.main(f"--mode train --data_path {text} --vocab_size 512 --save_dir {home}/tokenizer".split())
    tokenizer = load_tokenizer(home / "tokenizer")
    torch.manual_seed(0)
    model = SmolForCausalLM(SmolConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **SHAPE))
    save_final(model, model.state_dict(), tokenizer, home / "model", torch.float32, "card")
    return home


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow) for path in RECIPES],
)
def test_a_recipe_trains_a_few_steps(recipe, world, tmp_path) -> None:
    stage = next(name for name in MAIN if f"train_{name}.py --config recipes/{recipe.name}" in recipe.read_text())
    data = {"full_sft": "sft"}.get(stage, stage)
    small = f"""--config {recipe} --data_path {world}/data/{data}/{data}_data.jsonl --max_steps 3 --logging_steps 1
        --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --save_strategy no --max_eval_rows 4
        --warmup_steps 0 --learning_rate 1e-2 --disable_tqdm true --output_dir {tmp_path}/out""".split()
    if stage == "pretrain":
        narrow = "moe_intermediate_size=32" if "moe" in recipe.stem else "tie_word_embeddings=true"
        overrides = [f"{name}={value}" for name, value in SHAPE.items()] + [narrow]
        small += ["--tokenizer_path", str(world / "tokenizer"), "--tokenizer_type", "auto", "--block_size", "64"]
        small += ["--vocab_size", "640", "--model_overrides", *overrides]
    else:
        small += ["--max_length", "512", "--model_path", str(world / "model")]
    MAIN[stage](small)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("num_local_experts") == ({"moe": 8, "moe-30b-a7b": 16}.get(recipe.stem))


@pytest.mark.parametrize(
    "name", ["base-7b", *(pytest.param(name, marks=pytest.mark.slow) for name in ("moe", "moe-30b-a7b"))]
)
def test_what_a_recipe_says_to_type_trains_in_16_bits(name, run_script) -> None:
    """The command at the top of a recipe for DeepSpeed, which does not choose bf16 itself; planned by one process."""
    lines = next(path for path in RECIPES if path.stem == name).read_text().replace(" \\\n#", "").splitlines()
    command = next(line for line in lines if "--deepspeed" in line)
    flags = command.partition("train_pretrain.py")[2].split()
    alone = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29611")
    result = run_script("train_pretrain.py", *flags, "--dry_run", "--plan_format", "json", env=alone)
    plan = json.loads(result.stdout[result.stdout.index("{") :])
    assert plan["memory"]["asked"] == "zero-3-offload"
    assert not any("float32" in warning for warning in plan["warnings"])
