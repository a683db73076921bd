"""A rank's device, process group and model-parallel groups."""

from __future__ import annotations

import os

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)

from . import determinism
from .auxiliary_losses import forget_auxiliary_losses
from .schema import RunConfig


def runs_on_cpu(run: RunConfig) -> bool:
    """Whether the ranks run on the CPU.

    Raises:
        ValueError: this machine has not the GPUs that the run asks for.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if run.trainer.accelerator == "cpu" or (run.trainer.accelerator == "auto" and not gpus):
        return True
    if gpus < run.trainer.devices:
        raise ValueError(
            f"trainer.accelerator={run.trainer.accelerator} and trainer.devices={run.trainer.devices}, but torch finds {gpus} CUDA "
            "devices: use a machine with more of them, fewer devices, or trainer.accelerator=cpu"
        )
    return False


def init_distributed(run: RunConfig) -> torch.device:
    """Join the process group and build the model-parallel groups; returns this rank's device."""
    on_cpu = runs_on_cpu(run)
    if on_cpu:
        from . import cpu_runtime

        cpu_runtime.install()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if not on_cpu:
        torch.cuda.set_device(device)
        determinism.require(run)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo" if on_cpu else "nccl", device_id=None if on_cpu else device)
    if torch.distributed.get_world_size() != run.world_size:
        raise ValueError(
            f"{torch.distributed.get_world_size()} ranks were started, trainer.devices={run.trainer.devices} x "
            f"trainer.num_nodes={run.trainer.num_nodes} asks for {run.world_size}"
        )
    m = run.model
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=m.tensor_model_parallel_size,
        pipeline_model_parallel_size=m.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=m.virtual_pipeline_model_parallel_size,
        context_parallel_size=m.context_parallel_size,
        expert_model_parallel_size=m.expert_model_parallel_size,
    )
    seed_all(m.seed)
    init_num_microbatches_calculator(
        torch.distributed.get_rank(), None, m.global_batch_size, m.micro_batch_size, run.data_parallel_size
    )
    return device


def seed_all(seed: int) -> None:
    """As Megatron-LM: other numbers on every pipeline stage, so that their layers do not start alike."""
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)


def shutdown() -> None:
    """Undo init_distributed but for the process group, so that the next Trainer in this process may have another layout."""
    forget_auxiliary_losses()
    parallel_state.destroy_model_parallel()
    destroy_num_microbatches_calculator()
