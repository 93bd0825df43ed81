"""Request and response types of the OpenAI-compatible API, and its error shape.

Requests are strict about types, ignore unknown fields, and leave fields that exist at OpenAI but not here to
`refuse_unsupported`, which names them. `null` means "not given" everywhere.
"""

import itertools
import math
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, WrapValidator, model_validator

MAX_CHOICES = 16
MAX_DEPTH = 64  # of a request's JSON: schemas and arguments are walked recursively further in
MAX_STOP_LENGTH = 1000
MAX_MESSAGES = 10_000
MAX_ITEMS = 1000  # tools; parts and calls of a message
MAX_MESSAGE_LENGTH = 500  # of error messages, which may quote the request


class ApiError(Exception):
    """An error for the client, in OpenAI's terms."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = error_body(message, kind, param, code)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """`{"error": {...}}` as OpenAI's clients read it; of bounded length, and UTF-8 whatever it quotes."""
    message = message.encode("utf-8", "backslashreplace").decode()
    if len(message) > MAX_MESSAGE_LENGTH:
        message = message[: MAX_MESSAGE_LENGTH - 3] + "..."
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorDetail


# --- requests -----------------------------------------------------------------------------------------------


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Body(_Request):
    """A whole request body."""

    model: str | None = Field(None, description="the served model's name, see /v1/models; may be left out")

    @model_validator(mode="before")
    @classmethod
    def _checked(cls, body: Any) -> Any:
        for name, value in body.items() if isinstance(body, dict) else ():
            if complaint := unreadable(name) or unreadable(value):
                param = None if unreadable(name) else name[:100]
                raise ApiError(400, f"{param or 'body'}: {complaint}", param=param)
        return body


def unreadable(value: Any) -> str | None:
    """What is wrong with JSON that Python reads and nobody should have to: depth, NaN, text that is not Unicode."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            return f"nested deeper than {MAX_DEPTH} levels"
        depth += 1
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, float) and not math.isfinite(item):
                return "NaN and infinity are not JSON"
            elif isinstance(item, str) and not encodable(item):
                return "unpaired surrogate in a text"
        level = below
    return None


def encodable(text: str) -> bool:
    """Whether a text has a UTF-8 form: an unpaired surrogate, which JSON can spell, has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# Lists stop at the first wrong item, and dictionaries at the first wrong value: pydantic would describe a million of
# them for each type that it tries, on the event loop.
_Item = TypeVar("_Item")
Numbers = Annotated[list[int], Field(fail_fast=True)]
Items = Annotated[list[_Item], Field(fail_fast=True, max_length=MAX_ITEMS)]


def _one_by_one(values: Any, validate: Callable[[Any], Any]) -> Any:
    """`validate(values)`, but of a dictionary each value on its own where most of them may be wrong."""
    if isinstance(values, dict) and len(values) > 1:
        for key, value in values.items():
            validate({key: value})
    return validate(values)


class FunctionCallIn(_Request):
    name: str
    arguments: str | dict[str, Any] = Field(description="a JSON object, usually as a string")


class ToolCallIn(_Request):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCallIn


class ContentPart(_Request):
    type: str
    text: str | None = None


class Message(_Request):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[ContentPart] | None = None
    tool_calls: Items[ToolCallIn] | None = None
    tool_call_id: str | None = None

    def plain(self, number: int) -> dict[str, Any]:
        """The message with text content, as the renderer takes it."""
        content = self.content
        if isinstance(content, list):
            for part in content:
                if part.type not in ("text", "input_text") or part.text is None:
                    raise ApiError(
                        400,
                        f"message {number}: only text content is supported",
                        param=f"messages.{number}.content",
                        code="unsupported_value",
                    )
            content = "".join(part.text or "" for part in content)
        message: dict[str, Any] = {"role": self.role, "content": content}
        if self.role == "developer":
            message["role"] = "system"
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return message


def in_call_order(messages: Sequence[Message]) -> list[Message]:
    """The messages, results of tools in the order of their calls, by which alone templates tell them apart.

    Results of which one names none of the calls before them stay as they are.
    """
    ordered: list[Message] = []
    for of_tools, group in itertools.groupby(messages, key=lambda message: message.role == "tool"):
        run = list(group)
        calls = ordered[-1].tool_calls if of_tools and ordered else None
        places = {call.id: place for place, call in enumerate(calls or []) if call.id is not None}
        if all(message.tool_call_id in places for message in run):
            run.sort(key=lambda message: places[message.tool_call_id or ""])
        ordered += run
    return ordered


class FunctionDefinition(_Request):
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Request):
    type: Literal["function"]
    function: FunctionDefinition

    def plain(self) -> dict[str, Any]:
        return {"type": "function", "function": self.function.model_dump(exclude_none=True)}


class NamedFunction(_Request):
    name: str


class NamedTool(_Request):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(_Request):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", description="a JSON schema; what it may use: see llguidance")
    strict: bool | None = Field(None, description="the schema is always followed")


class ResponseFormat(_Request):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_of(self) -> dict[str, Any] | None:
        """The JSON schema that the answer has to follow."""
        if self.type != "json_schema":
            return {"type": "object"} if self.type == "json_object" else None
        if self.json_schema is None:
            raise ApiError(400, "response_format: type json_schema needs json_schema", param="response_format")
        return self.json_schema.schema_


class StreamOptions(_Request):
    include_usage: bool | None = None


StopString = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
TemplateKwargs = Annotated[dict[str, bool | int | float | str | None], WrapValidator(_one_by_one)]


class _Generation(_Body):
    """Fields that chat and text completions share."""

    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="longest answer; at most what the context leaves, which is also the default"
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="default 1; 0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="0 or -1 is off")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[dict[str, Bias], WrapValidator(_one_by_one)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(None, description="same request, same answer")
    stop: StopString | Annotated[list[StopString], Field(max_length=4, fail_fast=True)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="no end of text before so many tokens")
    ignore_eos: bool | None = Field(None, description="go on to max_tokens, through any end of text")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    def stops(self) -> list[str]:
        """Stop strings without empty ones."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]

    def biases(self, vocab_size: int) -> dict[int, float]:
        """`logit_bias` with checked token ids."""
        biases = {}
        for key, bias in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
                raise ApiError(400, f"logit_bias: keys are token ids from 0 to {vocab_size - 1}", param="logit_bias")
            biases[int(key)] = bias
        return biases


class ChatRequest(_Generation):
    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Items[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="default with tools: auto; required and a named tool constrain the answer to valid calls"
    )
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call")
    response_format: ResponseFormat | None = Field(None, description="constrains the answer to JSON")
    chat_template_kwargs: TemplateKwargs | None = Field(
        None, description="variables of the chat template that the server allows, such as enable_thinking"
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"messages": [{"role": "user", "content": "What is photosynthesis?"}]}]}
    )

    def tools_to_call(self) -> list[dict[str, Any]]:
        """The tools that the answer must call: none, unless `tool_choice` says so."""
        tools = [tool.plain() for tool in self.tools or []]
        if self.tool_choice in (None, "none", "auto"):
            return []
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            tools = [tool for tool in tools if tool["function"]["name"] == name]
            if not tools:
                raise ApiError(400, f"tool_choice: no tool is named {ascii(name[:64])}", param="tool_choice")
        if not tools:
            raise ApiError(400, 'tool_choice "required" needs tools', param="tool_choice")
        return tools


class CompletionRequest(_Generation):
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None, description="longest answer; at most what the context leaves, which is also the default; 0 needs echo"
    )
    echo: bool | None = Field(None, description="put the prompt before the answer, its log-probabilities included")
    add_special_tokens: bool | None = Field(
        None, description="whether the tokenizer adds its own, such as a beginning of text, to text prompts (default)"
    )
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[list[int], Field(min_length=1, fail_fast=True)]
        | Annotated[list[Numbers], Field(min_length=1, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "The process of photosynthesis involves", "max_tokens": 64}]}
    )


class TokenizeRequest(_Body):
    """One of `prompt` and `messages`."""

    prompt: str | None = None
    messages: Messages | None = None
    tools: Items[Tool] | None = None
    add_special_tokens: bool | None = Field(None, description="for `prompt`, as in a completion (default)")
    add_generation_prompt: bool | None = Field(None, description="for `messages`, as in a chat completion (default)")
    chat_template_kwargs: TemplateKwargs | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Body):
    tokens: Numbers


# OpenAI's own bookkeeping, which changes no answer.
IGNORED = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
)

# Field -> values that mean "not used". Anything else is refused by name instead of being ignored.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "verbosity": (None,),
    "web_search_options": (None,),
}


def refuse_unsupported(body: _Generation) -> None:
    """Raise `ApiError` naming the first field that this server does not implement."""
    for name, value in (body.model_extra or {}).items():
        if name in UNSUPPORTED and not any(value is unused or value == unused for unused in UNSUPPORTED[name]):
            raise ApiError(400, f"{name} is not supported by this server", param=name, code="unsupported_parameter")


# --- responses ----------------------------------------------------------------------------------------------


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


def new_tool_call(name: str) -> ToolCall:
    """A call without arguments yet."""
    name = name if encodable(name) else ascii(name)[1:-1]  # an escaped lone surrogate is JSON, but not UTF-8
    return ToolCall(id=f"call_{uuid.uuid4().hex}", function=FunctionCall(name=name, arguments=""))


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(BaseModel):
    token: str
    logprob: float | None = Field(description="null for the first token of an echoed prompt only")
    bytes: list[int] | None = None
    top_logprobs: list[TopLogprob] = []


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(BaseModel):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class _Response(BaseModel):
    id: str
    created: int
    model: str


class ChatCompletion(_Response):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class Completion(_Response):
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "smollm"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(BaseModel):
    prompt: str


class Health(BaseModel):
    status: Literal["ok"] = "ok"


def response_head(prefix: str, model: str) -> dict[str, Any]:
    """`id`, `created`, `model` of a new response."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
