"""The distance probe: does an answer still depend on evidence that stands d tokens before the question?

An item is a made-up fact ("The favourite colour of Tolvard is violet."), a question that repeats its words, a right answer (the
fact's) and a wrong one of the same kind. A prompt is

    start | filler[before] | evidence or filler | filler[distance] | question

in token ids, so that distances are exact: `distance` is the number of tokens between the last of the evidence and the first of
the question. With evidence removed, filler of the same length stands in its place. The score is the log-probability of the
right answer minus that of the wrong one; its *effect* is the score with evidence minus the score without. The text just before the
question is the same at every distance of an item. arXiv 2605.10544 reports such a probe; its items are not published, these are
our own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .filler import Filler
from .model import Text
from .report import SHARE
from .scorer import Scorer, continuation_logprobs
from .store import Metric, Store, digest

DISTANCES = tuple(2**k for k in range(6, 15))  # 64 ... 16K
BEFORE = 64  # tokens of filler in front of the evidence
TRIES = 20  # filler windows that an item looks through for one without its answers

METRIC = Metric(
    "Distance probe",
    "effect of the evidence on the right answer's margin (nats)",
    tasks=("effect",),
    length="distance",
    inclusive=False,
)

_KINDS = {
    "favourite colour": "amber azure beige black blue bronze brown coral crimson cyan gold gray green indigo ivory lavender "
    "lime magenta maroon navy olive orange orchid peach pink plum purple red ruby salmon scarlet silver tan teal turquoise "
    "violet white yellow",
    "pet": "ant bat bear bee bird bull camel cat cow crab crow deer dog dolphin dove dragon duck eagle elephant fish fox frog goat "
    "goose hawk horse lamb lion lizard mole monkey moth mouse otter owl ox panda parrot pig pigeon pony rabbit rat raven seal "
    "shark sheep snake spider swan tiger toad turtle whale wolf worm zebra",
    "home town": "Athens Austin Berlin Boston Cairo Chicago Dallas Delhi Denver Dublin Florence Geneva Hamburg Houston Istanbul "
    "Kiev Lima Lisbon London Madrid Manchester Melbourne Miami Milan Moscow Munich Naples Oslo Paris Perth Prague Rome Seattle "
    "Seoul Stockholm Sydney Tokyo Toronto Venice Vienna Warsaw Zurich",
    "profession": "actor artist baker banker barber builder butcher chef clerk coach cook dancer dentist doctor driver editor "
    "engineer farmer guard hunter judge lawyer librarian mayor merchant miner musician nurse painter photographer pilot plumber "
    "poet priest sailor scientist singer soldier tailor teacher waiter writer",
    "favourite food": "apple banana bean beef bread butter cake carrot cheese cherry chicken chocolate corn cream egg garlic "
    "grape honey lemon lobster mango meat melon milk mushroom nut onion pasta peanut pear pepper pie pizza pork potato pumpkin "
    "rice salad salmon soup spinach steak sugar tomato tuna turkey walnut",
}
_SYLLABLES = "bal dor fen gar hul jin kel lom mer nol pru quil rav sim tol ural vek wex yor zan".split()


@dataclass(frozen=True)
class Item:
    """One question with its filler.

    Attributes:
        name: "SEED-NUMBER".
        filler: int64[BEFORE + len(evidence) + longest distance].
        evidence, question: ids.
        right, wrong: ids of the answers, as many tokens each.
        words: the right and the wrong answer, spelled out.
    """

    name: str
    start: list[int]
    filler: np.ndarray
    evidence: list[int]
    question: list[int]
    right: list[int]
    wrong: list[int]
    words: tuple[str, str]

    def prompt(self, distance: int, with_evidence: bool) -> list[int]:
        """Ids of the prompt."""
        room = len(self.evidence)
        filler = self.filler[len(self.filler) - BEFORE - room - distance :].tolist()
        middle = self.evidence if with_evidence else filler[BEFORE : BEFORE + room]
        return [*self.start, *filler[:BEFORE], *middle, *filler[BEFORE + room :], *self.question]


class ItemMaker:
    """Items from seeds, the same for the same tokenizer, filler and longest distance."""

    def __init__(self, text: Text, filler: Filler, longest: int) -> None:
        self.text, self.filler, self.longest = text, filler, longest
        self.answers = {kind: self._answers(words.split()) for kind, words in _KINDS.items()}

    def _answers(self, words: Sequence[str]) -> dict[str, list[int]]:
        """Ids of those words that have one length in tokens, the length that most words have; 1 if eight words have it."""
        by_length: dict[int, dict[str, list[int]]] = {}
        for word in words:
            ids = self.text.encode(f" {word}")
            by_length.setdefault(len(ids), {})[word] = ids
        return by_length[1] if len(by_length.get(1, ())) >= 8 else max(by_length.values(), key=len)

    def item(self, seed: int, number: int) -> Item:
        """Item `number` of a seed.

        Raises:
            ValueError: no window of the filler was free of the answers.
        """
        rng = np.random.default_rng([seed, number])
        kind = str(rng.choice(sorted(self.answers)))
        words = self.answers[kind]
        person = "".join(rng.choice(_SYLLABLES, 3)).capitalize()
        stem = self.text.encode(f"\n\nThe {kind} of {person} is")
        close = self.text.encode(".\n\n")
        room = len(stem) + len(next(iter(words.values()))) + len(close)
        for _ in range(TRIES):
            filler = self.filler.window(rng, BEFORE + room + self.longest)
            free = sorted(word for word, ids in words.items() if not _contains(filler, ids))
            if len(free) >= 2:
                right, wrong = (str(word) for word in rng.choice(free, 2, replace=False))
                evidence = [*stem, *words[right], *close]
                name = f"{seed}-{number}"
                return Item(name, self.text.start, filler, evidence, stem, words[right], words[wrong], (right, wrong))
        raise ValueError(
            f"{TRIES} windows of the filler held all but one of the answers for {kind!r}: give other text with --filler"
        )


def _contains(ids: np.ndarray, part: Sequence[int]) -> bool:
    found = np.ones(max(len(ids) - len(part) + 1, 0), bool)
    for shift, token in enumerate(part):
        found &= ids[shift : shift + len(found)] == token
    return bool(found.any())


def measure(scorer: Scorer, item: Item, distances: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One record a distance."""
    for distance in distances:
        margins, prompts = [], []
        for with_evidence in (True, False):
            prompts.append(item.prompt(distance, with_evidence))
            right, wrong = continuation_logprobs(scorer, prompts[-1], [item.right, item.wrong])
            margins.append(right - wrong)
        present, absent = margins
        cells = {
            "effect": present - absent,
            "with evidence": present,
            "without": absent,
            SHARE: float(present > 0),
        }
        yield {
            "id": f"{item.name}@{distance}",
            "hash": digest(*(np.array(ids) for ids in (*prompts, item.right, item.wrong))),
            "unit": item.name,
            "right": item.words[0],
            "wrong": item.words[1],
            "prompt_tokens": len(prompts[0]),
            "cells": [[task, distance, value, 1] for task, value in cells.items()],
        }


def run(
    scorer: Scorer, maker: ItemMaker, store: Store, distances: Sequence[int], seeds: Sequence[int], items: int
) -> None:
    """Measure `items` items of every seed at all distances, but for what `store` holds already."""
    from tqdm import tqdm

    with tqdm(total=len(seeds) * items * len(distances), desc="distance-probe", unit="prompt pair") as bar:
        for number in range(items):  # seeds take turns, so that an interrupted run holds some of each
            for seed in seeds:
                missing = [d for d in distances if f"{seed}-{number}@{d}" not in store.records]
                bar.update(len(distances) - len(missing))
                if missing:
                    for record in measure(scorer, maker.item(seed, number), missing):
                        store.add(record)
                        bar.update()
