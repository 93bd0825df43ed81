"""What the API promises beyond plain answers, on both engines: scored prompts, constrained answers, tokens."""

import json
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from smol_model import SmolForCausalLM
from smolkit.chat import chat_stop_ids, encode_text, render
from smolkit.openai_api import create_app
from smolkit.serving import serving

from .conftest import WEATHER, ScriptedEngine

QUESTION = [{"role": "user", "content": "What is photosynthesis?"}]
TIME = {"type": "function", "function": {"name": "time", "parameters": {
    "type": "object", "properties": {"zone": {"enum": ["UTC", "北京🚀"]}}, "required": ["zone"]}}}  # fmt: skip
DAY = {"type": "function", "function": {"name": "day", "parameters": {
    "type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 31}}}}}  # fmt: skip
TOOLS = [TIME, DAY]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "$defs": {"tag": {"enum": ["red", "光", '"quoted"']}},
}
PERSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}


# --- prompts with log-probabilities -------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_echo_scores_the_prompt(
    moe_url: str, moe: Path, tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> None:
    """Against one forward pass of the model over the prompt."""
    model = SmolForCausalLM.from_pretrained(moe, dtype=torch.float32)
    texts = ["The process of photosynthesis", "光合作用 🚀"]
    client = openai.OpenAI(base_url=f"{moe_url}/v1", api_key="none")
    result = client.completions.create(
        model="tiny", prompt=texts, max_tokens=max_tokens, echo=True, logprobs=2, temperature=0
    )
    for choice, text in zip(result.choices, texts, strict=True):
        prompt = encode_text(tokenizer, text)
        scores = choice.logprobs
        assert choice.text.startswith(text) and (choice.text == text) == (max_tokens == 0)
        count = len(scores.tokens) - len(prompt)
        assert count == max_tokens or choice.finish_reason == "stop"
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
        own = [float(row[i]) for row, i in zip(expected, prompt[1:], strict=False)]
        assert scores.token_logprobs[1 : len(prompt)] == pytest.approx(own, abs=1e-3)
        for row, top in zip(expected[: len(prompt) - 1], scores.top_logprobs[1 : len(prompt)], strict=True):
            assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-3) and len(top) in (1, 2, 3)
        if max_tokens:
            assert scores.token_logprobs[len(prompt)] == pytest.approx(float(expected[-1].max()), abs=1e-3)
        positions = scores.text_offset
        assert positions[0] == 0 and positions == sorted(positions) and positions[-1] <= len(choice.text)
    assert result.usage.prompt_tokens == sum(len(encode_text(tokenizer, text)) for text in texts)
    if max_tokens == 0:
        assert result.usage.completion_tokens == 0


def test_padded_rows_keep_their_share_of_the_probability(
    client: openai.OpenAI, model: SmolForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """As in transformers, so that lm-evaluation-harness scores alike; but they are never chosen, nor named."""
    prompt, size = encode_text(tokenizer, "What is photosynthesis?"), len(tokenizer)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert expected[:, size:].exp().sum(-1).min() > 1e-4, "without a share of theirs there is nothing to see"
    fields: dict[str, Any] = dict(model="tiny", prompt=prompt, max_tokens=1, temperature=0, logprobs=5)
    scores = client.completions.create(**fields, echo=True).choices[0].logprobs
    own = [float(row[i]) for row, i in zip(expected, [*prompt[1:], int(expected[-1, :size].argmax())], strict=True)]
    assert scores.token_logprobs[1:] == pytest.approx(own, abs=1e-3)
    chosen = client.completions.create(**fields).choices[0].logprobs
    assert chosen.token_logprobs == pytest.approx(own[-1:], abs=1e-3)


def test_echo_streams_and_needs_no_logprobs(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = dict(model="tiny", prompt="光合作用 🚀", max_tokens=6, seed=3, echo=True)
    for logprobs in (None, 1):
        whole = client.completions.create(**fields, logprobs=logprobs).choices[0]
        chunks = [c.choices[0] for c in client.completions.create(**fields, logprobs=logprobs, stream=True)]
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert (whole.logprobs is None) == (logprobs is None)
        if logprobs:
            assert sum((chunk.logprobs.token_logprobs for chunk in chunks), []) == whole.logprobs.token_logprobs
    plain = client.completions.create(**{**fields, "echo": False}).choices[0]
    assert whole.text == fields["prompt"] + plain.text
    stopped = client.completions.create(**fields, stop="光").choices[0]
    assert stopped.text.startswith("光合作用 🚀"), "stop strings are looked for in the answer, not in the prompt"


def test_token_ids_of_control_tokens_can_be_scored(client: openai.OpenAI, tokenizer: PreTrainedTokenizerFast) -> None:
    """Somebody who sends ids means those ids."""
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>")
    result = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=0).choices[0]
    assert len(result.logprobs.tokens) == len(ids) and result.logprobs.tokens[0] == "<|im_start|>"


# --- constrained answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_json_schema(client: openai.OpenAI, temperature: float) -> None:
    """A random model cannot help but follow the schema, and ends by itself."""
    for seed in range(3):
        fields: dict[str, Any] = dict(model="tiny", messages=QUESTION, response_format=PERSON_FORMAT, seed=seed)
        whole = client.chat.completions.create(**fields, temperature=temperature).choices[0]
        jsonschema.validate(json.loads(whole.message.content), PERSON)
        assert whole.finish_reason == "stop"
        chunks = client.chat.completions.create(**fields, temperature=temperature, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content


def test_json_object_is_an_object_without_loose_whitespace(client: openai.OpenAI) -> None:
    ended = 0
    for seed in range(12):
        choice = client.chat.completions.create(
            model="tiny", messages=QUESTION, response_format={"type": "json_object"}, seed=seed, temperature=1.5
        ).choices[0]
        text = choice.message.content
        assert text.startswith("{") and "\n" not in text.split('"')[0]
        if choice.finish_reason == "stop":
            ended += 1
            assert isinstance(json.loads(text), dict)
    assert ended


def test_parsed_answers_of_the_client(client: openai.OpenAI) -> None:
    """The `openai` package's own structured-output helper."""
    from pydantic import BaseModel, Field

    class Person(BaseModel):
        name: str = Field(max_length=8)
        age: int = Field(ge=0, le=150)

    person = client.chat.completions.parse(model="tiny", messages=QUESTION, response_format=Person, temperature=0)
    assert isinstance(person.choices[0].message.parsed, Person)


def calls_of(message: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def spelled(message: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or []]


def fragments_of(client: openai.OpenAI, fields: dict[str, Any]) -> list[tuple[list[tuple[str, str]], str]]:
    """(calls put together from their fragments, finish reason) of every choice of a streamed answer."""
    calls: dict[int, dict[int, tuple[str, str]]] = {number: {} for number in range(fields.get("n", 1))}
    finish: dict[int, str] = {}
    for chunk in client.chat.completions.create(**fields, stream=True):
        choice = chunk.choices[0]
        for part in choice.delta.tool_calls or []:
            name, arguments = calls[choice.index].get(part.index, (part.function.name, ""))
            assert "\ufffd" not in part.function.arguments and (part.id is None) == (part.function.name is None)
            calls[choice.index][part.index] = (name, arguments + part.function.arguments)
        if choice.finish_reason:
            finish[choice.index] = choice.finish_reason
    return [(list(calls[number].values()), finish[number]) for number in calls]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_required_tool_calls(client: openai.OpenAI, temperature: float) -> None:
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    seen = set()
    for seed in range(4):
        fields: dict[str, Any] = dict(model="tiny", messages=QUESTION, tools=TOOLS, seed=seed, temperature=temperature)
        fields |= {"tool_choice": "required", "parallel_tool_calls": bool(seed % 2), "max_tokens": 200}
        choice = client.chat.completions.create(**fields).choices[0]
        ((streamed, finish),) = fragments_of(client, fields)
        assert finish == choice.finish_reason
        if finish == "length":  # the random model wrote a string without end
            continue
        assert finish == "tool_calls" and choice.message.content is None
        calls = calls_of(choice.message)
        assert streamed == spelled(choice.message)
        assert len(calls) == 1 if seed % 2 == 0 else len(calls) >= 1
        for name, arguments in calls:
            seen.add(name)
            jsonschema.validate(arguments, schemas[name])
            assert arguments.keys() <= schemas[name]["properties"].keys()
    assert seen


def test_named_tool(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = dict(model="tiny", messages=QUESTION, tools=TOOLS, temperature=1, seed=1, n=4)
    fields["tool_choice"] = {"type": "function", "function": {"name": "time"}}
    choices = client.chat.completions.create(**fields).choices
    for choice in choices:
        ((name, arguments),) = calls_of(choice.message)
        assert name == "time" and arguments["zone"] in ("UTC", "北京🚀") and choice.finish_reason == "tool_calls"
    assert fragments_of(client, fields) == [(spelled(choice.message), "tool_calls") for choice in choices]
    assert any(calls_of(choice.message)[0][1]["zone"] == "北京🚀" for choice in choices)


def test_json_or_tools(client: openai.OpenAI) -> None:
    """With both, either; never anything else."""
    for seed in range(4):
        choice = client.chat.completions.create(
            model="tiny", messages=QUESTION, tools=[TIME], response_format=PERSON_FORMAT, seed=seed, temperature=1.5
        ).choices[0]
        if choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content), PERSON)
        elif choice.finish_reason == "tool_calls":
            assert {name for name, _ in calls_of(choice.message)} == {"time"}


def test_company_of_constrained_answers(client: openai.OpenAI) -> None:
    """n choices under one grammar are constrained each for itself."""
    result = client.chat.completions.create(
        model="tiny", messages=QUESTION, response_format=PERSON_FORMAT, n=4, temperature=1.5, seed=1
    )
    people = [json.loads(choice.message.content) for choice in result.choices]
    for person in people:
        jsonschema.validate(person, PERSON)
    assert len({json.dumps(person) for person in people}) > 1
    prompt = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=1).usage.prompt_tokens
    assert result.usage.prompt_tokens == prompt  # read once for all choices


# --- lengths ------------------------------------------------------------------------------------------------


def test_ignore_eos_and_min_tokens(client: openai.OpenAI, tokenizer: PreTrainedTokenizerFast) -> None:
    end = {str(i): 100 for i in chat_stop_ids(tokenizer)[:1]}
    fields: dict[str, Any] = dict(model="tiny", prompt="The", max_tokens=9, temperature=0, logit_bias=end)
    assert client.completions.create(**fields).usage.completion_tokens == 1
    on = client.completions.create(**fields, extra_body={"ignore_eos": True})
    assert on.usage.completion_tokens == 9 and on.choices[0].finish_reason == "length" and on.choices[0].text == ""
    later = client.completions.create(**fields, extra_body={"min_tokens": 4})
    assert later.usage.completion_tokens == 5 and later.choices[0].finish_reason == "stop"
    assert client.completions.create(**fields, extra_body={"min_tokens": 99}).usage.completion_tokens == 9


# --- tokens -------------------------------------------------------------------------------------------------


def test_tokenize_and_detokenize(url: str, tokenizer: PreTrainedTokenizerFast) -> None:
    text = "光合作用 <|im_end|> 🚀"
    tokens = httpx.post(f"{url}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert tokens["tokens"] == encode_text(tokenizer, text) and tokens["count"] == len(tokens["tokens"])
    assert tokens["max_model_len"] == 512 and len(tokens["token_strs"]) == tokens["count"]
    assert httpx.post(f"{url}/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}
    for generate in (True, False):
        body = {"model": "tiny", "messages": QUESTION, "tools": [WEATHER], "add_generation_prompt": generate}
        ids = httpx.post(f"{url}/tokenize", json=body).json()["tokens"]
        assert ids == render(tokenizer, QUESTION, [WEATHER], generate).input_ids
    for body, param in (({}, "prompt"), ({"prompt": "a", "messages": QUESTION}, "prompt"), ({"prompt": 1}, "prompt")):
        response = httpx.post(f"{url}/tokenize", json=body)
        assert response.status_code == 400 and response.json()["error"]["param"] == param
    for ids in ([-1], [10**9], "x", None):
        response = httpx.post(f"{url}/detokenize", json={"tokens": ids})
        assert response.status_code == 400 and response.json()["error"]["param"] == "tokens"
    assert httpx.post(f"{url}/tokenize", json={"prompt": "", "model": "other"}).status_code == 404


def test_a_beginning_of_text_is_added_where_the_tokenizer_adds_one(tokenizer: PreTrainedTokenizerFast) -> None:
    import copy

    from tokenizers import processors

    bos = copy.deepcopy(tokenizer)
    first = bos.convert_tokens_to_ids("<|im_start|>")
    bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", first)]
    )
    engine = ScriptedEngine(bos)
    engine.will_say("ok")
    with serving(create_app(engine, bos, "scripted")) as url:
        for flag, head in ((None, [first]), (True, [first]), (False, [])):
            body = {"prompt": "hi <|im_end|>", "add_special_tokens": flag}
            assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
            assert engine.requests[-1].prompt_ids == head + encode_text(bos, "hi <|im_end|>")
            assert httpx.post(f"{url}/tokenize", json=body).json()["tokens"] == engine.requests[-1].prompt_ids


def test_template_variables(tokenizer: PreTrainedTokenizerFast) -> None:
    """Allowed ones reach the template, as text; a control word in them stays text."""
    import copy

    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = "{{ messages[0].content }}|{{ enable_thinking }}|{{ style }}"
    engine = ScriptedEngine(thinking)
    engine.will_say("ok")
    with serving(create_app(engine, thinking, "scripted", template_kwargs=["enable_thinking", "style"])) as url:
        extra = {"chat_template_kwargs": {"enable_thinking": False, "style": "<|im_end|>"}}
        response = httpx.post(f"{url}/v1/chat/completions", json={"messages": QUESTION, **extra})
        assert response.status_code == 200
        ids = engine.requests[-1].prompt_ids
        assert thinking.decode(ids) == "What is photosynthesis?|False|<|im_end|>"
        assert not set(ids) & set(thinking.get_added_vocab().values())
        other = {"messages": QUESTION, "chat_template_kwargs": {"x": 1}}
        refused = httpx.post(f"{url}/v1/chat/completions", json=other)
        assert refused.status_code == 400 and "style" in refused.json()["error"]["message"]


def test_one_call_at_most_in_a_free_answer(scripted: tuple[ScriptedEngine, openai.OpenAI]) -> None:
    engine, client = scripted
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    engine.will_say(f"{call}\n{call}")
    fields: dict[str, Any] = dict(model="scripted", messages=QUESTION, tools=[WEATHER])
    both = client.chat.completions.create(**fields).choices[0]
    one = client.chat.completions.create(**fields, parallel_tool_calls=False).choices[0]
    assert len(both.message.tool_calls) == 2 and len(one.message.tool_calls) == 1
    assert one.finish_reason == "tool_calls" and one.message.content is None


# --- a Mixture-of-Experts behind the same API ---------------------------------------------------------------


def test_moe_answers_are_those_of_transformers(
    moe_url: str, moe: Path, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    """The server, `SmolForCausalLM.generate` and transformers without our code: the same greedy tokens."""
    client = openai.OpenAI(base_url=f"{moe_url}/v1", api_key="none")
    models = [
        SmolForCausalLM.from_pretrained(moe, dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32),
    ]
    for prompt in prompts[:6]:
        served = client.completions.create(model="tiny", prompt=prompt, max_tokens=16, temperature=0).choices[0].text
        ids = torch.tensor([prompt])
        for model in models:
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False,
                eos_token_id=chat_stop_ids(tokenizer), pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            assert tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True) == served, type(model)
