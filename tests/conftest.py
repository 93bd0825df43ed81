"""What every test room shares: the checkout, the real samples, a way to run a script as a user would."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

# A forgotten download fails at once instead of hanging. Set before anything imports the hub's library.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Token ids of test data are kept apart from the user's, and are gone after the session.
_cache = tempfile.TemporaryDirectory(prefix="smollm-tests-")
os.environ["SMOLLM_CACHE"] = _cache.name

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout's root."""
    return ROOT


@pytest.fixture(scope="session")
def samples() -> Path:
    """Directory of small slices of real datasets; a test that needs it is skipped where it is absent."""
    directory = Path(os.environ.get("SMOLLM_SAMPLES", ROOT.parent / "shared" / "samples"))
    if not directory.is_dir():
        pytest.skip(f"no real samples at {directory} (set SMOLLM_SAMPLES)")
    return directory


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter that has vLLM: `$SMOLLM_VLLM_PYTHON`, else this one; without either the test is skipped."""
    python = os.environ.get("SMOLLM_VLLM_PYTHON") or sys.executable
    if python == sys.executable and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here (requirements-vllm-*.txt), and SMOLLM_VLLM_PYTHON is not set")
    return python


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess]:
    """`run_script("prepare_datasets.py", "--list", expect=0)`: run in a subprocess, check the exit code."""

    def run(
        *arguments: object, expect: int = 0, timeout: float = 300, env: dict | None = None, cwd: Path = ROOT
    ) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / str(arguments[0])), *map(str, arguments[1:])]
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=cwd,
            env={**os.environ, **(env or {})},
        )
        detail = f"{command}\nexit {result.returncode}, expected {expect}\n{result.stdout}\n{result.stderr}"
        assert result.returncode == expect, detail
        return result

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cases marked `gpu` say that they did not run, where they cannot."""
    from torch.cuda import is_available  # here, so that collecting a room without torch stays fast

    if not is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
