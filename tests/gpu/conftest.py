"""Tests of what only a GPU shows: `python -m pytest -m gpu`. With fp32 the same code runs on a CPU, so that it is known to run."""

from __future__ import annotations

import pytest

from tests.gpu.small import PRECISIONS


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, torch finds none"))


def pytest_generate_tests(metafunc):
    """`precision`: fp32 on the CPU always, and on a GPU what Transformer Engine is for."""
    given = [mark for mark in metafunc.definition.iter_markers("parametrize") if mark.args[0] == "precision"]
    if "precision" in metafunc.fixturenames and not given:
        quick = metafunc.module.__name__ != "tests.gpu.test_training"
        cpu = pytest.param("fp32", marks=() if quick else pytest.mark.slow)
        others = [pytest.param(name, marks=pytest.mark.gpu) for name in PRECISIONS[1:]]
        metafunc.parametrize("precision", [cpu, *others], scope="module")


@pytest.fixture
def record(record_property):
    """record(name=value, ...): what a test measured, in --outcomes (exact_megatron/benchmark/outcomes.py)."""

    def write(**values):
        for name, value in values.items():
            record_property(name, value)

    return write
