"""What a measurement ran on, for reports."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__


def machine() -> dict[str, Any]:
    """Date, hardware and versions."""
    import torch
    from megatron.core import __version__ as megatron_core

    cpu = dict(re.findall(r"^([\w ]+?)\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    name = cpu.get("model name", os.uname().machine)
    if "model" in cpu:  # a virtual machine may hide the product's name
        name += f" (family {cpu['cpu family']}, model {cpu['model']})"
    packages = {"megatron-core": megatron_core, "torch": torch.__version__, "numpy": np.__version__}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "CPU": f"{name}, {len(os.sched_getaffinity(0))} cores",
        "GPU": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "versions": {"exact-megatron": __version__, **packages, "python": sys.version.split()[0]},
    }
