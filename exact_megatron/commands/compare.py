"""`exact-megatron compare`: a base, then baseline and EXACT from its weights, and a report.

Each of the three runs is an ordinary `exact-megatron train` in processes of its own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import ExactError
from ..reporting.comparison import write_report
from ..training.config import ConfigPath, config_paths, load_config
from ..training.run_lock import only_writer
from ..training.schema import RunConfig
from ..utils.environment import machine
from ..utils.files import changed_settings, write_text
from ..utils.ranks import is_rank, launch, torchrun

# Settings that may change between a run and its repetition, since its numbers do not depend on them.
_HARMLESS = (
    "exp_manager.",
    "trainer.log_every_n_steps",
    "model.data.num_workers",
    "model.data.index_mapping_dir",
)


@dataclass(frozen=True)
class Arm:
    """One of the three runs.

    Attributes:
        name: base, baseline or exact; the folder in exp_manager.exp_dir.
        what: headline for the terminal.
        run: its configuration.
        settings: what `train` is given: --config FILE and overrides.
        command: the `train` command that makes it.
    """

    name: str
    what: str
    run: RunConfig
    settings: list[str]
    command: list[str]

    @property
    def folder(self) -> Path:
        return Path(self.run.exp_manager.exp_dir)

    @property
    def steps_done(self) -> int:
        """Step of the newest whole checkpoint, 0 without one."""
        found = (re.fullmatch(r"step_(\d+)", path.name) for path in self.folder.glob("checkpoints/step_*"))
        return max((int(match[1]) for match in found if match), default=0)

    @property
    def finished(self) -> bool:
        """Whether the last step is saved, and validated after that."""
        last = self.run.trainer.max_steps
        log = self.folder / "validation.jsonl"
        lines = log.read_text().splitlines() if log.is_file() else []
        try:
            return self.steps_done == last and bool(lines) and json.loads(lines[-1])["step"] == last
        except json.JSONDecodeError:  # cut off by a kill
            return False


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
    arms = plan(config_path, overrides, base_seq_length, base_steps)
    with only_writer(arms[0].folder.parent):
        _compare(arms, config_path, overrides, base_seq_length, base_steps)


def _compare(
    arms: list[Arm], config_path: ConfigPath, overrides: list[str], base_seq_length: int, base_steps: int
) -> None:
    for arm in arms:
        _refuse_other_run(arm)
    if arms[0].run.trainer.devices > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own choice, without its banner
    folder = arms[0].folder.parent
    proof = folder / "arms.json"
    if not proof.is_file() or any(arm.steps_done < arm.run.trainer.max_steps for arm in arms):
        code = launch(
            [sys.executable, "-W", "ignore", "-m", "exact_megatron.benchmark.arms", str(proof), *arms[-1].settings]
        )
        if code:
            raise ExactError("baseline and EXACT would not differ as they must: see above; nothing was trained")
    trained = False
    for number, arm in enumerate(arms, 1):
        headline = f"{arm.name} ({number} of {len(arms)}): {arm.what}"
        if arm.finished:
            print(f"== {headline}: done before", file=sys.stderr, flush=True)
            continue
        print(f"== {headline}", file=sys.stderr, flush=True)
        code = launch(arm.command)
        if code:
            raise ExactError(f"the run {arm.name} failed with exit code {code}; its messages are above")
        if not arm.finished:
            raise ExactError(
                f"the run {arm.name} was stopped after step {arm.steps_done} of {arm.run.trainer.max_steps} "
                "(exit code 0): the same command goes on from there"
            )
        trained = True

    facts = folder / "comparison.json"
    if trained or not facts.is_file():
        command = ["exact-megatron", "compare", *_config_option(config_path)]
        command += ["--base-seq-length", str(base_seq_length), "--base-steps", str(base_steps), *overrides]
        write_text(facts, json.dumps({"command": shlex.join(command), **describe(arms[-1])}, indent=1) + "\n")
    write_report(folder)


def plan(config_path: ConfigPath, overrides: list[str], base_seq_length: int, base_steps: int) -> list[Arm]:
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
    arm = [*common, f"restore_from_path={exp_dir / 'base'}"]
    what = f"window {data.seq_length}, {run.trainer.max_steps} steps from the base"
    runs = {
        "base": (f"plain pretraining, window {base_seq_length}, {base_steps} steps", [*common, *base]),
        "baseline": (f"unweighted, {what}", [*arm, "model.exact.enabled=false"]),
        "exact": (f"weighted, {what}", [*arm, "model.exact.enabled=true"]),
    }
    arms = []
    for name, (what, own) in runs.items():
        settings = [*overrides, *own, f"exp_manager.exp_dir={exp_dir / name}"]
        given = [*_config_option(config_path), *settings]
        devices = run.trainer.devices
        command = [sys.executable, "-m", "exact_megatron", "train", *given]
        if devices > 1:
            command = torchrun(devices, ["train", *given])
        arms.append(Arm(name, what, load_config(config_path, settings), given, command))
    return arms


def _config_option(config_path: ConfigPath) -> list[str]:
    return [word for file in config_paths(config_path) for word in ("--config", file)]


def _has_validation(data_prefix: Any, splits_string: str) -> bool:
    if isinstance(data_prefix, dict):
        return bool(data_prefix.get("validation"))
    parts = [float(part) for part in re.split(r"[,/]", splits_string) if part.strip()]
    return len(parts) > 1 and parts[1] > 0


def _refuse_other_run(arm: Arm) -> None:
    """Keep a run that was started with other settings from being taken for this one."""
    last = arm.run.trainer.max_steps
    written = arm.folder / "config.yaml"
    if not arm.steps_done or not written.is_file():
        return
    ignored = _HARMLESS if arm.run.model.exact.enabled else (*_HARMLESS, "model.exact.")
    changed = {
        key: values
        for key, values in changed_settings(asdict(load_config(written)), asdict(arm.run)).items()
        if not key.startswith(ignored)
    }
    if changed:
        listed = ", ".join(f"{key}: there {there}, now {now}" for key, (there, now) in changed.items())
        raise ValueError(
            f"{arm.folder} holds a run with other settings ({listed}): put them back, remove that folder and "
            "those of the runs that follow it, or choose another exp_manager.exp_dir"
        )
    if arm.steps_done > last:
        raise ValueError(
            f"{arm.folder} has a checkpoint at step {arm.steps_done}, beyond its last step {last}: remove it"
        )


def describe(arm: Arm) -> dict[str, Any]:
    """Date, versions, hardware and the number of parameters.

    Parameters are the elements of the tensors in the newest checkpoint, with the vocabulary padded, and
    without the optimizer's state.
    """
    from torch.distributed.checkpoint import FileSystemReader

    newest = arm.folder / "checkpoints" / f"step_{arm.steps_done:08d}"
    tensors = FileSystemReader(newest).read_metadata().state_dict_metadata
    sizes = [t.size for name, t in tensors.items() if hasattr(t, "size") and not name.startswith("optimizer.")]
    facts = machine()
    versions = facts.pop("versions")
    if arm.run.trainer.accelerator == "cpu":
        facts["GPU"] = "not used"
    return {**facts, **versions, "parameters": sum(size.numel() for size in sizes)}
