"""smolkit/runtime.py: memory that is kept for the next step, and given back when it grows without end."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smolkit.errors import Interrupted, UserError, run
from smolkit.hardware import device_flops
from smolkit.runtime import chosen_device, compute_dtype, default_device

# Holes of 32 MiB, kept apart by tensors of 1 MiB that live on, and then tensors of 33 MiB, which fit into none.
HOLES = """
import psutil, torch
from smolkit.runtime import KeptMemory, prepare

def resident():
    return psutil.Process().memory_info().rss / 2**20

prepare(0)
memory = KeptMemory()
first, settled = torch.ones(2**25), torch.ones(2**18)
del first
after_first_step = resident()
memory.check()
returned = after_first_step - resident()
fill = [torch.ones(2**18) for _ in range(256)]  # the holes that importing left
between, large = [], []
for _ in range(16):
    large.append(torch.ones(2**23))
    between.append(torch.ones(2**18))
large.clear()
memory.check()
with_holes = resident()
larger = [torch.ones(2**23 + 2**18) for _ in range(16)]
grown = resident()
memory.check()
print(returned, with_holes, grown, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt and malloc_trim are glibc's")
def test_a_heap_that_has_grown_around_holes_is_trimmed() -> None:
    command = [sys.executable, "-c", HOLES]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    returned, with_holes, grown, trimmed = map(float, done.stdout.split()[-4:])
    assert returned >= 128, "what the first step left behind"
    assert grown - with_holes == pytest.approx(16 * 33, rel=0.1), "freed memory was kept, and did not fit"
    assert grown - trimmed == pytest.approx(16 * 32, rel=0.1), "the holes are given back, and nothing else"


def test_a_device_is_chosen_by_name_or_refused() -> None:
    assert chosen_device("cpu") == torch.device("cpu")
    assert chosen_device(None) == default_device()
    assert compute_dtype("auto", torch.device("meta")) == torch.bfloat16, "not by the CPU's instructions"
    with pytest.raises(UserError, match=r"--device gpu: .*cpu.*; leave it out to take"):
        chosen_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda: "):
            chosen_device("cuda")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10G", 70.0),
        ("Tesla T4", 65.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI250X", 191.5),  # half a package
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
    ],
)
def test_the_speed_of_a_gpu_goes_by_whole_words_of_its_name(name, tflops) -> None:
    assert device_flops(name) == (None if tflops is None else tflops * 1e12)


HUGE = """
import torch
from smolkit.runtime import prepare

prepare(0, huge_pages=True)
large = torch.ones(2**24)  # 64 MiB
print(*(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""


def test_large_tensors_lie_in_huge_pages_and_limited_addresses_are_left_alone() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if platform.libc_ver()[0] != "glibc" or not setting.exists() or "[never]" in setting.read_text():
        # mallopt is glibc's, and what the system never hands out nobody can ask for: nothing of ours is left to see.
        pytest.skip("needs glibc and a Linux whose transparent_hugepage/enabled is not never")
    command, folder = [sys.executable, "-c", HUGE], Path(__file__).parents[1]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 32 * 1024, "kB"
    shell = ["bash", "-c", 'ulimit -v 16000000 && exec "$@"', "bash", *command]
    done = subprocess.run(shell, cwd=folder, capture_output=True, text=True, check=True)
    if "[madvise]" in setting.read_text():
        assert int(done.stdout) < 4 * 1024, "as if half of the memory had not been asked for"


@pytest.mark.parametrize(
    ("problem", "code", "line"),
    [
        (UserError("a.jsonl:3: no text"), 2, "error: a.jsonl:3: no text"),
        (Interrupted("stopped after saving"), 75, "stopped after saving"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_ends_a_script_has_an_exit_code_and_one_line(problem, code, line, capsys) -> None:
    def main() -> None:
        raise problem

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == code
    assert capsys.readouterr().err == line + "\n"
