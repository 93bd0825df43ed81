"""The scripts as a person runs them: servers that start, answer and stop; the terminal chat; bad input."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from smol_model import SmolForCausalLM
from smolkit.chat import render

from .conftest import WEATHER, ScriptedEngine

Run = Callable[..., subprocess.CompletedProcess]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@contextmanager
def started(root: Path, *arguments: object) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server process on a free port; gives the URL it prints."""
    command = [sys.executable, str(root / str(arguments[0])), *map(str, arguments[1:]), "--port", "0"]
    environment = {**os.environ, **ONE_THREAD}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=root, env=environment)
    log = []
    try:
        for line in process.stderr:
            log.append(line)
            if found := re.search(r"serving at (http://\S+)/v1", line):
                yield found[1], process
                break
        else:
            pytest.fail("the server ended before it was ready:\n" + "".join(log))
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def served(root: Path, checkpoint: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """`serve_hf.py` over the tiny checkpoint."""
    with started(root, "serve_hf.py", "--model_path", checkpoint, "--dtype", "fp32") as server:
        yield server


def expected_answer(
    tokenizer: PreTrainedTokenizerFast, greedy: Callable[..., list[int]], text: str, n: int
) -> str:
    ids = render(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True).input_ids
    return tokenizer.decode(greedy(ids, n), skip_special_tokens=True)


def test_serve_hf_and_chat(
    served: tuple[str, subprocess.Popen],
    checkpoint: Path,
    tokenizer: PreTrainedTokenizerFast,
    greedy: Callable[..., list[int]],
    run_script: Run,
) -> None:
    """The server, chat.py talking to it, and chat.py with the checkpoint give transformers' greedy answer."""
    url, _ = served
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    assert client.models.list().data[0].id == checkpoint.name
    expected = expected_answer(tokenizer, greedy, "Hello!", 12)
    answer = client.chat.completions.create(
        model=checkpoint.name,
        messages=[{"role": "user", "content": "Hello!"}],
        max_tokens=12,
        temperature=0,
    )
    assert answer.choices[0].message.content == expected
    asked = ("--prompt", "Hello!", "--max_length", 12)
    for where in (("--base_url", f"{url}/v1"), ("--model_path", checkpoint, "--dtype", "fp32")):
        result = run_script("chat.py", *where, *asked, env={**ONE_THREAD, "PYTHONUTF8": "1"})
        assert result.stdout == (expected + "\n" if expected else "")


def test_conversation_in_the_terminal(
    root: Path, served: tuple[str, subprocess.Popen], tokenizer: PreTrainedTokenizerFast
) -> None:
    lines = "Hello!\n\n/help\n/system Be kind.\nAnd now?\n/reset\nHello!\n"  # ends by end of file
    command = [sys.executable, str(root / "chat.py"), "--base_url", f"{served[0]}/v1", "--max_tokens", "5"]
    result = subprocess.run(command, input=lines, capture_output=True, text=True, cwd=root, timeout=120)
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.count("you> ") == 8 and "commands: /reset" in result.stdout


def test_servers_stop_cleanly(root: Path, served: tuple[str, subprocess.Popen], run_script: Run) -> None:
    """Last user of the module's server: a taken port is one clear line; SIGTERM ends it with exit code 0."""
    url, process = served
    port = url.rsplit(":", 1)[1]
    result = run_script("serve_hf.py", "--model_path", root / "no-such", "--port", port, expect=2)
    assert "no such directory" in result.stderr
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_serve_an_adapter_as_it_lies(
    root: Path, checkpoint: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """An unmerged LoRA directory is served with its base; SIGINT stops; the key guards."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    base = SmolForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model = get_peft_model(
        base, LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    ).eval()
    model.peft_config["default"].base_model_name_or_path = str(checkpoint)
    model.save_pretrained(tmp_path / "lora")
    ids = torch.tensor([tokenizer.encode("The process")])
    suppress = list(range(len(tokenizer), base.config.vocab_size))
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=10,
        do_sample=False,
        suppress_tokens=suppress,
    )
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    flags = ("--dtype", "fp32", "--api_key", "secret", "--served_model_name", "mine", "--max_model_len", 64)
    with started(root, "serve_hf.py", "--model_path", tmp_path / "lora", *flags) as (url, process):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret")
        (card,) = client.models.list().data
        assert (card.id, card.max_model_len) == ("mine", 64)
        answer = client.completions.create(model="mine", prompt="The process", max_tokens=10, temperature=0)
        assert answer.choices[0].text == expected
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="other").models.list()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def test_bad_checkpoints(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One clear line each. In this process: importing PyTorch for every line would take minutes."""
    import serve_hf
    from smolkit.errors import run

    def refused(*arguments: object) -> str:
        with pytest.raises(SystemExit) as leaving:
            run(lambda: serve_hf.main([*map(str, arguments), "--port", "0"]))
        assert leaving.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        return line

    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in refused("--model_path", tmp_path / "empty")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((checkpoint / "config.json").read_text())
    assert "tokenizer_config.json is missing" in refused("--model_path", tmp_path / "bare")
    assert "256" in refused("--model_path", checkpoint, "--max_model_len", 5000)
    assert "not a PEFT adapter" in refused("--model_path", checkpoint, "--adapter", tmp_path / "empty")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"not a tensor file")
    assert "cannot be loaded" in refused("--model_path", broken)
    config = json.loads((checkpoint / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    assert "cannot be loaded" in refused("--model_path", broken)


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
    from smolkit.errors import UserError

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
