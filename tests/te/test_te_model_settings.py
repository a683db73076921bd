"""The native runner's model settings through Transformer Engine's own Python: what lands on its layers, and what they do with it."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from exact_megatron.training import model as runner
from exact_megatron.training.config import load_config
from exact_megatron.training.fp8 import misaligned
from tests.helpers.tiny import config_file, write_data

pytestmark = pytest.mark.te

FORMS = list(itertools.product(("fast-swiglu", "gelu"), (True, False), ("rmsnorm", "layernorm")))


def run_config(*settings):
    common = [
        "model.data.data_prefix=[none]",
        "trainer.precision=bf16",
        "trainer.accelerator=gpu",
        "model.data.seq_length=64",
    ]
    return load_config(None, [*common, *settings])


@pytest.fixture
def build(parallel_state):
    """build(run) -> GPTModel of Transformer Engine's layers on the CPU."""
    return lambda run: runner.build_chunks(run, 96, torch.device("cpu"))[0]


def linears(te, model):
    kinds = (te.Linear, te.LayerNormLinear, te.LayerNormMLP)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize(("activation", "bias", "norm"), FORMS)
def test_every_form_of_layer_is_built_and_its_linears_are_fused(te, build, activation, bias, norm):
    run = run_config(f"model.activation={activation}", f"model.bias={bias}", f"model.normalization={norm}")
    assert runner.fuses_gradient_accumulation(run)
    model = build(run)
    found = linears(te, model)
    assert len(found) == 4 * run.model.num_layers and not any(m.fuse_wgrad_accumulation for m in found.values())
    assert not model.config.gradient_accumulation_fusion and not model.output_layer.gradient_accumulation_fusion
    assert runner.fuse_gradient_accumulation(model) == list(found)
    assert all(module.fuse_wgrad_accumulation for module in found.values())
    assert not model.output_layer.gradient_accumulation_fusion  # apex is not there


@pytest.mark.parametrize("fp8", ["false", "true"])
@pytest.mark.parametrize("setting", ["null", "false"])
def test_the_training_model_alone_is_fused(te, build, monkeypatch, setting, fp8):
    monkeypatch.setattr(runner, "DistributedDataParallel", lambda config, ddp, chunk, **_: chunk)
    run = run_config(f"model.gradient_accumulation_fusion={setting}", f"model.fp8={fp8}")
    model = runner.build_model(run, 96, torch.device("cpu"))[0]
    assert {m.fuse_wgrad_accumulation for m in linears(te, model).values()} == {setting == "null"}


def gemm(a, b, out_dtype=None, accumulate=False, layout="TN", out=None, bias=None, grad=False, **_):
    """In place of cuBLAS, on matrices as they come: a is the weight or the input, b the input or the output's gradient."""
    a, b = a.detach().double(), b.detach().double()
    product = {"TN": lambda: b @ a.T, "NN": lambda: b @ a, "NT": lambda: b.T @ a}[layout]()
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = b.sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias
    if out is None:
        return product.to(out_dtype or torch.float32), bias_gradient, None, None
    assert out.dtype == out_dtype
    out.copy_(out + product if accumulate else product)
    return out, bias_gradient, None, None


@pytest.mark.parametrize("bias", [True, False])
def test_fused_gradients_are_the_same(te, parallel_state, monkeypatch, bias):
    """Three micro-batches of two steps through the layer's own backward and megatron.core's DDP."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    module = sys.modules[te.Linear.__module__]
    monkeypatch.setattr(module, "general_gemm", gemm)
    monkeypatch.setattr(module, "get_cublas_workspace", lambda *a: None)
    # The gradient that autograd passes on in a fused layer's stead; nobody may add it.
    monkeypatch.setattr(
        module, "get_dummy_wgrad", lambda shape, dtype, zero=False: torch.full(shape, torch.nan, dtype=dtype)
    )
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    monkeypatch.setattr("torch.cuda.nvtx.range_push", lambda *a: None)
    monkeypatch.setattr("torch.cuda.nvtx.range_pop", lambda *a: None)
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1, use_cpu_initialization=True)
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 8, 16, dtype=torch.bfloat16)
    found = {}
    for fused in (False, True):
        torch.manual_seed(1)
        layers = [te.Linear(16, 16, bias=bias, params_dtype=torch.bfloat16, device="cpu") for _ in range(2)]
        model = torch.nn.Sequential(*layers)
        if fused:
            assert runner.fuse_gradient_accumulation(model) == ["0", "1"]
        ddp = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
        steps = []
        for step in inputs:
            ddp.zero_grad_buffer()
            for x in step:
                model(x).float().square().sum().backward()
            assert all(p.grad is None for p in model.parameters())
            steps.append([p.main_grad.clone() for p in model.parameters()])
        found[fused] = steps
        assert [layer.weight.grad_added_to_main_grad for layer in layers] == [fused] * 2
    for own, reference in zip(itertools.chain(*found[True]), itertools.chain(*found[False]), strict=True):
        assert own.dtype == torch.float32 and reference.abs().max() > 0
        # Unfused, each micro-batch's gradient is rounded to bf16 on its way to the sum.
        assert float((own - reference).norm() / reference.norm()) < 2**-8
    weights = [(own[0], reference[0]) for own, reference in zip(found[True], found[False])]
    assert any(not torch.equal(a, b) for a, b in weights), "nothing was fused"


def test_transformer_engine_takes_what_passes_the_fp8_check(te, build):
    from transformer_engine.pytorch.utils import assert_dim_for_fp8_exec

    passed = 0
    for hidden, ffn, heads, groups, window in itertools.product((64, 72), (96, 100), (4, 2), (1, 2), (64, 68)):
        shape = [
            f"model.hidden_size={hidden}",
            f"model.ffn_hidden_size={ffn}",
            f"model.num_attention_heads={heads}",
            f"model.num_query_groups={groups}",
            f"model.data.seq_length={window}",
            "model.num_layers=1",
            "model.kv_channels=12",
        ]
        run = run_config(*shape)
        if not misaligned(run):
            passed += 1
            for module in linears(te, build(run)).values():
                assert_dim_for_fp8_exec(torch.empty(window, module.in_features), module.weight)
    assert passed == 1


def test_cross_entropy_is_called_as_it_wants(te):
    """megatron.core gives its arguments by position."""
    from megatron.core.models.common.language_module import language_module
    from transformer_engine.pytorch import cross_entropy

    assert language_module.te_parallel_cross_entropy is not None
    bound = inspect.signature(cross_entropy.parallel_cross_entropy).bind(
        "logits", "labels", 0.0, False, None, -100, False
    )
    assert list(bound.arguments) == [
        "inp",
        "target",
        "label_smoothing",
        "reduce_loss",
        "dist_process_group",
        "ignore_idx",
        "is_cg_capturable",
    ]
    run = run_config("model.cross_entropy_loss_fusion=true", "model.cross_entropy_fusion_impl=te")
    assert runner.transformer_config(run).cross_entropy_fusion_impl == "te"


@pytest.mark.parametrize(
    ("variable", "torch_says", "deterministic"), [(None, False, False), ("0", False, True), (None, True, True)]
)
def test_attention_is_deterministic_by_the_variable(te, monkeypatch, variable, torch_says, deterministic):
    """megatron.core's deterministic_mode is not asked."""
    monkeypatch.delenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", raising=False)
    if variable is not None:
        monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", variable)
    torch.use_deterministic_algorithms(torch_says)
    try:
        assert te.DotProductAttention(4, 16, qkv_format="thd", attention_dropout=0.0).deterministic == deterministic
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_node_without_a_gpu_trains(tmp_path):
    """Where megatron.core would take Transformer Engine's CUDA kernels for Adam and the gradient's norm."""
    config = config_file(tmp_path, write_data(tmp_path))
    command = [sys.executable, "-m", "exact_megatron", "train", "--config", str(config), "trainer.max_steps=2"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONWARNINGS": "ignore"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["grad_norm"] > 0 for line in lines)
