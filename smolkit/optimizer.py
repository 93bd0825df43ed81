"""AdamW for models whose weights are kept in bf16: every update happens on fp32 master copies.

bf16 has 8 bits of mantissa, so an Adam step of a thousandth of a weight would be rounded away. Here the
moments and the weights being updated are fp32 and the model's bf16 weights are their rounded copies,
refreshed after each step (Micikevicius et al. 2018, arXiv:1710.03740, with bf16 in place of fp16 and
therefore without loss scaling).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements updated together: on a CPU as many as its cache holds (4 MiB each of gradient, master and moments: an update
# of 28M weights takes 18 ms instead of 27), elsewhere enough to keep kernels large.
SLICE = {"cpu": 2**20, "else": 2**26}
# The same for a sum of squares on a CPU, which needs the gradient alone: 0.12 ms a million elements instead of 0.18.
SQUARES_SLICE = 2**19
LARGE = {"cpu": 2**16, "else": 2**20}  # elements of a weight worth a compiled kernel of its own


class Piece(NamedTuple):
    """A stretch of one parameter, all flat: the weight, its gradient, and the optimizer's state for it."""

    weight: Tensor
    gradient: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor  # () of the whole parameter


def update(
    weight: Tensor,
    gradient: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    powers: tuple[Tensor, Tensor],  # () each: the betas to the power of the step
    divisor: Tensor,  # () of the gradient
    skip: Tensor | None,  # () bool: change nothing
    lr: Tensor,  # ()
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
) -> None:
    """AdamW of one weight, to be compiled into one pass over memory: 28 bytes an element in bf16, where a library
    kernel and the conversions around it move 40 (two CPU cores: 64 instead of 102 ms for 88M weights)."""
    grad = gradient.float() / divisor
    mean = exp_avg.lerp(grad, 1 - beta1)
    mean_square = (exp_avg_sq * beta2).addcmul(grad, grad, value=1 - beta2)
    scale = mean_square.sqrt() / (1 - powers[1]).sqrt() + eps
    changed = master * (1 - lr * weight_decay) - lr / (1 - powers[0]) * mean / scale
    for old, new in ((exp_avg, mean), (exp_avg_sq, mean_square), (master, changed)):
        old.copy_(new if skip is None else torch.where(skip, old, new))
    weight.copy_(master)


class MasterAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) on fp32 masters of the given parameters.

    `params`: parameters or parameter groups in any floating dtype; fp32 ones are their own masters. `compiled`: let
    torch.compile write the kernels for large weights that are not fp32.
    `state_dict` holds the moments and the masters, so a resumed run loses no precision. Memory per parameter: 12
    bytes (master and two moments) besides the weight and its gradient; fp32 gradients exist a slice at a time.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        compiled: bool = False,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._divisor: Tensor | None = None  # of all gradients, set by clip_grad_norm for the next step
        self._skip: Tensor | None = None  # () bool, see skip_if
        self._scratch: dict[torch.device, Tensor] = {}  # fp32 gradients of the slice at hand
        self._compiled = torch.compile(update, dynamic=True) if compiled else None
        for weight in self._weights():
            master = weight.detach() if weight.dtype == torch.float32 else weight.detach().float()
            self.state[weight] = {
                "step": torch.zeros((), dtype=torch.float32, device=weight.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
                "master": master,
            }

    def _weights(self) -> Iterator[torch.nn.Parameter]:
        return (weight for group in self.param_groups for weight in group["params"])

    def master_of(self) -> dict[torch.nn.Parameter, Tensor]:
        """The fp32 values of each weight (the weight itself where it is fp32)."""
        return {weight: self.state[weight]["master"] for weight in self._weights()}

    @torch.no_grad()
    def take_weights(self) -> None:
        """Make the weights, as they are now, the masters."""
        for weight, master in self.master_of().items():
            master.copy_(weight)

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float, add_up: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Total gradient norm in fp32 (a 0-d tensor); the next `step` scales the gradients down to `max_norm`.

        The scale is applied inside the update, to fp32 gradients: no extra rounding, no extra pass. `add_up` sums
        over the processes that each hold other parameters in the groups marked "moe" (expert parallelism).
        """
        norms: dict[bool, list[Tensor]] = {False: [], True: []}
        for group in self.param_groups:
            spread = add_up is not None and bool(group.get("moe"))
            for pieces in self._slices(group):
                norms[spread] += self._norms([piece.gradient for piece in pieces])
        if not norms[False] + norms[True]:  # no weight has a gradient
            return torch.zeros((), device=next(self._weights()).device)
        device = (norms[False] + norms[True])[0].device
        if add_up is not None and norms[True]:
            elsewhere = torch.stack([norm.to(device) for norm in norms[True]]).square().sum()
            norms[False].append(add_up(elsewhere).sqrt())
        total = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms[False]]))
        self._divisor = torch.clamp((total + 1e-6) / max_norm, min=1.0)
        return total

    def skip_if(self, bad: Tensor) -> None:
        """Let the next `step` change nothing if `bad`, a 0-d bool tensor: the device alone has to know by then."""
        self._skip = bad

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # overloads
        """One AdamW update of the masters, then the weights become their rounded copies."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            steps = [self.state[weight]["step"] for weight in group["params"] if weight.grad is not None]
            if steps:
                torch._foreach_add_(steps, 1)
                if self._skip is not None:  # as a list: of one tensor for all the host would have to know the value
                    torch._foreach_sub_(steps, [self._skip.float()] * len(steps))
            for pieces in self._slices(group):
                self._update(pieces, group)
        self._divisor = self._skip = None
        return loss

    def _norms(self, gradients: list[Tensor]) -> list[Tensor]:
        """Euclidean norms in fp32, of one or more of them. On a CPU by dot products: a quarter of a norm's time."""
        if gradients[0].device.type != "cpu":
            return list(torch._foreach_norm(gradients, 2, torch.float32))
        squares = []
        for part in (part for gradient in gradients for part in gradient.split(SQUARES_SLICE)):
            flat = part if part.dtype == torch.float32 else self._in_float32([part])[0]
            squares.append(torch.dot(flat, flat))
        return [torch.stack(squares).sum().sqrt()]

    def _update(self, pieces: list[Piece], group: dict[str, Any]) -> None:
        alone: list[Piece] = []
        together: list[Piece] = []
        for piece in pieces:
            (alone if self._has_own_kernel(piece.weight) else together).append(piece)
        if alone:
            self._update_each(alone, group)
        if together:
            self._update_together(together, group)

    def _has_own_kernel(self, weight: Tensor) -> bool:
        large = weight.numel() >= LARGE.get(weight.device.type, LARGE["else"])
        return self._compiled is not None and large and weight.dtype != torch.float32

    def _update_each(self, pieces: list[Piece], group: dict[str, Any]) -> None:
        """The compiled update, weight by weight."""
        assert self._compiled is not None
        device, steps, betas = pieces[0].master.device, [piece.step for piece in pieces], group["betas"]
        divisor = torch.ones((), device=device) if self._divisor is None else self._divisor.to(device)
        lr = torch.full((), float(group["lr"]), device=device)  # a number would be compiled in, and changes every step
        powers = zip(*(torch._foreach_pow(beta, steps) for beta in betas), strict=True)
        for piece, power in zip(pieces, powers, strict=True):
            numbers = power, divisor, self._skip, lr, *betas, group["weight_decay"], group["eps"]
            self._compiled(*piece[:-1], *numbers)

    def _update_together(self, pieces: list[Piece], group: dict[str, Any]) -> None:
        """The kernel behind torch.optim.AdamW(fused=True), which divides the gradients as well."""
        torch._fused_adamw_(
            [piece.master for piece in pieces],
            self._in_float32([piece.gradient for piece in pieces]),
            [piece.exp_avg for piece in pieces],
            [piece.exp_avg_sq for piece in pieces],
            [],
            [piece.step for piece in pieces],
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=None if self._divisor is None else self._divisor.to(pieces[0].master.device),
            found_inf=None if self._skip is None else self._skip.float(),
        )
        rounded = [piece for piece in pieces if piece.weight.dtype != torch.float32]
        if rounded:
            torch._foreach_copy_([piece.weight for piece in rounded], [piece.master for piece in rounded])

    def _in_float32(self, gradients: list[Tensor]) -> list[Tensor]:
        """Copies in fp32, in memory that the next slice uses again."""
        sizes, device = [len(gradient) for gradient in gradients], gradients[0].device
        if self._scratch.get(device, torch.empty(0)).numel() < sum(sizes):
            self._scratch[device] = torch.empty(sum(sizes), dtype=torch.float32, device=device)
        copies = self._scratch[device][: sum(sizes)].split(sizes)
        torch._foreach_copy_(copies, gradients)
        return list(copies)

    def _slices(self, group: dict[str, Any]) -> Iterator[list[Piece]]:
        """Pieces of the parameters that have a gradient, about SLICE elements at a time."""
        together: list[Piece] = []
        room = 0
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            once = self._has_own_kernel(weight)  # over memory: nothing has to stay in a cache between two passes
            size = SLICE["else"] if once else SLICE.get(weight.device.type, SLICE["else"])
            stored = (state["master"], state["exp_avg"], state["exp_avg_sq"])
            flat = [tensor.view(-1) for tensor in (weight.detach(), weight.grad.contiguous(), *stored)]
            # Most weights are small, and a GPU waits for this loop: a weight that is one piece is not split.
            whole = weight.numel() <= size
            for parts in [flat] if whole else zip(*(tensor.split(size) for tensor in flat), strict=True):
                together.append(Piece._make((*parts, state["step"])))
                room += len(parts[0])
                if room >= size:
                    yield together
                    together, room = [], 0
        if together:
            yield together

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, loadable with `torch.load(weights_only=True)`."""
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore moments, masters and groups; the weights become the rounded masters."""
        # torch's own version would round the state to the dtype of the weights.
        weights, saved = list(self._weights()), state_dict["state"]
        if len(saved) != len(weights):
            raise ValueError(f"state of {len(saved)} parameters for {len(weights)}")
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for number, weight in enumerate(weights):
            self.state[weight] = {name: value.to(weight.device, copy=True) for name, value in saved[number].items()}
            weight.copy_(self.state[weight]["master"])
            if weight.dtype == torch.float32:
                self.state[weight]["master"] = weight.detach()
