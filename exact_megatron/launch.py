"""Runs a user's training script, unchanged, with EXACT hooked into it.

    exact-megatron launch model.exact.enabled=true pretrain_gpt.py ARGUMENTS
    torchrun --nproc-per-node 8 -m exact_megatron.launch model.exact.enabled=true pretrain_gpt.py ARGUMENTS

The script is run from its source and not by runpy: a torch_dist checkpoint is written by a spawned child, which imports the
main module once more; that is then this one, guarded below, and not the training script.

Settings may stand anywhere on the line: `model.exact.alpha=0.2`, `--exact-alpha 0.2`, `--exact-config FILE`; the environment
has EXACT_ALPHA and EXACT_CONFIG. Files yield to the environment, the environment to the line. Without
model.exact.enabled=true the script runs as it is, and refuses to go on from a checkpoint that was trained with weights.
`model.qk_timing.enabled=true` (also in FILE) slows the queries and keys of upper layers at first, with or without EXACT.
A run that EXACT rejects ends with one reason; --traceback before the settings shows where it was found.
"""

from __future__ import annotations

import contextlib
import os
import sys

from .config import ExactError
from .integrations.script import parse, run_script
from .integrations.settings import take_timing
from .utils.failures import said_once
from .utils.ranks import be_single_rank, is_rank


def main(arguments: list[str] | None = None, traceback: bool = False) -> int:
    """Run the script in this process, which is one rank of it; a problem with the settings is one line and exit code 2.

    Raises:
        SystemExit: 1, the script cannot be hooked or ended without having been hooked, or EXACT refuses the run, before its first step;
            rank 0 has printed why (with `traceback`: ExactError or ValueError).
        What the script raises.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--traceback"]:
        traceback, arguments = True, arguments[1:]
    if arguments[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    try:
        timing, _ = take_timing(arguments, os.environ)
        config, script, rest = parse(arguments, os.environ)
        alone = not is_rank()
    except (ValueError, OSError, ExactError) as error:
        if traceback:
            raise
        print(f"exact-megatron launch: {error}", file=sys.stderr)
        return 2
    if alone:
        be_single_rank()
    with contextlib.nullcontext() if traceback else said_once("exact-megatron launch"):
        run_script(config, script, rest, timing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
