"""exact_megatron.commands.compare and the runs of exact_megatron.study, without training anything."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from exact_megatron.utils import files

pytest.importorskip("torch")
pytest.importorskip("omegaconf")

from exact_megatron.commands import compare
from exact_megatron.study import runs, steps
from exact_megatron.training.config import load_config


def yaml_file(tmp_path, **trainer):
    config = {
        "trainer": {"max_steps": 30, "limit_val_batches": 2, **trainer},
        "exp_manager": {"exp_dir": str(tmp_path / "out")},
        "model": {
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "num_layers": 2,
            "data": {"data_prefix": ["text"], "splits_string": "90,10,0", "seq_length": 512},
            "optim": {"sched": {"warmup_steps": 20}},
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    return path


def test_plan_makes_the_base_like_the_arms_but_for_the_window(tmp_path):
    base, baseline, exact = compare.plan(yaml_file(tmp_path), ["model.seed=7"], 128, 10)
    assert [arm.name for arm in (base, baseline, exact)] == ["base", "baseline", "exact"]
    assert base.config.model.data.seq_length == 128 and exact.config.model.data.seq_length == 512
    assert base.config.model.global_batch_size == 32 and base.config.model.micro_batch_size == 8
    assert base.config.tokens_per_step == baseline.config.tokens_per_step == exact.config.tokens_per_step == 4096
    assert base.config.num_microbatches == exact.config.num_microbatches
    assert base.config.model.max_position_embeddings == 512
    assert base.config.trainer.max_steps == 10 and base.config.model.optim.sched.warmup_steps == 9
    assert exact.config.trainer.max_steps == 30 and exact.config.model.optim.sched.warmup_steps == 20
    assert [arm.config.model.exact.enabled for arm in (base, baseline, exact)] == [False, False, True]
    assert base.config.restore_from_path is None
    assert baseline.config.restore_from_path == exact.config.restore_from_path == str(tmp_path / "out" / "base")
    for arm in (base, baseline, exact):
        assert arm.folder == tmp_path / "out" / arm.name
        assert arm.config.model.seed == 7 and arm.config.model.num_layers == 2
        assert arm.config.model.data.index_mapping_dir == str(tmp_path / "out" / "index")
        assert arm.config.exp_manager.checkpoint_callback_params.save_last
        assert arm.command[:4] == [sys.executable, "-m", "exact_megatron", "train"]
        assert arm.command[4:7] == ["--config", str(tmp_path / "config.yaml"), "model.seed=7"]
    differing = files.changed_settings(*(asdict(arm.config) for arm in (baseline, exact)))
    assert set(differing) == {"model.exact.enabled", "exp_manager.exp_dir"}


def test_plan_uses_torchrun_for_several_ranks_and_keeps_a_given_index_folder(tmp_path):
    overrides = ["model.tensor_model_parallel_size=2", "model.data.index_mapping_dir=elsewhere"]
    arms = compare.plan(yaml_file(tmp_path, devices=2), overrides, 128, 10)
    for arm in arms:
        assert "torch.distributed.run" in arm.command and "train" in arm.command
        assert arm.config.model.data.index_mapping_dir == "elsewhere"


@pytest.mark.parametrize(
    "overrides, window, base_steps, message",
    [
        ([], 1024, 10, "between 1 and the window"),
        ([], 96, 10, "not a whole number of windows"),
        ([], 128, 0, "at least 1"),
        (["trainer.limit_val_batches=0"], 128, 10, "held-out"),
        (["model.data.splits_string=100,0,0"], 128, 10, "held-out"),
        (["trainer.num_nodes=2"], 128, 10, "one machine"),
        (["model.exact.tau=4000"], 128, 10, "tau=4000"),
    ],
    ids=str,
)
def test_plan_refuses_before_anything_is_started(tmp_path, overrides, window, base_steps, message):
    with pytest.raises(ValueError, match=message):
        compare.plan(yaml_file(tmp_path), overrides, window, base_steps)


@pytest.fixture
def fake_runs(monkeypatch):
    """No processes: a run leaves its config.yaml, a line of metrics, the checkpoint of its last step and its validation."""
    launched = []

    def launch(command):
        if "exact_megatron.benchmark.arms" in command:
            proof = Path(command[command.index("exact_megatron.benchmark.arms") + 1])
            proof.parent.mkdir(parents=True, exist_ok=True)
            proof.write_text('{"weight table": "d1"}')
            launched.append("arms")
            return 0
        arguments = command[command.index("train") + 3 :]
        run = load_config(command[command.index("train") + 2], arguments)
        folder = Path(run.exp_manager.exp_dir)
        launched.append(folder.name)
        (folder / "checkpoints" / f"step_{run.trainer.max_steps:08d}").mkdir(parents=True)
        (folder / "config.yaml").write_text(run.to_yaml())
        (folder / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "lm_loss": 3.0, "exact_loss": 3.0 + run.model.exact.enabled}) + "\n"
        )
        if run.model.exact.enabled:
            (folder / "weights.json").write_text('{"digest": "d1"}')
        (folder / "validation.jsonl").write_text(json.dumps({"step": run.trainer.max_steps}) + "\n")
        return 0

    monkeypatch.setattr(steps, "launch", launch)
    monkeypatch.setattr(compare, "describe", lambda arm: {"CPU": "abacus"})
    monkeypatch.setattr(compare, "write_report", lambda folder: launched.append("report"))
    return launched


def test_compare_trains_each_run_once_and_reports(fake_runs, tmp_path, capsys):
    config = yaml_file(tmp_path)
    compare.compare(config, ["model.seed=7"], 128, 10)
    assert fake_runs == ["arms", "base", "baseline", "exact", "report"]
    facts = json.loads((tmp_path / "out" / "comparison.json").read_text())
    expected = f"exact-megatron compare --config {config} --base-seq-length 128 --base-steps 10 model.seed=7"
    assert facts == {"command": expected, "CPU": "abacus"}
    assert "base (1 of 3)" in capsys.readouterr().err

    fake_runs.clear()
    compare.compare(config, ["model.seed=7", "trainer.log_every_n_steps=5"], 128, 10)
    assert fake_runs == ["report"]
    assert capsys.readouterr().err.count("done before") == 3
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == facts  # of the run that trained

    arm = compare.plan(config, ["model.seed=7"], 128, 10)[2]
    for validated in ("", '{"step": 5}\n', '{"ste'):  # ended between its last checkpoint and the validation of it
        (arm.folder / "validation.jsonl").write_text(validated)
        assert arm.steps_done == arm.config.trainer.max_steps and not arm.finished


def test_compare_has_its_folder_for_itself(fake_runs, tmp_path):
    """A second one, in a process of its own, is refused."""
    config = yaml_file(tmp_path)
    script = "import sys, time; from exact_megatron.training.run_lock import only_writer\n"
    script += "with only_writer(sys.argv[1]): print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script, tmp_path / "out"], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        try:
            with pytest.raises(RuntimeError, match=f"{tmp_path}/out is in use: .*pid {holder.pid},"):
                compare.compare(config, ["model.seed=7"], 128, 10)
        finally:
            holder.kill()
    assert not fake_runs


def test_compare_refuses_a_folder_with_other_settings(fake_runs, tmp_path):
    config = yaml_file(tmp_path)
    compare.compare(config, ["model.seed=7"], 128, 10)
    with pytest.raises(ValueError, match="base holds a run with other settings.*model.seed: there 7, now 8"):
        compare.compare(config, ["model.seed=8"], 128, 10)
    with pytest.raises(ValueError, match="exact holds a run with other settings.*alpha: there 0.15, now 0.3"):
        compare.compare(config, ["model.seed=7", "model.exact.alpha=0.3"], 128, 10)


def test_compare_names_the_run_that_failed_or_stopped(fake_runs, tmp_path, monkeypatch):
    config = yaml_file(tmp_path)
    fake = steps.launch
    monkeypatch.setattr(steps, "launch", lambda command: 2)
    with pytest.raises(RuntimeError, match="would not differ as they must: see above; nothing was trained"):
        compare.compare(config, [], 128, 10)
    monkeypatch.setattr(steps, "launch", lambda command: 3 if "train" in command else fake(command))
    with pytest.raises(RuntimeError, match="the run base failed with exit code 3"):
        compare.compare(config, [], 128, 10)
    monkeypatch.setattr(steps, "launch", lambda command: 0)
    with pytest.raises(RuntimeError, match="the run base was stopped after step 0 of 10"):
        compare.compare(config, [], 128, 10)


@pytest.mark.parametrize("arm, problem", [("base", "weighted"), ("baseline", "weighted"), ("exact", "unweighted")])
def test_a_run_that_was_not_trained_as_its_arm_ends_the_comparison(fake_runs, tmp_path, monkeypatch, arm, problem):
    fake = steps.launch

    def launch(command):
        code = fake(command)
        if fake_runs[-1] == arm:  # this one was just trained
            loss = 4.0 if problem == "weighted" else 3.0
            line = json.dumps({"step": 1, "lm_loss": 3.0, "exact_loss": loss})
            (tmp_path / "out" / arm / "metrics.jsonl").write_text(line)
        return code

    monkeypatch.setattr(steps, "launch", launch)
    for _ in range(2):  # also where it lies there finished
        with pytest.raises(ValueError, match=f"out/{arm} should be .*: remove it and train it again"):
            compare.compare(yaml_file(tmp_path), [], 128, 10)
        assert [name for name in fake_runs if name != "arms"][-1] == arm


def test_compare_does_not_run_under_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="not under torchrun"):
        compare.compare(yaml_file(tmp_path), [], 128, 10)


def test_demo_config_is_valid(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3])
    run = load_config("configs/demo.yaml")
    assert run.model.data.seq_length == 1024 and run.world_size == 2
    arms = compare.plan("configs/demo.yaml", [], 256, 120)
    assert arms[0].config.tokens_per_step == arms[1].config.tokens_per_step == 4096


# Arms and stages


def test_an_arm_is_a_name_and_settings():
    assert runs.Arm.parse("baseline").settings == ["model.exact.enabled=false"]
    arm = runs.Arm.parse("exact-a0.5:alpha=0.5,gamma=1")
    assert arm.name == "exact-a0.5"
    assert arm.settings == ["model.exact.enabled=true", "model.exact.alpha=0.5", "model.exact.gamma=1"]


@pytest.mark.parametrize("text", ["", "a/b", "baseline:alpha=1", "exact:alpha", "exact:alpha=1,gamma", ":alpha=1"])
def test_an_arm_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="give NAME or NAME:key=value"):
        runs.Arm.parse(text)


def stages_of(tmp_path, arms=("baseline", "exact", "strong:alpha=0.5"), stages=("4k", "8k")):
    made = [
        runs.Stage(name, f"window {name}", [f"model.data.seq_length={n}"]) for name, n in zip(stages, (256, 512, 512))
    ]
    return runs.plan_stages(
        [runs.Arm.parse(arm) for arm in arms], made, yaml_file(tmp_path), tmp_path / "base", tmp_path / "out"
    )


def test_every_arm_goes_through_the_stages_from_its_own_last_one(tmp_path):
    first, second = stages_of(tmp_path)
    out = tmp_path / "out"
    assert [run.folder for run in first] == [out / arm / "4k" for arm in ("baseline", "exact", "strong")]
    assert {run.config.restore_from_path for run in first} == {str(tmp_path / "base")}
    assert [run.config.restore_from_path for run in second] == [str(run.folder) for run in first]
    assert [run.config.model.exact.alpha for run in second] == [0.15, 0.15, 0.5]
    assert [run.proof for run in second] == [
        None,
        out / "arms" / "exact" / "8k.json",
        out / "arms" / "strong" / "8k.json",
    ]
    names = [step.name for step in runs.training_steps(second)]
    assert names == [
        "the proof of the run exact/8k",
        "the proof of the run strong/8k",
        "the run baseline/8k",
        "the run exact/8k",
        "the run strong/8k",
    ]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"arms": ["exact", "exact:alpha=1"]}, "two of the arms exact, exact have the same name"),
        ({"stages": ["4k", "4k"]}, "two of the stages 4k, 4k have the same name"),
        ({"arms": ["exact:enabled=false"]}, "only the arm baseline has no weights"),
        ({"arms": ["exact:alfa=1"]}, "alfa"),
    ],
)
def test_stages_that_would_be_one_run_or_no_pair_are_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        stages_of(tmp_path, **changed)


def test_a_run_without_validation_is_finished_when_it_is_trained(tmp_path):
    settings = [f"exp_manager.exp_dir={tmp_path / 'run'}"]
    run = runs.Run.planned("base", "", yaml_file(tmp_path, limit_val_batches=0), settings)
    assert not run.finished
    (tmp_path / "run" / "checkpoints" / "step_00000030").mkdir(parents=True)
    assert run.finished
