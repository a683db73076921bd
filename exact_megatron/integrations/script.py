"""Runs a user's training script in this process, with EXACT hooked into it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from ..config import ExactConfig, ExactError, QKTimingConfig
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
    """Execute the script as __main__ with its folder first on the path, as Python does, hooked if the settings enable it."""
    sys.path.insert(
        0, str(script.resolve().parent)
    )  # before megatron is imported: the checkout's own core is to be used
    sys.argv = [str(script), *arguments]
    import megatron.training
    import megatron.training.training

    from .megatron_lm import MegatronLM

    host = MegatronLM(config, timing)
    hooked = host.hook(megatron.training.pretrain)
    megatron.training.pretrain = megatron.training.training.pretrain = hooked
    exec(compile(script.read_bytes(), str(script), "exec"), {"__name__": "__main__", "__file__": str(script)})
    if (config.enabled or timing.enabled) and not host.hooked:
        asked = "model.exact.enabled=true" if config.enabled else "model.qk_timing.enabled=true"
        raise ExactError(f"{script} ended and never called megatron.training.pretrain: {asked}, but nothing was hooked")
