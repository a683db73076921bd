"""NeMo 2's GPTModel, PreTrainingDataModule, MegatronStrategy and Trainer with ExactCallback, on a CPU. `make test-nemo`.

nemo_run and modelopt are answered by stubs, so that recipes themselves are not run.
"""

from __future__ import annotations

import json

import pytest

from tests.hosts import nemo_runs as nr

pytestmark = [pytest.mark.upstream, pytest.mark.skipif(nr.examples() is None, reason=nr.ABSENT)]

WEIGHTED = {
    "exact": {"alpha": 0.5, "tau": 16},
    "module": {"reset_attention_mask": True, "eod_mask_loss": True},
    "model": {"calculate_per_token_loss": True},
}
REFUSED = {
    "nobody_masks": ({**WEIGHTED, "module": {}}, "PreTrainingDataModule(reset_attention_mask=True)"),
    "other_data": ({**WEIGHTED, "plain_data": True}, "PreTrainingDataModule(dataset_cls=ExactDataset)"),
    "no_callback": ({"dataset_alone": True}, "ExactDataset without ExactCallback"),
    "typo": ({**WEIGHTED, "exact": {"alhpa": 0.5}}, "unknown key model.exact.alhpa: did you mean model.exact.alpha?"),
    "dropout": (
        {**WEIGHTED, "model": {"calculate_per_token_loss": True, "attention_dropout": 0.1}},
        "attention_dropout=0.1: set it to 0.0",
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    data = nr.write_data(folder, "x", 1, least=2)
    one = [
        {"name": "plain"},
        {"name": "off", "exact": {"enabled": False}},
        {"name": "alpha_0", "exact": {"alpha": 0, "tau": 16, "allow_unmasked_documents": True}},
        {"name": "one_rank", **WEIGHTED},
        *({"name": name, **job} for name, (job, _) in REFUSED.items()),
    ]
    two = [
        {"name": "dp2", **WEIGHTED},
        {"name": "tp2", **WEIGHTED, "strategy": {"tensor_model_parallel_size": 2}},
        {"name": "cp2", **WEIGHTED, "strategy": {"context_parallel_size": 2}},
        {
            "name": "cp2_uneven",
            **{**WEIGHTED, "model": {}, "strategy": {"context_parallel_size": 2}},
        },
    ]
    nr.run_jobs(folder, 1, [{**job, "data": data} for job in one], recipes=True)
    nr.run_jobs(folder, 2, [{**job, "data": data} for job in two], recipes=True)

    def run(name):
        """(metrics of each step, metrics at the end) of rank 0."""
        path = folder / f"{name}.0.json"
        assert path.is_file(), (folder / f"{name}.0").read_text()[-4000:]
        return json.loads(path.read_text())

    run.folder = folder
    return run


STOCK = ("reduced_train_loss", "grad_norm", "val_loss")


@pytest.mark.parametrize("name", ["off", "alpha_0"])
def test_off_or_with_alpha_0_it_is_the_plain_run_to_the_last_bit(runs, name):
    (steps, end), (plain, plain_end) = runs(name), runs("plain")
    assert len(plain) == 4
    assert [[step[tag] for tag in STOCK[:2]] for step in steps] == [[step[tag] for tag in STOCK[:2]] for step in plain]
    assert end["val_loss"] == plain_end["val_loss"]


@pytest.mark.parametrize("name", ["dp2", "tp2", "cp2"])
def test_layouts_equal_one_rank(runs, name):
    (steps, end), (one, one_end) = runs(name), runs("one_rank")
    for mine, theirs in zip(steps, one, strict=True):
        for tag in (*STOCK[:2], "exact loss", "lm loss", "lm loss 0-15", "lm loss 16-31", "lm loss 32-64"):
            assert mine[tag] == pytest.approx(theirs[tag], rel=1e-5), tag
    assert end["val exact loss"] == pytest.approx(one_end["val exact loss"], rel=1e-5)


def test_the_log_has_the_unweighted_and_the_weighted_loss(runs):
    for step in runs("one_rank")[0]:
        assert step["reduced_train_loss"] == pytest.approx(step["lm loss"], rel=1e-6)
        assert step["exact loss"] != step["lm loss"]


def test_counts_that_differ_between_context_parallel_ranks_are_refused(runs):
    assert "Set calculate_per_token_loss=True" in (runs.folder / "cp2_uneven.0").read_text()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_first_step(runs, name):
    text = (runs.folder / f"{name}.0").read_text()
    assert REFUSED[name][1] in text and not (runs.folder / f"{name}.0.json").exists()
