"""Training runs of arms that differ in EXACT's weights alone, stage by stage: their plan, order, proof and check.

Each run is an ordinary `exact-megatron train` in processes of its own. Before the arms of a stage are trained, each weighted one proves
that its first batch differs from the baseline's in the loss mask alone (benchmark/arms.py); after a run its metrics must show
that it was trained so.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from ..reporting.comparison import check_trained
from ..training.config import ConfigPath, config_paths, load_config
from ..training.schema import RunConfig
from ..utils.files import changed_settings
from ..utils.ranks import torchrun
from .steps import Step

BASELINE = "baseline"  # the arm without weights
# Settings that may change between a run and its repetition, since its numbers do not depend on them.
_HARMLESS = (
    "exp_manager.",
    "trainer.log_every_n_steps",
    "model.data.num_workers",
    "model.data.index_mapping_dir",
)


@dataclass(frozen=True)
class Arm:
    """A name, and the settings by which the arm differs from the others: all of model.exact."""

    name: str
    settings: list[str]

    @classmethod
    def parse(cls, text: str) -> Arm:
        """From NAME or NAME:key=value,... with keys of model.exact; `baseline` has no weights, and every other arm has some.

        Raises:
            ValueError: neither of the two, or a baseline with settings.
        """
        name, _, more = text.partition(":")
        parts = [part for part in more.split(",") if part]
        if not re.fullmatch(r"[\w.-]+", name) or (parts and name == BASELINE) or any("=" not in p for p in parts):
            raise ValueError(
                f"the arm {text!r}: give NAME or NAME:key=value,key=value, with keys of model.exact; {BASELINE} has no settings"
            )
        if name == BASELINE:
            return cls(name, ["model.exact.enabled=false"])
        return cls(name, ["model.exact.enabled=true", *(f"model.exact.{part}" for part in parts)])


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: base, baseline, exact, ...
        what: its headline for the terminal.
        config: its configuration.
        given: what `train` is given: --config FILE and overrides.
        proof: the file for benchmark/arms.py's proof of a weighted run; None where the run has no weights.
    """

    name: str
    what: str
    config: RunConfig
    given: list[str]
    proof: Path | None = None

    @classmethod
    def planned(
        cls, name: str, what: str, config_path: ConfigPath, settings: Sequence[str], proof: Path | None = None
    ) -> Run:
        """Nothing is started or written.

        Args:
            settings: `key=value`, over the YAML.
            proof: of a weighted run.

        Raises:
            FileNotFoundError, ValueError: see load_config; also where the run is weighted and has no `proof`, or the other way round.
        """
        config = load_config(config_path, list(settings))
        if config.model.exact.enabled != (proof is not None):
            raise ValueError(
                f"model.exact.enabled={config.model.exact.enabled} in the run {name}: only the arm {BASELINE} has no weights"
            )
        given = [word for file in config_paths(config_path) for word in ("--config", file)] + list(settings)
        return cls(name, what, config, given, proof)

    @property
    def command(self) -> list[str]:
        devices = self.config.trainer.devices
        if devices > 1:
            return torchrun(devices, ["train", *self.given])
        return [sys.executable, "-m", "exact_megatron", "train", *self.given]

    @property
    def folder(self) -> Path:
        return Path(self.config.exp_manager.exp_dir)

    @property
    def steps_done(self) -> int:
        """Step of the newest whole checkpoint, 0 without one."""
        found = (re.fullmatch(r"step_(\d+)", path.name) for path in self.folder.glob("checkpoints/step_*"))
        return max((int(match[1]) for match in found if match), default=0)

    @property
    def trained(self) -> bool:
        """Whether the last step is saved."""
        return self.steps_done == self.config.trainer.max_steps

    @property
    def finished(self) -> bool:
        """Whether the last step is saved, and validated after that where the run validates."""
        if not self.config.trainer.limit_val_batches:
            return self.trained
        log = self.folder / "validation.jsonl"
        lines = log.read_text().splitlines() if log.is_file() else []
        try:
            return self.trained and bool(lines) and json.loads(lines[-1])["step"] == self.config.trainer.max_steps
        except json.JSONDecodeError:  # cut off by a kill
            return False

    @property
    def progress(self) -> str:
        return f"after step {self.steps_done} of {self.config.trainer.max_steps}"

    def refuse_other_settings(self) -> None:
        """Keep a run in this folder that was started with other settings from being taken for this one: raise ValueError."""
        last = self.config.trainer.max_steps
        written = self.folder / "config.yaml"
        if not self.steps_done or not written.is_file():
            return
        ignored = _HARMLESS if self.proof else (*_HARMLESS, "model.exact.")
        changed = {
            key: values
            for key, values in changed_settings(asdict(load_config(written)), asdict(self.config)).items()
            if not key.startswith(ignored)
        }
        if changed:
            listed = ", ".join(f"{key}: there {there}, now {now}" for key, (there, now) in changed.items())
            raise ValueError(
                f"{self.folder} holds a run with other settings ({listed}): put them back, remove that folder and "
                "those of the runs that follow it, or choose another exp_manager.exp_dir"
            )
        if self.steps_done > last:
            raise ValueError(
                f"{self.folder} has a checkpoint at step {self.steps_done}, beyond its last step {last}: remove it"
            )

    def check(self) -> None:
        """Raise ValueError where the run was not trained with the weights that it should have."""
        check_trained(self.folder, json.loads(self.proof.read_text()) if self.proof else None)


@dataclass(frozen=True)
class Stage:
    """What all arms are trained with, from the weights of their own last stage.

    Attributes:
        name: the folder in each arm's; "" where there is one stage.
        what: headline for the terminal.
        settings: `key=value`.
    """

    name: str
    what: str
    settings: list[str]


def plan_stages(
    arms: Sequence[Arm],
    stages: Sequence[Stage],
    config_path: ConfigPath,
    base: str | Path,
    folder: Path,
    proof: Path | None = None,
) -> list[list[Run]]:
    """The runs of each stage in FOLDER/ARM/STAGE; nothing is started or written.

    Args:
        base: checkpoint or run that every arm starts from.
        proof: of the one weighted run; default: FOLDER/arms/ARM/STAGE.json for each.

    Raises:
        FileNotFoundError, ValueError: see Run.planned; also for two arms or two stages of one name.
    """
    for what, names in (("arms", [arm.name for arm in arms]), ("stages", [stage.name for stage in stages])):
        if len(set(names)) < len(names):
            raise ValueError(f"two of the {what} {', '.join(names)} have the same name, and would be one run")
    planned: list[list[Run]] = []
    before = {arm.name: str(base) for arm in arms}
    for stage in stages:
        runs = []
        for arm in arms:
            own = folder / arm.name / stage.name
            settings = [
                *stage.settings,
                f"restore_from_path={before[arm.name]}",
                *arm.settings,
                f"exp_manager.exp_dir={own}",
            ]
            name = f"{arm.name}/{stage.name}" if stage.name else arm.name
            file = None if arm.name == BASELINE else proof or folder / "arms" / arm.name / f"{stage.name}.json"
            what = f"{'weighted' if file else 'unweighted'}, {stage.what}"
            runs.append(Run.planned(name, what, config_path, settings, file))
            before[arm.name] = str(own)
        planned.append(runs)
    return planned


def training_steps(runs: Sequence[Run]) -> list[Step]:
    """Steps that prove the weighted ones among the runs, and then train all, in order.

    Raises:
        ValueError: a folder holds a run with other settings.
    """
    for run in runs:
        run.refuse_other_settings()
    trainings = [
        Step(
            f"the run {run.name}",
            run.command,
            done=partial(getattr, run, "finished"),
            headline=f"{run.name} ({number} of {len(runs)}): {run.what}",
            check=run.check,
            progress=partial(getattr, run, "progress"),
        )
        for number, run in enumerate(runs, 1)
    ]
    return [*(_proof_step(run, run.proof) for run in runs if run.proof), *trainings]


def _proof_step(run: Run, proof: Path) -> Step:
    """A proof is of the data as they lie there: it is made again until its run is trained."""
    command = [sys.executable, "-W", "ignore", "-m", "exact_megatron.benchmark.arms", str(proof), *run.given]
    return Step(
        f"the proof of the run {run.name}",
        command,
        done=proof.is_file,
        again=lambda: not run.trained,
        failed=f"{BASELINE} and {run.name} would not differ as they must: see above; nothing was trained after that",
    )
