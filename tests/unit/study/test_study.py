"""A study's YAML, its order, its proofs and its page; runs are stand-ins here, see tests/distributed/test_study.py."""

import json
from pathlib import Path

import pytest

from exact_megatron.study import command
from exact_megatron.study.plan import StudyArm, read_study
from exact_megatron.study.report import Result, differences, over_bases, shown, write_report
from exact_megatron.study.statistics import paired

ROOT = Path(__file__).parents[3]
STUDY = """
folder: FOLDER
config: model.yaml
task: {base_tokens: 1000, tokens: 900}
bases: [1, 2]
gate: {accuracy: 0.5, below: 128}
seeds: [11, 12]
arms:
  baseline: {}
  exact: {exact: {alpha: 1.0}}
  placebo: {exact: {alpha: 1.0, placebo: true}}
  upsample: {upsample: exact}
  longce: {longce: 128}
ranges: {near: [8, 127], far: [256, 1023]}
"""


@pytest.fixture
def study_file(tmp_path):
    (tmp_path / "model.yaml").write_text("model: {num_layers: 2}\n")
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.replace("FOLDER", str(tmp_path / "out")))
    return path


def test_the_yaml_is_read(study_file, tmp_path):
    study = read_study(study_file)
    assert [arm.name for arm in study.arms] == ["baseline", "exact", "placebo", "upsample", "longce"]
    assert study.arm("placebo") == StudyArm("placebo", exact={"alpha": 1.0, "placebo": True})
    assert study.arm("placebo").as_arm().settings == [
        "model.exact.enabled=true",
        "model.exact.alpha=1.0",
        "model.exact.placebo=true",
    ]
    assert (study.arm("longce").longce, study.arm("upsample").upsample) == (128, "exact")
    assert study.folder == tmp_path / "out" and study.config == [str(tmp_path / "model.yaml")]
    assert (study.task.median, study.task.base_tokens, study.ranges["far"]) == (100, 1000, (256, 1023))
    assert read_study(study_file, str(tmp_path / "other")).folder == tmp_path / "other"
    built_in = read_study(ROOT / "configs" / "study.yaml")
    assert len(built_in.bases) >= 3 and len(built_in.seeds) >= 6 and built_in.gate


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bases: [1, 2]", "base: [1, 2]", "unknown key base: did you mean bases"),
        ("bases: [1, 2]", "bases: [1, 1]", r"bases=\[1, 1\] must be different"),
        ("bases: [1, 2]", "bases: [1, x]", "bases=.* is not a list of whole numbers"),
        ("seeds: [11, 12]\n", "", "a study needs seeds"),
        ("  baseline: {}\n", "", "the first arm must be baseline"),
        ("{upsample: exact}", "{upsample: placeb}", "arms.upsample.upsample=placeb is no arm"),
        ("{longce: 128}", "{longce: 127}", "arms.longce.longce=127 must be even"),
        ("{longce: 128}", "{longce: 128, upsample: exact}", "an arm differs from the baseline in one thing"),
        ("  exact: {exact", "  e/x: {exact", "the arm 'e/x'"),
        ("accuracy: 0.5", "acuracy: 0.5", "unknown key gate.acuracy: did you mean gate.accuracy"),
        ("{accuracy: 0.5, below: 128}", "{below: 128}", "gate needs accuracy"),
        ("base_tokens: 1000", "base_tokens: 0", "task.base_tokens=0 is not a number above 0"),
        ("far: [256, 1023]", "far: [256]", r"ranges.far=\[256\] is not \[least, most\]"),
        ("config: model.yaml", "config: none.yaml", "config names .*none.yaml, which does not exist"),
    ],
)
def test_what_is_wrong_in_it_is_named(study_file, old, new, message):
    text = study_file.read_text()
    assert old in text
    study_file.write_text(text.replace(old, new))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_study(study_file)


def measured(shift: float, accuracy: float = 0.9) -> dict:
    rows = [
        {
            "low": low,
            "high": 2 * low - 1,
            "answers": 10,
            "loss": 1.0 + shift * (low >= 256),
            "accuracy": accuracy,
            "margin": 0.0,
        }
        for low in (8, 16, 32, 64, 128, 256, 512)
    ]
    return {"documents": rows, "fixed": rows, "beyond": rows, "text": 0.5 + shift / 10}


def put(file: Path, value: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def test_the_page_has_paired_differences(study_file):
    pytest.importorskip("scipy", reason="pip install exact-megatron[report]")
    study = read_study(study_file)
    with pytest.raises(ValueError, match="holds no arm beside its baseline yet"):
        write_report(study)
    for base in study.bases:
        put(study.folder / f"base_{base}" / "study.json", measured(0, 0.9 if base == 1 else 0.2))
        for seed in study.seeds:
            for arm, shift in (("baseline", 0.0), ("exact", -0.1), ("placebo", 0.02)):
                wobble = 0.001 * seed * (1 if arm == "exact" else -1) * (arm != "baseline") + 0.5 * base
                put(study.folder / f"runs/base_{base}/seed_{seed}/{arm}/study.json", measured(shift + wobble))
    page = write_report(study).read_text()
    pairs = [-0.1 + 0.001 * seed for _ in study.bases for seed in study.seeds]
    assert shown(paired(pairs)) in page and "(4 of 4)" in page
    assert "none: below the gate" in page and "| 1 | 0.900 | 2 |" in page
    assert "upsample" not in page  # not trained yet
    raw = json.loads((study.folder / "results.json").read_text())
    assert len(raw["runs"]) == 12 and (study.folder / "differences.png").is_file()


def test_differences_are_of_the_same_base_and_seed():
    found = [
        Result("baseline", 1, 11, {"text": 1.0}),
        Result("exact", 1, 11, {"text": 0.5}),
        Result("baseline", 1, 12, {"text": 2.0}),
        Result("exact", 1, 12, {"text": 2.25}),
        Result("exact", 2, 11, {"text": 9.0}),
        Result("baseline", 3, 11, {"text": 1.0}),
        Result("exact", 3, 11, {"text": 2.0}),
    ]
    pairs = differences(found, "exact", "baseline", lambda r: r.measured["text"])
    assert pairs == {(1, 11): -0.5, (1, 12): 0.25, (3, 11): 1.0}
    assert (over_bases(pairs).mean, over_bases(pairs).pairs) == (pytest.approx((-0.125 + 1.0) / 2), 2)


def test_a_base_below_the_gate_has_no_arms(study_file, monkeypatch):
    study = read_study(study_file)
    for base, accuracy in ((1, 0.49), (2, 0.5)):
        put(study.folder / f"base_{base}" / "study.json", measured(0, accuracy))
    assert [command.passes(study, base) for base in study.bases] == [False, True]
    pairs = []
    monkeypatch.setattr(command, "run_steps", lambda steps: None)
    monkeypatch.setattr(command, "base_steps", lambda study, seed: [])
    monkeypatch.setattr(command, "write_report", lambda study: "report")
    monkeypatch.setattr(command, "train_pair", lambda study, base, seed: pairs.append((base, seed)))
    command.train(study)
    assert pairs == [(2, 11), (2, 12)]
    put(study.folder / "base_2" / "study.json", measured(0, 0.4))
    with pytest.raises(command.ExactError, match="no base of .* passes the gate"):
        command.train(study)


def test_runs_that_are_one_run_twice_or_of_other_data_are_found(tmp_path):
    def run(name, *losses):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps({"lm_loss": x}) + "\n" for x in losses))
        return tmp_path / name

    baseline = run("baseline", 4.0, 3.0)
    command.check_pair(baseline, run("exact", 4.0, 3.1), same_data=True)
    command.check_pair(baseline, run("upsample", 4.2, 3.1), same_data=False)
    with pytest.raises(ValueError, match="one run twice"):
        command.check_pair(baseline, run("twice", 4.0, 3.0), same_data=True)
    with pytest.raises(ValueError, match="begins with the loss 4.1, .* with 4.0"):
        command.check_pair(baseline, run("other", 4.1, 3.1), same_data=True)
