"""`--source hub` against a server on this machine that answers as the hub does: pinned revisions, streaming through
`datasets`, gated and missing datasets, a connection that breaks."""

import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from smolkit.doctor import read_dpo, read_sft
from smolkit.sources import gsm8k, ultrafeedback

COMMIT = "5" * 40


@dataclass
class Hub:
    """Datasets as {repo: {path: bytes}}, of which some are gated; `asked` lists (method, path)."""

    datasets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[tuple[str, str]] = field(default_factory=list)
    broken_after: int | None = None  # bytes of a file that are sent before every connection breaks
    url: str = ""
    main: str = COMMIT

    def entries(self, repo: str) -> list[dict]:
        files = self.datasets[repo].items()
        return [{"type": "file", "path": path, "size": len(data), "oid": "a" * 40} for path, data in files]

    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, value: object = None, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        repo, rest = self.split(path.removeprefix("/api").removeprefix("/datasets/"))
        if repo in self.hub.gated:
            return self.answer(403, {"error": "gated"}, X_Error_Code="GatedRepo")
        if repo not in self.hub.datasets:
            return self.answer(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if rest[0] == "auth-check":
            return self.answer(200, {})
        if rest[0] == "resolve":
            return self.send_file(self.hub.datasets[repo].get("/".join(rest[2:])), rest[1])
        if rest[0] == "tree":
            return self.answer(200, self.hub.entries(repo))
        if rest[0] == "paths-info":
            wanted = json.loads(body)["paths"]
            return self.answer(200, [e for e in self.hub.entries(repo) if e["path"] in wanted])
        if rest[0] == "revision":
            return self.answer(
                200, {"id": repo, "sha": self.hub.main if rest[1] == "main" else rest[1], "siblings": []}
            )
        return self.answer(404)

    do_HEAD = do_POST = do_GET

    @staticmethod
    def split(path: str) -> tuple[str, list[str]]:
        owner, name, *rest = path.split("/")
        return f"{owner}/{name}", rest or [""]

    def send_file(self, data: bytes | None, revision: str) -> None:
        if data is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        start, end = 0, len(data) - 1
        if span := self.headers.get("Range"):
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or end), end)
        self.send_response(206 if span else 200)
        headers = {
            "Content-Length": end - start + 1,
            "ETag": '"e"',
            "X-Repo-Commit": revision,
            "Accept-Ranges": "bytes",
        }
        headers |= {"Content-Range": f"bytes {start}-{end}/{len(data)}"} if span else {}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return None
        limit = self.hub.broken_after
        if limit is not None and end >= limit:
            self.wfile.write(data[start : max(start, limit)])
            self.close_connection = True
            return None
        self.wfile.write(data[start : end + 1])
        return None


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OurHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


def parquet(rows: list[dict]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def jsonl(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def preferences(count: int) -> bytes:
    answers = [{"response": "好", "overall_score": 5}, {"response": "bad\u2028é", "overall_score": "1"}]
    return jsonl([{"source": "flan", "instruction": f"问 {i}", "completions": answers} for i in range(count)])


def test_pinned_revisions_are_streamed_and_main_is_resolved_to_a_commit(
    hub: Hub, tmp_path: Path, run_script: Callable
) -> None:
    hub.datasets["openbmb/UltraFeedback"] = {
        "README.md": b"",
        "flan.jsonl": preferences(5) + b'{"cut \xff\n',
        "evol_instruct.jsonl": preferences(4),
        "data/other.jsonl": b"{}",
    }
    hub.datasets["openai/gsm8k"] = {"main/train-00000-of-00001.parquet": parquet([{"question": "q", "answer": "a"}])}
    hub.datasets["O1-OPEN/OpenO1-SFT"] = {"OpenO1-SFT.jsonl": jsonl([{"instruction": "q", "output": "思"}])}
    more = ["--output_dir", tmp_path, "--validation_fraction", "0"]
    arguments = ["--datasets", "UltraFeedback", "gsm8k", "OpenO1-SFT", *more]
    run_script("prepare_datasets.py", *arguments, env=hub.environment())
    pairs, talks = list(read_dpo(tmp_path / "dpo/dpo_data.jsonl")), list(read_sft(tmp_path / "sft/sft_data.jsonl"))
    assert len(pairs) == 9 and pairs[0]["rejected"][0]["content"] == "bad\u2028é"
    assert [talk["source"] for talk in talks] == ["gsm8k", "OpenO1-SFT"]
    report = json.loads((tmp_path / "dpo" / "prepare_report.json").read_text())["sources"]["openbmb/UltraFeedback"]
    assert report["revision"] == "40b436560ca83a8dba36114c22ab3c66e43f6d5e" == ultrafeedback.SOURCE.revision
    assert {reason: d["for_example"] for reason, d in report["dropped"].items()} == {
        "malformed JSON or UTF-8": ["flan.jsonl:6"]
    }
    read = {path.split("/resolve/")[1].split("/")[0] for _, path in hub.asked if "/resolve/" in path}
    assert read == {ultrafeedback.SOURCE.revision, gsm8k.SOURCE.revision, COMMIT}
    hub.main = "6" * 40
    assert run_script("prepare_datasets.py", *arguments, env=hub.environment()).stdout.count("already prepared") == 2
    run_script("prepare_datasets.py", *arguments, "--sft", "--dpo", "--restart", env=hub.environment())
    report = json.loads((tmp_path / "sft" / "prepare_report.json").read_text())["sources"]
    assert report["O1-OPEN/OpenO1-SFT"]["revision"] == hub.main


@pytest.mark.parametrize("kind", ["gated", "unreachable"])
def test_what_a_new_user_sees_when_a_dataset_cannot_be_had(
    hub: Hub, tmp_path: Path, run_script: Callable, kind: str
) -> None:
    hub.gated = {"BAAI/IndustryCorpus2"}
    environment = hub.environment() | ({"HF_ENDPOINT": "http://127.0.0.1:9"} if kind == "unreachable" else {})
    result = run_script("prepare_datasets.py", "--small", "--output_dir", tmp_path, env=environment, expect=2)
    elsewhere = "or take a copy on disk (--source local --path DIR) or the built-in data (--source tiny)\n"
    if kind == "gated":
        assert result.stderr == (
            "error: BAAI/IndustryCorpus2 cannot be read with your account: accept its conditions at "
            "https://huggingface.co/datasets/BAAI/IndustryCorpus2 and run `hf auth login` (or set HF_TOKEN), "
            + elsewhere
        )
    else:
        assert result.stderr.startswith("error: the hub could not be reached for BAAI/IndustryCorpus2 (")
        assert result.stderr.endswith(": check the network or set HF_ENDPOINT to a mirror, " + elsewhere)
        assert len(result.stderr.splitlines()) == 1
    assert not any(tmp_path.rglob("*"))  # nothing in its place


def test_a_lost_connection_is_no_bad_file_and_the_run_goes_on_afterwards(
    hub: Hub, tmp_path: Path, run_script: Callable
) -> None:
    rows = [{"source": "flan", "instruction": f"q{i} " + "x" * 400, "completions": []} for i in range(9000)]
    answers = [{"response": "good", "overall_score": 5}, {"response": "bad", "overall_score": 1}]
    hub.datasets["openbmb/UltraFeedback"] = {"flan.jsonl": jsonl([{**row, "completions": answers} for row in rows])}
    start = tmp_path / "start.py"  # the script, but without the pauses between attempts
    start.write_text(
        f"import sys, time\nsys.path.insert(0, {str(Path(__file__).parent.parent)!r})\nimport prepare_datasets\n"
        "from smolkit.errors import run\ntime.sleep = lambda seconds: None\n"
        "run(lambda: prepare_datasets.main(sys.argv[1:]))\n"
    )
    arguments = [start, "--dpo", "--output_dir", tmp_path / "data", "--validation_fraction", "0.2"]
    hub.broken_after = 3_000_000
    failed = run_script(*arguments, env=hub.environment(), expect=2)
    assert "flan.jsonl: connection lost" in failed.stderr.splitlines()[-1]
    assert "run the same command again to go on" in failed.stderr.splitlines()[-1]
    assert not (tmp_path / "data" / "dpo" / "dpo_data.jsonl").exists()
    hub.broken_after = None
    assert "going on after" in run_script(*arguments, env=hub.environment()).stdout
    run_script("prepare_datasets.py", "--dpo", "--output_dir", tmp_path / "whole", "--validation_fraction", "0.2",
               env=hub.environment())  # fmt: skip
    for name in ("dpo_data.jsonl", "validation/dpo_data.jsonl"):
        resumed, whole = (tmp_path / folder / "dpo" / name for folder in ("data", "whole"))
        assert resumed.read_bytes() == whole.read_bytes()
