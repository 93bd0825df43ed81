"""smolkit/runtime.py: memory that is kept for the next step, and given back when it grows without end."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smolkit.errors import UserError
from smolkit.runtime import chosen_device, compute_dtype, default_device

# Each turn frees a large tensor (32 MiB), and a smaller one that lives on settles in the hole: the next large one, a
# page longer, no longer fits.
TURNS = """
import psutil, torch
from smolkit.runtime import KeptMemory, prepare

prepare(0)
memory, small, most = KeptMemory(), [], 0
for turn in range(40):
    large = torch.ones(2**23 + 2**10 * turn)
    del large
    small.append(torch.ones(2**18))
    if {checks}:
        memory.check()
    most = max(most, psutil.Process().memory_info().rss)
    if turn == 1:
        begin = most
print((most - begin) / begin)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the settings are those of glibc")
def test_a_heap_full_of_holes_does_not_grow_without_end() -> None:
    growth = {}
    for checks in (False, True):
        command = [sys.executable, "-c", TURNS.format(checks=checks)]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
        growth[checks] = float(done.stdout.split()[-1])
    assert growth[False] > 1.5, "the pattern does not show what it should"
    assert growth[True] < 0.6


def test_a_device_is_chosen_by_name_or_refused() -> None:
    assert chosen_device("cpu") == torch.device("cpu")
    assert chosen_device(None) == default_device()
    assert compute_dtype("auto", torch.device("meta")) == torch.bfloat16, "not by the CPU's instructions"
    with pytest.raises(UserError, match=r"--device gpu: .*cpu.*; leave it out to take"):
        chosen_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda: "):
            chosen_device("cuda")
