"""Transformer Engine's cross entropy with a weight for each token, as megatron.core calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.te
def test_token_weights():
    """A process of its own: Triton's interpreter is chosen before anything imports Triton."""
    script = Path(__file__).with_name("run_cross_entropy.py")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    losses, gradients = json.loads(done.stdout.splitlines()[-1])
    assert losses < 1e-5 and gradients < 1e-6, (losses, gradients)
