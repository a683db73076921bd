"""The scripts of slurm/ on a real Slurm: `make test-slurm`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny import config_file, write_data

pytestmark = pytest.mark.slurm

SCRIPTS = Path(__file__).resolve().parents[2] / "slurm"
STEPS = 40
EVERY = 5  # steps between checkpoints
ARGUMENTS = [
    f"trainer.max_steps={STEPS}",
    f"exp_manager.checkpoint_callback_params.every_n_train_steps={EVERY}",
    "exp_manager.checkpoint_callback_params.save_top_k=-1",
    "model.tensor_model_parallel_size=2",
    "model.pipeline_model_parallel_size=2",
    "model.global_batch_size=32",
    "model.exact.enabled=true",
]
TWO_NODES = ("--nodes=2", "--gpus-per-node=2", "--time=30")
STARTS = 240  # seconds in which ranks come up, on a machine that other work shares


def metrics(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in whole]


def steps_done(folder):
    return len(metrics(folder))


def wait_for(condition, what, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)


def weights(folder):
    """Everything that the last checkpoint holds, by key."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(str(folder / "checkpoints" / f"step_{STEPS:08d}"))
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, config_file(folder, write_data(folder))


def submit(cluster, tiny, name, *arguments, options=TWO_NODES, **settings):
    folder, config = tiny
    run_dir = folder / name
    output = f"--output={folder}/{name}-%j.out"
    job = cluster.submit(
        SCRIPTS / "train.sbatch",
        *("--config", config, f"exp_manager.exp_dir={run_dir}", *arguments),
        options=(output, *options),
        **settings,
    )
    return job, run_dir


def processes_of(job, node):
    """Processes of a job's steps on a virtual node, slurmstepd's own left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"SLURM_JOB_ID=%d" % int(job) in environment and b"SLURM_STEP_NUM_NODES=2" in environment:
            if b"SLURMD_NODENAME=%s" % node.encode() in environment:
                found.append(int(folder.name))
    return found


def step_daemons(processes):
    """Their slurmstepd, which outlives slurmd."""
    parents = {int(Path(f"/proc/{p}/stat").read_text().rsplit(")", 1)[1].split()[1]) for p in processes}
    return [p for p in parents if Path(f"/proc/{p}/cmdline").read_text().startswith("slurmstepd")]


KILL_A_RANK = r"""
for p in /proc/[0-9]*; do
    has() { tr '\0' '\n' <$p/environ 2>/dev/null | grep -qx "$1"; }
    if has "SLURM_JOB_ID=$1" && has SLURM_NODEID=1 && has LOCAL_RANK=1 && grep -aq 'train' $p/cmdline; then
        echo killing ${p#/proc/}
        kill -9 ${p#/proc/}
        break
    fi
done
"""


def test_interrupted_run_is_bitwise_the_uninterrupted_one(cluster, tiny):
    """2 nodes, TP2 x PP2: preempted by a job that goes first, a rank killed with -9, a node lost; each time it goes on by itself."""
    job, run_dir = submit(cluster, tiny, "interrupted", *ARGUMENTS)

    # Another job needs the nodes.
    wait_for(lambda: steps_done(run_dir) >= 3, "first steps", STARTS)
    urgent = None
    if cluster.virtual:
        script = run_dir.with_name("urgent.sh")
        script.write_text("#!/bin/sh\nsleep 3\n")
        urgent = cluster.submit(script, options=("-p", "urgent", "--nodes=4", "--exclusive", "--output=/dev/null"))
    else:
        cluster.run("scancel", "--signal=USR1", "--batch", job)
    wait_for(lambda: cluster.job(job).get("Restarts") == "1", "preemption", 120)
    stopped = steps_done(run_dir)
    assert stopped < STEPS, "the run was over before it was preempted"
    newest = sorted(p.name for p in (run_dir / "checkpoints").iterdir())[-1]
    assert newest == f"step_{stopped:08d}", "no step is lost"
    if urgent:
        cluster.wait(urgent, "COMPLETED", seconds=120)

    # A rank of the second node dies.
    wait_for(lambda: steps_done(run_dir) >= stopped + EVERY + 1, "steps after the preemption", STARTS)
    nodes = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
    there = ["srun", f"--jobid={job}", "--overlap", "--nodes=1", "--ntasks=1", "-w", nodes[1]]
    killed = cluster.run(*there, "bash", "-c", KILL_A_RANK, "-", job)
    assert "killing" in killed
    wait_for(lambda: cluster.job(job).get("Restarts") == "2", "the end of the other ranks", 120)
    reached = steps_done(run_dir)
    log = cluster.log(job)
    assert "with signal 9" in log and "crash 1 of 3 at step_" in log, log
    kept = int(re.findall(r"crash 1 of 3 at step_(\d+)", log)[-1])
    assert reached - EVERY <= kept <= reached

    # The second node goes down with everything on it.
    if cluster.virtual:
        node_log = run_dir / "slurm" / f"{job}.2" / "node-0.log"
        wait_for(
            lambda: node_log.is_file() and f"step     {kept + 2:>2}/" in node_log.read_text(), "more steps", STARTS
        )
        lost = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()[1]
        spool = Path(cluster.environment["SLURM_CONF"]).parent
        slurmd = int((spool / f"slurmd.{lost}.pid").read_text())
        processes = processes_of(job, lost)
        for process in [slurmd, *step_daemons(processes), *processes]:
            os.kill(process, 9)
        wait_for(lambda: cluster.job(job).get("Restarts") == "3", "the node's loss", 200)

    cluster.wait(job, "COMPLETED", seconds=600)
    log = cluster.log(job)
    assert f"finished at step_{STEPS:08d}" in log, log

    straight, straight_dir = submit(cluster, tiny, "straight", *ARGUMENTS)
    cluster.wait(straight, "COMPLETED", seconds=600)
    assert cluster.job(straight)["Restarts"] == "0"
    assert metrics(run_dir) == metrics(straight_dir)
    expected, found = weights(straight_dir), weights(run_dir)
    assert found.keys() == expected.keys() and len(expected) > 20 and any("exp_avg_sq" in key for key in expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_chain_of_stages(cluster, tiny):
    """Three windows in two arms. EXACT's second stage fails: what depends on it is cancelled, the other arm goes on. The same line
    again submits just what is missing, and once more nothing. A stage that is requeued does not let the next one start."""
    folder, config = tiny
    chain = folder / "chain"
    line = [
        *(SCRIPTS / "stages.sh", "--folder", chain, "--last", "train"),
        *("--sbatch", "--nodes=1 --gpus-per-node=1 --time=20"),
        *("--stage", "w16 model.data.seq_length=16 model.exact.tau=4"),
        *("--stage", "w32 model.data.seq_length=32 model.exact.tau=null"),
        *("--stage", "w64 model.data.seq_length=64"),
        *("--", "--config", config, "trainer.max_steps=3", "model.exact.alpha=0.5"),
    ]

    def run(*more):
        return cluster.run(*line[:1], *more, *line[1:], RANKS_PER_NODE="1")

    names = [f"{arm}.w{window}" for arm in ("baseline", "exact") for window in (16, 32, 64)]
    planned = run("--dry-run")
    assert re.findall(r"^submit    (\S+)", planned, re.M) == names and not chain.exists()

    (chain / "exact" / "w32").mkdir(parents=True)
    (chain / "exact" / "w32" / "checkpoints").write_text("in the way")
    output = run()
    jobs = dict(re.findall(r"^submitted (\S+): job (\d+)", output, re.M))
    assert list(jobs) == names
    again = run()
    assert "submitted exact" not in again and "0 jobs submitted" in again

    cluster.wait(jobs["exact.w16"], "RUNNING", seconds=120)
    wait_for(lambda: (chain / "exact" / "w16" / "slurm" / "latest" / "node-0").exists(), "torchrun", STARTS)
    cluster.run("scancel", "--signal=USR1", "--batch", jobs["exact.w16"])  # before its ranks listen
    cluster.wait(jobs["exact.w16"], "COMPLETED", seconds=STARTS)
    assert cluster.job(jobs["exact.w16"])["Restarts"] == "1"

    with pytest.raises(AssertionError, match="FAILED"):
        cluster.wait(jobs["exact.w32"], "COMPLETED", seconds=STARTS)
    log = cluster.log(jobs["exact.w32"])
    assert "[Errno 20] Not a directory" in log and "not tried again: the ranks refused to go on" in log, log
    wait_for(lambda: cluster.job(jobs["exact.w64"])["JobState"] == "CANCELLED", "the failed stage's dependent", 120)
    cluster.wait(jobs["baseline.w64"], "COMPLETED", seconds=600)

    (chain / "exact" / "w32" / "checkpoints").unlink()
    output = run()
    assert re.findall(r"^(\w+) +(\S+?)(?=$|:)", output, re.M)[:6] == [
        *[("finished", name) for name in names[:4]],
        *[("submitted", name) for name in names[4:]],
    ]
    second = dict(re.findall(r"^submitted (\S+): job (\d+)", output, re.M))
    cluster.wait(second["exact.w64"], "COMPLETED", seconds=600)
    assert run().count("finished") == 6

    # Each stage has the weights of its own window, and starts from the last one's checkpoint.
    tables = {
        window: json.loads((chain / "exact" / f"w{window}" / "weights.json").read_text()) for window in (16, 32, 64)
    }
    assert len({table["census"] for table in tables.values()}) == 3
    tails = {
        w: [b["low"] for b in t["buckets"] if b["weight"] > t["buckets"][0]["weight"]][0] for w, t in tables.items()
    }
    assert tails == {16: 8, 32: 8, 64: 16}
    for window, before in ((32, 16), (64, 32)):
        said = (chain / "exact" / f"w{window}" / "slurm" / "latest" / "node-0.log").read_text()
        start = f"started from the weights of {chain}/exact/w{before}/checkpoints/step_00000003"
        assert start in re.sub(r"\n\[default0\]:(?=/)", "", said)


CRASHES = """#!/usr/bin/env bash
SCRIPTS={scripts}
source "$SCRIPTS/common.sh"
run_ranks {folder}/loop {folder}/crash.py
"""


def test_crash_loop_ends_with_its_reason(cluster, tiny):
    folder, _ = tiny
    (folder / "crash.py").write_text("raise RuntimeError('the model is on fire')\n")
    script = folder / "crash.sbatch"
    script.write_text(CRASHES.format(scripts=SCRIPTS, folder=folder))
    options = ("--nodes=2", "--ntasks-per-node=1", "--requeue", f"--output={folder}/loop.out", "--open-mode=append")
    job = cluster.submit(script, options=options, RANKS_PER_NODE="1", MAX_CRASHES="2")
    with pytest.raises(AssertionError, match="FAILED"):
        cluster.wait(job, "COMPLETED", seconds=STARTS)
    log = cluster.log(job)
    assert cluster.job(job)["Restarts"] == "1"
    assert log.count("RuntimeError: the model is on fire") == 2, log
    assert "crash 1 of 2 at the start; requeued" in log and "crash 2 at the start. Not tried again" in log


def test_full_disk_is_one_clear_error(cluster, tiny):
    """Before the ranks start, where the logs are, and where the checkpoints are; it is not tried again."""
    if not cluster.virtual:
        pytest.skip("mounts small disks: needs root on the nodes")
    folder, _ = tiny
    one_node = ("--nodes=1", "--gpus-per-node=1", "--time=20")

    def failed(name, *arguments, **settings):
        job, _ = submit(cluster, tiny, name, *arguments, options=one_node, RANKS_PER_NODE="1", **settings)
        with pytest.raises(AssertionError, match="FAILED"):
            cluster.wait(job, "COMPLETED", seconds=STARTS)
        assert cluster.job(job)["Restarts"] == "0"
        return cluster.log(job)

    mounted = []
    try:
        for disk in (folder / "logs", folder / "checkpoints" / "checkpoints"):
            disk.mkdir(parents=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=True)
            mounted.append(disk)
        log = failed("logs", MIN_FREE_GB="1")
        assert f"{folder}/logs/slurm has 0 GB free, MIN_FREE_GB=1. Nothing was started" in log
        log = failed("checkpoints", "model.hidden_size=128")
        assert re.search(
            "exact-megatron train: checkpoint .*/step_00000004.partial cannot be written: .* 0.0 GB are free there", log
        ), log
        assert "not tried again" in log, log
        log = failed("logs", "model.hidden_size=128")
        assert "No space left on device. The ranks ended with an error, at the start; free space" in log, log
        log = failed("logs")
        assert "No space left on device. Nothing was started; free space" in log, log
    finally:
        for disk in mounted:
            subprocess.run(["umount", "-l", disk], check=True)
