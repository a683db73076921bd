"""Megatron-Bridge where torch has no CUDA and NVIDIA's other packages are not installed, a tiny recipe, and the ranks of a test.

    bridge_cpu.py JOBS.json FOLDER

A job (tests/helpers/jobs.py) has "mode" and "arguments", [SCRIPT, its own ...]; mode "plain" executes the script alone, "launch" goes
through exact_megatron.integrations.bridge_launch.

install() must come before megatron.bridge is imported. No file of Megatron-Bridge is edited.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from tests.helpers.jobs import run_each, run_script

# Of megatron.core, what looks for Transformer Engine: imported before there is a stub of it, so that it is found absent.
CORE = """models.gpt.gpt_model models.gpt.gpt_layer_specs extensions.transformer_engine transformer.transformer_block optimizer
fp8_utils utils transformer.moe.experts tensor_parallel.random dist_checkpointing.strategies.torch
distributed.fsdp.mcore_fsdp_adapter optimizer.distrib_optimizer""".split()
STUBS = ("transformer_engine", "nvidia_resiliency_ext", "modelopt", "megatron.energon", "diffusers")
# Replaced by a tiny one: the true ones ask Hugging Face for their configuration. The second, of 0.6, makes Bridge's script start anew.
RECIPES = {
    "megatron.bridge.recipes": "llama32_1b_pretrain_config",
    "megatron.bridge.recipes.llama": "llama32_1b_pretrain_config",
    "megatron.bridge.perf_recipes.llama": "llama3_8b_pretrain_8gpu_h100_bf16_config",
}


class _AnyClass(abc.ABCMeta):
    """A class of which every attribute is another one, for names that are imported and never used."""

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _class(cls.__module__, name)


def _class(module: str, name: str) -> Any:
    def take_all(self, *args, **kwargs):
        return None

    def decorate(self, function=None):
        return function

    return _AnyClass(name, (object,), {"__module__": module, "__init__": take_all, "__call__": decorate})


class _StubModule(types.ModuleType):
    __version__ = "0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _class(self.__name__, name)
        setattr(self, name, found)  # the same class for everyone
        return found


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: list[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if any(fullname == name or fullname.startswith(name + ".") for name in self.names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        return _StubModule(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def _absent(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except (ImportError, ValueError):
        return True


@functools.cache
def install() -> None:
    """Answer for the GPU, and for packages that are not there, in megatron.core and megatron.bridge."""
    import torch

    from exact_megatron.integrations.hooks import when_imported
    from exact_megatron.training import cpu_runtime
    from exact_megatron.training.torch_adam import restore_torch_adam_steps

    print("CPU runtime in this process", flush=True)
    cpu_runtime.install()
    for module in CORE:
        importlib.import_module(f"megatron.core.{module}")
    restore_torch_adam_steps()
    if _absent("triton"):  # mamba's kernels import it without need, and torch asks for it by import
        sys.modules.update({name: MagicMock() for name in ("triton", "triton.language")})
        importlib.import_module("megatron.core.models.mamba.mamba_layer_specs")
        for name in ("triton", "triton.language"):
            del sys.modules[name]
    stubs = [name for name in STUBS if _absent(name)]
    sys.meta_path.append(_Stubs(stubs))
    cuda: Any = torch.cuda
    cuda.device_count = lambda: 1
    cuda.set_device = lambda device: None
    cuda.Stream = type("Stream", (cpu_runtime.Inert,), {"__init__": lambda self, *args, **kwargs: None})
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.get_device_properties = lambda *args: types.SimpleNamespace(
        major=10, minor=0, name="cpu", total_memory=1 << 34
    )
    cuda.memory_stats = lambda *args: {}
    import megatron.core.datasets.utils as data_utils
    import megatron.core.pipeline_parallel.schedules as schedules
    import megatron.core.transformer.transformer_block as block

    from exact_megatron.training.model import RMSNorm

    data_utils.compile_helpers = lambda: None  # runs make
    block.LayerNormImpl = RMSNorm  # the final norm, also under sequence parallelism
    # Virtual stages free an output that gloo may still be sending, and its data are then other data.
    schedules.deallocate_output_tensor = lambda *args, **kwargs: None
    schedules.custom_backward = lambda output, grad: torch.autograd.backward(output, grad)
    import megatron.bridge.training.initialize as initialize

    initialize.compile_helpers = lambda: None
    import megatron.bridge.training.setup as setup

    setup.initialize_megatron = functools.partial(setup.initialize_megatron, allow_no_cuda=True)
    if "modelopt" in stubs:
        for name in ("train", "eval"):
            module = importlib.import_module(f"megatron.bridge.training.{name}")
            if hasattr(module, "get_tensor_shapes_adjust_fn_for_distillation"):
                module.get_tensor_shapes_adjust_fn_for_distillation = lambda *args, **kwargs: None
    for name, recipe in RECIPES.items():
        when_imported(name, functools.partial(_replace_recipe, recipe))


def _replace_recipe(recipe: str, module: Any) -> None:
    setattr(module, recipe, tiny)


def layer_spec(config: Any) -> Any:
    """Bridge's local layers with norms that know sequence parallelism; core attention is the stock one."""
    from megatron.bridge.models.gpt_provider import local_layer_spec

    from exact_megatron.training.model import RMSNorm

    spec = local_layer_spec(config)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    return spec


def tiny(**kwargs: Any) -> Any:
    """A recipe: a tiny Llama on a CPU, on mock data until `dataset.blend` is given."""
    import torch
    import torch.nn.functional as F
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.training import config as c

    model = GPTModelProvider(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        seq_length=64,
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=0.2,
        vocab_size=96,
        transformer_layer_spec=layer_spec,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        cross_entropy_loss_fusion=False,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,
    )
    dataset = c.GPTDatasetConfig(
        random_seed=1234,
        seq_length=64,
        split="90,10,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
        num_workers=0,
        dataloader_type="single",
        skip_getting_attention_mask_from_dataset=True,
    )
    train = {"train_iters": 8, "global_batch_size": 8, "micro_batch_size": 2, "exit_signal_handler": False}
    evaluation = {"eval_interval": 100, "eval_iters": 1}
    if "eval_iters" in c.TrainingConfig.__dataclass_fields__:  # 0.3
        train |= evaluation
        more = {}
    else:
        more = {"validation": c.ValidationConfig(**evaluation)}
    return c.ConfigContainer(
        model=model,
        dataset=dataset,
        train=c.TrainingConfig(**train),
        optimizer=c.OptimizerConfig(
            optimizer="adam",
            lr=5e-3,
            min_lr=1e-3,
            bf16=False,
            fp16=False,
            weight_decay=0.1,
            use_distributed_optimizer=False,
            clip_grad=1.0,
        ),
        scheduler=c.SchedulerConfig(
            lr_decay_style="constant",
            lr_decay_iters=100,
            lr_warmup_iters=0,
            start_weight_decay=0.1,
            end_weight_decay=0.1,
            weight_decay_incr_style="constant",
            override_opt_param_scheduler=True,
        ),
        ddp=c.DistributedDataParallelConfig(
            use_distributed_optimizer=False, overlap_grad_reduce=False, average_in_collective=False
        ),
        dist=c.DistributedInitConfig(distributed_backend="gloo", use_gloo_process_groups=True),
        logger=c.LoggerConfig(log_interval=1, tensorboard_dir=None),
        tokenizer=c.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=96),
        checkpoint=c.CheckpointConfig(
            save_interval=3, ckpt_format="torch_dist", async_save=False, fully_parallel_save=False
        ),
        rng=c.RNGConfig(seed=7),
        mixed_precision=None,
        **more,
    )


def run(job: dict) -> None:
    if job["mode"] == "launch":
        from exact_megatron.integrations.bridge_launch import main

        status = main(job["arguments"])
        if status:
            sys.exit(status)
    else:
        script, *arguments = job["arguments"]
        run_script(Path(script), arguments)


def main() -> None:
    install()
    importlib.import_module("megatron.bridge.recipes")
    importlib.import_module("megatron.bridge.training.gpt_step")
    importlib.import_module("megatron.bridge.training.pretrain")
    import torch

    import exact_megatron.integrations.bridge_training  # noqa: F401

    torch.set_num_threads(1)
    run_each(sys.argv[1], Path(sys.argv[2]), run)


if __name__ == "__main__":  # the writer of torch_dist checkpoints spawns a child that imports this file
    main()
