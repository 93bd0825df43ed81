"""What smol_model.py computes with: products, norm, rotation, attention, experts and loss in their fast forms.

Each gives what the plain expression gives, to rounding, and says why it is not written that way: what it saves, where,
and how much. Tests compare them with the plain expressions and with transformers. The letters are the model's:

    B rows, T tokens of a row, S tokens attended to, D channels, H query heads, K key heads, Dh channels of a head,
    N tokens of all rows, V vocabulary, E experts, F channels inside an MLP, M rows sorted by expert
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --------------------------------------------------------------------------------------------------------------
# Products
# --------------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def on_two_amx_cores() -> bool:
    """Whether bf16 matrices are multiplied in AMX tiles, by two threads."""
    return torch.get_num_threads() == 2 and bool(torch.cpu.get_capabilities().get("amx_bf16"))


def row_block(like: Tensor, M: int, K: int, N: int) -> int:
    """How many of its M rows a product (M, K) @ (K, N) of tensors `like` this should take at a time, M for all at once.

    On two AMX cores oneDNN 3.12 plans some shapes for one: 1,024 x 1,536 @ 1,536 x 576 runs at 1.3 TFLOP/s, its two
    halves at 2.1, as most other shapes do. Measured for 512 to 1,152 rows; 2 to 4 % of a step of SmolLM2-135M, 2 x 512.
    """
    if like.device.type != "cpu" or like.dtype != torch.bfloat16 or not on_two_amx_cores():
        return M
    if K > 4096:  # the gradient of hidden states from logits
        return min(256, M) if 384 <= N <= 768 else M
    planned_for_one = M // 2 < N <= M <= 1024 and K >= 512 and N * K < 1.5 * 2**20
    return M // 2 if planned_for_one else M


def product_by_rows(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) @ b (K, N), in parts where oneDNN would compute the whole on one core, see `row_block`."""
    (M, K), N = a.shape, b.shape[1]
    block = row_block(a, M, K, N)
    if block == M:
        return a @ b
    parts = a.split(block)
    if torch.compiler.is_compiling():  # which writes the parts where the whole needs them
        return torch.cat([part @ b for part in parts])
    whole = a.new_empty(M, N)
    for part, place in zip(parts, whole.split(block), strict=True):
        torch.mm(part, b, out=place)
    return whole


class LinearByRows(torch.autograd.Function):
    """x (..., I) times weight (O, I), forward and backward by `product_by_rows`: (..., O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product_by_rows(x.flatten(0, -2), weight.t()).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x, weight), (need_x, need_weight) = ctx.saved_tensors, ctx.needs_input_grad
        grad = grad.flatten(0, -2)
        grad_x = product_by_rows(grad, weight).view_as(x) if need_x else None
        return grad_x, grad.t() @ x.flatten(0, -2) if need_weight else None


class SmolLinear(nn.Linear):
    """nn.Linear with its products cut into the rows that both of two cores compute, where oneDNN does not."""

    def forward(self, x: Tensor) -> Tensor:
        outputs, inputs = self.weight.shape
        rows = x.shape[:-1].numel()
        whole = rows == row_block(x, rows, inputs, outputs) == row_block(x, rows, outputs, inputs)
        if whole or self.bias is not None or x.dtype != self.weight.dtype:
            return super().forward(x)
        return LinearByRows.apply(x, self.weight)


def computes_side_by_side(x: Tensor) -> bool:
    """Whether one product with several weights pays for putting them side by side: 5 % of a compiled step of
    SmolLM2-135M on an H100; elsewhere it was not measured."""
    return x.is_cuda and torch.compiler.is_compiling()


class SplitForRotation(torch.autograd.Function):
    """`torch.split` along the last dimension, whose gradients are put together uncompiled: a compiler would rotate all
    of them anew for every element of the whole (197 us on an H100, where 110 are enough)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], dim: int) -> tuple[Tensor, ...]:
        return x.split(sizes, dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return side_by_side(grads), None, None


@torch.library.custom_op("smollm::side_by_side", mutates_args=())
def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat` along the last dimension as an operator of its own."""
    return torch.cat(list(parts), dim=-1)


@side_by_side.register_fake
def _(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), dim=-1)


# --------------------------------------------------------------------------------------------------------------
# RMSNorm and rotation
# --------------------------------------------------------------------------------------------------------------


class RMSNorm(torch.autograd.Function):
    """weight * x / rms(x), computed in float32 whatever the dtype.

    A hand-written backward: one conversion in and one out instead of one per step, and nothing saved but x and a
    number per row. 2.2 times as fast as the plain expression on a CPU in bf16, where conversions dominate.

    The result is a new tensor: of one that was changed in place, or that `to` returned as it was, the compiler of torch
    2.11 makes a gradient of zero (2.13 does not).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.to(torch.float32, copy=True)
        scale = inverse_rms(x32, eps)
        ctx.save_for_backward(x, scale, weight)
        normed = x32.mul_(scale) * weight
        return normed if normed.dtype == x.dtype else normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, scale, weight = ctx.saved_tensors
        normed, grad = x.to(torch.float32, copy=True).mul_(scale), grad.to(torch.float32, copy=True)
        both = grad * normed
        grad_weight = both.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        along = (both @ weight.float()).div_(-x.shape[-1])[..., None]  # (..., 1)
        return grad.mul_(weight).addcmul_(normed, along).mul_(scale).to(x.dtype), grad_weight, None


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms(x) over the last dimension of float32 x: (..., 1)."""
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    return mean_square.add_(eps).rsqrt_()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm without autograd, for generation."""
    x32 = x.float()
    return (x32 * inverse_rms(x32, eps)).mul_(weight).to(x.dtype)


class Rotate(torch.autograd.Function):
    """Turn channel pairs (i, i + Dh/2) of x (B, T, H, Dh) by the angles behind cos, sin (B, T, 1, Dh).

    Returns (B, H, T, Dh). Written out by hand because a rotation's gradient is the inverse rotation: nothing is saved,
    and the copy to head-major layout comes free.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        B, T, H, Dh = x.shape
        return turn(x, cos, sin, x.new_empty(B, H, T, Dh).transpose(1, 2)).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        B, H, T, Dh = grad.shape
        return turn(grad.transpose(1, 2), cos, -sin, grad.new_empty(B, T, H, Dh)), None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """x (B, T, H, Dh), turned, in the memory of `out` of the same shape.

    Whole heads at a time: on halves of fewer than 32 channels bf16 arithmetic falls out of a CPU's vector registers and
    takes 3.8 times as long (on longer ones 0.75 times: 0.3 % of a step of SmolLM2-135M, not worth a second way).
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # the sign is in `sin`
    if torch.compiler.is_compiling():  # which gets `out=` on a view wrong (torch 2.13) and fuses this anyway
        return (x * cos + swapped * sin).to(x.dtype)  # under autocast the angles are wider than x
    return torch.mul(x, cos, out=out).addcmul_(swapped, sin)


# --------------------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------------------

# In bf16 on a CPU, "sdpa" means BlockAttention for whole rows up to this length, in blocks of so many queries. It takes
# 0.28 (T = 128), 0.36 (512) and 0.68 (1024) times as long as torch's fused kernel, forward and backward.
CPU_BLOCK_LENGTH = 1024
CPU_QUERY_BLOCK = 128


class BlockAttention(torch.autograd.Function):
    """Causal attention of whole rows, a block of queries at a time, each against the keys up to its own end.

    query (B, H, T, Dh), key and value (B, K, T, Dh), mask additive (B or 1, 1, T, T) or None for plain causal rows
    -> (B, T, H, Dh). Keeps the attention weights, whose size grows with T squared: hence CPU_BLOCK_LENGTH. By hand,
    because autograd would copy the scores once more for the addition of the mask: forward and backward take 0.9
    (T = 128), 0.45 (512) and 0.65 (1024) times as long as eager_attention in bf16.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        (B, H, T, Dh), K = query.shape, key.shape[1]
        query = by_position(query.view(B, K, H // K, T, Dh)).mul_(scaling)
        key, value = key.reshape(B * K, T, Dh), value.reshape(B * K, T, Dh)
        kept: list[Tensor] = []
        mixed = attend_in_blocks(query, key, value, mask, kept)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.shape, ctx.scaling = (B, K, T, H // K, Dh), scaling
        return mixed.view(ctx.shape).transpose(1, 2).reshape(B, T, H, Dh)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, *kept = ctx.saved_tensors
        B, K, T, G, Dh = ctx.shape
        grad = by_position(grad.reshape(B, T, K, G, Dh).permute(0, 2, 3, 1, 4))  # (B*K, T*G, Dh)
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        # From the last block, which meets every key and so fills the sums, to the first.
        for start in reversed(range(0, T, CPU_QUERY_BLOCK)):
            end = min(start + CPU_QUERY_BLOCK, T)
            rows, beta = slice(start * G, end * G), float(end < T)
            weights, grad_mixed = kept.pop(), grad[:, rows]
            grad_weights = torch.bmm(grad_mixed, value[:, :end].mT)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            torch.mul(torch.bmm(grad_scores, key[:, :end]), ctx.scaling, out=grad_query[:, rows])
            grad_key[:, :end].baddbmm_(grad_scores.mT, query[:, rows], beta=beta)
            grad_value[:, :end].baddbmm_(weights.mT, grad_mixed, beta=beta)
        grad_query = grad_query.view(ctx.shape).transpose(2, 3).reshape(B, K * G, T, Dh)
        return grad_query, grad_key.view(B, K, T, Dh), grad_value.view(B, K, T, Dh), None, None


def by_position(x: Tensor) -> Tensor:
    """x (B, K, G, T, Dh) -> (B*K, T*G, Dh): the heads of a key head side by side, so that positions are one slice."""
    B, K, G, T, Dh = x.shape
    return x.transpose(2, 3).clone(memory_format=torch.contiguous_format).view(B * K, T * G, Dh)


def attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, kept: list[Tensor] | None = None
) -> Tensor:
    """Causal attention of scaled queries (B*K, T*G, Dh), see `by_position`, to keys and values (B*K, T, Dh).

    Returns the shape of the queries; `kept` receives the weights of each block.
    """
    T = key.shape[1]
    G, mixed = query.shape[1] // T, torch.empty_like(query)
    later = future(min(CPU_QUERY_BLOCK, T), G, query) if mask is None else None
    for start in range(0, T, CPU_QUERY_BLOCK):
        end = min(start + CPU_QUERY_BLOCK, T)
        rows, t = slice(start * G, end * G), end - start
        scores = torch.bmm(query[:, rows], key[:, :end].mT)  # (B*K, t*G, end)
        if mask is None:
            scores[..., start:].add_(later[: t * G, :t])  # type: ignore[index]  # made above where mask is None
        else:
            scores.view(len(mask), -1, t, G, end).add_(mask[:, :, start:end, None, :end])
        weights = scores.softmax(-1)
        mixed[:, rows] = torch.bmm(weights, value[:, :end])
        if kept is not None:
            kept.append(weights)
    return mixed


def future(T: int, G: int, like: Tensor) -> Tensor:
    """(T*G, T): the lowest number of the dtype for keys after a query's position, 0 elsewhere."""
    return like.new_full((T, T), torch.finfo(like.dtype).min).triu_(1).repeat_interleave(G, dim=0)


def block_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """BlockAttention with the signature of transformers' registry."""
    return BlockAttention.apply(query, key, value, attention_mask, kwargs["scaling"]), None


def one_query_attention(
    module: nn.Module | None, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of the newest position, (B, H, 1, Dh), as decoding asks for it.

    The query heads of a key head go in as if they were positions: a third of the time of repeating the keys.
    """
    (B, H, _, Dh), K = query.shape, key.shape[1]
    query = query.view(B, K, H // K, Dh)
    mixed = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=kwargs["scaling"])
    return mixed.reshape(B, 1, H, Dh), None


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of packed rows, document by document, by the flash kernel that torch brings (CUDA, 16 bits).

    With a mask of documents "sdpa" would compute whole rows by a slower kernel. cu_seq_lens_q, max_length_q: see
    `document_bounds`.
    """
    from torch.nn.attention.varlen import varlen_attn  # not there in every torch that this file imports with

    B, H, T, Dh = query.shape
    query, key, value = (heads.transpose(1, 2).reshape(B * T, -1, Dh) for heads in (query, key, value))
    # torch 2.11 takes fewer key heads than query heads without being told.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    bounds = cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
    mixed = varlen_attn(query, key, value, *bounds, scale=kwargs["scaling"], window_size=(-1, 0), **grouped)
    return mixed.view(B, T, H, Dh), None  # type: ignore[union-attr]  # a tuple only with return_aux


# --------------------------------------------------------------------------------------------------------------
# Experts
# --------------------------------------------------------------------------------------------------------------


class SiluProduct(torch.autograd.Function):
    """silu(gate) * up. Keeps its two inputs; autograd would keep silu(gate) as well (11 % of all activations).

    The product is a new tensor for the reason given at RMSNorm.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


@torch.library.custom_op("smollm::grouped_weight_gradient", mutates_args=())
def grouped_weight_gradient(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """grad (M, O), rows (M, I) sorted by expert -> (E, O, I). An operator of its own, because a compiler that sees the
    transpose computes `grad` a second time, for memory in that order."""
    return F.grouped_mm(grad.t(), rows, offs=ends)


@grouped_weight_gradient.register_fake
def _(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    return grad.new_empty(len(ends), grad.shape[1], rows.shape[1])


class GroupedLinear(torch.autograd.Function):
    """grouped_linear in one kernel. Written out for the layout of the weight's gradient: autograd's is the transpose
    of the weight's, and copying it took a sixth of a step of an 85M model on a CPU."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight, ends = ctx.saved_tensors
        grad, (need_rows, need_weight, _) = grad.contiguous(), ctx.needs_input_grad
        grad_rows = F.grouped_mm(grad, weight, offs=ends) if need_rows else None
        grad_weight = grouped_weight_gradient(grad, rows, ends) if need_weight else None
        return grad_rows, grad_weight, None


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows (M, I) of expert e times weight[e] (O, I): (M, O). Rows past ends[-1] are undefined.

    grouped_mm is not covered by autocast, hence the explicit dtype; it wants rows of 16 bytes. Where that does not
    hold, the same product runs expert by expert. Either way an expert without rows gets a zero gradient, not None.
    """
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
    rows, weight = rows.to(dtype), weight.to(dtype)
    aligned = all(size * dtype.itemsize % 16 == 0 for size in weight.shape[1:])
    eager_cpu = device == "cpu" and not torch.compiler.is_compiling()
    if aligned and (dtype == torch.bfloat16 or (dtype == torch.float32 and eager_cpu)):
        return GroupedLinear.apply(rows, weight, ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    parts = rows.split([*sizes, len(rows) - sum(sizes)])
    outputs = [F.linear(part, matrix) for part, matrix in zip(parts, weight.unbind(0), strict=False)]
    return torch.cat([*outputs, parts[-1].new_zeros(len(parts[-1]), weight.shape[1])])


# --------------------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------------------

# float32 logits held at once: on a CPU what stays in its cache (8 MiB), elsewhere what keeps kernels large (512 MiB)
LOSS_ELEMENTS = {"cpu": 2**21, "else": 2**27}
LOSS_BLOCK_ELEMENTS = 2**25  # logits of a block, in the dtype of the weights (64 MiB in bf16)


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight.T)[label] over the tokens whose label is not -100, a block at a time.

    The gradients are computed together with the loss, while a block's logits exist (the idea of Liger Kernel,
    arXiv:2410.10989): in the dtype of `hidden`, in the place of the logits, whose float32 form never exists for more
    than LOSS_ELEMENTS of them. A block is as many tokens as fit into LOSS_BLOCK_ELEMENTS or into the size of a float32
    gradient of the weight, so that few products have to be added up (one product per block instead of one per 256
    tokens: 8 % of a step of SmolLM2-135M).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, with_gradient: bool) -> Tensor:
        work = loss_of_all_tokens if torch.compiler.is_compiling() else loss_of_trained_tokens
        loss, *gradients = work(hidden, weight, labels, *(with_gradient and need for need in ctx.needs_input_grad[:2]))
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # `grad` stays a float32 number: 1 / tokens rounded to bf16 first would be off by up to 0.4 %
        scaled = (None if g is None else g * grad for g in ctx.saved_tensors)
        return *scaled, None, None


@torch.compiler.disable
def uncompiled_cross_entropy(*arguments: Any) -> Tensor:
    """LinearCrossEntropy for a CPU, where compiled it is no faster and holds 300 MiB more (vocabulary 151,936)."""
    return LinearCrossEntropy.apply(*arguments)


def loss_blocks(weight: Tensor) -> tuple[int, int]:
    """How many tokens' logits for weight (V, D) exist at once, a multiple of 32, and of those in float32."""
    chunk = max(1, LOSS_ELEMENTS.get(weight.device.type, LOSS_ELEMENTS["else"]) // len(weight))
    block = max(chunk, LOSS_BLOCK_ELEMENTS // len(weight), weight.shape[1] * 4 // weight.element_size())
    return -(-block // 32) * 32, chunk


def loss_of_trained_tokens(
    hidden: Tensor, weight: Tensor, labels: Tensor, with_hidden: bool, with_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss and gradients of hidden (N, D), weight (V, D); labels (N,). Ignored tokens cost nothing."""
    block, chunk = loss_blocks(weight)
    trained = int((labels != -100).sum())
    # A multiple of 32 rows, by ignored ones: a product of 1,022 rows takes up to 1.3 times as long as one of 1,024.
    tokens = (labels == -100).sort(stable=True).indices[: -(-trained // 32) * 32]
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.zeros_like(hidden) if with_hidden else None
    grad_weight = None
    for picked in tokens.split(block):  # no label at all: one empty block, zero gradients
        part, target = hidden.index_select(0, picked), labels.index_select(0, picked)[:, None]
        logits, real = part @ weight.t(), min(len(picked), trained)  # (block, V)
        for rows, label in zip(logits[:real].split(chunk), target[:real].split(chunk), strict=True):
            log_probs = F.log_softmax(rows, dim=-1, dtype=torch.float32)  # (chunk, V)
            loss -= log_probs.gather(1, label).sum()
            if with_hidden or with_weight:
                minus_one = torch.full_like(label, -1, dtype=torch.float32)
                rows.copy_(log_probs.exp_().scatter_add_(1, label, minus_one))
        logits[real:] = 0.0
        trained -= real
        if grad_hidden is not None:
            grad_hidden.index_copy_(0, picked, product_by_rows(logits, weight))
        if with_weight:
            product = logits.t() @ part
            grad_weight = product if grad_weight is None else grad_weight.float().add_(product)
    return loss, grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)


def loss_of_all_tokens(
    hidden: Tensor, weight: Tensor, labels: Tensor, with_hidden: bool, with_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same for a compiler: nothing waits to count labels and nothing is in place, so that the softmax of a block
    and its gradient become one kernel that reads and writes logits in the dtype of the weights."""
    block = max(LOSS_ELEMENTS["else"] // len(weight) // 128 * 128, 128)
    losses, grads_hidden, grad_weight = [], [], None
    for part, label in zip(hidden.split(block), labels[:, None].split(block), strict=True):
        logits, known = part @ weight.t(), label != -100  # (block, V), (block, 1)
        log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        losses.append((log_probs.gather(1, label.clamp(min=0)) * known).sum())
        if with_hidden or with_weight:
            chosen = label == torch.arange(len(weight), device=label.device)
            grad = ((log_probs.exp() - chosen.float()) * known).to(logits.dtype)
        if with_hidden:
            grads_hidden.append(grad @ weight)
        if with_weight:
            product = grad.t() @ part
            grad_weight = product if grad_weight is None else grad_weight.float() + product
    grad_hidden = torch.cat(grads_hidden) if with_hidden else None
    return -torch.stack(losses).sum(), grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
