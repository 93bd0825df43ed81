"""The arrows of the design: scripts → smolkit → model → kernels, read from the import statements themselves."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL = {path.stem for path in ROOT.glob("smol_*.py")}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - MODEL
ROOMS = sorted((ROOT / "smolkit").rglob("*.py"))
NUMBERS = ("statistics.py", "results.py", "comparison.py", "records.py", "texts.py")  # of smolkit/evaluation/
# Programs and libraries that speak HTTP. chat.py may catch the errors of `openai`: smolkit/clients.py makes the client.
HTTP = {"requests", "httpx", "aiohttp", "urllib.request", "http", "fastapi", "starlette", "uvicorn", "pydantic"}
HTTP_ROOMS = {"smolkit.openai_api", "smolkit.openai_types", "smolkit.answers", "smolkit.http_guard"}
TEXT_ROOMS = {"tokenizers", "smolkit.chat", "smolkit.text_stream", "smolkit.tokenizer"}
TRAINERS = "training optimizer progress guards packing persistence preference_trainer expert_trainer samples".split()
TRAINING = {"trl", "accelerate", "deepspeed", *(f"smolkit.{name}" for name in TRAINERS)}
GENERATION_ROOMS = ("engine", "batch", "decoder", "vllm_engine")
# What a room must not import itself (a name stands for all below it). What its imports import in turn is not followed:
# most rooms that only read data render conversations as well, and so load transformers.
FORBIDDEN = {
    "smol_model.py": {"argparse", "tokenizers", "torch.distributed", "transformers.PreTrainedTokenizerFast"},
    "smol_config.py": {"argparse", "tokenizers", "torch.distributed", "smol_model", "smol_kernels"},
    "smol_kernels.py": {"argparse", "tokenizers", "torch.distributed"},
    "smolkit/arguments.py": {"torch"},
    "smolkit/runtime.py": {*MODEL, "datasets", "smolkit.packing"},
    "smolkit/filters.py": {"torch", "transformers", "tokenizers"},
    "smolkit/chat.py": {"torch", *MODEL, *HTTP, *HTTP_ROOMS},
    "smolkit/parallel.py": {"datasets", "smolkit.packing", "smolkit.doctor"},
    **{f"smolkit/{name}.py": {*HTTP, *HTTP_ROOMS, *TEXT_ROOMS} for name in GENERATION_ROOMS},
    **{f"smolkit/{name}.py": TRAINING for name in ("quantize", "export", "gguf_file")},
    "smolkit/openai_api.py": {"torch", "vllm"},
    "smolkit/openai_types.py": {"torch", "vllm"},
    "smolkit/answers.py": {"torch", "vllm"},
    "smolkit/http_guard.py": {"torch", "transformers", "vllm"},
    "smolkit/errors.py": {"torch", "transformers"},
    "smolkit/files.py": {"torch", "transformers"},
    "smolkit/tiny_world.py": {"torch", "transformers", "numpy"},
    "smolkit/tiny_world_words.py": {"torch", "transformers", "numpy"},
    "smolkit/report.py": {"torch", "transformers"},
    "smolkit/run_report.py": {"torch", "transformers"},
    "smolkit/charts.py": {"torch", "transformers"},
    "smolkit/diagnosis.py": {"torch", "transformers", "numpy"},
    **{f"smolkit/doctor/{path.name}": {"torch"} for path in (ROOT / "smolkit" / "doctor").glob("*.py")},
    "smolkit/tokenizer.py": {"torch"},
    "smolkit/packing.py": MODEL,
    "smolkit/planner.py": {"torch", "transformers", "smol_model"},  # a configuration, never a model
    **{
        f"smolkit/evaluation/{name}": TRAINING | ({"torch", "transformers"} if name in NUMBERS else set())
        for name in (path.name for path in (ROOT / "smolkit" / "evaluation").glob("*.py"))
    },
    "smolkit/shards.py": {*MODEL, "torch"},
    **{f"{name}.py": {*HTTP, "torch.distributed"} for name in SCRIPTS},
}


def imports(path: Path) -> set[str]:
    """Dotted names of every module that the file imports, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; the project uses absolute ones"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_model_file_stands_on_its_kernels_alone() -> None:
    assert not (roots(ROOT / "smol_config.py") | roots(ROOT / "smol_model.py")) & (SCRIPTS | {"smolkit"})
    assert not roots(ROOT / "smol_kernels.py") & (SCRIPTS | MODEL | {"smolkit", "transformers"})


@pytest.mark.parametrize("path", ROOMS, ids=relative)
def test_rooms_import_no_script(path: Path) -> None:
    assert not roots(path) & SCRIPTS


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_scripts_do_not_import_each_other(name: str) -> None:
    assert not roots(ROOT / f"{name}.py") & SCRIPTS


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_rooms_stay_clear_of_what_they_must_not_touch(name: str) -> None:
    found = {used for used in imports(ROOT / name) for word in FORBIDDEN[name] if f"{used}.".startswith(f"{word}.")}
    assert not found


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_scripts_leave_the_work_to_the_rooms(name: str) -> None:
    """No gradients and no ranks; their imports are looked at above."""
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not [found for found in attributes if re.search(r"\.backward$|\bdistributed\b", found)]


def test_what_all_trainers_share_names_no_stage() -> None:
    text = (ROOT / "smolkit" / "training.py").read_text(encoding="utf-8")
    assert not re.findall(r"\b\w*(?:sft|dpo|lora)\w*\b", text, re.IGNORECASE)


def test_the_launcher_files_are_no_python() -> None:
    assert not list((ROOT / "accelerate_offload").rglob("*.py"))


def test_the_data_sources_touch_the_network_in_one_place_only() -> None:
    users = [path for path in (ROOT / "smolkit" / "sources").glob("*.py") if "huggingface_hub" in roots(path)]
    assert [path.name for path in users] == ["files.py"]


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_every_script_has_a_main_and_ends_with_run(name: str) -> None:
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert [arg.arg for arg in functions["main"].args.args] == ["argv"]
    assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    run(main)"
    assert ast.get_docstring(tree), "a script says what it is for"


def test_the_readme_names_every_file_once() -> None:
    """The tree under "What is where" has one line for each script and room, and for nothing that is not there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("## What is where")[1].split("```")[1]
    named = re.findall(r"(?:smolkit/|recipes/)?[a-z_]+\.(?:py|sh)", tree)
    scripts = {path.name for path in ROOT.glob("*.py")} | {relative(path) for path in ROOT.glob("recipes/*.sh")}
    rooms = {relative(path) for path in (ROOT / "smolkit").glob("*.py")} - {"smolkit/__init__.py"}
    assert sorted(n for n in named if n != "tiny_world_words.py") == sorted(
        (scripts | rooms) - {"smolkit/tiny_world_words.py"}
    )
