"""Services named in --report_to: a missing one is refused before any work, and a continued run stays one run there."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from smolkit.errors import UserError
from smolkit.files import atomic_writer

PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio"}
WANDB_RUN = "wandb_run.txt"  # in the output directory: the id under which wandb knows the run


def check_reporters(report_to: str | Sequence[str] | None) -> list[str]:
    """The reporters as a list (empty for "none"); `UserError` for one that is unknown or not installed here."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    if len(names) > 1 and "none" in names:
        raise UserError(f"--report_to {' '.join(names)}: none contradicts the others; leave one out")
    names = [name for name in dict.fromkeys(names) if name != "none"]
    for name in names:
        if name not in PACKAGES:
            raise UserError(f"--report_to {name}: choose wandb, tensorboard, trackio or none")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(f"--report_to {name}: not installed; pip install {PACKAGES[name]}, or --report_to none")
    if "wandb" in names:
        _check_wandb()
    return names


def _check_wandb() -> None:
    """wandb would ask for a key in the middle of the start, or die there without a terminal."""
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled") or sys.stdin.isatty():
        return
    import wandb

    try:
        why = "" if wandb.login(prompt=False) else "not logged in"
    except wandb.Error as error:
        why = " ".join(str(error).split())
    if why:
        raise UserError(f"--report_to wandb: {why}; run `wandb login`, or set WANDB_MODE=offline to keep the run here")


def join_wandb_run(directory: Path, project: str, run_name: str | None) -> None:
    """Open the wandb run of a training in `directory`: the one it had before an interruption, or a new one.

    transformers' callback takes an open run for its own. Its id is kept, and asked for again with `resume="allow"`, so
    that the parts of a run made offline become one when they are uploaded, too. WANDB_PROJECT and WANDB_RUN_ID come
    first.
    """
    import wandb

    if wandb.run is not None:  # opened by whoever called the script
        return
    file = directory / WANDB_RUN
    known = file.read_text(encoding="utf-8").strip() if file.is_file() else None
    project = os.environ.get("WANDB_PROJECT", project)
    run = wandb.init(project=project, name=run_name, id=os.environ.get("WANDB_RUN_ID", known), resume="allow")
    if run.id != known and not run.disabled:
        with atomic_writer(file) as handle:
            handle.write(run.id + "\n")
