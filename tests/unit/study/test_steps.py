"""exact_megatron.study.steps: commands in order."""

import sys

import pytest

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
        ("sys.exit(3)", {}, steps.Failed, "a failed with exit code 3; its messages are above"),
        ("sys.exit(3)", {"failed": "no pair"}, steps.Failed, "no pair"),
        ("sys.exit(0)", {}, steps.Unfinished, r"a was stopped \(exit code 0\): the same command goes on"),
        ("sys.exit(0)", {"progress": lambda: "after step 2 of 9"}, steps.Unfinished, "a was stopped after step 2 of 9"),
    ],
)
def test_a_step_that_fails_or_stops_ends_them(tmp_path, code, given, error, message):
    with pytest.raises(error, match=message) as found:
        steps.run_steps([writes(tmp_path / "a", code, **given), writes(tmp_path / "b")])
    assert getattr(found.value, "code", 3) == 3
    assert not (tmp_path / "b").exists()
