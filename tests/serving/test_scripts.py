"""The scripts as a person runs them: servers that start, answer and stop; the terminal chat; bad input."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from smol_model import SmolForCausalLM
from smolkit.chat import render
from smolkit.errors import UserError
from smolkit.serving import newest_checkpoint

from .conftest import WEATHER, ScriptedEngine, started


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
    flags = ["--dtype", "fp32", "--prompt", "Hello!", "--max_length", "12"]
    chat.main(["--model_path", str(checkpoint), *flags])
    assert capsys.readouterr().out == expected + "\n"


def test_bad_checkpoints(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One clear line each. In this process: importing PyTorch for every line would take minutes."""
    import serve_hf
    from smolkit.errors import run

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
    assert "not a PEFT adapter" in refused("--model_path", checkpoint, "--adapter", tmp_path / "empty")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in refused("--model_path", checkpoint, "--port", port)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"not a tensor file")
    assert "cannot be loaded" in refused("--model_path", broken)
    config = json.loads((checkpoint / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    assert "cannot be loaded" in refused("--model_path", broken)


def test_serve_vllm_refuses(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    """What it cannot do yet, by name; and how to get vLLM where it is missing."""
    import serve_vllm

    for method in ("int8", "int4"):
        with pytest.raises(UserError, match=f"{method}: this version cannot quantise"):
            serve_vllm.main(["--quantization", method])
    with pytest.raises(UserError, match="unmerged adapter"):
        serve_vllm.main(["--model_path", str(adapter)])
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(UserError, match="requirements-vllm"):
            serve_vllm.main(["--model_path", str(checkpoint), "--port", "0"])
    args, rest = serve_vllm.parse(["--tensor_parallel_size", "4", "--enforce_eager", "--port", "1"])
    assert rest == ["--enforce_eager", "--tensor_parallel_size", "4"] and args.port == 1


def test_newest_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint under"):
        newest_checkpoint(tmp_path)
    for age, name in ((100, "old"), (10, "new"), (50, "older")):
        shutil.copytree(checkpoint, tmp_path / "run" / name)
        moment = time.time() - age
        os.utime(tmp_path / "run" / name / "config.json", (moment, moment))
    assert newest_checkpoint(tmp_path) == tmp_path / "run" / "new"


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
