"""What a measurement ran on, for reports."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__

GIB = 2**30  # bytes


def environment(*others: str) -> dict[str, Any]:
    """Date, hardware and versions, those of packages `others` too where they are installed."""
    import torch

    cpu = dict(re.findall(r"^([\w ]+?)\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    name = cpu.get("model name", os.uname().machine)
    if "model" in cpu:  # a virtual machine may hide the product's name
        name += f" (family {cpu['cpu family']}, model {cpu['model']})"
    packages = {"torch": torch.__version__, "numpy": np.__version__}
    for package in ("megatron-core", *others):
        with contextlib.suppress(PackageNotFoundError):
            packages[package] = version(package)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "CPU": f"{name}, {len(os.sched_getaffinity(0))} cores",
        "GPU": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "versions": {"exact-megatron": __version__, **packages, "python": sys.version.split()[0]},
    }
