"""The example changes of CONTRIBUTING.md fit the code they speak of."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = {  # and the tests that show the change to work
    "A data source": ["tests/test_prepare_datasets.py", "-k", "every_known_dataset"],
    "A preset": ["tests/test_model.py", "-k", "parameters"],
    "A loss": ["tests/test_preferences.py", "-k", "length_is_penalised"],
}


def example(title: str) -> str:
    """The diff in a section of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (diff,) = re.findall(r"```diff\n(.*?)```", text.split(f"\n## {title}\n")[1].split("\n## ")[0], re.DOTALL)
    return diff


def changed_files(diff: str) -> list[str]:
    return re.findall(r"^\+\+\+ b/(.+)$", diff, re.MULTILINE)


def apply(diff: str, folder: Path) -> None:
    """Apply the diff to the copy in `folder`."""
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}  # a repository above is not meant
    command = ["git", "apply", "--whitespace=error-all", "-"]
    result = subprocess.run(command, input=diff, text=True, cwd=folder, env=environment, capture_output=True)
    assert result.returncode == 0, f"CONTRIBUTING.md is out of date: {result.stderr}"


@pytest.mark.parametrize("title", SECTIONS)
def test_the_example_applies_and_compiles(title: str, tmp_path: Path) -> None:
    diff = example(title)
    files = changed_files(diff)
    code = [name for name in files if not name.startswith("tests/")]
    assert len(code) <= 3 and len(files) > len(code), "three files at most, and a test"
    for name in files:
        if (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    apply(diff, tmp_path)
    for name in files:
        text = (tmp_path / name).read_text(encoding="utf-8")
        compile(text, name, "exec")
        assert not (ROOT / name).exists() or text != (ROOT / name).read_text(encoding="utf-8")


def test_a_change_of_the_code_is_noticed(tmp_path: Path) -> None:
    diff = example("A preset")
    for name in changed_files(diff):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace("smollm2-1.7b", "renamed"), encoding="utf-8")
    with pytest.raises(AssertionError, match="out of date"):
        apply(diff, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("title", SECTIONS)
def test_the_example_passes_its_tests(title: str, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("smolkit", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, tmp_path)
    apply(example(title), tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", *SECTIONS[title]]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
