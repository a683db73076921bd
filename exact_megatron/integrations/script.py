"""Runs a user's training script in this process, with EXACT hooked into it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path

from ..config import ExactConfig, QKTimingConfig
from .settings import take_settings, take_timing


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


def run_script(config: ExactConfig, script: Path, arguments: list[str], timing: QKTimingConfig) -> None:
    """Execute the script as __main__ with its folder first on the path, as Python does, hooked if the settings enable it.

    Raises:
        ExactError: it is about to train, or ended, and nothing was hooked, although the settings ask for it.
        What the script raises, and SystemExit where it leaves by that.
    """
    sys.path.insert(
        0, str(script.resolve().parent)
    )  # before megatron is imported: the checkout's own core is to be used
    sys.argv = [str(script), *arguments]
    import megatron.training
    import megatron.training.training

    from . import megatron_lm
    from .forks import guarded

    host = megatron_lm.MegatronLM(config, timing)
    hooked = host.hook(megatron.training.pretrain)
    megatron.training.pretrain = megatron.training.training.pretrain = hooked
    megatron_lm.launched = host
    left: SystemExit | None = None
    with guarded(host.may_step) if host.asked else contextlib.nullcontext():
        try:
            exec(compile(script.read_bytes(), str(script), "exec"), {"__name__": "__main__", "__file__": str(script)})
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
            left = end
    if host.asked and not host.hooked:
        raise host.unhooked(f"{script} ended and")
    if left is not None:
        raise left
