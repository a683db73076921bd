"""exact_megatron.utils.ranks: a command whose output, exit code and signals are passed on."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from exact_megatron.utils.ranks import launch


def test_launch_passes_exit_codes_and_output_on(capfd):
    assert launch([sys.executable, "-c", "print('seen'); raise SystemExit(5)"]) == 5
    assert "seen" in capfd.readouterr().out


@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)],
    ids=["SIGINT", "SIGTERM", "SIGUSR1"],
)
@pytest.mark.parametrize("stubborn", [False, True], ids=["obeys", "ignores"])
def test_launch_ends_the_child_on_a_signal(tmp_path, number, code, stubborn):
    """A first signal asks the child to stop; a second kills it and its children in other sessions."""
    child = tmp_path / "child.py"
    child.write_text(
        textwrap.dedent(
            f"""
            import pathlib, signal, subprocess, sys, time
            if {stubborn}:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
            rank = subprocess.Popen(sleep, start_new_session=True)
            if not {stubborn}:
                signal.signal(signal.SIGTERM, lambda *_: (rank.kill(), rank.wait(), sys.exit(0)))
            pathlib.Path({str(tmp_path / "pid.tmp")!r}).write_text(str(rank.pid))
            pathlib.Path({str(tmp_path / "pid.tmp")!r}).rename({str(tmp_path / "pid")!r})
            time.sleep(60)
            """
        )
    )
    parent = (
        "import sys; from exact_megatron.utils.ranks import launch\n"
        f"try: launch([sys.executable, {str(child)!r}])\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert "stopping after a checkpoint" in process.stderr.readline()
    process.send_signal(number)  # at once: the same request, as `timeout` makes it
    if stubborn:
        time.sleep(0.3)
        process.send_signal(number)
    assert process.wait(timeout=30) == code
    rank = int((tmp_path / "pid").read_text())
    while is_running(rank):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
