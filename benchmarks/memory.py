"""The planner's memory against what a step really takes, on a CPU.

  python -m benchmarks.memory --rounds 1 --models 29m 72m 135m

For each model and strategy a real `Trainer` of this toolkit makes three steps on random tokens, in processes of its
own: one process, or two gloo ranks for DDP, FSDP2 and ZeRO-1, -2, -3 (DeepSpeed). A CPU without products in bf16 takes
the strategies in fp32 alone. Measured is the peak of a process's resident set above that of the same process with a
negligible model (imports, thread pools, the engine itself): the larger of two ranks. Building the model is over by
then, and glibc is told to give freed blocks back, so that what counts is what a step has in use
(torch.cuda.max_memory_allocated, on a GPU); the scripts tell it to keep them, for speed, and their resident set also
holds what was in use before. The report has the estimate, the measured peak and estimate / measured, which has to lie
within 15 % of 1.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import TrainerCallback

from benchmarks import common
from smol_config import SmolConfig
from smol_model import SmolForCausalLM
from smolkit.errors import UserError, run
from smolkit.planner import STRATEGIES, ZERO_BUCKET, Work, memory
from smolkit.runtime import supports_bf16

NOTHING = "nothing"  # what a process has without a model to speak of
# rows of a micro-batch on each device, tokens of a row
BATCH = {NOTHING: (1, 8), "29m": (4, 256), "72m": (2, 256), "135m": (2, 256), "moe": (2, 256)}
MODELS: dict[str, dict[str, Any]] = {
    NOTHING: common.shape(32, 1, 1, 1, 64, 128),
    "29m": common.shape(384, 8, 6, 2, 1024, 32768),
    "72m": common.shape(512, 16, 8, 4, 1536, 32768),
    "135m": common.SMOLLM2_135M,
    "moe": common.shape(384, 8, 6, 2, 512, 16384, num_experts=8, num_experts_per_tok=2, capacity_factor=1.25),
}
BF16 = {"ddp": 1, "ddp-autocast": 1, "ddp x2": 2, "zero-1": 2, "zero-2": 2, "zero-3": 2, "fsdp2": 2}  # ranks
FP32 = {"ddp-fp32": 1, "ddp-fp32 x2": 2} | {f"{name}-fp32": 2 for name in ("zero-1", "zero-2", "zero-3", "fsdp2")}
RANKS = BF16 | FP32
LIMIT = 0.15
STEPS = 3


def engine_arguments(name: str) -> dict[str, Any]:
    """Arguments of the trainer for a strategy of the planner."""
    narrow = {"bf16": name not in FP32}
    if name.startswith("zero"):
        zero = {"stage": int(name[5]), "reduce_bucket_size": ZERO_BUCKET, "allgather_bucket_size": ZERO_BUCKET}
        if zero["stage"] == 3:  # as in accelerate_offload/
            names = "reduce_bucket_size stage3_prefetch_bucket_size stage3_param_persistence_threshold"
            zero |= dict.fromkeys(names.split(), "auto")
        sizes = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
        engine = {"zero_optimization": zero, "bf16": {"enabled": "auto"}, **sizes}
        optimizer = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        return narrow | {"deepspeed": engine | optimizer | {"gradient_clipping": "auto"}}
    if name.startswith("fsdp2"):
        wrap = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True}
        wrap |= {"transformer_layer_cls_to_wrap": ["SmolDecoderLayer"]}
        return narrow | {"fsdp": True, "fsdp_config": wrap}
    return narrow if name == "ddp-autocast" else {}


class ResetPeak(TrainerCallback):
    """Building and wrapping the model is not part of a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            common.Memory(torch.device("cpu")).reset_peak()


def worker(model: str, strategy: str, output: str) -> None:
    """One rank: a few steps, then its peak above the base into a file."""
    from smolkit.command_line import PretrainTrainingArguments
    from smolkit.packing import PackedCollator
    from smolkit.runs import join_deepspeed
    from train_pretrain import PretrainTrainer

    torch.manual_seed(0)
    rows, length = BATCH[model]
    config = SmolConfig(**MODELS[model])
    args = PretrainTrainingArguments(
        output_dir=output,
        max_steps=STEPS,
        per_device_train_batch_size=rows,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **engine_arguments(strategy),
    )
    _ = args.device  # reading it opens the process group
    if args.deepspeed_plugin:
        join_deepspeed()  # as the scripts do; DeepSpeed would compile a kernel first
    tokens = torch.randint(0, config.vocab_size, (64, length), generator=torch.Generator().manual_seed(0))
    ids, positions = tokens.int().tolist(), [list(range(length))] * len(tokens)
    data = Dataset.from_dict({"input_ids": ids, "labels": ids, "position_ids": positions})
    fp32 = strategy != "ddp" and not strategy.startswith("ddp x")
    net = SmolForCausalLM(config).to(torch.float32 if fp32 else torch.bfloat16)
    trainer = PretrainTrainer(model=net, args=args, train_dataset=data, data_collator=PackedCollator(0, False))
    trainer.add_callback(ResetPeak())
    trainer.processing_class = SimpleNamespace(pad_token_id=0)
    trainer.train()
    result = {"peak": common.Memory(torch.device("cpu")).peak(), "world": args.world_size}
    Path(output, f"peak-{args.process_index}.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


def measure(model: str, strategy: str) -> int:
    """Peak of the resident set in bytes, of the larger rank."""
    ranks = RANKS[strategy]
    with tempfile.TemporaryDirectory() as output:
        words = ["-m", "benchmarks.memory", "--worker", model, strategy, output]
        if ranks > 1:
            words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *words]
        returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        environment = {**os.environ, **returned, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *words], cwd=common.ROOT, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{model} {strategy} exited with {done.returncode}\n{done.stderr[-4000:]}")
        results = [json.loads(path.read_text()) for path in Path(output).glob("peak-*.json")]
    assert [result["world"] for result in results] == [ranks] * ranks, "as many processes as asked for"
    return max(result["peak"] for result in results)


def estimate(model: str, strategy: str) -> dict[str, float]:
    """The planner's bytes for the same step."""
    rows, length = BATCH[model]
    work = Work(SmolConfig(**MODELS[model]), rows, length, devices=RANKS[strategy], device="cpu")
    plan = next(item for item in STRATEGIES if item.name == strategy.split()[0])
    return memory(work, plan).as_dict()


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--worker"]:
        worker(*argv[1:])
        return None
    options = common.parser(__doc__)
    options.add_argument("--models", nargs="+", default=["29m", "72m", "135m"], choices=list(MODELS))
    options.add_argument("--strategies", nargs="+", choices=list(RANKS))
    args = options.parse_args(argv)
    strategies = args.strategies or list(RANKS if supports_bf16() else FP32)
    if not supports_bf16() and (narrow := [name for name in strategies if name in BF16]):
        raise UserError(f"benchmarks.memory: this CPU has no products in bf16, which {', '.join(narrow)} take")
    lines = []
    base = {strategy: measure(NOTHING, strategy) for strategy in strategies}
    for model in args.models:
        for strategy in strategies:
            guess = estimate(model, strategy)
            peaks = [measure(model, strategy) - base[strategy] for _ in range(args.rounds)]
            peak = sorted(peaks)[len(peaks) // 2]
            ratio = guess["peak"] / peak
            parts = {name: round(value / common.MIB) for name, value in guess.items() if value}
            line = {"model": model, "strategy": strategy, "ranks": RANKS[strategy], "estimate_mib": parts}
            line |= {"measured_mib": round(peak / common.MIB), "ratio": round(ratio, 3), "met": abs(ratio - 1) <= LIMIT}
            lines.append(line)
            common.say(json.dumps(line))
    return common.emit({"benchmark": "memory", **common.environment(), "limit": LIMIT, "lines": lines}, args.output)


if __name__ == "__main__":
    run(main)
