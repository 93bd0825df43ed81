"""app.py: the page's parts, the page in a real browser, and the copy of it that a Hugging Face Space runs."""

import ast
import asyncio
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path

import gradio as gr
import openai
import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from transformers import PreTrainedTokenizerFast

import app
from smolkit.app_view import CHINESE, ENGLISH, Settings, Side, build_page, displayed, launch, waiting_calls
from smolkit.clients import Endpoint, Token, connected
from smolkit.errors import UserError
from smolkit.openai_api import create_app
from smolkit.sampling import GenerationRequest, TokenEvent
from smolkit.serving import serving
from smolkit.token_view import mask_html, probabilities_html

from .conftest import ScriptedEngine

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "巴黎"}}\n</tool_call>'
TOOLS = '[{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]'
SETTINGS = ("answer", "", "", 0.0, 1.0, 200, None, True)


class Likely(ScriptedEngine):
    """Says what it is told, each token with probability 1/2 and the end of text as its alternative (1/4)."""

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        async for event in super().generate(request):
            top = ((event.token_id, -0.693147), (self.tokenizer.encode("x")[0], -1.386294))
            yield TokenEvent(event.token_id, -0.693147, top, event.finish_reason)


@pytest.fixture
def likely(tokenizer: PreTrainedTokenizerFast) -> Iterator[list[tuple[Likely, Endpoint]]]:
    """Two servers whose answers the test chooses."""
    with ExitStack() as stack:
        pairs = []
        for name in ("one", "two"):
            engine = Likely(tokenizer)
            url = stack.enter_context(serving(create_app(engine, tokenizer, name)))
            pairs.append((engine, stack.enter_context(connected(f"{url}/v1"))))
        yield pairs


# --- parts --------------------------------------------------------------------------------------------------


def test_both_languages_have_every_text() -> None:
    assert ENGLISH.keys() == CHINESE.keys() and all(ENGLISH.values()) and all(CHINESE.values())


def test_tokens_are_shown_with_their_alternatives() -> None:
    tokens = [Token("<b>", 0.5, [("<b>", 0.5), ("a\n", 0.25)]), Token(" q", 0.01, [("a", 0.9)])]
    page = probabilities_html(tokens)
    assert "<b>&lt;" not in page and page.count("&lt;b&gt;") == 3  # label, text and alternative, never a tag
    assert "hsla(60, 75%" in page and "hsla(1, 75%" in page
    assert "a⏎</span><b>25.0%" in page
    assert '<span class=chosen>·q</span><b>1.0%' in page  # sampled from outside of the most probable
    assert probabilities_html([]) == ""
    mask = mask_html(["Hi", "\n"], [0, 1])
    assert re.search(r"transparent\">Hi</span>.*140, 70%.*\">⏎</span><br>", mask)


def side(endpoints: list[Endpoint]) -> Side:
    with gr.Blocks():
        return Side(endpoints, 0, "left")


def test_an_answer_grows_and_is_remembered(
    likely: list[tuple[Likely, Endpoint]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (engine, endpoint), _ = likely
    engine.will_say("光合 and light")
    with monkeypatch.context() as slow:
        slow.setattr("smolkit.app_view.FRAME", 1e9)
        views = list(side([endpoint]).ask("What?", "one", [], *SETTINGS))
        assert len(views) <= 4 and views[-1][0][-1]["content"] == "光合 and light"  # the end is shown in any case
    monkeypatch.setattr("smolkit.app_view.FRAME", 0.0)
    views = list(side([endpoint]).ask("What?", "one", [], *SETTINGS))
    lengths = [len(view[0][-1]["content"]) if len(view[0]) > 1 else 0 for view in views]
    assert lengths == sorted(lengths) and len(set(lengths)) > 3  # streamed
    shown, messages, panel, note = views[-1]
    assert messages == [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "光合 and light"}]
    assert shown == messages and "50.0%" in panel and "25.0%" in panel
    assert note.startswith("`finish_reason: stop`") and f"{len(engine.reply)} tokens" in note
    list(side([endpoint]).ask("And?", "one", messages, *SETTINGS))
    assert "光合 and light" in engine.tokenizer.decode(engine.requests[-1].prompt_ids)
    (same,) = side([endpoint]).ask("  ", "one", messages, *SETTINGS)
    assert all(value == gr.skip() for value in same)


def test_settings_reach_the_engine(likely: list[tuple[Likely, Endpoint]]) -> None:
    (engine, endpoint), _ = likely
    engine.will_say("x")
    values = ("answer", "Be kind.", TOOLS, 0.5, 0.9, 7, 3, False)
    *_, last = side([endpoint]).ask("Hi", "one", [], *values)
    request = engine.requests[-1]
    assert (request.temperature, request.top_p, request.max_tokens, request.seed) == (0.5, 0.9, 7, 3)
    assert request.logprobs is None and last[2] == ""
    prompt = engine.tokenizer.decode(request.prompt_ids)
    assert "Be kind." in prompt and "get_weather" in prompt
    values = ("continue", "Be kind.", TOOLS, 0.5, 0.9, 7, None, True)
    *_, last = side([endpoint]).ask("Hi", "one", [], *values)
    assert engine.tokenizer.decode(engine.requests[-1].prompt_ids) == "Hi" and "50.0%" in last[2]


def test_a_tool_call_waits_for_its_result(likely: list[tuple[Likely, Endpoint]]) -> None:
    (engine, endpoint), _ = likely
    engine.will_say(CALL + "\n" + CALL.replace("巴黎", "Rome"))
    half, settings = side([endpoint]), (*SETTINGS[:2], TOOLS, *SETTINGS[3:])
    *_, (shown, messages, _, note) = half.ask("Weather?", "one", [], *settings)
    player, box = half.waiting(messages)
    assert [entry["metadata"]["title"] for entry in shown[1:]] == ["tool call · 调用工具: get_weather"] * 2
    assert shown[1]["content"] == '{"city": "巴黎"}' and "tool_calls" in note
    assert player["visible"] and box["info"] == 'get_weather({"city": "巴黎"})'
    ((player, shown, messages, _, _),) = half.play("sunny", "one", messages, *settings)
    assert not player["visible"]
    player, box = half.waiting(messages)
    assert player["visible"] and box["info"] == 'get_weather({"city": "Rome"})'  # one call after the other
    engine.will_say("Sun and rain.")
    *_, (player, shown, messages, _, _) = half.play("rain", "one", messages, *settings)
    assert not player["visible"] and not half.waiting(messages)[0]["visible"]
    assert shown[-1]["content"] == "Sun and rain."
    prompt = engine.tokenizer.decode(engine.requests[-1].prompt_ids)
    assert prompt.index("sunny") < prompt.index("\nrain\n</tool_response>")
    assert waiting_calls([*messages[:2], {"role": "user", "content": "never mind"}]) == []
    half_written = {"id": "1", "function": {"name": "get_weather", "arguments": '{"city": "巴'}}
    player, box = half.waiting([{"role": "assistant", "content": "", "tool_calls": [half_written]}])
    assert not player["visible"] and box["info"] is None  # stopped there
    assert displayed(messages)[3]["metadata"]["title"] == "result of get_weather · 工具结果"


def test_a_call_that_was_cut_off_does_not_end_the_conversation(likely: list[tuple[Likely, Endpoint]]) -> None:
    """It is shown, and left out of what the model sees again."""
    (engine, endpoint), _ = likely
    half, settings = side([endpoint]), (*SETTINGS[:2], TOOLS, *SETTINGS[3:])
    engine.will_say(CALL + '\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par', end=False)
    *_, (shown, messages, *_) = half.ask("Weather?", "one", [], *settings)
    assert shown[-1]["content"] == '{"city": "Par'
    player, box = half.waiting(messages)
    assert player["visible"] and box["info"] == 'get_weather({"city": "巴黎"})'
    engine.will_say("Sunny.")
    for views in (
        half.play("sunny", "one", messages, *settings),  # the whole one has its result, and the model goes on
        half.ask("Never mind.", "one", messages, *settings),
    ):
        assert list(views)[-1][-4][-1]["content"] == "Sunny."
        prompt = engine.tokenizer.decode(engine.requests[-1].prompt_ids)
        assert "巴黎" in prompt and '"Par' not in prompt
    engine.will_say('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par', end=False)
    *_, (_, messages, *_) = half.ask("Weather?", "one", [], *settings)
    assert not half.waiting(messages)[0]["visible"]
    engine.will_say("Sunny.")
    *_, (shown, *_) = half.ask("And now?", "one", messages, *settings)
    assert shown[-1]["content"] == "Sunny."


def test_refusals_are_shown_and_forgotten(likely: list[tuple[Likely, Endpoint]]) -> None:
    (engine, endpoint), _ = likely
    engine.will_say("x")
    for broken, reason in (
        ({"endpoint": Endpoint("one", endpoint.client, "none"), "tools": ""}, "does not exist"),
        ({"endpoint": endpoint, "tools": "{"}, "not JSON"),
        ({"endpoint": endpoint, "tools": '[{"type": "function"}]'}, "name"),
    ):
        settings = (*SETTINGS[:2], broken["tools"], *SETTINGS[3:])
        *_, (shown, messages, *_) = side([broken["endpoint"]]).ask("Hi", "one", [], *settings)
        assert shown[-1]["metadata"]["title"] == "error · 错误" and reason in shown[-1]["content"]
        assert messages == []
    assert Settings(*SETTINGS).options() == {"temperature": 0.0, "top_p": 1.0, "max_tokens": 200, "top_logprobs": 5}


def test_bad_arguments(likely: list[tuple[Likely, Endpoint]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(likely[0][1].client.base_url)
    with pytest.raises(UserError, match="two models are named 'one'"):
        app.main(["--models", url, f"one={url}"])
    with pytest.raises(UserError, match="no server answers"):
        app.main(["--models", "http://127.0.0.1:9/v1"])
    with pytest.raises(UserError, match="no such directory"):
        app.main(["--models", f"a={tmp_path / 'nothing'}"])
    with pytest.raises(UserError, match="none.json"):
        app.main(["--models", url, "--tools", str(tmp_path / "none.json")])
    with monkeypatch.context() as without:
        without.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match="pip install -r requirements-app.txt"):
            app.main(["--models", url])
    monkeypatch.setenv("SMOLLM_MODELS", f"a={tmp_path}/x  http://127.0.0.1:9/v1")
    assert app.sources(None) == [f"a={tmp_path}/x", "http://127.0.0.1:9/v1"] and app.sources(["b"]) == ["b"]
    monkeypatch.delenv("SMOLLM_MODELS")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no checkpoint under out/"):
        app.sources(None)


def test_models_of_the_hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hf://OWNER/NAME is fetched by the hub's own client; what it cannot fetch is named."""
    import huggingface_hub

    with pytest.raises(UserError, match="hf://nobody/nothing: cannot be downloaded"), connected("hf://nobody/nothing"):
        pass  # the tests are offline
    with pytest.raises(UserError, match="cannot be downloaded"), connected("hf://a/b/c/d"):
        pass
    asked = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with connected("hf://owner/name", dtype="fp32") as endpoint:
        assert endpoint.name == "name" and endpoint.client.models.list().data[0].id == "local"
        with pytest.raises(openai.AuthenticationError):  # nobody else on this machine can use it
            openai.OpenAI(base_url=endpoint.client.base_url, api_key="none").models.list()
    assert asked == [("owner/name", ["*.json", "*.jinja", "*.safetensors"])]


# --- in the browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium: playwright's own, or the system's."""
    expect.set_options(timeout=60_000)  # for busy machines
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = own if Path(own).exists() else shutil.which("chromium") or shutil.which("google-chrome")
        if found is None:
            pytest.skip("no browser here: `playwright install chromium`, or Debian's `apt-get install chromium`")
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


def opened(browser: Browser, url: str, locale: str) -> tuple[Page, list[str]]:
    """The page as a person of that language sees it, and the addresses it asks for elsewhere."""
    page = browser.new_page(locale=locale, viewport={"width": 1280, "height": 1250})
    elsewhere: list[str] = []
    page.on("request", lambda request: request.url.startswith(url) or elsewhere.append(request.url))
    page.on("pageerror", lambda error: elsewhere.append(f"script error: {error}"))
    page.goto(url)
    expect(page.locator("#send")).to_be_visible()
    return page, elsewhere


def said(page: Page, half: str) -> Locator:
    """The conversation of one half, without the tokens below it."""
    return page.locator(f"#{half}").get_by_role("log")


def test_two_models_side_by_side(browser: Browser, likely: list[tuple[Likely, Endpoint]], tmp_path: Path) -> None:
    (one, _), (two, _) = likely
    gradio_page = build_page([endpoint for _, endpoint in likely], tools=TOOLS, examples=["Hello!", "你好！"])
    url = launch(gradio_page, host="127.0.0.1", port=None, wait=False)
    try:
        page, elsewhere = opened(browser, url, "en-US")
        left, right = page.locator("#left"), page.locator("#right")
        expect(left.locator("input").first).to_have_value("one")
        expect(right.locator("input").first).to_have_value("two")

        # On a slow machine, and although the other half goes on answering, the box for a tool's result appears.
        slow = page.context.new_cdp_session(page)
        slow.send("Emulation.setCPUThrottlingRate", {"rate": 6})
        one.will_say("Plants need light. <img src=x onerror=alert(1)>" + " So they grow." * 8)
        two.will_say(CALL)
        page.get_by_role("button", name="你好！").click()
        expect(page.locator("#prompt textarea")).to_have_value("你好！")
        page.locator("#prompt textarea").fill("What is the weather in 巴黎?")
        page.locator("#send").click()
        expect(said(page, "left").get_by_text("Plants need light. <img src=x")).to_be_visible()  # text, never HTML
        expect(left.locator("img[src=x]")).to_have_count(0)
        expect(page.locator("#prompt textarea")).to_have_value("")

        token = left.locator(".token").nth(1)
        token.hover()
        expect(token.locator(".others")).to_be_visible()
        expect(token.locator(".others b").first).to_have_text("50.0%")
        expect(token.locator(".others b").nth(1)).to_have_text("25.0%")

        expect(said(page, "right").get_by_text("tool call · 调用工具: get_weather")).to_be_visible()
        expect(said(page, "right").get_by_text('{"city": "巴黎"}', exact=True)).to_be_visible()
        expect(page.locator("#left-result")).to_have_count(0)
        expect(page.locator("#right-result")).to_be_visible()
        page.screenshot(path=tmp_path / "call.png", full_page=True)
        two.will_say("It is sunny in Paris.")
        slow.send("Emulation.setCPUThrottlingRate", {"rate": 1})
        page.locator("#right-result textarea").fill("sunny")
        page.locator("#right-send-result").click()
        expect(said(page, "right").get_by_text("It is sunny in Paris.")).to_be_visible()
        expect(page.locator("#right-result")).to_have_count(0)
        assert "\nsunny\n" in two.tokenizer.decode(two.requests[-1].prompt_ids)
        assert len(one.requests) == 1  # the other half was left alone

        page.locator("#clear").click()
        expect(said(page, "left").get_by_text("Plants need light.")).to_have_count(0)
        expect(said(page, "right").get_by_text("It is sunny in Paris.")).to_have_count(0)
        one.will_say("Again.")
        page.locator("#prompt textarea").fill("Hello")
        page.keyboard.press("Enter")
        expect(said(page, "left").get_by_text("Again.")).to_be_visible()
        assert "weather in" not in one.tokenizer.decode(one.requests[-1].prompt_ids)  # really forgotten

        chinese, more = opened(browser, url, "zh-CN")
        expect(chinese.locator("#send")).to_have_text("发送")
        expect(chinese.get_by_text(CHINESE["intro"])).to_be_visible()
        assert elsewhere == more == []  # no fonts, scripts or counters from other hosts
    finally:
        gradio_page.close()


class Endless(Likely):
    """Goes on until it is told to stop, and remembers that it was."""

    stopped = 0

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        try:
            while True:
                await asyncio.sleep(0.05)
                yield TokenEvent(self.tokenizer.encode("a")[0], -0.693147)
        finally:
            self.stopped += 1


def test_answering_can_be_stopped(browser: Browser, tokenizer: PreTrainedTokenizerFast) -> None:
    """Stop ends the generation of both halves in the server too, and the answer so far stays."""
    engine = Endless(tokenizer)
    with serving(create_app(engine, tokenizer, "endless")) as server, connected(f"{server}/v1") as endpoint:
        gradio_page = build_page([endpoint])
        url = launch(gradio_page, host="127.0.0.1", port=None, wait=False)
        try:
            page, _ = opened(browser, url, "en-US")
            page.locator("#prompt textarea").fill("Hello")
            page.locator("#send").click()
            expect(page.locator("#left .token").nth(3)).to_be_attached()
            expect(page.locator("#right .token").nth(3)).to_be_attached()
            page.locator("#stop").click()
            deadline = time.monotonic() + 20
            while engine.stopped < 2 and time.monotonic() < deadline:
                page.wait_for_timeout(100)
            assert engine.stopped == 2
            expect(said(page, "left").get_by_text("aaa")).to_be_visible()
        finally:
            gradio_page.close()


def test_a_half_that_has_called_its_tool_goes_on_after_stop(
    browser: Browser, likely: list[tuple[Likely, Endpoint]], tokenizer: PreTrainedTokenizerFast
) -> None:
    (other, right) = likely[1]
    with serving(create_app(Endless(tokenizer), tokenizer, "endless")) as server, connected(f"{server}/v1") as left:
        gradio_page = build_page([left, right], tools=TOOLS)
        url = launch(gradio_page, host="127.0.0.1", port=None, wait=False)
        try:
            page, _ = opened(browser, url, "en-US")
            other.will_say(CALL)
            page.locator("#prompt textarea").fill("Weather?")
            page.locator("#send").click()
            expect(page.locator("#left .token").nth(3)).to_be_attached()
            expect(said(page, "right").get_by_text('{"city": "巴黎"}', exact=True)).to_be_visible()
            expect(page.locator("#right-result")).to_have_count(0)
            page.locator("#stop").click()
            other.will_say("It is sunny.")
            page.locator("#right-result textarea").fill("sunny")
            page.locator("#right-send-result").click()
            expect(said(page, "right").get_by_text("It is sunny.")).to_be_visible()
            expect(page.locator("#left-result")).to_have_count(0)
        finally:
            gradio_page.close()


# --- as a Space ---------------------------------------------------------------------------------------------


def space_imports(root: Path) -> set[str]:
    """Packages that `app.py` cannot do without in a Space, and where it loads checkpoints itself.

    Of app.py and what it calls directly every import counts, also inside functions; of what these import, those at the
    top: what is imported further inside belongs to training, or to formats that have a comment in the list.
    """
    packages: set[str] = set()
    entries = {root / name for name in ("app.py", "smolkit/clients.py", "smolkit/app_view.py")}
    seen: set[Path] = set()
    waiting = list(entries)
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree) if file in entries else tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                top = name.split(".")[0]
                if (found := root / f"{name.replace('.', '/')}.py").is_file():
                    waiting.append(found)
                elif top not in {*sys.stdlib_module_names, "smolkit", "smol_config", "smol_model", "smol_kernels"}:
                    packages.add(top)
    return packages


def test_a_space_installs_what_it_imports(root: Path) -> None:
    """Each package is listed, or required by one that is; and listed ones have the pins of requirements.txt."""

    def plain(name: str) -> str:
        return name.lower().replace("_", "-")

    def listed(lines: Iterable[str]) -> dict[str, str]:
        found = [re.match(r"([\w-]+)([^#\s]*)", line) for line in lines if "extra ==" not in line]
        return {plain(match[1]): match[2] for match in found if match}

    space = listed((root / "docs" / "space" / "requirements.txt").read_text().splitlines())
    ours = listed((root / "requirements.txt").read_text().splitlines())
    there = space.keys() | {name for package in space for name in listed(metadata.requires(package) or ())}
    owners = metadata.packages_distributions()
    assert [package for package in space_imports(root) if not set(map(plain, owners[package])) & there] == []
    assert space == {name: ours.get(name, pin) for name, pin in space.items()}


@pytest.mark.slow
def test_a_space_starts_without_arguments(root: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The files that the README copies are enough, and the models come from the environment."""
    for name in ("app.py", "smol_config.py", "smol_model.py", "smol_kernels.py"):
        shutil.copy(root / name, tmp_path)
    shutil.copytree(root / "smolkit", tmp_path / "smolkit")
    shutil.copytree(root / "docs" / "space", tmp_path, dirs_exist_ok=True)
    shutil.copytree(checkpoint, tmp_path / "models" / "mine")
    front = (tmp_path / "README.md").read_text().split("---")[1]
    assert "app_file: app.py" in front
    assert re.search(r"sdk_version: (\S+)", front)[1].split(".")[0] == gr.__version__.split(".")[0]
    environment = {**os.environ, "SMOLLM_MODELS": "models/mine", "OMP_NUM_THREADS": "1", "GRADIO_SERVER_PORT": "7999"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while "page at http://127.0.0.1:7999" not in (text := (tmp_path / "log").read_text()):
            assert process.poll() is None and time.monotonic() < deadline, text
            time.sleep(0.2)
    finally:
        process.terminate()
        process.wait(30)
