"""chat.py: its commands, continuing texts, and what it does when an answer breaks off."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import openai
import pytest
from transformers import PreTrainedTokenizerFast

import chat
from smolkit.clients import connected, named_source, parse_tools, stream_chat
from smolkit.doctor import read_sft
from smolkit.errors import UserError
from smolkit.openai_api import create_app
from smolkit.sampling import GenerationRequest, TokenEvent
from smolkit.serving import serving

from .conftest import WEATHER, ScriptedEngine

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "巴黎"}}\n</tool_call>'


@pytest.fixture
def typing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`typing("Hello", ("And?", action), ...)`: what the person types; an action runs just before its line."""

    def prepare(*lines: str | tuple[str, Callable[[], object]]) -> None:
        waiting = iter(lines)

        def typed(_: str) -> str:
            line = next(waiting, None)
            if line is None:
                raise EOFError
            if isinstance(line, tuple):
                line[1]()
                return line[0]
            return line

        monkeypatch.setattr("builtins.input", typed)

    return prepare


def asked(engine: ScriptedEngine) -> str:
    """The last prompt, with its control tokens."""
    return engine.tokenizer.decode(engine.requests[-1].prompt_ids)


def test_undo_and_retry(
    scripted: tuple[ScriptedEngine, openai.OpenAI], typing: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    engine, client = scripted
    engine.will_say("one")
    typing("First?", ("Second?", lambda: engine.will_say("two")), ("/retry", lambda: engine.will_say("three")))
    chat.main(["--base_url", str(client.base_url)])
    assert capsys.readouterr().out == "one\ntwo\nthree\n\n"
    assert asked(engine).count("Second?") == 1 and "one" in asked(engine) and "two" not in asked(engine)
    typing("First?", "/undo", "/undo", "/retry", "Second?")  # nothing left: nothing happens
    chat.main(["--base_url", str(client.base_url)])
    assert "First?" not in asked(engine)


def test_saved_conversations_are_training_data(
    scripted: tuple[ScriptedEngine, openai.OpenAI],
    typing: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """/tools, /system and /save; the file is a row that the fine-tuning scripts read."""
    engine, client = scripted
    tools, saved = tmp_path / "tools.json", tmp_path / "deep" / "saved.jsonl"
    tools.write_text(json.dumps([WEATHER]))
    engine.will_say(CALL)
    answered = ("sunny", lambda: engine.will_say("好天气。"))
    typing(f"/tools {tools}", "/system Be brief.", "Weather?", answered, f"/save {saved}")
    chat.main(["--base_url", str(client.base_url)])
    assert 'tool call: get_weather({"city": "巴黎"})' in capsys.readouterr().out
    (row,) = read_sft(saved)
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert row["tools"] == [WEATHER] and row["messages"][-1]["content"] == "好天气。"
    assert "# Tools" in asked(engine)

    typing(f"/tools {tools}", f"/save {tools}/x.jsonl", "/tools nowhere.json", "/tools", "/save", "Thanks")
    chat.main(["--base_url", str(client.base_url)])
    captured = capsys.readouterr()
    assert "x.jsonl: " in captured.err and "nowhere.json: No such file" in captured.err
    assert "commands:" in captured.out and "# Tools" not in asked(engine)  # taken away again


def test_texts_are_continued(
    scripted: tuple[ScriptedEngine, openai.OpenAI], typing: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    """--completion sends the text as it is, without template and history."""
    engine, client = scripted
    engine.will_say(" goes on")
    where = ["--base_url", str(client.base_url), "--completion"]
    chat.main([*where, "--prompt", "The process", "--max_length", "2", "--temperature", "0.5", "--seed", "7"])
    assert asked(engine) == "The process" and capsys.readouterr().out.startswith(" ")
    request = engine.requests[-1]
    assert (request.max_tokens, request.temperature, request.seed) == (2, 0.5, 7)
    typing("One", "Two")
    chat.main(where)
    assert asked(engine) == "Two"
    with pytest.raises(UserError, match="leave out --system"):
        chat.main([*where, "--prompt", "x", "--system", "Be kind."])


def test_bytes_that_are_no_text_are_one_line(
    scripted: tuple[ScriptedEngine, openai.OpenAI], root: Path, capsys: pytest.CaptureFixture
) -> None:
    """On the command line, and in a conversation, which goes on."""
    engine, client = scripted
    engine.will_say("fine")
    where = ["--base_url", str(client.base_url)]
    for flag in ("--prompt", "--system"):
        with pytest.raises(UserError, match=f"{flag}: character 2 is not UTF-8"):
            chat.main([*where, flag, os.fsdecode(b"a\xff")])
    command = [sys.executable, str(root / "chat.py"), *where]
    result = subprocess.run(command, input=b"a\xff\nHello!\n", capture_output=True, cwd=root, timeout=120)
    assert result.returncode == 0 and b"fine" in result.stdout
    assert result.stderr == b"error: your line: character 2 is not UTF-8: save or type it as UTF-8\n"


def test_an_answer_that_breaks_off_leaves_the_conversation_as_it_was(
    scripted: tuple[ScriptedEngine, openai.OpenAI],
    typing: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Ctrl-C in the middle of an answer; a server that refuses."""
    engine, client = scripted
    engine.will_say("never heard")

    def interrupted(*arguments: object, **options: object) -> object:
        yield next(iter(stream_chat(*arguments, **options)))
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream_chat", interrupted)
    typing("First?", ("Second?", lambda: (monkeypatch.setattr(chat, "stream_chat", stream_chat),
                                          engine.will_say("x"))),
           "word " * 20_000, "Third?")
    chat.main(["--base_url", str(client.base_url)])
    captured = capsys.readouterr()
    assert "First?" not in asked(engine) and "Second?" in asked(engine) and "word" not in asked(engine)
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: ") and "context" in line


def test_a_call_that_was_cut_off_is_not_kept(
    scripted: tuple[ScriptedEngine, openai.OpenAI],
    typing: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """No result is asked for, the conversation goes on, and what is saved can be trained on."""
    engine, client = scripted
    tools, saved = tmp_path / "tools.json", tmp_path / "saved.jsonl"
    tools.write_text(json.dumps([WEATHER]))
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par'
    engine.will_say(call, end=False)
    typing(
        "Weather?",
        ("And now?", lambda: engine.will_say("Sunny.")),
        ("Again?", lambda: engine.will_say(f"Look:\n{call}", end=False)),
        f"/save {saved}",
        ("Thanks", lambda: engine.will_say("ok")),
    )
    chat.main(["--base_url", str(client.base_url), "--tools", str(tools)])
    captured = capsys.readouterr()
    cut = 'tool call: get_weather({"city": "Par … cut off\n'
    assert captured.out == f"{cut}Sunny.\nLook:\n{cut}ok\n\n"
    assert captured.err == "error: the answer is a tool call that was cut off, and is not kept: raise --max_length\n"
    assert "Weather?" not in asked(engine) and '"Par' not in asked(engine) and "Look:" in asked(engine)
    (row,) = read_sft(saved)
    assert [message["content"] for message in row["messages"]] == ["And now?", "Sunny.", "Again?", "Look:"]
    with pytest.raises(UserError, match="raise --max_length"):
        engine.will_say(call, end=False)
        chat.main(["--base_url", str(client.base_url), "--tools", str(tools), "--prompt", "Weather?"])


def test_a_failure_in_the_stream_is_one_line(tokenizer: PreTrainedTokenizerFast) -> None:
    class Failing(ScriptedEngine):
        async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
            yield TokenEvent(self.tokenizer.encode("a")[0])
            raise RuntimeError("broken")

    with serving(create_app(Failing(tokenizer), tokenizer, "failing")) as url:
        with pytest.raises(UserError, match="refused: internal error"):
            chat.main(["--base_url", f"{url}/v1", "--prompt", "Hi"])


def test_the_newest_checkpoint_is_the_default(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no checkpoint under out/"):
        chat.main(["--prompt", "Hi"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").symlink_to(checkpoint)
    monkeypatch.setattr("smolkit.serving.newest_checkpoint", lambda: tmp_path / "out" / "mine")
    chat.main(["--prompt", "Hi", "--max_length", "3"])
    assert capsys.readouterr().out.endswith("\n")


def test_sources_and_tools() -> None:
    assert named_source("dpo=out/dpo") == ("dpo", "out/dpo")
    assert named_source("out/a=b/c") == (None, "out/a=b/c")
    assert named_source("http://host/v1?key=x") == (None, "http://host/v1?key=x")
    assert named_source("对=hf://a/b") == ("对", "hf://a/b")
    assert parse_tools(" \n") == [] and parse_tools(json.dumps([WEATHER])) == [WEATHER]
    with pytest.raises(UserError, match="not JSON"):
        parse_tools("[")
    with pytest.raises(UserError, match="no server answers"), connected("http://127.0.0.1:9/v1"):
        pass
