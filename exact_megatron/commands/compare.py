"""`exact-megatron compare`: a base, then baseline and EXACT from its weights, and a report."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from ..config import PREFIX
from ..reporting.comparison_report import write_report
from ..study.runs import Arm, Run, Stage, plan_stages, training_steps
from ..study.steps import run_steps
from ..training.config import ConfigPath, config_paths, load_config
from ..training.run_lock import only_writer
from ..utils.environment import environment
from ..utils.files import write_text
from ..utils.ranks import is_rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base-seq-length", type=int, required=True, help="window of the plain pretraining that makes the base"
    )
    parser.add_argument(
        "--base-steps", type=int, required=True, help="its optimizer steps; global_batch_size is kept in tokens"
    )


def run(args: argparse.Namespace) -> int:
    for override in args.overrides:
        if override.lstrip("+").startswith(f"{PREFIX}enabled"):
            raise ValueError("compare sets model.exact.enabled itself: one arm without, one with")
    compare(args.config, args.overrides, args.base_seq_length, args.base_steps)
    return 0


def compare(config_path: ConfigPath, overrides: list[str], base_seq_length: int, base_steps: int) -> None:
    """Train `base`, `baseline` and `exact` in exp_manager.exp_dir, and write the report there.

    A finished run is kept, a stopped one goes on from its newest checkpoint. SIGINT, SIGTERM and SIGHUP stop
    the run in progress after a checkpoint; a second one kills it.

    Args:
        config_path: YAML of the two arms, whatever its model.exact.enabled; None for the defaults.
        overrides: `key=value`, over the YAML, for all three runs.
        base_seq_length: window in tokens of the plain pretraining that makes the base. The batch size is
            scaled so that a step has as many tokens as in the arms.
        base_steps: its optimizer steps.

    Raises:
        FileNotFoundError, ValueError: see plan; also where a folder holds a run with other settings.
        ExactError: the arms would not differ as they must (benchmark/arms.py), before anything is trained; or a run failed or was
            stopped from outside, names it and its exit code.
    """
    if is_rank():
        raise ValueError("start `exact-megatron compare` once, not under torchrun or srun: it starts the ranks itself")
    runs = plan(config_path, overrides, base_seq_length, base_steps)
    folder = runs[0].folder.parent
    with only_writer(folder):
        if runs[0].config.trainer.devices > 1:
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own choice, without its banner
        facts = folder / "comparison.json"
        described = facts.is_file() and all(run.finished for run in runs)
        run_steps(training_steps(runs))
        if not described:
            command = [
                "exact-megatron",
                "compare",
                *(w for file in config_paths(config_path) for w in ("--config", file)),
            ]
            command += ["--base-seq-length", str(base_seq_length), "--base-steps", str(base_steps), *overrides]
            write_text(facts, json.dumps({"command": shlex.join(command), **describe(runs[-1])}, indent=1) + "\n")
        write_report(folder)


def plan(config_path: ConfigPath, overrides: list[str], base_seq_length: int, base_steps: int) -> list[Run]:
    """The three runs with their commands; nothing is started or written. Arguments as for `compare`.

    Raises:
        FileNotFoundError, ValueError: see load_config; also without held-out data to compare on, and for a
            base window that the tokens of a step cannot be divided by.
    """
    run = load_config(config_path, overrides)
    data = run.model.data
    model = run.model
    exp_dir = Path(run.exp_manager.exp_dir)
    if run.trainer.num_nodes > 1:
        raise ValueError(f"trainer.num_nodes={run.trainer.num_nodes}: compare starts its ranks on one machine")
    if run.trainer.limit_val_batches < 1 or not _has_validation(data.data_prefix, data.splits_string):
        raise ValueError(
            "compare reports held-out losses: set trainer.limit_val_batches and give validation data "
            "(model.data.data_prefix.validation, or a second part in model.data.splits_string)"
        )
    if base_steps < 1:
        raise ValueError(f"--base-steps {base_steps} must be at least 1")
    if not 1 <= base_seq_length <= data.seq_length:
        raise ValueError(
            f"--base-seq-length {base_seq_length} must be between 1 and the window of the arms, "
            f"model.data.seq_length={data.seq_length}"
        )
    if run.tokens_per_step % base_seq_length:
        raise ValueError(
            f"a step of {run.tokens_per_step} tokens (model.global_batch_size={model.global_batch_size} x "
            f"model.data.seq_length={data.seq_length}) is not a whole number of windows of "
            f"--base-seq-length {base_seq_length}"
        )

    common = [
        f"model.data.index_mapping_dir={data.index_mapping_dir or exp_dir / 'index'}",
        "exp_manager.resume_if_exists=true",
        "exp_manager.checkpoint_callback_params.save_last=true",
    ]
    base = [
        "model.exact.enabled=false",
        f"model.data.seq_length={base_seq_length}",
        f"model.global_batch_size={run.tokens_per_step // base_seq_length}",
        # The rotary table has the arms' positions, so that all three are the same model.
        f"model.max_position_embeddings={model.max_position_embeddings or data.seq_length}",
        f"trainer.max_steps={base_steps}",
        f"model.optim.sched.warmup_steps={min(model.optim.sched.warmup_steps, base_steps - 1)}",
        f"model.optim.sched.wsd_decay_steps={min(model.optim.sched.wsd_decay_steps, base_steps)}",
    ]
    if data.seq_length % base_seq_length == 0:  # as many tokens in a micro-batch too
        base.append(f"model.micro_batch_size={model.micro_batch_size * data.seq_length // base_seq_length}")
    what = f"plain pretraining, window {base_seq_length}, {base_steps} steps"
    first = Run.planned(
        "base", what, config_path, [*overrides, *common, *base, f"exp_manager.exp_dir={exp_dir / 'base'}"]
    )
    what = f"window {data.seq_length}, {run.trainer.max_steps} steps from the base"
    arms = [Arm.parse("baseline"), Arm.parse("exact")]
    stage = Stage("", what, [*overrides, *common])
    (pair,) = plan_stages(arms, [stage], config_path, first.folder, exp_dir, exp_dir / "arms.json")
    return [first, *pair]


def _has_validation(data_prefix: Any, splits_string: str) -> bool:
    if isinstance(data_prefix, dict):
        return bool(data_prefix.get("validation"))
    parts = [float(part) for part in re.split(r"[,/]", splits_string) if part.strip()]
    return len(parts) > 1 and parts[1] > 0


def describe(run: Run) -> dict[str, Any]:
    """Date, versions, hardware and the number of parameters.

    Parameters are the elements of the tensors in the newest checkpoint, with the vocabulary padded, and
    without the optimizer's state.
    """
    from torch.distributed.checkpoint import FileSystemReader

    newest = run.folder / "checkpoints" / f"step_{run.steps_done:08d}"
    tensors = FileSystemReader(newest).read_metadata().state_dict_metadata
    sizes = [t.size for name, t in tensors.items() if hasattr(t, "size") and not name.startswith("optimizer.")]
    facts = environment()
    versions = facts.pop("versions")
    if run.config.trainer.accelerator == "cpu":
        facts["GPU"] = "not used"
    return {**facts, **versions, "parameters": sum(size.numel() for size in sizes)}
