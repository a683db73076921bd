"""Transformer Engine's real Python on a machine without a GPU: questions about the device are answered, kernels stood in for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def te():
    """transformer_engine.pytorch where torch.cuda says that there is an H100. Lasts for the process: imports ask once."""
    import torch

    from exact_megatron.training.cpu_runtime import install

    install()
    device = SimpleNamespace(major=9, minor=0, name="stand-in", multi_processor_count=132, total_memory=80 * 2**30)
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda which=None: device
    import transformer_engine.pytorch

    return transformer_engine.pytorch


@pytest.fixture(scope="session")
def parallel_state(te):
    """megatron.core's groups of one rank."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    yield parallel_state
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
