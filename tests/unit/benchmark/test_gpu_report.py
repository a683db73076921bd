"""The page about a GPU, from made-up numbers."""

import json

import pytest

from exact_megatron.benchmark import gpu_report
from exact_megatron.benchmark.throughput.results import compare_arms

FIXTURE = {
    "GPU": "FIXTURE, no real GPU",
    "CPU": "fixture",
    "date": "2000-01-02 03:04 UTC",
    "versions": {"torch": "0.0"},
}


def invented_cell(precision, ratio, memory, window=8192, overrides=()):
    """No measurement: numbers chosen to be seen again in the page."""

    def arm(speed, gib):
        return {
            "step s": 1.0,
            "tokens/s": speed,
            "TFLOP/s": 412.5,
            "MFU": 0.5,
            "peak GiB": gib,
            "block s": [1000 / speed] * 2,
            "block GiB": [gib] * 2,
        }

    cell = FIXTURE | {
        "geometry": "llama-3-8b",
        "overrides": list(overrides),
        "step tokens": 1000,
        "repeated": [f"{precision} with 7 layers: invented"],
        "proof": {"tokens": "70ce75", "loss mask of exact": f"ma5c{precision}"},
        "window": window,
        "precision": precision,
        "layers": 6,
        "documents": "log-normal lengths",
        "peak TFLOP/s": 800.0,
        "segments": {"median": 400.0, "mean": 830.0, "largest": window},
        "arms": {"exact": arm(1000 * ratio, 40 * memory), "baseline": arm(1000, 40.0), "causal": arm(900, 40.0)},
        "profile": {
            "steps": 2,
            "wall s": 1.0,
            "device s": 0.9,
            "groups": {"matrix products": 0.7, "attention": 0.3},
            "kernels": [{"name": "invented|kernel", "group": "attention", "share": 0.3, "calls": 6, "ms": 12.0}],
        },
        "loss end": {"s": 0.05, "GiB": 9.87, "share of the step": 0.11},
    }
    compare_arms(cell)
    return cell


def outcome(test, outcome, message="", code="now", **measured):
    kind = {"code": code, "GPU": FIXTURE["GPU"], "date": FIXTURE["date"]}
    return kind | {
        "test": f"tests/gpu/test_model.py::{test}",
        "outcome": outcome,
        "message": message,
        "measured": measured,
    }


# Two calls: the first was interrupted in test_b and had test_e hang; the second did what was left. Before them other code.
TESTS = [
    outcome("test_a", "failed", "of other code", code="before"),
    outcome("test_a", "begun"),
    outcome("test_a", "passed", error="0.0021"),
    outcome("test_b[bf16]", "begun"),
    outcome("test_b[bf16]", "failed", "assert 1 < 0 too far"),
    outcome("test_c", "failed", "no kernel"),
    outcome("test_d", "skipped", "needs two"),
    outcome("test_e", "begun"),
]


@pytest.fixture
def results(tmp_path):
    """A folder as the scripts leave it, with invented numbers throughout."""
    cells = [
        invented_cell("bf16", 0.9991, 1.0),
        invented_cell("delayed", 0.9712, 1.0),
        invented_cell("blockwise", 1.0, 1.05),
        invented_cell("bf16", 1.0789, 1.0, overrides=["model.fused=true"]),
    ]

    def write(name, text):
        return (tmp_path / name).write_text(text)

    write("cells.jsonl", "".join(json.dumps(cell) + "\n" for cell in cells))
    write("profile.jsonl", json.dumps(cells[0]) + "\n")
    row = {"name": "square 8192 bf16", "own": 777.0, "unit": "TFLOP/s", "ratio": 1.0}
    write("ceiling.json", json.dumps(FIXTURE | {"setup": "invented", "rows": [row]}))
    write(
        "proof.json", json.dumps(FIXTURE | {"setup": "invented", "rows": [], "arms": {"tiny 1K bf16": "tokens 9r00f"}})
    )
    write("tests.jsonl", "".join(json.dumps(line) + "\n" for line in TESTS))
    run = {
        "seed": 7,
        "arm": "exact",
        "window": 4096,
        "steps": 10,
        "tokens": 655360,
        "finished": True,
        "first loss": 3.0,
        "last losses": 2.5,
        "tokens/s": 123456.0,
        "command": "x",
        "validation": {"validation_loss": 2.345, "buckets": {"2048-4096": {"loss": 1.987, "targets": 4321}}},
    }
    write(
        "paired_training.json",
        json.dumps(
            {
                "runs": [run],
                "finished": 1,
                "tasks": 4,
                "arms": ["exact"],
                "lr": 2e-4,
                "first batches": {"arms/seed7/exact/4096.json": {"tokens": "f1257"}},
            }
        ),
    )
    write("machine.txt", "name, driver fixture\nsecond line\n")
    write("commands.txt", "$ python -m exact_megatron benchmark throughput\n")
    return tmp_path


def test_report_of_a_fixture(results, tmp_path):
    page = gpu_report.write(results, tmp_path / "docs", "A fixture.")
    text = page.read_text()
    assert page.name == "2000-01-02-fixture-no-real-gpu.md" and page.with_suffix(".png").stat().st_size > 10_000
    for words in (
        "2 of 4 cells keep it",
        "0.9712 (0.9712 to 0.9712)",
        "42.00 / 40.00",
        "1.0500 (1.0500 to 1.0500)",
        "412.5",
        "777.0 TFLOP/s",
        "| tiny 1K bf16 | tokens 9r00f |",
        "pytest: 1 passed, 2 failed, 1 skipped.",
        "* test_model::test_b[bf16]: assert 1 < 0 too far",
        "* test_model::test_c: no kernel",
        "* test_model::test_e: began and did not end",
        "| test_model::test_a | error 0.0021 |",
        "tokens of a segment by window: 8,192: median 400, mean 830",
        "    name, driver fixture\n    second line\n",
        "`invented kernel`",
        "11.0% of the step, 9.87 GiB",
        "1 of 4 tasks done",
        "2.3450",
        "2048-4096 | 1.9870 | 4,321",
        "    $ python -m exact_megatron benchmark throughput",
        "8,192, blockwise | bf16 | 1.001 (1.001 to 1.001)",
        "bf16, model.fused=true | without model.fused=true | 1.080 (1.080 to 1.080)",
        "| 70ce75 | ma5cdelayed |",
        "* delayed with 7 layers: invented",
        "* arms/seed7/exact/4096.json: tokens f1257",
        "A fixture.",
    ):
        assert words in text, words
    assert text.count("**missed**") == 2 and "Not measured" not in text and "of other code" not in text


def test_report_says_what_is_missing(results, tmp_path):
    for name in ("cells.jsonl", "paired_training.json", "proof.json", "tests.jsonl"):
        (results / name).unlink()
    assert gpu_report.write(results, tmp_path / "docs").read_text().count("Not measured.") == 3
    (results / "ceiling.json").write_text(json.dumps(FIXTURE | {"GPU": "another", "setup": "", "rows": []}))
    with pytest.raises(ValueError, match="mixes results of"):
        gpu_report.write(results, tmp_path / "docs")
    (tmp_path / "dry").mkdir()
    (tmp_path / "dry" / "ceiling.json").write_text(json.dumps(FIXTURE | {"GPU": "none", "setup": "", "rows": []}))
    with pytest.raises(ValueError, match="dry run on a CPU"):
        gpu_report.write(tmp_path / "dry", tmp_path / "docs")
    (tmp_path / "old").mkdir()
    cell = {key: value for key, value in invented_cell("bf16", 1.0, 1.0).items() if key != "proof"}
    (tmp_path / "old" / "cells.jsonl").write_text(json.dumps(cell) + "\n")
    with pytest.raises(ValueError, match="without a proof that their arms differ: llama-3-8b, 6 layers, 8,192, bf16"):
        gpu_report.write(tmp_path / "old", tmp_path / "docs")
    (tmp_path / "empty").mkdir()
    assert gpu_report.main([str(tmp_path / "empty")]) == 2
