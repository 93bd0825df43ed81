"""Log-probabilities against naive loops; text, pairs and multiple choice on top of them."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smolkit.chat import encode_text, render, save_tokenizer
from smolkit.checkpoints import load_tokenizer
from smolkit.errors import UserError
from smolkit.evaluation import likelihoods, subjects
from smolkit.quantize import quantize


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
        monkeypatch.setattr(subjects, "LOGITS_PER_BATCH", positions * vocabulary)
        assert subjects.sum_log_probs(model, rows, pad_id=0) == pytest.approx(expected, abs=1e-4)


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
    metrics = likelihoods.preference_results(subjects.LocalModel(model, tokenizer), pairs).metrics()
    assert metrics["preference_accuracy"] == 0.5 and metrics["preference_accuracy_n"] == 20
    best = max(answers, key=likelihood.get)
    wins = [pair for pair in pairs if pair["chosen"] == [reply(best)]]
    metrics = likelihoods.preference_results(subjects.LocalModel(model, tokenizer), wins).metrics()
    others = [likelihood[answer] for answer in answers if answer != best]
    assert metrics["preference_accuracy"] == 1.0
    assert metrics["preference_margin"] == pytest.approx(likelihood[best] - sum(others) / 4, abs=1e-3)


def reply(text: str) -> dict:
    return {"role": "assistant", "content": text}


def test_a_uniform_model_needs_log_v_bits_per_token(
    make_llama: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> None:
    uniform = make_llama(len(tokenizer), tie_word_embeddings=False)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    texts = ["The job of Ada is baker. " * 30, "你好，世界。"]
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    metrics = likelihoods.text_results(subjects.LocalModel(uniform, tokenizer), texts, context=16).metrics()
    assert metrics["text_tokens"] == tokens and metrics["text_bytes"] == size
    assert metrics["bits_per_byte"] == pytest.approx(tokens * math.log2(len(tokenizer)) / size, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(len(tokenizer), rel=1e-5)


def test_a_text_starts_after_what_came_before_it_in_training(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """After the end of a document, even where the tokenizer calls the beginning of a turn BOS, as SmolLM2's does; after
    BOS where the tokenizer puts it before every text, as Llama's does."""
    ids = encode_text(tokenizer, "The job of Ada")
    smollm, llama_like = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    smollm.bos_token = llama_like.bos_token = "<|im_start|>"
    start = llama_like.bos_token_id
    llama_like.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    for used, before in ((tokenizer, end), (smollm, end), (llama_like, start)):
        figures = likelihoods.text_results(subjects.LocalModel(model, used), ["The job of Ada"]).figures
        expected = naive_sum(model, [before, *ids], [0] + [1] * len(ids))
        assert figures["perplexity"].value == pytest.approx(math.exp(-expected / len(ids)), rel=1e-4)


@pytest.mark.parametrize("count", [2, 7, 8, 9, 12, 13, 40])
def test_windows_ask_for_every_token_once_with_half_a_window_before_it(count: int) -> None:
    rows = likelihoods.windows(list(range(count)), context=8)
    asked = [token for ids, mask in rows for token, wanted in zip(ids, mask, strict=True) if wanted]
    assert asked == list(range(1, count))
    for ids, mask in rows:
        assert len(ids) <= 8 and not mask[0]
        first = mask.index(1)
        assert ids[first] < 8 or first >= 4


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
        merged = subjects.load_model(checkpoint, tokenizer, implementation, adapter=tmp_path)
        plain = subjects.load_model(checkpoint, tokenizer, implementation)
        expected = naive_sum(beside, *rows[0])
        assert subjects.sum_log_probs(merged, rows, 0)[0] == pytest.approx(expected, abs=1e-3)
        assert subjects.sum_log_probs(plain, rows, 0)[0] != pytest.approx(expected, abs=1e-1)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_quantised_directories_are_evaluated(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, method: str
) -> None:
    """Both implementations read the same rounded weights, and give about the figures of the original."""
    torch.manual_seed(0)
    shape = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    config = LlamaConfig(**shape, num_attention_heads=2, max_position_embeddings=128, initializer_range=0.1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "exact")
    save_tokenizer(tokenizer, tmp_path / "exact")
    quantize(tmp_path / "exact", tmp_path / method, method)
    own = load_tokenizer(tmp_path / method)
    rows = [(list(range(5, 40)), [0] + [1] * 34)]
    found = {
        name: subjects.LocalModel(subjects.load_model(tmp_path / method, own, name), own)
        for name in ("smol", "transformers")
    }
    sums = {name: subject.log_probs(rows)[0] for name, subject in found.items()}
    exact = subjects.sum_log_probs(LlamaForCausalLM.from_pretrained(tmp_path / "exact").eval(), rows, 0)[0]
    assert sums["smol"] == pytest.approx(sums["transformers"], rel=5e-3) and sums["smol"] != exact
    assert sums["smol"] == pytest.approx(exact, rel=0.05)
    assert all(subject.replies([subjects.Prompt(text="The job")], 4)[0].output_ids for subject in found.values())
    with pytest.raises(UserError, match="cannot be merged into the quantised weights"):
        subjects.load_model(tmp_path / method, own, adapter=tmp_path)


def test_bad_directories_are_named(checkpoint: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        subjects.load_model(tmp_path, tokenizer, "transformers")
    with pytest.raises(UserError, match="not a PEFT adapter"):
        subjects.load_model(checkpoint, tokenizer, "transformers", adapter=tmp_path)


def test_a_prompt_beyond_the_context_is_refused(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    generate = subjects.engine_generate(model, tokenizer, max_new_tokens=250, batch_size=1)
    with pytest.raises(UserError, match="context of 256"):
        generate([[1] * 10])


# --- multiple choice ----------------------------------------------------------------------------------------


QUESTIONS = [
    {"id": "a", "question": "The job of Ada is", "choices": ["baker.", "smith", "job of the baker Ada"], "answer": 2},
    {"question": "你好，", "choices": ["世界。", "Ada"], "answer": "Ada"},
    {"question": "Who? ", "choices": ["Ada is", "baker", "the"], "answer": 2},
]


def test_multiple_choice_by_hand(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """The choice is the ids after those of the question alone; acc by their sum, acc_norm per character."""
    plain, normalised = [], []
    for row in QUESTIONS:
        scores = []
        for choice in row["choices"]:
            context = encode_text(tokenizer, row["question"].rstrip())
            ids = encode_text(tokenizer, row["question"] + " " + choice)
            scores.append(naive_sum(model, ids, [0] * len(context) + [1] * (len(ids) - len(context))))
        per_character = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right = row["choices"].index(row["answer"]) if isinstance(row["answer"], str) else row["answer"]
        plain.append(max(range(len(scores)), key=scores.__getitem__) == right)
        normalised.append(max(range(len(scores)), key=per_character.__getitem__) == right)
    figures = likelihoods.choice_results("mc", QUESTIONS, subjects.LocalModel(model, tokenizer)).figures
    assert list(figures["mc_acc"].items) == ["a", "mc-1", "mc-2"]
    assert list(figures["mc_acc"].items.values()) == plain
    assert list(figures["mc_acc_norm"].items.values()) == normalised
    assert plain != normalised, "the toy model should tell the two apart"


def test_a_choice_in_a_conversation_is_the_reply(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    ids, mask = likelihoods.choice_row(tokenizer, "Who?", "Ada", chat=True)
    whole = render(tokenizer, [{"role": "user", "content": "Who?"}, reply("Ada")])
    assert list(ids) == whole.input_ids[: len(ids)]
    assert [i for i, counts in zip(ids, mask, strict=True) if counts] == encode_text(tokenizer, "Ada")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": "q", "choices": ["a", "b"]}, "no answer"),
        ({"question": " ", "choices": ["a", "b"], "answer": 0}, "question"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "at least two"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "from 0 to 1"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "from 0 to 1"),
        ({"question": "q", "choices": ["a", "b"], "answer": "c"}, "none of the choices"),
        ({"question": "q", "choices": ["a", "b"], "answer": "b"}, None),
    ],
)
def test_bad_questions_are_named(row: dict, problem: str | None) -> None:
    found = likelihoods.problem_of_choice(row)
    assert found is None if problem is None else problem in found
