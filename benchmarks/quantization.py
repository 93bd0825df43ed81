r"""Size, speed and perplexity of bf16, int8 and int4 in our engine.

  python -m benchmarks.quantization --model_path out/quickstart/pretrain \
      --text out/quickstart/data/pretrain/validation/pretrain_data.jsonl
  python -m benchmarks.quantization --case 135m

A checkpoint and text of yours, or a case's shape with random weights (--case), whose perplexity is taken on answers
that the bf16 model samples itself: random weights know no other text. Directories are made as --quantization makes
them; each measurement runs in a process of its own, methods taking turns.

Printed, one JSON object: MiB of safetensors, generated tokens per second of 1 and 16 streams (prompts of 64 tokens),
perplexity per token, the relative error of the weights, and what follows from them against bf16.
"""

import json
import math
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks import common
from smol_config import SmolConfig
from smol_model import SmolForCausalLM
from smolkit.batch import ContinuousBatch, generate_batch
from smolkit.errors import UserError, run
from smolkit.quantize import PRESETS, REPORT, Int8Product, load_quantized, quantize
from smolkit.runtime import prepare
from smolkit.sampling import GenerationRequest

METHODS = ("bf16", *PRESETS)


def load(directory: str, method: str) -> SmolForCausalLM:
    """As serve_hf.py loads it on this machine."""
    if method == "bf16":
        return SmolForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    return load_quantized(directory, torch.bfloat16).eval()


def measure(directory: str, method: str, rows: list[list[int]], new: int, streams: list[int]) -> dict[str, Any]:
    """One method, in a process of its own. `rows`: token ids of the text, every token of which counts but the first."""
    prepare(0)
    model = load(directory, method)
    total = count = 0
    with torch.inference_mode():
        for row in rows:
            total += float(model(torch.tensor([row]), labels=torch.tensor([row])).loss) * (len(row) - 1)
            count += len(row) - 1
    result: dict[str, Any] = {"perplexity": math.exp(total / count)}
    for number in streams:
        result[f"decode_{number}"] = decode_speed(model, number, new)
    return result


def decode_speed(model: SmolForCausalLM, streams: int, new: int) -> float:
    """Tokens per second after the first of each stream."""
    random = torch.Generator().manual_seed(0)
    batch = ContinuousBatch(model, max_num_seqs=streams)
    for _ in range(streams):
        prompt = torch.randint(model.config.vocab_size, (64,), generator=random).tolist()
        batch.add(batch.start(GenerationRequest(prompt, new + 2, 0.0)))
    batch.step()  # prompts and a first step, to warm up
    started, count = time.perf_counter(), 0
    while len(batch):
        count += len(batch.step())
    return count / (time.perf_counter() - started)


def rows_of(directory: str, text: str | None, limit: int) -> list[list[int]]:
    """Up to `limit` tokens in rows of 256, from a JSON Lines file or sampled from the model."""
    if text is None:
        model = load(directory, "bf16")
        prompts = [[number + 10] for number in range(limit // 128)]
        return [p + a for p, a in zip(prompts, generate_batch(model, prompts, 127, (), 1.0, seed=0), strict=True)]
    tokenizer, ids = AutoTokenizer.from_pretrained(directory), []
    with open(text, encoding="utf-8") as lines:
        for line in lines:
            ids += tokenizer.encode(json.loads(line)["text"], add_special_tokens=False)
            if len(ids) >= limit:
                break
    return [ids[start : start + 256] for start in range(0, min(len(ids), limit) - 1, 256)]


def compare(directory: str, text: str | None, rounds: int, tokens: int, new: int, streams: list[int]) -> dict[str, Any]:
    """All methods in turn, and the table."""
    rows = rows_of(directory, text, tokens)
    with tempfile.TemporaryDirectory() as made:
        directories = {"bf16": directory}
        for method in PRESETS:
            directories[method] = f"{made}/{method}"
            quantize(directory, directories[method], method)
        call = partial(common.in_a_process, "benchmarks.quantization:measure", rows=rows, new=new, streams=streams)
        jobs = {name: partial(call, directory=directories[name], method=name) for name in METHODS}
        results = common.take_turns(jobs, rounds, lambda row: "  ".join(f"{k} {v:,.2f}" for k, v in row.items()))
        table = {}
        for name, own in results.items():
            size = sum(file.stat().st_size for file in Path(directories[name]).glob("*.safetensors"))
            report = Path(directories[name]) / REPORT
            table[name] = {
                "mib": round(size / 2**20, 3),
                "perplexity": round(own[0]["perplexity"], 4),
                "perplexity_change": round(own[0]["perplexity"] / results["bf16"][0]["perplexity"] - 1, 5),
                "weight_error": json.loads(report.read_text())["weight_error"] if name != "bf16" else 0.0,
            }
            for number in streams:
                speeds = {key: [row[f"decode_{number}"] for row in results[key]] for key in (name, "bf16")}
                table[name][f"decode_{number}"] = [round(speed, 1) for speed in speeds[name]]
                table[name][f"decode_{number}_over_bf16"] = common.ratio_by_round(speeds[name], speeds["bf16"])
    in_int8 = Int8Product.pays(SmolConfig.from_pretrained(directory))
    return {**common.environment(), "int8_products": in_int8, "table": table}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = common.parser(__doc__)
    options.add_argument("--model_path", help="checkpoint directory")
    options.add_argument("--text", help="JSON Lines with `text`, for the perplexity of --model_path")
    options.add_argument("--case", help="instead: the shape of this case, random weights")
    options.add_argument("--tokens", type=int, default=16384, help="of text (default 16384)")
    options.add_argument("--new", type=int, default=64, help="tokens decoded per stream (default 64)")
    options.add_argument("--streams", type=int, nargs="+", default=[1, 16], help="default 1 16")
    args = options.parse_args(argv)
    if (args.case is None) == (args.model_path is None) or (args.text is None) != (args.model_path is None):
        raise UserError("give --model_path with --text, or --case")
    work = {name: getattr(args, name) for name in ("tokens", "new", "streams")}
    with tempfile.TemporaryDirectory() as random:
        if args.case is not None:
            torch.manual_seed(0)
            model = SmolForCausalLM(SmolConfig(**common.named_case(args.case).model))
            model.to(torch.bfloat16).save_pretrained(random)
        report = compare(args.model_path or random, args.text, args.rounds, **work)
    return common.emit({"benchmark": "quantization", "model": args.model_path or args.case, **report}, args.output)


if __name__ == "__main__":
    run(main)
