"""Benchmarks at a toy size: do all sides compute the same thing, and are the figures what they say? Never: how fast."""

import dataclasses
import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common, generate, scaling, train_step
from benchmarks.common import CASES, Case, Target, shape
from benchmarks.peers import PEERS
from smol_config import SmolConfig
from smol_model import SmolForCausalLM
from smolkit.errors import UserError

DENSE = shape(32, 2, 4, 2, 48, 83, initializer_range=0.2)
QWEN3 = DENSE | {"qk_norm": True, "tie_word_embeddings": False, "head_dim": 16}
# Peers have no router losses, and a capacity limit would drop tokens that theirs keep.
MIXTRAL = DENSE | {"num_experts": 4, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
MODELS = {"dense": DENSE, "qk_norm and untied": QWEN3, "experts": MIXTRAL}


@pytest.fixture
def toy(monkeypatch):
    """A case "toy", measured in this very process (with results that went through JSON, as they do in real runs)."""

    def here(function, **arguments):
        module, name = function.split(":")
        measure = getattr({"benchmarks.train_step": train_step, "benchmarks.generate": generate}[module], name)
        return json.loads(json.dumps(measure(**json.loads(json.dumps(arguments)))))

    targets = (
        Target("ours", "speed", 1.0, "minimind"),
        Target("ours", "matmul", 0.1),
        Target("ours", "speed", 1, "gone"),
    )
    monkeypatch.setitem(CASES, "toy", Case(DENSE, 2, 16, ("ours", "minimind", "litgpt"), targets))
    monkeypatch.setattr(common, "in_a_process", here)
    yield
    torch.set_flush_denormal(False)  # runtime.prepare set it


# --- the sides are the same function ------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", [name for name in PEERS if name != "nanochat"])
def test_a_peer_with_our_weights_has_our_loss_and_our_gradient(name: str, model: str) -> None:
    if name == "litgpt":
        pytest.importorskip("litgpt")
    torch.manual_seed(1)
    config = SmolConfig(**MODELS[model])
    ours, peer = SmolForCausalLM(config).train(), PEERS[name](config).train()
    peer.copy_weights(ours)
    ids = torch.randint(config.vocab_size, (2, 12))
    loss, theirs = ours(input_ids=ids, labels=ids).loss, peer(ids)
    torch.testing.assert_close(theirs, loss, atol=1e-5, rtol=0)
    loss.backward()
    theirs.backward()
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        for module in (ours, peer)
    ]
    torch.testing.assert_close(*norms, atol=0, rtol=1e-4)
    assert abs(loss.item() - math.log(config.vocab_size)) > 0.01, "the weights say nothing: any model would agree"


def test_nanochat_starts_without_an_opinion_and_learns() -> None:
    torch.manual_seed(1)
    config = SmolConfig(**DENSE)
    peer, ids = PEERS["nanochat"](config), torch.randint(config.vocab_size, (2, 12))
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        losses.append(peer(ids))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(losses[0].item(), math.log(config.vocab_size), atol=1e-5, rtol=0)
    assert losses[-1] < 0.5
    with pytest.raises(UserError, match="nanochat has no Mixture-of-Experts"):
        train_step.main(["--case", "moe-85m", "--sides", "ours,nanochat"])


def test_generation_continues_alike_on_all_sides() -> None:
    config = SmolConfig(**DENSE)
    ours = generate.build("engine", config, torch.float32)
    theirs = generate.build("transformers", config, torch.float32)
    theirs.load_state_dict(ours.state_dict())
    prompts = torch.randint(config.vocab_size, (3, 7), generator=torch.Generator().manual_seed(2)).tolist()
    expected = generate.generator("transformers", theirs)(prompts, 9)
    assert [len(answer) for answer in expected] == [9, 9, 9]
    assert generate.generator("engine", ours)(prompts, 9) == expected
    assert generate.generator("generate", ours)(prompts, 9) == expected


# --- FLOPs and bytes ----------------------------------------------------------------------------------------


def test_the_ceiling_of_smollm2_135m_equals_the_hand_count() -> None:
    """6 FLOPs per token and weight: 30 layers of 2 x 576² + 2 x 576 x 192 + 3 x 576 x 1536, a head 576 x 49152."""
    products = train_step.linear_products(CASES["135m"].config(), 1024)
    assert 3 * sum(product.flops for product in products) == 6 * 1024 * (30 * 3_538_944 + 28_311_552)
    assert train_step.attention_flops(CASES["135m"].config(), 2, 512) == 30 * 2 * (2 * 2 * 9 * 512 * 512 * 64)


def test_the_ceiling_counts_two_of_four_experts() -> None:
    products = train_step.linear_products(SmolConfig(**MIXTRAL), 64)
    experts = sum(product.flops for product in products if product.what.startswith(("gate", "down")))
    assert experts == 2 * 64 * 2 * (3 * 32 * 48) * 2  # FLOPs x tokens x experts of a token x weights x layers
    assert sum(product.flops for product in products if product.what == "router") == 2 * 64 * 32 * 4 * 2


def test_the_ceiling_multiplies_what_a_real_step_multiplies() -> None:
    """torch's own counter: around the ceiling's products and around a step of the plain models."""
    config, device = SmolConfig(**DENSE), torch.device("cpu")
    mm = torch.ops.aten.mm
    with FlopCounterMode(display=False) as ceiling:
        for product in train_step.linear_products(config, 2 * 16):
            train_step.linear_pass(product, device)()
    ids = torch.randint(config.vocab_size, (2, 16))
    for name in ("minimind", "nanochat"):
        peer = PEERS[name](config)
        with FlopCounterMode(display=False) as step:
            peer(ids).backward()
        assert ceiling.get_flop_counts()["Global"][mm] == step.get_flop_counts()["Global"][mm] > 0
    with FlopCounterMode(display=False) as attention:
        train_step.attention_pass(config, 2, 16, device)()
    assert attention.get_total_flops() == 3 * train_step.attention_flops(config, 2, 16)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["ours", "transformers"])
def test_static_memory_is_sixteen_bytes_per_parameter(name: str, dtype: str) -> None:
    """fp32: weight, gradient, two moments; bf16 with masters: 2 + 2 + 4 + 8."""
    config = SmolConfig(**DENSE)
    training = train_step.Side(name).build(config, torch.device("cpu"), dtype)
    training.gradients(torch.randint(config.vocab_size, (1, 16)))
    training.update()
    parameters = 83 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32
    bytes_ = train_step.static_bytes(training.model, training.optimizer)
    assert 0 <= bytes_ - 16 * parameters < 16 * 21  # Adam also counts its steps: a number per tensor


# --- the reports --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_training_report_adds_up(dtype, toy, capsys, tmp_path) -> None:
    output = tmp_path / "report.json"
    train_step.main(["--case", "toy", "--rounds", "2", "--steps", "1", "--dtype", dtype, "--output", str(output)])
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(output.read_text())
    sides = report["sides"]
    if common.is_installed("litgpt"):
        assert set(sides) == {"ours", "minimind", "litgpt"} and not report["absent"]
    else:
        assert set(sides) == {"ours", "minimind"} and report["absent"] == {"litgpt": "litgpt is not installed"}
    for side in sides.values():
        assert len(side["tokens_per_second"]["rounds"]) == 2
        assert side["peak_above_start"] >= 0 and math.isfinite(side["last_loss"])
    ours, theirs = (sides[name]["tokens_per_second"]["rounds"] for name in ("ours", "minimind"))
    ratios = report["speed_ratios"]["ours"]["minimind"]
    assert ratios["rounds"] == pytest.approx([a / b for a, b in zip(ours, theirs, strict=True)], rel=0.01)
    assert ratios["median"] == pytest.approx(sum(ratios["rounds"]) / 2, abs=0.001)
    ceiling = report["matmul"]["tokens_per_second"]
    share = sum(a / b for a, b in zip(ours, ceiling, strict=True)) / 2
    assert report["share_of_matmul"]["ours"] == pytest.approx(share, abs=0.01)
    assert report["model"]["parameters"] == SmolForCausalLM(SmolConfig(**DENSE)).num_parameters()
    if dtype == "fp32":
        assert report["targets"] == [], "the goals are those of bf16"
        return
    speed, matmul, gone = report["targets"]
    assert speed["measured"] == ratios["median"] and matmul["measured"] == report["share_of_matmul"]["ours"]
    assert gone["measured"] is gone["met"] is None


def test_every_side_is_trained_on_the_same_tokens(monkeypatch) -> None:
    seen = []
    gradients = train_step.Training.gradients
    monkeypatch.setattr(train_step.Training, "gradients", lambda self, ids: (seen.append(ids), gradients(self, ids))[1])
    for side in ("ours", "minimind", "transformers"):
        train_step.measure(side, DENSE, 2, 16, steps=1, warmup=1, dtype="fp32")
    torch.set_flush_denormal(False)
    first, second, third = (torch.stack(seen[n : n + 2]) for n in (1, 4, 7))  # after a step of a very small model
    assert torch.equal(first, second) and torch.equal(second, third)


def test_targets_are_judged() -> None:
    speed, memory = Target("ours", "speed", 1.6, "litgpt"), Target("ours", "memory", 0.4, "litgpt")
    assert [speed.judge(value)["met"] for value in (1.59, 1.6)] == [False, True]
    assert [memory.judge(value)["met"] for value in (0.41, 0.4)] == [False, True]
    assert speed.judge(2.0)["target"] == "speed of ours / litgpt >= 1.6"


def test_the_generation_report_has_every_kind_and_side(toy, capsys) -> None:
    sizes = ["--prompt", "8", "--decode_prompt", "4", "--new", "3", "--streams", "2", "--repeats", "1"]
    generate.main(["--case", "toy", "--rounds", "1", "--sides", "engine,transformers", "--dtype", "bf16", *sizes])
    report = json.loads(capsys.readouterr().out)
    assert {kind: set(of) for kind, of in report["tokens_per_second"].items()} == {
        "prefill": {"engine", "transformers"},
        "decode_2": {"engine", "transformers"},
    }
    assert [target["kind"] for target in report["targets"]] == ["prefill", "decode_2"]


def test_exponents_of_known_curves() -> None:
    assert scaling.exponents([1, 2, 4], [3.0, 6.0, 24.0]) == [1.0, 2.0]


def test_the_scaling_report_has_a_curve_for_every_part(toy, monkeypatch, capsys) -> None:
    scaling.main(["--curve", "length", "--case", "toy", "--values", "8", "16", "--rounds", "1", "--steps", "1"])
    report = json.loads(capsys.readouterr().out)["length"]
    # 6 FLOPs x tokens x (weights + layers x query channels x (length + 1)): linear but for attention
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 83 * 32
    flops = [6 * length * (weights + 2 * 32 * (length + 1)) for length in (8, 16)]
    assert report["expected"]["gradients"] == [pytest.approx(math.log2(flops[1] / flops[0]), abs=0.001)]
    assert all(len(report[side]["gradients"]["exponents"]) == 1 for side in ("ours", "transformers", "matmul"))
    monkeypatch.setattr(scaling, "EXPERT_MODEL", {name: MIXTRAL[name] for name in DENSE})
    monkeypatch.setattr(scaling, "EXPERT_BATCH", (2, 16))
    scaling.main(["--curve", "experts", "--values", "4", "8", "--rounds", "1", "--steps", "1", "--sides", "ours"])
    report = json.loads(capsys.readouterr().out)["experts"]
    parameters = [SmolForCausalLM(SmolConfig(**DENSE | {"num_experts": e})).num_parameters() for e in (4, 8)]
    assert report["expected"]["update"] == [pytest.approx(math.log2(parameters[1] / parameters[0]), abs=0.001)]
    assert len(report["ours"]["update"]["seconds"]) == 2


def test_sides_run_in_processes_of_their_own() -> None:
    versions = common.in_a_process("benchmarks.common:environment")["versions"]
    assert versions["torch"] == torch.__version__
    with pytest.raises(RuntimeError, match="--sides nobody: unknown"):
        common.in_a_process("benchmarks.train_step:Side", name="nobody")


@pytest.mark.parametrize(
    ("argv", "message"), [(["--case", "nothing"], "cases: tiny,"), (["--sides", "ours+magic"], "ours[+]magic: unknown")]
)
def test_an_unknown_name_is_refused_before_any_work(argv, message) -> None:
    with pytest.raises(UserError, match=message):
        train_step.main(argv)


@pytest.mark.slow
def test_the_stages_report_compares_scripts_with_the_bare_step_and_with_trl(capsys) -> None:
    from benchmarks import stages

    stages.main(["--rounds", "1", "--steps", "5", "--fp32"])
    report = json.loads(capsys.readouterr().out)["stages"]
    assert set(report) == {"pretrain", "sft", "dpo"}
    for stage in report.values():
        assert set(stage["tokens_per_second"]) == {"script", "bare", "peer"}
        assert stage["target"]["measured"] == pytest.approx(stage["script_over_bare"]["median"])
        assert len(stage["loss"]["script"]) == 2 and stage["loss"]["largest_difference"] < 1e-4


@pytest.mark.slow
def test_the_stages_report_takes_your_texts_and_tokenizer(capsys, tmp_path, run_script) -> None:
    """Texts that are all the same are learned in 20 steps; the tiny world begins at 7."""
    from benchmarks import stages

    texts = tmp_path / "texts.jsonl"
    texts.write_text((json.dumps({"text": "one two three four " * 40}) + "\n") * 40)
    train = ["train_tokenizer.py", "--mode", "train", "--vocab_size", 300, "--data_path", texts]
    run_script(*train, "--save_dir", tmp_path / "tokenizer")
    words = f"--stages pretrain --against peer --rounds 1 --steps 15 --fp32 --batch 2 64 --pretrain_data {texts}"
    stages.main([*words.split(), "--tokenizer", str(tmp_path / "tokenizer")])
    report = json.loads(capsys.readouterr().out)["stages"]["pretrain"]
    assert (report["rows"], report["tokens_of_a_row"]) == (2, 64)
    assert set(report["tokens_per_second"]) == {"script", "peer"} and "target" not in report
    assert report["loss"]["largest_difference"] < 1e-4
    assert report["loss"]["script"][-1] < 3


def test_another_toolkits_speed_is_read_from_its_log(tmp_path) -> None:
    """LLaMA-Factory logs all tokens and their mean speed since the start; here a stand-in does."""
    from benchmarks import stages

    program = tmp_path / "python"
    log = [(500, 50.0), (1200, 60.0), (1800, 60.0)]
    rows = [{"total_tokens": tokens, "throughput": speed, "loss": 1.0} for tokens, speed in log]
    lines = [json.dumps(row) for row in [*rows, {"total_tokens": 1800, "throughput": 1.0}]]
    (tmp_path / "log").write_text("\n".join(lines))
    program.write_text(
        f"""#!/bin/bash
        while [ "$1" != --output_dir ]; do [ "$1" = --bf16 ] && bf16=$2; shift; done
        [ "$bf16" = True ] && [ -f dataset_info.json ] || exit 7
        mkdir "$2" && cp {tmp_path}/log "$2/trainer_log.jsonl"
        """
    )
    program.chmod(0o755)
    job = stages.Job(tmp_path, "sft", 10, False, 2, 512)
    speed = stages.measure_llama_factory(job, str(program))
    assert speed == {"tokens_per_second": pytest.approx((70 + 60) / 2)}
    with pytest.raises(RuntimeError, match="exited with 7"):
        stages.measure_llama_factory(dataclasses.replace(job, fp32=True), str(program))
