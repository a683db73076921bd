"""Paired continued pretraining: the same base, data, order and schedule, without and with EXACT; then both are evaluated.

    python benchmarks/gpu/cpt.py --base CHECKPOINT --config MODEL.yaml --data PREFIX --folder RUNS [--until SECONDS]

Every arm goes through the stages in order (a window and a number of tokens each), a stage from the weights of the arm's own last
stage. Runs are ordinary `exact-megatron train` processes in FOLDER/seedN/ARM/WINDOW. At --until the one in progress saves a
checkpoint and stops, and the exit code is 3: the same command goes on from there. FOLDER/cpt.json has what the runs gave so far.

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
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNFINISHED = 3
TO_SAVE = 60  # seconds that a stopped run has for its checkpoint before it is killed


@dataclass(frozen=True)
class Task:
    """A command, and the file that is there when it is done (a run: a checkpoint of its last step)."""

    name: str
    command: list[str]
    done: Path


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
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
    add("--step-tokens", type=int, default=65536, help="of an optimizer step, in every stage")
    add("--micro-tokens", type=int, default=32768, help="of a micro-batch")
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
    add("--until", type=float, default=1e9, metavar="SECONDS", help="stop in order after so many seconds")
    add("--settings", nargs="*", default=[], metavar="key=value", help="for every run: trainer.precision=bf16")
    return parser.parse_args(argv)


def exact(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "exact_megatron", *map(str, arguments)]


def arm_settings(arm: str) -> tuple[str, list[str]]:
    """Name and overrides. ValueError: not NAME or NAME:key=value,..."""
    name, _, more = arm.partition(":")
    if (
        not re.fullmatch(r"[\w.-]+", name)
        or (more and name == "baseline")
        or any("=" not in p for p in more.split(",") if p)
    ):
        raise ValueError(f"--arms {arm}: give NAME or NAME:key=value,key=value; baseline has no settings")
    if name == "baseline":
        return name, ["model.exact.enabled=false"]
    return name, ["model.exact.enabled=true", *(f"model.exact.{part}" for part in more.split(",") if part)]


def plan(args: argparse.Namespace) -> list[Task]:
    """All runs, stage by stage so that an early stop leaves pairs, then the evaluations of the last stage's runs.

    Raises:
        ValueError: a stage is not WINDOW:TOKENS, or too short for one step.
    """
    tasks, ends = [], []
    for seed in args.seeds:
        before = {arm_settings(arm)[0]: args.base for arm in args.arms}
        for stage in args.stages:
            window, tokens = (int(float(part)) for part in stage.split(":"))
            batch, micro = args.step_tokens // window, max(1, args.micro_tokens // window)
            steps = tokens // args.step_tokens
            if not batch or batch % micro or steps < 2:
                raise ValueError(
                    f"--stages {stage}: {steps} steps of {batch} windows in micro-batches of {micro} cannot be trained"
                )
            for name, weights in map(arm_settings, args.arms):
                run = args.folder / f"seed{seed}" / name / str(window)
                common = [
                    f"restore_from_path={before[name]}", f"exp_manager.exp_dir={run}", f"trainer.max_steps={steps}",
                    f"model.seed={seed}", f"model.data.data_prefix={{train: [{args.data}], validation: [{args.data}_valid]}}",
                    f"model.data.index_mapping_dir={args.folder}/index", f"model.data.seq_length={window}",
                    f"model.max_position_embeddings={window}", f"model.micro_batch_size={micro}",
                    f"model.global_batch_size={batch}", f"model.optim.lr={args.lr}",
                    f"model.optim.sched.min_lr={args.lr / 10}", f"model.optim.sched.warmup_steps={max(1, steps // 20)}",
                    f"trainer.limit_val_batches={max(1, args.valid_tokens // args.step_tokens)}",
                    "trainer.log_every_n_steps=20", "exp_manager.create_tensorboard_logger=false",
                    "exp_manager.checkpoint_callback_params.save_top_k=1",
                ]  # fmt: skip
                done = run / "checkpoints" / f"step_{steps:08d}" / "metadata.json"
                command = exact("train", "--config", args.config, *common, *args.settings, *weights)
                tasks.append(Task(f"seed {seed}, {name}, window {window}", command, done))
                before[name] = run
        ends += [(seed, name, run) for name, run in before.items()]
    options = [word for option in args.evaluate for word in evaluate_option(option)]
    window = int(args.stages[-1].split(":")[0])
    for suite in args.suites:
        for seed, name, run in ends:
            output = args.folder / "evaluation" / f"seed{seed}" / name
            more = ["--data", f"{args.data}_valid", "--window", window] if suite == "context-loss" else []
            command = exact(
                "evaluate", run, "--suite", suite, "--output", output, "--trained-length", window, *more, *options
            )
            tasks.append(Task(f"{suite} of seed {seed}, {name}", command, output / suite / "results.json"))
    for seed in args.seeds if args.suites else []:
        first, *others = (arm_settings(arm)[0] for arm in args.arms)
        for name in others:
            folder = args.folder / "evaluation" / f"seed{seed}"
            output = folder / f"{first}-{name}"
            command = exact(
                "evaluate", "compare", folder / first, folder / name, "--output", output, "--names", first, name
            )
            tasks.append(Task(f"comparison of {first} and {name}, seed {seed}", command, output / "report.md"))
    return tasks


def evaluate_option(option: str) -> list[str]:
    name, _, values = option.partition("=")
    return [f"--{name}", *values.split(",")]


def run_task(task: Task, deadline: float) -> int:
    """0: done. UNFINISHED: stopped by the deadline, in order. Else its exit code."""
    process = subprocess.Popen(task.command)
    try:
        code = process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(TO_SAVE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return UNFINISHED
    if code == 0 and not task.done.exists():  # a run that was stopped from outside, after its checkpoint
        return UNFINISHED
    return code


def results(args: argparse.Namespace, tasks: list[Task]) -> dict[str, Any]:
    """What the runs gave: first and last losses, speed, validation with its loss in every bucket of effective context."""
    runs = []
    for task in tasks:
        folder = task.done.parents[2]
        if task.command[3] != "train" or not (folder / "metrics.jsonl").exists():
            continue
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        if not lines:
            continue
        validation = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
        seed, name, window = folder.parts[-3:]
        tail = lines[-20:]
        runs.append({
            "seed": int(seed.removeprefix("seed")), "arm": name, "window": int(window), "steps": lines[-1]["step"],
            "tokens": lines[-1]["tokens"], "finished": task.done.exists(), "first loss": lines[0]["lm_loss"],
            "last losses": statistics.fmean(line["lm_loss"] for line in tail),
            "tokens/s": statistics.median(line["tokens_per_s"] for line in lines),
            "validation": validation[-1] if validation else None, "command": shlex.join(task.command[1:]),
        })  # fmt: skip
    return {
        "runs": runs,
        "finished": sum(t.done.exists() for t in tasks),
        "tasks": len(tasks),
        "arms": args.arms,
        "lr": args.lr,
    }


def main(argv: list[str]) -> int:
    args = parse(argv)
    deadline = time.monotonic() + args.until
    tasks = plan(args)
    args.folder.mkdir(parents=True, exist_ok=True)
    code = 0
    for number, task in enumerate(tasks, 1):
        if task.done.exists():
            continue
        if time.monotonic() + 10 > deadline:
            code = UNFINISHED
        else:
            print(f"cpt: {task.name} ({number} of {len(tasks)})", file=sys.stderr, flush=True)
            code = run_task(task, deadline)
        if code:
            break
    (args.folder / "cpt.json").write_text(json.dumps(results(args, tasks), indent=1) + "\n")
    if code:
        state = "goes on at the next call" if code == UNFINISHED else f"failed with exit code {code}"
        print(f"cpt: {task.name}: {state}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
