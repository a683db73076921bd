"""Baseline and EXACT in the native runner, on real text: where they must be equal, and that both train."""

import json
import math

import pytest

from tests.gpu.small import MODEL, SEQ_LENGTH, precision_settings, write_text
from tests.helpers.ranks import launch

STEPS = {"fp32": 12}  # 200 on a GPU
LAST = 20  # steps whose mean loss is compared


def settings(precision, folder, steps):
    return [
        *MODEL,
        *precision_settings(precision),
        f"model.data.data_prefix=[{folder}/text]",
        "model.data.eod_id=0",
        f"model.data.index_mapping_dir={folder}/cache",
        f"model.data.seq_length={SEQ_LENGTH}",
        "model.data.splits_string=1",
        "model.data.num_workers=0",
        "model.micro_batch_size=2",
        "model.global_batch_size=4",
        f"trainer.max_steps={steps}",
        "exp_manager.create_tensorboard_logger=false",
        "model.optim.lr=1e-3",
        "model.optim.sched.name=constant",
    ]


def train(folder, precision, steps, arms):
    """{arm: lines of metrics} of runs from the same seed on the same samples, in one process."""
    write_text(folder)
    (folder / "x.yaml").write_text("{}")
    common = settings(precision, folder, steps)
    jobs = [{"name": name, "overrides": [*common, *more], "steps": steps} for name, more in arms.items()]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launch(
        "distributed/run_layouts.py",
        [str(folder / "x.yaml"), str(folder / "jobs.json"), str(folder)],
        world=1,
        timeout=500,
    )
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in arms}


@pytest.fixture(scope="module")
def arms(precision, tmp_path_factory):
    on = ["model.exact.enabled=true", "model.exact.alpha=0.5"]
    folder = tmp_path_factory.mktemp(f"train-{precision}")
    return train(folder, precision, STEPS.get(precision, 200), {"baseline": [], "exact": on})


def test_the_first_forward_is_the_same(precision, arms):
    """EXACT changes no forward: the unweighted loss of the first step is the baseline's, the weighted one is not."""
    baseline, exact = arms["baseline"][0], arms["exact"][0]
    assert math.isclose(baseline["lm_loss"], exact["lm_loss"], rel_tol=1e-6 if precision == "fp32" else 1e-5)
    assert exact["targets"] == baseline["targets"] and exact["exact_loss"] != exact["lm_loss"]


def test_both_arms_are_finite_and_close(precision, arms, record):
    values = [line[key] for lines in arms.values() for line in lines for key in ("lm_loss", "exact_loss", "grad_norm")]
    assert all(map(math.isfinite, values))
    ends = {name: sum(line["lm_loss"] for line in lines[-LAST:]) / len(lines[-LAST:]) for name, lines in arms.items()}
    starts = {name: lines[0]["lm_loss"] for name, lines in arms.items()}
    record(steps=len(arms["exact"]), first=starts, last=ends)
    assert abs(ends["exact"] / ends["baseline"] - 1) < 0.01, ends
    assert all(ends[name] < starts[name] - (0.2 if precision == "fp32" else 1.0) for name in arms), (starts, ends)


def compared(folder, precision, arms, record):
    """The two arms' lines of metrics; the first step's forward is the same, the rest may differ by what is recorded."""
    one, other = train(folder, precision, STEPS.get(precision, 40), arms).values()
    norm, losses = (max(abs(a[key] / b[key] - 1) for a, b in zip(one, other)) for key in ("grad_norm", "lm_loss"))
    record(first_norm=one[0]["grad_norm"] / other[0]["grad_norm"] - 1, largest_norm=norm, largest_loss=losses)
    return one, other


def test_fused_gradient_accumulation_trains_the_same(precision, tmp_path, record):
    """Unfused, the weights' gradients of each of the two micro-batches are rounded to bf16 on their way to the fp32 sum."""
    arms = {"fused": [], "unfused": ["model.gradient_accumulation_fusion=false"]}
    fused, unfused = compared(tmp_path, precision, arms, record)
    assert fused[0]["lm_loss"] == unfused[0]["lm_loss"]
    assert math.isclose(fused[0]["grad_norm"], unfused[0]["grad_norm"], rel_tol=2**-8)
    assert all(math.isclose(a["lm_loss"], b["lm_loss"], rel_tol=0.01) for a, b in zip(fused, unfused))
    if precision != "fp32":  # a CPU fuses nothing
        assert fused[0]["grad_norm"] != unfused[0]["grad_norm"], "nothing was fused"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16"])
def test_transformer_engines_cross_entropy_trains_the_same(precision, tmp_path, record):
    """With weights: its backward must scale each target's gradient by its own."""
    on = ["model.exact.enabled=true", "model.exact.alpha=0.5"]
    te = [*on, "model.cross_entropy_loss_fusion=true", "model.cross_entropy_fusion_impl=te"]
    own, reference = compared(tmp_path, precision, {"te": te, "plain": on}, record)
    assert math.isclose(own[0]["lm_loss"], reference[0]["lm_loss"], rel_tol=1e-4)
    assert math.isclose(own[0]["exact_loss"], reference[0]["exact_loss"], rel_tol=1e-4)
    assert math.isclose(own[0]["grad_norm"], reference[0]["grad_norm"], rel_tol=2**-8)
    assert all(math.isclose(a["lm_loss"], b["lm_loss"], rel_tol=0.01) for a, b in zip(own, reference))


DETERMINISTIC = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@pytest.mark.parametrize(
    "precision", [pytest.param("fp32", marks=pytest.mark.slow), pytest.param("bf16", marks=pytest.mark.gpu)]
)
def test_alpha_0_is_bitwise_the_baseline(precision, tmp_path, monkeypatch, record):
    """Also a second baseline, which shows that runs repeat at all."""
    for name, value in DETERMINISTIC.items():
        monkeypatch.setenv(name, value)
    deterministic = ["model.deterministic_mode=true"]
    runs = train(
        tmp_path,
        precision,
        4 if precision == "fp32" else 20,
        {
            "baseline": deterministic,
            "again": deterministic,
            "alpha0": [*deterministic, "model.exact.enabled=true", "model.exact.alpha=0"],
        },
    )
    numbers = {
        name: [(line["lm_loss"], line["exact_loss"], line["grad_norm"]) for line in lines]
        for name, lines in runs.items()
    }
    record(repeats=numbers["baseline"] == numbers["again"], alpha0=numbers["baseline"] == numbers["alpha0"])
    assert numbers["baseline"] == numbers["again"], "two equal runs differ: the kernels are not deterministic here"
    assert numbers["baseline"] == numbers["alpha0"]
