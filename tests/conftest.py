"""Shared fixtures: corpora written with Megatron's own builder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # else every process starts C++ compilers
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' tensors are small, and several ranks share the cores


@pytest.fixture
def write_corpus(tmp_path: Path):
    """write_corpus(lengths, name="x", tokens=None) -> prefix; by default the token ids are positions in the corpus."""
    from tests.helpers.tiny import write_documents

    def write(lengths: np.ndarray, name: str = "x", tokens: np.ndarray | None = None, dtype: type = np.int32) -> str:
        stream = np.arange(int(lengths.sum())) if tokens is None else tokens
        documents = (stream[end - n : end] for n, end in zip(lengths, np.cumsum(lengths)))
        return write_documents(tmp_path / name, documents, dtype)

    return write


@pytest.fixture
def one_rank(tmp_path: Path):
    """A process group of this process: megatron.core's BlendedDataset asks for the rank when it caches."""
    import torch

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()
