"""What a run leaves to look at: rows, speed, bits per byte, samples, reporters, the page."""

import errno
import json
import math
import re
import shutil
import sqlite3
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

import train_pretrain
import train_tokenizer
from smol_config import SmolConfig, flops_per_token
from smolkit import errors, hardware, progress, reporters, run_report
from smolkit.chat import encode_text
from smolkit.checkpoints import load_tokenizer
from smolkit.command_line import PretrainTrainingArguments
from smolkit.errors import UserError
from smolkit.progress import _append, _cut_back
from smolkit.report import read_rows
from smolkit.samples import read_prompts
from smolkit.tokenizer import token_bytes

SHAPE = "hidden_size=32 intermediate_size=64 num_hidden_layers=2 num_attention_heads=2 num_key_value_heads=1"
WORDS = "the a cat dog sat on mat with red blue house of tree and ran 猫 狗 坐 在 红 蓝 房子 树 🙂 é".split()
PROMPTS = ["the cat", "猫坐在"]
PEAK = "0.05"


def sentence(random: np.random.Generator) -> str:
    return " ".join(random.choice(WORDS, random.integers(3, 20))) + "."


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("progress")
    random = np.random.default_rng(0)
    for part, count in (("", 80), ("validation", 10)):
        (folder / part).mkdir(exist_ok=True)
        rows = [json.dumps({"text": sentence(random)}, ensure_ascii=False) + "\n" for _ in range(count)]
        (folder / part / "text.jsonl").write_text("".join(rows))
    arguments = f"--mode train --data_path {folder}/text.jsonl --vocab_size 320 --save_dir {folder}/tokenizer"
    train_tokenizer.main(arguments.split())
    return folder


def pretrain(world: Path, output: Path, *more: str) -> Path:
    """8 steps; checkpoints at 4 and 8, evaluations at 3, 6 and 8, the same two prompts at every checkpoint."""
    arguments = f"""--data_path {world}/text.jsonl --tokenizer_path {world}/tokenizer --model_size tiny
        --model_overrides {SHAPE} --block_size 64 --per_device_train_batch_size 2 --max_steps 8 --logging_steps 3
        --save_steps 4 --eval_steps 3 --disable_tqdm true --weights_dtype fp32 --sample_tokens 5
        --peak_tflops {PEAK} --output_dir {output} --sample_prompts"""
    train_pretrain.main([*arguments.split(), *PROMPTS, *more])
    return output


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """A finished run, reported to TensorBoard."""
    return pretrain(world, tmp_path_factory.mktemp("out") / "整run", "--report_to", "tensorboard")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- rows


def test_rows_hold_what_was_learned_and_how_fast(whole) -> None:
    metrics, timing = rows(whole / "metrics.jsonl"), rows(whole / "timing.jsonl")
    assert [row["step"] for row in metrics if "loss" in row] == [3, 6, 8]
    assert [row["step"] for row in metrics if "eval_loss" in row] == [3, 6, 8], "every 3 steps, and the last one"
    assert {"loss", "grad_norm", "learning_rate", "tokens"} <= metrics[0].keys()
    machine = {"tokens_per_second", "mfu", "memory_bytes", "eta_seconds", "elapsed_seconds", "eval_runtime"}
    assert not machine & {name for row in metrics for name in row}
    windows = [row for row in timing if "mfu" in row]
    assert [row["step"] for row in windows] == [3, 6, 8]
    assert windows[-1]["eta_seconds"] == 0 < windows[0]["eta_seconds"]
    assert all(50e6 < row["memory_bytes"] < 30e9 for row in windows)
    assert_speeds_count_the_same_steps(whole)


def assert_speeds_count_the_same_steps(run: Path) -> None:
    """Tokens per second are of real tokens, MFU of everything that is computed: rows filled up to the longer of two."""
    config = SmolConfig.from_pretrained(run)
    learned = [row for row in rows(run / "metrics.jsonl") if "loss" in row]
    windows = [row for row in rows(run / "timing.jsonl") if "mfu" in row]
    before = {"step": 0, "tokens": 0}
    for row, after in zip(windows, learned, strict=True):
        per_token = row["mfu"] * float(PEAK) * 1e12 / row["tokens_per_second"]
        places = (after["step"] - before["step"]) * 2 * 64
        padded = places / (after["tokens"] - before["tokens"])
        assert 0.9 * flops_per_token(config, 32) < per_token < 1.1 * flops_per_token(config, 64) * padded
        before = after


def test_an_interrupted_run_leaves_the_same_rows_and_samples(world, whole, tmp_path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)  # as it was when killed at step 7, in the middle of a line
    shutil.rmtree(broken / "checkpoint-8")
    for name in ("config.json", "model.safetensors", "training_complete.json", *run_report.REPORT_FILES):
        (broken / name).unlink()
    for name in run_report.RUN_FILES:
        with open(broken / name, "a") as file:
            file.write('{"step": 7, "lo')
    pretrain(world, broken)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (broken / name).read_text() == (whole / name).read_text()
    assert [row["step"] for row in rows(broken / "timing.jsonl") if "mfu" in row] == [3, 6, 8]
    losses = [row["loss"] for row in rows(broken / "metrics.jsonl") if "loss" in row]
    (mean,) = [row["train_loss"] for row in rows(broken / "timing.jsonl") if "train_loss" in row]
    assert 0.95 * min(losses) < mean < 1.05 * max(losses), "a mean over the steps of the last process"
    assert_speeds_count_the_same_steps(broken)  # also of steps 5 and 6, while the row at 6 has the tokens of 4


def test_lines_end_at_newlines_only_and_files_are_replaced_whole(world, tmp_path, monkeypatch) -> None:
    texts = ["a\u2028b", "c\x85d\u2029", "e"]
    kept = [{"step": step, "answer": text, "tokens": step} for step, text in enumerate(texts, start=1)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in kept]
    file = tmp_path / "samples.jsonl"
    file.write_text("".join([*lines, '{"step": 4}\n', '{"step": 3, "ans']), encoding="utf-8")
    assert read_rows(file) == [*kept, {"step": 4}]
    before = file.read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr("os.replace", partial(full, errno.ENOSPC))
        with pytest.raises(UserError, match=r"cannot write .*samples.jsonl: No space left on device"):
            _cut_back(file, 3)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
    assert _cut_back(file, 3) == 3
    assert file.read_text(encoding="utf-8") == "".join(lines)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts))
    found = read_prompts([str(prompts)], load_tokenizer(world / "tokenizer"), False, 500)
    assert [prompt.shown for prompt in found] == texts


def full(code: int, *paths: object) -> None:
    raise OSError(code, "refused", *paths)


def test_a_disk_that_takes_no_more_is_one_line(tmp_path, capsys) -> None:
    """A mistake of ours keeps its traceback."""
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
        _append(Path("/dev/full"), {"step": 1})
    serializing = partial(safetensors_says, "Error while serializing: I/O error: No space left on device (os error 28)")
    for failure in (partial(full, errno.EROFS, "/x"), partial(full, errno.EACCES, "/x"), serializing):
        with pytest.raises(SystemExit) as stop:
            errors.run(failure)
        assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: /x: Read-only file system", "error: /x: Permission denied", "error: No space left on device"
    ]  # fmt: skip
    for failure in (partial(full, errno.EACCES), partial(full, errno.ENOENT, "/x"), partial(safetensors_says, "no")):
        with pytest.raises((OSError, SafetensorError)):
            errors.run(failure)


def safetensors_says(text: str) -> None:
    raise SafetensorError(text)


class Jumps(train_pretrain.PretrainTrainer):
    """A loss that is far above the others at step 12."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * 10 if self.state.global_step == 11 else loss


def test_the_bar_and_a_jump_of_the_loss_are_shown(world, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(train_pretrain, "PretrainTrainer", Jumps)
    steps = ["--max_steps", "14", "--logging_steps", "7", "--disable_tqdm", "false", "--save_strategy", "no"]
    pretrain(world, tmp_path / "out", *steps)
    shown = capsys.readouterr()
    number = r"\d[\d.,e+-]*"
    line = rf"loss {number}, lr {number}, {number} tok/s, MFU \d+%, {number} GiB"
    assert re.search(line, shown.err), shown.err
    assert re.search(rf"warning: the loss jumped to {number} at step 12, from about {number}: look at", shown.out)


# --- bits per byte


def test_bits_per_byte_count_exactly_the_text_that_was_predicted(world, whole) -> None:
    tokenizer = load_tokenizer(world / "tokenizer")
    size = predicted = 0
    for row in rows(world / "validation" / "text.jsonl"):
        ids = encode_text(tokenizer, row["text"])
        entry = tokenizer.convert_ids_to_tokens(ids[0])
        size += len(row["text"].encode()) - len(entry)  # one character of an entry is one byte
        predicted += len(ids)  # all but the first, and the end of the document
    for row in rows(whole / "metrics.jsonl"):
        if "eval_loss" in row:
            assert (row["eval_bytes"], row["eval_tokens"]) == (size, predicted)
            expected = row["eval_loss"] * predicted / math.log(2) / size
            assert row["eval_bits_per_byte"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("text", ["plain", " 周梅的宠物是猫。", "🙂 naïve\n\tœ\u0301", "<|im_end|> and <tool_call>"])
def test_token_bytes_add_up_to_the_text(world, text: str) -> None:
    tokenizer = load_tokenizer(world / "tokenizer")
    sizes = token_bytes(tokenizer)
    assert sizes[encode_text(tokenizer, text)].sum() == len(text.encode())
    assert sizes[tokenizer.eos_token_id] == sizes[tokenizer.pad_token_id] == 0
    assert sizes[tokenizer.convert_tokens_to_ids("<tool_call>")] == len("<tool_call>"), "written as it is"


def test_token_bytes_of_qwen(samples) -> None:
    tokenizer = load_tokenizer(samples / "qwen2.5_tokenizer")
    sizes = token_bytes(tokenizer)
    for text in ("The 第一 cafe 🙂 123", "数学题：3×4=12"):
        assert sizes[encode_text(tokenizer, text)].sum() == len(text.encode())
    decomposed = "cafe\u0301"
    assert sizes[encode_text(tokenizer, decomposed)].sum() == len("café".encode()), "composed (NFC) by the tokenizer"


def test_token_bytes_of_other_kinds_of_tokenizer() -> None:
    pieces = {"<unk>": 0, "▁dog": 1, "猫": 2, "<0x0A>": 3}
    backend = Tokenizer(models.BPE(pieces, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert token_bytes(tokenizer).tolist() == [0, 4, 3, 1]
    backend.decoder = decoders.WordPiece()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend)) is None


# --- samples


def test_samples_are_greedy_and_leave_training_alone(world, whole, tmp_path) -> None:
    found = rows(whole / "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in found] == [(step, text) for step in (4, 8) for text in PROMPTS]
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(whole)
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    for row in found[2:]:
        prompt = torch.tensor([encode_text(tokenizer, row["prompt"])])
        answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
        ids = answer[0, prompt.shape[1] :].tolist()
        stops = model.generation_config.eos_token_id
        assert row["ended"] == (ids[-1] in stops) and row["tokens"] == len(ids)
        assert row["answer"] == tokenizer.decode([i for i in ids if i not in stops])
    arguments = ["--eval_steps", "1000", "--max_eval_rows", "4", "--sample_tokens", "1"]
    other = pretrain(world, tmp_path / "other", *arguments)
    one, two = (load_file(path / "model.safetensors") for path in (whole, other))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_prompts_come_as_texts_and_files(world, tmp_path) -> None:
    tokenizer = load_tokenizer(world / "tokenizer")
    file = tmp_path / "prompts.jsonl"
    turns = [{"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "yes"), ("user", "?"))]
    file.write_text(json.dumps({"prompt": "猫"}) + "\n\n" + json.dumps({"messages": turns}) + "\n")
    plain, text, talk = read_prompts(["a dog", str(file)], tokenizer, True, 500)
    assert (plain.shown, text.shown, talk.shown) == ("a dog", "猫", "user: hi\nassistant: yes\nuser: ?")
    assert tokenizer.decode(plain.input_ids).endswith("<|im_start|>user\na dog<|im_end|>\n<|im_start|>assistant\n")
    (raw,) = read_prompts(["a dog"], tokenizer, False, 500)
    assert raw.input_ids == encode_text(tokenizer, "a dog")
    with pytest.raises(UserError, match=r"prompts.jsonl:3: a conversation, but this stage continues plain text"):
        read_prompts([str(file)], tokenizer, False, 500)
    with pytest.raises(UserError, match="leaves room for 3"):
        read_prompts(["a dog and a cat"], tokenizer, False, 3)
    for content, message in (("{", "prompts.jsonl:1: not valid JSON"), ("[1]", "expected"), ("", "no prompt in it")):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            read_prompts([str(file)], tokenizer, True, 500)
    with pytest.raises(UserError, match=r"missing.jsonl: No such file"):
        read_prompts(["missing.jsonl"], tokenizer, True, 500)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sample_prompts", "missing.jsonl"], "missing.jsonl: No such file"),
        (["--sample_tokens", "0"], "--sample_tokens 0 must be at least 1"),
        (["--peak_tflops", "-1"], "--peak_tflops -1.0 must be positive"),
        (["--max_eval_rows", "0"], "nothing to evaluate on .*--max_eval_rows is 0"),
        (["--report_to", "nowhere"], "--report_to nowhere: choose wandb, tensorboard, trackio or none"),
    ],
)
def test_bad_flags_leave_nothing_behind(world, tmp_path, more, message) -> None:
    with pytest.raises(UserError, match=message) as error:
        pretrain(world, tmp_path / "out", *more)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


# --- hardware


def test_a_slow_product_is_measured_by_a_few_of_its_rows(monkeypatch) -> None:
    """In software the whole one takes half a minute, at every start."""
    monkeypatch.setattr(hardware, "MEASURE_SECONDS", 0.0)  # anything is slow
    hardware._measured.cache_clear()
    with FlopCounterMode(display=False) as counter:
        assert hardware.peak(torch.device("cpu"), torch.float32).flops > 1e8
    hardware._measured.cache_clear()
    assert 0 < counter.get_total_flops() < 2 * math.prod(hardware.PRODUCT) / 16


def test_peak_is_given_looked_up_or_measured(monkeypatch) -> None:
    cpu = torch.device("cpu")
    assert hardware.peak(cpu, torch.float32, 2.5) == hardware.Peak(2.5e12, "--peak_tflops")
    state = torch.get_rng_state()
    measured = hardware.peak(cpu, torch.float32)
    assert 1e8 < measured.flops < 1e13 and "measured" in measured.source and "float32" in measured.source
    assert torch.equal(torch.get_rng_state(), state)
    for name, tflops in (("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA L40S", 362.0)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        found = hardware.peak(torch.device("cuda"), torch.bfloat16)
        assert found.flops == tflops * 1e12 and name in found.source
    names = [name for name, _ in hardware.PEAK_TFLOPS]
    for i, name in enumerate(names):
        assert not any(earlier in name for earlier in names[:i]), f"{name} is never reached"


def test_a_peak_that_a_step_exceeds_is_measured_again(monkeypatch, capsys) -> None:
    """It was measured beside another program; one that is measured no higher the next time stays."""
    state = SimpleNamespace(global_step=2, max_steps=10, total_flos=4e9)
    found = iter(hardware.Peak(flops, "measured") for flops in (1e9, 8e9, 1e9))
    monkeypatch.setattr(progress, "peak", lambda *args, **kwargs: next(found))
    told = progress.Progress()
    told.device, told.dtype, told.processes, told.last_step, told.flops = torch.device("cpu"), torch.float32, 1, 0, 0.0
    told.peak = progress.peak()
    assert told._speed(2.0, 100, state)["mfu"] == 0.25  # 4e9 in two seconds, against 8e9 a second
    assert "from here on" in capsys.readouterr().out and told._speed(0.4, 100, state)["mfu"] == 1.25
    assert told.peak.flops == 8e9 and not capsys.readouterr().out


# --- reporters


def scalars(metrics: list[dict], name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in metrics if name in row}


def test_tensorboard_gets_what_the_files_have(whole) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (directory,) = (whole / "runs").iterdir()
    events = EventAccumulator(str(directory))
    events.Reload()
    for tag, file, name in (
        ("train/loss", "metrics.jsonl", "loss"),
        ("train/grad_norm", "metrics.jsonl", "grad_norm"),
        ("eval/bits_per_byte", "metrics.jsonl", "eval_bits_per_byte"),
        ("train/mfu", "timing.jsonl", "mfu"),
        ("train/tokens_per_second", "timing.jsonl", "tokens_per_second"),
    ):
        sent = {event.step: event.value for event in events.Scalars(tag)}
        assert sent == pytest.approx(scalars(rows(whole / file), name), rel=1e-6), tag


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log without its 7 bytes of header: (crc, length, kind) and a piece, in blocks of 32 KiB."""
    at, parts = 7, b""
    data = b"\0" * 7 + data  # blocks are counted from the start of the file
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block that is too short for another piece
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield parts
            parts = b""


@pytest.fixture
def wandb_pretrain(world, tmp_path, monkeypatch) -> Callable[..., Path]:
    """A run like `pretrain`'s in `tmp_path / "out"`, reported to wandb offline, as from a process of its own."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    def run(*more: str) -> Path:
        wandb.teardown()  # the mode of the test session was read when it was imported
        output = pretrain(world, tmp_path / "out", "--report_to", "wandb", *more)
        wandb.finish()
        wandb.teardown()
        return output

    return run


@pytest.mark.parametrize("environment", [None, "of-the-environment"])
def test_wandb_gets_the_project(environment, tmp_path, monkeypatch) -> None:
    import wandb

    asked: dict[str, object] = {}
    monkeypatch.setattr(wandb, "run", None)
    monkeypatch.setattr(wandb, "init", lambda **how: asked.update(how) or SimpleNamespace(id="1", disabled=False))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    if environment:
        monkeypatch.setenv("WANDB_PROJECT", environment)
    args = PretrainTrainingArguments(output_dir=str(tmp_path), project="mine")
    reporters.join_wandb_run(tmp_path, args.project, args.run_name)
    assert asked["project"] == (environment or "mine")


def test_wandb_offline(wandb_pretrain, tmp_path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    output = wandb_pretrain()
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    sent: dict[str, dict[int, float]] = {}
    for data in leveldb_log(log.read_bytes()[7:]):
        history = Record.FromString(data).history
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history.item}
        for name, value in row.items():
            sent.setdefault(name, {})[row["train/global_step"]] = value
    metrics = rows(output / "metrics.jsonl")
    assert sent["train/loss"] == pytest.approx(scalars(metrics, "loss"))
    assert sent["eval/loss"] == pytest.approx(scalars(metrics, "eval_loss"))
    assert sent["train/mfu"] == pytest.approx(scalars(rows(output / "timing.jsonl"), "mfu"))


def test_a_continued_run_is_one_run_in_wandb(wandb_pretrain, tmp_path) -> None:
    def interrupt(output: Path) -> None:
        shutil.rmtree(output / "checkpoint-8")
        (output / "training_complete.json").unlink()

    def runs() -> dict[str, int]:
        """Parts by the id of their run, whose name is in offline-run-DATE-ID/run-ID.wandb."""
        return Counter(path.stem.removeprefix("run-") for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb"))

    output = wandb_pretrain()
    (first,) = runs()
    interrupt(output)
    wandb_pretrain()
    assert runs() == {first: 2}
    interrupt(output)
    wandb_pretrain("--resume", "never")  # another training
    assert sorted(runs().values()) == [1, 2]


def test_trackio_offline(world, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    output = pretrain(world, tmp_path / "out", "--report_to", "trackio")
    (database,) = (tmp_path / "trackio").rglob("*.db")
    with sqlite3.connect(database) as connection:
        sent = [json.loads(row[0]) for row in connection.execute("select metrics from metrics")]
    losses = sorted(row["train/loss"] for row in sent if "train/loss" in row)
    assert losses == pytest.approx(sorted(scalars(rows(output / "metrics.jsonl"), "loss").values()))
    assert [row["eval/loss"] for row in sent if "eval/loss" in row]


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_missing_reporter_is_refused(name: str, tmp_path, monkeypatch) -> None:
    real = reporters.importlib.util.find_spec
    monkeypatch.setattr(reporters.importlib.util, "find_spec", lambda item: None if item == name else real(item))
    with pytest.raises(UserError, match=f"--report_to {name}: not installed; pip install {name}"):
        PretrainTrainingArguments(output_dir=str(tmp_path), report_to=[name])


def test_wandb_without_a_key_is_refused_before_any_work(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match="--report_to wandb: not logged in; .*WANDB_MODE=offline"):
        reporters.check_reporters(["wandb"])
    assert reporters.check_reporters("none") == reporters.check_reporters(None) == []


# --- the page


class Page(HTMLParser):
    """Checks that tags nest, gathers what the page refers to, and its text by tag."""

    VOID = {"meta", "line", "circle", "polyline", "br", "link", "img"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.count: dict[str, int] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


def test_the_page_is_whole_and_shows_the_figures_of_the_files(whole) -> None:
    text = (whole / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.links and not re.search(r"url\(|@import|https?://", text), "nothing from outside"
    assert "{{" not in text and "finished" in text
    metrics, timing = rows(whole / "metrics.jsonl"), rows(whole / "timing.jsonl")
    charts = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert page.count["svg"] == len(charts) == page.count["figure"] >= 6
    lines = {line["metric"]: line for chart in charts for line in chart}
    for name, file, scale in (
        ("loss", metrics, 1),
        ("eval_loss", metrics, 1),
        ("eval_bits_per_byte", metrics, 1),
        ("grad_norm", metrics, 1),
        ("learning_rate", metrics, 1),
        ("mfu", timing, 100),
    ):
        expected = {step: value * scale for step, value in scalars(file, name).items()}
        assert dict(zip(lines[name]["steps"], lines[name]["values"], strict=True)) == pytest.approx(expected)
    assert len(re.findall(r"<polyline", text)) >= len(lines)
    cells = re.findall(r"<td class='n' title='([^']*)'", text)  # the table holds every value as it is in the file
    assert cells == [str(row[n]) for row in metrics for n in dict.fromkeys(k for r in metrics for k in r) if n in row]
    shown = "".join(part for parts in page.text.values() for part in parts)
    for row in rows(whole / "samples.jsonl"):
        assert row["prompt"] in shown and row["answer"] in shown
    assert "整run" in shown
    assert json.loads((whole / "diagnosis.json").read_text())["findings"][0]["text"] in shown
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_text_cannot_break_out_of_the_page(tmp_path, capsys) -> None:
    evil = "</script><script>alert(1)</script><img src='http://x'>"
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, evil: 1.0}) + "\n")
    sample = {"step": 1, "prompt": evil, "answer": evil, "tokens": 3, "ended": True}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    run_report.main([str(tmp_path)])
    page = Page((tmp_path / "report.html").read_text())
    assert page.count["script"] == 2 and "img" not in page.count
    assert "so far" in page.text["small"]
    assert "too few" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"metrics.jsonl: no rows"):
        run_report.main([str(tmp_path / "nothing")])


def test_long_runs_are_thinned_without_losing_spikes() -> None:
    from smolkit.charts import MOST_POINTS, panels, thin

    values = [1.0] * 5000
    values[1234] = 9.0
    steps, kept = thin(range(5000), values)
    assert len(kept) <= MOST_POINTS and (1234, 9.0) in zip(steps, kept, strict=True)
    assert steps[0] == 0 and steps[-1] == 4999
    (panel,) = panels([{"step": i, "loss": value} for i, value in enumerate(values)], [], coin_toss=False)
    middle, trend = panel.lines[0].trend
    width = len(values) - len(trend) + 1
    assert width % 2 == 1 and middle[0] == width // 2 and max(trend) == pytest.approx(1 + 8 / width)


def test_seconds_of_a_continued_run_add_up() -> None:
    clock = [{"step": i, "elapsed_seconds": value} for i, value in enumerate([1.0, 5.0, 9.0, 2.0, 4.0])]
    assert run_report.elapsed(clock) == 13.0
    assert run_report.duration(75) == "1 min 15 s" and run_report.duration(7325) == "2 h 02 min"
    assert run_report.short(25600) == "25.6 k" and run_report.short(1.2e9) == "1.2 B"
