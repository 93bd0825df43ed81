"""The notebooks run from top to bottom, as a reader runs them; what is shipped is whole, light and says its kernel."""

import base64
import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


DEFINED = re.compile(r"^(?:def|class) (\w+)", re.MULTILINE)


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def execute(path: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a notebook with its files under `work`; everything it printed. A cell that fails raises."""
    monkeypatch.setenv("WORK", str(work))
    notebook = read(path)
    where = {"metadata": {"path": path.parent}}
    client = NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=where)
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def test_the_five_are_there() -> None:
    """The names of the specification, and one that ends the story."""
    expected = ["00-intro", "01-implement-MiniLM", "02-build-tokenizer", "03-model-pretrain", "04-align-and-serve"]
    assert NAMES == expected
    listed = re.findall(r"\]\((\d\d-[\w-]+)\.ipynb\)", (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8"))
    assert sorted(set(listed)) == expected


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_shipped_outputs_are_whole_and_light(path: Path) -> None:
    """Executed in order, without an error, small; no path of the machine it ran on."""
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    pictures = 0
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error", output
            if "image/png" in output.get("data", {}):
                pictures += 1
                assert len(base64.b64decode(output.data["image/png"])) < 300_000
    assert pictures or path.stem.startswith("00")
    assert path.stat().st_size < 600_000
    for private in ("/tmp/", "/home/", "/root/", "/work/"):
        assert private not in json.dumps([cell.get("outputs") for cell in notebook.cells])
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebooks_define_nothing_that_the_project_has(path: Path) -> None:
    """They import public names only, and define none that a module has; 01, which teaches, checks its own beside it."""
    cells = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
    assert not re.findall(r"^from \S+ import .*\b_\w+", "\n".join(cells), re.MULTILINE)
    modules = [*(ROOT / "smolkit").rglob("*.py"), *ROOT.glob("smol_*.py")]
    taken = {name for module in modules for name in DEFINED.findall(module.read_text(encoding="utf-8"))}
    for cell, following in zip(cells, [*cells[1:], ""], strict=True):
        checked = path.stem.startswith("01") and "assert_close" in following
        assert checked or not taken & set(DEFINED.findall(cell)), cell


SLOW = pytest.mark.slow  # they start several programs


@pytest.mark.parametrize(
    "name",
    ["01-implement-MiniLM", pytest.param("00-intro", marks=SLOW), pytest.param("02-build-tokenizer", marks=SLOW)],
)
def test_the_short_ones_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """01 checks itself against smol_model.py in every other cell, 02 against the library."""
    text = execute(ROOT / "notebooks" / f"{name}.ipynb", tmp_path, monkeypatch)
    if name.startswith("01"):
        first, last = map(float, re.search(r"loss ([\d.]+) → ([\d.]+)", text).groups())
        assert first > 3.5 and last < 1.0  # it learned to copy
    if name.startswith("02"):
        assert "render:              1 end of a turn" in text


@pytest.mark.slow
def test_the_training_ones_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """03 and 04 in order: what 03 trained, 04 makes an assistant of."""
    execute(ROOT / "notebooks" / "03-model-pretrain.ipynb", tmp_path, monkeypatch)
    rows = [json.loads(line) for line in open(tmp_path / "pretrain" / "metrics.jsonl")]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] > 7 and losses[-1] < 1.2
    text = execute(ROOT / "notebooks" / "04-align-and-serve.ipynb", tmp_path, monkeypatch)
    assert "\nmodel   [('get_weather', " in text, "the reply is a call (the tool's description is printed before it)"
    assert "\nwith adapter  Thank you, " in text and "\nwithout       Thank" not in text
    assert os.path.isfile(tmp_path / "dpo" / "model.safetensors")
    margins = [json.loads(line).get("rewards/margins") for line in open(tmp_path / "dpo" / "metrics.jsonl")]
    margins = [margin for margin in margins if margin is not None]
    assert abs(margins[0]) < 0.05 < 0.2 < margins[-1]
