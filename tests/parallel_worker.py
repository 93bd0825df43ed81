"""One process of a run with expert parallelism, started by test_parallel.py under torchrun.

  torchrun --nproc_per_node 2 tests/parallel_worker.py REPORT.json SIZE STRATEGY:CASE ...

Trains by the real trainer with spread experts, replays the same micro-batches one after the other in plain torch on
the whole model, and reports how far the two are apart.
"""

import json
import os
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from smol_config import SmolConfig
from smol_model import SmolForCausalLM
from smolkit import parallel
from smolkit.command_line import PretrainTrainingArguments
from smolkit.errors import UserError
from smolkit.packing import PackedCollator
from smolkit.runtime import prepare
from smolkit.training import final_weights, write_final
from train_pretrain import PretrainTrainer

SHAPE = dict(
    vocab_size=61,
    hidden_size=32,
    moe_intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.1,
    num_experts=4,
    num_experts_per_tok=2,
)
ADAM = dict(optim="adamw_torch_fused", learning_rate=1e-2, adam_epsilon=1e-5, weight_decay=0.1)
# Plain gradient descent shows the size of a gradient, which Adam hides.
DESCENT = dict(optim="sgd", learning_rate=0.5, weight_decay=0.0)
CASES: dict[str, dict[str, Any]] = {
    "ragged": DESCENT | dict(max_grad_norm=0.0),
    "empty": DESCENT | dict(max_grad_norm=0.0),
    "accumulation": DESCENT | dict(max_grad_norm=0.0, gradient_accumulation_steps=3),
    "clip": DESCENT | dict(max_grad_norm=0.1),
    "capacity": ADAM | dict(max_grad_norm=0.3, gradient_accumulation_steps=2),
    "resume": ADAM | dict(max_grad_norm=0.3, gradient_accumulation_steps=2, max_steps=4),
    "all": ADAM | dict(max_grad_norm=0.3, gradient_accumulation_steps=2, gradient_checkpointing=True),
}


def strategy_arguments(strategy: str) -> dict[str, Any]:
    """What TrainingArguments get for ddp, masters (in bf16), fsdp2, zero1, zero2, zero3, zero3-offload, ..."""
    if strategy == "fsdp2":
        return {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["SmolDecoderLayer"]}}
    if strategy.startswith("zero"):
        names = "gradient_accumulation_steps gradient_clipping train_batch_size train_micro_batch_size_per_gpu"
        zero = {"stage": int(strategy[4]), "stage3_gather_16bit_weights_on_model_save": True}
        # Small enough to be partitioned even here, in several buckets
        zero |= {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 5000, "sub_group_size": 3000}
        config = dict.fromkeys(names.split(), "auto") | {"zero_optimization": zero}
        if strategy.endswith("-config"):  # the optimizer is DeepSpeed's, which decays all weights alike
            adam = {"type": "AdamW", "params": {"torch_adam": True, "betas": [0.9, 0.95], "eps": 1e-5}}
            adam["params"] |= {"lr": "auto", "weight_decay": "auto"}
            return {"deepspeed": config | {"optimizer": adam}, "weight_decay": 0.0}
        if strategy.endswith("-offload"):
            zero["offload_optimizer"] = zero["offload_param"] = {"device": "cpu"}
            config["zero_force_ds_cpu_optimizer"] = False
        return {"deepspeed": config}
    return {}


def build(case: str) -> SmolForCausalLM:
    """The model of a case; the same in every process."""
    torch.manual_seed(0)
    options = {"capacity_factor": 0.7} if case == "capacity" else {}
    model = SmolForCausalLM(SmolConfig(**SHAPE, **options))
    if case == "empty":  # a direction that all inputs share draws every token to experts 0 and 1
        with torch.no_grad():
            model.model.embed_tokens.weight += 0.5
            for block in model.model.layers:
                block.mlp.gate.weight += torch.tensor([0.5, 0.4, -0.4, -0.5])[:, None]
    return model


def rows(count: int, case: str) -> list[dict[str, list[int]]]:
    """Rows of 16 tokens; in the case of a capacity limit every third is shorter, which makes padding."""
    torch.manual_seed(1)
    result = []
    for number in range(count):
        length = 9 if case == "capacity" and number % 3 == 0 else 16
        ids = torch.randint(1, 61, (length,)).tolist()
        result.append({"input_ids": ids, "labels": ids, "position_ids": list(range(length))})
    return result


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), pad_token="a")


class Recorder(PretrainTrainer):
    """Keeps the micro-batches and the statistics of the router."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.seen.append(deepcopy(dict(inputs)))
        return super().training_step(model, inputs, num_items_in_batch)

    def observe_router(self, outputs: Any) -> None:
        self.idle = min(self.idle, float(outputs.router_stats.load.view(-1, 2, 2).sum(-1).min()))
        self.dropped = max(self.dropped, float(outputs.router_stats.dropped.max()))
        super().observe_router(outputs)


def trainer_for(strategy: str, case: str, size: int, output: str, **more: Any) -> Recorder:
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]  # of the strategy before
    AcceleratorState._reset_state()
    GradientState._reset_state()
    settings = dict(max_steps=3, logging_steps=1, per_device_train_batch_size=2, lr_scheduler_type="constant")
    settings |= dict(disable_tqdm=True, save_strategy="no", warmup_steps=0, seed=3)
    args = PretrainTrainingArguments(output_dir=output, **settings | CASES[case] | strategy_arguments(strategy) | more)
    with parallel.whole_model():
        model = build(case)
    parallel.check_expert_parallel(size, model.config, args)
    dtype = torch.bfloat16 if strategy == "masters" else torch.float32
    model.to(dtype)
    parallel.spread_experts(model, size, args)
    trainer = Recorder(
        model=model,
        args=args,
        train_dataset=rows(96, case),
        eval_dataset=rows(5, "capacity"),
        data_collator=PackedCollator(0, mask_padding=True),
        processing_class=tokenizer(),
    )
    trainer.seen, trainer.idle, trainer.dropped = [], 1.0, 0.0
    return trainer


def replay(case: str, steps: list[list[dict]], settings: dict[str, Any]) -> dict[str, Any]:
    """The same micro-batches through the whole model, in plain torch: losses, norms, weights, validation loss."""
    model = build(case).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        {"params": decayed, "weight_decay": settings["weight_decay"]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    if settings["optim"] == "sgd":
        optimizer = torch.optim.SGD(groups, lr=settings["learning_rate"])
    else:
        optimizer = torch.optim.AdamW(
            groups, lr=settings["learning_rate"], betas=(0.9, 0.95), eps=settings["adam_epsilon"]
        )
    losses, norms = [], []
    for batches in steps:
        total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        loss = 0.0
        for batch in batches:
            part = model(**batch, num_items_in_batch=total).loss
            part.backward()
            loss += part.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), settings["max_grad_norm"] or 1e9).item())
        losses.append(loss)
        optimizer.step()
        optimizer.zero_grad()
    total = count = 0.0
    for row in rows(5, "capacity"):
        batch = PackedCollator(0)([row])
        with torch.no_grad():
            trained = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model.eval()(**batch).loss) * trained
            count += trained
    return {"losses": losses, "norms": norms, "weights": dict(model.named_parameters()), "validation": total / count}


def compare(strategy: str, case: str, size: int, output: str) -> dict[str, Any]:
    trainer = trainer_for(strategy, case, size, output)
    trainer.train()
    validation = trainer.evaluate()["eval_loss"]
    weights = final_weights(trainer)
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, trainer.seen)
    idle = torch.tensor(trainer.idle)
    dist.all_reduce(idle, dist.ReduceOp.MAX)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    if dist.get_rank():
        return {}
    accumulation = trainer.args.gradient_accumulation_steps
    steps = [
        [batch for rank in seen for batch in rank[start : start + accumulation]]
        for start in range(0, 3 * accumulation, accumulation)
    ]
    assert len({str(batch["input_ids"]) for batches in steps for batch in batches}) == 3 * accumulation * len(seen)
    expected = replay(case, steps, CASES[case] | strategy_arguments(strategy))
    return {
        "world": dist.get_world_size(),
        "names": sorted(weights) == sorted(expected["weights"]),
        "loss": [log["loss"] for log in logs],
        "norm": [log["grad_norm"] for log in logs],
        "expected_loss": expected["losses"],
        "expected_norm": expected["norms"],
        "weights": max(float((weights[n] - w).abs().max()) for n, w in expected["weights"].items()),
        "moved": float((weights["lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"]
                        - build(case).model.embed_tokens.weight).abs().max()),
        "validation": validation,
        "expected_validation": expected["validation"],
        "idle": float(idle),
        "dropped": trainer.dropped,
        "logged": {name: value for name, value in logs[-1].items() if "expert_parallel" in name},
    }  # fmt: skip


def difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Largest difference over the weights in `one`, which is empty except in the main process."""
    return max((float((one[name].float() - two[name].float()).abs().max()) for name in one), default=0.0)


def resume(strategy: str, size: int, output: str) -> dict[str, Any]:
    """Save in the middle, continue at the same and at another size (from `size` to 1 and back), write the end."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer_for(strategy, "resume", size, f"{output}/run", **saving)
    whole.train()
    expected, checkpoint = final_weights(whole), f"{output}/run/checkpoint-2"
    write_final(whole, torch.float32, whole.model.config, {})

    again = trainer_for(strategy, "resume", size, f"{output}/again")
    again.train(resume_from_checkpoint=checkpoint)
    continued = difference(expected, final_weights(again))
    other = trainer_for(strategy, "resume", 1, f"{output}/other")
    try:
        other.train(resume_from_checkpoint=checkpoint)
        elsewhere: Any = difference(expected, final_weights(other))
    except UserError as error:
        elsewhere = str(error)
    plain = trainer_for(strategy, "resume", 1, f"{output}/plain", **saving)
    plain.train()
    whole_experts = final_weights(plain)
    spread = trainer_for(strategy, "resume", size, f"{output}/spread")
    try:
        spread.train(resume_from_checkpoint=f"{output}/plain/checkpoint-2")
        spread_later: Any = difference(final_weights(spread), whole_experts)
    except UserError as error:
        spread_later = str(error)
    branch = trainer_for(strategy, "resume", size, f"{output}/branch", learning_rate=5e-3)
    branch.train(resume_from_checkpoint=checkpoint)
    often = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    best = trainer_for(strategy, "resume", size, f"{output}/best", learning_rate=1.0, **often)
    best.train()
    best_evaluation = best.evaluate()["eval_loss"]
    chosen = {name: weight.to(best.model.dtype) for name, weight in final_weights(best).items()}
    masters = whole.master_optimizer()
    norms = []
    if masters is not None:  # the two ways to clip give the same norm
        loss = whole.model.train()(**whole.seen[0]).loss
        loss.backward()
        parallel.reduce_gradients(whole.model)
        add_up = parallel.sum_over_group(whole.model)
        for parameter in whole.model.parameters():
            if parameter not in parallel.expert_parameters(whole.model):
                dist.all_reduce(parameter.grad)
        norms = [masters.clip_grad_norm(0.1, add_up).item(), parallel.clip_gradients(whole.model, 0.1).item()]
    if dist.get_rank():
        return {}
    with parallel.whole_model():  # one process alone must not load under ZeRO-3
        paths = (f"{output}/run", checkpoint, best.state.best_model_checkpoint)
        saved, middle, first = map(AutoModelForCausalLM.from_pretrained, paths)
        own = SmolForCausalLM.from_pretrained(f"{output}/run").eval()
    batch = torch.arange(1, 12)[None]
    with torch.no_grad():
        theirs, ours = saved(batch).logits, own(batch).logits
    return {
        "architecture": type(saved).__name__,
        "final": difference(expected, {n: w for n, w in saved.named_parameters()}),
        "logits": float((theirs - ours).abs().max()),
        "middle": difference(expected, {n: w for n, w in middle.named_parameters()}),
        "continued": continued,
        "branched": branch.lr_scheduler.get_last_lr()[0],
        "best_step": best.state.best_global_step,
        "best": difference(chosen, {n: w for n, w in first.named_parameters()}),
        "best_evaluation": [best_evaluation, best.state.best_metric],
        "elsewhere": elsewhere,
        "spread later": spread_later,
        "norms": norms,
        "files": sorted(path.name for path in Path(checkpoint).iterdir()),
    }


def main() -> None:
    report, size, *cases = sys.argv[1:]
    prepare(0)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as in smolkit.runs: no compilation on CPUs
    results: dict[str, Any] = {}
    for item in cases:
        strategy, case = item.split(":")
        function = resume if case == "resume" else partial(compare, case=case)
        output = str(Path(report).with_suffix("") / item.replace(":", "-"))  # shared by all processes
        results[item] = function(strategy, size=int(size), output=output)
        if dist.get_rank() == 0:
            Path(report).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
