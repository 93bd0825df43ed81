"""Serving under load: our engine, transformers' `generate`, vLLM, and the servers over both engines.

  python -m benchmarks.serving --vllm_python /path/to/env/bin/python --rounds 3
  python -m benchmarks.serving --case moe-85m --vllm_python /path/to/env/bin/python

A model of the case's shape with random weights in bf16 (--dtype), greedy, every side in its own process, taking turns:

  engine        smolkit.engine.TorchEngine with token ids
  transformers  AutoModelForCausalLM.generate: whatever waits becomes one padded batch, run to its longest answer
  vllm          vLLM's AsyncLLM with token ids, in the environment of --vllm_python
  serve_hf      serve_hf.py over HTTP, streamed chat completions: template, tokenizer and server-sent events included
  serve_vllm    serve_vllm.py the same way;  vllm_server: vLLM's own server the same way

Loads: `one` request; `many` (16) at once; `mixed`: 24 prompts and answers of 1/4 to 2 times the length, 4 at once and
then one every --gap seconds, at most 16 decoded together.

Printed, one JSON object: generated tokens per second from the first arrival to the last token, and the 95th percentile
of the time to the first token. --sides without vllm needs no --vllm_python.
"""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import common
from smol_config import SmolConfig
from smol_model import SmolForCausalLM
from smolkit.chat import add_chat_tokens, render, save_tokenizer
from smolkit.engine import TorchEngine
from smolkit.errors import UserError, run
from smolkit.runtime import compute_dtype, prepare
from smolkit.sampling import GenerationRequest

ENGINES, SERVERS = ("engine", "transformers", "vllm"), ("serve_hf", "serve_vllm", "vllm_server")
NEEDS_VLLM = ("vllm", "serve_vllm", "vllm_server")
VLLM_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
LOADS = ("one", "many", "mixed")
# (load, quantity, side, peer, limit): quantity "speed" must reach the limit, "ttft" must not pass it.
TARGETS = (
    ("one", "speed", "engine", "vllm", 1.5),
    ("one", "speed", "engine", "transformers", 1.5),
    ("many", "speed", "engine", "vllm", 1.0),
    ("many", "speed", "engine", "transformers", 1.5),
    ("mixed", "speed", "engine", "transformers", 2.5),
    ("mixed", "ttft", "engine", "vllm", 1.0),
    ("many", "speed", "serve_hf", "engine", 0.95),
    ("many", "speed", "serve_vllm", "vllm_server", 0.95),
)
MAX_NUM_SEQS = 16
# One request: when it arrives (seconds), characters of its message, tokens of its answer.
Load = list[tuple[float, int, int]]
Stream = Callable[[str, int], AsyncIterator[int]]  # message, tokens -> how many new tokens came, piece by piece


def load_of(name: str, prompt: int, new: int, gap: float) -> Load:
    """The requests of a load, the same in every round and for every side."""
    if name != "mixed":
        return [(0.0, prompt, new)] * (1 if name == "one" else MAX_NUM_SEQS)
    dice = random.Random(0)
    return [
        (max(0, number - 3) * gap, dice.randint(prompt // 4, 2 * prompt), dice.randint(max(1, new // 4), 2 * new))
        for number in range(24)
    ]


# --- the model ----------------------------------------------------------------------------------------------


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    """One token per byte, and unused ones up to `size`: any answer can be decoded, and prompts have known lengths."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = _byte_tokenizer(alphabet)
    missing = size - len(tokenizer)
    return _byte_tokenizer(alphabet + [f"unused{number}" for number in range(missing)])


def _byte_tokenizer(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    add_chat_tokens(tokenizer)
    return tokenizer


def write_model(directory: str, model: dict[str, Any]) -> None:
    """A checkpoint with random weights that never ends an answer by itself."""
    torch.manual_seed(0)
    config = SmolConfig(**model)
    built = SmolForCausalLM(config).to(torch.bfloat16)
    built.generation_config.eos_token_id = None
    built.save_pretrained(directory)
    save_tokenizer(tokenizer_of(config.vocab_size), directory)


def messages_of(message: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": message}]


def texts_of(load: Load) -> list[str]:
    """Messages that share no beginning: prefix reuse is not what is measured here."""
    dice = random.Random(1)
    return ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz ", k=length)) for _, length, _ in load]


# --- sides --------------------------------------------------------------------------------------------------


def measure(side: str, directory: str, loads: dict[str, Load], dtype: str) -> dict[str, Any]:
    """Speeds and first-token times of one side, in a process of its own."""
    if side not in ("transformers", "vllm", "serve_vllm", "vllm_server"):
        prepare(0, huge_pages=True)
    if side == "transformers":
        return with_transformers(directory, loads, dtype)
    if side in SERVERS:
        with server(side, directory, dtype) as url:
            return asyncio.run(with_client(url, directory, loads))
    return asyncio.run(with_engine(side, directory, loads, dtype))


async def drive(stream: Stream, loads: dict[str, Load]) -> dict[str, Any]:
    """Send the requests of each load at their times, after one to warm up."""
    async def one(start: float, delay: float, text: str, new: int) -> tuple[float, float]:
        await asyncio.sleep(max(0.0, start + delay - time.perf_counter()))
        arrived, first, count = time.perf_counter(), None, 0
        async for tokens in stream(text, new):
            first = first or time.perf_counter()
            count += tokens
        assert count == new, f"{count} tokens instead of {new}: the speeds would be wrong"
        return first - arrived, time.perf_counter() - start

    results = {}
    for name, load in loads.items():
        texts = texts_of(load)
        await asyncio.gather(*(one(time.perf_counter(), 0, text[::-1], 4) for text in texts[:MAX_NUM_SEQS]))
        start = time.perf_counter()
        jobs = (one(start, delay, text, new) for text, (delay, _, new) in zip(texts, load, strict=True))
        results[name] = summary(load, await asyncio.gather(*jobs))
    return results


def summary(load: Load, times: Sequence[tuple[float, float]]) -> dict[str, float]:
    """From (seconds to the first token, seconds from the start to the last) of each request."""
    firsts = sorted(first for first, _ in times)
    p95 = firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))]
    return {"speed": sum(new for *_, new in load) / max(end for _, end in times), "ttft": p95}


async def with_engine(side: str, directory: str, loads: dict[str, Load], dtype: str) -> dict[str, Any]:
    """Our engine or vLLM's, fed the token ids that the servers would make."""
    tokenizer, length = PreTrainedTokenizerFast.from_pretrained(directory), context_of(directory)
    if side == "vllm":
        from vllm.engine.arg_utils import AsyncEngineArgs

        from smolkit.vllm_engine import VllmEngine

        limits = {"max_num_seqs": MAX_NUM_SEQS, "max_model_len": length}
        args = AsyncEngineArgs(model=directory, dtype=VLLM_DTYPES[dtype], **limits)
        engine = VllmEngine(args, model_name="m", vocab_limit=len(tokenizer))
    else:
        model = SmolForCausalLM.from_pretrained(directory, dtype=compute_dtype(dtype))
        engine = TorchEngine(model, max_num_seqs=MAX_NUM_SEQS, max_model_len=length, budget=2**31)

    async def stream(text: str, new: int) -> AsyncIterator[int]:
        ids = render(tokenizer, messages_of(text), add_generation_prompt=True).input_ids
        async for _ in engine.generate(GenerationRequest(ids, new, temperature=0.0)):
            yield 1

    try:
        return await drive(stream, loads)
    finally:
        engine.close()


def context_of(directory: str) -> int:
    """Tokens that every side reserves room for."""
    return min(2048, SmolConfig.from_pretrained(directory).max_position_embeddings)


@contextmanager
def server(side: str, directory: str, dtype: str) -> Iterator[str]:
    """A server process; gives its URL."""
    common_flags = ["--max_num_seqs", str(MAX_NUM_SEQS), "--max_model_len", str(context_of(directory))]
    vllm_flags = ["--dtype", VLLM_DTYPES[dtype], *common_flags]
    if side == "vllm_server":
        port = "8417"
        command = ["-m", "benchmarks.vllm_server", "--model", directory, "--served_model_name", "m", *vllm_flags]
        command += ["--port", port, "--host", "127.0.0.1"]
    else:
        flags = ["--dtype", dtype, *common_flags] if side == "serve_hf" else vllm_flags
        command = [f"{side}.py", "--model_path", directory, "--served_model_name", "m", "--port", "0", *flags]
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, *command], cwd=common.ROOT, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 300
            while True:
                text = Path(log.name).read_text()
                found = re.search(r"serving at (http://\S+)/v1", text)
                url = found[1] if found else f"http://127.0.0.1:{port}" if side == "vllm_server" else None
                if url and _healthy(url):
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{side} did not start:\n{text[-3000:]}")
                time.sleep(0.2)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


async def with_client(url: str, directory: str, loads: dict[str, Load]) -> dict[str, Any]:
    """Streamed chat completions; an event with content counts as a token, and usage says how many there were."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def stream(text: str, new: int) -> AsyncIterator[int]:
            body = {"model": "m", "messages": messages_of(text), "max_tokens": new, "temperature": 0, "stream": True}
            body |= {"stream_options": {"include_usage": True}, "ignore_eos": True}
            seen = 0
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if event.get("usage"):
                        yield event["usage"]["completion_tokens"] - seen
                    elif event["choices"] and event["choices"][0]["delta"].get("content"):
                        seen += 1
                        yield 1

        return await drive(stream, loads)


def with_transformers(directory: str, loads: dict[str, Load], dtype: str) -> dict[str, Any]:
    """Static batches of what has arrived, padded on the left, each run to its longest answer."""
    from transformers import AutoModelForCausalLM

    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=compute_dtype(dtype)).eval()

    def batch(texts: Sequence[str], new: int) -> None:
        prompts = [render(tokenizer, messages_of(text), add_generation_prompt=True).input_ids for text in texts]
        inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    results = {}
    for name, load in loads.items():
        texts = texts_of(load)
        batch(texts[:1], 4)
        waiting, times, start = list(zip(texts, load, strict=True)), [], time.perf_counter()
        while waiting:
            now = time.perf_counter() - start
            ready = [item for item in waiting if item[1][0] <= now][:MAX_NUM_SEQS]
            if not ready:
                time.sleep(waiting[0][1][0] - now)
                continue
            waiting = waiting[len(ready) :]
            batch([text for text, _ in ready], max(new for _, (*_, new) in ready))
            end = time.perf_counter() - start
            times += [(end - delay, end) for _, (delay, *_) in ready]  # a batch answers when all of it is done
        results[name] = summary(load, times)
    return results


# --- report -------------------------------------------------------------------------------------------------


def compare(names: Sequence[str], case: str, rounds: int, vllm_python: str | None, **work: Any) -> dict[str, Any]:
    """Measure all sides in turn and put the report together."""
    model = common.named_case(case).model
    loads = {name: load_of(name, work["prompt"], work["new"], work["gap"]) for name in work["loads"]}
    with tempfile.TemporaryDirectory() as directory:
        write_model(directory, model)
        jobs = {}
        for name in names:
            python = vllm_python if name in NEEDS_VLLM else sys.executable
            call = partial(common.in_a_process, "benchmarks.serving:measure", python=python)
            jobs[name] = partial(call, side=name, directory=directory, loads=loads, dtype=work["dtype"])
        results = common.take_turns(jobs, rounds, show)
    figures = {
        load: {
            quantity: {name: [round(row[load][quantity], 3) for row in rows] for name, rows in results.items()}
            for quantity in ("speed", "ttft")
        }
        for load in loads
    }
    targets = []
    for load, quantity, side, peer, limit in TARGETS:
        if load in loads and side in names and peer in names and work["dtype"] == "bf16":
            of = figures[load][quantity]
            ratio = common.ratio_by_round(of[side], of[peer])
            met = ratio["median"] >= limit if quantity == "speed" else ratio["median"] <= limit
            what = f"{load}: {quantity} of {side} / {peer} {'>=' if quantity == 'speed' else '<='} {limit}"
            targets.append({"target": what, "measured": ratio, "met": met})
    return {
        **common.environment(),
        "model": common.describe(SmolConfig(**model), MAX_NUM_SEQS, work["prompt"]),
        "work": work,
        "units": {"speed": "generated tokens per second", "ttft": "seconds to the first token, 95th percentile"},
        "figures": figures,
        "targets": targets,
    }


def show(result: dict[str, Any]) -> str:
    return "  ".join(f"{load} {of['speed']:,.1f} tok/s {of['ttft']:.2f} s" for load, of in result.items())


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = common.parser(__doc__)
    options.add_argument("--case", default="135m", help="whose model to build (default 135m; the other: moe-85m)")
    options.add_argument("--sides", help="default: all; without --vllm_python those that need no vLLM")
    options.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS), help="default: all")
    options.add_argument("--vllm_python", help="interpreter of an environment with vLLM and this toolkit's packages")
    options.add_argument("--prompt", type=int, default=64, help="characters, one token each, of a message (default 64)")
    options.add_argument("--new", type=int, default=64, help="tokens of an answer (default 64)")
    options.add_argument("--gap", type=float, default=0.25, help="seconds between late arrivals (default 0.25)")
    common.add_dtype(options)
    args = options.parse_args(argv)
    everybody = [name for name in ENGINES + SERVERS if args.vllm_python or name not in NEEDS_VLLM]
    names = args.sides.split(",") if args.sides else everybody
    if unknown := set(names) - set(ENGINES + SERVERS):
        raise UserError(f"--sides: {', '.join(sorted(unknown))} unknown; sides: {', '.join(ENGINES + SERVERS)}")
    if (wanting := set(names) & set(NEEDS_VLLM)) and not args.vllm_python:
        raise UserError(f"--sides {', '.join(sorted(wanting))}: needs --vllm_python, an interpreter that has vLLM")
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    work = {name: getattr(args, name) for name in ("loads", "prompt", "new", "gap")}
    work["dtype"] = args.dtype or common.default_dtype()
    report = compare(names, args.case, args.rounds, args.vllm_python, **work)
    report["versions_of_vllm"] = _vllm_version(args.vllm_python)
    return common.emit({"benchmark": "serving", "case": args.case, **report}, args.output)


def _vllm_version(python: str | None) -> str:
    if python is None:
        return "absent"
    program = "import importlib.metadata as m; print(next(f'{d.name} {d.version}' for d in m.distributions() " \
              "if d.name in ('vllm', 'vllm-cpu')))"
    return subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    run(main)
