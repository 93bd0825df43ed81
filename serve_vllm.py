"""Serve a checkpoint as an OpenAI-compatible API with vLLM: the same routes and answers as serve_hf.py, for load.

    pip install -r requirements-vllm-cuda.txt        (without a GPU: requirements-vllm-cpu.txt)
    python serve_vllm.py
    python serve_vllm.py --model_path out/quickstart/dpo --tensor_parallel_size 4 --gpu_memory_utilization 0.9
    python serve_vllm.py --model_path out/quickstart/sft --lora skill=out/quickstart/lora
    python serve_vllm.py --model_path out/quickstart/sft --quantization int8

Without --model_path the newest checkpoint in out/ or output/ is served, be it of any stage; an unmerged LoRA directory
is served over its base model. Flags that are not listed here go to vLLM's engine as they are (`--enforce_eager`,
`--kv_cache_dtype fp8`, `--data_parallel_size 2`, ...; see vLLM's "Engine Arguments").
"""

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

import torch

from smolkit.errors import UserError, run
from smolkit.openai_api import create_app
from smolkit.quantize import cached, check_vllm_kernels
from smolkit.serving import (
    add_server_arguments,
    app_options,
    listen,
    load_tokenizer,
    model_name_of,
    newest_checkpoint,
    parse_loras,
    require_positive,
    serve,
    split_adapter,
    stop_ids_of,
)

# Ours by name because the reference documents them; vLLM reads them.
ENGINE_FLAGS = {
    "tensor_parallel_size": (int, "number of GPUs to split each layer over"),
    "gpu_memory_utilization": (float, "part of the GPU memory to use, 0 to 1"),
    "max_num_batched_tokens": (int, "most tokens of one step"),
    "max_num_seqs": (int, "most sequences of one step"),
    "max_model_len": (int, "longest prompt plus answer"),
}


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what is vLLM's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = "checkpoint or PEFT adapter directory; default: the newest in out/, output/"
    parser.add_argument("--model_path", help=where)
    for name, (kind, text) in ENGINE_FLAGS.items():
        parser.add_argument(f"--{name}", type=kind, help=text)
    parser.add_argument(
        "--quantization",
        help="int8 or int4: round the weights (the result is kept and serves again); else vLLM's, such as fp8",
    )
    add_server_arguments(parser)
    args, rest = parser.parse_known_args(_underscored(sys.argv[1:] if argv is None else argv, parser))
    require_positive(args, "tensor_parallel_size", "gpu_memory_utilization", "max_num_batched_tokens", "max_num_seqs")
    if args.quantization == "fp8" and not torch.cuda.is_available():
        raise UserError("--quantization fp8: vLLM has fp8 kernels for GPUs only, and torch sees none; use int8 or int4")
    if args.quantization in ("int8", "int4") and {"float32", "float", "--dtype=float32", "--dtype=float"} & {*rest}:
        raise UserError(f"--quantization {args.quantization}: vLLM computes it in 16 bits only: no --dtype float32")
    for name in ENGINE_FLAGS:
        if (value := getattr(args, name)) is not None:
            rest += [f"--{name}", str(value)]
    if args.quantization not in (None, "int8", "int4"):
        rest += ["--quantization", args.quantization]
    return args, rest


def _underscored(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The same with our flags as they are called here: vLLM's own spelling of them would go to its engine, unread."""
    words = []
    for word in argv:
        flag, equals, value = word.partition("=")
        ours = "--" + flag[2:].replace("-", "_")
        words.append(ours + equals + value if flag[:2] == "--" and ours in parser._option_string_actions else word)
    return words


def main(argv: Sequence[str] | None = None) -> None:
    """Load, listen, serve."""
    args, rest = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    path = args.model_path or newest_checkpoint()
    directory, adapter = split_adapter(path, None)
    name = args.served_model_name or model_name_of(path)
    loras = parse_loras(args.lora, name)
    method = args.quantization if args.quantization in ("int8", "int4") else None
    check_vllm_kernels(directory, method)
    try:
        from smolkit.vllm_engine import VllmEngine, engine_args, lora_flags
    except ImportError as error:
        raise UserError(
            f"vLLM cannot be imported ({error}): install requirements-vllm-cuda.txt (or -cpu), or use serve_hf.py"
        ) from None
    options = app_options(args)
    sock = listen(args.host, args.port)
    tokenizer = load_tokenizer(directory)
    stop_ids = stop_ids_of(directory, tokenizer)
    weights = cached(directory, method) if method else directory
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as vLLM's own server has it, and see below
    # vLLM takes a minute to start its processes: until `serve` takes over, SIGTERM has to end them, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    engine = VllmEngine(
        engine_args(["--model", str(weights), *lora_flags([*loras.values(), *filter(None, [adapter])]), *rest]),
        model_name=name,
        vocab_limit=len(tokenizer),
        loras=loras,
        own=adapter,
    )
    app = create_app(
        engine,
        tokenizer,
        name,
        stop_ids=stop_ids,
        **options,
    )
    try:
        serve(app, sock, args.drain_seconds, args.trusted_proxies)
    finally:
        engine.close()
    if engine.dead:
        raise SystemExit("error: vLLM's engine died; its own messages above say why")


def follow(parent: int) -> None:
    """Live as long as process `parent`: a server that is killed leaves no engine behind that holds the memory."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__mp_main__":  # a process that vLLM spawned, and that reads this file again
    os.setpgrp()  # Ctrl-C goes to the terminal's group: it shall reach the server alone, which lets answers end
    threading.Thread(target=follow, args=(os.getppid(),), daemon=True).start()

if __name__ == "__main__":
    run(main)
