"""The throughput benchmark, dry on a CPU: what it counts, what it writes, and that a second call goes on."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from exact_megatron.benchmark import ceiling, profile
from exact_megatron.benchmark.geometry import GEOMETRIES, Geometry
from exact_megatron.benchmark.throughput import jobs
from exact_megatron.benchmark.throughput.bench import ARMS
from exact_megatron.benchmark.throughput.cells import OPTIONS, Cell, asked_of, fixed_layers
from exact_megatron.benchmark.throughput.command import add_arguments
from exact_megatron.benchmark.throughput.results import compare_arms, rows_of
from exact_megatron.cli import main
from exact_megatron.config import ExactError
from exact_megatron.planning.flops import causal_pairs


def test_flops_by_brute_force():
    """Against a count of every product of a small decoder, document by document."""
    g = Geometry(3, 16, 40, 4, 2, 8, 50, False)
    lengths = [5, 1, 11]
    total = 0
    for n in lengths:
        for inputs, outputs in ((16, 32 + 2 * 16), (32, 16), (16, 80), (40, 16)):
            total += 3 * 2 * n * 6 * inputs * outputs // 6 * g.layers  # forward, and twice that in backward
        total += 3 * 2 * n * 16 * 50
        for query in range(n):
            total += 3 * 2 * (query + 1) * 8 * 2 * 4 * g.layers  # scores and values, in every head
    assert g.step_flops(3, sum(lengths), causal_pairs(lengths)) == total
    assert causal_pairs([4]) == 10 and causal_pairs([2**17] * 1000) == 1000 * 2**16 * (2**17 + 1)


def test_parameters_of_the_published_models():
    """1.24e9 and 8.03e9 parameters by their model cards; norms are left out here."""
    for name, millions in (("llama-3.2-1b", 1236), ("llama-3-8b", 8030)):
        g = GEOMETRIES[name]
        embeddings = g.hidden * g.vocabulary * (1 if g.tied else 2)
        assert round((g.layers * sum(a * b for a, b in g.layer_matrices().values()) + embeddings) / 1e6) == millions


SMALL = ["--step-tokens", "256", "--micro-tokens", "128", "--blocks", "2", "--block-steps", "1"]


def run(*arguments):
    """(exit code, JSON result) of the benchmark in this process; its cells are in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        code = main(["benchmark", "throughput", *SMALL, *arguments, "--json", f"{folder}/result.json"])
        return code, json.loads(Path(folder, "result.json").read_text())


def asked(*given):
    """What SMALL and these arguments ask for, where there is no GPU."""
    return asked_of(arguments(*SMALL, *given), "none")


def cell(precision, seconds, peaks, layers=4):
    """One line of --cells, made up."""
    arms = {
        name: {
            "step s": s,
            "tokens/s": 1000 / s,
            "TFLOP/s": 1.0,
            "MFU": None,
            "peak GiB": p,
            "block s": [s, s],
            "block GiB": [p, p],
        }
        for name, s, p in zip(ARMS, seconds, peaks)
    }
    found = {
        "geometry": "tiny",
        "window": 8192,
        "precision": precision,
        "layers": layers,
        "arms": arms,
        "step tokens": 1000,
    }
    found |= {
        "repeated": [],
        "proof": {"tokens": "70ce75"},
        "overrides": [],
        "documents": "log-normal lengths",
        "GPU": "none",
    }
    if peaks[0] is None:
        for arm in arms.values():
            arm["block GiB"] = []
    compare_arms(found)
    return found


def test_a_dry_run_goes_on_from_the_cells_that_are_there(tmp_path, capfd):
    """One cell is measured; one is there, one has other overrides, one no proof. The model is gone with its process."""
    cells = tmp_path / "cells.jsonl"
    options = ["--cells", str(cells), "--profile", "--windows", "64,128"]
    known = cell("fp32", (1, 1, 1), (None,) * 3, 2) | {"window": 64, "asked": asked(*options)}
    other = known | {"asked": asked(*options, "model.bias=true"), "window": 128}
    unproved = {key: value for key, value in known.items() if key != "proof"} | {"window": 128}
    first = "".join(json.dumps(line) + "\n" for line in (known, other, unproved))
    cells.write_text(first)
    code, result = run(*options, "--until", "100")
    said = capfd.readouterr()
    assert re.findall("throughput: tiny .* fp32$", said.err, re.MULTILINE) == [
        "throughput: tiny 128 fp32"
    ] and cells.read_text().startswith(first), said.err
    assert "tiny 64 fp32: EXACT" in said.out and "tiny 128 fp32: masked" in said.out
    rows = result["rows"]
    assert [row["name"] for row in rows] == [
        f"tiny {n} fp32: {what}" for n in (64, 128) for what in ("EXACT against baseline", "masked against causal")
    ]
    assert code == (0 if all(row["passed"] for row in rows) else 1)
    assert rows[0]["bar"] == "ratio >= 0.998" and rows[0]["passed"] == (rows[0]["ratio"] >= 0.998)

    found = json.loads(cells.read_text().splitlines()[3])
    proof = found["proof"]
    assert proof["tail targets"] > 0 and proof["loss mask of exact"] != proof["loss mask of baseline"]
    assert f"tokens {proof['tokens']}, weight table {proof['weight table']}" in said.out
    assert found["process"] != os.getpid() and not psutil.pid_exists(found["process"]) and found["repeated"] == []
    g = GEOMETRIES["tiny"]
    assert tuple(found[key] for key in ("window", "layers", "step tokens", "micro-batch")) == (128, 2, 256, 1)
    assert found["parameters"] == 512 * 64 + 2 * (sum(a * b for a, b in g.layer_matrices().values()) + 2 * 64) + 64
    assert set(found["arms"]) == {"exact", "baseline", "causal"} and len(found["arms"]["exact"]["block s"]) == 2
    causal = found["arms"]["causal"]
    flops = g.step_flops(2, 256, 2 * causal_pairs([128]))
    assert causal["TFLOP/s"] == pytest.approx(flops / causal["step s"] / 1e12)
    assert found["attention share of FLOPs"]["exact"] < found["attention share of FLOPs"]["causal"]
    assert found["segments"]["largest"] <= 128 and causal["peak GiB"] is None and causal["MFU"] is None
    assert abs(sum(found["profile"]["groups"].values()) - 1) < 1e-6 and 0 < found["loss end"]["share of the step"]


def test_a_cell_without_memory_is_repeated_with_a_layer_fewer(monkeypatch, capfd):
    """Processes that are made up: 5 layers fit, in fp32 and bf16; of the window of 128 not even one does."""
    tried = []

    def job(spec):
        tried.append((spec["cell"]["window"], spec["cell"]["precision"], spec["layers"]))
        if spec["layers"] > 5 or spec["cell"]["window"] == 128:
            raise jobs.OutOfMemory("CUDA out of memory. Tried to allocate 2 GiB")
        return cell(spec["cell"]["precision"], (1, 1, 1), (1, 1, 1), spec["layers"]) | {"window": 64}

    monkeypatch.setattr(jobs, "start_job", job)
    code, result = run("--layers", "7", "--windows", "64", "--precisions", "blockwise,fp32")
    assert code == 0 and tried == [(64, "fp32", n) for n in (7, 6, 5)] + [(64, "blockwise", n) for n in (7, 6, 5)]
    said = capfd.readouterr()
    assert "tiny 64 fp32 with 7 layers: CUDA out of memory. Tried to allocate 2 GiB; again with 6" in said.err
    again = result["out of memory, repeated with a layer fewer"]
    assert "tiny 64 blockwise with 6 layers" in again and again in said.out
    code, result = run("--layers", "2", "--windows", "128,64", "--precisions", "fp32")
    assert code == 2
    failure = "tiny 128 fp32: not even one layer fits, lower --micro-tokens: CUDA out of memory"
    assert failure in capfd.readouterr().err and failure in result["not measured"]
    assert tried[-1] == (64, "fp32", 2) and len(result["rows"]) == 3  # the other cells are measured all the same


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (["--layers", "1"], "layers None, not 1"),
        (["--step-tokens", "512"], "step_tokens 256, not 512"),
        (["--micro-tokens", "64"], "micro_tokens 128, not 64"),
        (["--block-steps", "2"], "block_steps 1, not 2"),
        (["--prefix", "long/corpus"], "documents lengths of corpus.idx (.*), not lengths of corpus.idx (.*)"),
    ],
)
def test_cells_of_another_command_are_measured_again(monkeypatch, write_corpus, tmp_path, capfd, other, said):
    """Two corpora of one name in two folders, and each option that changes what is measured."""
    monkeypatch.chdir(tmp_path)
    for folder, length in (("short", 20), ("long", 300)):
        Path(folder).mkdir()
        for made in Path(write_corpus(np.full(20, length), folder + ".made")).parent.glob(f"{folder}.made*"):
            made.rename(tmp_path / folder / f"corpus{made.suffix}")

    def job(spec):
        return cell("fp32", (1, 1, 1), (None,) * 3, spec["layers"]) | {"window": 64}

    monkeypatch.setattr(jobs, "start_job", job)
    given = ["--windows", "64", "--precisions", "fp32", "--prefix", "short/corpus", "--cells", "cells.jsonl"]

    def count():
        return len(Path("cells.jsonl").read_text().splitlines())

    for more, lines in (([], 1), ([], 1), (other, 2), (other, 2), ([], 2)):
        before = count() if Path("cells.jsonl").exists() else 0
        assert run(*given, *more)[0] == 0 and count() == lines
        named = re.search(f"tiny 64 fp32 of cells.jsonl does not count here: {said}", capfd.readouterr().err)
        assert (named is not None) == (before == 1 and lines == 2)  # measured again, and it says why


def test_a_failing_cell_leaves_the_others(monkeypatch, tmp_path, capfd):
    """Processes that are made up: one fails, one is interrupted after its blocks were timed, the last is never begun."""
    tried = []

    def job(spec):
        tried.append(spec["cell"]["window"])
        if tried[-1] == 64:
            raise ExactError("the process ended with exit code 1")
        made = cell("fp32", (1, 1, 1), (None,) * 3, 2) | {"window": tried[-1]}
        return made | ({"exit code": 130} if tried[-1] == 256 else {})

    monkeypatch.setattr(jobs, "start_job", job)
    given = ["--precisions", "fp32", "--cells", str(tmp_path / "cells.jsonl"), "--windows"]
    code, result = run(*given, "64,128")
    assert code == 2 and tried == [64, 128] and len(result["rows"]) == 2
    assert result["not measured"] == "tiny 64 fp32: the process ended with exit code 1"
    assert "tiny 64 fp32: the process ended with exit code 1. Everything else is measured" in capfd.readouterr().err
    code, result = run(*given, "128,256,512")
    assert code == 130 and tried == [64, 128, 256] and "interrupted" in result and len(result["rows"]) == 4
    assert "tiny 256 fp32: the process ended with exit code 130 while it was profiled" in result["not measured"]
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 2


def test_an_interrupt_leaves_what_is_measured(monkeypatch):
    """SIGINT in the second cell's process, and in the third product of `ceiling`."""

    def job(spec):
        if spec["cell"]["window"] == 128:
            raise KeyboardInterrupt
        return cell("fp32", (1, 1, 1), (None,) * 3, 2) | {"window": 64}

    monkeypatch.setattr(jobs, "start_job", job)
    code, result = run("--precisions", "fp32", "--windows", "64,128,256")
    assert code == 130 and len(result["rows"]) == 2 and "by SIGINT" in result["interrupted"]

    rates = iter([1.0, 1.0, RuntimeError("CUDA out of memory\nmore"), 2.0, KeyboardInterrupt()])

    def product(*_):
        rate = next(rates)
        if isinstance(rate, BaseException):
            raise rate
        return {"TFLOP/s": rate}

    monkeypatch.setattr(ceiling, "product", product)
    facts, rows = ceiling.measure(argparse.Namespace(geometry="tiny", step_tokens=64))
    assert [row.own for row in rows] == [1.0, 2.0] and "interrupted" in facts
    assert facts["not measured"] == "tiny qkv fp32: CUDA out of memory"


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), ValueError("other"), KeyboardInterrupt()])
def test_a_profile_that_fails_leaves_the_timed_blocks(monkeypatch, tmp_path, error):
    def fails(*given):
        given[-1]({"arms": "timed"})
        raise error

    monkeypatch.setattr(jobs, "measure_cell", fails)
    spec = {"job": "cell", "options": {}, "cell": vars(Cell("tiny", 64, "fp32")), "layers": 1, "peak": None}
    Path(tmp_path, "spec.json").write_text(json.dumps(spec))
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError, match="out of memory"):  # with its traceback
            jobs.main([str(tmp_path / "spec.json"), str(tmp_path / "result.json")])
    else:
        assert jobs.main([str(tmp_path / "spec.json"), str(tmp_path / "result.json")]) in (2, 130)
    assert json.loads(Path(tmp_path, "result.json").read_text()) == {"result": {"arms": "timed"}}

    def process(command, **_):
        Path(command[-1]).write_text(json.dumps({"result": {"arms": "timed"}}))
        if isinstance(error, KeyboardInterrupt):
            raise error
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(jobs.subprocess, "run", process)
    code = 130 if isinstance(error, KeyboardInterrupt) else 1
    assert jobs.start_job(spec) == {"arms": "timed", "exit code": code}


@pytest.mark.parametrize(
    ("error", "caught"),
    [
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            {"out of memory": "CUDA out of memory. Tried"},
        ),
        (RuntimeError("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED"), {"out of memory": "cuBLAS: CUBLAS_STATUS_ALLOC_FAILED"}),
        (RuntimeError("shape mismatch"), None),
    ],
)
def test_a_job_tells_a_lack_of_memory_from_other_errors(monkeypatch, error, caught):
    def fails(*_):
        raise error

    monkeypatch.setattr(jobs, "measure_cell", fails)
    cell = {"geometry": "tiny", "window": 64, "precision": "fp32"}
    spec = {"job": "cell", "options": {}, "cell": cell, "layers": 1, "peak": None}
    written = []
    if caught:
        jobs.run_job(spec, written.append)
        assert written == [caught]
    else:
        with pytest.raises(RuntimeError, match="shape mismatch"):
            jobs.run_job(spec, written.append)


def test_a_job_that_fails_is_named():
    """A real process, which cannot find the documents."""
    options = {name: None for name in OPTIONS} | {
        "prefix": "/nowhere",
        "overrides": ["model.nonsense=1"],
    }
    options |= {"step_tokens": 64, "micro_tokens": 64, "blocks": 1, "block_steps": 1}
    cell = {"geometry": "tiny", "window": 64, "precision": "fp32"}
    with pytest.raises(ExactError, match="measures .*'window': 64.* ended with exit code 2; its messages are above"):
        jobs.start_job({"job": "cell", "options": options, "cell": cell, "layers": 1, "peak": None})


def test_bars_and_precisions():
    good = cell("bf16", (1.001, 1.0, 1.5), (10.05, 10.0, 10.0))
    slow = cell("delayed", (0.503, 0.5, 0.75), (10.2, 10.0, 10.0))
    rows = {row.name: row for row in rows_of([good, slow, cell("blockwise", (1, 1, 1), (1, 1, 1), 3)])}
    assert rows["tiny 8K bf16: EXACT against baseline"].passed and rows["tiny 8K bf16: memory"].passed
    assert rows["tiny 8K bf16: memory"].interval == pytest.approx((1.005, 1.005))
    assert not rows["tiny 8K delayed: EXACT against baseline"].passed and not rows["tiny 8K delayed: memory"].passed
    fp8 = rows["tiny 8K delayed: FP8 against bf16"]
    assert fp8.ratio == pytest.approx(1.001 / 0.503) and fp8.interval == pytest.approx((fp8.ratio, fp8.ratio))
    assert "tiny 8K blockwise: FP8 against bf16" not in rows  # another number of layers
    assert rows["tiny 8K bf16: masked against causal"].ratio == pytest.approx(1.5)


def arguments(*given):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.add_argument("--json")
    return parser.parse_args([*given])


def test_layers_are_chosen_without_a_trial():
    """By planning/memory.py: alike in all precisions, the geometry's at most, fewer in longer windows and with less memory."""
    args = arguments("--geometry", "llama-3-8b,llama-3.2-1b")

    def cells(name, window, *kinds):
        return [Cell(name, window, kind) for kind in kinds]

    def fit(*cell, gib=79):
        return fixed_layers(cells(*cell), args, gib)

    assert fit("llama-3.2-1b", 8192, "bf16") == 16
    both = fit("llama-3-8b", 8192, "bf16", "blockwise")
    assert 32 > fit("llama-3-8b", 8192, "bf16") >= both == fit("llama-3-8b", 8192, "delayed") > 1
    # FP8's copies of the weights cost a layer here, also in the cells that are bf16.
    assert fit("llama-3-8b", 16384, "bf16", "tensorwise") < fit("llama-3-8b", 16384, "bf16")
    assert fit("llama-3-8b", 8192, "bf16", gib=139) > fit("llama-3-8b", 8192, "bf16") > fit("llama-3-8b", 32768, "bf16")
    assert fit("llama-3-8b", 8192, "bf16", gib=10) == 1 and fit("llama-3-8b", 8192, "bf16", gib=None) == 32
    args.layers = 5
    assert fit("llama-3-8b", 8192, "bf16") == 5


def test_a_line_of_cells_that_was_cut_off_is_named(tmp_path, capsys):
    path = tmp_path / "cells.jsonl"
    path.write_text(json.dumps(cell("fp32", (1, 1, 1), (None,) * 3)) + '\n{"geome')
    assert main(["benchmark", "throughput", *SMALL, "--cells", str(path)]) == 2
    assert f"{path}, line 2 is no JSON" in capsys.readouterr().err


def test_trial_layers_if_asked(monkeypatch):
    """Peaks of 10 + 3 n GiB on a device of 80 GiB: 20 layers to 85 % of it, and no more than the geometry has."""

    def job(spec):
        return {"peak": (10 + 3 * spec["layers"]) * 2**30}

    monkeypatch.setattr(jobs, "start_job", job)

    def fit(name, gib):
        return jobs.trial_layers(Cell(name, 8192, "bf16"), {}, gib)

    assert fit("llama-3-8b", 80) == 19 and fit("llama-3.2-1b", 80) == 16 and fit("llama-3-8b", 10) == 1

    def one(spec):
        if spec["layers"] > 1:
            raise jobs.OutOfMemory("CUDA out of memory")
        return job(spec)

    monkeypatch.setattr(jobs, "start_job", one)
    assert fit("llama-3-8b", 80) == 1


def test_plan_counts_flops_at_an_assumed_utilisation(tmp_path, capsys):
    where = tmp_path / "plan.json"
    plan = [
        "--plan",
        "--json",
        str(where),
        "--geometry",
        "llama-3.2-1b",
        "--windows",
        "8192",
        "--layers",
        "16",
        "--precisions",
    ]
    more = ["--blocks", "20", "--block-steps", "2", "--assume-mfu", "0.5", "--peak", "1000", "--assume-start", "7"]
    given = ["benchmark", "throughput", *plan, "blockwise,bf16", *more]
    assert main([*given, "--cell-seconds", "1000"]) == 0
    bf16, blockwise = json.loads(where.read_text())["cells"]
    flops = GEOMETRIES["llama-3.2-1b"].step_flops(16, 32768, 4 * causal_pairs([8192]))
    assert bf16["step FLOPs"] == flops and bf16["step s"] == pytest.approx(flops / 5e14) and bf16["blocks"] == 20
    assert (
        bf16["s"] == pytest.approx(7 + 22 * 3 * 2 * flops / 5e14) and blockwise["cell"] == "llama-3.2-1b 8K blockwise"
    )
    printed = capsys.readouterr().out
    assert "at an assumed 0.5 of 1000 TFLOP/s" in printed and "nothing is measured" in printed
    assert main([*given, "--cell-seconds", "1"]) == 0
    assert json.loads(where.read_text())["cells"][0]["blocks"] == 8  # pairs, at least
    # Every job: the device's, and two trials of a window. What is counted is what Cell.settings makes: 3 windows a step.
    assert main([*given, "--micro-tokens", "24576"]) == 0
    planned = json.loads(where.read_text())
    assert planned["cells"][0]["step FLOPs"] == pytest.approx(flops * 3 / 4) and planned["other jobs"] == {"device": 7}
    assert planned["minutes"] * 60 == pytest.approx(7 + sum(entry["s"] for entry in planned["cells"]))
    assert main([*given, "model.global_batch_size=8"]) == 0
    assert json.loads(where.read_text())["cells"][0]["step FLOPs"] == pytest.approx(flops * 2)
    trials = [word for word in given if word not in ("--layers", "16")]
    assert main([*trials, "--trial-layers"]) == 0 and len(json.loads(where.read_text())["other jobs"]) == 3
    capsys.readouterr()
    assert main([*given, "--assume-mfu", "0"]) == 2 and "--assume-mfu 0 must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--geometry", "llama-4"], "--geometry llama-4 is not one of"),
        (["--precisions", "fp16"], "--precisions fp16 is not one of"),
        (["--windows", "4K"], "--windows 4K: give numbers of tokens"),
        (["--blocks", "0"], "--blocks 0 must be at least 1"),
        (
            ["--blocks", "7", "--geometry", "tiny,llama-3-8b"],
            "--blocks 7: the median over fewer than 8 pairs of blocks",
        ),
        (["--windows", "64", "model.nonsense=1"], "model.nonsense"),  # before any process is started
    ],
)
def test_arguments_are_checked(arguments, message, capsys):
    assert main(["benchmark", "throughput", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_ceiling(monkeypatch):
    monkeypatch.setattr(ceiling, "REPEATS", 2)
    monkeypatch.setattr(profile, "REPEATS", 2)
    facts, rows = ceiling.measure(argparse.Namespace(geometry="tiny", step_tokens=64))
    assert [row.name for row in rows][:2] == ["square 512 fp32", "tiny qkv fp32"] and rows[-1].unit == "TB/s"
    assert all(row.own > 0 for row in rows) and "64 tokens" in facts["setup"]


def test_profiles_count_a_kernel_once():
    """A made-up GPU profile: two kernels in an operator's and an annotation's event, which spans the gap between them too."""
    from torch.autograd import DeviceType

    def event(key, device, own, cpu, count=1, annotation=False):
        return SimpleNamespace(
            key=key,
            device_type=device,
            self_device_time_total=own,
            self_cpu_time_total=cpu,
            count=count,
            is_user_annotation=annotation,
        )

    events = [
        event("nvjet_gemm", DeviceType.CUDA, 300.0, 0, 2),
        event("nvjet_gemm", DeviceType.CUDA, 100.0, 0),  # another key of the profiler's, as with other shapes
        event("Memcpy DtoD", DeviceType.CUDA, 50.0, 0),
        event("aten::mm", DeviceType.CPU, 400.0, 20.0, 3),
        event("cudaLaunchKernel", DeviceType.CPU, 0.0, 5.0, 3),
        event("Optimizer.step#FusedAdam.step", DeviceType.CUDA, 900.0, 0, 1, True),
        event("Optimizer.step#FusedAdam.step", DeviceType.CPU, 0, 900.0, 1, True),
    ]
    assert profile.kernel_times(events, cuda=True) == {
        "nvjet_gemm": (pytest.approx(400e-6), 3),
        "Memcpy DtoD": (pytest.approx(50e-6), 1),
    }
    assert set(profile.kernel_times(events, cuda=False)) == {"aten::mm", "cudaLaunchKernel"}


def test_profile_of_annotated_work():
    """torch's own profiler on a CPU: the annotation is no part of the table."""

    def step():
        with torch.profiler.record_function("annotation of a whole step"):
            torch.ones(64, 64) @ torch.ones(64, 64)

    table = profile.kernel_table(step, torch.device("cpu"))
    names = [kernel["name"] for kernel in table["kernels"]]
    assert "aten::mm" in names and not any("annotation" in name for name in names)
    assert sum(table["groups"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("nvjet_qqtst_128x256_128x6_2x1_v_bz_coopA_NTN", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x128", "attention"),
        ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel", "norms"),
        ("transformer_engine::detail::cast_transpose_fused_kernel", "FP8 casts and scales"),
        ("multi_tensor_apply_kernel<AdamFunctorMaster>", "optimizer and gradient norm"),
        ("multi_tensor_apply_kernel<L2NormFunctor<float> >", "optimizer and gradient norm"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("triton_poi_fused_mul_silu_0", "elementwise and other"),
    ],
)
def test_groups_of_kernels(kernel, name):
    assert profile.group(kernel) == name


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "delayed", "tensorwise", "blockwise"])
def test_on_a_gpu(precision, tmp_path):
    cells = tmp_path / "cells.jsonl"
    command = [
        sys.executable,
        "-m",
        "exact_megatron",
        "benchmark",
        "throughput",
        "--windows",
        "1024",
        "--precisions",
        precision,
    ]
    command += [
        "--step-tokens",
        "4096",
        "--micro-tokens",
        "2048",
        "--blocks",
        "2",
        "--cells",
        str(cells),
        "--layers",
        "2",
    ]
    done = subprocess.run([*command, "--profile"], capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr[-4000:]
    found = json.loads(cells.read_text())
    assert found["peak TFLOP/s"] > 50 and found["arms"]["exact"]["peak GiB"] > 0 and found["profile"]["device s"] > 0
