"""Items of RULER: the same as those of lm-eval's own entry points, whose downloads are replaced here."""

from __future__ import annotations

import contextlib
import importlib
import json
import random
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from exact_megatron.evaluation import harness, ruler_items

SAMPLES = 3
WORDS = "the a of loss token sees long far text model reads learns Evidence context window and then it was".split()
# Task: module of lm_eval.tasks.ruler, its function that a task's file names, and the generator below it.
ENTRIES = {
    **{name: ("niah_utils", name, "generate_samples") for name in ruler_items.NEEDLE_TASKS},
    "ruler_vt": ("vt_utils", "get_vt_dataset", "sys_vartrack_w_noise_random"),
    "ruler_cwe": ("cwe_utils", "get_cw_dataset", "sys_word_pair_random"),
    "ruler_fwe": ("fwe_utils", "fwe_download", "sys_kwext"),
    "ruler_qa_squad": ("qa_utils", "get_squad", "generate_samples"),
    "ruler_qa_hotpot": ("qa_utils", "get_hotpotqa", "generate_samples"),
}


def text(rng: random.Random, words: int) -> str:
    """Made-up prose with abbreviations, quotes and numbers, at which splitters differ."""
    found = []
    while len(found) < words:
        sentence = rng.choices(WORDS, k=rng.randint(3, 20))
        sentence[0] = sentence[0].title()
        if rng.random() < 0.2:
            sentence[1] = rng.choice(['"So it is."', "e.g. this", "Mr. Smith", "3.50", "(it ended.)"])
        found += [*sentence[:-1], sentence[-1] + rng.choice([".", "?", "!", '."'])]
    return " ".join(found)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Files of the form of FILES, with made-up content."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(1)
    articles: list[Any] = []
    for article in range(8):
        paragraphs = []
        for paragraph in range(6):
            answers = [{"text": WORDS[paragraph]}, {"text": "both of them"}]
            questions = [
                {"question": f"What is {article}.{paragraph}.{q}?", "answers": answers, "is_impossible": q == 1}
                for q in range(3)
            ]
            paragraphs.append({"context": f"Text {article}.{paragraph} {text(rng, 30)}", "qas": questions})
        articles.append({"paragraphs": paragraphs})
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    hotpot = [
        {
            "question": f"Who is {number}?",
            "answer": f"answer {number}",
            "context": [[f"Title {number}.{i}", [text(rng, 6), text(rng, 6)]] for i in range(10)],
        }
        for number in range(20)
    ]
    (folder / "hotpotqa.json").write_text(json.dumps(hotpot))
    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": text(rng, 6000).replace(". ", ".\n\n", 40)}))
    return folder


def test_questions_name_their_documents(data):
    questions, documents = ruler_items.read_squad(data)
    assert len(questions) == 8 * 6 * 2 and len(documents) == 48 and documents == sorted(documents)
    question = next(q for q in questions if q["query"] == "What is 3.2.2?")
    assert question["outputs"] == ["of", "both of them"]
    assert documents[question["context"][0]].startswith("Text 3.2 ")
    assert {documents[i].split()[1] for i in question["more_context"]} == {"3.0", "3.1", "3.3", "3.4", "3.5"}
    questions, documents = ruler_items.read_hotpotqa(data)
    assert len(documents) == 200 and questions[7]["outputs"] == ["answer 7"]
    assert [documents[i].split("\n")[0] for i in questions[7]["context"]] == [f"Title 7.{i}" for i in range(10)]


@pytest.mark.parametrize("version", ["0.4.12", "0.5.0", None])
def test_another_version_of_lm_eval_is_refused(monkeypatch, version):
    def installed(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", installed)
    message = (
        "is not installed: pip" if version is None else rf"need lm-eval >=0.4.13,<0.5, {version} is installed: pip"
    )
    with pytest.raises(ValueError, match=message):
        harness.require_lm_eval()


@pytest.mark.parametrize("version", ["0.4.13", "0.4.20", "0.4.14.dev0"])
def test_known_versions_of_lm_eval_are_taken(monkeypatch, version):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    harness.require_lm_eval()


def test_setup_installs_the_versions_that_are_known():
    setup = Path(__file__).parents[3] / "setup.py"
    assert f'"lm-eval[hf,ruler]{harness.LM_EVAL}"' in setup.read_text()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    pytest.importorskip("lm_eval")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tokenizer")
    made = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture(params=["rule", "punkt_tab"])
def splitter(request, tmp_path, monkeypatch) -> str:
    """nltk finds no sentence splitter, or an untrained one."""
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [])
    if request.param == "punkt_tab":
        folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
        folder.mkdir(parents=True)
        for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
            (folder / name).write_text("mr\n" if name == "abbrev_types.txt" else "")
        nltk.data.path.append(str(tmp_path))
        nltk.tokenize._get_punkt_tokenizer.cache_clear()
    return request.param


@contextlib.contextmanager
def replaced(data: Path, splitter: str, module: Any, generator: str) -> Iterator[None]:
    """lm-eval's entry points with `data` in place of what they download, and SAMPLES items in place of 500."""
    niah = ruler_items.import_needles()
    qa = importlib.import_module("lm_eval.tasks.ruler.qa_utils")
    niah.cached_sent_tokenize.cache_clear()
    for read in (qa.read_squad, qa.read_hotpotqa):
        read.cache_clear()
    generate = getattr(module, generator)

    def some(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("num_samples") != 1:  # 1: the solved example of variable tracking
            kwargs["num_samples"] = SAMPLES
        return generate(*args, **kwargs)

    def haystack(type_haystack: str) -> Any:
        if type_haystack != "essay":
            return niah.get_haystack(type_haystack=type_haystack)
        return re.sub(r"\s+", " ", json.loads((data / "PaulGrahamEssays.json").read_text())["text"]).split(" ")

    def read_json(url: str) -> Any:
        return json.loads((data / ("hotpotqa.json" if "hotpot" in url else "squad.json")).read_text())

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(module, generator, some))
        patches.enter_context(mock.patch.object(qa, "download_json", read_json))
        if hasattr(module, "get_haystack"):
            patches.enter_context(mock.patch.object(module, "get_haystack", haystack))
        if splitter == "rule":
            patches.enter_context(mock.patch.object(niah, "sent_tokenize", ruler_items.split_sentences))
        yield


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("task", ruler_items.TASKS)
def test_items_are_those_of_lm_eval(task, length, splitter, tokenizer, data):
    if splitter == "punkt_tab" and "essay" not in getattr(ruler_items.NEEDLE_TASKS.get(task), "haystack", ""):
        pytest.skip("the task splits no sentences")
    ruler_items.import_needles()
    name, entry, generator = ENTRIES[task]
    module = importlib.import_module(f"lm_eval.tasks.ruler.{name}")
    random.seed(ruler_items.SEED)
    np.random.seed(ruler_items.SEED)
    if task == "ruler_cwe":
        module.RNG.seed(ruler_items.SEED)
    with replaced(data, splitter, module, generator):
        expected = getattr(module, entry)(max_seq_lengths=[length], tokenizer=str(tokenizer))["test"].to_list()
    made = ruler_items.make_items(task, length, SAMPLES, tokenizer, data)
    assert len(made) == SAMPLES and made == expected
    assert ruler_items.make_items(task, length, SAMPLES - 1, tokenizer, data) == made[:-1]


def test_nothing_is_downloaded(monkeypatch, splitter, tokenizer):
    """lm-eval looks for punkt_tab when prepare_niah is imported."""
    import nltk

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(nltk, "download", refuse)
    monkeypatch.delitem(importlib.import_module("sys").modules, "lm_eval.tasks.ruler.prepare_niah", raising=False)
    before = list(nltk.data.path)
    ruler_items.import_needles.cache_clear()
    ruler_items.import_needles()
    assert nltk.data.path == before
    assert ruler_items.has_punkt() == (splitter == "punkt_tab")
    assert not list((Path.home() / "nltk_data").glob("tokenizers/punkt_tab")) or splitter == "punkt_tab"


def test_needles_that_do_not_fit_are_said(tokenizer):
    task = ruler_items.NEEDLE_TASKS["niah_single_2"]
    from transformers import AutoTokenizer

    count = AutoTokenizer.from_pretrained(str(tokenizer))
    with pytest.raises(ValueError, match="1 needles, the question and 128 tokens for the answer do not fit"):
        ruler_items.essay_items(task, ["word."] * 2000, ruler_items.split_sentences, 140, 2, count)
