"""Every command of the README: read by the program it is for, and run where this machine can.

The README says beside a command what it needs and not everybody has ("needs the network", "needs 4 GPUs"): in the
command's own comment, or in a comment line, which speaks for the commands up to the next such line. All other commands
are run, those of a block together and in the README's order, in a copy of the checkout; or a test elsewhere shows them.
"""

import argparse
import ast
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest

from smolkit import command_line

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NEEDS = re.compile(r"\bneeds (the network|vLLM|a browser|two nodes|\d+ GPUs)")

# --- the blocks ------------------------------------------------------------------------------------------------------

RUN = "run"  # by the cases below
# Every fenced block, in order: words that only this one has, and what shows that it works.
BLOCKS = {
    "make quickstart": RUN,
    ".venv/bin/activate": RUN,
    "--output_dir out/quickstart/data": RUN,
    "Makefile  ": "tests/test_rooms.py::test_the_readme_names_every_file_once",
    "# from the Hugging Face hub": RUN,
    "sources:\n": "tests/test_readme_commands.py::test_the_mixture_is_read",
    "executor: slurm": "tests/test_readme_commands.py::test_the_executor_is_read",
    "smolkit.doctor": RUN,
    "--save_dir tokenizer-qwen": RUN,
    "--output_dir output/pretrain": RUN,
    "--output_dir output/sft": RUN,
    "--output_dir output/dpo": RUN,
    "--check_transformers \\\n  --preferences": RUN,
    "cat > choices.jsonl": RUN,
    "--port 8011": RUN,
    "mkdir -p my_tasks": RUN,
    "--lm_eval hellaswag": "tests/evaluation/test_harness.py::test_the_harness_and_our_multiple_choice_agree",
    "--fail_below": RUN,
    "accelerate launch": RUN,
    "NODE_RANK=0": "tests/test_strategies.py::test_two_nodes_equal_one_process",
    "--output_dir output/experts": RUN,
    "recipes/base-7b.yaml": RUN,
    "--output_dir output/watched": RUN,
    '{"text": "Sample text': "tests/test_readme_commands.py::test_the_rows_are_sound",
    "Swagger": "tests/serving/test_readme.py::test_commands",
    "curl ": "tests/serving/test_readme.py::test_curl",
    "import OpenAI": "tests/serving/test_readme.py::test_python",
    "--max_num_seqs": "tests/serving/test_scripts.py::test_documented_commands",
    "--tensor_parallel_size 4": "tests/serving/test_scripts.py::test_vllm_accepts_the_documented_commands",
    "--prompt": RUN,
    "python app.py": RUN,
    "mkdir space": RUN,
    "jupyter lab": "tests/test_notebooks.py::test_the_short_ones_run",
    "python export.py": RUN,
    "--upcycle_from": RUN,
    "out/mine/tokenizer": RUN,
    "hf download": RUN,
}  # fmt: skip


def blocks() -> list[tuple[str, str]]:
    """Language and content of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def block(words: str) -> str:
    """The one block with these words."""
    (found,) = [content for _, content in blocks() if words in content]
    return found


@dataclass(frozen=True)
class Command:
    """A command as it stands, be it of several lines, and what it needs that not everybody has."""

    text: str
    needs: str | None


def commands(content: str) -> list[Command]:
    """The commands of a shell block."""
    found, lines, spoken_for = [], iter(content.splitlines()), None
    for text in lines:
        if text.startswith("#"):
            spoken_for = NEEDS.search(text)
            continue
        if here := re.search(r"<<'(\w+)'$", text):  # a file that is written in place
            while not text.endswith(f"\n{here[1]}"):
                text += "\n" + next(lines)
        while text.endswith("\\"):
            text += "\n" + next(lines)
        needs = NEEDS.search(text) or spoken_for
        found.append(Command(text, needs and needs[1]))
    return found


def shell_blocks() -> list[str]:
    return [content for language, content in blocks() if language in ("bash", "text")]


def test_every_block_is_run_or_shown_to_work() -> None:
    """A new block needs an entry, and an entry needs a block."""
    contents = [content for _, content in blocks()]
    for content, words in zip(contents, BLOCKS, strict=True):
        assert block(words) == content, f"{content.splitlines()[0]!r} is not in BLOCKS at its place"


@pytest.mark.parametrize("name", sorted(set(BLOCKS.values()) - {RUN}))
def test_the_tests_that_show_a_block_are_there(name: str) -> None:
    file, test = name.split("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_what_is_neither_run_nor_possible_everywhere_says_so() -> None:
    """Every command of a block that is run belongs to a case; one that is left out says in the README what it needs."""
    for words in [words for words, shown in BLOCKS.items() if shown == RUN]:
        cases = [case for case in CASES.values() if case.block == words]
        every = range(len(commands(block(words))))
        covered = [number for case in cases for number in every[slice(*case.part)]]
        assert covered == list(every), f"{words!r}: commands {covered} of {len(every)} are run"
        assert all(prepared(case) for case in cases), f"{words!r}: nothing is run"


def test_what_not_everybody_has_is_marked() -> None:
    rare = re.compile(r"^(pip|ray|vllm|jupyter|sbatch|make) |serve_vllm\.py|two_nodes|\b[A-Z]\w+/[A-Z]\w+|hellaswag")
    found = [command for content in shell_blocks() for command in commands(content) if rare.search(command.text)]
    assert len(found) > 20
    for command in found:
        assert command.needs, f"the README does not say what this needs: {command.text}"


def test_a_mark_speaks_for_its_command() -> None:
    """The reader of blocks, by hand."""
    content = "a \\\n  b   # needs vLLM\nc\n# (needs 4 GPUs)\nd\ne\n# here\nf\ncat > x <<'END'\ng\nEND\n"
    found = [(command.text.partition(" #")[0], command.needs) for command in commands(content)]
    assert found == [
        ("a \\\n  b  ", "vLLM"),
        ("c", None),
        ("d", "4 GPUs"),
        ("e", "4 GPUs"),
        ("f", None),
        ("cat > x <<'END'\ng\nEND", None),
    ]


# --- flags -----------------------------------------------------------------------------------------------------------

STAGES = {"train_pretrain": "pretrain", "train_full_sft": "sft", "train_lora": "lora", "train_dpo": "dpo"}
OTHERS = {"pytest", "venv"}  # modules of other people


class Parsed(Exception):
    """Ends a script once its arguments are read."""


def words_of(text: str) -> list[str]:
    """Words of a command without its comment; a file written in place is none of them."""
    first = text.partition("\n")[0] if "<<" in text else text.replace("\\\n", " ")
    return shlex.split(first, comments=True)


def invocations(words: Sequence[str]) -> Iterator[tuple[list[str], str, list[str]]]:
    """Each Python program in a command: the words before it, its module, its arguments."""
    for number, word in enumerate(words):
        module = None
        if re.fullmatch(r"\w+\.py", word):
            module = word.removesuffix(".py")
        elif word == "-m" and words[:number][-1:] == ["python"]:
            number += 1
            module = words[number]
        if module is not None and words[0] != "mkdir":  # which only copies them
            rest = words[number + 1 :]
            end = next((i for i, item in enumerate(rest) if item in ("&", "&&", "|", ";")), len(rest))
            yield list(words[:number]), module, [item for item in rest[:end] if item != "…"]


def parse(module: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the arguments to the parser of the program, and stop there."""
    if module in STAGES:
        command_line.parse(command_line.STAGES[STAGES[module]], argv, "")
        return
    loaded = importlib.import_module({"smolkit.doctor": "smolkit.doctor.command"}.get(module, module))
    function = getattr(loaded, "parse", None) or getattr(loaded, "parse_arguments", None)
    if function is not None:  # with the checks that argparse cannot make
        function(argv)
        return
    original = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *positional: object, **named: object) -> None:
        original(parser, *positional, **named)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(Parsed):
            loaded.main(argv)


def launched(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """Script and arguments as the launcher understands them; None without a launcher."""
    if words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        args = launch_command_parser().parse_args(words[2:])
        assert args.config_file is None or (ROOT / args.config_file).is_file(), args.config_file
        return args.training_script, args.training_script_args
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(words[1:])
        return args.training_script, args.training_script_args
    if words[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        args = parse_args(words[1:])
        return args.user_script, args.user_args
    return None


def short(text: str) -> str:
    return " ".join(text.split())[:80]


def all_commands() -> list[str]:
    """Of every block, and those in the text that begin with `python`, each once."""
    found = [command.text for content in shell_blocks() for command in commands(content)]
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`((?:python|torchrun|accelerate|deepspeed)\s[^`]+)`", prose.replace("\n", " "))
    mentions = ("accelerate launch", "python -m smolkit.quantize")  # names of programs, without what they are given
    return list(dict.fromkeys([*found, *(text for text in inline if text not in mentions)]))


@pytest.mark.parametrize("text", [text for text in all_commands() if list(invocations(words_of(text)))], ids=short)
def test_flags_are_those_of_the_programs(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is run: the program's own parser reads the arguments, a launcher's what stands before the script."""
    monkeypatch.chdir(ROOT)
    words = words_of(text)
    for before, module, argv in invocations(words):
        if module in OTHERS:
            continue
        for file in [word for word in before if word.startswith("accelerate_offload/")]:
            assert (ROOT / file).is_file(), file
        if found := launched(words):
            assert found == (f"{module}.py", argv)
        if "--deepspeed" in argv:  # would start a process group; tests/test_launch_configs.py has the files read
            place = argv.index("--deepspeed")
            assert (ROOT / argv[place + 1]).is_file(), argv[place + 1]
            del argv[place : place + 2]
        if "..." in argv:
            argv[argv.index("...") :] = [*argv[argv.index("...") + 1 :], *"--data_path x --model_size tiny".split()]
        with mock.patch.dict(os.environ):  # --fsdp leaves variables behind
            parse(module, argv, monkeypatch)


def test_a_wrong_flag_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (
        "python -m smolkit.report --run_dirs x",
        "python export.py --model_path x --format gguf",
        "torchrun --nproc_per_node 2 train_dpo.py --data_path x --model_path x --betas 1",
    ):
        for _, module, argv in invocations(words_of(text)):
            with pytest.raises((SystemExit, ValueError)):
                parse(module, argv, monkeypatch)


def test_the_programs_are_known() -> None:
    """A command that begins with something else is read by nobody here."""
    known = "python python3.11 pip hf make bash cat mkdir curl accelerate torchrun deepspeed jupyter".split()
    known += ["sbatch", "ray", "vllm", "until", "kill", "server=$!"]  # what serves, and the lines around a server
    for content in shell_blocks():
        if content.startswith("Makefile"):
            continue
        for command in commands(content):
            program = next(word for word in words_of(command.text) if not re.fullmatch(r"[A-Z_]+=\S+", word))
            assert program in known, command.text


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_mixture_is_read(tmp_path: Path) -> None:
    from smolkit.sources.mixture import read_mixtures

    (tmp_path / "mixture.yaml").write_text(block("sources:\n"))
    shares = read_mixtures(tmp_path / "mixture.yaml")["sft"].shares
    assert sum(share.weight for share in shares) == pytest.approx(1) and shares[-1].repeat == 4


def test_the_executor_is_read(tmp_path: Path) -> None:
    cluster = pytest.importorskip("smolkit.sources.cluster", reason="datatrove is not installed here")
    (tmp_path / "executor.yaml").write_text(block("executor: slurm").replace("out/tokenizer", str(tmp_path)))
    plan = cluster.read_plan(tmp_path / "executor.yaml")
    assert (plan.executor, plan.tasks, plan.options["time"]) == ("slurm", 64, "24:00:00")


def test_the_rows_are_sound(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The doctor takes each row of "Data formats" for what it is shown as."""
    from smolkit.doctor.command import main

    for kind, row in zip(("pretrain", "sft", "dpo"), block('{"text": "Sample text').splitlines(), strict=True):
        (tmp_path / f"{kind}.jsonl").write_text(row + "\n")
        main([str(tmp_path / f"{kind}.jsonl"), "--json"])
        (found,) = json.loads(capsys.readouterr().out)["files"]
        assert (found["kind"], found["rows"]) == (kind, 1) and not found["findings"]


# --- commands that run -----------------------------------------------------------------------------------------------

# A server in the foreground, in the place of somebody who looks at it and presses Ctrl-C. PORT is a free one.
SERVE = """
serve() {
  "$@" --port PORT > server.log 2>&1 & local server=$! path=/health
  [ "$2" != app.py ] || path=/
  until python -c "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).status, sys.argv[1])" \\
    http://127.0.0.1:PORT$path 2>> client.log; do kill -0 $server || { cat server.log; return 1; }; sleep 0.5; done
  kill $server; wait $server || [ $? = 143 ]
}
"""
# A server for the commands that ask one.
BESIDE = """
python serve_hf.py --model_path out/quickstart/dpo --port OTHER_PORT > other.log 2>&1 & other=$!
trap 'kill $other' EXIT
until python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:OTHER_PORT/health')" 2>> client.log
do kill -0 $other; sleep 0.5; done
"""


def whole(directory: Path) -> None:
    """A complete checkpoint: transformers loads all of it without our code, and its weights are numbers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    tokenizer, ends = AutoTokenizer.from_pretrained(directory), model.generation_config.eos_token_id
    assert tokenizer.chat_template and (directory / "README.md").is_file()
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (ends if isinstance(ends, list) else [ends])


def trained(*names: str) -> Callable[[Path, str], None]:
    """Check that these runs are finished, with finite losses, and left what one can go on with."""

    def check(place: Path, _: str) -> None:
        for name in names:
            directory = place / name
            assert (directory / "training_complete.json").is_file(), name
            rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
            losses = [row["loss"] for row in rows if "loss" in row]
            assert losses and all(map(math.isfinite, losses)), name
            if (directory / "adapter_config.json").is_file():
                assert (directory / "adapter_model.safetensors").is_file(), name
            else:
                whole(directory)
            if (merged := directory.with_name(f"{directory.name}-merged")).exists():
                whole(merged)

    return check


def figures(directory: str, *names: str) -> Callable[[Path, str], None]:
    """Check that an evaluation wrote these figures."""

    def check(place: Path, _: str) -> None:
        metrics = json.loads((place / directory / "metrics.json").read_text())
        for name in names:
            assert math.isfinite(metrics[name]), name

    return check


def has(*names: str, says: Sequence[str] = ()) -> Callable[[Path, str], None]:
    """Check that files are there and not empty, and that the output says so much."""

    def check(place: Path, output: str) -> None:
        for name in names:
            assert (place / name).stat().st_size > 0, name
        for text in says:
            assert text in output, text

    return check


def both(*checks: Callable[[Path, str], None]) -> Callable[[Path, str], None]:
    def check(place: Path, output: str) -> None:
        for one in checks:
            one(place, output)

    return check


def planned(_: Path, output: str) -> None:
    """The first plan is a text, the second JSON."""
    text, _, plan = output.partition("\n{")
    assert "6,915,624,960 parameters" in text
    assert "accelerator_config" not in text and "hub_token" not in text, "the library's defaults are shown as settings"
    assert json.loads("{" + plan[: plan.rindex("}") + 1])["model"]


@dataclass(frozen=True)
class Case:
    """Commands of a block that run together.

    `instead`: patterns and what stands in their place here, a smaller size, a local directory, a free port; each must
    be found. A command that needs what is not here is left out, unless one of them changes it. `before` is shell.
    """

    block: str
    check: Callable[[Path, str], None]
    part: tuple[int, int | None] = (0, None)
    instead: Mapping[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    before: str = ""
    typed: str = ""
    code: int = 0


RECIPE, LAUNCHERS, PAGE = "--output_dir out/quickstart/data", "accelerate launch", "python app.py"
OWN_TEXT = "out/mine/tokenizer"
# The exam and the validation data are as large with --small: every 18th row has all kinds of questions.
THIN = "sed -i -n '1~18p' out/quickstart/data/exam/exam.jsonl out/quickstart/data/*/validation/*.jsonl"
SHORT = {r"--output_dir (output/\S+)": r"--output_dir \1 --max_steps 3"}
CASES = {
    "make": Case(
        "make quickstart", has(says=["quickstart.sh", 'loadfile -m "not slow"']), instead={"^make": "make -n"}
    ),
    "without make": Case(
        ".venv/bin/activate",
        has(says=[".venv/bin/python", "tests collected"]),
        instead={
            # without packages: the tests' own environment has them
            "^(python3.11 -m venv) (.*)": r"(\1 --without-pip \2 && command -v python)",
            "^bash recipes": "bash -n recipes",  # its commands are the cases below
            '-m "not slow"': '-m "not slow" --collect-only -q tests/test_rooms.py',
        },
    ),
    "recipe: data": Case(
        RECIPE,
        has("out/quickstart/data/exam/exam.jsonl", "out/quickstart/tokenizer/tokenizer.json"),
        part=(0, 2),
        instead={"--source tiny (.*)": rf"--source tiny --small \1 && {THIN}"},
    ),
    "recipe: pretraining": Case(
        RECIPE,
        trained("out/quickstart/pretrain"),
        part=(2, 3),
        instead={"--max_steps 2200": "--max_steps 6", "--warmup_steps 50": "--warmup_steps 2"},
        after=("recipe: data",),
    ),
    "recipe: fine-tuning": Case(
        RECIPE,
        trained("out/quickstart/sft", "out/quickstart/control"),
        part=(3, 5),
        instead={"--num_epochs 2": "--max_steps 4", "--warmup_steps 20": "--warmup_steps 2"},
        after=("recipe: pretraining",),
    ),
    "recipe: LoRA and DPO": Case(
        RECIPE,
        trained("out/quickstart/lora", "out/quickstart/dpo"),
        part=(5, 7),
        instead={"--num_epochs 6": "--max_steps 4", "--max_steps 90": "--max_steps 3"},
        after=("recipe: fine-tuning",),
    ),
    "recipe: exams": Case(
        RECIPE,
        both(
            figures("out/quickstart/sft/eval", "qa_en", "bits_per_byte"),
            figures("out/quickstart/control/eval", "qa_zh"),
        ),
        part=(7, 9),
        after=("recipe: fine-tuning",),
    ),
    "recipe: exams after it": Case(
        RECIPE,
        both(figures("out/quickstart/lora/eval", "skill"), figures("out/quickstart/dpo/eval", "preference_accuracy")),
        part=(9, 11),
        after=("recipe: LoRA and DPO",),
    ),
    "recipe: report": Case(
        RECIPE,
        has("out/quickstart/report.md", "out/quickstart/report.json", "out/quickstart/loss_curves.png"),
        part=(11, 12),
        after=("recipe: exams", "recipe: exams after it"),
        code=1,  # a few steps teach nothing
    ),
    "data": Case(
        "# from the Hugging Face hub",
        has(
            *(f"data/{part}/{part}_data.jsonl" for part in ("pretrain", "sft", "dpo")),
            says=["openai/gsm8k", "BAAI/IndustryCorpus2"],
        ),
        instead={"--path DIR": "--path DIR --sft --datasets gsm8k", "--source tiny": "--source tiny --small"},
    ),
    "tokenizer": Case(
        "--save_dir tokenizer-qwen",
        has("tokenizer/tokenizer.json", "tokenizer-qwen/tokenizer.json", says=["tokenizer-qwen"]),
        instead={"Qwen/Qwen1.5-7B": "out/quickstart/tokenizer", "--vocab_size 16000": "--vocab_size 1000"},
        after=("recipe: data", "data"),
    ),
    "doctor": Case(
        "smolkit.doctor",
        has("cleaned/sft/sft_data.jsonl"),
        after=("tokenizer",),
    ),
    "pretraining": Case(
        "--output_dir output/pretrain",
        trained("output/pretrain"),
        instead={"smollm2-135m": "tiny", "--num_epochs 1": "--max_steps 3"},
        after=("tokenizer",),
    ),
    "fine-tuning": Case(
        "--output_dir output/sft",
        trained("output/sft", "output/lora"),
        instead=SHORT,
        after=("pretraining",),
    ),
    "DPO": Case(
        "--output_dir output/dpo",
        trained("output/dpo", "output/dpo-lora"),
        instead=SHORT,
        after=("fine-tuning",),
    ),
    "evaluation": Case(
        "--check_transformers \\\n  --preferences",
        both(
            figures("out/quickstart/dpo/eval", "qa_en", "preference_accuracy", "bits_per_byte"),
            has("out/quickstart/dpo/eval/items.jsonl", "out/quickstart/dpo/eval/metrics.md"),
        ),
        after=("recipe: LoRA and DPO",),
    ),
    "own tasks": Case(
        "cat > choices.jsonl",
        figures("out/eval/mine", "choices_acc", "tasks", "tasks_ends_by_itself"),
        after=("recipe: LoRA and DPO",),
    ),
    "a server": Case(
        "--port 8011",
        figures("out/eval/server", "qa_en", "choices_acc"),
        instead={"8011": "PORT"},
        after=("own tasks",),
    ),
    "lm-evaluation-harness": Case(
        "mkdir -p my_tasks", figures("out/eval/harness", "my_choices_acc"), after=("own tasks",)
    ),
    "two models": Case(
        "--fail_below",
        has("out/quickstart/sft/eval/metrics.json", says=["qa_en", "preference_accuracy"]),
        instead={"--fail_below qa_en=50 ends_by_itself=95": "--fail_below qa_en=0 ends_by_itself=0"},
        after=("evaluation",),
    ),
    "accelerate, DDP": Case(
        LAUNCHERS,
        both(trained("output/ddp"), has(says=["2 processes"])),
        part=(0, 1),
        instead={**SHORT, "accelerate launch": "accelerate launch --main_process_port PORT"},
        after=("tokenizer",),
    ),
    "accelerate, FSDP2": Case(
        LAUNCHERS,
        both(trained("output/fsdp2"), has(says=["2 processes, FSDP2"])),
        part=(1, 2),
        instead={**SHORT, "accelerate launch": "accelerate launch --main_process_port PORT"},
        after=("accelerate, DDP",),
    ),
    "deepspeed, ZeRO-2": Case(
        LAUNCHERS,
        both(trained("output/zero2"), has(says=["2 processes, "])),
        part=(2, 3),
        instead={**SHORT, "deepspeed --num_gpus": "deepspeed --master_port PORT --num_gpus"},
        after=("accelerate, FSDP2",),
    ),
    "torchrun, FSDP": Case(
        LAUNCHERS,
        both(trained("output/adapter"), has(says=["2 processes, FSDP"])),
        part=(3, 4),
        instead=SHORT,
        after=("accelerate, FSDP2",),
    ),
    "spread experts": Case(
        "--output_dir output/experts",
        trained("output/experts"),
        instead={"--max_steps 20": "--max_steps 3"},
        after=("tokenizer",),
    ),
    "plans": Case("recipes/base-7b.yaml", planned),
    "watching": Case(
        "--output_dir output/watched",
        both(
            trained("output/watched"),
            has(*(f"output/watched/{name}" for name in ("report.html", "curves.png", "samples.jsonl"))),
        ),
        instead={"--eval_steps 200 --save_steps 500": "--max_steps 4 --eval_steps 2 --save_steps 2"},
        after=("pretraining",),
    ),
    "chat": Case(
        "--prompt",
        has(says=["you> "]),
        part=(0, 2),
        after=("recipe: LoRA and DPO",),
        typed="What is the job of Nora?\n/help\n",
    ),
    "chat with tools, a text, a server": Case(
        "--prompt",
        has(says=["you> "]),
        part=(2, 5),
        instead={"127.0.0.1:8000": "127.0.0.1:OTHER_PORT"},
        after=("recipe: LoRA and DPO",),
        before=BESIDE,
        typed="What is the job of Nora?\n",
    ),
    "the page": Case(
        "python app.py",
        has(says=["200 http://127.0.0.1:"]),
        part=(0, 2),
        instead={"^python app.py": "serve python app.py"},
        after=("recipe: LoRA and DPO",),
        before=SERVE,
    ),
    "the page and a server": Case(
        "python app.py",
        has(says=["200 http://127.0.0.1:"]),
        part=(2, 3),
        instead={"^python app.py": "serve python app.py", "127.0.0.1:8000": "127.0.0.1:OTHER_PORT"},
        after=("recipe: LoRA and DPO",),
        before=BESIDE + SERVE,
    ),
    "a Space": Case("mkdir space", has(*(f"space/{name}" for name in ("app.py", "README.md", "requirements.txt")))),
    "export": Case(
        "python export.py",
        both(
            has("output/gguf/model.gguf", "output/gguf/Modelfile", "output/gguf-lora/model.gguf"),
            lambda place, _: whole(place / "output/merged"),
        ),
        after=("DPO",),
    ),
    "upcycling": Case(
        "--upcycle_from",
        trained("output/upcycled"),
        instead=SHORT,
        after=("pretraining",),
    ),
    "own text: pretraining": Case(
        "out/mine/tokenizer",
        trained("out/mine/pretrain"),
        part=(0, 2),
        instead={"Qwen/Qwen2.5-0.5B": "out/quickstart/tokenizer", "--max_steps 110": "--max_steps 3"},
        after=("recipe: data",),
    ),
    "own text: fine-tuning": Case(
        "out/mine/tokenizer",
        both(trained("out/mine/sft"), has(says=["200 http://127.0.0.1:"])),
        part=(2, 5),
        instead={"--max_steps 80": "--max_steps 3", "^python serve_hf.py": "serve python serve_hf.py"},
        after=("own text: pretraining",),
        before=SERVE,
    ),
    "a public checkpoint": Case(
        "hf download",
        both(trained("out/public/sft", "out/public/lora"), has(says=["200 http://127.0.0.1:"])),
        instead={
            r"(--\w+_model) public/base": r"\1 output/pretrain",
            "--num_epochs 1": "--max_steps 3",
            "^python serve_hf.py": "serve python serve_hf.py",
        },
        after=("pretraining",),
        before=SERVE,
    ),
}


def prepared(case: Case) -> list[str]:
    """The commands as they are run here."""
    chosen, found = [], set()
    for command in commands(block(case.block))[slice(*case.part)]:
        text = command.text
        for pattern, replacement in case.instead.items():
            text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
            found |= {pattern} if count else set()
        if command.needs is None or text != command.text:
            chosen.append(text)
    missing = set(case.instead) - found
    assert not missing, f"{case.block!r} has no {missing}"
    return chosen


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Workplace:
    """A copy of the checkout in which the cases run, each once and after those it starts from."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.outcomes: dict[str, AssertionError | None] = {}
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, listed.split("\0")):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)
        sums = [{"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(80)]
        (place / "DIR" / "gsm8k").mkdir(parents=True)  # as the hub has it
        (place / "DIR" / "gsm8k" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
        (place / "mytext.txt").write_text(README, encoding="utf-8")

    def run(self, case: Case) -> None:
        """Execute the commands with bash, which stops at the first that fails, and check what they left."""
        script = "\n".join(["set -e", case.before, *prepared(case)])
        for name in ("OTHER_PORT", "PORT"):
            script = script.replace(name, str(free_port()))
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        process = subprocess.Popen(
            ["bash", "-c", script],
            cwd=self.place,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that nothing is left running
        )
        try:
            output, _ = process.communicate(case.typed, timeout=600)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        assert process.returncode == case.code, f"{script}\nexit {process.returncode}\n{output}"
        print(output)  # pytest shows it with a check that fails
        case.check(self.place, output)

    def done(self, name: str) -> None:
        """Run a case unless it has been run, and those before it."""
        if name not in self.outcomes:
            for earlier in CASES[name].after:
                self.done(earlier)
            try:
                self.run(CASES[name])
                self.outcomes[name] = None
            except AssertionError as error:
                self.outcomes[name] = error
        if (error := self.outcomes[name]) is not None:
            raise error


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("checkout"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_commands_run(name: str, workplace: Workplace) -> None:
    workplace.done(name)
