"""Log-probabilities of single tokens, and what TRL's metrics want beside them, in place of TRL's head on a CPU.

TRL 1.16 has a Triton kernel for GPUs, which stays. Elsewhere its head scores every position and computes products of
the gradients in float32, many times slower than in bf16 on a CPU with AMX. This one scores positions with a label, in
the dtype of the weights and, as `smol_kernels.LinearCrossEntropy`, a few megabytes at a time, which stay in the
processor's cache. 1,500 tokens of a vocabulary of 49,152 took one thread 0.8 s instead of 2.4 s, forward and backward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import trl.trainer.utils as head
from torch import Tensor

from smol_kernels import loss_blocks


class TokenScores(torch.autograd.Function):
    """What TRL's ChunkedLogProbFunction gives, for a head without bias, temperature, soft cap and scale.

    hidden (N, D), weight (V, D), targets (N,) -> log-probability of each target and, where `outputs` names them, the
    entropy, log of the summed squared probabilities, mean logit, and whether the target is the most probable token:
    (N,) each. Gradients flow through the log-probabilities alone, which is all that TRL's losses of pairs ask.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        assert bias is None and final_logit_softcapping is None and temperature == logit_scale == 1, "not our head"
        ctx.save_for_backward(hidden, weight, targets)
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        found: dict[str, list[Tensor]] = {name: [] for name in ("log_probs", *outputs)}
        work = weight.to(ctx.dtype)
        block, chunk = loss_blocks(work)
        for part, labels in split(block, hidden, targets):  # one empty block where N is 0
            logits = part.to(ctx.dtype) @ work.t()  # (block, V)
            for rows, label in split(chunk, logits, labels):
                log_probs = F.log_softmax(rows, dim=-1, dtype=torch.float32)  # (chunk, V)
                chosen = log_probs.gather(1, label[:, None]).squeeze(1)
                found["log_probs"].append(chosen)
                if "is_top1" in found:  # argmax takes five times as long; it differs where two are equally probable
                    found["is_top1"].append(chosen >= log_probs.amax(-1))
                if "mean_logits" in found:  # the logits minus their logsumexp are in float32 already
                    logsumexp = rows.gather(1, label[:, None]).squeeze(1).float() - chosen
                    found["mean_logits"].append(log_probs.mean(-1) + logsumexp)
                if "log_sum_sq_probs" in found:
                    found["log_sum_sq_probs"].append((2 * log_probs).logsumexp(-1))
                if "entropy" in found:
                    found["entropy"].append(-log_probs.exp().mul_(log_probs).sum(-1))
        whole = {name: torch.cat(values) for name, values in found.items()}
        more = [whole.get(name) for name in ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")]
        ctx.mark_non_differentiable(*(values for values in more if values is not None))
        ctx.set_materialize_grads(False)
        return whole["log_probs"], *more

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden, grad_weight = [], None
        with head.maybe_gather_lm_head_ctx(weight):  # which ZeRO-3 has spread again since
            work = weight.to(ctx.dtype)
            scale = torch.zeros_like(targets, dtype=torch.float32) if grad is None else grad.float()
            block, chunk = loss_blocks(work)
            for part, labels, factors in split(block, hidden, targets, scale):
                part = part.to(ctx.dtype)
                logits = part @ work.t()
                for rows, label, factor in split(chunk, logits, labels, factors):
                    minus_one = rows.new_full((len(label), 1), -1, dtype=torch.float32)
                    probs = F.softmax(rows, dim=-1, dtype=torch.float32).scatter_add_(1, label[:, None], minus_one)
                    torch.mul(probs, -factor[:, None], out=probs)
                    rows.copy_(probs)
                if need_hidden:
                    grad_hidden.append(logits @ work)
                if need_weight:
                    product = logits.t() @ part
                    grad_weight = product if grad_weight is None else grad_weight.float().add_(product)
        of_hidden = torch.cat(grad_hidden).to(hidden.dtype) if need_hidden else None
        return of_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), *[None] * 7


def split(size: int, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Equally long values in parts of `size`."""
    return zip(*(value.split(size) for value in values), strict=True)


@contextmanager
def scored_positions() -> Iterator[None]:
    """Within: TRL's head scores the positions that have a label, by its Triton kernel or else by `TokenScores`."""
    triton, function = head._use_triton, head._ChunkedLogProbFunction

    class Chosen:
        @staticmethod
        def apply(hidden: Tensor, *arguments: Any) -> Any:
            return (function if triton(hidden.device) else TokenScores).apply(hidden, *arguments)

    # The head asks the first only whether to leave out positions without a label.
    vars(head).update(_use_triton=lambda device: True, _ChunkedLogProbFunction=Chosen)
    try:
        yield
    finally:
        vars(head).update(_use_triton=triton, _ChunkedLogProbFunction=function)
