"""The README's section on serving, run as it stands there, but for port and checkpoint."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import started

PORT = "http://127.0.0.1:8000"


def block(root: Path, name: str) -> str:
    """The code between `<!-- name:begin -->` and `<!-- name:end -->`."""
    text = (root / "README.md").read_text(encoding="utf-8")
    return text.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0].split("```")[1].partition("\n")[2]


def test_curl(root: Path, url: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    script = block(root, "serving:curl")
    assert script.count(PORT) == script.count("curl ") == 6
    command = "set -e\n" + script.replace(PORT, url).replace("curl -s", "curl --fail-with-body -s")
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    for expected in ('{"status":"ok"}', '"object":"list"', '"chat.completion"', "data: [DONE]", '"count":', "smollm_"):
        assert expected in result.stdout


def test_python(root: Path, url: str, capsys: pytest.CaptureFixture) -> None:
    exec(block(root, "serving:python").replace(PORT, url), {})
    assert '{"age": ' in capsys.readouterr().out


@pytest.mark.slow
def test_commands(root: Path, checkpoint: Path) -> None:
    """Both scripts with the flags shown: one serves, the other leaves at the end of its input."""
    section = (root / "README.md").read_text(encoding="utf-8").split("## Serving")[1]
    lines = [line.partition("#")[0].split() for line in section.split("```")[1].splitlines()[1:]]
    serve, chat = ([word.replace("out/quickstart/dpo", str(checkpoint)) for word in line[1:]] for line in lines)
    with started(root, *serve) as (url, _):
        assert url.startswith("http://127.0.0.1:")
    command = [sys.executable, *chat]
    result = subprocess.run(command, input="", capture_output=True, text=True, cwd=root, timeout=300)
    assert result.returncode == 0, result.stderr
