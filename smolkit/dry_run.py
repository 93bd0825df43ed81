"""`--dry_run`: the plan of a training run from its arguments, as text or JSON. Nothing is written or allocated.

What the run would read may be missing (a recipe is planned before its data is there): the plan names it, and takes
the shape from --plan_model and the amount of data from --data_tokens or --data_rows instead.
"""

import json
import math
import os
import statistics
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_pt_utils import AcceleratorConfig

from smol_config import PRESETS, SmolConfig, count_parameters
from smolkit import planner
from smolkit.adapters import lora_config, policy_of
from smolkit.arguments import (
    AdapterArguments,
    DpoArguments,
    NewModelArguments,
    PretrainArguments,
    StageArguments,
    refuse_spread_adapters,
)
from smolkit.checkpoints import changed_preset, load_tokenizer, read_config, row_length
from smolkit.command_line import RunArguments, losses
from smolkit.doctor import (
    PRETRAIN_SUFFIXES,
    RECORD_SUFFIXES,
    expand_paths,
    read_dpo,
    read_pretrain,
    read_sft,
    read_texts,
)
from smolkit.errors import UserError
from smolkit.files import read_lines
from smolkit.parallel import check_expert_parallel
from smolkit.planner import GB, Work, amount, short
from smolkit.runs import sharding_engine, weights_dtype
from smolkit.runtime import has_accelerator, supports_bf16
from smolkit.shards import token_store
from smolkit.upcycle import upcycled_config

SAMPLE_ROWS = 200  # looked at in each file
BYTES_PER_TOKEN = 4.0  # without a tokenizer: English text in a BPE of some 50,000 entries
FILL = {"pretrain": 0.98, "sft": 0.98, "lora": 0.98}  # real tokens in packed rows, as benchmarks.packing measures
DEBUGGING = {
    "CUDA_LAUNCH_BLOCKING": "makes every kernel wait: for finding errors, not for speed",
    "NCCL_P2P_DISABLE": "sends what GPUs exchange through the host: for broken links only",
    "NCCL_IB_DISABLE": "switches InfiniBand off: for broken networks only",
}


def dry_run(
    kind: str,
    stage: StageArguments,
    args: RunArguments,
    new: NewModelArguments | None = None,
) -> dict[str, Any]:
    """Print the plan (on the main process) and return it as a dict of plain values.

    kind: pretrain, sft, lora or dpo. `UserError` where the run would raise one for
    its arguments.
    """
    plan = make_plan(kind, stage, args, new)
    if args.process_index == 0:
        print(json.dumps(plan, indent=1) if stage.plan_format == "json" else as_text(plan), flush=True)
    return plan


def make_plan(
    kind: str,
    stage: StageArguments,
    args: RunArguments,
    new: NewModelArguments | None,
) -> dict[str, Any]:
    """See `dry_run`."""
    refuse_contradictions(stage, new, args)
    missing: list[str] = []
    warnings: list[str] = []
    tokenizer = find_tokenizer(stage, missing)
    config = find_config(stage, new, tokenizer, missing)
    data = find_data(kind, stage, tokenizer, missing)
    plan: dict[str, Any] = {"stage": kind, "missing": missing, "warnings": warnings, "data": data}
    plan["arguments"] = resolved(stage, new, args)
    warnings += [
        f"{name}={os.environ[name]} {why}" for name, why in DEBUGGING.items() if os.environ.get(name, "0") != "0"
    ]
    if config is None:
        return plan
    work = make_work(kind, stage, args, config)
    args.check_router(config.num_experts)
    check_expert_parallel(stage.expert_parallel_size, config, args, work.devices)
    if work.trained is not None:
        refuse_spread_adapters(stage.expert_parallel_size)
        assert isinstance(stage, AdapterArguments)
        lora_config(stage, config, _start(stage) or "the model")
    total, active = count_parameters(config)
    plan["model"] = {
        "architecture": config.native_type(),
        "total_parameters": total,
        "active_parameters": active,
        "trained_parameters": total if work.trained is None else work.trained,
        "vocabulary": config.vocab_size,
    }
    if tokenizer is not None and config.vocab_size > len(tokenizer):
        plan["model"]["padded_rows"] = config.vocab_size - len(tokenizer)
    plan["steps"] = steps = count_steps(kind, stage, args, work, data, find_before(stage, args))
    capacity, host, where = find_devices(stage, work)
    asked = asked_strategy(args, stage)
    lines = planner.compare(work, capacity, host, asked=asked, bf16=has_bf16(stage))
    plan["memory"] = {
        "device_bytes": capacity,
        "device": where,
        "asked": asked,
        "strategies": lines,
    }
    plan["time"] = find_time(kind, stage, args, work, steps)
    warnings += planner.check_parameters(
        config, *map(amount, (stage.expect_parameters, stage.expect_active_parameters))
    )
    warnings += planner.check_batch(work, _whole(stage.expect_tokens_per_step))
    warnings += planner.check_epochs(steps["epochs"], stage.expect_epochs)
    if steps["steps"]:
        schedule = (steps["schedule"]["kind"], steps["schedule"]["warmup_steps"], steps["steps"])
        warnings += planner.check_schedule(*schedule, steps["extended_from"])
    warnings += planner.check_fit(work, lines, asked, capacity)
    if asked.endswith("-fp32") and has_bf16(stage) and "FLOP/s" in (plan["time"]["from"] or ""):
        warnings.append(
            f"{asked}: this run computes in float32, and the time is right only if the FLOP/s are, too: --bf16 true "
            "computes in 16 bits"
        )
    if getattr(stage, "ref_model_path", None) not in (None, getattr(stage, "model_path", None)):
        warnings.append("--ref_model_path is not --model_path: policy and reference have to start from one SFT model")
    return plan


def refuse_contradictions(stage: StageArguments, new: NewModelArguments | None, args: RunArguments) -> None:
    """`UserError` where the run would raise one before it looks at its data. What depends on this machine (a compiler,
    a GPU for --qlora) is left to the run, which may have another."""
    weights_dtype(stage.weights_dtype, args)
    if args.resume_from_checkpoint and stage.resume == "never":
        raise UserError("--resume never and --resume_from_checkpoint contradict each other; leave one out")
    if getattr(stage, "base_model", None) and new is not None and new.wants_new_model():
        raise UserError("--base_model contradicts the flags of a new model (--model_size ...); leave one out")
    if isinstance(stage, DpoArguments):
        losses(args, stage.rpo_alpha)
        if stage.use_lora or Path(stage.model_path or "").is_dir():  # else it may become an adapter yet
            policy_of(stage)


# --- what is there ------------------------------------------------------------------------------------------


def find_tokenizer(stage: StageArguments, missing: list[str]) -> Any:
    """The tokenizer, or None with a line in `missing`."""
    directory = stage.tokenizer_path or _start(stage)
    if directory is None:
        missing.append("--tokenizer_path: none given; the preset's vocabulary is assumed")
        return None
    try:
        return load_tokenizer(directory, stage.tokenizer_type)
    except UserError as error:
        missing.append(f"tokenizer: {error}; text is taken as {BYTES_PER_TOKEN:g} bytes per token")
        return None


def _start(stage: StageArguments) -> str | None:
    """The checkpoint a run starts from."""
    names = ("base_model", "model_path", "upcycle_from")
    return next(filter(None, (getattr(stage, name, None) for name in names)), None)


def find_config(
    stage: StageArguments, new: NewModelArguments | None, tokenizer: Any, missing: list[str]
) -> SmolConfig | None:
    """The configuration of the checkpoint or of the new model; of --plan_model where the checkpoint is missing."""
    start = _start(stage)
    overrides = new.overrides() if new is not None else {}
    if start and (Path(start) / "config.json").is_file():
        found = read_config(start)
        if isinstance(stage, PretrainArguments) and stage.upcycle_from:
            return upcycled_config(found, stage, overrides)
        return found
    if start:
        missing.append(f"model: {start} is not there (yet)")
    size = (new.model_size if new is not None else None) or stage.plan_model
    if size is None:
        missing.append("the model's shape: name a preset or a directory with --plan_model")
        return None
    if Path(size, "config.json").is_file():
        return read_config(size)
    rows = (new.vocab_size if new is not None else None) or (len(tokenizer) if tokenizer is not None else None)
    if rows is not None and "vocab_size" not in overrides:
        multiple = new.pad_vocab_to_multiple_of if new is not None else 1
        overrides["vocab_size"] = -(-rows // multiple) * multiple
    if size not in PRESETS:
        raise UserError(f"{size} is neither a preset nor a model directory; presets: {', '.join(PRESETS)}")
    return changed_preset(size, overrides)


def find_data(kind: str, stage: StageArguments, tokenizer: Any, missing: list[str]) -> dict[str, Any]:
    """Rows and tokens of the training data: given by flags, else estimated from a sample of every file."""
    assert stage.data_path, "validated"
    given = {"rows": _whole(stage.data_rows), "tokens": _whole(stage.data_tokens)}
    if (store := token_store(stage.data_path)) and not any(given.values()):
        return stored(store[0])
    try:
        files = store or expand_paths(stage.data_path, PRETRAIN_SUFFIXES if kind == "pretrain" else RECORD_SUFFIXES)
    except UserError as error:
        missing.append(f"data: {error}")
        return given | {"files": 0, "source": "given" if any(given.values()) else "unknown"}
    if any(given.values()):
        return given | {"files": len(files), "source": "given"}
    rows = tokens = 0.0
    for file in files:
        counted = sample_file(file, {"pretrain": read_pretrain, "dpo": read_dpo}.get(kind, read_sft), tokenizer)
        rows, tokens = rows + counted[0], tokens + counted[1]
    return {
        "rows": round(rows),
        "tokens": round(tokens),
        "files": len(files),
        "source": f"{SAMPLE_ROWS} rows of each file",
    }


def stored(manifest: Path) -> dict[str, Any]:
    """Rows and tokens of a directory of tokens, as it has counted them; `UserError` when it does not say."""
    try:
        counts = json.loads(manifest.read_text(encoding="utf-8"))["counts"]
        return {"rows": counts["records"], "tokens": counts["tokens"], "files": 1, "source": "a directory of tokens"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest.parent}: not a token store: {manifest.name} is unreadable ({error!r})") from error


def sample_file(file: Path, read: Any, tokenizer: Any) -> tuple[float, float]:
    """(rows, tokens) of a data file, from its first rows and its size. Raises `UserError` for a bad row among them."""
    first = list(islice(read(file), SAMPLE_ROWS))
    if not first:
        return 0.0, 0.0
    texts = [" ".join(texts) for texts in islice(read_texts(file), SAMPLE_ROWS)]
    size = sum(len(text.encode()) for text in texts)
    tokens = size / BYTES_PER_TOKEN
    if tokenizer is not None:
        tokens = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    rows = count_rows(file, size / len(texts))
    return rows, tokens / len(texts) * rows


def count_rows(file: Path, text_bytes: float) -> float:
    """Rows of a file: exact for Parquet and for short files, else its size over that of the first lines."""
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(file).num_rows
    if file.suffix == ".txt":
        return file.stat().st_size / text_bytes
    with open(file, "rb") as handle:
        head = handle.read(2**24)
        size, lines = file.stat().st_size, head.count(b"\n") + (not head.endswith(b"\n"))
    return lines if len(head) == size else lines * size / len(head)


def find_before(stage: StageArguments, args: RunArguments) -> int | None:
    """Steps planned for the run in the output directory that this one extends, whatever it was extended by since; None
    when there is none."""
    states = sorted(
        Path(args.output_dir).glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime
    )
    try:
        steps = json.loads(states[-1].read_text())["max_steps"]
    except (IndexError, KeyError, ValueError, OSError):
        return None
    try:
        return steps - json.loads((states[-1].parent / "training_arguments.json").read_text())["additional_steps"]
    except (KeyError, ValueError, OSError):  # written by another tool
        return steps


def find_devices(stage: StageArguments, work: Work) -> tuple[float | None, float | None, str]:
    """(bytes of a device, bytes of the machine, in words), given or detected."""
    given, host = amount(stage.device_memory), amount(stage.host_memory)
    if host is None and hasattr(os, "sysconf"):
        host = None if given else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if given:
        return given, host, f"{work.devices} x {given / GB:g} GB (given)"
    if has_accelerator() and torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory
        return size, host, f"{work.devices} x {torch.cuda.get_device_name(0)}, {size / GB:.0f} GB"
    if host is not None and work.device == "cpu":
        return (
            host / work.devices,
            None,
            f"CPU, {host / GB:.0f} GB for {work.devices} process{'es' * (work.devices > 1)}",
        )
    return None, host, "unknown; give --device_memory"


# --- what will be done --------------------------------------------------------------------------------------


def make_work(
    kind: str,
    stage: StageArguments,
    args: RunArguments,
    config: SmolConfig,
) -> Work:
    """The numbers of a micro-batch and of the devices."""
    length = getattr(stage, "block_size", None) if kind == "pretrain" else args.max_length
    flag, default = ("--block_size", 512) if kind == "pretrain" else ("--max_length", 1024)
    devices = stage.num_devices or max(args.world_size, torch.cuda.device_count() if args.world_size == 1 else 1)
    on_gpu = has_accelerator() or stage.device_memory is not None
    lora = kind == "lora" or getattr(stage, "use_lora", False)
    adapter = stage if lora and isinstance(stage, AdapterArguments) else None
    aside = kind == "dpo" and not lora and not args.precompute_ref_log_probs
    try:
        return Work(
            config,
            rows=args.per_device_train_batch_size * (2 if kind == "dpo" else 1),
            length=row_length(length, default, config, flag),
            accumulation=args.gradient_accumulation_steps,
            devices=devices,
            device="cuda" if on_gpu else "cpu",
            gradient_checkpointing=args.gradient_checkpointing,
            expert_parallel_size=stage.expert_parallel_size,
            trained=planner.lora_parameters(config, adapter.lora_r, adapter.lora_target) if adapter else None,
            reference=aside,
            base_bits=4 if adapter and adapter.qlora else None,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def count_steps(
    kind: str, stage: StageArguments, args: RunArguments, work: Work, data: dict[str, Any], before: int | None
) -> dict[str, Any]:
    """Tokens per step, steps, epochs and the schedule."""
    if kind == "dpo" or not getattr(args, "packing", True):  # a row is a pair, or one conversation
        share = args.per_device_train_batch_size * work.accumulation * work.devices
        per_epoch = data["rows"] / share if data["rows"] else None
    else:
        per_epoch = data["tokens"] / FILL[kind] / work.tokens_per_step if data["tokens"] else None
    more = args.additional_steps
    steps = args.max_steps if args.max_steps > 0 else None
    if steps is None and per_epoch is not None:
        steps = math.ceil(args.num_train_epochs * max(1, math.ceil(per_epoch)))
    if steps is not None and more:
        before = before or steps
        steps = before + more
    warmup = args.get_warmup_steps(steps) if steps else None
    return {
        "rows_per_device": work.rows,
        "row_length": work.length,
        "accumulation": work.accumulation,
        "devices": work.devices,
        "tokens_per_step": work.tokens_per_step,
        "steps": steps,
        "extended_from": before if steps and before and before < steps else None,
        "tokens": steps * work.tokens_per_step if steps else None,
        "epochs": steps / per_epoch if steps and per_epoch else None,
        "schedule": {
            "kind": args.lr_scheduler_type.value,
            "learning_rate": args.learning_rate,
            "warmup_steps": warmup,
            "settings": args.lr_scheduler_kwargs or {},
        },
    }


def has_bf16(stage: StageArguments) -> bool:
    """Whether the devices planned for compute in bf16: another machine's (`--device_memory`) do."""
    return stage.device_memory is not None or supports_bf16()


def asked_strategy(args: RunArguments, stage: StageArguments) -> str:
    """The planner's name for what the flags and the launcher ask for."""
    wide = "-fp32" * (args.mixed_precision == "no")  # engines keep fp32 weights and compute in what --bf16 says
    if args.deepspeed_plugin is not None:
        engine = args.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        where = engine.get("offload_optimizer", {}).get("device", "none")
        offload = {"none": "", "nvme": "-nvme"}.get(where, "-offload")
        return f"zero-{engine.get('stage', 0)}{offload}{wide}"
    if sharding_engine(args):  # FSDP, by a flag or by accelerate's launcher
        return "fsdp2" + wide
    if args.mixed_precision != "no":
        return "ddp-autocast"
    fp32 = stage.weights_dtype == "fp32" or (stage.weights_dtype == "auto" and not has_bf16(stage))
    return "ddp-fp32" if fp32 else "ddp"


def find_time(
    kind: str, stage: StageArguments, args: RunArguments, work: Work, steps: dict[str, Any]
) -> dict[str, Any]:
    """Seconds of the whole run, and where the speed comes from: given, measured here before, or from FLOP/s."""
    speed = amount(stage.tokens_per_second)
    source: str | None = "--tokens_per_second"
    flops = amount(stage.device_flops)
    if speed is None and flops is None and (speed := measured_speed(Path(args.output_dir))):
        source = "timing.jsonl of the output directory"
    if speed is None:
        mfu = stage.mfu or planner.TYPICAL_MFU
        if flops is None and torch.cuda.is_available():
            flops = planner.device_flops(torch.cuda.get_device_name(0))
        source = f"{mfu:.0%} of {short(flops)}FLOP/s per device" if flops else None
    else:
        mfu = planner.TYPICAL_MFU
    seconds = planner.training_seconds(steps["tokens"], work, speed, flops, mfu) if steps["tokens"] else None
    reference = 4 / 3 if kind == "dpo" and speed is None else 1  # one more forward pass beside forward and backward
    return {
        "seconds": seconds * reference if seconds else None,
        "tokens_per_second": steps["tokens"] / (seconds * reference) if seconds else None,
        "from": source,
    }


def measured_speed(directory: Path) -> float | None:
    """The median tokens per second of a run in the directory."""
    try:
        rows = [json.loads(line) for line in read_lines(directory / "timing.jsonl")]
    except (OSError, ValueError):
        return None
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    return statistics.median(speeds) if speeds else None


def resolved(stage: StageArguments, new: NewModelArguments | None, args: RunArguments) -> dict[str, Any]:
    """Every argument of the stage, and those of the library that differ from its defaults here."""
    defaults = {name: field.default for name, field in type(args).__dataclass_fields__.items()}
    values = json.loads(args.to_json_string())
    changed = {name: value for name, value in values.items() if name in defaults and value != defaults[name]}
    changed.pop("hub_token", None)  # always shown as "<HUB_TOKEN>", given or not
    filled_in = AcceleratorConfig().to_dict()  # always, but for what the arguments take out of it
    if changed.get("accelerator_config", {}).items() <= filled_in.items():
        changed.pop("accelerator_config", None)
    keep = (
        "output_dir learning_rate lr_scheduler_type max_steps num_train_epochs per_device_train_batch_size seed".split()
    )
    return {**vars(stage), **(vars(new) if new else {}), **changed, **{name: values[name] for name in keep}}


def _whole(text: str | float | None) -> int | None:
    value = amount(text)
    return None if value is None else round(value)


# --- as text ------------------------------------------------------------------------------------------------


def as_text(plan: dict[str, Any]) -> str:
    """The plan for people."""
    out = ["plan (nothing is trained or written)"]
    arguments = {name: value for name, value in plan["arguments"].items() if value not in (None, [], {}, "", False)}
    out += ["", "arguments", *(f"  {name:<28}{value}" for name, value in sorted(arguments.items()))]
    if "model" in plan:
        out += ["", *_model_lines(plan["model"])]
    data = plan["data"]
    counts = [f"{data[name]:,} {name}" for name in ("rows", "tokens") if data[name]]
    out += ["", f"data      {', '.join(counts) or 'unknown amount'} ({data['source']}; {data['files']} files)"]
    if "steps" in plan:
        out += _step_lines(plan["steps"]) + _time_lines(plan["time"]) + ["", *_memory_lines(plan["memory"])]
    out += ["", *(f"missing   {line}" for line in plan["missing"])] if plan["missing"] else []
    out += ["", *(f"warning   {line}" for line in plan["warnings"])] if plan["warnings"] else []
    return "\n".join(out)


def _model_lines(model: dict[str, Any]) -> list[str]:
    active = f", {model['active_parameters']:,} active per token" * (
        model["active_parameters"] != model["total_parameters"]
    )
    trained = f", {model['trained_parameters']:,} trained" * (model["trained_parameters"] != model["total_parameters"])
    padded = f", {model['padded_rows']:,} of its rows beyond the tokenizer's" if "padded_rows" in model else ""
    return [
        f"model     {model['architecture']}, {model['total_parameters']:,} parameters{active}{trained}",
        f"          vocabulary {model['vocabulary']:,}{padded}",
    ]


def _step_lines(steps: dict[str, Any]) -> list[str]:
    schedule = steps["schedule"]
    product = [steps[name] for name in ("rows_per_device", "row_length", "accumulation", "devices")]
    lines = [
        f"step      {steps['tokens_per_step']:,} tokens = {product[0]} rows x {product[1]} tokens x {product[2]} "
        f"micro-batches x {product[3]} devices"
    ]
    if steps["steps"]:
        epochs = f", {steps['epochs']:.3g} epochs" if steps["epochs"] else ""
        lines.append(f"steps     {steps['steps']:,} ({steps['tokens']:,} tokens{epochs})")
    else:
        lines.append("steps     unknown: give --data_tokens (--data_rows for pairs and without packing) or --max_steps")
    warmup = f", {schedule['warmup_steps']:,} steps of warmup" if schedule["warmup_steps"] is not None else ""
    lines.append(f"schedule  {schedule['kind']}, peak {schedule['learning_rate']:g}{warmup}")
    return lines


def _time_lines(time: dict[str, Any]) -> list[str]:
    if not time["seconds"]:
        return [
            "time      unknown: give --tokens_per_second (a trial's timing.jsonl has it), or --device_flops and --mfu"
        ]
    seconds = time["seconds"]
    text = f"{seconds / 86400:.1f} days" if seconds > 1.5 * 86400 else f"{seconds / 3600:.1f} h"
    text = f"{seconds / 60:.1f} min" if seconds < 5400 else text
    return [f"time      {text} at {time['tokens_per_second']:,.0f} tokens/s ({time['from']})"]


def _memory_lines(table: dict[str, Any]) -> list[str]:
    names = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "peak")
    heads = ("weights", "grads", "optim", "activ", "logits", "buffers", "peak")
    out = [f"memory    GB per device; {table['device']}"]
    out.append("  " + " " * 17 + "".join(f"{head:>9}" for head in heads) + "  host  fits")
    for line in table["strategies"]:
        mark = "*" if line["strategy"] == table["asked"] else " "
        fits = {None: "?", True: "yes"}.get(line["fits"], "no")
        if line["fits"] is False and line["fits_with_checkpointing"]:
            fits = "with --gradient_checkpointing"
        numbers = "".join(f"{line[name] / GB:9.3g}" for name in names)
        out.append(f"{mark} {line['strategy']:<17}{numbers}{line['host'] / GB:6.3g}  {fits}")
    out.append("  * what the flags ask for. peak: gradients appear while activations disappear, so not their sum")
    fitting = [line["strategy"] for line in table["strategies"] if line["fits"]]
    if fitting:
        out.append(f"  fits: {', '.join(fitting)}")
    return out
