"""One rank that trains a tiny NeMo 2 GPTModel several times where torch has no CUDA: nemo_recipe_train.py JOBS.json FOLDER

A job (tests/helpers/jobs.py) has "data", "exact", "model", "strategy", "module", "plain_data", "dataset_alone": settings of
ExactCallback (absent: a plain run), arguments of GPTConfig, MegatronStrategy and PreTrainingDataModule, and whether ExactDataset is left
out or alone. Losses and gradient norms go to FOLDER/NAME.RANK.json.

nemo_run, tensorstore and modelopt, which this does not use, are absent: NeMo's imports of them are answered by stubs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import nemo_train

from tests.helpers.jobs import run_each


def install() -> None:
    nemo_train.install()
    sys.modules.update({name: MagicMock(__path__=[]) for name in ("nemo_run", "tensorstore")})
    import torch

    torch.cuda.set_device = lambda device: None
    import nemo.collections.llm.gpt.model.base  # noqa: F401

    name = "nemo.collections.llm.modelopt"  # needs modelopt, for models that modelopt has changed
    stubs = {f"{name}{part}": MagicMock(__path__=[]) for part in ("", ".model_utils", ".distill", ".distill.utils")}
    stubs[f"{name}.distill.utils"].get_tensor_shapes_adjust_fn_for_distillation = lambda *args, **kwargs: None
    sys.modules.update(stubs)


def train(job: dict[str, Any], folder: Path) -> None:
    import nemo.lightning as nl
    import torch
    from lightning.pytorch.callbacks import Callback
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from nemo.collections.common.tokenizers.bytelevel_tokenizers import ByteLevelTokenizer
    from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule
    from nemo.collections.llm.gpt.model.base import GPTConfig, GPTModel, local_layer_spec
    from nemo.lightning.pytorch.optim.megatron import MegatronOptimizerModule

    from exact_megatron.integrations.nemo_recipes import ExactCallback, ExactDataset

    class Record(Callback):
        def __init__(self) -> None:
            self.steps: list[dict[str, float]] = []

        def setup(self, *args: Any, **kwargs: Any) -> None:
            from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

            model_parallel_cuda_manual_seed(1)  # NeMo does where there are devices

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    exact = job.get("exact")
    weighted = job.get("dataset_alone", exact is not None and not job.get("plain_data"))
    record = Record()
    tokenizer = ByteLevelTokenizer()
    config = GPTConfig(
        **{
            **{"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "seq_length": 64},
            **{"hidden_dropout": 0.0, "attention_dropout": 0.0, "init_method_std": 0.2, "use_cpu_initialization": True},
            **{"masked_softmax_fusion": False, "bias_activation_fusion": False, "bias_dropout_fusion": False},
            **{"apply_rope_fusion": False, "gradient_accumulation_fusion": False, "persist_layer_norm": False},
            **{"cross_entropy_loss_fusion": False, "deallocate_pipeline_outputs": False},
            **{"transformer_layer_spec": local_layer_spec, "position_embedding_type": "rope"},
            **job.get("model", {}),
        }
    )
    data = PreTrainingDataModule(
        **{
            **{"paths": [job["data"]], "seq_length": 64, "tokenizer": tokenizer, "micro_batch_size": 2},
            **{"global_batch_size": 8, "num_workers": 0, "pin_memory": False, "split": "90,10,0"},
            **{"index_mapping_dir": f"{folder}/cache"},
            **({"dataset_cls": ExactDataset} if weighted else {}),
            **job.get("module", {}),
        }
    )
    settings = OptimizerConfig(lr=1e-3, optimizer="adam", use_distributed_optimizer=True, clip_grad=1.0)
    model = GPTModel(config, optim=MegatronOptimizerModule(config=settings), tokenizer=tokenizer)
    trainer = nl.Trainer(
        devices=int(os.environ["WORLD_SIZE"]),
        accelerator="cpu",
        max_steps=4,
        limit_val_batches=1,
        val_check_interval=4,
        limit_test_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
        strategy=nl.MegatronStrategy(
            ddp=DistributedDataParallelConfig(use_distributed_optimizer=True), **job.get("strategy", {})
        ),
        callbacks=[*([] if exact is None else [ExactCallback(**exact)]), record],
    )
    torch.manual_seed(1)
    trainer.fit(model, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    (folder / f"{job['name']}.{os.environ['RANK']}.json").write_text(json.dumps([record.steps, metrics]))


if __name__ == "__main__":
    install()
    import torch

    torch.set_num_threads(1)
    run_each(sys.argv[1], Path(sys.argv[2]), lambda job: train(job, Path(sys.argv[2])))
