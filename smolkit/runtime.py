"""Process-wide settings a script's `main()` applies (allocator, threads, seeds); choice of device and dtype.

Nothing here runs on import. `prepare` may be called again; the last call wins.
"""

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers.utils import logging

from smolkit.errors import UserError

# glibc's mallopt parameters (malloc.h)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_MADV_HUGEPAGE, _HUGE_PAGE = 14, 2 * 2**20  # madvise(2)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def prepare(seed: int | None, threads: int | None = None, huge_pages: bool = False) -> None:
    """Apply the settings every training and serving process wants.

    `seed`: seeds Python, NumPy and torch when not None. `threads`: torch threads inside one operation; None
    keeps what the environment (OMP_NUM_THREADS) says. `huge_pages`: for generation, which reads all weights for every
    token; training gains little by them and takes more memory.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # oneDNN compiles a kernel for each shape it meets, and an expert's share of a batch is another number of rows every
    # time: with the default of 1,024 kernels kept, a tiny MoE step spends half its time compiling (450 against 250 ms).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    if not has_accelerator():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, once imported, warns that it found no GPU
    _keep_freed_memory()
    if huge_pages:
        _grow_into_huge_pages()
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # tiny Adam moments and gradients would otherwise take the CPU's slow path
    logging.disable_progress_bar()  # of loading and writing shards; training has its own
    if seed is not None:
        from transformers import set_seed  # imports PEFT: a second that not every script needs to spend

        set_seed(seed)


def _glibc(name: str) -> Any:
    """A function of glibc's own, None where the C library is another."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks instead of returning them to the system.

    A training step frees and allocates the same big tensors again and again; by default each round trip pays
    for page faults and zeroing, which costs 20-50 % of a small CPU step. Other C libraries have no `mallopt`:
    skip.
    """
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return
    mallopt(_M_MMAP_MAX, 0)  # big blocks come from the heap, where they can be reused
    mallopt(_M_TRIM_THRESHOLD, -1)  # never
    mallopt(_M_TOP_PAD, 64 * 2**20)


def _grow_into_huge_pages() -> None:
    """Let the heap grow into pages of 2 MiB, as glibc.malloc.hugetlb=1 would if it were set before the process starts.

    A core reads weights faster where it looks up one page instead of 512 (benchmarks/LOG.md). The heap is asked for
    half of the machine's memory in one piece, which is marked and given back: that takes addresses, no memory. Not done
    where addresses are limited or counted (ulimit -v and -d, vm.overcommit_memory 2).
    """
    if _glibc("mallopt") is None:
        return
    import resource  # POSIX only

    malloc, free, madvise = _glibc("malloc"), _glibc("free"), _glibc("madvise")
    overcommit, size = Path("/proc/sys/vm/overcommit_memory"), psutil.virtual_memory().total // 2
    counted = overcommit.exists() and overcommit.read_text().strip() == "2"
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if counted or any(limit != resource.RLIM_INFINITY for limit in limits):
        return
    malloc.restype = ctypes.c_void_p
    if block := malloc(ctypes.c_size_t(size)):
        first = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(block + size - first), _MADV_HUGEPAGE)
        free(ctypes.c_void_p(block))


class KeptMemory:
    """Returns kept memory to the system after the first step and whenever the process has grown by a quarter.

    Small things that live on settle in the holes that large tensors leave; the next tensor of that size no longer fits,
    and the heap grows at its end: SmolLM2-135M with a vocabulary of 151,936 went from 5.3 to 9.4 GiB in 580 steps, of
    which 3.5 were in use. Holes stay, but their pages go back, and the next step fetches the ones that it needs. Most
    of what lives on is made in the first step: after it the logits of that shape (300 MiB) fit no hole any more.
    """

    GROWTH = 1.25

    def __init__(self) -> None:
        self._usual = 1  # bytes resident one step after the last return, 0 in between; 1: every first step has grown

    def check(self) -> None:
        """To be called once a step."""
        resident = psutil.Process().memory_info().rss
        if not self._usual:
            self._usual = resident
        elif resident > self.GROWTH * self._usual:
            if trim := _glibc("malloc_trim"):  # where it is missing nothing was kept
                trim(0)
            self._usual = 0


def release_threads() -> None:
    """End the OpenMP threads of the calling thread, before another thread takes over the computing.

    GNU's OpenMP gives every thread that computes workers of its own, and as soon as there are more of them than cores
    none waits busily any more: a decode step then takes 27 instead of 21 ms. They come back when they are needed.
    """
    for library in Path(torch.__file__).parent.glob("lib/libgomp*.so*"):
        ctypes.CDLL(str(library)).omp_pause_resource_all(1)  # 1: omp_pause_soft (OpenMP 5.0)


def has_accelerator() -> bool:
    """Whether torch sees a GPU (or another accelerator) that training would use."""
    return torch.accelerator.is_available()


def default_device() -> torch.device:
    """The accelerator when there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def chosen_device(name: str | None) -> torch.device:
    """The device of that name, the default one for None; `UserError` when torch cannot use it."""
    if name is None:
        return default_device()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:  # AssertionError: a build without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: {reason}; leave it out to take {default_device()}") from None


def supports_bf16(device: torch.device | None = None) -> bool:
    """Whether bf16 products run in hardware on a device, or the default one (GPU from Ampere on; CPU with AVX512_BF16
    or AMX)."""
    kind = (device or default_device()).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def product_dtype(mixed_precision: str, weights: torch.dtype) -> torch.dtype:
    """What products are computed in: `no | bf16 | fp16`, as accelerate says it, or the dtype of the weights."""
    return _DTYPES.get(mixed_precision, weights)


def compute_dtype(name: str, device: torch.device | None = None) -> torch.dtype:
    """`auto | bf16 | fp16 | fp32` → dtype; `auto` is bf16 where the device (None: the default) has it, else fp32.

    Raises ValueError naming the choices for anything else.
    """
    if name == "auto":
        return torch.bfloat16 if supports_bf16(device) else torch.float32
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is not one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]
