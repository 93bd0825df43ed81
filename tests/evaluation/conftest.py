"""A toy tokenizer, model and checkpoint for all tests of the evaluation, and two servers of it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fastapi import FastAPI, Request
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smolkit.chat import add_chat_tokens, save_tokenizer
from smolkit.openai_api import create_app
from smolkit.serving import load_engine, serving

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Lund", "days": 3}}\n</tool_call>'


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["The job of Ada is baker. 你好，世界。", CALL] * 5
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    add_chat_tokens(fast)
    return fast


def llama(vocab_size: int, **overrides: object) -> LlamaForCausalLM:
    """A small model with random weights, large enough ones that its answers differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        **overrides,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """`make_llama(vocab_size, **config)`."""
    return llama


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return llama(len(tokenizer))


@pytest.fixture(scope="session")
def checkpoint(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("models") / "toy"
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    return directory


@pytest.fixture(scope="session")
def ours(checkpoint: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """The URL of our own server over the toy checkpoint, which wants a key."""
    engine = load_engine(checkpoint, tokenizer, model_name="toy", dtype="fp32")
    try:
        with serving(create_app(engine, tokenizer, "toy", "secret")) as url:
            yield url
    finally:
        engine.close()


@pytest.fixture(scope="session")
def plain(model: LlamaForCausalLM) -> Iterator[str]:
    """The URL of a server that scores prompts as OpenAI's completions API describes it, over transformers."""
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> dict:
        return {"object": "list", "data": [{"id": "toy", "object": "model", "created": 0, "owned_by": "x"}]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> dict:
        body = await request.json()
        assert body["echo"] is True and body["max_tokens"] == 1
        choices = []
        for index, ids in enumerate(body["prompt"]):
            with torch.no_grad():
                scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            given = [None, *(scores[i, token].item() for i, token in enumerate(ids[1:])), scores[-1].max().item()]
            best = [None, *({"": score} for score in scores.max(-1).values.tolist())]
            logprobs = {"token_logprobs": given, "tokens": [""] * len(given), "text_offset": [], "top_logprobs": best}
            choices.append({"index": index, "text": "", "finish_reason": "length", "logprobs": logprobs})
        return {"id": "1", "object": "text_completion", "created": 0, "model": "toy", "choices": choices[::-1]}

    with serving(app) as url:
        yield url
