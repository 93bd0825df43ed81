"""The `Engine` protocol over vLLM's `AsyncLLM`: token ids in, token events out.

vLLM never sees text: rendering, detokenising, stop strings and tool calls stay in `smolkit.openai_api`, so both
servers answer alike.
"""

import json
import os
import signal
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import get_args

from vllm import SamplingParams, TokensPrompt
from vllm.config import StructuredOutputsConfig
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.logprobs import Logprob
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from smolkit.cache import cache_budget
from smolkit.engine import EngineError
from smolkit.errors import UserError
from smolkit.sampling import GenerationRequest, Scores, TokenEvent

SPARE = 20  # alternatives asked for beyond those wanted, in the place of padded rows, which are no tokens


def engine_args(arguments: Sequence[str]) -> AsyncEngineArgs:
    """vLLM's engine arguments from its own flags; underscores and dashes are the same to its parser."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="serve_vllm.py (vLLM's engine arguments)"))
    # Grammars are llguidance's, see smolkit.grammar. By itself vLLM would also read pickled weights.
    guidance = StructuredOutputsConfig(backend="guidance")
    parser.set_defaults(structured_outputs_config=guidance, load_format="safetensors", max_logprobs=20 + SPARE)
    if current_platform.is_cpu():
        parser.set_defaults(worker_cls="smolkit.vllm_cpu.Worker", gpu_memory_utilization=None)
    return AsyncEngineArgs.from_cli_args(parser.parse_args(list(arguments)))


def _bound_memory(args: AsyncEngineArgs) -> None:
    """On CPUs keys and values take what serve_hf.py gives them: vLLM would take 92 % of all memory, or refuse."""
    if args.gpu_memory_utilization is not None:
        return
    args.gpu_memory_utilization = AsyncEngineArgs.gpu_memory_utilization
    if args.kv_cache_memory_bytes is not None or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return
    model = args.create_model_config()
    heads = model.get_total_num_kv_heads() * model.get_head_size()
    token = 2 * model.get_total_num_hidden_layers() * heads * model.dtype.itemsize
    wanted = cache_budget(token, args.max_num_seqs or 16, model.max_model_len)
    free = min(get_memory_node_info(node).available_memory for node in get_visible_memory_node())
    workers = args.tensor_parallel_size * args.pipeline_parallel_size * args.data_parallel_size
    args.kv_cache_memory_bytes = min(wanted, free // 2) // workers


def lora_flags(directories: Sequence[Path]) -> list[str]:
    """vLLM's flags for serving these adapters: all of them at once, up to the largest rank."""
    if not directories:
        return []
    rank = 0
    for directory in directories:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        rank = max(rank, config["r"], *config.get("rank_pattern", {}).values())
    allowed = sorted(get_args(MaxLoRARanks))
    if rank > allowed[-1]:
        raise UserError(f"vLLM serves adapters up to rank {allowed[-1]}, and {rank} is wanted; merge it")
    most = next(size for size in allowed if size >= rank)
    return ["--enable-lora", "--max-loras", str(len(directories)), "--max-lora-rank", str(most)]


class VllmEngine:
    """vLLM as an `Engine`.

    `vocab_limit` keeps padded vocabulary rows from being sampled. `loras`: adapter directories by name; `own`: the
    adapter that answers when a request names none.
    """

    def __init__(
        self,
        args: AsyncEngineArgs,
        *,
        model_name: str,
        vocab_limit: int,
        loras: Mapping[str, Path] | None = None,
        own: Path | None = None,
    ) -> None:
        try:
            _bound_memory(args)
            self._llm = AsyncLLM.from_engine_args(args)
        except (OSError, RuntimeError, ValueError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            reason = lines[1] if "validation error" in lines[0] and len(lines) > 2 else lines[0]
            raise UserError(f"vLLM cannot serve {args.model}: {reason[:500]}") from None
        self.dead = False
        self._name = model_name
        named: list[tuple[str | None, Path | None]] = [(None, own), *(loras or {}).items()]
        self._loras = {
            name: LoRARequest(name or model_name, number, str(path))
            for number, (name, path) in enumerate(named, start=1)
            if path is not None
        }
        self._vocab_limit = vocab_limit
        rows = self._llm.model_config.get_vocab_size()
        self._allowed = list(range(vocab_limit)) if vocab_limit < rows else None
        self._spare, self._most = min(rows - vocab_limit, SPARE), self._llm.model_config.max_logprobs

    @property
    def model_name(self) -> str:
        return self._name

    @property
    def adapters(self) -> Sequence[str]:
        """Names of the LoRA adapters."""
        return [name for name in self._loras if name is not None]

    @property
    def max_model_len(self) -> int:
        return self._llm.model_config.max_model_len

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent]:
        """Yield the tokens of one request; vLLM queues without limit, so this is never busy."""
        prompt = TokensPrompt(prompt_token_ids=list(request.prompt_ids))
        lora = self._loras.get(request.adapter)
        outputs = self._llm.generate(prompt, self._sampling_params(request), uuid.uuid4().hex, lora_request=lora)
        try:
            async with aclosing(outputs):  # closing early makes vLLM abort the request
                async for output in outputs:
                    for event in _events(output, request, self._vocab_limit):
                        yield event
        except EngineGenerateError as error:
            raise EngineError("generation failed") from error
        except EngineDeadError as error:
            if not self.dead:  # nothing brings it back: whoever runs the server has to see that, as with vLLM's own
                self.dead = True
                signal.raise_signal(signal.SIGTERM)
            raise EngineError("generation failed") from error

    def _asked(self, count: int | None) -> int | None:
        """How many of the most likely rows hold `count` tokens, as far as vLLM gives so many (-1: it has no limit)."""
        if not count or not self._spare:
            return count
        return count + self._spare if self._most < 0 else max(count, min(count + self._spare, self._most))

    def _sampling_params(self, request: GenerationRequest) -> SamplingParams:
        grammar = request.grammar and StructuredOutputsParams(grammar=request.grammar.text)
        return SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=min(request.top_k, self._vocab_limit),  # vLLM keeps it in 32 bits
            min_p=request.min_p,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=request.repetition_penalty,
            logit_bias=dict(request.logit_bias) or None,
            stop_token_ids=list(request.stop_ids),
            seed=None if request.seed is None else request.seed % 2**63,  # to vLLM -1 is none
            logprobs=self._asked(request.logprobs),
            prompt_logprobs=self._asked(request.prompt_logprobs),
            min_tokens=request.min_tokens,
            ignore_eos=not request.stop_ids,  # or vLLM adds the end of text that the model's files name
            structured_outputs=grammar,
            allowed_token_ids=self._allowed,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def close(self) -> None:
        """Stop vLLM's processes."""
        self._llm.shutdown()


def _events(result: RequestOutput, request: GenerationRequest, vocab_limit: int) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    output = result.outputs[0]
    if output.finish_reason not in (None, "stop", "length"):  # aborted, perhaps without a last token
        raise EngineError(f"generation ended early: {output.finish_reason}")
    prompt = None
    if request.prompt_logprobs is not None and result.prompt_logprobs:  # once, with the first token
        pairs = zip(request.prompt_ids, result.prompt_logprobs, strict=True)
        prompt = tuple(_scores(entries, token_id, request.prompt_logprobs, vocab_limit) for token_id, entries in pairs)
    token_ids = list(output.token_ids)
    for number, token_id in enumerate(token_ids):
        finish = output.finish_reason if number == len(token_ids) - 1 else None
        scores: Scores = (None, ())
        if output.logprobs is not None and request.logprobs is not None:
            scores = _scores(output.logprobs[number], token_id, request.logprobs, vocab_limit)
        events.append(TokenEvent(token_id, *scores, finish, None if events else prompt))
    return events


def _scores(entries: dict[int, Logprob] | None, token_id: int, count: int, vocab_limit: int) -> Scores:
    """vLLM gives the chosen token beside the most likely rows, and nothing for the first token of a prompt.

    Rows from `vocab_limit` on are padding. Where many of them are likely, fewer than `count` tokens may be left.
    """
    if not entries:
        return None, ()
    best = sorted(entries.items(), key=lambda item: item[1].rank)
    best = [(i, entry) for i, entry in best[: max(count, len(best) - 1)] if i < vocab_limit][:count]
    return entries[token_id].logprob, tuple((i, entry.logprob) for i, entry in best)
