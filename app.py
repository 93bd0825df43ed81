"""A page to compare models in the browser: same prompt, two models side by side, tool calls, token probabilities.

    python app.py --models base=out/quickstart/pretrain sft=out/quickstart/sft dpo=out/quickstart/dpo
    python app.py --models mine=out/quickstart/dpo http://127.0.0.1:8000/v1 --tools out/quickstart/data/exam/tools.json

A model is a checkpoint or PEFT adapter directory, hf://OWNER/NAME, or the URL of an OpenAI-compatible server, with a
name before it if you like. Without --models: those of the environment variable SMOLLM_MODELS (separated by spaces; this
is how a Hugging Face Space is told), else the newest checkpoint under out/ and output/. The page is in English or
Chinese, as the browser prefers. It needs gradio: pip install -r requirements-app.txt
"""

import argparse
import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from smolkit.clients import Endpoint, add_loading_arguments, connected, named_source, read_tools
from smolkit.errors import UserError, run

logger = logging.getLogger(__name__)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="[NAME=]SOURCE", help="directories or URLs to choose from")
    parser.add_argument(
        "--api_key",
        default=os.environ.get("SMOLLM_API_KEY", "none"),
        help="key for the URLs; environment variable SMOLLM_API_KEY hides it from other users",
    )
    add_loading_arguments(parser)
    parser.add_argument("--system", default="", help="system prompt to begin with")
    parser.add_argument("--tools", help="JSON file with a list of OpenAI tool objects to begin with")
    parser.add_argument("--temperature", type=float, default=0.0, help="temperature to begin with; 0 is greedy")
    parser.add_argument("--examples", nargs="+", metavar="TEXT", help="prompts to offer")
    parser.add_argument("--host", help="address to listen on; default: 127.0.0.1, in a Space everywhere")
    parser.add_argument("--port", type=int, help="port to listen on; default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="a public link through gradio's servers, for 72 hours")
    return parser.parse_args(argv)


def sources(models: Sequence[str] | None) -> list[str]:
    """What to offer: the flag, else the environment, else the newest checkpoint."""
    if found := models or os.environ.get("SMOLLM_MODELS", "").split():
        return list(found)
    from smolkit.serving import newest_checkpoint  # PyTorch, which talking to servers does not need

    return [str(newest_checkpoint())]


def connect(stack: ExitStack, models: Sequence[str], **options: Any) -> list[Endpoint]:
    """All models, open until the stack is closed; two of one name are refused. `options` are those of `connected`."""
    endpoints: dict[str, Endpoint] = {}
    for text in models:
        name, source = named_source(text)
        logger.info("opening %s", source)
        endpoint = stack.enter_context(connected(source, name=name, **options))
        if endpoint.name in endpoints:
            raise UserError(f"two models are named {endpoint.name!r}: write NAME={source}")
        endpoints[endpoint.name] = endpoint
    return list(endpoints.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Open the models, then show the page until Ctrl-C."""
    args = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    if importlib.util.find_spec("gradio") is None:
        raise UserError("gradio is not installed: pip install -r requirements-app.txt")
    from smolkit.app_view import EXAMPLES, build_page, launch  # gradio: seconds that --help need not take

    tools = json.dumps(read_tools(args.tools), ensure_ascii=False, indent=2) if args.tools else ""
    with ExitStack() as stack:
        where = dict(api_key=args.api_key, dtype=args.dtype, device=args.device)
        endpoints = connect(stack, sources(args.models), **where)
        page = build_page(
            endpoints,
            tools=tools,
            system=args.system,
            temperature=args.temperature,
            examples=args.examples or EXAMPLES,
        )
        launch(page, host=args.host, port=args.port, share=args.share)


if __name__ == "__main__":
    run(main)
