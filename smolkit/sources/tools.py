"""Function-calling conversations in the forms that public datasets use, as messages with `tool_calls`.

Two families: calls written as text between `<tool_call>` tags inside an assistant turn (Hermes; one object per
tag, or a list in one tag, APIGen), and calls in a turn of their own (`function_call`, ShareGPT as LLaMA-Factory
writes it). Left as plain text, a model would learn to spell the tags out character by character: the renderer
keeps text apart from control tokens."""

import ast
import json
import re
from typing import Any

from smolkit.sources.base import ROLES, Rejected

CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
RESPONSE = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
TOOL_LIST = re.compile(r"<tools>\s*(.*?)\s*</tools>", re.DOTALL)
TOOL_ROLES = ROLES | {"function_call": "call", "tool": "tool", "observation": "tool", "function": "tool"}


def parse_json(text: str, what: str) -> object:
    """JSON, or the Python literal that some published rows hold in its place. Raises Rejected."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise Rejected(f"{what} that is not JSON") from None


def as_call(value: object) -> dict:
    """`{"name", "arguments"}`, bare or as OpenAI wraps it, as an OpenAI tool call. Raises Rejected."""
    function = value.get("function", value) if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) and name else None
    if isinstance(arguments, str):
        arguments = parse_json(arguments, "tool call arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise Rejected("tool call without a name or with arguments that are no object")
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def as_calls(text: str) -> list[dict]:
    value = parse_json(text, "tool call")
    return [as_call(each) for each in (value if isinstance(value, list) else [value])]


def as_tools(value: Any) -> list[dict]:
    """A tool list (JSON text or objects, bare functions or OpenAI's wrapping) in OpenAI's form. Raises
    Rejected."""
    if isinstance(value, str):
        value = parse_json(value, "tool list") if value.strip() else []
    tools = []
    for tool in value or []:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Rejected("tool without a name")
        tools.append({"type": "function", "function": without_nulls(function)})
    return tools


def without_nulls(value: object) -> object:
    """`value` without null members: Parquet gives every object the fields of all its siblings, as nulls."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def tools_in_system(text: str) -> list[dict]:
    """The tools that a system prompt lists between `<tools>` tags: a JSON list, or one object per line."""
    found = TOOL_LIST.search(text)
    if not found:
        return []
    try:
        return as_tools(found[1])
    except Rejected:
        return as_tools([parse_json(line, "tool list") for line in found[1].splitlines() if line.strip()])


def tool_messages(turns: list[dict], role: str = "from", content: str = "value") -> list[dict]:
    """Turns of either family as messages. A turn's own `tool_calls` (OpenAI's form) are kept.

    Raises Rejected for an unknown role, an empty turn, a malformed call or an order that cannot be trained
    on."""
    messages: list[dict] = []
    for turn in turns:
        kind, text = TOOL_ROLES.get(turn[role]), turn.get(content) or ""
        if kind is None:
            raise Rejected(f"unknown role {turn[role]!r}")
        if kind == "call":
            messages.append({"role": "assistant", "content": "", "tool_calls": as_calls(text)})
        elif kind == "assistant":
            calls, tagged = [as_call(call) for call in turn.get("tool_calls") or []], CALL.findall(text)
            calls = calls or [call for part in tagged for call in as_calls(part)]
            text = CALL.sub("", text).strip() if tagged or calls else text
            if tagged and not calls and not text:  # APIGen's answer where no function is needed
                raise Rejected("empty tool call list")
            messages.append({"role": kind, "content": text} | ({"tool_calls": calls} if calls else {}))
        elif kind == "tool":
            messages += [{"role": kind, "content": part} for part in RESPONSE.findall(text) or [text]]
        elif kind != "system" or messages or text.strip():
            messages.append({"role": kind, "content": text})
    check_order(messages)
    return messages


def check_order(messages: list[dict]) -> None:
    """Raise Rejected unless the order is (system) user assistant …, where tool results follow calls only, and
    an assistant turn follows the results."""
    before = "system"
    for number, message in enumerate(messages):
        role = message["role"]
        if role != "tool" and not message["content"].strip() and not message.get("tool_calls"):
            raise Rejected("empty turn")
        allowed = {"system": ("user",), "user": ("assistant",), "assistant": ("user",), "tool": ("assistant", "tool")}
        allowed["call"] = ("tool", "user")
        if not (role == "system" and number == 0):
            if role not in allowed[before]:
                raise Rejected(f"a {role} turn after a {before} turn")
            before = "call" if message.get("tool_calls") else role
    if not messages or messages[-1]["role"] != "assistant":
        raise Rejected("the conversation does not end with the assistant")
