"""The scripts of slurm/ without a Slurm: its commands are stand-ins that write down how they were called. tests/slurm/ has the real one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "slurm"
FILES = sorted(p for p in SCRIPTS.iterdir() if p.suffix in (".sh", ".sbatch"))
JOBS = [p.name for p in FILES if p.suffix == ".sbatch"]

SBATCH = """
id=$(( $(cat ids 2>/dev/null || echo 100) + 1 )); echo $id >ids
for a; do case $a in --job-name=*) name=${a#*=} ;; esac; done
echo "$id $name" >>queue
echo "$*" >>sbatch.calls
echo $id
"""
SQUEUE = """
for a; do case $a in --name=*) name=${a#*=} ;; esac; done
[ ! -e queue ] || awk -v name="$name" '$2 == name { print $1 }' queue
"""
SRUN = """
printf '%s\\n' "$@" >>srun.calls
env | sort >srun.environment
for a; do case $a in --output=*) log=${a#*=} ;; esac; done
log=${log//%n/0}
[ ! -e says ] || cat says >"$log"
exit $(cat code 2>/dev/null || echo 0)
"""
SCONTROL = """
echo "$*" >>scontrol.calls
case "$1 $2" in
"show hostnames") printf 'node1\\nnode2\\n' ;;
"show node") echo "NodeName=node1 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=node1" ;;
esac
"""


def _hear_interrupts():
    """A shell ignores for good what is ignored where it starts, as SIGINT is in the background of another shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def slurm(tmp_path):
    """run(script, *arguments, **settings) in a folder with stand-ins for Slurm's commands and an environment that is all but empty.

    `sleep` waits a hundredth of what it is asked for.
    """
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {
        "sbatch": SBATCH,
        "squeue": SQUEUE,
        "srun": SRUN,
        "scontrol": SCONTROL,
        "scancel": "",
        "sleep": 'exec /bin/sleep "$(awk -v s="$1" "BEGIN { print s / 100 }")"',
        "getent": "exit ${GETENT:-0}",
    }.items():
        (commands / name).write_text("#!/usr/bin/env bash\n" + text)
        (commands / name).chmod(0o755)

    def run(script, *arguments, **settings):
        environment = {
            "PATH": f"{commands}:/usr/bin:/bin",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SCRIPTS": str(SCRIPTS),
            "MIN_FREE_GB": "0",
            **settings,
        }
        command = ["bash", "-c", script, "-"] if "\n" in script else ["bash", str(SCRIPTS / script)]
        return subprocess.run(
            [*command, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            preexec_fn=_hear_interrupts,
        )

    run.folder = tmp_path
    return run


@pytest.mark.parametrize("path", [*FILES, *(Path(__file__).parents[1] / "slurm").glob("*.sh")], ids=lambda p: p.name)
def test_syntax(path):
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", path], check=True, cwd=SCRIPTS.parent)


ARGUMENTS = {
    "train.sbatch": ["--config", "c.yaml", "exp_manager.exp_dir=run", "model.exact.enabled=true"],
    "pretrain_gpt.sbatch": ["--save", "run", "model.exact.enabled=true", "--num-layers", "2"],
    "bridge.sbatch": ["recipe.py", "checkpoint.save=run", "model.exact.enabled=true"],
    "nemo.sbatch": ["train.py", "--config-name=c", "exp_manager.explicit_log_dir=run", "model.exact.enabled=true"],
    "benchmark.sbatch": ["run", "--config", "c.yaml", "model.exact.alpha=0.2"],
    "task.sbatch": ["run", "evaluate", "hf", "--suite", "distance-probe"],
    "gpu_benchmark.sbatch": ["run"],
    "paired_training.sbatch": ["--folder", "run", "--base", "b", "--config", "c.yaml", "--data", "d"],
}
RANKS = {
    "train.sbatch": "-m exact_megatron train --config c.yaml exp_manager.exp_dir=run model.exact.enabled=true trainer.num_nodes=2 "
    "trainer.devices=8",
    "pretrain_gpt.sbatch": "-m exact_megatron.launch {megatron}/pretrain_gpt.py --save run model.exact.enabled=true --num-layers 2 "
    "--load run --exit-signal-handler",
    "bridge.sbatch": "-m exact_megatron.integrations.bridge_launch recipe.py checkpoint.save=run model.exact.enabled=true "
    "checkpoint.load=run train.exit_signal_handler=true",
    "nemo.sbatch": "train.py --config-name=c exp_manager.explicit_log_dir=run model.exact.enabled=true "
    "++exp_manager.resume_if_exists=true",
    "benchmark.sbatch": "trainer.max_steps=60 model.optim.sched.warmup_steps=0 trainer.limit_val_batches=0 model.exact.enabled=true",
    "task.sbatch": "-m exact_megatron evaluate hf --suite distance-probe",
    "gpu_benchmark.sbatch": "-m exact_megatron.benchmark.gpu_report run",
    "paired_training.sbatch": "-m exact_megatron.benchmark.paired_training --devices 8 --folder run --base b --config c.yaml --data d",
}


@pytest.mark.parametrize("script", JOBS)
def test_every_script_reaches_its_ranks(slurm, script):
    """With nothing in the environment but what Slurm sets: no unset variable, and the arguments arrive whole."""
    megatron = slurm.folder / "megatron"
    megatron.mkdir()
    (megatron / "pretrain_gpt.py").touch()
    done = slurm(script, *ARGUMENTS[script], SLURM_GPUS_ON_NODE="8", MEGATRON_LM=str(megatron))
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    called = " ".join((slurm.folder / "srun.calls").read_text().split("\n"))
    assert RANKS[script].format(megatron=megatron) in called
    environment = dict(
        line.split("=", 1) for line in (slurm.folder / "srun.environment").read_text().splitlines() if "=" in line
    )
    if script not in ("task.sbatch", "gpu_benchmark.sbatch", "paired_training.sbatch"):
        assert environment["MASTER_ADDR"] == "node1" and environment["MASTER_PORT"] == "14711"
        assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "1" and environment["RANKS_PER_NODE"] == "8"
    if script in ("train.sbatch", "pretrain_gpt.sbatch", "bridge.sbatch", "nemo.sbatch", "task.sbatch"):
        assert (slurm.folder / "run" / "slurm" / "finished").is_file()
    header = [line for line in (SCRIPTS / script).read_text().splitlines() if line.startswith("#SBATCH")]
    signalled = script in ("train.sbatch", "pretrain_gpt.sbatch", "bridge.sbatch", "nemo.sbatch")
    assert ("#SBATCH --signal=B:USR1@600" in header) == signalled
    gpus = 1 if script == "gpu_benchmark.sbatch" else 8
    assert "#SBATCH --exclusive" in header and f"#SBATCH --gpus-per-node={gpus}" in header


CONFIGS = SCRIPTS.parent / "configs"


def test_benchmark_and_the_first_try_suit_the_recipes(slurm):
    """Few steps, and configs/cpt.yaml warms up for more."""
    from exact_megatron.training.config import load_config

    files = [str(CONFIGS / name) for name in ("cpt.yaml", "models/llama-3.2-1b.yaml", "stages/4k.yaml")]
    done = slurm("benchmark.sbatch", "run", *(word for file in files for word in ("--config", file)), STEPS="20")
    assert done.returncode == 0, done.stderr
    first = (slurm.folder / "srun.calls").read_text().split("\ntrain\n")[0].splitlines()
    assert (
        first[first.index("exact_megatron.benchmark.arms") + 1] == "run/arms.json"
    )  # before the first turn, on the same data
    load_config(
        files,
        first[
            first.index("exact_megatron.benchmark.arms") + 2 + 2 * len(files) : first.index(
                "trainer.limit_val_batches=0"
            )
            + 1
        ],
    )
    turn = (slurm.folder / "srun.calls").read_text().split("\ntrain\n")[1].splitlines()
    overrides = turn[2 * len(files) : turn.index("model.exact.enabled=false") + 1]
    run = load_config(files, overrides)
    assert run.trainer.max_steps == 20 and not run.model.exact.enabled

    guide = (SCRIPTS.parent / "docs" / "slurm.md").read_text().replace("\\\n", " ")
    words = next(line for line in guide.splitlines() if "runs/smoke" in line).split("train.sbatch ")[1].split()
    given = [SCRIPTS.parent / after for word, after in zip(words, words[1:]) if word == "--config"]
    assert load_config([str(f) for f in given], words[2 * len(given) :]).trainer.max_steps == 20


def test_benchmark_prints_the_ratio_of_the_medians(slurm):
    """The stand-in for srun runs the script's own Python, on runs that were measured before."""
    folder = slurm.folder / "measured"
    for i, (arm, speed) in enumerate((("baseline", 100), ("exact", 99), ("exact", 97), ("baseline", 100))):
        run = folder / f"{i}-{arm}"
        run.mkdir(parents=True)
        loss = {"step": 1, "lm_loss": 2.0, "exact_loss": 2.5 if arm == "exact" else 2.0}
        lines = [json.dumps({**loss, "tokens_per_s": s}) for s in (1, 1, speed - 1, speed, speed + 1)]
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        if arm == "exact":
            (run / "weights.json").write_text('{"digest": "7ab1e"}')
    (folder / "arms.json").write_text('{"tokens": "70ce75", "weight table": "7ab1e"}')
    text = (SCRIPTS / "benchmark.sbatch").read_text().split('run_once "$folder" -c \'')[1].split('\' "$folder"')[0]
    arguments = [folder, "2", "baseline", "exact", "exact", "baseline"]
    done = subprocess.run([sys.executable, "-c", text, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "baseline median tokens/s of each turn: 100 100",
        "exact median tokens/s of each turn: 99 97",
        "exact / baseline: 0.9800",
        "first batch: tokens 70ce75, weight table 7ab1e",
    ]
    (folder / "2-exact" / "weights.json").unlink()  # that turn was a second baseline
    done = subprocess.run([sys.executable, "-c", text, *arguments], capture_output=True, text=True)
    assert done.returncode and "2-exact should be weighted by the table 7ab1e; it has None" in done.stderr


def test_paired_training_is_requeued_after_a_signal_and_not_after_a_failure(slurm):
    for code, status in ((138, 0), (3, 0), (2, 2), (143, 143)):  # USR1, stopped from outside, an error, scancel
        (slurm.folder / "code").write_text(str(code))
        (slurm.folder / "scontrol.calls").unlink(missing_ok=True)
        done = slurm("paired_training.sbatch", *ARGUMENTS["paired_training.sbatch"])
        assert done.returncode == status, done.stderr
        assert ("stopped by a signal; requeued" in done.stdout) == (status == 0)
        assert (slurm.folder / "scontrol.calls").exists() == (status == 0)
    done = slurm("paired_training.sbatch", "--base", "b")
    assert done.returncode == 2 and "give --folder FOLDER" in done.stderr


PYTHON = """#!/usr/bin/env bash
echo "$*" >>calls
for word in $*; do case $word in proof.json | */proof.json | */tests.jsonl | */cells.jsonl | */ceiling.json) last=${word##*/} ;; esac; done
if [ "$INTERRUPT" = "${last:-}" ]; then read -r _ _ _ script _ </proc/$PPID/stat && kill -INT "$script"; fi
case ${last:-} in "${FAILS%:*}") exit "${FAILS#*:}" ;; esac
"""


@pytest.mark.parametrize(
    ("settings", "run", "code"),
    [
        ({}, "proof tests 7xcells ceiling profile profile_fused report", 0),
        ({"FAILS": "proof.json:2"}, "proof report", 2),
        ({"FAILS": "proof.json:1"}, "proof tests 7xcells ceiling profile profile_fused report", 0),
        ({"FAILS": "tests.jsonl:1"}, "proof tests report", 1),
        ({"FAILS": "cells.jsonl:1"}, "proof tests 7xcells ceiling profile profile_fused report", 1),
        ({"FAILS": "cells.jsonl:2"}, "proof tests 7xcells ceiling profile profile_fused report", 2),
        ({"FAILS": "cells.jsonl:130"}, "proof tests 1xcells report", 130),
        ({"INTERRUPT": "cells.jsonl"}, "proof tests 1xcells report", 0),  # to the script alone
        ({"INTERRUPT": "ceiling.json"}, "proof tests 7xcells ceiling report", 0),
    ],
)
def test_order_of_the_gpu_benchmark(slurm, settings, run, code):
    """Without Slurm, with a stand-in for Python: what fails or is interrupted leaves out what follows, but for the report."""
    (slurm.folder / "bin" / "python").write_text(PYTHON)
    (slurm.folder / "bin" / "python").chmod(0o755)
    nothing = {"SLURM_JOB_ID": "", "FAILS": "none:0", "INTERRUPT": "never"}
    done = slurm("gpu_benchmark.sbatch", "run", **{**nothing, **settings})
    assert done.returncode == code and not done.stderr, done.stderr
    calls = (slurm.folder / "calls").read_text()
    assert not (slurm.folder / "srun.calls").exists()
    found = [
        word for word in ("proof.json", "tests.jsonl", "cells.jsonl", "ceiling.json", "profile.jsonl") if word in calls
    ]
    cells = f"{calls.count('cells.jsonl')}xcells"
    names = {
        "proof.json": "proof",
        "tests.jsonl": "tests",
        "cells.jsonl": cells,
        "ceiling.json": "ceiling",
        "profile.jsonl": "profile",
    }
    said = [names[word] for word in found]
    said += ["profile_fused"] * ("profile_fused" in calls) + ["report"] * ("gpu_report" in calls)
    assert " ".join(said) == run
    assert calls.splitlines()[0].startswith("-c import sys, torch")


def test_tasks_of_the_gpu_benchmark(slurm):
    (slurm.folder / "bin" / "python").write_text(PYTHON)
    (slurm.folder / "bin" / "python").chmod(0o755)
    alone = {"SLURM_JOB_ID": "", "FAILS": "none:0", "INTERRUPT": "never"}
    done = slurm("gpu_benchmark.sbatch", "run", "speed", **alone)
    assert done.returncode == 2 and "unknown task speed: proof, tests" in done.stderr
    done = slurm("gpu_benchmark.sbatch", "run", CHECKOUT="/nowhere", **alone)
    assert done.returncode == 2 and "/nowhere/tests/gpu is not there: set CHECKOUT" in done.stderr
    done = slurm("gpu_benchmark.sbatch", "run", CONTAINER_IMAGE="x.sqsh", **alone)
    assert done.returncode == 2 and "CONTAINER_IMAGE is for Slurm with pyxis" in done.stderr
    assert not (slurm.folder / "calls").exists()
    done = slurm("gpu_benchmark.sbatch", "a folder", "plan", **alone)
    assert done.returncode == 0 and (slurm.folder / "calls").read_text().count("--plan") == 7
    shown = (slurm.folder / "a folder" / "commands.txt").read_text().splitlines()
    assert len(shown) == 8 and "--json a\\ folder/plan_7.json" in shown[6]


def test_container(slurm):
    done = slurm(
        "train.sbatch",
        "exp_manager.exp_dir=run",
        CONTAINER_IMAGE="nvcr.io#nvidia/nemo:25.07",
        CONTAINER_MOUNTS="/data:/data",
    )
    assert done.returncode == 0, done.stderr
    calls = (slurm.folder / "srun.calls").read_text().splitlines()
    assert "--container-image=nvcr.io#nvidia/nemo:25.07" in calls
    mounts = ",".join(f"{path}:{path}" for path in (slurm.folder, slurm.folder / "run", SCRIPTS, "/data"))
    assert f"--container-mounts={mounts}" in calls


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train.sbatch", ["model.exact.enabled=true"], "give exp_manager.exp_dir=FOLDER"),
        ("train.sbatch", ["exp_manager.exp_dir=/proc/run"], "cannot make the folder /proc/run/slurm"),
        (
            "pretrain_gpt.sbatch",
            ["--save", "run", "--load", "base"],
            "--load: a requeued job would start anew from there",
        ),
        ("bridge.sbatch", ["checkpoint.save=run", "checkpoint.load=base"], "checkpoint.load: a requeued job"),
        ("nemo.sbatch", [], "give exp_manager.explicit_log_dir=FOLDER"),
    ],
)
def test_refused_before_anything_starts(slurm, script, arguments, message):
    done = slurm(script, *arguments)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not (slurm.folder / "srun.calls").exists() and "requeue" not in done.stdout


def test_too_little_space(slurm):
    done = slurm("train.sbatch", "exp_manager.exp_dir=run", MIN_FREE_GB="99999999")
    assert done.returncode == 2 and "GB free, MIN_FREE_GB=99999999. Nothing was started" in done.stderr


FAILED = """\
[default0]:step 1
Root Cause (first observed failure):
[0]:
  time      : 2026-01-02_03:04:05
  host      : node1
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 123)
  error_file: <N/A>
"""


def failed(slurm, code, said, try_=0):
    """Ranks that end like this, once."""
    attempt = slurm.folder / "run" / "slurm" / f"4711.{try_}"
    logs = attempt / "node-0" / "x" / "attempt_0" / "1"
    logs.mkdir(parents=True)
    (logs / "stderr.log").write_text(said + "\n")
    (slurm.folder / "says").write_text(FAILED.format(code=code))
    (slurm.folder / "code").write_text("1")
    return slurm("train.sbatch", "exp_manager.exp_dir=run", SLURM_RESTART_COUNT=str(try_))


def requeues(slurm):
    return (slurm.folder / "scontrol.calls").read_text().count("requeue 4711")


def test_crashes_are_counted_since_the_newest_checkpoint(slurm):
    done = failed(slurm, -9, "")
    assert (
        done.returncode == 0 and "rank 1 of node-0 failed first, at 2026-01-02_03:04:05, with signal 9" in done.stdout
    )
    assert "crash 1 of 3 at the start; requeued" in done.stdout and requeues(slurm) == 1
    assert "crash 2 of 3" in failed(slurm, 1, "ValueError: x", 1).stdout
    (slurm.folder / "run" / "checkpoints" / "step_00000005").mkdir(parents=True)
    (slurm.folder / "run" / "checkpoints" / "step_00000006.partial").mkdir()
    assert "crash 1 of 3 at step_00000005" in failed(slurm, 1, "ValueError: x", 2).stdout
    assert "crash 2 of 3 at step_00000005" in failed(slurm, 1, "ValueError: x", 3).stdout
    done = failed(slurm, 1, "Traceback\nRuntimeError: on fire", 4)
    assert done.returncode == 1 and requeues(slurm) == 4
    assert "RuntimeError: on fire" in done.stdout
    assert "crash 3 at step_00000005. Not tried again: 3 without a newer checkpoint (MAX_CRASHES=3)" in done.stdout


@pytest.mark.parametrize(
    ("said", "again"),
    [
        ("exact-megatron train: model.exact.tau=9: above the window", False),
        ("exact-megatron train: [Errno 28] No space left on device: 'x'", False),
        ("exact-megatron train: [Errno 13] Permission denied: 'x'", False),
        ("exact-megatron train: [Errno 32] Broken pipe", True),
        ("exact-megatron train: [Errno 5] Input/output error: 'x'", True),
    ],
)
def test_refusals_are_not_tried_again(slurm, said, again):
    done = failed(slurm, 2, said)
    assert said in done.stdout and requeues(slurm) == again
    assert done.returncode == (0 if again else 2)
    assert ("not tried again: the ranks refused to go on" in done.stdout) != again


def test_srun_that_fails_without_ranks_is_a_crash(slurm):
    (slurm.folder / "code").write_text("1")
    done = slurm("train.sbatch", "exp_manager.exp_dir=run")
    assert "srun ended with 1 and no torchrun says why" in done.stdout and requeues(slurm) == 1


SHELL = 'source "$SCRIPTS/common.sh"\n'


def test_where_the_ranks_meet(slurm):
    assert slurm(SHELL + "first_address").stdout == "node1\n"
    assert slurm(SHELL + "first_address", GETENT="2").stdout == "10.1.2.3\n", "node names do not resolve"
    assert slurm(SHELL + "free_port", SLURM_JOB_ID="20001").stdout == "10001\n"
    for port in range(12000, 29000):  # one that is free here, then taken
        with socket.socket() as taken:
            try:
                taken.bind(("127.0.0.1", port))
            except OSError:
                continue
            taken.listen()
            assert int(slurm(SHELL + "free_port", SLURM_JOB_ID=str(port - 10000)).stdout) > port
            return


FAKE_TORCHRUN = """#!/usr/bin/env bash
case $1 in
-c) echo "$PWD/run.py"; exit ;;  # where torch's source is
esac
printf '%s\\n' "$@" >torchrun.calls
bash -c 'trap "echo saved >rank.saved; exit 0" TERM; touch rank.up; while :; do sleep 0.1; done' &
trap 'touch torchrun.terminated; exit 1' TERM
wait $!
wait $!
exit $?
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_node_passes_a_stop_to_the_ranks_and_not_to_torchrun(slurm, number):
    folder = slurm.folder
    (folder / "run.py").touch()
    python = folder / "python"
    python.write_text(FAKE_TORCHRUN)
    python.chmod(0o755)
    attempt = folder / "attempt"
    attempt.mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHON": str(python),
        "RANKS_PER_NODE": "8",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_NODEID": "1",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "14711",
    }
    node = subprocess.Popen(["bash", SCRIPTS / "node.sh", attempt, "-m", "x", "a b"], cwd=folder, env=environment)
    end = time.monotonic() + 30
    while not (folder / "rank.up").exists():
        assert node.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    node.send_signal(number)
    node.send_signal(number)
    assert node.wait(30) == 0
    assert (folder / "rank.saved").exists() and not (folder / "torchrun.terminated").exists()
    assert (attempt / "stopped").exists() == (number == signal.SIGUSR1)
    called = (folder / "torchrun.calls").read_text().splitlines()
    assert called[-3:] == ["-m", "x", "a b"]
    assert "--node-rank 1 --nproc-per-node 8 --max-restarts 0 --master-addr node1 --master-port 14711" in " ".join(
        called
    )
    assert called[called.index("--tee") + 1] == "7:3", "the last rank's output, on the last node"


STAGES = [
    *("--folder", "runs/x", "--base", "base", "--sbatch", "--nodes=2 --account=a"),
    *("--stage", "4k --config 4k.yaml", "--stage", "16k --config 16k.yaml model.exact.tau=512"),
    *("--", "--config", "common.yaml", "trainer.max_steps=7"),
]
CHAIN = ["4k", "16k", "convert", "evaluate"]


def test_what_does_without_a_tokenizer_needs_no_base(slurm):
    chain = ["--dry-run", "--folder", "x", "--stage", "4k"]
    for more in (
        *(["--last", "convert"], ["--evaluate", "--suite context-loss --data d"], ["--", "restore_from_path=base"]),
        *(
            ["--evaluate", f"--suite distance-probe {way}"]
            for way in ("--tokenizer=t", "--tokenizer t", "--tensor-parallel 2")
        ),
    ):
        done = slurm("stages.sh", *chain, *more)
        assert done.returncode == 0, done.stderr


def stages(slurm, *more, arguments=STAGES, **settings):
    (slurm.folder / "base").mkdir(exist_ok=True)
    return slurm("stages.sh", *more, *arguments, **settings)


def test_dry_run_prints_the_plan_and_does_nothing(slurm):
    done = stages(slurm, "--dry-run")
    assert done.returncode == 0 and not done.stderr, done.stderr
    names = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("submit ")]
    assert names == [f"{arm}.{step}" for arm in ("baseline", "exact") for step in CHAIN] + ["compare"]
    assert sorted(p.name for p in slurm.folder.iterdir()) == ["base", "bin"]
    without_slurm = subprocess.run(
        ["bash", SCRIPTS / "stages.sh", "--dry-run", *STAGES],
        cwd=slurm.folder,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
    )
    assert without_slurm.returncode == 0, without_slurm.stderr


def test_stages_are_submitted_once(slurm):
    done = stages(slurm)
    assert done.returncode == 0 and "9 jobs submitted" in done.stdout, done.stderr
    run = slurm.folder / "runs" / "x"
    calls = (slurm.folder / "sbatch.calls").read_text().splitlines()
    first, second = calls[0], calls[5]
    assert (
        "--dependency" not in first
        and f"restore_from_path={slurm.folder}/base" in first
        and "--nodes=2 --account=a" in first
    )
    assert first.split("train.sbatch ")[1].startswith("--config common.yaml --config 4k.yaml trainer.max_steps=7 ")
    assert "--dependency=afterok:105 --kill-on-invalid-dep=yes" in second and "model.exact.enabled=true" in second
    assert f"exp_manager.exp_dir={run}/exact/16k restore_from_path={run}/exact/4k" in second
    assert "--dependency=afterok:104:108" in calls[8]

    assert "0 jobs submitted" in stages(slurm).stdout
    # The first stage of EXACT finishes; the second fails, and Slurm cancels what depends on it. The baseline is through.
    (slurm.folder / "queue").write_text("")
    for job in [*(f"baseline/{step}" for step in CHAIN), "exact/4k"]:
        (run / job / "slurm" / "finished").touch()
    done = stages(slurm)
    assert [line.split(":")[0].split()[1] for line in done.stdout.splitlines() if line.startswith("submitted")] == [
        "exact.16k",
        "exact.convert",
        "exact.evaluate",
        "compare",
    ]
    calls = (slurm.folder / "sbatch.calls").read_text().splitlines()[9:]
    assert "--dependency" not in calls[0] and "afterok:110" in calls[1] and "--dependency=afterok:112 " in calls[3]


def test_a_converted_model_that_is_whole_is_taken(slurm):
    """The job ends between the rename of its output and `finished`: the next try accepts it. What others made is refused."""
    arguments = ["state", "convert", "megatron-to-hf", "run", "hf"]
    (slurm.folder / "code").write_text("1")
    assert slurm("task.sbatch", *arguments).returncode == 1
    (slurm.folder / "hf").mkdir()
    (slurm.folder / "hf" / "config.json").touch()
    done = slurm("task.sbatch", *arguments)
    assert done.returncode == 0 and "hf is whole" in done.stdout, done.stderr
    state = slurm.folder / "state" / "slurm"
    assert (state / "finished").read_text() == "convert megatron-to-hf run hf\n" and not (state / "running").exists()
    assert slurm("task.sbatch", *arguments, SLURM_RESTART_COUNT="1").returncode == 0, "requeued after `finished`"
    done = slurm("task.sbatch", *arguments)
    assert done.returncode == 2 and "remove hf and state" in done.stderr


def finish(slurm, *jobs):
    (slurm.folder / "queue").write_text("")
    for job in jobs:
        (slurm.folder / "runs" / "x" / job / "slurm" / "finished").touch()


ALL = [*(f"{arm}/{step}" for arm in ("baseline", "exact") for step in CHAIN), "compare"]


def test_what_was_made_from_a_stage_that_runs_again_is_not_finished(slurm):
    stages(slurm)
    finish(slurm, *ALL)
    run = slurm.folder / "runs" / "x"
    assert "0 jobs submitted" in stages(slurm).stdout
    shutil.rmtree(run / "exact" / "16k")
    done = stages(slurm)
    assert done.returncode == 2 and "what it starts from is run again, or was: remove" in done.stderr
    queue = (slurm.folder / "queue").read_text()
    removed = [line.split() for line in done.stderr.splitlines() if line.startswith("  ")]
    assert removed == [
        [f"{run}/exact/convert", f"{run}/exact/hf"],
        [f"{run}/exact/evaluate", f"{run}/exact/evaluation"],
        [f"{run}/compare", f"{run}/comparison"],
    ]
    assert len((slurm.folder / "sbatch.calls").read_text().splitlines()) == 10, "the stage itself"
    finish(slurm, "exact/16k")
    done = stages(slurm)
    assert done.returncode == 2 and done.stdout.count("finished ") == 6, "not forgotten when the stage is through"
    (run / "exact" / "16k" / "slurm" / "finished").unlink()
    (slurm.folder / "queue").write_text(queue)
    for path in removed:
        shutil.rmtree(path[0])
    (run / "exact" / "hf").mkdir()
    assert stages(slurm).returncode == 2, "the old model is still there"
    (run / "exact" / "hf").rmdir()
    done = stages(slurm)
    assert done.returncode == 0 and "3 jobs submitted" in done.stdout, done.stderr


def test_a_model_that_the_chain_did_not_make_is_refused(slurm):
    stages(slurm)
    finish(slurm, *ALL)
    convert, hf = (slurm.folder / "runs" / "x" / "exact" / name for name in ("convert", "hf"))
    shutil.rmtree(convert)
    hf.mkdir()
    (hf / "config.json").touch()
    done = stages(slurm)
    assert done.returncode == 2 and f"remove {convert} {hf}" in done.stderr


def test_options_of_sbatch_may_change(slurm):
    stages(slurm)
    finish(slurm, *ALL)
    done = stages(slurm, "--task-sbatch", "--time=1", arguments=[a.replace("--nodes=2", "--nodes=4") for a in STAGES])
    assert done.returncode == 0 and "0 jobs submitted" in done.stdout, done.stderr


def test_containers_of_a_chain_see_all_of_it(slurm):
    (slurm.folder / "bin" / "sbatch").write_text('#!/bin/bash\necho "$CONTAINER_MOUNTS" >>mounts; echo 1\n')
    assert stages(slurm, CONTAINER_MOUNTS="/data:/data").returncode == 0
    folder, base = slurm.folder / "runs" / "x", slurm.folder / "base"
    assert set((slurm.folder / "mounts").read_text().split()) == {f"{folder}:{folder},{base}:{base},/data:/data"}


@pytest.mark.parametrize("evaluate", ["--tensor-parallel 8", "--tensor-parallel=8", "--trained-length 16384"])
def test_the_commands_of_a_chain_are_understood(slurm, monkeypatch, evaluate):
    """What stages.sh submits goes through the real command line: a renamed option is seen here, and not after days of training."""
    from exact_megatron import cli, convert
    from exact_megatron.commands import train
    from exact_megatron.evaluation import command

    seen = []
    for module, name in ((convert, "run"), (command, "run"), (command, "run_compare"), (train, "run")):
        monkeypatch.setattr(module, name, lambda args, name=name: seen.append(args) or 0)
    done = stages(slurm, "--evaluate", f"--suite distance-probe {evaluate}")
    assert done.returncode == 0, done.stderr
    for line in (slurm.folder / "sbatch.calls").read_text().splitlines():
        script, *words = line.split(f"{SCRIPTS}/")[1].split()
        assert cli.main(["train", *words] if script == "train.sbatch" else words[1:]) == 0
    assert [args.command for args in seen] == [*["train", "train", "convert", "evaluate"] * 2, "evaluate compare"]
    run = slurm.folder / "runs" / "x"
    for arm, (_, last, converted, evaluated) in zip(("baseline", "exact"), (seen[:4], seen[4:8])):
        assert last.overrides[-2:] == [f"exp_manager.exp_dir={run}/{arm}/16k", f"restore_from_path={run}/{arm}/4k"]
        assert (converted.source, converted.output) == (f"{run}/{arm}/16k", f"{run}/{arm}/hf")
        on_ranks = evaluated.tensor_parallel > 1
        assert on_ranks == ("tensor" in evaluate)
        assert evaluated.model == (converted.source if on_ranks else converted.output)
    assert [seen[8].a, seen[8].b] == [seen[3].output, seen[7].output] and seen[8].names == ["baseline", "exact"]


def test_changed_arguments_of_a_submitted_stage_are_refused(slurm):
    stages(slurm)
    done = stages(slurm, arguments=[*STAGES, "model.optim.lr=1"])
    assert done.returncode == 2 and "baseline.4k was submitted with other arguments" in done.stderr
    assert len((slurm.folder / "sbatch.calls").read_text().splitlines()) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "4k"], "--folder is missing"),
        (["--folder", "x"], "no --stage"),
        (["--folder", "x", "--stage", "4k", "model.exact.tau=3"], "unknown argument model.exact.tau=3"),
        (["--folder", "x", "--stage", "4k", "--base", "nowhere"], "nowhere: there is no such checkpoint"),
        (["--folder", "x", "--stage", "4k", "--last", "test"], "--last test: train, convert or evaluate"),
        (["--folder", "x", "--stage", "4k"], "add --tokenizer PATH to --evaluate"),
        (["--folder", "x", "--stage", "4k a='b c'"], "quotes are not understood"),
        (["--folder", "x", "--stage", "4k", "--arm", 'a x="b"'], "quotes are not understood"),
        (["--folder", "x", "--stage", "4k", "--stage", "4k a=1"], "--stage 4k: the name is taken"),
        (["--folder", "x", "--stage", "convert"], "--stage convert: the name is taken"),
        (["--folder", "x", "--stage", "hf"], "--stage hf: the name is taken"),
        (["--folder", "x", "--stage", ""], "--stage '': a value is empty"),
        (["--folder", "x", "--stage", "  "], "--stage '': a value is empty"),
        (["--folder", "x", "--stage", "--config a.yaml"], "--stage --config: it begins with a name"),
        (["--folder", "x", "--stage", "../4k"], "--stage ../4k: it begins with a name"),
        (["--folder", "x", "--stage", "model.exact.tau=8"], "--stage model.exact.tau=8: it begins with a name"),
        (["--folder", "x", "--stage", "4k", "--arm", "a", "--arm", "a b=1"], "--arm a: the name is taken"),
        (["--folder", "x", "--stage", "4k", "--arm", "compare"], "--arm compare: the name is taken"),
        (["--folder", "x", "--stage", "c", "--stage", "b.c", "--arm", "a", "--arm", "a.b"], "has the name a.b.c"),
        (["--folder", "x", "--stage", "4k model.exact.tau="], "--stage 'model.exact.tau=': a value is empty"),
        (["--folder", "x", "--stage", "4k", "--base", ""], "--base '': a value is empty"),
        (["--folder", "", "--stage", "4k"], "--folder '': a value is empty"),
        (["--folder", "x", "--stage", "4k", "--", "restore_from_path="], "'restore_from_path=': a value is empty"),
    ],
)
def test_stages_refuse_what_they_do_not_understand(slurm, arguments, message):
    done = stages(slurm, arguments=arguments)
    assert done.returncode == 2 and message in done.stderr
    assert not (slurm.folder / "sbatch.calls").exists()


def test_the_gpu_tests_that_others_rest_on_come_first(slurm, capsys):
    """pytest's own order of what the script asks for."""
    (slurm.folder / "bin" / "python").write_text(PYTHON)
    (slurm.folder / "bin" / "python").chmod(0o755)
    slurm("gpu_benchmark.sbatch", "run", "tests", SLURM_JOB_ID="", FAILS="none:0", INTERRUPT="never")
    asked = next(line for line in (slurm.folder / "calls").read_text().splitlines() if "-m pytest" in line).split()
    files = [word for word in asked if "/tests/gpu" in word]
    pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "", *files])
    found = dict.fromkeys(re.findall(r"^tests/gpu/test_(\w+)\.py", capsys.readouterr().out, re.MULTILINE))
    names = {path.stem.removeprefix("test_") for path in (SCRIPTS.parent / "tests" / "gpu").glob("test_*.py")}
    assert list(found)[:3] == ["gpu_attention", "model", "training"] and set(found) == names
