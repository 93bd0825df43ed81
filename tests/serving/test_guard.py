"""What stands before the routes: keys, limits, ids, metrics, the log; and a server that is told to stop."""

import asyncio
import json
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedTokenizerFast

from smolkit.errors import UserError
from smolkit.http_guard import Limits, RateLimit
from smolkit.openai_api import create_app
from smolkit.sampling import TokenEvent
from smolkit.serving import _server, add_server_arguments, api_keys, app_options, listen, serving, url_of

from .conftest import ScriptedEngine, started

QUESTION = [{"role": "user", "content": "What is photosynthesis?"}]
BODY = {"messages": QUESTION, "max_tokens": 4}


class SlowEngine(ScriptedEngine):
    """A token every `pause` seconds, for ever."""

    pause = 0.02
    open = 0

    async def generate(self, request: Any) -> Any:
        self.open += 1
        try:
            for number in range(request.max_tokens):
                await asyncio.sleep(self.pause)
                yield TokenEvent(self.reply[0], finish_reason="length" if number + 1 == request.max_tokens else None)
        finally:
            self.open -= 1


@pytest.fixture
def slow(tokenizer: PreTrainedTokenizerFast) -> SlowEngine:
    engine = SlowEngine(tokenizer)
    engine.will_say("a")
    return engine


@pytest.fixture
def talker(tokenizer: PreTrainedTokenizerFast) -> ScriptedEngine:
    engine = ScriptedEngine(tokenizer)
    engine.will_say("some words")
    return engine


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return body["error"]


def ask(url: str, **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=BODY, headers=headers)


# --- keys ---------------------------------------------------------------------------------------------------


def test_every_route_but_health_needs_a_key(talker: ScriptedEngine, tokenizer: PreTrainedTokenizerFast) -> None:
    """All routes that the application has, found in itself."""
    app = create_app(talker, tokenizer, "scripted", ["first", "second"])
    routes = {(method, route.path) for route in app.routes for method in getattr(route, "methods", ["GET"])}
    assert {("POST", "/tokenize"), ("GET", "/metrics"), ("GET", "/docs"), ("GET", "/openapi.json")} <= routes
    with serving(app) as url:
        for method, path in sorted(routes):
            place = url + path.replace("{model:path}", "scripted")
            response = httpx.request(method, place, json=BODY if method == "POST" else None)
            if path == "/health":
                assert response.status_code in (200, 405)
                continue
            assert response.status_code == 401, (method, path)
            if method != "HEAD":
                assert error_of(response)["code"] == "invalid_api_key"
            for key in ("first", "second"):
                right = {"Authorization": f"Bearer {key}"}
                assert httpx.request(method, place, headers=right).status_code != 401
        for given in ("first", "Basic first", "Bearer", "Bearer x first", "bearer first", "Bearer first,second"):
            assert ask(url, Authorization=given).status_code == 401
        assert httpx.get(f"{url}/v1/models?api_key=first").status_code == 401
        secret = ask(url, Authorization="Bearer my-secret-key")
        assert "my-secret-key" not in secret.text


def test_where_keys_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMOLLM_API_KEY", raising=False)
    assert api_keys(None, None) == []
    file = tmp_path / "keys"
    file.write_text("one\n\n  two \n")
    assert api_keys(None, str(file)) == ["one", "two"] and api_keys("zero", str(file)) == ["zero", "one", "two"]
    monkeypatch.setenv("SMOLLM_API_KEY", "from-environment")
    assert api_keys(None, None) == ["from-environment"] and api_keys("given", None) == ["given"]
    # A key that was meant but is not there must not open the server to everybody.
    monkeypatch.setenv("SMOLLM_API_KEY", "")
    with pytest.raises(UserError, match="empty"):
        api_keys(None, None)
    monkeypatch.delenv("SMOLLM_API_KEY")
    file.write_text("\n")
    with pytest.raises(UserError, match="empty"):
        api_keys(None, str(file))
    with pytest.raises(UserError, match="nowhere"):
        api_keys(None, str(tmp_path / "nowhere"))


def test_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    for name, value in (("propagate", True), ("handlers", [])):  # put back afterwards
        monkeypatch.setattr(logging.getLogger("smolkit.access"), name, value)

    parser = argparse.ArgumentParser()
    add_server_arguments(parser)
    log = str(tmp_path / "access.jsonl")
    args = parser.parse_args(["--requests_per_minute", "30", "--max_body_bytes", "1000", "--access_log", log])
    assert args.host == "127.0.0.1" and args.port == 8000 and args.cors_origins == []
    options = app_options(args)
    assert options["limits"] == Limits(max_body_bytes=1000, requests_per_minute=30)
    for flag in ("--max_body_bytes", "--requests_per_minute", "--request_timeout", "--max_concurrent_requests"):
        with pytest.raises(UserError, match=flag):
            app_options(parser.parse_args([flag, "0", "--access_log", log]))
    for flag, value in (("--default_max_tokens", "-5"), ("--drain_seconds", "-1")):
        with pytest.raises(UserError, match=f"{flag} {value}: must be"):
            app_options(parser.parse_args([flag, value, "--access_log", log]))
    assert args.trusted_proxies == []
    for wrong in ("everybody", "*", "10.0.0.1/8"):
        with pytest.raises(UserError, match="--trusted_proxies .*give addresses"):
            app_options(parser.parse_args(["--trusted_proxies", "127.0.0.1", wrong, "--access_log", log]))
    app_options(parser.parse_args(["--trusted_proxies", "::1", "10.0.0.0/8", "--access_log", log]))
    nowhere = str(tmp_path / "nowhere" / "log")
    with pytest.raises(UserError, match=f"--access_log {nowhere}: cannot be written: No such file"):
        app_options(parser.parse_args(["--access_log", nowhere]))


# --- limits -------------------------------------------------------------------------------------------------


def test_rate_limit_by_hand() -> None:
    limit = RateLimit(60)  # one a second, sixty at once
    assert [limit.wait("a", 0.0) for _ in range(60)] == [0.0] * 60
    assert limit.wait("a", 0.0) == pytest.approx(1.0) and limit.wait("b", 0.0) == 0.0
    assert limit.wait("a", 0.5) == pytest.approx(0.5) and limit.wait("a", 1.0) == 0.0
    assert limit.wait("a", 1.0) == pytest.approx(1.0)
    assert [limit.wait("a", 1000.0) for _ in range(61)].count(0.0) == 60  # never more than sixty are saved up
    for client in range(30_000):
        limit.wait(str(client), 2000.0)
    assert len(limit._left) <= 10_000


def test_rate_limit(talker: ScriptedEngine, tokenizer: PreTrainedTokenizerFast) -> None:
    app = create_app(talker, tokenizer, "scripted", ["one", "two"], limits=Limits(requests_per_minute=3))
    with serving(app) as url:
        assert [ask(url, Authorization="Bearer one").status_code for _ in range(4)] == [200, 200, 200, 429]
        refused = ask(url, Authorization="Bearer one")
        assert error_of(refused)["code"] == "rate_limit_exceeded" and 1 <= int(refused.headers["retry-after"]) <= 20
        with pytest.raises(openai.RateLimitError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="one", max_retries=0).models.list()
        assert ask(url, Authorization="Bearer two").status_code == 200
        assert [ask(url, Authorization="Bearer guess").status_code for _ in range(4)] == [401, 401, 401, 429]
        assert all(httpx.get(f"{url}/health").status_code == 200 for _ in range(5))


def test_body_and_header_limits(talker: ScriptedEngine, tokenizer: PreTrainedTokenizerFast) -> None:
    limits = Limits(max_body_bytes=2000, max_header_bytes=4000)
    with serving(create_app(talker, tokenizer, "scripted", limits=limits)) as url:
        big = {"messages": [{"role": "user", "content": "x" * 2000}]}
        response = httpx.post(f"{url}/v1/chat/completions", json=big)
        assert response.status_code == 413 and "2000" in error_of(response)["message"]
        response = httpx.get(f"{url}/v1/models", headers={"x-long": "y" * 5000})
        assert response.status_code == 431 and "4000" in error_of(response)["message"]
        # A header without end is cut off by the server itself.
        with socket.create_connection(("127.0.0.1", httpx.URL(url).port), timeout=20) as raw:
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nA: ")
            received, sent = b"", 0
            try:
                while sent < 10 * 2**20:
                    sent += raw.send(b"z" * 2**14)
                received = raw.recv(100)
            except ConnectionError:
                pass
            assert sent < 10 * 2**20 or received.startswith(b"HTTP/1.1 400")
        assert ask(url).status_code == 200


def test_concurrency_limit(slow: SlowEngine, tokenizer: PreTrainedTokenizerFast) -> None:
    app = create_app(slow, tokenizer, "slow", limits=Limits(max_concurrent_requests=2))
    with serving(app) as url:
        statuses: list[tuple[int, str | None]] = []

        def one() -> None:
            body = {**BODY, "max_tokens": 40}
            response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)
            statuses.append((response.status_code, response.headers.get("retry-after")))

        threads = [threading.Thread(target=one) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(statuses, key=str) == [(200, None)] * 2 + [(503, "1")] * 4
        assert ask(url).status_code == 200


def test_a_connection_without_a_request_is_closed(
    slow: SlowEngine, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that has begun a header, and one that was answered before; never one that waits for its answer."""
    monkeypatch.setattr("smolkit.serving.HEADER_SECONDS", 0.3)
    with serving(create_app(slow, tokenizer, "slow")) as url:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        for sent in (b"", b"G", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" + b"GET /hea"):
            with socket.create_connection(address, timeout=20) as connection:
                connection.sendall(sent)
                received = b""
                while part := connection.recv(4096):
                    received += part
                assert received.count(b"200 OK") == (len(sent) > 1)
        with httpx.Client() as client:
            for _ in range(2):  # on one connection, each longer than that
                answer = client.post(f"{url}/v1/chat/completions", json={**BODY, "max_tokens": 40}, timeout=30)
                assert answer.status_code == 200


@pytest.mark.parametrize(("line", "status"), [("POST /v1/models", b"401"), ("GET /health", b"200")])
def test_a_connection_whose_request_never_ends_is_closed(
    talker: ScriptedEngine,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    status: bytes,
) -> None:
    """It was answered before its body was there; another byte of that is no next request."""
    monkeypatch.setattr("smolkit.serving.HEADER_SECONDS", 0.3)
    with serving(create_app(talker, tokenizer, "scripted", "secret")) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as connection:
            connection.sendall(f"{line} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n".encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 " + status)
            connection.sendall(b"{")
            while connection.recv(4096):
                pass


def test_who_asks_is_told_by_trusted_proxies_only(
    talker: ScriptedEngine, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever is on this machine could else count for anybody in the rate limit, and in the log."""
    caplog.set_level(logging.INFO, logger="smolkit.access")

    def statuses(*trusted: str) -> list[int]:
        app = create_app(talker, tokenizer, "scripted", "secret", limits=Limits(requests_per_minute=3))
        sock = listen("127.0.0.1", 0)
        server = _server(app, 1, trusted)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            assert server.ready.wait(30)
            wrong = [{"authorization": "Bearer guess", "x-forwarded-for": f"203.0.113.{number}"} for number in range(5)]
            return [httpx.get(f"{url_of(sock)}/v1/models", headers=headers).status_code for headers in wrong]
        finally:
            server.should_exit = True
            thread.join()
            sock.close()

    assert statuses() == statuses("203.0.113.77") == [401, 401, 401, 429, 429]
    assert "203.0.113." not in caplog.text
    assert statuses("127.0.0.0/8") == [401] * 5 and '"client": "203.0.113.4"' in caplog.text


def test_deadline(slow: SlowEngine, tokenizer: PreTrainedTokenizerFast) -> None:
    app = create_app(slow, tokenizer, "slow", limits=Limits(request_timeout=0.5))
    with serving(app) as url:
        body = {**BODY, "max_tokens": 1000}
        before = time.monotonic()
        response = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert response.status_code == 503 and error_of(response)["code"] == "timeout"
        assert "0.5 seconds" in error_of(response)["message"] and time.monotonic() - before < 10
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="0.5 seconds"):
            list(client.chat.completions.create(model="slow", messages=QUESTION, stream=True))
        for _ in range(100):
            if not slow.open:
                break
            time.sleep(0.05)
        assert slow.open == 0, "the engine was told to stop"


# --- ids, log, metrics, other origins -----------------------------------------------------------------------


def test_request_ids(talker: ScriptedEngine, tokenizer: PreTrainedTokenizerFast) -> None:
    with serving(create_app(talker, tokenizer, "scripted")) as url:
        assert ask(url, **{"x-request-id": "trace-7.a_B"}).headers["x-request-id"] == "trace-7.a_B"
        for bad in ("", "two words", "x" * 129, 'a"b', "é"):
            given = httpx.get(f"{url}/health", headers={"x-request-id": bad.encode("latin-1")}).headers["x-request-id"]
            assert given != bad and given.isalnum() and len(given) == 32
        assert httpx.get(f"{url}/nowhere").headers["x-request-id"]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        assert client.chat.completions.create(model="scripted", messages=QUESTION)._request_id


def test_access_log(
    talker: ScriptedEngine, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="smolkit.access")
    with serving(create_app(talker, tokenizer, "scripted", "the-secret")) as url:
        right = {"Authorization": "Bearer the-secret"}
        whole = httpx.post(f"{url}/v1/chat/completions", json=BODY, headers={**right, "x-request-id": "r1"}).json()
        named, body = {**right, "x-request-id": "r2"}, {**BODY, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=named) as stream:
            stream.read()
        ask(url, **{"x-request-id": "r3"})
        httpx.get(f"{url}/no%0Awhere?key=the-secret", headers={**right, "x-request-id": "r4"})
    lines = [json.loads(record.message) for record in caplog.records if record.name == "smolkit.access"]
    # A server of another test may still write a line.
    first, second, third, fourth = (line for line in lines if line["request_id"] in ("r1", "r2", "r3", "r4"))
    assert first["request_id"] == "r1" and first["status"] == 200 and first["path"] == "/v1/chat/completions"
    for line in (first, second):
        assert line["prompt_tokens"] == whole["usage"]["prompt_tokens"]
        assert line["completion_tokens"] == whole["usage"]["completion_tokens"] > 0
        assert 0 <= line["first_token_milliseconds"] <= line["milliseconds"] < 60_000
    assert (first["stream"], second["stream"]) == (False, True)
    assert third["status"] == 401 and third["first_token_milliseconds"] is None and fourth["status"] == 404
    assert [line["request_id"] for line in (first, second, third, fourth)] == ["r1", "r2", "r3", "r4"]
    assert "the-secret" not in caplog.text and all("\n" not in record.message for record in caplog.records)


def test_metrics(talker: ScriptedEngine, tokenizer: PreTrainedTokenizerFast) -> None:
    def read(url: str) -> dict[str, float]:
        response = httpx.get(f"{url}/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        samples = [sample for family in text_string_to_metric_families(response.text) for sample in family.samples]
        return {s.name + "".join(f",{v}" for k, v in sorted(s.labels.items()) if k != "le"): s.value for s in samples}

    with serving(create_app(talker, tokenizer, "scripted")) as url:
        usage = ask(url).json()["usage"]
        ask(url)
        for number in range(20):
            httpx.get(f"{url}/made-up-{number}")
        httpx.post(f"{url}/v1/completions", json={})
        values = read(url)
        assert values["smollm_requests_total,/v1/chat/completions,200"] == 2
        assert values["smollm_requests_total,/v1/completions,400"] == 1
        assert values["smollm_requests_total,other,404"] == 20, "made-up paths are no label values"
        assert values["smollm_prompt_tokens_total"] == 2 * usage["prompt_tokens"]
        assert values["smollm_completion_tokens_total"] == 2 * usage["completion_tokens"]
        assert values["smollm_time_to_first_token_seconds_count"] == 2
        assert values["smollm_requests_in_flight"] == 1  # this one
        assert values["process_resident_memory_bytes"] > 0


def test_other_origins_are_shut_out_unless_named(talker: ScriptedEngine, tokenizer: PreTrainedTokenizerFast) -> None:
    page = "https://example.org"
    preflight = {
        "Origin": page,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    with serving(create_app(talker, tokenizer, "scripted")) as url:
        assert not [name for name in ask(url, Origin=page).headers if name.startswith("access-control")]
        assert httpx.options(f"{url}/v1/chat/completions", headers=preflight).status_code == 405
    with serving(create_app(talker, tokenizer, "scripted", "key", cors_origins=[page])) as url:
        allowed = httpx.options(f"{url}/v1/chat/completions", headers=preflight)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == page
        refused = httpx.options(f"{url}/v1/chat/completions", headers={**preflight, "Origin": "https://evil.example"})
        assert refused.status_code == 400
        answer = ask(url, Origin=page, Authorization="Bearer key")
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == page


def test_failures_inside_are_hidden_and_logged(
    talker: ScriptedEngine, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(talker, tokenizer, "scripted")

    @app.get("/broken")
    async def broken() -> None:
        raise ZeroDivisionError("secret detail")

    with serving(app) as url:
        response = httpx.get(f"{url}/broken")
        assert response.status_code == 500 and error_of(response)["message"] == "internal error"
    assert "secret detail" in caplog.text and response.headers["x-request-id"] in caplog.text


# --- told to stop -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script(root: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    log = tmp_path_factory.mktemp("log") / "access.jsonl"
    flags = ("--dtype", "fp32", "--access_log", log, "--served_model_name", "tiny")
    with started(root, "serve_hf.py", "--model_path", checkpoint, *flags) as (url, process):
        yield url, process, log


def test_sigterm_lets_answers_finish(script: Any) -> None:
    """An answer on its way is completed, nothing new is taken, the log is whole, the exit code is 0."""
    url, process, log = script
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    fields: dict[str, Any] = dict(model="tiny", prompt="The", max_tokens=400, temperature=0)
    fields["extra_body"] = {"ignore_eos": True}
    stream = client.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    first = next(iter(stream))
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            httpx.get(f"{url}/health", timeout=2)
        except httpx.TransportError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("new connections are still accepted")
    rest = list(stream)
    assert first.choices and rest[-1].usage.completion_tokens == 400
    assert process.wait(30) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["completion_tokens"] for line in lines if line["path"] == "/v1/completions"] == [400]
