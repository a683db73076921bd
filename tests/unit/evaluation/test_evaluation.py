"""Statistics, records, the scorer suites and the comparison, with scripted scorers."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from exact_megatron.cli import main
from exact_megatron.evaluation import bootstrap, command, compare, context_loss, distance_probe, filler
from exact_megatron.evaluation.command import add_arguments
from exact_megatron.evaluation.model import Text
from exact_megatron.evaluation.report import summarize, write_suite_report
from exact_megatron.evaluation.scorer import continuation_logprobs
from exact_megatron.evaluation.store import Metric, Store, digest, fingerprint, read_results
from exact_megatron.utils.tokenizer import UNKNOWN, Identity

MODEL = {"path": "a", "kind": "scripted", "fingerprint": "0"}


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Text:
    """A word-level tokenizer over the probe's words, so that every answer is one token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = " ".join(distance_probe._KINDS.values())
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(
        [f" {words}", *(f"\n\nThe {kind} of X is.\n\n" for kind in distance_probe._KINDS)] * 50, trainer
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return Text(folder)


@pytest.fixture(scope="session")
def story(tmp_path_factory) -> Path:
    """Text with none of the probe's answers."""
    rng = np.random.default_rng(5)
    lines = [
        " ".join(f"{w}{n}" for w, n in zip(rng.choice(["ka", "ro", "mi"], 9), rng.integers(0, 50, 9)))
        for _ in range(400)
    ]
    path = tmp_path_factory.mktemp("story") / "story.txt"
    path.write_text("\n".join(lines))
    return path


class LooksBack:
    """Likes a token by 8 nats if it occurs among the last `reach` tokens; a bias per token, as real models have one."""

    def __init__(self, reach: int, vocab_size: int = 4096) -> None:
        self.reach, self.vocab_size, self.calls = reach, vocab_size, 0

    def logprobs(self, ids, positions, targets):
        self.calls += 1
        found = []
        for position, target in zip(positions, targets):
            seen = list(ids[max(0, position + 1 - self.reach) : position + 1])
            found.append((0.0 if target in seen else -8.0) - 4 - 0.01 * (target % 7))
        return np.array(found)


def bernoulli(task, length, mean, n=40, seed=0, stratum=""):
    rng = np.random.default_rng([seed, length])
    return [
        {
            "id": f"{task}/{length}/{i}",
            "hash": "h",
            "unit": f"{task}/{length}/{i}",
            "stratum": stratum or f"{task}/{length}",
            "cells": [[task, length, float(rng.random() < mean), 1]],
        }
        for i in range(n)
    ]


# bootstrap


def test_interval_of_a_mean_covers_it_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        values = rng.normal(0.3, 1, 40)
        cells = bootstrap.collect([{"unit": str(i), "cells": [["t", 1, v, 1]]} for i, v in enumerate(values)])
        (samples,) = bootstrap.resample([cells], resamples=400)
        e = bootstrap.estimate(cells.values[0], samples[:, 0], cells.units[0])
        hits += e.low <= 0.3 <= e.high
    assert 0.88 <= hits / 200 <= 0.99


def test_resampling_equals_resampling_one_unit_after_another():
    """Plain reference: draw units with replacement, sum, divide."""
    rng = np.random.default_rng(1)
    records = [{"unit": str(i // 2), "cells": [["t", 1, rng.normal(), 1 + i % 3]]} for i in range(60)]
    cells = bootstrap.collect(records)
    (fast,) = bootstrap.resample([cells], resamples=4000)
    slow = []
    for _ in range(4000):
        drawn = rng.integers(0, 30, 30)
        slow.append(cells.sums[drawn].sum() / cells.counts[drawn].sum())
    assert cells.values[0] == pytest.approx(
        sum(r["cells"][0][2] for r in records) / sum(r["cells"][0][3] for r in records)
    )
    np.testing.assert_allclose(np.percentile(fast, [2.5, 50, 97.5]), np.percentile(slow, [2.5, 50, 97.5]), atol=0.03)


def test_units_are_resampled_whole():
    """26 copies of a value in each of 12 units say no more than 12 values."""
    rng = np.random.default_rng(2)
    values = rng.normal(size=12)
    widths = []
    for copies in (1, 26):
        records = [{"unit": str(i), "cells": [["t", 1, v, 1]]} for i, v in enumerate(values) for _ in range(copies)]
        cells = bootstrap.collect(records)
        (samples,) = bootstrap.resample([cells])
        e = bootstrap.estimate(cells.values[0], samples[:, 0], cells.units[0])
        widths.append(e.high - e.low)
    assert widths[0] == pytest.approx(widths[1])


def test_no_interval_with_few_units():
    cells = bootstrap.collect([{"unit": str(i), "cells": [["t", 1, 1.0, 1]]} for i in range(bootstrap.MIN_UNITS - 1)])
    (samples,) = bootstrap.resample([cells])
    e = bootstrap.estimate(cells.values[0], samples[:, 0], cells.units[0])
    assert (e.value, e.low, e.high, e.differs) == (1.0, None, None, False)


def test_an_average_of_strata_with_few_units_has_no_interval():
    """One item in each of 20 cells: resampling inside the cells would never change it."""
    few = summarize([r for n in range(20) for r in bernoulli("t", n, 0.5, n=1)], Metric("M", "m"), None)["averages"][
        "all"
    ]
    assert few["units"] == 20 and few["low"] is None
    many = summarize([r for n in range(20) for r in bernoulli("t", n, 0.5, n=10)], Metric("M", "m"), None)["averages"][
        "all"
    ]
    assert many["low"] < many["value"] < many["high"]


def test_averages_split_at_the_trained_length():
    records = bernoulli("t", 1024, 1.0) + bernoulli("t", 2048, 0.5) + bernoulli("t", 4096, 0.0)
    ends_within, ends_before = Metric("M", "m"), Metric("M", "m", inclusive=False)
    found = summarize(records, ends_within, 2048)["averages"]
    middle = np.mean([r["cells"][0][2] for r in records if r["cells"][0][1] == 2048])
    assert found["trained"]["value"] == pytest.approx((1 + middle) / 2)
    assert found["extrapolated"]["value"] == 0
    assert summarize(records, ends_before, 2048)["averages"]["trained"]["value"] == 1
    assert list(summarize(records, ends_within, None)["averages"]) == ["all"]


# store


def test_store_goes_on_after_a_kill_and_refuses_other_settings(tmp_path):
    metric, settings = Metric("M", "m"), {"limit": 3, "lengths": (1, 2)}
    store = Store.open(tmp_path, "s", metric, MODEL, settings)
    first, second = bernoulli("t", 64, 0.5, n=2)
    store.add(first)
    with open(tmp_path / "s" / "items.jsonl", "a") as file:
        file.write(json.dumps(second)[:20])  # killed while it wrote
    with pytest.raises(ValueError, match="not finished"):
        read_results(tmp_path / "s")
    store = Store.open(tmp_path, "s", metric, MODEL, settings)
    assert list(store.records) == [first["id"]]
    store.add(second)
    store.finish({"cells": []})
    results, records = read_results(tmp_path / "s")
    assert list(records) == [first["id"], second["id"]] and results["items"] == 2 and results["finished"]
    assert "tokenizers" in results["versions"] and "tokenizers" not in results["CPU"]
    with pytest.raises(ValueError, match="settings limit: there 3, now 4"):
        Store.open(tmp_path, "s", metric, MODEL, settings | {"limit": 4})
    with pytest.raises(ValueError, match="model fingerprint"):
        Store.open(tmp_path, "s", metric, MODEL | {"fingerprint": "1"}, settings)


def test_store_refuses_values_that_are_not_finite(tmp_path):
    store = Store.open(tmp_path, "s", Metric("M", "m"), MODEL, {})
    record = bernoulli("t", 64, 0.5, n=1)[0]
    record["cells"][0][2] = float("nan")
    with pytest.raises(ValueError, match="t at 64 is nan"):
        store.add(record)
    assert not (tmp_path / "s" / "items.jsonl").exists()


def test_fingerprint_tells_files_of_one_size_apart(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 3 << 20, np.uint8)
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(data.tobytes())
    data[::1000] ^= 1
    other.write_bytes(data.tobytes())
    assert fingerprint(one) != fingerprint(other)


# distance probe


def probe_items(text, story, longest=1024):
    return distance_probe.ItemMaker(text, filler.open_filler(str(story), text, 4096), longest)


def test_prompts_keep_their_distance(text, story):
    maker = probe_items(text, story)
    item = maker.item(0, 3)
    again = probe_items(text, story).item(0, 3)
    assert again.prompt(64, True) == item.prompt(64, True) and again.words == item.words
    assert len(item.right) == len(item.wrong) == 1 and item.right != item.wrong
    for distance in (64, 256, 1024):
        present, absent = item.prompt(distance, True), item.prompt(distance, False)
        assert len(present) == len(absent) == distance_probe.BEFORE + len(item.evidence) + distance + len(item.question)
        start = distance_probe.BEFORE
        assert present[start : start + len(item.evidence)] == item.evidence
        assert present[:start] == absent[:start]
        assert present[start + len(item.evidence) :] == absent[start + len(item.evidence) :]
        assert present[-len(item.question) - 64 : -len(item.question)] == item.filler[-64:].tolist()
        for answer in (item.right[0], item.wrong[0]):
            assert answer not in absent and (answer in present) == (answer == item.right[0])


def test_probe_shows_a_step_where_a_model_stops_looking_back(text, story, tmp_path):
    distances, reach = [64, 128, 256, 512, 1024], 300
    store = Store.open(tmp_path, "distance-probe", distance_probe.METRIC, MODEL, {})
    scorer = LooksBack(reach)
    distance_probe.run(scorer, probe_items(text, story), store, distances, seeds=[0, 1], items=8)
    assert scorer.calls == 2 * 16 * len(distances)  # one forward a prompt: both answers come from it
    summary = summarize(list(store.records.values()), distance_probe.METRIC, 256)
    effect = {c["length"]: c for c in summary["cells"] if c["task"] == "effect"}
    for distance in distances:
        expected = 8.0 if distance < reach - 30 else 0.0
        assert effect[distance]["value"] == pytest.approx(expected) and effect[distance]["units"] == 16
    assert summary["averages"]["trained"]["value"] == pytest.approx(8)  # 64 and 128: 256 does not fit into 256 tokens
    store.finish(summary, trained_length=256)
    write_suite_report(store.folder, read_results(store.folder)[0], quiet=True)
    assert (store.folder / "curve.png").stat().st_size > 10_000
    assert "| 512 | 0.000 [0.000, 0.000] |" in (store.folder / "report.md").read_text()
    distance_probe.run(scorer, probe_items(text, story), store, distances, seeds=[0, 1], items=8)
    assert scorer.calls == 2 * 16 * len(distances)  # nothing was left to measure


def test_answers_of_several_tokens_are_summed():
    class Digits:
        vocab_size = 10

        def logprobs(self, ids, positions, targets):
            assert len(ids) == max(positions) + 1
            return np.array([-float(t) - 0.1 * ids[p] for p, t in zip(positions, targets)])

    assert continuation_logprobs(Digits(), [1, 2], [[3, 4], [5]]) == pytest.approx([-3.2 - 4.3, -5.2])


def test_probe_refuses_filler_that_holds_all_answers(text, tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(" ".join(" ".join(distance_probe._KINDS.values()) for _ in range(30)))
    with pytest.raises(ValueError, match="windows of the filler held all"):
        distance_probe.ItemMaker(text, filler.open_filler(str(path), text, 4096), 4096).item(0, 0)
    with pytest.raises(ValueError, match="the probe needs 100000 in a row"):
        filler.open_filler(str(path), text, 4096).window(np.random.default_rng(0), 100_000)


def test_filler_from_tokens_leaves_ends_of_documents_out(write_corpus):
    prefix = write_corpus(
        np.array([50, 40, 30]), tokens=np.concatenate([[*range(1, 50), 0], [*range(1, 40), 0], [*range(1, 30), 0]])
    )
    Path(f"{prefix}.json").write_text('{"vocab_size": 64, "eod_id": 0}')
    found = filler._from_prefix(prefix, 64)
    assert found.documents == 3
    assert not (found.window(np.random.default_rng(0), 110) == 0).any()
    with pytest.raises(ValueError, match="holds token id 49"):
        filler._from_prefix(prefix, 32)


# loss by context


class ByPosition:
    """Loss of a token is the number of tokens before it."""

    vocab_size = 1 << 20

    def logprobs(self, ids, positions, targets):
        assert len(targets) == len(positions) == len(ids)
        return -np.array([p + 1.0 for p in positions])


def test_every_token_but_a_documents_first_is_scored_once_with_its_context(write_corpus, tmp_path):
    lengths, window = np.array([2, 7, 33, 16, 17, 100, 1]), 16
    documents = context_loss.Documents(write_corpus(lengths), 100, 2, 0)
    store = Store.open(tmp_path, "context-loss", context_loss.METRIC, MODEL, {})
    context_loss.run(ByPosition(), documents, store, window)
    assert len(store.records) == 6  # the document of one token has no target
    sums = {0: [0.0, 0], 8: [0.0, 0]}
    for length in lengths:
        for target in range(1, length):
            context = (target - 1) % window + 1
            bucket = 0 if context < 8 else 8  # [0, 7], and [8, 16], closed at the window
            sums[bucket][0] += context
            sums[bucket][1] += 1
    summary = summarize(list(store.records.values()), context_loss.METRIC, None)
    found = {c["length"]: c["value"] for c in summary["cells"]}
    assert found == pytest.approx({b: s / n for b, (s, n) in sums.items()})
    assert summary["averages"]["all"]["value"] == pytest.approx(
        sum(s for s, _ in sums.values()) / sum(n for _, n in sums.values())
    )


def test_a_larger_choice_of_documents_keeps_the_smaller_one(write_corpus):
    prefix = write_corpus(np.arange(2, 40))
    few, many = (context_loss.Documents(prefix, n, 2, 7).chosen for n in (5, 20))
    assert many[:5] == few
    with pytest.raises(ValueError, match="no document of 99 tokens"):
        context_loss.Documents(prefix, 5, 99, 0)


def test_documents_of_another_tokenizer_are_refused():
    scorer = LooksBack(4, vocab_size=10)
    with pytest.raises(ValueError, match="holds token id 12"):
        context_loss.measure(scorer, "0", np.array([1, 12]), 8)


def test_data_of_another_tokenizer_than_the_models_are_refused(text, write_corpus, tmp_path):
    from exact_megatron.evaluation.command import _compare_tokenizers
    from exact_megatron.evaluation.model import Model

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text(text.file.read_text())
    prefix = write_corpus(np.array([50, 40]))
    parser = argparse.ArgumentParser()
    add_arguments(parser)

    def compare(suite, digest, *more):
        Path(f"{prefix}.json").write_text(json.dumps({"tokenizer_identity": digest}) if digest else "{}")
        words = [str(tmp_path), "--suite", suite, "--output", "x", "--data", f"{prefix}.idx", "--filler", prefix, *more]
        return _compare_tokenizers(suite, parser.parse_args(words), Model.at(tmp_path))

    for suite in ("context-loss", "distance-probe"):
        assert compare(suite, text.identity.digest) == []
        assert "tokenizer unknown" in compare(suite, None)[0]
        with pytest.raises(ValueError, match=rf"{text.identity.digest} \(.*tokenizer.json.*has abc \(.*--accept-other"):
            compare(suite, "abc")
        assert "accepted" in compare(suite, "abc", "--accept-other-tokenizer")[0]


def test_another_tokenizer_is_refused_before_the_model_is_loaded(write_corpus, tmp_path, monkeypatch, capsys):
    model = SimpleNamespace(path=tmp_path, kind="scripted", tokenizer=Identity("abc", "model"), described=MODEL)
    monkeypatch.setattr(command.Model, "at", lambda *_: model)  # which has no scorer
    prefix = write_corpus(np.array([70, 5, 130]))
    Path(f"{prefix}.json").write_text(json.dumps({"tokenizer_identity": "xyz"}))
    line = ["evaluate", "model", "--suite", "context-loss", "--data", prefix, "--output", str(tmp_path / "out")]
    assert main(line) == 2
    assert "has xyz" in capsys.readouterr().err and not (tmp_path / "out").exists()


# comparison


def evaluated(folder: Path, means: dict[int, float], *, seed=0, hashes="h", suite="ruler", trained_length=2048) -> Path:
    metric = Metric("RULER", "string match (%)", scale=100)
    store = Store.open(folder, suite, metric, MODEL, {"samples": 60})
    records = [r for n, mean in means.items() for r in bernoulli("niah", n, mean, n=60, seed=seed)]
    store.add(*(r | {"hash": hashes} for r in records))
    store.finish(summarize(records, metric, trained_length), trained_length=trained_length)
    return folder


def test_one_evaluation_writes_the_folder_of_a_suite(write_corpus, tmp_path, monkeypatch, capsys):
    """Record locks are of a process: the other evaluation is one."""
    scorer = LooksBack(8)
    model = SimpleNamespace(
        path=tmp_path, kind="scripted", tokenizer=UNKNOWN, described=MODEL, scorer=lambda *_: scorer
    )
    monkeypatch.setattr(command.Model, "at", lambda *_: model)
    prefix = write_corpus(np.array([70, 5, 130]), tokens=np.arange(205))
    line = ["evaluate", "model", "--suite", "context-loss", "--data", prefix, "--window", "64"]
    script = "import sys, time; from exact_megatron.training.run_lock import only_writer\n"
    script += "with only_writer(sys.argv[1]): print(flush=True); time.sleep(60)"
    folder = tmp_path / "out" / "context-loss"
    with subprocess.Popen([sys.executable, "-c", script, folder], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        try:
            assert main([*line, "--output", str(tmp_path / "out")]) == 2
            error = capsys.readouterr().err
            assert f"{folder} is in use" in error and f"pid {holder.pid}," in error and "--output ANOTHER" in error
            assert [path.name for path in folder.iterdir()] == ["run.lock"] and not scorer.calls
            assert main([*line, "--output", str(tmp_path / "other")]) == 0
        finally:
            holder.kill()
    assert main([*line, "--output", str(tmp_path / "out")]) == 0
    assert not (folder / "run.lock").exists() and len(read_results(folder)[1]) == 3


def test_compare_finds_a_difference_and_says_where_there_is_none(tmp_path, capsys):
    a = evaluated(tmp_path / "a", {1024: 0.5, 2048: 0.5, 4096: 0.2})
    b = evaluated(tmp_path / "b", {1024: 0.5, 2048: 0.5, 4096: 0.8})  # the same draws: 1K and 2K are equal item by item
    assert (
        main(["evaluate", "compare", str(a), str(b), "--output", str(tmp_path / "c"), "--names", "baseline", "EXACT"])
        == 0
    )
    (pair,) = compare.compare(str(a), str(b), str(tmp_path / "c"), None, ["baseline", "EXACT"], quiet=True)
    verdicts = [row.verdict(pair.metric) for row in pair.rows]
    assert verdicts == ["no difference shown", "no difference shown", "B better"]
    assert pair.means["trained"].verdict(pair.metric) == "no difference shown"
    assert pair.means["extrapolated"].difference.low > 0.3
    report = (tmp_path / "c" / "report.md").read_text()
    line = next(row for row in report.splitlines() if row.startswith("| RULER"))
    assert "no difference shown (+0.0 [+0.0, +0.0])" in line and line.count("no difference shown") == 1
    rows = (tmp_path / "c" / "comparison.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 + 3 and rows[3].startswith("ruler,niah,4096,") and rows[3].endswith("B better")
    assert (tmp_path / "c" / "comparison.png").stat().st_size > 10_000
    assert "no difference shown" in capsys.readouterr().out


def test_a_paired_difference_is_narrower_than_an_unpaired_one(tmp_path):
    a = evaluated(tmp_path / "a", {1024: 0.5})
    b = evaluated(tmp_path / "b", {1024: 0.6})
    c = evaluated(tmp_path / "c", {1024: 0.6}, seed=9)
    paired, unpaired = (compare.compare_suite(a / "ruler", x / "ruler").rows[0].difference for x in (b, c))
    assert paired.high - paired.low < 0.7 * (unpaired.high - unpaired.low)


def test_lower_is_better_for_a_loss():
    row = compare.Row("s", "loss", 8, 2.0, 1.5, bootstrap.Estimate(-0.5, -0.6, -0.4, 50))
    assert row.verdict(context_loss.METRIC) == "B better" and row.verdict(Metric("M", "m")) == "A better"


def test_other_items_are_refused(tmp_path, capsys):
    a = evaluated(tmp_path / "a", {1024: 0.5})
    with pytest.raises(ValueError, match="are not the same"):
        compare.compare_suite(a / "ruler", evaluated(tmp_path / "b", {1024: 0.5}, hashes="other") / "ruler")
    with pytest.raises(ValueError, match="differ in 60 items"):
        compare.compare_suite(a / "ruler", evaluated(tmp_path / "c", {1024: 0.5, 2048: 0.5}) / "ruler")
    with pytest.raises(ValueError, match="different trained lengths"):
        compare.compare_suite(a / "ruler", evaluated(tmp_path / "d", {1024: 0.5}, trained_length=None) / "ruler")
    evaluated(tmp_path / "e", {1024: 0.5}, suite="nolima")
    assert main(["evaluate", "compare", str(a), str(tmp_path / "e"), "--output", str(tmp_path / "o")]) == 2
    assert "nothing in both" in capsys.readouterr().err


# command


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--suite", "context-loss"], "context-loss needs --data"),
        (["--suite", "nolima"], "nolima needs --needles"),
        (["--suite", "ruler", "--limit", "0"], "--limit 0 must be at least 1"),
        (["--suite", "distance-probe", "--distances", "64", "64"], "values must be different"),
        (["--suite", "distance-probe"], "is no folder"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert main(["evaluate", str(tmp_path / "none"), *arguments, "--output", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_digest_depends_on_everything():
    assert digest([1], b"x") != digest([1, 2], b"x") != digest([1], b"y")
    assert digest(np.arange(3)) != digest(np.arange(4))
