"""One rank that runs NeMo's own, unedited megatron_gpt_pretraining.py several times where torch has no CUDA.

    nemo_train.py EXAMPLES JOBS.json FOLDER

EXAMPLES is examples/nlp/language_modeling of a NeMo checkout. A job (tests/helpers/jobs.py) has "arguments" and may have a script of
its own, and plugin: false.

The CPU runtime of this project answers for the GPU in megatron.core; what else NeMo asks of a GPU, of apex and of Transformer
Engine is answered here.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

from tests.helpers.jobs import run_each, run_script


def install() -> None:
    os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "0")  # megatron_base_model.py:404
    from exact_megatron.training import cpu_runtime
    from exact_megatron.training.torch_adam import restore_torch_adam_steps

    cpu_runtime.install()
    restore_torch_adam_steps()
    import torch

    torch.cuda.Stream = lambda *args, **kwargs: cpu_runtime.Inert()  # megatron_base_model.py:276
    torch.cuda.FloatTensor = torch.FloatTensor  # clip_grads.py
    import megatron.core.tensor_parallel.layers as layers
    import megatron.core.transformer.transformer_block as block
    import megatron.core.utils as core_utils
    import nemo.collections.nlp.parts.nlp_overrides as overrides
    from nemo.core.optim.mcore_optim import McoreDistributedOptimizer

    overrides.MegatronDistributedFusedAdam = type("Absent", (), {})  # isinstance() only
    overrides.McoreDistributedOptimizer = McoreDistributedOptimizer
    overrides.HAVE_APEX = True
    import nemo.collections.nlp.modules.common.megatron.utils as utils

    utils.listify_model = lambda model: model if isinstance(model, list) else [model]
    utils.FastLayerNorm = utils.FusedLayerNorm = utils.MixedFusedRMSNorm = type("Absent", (), {})
    import nemo.collections.nlp.models.language_modeling.megatron_base_model as base
    import nemo.collections.nlp.models.language_modeling.megatron_gpt_model as gpt
    import nemo.collections.nlp.modules.common.megatron.build_model as build
    import nemo.collections.nlp.modules.common.megatron.clip_grads as clip

    # dropped together with apex, although they are megatron.core's (build_model.py:36)
    name = "set_defaults_if_not_set_tensor_model_parallel_attributes"
    setattr(build, name, getattr(layers, name))
    for spec in ("layer_with_transformer_engine", "full_te_layer_autocast", "layer_with_te_and_hyena"):
        setattr(gpt, f"get_gpt_{spec}_spec", lambda *args, **kwargs: None)  # get_specs builds all to pick one
    clip.multi_tensor_applier = core_utils.local_multi_tensor_applier
    clip.amp_C = types.SimpleNamespace(
        multi_tensor_l2norm=core_utils.local_multi_tensor_l2_norm,
        multi_tensor_scale=core_utils.local_multi_tensor_scale,
    )

    class Norm(torch.nn.LayerNorm):
        """A norm that knows sequence parallelism; megatron.core's own is apex's."""

        def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
            super().__init__(hidden_size, eps=eps)
            for parameter in self.parameters():
                parameter.sequence_parallel = config.sequence_parallel

    local = gpt.get_gpt_layer_local_spec

    def local_spec(*args: Any, **kwargs: Any) -> Any:
        spec = local(*args, **kwargs)
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
        return spec

    gpt.get_gpt_layer_local_spec = local_spec
    block.LayerNormImpl = Norm

    # NeMo builds the model before the process groups, and megatron.core's attention asks for its own.
    stock = base.initialize_model_parallel_for_nemo

    def initialize(*args: Any, **kwargs: Any) -> None:
        stock(*args, **kwargs)
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        overrides.init_model_parallel(False)
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(kwargs["seed"])  # megatron_init.py:221 does where there are devices

    base.initialize_model_parallel_for_nemo = initialize


def run(examples: Path, job: dict) -> None:
    from hydra.core.plugins import Plugins
    from hydra.core.singleton import Singleton

    Singleton._instances.pop(Plugins, None)  # NeMo's imports have had them scanned
    if not job.get("plugin", True):
        sys.modules["hydra_plugins"] = None  # as where this package is not installed
    run_script(examples / job.get("script", "megatron_gpt_pretraining.py"), job["arguments"])


def main() -> None:
    install()
    import torch

    torch.set_num_threads(1)
    examples, table, folder = sys.argv[1:]
    run_each(table, Path(folder), lambda job: run(Path(examples), job))


if __name__ == "__main__":  # the writer of torch_dist checkpoints spawns a child that imports this file
    main()
