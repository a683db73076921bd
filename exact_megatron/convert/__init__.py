"""Hugging Face models in and out of the native runner: `exact-megatron convert`, see docs/convert.md."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `exact-megatron convert`."""
    ways = parser.add_subparsers(dest="direction", required=True, metavar="hf-to-megatron|megatron-to-hf")
    way = ways.add_parser(
        "hf-to-megatron", help="a folder with config.json and safetensors to a checkpoint to train from"
    )
    way.add_argument("source", metavar="MODEL", help="folder of a LLaMA, Qwen2.5, Qwen3 or SmolLM2 model")
    way.add_argument("output", metavar="OUTPUT", help="new folder: checkpoint, model.yaml, hf/")
    way.add_argument(
        "--pad-kv-heads",
        type=int,
        metavar="N",
        help="add KV heads of zeros up to N, for tensor-parallel sizes that divide N",
    )
    way = ways.add_parser("megatron-to-hf", help="a checkpoint of the native runner to a folder for transformers")
    way.add_argument(
        "source", metavar="RUN", help="run directory (its newest checkpoint is taken), or .../checkpoints/step_N"
    )
    way.add_argument("output", metavar="OUTPUT", help="new folder")
    way.add_argument(
        "--hf", metavar="FOLDER", help="config.json and tokenizer; default: those of the model it started from"
    )
    way.add_argument("--dtype", choices=("fp32", "bf16"), help="default: as in the checkpoint")
    way.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file (default: %(default)s)")
    way.add_argument(
        "--accept-other-tokenizer",
        action="store_true",
        help="take the folder's tokenizer even if the data of training had another",
    )


def run(args: argparse.Namespace) -> int:
    """Run `exact-megatron convert`."""
    from .convert import hf_to_megatron, megatron_to_hf

    if args.direction == "hf-to-megatron":
        made = hf_to_megatron(args.source, args.output, args.pad_kv_heads)
    else:
        made = megatron_to_hf(
            args.source,
            args.output,
            args.hf,
            args.dtype,
            args.max_shard_size,
            accept_other_tokenizer=args.accept_other_tokenizer,
        )
    for remark in made.remarks:
        print(f"convert: {remark}", file=sys.stderr)
    print(f"{made.folder}: {made.parameters:,} parameters, {made.bytes / 1e9:,.2f} GB")
    return 0
