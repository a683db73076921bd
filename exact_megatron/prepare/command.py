"""`exact-megatron prepare`: its options, and what it prints."""

from __future__ import annotations

import argparse
import itertools
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ..utils.files import read_json
from .encode import say
from .files import GLOBS
from .formats import RECORDS
from .prepare import prepare

STRICT = 3  # exit code of --strict where something was left out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``exact-megatron prepare``."""
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    add("inputs", nargs="+", help="text, .json, .jsonl or .parquet, also .gz, .xz, .bz2, .zst; folder; or stdlib")
    add("--output", required=True, metavar="PREFIX", help="write PREFIX.bin, PREFIX.idx and PREFIX.json")
    which.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json, or a folder that holds one")
    text = "train a byte-level BPE of this size and save it in tokenizer/ beside PREFIX"
    which.add_argument("--train-tokenizer", type=int, metavar="VOCAB_SIZE", help=text)
    add("--tokenizer-bytes", type=int, default=32 << 20, help="text to train on (default: %(default)s)")
    add("--eod", metavar="TOKEN", help="end of document (default: eos_token of tokenizer_config.json)")
    add("--text-key", default="text", help="key of the text in JSON, column in Parquet (default: %(default)s)")
    globs = f"files of a folder, repeatable (default: {GLOBS}, data files of the kinds {', '.join(RECORDS)})"
    add("--glob", action="append", dest="globs", help=globs)
    text = "leave out what the tokenizer puts before a text; kept without this, as Megatron's preprocessing does"
    add("--no-bos", action="store_false", dest="bos", help=text)
    add("--valid-fraction", type=float, default=0.0, help="share of documents held out in PREFIX_valid")
    add("--seed", type=int, default=0, help="picks held-out documents and the sample for the tokenizer")
    add("--workers", type=int, help="processes (default: the CPUs at hand); the output does not depend on it")
    add("--shard-bytes", type=int, help="input per unit of work and resume (default: 1 to 32 MiB, by size)")
    add("--overwrite", action="store_true", help="replace PREFIX, even if it is up to date")
    add("--strict", action="store_true", help=f"exit code {STRICT} if anything was left out")


def run(args: argparse.Namespace) -> int:
    """Run ``exact-megatron prepare``: 0 done or up to date, 2 an error (printed), 3 done but for what --strict does not
    leave out, 130 interrupted."""
    from rich.console import Console
    from rich.table import Table

    options = {key: value for key, value in vars(args).items() if key in (prepare.__kwdefaults__ or ())}
    try:
        metas = [prepare(args.inputs, args.output, **options)]
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from the finished shards")
        return 130
    except (OSError, ValueError, BrokenProcessPool) as error:  # the last: a worker was killed, for memory say
        if getattr(args, "traceback", False):
            raise
        say(f"error: {error}")
        return 2
    metas += [read_json(f"{args.output}_valid.json")] if args.valid_fraction else []
    table = Table(args.output, *(meta["split"] for meta in metas))
    shown = itertools.dropwhile(lambda key: key != "dtype", metas[0])  # from there on facts and counts
    for key in shown:
        table.add_row(key, *(_shown(meta[key]) for meta in metas))
    Console().print(table)
    if args.strict and metas[0]["left_out"]:
        say("error: --strict, and something was left out, see above")
        return STRICT
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
