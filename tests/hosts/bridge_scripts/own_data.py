"""A script whose data are built by the user's own provider, past Bridge's builder."""

import sys

import bridge_cpu
import megatron.bridge.data.utils as data
from megatron.bridge.training.config import GPTDatasetConfig
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset

from exact_megatron.integrations import bridge


def own_data(sizes, config):
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()


if __name__ == "__main__":
    bridge.install()
    data._REGISTRY[GPTDatasetConfig] = own_data
    pretrain(process_config_with_overrides(bridge_cpu.tiny(), cli_overrides=sys.argv[1:]), forward_step)
