"""Training step of ours against transformers, litgpt and plain PyTorch: speed, memory, share of the matmul ceiling.

  python -m benchmarks.train_step --case 135m --rounds 3
  python -m benchmarks.train_step --case gpu-135m --device cuda --peak 989e12

A step is forward, backward, clipping to norm 1, AdamW. Sides, each in its own process, taking turns:

  ours          as the training scripts run it: smolkit.runtime.prepare, bf16 weights with fp32 masters (MasterAdamW),
                the attention kernel that the scripts take without --attn_implementation
  transformers  as its Trainer would run it untouched: fp32 weights under bf16 autocast, fused AdamW
  litgpt        the same, with litgpt's model and its chunked cross-entropy; taken when it is importable:
                pip install --no-deps -r requirements-bench.txt
  minimind      the same, with the plain PyTorch of benchmarks/peers.py (minimind-style)
  nanochat      the same, nanochat-style and with its blocks as large; its scripts compile: nanochat+compile. The same
                AdamW, not its Muon; dense cases only, and only where --sides names it

A side takes options: +prepared (smolkit.runtime.prepare for a peer too), +dropless (ours without a capacity limit),
+compile, +regions (accelerate's regional compilation: a block is compiled once), +eager, +sdpa, +flash (attention).
`--sides ours,transformers,ours+eager` replaces the case's own list. `--dtype fp32`: fp32 weights, no autocast and the
fused AdamW on all sides, as the scripts and the Trainer run where there is no bf16.

Printed, one JSON object: hardware, versions, and for each side
  tokens_per_second  of each round (tokens of a step over its median time) and their median
  peak_above_start   high-water mark of memory above what was in use before the first step, MiB
  peak_above_static  the same above weights + gradients + optimizer state (masters included), MiB: activations,
                     logits and copies. Counted from before the model was built, so leftovers count as well
`matmul` is the ceiling: the step's matrix products alone, forward and both gradients, in the same dtype and shapes.
Attention's products are not in it (`with_attention` has them, as whole squares); the router's are, in fp32. On a GPU
`mfu` counts attention as a causal row needs it, `mfu_whole_squares` as PaLM, torchtitan and nanochat do.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import compile_regions
from torch import Tensor, nn

from benchmarks import common
from benchmarks.peers import PEERS
from smol_config import SmolConfig, flops_per_token
from smol_model import SmolForCausalLM
from smolkit.checkpoints import build_model
from smolkit.errors import UserError, run
from smolkit.optimizer import MasterAdamW
from smolkit.runtime import KeptMemory, compute_dtype, prepare

LEARNING_RATE, MAX_NORM, SEED = 1e-4, 1.0, 0
ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flash": "flash_attention_2"}
OPTIONS = {"prepared", "dropless", "compile", "regions", *ATTENTION}

# --- sides --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """ours or a peer, and how it is run: `name` is what the user wrote, "transformers+prepared"."""

    name: str

    def __post_init__(self) -> None:
        if self.base not in ("ours", *PEERS) or not self.options <= OPTIONS:
            known = f"{', '.join(('ours', *PEERS))} with + and {', '.join(sorted(OPTIONS))}"
            raise UserError(f"--sides {self.name}: unknown; known: {known}")

    @property
    def base(self) -> str:
        return self.name.split("+")[0]

    @property
    def options(self) -> set[str]:
        return set(self.name.split("+")[1:])

    @property
    def attention(self) -> str | None:
        return next((ATTENTION[option] for option in self.options if option in ATTENTION), None)

    def missing(self) -> str | None:
        """A package that this side needs and that is not there."""
        needed = {"litgpt": self.base == "litgpt", "flash_attn": "flash" in self.options}
        return next((package for package, need in needed.items() if need and not common.is_installed(package)), None)

    def build(self, config: SmolConfig, device: torch.device, dtype: str = "bf16") -> "Training":
        """The model in training mode and its optimizer, random weights."""
        if self.base == "ours":
            if "dropless" in self.options:
                config.capacity_factor = None
            model = build_model(config, None, compute_dtype(dtype), self.attention or "sdpa").to(device)
        else:
            options = {"attention": self.attention} if self.base == "transformers" else {}
            model = PEERS[self.base](config, **options).to(device)
        optimizer: torch.optim.Optimizer
        if self.base == "ours" and dtype == "bf16":
            compiled = bool(self.options & {"compile", "regions"})
            optimizer = MasterAdamW(model.parameters(), lr=LEARNING_RATE, compiled=compiled)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        model.train()
        called = compile_regions(model) if "regions" in self.options else model
        called = torch.compile(model) if "compile" in self.options else called
        return Training(model, optimizer, called, autocast=self.base != "ours" and dtype == "bf16")


@dataclass
class Training:
    """A model in training and the two halves of its step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    called: nn.Module  # the model, or its compiled form
    autocast: bool  # to bf16

    def gradients(self, ids: Tensor) -> Tensor:
        """Forward and backward of ids (B, T); the loss."""
        if isinstance(self.model, SmolForCausalLM):
            loss = self.called(input_ids=ids, labels=ids, use_cache=False).loss
        else:
            with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self.autocast):
                loss = self.called(ids)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Clip, AdamW, and no gradients any more."""
        if isinstance(self.optimizer, MasterAdamW):
            self.optimizer.clip_grad_norm(MAX_NORM)
        else:
            nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(
    side: str, model: dict[str, Any], batch: int, length: int, steps: int, warmup: int, device: str = "cpu",
    dtype: str = "bf16",
) -> dict[str, Any]:
    """One side's run, in a process of its own: times, losses and memory of `warmup` + `steps` training steps."""
    chosen, where = Side(side), torch.device(device)
    prepared = chosen.base == "ours" or "prepared" in chosen.options
    if prepared:
        prepare(SEED)
    else:
        torch.manual_seed(SEED)
    config, memory = SmolConfig(**model), common.Memory(where)
    # Imports and kernels loaded on first use are no part of a model's memory: a very small one has loaded them all. Not
    # compiled: the compiler would take the sizes that differ from the real ones for sizes that change.
    small = chosen.build(SmolConfig(**model | {"num_hidden_layers": 1, "vocab_size": 256}), where, dtype)
    replace(small, called=small.model).gradients(torch.zeros(1, 16, dtype=torch.long, device=where))
    del small

    empty = memory.now()
    training = chosen.build(config, where, dtype)
    # The same tokens for every side, however many random numbers its weights took.
    random = torch.Generator(where).manual_seed(SEED)
    ids = torch.randint(config.vocab_size, (warmup + steps, batch, length), device=where, generator=random)
    memory.reset_peak()
    start = memory.now()
    kept, losses = KeptMemory(), []
    seconds = {"gradient_seconds": Stopwatch(where), "update_seconds": Stopwatch(where)}
    for rows in ids:
        with seconds["gradient_seconds"]:
            losses.append(training.gradients(rows))
        with seconds["update_seconds"]:
            training.update()
            if prepared:
                kept.check()  # as the scripts' trainer does, once a step
    times = {name: watch.seconds() for name, watch in seconds.items()}
    whole = [sum(parts) for parts in zip(*times.values(), strict=True)]
    static, peak = static_bytes(training.model, training.optimizer), memory.peak()
    return {
        "tokens_per_second": batch * length / statistics.median(whole[warmup:]),
        **{name: statistics.median(values[warmup:]) for name, values in times.items()},
        "losses": torch.stack(losses).tolist(),
        "static": static / common.MIB,
        "peak_above_start": None if peak is None else (peak - start) / common.MIB,
        "peak_above_static": None if peak is None else (peak - empty - static) / common.MIB,
    }


class Stopwatch:
    """Times of the blocks under it. On a GPU by events in its queue, so that nothing waits for it between two blocks:
    a training script does not wait there either, and prepares the next block while this one is computed."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.marks = device.type == "cuda", []

    def _mark(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def __enter__(self) -> None:
        self._mark()

    def __exit__(self, *problem: Any) -> None:
        self._mark()

    def seconds(self) -> list[float]:
        """Of each block so far."""
        pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
        if not self.cuda:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairs]


def static_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Weights, a gradient for each of them, and everything the optimizer keeps (moments, fp32 masters)."""
    kept = sum(parameter.nbytes for parameter in model.parameters()) * 2

    def walk(item: Any) -> int:
        if isinstance(item, Tensor):
            return item.nbytes
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()
        return sum(map(walk, children))

    return kept + walk(optimizer.state_dict())


# --- ceiling ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """`count` matrix products of each layer (or of the head): rows x inner times inner x outer."""

    what: str
    rows: int
    inner: int
    outer: int
    count: int
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        """Forward alone: a multiplication and an addition for each element of the three-dimensional product."""
        return 2 * self.rows * self.inner * self.outer * self.count


def linear_products(config: SmolConfig, tokens: int, dtype: torch.dtype = torch.bfloat16) -> list[Product]:
    """The products of a step with weights: forward; each has two more of equal size in the backward pass.

    Experts are taken as evenly loaded and dropless.
    """
    D, L = config.hidden_size, config.num_hidden_layers
    query, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    products = [
        Product("q_proj", tokens, D, query, L, dtype),
        Product("k_proj, v_proj", tokens, D, kv, 2 * L, dtype),
        Product("o_proj", tokens, query, D, L, dtype),
    ]
    rows, width, count = tokens, config.intermediate_size, L
    if config.num_experts:
        width, count = config.moe_intermediate_size, L * config.num_experts
        rows = tokens * config.num_experts_per_tok // config.num_experts
        products.append(Product("router", tokens, D, config.num_experts, L, torch.float32))
    return [
        *products,
        Product("gate_proj, up_proj", rows, D, width, 2 * count, dtype),
        Product("down_proj", rows, width, D, count, dtype),
        Product("lm_head", tokens, D, config.vocab_size, 1, dtype),
    ]


def attention_flops(config: SmolConfig, batch: int, length: int) -> int:
    """Forward FLOPs of scores and weighted values over whole squares, all layers."""
    channels = config.num_attention_heads * config.head_dim
    return 2 * 2 * batch * length * length * channels * config.num_hidden_layers


def linear_pass(product: Product, device: torch.device) -> Callable[[], None]:
    """Forward and both gradients of every copy of a product.

    Each copy has a weight of its own, as in the model: reading it from memory is part of the work. Results go to
    memory that is there already.
    """
    make = partial(torch.randn, dtype=product.dtype, device=device)
    x, grad = make(product.rows, product.inner), make(product.rows, product.outer)
    weights = [make(product.outer, product.inner) for _ in range(product.count)]
    y, grad_x, grad_weight = torch.empty_like(grad), torch.empty_like(x), torch.empty_like(weights[0])

    def once() -> None:
        for weight in weights:
            torch.mm(x, weight.t(), out=y)
            torch.mm(grad, weight, out=grad_x)
            torch.mm(grad.t(), x, out=grad_weight)

    return once


def attention_pass(
    config: SmolConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], None]:
    """Scores and weighted values of one layer with their four gradients, key heads shared by their query heads."""
    make = partial(torch.randn, dtype=dtype, device=device)
    heads, Dh = batch * config.num_key_value_heads, config.head_dim
    rows = config.num_attention_heads // config.num_key_value_heads * length
    query, key, value = make(heads, rows, Dh), make(heads, length, Dh), make(heads, length, Dh)
    scores, mixed = make(heads, rows, length), make(heads, rows, Dh)

    def once() -> None:
        for _ in range(config.num_hidden_layers):
            torch.bmm(query, key.transpose(1, 2), out=scores)
            torch.bmm(scores, value, out=mixed)
            torch.bmm(mixed, value.transpose(1, 2))  # of the weights
            torch.bmm(scores.transpose(1, 2), mixed)  # of the values
            torch.bmm(scores, key)  # of the queries
            torch.bmm(scores.transpose(1, 2), query)  # of the keys

    return once


def ceiling(
    model: dict[str, Any], batch: int, length: int, steps: int, warmup: int, device: str = "cpu", dtype: str = "bf16"
) -> dict[str, Any]:
    """Tokens per second if a step were its matrix products and nothing else."""
    prepare(SEED)
    config, where = SmolConfig(**model), torch.device(device)
    products = linear_products(config, batch * length, compute_dtype(dtype))
    linear = sum(seconds_of(linear_pass(product, where), steps, warmup, where) for product in products)
    attention = seconds_of(attention_pass(config, batch, length, where, compute_dtype(dtype)), steps, warmup, where)
    flops = 3 * sum(product.flops for product in products)
    return {
        "tokens_per_second": batch * length / linear,
        "gradient_seconds": linear,
        "flops_per_second": flops / linear,
        "flops": flops,
        "with_attention": {
            "tokens_per_second": batch * length / (linear + attention),
            "flops": flops + 3 * attention_flops(config, batch, length),
        },
    }


def seconds_of(work: Callable[[], None], steps: int, warmup: int, device: torch.device) -> float:
    """Median time of `work`."""
    watch = Stopwatch(device)
    for _ in range(warmup + steps):
        with watch:
            work()
    return statistics.median(watch.seconds()[warmup:])


# --- report -------------------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> str:
    memory = f", {result['peak_above_static']:,.0f} MiB above static" if result.get("peak_above_static") else ""
    return f"{result['tokens_per_second']:>9,.1f} tok/s{memory}"


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one side over its rounds."""
    speeds = [result["tokens_per_second"] for result in results]
    summary = {
        "tokens_per_second": {"median": round(statistics.median(speeds), 1), "rounds": [round(s, 1) for s in speeds]},
        "first_loss": round(results[0]["losses"][0], 4),
        "last_loss": round(results[0]["losses"][-1], 4),
    }
    for name in ("static", "peak_above_start", "peak_above_static"):
        values = [result[name] for result in results]
        summary[name] = None if None in values else round(statistics.median(values))
    return summary


def measured_value(target: common.Target, sides: dict[str, Any], report: dict[str, Any]) -> float | None:
    """The figure a target speaks of; None where a side was not measured."""
    if target.side not in sides or (target.peer and target.peer not in sides):
        return None
    if target.quantity == "speed":
        return report["speed_ratios"][target.side][target.peer]["median"]
    if target.quantity == "memory":
        ours, theirs = (sides[name]["peak_above_static"] for name in (target.side, target.peer))
        return None if ours is None else ours / theirs
    return report["share_of_matmul" if target.quantity == "matmul" else "mfu"].get(target.side)


def ratios(name: str, speeds: dict[str, list[float]]) -> dict[str, Any]:
    """The speed of one side of ours over that of each peer."""
    peers = [peer for peer in speeds if not peer.startswith(("ours", "matmul"))]
    return {peer: common.ratio_by_round(speeds[name], speeds[peer]) for peer in peers}


def compare(
    case: common.Case, names: Sequence[str], rounds: int, device: str, dtype: str, peak: float | None, **counts: int
) -> dict[str, Any]:
    """Measure all sides and the ceiling in turn, and put the report together. `peak`: FLOP/s of the device, for MFU."""
    absent = {name: f"{package} is not installed" for name in names if (package := Side(name).missing())}
    present = [name for name in names if name not in absent]
    work = {"model": case.model, "batch": case.batch, "length": case.length, "device": device, "dtype": dtype}
    work |= counts
    module = "benchmarks.train_step"
    jobs = {name: partial(common.in_a_process, f"{module}:measure", side=name, **work) for name in present}
    jobs["matmul"] = partial(common.in_a_process, f"{module}:ceiling", **work)
    results = common.take_turns(jobs, rounds, show)
    speeds = {name: [result["tokens_per_second"] for result in rows] for name, rows in results.items()}
    sides = {name: summarise(results[name]) for name in present}
    config, last = case.config(), results["matmul"][-1]
    # Attention as a causal row needs it, and as whole squares, as most published figures count it (arXiv:2204.02311).
    products, squares = flops_per_token(config, -1), 3 * attention_flops(config, 1, case.length) // case.length
    flops = {"mfu": flops_per_token(config, case.length), "mfu_whole_squares": products + squares}
    report = {
        **common.environment(),
        "model": common.describe(config, case.batch, case.length),
        "dtype": dtype,
        "sides": sides,
        "absent": absent,
        "matmul": {
            "tokens_per_second": [round(speed, 1) for speed in speeds["matmul"]],
            "gflops_per_second": round(last["flops_per_second"] / 1e9, 1),
            "flops_per_step": last["flops"],
            "with_attention": [round(row["with_attention"]["tokens_per_second"], 1) for row in results["matmul"]],
        },
        "share_of_matmul": {name: common.ratio_by_round(speeds[name], speeds["matmul"])["median"] for name in present},
        "speed_ratios": {name: ratios(name, speeds) for name in present if name.startswith("ours")},
    }
    for name, each in flops.items():
        speed = {side: sides[side]["tokens_per_second"]["median"] for side in present if peak}
        report[name] = {side: tokens * each / peak for side, tokens in speed.items()}
    targets = case.targets if dtype == "bf16" else ()
    report["targets"] = [target.judge(measured_value(target, sides, report)) for target in targets]
    return report


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = common.parser(__doc__)
    options.add_argument("--case", default="135m", help=f"one of {', '.join(common.CASES)}")
    options.add_argument("--sides", help="comma-separated; default: those of the case")
    options.add_argument("--steps", type=int, help="measured steps of a round (default: the case's)")
    options.add_argument("--warmup", type=int, help="steps before them (default: the case's)")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    common.add_dtype(options)
    options.add_argument("--peak", type=float, help="bf16 FLOP/s of the device, for MFU (H100: 989e12)")
    args = options.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU")
    case = common.named_case(args.case)
    names = args.sides.split(",") if args.sides else case.sides
    if case.config().num_experts and "nanochat" in {Side(name).base for name in names}:
        raise UserError(f"--case {args.case}: nanochat has no Mixture-of-Experts; leave it out of --sides")
    counts = {"steps": args.steps or case.steps, "warmup": case.warmup if args.warmup is None else args.warmup}
    dtype = args.dtype or common.default_dtype(args.device)
    report = compare(case, names, args.rounds, args.device, dtype, args.peak, **counts)
    return common.emit({"benchmark": "train_step", "case": args.case, **report}, args.output)


if __name__ == "__main__":
    run(main)
