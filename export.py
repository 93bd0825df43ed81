"""Take a checkpoint elsewhere: GGUF for llama.cpp and Ollama, another dtype, a merged adapter, fewer bits, the hub.

    python export.py --model_path out/quickstart/dpo --format gguf --dtype q8_0 --output out/gguf/model.gguf
    python export.py --model_path out/quickstart/sft --adapter out/quickstart/lora --format safetensors --dtype bf16 \\
        --output out/merged
    python export.py --model_path out/quickstart/dpo --format compressed-tensors --bits 8 --output out/int8
    python export.py --model_path out/quickstart/dpo --card                          # the model card anew
    python export.py --model_path out/quickstart/dpo --push_to_hub NAME/MODEL --private

The output appears whole or not at all. What another program would compute differently is refused. --push_to_hub uploads
what was written, or without --format the final files of --model_path.
"""

import argparse
import sys
from pathlib import Path

from smolkit.adapters import named_base
from smolkit.errors import UserError, run
from smolkit.export import export_compressed, export_gguf, export_native, modelfile_of, push_to_hub
from smolkit.gguf_file import TYPES
from smolkit.model_card import gguf_card, write_card

NATIVE_TYPES = ("f32", "f16", "bf16")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_path", type=Path, required=True, help="final directory of a stage, or any native checkpoint")
    add("--format", choices=["gguf", "safetensors", "compressed-tensors"], help="what to write")
    add("--dtype", choices=list(TYPES), help="of gguf (default: f16) and safetensors (default: bf16, never q8_0)")
    add("--bits", type=int, choices=[8, 4], help="of compressed-tensors (default: 8)")
    add("--adapter", type=Path, help="PEFT adapter directory to merge into the weights first")
    add("--output", type=Path, help="file (gguf) or new directory to write")
    add("--card", action="store_true", help="write the model card of --model_path anew, from what is on disk")
    add("--push_to_hub", metavar="REPO", help="upload to this model repository of the Hugging Face hub")
    add("--private", action="store_true", help="make a new repository private")
    args = parser.parse_args(argv)
    if not (args.format or args.card or args.push_to_hub):
        raise UserError("nothing to do: give --format, --card or --push_to_hub")
    if (args.format is None) != (args.output is None):
        raise UserError("--format and --output belong together: what to write and where")
    if (args.dtype or args.adapter) and not args.format:
        raise UserError("--dtype and --adapter need --format")
    if args.bits and args.format != "compressed-tensors":
        raise UserError(f"--bits {args.bits} is for --format compressed-tensors; gguf takes --dtype q8_0")
    if args.dtype and args.format == "compressed-tensors":
        raise UserError(f"--dtype {args.dtype}: --format compressed-tensors takes --bits")
    if args.format == "safetensors" and args.dtype not in (None, *NATIVE_TYPES):
        raise UserError(f"--dtype {args.dtype}: safetensors takes {', '.join(NATIVE_TYPES)}; q8_0 is a type of gguf")
    if args.format == "gguf" and args.output.suffix != ".gguf":
        raise UserError(f"--output {args.output}: name a file that ends in .gguf")
    if args.private and not args.push_to_hub:
        raise UserError("--private needs --push_to_hub")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    source, output = args.model_path, args.output
    if args.card:
        print(f"→ {write_card(source)}")
    if args.format == "gguf":
        print(export_gguf(source, output, args.dtype or "f16", args.adapter))
    elif args.format == "safetensors":
        print(export_native(source, output, args.dtype or "bf16", args.adapter))
    elif args.format == "compressed-tensors":
        print(export_compressed(source, output, args.bits or 8, args.adapter))
    base = named_base(args.adapter) if args.adapter else None
    if base is not None and Path(base).resolve() != source.resolve():
        print(f"note: {args.adapter} was trained on {base}, and was added to {source}", file=sys.stderr)
    if args.push_to_hub:
        # Of the folder of a GGUF file only what was written: it may hold anything else.
        files = (output.name, modelfile_of(output).name) if args.format == "gguf" else ()
        directory = output.parent if files else output or source
        card = gguf_card(args.adapter or source, *files) if files else None
        print(f"→ {push_to_hub(directory, args.push_to_hub, args.private, files, card)}")


if __name__ == "__main__":
    run(main)
