"""Stops, kills and changed settings between a checkpoint and its resume, through the real command line."""

from __future__ import annotations

import json
import shutil
import signal
import time

import psutil
import pytest
import torch

from tests.helpers.forked import Forked, run
from tests.helpers.ranks import launch
from tests.helpers.tiny import config_file, write_data

STEPS = 8


def command(config, run_dir, *overrides):
    return [
        *("-m", "exact_megatron", "train", "--config", str(config)),
        f"exp_manager.exp_dir={run_dir}",
        f"trainer.max_steps={STEPS}",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
        *overrides,
    ]


def train(config, run_dir, *overrides, timeout=120):
    done = run(command(config, run_dir, *overrides), timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def metrics(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


def weights(run_dir):
    """Everything that the last checkpoint holds, by key."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(str(run_dir / "checkpoints" / f"step_{STEPS:08d}"))
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run to compare with."""
    folder = tmp_path_factory.mktemp("resume")
    config = config_file(folder, write_data(folder))
    train(config, folder / "straight")
    return folder, config, metrics(folder / "straight"), weights(folder / "straight")


def assert_bitwise(run_dir, straight):
    _, _, lines, tensors = straight
    assert metrics(run_dir) == lines
    found = weights(run_dir)
    assert found.keys() == tensors.keys() and len(tensors) > 20
    assert any("exp_avg_sq" in key for key in tensors)
    for key, tensor in tensors.items():
        assert torch.equal(found[key], tensor), key


def end_tree(process):
    """Kill what is left of a launch; torchrun's ranks are in sessions of their own."""
    for started in children(process) if process.poll() is None else []:
        started.kill()
    process.end()


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stop_signal_saves_and_resume_is_bitwise(straight, number):
    folder, config, *_ = straight
    run_dir = folder / f"stopped_{number.name}"
    overrides = ["exp_manager.checkpoint_callback_params.every_n_train_steps=0"]
    with Forked(command(config, run_dir, *overrides)) as process:
        log = run_dir / "metrics.jsonl"
        wait_for(lambda: log.is_file() and log.read_text().count("\n") >= 2, process)
        process.send_signal(number)
        _, output = process.communicate(timeout=60)
    assert process.returncode == 0, output
    stopped = len(metrics(run_dir))
    assert stopped < STEPS and f"stopped by a signal after step {stopped}" in output
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == [f"step_{stopped:08d}"]
    assert "resumed from" in train(config, run_dir, *overrides)
    assert_bitwise(run_dir, straight)


def test_kill_between_and_during_checkpoints(straight):
    """kill -9 right when a checkpoint is being written, then some time after one: nothing loads half."""
    folder, config, *_ = straight
    run_dir = folder / "killed"
    checkpoints = run_dir / "checkpoints"

    def kill_when(condition):
        with Forked(command(config, run_dir)) as process:
            wait_for(condition, process)
            process.end()

    kill_when(lambda: (checkpoints / "step_00000002.partial").exists())
    assert [p.name for p in sorted(checkpoints.glob("step_*")) if p.suffix != ".partial"] == ["step_00000001"]
    log = run_dir / "metrics.jsonl"
    kill_when(lambda: (checkpoints / "step_00000004").exists() and log.read_text().count('"step": 5'))
    train(config, run_dir)
    assert not list(checkpoints.glob("*.partial"))
    assert_bitwise(run_dir, straight)


def test_distributed_ranks_stop_together(straight):
    """A signal to one rank of two stops both after the same step; the plain optimizer resumes as well."""
    folder, config, *_ = straight
    run_dir = folder / "two_ranks"
    overrides = [
        "trainer.devices=2",
        "model.tensor_model_parallel_size=2",
        "model.optim.name=adam",
        "model.data.num_workers=2",  # torchrun signals the loader's processes too
        "exp_manager.checkpoint_callback_params.every_n_train_steps=0",
    ]
    process = Forked(command(config, run_dir, *overrides))
    try:
        log = run_dir / "metrics.jsonl"
        wait_for(lambda: log.is_file() and log.read_text().count("\n") >= 1, process, 90)
        process.send_signal(signal.SIGTERM)  # torchrun passes it on
        _, output = process.communicate(timeout=90)
    finally:
        end_tree(process)
    stopped = len(metrics(run_dir))
    assert stopped < STEPS and f"stopped by a signal after step {stopped}" in output, output[-3000:]
    launch("-m", command(config, run_dir, *overrides)[1:], 2)
    for line, expected in zip(metrics(run_dir), straight[2], strict=True):
        assert line["exact_loss"] == pytest.approx(expected["exact_loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.exact.alpha=0.25", r"alpha: checkpoint 0.5, now 0.25.*weights: checkpoint \w{16}, now \w{16}"),
        ("model.exact.enabled=false", r"enabled: checkpoint True, now False.*weights: checkpoint \w{16}, now None"),
        ("model.seed=99", "model.seed: checkpoint 1234, now 99"),
        ("model.global_batch_size=4", "model.global_batch_size: checkpoint 8, now 4"),
        ("model.rotary_base=77", "model.rotary_base: checkpoint 10000.0, now 77.0"),
        ("trainer.max_steps=90", r"census: checkpoint \w{16}, now \w{16}.*trainer.max_steps went from 8 to 90"),
        ("exp_manager.resume_if_exists=false", "resume_if_exists=false: choose another"),
    ],
)
def test_resume_with_other_settings_is_refused(straight, override, message, monkeypatch):
    folder, config, *_ = straight
    done = run(command(config, folder / "straight", override))
    assert done.returncode == 2
    import re

    assert re.search(message, done.stderr), done.stderr[-2000:]


def test_changed_weights_can_be_accepted(straight):
    folder, config, *_ = straight
    run_dir = folder / "accepted"
    shutil.copytree(folder / "straight", run_dir)
    shutil.rmtree(run_dir / "checkpoints" / f"step_{STEPS:08d}")
    output = train(config, run_dir, "model.exact.alpha=0.25", "model.exact.allow_changed_weights=true")
    assert "resumed from" in output
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, STEPS + 1))


def test_a_loss_that_is_not_finite_ends_the_run_before_a_checkpoint(straight):
    folder, config, *_ = straight
    run_dir = folder / "diverged"
    done = run(command(config, run_dir, "model.optim.lr=1e30"))
    assert done.returncode == 2 and "of step 2 is nan: the run ends here" in done.stderr, done.stderr[-2000:]
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("layout", [[], ["model.pipeline_model_parallel_size=2"]], ids=["dp2", "pp2"])
def test_the_last_step_is_saved_before_it_is_validated_and_validation_can_be_stopped(straight, tmp_path, layout):
    """On data of two members without weights, fewer samples than the steps and the validation draw."""
    _, config, *_ = straight
    write_data(tmp_path, ordinary=10)
    for name in "yz":
        for suffix in (".bin", ".idx"):
            shutil.copyfile(tmp_path / f"x{suffix}", tmp_path / f"{name}{suffix}")
    overrides = [
        f"model.data.data_prefix={{train: [{tmp_path}/x, {tmp_path}/y], validation: [{tmp_path}/y, {tmp_path}/z]}}",
        "trainer.devices=2",
        "model.global_batch_size=24",
        "model.micro_batch_size=4",
        *layout,
    ]
    launch("distributed/run_lifecycle.py", [str(config), str(tmp_path), str(tmp_path / "found.json"), *overrides], 2)
    found = json.loads((tmp_path / "found.json").read_text())
    saved = ["step_00000002", "step_00000003"]
    assert found["samples"] == [72, 72] and found["an epoch"] < 72

    first, again = found["straight"]
    expected = {key: first[key] for key in ("losses", "validated")}
    assert first["ended"] == "finished" and first["checkpoints"] == saved and list(first["validated"]) == ["3"]

    crashed, resumed = found["crashed"]
    assert crashed["ended"] == "crashed" and crashed["checkpoints"] == saved and not crashed["validated"]
    assert resumed["begun"] == 3 and resumed["ended"] == "finished"
    assert {key: resumed[key] for key in expected} == expected

    stopped, resumed = found["stopped"]
    assert stopped["ended"] == "stopped" and stopped["checkpoints"] == saved and not stopped["validated"]
    assert resumed["begun"] == 3 and {key: resumed[key] for key in expected} == expected

    stopped, resumed = found["between"]
    assert stopped["ended"] == "stopped" and stopped["checkpoints"] == saved[:1] and len(stopped["losses"]) == 2
    assert resumed["begun"] == 2 and list(resumed["validated"]) == ["2", "3"]
    assert resumed["losses"] == expected["losses"] and resumed["validated"]["3"] == expected["validated"]["3"]
    assert found["validation batches before the stop"] == 2

    assert again["begun"] == 2 and again["checkpoints"] == [*saved, "step_00000003.damaged"]
    assert {key: again[key] for key in expected} == expected, "from the newest whole checkpoint"


def children(process):
    return psutil.Process(process.pid).children(recursive=True)


def command_line(process):
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a writer that has finished
        return ""


def test_one_writer_a_folder_and_no_orphans_after_kill(straight):
    """With loader workers and a checkpoint's helpers alive: a second run is refused, and kill -9 frees the folder at once."""
    folder, config, *_ = straight
    run_dir = folder / "two_writers"
    overrides = ["model.data.num_workers=2", "trainer.max_steps=1000"]
    process = Forked(command(config, run_dir, *overrides))
    try:
        wait_for(lambda: (run_dir / "checkpoints" / "step_00000002").exists(), process)
        written = {path: path.read_bytes() for path in (run_dir / "config.yaml", run_dir / "weights.json")}
        for others in (["model.seed=5"], ["trainer.devices=2"]):
            done = run(command(config, run_dir, *others))
            assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
            assert f"{run_dir} is in use" in done.stderr and f"pid {process.pid}," in done.stderr
            assert "exp_manager.exp_dir=" in done.stderr
        assert written == {path: path.read_bytes() for path in written}
        assert process.poll() is None
        started = children(process)
        assert len(started) >= 2, "two workers, perhaps a checkpoint's writers"
        assert not any("spawn_main" in command_line(child) for child in started), "none that imports torch anew"
        process.send_signal(signal.SIGKILL)
        _, left = psutil.wait_procs(started, timeout=5)
        assert not left
    finally:
        end_tree(process)
    assert (run_dir / "run.lock").is_file()
    done = run(command(config, run_dir, "model.seed=5"))
    assert done.returncode == 2 and "model.seed: checkpoint 1234, now 5" in done.stderr, (
        "not locked out, but for its seed"
    )
    assert not (run_dir / "run.lock").exists()
