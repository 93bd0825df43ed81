"""One process of a run in fp16 on CPUs, started by test_strategies.py under a launcher.

  SCALE=65536 accelerate launch --num_processes 2 ... tests/fp16_worker.py train_pretrain.py ... --fp16 true

No library trains in fp16 on a CPU, though torch can multiply in it. What is replaced here is where they ask for the
device: accelerate makes the loss scaler of a GPU, DeepSpeed believes that fp16 is supported. Everything after that is
what a GPU's run does. SCALE: the first loss scale of accelerate (DeepSpeed's is in its file).
"""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from deepspeed.accelerator import get_accelerator

from smolkit.command_line import RunArguments
from smolkit.errors import run


def on_a_cpu(scale: float) -> None:
    """Let this process train in fp16; the first loss scale, where it is accelerate's."""
    begin = Accelerator.__init__

    def with_scaler(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        if self.distributed_type != DistributedType.DEEPSPEED:
            assert self.state.mixed_precision == "fp16" and self.device.type == "cpu" and self.scaler is None
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    Accelerator.__init__ = with_scaler
    RunArguments.check_fp16 = lambda self: None
    get_accelerator().is_fp16_supported = lambda: True


if __name__ == "__main__":
    on_a_cpu(float(os.environ["SCALE"]))
    script, *words = (word for word in sys.argv[1:] if not word.startswith("--local_rank"))  # DeepSpeed's launcher's
    run(lambda: import_module(Path(script).stem).main(words))
