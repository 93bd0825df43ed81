"""`recipes/quickstart.sh` with a stand-in for `python`: the commands it runs; the README shows exactly these."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

# Records its arguments; the server prints its address and stays, as the real one does.
STAND_IN = """#!/usr/bin/env bash
[ "$1" = - ] && exit 0
line=$(printf '%q ' "$@"); echo "$line" >> "$COMMANDS"  # one write: two stages may run side by side
[ "$1" = "${FAILING:-}" ] && exit 3
[ "$1" = serve_hf.py ] && { echo "serving at http://127.0.0.1:9/v1"; exec sleep 60; }
exit 0
"""


def run_recipe(root: Path, tmp_path: Path, **environment: str) -> tuple[int, list[list[str]]]:
    """Exit code and the argument lists of every `python` call."""
    (tmp_path / "recipes").mkdir()
    shutil.copy(root / "recipes/quickstart.sh", tmp_path / "recipes")
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin/python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    log = tmp_path / "commands"
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "COMMANDS": str(log)} | environment
    command = ["bash", "recipes/quickstart.sh"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, timeout=60, capture_output=True)
    return done.returncode, [shlex.split(line) for line in log.read_text().splitlines()] if log.exists() else []


def readme_commands(root: Path) -> list[list[str]]:
    text = (root / "README.md").read_text(encoding="utf-8")
    section = re.search(r"<!-- recipe:begin -->(.*)<!-- recipe:end -->", text, re.S).group(1)
    lines = section.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("python ")]


def test_the_readme_shows_the_commands_of_the_quickstart(root: Path, tmp_path: Path) -> None:
    code, commands = run_recipe(root, tmp_path)
    stages = [c for c in commands if c[0] not in ("serve_hf.py", "chat.py")]
    assert code == 0
    assert sorted(readme_commands(root)) == sorted(stages)


def test_it_asks_in_english_in_chinese_and_for_a_tool(root: Path, tmp_path: Path) -> None:
    _, commands = run_recipe(root, tmp_path)
    asked = [c for c in commands if c[0] == "chat.py"]
    assert len(asked) == 3
    assert any(re.search("[\u4e00-\u9fff]", " ".join(c)) for c in asked)
    assert any("--tools" in c for c in asked)


def test_moe_writes_elsewhere_and_has_no_control(root: Path, tmp_path: Path) -> None:
    code, commands = run_recipe(root, tmp_path, MODEL="tiny-moe")
    assert code == 0
    assert not any("out/quickstart/" in argument for c in commands for argument in c)
    assert not any("--init_from_scratch" in c for c in commands)
    assert any("tiny-moe" in c for c in commands if c[0] == "train_pretrain.py")


@pytest.mark.parametrize("failing", ["train_full_sft.py", "train_lora.py", "train_dpo.py"])
def test_a_failing_stage_ends_it(root: Path, tmp_path: Path, failing: str) -> None:
    code, commands = run_recipe(root, tmp_path, FAILING=failing)
    assert code == 3
    assert not any(c[0] in ("serve_hf.py", "chat.py") for c in commands)


def test_an_unknown_model_is_refused(root: Path, tmp_path: Path) -> None:
    code, commands = run_recipe(root, tmp_path, MODEL="huge")
    assert code == 2 and not commands
