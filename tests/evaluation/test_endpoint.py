"""The same questions to a server and to the checkpoint: our own server, and a plain one over transformers."""

import json
import shutil
from pathlib import Path

import pytest
from fastapi import FastAPI
from openai.types.chat import ChatCompletionMessage
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import eval_model
from smolkit.checkpoints import load_tokenizer
from smolkit.errors import UserError
from smolkit.evaluation import exam, likelihoods
from smolkit.evaluation.endpoint import ServedModel, reply_text
from smolkit.evaluation.subjects import LocalModel, Prompt, load_model
from smolkit.openai_api import create_app
from smolkit.serving import load_engine, serving, stop_ids_of

USER = {"role": "user", "content": "Who is Ada?"}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
PROMPTS = [
    Prompt([USER]),
    Prompt([{"role": "system", "content": "Be brief."}, USER]),
    Prompt([USER], tools=[TOOL]),
    Prompt(text="The job of"),
    Prompt(text="The job of Ada is", stop=("a", "e")),
]


def test_a_server_replies_what_the_checkpoint_replies(
    ours: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = LocalModel(model, tokenizer).replies(PROMPTS, 24)
    assert expected[-1].ended and not expected[-2].ended
    for known in (tokenizer, None):
        replies = ServedModel(ours, "secret", tokenizer=known).replies(PROMPTS, 24)
        assert [(r.text, r.ended) for r in replies] == [(e.text, e.ended) for e in expected]
    assert all(reply.output_ids is None for reply in replies)


def test_replies_end_at_the_ids_of_generation_config_on_both_sides(
    checkpoint: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """As of a public checkpoint that ends its turns with a token that its tokenizer does not call eos."""
    long = LocalModel(model, tokenizer).replies(PROMPTS[:1], 24)[0].output_ids
    end = next(token for token in long[3:] if long.index(token) > 2)
    shutil.copytree(checkpoint, tmp_path / "toy")
    GenerationConfig(eos_token_id=[end]).save_pretrained(tmp_path / "toy")
    own = load_tokenizer(tmp_path / "toy")
    engine = load_engine(tmp_path / "toy", own, model_name="toy", dtype="fp32")
    try:
        with serving(create_app(engine, own, "toy", stop_ids=stop_ids_of(tmp_path / "toy", own))) as url:
            expected = [(reply.text, reply.ended) for reply in ServedModel(url).replies(PROMPTS, 24)]
    finally:
        engine.close()
    for implementation in ("smol", "transformers"):
        found = LocalModel(load_model(tmp_path / "toy", own, implementation), own).replies(PROMPTS, 24)
        assert [(reply.text, reply.ended) for reply in found] == expected
        assert found[0].output_ids == long[: long.index(end) + 1] and found[0].ended


def test_samples_follow_the_seed(ours: str) -> None:
    endpoint = ServedModel(ours, "secret")
    first, again, other = (endpoint.replies(PROMPTS[:1] * 3, 12, temperature=1.0, seed=seed) for seed in (5, 5, 6))
    assert first == again and first[1:] == other[:2]
    assert len({reply.text for reply in first}) > 1


def test_a_server_scores_what_the_checkpoint_scores(
    plain: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    endpoint, local = ServedModel(plain, tokenizer=tokenizer, concurrency=2), LocalModel(model, tokenizer)
    texts = [("Ada", "a"), ("Ada", "bc"), ("世界。", "a"), ("世界。", "bc")]
    pairs = [{"prompt": [USER], "chosen": [answer(good)], "rejected": [answer(bad)]} for good, bad in texts]
    questions = [{"question": "The job of Ada is", "choices": ["baker.", "smith"], "answer": 0}] * 6
    for measured in (
        lambda subject: likelihoods.preference_results(subject, pairs),
        lambda subject: likelihoods.choice_results("mc", questions, subject),
        lambda subject: likelihoods.text_results(subject, ["The job of Ada is baker. " * 9, "你好"], context=16),
    ):
        there, here = measured(endpoint).figures, measured(local).figures
        assert {n: f.value for n, f in there.items()} == pytest.approx({n: f.value for n, f in here.items()}, rel=1e-4)


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


def test_the_script_gives_the_same_figures_for_server_checkpoint_and_transformers(
    ours: str, checkpoint: Path, tmp_path: Path
) -> None:
    questions = tmp_path / "exam.jsonl"
    rows = [
        {"id": "1", "kind": "qa", "language": "en", "messages": [USER], "answer": "x"},
        {"id": "2", "kind": "tool", "language": "en", "messages": [USER], "tools": [TOOL], "answer": "x"},
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps({"prompt": "The job of", "answer": "baker", "match": "contains", "stop": ["."]}) + "\n")
    common = ["--exam", str(questions), "--generation", str(tasks), "--max_new_tokens", "16"]
    found = []
    for number, subject in enumerate(
        (
            ["--endpoint", ours, "--api_key", "secret"],
            ["--model_path", str(checkpoint), "--device", "cpu"],
            ["--model_path", str(checkpoint), "--device", "cpu", "--implementation", "transformers"],
        )
    ):
        out = tmp_path / str(number)
        others = ["--compare_with", str(tmp_path / "0" / "answers.jsonl")] if number else []
        eval_model.main([*subject, *common, *others, "--output_dir", str(out)])
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics.pop("settings").get("api_key") is None, "a key is no setting to write down"
        assert metrics.pop("same_greedy_answers", 1.0) == 1.0
        for name in ("intervals", "data", "checksums"):
            metrics[name].pop("same_greedy_answers", None)
        found.append({n: v for n, v in metrics.items() if n not in ("seconds", "shares", "same_greedy_answers_n")})
    assert found[0] == found[1] == found[2]
    assert found[0]["tasks_characters"] > 0


# --- what can go wrong --------------------------------------------------------------------------------------


def test_no_server_a_wrong_key_and_a_wrong_model_are_named(ours: str, plain: str) -> None:
    with pytest.raises(UserError, match="no server answers at http://127.0.0.1:9/v1"):
        ServedModel("http://127.0.0.1:9")
    with pytest.raises(UserError, match="refused: .*API key"):
        ServedModel(ours, "wrong")
    with pytest.raises(UserError, match="--model gpt: .* serves toy"):
        ServedModel(plain, model="gpt")
    assert ServedModel(f"{plain}/v1/").url == f"{plain}/v1"


def test_a_refused_request_is_named(ours: str) -> None:
    with pytest.raises(UserError, match="refused: .*context is 256 tokens"):
        ServedModel(ours, "secret").replies([Prompt([{"role": "user", "content": "long " * 300}])], 4)


def test_log_probabilities_need_a_tokenizer_and_a_context(plain: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="--tokenizer_path"):
        likelihoods.text_results(ServedModel(plain), ["text"])
    with pytest.raises(UserError, match="give --context"):
        likelihoods.text_results(ServedModel(plain, tokenizer=tokenizer), ["text"])


def test_a_server_that_does_not_echo_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> dict:
        return {"object": "list", "data": [{"id": "mute", "object": "model", "created": 0, "owned_by": "x"}]}

    @app.post("/v1/completions")
    def completions() -> dict:
        choice = {"index": 0, "text": "a", "finish_reason": "length", "logprobs": None}
        return {"id": "1", "object": "text_completion", "created": 0, "model": "mute", "choices": [choice]}

    with serving(app) as url, pytest.raises(UserError, match="does not echo prompts"):
        ServedModel(url, tokenizer=tokenizer).log_probs([([1, 2, 3], [0, 1, 1])])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exam", "x"], "--endpoint needs --output_dir"),
        (["--text", "x", "--output_dir", "o"], "--text over an endpoint needs the model's tokenizer"),
        (["--exam", "x", "--output_dir", "o", "--adapter", "a"], "--adapter is for --model_path"),
        (["--exam", "x", "--output_dir", "o", "--dtype", "bf16"], "--dtype is for --model_path"),
        (["--exam", "x", "--output_dir", "o", "--batch_size", "4"], "--batch_size is for --model_path"),
        (["--exam", "x", "--output_dir", "o", "--context", "7"], "--context is for --text"),
        (["--exam", "x", "--output_dir", "o", "--model_path", "m"], "either --model_path DIR or --endpoint URL"),
    ],
)
def test_arguments_that_do_not_fit_an_endpoint(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        eval_model.main(["--endpoint", "http://127.0.0.1:9", *arguments])


def test_tool_calls_of_a_server_are_read_like_those_of_a_checkpoint() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "好", "b": 1}'}}]
    message = ChatCompletionMessage.model_validate({"role": "assistant", "content": "Let me see.", "tool_calls": calls})
    call = '<tool_call>\n{"name": "f", "arguments": {"a": "好", "b": 1}}\n</tool_call>'
    assert reply_text(message) == f"Let me see.\n{call}"
    assert exam.judge({"name": "f", "arguments": {"b": 1, "a": "好"}}, reply_text(message))["exact"]
    calls[0]["function"]["arguments"] = '{"a": '
    broken = ChatCompletionMessage.model_validate({"role": "assistant", "content": None, "tool_calls": calls})
    assert not exam.judge({"name": "f", "arguments": {}}, reply_text(broken))["parses"]
