"""One writer a run folder: a lock that the kernel, or the file server, takes back when its holder dies."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..config import ExactError
from ..utils.files import writing

NAME = "run.lock"
PREDECESSOR_SECONDS = 150.0  # an NFSv4 server takes a dead client's locks back after its lease, 90 s by default
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def only_writer(folder: str | Path, remedy: str = "exp_manager.exp_dir=ANOTHER") -> Iterator[None]:
    """Hold the lock of `folder`, which is made if it is not there, and removed if it is empty then; one process a run, its first rank.

    A POSIX record lock on `folder`/run.lock: no child process inherits it, and NFS and Lustre (`flock` mount option) know it. Where
    the holder is gone but not forgotten yet (killed just now, or the same Slurm job before it was requeued), it is waited for.

    Raises:
        ExactError: another process holds it; names its host, pid and Slurm job.
        OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    descriptor = None
    try:
        with writing(path):
            descriptor = _acquire(path, remedy)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_myself()).encode(), 0)
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)  # while it is held, see _acquire
            os.close(descriptor)
        with suppress(OSError):  # not empty: something was written
            for path in made:
                path.rmdir()


def _acquire(path: Path, remedy: str) -> int:
    deadline: float | None = None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                print(
                    f"{path} cannot be locked ({error.strerror}): make sure yourself that no second run writes {path.parent}",
                    file=sys.stderr,
                )
                return descriptor
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                raise OSError(error.errno, error.strerror, str(path)) from error
            holder = _read(descriptor)
            os.close(descriptor)
            problem = (
                f"{path.parent} is in use: {_described(holder)} writes to it. Give this run a folder of its own ({remedy}), or wait "
                f"until the other has ended; only if that is surely dead and its lock stays (a lost NFS client), remove {path}"
            )
            now = time.monotonic()
            if not _gone(holder) or (deadline is not None and now > deadline):
                raise ExactError(problem) from None
            if deadline is None:
                deadline = now + PREDECESSOR_SECONDS
                print(f"waiting for {_described(holder)} to release {path.parent}", file=sys.stderr, flush=True)
            time.sleep(0.5)
            continue
        try:
            same = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            same = False
        if same:
            return descriptor
        os.close(descriptor)  # its last holder removed it between our open and our lock


def _myself() -> dict[str, Any]:
    environment = os.environ
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": environment.get("SLURM_JOB_ID"),
        "restart": environment.get("SLURM_RESTART_COUNT", "0"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _read(descriptor: int) -> dict[str, Any]:
    for _ in range(10):  # its holder may be about to write it
        with suppress(ValueError):
            found = json.loads(os.pread(descriptor, 4096, 0))
            if isinstance(found, dict):
                return found
        time.sleep(0.05)
    return {}


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return "a process that has not said which"
    job = f", Slurm job {holder['job']}" if holder.get("job") else ""
    return f"a run on host {holder.get('host')}, pid {holder.get('pid')}{job}, since {holder.get('since')},"


def _gone(holder: dict[str, Any]) -> bool:
    """Whether the holder is dead for all that can be seen from here: its pid on this host, or this job before its requeue."""
    mine = _myself()
    if holder.get("job") and holder["job"] == mine["job"] and holder.get("restart") != mine["restart"]:
        return True
    if holder.get("host") != mine["host"] or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
