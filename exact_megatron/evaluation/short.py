"""Short tasks through lm-eval: what a model must not lose while its long context gets better.

lm-eval loads the data from a hub. Without one, --datasets DIR names a folder with the same data:

    DIR/arc_challenge/test.jsonl   DIR/hellaswag/validation.jsonl   DIR/mmlu/anatomy/{dev,test}.jsonl   ...

one folder a task (for MMLU one a subject), one file a split, .jsonl or .parquet, with the columns of the hub's data set.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .harness import load, open_model, run_task, task_manager
from .model import Model
from .store import Metric, Store, digest

METRIC = Metric("Short tasks", "accuracy (%)", scale=100)
# Task: folder of lm_eval/tasks, name there, metric, filter.
TASKS = {
    "mmlu": ("mmlu/default", "mmlu", "acc", "none"),
    "arc_challenge": ("arc", "arc_challenge", "acc_norm", "none"),
    "hellaswag": ("hellaswag", "hellaswag", "acc_norm", "none"),
    "winogrande": ("winogrande", "winogrande", "acc", "none"),
    "piqa": ("piqa", "piqa", "acc_norm", "none"),
    "gsm8k": ("gsm8k", "gsm8k", "exact_match", "flexible-extract"),
}
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def local_data(folder: Path) -> dict[str, Any] | None:
    """Overrides of an lm-eval task that make it read the splits in `folder`; None where it holds no split.

    Raises:
        ValueError: splits of several kinds of file.
    """
    files = sorted(f for f in folder.glob("*") if f.suffix in _READERS)
    if not files:
        return None
    if len(kinds := {_READERS[f.suffix] for f in files}) > 1:
        raise ValueError(f"{folder} holds splits as {' and '.join(sorted(kinds))}: use one kind of file")
    splits = {f.stem: str(f) for f in files}
    named = {"training_split": "train", "validation_split": "validation"}
    # lm-eval reads these splits for few-shot examples as soon as a task names them
    absent = {key: None for key, split in named.items() if split not in splits}
    return {"dataset_path": kinds.pop(), "dataset_name": None, "dataset_kwargs": {"data_files": splits}, **absent}


def load_tasks(name: str, manager: Any, datasets_dir: str | None) -> tuple[list[Any], str | None]:
    """lm-eval's task objects (57 for MMLU), and in their place the reason why there are none, in one line."""
    wanted = TASKS[name][1]
    if datasets_dir is None:
        try:
            return load(manager, wanted), None
        except (OSError, RuntimeError) as error:  # unreachable hub, or a data set that is not there (datasets, httpx)
            reason = " ".join(str(error).split())[:160]
            return [], f"{name}: its data cannot be loaded here ({reason}); bring them with --datasets"
    folder = Path(datasets_dir, name)
    try:
        return _load_local(name, manager, folder)
    except KeyError as error:  # of the data set, that is a dict of splits
        return [], f"{name}: {folder} lacks the split {error}"


def _load_local(name: str, manager: Any, folder: Path) -> tuple[list[Any], str | None]:
    if name != "mmlu":
        found = local_data(folder)
        if found is None:
            return [], f"{name}: no train, validation or test split in {folder}"
        return load(manager, TASKS[name][1], **found), None
    subjects = {f.name: local for f in sorted(folder.glob("*")) if f.is_dir() and (local := local_data(f))}
    if not subjects:
        return [], f"{name}: no folder of a subject with its splits in {folder}"
    return [task for subject, local in subjects.items() for task in load(manager, f"mmlu_{subject}", **local)], None


def records(name: str, task: Any, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of lm-eval's samples, one a document."""
    metric, chosen = TASKS[name][2:]
    made = []
    for sample in samples:
        if sample["filter"] == chosen:
            item = f"{task.config.task}/{sample['doc_id']}"
            made.append(
                {
                    "id": item,
                    "hash": digest(sample["doc_hash"], sample["prompt_hash"]),
                    "unit": item,
                    "stratum": name,
                    "response": sample["filtered_resps"],
                    "cells": [[name, None, float(sample[metric]), 1]],
                }
            )
    return made


def run(args: argparse.Namespace, model: Model) -> tuple[Store, Metric, dict[str, Any]]:
    """The suite on a Hugging Face model; see command.py for the options.

    Raises:
        ValueError: an unknown task, or no task whose data are at hand.
    """
    names = args.tasks or list(TASKS)
    if unknown := [n for n in names if n not in TASKS]:
        raise ValueError(f"--tasks {' '.join(unknown)}: the short tasks are {', '.join(TASKS)}")
    lm = open_model(model.path, args.device, args.dtype, args.batch_size, None)
    manager = task_manager(*(TASKS[n][0] for n in names))
    found = {}
    missing = []
    for name in names:
        tasks, reason = load_tasks(name, manager, args.datasets)
        if reason:
            missing.append(reason)
            print(reason, flush=True)
        else:
            found[name] = tasks
    if not found:
        raise ValueError("none of the short tasks has its data at hand")
    settings = {
        "tasks": {name: sorted(task.config.task for task in tasks) for name, tasks in found.items()},
        "limit": args.limit,
        "num_fewshot": args.num_fewshot,
        "dtype": args.dtype,
    }
    notes = [
        "prompts, few-shot examples (GSM8K 5, the others none, unless --num-fewshot) and metrics are lm-eval's: acc_norm for ARC-C, "
        "HellaSwag and PIQA, acc for MMLU and WinoGrande, flexible-extract for GSM8K",
        *(f"not measured: {reason}" for reason in missing),
    ]
    if args.limit and "mmlu" in found:
        notes.append(f"--limit {args.limit} is for each of MMLU's subjects")
    store = Store.open(args.output, "short", METRIC, model.described, settings, notes)
    for name, tasks in found.items():
        for task in tasks:
            if not any(r.startswith(f"{task.config.task}/") for r in store.records):
                samples = run_task(lm, task, manager, args.limit, args.num_fewshot)
                store.add(*records(name, task, samples))
    return store, METRIC, {"missing": missing}
