"""The scripts of benchmarks/gpu, as far as a CPU shows: the page they end in (from made-up numbers), parts, plans, dry runs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

GPU = Path(__file__).parent.parent / "benchmarks" / "gpu"


def script(name):
    spec = importlib.util.spec_from_file_location(name, GPU / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


report, parts, cpt = script("report"), script("parts"), script("cpt")
FIXTURE = {
    "GPU": "FIXTURE, no real GPU",
    "CPU": "fixture",
    "date": "2000-01-02 03:04 UTC",
    "versions": {"torch": "0.0"},
}


def invented_cell(precision, ratio, memory, window=8192):
    """No measurement: numbers chosen to be seen again in the page."""
    arm = lambda speed, gib: {
        "step s": 1.0,
        "tokens/s": speed,
        "TFLOP/s": 412.5,
        "MFU": 0.5,
        "peak GiB": gib,
        "block s": [1.0],
    }
    return FIXTURE | {
        "geometry": "llama-3-8b", "window": window, "precision": precision, "layers": 6, "documents": "log-normal lengths",
        "peak TFLOP/s": 800.0, "pieces": {"median": 400.0, "mean": 830.0, "largest": window},
        "arms": {"exact": arm(1000 * ratio, 40 * memory), "baseline": arm(1000, 40.0), "causal": arm(900, 40.0)},
        "EXACT against baseline": {"ratio": ratio, "interval": [ratio - 0.002, ratio + 0.002]},
        "masked against causal": {"ratio": 1.111, "interval": [1.1, 1.12]},
        "profile": {"steps": 2, "wall s": 1.0, "device s": 0.9, "groups": {"matrix products": 0.7, "attention": 0.3},
                    "kernels": [{"name": "invented|kernel", "group": "attention", "share": 0.3, "calls": 6, "ms": 12.0}]},
        "loss end": {"s": 0.05, "GiB": 9.87, "share of the step": 0.11},
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """A folder as the scripts leave it, with invented numbers throughout."""
    cells = [
        invented_cell("bf16", 0.9991, 1.0),
        invented_cell("delayed", 0.9712, 1.0),
        invented_cell("blockwise", 1.0, 1.05),
    ]
    write = lambda name, text: (tmp_path / name).write_text(text)
    write("cells.jsonl", "".join(json.dumps(cell) + "\n" for cell in cells))
    write("profile.jsonl", json.dumps(cells[0]) + "\n")
    row = {"name": "square 8192 bf16", "own": 777.0, "unit": "TFLOP/s", "ratio": 1.0}
    write("ceiling.json", json.dumps(FIXTURE | {"setup": "invented", "rows": [row]}))
    te = {
        "gpu": "FIXTURE",
        "torch": "0.0",
        "Linear/bf16": {"ok": True, "s": 1, "y": 0.0021},
        "thd": {"ok": False, "error": "no kernel"},
    }
    write("te.json", json.dumps(te))
    case = '<testcase name="{}">{}</testcase>'
    cases = (
        case.format("a", "")
        + case.format("b[bf16]", '<failure message="too far"/>')
        + case.format("c", '<skipped message=""/>')
    )
    write("pytest.xml", f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    run = {"seed": 7, "arm": "exact", "window": 4096, "steps": 10, "tokens": 655360, "finished": True, "first loss": 3.0,
           "last losses": 2.5, "tokens/s": 123456.0, "command": "x",
           "validation": {"validation_loss": 2.345, "buckets": {"2048-4096": {"loss": 1.987, "targets": 4321}}}}  # fmt: skip
    write("cpt.json", json.dumps({"runs": [run], "finished": 1, "tasks": 4, "arms": ["exact"], "lr": 2e-4}))
    write("machine.txt", "Transformer Engine 0.0 fixture\nsecond line\nTransformer Engine 0.0 fixture\n")
    write("commands.txt", "$ python -m exact_megatron benchmark throughput\n")
    return tmp_path


def test_report_of_a_fixture(results, tmp_path):
    page = report.write(results, tmp_path / "docs", "A fixture.")
    text = page.read_text()
    assert page.name == "2000-01-02-fixture-no-real-gpu.md" and page.with_suffix(".png").stat().st_size > 10_000
    for words in (
        "1 of 3 cells keep it", "0.9712 (0.9692 to 0.9732)", "42.00 / 40.00", "412.5", "777.0 TFLOP/s", "Linear/bf16 | passed | y 0.0021",
        "thd | **failed** | no kernel", "1 passed, 1 failure, 0 error, 1 skipped", "b[bf16]: failure: too far", "`invented kernel`",
        "11.0% of the step, 9.87 GiB", "1 of 4 tasks done", "2.3450", "2048-4096 | 1.9870 | 4,321",
        "    $ python -m exact_megatron benchmark throughput", "blockwise | 1.001", "A fixture.",
    ):  # fmt: skip
        assert words in text, words
    assert text.count("    Transformer Engine 0.0 fixture\n    second line\n") == text.count("Transformer Engine") == 1
    assert text.count("**missed**") == 2 and "Not measured" not in text


def test_report_says_what_is_missing(results, tmp_path):
    for name in ("cells.jsonl", "cpt.json", "te.json", "pytest.xml"):
        (results / name).unlink()
    assert report.write(results, tmp_path / "docs").read_text().count("Not measured.") == 3
    (results / "ceiling.json").write_text(json.dumps(FIXTURE | {"GPU": "another", "setup": "", "rows": []}))
    with pytest.raises(ValueError, match="mixes results of"):
        report.write(results, tmp_path / "docs")
    (tmp_path / "dry").mkdir()
    (tmp_path / "dry" / "ceiling.json").write_text(json.dumps(FIXTURE | {"GPU": "none", "setup": "", "rows": []}))
    with pytest.raises(ValueError, match="dry run on a CPU"):
        report.write(tmp_path / "dry", tmp_path / "docs")
    (tmp_path / "empty").mkdir()
    assert report.main([str(tmp_path / "empty")]) == 2


def test_parts_come_together_again(tmp_path):
    rng = np.random.default_rng(0)
    load, store, there = (tmp_path / name for name in ("load", "store", "there"))
    (load / "hf").mkdir(parents=True)
    (load / "hf" / "model.gguf").write_bytes(rng.bytes(250_000))
    (load / "empty").write_bytes(b"")
    rng.integers(0, 5000, 100_000).astype(np.uint16).tofile(load / "corpus.bin")
    count = parts.split(load, tmp_path / "parts", 100_000, ".bin")
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / "parts" / str(n)).iterdir() if f.name != parts.LIST)
        for n in range(1, count + 1)
    ]
    assert count == 5 and sizes[:-1] == [100_000] * 4 and sum(sizes) < 250_000 + 180_000
    for n in (5, 1, 2, 4):
        parts.add(tmp_path / "parts" / str(n), store)
    with pytest.raises(ValueError, match="parts 3 are missing"):
        parts.join(store, there)
    parts.add(tmp_path / "parts" / "3", store)
    assert parts.join(store, there) == ["corpus.bin", "empty", "hf/model.gguf"]
    for path in load.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (there / path.relative_to(load)).read_bytes()
    # A part of another split does not mix with the old ones.
    (load / "empty").write_bytes(b"x")
    parts.split(load, tmp_path / "parts", 100_000, ".bin")
    parts.add(tmp_path / "parts" / "1", store)
    with pytest.raises(ValueError, match="are missing"):
        parts.join(store, there)


PLAN = "--base base --config m.yaml --data d/corpus --folder runs --stages 4096:25e6 16384:25e6 --seeds 1 2 --arms baseline exact".split()


def test_plan_of_the_pairs():
    """The arms of a seed and stage differ in their weights, and in nothing else but where they lie."""
    tasks = cpt.plan(cpt.parse(PLAN))
    trained = [task for task in tasks if task.command[3] == "train"]
    assert len(trained) == 8 and len(tasks) == 8 + 2 * 4 + 2
    for one, two in zip(trained[::2], trained[1::2]):
        differ = {a.split("=")[0] for a, b in zip(one.command, two.command) if a != b}
        paths = {"exp_manager.exp_dir", "model.exact.enabled"} | (
            {"restore_from_path"} if "window 16384" in one.name else set()
        )
        assert differ == paths, differ
    first, later = trained[1], trained[3]
    assert "restore_from_path=base" in first.command and "restore_from_path=runs/seed1/exact/4096" in later.command
    assert "trainer.max_steps=381" in first.command and "model.global_batch_size=4" in later.command
    assert "model.micro_batch_size=8" in first.command and "model.micro_batch_size=2" in later.command
    assert first.done == Path("runs/seed1/exact/4096/checkpoints/step_00000381/metadata.json")
    suite = tasks[8]
    assert suite.command[3:6] == ["evaluate", "runs/seed1/baseline/16384", "--suite"]
    assert suite.done == Path("runs/evaluation/seed1/baseline/distance-probe/results.json")
    ruler = cpt.plan(
        cpt.parse([*PLAN, "--seeds", "1", "--suites", "ruler", "--evaluate", "lengths=8192,16384", "limit=5"])
    )[4:]
    assert [task.command[3] for task in ruler] == ["convert", "convert", "evaluate", "evaluate", "evaluate"]
    assert ruler[2].command[4] == ruler[0].command[-1] == "runs/hf/seed1/baseline"
    assert ruler[2].command[-5:] == ["--lengths", "8192", "16384", "--limit", "5"]
    knob = cpt.plan(cpt.parse([*PLAN, "--arms", "baseline", "more:alpha=0.5,gamma=1", "--suites"]))
    assert {"model.exact.enabled=true", "model.exact.alpha=0.5", "model.exact.gamma=1"} < set(knob[1].command) and len(
        knob
    ) == 8


@pytest.mark.parametrize(("more", "message"), [
    (["--arms", "exact:alpha"], "--arms exact:alpha: give NAME"),
    (["--arms", "baseline:alpha=1"], "baseline has no settings"),
    (["--stages", "4096:70000"], "--stages 4096:70000: 1 steps of 16 windows"),
    (["--stages", "131072:1e9"], "1 steps|0 windows"),
])  # fmt: skip
def test_plans_that_cannot_be(more, message):
    with pytest.raises(ValueError, match=message):
        cpt.plan(cpt.parse([*PLAN, *more]))


def test_the_deadline_stops_a_run_in_order(tmp_path):
    """SIGTERM, then UNFINISHED; an exit code of the run's own is passed on."""
    code = "import signal, sys, time; signal.signal(15, lambda *a: (open(sys.argv[1], 'w').close(), sys.exit(0))); time.sleep(60)"
    task = cpt.Task("sleep", [sys.executable, "-c", code, str(tmp_path / "saved")], tmp_path / "done")
    assert cpt.run_task(task, cpt.time.monotonic() + 3) == cpt.UNFINISHED and (tmp_path / "saved").exists()
    failing = cpt.Task("fails", [sys.executable, "-c", "raise SystemExit(5)"], tmp_path / "done")
    assert cpt.run_task(failing, cpt.time.monotonic() + 60) == 5


def test_shell_scripts_are_sound():
    for path in sorted(GPU.glob("*.sh")):
        subprocess.run(["bash", "-n", path], check=True)
        assert len(f"bash {path.relative_to(GPU.parent.parent)}") < 2000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2_throughput", "3_ceiling", "5_cpt"])
def test_dry_runs(name, tmp_path):
    env = {
        **os.environ,
        "DRY_RUN": "1",
        "STATE": str(tmp_path / "state"),
        "OUT": str(tmp_path / "out"),
        "PYTHON": sys.executable,
    }
    done = subprocess.run(["bash", GPU / f"{name}.sh"], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode in ((0, 1) if name != "5_cpt" else (0,)), (done.stdout + done.stderr)[-4000:]
    if name == "5_cpt":
        found = json.loads((tmp_path / "out" / "cpt.json").read_text())
        runs = {(run["arm"], run["window"]): run for run in found["runs"]}
        assert found["finished"] == found["tasks"] == 4 and all(run["finished"] for run in runs.values())
        for window in (64, 128):  # the first step's loss is before any update, so that it is the base's, in both arms
            assert runs["baseline", 64]["first loss"] == pytest.approx(runs["exact", 64]["first loss"], rel=1e-6)
            assert runs["exact", window]["validation"]["buckets"]
    else:
        assert (tmp_path / "out" / ("cells.jsonl" if name == "2_throughput" else "profile_fused.jsonl")).exists()
