"""Twice what a server can take: mixed sizes, readers that are slow or leave. The long run: `SMOLLM_LOAD_SECONDS=600`.

Checked: every greedy answer is the one the request gets alone, nobody waits for ever, what is too much is refused with
503 and Retry-After, memory stays flat, and afterwards nothing is left inside.
"""

import asyncio
import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from .conftest import TEXT, VLLM_FLAGS, started

SECONDS = float(os.environ.get("SMOLLM_LOAD_SECONDS", "10"))
CONCURRENT = 12  # HTTP requests that the server takes; twice as many clients ask
STUCK = 60.0  # seconds after which a request counts as stuck


def bodies() -> list[tuple[str, dict[str, Any]]]:
    """Greedy requests: short and long prompts and answers, chat and text, constrained and scored."""
    requests: list[tuple[str, dict[str, Any]]] = []
    for place, text in enumerate(TEXT):
        size = (4, 12, 30, 60, 120)[place]
        chat = {"messages": [{"role": "user", "content": text}], "max_tokens": size}
        requests.append(("/v1/chat/completions", chat))
        requests.append(("/v1/completions", {"prompt": text * (place + 1), "max_tokens": 124 // size, "n": 2}))
    digits = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": digits}}
    number = {"messages": [{"role": "user", "content": "n"}], "response_format": schema}
    requests.append(("/v1/chat/completions", number))
    requests.append(("/v1/completions", {"prompt": TEXT[0], "max_tokens": 0, "echo": True, "logprobs": 1}))
    return [(path, {**body, "temperature": 0}) for path, body in requests]


def texts_of(path: str, answer: dict[str, Any]) -> list[str]:
    chat = path.endswith("chat/completions")
    return [choice["message"]["content"] if chat else choice["text"] for choice in answer["choices"]]


@dataclass
class Outcome:
    counts: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, int]] = field(default_factory=list)  # seconds since the start, bytes
    slowest: float = 0.0


async def streamed(client: httpx.AsyncClient, path: str, body: dict[str, Any], generator: random.Random) -> Any:
    """The texts of a stream that is read to its end; "left" where the client goes away in between; or the refusal."""
    leave_after = generator.choice((None, None, 0, 1, 3))
    pause = generator.choice((0.0, 0.0, 0.05))
    texts: dict[int, str] = {}
    done = False
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        if response.status_code != 200:
            await response.aread()
            return response
        events = 0
        async for line in response.aiter_lines():
            if not line:
                continue
            if leave_after is not None and events >= leave_after:
                return "left"
            events += 1
            await asyncio.sleep(pause)
            if line == "data: [DONE]":
                done = True
                break
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                new = choice["delta"].get("content") if "delta" in choice else choice["text"]
                texts[choice["index"]] = texts.get(choice["index"], "") + (new or "")
    assert done, "a stream without its end"
    return [texts[index] for index in sorted(texts)]


async def client_loop(
    url: str, alone: list[tuple[str, dict[str, Any], list[str]]], end: float, seed: int, outcome: Outcome
) -> None:
    generator = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=STUCK) as client:
        while time.monotonic() < end:
            path, body, expected = generator.choice(alone)
            before = time.monotonic()
            if generator.random() < 0.6:
                result = await streamed(client, path, body, generator)
            else:
                result = await client.post(path, json=body)
                if result.status_code == 200:
                    result = texts_of(path, result.json())
            outcome.slowest = max(outcome.slowest, time.monotonic() - before)
            if isinstance(result, httpx.Response):
                assert result.status_code == 503 and result.headers["retry-after"] == "1", result.text
                assert result.json()["error"]["code"] == "overloaded"
                outcome.counts["refused"] += 1
                await asyncio.sleep(0.1 * generator.random())
            elif result == "left":
                outcome.counts["left"] += 1
            else:
                assert result == expected, (path, body)
                outcome.counts["right"] += 1


async def under_load(url: str, alone: Any, process: psutil.Process) -> Outcome:
    outcome, start = Outcome(), time.monotonic()
    end = start + SECONDS

    async def watch() -> None:
        while time.monotonic() < end:
            family = [process, *process.children(recursive=True)]
            outcome.memory.append((time.monotonic() - start, sum(member.memory_info().rss for member in family)))
            await asyncio.sleep(min(1.0, SECONDS / 40))

    clients = [client_loop(url, alone, end, seed, outcome) for seed in range(2 * CONCURRENT)]
    await asyncio.gather(watch(), *clients)
    return outcome


def left_inside(url: str) -> dict[str, float]:
    """Gauges of what is being worked on; this request is one of them."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    gauges = {sample.name: sample.value for family in families for sample in family.samples if family.type == "gauge"}
    names = ("smollm_requests_in_flight", "smollm_engine_num_running", "smollm_engine_num_waiting",
             "vllm:num_requests_running", "vllm:num_requests_waiting")  # fmt: skip
    return {name: gauges[name] for name in names if name in gauges}


@pytest.fixture(scope="module", params=["torch", pytest.param("vllm", marks=pytest.mark.slow)])
def loaded(request: pytest.FixtureRequest, checkpoint: Path, root: Path, tmp_path_factory: Any) -> Iterator[Any]:
    limits = ("--max_concurrent_requests", CONCURRENT, "--access_log", tmp_path_factory.mktemp("load") / "access.jsonl")
    if request.param == "vllm":
        request.getfixturevalue("vllm_python")
        command = ("serve_vllm.py", "--model_path", checkpoint, *VLLM_FLAGS, *limits)
    else:
        flags = ("--dtype", "fp32", "--max_num_seqs", 4, "--max_queue", 12, "--served_model_name", "tiny")
        command = ("serve_hf.py", "--model_path", checkpoint, *flags, *limits)
    with started(root, *command) as (url, process):
        yield url, psutil.Process(process.pid)


def test_twice_the_capacity(loaded: Any, capsys: pytest.CaptureFixture) -> None:
    url, process = loaded
    with httpx.Client(base_url=url, timeout=STUCK) as client:

        def ask(path: str, body: dict[str, Any]) -> list[str]:
            return texts_of(path, client.post(path, json=body).raise_for_status().json())

        alone = [(path, body, ask(path, body)) for path, body in bodies()]
        outcome = asyncio.run(under_load(url, alone, process))
        assert [ask(path, body) for path, body, _ in alone] == [expected for _, _, expected in alone]
    deadline = time.monotonic() + 20
    while sum(left_inside(url).values()) > 1 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert sum(left_inside(url).values()) == 1, left_inside(url)
    counts = outcome.counts
    assert counts["right"] and counts["left"] and counts["refused"]
    # The first half fills pools and caches.
    early = statistics.median(size for when, size in outcome.memory if SECONDS / 2 <= when < SECONDS * 0.7)
    late = statistics.median(size for when, size in outcome.memory if when >= SECONDS * 0.8)
    with capsys.disabled():
        print(f"\n{SECONDS:g} s: {dict(counts)}, slowest {outcome.slowest:.2f} s, "
              f"memory {early / 2**20:.0f} -> {late / 2**20:.0f} MiB")  # fmt: skip
    assert abs(late - early) <= 0.05 * early
