"""Expert parallelism: the experts of a built model spread over processes, everything else left to the engine.

With `--expert_parallel_size N` each of N neighbouring processes (an expert group) keeps E / N experts of every layer;
rows travel to the process that has their expert and back (GShard, arXiv:2006.16668). Processes at the same place of
different groups keep copies of the same experts: the replicas, over which their gradients are averaged. Router,
capacity and losses see what they see without it, so the result is that of one process with the same micro-batches.

`smol_model.py` knows nothing of this: `spread_experts` puts a module with the interface of `Experts` in its place,
before DDP, FSDP2 or DeepSpeed wraps the model. What each of them has to be told:
- DDP ignores the experts; `reduce_gradients` does its work for them, once per step.
- FSDP2 shards them over their replicas by a `fully_shard` of their own, which divides by the number of processes.
- DeepSpeed 0.19 knows expert parameters by attributes, optimizer groups and (stages 1 and 2) a module of its own
  class. All of that is private there: the version is pinned and the tests compare every stage with one process.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from smol_config import SmolConfig
from smol_model import Experts
from smolkit.errors import UserError
from smolkit.runtime import default_device

# --- which processes work together --------------------------------------------------------------------------


def check_expert_parallel(size: int, config: SmolConfig, args: Any, processes: int | None = None) -> None:
    """`UserError` for an `--expert_parallel_size` that this model or run (a `TrainingArguments`) cannot have.

    `processes`: of a run that is only planned; None takes those of this one.
    """
    world = args.world_size if processes is None else processes
    flag = f"--expert_parallel_size {size}"
    if size < 1:
        raise UserError(f"{flag} must be at least 1")
    if size == 1:
        return
    if not config.num_experts:
        raise UserError(f"{flag}: the model is dense, it has no experts to spread; leave the flag out")
    if config.num_experts % size:
        divisors = [n for n in range(1, config.num_experts + 1) if config.num_experts % n == 0]
        raise UserError(f"{flag} does not divide the {config.num_experts} experts; possible: {divisors}")
    if size > world:
        raise UserError(
            f"{flag} is more than the {world} process(es) of this run; start as many with torchrun, "
            "accelerate launch or deepspeed, or lower it"
        )
    if world % size:
        raise UserError(f"{flag} does not divide the {world} processes of this run")
    if args.fp16 or args.mixed_precision == "fp16":
        raise UserError(f"{flag} with fp16: an overflow in one process would go unseen in the others; use --bf16")
    if args.deepspeed_plugin and args.deepspeed_plugin.hf_ds_config._stage not in (1, 2, 3):
        raise UserError(f"{flag} needs zero_optimization.stage 1, 2 or 3 in the DeepSpeed config, or plain DDP")
    version = fsdp_version(args)
    if version == 1:
        raise UserError(f"{flag} needs version 2 of FSDP (fsdp_version: 2 in the launcher's config)")
    replicas, local = world // size, config.num_experts // size
    widths = (2 * config.moe_intermediate_size, config.hidden_size)
    if version and local % replicas and any(width % replicas for width in widths):
        raise UserError(
            f"{flag}: FSDP cannot cut {local} experts of width {config.moe_intermediate_size} evenly for "
            f"{replicas} processes; raise the size"
        )


def fsdp_version(args: Any) -> int | None:
    """1 or 2, from `--fsdp_config` or from the launcher's environment; None without FSDP."""
    if args.fsdp_plugin_args:
        return int(args.fsdp_plugin_args.get("fsdp_version", 1))
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return None
    return int(os.environ.get("FSDP_VERSION", 1))


def group_ranks(nodes: Sequence[str], size: int) -> list[list[int]]:
    """The expert groups: processes of one node together as far as they go; `nodes`: where each rank runs.

    >>> group_ranks(["a", "b", "a", "b"], 2)
    [[0, 2], [1, 3]]
    """
    first = {node: nodes.index(node) for node in nodes}
    ranks = sorted(range(len(nodes)), key=lambda rank: (first[nodes[rank]], rank))
    return [ranks[start : start + size] for start in range(0, len(ranks), size)]


@dataclass
class ExpertGroups:
    """Where this process stands: `rank` of `size` in its expert `group`, and `replicas` with the same experts."""

    size: int
    rank: int
    group: dist.ProcessGroup
    replicas: dist.ProcessGroup
    crossing: bool  # some group reaches over more than one node

    @property
    def copies(self) -> int:
        """Processes with the same experts."""
        return dist.get_world_size(self.replicas)


def form_groups(size: int) -> ExpertGroups:
    """Form the expert groups of `size` processes (a collective call of all processes)."""
    # torchrun numbers its nodes, which tells apart what simulated nodes on one machine share: the host name
    here, nodes = f"{os.environ.get('GROUP_RANK', '')}@{socket.gethostname()}", [""] * dist.get_world_size()
    dist.all_gather_object(nodes, here)
    ranks = group_ranks(nodes, size)
    group, _ = dist.new_subgroups_by_enumeration(ranks)
    replicas, _ = dist.new_subgroups_by_enumeration([list(column) for column in zip(*ranks, strict=True)])
    crossing = any(len({nodes[rank] for rank in members}) > 1 for members in ranks)
    return ExpertGroups(size, dist.get_rank(group), group, replicas, crossing)


# --- the experts of one process -----------------------------------------------------------------------------


class Stopwatch:
    """Seconds spent in exchanges, waiting for the slowest process included; on a GPU read without waiting for it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.events: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Time what is done, or on a GPU enqueued, inside."""
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self.events.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - began

    def read(self) -> float:
        """Seconds since the last reading."""
        for start, end in self.events:
            end.synchronize()
            self.seconds += start.elapsed_time(end) / 1000
        seconds, self.seconds, self.events = self.seconds, 0.0, []
        return seconds


class Exchange(torch.autograd.Function):
    """All-to-all of rows (R, D): `send[p]` of them to process p of the group, `receive[p]` from it."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, watch: Stopwatch
    ) -> Tensor:
        ctx.way_back = (receive, send, group, watch)
        return exchange(rows, send, receive, group, watch)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return exchange(grad, *ctx.way_back), None, None, None, None


def exchange(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, watch: Stopwatch) -> Tensor:
    """The exchange itself; a process without rows to send or receive takes part like any other."""
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    with watch.running(rows.device):
        dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


class Reorder(torch.autograd.Function):
    """rows[order] for a permutation whose inverse is known: the gradient is a gather, too, not an addition."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class SpreadExperts(Experts):
    """The E / N experts of this process, with the interface of `Experts`: rows of all E experts in and out."""

    def __init__(self, experts: Experts, groups: ExpertGroups, watch: Stopwatch):
        nn.Module.__init__(self)
        self.groups, self.watch = groups, watch
        for name, weight in experts.named_parameters():
            part = own_experts(weight.detach(), groups).clone()
            self.register_parameter(name, nn.Parameter(part, requires_grad=weight.requires_grad))

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows (R, D) sorted by expert, ends (E,) -> (R, D); rows past ends[-1] are zero."""
        N, group = self.groups.size, self.groups.group
        sizes = ends.diff(prepend=ends.new_zeros(1))  # (E,) rows that this process has for each expert
        theirs = exchange(sizes, [len(sizes) // N] * N, [len(sizes) // N] * N, group, self.watch)
        theirs = theirs.view(N, -1)  # (N, E/N) rows of each process for the experts here
        # The one wait for the device per layer: how many rows go where must be known here to send them.
        send, receive = torch.stack((sizes.view(N, -1).sum(1), theirs.sum(1))).tolist()
        arrived = Exchange.apply(rows[: sum(send)], send, receive, group, self.watch)  # by process, then expert
        expert = torch.arange(theirs.shape[1], device=rows.device).repeat(N)
        expert = expert.repeat_interleave(theirs.flatten(), output_size=len(arrived))
        order = expert.argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        own_ends = theirs.sum(0).cumsum(0, dtype=torch.int32)  # (E/N,)
        done = super().forward(Reorder.apply(arrived, order, inverse), own_ends)
        back = Exchange.apply(Reorder.apply(done, inverse, order), receive, send, group, self.watch)
        return nn.functional.pad(back, (0, 0, 0, len(rows) - len(back)))


def own_experts(weight: Tensor, groups: ExpertGroups) -> Tensor:
    """The slice of `weight` (E, ...) that belongs to this process: (E / N, ...)."""
    return weight.tensor_split(groups.size, dim=0)[groups.rank]


# --- placing them in a model --------------------------------------------------------------------------------


@contextmanager
def whole_model(wanted: bool = True) -> Iterator[None]:
    """Inside, models are built with all their weights in every process, whatever the engine would shard or skip.

    The experts of a process are cut from them; ZeRO-3's `zero.Init` would have partitioned them over all processes,
    and FSDP's frugal loading leaves every process but the first without weights.
    """
    if not wanted:
        yield
        return
    from transformers.integrations import deepspeed

    config, frugal = deepspeed._hf_deepspeed_config_weak_ref, os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")
    deepspeed.unset_hf_deepspeed_config()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config
        if frugal is None:
            os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING")
        else:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = frugal


def spread_experts(model: nn.Module, size: int, args: Any) -> None:
    """Keep only this process's experts in `model`, in place, before anything wraps it (call it in all processes).

    `args`: the `TrainingArguments`, which name the engine.
    """
    if size == 1:
        return
    groups, watch = form_groups(size), Stopwatch()
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            model.set_submodule(name, SpreadExperts(module, groups, watch))
    ours = expert_parameters(model)
    names = [name for name, parameter in model.named_parameters() if parameter in ours]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    if args.deepspeed_plugin:
        tell_deepspeed(model, groups, args.deepspeed_plugin.hf_ds_config._stage)


def spread_layers(model: nn.Module) -> list[SpreadExperts]:
    """The spread experts of a model, layer by layer; empty without expert parallelism."""
    return [module for module in model.modules() if isinstance(module, SpreadExperts)]


def expert_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that differ between the processes of an expert group."""
    return {parameter for layer in spread_layers(model) for parameter in layer.parameters()}


def tell_deepspeed(model: nn.Module, groups: ExpertGroups, stage: int) -> None:
    """Mark the experts for DeepSpeed 0.19: what it reads to reduce and partition them over their replicas only."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups as registry

    class Marker(MoE):
        """Empty. That there is one makes stages 1 and 2 look for expert parameters; stage 3 would refuse it."""

        def __init__(self, num_experts: int):
            nn.Module.__init__(self)
            self.num_experts = num_experts

        def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
            """The groups are formed already."""

    name = f"ep_size_{groups.size}"
    members, replicas = dist.get_process_group_ranks(groups.group), dist.get_process_group_ranks(groups.replicas)
    registry._EXPERT_PARALLEL_GROUP[name], registry._EXPERT_PARALLEL_GROUP_RANKS[name] = groups.group, members
    registry._EXPERT_DATA_PARALLEL_GROUP[name] = groups.replicas
    registry._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = replicas
    for layer in spread_layers(model):
        if stage < 3:
            layer.marker = Marker(groups.size * len(layer.down_proj))
        parameter: Any  # to which DeepSpeed's attributes are added
        for parameter in layer.parameters():
            parameter.allreduce, parameter.group_name = False, name
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = name
            parameter.ds_zero_partition_process_group = groups.replicas


def shard_over_replicas(model: nn.Module, plugin: Any) -> None:
    """FSDP2: shard every layer's experts over their replicas; `plugin`: accelerate's, with the user's policies."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    plugin.cpu_ram_efficient_loading = False  # it would copy the first process's experts to all others
    layers = spread_layers(model)
    device = default_device()
    mesh = DeviceMesh.from_group(layers[0].groups.replicas, device.type)
    copies, world = layers[0].groups.copies, dist.get_world_size()
    for layer in layers:
        by_width = len(layer.down_proj) % copies  # fewer experts than replicas: an empty shard would have no address
        sharded = fully_shard(
            layer,
            mesh=mesh,
            reshard_after_forward=plugin.reshard_after_forward,
            offload_policy=plugin.cpu_offload,
            mp_policy=plugin.mixed_precision_policy or MixedPrecisionPolicy(),
            shard_placement_fn=(lambda _: Shard(1)) if by_width else None,
        )
        sharded.set_gradient_divide_factor(world)
        if device.type == "cpu" and copies > 1:  # gloo cannot divide while it sums
            sharded.set_force_sum_reduction_for_comms(True)


# --- what changes in a training step ------------------------------------------------------------------------


@torch.no_grad()
def reduce_gradients(model: nn.Module) -> None:
    """Experts' gradients under DDP: their sum over the replicas divided by the number of processes, in place.

    They are sums over the tokens of a whole expert group already. Call it once per step, after the last backward.
    """
    world = dist.get_world_size()
    for layer in spread_layers(model):
        for parameter in layer.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(world)
                if layer.groups.copies > 1:
                    dist.all_reduce(parameter.grad, group=layer.groups.replicas)


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` where every process has other experts, under DDP and FSDP2.

    Returns the norm over the gradients of all processes, () float32; each gradient counts once.
    """
    experts, layers = expert_parameters(model), spread_layers(model)
    copies, world = layers[0].groups.copies, dist.get_world_size()
    gradients, squares = [], []
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        sharded = isinstance(parameter.grad, DTensor)
        times = 1 if sharded else copies if parameter in experts else world  # processes that hold this gradient
        gradients.append(local)
        squares.append(torch.linalg.vector_norm(gradients[-1], dtype=torch.float32).square() / times)
    total = torch.stack(squares).sum() if squares else torch.zeros((), device=default_device())
    dist.all_reduce(total)  # by every process, with gradients or without
    total = total.sqrt()
    if gradients:
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (total + 1e-6), max=1.0))
    return total


def sum_over_group(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function that adds up a tensor over the processes of an expert group."""
    group = spread_layers(model)[0].groups.group

    def add_up(value: Tensor) -> Tensor:
        dist.all_reduce(value, group=group)
        return value

    return add_up


# --- whole weights and optimizer states ---------------------------------------------------------------------


def clean_name(name: str) -> str:
    """The name of a parameter without the parts that wrappers put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


@torch.no_grad()
def gather(part: Tensor, groups: ExpertGroups | None) -> Tensor:
    """The whole of what this process has a part of (a collective call); `groups`: of an expert weight, else None."""
    part = (part.full_tensor() if isinstance(part, DTensor) else part).detach()
    if groups is None:
        return part
    parts = [torch.empty_like(part) for _ in range(groups.size)]
    dist.all_gather(parts, part.contiguous(), group=groups.group)
    return torch.cat(parts)


@torch.no_grad()
def cut(whole: Tensor, like: Tensor, groups: ExpertGroups | None) -> Tensor:
    """The inverse of `gather`: this process's part of `whole`, laid out like the parameter `like`."""
    part = whole if groups is None else own_experts(whole, groups)
    part = part.to(like.device)
    if isinstance(like, DTensor):  # every process has the whole: nothing needs to be sent
        return distribute_tensor(part, like.device_mesh, like.placements, src_data_rank=None)
    return part.clone()


def placed_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, ExpertGroups | None]]:
    """(name, parameter, its expert groups or None) of all parameters."""
    layers = spread_layers(model)
    experts, groups = expert_parameters(model), layers[0].groups if layers else None
    for name, parameter in model.named_parameters():
        yield clean_name(name), parameter, groups if parameter in experts else None


def whole_weights(model: nn.Module, keep: bool, values: dict[nn.Parameter, Tensor] | None = None) -> dict[str, Tensor]:
    """Weights of the whole model by name, on the CPU, for processes that `keep` them (call it in all of them).

    `values`: what to take instead of some parameters (fp32 masters). One weight at a time is whole elsewhere.
    """
    state = {}
    for name, parameter, groups in placed_parameters(model):
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                whole = gather(parameter.data, groups).to("cpu", copy=True)
        else:
            whole = gather((values or {}).get(parameter, parameter), groups)
        if keep:
            state[name] = whole.cpu()
    return state


@torch.no_grad()
def load_weights(model: nn.Module, state: dict[str, Tensor], only_experts: bool = False) -> None:
    """Set the weights from those of the whole model."""
    for name, parameter, groups in placed_parameters(model):
        if groups is not None or not only_experts:
            parameter.copy_(cut(state[name], parameter, groups))


def whole_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, keep: bool) -> dict[str, Any]:
    """State of AdamW by parameter name: {"state": {name: {"step", "exp_avg", ...}}, "groups": [settings]}.

    It fits any number of processes and any expert parallel size. Collective; empty where it is not kept.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for name, parameter, groups in placed_parameters(model):
        if not parameter.requires_grad:
            continue
        saved = state[name] = {}
        for key, value in optimizer.state[parameter].items():
            whole = gather(value, groups) if value.dim() else value
            if keep:
                saved[key] = whole.cpu().clone()
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return {"state": state, "groups": settings} if keep else {}


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, saved: dict[str, Any]) -> None:
    """Restore what `whole_optimizer_state` returned; the learning rates are those of the first saved group."""
    placed = {parameter: (name, groups) for name, parameter, groups in placed_parameters(model)}
    state: dict[int, dict[str, Tensor]] = {}
    groups_of_numbers, number = [], 0
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        settings |= {key: saved["groups"][0][key] for key in ("lr", "initial_lr") if key in saved["groups"][0]}
        groups_of_numbers.append(settings | {"params": list(range(number, number + len(group["params"])))})
        for parameter in group["params"]:
            name, groups = placed[parameter]
            state[number] = {
                key: cut(value, parameter, groups) if value.dim() else value.clone()
                for key, value in saved["state"][name].items()
            }
            number += 1
    optimizer.load_state_dict({"state": state, "param_groups": groups_of_numbers})
