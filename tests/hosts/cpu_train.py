"""One rank that runs Megatron-LM's own, unedited pretrain_gpt.py several times where torch has no CUDA.

    cpu_train.py CHECKOUT JOBS.json FOLDER

A job (tests/helpers/jobs.py) has "mode" and "arguments"; mode "plain" executes the script alone, "launch" goes through
exact_megatron.launch, "NAME.py" executes that script of the checkout alone.

The CPU runtime of this project answers for the GPU in megatron.core; what else megatron.training asks of a GPU is answered
here. Layer specs for a CPU are in cpu_spec.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

from tests.helpers.jobs import run_each, run_script


def install() -> None:
    """Answer for the GPU in megatron.core and megatron.training."""
    from exact_megatron.training import cpu_runtime
    from exact_megatron.training.torch_adam import restore_torch_adam_steps

    cpu_runtime.install()
    restore_torch_adam_steps()
    import torch

    absent = [m for m in ("triton", "triton.language") if importlib.util.find_spec("triton") is None]
    sys.modules.update(
        {m: MagicMock(__version__="3.5.0") for m in absent}
    )  # batch_invariant_kernels.py imports it without need
    import megatron.training.training as training

    for module in absent:  # torch asks for triton by import
        del sys.modules[module]
    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    cuda = torch.cuda
    cuda.device_count = lambda: 1  # 0: no model-parallel groups, no seeds
    cuda.set_device = lambda device: None
    cuda.Stream = lambda *args, **kwargs: cpu_runtime.Inert()  # DDP is built on a side stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.get_device_properties = lambda *args: types.SimpleNamespace(major=10, minor=0)
    import megatron.core.datasets.utils as data_utils
    import megatron.core.pipeline_parallel.schedules as schedules
    import megatron.core.transformer.transformer_block as block

    from exact_megatron.training.model import RMSNorm

    data_utils.compile_helpers = lambda: None  # make, with the python3 of PATH
    block.LayerNormImpl = RMSNorm  # the final norm, also under sequence parallelism
    # Virtual stages free an output that gloo may still be sending, and its data are then other data.
    schedules.deallocate_output_tensor = lambda *args, **kwargs: None
    schedules.custom_backward = lambda output, grad: torch.autograd.backward(output, grad)
    with contextlib.suppress(ImportError):  # up to 0.16
        import megatron.legacy.fused_kernels as fused

        fused.load = lambda args: None  # calls nvcc


def run(checkout: Path, job: dict) -> None:
    if job["mode"] == "launch":
        from exact_megatron.launch import main

        main(job["arguments"])
    else:
        run_script(checkout / (job["mode"] if job["mode"].endswith(".py") else "pretrain_gpt.py"), job["arguments"])


def main() -> None:
    checkout, table, folder = sys.argv[1:]
    sys.path.insert(0, checkout)
    install()
    import cpu_spec  # noqa: F401
    import torch

    torch.set_num_threads(1)
    run_each(table, Path(folder), lambda job: run(Path(checkout), job))


if __name__ == "__main__":  # the writer of torch_dist checkpoints spawns a child that imports this file
    main()
