"""megatron-core on a CPU: what assumes an NVIDIA device is answered by the CPU.

Installed once per process, and only where torch has no CUDA. Megatron-core 0.16 and 0.19 ask for the current CUDA device,
streams, CUDA random states and `device="cuda"` tensors in places that a gloo run never needs a GPU for, and take Transformer
Engine's or apex's CUDA kernels for the optimizer wherever these packages are installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed: _CudaMeansCpu | None = None


def install() -> None:
    """Make megatron-core run on the CPU in this process; calling it again does nothing.

    Raises:
        RuntimeError: torch has CUDA; a run on a GPU must not be answered by the CPU.
    """
    global _installed
    if _installed is not None:
        return
    if torch.cuda.is_available():
        raise RuntimeError("the CPU runtime is for machines without CUDA: set trainer.accelerator=gpu")
    import megatron.core.tensor_parallel.random as megatron_random

    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.synchronize = cuda.empty_cache = lambda *args, **kwargs: None
    cuda.current_stream = cuda.default_stream = lambda device=None: Inert()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed) and None
    rng: Any = megatron_random
    rng._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    use_torch_optimizers()
    _installed = _CudaMeansCpu()
    _installed.__enter__()


def use_torch_optimizers() -> None:
    """Give megatron-core the Adam, gradient norm and clipping that it has where neither Transformer Engine nor apex is installed."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as base

    chosen: dict[Any, dict[str, Any]] = {
        optimizer: {"Adam": torch.optim.AdamW, "SGD": torch.optim.SGD, "USING_PYTORCH_OPTIMIZER": True},
        distrib_optimizer: {
            "Adam": torch.optim.Adam,
            "HAVE_APEX_OR_TE": False,
            "USING_TE_OPTIMIZER": False,
            "USING_APEX_OPTIMIZER": False,
        },
        base: {
            "multi_tensor_applier": utils.local_multi_tensor_applier,
            "multi_tensor_scale_impl": utils.local_multi_tensor_scale,
        },
        clip_grads: {
            "multi_tensor_applier": utils.local_multi_tensor_applier,
            "multi_tensor_scale_impl": utils.local_multi_tensor_scale,
            "multi_tensor_scale_tensor_impl": None,
            "l2_norm_impl": utils.local_multi_tensor_l2_norm,
        },
    }
    for module, names in chosen.items():
        vars(module).update(names)


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class Inert:
    """A stream on which nothing is ever pending."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class _CudaMeansCpu(TorchFunctionMode):
    """Sends device="cuda" factories and moves to the CPU, and gives Tensor.type() the names Megatron's optimizer looks for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if kwargs:
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
        return func(*args, **kwargs)
