"""The record of tests' outcomes over several calls of pytest."""

import json
import signal

import pytest

from exact_megatron.benchmark import outcomes

TESTS = """
import os, signal
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1]

@pytest.fixture
def broken():
    yield
    assert (FOLDER / "mended").exists(), "too far"

def test_first(record_property):
    record_property("error", 0.5)

def test_interrupted():
    if not (FOLDER / "time").exists():
        os.kill(os.getpid(), signal.SIGINT)

def test_fails(broken): pass

def test_last(): pass
"""


@pytest.fixture
def heard():
    """SIGINT is ignored in a background shell, and Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupted_calls_go_on(tmp_path, heard):
    """INT comes in the second test: its record is kept, it comes last in the next call, and what has passed is not run again."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_small.py").write_text(TESTS)
    (tmp_path / "pytest.ini").touch()
    record = tmp_path / "tests.jsonl"
    options = (
        f"-q -s -p no:cacheprovider --import-mode importlib --rootdir {tmp_path} --outcomes {record} {tmp_path}/tests"
    )

    def call():
        """(exit code, what it recorded)."""
        before = len(outcomes.read_outcomes(record))
        code = pytest.main(["-p", "exact_megatron.benchmark.outcomes", *options.split()])
        lines = outcomes.read_outcomes(record)[before:]
        return code, [(line["test"].split("::test_")[1], line["outcome"]) for line in lines]

    assert call() == (2, [("first", "begun"), ("first", "passed"), ("interrupted", "begun")])
    (tmp_path / "time").touch()
    code, found = call()
    assert (code, found[1::2]) == (1, [("fails", "failed"), ("last", "passed"), ("interrupted", "passed")])
    lines = {(line["test"].split("::test_")[1], line["outcome"]): line for line in outcomes.read_outcomes(record)}
    assert "too far" in lines["fails", "failed"]["message"] and lines["first", "passed"]["measured"] == {"error": "0.5"}
    (tmp_path / "mended").touch()
    assert call() == (0, [("fails", "begun"), ("fails", "passed")])
    assert call() == (0, [])
    with (tmp_path / "tests" / "test_small.py").open("a") as file:
        file.write("# other code\n")
    code, found = call()
    assert code == 0 and len(found) == 8 and all(outcome == "passed" for _, outcome in found[1::2])
    record.write_text(record.read_text() + '{"code')
    assert pytest.main(["-p", "exact_megatron.benchmark.outcomes", *options.split()]) == pytest.ExitCode.USAGE_ERROR


def test_outcomes_of_other_code_or_another_gpu_do_not_count(tmp_path):
    path = tmp_path / "tests.jsonl"
    assert outcomes.read_outcomes(path) == []
    written = ["a H100 x passed", "b H100 y passed", "b H200 y failed", "b H100 x failed", "b H100 x begun"]
    lines = [dict(zip(("code", "GPU", "test", "outcome"), line.split())) for line in written]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = outcomes.last_outcomes(outcomes.read_outcomes(path), "b", "H100")
    assert {test: line["outcome"] for test, line in found.items()} == {"x": "begun", "y": "passed"}
    path.write_text(path.read_text() + '{"code": "b')
    with pytest.raises(ValueError, match="tests.jsonl, line 6 is no JSON .* remove the line, it was cut off"):
        outcomes.read_outcomes(path)


def test_digest_of_the_code(tmp_path):
    (tmp_path / "a.py").write_text("x")
    first = outcomes.digest_of(tmp_path, {"torch": "2.11"})
    assert outcomes.digest_of(tmp_path, {"torch": "2.13"}) != first
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_text("x")
    assert outcomes.digest_of(tmp_path, {"torch": "2.11"}) == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert outcomes.digest_of(tmp_path, {"torch": "2.11"}) != first
