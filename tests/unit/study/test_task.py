import json
from collections import defaultdict

import numpy as np
import pytest

from exact_megatron.study.task import (
    FACT,
    KEYS,
    QUESTION,
    TEXT,
    VALUES,
    WORDS,
    document,
    question_at_the_end,
    token_ids,
    write_corpus,
    write_tokenizer,
)


def answers_from_the_words(words):
    """Index and distance of every answer, by reading: what follows a key is its value, and it does not change."""
    last, values, found = {}, {}, []
    for i in range(2, len(words)):
        if words[i - 2] in (FACT, QUESTION):
            key, value = words[i - 1], words[i]
            assert key in KEYS and value in VALUES
            if words[i - 2] == QUESTION:
                assert values[key] == value
                found.append((i, i - last[key]))
            else:
                assert key not in values
            last[key], values[key] = i, value
    return found


@pytest.mark.parametrize("length", [16, 100, 1024, 4000])
def test_a_document_says_where_its_answers_are(length):
    for seed in range(20):
        item = document(np.random.default_rng(seed), length)
        assert len(item.words) == length and set(item.words) <= set(WORDS)
        assert list(zip(item.answers, item.distances)) == answers_from_the_words(item.words)


def test_distances_are_spread_over_their_logarithm():
    counts = defaultdict(int)
    for seed in range(60):
        for distance in document(np.random.default_rng(seed), 2000).distances:
            counts[int(np.log2(distance))] += 1
    shares = {k: counts[k] / sum(counts.values()) for k in counts}
    assert all(0.07 < shares[k] < 0.35 for k in range(5, 10))
    assert (
        sum(share for k, share in shares.items() if k < 4) < 0.05
    )  # 16 tokens and more, where a fact stands so far back


@pytest.mark.parametrize("distance", [8, 64, 500, 1016])
def test_a_question_at_the_end_has_its_evidence_at_the_distance_and_nowhere_else(distance):
    for seed in range(10):
        item = question_at_the_end(np.random.default_rng(seed), 1024, distance)
        *_, mark, key, value = item.words
        assert len(item.words) == 1024 and (mark, item.answers, item.distances) == (QUESTION, [1023], [distance])
        assert [i for i, word in enumerate(item.words) if word == key] == [1023 - distance - 1, 1022]
        assert item.words[1023 - distance - 2 : 1024 - distance] == [FACT, key, value]
    with pytest.raises(ValueError, match="1022 words back does not fit into a document of 1024"):
        question_at_the_end(np.random.default_rng(0), 1024, 1022)


def test_the_corpus_goes_through_prepare_word_by_word(tmp_path):
    pytest.importorskip("tokenizers", reason="pip install exact-megatron[prepare]")
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from exact_megatron.cli import main

    write_corpus(tmp_path / "task.jsonl", seed=1, tokens=20_000, median=100, sigma=1.15, longest=2000)
    write_tokenizer(tmp_path / "tokenizer")
    prepared = ["prepare", str(tmp_path / "task.jsonl"), "--tokenizer", str(tmp_path / "tokenizer")]
    assert main([*prepared, "--output", str(tmp_path / "task")]) == 0
    data = IndexedDataset(str(tmp_path / "task"))
    texts = [json.loads(line)["text"].split() for line in (tmp_path / "task.jsonl").read_text().splitlines()]
    assert len(data) == len(texts)
    stored = sorted(data[i].tolist() for i in range(len(data)))
    assert stored == sorted([*token_ids(words), 0] for words in texts)
    total = sum(map(len, stored))
    assert 20_000 <= total < 22_001


def test_text_cannot_tell_a_value():
    """The chain is the same in all corpora; keys and values are not in it."""
    words = document(np.random.default_rng(5), 5000).words
    follows = defaultdict(set)
    for a, b in zip(words, words[1:]):
        follows[a].add(b)
    assert all(follows[FACT] <= set(KEYS) for _ in [0]) and not any(follows[word] & set(VALUES) for word in TEXT)
