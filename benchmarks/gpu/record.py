"""A pytest plugin that keeps what a session on a lent or limited machine has shown so far: pytest -p record --record FILE.jsonl

Each test that ends is one line {"code", "test", "outcome", "seconds", "message"}, written at once, so that neither a signal nor a lost
machine takes it away. Tests recorded as passed are not run again while the code is the same; tests that were begun and never ended
(they hung, or killed the process) come last. Otherwise the order is that of the command line: name the files that matter most first.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
CODE = ("exact_megatron/**/*.py", "tests/**/*.py")  # what a test's outcome depends on


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="JSON lines, read and appended to")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record"):
        config.pluginmanager.register(Record(config.getoption("--record")))


def code_digest() -> str:
    found = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern)):
        found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


def read(path: Path, code: str) -> dict[str, str]:
    """{test: its last outcome, or "begun"} of this code; a line that a kill cut off is no outcome."""
    last: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["code"] == code:
            last[entry["test"]] = entry["outcome"]
    return last


class Record:
    """One session's lines, appended to those of earlier ones."""

    def __init__(self, path: Path) -> None:
        self.path, self.code = path, code_digest()
        self.before = read(path, self.code)
        self.worst: dict[str, Any] = {}

    def write(self, test: str, outcome: str, **more: Any) -> None:
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
        with self.path.open("a") as file:
            file.write(
                ("" if whole else "\n")
                + json.dumps({"code": self.code, "test": test, "outcome": outcome, **more})
                + "\n"
            )

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        passed = [item for item in items if self.before.get(item.nodeid) == "passed"]
        items[:] = [item for item in items if self.before.get(item.nodeid) != "passed"]
        items.sort(key=lambda item: self.before.get(item.nodeid) == "begun")
        config.hook.pytest_deselected(items=passed)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(nodeid, "begun")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        seconds = self.worst.get("seconds", 0.0) + report.duration
        if report.outcome != "passed" and self.worst.get("outcome") != "failed":
            skip = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            lines = [line for line in skip.splitlines() if line.startswith("E ")] or skip.splitlines()[-1:]
            self.worst |= {"outcome": report.outcome, "message": " ".join(" ".join(lines).split())[:500]}
        self.worst["seconds"] = seconds
        if report.when == "teardown":
            self.write(report.nodeid, **({"outcome": "passed", "message": ""} | self.worst))
            self.worst = {}
