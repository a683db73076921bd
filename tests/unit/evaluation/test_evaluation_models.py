"""Scorers of both kinds of model against plain references, the suites that generate text, and all suites on a real model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from exact_megatron.cli import main
from exact_megatron.evaluation import nolima, ruler, ruler_items
from exact_megatron.evaluation.model import Model, Text
from exact_megatron.evaluation.store import Metric, Store, read_results
from tests.helpers import own_items, tiny
from tests.helpers.ranks import launch

# Hugging Face


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory) -> Path:
    """A random LLaMA with the byte-level tokenizer of its own bytes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=300, num_key_value_heads=2, max_position_embeddings=4096, eos_token_id=0, bos_token_id=None, **shape
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(folder)
    return folder


def test_hugging_face_scorer_equals_log_softmax_of_all_logits(tiny_llama, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    from exact_megatron.evaluation import scorer

    ids = np.random.default_rng(0).integers(0, 300, 40).tolist()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tiny_llama)(torch.tensor([ids])).logits[0]
    reference = torch.log_softmax(logits.double(), -1).numpy()
    monkeypatch.setattr(scorer, "ROWS", 7)  # several blocks
    model = Model.at(tiny_llama).scorer("cpu", "auto")
    found = model.logprobs(ids, range(39), ids[1:])
    np.testing.assert_allclose(found, reference[np.arange(39), ids[1:]], atol=1e-5)
    np.testing.assert_allclose(model.logprobs(ids, [5, 39, 5], [1, 2, 3]), reference[[5, 39, 5], [1, 2, 3]], atol=1e-5)


def test_probe_and_loss_run_on_a_hugging_face_folder(tiny_llama, tmp_path, write_corpus, capsys):
    prefix = write_corpus(np.array([30, 200, 90]), tokens=np.random.default_rng(0).integers(1, 256, 320))
    line = ["evaluate", str(tiny_llama), "--suite", "distance-probe", "context-loss", "--output", str(tmp_path / "o")]
    line += ["--distances", "32", "64", "--limit", "2", "--data", prefix, "--window", "64", "--filler", __file__]
    assert main(line) == 0
    assert main(line) == 0  # finished: reads what is there
    loss, _ = read_results(tmp_path / "o" / "context-loss")
    assert loss["items"] == 2 and 4 < loss["summary"]["averages"]["all"]["value"] < 7  # about log(300)
    assert loss["versions"]["torch"] and loss["settings"]["window"] == 64
    probe, records = read_results(tmp_path / "o" / "distance-probe")
    assert set(records) == {"0-0@32", "0-0@64", "0-1@32", "0-1@64"}
    capsys.readouterr()
    assert main([*line[:-6], "--limit", "3", "--data", prefix, "--window", "64"]) == 2
    assert "holds results of another run" in capsys.readouterr().err


def test_kinds_of_folders_are_told_apart(tiny_llama, tmp_path):
    assert Model.at(tiny_llama).kind == "huggingface"
    checkpoint = tmp_path / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    model = Model.at(tmp_path)
    assert (model.kind, model.path) == ("megatron", checkpoint)
    with pytest.raises(ValueError, match="ruler needs a Hugging Face folder, .* convert first"):
        model.require_huggingface("ruler")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        Model.at(tmp_path / "empty")


# Megatron


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_megatron_scorer_equals_the_model_that_was_trained(ranks, tmp_path):
    """90 words in 96 rows: the padding is no word. Two ranks read what one rank trained."""
    config = tiny.config_file(tmp_path, tiny.write_data(tmp_path))
    text = config.read_text().replace("override_vocab_size: 96", "override_vocab_size: 90")
    text = text.replace("max_steps: 4", "max_steps: 2").replace("enabled: true", "enabled: false")
    config.write_text(text)
    _write_small_vocabulary(tmp_path)
    launch("distributed/run_scorer.py", [str(config), str(tmp_path)], 1)
    if ranks > 1:
        launch("distributed/run_scorer.py", [str(config), str(tmp_path), str(ranks)], ranks)
    reference = np.load(tmp_path / "reference.npy")
    found = np.load(tmp_path / f"scores{ranks}.npz")
    ids = found["ids"]
    np.testing.assert_allclose(found["found"], reference[np.arange(49), ids[1:]], atol=1e-5)
    np.testing.assert_allclose(found["last"], reference[49], atol=1e-5)
    assert np.exp(found["last"]).sum() == pytest.approx(1, abs=1e-6)


def _write_small_vocabulary(folder: Path) -> None:
    """The tiny corpus again, with 90 words."""
    tokens = np.fromfile(folder / "x.bin", np.uint16)
    (tokens % 90).astype(np.uint16).tofile(folder / "x.bin")


# NoLiMa


@pytest.fixture(scope="module")
def byte_text(tiny_llama) -> Text:
    return Text(tiny_llama)


def test_needle_set_is_read_as_published(tmp_path):
    needles, _ = own_items.write_nolima(tmp_path)
    tests = {t.name: t for t in nolima.read_tests(needles)}
    assert list(tests) == ["0001_T1_onehop", "0001_T2_onehop", "0001_T1_twohop", "0001_T2_twohop", "0002_T1_onehop"]
    two_hops = tests["0001_T2_twohop"]
    assert two_hops.needle == "Actually, {CHAR} keeps the keys of the chapel."
    assert two_hops.question == "Who could let a guest into the house of the bell?" and two_hops.seed == 43
    fixed = tests["0002_T1_onehop"]
    assert fixed.answers == ("teal", "Teal") and fixed.distractor == "Nobody has ever painted the teal house."
    broken = [dict(own_items.NEEDLES[1], tests={"T1": {"input_args": ["x"]}})]
    needles.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="neither a {CHAR}"):
        nolima.read_tests(needles)
    needles.write_text(json.dumps([{"id": "0001"}]))
    with pytest.raises(ValueError, match="not a NoLiMa needle set: KeyError"):
        nolima.read_tests(needles)


def test_needle_stands_at_its_depth_on_a_line_of_its_own(tmp_path, byte_text):
    _, books = own_items.write_nolima(tmp_path)
    book = nolima.Book(books / "book_1.txt", byte_text)
    length = 2000
    for depth in np.linspace(0, 1, 26):
        text = book.haystack("THE NEEDLE.", length, depth)
        assert text.count(" THE NEEDLE.\n") == 1
        bytes_of_book = len(text) - len(" THE NEEDLE.\n")
        assert length - 1 <= bytes_of_book <= length  # a byte a token; the line break before the needle is the needle's
        assert abs(text.index("THE NEEDLE.") - depth * length) <= 2
        before = text[: text.index(" THE NEEDLE.")]
        assert before == "" or before.endswith(".")
    both = book.haystack("THE NEEDLE.", length, 0.5, ("THE DISTRACTOR.", 0.8))
    assert abs(both.index("THE DISTRACTOR.") - 0.8 * length) < 150 and both.count("THE NEEDLE.") == 1
    with pytest.raises(ValueError, match="too short|too few"):
        book.haystack("x", 10**6, 1.0)


def test_nolima_asks_every_combination_once_and_scores_what_contains_the_answer(tmp_path, byte_text):
    needles, folder = own_items.write_nolima(tmp_path)
    tests = nolima.read_tests(needles)
    books = [nolima.Book(f, byte_text) for f in sorted(folder.glob("*.txt"))]
    store = Store.open(tmp_path, "nolima", Metric("N", "n"), {}, {})
    asked = []

    def reads_the_end(prompt: str) -> tuple[str, int]:
        """Answers from the last 600 characters of the prompt."""
        asked.append(prompt)
        seen = prompt[-600:]
        return next((name for name in ("Ines", "Tomas", "Yara", "teal") if name in seen), "nothing"), len(prompt)

    nolima.measure(reads_the_end, tests, books, [250, 1000, 2000], 5, store, None)
    assert len(asked) == len(set(asked)) == 5 * 2 * 3 * 5
    found = nolima.scores(list(store.records.values()))
    assert found["by_length"][250] > found["by_length"][2000] > 0
    nolima.measure(reads_the_end, tests, books, [250, 1000, 2000], 5, store, None)
    assert len(asked) == 150
    names = {r["id"].split("/", 1)[1]: r for r in store.records.values()}
    assert {r["unit"] for r in store.records.values()} == {t.name for t in tests} and len(names) == 50


def test_base_score_and_effective_length_are_the_papers():
    """Best of the short lengths a test, then their mean; the longest length that keeps 85 % of it."""
    by_test = {
        "a": {250: 1.0, 500: 0.5, 1000: 0.5, 2000: 1.0, 4000: 0.9, 8000: 0.2, 16000: 0.6},
        "b": {250: 0.5, 500: 1.0, 1000: 0.5, 2000: 0.8, 4000: 0.8, 8000: 0.2, 16000: 0.6},
    }
    records = [{"unit": t, "cells": [["k", n, s, 1]]} for t, scores in by_test.items() for n, s in scores.items()]
    found = nolima.scores(records)
    assert found["base_score"] == 1.0 and found["threshold"] == 0.85 and found["effective_length"] == 4000
    assert nolima.scores([r for r in records if r["cells"][0][1] > 1000])["base_score"] is None


def test_nolima_runs_on_a_hugging_face_folder(tiny_llama, tmp_path, capsys):
    needles, books = own_items.write_nolima(tmp_path)
    line = ["evaluate", str(tiny_llama), "--suite", "nolima", "--needles", str(needles), "--haystacks", str(books)]
    line += [
        "--lengths",
        "250",
        "500",
        "--depths",
        "2",
        "--limit",
        "2",
        "--max-new-tokens",
        "2",
        "--output",
        str(tmp_path / "o"),
    ]
    assert main(line) == 0
    results, records = read_results(tmp_path / "o" / "nolima")
    assert len(records) == 2 * 2 * 2 * 2 and set(results["scores"]["by_length"]) == {"250", "500"}
    assert any("wording is our own" in note for note in results["notes"])


# lm-eval, where it is installed


def arguments(**changed) -> argparse.Namespace:
    return argparse.Namespace(tasks=None, lengths=None, limit=None, ruler_data=None, tokenizer=None, **changed)


def test_ruler_refuses_what_it_cannot_make(tiny_llama, tmp_path):
    model = Model.at(tiny_llama)
    for changed, message in (({"tasks": ["vt"]}, "RULER's tasks are niah_single_1"), ({"lengths": [512]}, "need 1024")):
        given = arguments()
        vars(given).update(changed)
        with pytest.raises(ValueError, match=message):
            ruler.run(given, model)
    with pytest.raises(FileNotFoundError, match="lacks hotpotqa.json"):
        ruler_items.find_data(str(tmp_path))


def test_official_score_of_a_question_needs_one_reference():
    doc = {"index": 4, "input": "i", "gen_prefix": "Answer:", "outputs": ["Paris", "in Paris", "France"], "length": 9}
    sample = {"doc": doc, "resps": [[" it is paris "]], "2048": 1 / 3}
    assert ruler.record("ruler_qa_squad", 2048, sample)["official_score"] == 1
    record = ruler.record("ruler_vt", 2048, sample)
    assert record["official_score"] == pytest.approx(1 / 3) and record["id"] == "ruler_vt/2048/4"


def test_sentences_are_split_where_they_end():
    text = 'He left. "Why?" she said. It cost 3.50 dollars! Then e.g. nothing happened.'
    parts = ruler_items.split_sentences(text)
    assert parts == ["He left.", '"Why?" she said.', "It cost 3.50 dollars!", "Then e.g. nothing happened."]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    pytest.importorskip("lm_eval")
    sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "continued_pretraining"))
    from get_smollm2 import get

    return get()


@pytest.mark.slow
def test_ruler_makes_all_tasks_offline_the_same_way_twice(smollm2):
    data = ruler_items.find_data(None)
    for task in ruler_items.TASKS:
        two, three = (ruler_items.make_items(task, 2048, n, smollm2, data) for n in (2, 3))
        assert len(two) == 2 and three[:2] == two, task
        assert all(doc["length"] <= 2048 + 50 and doc["outputs"] for doc in three), task


@pytest.mark.slow
def test_short_tasks_run_from_local_data(smollm2, tmp_path, capsys):
    where = own_items.write_short(tmp_path / "data", ["mmlu", "arc_challenge", "hellaswag", "winogrande", "piqa"])
    line = ["evaluate", str(smollm2), "--suite", "short", "--datasets", str(where), "--output", str(tmp_path / "o")]
    assert main(line) == 0
    results, records = read_results(tmp_path / "o" / "short")
    assert len(records) == 7 and {c["task"] for c in results["summary"]["cells"]} == set(own_tasks()) - {"gsm8k"}
    assert results["missing"] == [f"gsm8k: no train, validation or test split in {where / 'gsm8k'}"]


def own_tasks() -> list[str]:
    return [name.split("/")[0] for name in own_items.SHORT]


@pytest.mark.slow
def test_every_suite_runs_on_a_real_model(smollm2, tmp_path):
    needles, books = own_items.write_nolima(tmp_path, words=1200)
    from exact_megatron.prepare.prepare import prepare

    source = Path(json.__file__).parent
    prepare([str(source)], str(tmp_path / "held"), tokenizer=str(smollm2), globs=["*.py"], quiet=True)
    line = ["evaluate", str(smollm2), "--suite", "ruler", "nolima", "distance-probe", "context-loss", "short"]
    line += ["--output", str(tmp_path / "a"), "--limit", "1", "--trained-length", "2048"]
    line += ["--lengths", "1024", "--tasks", "niah_single_1"]  # one task of ruler: all are made in the test above
    line += ["--distances", "64", "512", "--data", str(tmp_path / "held"), "--window", "256"]
    line += ["--needles", str(needles), "--haystacks", str(books), "--depths", "2", "--max-new-tokens", "8"]
    short = own_items.write_short(tmp_path / "data", ["piqa"])
    ruler_only = [*line[:3], "ruler", "nolima", "distance-probe", "context-loss", *line[8:]]
    assert main(ruler_only) == 0
    assert main([*line[:3], "short", "--output", str(tmp_path / "a"), "--datasets", str(short), "--limit", "1"]) == 0
    for suite in ("ruler", "nolima", "distance-probe", "context-loss", "short"):
        assert (tmp_path / "a" / suite / "report.md").is_file()
    probe, _ = read_results(tmp_path / "a" / "distance-probe")
    (near,) = [c for c in probe["summary"]["cells"] if c["task"] == "effect" and c["length"] == 64]
    assert near["value"] > 2  # nats: a real model reads evidence 64 tokens away
    loss, _ = read_results(tmp_path / "a" / "context-loss")
    values = [c["value"] for c in sorted(loss["summary"]["cells"], key=lambda c: c["length"])]
    assert values[0] > values[-1]
    assert main(["evaluate", "compare", str(tmp_path / "a"), str(tmp_path / "a"), "--output", str(tmp_path / "c")]) == 0
    assert "B better" not in (tmp_path / "c" / "comparison.csv").read_text()
