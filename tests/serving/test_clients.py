"""Other people's clients against the servers: lm-evaluation-harness, litellm, LangChain, Schemathesis, openai."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from smolkit.engine import TorchEngine
from smolkit.openai_api import create_app
from smolkit.serving import serving

from .conftest import WEATHER


@pytest.fixture(autouse=True)
def subnormal_numbers() -> None:
    """Schemathesis insists on them; a training or serving script that ran in this process switched them off."""
    torch.set_flush_denormal(False)


QUESTION = [{"role": "user", "content": "What is photosynthesis?"}]

# --- lm-evaluation-harness ----------------------------------------------------------------------------------

CHOICES = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: %s}
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: %s}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}{{choices[1]}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
"""
UNTIL = """
task: tiny_until
dataset_path: json
dataset_kwargs: {data_files: %s}
test_split: train
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
DOCUMENTS = [
    {"question": "The process of", "choices": [" photosynthesis", " light and water", "光合作用", "🚀"], "right": 1},
    {"question": "What is", "choices": [" x", " helpful"], "right": 0},
    {"question": "植物在白天", "choices": ["🚀🌍", "需要光"], "right": 0},
]


def test_lm_evaluation_harness(moe_url: str, moe: Path, tmp_path: Path) -> None:
    """`local-completions` and the harness's own `hf` backend say the same of the same model."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    for name, text in (("choice", CHOICES), ("rolling", ROLLING), ("until", UNTIL)):
        (tmp_path / f"{name}.yaml").write_text(text % data)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def answers(backend: str, batch_size: int, **arguments: Any) -> dict[str, list[Any]]:
        result = lm_eval.simple_evaluate(
            model=backend, model_args=arguments, tasks=["tiny_choice", "tiny_rolling", "tiny_until"],
            task_manager=tasks, log_samples=True, bootstrap_iters=0, device="cpu", batch_size=batch_size,
        )  # fmt: skip
        return {task: [sample["resps"] for sample in samples] for task, samples in result["samples"].items()}

    ours = answers(
        "local-completions", 3, base_url=f"{moe_url}/v1/completions", model="tiny", tokenizer=str(moe),
        tokenizer_backend="huggingface", max_length=512,
    )  # fmt: skip
    theirs = answers("hf", 1, pretrained=str(moe), dtype="float32")
    for mine, other in zip(sum(ours["tiny_choice"], []), sum(theirs["tiny_choice"], []), strict=True):
        ((log_likelihood, greedy),), ((expected, expected_greedy),) = mine, other
        assert log_likelihood == pytest.approx(expected, abs=2e-3) and greedy == expected_greedy
    for mine, other in zip(ours["tiny_rolling"], theirs["tiny_rolling"], strict=True):
        assert mine[0][0] == pytest.approx(other[0][0], abs=2e-3)
    assert ours["tiny_until"] == theirs["tiny_until"] and len(ours["tiny_choice"]) == len(DOCUMENTS)


# --- litellm, LangChain -------------------------------------------------------------------------------------


@pytest.mark.slow  # importing it takes half a minute
def test_litellm(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # its own copy instead of a download
    import litellm

    where = dict(model="openai/tiny", api_base=f"{url}/v1", api_key="none", temperature=0, max_tokens=12)
    whole = litellm.completion(messages=QUESTION, **where)
    chunks = list(litellm.completion(messages=QUESTION, stream=True, **where))
    text = whole.choices[0].message.content
    assert text and "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert whole.usage.completion_tokens <= 12
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=QUESTION, **{**where, "model": "openai/other"})


def test_langchain(url: str) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="tiny", base_url=f"{url}/v1", api_key="none", temperature=0, max_tokens=12)
    text = model.invoke("What is photosynthesis?").content
    assert text and "".join(chunk.content for chunk in model.stream("What is photosynthesis?")) == text
    assert [m.content for m in model.batch(["What is photosynthesis?"] * 3)] == [text] * 3
    schema = {"title": "Age", "type": "object", "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
              "required": ["age"], "additionalProperties": False}  # fmt: skip
    plain = ChatOpenAI(model="tiny", base_url=f"{url}/v1", api_key="none", temperature=0)
    assert 0 <= plain.with_structured_output(schema, method="json_schema").invoke("How old?")["age"] <= 99
    assert 0 <= plain.with_structured_output(schema, method="function_calling").invoke("How old?")["age"] <= 99


# --- the openai package, validating ---------------------------------------------------------------------------


def test_every_response_fits_openais_types(client: openai.OpenAI) -> None:
    """The client does not validate what it receives; its models do when asked to, in strict mode."""

    def check(model: type, raw: str) -> Any:
        parsed = model.model_validate_json(raw, strict=True)
        # Beyond OpenAI's own fields there is nothing.
        assert not {name for name in parsed.model_extra or {} if name not in ("usage",)}, parsed.model_extra
        return parsed

    fields = dict(model="tiny", max_tokens=6, temperature=1, seed=0, n=2)
    bound = {"type": "function", "function": {"name": "get_weather", "parameters": {
        "type": "object", "properties": {"days": {"type": "integer", "minimum": 0, "maximum": 9}}}}}  # fmt: skip
    chats: list[dict[str, Any]] = [
        {},
        {"logprobs": True, "top_logprobs": 2},
        {"tools": [WEATHER], "tool_choice": "none"},
        {"tools": [bound], "tool_choice": "required", "max_tokens": 120},
        {"response_format": {"type": "json_object"}},
    ]
    for chat in chats:
        body = {"messages": QUESTION, **fields, **chat}
        check(ChatCompletion, client.chat.completions.with_raw_response.create(**body).text)
        with client.chat.completions.with_streaming_response.create(
            **body, stream=True, stream_options={"include_usage": True}
        ) as response:
            lines = [line for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        chunks = [check(ChatCompletionChunk, line.removeprefix("data: ")) for line in lines[:-1]]
        assert chunks[-1].usage and not chunks[-1].choices
    for text in ({}, {"logprobs": 2}, {"echo": True, "logprobs": 0, "max_tokens": 0}):
        body = {"prompt": "光合", **fields, **text}
        raw = client.completions.with_raw_response.create(**body).text
        if "echo" not in text:  # OpenAI's type has no null, which its API gives for an echoed first token
            check(Completion, raw)
        with client.completions.with_streaming_response.create(**body, stream=True) as response:
            lines = [line for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        if "echo" not in text:
            for line in lines[:-1]:
                # The legacy type requires a finish_reason, which no server has in the middle of a stream.
                chunk = json.loads(line.removeprefix("data: "))
                for choice in chunk["choices"]:
                    choice["finish_reason"] = choice["finish_reason"] or "stop"
                check(Completion, json.dumps(chunk))


# --- Schemathesis on the OpenAPI document ---------------------------------------------------------------------


@schemathesis.check
def errors_have_openais_shape(ctx: Any, response: Any, case: Any) -> None:
    if response.status_code >= 400:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and 0 < len(error["message"]) <= 500


@schemathesis.check
def nothing_fails_inside(ctx: Any, response: Any, case: Any) -> None:
    assert response.status_code < 500, response.text


@pytest.fixture(scope="module")
def documented(model: Any, tokenizer: Any) -> Any:
    engine = TorchEngine(model, model_name="tiny", vocab_limit=len(tokenizer))
    app = create_app(engine, tokenizer, "tiny", default_max_tokens=2)
    with serving(app) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")

        @schema.hook
        def map_body(ctx: Any, body: Any) -> Any:
            """Short answers: what is tested is the way there."""
            if isinstance(body, dict):
                for name, most in (("max_tokens", 3), ("max_completion_tokens", 3), ("n", 2)):
                    if isinstance(body.get(name), int):
                        body[name] = min(body[name], most)
            return body

        yield schema
    engine.close()


CHECKS = [
    status_code_conformance, content_type_conformance, response_schema_conformance, response_headers_conformance,
    errors_have_openais_shape, nothing_fails_inside,
]  # fmt: skip


def check_operations(schema: Any, max_examples: int) -> None:
    """Requests generated from the document, for every operation in it."""
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 8
    for operation in operations:

        @settings(max_examples=max_examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(case=operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS)

        check()


def test_openapi_document(documented: Any) -> None:
    check_operations(documented, 6)


@pytest.mark.slow
def test_openapi_document_thoroughly(documented: Any) -> None:
    check_operations(documented, 400)
