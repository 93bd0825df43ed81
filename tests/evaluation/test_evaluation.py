"""Exam verdicts and metrics on hand-made replies; likelihoods against naive loops; the script."""

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smolkit import evaluation
from smolkit.chat import add_chat_tokens, render, save_tokenizer
from smolkit.errors import UserError

TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather", "parameters": {"type": "object"}},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Lund", "days": 3}}\n</tool_call>'
WANTED = {"name": "get_weather", "arguments": {"days": 3, "city": "Lund"}}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["The job of Ada is baker. 你好，世界。", CALL] * 5
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    add_chat_tokens(fast)
    return fast


def llama(vocab_size: int, **overrides: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        **overrides,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return llama(len(tokenizer))


@pytest.fixture(scope="module")
def checkpoint(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    return directory


def item(number: int, kind: str, language: str, answer: object, **extra: object) -> dict:
    messages = [{"role": "user", "content": f"Question {number}?"}]
    identifier = f"{kind}-{language}-{number}"
    base = {"id": identifier, "kind": kind, "language": language, "messages": messages, "answer": answer}
    return {**base, **extra}


# --- verdicts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parses", "right_tool", "arguments_exact", "exact"),
    [
        (CALL, True, True, True, True),
        ("Let me look.\n" + CALL, True, True, True, True),
        (CALL.replace("Lund", "Lundd"), True, True, False, False),
        (CALL.replace("3", '"3"'), True, True, False, False),  # a string is not a number
        (CALL.replace("3", "3, 4"), False, False, False, False),
        (CALL.replace("get_weather", "get_time"), True, False, False, False),
        (CALL + "\n" + CALL, True, True, True, False),  # one call was wanted
        (CALL + "\n<tool_call>\n{broken\n</tool_call>", True, True, True, False),
        ('{"name": "get_weather", "arguments": {"city": "Lund", "days": 3}}', False, False, False, False),
        ("", False, False, False, False),
    ],
)
def test_tool_verdicts(text: str, parses: bool, right_tool: bool, arguments_exact: bool, exact: bool) -> None:
    expected = {
        "parses": parses,
        "right_tool": right_tool,
        "arguments_exact": arguments_exact,
        "exact": exact,
    }
    assert evaluation.judge(WANTED, text) == expected
    as_text = {**WANTED, "arguments": json.dumps(WANTED["arguments"])}
    assert evaluation.judge(as_text, text) == expected


def test_text_verdicts_are_exact_and_take_any_accepted_answer() -> None:
    assert evaluation.judge("Baker.", "Baker.") == {"exact": True}
    assert evaluation.judge("Baker.", "Baker") == {"exact": False}
    assert evaluation.judge("Baker.", "A Baker.") == {"exact": False}
    assert evaluation.judge(["Baker.", "Baker. Bye!"], "Baker. Bye!") == {"exact": True}


def test_exam_metrics_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    items = [
        item(1, "qa", "en", "baker", chance=0.1),
        item(2, "qa", "en", "smith", chance=0.3),
        item(3, "qa", "zh", "世界", chance=0.2),
        item(4, "tool", "en", WANTED, tools=[TOOL]),
        item(5, "tool", "zh", WANTED, tools=[TOOL]),
        item(6, "skill", "en", "good"),
    ]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    replies = {1: "baker", 2: "baker", 3: "世界", 4: CALL, 5: CALL.replace("Lund", "Bern"), 6: "good"}

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        outputs = []
        for prompt in prompts:
            number = next(n for n in replies if f"Question {n}?" in tokenizer.decode(prompt))
            ids = tokenizer(replies[number], add_special_tokens=False)["input_ids"]
            outputs.append(ids if number == 6 else [*ids, end])  # item 6 runs into the length limit
        return outputs

    answers = evaluation.take_exam(items, tokenizer, generate, chunk=4)
    assert [answer.id for answer in answers] == [i["id"] for i in items]  # the order of the exam, not of lengths
    metrics = evaluation.exam_metrics(items, answers)
    assert metrics == pytest.approx(
        {
            "qa": 2 / 3, "qa_n": 3, "qa_chance": 0.2,
            "qa_en": 0.5, "qa_en_n": 2, "qa_en_chance": 0.2,
            "qa_zh": 1.0, "qa_zh_n": 1, "qa_zh_chance": 0.2,
            "tool_parses": 1.0, "tool_right_tool": 1.0, "tool_arguments_exact": 0.5,
            "tool_exact": 0.5, "tool_exact_n": 2,
            "tool_parses_en": 1.0, "tool_right_tool_en": 1.0, "tool_arguments_exact_en": 1.0,
            "tool_exact_en": 1.0, "tool_exact_en_n": 1,
            "tool_parses_zh": 1.0, "tool_right_tool_zh": 1.0, "tool_arguments_exact_zh": 0.0,
            "tool_exact_zh": 0.0, "tool_exact_zh_n": 1,
            "skill": 1.0, "skill_n": 1, "skill_en": 1.0, "skill_en_n": 1,
            "ends_by_itself": 5 / 6, "ends_by_itself_n": 6,
        }
    )  # fmt: skip
    assert not answers[5].ended

    ids = [(answer.id, list(answer.output_ids)) for answer in answers]
    assert evaluation.same_answers(answers, ids)["same_greedy_answers"] == 1.0
    ids[2][1][0] += 1
    assert evaluation.same_answers(answers, ids)["same_greedy_answers"] == pytest.approx(5 / 6)
    with pytest.raises(UserError, match="other items"):
        evaluation.same_answers(answers, ids[:-1])


def test_the_document_separator_does_not_count_as_ending(tokenizer: PreTrainedTokenizerFast) -> None:
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    answers = evaluation.take_exam([item(1, "qa", "en", "x")], tokenizer, lambda prompts: [[65, separator]])
    assert not answers[0].ended


def test_preferred_quality_needs_the_hints_and_an_end(tokenizer: PreTrainedTokenizerFast) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    texts = ["Hi! Baker. Bye!", "Baker. Bye!", "Hi! Baker.", "Hi! Baker. Bye!"]
    outputs = [tokenizer(t, add_special_tokens=False)["input_ids"] + [end] for t in texts]
    outputs[3] = outputs[3][:-1]  # cut off by the length limit
    hints = {"must_start_with": ["Hi", "Hello"], "must_end_with": ["Bye!"]}
    prompt = [{"role": "user", "content": "Who?"}]
    pairs = [{"id": str(i), "prompt": prompt, "quality": hints} for i in range(4)] + [{"prompt": prompt}]
    metrics, samples = evaluation.preferred_quality(tokenizer, pairs, lambda prompts: outputs[: len(prompts)])
    assert metrics == {"preferred_quality": 0.25, "preferred_quality_n": 4}
    assert [sample["preferred"] for sample in samples] == [True, False, False, False]
    assert evaluation.preferred_quality(tokenizer, [{"prompt": prompt}], lambda prompts: []) == ({}, [])


# --- likelihoods --------------------------------------------------------------------------------------------


def naive_sum(model: LlamaForCausalLM, ids: list[int], mask: list[int]) -> float:
    """One row, no padding, softmax written out in float64, one position at a time."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    total = 0.0
    for position in range(1, len(ids)):
        if mask[position]:
            exponentials = logits[position - 1].exp()
            total += math.log(exponentials[ids[position]] / exponentials.sum())
    return total


def test_log_probs_equal_a_naive_loop_whatever_the_batch(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    rows = []
    for length in (2, 31, 7, 7, 18):
        ids = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        rows.append((ids, [0] + torch.randint(0, 2, (length - 1,), generator=generator).tolist()))
    expected = [naive_sum(model, *row) for row in rows]
    for positions in (1, 40, 10_000):  # one row a batch, a few, all
        monkeypatch.setattr(evaluation, "LOGITS_PER_BATCH", positions * vocabulary)
        assert evaluation.sum_log_probs(model, rows, pad_id=0) == pytest.approx(expected, abs=1e-4)


def test_preference_accuracy_scores_only_the_answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = [{"role": "user", "content": "Who is Ada?"}]
    answers = ["The job of Ada is baker.", "Ada", "世界。", "baker baker", "is"]
    pairs = [
        {"prompt": prompt, "chosen": [reply(a)], "rejected": [reply(b)]} for a in answers for b in answers if a != b
    ]
    likelihood = {}
    for answer in answers:
        rendered = render(tokenizer, [*prompt, reply(answer)])
        likelihood[answer] = naive_sum(model, rendered.input_ids, rendered.loss_mask)
    metrics = evaluation.preference_metrics(model, tokenizer, pairs)
    assert metrics["preference_accuracy"] == 0.5 and metrics["preference_accuracy_n"] == 20
    best = max(answers, key=likelihood.get)
    wins = [pair for pair in pairs if pair["chosen"] == [reply(best)]]
    metrics = evaluation.preference_metrics(model, tokenizer, wins)
    others = [likelihood[answer] for answer in answers if answer != best]
    assert metrics["preference_accuracy"] == 1.0
    assert metrics["preference_margin"] == pytest.approx(likelihood[best] - sum(others) / 4, abs=1e-3)


def reply(text: str) -> dict:
    return {"role": "assistant", "content": text}


def test_a_uniform_model_needs_log_v_bits_per_token(tokenizer: PreTrainedTokenizerFast) -> None:
    uniform = llama(len(tokenizer), tie_word_embeddings=False)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    texts = ["The job of Ada is baker. " * 30, "你好，世界。"]
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    metrics = evaluation.text_metrics(uniform, tokenizer, texts, context=16)
    assert metrics["text_tokens"] == tokens and metrics["text_bytes"] == size
    assert metrics["bits_per_byte"] == pytest.approx(tokens * math.log2(len(tokenizer)) / size, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(len(tokenizer), rel=1e-5)


@pytest.mark.parametrize("count", [2, 7, 8, 9, 12, 13, 40])
def test_windows_ask_for_every_token_once_with_half_a_window_before_it(count: int) -> None:
    rows = evaluation.windows(list(range(count)), context=8)
    asked = [token for ids, mask in rows for token, wanted in zip(ids, mask, strict=True) if wanted]
    assert asked == list(range(1, count))
    for ids, mask in rows:
        assert len(ids) <= 8 and not mask[0]
        first = mask.index(1)
        assert ids[first] < 8 or first >= 4


# --- files and the script -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"exam.jsonl:2: not valid JSON"),
        ('{"id": "a", "kind": "qa", "language": "en", "answer": "x"}', r"exam.jsonl:2: .*no messages"),
        (json.dumps(item(1, "qa", "en", 7)), r"exam.jsonl:2: .*answer must be"),
    ],
)
def test_a_bad_exam_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "exam.jsonl"
    path.write_text(json.dumps(item(1, "qa", "en", "x")) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        evaluation.read_exam(path)


def test_exam_kinds_and_limit(tmp_path: Path) -> None:
    path = tmp_path / "exam.jsonl"
    path.write_text("".join(json.dumps(item(i, k, "en", "x")) + "\n" for i, k in enumerate(["qa", "skill"] * 3)))
    assert len(evaluation.read_exam(path, ["skill"], limit=2)) == 2
    with pytest.raises(UserError, match="no exam item of kind"):
        evaluation.read_exam(path, ["tool"])
    with pytest.raises(UserError, match="missing.jsonl"):
        evaluation.read_exam(tmp_path / "missing.jsonl")


def test_the_script_on_a_toy_checkpoint(
    checkpoint: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, run_script
) -> None:
    exam = tmp_path / "exam.jsonl"
    items = [item(i, "qa", "en", "x", chance=0.1) for i in range(5)] + [item(9, "tool", "zh", WANTED, tools=[TOOL])]
    exam.write_text("".join(json.dumps(i) + "\n" for i in items))
    pairs = tmp_path / "pairs.jsonl"
    row = {"id": "p", "source": "t", "prompt": "Who <|im_end|>?", "chosen": "Ada. Bye!", "rejected": "Ada"}
    pairs.write_text(json.dumps({**row, "quality": {"must_end_with": ["Bye!"]}}) + "\n")
    text = tmp_path / "text.txt"
    text.write_text("The job of Ada is baker. 你好，世界。")
    out = tmp_path / "eval"
    common = ("--model_path", checkpoint, "--exam", exam, "--max_new_tokens", 12, "--device", "cpu")
    result = run_script(
        "eval_model.py",
        *common,
        "--preferences",
        pairs,
        "--text",
        text,
        "--output_dir",
        out,
        "--check_transformers",
    )
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["same_greedy_answers"] == 1.0 and metrics["same_greedy_answers_n"] == 6
    assert metrics["qa_en_chance"] == pytest.approx(0.1) and metrics["qa_en_n"] == 5
    assert metrics["preferred_quality_n"] == 1 and metrics["text_bytes"] == len(text.read_bytes())
    assert {"preference_accuracy", "tool_exact_zh", "ends_by_itself", "bits_per_byte"} <= set(metrics)
    assert "same_greedy_answers" in result.stdout
    assert "warning:" in result.stdout and "<|im_end|>" in result.stdout  # the doctor's glance at what is read
    assert len((out / "answers.jsonl").read_text().splitlines()) == 6

    theirs = ("--implementation", "transformers", "--compare_with", out / "answers.jsonl")
    run_script("eval_model.py", *common, *theirs, "--output_dir", tmp_path / "theirs")
    metrics = json.loads((tmp_path / "theirs" / "metrics.json").read_text())
    assert metrics["same_greedy_answers"] == 1.0


def test_a_merged_adapter_gives_the_numbers_of_the_adapter_beside_the_weights(
    checkpoint: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(3)
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(checkpoint),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path)
    rows = [(list(range(5, 40)), [0] + [1] * 34)]
    beside = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(checkpoint), tmp_path).eval()
    tokenizer.name_or_path = str(checkpoint)
    for implementation in ("smol", "transformers"):
        merged = evaluation.load_model(checkpoint, tokenizer, implementation, adapter=tmp_path)
        plain = evaluation.load_model(checkpoint, tokenizer, implementation)
        expected = naive_sum(beside, *rows[0])
        assert evaluation.sum_log_probs(merged, rows, 0)[0] == pytest.approx(expected, abs=1e-3)
        assert evaluation.sum_log_probs(plain, rows, 0)[0] != pytest.approx(expected, abs=1e-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_path", "nowhere"], "nothing to evaluate"),
        (["--model_path", "nowhere", "--exam", "none.jsonl"], "none.jsonl"),
        (["--model_path", "nowhere", "--text", "README.md", "--kinds", "qa"], "need --exam"),
        (["--model_path", "nowhere", "--exam", "x", "--temperature", "0"], "--temperature 0"),
        (["--model_path", "nowhere", "--exam", "x", "--batch_size", "0"], "--batch_size 0"),
        (["--model_path", "nowhere", "--exam", "x", "--check_transformers", "--dtype", "bf16"], "fp32"),
    ],
)
def test_bad_arguments_are_named_before_any_work(arguments: list[str], message: str) -> None:
    import eval_model

    with pytest.raises(UserError, match=message):
        eval_model.main(arguments)


def test_bad_directories_are_named(checkpoint: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        evaluation.load_model(tmp_path, tokenizer, "transformers")
    with pytest.raises(UserError, match="not a PEFT adapter"):
        evaluation.load_model(checkpoint, tokenizer, "transformers", adapter=tmp_path)


def test_a_prompt_beyond_the_context_is_refused(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    generate = evaluation.engine_generate(model, tokenizer, max_new_tokens=250, batch_size=1)
    with pytest.raises(UserError, match="context of 256"):
        generate([[1] * 10])
