"""One rank that runs Megatron-LM's own, unedited pretrain_gpt.py several times where torch has no CUDA.

    cpu_train.py CHECKOUT JOBS.json FOLDER

A job is {"name", "port", "seconds", "mode", "arguments"}; mode "plain" executes the script alone, "launch" goes through
exact_megatron.launch, "NAME.py" executes that script of the checkout alone. With a key "alone" the job has none of torchrun's variables.
Each job is a fork of this process, which has paid for the imports; its output is FOLDER/NAME.RANK, its exit status the last line.

The CPU runtime of this project answers for the GPU in megatron.core; what else megatron.training asks of a GPU is answered
here. Layer specs for a CPU are in cpu_spec.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import signal
import sys
import traceback
import types
from pathlib import Path
from unittest.mock import MagicMock


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
    cuda.Stream = lambda *args, **kwargs: cpu_runtime._Inert()  # DDP is built on a side stream
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
        return
    script = checkout / (job["mode"] if job["mode"].endswith(".py") else "pretrain_gpt.py")
    sys.argv = [str(script), *job["arguments"]]
    exec(compile(script.read_text(), script, "exec"), {"__name__": "__main__", "__file__": str(script)})


def main() -> None:
    checkout, folder = Path(sys.argv[1]), Path(sys.argv[3])
    sys.path.insert(0, str(checkout))
    install()
    import cpu_spec  # noqa: F401
    import torch

    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[2]).read_text()):
        child = os.fork()
        if child == 0:
            log = os.open(folder / f"{job['name']}.{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ["MASTER_PORT"] = str(job["port"])
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if "alone" in job else ():
                del os.environ[name]
            status = 1
            try:
                signal.alarm(job["seconds"])
                run(checkout, job)
                status = 0
            except SystemExit as end:
                status = 0 if end.code in (None, 0) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                print(f"\nexit status {status}", flush=True)
                sys.stderr.flush()
                os._exit(status)
        os.waitpid(child, 0)


if __name__ == "__main__":  # the writer of torch_dist checkpoints spawns a child that imports this file
    main()
