"""The page of app.py: two models side by side, answering the same prompt (Gradio 6).

Both halves of the page are the same `Side`, with a conversation of its own, so that answers never mix. The texts are
English or Chinese, as the browser prefers.
"""

import contextlib
import html
import itertools
import queue
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import gradio as gr
import openai

from smolkit.clients import Endpoint, Message, Reply, is_whole, parse_tools, stream_chat, stream_text
from smolkit.errors import UserError
from smolkit.token_view import probabilities_html

T = TypeVar("T")
TOP_LOGPROBS = 5
MAX_TOKENS = 4096
FRAME = 0.05  # seconds between two views of an answer that grows: a browser draws them slower than models answer
EXAMPLES = ("Hello!", "What is photosynthesis?", "你好！", "什么是光合作用？")

ENGLISH = {
    "intro": "Two models, one prompt. Point at a token to see how probable it was, and what else could have come.",
    "model": "Model",
    "conversation": "Conversation",
    "prompt": "Prompt",
    "prompt_hint": "Write to both models …",
    "send": "Send",
    "stop": "Stop",
    "clear": "Clear",
    "examples": "Examples",
    "settings": "Settings",
    "mode": "What to do with the prompt",
    "answer": "answer it (chat)",
    "continue": "continue the text (base models)",
    "system": "System prompt",
    "tools": "Tools (list of OpenAI tool objects, JSON)",
    "temperature": "Temperature (0: always the most probable token)",
    "top_p": "Top-p",
    "max_tokens": "Longest answer, in tokens",
    "seed": "Seed (empty: another answer each time)",
    "probabilities": "Token probabilities",
    "tokens": "Tokens of the last answer",
    "result": "The model calls this tool: play it, and type its result",
    "send_result": "Send result",
}
CHINESE = {
    "intro": "两个模型，同一个提示。把鼠标放在词元上，可以看到它的概率和其他候选。",
    "model": "模型",
    "conversation": "对话",
    "prompt": "提示",
    "prompt_hint": "写给两个模型……",
    "send": "发送",
    "stop": "停止",
    "clear": "清空",
    "examples": "例子",
    "settings": "设置",
    "mode": "怎样处理提示",
    "answer": "回答（对话）",
    "continue": "续写（基础模型）",
    "system": "系统提示",
    "tools": "工具（OpenAI 工具对象的 JSON 列表）",
    "temperature": "温度（0：总取概率最大的词元）",
    "top_p": "Top-p",
    "max_tokens": "回答的最大词元数",
    "seed": "随机种子（留空：每次不同）",
    "probabilities": "词元概率",
    "tokens": "最近回答的词元",
    "result": "模型调用了这个工具：请扮演它，输入结果",
    "send_result": "发送结果",
}
TEXTS = gr.I18n(en=ENGLISH, zh=CHINESE)
# Fonts of the system: the page loads nothing from elsewhere.
THEME = gr.themes.Default(
    font=["system-ui", "Noto Sans CJK SC", "sans-serif"],
    font_mono=["ui-monospace", "Noto Sans Mono CJK SC", "monospace"],
)
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}  # options of every event


@dataclass(frozen=True)
class Settings:
    """What both sides answer with, in the order of the page's controls."""

    mode: str  # "answer" or "continue"
    system: str
    tools: str
    temperature: float
    top_p: float
    max_tokens: float
    seed: float | None
    probabilities: bool

    def options(self) -> dict[str, Any]:
        """The settings in the API's names."""
        options: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p}
        options["max_tokens"] = int(self.max_tokens)
        if self.seed is not None:
            options["seed"] = int(self.seed)
        return options | {"top_logprobs": TOP_LOGPROBS if self.probabilities else None}


def build_page(
    endpoints: Sequence[Endpoint],
    *,
    tools: str = "",
    system: str = "",
    temperature: float = 0.0,
    examples: Sequence[str] = EXAMPLES,
) -> gr.Blocks:
    """The page over one or more models with different names; `tools` is JSON text. Launch it with `i18n=TEXTS`."""
    with gr.Blocks(title="SmolLM", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("# SmolLM")
        gr.Markdown(TEXTS("intro"))
        with gr.Row():
            sides = [Side(endpoints, number, id) for number, id in ((0, "left"), (-1, "right"))]
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(
                label=TEXTS("prompt"), placeholder=TEXTS("prompt_hint"), scale=8, max_lines=8, elem_id="prompt"
            )
            with gr.Column(scale=1, min_width=160):
                send = gr.Button(TEXTS("send"), variant="primary", elem_id="send")
                with gr.Row():
                    stop = gr.Button(TEXTS("stop"), size="sm", min_width=50, elem_id="stop")
                    clear = gr.Button(TEXTS("clear"), size="sm", min_width=50, elem_id="clear")
        gr.Examples([[text] for text in examples], [prompt], label=TEXTS("examples"), api_visibility="private")
        settings = _settings(tools, system, temperature)
        inputs = [component for side in sides for component in side.inputs]
        outputs = [component for side in sides for component in side.outputs]
        players = [side.player for side in sides]
        hidden = [gr.update(visible=False)] * len(players)

        def ask(prompt: str, *values: Any) -> Iterator[list[Any]]:
            """Empties the box and lets both sides answer."""
            yield ["", *hidden, *[gr.skip()] * len(outputs)]
            state, chosen = values[: len(inputs)], values[len(inputs) :]
            per_side = zip(*[iter(state)] * (len(inputs) // len(sides)), strict=True)
            streams = [side.ask(prompt, *own, *chosen) for side, own in zip(sides, per_side, strict=True)]
            for number, view in together(streams):
                views = [view if n == number else [gr.skip()] * len(sides[n].outputs) for n in range(len(sides))]
                yield [gr.skip(), *hidden, *itertools.chain(*views)]

        # One event for both: gradio runs the events of one click one after the other.
        asked = gr.on(
            [send.click, prompt.submit], ask, [prompt, *inputs, *settings], [prompt, *players, *outputs], **QUIET
        )
        # The box for a tool's result has an event of its own: of a stream's updates that the browser has not drawn yet,
        # Gradio (6.31) forgets what a later one leaves out, and on a slow machine the box never appeared.
        for side in sides:
            asked.then(side.waiting, side.conversation, side.call, **QUIET)
        running = [asked]
        for side in sides:
            sent, played = [side.send_result.click, side.result.submit], [side.result, *side.inputs, *settings]
            answered = gr.on(sent, side.play, played, [side.player, *side.outputs], **QUIET)
            answered.then(side.waiting, side.conversation, side.call, **QUIET)
            running.append(answered)
        for side in sides:
            emptied = [*side.call, *side.outputs]
            gr.on([clear.click, side.chatbot.clear], side.cleared, None, emptied, cancels=running, **QUIET)
            stop.click(side.waiting, side.conversation, side.call, cancels=running, **QUIET)
    return page.queue(default_concurrency_limit=8)


def _settings(tools: str, system: str, temperature: float) -> list[gr.Component]:
    """The controls, in the order of `Settings`."""
    modes = [(TEXTS("answer"), "answer"), (TEXTS("continue"), "continue")]
    with gr.Accordion(TEXTS("settings"), open=False, elem_id="settings"), gr.Row():
        with gr.Column():
            mode = gr.Radio(modes, value="answer", label=TEXTS("mode"), elem_id="mode")
            system_box = gr.Textbox(system, label=TEXTS("system"), lines=2, elem_id="system")
            tools_box = gr.Code(tools, language="json", label=TEXTS("tools"), lines=6, max_lines=14, elem_id="tools")
        with gr.Column():
            heat = gr.Slider(0, 2, temperature, step=0.05, label=TEXTS("temperature"), elem_id="temperature")
            top_p = gr.Slider(0.05, 1, 1.0, step=0.05, label=TEXTS("top_p"))
            length = gr.Slider(1, MAX_TOKENS, 256, step=1, label=TEXTS("max_tokens"))
            seed = gr.Number(None, label=TEXTS("seed"), precision=0, minimum=-(2**53), maximum=2**53)
            shown = gr.Checkbox(True, label=TEXTS("probabilities"), elem_id="probabilities")
    return [mode, system_box, tools_box, heat, top_p, length, seed, shown]


class Side:
    """One half of the page: a model, its conversation, its tokens, and the box for a tool's result."""

    def __init__(self, endpoints: Sequence[Endpoint], number: int, id: str) -> None:
        self.endpoints = {endpoint.name: endpoint for endpoint in endpoints}
        names = list(self.endpoints)
        with gr.Column(elem_id=id, min_width=360):
            self.model = gr.Dropdown(names, value=names[number], label=TEXTS("model"), interactive=len(names) > 1)
            self.chatbot = gr.Chatbot(
                label=TEXTS("conversation"), height=320, buttons=[], feedback_options=None, render_markdown=False
            )
            with gr.Group(visible=False) as self.player:
                self.result = gr.Textbox(label=TEXTS("result"), elem_id=f"{id}-result")
                self.send_result = gr.Button(TEXTS("send_result"), size="sm", elem_id=f"{id}-send-result")
            self.note = gr.Markdown(elem_id=f"{id}-note")
            with gr.Accordion(TEXTS("tokens"), elem_id=f"{id}-tokens"):
                self.panel = gr.HTML()
            self.conversation = gr.State([])
        self.inputs = [self.model, self.conversation]
        self.outputs = [self.chatbot, self.conversation, self.panel, self.note]
        self.call = [self.player, self.result]

    def ask(self, prompt: str, name: str, messages: list[Message], *settings: Any) -> Generator[list[Any], None, None]:
        """Answer a prompt; blank ones are left alone."""
        if prompt.strip():
            yield from self._answer([*messages, {"role": "user", "content": prompt}], name, Settings(*settings))
        else:
            yield [gr.skip()] * len(self.outputs)

    def play(self, result: str, name: str, messages: list[Message], *settings: Any) -> Generator[list[Any], None, None]:
        """Take a tool's result; when no call waits any more, the model goes on. Its box is hidden meanwhile."""
        call = waiting_calls(messages)[0]
        messages = [*messages, {"role": "tool", "tool_call_id": call["id"], "content": result}]
        views = iter([self._view(messages, Reply())])
        if not waiting_calls(messages):
            views = self._answer(messages, name, Settings(*settings))
        for view in views:
            yield [gr.update(visible=False), *view]

    def waiting(self, messages: list[Message]) -> list[Any]:
        """New values of `call`: the box for a result, where the conversation ends with a tool call."""
        calls = waiting_calls(messages)
        return [gr.update(visible=bool(calls)), gr.update(value="", info=called(calls[0]) if calls else None)]

    def cleared(self) -> list[Any]:
        """The empty conversation."""
        return [*self.waiting([]), *self._view([], Reply())]

    def _answer(self, messages: list[Message], name: str, settings: Settings) -> Iterator[list[Any]]:
        yield self._view(messages, Reply())
        try:
            reply, drawn = Reply(), 0.0
            for reply in self._replies(messages, name, settings):
                if time.monotonic() - drawn >= FRAME:
                    drawn = time.monotonic()
                    yield self._view([*messages, reply.message()], reply)
            yield self._view([*messages, reply.message()], reply)
        except (openai.APIError, UserError) as error:
            # Shown and then forgotten: the conversation stays as it was before the question.
            view = self._view(messages[:-1], Reply())
            view[0] = [*displayed(messages), _box("error · 错误", getattr(error, "message", None) or str(error))]
            yield view

    def _replies(self, messages: list[Message], name: str, settings: Settings) -> Iterator[Reply]:
        endpoint = self.endpoints[name]
        if settings.mode == "continue":
            return stream_text(endpoint, messages[-1]["content"], **settings.options())
        tools = parse_tools(settings.tools)
        return stream_chat(endpoint, messages, system=settings.system, tools=tools, **settings.options())

    def _view(self, messages: list[Message], reply: Reply) -> list[Any]:
        """New values of `outputs`."""
        return [displayed(messages), messages, probabilities_html(reply.tokens), summary(reply)]


def together(streams: Sequence[Generator[T, None, None]]) -> Iterator[tuple[int, T]]:
    """(number of the stream, value) as values come, from streams that run in threads of their own.

    Closing it closes them, each after its next value. The first exception ends all.
    """
    found: queue.Queue[tuple[int, T | None, Exception | None]] = queue.Queue()
    closed = threading.Event()

    def pump(number: int, stream: Generator[T, None, None]) -> None:
        try:
            with contextlib.closing(stream):
                for value in stream:
                    if closed.is_set():
                        return
                    found.put((number, value, None))
        except Exception as error:  # raised again where the values are read
            found.put((number, None, error))
        else:
            found.put((number, None, None))

    for number, stream in enumerate(streams):
        threading.Thread(target=pump, args=(number, stream), daemon=True).start()
    try:
        open_streams = len(streams)
        while open_streams:
            number, value, error = found.get()
            if error is not None:
                raise error
            if value is None:
                open_streams -= 1
            else:
                yield number, value
    finally:
        closed.set()


def waiting_calls(messages: Sequence[Message]) -> list[Message]:
    """Tool calls of the last assistant message that have no result yet; those that were cut off get none."""
    said = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not said or any(message["role"] == "user" for message in messages[said[-1] :]):
        return []
    answered = {message["tool_call_id"] for message in messages[said[-1] + 1 :]}
    calls = messages[said[-1]].get("tool_calls", [])
    return [call for call in calls if call["id"] not in answered and is_whole(call)]


def called(call: Message) -> str:
    """A tool call as people write it."""
    return f"{call['function']['name']}({call['function']['arguments']})"


def displayed(messages: Sequence[Message]) -> list[Message]:
    """The conversation as the chatbot shows it: tool calls and results are boxes with a title.

    The chatbot takes text for HTML. Escaped, it shows what the model wrote, and loads no picture that it names.
    """
    shown: list[Message] = []
    names: dict[str, str] = {}
    for message in messages:
        if message["role"] == "tool":
            shown.append(_box(f"result of {names[message['tool_call_id']]} · 工具结果", message["content"]))
            continue
        if message["content"] or not message.get("tool_calls"):
            shown.append({"role": message["role"], "content": html.escape(message["content"], quote=False)})
        for call in message.get("tool_calls", []):
            function = call["function"]
            names[call["id"]] = function["name"]
            shown.append(_box(f"tool call · 调用工具: {function['name']}", function["arguments"]))
    return shown


def _box(title: str, text: str) -> Message:
    content, title = html.escape(text, quote=False), html.escape(title, quote=False)
    return {"role": "assistant", "content": content, "metadata": {"title": title}}


def summary(reply: Reply) -> str:
    """How the reply ended, its length and speed."""
    if reply.finish_reason is None or reply.num_tokens is None:
        return ""
    speed = reply.num_tokens / reply.seconds if reply.seconds else 0.0
    return f"`finish_reason: {reply.finish_reason}` · {reply.num_tokens} tokens · {speed:.0f} tokens/s"


def launch(page: gr.Blocks, *, host: str | None, port: int | None, share: bool = False, wait: bool = True) -> str:
    """Serve the page, until Ctrl-C when `wait`; its address. `host` None: gradio's own choice, which a Space sets."""
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            i18n=TEXTS,
            theme=THEME,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            ssr_mode=False,
        )
    except OSError as error:
        raise UserError(f"cannot listen on port {port}: {error}; choose another --port") from None
    print(f"page at {url}", flush=True)
    if wait:
        page.block_thread()
    return url
