"""vLLM's serving benchmark (`vllm bench serve`) as a client under load: every answer arrives, with the right counts."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedTokenizerFast

from smolkit.chat import encode_text, render

from .conftest import TEXT, VLLM_FLAGS, started

pytestmark = pytest.mark.slow
ANSWER = 12  # tokens
# From Python: under the CPU build's distribution vLLM's own command does not start.
PROGRAM = """
import json, sys
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
result = main(parser.parse_args(sys.argv[1:]))
names = ("completed", "failed", "errors", "input_lens", "output_lens")
print("RESULT", json.dumps({name: result[name] for name in names}))
"""
SERVERS = {
    "serve_hf.py": ("--dtype", "fp32", "--max_num_seqs", 4, "--served_model_name", "tiny"),
    "serve_vllm.py": VLLM_FLAGS,
}


@pytest.fixture(scope="module", params=SERVERS)
def url(request: pytest.FixtureRequest, root: Path, checkpoint: Path, vllm_python: str) -> Iterator[str]:
    """The script as a person starts it."""
    with started(root, request.param, "--model_path", checkpoint, *SERVERS[request.param]) as (base, _):
        yield base


def counted(url: str) -> tuple[float, float]:
    """Tokens read and generated, by the server's own books."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    values = {sample.name: sample.value for family in families for sample in family.samples}
    return values["smollm_prompt_tokens_total"], values["smollm_completion_tokens_total"]


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_every_request_succeeds(
    url: str,
    backend: str,
    root: Path,
    checkpoint: Path,
    tokenizer: PreTrainedTokenizerFast,
    vllm_python: str,
    tmp_path: Path,
) -> None:
    texts = [text[:length] for text in TEXT for length in (3, 12, 24, 60)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    chat = backend == "openai-chat"
    flags = {
        "--backend": backend, "--endpoint": "/v1/chat/completions" if chat else "/v1/completions", "--base-url": url,
        "--model": "tiny", "--tokenizer": checkpoint, "--dataset-name": "custom", "--num-prompts": len(texts),
        "--dataset-path": tmp_path / "prompts.jsonl", "--custom-output-len": ANSWER, "--max-concurrency": 8,
    }  # fmt: skip
    command = [vllm_python, "-c", PROGRAM, *(str(word) for pair in flags.items() for word in pair)]
    command += ["--skip-chat-template", "--ignore-eos", "--disable-tqdm", "--save-detailed"]
    before = counted(url)
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("RESULT "))
    result = json.loads(line.removeprefix("RESULT "))
    assert (result["completed"], result["failed"]) == (len(texts), 0), result["errors"]
    assert result["output_lens"] == [ANSWER] * len(texts)
    prompts = [
        render(tokenizer, [{"role": "user", "content": text}], None, True).input_ids
        if chat
        else encode_text(tokenizer, text)
        for text in texts
    ]
    assert sorted(result["input_lens"]) == sorted(map(len, prompts))
    read, generated = (after - earlier for after, earlier in zip(counted(url), before, strict=True))
    assert (read, generated) == (sum(map(len, prompts)), ANSWER * len(texts))
