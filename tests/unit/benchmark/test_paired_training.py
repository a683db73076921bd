"""Paired continued pretraining: its plan, what it does at a signal, and what it does not take for its arms."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exact_megatron.benchmark import paired_training

PLAN = "--base base --config m.yaml --data d/corpus --folder runs --stages 4096:25e6 16384:25e6 --seeds 1 2 --arms baseline exact".split()


def test_plan_of_the_pairs():
    """The arms of a seed and stage differ in their weights, and in nothing else but where they lie."""
    everything = paired_training.plan(paired_training.parse(PLAN))
    tasks = [task for task in everything if task.kind != "proof"]
    trained = [task for task in tasks if task.kind == "training"]
    assert len(trained) == 8 and len(tasks) == 8 + 2 * 4 + 2
    assert [task.kind for task in everything[:6]] == [
        "proof",
        "training",
        "training",
    ] * 2  # the proof comes before the pair
    proof = everything[0].command[5:]
    assert (
        proof[0] == str(everything[0].done) == "runs/arms/seed1/exact/4096.json" and proof[1:] == trained[1].command[4:]
    )
    for one, two in zip(trained[::2], trained[1::2]):
        differ = {a.split("=")[0] for a, b in zip(one.command, two.command) if a != b}
        paths = {"exp_manager.exp_dir", "model.exact.enabled"} | (
            {"restore_from_path"} if "window 16384" in one.name else set()
        )
        assert differ == paths, differ
    first, later = trained[1], trained[3]
    assert "restore_from_path=base" in first.command and "restore_from_path=runs/seed1/exact/4096" in later.command
    assert "trainer.max_steps=381" in first.command and "model.global_batch_size=4" in later.command
    assert "model.micro_batch_size=8" in first.command and "model.micro_batch_size=2" in later.command
    assert first.done == Path("runs/seed1/exact/4096/checkpoints/step_00000381/metadata.json")
    suite = tasks[8]
    assert suite.command[3:6] == ["evaluate", "runs/seed1/baseline/16384", "--suite"]
    assert suite.done == Path("runs/evaluation/seed1/baseline/distance-probe/results.json")
    ruler = paired_training.plan(
        paired_training.parse(
            [*PLAN, "--seeds", "1", "--suites", "ruler", "--evaluate", "lengths=8192,16384", "limit=5"]
        )
    )[6:]
    assert [task.command[3] for task in ruler] == ["convert", "convert", "evaluate", "evaluate", "evaluate"]
    assert ruler[2].command[4] == ruler[0].command[-1] == "runs/hf/seed1/baseline"
    assert ruler[2].command[-5:] == ["--lengths", "8192", "16384", "--limit", "5"]
    knob = paired_training.plan(
        paired_training.parse([*PLAN, "--arms", "baseline", "more:alpha=0.5,gamma=1", "--suites"])
    )
    assert {"model.exact.enabled=true", "model.exact.alpha=0.5", "model.exact.gamma=1"} < set(knob[2].command)
    assert len(knob) == 8 + 4 and {"model.exact.alpha=0.5", "model.exact.gamma=1"} < set(knob[0].command)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arms", "exact:alpha"], "--arms exact:alpha: give NAME"),
        (["--arms", "baseline:alpha=1"], "baseline has no settings"),
        (["--stages", "4096:70000"], "--stages 4096:70000: 1 steps of 16 windows"),
        (["--stages", "131072:1e9"], "1 steps|0 windows"),
        (["--stages", "4096"], "--stages 4096: give WINDOW:TOKENS"),
        (["--stages", "0:1e9"], "--stages 0:1e9: give WINDOW:TOKENS"),
        (["--arms", "exact", "exact:alpha=1"], "each arm needs a name of its own"),
    ],
)
def test_plans_that_cannot_be(more, message):
    with pytest.raises(ValueError, match=message):
        paired_training.plan(paired_training.parse([*PLAN, *more]))


def test_ranks_of_a_node():
    """Every rank has its micro-batch: 16 windows of 4,096 on 8 ranks, and not the 4 of 16,384."""
    given = [*PLAN, "--seeds", "1", "--devices", "8", "--stages"]
    train = paired_training.plan(paired_training.parse([*given, "4096:25e6"]))[1]
    assert train.command[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8"]
    assert {"trainer.devices=8", "model.micro_batch_size=2", "model.global_batch_size=16"} < set(train.command)
    with pytest.raises(ValueError, match="4 windows in micro-batches of 1 on 8 devices cannot be trained"):
        paired_training.plan(paired_training.parse([*given, "16384:25e6"]))


def made_up(monkeypatch, tmp_path, code):
    """The command line of a pair whose tasks are all this Python code; argv[1] is what a task is to make."""
    real = paired_training.plan

    def plan(args):
        tasks = real(args)
        for task in tasks:
            task.command[1:] = ["-c", code, str(task.done), task.kind, *task.command[1:]]
        return tasks

    monkeypatch.setattr(paired_training, "plan", plan)
    return f"--base b --config m.yaml --data d --folder {tmp_path} --stages 64:2048 --step-tokens 512 --micro-tokens 256".split()


METRICS = """
import json, pathlib, sys
done = pathlib.Path(sys.argv[1])
done.parent.mkdir(parents=True, exist_ok=True)
if sys.argv[2] == "training":
    weighted = "model.exact.enabled=true" in sys.argv and {weighted}
    line = dict(step=4, lm_loss=2.0, exact_loss=2.5 if weighted else 2.0, tokens=2048, tokens_per_s=1.0)
    (done.parents[2] / "metrics.jsonl").write_text(json.dumps(line) + chr(10))
    if weighted:
        (done.parents[2] / "weights.json").write_text('{{"digest": "7ab1e"}}')
done.write_text('{{"weight table": "7ab1e", "tokens": "70ce75"}}')
"""


def test_a_signal_stops_the_run_in_order(tmp_path):
    """A real process: the run gets TERM once and saves, the results are written, and the exit code says which signal it was."""
    run = (
        "import pathlib, signal, sys, time; done = pathlib.Path(sys.argv[1]); done.parent.mkdir(parents=True, exist_ok=True)\n"
        "signal.signal(15, lambda *_: (time.sleep(0.5), done.with_name('saved').touch(), sys.exit(0)))\n"
        "done.with_name('begun').touch(); time.sleep(60)"
    )
    script = f"""
import sys
import pytest
from pathlib import Path
from exact_megatron.benchmark import paired_training
from tests.unit.benchmark.test_paired_training import made_up
sys.exit(paired_training.main(made_up(pytest.MonkeyPatch(), Path({str(tmp_path)!r}), {run!r}) + ["--suites"]))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    proof = tmp_path / "arms" / "seed1234" / "exact"
    deadline = time.monotonic() + 60
    while not (proof / "begun").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGUSR1 and (proof / "saved").exists(), said
    assert (
        "arms of seed 1234, exact, window 64 (1 of 3)" in said
        and "stopped by a signal; the same command goes on" in said
    )
    found = json.loads((tmp_path / "paired_training.json").read_text())
    assert found["finished"] == 0 and found["tasks"] == 3 and found["runs"] == []


def test_exit_codes_of_tasks(tmp_path):
    """A run that ends well and did not come to its end was stopped from outside; a failure's own code is passed on."""

    def code(program):
        command = [sys.executable, "-c", program]
        return paired_training.run_task(paired_training.Task("training", "x", command, tmp_path / "done", tmp_path))

    assert code("") == paired_training.UNFINISHED and code("raise SystemExit(5)") == 5
    (tmp_path / "done").touch()
    assert code("") == 0


def test_a_run_that_was_not_weighted_as_its_arm_is_rejected(tmp_path, monkeypatch, capfd):
    """Processes that are made up: the proof is written, the baseline trains, the exact arm trains without weights."""
    given = made_up(monkeypatch, tmp_path, METRICS.format(weighted=False))
    for _ in range(2):  # the second time it is there already
        assert paired_training.main([*given, "--suites"]) == 2
        assert "exact/64 should be weighted by the table 7ab1e; it has None" in capfd.readouterr().err


def test_what_is_done_is_kept_and_belongs_to_its_command(tmp_path, monkeypatch, capfd):
    given = [*made_up(monkeypatch, tmp_path, METRICS.format(weighted=True)), "--suites"]
    assert paired_training.main(given) == 0
    found = json.loads((tmp_path / "paired_training.json").read_text())
    assert found["finished"] == found["tasks"] == 3 and [run["steps"] for run in found["runs"]] == [4, 4]
    assert found["first batches"] == {"arms/seed1234/exact/64.json": {"weight table": "7ab1e", "tokens": "70ce75"}}
    assert "(3 of 3)" in capfd.readouterr().err
    assert paired_training.main(given) == 0 and capfd.readouterr().err == ""
    assert paired_training.main([*given, "--lr", "1e-3"]) == 2
    said = capfd.readouterr().err
    assert (
        "arms of seed 1234, exact, window 64 is done, with other arguments" in said and "model.optim.lr=0.001" in said
    )
    assert f"remove {tmp_path}/arms/seed1234/exact/64.json and what was made from it" in said


def test_results_of_a_run_that_was_killed(tmp_path):
    """Its last line is cut off, and it was never validated."""
    run = tmp_path / "seed5" / "exact" / "64"
    run.mkdir(parents=True)
    line = {"step": 4, "lm_loss": 2.0, "tokens": 2048, "tokens_per_s": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 5, "lm_l')
    args = paired_training.parse([*PLAN, "--folder", str(tmp_path)])
    task = paired_training.Task("training", "x", ["python", "x"], run / "checkpoints" / "step_9" / "metadata.json", run)
    found = paired_training.results(args, [task])
    assert found["runs"][0]["steps"] == 4 and not found["runs"][0]["finished"] and not found["runs"][0]["validation"]
