"""The built-in task of `exact-megatron study`: documents whose questions can only be answered from a fact further back.

Words of a low-entropy chain, between them facts (`F key value`) and questions (`Q key value`) about facts of the same document. A
question's value follows from its fact and from nothing else: its loss measures the use of evidence at a known distance. Distances are
log-uniform and lengths log-normal: short distances are most of what a model sees, as in real corpora.

Every word is one token: WORDS is the tokenizer's vocabulary after the end of a document.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.files import write_json, write_text
from ..utils.tokenizer import EOD

TEXT = tuple(f"t{i}" for i in range(12))
KEYS = tuple(f"k{i}" for i in range(64))
VALUES = tuple(f"v{i}" for i in range(16))
FACT, QUESTION = "F", "Q"
WORDS = (FACT, QUESTION, *TEXT, *KEYS, *VALUES)
FACTS = 0.3  # share of facts among facts and questions
GAP = 1.5  # words of text between them, on average
SPAN = 3  # words of a fact or question
CHAIN = 12345  # seed of the chain of words: part of the task, the same in all corpora
NEAREST = 24  # least distance that is aimed at: what stands nearer is answered without finding the key, by the last value seen


@dataclass(frozen=True)
class Document:
    """Words, and where the answers are.

    Attributes:
        words: without the end of the document.
        answers: index of the value of every question.
        distances: words back to where the same value last followed the same key, for each answer.
    """

    words: list[str]
    answers: list[int]
    distances: list[int]


class _Chain:
    """First-order Markov chain over TEXT."""

    def __init__(self, rng: np.random.Generator) -> None:
        following = np.random.default_rng(CHAIN).dirichlet(np.full(len(TEXT), 0.15), len(TEXT))
        self._cumulated = following.cumsum(1)
        self._rng = rng
        self._state = int(rng.integers(len(TEXT)))

    def words(self, count: int) -> list[str]:
        found = []
        for u in self._rng.random(count):
            self._state = min(int(np.searchsorted(self._cumulated[self._state], u)), len(TEXT) - 1)
            found.append(TEXT[self._state])
        return found


def document(rng: np.random.Generator, length: int) -> Document:
    """A document of `length` words, as a corpus has them."""
    chain = _Chain(rng)
    words: list[str] = []
    answers: list[int] = []
    distances: list[int] = []
    keys = rng.permutation(len(KEYS))
    seen: list[tuple[int, int, int]] = []  # where a value last stood, its key, the value; the longest ago first
    while len(words) < length:
        words += chain.words(int(rng.geometric(1 / GAP)))
        here = len(words) + SPAN - 1
        if not seen or (len(seen) < len(KEYS) and rng.random() < FACTS):
            key, value = int(keys[len(seen)]), int(rng.integers(len(VALUES)))
            words.append(FACT)
        else:
            wanted = here - math.exp(rng.uniform(math.log(NEAREST), math.log(max(here, NEAREST + 1))))
            at, key, value = min(seen, key=lambda fact: abs(fact[0] - wanted))
            seen.remove((at, key, value))
            words.append(QUESTION)
            answers.append(here)
            distances.append(here - at)
        words += [KEYS[key], VALUES[value]]
        seen.append((here, key, value))
    kept = sum(answer < length for answer in answers)
    return Document(words[:length], answers[:kept], distances[:kept])


def question_at_the_end(rng: np.random.Generator, length: int, distance: int) -> Document:
    """A document of `length` words that ends in a question whose fact is `distance` words back, with other facts and questions as usual
    and nothing else about its key: distance is then the only thing that differs between prompts of one length.

    Raises:
        ValueError: no room for the fact.
    """
    if not 2 * SPAN <= distance <= length - SPAN:
        raise ValueError(f"a fact {distance} words back does not fit into a document of {length}")
    key, value = KEYS[int(rng.integers(len(KEYS)))], VALUES[int(rng.integers(len(VALUES)))]
    around = document(rng, length + 8 * SPAN)
    other = _Chain(rng)
    words = [other.words(1)[0] if word == key else word for word in around.words[: length - SPAN]]
    at = length - 1 - distance  # of the fact's value
    words[at - SPAN + 1 : at + 1] = [FACT, key, value]
    return Document([*words, QUESTION, key, value], [length - 1], [distance])


def lengths(rng: np.random.Generator, median: float, sigma: float, longest: int) -> Iterator[int]:
    """Lengths of documents in words: log-normal, between 16 and `longest`."""
    while True:
        yield int(np.clip(math.exp(rng.normal(math.log(median), sigma)), 16, longest))


def write_corpus(path: Path, seed: int, tokens: int, median: float, sigma: float, longest: int) -> None:
    """Write documents as JSON lines for `exact-megatron prepare`, until they have `tokens` tokens with their ends.

    Args:
        median, sigma, longest: of the lengths in words, see `lengths`.
    """
    rng = np.random.default_rng(seed)
    sizes = lengths(rng, median, sigma, longest)
    lines = []
    while tokens > 0:
        item = document(rng, next(sizes))
        lines.append(json.dumps({"text": " ".join(item.words)}))
        tokens -= len(item.words) + 1
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer.json with a token for each word, and the end of a document."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({EOD: 0} | {word: i for i, word in enumerate(WORDS, 1)}, unk_token=EOD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([EOD])
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOD})
    write_text(folder / "tokenizer.json", tokenizer.to_str())
    return folder / "tokenizer.json"


def token_ids(words: list[str]) -> list[int]:
    """Ids of words in the tokenizer of `write_tokenizer`."""
    return [_IDS[word] for word in words]


_IDS: dict[str, Any] = {word: i for i, word in enumerate(WORDS, 1)}
