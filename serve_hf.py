"""Serve a checkpoint as an OpenAI-compatible API, with our own engine on PyTorch (CPU or GPU).

    python serve_hf.py --model_path out/quickstart/dpo
    python serve_hf.py --model_path out/quickstart/sft --adapter out/quickstart/lora --port 0
    python serve_hf.py --model_path out/quickstart/sft --lora skill=out/quickstart/lora     # both, chosen by `model`
    python serve_hf.py --model_path out/quickstart/sft --quantization int8

Then, from any OpenAI client:

    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \
         -d '{"messages": [{"role": "user", "content": "What is photosynthesis?"}]}'

Requests are batched continuously: they join and leave between decode steps. The same request with the same
seed gets the same answer whatever else is being served. Ctrl-C or SIGTERM stops accepting, finishes what
runs, and exits.
"""

import argparse
import logging
import signal
from collections.abc import Sequence

from smolkit.errors import UserError, run
from smolkit.openai_api import create_app
from smolkit.runtime import prepare
from smolkit.serving import (
    add_server_arguments,
    app_options,
    listen,
    load_engine,
    load_tokenizer,
    model_name_of,
    newest_checkpoint,
    parse_loras,
    require_positive,
    serve,
    split_adapter,
    stop_ids_of,
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_path", help="checkpoint or PEFT adapter directory; default: the newest in out/, output/"
    )
    parser.add_argument("--adapter", help="PEFT adapter directory, merged into the model while loading")
    parser.add_argument("--quantization", choices=["int8", "int4"], help="round the weights; the result is kept")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bf16", "fp16", "fp32"],
        help="auto: bf16 where hardware has it",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, …; default: the GPU if there is one")
    parser.add_argument("--max_model_len", type=int, help="longest prompt plus answer; default: the model's context")
    parser.add_argument("--max_num_seqs", type=int, default=16, help="requests decoded together")
    parser.add_argument(
        "--max_num_batched_tokens",
        type=int,
        help="prompt tokens between two tokens of running answers; default: 512, on a GPU 4096",
    )
    parser.add_argument(
        "--kv_cache_gib", type=float, help="GiB for keys and values; default: for --max_num_seqs of --max_model_len"
    )
    parser.add_argument("--max_queue", type=int, default=256, help="requests that may wait; more get status 503")
    parser.add_argument("--threads", type=int, help="CPU threads of one operation; default: OMP_NUM_THREADS or all")
    add_server_arguments(parser)
    args = parser.parse_args(argv)
    require_positive(args, "max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_cache_gib", "threads")
    if args.max_queue < 0:
        raise UserError(f"--max_queue {args.max_queue}: must be 0 or more")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Load, listen, serve."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    prepare(seed=None, threads=args.threads, huge_pages=True)
    path = args.model_path or newest_checkpoint()
    directory, adapter = split_adapter(path, args.adapter)
    options = app_options(args)
    model_name = args.served_model_name or model_name_of(path)
    loras = parse_loras(args.lora, model_name)
    sock = listen(args.host, args.port)  # a taken port shows before the model is loaded
    tokenizer = load_tokenizer(directory)
    stop_ids = stop_ids_of(directory, tokenizer)
    batched = {} if args.max_num_batched_tokens is None else {"max_num_batched_tokens": args.max_num_batched_tokens}
    engine = load_engine(
        directory,
        tokenizer,
        model_name=model_name,
        dtype=args.dtype,
        device=args.device,
        adapter=adapter,
        loras=loras,
        quantization=args.quantization,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        kv_cache_gib=args.kv_cache_gib,
        max_queue=args.max_queue,
        on_death=lambda: signal.raise_signal(signal.SIGTERM),
        **batched,
    )
    app = create_app(
        engine,
        tokenizer,
        model_name,
        stop_ids=stop_ids,
        **options,
    )
    try:
        serve(app, sock, args.drain_seconds, args.trusted_proxies)
    finally:
        engine.close()
    if engine.dead:
        raise SystemExit("error: the device failed; the messages above say how")


if __name__ == "__main__":
    run(main)
