"""The quickstart's report from made-up stage figures: rows, verdicts, exit codes, files."""

import json
from pathlib import Path

import pytest

from smolkit import report
from smolkit.errors import UserError

QA = {"qa_en": 0.97, "qa_zh": 0.98, "qa_en_chance": 0.1, "qa_zh_chance": 0.12}
INTERVALS = {"intervals": {"qa_en": [0.921, 0.992]}, "shares": ["qa_en"], "settings": {"seed": 0}}
STAGES = {
    "sft": {**QA, **INTERVALS, "tool_exact": 0.95, "ends_by_itself": 1.0, "skill": 0.05, "same_greedy_answers": 1.0},
    "control": {**QA, "qa_en": 0.2, "qa_zh": 0.1},
    "lora": {"skill": 0.9},
    "dpo": {
        **QA,
        "qa_en": 0.94,
        "preference_accuracy": 0.96,
        "preferred_quality": 0.93,
        "same_greedy_answers": 1,
    },
}
TIMES = [  # the control ran beside pretraining
    {"stage": "control", "started": 4, "seconds": 200},
    {"stage": "pretrain", "started": 4, "seconds": 300},
    {"stage": "sft", "started": 304, "seconds": 60.6},
]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for stage, metrics in STAGES.items():
        write(tmp_path, stage, metrics)
        rows = [{"step": s, "loss": 3 / s, "learning_rate": 1e-3} for s in range(1, 9)] + [{"step": 8, "eval_loss": 1}]
        (tmp_path / stage / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "stage_times.jsonl").write_text("".join(json.dumps(t) + "\n" for t in TIMES))
    return tmp_path


@pytest.fixture(autouse=True)
def quick_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the test of the good run draws its curves: that is most of a report's time."""
    if "good_run" not in request.node.name:
        monkeypatch.setattr(report, "plot_curves", lambda curves, path: None)


def write(run_dir: Path, stage: str, metrics: dict) -> None:
    directory = run_dir / stage / "eval"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.json").write_text(json.dumps(metrics))


def change(run_dir: Path, stage: str, **metrics: float) -> None:
    write(run_dir, stage, {**STAGES[stage], **metrics})


def rows_of(run_dir: Path) -> dict[str, dict]:
    content = json.loads((run_dir / "report.json").read_text())
    assert list(content) == ["rows"]
    assert all(list(row) == ["name", "value", "limit", "op", "ok"] for row in content["rows"])
    return {row["name"]: row for row in content["rows"]}


def test_a_good_run_passes_and_the_files_are_there(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    report.main(["--run_dir", str(run_dir), "--model", "tiny"])
    rows = rows_of(run_dir)
    assert {name: (row["value"], row["op"], row["limit"]) for name, row in rows.items()} == {
        "qa_en": (0.97, ">=", 0.9),
        "qa_zh": (0.98, ">=", 0.9),
        "control_qa_en": (0.2, "<=", 0.2),
        "control_qa_zh": (0.1, "<=", 0.24),
        "tool_exact": (0.95, ">=", 0.9),
        "ends_by_itself": (1.0, ">=", 0.99),
        "lora_skill": (0.9, ">=", 0.9),
        "lora_skill_without": (0.05, "<=", 0.1),
        "preference_accuracy": (0.96, ">=", 0.95),
        "preferred_quality": (0.93, ">=", 0.9),
        "dpo_qa_en_loss": (0.03, "<=", 0.03),  # 0.97 - 0.94 is 0.030000000000000027 in binary
        "dpo_qa_zh_loss": (0.0, "<=", 0.03),
        "same_greedy_answers": (1.0, "==", 1.0),
        "wall_minutes": (6.01, "<=", 8.0),
    }
    assert all(row["ok"] is True for row in rows.values())
    assert (run_dir / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    text = (run_dir / "report.md").read_text()
    assert "| qa_en | 0.970 | >= 0.900 | 92.1 – 99.2 % | ok |" in text  # the control's was not given
    assert "| control_qa_en | 0.200 | <= 0.200 |  | ok |" in text
    assert "| qa_en | 97.0 % (92.1 – 99.2 %) | 0.2000 |" in text and "| pretrain | 300 |" in text
    assert "FAILED" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "figure", "value", "row"),
    [
        ("sft", "qa_en", 0.899, "qa_en"),
        ("sft", "qa_zh", 0.5, "qa_zh"),
        ("control", "qa_en", 0.21, "control_qa_en"),
        ("control", "qa_zh", 0.25, "control_qa_zh"),
        ("sft", "tool_exact", 0.89, "tool_exact"),
        ("sft", "ends_by_itself", 0.989, "ends_by_itself"),
        ("sft", "skill", 0.11, "lora_skill_without"),
        ("lora", "skill", 0.89, "lora_skill"),
        ("dpo", "preference_accuracy", 0.94, "preference_accuracy"),
        ("dpo", "preferred_quality", 0.89, "preferred_quality"),
        ("dpo", "qa_en", 0.93, "dpo_qa_en_loss"),
        ("dpo", "qa_zh", 0.94, "dpo_qa_zh_loss"),
        ("dpo", "same_greedy_answers", 0.999, "same_greedy_answers"),
    ],
)
def test_each_quality_row_fails_the_command(
    run_dir: Path, stage: str, figure: str, value: float, row: str, capsys: pytest.CaptureFixture
) -> None:
    change(run_dir, stage, **{figure: value})
    with pytest.raises(SystemExit) as stop:
        report.main(["--run_dir", str(run_dir), "--model", "tiny"])
    assert stop.value.code == 1
    assert row in capsys.readouterr().err
    assert rows_of(run_dir)[row]["ok"] is False


def test_time_is_reported_and_never_judged(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    (run_dir / "stage_times.jsonl").write_text(json.dumps({"stage": "pretrain", "started": 2, "seconds": 541}) + "\n")
    report.main(["--run_dir", str(run_dir), "--model", "tiny"])
    assert rows_of(run_dir)["wall_minutes"]["ok"] is False
    assert "not judged" in capsys.readouterr().out
    report.main(["--run_dir", str(run_dir), "--model", "tiny-moe"])  # 12 minutes there
    assert rows_of(run_dir)["wall_minutes"]["ok"] is True


def test_a_declared_row_below_target_is_shown_without_failing(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    change(run_dir, "dpo", preferred_quality=0.4)
    monkeypatch.setitem(report.KNOWN_BELOW_TARGET, "tiny", frozenset({"preferred_quality"}))
    report.main(["--run_dir", str(run_dir), "--model", "tiny"])
    assert "below target (known)" in capsys.readouterr().out
    assert rows_of(run_dir)["preferred_quality"]["ok"] is False
    with pytest.raises(SystemExit):
        report.main(["--run_dir", str(run_dir), "--model", "tiny-moe"])


def test_the_skill_without_adapter_comes_from_its_own_evaluation_where_there_is_one(run_dir: Path) -> None:
    write(run_dir, "lora-base", {"skill": 0.01})
    report.main(["--run_dir", str(run_dir), "--model", "tiny"])
    assert rows_of(run_dir)["lora_skill_without"]["value"] == 0.01


def test_missing_or_broken_figures_are_named(run_dir: Path) -> None:
    for stage in STAGES:
        path = run_dir / stage / "eval" / "metrics.json"
        kept = path.read_text()
        path.unlink()
        with pytest.raises(UserError, match=f"{stage}/eval/metrics.json: missing"):
            report.build(run_dir, "tiny")
        path.write_text("{")
        with pytest.raises(UserError, match=f"{stage}/eval/metrics.json: not valid JSON"):
            report.build(run_dir, "tiny")
        path.write_text("{}")
        with pytest.raises(UserError, match="has no"):
            report.build(run_dir, "tiny")
        path.write_text(kept)
    with pytest.raises(UserError, match="no such directory"):
        report.build(run_dir / "absent", "tiny")


def test_a_curve_file_cut_off_by_a_kill_is_still_drawn(run_dir: Path) -> None:
    path = run_dir / "sft" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 9, "lo')
    report.build(run_dir, "tiny")
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(UserError, match="metrics.jsonl:1"):
        report.build(run_dir, "tiny")
