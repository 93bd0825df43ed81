"""export.py as a user runs it: files and directories that others read, adapters merged, the hub (a server on this
machine that answers as the hub does), and foreign checkpoints coming in."""

import base64
import hashlib
import json
import shutil
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import huggingface_hub
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
import train_pretrain
from smol_config import NATIVE_ARCHITECTURES, SmolConfig
from smol_model import SmolForCausalLM
from smolkit.chat import add_chat_tokens, save_tokenizer
from smolkit.checkpoints import build_model, new_config, read_config, resize_vocabulary, set_generation_config
from smolkit.errors import UserError
from smolkit.export import export_native, final_files
from smolkit.model_card import gguf_card
from smolkit.tokenizer import train_bpe

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CASES = {
    "llama": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True, "tie_word_embeddings": False},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS | {"qk_norm": True},
}
SLOW_CASES = [pytest.param(case, marks=pytest.mark.slow) for case in ("qwen2", "qwen3", "qwen3_moe")]
WORDS = "the a cat dog sat on mat with red blue house of tree and ran fast slow very big small".split()


def lines(count: int, seed: int) -> list[str]:
    picks = torch.randint(0, len(WORDS), (count, 14), generator=torch.Generator().manual_seed(seed)).tolist()
    return [" ".join(WORDS[i] for i in row) for row in picks]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A checkpoint of every architecture, an adapter for the first, text."""
    root = tmp_path_factory.mktemp("export")
    tokenizer = train_bpe(lines(200, 1), 320, "qwen2", True, ())
    add_chat_tokens(tokenizer)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for case, options in CASES.items():
        torch.manual_seed(0)
        model = SmolForCausalLM(SmolConfig(**SHAPE | options | ids, vocab_size=len(tokenizer)))
        set_generation_config(model, tokenizer)
        model.save_pretrained(root / case)
        save_tokenizer(tokenizer, root / case)
        (root / case / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A model\n")
    lora = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(SmolForCausalLM.from_pretrained(root / "llama"), lora).save_pretrained(root / "adapter")
    (root / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines(60, 0)))
    return root


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(ids).logits.float()


# --- going out ----------------------------------------------------------------------------------------------


def test_gguf_and_modelfile_by_the_command(world, tmp_path, run_script):
    arguments = ("--model_path", world / "llama", "--format", "gguf", "--output", tmp_path / "m.gguf")
    shown = run_script("export.py", *arguments)
    assert "m.gguf: 20 tensors" in shown.stdout and "ollama create" in shown.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Modelfile", "m.gguf"]
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert types == {"F16", "F32"}
    modelfile = (tmp_path / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./m.gguf\n") and "PARAMETER num_ctx 64\n" in modelfile


def test_an_adapter_is_merged_into_either_format(world, tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(world / "llama")
    expected = logits(PeftModel.from_pretrained(base, world / "adapter"))
    common = ["--model_path", f"{world}/llama", "--adapter", f"{world}/adapter", "--dtype", "f32"]
    export.main([*common, "--format", "safetensors", "--output", f"{tmp_path}/merged"])
    export.main([*common, "--format", "gguf", "--output", f"{tmp_path}/file/m.gguf"])
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(native), expected, atol=1e-4, rtol=1e-4)
    file = AutoModelForCausalLM.from_pretrained(tmp_path / "file", gguf_file="m.gguf")
    torch.testing.assert_close(logits(file), expected, atol=1e-4, rtol=1e-4)
    assert (logits(AutoModelForCausalLM.from_pretrained(world / "llama")) - expected).abs().max() > 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "merged"]  # no traces of the way there
    assert sorted(path.name for path in (tmp_path / "file").iterdir()) == ["Modelfile", "m.gguf"]
    names = {field.name: field for field in gguf.GGUFReader(tmp_path / "file" / "m.gguf").fields.values()}
    assert names["general.name"].contents() == "adapter"
    assert "note: " not in capsys.readouterr().err
    shutil.copytree(world / "llama", tmp_path / "moved")
    export.main([*common, "--model_path", f"{tmp_path}/moved", "--format", "safetensors", "--output", f"{tmp_path}/m2"])
    note = f"note: {world}/adapter was trained on {world}/llama, and was added to {tmp_path}/moved"
    assert note in capsys.readouterr().err


def test_fewer_bits_are_a_directory_that_transformers_reads(world, tmp_path, capsys):
    target = tmp_path / "int8"
    export.main(f"--model_path {world}/llama --format compressed-tensors --bits 8 --output {target}".split())
    assert "int8" in capsys.readouterr().out
    settings = json.loads((target / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"
    exact = logits(AutoModelForCausalLM.from_pretrained(world / "llama", dtype=torch.float32))
    rounded = logits(AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32))
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.1


def test_four_bits_of_a_merged_adapter(world, tmp_path):
    """What is rounded is the sum, and what was rounded is named, not the directory it was merged in."""
    torch.manual_seed(0)
    model = SmolForCausalLM(SmolConfig(**SHAPE | {"intermediate_size": 64}, vocab_size=320))
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(AutoTokenizer.from_pretrained(world / "llama"), tmp_path / "base")
    lora = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(SmolForCausalLM.from_pretrained(tmp_path / "base"), lora).save_pretrained(tmp_path / "adapter")
    arguments = f"--model_path {tmp_path}/base --adapter {tmp_path}/adapter --output {tmp_path}/int4 --bits 4"
    export.main([*arguments.split(), "--format", "compressed-tensors"])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain, exact = logits(base), logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    rounded = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "int4", dtype=torch.float32))
    assert 0 < (rounded - exact).norm() < (rounded - plain).norm()
    named = f"{tmp_path}/base + {tmp_path}/adapter"
    assert json.loads((tmp_path / "int4" / "quantization.json").read_text())["source"] == named
    assert named in (tmp_path / "int4" / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "int4"]


def test_every_gguf_file_of_a_folder_has_its_modelfile(world, tmp_path, capsys):
    for name, dtype in (("a", "f16"), ("b", "q8_0"), ("a", "bf16")):
        export.main(f"--model_path {world}/llama --format gguf --dtype {dtype} --output {tmp_path}/{name}.gguf".split())
    assert f"ollama create NAME -f {tmp_path}/b.Modelfile" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Modelfile", "a.gguf", "b.Modelfile", "b.gguf"]
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./a.gguf\n")
    assert (tmp_path / "b.Modelfile").read_text().startswith("FROM ./b.gguf\n")


@pytest.mark.parametrize("case", CASES)
def test_another_dtype_is_a_complete_directory(case, world, tmp_path):
    export.main(["--model_path", f"{world}/{case}", "--format", "safetensors", "--output", f"{tmp_path}/bf16"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto")
    assert model.dtype == torch.bfloat16 and type(model).__name__ == NATIVE_ARCHITECTURES[case]
    source = load_file(world / case / "model.safetensors")
    found = load_file(tmp_path / "bf16" / "model.safetensors")
    assert found.keys() == source.keys()
    assert all(torch.equal(found[name], value.to(torch.bfloat16)) for name, value in source.items())
    assert "converted from" in (tmp_path / "bf16" / "README.md").read_text()
    assert model.generation_config.eos_token_id == AutoModelForCausalLM.from_pretrained(
        world / case
    ).generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(tmp_path / "bf16").chat_template


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--format gguf", "belong together"),
        ("--output x.gguf", "nothing to do"),
        ("--format gguf --output x.bin", "ends in .gguf"),
        ("--format safetensors --output x --dtype q8_0", "is a type of gguf"),
        ("--format safetensors --output x --bits 8", "--bits 8 is for"),
        ("--format compressed-tensors --output x --dtype f16", "takes --bits"),
        ("--card --private", "--private needs"),
        ("--push_to_hub a/b --adapter x", "need --format"),
        ("--format gguf --output x.gguf --adapter nowhere", "not a PEFT adapter"),
        ("--format safetensors --output {world}/llama", "is in use"),
        ("--format gguf --output x.gguf --model_path {world}/adapter", "merge it first"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(arguments, words, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        export.main(["--model_path", f"{world}/llama", *arguments.format(world=world).split()])
    assert not any(tmp_path.iterdir())


def test_an_adapter_that_does_not_fit_is_refused(world, tmp_path):
    config = json.loads((world / "adapter" / "adapter_config.json").read_text())
    shutil.copytree(world / "adapter", tmp_path / "other")
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["nothing_proj"]}))
    with pytest.raises(UserError, match="does not fit"):
        arguments = f"--model_path {world}/llama --adapter {tmp_path}/other --output {tmp_path}/out"
        export.main([*arguments.split(), "--format", "safetensors"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("layers", "words"), [(3, "no .*layers.2.*lora_A"), (1, "no place for .*layers.1.*lora_")])
def test_an_adapter_of_another_depth_is_refused(layers, words, world, tmp_path):
    """PEFT adds what it can and goes on, with a warning at most."""
    model = SmolForCausalLM(SmolConfig(**SHAPE | {"num_hidden_layers": layers}, vocab_size=320))
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(AutoTokenizer.from_pretrained(world / "llama"), tmp_path / "base")
    with pytest.raises(UserError, match=f"adapter does not fit the model: {words}"):
        export_native(tmp_path / "base", tmp_path / "out", "f32", world / "adapter")
    assert not (tmp_path / "out").exists()


def changed(world: Path, directory: Path, file: str = "config.json", **values: object) -> Path:
    """A copy of the first checkpoint with other values in one of its JSON files."""
    shutil.copytree(world / "llama", directory)
    contents = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps(contents | values))
    return directory


def refused(directory: Path, output: Path) -> str:
    """What `export.py --format safetensors` says of it, in one line, before it writes."""
    with pytest.raises(UserError) as caught:
        export.main(f"--model_path {directory} --format safetensors --dtype f16 --output {output}".split())
    assert "\n" not in str(caught.value) and not output.exists()
    return str(caught.value)


def test_weights_that_are_not_there_are_not_made_up(world, tmp_path):
    said = refused(changed(world, tmp_path / "deeper", num_hidden_layers=5), tmp_path / "out")
    assert "model.layers.2.input_layernorm.weight" in said and "and 24 more" in said  # 3 layers of 9
    untied = changed(world, tmp_path / "untied", tie_word_embeddings=False)
    assert "asks for: lm_head.weight; copy" in refused(untied, tmp_path / "out")


def test_weights_that_are_damaged_are_named_in_one_line(world, tmp_path):
    broken = changed(world, tmp_path / "broken")
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert f"{broken}: cannot load the weights: " in refused(broken, tmp_path / "out")
    with pytest.raises(UserError, match="cannot read model.safetensors"):
        export.main(f"--model_path {broken} --format gguf --output {tmp_path}/m.gguf".split())


def test_a_quantised_directory_is_no_source(world, tmp_path):
    export.main(f"--model_path {world}/llama --format compressed-tensors --bits 8 --output {tmp_path}/int8".split())
    said = f"{tmp_path}/int8 is quantised; use the checkpoint it was made from"
    assert refused(tmp_path / "int8", tmp_path / "out") == said
    with pytest.raises(UserError, match="is quantised; use"):
        resize_vocabulary(tmp_path / "int8", world / "llama", tmp_path / "out")


@pytest.mark.parametrize("adapter", [False, True])
def test_what_f16_has_no_room_for_is_refused(adapter, world, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    large = changed(world, tmp_path / "large")
    weights = load_file(large / "model.safetensors")
    weights[name][1, 2] = -1e5
    save_file(weights, large / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"{name} holds 100000, more than f16's 65504; use --dtype bf16"):
        export_native(large, tmp_path / "f16", "f16", world / "adapter" if adapter else None)
    assert not (tmp_path / "f16").exists()
    with pytest.raises(UserError, match="blk.0.ffn_up.weight holds 100000, more than f16's 65504; use --dtype bf16"):
        export.main(f"--model_path {large} --format gguf --dtype f16 --output {tmp_path}/m.gguf".split())
    export_native(large, tmp_path / "bf16", "bf16")
    assert load_file(tmp_path / "bf16" / "model.safetensors")[name][1, 2] == torch.tensor(-1e5).bfloat16()


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ({"temperature": 0.6, "do_sample": False}, {"do_sample": False, "temperature": None}),
        ({"temperature": 1.0, "top_k": 50}, {"temperature": 1.0, "top_k": 50, "do_sample": None}),  # transformers saves
    ],
)
def test_settings_of_generation_that_older_releases_wrote_can_be_saved(given, written, world, tmp_path):
    source = changed(world, tmp_path / "old", "generation_config.json", **given)
    export_native(source, tmp_path / "out", "bf16")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: found.get(name) for name in written} == written


def test_settings_of_generation_that_nobody_can_save_are_refused_before_a_run(world, tmp_path):
    source = changed(world, tmp_path / "old", "generation_config.json", length_penalty=2.0)
    with pytest.raises(UserError, match=r"generation_config.json could not be saved again: .*length_penalty.*; mend"):
        build_model(read_config(source), source, torch.float32)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": "64"}, "'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, "by zero"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor"),
        ({"dtype": "foo"}, "foo"),
    ],
)
def test_values_that_no_model_has_are_one_line(values, words, world, tmp_path):
    source = changed(world, tmp_path / "model", **values)
    said = refused(source, tmp_path / "out")
    assert said.startswith(f"{source}: ") and words in said
    with pytest.raises(UserError, match=f"^{source}: "):
        resize_vocabulary(source, source, tmp_path / "out")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"vocab_size": 64}, "vocab_size=64 is less than the 320 entries of the tokenizer"),
        ({"capacity_factor": 1.25}, "capacity_factor: only a model with experts has it, and tiny has none"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok: only a model with experts"),
        ({"num_experts": 4, "num_experts_per_tok": 0}, r"num_experts_per_tok 0 must be at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0 must be at least 1"),
        ({"dtype": "foo"}, "foo"),
    ],
)
def test_overrides_that_cannot_be_are_refused(overrides, words, world):
    with pytest.raises(UserError, match=words):
        new_config("tiny", overrides, AutoTokenizer.from_pretrained(world / "llama"))


def test_overrides_that_can_be_are_taken(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "llama")
    assert new_config("tiny", {"vocab_size": 400, "capacity_factor": None}, tokenizer).vocab_size == 400
    assert new_config("tiny", {"num_experts": 4, "capacity_factor": 1.5}, tokenizer).capacity_factor == 1.5


# --- the hub ------------------------------------------------------------------------------------------------


@dataclass
class Hub:
    """A model repository that takes uploads: `files` by path, what was created, the token that has to come along."""

    url: str = ""
    token: str = "hf_secret"
    created: list[dict] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files by their hash
    files: dict[str, bytes] = field(default_factory=dict)



class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.stored[self.path.rpartition("/")[2]] = body
        self.answer(200, {})

    def do_POST(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.answer(401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            self.hub.created.append(wanted)
            return self.answer(200, {"url": f"{self.hub.url}/{wanted['organization']}/{wanted['name']}"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                item | {"actions": {"upload": {"href": f"{self.hub.url}/upload/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self.answer(200, {"objects": objects, "transfer": "basic"})
        if "/commit/" in path:
            return self.commit(path, body)
        return self.answer(404, {"error": path})

    def commit(self, path: str, body: bytes) -> None:
        for row in map(json.loads, body.splitlines()):
            value = row["value"]
            if row["key"] == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                self.hub.files[value["path"]] = self.hub.stored[value["oid"]]
        repo = "/".join(path.split("/")[3:5])
        self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def do_GET(self) -> None:
        self.answer(404, {"error": self.path})


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """The library is told at import where the hub is; here it is told anew."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OurHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def finished(world, tmp_path) -> Path:
    """A final directory as training leaves it, checkpoints, logs and traces of a broken writing included."""
    directory = tmp_path / "run"
    shutil.copytree(world / "llama", directory)
    for name in ("checkpoint-3/model.safetensors", "checkpoint-3/optimizer.pt", ".writing/model.safetensors"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"state")
    for name in ("metrics.jsonl", "run_settings.json", "training_arguments.json", "curves.png", "report.html"):
        (directory / name).write_text("{}")
    (directory / "eval").mkdir()
    (directory / "eval" / "metrics.json").write_text("{}")
    (directory / "eval" / "answers.jsonl").write_text("{}")
    return directory


@pytest.mark.parametrize("private", [True, False])
def test_only_the_final_files_reach_the_hub(private, hub, finished, capsys):
    export.main(["--model_path", str(finished), "--push_to_hub", "me/model", *["--private"] * private])
    assert [(c["organization"], c["name"]) for c in hub.created] == [("me", "model")]
    assert ("private" in json.dumps(hub.created)) == private
    expected = final_files(finished)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "curves.png", "eval/metrics.json"} < set(
        expected
    )
    assert sorted(hub.files) == expected
    for name in expected:
        assert hashlib.sha256(hub.files[name]).digest() == hashlib.sha256((finished / name).read_bytes()).digest()
    assert f"{hub.url}/me/model ({len(expected)} files)" in capsys.readouterr().out


def test_what_was_written_is_what_is_uploaded(hub, world, tmp_path):
    (tmp_path / "README.md").write_text("not part of the model")
    (tmp_path / "other.gguf").write_text("not part of the model")
    arguments = ["--format", "gguf", "--output", f"{tmp_path}/m.gguf", "--push_to_hub", "me/model-gguf"]
    export.main(["--model_path", f"{world}/llama", *arguments])
    assert sorted(hub.files) == ["Modelfile", "README.md", "m.gguf"]
    assert hub.files["m.gguf"] == (tmp_path / "m.gguf").read_bytes()
    assert "llama-cli -m m.gguf" in hub.files["README.md"].decode()
    assert (tmp_path / "README.md").read_text() == "not part of the model"


def test_the_card_of_a_gguf_file_is_that_of_the_checkpoint_in_other_words(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlibrary_name: transformers\nlicense: apache-2.0\ntags:\n- qwen3\n---\n\n# dpo\n\nqwen3, 3M.\n\n## Use\n\n"
        "AutoModel\n\n## Training\n\n| steps | 50 |\n\n![curves](curves.png)\n\n## Limits\n\n- small\n"
    )
    card = gguf_card(tmp_path, "m.gguf", "Modelfile")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head == {"library_name": "gguf", "license": "apache-2.0", "tags": ["qwen3"]}
    assert "# m\n" in card and f"GGUF file of {tmp_path.name}" in card and "ollama create NAME -f Modelfile" in card
    assert "## Training\n\n| steps | 50 |\n\n## Limits" in card and card.endswith("## Limits\n\n- small\n")
    assert "AutoModel" not in card and "curves.png" not in card


@pytest.mark.parametrize(
    ("token", "constants", "repo", "words"),
    [
        ("", {}, "me/model", "no token of the hub; run `hf auth login` or set HF_TOKEN"),
        ("hf_wrong", {}, "me/model", "--push_to_hub me/model: .*401"),
        ("hf_secret", {"HF_HUB_OFFLINE": True}, "me/model", "HF_HUB_OFFLINE is set"),
        ("hf_secret", {"ENDPOINT": "http://127.0.0.1:9"}, "me/model", "--push_to_hub me/model: .*refused"),
        ("hf_secret", {}, "me/mo del", "--push_to_hub me/mo del: "),
    ],
)
def test_what_a_user_sees_when_the_upload_cannot_be(token, constants, repo, words, hub, finished, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(finished / "none"))  # not the tester's own
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    with pytest.raises(UserError, match=words) as caught:
        export.main(["--model_path", str(finished), "--push_to_hub", repo])
    assert "\n" not in str(caught.value)
    assert hub.files == {}


# --- coming in ----------------------------------------------------------------------------------------------


def as_an_older_library_wrote(directory: Path) -> None:
    """As transformers 4 left a directory: rope_theta and torch_dtype at the top level, buffers among the weights."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    config |= {"transformers_version": "4.40.0"}
    path.write_text(json.dumps(config))
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(4.0)
    if config["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def foreign(world: Path, case: str, directory: Path) -> tuple[Path, Path]:
    """A bf16 checkpoint twice: in several files by transformers itself, and as an older version wrote it."""
    model = AutoModelForCausalLM.from_pretrained(world / case, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(world / case)
    sharded, old = directory / "sharded", directory / "old"
    for path, options in ((sharded, {"max_shard_size": "20KB"}), (old, {})):
        model.save_pretrained(path, **options)
        tokenizer.save_pretrained(path)
    as_an_older_library_wrote(old)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    return sharded, old


@pytest.mark.parametrize("case", CASES)
def test_foreign_layouts_are_read_alike(case, world, tmp_path):
    expected = logits(AutoModelForCausalLM.from_pretrained(world / case, dtype=torch.bfloat16).float())
    contents = []
    for path in foreign(world, case, tmp_path):
        model = SmolForCausalLM.from_pretrained(path)
        assert model.dtype == torch.bfloat16 and model.config.rope_parameters["rope_theta"] == 1e4
        torch.testing.assert_close(logits(model.float()), expected, atol=1e-4, rtol=1e-4)
        export.main(f"--model_path {path} --format gguf --dtype bf16 --output {path}.gguf".split())
        contents.append({t.name: t.data.tobytes() for t in gguf.GGUFReader(f"{path}.gguf").tensors})
    assert contents[0] == contents[1]


@pytest.mark.parametrize("case", ["llama", "mixtral", *SLOW_CASES])
def test_a_foreign_checkpoint_is_a_base_model(case, world, tmp_path):
    first = []
    for path in foreign(world, case, tmp_path):
        train_pretrain.main(
            f"""--data_path {world}/text.jsonl --block_size 32 --per_device_train_batch_size 2 --max_steps 1
            --logging_steps 1 --weights_dtype fp32 --data_cache_dir {world}/cache --base_model {path}
            --output_dir {path}-out""".split()
        )
        first.append(json.loads(Path(f"{path}-out", "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert first[0] == first[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; supported: llama, qwen2, qwen3, mixtral, qwen3_moe"),
        ({"sliding_window": 16}, "sliding_window=16"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_other_architectures_are_refused_in_one_line(change, words, world, tmp_path):
    shutil.copytree(world / "mixtral", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as caught:
        train_pretrain.main(
            f"--data_path {world}/text.jsonl --base_model {tmp_path}/model --output_dir {tmp_path}/out".split()
        )
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=words.split(";")[0]):
        export.main(f"--model_path {tmp_path}/model --format gguf --output {tmp_path}/m.gguf".split())
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


def test_pickled_weights_are_refused(world, tmp_path):
    shutil.copytree(world / "llama", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UserError, match="no safetensors weights"):
        export.main(f"--model_path {tmp_path}/model --format gguf --output {tmp_path}/m.gguf".split())
