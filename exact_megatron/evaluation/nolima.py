"""NoLiMa (arXiv 2502.05167): needles that share no words with their questions, in books.

The needle sets and books are Adobe's, under a non-commercial research licence: the user brings them. The code here is our own,
written from their format, which is, for the needle set, a list of

    {"id", "system_prompt", "needle", "questions": {type: text}, "tests": {test id: {"input_args": [...], "gold_answers"?: [...]}},
     "character_set"?: [...], "distractors"?: {type: text}, "task_template"?: text}

where {1}, {2}, ... stand for input_args and {CHAR} for a name drawn from character_set, which is then the answer; and for books a
folder of .txt files. A needle goes in at a line break of the book, at 26 depths of the context by default; a response that contains
a gold answer scores 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .model import Model, Text, resolve
from .store import Metric, Store, digest

LENGTHS = (250, 500, 1000, 2000, 4000, 8000, 16000, 32000)
BASE_LENGTHS = 1000  # the base score is the best of the lengths up to here
THRESHOLD = 0.85  # of the base score, for the effective length
DEPTHS = 26
SEED = 42
CLEAR_OF_NEEDLE = 0.2  # of the context, between needle and distractor
TEMPLATE = (
    "Below is an excerpt from a book.\n\n{haystack}\n\nAnswer the question from what the excerpt says or clearly implies, with "
    "nothing but the answer.\n\nQuestion: {question}\nAnswer:"
)
METRIC = Metric("NoLiMa", "responses that contain the answer (%)", scale=100)
Generate = Callable[[str], tuple[str, int]]  # prompt -> response, tokens of the prompt


@dataclass(frozen=True)
class Test:
    """A needle with its question."""

    name: str
    kind: str
    needle: str
    question: str
    answers: tuple[str, ...]
    characters: tuple[str, ...]
    distractor: str | None
    template: str | None
    seed: int


def read_tests(path: str | Path) -> list[Test]:
    """The tests of a needle set, in its order.

    Raises:
        FileNotFoundError, ValueError: no such file, not JSON, an entry without one of its keys, or a {CHAR} without names.
    """
    try:
        entries = json.loads(Path(path).read_text("utf-8"))
        return [test for entry in entries for test in _tests(entry, path)]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a NoLiMa needle set: {error!r}") from error


def _tests(entry: dict[str, Any], path: str | Path) -> Iterator[Test]:
    for kind, question in entry["questions"].items():
        for number, test in entry["tests"].items():

            def fill(text: str, arguments: Sequence[str] = test["input_args"]) -> str:
                for i, argument in enumerate(arguments):
                    text = text.replace(f"{{{i + 1}}}", argument)
                return text

            needle = fill(entry["needle"])
            characters = tuple(entry.get("character_set") or ())
            answers = tuple(test.get("gold_answers") or ())
            name = f"{entry['id']}_{number}_{kind}"
            if "{CHAR}" in needle and not characters or "{CHAR}" not in needle and not answers:
                raise ValueError(f"{path}: test {name} has neither a {{CHAR}} with a character_set nor gold_answers")
            distractor = (entry.get("distractors") or {}).get(kind)
            digits = str(entry["id"])[:4]
            yield Test(
                name,
                kind,
                needle,
                fill(question),
                answers,
                characters,
                fill(distractor) if distractor else None,
                entry.get("task_template"),
                SEED + (int(digits) if digits.isdigit() else 0),
            )


class Book:
    """A haystack in tokens.

    Args:
        path: a .txt file.
        text: the tokenizer that lengths are counted with.
    """

    def __init__(self, path: Path, text: Text) -> None:
        self.name = path.stem
        self.text = text
        self.ids = np.array(text.encode(path.read_text("utf-8")), np.int64)
        breaks = [i for i in np.unique(self.ids).tolist() if "\n" in text.decode([i])]
        self.breaks = np.concatenate([[0], np.flatnonzero(np.isin(self.ids, breaks))])
        self.digest = digest(self.ids)

    def haystack(self, needle: str, length: int, depth: float, distractor: tuple[str, float] | None = None) -> str:
        """`length` tokens of the book with the needle as a line of its own.

        The needle goes to the first line break at or after depth x (length + 1) tokens of the book, and the excerpt is laid around
        it so that it stands at `depth` (in [0, 1]) of the excerpt. A distractor (text, depth) goes to the line break that
        follows its depth in the excerpt, or to its end.

        Raises:
            ValueError: the book is too short.
        """
        at = int(np.searchsorted(self.breaks, depth * (length + 1)))
        if at == len(self.breaks):
            raise ValueError(
                f"book {self.name} has no line break after {depth * length:.0f} tokens: it is too short for {length}"
            )
        place = int(self.breaks[at])
        start = place - round(length * depth)
        end = start + length
        if start < 0 or end > len(self.ids):
            raise ValueError(f"book {self.name} has {len(self.ids)} tokens, too few for {length} around token {place}")
        inserts = [(place, needle)]
        if distractor is not None:
            text, where = distractor
            inside = self.breaks[(self.breaks >= start + where * length) & (self.breaks < end) & (self.breaks != place)]
            inserts.append((int(inside[0]) if len(inside) else end - 1, text))
        parts = []
        done = start
        for cut, line in sorted(inserts):
            before = self.text.decode(self.ids[done : cut + 1].tolist())
            parts.append(before[: max(before.rfind("\n"), 0)] if cut in self.breaks else before)
            parts.append(f" {line}\n")
            done = cut + 1
        return "".join([*parts, self.text.decode(self.ids[done:end].tolist())])


def distractor_depth(rng: np.random.RandomState, depth: float, length: int) -> float:
    """Where a distractor goes: away from the needle by CLEAR_OF_NEEDLE at least, as the benchmark draws it."""
    left, right = max(0.0, depth - 2 * CLEAR_OF_NEEDLE), max(0.0, 1 - depth - 2 * CLEAR_OF_NEEDLE)
    drawn = rng.uniform(0, left + right)
    if length < 500:
        return 0.7 if depth < 0.6 else 0.6 if depth > 0.75 else 0.5
    return depth + CLEAR_OF_NEEDLE + drawn - left if drawn > left else drawn + CLEAR_OF_NEEDLE


def prompts(
    test: Test, book: Book, number: int, length: int, depths: int, template: str
) -> Iterator[tuple[float, str, tuple[str, ...]]]:
    """(depth, prompt, gold answers) of a test in book `number`; the names drawn are the same at every length."""
    rng = np.random.RandomState(test.seed + number)
    for depth in np.linspace(0, 1, depths).tolist():
        needle, question, answers = test.needle, test.question, test.answers
        if "{CHAR}" in needle:
            name = str(rng.choice(test.characters))
            needle = needle.replace("{CHAR}", name)
            question = question.replace("{CHAR}", name)
            answers = (name,)
        distractor = (test.distractor, distractor_depth(rng, depth, length)) if test.distractor else None
        haystack = book.haystack(needle, length, depth, distractor)
        yield depth, template.replace("{question}", question).replace("{haystack}", haystack), answers


def measure(
    generate: Generate,
    tests: Sequence[Test],
    books: Sequence[Book],
    lengths: Sequence[int],
    depths: int,
    store: Store,
    template: str | None,
) -> None:
    """Answer every test in every book at all lengths and depths, but for what `store` holds already."""
    from tqdm import tqdm

    with tqdm(total=len(tests) * len(books) * len(lengths) * depths, desc="nolima", unit="prompt") as bar:
        for length in lengths:
            for number, book in enumerate(books):
                for test in tests:
                    chosen = template or test.template or TEMPLATE
                    for depth, prompt, answers in prompts(test, book, number, length, depths, chosen):
                        name = f"{length}/{book.name}/{test.name}/{depth:.3f}"
                        if name not in store.records:
                            response, tokens = generate(prompt)
                            score = float(any(answer in response for answer in answers))
                            store.add(
                                {
                                    "id": name,
                                    "hash": digest(prompt, list(answers)),
                                    "unit": test.name,
                                    "prompt_tokens": tokens,
                                    "response": response,
                                    "cells": [[test.kind, length, score, 1]],
                                }
                            )
                        bar.update()


def scores(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Base score and effective length as the paper defines them (arXiv 2502.05167, section 4).

    Returns:
        base_score: for each test the mean score at each length up to 1000, the best of these, averaged over tests; in [0, 1].
        threshold: 0.85 of it. effective_length: the longest length measured whose mean score reaches it, 0 if none does.
        by_length: mean score of each length.
    """
    found: dict[int, dict[str, list[float]]] = {}
    for record in records:
        ((_, length, score, _),) = record["cells"]
        found.setdefault(length, {}).setdefault(record["unit"], []).append(score)
    by_length = {n: float(np.mean([s for v in tests.values() for s in v])) for n, tests in sorted(found.items())}
    best: dict[str, float] = {}
    for tests in (found[n] for n in found if n <= BASE_LENGTHS):
        for unit, values in tests.items():
            best[unit] = max(best.get(unit, 0.0), float(np.mean(values)))
    if not best:
        return {"base_score": None, "threshold": None, "effective_length": None, "by_length": by_length}
    base = float(np.mean(list(best.values())))
    reached = [n for n, score in by_length.items() if score >= THRESHOLD * base]
    return {
        "base_score": base,
        "threshold": THRESHOLD * base,
        "effective_length": max(reached, default=0),
        "by_length": by_length,
    }


def greedy(folder: Path, device: str, dtype: str, max_new_tokens: int, chat: bool) -> Generate:
    """Greedy answers of a Hugging Face model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device, dtype = resolve(device, dtype)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    model = model.to(device).eval()
    if chat and not tokenizer.chat_template:
        raise ValueError(f"--chat: the tokenizer of {folder} has no chat template")

    def generate(prompt: str) -> tuple[str, int]:
        if chat:
            said = [{"role": "system", "content": "You are a helpful assistant"}, {"role": "user", "content": prompt}]
            prompt = str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(device)
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            out = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
        tokens = inputs["input_ids"].shape[1]
        return str(tokenizer.decode(out[0, tokens:], skip_special_tokens=True)), tokens

    return generate


def run(args: argparse.Namespace, model: Model) -> tuple[Store, Metric, dict[str, Any]]:
    """The suite on a Hugging Face model; see command.py for the options."""
    tests = read_tests(args.needles)[: args.limit]
    files = sorted(Path(args.haystacks).glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"{args.haystacks} holds no .txt file: --haystacks is the folder of NoLiMa's books")
    text = model.text()
    books = [Book(file, text) for file in files]
    lengths = sorted(args.lengths or LENGTHS)
    for book in books:
        book.haystack("", lengths[-1], 1.0)  # too short a book is said now, not after hours
    template = Path(args.template).read_text("utf-8") if args.template else None
    if template is not None and not ("{haystack}" in template and "{question}" in template):
        raise ValueError(f"{args.template} must hold {{haystack}} and {{question}}")
    settings = {
        "needles": digest(Path(args.needles).read_bytes()),
        "books": [b.digest for b in books],
        "lengths": lengths,
        "depths": args.depths,
        "tests": len(tests),
        "template": "file" if template else "needle set or ours",
        "template_digest": digest(template or TEMPLATE),
        "chat": args.chat,
        "max_new_tokens": args.max_new_tokens,
        "dtype": args.dtype,
        "tokenizer_digest": text.digest,
    }
    notes = ["books are taken in order of their names and lengths are counted with the model's tokenizer"]
    if template is None and any(test.template is None for test in tests):
        notes.append(
            "the prompt's wording is our own: give the benchmark's with --template to compare with published numbers"
        )
    if any(test.distractor for test in tests):
        notes.append("distractors go to line breaks; the benchmark puts them into the middle of lines")
    store = Store.open(args.output, "nolima", METRIC, model.described, settings, notes)
    measure(
        greedy(model.path, args.device, args.dtype, args.max_new_tokens, args.chat),
        tests,
        books,
        lengths,
        args.depths,
        store,
        template,
    )
    return store, METRIC, {"scores": scores(list(store.records.values()))}
