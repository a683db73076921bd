"""Configurations that EXACT refuses; prints what pretrain() said of each."""

import dataclasses
import os
import sys

import bridge_cpu
from megatron.bridge.training import config as c
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

from exact_megatron.integrations import bridge


def mock(config):
    config.dataset.blend = None


def mock_class(config):
    config.dataset = c.MockGPTDatasetConfig(
        random_seed=1,
        seq_length=64,
        reset_position_ids=False,
        reset_attention_mask=True,
        eod_mask_loss=False,
        dataloader_type="single",
        num_workers=0,
    )


def fim(config):
    known = {f.name: getattr(config.dataset, f.name) for f in dataclasses.fields(c.GPTDatasetConfig) if f.init}
    known = {name: known[name] for name in ("random_seed", "blend", "split", "eod_mask_loss", "reset_position_ids")}
    extra = {"middle": 1, "prefix": 2, "suffix": 3, "pad": 4, "eod": 5}
    config.dataset = c.GPTFIMDatasetConfig(
        fim_rate=0.5,
        fim_spm_rate=0.5,
        fim_extra_tokens=extra,
        seq_length=64,
        reset_attention_mask=True,
        dataloader_type="single",
        num_workers=0,
        **known,
    )


def sft(config):
    if hasattr(c, "FinetuningDatasetConfig"):
        config.dataset = c.FinetuningDatasetConfig(seq_length=64, dataset_root="none", dataloader_type="batch")
    else:
        from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetConfig

        config.dataset = GPTSFTDatasetConfig(seq_length=64, dataset_root="none", dataloader_type="batch")


def mtp(config):
    config.model.mtp_num_layers = 1


def teacher(config):
    config.model.teacher = bridge_cpu.tiny().model


def unmasked(config):
    config.dataset.reset_attention_mask = False


def dense(config):
    config.dataset.skip_getting_attention_mask_from_dataset = False


def skipped(config):
    config.train.iterations_to_skip = [3]


def cp(config):
    os.environ["WORLD_SIZE"] = "2"
    config.model.context_parallel_size = 2
    config.model.calculate_per_token_loss = False


if __name__ == "__main__":
    bridge.install(enabled=True)
    for change in (mock, mock_class, fim, sft, mtp, teacher, unmasked, dense, skipped, cp):
        config = process_config_with_overrides(bridge_cpu.tiny(), cli_overrides=sys.argv[1:])
        change(config)
        try:
            pretrain(config, forward_step)
        except (ValueError, AssertionError) as error:
            print(f"CASE {change.__name__}: {type(error).__name__}: {error}".replace("\n", " "), flush=True)
        else:
            print(f"CASE {change.__name__}: trained", flush=True)
