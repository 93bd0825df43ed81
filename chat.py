"""Chat in the terminal, with a checkpoint or with any OpenAI-compatible server.

    python chat.py --model_path out/quickstart/dpo
    python chat.py --model_path out/quickstart/dpo --prompt "Hello!" --max_length 256 --temperature 0.8
    python chat.py --base_url http://127.0.0.1:8000/v1 --prompt "What is 3 + 4?" --tools data/tools.json

The answer streams as it is made. Without --prompt it is a conversation: the model sees what was said before;
/reset forgets it, /system TEXT changes the system prompt, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer. A
tool call is printed as `tool call: name({"arg": ...})`, and you may play the tool by typing its result.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from smolkit.errors import UserError, run

Message = dict[str, Any]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model_path", help="checkpoint or PEFT adapter directory to load here")
    where.add_argument("--base_url", help="an OpenAI-compatible server, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--api_key", default="none", help="key for --base_url")
    parser.add_argument("--model", help="model name for --base_url; default: the server's first")
    parser.add_argument("--adapter", help="PEFT adapter directory for --model_path")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    parser.add_argument("--prompt", help="ask once, print the answer, leave")
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
    return parser.parse_args(argv)


def read_tools(path: str | None) -> list[dict[str, Any]]:
    """The tools of a file, checked."""
    if path is None:
        return []
    from smolkit.chat import validate_tools  # imports transformers: seconds that only tools need

    try:
        tools = json.loads(Path(path).read_text(encoding="utf-8"))
        validate_tools(tools)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # malformed JSON or tools; UserError is one too
        raise UserError(f"{path}: {error}") from None
    return tools


@contextmanager
def connected(args: argparse.Namespace) -> Iterator[openai.OpenAI]:
    """A client of the given server, or of a private one over the given checkpoint."""
    if args.base_url is not None:
        yield openai.OpenAI(base_url=args.base_url, api_key=args.api_key)
        return
    # Loaded only here: talking to a server needs no PyTorch.
    from smolkit.openai_api import create_app
    from smolkit.runtime import prepare
    from smolkit.serving import load_engine, load_tokenizer, serving, split_adapter, stop_ids_of

    prepare(seed=None)
    directory, adapter = split_adapter(args.model_path, args.adapter)
    tokenizer = load_tokenizer(directory)
    engine = load_engine(directory, tokenizer, model_name="local", dtype=args.dtype, adapter=adapter)
    app = create_app(engine, tokenizer, "local", stop_ids=stop_ids_of(directory, tokenizer))
    try:
        with serving(app) as url:
            yield openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    finally:
        engine.close()


class Chat:
    """One conversation."""

    def __init__(self, client: openai.OpenAI, args: argparse.Namespace) -> None:
        self.client, self.args, self.system = client, args, args.system
        self.tools = read_tools(args.tools)
        self.model = args.model or client.models.list().data[0].id
        self.messages: list[Message] = []

    def answer(self) -> Message:
        """Stream the reply to the conversation so far onto stdout, and return it as a message."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        options = {"tools": self.tools} if self.tools else {}
        if self.args.seed is not None:
            options["seed"] = self.args.seed
        content, calls = "", {}
        stream = self.client.chat.completions.create(
            model=self.model,
            messages=[*system, *self.messages],
            max_tokens=self.args.max_tokens,
            temperature=self.args.temperature,
            top_p=self.args.top_p,
            stream=True,
            **options,
        )
        with stream:
            for chunk in stream:
                for choice in chunk.choices:
                    text = choice.delta.content or ""
                    content += text
                    print(text, end="", flush=True)
                    for call in choice.delta.tool_calls or []:
                        _collect(calls, call)
        if content:
            print()
        for call in calls.values():
            function = call["function"]
            print(f"tool call: {function['name']}({function['arguments']})")
        reply: Message = {"role": "assistant", "content": content}
        return {**reply, "tool_calls": list(calls.values())} if calls else reply

    def exchange(self, text: str) -> None:
        """One turn: the person's text, the answer, and tool results as long as the person gives them."""
        self.messages.append({"role": "user", "content": text})
        self.messages.append(self.answer())
        while calls := self.messages[-1].get("tool_calls"):
            results = []
            for call in calls:
                result = input(f"result of {call['function']['name']} (empty: none)> ")
                if result:
                    results.append({"role": "tool", "tool_call_id": call["id"], "content": result})
            if not results:
                return
            self.messages += results
            self.messages.append(self.answer())

    def command(self, line: str) -> bool:
        """Run a /command; False when the person wants to leave."""
        name, _, rest = line.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name == "/reset":
            self.messages.clear()
        elif name == "/system":
            self.system = rest or None
        else:
            print("commands: /reset, /system TEXT, /exit")
        return True


def _collect(calls: dict[int, Message], part: Any) -> None:
    """Add a streamed piece of a tool call to the calls so far, by index."""
    empty = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
    call = calls.setdefault(part.index, empty)
    call["id"] += part.id or ""
    call["function"]["name"] += part.function.name or ""
    call["function"]["arguments"] += part.function.arguments or ""


def converse(chat: Chat) -> None:
    """Read, answer, repeat."""
    try:
        import readline  # noqa: F401 - gives input() line editing and history where the platform has it
    except ImportError:
        pass
    while True:
        try:
            line = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.startswith("/"):
            if not chat.command(line):
                return
            continue
        if not line:
            continue
        before = len(chat.messages)
        try:
            chat.exchange(line)
        except (EOFError, KeyboardInterrupt):
            print()
            del chat.messages[before:]
        except openai.APIStatusError as error:
            print(f"error: {error.message}", file=sys.stderr)
            del chat.messages[before:]


def main(argv: Sequence[str] | None = None) -> None:
    """Connect, then answer once or converse."""
    args = parse(argv)
    logging.basicConfig(level=logging.WARNING)
    try:
        with connected(args) as client:
            chat = Chat(client, args)
            if args.prompt is None:
                converse(chat)
            else:
                chat.messages.append({"role": "user", "content": args.prompt})
                chat.answer()
    except openai.APIConnectionError:
        raise UserError(f"no server answers at {args.base_url}; start one with serve_hf.py") from None
    except openai.APIStatusError as error:
        raise UserError(f"the server refused: {error.message}") from None
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    run(main)
