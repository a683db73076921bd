"""The GPU benchmark and the paired training of slurm/, without Slurm, with tiny sizes on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from exact_megatron.benchmark.synthetic import write_corpus

SCRIPTS = Path(__file__).parents[2] / "slurm"


def script(name, *arguments, **settings):
    """Standard output and error of a script of slurm/, and its exit code."""
    outside = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    environment = {**outside, "PYTHON": sys.executable, "MIN_FREE_GB": "0", **settings}
    command = ["bash", str(SCRIPTS / name), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    return done.stdout + done.stderr, done.returncode


@pytest.mark.slow
def test_gpu_benchmark(tmp_path):
    said, code = script("gpu_benchmark.sbatch", tmp_path, "proof", "throughput", "profile", DRY_RUN="1")
    assert code in (0, 1), said[-4000:]  # 1: a bar is missed, which times on a busy CPU may
    assert json.loads((tmp_path / "proof.json").read_text())["arms"]["tiny 64 fp32"]
    cells = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert [(cell["window"], len(cell["overrides"])) for cell in cells] == [(64, 0), (128, 0), (64, 1)]
    for name in ("profile", "profile_fused"):
        assert "kernels" in json.loads((tmp_path / f"{name}.jsonl").read_text())["profile"]
    assert json.loads((tmp_path / "ceiling.json").read_text())["rows"]
    again, code = script("gpu_benchmark.sbatch", tmp_path, "throughput", "report", DRY_RUN="1")
    assert "throughput: tiny" not in again and "results of a dry run on a CPU" in again and code == 2, again[-4000:]


@pytest.mark.slow
def test_plan_of_the_gpu_benchmark(tmp_path):
    """The published geometries' cells: nothing is measured."""
    said, code = script("gpu_benchmark.sbatch", tmp_path, "plan")
    assert code == 0 and "all cells:" in said, said[-4000:]
    plans = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("plan_*.json"))]
    assert sum(len(plan["cells"]) for plan in plans) == 22 and not (tmp_path / "cells.jsonl").exists()


@pytest.mark.slow
def test_paired_training(tmp_path):
    """A base of random weights, two windows, both arms."""
    write_corpus(f"{tmp_path}/corpus", 60_000)
    write_corpus(f"{tmp_path}/corpus_valid", 8_000)
    model = "{num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, num_query_groups: 2}"
    (tmp_path / "model.yaml").write_text(f"model: {model}\n")
    base = f"--config {tmp_path}/model.yaml model.data.data_prefix=[{tmp_path}/corpus] model.data.seq_length=64 trainer.max_steps=2"
    base += f" model.data.splits_string=1 exp_manager.exp_dir={tmp_path}/base model.data.num_workers=0"
    subprocess.run([sys.executable, "-m", "exact_megatron", "train", *base.split()], check=True, timeout=200)
    options = f"--folder {tmp_path}/pair --base {tmp_path}/base --config {tmp_path}/model.yaml --data {tmp_path}/corpus"
    options += " --stages 64:2048 128:2048 --step-tokens 512 --micro-tokens 256 --valid-tokens 1024 --suites"
    options += " --settings model.data.num_workers=0"
    said, code = script("paired_training.sbatch", *options.split())
    assert code == 0, said[-4000:]
    assert len(list((tmp_path / "pair" / "arms").rglob("*.json"))) == 2
    found = json.loads((tmp_path / "pair" / "paired_training.json").read_text())
    runs = {(run["arm"], run["window"]): run for run in found["runs"]}
    assert found["finished"] == found["tasks"] == 6 and all(run["finished"] for run in runs.values())
    for window in (64, 128):  # the first step's loss is before any update, so that it is the base's, in both arms
        assert runs["baseline", 64]["first loss"] == pytest.approx(runs["exact", 64]["first loss"], rel=1e-6)
        assert runs["exact", window]["validation"]["buckets"]
