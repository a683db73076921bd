"""Outcomes of tests on a machine with a time limit, kept over several calls: pytest -p exact_megatron.benchmark.outcomes --outcomes FILE

A pytest plugin. Each test that begins, and each that ends, is a JSON line of FILE, written at once, so that no signal takes it away:
{"code": digest of the package, the tests and the versions, "GPU", "date", "test", "outcome": "begun", "passed", "failed" or "skipped",
"seconds", "message", "measured": what the test recorded}. What passed with the same code on the same kind of GPU is not run again;
what began there and never ended, since it hung or ended the process, comes last. Otherwise the order is the command line's.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.environment import environment
from ..utils.files import json_lines

if TYPE_CHECKING:
    import pytest

PACKAGE = Path(__file__).parents[1]
Outcome = dict[str, Any]  # a line


def read_outcomes(path: Path) -> list[Outcome]:
    """All lines.

    Raises:
        ValueError: one is no JSON.
    """
    return json_lines(path)


def last_outcomes(lines: list[Outcome], code: str, gpu: str) -> dict[str, Outcome]:
    """The last line of each test with this code on this kind of GPU."""
    last: dict[str, Outcome] = {}
    for line in lines:
        if (line["code"], line["GPU"]) == (code, gpu):
            last[line["test"]] = line
    return last


def digest_of(tests: Path, versions: dict[str, str]) -> str:
    """Of what an outcome depends on: the files of the package and of the tests, and versions."""
    found = hashlib.sha256(json.dumps(versions, sort_keys=True).encode())
    for folder in (PACKAGE, tests):
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
            found.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, metavar="FILE", help="JSON lines: read, and appended to")


def pytest_configure(config: pytest.Config) -> None:
    """Raises pytest.UsageError: see read_outcomes."""
    from pytest import UsageError

    if (path := config.getoption("--outcomes")) is not None:
        try:
            config.pluginmanager.register(Recorder(path, config.rootpath / "tests"))
        except ValueError as error:
            raise UsageError(str(error)) from error


class Recorder:
    """The hooks of one call."""

    def __init__(self, path: Path, tests: Path) -> None:
        machine = environment("transformer-engine")
        code = digest_of(tests, machine["versions"])
        self.path = path
        self.kind = {"code": code, "GPU": machine["GPU"], "date": machine["date"]}
        self.before = last_outcomes(read_outcomes(path), code, machine["GPU"])
        self.ended: Outcome = {}  # of the test that runs
        self.left_out = 0

    def write(self, test: str, outcome: str, **more: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(self.kind | {"test": test, "outcome": outcome, **more}) + "\n")

    def outcome_before(self, item: pytest.Item) -> str | None:
        return self.before[item.nodeid]["outcome"] if item.nodeid in self.before else None

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        passed = [item for item in items if self.outcome_before(item) == "passed"]
        items[:] = [item for item in items if self.outcome_before(item) != "passed"]
        items.sort(key=lambda item: self.outcome_before(item) == "begun")
        config.hook.pytest_deselected(items=passed)
        self.left_out = len(passed)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus == 5 and self.left_out:  # "no tests": all have passed
            session.exitstatus = 0

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.ended = {"outcome": "passed", "seconds": 0.0, "message": "", "measured": {}}
        self.write(nodeid, "begun")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        ended = self.ended
        ended["seconds"] = round(ended["seconds"] + report.duration, 3)
        ended["measured"] = {name: str(value) for name, value in report.user_properties}
        if report.outcome != "passed" and ended["outcome"] != "failed":
            said = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            lines = [line for line in said.splitlines() if line.startswith("E ")] or said.splitlines()[-1:]
            ended |= {"outcome": report.outcome, "message": " ".join(" ".join(lines).split())[:500]}
        if report.when == "teardown":
            self.write(report.nodeid, **ended)
