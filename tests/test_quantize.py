"""int8 and int4 directories: what is in them, that others read them, and that the engine computes what they say."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from smol_config import SmolConfig
from smol_model import SmolForCausalLM
from smolkit import quantize
from smolkit.batch import generate_batch
from smolkit.decoder import Projection
from smolkit.errors import UserError

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 192,  # no multiple of 128: groups of 64
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
KINDS = {"llama": {}, "qwen2": {"attention_bias": True}, "qwen3": {"qk_norm": True, "tie_word_embeddings": False}}
IDS = torch.arange(1, 41).view(2, 20)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random bf16 checkpoint of each kind."""
    directories = {}
    for kind, options in KINDS.items():
        torch.manual_seed(0)
        model = SmolForCausalLM(SmolConfig(**SHAPE, **options)).to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        directories[kind] = tmp_path_factory.mktemp("source") / kind
        model.save_pretrained(directories[kind])
    return directories


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SMOLLM_CACHE", str(directory))
    return directory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "bits", "error"), [("int8", 8, 0.02), ("int4", 4, 0.15)])
def test_a_directory_for_everybody(
    sources: dict[str, Path], tmp_path: Path, kind: str, method: str, bits: int, error: float
) -> None:
    """The report is true, and transformers and we read the same weights, each nearest to the original's."""
    target = tmp_path / "quantised"
    report = quantize.quantize(sources[kind], target, method)
    assert json.loads((target / quantize.REPORT).read_text()) == report
    assert report["bytes"] == sum(f.stat().st_size for f in target.glob("*.safetensors")) < report["bytes_before"]
    assert report["group_size"] == {"int8": None, "int4": 64}[method] and report["layers"] == 14
    theirs = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    with torch.no_grad():
        theirs(IDS)  # decompresses
    ours = quantize.load_quantized(target, torch.float32, keep_int8=False)
    original = SmolForCausalLM.from_pretrained(sources[kind], dtype=torch.float32).requires_grad_(False)
    weights, squared, moved = dict(theirs.named_parameters()), 0.0, 0.0
    for (name, weight), own in zip(original.named_parameters(), ours.requires_grad_(False).parameters(), strict=True):
        torch.testing.assert_close(own, weights[name])
        if not name.endswith("_proj.weight"):
            assert torch.equal(own, weight)
            continue
        squared, moved = squared + float(weight.square().sum()), moved + float((own - weight).square().sum())
        groups = weight.unflatten(1, (-1, report["group_size"] or weight.shape[1]))
        step = groups.abs().amax(-1, keepdim=True) / (2**bits - 1) * 2
        # Half a step, and the largest value may lie half a step outside; scales are rounded to bf16.
        assert ((own.view_as(groups) - groups).abs() <= step * 0.51 + groups.abs() / 128).all()
    assert (moved / squared) ** 0.5 == pytest.approx(report["weight_error"], rel=1e-3)
    assert report["weight_error"] < error


@pytest.mark.parametrize("kind", KINDS)
def test_int4_logits_equal_those_of_transformers(sources: dict[str, Path], tmp_path: Path, kind: str) -> None:
    quantize.quantize(sources[kind], tmp_path / "q", "int4")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    ours = quantize.load_quantized(tmp_path / "q", torch.float32, keep_int8=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=1e-4)


def test_int8_layers_round_their_inputs_as_transformers_does(sources: dict[str, Path], tmp_path: Path) -> None:
    """Layer by layer: behind several, the tiniest difference decides a rounding somewhere."""
    quantize.quantize(sources["qwen2"], tmp_path / "q", "int8")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    ours = quantize.load_quantized(tmp_path / "q", torch.float32, keep_int8=True)
    torch.manual_seed(0)
    with torch.no_grad():
        theirs(IDS)
        for name, layer in ours.named_modules():
            if isinstance(layer, quantize.Int8Linear):
                x = torch.randn(1, 5, layer.weight.shape[1])
                torch.testing.assert_close(layer(x), theirs.get_submodule(name)(x), atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(not quantize.Int8Product.available(), reason="needs a CPU with int8 instructions (AVX512_VNNI)")
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_multiplies_in_int8(sources: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """The stacked kernel gives what its layers give, and a row the same bits whoever is beside it."""
    quantize.quantize(sources[kind], tmp_path / "q", "int8")
    model = quantize.load_quantized(tmp_path / "q", torch.bfloat16, keep_int8=True).eval()
    attention = model.model.layers[0].self_attn
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    product, x = Projection(*layers), torch.randn(33, 192).bfloat16()
    together = product(x)
    torch.testing.assert_close(together, torch.cat([layer(x) for layer in layers], -1), atol=1e-2, rtol=1e-2)
    for rows in (1, 2, 16, 32):
        assert torch.equal(product(x[:rows]), together[:rows])
    answers = generate_batch(model, IDS.tolist(), 12, ())
    plain = quantize.load_quantized(tmp_path / "q", torch.bfloat16, keep_int8=False).eval()
    expected = generate_batch(plain, IDS.tolist(), 12, ())
    assert [row[0] for row in answers] == [row[0] for row in expected]  # inputs are rounded: later tokens may differ


def with_groups_by_importance(source: Path, target: Path) -> None:
    """`source` as int4 with `actorder: group` as compressed_tensors writes it: groups of 64 inputs of like weight."""
    from compressed_tensors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights.group_size, scheme.weights.actorder = 64, "group"
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    with torch.no_grad():
        for _, layer in quantize._layers(model):
            layer.weight.mul_(torch.logspace(-1, 0.5, layer.in_features)[torch.randperm(layer.in_features)])
            order = layer.weight.abs().sum(0).argsort()
            groups = layer.weight[:, order].unflatten(1, (-1, 64))
            layer.weight_scale.copy_(calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)[0])
            layer.weight_g_idx[order] = torch.arange(len(order), dtype=torch.int32) // 64
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(target)
    compressor.update_config(target)


def test_groups_of_inputs_of_like_importance(sources: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    with_groups_by_importance(sources["llama"], tmp_path / "q")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    ours = quantize.load_quantized(tmp_path / "q", torch.float32)
    assert any(name.endswith("weight_g_idx") for name in quantize._read_tensors(tmp_path / "q"))
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=1e-4)


def test_what_is_missing_or_damaged_is_named(sources: dict[str, Path], tmp_path: Path) -> None:
    """In the source and in a quantised directory, which would else be filled with random layers."""
    shutil.copytree(sources["llama"], tmp_path / "deeper")
    quantize.quantize(sources["llama"], tmp_path / "q", "int4")
    for directory in (tmp_path / "deeper", tmp_path / "q"):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    with pytest.raises(UserError, match=r"deeper: the weights do not have all .*model\.layers\.2\..* and 6 more"):
        quantize.quantize(tmp_path / "deeper", tmp_path / "new", "int8")
    with pytest.raises(UserError, match=r"q: the weights do not have all .*model\.layers\.2\..* and 6 more"):
        quantize.load_quantized(tmp_path / "q", torch.float32)
    for directory in (tmp_path / "deeper", tmp_path / "q"):
        (directory / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="deeper: cannot load the weights: "):
        quantize.quantize(tmp_path / "deeper", tmp_path / "new", "int8")
    with pytest.raises(UserError, match="q: cannot read model.safetensors: "):
        quantize.load_quantized(tmp_path / "q", torch.float32)
    assert not (tmp_path / "new").exists()


def test_a_directory_with_settings_that_older_releases_wrote(sources: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(sources["llama"], tmp_path / "old")
    (tmp_path / "old" / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')
    quantize.quantize(tmp_path / "old", tmp_path / "q", "int8")
    written = json.loads((tmp_path / "q" / "generation_config.json").read_text())
    assert (written["do_sample"], written["temperature"], written["top_p"]) == (True, 0.6, 0.9)


def test_made_once(sources: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The cached directory serves again; another source or a failure on the way leaves nothing half-made."""
    first = quantize.cached(sources["llama"], "int8")
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert quantize.cached(sources["llama"], "int8") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    assert quantize.cached(sources["llama"], "int4") != first != quantize.cached(sources["qwen2"], "int8")
    monkeypatch.setattr(quantize, "write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize.quantize(sources["llama"], tmp_path / "broken", "int8")
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_the_run_comes_along(sources: dict[str, Path], tmp_path: Path) -> None:
    """A directory with training_complete.json would count as a finished run, and get a card of one."""
    shutil.copytree(sources["llama"], tmp_path / "run")
    for name in ("training_complete.json", "run_settings.json", "diagnosis.json", "notes.txt", "tokenizer.json"):
        (tmp_path / "run" / name).write_text("{}")
    (tmp_path / "q").mkdir()  # an empty directory is as good as none
    quantize.quantize(tmp_path / "run", tmp_path / "q", "int8")
    written = {"README.md", "config.json", "generation_config.json", "model.safetensors", quantize.REPORT}
    assert {path.name for path in (tmp_path / "q").iterdir()} == written | {"tokenizer.json"}


def test_refusals(sources: dict[str, Path], tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    SmolForCausalLM(SmolConfig(**SHAPE, **experts)).save_pretrained(tmp_path / "moe")
    SmolForCausalLM(SmolConfig(**{**SHAPE, "intermediate_size": 100})).save_pretrained(tmp_path / "odd")
    quantize.quantize(sources["llama"], tmp_path / "done", "int8")
    shutil.copytree(sources["llama"], tmp_path / "gpt2")
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    for source, method, message in (
        (tmp_path / "moe", "int8", "has experts"),
        (tmp_path / "odd", "int4", "multiples of 32, this model has 100, 192"),
        (tmp_path / "done", "int4", "quantised already"),
        (tmp_path / "nothing", "int4", "no such checkpoint"),
        (tmp_path / "gpt2", "int8", "gpt2: model_type 'gpt2' is not supported"),
    ):
        with pytest.raises(UserError, match=message):
            quantize.quantize(source, tmp_path / "new", method)
    with pytest.raises(UserError, match="exists already"):
        quantize.main(["--model_path", str(sources["llama"]), "--quantization", "int8", "--output_dir", str(tmp_path)])
    config = json.loads((tmp_path / "done" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 2
    (tmp_path / "done" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="only serve_vllm.py may know"):
        quantize.load_quantized(tmp_path / "done", torch.float32, keep_int8=True)
