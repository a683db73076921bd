"""What `exact-megatron launch` would do with a command line, without importing its script."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from ...integrations.megatron_lm_arguments import plan_masking, read_arguments, refusals, training_data
from ...integrations.script import parse
from ...refusals import value_of
from .installed import checkout_core, megatron_lm
from .looks import effect, problems


def megatron_lm_run(command: list[str]) -> dict[str, Any]:
    """What `exact-megatron launch` would do with this command line: [settings] SCRIPT ARGUMENTS."""
    parsed: list[Any] = []
    refused = problems(lambda: parsed.extend(parse(command, os.environ)))
    refused = refused or problems(lambda: parsed.append(read_arguments(parsed[2])))
    if refused:
        return {"refused": refused}
    config, script, _, args = parsed
    if not config.enabled:
        return effect(config, None, list, "the script's own: EXACT is not enabled", False, [])
    core = checkout_core(script.parent) or checkout_core(Path(os.environ.get("MEGATRON_LM", ".")))
    if core is None:
        return {
            "refused": [
                f"{script} is in no checkout of Megatron-LM, whose version decides: set MEGATRON_LM to one (scripts of "
                "Megatron-Bridge and NeMo are not examined)"
            ]
        }
    hooked = megatron_lm(script)
    seq_length, eod = (value_of(name, args) for name in ("seq_length", "eod_mask_loss"))
    if seq_length is None:
        refused = ["--seq-length is not on the line: window, tau and data cannot be judged"]
    else:
        refused = []
    refused += ([hooked] if hooked.startswith("no") else []) + refusals(args, config, core)
    masking = "not masked: documents in a sample would see each other"
    with contextlib.suppress(ValueError):  # one of the refusals
        masking = plan_masking(args, config, core)[1]
    return effect(config, seq_length, lambda: training_data(args), masking, bool(eod), refused)
