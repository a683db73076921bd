"""A Slurm to submit to: virtual nodes on this machine (cluster.sh), or with EXACT_SLURM=existing the one that is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


class Cluster:
    """Commands of one Slurm. `virtual`: ours, with nodes that may be killed."""

    def __init__(self, environment: dict[str, str], virtual: bool) -> None:
        self.environment, self.virtual = environment, virtual

    def run(self, *command: object, check: bool = True, **settings: str) -> str:
        done = subprocess.run(
            [str(c) for c in command], capture_output=True, text=True, timeout=120, env={**self.environment, **settings}
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: Path, *arguments: object, options: tuple[str, ...] = (), **settings: str) -> str:
        """sbatch from the test's folder; returns the job's id."""
        return self.run("sbatch", "--parsable", *options, script, *arguments, **settings).strip().split(";")[0]

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        shown = self.run("scontrol", "show", "job", "-o", job)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait(self, job: str, *states: str, seconds: float) -> dict[str, str]:
        """Wait until the job is in one of these states; a job that ended in another fails at once."""
        end = time.monotonic() + seconds
        while True:
            now = self.job(job)
            if now["JobState"] in states:
                return now
            over = now["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY")
            assert not over and time.monotonic() < end, f"{now['JobState']}: {now}\n{self.log(job)}"
            time.sleep(0.5)

    def log(self, job: str) -> str:
        path = Path(self.job(job)["StdOut"])
        return path.read_text() if path.is_file() else f"(no {path})"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "MIN_FREE_GB": "0"}
    environment["PYTHONPATH"] = f"{REPOSITORY}:{environment.get('PYTHONPATH', '')}".rstrip(":")
    if os.environ.get("EXACT_SLURM") == "existing":
        yield Cluster(environment, virtual=False)
        return
    if os.geteuid() != 0:
        pytest.skip(
            "virtual nodes need root; on a cluster's login node set EXACT_SLURM=existing and --basetemp on a shared disk"
        )
    script, folder = Path(__file__).with_name("cluster.sh"), tmp_path_factory.mktemp("cluster")
    try:
        done = subprocess.run([script, "up", folder], stdout=subprocess.PIPE, text=True, timeout=400)
        assert done.returncode == 0, "no cluster: see above"
        environment["SLURM_CONF"] = done.stdout.split("SLURM_CONF=")[1].strip()
        yield Cluster(environment, virtual=True)
    finally:
        subprocess.run([script, "down", folder], timeout=120)
