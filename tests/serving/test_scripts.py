"""The scripts as a person runs them: servers that start, answer and stop; the terminal chat; bad input."""

import asyncio
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import httpx
import openai
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from smol_model import SmolForCausalLM
from smolkit.chat import encode_text, render, save_tokenizer
from smolkit.engine import EngineError
from smolkit.errors import UserError
from smolkit.openai_api import create_app
from smolkit.quantize import check_vllm_kernels, quantize
from smolkit.sampling import GenerationRequest
from smolkit.serving import (
    listen,
    load_engine,
    load_tokenizer,
    newest_checkpoint,
    parse_loras,
    serving,
    split_adapter,
)

from .conftest import TEXT, VLLM_FLAGS, WEATHER, ScriptedEngine, started, tiny_config


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT directory as train_lora.py writes it, over the tiny checkpoint."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    base = SmolForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(checkpoint)
    directory = tmp_path_factory.mktemp("adapter") / "lora"
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def served(root: Path, adapter: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """`serve_hf.py` over the adapter as it lies, with its base model found by itself, and with a key."""
    flags = ("--dtype", "fp32", "--api_key", "secret", "--served_model_name", "mine", "--max_model_len", 128)
    with started(root, "serve_hf.py", "--model_path", adapter, *flags) as server:
        yield server


def test_serve_hf(
    served: tuple[str, subprocess.Popen], checkpoint: Path, adapter: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The greedy answer is that of `PeftModel.generate`; name, limit and key are the flags'."""
    from peft import PeftModel

    base = SmolForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode("The process")])
    output = PeftModel.from_pretrained(base, adapter).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=10,
        do_sample=False,
        suppress_tokens=list(range(len(tokenizer), base.config.vocab_size)),
    )
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    client = openai.OpenAI(base_url=f"{served[0]}/v1", api_key="secret")
    (card,) = client.models.list().data
    assert (card.id, card.max_model_len) == ("mine", 128)
    answer = client.completions.create(model="mine", prompt="The process", max_tokens=10, temperature=0)
    assert answer.choices[0].text == expected
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served[0]}/v1", api_key="other").models.list()


def test_conversation_in_the_terminal(root: Path, served: tuple[str, subprocess.Popen]) -> None:
    lines = "Hello!\n\n/help\n/system Be kind.\nAnd now?\n/reset\nHello!\n"  # ends by end of file
    flags = ["--base_url", f"{served[0]}/v1", "--api_key", "secret", "--max_tokens", "5"]
    command = [sys.executable, str(root / "chat.py"), *flags]
    result = subprocess.run(command, input=lines, capture_output=True, text=True, cwd=root, timeout=120)
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.count("you> ") == 8 and "/reset         forget" in result.stdout


def test_adapters_beside_the_model(
    checkpoint: Path, adapter: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Two adapters and the model itself in one batch, each with the greedy answer of PEFT or of the plain model."""
    from peft import PeftModel

    base = SmolForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    halved = tmp_path / "halved"
    shutil.copytree(adapter, halved)
    config = json.loads((halved / "adapter_config.json").read_text())
    (halved / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] / 2}))
    loras = parse_loras([f"skill={adapter}", f"other={halved}"], "base")
    engine = load_engine(checkpoint, tokenizer, model_name="base", dtype="fp32", loras=loras)
    prompt = tokenizer.encode("The process of photosynthesis")

    async def answer(name: str | None) -> list[int]:
        request = GenerationRequest(prompt, 16, 0.0, adapter=name)
        return [event.token_id async for event in engine.generate(request)]

    async def everybody() -> list[list[int]]:
        return await asyncio.gather(*map(answer, (None, "skill", "other", "skill")))

    try:
        answers = asyncio.run(everybody())
        assert tuple(engine.adapters) == ("skill", "other")
        with pytest.raises(ValueError, match="no adapter 'third'; there are: skill, other"):
            asyncio.run(answer("third"))
        with serving(create_app(engine, tokenizer, "base")) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
            assert [card.id for card in client.models.list().data] == ["base", "skill", "other"]
            fields: dict[str, Any] = dict(prompt=prompt, max_tokens=16, temperature=0, extra_body={"ignore_eos": True})
            by_name = {
                name: client.completions.create(model=name, **fields).choices[0].text
                for name in ("base", "skill", "other")
            }
    finally:
        engine.close()
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers[:3]]
    assert by_name == dict(zip(("base", "skill", "other"), texts, strict=True))
    ids, allowed = torch.tensor([prompt]), {"suppress_tokens": list(range(len(tokenizer), base.config.vocab_size))}

    def expected(model: torch.nn.Module) -> list[int]:
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False, **allowed}
        return model.generate(input_ids=ids, **options)[0, len(prompt) :].tolist()

    plain = expected(base)
    assert answers[0] == plain
    for number, directory in ((1, adapter), (2, halved)):
        again = SmolForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        assert answers[number] == expected(PeftModel.from_pretrained(again, directory)) != plain
    assert answers[3] == answers[1] != answers[2]


def test_adapters_that_cannot_be_served_beside_others(
    checkpoint: Path, adapter: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    for number, (change, message) in enumerate(
        (({"use_dora": True}, "DoRA"), ({"target_modules": ["q_proj"]}, "cannot be served"), ({"r": 4}, None))
    ):
        shutil.copytree(adapter, tmp_path / str(number))
        (tmp_path / str(number) / "adapter_config.json").write_text(json.dumps(config | change))
        loras = {"x": tmp_path / str(number)}
        if message is None:  # a wrong rank in the configuration only changes the scale
            load_engine(checkpoint, tokenizer, model_name="base", loras=loras).close()
            continue
        with pytest.raises(UserError, match=message):
            load_engine(checkpoint, tokenizer, model_name="base", loras=loras)
    torch.manual_seed(0)
    other = tmp_path / "other"
    SmolForCausalLM(tiny_config(len(tokenizer), hidden_size=64)).save_pretrained(other)
    with pytest.raises(UserError, match="made for another"):
        load_engine(other, tokenizer, model_name="base", loras={"x": adapter})


def test_server_stops_cleanly(served: tuple[str, subprocess.Popen]) -> None:
    """The last test with this server."""
    served[1].send_signal(signal.SIGTERM)
    assert served[1].wait(30) == 0


def test_chat_once_with_a_checkpoint(
    checkpoint: Path,
    tokenizer: PreTrainedTokenizerFast,
    greedy: Callable[..., list[int]],
    capsys: pytest.CaptureFixture,
) -> None:
    """chat.py with the checkpoint prints transformers' greedy answer."""
    import chat

    ids = render(tokenizer, [{"role": "user", "content": "Hello!"}], add_generation_prompt=True).input_ids
    expected = tokenizer.decode(greedy(ids, 12), skip_special_tokens=True)
    flags = ["--dtype", "fp32", "--device", "cpu", "--prompt", "Hello!", "--max_length", "12"]
    chat.main(["--model_path", str(checkpoint), *flags])
    assert capsys.readouterr().out == expected + "\n"


def test_bad_checkpoints(
    checkpoint: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clear line each. In this process: importing PyTorch for every line would take minutes."""
    import serve_hf
    from smolkit.errors import run

    for setting in ("logging.basicConfig", "smolkit.serving.log_access_to"):  # would stay for the tests that follow
        monkeypatch.setattr(setting, lambda *_, **options: None)

    def refused(*arguments: object) -> str:
        with pytest.raises(SystemExit) as leaving:
            run(lambda: serve_hf.main(["--port", "0", *map(str, arguments)]))
        assert leaving.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        return line

    assert "no such directory" in refused("--model_path", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in refused("--model_path", tmp_path / "empty")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((checkpoint / "config.json").read_text())
    assert "tokenizer_config.json is missing" in refused("--model_path", tmp_path / "bare")
    assert "512" in refused("--model_path", checkpoint, "--max_model_len", 5000)
    assert "--device gpu: " in refused("--model_path", checkpoint, "--device", "gpu")
    assert "not a PEFT adapter" in refused("--model_path", checkpoint, "--adapter", tmp_path / "empty")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in refused("--model_path", checkpoint, "--port", port)
    loading = listen("127.0.0.1", 0)  # a server that has come no further yet
    port = loading.getsockname()[1]
    assert f"127.0.0.1:{port}" in refused("--model_path", checkpoint, "--port", port)
    loading.close()
    cut = shutil.copytree(checkpoint, tmp_path / "cut")
    (cut / "generation_config.json").write_text('{"eos_token_id": [1')
    (cut / "model.safetensors").write_bytes(b"is not read")
    assert "generation_config.json: cannot be read: " in refused("--model_path", cut)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"not a tensor file")
    assert "cannot load the weights: " in refused("--model_path", broken)
    config = json.loads((checkpoint / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    assert "cannot load the weights: " in refused("--model_path", broken)
    (broken / "tokenizer.json").write_text("{")
    assert "the tokenizer cannot be loaded: " in refused("--model_path", broken)
    shutil.copy(checkpoint / "tokenizer.json", broken)
    (broken / "chat_template.jinja").unlink()
    assert "the tokenizer has no chat template" in refused("--model_path", broken)
    with pytest.raises(UserError, match="is an adapter itself: give the base model as --model_path"):
        split_adapter(adapter, str(adapter))
    nameless = shutil.copytree(adapter, tmp_path / "nameless")
    settings = json.loads((nameless / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    assert "does not name its base model" in refused("--model_path", nameless)


def test_only_safetensors_are_read(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    """Anything else is pickled Python, in the model and in adapters, for both servers and for what else loads here."""
    from smolkit.checkpoints import build_model, load_config
    from smolkit.checkpoints import load_tokenizer as tokenizer_of

    pickled = shutil.copytree(checkpoint, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(SmolForCausalLM.from_pretrained(checkpoint).state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no weights as \*\.safetensors"):
        split_adapter(pickled, None)
    tokenizer = load_tokenizer(checkpoint)
    with pytest.raises(UserError, match="cannot load the weights: .*safetensors"):
        load_engine(pickled, tokenizer, model_name="x")
    with pytest.raises(UserError, match="cannot load the weights: .*safetensors"):
        build_model(load_config(checkpoint, tokenizer_of(checkpoint), checkpoint), pickled, torch.float32)
    lora = shutil.copytree(adapter, tmp_path / "lora")
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    for load in (lambda: split_adapter(checkpoint, str(lora)), lambda: parse_loras([f"x={lora}"], "base")):
        with pytest.raises(UserError, match=r"no weights as \*\.safetensors"):
            load()


def test_code_that_a_tokenizer_names_is_not_run(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anybody asked: transformers would wait at the terminal for an answer."""
    from smolkit.checkpoints import load_tokenizer as tokenizer_of
    from smolkit.tokenizer import load_pretrained

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    named = shutil.copytree(checkpoint, tmp_path / "named")
    (named / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((named / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (named / "tokenizer_config.json").write_text(json.dumps(config))
    for load in (load_tokenizer, tokenizer_of, lambda directory: load_pretrained(str(directory))):
        with contextlib.suppress(UserError):  # or the tokenizer's file is enough
            load(named)
    assert not (tmp_path / "ran").exists()


def test_bad_flags_are_refused_before_anything_is_loaded(checkpoint: Path) -> None:
    import serve_hf
    import serve_vllm

    for script, flags in (
        (serve_hf, ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_cache_gib", "threads")),
        (serve_vllm, ("max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size", "gpu_memory_utilization")),
    ):
        for flag in flags:
            with pytest.raises(UserError, match=f"--{flag} 0.*: must be more than 0"):
                script.parse(["--model_path", str(checkpoint), f"--{flag}", "0"])
    with pytest.raises(UserError, match="--max_queue -1: must be 0 or more"):
        serve_hf.parse(["--max_queue", "-1"])
    assert serve_hf.parse(["--max_queue", "0", "--max_num_seqs", "1"]).max_queue == 0


def test_what_vllm_is_asked_and_says(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without vLLM: its modules are stand-ins that remember."""
    names = (
        "vllm vllm.config vllm.config.lora vllm.engine vllm.engine.arg_utils vllm.logprobs vllm.lora "
        "vllm.lora.request vllm.outputs vllm.platforms vllm.sampling_params vllm.utils vllm.utils.argparse_utils "
        "vllm.utils.cpu_resource_utils vllm.v1 vllm.v1.engine vllm.v1.engine.async_llm vllm.v1.engine.exceptions"
    )
    for name in names.split():
        monkeypatch.setitem(sys.modules, name, MagicMock())
    spec = importlib.util.spec_from_file_location("vllm_engine_over_stand_ins", root / "smolkit" / "vllm_engine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    engine = object.__new__(module.VllmEngine)
    engine._vocab_limit, engine._allowed, engine._spare, engine._most = 10, None, 3, 40

    def asked(**fields: Any) -> dict[str, Any]:
        engine._sampling_params(GenerationRequest([1], 4, **fields))
        return module.SamplingParams.call_args.kwargs

    # To vLLM seed -1 is none at all, and `top_k` has 32 bits.
    seeds = [asked(seed=seed)["seed"] for seed in (-1, 0, 7, 2**63 - 1, -(2**63))]
    assert seeds == [2**63 - 1, 0, 7, 2**63 - 1, 0] and asked()["seed"] is None
    assert [asked(top_k=top)["top_k"] for top in (0, 3, 2**70)] == [0, 3, 10]
    # As many more alternatives as there may be padded rows among them, where vLLM gives so many.
    assert [asked(logprobs=n, prompt_logprobs=n)["logprobs"] for n in (None, 0, 5, 39, 41)] == [None, 0, 8, 40, 41]
    assert asked(prompt_logprobs=5)["prompt_logprobs"] == 8
    engine._most = -1  # no limit
    assert asked(logprobs=39)["logprobs"] == 42

    def entry(rank: int) -> MagicMock:
        return MagicMock(rank=rank, logprob=-float(rank))

    scored = {3: entry(1), 12: entry(2), 4: entry(3), 9: entry(40)}  # 12 is a padded row, 9 was chosen
    request = GenerationRequest([1], 4, logprobs=3)
    output = MagicMock(token_ids=[9], finish_reason="length", logprobs=[scored])
    (event,) = module._events(MagicMock(outputs=[output]), request, 10)
    assert (event.logprob, event.top_logprobs, event.finish_reason) == (-40.0, ((3, -1.0), (4, -3.0)), "length")
    output.logprobs = [scored | {5: entry(4), 6: entry(5)}]  # five were asked for
    (event,) = module._events(MagicMock(outputs=[output]), request, 10)
    assert event.top_logprobs == ((3, -1.0), (4, -3.0), (5, -4.0))
    aborted = MagicMock(token_ids=[], finish_reason="abort", logprobs=None)
    with pytest.raises(EngineError, match="ended early: abort"):
        module._events(MagicMock(outputs=[aborted]), request, 10)
    flags = MagicMock()
    monkeypatch.setattr(module.AsyncEngineArgs, "add_cli_args", lambda parser: flags)
    module.engine_args([])
    defaults = {name: value for call in flags.set_defaults.call_args_list for name, value in call.kwargs.items()}
    assert defaults["load_format"] == "safetensors"


def test_serve_vllm_arguments(checkpoint: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours by name, everything else to vLLM as it is; what cannot work is refused; and how to get vLLM."""
    import serve_vllm

    flags = "--tensor_parallel_size 4 --gpu_memory_utilization 0.9 --max_num_batched_tokens 4096 --max_num_seqs 64"
    args, rest = serve_vllm.parse([*flags.split(), "--enforce_eager", "--port", "1", "--max_model_len", "2048"])
    assert rest == ["--enforce_eager", *flags.split(), "--max_model_len", "2048"] and args.port == 1
    # vLLM's own spelling of flags that are ours; its other flags, and values, stay as they are.
    dashes = "--served-model-name a-b --max-model-len=64 --enforce-eager --api-key s-e"
    args, rest = serve_vllm.parse(dashes.split())
    assert (args.served_model_name, args.api_key, args.max_model_len) == ("a-b", "s-e", 64)
    assert rest == ["--enforce-eager", "--max_model_len", "64"]
    assert serve_vllm.parse(["--quantization", "awq"])[1] == ["--quantization", "awq"]
    for method in ("int8", "int4"):  # ours: vLLM finds what we made by itself
        assert serve_vllm.parse(["--quantization", method])[1] == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert serve_vllm.parse(["--quantization", "fp8"])[1] == ["--quantization", "fp8"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="fp8 kernels for GPUs only"):
        serve_vllm.parse(["--quantization", "fp8"])
    with pytest.raises(UserError, match="in 16 bits only"):
        serve_vllm.parse(["--quantization", "int8", "--dtype", "float32"])
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx2": True})
    for method, reason in (("int8", "no VNNI"), ("int4", "AVX-512")):
        with pytest.raises(UserError, match=f"{method}.*{reason}.*serve_hf.py"):
            serve_vllm.main(["--model_path", str(checkpoint), "--quantization", method])
    for lora, message in (("x", "must be name=directory"), (f"x={checkpoint}", "not a PEFT adapter")):
        with pytest.raises(UserError, match=message):
            serve_vllm.main(["--model_path", str(checkpoint), "--lora", lora])
    with pytest.raises(UserError, match="is taken already"):
        serve_vllm.main(["--model_path", str(checkpoint), "--lora", f"{checkpoint.name}={adapter}"])
    if importlib.util.find_spec("vllm") is None:
        for directory in (checkpoint, adapter):
            with pytest.raises(UserError, match="requirements-vllm"):
                serve_vllm.main(["--model_path", str(directory), "--port", "0"])


def test_where_vllm_has_no_kernel_for_what_a_directory_holds(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that is quantised already is refused like the flag; other processors, GPUs and schemes are not."""
    quantize(checkpoint, tmp_path / "int8", "int8")
    known = {"architecture": "x86_64", "avx2": True, "avx512_f": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    with pytest.raises(UserError, match="int8: this CPU has no VNNI"):
        check_vllm_kernels(tmp_path / "int8", None)
    check_vllm_kernels(checkpoint, None)
    check_vllm_kernels(checkpoint, "int4")
    for more in ({"avx512_vnni": True}, {"avx_vnni": True}, {"architecture": "aarch64"}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda more=more: known | more)
        check_vllm_kernels(tmp_path / "int8", None)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_vllm_kernels(tmp_path / "int8", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (tmp_path / "int8" / "config.json").write_text(json.dumps(config))
    check_vllm_kernels(tmp_path / "int8", None)


def test_newest_checkpoint(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint under"):
        newest_checkpoint(tmp_path)
    for age, name in ((100, "old"), (10, "new"), (50, "older")):
        shutil.copytree(checkpoint, tmp_path / "run" / name)
        moment = time.time() - age
        os.utime(tmp_path / "run" / name / "config.json", (moment, moment))
    assert newest_checkpoint(tmp_path) == tmp_path / "run" / "new"
    shutil.copytree(adapter, tmp_path / "run" / "lora")
    (tmp_path / "run" / "lora" / "adapter_config.json").touch()
    assert newest_checkpoint(tmp_path) == tmp_path / "run" / "lora"


def test_chat_tools(
    scripted: tuple[ScriptedEngine, openai.OpenAI],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tool call is printed readably; in conversation the person plays the tool."""
    import chat

    engine, client = scripted
    engine.will_say('<tool_call>\n{"name": "get_weather", "arguments": {"city": "巴黎"}}\n</tool_call>')
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([WEATHER]))
    where = ["--base_url", str(client.base_url), "--tools", str(tools)]
    chat.main([*where, "--prompt", "Weather in Paris?"])
    assert capsys.readouterr().out == 'tool call: get_weather({"city": "巴黎"})\n'

    said = iter(["Weather?", "sunny", "/exit"])

    def typed(_: str) -> str:
        line = next(said)
        if line == "sunny":
            engine.will_say("It is sunny.")
        return line

    monkeypatch.setattr("builtins.input", typed)
    chat.main([*where, "--system", "Be brief."])
    assert capsys.readouterr().out.endswith("It is sunny.\n")
    prompt = engine.tokenizer.decode(engine.requests[-1].prompt_ids)
    assert "<tool_response>\nsunny\n</tool_response>" in prompt and "Be brief." in prompt


def test_chat_errors(tmp_path: Path, scripted: tuple[ScriptedEngine, openai.OpenAI]) -> None:
    import chat

    url = str(scripted[1].base_url)
    with pytest.raises(UserError, match="no server answers"):
        chat.main(["--base_url", "http://127.0.0.1:9/v1", "--prompt", "hi"])
    with pytest.raises(UserError, match="does not exist"):
        chat.main(["--base_url", url, "--model", "other", "--prompt", "hi"])
    (tmp_path / "tools.json").write_text("{")
    for path in (tmp_path / "tools.json", tmp_path / "none.json"):
        with pytest.raises(UserError, match=path.name):
            chat.main(["--base_url", url, "--tools", str(path), "--prompt", "hi"])
    with pytest.raises(UserError, match="no such directory"):
        chat.main(["--model_path", str(tmp_path / "nothing"), "--prompt", "hi"])


def needs_kernel(method: str) -> None:
    """Skip where serve_vllm.py refuses `method` for the sake of the processor."""
    try:
        check_vllm_kernels(Path(), method)
    except UserError as error:
        pytest.skip(str(error))


def documented_commands(root: Path, title: str) -> list[list[str]]:
    """The shell lines of a section of the README, as words."""
    section = (root / "README.md").read_text(encoding="utf-8").split(f"### {title}\n")[1].split("\n### ")[0]
    lines = section.split("```bash\n")[1].split("```")[0].splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["serve_hf.py", "serve_vllm.py"])
def test_documented_commands(
    root: Path,
    script: str,
    quantisable: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Every line of the README about the engines, with a tiny checkpoint in the place of the quickstart's."""
    from peft import LoraConfig, get_peft_model

    if script == "serve_vllm.py":
        request.getfixturevalue("vllm_python")
        needs_kernel("int4")
    monkeypatch.setenv("SMOLLM_CACHE", str(tmp_path / "cache"))
    base = SmolForCausalLM.from_pretrained(quantisable)
    wrapped = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    wrapped.peft_config["default"].base_model_name_or_path = str(quantisable)
    wrapped.save_pretrained(tmp_path / "lora")
    places = {"out/quickstart/sft": str(quantisable), "out/quickstart/lora": str(tmp_path / "lora")}
    commands = [words[1:] for words in documented_commands(root, "The two engines") if words[1] == script]
    assert len(commands) == 3
    for words in commands:
        for place, directory in places.items():
            words = [word.replace(place, directory) for word in words]
        words += ["--enforce_eager"] if script == "serve_vllm.py" else []
        with started(root, *words) as (url, _):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
            model = client.models.list().data[0].id
            assert client.completions.create(model=model, prompt="What", max_tokens=2).usage.completion_tokens > 0


# --- vLLM (`make test-all`, where it is installed) ----------------------------------------------------------


@pytest.fixture(scope="module")
def quantisable(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose layers are wide enough for int4."""
    torch.manual_seed(0)
    config = tiny_config(len(tokenizer), hidden_size=128, intermediate_size=256, initializer_range=0.2)
    directory = tmp_path_factory.mktemp("quantisable") / "wide"
    SmolForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.usefixtures("vllm_python")
def test_vllm_serves_quantised_directories(
    root: Path,
    quantisable: Path,
    tokenizer: PreTrainedTokenizerFast,
    method: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both servers score prompts like transformers, in float32, over the directory that serve_vllm.py makes.

    vLLM's quantised kernels compute in bf16 only: its log-probabilities scatter around those. Ours multiplies int8
    weights of small layers out and leaves activations as they are; transformers and vLLM round these, too.
    """
    needs_kernel(method)
    monkeypatch.setenv("SMOLLM_CACHE", str(tmp_path))
    sides = {"serve_vllm.py": ["--enforce_eager"], "serve_hf.py": ["--dtype", "fp32"]}
    prompts = TEXT[:3]
    answers = []
    for script, flags in sides.items():
        with started(root, script, "--model_path", quantisable, "--quantization", method, *flags) as (url, _):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
            options = {"model": quantisable.name, "max_tokens": 0, "echo": True, "logprobs": 0}
            choices = [client.completions.create(prompt=prompt, **options).choices[0] for prompt in prompts]
            answers.append([score for choice in choices for score in choice.logprobs.token_logprobs[1:]])
    (directory,) = (tmp_path / "quantized").iterdir()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected: list[float] = []
    for prompt in prompts:
        ids = encode_text(tokenizer, prompt)
        with torch.inference_mode():
            rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected += [float(row[i]) for row, i in zip(rows, ids[1:], strict=False)]
    values = torch.tensor([*answers, expected])
    vllm, ours = (values[:2] - values[2]).abs().mean(-1).tolist()
    assert len(expected) > 30 and values[2].std() > 1, "all alike would show nothing"
    assert vllm < 0.15 and ours < (0.001 if method == "int4" else 0.15), (vllm, ours)


@pytest.mark.slow
@pytest.mark.usefixtures("vllm_python")
def test_vllm_serves_adapters(root: Path, checkpoint: Path, adapter: Path) -> None:
    """Beside the model, and an unmerged directory as it lies: both servers answer alike."""
    answers: dict[str, list[str]] = {}
    sides = {"serve_vllm.py": ["--dtype", "float32", "--enforce_eager"], "serve_hf.py": ["--dtype", "fp32"]}
    for script, dtype in sides.items():
        for flags in (("--model_path", checkpoint, "--lora", f"skill={adapter}"), ("--model_path", adapter)):
            with started(root, script, *flags, *dtype) as (url, _):
                client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
                options = {"prompt": "The process", "max_tokens": 10, "temperature": 0}
                for model in [card.id for card in client.models.list().data]:
                    answer = client.completions.create(model=model, **options).choices[0].text
                    answers.setdefault(model, []).append(answer)
    plain, skill, own = (answers[name] for name in (checkpoint.name, "skill", adapter.name))
    assert plain[0] == plain[1] != skill[0] == skill[1] == own[0] == own[1]


@pytest.mark.slow
def test_vllm_that_cannot_start_says_why_in_one_line(root: Path, checkpoint: Path, vllm_python: str) -> None:
    command = [vllm_python, "serve_vllm.py", "--model_path", str(checkpoint), "--max_model_len", "5000", "--port", "0"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert last.startswith(f"error: vLLM cannot serve {checkpoint}: ") and "5000" in last


@pytest.mark.slow
@pytest.mark.usefixtures("vllm_python")
def test_vllm_server_ends_with_its_engine(root: Path, checkpoint: Path) -> None:
    """Instead of answering everything with an error for ever: whoever supervises it can start it anew."""
    with started(root, "serve_vllm.py", "--model_path", checkpoint, *VLLM_FLAGS) as (url, process):
        body = {"prompt": "The process", "max_tokens": 2}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 500
        assert process.wait(60) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("vllm_python")
def test_vllm_lets_answers_end_after_ctrl_c(root: Path, checkpoint: Path) -> None:
    """Ctrl-C signals all processes of the terminal's group at once; vLLM's own must not be among them."""
    with started(root, "serve_vllm.py", "--model_path", checkpoint, *VLLM_FLAGS) as (url, process):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="-")
        chunks = client.completions.create(
            model="tiny", prompt="The process", max_tokens=100, stream=True, extra_body={"ignore_eos": True}
        )
        next(chunks)
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        for each in (process.pid, *(child.pid for child in children)):
            if os.getpgid(each) == os.getpgid(process.pid):
                os.kill(each, signal.SIGINT)
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
        assert process.wait(60) == 0
        assert not psutil.wait_procs(children, timeout=10)[1]


@pytest.mark.slow
@pytest.mark.usefixtures("vllm_python")
def test_vllm_ends_with_a_server_that_is_killed(root: Path, checkpoint: Path) -> None:
    with started(root, "serve_vllm.py", "--model_path", checkpoint, *VLLM_FLAGS) as (_, process):
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        assert not psutil.wait_procs(children, timeout=60)[1]


PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

import serve_vllm
from smolkit.vllm_engine import engine_args

sizes = []
for words in json.loads(sys.argv[1]):
    if words[:2] == ["python", "serve_vllm.py"]:
        args, rest = serve_vllm.parse(words[2:])
        parsed = engine_args(["--model", args.model_path, *rest])
        sizes.append((parsed.tensor_parallel_size, parsed.pipeline_parallel_size, parsed.data_parallel_size))
    elif words[:2] == ["vllm", "serve"]:
        validate_parsed_serve_args(make_arg_parser(FlexibleArgumentParser()).parse_args(words[2:]))
    else:
        assert words[:2] == ["ray", "start"]
print("SIZES", json.dumps(sizes))
"""


@pytest.mark.slow
def test_vllm_accepts_the_documented_commands(root: Path, checkpoint: Path, vllm_python: str) -> None:
    """Every `serve_vllm.py` and vLLM command of the README about several GPUs and nodes, by their own parsers."""
    commands = documented_commands(root, "Several GPUs and nodes")
    # The parser takes a directory that does not exist for a name on the hub.
    commands = [[word.replace("out/dpo", str(checkpoint)) for word in words] for words in commands]
    arguments = [vllm_python, "-c", PARSE, json.dumps(commands)]
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=root, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("SIZES "))
    sizes = set(map(tuple, json.loads(line.removeprefix("SIZES "))))
    assert {(4, 1, 1), (1, 1, 4), (8, 2, 1)} <= sizes
