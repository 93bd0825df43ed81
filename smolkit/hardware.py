"""What the machine can do at best and how much memory a process holds: for MFU and the progress bar."""

import re
import time
from dataclasses import dataclass
from functools import lru_cache

import psutil
import torch

# Dense 16-bit matrix FLOP/s with fp32 accumulation, without sparsity. Sources: NVIDIA's data sheets (V100, T4, A100,
# A10, A30, A40, RTX A6000, L4, L40, L40S, H100, H200, B200, GB200) and its white papers on Ampere, Ada and Blackwell
# (GeForce, RTX 6000 Ada); A10G: AWS on its G5 instances; AMD's data sheets (MI250X: half a package, which torch counts
# as a device; MI300X, MI325X). Data sheets that give the figure "with sparsity" are halved. The first name whose words
# the device's name has wins, so longer names stand first.
PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.0),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H800", 989.4),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("RTX A6000", 154.8),
    ("RTX 6000 Ada", 364.2),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("V100", 125.0),
    ("T4", 65.0),
    ("MI325X", 1307.4),
    ("MI300X", 1307.4),
    ("MI250X", 191.5),
)
OTHER_CARDS = r"(?! (?:Ti|D|SUPER|Laptop)\b)"  # after such a word it is another card than the name before it
# M, K, N of the measured product: large enough for full speed, some milliseconds on a laptop core. Not a square one:
# oneDNN 3.12 computes that of 1,024 on one of two AMX cores.
PRODUCT = 1024, 1024, 2048
MEASURE_SECONDS = 0.15


@dataclass(frozen=True)
class Peak:
    """FLOP/s that one process could reach at best, and where the figure is from."""

    flops: float
    source: str

    def __str__(self) -> str:
        scale, unit = (1e12, "TFLOP/s") if self.flops >= 1e12 else (1e9, "GFLOP/s")
        return f"{self.flops / scale:,.4g} {unit} ({self.source})"


def device_flops(name: str) -> float | None:
    """Dense 16-bit FLOP/s of a GPU by the name torch reports; None for an unknown one (an RTX A1000 is no A100)."""
    found = (tflops for part, tflops in PEAK_TFLOPS if re.search(rf"\b{part}\b{OTHER_CARDS}", name))
    tflops = next(found, None)
    return None if tflops is None else tflops * 1e12


def peak(device: torch.device, dtype: torch.dtype, given_tflops: float | None = None, again: bool = False) -> Peak:
    """The peak that MFU is measured against: the given one, else the data sheet's, else a short measurement.

    A data-sheet figure is that of 16-bit products whatever `dtype` is, as in published MFU figures; a measured one is
    in `dtype`, since CPUs differ in what they have; a process measures once, unless `again`.
    """
    if given_tflops is not None:
        return Peak(given_tflops * 1e12, "--peak_tflops")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if (flops := device_flops(name)) is not None:
            return Peak(flops, f"data sheet of {name}, dense 16-bit")
    kind = str(dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    M, K, N = PRODUCT
    if again:
        _measured.cache_clear()
    where = f"{threads} CPU thread{'s' if threads > 1 else ''}" if device.type == "cpu" else f"this {device.type}"
    return Peak(_measured(device, dtype, threads), f"{kind} product of {M:,} x {K:,} x {N:,} measured on {where}")


@lru_cache
def _measured(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Best FLOP/s of that product within `MEASURE_SECONDS`. Draws no random numbers: training's are its own."""
    M, K, N = PRODUCT
    a, b = (torch.full(shape, 0.01, dtype=dtype, device=device) for shape in ((M, K), (K, N)))
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None

    def seconds(rows: int) -> float:
        start = time.perf_counter()
        a[:rows] @ b
        wait()
        return time.perf_counter() - start

    begin, few = time.perf_counter(), M // 64
    seconds(few)  # the first one compiles or chooses a kernel
    if (slow := seconds(few)) > MEASURE_SECONDS / 4:  # bf16 in software: the whole product would take half a minute
        return 2 * few * K * N / slow
    best = seconds(M)
    while time.perf_counter() - begin < MEASURE_SECONDS:
        best = min(best, seconds(M))
    return 2 * M * K * N / best


def memory_used(device: torch.device) -> int:
    """Bytes: the most that was allocated on a CUDA device so far, else what the process has resident now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
