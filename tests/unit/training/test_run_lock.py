"""One writer a run folder, without a run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import pytest

from exact_megatron.config import ExactError
from exact_megatron.training import run_lock
from exact_megatron.training.run_lock import only_writer

# Holds the folder with a forked child that inherits the descriptor; the child says when, and outlives its parent.
HOLDER = """
import os, sys, time
from exact_megatron.training.run_lock import only_writer
with only_writer(sys.argv[1]):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path, monkeypatch):
    """held(**environment) -> (folder, holder, pid of its child)"""
    processes, orphans = [], []
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)

    def hold(**environment):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(holder)
        orphans.append(int(holder.stdout.readline()))
        return tmp_path / "run", holder, orphans[-1]

    yield hold
    for process in processes:
        process.kill()
        process.wait()
    for pid in orphans:
        os.kill(pid, 9)


def test_a_held_folder_is_refused_with_host_pid_and_job(held):
    folder, holder, _ = held(SLURM_JOB_ID="4711")
    record = (folder / "run.lock").read_bytes()
    started = time.monotonic()
    with pytest.raises(ExactError) as refused, only_writer(folder):
        pass
    text = str(refused.value)
    assert re.search(
        rf"^{folder} is in use: .* host {os.uname().nodename}, pid {holder.pid}, Slurm job 4711, since", text
    )
    assert "exp_manager.exp_dir=" in text and time.monotonic() - started < 1
    assert [p.name for p in folder.iterdir()] == ["run.lock"] and (folder / "run.lock").read_bytes() == record


def test_a_killed_holder_frees_it_though_a_child_has_the_descriptor(held):
    folder, holder, child = held()
    holder.kill()
    holder.wait()
    os.kill(child, 0)
    with only_writer(folder):
        assert json.loads((folder / "run.lock").read_text())["pid"] == os.getpid()
    assert not (folder / "run.lock").exists() and folder.exists()


def test_a_requeued_job_waits_for_its_predecessor_and_another_job_does_not(held, monkeypatch):
    folder, holder, _ = held(SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(ExactError, match="Slurm job 7"), only_writer(folder):  # a second step of one try
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        holder.kill()
        holder.wait()

    monkeypatch.setattr(run_lock.time, "sleep", sleep)
    with only_writer(folder):
        assert waited


def test_waiting_ends(held, monkeypatch):
    """A lock that a file server keeps for a process that is gone."""
    folder, *_ = held()
    monkeypatch.setattr(run_lock, "_gone", lambda holder: True)
    monkeypatch.setattr(run_lock, "PREDECESSOR_SECONDS", 0.01)
    with pytest.raises(ExactError, match=f"remove {folder}/run.lock"), only_writer(folder):
        pass


def test_a_folder_that_was_made_and_not_written_to_goes(tmp_path):
    for written in (False, True):
        with pytest.raises(ZeroDivisionError), only_writer(tmp_path / "new" / "run"):
            if written:
                (tmp_path / "new" / "run" / "config.yaml").touch()
            raise ZeroDivisionError
        assert (tmp_path / "new" / "run").exists() == written


@pytest.mark.parametrize("content", ["", "garbage", "[]", '{"pid": "x"}'])
def test_a_lock_file_that_nobody_holds_is_taken_whatever_it_says(tmp_path, content):
    (tmp_path / "run.lock").write_text(content)
    with only_writer(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
