"""What a training run will need, by arithmetic: parameters, tokens, steps, epochs, memory per device, time.

Nothing is allocated: every figure follows from the model's configuration and the numbers of the run.
`python -m benchmarks.memory` compares the memory with what a step really takes.

Memory has five parts, in bytes on one device. Weights, gradients and optimizer state follow from a strategy (ZeRO:
arXiv:1910.02054); activations and logits from what smol_model.py keeps for the backward pass. Gradients and
activations are not there in full at the same time, unless gradients are accumulated: see `Memory.peak`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from smol_config import SmolConfig, count_parameters, flops_per_token
from smol_kernels import CPU_BLOCK_LENGTH, CPU_QUERY_BLOCK, LOSS_BLOCK_ELEMENTS, LOSS_ELEMENTS
from smolkit.hardware import device_flops as device_flops  # for who plans: the table is there

GB = 10**9
TYPICAL_MFU = 0.35  # of published runs on one node: torchtitan 0.33-0.39, TinyLlama 0.52
CUDA_CONTEXT = 1.0 * GB  # driver, kernels and libraries of a process, and what the allocator cannot use

# --- the work of a step -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What one device does in a micro-batch, and what is trained.

    rows, length: of a micro-batch (for DPO both sides count: two rows a pair). accumulation: micro-batches a step.
    devices: data-parallel processes. expert_parallel_size: devices that share one set of experts. device: "cuda" or
    "cpu", whose attention kernels keep different things. trained: parameters of an adapter; None trains all weights.
    reference: a second, frozen copy of the weights is held (DPO without precomputed log-probabilities). base_bits: 4
    for a base quantised by QLoRA (arXiv:2305.14314).
    """

    config: SmolConfig
    rows: int
    length: int
    accumulation: int = 1
    devices: int = 1
    device: str = "cuda"
    gradient_checkpointing: bool = False
    expert_parallel_size: int = 1
    trained: int | None = None
    reference: bool = False
    base_bits: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one device."""
        return self.rows * self.length

    @property
    def tokens_per_step(self) -> int:
        return self.tokens * self.accumulation * self.devices


def expert_parameters(config: SmolConfig) -> int:
    """Parameters of all experts of all layers; 0 for a dense model."""
    if not config.num_experts:
        return 0
    return config.num_hidden_layers * config.num_experts * 3 * config.hidden_size * config.moe_intermediate_size


def held_parameters(work: Work) -> int:
    """Parameters of the model one device holds when nothing but the experts is split."""
    total, _ = count_parameters(work.config)
    experts = expert_parameters(work.config)
    return total - experts + experts // work.expert_parallel_size


def layer_parameters(work: Work) -> int:
    """Parameters of one layer on one device."""
    config = work.config
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return (held_parameters(work) - tables - config.hidden_size) // config.num_hidden_layers


def lora_parameters(config: SmolConfig, rank: int, targets: list[str]) -> int:
    """Parameters of a LoRA adapter (arXiv:2106.09685): rank * (inputs + outputs) of every adapted matrix."""
    D, Dh = config.hidden_size, config.head_dim
    query, key = config.num_attention_heads * Dh, config.num_key_value_heads * Dh
    shapes = {"q_proj": D + query, "k_proj": D + key, "v_proj": D + key, "o_proj": query + D}
    if not config.num_experts:
        shapes |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), D + config.intermediate_size)
    names = shapes if "all-linear" in targets else targets
    sizes = sum(shapes[name] for name in names if name in shapes)
    if "experts" in targets and config.num_experts:
        F = config.moe_intermediate_size
        sizes += config.num_experts * ((D + 2 * F) + (F + D))
    return config.num_hidden_layers * rank * sizes


# --- memory -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on one device; `host` beside it, for what is offloaded to the machine's memory."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float = 0.0  # gathered layers, gradient buckets, a process on a GPU
    host: float = 0.0
    update: float = 0.0  # beside the gradients while they are summed over the devices and applied
    accumulates: bool = False  # gradients of earlier micro-batches are there during the next ones

    @property
    def peak(self) -> float:
        """The most at one time. As the backward pass frees activations it makes gradients, so that the larger of the
        two counts; with gradient accumulation both do."""
        passing = self.activations + self.logits + self.gradients * self.accumulates
        return self.weights + self.optimizer + self.buffers + max(passing, self.gradients + self.update)

    def as_dict(self) -> dict[str, float]:
        names = "weights gradients optimizer activations logits buffers host peak".split()
        return {name: round(getattr(self, name)) for name in names}


@dataclass(frozen=True)
class Strategy:
    """One way to hold the state of training: bytes per parameter, and how much of that is split over the devices.

    `name`: as in the table. `how`: flags that ask for it. `width`: bytes of an activation, 2 in bf16 and 4 in fp32.
    `autocast`: fp32 weights, cast to bf16 for every product. `state`: (work) -> Memory without activations and logits.
    """

    name: str
    how: str
    state: Callable[[Work], Memory]
    width: int = 2
    autocast: bool = False
    needs_devices: int = 1
    engine: str = "ddp"
    offloads: bool = False  # part of it to the host's memory or a disk


def _held(work: Work) -> tuple[int, int, int, int]:
    """Parameters: held, those trained among them, held when split over all devices, trained when split."""
    total, _ = count_parameters(work.config)
    held = held_parameters(work)
    trained = held if work.trained is None else work.trained
    return held, trained, total // work.devices, (total if work.trained is None else work.trained) // work.devices


def _weight_bytes(work: Work, width: float) -> float:
    """Weights of the model, its adapter and a reference, unsplit."""
    held, trained, *_ = _held(work)
    base = held * width
    if work.base_bits:  # linear layers in 4 bits and their scales (0.127 bits a weight, double quantisation)
        config = work.config
        stay = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
        stay += expert_parameters(config)  # fused: no linear layers to whom quantises
        base = (held - stay) * (work.base_bits + 0.127) / 8 + stay * 2
    adapter = trained * width if work.trained is not None else 0
    return base + adapter + (base if work.reference else 0)


def _replicated(width: int, optimizer: int, autocast: bool = False) -> Callable[[Work], Memory]:
    """Every device has everything; with more than one, DDP keeps a second copy of the gradients in its buckets."""

    def state(work: Work) -> Memory:
        held, trained, *_ = _held(work)
        buckets = trained * width if work.devices > 1 else 0
        casts = held * 2 if autocast else 0  # bf16 copies that autocast keeps until the backward pass is done
        return Memory(_weight_bytes(work, width), trained * width, trained * optimizer, 0, 0, buckets + casts)

    return state


def _fsdp(width: int) -> Callable[[Work], Memory]:
    """FSDP2: fp32 weights, gradients and moments are split; two layers at a time are gathered in the compute dtype."""

    def state(work: Work) -> Memory:
        _, _, split, trained = _held(work)
        tables = work.config.vocab_size * work.config.hidden_size
        gathered = (2 * layer_parameters(work) + tables) * width
        gathered += (layer_parameters(work) + tables) * width  # their gradients, before they are reduced
        weights = split * 4 * (2 if work.reference else 1)
        return Memory(weights, trained * 4, trained * 8, 0, 0, gathered)

    return state


def _zero(stage: int, width: int, offload: str = "") -> Callable[[Work], Memory]:
    """DeepSpeed: weights in the compute dtype, fp32 masters and moments split from stage 1 on, gradients from 2,
    weights from 3. To be applied, the split gradients exist in fp32 as well (DeepSpeed 0.19.8).

    `offload`: "host" for what accelerate_offload/ds_config.json moves to the machine's memory (at stage 2 all but the
    weights), "nvme" for ds_zero3_nvme.json, after which gradients in the compute dtype are left of it there.
    """

    def state(work: Work) -> Memory:
        held, all_trained, split, trained = _held(work)
        weights = _weight_bytes(work, width) if stage < 3 else split * width * (2 if work.reference else 1)
        gradients = all_trained * width if stage < 2 else trained * width
        # In fp32 stage 3 updates the weights themselves; stages 1 and 2 make masters all the same.
        optimizer, fp32_gradients = trained * (8 if stage == 3 and width == 4 else 12), trained * 4
        size = work.config.hidden_size**2 if stage == 3 else ZERO_BUCKET
        # A GPU's buckets exist whole and twice (overlap_comm); a CPU's memory is touched as far as gradients fill it.
        bucket, whole = min(all_trained, size) * width, 2 * size * width
        if stage == 3:  # and what is gathered: everything, up to the limit from which on layers are given back
            buffers = min(held, ZERO_LIVE) * width + (whole if work.device == "cuda" else bucket)
            state_bytes, update = optimizer + fp32_gradients, 0
        else:
            # stage_1_and_2.py: gradients lie in the bucket, which allreduce_bucket flattens into another one; then
            # step makes the fp32 gradients of its part, when buckets and activations are gone.
            buffers = whole if work.device == "cuda" else 0
            reducing = bucket * (1 if work.device == "cuda" else 2)
            state_bytes, update = optimizer, max(reducing - gradients, fp32_gradients, 0)
        if offload:  # gradients leave the device as they are reduced, for a flat buffer in the machine's memory
            host: float = trained * width + (0 if offload == "nvme" else optimizer + fp32_gradients)
            host += weights if stage == 3 and offload == "host" else 0
            return Memory(0 if stage == 3 else weights, 0, 0, 0, 0, buffers, host)
        return Memory(weights, gradients, state_bytes, 0, 0, buffers, update=update)

    return state


# elements of a bucket in accelerate_offload/; "auto" of the ZeRO-3 files is hidden_size squared
ZERO_BUCKET = 5 * 10**8
ZERO_LIVE = 10**9  # stage3_max_live_parameters, stage3_max_reuse_distance


def _engines(width: int) -> list[Strategy]:
    """The sharding engines, computing in bf16 (--bf16) or, `width` 4, in fp32."""

    end, computes = ("", ", --bf16") if width == 2 else ("-fp32", ", in fp32")

    def zero(name: str, how: str, stage: int, offload: str = "") -> Strategy:
        least = 1 if offload else 2
        state = _zero(stage, width, offload)
        return Strategy(name + end, how + computes, state, width, False, least, f"zero{stage}", bool(offload))

    return [
        zero("zero-1", "DeepSpeed, optimizer state split", 1),
        zero("zero-2", "DeepSpeed, and gradients", 2),
        Strategy("fsdp2" + end, "FSDP2, everything split" + computes, _fsdp(width), width, width == 2, 2, "fsdp"),
        zero("zero-3", "DeepSpeed, and weights", 3),
        zero("zero-2-offload", "gradients and optimizer in the host's memory", 2, "host"),
        zero("zero-3-offload", "weights, too: ds_config.json", 3, "host"),
        # where DeepSpeed keeps weights in 16 bits whatever the run computes in
        *([zero("zero-3-nvme", "on a disk: ds_zero3_nvme.json", 3, "nvme")] if width == 2 else []),
    ]


STRATEGIES: tuple[Strategy, ...] = (
    Strategy("ddp", "bf16 weights, fp32 masters (the default)", _replicated(2, 12)),
    Strategy("ddp-fp32", "--weights_dtype fp32", _replicated(4, 8), width=4),
    Strategy("ddp-autocast", "--bf16: fp32 weights under autocast", _replicated(4, 8, True), autocast=True),
    *_engines(2),
    *_engines(4),
)


def activation_bytes(work: Work, width: int, autocast: bool = False) -> float:
    """What the layers keep for the backward pass of one micro-batch.

    Per token and layer: two residual inputs and their norms (4 D), queries and what attention returns, keys and
    values, gate, up and their product (3 F). An MoE keeps the MLP's part k times, and the router's input in fp32.
    With gradient checkpointing (arXiv:1604.06174) the input of every layer, and all of one layer.
    """
    c = work.config
    D, F, T = c.hidden_size, c.intermediate_size, work.length
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    residual = 4 if autocast else width  # under autocast the residual stream stays in fp32
    layer: float = 2 * D * residual + 2 * D * width  # inputs of the norms; their outputs, as the products want them
    layer += (2 * query + 2 * key + c.qk_norm * (query + key)) * width
    layer += attention_weight_bytes(c, T, width, work.device)
    if c.num_experts:
        k, F = c.num_experts_per_tok, c.moe_intermediate_size
        layer += k * (2 * D + 3 * F) * width + 4 * D + 16 * c.num_experts + 48 * k
    else:
        layer += 3 * F * width
    dropped = c.residual_dropout > 0
    layer += 2 * D * dropped  # one byte per value, twice
    if work.gradient_checkpointing:
        return work.tokens * (c.num_hidden_layers * D * residual + layer)
    return work.tokens * (c.num_hidden_layers * layer + 2 * D * residual)


def attention_weight_bytes(config: SmolConfig, length: int, width: int, device: str) -> float:
    """Attention weights kept per token: none by a fused kernel, those of whole rows by smol_kernels.BlockAttention."""
    heads = config.num_attention_heads
    if device != "cpu":
        return 4 * heads  # the log of the softmax's denominator
    if config.attention_dropout:  # torch's fused CPU kernel has no dropout
        return 3 * heads * length * width
    if width == 2 and length <= CPU_BLOCK_LENGTH:
        return heads * width * (length + min(length, CPU_QUERY_BLOCK)) / 2
    return 4 * heads


def logit_bytes(work: Work, width: int) -> float:
    """What the loss takes while it runs: a block of logits, their fp32 form, gradients of the head and of its input."""
    V, D, elements = (
        work.config.vocab_size,
        work.config.hidden_size,
        LOSS_ELEMENTS.get(work.device, LOSS_ELEMENTS["else"]),
    )
    chunk = max(1, elements // V)
    block = max(chunk, LOSS_BLOCK_ELEMENTS // V, D * 4 // width)
    rows = min(block, work.tokens)
    head = V * D * width if work.trained is None else 0
    if head and work.tokens > block:
        head += V * D * 4  # several blocks are added up in fp32
    return rows * V * width + 2 * min(chunk, rows) * V * 4 + work.tokens * D * width + head


def memory(work: Work, strategy: Strategy) -> Memory:
    """Bytes on one device for a step of `work` under `strategy`."""
    state = strategy.state(work)
    context = CUDA_CONTEXT if work.device != "cpu" else 0
    return replace(
        state,
        activations=activation_bytes(work, strategy.width, strategy.autocast),
        logits=logit_bytes(work, strategy.width),
        buffers=state.buffers + context,
        # ZeRO-3 keeps one flat buffer for its part of the gradients; ZeRO-2 adds its part up while layers are left.
        accumulates=(work.accumulation > 1 and strategy.engine != "zero2") or strategy.engine == "zero3",
    )


def compare(
    work: Work, capacity: float | None, host: float | None = None, *, asked: str | None = None, bf16: bool = True
) -> list[dict[str, Any]]:
    """One line per strategy: its memory, and whether it fits into `capacity` bytes of a device and `host` of a machine.

    Listed are the strategy `asked` for and those that make sense: on devices without `bf16` what computes in fp32, on
    others the engines in bf16 alone.
    `fits` is None where nothing is known of the device. A strategy that does not fit says whether it would with
    gradient checkpointing.
    """
    lines = []
    for strategy in STRATEGIES:
        wide = strategy.width == 4
        sensible = (not wide or strategy.engine == "ddp") if bf16 else wide
        if not sensible and strategy.name != asked:
            continue
        if strategy.needs_devices > work.devices or (work.device == "cpu" and strategy.offloads):
            continue
        if work.base_bits and strategy.engine != "ddp":
            continue  # 4-bit weights cannot be split by these engines
        need = memory(work, strategy)
        saved = memory(replace(work, gradient_checkpointing=True), strategy).peak
        room = host is None or need.host * work.devices <= host
        lines.append(
            {
                "strategy": strategy.name,
                "how": strategy.how,
                **need.as_dict(),
                "peak_with_checkpointing": round(saved),
                "fits": None if capacity is None else need.peak <= capacity and room,
                "fits_with_checkpointing": None if capacity is None else saved <= capacity and room,
            }
        )
    return lines


# --- steps, schedule, time ----------------------------------------------------------------------------------


def accumulation_for(target: int, rows: int, length: int, devices: int) -> int:
    """Micro-batches a step whose tokens come nearest to `target`: 524,288 with 128 x 256 on two devices is 8."""
    return max(1, round(target / (rows * length * devices)))


def linear_factor(step: int, warmup: int, total: int) -> float:
    """The learning rate's factor of a linear schedule as often written by hand. Beyond `total` it is negative:
    training then moves *up* the gradient."""
    return step / warmup if step < warmup else 1.0 - (step - warmup) / max(1, total - warmup)


def training_seconds(tokens: float, work: Work, speed: float | None, flops: float | None, mfu: float) -> float | None:
    """Seconds for `tokens`, from `speed` (tokens/s of all devices together) or from FLOP/s of one device and the share
    of them that is used. None when neither is known."""
    if speed:
        return tokens / speed
    if not flops:
        return None
    per_token: float = flops_per_token(work.config, work.length)
    if work.trained is not None:
        per_token *= 2 / 3  # no gradients of the frozen weights
    return tokens * per_token / (flops * mfu * work.devices)


# --- claims that arithmetic refutes -------------------------------------------------------------------------


def check_parameters(config: SmolConfig, total: float | None, active: float | None) -> list[str]:
    """Warnings about claimed sizes, more than 5 % from the truth."""
    true_total, true_active = count_parameters(config)
    found = []
    for what, claim, true in (("total", total, true_total), ("active", active, true_active)):
        if claim and abs(claim / true - 1) > 0.05:
            found.append(f"{what} parameters: {short(claim)} expected, {true:,} counted")
    if config.num_experts and total and active:
        ratio = config.num_experts / config.num_experts_per_tok
        if total / active >= ratio:
            found.append(
                f"{config.num_experts} experts, top-{config.num_experts_per_tok}, can never be {short(active)} active "
                f"of {short(total)}: the total stays below {ratio:g} x active = {short(ratio * active)}. "
                "--model_size moe-30b-a7b is 7.0B of 29.9B with 16 experts, top-2"
            )
    return found


def check_batch(work: Work, target: int | None) -> list[str]:
    """A warning when a step does not have the tokens it is meant to have."""
    if not target or work.tokens_per_step == target:
        return []
    right = accumulation_for(target, work.rows, work.length, work.devices)
    reached = right * work.tokens * work.devices
    if right == work.accumulation:
        return [f"a step has {work.tokens_per_step:,} tokens, as near to {target:,} as whole micro-batches come"]
    return [
        f"a step has {work.tokens_per_step:,} tokens instead of {target:,}: {work.rows} x {work.length} tokens on "
        f"{work.devices} device{'s' * (work.devices > 1)} want --gradient_accumulation_steps {right} ({reached:,} "
        f"tokens), not {work.accumulation}"
    ]


def check_epochs(epochs: float | None, expected: float | None) -> list[str]:
    """Warnings about the passes over the data."""
    found = []
    if epochs is not None and expected and abs(epochs / expected - 1) > 0.05:
        found.append(f"{expected:g} epochs expected, but the steps make {epochs:.2g}: set --num_epochs, or --max_steps")
    if epochs is not None and epochs > 4.05:
        found.append(
            f"the data is seen {epochs:.3g} times; beyond 4 epochs repeating adds little (arXiv:2305.16264): more "
            "data, or fewer steps"
        )
    return found


def check_schedule(kind: str, warmup: int, steps: int, before: int | None) -> list[str]:
    """Warnings about the learning rate. `before`: steps of the run that this one extends."""
    found = []
    if warmup >= steps:
        found.append(f"--warmup_steps {warmup} is not below the {steps} steps of the run: the peak is never reached")
    if before and before < steps:
        factor = linear_factor(steps, min(warmup, before - 1), before)
        found.append(
            f"the run is extended from {before:,} to {steps:,} steps: the schedule is planned anew over all of them. A "
            f"linear one left at {before:,} would be at {factor:.4f} times the peak by the end: negative"
        )
    return found


def check_fit(work: Work, lines: list[dict[str, Any]], asked: str, capacity: float | None) -> list[str]:
    """A warning when the strategy that was asked for does not fit, with the first that does, or is not known here."""
    chosen = next((line for line in lines if line["strategy"] == asked), None)
    if chosen is None:
        known = ", ".join(line["strategy"] for line in lines)
        return [f"{asked}: the memory it takes is not known here, only that of {known}: try it with --max_steps 3"]
    if capacity is None or chosen["fits"]:
        return []
    state = chosen["weights"] + chosen["gradients"] + chosen["optimizer"]
    text = (
        f"{asked} needs {chosen['peak'] / GB:,.1f} GB per device ({state / GB:,.1f} GB of it weights, gradients and "
        f"optimizer state) and there are {capacity / GB:,.1f}"
    )
    return [f"{text}; {remedy(work, lines)}"]


def remedy(work: Work, lines: list[dict[str, Any]]) -> str:
    """The cheapest change that makes the run fit."""
    for key, addition in (("fits", ""), ("fits_with_checkpointing", " with --gradient_checkpointing")):
        better = next((line for line in lines if line[key]), None)
        if better:
            return f"{better['strategy']}{addition} fits ({better['how']})"
    if work.rows > 1:
        return "none fits: lower --per_device_train_batch_size, or use more devices"
    return "none fits: use more devices, or ones with more memory"


def short(number: float) -> str:
    """1,234 -> 1.2K, 7e9 -> 7B; the other way round is `amount`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def amount(text: str | float | None) -> float | None:
    """80GB, 24GiB, 7B, 524288, 1e9 as a number; ValueError for anything else."""
    if text is None or isinstance(text, int | float):
        return text
    units = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    units |= {"KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30, "TIB": 2.0**40, "": 1.0}
    clean = text.strip().replace(",", "").replace("_", "")
    digits = clean.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = clean[len(digits) :].strip().upper()
    try:
        value = float(digits) * units[unit]
    except (KeyError, ValueError):
        raise ValueError(f"{text!r} is not a number like 80GB, 24GiB, 7B or 524288") from None
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{text!r} must be positive")
    return value
