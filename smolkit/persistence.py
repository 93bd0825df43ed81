"""How a trainer is written down and found again: checkpoints that appear whole or not at all, continued bit for bit.

A mixin for `transformers.Trainer` and its TRL children. The library's own hooks write and read the files, so that what
an engine (DDP, FSDP, DeepSpeed) adds to a checkpoint is covered, too. The library writes aside, in the background the
files are brought to the disk and sealed with a manifest (`smolkit.manifest`), and the directory is renamed last. Beside
what the library keeps, each process writes `window_R.json`: what it has summed up since the last log. The arguments are
JSON, never a pickle.
"""

import json
import os
import random
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from smol_model import SmolForCausalLM
from smolkit.chat import save_tokenizer
from smolkit.errors import UserError
from smolkit.files import sync, write_json
from smolkit.manifest import discard, rotate, seal
from smolkit.optimizer import MasterAdamW
from smolkit.progress import Progress
from smolkit.run_report import RUN_FILES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer

    from smolkit.command_line import RunArguments

    class Host(Trainer):
        """The trainer that our mixins are put before, once it is built."""

        args: RunArguments
        model: PreTrainedModel
        model_wrapped: torch.nn.Module
        optimizer: torch.optim.Optimizer
        lr_scheduler: LambdaLR
        processing_class: PreTrainedTokenizerFast
        train_dataset: Any  # rows with a length, from `datasets` or ours
        eval_dataset: Any
        _metrics: dict[str, defaultdict[Any, list[Any]]]  # of TRL's trainers

else:
    Host = object


class Continuation(TrainerCallback):
    """Before the first step of a continued run: logs and open sums as they were when its checkpoint was written."""

    def __init__(self, trainer: "PersistenceMixin"):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.restore_window()


class PersistenceMixin(Host):
    """Saving and loading; put before a trainer in the bases; call `begin_persistence` last of what adds callbacks."""

    # sums of the mixins that build on this one, kept with a checkpoint
    _tokens: int | torch.Tensor
    _router: dict[str, torch.Tensor]
    _router_batches: int
    _skipped: int
    progress: Progress

    def begin_persistence(self) -> None:
        self._writing: Path | None = None  # where the library writes a checkpoint while it is not whole
        self._continued_from: Path | None = None
        self._publisher: Thread | None = None  # brings the last checkpoint to the disk, with --async_save
        self._publishing_error: Exception | None = None
        self.callback_handler.callbacks.insert(0, Continuation(self))

    def is_sharded_by_engine(self) -> bool:
        """Whether DeepSpeed or FSDP holds weights and optimizer."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def master_optimizer(self) -> MasterAdamW | None:
        """The optimizer with the fp32 masters, out of accelerate's wrapper; None when there is none."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner if isinstance(inner, MasterAdamW) else None

    # what is open between two logs

    def window_state(self) -> dict[str, Any]:
        """What this process has summed up since the last log, in JSON's types; floats survive exactly."""
        state = {
            "loss": float(self._tr_loss),
            "last_logged": self._globalstep_last_logged,
            "tokens": int(self._tokens),
            "router": {name: float(value) for name, value in self._router.items()},
            "router_batches": self._router_batches,
            "skipped": self._skipped,
        }
        if hasattr(self, "_total_train_tokens"):  # TRL's own sums
            state["trl_tokens"] = self._total_train_tokens
            state["trl"] = {name: list(values) for name, values in self._metrics["train"].items()}
        return state

    def set_window_state(self, state: dict[str, Any]) -> None:
        """The opposite of `window_state`."""
        self._tr_loss.fill_(state["loss"])
        self._globalstep_last_logged = state["last_logged"]
        self._tokens, self._router_batches, self._skipped = state["tokens"], state["router_batches"], state["skipped"]
        device = self.args.device
        self._router = {name: torch.tensor(value, device=device) for name, value in state["router"].items()}
        if "trl" in state and hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = state["trl_tokens"]
            self._metrics["train"].clear()
            for name, values in state["trl"].items():
                self._metrics["train"][name].extend(values)

    def restore_window(self) -> None:
        """Continue the sums and cut the logs back to where the checkpoint was written; nothing for a new run.

        A checkpoint of another number of processes is shared out: the mean of the losses, the sum of the counts.
        """
        checkpoint, self._continued_from = self._continued_from, None
        files = sorted(checkpoint.glob("window_*.json")) if checkpoint else []
        if not files:
            return
        windows = {int(file.stem.partition("_")[2]): json.loads(file.read_text()) for file in files}
        self.progress.continued_tokens = sum(window["tokens"] for window in windows.values())
        rank, processes = self.args.process_index, self.args.world_size
        if len(windows) == processes:
            self.set_window_state(windows[rank])
        else:
            every = list(windows.values())
            shared = dict(windows[0], loss=sum(window["loss"] for window in every) / len(every))
            shared["tokens"] = sum(window["tokens"] for window in every) if rank == 0 else 0
            shared["router_batches"] = sum(window["router_batches"] for window in every)
            shared["router"] = {name: sum(w["router"].get(name, 0.0) for w in every) for name in windows[0]["router"]}
            self.set_window_state(shared)
        self._total_loss_scalar = -float(self._tr_loss)  # the library's `train_loss` is a mean over the steps from here
        if self.state.is_world_process_zero:
            for name, size in windows[0].get("logs", {}).items():
                log = Path(self.args.output_dir) / name
                if log.is_file() and log.stat().st_size > size:
                    os.truncate(log, size)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        state = self.window_state()
        if self.state.is_world_process_zero:
            logs = [Path(self.args.output_dir) / name for name in RUN_FILES]
            for log in filter(Path.is_file, logs):
                sync(log)  # a continued run relies on the rows up to here
            state["logs"] = {log.name: log.stat().st_size for log in logs if log.is_file()}
        write_json(Path(output_dir) / f"window_{self.args.process_index}.json", state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As saved; a process that did not exist then gets a state of its own, not that of step 1 again."""
        processes, rank = self.args.world_size, self.args.process_index
        name = f"rng_state_{rank}.pth" if processes > 1 else "rng_state.pth"
        if checkpoint is None or (Path(checkpoint) / name).is_file():
            return super()._load_rng_state(checkpoint)
        seed = (self.args.seed + 1_000_003 * (self.state.global_step + 1) + rank) % 2**32
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    # saving

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """The library writes aside; sealing and renaming follow, with --async_save while training goes on.

        Raises `UserError` on all processes when one of them cannot save; earlier checkpoints stay as they are.
        """
        self.finish_saving()
        target = Path(super()._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        aside = target.parent / ".writing-checkpoint"
        library = super()._save_checkpoint

        def write() -> None:
            self._writing = aside
            try:
                library(model, trial)
            finally:
                self._writing = None
            # The library knows where it was written, on all processes. A best step that was not saved is not the best
            # checkpoint.
            best = target.with_name(f"checkpoint-{self.state.best_global_step}")
            if best == target or best.is_dir():
                self.state.best_model_checkpoint = str(best)
                if self.args.should_save:
                    self.state.save_to_json(str(aside / target.name / "trainer_state.json"))

        self._together(target, lambda: self._clear(aside))
        self._together(target, write)
        best = self.state.best_model_checkpoint
        if not self.args.async_save:
            self._together(target, lambda: self._publish(aside / target.name, target, best))
        else:
            self._publisher = Thread(target=self._publish_later, args=(aside / target.name, target, best))
            self._publisher.start()

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is on the disk; all processes call it at the same place."""
        if self._publisher is None:
            return
        self._publisher.join()
        self._publisher, error, self._publishing_error = None, self._publishing_error, None

        def report() -> None:
            if error:
                raise error

        self._together(Path(self.args.output_dir), report)

    def _clear(self, aside: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def _publish(self, written: Path, target: Path, best: str | None) -> None:
        """Seal what was written, give it its name, delete what is no longer kept (the main process only)."""
        if not self.args.should_save:
            return
        seal(written, step=int(target.name.rpartition("-")[2]), resumable=not self.args.save_only_model)
        if target.exists():
            discard(target)
        os.replace(written, target)
        sync(target.parent)
        shutil.rmtree(written.parent, ignore_errors=True)
        rotate(target.parent, self.args.save_total_limit, self.args.keep_every, best)

    def _publish_later(self, written: Path, target: Path, best: str | None) -> None:
        try:
            self._publish(written, target, best)
        except Exception as error:  # raised again by finish_saving, on the main thread
            self._publishing_error = error

    def _together(self, target: Path, action: Callable[[], None]) -> None:
        """Run one phase of saving on all processes; when it fails on one, all raise the same `UserError`."""
        failure = ""
        try:
            action()
        except (OSError, RuntimeError, SafetensorError) as error:  # how torch and safetensors say "disk full"
            failure = " ".join(str(error).split())[:300] or type(error).__name__
            # Said now: where the others are still inside a collective operation, the next line ends in its error.
            print(f"process {self.args.process_index}: {failure}", file=sys.stderr, flush=True)
        failed = torch.tensor([bool(failure)], dtype=torch.int32, device=self.args.device)
        if not self.accelerator.gather(failed).any():
            return
        reasons = [reason for reason in gather_object([failure]) if reason]
        shutil.rmtree(target.parent / ".writing-checkpoint", ignore_errors=True)  # makes room
        free = shutil.disk_usage(target.parent).free / 2**20
        raise UserError(
            f"cannot save {target}: {reasons[0]} ({free:,.0f} MiB free there); earlier checkpoints are untouched: "
            "make room and run the same command again"
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Weights, config and tokenizer; the arguments as JSON, where the library would pickle them."""
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        unwrapped = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        # of an adapter that is its own reference only the trained copy
        only = {"selected_adapters": ["default"]} if isinstance(unwrapped, PeftModel) else {}
        unwrapped.save_pretrained(directory, state_dict=state_dict, **only)
        if self.args.should_save:
            save_tokenizer(self.processing_class, directory)
            write_json(directory / "training_arguments.json", json.loads(self.args.to_json_string()))

    # loading

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """By `from_pretrained`: on disk the experts of a MoE have other names than in memory."""
        target = self.model if model is None else model
        if not isinstance(target, SmolForCausalLM) or self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        try:
            saved = SmolForCausalLM.from_pretrained(resume_from_checkpoint, dtype=target.dtype)
            target.load_state_dict(saved.state_dict())
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{resume_from_checkpoint}: cannot load it: {reason}") from error
        return None

    def _load_best_model(self) -> None:
        """--load_best_model_at_end: the masters, too, which the final weights are cast from."""
        self.finish_saving()
        if self.is_sharded_by_engine():
            return super()._load_best_model()
        best = self.state.best_model_checkpoint
        assert best is not None, "the library asks only where there is one"
        self._load_from_checkpoint(best)
        masters, file = self.master_optimizer(), Path(best) / "optimizer.pt"
        if masters is not None and file.is_file():
            masters.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        elif masters is not None:  # --save_only_model
            masters.take_weights()
        return None

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """--eval_on_start is about the start of a run: a continued one has done it."""
        if skip_scheduler and self.state.global_step:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def load_states(self, checkpoint: str | None) -> None:
        """Optimizer and schedule as they were saved."""
        # torch makes the state of sharded weights by a step without gradients, which no loss has been scaled for.
        optimizer: Any = self.optimizer  # accelerate's, around torch's
        scaler = getattr(optimizer, "scaler", None)
        optimizer.scaler = None
        super()._load_optimizer_and_scheduler(checkpoint)
        optimizer.scaler = scaler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """State from the checkpoint, settings from the arguments: a longer or branched run follows its new plan."""
        names = ("initial_lr", "weight_decay", "betas", "eps")
        planned = [{name: group[name] for name in names if name in group} for group in self.optimizer.param_groups]
        self.load_states(checkpoint)
        if checkpoint is None:
            return
        self._continued_from = Path(checkpoint)
        schedule = self.lr_scheduler
        if not isinstance(schedule, LambdaLR) or not all("initial_lr" in settings for settings in planned):
            return
        for group, settings in zip(self.optimizer.param_groups, planned, strict=True):
            group.update(settings)
        schedule.base_lrs = [settings["initial_lr"] for settings in planned]
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate

    # the end

    def _finalize_training(self, *args: Any) -> Any:
        """The library's end, once the last checkpoint is on the disk: with --async_save it may yet have failed."""
        self.finish_saving()
        return super()._finalize_training(*args)

    # the plan

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """As the library, but a continued run logs, evaluates and saves as its arguments say, not its checkpoint."""
        position = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        self.state.train_batch_size = self._train_batch_size
        return position

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The library trains one step too many when a run was killed between its last checkpoint and its end."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple:
        """The library's counts, with --additional_steps more steps than were planned."""
        epochs, per_epoch, examples, samples, batch, batches, steps = super().set_initial_training_values(
            args, dataloader
        )
        if args.additional_steps:
            steps += args.additional_steps
            epochs, samples = -(-steps // per_epoch), steps * batch
        return epochs, per_epoch, examples, samples, batch, batches, steps
