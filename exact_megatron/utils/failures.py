"""One reason for a run that cannot go on, in place of a traceback of every rank."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import ExactError

PACKAGE = Path(__file__).resolve().parents[1]
PATIENCE = 30  # seconds that the other ranks leave rank 0 to say why; torchrun ends them within one when it has


@contextmanager
def said_once(program: str) -> Iterator[None]:
    """Where this package rejects the run within the block, rank 0 prints the reason and all ranks exit with code 1.

    torchrun prints it once more below its list of ranks, as the root cause. Another rank says something only if it outlives rank 0's
    turn, so if rank 0 had no error. Other errors, a host's and bugs of ours, keep their traceback.

    Raises:
        SystemExit: 1.
    """
    try:
        yield
    except (ValueError, OSError, ExactError) as error:
        if not _ours(error):
            raise
        _say(program, str(error))
        raise SystemExit(1) from None


def _ours(error: BaseException) -> bool:
    """Whether a line of this package raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and PACKAGE in Path(trace.tb_frame.f_code.co_filename).resolve().parents


def _say(program: str, reason: str) -> None:
    rank = int(os.environ.get("RANK", 0))
    if rank:
        signal.signal(
            signal.SIGTERM, signal.SIG_DFL
        )  # Megatron-LM's --exit-signal-handler would let this rank sleep on
        time.sleep(PATIENCE)
    sys.stdout.flush()
    print(f"{program}: rank {rank}: {reason}" if rank else f"{program}: {reason}", file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        data = {"message": reason, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": data}))
