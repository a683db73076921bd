"""What `exact-megatron launch` would do with a command line, without importing its script."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Any

from ...integrations.megatron_lm_arguments import OWN, plan_masking, read_arguments, refusals, training_data
from ...integrations.script import parse
from ...refusals import reasons, value_of
from .installed import checkout_core, megatron_lm
from .looks import effect, problems
from .megatron_line import ROWS, Line, options, other_kinds, pasted, unknown_options


def megatron_lm_run(words: list[str]) -> dict[str, Any]:
    """What `exact-megatron launch` would do with this command line: [settings] SCRIPT ARGUMENTS, or a whole one with torchrun."""
    line = pasted(words)
    parsed: list[Any] = []
    refused = problems(lambda: parsed.extend(parse(line.command, {**os.environ, **line.environment})))
    refused = refused or problems(lambda: parsed.append(read_arguments(parsed[2])))
    if refused:
        return {"refused": refused}
    config, script, rest, args = parsed
    source, seq_length, eod = script.read_text(), *(value_of(name, args) for name in ("seq_length", "eod_mask_loss"))
    core = checkout_core(script.parent) or checkout_core(Path(os.environ.get("MEGATRON_LM", ".")))
    refused = _starts(line, script, rest, args) if core else []
    if not config.enabled:
        return effect(config, None, list, "the script's own: EXACT is not enabled", False, refused)
    if core is None:
        return {
            "refused": [
                f"{script} is in no checkout of Megatron-LM, whose version decides: set MEGATRON_LM to one (scripts of "
                "Megatron-Bridge and NeMo are not examined)"
            ]
        }
    hooked = megatron_lm(script)
    if seq_length is None:
        refused.insert(0, "--seq-length is not on the line: window, tau and data cannot be judged")
    if not line.launched and "exact_megatron" not in source:
        refused.insert(
            0, f"the line starts {script} without EXACT: put -m exact_megatron.launch before it, or patch it (patches/)"
        )
    refused += ([hooked] if hooked.startswith("no") else []) + refusals(args, config, core)
    masking = "not masked: documents in a sample would see each other"
    with contextlib.suppress(ValueError):  # one of the refusals
        who, masking = plan_masking(args, config, core)
        model = None if hooked.startswith("no") else other_kinds(source)[0]
        if who == OWN and model:
            refused.append(f"EXACT masks documents in GPTModel only, and {script} builds {model}")
    return effect(config, seq_length, lambda: training_data(args), masking, bool(eod), refused)


def _starts(line: Line, script: Path, rest: list[str], args: Any) -> list[str]:
    """Why Megatron-LM itself would not start."""
    sizes: dict[str, int] = {}
    if line.world is not None:
        shards = [
            value_of(f"{name}_parallel_size", args) or 1 for name in ("tensor_model", "pipeline_model", "context")
        ]
        sizes = {"world_size": line.world, "data_parallel_size": max(1, line.world // math.prod(shards))}
    return unknown_options(rest, options(script)) + reasons(ROWS, sizes, args)
