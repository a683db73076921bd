"""`exact-megatron study`: arms x seeds x bases from one YAML, each run an ordinary training run, and one page about all."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ExactError
from ..training.run_lock import only_writer
from ..utils.files import not_empty, read_json
from ..utils.ranks import is_rank
from .plan import Study, StudyArm, read_study
from .report import write_report
from .runs import Run, training_steps
from .steps import Step, run_steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="YAML of the study, for example configs/study.yaml")
    parser.add_argument("--folder", type=not_empty, help="for data, runs and report, in place of the file's `folder`")
    parser.add_argument("--plan", action="store_true", help="say what would be trained, and train nothing")
    parser.add_argument(
        "--report", action="store_true", help="write the page about the finished runs, and train nothing"
    )


def run(args: argparse.Namespace) -> int:
    if is_rank():
        raise ValueError("start `exact-megatron study` once, not under torchrun or srun: it starts the ranks itself")
    study = read_study(args.file, args.folder)
    if args.plan:
        print(plan_text(study))
    elif args.report:
        print(write_report(study))
    else:
        with only_writer(study.folder):
            train(study)
    return 0


def plan_text(study: Study) -> str:
    """What a study trains, in lines."""
    pairs = len(study.bases) * len(study.seeds)
    return "\n".join(
        [
            f"{len(study.bases)} bases (seeds {', '.join(map(str, study.bases))})"
            + (
                f", which count from {study.gate.accuracy:g} right answers below {study.gate.below} tokens"
                if study.gate
                else ""
            ),
            f"{pairs} pairs of a base and a seed of the data, {len(study.arms)} arms each: {pairs * len(study.arms)} runs of "
            + ", ".join(arm.name for arm in study.arms),
            f"in {study.folder}",
        ]
    )


def train(study: Study) -> None:
    """Make everything that is not there yet, pair by pair, with a report after each seed; a stopped study goes on where it was.

    Raises:
        ExactError, ValueError: a run failed, was stopped, or was trained with other settings; no base passes the gate.
    """
    print(plan_text(study), file=sys.stderr, flush=True)
    for seed in study.bases:
        run_steps(base_steps(study, seed))
    passed = [seed for seed in study.bases if passes(study, seed)]
    failed = [seed for seed in study.bases if seed not in passed]
    if failed:
        print(f"bases below the gate, without arms: {', '.join(map(str, failed))}", file=sys.stderr)
    if not passed:
        raise ExactError(
            f"no base of {study.folder} passes the gate {study.gate}: train them longer (base_settings, task.base_tokens)"
        )
    for number, seed in enumerate(study.seeds, 1):
        run_steps([data_step(study, f"seed_{seed}", seed, study.task.tokens)])
        for base in passed:
            train_pair(study, base, seed)
        print(f"== {number} of {len(study.seeds)} seeds done: {write_report(study)}", file=sys.stderr, flush=True)


def base_steps(study: Study, seed: int) -> list[Step]:
    """Data, training and evaluation of a base."""
    name = f"base_{seed}"
    own = [*study.settings, *study.base_settings, *data_settings(study, name, seed)]
    run = Run.planned(
        name, "pretraining", study.config, [*own, "model.exact.enabled=false", folder_setting(study, name)]
    )
    return [
        data_step(study, name, seed, study.task.base_tokens),
        *training_steps([run]),
        evaluation_step(study, run, name),
    ]


def passes(study: Study, seed: int) -> bool:
    """Whether a base may have arms: its accuracy below the gate's distance, in documents of the base's kind."""
    gate = study.gate
    if gate is None:
        return True
    rows = [row for row in read_json(evaluation(study, f"base_{seed}"))["documents"] if row["high"] < gate.below]
    right = sum(row["accuracy"] * row["answers"] for row in rows)
    return right >= gate.accuracy * sum(row["answers"] for row in rows)


def train_pair(study: Study, base: int, seed: int) -> None:
    """All arms from one base on one seed's data."""
    runs: dict[str, Run] = {}
    for arm in study.arms:
        run = planned(study, arm, base, seed)
        runs[arm.name] = run
        run_steps([*training_steps([run]), evaluation_step(study, run, run_name(arm, base, seed))])
        if arm.name != study.arms[0].name:
            check_pair(runs[study.arms[0].name].folder, run.folder, same_data=arm.upsample is None)


def planned(study: Study, arm: StudyArm, base: int, seed: int) -> Run:
    name = run_name(arm, base, seed)
    settings = [
        *study.settings,
        *study.arm_settings,
        *data_settings(study, f"seed_{seed}", seed),
        *upsampling(study, arm, seed),
        f"restore_from_path={study.folder / f'base_{base}'}",
        *arm.as_arm().settings,
        folder_setting(study, name),
    ]
    proof = study.folder / "proofs" / f"{name}.json" if arm.exact is not None else None
    run = Run.planned(name, arm.name, study.config, settings, proof)
    return run if arm.longce is None else LongCERun(run.name, run.what, run.config, run.given, short=arm.longce)


@dataclass(frozen=True)
class LongCERun(Run):
    """A run of study/longce.py.

    Attributes:
        short: K in tokens.
    """

    short: int = 128

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "exact_megatron.study.longce", *self.given, f"study.short={self.short}"]


def run_name(arm: StudyArm, base: int, seed: int) -> str:
    return f"runs/base_{base}/seed_{seed}/{arm.name}"


def folder_setting(study: Study, name: str) -> str:
    return f"exp_manager.exp_dir={study.folder / name}"


def data_settings(study: Study, name: str, seed: int) -> list[str]:
    prefix = study.folder / "data" / name
    return [f"model.data.data_prefix=[{prefix}]", f"model.data.index_mapping_dir={prefix}.cache", f"model.seed={seed}"]


def data_step(study: Study, name: str, seed: int, tokens: int) -> Step:
    prefix = study.folder / "data" / name
    task = study.task
    numbers = {"seed": seed, "tokens": tokens, "median": task.median, "sigma": task.sigma, "longest": task.longest}
    options = [word for key, value in numbers.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "exact_megatron.study.data", "task", str(prefix), *options]
    return Step(f"the data {name}", command, done=Path(f"{prefix}.json").is_file, headline=f"data {name}")


def upsampling(study: Study, arm: StudyArm, seed: int) -> list[str]:
    """Settings of the data of an arm that draws long documents more often; the blend is made here, from the other arm's weights."""
    if arm.upsample is None:
        return []
    prefix = study.folder / "data" / f"seed_{seed}"
    blend = Path(f"{prefix}_long.blend.json")
    # The weights do not depend on the base, and every pair has the arm's run before this one's.
    like = next(
        folder
        for base in study.bases
        if (folder := study.folder / run_name(study.arm(arm.upsample), base, seed)).is_dir()
    )
    least, share = weighted_tail(read_json(like / "weights.json")["buckets"])
    run = Run.planned(
        "", "", study.config, [*study.settings, *study.arm_settings, f"model.data.data_prefix=[{prefix}]"]
    )
    data = run.config.model.data
    command = [sys.executable, "-m", "exact_megatron.study.data", "upsample", str(prefix)]
    command += ["--seq-length", str(data.seq_length), "--least", str(least)]
    command += ["--share", str(share), *["--eod-mask-loss"] * data.eod_mask_loss]
    run_steps([Step(f"the long documents of seed {seed}", command, done=blend.is_file)])
    return [f"model.data.data_prefix={json.dumps(read_json(blend)['blend'])}"]


def weighted_tail(rows: list[dict[str, Any]]) -> tuple[int, float]:
    """Least effective context in a weight table's tail, and the tail's share of the loss weight."""
    tail = [row for row in rows if row["weight"] > rows[0]["weight"]]
    return int(tail[0]["low"]), sum(row["weighted_share"] for row in tail)


def evaluation(study: Study, name: str) -> Path:
    return study.folder / name / "study.json"


def evaluation_step(study: Study, run: Run, name: str) -> Step:
    file = evaluation(study, name)
    arms = Run.planned("", "", study.config, [*study.settings, *study.arm_settings, "model.data.data_prefix=[x]"])
    window = arms.config.model.data.seq_length
    command = [sys.executable, "-m", "exact_megatron.study.evaluate", str(run.folder), str(file)]
    command += ["--window", str(window), "--documents", str(study.documents), "--prompts", str(study.prompts)]
    return Step(f"the evaluation of {name}", command, done=file.is_file)


def check_pair(baseline: Path, arm: Path, same_data: bool) -> None:
    """Compare what two runs of a pair logged.

    Raises:
        ValueError: with the same data their first losses differ, which the same weights and batch must make equal; or all their losses
            are equal, so that they are one run twice.
    """
    losses = [
        [json.loads(line)["lm_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (baseline, arm)
    ]
    if losses[0] == losses[1]:
        raise ValueError(f"{arm} has all losses of {baseline}: they are one run twice; remove both")
    if same_data and losses[0][0] != losses[1][0]:
        raise ValueError(
            f"{arm} begins with the loss {losses[1][0]}, {baseline} with {losses[0][0]}: they have other weights or data; remove both"
        )
