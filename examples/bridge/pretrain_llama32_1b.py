"""Pretraining of Llama 3.2 1B with Megatron-Bridge: a recipe, a YAML file over it, the command line over both.

    torchrun --nproc-per-node 8 examples/bridge/pretrain_llama32_1b.py \
        --config-file examples/bridge/conf/llama32_1b_exact.yaml \
        "dataset.blend=[[/data/fineweb_edu_text_document],null]" model.exact.alpha=0.15

It is a script as Megatron-Bridge has them, and two lines.
"""

import argparse

import torch
from megatron.bridge.recipes.llama import llama32_1b_pretrain_config
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

from exact_megatron.integrations import bridge  # EXACT


def main() -> None:
    bridge.install()  # EXACT: before the arguments and the YAML file are read
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config-file", help="YAML of overrides")
    args, overrides = parser.parse_known_args()
    config = process_config_with_overrides(
        llama32_1b_pretrain_config(), config_filepath=args.config_file, cli_overrides=overrides
    )
    pretrain(config=config, forward_step_func=forward_step)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
