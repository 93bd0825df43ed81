"""One run of a training script: its files, what determines its result, where it stands on disk.

A run leaves `run_settings.json` when it starts and `training_complete.json` when it is done, so that running
the same command again continues an interrupted run, does nothing for a finished one and refuses changed
settings.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from smol_config import SmolConfig
from smolkit.arguments import PlanArguments, StageArguments
from smolkit.checkpoints import describe_model
from smolkit.command_line import ADAMW, STAGES, RunArguments
from smolkit.doctor import expand_paths, validation_path
from smolkit.doctor.checkup import glance
from smolkit.errors import UserError, writing
from smolkit.files import write_json
from smolkit.manifest import (
    MANIFEST,
    checkpoints,
    clear_remains,
    discard,
    has_step,
    newest_whole,
    problem,
    step_of,
)
from smolkit.model_card import prepared_datasets, write_card
from smolkit.parallel import fsdp_version
from smolkit.reporters import WANDB_RUN, join_wandb_run
from smolkit.run_report import REPORT_FILES, RUN_FILES, write_report
from smolkit.runtime import compute_dtype, product_dtype, supports_bf16
from smolkit.shards import checksum, token_store

SETTINGS_FILE = "run_settings.json"  # what the run was started with; changed settings are refused
COMPLETE_FILE = "training_complete.json"  # written last; its presence means the directory is final
_COMPILATION_MINUTES = 30  # DeepSpeed's kernel for disks took 2 to 9 on two cores
# Arguments that a continued run may change, and why. Every other one, also those that a later library will bring, is
# taken for part of the result: it is written down when a run starts, and another value is refused.
_FREE = {
    "where it goes on, and what it survives": """
        config resume resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint skip_nonfinite""",
    "where it is written, and what is told of it": """
        output_dir run_name project trackio_space_id trackio_bucket_id trackio_static_space_id report_to log_level
        log_level_replica log_on_each_node logging_strategy logging_steps logging_first_step logging_nan_inf_filter
        include_num_input_tokens_seen skip_memory_metrics disable_tqdm debug peak_tflops sample_prompts sample_tokens
        push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision""",
    "when it is evaluated, on what and how": """
        eval_data_path max_eval_rows eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size
        prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps do_train do_eval""",
    "when it is saved, and what is made of it in the end": """
        save_strategy save_steps save_total_limit save_only_model save_on_each_node keep_every async_save save_dtype
        merge merged_dir""",
    "who reads the data": """
        data_cache_dir num_proc dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
        dataloader_prefetch_factor dataloader_multiprocessing_context""",
    "the layout, whose product is compared as global_batch_size, and the engine, whose kind is as strategy": """
        per_device_train_batch_size gradient_accumulation_steps local_rank ddp_find_unused_parameters
        ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed
        accelerator_config parallelism_config expert_parallel_size""",
    "how and where the same is computed, equal up to rounding": """
        use_cpu threads attn_implementation tf32 torch_compile torch_compile_backend torch_compile_mode
        gradient_checkpointing gradient_checkpointing_kwargs activation_offloading torch_empty_cache_steps
        full_determinism precompute_ref_log_probs precompute_ref_batch_size""",
}
FREE = frozenset(" ".join(_FREE.values()).split())


@dataclass
class Job:
    """A training run, resolved before any work.

    `files`, `eval_files`: data. `dtype`: of the weights in training, `save_dtype`: of the final ones.
    `finished`: nothing is left to do. `checkpoint`: where an interrupted run continues, or None.
    """

    args: RunArguments
    files: list[Path]
    eval_files: list[Path]
    dtype: torch.dtype
    save_dtype: torch.dtype
    settings: dict[str, Any]
    finished: bool
    checkpoint: str | None

    def announce(self, facts: dict[str, Any]) -> None:
        """Print what was resolved, on the main process."""
        if self.args.process_index == 0:
            width = max(map(len, facts))
            print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()), flush=True)

    def begin(self) -> None:
        """Make the output directory ready: settings written, traces of an earlier run removed."""
        if not self.args.should_save:
            return
        directory = Path(self.args.output_dir)
        start = Path(self.checkpoint) if self.checkpoint else None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / COMPLETE_FILE).unlink(missing_ok=True)
            clear_remains(directory)
            branched = start is not None and start.resolve().parent != directory.resolve()
            for old in checkpoints(directory):  # of another attempt, or beyond where this one continues
                if start is None or branched or step_of(old) > step_of(start):
                    discard(old)
            for name in (*RUN_FILES, *REPORT_FILES, WANDB_RUN):
                if start is None or branched:
                    (directory / name).unlink(missing_ok=True)
                if start is not None and branched and name in RUN_FILES and (start.parent / name).is_file():
                    shutil.copyfile(start.parent / name, directory / name)  # training cuts it back to the checkpoint
            write_json(directory / SETTINGS_FILE, self.settings)
            if "wandb" in self.args.report_to and self.args.process_index == 0:
                join_wandb_run(directory, self.args.project, self.args.run_name)
        except OSError as error:
            raise _unwritable(directory, error) from error

    def where(self) -> str:
        """Output directory, and the checkpoint the run continues from."""
        return self.args.output_dir + (f", continued from {self.checkpoint}" if self.checkpoint else "")

    def processes(self) -> str:
        """How many processes train, and what divides the work among them."""
        count = self.args.world_size
        return f"{count} processes, {sharding_engine(self.args) or 'DDP'}" if count > 1 else "1 process"


def one_gpu_per_process(args: RunArguments) -> None:
    """Keep a single process to one GPU: Trainer would split its batches over all of them by DataParallel, slower than a
    process for each, and with them what is said of a batch's documents."""
    if args.n_gpu > 1:
        print(
            f"note: torch sees {args.n_gpu} GPUs and this process takes the first; for all of them: torchrun "
            f"--nproc_per_node {args.n_gpu} and the same command",
            flush=True,
        )
        args._n_gpu = 1


def open_job(
    stage: StageArguments,
    args: RunArguments,
    suffixes: Sequence[str],
    models: Iterable[str | Path | None],
    **more: Any,
) -> Job:
    """Resolve a run from its arguments; changes nothing on disk.

    `suffixes`: of data files. `models`: directories the result depends on. `more`: other settings it depends
    on. Raises `UserError` for missing data, contradicting flags, and an output directory that is taken.
    """
    one_gpu_per_process(args)
    dtype = weights_dtype(stage.weights_dtype, args)
    check_disk_offload(args)
    check_compiler(args)
    if args.deepspeed_plugin and torch.distributed.is_initialized():
        join_deepspeed()
    assert stage.data_path, "validated"
    files = token_store(stage.data_path) or expand_paths(stage.data_path, suffixes)
    eval_files: list[Path] = []
    if stage.max_eval_rows:
        twins = (validation_path(path) for path in files)
        found = [path for path in dict.fromkeys(twins) if path is not None]
        named = stage.eval_data_path
        eval_files = token_store(named) or expand_paths(named, suffixes) if named else found
    if args.eval_strategy != "no" and not eval_files:
        why = "--max_eval_rows is 0" if not stage.max_eval_rows else "there is no file in validation/ beside the data"
        raise UserError(f"nothing to evaluate on every so many steps (--eval_steps): {why}; name --eval_data_path")
    inputs = dict.fromkeys(str(path) for path in (*files, *models) if path is not None)
    engine = sharding_engine(args)  # its checkpoints are its own; where it puts its parts does not matter
    more["strategy"] = engine and engine.partition(",")[0]
    settings = run_settings(stage, args, inputs, weights=str(dtype), **more)
    finished, checkpoint, notes = _agreed(args, lambda: find_start(args, settings, stage.resume))
    if finished and args.process_index == 0:
        print(f"{args.output_dir} is already trained with these settings; nothing to do")
    warnings = [] if finished else glance(files, eval_files)  # by every process: a problem must stop them all
    warnings = [*notes, *slow_arithmetic(dtype, args), *warnings]
    if args.process_index == 0:
        print("".join(f"warning: {warning}\n" for warning in warnings), end="", flush=True)
    save_dtype = dtype if stage.save_dtype == "auto" else compute_dtype(stage.save_dtype)
    return Job(args, files, eval_files, dtype, save_dtype, settings, finished, checkpoint)


def complete(args: RunArguments, step: int, config: SmolConfig, facts: dict[str, Any]) -> None:
    """Leave the arguments as JSON, the report with its verdict, the model card, and the mark of a finished run."""
    directory = Path(args.output_dir)
    facts = {"model": describe_model(config), "datasets": prepared_datasets(directory), **facts}
    with writing(directory):
        write_json(directory / "training_arguments.json", json.loads(args.to_json_string()))
        print(write_report(directory, finished=True), flush=True)
        write_card(directory, facts)
        write_json(directory / COMPLETE_FILE, {"step": step, "facts": facts})


def leave(trainer: Any) -> None:
    """Wait for all processes and end their group, the last thing a run does (call it on all of them).

    Left to the interpreter's end, a thread of gloo's that still gives back a tensor aborts the process (seen once, as
    "terminate called without an active exception" after everything had been written).
    """
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def sharding_engine(args: RunArguments) -> str | None:
    """What divides weights or optimizer state among processes; None under DDP and with one process."""
    if args.deepspeed_plugin:
        zero = args.deepspeed_plugin.hf_ds_config.config.get("zero_optimization", {})
        name = f"DeepSpeed ZeRO-{zero.get('stage', 0)}"
        for key, part in (("offload_optimizer", "optimizer"), ("offload_param", "weights")):
            device = zero.get(key, {}).get("device", "none")
            name += f", {part} on {device}" if device != "none" else ""
        return name
    version = fsdp_version(args)
    return f"FSDP{version}" if version else None


def check_disk_offload(args: RunArguments) -> None:
    """`UserError` when a DeepSpeed file offloads to a disk that is not there, or DeepSpeed lacks what it needs."""
    zero = args.deepspeed_plugin.hf_ds_config.config.get("zero_optimization", {}) if args.deepspeed_plugin else {}
    parts = [zero.get(name, {}) for name in ("offload_optimizer", "offload_param")]
    paths = [part.get("nvme_path") for part in parts if part.get("device") == "nvme"]
    if not paths:
        return
    for path in paths:
        if not path or not os.access(path, os.W_OK):
            raise UserError(f"the DeepSpeed file's nvme_path {path} is no writable directory; name one on a local disk")
    if parts[1].get("device") == "nvme" and not (args.bf16 or args.fp16):
        raise UserError(
            "DeepSpeed keeps weights on a disk in 16 bits, also those of a run in fp32: add --bf16 true, or set the "
            "device of offload_param to cpu"
        )
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import _get_build_directory

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError("offload to disk needs libaio's headers (package libaio-dev); install them, or offload to cpu")
    # Whoever finds it waits until it is gone; a compilation that was killed leaves it for ever.
    lock = Path(_get_build_directory(AsyncIOBuilder.NAME, verbose=False)) / "lock"
    if lock.exists() and (minutes := (time.time() - lock.stat().st_mtime) / 60) > _COMPILATION_MINUTES:
        raise UserError(
            f"DeepSpeed would wait for a compilation that began {minutes:.0f} minutes ago and was probably killed; "
            f"if none is running, delete {lock}"
        )


def check_compiler(args: RunArguments) -> None:
    """`UserError` when --torch_compile would find no compiler in the first step: for C++ on a CPU, for C on a GPU."""
    if not args.torch_compile:
        return
    language, variable, usual = ("C++", "CXX", "g++ clang++") if args.device.type == "cpu" else ("C", "CC", "gcc clang")
    names = os.environ.get(variable) or usual
    if not any(map(shutil.which, names.split())):
        raise UserError(
            f"--torch_compile needs a {language} compiler, and there is none ({names.replace(' ', ', ')}): install one "
            f"(g++), name another with {variable}, or leave the flag out"
        )


def join_deepspeed() -> None:
    """Let DeepSpeed use the process group: on CPUs accelerate leaves this out, and ZeRO-3 could not load weights."""
    import deepspeed

    # It would compile a kernel for sums among CPU processes, and wait for ever if another compilation was killed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(torch.distributed.get_backend(), verbose=False)


def load_on_every_process(args: RunArguments) -> None:
    """Under FSDP every process reads the weights itself, whatever the launcher's file says.

    With `cpu_ram_efficient_loading` only the first process has them until FSDP wraps the model for training. A model
    that is used before (TRL shards a reference without broadcasting it) would compute with uninitialised memory.
    """
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # read by transformers and accelerate when they load
    if args.fsdp_plugin_args:
        args.fsdp_plugin_args["cpu_ram_efficient_loading"] = False


def weights_dtype(name: str, args: RunArguments) -> torch.dtype:
    """Dtype of the weights in training for `--weights_dtype`; `UserError` when flags contradict."""
    engine = sharding_engine(args)
    reason = (
        f"{args.mixed_precision} autocast" if args.mixed_precision != "no"
        else engine if engine
        else f"--optim {args.optim.value}" if args.optim.value not in ADAMW
        else None
    )  # fmt: skip
    if name == "bf16" and reason:
        raise UserError(f"--weights_dtype bf16 contradicts {reason}, which wants fp32 weights; leave one out")
    return torch.float32 if reason else compute_dtype(name)


def slow_arithmetic(dtype: torch.dtype, args: RunArguments) -> list[str]:
    """A word where bf16 was asked for and the device computes it in software."""
    if product_dtype(args.mixed_precision, dtype) != torch.bfloat16 or supports_bf16(args.device):
        return []
    return ["this device has no instructions for bf16 and computes it many times slower than fp32: leave out --bf16"]


def run_settings(
    stage: StageArguments, args: RunArguments, inputs: Iterable[str | Path], **more: Any
) -> dict[str, Any]:
    """What determines the result of a run: all arguments but `FREE` ones, and a fingerprint of every input file."""
    planned = {item.name for item in fields(PlanArguments)}
    given = asdict(stage) | args.to_dict()
    settings = {name: value for name, value in given.items() if name not in FREE | planned}
    settings |= more
    layout = (args.world_size, args.train_batch_size, args.gradient_accumulation_steps)
    settings |= {"global_batch_size": math.prod(layout), "layout": layout}
    if args.resume_from_checkpoint:
        settings["branched_from"] = str(Path(args.resume_from_checkpoint).resolve())
    settings["inputs"] = {str(path): fingerprint(path) for path in inputs}
    return json.loads(json.dumps(settings))


def fingerprint(path: str | Path) -> str:
    """Size and checksum of a file, or hash of a model directory's main files."""
    path = Path(path)
    if path.is_dir():
        patterns = ("*.safetensors", "config.json", "tokenizer.json", "vocab.json", "merges.txt")
        names = sorted(name for pattern in patterns for name in path.glob(pattern))
        return hashlib.sha256(" ".join(fingerprint(name) for name in names).encode()).hexdigest()[:16]
    return f"{path.stat().st_size}:{checksum(path)}"


Start = tuple[bool, str | None, list[str]]


def _agreed(args: RunArguments, decide: Callable[[], Start]) -> Start:
    """What the main process decides: only one of them reads the checkpoints, and none can see another state of them.

    Raises its `UserError` on all processes.
    """
    if args.world_size == 1:
        return decide()
    decision: list[Any] = [None]
    if args.process_index == 0:
        try:
            decision = [decide()]
        except UserError as error:
            decision = [error]
    broadcast_object_list(decision)
    if isinstance(decision[0], UserError):
        raise decision[0]
    return decision[0]


def find_start(args: RunArguments, settings: dict[str, Any], resume: str) -> Start:
    """(finished, checkpoint to continue from, remarks) for an output directory. Changes nothing on disk.

    Raises `UserError` when the directory belongs to a run with other settings or to something else, when it cannot be
    written, and when there are checkpoints but none is whole.
    """
    directory, named = Path(args.output_dir), args.resume_from_checkpoint
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--output_dir {directory} is a file; name a directory")
    if named and resume == "never":
        raise UserError("--resume never and --resume_from_checkpoint contradict each other; leave one out")
    _try_writing(directory)
    own = _own_checkpoint(directory, named)
    if own and not _went_back(directory, settings):
        return False, str(own), _check_named(named)  # back to an earlier step of this run, with whatever settings
    try:
        before = json.loads((directory / SETTINGS_FILE).read_text())
    except (OSError, ValueError):
        foreign = [name for name in ("config.json", "adapter_config.json") if (directory / name).exists()]
        foreign += [path.name for path in directory.glob("checkpoint-*")]
        if foreign:  # starting over would overwrite or delete it
            raise UserError(
                f"{directory} holds {foreign[0]}, which this script did not write; use another --output_dir"
            ) from None
        return False, named, _check_named(named)
    if resume == "never":
        return False, None, []
    if not named and "branched_from" in before:
        settings["branched_from"] = before["branched_from"]
    notes = _compare(directory, before, settings)
    more = settings["additional_steps"] - before.get("additional_steps", 0)
    if (directory / COMPLETE_FILE).is_file() and not more:
        return True, None, []
    checkpoint, skipped = newest_whole(directory)
    if own and checkpoint is not None and step_of(checkpoint) < step_of(own):
        checkpoint = None  # of the time before the run went back
    if checkpoint is None and skipped:
        raise UserError(
            f"no checkpoint of {directory} is whole: {'; '.join(skipped)}. Restore one, name another with "
            "--resume_from_checkpoint, or start over with --resume never"
        )
    if checkpoint is None and more:
        raise UserError(f"--additional_steps {args.additional_steps}: {directory} has no checkpoint to continue from")
    notes += [f"skipped {line}" for line in skipped]
    if checkpoint is None:
        return False, named, [*notes, *_check_named(named)]
    return False, str(checkpoint), notes


def _own_checkpoint(directory: Path, named: str | None) -> Path | None:
    """The checkpoint of `directory` that is named, links followed; `UserError` for one whose name tells no step."""
    if named is None or Path(named).resolve().parent != directory.resolve():
        return None
    own = directory / Path(named).resolve().name
    if not has_step(own):
        _check_named(named)
        raise UserError(
            f"--resume_from_checkpoint {named}: in --output_dir a checkpoint is called checkpoint-N; rename it, or "
            "move it elsewhere to branch off"
        )
    return own


def _went_back(directory: Path, settings: dict[str, Any]) -> bool:
    """Whether the run in `directory` is the one that this very command started from a checkpoint of it."""
    try:
        _compare(directory, json.loads((directory / SETTINGS_FILE).read_text()), settings)
    except (OSError, ValueError):
        return False
    return True


def _try_writing(directory: Path) -> None:
    """`UserError` if files cannot be made where `directory` is or will be; leaves no trace."""
    place = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise _unwritable(directory, error) from error


def _unwritable(directory: Path, error: OSError) -> UserError:
    return UserError(f"--output_dir {directory}: cannot write there: {error.strerror or error}; use another directory")


def _check_named(named: str | None) -> list[str]:
    """Remarks on --resume_from_checkpoint; `UserError` when it cannot be continued from."""
    if not named:
        return []
    if not (Path(named) / "trainer_state.json").is_file():
        raise UserError(f"--resume_from_checkpoint {named}: not a training checkpoint")
    if not (Path(named) / MANIFEST).is_file():
        return [f"{named} has no {MANIFEST}: it is used unchecked, as another tool wrote it"]
    if reason := problem(Path(named)):
        raise UserError(f"--resume_from_checkpoint {named}: {reason}")
    return []


def _compare(directory: Path, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Remarks on how a run is continued; `UserError` if its settings are not those it was started with.

    A setting that was not written down, or that a library has no longer, is no change: another version wrote the
    record. One of ours that only the record has is: it is another stage's.
    """
    ours = {item.name for kinds in STAGES.values() for item in fields(kinds[0])} | {"new_model"}
    known = (before.keys() & (now.keys() | ours) | {"branched_from"}) - {"layout", "additional_steps"}
    changed = [name for name in known if now.get(name) != before.get(name)]
    if changed:
        raise UserError(
            f"{directory} holds a run with other settings: {_difference(before, now, min(changed))}; "
            "use another --output_dir, or --resume never to start over"
        )
    extra = before.get("additional_steps", 0)
    if now["additional_steps"] < extra:
        raise UserError(
            f"{directory} holds a run with --additional_steps {extra}, not {now['additional_steps']}; "
            f"give {extra} or more"
        )
    if before["layout"] == now["layout"]:
        return []
    old, new = (f"{world} x {size} x {steps}" for world, size, steps in (before["layout"], now["layout"]))
    if (now["strategy"] or "").startswith("DeepSpeed") and before["layout"][0] != now["layout"][0]:
        raise UserError(
            f"{directory} was trained by {before['layout'][0]} processes, which DeepSpeed splits checkpoints over; "
            f"continue with as many, not {now['layout'][0]}"
        )
    return [f"continues with {new} (processes x batch x accumulation) instead of {old}: equal up to rounding"]


def _difference(before: dict[str, Any], now: dict[str, Any], name: str) -> str:
    """What changed in one setting; for the inputs, which file."""
    old, new = before.get(name), now.get(name)
    if name == "global_batch_size":
        old, new = (f"{each[name]} ({' x '.join(map(str, each['layout']))})" for each in (before, now))
        return f"the global batch (processes x batch x accumulation) was {old} and is now {new}"
    if name != "inputs" or not isinstance(old, dict) or not isinstance(new, dict):
        return f"{name} was {old!r} and is now {new!r}"
    path = min(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    return f"{path} {'has changed' if path in old and path in new else 'is not an input of both'}"
