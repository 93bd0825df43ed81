"""How a trainer is written down and found again: checkpoints that appear whole or not at all, arguments as JSON.

A mixin for `transformers.Trainer` and its TRL children. The library's own hooks write and read the files, so that what
an engine (DDP, FSDP, DeepSpeed) adds to a checkpoint is covered, too.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import rotate_checkpoints

from smol_model import SmolForCausalLM
from smolkit.chat import save_tokenizer
from smolkit.files import write_json


class PersistenceMixin:
    """Saving and loading; put before a trainer in the bases."""

    _writing: Path | None = None  # where the library writes a checkpoint while it is not whole

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """The library writes aside and the result is renamed: a checkpoint appears whole or not at all."""
        parent = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        aside = parent / ".writing-checkpoint"
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._writing = aside
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_global_step:
                self.state.best_model_checkpoint = str(parent / f"checkpoint-{self.state.best_global_step}")
                self.state.save_to_json(aside / name / "trainer_state.json")
            for file in (aside / name).rglob("*"):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            shutil.rmtree(parent / name, ignore_errors=True)
            os.replace(aside / name, parent / name)
            shutil.rmtree(aside)
            rotate_checkpoints(str(parent), self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Weights, config and tokenizer; the arguments as JSON, where the library would pickle them."""
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        unwrapped = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        unwrapped.save_pretrained(directory, state_dict=state_dict)
        if self.args.should_save:
            save_tokenizer(self.processing_class, directory)
            write_json(directory / "training_arguments.json", json.loads(self.args.to_json_string()))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """By `from_pretrained`: on disk the experts of a MoE have other names than in memory."""
        target = self.model if model is None else model
        if not isinstance(target, SmolForCausalLM) or self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = SmolForCausalLM.from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict())
        return None
