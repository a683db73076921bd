"""Tiny runs of Megatron-Bridge's pretrain(), for test_bridge.py."""

from __future__ import annotations

import importlib.metadata
import io
import os
import subprocess
import tarfile
from pathlib import Path

from tests.helpers import ranks
from tests.hosts.megatron_lm import Log

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


def run_jobs(folder: Path, world: int, jobs: list[dict]) -> None:
    """Run jobs of bridge_cpu.py."""
    ranks.run_jobs([str(HERE / "bridge_cpu.py")], folder, world, jobs, [HERE, HERE.parent.parent])


def run_command(folder: Path, name: str, arguments: list[str]) -> None:
    """Run `python ARGUMENTS` as a user would, as the only rank, and leave what it printed in FOLDER/NAME.0."""
    path = [HERE / "bridge_site", HERE, HERE.parent.parent]
    (status,) = ranks.launch_fresh(arguments, 1, folder / name, path, timeout=240)
    with open(folder / f"{name}.0", "a") as log:
        print(f"\nexit status {status}", file=log)


def log(folder: Path, name: str) -> Log:
    return Log(folder, name)
