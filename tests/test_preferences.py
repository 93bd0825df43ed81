"""DPO in full: every loss, the kept reference, adapters instead of a second model, lengths of both sides."""

import json
import math
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl.trainer import utils as trl_utils
from trl.trainer.utils import add_fused_lm_head

import smol_kernels
import train_dpo
import train_lora
import train_tokenizer
from smol_config import SmolConfig
from smol_model import SmolForCausalLM, SmolModel
from smolkit import preferences
from smolkit.checkpoints import load_tokenizer, save_final
from smolkit.errors import UserError
from smolkit.pairs import unpadded
from smolkit.scores import TokenScores, scored_positions

WORDS = "the a cat dog sat on mat with red blue house of tree and ran fast slow very big small".split()
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def sentence(random: np.random.Generator) -> str:
    return " ".join(random.choice(WORDS, random.integers(3, 12))) + "."


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Pairs, conversations, a tokenizer, and a dense and a MoE checkpoint with random weights."""
    folder, random = tmp_path_factory.mktemp("preferences"), np.random.default_rng(0)
    pairs = [
        {"prompt": sentence(random), "chosen": "Gladly: " + sentence(random), "rejected": sentence(random)}
        for _ in range(16)
    ]
    write(folder / "dpo.jsonl", pairs)
    turns = [[("user", sentence(random)), ("assistant", sentence(random))] for _ in range(16)]
    write(
        folder / "sft.jsonl",
        [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns],
    )
    write(folder / "text.jsonl", [{"text": sentence(random)} for _ in range(60)])
    train_tokenizer.main(
        f"--mode train --data_path {folder}/text.jsonl --vocab_size 320 --save_dir {folder}/tokenizer".split()
    )
    tokenizer = load_tokenizer(folder / "tokenizer")
    for name, more in (("dense", {}), ("moe", MOE)):
        torch.manual_seed(1)
        config = SmolConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            **more,
        )
        model = SmolForCausalLM(config)
        save_final(model, model.state_dict(), tokenizer, folder / name, torch.float32, "card")
    return folder


def run(main, home: Path, output: Path, line: str) -> Path:
    data = "dpo" if main is train_dpo.main else "sft"
    main(
        f"""--data_path {home}/{data}.jsonl --output_dir {output} --max_length 128 --max_steps 2 --logging_steps 1
        --per_device_train_batch_size 4 --weights_dtype fp32 --learning_rate 1e-2 --disable_tqdm true
        --save_strategy no --warmup_steps 0 {line}""".split()
    )
    return output


def metrics(directory: Path, name: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


IDS = torch.arange(5, 25)[None]


def test_the_reference_is_kept_by_content(home, tmp_path, capsys) -> None:
    """The same pairs and model: read; another model or length: computed anew; a damaged file: as if absent."""
    cache = tmp_path / "cache"
    again = f"--model_path {home}/dense --data_cache_dir {cache} --resume never"

    def kept() -> set[Path]:
        return set((cache / "reference").glob("*.safetensors"))

    first = run(train_dpo.main, home, tmp_path / "a", again)
    (file,) = kept()
    assert str(file) not in capsys.readouterr().out
    second = run(train_dpo.main, home, tmp_path / "b", again)
    assert f"the reference's log-probabilities are those of {file}" in capsys.readouterr().out
    assert metrics(first) == metrics(second)
    assert metrics(first, "logps/chosen") == metrics(second, "logps/chosen")

    file.write_bytes(file.read_bytes()[:20])
    run(train_dpo.main, home, tmp_path / "b", again)
    assert "those of" not in capsys.readouterr().out
    run(train_dpo.main, home, tmp_path / "c", f"{again} --model_path {home}/moe")
    run(train_dpo.main, home, tmp_path / "d", f"{again} --max_length 96")
    assert len(kept()) == 3


def test_the_reference_is_rounded_as_the_policy_is(home, tmp_path, capsys) -> None:
    """Kept for bf16 and for fp32 apart, though the weights are the same: both begin at ln 2."""
    line = f"--model_path {home}/dense --data_cache_dir {tmp_path}/cache"
    for name, more in (("bf16", "--bf16 true"), ("fp32", "")):
        output = run(train_dpo.main, home, tmp_path / name, f"{line} {more}")
        text = capsys.readouterr().out
        assert "log-probabilities are those of" not in text
        assert float(re.search(r"largest log-ratio (\S+)\)", text).group(1)) < 1e-5
        assert metrics(output)[0] == pytest.approx(np.log(2), rel=1e-6)


def test_the_hash_covers_all_it_depends_on(home, tmp_path) -> None:
    pairs = Dataset.from_dict({"prompt_ids": [[1, 2]], "chosen_ids": [[3, 4]], "rejected_ids": [[5]]})
    moved = Dataset.from_dict({"prompt_ids": [[1, 2, 3]], "chosen_ids": [[4]], "rejected_ids": [[5]]})
    name = preferences.content_hash([home / "dense"], pairs, max_length=8)
    assert name == preferences.content_hash([home / "dense"], pairs, max_length=8)
    others = [
        preferences.content_hash([home / "moe"], pairs, max_length=8),
        preferences.content_hash([home / "dense"], moved, max_length=8),
        preferences.content_hash([home / "dense"], pairs, max_length=9),
    ]
    assert len({name, *others}) == 4
    file = preferences.reference_file(tmp_path, name)
    assert preferences.load_reference(file, 1) is None
    assert preferences.save_reference(file, ([-1.5], [-2.5]))
    assert preferences.load_reference(file, 1) == ([-1.5], [-2.5])
    assert preferences.load_reference(file, 2) is None


def test_lengths_of_both_sides() -> None:
    text = preferences.describe_lengths({"chosen": np.array([10, 30]), "rejected": np.array([10, 10])})
    assert "chosen 20 tokens on average (median 20, 95 % up to 29, longest 30)" in text
    assert "chosen is longer in 50% of the pairs" in text
    assert "chosen answers are 2.0 times as long" in text
    assert "warning" not in preferences.describe_lengths({"chosen": np.array([10]), "rejected": np.array([11])})


@pytest.mark.parametrize("precompute", ["true", "false"])
def test_an_adapter_needs_no_second_model(home, tmp_path, capsys, precompute, monkeypatch) -> None:
    built = []
    original = train_dpo.build_model
    monkeypatch.setattr(train_dpo, "build_model", lambda *args: built.append(args) or original(*args))
    before = (home / "dense" / "model.safetensors").read_bytes()
    line = f"--model_path {home}/dense --use_lora --merge --lora_r 4 --precompute_ref_log_probs {precompute}"
    output = run(train_dpo.main, home, tmp_path / "out", line)
    text = capsys.readouterr().out
    assert "policy and reference agree before step 1" in text and "chosen is longer in" in text
    assert not built, "no second model"
    assert metrics(output)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics(output)[1] < math.log(2)
    assert metrics(output, "lengths/chosen")[0] > metrics(output, "lengths/rejected")[0]
    assert (home / "dense" / "model.safetensors").read_bytes() == before
    base = AutoModelForCausalLM.from_pretrained(home / "dense", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, output)(IDS).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out-merged", dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-6)


def test_an_adapter_is_trained_on_against_itself(home, tmp_path) -> None:
    """The policy starts as the fine-tuned adapter, and so does the reference: not as the base below it."""
    tuned = run(train_lora.main, home, tmp_path / "sft", f"--base_model {home}/dense --lora_r 4")
    output = run(train_dpo.main, home, tmp_path / "dpo", f"--model_path {tuned}")
    assert metrics(output)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert sorted(path.name for path in output.glob("**/*.safetensors")) == ["adapter_model.safetensors"]
    old, new = (load_file(path / "adapter_model.safetensors") for path in (tuned, output))
    assert old.keys() == new.keys()
    assert any(not torch.equal(old[name], new[name]) for name in old)
    with pytest.raises(UserError, match="is an adapter already"):
        run(train_dpo.main, home, tmp_path / "no", f"--model_path {tuned} --use_lora")


def test_a_policy_that_differs_from_its_reference_is_found_under_an_adapter(home, tmp_path, monkeypatch) -> None:
    """The check must see the policy with its adapter on, or it would compare the reference with itself."""
    log_probs = train_dpo.PreferenceTrainer._precompute_ref_logps

    def disturb(self, *args):
        result = log_probs(self, *args)
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.1)
        return result

    monkeypatch.setattr(train_dpo.PreferenceTrainer, "_precompute_ref_logps", disturb)
    with pytest.raises(UserError, match="disagree before step 1"):
        run(train_dpo.main, home, tmp_path / "out", f"--model_path {home}/dense --use_lora")


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("dense", "--lora_target all-linear"),
        ("moe", "--lora_target all-linear experts"),
        *(pytest.param(kind, "--use_rslora true", marks=pytest.mark.slow) for kind in ("dense", "moe")),
        *(pytest.param(kind, "--use_dora true", marks=pytest.mark.slow) for kind in ("dense", "moe")),
        pytest.param("moe", "--lora_target experts", marks=pytest.mark.slow),
    ],
)
def test_adapters_load_on_both_models_and_merge_exactly(home, tmp_path, kind, flags) -> None:
    """Rectangular projections, fused experts: trained on ours, the same logits on transformers' model and merged."""
    output = run(train_lora.main, home, tmp_path / "out", f"--base_model {home}/{kind} --lora_r 4 --merge {flags}")
    config = SmolConfig.from_pretrained(home / kind)
    logits = {}
    for name, load in (("theirs", AutoModelForCausalLM.from_pretrained), ("ours", SmolForCausalLM.from_pretrained)):
        base = load(home / kind, dtype=torch.float32).eval()
        plain = base(IDS).logits
        logits[name] = PeftModel.from_pretrained(base, output).eval()(IDS).logits
        assert (logits[name] - plain).abs().max() > 1e-3
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out-merged", dtype=torch.float32)
    logits["merged"] = merged(IDS).logits
    assert merged.config.model_type == config.native_type()
    for name in ("ours", "merged"):
        torch.testing.assert_close(logits[name], logits["theirs"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_adapters_made_on_transformers_models_load_on_ours(home, tmp_path, kind) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_pretrained(home / kind, dtype=torch.float32)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if kind == "moe" else None
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "o_proj"], target_parameters=experts)
    adapted = get_peft_model(theirs, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    ours = SmolForCausalLM.from_pretrained(home / kind, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(ours, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(IDS).logits, adapted(IDS).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("main", [train_lora.main, train_dpo.main])
def test_four_bits_need_a_gpu(home, tmp_path, main, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--qlora needs a CUDA GPU"):
        run(main, home, tmp_path / "out", f"--model_path {home}/dense --qlora")
    assert not (tmp_path / "out").exists()


class RowsSeen:
    """Wraps the forward of a model's backbone and keeps the shapes it was given."""

    def __init__(self, monkeypatch) -> None:
        self.shapes, forward = [], SmolModel.forward

        def seen(model, input_ids=None, *args, **kwargs):
            self.shapes.append(tuple(input_ids.shape))
            return forward(model, input_ids, *args, **kwargs)

        monkeypatch.setattr(SmolModel, "forward", seen)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_sides_in_shared_rows_are_what_they_are_alone(home, kind, monkeypatch) -> None:
    """Log-probabilities, gradients and router loss of packed sides equal each side's own, one at a time, unpadded."""
    model = SmolForCausalLM.from_pretrained(home / kind)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    random, lengths = torch.Generator().manual_seed(3), [40, 9, 17, 23, 31, 8]
    ids = torch.randint(5, 300, (len(lengths), max(lengths)), generator=random)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    weight = torch.rand(len(lengths), max(lengths) - 1, generator=random)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100  # the prompts

    rows = RowsSeen(monkeypatch)
    inputs = dict(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, use_cache=False)
    packed = unpadded(model)(**inputs, output_router_logits=kind == "moe")
    assert rows.shapes == [(4, 40)]  # 40, 31 + 9, 23 + 17, 8
    (packed.log_probs * weight).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for i, length in enumerate(lengths):
        own = dict(input_ids=ids[i : i + 1, :length], labels=labels[i : i + 1, :length])
        alone = model(**own, fused_lm_head=True, use_cache=False)
        for name in ("log_probs", "entropy", "mean_logits", "is_top1"):
            torch.testing.assert_close(packed[name][i, : length - 1], alone[name][0], rtol=1e-5, atol=1e-5)
            assert not packed[name][i, length - 1 :].any()
        (alone.log_probs[0] * weight[i, : length - 1]).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)
    if kind == "moe":
        padded = model(**inputs, output_router_logits=True)
        torch.testing.assert_close(packed.aux_loss, padded.aux_loss)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_scoring_the_answers_alone_changes_none_of_their_scores(home, kind, monkeypatch) -> None:
    """TRL's head gets the hidden states of labelled positions only; what it says of them, and gradients, stay."""
    model = SmolForCausalLM.from_pretrained(home / kind)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    rows = []
    for head in (trl_utils._ChunkedLogProbFunction, TokenScores):
        counted = partial(lambda apply, hidden, *rest: rows.append(len(hidden)) or apply(hidden, *rest), head.apply)
        monkeypatch.setattr(head, "apply", counted)
    ids = torch.randint(5, 300, (4, 20), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[:, :14] = -100
    labels[3] = -100  # a side without an answer
    found = []
    for scored in (nullcontext(), scored_positions()):
        with scored:
            outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)
        model.zero_grad()
        outputs.log_probs.sum().backward()
        found.append((outputs, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}))
    (every, all_gradients), (few, few_gradients) = found
    assert rows == [4 * 19, 3 * 6]
    for name in ("log_probs", "entropy", "mean_logits", "is_top1"):
        torch.testing.assert_close(few[name], every[name], rtol=1e-5, atol=1e-5)
    for name, gradient in all_gradients.items():
        torch.testing.assert_close(few_gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 70])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_scores_of_tokens_are_those_of_the_whole_softmax(tokens, dtype, tolerance, monkeypatch) -> None:
    """Against the formulas in float64; several blocks of logits, and chunks that do not divide them."""
    monkeypatch.setattr(smol_kernels, "LOSS_BLOCK_ELEMENTS", 32 * 50)
    monkeypatch.setitem(smol_kernels.LOSS_ELEMENTS, "cpu", 7 * 50)
    random = torch.Generator().manual_seed(tokens)
    hidden, weight = torch.randn(tokens, 8, generator=random), torch.randn(50, 8, generator=random)
    targets = torch.randint(0, 50, (tokens,), generator=random)
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    outputs = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    found = TokenScores.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, outputs)
    exact_hidden, exact_weight = (value.detach().double().requires_grad_() for value in (hidden, weight))
    logits = exact_hidden @ exact_weight.t()
    log_probs = logits.log_softmax(-1)
    expected = (
        log_probs.gather(1, targets[:, None])[:, 0],
        torch.special.entr(log_probs.exp()).sum(-1),
        log_probs.exp().square().sum(-1).log(),
        logits.mean(-1),
    )
    for values, right in zip(found, expected, strict=False):
        torch.testing.assert_close(values.double(), right, rtol=tolerance, atol=3 * tolerance)
    rounded = (hidden @ weight.t()).argmax(-1)
    assert torch.equal(found[4], rounded == targets)
    factor = torch.randn(tokens, generator=random)
    (found[0] * factor).sum().backward()
    (expected[0] * factor).sum().backward()
    for value, right in ((hidden, exact_hidden), (weight, exact_weight)):
        torch.testing.assert_close(value.grad.double(), right.grad, rtol=tolerance, atol=20 * tolerance)


@pytest.mark.parametrize("line", ["", "--use_lora true", "--loss_type ipo --precompute_ref_log_probs false"])
def test_packed_pairs_learn_what_padded_ones_do(home, tmp_path, line, monkeypatch) -> None:
    random, pairs = np.random.default_rng(1), tmp_path / "pairs.jsonl"
    answers = [" ".join(random.choice(WORDS, size)) for size in (1, 30, 2, 9, 20, 3, 14, 5, 1, 24, 7, 2, 17, 4, 11, 6)]
    write(pairs, [{"prompt": "the", "chosen": a, "rejected": b} for a, b in zip(answers, answers[3:], strict=False)])
    line = f"--data_path {pairs} --model_path {home}/dense --data_cache_dir {{}} {line}"
    padded = run(train_dpo.main, home, tmp_path / "padded", line.format(tmp_path / "1"))
    rows = RowsSeen(monkeypatch)
    packed = run(train_dpo.main, home, tmp_path / "packed", line.format(tmp_path / "2") + " --packing true")
    assert min(rows.shapes)[0] < 8  # four pairs are eight sides
    for name in ("loss", "rewards/margins", "logps/chosen", "entropy"):
        assert metrics(packed, name) == pytest.approx(metrics(padded, name), rel=1e-4, abs=1e-5), name


def uneven_pairs(path: Path) -> Path:
    """Nine pairs of many lengths."""
    random = np.random.default_rng(2)
    answers = [" ".join(random.choice(WORDS, size)) for size in (1, 30, 2, 9, 20, 3, 14, 5, 1, 24, 7, 2)]
    write(path, [{"prompt": "the", "chosen": a, "rejected": b} for a, b in zip(answers, answers[3:], strict=False)])
    return path


def test_figures_of_held_out_pairs_do_not_depend_on_the_batch(home, tmp_path) -> None:
    """Nine pairs: 8 + 1, all at once, 2 by 2. Each counts once; so does each of their tokens in the likelihood."""
    held_out = uneven_pairs(tmp_path / "pairs.jsonl")
    line = f"--model_path {home}/dense --eval_data_path {held_out} --eval_strategy steps --eval_steps 1 --rpo_alpha 0.5"
    found = {
        size: run(train_dpo.main, home, tmp_path / f"{size}", f"{line} --per_device_eval_batch_size {size}")
        for size in (9, 8, 2)
    }
    names = ("loss", "rewards/margins", "rewards/chosen", "rewards/accuracies", "logps/chosen", "lengths/rejected")
    for name in names:
        whole = metrics(found[9], f"eval_{name}")
        assert len(whole) == 2
        for size in (8, 2):
            assert metrics(found[size], f"eval_{name}") == pytest.approx(whole, rel=1e-5, abs=1e-6), (name, size)


@pytest.mark.parametrize("extra", ["", "--rpo_alpha 1.0", "--loss_type sft --rpo_alpha 0"])
def test_micro_batches_change_nothing_but_rounding(home, tmp_path, extra) -> None:
    """Nine pairs a step in one, three or five micro-batches (the last of them smaller): the same updates."""
    pairs = uneven_pairs(tmp_path / "pairs.jsonl")
    found = {}
    for size, accumulation in ((9, 1), (3, 3), (2, 5)):
        line = f"--model_path {home}/dense --data_path {pairs} --per_device_train_batch_size {size} {extra}"
        line += f" --gradient_accumulation_steps {accumulation} --max_steps 3"
        found[size] = run(train_dpo.main, home, tmp_path / f"{size}", line)
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
        whole = metrics(found[9], name)
        for size in (3, 2):
            assert metrics(found[size], name) == pytest.approx(whole, rel=1e-4, abs=1e-6), (name, size)


def test_trls_own_switch_is_refused(home, tmp_path) -> None:
    with pytest.raises(UserError, match="--padding_free is --packing here"):
        run(train_dpo.main, home, tmp_path / "out", f"--model_path {home}/dense --padding_free true")


LOSSES = """sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop
    sft sigmoid_norm""".split()


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_of_trl_makes_a_step(home, tmp_path, loss) -> None:
    smoothing = "--label_smoothing 0.1" if loss in ("exo_pair", "robust") else ""
    line = f"--model_path {home}/dense --loss_type {loss} {smoothing} --max_steps 1"
    output = run(train_dpo.main, home, tmp_path / "out", line)
    assert math.isfinite(metrics(output)[0])
    before, after = (load_file(path / "model.safetensors") for path in (home / "dense", output))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_list_of_losses_is_trls() -> None:
    from trl import DPOConfig

    documented = DPOConfig.__doc__.split("loss_type (`list[str]`")[1].split("loss_weights")[0]
    assert all(f"`'{loss}'`" in documented for loss in LOSSES)
    assert documented.count("`'") == len(LOSSES)
