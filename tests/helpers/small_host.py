"""Megatron-LM in a few lines: what pretrain_gpt.py and megatron.training are to the hook."""

from __future__ import annotations

import sys
import types
from argparse import Namespace

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset

from exact_megatron import ExactConfig

ARGS = {"micro_batch_size": 1, "transformer_impl": "transformer_engine", "spec": None, "data_path": ["x"]}
MODEL = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 4096
    --micro-batch-size 1 --train-iters 10 --lr 1e-3
"""
UNMASKED = ExactConfig(enabled=True, alpha=0.5, allow_unmasked_documents=True)

SCRIPT = """
from functools import partial
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.training import pretrain

def loss_func(loss_mask, output_tensor, model=None):
    count = loss_mask.sum().int()
    loss = (output_tensor.view(-1) * loss_mask.view(-1)).sum()
    return loss, count, {"lm loss": loss.detach().view(1)}

def forward_step(data_iterator, model):
    batch = next(data_iterator)
    return model(batch), partial(loss_func, batch["loss_mask"], model=model)

def provider(sizes):
    return BlendedMegatronDatasetBuilder(cls, sizes, lambda: True, config).build()
"""


def training_log(loss_dict, total_loss_dict, iteration, skipped_iter, is_first_iteration=False):
    """As Megatron-LM 0.19 sums losses over a log interval, and what it prints (before, means above 0 alone)."""
    assert not skipped_iter or not any(value.isnan() for value in loss_dict.values()), "counted as NaN iteration"
    if not skipped_iter:
        total_loss_dict["advanced"] = total_loss_dict.get("advanced", 0) + 1
        for key in loss_dict:
            total_loss_dict[key] = total_loss_dict.get(key, torch.tensor([0.0])) + loss_dict[key]
    printed = {}
    if iteration % 4 == 0 or is_first_iteration:
        for key in set(total_loss_dict) - {"advanced"}:
            mean = total_loss_dict[key].item() / max(1, total_loss_dict["advanced"])
            printed[key] = round(mean, 4)
            if not is_first_iteration:
                total_loss_dict[key] = torch.tensor([0.0])
        if not is_first_iteration:
            total_loss_dict["advanced"] = 0
    return printed


class Host:
    """A script, its pretrain, and the arguments that megatron.training.get_args returns."""

    def __init__(self, monkeypatch, config, cls=GPTDataset, script=SCRIPT):
        self.args = Namespace(**ARGS, seq_length=config.sequence_length)
        self.steps = []
        training, checkpointing = (
            types.ModuleType("megatron.training"),
            types.ModuleType("megatron.training.checkpointing"),
        )
        training.get_args, training.pretrain, training.checkpointing = lambda: self.args, self.pretrain, checkpointing
        training.training = types.ModuleType("megatron.training.training")
        training.training.training_log = training_log
        training.training.save_checkpoint = lambda *args: None
        training.training.initialize_megatron = lambda: None
        checkpointing.check_checkpoint_args = lambda checkpoint_args: None
        self.checkpointing = checkpointing
        monkeypatch.setitem(sys.modules, "megatron.training", training)
        monkeypatch.setitem(sys.modules, "megatron.training.training", training.training)
        monkeypatch.setitem(sys.modules, "megatron.training.checkpointing", checkpointing)
        monkeypatch.setattr(sys.modules["megatron"], "training", training, raising=False)
        self.script = {"cls": cls, "config": config}
        exec(script, self.script)

    def pretrain(self, train_valid_test_dataset_provider, model_type, forward_step_func, resumed=None):
        if resumed is not None:
            self.checkpointing.check_checkpoint_args(resumed)
        data = train_valid_test_dataset_provider([8, 0, 0])[0]
        for i in range(4):
            sample = data[i]

            def model(batch):
                return torch.arange(1.0, 1 + batch["loss_mask"].numel())

            output, loss_func = forward_step_func(iter([sample]), model)
            self.steps.append((sample["loss_mask"], loss_func(output)))
        return "trained"

    def run(self, host, **kwargs):
        return host.hook(self.pretrain)(self.script["provider"], "gpt", self.script["forward_step"], **kwargs)
