"""A user's script that knows nothing of EXACT: a recipe, YAML over it, the command line over both."""

import argparse

from megatron.bridge.recipes.llama import llama32_1b_pretrain_config
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-file")
    args, overrides = parser.parse_known_args()
    config = process_config_with_overrides(
        llama32_1b_pretrain_config(), config_filepath=args.config_file, cli_overrides=overrides or None
    )
    pretrain(config, forward_step)
