"""Whether the services named in --report_to can be used, before any work: a missing one is refused, never ignored."""

import importlib.util
import os
import sys
from collections.abc import Sequence

from smolkit.errors import UserError

PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio"}


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
