"""Chat in the terminal, with a checkpoint or with any OpenAI-compatible server.

    python chat.py --model_path out/quickstart/dpo
    python chat.py --model_path out/quickstart/dpo --prompt "Hello!" --max_length 256 --temperature 0.8
    python chat.py --base_url http://127.0.0.1:8000/v1 --prompt "Order it" --tools out/quickstart/data/exam/tools.json
    python chat.py --model_path out/quickstart/pretrain --completion --prompt "Nora is a"

The answer streams as it is made. Without --prompt it is a conversation: the model sees what was said before. A
tool call is printed as `tool call: name({"arg": ...})`, and you may play the tool by typing its result.
Ctrl-C stops an answer, Ctrl-D leaves; /help lists the commands.
"""

import argparse
import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai

from smolkit.clients import (
    Endpoint,
    Message,
    Reply,
    add_loading_arguments,
    connected,
    is_whole,
    read_tools,
    stream_chat,
    stream_text,
    without_cut_calls,
)
from smolkit.errors import UserError, run
from smolkit.files import atomic_writer

COMMANDS = """commands:
  /reset         forget the conversation
  /undo          forget the last exchange
  /retry         ask the last question again
  /system TEXT   change the system prompt (no text: none)
  /tools FILE    offer the tools of a JSON file (no file: none)
  /save FILE     write the conversation as one row of training data: {"messages": [...]}
  /exit          leave"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--model_path",
        help="checkpoint or adapter directory to load here, or hf://OWNER/NAME; default: the newest in out/, output/",
    )
    where.add_argument("--base_url", help="an OpenAI-compatible server, such as http://127.0.0.1:8000/v1")
    parser.add_argument(
        "--api_key",
        default=os.environ.get("SMOLLM_API_KEY", "none"),
        help="key for --base_url; environment variable SMOLLM_API_KEY hides it from other users",
    )
    parser.add_argument("--model", help="model name for --base_url; default: the server's first")
    parser.add_argument("--adapter", help="PEFT adapter directory for --model_path")
    add_loading_arguments(parser)
    parser.add_argument("--prompt", help="ask once, print the answer, leave")
    parser.add_argument("--completion", action="store_true", help="continue texts instead of answering; no history")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--tools", help="JSON file with a list of OpenAI tool objects")
    parser.add_argument(
        "--max_length",
        "--max_tokens",
        dest="max_tokens",
        type=int,
        default=512,
        help="longest answer, in tokens",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int)
    args = parser.parse_args(argv)
    if args.completion and (args.system or args.tools):
        raise UserError("--completion continues a text as it is: leave out --system and --tools")
    for flag in ("prompt", "system"):
        _require_text(getattr(args, flag) or "", f"--{flag}")
    return args


def _require_text(text: str, where: str) -> None:
    """`UserError` for bytes that are not UTF-8: Python reads each as half a surrogate pair, which nobody can send."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: character {error.start + 1} is not UTF-8: save or type it as UTF-8") from None


def ask(question: str) -> str:
    """A line that the person types; `UserError` as `_require_text`."""
    line = input(question)
    _require_text(line, "your line")
    return line


class Chat:
    """One conversation."""

    def __init__(self, endpoint: Endpoint, args: argparse.Namespace) -> None:
        self.endpoint, self.args, self.system = endpoint, args, args.system
        self.tools = read_tools(args.tools) if args.tools else []
        self.messages: list[Message] = []
        self.options: dict[str, Any] = {
            "max_tokens": args.max_tokens,
            "temperature": args.temperature,
            "top_p": args.top_p,
        }
        if args.seed is not None:
            self.options["seed"] = args.seed

    def answer(self) -> Message:
        """Stream the reply to the conversation so far onto stdout, and return it as a message."""
        reply = show(stream_chat(self.endpoint, self.messages, system=self.system, tools=self.tools, **self.options))
        for call in reply.tool_calls:
            end = ")" if is_whole(call) else " … cut off"
            print(f"tool call: {call['function']['name']}({call['function']['arguments']}{end}")
        message = without_cut_calls(reply.message())
        if reply.tool_calls and not (message["content"] or message.get("tool_calls")):
            raise UserError("the answer is a tool call that was cut off, and is not kept: raise --max_length")
        return message

    def once(self, text: str) -> None:
        """One answer, or one continuation of the text."""
        if self.args.completion:
            show(stream_text(self.endpoint, text, **self.options))
        else:
            self.messages.append({"role": "user", "content": text})
            self.messages.append(self.answer())

    def exchange(self, text: str) -> None:
        """One turn: the person's text, the answer, and tool results as long as the person gives them.

        If it is broken off, the conversation is left as it was before.
        """
        before = len(self.messages)
        try:
            self.once(text)
            while calls := self.messages and self.messages[-1].get("tool_calls"):
                results = []
                for call in calls:
                    result = ask(f"result of {call['function']['name']} (empty: none)> ")
                    if result:
                        results.append({"role": "tool", "tool_call_id": call["id"], "content": result})
                if not results:
                    return
                self.messages += results
                self.messages.append(self.answer())
        except BaseException:
            del self.messages[before:]
            raise

    def undo(self) -> str | None:
        """Take the last exchange back; its question, or None when nothing was said."""
        asked = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            return None
        text = self.messages[asked[-1]]["content"]
        del self.messages[asked[-1] :]
        return text

    def command(self, line: str) -> bool:
        """Run a /command; False when the person wants to leave."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/exit", "/quit"):
            return False
        if name == "/reset":
            self.messages.clear()
        elif name == "/system":
            self.system = rest or None
        elif name == "/tools":
            self.tools = read_tools(rest) if rest else []
        elif name == "/save" and rest:
            self.save(rest)
        elif name in ("/undo", "/retry"):
            text = self.undo()
            if name == "/retry" and text is not None:
                self.exchange(text)
        else:
            print(COMMANDS)
        return True

    def save(self, path: str) -> None:
        """Write the conversation in the format of data/README.md, so that it can be trained on or looked at again."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        row: dict[str, Any] = {"messages": [*system, *self.messages]}
        if self.tools:
            row["tools"] = self.tools
        try:
            with atomic_writer(Path(path)) as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None


def show(replies: Iterator[Reply]) -> Reply:
    """Print a reply while it grows; the whole of it."""
    reply, shown = Reply(), 0
    for reply in replies:
        print(reply.content[shown:], end="", flush=True)
        shown = len(reply.content)
    if reply.content:
        print()
    return reply


def converse(chat: Chat) -> None:
    """Read, answer, repeat."""
    try:
        import readline  # noqa: F401 - gives input() line editing and history where the platform has it
    except ImportError:
        pass
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # wrong bytes are `ask`'s to complain about, not a traceback
    while True:
        try:
            line = ask("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        try:
            if line.startswith("/") and not chat.command(line):
                return
            if line and not line.startswith("/"):
                chat.exchange(line)
        except (EOFError, KeyboardInterrupt):
            print()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except openai.APIError as error:
            print(f"error: {error.message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """Connect, then answer once or converse."""
    args = parse(argv)
    logging.basicConfig(level=logging.WARNING)
    source = args.base_url or args.model_path
    if source is None:
        from smolkit.serving import newest_checkpoint  # PyTorch, which talking to a server does not need

        source = str(newest_checkpoint())
    where = dict(model=args.model, api_key=args.api_key, adapter=args.adapter, dtype=args.dtype, device=args.device)
    try:
        with connected(source, **where) as endpoint:
            chat = Chat(endpoint, args)
            if args.prompt is None:
                converse(chat)
            else:
                chat.once(args.prompt)
    except openai.APIConnectionError:
        raise UserError(f"the server at {source} does not answer any more") from None
    except openai.APIError as error:
        raise UserError(f"the server refused: {error.message}") from None
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    run(main)
