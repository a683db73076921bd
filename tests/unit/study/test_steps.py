"""exact_megatron.study.steps: commands in order, deadlines and signals."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from exact_megatron.config import ExactError
from exact_megatron.study import steps


def writes(path, code="pass", *, name="", **given):
    """A step that writes `path` after running `code`."""
    text = f"import pathlib, signal, sys, time; {code}; pathlib.Path({str(path)!r}).write_text('')"
    return steps.Step(name or path.name, [sys.executable, "-c", text], path.exists, **given)


def test_steps_run_once_in_order(tmp_path, capsys):
    paths = [tmp_path / name for name in "ab"]
    checked = []
    made = [writes(p, headline=p.name, check=lambda p=p: checked.append(p.name)) for p in paths]
    steps.run_steps(made)
    assert all(path.exists() for path in paths)
    assert capsys.readouterr().err == "== a\n== b\n"
    paths[1].unlink()
    steps.run_steps([*made, writes(tmp_path / "a")])  # no headline: nothing is said
    assert capsys.readouterr().err == "== a: done before\n== b\n"
    assert checked == ["a", "b", "a", "b"]


@pytest.mark.parametrize(
    "code, given, error, message",
    [
        ("sys.exit(3)", {}, ExactError, "a failed with exit code 3; its messages are above"),
        ("sys.exit(3)", {"failed": "no pair"}, ExactError, "no pair"),
        ("sys.exit(0)", {}, steps.Unfinished, r"a was stopped \(exit code 0\): the same command goes on"),
        ("sys.exit(0)", {"progress": lambda: "after step 2 of 9"}, steps.Unfinished, "a was stopped after step 2 of 9"),
    ],
)
def test_a_step_that_fails_or_stops_ends_them(tmp_path, code, given, error, message):
    with pytest.raises(error, match=message) as found:
        steps.run_steps([writes(tmp_path / "a", code, **given), writes(tmp_path / "b")])
    assert isinstance(found.value, steps.Unfinished) == (error is steps.Unfinished)
    assert not (tmp_path / "b").exists()


def test_the_deadline_stops_the_step_in_progress(tmp_path):
    """It may save what it has; a stubborn one is killed; nothing is started after it."""
    obeys = f"signal.signal(signal.SIGTERM, lambda *_: (open({str(tmp_path / 'saved')!r}, 'w'), sys.exit(0))); time.sleep(60)"
    begun = time.monotonic()
    with pytest.raises(steps.Unfinished, match="a was stopped"):
        steps.run_steps([writes(tmp_path / "a", obeys)], begun + 2)
    assert (tmp_path / "saved").exists() and time.monotonic() < begun + 30
    with pytest.raises(steps.Unfinished, match="a is left for the next call, the time is over"):
        steps.run_steps([writes(tmp_path / "a")], begun)


def test_a_step_that_ignores_the_deadline_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "SECONDS_TO_SAVE", 0.1)
    begun = time.monotonic()
    with pytest.raises(steps.Unfinished, match="a was stopped"):
        ignores = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
        steps.run_steps([writes(tmp_path / "a", ignores)], begun + 1)
    assert time.monotonic() < begun + 30


def test_launch_passes_exit_codes_and_output_on(capfd):
    assert steps.launch([sys.executable, "-c", "print('seen'); raise SystemExit(5)"]) == 5
    assert "seen" in capfd.readouterr().out


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
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
        "import sys; from exact_megatron.study.steps import launch\n"
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
    if stubborn:
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
