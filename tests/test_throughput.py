"""The throughput benchmark, dry on a CPU: what it counts, what it writes, and that a second call goes on."""

import argparse
import json
import subprocess
import sys

import numpy as np
import pytest

from exact_megatron import device_profile, throughput_benchmark
from exact_megatron.benchmark import interval
from exact_megatron.geometry import GEOMETRIES, Geometry, causal_pairs


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


def test_a_dry_run_goes_on_from_the_cells_that_are_there(tmp_path):
    """In a process of its own: the CPU runtime changes torch.cuda for good."""
    cells, result = tmp_path / "cells.jsonl", tmp_path / "result.json"
    known = cell("fp32", (1, 1, 1), (None,) * 3, 2) | {
        "window": 64,
        "GPU": "none",
        "overrides": [],
        "documents": "log-normal lengths",
    }
    other = known | {"overrides": ["model.bias=true"], "window": 128}
    first = json.dumps(known) + "\n" + json.dumps(other) + "\n"
    cells.write_text(first)
    command = [
        sys.executable,
        "-m",
        "exact_megatron",
        "benchmark",
        "throughput",
        "--step-tokens",
        "256",
        "--micro-tokens",
        "128",
    ]
    command += ["--blocks", "2", "--block-steps", "1", "--cells", str(cells), "--json", str(result), "--profile"]
    command += ["--windows", "64,128", "--until", "100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.stderr.count("throughput: tiny") == 1 and cells.read_text().startswith(first), done.stderr
    assert "tiny 64 fp32: EXACT" in done.stdout and "tiny 128 fp32: masked" in done.stdout
    rows = json.loads(result.read_text())["rows"]
    assert [row["name"] for row in rows] == [
        f"tiny {n} fp32: {what}" for n in (64, 128) for what in ("EXACT against baseline", "masked against causal")
    ]
    assert done.returncode == (0 if all(row["passed"] for row in rows) else 1)
    assert rows[0]["bar"] == "ratio >= 0.995" and rows[0]["passed"] == (rows[0]["ratio"] >= 0.995)

    found = json.loads(cells.read_text().splitlines()[2])
    g = GEOMETRIES["tiny"]
    assert tuple(found[key] for key in ("window", "layers", "step tokens", "micro-batch")) == (128, 2, 256, 1)
    assert found["parameters"] == 512 * 64 + 2 * (sum(a * b for a, b in g.layer_matrices().values()) + 2 * 64) + 64
    assert set(found["arms"]) == {"exact", "baseline", "causal"} and len(found["arms"]["exact"]["block s"]) == 2
    causal = found["arms"]["causal"]
    flops = g.step_flops(2, 256, 2 * causal_pairs([128]))
    assert causal["TFLOP/s"] == pytest.approx(flops / causal["step s"] / 1e12)
    assert found["attention share of FLOPs"]["exact"] < found["attention share of FLOPs"]["causal"]
    assert found["pieces"]["largest"] <= 128 and causal["peak GiB"] is None and causal["MFU"] is None
    assert abs(sum(found["profile"]["groups"].values()) - 1) < 1e-6 and 0 < found["loss end"]["share of the step"]


def cell(precision, seconds, peaks, layers=4):
    """One line of --cells, made up."""
    arms = {
        name: {"step s": s, "tokens/s": 1000 / s, "TFLOP/s": 1.0, "MFU": None, "peak GiB": p, "block s": [s, s]}
        for name, s, p in zip(throughput_benchmark.ARMS, seconds, peaks)
    }
    exact, baseline, causal = (np.array(arms[name]["block s"]) for name in throughput_benchmark.ARMS)
    pairs = {"EXACT against baseline": baseline / exact, "masked against causal": causal / baseline}
    compared = {name: {"ratio": float(np.median(r)), "interval": interval(r)} for name, r in pairs.items()}
    return {"geometry": "tiny", "window": 8192, "precision": precision, "layers": layers, "arms": arms, **compared}


def test_bars_and_precisions():
    good = cell("bf16", (1.004, 1.0, 1.5), (10.05, 10.0, 10.0))
    slow = cell("delayed", (0.51, 0.5, 0.75), (10.2, 10.0, 10.0))
    rows = {
        row.name: row for row in throughput_benchmark.rows_of([good, slow, cell("blockwise", (1, 1, 1), (1, 1, 1), 3)])
    }
    assert rows["tiny 8K bf16: EXACT against baseline"].passed and rows["tiny 8K bf16: memory"].passed
    assert not rows["tiny 8K delayed: EXACT against baseline"].passed and not rows["tiny 8K delayed: memory"].passed
    assert rows["tiny 8K delayed: FP8 against bf16"].ratio == pytest.approx(1.004 / 0.51)
    assert "tiny 8K blockwise: FP8 against bf16" not in rows  # another number of layers
    assert rows["tiny 8K bf16: masked against causal"].ratio == pytest.approx(1.5)


def test_layers_that_fit(monkeypatch):
    """Peaks 10 + 3 n GiB on a device of 80 GiB: 21 layers to 92 % of it, and no more than the geometry has."""
    import torch

    class Bench:
        def __init__(self, cell, args, layers, folder, rounds):
            self.arms, self.peaks = {"exact": lambda i: None}, {"exact": (10 + 3 * layers) * 2**30}

        def close(self):
            pass

    monkeypatch.setattr(throughput_benchmark, "Bench", Bench)
    device = argparse.Namespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    fit = lambda name: throughput_benchmark.layers_that_fit(throughput_benchmark.Cell(name, 8192, "bf16"), None, "")
    assert fit("llama-3-8b") == 21 and fit("llama-3.2-1b") == 16
    device.total_memory = 10 * 2**30
    assert fit("llama-3-8b") == 1


@pytest.mark.parametrize(("arguments", "message"), [
    (["--geometry", "llama-4"], "--geometry llama-4 is not one of"),
    (["--precisions", "fp16"], "--precisions fp16 is not one of"),
    (["--windows", "4K"], "--windows 4K: give numbers of tokens"),
    (["--blocks", "0"], "--blocks 0 must be at least 1"),
])  # fmt: skip
def test_arguments_are_checked(arguments, message, capsys):
    from exact_megatron.cli import main

    assert main(["benchmark", "throughput", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_ceiling(monkeypatch):
    monkeypatch.setattr(device_profile, "REPEATS", 2)
    setup, rows = device_profile.measure(argparse.Namespace(geometry="tiny", step_tokens=64))
    assert [row.name for row in rows][:2] == ["square 512 fp32", "tiny qkv fp32"] and rows[-1].unit == "TB/s"
    assert all(row.own > 0 for row in rows) and "64 tokens" in setup


@pytest.mark.parametrize(("kernel", "name"), [
    ("nvjet_qqtst_128x256_128x6_2x1_v_bz_coopA_NTN", "matrix products"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix products"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x128", "attention"),
    ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel", "norms"),
    ("transformer_engine::detail::cast_transpose_fused_kernel", "FP8 casts and scales"),
    ("multi_tensor_apply_kernel<AdamFunctorMaster>", "optimizer and gradient norm"),
    ("multi_tensor_apply_kernel<L2NormFunctor<float> >", "optimizer and gradient norm"),
    ("Memcpy DtoD (Device -> Device)", "copies"),
    ("triton_poi_fused_mul_silu_0", "elementwise and other"),
])  # fmt: skip
def test_groups_of_kernels(kernel, name):
    assert device_profile.group(kernel) == name


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
