"""The scripts of benchmarks/gpu, as far as a CPU shows: the page they end in (from made-up numbers), parts, plans, dry runs."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from exact_megatron.benchmark.throughput import compare_arms

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"


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
        "pieces": {"median": 400.0, "mean": 830.0, "largest": window},
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
    te = {
        "gpu": "FIXTURE",
        "torch": "0.0",
        "Linear/bf16": {"ok": True, "s": 1, "y": 0.0021},
        "thd": {"ok": False, "error": "no kernel"},
    }
    write("te.json", json.dumps(te))
    tests = [("a", "begun"), ("a", "failed"), ("a", "passed"), ("b[bf16]", "failed"), ("c", "skipped"), ("d", "begun")]
    tests = [
        {"code": "c0de", "test": name, "outcome": outcome, "message": f"{outcome} here"} for name, outcome in tests
    ]
    write("tests.jsonl", "".join(json.dumps(line) + "\n" for line in tests))
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
        "cpt.json",
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
    write("machine.txt", "Transformer Engine 0.0 fixture\nsecond line\nTransformer Engine 0.0 fixture\n")
    write("commands.txt", "$ python -m exact_megatron benchmark throughput\n")
    return tmp_path


def test_report_of_a_fixture(results, tmp_path):
    page = report.write(results, tmp_path / "docs", "A fixture.")
    text = page.read_text()
    assert page.name == "2000-01-02-fixture-no-real-gpu.md" and page.with_suffix(".png").stat().st_size > 10_000
    for words in (
        "2 of 4 cells keep it",
        "0.9712 (0.9712 to 0.9712)",
        "42.00 / 40.00",
        "1.0500 (1.0500 to 1.0500)",
        "412.5",
        "777.0 TFLOP/s",
        "Linear/bf16 | passed | y 0.0021",
        "thd | **failed** | no kernel",
        "1 passed, 1 failed, 1 skipped, 1 begun and not ended",
        "* b[bf16]: failed: failed here",
        "* d: begun",
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
    assert text.count("    Transformer Engine 0.0 fixture\n    second line\n") == text.count("Transformer Engine") == 1
    assert text.count("**missed**") == 2 and "Not measured" not in text


def test_report_says_what_is_missing(results, tmp_path):
    for name in ("cells.jsonl", "cpt.json", "te.json", "tests.jsonl"):
        (results / name).unlink()
    assert report.write(results, tmp_path / "docs").read_text().count("Not measured.") == 3
    (results / "ceiling.json").write_text(json.dumps(FIXTURE | {"GPU": "another", "setup": "", "rows": []}))
    with pytest.raises(ValueError, match="mixes results of"):
        report.write(results, tmp_path / "docs")
    (tmp_path / "dry").mkdir()
    (tmp_path / "dry" / "ceiling.json").write_text(json.dumps(FIXTURE | {"GPU": "none", "setup": "", "rows": []}))
    with pytest.raises(ValueError, match="dry run on a CPU"):
        report.write(tmp_path / "dry", tmp_path / "docs")
    (tmp_path / "old").mkdir()
    cell = {key: value for key, value in invented_cell("bf16", 1.0, 1.0).items() if key != "proof"}
    (tmp_path / "old" / "cells.jsonl").write_text(json.dumps(cell) + "\n")
    with pytest.raises(ValueError, match="without a proof that their arms differ: llama-3-8b, 6 layers, 8,192, bf16"):
        report.write(tmp_path / "old", tmp_path / "docs")
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
    everything = cpt.plan(cpt.parse(PLAN))
    tasks = [task for task in everything if "exact_megatron.benchmark.arms" not in task.command]
    trained = [task for task in tasks if task.command[3] == "train"]
    assert len(trained) == 8 and len(tasks) == 8 + 2 * 4 + 2
    assert [task.name[:4] for task in everything[:6]] == ["arms", "seed", "seed"] * 2  # the proof comes before the pair
    proof = everything[0].command[5:]
    assert (
        proof[0] == str(everything[0].done) == "runs/arms/seed1/exact/4096.json" and proof[1:] == trained[1].command[4:]
    )
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
    )[6:]
    assert [task.command[3] for task in ruler] == ["convert", "convert", "evaluate", "evaluate", "evaluate"]
    assert ruler[2].command[4] == ruler[0].command[-1] == "runs/hf/seed1/baseline"
    assert ruler[2].command[-5:] == ["--lengths", "8192", "16384", "--limit", "5"]
    knob = cpt.plan(cpt.parse([*PLAN, "--arms", "baseline", "more:alpha=0.5,gamma=1", "--suites"]))
    assert {"model.exact.enabled=true", "model.exact.alpha=0.5", "model.exact.gamma=1"} < set(knob[2].command)
    assert len(knob) == 8 + 4 and {"model.exact.alpha=0.5", "model.exact.gamma=1"} < set(knob[0].command)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arms", "exact:alpha"], "--arms exact:alpha: give NAME"),
        (["--arms", "baseline:alpha=1"], "baseline has no settings"),
        (["--stages", "4096:70000"], "--stages 4096:70000: 1 steps of 16 windows"),
        (["--stages", "131072:1e9"], "1 steps|0 windows"),
    ],
)
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


def test_cpt_refuses_a_run_that_was_not_weighted_as_its_arm(tmp_path, monkeypatch):
    """Processes that are made up: the proof is written, the baseline trains, the exact arm trains without weights."""
    args = [
        "--base",
        "b",
        "--config",
        "m.yaml",
        "--data",
        "d",
        "--folder",
        str(tmp_path),
        "--stages",
        "64:2048",
        "--step-tokens",
        "512",
    ]

    def ran(task, deadline):
        task.done.parent.mkdir(parents=True, exist_ok=True)
        task.done.write_text('{"weight table": "7ab1e", "tokens": "70ce75"}')
        if task.command[3] == "train":
            line = {"step": 4, "lm_loss": 2.0, "exact_loss": 2.0, "tokens": 2048, "tokens_per_s": 1.0}
            (task.done.parents[2] / "metrics.jsonl").write_text(json.dumps(line) + "\n")
            (task.done.parents[2] / "validation.jsonl").touch()
        return 0

    monkeypatch.setattr(cpt, "run_task", ran)
    with pytest.raises(ValueError, match="exact/64 should be weighted by the table 7ab1e; it has None"):
        cpt.main([*args, "--micro-tokens", "256", "--suites"])


def test_archive_leaves_out_weights_and_keeps_to_its_limit(tmp_path):
    rng = np.random.default_rng(0)
    runs, archive = tmp_path / "cpt", tmp_path / "cpt.tar.gz"
    for name, size in {
        "seed1/exact/4096/metrics.jsonl": 3000,
        "seed1/exact/4096/checkpoints/step_1/metadata.json": 10,
        "seed1/exact/4096/model.pt": 10,
        "hf/seed1/exact/model.safetensors": 500_000,
        "hf/seed1/exact/tokenizer.json": 90_000,
        "index/x.npy": 10,
        "evaluation/seed1/exact/items.jsonl": 40_000,
        "evaluation/seed1/report.md": 2000,
        "cpt.json": 100,
    }.items():
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).write_bytes(rng.bytes(size))
    kept = {"seed1/exact/4096/metrics.jsonl", "evaluation/seed1/report.md", "cpt.json"}
    items = "evaluation/seed1/exact/items.jsonl"

    def names():
        return set(tarfile.open(archive).getnames())

    assert cpt.pack(runs, archive, 100_000) == {} and names() == {*kept, items}
    assert cpt.pack(runs, archive, 10_000) == {items: 40_000} and names() == kept and archive.stat().st_size <= 10_000
    assert not (tmp_path / "cpt.tar.gz.partial").exists()


TESTS = """
import time
def test_slow(): time.sleep(60)
def test_first(): pass
def test_fails(): assert 1 == 2, "too far"
def test_last(): pass
"""


def session(folder, tests, limit=60):
    """(exit code, {test: outcome} in the order of the record) of a real pytest run under env.sh's `run`, INT ignored at the start."""
    (folder / "test_small.py").write_text("import sys, time\n" + tests)
    (folder / "pytest.ini").touch()
    command = (
        f"trap '' INT; . {GPU}/env.sh; cd {folder}; PYTHONPATH={GPU} run {limit} {sys.executable} -m pytest -q -p record "
        f"-p no:cacheprovider --rootdir {folder} --record {folder}/tests.jsonl test_small.py"
    )
    env = {**os.environ, "DRY_RUN": "1", "OUT": str(folder), "STATE": str(folder / "state"), "PYTHON": sys.executable}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=100)
    lines = [json.loads(line) for line in (folder / "tests.jsonl").read_text().splitlines()]
    return done, [(line["test"].split("::")[1], line["outcome"]) for line in lines], lines


def test_an_interrupted_session_keeps_its_outcomes_and_goes_on(tmp_path):
    """The second test hangs: at the limit INT ends pytest in order. Then nothing that passed is run again, and what hung comes last."""
    first = "def test_first(): pass\n" + TESTS.replace("def test_first(): pass\n", "")
    done, outcomes, _ = session(tmp_path, first, limit=6)
    assert outcomes == [("test_first", "begun"), ("test_first", "passed"), ("test_slow", "begun")]
    assert (
        "KeyboardInterrupt" in done.stdout and "1 passed" in done.stdout and done.returncode
    )  # pytest's own report, too
    with (tmp_path / "tests.jsonl").open("a") as file:
        file.write('{"code": "cut o')
    with pytest.raises(json.JSONDecodeError):
        session(tmp_path, first.replace("time.sleep(60)", "pass"))
    text = (tmp_path / "tests.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines() if "cut o" not in line][3:]
    ended = [(line["test"].split("::")[1], line["outcome"]) for line in lines if line["outcome"] != "begun"]
    assert ended == [("test_fails", "failed"), ("test_last", "passed"), ("test_slow", "passed")]
    assert "too far" in lines[1]["message"] and lines[1]["seconds"] >= 0


def test_outcomes_of_other_code_do_not_count(tmp_path):
    record = script("record")
    written = [("a", "x", "passed"), ("b", "y", "passed"), ("b", "x", "begun")]
    path = tmp_path / "tests.jsonl"
    path.write_text("".join(json.dumps({"code": c, "test": t, "outcome": o}) + "\n" for c, t, o in written) + "{")
    assert record.read(path, "a") == {"x": "passed"} and record.read(path, "b") == {"y": "passed", "x": "begun"}
    assert record.read(tmp_path / "none", "a") == {} and len(record.code_digest()) == 16


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
        assert len(found_arms := list((tmp_path / "state" / "cpt" / "arms").rglob("*.json"))) == 2, found_arms
        assert "cpt.json" in (names := tarfile.open(tmp_path / "out" / "cpt.tar.gz").getnames())
        assert not any("checkpoints" in name for name in names)
        found = json.loads((tmp_path / "out" / "cpt.json").read_text())
        runs = {(run["arm"], run["window"]): run for run in found["runs"]}
        assert found["finished"] == found["tasks"] == 6 and all(run["finished"] for run in runs.values())
        for window in (64, 128):  # the first step's loss is before any update, so that it is the base's, in both arms
            assert runs["baseline", 64]["first loss"] == pytest.approx(runs["exact", 64]["first loss"], rel=1e-6)
            assert runs["exact", window]["validation"]["buckets"]
    else:
        assert (tmp_path / "out" / ("cells.jsonl" if name == "2_throughput" else "profile_fused.jsonl")).exists()
