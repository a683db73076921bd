"""How well a run answers the questions of the built-in task, by the distance of the evidence.

    python -m exact_megatron.study.evaluate RUN FILE --window 1024

Three sets of held-out documents, the same for every run of a study: documents as in training, of the window's length and of twice that (a
prompt grows with the distance of its evidence), and prompts of the window's length that end in a question, whose evidence is moved
(nothing but the distance differs).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.model import Model
from ..evaluation.scorer import Scorer
from ..utils.files import write_text
from ..utils.ranks import be_single_rank
from .task import TEXT, VALUES, Document, document, question_at_the_end, token_ids

EDGES = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # lower edges of the bins of distance, in tokens
MEASURES = ("loss", "accuracy", "margin")


def answers(scorer: Scorer, item: Document) -> np.ndarray:
    """float64[answers, 3], one row an answer: its loss in nats, whether the right value is the likeliest of all values, and by how
    many nats it is likelier than the likeliest wrong one."""
    ids = token_ids(item.words)
    values = np.array(token_ids(list(VALUES)))
    positions = [at - 1 for at in item.answers for _ in values]
    found = scorer.logprobs(ids, positions, [int(v) for _ in item.answers for v in values]).reshape(-1, len(values))
    right = values == np.array([ids[at] for at in item.answers])[:, None]
    own = found[right]
    best = np.where(right, -np.inf, found).max(1)
    return np.stack([-own, own > best, own - best], 1)


def by_distance(scorer: Scorer, items: Iterable[Document]) -> list[dict[str, Any]]:
    """Means of `answers` in each bin of distance: {"low", "high", "answers", "loss", "accuracy", "margin"}."""
    items = list(items)
    rows = np.concatenate([answers(scorer, item) for item in items if item.answers])
    bins = np.searchsorted(EDGES, np.concatenate([item.distances for item in items]), side="right") - 1
    found = []
    for number in np.unique(bins):
        here = rows[bins == number]
        edges = {"low": EDGES[number], "high": EDGES[number + 1] - 1, "answers": len(here)}
        found.append(edges | dict(zip(MEASURES, here.mean(0).tolist())))
    return found


def text_loss(scorer: Scorer, items: Iterable[Document]) -> float:
    """Loss of the words of the chain, in nats: what has nothing to do with evidence."""
    total, count = 0.0, 0
    for item in items:
        ids = token_ids(item.words)
        at = [i for i, word in enumerate(item.words) if i and word in TEXT]
        total -= float(scorer.logprobs(ids, [i - 1 for i in at], [ids[i] for i in at]).sum())
        count += len(at)
    return total / count


def distances(window: int) -> list[int]:
    """Of the evidence in prompts of one length: powers of two, and the farthest that fits."""
    return [*[edge for edge in EDGES if 8 <= edge <= window // 2], window - 8]


def evaluate(scorer: Scorer, window: int, documents: int, prompts: int, seed: int) -> dict[str, Any]:
    """All that is measured of a run; a run of another study with the same numbers gets the same documents.

    Args:
        window: of the training, in tokens.
        documents: of the window's length; of twice its length half as many.
        prompts: for each distance.
    """
    rng = np.random.default_rng([seed, window])
    plain = [document(rng, window) for _ in range(documents)]
    beyond = [document(rng, 2 * window) for _ in range((documents + 1) // 2)]
    fixed = [question_at_the_end(rng, window, d) for d in distances(window) for _ in range(prompts)]
    return {
        "documents": by_distance(scorer, plain),
        "fixed": by_distance(scorer, fixed),
        "beyond": by_distance(scorer, beyond),
        "text": text_loss(scorer, plain),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m exact_megatron.study.evaluate", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("file", type=Path, help="the result, as JSON")
    parser.add_argument("--window", type=int, required=True, help="of the training, in tokens")
    parser.add_argument("--documents", type=int, default=40, help="of the window's length")
    parser.add_argument("--prompts", type=int, default=40, help="for each distance, at fixed length")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args(arguments)
    be_single_rank()
    model = Model.at(args.run)
    scorer = model.scorer("auto", "auto")
    found = evaluate(scorer, args.window, args.documents, args.prompts, args.seed)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.file, json.dumps({"model": model.described, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
