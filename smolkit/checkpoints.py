"""Model directories: opening them with the checks a user wants, building new models, writing final ones."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from smol_config import MOE_EXTRA_FIELDS, PRESETS, SmolConfig, count_parameters, preset_config
from smol_model import SmolForCausalLM
from smolkit.arguments import NewModelArguments
from smolkit.chat import END_OF_TEXT, IM_END, IM_START, chat_stop_ids, save_tokenizer
from smolkit.errors import UserError
from smolkit.files import sync

Model = TypeVar("Model", bound=PreTrainedModel)

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# What transformers, PEFT and safetensors raise over files that are damaged, of another kind or of another model.
UNREADABLE = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError),
    *(SafetensorError, StrictDataclassError),
)
# Fields of `SmolConfig` that say nothing of a model without experts.
EXPERT_FIELDS = (
    *("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "router_aux_loss_coef"),
    *MOE_EXTRA_FIELDS,
)
# Fields of generation_config.json that only sampling reads.
SAMPLING_FIELDS = "temperature top_p top_k min_p top_h typical_p epsilon_cutoff eta_cutoff".split()


def require_checkpoint(directory: str | Path) -> Path:
    """The directory, if it holds a model (config.json and safetensors); else `UserError`."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such checkpoint directory")
    if not (directory / "config.json").is_file():
        adapter = (directory / "adapter_config.json").is_file()
        hint = "it is a PEFT adapter; merge it first (train_lora.py --merge)" if adapter else "not a checkpoint"
        raise UserError(f"{directory}: no config.json in it: {hint}")
    if not any((directory / name).is_file() for name in _WEIGHTS):
        raise UserError(f"{directory}: no safetensors weights ({' or '.join(_WEIGHTS)}) in it")
    return directory


def load_tokenizer(directory: str | Path, kind: str = "auto") -> PreTrainedTokenizerFast:
    """The tokenizer of a directory. `kind="qwen"` insists on the ChatML control tokens.

    Raises `UserError` when there is none, or when padding with its pad token would teach models not to stop.
    """
    directory = Path(directory)
    if not (directory / "tokenizer.json").is_file() and not (directory / "tokenizer_config.json").is_file():
        raise UserError(f"{directory}: no tokenizer there; train_tokenizer.py makes one")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except UNREADABLE as error:  # those of config.json, which AutoTokenizer reads first, among them
        raise UserError(f"{directory}: unreadable tokenizer or config.json: {one_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{directory}: needs a fast tokenizer (tokenizer.json); train_tokenizer.py --mode load")
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in (END_OF_TEXT, IM_START, IM_END) if token not in vocabulary]
    if missing and kind == "qwen":
        raise UserError(f"{directory}: --tokenizer_type qwen, but the tokenizer has no {', '.join(missing)}")
    if tokenizer.pad_token_id is None and END_OF_TEXT in vocabulary:
        tokenizer.pad_token = END_OF_TEXT
    if tokenizer.pad_token_id is None:
        raise UserError(f"{directory}: the tokenizer has no pad token; train_tokenizer.py --mode load adds one")
    return tokenizer


def require_chat(tokenizer: PreTrainedTokenizerFast, directory: str | Path) -> None:
    """`UserError` unless the tokenizer can render conversations with a loss mask."""
    remedy = "run train_tokenizer.py --mode load --qwen_model DIR --save_dir DIR on it first"
    if not tokenizer.chat_template or "generation" not in str(tokenizer.chat_template):
        raise UserError(f"{directory}: the tokenizer's chat template has no generation marks; {remedy}")
    if tokenizer.pad_token_id == tokenizer.get_vocab().get(IM_END):
        raise UserError(f"{directory}: pad and chat end are the same token, models would not learn to stop; {remedy}")


def document_end_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token written after each pretraining document: <|endoftext|>, else the tokenizer's eos."""
    return tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id)


def resolve_model(
    base_model: str | None,
    new: NewModelArguments | None,
    tokenizer_path: str | None,
    tokenizer_type: str,
    chat: bool,
) -> tuple[SmolConfig, PreTrainedTokenizerFast, str]:
    """Configuration, tokenizer and the tokenizer's directory for the model flags of a script.

    With `base_model` those of the checkpoint (and its own tokenizer by default), else of a `new` one. `chat`:
    the tokenizer must render conversations. Raises `UserError` when they do not fit together.
    """
    if base_model and new is not None and new.wants_new_model():
        raise UserError("--base_model contradicts the flags of a new model (--model_size ...); leave one out")
    directory = tokenizer_path or base_model
    if directory is None:
        raise UserError("--tokenizer_path is required for a new model; train_tokenizer.py makes a tokenizer")
    if base_model:
        require_checkpoint(base_model)
    tokenizer = load_tokenizer(directory, tokenizer_type)
    if chat:
        require_chat(tokenizer, directory)
    if base_model:
        return load_config(base_model, tokenizer, directory), tokenizer, directory
    assert new is not None, "scripts without a new model require the checkpoint"
    shape = (new.overrides(), tokenizer, new.vocab_size, new.pad_vocab_to_multiple_of)
    return new_config(new.model_size, *shape), tokenizer, directory


def one_line(error: Exception) -> str:
    """What a library says of a failure, in one line of bearable length."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def new_config(
    preset: str | None,
    overrides: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    vocab_size: int | None = None,
    multiple_of: int = 1,
) -> SmolConfig:
    """Configuration of a new model whose vocabulary covers the tokenizer's entries.

    `overrides` are fields of `SmolConfig`. Raises `UserError` for an unknown preset, field or value.
    """
    if preset is None:
        raise UserError(f"--model_size is required for a new model; presets: {', '.join(PRESETS)}")
    entries = vocab_size or len(tokenizer)
    if entries < len(tokenizer):
        raise UserError(f"--vocab_size {entries} is less than the {len(tokenizer)} entries of the tokenizer")
    entries = -(-entries // multiple_of) * multiple_of
    ids = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    config = changed_preset(preset, {"vocab_size": entries, **ids, **overrides})
    if config.vocab_size < len(tokenizer):
        raise UserError(
            f"--model_overrides vocab_size={config.vocab_size} is less than the {len(tokenizer)} entries of the "
            "tokenizer; leave it out, or train a smaller tokenizer"
        )
    return config


def changed_preset(name: str, overrides: dict[str, Any]) -> SmolConfig:
    """A preset with some fields replaced; `UserError` for an unknown preset, field or value, or one without effect."""
    try:
        config = preset_config(name, **typed_fields(overrides))
    except UNREADABLE as error:
        raise UserError(one_line(error)) from error
    idle = [field for field in EXPERT_FIELDS if overrides.get(field) is not None]
    if idle and not config.num_experts:
        raise UserError(
            f"--model_overrides {idle[0]}: only a model with experts has it, and {name} has none; leave it out, add "
            "num_experts=N, or start from tiny-moe or moe"
        )
    return config


def typed_fields(overrides: dict[str, Any]) -> dict[str, Any]:
    """Fields of `SmolConfig`, an int for a float made one; `UserError` for another name, or a value of another type.

    0 on the command line is an int; the native configurations insist on floats, at the very end, when they are saved.
    """
    fields, checked = SmolConfig.__dataclass_fields__, {}
    for name, value in overrides.items():
        if name not in fields:
            raise UserError(f"--model_overrides {name}: no such field; see SmolConfig in smol_config.py")
        kind = float if fields[name].type in (float | None, "float | None") else fields[name].type
        if kind is float and type(value) is int:
            value = float(value)
        optional = value is None and fields[name].default is None
        if kind in (int, float, bool) and type(value) is not kind and not optional:
            raise UserError(f"--model_overrides {name}={value}: expected {kind.__name__} (several fields: a=1 b=2)")
        checked[name] = value
    return checked


def read_config(directory: str | Path) -> SmolConfig:
    """What config.json of a directory says; `UserError` where that is no model of a supported architecture."""
    try:
        return SmolConfig.from_pretrained(directory)
    except UNREADABLE as error:
        raise UserError(f"{directory}: {one_line(error)}") from error


def load_config(
    directory: str | Path, tokenizer: PreTrainedTokenizerFast, tokenizer_directory: str | Path
) -> SmolConfig:
    """Configuration of a checkpoint directory, checked to fit the tokenizer.

    Raises `UserError` when the directory is no checkpoint of a supported architecture, when the model's
    vocabulary is smaller than the tokenizer's, or when the checkpoint brings a different tokenizer.
    """
    directory = require_checkpoint(directory)
    config = read_config(directory)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer in {tokenizer_directory} has {len(tokenizer)} entries but the model in "
            f"{directory} a vocabulary of {config.vocab_size}; use the tokenizer the model was trained with"
        )
    if (directory / "tokenizer.json").is_file() and Path(tokenizer_directory).resolve() != directory.resolve():
        if AutoTokenizer.from_pretrained(directory, trust_remote_code=False).get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"{tokenizer_directory} is not the tokenizer of {directory}; leave --tokenizer_path out to use its own"
            )
    return config


def build_model(
    config: SmolConfig, directory: str | Path | None, dtype: torch.dtype, attention: str = "sdpa"
) -> SmolForCausalLM:
    """The model of `config` in `dtype` with the weights of `directory`, or random ones when it is None.

    Raises `UserError` as `load_weights` does.
    """
    if directory is None:
        config._attn_implementation = attention
        return SmolForCausalLM(config).to(dtype)  # type: ignore[arg-type]  # transformers hides its signature
    return load_weights(directory, config=config, dtype=dtype, attn_implementation=attention)


def load_weights(directory: str | Path, kind: Any = SmolForCausalLM, **options: Any) -> Any:
    """The model of a directory as the class `kind`; `options` are those of its `from_pretrained`.

    Raises `UserError` for weights that are quantised, damaged or not all there, which transformers loads as noise.
    """
    if quantization_of(directory):
        raise UserError(f"{directory} is quantised; use the checkpoint it was made from")
    try:
        model, info = kind.from_pretrained(directory, use_safetensors=True, output_loading_info=True, **options)
    except UNREADABLE as error:
        raise UserError(f"{directory}: cannot load the weights: {one_line(error)}") from error
    require_all_weights(info, directory)
    mend_generation_config(model, directory)
    return model


def quantization_of(directory: str | Path) -> Any:
    """What a checkpoint directory says in its config.json about how it is quantised; None when it is not.

    Raises `UserError` for a config.json that is none."""
    try:
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
        return config.get("quantization_config") or None
    except UNREADABLE as error:
        raise UserError(f"{directory}: unreadable config.json: {one_line(error)}") from error


def require_all_weights(info: dict[str, Any], directory: str | Path) -> None:
    """`UserError` unless the files had every weight: others are drawn at random. `info`: transformers' loading info."""
    if missing := sorted(info["missing_keys"]):  # a tied head is not among them
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{directory}: the weights do not have all that config.json asks for: {', '.join(missing[:3])}{more}; "
            "copy the directory anew, or mend config.json"
        )


def mend_generation_config(model: PreTrainedModel, directory: str | Path) -> None:
    """Make settings of generation that transformers once wrote such as it saves today.

    Values for sampling without a word on `do_sample` ask for it (Llama 2's do); beside `do_sample: false` they say
    nothing and go. Raises `UserError` for others that could not be saved: now, not at the first save of a run.
    """
    settings = model.generation_config
    if settings is None or saved_as_it_is(settings) is None:
        return
    given = [name for name in SAMPLING_FIELDS if getattr(settings, name, None) is not None]
    if given and settings.do_sample is None:
        settings.do_sample = True
    elif not settings.do_sample:
        for name in given:
            setattr(settings, name, None)
    if (problem := saved_as_it_is(settings)) is not None:
        raise UserError(f"{directory}: generation_config.json could not be saved again: {problem}; mend or remove it")


def saved_as_it_is(settings: GenerationConfig) -> str | None:
    """None where these settings can be saved, else what transformers has against them."""
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return one_line(error)
    return None


def resize_vocabulary(
    directory: str | Path, tokenizer_directory: str | Path, target: str | Path, multiple_of: int = 1
) -> str:
    """Write a checkpoint to `target` whose embedding covers the tokenizer's entries, rounded up to a multiple.

    Rows are only added (padded ones are free for new entries): existing ones stay as they are, new ones start
    around the mean of the old (transformers' `mean_resizing`). Returns one line about it. Raises `UserError` when
    `target` is in use.
    """
    directory, target = require_checkpoint(directory), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--resized_dir {target} is in use by something else — remove it or choose another directory")
    tokenizer = load_tokenizer(tokenizer_directory)
    config = read_config(directory)
    before = config.vocab_size
    rows = -(-max(before, len(tokenizer)) // multiple_of) * multiple_of
    dtype = config.dtype or torch.float32
    torch.manual_seed(0)
    model = build_model(config, directory, dtype)
    if rows != before:
        model.resize_token_embeddings(rows)
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    card = plain_card(target.name, model.config, {"resized from": directory, "vocabulary rows": f"{before} → {rows}"})
    save_final(model, dict(model.named_parameters()), tokenizer, target, dtype, card)
    return f"saved {target}: {before:,} → {rows:,} vocabulary rows for {len(tokenizer):,} entries"


def row_length(length: int | None, default: int, config: SmolConfig, flag: str) -> int:
    """The row length asked for with `flag`, or `default` cut to the context; `UserError` beyond that."""
    if length is None:
        return min(default, config.max_position_embeddings)
    if length > config.max_position_embeddings:
        raise UserError(
            f"{flag} {length} is longer than the model's context of {config.max_position_embeddings} tokens; "
            f"lower it, or raise max_position_embeddings of a new model with --model_overrides"
        )
    return length


def set_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Let generation stop at the end of a chat turn and at the end of a document."""
    model.generation_config.eos_token_id = chat_stop_ids(tokenizer)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.output_router_logits = False  # TRL switches it on; readers of the directory would pay for it


def save_final(
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerFast,
    directory: str | Path,
    dtype: torch.dtype,
    card: str | None = None,
) -> None:
    """Write a complete model directory: weights `state` cast to `dtype`, configs, tokenizer, card.

    `card` None: a training run writes its own when all of it is on the disk (`smolkit.model_card`).
    Raises `UserError` for values that float16 has no room for, before anything is written.

    Everything is written aside and renamed file by file, config.json last: a directory that has one is
    complete.
    """
    directory = Path(directory)
    if dtype == torch.float16:  # the others have float32's range
        for name, values in state.items():
            require_range(name, values, dtype)
    aside = directory / ".writing"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    set_generation_config(model, tokenizer)
    model.save_pretrained(aside, state_dict={name: value.to(dtype) for name, value in state.items()})
    if isinstance(model, SmolForCausalLM):
        config = json.loads((aside / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")  # what was written, not what the model trains in
        config["use_cache"] = True  # Trainer turns it off in the config it trains with
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tokenizer(tokenizer, aside)
    if card is not None:
        (aside / "README.md").write_text(card, encoding="utf-8")
    move_into(aside, directory)


def require_range(name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
    """`UserError` for values that are no finite numbers in `dtype`."""
    if not values.isfinite().all():
        raise UserError(f"{name} holds values that are not finite: the checkpoint is damaged")
    if dtype == torch.float16 and (most := values.abs().max().item()) > torch.finfo(dtype).max:
        raise UserError(f"{name} holds {most:g}, more than f16's 65504; use --dtype bf16")


def save_adapter(trainer: Any) -> None:
    """Write a trainer's adapter as a PEFT directory, aside and renamed (call it on all processes)."""
    directory = Path(trainer.args.output_dir)
    aside = directory / ".writing"
    divided = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if divided else None
    if trainer.args.should_save:
        shutil.rmtree(aside, ignore_errors=True)
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        model.save_pretrained(aside, state_dict=state, selected_adapters=["default"])  # not a reference's copy
        save_tokenizer(trainer.processing_class, aside)
        move_into(aside, directory)
    trainer.accelerator.wait_for_everyone()


def move_into(aside: Path, directory: Path) -> None:
    """Move the files of `aside` into `directory` (fsynced, config.json last) and remove `aside`."""
    for stale in (*directory.glob("*.safetensors"), directory / "model.safetensors.index.json"):
        if not (aside / stale.name).exists():
            stale.unlink(missing_ok=True)
    files = sorted((path for path in aside.rglob("*") if path.is_file()), key=lambda path: path.name == "config.json")
    for file in files:
        target = directory / file.relative_to(aside)
        target.parent.mkdir(parents=True, exist_ok=True)
        sync(file)
        if file.name == "config.json":
            sync(directory)  # the names of all others are on the disk before the one that says they are complete
        os.replace(file, target)
    sync(directory)
    shutil.rmtree(aside)


def merge_adapter(model: Model, adapter: str | Path) -> Model:
    """The model with a PEFT adapter added to its weights; `UserError` when the directory is none or does not fit."""
    return load_adapter(model, adapter).merge_and_unload()


def load_adapter(model: PreTrainedModel, adapter: str | Path, is_trainable: bool = False) -> Any:
    """The model with a PEFT adapter beside its weights; `UserError` when the directory is none or does not fit."""
    require_adapter(adapter)
    from peft import PeftModel  # heavy, and only adapters need it

    try:
        adapted = PeftModel.from_pretrained(model, adapter, is_trainable=is_trainable, local_files_only=True)
        # Layers without weights in the file it leaves as they were made, with a warning, and weights without a layer
        # without one. Reading the file again says which, by the names that it has after PEFT's own renaming.
        keys = adapted.load_adapter(str(adapter), "default", is_trainable=is_trainable, local_files_only=True)
    except UNREADABLE as error:
        raise UserError(f"{adapter}: the adapter does not fit the model: {one_line(error)}") from None
    if keys.missing_keys or keys.unexpected_keys:
        what = f"no {keys.missing_keys[0]} in it" if keys.missing_keys else f"no place for {keys.unexpected_keys[0]}"
        raise UserError(f"{adapter}: the adapter does not fit the model: {what}; it was made for another")
    return adapted


def require_adapter(directory: str | Path) -> Path:
    """The directory; `UserError` when it is no PEFT adapter."""
    if not (Path(directory) / "adapter_config.json").is_file():
        raise UserError(f"{directory}: not a PEFT adapter (no adapter_config.json); train_lora.py writes one")
    return Path(directory)


def describe_model(config: SmolConfig) -> str:
    """One line: architecture, parameters, vocabulary."""
    total, active = count_parameters(config)
    active_text = f" ({active:,} active per token)" if active != total else ""
    return f"{config.native_type()}, {total:,} parameters{active_text}, vocabulary {config.vocab_size:,}"


def plain_card(title: str, config: SmolConfig, facts: dict[str, Any]) -> str:
    """The card of a directory that no training run wrote (theirs is `smolkit.model_card`'s), for the hub."""
    lines = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {title}\n\n"
        f"{describe_model(config)}.\n\n| | |\n|---|---|\n{lines}\n\n"
        "Load it with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`, or serve "
        "it with `serve_hf.py --model_path` of the toolkit that wrote it.\n"
    )
