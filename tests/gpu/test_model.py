"""A whole model, its documents attended by the plugin, one at a time, and by the host's own attention: losses and gradients."""

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from tests.gpu.small import PRECISIONS

# Mean relative difference of the losses, relative error of the whole gradient. fp32: rounding. bf16: 8 bits of mantissa through
# two layers. FP8: 3 (2 in gradients), and scales over a whole batch differ from those over one document.
BOUNDS = {
    "fp32": (1e-5, 1e-4),
    "bf16": (2e-3, 3e-2),
    **dict.fromkeys(("delayed", "tensorwise", "blockwise"), (1e-2, 0.15)),
}


@cache
def checked(*precisions):
    """One process for all precisions of a device: its imports take longer than the check."""
    script = Path(__file__).with_name("model_check.py")
    root = str(Path(__file__).parents[2])  # for tests.gpu.small
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        "TORCH_COMPILE_DISABLE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, f"{folder}/found.json", *precisions]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return json.loads(Path(folder, "found.json").read_text())


@pytest.mark.parametrize("way", ["alone", "stock"])
def test_documents(precision, way, record):
    found = checked("fp32")["fp32"] if precision == "fp32" else checked(*PRECISIONS[1:])[precision]
    record(**found)
    assert "error" not in found, found["error"]
    losses, gradients = BOUNDS[precision]
    assert found["losses"][way] < losses and found["gradients"][way] < gradients, found
    assert 4 < found["mean loss"] < 7
