"""Tiny runs of Megatron-Bridge's pretrain(), for test_bridge.py."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from tests.helpers.ranks import end
from tests.hosts.megatron_lm import Log, free_port

HERE = Path(__file__).parent
SCRIPTS = HERE / "bridge_scripts"
EXAMPLE = HERE.parent.parent / "examples" / "bridge"
TAGS = {"0.3.1": "v0.3.1", "0.6": "v0.6.0"}  # of the scripts that go with an installed version; 0.6.2 has no tag


def version() -> str | None:
    try:
        return importlib.metadata.version("megatron-bridge")
    except importlib.metadata.PackageNotFoundError:
        return None


def copy_scripts(folder: Path) -> Path | None:
    """scripts/training of a clone of Megatron-Bridge (MEGATRON_BRIDGE) at the tag of the installed version; None without a clone."""
    where = os.environ.get("MEGATRON_BRIDGE")
    if not where:
        return None
    tag = next(tag for known, tag in TAGS.items() if (version() or "").startswith(known))
    paths = (
        ["scripts"] if tag == "v0.3.1" else ["scripts", "src/megatron/bridge/perf_recipes"]
    )  # which run_recipe.py reads
    archive = subprocess.run(["git", "-C", where, "archive", tag, *paths], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder / "Megatron-Bridge", filter="data")
    return folder / "Megatron-Bridge" / "scripts" / "training"


def environment(rank: int, world: int, port: int = 0) -> dict[str, str]:
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("EXACT_")},
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"},
        **{"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "PYTHONWARNINGS": "ignore", "MASTER_PORT": str(port)},
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)]),
    }


def run_jobs(folder: Path, world: int, jobs: list[dict], seconds: int = 120) -> None:
    """Run jobs {"name", "mode", "arguments"} one after another as `world` ranks; afterwards nothing of them is left."""
    for job in jobs:
        job.update(port=free_port(), seconds=seconds)
    table = folder / f"jobs{world}.json"
    table.write_text(json.dumps(jobs))
    ranks = []
    for rank in range(world):
        command = [sys.executable, str(HERE / "bridge_cpu.py"), str(table), str(folder)]
        with open(folder / f"ranks{world}.{rank}", "w") as log:
            ranks.append(
                subprocess.Popen(
                    command, env=environment(rank, world), stdout=log, stderr=log, cwd=folder, start_new_session=True
                )
            )
    deadline = time.monotonic() + 120 + seconds * len(jobs)
    try:
        for rank in ranks:
            rank.wait(timeout=max(1, deadline - time.monotonic()))
    finally:
        end(ranks)
    for number, rank in enumerate(ranks):
        assert rank.returncode == 0, (folder / f"ranks{world}.{number}").read_text()[-4000:]


def run_command(folder: Path, name: str, arguments: list[str], seconds: int = 240) -> None:
    """Run `python ARGUMENTS` as a user would, as the only rank, and leave what it printed in FOLDER/NAME.0."""
    env = environment(0, 1, free_port())
    env["PYTHONPATH"] = os.pathsep.join([str(HERE / "bridge_site"), env["PYTHONPATH"]])
    with open(folder / f"{name}.0", "w") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments], env=env, stdout=log, stderr=log, cwd=folder, start_new_session=True
        )
        try:
            status = process.wait(timeout=seconds)
        finally:
            end([process])
        log.seek(0, os.SEEK_END)
        print(f"\nexit status {status}", file=log)


def log(folder: Path, name: str) -> Log:
    return Log(folder, name)
