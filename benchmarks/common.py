"""What the benchmarks share: cases, worker processes that take turns, memory, the machine, the report.

A benchmark compares *sides* (ours and its peers). Each measurement runs in a process of its own, because allocator
settings, thread pools and leftovers of one side must not help or hurt another; rounds go through all sides in turn,
because a shared machine is faster in one minute than in the next. What is reported is the ratio inside a round and
the median over rounds.
"""

import argparse
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import operator
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smol_config import SmolConfig, count_parameters, preset_config
from smolkit.errors import UserError
from smolkit.runtime import supports_bf16

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20

# --- cases --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A figure that must be reached. quantity: speed or memory (ours over the peer's), matmul (share), mfu."""

    side: str
    quantity: str
    limit: float
    peer: str | None = None

    def judge(self, measured: float | None) -> dict[str, Any]:
        """One line of the report; memory must stay below its limit, everything else must reach it."""
        sign, meets = ("<=", operator.le) if self.quantity == "memory" else (">=", operator.ge)
        what = f"{self.quantity} of {self.side}" + (f" / {self.peer}" if self.peer else "")
        return {
            "target": f"{what} {sign} {self.limit}",
            "measured": None if measured is None else round(measured, 3),
            "met": None if measured is None else meets(measured, self.limit),
        }


@dataclass(frozen=True)
class Case:
    """Shape of a model and of its batch, the sides that a plain run compares, and what must be reached."""

    model: dict[str, Any]  # fields of SmolConfig
    batch: int  # rows
    length: int  # tokens of a row
    sides: tuple[str, ...]
    targets: tuple[Target, ...] = ()
    # Steps of a round that are not counted, and those that are. Small models need more of the first: until a heap of
    # blocks of many sizes stops growing, its growth costs page faults.
    warmup: int = 2
    steps: int = 4

    def config(self) -> SmolConfig:
        return SmolConfig(**self.model)


def preset(name: str, **changes: Any) -> dict[str, Any]:
    """Fields of a preset of smol_config.py, some of them replaced."""
    config = preset_config(name, **changes)
    return {field: getattr(config, field) for field in SmolConfig.__annotations__ if hasattr(config, field)}


def shape(D: int, L: int, H: int, K: int, F: int, V: int, **more: Any) -> dict[str, Any]:
    """Width, layers, query heads, key heads, MLP width, vocabulary; a context of 8,192."""
    names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size"
    sizes = dict(zip(names.split(), (D, L, H, K, F, V), strict=True))
    return sizes | {"max_position_embeddings": 8192} | more


SMOLLM2_135M = shape(576, 30, 9, 3, 1536, 49152, rope_parameters={"rope_type": "default", "rope_theta": 1e5})
PEERS = ("transformers", "transformers+prepared", "litgpt", "minimind")
OURS = ("ours", "ours+regions")  # without and with --torch_compile true
DENSE, MOE = (*OURS, *PEERS), (*OURS, "ours+dropless", "ours+dropless+regions", *PEERS)
CUDA = ("ours+regions", "transformers", "transformers+regions")


def faster(sides: Sequence[str], **limits: float) -> tuple[Target, ...]:
    """Each side's speed over each peer's."""
    return tuple(Target(side, "speed", limit, peer) for side in sides for peer, limit in limits.items())


CASES = {
    "tiny": Case(preset("tiny"), 4, 128, DENSE, warmup=20, steps=20),
    "tiny-moe": Case(preset("tiny-moe"), 4, 128, MOE, warmup=20, steps=20),
    "6.7m": Case(
        shape(256, 8, 8, 2, 704, 4096), 8, 256, DENSE, faster(OURS, transformers=1.6), 15, 10
    ),
    "135m": Case(
        SMOLLM2_135M,
        2,
        512,
        DENSE,
        (
            *faster(OURS, transformers=1.6, litgpt=1.6, minimind=1.6),
            *(Target(side, "matmul", 0.7) for side in OURS),
        ),
    ),
    "moe-85m": Case(
        shape(384, 8, 6, 2, 1024, 16384, num_experts=8, num_experts_per_tok=2, capacity_factor=1.25),
        4,
        256,
        MOE,
        faster(MOE[:4], transformers=2.0, litgpt=1.3),
        10,
        8,
    ),
    "vocab": Case(
        SMOLLM2_135M | {"vocab_size": 151_936},
        2,
        512,
        (*OURS, "transformers", "transformers+prepared"),
        (*(Target(side, "memory", 0.4, "transformers") for side in OURS), *faster(OURS, transformers=1.7)),
    ),
    # For --device cuda; MFU counts attention, see smol_config.flops_per_token. Batches are what transformers has room
    # for on 80 GB. The MoE has the active width of gpu-dense and must keep three quarters of its MFU.
    "gpu-135m": Case(SMOLLM2_135M, 16, 2048, CUDA, (Target("ours+regions", "mfu", 0.4),), 5, 20),
    "gpu-1.7b": Case(preset("smollm2-1.7b"), 4, 2048, CUDA, (Target("ours+regions", "mfu", 0.5),), 5, 20),
    "gpu-dense": Case(shape(1024, 16, 16, 4, 3584, 49152), 16, 2048, CUDA, (), 5, 20),
    "gpu-moe": Case(
        shape(1024, 16, 16, 4, 1792, 49152, num_experts=8, num_experts_per_tok=2, capacity_factor=1.25),
        16,
        2048,
        (*CUDA, "ours+dropless+regions"),
        (),
        5,
        20,
    ),
}


def named_case(name: str) -> Case:
    """UserError naming the cases when `name` is none of them."""
    if name not in CASES:
        raise UserError(f"--case {name}: unknown; cases: {', '.join(CASES)}")
    return CASES[name]


# --- processes that take turns ------------------------------------------------------------------------------


def in_a_process(function: str, *, python: str = sys.executable, **arguments: Any) -> dict[str, Any]:
    """Call `module:function(**arguments)` in a new process of the interpreter `python` and return the dict it returned.

    Arguments and result travel as JSON. RuntimeError with the end of its output when the process fails.
    """
    command = [python, "-m", "benchmarks.common", function, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{function} {arguments} exited with {done.returncode}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(
    jobs: dict[str, Callable[[], dict[str, Any]]], rounds: int, show: Callable[[dict[str, Any]], str]
) -> dict[str, list[dict[str, Any]]]:
    """Results of every job for every round. Each round starts one job later, so that none always follows the same."""
    names = list(jobs)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            results[name].append(jobs[name]())
            spent = time.perf_counter() - started
            say(f"round {number + 1}/{rounds}  {name:<24}{show(results[name][-1])}  ({spent:.0f} s)")
    return results


def say(line: str) -> None:
    """A progress line; stdout is for the JSON."""
    print(line, file=sys.stderr, flush=True)


def ratio_by_round(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """ours / theirs of each round and their median."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": round(statistics.median(ratios), 3), "rounds": [round(ratio, 3) for ratio in ratios]}


# --- memory -------------------------------------------------------------------------------------------------


class Memory:
    """Memory of this process (resident set, Linux) or of the GPU (allocated by torch), in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def now(self) -> int | None:
        if self.cuda:
            return torch.cuda.memory_allocated()
        return _status("VmRSS")

    def reset_peak(self) -> None:
        """Let the high-water mark start again from what is in use now."""
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform.startswith("linux"):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")


def _status(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is no such file."""
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith(field))


# --- report -------------------------------------------------------------------------------------------------

INSTRUCTION_SETS = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "asimd", "sve")  # those that decide the speed here
PACKAGES = ("torch", "transformers", "accelerate", "trl", "litgpt")


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def environment() -> dict[str, Any]:
    """Hardware and versions, without anything that names the machine."""
    capabilities = torch.cpu.get_capabilities()
    hardware = {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if capabilities.get(name)],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    versions = {name: importlib.metadata.version(name) if is_installed(name) else "absent" for name in PACKAGES}
    return {"hardware": hardware, "versions": {"python": platform.python_version(), **versions}}


def describe(config: SmolConfig, batch: int, length: int) -> dict[str, Any]:
    total, active = count_parameters(config)
    names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size num_experts"
    sizes = {name: getattr(config, name) for name in names.split()}
    width = config.moe_intermediate_size or config.intermediate_size
    return sizes | {"mlp_width": width, "parameters": total, "active": active, "batch": [batch, length]}


def emit(report: dict[str, Any], path: str | None) -> dict[str, Any]:
    """Print the report as JSON, and write it to `path` as well."""
    text = json.dumps(report, indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda flat: " ".join(flat[0].split()), text)  # a list of numbers on one line
    print(text)
    if path:
        Path(path).write_text(text + "\n", encoding="utf-8")
    return report


def parser(doc: str) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3, help="times every side is measured (default 3)")
    options.add_argument("--output", help="also write the JSON to this file")
    return options


def add_dtype(options: argparse.ArgumentParser) -> None:
    """`--dtype`, for benchmarks whose sides run in one dtype or another. The goals are those of bf16."""
    told = "of every side (default: bf16; fp32 where it would be computed in software)"
    options.add_argument("--dtype", choices=("bf16", "fp32"), help=told)


def default_dtype(device: str = "cpu") -> str:
    """What `--dtype` is when it is not given."""
    return "bf16" if supports_bf16(torch.device(device)) else "fp32"


def _worker(function: str, arguments: str) -> None:
    module, name = function.split(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    print(json.dumps(result))


if __name__ == "__main__":
    _worker(*sys.argv[1:])
