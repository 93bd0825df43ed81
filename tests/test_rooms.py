"""The arrows of the design: scripts → smolkit → smol_model, read from the import statements themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"smol_model"}
ROOMS = sorted((ROOT / "smolkit").rglob("*.py"))
# Rooms that serve requests or read data must start without a model library behind them.
FORBIDDEN = {
    "smolkit/openai_api.py": {"torch", "vllm", "transformers"},
    "smolkit/openai_types.py": {"torch", "vllm", "transformers"},
    "smolkit/errors.py": {"torch", "transformers"},
    "smolkit/files.py": {"torch", "transformers"},
    "smolkit/tiny_world.py": {"torch", "transformers", "numpy"},
    "smolkit/tiny_world_words.py": {"torch", "transformers", "numpy"},
    "smolkit/report.py": {"torch", "transformers"},
    "smolkit/doctor.py": {"torch"},
    "smolkit/packing.py": {"smol_model"},
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


def test_the_model_file_stands_alone() -> None:
    assert not roots(ROOT / "smol_model.py") & (SCRIPTS | {"smolkit"})


@pytest.mark.parametrize("path", ROOMS, ids=relative)
def test_rooms_import_no_script(path: Path) -> None:
    assert not roots(path) & SCRIPTS


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_scripts_do_not_import_each_other(name: str) -> None:
    assert not roots(ROOT / f"{name}.py") & SCRIPTS


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_rooms_stay_clear_of_what_they_must_not_touch(name: str) -> None:
    assert not roots(ROOT / name) & FORBIDDEN[name]


def test_the_api_layer_is_free_of_torch_and_vllm_all_the_way_down() -> None:
    """Not only its own imports: also those of every room it reaches, when imported at the top of the file."""
    seen: set[Path] = set()
    queue = [ROOT / "smolkit" / "openai_api.py"]
    while queue:
        path = queue.pop()
        if path in seen:
            continue
        seen.add(path)
        assert not top_level_roots(path) & {"torch", "vllm"}, relative(path)
        for name in imports(path):
            room = ROOT / (name.replace(".", "/") + ".py")
            if name.startswith("smolkit.") and room.is_file():
                queue.append(room)


def top_level_roots(path: Path) -> set[str]:
    """What importing the file imports: statements of its top level, `if TYPE_CHECKING` blocks apart."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


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
