"""Many runs of a host for one start of its ranks: in a rank, each job is a fork that has its imports already. Standard library only."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEETING = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_each(table: str, folder: Path, start: Callable[[dict[str, Any]], Any]) -> None:
    """Fork for each job of a JSON file, with its output in FOLDER/NAME.RANK and its exit status as the last line of that.

    A job is {"name", "port", "seconds", ...}: where its ranks meet, and after how long it is killed. It may have an "environment", and
    with "alone" it has none of torchrun's variables.
    """
    for job in json.loads(Path(table).read_text()):
        child = os.fork()
        if child == 0:
            _run(job, folder, start)
        os.waitpid(child, 0)


def _run(job: dict[str, Any], folder: Path, start: Callable[[dict[str, Any]], Any]) -> None:
    log = os.open(folder / f"{job['name']}.{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(job.get("environment", {}), MASTER_PORT=str(job["port"]))
    for name in MEETING if "alone" in job else ():
        del os.environ[name]
    status = 1
    try:
        signal.alarm(job["seconds"])
        start(job)
        status = 0
    except SystemExit as end:
        status = 0 if end.code in (None, 0) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        print(f"\nexit status {status}", flush=True)
        sys.stderr.flush()
        os._exit(status)


def run_script(script: Path, arguments: list[str]) -> None:
    """Execute a script in this process, as `python SCRIPT ARGUMENTS` does."""
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    exec(compile(script.read_text(), str(script), "exec"), {"__name__": "__main__", "__file__": str(script)})


class Log:
    """What a job printed, all ranks together."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.ranks = [path.read_text() for path in sorted(folder.glob(f"{name}.[0-9]"))]
        self.text = "\n".join(self.ranks)

    @property
    def ok(self) -> bool:
        return bool(self.ranks) and all(text.rstrip().endswith("exit status 0") for text in self.ranks)
