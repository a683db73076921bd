"""Runs a script of Megatron-Bridge, unchanged, with EXACT hooked into it.

    torchrun --nproc-per-node 8 -m exact_megatron.integrations.bridge_launch scripts/training/run_recipe.py \\
        --recipe llama32_1b_pretrain_config dataset.reset_attention_mask=true model.exact.enabled=true

Settings may stand anywhere on the line, see exact_megatron.integrations.bridge. A script that starts anew with os.exec, as those of
Megatron-Bridge 0.6 do, comes back here with its settings.
"""

from __future__ import annotations

import os
import sys

from ..config import ExactError
from ..utils.ranks import be_single_rank, is_rank
from . import bridge
from .script import parse


def main(arguments: list[str] | None = None) -> int:
    """Run the script in this process, which is one rank of it; a problem with the settings is one line and exit code 2.

    Raises:
        ExactError: the script cannot be hooked, or ended without having been hooked.
        What the script raises, and ValueError before its first step for a run that EXACT refuses.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    try:
        script, rest = parse(arguments, os.environ)[1:]
        alone = not is_rank()
        sys.argv = [str(script), *arguments]
        installed = bridge.install()
    except (ValueError, OSError, ExactError) as error:
        print(f"exact-megatron launch: {error}", file=sys.stderr)
        return 2
    if alone:
        be_single_rank()
    installed.launched = True
    sys.argv = [str(script), *rest]
    sys.path.insert(0, str(script.resolve().parent))
    # From its source and not by runpy: the writer of torch_dist checkpoints spawns a child that imports the main module once
    # more, which is then this one and not the training script.
    names = {"__name__": "__main__", "__file__": os.path.abspath(script)}
    exec(compile(script.read_bytes(), str(script), "exec"), names)
    if (installed.config.enabled or installed.timing.enabled) and not installed.ran:
        asked = "model.exact.enabled=true" if installed.config.enabled else "model.qk_timing.enabled=true"
        raise ExactError(f"{script} ended and never called Megatron-Bridge's pretrain: {asked}, but nothing was hooked")
    return 0


if __name__ == "__main__":
    sys.exit(main())
