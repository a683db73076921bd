"""Arms that do not differ are refused before anything is timed or trained, by every benchmark and paired training."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exact_megatron.benchmark import arms
from exact_megatron.benchmark.one_rank import copy_dataset
from exact_megatron.config import ExactError
from tests.helpers.forked import run

WINDOW = 64


@pytest.fixture
def arm_of(write_corpus, tmp_path):
    """arm_of("model.seed=5", ...) -> an Arm on documents of uneven length."""
    lengths = np.random.default_rng(3).integers(2, 3 * WINDOW, 60)
    prefix = write_corpus(lengths)
    common = [
        f"model.data.data_prefix=[{prefix}]",
        "model.data.splits_string=1",
        f"model.data.index_mapping_dir={tmp_path}/cache",
        f"model.data.seq_length={WINDOW}",
        "trainer.max_steps=8",
        "model.global_batch_size=4",
        "model.data.eod_id=0",
        "model.override_vocab_size=20000",
        "model.exact.enabled=true",
    ]

    def build(*overrides):
        from exact_megatron.training.config import load_config

        return arms._arm_of(load_config(None, [*common, *overrides]))

    build.common = common
    return build


OFF = "model.exact.enabled=false"


def test_proof_of_arms_that_differ(arm_of):
    exact, baseline = arm_of(), arm_of(OFF)
    proof = arms.prove_arms(exact, baseline, 4)
    own, other = (arms.fingerprint(arm, range(4)) for arm in (exact, baseline))
    assert proof == {
        "samples": "0 to 3",
        "tokens": other["tokens"],
        "weight table": exact.dataset.weight_table.digest,
        "tail targets": own["tail"],
        "largest difference": pytest.approx(np.abs(own["weights"] - other["weights"]).max(), abs=1e-6),
        "loss mask of exact": own["loss mask"],
        "loss mask of baseline": other["loss mask"],
    }
    masks = np.stack([exact.dataset[i]["loss_mask"].numpy() for i in range(4)])
    assert (
        own["tail"] == (masks >= exact.dataset.weight_table.bucket_markers.min()).sum() > 0
        and other["plain"]
        and not own["plain"]
    )
    assert proof["loss mask of exact"] != proof["loss mask of baseline"] and json.dumps(proof)


@pytest.mark.parametrize(
    ("exact", "baseline", "message"),
    [
        ((OFF,), (OFF,), "the arm exact have no weight table: set model.exact.enabled=true"),
        ((), (), "the arm baseline have the weight table"),
        (("model.exact.alpha=0",), (OFF,), "all weights of the arm exact are 1: set model.exact.alpha above 0"),
        ((), (OFF, "model.seed=5"), "read different tokens in samples 0 to 3"),
        (
            ("model.exact.tau=0", "model.exact.gamma=0"),  # markers that a rounding step sets apart
            (OFF,),
            "the weights of the arm exact differ by .*e-0., at least 0.001 is needed: raise model.exact.alpha",
        ),
        (("model.exact.alpha=1e-4",), (OFF,), "the weights of the arm exact differ by"),
    ],
)
def test_vacuous_configurations_are_refused(arm_of, exact, baseline, message):
    with pytest.raises(ExactError, match=message):
        arms.prove_arms(arm_of(*exact), arm_of(*baseline), 4)


def test_vacuous_losses_masks_and_documents_are_refused(arm_of):
    exact, baseline = arm_of(), arm_of(OFF)

    def refused(*given):
        return pytest.raises(ExactError, match=given[0])

    with refused("its loss reads None"):
        arms.prove_arms(arms.Arm(exact.dataset, baseline.loss_func), baseline, 4)
    with refused("the loss function of the arm baseline is hooked"):
        arms.prove_arms(exact, arms.Arm(baseline.dataset, exact.loss_func), 4)
    other = arm_of("model.exact.alpha=0.3")
    with refused(
        f"weighted by table {exact.dataset.weight_table.digest}, its loss reads {other.dataset.weight_table.digest}"
    ):
        arms.prove_arms(arms.Arm(exact.dataset, other.loss_func), baseline, 4)
    with refused("has boundaries"):
        arms.prove_arms(exact, baseline, 4, baseline)
    third = arm_of(OFF, "model.seed=5")
    with refused("has other tokens"):
        arms.prove_arms(
            exact, baseline, 4, arms.Arm(copy_dataset(third.dataset, emit_cu_seqlens=False), third.loss_func)
        )
    with refused("the data of the arm causal have the weight table"):
        arms.prove_arms(exact, baseline, 4, exact)

    class Fractions(type(baseline.dataset)):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample | {"loss_mask": sample["loss_mask"] * 0.5}

    baseline.dataset.__class__ = Fractions
    with refused("other values than 0 and 1 in samples 0 to 3"):
        arms.prove_arms(exact, baseline, 4)


def test_loss_masks_must_differ_by_more_than_rounding(arm_of):
    """A weight table that counts the weight 1 to its tail, and data that carry nothing else."""
    exact, baseline = arm_of(), arm_of(OFF)

    class Plain(type(exact.dataset)):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample | {"loss_mask": (sample["loss_mask"] != 0).double()}  # another type is no difference

    exact.dataset.__class__ = Plain
    exact.dataset.weight_table.bucket_markers = np.append(exact.dataset.weight_table.bucket_markers, np.float32(1))
    with pytest.raises(ExactError, match="the loss masks differ by at most 0 in the first .* batches of 4 samples"):
        arms.prove_arms(exact, baseline, 4)


def test_masks_that_change_nothing_are_no_third_arm(arm_of, write_corpus):
    """Samples of a single long document are single segments."""
    long = f"model.data.data_prefix=[{write_corpus(np.array([20_000]), 'long')}]"
    exact, baseline = arm_of(long), arm_of(long, OFF)
    causal = arms.Arm(copy_dataset(baseline.dataset, emit_cu_seqlens=False), baseline.loss_func)
    assert arms.prove_arms(exact, baseline, 4)["tail targets"] > 0
    with pytest.raises(
        ExactError, match="every sample is a single segment in the first 64 batches .* shorter documents"
    ):
        arms.prove_arms(exact, baseline, 4, causal)


EXACT_STEP = arms.Step("70ce", weights=True, boundaries=True, table="aa", hooked=2, weighted=True)
PLAIN_STEP = arms.Step("70ce", weights=False, boundaries=True, table=None, hooked=0, weighted=False)
CAUSAL_STEP = replace(PLAIN_STEP, boundaries=False)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"exact": replace(EXACT_STEP, weights=False, weighted=False)}, None),  # no target in the tail in this step
        ({"exact": replace(EXACT_STEP, table="bb")}, "exact is weighted by table bb in its loss, not by aa"),
        ({"exact": replace(EXACT_STEP, table=None, hooked=0, weighted=False)}, "exact is weighted by table None"),
        (
            {"exact": replace(EXACT_STEP, weighted=False)},
            "exact has weights in its batch, and its loss is not weighted",
        ),
        ({"baseline": replace(PLAIN_STEP, hooked=2, table="aa")}, "the loss hook ran in 2 micro-batches of baseline"),
        ({"causal": replace(CAUSAL_STEP, hooked=2, table="aa")}, "the loss hook ran in 2 micro-batches of causal"),
        ({"baseline": replace(PLAIN_STEP, weights=True)}, "baseline, weights in its batch: True"),
        ({"causal": replace(CAUSAL_STEP, boundaries=True)}, "causal has boundaries of documents"),
        ({"baseline": replace(PLAIN_STEP, boundaries=False)}, "baseline has no boundaries of documents"),
        ({"causal": replace(CAUSAL_STEP, tokens="other")}, "the arms read different tokens"),
    ],
)
def test_first_steps_of_the_arms_are_proved(changed, message):
    steps = {"exact": EXACT_STEP, "baseline": PLAIN_STEP, "causal": CAUSAL_STEP} | changed
    with pytest.raises(ExactError, match=message) if message else nullcontext():
        arms.prove_steps(steps, {"weight table": "aa"})


def test_batches_without_a_tail_target_prove_nothing(arm_of, write_corpus, monkeypatch):
    """One sample a batch, one long document among short ones: the first batches have none."""
    rare = write_corpus(np.array([*[5] * 100, 60, *[5] * 100]), "rare")
    data = f"model.data.data_prefix=[{rare}]"
    exact, baseline = arm_of(data), arm_of(data, OFF)
    tails = [arms.fingerprint(exact, [i])["tail"] for i in range(len(exact.dataset))]
    first = next(i for i, tail in enumerate(tails) if tail)
    assert first > 0 and arms.prove_arms(exact, baseline, 1)["samples"] == f"{first} to {first}"
    monkeypatch.setattr(arms, "BATCHES", first)
    with pytest.raises(ExactError, match=f"no target of the first {first} batches of 1 samples lies in the tail"):
        arms.prove_arms(exact, baseline, 1)
    with pytest.raises(ExactError, match="no target of the first 0 batches"):
        arms.prove_arms(exact, baseline, 10_000)


def test_command_writes_the_proof_or_ends_with_2(arm_of, tmp_path, capsys):
    output = tmp_path / "out" / "arms.json"
    assert arms.main([str(output), *arm_of.common]) == 0
    proof = json.loads(output.read_text())
    assert f"weight table {proof['weight table']}" in capsys.readouterr().out
    again = tmp_path / "alpha.json"
    assert arms.main([str(again), *arm_of.common, "model.exact.alpha=0"]) == 2 and not again.exists()
    assert "all weights of the arm exact are 1" in capsys.readouterr().err


def test_every_benchmark_refuses_arms_that_do_not_differ():
    script = Path(__file__).parents[2] / "distributed" / "run_vacuous.py"
    done = run([str(script)], timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    getitem, step, twins, timing, throughput, *steps = json.loads(done.stdout.splitlines()[-1])
    for said in (getitem, step, throughput):
        assert "no weight table: set model.exact.enabled=true" in said
    assert "the arm baseline have the weight table" in twins
    assert "the arm during the phase has the factor 1.0 and hooks False: it is not slowed" in timing
    hooked, plain = "the loss hook ran in .* micro-batches of baseline", "exact is weighted by table None in its loss"
    for said, expected in zip(steps, (hooked, hooked, plain, plain), strict=True):
        assert re.search(f"in the first step of each, .*{expected}", said), said
