"""Optimizer with masters, accumulation, evaluation, non-finite losses, resuming; on tiny models in this process."""

import copy
import errno
import json
import math
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train_pretrain
from smol_config import SmolConfig, flops_per_token
from smol_model import SmolForCausalLM
from smolkit.checkpoints import load_tokenizer
from smolkit.command_line import PretrainTrainingArguments
from smolkit.errors import UserError
from smolkit.manifest import MANIFEST, checkpoints, seal
from smolkit.optimizer import LARGE, SLICE, MasterAdamW
from smolkit.packing import PackedCollator, pack_blocks
from smolkit.runs import SETTINGS_FILE, find_start, one_gpu_per_process, slow_arithmetic
from smolkit.shards import TokenStore
from smolkit.training import final_weights

SHAPE = "hidden_size=32 intermediate_size=64 num_hidden_layers=2 num_attention_heads=2 num_key_value_heads=1"
WORDS = "the a cat dog sat on mat with red blue house of tree and ran fast slow very big small".split()


def sentence(random: np.random.Generator, most: int = 40) -> str:
    return " ".join(random.choice(WORDS, random.integers(3, most))) + "."


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with text, validation text and a tokenizer."""
    folder = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    for path, count in ((folder / "text.jsonl", 80), (folder / "validation" / "text.jsonl", 10)):
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"text": sentence(random)}) + "\n" for _ in range(count)))
    import train_tokenizer

    train_tokenizer.main(
        ["--mode", "train", "--data_path", str(folder / "text.jsonl"), "--vocab_size", "320"]
        + ["--save_dir", str(folder / "tokenizer")]
    )
    return folder


def pretrain(world: Path, output: Path, *more: str) -> None:
    """Run train_pretrain.main on the toy text: 8 steps, a checkpoint at step 4."""
    arguments = f"""--data_path {world}/text.jsonl --tokenizer_path {world}/tokenizer --model_size tiny
        --model_overrides {SHAPE} --block_size 32 --per_device_train_batch_size 2 --gradient_accumulation_steps 2
        --max_steps 8 --logging_steps 2 --save_steps 4 --disable_tqdm true --output_dir {output}"""
    train_pretrain.main([*arguments.split(), *more])


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- optimizer


@pytest.mark.parametrize("slice_size", [7, 2**20])
def test_masters_equal_torch_adamw_in_fp32(slice_size: int, monkeypatch) -> None:
    """Whole parameters at a time, several together, or one parameter in several slices."""
    monkeypatch.setitem(SLICE, "cpu", slice_size)
    torch.manual_seed(0)
    theirs = [torch.nn.Parameter(torch.randn(17, 5)), torch.nn.Parameter(torch.randn(9))]
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    reference = torch.optim.AdamW(
        [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}], **settings
    )
    optimizer = MasterAdamW(
        [{"params": ours[:1], "weight_decay": 0.1}, {"params": ours[1:], "weight_decay": 0.0}], **settings
    )
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in (reference, optimizer)]
    for step in range(6):
        for a, b in zip(theirs, ours, strict=True):
            a.grad = torch.randn_like(a) * (10 if step % 2 else 0.01)
            b.grad = a.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        torch.testing.assert_close(optimizer.clip_grad_norm(1.0), norm)
        reference.step()
        optimizer.step()
        for schedule in schedules:
            schedule.step()
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bf16_weights_follow_fp32_masters_and_survive_saving(tmp_path) -> None:
    torch.manual_seed(0)
    start = torch.randn(64, 8)
    exact, rounded = torch.nn.Parameter(start.bfloat16().float()), torch.nn.Parameter(start.bfloat16())
    reference = torch.optim.AdamW([exact], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer = MasterAdamW([rounded], lr=1e-4)

    def step(optimizers: list[torch.optim.Optimizer], parameters: list[torch.nn.Parameter]) -> None:
        gradient = torch.randn(64, 8).bfloat16()
        for parameter in parameters:
            parameter.grad = gradient.to(parameter.dtype)
        for each in optimizers:
            each.step()

    for _ in range(50):  # steps far below what bf16 can add to a weight of 1
        step([reference, optimizer], [exact, rounded])
    torch.testing.assert_close(optimizer.master_of()[rounded], exact.data, rtol=0, atol=1e-6)
    assert torch.equal(rounded.data, exact.data.bfloat16())

    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    copy = torch.nn.Parameter(torch.zeros(64, 8, dtype=torch.bfloat16))
    restored = MasterAdamW([copy], lr=1.0)
    restored.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert torch.equal(copy, rounded)
    step([optimizer, restored], [rounded, copy])
    assert torch.equal(restored.master_of()[copy], optimizer.master_of()[rounded])


def test_the_compiled_update_is_the_fused_one(monkeypatch) -> None:
    """What --torch_compile takes for large weights that are not fp32, at a rate that changes, clipped and not."""
    monkeypatch.setitem(LARGE, "cpu", 1000)
    monkeypatch.setitem(SLICE, "cpu", 1000)
    monkeypatch.setitem(SLICE, "else", 1500)
    sizes, states, update_each = [], [], MasterAdamW._update_each

    def counted(self, pieces, group):
        sizes.extend(len(piece.weight) for piece in pieces)
        update_each(self, pieces, group)

    monkeypatch.setattr(MasterAdamW, "_update_each", counted)
    for compiled in (False, True):
        torch.manual_seed(0)
        shapes, narrow = [(40, 30), (70, 30), (30,), (40, 30)], [True, True, True, False]
        values = [torch.randn(shape) for shape in shapes]
        weights = [torch.nn.Parameter(v.bfloat16() if n else v) for v, n in zip(values, narrow, strict=True)]
        optimizer = MasterAdamW(weights, lr=1e-2, weight_decay=0.1, compiled=compiled)
        for rate, limit in ((1e-2, 1.0), (3e-3, 1e9), (1e-3, None)):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.param_groups[0]["lr"] = rate
            if limit is not None:
                optimizer.clip_grad_norm(limit)
            if rate == 3e-3:
                optimizer.skip_if(torch.tensor(False))
            optimizer.step()
        assert sizes == [1200, 1500] * 3 * compiled, "large pieces of what is not fp32; 600 elements are no such piece"
        before = copy.deepcopy(optimizer.state_dict())
        weights[0].grad[0] = torch.nan
        optimizer.clip_grad_norm(1.0)
        optimizer.skip_if(torch.tensor(True))
        optimizer.step()
        after = optimizer.state_dict()["state"]
        assert all(torch.equal(v, after[i][name]) for i, state in before["state"].items() for name, v in state.items())
        sizes.clear()
        assert all(torch.equal(weight, master.to(weight.dtype)) for weight, master in optimizer.master_of().items())
        states.append(optimizer.master_of().values())
    for fused, own in zip(*states, strict=True):
        torch.testing.assert_close(own, fused, rtol=1e-6, atol=1e-7)


def test_without_gradients_the_norm_is_zero() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = MasterAdamW([weight])
    assert optimizer.clip_grad_norm(1.0) == 0
    optimizer.step()
    assert torch.equal(weight, torch.ones(3))


# --- trainer


def trainer_for(world: Path, tmp_path: Path, dtype: torch.dtype = torch.float32, **settings):
    torch.manual_seed(0)
    config = SmolConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.1,
    )
    model = SmolForCausalLM(config).to(dtype)
    random = np.random.default_rng(0)
    documents = [random.integers(0, 300, random.integers(3, 30)).astype(np.int32) for _ in range(64)]
    data = pack_blocks(TokenStore.of(input_ids=documents), 32, seed=0)
    data = data.select(range(16))
    arguments = dict(max_steps=3, save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant")
    args = PretrainTrainingArguments(output_dir=str(tmp_path / "out"), **(arguments | settings))
    return train_pretrain.PretrainTrainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        data_collator=PackedCollator(0),
        processing_class=load_tokenizer(world / "tokenizer"),
    )


def test_accumulation_changes_nothing_but_rounding(world, tmp_path) -> None:
    results = []
    for batch, accumulation, recompute in ((8, 1, False), (4, 2, True), (2, 4, False)):
        trainer = trainer_for(
            world,
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            gradient_checkpointing=recompute,
            logging_steps=1,
            learning_rate=1e-3,
        )
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        results.append((losses, final_weights(trainer)))
    for losses, weights in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-5)
        for name, value in results[0][1].items():
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5)


def test_evaluation_is_the_mean_over_tokens(world, tmp_path) -> None:
    trainer = trainer_for(world, tmp_path, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    losses = []
    for row in trainer.eval_dataset:  # one by one, document by document, in plain torch
        ids, positions = (torch.from_numpy(np.array(row[name])).long() for name in ("input_ids", "position_ids"))
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
        for start, end in zip(starts, starts[1:], strict=False):
            with torch.no_grad():
                logits = trainer.model.eval()(ids[None, start:end]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[start + 1 : end], reduction="none"))
    expected = torch.cat(losses)
    assert metrics["eval_loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert metrics["eval_tokens"] == len(expected)


def test_bf16_training_tracks_fp32_training(world, tmp_path) -> None:
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        settings = dict(max_steps=12, per_device_train_batch_size=8, logging_steps=1, learning_rate=1e-2)
        trainer = trainer_for(world, tmp_path, dtype, **settings)
        trainer.train()
        losses[dtype] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[torch.float32][-1] < losses[torch.float32][0] - 0.5
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.02)


def test_a_non_finite_loss_stops_before_the_update(world, tmp_path) -> None:
    trainer = trainer_for(world, tmp_path)
    trainer.model.model.norm.weight.data[0] = float("inf")
    before = trainer.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    with pytest.raises(UserError, match="step 1 .*--learning_rate"):
        trainer.train()
    assert torch.equal(trainer.model.model.layers[0].mlp.up_proj.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_best_checkpoint_is_loaded_at_the_end_masters_and_all(world, tmp_path, dtype) -> None:
    """A learning rate at which every step does harm: the first is the best, and what it evaluates to is reported."""
    every = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, save_total_limit=9)
    trainer = trainer_for(world, tmp_path, dtype=dtype, learning_rate=1.0, load_best_model_at_end=True, **every)
    trainer.train()
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    best = min(losses, key=losses.get)
    assert best < 3 == max(losses) and trainer.state.best_global_step == best
    assert trainer.last_evaluation()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    folder = tmp_path / "out" / f"checkpoint-{best}"
    saved, optimizer = load_file(folder / "model.safetensors"), torch.load(folder / "optimizer.pt", weights_only=True)
    names = dict(trainer.model.named_parameters())
    assert all(torch.equal(parameter, saved[name]) for name, parameter in names.items())
    if dtype == torch.bfloat16:
        masters = [state["master"] for state in optimizer["state"].values()]
        assert all(any(torch.equal(value, master) for master in masters) for value in final_weights(trainer).values())


def test_a_last_checkpoint_that_fails_in_the_background_is_reported(world, tmp_path, monkeypatch) -> None:
    def full(written: Path, step: int, **facts: object) -> None:
        if step == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        seal(written, step=step, **facts)

    monkeypatch.setattr("smolkit.persistence.seal", full)
    trainer = trainer_for(world, tmp_path, save_strategy="steps", save_steps=1, async_save=True)
    with pytest.raises(UserError, match=r"cannot save .*No space left on device"):
        trainer.train()
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-1", "checkpoint-2"]


def test_flops_of_a_micro_batch_are_of_its_length(world, tmp_path) -> None:
    trainer = trainer_for(world, tmp_path)
    for length in (8, 200, 8):
        batch = {"input_ids": torch.zeros(2, length, dtype=torch.long)}
        assert trainer.floating_point_ops(batch) == 2 * length * flops_per_token(trainer.model.config, length)


def test_a_checkpoint_of_another_shape_is_named(world, tmp_path) -> None:
    trainer = trainer_for(world, tmp_path)
    other = SmolConfig(**{**trainer.model.config.to_dict(), "intermediate_size": 96, "model_type": "llama"})
    SmolForCausalLM(other).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"other: cannot load it: .*up_proj"):
        trainer._load_from_checkpoint(str(tmp_path / "other"))


# --- runs


def test_bf16_in_software_is_mentioned(tmp_path, monkeypatch) -> None:
    """By default such a CPU gets fp32, and nothing is said."""
    build = partial(PretrainTrainingArguments, output_dir=str(tmp_path), use_cpu=True)
    plain, asked = build(), build(bf16=True)
    for supported in (True, False):
        monkeypatch.setattr("smolkit.runs.supports_bf16", lambda device, supported=supported: supported)
        cases = ((torch.bfloat16, plain), (torch.float32, asked))
        assert [len(slow_arithmetic(*case)) for case in cases] == [not supported] * 2
        assert not slow_arithmetic(torch.float32, plain)


def test_a_single_process_keeps_to_one_gpu(world, tmp_path, capsys) -> None:
    args = PretrainTrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=3)
    one_gpu_per_process(args)
    assert not capsys.readouterr().out
    args._n_gpu = 2
    assert args.train_batch_size == 6
    one_gpu_per_process(args)
    assert args.train_batch_size == 3
    assert "torchrun --nproc_per_node 2" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["num_experts=4", "num_experts_per_tok=2", "qk_norm=true"]])
def test_interrupted_run_continues_as_if_nothing_happened(world, tmp_path, more, capsys) -> None:
    overrides = ["--model_overrides", *SHAPE.split(), *more]
    pretrain(world, tmp_path / "whole", *overrides)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")  # as it was when killed at step 6
    shutil.rmtree(tmp_path / "broken" / "checkpoint-8")
    for name in ("config.json", "model.safetensors", "training_complete.json"):
        (tmp_path / "broken" / name).unlink()
    pretrain(world, tmp_path / "broken", *overrides)
    assert "continued from" in capsys.readouterr().out
    whole, broken = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    metrics = rows(tmp_path / "whole" / "metrics.jsonl")
    assert rows(tmp_path / "broken" / "metrics.jsonl") == metrics
    assert [row["step"] for row in metrics if "loss" in row] == [2, 4, 6, 8]
    assert not list((tmp_path / "whole").rglob("*.bin")), "no pickled arguments"

    capsys.readouterr()
    pretrain(world, tmp_path / "whole", *overrides)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="learning_rate was 0.001 and is now 0.5"):
        pretrain(world, tmp_path / "whole", *overrides, "--learning_rate", "0.5")
    more_text = tmp_path / "more.jsonl"
    more_text.write_text((world / "text.jsonl").read_text())
    arguments = [*overrides, "--data_path", str(more_text)]
    pretrain(world, tmp_path / "other", *arguments, "--max_steps", "1")
    more_text.write_text(more_text.read_text() * 2)
    with pytest.raises(UserError, match="more.jsonl has changed"):
        pretrain(world, tmp_path / "other", *arguments, "--max_steps", "1")
    routers = {"router/aux_loss", "router/z_loss", "router/entropy", "router/dropped", "router/load_max"}
    routers |= {"router/load_min", "router/dead"}
    for row in metrics:
        if "loss" in row:
            assert {name for name in row if name.startswith("router/")} == (routers if more else set())
            assert not more or row["router/dropped"] == 0 < row["router/entropy"] <= math.log(4) + 1e-6
            assert not more or row["router/load_min"] <= 1 <= row["router/load_max"] <= 4
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert 320 > reloaded.generation_config.eos_token_id[0]


def test_starting_over_replaces_the_earlier_run_only_when_it_is_ours(world, tmp_path) -> None:
    foreign = tmp_path / "foreign"
    (foreign / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(UserError, match="checkpoint-3, which this script did not write"):
        pretrain(world, foreign, "--resume", "never")
    assert (foreign / "checkpoint-3").is_dir()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data_path", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--model_size", "huge"], "unknown preset 'huge'"),
        (["--model_overrides", "nonsense=1"], "nonsense: no such field"),
        (["--model_overrides", "num_attention_heads=3", "num_key_value_heads=2"], "num_key_value_heads"),
        (["--block_size", "4096"], "longer than the model's context"),
        (["--vocab_size", "10"], "--vocab_size 10 is less"),
        (["--base_model", "nowhere"], "contradicts"),
        (["--tokenizer_path", "nowhere"], "nowhere: no tokenizer"),
        (["--weights_dtype", "bf16", "--bf16", "true"], "contradicts"),
        (["--resume_from_checkpoint", "nowhere"], "not a training checkpoint"),
    ],
)
def test_bad_input_leaves_nothing_behind(world, tmp_path, more, message) -> None:
    with pytest.raises(UserError, match=message) as error:
        pretrain(world, tmp_path / "out", *more)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_where_a_run_may_not_start(tmp_path) -> None:
    """The refusals and remarks of `find_start` about the directory and about a named checkpoint."""
    out, checkpoint = tmp_path / "out", tmp_path / "elsewhere" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint / "optimizer.pt").write_bytes(b"state")
    settings = {"additional_steps": 0, "layout": [1, 4, 2], "strategy": None}

    def start(resume: str = "auto", directory: Path = out, named: Path | None = checkpoint, **changed: object):
        args = SimpleNamespace(output_dir=str(directory), resume_from_checkpoint=named and str(named), **changed)
        return find_start(args, settings | changed, resume)

    with pytest.raises(UserError, match="is a file; name a directory"):
        start(directory=checkpoint / "trainer_state.json")
    with pytest.raises(UserError, match="--resume never and --resume_from_checkpoint contradict each other"):
        start("never")
    unchecked = [f"{checkpoint} has no {MANIFEST}: it is used unchecked, as another tool wrote it"]
    assert start() == (False, str(checkpoint), unchecked)
    seal(checkpoint, step=4)
    assert start() == (False, str(checkpoint), [])
    (checkpoint / "optimizer.pt").write_bytes(b"other")
    with pytest.raises(UserError, match=r"--resume_from_checkpoint .*optimizer.pt is not what was written"):
        start()

    out.mkdir()
    (out / SETTINGS_FILE).write_text(json.dumps(settings))
    with pytest.raises(UserError, match="--additional_steps 5: .* has no checkpoint to continue from"):
        start(named=None, additional_steps=5)
    (out / SETTINGS_FILE).write_text(json.dumps(settings | {"additional_steps": 9}))
    with pytest.raises(UserError, match="holds a run with --additional_steps 9, not 5; give 9 or more"):
        start(named=None, additional_steps=5)
    (out / SETTINGS_FILE).write_text(json.dumps(settings | {"strategy": "DeepSpeed", "layout": [2, 2, 2]}))
    with pytest.raises(UserError, match="trained by 2 processes, which DeepSpeed splits checkpoints over"):
        start(named=None, strategy="DeepSpeed")
    assert not list(out.glob("*.pt")) and [path.name for path in out.iterdir()] == [SETTINGS_FILE]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', r"bad.jsonl:2: not valid JSON"),
        ('{"body": "a"}\n', r"bad.jsonl:1: .*'text' is missing"),
        ("", "no rows"),
    ],
)
def test_bad_data_is_named_by_file_and_line(world, tmp_path, content, message) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        pretrain(world, tmp_path / "out", "--data_path", str(tmp_path / "bad.jsonl"))
    assert not (tmp_path / "out").exists()
