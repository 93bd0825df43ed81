"""Generation: a prompt of 512 tokens and decoding of 1 and 16 streams, ours against transformers' `generate`.

  python -m benchmarks.generate --rounds 3

SmolLM2-135M's shape with random weights in bf16 (--dtype), greedy, each side in its own process, taking turns:

  engine        smolkit.engine.TorchEngine, one request per stream, as serve_hf.py uses it
  generate      SmolForCausalLM.generate
  transformers  LlamaForCausalLM.generate, in a process left as it is; transformers+prepared: after runtime.prepare

Printed, one JSON object. prefill: prompt tokens per second up to the first new token of one stream. decode: new tokens
per second of all streams together after their first one, from the difference between two calls, so that prefill is
not in it.
"""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks import common
from smol_config import SmolConfig
from smol_model import SmolForCausalLM
from smolkit.engine import TorchEngine
from smolkit.errors import UserError, run
from smolkit.runtime import compute_dtype, prepare
from smolkit.sampling import GenerationRequest

SIDES = ("engine", "generate", "transformers", "transformers+prepared")
TARGETS = (("engine", 1.5),)  # `generate` is transformers' own loop over our model: shown, not aimed at
Prompts = list[list[int]]
Generator = Callable[[Prompts, int], Prompts]  # prompts, number of new tokens -> new tokens of each

# --- sides --------------------------------------------------------------------------------------------------


def build(side: str, config: SmolConfig, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a side with random weights, ready to generate."""
    torch.manual_seed(0)
    if side.startswith("transformers"):
        return AutoModelForCausalLM.from_config(config.to_native(), dtype=dtype).eval()
    return SmolForCausalLM(config).to(dtype).eval()


def generator(side: str, model: torch.nn.Module) -> Generator:
    """How a side turns prompts of equal length into greedy continuations."""
    if side != "engine":
        return partial(with_generate, model)
    return partial(with_engine, TorchEngine(model))


def with_generate(model: torch.nn.Module, prompts: Prompts, new: int) -> Prompts:
    ids = torch.tensor(prompts)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :].tolist()


def with_engine(engine: TorchEngine, prompts: Prompts, new: int) -> Prompts:
    async def one(prompt: list[int]) -> list[int]:
        request = GenerationRequest(prompt, new, temperature=0.0)
        return [event.token_id async for event in engine.generate(request)]

    async def everybody() -> Prompts:
        return list(await asyncio.gather(*map(one, prompts)))

    return asyncio.run(everybody())


# --- measuring ----------------------------------------------------------------------------------------------


def measure(
    side: str, model: dict[str, Any], prompt: int, decode_prompt: int, new: int, streams: list[int], repeats: int,
    dtype: str,
) -> dict[str, Any]:
    """Speeds of one side, in a process of its own."""
    if side != "transformers":
        prepare(0, huge_pages=True)
    config = SmolConfig(**model)
    continue_prompts = generator(side, build(side, config, compute_dtype(dtype)))
    random = torch.Generator().manual_seed(0)

    def seconds(rows: int, length: int, count: int) -> float:
        ids = torch.randint(config.vocab_size, (rows, length), generator=random).tolist()
        started = time.perf_counter()
        answers = continue_prompts(ids, count)
        spent = time.perf_counter() - started
        assert [len(answer) for answer in answers] == [count] * rows, "a side ended early: the speeds would be wrong"
        return spent

    speeds = {}
    for name, work in {"prefill": None, **{f"decode_{rows}": rows for rows in streams}}.items():
        if work is None:
            times = [seconds(1, prompt, 1) for _ in range(repeats + 1)]
            speeds[name] = prompt / statistics.median(times[1:])  # the first call warms up
            continue
        seconds(work, decode_prompt, 2)
        first = statistics.median(seconds(work, decode_prompt, 1) for _ in range(repeats))
        whole = statistics.median(seconds(work, decode_prompt, new + 1) for _ in range(repeats))
        speeds[name] = work * new / (whole - first)
    return speeds


def show(speeds: dict[str, float]) -> str:
    return "  ".join(f"{name} {speed:,.1f} tok/s" for name, speed in speeds.items())


def compare(names: Sequence[str], model: dict[str, Any], rounds: int, **work: Any) -> dict[str, Any]:
    """Measure all sides in turn and put the report together."""
    function = "benchmarks.generate:measure"
    jobs = {name: partial(common.in_a_process, function, side=name, model=model, **work) for name in names}
    results = common.take_turns(jobs, rounds, show)
    kinds = list(results[names[0]][0])
    speeds = {kind: {name: [row[kind] for row in rows] for name, rows in results.items()} for kind in kinds}
    ratios = {
        kind: {
            name: {peer: common.ratio_by_round(of[name], of[peer]) for peer in names if peer.startswith("transformers")}
            for name in names
            if not name.startswith("transformers")
        }
        for kind, of in speeds.items()
    }
    targets = []
    for kind in kinds:
        for name, limit in TARGETS:
            if name in names and "transformers" in names and work["dtype"] == "bf16":
                target = common.Target(name, "speed", limit, "transformers")
                targets.append({"kind": kind, **target.judge(ratios[kind][name]["transformers"]["median"])})
    rounded = {
        kind: {name: [round(speed, 1) for speed in values] for name, values in of.items()}
        for kind, of in speeds.items()
    }
    config = common.describe(SmolConfig(**model), max(work["streams"]), work["prompt"])
    return {
        **common.environment(),
        "model": config,
        "work": work,
        "tokens_per_second": rounded,
        "speed_ratios": ratios,
        "targets": targets,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = common.parser(__doc__)
    options.add_argument("--case", default="135m", help="whose model to build (default 135m)")
    options.add_argument("--sides", default=",".join(SIDES), help=f"default {','.join(SIDES)}")
    options.add_argument("--prompt", type=int, default=512, help="tokens of the prefill prompt (default 512)")
    options.add_argument("--decode_prompt", type=int, default=64, help="tokens before decoding (default 64)")
    options.add_argument("--new", type=int, default=32, help="tokens decoded per stream (default 32)")
    options.add_argument("--streams", type=int, nargs="+", default=[1, 16], help="default 1 16")
    options.add_argument("--repeats", type=int, default=2, help="calls of each kind in a round (default 2)")
    common.add_dtype(options)
    args = options.parse_args(argv)
    names = args.sides.split(",")
    if unknown := set(names) - set(SIDES):
        raise UserError(f"--sides: {', '.join(sorted(unknown))} unknown; sides: {', '.join(SIDES)}")
    work = {name: getattr(args, name) for name in ("prompt", "decode_prompt", "new", "streams", "repeats")}
    work["dtype"] = args.dtype or common.default_dtype()
    report = compare(names, common.named_case(args.case).model, args.rounds, **work)
    return common.emit({"benchmark": "generate", "case": args.case, **report}, args.output)


if __name__ == "__main__":
    run(main)
