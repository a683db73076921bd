"""Runs a user's training script, unchanged, with EXACT hooked into it.

    exact-megatron launch model.exact.enabled=true pretrain_gpt.py ARGUMENTS
    torchrun --nproc-per-node 8 -m exact_megatron.launch model.exact.enabled=true pretrain_gpt.py ARGUMENTS

The script is run from its source and not by runpy: a torch_dist checkpoint is written by a spawned child, which imports the
main module once more; that is then this one, guarded below, and not the training script.

Settings may stand anywhere on the line: `model.exact.alpha=0.2`, `--exact-alpha 0.2`, `--exact-config FILE`; the environment
has EXACT_ALPHA and EXACT_CONFIG. Files yield to the environment, the environment to the line. Without
model.exact.enabled=true the script runs as it is, and refuses to go on from a checkpoint that was trained with weights.
`model.qk_timing.enabled=true` (also in FILE) slows the queries and keys of upper layers at first, with or without EXACT.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from .config import ExactConfig, ExactError, QKTimingConfig
from .integrations.settings import take_settings, take_timing
from .training.launch import be_single_rank, is_rank


def parse(arguments: list[str], environment: Mapping[str, str]) -> tuple[ExactConfig, Path, list[str]]:
    """Part `[settings] SCRIPT [its arguments, settings among them]`.

    Returns:
        The settings, the script, its own arguments.

    Raises:
        ValueError: settings (see take_settings and take_timing), or no script.
        FileNotFoundError: there is no such script.
    """
    _, rest = take_timing(arguments, environment)
    config, rest = take_settings(rest, environment)
    if not rest or rest[0].startswith("-"):
        raise ValueError(
            f"expected the training script, got {rest[0] if rest else 'nothing'}: launch [model.exact.key=value ...] SCRIPT [its arguments]"
        )
    script = Path(rest[0])
    if not script.is_file():
        raise FileNotFoundError(f"{script}: there is no such script")
    return config, script, rest[1:]


def main(arguments: list[str] | None = None, traceback: bool = False) -> int:
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
    run_script(config, script, rest, timing)
    return 0


def run_script(config: ExactConfig, script: Path, arguments: list[str], timing: QKTimingConfig) -> None:
    """Execute the script as __main__ with its folder first on the path, as Python does, hooked if the settings enable it."""
    sys.path.insert(
        0, str(script.resolve().parent)
    )  # before megatron is imported: the checkout's own core is to be used
    sys.argv = [str(script), *arguments]
    import megatron.training
    import megatron.training.training

    from .integrations.megatron_lm import MegatronLM

    host = MegatronLM(config, timing)
    hooked = host.hook(megatron.training.pretrain)
    megatron.training.pretrain = megatron.training.training.pretrain = hooked
    exec(compile(script.read_bytes(), str(script), "exec"), {"__name__": "__main__", "__file__": str(script)})
    if (config.enabled or timing.enabled) and not host.hooked:
        asked = "model.exact.enabled=true" if config.enabled else "model.qk_timing.enabled=true"
        raise ExactError(f"{script} ended and never called megatron.training.pretrain: {asked}, but nothing was hooked")


if __name__ == "__main__":
    sys.exit(main())
