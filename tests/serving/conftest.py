"""A tiny random checkpoint with a tokenizer of its own, and servers over it."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from smol_config import SmolConfig
from smol_model import SmolForCausalLM
from smolkit.chat import add_chat_tokens, chat_stop_ids, encode_text, save_tokenizer
from smolkit.engine import GenerationRequest, TokenEvent, TorchEngine
from smolkit.openai_api import create_app
from smolkit.serving import serving

TEXT = [
    "The process of photosynthesis involves light, water and carbon dioxide.",
    "What is photosynthesis? You are a helpful assistant.",
    "光合作用需要光、水和二氧化碳。植物在白天进行光合作用。",
    '{"name": "get_weather", "arguments": {"city": "Paris"}}',
    "Emoji take four bytes: 😀 🚀 and 🌍 among them; café and naïve take two.",
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
# Without the memory flag vLLM takes nearly all memory of the machine, and refuses to start where others use some.
VLLM_FLAGS = (
    "--served_model_name", "tiny", "--dtype", "float32", "--max_num_seqs", "4", "--enforce_eager",
    "--gpu_memory_utilization", "0.1",
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are slower with more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of a few hundred entries, with the chat tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    add_chat_tokens(tokenizer)
    return tokenizer


@pytest.fixture(scope="session")
def sentencepiece() -> PreTrainedTokenizerFast:
    """BPE as Llama 2, TinyLlama and Mixtral have it: spaces are `▁`, characters it does not know are `<0xE5>`, ...."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator([text for text in TEXT if text.isascii()], trainers.BpeTrainer(vocab_size=200))
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(pair) for pair in model["merges"]]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    template = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def tiny_config(vocab_size: int, **overrides: object) -> SmolConfig:
    """Weights large enough that a random model's answers vary."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    # vLLM's CPU attention wants a head size of at least 32.
    rest = dict(num_key_value_heads=2, head_dim=32, max_position_embeddings=512, initializer_range=0.4)
    return SmolConfig(vocab_size=vocab_size, **{**sizes, **rest, **overrides})


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> SmolForCausalLM:
    """Random, with 40 vocabulary rows more than the tokenizer knows."""
    torch.manual_seed(0)
    return SmolForCausalLM(tiny_config(len(tokenizer) + 40)).eval()


@pytest.fixture(scope="session")
def checkpoint(
    model: SmolForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint directory as a training stage writes it."""
    directory = tmp_path_factory.mktemp("serving") / "tiny-checkpoint"
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    generation = {"eos_token_id": chat_stop_ids(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@contextmanager
def started(root: Path, *arguments: object) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server process on a free port; gives the URL it prints."""
    # vLLM may live in an environment of its own, without the test tools.
    python = os.environ.get("SMOLLM_VLLM_PYTHON") if arguments[0] == "serve_vllm.py" else None
    command = [python or sys.executable, str(root / str(arguments[0])), *map(str, arguments[1:]), "--port", "0"]
    # A file, not a pipe: a pipe that nobody reads any more would block the server when it is full.
    with tempfile.NamedTemporaryFile("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stderr=log, cwd=root, env=environment)
        try:
            text, deadline = "", time.monotonic() + 300
            while not (found := re.search(r"serving at (http://\S+)/v1", text)):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"the server did not start:\n{text}")
                time.sleep(0.1)
                text = Path(log.name).read_text()
            yield found[1], process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class ScriptedEngine:
    """An engine that answers with given token ids, so that the text side can be tested with known answers."""

    model_name, max_model_len, adapters = "scripted", 10_000, ()

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.reply: list[int] = []
        self.requests: list[GenerationRequest] = []

    def will_say(self, text: str, end: bool = True) -> None:
        """Tool tags become their tokens, as a model would write them."""
        self.reply = self.tokenizer.encode(text, add_special_tokens=False)
        if end:
            self.reply.append(self.tokenizer.eos_token_id)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        self.requests.append(request)
        reply = self.reply[: request.max_tokens]
        for number, token_id in enumerate(reply):
            finish = "length" if number == len(reply) - 1 else None
            finish = "stop" if token_id in request.stop_ids else finish
            yield TokenEvent(token_id, finish_reason=finish)
            if finish:
                return


@pytest.fixture
def scripted(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[ScriptedEngine, openai.OpenAI]]:
    """A server whose answers the test chooses, and a client of it."""
    engine = ScriptedEngine(tokenizer)
    with serving(create_app(engine, tokenizer, "scripted")) as url:
        yield engine, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session", params=["torch", pytest.param("vllm", marks=pytest.mark.slow)])
def url(
    request: pytest.FixtureRequest,
    model: SmolForCausalLM,
    checkpoint: Path,
    tokenizer: PreTrainedTokenizerFast,
    root: Path,
) -> Iterator[str]:
    """A real server over the tiny model on a free loopback port: one suite for both engines."""
    if request.param == "vllm":
        request.getfixturevalue("vllm_python")
        with started(root, "serve_vllm.py", "--model_path", checkpoint, *VLLM_FLAGS) as (base, _):
            yield base
        return
    engine = TorchEngine(model, model_name="tiny", vocab_limit=len(tokenizer), max_num_seqs=4)
    with serving(create_app(engine, tokenizer, "tiny")) as base:
        yield base
    engine.close()


@pytest.fixture(scope="session")
def moe(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory of a Mixture-of-Experts, without padded vocabulary rows."""
    torch.manual_seed(4)
    config = tiny_config(len(tokenizer), num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    directory = tmp_path_factory.mktemp("moe") / "tiny-moe"
    SmolForCausalLM(config).eval().save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    return directory


@pytest.fixture(scope="session", params=["torch", pytest.param("vllm", marks=pytest.mark.slow)])
def moe_url(
    request: pytest.FixtureRequest, moe: Path, tokenizer: PreTrainedTokenizerFast, root: Path
) -> Iterator[str]:
    """A real server over it, under the name of `tiny`."""
    if request.param == "vllm":
        request.getfixturevalue("vllm_python")
        with started(root, "serve_vllm.py", "--model_path", moe, *VLLM_FLAGS) as (base, _):
            yield base
        return
    engine = TorchEngine(SmolForCausalLM.from_pretrained(moe, dtype=torch.float32), model_name="tiny")
    with serving(create_app(engine, tokenizer, "tiny")) as base:
        yield base
    engine.close()


@pytest.fixture(scope="session")
def client(url: str) -> openai.OpenAI:
    """The real client of that server."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def greedy(model: SmolForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Callable[[list[int], int], list[int]]:
    """`greedy(prompt_ids, max_new_tokens)` by transformers' generate, padded vocabulary rows suppressed."""

    def generate(prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        output = model.generate(
            torch.tensor([prompt_ids]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=chat_stop_ids(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=list(range(len(tokenizer), model.config.vocab_size)),
        )
        return output[0, len(prompt_ids) :].tolist()

    return generate


@pytest.fixture(scope="session")
def prompts(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of prompts of different lengths."""
    texts = [text[:length] for text in TEXT for length in (3, 12, 60)]
    return [encode_text(tokenizer, text) for text in texts]
