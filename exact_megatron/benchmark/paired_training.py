"""Paired continued pretraining: the same base, data, order and schedule, without and with EXACT; then both are evaluated.

    python -m exact_megatron.benchmark.paired_training --base CHECKPOINT --config MODEL.yaml --data PREFIX --folder RUNS

Every arm goes through the stages in order (a window and a number of tokens each), a stage from the weights of the arm's own last
stage. Runs are ordinary `exact-megatron train` processes in FOLDER/seedN/ARM/WINDOW. At SIGINT, SIGTERM, SIGHUP or SIGUSR1 the one
in progress saves a checkpoint and stops; the same command goes on from there. FOLDER/paired_training.json has what the runs gave so far.

Before a stage is trained, `python -m exact_megatron.benchmark.arms` proves for each weighted arm that its first batch differs from
the baseline's in the loss mask alone; after a run its metrics must show that it was trained so.

An arm is a name and settings: `exact`, `exact-a0.5:alpha=0.5,gamma=1` (keys of model.exact); `baseline` has no weights.
Learning rate, batch and tokens are our choice; the paper's are not published.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ExactError
from ..reporting.comparison import check_trained
from ..training.run_lock import only_writer
from ..utils.files import write_text
from ..utils.ranks import launch, torchrun

UNFINISHED = 3  # exit code: a run was stopped from outside, after its checkpoint
BASELINE = "baseline"  # the arm without weights
RESULTS = "paired_training.json"
COMMANDS = "commands.json"  # name of a task -> the command line that it was last started with


@dataclass(frozen=True)
class Task:
    """A command, the file that is there when it is done (a training run: a checkpoint of its last step), and what it makes in all.

    `kind`: "proof", "training", or what comes after: "export", "evaluation", "comparison".
    """

    kind: str
    name: str
    command: list[str]
    done: Path
    made: Path

    @property
    def words(self) -> str:
        """The command line, whatever the interpreter's path."""
        return shlex.join(self.command[1:])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m exact_megatron.benchmark.paired_training", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add(
        "--base",
        required=True,
        help="checkpoint or run that every arm starts from (`exact-megatron convert hf-to-megatron`)",
    )
    add("--config", required=True, help="YAML with the model's settings, as convert writes it")
    add(
        "--data",
        required=True,
        metavar="PREFIX",
        help="PREFIX and PREFIX_valid, as `exact-megatron prepare` writes them",
    )
    add("--folder", required=True, type=Path)
    add("--stages", nargs="+", default=["4096:25e6", "16384:25e6"], metavar="WINDOW:TOKENS")
    add("--arms", nargs="+", default=["baseline", "exact"])
    add("--seeds", nargs="+", type=int, default=[1234])
    add("--devices", type=int, default=1, help="ranks of a training run; proofs, exports and evaluations take one")
    add("--step-tokens", type=int, default=65536, help="of an optimizer step, in every stage")
    add("--micro-tokens", type=int, default=32768, help="of a rank's micro-batch, at most")
    add("--valid-tokens", type=int, default=2_000_000, help="of held-out text, at the end of a stage")
    add("--lr", type=float, default=2e-4)
    add(
        "--suites",
        nargs="*",
        default=["distance-probe", "context-loss"],
        help="of `exact-megatron evaluate`; none: no evaluation",
    )
    add(
        "--evaluate",
        nargs="*",
        default=[],
        metavar="OPTION=VALUE",
        help="more for evaluate: limit=200 distances=64,1024,16384",
    )
    add("--settings", nargs="*", default=[], metavar="key=value", help="for every run: trainer.precision=bf16")
    return parser.parse_args(argv)


def exact(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "exact_megatron", *map(str, arguments)]


def arm_settings(arm: str) -> tuple[str, list[str]]:
    """Name and overrides. ValueError: not NAME or NAME:key=value,..."""
    name, _, more = arm.partition(":")
    if (
        not re.fullmatch(r"[\w.-]+", name)
        or (more and name == BASELINE)
        or any("=" not in p for p in more.split(",") if p)
    ):
        raise ValueError(f"--arms {arm}: give NAME or NAME:key=value,key=value; baseline has no settings")
    if name == BASELINE:
        return name, ["model.exact.enabled=false"]
    return name, ["model.exact.enabled=true", *(f"model.exact.{part}" for part in more.split(",") if part)]


def plan(args: argparse.Namespace) -> list[Task]:
    """All runs, stage by stage so that an early stop leaves pairs, then the evaluations of the last stage's runs.

    Raises:
        ValueError: a stage is not WINDOW:TOKENS, or too short for one step; an arm is not as arm_settings has it, or two have a name.
    """
    names = [arm_settings(arm)[0] for arm in args.arms]
    if len(set(names)) < len(names):
        raise ValueError(f"--arms {' '.join(args.arms)}: each arm needs a name of its own")
    tasks: list[Task] = []
    last: dict[tuple[int, str], Path] = {}  # (seed, arm) -> the run of its last stage
    for seed in args.seeds:
        before: dict[str, str | Path] = {name: args.base for name in names}
        for stage in args.stages:
            tasks += _stage_tasks(args, seed, stage, before)
        last |= {(seed, name): Path(run) for name, run in before.items()}
    return tasks + _evaluation_tasks(args, last)


def _stage_tasks(args: argparse.Namespace, seed: int, stage: str, before: dict[str, str | Path]) -> list[Task]:
    """The proofs and runs of one stage; `before` has what each arm starts from, and then what it gave."""
    window, steps, common = _stage_settings(args, seed, stage)
    proofs, runs = [], []
    for name, weights in map(arm_settings, args.arms):
        run = args.folder / f"seed{seed}" / name / str(window)
        start = [f"restore_from_path={before[name]}", f"exp_manager.exp_dir={run}"]
        given = ["--config", args.config, *start, *common, *args.settings, *weights]
        before[name] = run
        if name != BASELINE:
            proof = args.folder / "arms" / f"seed{seed}" / name / f"{window}.json"
            command = [sys.executable, "-W", "ignore", "-m", "exact_megatron.benchmark.arms", str(proof), *given]
            proofs.append(Task("proof", f"arms of seed {seed}, {name}, window {window}", command, proof, proof))
        train = torchrun(args.devices, ["train", *given]) if args.devices > 1 else exact("train", *given)
        done = run / "checkpoints" / f"step_{steps:08d}" / "metadata.json"
        runs.append(Task("training", f"seed {seed}, {name}, window {window}", train, done, run))
    return proofs + runs


def _stage_settings(args: argparse.Namespace, seed: int, stage: str) -> tuple[int, int, list[str]]:
    """Window, steps, and the settings that all arms of a stage share."""
    try:
        window, tokens = (int(float(part)) for part in stage.split(":"))
        batch = args.step_tokens // window
    except (ValueError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"--stages {stage}: give WINDOW:TOKENS, like 4096:25e6") from error
    micro = max(1, min(args.micro_tokens // window, batch // args.devices))
    steps = tokens // args.step_tokens
    if not batch or batch % (micro * args.devices) or steps < 2:
        raise ValueError(
            f"--stages {stage}: {steps} steps of {batch} windows in micro-batches of {micro} on {args.devices} devices cannot be "
            "trained; change --step-tokens, --micro-tokens or --devices"
        )
    return (
        window,
        steps,
        [
            f"trainer.devices={args.devices}",
            f"trainer.max_steps={steps}",
            f"model.seed={seed}",
            f"model.data.data_prefix={{train: [{args.data}], validation: [{args.data}_valid]}}",
            f"model.data.index_mapping_dir={args.folder}/index",
            f"model.data.seq_length={window}",
            f"model.max_position_embeddings={window}",
            f"model.micro_batch_size={micro}",
            f"model.global_batch_size={batch}",
            f"model.optim.lr={args.lr}",
            f"model.optim.sched.min_lr={args.lr / 10}",
            f"model.optim.sched.warmup_steps={max(1, steps // 20)}",
            f"trainer.limit_val_batches={max(1, args.valid_tokens // args.step_tokens)}",
            "trainer.log_every_n_steps=20",
            "exp_manager.create_tensorboard_logger=false",
            "exp_manager.checkpoint_callback_params.save_top_k=1",
        ],
    )


def _evaluation_tasks(args: argparse.Namespace, last: dict[tuple[int, str], Path]) -> list[Task]:
    """Exports where a suite needs them, then each suite for all runs, then comparisons with the first arm."""
    tasks: list[Task] = []
    window = int(float(args.stages[-1].split(":")[0]))
    exported = {"ruler", "nolima", "short"} & set(args.suites)  # lm-eval and generation take Hugging Face folders
    models = {(seed, name): args.folder / "hf" / f"seed{seed}" / name for seed, name in last}
    for (seed, name), run in last.items() if exported else ():
        folder = models[seed, name]
        command = exact("convert", "megatron-to-hf", run, folder)
        tasks.append(Task("export", f"export of seed {seed}, {name}", command, folder / "config.json", folder))
    options = [word for option in args.evaluate for word in evaluate_option(option)]
    for suite in args.suites:
        for (seed, name), run in last.items():
            output = args.folder / "evaluation" / f"seed{seed}" / name
            more = ["--data", f"{args.data}_valid", "--window", window] if suite == "context-loss" else []
            model = models[seed, name] if suite in exported else run
            more += ["--trained-length", window, *options]
            command = exact("evaluate", model, "--suite", suite, "--output", output, *more)
            done = output / suite / "results.json"
            tasks.append(Task("evaluation", f"{suite} of seed {seed}, {name}", command, done, done.parent))
    for seed in args.seeds if args.suites else []:
        first, *others = (arm_settings(arm)[0] for arm in args.arms)
        for name in others:
            folder = args.folder / "evaluation" / f"seed{seed}"
            output = folder / f"{first}-{name}"
            command = exact(
                "evaluate", "compare", folder / first, folder / name, "--output", output, "--names", first, name
            )
            title = f"comparison of {first} and {name}, seed {seed}"
            tasks.append(Task("comparison", title, command, output / "report.md", output))
    return tasks


def evaluate_option(option: str) -> list[str]:
    name, _, values = option.partition("=")
    return [f"--{name}", *values.split(",")]


def run_task(task: Task) -> int:
    """0: done. UNFINISHED: stopped from outside, in order. Else its exit code. Raises: see launch."""
    code = launch(task.command)
    return UNFINISHED if code == 0 and not task.done.exists() else code


def check_arm(args: argparse.Namespace, task: Task) -> None:
    """ValueError: a training run was not weighted as its arm is, by what it wrote."""
    seed, name, window = task.made.parts[-3:]
    proof = args.folder / "arms" / seed / name / f"{window}.json"
    check_trained(task.made, None if name == BASELINE else json.loads(proof.read_text()))


def results(args: argparse.Namespace, tasks: list[Task]) -> dict[str, Any]:
    """What the runs gave: first and last losses, speed, validation with its loss in every bucket of effective context."""
    runs = []
    proofs = [task.done for task in tasks if task.kind == "proof" and task.done.exists()]
    for task in tasks:
        if task.kind != "training" or not (lines := _lines(task.made / "metrics.jsonl")):
            continue
        validation = _lines(task.made / "validation.jsonl")
        seed, name, window = task.made.parts[-3:]
        tail = lines[-20:]
        runs.append(
            {
                "seed": int(seed.removeprefix("seed")),
                "arm": name,
                "window": int(window),
                "steps": lines[-1]["step"],
                "tokens": lines[-1]["tokens"],
                "finished": task.done.exists(),
                "first loss": lines[0]["lm_loss"],
                "last losses": statistics.fmean(line["lm_loss"] for line in tail),
                "tokens/s": statistics.median(line["tokens_per_s"] for line in lines),
                "validation": validation[-1] if validation else None,
                "command": task.words,
            }
        )
    return {
        "runs": runs,
        "finished": sum(t.done.exists() for t in tasks),
        "tasks": len(tasks),
        "arms": args.arms,
        "first batches": {str(file.relative_to(args.folder)): json.loads(file.read_text()) for file in proofs},
        "lr": args.lr,
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's log; one that a kill cut off has no end."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def reject_other_commands(folder: Path, tasks: list[Task]) -> dict[str, str]:
    """The command lines that tasks of `folder` were started with.

    Raises:
        ValueError: a task is done, and was started with another one.
    """
    path = folder / COMMANDS
    started: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    for task in tasks:
        then = started.get(task.name, task.words)
        if task.done.exists() and then != task.words:
            raise ValueError(
                f"{task.name} is done, with other arguments:\n  then: {then}\n  now:  {task.words}\n"
                f"Put them back, choose another --folder, or remove {task.made} and what was made from it"
            )
    return started


def train_pairs(args: argparse.Namespace, tasks: list[Task]) -> int:
    """Run what is not done yet, and write RESULTS however it ends; 0 or the exit code of the task that ended it.

    Raises:
        ValueError: a task was done with another command line, or a run was not weighted as its arm is.
        KeyboardInterrupt, SystemExit: see launch.
    """
    started = reject_other_commands(args.folder, tasks)
    try:
        for number, task in enumerate(tasks, 1):
            code = 0
            if not task.done.exists():
                _say(f"{task.name} ({number} of {len(tasks)})")
                started[task.name] = task.words
                write_text(args.folder / COMMANDS, json.dumps(started, indent=1) + "\n")
                code = run_task(task)
            if code:
                state = "stopped, goes on at the next call" if code == UNFINISHED else f"failed with exit code {code}"
                _say(f"{task.name}: {state}")
                return code
            if task.kind == "training":
                check_arm(args, task)
    finally:
        write_text(args.folder / RESULTS, json.dumps(results(args, tasks), indent=1) + "\n")
    return 0


def _say(text: str) -> None:
    print(f"paired training: {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        tasks = plan(args)
        with only_writer(args.folder, "--folder ANOTHER"):
            return train_pairs(args, tasks)
    except (ValueError, OSError, ExactError) as error:
        _say(str(error))
        return 2
    except (KeyboardInterrupt, SystemExit) as end:
        _say("stopped by a signal; the same command goes on from there")
        return 128 + signal.SIGINT if isinstance(end, KeyboardInterrupt) else int(end.code or 0)


if __name__ == "__main__":
    sys.exit(main())
