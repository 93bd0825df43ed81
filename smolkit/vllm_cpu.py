"""vLLM's worker for CPUs, with the permission that its kernels need. vLLM imports it in the worker's own process."""

import torch
from vllm.v1.worker.cpu_worker import CPUWorker


class Worker(CPUWorker):
    """Asks Linux for the AMX tile registers before anything computes.

    A process that uses them unasked dies of SIGILL. vLLM 0.32 takes its AMX kernels wherever the CPU has them, but only
    torch.compile asks, by the way: with `--enforce_eager`, or with adapters, the first bf16 prompt ended the engine.
    """

    def init_device(self) -> None:
        torch.cpu._init_amx()  # False, and nothing else, where the CPU has none
        super().init_device()
