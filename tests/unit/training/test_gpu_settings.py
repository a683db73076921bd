"""Settings that matter on a GPU alone, with CUDA said to be there: what megatron.core is given, and what is refused by name."""

import itertools
import types

import pytest
import torch

from exact_megatron.planning.memory import memory
from exact_megatron.training import determinism
from exact_megatron.training.config import load_config
from exact_megatron.training.fp8 import misaligned, slow
from exact_megatron.training.model import (
    build_model,
    fuse_gradient_accumulation,
    fuses_gradient_accumulation,
    transformer_config,
)

H100 = 85_100_000_000  # bytes of memory that one reports, about


def run_config(*settings):
    return load_config(None, ["model.data.data_prefix=[none]", "model.override_vocab_size=1000", *settings])


@pytest.fixture
def cuda(monkeypatch):
    """An H100 with cuDNN 9.19, without Transformer Engine."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *a: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda *a: types.SimpleNamespace(total_memory=H100))
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 91900)
    for name in ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "NVTE_FUSED_ATTN", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.delenv(name, raising=False)


def with_packages(monkeypatch, **versions):
    """Packages that importlib finds, beside those that are there; None: not there."""
    import importlib.metadata
    import importlib.util

    find, version = importlib.util.find_spec, importlib.metadata.version

    def spec(name, *args):
        there = versions[name] if name in versions else find(name, *args)
        return there and types.SimpleNamespace(name=name)

    def installed(name):
        key = name.replace("-", "_")
        if key in versions and versions[key] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[key] if key in versions else version(name)

    monkeypatch.setattr("importlib.util.find_spec", spec)
    monkeypatch.setattr("importlib.metadata.version", installed)


FORMS = list(itertools.product(("fast-swiglu", "gelu"), (True, False), (True, False), ("rmsnorm", "layernorm")))


@pytest.mark.parametrize(("activation", "bias", "qkv_bias", "norm"), FORMS)
@pytest.mark.parametrize("there", [True, False], ids=["cuda", "cpu"])
def test_every_form_of_layer_is_accepted(monkeypatch, there, activation, bias, qkv_bias, norm):
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    with_packages(monkeypatch, transformer_engine=None, fused_weight_gradient_mlp_cuda=None)
    for precision in ("32", "bf16"):
        settings = [f"model.activation={activation}", f"model.bias={bias}", f"model.qkv_bias={qkv_bias}"]
        run = run_config(*settings, f"model.normalization={norm}", f"trainer.precision={precision}")
        config = transformer_config(run)
        # The fused GELU is another function, tanh's approximation of it.
        assert config.bias_activation_fusion == (there and activation == "fast-swiglu")
        assert config.add_bias_linear == bias and config.bias_dropout_fusion == there


def test_gelu_is_not_fused_because_that_is_another_function():
    from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl

    x = torch.linspace(-4, 4, 101)
    difference = (bias_gelu_impl(x, torch.zeros(101)) - torch.nn.functional.gelu(x)).abs().max()
    assert 1e-4 < difference < 1e-3


DETERMINISTIC = ["model.deterministic_mode=true", "trainer.precision=bf16", "trainer.accelerator=gpu"]
WIDE = ["model.hidden_size=4096", "model.num_attention_heads=32", "model.num_query_groups=8"]
ENVIRONMENT = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}


@pytest.mark.parametrize(
    ("environment", "te", "ranks", "missing"),
    [
        (ENVIRONMENT, True, 8, []),
        ({**ENVIRONMENT, "NCCL_ALGO": "Ring, ^NVLS", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}, True, 8, []),
        ({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, False, 1, []),
        ({}, True, 2, ["CUBLAS_WORKSPACE_CONFIG=:4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO=0", "NCCL_ALGO=Ring"]),
        ({**ENVIRONMENT, "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1"}, True, 8, ["NVTE_ALLOW_NONDETERMINISTIC_ALGO=0"]),
        ({**ENVIRONMENT, "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ""}, True, 8, ["NVTE_ALLOW_NONDETERMINISTIC_ALGO=0"]),
        ({**ENVIRONMENT, "NCCL_ALGO": "Ring,Tree"}, True, 8, ["NCCL_ALGO=Ring"]),
        ({**ENVIRONMENT, "NCCL_ALGO": ""}, True, 8, ["NCCL_ALGO=Ring"]),
    ],
)
def test_variables_of_deterministic_mode(environment, te, ranks, missing):
    found = determinism.missing_environment(environment, transformer_engine=te, ranks=ranks)
    assert [line.split(" (")[0] for line in found] == missing


def test_deterministic_mode_names_what_it_needs(cuda, monkeypatch):
    with_packages(monkeypatch, transformer_engine="2.20.2", flash_attn="2.8.3")
    run = run_config(*DETERMINISTIC)
    with pytest.raises(ValueError, match=r"NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 \(not set\)"):
        determinism.require(run)
    assert not torch.are_deterministic_algorithms_enabled()
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    try:
        determinism.require(run)
        assert torch.are_deterministic_algorithms_enabled()
        determinism.require(run_config("trainer.accelerator=gpu"))  # the next run in this process
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_memory_of_deterministic_attention(cuda, monkeypatch):
    """Both numbers of a device that is too small, and what makes it fit."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with_packages(monkeypatch, transformer_engine="2.20.2", flash_attn="2.8.3")
    large = run_config(*DETERMINISTIC, *WIDE, "model.data.seq_length=8192")
    with pytest.raises(ValueError, match=r"cuDNN 91900 takes 128\.0 GiB .*seq_length=8192 .* the device has 79\.3 GiB"):
        determinism.check(large)
    determinism.check(run_config(*DETERMINISTIC, *WIDE, "model.data.seq_length=4096"))
    determinism.check(run_config(*WIDE, "trainer.precision=bf16", "model.data.seq_length=8192"))
    for change in (
        lambda patch: patch.setattr("torch.backends.cudnn.version", lambda: 92500),
        lambda patch: patch.setattr("torch.cuda.get_device_capability", lambda *a: (10, 0)),
        lambda patch: patch.setenv("NVTE_FUSED_ATTN", "0"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            change(patch)
            determinism.check(large)
    with_packages(monkeypatch, transformer_engine=None)
    determinism.check(large)


SHORT = [*DETERMINISTIC, "model.data.seq_length=256"]
LONG = [*DETERMINISTIC, *WIDE, "model.data.seq_length=8192"]


@pytest.mark.parametrize(
    ("settings", "flash_attn", "environment", "message"),
    [
        (LONG, "2.8.3", {}, None),
        (
            LONG,
            None,
            {},
            r"cuDNN from .* = 1,073,741,824 on, and model.data.seq_length=8192 x .* Install flash-attn >= 2\.4\.1",
        ),
        (LONG, "2.3.6", {}, "flash-attn"),
        (LONG, "2.8.3", {"NVTE_FLASH_ATTN": "0"}, "flash-attn"),
        (LONG, "2.8.3", {"NVTE_FLASH_ATTN_V2": "0"}, "flash-attn"),
        (LONG, "2.8.3", {"NVTE_FUSED_ATTN": "0"}, None),
        (LONG, None, {"NVTE_FUSED_ATTN": "0"}, "NVTE_FUSED_ATTN=0 forbids cuDNN's attention; .* Install flash-attn"),
        (SHORT, None, {}, None),
        (SHORT, None, {"NVTE_FUSED_ATTN": "0"}, "NVTE_FUSED_ATTN=0"),
        # One document of 4,096 tokens is given to cuDNN; several are, some at a time.
        ([*LONG, "model.data.seq_length=4096"], None, {}, None),
        ([*LONG, "model.data.seq_length=4096", "model.micro_batch_size=2"], None, {}, None),
        ([*LONG, "model.data.seq_length=5792"], None, {}, None),
        ([*LONG, "model.data.seq_length=5793"], None, {}, "5793 x model.micro_batch_size=1 can reach 1,073,883,168"),
        ([*LONG, "model.data.document_masking=false"], None, {}, "flash-attn"),
    ],
)
def test_deterministic_attention_of_long_documents_is_flash_attns(
    cuda, monkeypatch, settings, flash_attn, environment, message
):
    """Of any cuDNN: Transformer Engine does not take it there."""
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 92500)
    for name, value in {**ENVIRONMENT, **environment}.items():
        monkeypatch.setenv(name, value)
    with_packages(monkeypatch, transformer_engine="2.20.2", flash_attn=flash_attn)
    run = run_config(*settings)
    if message is None:
        determinism.check(run)
    else:
        with pytest.raises(ValueError, match=message):
            determinism.check(run)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        (["model.data.document_masking=false", "model.data.seq_length=1024"], 32 * 1024**2),
        (
            ["model.data.document_masking=false", "model.data.seq_length=1024", "model.micro_batch_size=2"],
            32 * 1024**2,
        ),
        (["model.data.seq_length=1024"], 32 * 1024**2),
        (
            [
                "model.data.seq_length=8192",
                "trainer.devices=4",
                "model.context_parallel_size=4",
                "model.cp_comm_type=all_gather",
            ],
            32 * 1024 * 8192,
        ),
    ],
)
def test_size_of_deterministic_attention(settings, size):
    assert determinism.attention_size(run_config(*WIDE, *settings)) == size


def test_deterministic_mode_is_required_before_ranks_meet(cuda, monkeypatch):
    from exact_megatron.training import trainer

    def start(*_, **__):
        raise AssertionError("the process group is joined first")

    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr("torch.distributed.init_process_group", start)
    with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        trainer.init_distributed(run_config(*DETERMINISTIC))


@pytest.mark.parametrize(
    ("settings", "heads", "queries", "keys"),
    [
        (["model.data.seq_length=4096"], 32, 4096, 4096),
        (["model.data.seq_length=4096", "model.micro_batch_size=2"], 32, 8192, 8192),
        (["model.data.seq_length=512"], 32, 1024, 1024),
        (["model.data.seq_length=5000"], 32, 8192, 8192),
        (["model.data.seq_length=32768"], 32, 32768, 32768),
        (["model.data.seq_length=40960"], 32, 65536, 65536),
        (["model.data.seq_length=8192", "trainer.devices=4", "model.tensor_model_parallel_size=4"], 8, 8192, 8192),
        (["model.data.seq_length=8192", "trainer.devices=4", "model.context_parallel_size=4"], 8, 8192, 8192),
        (
            [
                "model.data.seq_length=8192",
                "trainer.devices=4",
                "model.context_parallel_size=4",
                "model.cp_comm_type=all_gather",
            ],
            32,
            1024,
            8192,
        ),
    ],
)
def test_workspace_of_deterministic_attention(settings, heads, queries, keys):
    assert determinism.attention_workspace(run_config(*WIDE, *settings)) == 32 * heads * queries * keys * 2


def test_plan_says_what_deterministic_attention_takes():
    from exact_megatron.planning.plan import notes

    def notes_of(*settings):
        return "\n".join(notes(run_config(*WIDE, "model.data.seq_length=4096", *settings)))

    assert "before 9.25 takes another 32.0 GiB" in notes_of(*DETERMINISTIC)
    assert "needs flash-attn >= 2.4.1" in notes_of(*DETERMINISTIC, "model.data.seq_length=8192")
    assert "flash-attn" not in notes_of(*DETERMINISTIC)
    assert "deterministic" not in notes_of("trainer.precision=bf16")


FP8 = ["model.fp8=true", "trainer.precision=bf16"]


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.data.seq_length=4096"], None),
        (["model.data.seq_length=4088", "model.micro_batch_size=2"], None),  # 8,176 tokens
        (
            ["model.data.seq_length=4104"],
            r"model.data.seq_length=4104 x model.micro_batch_size=1 / model.context_parallel_size=1 = 4104, "
            r"must divide by 16: use a seq_length that is a multiple of 16,",
        ),
        (
            ["model.data.seq_length=4104", "model.micro_batch_size=3", "model.global_batch_size=9"],
            r"model.micro_batch_size=3 .* = 12312, .* multiple of 16,",
        ),
        (
            ["model.data.seq_length=4104", "trainer.devices=2", "model.context_parallel_size=2"],
            r"context_parallel_size=2 = 2052.* multiple of 32,",
        ),
        (
            [
                "model.data.seq_length=4128",
                "trainer.devices=8",
                "model.tensor_model_parallel_size=8",
                "model.num_attention_heads=8",
                "model.hidden_size=1024",
                "model.ffn_hidden_size=1024",
            ],
            None,
        ),
        (
            [
                "model.data.seq_length=4128",
                "trainer.devices=8",
                "model.tensor_model_parallel_size=8",
                "model.num_attention_heads=8",
                "model.hidden_size=1024",
                "model.ffn_hidden_size=1024",
                "model.sequence_parallel=true",
            ],
            r"sequence-parallel rank by 8: .* multiple of 64,",
        ),
        (["model.hidden_size=136"], r"model.hidden_size=136 is 136, not a multiple of 16"),
        (["model.ffn_hidden_size=344"], r"model.ffn_hidden_size=344 is 344, not"),
        (
            ["trainer.devices=2", "model.tensor_model_parallel_size=2", "model.ffn_hidden_size=48"],
            r"=48 over model.tensor_model_parallel_size=2 is 24",
        ),
        (["model.kv_channels=12", "model.num_attention_heads=2"], r"2 heads of 12 channels is 24, not"),
        (["model.kv_channels=8", "model.num_attention_heads=4", "model.num_query_groups=1"], None),
        (["model.kv_channels=8", "model.num_attention_heads=2", "model.num_query_groups=1"], None),
        (
            ["model.kv_channels=4", "model.num_attention_heads=4", "model.num_query_groups=1"],
            r"4 \+ 2 x 1 heads of 4 channels is 24, not",
        ),
        (["model.override_vocab_size=1001", "model.make_vocab_size_divisible_by=1"], None),  # the output layer is bf16
    ],
)
def test_sizes_that_fp8_products_take(recipe, settings, message):
    settings = [*settings, f"model.fp8_recipe={recipe}"]
    run_config(*settings)  # without FP8 anything goes
    if message is None:
        assert misaligned(run_config(*FP8, *settings)) == []
    else:
        with pytest.raises(ValueError, match=message):
            run_config(*FP8, *settings)


def test_plan_says_where_blockwise_gathers_in_bf16():
    parallel = [
        "trainer.devices=4",
        "model.tensor_model_parallel_size=4",
        "model.sequence_parallel=true",
        "model.ffn_hidden_size=512",
        "model.hidden_size=256",
        "model.fp8_recipe=blockwise",
    ]
    assert slow(run_config(*FP8, *parallel)) == []
    assert (
        "gathers 256 tokens of 272 channels"
        in slow(
            run_config(*FP8, *parallel, "model.data.seq_length=1024", "model.hidden_size=272", "model.kv_channels=64")
        )[0]
    )


TE_LOSS = ["model.cross_entropy_loss_fusion=true", "model.cross_entropy_fusion_impl=te"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TE_LOSS[1:], "cross_entropy_fusion_impl=te needs model.cross_entropy_loss_fusion=true"),
        (
            [*TE_LOSS, "model.loss_chunk_tokens=1024"],
            "takes all logits at once, model.loss_chunk_tokens=1024 some of them",
        ),
        ([*TE_LOSS[:1], "model.cross_entropy_fusion_impl=liger"], "'liger' is not one of native, te"),
        (
            [*TE_LOSS[:1], "model.deterministic_mode=true"],
            "deterministic_mode=true with model.cross_entropy_loss_fusion=true",
        ),
    ],
)
def test_cross_entropies_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        run_config(*settings)


@pytest.mark.parametrize(
    ("version", "message"),
    [("2.11.0", None), ("2.20.2", None), ("2.10.0", "2.10.0: before 2.11"), (None, "needs a GPU and the package")],
)
def test_transformer_engines_cross_entropy(cuda, monkeypatch, version, message):
    with_packages(monkeypatch, transformer_engine=version)
    run = run_config(*TE_LOSS)
    if message is None:
        assert transformer_config(run).cross_entropy_fusion_impl == "te"
    else:
        with pytest.raises(ValueError, match=message):
            transformer_config(run)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="cross_entropy_fusion_impl=te needs a GPU"):
        transformer_config(run)


def test_memory_of_the_cross_entropies():
    """Logits of 32,768 tokens and 128,256 words in bf16: 8.4 GB, beside fp32 25.2, beside a copy 16.8."""
    shape = ["trainer.precision=bf16", "model.data.seq_length=32768", "model.make_vocab_size_divisible_by=1"]

    def logits(*more):
        return memory(run_config(*shape, *more), 128256)[0].logits - 2 * 32768 * 128 * 2

    assert [round(logits(*more) / 1e9, 1) for more in ([], TE_LOSS)] == [25.2, 16.8]


@pytest.mark.parametrize(
    ("there", "te", "apex", "setting", "fuses"),
    [
        (False, "2.20.2", True, "null", False),
        (False, "2.20.2", True, "true", None),
        (True, "2.20.2", None, "null", True),
        (True, "2.20.2", None, "true", True),
        (True, "2.20.2", None, "false", False),
        (True, None, None, "null", False),
        (True, None, None, "true", None),
        (True, None, True, "null", True),
    ],
)
def test_gradient_accumulation_fusion(monkeypatch, there, te, apex, setting, fuses):
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    with_packages(monkeypatch, transformer_engine=te, fused_weight_gradient_mlp_cuda=apex)
    run = run_config(f"model.gradient_accumulation_fusion={setting}")
    assert not transformer_config(run).gradient_accumulation_fusion  # megatron.core's own linears would refuse it
    if fuses is None:
        with pytest.raises(ValueError, match="gradient_accumulation_fusion=true needs a GPU, and Transformer Engine"):
            fuses_gradient_accumulation(run)
    else:
        assert fuses_gradient_accumulation(run) == fuses


@pytest.mark.parametrize("apex", [None, True])
def test_the_flag_lands_on_linears(monkeypatch, apex):
    with_packages(monkeypatch, fused_weight_gradient_mlp_cuda=apex)
    model = torch.nn.ModuleDict({"te": torch.nn.Module(), "core": torch.nn.Module(), "norm": torch.nn.Module()})
    model["te"].fuse_wgrad_accumulation = False
    model["core"].gradient_accumulation_fusion = False
    assert fuse_gradient_accumulation(model) == (["te", "core"] if apex else ["te"])
    assert model["te"].fuse_wgrad_accumulation and model["core"].gradient_accumulation_fusion == bool(apex)
    assert not hasattr(model["norm"], "fuse_wgrad_accumulation")


@pytest.mark.parametrize("fuses", [False, True])
def test_models_are_built_with_the_flag(monkeypatch, fuses):
    from exact_megatron.training import model as module

    layer = torch.nn.Module()
    layer.fuse_wgrad_accumulation, layer.post_process, layer.config = False, True, None
    monkeypatch.setattr(module, "build_chunks", lambda *_: [layer])
    monkeypatch.setattr(module, "DistributedDataParallel", lambda config, ddp, chunk, **_: chunk)
    monkeypatch.setattr(module, "fuses_gradient_accumulation", lambda run: fuses)
    assert build_model(run_config(), 1000, torch.device("cpu")) == [layer]
    assert layer.fuse_wgrad_accumulation == fuses


def test_a_cpu_takes_no_cuda_kernels_of_installed_packages(monkeypatch):
    """With Transformer Engine or apex installed megatron.core has their Adam and norms; on a CPU it gets torch's again."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as base

    from exact_megatron.training.cpu_runtime import use_torch_optimizers

    def kernel(*args):
        raise AssertionError("a CUDA kernel on a CPU")

    names = {
        optimizer: ["Adam", "SGD", "USING_PYTORCH_OPTIMIZER"],
        distrib_optimizer: ["Adam", "HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER"],
        base: ["multi_tensor_applier", "multi_tensor_scale_impl"],
        clip_grads: [
            "multi_tensor_applier",
            "multi_tensor_scale_impl",
            "multi_tensor_scale_tensor_impl",
            "l2_norm_impl",
        ],
    }
    for module, attributes in names.items():
        for name in attributes:
            monkeypatch.setattr(module, name, kernel, raising=False)
    use_torch_optimizers()
    assert optimizer.Adam is torch.optim.AdamW and optimizer.USING_PYTORCH_OPTIMIZER
    assert not distrib_optimizer.HAVE_APEX_OR_TE and not distrib_optimizer.USING_TE_OPTIMIZER
    assert base.multi_tensor_scale_impl is utils.local_multi_tensor_scale
    assert clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm
    left = [(m.__name__, n) for m, attributes in names.items() for n in attributes if vars(m).get(n) is kernel]
    assert left == []


def test_doctor_says_what_a_cpu_does_not_use(monkeypatch):
    from exact_megatron.commands.doctor import installed

    monkeypatch.setattr(installed, "version_of", lambda name: "2.20.2" if name == "transformer-engine" else "1.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = installed.versions()
    assert (
        found["transformer-engine"].startswith("2.20.2, without a GPU not used") and "none: needs a GPU" in found["FP8"]
    )


def test_doctor_refuses_fusions_that_are_not_there(tmp_path):
    from exact_megatron.commands.doctor import native_run

    refused = native_run(None, [f"model.data.data_prefix=[{tmp_path}/x]", "model.gradient_accumulation_fusion=true"])
    assert any("gradient_accumulation_fusion=true needs a GPU" in line for line in refused["refused"])
