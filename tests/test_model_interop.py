"""Native checkpoints in both directions, and the libraries the model has to live with."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from smol_config import NATIVE_ARCHITECTURES, SmolConfig
from smol_model import SmolForCausalLM

BASE = {
    "vocab_size": 83,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.15,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "llama": {},
    "llama-9:3-untied-theta": {
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "llama-wide-heads-multi-query": {"head_dim": 16, "num_key_value_heads": 1},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "llama-yarn": {"rope_parameters": YARN},
    "llama-llama3": {"rope_parameters": LLAMA3},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 12, "tie_word_embeddings": False},
    "qwen2-9:3-untied": {
        "attention_bias": True,
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": False,
    },
    "qwen3-yarn": {"qk_norm": True, "rope_parameters": YARN},
    "mixtral": EXPERTS,
    "mixtral-untied-llama3": {**EXPERTS, "tie_word_embeddings": False, "rope_parameters": LLAMA3},
    "mixtral-misaligned": {**EXPERTS, "moe_intermediate_size": 22},
    "qwen3_moe": {**EXPERTS, "qk_norm": True},
    "qwen3_moe-unnormed": {**EXPERTS, "qk_norm": True, "norm_topk_prob": False},
}
# transformers' own grouped product refuses rows that are not a multiple of 16 bytes; ours falls back by itself.
LOOP = {"mixtral-misaligned": {"experts_implementation": "eager"}}
FIVE = ("llama", "qwen2", "qwen3", "mixtral", "qwen3_moe")


def config(case: str, **options) -> SmolConfig:
    return SmolConfig(**BASE | CASES[case] | options)


def build(case: str, **options) -> SmolForCausalLM:
    torch.manual_seed(0)
    return shaken(SmolForCausalLM(config(case, **options)).eval())


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """With norms and biases that are not 1 and 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 83, shape, generator=torch.Generator().manual_seed(7))


def assert_same_function(ours: SmolForCausalLM, theirs: torch.nn.Module) -> None:
    """Logits, loss and every gradient, on left- and right-padded rows."""
    x, mask = tokens(3, 11), torch.ones(3, 11, dtype=torch.long)
    mask[1, :4], mask[2, 8:] = 0, 0
    labels = x.masked_fill(mask == 0, -100)
    labels[1, 4] = -100  # would be predicted from padding, which an MoE layer does not route
    inputs = {
        "input_ids": x,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "labels": labels,
    }
    found, expected = (model.eval()(**inputs) for model in (ours, theirs))
    assert F.mse_loss(expected.logits, torch.zeros_like(expected.logits)) > 1e-2
    torch.testing.assert_close(found.logits[mask.bool()], expected.logits[mask.bool()], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)
    ours.zero_grad(), theirs.zero_grad()
    found.loss.backward(), expected.loss.backward()
    theirs_by_name = dict(theirs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == theirs_by_name.keys()
    for name, parameter in ours.named_parameters():
        reference = theirs_by_name[name].grad
        torch.testing.assert_close(parameter.grad, reference, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_masks_mean_what_they_mean_to_transformers(case, attention):
    """Without position ids; with holes, after which positions go on or were counted through; (B or 1, 1 or H, T, S)."""
    ours = build(case, attn_implementation=attention)
    theirs = AutoModelForCausalLM.from_config(ours.config.to_native(), attn_implementation=attention).eval()
    theirs.load_state_dict(ours.state_dict())
    x, holes = tokens(2, 8), torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 1, 1, 1]])
    causal = torch.full((8, 8), torch.finfo(torch.float32).min).triu(1)
    by_head = causal.expand(2, 4, 8, 8).clone()
    by_head[:, 1, 4:, :2] = torch.finfo(torch.float32).min
    for inputs in (
        {"attention_mask": holes},
        {"attention_mask": holes, "position_ids": (holes.cumsum(-1) - 1).clamp(min=0)},
        {"attention_mask": torch.ones_like(holes), "position_ids": torch.tensor([[0, 1, 2, 5, 6, 7, 8, 9]] * 2)},
        {"attention_mask": causal[None, None]},
        {"attention_mask": by_head},
    ):
        if case == "mixtral" and inputs["attention_mask"].dim() == 2:
            continue  # padding is not routed here
        kept = {name: value.clone() for name, value in inputs.items()}
        real = inputs["attention_mask"].bool() if inputs["attention_mask"].dim() == 2 else torch.ones_like(x).bool()
        found, expected = (model(x, **inputs).logits[real] for model in (ours, theirs))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert all(torch.equal(inputs[name], value) for name, value in kept.items()), "the caller's tensors are his own"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_a_directory_we_save_is_the_same_model_in_transformers(case, attention, tmp_path):
    ours = build(case, attn_implementation=attention)
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention, **LOOP.get(case, {}))
    assert type(theirs).__module__.startswith("transformers.")
    assert type(theirs).__name__ == NATIVE_ARCHITECTURES[case.split("-")[0]]
    assert_same_function(ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_a_directory_of_transformers_is_the_same_model_here(case, tmp_path):
    torch.manual_seed(0)
    theirs = shaken(AutoModelForCausalLM.from_config(config(case).to_native(), **LOOP.get(case, {})))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = SmolForCausalLM.from_pretrained(tmp_path)
    assert ours.config.model_type == case.split("-")[0]
    assert_same_function(ours, theirs)


@pytest.mark.parametrize("case", FIVE)
def test_on_disk_names_and_config(case, tmp_path):
    build(case, tie_word_embeddings=True).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == case and written["architectures"] == [NATIVE_ARCHITECTURES[case]]
    assert "auto_map" not in written and not list(tmp_path.glob("*.py"))
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert "lm_head.weight" not in shapes
    assert shapes["model.embed_tokens.weight"] == (83, 32)
    layer = "model.layers.1."
    expected = {
        "llama": {"mlp.gate_proj.weight": (48, 32), "self_attn.k_proj.weight": (16, 32)},
        "qwen2": {"self_attn.q_proj.bias": (32,), "self_attn.v_proj.bias": (16,)},
        "qwen3": {"self_attn.q_norm.weight": (12,), "self_attn.o_proj.weight": (32, 48)},
        "mixtral": {
            "block_sparse_moe.gate.weight": (4, 32),
            "block_sparse_moe.experts.3.w1.weight": (24, 32),
            "block_sparse_moe.experts.3.w2.weight": (32, 24),
            "block_sparse_moe.experts.3.w3.weight": (24, 32),
        },
        "qwen3_moe": {
            "mlp.gate.weight": (4, 32),
            "mlp.experts.3.gate_proj.weight": (24, 32),
            "mlp.experts.3.up_proj.weight": (24, 32),
            "mlp.experts.3.down_proj.weight": (32, 24),
            "self_attn.k_norm.weight": (8,),
        },
    }[case]
    for name, shape in expected.items():
        assert shapes[layer + name] == shape, name


@pytest.mark.parametrize("case", CASES)
def test_save_load_save_is_byte_stable_and_keeps_training_settings(case, tmp_path):
    extras = {"capacity_factor": 1.25, "router_z_loss_coef": 0.5, "router_aux_loss_coef": 0.25}
    extras = extras if "num_experts" in CASES[case] else {}
    first, second = tmp_path / "first", tmp_path / "second"
    build(case, residual_dropout=0.1, attention_dropout=0.2, eos_token_id=[3, 4], **extras).save_pretrained(first)
    loaded = SmolForCausalLM.from_pretrained(first)
    for name, value in {"residual_dropout": 0.1, "attention_dropout": 0.2, "eos_token_id": [3, 4], **extras}.items():
        assert getattr(loaded.config, name) == value, name
    changed = SmolForCausalLM.from_pretrained(first, residual_dropout=0.0)
    assert changed.model.layers[0].drop.p == 0.0 and loaded.model.layers[0].drop.p == 0.1
    loaded.save_pretrained(second)
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    "case, setting, value",
    [
        ("llama", "attention_bias", True),
        ("llama", "mlp_bias", True),
        ("llama", "hidden_act", "gelu"),
        ("llama", "rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        ("qwen2", "use_sliding_window", True),
        ("qwen3", "attention_bias", True),
        ("mixtral", "sliding_window", 16),
        ("mixtral", "router_jitter_noise", 0.1),
        ("qwen3_moe", "mlp_only_layers", [0]),
        ("qwen3_moe", "decoder_sparse_step", 2),
        ("llama", "model_type", "gpt2"),
    ],
)
def test_settings_we_do_not_implement_are_refused_by_name(case, setting, value, tmp_path):
    build(case).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text()) | {setting: value}
    if setting == "use_sliding_window":  # alone it does nothing
        values |= {"sliding_window": 16, "max_window_layers": 0, "layer_types": None}
    path.write_text(json.dumps(values))
    named = {"use_sliding_window": "sliding_window", "rope_parameters": "rope_type"}.get(setting, setting)
    with pytest.raises(ValueError, match=named):
        SmolForCausalLM.from_pretrained(tmp_path)


def test_old_spellings_of_a_config_are_understood(tmp_path):
    """rope_theta and torch_dtype at the top level, as written by transformers 4."""
    build("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    old = json.loads(path.read_text()) | {"rope_theta": 2e5, "torch_dtype": "bfloat16", "rope_scaling": None}
    del old["rope_parameters"], old["dtype"], old["head_dim"]
    path.write_text(json.dumps(old))
    found = SmolConfig.from_pretrained(tmp_path)
    assert found.rope_parameters == {"rope_theta": 2e5, "rope_type": "default"}
    assert found.dtype == torch.bfloat16 and found.head_dim == 8


@pytest.mark.parametrize("case", ["qwen3", "mixtral"])
def test_dtype_and_device_map(case, tmp_path):
    model = build(case)
    model.save_pretrained(tmp_path)
    half = SmolForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    x = tokens(2, 9)
    exact = model(x).logits
    # bf16 keeps 8 bits: both are about equally far from float32, and no further from each other
    error = (half(x).logits.float() - exact).abs().max()
    assert error < 0.05 * exact.abs().max()
    assert error < 2 * (theirs(x).logits.float() - exact).abs().max()


@pytest.mark.parametrize("case", ["qwen3", "mixtral"])
def test_a_device_map_with_layers_on_a_disk(case, tmp_path):
    """The second layer is fetched when its turn comes; `torch_dtype` is the name by which many scripts still say it."""
    model = build(case)
    model.save_pretrained(tmp_path / "model")
    places = {name: "cpu" for name, _ in model.model.named_children() if name != "layers"}
    places = {f"model.{name}": place for name, place in places.items()} | {"lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(model.config.num_hidden_layers)}
    spread = SmolForCausalLM.from_pretrained(
        tmp_path / "model", torch_dtype=torch.float32, device_map=places, offload_folder=tmp_path / "disk"
    )
    assert {p.device.type for p in spread.model.layers[1].parameters()} == {"meta"}, "nothing is on the disk"
    x = tokens(2, 9)
    torch.testing.assert_close(spread(x).logits, model.eval()(x).logits)
    half = SmolForCausalLM.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_mask_of_its_own_in_bf16():
    """A float mask meets the kernel for short rows in bf16, which otherwise gets a boolean one."""
    model, x = build("llama", attn_implementation="sdpa").bfloat16(), tokens(1, 8)
    mask = torch.full((1, 1, 8, 8), torch.finfo(torch.float32).min).triu(1)
    torch.testing.assert_close(model(x, attention_mask=mask).logits, model(x).logits, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("case", FIVE)
def test_generate_equals_transformers(case, tmp_path):
    ours = build(case)
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    x, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    modes = [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 20},
        {"do_sample": False, "use_cache": False},
    ]
    for mode in modes:
        found = []
        for model in (ours, theirs):
            torch.manual_seed(0)
            found.append(model.generate(x, attention_mask=mask, max_new_tokens=6, pad_token_id=0, **mode))
        assert torch.equal(*found), mode
    # left padding leaves no trace
    alone = ours.generate(x[:1, 3:], max_new_tokens=6, do_sample=False, pad_token_id=0)
    padded = ours.generate(x, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert alone[0, 4:].tolist() == padded[0, 7:].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_with_a_static_cache(dtype):
    """In bf16 rows as short as these have a kernel of their own, which wants as many keys as queries."""
    model, x = build("qwen3").to(dtype), tokens(1, 5)
    expected = model.generate(x, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(x, max_new_tokens=5, do_sample=False, cache_implementation="static"), expected)


@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_peft_adapter_fits_both_implementations(case, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    ours = build(case)
    ours.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "v_proj", "o_proj"] + ([] if case == "mixtral" else ["gate_proj", "down_proj"])
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if case == "mixtral" else None
    peft = get_peft_model(ours, LoraConfig(r=2, target_modules=targets, target_parameters=experts))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.2)
    x = tokens(2, 6)
    peft.train()
    peft(x, labels=x).loss.backward()
    assert all((p.grad is not None) == ("lora" in n) for n, p in peft.named_parameters())
    expected = peft.eval()(x).logits
    peft.save_pretrained(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(theirs.eval()(x).logits, expected, atol=1e-5, rtol=1e-4)
    merged = peft.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain(x).logits, expected, atol=1e-5, rtol=1e-4)


def test_an_adapter_on_the_head_takes_the_plain_loss():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama", tie_word_embeddings=False), LoraConfig(r=2, target_modules=["lm_head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.2)
    x = tokens(2, 6)
    loss = model.train()(x, labels=x).loss
    logits = model.eval()(x).logits
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()))


@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_the_fused_head_of_trl(case):
    """SFTTrainer and DPOTrainer patch `forward` like this and read these attributes."""
    utils = pytest.importorskip("trl.trainer.utils")
    model, x = build(case, router_aux_loss_coef=0.5, output_router_logits=True), tokens(2, 7)
    expected = model(x).logits[:, :-1].log_softmax(-1).gather(-1, x[:, 1:, None])[..., 0]
    utils.add_fused_lm_head(model)
    output = model(x, attention_mask=torch.ones_like(x), labels=x, fused_lm_head=True)
    torch.testing.assert_close(output.log_probs, expected, atol=1e-5, rtol=1e-5)
    if case == "mixtral":
        output.aux_loss.backward()
        assert model.model.layers[0].mlp.gate.weight.grad.any()
    assert torch.equal(model.generate(x, max_new_tokens=1, do_sample=False)[:, :7], x)


@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_trainer_trains_accumulates_evaluates_and_saves(case, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 10)]
    losses = []
    for batch_size in (4, 2):  # the same step, whole and in two micro-batches
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(batch_size)),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            max_steps=4,
            learning_rate=1e-2,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=4,
            save_steps=4,
            report_to=[],
            use_cpu=True,
            seed=1,
            disable_tqdm=True,
        )
        model = build(case, router_aux_loss_coef=0.0, router_z_loss_coef=0.0) if case == "mixtral" else build(case)
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:3])
        trainer.train()
        history = trainer.state.log_history
        losses.append([entry["loss"] for entry in history if "loss" in entry])
        assert [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        checkpoint = tmp_path / str(batch_size) / "checkpoint-4"
        assert AutoConfig.from_pretrained(checkpoint).model_type == case
        theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
        x = rows[0]["input_ids"][None]
        torch.testing.assert_close(theirs(x).logits, model.eval()(x).logits, atol=1e-5, rtol=1e-4)
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)


def test_the_file_is_not_needed_to_read_what_it_wrote(tmp_path):
    """A process that cannot import this project gets the same logits."""
    model, x = build("mixtral"), tokens(1, 5)
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        f"m = A.from_pretrained({str(tmp_path)!r}); x = torch.tensor({x.tolist()});"
        f"torch.save(m(x).logits.detach(), {str(tmp_path / 'logits.pt')!r}); assert 'smol_model' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits, model(x).logits, atol=1e-5, rtol=1e-5)
