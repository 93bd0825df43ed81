"""What the serving scripts share: checking and loading a checkpoint directory, and running an application.

`serve_hf.py`, `serve_vllm.py` and `smolkit/clients.py` differ in the engine and in who talks to it, not in these.
"""

import argparse
import asyncio
import ipaddress
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h11
import psutil
import torch
import uvicorn
from fastapi import FastAPI
from safetensors import SafetensorError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from uvicorn.protocols.http.h11_impl import H11Protocol

from smol_model import SmolForCausalLM
from smolkit.cache import cache_budget
from smolkit.chat import chat_stop_ids
from smolkit.checkpoints import load_weights, merge_adapter, require_adapter
from smolkit.engine import TorchEngine
from smolkit.errors import UserError
from smolkit.http_guard import Limits, log_access_to
from smolkit.openai_api import TEMPLATE_KWARGS
from smolkit.quantize import cached, load_quantized, quantization_of
from smolkit.runtime import chosen_device, compute_dtype

logger = logging.getLogger(__name__)

HEADER_SECONDS = 15.0  # that a client has for a request's header


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that both servers have."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--lora",
        nargs="+",
        default=[],
        metavar="NAME=DIR",
        help="PEFT adapters served beside the model; a request chooses one as its `model`",
    )
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (0.0.0.0: everywhere)")
    group.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one and prints it")
    group.add_argument(
        "--api_key",
        help="key that requests must carry; the environment variable SMOLLM_API_KEY hides it from other users",
    )
    group.add_argument("--api_key_file", help="file with such keys, one a line")
    group.add_argument("--served_model_name", help="name in the API; default: the directory's name")
    group.add_argument(
        "--default_max_tokens",
        type=int,
        help="answer length for requests that name none; default: the context",
    )
    limits = Limits()
    group.add_argument("--max_body_bytes", type=int, default=limits.max_body_bytes, help="larger requests: status 413")
    group.add_argument(
        "--max_concurrent_requests",
        type=int,
        default=limits.max_concurrent_requests,
        help="HTTP requests at a time; more get status 503",
    )
    group.add_argument(
        "--requests_per_minute", type=int, help="for each API key or, without keys, address; more: 429; default: any"
    )
    group.add_argument(
        "--request_timeout", type=float, default=limits.request_timeout, help="seconds for a request, else: 503"
    )
    group.add_argument(
        "--drain_seconds", type=int, default=30, help="after SIGTERM or Ctrl-C, for requests that are being answered"
    )
    group.add_argument(
        "--trusted_proxies",
        nargs="+",
        default=[],
        metavar="ADDRESS",
        help="addresses or networks of proxies that say in X-Forwarded-For whose request it is; default: none",
    )
    group.add_argument("--cors_origins", nargs="+", default=[], help="web pages whose scripts may ask; default: none")
    group.add_argument(
        "--chat_template_kwargs",
        nargs="*",
        default=list(TEMPLATE_KWARGS),
        help="variables of the chat template that requests may set (default: %(default)s)",
    )
    group.add_argument("--access_log", default="-", help="file for a JSON line per request; default: standard error")


def app_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_server_arguments` says about the application, for `create_app`."""
    limits = ("max_body_bytes", "max_concurrent_requests", "requests_per_minute", "request_timeout")
    require_positive(args, *limits, "default_max_tokens")
    if args.drain_seconds < 0:
        raise UserError(f"--drain_seconds {args.drain_seconds}: must be 0 or more")
    for proxy in args.trusted_proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError as error:
            raise UserError(f"--trusted_proxies {proxy}: {error}; give addresses such as 10.0.0.0/8") from None
    try:
        log_access_to(args.access_log)
    except OSError as error:
        raise UserError(f"--access_log {args.access_log}: cannot be written: {error.strerror}") from None
    return {
        "api_key": api_keys(args.api_key, args.api_key_file),
        "default_max_tokens": args.default_max_tokens,
        "template_kwargs": args.chat_template_kwargs,
        "cors_origins": args.cors_origins,
        "limits": Limits(
            max_body_bytes=args.max_body_bytes,
            max_concurrent_requests=args.max_concurrent_requests,
            requests_per_minute=args.requests_per_minute,
            request_timeout=args.request_timeout,
        ),
    }


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """`UserError` naming the first of these flags that was given 0 or less."""
    for name in names:
        if (value := getattr(args, name)) is not None and not value > 0:  # nor NaN
            raise UserError(f"--{name} {value}: must be more than 0")


def api_keys(key: str | None, file: str | None) -> list[str]:
    """Keys of the command line or the environment, and of a file; none at all only where none was mentioned."""
    keys = [] if (given := os.environ.get("SMOLLM_API_KEY") if key is None else key) is None else [given]
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api_key_file {file}: cannot be read: {_first_line(error)}") from None
        keys += [line.strip() for line in lines if line.strip()] or [""]
    if not all(keys):
        raise UserError("an API key is empty (--api_key, SMOLLM_API_KEY or --api_key_file): give one, or leave it out")
    return keys


def newest_checkpoint(*roots: str | Path) -> Path:
    """The checkpoint or adapter directory under `roots` (default: out/ and output/) that was written last."""
    roots = roots or ("out", "output")
    names = ("config.json", "adapter_config.json")
    found = (file for root in roots for name in names for file in Path(root).glob(f"**/{name}"))
    configs = [file for file in found if any(file.parent.glob("*.safetensors"))]
    if not configs:
        places = " or ".join(f"{root}/" for root in roots)
        raise UserError(f"no checkpoint under {places}: give one as --model_path")
    newest = max(configs, key=lambda config: config.stat().st_mtime).parent
    logger.info("no --model_path: taking the newest checkpoint, %s", newest)
    return newest


def model_name_of(path: str | Path) -> str:
    """The name in the API: the directory's."""
    return Path(path).resolve().name


def check_checkpoint(directory: str | Path) -> Path:
    """The directory, or `UserError` when it holds no model with a tokenizer."""
    path = Path(directory)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; --model_path takes a checkpoint directory")
    for name, remedy in (
        ("config.json", "give a directory written by train_*.py or any Llama/Qwen/Mixtral checkpoint"),
        ("tokenizer_config.json", "copy the tokenizer's files into it"),
    ):
        if not (path / name).is_file():
            raise UserError(f"{path}: not a checkpoint directory, {name} is missing; {remedy}")
    _require_safetensors(path)
    return path


def _require_safetensors(directory: Path) -> None:
    """Other files of weights are pickled Python, which may run anything."""
    if not any(directory.glob("*.safetensors")):
        raise UserError(f"{directory}: no weights as *.safetensors, and no others are read: convert them")


def split_adapter(directory: str | Path, adapter: str | None) -> tuple[Path, Path | None]:
    """(base model directory, adapter directory or None); `directory` itself may be a PEFT adapter."""
    path = Path(directory)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        if adapter is not None:
            raise UserError(f"{path} is an adapter itself: give the base model as --model_path with --adapter")
        adapter, path = str(path), Path(_base_of(path))
    if adapter is None:
        return check_checkpoint(path), None
    _require_safetensors(require_adapter(adapter))
    return check_checkpoint(path), Path(adapter)


def _base_of(adapter: Path) -> str:
    base = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{adapter}: the adapter does not name its base model; give it as --model_path")
    return base


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint directory, which must have a chat template."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: the tokenizer cannot be loaded: {_first_line(error)}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{directory}: a fast tokenizer (tokenizer.json) is needed")
    if not tokenizer.chat_template:
        raise UserError(f"{directory}: the tokenizer has no chat template; prepare it with train_tokenizer.py")
    return tokenizer


def stop_ids_of(directory: Path, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids that end an answer: the tokenizer's and those of generation_config.json, or `UserError` if that is broken."""
    file = directory / "generation_config.json"
    if not file.is_file():
        return chat_stop_ids(tokenizer)
    try:
        config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read: {_first_line(error).rstrip('.')}; mend it or take it away") from None
    return chat_stop_ids(tokenizer, config.eos_token_id)


def load_engine(
    directory: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    model_name: str,
    dtype: str = "auto",
    device: str | None = None,
    adapter: Path | None = None,
    loras: Mapping[str, Path] | None = None,
    quantization: str | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int = 16,
    kv_cache_gib: float | None = None,
    **options: Any,
) -> TorchEngine:
    """Load a checkpoint (and merge an adapter into it) and start an engine over it.

    `loras`: adapters served beside the model, by name. `quantization`: int8 or int4, made now if the directory is not
    quantised itself. `device`: as torch names it, the accelerator by default. `kv_cache_gib`: memory for keys and
    values, by default see `default_budget`. `options` are those of `TorchEngine`.
    """
    if adapter is not None and (quantization or quantization_of(directory)):
        raise UserError("--adapter is merged into the weights and cannot be merged into quantised ones; use --lora")
    if quantization is not None:
        directory = cached(directory, quantization)
    place = chosen_device(device)
    weights = compute_dtype(dtype, place)
    try:
        if quantization_of(directory):
            model = load_quantized(directory, weights, device=place)
        else:
            model = load_weights(directory, dtype=weights, local_files_only=True)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{directory}: the model cannot be loaded: {_first_line(error)}") from None
    pairs = {name: _read_lora(model, name, path) for name, path in (loras or {}).items()}
    if adapter is not None:
        model = merge_adapter(model, adapter)
    rows, context = model.config.vocab_size, model.config.max_position_embeddings
    if rows < len(tokenizer):
        raise UserError(f"{directory}: the model has {rows} vocabulary rows, the tokenizer {len(tokenizer)} entries")
    if max_model_len is not None and not 1 < max_model_len <= context:
        raise UserError(f"--max_model_len {max_model_len}: must be from 2 to the model's context of {context} tokens")
    budget = default_budget(model, max_num_seqs, max_model_len or context, place)
    if kv_cache_gib is not None:
        budget = int(kv_cache_gib * 2**30)
    try:
        return TorchEngine(
            model.to(place),  # type: ignore[arg-type]  # transformers hides its signature
            model_name=model_name,
            adapters=pairs,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            budget=budget,
            vocab_limit=len(tokenizer),
            **options,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def default_budget(model: SmolForCausalLM, sequences: int, length: int, device: torch.device) -> int:
    """Bytes for keys and values: what so many sequences of such a length fill, but at most half of the free memory."""
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] - sum(p.nbytes for p in model.parameters() if p.device.type == "cpu")
    else:
        free = psutil.virtual_memory().available
    return min(cache_budget(token, sequences, length), free // 2)


def parse_loras(items: Sequence[str], model_name: str) -> dict[str, Path]:
    """`name=directory` of every --lora; `UserError` naming the one that is wrong."""
    loras: dict[str, Path] = {}
    for item in items:
        name, _, directory = item.partition("=")
        if not name or not directory:
            raise UserError(f"--lora {item}: must be name=directory")
        if name in loras or name == model_name:
            raise UserError(f"--lora {item}: the name {name} is taken already")
        if not (Path(directory) / "adapter_config.json").is_file():
            raise UserError(f"--lora {item}: not a PEFT adapter directory, adapter_config.json is missing")
        _require_safetensors(Path(directory))
        loras[name] = Path(directory)
    return loras


def _read_lora(model: SmolForCausalLM, name: str, directory: Path) -> dict[str, Any]:
    from smolkit.adapters import serving_pairs  # imports PEFT and the training rooms, and only adapters need them

    try:
        return serving_pairs(model.config, directory)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--lora {name}={directory}: it does not fit the model: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


# --- running ------------------------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, or `UserError` when the address cannot be had.

    Who connects before the server runs waits for it. A socket that is only bound would keep no second server away.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen()
    except (OSError, OverflowError) as error:
        sock.close()
        raise UserError(f"cannot listen on {host}:{port}: {error}; choose another --port (0: a free one)") from None
    return sock


def url_of(sock: socket.socket) -> str:
    """The URL under which clients on this machine reach a listening socket."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Protocol(H11Protocol):
    """uvicorn's, but a connection whose next request has not begun to be answered in time is closed.

    uvicorn's own clock runs only from an answer to the next byte: others could keep all connections busy with one. So
    could those that were answered before their request was whole, and never send the rest.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn narrows the argument
        super().connection_made(transport)
        self.header_deadline = self.loop.call_later(HEADER_SECONDS, self._close_without_header)

    def on_response_complete(self) -> None:
        self.header_deadline.cancel()
        self.header_deadline = self.loop.call_later(HEADER_SECONDS, self._close_without_header)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self.header_deadline.cancel()
        super().connection_lost(exc)

    def _close_without_header(self) -> None:
        if self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE:
            self.transport.close()


class _Server(uvicorn.Server):
    """Says when it is ready."""

    ready: threading.Event

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready.set()
            for sock in sockets or []:
                logger.info("serving at %s/v1 (documentation at %s/docs)", url_of(sock), url_of(sock))


def _server(app: FastAPI, drain_seconds: int, trusted_proxies: Sequence[str] = ()) -> _Server:
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=drain_seconds,
        server_header=False,
        proxy_headers=bool(trusted_proxies),  # uvicorn would believe whoever connects from this machine
        forwarded_allow_ips=list(trusted_proxies),
        http=_Protocol,  # h11 bounds the header it waits for, which httptools does not
        h11_max_incomplete_event_size=64 * 2**10,
    )
    server = _Server(config)
    server.ready = threading.Event()
    return server


def serve(app: FastAPI, sock: socket.socket, drain_seconds: int = 30, trusted_proxies: Sequence[str] = ()) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests finish for at most `drain_seconds`.

    `trusted_proxies`: addresses and networks whose X-Forwarded-For is believed.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn handles both while it runs and then delivers them again to the handler it found: to this
        # one, so that the process goes on to its orderly end instead of dying from the signal.
        signal.signal(number, lambda *_: None)
    _server(app, drain_seconds, trusted_proxies).run(sockets=[sock])


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve in a background thread on a free loopback port; gives the base URL without `/v1`."""
    sock = listen("127.0.0.1", 0)
    server = _server(app, drain_seconds=1)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="server", daemon=True)
    thread.start()
    try:
        while not server.ready.wait(0.1):
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
        yield url_of(sock)
    finally:
        server.should_exit = True
        thread.join()
        sock.close()
