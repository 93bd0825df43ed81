"""How the cost of a training step grows with the length of a row and with the number of experts.

  python -m benchmarks.scaling --rounds 2                     both curves
  python -m benchmarks.scaling --curve length --case 135m --values 512 1024 2048 4096

Each point is a run of benchmarks/train_step.py in a process of its own. Between two neighbouring points the curve is
given as an exponent p, "cost grows as x**p": p = log(cost2 / cost1) / log(x2 / x1), beside the p of what has to grow.

length   one row of 512 to 4,096 tokens. Everything but attention is linear, attention is quadratic: the expected
         exponent is that of smol_config.flops_per_token x length, and rises with the length. More than that means
         memory traffic: the scores of a short row fit into the cache, those of a long one do not.
experts  8 to 64 experts of one width, two per token: the FLOPs of a token stay, so the expected exponent of forward and
         backward is that of the router alone, near 0. What does grow: every expert's weights are read and their
         gradients written at every step, while its rows become fewer, and a product of few rows uses the cores less
         well (`matmul` shows both, with nothing else around them). The update is linear in the parameters.
"""

import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks import common
from benchmarks.train_step import Side, linear_products
from smol_config import SmolConfig, count_parameters, flops_per_token
from smolkit.errors import UserError, run

LENGTHS, EXPERTS = (512, 1024, 2048, 4096), (8, 16, 32, 64)
# Eight experts of this model have 8.7M parameters, 64 have 69M: a step of either fits into a small machine.
EXPERT_MODEL = common.shape(256, 4, 8, 2, 352, 4096, num_experts_per_tok=2, capacity_factor=1.25)
EXPERT_BATCH = (4, 256)

Point = dict[str, Any]


def length_points(case: common.Case, lengths: Sequence[int]) -> dict[int, Point]:
    """One row of each length, with the FLOPs it needs."""
    config, points = case.config(), {}
    for length in lengths:
        flops = flops_per_token(config, length) * length
        points[length] = {"model": case.model, "batch": 1, "length": length, "expected": {"gradients": flops}}
    return points


def expert_points(model: dict[str, Any], batch: tuple[int, int], numbers: Sequence[int]) -> dict[int, Point]:
    """The same tokens through each number of experts, with FLOPs and parameters."""
    points, (rows, length) = {}, batch
    for number in numbers:
        config = SmolConfig(**model, num_experts=number)
        expected = {
            "gradients": sum(product.flops for product in linear_products(config, rows * length)),
            "update": count_parameters(config)[0],
        }
        fields = model | {"num_experts": number}
        points[number] = {"model": fields, "batch": rows, "length": length, "expected": expected}
    return points


def exponents(xs: Sequence[int], costs: Sequence[float]) -> list[float]:
    """The p of cost ~ x**p between neighbouring points."""
    pairs = zip(zip(xs, costs, strict=True), zip(xs[1:], costs[1:], strict=False), strict=False)
    return [round(math.log(cost / before) / math.log(x / x_before), 3) for (x_before, before), (x, cost) in pairs]


def curve(points: dict[int, Point], names: Sequence[str], rounds: int, **work: Any) -> dict[str, Any]:
    """Measure every point of every side in turn; seconds and exponents by side and part of the step."""
    jobs = {}
    for x, point in points.items():
        work |= {name: point[name] for name in ("model", "batch", "length")}
        for name in names:
            jobs[f"{name} {x}"] = partial(common.in_a_process, "benchmarks.train_step:measure", side=name, **work)
        jobs[f"matmul {x}"] = partial(common.in_a_process, "benchmarks.train_step:ceiling", **work)
    results = common.take_turns(jobs, rounds, lambda result: f"{result['gradient_seconds']:8.3f} s")
    xs, report = list(points), {"x": list(points)}
    for name in (*names, "matmul"):
        rows = [results[f"{name} {x}"] for x in xs]
        parts = {"gradients": "gradient_seconds"} | ({} if name == "matmul" else {"update": "update_seconds"})
        report[name] = {
            part: {
                "seconds": (seconds := [statistics.median(row[field] for row in runs) for runs in rows]),
                "exponents": exponents(xs, seconds),
            }
            for part, field in parts.items()
        }
    parts = next(iter(points.values()))["expected"]
    report["expected"] = {part: exponents(xs, [point["expected"][part] for point in points.values()]) for part in parts}
    return report


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = common.parser(__doc__)
    options.add_argument("--curve", choices=("length", "experts", "both"), default="both")
    options.add_argument("--case", default="6.7m", help="whose model the length curve takes (default 6.7m)")
    options.add_argument("--values", type=int, nargs="+", help=f"default {LENGTHS} tokens, {EXPERTS} experts")
    options.add_argument("--sides", default="ours,transformers", help="default ours,transformers")
    options.add_argument("--steps", type=int, default=3, help="measured steps of a point and round (default 3)")
    common.add_dtype(options)
    args = options.parse_args(argv)
    names = args.sides.split(",")
    for name in names:
        Side(name)
    if args.values and (args.curve == "both" or len(args.values) < 2):
        raise UserError("--values needs two or more numbers and one --curve")
    case, dtype = common.named_case(args.case), args.dtype or common.default_dtype()
    work = {"steps": args.steps, "warmup": 1, "dtype": dtype}
    report = {"benchmark": "scaling", **common.environment(), "dtype": dtype}
    if args.curve in ("length", "both"):
        points = length_points(case, args.values or LENGTHS)
        report["length"] = curve(points, names, args.rounds, **work)
    if args.curve in ("experts", "both"):
        points = expert_points(EXPERT_MODEL, EXPERT_BATCH, args.values or EXPERTS)
        report["experts"] = curve(points, names, args.rounds, **work)
    return common.emit(report, args.output)


if __name__ == "__main__":
    run(main)
