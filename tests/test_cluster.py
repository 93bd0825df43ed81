"""The preparation on datatrove's executors: local processes do the whole path on real samples; Slurm and Ray are
configured, and what Slurm is told is read back."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import prepare_datasets
from smolkit.errors import UserError

pytest.importorskip("datatrove", reason="pip install -r requirements-datatrove.txt")

from smolkit.checkpoints import document_end_id, load_tokenizer
from smolkit.packing import documents
from smolkit.shards import open_store, tokenized
from smolkit.sources import cluster, gsm8k
from smolkit.sources.cluster import Plan, executor_of, read_plan, share_of, stages_of
from smolkit.sources.files import DataFile
from smolkit.sources.pipeline import Input, Limits, Settings

FILTERS = {"deduplicate": "near", "min_characters": 5}


def prepare(copies: Path, output_dir: Path, *more: object) -> None:
    arguments = ["--source", "local", "--path", copies, "--output_dir", output_dir, *more]
    prepare_datasets.main([str(a) for a in arguments])


def plan_file(folder: Path, **plan: object) -> Path:
    path = folder / "executor.yaml"
    path.write_text(json.dumps(plan), "utf-8")  # JSON is YAML
    return path


def rows(folder: Path, part: str) -> Counter:
    """Every line of a part with its side of the split."""
    files = [*folder.glob(f"{part}_data*.jsonl"), *folder.glob(f"validation/{part}_data*.jsonl")]
    return Counter((path.parent.name, line) for path in files for line in path.read_bytes().splitlines())


def counts(folder: Path) -> dict:
    report = json.loads((folder / "prepare_report.json").read_text())
    return {
        repo: (s["read"], s["written"], {reason: d["rows"] for reason, d in s["dropped"].items()})
        for repo, s in report["sources"].items()
    }


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])  # 1: in this process
def test_local_executors_write_the_rows_of_a_plain_run_and_its_tokens(
    samples: Path, tmp_path: Path, workers: int
) -> None:
    tokenizer_path = samples / "qwen2.5_tokenizer"
    plan = plan_file(tmp_path, executor="local", tasks=2, workers=workers, tokenizer=str(tokenizer_path))
    for name, more in (("plain", []), ("datatrove", ["--executor", plan])):
        prepare(samples, tmp_path / name, "--pretrain", "--min_characters", 300, *more)
    plain, shards = tmp_path / "plain" / "pretrain", tmp_path / "datatrove" / "pretrain"
    assert rows(shards, "pretrain") == rows(plain, "pretrain") and counts(shards) == counts(plain)
    assert len(list(shards.glob("pretrain_data-*.jsonl"))) == 2 and not (shards / ".datatrove").exists()
    tokenizer = load_tokenizer(tokenizer_path)
    conversion = documents(document_end_id(tokenizer))
    store = open_store(shards / "tokens", conversion.identity(tokenizer))  # every checksum is checked here
    expected = tokenized(conversion, sorted(shards.glob("pretrain_data-*.jsonl")), tokenizer, tmp_path / "cache")
    assert len(store) == len(expected) > 150 and store.counts == expected.counts
    for record in range(len(store)):
        np.testing.assert_array_equal(store.cut("input_ids", record), expected.cut("input_ids", record))


def parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(("kind", "kept"), [("exact", 301), ("near", 300)])
def test_duplicates_are_found_across_tasks(samples: Path, tmp_path: Path, kind: str, kept: int) -> None:
    lines = (samples / "gsm8k" / "train.jsonl").read_text("utf-8").splitlines()[:300]
    near = json.loads(lines[4]) | {"answer": json.loads(lines[4])["answer"] + " Done"}
    copy = tmp_path / "copies" / "gsm8k"
    copy.mkdir(parents=True)
    (copy / "train.jsonl").write_text("\n".join([*lines, "{broken"]), "utf-8")
    parquet(copy / "main" / "train-0.parquet", [json.loads(lines[2]), near])  # the other task's
    plan = plan_file(tmp_path, executor="local", tasks=2, workers=1)
    prepare(copy.parent, tmp_path, "--sft", "--deduplicate", kind, "--executor", plan)
    dropped = {f"duplicate: {kind}": 302 - kept, "malformed JSON or UTF-8": 1}
    assert counts(tmp_path / "sft") == {"openai/gsm8k": (303, kept, dropped)}
    answers = [json.loads(line)["messages"][1]["content"] for _, line in rows(tmp_path / "sft", "sft").elements()]
    assert len(answers) == kept and len(set(answers)) == kept


def test_what_the_publisher_held_out_is_trained_on_by_no_task(tmp_path: Path) -> None:
    every = [{"question": f"Is {i} more than {i - 1}?", "answer": f"yes {i}"} for i in range(60)]
    files = {"train-0": every[:30], "train-1": every[30:], "test-0": every[10:15], "test-1": every[40:]}
    for name, taken in files.items():
        parquet(tmp_path / "gsm8k" / "main" / f"{name}.parquet", taken)
    plan = plan_file(tmp_path, executor="local", tasks=2, workers=1)
    for name, more in (("plain", []), ("datatrove", ["--executor", plan])):
        prepare(tmp_path, tmp_path / name, "--sft", "--datasets", "gsm8k", "--validation_fraction", "0.2", *more)
    plain, shards = tmp_path / "plain" / "sft", tmp_path / "datatrove" / "sft"
    assert counts(plain) == {"openai/gsm8k": (85, 60, {"stands in the held-out files": 25})}
    assert rows(shards, "sft") == rows(plain, "sft") and counts(shards) == counts(plain)
    assert json.loads((shards / "prepare_report.json").read_text())["sources"]["openai/gsm8k"]["repo"] == "openai/gsm8k"


def test_what_a_plain_run_left_is_replaced_and_the_other_way_round(samples: Path, tmp_path: Path) -> None:
    plan = plan_file(tmp_path, executor="local", tasks=1)
    names = {True: {"dpo_data-00000.jsonl"}, False: {"dpo_data.jsonl"}}
    for executor in (False, True, False):
        prepare(samples, tmp_path, "--dpo", *(["--executor", plan] if executor else []))
        for folder in (tmp_path / "dpo", tmp_path / "dpo" / "validation"):
            assert {path.name for path in folder.glob("*.jsonl")} == names[executor]


def test_a_finished_run_is_left_alone_and_another_one_is_not_continued(
    samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    plan = plan_file(tmp_path, executor="local", tasks=1)
    prepare(samples, tmp_path, "--dpo", "--executor", plan)
    before = rows(tmp_path / "dpo", "dpo")
    prepare(samples, tmp_path, "--dpo", "--executor", plan)
    assert "already prepared" in capsys.readouterr().out and sum(before.values()) == 200
    (tmp_path / "dpo" / ".datatrove").mkdir()
    (tmp_path / "dpo" / ".datatrove" / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="other settings .*--restart"):
        prepare(samples, tmp_path, "--dpo", "--executor", plan, "--seed", 7)
    prepare(samples, tmp_path, "--dpo", "--executor", plan, "--seed", 7, "--restart")
    assert rows(tmp_path / "dpo", "dpo") == before  # nothing there is drawn


@pytest.mark.parametrize("failing", ["Write", "Publish"])
def test_an_interrupted_run_goes_on_with_the_stage_it_was_in(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    plan = plan_file(tmp_path, executor="local", tasks=2, workers=1)
    prepare(samples, tmp_path / "whole", "--dpo", "--executor", plan)
    write_json, converted = cluster.write_json, []

    def killed(path: Path, value: object) -> None:
        converted.extend(["once"] if path.parent.name == "reports" else [])
        if path.name == ("00001.json" if failing == "Write" else "prepare_report.json") and "reports" not in str(path):
            raise KeyboardInterrupt  # after the files, before their report
        write_json(path, value)

    monkeypatch.setattr(cluster, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(samples, tmp_path, "--dpo", "--executor", plan)
    monkeypatch.setattr(cluster, "write_json", write_json)
    assert converted == ["once"] * 2 and not (tmp_path / "dpo" / "prepare_report.json").exists()
    monkeypatch.setattr(cluster.Convert, "run", None)  # would fail if it were repeated
    prepare(samples, tmp_path, "--dpo", "--executor", plan)
    assert rows(tmp_path / "dpo", "dpo") == rows(tmp_path / "whole" / "dpo", "dpo")
    assert counts(tmp_path / "dpo") == counts(tmp_path / "whole" / "dpo")


# --- Slurm and Ray ------------------------------------------------------------------------------------------


def chain(tmp_path: Path, plan: Plan) -> list:
    """The executors of all stages, first stage first."""
    inputs = [Input(gsm8k.SOURCE, [DataFile("/x/train.jsonl", "train.jsonl", False)], Limits())]
    stages = stages_of("pretrain", inputs, tmp_path, Settings(), FILTERS, plan, {})
    executors = [executor_of("pretrain", stages, tmp_path, plan)]
    while executors[-1].depends:
        executors.append(executors[-1].depends)
    return executors[::-1]


def test_slurm_is_told_to_run_every_stage_after_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        f"#!/bin/bash\nn=$(ls {tmp_path}/job-* 2>/dev/null | wc -l)\nfor last; do :; done\n"
        f'echo "$@" > {tmp_path}/job-$(printf %02d $n)\ncat "$last" >> {tmp_path}/job-$(printf %02d $n)\n'
        'echo "Submitted batch job $((n + 100))"\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    options = {"partition": "cpu", "time": "24:00:00", "mem_per_cpu_gb": 4, "qos": ""}
    path = plan_file(tmp_path, executor="slurm", tasks=64, workers=32, tokenizer=str(tmp_path), options=options)
    executors = chain(tmp_path, read_plan(path))
    executors[-1].run()
    jobs = {}
    for job in sorted(tmp_path.glob("job-*")):
        call, *script = job.read_text().splitlines()
        settings = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in script if "#SBATCH" in line)
        run = [line for line in script if "launch_pickled_pipeline" in line]
        if run:  # the others merge datatrove's statistics
            jobs[settings["job-name"]] = settings | {"call": call, "number": 100 + int(job.name[4:]), "run": run[0]}
    names = [f"pretrain-{n}" for n in ("convert", "buckets", "clusters", "write", "publish", "tokenise", "join")]
    assert list(jobs) == names
    assert [job["array"] for job in jobs.values()] == [
        "0-63%32",
        "0-13%14",
        "0-0%1",
        "0-63%32",
        "0-0%1",
        "0-63%32",
        "0-0%1",
    ]
    for before, after in zip(names, names[1:], strict=False):
        assert f"--dependency=afterok:{jobs[before]['number']}" in jobs[after]["call"]
    first = jobs["pretrain-convert"]
    assert (first["partition"], first["time"], first["mem-per-cpu"]) == ("cpu", "24:00:00", "4G")
    assert first["run"].endswith(f"{tmp_path}/.datatrove/logs/convert/executor.pik")


@pytest.mark.slow
def test_slurm_jobs_do_the_work_wherever_they_start(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A stand-in for Slurm runs each job in a process of its own, in another directory."""
    commands = {
        "sbatch": 'for last; do :; done\nn=$(sed -n "s/#SBATCH --array=0-\\([0-9]*\\).*/\\1/p" "$last")\n'
        'for i in $(seq 0 "$n"); do SLURM_ARRAY_TASK_ID=$i bash "$last" >> jobs.log 2>&1 || exit 1; done\n'
        'echo "Submitted batch job 7"\n',
        "srun": 'shift 3\nexec "$@"\n',
        "scontrol": "echo here\n",
        "merge_stats": "",
    }
    (tmp_path / "bin").mkdir()
    for name, script in commands.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\nset -e\ncd {tmp_path}\n{script}")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_NODELIST", "here")
    plan = plan_file(tmp_path, executor="slurm", tasks=2, options={"partition": "cpu", "time": "1:00:00"})
    prepare(samples, tmp_path / "slurm", "--dpo", "--executor", plan)
    prepare(samples, tmp_path / "slurm", "--dpo", "--executor", plan)  # says what the jobs wrote
    assert "200 rows read, 200 written" in capsys.readouterr().out
    prepare(samples, tmp_path / "plain", "--dpo")
    assert rows(tmp_path / "slurm" / "dpo", "dpo") == rows(tmp_path / "plain" / "dpo", "dpo")
    assert counts(tmp_path / "slurm" / "dpo") == counts(tmp_path / "plain" / "dpo")


def test_ray_gets_the_same_stages(tmp_path: Path) -> None:
    path = plan_file(tmp_path, executor="ray", tasks=8, workers=4, options={"cpus_per_task": 2})
    executors = chain(tmp_path, read_plan(path))
    assert [type(e).__name__ for e in executors] == ["RayPipelineExecutor"] * 5
    assert [(e.tasks, e.workers, e.cpus_per_task) for e in executors] == [
        (8, 4, 2), (14, 4, 2), (1, 1, 2), (8, 4, 2), (1, 1, 2)
    ]  # fmt: skip


def test_tasks_share_files_and_limits() -> None:
    files = [DataFile("", f"{i}", i >= 5) for i in range(7)]
    whole = Input(gsm8k.SOURCE, files, Limits(records=100, tokens=1e6))
    shares = [share_of(whole, rank, 3) for rank in range(3)]
    assert sorted(f.path for share in shares for f in share.files) == [f.path for f in files]
    assert [share.limits for share in shares] == [Limits(34, 1e6 / 3)] * 3
    assert share_of(whole, 7, 8).files == [] and share_of(whole, 0, 8).limits.records == 20


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"executor": "pbs"}, "executor: must be one of local, slurm, ray"),
        ({"executor": "local", "task": 3}, "unknown key task; known are executor, tasks"),
        ({"executor": "local", "tasks": 0}, "tasks: 0: must be a int, and at least 1"),
        ({"executor": "local", "tokenizer": "nowhere"}, "tokenizer: nowhere: no such directory"),
        ({"executor": "local", "options": {"partition": "cpu"}}, "executor local: options: .*partition"),
    ],
)
def test_bad_executor_files_are_named(samples: Path, tmp_path: Path, plan: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(samples, tmp_path, "--dpo", "--executor", plan_file(tmp_path, **plan))


def test_what_executors_cannot_do_is_refused(samples: Path, tmp_path: Path) -> None:
    plan = plan_file(tmp_path, executor="local", tokenizer=str(samples / "qwen2.5_tokenizer"))
    with pytest.raises(UserError, match="dpo data is tokenised by its training"):
        prepare(samples, tmp_path, "--dpo", "--executor", plan)
    with pytest.raises(UserError, match="without --mixture"):
        prepare(samples, tmp_path, "--mixture", "m.yaml", "--executor", plan)
    with pytest.raises(UserError, match="--near_threshold"):
        prepare(samples, tmp_path, "--deduplicate", "near", "--near_threshold", 0.7, "--executor", plan)
