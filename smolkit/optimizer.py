"""AdamW for models whose weights are kept in bf16: every update happens on fp32 master copies.

bf16 has 8 bits of mantissa, so an Adam step of a thousandth of a weight would be rounded away. Here the
moments and the weights being updated are fp32 and the model's bf16 weights are their rounded copies,
refreshed after each step (Micikevicius et al. 2018, arXiv:1710.03740, with bf16 in place of fp16 and
therefore without loss scaling).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class MasterAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) on fp32 masters of the given parameters.

    `params`: parameters or parameter groups in any floating dtype; fp32 ones are their own masters.
    Schedulers see and set `param_groups`; `state_dict` holds the moments and the masters, so a resumed run
    loses no precision. Memory per parameter: 12 bytes (master and two moments) besides the weight and its
    gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._weights = [parameter for group in self.param_groups for parameter in group["params"]]
        self._masters = [
            weight if weight.dtype == torch.float32 else weight.detach().float() for weight in self._weights
        ]
        masters = iter(self._masters)
        groups = [{**group, "params": [next(masters) for _ in group["params"]]} for group in self.param_groups]
        self._adam = torch.optim.AdamW(groups, fused=True)

    def master_of(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """The fp32 values of each weight (the weight itself where it is fp32)."""
        return dict(zip(self._weights, self._masters, strict=True))

    def clip_grad_norm(self, max_norm: float) -> torch.Tensor:
        """Total gradient norm in fp32 (a 0-d tensor); the next `step` scales it down to `max_norm`.

        The scale is applied inside the update, to fp32 gradients: no extra rounding, no extra pass.
        """
        gradients = [master.grad for master in self._collect_gradients()]
        norms = torch._foreach_norm(gradients)
        total = torch.linalg.vector_norm(torch.stack([norm.to(gradients[0].device) for norm in norms]))
        self._adam.grad_scale = torch.clamp((total + 1e-6) / max_norm, min=1.0)  # a divisor, as in GradScaler
        return total

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One AdamW update of the masters, then the weights become their rounded copies."""
        loss = closure() if closure is not None else None
        self._collect_gradients()
        for outer, inner in zip(self.param_groups, self._adam.param_groups, strict=True):
            inner.update({name: value for name, value in outer.items() if name != "params"})
        self._adam.step()
        self._adam.grad_scale = None
        copies = [
            (w, m) for w, m in zip(self._weights, self._masters, strict=True) if m is not w and m.grad is not None
        ]
        if copies:
            torch._foreach_copy_([weight for weight, _ in copies], [master for _, master in copies])
        self._drop_gradients()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the weights and the fp32 copies of them."""
        super().zero_grad(set_to_none)
        self._drop_gradients()

    def _collect_gradients(self) -> list[torch.Tensor]:
        """Masters that have a gradient; it is made from the weight's when it is not there yet."""
        for weight, master in zip(self._weights, self._masters, strict=True):
            if master is not weight and master.grad is None and weight.grad is not None:
                master.grad = weight.grad.float()
        return [master for master in self._masters if master.grad is not None]

    def _drop_gradients(self) -> None:
        for weight, master in zip(self._weights, self._masters, strict=True):
            if master is not weight:
                master.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, loadable with `torch.load(weights_only=True)`."""
        groups = super().state_dict()["param_groups"]
        return {
            "state": self._adam.state_dict()["state"],
            "param_groups": groups,
            "masters": list(self._masters),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore moments, masters and groups; the weights become the rounded masters."""
        state_dict = dict(state_dict)
        masters = state_dict.pop("masters")
        if len(masters) != len(self._masters):
            raise ValueError(f"state has {len(masters)} masters for {len(self._masters)} parameters")
        inner = {**state_dict, "param_groups": self._adam.state_dict()["param_groups"]}
        self._adam.load_state_dict(inner)
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for weight, master, value in zip(self._weights, self._masters, masters, strict=True):
            master.copy_(value)
            if master is not weight:
                weight.copy_(master)
