"""A toy tokenizer, model and checkpoint for all tests of the evaluation."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smolkit.chat import add_chat_tokens, save_tokenizer

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
